public import ApusCore

extension Tokenizer {
  /// Loads the tokenizer of a checkpoint directory.
  ///
  /// Taken is the first of `tokenizer.json`, a SentencePiece or tiktoken `tokenizer.model`, `tiktoken.model`, any
  /// `*.tiktoken`, `vocab.json` with `merges.txt`, and `vocab.txt`. Beside it `tokenizer_config.json`,
  /// `special_tokens_map.json` and `added_tokens.json` add tokens and say which play which part.
  ///
  /// A directory that holds one GGUF model and no `config.json` has its tokenizer in the model.
  public static func load(directory: String) throws(EngineError) -> Tokenizer {
    if let files = try GGUFFiles.find(directory) { return try load(file: files[0]) }
    let base = directory.hasSuffix("/") ? directory : directory + "/"
    let configuration = try Configuration(directory: base)
    func path(_ name: String) -> String? { FileBytes.exists(base + name) ? base + name : nil }
    if let file = path("tokenizer.json") { return try load(file, configuration, isJSON: true) }
    for name in ["tokenizer.model", "tiktoken.model", "qwen.tiktoken", "spiece.model", "sentencepiece.bpe.model"] {
      if let file = path(name) { return try load(file, configuration, isJSON: false) }
    }
    if let vocabulary = path("vocab.json"), let merges = path("merges.txt") {
      return try load(vocabulary: vocabulary, merges: merges, configuration)
    }
    if let file = path("vocab.txt") { return try load(words: file, configuration) }
    throw EngineError(
      .invalidCheckpoint,
      "\(directory) holds no tokenizer: none of tokenizer.json, tokenizer.model, tiktoken.model, vocab.json with merges.txt, vocab.txt"
    )
  }

  /// Loads a tokenizer from one file: a `tokenizer.json`, a SentencePiece model, a tiktoken rank file or a GGUF file (whose
  /// metadata hold one), told apart by their contents. `configuration` is the path of a `tokenizer_config.json`, if one
  /// goes with it.
  public static func load(file: String, configuration: String? = nil) throws(EngineError) -> Tokenizer {
    let read = try Configuration(file: configuration)
    let isJSON = try FileBytes(file, limit: .max).withBytes { bytes in
      bytes.first { ![0x20, 0x09, 0x0A, 0x0D].contains($0) } == UInt8(ascii: "{")
    }
    return try load(file, read, isJSON: isJSON)
  }

  /// Loads a byte-level BPE tokenizer from `vocab.json` and `merges.txt`.
  public static func load(vocabulary: String, merges: String, configuration: String? = nil) throws(EngineError)
    -> Tokenizer
  {
    try load(vocabulary: vocabulary, merges: merges, try Configuration(file: configuration))
  }

  /// Loads a tokenizer from the text of a `tokenizer.json` in memory; `name` stands for it in messages.
  public convenience init(
    json: [UInt8], configuration: JSONValue = .null, name: String = "tokenizer.json"
  ) throws(EngineError) {
    var parts = try json.withUnsafeBufferPointer { (bytes) throws(EngineError) in
      try TokenizerJSON(file: name).parse(bytes)
    }
    try Configuration(configuration).apply(to: &parts, file: name, isJSON: true)
    try self.init(parts)
  }

  private static func load(_ file: String, _ configuration: Configuration, isJSON: Bool) throws(EngineError)
    -> Tokenizer
  {
    var parts = try FileBytes(file, limit: .max).withBytes { (bytes) throws(EngineError) in
      if isJSON { return try TokenizerJSON(file: file).parse(bytes) }
      if GGUFTokenizer.matches(bytes) { return try GGUFTokenizer(bytes, file: file).parts() }
      if TiktokenFile.matches(bytes) { return try TiktokenFile(bytes, file: file).parts() }
      return try SentencePieceModel(bytes, file: file).parts()
    }
    try configuration.apply(to: &parts, file: file, isJSON: isJSON)
    return try Tokenizer(parts)
  }

