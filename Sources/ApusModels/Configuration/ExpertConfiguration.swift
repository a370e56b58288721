import ApusCore
public import ApusTensors

/// Feed-forward layers that are mixtures of experts, and how a token chooses among them.
///
/// The order of operations is that of DeepSeek-V2 and V3 (transformers' `modeling_deepseek_v2.py`, `modeling_deepseek_v3.py`;
/// DeepSeek-V3's `inference/model.py`): scores, correction, groups, experts, weights without the correction, sum to one,
/// scale.
///
/// Mixtral, Qwen and OLMoE have a subset of it: softmax over all experts, one group, no correction.
public struct ExpertConfiguration: Sendable, Equatable {
  /// How router logits become scores.
  public enum Score: Sendable {
    case softmax, sigmoid
    /// The logits choose, and the weights are the softmax of those that are chosen.
    case softmaxOfChosen
  }

  /// How experts' matrices are stored.
  public enum Storage: Sendable {
    /// As linear layers are, one by one or stacked.
    case outputsByInputs
    /// All of a layer's in two tensors, `input_linear` with gate above up and `output_linear`, and the shared experts' the
    /// same, in a module of the layer: Granite.
    case fused
    /// Stacked and turned, with gate and up in turns: gpt-oss.
    case inputsByOutputs
  }

  public var expertCount: Int
  /// Experts that a token is sent to.
  public var expertsPerToken: Int
  /// Width of one expert.
  public var intermediateSize: Int
  /// Width of the experts that every token passes through, side by side; 0 for none.
  public var sharedIntermediateSize: Int
  public var score: Score
  /// Neighbouring experts form groups; only experts of the `groupsPerToken` best groups are chosen.
  public var groupCount: Int
  public var groupsPerToken: Int
  /// A group counts as much as this many of its best experts together.
  public var expertsInGroupScore: Int
  /// Whether a stored bias is added to scores where experts are chosen, and only there.
  public var hasCorrection: Bool
  /// Whether the weights of a token's experts are divided by their sum.
  public var normalizes: Bool
  /// Multiplies the weights.
  public var scale: Float
  /// Layers from this one on have experts, where their number plus `layerShift` is a multiple of `layerFrequency`.
  public var firstLayer: Int
  public var layerFrequency: Int
  public var layerShift = 0
  /// Layers without experts all the same.
  public var denseLayers: [Int] = []
  /// Whether the shared experts' result is multiplied with the sigmoid of a logit that the token has for them.
  public var hasSharedGate = false
  /// What the weights are called.
  public var names = ExpertNames()

  /// Whether the router and the experts' matrices have biases.
  public var hasBiases = false
  /// How checkpoints store the experts' matrices.
  public var storage = Storage.outputsByInputs
  /// What joins the halves of an expert's first products.
  public var activation = GatedActivation.silu

  /// The choice of experts alone.
  public var routing: ExpertRouting {
    let kernelScore: ExpertRouting.Score =
      switch score {
      case .softmax: .softmax
      case .sigmoid: .sigmoid
      case .softmaxOfChosen: .softmaxOfChosen
      }
    return ExpertRouting(
      expertCount: expertCount, expertsPerToken: expertsPerToken, score: kernelScore, groupCount: groupCount,
      groupsPerToken: groupsPerToken, expertsInGroupScore: expertsInGroupScore, normalizes: normalizes, scale: scale)
  }

  /// Whether a layer has experts.
  public func covers(layer: Int) -> Bool {
    layer >= firstLayer && (layer + layerShift) % layerFrequency == 0 && !denseLayers.contains(layer)
  }
}

/// What a family's checkpoints call the weights of a layer with experts.
public struct ExpertNames: Sendable, Equatable {
  /// The module within the layer, ending in a dot.
  public var block = "mlp."
  /// Its router.
  public var router = "gate"
  /// The three matrices of each expert.
  public var gate = "gate_proj"
  public var up = "up_proj"
  public var down = "down_proj"
  /// The module of the shared experts, ending in a dot.
  public var shared = "shared_experts."

  /// The names of DeepSeek's families.
  public init() {}

  /// Those of Mixtral.
  static let mixtral = {
    var names = ExpertNames()
    names.block = "block_sparse_moe."
    (names.gate, names.up, names.down) = ("w1", "w3", "w2")
    return names
  }()
}

