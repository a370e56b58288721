import ApusCore

/// Reads tiktoken rank files: one token a line, its bytes in base 64 and its rank.
struct TiktokenFile {
  /// Tokens by rank; ranks may have gaps.
  private(set) var tokens: [(bytes: [UInt8], rank: Int)] = []
  private let file: String

  init(_ bytes: Bytes, file: String) throws(EngineError) {
    self.file = file
    var lineNumber = 0
    for line in bytes.split(separator: 0x0A) {
      lineNumber += 1
      let line = line.last == 0x0D ? line.dropLast() : line
      if line.isEmpty { continue }
      guard let space = line.firstIndex(of: 0x20), let token = Base64.decode(line[..<space]),
        let rank = Int(String(decoding: line[(space + 1)...], as: UTF8.self)), rank >= 0, rank < 1 << 24, !token.isEmpty
      else {
        throw EngineError(.invalidCheckpoint, "\(file): line \(lineNumber) is not a token in base 64 and its rank")
      }
      tokens.append((token, rank))
    }
    if tokens.isEmpty { throw EngineError(.invalidCheckpoint, "\(file) holds no tokens") }
  }

  /// What a family of tiktoken models adds to its ranks.
  private struct Family {
    var pattern: String
    var special: [(String, Int)]
    var bos: String?
    var eos: String?
  }

  /// The family by the number of ranks. Files do not say which pattern goes with them.
  private func family() -> Family {
    let llama3 = Patterns.cl100k(digits: "{1,3}")
    switch tokens.count {
    case 50256, 50257:
      return Family(
        pattern: Patterns.gpt2,
        special: [("<|endoftext|>", 50256)], bos: "<|endoftext|>", eos: "<|endoftext|>")
    case 100256:
      return Family(
        pattern:
          #"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"#,
        special: [
          ("<|endoftext|>", 100257), ("<|fim_prefix|>", 100258), ("<|fim_middle|>", 100259), ("<|fim_suffix|>", 100260),
          ("<|endofprompt|>", 100276),
        ], bos: nil, eos: "<|endoftext|>")
    case 128000:
      let named = [
        0: "<|begin_of_text|>", 1: "<|end_of_text|>", 2: "<|reserved_special_token_0|>",
        3: "<|reserved_special_token_1|>", 4: "<|finetune_right_pad_id|>", 5: "<|reserved_special_token_2|>",
        6: "<|start_header_id|>", 7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
      ]
      let special = (0..<256).map { (named[$0] ?? "<|reserved_special_token_\($0 - 8)|>", 128000 + $0) }
      return Family(pattern: llama3, special: special, bos: "<|begin_of_text|>", eos: "<|end_of_text|>")
    case 151643:
      var special = [("<|endoftext|>", 151643), ("<|im_start|>", 151644), ("<|im_end|>", 151645)]
      special += (0..<205).map { ("<|extra_\($0)|>", 151646 + $0) }
      return Family(
        pattern: Patterns.cl100k(digits: ""),
        special: special, bos: nil, eos: "<|endoftext|>")
    case 163584:
      return Family(
        pattern: Patterns.kimi, special: [("[BOS]", 163584), ("[EOS]", 163585)], bos: "[BOS]", eos: "[EOS]")
    case 199998:
      return Family(
        pattern: Patterns.o200k, special: [("<|endoftext|>", 199999), ("<|endofprompt|>", 200018)], bos: nil,
        eos: "<|endoftext|>")
    default:
      return Family(pattern: llama3, special: [], bos: nil, eos: nil)
    }
  }

  /// The tokenizer. A pattern given replaces the family's.
  func parts(pattern: String? = nil) throws(EngineError) -> TokenizerParts {
    let family = family()
    let texts = TokenTable(capacity: tokens.count)
    let vocabulary = TokenTable(capacity: tokens.count)
    var text: [UInt8] = []
    for token in tokens {
      text.removeAll(keepingCapacity: true)
      token.bytes.withUnsafeBufferPointer { bytes in
        ByteAlphabet.encode(bytes, to: &text)
        vocabulary.insert(bytes, id: TokenID(token.rank))
      }
      text.withUnsafeBufferPointer { texts.insert($0, id: TokenID(token.rank)) }
    }
    try texts.seal(file)
    for byte in 0..<256 where vocabulary.id(of: [UInt8(byte)]) == nil {
      throw EngineError(.invalidCheckpoint, "\(file): the byte \(byte) has no token")
    }
    var options = BytePairEncoding.Options()
    options.unitsAreBytes = true
    // Words that are tokens are taken whole, as tiktoken does.
    options.ignoreMerges = true
    let order = tokens.sorted { $0.rank < $1.rank }.map { (id: $0.rank, text: $0.bytes) }
    let merges = MergeTable.allSplits(of: order, in: vocabulary, characters: false)
    let model = BytePairEncoding(options: options, vocabulary: vocabulary, merges: merges)
    var parts = TokenizerParts(model: .bytePair(model, texts: texts))
    let source = pattern ?? family.pattern
    if let scanner = WordScanner(pattern: source) {
      parts.preTokenizers = [.split(.scanner(scanner), .isolated, inverts: false)]
    } else {
      parts.preTokenizers = [.split(.pattern(try Pattern(source, syntax: .oniguruma)), .isolated, inverts: false)]
    }
    parts.decoder = TextDecoder([.byteLevel])
    for (content, id) in family.special {
      var token = AddedToken(content: content, id: TokenID(id))
      token.isSpecial = true
      parts.addedTokens.append(token)
    }
    parts.specialTokens.bos = family.bos
    parts.specialTokens.eos = family.eos
    return parts
  }

  /// Whether a file starts like a rank file: base 64, a space, a number.
  static func matches(_ bytes: Bytes) -> Bool {
    let line = bytes.prefix(512).prefix { $0 != 0x0A }
    guard line.count < 512, let space = line.firstIndex(of: 0x20), space > 0 else { return false }
    return Base64.decode(line[..<space]) != nil
      && line[(space + 1)...].allSatisfy { $0 >= 0x30 && $0 <= 0x39 || $0 == 0x0D }
  }
}

/// Base 64 with padding (RFC 4648).
enum Base64 {
  /// The bytes a text stands for, or `nil` if it is not base 64.
  static func decode(_ text: some Sequence<UInt8>) -> [UInt8]? {
    var result: [UInt8] = []
    var bits: UInt32 = 0
    var count = 0
    var padding = 0
    for byte in text {
      let value: UInt32
      switch byte {
      case 0x41...0x5A: value = UInt32(byte - 0x41)
      case 0x61...0x7A: value = UInt32(byte - 0x61 + 26)
      case 0x30...0x39: value = UInt32(byte - 0x30 + 52)
      case UInt8(ascii: "+"): value = 62
      case UInt8(ascii: "/"): value = 63
      case UInt8(ascii: "="):
        padding += 1
        continue
      default: return nil
      }
      if padding > 0 { return nil }
      bits = bits << 6 | value
      count += 1
      if count == 4 {
        result.append(UInt8(truncatingIfNeeded: bits >> 16))
        result.append(UInt8(truncatingIfNeeded: bits >> 8))
        result.append(UInt8(truncatingIfNeeded: bits))
        bits = 0
        count = 0
      }
    }
    switch count {
    case 0: break
    case 2: result.append(UInt8(truncatingIfNeeded: bits >> 4))
    case 3:
      result.append(UInt8(truncatingIfNeeded: bits >> 10))
      result.append(UInt8(truncatingIfNeeded: bits >> 2))
    default: return nil
    }
    return result
  }
}