  private static func load(vocabulary: String, merges: String, _ configuration: Configuration) throws(EngineError)
    -> Tokenizer
  {
    let section = try FileBytes(vocabulary).withBytes { (words) throws(EngineError) in
      try FileBytes(merges).withBytes { (pairs) throws(EngineError) in
        try ModelSection(vocabulary: words, merges: pairs, members: [:], file: vocabulary)
      }
    }
    var sections: [String: JSONValue] = ["decoder": ["type": "ByteLevel"]]
    let addsSpace = configuration.value["add_prefix_space"]?.boolValue ?? false
    if configuration.value["tokenizer_class"]?.stringValue?.hasPrefix("Qwen2") ?? false {
      sections["normalizer"] = ["type": "NFC"]
      sections["pre_tokenizer"] = [
        "type": "Sequence",
        "pretokenizers": [
          [
            "type": "Split", "pattern": ["Regex": .string(Patterns.cl100k(digits: ""))], "behavior": "Isolated",
            "invert": false,
          ],
          ["type": "ByteLevel", "add_prefix_space": .bool(addsSpace), "use_regex": false],
        ],
      ]
    } else {
      sections["pre_tokenizer"] = ["type": "ByteLevel", "add_prefix_space": .bool(addsSpace), "use_regex": true]
    }
    var parts = try TokenizerJSON(file: vocabulary).assemble(section, sections)
    // GPT-2's own files come without any configuration.
    if parts.model.id(of: Array("<|endoftext|>".utf8)) != nil {
      parts.specialTokens.bos = "<|endoftext|>"
      parts.specialTokens.eos = "<|endoftext|>"
      parts.specialTokens.unknown = "<|endoftext|>"
    }
    try configuration.apply(to: &parts, file: vocabulary, isJSON: false)
    return try Tokenizer(parts)
  }

  private static func load(words file: String, _ configuration: Configuration) throws(EngineError) -> Tokenizer {
    let settings = configuration.value
    let section = try FileBytes(file).withBytes { (bytes) throws(EngineError) in
      guard isValidUTF8(bytes) else { throw EngineError(.invalidCheckpoint, "\(file) is not valid UTF-8") }
      return ModelSection(lines: bytes, members: ["unk_token": settings["unk_token"] ?? "[UNK]"])
    }
    let sections: [String: JSONValue] = [
      "normalizer": [
        "type": "BertNormalizer", "clean_text": true,
        "handle_chinese_chars": settings["tokenize_chinese_chars"] ?? true,
        "strip_accents": settings["strip_accents"] ?? .null, "lowercase": settings["do_lower_case"] ?? true,
      ],
      "pre_tokenizer": ["type": "BertPreTokenizer"],
      "decoder": ["type": "WordPiece", "prefix": "##", "cleanup": true],
    ]
    var parts = try TokenizerJSON(file: file).assemble(section, sections)
    if let start = parts.model.id(of: Array("[CLS]".utf8)), let end = parts.model.id(of: Array("[SEP]".utf8)) {
      parts.postProcessor = PostProcessor(
        single: [.token(start, type: 0), .first(type: 0), .token(end, type: 0)],
        pair: [
          .token(start, type: 0), .first(type: 0), .token(end, type: 0), .second(type: 1), .token(end, type: 1),
        ])
    }
    for name in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] {
      guard let id = parts.model.id(of: Array(name.utf8)) else { continue }
      var token = AddedToken(content: name, id: id)
      token.isSpecial = true
      parts.addedTokens.append(token)
    }
    parts.specialTokens.padding = "[PAD]"
    parts.specialTokens.unknown = "[UNK]"
    try configuration.apply(to: &parts, file: file, isJSON: false)
    return try Tokenizer(parts)
  }
}

/// What `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` say.
struct Configuration {
  private(set) var value: JSONValue = .null
  private var map: JSONValue = .null
  private var added: JSONValue = .null

  init(_ value: JSONValue) { self.value = value }

  init(file: String?) throws(EngineError) {
    if let file { value = try Self.read(file) }
  }

  init(directory: String) throws(EngineError) {
    func optional(_ name: String) throws(EngineError) -> JSONValue {
      FileBytes.exists(directory + name) ? try Self.read(directory + name) : .null
    }
    value = try optional("tokenizer_config.json")
    map = try optional("special_tokens_map.json")
    added = try optional("added_tokens.json")
  }

  private static func read(_ path: String) throws(EngineError) -> JSONValue {
    let contents = try FileBytes(path, limit: 64 << 20)
    do throws(JSONError) {
      return try contents.withBytes { (bytes) throws(JSONError) in
        var reader = JSONReader(bytes)
        let value = try reader.readValue()
        try reader.finish()
        return value
      }
    } catch {
      throw EngineError(.invalidCheckpoint, "\(path): \(error)")
    }
  }

  private func token(_ key: String) -> (present: Bool, text: String?) {
    for source in [value, map] {
      guard let entry = source[key] else { continue }
      return (true, entry.stringValue ?? entry["content"]?.stringValue)
    }
    return (false, nil)
  }

