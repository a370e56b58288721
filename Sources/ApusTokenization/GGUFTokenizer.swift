import ApusCore

/// Reads the tokenizer out of the metadata of a GGUF file (versions 2 and 3).
struct GGUFTokenizer {
  private let file: String
  private var model = ""
  private var preTokenizer = "default"
  private var tokens: [Bytes] = []
  private var merges: [Bytes] = []
  private var hasMerges = false
  private var scores: [Float] = []
  private var kinds: [Int32] = []
  private var numbers: [String: Int] = [:]
  private var flags: [String: Bool] = [:]
  private var characterMap: [UInt8] = []

  private static let prefix = "tokenizer.ggml."

  /// Whether bytes start like a GGUF file.
  static func matches(_ bytes: Bytes) -> Bool { bytes.starts(with: "GGUF".utf8) }

  /// Reads the metadata. The bytes must outlive the value.
  init(_ bytes: Bytes, file: String) throws(EngineError) {
    self.file = file
    let raw = UnsafeRawBufferPointer(bytes)
    let header = try GGUFHeader(raw, path: file)
    func texts(_ name: String) throws(EngineError) -> [Bytes]? {
      var list: [Bytes] = []
      let count = try header.forEachText(Self.prefix + name, in: raw) { (text) throws(EngineError) in list.append(text)
      }
      return count == nil ? nil : list
    }
    func text(_ name: String) throws(EngineError) -> String? {
      guard let value = header.metadata[Self.prefix + name] else { return nil }
      guard let text = value.stringValue else {
        throw EngineError(
          .invalidCheckpoint, "\(file): \(Self.prefix)\(name) must be a string, found \(value.kindName)")
      }
      return text
    }
    guard let model = try text("model"), !model.isEmpty else {
      throw EngineError(.invalidCheckpoint, "\(file) holds no tokenizer: it has no tokenizer.ggml.model")
    }
    self.model = model
    preTokenizer = try text("pre") ?? preTokenizer
    tokens = try texts("tokens") ?? []
    if let list = try texts("merges") { (merges, hasMerges) = (list, true) }
    scores = try header.numbers(Self.prefix + "scores", in: raw)?.map { Float($0) } ?? []
    kinds = try header.numbers(Self.prefix + "token_type", in: raw)?.map { Int32(exactly: $0) ?? 0 } ?? []
    characterMap = try header.byteArray(Self.prefix + "precompiled_charsmap", in: raw) ?? []
    for (key, value) in header.metadata where key.hasPrefix(Self.prefix) {
      let name = String(key.dropFirst(Self.prefix.count))
      switch value {
      // Ids are of 32 bits; -1 and its unsigned spelling stand for none in some files and are refused below.
      case .integer(let number): numbers[name] = Int(Int32(truncatingIfNeeded: number))
      case .flag(let flag): flags[name] = flag
      default: break
      }
    }
    guard !tokens.isEmpty else {
      throw EngineError(.invalidCheckpoint, "\(file) holds no tokenizer: it has no tokenizer.ggml.tokens")
    }
    for token in tokens where !isValidUTF8(token) {
      throw EngineError(.invalidCheckpoint, "\(file): a token is not valid UTF-8")
    }
    guard kinds.isEmpty || kinds.count == tokens.count, scores.isEmpty || scores.count == tokens.count else {
      throw EngineError(.invalidCheckpoint, "\(file): the tokenizer's arrays differ in length")
    }
    try check()
  }

  /// Refuses what would silently give other ids: missing scores or merges, names of tokens that are not there.
  private func check() throws(EngineError) {
    func broken(_ sentence: String) -> EngineError { EngineError(.invalidCheckpoint, "\(file): \(sentence)") }
    if model == "llama" || model == "t5", scores.isEmpty { throw broken("the tokenizer has no tokenizer.ggml.scores") }
    for (name, id) in numbers where name.hasSuffix("_token_id") && !tokens.indices.contains(id) {
      throw broken("tokenizer.ggml.\(name) is \(id), but there are \(tokens.count) tokens")
    }
    guard model == "gpt2" else { return }
    guard hasMerges else { throw broken("the tokenizer has no tokenizer.ggml.merges") }
    var seen = Set<[UInt8]>(minimumCapacity: tokens.count)
    for token in tokens where !seen.insert(Array(token)).inserted {
      throw broken("the token \(String(decoding: token, as: UTF8.self)) occurs twice")
    }
    for (index, merge) in merges.enumerated() {
      guard let space = merge.dropFirst().firstIndex(of: 0x20) else {
        throw broken("merge \(index), \(String(decoding: merge, as: UTF8.self)), does not have two parts")
      }
      let whole = Array(merge[..<space]) + Array(merge[(space + 1)...])
      guard seen.contains(whole), seen.contains(Array(merge[..<space])), seen.contains(Array(merge[(space + 1)...]))
      else { throw broken("merge \(index), \(String(decoding: merge, as: UTF8.self)), names what is no token") }
    }
  }

