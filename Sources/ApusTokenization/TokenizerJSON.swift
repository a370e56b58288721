import ApusCore

/// Reads a Hugging Face `tokenizer.json`.
struct TokenizerJSON {
  /// Name of the file, for messages.
  let file: String

  private func failure(_ message: String) -> EngineError { EngineError(.invalidCheckpoint, "\(file): \(message)") }

  /// Reads the whole document.
  func parse(_ bytes: Bytes) throws(EngineError) -> TokenizerParts {
    var sections: [String: JSONValue] = [:]
    var model: ModelSection?
    do throws(JSONError) {
      var reader = JSONReader(bytes)
      try reader.readObject { (reader, key) throws(JSONError) in
        switch key {
        case "model": model = try ModelSection(&reader)
        case "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder":
          sections[key] = try reader.readValue()
        default: try reader.skipValue()
        }
      }
      try reader.finish()
    } catch {
      throw failure("not a valid tokenizer.json: \(error)")
    }
    guard let model else { throw failure("there is no \"model\"") }
    return try assemble(model, sections)
  }

  /// Makes a tokenizer of a model and the other sections of a `tokenizer.json`.
  func assemble(_ section: consuming ModelSection, _ sections: [String: JSONValue]) throws(EngineError)
    -> TokenizerParts
  {
    let normalizer = try normalizer(sections["normalizer"] ?? .null)
    var preTokenizers = try self.preTokenizers(sections["pre_tokenizer"] ?? .null)
    // Byte-level text can skip its alphabet altogether when nothing looks at the pieces after it was applied.
    var unitsAreBytes = false
    if case .byteAlphabet? = preTokenizers.last, section.kind == .bytePair,
      preTokenizers.filter({ if case .byteAlphabet = $0 { true } else { false } }).count == 1,
      section.isPlainByteLevel()
    {
      unitsAreBytes = true
      preTokenizers.removeLast()
    }
    let texts = section.texts
    try texts.seal(file)
    let model = try section.model(file: file, unitsAreBytes: unitsAreBytes)
    var parts = TokenizerParts(model: model)
    parts.normalizer = normalizer
    parts.preTokenizers = preTokenizers
    parts.addedTokens = try addedTokens(sections["added_tokens"] ?? .null, texts: texts)
    parts.postProcessor = try postProcessor(sections["post_processor"] ?? .null)
    parts.decoder = TextDecoder(try decoderSteps(sections["decoder"] ?? .null))
    let processor = sections["post_processor"] ?? .null
    parts.lacksPostProcessor = processor.isNull || processor["type"] == "ByteLevel"
    if let unknown = section.unknown { parts.specialTokens.unknown = unknown }
    return parts
  }

  // MARK: Sections

  private func addedTokens(_ value: JSONValue, texts: TokenTable) throws(EngineError) -> [AddedToken] {
    if value.isNull { return [] }
    guard let list = value.arrayValue else { throw failure("\"added_tokens\" is \(value.kindName), not an array") }
    var tokens: [AddedToken] = []
    // By bytes: strings that only look the same are other tokens.
    var positions: [[UInt8]: Int] = [:]
    var greatest: TokenID = -1
    for entry in list {
      guard let content = entry["content"]?.stringValue else { throw failure("an added token has no \"content\"") }
      guard let stated = entry["id"]?.intValue, stated >= 0, stated < 1 << 28 else {
        throw failure("the added token \"\(content)\" has no usable \"id\"")
      }
      if content.isEmpty { continue }
      // Ids follow from the vocabulary and the order of the list, as `tokenizers` assigns them; files state the same.
      let id: TokenID
      let bytes = Array(content.utf8)
      if let position = positions[bytes] {
        id = tokens[position].id
      } else if let known = texts.id(of: bytes) {
        id = known
      } else {
        id =
          greatest >= TokenID(texts.count) || (greatest >= 0 && texts.count == 0) ? greatest + 1 : TokenID(texts.count)
      }
      var token = AddedToken(content: content, id: id)
      token.isSingleWord = entry["single_word"]?.boolValue ?? false
      token.stripsLeft = entry["lstrip"]?.boolValue ?? false
      token.stripsRight = entry["rstrip"]?.boolValue ?? false
      token.isSpecial = entry["special"]?.boolValue ?? false
      token.isNormalized = entry["normalized"]?.boolValue ?? !token.isSpecial
      if let position = positions[bytes] {
        tokens[position] = token
      } else {
        positions[bytes] = tokens.count
        tokens.append(token)
      }
      greatest = Swift.max(greatest, id)
    }
    return tokens
  }