  /// Adds the tokens and settings to a tokenizer.
  func apply(to parts: inout TokenizerParts, file: String, isJSON: Bool) throws(EngineError) {
    let bos = token("bos_token")
    if bos.present { parts.specialTokens.bos = bos.text }
    let eos = token("eos_token")
    if eos.present { parts.specialTokens.eos = eos.text }
    let unknown = token("unk_token").text
    if let unknown { parts.specialTokens.unknown = unknown }
    let padding = token("pad_token")
    if padding.present { parts.specialTokens.padding = padding.text }
    for source in [value, map] {
      for key in ["additional_special_tokens", "extra_special_tokens"] {
        let list = source[key]?.arrayValue ?? source[key]?.objectValue?.map(\.value) ?? []
        for entry in list {
          if let text = entry.stringValue ?? entry["content"]?.stringValue,
            !parts.specialTokens.additional.contains(text)
          {
            parts.specialTokens.additional.append(text)
          }
        }
      }
    }

    // Tokens the model file does not know yet, in the order of their ids.
    if case .object(let entries)? = value["added_tokens_decoder"] {
      let known = Set(parts.addedTokens.map { Array($0.content.utf8) })
      var tokens: [AddedToken] = []
      for (key, entry) in entries {
        guard let id = Int32(key), id >= 0, id < 1 << 28, let content = entry["content"]?.stringValue else {
          throw EngineError(.invalidCheckpoint, "\(file): tokenizer_config.json has an unusable added token \"\(key)\"")
        }
        if content.isEmpty || known.contains(Array(content.utf8)) { continue }
        var token = AddedToken(content: content, id: parts.model.id(of: Array(content.utf8)) ?? id)
        token.isSpecial = entry["special"]?.boolValue ?? false
        token.isNormalized = entry["normalized"]?.boolValue ?? !token.isSpecial
        token.stripsLeft = entry["lstrip"]?.boolValue ?? false
        token.stripsRight = entry["rstrip"]?.boolValue ?? false
        token.isSingleWord = entry["single_word"]?.boolValue ?? false
        tokens.append(token)
      }
      tokens.sort { $0.id < $1.id }
      // A token that takes over an id, as a model's reserved tokens are renamed, replaces the one that had it.
      let taken = Set(tokens.map(\.id))
      if !isJSON { parts.addedTokens.removeAll { taken.contains($0.id) } }
      let used = Set(parts.addedTokens.map(\.id))
      parts.addedTokens += tokens.filter { !used.contains($0.id) }
    }
    if case .object(let entries) = added {
      let known = Set(parts.addedTokens.map { Array($0.content.utf8) })
      for (content, id) in entries.sorted(by: { ($0.value.intValue ?? 0) < ($1.value.intValue ?? 0) }) {
        guard let id = id.intValue, id >= 0, id < 1 << 28 else {
          throw EngineError(.invalidCheckpoint, "\(file): added_tokens.json has an unusable id for \"\(content)\"")
        }
        if content.isEmpty || known.contains(Array(content.utf8)) { continue }
        parts.addedTokens.append(AddedToken(content: content, id: TokenID(id)))
      }
    }
    // Named special tokens that are words of the vocabulary count as added and special, too. The unknown token that the
    // model of a tokenizer.json names for itself is a word like others, unless the configuration names it.
    let known = Set(parts.addedTokens.map { Array($0.content.utf8) })
    let named =
      [
        parts.specialTokens.bos, parts.specialTokens.eos, isJSON ? unknown : parts.specialTokens.unknown,
        parts.specialTokens.padding,
      ]
      .compactMap(\.self) + parts.specialTokens.additional
    for name in named where !known.contains(Array(name.utf8)) {
      guard let id = parts.model.id(of: Array(name.utf8)),
        !parts.addedTokens.contains(where: { $0.content.utf8.elementsEqual(name.utf8) })
      else { continue }
      var token = AddedToken(content: name, id: id)
      token.isSpecial = true
      parts.addedTokens.append(token)
    }

    let limit = parts.model.texts.idLimit * 2 + 1 << 20
    if let token = parts.addedTokens.first(where: { Int($0.id) > limit }) {
      throw EngineError(
        .invalidCheckpoint, "\(file): the id \(token.id) of \"\(token.content)\" is far outside of the vocabulary")
    }
    try applySurroundings(to: &parts, isJSON: isJSON)
    if value["clean_up_tokenization_spaces"]?.boolValue == true, !parts.model.isBytePair {
      parts.decoder.cleansUp()
    }
  }

  /// `add_bos_token` and `add_eos_token` decide for files whose post-processor does not say what surrounds a text.
  private func applySurroundings(to parts: inout TokenizerParts, isJSON: Bool) throws(EngineError) {
    func id(_ name: String?) -> TokenID? {
      name.flatMap { name in
        parts.addedTokens.first { $0.content == name }?.id ?? parts.model.id(of: Array(name.utf8))
      }
    }
    let isLlama = !isJSON && parts.isSentencePieceBytePair
    guard parts.postProcessor == .none, !isJSON || parts.lacksPostProcessor else { return }
    let addsBOS = value["add_bos_token"]?.boolValue ?? isLlama
    let addsEOS = value["add_eos_token"]?.boolValue ?? false
    let prefix = addsBOS ? [id(parts.specialTokens.bos)].compactMap(\.self) : []
    let suffix = addsEOS ? [id(parts.specialTokens.eos)].compactMap(\.self) : []
    parts.postProcessor = .around(prefix: prefix, suffix: suffix)
  }
}
