import Apus
import ApusCore
import ApusEngine
import Foundation
import Testing

/// A tiny model with random weights, made from a configuration alone: these tests run everywhere.
private func withTinyEngine<Result>(
  _ change: (inout EngineConfiguration) -> Void = { _ in }, _ body: (Engine) async throws -> Result
) async throws -> Result {
  let directory = FileManager.default.temporaryDirectory.appendingPathComponent("apus-\(UUID().uuidString)")
  try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
  defer { try? FileManager.default.removeItem(at: directory) }
  let config = """
    {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
     "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
     "tie_word_embeddings": false, "torch_dtype": "float32", "initializer_range": 0.3, "eos_token_id": 299}
    """
  try Data(config.utf8).write(to: directory.appendingPathComponent("config.json"))
  var configuration = EngineConfiguration(modelPath: directory.path)
  configuration.loadFormat = .dummy
  configuration.randomSeed = 7
  configuration.servedModelName = "tiny"
  configuration.contextLength = 256
  change(&configuration)
  return try await withEngine(configuration, body)
}

/// The code of the error that `body` throws.
private func code(_ body: () async throws -> Void) async -> EngineError.Code? {
  do {
    try await body()
    return nil
  } catch {
    return (error as? EngineError)?.code
  }
}

@Suite struct EngineTests {
  private func sampling(_ count: Int, seed: UInt64? = nil) -> SamplingParameters {
    var sampling = seed == nil ? SamplingParameters.greedy : SamplingParameters()
    sampling.maxNewTokens = count
    sampling.seed = seed
    sampling.ignoreEOS = true
    return sampling
  }

  @Test func chunksAddUpToTheResult() async throws {
    try await withTinyEngine { engine in
      #expect(engine.model.name == "tiny")
      #expect(engine.model.contextLength == 256)
      let request = Request(prompt: .text("Hello"), sampling: sampling(40))
      let whole = try await engine.generate(request).result()
      var streamed = GenerationResult()
      for try await chunk in try engine.generate(Request(prompt: .text("Hello"), sampling: sampling(40))) {
        streamed.append(chunk)
      }
      #expect(streamed.tokens == whole.tokens)
      #expect(streamed.text == whole.text)
      #expect(whole.tokens.count == 40)
      #expect(whole.finishReason == .length)
      #expect(whole.usage.promptTokens == 5)
      #expect(whole.text == (try engine.decode(whole.tokens, skipSpecialTokens: true)))
    }
  }

  @Test func aSeedRepeatsItselfAndAnotherDoesNot() async throws {
    try await withTinyEngine { engine in
      func draw(_ seed: UInt64) async throws -> [TokenID] {
        try await engine.generate(Request(prompt: .tokens([1, 2, 3]), sampling: sampling(30, seed: seed))).result()
          .tokens
      }
      let first = try await draw(5)
      #expect(try await draw(5) == first)
      #expect(try await draw(6) != first)
    }
  }

  /// So long that no request of the next tests ends by itself before it is aborted.
  private func long(_ configuration: inout EngineConfiguration) { configuration.contextLength = 65_536 }

  @Test func aDroppedIteratorAbortsItsRequest() async throws {
    try await withTinyEngine(long) { engine in
      do {
        var iterator = try engine.generate(Request(prompt: .tokens([1]), sampling: sampling(60_000)))
          .makeAsyncIterator()
        _ = try await iterator.next()
      }
      // The flush waits until the request is gone.
      #expect(await engine.flushCache(timeout: 30))
      #expect(engine.statistics().abortedRequests == 1)
    }
  }

  /// A flush that is given up at once never waits for a request, however often it is asked for and by how many.
  @Test func aFlushWithoutTimeDoesNotWait() async throws {
    try await withTinyEngine(long) { engine in
      var iterator = try engine.generate(Request(prompt: .tokens([1]), sampling: sampling(60_000))).makeAsyncIterator()
      _ = try await iterator.next()
      for _ in 0..<20 {
        let flushed = await withTaskGroup(of: Bool.self) { group in
          for task in 0..<16 { group.addTask { await engine.flushCache(timeout: task % 2 == 0 ? 0 : 0.0001) } }
          return await group.contains(true)
        }
        #expect(!flushed)
      }
      #expect(engine.statistics().runningRequests == 1)
      _ = try await iterator.next()
    }
  }

