import ApusCore

extension ModelArchitecture {
  /// Qwen3: each head of q and k is normalised; heads of 128 where the file is silent.
  static let qwen3 = ModelArchitecture(
    name: "Qwen3ForCausalLM", modelType: "qwen3", headDimension: 128, maxPositionEmbeddings: 32_768,
    qkvBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
    attentionOutputBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
    mlpBias: { _ throws(EngineError) in false },
    queryKeyNorm: { _ throws(EngineError) in true }, slidingWindows: windowsOfUpperLayers)
}
