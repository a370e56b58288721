import ApusCore
import ApusEngine
import Foundation
import Testing

private let decoderConfiguration = """
  {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
   "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "max_position_embeddings": 512,
   "torch_dtype": "float32", "initializer_range": 0.3}
  """

private func encoderConfiguration(_ architecture: String = "BertModel", labels: String = "") -> String {
  """
  {"architectures": ["\(architecture)"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
   "num_attention_heads": 4, "vocab_size": 300, "max_position_embeddings": 128, "type_vocab_size": 2,
   "initializer_range": 0.3\(labels)}
  """
}

/// An engine with random weights, made from a configuration alone.
private func withEmbeddingEngine<Value>(
  _ config: String, files: [String: String] = [:], _ change: (inout EngineConfiguration) -> Void = { _ in },
  _ body: (EmbeddingEngine) async throws -> Value
) async throws -> Value {
  let directory = FileManager.default.temporaryDirectory.appendingPathComponent("apus-\(UUID().uuidString)")
  try FileManager.default.createDirectory(
    at: directory.appendingPathComponent("1_Pooling"), withIntermediateDirectories: true)
  defer { try? FileManager.default.removeItem(at: directory) }
  for (name, text) in files.merging(["config.json": config], uniquingKeysWith: { $1 }) {
    try Data(text.utf8).write(to: directory.appendingPathComponent(name))
  }
  var configuration = EngineConfiguration(modelPath: directory.path)
  configuration.loadFormat = .dummy
  configuration.randomSeed = 3
  configuration.threads = 2
  configuration.servedModelName = "tiny"
  change(&configuration)
  let engine = try await EmbeddingEngine.start(configuration)
  let value = try await body(engine)
  await engine.shutdown()
  return value
}

private func sentence(_ seed: Int, _ count: Int) -> EmbeddingInput {
  EmbeddingInput(tokens: (0..<count).map { TokenID(($0 * 31 + seed * 17) % 300) })
}

private func failure(_ body: () async throws -> Void) async -> EngineError? {
  do {
    try await body()
    return nil
  } catch {
    return error as? EngineError
  }
}

struct EmbeddingEngineTests {
  @Test(arguments: [decoderConfiguration, encoderConfiguration()])
  func vectorsDoNotDependOnConcurrentRequests(config: String) async throws {
    // Passes are small, so that requests share them and take turns.
    try await withEmbeddingEngine(config) {
      $0.tokenBudget = 32
    } _: { engine in
      #expect(engine.information.dimensions == 32)
      #expect(engine.information.isNormalized)
      let inputs = (0..<24).map { sentence($0, 1 + $0 * 5 % 90) }
      var alone: [[Float]] = []
      for input in inputs { alone.append(try await engine.embed([input])[0]) }
      for vector in alone {
        #expect(abs(vector.reduce(0) { $0 + $1 * $1 } - 1) < 1e-5)
      }
      #expect(alone[1] != alone[2])
      let together = try await withThrowingTaskGroup(of: (Int, [[Float]]).self) { group in
        for start in 0..<8 {
          group.addTask { (start, try await engine.embed((0..<3).map { inputs[start * 3 + $0] })) }
        }
        var all = [[Float]](repeating: [], count: inputs.count)
        for try await (start, vectors) in group {
          for (offset, vector) in vectors.enumerated() { all[start * 3 + offset] = vector }
        }
        return all
      }
      #expect(together == alone)
      let statistics = engine.statistics()
      #expect(statistics.finishedRequests == 32)
      #expect(statistics.waitingRequests == 0 && statistics.runningRequests == 0)
      #expect(statistics.promptTokens == 2 * inputs.reduce(0) { $0 + $1.tokens.count })
    }
  }