  /// The tokenizer.
  func parts() throws(EngineError) -> TokenizerParts {
    var parts: TokenizerParts
    switch model {
    case "llama", "t5": parts = try sentencePiece()
    case "gpt2": parts = try byteLevel()
    case "bert": parts = try wordPiece()
    default:
      throw EngineError(.unsupported, "\(file): the tokenizer kind \"\(model)\" is not supported")
    }
    func name(_ key: String) -> String? {
      guard let id = numbers[key], tokens.indices.contains(id) else { return nil }
      return text(of: TokenID(id), parts)
    }
    parts.specialTokens.bos = name("bos_token_id")
    parts.specialTokens.eos = name("eos_token_id")
    parts.specialTokens.unknown = name("unknown_token_id") ?? parts.specialTokens.unknown
    parts.specialTokens.padding = name("padding_token_id")
    if model == "bert" {
      let start = numbers["cls_token_id"] ?? numbers["bos_token_id"] ?? 101
      let end = numbers["seperator_token_id"] ?? numbers["separator_token_id"] ?? 102
      parts.postProcessor = PostProcessor(
        single: [.token(TokenID(start), type: 0), .first(type: 0), .token(TokenID(end), type: 0)],
        pair: [
          .token(TokenID(start), type: 0), .first(type: 0), .token(TokenID(end), type: 0), .second(type: 1),
          .token(TokenID(end), type: 1),
        ])
      return parts
    }
    // Llama's and Llama 3's texts start with their first token even in files that do not say so; T5's end with theirs.
    let addsBOS = flags["add_bos_token"] ?? (model == "llama" || Self.llama3.contains(preTokenizer))
    let addsEOS = flags["add_eos_token"] ?? (model == "t5")
    let bos = addsBOS ? numbers["bos_token_id"].map { [TokenID($0)] } ?? [] : []
    let eos = addsEOS ? numbers["eos_token_id"].map { [TokenID($0)] } ?? [] : []
    parts.postProcessor = .around(prefix: bos, suffix: eos)
    return parts
  }

  private func text(of id: TokenID, _ parts: TokenizerParts) -> String? {
    parts.addedTokens.first { $0.id == id }?.content
      ?? parts.model.texts.bytes(of: id).map { String(decoding: $0, as: UTF8.self) }
  }

  private func kind(_ id: Int) -> SentencePieceModel.PieceKind {
    kinds.isEmpty ? .normal : SentencePieceModel.PieceKind(rawValue: Int(kinds[id])) ?? .normal
  }

  private func sentencePiece() throws(EngineError) -> TokenizerParts {
    let pieces = tokens.indices.map { id in
      SentencePieceModel.Piece(text: Array(tokens[id]), score: scores.isEmpty ? -Float(id) : scores[id], kind: kind(id))
    }
    var unigram = SentencePieceModel(
      pieces: pieces, isUnigram: model == "t5", fallsBackToBytes: pieces.contains { $0.kind == .byte }, file: file)
    unigram.characterMap = characterMap
    unigram.addsDummyPrefix = flags["add_space_prefix"] ?? true
    unigram.removesExtraSpaces = flags["remove_extra_whitespaces"] ?? (model == "t5")
    return try unigram.parts()
  }

  /// Tokens found in the text before the model runs.
  private func addedTokens() -> [AddedToken] {
    tokens.indices.compactMap { id in
      let kind = kind(id)
      guard [.control, .userDefined, .unknown].contains(kind), tokens[id].count > 0 else { return nil }
      var token = AddedToken(content: String(decoding: tokens[id], as: UTF8.self), id: TokenID(id))
      token.isSpecial = kind != .userDefined
      return token
    }
  }

  private func byteLevel() throws(EngineError) -> TokenizerParts {
    let (sections, takesWords) = try Self.byteLevelSections(preTokenizer, file: file)
    let section = try ModelSection(
      tokens: tokens, merges: merges, members: ["ignore_merges": .bool(takesWords)], kind: .bytePair, file: file)
    var parts = try TokenizerJSON(file: file).assemble(section, sections)
    parts.addedTokens = addedTokens()
    return parts
  }

