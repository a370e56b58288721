public import ApusCore

extension Tokenizer {
  /// Loads the tokenizer of a checkpoint directory.
  public static func load(directory: String) throws(EngineError) -> Tokenizer {
    let base = directory.hasSuffix("/") ? directory : directory + "/"
    let file = base + "tokenizer.json"
    guard FileBytes.exists(file) else {
      throw EngineError(.invalidCheckpoint, "\(directory) holds no tokenizer.json")
    }
    var parts = try parts(json: file)
    try configure(&parts, directory: base)
    return try Tokenizer(parts)
  }

  /// Loads a tokenizer from one file.
  public static func load(file: String) throws(EngineError) -> Tokenizer {
    try Tokenizer(parts(json: file))
  }

  private static func parts(json file: String) throws(EngineError) -> TokenizerParts {
    let contents = try FileBytes(file)
    return try TokenizerJSON(file: file).parse(contents.bytes)
  }

  /// Reads the roles of special tokens from the files beside the tokenizer.
  private static func configure(_ parts: inout TokenizerParts, directory: String) throws(EngineError) {
    for name in ["special_tokens_map.json", "tokenizer_config.json"] {
      let path = directory + name
      guard FileBytes.exists(path) else { continue }
      let contents = try FileBytes(path)
      let value: JSONValue
      do throws(JSONError) {
        var reader = JSONReader(contents.bytes)
        value = try reader.readValue()
        try reader.finish()
      } catch {
        throw EngineError(.invalidCheckpoint, "\(path): \(error)")
      }
      func token(_ key: String) -> String? { value[key]?.stringValue ?? value[key]?["content"]?.stringValue }
      if let text = token("bos_token") { parts.specialTokens.bos = text }
      if let text = token("eos_token") { parts.specialTokens.eos = text }
      if let text = token("unk_token") { parts.specialTokens.unknown = text }
      if let text = token("pad_token") { parts.specialTokens.padding = text }
      if let list = (value["additional_special_tokens"] ?? value["extra_special_tokens"])?.arrayValue {
        parts.specialTokens.additional = list.compactMap { $0.stringValue ?? $0["content"]?.stringValue }
      }
    }
  }
}
