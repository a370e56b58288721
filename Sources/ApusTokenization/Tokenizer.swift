public import ApusCore
import Synchronization

/// A tokenizer: text to token ids and back, equal to Hugging Face `tokenizers` for the same files.
///
/// Immutable once loaded and safe to use from any thread. Encoding keeps its working memory in a small pool, so concurrent
/// callers do not wait for each other.
public final class Tokenizer: Sendable {
  let addedTokens: [AddedToken]
  private let rawMatcher: AddedTokenMatcher
  private let normalizedMatcher: AddedTokenMatcher
  let normalizer: Normalizer?
  let preTokenizers: [PreTokenizer]
  let model: TokenModel
  let postProcessor: PostProcessor
  let decoder: TextDecoder
  private let vocabulary: DecodingTable
  /// By bytes: strings that only look the same are other tokens.
  private let idsOfAdded: [[UInt8]: TokenID]
  private let contentsOfAdded: [TokenID: String]
  private let pool = Mutex<[EncodingScratch]>([])
  /// Names and flags of special tokens, as the configuration files give them.
  public let specialTokens: SpecialTokens

  init(_ parts: TokenizerParts) throws(EngineError) {
    addedTokens = parts.addedTokens
    normalizer = parts.normalizer
    preTokenizers = parts.preTokenizers
    model = parts.model
    postProcessor = parts.postProcessor
    decoder = parts.decoder
    specialTokens = parts.specialTokens
    rawMatcher = AddedTokenMatcher(
      parts.addedTokens.filter { !$0.isNormalized }.map { (Array($0.content.utf8), $0) })
    var normalized: [(bytes: [UInt8], token: AddedToken)] = []
    for token in parts.addedTokens where token.isNormalized {
      var content = Array(token.content.utf8)
      var start = TextStart()
      try parts.normalizer?.apply(to: &content, start: &start)
      normalized.append((content, token))
    }
    normalizedMatcher = AddedTokenMatcher(normalized)
    vocabulary = DecodingTable(parts, normalizedContents: normalized.map { ($0.token.id, $0.bytes) })
    idsOfAdded = Dictionary(parts.addedTokens.map { (Array($0.content.utf8), $0.id) }, uniquingKeysWith: { $1 })
    contentsOfAdded = Dictionary(parts.addedTokens.map { ($0.id, $0.content) }, uniquingKeysWith: { $1 })
  }

  // MARK: Vocabulary

  /// One more than the greatest token id, added tokens included. Logits may have more columns than that.
  public var vocabularySize: Int { vocabulary.count }
  /// The id of the beginning-of-sequence token, if there is one.
  public var bosID: TokenID? { specialTokens.bos.flatMap(id(of:)) }
  /// The id of the end-of-sequence token, if there is one.
  public var eosID: TokenID? { specialTokens.eos.flatMap(id(of:)) }
  /// The id of the unknown token, if there is one.
  public var unknownID: TokenID? { specialTokens.unknown.flatMap(id(of:)) }
  /// The id of the padding token, if there is one.
  public var paddingID: TokenID? { specialTokens.padding.flatMap(id(of:)) }
  /// Whether encoding with special tokens starts with the beginning-of-sequence token.
  public var addsBOS: Bool { bosID.map { postProcessor.leadingToken == $0 } ?? false }
  /// Whether encoding with special tokens ends with the end-of-sequence token.
  public var addsEOS: Bool { eosID.map { postProcessor.trailingToken == $0 } ?? false }

  /// Whether a token is a control token, which `decode` leaves out on request.
  public func isSpecial(_ id: TokenID) -> Bool { vocabulary.entry(id)?.isSpecial ?? false }

  /// The texts of the control tokens, in the order of their ids.
  public var specialTokenTexts: [String] {
    contentsOfAdded.filter { isSpecial($0.key) }.sorted { $0.key < $1.key }.map(\.value)
  }

  /// The id of a token by its text as the vocabulary spells it (`Ġthe`, `▁the`, `<|im_end|>`).
  public func id(of text: String) -> TokenID? {
    let bytes = Array(text.utf8)
    return idsOfAdded[bytes] ?? model.id(of: bytes)
  }

  /// The text of a token as the vocabulary spells it, or `nil` for an id without a token.
  public func tokenText(_ id: TokenID) -> String? {
    if let added = contentsOfAdded[id] { return added }
    return model.texts.bytes(of: id).map { String(decoding: $0, as: UTF8.self) }
  }

  /// The bytes that a token stands for in the middle of a text; empty for an id without a token. They need not be
  /// well-formed UTF-8 by themselves. A control token stands for the bytes of its own name.
  public func tokenBytes(_ id: TokenID) -> [UInt8] {
    if let added = contentsOfAdded[id] { return Array(added.utf8) }
    guard let entry = vocabulary.entry(id) else { return [] }
    return vocabulary.withBytes(entry) { decoder.bytes(of: Array($0)) }
  }

