import ApusCommandLine
import ApusEngine
import Testing

/// What is said on the command line about speculative decoding is what the engine is told.
@Suite struct SpeculationFlagTests {
  /// Any directory is a model's path here: nothing is loaded.
  private func configuration(_ line: String) async throws -> EngineConfiguration {
    try await engineConfiguration(of: ["--model-path", "/"] + line.split(separator: " ").map(String.init))
  }

  @Test func flagsReachTheEngine() async throws {
    let plain = try await configuration("")
    #expect(plain.speculativeDraftTokens == 0)
    let ngram = try await configuration("--speculative-algorithm NGRAM --speculative-ngram-capacity 77")
    #expect(ngram.speculativeAlgorithm == .ngram && ngram.speculativeDraftTokens == 8)
    #expect(ngram.speculativeNgramCapacity == 77)
    for name in ["NEXTN", "nextn", "mtp", "MTP"] {
      let nextn = try await configuration("--speculative-algorithm \(name)")
      #expect(nextn.speculativeAlgorithm == .nextn && nextn.speculativeDraftTokens == 5)
    }
    let eagle = try await configuration("--speculative-algorithm EAGLE3 --draft-model /")
    #expect(eagle.speculativeAlgorithm == .eagle3 && eagle.speculativeDraftModelPath == "/")
    #expect(eagle.speculativeDraftTokens == 5)
    let first = try await configuration("--speculative-algorithm EAGLE --speculative-draft-model-path /")
    #expect(first.speculativeAlgorithm == .eagle)
    let none = try await configuration("--speculative-algorithm EAGLE")
    #expect(none.speculativeAlgorithm == .nextn)
    let tree = try await configuration(
      "--speculative-algorithm nextn --speculative-eagle-topk 4 --speculative-num-steps 3 --speculative-num-draft-tokens 9"
    )
    #expect(tree.speculativeTopK == 4 && tree.speculativeDraftTokens == 3 && tree.speculativeTreeTokens == 9)
    let steps = try await configuration("--speculative-algorithm mtp --speculative-num-steps 3")
    #expect(steps.speculativeDraftTokens == 3)
    let both = try await configuration(
      "--speculative-algorithm mtp --speculative-num-steps 6 --speculative-num-draft-tokens 4")
    #expect(both.speculativeDraftTokens == 4)
    for flag in ["--draft-model", "--speculative-draft-model-path"] {
      let standalone = try await configuration("\(flag) /")
      #expect(standalone.speculativeAlgorithm == .standalone && standalone.speculativeDraftModelPath == "/")
      #expect(standalone.speculativeDraftTokens == 5)
    }
  }

  @Test(arguments: [
    "--speculative-num-draft-tokens 3", "--speculative-eagle-topk 2",
    "--speculative-algorithm mtp --speculative-eagle-topk 9",
    "--speculative-algorithm ngram --speculative-eagle-topk 2",
    "--speculative-num-steps 3", "--speculative-ngram-capacity 5",
    "--speculative-algorithm ngram --speculative-num-steps 3", "--speculative-algorithm standalone",
    "--speculative-algorithm ngram --draft-model /", "--speculative-algorithm mtp --speculative-num-steps 0",
    "--speculative-algorithm ngram --speculative-num-draft-tokens 65", "--speculative-algorithm eagle3",
    "--speculative-algorithm mtp --speculative-ngram-capacity 5",
  ])
  func whatDoesNotGoTogetherIsRefused(line: String) async {
    await #expect(throws: (any Error).self) { _ = try await configuration(line) }
  }
}
