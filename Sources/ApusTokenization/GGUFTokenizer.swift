public import ApusCore

extension Tokenizer {
  /// Loads the tokenizer in the metadata of a GGUF file; of a split model the first part holds it.
  public convenience init(gguf path: String) throws(EngineError) {
    let file = try FileBytes(path, limit: .max, populates: false)
    let bytes = UnsafeRawBufferPointer(file.bytes)
    try self.init(try GGUFVocabulary(GGUFHeader(bytes, path: path), bytes).parts())
  }
}

extension ChatTemplateSet {
  /// The chat templates in the metadata of a GGUF file: `tokenizer.chat_template`, and those that
  /// `tokenizer.chat_templates` names. A file without templates gives an empty set.
  public init(gguf path: String) throws(EngineError) {
    let file = try FileBytes(path, limit: .max, populates: false)
    let bytes = UnsafeRawBufferPointer(file.bytes)
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

/// Makes a tokenizer of the `tokenizer.ggml` entries of a GGUF file.
struct GGUFVocabulary {
  /// How `tokenizer.ggml.pre` says that text is cut into words before pairs are merged.
  struct PreTokenization {
    /// Applied one after another; each keeps its matches and what lies between them as pieces.
    var patterns: [String]
    /// Whether words that are tokens are taken whole.
    var ignoresMerges = false
    /// Whether texts start with the beginning-of-sequence token where the file does not say.
    var addsBOS = false
    /// Whether text is brought to the form NFC.
    var normalizes = false
  }

  private let header: GGUFHeader
  private let bytes: UnsafeRawBufferPointer

  init(_ header: GGUFHeader, _ bytes: UnsafeRawBufferPointer) {
    self.header = header
    self.bytes = bytes
  }

  private func broken(_ sentence: String) -> EngineError {
    EngineError(.invalidCheckpoint, "\(header.path): \(sentence).")
  }

  private func entry(_ name: String) -> GGUFHeader.Value? { header.metadata["tokenizer.ggml.\(name)"] }

  /// The tokenizer. The header's bytes must still be there.
  func parts() throws(EngineError) -> TokenizerParts {
    guard let model = entry("model")?.stringValue else {
      throw broken("there is no tokenizer.ggml.model, so the file has no tokenizer; name one with --tokenizer-path")
    }
    guard case .array(let tokens)? = entry("tokens"), tokens.count > 0, tokens.count < 1 << 28 else {
      throw broken("tokenizer.ggml.tokens must be an array of strings")
    }
    let kinds = try header.numbers("tokenizer.ggml.token_type", in: bytes) ?? []
    guard kinds.isEmpty || kinds.count == tokens.count else {
      throw broken("there are \(tokens.count) tokens, but tokenizer.ggml.token_type has \(kinds.count) entries")
    }
    var parts: TokenizerParts
    let addsBOS: Bool
    switch model {
    case "llama":
      parts = try sentencePiece(kinds, count: tokens.count)
      addsBOS = true
    case "gpt2":
      let pre = try preTokenization()
      parts = try bytePair(pre, kinds)
      addsBOS = pre.addsBOS
    default:
      throw EngineError(
        .unsupported,
        "\(header.path): the tokenizer model \(model) is not implemented in GGUF files; llama and gpt2 are. Name the "
          + "model's own tokenizer with --tokenizer-path.")
    }
    func id(_ name: String) throws(EngineError) -> TokenID? {
      guard let value = entry("\(name)_token_id") else { return nil }
      // Some writers mark "none" with the largest number.
      guard let id = value.intValue, id >= 0, id != Int(UInt32.max) else { return nil }
      guard id < tokens.count else {
        throw broken("tokenizer.ggml.\(name)_token_id is \(id), but there are \(tokens.count) tokens")
      }
      return TokenID(id)
    }
    let bos = try id("bos")
    let eos = try id("eos")
    func name(_ id: TokenID?) -> String? {
      id.flatMap { parts.model.texts.bytes(of: $0) }.map { String(decoding: $0, as: UTF8.self) }
    }
    parts.specialTokens.bos = name(bos)
    parts.specialTokens.eos = name(eos)
    parts.specialTokens.padding = name(try id("padding"))
    if let unknown = name(try id("unknown")) { parts.specialTokens.unknown = unknown }
    let listed = Set(parts.addedTokens.map(\.id))
    for id in Set([bos, eos].compactMap(\.self)).sorted() where !listed.contains(id) {
      guard let content = name(id), !content.isEmpty else { continue }
      var token = AddedToken(content: content, id: id)
      token.isSpecial = true
      parts.addedTokens.append(token)
    }
    if entry("add_bos_token")?.boolValue ?? addsBOS, let bos { parts.postProcessor.prefix = [bos] }
    if entry("add_eos_token")?.boolValue ?? false, let eos { parts.postProcessor.suffix = [eos] }
    return parts
  }

  // MARK: SentencePiece

  private func sentencePiece(_ kinds: [Double], count: Int) throws(EngineError) -> TokenizerParts {
    guard let scores = try header.numbers("tokenizer.ggml.scores", in: bytes), scores.count == count else {
      throw broken("there are \(count) tokens, so tokenizer.ggml.scores must hold as many numbers")
    }
    guard scores.allSatisfy(\.isFinite) else { throw broken("tokenizer.ggml.scores holds a number that is not finite") }
    var pieces: [SentencePieceModel.Piece] = []
    pieces.reserveCapacity(count)
    var hasBytes = false
    try header.forEachText("tokenizer.ggml.tokens", in: bytes) { (text) throws(EngineError) in
      let index = pieces.count
      guard isValidUTF8(text) else { throw broken("token \(index) is not valid UTF-8") }
      let kind = kinds.isEmpty ? .normal : SentencePieceModel.PieceKind(rawValue: Int(kinds[index])) ?? .normal
      if kind == .byte { hasBytes = true }
      pieces.append(SentencePieceModel.Piece(text: Array(text), score: Float(scores[index]), kind: kind))
    }
    return try SentencePieceModel(
      pieces: pieces, bos: -1, eos: -1, padding: -1, fallsBackToBytes: hasBytes,
      addsDummyPrefix: entry("add_space_prefix")?.boolValue ?? true,
      removesExtraSpaces: entry("remove_extra_whitespaces")?.boolValue ?? false, file: header.path
    ).parts()
  }

  // MARK: Byte-level pairs

  private func bytePair(_ pre: PreTokenization, _ kinds: [Double]) throws(EngineError) -> TokenizerParts {
    var added: [JSONValue] = []
    var id = 0
    let section = try ModelSection(
      members: ["ignore_merges": .bool(pre.ignoresMerges)], file: header.path
    ) { (token, merge) throws(EngineError) in
      try header.forEachText("tokenizer.ggml.tokens", in: bytes) { (text) throws(EngineError) in
        guard isValidUTF8(text) else { throw broken("token \(id) is not valid UTF-8") }
        token(text)
        let kind = kinds.isEmpty ? nil : SentencePieceModel.PieceKind(rawValue: Int(kinds[id]))
        if kind == .control || kind == .userDefined || kind == .unknown {
          added.append([
            "id": .int(Int64(id)), "content": .string(String(decoding: text, as: UTF8.self)),
            "special": .bool(kind != .userDefined), "normalized": false,
          ])
        }
        id += 1
      }
      guard try header.forEachText("tokenizer.ggml.merges", in: bytes, merge) != nil else {
        throw broken("a tokenizer of model gpt2 needs tokenizer.ggml.merges")
      }
    }
    var steps: [JSONValue] = pre.patterns.map { pattern in
      ["type": "Split", "pattern": ["Regex": .string(pattern)], "behavior": "Isolated", "invert": false]
    }
    steps.append([
      "type": "ByteLevel", "add_prefix_space": .bool(entry("add_space_prefix")?.boolValue ?? false),
      "use_regex": false,
    ])
    var sections: [String: JSONValue] = [
      "pre_tokenizer": ["type": "Sequence", "pretokenizers": .array(steps)], "decoder": ["type": "ByteLevel"],
      "added_tokens": .array(added),
    ]
    if pre.normalizes { sections["normalizer"] = ["type": "NFC"] }
    return try TokenizerJSON(file: header.path).assemble(section, sections)
  }

  private func preTokenization() throws(EngineError) -> PreTokenization {
    let name = entry("pre")?.stringValue ?? "default"
    guard let pre = Self.preTokenizations[name] else {
      throw EngineError(
        .unsupported,
        "\(header.path): the pre-tokenizer \(name) is not implemented in GGUF files; these are: "
          + Self.preTokenizations.keys.sorted().joined(separator: ", ")
          + ". Name the model's own tokenizer with --tokenizer-path.")
    }
    return pre
  }

  /// What each value of `tokenizer.ggml.pre` stands for: the patterns of the models' own tokenizer files, and llama.cpp's
  /// for `default`, which no model's file has.
  static let preTokenizations: [String: PreTokenization] = {
    let contractions = #"(?i:'s|'t|'re|'ve|'m|'ll|'d)"#
    let gpt2 = #"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#
    let spaces = #"\s*[\r\n]+|\s+(?!\S)|\s+"#
    func words(_ digits: String) -> String {
      contractions + #"|[^\r\n\p{L}\p{N}]?\p{L}+|"# + digits + #"| ?[^\s\p{L}\p{N}]+[\r\n]*|"# + spaces
    }
    let upper = #"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"#
    let lower = #"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"#
    func casedWords(_ ending: String, _ digits: String) -> String {
      let lead = #"[^\r\n\p{L}\p{N}]?"#
      return "\(lead)\(upper)*\(lower)+\(ending)|\(lead)\(upper)+\(lower)*\(ending)|\(digits)"
        + #"| ?[^\s\p{L}\p{N}]+[\r\n/]*|"# + spaces
    }
    let deepseekHan = "[\u{4E00}-\u{9FA5}\u{0800}-\u{4E00}\u{AC00}-\u{D7FF}]+"
    var table: [String: PreTokenization] = [:]
    let llama3 = PreTokenization(patterns: [words(#"\p{N}{1,3}"#)], ignoresMerges: true, addsBOS: true)
    for name in ["llama3", "llama-v3", "llama-bpe"] { table[name] = llama3 }
    for name in ["dbrx", "smaug-bpe"] { table[name] = PreTokenization(patterns: [words(#"\p{N}{1,3}"#)]) }
    table["qwen2"] = PreTokenization(patterns: [words(#"\p{N}"#)], normalizes: true)
    table["deepseek-r1-qwen"] = PreTokenization(patterns: [words(#"\p{N}"#)], addsBOS: true, normalizes: true)
    for name in ["gpt-2", "mpt", "olmo", "jais"] { table[name] = PreTokenization(patterns: [gpt2]) }
    for name in ["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone"] {
      table[name] = PreTokenization(patterns: [#"\p{N}"#, gpt2])
    }
    table["gpt-4o"] = PreTokenization(patterns: [casedWords("\(contractions)?", #"\p{N}{1,3}"#)])
    table["tekken"] = PreTokenization(
      patterns: [casedWords("", #"\p{N}"#)], ignoresMerges: true, addsBOS: true)
    table["deepseek-coder"] = PreTokenization(
      patterns: [#"[\r\n]"#, #"\s?\p{L}+"#, #"\s?\p{P}+"#, deepseekHan, #"\p{N}"#])
    table["deepseek-llm"] = PreTokenization(
      patterns: [
        #"[\r\n]"#, #"\s?"# + deepseekLetters,
        "\\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}]+", #"\s+$"#, deepseekHan,
        #"\p{N}+"#,
      ])
    table["deepseek-v3"] = PreTokenization(
      patterns: [
        #"\p{N}{1,3}"#, "[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+",
        ##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"##
          + spaces,
      ])
    table["default"] = PreTokenization(
      patterns: [
        #"[\p{P}\$\+<=>\^~\|]+"#, #"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"#,
        #"\p{N}+"#,
        "[0-9][0-9][0-9]",
      ])
    return table
  }()

  /// The letters of the deepseek-llm tokenizer: the cased ones of Unicode, as its tokenizer.json lists them.
  private static let deepseekLetters =
    "[A-Za-z\u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}\u{295}-\u{2AF}"
    + "\u{370}-\u{373}\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\u{38C}\u{38E}-\u{3A1}"
    + "\u{3A3}-\u{3F5}\u{3F7}-\u{481}\u{48A}-\u{52F}\u{531}-\u{556}\u{10A0}-\u{10C5}\u{13A0}-\u{13F5}"
    + "\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\u{1D00}-\u{1D2B}\u{1D6B}-\u{1D77}"
    + "\u{1D79}-\u{1D9A}\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\u{1F20}-\u{1F45}\u{1F48}-\u{1F4D}"
    + "\u{1F50}-\u{1F57}\u{1F59}\u{1F5B}\u{1F5D}\u{1F5F}-\u{1F7D}\u{1F80}-\u{1FB4}\u{1FB6}-\u{1FBC}"
    + "\u{1FBE}\u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}\u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}\u{1FE0}-\u{1FEC}"
    + "\u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\u{2102}\u{2107}\u{210A}-\u{2113}\u{2115}\u{2119}-\u{211D}"
    + "\u{2124}\u{2126}\u{2128}\u{212A}-\u{212D}\u{212F}-\u{2134}\u{2139}\u{213C}-\u{213F}"
    + "\u{2145}-\u{2149}\u{214E}\u{2183}\u{2184}\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}\u{2CEB}-\u{2CEE}"
    + "\u{2CF2}\u{2CF3}\u{A640}-\u{A66D}\u{A680}-\u{A69B}\u{A722}-\u{A76F}\u{A771}-\u{A787}"
    + "\u{A78B}-\u{A78E}\u{AB70}-\u{ABBF}\u{FB00}-\u{FB06}\u{FB13}-\u{FB17}\u{FF21}-\u{FF3A}"
    + "\u{FF41}-\u{FF5A}\u{10400}-\u{1044F}\u{104B0}-\u{104D3}\u{104D8}-\u{104FB}\u{10C80}-\u{10CB2}"
    + "\u{10CC0}-\u{10CF2}\u{118A0}-\u{118DF}\u{1E900}-\u{1E943}]+"
}