  /// What a `tokenizer.json` says of the steps around a byte-level model, by the name that the format has for them.
  /// - Returns: the sections of the file, and whether words that are tokens are taken whole.
  /// - Throws: `unsupported` for a name that is not known.
  static func byteLevelSections(
    _ name: String, file: String
  ) throws(EngineError) -> (sections: [String: JSONValue], takesWords: Bool) {
    let takesWords = llama3.contains(name) || name == "tekken"
    var sections: [String: JSONValue] = ["decoder": ["type": "ByteLevel"]]
    let byteLevel: JSONValue = ["type": "ByteLevel", "add_prefix_space": false, "use_regex": false]
    func sequence(_ steps: [JSONValue]) -> JSONValue {
      ["type": "Sequence", "pretokenizers": .array(steps + [byteLevel])]
    }
    func split(_ pattern: String) -> JSONValue {
      ["type": "Split", "pattern": ["Regex": .string(pattern)], "behavior": "Isolated", "invert": false]
    }
    let digits: JSONValue = ["type": "Digits", "individual_digits": true]
    switch name {
    case "default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "roberta-bpe", "gigachat", "dbrx":
      sections["pre_tokenizer"] = sequence([split(Patterns.gpt2)])
    case _ where llama3.contains(name), "glm4", "chatglm-bpe", "smaug-bpe":
      sections["pre_tokenizer"] = sequence([split(Patterns.cl100k(digits: "{1,3}"))])
    case "qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan":
      sections["pre_tokenizer"] = sequence([split(Patterns.cl100k(digits: ""))])
      if name == "qwen2" || name == "deepseek-r1-qwen" { sections["normalizer"] = ["type": "NFC"] }
    case "gpt-4o", "llama4", "o200k": sections["pre_tokenizer"] = sequence([split(Patterns.o200k)])
    case "tekken": sections["pre_tokenizer"] = sequence([split(Patterns.tekken)])
    case "deepseek-llm":
      sections["pre_tokenizer"] = sequence([
        split("[\r\n]"), split(#"\s?\p{L}+"#), split(#"\s?\p{P}+"#), split("[一-龥ࠀ-一가-퟿]+"), digits,
      ])
    case "deepseek-coder":
      sections["pre_tokenizer"] = sequence([
        split("[\r\n]"), split(#"\s?\p{L}+"#), split(#"\s?\p{P}+"#), split("[一-龥ࠀ-一가-퟿]+"), split(#"\p{N}"#),
      ])
    case "deepseek-v3", "hunyuan-dense":
      sections["pre_tokenizer"] = sequence([
        split(#"\p{N}{1,3}"#), split("[一-龥぀-ゟ゠-ヿ]+"), split(Patterns.deepSeekV3),
      ])
    case "starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b":
      sections["pre_tokenizer"] = sequence([digits, split(Patterns.gpt2)])
    case "falcon":
      sections["pre_tokenizer"] = sequence([
        ["type": "Punctuation", "behavior": "Contiguous"], split(Patterns.gpt2), split("[0-9][0-9][0-9]"),
      ])
    case "kimi-k2": sections["pre_tokenizer"] = sequence([split(Patterns.kimi)])
    default:
      throw EngineError(
        .unsupported,
        "\(file): the pre-tokenizer \"\(name)\" is not known; use the checkpoint's tokenizer.json instead")
    }
    return (sections, takesWords)
  }

  private static let llama3: Set = ["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1"]

  private func wordPiece() throws(EngineError) -> TokenizerParts {
    // Words are stored with U+2581 before them and continuations without anything.
    var texts: [[UInt8]] = []
    let marker: [UInt8] = [0xE2, 0x96, 0x81]
    for id in tokens.indices {
      let token = tokens[id]
      if token.starts(with: marker) {
        texts.append(Array(token.dropFirst(3)))
      } else if kind(id) == .normal {
        texts.append(Array("##".utf8) + Array(token))
      } else {
        texts.append(Array(token))
      }
    }
    let section = try ModelSection(
      texts: texts, members: ["unk_token": "[UNK]", "continuing_subword_prefix": "##"], file: file)
    var parts = try TokenizerJSON(file: file).assemble(
      section,
      [
        "normalizer": ["type": "BertNormalizer"], "pre_tokenizer": ["type": "BertPreTokenizer"],
        "decoder": ["type": "WordPiece", "prefix": "##", "cleanup": true],
      ])
    parts.addedTokens = addedTokens()
    return parts
  }
}

/// Pre-tokenizer patterns that files without a tokenizer.json refer to by name.
enum Patterns {
  static let gpt2 = #"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#

  private static let contractions = #"(?i:'s|'t|'re|'ve|'m|'ll|'d)"#
  private static let end = #"\s*[\r\n]+|\s+(?!\S)|\s+"#
  private static let lead = #"[^\r\n\p{L}\p{N}]?"#

  /// The pattern of Llama 3 (up to three digits, `{1,3}`) and Qwen 2 (one).
  static func cl100k(digits: String) -> String {
    #"\#(contractions)|\#(lead)\p{L}+|\p{N}\#(digits)| ?[^\s\p{L}\p{N}]+[\r\n]*|\#(end)"#
  }

  private static func cased(_ exception: String, _ suffix: String) -> String {
    let upper = #"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}\#(exception)]"#
    let lower = #"[\p{Ll}\p{Lm}\p{Lo}\p{M}\#(exception)]"#
    return #"\#(lead)\#(upper)*\#(lower)+\#(suffix)|\#(lead)\#(upper)+\#(lower)*\#(suffix)"#
  }

  static let o200k = #"\#(cased("", contractions + "?"))|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\#(end)"#
  static let tekken = #"\#(cased("", ""))|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\#(end)"#
  static let kimi =
    #"[\p{Han}]+|\#(cased(#"&&[^\p{Han}]"#, contractions + "?"))|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\#(end)"#
  static let deepSeekV3 =
    ##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"##
    + end
}
