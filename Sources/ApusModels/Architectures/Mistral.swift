import ApusCore

extension ModelArchitecture {
  /// Mistral: Llama with a window over all layers, which is 4096 where the file is silent and none where it says null.
  static let mistral = ModelArchitecture(
    name: "MistralForCausalLM", modelType: "mistral", headDimension: nil, maxPositionEmbeddings: 131_072,
    qkvBias: { _ throws(EngineError) in false },
    attentionOutputBias: { _ throws(EngineError) in false },
    mlpBias: { _ throws(EngineError) in false },
    queryKeyNorm: { _ throws(EngineError) in false },
    slidingWindows: { fields, layerCount throws(EngineError) in
      let silent = fields.json["sliding_window"] == nil
      let window = silent ? 4096 : try fields.optionalSize("sliding_window", limit: 1 << 30) ?? 0
      return Array(repeating: window, count: layerCount)
    })
}
