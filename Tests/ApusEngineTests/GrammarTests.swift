import Apus
import ApusCore
import ApusEngine
import Foundation
import Testing

private let model = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
  .appendingPathComponent("../../Models/apus-demo").standardizedFileURL.path

/// Grammars hold whatever is drawn, and hold back nothing that is right.
@Suite("Constrained generation", .serialized) struct ConstrainedGenerationTests {
  private static let colours = ["blue", "green", "red", "brown"]

  /// A question about a story as the demo model's template writes it; the seed chooses the colour that is the answer.
  private static func question(_ seed: UInt64) -> String {
    let colour = colours[Int(seed % 4)]
    return "<|im_start|>user\nStory: Victor is a baker. Victor owns a \(colour) donkey. Jonas lives in Ashford.\n"
      + "Question: What colour is the donkey?<|im_end|>\n<|im_start|>assistant\n"
  }

  private func configuration() -> EngineConfiguration {
    var configuration = EngineConfiguration(modelPath: model)
    configuration.maxTotalTokens = 8192
    return configuration
  }

  private func request(
    _ grammar: GrammarSpecification?, seed: UInt64 = 1, tokens: Int = 60,
    change: (inout SamplingParameters) -> Void = { _ in }
  ) -> Request {
    var sampling = SamplingParameters()
    sampling.seed = seed
    sampling.maxNewTokens = tokens
    sampling.grammar = grammar
    change(&sampling)
    return Request(prompt: .text(Self.question(seed)), sampling: sampling)
  }

  private func matches(_ text: String, _ pattern: String) -> Bool {
    text.range(of: "^(?:\(pattern))$", options: .regularExpression) != nil
  }