  private func type(of value: JSONValue, _ section: String) throws(EngineError) -> String {
    guard let type = value["type"]?.stringValue else { throw failure("a \(section) has no \"type\"") }
    return type
  }

  private func text(_ value: JSONValue, _ key: String, _ section: String) throws(EngineError) -> [UInt8] {
    guard let text = value[key]?.stringValue else { throw failure("\(section) has no \"\(key)\"") }
    return Array(text.utf8)
  }

  private func pattern(_ source: String) throws(EngineError) -> Pattern {
    do throws(EngineError) {
      return try Pattern(source, syntax: .oniguruma)
    } catch {
      throw failure("the pattern \(source) cannot be used. \(error.message)")
    }
  }

  private func normalizer(_ value: JSONValue) throws(EngineError) -> Normalizer? {
    if value.isNull { return nil }
    switch try type(of: value, "normalizer") {
    case "Sequence":
      var steps: [Normalizer] = []
      for element in value["normalizers"]?.arrayValue ?? [] {
        if let step = try normalizer(element) { steps.append(step) }
      }
      return .sequence(steps)
    case "Prepend": return .prepend(try text(value, "prepend", "Prepend"))
    case "Replace":
      let content = try text(value, "content", "Replace")
      if let literal = value["pattern"]?["String"]?.stringValue {
        return .replace(pattern: Array(literal.utf8), content: content)
      }
      guard let source = value["pattern"]?["Regex"]?.stringValue else { throw failure("Replace needs a pattern") }
      return .replaceMatches(try pattern(source), content: content)
    case "ByteLevel": return .byteLevel
    case "NFC": return .form(.nfc)
    case "NFD": return .form(.nfd)
    case "NFKC": return .form(.nfkc)
    case "NFKD": return .form(.nfkd)
    case "Nmt": return .nmt
    case "Precompiled":
      guard let text = value["precompiled_charsmap"]?.stringValue, let blob = Base64.decode(text.utf8) else {
        throw failure("Precompiled has no usable \"precompiled_charsmap\"")
      }
      do throws(EngineError) {
        return .precompiled(try CharacterMap(blob))
      } catch {
        throw failure(error.message)
      }
    case "Strip":
      return .strip(
        left: value["strip_left"]?.boolValue ?? true, right: value["strip_right"]?.boolValue ?? true)
    case "StripAccents": return .stripAccents
    case "Lowercase": return .lowercase
    case "BertNormalizer":
      let lowercases = value["lowercase"]?.boolValue ?? true
      return .bert(
        cleansText: value["clean_text"]?.boolValue ?? true,
        spacesChinese: value["handle_chinese_chars"]?.boolValue ?? true,
        stripsAccents: value["strip_accents"]?.boolValue ?? lowercases, lowercases: lowercases)
    case let other: throw failure("the normalizer \"\(other)\" is not known")
    }
  }

