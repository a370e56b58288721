import ApusCore

extension ModelArchitecture {
  /// DeepSeek-V2, V2-Lite and their chat and coder variants.
  static let deepSeekV2 = ModelArchitecture.deepSeek(name: "DeepseekV2ForCausalLM", modelType: "deepseek_v2")

  /// DeepSeek-V3, R1, V3.1, and Kimi K2, which has the same layers and names its class alike.
  static let deepSeekV3 = ModelArchitecture.deepSeek(name: "DeepseekV3ForCausalLM", modelType: "deepseek_v3")

  /// Kimi K2 where only the model type is given.
  static let kimiK2 = ModelArchitecture.deepSeek(name: "KimiK2ForCausalLM", modelType: "kimi_k2")

  private static func deepSeek(name: String, modelType: String) -> ModelArchitecture {
    ModelArchitecture(
      name: name, modelType: modelType, headDimension: nil, maxPositionEmbeddings: 4096,
      qkvBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
      attentionOutputBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
      mlpBias: { fields throws(EngineError) in try fields.flag("mlp_bias") ?? false },
      queryKeyNorm: false,
      slidingWindows: { fields, layerCount throws(EngineError) in
        let dense = fields.value("first_k_dense_replace")?.intValue ?? (modelType == "deepseek_v2" ? 0 : 3)
        guard dense >= layerCount else {
          throw fields.unsupported(
            "layers with experts (first_k_dense_replace \(dense) of \(layerCount) layers) are not implemented")
        }
        return Array(repeating: 0, count: layerCount)
      },
      latentAttention: { fields throws(EngineError) in try LatentAttentionConfiguration(fields) })
  }
}