  func decodingEntry(_ id: TokenID) -> DecodingTable.Entry? { vocabulary.entry(id) }

  @inline(__always)
  func withDecodingBytes(_ entry: DecodingTable.Entry, _ body: (Bytes) -> Void) { vocabulary.withBytes(entry, body) }

  // MARK: Encoding

  /// The ids of a text.
  ///
  /// Added tokens spelled out in the text become their ids, as transformers does it. With `addSpecialTokens` the ids are
  /// surrounded by what the tokenizer's post-processor adds. Throws only when the tokenizer itself cannot encode the text
  /// (an unknown character and no unknown token, or a pattern of the tokenizer that takes too many steps).
  public func encode(_ text: String, addSpecialTokens: Bool = true) throws(EngineError) -> [TokenID] {
    var text = text
    text.makeContiguousUTF8()
    // Native strings give their bytes in place; the closure cannot be left without a result.
    var result: Result<[TokenID], EngineError> = .success([])
    text.withUTF8 { utf8 in
      do throws(EngineError) {
        result = .success(try encodeValid(utf8, addSpecialTokens: addSpecialTokens))
      } catch {
        result = .failure(error)
      }
    }
    return try result.get()
  }

  /// The ids of a text given as bytes. Ill-formed UTF-8 is read as U+FFFD, one for every maximal ill-formed part.
  public func encode(bytes: UnsafeBufferPointer<UInt8>, addSpecialTokens: Bool = true) throws(EngineError)
    -> [TokenID]
  {
    if isValidUTF8(bytes) { return try encodeValid(bytes, addSpecialTokens: addSpecialTokens) }
    let repaired = repairedUTF8(bytes)
    return try repaired.withUnsafeBufferPointer { (utf8) throws(EngineError) in
      try encodeValid(utf8, addSpecialTokens: addSpecialTokens)
    }
  }

  /// The ids of a text given as bytes. Ill-formed UTF-8 is read as U+FFFD, one for every maximal ill-formed part.
  public func encode(bytes: [UInt8], addSpecialTokens: Bool = true) throws(EngineError) -> [TokenID] {
    try bytes.withUnsafeBufferPointer { (buffer) throws(EngineError) in
      try encode(bytes: buffer, addSpecialTokens: addSpecialTokens)
    }
  }

  /// The ids of a pair of texts, as cross-encoders take them, and the segment (`token_type_ids`) of each id.
  public func encode(_ first: String, pair second: String, addSpecialTokens: Bool = true) throws(EngineError)
    -> (ids: [TokenID], types: [Int32])
  {
    let left = try encode(first, addSpecialTokens: false)
    let right = try encode(second, addSpecialTokens: false)
    return (addSpecialTokens ? postProcessor : .none).apply(to: left, right)
  }

  private func encodeValid(_ text: Bytes, addSpecialTokens: Bool) throws(EngineError) -> [TokenID] {
    guard text.count < Int(Int32.max) / 4 else {
      throw EngineError(.promptTooLong, "A text of \(text.count) bytes is too long to encode in one piece")
    }
    var scratch = pool.withLock { $0.popLast() } ?? EncodingScratch()
    defer {
      if text.count <= EncodingScratch.keptTextLimit {
        pool.withLock { if $0.count < EncodingScratch.poolLimit { $0.append(scratch) } }
      }
    }
    var ids: [TokenID] = []
    ids.reserveCapacity(text.count / 3 + 4)
    if rawMatcher.isEmpty {
      if text.count > 0 { try encodeText(text, isFirst: true, into: &ids, scratch: &scratch) }
    } else {
      rawMatcher.segments(of: text, into: &scratch.segments)
      let segments = scratch.segments
      for segment in segments {
        if segment.id >= 0 {
          ids.append(segment.id)
        } else {
          try encodeText(
            Bytes(rebasing: text[segment.start..<segment.end]), isFirst: segment.start == 0, into: &ids,
            scratch: &scratch)
        }
      }
    }
    if addSpecialTokens { postProcessor.apply(to: &ids) }
    return ids
  }

