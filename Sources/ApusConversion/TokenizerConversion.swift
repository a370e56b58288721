import ApusCore
import ApusModels
import ApusTokenization

/// Texts that tell tokenizers apart: words, digits, runs of spaces and line ends, scripts, marks and emoji.
let probeTexts: [String] = [
  "", " ", "  ", "\n", "\n\n", "\t\t x", "Hello, world!", " Hello  world   again",
  "I'll we've THEY'RE it's don't O'Neil",
  "1 12 123 1234 12345678 3.14159 1,000,000", "x=1+2*(3-4)/5;", "func f(_ a: [Int]) -> Int { return a[0] }\n\n\n  end",
  "if (a && b) {\r\n\treturn c;\r\n}", "ÄÖÜ äöü ß éèê naïve façade", "e\u{301}a\u{308} cafe\u{301}",
  "Привет, мир! Ёлка",
  "你好，世界。今天天气很好！", "日本語のテキスト、カタカナ。", "안녕하세요 세계", "مرحبا بالعالم", "שלום עולם", "สวัสดีชาวโลก",
  "🙂🙃 👩‍👩‍👧‍👦 🇩🇪 x", "don’t “quote” — dash… ½ ² ₃", "HTTPServer camelCase snake_case kebab-case", "   leading",
  "trailing   ", "a\u{A0}b\u{2003}c", "\u{0}\u{1}\u{7F}", "#include <stdio.h>\n#define X(a, b) a##b",
  "http://a.b/c?d=e&f=%20#g",
  "Once upon a time there was a little girl named Lily.", "ΑΒΓ αβγ", "a  b   c    d     e", "?!?!...,,,;;;",
  "'s 'S 'LL\n'",
  "A1b2C3 4d5e6f", "\n \n  \n   x", "zażółć gęślą jaźń", "हिन्दी में पाठ", "🏳️‍🌈🏴󠁧󠁢󠁥󠁮󠁧󠁿", "ﬁ ﬂ Ⅷ ①",
]

/// Whether two tokenizers give equal ids for texts that tell tokenizers apart; the first text for which they do not.
func firstDifference(_ first: Tokenizer, _ second: Tokenizer, _ texts: [String]) -> String? {
  texts.first { text in
    let left = try? first.encode(text)
    let right = try? second.encode(text)
    return left == nil || left != right
  }
}

/// A tokenizer as the metadata of a GGUF file.
struct TokenizerMetadata {
  /// The format's numbers for kinds of tokens.
  enum Kind {
    static let normal: Int32 = 1
    static let unknown: Int32 = 2
    static let control: Int32 = 3
    static let userDefined: Int32 = 4
    static let unused: Int32 = 5
    static let byte: Int32 = 6
  }

  var model = ""
  var pre = "default"
  var tokens: [[UInt8]] = []
  var kinds: [Int32] = []
  var scores: [Float] = []
  var merges: [[UInt8]] = []
  var ids: [(String, Int)] = []
  var addsBOS = false
  var addsEOS = false
  var addsSpacePrefix: Bool?
  var templates: [String: String] = [:]
  /// What could not be carried over, in sentences.
  var notes: [String] = []

  func write(to metadata: inout GGUFMetadataWriter) {
    metadata.set("tokenizer.ggml.model", text: model)
    metadata.set("tokenizer.ggml.pre", text: pre)
    metadata.set("tokenizer.ggml.tokens", texts: tokens)
    if !scores.isEmpty { metadata.set("tokenizer.ggml.scores", numbers: scores) }
    metadata.set("tokenizer.ggml.token_type", integers: kinds)
    if model == "gpt2" { metadata.set("tokenizer.ggml.merges", texts: merges) }
    for (name, id) in ids { metadata.set("tokenizer.ggml.\(name)_token_id", size: id) }
    metadata.set("tokenizer.ggml.add_bos_token", flag: addsBOS)
    metadata.set("tokenizer.ggml.add_eos_token", flag: addsEOS)
    if let addsSpacePrefix { metadata.set("tokenizer.ggml.add_space_prefix", flag: addsSpacePrefix) }
    let others = templates.keys.filter { $0 != "default" }.sorted()
    if let text = templates["default"] { metadata.set("tokenizer.chat_template", text: text) }
    if !others.isEmpty {
      metadata.set("tokenizer.chat_templates", texts: others.map { Array($0.utf8) })
      for name in others { metadata.set("tokenizer.chat_template.\(name)", text: templates[name]!) }
    }
  }