  private func preTokenizers(_ value: JSONValue) throws(EngineError) -> [PreTokenizer] {
    if value.isNull { return [] }
    switch try type(of: value, "pre-tokenizer") {
    case "Sequence":
      var steps: [PreTokenizer] = []
      for element in value["pretokenizers"]?.arrayValue ?? [] { steps += try preTokenizers(element) }
      return steps
    case "ByteLevel":
      var steps: [PreTokenizer] = []
      if value["add_prefix_space"]?.boolValue ?? true { steps.append(.prefixSpace) }
      if value["use_regex"]?.boolValue ?? true {
        steps.append(.split(.scanner(.gpt2), .isolated, inverts: false))
      }
      steps.append(.byteAlphabet)
      return steps
    case "Metaspace":
      let replacement = try text(value, "replacement", "Metaspace")
      var scheme = PreTokenizer.PrependScheme.always
      if let name = value["prepend_scheme"]?.stringValue {
        guard let known = PreTokenizer.PrependScheme(rawValue: name) else {
          throw failure("the prepend_scheme \"\(name)\" is not known")
        }
        scheme = known
      }
      if value["add_prefix_space"]?.boolValue == false { scheme = .never }
      return [.metaspace(replacement: replacement, scheme: scheme, splits: value["split"]?.boolValue ?? true)]
    case "Split":
      let inverts = value["invert"]?.boolValue ?? false
      guard let behavior = SplitBehavior(rawValue: value["behavior"]?.stringValue ?? "") else {
        throw failure("Split has no known \"behavior\"")
      }
      if let literal = value["pattern"]?["String"]?.stringValue {
        let split: SplitPattern = literal.isEmpty ? .pattern(try pattern("")) : .literal(Array(literal.utf8))
        return [.split(split, behavior, inverts: inverts)]
      }
      guard let source = value["pattern"]?["Regex"]?.stringValue else { throw failure("Split needs a pattern") }
      if let scanner = WordScanner(pattern: source) { return [.split(.scanner(scanner), behavior, inverts: inverts)] }
      return [.split(.pattern(try pattern(source)), behavior, inverts: inverts)]
    case "Digits":
      let behavior = value["individual_digits"]?.boolValue ?? false ? SplitBehavior.isolated : .contiguous
      return [.split(.characters(.numeric), behavior, inverts: false)]
    case "Punctuation":
      guard let behavior = SplitBehavior(rawValue: value["behavior"]?.stringValue ?? "Isolated") else {
        throw failure("Punctuation has no known \"behavior\"")
      }
      return [.split(.characters(.punctuation), behavior, inverts: false)]
    case "Whitespace": return [.words]
    case "WhitespaceSplit": return [.split(.characters(.whiteSpace), .removed, inverts: false)]
    case "BertPreTokenizer":
      return [
        .split(.characters(.whiteSpace), .removed, inverts: false),
        .split(.characters(.punctuation), .isolated, inverts: false),
      ]
    case "CharDelimiterSplit":
      guard let scalar = value["delimiter"]?.stringValue?.unicodeScalars.first else {
        throw failure("CharDelimiterSplit has no \"delimiter\"")
      }
      return [.split(.characters(.scalar(scalar.value)), .removed, inverts: false)]
    case "UnicodeScripts": return [.scripts]
    case "FixedLength":
      guard let length = Optional(value["length"]?.intValue ?? 5), length > 0 else {
        throw failure("FixedLength has no usable \"length\"")
      }
      return [.fixedLength(length)]
    case let other: throw failure("the pre-tokenizer \"\(other)\" is not known")
    }
  }

  private func postProcessor(_ value: JSONValue) throws(EngineError) -> PostProcessor {
    if value.isNull { return .none }
    switch try type(of: value, "post-processor") {
    case "ByteLevel": return .none
    case "TemplateProcessing":
      return try template(value)
    case "BertProcessing", "RobertaProcessing":
      func id(_ key: String) throws(EngineError) -> TokenID {
        guard let pair = value[key]?.arrayValue, pair.count == 2, let id = pair[1].intValue, id >= 0, id < 1 << 28
        else {
          throw failure("the post-processor has no usable \"\(key)\"")
        }
        return TokenID(id)
      }
      let start = try id("cls")
      let end = try id("sep")
      let isRoberta = value["type"] == "RobertaProcessing"
      // RoBERTa puts two separators between texts and knows one segment only.
      let second: Int32 = isRoberta ? 0 : 1
      return PostProcessor(
        single: [.token(start, type: 0), .first(type: 0), .token(end, type: 0)],
        pair: [.token(start, type: 0), .first(type: 0), .token(end, type: 0)]
          + (isRoberta ? [.token(end, type: 0)] : []) + [.second(type: second), .token(end, type: second)])
    case "Sequence":
      var result = PostProcessor.none
      for element in value["processors"]?.arrayValue ?? [] {
        let step = try postProcessor(element)
        result = result.followed(by: step)
      }
      return result
    case let other: throw failure("the post-processor \"\(other)\" is not known")
    }
  }

