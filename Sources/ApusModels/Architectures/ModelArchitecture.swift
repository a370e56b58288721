import ApusCore

/// What sets one family of decoders apart from the others: rules that derive a `ModelConfiguration`.
struct ModelArchitecture: Sendable {
  typealias Flag = @Sendable (ConfigurationFields) throws(EngineError) -> Bool

  /// The class name in `architectures`.
  var name: String
  /// The value of `model_type`, used where `architectures` is absent.
  var modelType: String
  /// Head size where `head_dim` is absent; `nil` for hidden size / heads.
  var headDimension: Int?
  /// Where `max_position_embeddings` is absent.
  var maxPositionEmbeddings: Int
  var qkvBias: Flag
  var attentionOutputBias: Flag
  var mlpBias: Flag
  var queryKeyNorm: Flag
  /// A window for each layer; 0 for none.
  var slidingWindows: @Sendable (ConfigurationFields, _ layerCount: Int) throws(EngineError) -> [Int]
  /// The sizes of multi-head latent attention; `nil` for families with K/V heads.
  var latentAttention: (@Sendable (ConfigurationFields) throws(EngineError) -> LatentAttentionConfiguration)?
  /// Which layers are mixtures of experts; `nil` for families without any.
  var experts: (@Sendable (ConfigurationFields, _ layerCount: Int) throws(EngineError) -> ExpertConfiguration?)?
  /// The share of each head that is rotated where `partial_rotary_factor` is absent.
  var rotatedShare = 1.0
  /// Whether norms of q and k span all heads instead of one.
  var queryKeyNormSpansHeads = false
  /// Whether each query head has a logit of its own, `self_attn.sinks`, that competes with the positions.
  var hasSinks = false
  /// Whether the file has constants that embeddings, scores, halves of layers and logits are multiplied with.
  var hasMultipliers = false

  /// All families.
  static let all = [
    llama, mistral, mixtral, qwen2, qwen2MoE, qwen3, qwen3MoE, olmoE, deepSeekV2, deepSeekV3, kimiK2, glm4MoE,
    gptOSS, granite, graniteMoE, graniteMoEShared,
  ]

  /// The family that a configuration names.
  static func select(_ fields: ConfigurationFields) throws(EngineError) -> ModelArchitecture {
    let known = all.map(\.name).joined(separator: ", ")
    let names = fields.value("architectures")?.arrayValue?.compactMap(\.stringValue) ?? []
    if let match = names.lazy.compactMap({ name in all.first { $0.name == name } }).first { return match }
    if !names.isEmpty {
      throw fields.unsupported(
        "the architecture \(names.joined(separator: ", ")) is not implemented; these are: \(known)")
    }
    guard let modelType = try fields.text("model_type") else {
      throw fields.unsupported(
        "neither \"architectures\" nor \"model_type\" says what model this is; implemented are: \(known)")
    }
    guard let match = all.first(where: { $0.modelType == modelType }) else {
      throw fields.unsupported("the model type \(modelType) is not implemented; these architectures are: \(known)")
    }
    return match
  }

  /// The rule of Qwen2 and Qwen3: `layer_types` where it is given, else the layers from `max_window_layers` on, and
  /// only if `use_sliding_window` is set.
  static func windowsOfUpperLayers(_ fields: ConfigurationFields, _ layerCount: Int) throws(EngineError) -> [Int] {
    let window =
      try fields.flag("use_sliding_window") ?? false
      ? try fields.optionalSize("sliding_window", limit: 1 << 30) ?? 4096 : 0
    guard fields.value("layer_types")?.arrayValue != nil else {
      let firstWindowed = fields.value("max_window_layers")?.intValue ?? 28
      return (0..<layerCount).map { $0 >= firstWindowed ? window : 0 }
    }
    return try windows(ofTypes: fields, layerCount, window: window)
  }

  /// The windows that `layer_types` says.
  static func windows(
    ofTypes fields: ConfigurationFields, _ layerCount: Int, window: Int
  ) throws(EngineError) -> [Int] {
    guard let types = fields.value("layer_types")?.arrayValue else {
      throw fields.invalid("layer_types must be an array of names")
    }
    guard types.count == layerCount else {
      throw fields.invalid("layer_types names \(types.count) layers, but num_hidden_layers is \(layerCount)")
    }
    var windows: [Int] = []
    for type in types {
      switch type.stringValue {
      case "full_attention": windows.append(0)
      case "sliding_attention": windows.append(window)
      default:
        throw fields.unsupported(
          "layer_types holds \(type.stringValue ?? type.kindName); only full_attention and sliding_attention are "
            + "implemented")
      }
    }
    return windows
  }
}
