public import ApusCore

extension ChatTemplateSet {
  /// The chat templates in the metadata of a GGUF file: `tokenizer.chat_template`, and those that
  /// `tokenizer.chat_templates` names. A file without templates gives an empty set.
  public init(gguf path: String) throws(EngineError) {
    let file = try FileBytes(path, limit: .max)
    self = try file.withBytes { (bytes) throws(EngineError) in
      try ChatTemplateSet(ggufBytes: UnsafeRawBufferPointer(bytes), path: path)
    }
  }

  private init(ggufBytes bytes: UnsafeRawBufferPointer, path: String) throws(EngineError) {
    let header = try GGUFHeader(bytes, path: path)
    var sources: [String: String] = [:]
    if let text = header.metadata["tokenizer.chat_template"]?.stringValue { sources[Self.defaultName] = text }
    for (key, value) in header.metadata where key.hasPrefix("tokenizer.chat_template.") {
      sources[String(key.dropFirst("tokenizer.chat_template.".count))] = value.stringValue
    }
    // Texts of special tokens need the tokens alone, also where the tokenizer as a whole cannot be used.
    var specialTokens: [String: String] = [:]
    var names: [Int: [String]] = [:]
    for (key, name) in [
      ("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token"),
      ("seperator", "sep_token"), ("separator", "sep_token"), ("cls", "cls_token"), ("mask", "mask_token"),
    ] {
      if let id = header.metadata["tokenizer.ggml.\(key)_token_id"]?.intValue { names[id, default: []].append(name) }
    }
    var id = 0
    try header.forEachText("tokenizer.ggml.tokens", in: bytes) { (text) throws(EngineError) in
      for name in names[id] ?? [] { specialTokens[name] = String(decoding: text, as: UTF8.self) }
      id += 1
    }
    self.init(sources: sources, specialTokens: specialTokens)
  }
}
