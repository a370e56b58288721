import ApusCore
import ApusExecution
import ApusModels
import ApusScheduling
import ApusTensors
import Foundation
import Testing

struct SamplingTests {
  private let prompt: [TokenID] = [3, 14, 15, 9, 26, 5, 35, 8, 9]

  private func run(_ model: LoadedModel, _ requests: [DriverRequest], seed: UInt64 = 1) -> [DriverOutput] {
    var driver = Driver(model: model, generator: SeededGenerator(seed: seed))
    return driver.run(requests)
  }

  /// The raw logits that follow a prefix.
  private func logits(_ model: LoadedModel, _ prefix: [TokenID]) throws -> [Float] {
    try model.steps.promptLogits(prefix, positions: [prefix.count - 1])[0]
  }

  private func best(_ logits: [Float]) -> TokenID {
    TokenID(logits.indices.max { logits[$0] == logits[$1] ? $0 > $1 : logits[$0] < logits[$1] }!)
  }

  @Test func drawsDependOnSeedAndPositionAlone() throws {
    let model = try makeTinyModel()
    var request = DriverRequest(prompt: prompt, newTokens: 24)
    request.sampling = SamplingParameters()
    request.sampling.temperature = 1.5
    request.sampling.seed = 42
    var other = request
    other.sampling.seed = 43
    let whole = run(model, [request])[0].tokens
    let outputs = run(model, [request, other, request, other], seed: 5)
    #expect(outputs[0].tokens == whole && outputs[2].tokens == whole)
    #expect(outputs[1].tokens == outputs[3].tokens && outputs[1].tokens != whole)
    // Come back after a retraction: the rest is what it would have been.
    var returning = request
    returning.givenOutput = Array(whole[..<10])
    returning.newTokens = 14
    #expect(run(model, [returning])[0].tokens == Array(whole[10...]))
    // A client that sends prompt and output as a prompt gets the same continuation.
    var continued = request
    continued.prompt += whole[..<10]
    continued.newTokens = 14
    #expect(run(model, [continued])[0].tokens == Array(whole[10...]))
  }

  @Test func penaltiesFollowTheirFormulas() throws {
    let model = try makeTinyModel()
    var request = DriverRequest(prompt: prompt, newTokens: 20)
    request.sampling.repetitionPenalty = 1.4
    request.sampling.frequencyPenalty = 0.7
    request.sampling.presencePenalty = 0.3
    request.sampling.logitBias = [7: 1.5, 9: -2]
    let found = run(model, [request])[0].tokens

    var output: [TokenID] = []
    for step in 0..<20 {
      var values = try logits(model, prompt + output)
      for token in Set(prompt + output) {
        let index = Int(token)
        values[index] = values[index] > 0 ? values[index] / 1.4 : values[index] * 1.4
        let count = output.count { $0 == token }
        if count > 0 { values[index] -= 0.7 * Float(count) + 0.3 }
      }
      values[7] += 1.5
      values[9] -= 2
      output.append(best(values))
      #expect(found[step] == output[step], "step \(step)")
    }
    let plain = run(model, [DriverRequest(prompt: prompt, newTokens: 20)])[0].tokens
    #expect(plain != found)

    // The counts survive a retraction.
    var returning = request
    returning.givenOutput = Array(found[..<8])
    returning.newTokens = 12
    #expect(run(model, [returning])[0].tokens == Array(found[8...]))
  }