  /// Encodes text between tokens found in the raw text.
  private func encodeText(
    _ text: Bytes, isFirst: Bool, into ids: inout [TokenID], scratch: inout EncodingScratch
  ) throws(EngineError) {
    scratch.list.removeAll()
    scratch.list.text.append(bytes: text)
    var start = TextStart()
    if let normalizer { try normalizer.apply(to: &scratch.list.text, start: &start) }
    if scratch.list.text.isEmpty { return }
    let isFirst = isFirst && !start.isMoved
    guard !normalizedMatcher.isEmpty else {
      scratch.list.pieces.append(
        PieceList.Piece(start: 0, end: Int32(truncatingIfNeeded: scratch.list.text.count), isFirst: isFirst))
      return try encodePieces(into: &ids, scratch: &scratch)
    }
    scratch.list.text.withUnsafeBufferPointer { normalizedMatcher.segments(of: $0, into: &scratch.segments) }
    if scratch.segments.count == 1, scratch.segments[0].id < 0 {
      scratch.list.pieces.append(
        PieceList.Piece(start: 0, end: Int32(truncatingIfNeeded: scratch.list.text.count), isFirst: isFirst))
      return try encodePieces(into: &ids, scratch: &scratch)
    }
    let whole = scratch.list.text
    let segments = scratch.segments
    for segment in segments {
      if segment.id >= 0 {
        ids.append(segment.id)
        continue
      }
      scratch.list.removeAll()
      scratch.list.text.append(contentsOf: whole[segment.start..<segment.end])
      scratch.list.pieces.append(
        PieceList.Piece(
          start: 0, end: Int32(truncatingIfNeeded: segment.end - segment.start), isFirst: isFirst && segment.start == 0)
      )
      try encodePieces(into: &ids, scratch: &scratch)
    }
  }

  /// Cuts `scratch.list` into words and encodes them.
  private func encodePieces(into ids: inout [TokenID], scratch: inout EncodingScratch) throws(EngineError) {
    for step in preTokenizers { try step.apply(to: &scratch.list, scratch: &scratch.splitting) }
    try model.encode(scratch.list, into: &ids, scratch: &scratch.model)
  }

  // MARK: Decoding

  /// The text of ids, equal to what `tokenizers` decodes. Ids without a token are left out.
  public func decode(_ ids: some Sequence<TokenID>, skipSpecialTokens: Bool = false) -> String {
    var state = DecoderState(decoder)
    for id in ids {
      guard let entry = vocabulary.entry(id) else { continue }
      if skipSpecialTokens, entry.isSpecial { continue }
      vocabulary.withBytes(entry) { state.append($0, entry) }
    }
    state.finish()
    return state.takeText()
  }
}

/// Which tokens play which part, as tokenizer_config.json and special_tokens_map.json say.
public struct SpecialTokens: Sendable, Equatable {
  /// Text of the beginning-of-sequence token.
  public var bos: String?
  /// Text of the end-of-sequence token.
  public var eos: String?
  /// Text of the unknown token.
  public var unknown: String?
  /// Text of the padding token.
  public var padding: String?
  /// Texts of further special tokens.
  public var additional: [String] = []

  /// Nothing known.
  public init() {}
}

/// Memory that encoding reuses from text to text.
struct EncodingScratch: Sendable {
  var list = PieceList()
  var segments: [AddedTokenMatcher.Segment] = []
  var splitting = PreTokenizer.Scratch()
  var model = TokenModel.Scratch()

  /// How many are kept per tokenizer.
  static let poolLimit = 8
  /// Buffers that grew for a text longer than this are let go.
  static let keptTextLimit = 1 << 20
}

/// What a loader gathers from files.
struct TokenizerParts {
  var addedTokens: [AddedToken] = []
  var normalizer: Normalizer?
  var preTokenizers: [PreTokenizer] = []
  var model: TokenModel
  var postProcessor = PostProcessor.none
  var decoder = TextDecoder(nil)
  var specialTokens = SpecialTokens()
  /// Whether the file has no post-processor, or one that only adjusts offsets.
  var lacksPostProcessor = false

  /// Whether the model is SentencePiece-style BPE, on characters with byte fallback.
  var isSentencePieceBytePair: Bool {
    if case .bytePair(let model, _) = model { !model.options.unitsAreBytes } else { false }
  }
}

/// A model of subwords.
enum TokenModel: Sendable {
  case bytePair(BytePairEncoding, texts: TokenTable)
  case wordPiece(WordPieceModel)
  case wordLevel(WordLevelModel)
  case unigram(UnigramModel)

  struct Scratch: Sendable {
    var bytePair = BytePairEncoding.Scratch()
    var unigram = UnigramModel.Scratch()
    var buffer: [UInt8] = []
  }

  /// The id of a token by its text in the vocabulary's own spelling.
  func id(of text: [UInt8]) -> TokenID? { texts.id(of: text) }

  /// Tokens as the vocabulary spells them.
  var texts: TokenTable {
    switch self {
    case .bytePair(_, let texts): texts
    case .wordPiece(let model): model.vocabulary
    case .wordLevel(let model): model.vocabulary
    case .unigram(let model): model.vocabulary
    }
  }

  var isBytePair: Bool { if case .bytePair = self { true } else { false } }

