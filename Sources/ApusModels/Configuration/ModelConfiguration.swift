public import ApusCore
public import ApusTensors

/// What `config.json` says of a dense decoder: sizes, and which optional parts its layers have.
///
/// Families differ by these values alone; `Architectures/` has one small file per family that derives them.
public struct ModelConfiguration: Sendable, Equatable {
  /// The class in `architectures`, such as `LlamaForCausalLM`.
  public var architecture: String
  /// Rows of the embedding table and of the output.
  public var vocabularySize: Int
  /// Numbers that represent one token between layers.
  public var hiddenSize: Int
  /// Width of the feed-forward layers.
  public var intermediateSize: Int
  public var layerCount: Int
  public var queryHeads: Int
  /// Divides `queryHeads`.
  public var kvHeads: Int
  public var headDimension: Int
  public var normEpsilon: Float
  /// `max_position_embeddings`.
  public var maxPositionEmbeddings: Int
  /// Whether the output layer is the embedding table.
  public var tiedEmbeddings: Bool
  /// Whether the query, key and value projections have biases.
  public var qkvBias: Bool
  /// Whether the attention's output projection has a bias.
  public var attentionOutputBias: Bool
  /// Whether the three feed-forward projections have biases.
  public var mlpBias: Bool
  /// Whether each head of q and k is normalised before it is rotated.
  public var queryKeyNorm: Bool
  /// Whether those norms span all heads of q, and all of k, instead of one.
  public var queryKeyNormSpansHeads = false
  /// Whether each query head has an attention sink.
  public var hasSinks = false
  /// Multiplies embeddings.
  public var embeddingMultiplier: Float = 1
  /// Multiplies scores before the softmax; `nil` for 1 / sqrt(head dimension).
  public var attentionScale: Float?
  /// Multiplies what each half of a layer adds.
  public var residualMultiplier: Float = 1
  /// Divides logits.
  public var logitsScaling: Float = 1
  /// For each layer the number of positions a token attends to, itself among them; 0 for all.
  public var slidingWindows: [Int]
  /// The sizes of multi-head latent attention; `nil` where layers have K/V heads. `kvHeads` is `queryHeads` with it, and
  /// `headDimension` that of queries and expanded keys.
  public var latentAttention: LatentAttentionConfiguration?
  /// Which layers are mixtures of experts; `nil` for none.
  public var experts: ExpertConfiguration?
  /// How positions rotate q and k.
  public var rotary: RotaryConfiguration
  /// The number format the checkpoint says it has; `nil` if it is silent.
  public var dtype: DType?
  /// How linear layers are stored; `nil` where they are plain numbers.
  public var quantization: QuantizationConfiguration?
  /// End-of-sequence tokens in `config.json`; `generation_config.json` goes before them.
  public var eosTokenIDs: [TokenID]
  public var bosTokenID: TokenID?
  /// Standard deviation of random weights.
  public var initializerRange: Float

  /// The longest sequence served unless a caller asks for another length.
  public var defaultContextLength: Int { rotary.defaultContextLength(maxPositionEmbeddings) }

  /// The longest sequence for which the positions have a meaning.
  public var maximumContextLength: Int { rotary.maximumContextLength(maxPositionEmbeddings) }

  /// What a layer remembers of a token, with all heads.
  public var kvLayout: KVLayout {
    if let latentAttention {
      return .latent(
        keyDimension: latentAttention.cacheDimension, valueDimension: latentAttention.latentRank)
    }
    return .heads(kvHeads, dimension: headDimension)
  }

  /// Numbers of K and V that one token leaves in all layers together.
  public var kvNumbersPerToken: Int { layerCount * kvLayout.numbers }

  /// Weights of a layer's attention without biases and norms of heads.
  private var attentionParameters: Int {
    guard let latent = latentAttention else {
      return hiddenSize * headDimension * (2 * queryHeads + 2 * kvHeads)
    }
    let query = queryHeads * latent.headDimension
    return (latent.queryRank.map { $0 * (hiddenSize + 1 + query) } ?? hiddenSize * query)
      + hiddenSize * latent.cacheDimension + latent.latentRank
      + latent.latentRank * queryHeads * (latent.plainDimension + latent.valueDimension)
      + queryHeads * latent.valueDimension * hiddenSize
  }

  /// Number of parameters, tied embeddings counted once.
  public var parameterCount: Int {
    var layer = attentionParameters + 2 * hiddenSize
    if qkvBias {
      layer +=
        latentAttention.map { ($0.queryRank ?? 0) + $0.cacheDimension } ?? (queryHeads + 2 * kvHeads) * headDimension
    }
    if attentionOutputBias { layer += hiddenSize }
    if hasSinks { layer += queryHeads }
    if queryKeyNorm { layer += headDimension * (queryKeyNormSpansHeads ? queryHeads + kvHeads : 2) }
    var dense = 3 * hiddenSize * intermediateSize
    if mlpBias { dense += 2 * intermediateSize + hiddenSize }
    var feedForward = dense * layerCount
    if let experts {
      let sparse =
        experts.expertCount * (hiddenSize + (experts.hasCorrection ? 1 : 0) + 3 * hiddenSize * experts.intermediateSize)
        + 3 * hiddenSize * experts.sharedIntermediateSize + (experts.hasSharedGate ? hiddenSize : 0)
        + (experts.hasBiases ? experts.expertCount * (1 + 2 * experts.intermediateSize + hiddenSize) : 0)
      for index in 0..<layerCount where experts.covers(layer: index) { feedForward += sparse - dense }
    }
    return layer * layerCount + feedForward + hiddenSize + vocabularySize * hiddenSize * (tiedEmbeddings ? 1 : 2)
  }
}

