import ApusCore

extension ModelArchitecture {
  /// OLMoE: experts in every layer; q and k are normalised over all their heads at once.
  static let olmoE = ModelArchitecture(
    name: "OlmoeForCausalLM", modelType: "olmoe", headDimension: nil, maxPositionEmbeddings: 4096,
    qkvBias: { fields throws(EngineError) in
      guard fields.value("clip_qkv") == nil else { throw fields.unsupported("clip_qkv is not implemented") }
      return try fields.flag("attention_bias") ?? false
    },
    attentionOutputBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
    mlpBias: { _ throws(EngineError) in false },
    queryKeyNorm: { _ throws(EngineError) in true },
    slidingWindows: { _, layerCount throws(EngineError) in Array(repeating: 0, count: layerCount) },
    experts: { fields, layerCount throws(EngineError) in
      try ExpertConfiguration(
        softmax: fields, layerCount: layerCount, width: "intermediate_size", defaults: (64, 8), normalizes: false)
    },
    queryKeyNormSpansHeads: true)
}
