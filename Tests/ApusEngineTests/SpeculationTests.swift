import Apus
import ApusCore
import ApusEngine
import ApusScheduling
import Foundation
import Testing

private let models = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
  .appendingPathComponent("../../Models").standardizedFileURL.path
private let model = models + "/apus-demo"
private let mixture = models + "/apus-demo-moe"

/// Guessing tokens ahead changes nothing but the number of steps: on chats that ask for a list again.
@Suite("Speculative decoding", .serialized) struct SpeculationTests {
  private struct Answer: Equatable {
    var tokens: [TokenID]
    var text: String
    var logprobs: [PositionLogprobs]
    var reason: FinishReason
  }

  private static let words = [
    "fox", "singer", "purple", "letter", "red", "bottle", "deer", "spoon", "river", "baker", "hen",
  ]

  /// A list of the demo world's words.
  private static func list(_ seed: UInt64) -> String {
    (0..<9).map { words[(Int(seed) + $0 * Int(1 + seed % 10)) % words.count] }.joined(separator: ", ")
  }

  /// Requests with one option or another, drawn from a seed.
  private func request(_ seed: UInt64) -> Request {
    var sampling = SamplingParameters()
    sampling.seed = seed
    sampling.maxNewTokens = 32 + Int(seed % 5) * 8
    sampling.temperature = seed % 3 == 0 ? 0 : 0.7
    if seed % 4 == 1 { sampling.topP = 0.9 }
    if seed % 5 == 1 { sampling.frequencyPenalty = 0.4 }
    if seed % 5 == 2 { sampling.repetitionPenalty = 1.2 }
    if seed % 7 == 3 { sampling.minNewTokens = 20 }
    if seed % 6 == 4 { sampling.grammar = .regex("([a-z]{3,6}, ){2,9}red") }
    if seed % 8 == 5 { sampling.logitBias = [300: 2, 301: -100] }
    if seed % 9 == 6 { sampling.ignoreEOS = true }
    if seed % 11 == 7 { sampling.stop = ["red"] }
    // A list that has been said once is asked for again.
    let list = Self.list(seed)
    let asked = "<|im_start|>user\nRepeat after me: \(list)<|im_end|>\n<|im_start|>assistant\n"
    var request = Request(prompt: .text("\(asked)\(list)<|im_end|>\n\(asked)"), sampling: sampling)
    if seed % 4 == 2 { request.logprobs = LogprobOptions(topCount: 2) }
    return request
  }

  private func answers(
    drafts: Int, overlap: Bool, at once: Int, count: UInt64 = 42, path: String = model,
    _ configure: (inout EngineConfiguration) -> Void = { _ in }
  ) async throws -> ([Answer], ServiceStatistics) {
    var configuration = EngineConfiguration(modelPath: path)
    configuration.speculativeDraftTokens = drafts
    configuration.enablesOverlap = overlap
    configuration.maxTotalTokens = 4096
    // Drafts are cheap, so that there are many.
    configuration.speculativeCosts = DraftCosts(row: 0.02, draft: 0)
    configure(&configuration)
    return try await withEngine(configuration) { engine in
      var answers: [Answer] = []
      for first in stride(from: UInt64(0), to: count, by: UInt64.Stride(once)) {
        // The streams are all begun before any is read.
        let streams = try (first..<min(count, first + UInt64(once))).map { try engine.generate(request($0)) }
        for stream in streams {
          let result = try await stream.result()
          answers.append(
            Answer(tokens: result.tokens, text: result.text, logprobs: result.logprobs, reason: result.finishReason))
        }
      }
      return (answers, engine.statistics())
    }
  }

  @Test("Tokens, log-probabilities and ends are those of plain decoding, to the bit, alone and together")
  func identical() async throws {
    let (plain, statistics) = try await answers(drafts: 0, overlap: true, at: 1)
    #expect(statistics.draftTokens == 0)
    // What the drafts are of is the list that was asked for, wherever no option forbids it.
    let free = [UInt64(0), 9, 30, 39]
    let right = free.filter { plain[Int($0)].text == Self.list($0) }
    #expect(right.count >= 3, "\(free.map { plain[Int($0)].text })")
    for (drafts, overlap, once) in [(8, true, 1), (3, false, 1), (8, true, 5), (1, true, 20)] {
      let (guessed, counts) = try await answers(drafts: drafts, overlap: overlap, at: once)
      for (seed, pair) in zip(plain, guessed).enumerated() {
        #expect(pair.0 == pair.1, "seed \(seed), \(drafts) drafts, overlap \(overlap), \(once) at once")
      }
      if once < 20 {
        #expect(counts.acceptedDraftTokens > 100 && counts.acceptedDraftTokens < counts.draftTokens, "\(counts)")
        #expect(counts.steps < statistics.steps || once > 1)
      }
    }
  }

  @Test("A draft model that is the model itself is always right, and changes nothing; costs are measured")
  func standalone() async throws {
    let (plain, statistics) = try await answers(drafts: 0, overlap: true, at: 1, count: 14)
    for once in [1, 7] {
      let (drafted, counts) = try await answers(drafts: 4, overlap: true, at: once, count: 14) {
        $0.speculativeAlgorithm = .standalone
        $0.speculativeDraftModelPath = model
        if once > 1 { $0.speculativeCosts = nil }
      }
      for (seed, pair) in zip(plain, drafted).enumerated() {
        #expect(pair.0 == pair.1, "seed \(seed), \(once) at once")
      }
      // As dear as the model, it is not asked where the costs are known.
      if once == 1 {
        #expect(counts.speculation.acceptRate > 0.95 && counts.steps < statistics.steps / 2, "\(counts)")
      }
    }
  }

  @Test("A draft model with another vocabulary is refused")
  func otherVocabulary() async throws {
    let path = models + "/../../shared/data/models/stories260K"
    guard FileManager.default.fileExists(atPath: path + "/config.json") else {
      return print("Skipped: \(path) does not exist.")
    }
    await #expect(throws: EngineError.self) {
      _ = try await answers(drafts: 4, overlap: true, at: 1, count: 1) {
        $0.speculativeAlgorithm = .standalone
        $0.speculativeDraftModelPath = path
      }
    }
  }

  @Test("A checkpoint without a prediction layer says so")
  func noPredictionLayer() async throws {
    do {
      _ = try await answers(drafts: 4, overlap: true, at: 1, count: 1) { $0.speculativeAlgorithm = .nextn }
      Issue.record("it was accepted")
    } catch { #expect("\(error)".contains("multi-token prediction"), "\(error)") }
  }

  @Test("The prediction layer of the demo mixture of experts is often right, and changes nothing")
  func prediction() async throws {
    guard FileManager.default.fileExists(atPath: mixture + "/config.json") else {
      return print("Skipped: \(mixture) does not exist.")
    }
    let (plain, statistics) = try await answers(drafts: 0, overlap: true, at: 1, count: 20, path: mixture)
    for once in [1, 5] {
      let (drafted, counts) = try await answers(drafts: 3, overlap: true, at: once, count: 20, path: mixture) {
        $0.speculativeAlgorithm = .nextn
      }
      for (seed, pair) in zip(plain, drafted).enumerated() {
        #expect(pair.0 == pair.1, "seed \(seed), \(once) at once")
      }
      // Most options move the draws away from what it guesses; `MixtureModelTests` has those that none moves.
      #expect(counts.acceptedDraftTokens > 20, "\(counts)")
      if once == 1 { #expect(counts.steps < statistics.steps, "\(counts)") }
    }
  }
}
