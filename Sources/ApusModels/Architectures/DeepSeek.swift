import ApusCore

extension ModelArchitecture {
  /// DeepSeek-V2, V2-Lite and their chat and coder variants.
  static let deepSeekV2 = ModelArchitecture.deepSeek(
    name: "DeepseekV2ForCausalLM", modelType: "deepseek_v2", score: .softmax)

  /// DeepSeek-V3, R1, V3.1, and Kimi K2, which has the same layers and names its class alike.
  static let deepSeekV3 = ModelArchitecture.deepSeek(
    name: "DeepseekV3ForCausalLM", modelType: "deepseek_v3", score: .sigmoid)

  /// Kimi K2 where only the model type is given.
  static let kimiK2 = ModelArchitecture.deepSeek(name: "KimiK2ForCausalLM", modelType: "kimi_k2", score: .sigmoid)

  private static func deepSeek(
    name: String, modelType: String, score: ExpertConfiguration.Score
  ) -> ModelArchitecture {
    ModelArchitecture(
      name: name, modelType: modelType, headDimension: nil, maxPositionEmbeddings: 4096,
      qkvBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
      attentionOutputBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
      mlpBias: { fields throws(EngineError) in try fields.flag("mlp_bias") ?? false },
      queryKeyNorm: { _ throws(EngineError) in false },
      slidingWindows: { _, layerCount throws(EngineError) in Array(repeating: 0, count: layerCount) },
      latentAttention: { fields throws(EngineError) in try LatentAttentionConfiguration(fields) },
      experts: { fields, layerCount throws(EngineError) in
        try ExpertConfiguration(
          deepSeek: fields, layerCount: layerCount, score: score, firstLayer: score == .softmax ? 0 : 3)
      })
  }
}