  @Test func theCheckpointChoosesPoolingAndNormalisation() async throws {
    let pooling = #"{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}"#
    func files(_ mode: String) -> [String: String] {
      ["modules.json": "[\(pooling)]", "1_Pooling/config.json": #"{"pooling_mode_\#(mode)": true}"#]
    }
    for config in [decoderConfiguration, encoderConfiguration()] {
      var vectors: [[Float]] = []
      for mode in ["lasttoken", "mean_tokens", "cls_token"] {
        try await withEmbeddingEngine(config, files: files(mode)) { engine in
          #expect(!engine.information.isNormalized)
          vectors.append(try await engine.embed([sentence(1, 20)])[0])
          // One token is first, last and mean.
          vectors.append(try await engine.embed([sentence(1, 1)])[0])
        }
      }
      #expect(vectors[0] != vectors[2] && vectors[2] != vectors[4] && vectors[0] != vectors[4])
      #expect(vectors[1] == vectors[3] && vectors[3] == vectors[5])
    }
    // Without a word from the checkpoint: the last token of decoders, the mean of encoders.
    try await withEmbeddingEngine(decoderConfiguration) { #expect($0.information.pooling == .last) }
    try await withEmbeddingEngine(encoderConfiguration()) { #expect($0.information.pooling == .mean) }
  }

  @Test func classifiersGiveTheirOutputs() async throws {
    let config = encoderConfiguration("BertForSequenceClassification", labels: #", "id2label": {"0": "x"}"#)
    try await withEmbeddingEngine(config) { engine in
      #expect(engine.information.labelCount == 1)
      let pair = try engine.encodePair("ab", "cde")
      #expect(pair.firstSegmentCount == 2 && pair.tokens.count == 5)
      let scores = try await engine.embed([pair, EmbeddingInput(tokens: pair.tokens)])
      #expect(scores.map(\.count) == [1, 1])
      // Segments matter.
      #expect(scores[0] != scores[1])
    }
  }

  @Test func impossibleInputsAreRefused() async throws {
    try await withEmbeddingEngine(encoderConfiguration()) { engine in
      func check(_ input: EmbeddingInput, _ code: EngineError.Code) async {
        let error = await failure { _ = try await engine.embed([sentence(0, 3), input]) }
        #expect(error?.code == code && error?.parameter == "input", "\(error?.message ?? "accepted")")
      }
      await check(EmbeddingInput(tokens: []), .invalidRequest)
      await check(EmbeddingInput(tokens: [300]), .invalidRequest)
      await check(EmbeddingInput(tokens: [-1]), .invalidRequest)
      await check(sentence(0, 129), .promptTooLong)
      let longest = try await engine.embed([sentence(0, 128)])
      #expect(longest.count == 1)
      let none = try await engine.embed([])
      #expect(none.isEmpty)
      let refusal = await failure { _ = try engine.generate(Request(prompt: .tokens([1]))) }
      #expect(refusal?.code == .unsupported && refusal?.message.contains("/v1/embeddings") == true)
    }
  }

  @Test func theQueueIsBoundedAndDrains() async throws {
    try await withEmbeddingEngine(decoderConfiguration) {
      $0.maxQueuedRequests = 4
      $0.tokenBudget = 16
    } _: { engine in
      // However long it is, a request that meets an empty queue is taken; it takes seconds, and is cancelled below. On a
      // busy machine it may be done before the next one comes, so this is tried again.
      var refusal: EngineError?
      for _ in 0..<20 where refusal == nil {
        let finished = engine.statistics().finishedRequests
        let long = Task { try await engine.embed((0..<400).map { sentence($0, 500) }) }
        while engine.statistics().waitingRequests == 0 && engine.statistics().finishedRequests == finished {
          await Task.yield()
        }
        refusal = await failure { _ = try await engine.embed((0..<4).map { sentence($0, 5) }) }
        long.cancel()
        let end = await failure { _ = try await long.value }
        #expect(end == nil || end?.code == .aborted)
      }
      #expect(refusal?.code == .queueFull)
      let next = try await engine.embed([sentence(1, 5)])
      #expect(next.count == 1)
      await engine.drain()
      #expect(engine.statistics().waitingRequests == 0)
      let late = await failure { _ = try await engine.embed([sentence(0, 5)]) }
      #expect(late?.code == .shuttingDown)
    }
  }
}
