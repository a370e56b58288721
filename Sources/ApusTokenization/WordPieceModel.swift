import ApusCore

/// WordPiece: the longest token that starts a word, then the longest continuation, and so on; a word that does not come
/// out even is unknown.
struct WordPieceModel: Sendable {
  let vocabulary: TokenTable
  let unknown: TokenID?
  let continuingPrefix: [UInt8]
  /// Words of more characters than this are unknown.
  let maximumCharacters: Int
  /// Length of the longest token in bytes; no longer piece need be tried.
  private let longest: Int

  init(vocabulary: TokenTable, unknown: TokenID?, continuingPrefix: [UInt8], maximumCharacters: Int) {
    self.vocabulary = vocabulary
    self.unknown = unknown
    self.continuingPrefix = continuingPrefix
    self.maximumCharacters = maximumCharacters
    longest = (0..<vocabulary.count).reduce(0) { Swift.max($0, vocabulary.bytes(entry: $1).count) }
  }

  /// Appends the ids of one word.
  func encode(_ word: Bytes, into ids: inout [TokenID], buffer: inout [UInt8]) throws(EngineError) {
    guard let base = word.baseAddress else { return }
    let mark = ids.count
    var isKnown = word.count { $0 & 0xC0 != 0x80 } <= maximumCharacters
    var start = 0
    while isKnown, start < word.count {
      buffer.removeAll(keepingCapacity: true)
      if start > 0 { buffer.append(contentsOf: continuingPrefix) }
      let prefix = buffer.count
      var end = Swift.min(word.count, start + longest)
      while end < word.count, base[end] & 0xC0 == 0x80 { end -= 1 }
      buffer.append(bytes: Bytes(rebasing: word[start..<end]))
      var id: TokenID = -1
      buffer.withUnsafeBufferPointer { piece in
        while end > start {
          id = vocabulary.id(piece.baseAddress!, prefix + end - start)
          if id >= 0 { break }
          end = previousScalarStart(base, end)
        }
      }
      if id < 0 {
        isKnown = false
      } else {
        ids.append(id)
        start = end
      }
    }
    if !isKnown {
      ids.removeLast(ids.count - mark)
      guard let unknown else {
        throw EngineError(
          .invalidCheckpoint, "The text has a word the tokenizer does not know, and its unknown token is missing")
      }
      ids.append(unknown)
    }
  }
}

/// One token per word.
struct WordLevelModel: Sendable {
  let vocabulary: TokenTable
  let unknown: TokenID?

  /// Appends the id of one word.
  func encode(_ word: Bytes, into ids: inout [TokenID]) throws(EngineError) {
    guard let base = word.baseAddress else { return }
    let id = vocabulary.id(base, word.count)
    if id >= 0 {
      ids.append(id)
    } else if let unknown {
      ids.append(unknown)
    } else {
      throw EngineError(
        .invalidCheckpoint, "The text has a word the tokenizer does not know, and its unknown token is missing")
    }
  }
}
