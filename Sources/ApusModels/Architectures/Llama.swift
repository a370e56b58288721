import ApusCore

extension ModelArchitecture {
  /// Llama 1 to 3, and the many models in its format. `attention_bias` and `mlp_bias` give biases to all projections.
  static let llama = ModelArchitecture(
    name: "LlamaForCausalLM", modelType: "llama", headDimension: nil, maxPositionEmbeddings: 2048,
    qkvBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
    attentionOutputBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
    mlpBias: { fields throws(EngineError) in try fields.flag("mlp_bias") ?? false },
    queryKeyNorm: { _ throws(EngineError) in false },
    slidingWindows: { _, layerCount throws(EngineError) in Array(repeating: 0, count: layerCount) })
}