  /// Reads the tokenizer of a checkpoint directory, and checks that the metadata give the same ids.
  /// - Parameters:
  ///   - vocabularySize: rows of the embedding table; as many tokens are written.
  ///   - ends: end-of-sequence tokens as the model's configuration has them.
  /// - Throws: `unsupported` if the format cannot express the tokenizer.
  init(directory: String, vocabularySize: Int, ends: [TokenID]) throws(EngineError) {
    func refuse(_ sentence: String) -> EngineError {
      EngineError(.unsupported, "\(directory): the tokenizer cannot be written into a GGUF file: \(sentence).")
    }
    let tokenizer = try Tokenizer.load(directory: directory)
    guard tokenizer.vocabularySize <= vocabularySize else {
      throw refuse(
        "it has \(tokenizer.vocabularySize) tokens, but the model only \(vocabularySize) rows of embeddings")
    }
    let source = try Self.source(directory, refuse)
    let added = tokenizer.addedIDs
    for id in 0..<vocabularySize {
      let token = TokenID(id)
      guard let text = id < tokenizer.vocabularySize ? tokenizer.tokenText(token) : nil else {
        tokens.append(Array("[PAD\(id)]".utf8))
        kinds.append(Kind.unused)
        continue
      }
      tokens.append(Array(text.utf8))
      kinds.append(
        !added.contains(token)
          ? Kind.normal : tokenizer.isSpecial(token) ? Kind.control : Kind.userDefined)
    }
    for (name, id) in [
      ("bos", tokenizer.bosID), ("eos", tokenizer.eosID ?? ends.first { added.contains($0) }),
      ("unknown", tokenizer.unknownID),
      ("padding", tokenizer.paddingID),
    ] {
      if let id, id >= 0, Int(id) < vocabularySize { ids.append((name, Int(id))) }
    }
    if let eos = tokenizer.eosID, let other = ends.first(where: { $0 != eos && added.contains($0) }) {
      ids.append(("eot", Int(other)))
    }
    addsBOS = tokenizer.addsBOS
    addsEOS = tokenizer.addsEOS
    templates = try ChatTemplateSet.sources(directory: directory)

    var candidates: [TokenizerMetadata] = []
    switch source {
    case .byteLevel(let pairs, let patterns):
      model = "gpt2"
      merges = pairs.map { $0 + [0x20] + $1 }
      // Names with the file's own patterns are tried first: few texts may tell the kinds of a small vocabulary apart.
      let own = Tokenizer.byteLevelNames.filter { name in
        let sections = try? Tokenizer.byteLevelSections(pre: name, file: directory).sections
        return sections?["pre_tokenizer"].map { Self.patterns($0) == patterns } ?? false
      }
      for name in own + Tokenizer.byteLevelNames.filter({ !own.contains($0) }) {
        var candidate = self
        candidate.pre = name
        candidates.append(candidate)
      }
    case .pieces(let pieces, let pairs):
      model = "llama"
      for id in tokens.indices where kinds[id] == Kind.normal && Self.isByte(tokens[id]) { kinds[id] = Kind.byte }
      if let unknown = tokenizer.unknownID, Int(unknown) < kinds.count { kinds[Int(unknown)] = Kind.unknown }
      if let pieces, pieces.count <= tokens.count, zip(pieces, tokens).allSatisfy({ $0.text == $1 || $0.kind != 1 }) {
        scores = pieces.map(\.score) + [Float](repeating: 0, count: tokens.count - pieces.count)
      } else if let pairs {
        scores = try scores(of: pairs, refuse)
      } else {
        throw refuse("tokenizer.model does not hold the tokens that the tokenizer has")
      }
      for prefix in [true, false] {
        var candidate = self
        candidate.addsSpacePrefix = prefix
        candidates.append(candidate)
      }
    }
    var difference: String?
    for candidate in candidates {
      var metadata = GGUFMetadataWriter()
      candidate.write(to: &metadata)
      let header = metadata.header(tensorCount: 0)
      guard let rebuilt = try? Tokenizer(gguf: header, name: "the metadata") else { continue }
      if let text = firstDifference(tokenizer, rebuilt, probeTexts) {
        difference = difference ?? text
        continue
      }
      self = candidate
      let names = added.sorted().prefix(64).compactMap { tokenizer.tokenText($0) }.filter { !$0.isEmpty }
      if let text = firstDifference(tokenizer, rebuilt, names.flatMap { ["x\($0)y", "x \($0) y", "\($0)\n\($0)"] }) {
        notes.append(
          "Text around the special tokens is cut otherwise than by the checkpoint's own tokenizer, since a GGUF file "
            + "has no place for how they treat it (lstrip, rstrip, normalized); the first example is "
            + "\(text.debugDescription).")
      }
      return
    }
    throw refuse(
      "none of the kinds that the format names gives its ids"
        + (difference.map { "; the nearest differs for the text \($0.debugDescription)" } ?? ""))
  }

