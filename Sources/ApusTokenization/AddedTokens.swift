public import ApusCore

/// A token that is recognised in the text before any model runs: `<|im_start|>`, `<s>`, a run of spaces.
public struct AddedToken: Sendable, Equatable {
  /// The text that stands for the token.
  public var content: String
  /// The token's id.
  public var id: TokenID
  /// Whether the token must not touch a letter, digit or underscore.
  public var isSingleWord = false
  /// Whether the token swallows white space on its left.
  public var stripsLeft = false
  /// Whether the token swallows white space on its right.
  public var stripsRight = false
  /// Whether the token is looked for in the normalised text (with its own content normalised) instead of the raw text.
  public var isNormalized = false
  /// Whether the token is a control token, which decoding can leave out.
  public var isSpecial = false

  /// Makes a token; all behaviours are off.
  public init(content: String, id: TokenID) {
    self.content = content
    self.id = id
  }
}

/// Finds added tokens in text: leftmost first, longest of those that start at one place.
///
/// A byte trie is walked from each position whose byte can start a token, so the cost is at most the text's length times
/// the length of the longest token.
struct AddedTokenMatcher: Sendable {
  private var tokens: [AddedToken] = []
  /// Node reached from the root by each byte; zero where no token starts with it.
  private var rootChildren = [Int32](repeating: 0, count: 256)
  /// Children of node n are entries `childStart[n]..<childStart[n + 1]` of `childBytes` and `childNodes`.
  private var childStart: [Int32] = []
  private var childBytes: [UInt8] = []
  private var childNodes: [Int32] = []
  /// Index in `tokens` + 1 of the token that ends at a node; zero where none does.
  private var terminal: [Int32] = []
  private var singleFirstByte: Int32 = -1

  /// Whether there is nothing to find.
  var isEmpty: Bool { tokens.isEmpty }

  init() {}

  /// Makes a matcher of tokens by the bytes they are found by. Of two tokens with the same bytes the first wins. Tokens
  /// found by no bytes at all are left out.
  init(_ entries: [(bytes: [UInt8], token: AddedToken)]) {
    struct Node {
      var children: [(byte: UInt8, node: Int32)] = []
      var terminal: Int32 = 0
    }
    var nodes = [Node()]
    for entry in entries where !entry.bytes.isEmpty {
      var node = 0
      for byte in entry.bytes {
        if let child = nodes[node].children.first(where: { $0.byte == byte }) {
          node = Int(child.node)
        } else {
          nodes[node].children.append((byte, Int32(nodes.count)))
          node = nodes.count
          nodes.append(Node())
        }
      }
      tokens.append(entry.token)
      if nodes[node].terminal == 0 { nodes[node].terminal = Int32(tokens.count) }
    }
    for child in nodes[0].children { rootChildren[Int(child.byte)] = child.node }
    if nodes[0].children.count == 1 { singleFirstByte = Int32(nodes[0].children[0].byte) }
    for node in nodes {
      childStart.append(Int32(childBytes.count))
      for child in node.children {
        childBytes.append(child.byte)
        childNodes.append(child.node)
      }
      terminal.append(node.terminal)
    }
    childStart.append(Int32(childBytes.count))
  }

  /// One stretch of a text: a token, or text between tokens.
  struct Segment: Sendable {
    var start: Int
    var end: Int
    /// The token found, or -1 for text.
    var id: TokenID
  }

  /// Cuts a text into tokens and what lies between them. The segments of text are never empty.
  func segments(of text: Bytes, into result: inout [Segment]) {
    result.removeAll(keepingCapacity: true)
    guard text.count > 0 else { return }
    var consumed = 0
    var position = 0
    var spaces = SpaceRun()
    while let found = nextMatch(in: text, from: position) {
      position = found.end
      let token = tokens[found.token]
      var start = found.start
      var end = found.end
      if token.isSingleWord {
        if start > 0, endsWithWord(text, start) { continue }
        if end < text.count, startsWithWord(text, end) { continue }
      }
      if token.stripsLeft { start = Swift.max(spaces.leftEnd(text, start), consumed) }
      if token.stripsRight { end = spaces.rightEnd(text, end) }
      // White space that the token before swallowed can hold this token whole: then there is nothing left of it.
      if start >= end {
        consumed = Swift.max(consumed, end)
        continue
      }
      if consumed < start { result.append(Segment(start: consumed, end: start, id: -1)) }
      result.append(Segment(start: start, end: end, id: token.id))
      consumed = end
    }
    if consumed < text.count { result.append(Segment(start: consumed, end: text.count, id: -1)) }
  }

  /// The run of white space met last, so that a run that holds many tokens is walked once and not once a token.
  private struct SpaceRun {
    private var start = 0
    private var end = 0

    /// Where the white space that ends at `position` begins.
    mutating func leftEnd(_ text: Bytes, _ position: Int) -> Int {
      if start < position, position <= end { return start }
      let base = text.baseAddress!
      var left = position
      while left > 0 {
        // The known run goes on to here: what lies before its end was walked already.
        if start < left, left <= end {
          left = start
          break
        }
        let previous = previousScalarStart(base, left)
        guard UnicodeTables.shared.isWhiteSpace(decodeScalar(base, previous).scalar) else { break }
        left = previous
      }
      (start, end) = (left, position)
      return left
    }

    /// Where the white space that begins at `position` ends.
    mutating func rightEnd(_ text: Bytes, _ position: Int) -> Int {
      let base = text.baseAddress!
      // Beyond the end of a run that was met from the left there may be more white space.
      var right = start <= position && position < end ? end : position
      let isKnown = right > position
      while right < text.count {
        let (scalar, length) = decodeScalar(base, right)
        guard UnicodeTables.shared.isWhiteSpace(scalar) else { break }
        right += length
      }
      if isKnown { end = right } else { (start, end) = (position, right) }
      return right
    }
  }

  private func nextMatch(in text: Bytes, from start: Int) -> (start: Int, end: Int, token: Int)? {
    rootChildren.withUnsafeBufferPointer { root in
      var index = start
      while index < text.count {
        var node = root[Int(text[index])]
        if node == 0 {
          index += 1
          continue
        }
        var end = index + 1
        var best: (end: Int, token: Int)?
        while true {
          let token = terminal[Int(node)]
          if token != 0 { best = (end, Int(token) - 1) }
          guard end < text.count else { break }
          let next = child(of: node, text[end])
          if next == 0 { break }
          node = next
          end += 1
        }
        if let best { return (index, best.end, best.token) }
        index += 1
      }
      return nil
    }
  }

  @inline(__always)
  private func child(of node: Int32, _ byte: UInt8) -> Int32 {
    for index in Int(childStart[Int(node)])..<Int(childStart[Int(node) + 1]) where childBytes[index] == byte {
      return childNodes[index]
    }
    return 0
  }

  private func endsWithWord(_ text: Bytes, _ end: Int) -> Bool {
    let base = text.baseAddress!
    return UnicodeTables.shared.isWord(decodeScalar(base, previousScalarStart(base, end)).scalar)
  }

  private func startsWithWord(_ text: Bytes, _ start: Int) -> Bool {
    UnicodeTables.shared.isWord(decodeScalar(text.baseAddress!, start).scalar)
  }
}
