import ApusCommandLine
import Testing

@Suite struct FlagSuggestionTests {
  private let suggestions: FlagSuggestions

  init() throws { suggestions = FlagSuggestions(root: try #require(ApusProgram.commandModel())) }

  private func complaint(_ line: String) -> String? {
    suggestions.complaint(about: line.split(separator: " ").map(String.init))
  }

  @Test(arguments: [
    ("serve m --max-num-seqs 3", "--max-running-requests"), ("serve m --max-model-len=100", "--context-length"),
    ("serve -m path", "--model-path"), ("serve m -c 100", "--context-length"), ("serve m -t 4", "--threads"),
    ("serve m --gpu-memory-utilization 0.9", "--mem-fraction-static"), ("chat m --temp 1", "--temperature"),
    ("chat m -n 5", "--max-new-tokens"), ("serve m --ssl-key-file k", "--ssl-keyfile"),
    ("bench offline m --seeed 3", "--seed"), ("serve m --prot 80", "--port"), ("serv m", "apus serve"),
    ("bench servign", "apus bench serving"), ("bench serving --num-promts 3", "--num-prompts"),
  ])
  func theFlagMeantIsNamed(_ line: String, _ expected: String) throws {
    #expect(try #require(complaint(line)).contains("'\(expected)'"))
  }

  @Test func whatIsNotNeededIsExplained() throws {
    #expect(try #require(complaint("serve m --tensor-parallel-size 2")).contains("one process"))
    #expect(try #require(complaint("serve m -ngl 99")).contains("CPU"))
    #expect(try #require(complaint("serve m --trust-remote-code")).contains("never runs code"))
  }

  @Test func aFlagOfAnotherCommandIsFound() throws {
    #expect(try #require(complaint("serve m --gsp-num-groups 3")).contains("'apus bench serving'"))
  }

  @Test(arguments: [
    "serve m --port 80", "serve --model-path m", "chat m --stop -x", "generate m -i a -o b", "generate m -qi a",
    "serve m --mem-fraction-static=0.5", "bench serving --request-rate 3", "serve -- --odd", "help serve", "--version",
    "serve m --schedule-conservativeness -1",
  ])
  func whatIsKnownIsNotComplainedAbout(_ line: String) {
    #expect(complaint(line) == nil)
  }

  @Test func everyRenamedFlagExistsSomewhere() throws {
    let root = try #require(ApusProgram.commandModel())
    func names(_ command: CommandModel) -> [String] {
      command.parameters.flatMap(\.names) + command.subcommands.flatMap(names)
    }
    let known = Set(names(root))
    for (name, flag) in foreignFlags {
      if case .renamed(_, let to) = flag { #expect(known.contains(to), "\(name) is said to be \(to)") }
    }
  }

  @Test func editDistanceAgreesWithItsDefinition() {
    #expect(editDistance("", "abc") == 3)
    #expect(editDistance("kitten", "sitting") == 3)
    #expect(editDistance("port", "prot") == 1)
    #expect(editDistance("same", "same") == 0)
    // The plain recursion on all short words over two letters.
    func plain(_ a: ArraySlice<Character>, _ b: ArraySlice<Character>) -> Int {
      guard let x = a.last else { return b.count }
      guard let y = b.last else { return a.count }
      var best = min(plain(a.dropLast(), b) + 1, plain(a, b.dropLast()) + 1)
      best = min(best, plain(a.dropLast(), b.dropLast()) + (x == y ? 0 : 1))
      if a.count > 1, b.count > 1, x == b.dropLast().last, y == a.dropLast().last {
        best = min(best, plain(a.dropLast(2), b.dropLast(2)) + 1)
      }
      return best
    }
    var words: [[Character]] = [[]]
    for length in 0..<3 {
      words += words.filter { $0.count == length }.flatMap { [$0 + ["a"], $0 + ["b"]] }
    }
    for left in words {
      for right in words { #expect(editDistance(String(left), String(right)) == plain(left[...], right[...])) }
    }
  }
}