extension ModelConfiguration {
  /// Reads `config.json` of a checkpoint directory.
  /// - Throws: `invalidCheckpoint` if the file is missing or broken, `unsupported` if the model needs something that is
  ///   not here.
  public init(directory: String) throws(EngineError) {
    let json = try Self.json(directory: directory)
    try self.init(
      json: QuantizationConfiguration.withSideFile(json, directory: directory), path: directory + "/config.json")
  }

  /// The content of a directory's `config.json`.
  /// - Throws: `invalidCheckpoint` if the file is missing or broken.
  package static func json(directory: String) throws(EngineError) -> JSONValue {
    let path = directory + "/config.json"
    guard let bytes = try readSmallFile(path) else {
      throw EngineError(
        .invalidCheckpoint, "\(path) does not exist; \(directory) is not a Hugging Face checkpoint directory.")
    }
    do { return try JSONValue.parse(bytes) } catch {
      throw EngineError(.invalidCheckpoint, "\(path): \(error).")
    }
  }

  /// How the linear layers of a directory are stored; `nil` where they are plain numbers. For checkpoints of any class.
  /// - Parameter json: the content of its `config.json`.
  /// - Throws: `unsupported` for a method or a variant that is not implemented, `invalidCheckpoint` for a broken entry.
  package static func quantization(
    directory: String, json: JSONValue
  ) throws(EngineError) -> QuantizationConfiguration? {
    let json = try QuantizationConfiguration.withSideFile(json, directory: directory)
    return try QuantizationConfiguration(ConfigurationFields(json, path: directory + "/config.json"))
  }

  /// Reads the content of a `config.json`.
  /// - Parameter path: names the file in messages.
  public init(json: JSONValue, path: String = "config.json") throws(EngineError) {
    let fields = try ConfigurationFields(json, path: path)
    let architecture = try ModelArchitecture.select(fields)
    let activation = try fields.text("hidden_act") ?? "silu"
    guard activation == "silu" || activation == "swish" else {
      throw fields.unsupported("the activation function \(activation) is not implemented; only silu is")
    }

    self.architecture = architecture.name
    vocabularySize = try fields.size("vocab_size", limit: 1 << 24)
    hiddenSize = try fields.size("hidden_size", limit: 1 << 20)
    intermediateSize = try fields.size("intermediate_size", limit: 1 << 24)
    layerCount = try fields.size("num_hidden_layers", limit: 1 << 12)
    queryHeads = try fields.size("num_attention_heads", limit: 1 << 14)
    kvHeads = try fields.optionalSize("num_key_value_heads", limit: 1 << 14) ?? queryHeads
    guard queryHeads % kvHeads == 0 else {
      throw fields.invalid(
        "num_attention_heads (\(queryHeads)) must be a multiple of num_key_value_heads (\(kvHeads))")
    }
    if let latent = architecture.latentAttention {
      let sizes = try latent(fields)
      latentAttention = sizes
      headDimension = sizes.headDimension
      kvHeads = queryHeads
    } else if let dimension = try fields.optionalSize("head_dim", limit: 1 << 14) ?? architecture.headDimension {
      headDimension = dimension
    } else {
      guard hiddenSize % queryHeads == 0 else {
        throw fields.invalid(
          "without head_dim, hidden_size (\(hiddenSize)) must be a multiple of num_attention_heads (\(queryHeads))")
      }
      headDimension = hiddenSize / queryHeads
    }
    normEpsilon = Float(try fields.number("rms_norm_eps") ?? 1e-6)
    maxPositionEmbeddings =
      try fields.optionalSize("max_position_embeddings", limit: 1 << 28) ?? architecture.maxPositionEmbeddings
    tiedEmbeddings = try fields.flag("tie_word_embeddings") ?? false
    qkvBias = try architecture.qkvBias(fields)
    attentionOutputBias = try architecture.attentionOutputBias(fields)
    mlpBias = try architecture.mlpBias(fields)
    queryKeyNorm = try architecture.queryKeyNorm(fields)
    queryKeyNormSpansHeads = architecture.queryKeyNormSpansHeads
    hasSinks = architecture.hasSinks
    if architecture.hasMultipliers {
      func multiplier(_ key: String) throws(EngineError) -> Float {
        let number = Float(try fields.number(key) ?? 1)
        guard number.isFinite, number > 0 else { throw fields.invalid("\(key) must be a positive number") }
        return number
      }
      embeddingMultiplier = try multiplier("embedding_multiplier")
      attentionScale = try multiplier("attention_multiplier")
      residualMultiplier = try multiplier("residual_multiplier")
      logitsScaling = try multiplier("logits_scaling")
    }
    slidingWindows = try architecture.slidingWindows(fields, layerCount)
    experts = try architecture.experts?(fields, layerCount) ?? nil
    rotary = try RotaryConfiguration(
      fields, headDimension: latentAttention?.rotaryDimension ?? headDimension,
      maxPositionEmbeddings: maxPositionEmbeddings, rotatedShare: architecture.rotatedShare)
    dtype = try Self.dtype(fields)
    // MXFP4 concerns the experts alone, whose tensors say how they are stored.
    let isMXFP4 =
      experts?.storage == .inputsByOutputs
      && fields.value("quantization_config")?["quant_method"]?.stringValue == "mxfp4"
    quantization = isMXFP4 ? nil : try QuantizationConfiguration(fields)
    eosTokenIDs = try fields.tokens("eos_token_id", vocabularySize: vocabularySize)
    bosTokenID = try fields.tokens("bos_token_id", vocabularySize: vocabularySize).first
    initializerRange = Float(try fields.number("initializer_range") ?? 0.02)
  }

