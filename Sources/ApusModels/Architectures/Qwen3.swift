import ApusCore

extension ModelArchitecture {
  /// Qwen3: each head of q and k is normalised; heads of 128 where the file is silent.
  static let qwen3 = ModelArchitecture(
    name: "Qwen3ForCausalLM", modelType: "qwen3", headDimension: 128, maxPositionEmbeddings: 32_768,
    qkvBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
    attentionOutputBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
    mlpBias: { _ throws(EngineError) in false },
    queryKeyNorm: { _ throws(EngineError) in true }, slidingWindows: windowsOfUpperLayers)

  /// Qwen3-MoE: Qwen3 with experts. A window, where there is one, is that of all layers.
  static let qwen3MoE = ModelArchitecture(
    name: "Qwen3MoeForCausalLM", modelType: "qwen3_moe", headDimension: nil, maxPositionEmbeddings: 32_768,
    qkvBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
    attentionOutputBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
    mlpBias: { _ throws(EngineError) in false },
    queryKeyNorm: { _ throws(EngineError) in true },
    slidingWindows: { fields, layerCount throws(EngineError) in
      let window =
        try fields.flag("use_sliding_window") ?? false
        ? try fields.optionalSize("sliding_window", limit: 1 << 30) ?? 4096 : 0
      return Array(repeating: window, count: layerCount)
    },
    experts: { fields, layerCount throws(EngineError) in
      try ExpertConfiguration(
        softmax: fields, layerCount: layerCount, width: "moe_intermediate_size", defaults: (128, 8),
        normalizes: false)
    })
}
