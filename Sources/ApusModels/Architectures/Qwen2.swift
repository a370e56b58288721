import ApusCore

extension ModelArchitecture {
  /// Qwen2 and Qwen2.5: biases on q, k and v.
  static let qwen2 = ModelArchitecture(
    name: "Qwen2ForCausalLM", modelType: "qwen2", headDimension: nil, maxPositionEmbeddings: 32_768,
    qkvBias: { _ throws(EngineError) in true },
    attentionOutputBias: { _ throws(EngineError) in false },
    mlpBias: { _ throws(EngineError) in false },
    queryKeyNorm: { _ throws(EngineError) in false }, slidingWindows: windowsOfUpperLayers)
}