extension ExpertConfiguration {
  /// Reads the fields of the families whose router is a softmax over all experts: Mixtral, Qwen-MoE, OLMoE.
  ///
  /// - Parameters:
  ///   - width: the field that holds an expert's width.
  ///   - defaults: experts, and experts of a token, where the file is silent.
  ///   - normalizes: whether a token's weights are divided by their sum where the file is silent.
  /// - Returns: `nil` if no layer has experts.
  /// - Throws: `invalidCheckpoint`, with file and field.
  init?(
    softmax fields: ConfigurationFields, layerCount: Int, width: String, defaults: (experts: Int, perToken: Int),
    normalizes: Bool
  ) throws(EngineError) {
    // transformers 5 writes "num_local_experts" where older versions wrote "num_experts".
    let key = fields.value("num_experts") != nil ? "num_experts" : "num_local_experts"
    expertCount =
      try fields.value(key).map { value throws(EngineError) in try Self.count(value, key, fields) } ?? defaults.experts
    (firstLayer, layerShift) = (0, 1)
    layerFrequency = try fields.optionalSize("decoder_sparse_step", limit: 1 << 12) ?? 1
    for value in fields.value("mlp_only_layers")?.arrayValue ?? [] {
      guard let layer = value.intValue, layer >= 0 else {
        throw fields.invalid("mlp_only_layers must be an array of layer numbers")
      }
      denseLayers.append(layer)
    }
    expertsPerToken = try fields.optionalSize("num_experts_per_tok", limit: 1 << 10) ?? defaults.perToken
    intermediateSize = try fields.size(width, limit: 1 << 24)
    sharedIntermediateSize = 0
    score = .softmax
    (groupCount, groupsPerToken, expertsInGroupScore) = (1, 1, 1)
    hasCorrection = false
    self.normalizes = try fields.flag("norm_topk_prob") ?? normalizes
    scale = 1
    guard expertCount > 0, (0..<layerCount).contains(where: covers) else { return nil }
    guard expertsPerToken <= expertCount else {
      throw fields.invalid(
        "\(expertCount) experts (\(key)) cannot give a token \(expertsPerToken) experts (num_experts_per_tok)")
    }
  }
}

extension ExpertConfiguration {
  /// Reads the fields of DeepSeek's families and those that follow them.
  /// - Returns: `nil` if no layer has experts.
  /// - Throws: `invalidCheckpoint` or `unsupported`, with file and field.
  init?(deepSeek fields: ConfigurationFields, layerCount: Int, score: Score, firstLayer: Int) throws(EngineError) {
    self.firstLayer =
      if let value = fields.value("first_k_dense_replace") {
        try Self.count(value, "first_k_dense_replace", fields)
      } else { firstLayer }
    guard self.firstLayer < layerCount else { return nil }
    layerFrequency = try fields.optionalSize("moe_layer_freq", limit: 1 << 12) ?? 1
    expertCount = try fields.size("n_routed_experts", limit: 1 << 14)
    expertsPerToken = try fields.size("num_experts_per_tok", limit: 1 << 10)
    intermediateSize = try fields.size("moe_intermediate_size", limit: 1 << 24)
    let shared = try fields.value("n_shared_experts").map { value throws(EngineError) in
      try Self.count(value, "n_shared_experts", fields)
    }
    sharedIntermediateSize = (shared ?? 0) * intermediateSize
    self.score = score
    hasCorrection = score == .sigmoid
    normalizes = try fields.flag("norm_topk_prob") ?? (score == .sigmoid)
    scale = Float(try fields.number("routed_scaling_factor") ?? 1)
    expertsInGroupScore = score == .sigmoid ? 2 : 1
    let method = try fields.text("topk_method") ?? (score == .sigmoid ? "noaux_tc" : "greedy")
    switch (method, score) {
    case ("greedy", .softmax): (groupCount, groupsPerToken) = (1, 1)
    case ("group_limited_greedy", .softmax), ("noaux_tc", .sigmoid):
      groupCount = try fields.optionalSize("n_group", limit: 1 << 14) ?? 1
      groupsPerToken = try fields.optionalSize("topk_group", limit: 1 << 14) ?? groupCount
    default: throw fields.unsupported("topk_method \(method) is not implemented for this family")
    }
    if let function = try fields.text("scoring_func"), function != (score == .softmax ? "softmax" : "sigmoid") {
      throw fields.unsupported("scoring_func \(function) is not implemented for this family")
    }
    // The published code divides and does not scale, transformers scales and does not divide.
    guard !(score == .softmax && normalizes) else {
      throw fields.unsupported("norm_topk_prob is not implemented for this family")
    }
    guard expertCount % groupCount == 0, groupsPerToken <= groupCount,
      expertsPerToken <= expertCount / groupCount * groupsPerToken,
      groupCount == 1 || expertCount / groupCount >= expertsInGroupScore
    else {
      throw fields.invalid(
        "\(expertCount) experts (n_routed_experts) in \(groupCount) groups (n_group), \(groupsPerToken) of which a token "
          + "takes (topk_group), cannot give a token \(expertsPerToken) experts (num_experts_per_tok)")
    }
  }

  private static func count(
    _ value: JSONValue, _ key: String, _ fields: ConfigurationFields
  ) throws(EngineError) -> Int {
    guard let count = value.intValue, count >= 0, count <= 1 << 12 else {
      throw fields.invalid("\(key) must be an integer from 0 to 4096")
    }
    return count
  }
}