  private func template(_ value: JSONValue) throws(EngineError) -> PostProcessor {
    func parts(_ key: String) throws(EngineError) -> [PostProcessor.Part] {
      var parts: [PostProcessor.Part] = []
      for element in value[key]?.arrayValue ?? [] {
        let body = element["SpecialToken"] ?? element["Sequence"] ?? .null
        let type = Int32(clamping: body["type_id"]?.intValue ?? 0)
        guard let name = body["id"]?.stringValue else { throw failure("a part of the template has no \"id\"") }
        if element["Sequence"] != nil {
          parts.append(name == "A" ? .first(type: type) : .second(type: type))
          continue
        }
        guard let ids = value["special_tokens"]?[name]?["ids"]?.arrayValue else {
          throw failure("the template names the token \"\(name)\", which \"special_tokens\" does not define")
        }
        for id in ids {
          guard let id = id.intValue, id >= 0, id < 1 << 28 else {
            throw failure("the template's token \"\(name)\" has no usable id")
          }
          parts.append(.token(TokenID(id), type: type))
        }
      }
      return parts
    }
    let result = PostProcessor(single: try parts("single"), pair: try parts("pair"))
    guard result.single.contains(where: { if case .first = $0 { true } else { false } }) else {
      throw failure("the template does not hold the text")
    }
    return result
  }

  private func decoderSteps(_ value: JSONValue) throws(EngineError) -> [DecoderStep]? {
    if value.isNull { return nil }
    switch try type(of: value, "decoder") {
    case "Sequence":
      var steps: [DecoderStep] = []
      for element in value["decoders"]?.arrayValue ?? [] { steps += try decoderSteps(element) ?? [] }
      return steps
    case "ByteLevel": return [.byteLevel]
    case "ByteFallback": return [.byteFallback]
    case "Fuse": return [.fuse]
    case "Metaspace":
      let scheme = value["prepend_scheme"]?.stringValue ?? "always"
      let drops = scheme != "never" && value["add_prefix_space"]?.boolValue ?? true
      return [.metaspace(replacement: try text(value, "replacement", "Metaspace"), dropsFirst: drops)]
    case "WordPiece":
      return [
        .wordPiece(prefix: try text(value, "prefix", "WordPiece"), cleansUp: value["cleanup"]?.boolValue ?? true)
      ]
    case "BPEDecoder": return [.endOfWord(suffix: try text(value, "suffix", "BPEDecoder"))]
    case "CTC":
      return [
        .connectionist(
          padding: try text(value, "pad_token", "CTC"), delimiter: try text(value, "word_delimiter_token", "CTC"),
          cleansUp: value["cleanup"]?.boolValue ?? true)
      ]
    case "Strip":
      guard let start = value["start"]?.intValue, let stop = value["stop"]?.intValue, start >= 0, stop >= 0 else {
        throw failure("the Strip decoder has no usable \"start\" and \"stop\"")
      }
      return [.strip(content: try text(value, "content", "Strip"), start: start, stop: stop)]
    case "Replace":
      let content = try text(value, "content", "Replace")
      if let literal = value["pattern"]?["String"]?.stringValue {
        return [.replace(pattern: Array(literal.utf8), content: content)]
      }
      guard let source = value["pattern"]?["Regex"]?.stringValue else { throw failure("Replace needs a pattern") }
      return [.replaceMatches(try pattern(source), content: content)]
    case let other: throw failure("the decoder \"\(other)\" is not known")
    }
  }
}

/// The `model` member of a `tokenizer.json`, read without making strings.
struct ModelSection {
  /// Kinds of model.
  enum Kind { case bytePair, wordPiece, wordLevel, unigram }

  private(set) var kind = Kind.bytePair
  let texts: TokenTable
  private var members: [String: JSONValue] = [:]
  private var mergeBytes: [UInt8] = []
  /// Ends of the two parts of every merge in `mergeBytes`.
  private var mergeEnds: [UInt32] = []
  private(set) var scores: [Double] = []

  /// Text of the unknown token, if the model names one.
  var unknown: String? { members["unk_token"]?.stringValue }