  /// Where merges or scores come from.
  private enum Source {
    case byteLevel(merges: [([UInt8], [UInt8])], patterns: [String])
    case pieces([Tokenizer.Piece]?, merges: [([UInt8], [UInt8])]?)
  }

  private static func source(_ directory: String, _ refuse: (String) -> EngineError) throws(EngineError) -> Source {
    let pieces =
      fileKind("\(directory)/tokenizer.model") == .file
      ? try Tokenizer.pieces(file: "\(directory)/tokenizer.model") : nil
    let path = "\(directory)/tokenizer.json"
    guard let bytes = try readSmallFile(path, limit: 1 << 28) else {
      if let pieces { return .pieces(pieces, merges: nil) }
      guard let text = try readSmallFile("\(directory)/merges.txt", limit: 1 << 28) else {
        throw refuse("there is neither a tokenizer.json, nor a SentencePiece model that merges pairs, nor a merges.txt")
      }
      var pairs: [([UInt8], [UInt8])] = []
      for line in text.split(whereSeparator: { $0 == 0x0A || $0 == 0x0D }) where !line.starts(with: "#version".utf8) {
        guard let space = line.dropFirst().firstIndex(of: 0x20) else { continue }
        pairs.append((Array(line[..<space]), Array(line[(space + 1)...])))
      }
      return .byteLevel(merges: pairs, patterns: [])
    }
    let json: JSONValue
    do { json = try JSONValue.parse(bytes) } catch { throw EngineError(.invalidCheckpoint, "\(path): \(error).") }
    guard let model = json["model"], model["merges"] != nil || model["type"]?.stringValue == "BPE" else {
      throw refuse(
        "its model is \(json["model"]?["type"]?.stringValue ?? "unknown"); byte pair encoding can be written")
    }
    var pairs: [([UInt8], [UInt8])] = []
    for (index, merge) in (model["merges"]?.arrayValue ?? []).enumerated() {
      if let list = merge.arrayValue, list.count == 2, let left = list[0].stringValue, let right = list[1].stringValue {
        pairs.append((Array(left.utf8), Array(right.utf8)))
      } else if let text = merge.stringValue.map({ Array($0.utf8) }), let space = text.dropFirst().firstIndex(of: 0x20)
      {
        pairs.append((Array(text[..<space]), Array(text[(space + 1)...])))
      } else {
        throw EngineError(.invalidCheckpoint, "\(path): merge \(index) does not have two parts.")
      }
    }
    func names(_ value: JSONValue?) -> [String] {
      guard let value else { return [] }
      let inner = ["pretokenizers", "decoders", "normalizers"].flatMap { value[$0]?.arrayValue ?? [] }
      return [value["type"]?.stringValue].compactMap(\.self) + inner.flatMap { names($0) }
    }
    if (names(json["pre_tokenizer"]) + names(json["normalizer"]) + names(json["decoder"])).contains("ByteLevel") {
      return .byteLevel(merges: pairs, patterns: json["pre_tokenizer"].map { patterns($0) } ?? [])
    }
    guard model["byte_fallback"]?.boolValue == true else {
      throw refuse("it neither works on bytes nor falls back to them")
    }
    return .pieces(pieces, merges: pairs)
  }