  @Test func aCancelledTaskAbortsItsRequest() async throws {
    try await withTinyEngine(long) { engine in
      let task = Task {
        var count = 0
        for try await _ in try engine.generate(Request(prompt: .tokens([1]), sampling: sampling(60_000))) {
          count += 1
          if count == 1 { withUnsafeCurrentTask { $0?.cancel() } }
        }
      }
      #expect(await code { try await task.value } == .aborted)
      #expect(await engine.flushCache(timeout: 30))
      #expect(engine.statistics().finishedRequests == 0)
    }
  }

  @Test func abortByNameEndsTheStreamWithAReason() async throws {
    try await withTinyEngine(long) { engine in
      let stream = try engine.generate(Request(id: "mine", prompt: .tokens([1]), sampling: sampling(60_000)))
      #expect(engine.abort("mine"))
      #expect(!engine.abort("nobody"))
      let result = try await stream.result()
      guard case .abort = result.finishReason else {
        Issue.record("ended with \(result.finishReason)")
        return
      }
    }
  }

  @Test func refusalsNameWhatIsWrong() async throws {
    try await withTinyEngine { engine in
      func refuse(_ prompt: Request.Prompt, _ change: (inout SamplingParameters) -> Void = { _ in }) async
        -> EngineError.Code?
      {
        var parameters = sampling(4)
        change(&parameters)
        let request = Request(prompt: prompt, sampling: parameters)
        return await code { _ = try await engine.generate(request).result() }
      }
      #expect(await refuse(.tokens([])) == .invalidRequest)
      #expect(await refuse(.tokens([300])) == .invalidRequest)
      #expect(await refuse(.tokens([-1])) == .invalidRequest)
      #expect(await refuse(.tokens(Array(repeating: 1, count: 256))) == .promptTooLong)
      #expect(await refuse(.tokens(Array(repeating: 1, count: 253))) == .promptTooLong)
      #expect(await refuse(.tokens(Array(repeating: 1, count: 252))) == nil)
      #expect(await refuse(.tokens([1])) { $0.temperature = -1 } == .invalidRequest)
      #expect(await refuse(.tokens([1])) { $0.stopRegex = ["("] } == .invalidRequest)
      #expect(await refuse(.tokens([1])) { $0.stopRegex = ["(a*)*b"] } == nil)
      #expect(engine.statistics().rejectedRequests == 7)
      #expect(await code { _ = try engine.renderChat(ChatPrompt(messages: [])) } == .unsupported)
    }
  }