  /// The parts of `vocab.json` and `merges.txt`.
  init(vocabulary: Bytes, merges: Bytes, members: [String: JSONValue], file: String) throws(EngineError) {
    self.members = members
    texts = TokenTable(capacity: vocabulary.count / 24)
    let texts = texts
    do throws(JSONError) {
      var reader = JSONReader(vocabulary)
      try reader.readObjectBytes { (reader, key) throws(JSONError) in
        let offset = reader.offset
        let id = try reader.readInt()
        guard id >= 0, id < Int(Int32.max) else { throw JSONError("A token id is out of range", at: offset) }
        texts.insert(key, id: TokenID(id))
      }
      try reader.finish()
    } catch {
      throw EngineError(.invalidCheckpoint, "\(file): the vocabulary is not usable: \(error)")
    }
    var number = 0
    for line in merges.split(separator: 0x0A) {
      number += 1
      let line = line.last == 0x0D ? line.dropLast() : line
      if line.isEmpty || line.starts(with: "#version".utf8) { continue }
      guard let space = line.firstIndex(of: 0x20), !line[(space + 1)...].contains(0x20) else {
        throw EngineError(.invalidCheckpoint, "\(file): merge \(number) does not have two parts")
      }
      mergeBytes.append(contentsOf: line[..<space])
      mergeEnds.append(UInt32(truncatingIfNeeded: mergeBytes.count))
      mergeBytes.append(contentsOf: line[(space + 1)...])
      mergeEnds.append(UInt32(truncatingIfNeeded: mergeBytes.count))
    }
  }

  /// Tokens in the order of their ids, and merges as pairs with a space between.
  init(tokens: [Bytes], merges: [Bytes], members: [String: JSONValue], kind: Kind, file: String) throws(EngineError) {
    self.members = members
    self.kind = kind
    texts = TokenTable(capacity: tokens.count)
    for (id, token) in tokens.enumerated() { texts.insert(token, id: TokenID(id)) }
    for (number, merge) in merges.enumerated() {
      // The first part has at least one character, whatever it is.
      guard let space = merge.dropFirst().firstIndex(of: 0x20), !merge[(space + 1)...].contains(0x20) else {
        throw EngineError(.invalidCheckpoint, "\(file): merge \(number) does not have two parts")
      }
      mergeBytes.append(contentsOf: merge[..<space])
      mergeEnds.append(UInt32(truncatingIfNeeded: mergeBytes.count))
      mergeBytes.append(contentsOf: merge[(space + 1)...])
      mergeEnds.append(UInt32(truncatingIfNeeded: mergeBytes.count))
    }
  }

  /// Words and continuations in the order of their ids.
  init(texts words: [[UInt8]], members: [String: JSONValue], file: String) throws(EngineError) {
    self.members = members
    kind = .wordPiece
    texts = TokenTable(capacity: words.count)
    for (id, word) in words.enumerated() { word.withUnsafeBufferPointer { texts.insert($0, id: TokenID(id)) } }
  }

  /// The tokens of `vocab.txt`, one a line.
  init(lines: Bytes, members: [String: JSONValue]) {
    self.members = members
    texts = TokenTable(capacity: lines.count / 8)
    kind = .wordPiece
    var id: TokenID = 0
    for line in lines.split(separator: 0x0A, omittingEmptySubsequences: false) {
      var line = line
      if id > 0, line.isEmpty, line.endIndex == lines.endIndex { break }
      if line.last == 0x0D { line = line.dropLast() }
      texts.insert(Bytes(rebasing: line), id: id)
      id += 1
    }
  }

