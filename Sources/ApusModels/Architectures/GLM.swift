import ApusCore

extension ModelArchitecture {
  /// GLM-4.5 and 4.6: ordinary attention, half of each head rotated unless the file says otherwise, each head of q and k
  /// normalised where `use_qk_norm` is set, and DeepSeek-V3's experts.
  static let glm4MoE = ModelArchitecture(
    name: "Glm4MoeForCausalLM", modelType: "glm4_moe", headDimension: nil, maxPositionEmbeddings: 131_072,
    qkvBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
    attentionOutputBias: { _ throws(EngineError) in false },
    mlpBias: { _ throws(EngineError) in false },
    queryKeyNorm: { fields throws(EngineError) in try fields.flag("use_qk_norm") ?? false },
    slidingWindows: { _, layerCount throws(EngineError) in Array(repeating: 0, count: layerCount) },
    experts: { fields, layerCount throws(EngineError) in
      try ExpertConfiguration(deepSeek: fields, layerCount: layerCount, score: .sigmoid, firstLayer: 1)
    },
    rotatedShare: 0.5)
}
