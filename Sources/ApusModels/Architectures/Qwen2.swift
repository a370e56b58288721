import ApusCore

extension ModelArchitecture {
  /// Qwen2 and Qwen2.5: biases on q, k and v.
  static let qwen2 = ModelArchitecture(
    name: "Qwen2ForCausalLM", modelType: "qwen2", headDimension: nil, maxPositionEmbeddings: 32_768,
    qkvBias: { _ throws(EngineError) in true },
    attentionOutputBias: { _ throws(EngineError) in false },
    mlpBias: { _ throws(EngineError) in false },
    queryKeyNorm: { _ throws(EngineError) in false }, slidingWindows: windowsOfUpperLayers)

  /// Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, and one expert for all tokens whose result a sigmoid gates.
  static let qwen2MoE = ModelArchitecture(
    name: "Qwen2MoeForCausalLM", modelType: "qwen2_moe", headDimension: nil, maxPositionEmbeddings: 32_768,
    qkvBias: { fields throws(EngineError) in try fields.flag("qkv_bias") ?? true },
    attentionOutputBias: { _ throws(EngineError) in false },
    mlpBias: { _ throws(EngineError) in false },
    queryKeyNorm: { _ throws(EngineError) in false },
    slidingWindows: { fields, layerCount throws(EngineError) in
      if fields.value("layer_types") != nil { return try windowsOfUpperLayers(fields, layerCount) }
      // Every other one of the layers below `max_window_layers`, as transformers has it for this family.
      guard try fields.flag("use_sliding_window") ?? false else { return Array(repeating: 0, count: layerCount) }
      let window = try fields.optionalSize("sliding_window", limit: 1 << 30) ?? 4096
      let end = fields.value("max_window_layers")?.intValue ?? 28
      return (0..<layerCount).map { $0 % 2 == 0 && $0 < end ? window : 0 }
    },
    experts: { fields, layerCount throws(EngineError) in
      var experts = try ExpertConfiguration(
        softmax: fields, layerCount: layerCount, width: "moe_intermediate_size", defaults: (60, 4), normalizes: false)
      experts?.sharedIntermediateSize =
        try fields.optionalSize("shared_expert_intermediate_size", limit: 1 << 24) ?? 5632
      experts?.hasSharedGate = true
      experts?.names.shared = "shared_expert."
      return experts
    })
}
