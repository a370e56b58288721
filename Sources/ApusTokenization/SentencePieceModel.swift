import ApusCore

/// Reads a SentencePiece `tokenizer.model`: a protocol-buffer message with pieces, a trainer part and a normaliser part.
struct SentencePieceModel {
  /// Kinds of pieces, as the format numbers them.
  enum PieceKind: Int { case normal = 1, unknown, control, userDefined, unused, byte }

  struct Piece {
    var text: [UInt8]
    var score: Float
    var kind: PieceKind
  }

  private(set) var pieces: [Piece] = []
  private(set) var isUnigram = true
  private(set) var fallsBackToBytes = false
  private(set) var bos = 1
  private(set) var eos = 2
  private(set) var padding = -1
  var characterMap: [UInt8] = []
  var addsDummyPrefix = true
  var removesExtraSpaces = true
  private(set) var escapesSpaces = true
  /// Whether spaces belong to the word before them, and the one added belongs to the end.
  private(set) var spacesAreSuffixes = false
  /// Whether user-defined pieces are found before the text is normalised, as llama.cpp finds them, and not by the
  /// normaliser and the model, as SentencePiece does.
  private let findsUserDefinedFirst: Bool
  private let file: String

  /// Makes a model of pieces read elsewhere.
  init(pieces: [Piece], isUnigram: Bool, fallsBackToBytes: Bool, file: String) {
    self.pieces = pieces
    self.isUnigram = isUnigram
    self.fallsBackToBytes = fallsBackToBytes
    self.file = file
    findsUserDefinedFirst = true
    (bos, eos) = (-1, -1)
  }

  /// Reads a file.
  init(_ bytes: Bytes, file: String) throws(EngineError) {
    self.file = file
    findsUserDefinedFirst = false
    var reader = ProtocolBufferReader(bytes, file: file)
    while let field = try reader.next() {
      switch (field.number, field.value) {
      case (1, .bytes(let message)): pieces.append(try Self.piece(message, file))
      case (2, .bytes(let message)): try readTrainer(message)
      case (3, .bytes(let message)): try readNormalizer(message)
      default: break
      }
    }
    if pieces.isEmpty { throw EngineError(.invalidCheckpoint, "\(file) holds no pieces: it is no SentencePiece model") }
  }

  private static func piece(_ message: Bytes, _ file: String) throws(EngineError) -> Piece {
    var piece = Piece(text: [], score: 0, kind: .normal)
    var reader = ProtocolBufferReader(message, file: file)
    while let field = try reader.next() {
      switch (field.number, field.value) {
      case (1, .bytes(let text)):
        guard isValidUTF8(text) else { throw EngineError(.invalidCheckpoint, "\(file): a piece is not valid UTF-8") }
        piece.text = Array(text)
      case (2, .fixed32(let bits)): piece.score = Float(bitPattern: bits)
      case (3, .varint(let kind)): piece.kind = PieceKind(rawValue: Int(truncatingIfNeeded: kind)) ?? .normal
      default: break
      }
    }
    guard piece.score.isFinite else { throw EngineError(.invalidCheckpoint, "\(file): a piece has no finite score") }
    return piece
  }

  private mutating func readTrainer(_ message: Bytes) throws(EngineError) {
    var reader = ProtocolBufferReader(message, file: file)
    while let field = try reader.next() {
      guard case .varint(let value) = field.value else { continue }
      let number = Int(Int32(truncatingIfNeeded: value))
      switch field.number {
      case 3:
        guard number == 1 || number == 2 else {
          throw EngineError(.unsupported, "\(file): only BPE and Unigram SentencePiece models are supported")
        }
        isUnigram = number == 1
      case 24: spacesAreSuffixes = value != 0
      case 35: fallsBackToBytes = value != 0
      case 41: bos = number
      case 42: eos = number
      case 43: padding = number
      default: break
      }
    }
  }