  /// Appends the ids of all pieces.
  func encode(_ list: PieceList, into ids: inout [TokenID], scratch: inout Scratch) throws(EngineError) {
    try list.text.withUnsafeBufferPointer { (text) throws(EngineError) in
      switch self {
      case .bytePair(let model, _):
        for piece in list.pieces {
          try model.encode(
            Bytes(rebasing: text[Int(piece.start)..<Int(piece.end)]), into: &ids, scratch: &scratch.bytePair)
        }
      case .wordPiece(let model):
        for piece in list.pieces {
          try model.encode(
            Bytes(rebasing: text[Int(piece.start)..<Int(piece.end)]), into: &ids, buffer: &scratch.buffer)
        }
      case .wordLevel(let model):
        for piece in list.pieces {
          try model.encode(Bytes(rebasing: text[Int(piece.start)..<Int(piece.end)]), into: &ids)
        }
      case .unigram(let model):
        for piece in list.pieces {
          try model.encode(
            Bytes(rebasing: text[Int(piece.start)..<Int(piece.end)]), into: &ids, scratch: &scratch.unigram)
        }
      }
    }
  }
}

/// Texts of all tokens by id, added tokens included, as far as decoding can prepare them.
struct DecodingTable: Sendable {
  /// Where the text of a token lies, and what it is.
  struct Entry: Sendable {
    fileprivate var start: UInt32
    fileprivate var length: UInt32
    var isSpecial: Bool
    /// Whether the text is `<0xHH>`, and for which byte.
    var isByte: Bool
    var byte: UInt8
  }

  private var arena: [UInt8] = []
  private var entries: [Entry] = []

  var count: Int { entries.count }

  /// `normalizedContents` are the texts under which added tokens are found in normalised text: decoding starts from those,
  /// so that decoders undo what normalizers did.
  init(_ parts: TokenizerParts, normalizedContents: [(TokenID, [UInt8])]) {
    let texts = parts.model.texts
    let decoder = parts.decoder
    let greatest = parts.addedTokens.map { Int($0.id) }.max() ?? -1
    let absent = Entry(start: .max, length: 0, isSpecial: false, isByte: false, byte: 0)
    entries = [Entry](repeating: absent, count: Swift.max(texts.idLimit, greatest + 1))
    arena.reserveCapacity(texts.arena.count)
    let isByteLevel: Bool = if case .byteLevel? = decoder.tokenSteps.first { true } else { false }
    for id in 0..<texts.idLimit {
      guard let text = texts.bytes(of: TokenID(id)) else { continue }
      let start = arena.count
      if decoder.preparedSteps == 0 {
        arena.append(bytes: text)
      } else if isByteLevel, decoder.preparedSteps == 1 {
        if !ByteAlphabet.append(text, to: &arena) { arena.append(bytes: text) }
      } else {
        arena.append(contentsOf: decoder.prepared(Array(text)))
      }
      finish(TokenID(id), start, isSpecial: false)
    }
    let normalized = Dictionary(normalizedContents, uniquingKeysWith: { $1 })
    for token in parts.addedTokens {
      let start = arena.count
      arena.append(contentsOf: decoder.prepared(normalized[token.id] ?? Array(token.content.utf8)))
      finish(token.id, start, isSpecial: token.isSpecial)
    }
  }

  private mutating func finish(_ id: TokenID, _ start: Int, isSpecial: Bool) {
    let length = arena.count - start
    let byte = length == 6 ? DecoderStep.byteValue(arena[start...]) : nil
    entries[Int(id)] = Entry(
      start: UInt32(truncatingIfNeeded: start), length: UInt32(truncatingIfNeeded: length), isSpecial: isSpecial,
      isByte: byte != nil, byte: byte ?? 0)
  }

  @inline(__always)
  func entry(_ id: TokenID) -> Entry? {
    guard id >= 0, Int(id) < entries.count else { return nil }
    let entry = entries[Int(id)]
    return entry.start == .max ? nil : entry
  }

  @inline(__always)
  func withBytes<Result>(_ entry: Entry, _ body: (Bytes) -> Result) -> Result {
    arena.withUnsafeBufferPointer { body(Bytes(start: $0.baseAddress! + Int(entry.start), count: Int(entry.length))) }
  }
}

extension TextDecoder {
  /// The bytes of one token in the middle of a text, from its text after the prepared steps.
  func bytes(of token: [UInt8]) -> [UInt8] {
    var result = token
    for step in tokenSteps[preparedSteps...] {
      switch step {
      case .byteFallback: if let byte = DecoderStep.byteValue(result) { return [byte] }
      case .endOfWord(let suffix): result = replacing(result, suffix, with: [0x20])
      default: result = step.applied(to: result, isFirst: false)
      }
    }
    for step in textSteps {
      // Joined steps change the ends of the text or span tokens; only plain substitutions have a meaning for one token.
      if case .replace = step { result = step.applied(to: result, isFirst: false) }
    }
    return result
  }
}
