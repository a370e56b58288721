import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import ApusTesting
import Testing

/// How far formats of weights move predictions where numbers stand out. What they do to a trained model is tested with the
/// engine's tests.
@Suite(.serialized) struct QualityTests {
  static func logits(_ loaded: LoadedModel, _ texts: [[TokenID]]) throws -> [[Float]] {
    try texts.flatMap { try loaded.steps.promptLogits($0, positions: Array($0.indices)) }
  }

  /// Random weights in which some numbers of each output stand out.
  private struct Outliers: WeightStore {
    let base: DummyWeights
    let factor: Float
    var origin: String { base.origin }
    var byteCount: Int { 0 }
    func contains(_ name: String) -> Bool { true }
    func dtype(of name: String) -> DType? { .float32 }
    func load(_ name: String, shape: [Int], role: WeightRole) throws(EngineError) -> WeightSource {
      let source = try base.load(name, shape: shape, role: role)
      guard role == .matrix, name.contains("layers") else { return source }
      let count = shape[0] * shape[1]
      let memory = try CPUBackend.hostMemory(byteCount: 4 * count)
      let numbers = memory.address.assumingMemoryBound(to: Float.self)
      for index in 0..<count {
        let number = source.address.load(fromByteOffset: 4 * index, as: Float.self)
        numbers[index] = index % 131 == 7 ? factor * number : number
      }
      return WeightSource(
        address: UnsafeRawPointer(numbers), dtype: .float32, rows: shape[0], columns: shape[1], owner: memory)
    }
  }

  /// Where outliers make int8 with a scale for each output too coarse, layers get scales for each group.
  @Test func outliersRegroupLayers() throws {
    var config = JSONObject([
      ("architectures", ["LlamaForCausalLM"]), ("hidden_size", 128), ("intermediate_size", 256),
      ("num_hidden_layers", 2), ("num_attention_heads", 4), ("num_key_value_heads", 2), ("vocab_size", 97),
      ("max_position_embeddings", 256), ("eos_token_id", 3),
    ])
    config["initializer_range"] = 0.1
    let configuration = try ModelConfiguration(json: .object(config))
    let text = (0..<120).map { TokenID($0 * 31 % 97) }
    for (factor, isRegrouped) in [(Float(1), false), (60, true)] {
      func load(_ quantization: WeightQuantization) throws -> LoadedModel {
        var options = ModelOptions(path: "")
        options.kvCacheBytes = 4 << 20
        options.quantization = quantization
        return try ModelLoader.load(
          configuration, store: Outliers(base: DummyWeights(seed: 4), factor: factor), options: options,
          backend: testBackends.last!)
      }
      let original = try Self.logits(load(.dense), [text])
      let loaded = try load(.int8)
      #expect((loaded.description.regroupedLayers > 0) == isRegrouped, "\(loaded.description.regroupedLayers)")
      for (name, model) in [("int8", loaded), ("int4", try load(.codes(.int4)))] {
        let found = Divergence(reference: original, other: try Self.logits(model, [text]))
        print(
          "quality: random, outliers of \(factor), \(name): KL \(Float(found.mean)) nats, agreement \(Float(found.agreement)), "
            + "\(model.description.regroupedLayers) layers regrouped")
        if name == "int8" { #expect(found.mean < 0.05 && found.agreement > 0.85) }
      }
    }
  }
}