  private mutating func readNormalizer(_ message: Bytes) throws(EngineError) {
    var reader = ProtocolBufferReader(message, file: file)
    while let field = try reader.next() {
      switch (field.number, field.value) {
      case (2, .bytes(let map)): characterMap = Array(map)
      case (3, .varint(let value)): addsDummyPrefix = value != 0
      case (4, .varint(let value)): removesExtraSpaces = value != 0
      case (5, .varint(let value)): escapesSpaces = value != 0
      default: break
      }
    }
  }

  /// The tokenizer of the model, with control and user-defined pieces as added tokens.
  func parts() throws(EngineError) -> TokenizerParts {
    let texts = TokenTable(capacity: pieces.count)
    for (id, piece) in pieces.enumerated() { piece.text.withUnsafeBufferPointer { texts.insert($0, id: TokenID(id)) } }
    guard texts.count == pieces.count else { throw EngineError(.invalidCheckpoint, "\(file): a piece occurs twice") }
    try texts.seal(file)
    let unknown = pieces.firstIndex { $0.kind == .unknown }.map { TokenID($0) }
    // Only what text can become takes part in cutting it: not control pieces and not the bytes' names.
    let usable = pieces.indices.filter { [.normal, .userDefined, .unused].contains(pieces[$0].kind) }
    let userDefined = findsUserDefinedFirst ? [] : pieces.indices.filter { pieces[$0].kind == .userDefined }
    let model: TokenModel
    if isUnigram {
      let matchable = TokenTable(capacity: usable.count)
      for id in usable { pieces[id].text.withUnsafeBufferPointer { matchable.insert($0, id: TokenID(id)) } }
      var scores = pieces.map { Double($0.score) }
      // A user-defined piece beats every other way to cut its bytes.
      let greatest = pieces.reduce(-Float.infinity) { $1.kind == .normal ? max($0, $1.score) : $0 }
      if greatest.isFinite {
        for id in userDefined { scores[id] = Double(Float(pieces[id].text.count) * greatest - 0.1) }
      }
      model = .unigram(
        UnigramModel(
          vocabulary: texts, matchable: matchable, scores: scores,
          lowest: Double(usable.map { pieces[$0].score }.min() ?? 0), unknown: unknown,
          fallsBackToBytes: fallsBackToBytes, roundsToSingle: true))
    } else {
      var options = BytePairEncoding.Options()
      options.unknown = unknown
      options.fuseUnknown = true
      options.byteFallback = fallsBackToBytes
      // The best score merges first; equal scores in the order of the pieces. User-defined pieces neither merge nor come
      // about by merging.
      let fixed = Set(userDefined)
      let order = usable.filter { !fixed.contains($0) }.sorted { (pieces[$0].score, -$0) > (pieces[$1].score, -$1) }
      let merges = MergeTable.allSplits(
        of: order.map { ($0, pieces[$0].text) }, in: texts, characters: true, without: fixed)
      model = .bytePair(
        BytePairEncoding(options: options, vocabulary: texts, merges: merges, fixed: trie(of: userDefined)),
        texts: texts)
    }
    var parts = TokenizerParts(model: model)
    var steps: [Normalizer] = []
    if !characterMap.isEmpty {
      steps.append(.precompiled(try CharacterMap(characterMap, takesLongest: true, spares: trie(of: userDefined))))
    }
    steps.append(
      .sentencePieceSpaces(
        collapses: removesExtraSpaces, adds: addsDummyPrefix, atEnd: spacesAreSuffixes, escapes: escapesSpaces))
    parts.normalizer = .sequence(steps)
    var decoders: [DecoderStep] = [
      .replace(pattern: Array("▁".utf8), content: [0x20]), .byteFallback, .fuse,
    ]
    if addsDummyPrefix {
      decoders.append(.strip(content: [0x20], start: spacesAreSuffixes ? 0 : 1, stop: spacesAreSuffixes ? 1 : 0))
    }
    parts.decoder = TextDecoder(decoders)
    let fixed = Set(userDefined)
    for (id, piece) in pieces.enumerated()
    where [.control, .userDefined, .unknown].contains(piece.kind) && !fixed.contains(id) {
      var token = AddedToken(content: String(decoding: piece.text, as: UTF8.self), id: TokenID(id))
      token.isSpecial = piece.kind != .userDefined
      parts.addedTokens.append(token)
    }
    func name(_ id: Int) -> String? {
      pieces.indices.contains(id) ? String(decoding: pieces[id].text, as: UTF8.self) : nil
    }
    parts.specialTokens.bos = name(bos)
    parts.specialTokens.eos = name(eos)
    parts.specialTokens.padding = name(padding)
    parts.specialTokens.unknown = unknown.flatMap { name(Int($0)) }
    return parts
  }
}

