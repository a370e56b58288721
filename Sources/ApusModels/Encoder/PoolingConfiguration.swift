public import ApusCore

/// How a sentence-transformers directory says that token vectors become one vector: `modules.json` lists the steps, the
/// pooling's folder has a `config.json`.
public struct PoolingConfiguration: Sendable, Equatable {
  /// How tokens become one vector; `nil` if the directory does not say.
  public var pooling: EmbeddingInformation.Pooling?
  /// Whether the last step divides vectors by their length. True if the directory does not say.
  public var normalizes = true
  /// The longest sequence (`max_seq_length`); `nil` if the directory does not say.
  public var maxSequenceLength: Int?

  /// A directory that says nothing.
  public init() {}

  /// Reads a directory.
  /// - Throws: `invalidCheckpoint` for a broken file, `unsupported` for a step or a way of pooling that is not implemented.
  public init(directory: String) throws(EngineError) {
    func json(_ path: String) throws(EngineError) -> JSONValue? {
      guard let bytes = try readSmallFile(path) else { return nil }
      do { return try JSONValue.parse(bytes) } catch {
        throw EngineError(.invalidCheckpoint, "\(path): \(error).")
      }
    }
    maxSequenceLength = try json(directory + "/sentence_bert_config.json")?["max_seq_length"]?.intValue
    if let length = maxSequenceLength, length < 1 { maxSequenceLength = nil }
    let path = directory + "/modules.json"
    guard let modules = try json(path) else { return }
    guard let steps = modules.arrayValue else {
      throw EngineError(.invalidCheckpoint, "\(path): expected an array of steps, found \(modules.kindName).")
    }
    normalizes = false
    for step in steps {
      let type = step["type"]?.stringValue ?? ""
      let folder = step["path"]?.stringValue ?? ""
      guard !folder.hasPrefix("/"), !folder.split(separator: "/").contains("..") else {
        throw EngineError(.invalidCheckpoint, "\(path): the step's folder \(folder) lies outside the checkpoint.")
      }
      switch type.split(separator: ".").last.map(String.init) ?? "" {
      case "Transformer": break
      case "Normalize": normalizes = true
      case "Pooling":
        let file = "\(directory)/\(folder)/config.json"
        guard let configuration = try json(file) else {
          throw EngineError(
            .invalidCheckpoint, "\(file) does not exist, but \(path) names it as the way token vectors are pooled.")
        }
        pooling = try Self.pooling(configuration, path: file)
      default:
        throw EngineError(.unsupported, "\(path): the step \(type.debugDescription) is not implemented.")
      }
    }
  }

  private static func pooling(
    _ json: JSONValue, path: String
  ) throws(EngineError) -> EmbeddingInformation.Pooling {
    // Newer versions name the mode, older ones have a flag for each.
    let prefix = "pooling_mode_"
    var modes: [String] = []
    if let mode = json["pooling_mode"]?.stringValue { modes = [mode] }
    for (key, value) in json.objectValue ?? JSONObject() where key.hasPrefix(prefix) && value == .bool(true) {
      modes.append(String(key.dropFirst(prefix.count)))
    }
    guard modes.count == 1 else {
      throw EngineError(
        .unsupported,
        "\(path): \(modes.isEmpty ? "no way of pooling is" : "several ways of pooling are") chosen; exactly one must be."
      )
    }
    switch modes[0] {
    case "cls_token", "cls": return .cls
    case "mean_tokens", "mean": return .mean
    case "lasttoken", "last_token": return .last
    default:
      throw EngineError(
        .unsupported, "\(path): the way of pooling \(modes[0]) is not implemented; cls, mean and last token are.")
    }
  }
}
