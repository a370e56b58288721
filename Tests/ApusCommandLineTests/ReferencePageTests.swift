import ApusCommandLine
import Foundation
import Testing

@Suite struct ReferencePageTests {
  @Test func thePageInTheRepositoryIsUpToDate() throws {
    let root = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
      .deletingLastPathComponent()
    let page = try String(contentsOf: root.appending(path: "docs/reference/flags.md"), encoding: .utf8)
    #expect(
      page == ApusProgram.referencePage(),
      "docs/reference/flags.md is stale: run 'swift run -c release apus reference > docs/reference/flags.md'")
  }

  @Test func everyCommandTeaches() throws {
    let root = try #require(ApusProgram.commandModel())
    func check(_ command: CommandModel) {
      #expect(!command.abstract.isEmpty, "\(command.name) has no abstract")
      #expect(command.discussion.contains("Example"), "\(command.name) shows no example")
      for parameter in command.parameters where parameter.isVisible && !parameter.names.contains("--help") {
        #expect(!parameter.abstract.isEmpty, "\(command.name) \(parameter.names) says nothing")
      }
      command.subcommands.forEach(check)
    }
    root.subcommands.forEach(check)
    #expect(root.subcommands.count >= 6)
  }

  @Test func aTableRowHoldsNameDefaultAndValues() {
    let page = ApusProgram.referencePage()
    #expect(page.contains("| `--port` `<port>` | `8000` |"))
    #expect(page.contains("`fcfs`, `lpm`"))
  }
}
