import ApusCore

extension ModelArchitecture {
  /// Mixtral: Mistral with experts in every layer and, unless the file says otherwise, no window.
  static let mixtral = ModelArchitecture(
    name: "MixtralForCausalLM", modelType: "mixtral", headDimension: nil, maxPositionEmbeddings: 131_072,
    qkvBias: { _ throws(EngineError) in false },
    attentionOutputBias: { _ throws(EngineError) in false },
    mlpBias: { _ throws(EngineError) in false },
    queryKeyNorm: { _ throws(EngineError) in false },
    slidingWindows: { fields, layerCount throws(EngineError) in
      Array(repeating: try fields.optionalSize("sliding_window", limit: 1 << 30) ?? 0, count: layerCount)
    },
    experts: { fields, layerCount throws(EngineError) in
      var experts = try ExpertConfiguration(
        softmax: fields, layerCount: layerCount, width: "intermediate_size", defaults: (8, 2), normalizes: true)
      experts?.names = .mixtral
      return experts
    })
}
