import ApusCore

/// The unigram language model of SentencePiece (Kudo, 2018): of all ways to cut a word into tokens, the one whose log
/// probabilities add up to most, by the Viterbi algorithm.
struct UnigramModel: Sendable {
  let vocabulary: TokenTable
  private let scores: [Double]
  private let unknown: TokenID?
  private let unknownScore: Double
  private let byteTokens: [TokenID]
  private let fallsBackToBytes: Bool
  private let trie: TokenTrie
  /// Whether sums are kept in single precision, as SentencePiece itself keeps them.
  private let roundsToSingle: Bool

  /// What an unknown character costs below the worst token.
  private static let unknownPenalty = 10.0

  /// Makes a model. `scores` are by id; `matchable` are the tokens that text is cut into, all by default; `lowest` is the
  /// score below which unknown characters cost, by default the least of all.
  init(
    vocabulary: TokenTable, matchable: TokenTable? = nil, scores: [Double], lowest: Double? = nil, unknown: TokenID?,
    fallsBackToBytes: Bool, roundsToSingle: Bool = false
  ) {
    self.vocabulary = vocabulary
    self.scores = scores
    self.unknown = unknown
    self.roundsToSingle = roundsToSingle
    unknownScore = (lowest ?? scores.min() ?? 0) - Self.unknownPenalty
    trie = TokenTrie(matchable ?? vocabulary)
    let digits = Array("0123456789ABCDEF".utf8)
    let tokens = (0..<256).map { byte in
      vocabulary.id(of: Array("<0x".utf8) + [digits[byte >> 4], digits[byte & 15], UInt8(ascii: ">")]) ?? -1
    }
    byteTokens = tokens
    self.fallsBackToBytes = fallsBackToBytes
  }

  struct Scratch: Sendable {
    fileprivate var bestScores: [Double] = []
    fileprivate var bestStarts: [Int32] = []
    fileprivate var bestIDs: [TokenID] = []
    fileprivate var path: [(start: Int, end: Int, id: TokenID)] = []
  }

  @inline(__always)
  private func rounded(_ score: Double) -> Double { roundsToSingle ? Double(Float(score)) : score }

  /// Appends the ids of one word.
  func encode(_ piece: Bytes, into ids: inout [TokenID], scratch: inout Scratch) throws(EngineError) {
    let count = piece.count
    guard count > 0, let base = piece.baseAddress else { return }
    scratch.bestScores.removeAll(keepingCapacity: true)
    scratch.bestStarts.removeAll(keepingCapacity: true)
    scratch.bestIDs.removeAll(keepingCapacity: true)
    for _ in 0...count {
      scratch.bestScores.append(0)
      scratch.bestStarts.append(-1)
      scratch.bestIDs.append(-1)
    }
    var start = 0
    while start < count {
      let scoreHere = scratch.bestScores[start]
      let length = sequenceLength(base[start])
      var hasSingle = false
      trie.forEachPrefix(Bytes(rebasing: piece[start...])) { end, id in
        let target = start + end
        let score = rounded(scores[Int(id)] + scoreHere)
        if scratch.bestStarts[target] < 0 || score > scratch.bestScores[target] {
          scratch.bestScores[target] = score
          scratch.bestStarts[target] = Int32(truncatingIfNeeded: start)
          scratch.bestIDs[target] = id
        }
        if end == length { hasSingle = true }
      }
      if !hasSingle {
        let target = start + length
        let score = rounded(unknownScore + scoreHere)
        if scratch.bestStarts[target] < 0 || score > scratch.bestScores[target] {
          scratch.bestScores[target] = score
          scratch.bestStarts[target] = Int32(truncatingIfNeeded: start)
          scratch.bestIDs[target] = unknown ?? -1
        }
      }
      start += length
    }
    scratch.path.removeAll(keepingCapacity: true)
    var end = count
    while end > 0 {
      let start = Int(scratch.bestStarts[end])
      let id = scratch.bestIDs[end]
      let isUnknown = id == (unknown ?? -1)
      // Neighbouring unknown characters become one.
      if isUnknown, let last = scratch.path.last, last.id == id, last.start == end {
        scratch.path[scratch.path.count - 1].start = start
      } else {
        scratch.path.append((start, end, id))
      }
      end = start
    }
    for part in scratch.path.reversed() {
      if part.id != (unknown ?? -1) {
        ids.append(part.id)
        continue
      }
      let bytes = piece[part.start..<part.end]
      // A run of unknowns is looked up as a whole before it is given up.
      let known = vocabulary.id(base + part.start, part.end - part.start)
      if known >= 0 {
        ids.append(known)
      } else if fallsBackToBytes, bytes.allSatisfy({ byteTokens[Int($0)] >= 0 }) {
        for byte in bytes { ids.append(byteTokens[Int(byte)]) }
      } else if let unknown {
        ids.append(unknown)
      } else {
        throw EngineError(
          .invalidCheckpoint, "The text has a character the tokenizer does not know, and it has no unknown token")
      }
    }
  }
}

/// A byte trie of tokens, for finding all tokens that start a text. Children of a node are found by hashing.
struct TokenTrie: Sendable {
  private let children: PairTable
  /// Token that ends at each node, or -1.
  private let tokens: [TokenID]

  init(_ vocabulary: TokenTable) {
    let children = PairTable(capacity: vocabulary.count * 4)
    var tokens: [TokenID] = [-1]
    for entry in 0..<vocabulary.count {
      let bytes = vocabulary.bytes(entry: entry)
      if bytes.count == 0 { continue }
      var node: TokenIndex = 0
      for byte in bytes {
        let found = children.value(node, TokenIndex(byte))
        if found == .max {
          children.insert(node, TokenIndex(byte), UInt64(tokens.count))
          node = TokenIndex(tokens.count)
          tokens.append(-1)
        } else {
          node = TokenIndex(found)
        }
      }
      tokens[Int(node)] = vocabulary.id(entry: entry)
    }
    self.children = children
    self.tokens = tokens
  }

  /// The longest token that starts `text`.
  func longestPrefix(_ text: Bytes) -> (length: Int, id: TokenID)? {
    var found: (length: Int, id: TokenID)?
    forEachPrefix(text) { found = ($0, $1) }
    return found
  }

  /// Calls `body` with the length and id of every token that starts `text`, shortest first.
  @inline(__always)
  func forEachPrefix(_ text: Bytes, _ body: (Int, TokenID) -> Void) {
    var node: TokenIndex = 0
    for index in 0..<text.count {
      let found = children.value(node, TokenIndex(text[index]))
      if found == .max { return }
      node = TokenIndex(found)
      if tokens[Int(node)] >= 0 { body(index + 1, tokens[Int(node)]) }
    }
  }
}