  /// The regular expressions in a section of a `tokenizer.json`, in order.
  private static func patterns(_ value: JSONValue) -> [String] {
    if let text = value["pattern"]?["Regex"]?.stringValue { return [text] }
    return (value["pretokenizers"]?.arrayValue ?? []).flatMap { patterns($0) }
  }

  private static func isByte(_ text: [UInt8]) -> Bool {
    let hexadecimal = Set("0123456789ABCDEF".utf8)
    return text.count == 6 && text.starts(with: "<0x".utf8) && text[5] == UInt8(ascii: ">")
      && hexadecimal.contains(text[3]) && hexadecimal.contains(text[4])
  }

  /// Scores that give the order of the merges: a SentencePiece model joins the pair whose result has the highest score.
  private func scores(
    of pairs: [([UInt8], [UInt8])], _ refuse: (String) -> EngineError
  ) throws(EngineError) -> [Float] {
    var ids: [[UInt8]: Int] = [:]
    for (id, token) in tokens.enumerated() { ids[token] = id }
    var scores = [Float](repeating: 0, count: tokens.count)
    var ranks: [Int: Int] = [:]
    var last = -1
    for (rank, pair) in pairs.enumerated() {
      guard let id = ids[pair.0 + pair.1] else {
        throw refuse("merge \(rank) makes what is no token")
      }
      // All ways to make a piece have to stand together, since they share its score.
      guard id == last || ranks[id] == nil else {
        throw refuse(
          "its merges are in an order that no scores of pieces give (\(String(decoding: tokens[id], as: UTF8.self)))")
      }
      if ranks[id] == nil { ranks[id] = ranks.count }
      last = id
    }
    for id in tokens.indices where kinds[id] == Kind.normal {
      // Characters are never the result of a merge; they come last.
      scores[id] = -Float(ranks[id] ?? ranks.count + id)
    }
    return scores
  }
}

/// The tokenizer of a GGUF file as the files of a Hugging Face directory.
struct TokenizerFiles {
  /// Contents by name, `tokenizer.json` among them if it could be written.
  var files: [(name: String, bytes: [UInt8])] = []
  var notes: [String] = []

  /// Reads the metadata of a GGUF model.
  /// - Throws: `invalidCheckpoint` if they are broken. What cannot be expressed is a note.
  init(_ model: GGUFModelFiles, contextLength: Int) throws(EngineError) {
    let header = model.headers[0]
    let bytes = model.files[0].bytes
    for (key, value) in header.metadata.sorted(by: { $0.key < $1.key }) {
      guard let text = value.stringValue else { continue }
      if key == "tokenizer.chat_template" {
        files.append(("chat_template.jinja", Array(text.utf8)))
      } else if key.hasPrefix("tokenizer.chat_template.") {
        let name = key.dropFirst("tokenizer.chat_template.".count)
        guard !name.isEmpty, name.utf8.count < 100, !name.contains("/"), !name.hasPrefix(".") else { continue }
        files.append(("\(templateFolder)/\(name).jinja", Array(text.utf8)))
      }
    }
    guard header.metadata["tokenizer.ggml.model"] != nil else {
      notes.append(
        "No tokenizer is written, since the GGUF file has none; name one with --tokenizer-path when serving.")
      return
    }
    do throws(EngineError) {
      let original = try Tokenizer.load(file: header.path)
      let json = try Self.tokenizerJSON(header, bytes, original)
      let rebuilt = try Tokenizer(json: json, name: "tokenizer.json")
      if let text = firstDifference(original, rebuilt, probeTexts) {
        throw EngineError(
          .unsupported, "a tokenizer.json of its tokens would give other ids, as for the text \(text.debugDescription)")
      }
      files.append(("tokenizer.json", json))
      files.append(("tokenizer_config.json", Self.configuration(original, contextLength: contextLength)))
    } catch {
      notes.append(
        "No tokenizer.json is written: \(error.message). Serve the result with --tokenizer-path \(header.path).")
    }
  }