  @Test func stopTokensCannotBeDrawnBeforeTheirTime() throws {
    let model = try makeTinyModel()
    let plain = run(model, [DriverRequest(prompt: prompt, newTokens: 12)])[0].tokens
    var request = DriverRequest(prompt: prompt, newTokens: 12)
    request.stopTokenIDs = [plain[0], plain[3]]
    request.sampling.minNewTokens = 3
    let found = run(model, [request])[0].tokens
    for token in found[..<3] { #expect(!request.stopTokenIDs.contains(token)) }
    // Without the ban, or once it has ended, the choice is free.
    request.sampling.minNewTokens = 0
    #expect(run(model, [request])[0].tokens == plain)
    request.givenOutput = Array(plain[..<3])
    request.newTokens = 1
    request.sampling.minNewTokens = 3
    #expect(run(model, [request])[0].tokens == [plain[3]])
    request.sampling.minNewTokens = 4
    #expect(run(model, [request])[0].tokens != [plain[3]])
  }

  @Test func logprobsAreThoseOfTheRawDistribution() throws {
    let model = try makeTinyModel()
    var request = DriverRequest(prompt: prompt, newTokens: 6)
    request.sampling = SamplingParameters()
    request.sampling.seed = 8
    request.sampling.temperature = 0.7
    request.sampling.frequencyPenalty = 1
    request.sampling.logitBias = [20: 3]
    request.logprobs = LogprobOptions(topCount: 4, promptStart: 1, tokenIDs: [20, 0])
    var outputs: [DriverOutput] = []
    // Alone, and among others that make blocks and prompts overlap.
    outputs.append(run(model, [request])[0])
    outputs.append(
      run(
        model, [DriverRequest](repeating: DriverRequest(prompt: prompt, newTokens: 9), count: 5) + [request], seed: 3)[
          5])
    #expect(outputs[0] == outputs[1])

    func check(_ values: PositionLogprobs, prefix: [TokenID], chosen: TokenID) throws {
      let raw = try logits(model, prefix).map(Double.init)
      let total = log(raw.reduce(0) { $0 + exp($1) })
      func close(_ entry: TokenLogprob) -> Bool { abs(Double(entry.logprob!) - (raw[Int(entry.token)] - total)) < 1e-4 }
      #expect(values.chosen.token == chosen && close(values.chosen))
      #expect(values.requested.map(\.token) == [20, 0] && values.requested.allSatisfy(close))
      let ranked = raw.indices.sorted { raw[$0] > raw[$1] }
      #expect(values.top.map { Int($0.token) } == Array(ranked.prefix(4)) && values.top.allSatisfy(close))
    }
    let output = outputs[0]
    #expect(output.logprobs.count == 6)
    for (index, values) in output.logprobs.enumerated() {
      try check(values, prefix: prompt + output.tokens[..<index], chosen: output.tokens[index])
    }
    #expect(output.promptLogprobs.keys.sorted() == Array(1..<prompt.count))
    for (position, values) in output.promptLogprobs {
      try check(values, prefix: Array(prompt[..<position]), chosen: prompt[position])
    }
  }

  /// A weight that is not a number poisons only the requests that touch it.
  @Test func nonFiniteLogitsFailTheirRequestAlone() throws {
    struct Poisoned: WeightStore {
      let inner = DummyWeights(seed: 1, initializerRange: 0.2)
      let origin = "test"
      let byteCount = 0
      func contains(_ name: String) -> Bool { true }
      func dtype(of name: String) -> DType? { .float32 }
      func load(_ name: String, shape: [Int], role: WeightRole) throws(EngineError) -> WeightSource {
        let source = try inner.load(name, shape: shape, role: role)
        if name == "model.embed_tokens.weight" {
          // The embedding of token 50.
          let numbers = UnsafeMutableRawPointer(mutating: source.address).assumingMemoryBound(to: Float.self)
          for index in 0..<source.columns { numbers[50 * source.columns + index] = .nan }
        }
        return source
      }
    }
    for backend in testBackends {
      let healthy = try makeTinyModel(backend: backend)
      let poisoned = try makeTinyModel(backend: backend, store: Poisoned())
      for wantsLogprobs in [false, true] {
        var good = DriverRequest(prompt: prompt, newTokens: 8)
        // Its own continuation must not come to the poisoned token either.
        good.sampling.logitBias = [50: -100]
        var bad = DriverRequest(prompt: [1, 50, 2], newTokens: 2)
        if wantsLogprobs { bad.logprobs = LogprobOptions(topCount: 2) }
        let found = run(poisoned, [good, bad, good], seed: 4)
        let expected = run(healthy, [good])[0]
        #expect(found[0] == expected && found[2] == expected, "on \(backend.name)")
        #expect(found[1].failure?.contains("not finite") == true, "on \(backend.name)")
      }
    }
  }

  @Test func forbiddingEveryTokenFailsTheRequest() throws {
    let model = try makeTinyModel()
    var request = DriverRequest(prompt: prompt, newTokens: 1)
    request.stopTokenIDs = Array(0..<61)
    request.sampling.minNewTokens = 1
    let found = run(model, [request, DriverRequest(prompt: prompt, newTokens: 4)])
    #expect(found[0].failure?.contains("forbidden") == true)
    #expect(found[1].failure == nil && found[1].tokens.count == 4)
  }

  @Test func quantisedAndNarrowWeightsStayCloseToTheOriginal() throws {
    for backend in testBackends {
      let original = try logits(makeTinyModel(backend: backend), prompt)
      let largest = original.reduce(0) { max($0, abs($1)) }
      for (name, limit, configure) in [
        ("int8", Float(0.08), { @Sendable (options: inout ModelOptions) in options.quantization = .int8 }),
        ("bfloat16", 0.08, { @Sendable in $0.dtype = .bfloat16 }),
        ("float16", 0.02, { @Sendable in $0.dtype = .float16 }),
      ] {
        let found = try logits(makeTinyModel(backend: backend, configure), prompt)
        let difference = zip(found, original).reduce(0) { max($0, abs($1.0 - $1.1)) }
        #expect(difference > 0 && difference < limit * largest, "\(name) on \(backend.name): \(difference / largest)")
      }
    }
  }

  /// Launching ahead, waiting in order, results in the order launched.
  @Test func runnerKeepsOrder() throws {
    let model = try makeTinyModel()
    let runner = model.makeRunner()
    var result = StepResult()
    func batch(_ step: UInt64, start: Int32, token: TokenID, assign: Bool) -> ScheduleBatch {
      var batch = ScheduleBatch()
      batch.step = step
      if assign {
        batch.assigned = [
          SlotAssignment(
            slot: 0, sampling: .greedy, stopTokenIDs: [], logprobs: nil, tokens: [token], promptCount: 1)
        ]
      }
      batch.tokens = [token]
      batch.pages = [0, 1]
      batch.requests = [
        ScheduledRequest(
          slot: 0, start: start, count: 1, tokenOffset: 0, pageOffset: 0, pageCount: 2,
          lastTokenIsInFlight: token < 0, samples: true)
      ]
      return batch
    }
    var expected: [TokenID] = [7]
    for _ in 0..<20 { expected.append(best(try logits(model, expected))) }
    runner.launch(batch(1, start: 0, token: 7, assign: true))
    for index in 1..<20 {
      runner.launch(batch(UInt64(index + 1), start: Int32(index), token: -1, assign: false))
      result.removeAll()
      runner.wait(into: &result)
      #expect(result.tokens == [expected[index]] && result.tokenCounts == [1] && result.forwardSeconds > 0)
    }
    result.removeAll()
    runner.wait(into: &result)
    #expect(result.tokens == [expected[20]])
    // An empty batch is a step like any other.
    runner.launch(ScheduleBatch())
    result.removeAll()
    runner.wait(into: &result)
    #expect(result.tokens.isEmpty && result.tokenCounts.isEmpty)
  }
}
