import ApusCore

extension ModelArchitecture {
  /// Granite 3: Llama whose embeddings, scores, halves of layers and logits are multiplied with constants of the file.
  static let granite = ModelArchitecture.granite(name: "GraniteForCausalLM", modelType: "granite")

  /// Granite 3 with experts, as published: all of a layer's in two tensors.
  static let graniteMoE = ModelArchitecture.granite(
    name: "GraniteMoeForCausalLM", modelType: "granitemoe", experts: graniteExperts)

  /// The same beside an expert for all tokens.
  static let graniteMoEShared = ModelArchitecture.granite(
    name: "GraniteMoeSharedForCausalLM", modelType: "granitemoeshared",
    experts: { fields, layerCount throws(EngineError) in
      var experts = try graniteExperts(fields, layerCount)
      // 0 stands for none.
      if fields.value("shared_intermediate_size")?.intValue != 0 {
        experts?.sharedIntermediateSize = try fields.optionalSize("shared_intermediate_size", limit: 1 << 24) ?? 0
      }
      return experts
    })

  @Sendable private static func graniteExperts(
    _ fields: ConfigurationFields, _ layerCount: Int
  ) throws(EngineError) -> ExpertConfiguration? {
    var experts = try ExpertConfiguration(
      softmax: fields, layerCount: layerCount, width: "intermediate_size", defaults: (8, 2), normalizes: true)
    experts?.score = .softmaxOfChosen
    experts?.normalizes = true
    experts?.storage = .fused
    experts?.names.block = "block_sparse_moe."
    experts?.names.router = "router.layer"
    experts?.names.shared = "shared_mlp."
    return experts
  }

  private static func granite(
    name: String, modelType: String,
    experts: (@Sendable (ConfigurationFields, Int) throws(EngineError) -> ExpertConfiguration?)? = nil
  ) -> ModelArchitecture {
    ModelArchitecture(
      name: name, modelType: modelType, headDimension: nil, maxPositionEmbeddings: 2048,
      qkvBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
      attentionOutputBias: { fields throws(EngineError) in try fields.flag("attention_bias") ?? false },
      mlpBias: { fields throws(EngineError) in try fields.flag("mlp_bias") ?? false },
      queryKeyNorm: { _ throws(EngineError) in false },
      slidingWindows: { _, layerCount throws(EngineError) in Array(repeating: 0, count: layerCount) },
      experts: experts, hasMultipliers: true)
  }
}
