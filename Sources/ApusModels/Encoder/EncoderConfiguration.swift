public import ApusCore
public import ApusTensors

/// What `config.json` says of a bidirectional encoder: BERT, RoBERTa and XLM-RoBERTa, bare or with a head that classifies
/// sequences.
public struct EncoderConfiguration: Sendable, Equatable {
  /// The two ways in which a checkpoint names its parts and counts its positions.
  public enum Family: Sendable, Equatable {
    /// Positions from 0, a pooler before the classifier.
    case bert
    /// Positions from `pad_token_id` + 1, a dense layer within the classifier.
    case roberta
  }

  /// The class in `architectures`, such as `BertModel`.
  public var architecture: String
  public var family: Family
  public var vocabularySize: Int
  public var hiddenSize: Int
  public var intermediateSize: Int
  public var layerCount: Int
  public var headCount: Int
  public var normEpsilon: Float
  /// Rows of the table of positions.
  public var maxPositionEmbeddings: Int
  /// Rows of the table of segments.
  public var tokenTypeCount: Int
  public var activation: ActivationFunction
  /// Row of the position table for a sequence's first token.
  public var firstPosition: Int
  /// Outputs of the classifier; `nil` for a model without one.
  public var labelCount: Int?
  public var initializerRange: Float

  /// The longest sequence for which there are positions.
  public var maximumContextLength: Int { maxPositionEmbeddings - firstPosition }

  /// Numbers of a head.
  public var headDimension: Int { hiddenSize / headCount }

  /// Number of parameters, head included.
  public var parameterCount: Int {
    let (h, f) = (hiddenSize, intermediateSize)
    var count = (vocabularySize + maxPositionEmbeddings + tokenTypeCount + 2) * h
    count += layerCount * (4 * (h * h + h) + 2 * h * f + f + h + 4 * h)
    if let labelCount { count += h * h + h + labelCount * (h + 1) }
    return count
  }

  private static let families: [(name: String, modelType: String, family: Family)] = [
    ("Bert", "bert", .bert), ("Roberta", "roberta", .roberta), ("XLMRoberta", "xlm-roberta", .roberta),
  ]

  /// What may follow a family's name in a class. The head that predicts masked words is not read.
  private static let heads = ["Model", "ForMaskedLM", "ForSequenceClassification"]

  /// The architectures that are implemented.
  public static var architectures: [String] {
    families.flatMap { family in heads.map { family.name + $0 } }
  }

  /// Whether a checkpoint directory holds an encoder of these families. A directory whose configuration cannot be read
  /// does not; whoever loads it says why.
  public static func isEncoder(directory: String) -> Bool {
    guard let bytes = try? readSmallFile(directory + "/config.json"), let json = try? JSONValue.parse(bytes),
      let names = json["architectures"]?.arrayValue?.compactMap(\.stringValue)
    else { return false }
    return names.contains { name in families.contains { name.hasPrefix($0.name) } }
  }

  /// Reads `config.json` of a checkpoint directory.
  /// - Throws: `invalidCheckpoint` if the file is missing or broken, `unsupported` if the model needs something that is
  ///   not here.
  public init(directory: String) throws(EngineError) {
    let path = directory + "/config.json"
    guard let bytes = try readSmallFile(path) else {
      throw EngineError(
        .invalidCheckpoint, "\(path) does not exist; \(directory) is not a Hugging Face checkpoint directory.")
    }
    let json: JSONValue
    do { json = try JSONValue.parse(bytes) } catch {
      throw EngineError(.invalidCheckpoint, "\(path): \(error).")
    }
    try self.init(json: json, path: path)
  }

  /// Reads the content of a `config.json`.
  /// - Parameter path: names the file in messages.
  public init(json: JSONValue, path: String = "config.json") throws(EngineError) {
    let fields = try ConfigurationFields(json, path: path)
    let known = Self.architectures
    let names = fields.value("architectures")?.arrayValue?.compactMap(\.stringValue) ?? []
    guard let name = names.first(where: known.contains) else {
      throw fields.unsupported(
        "the architecture \(names.isEmpty ? "is not given" : names.joined(separator: ", ") + " is not implemented");"
          + " encoders that are: \(known.joined(separator: ", "))")
    }
    let classifies = name.hasSuffix("ForSequenceClassification")
    architecture = name
    family = Self.families.first { name.hasPrefix($0.name) }!.family
    vocabularySize = try fields.size("vocab_size", limit: 1 << 24)
    hiddenSize = try fields.size("hidden_size", limit: 1 << 16)
    intermediateSize = try fields.size("intermediate_size", limit: 1 << 20)
    layerCount = try fields.size("num_hidden_layers", limit: 1 << 12)
    headCount = try fields.size("num_attention_heads", limit: 1 << 10)
    guard hiddenSize % headCount == 0 else {
      throw fields.invalid(
        "hidden_size (\(hiddenSize)) must be a multiple of num_attention_heads (\(headCount))")
    }
    normEpsilon = Float(try fields.number("layer_norm_eps") ?? 1e-12)
    maxPositionEmbeddings = try fields.size("max_position_embeddings", limit: 1 << 20)
    tokenTypeCount = try fields.optionalSize("type_vocab_size", limit: 1 << 10) ?? 2
    let function = try fields.text("hidden_act") ?? "gelu"
    switch function {
    case "gelu": activation = .gelu
    case "gelu_new", "gelu_fast", "gelu_pytorch_tanh": activation = .geluTanh
    case "relu": activation = .relu
    case "silu", "swish": activation = .silu
    default: throw fields.unsupported("the activation function \(function) is not implemented")
    }
    let positions = try fields.text("position_embedding_type") ?? "absolute"
    guard positions == "absolute" else {
      throw fields.unsupported("position embeddings of the type \(positions) are not implemented; only absolute are")
    }
    if try fields.flag("is_decoder") ?? false {
      throw fields.unsupported("\"is_decoder\" asks for causal attention; only bidirectional encoders are implemented")
    }
    if fields.value("quantization_config") != nil {
      throw fields.unsupported("\"quantization_config\" is given; encoders are read from plain numbers only")
    }
    let padding = fields.value("pad_token_id")?.intValue
    firstPosition = family == .roberta ? (padding ?? 1) + 1 : 0
    guard firstPosition >= 0, firstPosition < maxPositionEmbeddings else {
      throw fields.invalid("pad_token_id (\(firstPosition - 1)) leaves no positions of \(maxPositionEmbeddings)")
    }
    if classifies {
      // transformers writes the labels' names, and their number only where there are no names.
      let labels = fields.value("id2label")?.objectValue?.count
      let given = try fields.optionalSize("num_labels", limit: 1 << 16)
      let count = labels ?? given ?? 2
      guard count >= 1, count <= intermediateSize else {
        throw fields.unsupported("a classifier of \(count) labels on an encoder of width \(intermediateSize)")
      }
      labelCount = count
    } else {
      labelCount = nil
    }
    initializerRange = Float(try fields.number("initializer_range") ?? 0.02)
  }
}