  @Test func aFullQueueIsRefusedAtOnce() async throws {
    try await withTinyEngine({
      $0.maxRunningRequests = 1
      $0.maxQueuedRequests = 2
    }) { engine in
      let streams = try (0..<3).map { _ in
        try engine.generate(Request(prompt: .tokens([1]), sampling: sampling(200)))
      }
      #expect(
        await code { _ = try engine.generate(Request(prompt: .tokens([1]), sampling: sampling(1))) } == .queueFull)
      for stream in streams { #expect(try await stream.result().tokens.count == 200) }
      #expect(
        try await engine.generate(Request(prompt: .tokens([1]), sampling: sampling(1))).result().tokens.count == 1)
    }
  }

  @Test func namesInFlightAreUnique() async throws {
    try await withTinyEngine { engine in
      let stream = try engine.generate(Request(id: "twin", prompt: .tokens([1]), sampling: sampling(200)))
      #expect(
        await code { _ = try engine.generate(Request(id: "twin", prompt: .tokens([1]), sampling: sampling(1))) }
          == .invalidRequest)
      _ = try await stream.result()
      _ = try await engine.generate(Request(id: "twin", prompt: .tokens([1]), sampling: sampling(1))).result()
    }
  }

  @Test func aDrainFinishesWhatRunsAndRefusesTheRest() async throws {
    try await withTinyEngine { engine in
      let stream = try engine.generate(Request(prompt: .tokens([1]), sampling: sampling(200)))
      async let drained: Void = engine.drain()
      #expect(try await stream.result().tokens.count == 200)
      await drained
      #expect(
        await code { _ = try engine.generate(Request(prompt: .tokens([1]), sampling: sampling(1))) } == .shuttingDown)
    }
  }

  @Test func shutdownEndsEveryStream() async throws {
    try await withTinyEngine { engine in
      let streams = try (0..<20).map { _ in
        try engine.generate(Request(prompt: .tokens([1]), sampling: sampling(250)))
      }
      await engine.shutdown()
      for stream in streams {
        // Each ends one way or another: none waits for ever.
        _ = try? await stream.result()
      }
      await engine.shutdown()
    }
  }

  @Test func stopStringsEndTheGenerationAndItsRequest() async throws {
    try await withTinyEngine { engine in
      let whole = try await engine.generate(Request(prompt: .tokens([5]), sampling: sampling(60))).result()
      let words = whole.text.split(separator: " ")
      let stop = " " + words[words.count / 2]
      var parameters = sampling(60)
      parameters.stop = [stop]
      let stopped = try await engine.generate(Request(prompt: .tokens([5]), sampling: parameters)).result()
      #expect(stopped.finishReason == .stop(.text(stop)))
      #expect(stopped.text == String(whole.text[..<whole.text.range(of: stop)!.lowerBound]))
      #expect(stopped.tokens == Array(whole.tokens.prefix(stopped.tokens.count)))
      #expect(stopped.usage.completionTokens == stopped.tokens.count)
      parameters.noStopTrim = true
      let kept = try await engine.generate(Request(prompt: .tokens([5]), sampling: parameters)).result()
      #expect(kept.text == stopped.text + stop)
      #expect(await engine.flushCache(timeout: 30))
    }
  }

  @Test func logprobsBelongToTheirTokens() async throws {
    try await withTinyEngine { engine in
      let options = LogprobOptions(topCount: 3, promptStart: 0, tokenIDs: [7])
      let prompt: [TokenID] = Array(1...40)
      let request = Request(prompt: .tokens(prompt), sampling: sampling(10), logprobs: options)
      let result = try await engine.generate(request).result()
      #expect(result.logprobs.map(\.chosen.token) == result.tokens)
      for position in result.logprobs {
        // Greedy: the chosen token is the most likely one.
        #expect(position.top.count == 3)
        #expect(position.top[0] == position.chosen)
        #expect(position.requested.map(\.token) == [7])
      }
      let promptLogprobs = try #require(result.promptLogprobs)
      #expect(promptLogprobs.map(\.chosen.token) == prompt)
      #expect(promptLogprobs[0].chosen.logprob == nil)
      // What the prompt says of its last token is what generating that token said.
      let shorter = Request(
        prompt: .tokens(Array(prompt.dropLast())), sampling: sampling(1),
        logprobs: LogprobOptions(tokenIDs: [prompt.last!]))
      let generated = try await engine.generate(shorter).result()
      #expect(generated.logprobs[0].requested[0].logprob == promptLogprobs.last?.chosen.logprob)
    }
  }

  @Test func impossibleSettingsAndMissingModelsAreRefused() async {
    func start(_ change: (inout EngineConfiguration) -> Void) async -> EngineError.Code? {
      var configuration = EngineConfiguration(modelPath: "/nowhere")
      change(&configuration)
      return await code { _ = try await Engine.start(configuration) }
    }
    #expect(await start { _ in } == .invalidCheckpoint)
    #expect(await start { $0.tokenBudget = 0 } == .invalidRequest)
    #expect(await start { $0.memoryFraction = 2 } == .invalidRequest)
    #expect(await start { $0.threads = 0 } == .invalidRequest)
  }
}