  private static func configuration(_ tokenizer: Tokenizer, contextLength: Int) -> [UInt8] {
    var writer = JSONWriter()
    writer.object { writer in
      writer.member("tokenizer_class", "PreTrainedTokenizerFast")
      writer.member("model_max_length", contextLength)
      writer.member("clean_up_tokenization_spaces", false)
      writer.member("add_bos_token", tokenizer.addsBOS)
      writer.member("add_eos_token", tokenizer.addsEOS)
      for (key, text) in [
        ("bos_token", tokenizer.specialTokens.bos), ("eos_token", tokenizer.specialTokens.eos),
        ("unk_token", tokenizer.specialTokens.unknown), ("pad_token", tokenizer.specialTokens.padding),
      ] {
        if let text { writer.member(key, text) }
      }
    }
    return writer.bytes
  }

  private static func tokenizerJSON(
    _ header: GGUFHeader, _ bytes: UnsafeRawBufferPointer, _ tokenizer: Tokenizer
  ) throws(EngineError) -> [UInt8] {
    typealias Kind = TokenizerMetadata.Kind
    let model = header.metadata["tokenizer.ggml.model"]?.stringValue ?? ""
    guard model == "gpt2" || model == "llama" else {
      throw EngineError(.unsupported, "a tokenizer of the kind \"\(model)\" cannot be written as one")
    }
    var tokens: [[UInt8]] = []
    try header.forEachText("tokenizer.ggml.tokens", in: bytes) { (text) throws(EngineError) in
      tokens.append(Array(text))
    }
    let numbers = try header.numbers("tokenizer.ggml.token_type", in: bytes) ?? []
    let kinds = tokens.indices.map { $0 < numbers.count ? Int32(exactly: numbers[$0]) ?? 0 : Kind.normal }
    // Rows of padding at the end are no tokens.
    let count = (kinds.lastIndex { $0 != Kind.unused } ?? tokens.count - 1) + 1

    var merges: [([UInt8], [UInt8])] = []
    var sections: [String: JSONValue] = [:]
    var takesWords = false
    if model == "gpt2" {
      (sections, takesWords) = try Tokenizer.byteLevelSections(
        pre: header.metadata["tokenizer.ggml.pre"]?.stringValue ?? "default", file: header.path)
      try header.forEachText("tokenizer.ggml.merges", in: bytes) { (text) throws(EngineError) in
        // A space may be a part's first character, never a later one.
        guard let space = text.dropFirst().firstIndex(of: 0x20) else {
          throw EngineError(.invalidCheckpoint, "\(header.path): a merge does not have two parts")
        }
        merges.append((Array(text[..<space]), Array(text[(space + 1)...])))
      }
    } else {
      let scores = try header.numbers("tokenizer.ggml.scores", in: bytes) ?? []
      guard scores.count == tokens.count else {
        throw EngineError(.invalidCheckpoint, "\(header.path): tokens and scores differ in number")
      }
      merges = Self.merges(tokens, kinds, scores)
      let prefix = header.metadata["tokenizer.ggml.add_space_prefix"]?.boolValue ?? true
      let replace: JSONValue = ["type": "Replace", "pattern": ["String": " "], "content": "▁"]
      let steps: [JSONValue] = (prefix ? [["type": "Prepend", "prepend": "▁"]] : []) + [replace]
      sections["normalizer"] = ["type": "Sequence", "normalizers": .array(steps)]
      let strip: [JSONValue] = prefix ? [["type": "Strip", "content": " ", "start": 1, "stop": 0]] : []
      sections["decoder"] = [
        "type": "Sequence",
        "decoders": .array(
          [
            ["type": "Replace", "pattern": ["String": "▁"], "content": " "], ["type": "ByteFallback"],
            ["type": "Fuse"],
          ] + strip),
      ]
    }
    if sections["decoder"] == ["type": "ByteLevel"] {
      sections["decoder"] = ["type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true]
    }

    func text(_ id: Int) -> String { String(decoding: tokens[id], as: UTF8.self) }
    var writer = JSONWriter(capacity: 1 << 20)
    writer.object { writer in
      writer.member("version", "1.0")
      for key in ["truncation", "padding"] {
        writer.key(key)
        writer.null()
      }
      writer.key("added_tokens")
      writer.array { writer in
        for id in 0..<count
        where [Kind.control, Kind.userDefined, Kind.unknown].contains(kinds[id]) && !tokens[id].isEmpty {
          writer.object { writer in
            writer.member("id", id)
            writer.member("content", text(id))
            for key in ["single_word", "lstrip", "rstrip", "normalized"] { writer.member(key, false) }
            writer.member("special", kinds[id] != Kind.userDefined)
          }
        }
      }
      for key in ["normalizer", "pre_tokenizer"] { writer.member(key, sections[key] ?? .null) }
      writer.member("post_processor", postProcessor(tokenizer, isByteLevel: model == "gpt2"))
      writer.member("decoder", sections["decoder"] ?? .null)
      writer.key("model")
      writer.object { writer in
        writer.member("type", "BPE")
        writer.member("dropout", .null)
        writer.member(
          "unk_token", model == "llama" ? tokenizer.specialTokens.unknown.map { .string($0) } ?? .null : .null)
        writer.member("continuing_subword_prefix", .null)
        writer.member("end_of_word_suffix", .null)
        writer.member("fuse_unk", model == "llama")
        writer.member("byte_fallback", model == "llama" && kinds.contains(Kind.byte))
        writer.member("ignore_merges", takesWords)
        writer.key("vocab")
        writer.object { writer in for id in 0..<count { writer.member(text(id), id) } }
        writer.key("merges")
        writer.array { writer in
          for (left, right) in merges {
            writer.array { writer in
              writer.value(String(decoding: left, as: UTF8.self))
              writer.value(String(decoding: right, as: UTF8.self))
            }
          }
        }
      }
    }
    return writer.bytes
  }

  /// All ways to put a piece together from two, those with the highest scores first, as transformers derives merges from a
  /// SentencePiece model.
  private static func merges(
    _ tokens: [[UInt8]], _ kinds: [Int32], _ scores: [Double]
  ) -> [([UInt8], [UInt8])] {
    typealias Kind = TokenizerMetadata.Kind
    var ids: [[UInt8]: Int] = [:]
    for id in tokens.indices where [Kind.normal, Kind.userDefined, Kind.unused].contains(kinds[id]) {
      ids[tokens[id]] = id
    }
    var merges: [([UInt8], [UInt8])] = []
    for id in ids.values.sorted(by: { (scores[$1], $0) < (scores[$0], $1) }) {
      let token = tokens[id]
      var own: [(Int, Int)] = []
      for cut in 1..<max(token.count, 1) {
        // Between characters only.
        guard token[cut] & 0xC0 != 0x80, let left = ids[Array(token[..<cut])], let right = ids[Array(token[cut...])]
        else { continue }
        own.append((left, right))
      }
      for (left, right) in own.sorted(by: <) { merges.append((tokens[left], tokens[right])) }
    }
    return merges
  }

  private static func postProcessor(_ tokenizer: Tokenizer, isByteLevel: Bool) -> JSONValue {
    let bos = tokenizer.addsBOS ? tokenizer.specialTokens.bos : nil
    let eos = tokenizer.addsEOS ? tokenizer.specialTokens.eos : nil
    guard bos != nil || eos != nil else {
      return isByteLevel
        ? ["type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true] : .null
    }
    func special(_ name: String?, _ type: Int64) -> [JSONValue] {
      name.map { [["SpecialToken": ["id": .string($0), "type_id": .int(type)]]] } ?? []
    }
    func text(_ name: JSONValue, _ type: Int64) -> [JSONValue] {
      [["Sequence": ["id": name, "type_id": .int(type)]]]
    }
    var specials = JSONObject()
    for name in [bos, eos] {
      guard let name, let id = tokenizer.id(of: name) else { continue }
      specials[name] = ["id": .string(name), "ids": [.int(Int64(id))], "tokens": [.string(name)]]
    }
    let single = special(bos, 0) + text("A", 0) + special(eos, 0)
    return [
      "type": "TemplateProcessing", "single": .array(single),
      "pair": .array(single + special(bos, 1) + text("B", 1) + special(eos, 1)), "special_tokens": .object(specials),
    ]
  }
}