  /// Reads the object.
  init(_ reader: inout JSONReader) throws(JSONError) {
    var type: String?
    var vocabularyIsList = false
    var hasMerges = false
    var merges: [UInt8] = []
    var ends: [UInt32] = []
    var scores: [Double] = []
    var members: [String: JSONValue] = [:]
    let texts = TokenTable(capacity: Swift.min(reader.remaining / 32, 1 << 20))
    try reader.readObject { (reader, key) throws(JSONError) in
      switch key {
      case "type": type = try reader.readString()
      case "vocab":
        if try reader.peek() == .array {
          vocabularyIsList = true
          try reader.readArray { (reader) throws(JSONError) in
            var position = 0
            let offset = reader.offset
            try reader.readArray { (reader) throws(JSONError) in
              if position == 0 {
                let id = TokenID(truncatingIfNeeded: scores.count)
                try reader.withString { texts.insert($0, id: id) }
              } else if position == 1 {
                guard let score = try reader.readNumber().doubleValue else {
                  throw JSONError("Expected a number", at: offset)
                }
                scores.append(score)
              } else {
                throw JSONError("Expected a pair of a token and its score", at: offset)
              }
              position += 1
            }
            if position != 2 { throw JSONError("Expected a pair of a token and its score", at: offset) }
          }
        } else {
          try reader.readObjectBytes { (reader, key) throws(JSONError) in
            let offset = reader.offset
            let id = try reader.readInt()
            guard id >= 0, id < Int(Int32.max) else { throw JSONError("A token id is out of range", at: offset) }
            texts.insert(key, id: TokenID(id))
          }
        }
      case "merges":
        hasMerges = true
        try reader.readArray { (reader) throws(JSONError) in
          let offset = reader.offset
          if try reader.peek() == .array {
            var parts = 0
            try reader.readArray { (reader) throws(JSONError) in
              try reader.withString { merges.append(contentsOf: $0) }
              ends.append(UInt32(truncatingIfNeeded: merges.count))
              parts += 1
            }
            if parts != 2 { throw JSONError("A merge must have two parts", at: offset) }
          } else {
            let isPair = try reader.withString { text -> Bool in
              guard let space = text.firstIndex(of: 0x20),
                !text[(space + 1)...].contains(0x20)
              else { return false }
              merges.append(contentsOf: text[..<space])
              ends.append(UInt32(truncatingIfNeeded: merges.count))
              merges.append(contentsOf: text[(space + 1)...])
              ends.append(UInt32(truncatingIfNeeded: merges.count))
              return true
            }
            if !isPair { throw JSONError("A merge must have two parts with one space between them", at: offset) }
          }
        }
      default: members[key] = try reader.readValue()
      }
    }
    self.members = members
    self.texts = texts
    self.scores = scores
    mergeBytes = merges
    mergeEnds = ends
    switch type {
    case "BPE": kind = .bytePair
    case "WordPiece": kind = .wordPiece
    case "WordLevel": kind = .wordLevel
    case "Unigram": kind = .unigram
    case .some(let other): throw JSONError("The model \"\(other)\" is not known", at: reader.offset)
    case nil:
      // Old files do not name the kind; the fields tell it.
      if vocabularyIsList {
        kind = .unigram
      } else if hasMerges {
        kind = .bytePair
      } else if members["continuing_subword_prefix"] != nil || members["max_input_chars_per_word"] != nil {
        kind = .wordPiece
      } else {
        kind = .wordLevel
      }
    }
  }

  /// Whether the model works on single bytes of the byte alphabet: all 256 are tokens and words have no affixes.
  func isPlainByteLevel() -> Bool {
    guard (members["continuing_subword_prefix"]?.stringValue ?? "").isEmpty,
      (members["end_of_word_suffix"]?.stringValue ?? "").isEmpty
    else { return false }
    for scalar in ByteAlphabet.scalars {
      var text: [UInt8] = []
      appendScalar(scalar, to: &text)
      if texts.id(of: text) == nil { return false }
    }
    return true
  }

  /// Makes the model. `texts` must be sealed.
  func model(file: String, unitsAreBytes: Bool) throws(EngineError) -> TokenModel {
    switch kind {
    case .bytePair: return try bytePair(file, unitsAreBytes)
    case .wordPiece:
      let prefix = members["continuing_subword_prefix"]?.stringValue ?? "##"
      return .wordPiece(
        WordPieceModel(
          vocabulary: texts, unknown: unknownID("[UNK]"), continuingPrefix: Array(prefix.utf8),
          maximumCharacters: members["max_input_chars_per_word"]?.intValue ?? 100))
    case .wordLevel: return .wordLevel(WordLevelModel(vocabulary: texts, unknown: unknownID("<unk>")))
    case .unigram:
      var unknown: TokenID?
      if let id = members["unk_id"]?.intValue {
        guard id >= 0, id < scores.count else {
          throw EngineError(.invalidCheckpoint, "\(file): the model's \"unk_id\" \(id) is not in the vocabulary")
        }
        unknown = TokenID(id)
      }
      return .unigram(
        UnigramModel(
          vocabulary: texts, scores: scores, unknown: unknown,
          fallsBackToBytes: members["byte_fallback"]?.boolValue ?? false))
    }
  }