  private static func dtype(_ fields: ConfigurationFields) throws(EngineError) -> DType? {
    // transformers 5 writes "dtype", older versions "torch_dtype".
    let older = try fields.text("torch_dtype")
    guard let name = try fields.text("dtype") ?? older else { return nil }
    return switch name {
    case "float32", "float": .float32
    case "float16", "half": .float16
    case "bfloat16": .bfloat16
    default: throw fields.unsupported("the number format \(name) is not one of float32, float16 and bfloat16")
    }
  }
}

/// The fields of a configuration file, with errors that name the file and the field.
struct ConfigurationFields {
  let json: JSONValue
  let path: String

  init(_ json: JSONValue, path: String) throws(EngineError) {
    guard json.objectValue != nil else {
      throw EngineError(.invalidCheckpoint, "\(path): expected an object, found \(json.kindName).")
    }
    self.json = json
    self.path = path
  }

  func invalid(_ sentence: String) -> EngineError { EngineError(.invalidCheckpoint, "\(path): \(sentence).") }
  func unsupported(_ sentence: String) -> EngineError { EngineError(.unsupported, "\(path): \(sentence).") }

  /// A field's value; `nil` if it is absent or null.
  func value(_ key: String) -> JSONValue? {
    guard let value = json[key], !value.isNull else { return nil }
    return value
  }

  func text(_ key: String) throws(EngineError) -> String? {
    guard let value = value(key) else { return nil }
    guard let text = value.stringValue else { throw invalid("\(key) must be a string, found \(value.kindName)") }
    return text
  }

  func flag(_ key: String) throws(EngineError) -> Bool? {
    guard let value = value(key) else { return nil }
    guard let flag = value.boolValue else { throw invalid("\(key) must be a boolean, found \(value.kindName)") }
    return flag
  }

  func number(_ key: String) throws(EngineError) -> Double? {
    guard let value = value(key) else { return nil }
    guard let number = value.doubleValue, number.isFinite else {
      throw invalid("\(key) must be a number, found \(value.kindName)")
    }
    return number
  }

  func numbers(_ key: String) throws(EngineError) -> [Double]? {
    guard let value = value(key) else { return nil }
    var numbers: [Double] = []
    for element in value.arrayValue ?? [.null] {
      guard let number = element.doubleValue else { throw invalid("\(key) must be an array of numbers") }
      numbers.append(number)
    }
    return numbers
  }

  func optionalSize(_ key: String, limit: Int) throws(EngineError) -> Int? {
    guard let value = value(key) else { return nil }
    guard let size = value.intValue, size >= 1, size <= limit else {
      throw invalid("\(key) must be an integer from 1 to \(limit), found \(describe(value))")
    }
    return size
  }

  func size(_ key: String, limit: Int) throws(EngineError) -> Int {
    guard let size = try optionalSize(key, limit: limit) else { throw invalid("\(key) is missing") }
    return size
  }

  /// A token id or an array of them. Negative ids stand for "none" in some files.
  func tokens(_ key: String, vocabularySize: Int) throws(EngineError) -> [TokenID] {
    guard let value = value(key) else { return [] }
    var tokens: [TokenID] = []
    for element in value.arrayValue ?? [value] {
      guard let id = element.intValue else {
        throw invalid("\(key) must be a token id or an array of them, found \(describe(element))")
      }
      if id >= 0 && id < vocabularySize { tokens.append(TokenID(id)) }
    }
    return tokens
  }

  private func describe(_ value: JSONValue) -> String {
    value.intValue.map(String.init) ?? value.doubleValue.map { "\($0)" } ?? value.kindName
  }
}