extension SentencePieceModel {
  /// A trie of pieces, or `nil` if there are none.
  private func trie(of ids: [Int]) -> TokenTrie? {
    if ids.isEmpty { return nil }
    let table = TokenTable(capacity: ids.count)
    for id in ids { pieces[id].text.withUnsafeBufferPointer { table.insert($0, id: TokenID(id)) } }
    return TokenTrie(table)
  }
}

/// Merges for vocabularies that come without a list of them.
enum MergeTable {
  /// Every pair of tokens whose texts joined are a token may merge, with the rank of the result in `tokens`.
  ///
  /// With `characters` tokens are only split between characters, since the units of such a model are characters. Tokens
  /// named in `excluded` are no parts.
  static func allSplits(
    of tokens: [(id: Int, text: [UInt8])], in vocabulary: TokenTable, characters: Bool, without excluded: Set<Int> = []
  ) -> PairTable {
    let merges = PairTable(capacity: tokens.count * 2)
    for (rank, token) in tokens.enumerated() where token.text.count > 1 {
      token.text.withUnsafeBufferPointer { text in
        let base = text.baseAddress!
        for middle in 1..<text.count where !(characters && base[middle] & 0xC0 == 0x80) {
          let left = vocabulary.id(base, middle)
          guard left >= 0 else { continue }
          let right = vocabulary.id(base + middle, text.count - middle)
          guard right >= 0 else { continue }
          if !excluded.isEmpty, excluded.contains(Int(left)) || excluded.contains(Int(right)) { continue }
          merges.insert(
            TokenIndex(bitPattern: left), TokenIndex(bitPattern: right), UInt64(rank) << 32 | UInt64(token.id))
        }
      }
    }
    return merges
  }
}

/// Reads the fields of one protocol-buffer message.
struct ProtocolBufferReader {
  enum Value {
    case varint(UInt64)
    case fixed64(UInt64)
    case bytes(Bytes)
    case fixed32(UInt32)
  }

  private let bytes: Bytes
  private var index = 0
  private let file: String

  init(_ bytes: Bytes, file: String) {
    self.bytes = bytes
    self.file = file
  }

  private func broken() -> EngineError {
    EngineError(.invalidCheckpoint, "\(file) is not a whole SentencePiece model: a field at byte \(index) is broken")
  }

  private mutating func varint() throws(EngineError) -> UInt64 {
    var value: UInt64 = 0
    var shift: UInt64 = 0
    while index < bytes.count, shift < 64 {
      let byte = bytes[index]
      index += 1
      value |= UInt64(byte & 0x7F) << shift
      if byte < 0x80 { return value }
      shift += 7
    }
    throw broken()
  }

  /// The next field, or `nil` at the end.
  mutating func next() throws(EngineError) -> (number: Int, value: Value)? {
    guard index < bytes.count else { return nil }
    let tag = try varint()
    let number = Int(truncatingIfNeeded: tag >> 3)
    if number == 0 { throw broken() }
    switch tag & 7 {
    case 0: return (number, .varint(try varint()))
    case 1:
      guard index + 8 <= bytes.count else { throw broken() }
      index += 8
      return (number, .fixed64(load64(bytes.baseAddress! + index - 8)))
    case 2:
      let length = try varint()
      guard length <= UInt64(bytes.count - index) else { throw broken() }
      let start = index
      index += Int(length)
      return (number, .bytes(Bytes(rebasing: bytes[start..<index])))
    case 5:
      guard index + 4 <= bytes.count else { throw broken() }
      index += 4
      return (number, .fixed32(load32(bytes.baseAddress! + index - 4)))
    default: throw broken()
    }
  }
}
