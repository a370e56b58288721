import ApusCore
import ArgumentParser

/// `apus doctor`
struct Doctor: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Says what this machine can do, what is missing and the command that mends it.",
    discussion: """
      Given a checkpoint directory, it also says whether the model would load. The exit status is 1 if there is a problem.

      Examples:
        apus doctor
        apus doctor models/Qwen2.5-0.5B-Instruct
        apus doctor --json
      """)

  @Argument(
    help: ArgumentHelp("A checkpoint directory to look at.", valueName: "model"), completion: .directory)
  var model: String?
  @Flag(help: "Prints the findings as JSON.")
  var json = false

  func run() throws {
    let machine = MachineReport()
    var findings = machine.findings()
    if let model { findings += CheckpointReport(path: model, availableMemory: machine.availableMemory).findings() }
    let problems = findings.filter { $0.level == .problem }.count
    if json {
      let object: JSONValue = [
        "version": .string(ApusProgram.version), "healthy": .bool(problems == 0),
        "findings": .array(findings.map(\.json)),
      ]
      Terminal.output.line(object.compactText)
    } else {
      let width = findings.map(\.subject.count).max() ?? 0
      for finding in findings {
        let mark =
          switch finding.level {
          case .good: "ok  "
          case .note: "note"
          case .problem: "BAD "
          }
        Terminal.output.line("\(mark)  \(finding.subject.padded(width))  \(finding.text)")
        if let remedy = finding.remedy { Terminal.output.line("      \("".padded(width))  -> \(remedy)") }
      }
    }
    if problems > 0 { throw CommandFailure(json ? "" : "\(problems) problem\(problems == 1 ? "" : "s") found.") }
  }
}