  private func unknownID(_ standard: String) -> TokenID? {
    texts.id(of: Array((unknown ?? standard).utf8))
  }

  private func bytePair(_ file: String, _ unitsAreBytes: Bool) throws(EngineError) -> TokenModel {
    if let dropout = members["dropout"]?.doubleValue, dropout != 0 {
      throw EngineError(.unsupported, "\(file): BPE dropout is a training feature and cannot be served; set it to null")
    }
    var options = BytePairEncoding.Options()
    options.unitsAreBytes = unitsAreBytes
    if let unknown {
      if let id = texts.id(of: Array(unknown.utf8)) {
        options.unknown = id
      } else {
        options.missingUnknown = unknown
      }
    }
    options.fuseUnknown = members["fuse_unk"]?.boolValue ?? false
    options.byteFallback = members["byte_fallback"]?.boolValue ?? false
    options.ignoreMerges = members["ignore_merges"]?.boolValue ?? false
    options.continuingPrefix = Array((members["continuing_subword_prefix"]?.stringValue ?? "").utf8)
    options.wordSuffix = Array((members["end_of_word_suffix"]?.stringValue ?? "").utf8)

    let pairs = PairTable(capacity: mergeEnds.count / 2)
    var merged: [UInt8] = []
    let prefix = options.continuingPrefix.count
    var expected = 0
    for index in 0..<(mergeEnds.count / 2) {
      let start = index == 0 ? 0 : Int(mergeEnds[index * 2 - 1])
      let middle = Int(mergeEnds[index * 2])
      let end = Int(mergeEnds[index * 2 + 1])
      let left = id(start, middle)
      let right = id(middle, end)
      merged.removeAll(keepingCapacity: true)
      merged.append(contentsOf: mergeBytes[start..<middle])
      if prefix <= end - middle { merged.append(contentsOf: mergeBytes[(middle + prefix)..<end]) }
      // Vocabularies mostly list the results of merges in order: try the entry after the last one before searching.
      let result = merged.withUnsafeBufferPointer { buffer -> TokenID in
        guard let base = buffer.baseAddress else { return -1 }
        var entry = expected
        if entry >= texts.count || !texts.matches(entry: entry, base, buffer.count) {
          entry = texts.entry(base, buffer.count)
          if entry < 0 { return -1 }
        }
        expected = entry + 1
        return texts.id(entry: entry)
      }
      if left < 0 || right < 0 || result < 0 {
        let pair =
          String(decoding: mergeBytes[start..<middle], as: UTF8.self) + " "
          + String(decoding: mergeBytes[middle..<end], as: UTF8.self)
        throw EngineError(
          .invalidCheckpoint, "\(file): the merge \"\(pair)\" names a token that is not in the vocabulary")
      }
      pairs.insert(
        TokenIndex(bitPattern: left), TokenIndex(bitPattern: right),
        UInt64(index) << 32 | UInt64(TokenIndex(bitPattern: result)))
    }

    var vocabulary = texts
    if unitsAreBytes {
      // Whole words are only looked up where merges are ignored; else the single bytes are enough.
      vocabulary = TokenTable(capacity: options.ignoreMerges ? texts.count : 256)
      var bytes: [UInt8] = []
      for entry in 0..<texts.count where options.ignoreMerges || texts.bytes(entry: entry).count <= 2 {
        bytes.removeAll(keepingCapacity: true)
        if ByteAlphabet.append(texts.bytes(entry: entry), to: &bytes) {
          bytes.withUnsafeBufferPointer { vocabulary.insert($0, id: texts.id(entry: entry)) }
        }
      }
    }
    return .bytePair(BytePairEncoding(options: options, vocabulary: vocabulary, merges: pairs), texts: texts)
  }

  private func id(_ start: Int, _ end: Int) -> TokenID {
    mergeBytes.withUnsafeBufferPointer { bytes in
      bytes.baseAddress.map { texts.id($0 + start, end - start) } ?? -1
    }
  }
}