  @Test("The text matches, whatever is drawn, alone and among others, overlapped or not; the likeliest is right")
  func regex() async throws {
    let pattern = "The [a-z]{3,8} is [a-z]{3,6}( and [a-z]{3,6}){0,2}[.!]"
    var alone: [UInt64: [TokenID]] = [:]
    for overlap in [true, false] {
      var configuration = configuration()
      configuration.enablesOverlap = overlap
      configuration.tokenBudget = overlap ? 512 : 16
      try await withEngine(configuration) { engine in
        for seed in UInt64(1)...4 {
          let result = try await engine.generate(request(.regex(pattern), seed: seed) { $0.temperature = 2 }).result()
          #expect(matches(result.text, pattern), "seed \(seed): \(result.text)")
          if case .stop = result.finishReason {} else { Issue.record("seed \(seed) ended with \(result.finishReason)") }
          if let known = alone[seed] { #expect(result.tokens == known, "seed \(seed)") }
          alone[seed] = result.tokens
          let best = try await engine.generate(request(.regex(pattern), seed: seed) { $0.temperature = 0 }).result()
          #expect(best.text == "The donkey is \(Self.colours[Int(seed % 4)]).")
        }
        let known = alone
        try await withThrowingTaskGroup(of: Void.self) { group in
          for index in 0..<24 {
            let seed = UInt64(index % 6 + 1)
            let right = "It is \(Self.colours[Int(seed % 4)])."
            let grammar: GrammarSpecification? =
              index % 3 == 0
              ? nil : index % 3 == 1 ? .regex(pattern) : .choices(Self.colours.map { "It is \($0)." } + ["It is."])
            let request = request(grammar, seed: seed) { $0.temperature = index % 3 == 2 ? 0 : 2 }
            group.addTask {
              let result = try await engine.generate(request).result()
              if index % 3 == 1 {
                #expect(matches(result.text, pattern), "seed \(seed): \(result.text)")
                if let known = known[seed] { #expect(result.tokens == known, "seed \(seed) among others") }
              }
              if index % 3 == 2 { #expect(result.text == right) }
            }
          }
          try await group.waitForAll()
        }
      }
    }
  }

  @Test("Penalties, log-probabilities, a minimum length and greedy draws keep to the grammar")
  func options() async throws {
    try await withEngine(configuration()) { engine in
      var wanted = request(.regex("(ab|ba){2,40}"), tokens: 120) {
        $0.repetitionPenalty = 1.3
        $0.frequencyPenalty = 1
        $0.minNewTokens = 30
      }
      wanted.logprobs = LogprobOptions(topCount: 3)
      let result = try await engine.generate(wanted).result()
      #expect(matches(result.text, "(ab|ba){2,40}"), "\(result.text)")
      #expect(result.tokens.count >= 30 || result.text.utf8.count == 80, "\(result.tokens.count)")
      // Where only the end may come, a minimum does not keep it away.
      let short = try await engine.generate(request(.choices(["cat"])) { $0.minNewTokens = 20 }).result()
      #expect(short.text == "cat")
      let greedy = try await engine.generate(request(.regex("[0-9]{4}")) { $0.temperature = 0 }).result()
      #expect(matches(greedy.text, "[0-9]{4}"), "\(greedy.text)")
    }
  }

  @Test("Forced text takes fewer steps, is the same alone and among others, and is tokenized as a model would")
  func jumpForward() async throws {
    let pattern =
      "The donkey of Victor is (blue|green|red|brown), says Jonas\\. "
      + "The baker is called [A-Z][a-z]{2,7} and he lives in (Ashford|Birchley) with his (donkey|horse)\\. The end\\."
    var steps: [Bool: Int] = [:]
    var alone: [UInt64: [TokenID]] = [:]
    for (jumps, overlap) in [(true, true), (true, false), (false, true)] {
      var configuration = configuration()
      configuration.enablesJumpForward = jumps
      configuration.enablesOverlap = overlap
      configuration.tokenBudget = overlap ? 512 : 16
      try await withEngine(configuration) { engine in
        for seed in UInt64(1)...4 {
          let result = try await engine.generate(request(.regex(pattern), seed: seed, tokens: 200)).result()
          #expect(matches(result.text, pattern), "seed \(seed): \(result.text)")
          #expect(try engine.decode(result.tokens, skipSpecialTokens: true) == result.text)
          let best = try await engine.generate(request(.regex(pattern), seed: seed, tokens: 200) { $0.temperature = 0 })
            .result()
          // What was drawn token by token may be in pieces that the model has never read, and so wrong.
          if !jumps { continue }
          #expect(
            best.text.hasPrefix("The donkey of Victor is \(Self.colours[Int(seed % 4)]), says Jonas. The baker is"))
          if let known = alone[seed] { #expect(result.tokens == known, "seed \(seed), overlap \(overlap)") }
          alone[seed] = result.tokens
          // Where no draw stands between them, tokens are the tokenizer's own.
          let plain = try engine.encode(result.text, addSpecialTokens: false)
          #expect(Set(plain).intersection(result.tokens).count * 10 >= Set(plain).count * 7, "\(result.tokens)")
        }
        let statistics = engine.statistics()
        #expect((statistics.forcedTokens > 100) == jumps, "\(statistics.forcedTokens) tokens were forced")
        if overlap { steps[jumps] = statistics.steps }
        guard jumps else { return }
        let known = alone
        try await withThrowingTaskGroup(of: Void.self) { group in
          for index in 0..<16 {
            let seed = UInt64(index % 4 + 1)
            let isPlain = index % 2 == 0
            // Log-probabilities change no token; a penalty does, where there is a choice.
            var request = request(isPlain ? nil : .regex(pattern), seed: seed, tokens: 200) {
              if index == 5 { $0.repetitionPenalty = 1.1 }
            }
            if index == 3 { request.logprobs = LogprobOptions(topCount: 1) }
            let (asked, changed) = (request, index == 5)
            group.addTask {
              let result = try await engine.generate(asked).result()
              if isPlain { return }
              #expect(matches(result.text, pattern), "\(result.text)")
              if !changed { #expect(result.tokens == known[seed], "seed \(seed) among others") }
              if asked.logprobs != nil { #expect(result.logprobs.count == result.tokens.count) }
            }
          }
          try await group.waitForAll()
        }
      }
    }
    let (with, without) = (try #require(steps[true]), try #require(steps[false]))
    #expect(with * 2 < without, "\(with) steps with jumps, \(without) without")
  }

  @Test("A grammar that is wrong ends its request alone, with the reason")
  func errors() async throws {
    try await withEngine(configuration()) { engine in
      for _ in 0..<2 {
        // The second time the error comes from the cache.
        let error = await #expect(throws: EngineError.self) {
          _ = try await engine.generate(request(.ebnf("root ::= \"a"))).result()
        }
        #expect(error?.code == .invalidRequest && error?.message.contains("line 1") == true)
      }
      #expect(try await engine.generate(request(.choices(["fine"]))).result().text == "fine")
      let aborted = try engine.generate(request(.regex("[a-z]{2000}"), tokens: 100))
      engine.abort(aborted.id)
      _ = try? await aborted.result()
    }
  }

  @Test("After a retraction the grammar goes on where it was, and the tokens are those of a request alone")
  func retraction() async throws {
    let pattern = "([a-z]{3,8} ){110,120}end"
    func asked(_ seed: UInt64) -> Request { request(.regex(pattern), seed: seed, tokens: 240) { $0.temperature = 2 } }
    var alone: [[TokenID]] = []
    try await withEngine(configuration()) { engine in
      for seed in UInt64(0)..<5 { alone.append(try await engine.generate(asked(seed)).result().tokens) }
    }
    var configuration = configuration()
    configuration.maxTotalTokens = 352
    configuration.scheduleConservativeness = 0.05
    try await withEngine(configuration) { engine in
      // All begin at once.
      let streams = try (0..<5).map { try engine.generate(asked(UInt64($0))) }
      var retractions = 0
      for (seed, stream) in streams.enumerated() {
        let result = try await stream.result()
        #expect(result.tokens == alone[seed], "seed \(seed)")
        let isWhole = if case .stop = result.finishReason { true } else { false }
        #expect(matches(result.text, isWhole ? pattern : "([a-z]{0,8} ?)*"), "\(result.text)")
        retractions += result.usage.retractions
      }
      #expect(retractions > 0, "Nothing was retracted, so the test shows nothing.")
    }
  }
}
