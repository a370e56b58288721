public import ApusCore

/// The tokens of a tokenizer as bytes, and as a tree in which tokens with a common beginning share it.
public final class TokenVocabulary: Sendable {
  /// The number of token ids; a mask has one bit for each.
  public let count: Int
  /// Tokens that end a generation. Allowed exactly where the text may end.
  public let endTokens: [TokenID]
  /// Names the vocabulary in caches.
  let identity: UInt64
  /// The bytes of all tokens, one after the other.
  private let bytes: [UInt8]
  private let offsets: [Int32]
  let tree: TokenTree
  /// Texts of special tokens.
  let specialTexts: [String]

  /// What precedes the text of a special token in the tree: a byte that never occurs in UTF-8, so that special tokens
  /// match where a grammar names them and nowhere else.
  static let specialMarker: UInt8 = 0xFF

  /// Words of a mask.
  public var maskWordCount: Int { (count + 31) / 32 }

  /// Makes a vocabulary.
  ///
  /// - Parameters:
  ///   - tokens: the bytes of each token by id; an empty one is never allowed.
  ///   - isSpecial: whether a token is a special one, whose text does not count as text.
  ///   - endTokens: tokens that end a generation.
  public init(tokens: [[UInt8]], isSpecial: (TokenID) -> Bool, endTokens: [TokenID]) {
    count = tokens.count
    self.endTokens = endTokens.filter { $0 >= 0 && Int($0) < tokens.count }
    var bytes: [UInt8] = []
    var offsets: [Int32] = [0]
    var specials: [String] = []
    var hash: UInt64 = 0xCBF2_9CE4_8422_2325
    for (id, token) in tokens.enumerated() {
      if !token.isEmpty, isSpecial(TokenID(id)) {
        bytes.append(Self.specialMarker)
        specials.append(String(decoding: token, as: UTF8.self))
      }
      bytes += token
      offsets.append(Int32(bytes.count))
      hash = RegularStore.Hash128.mixed(hash ^ UInt64(bytes.count))
    }
    for byte in bytes { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01B3 }
    self.bytes = bytes
    self.offsets = offsets
    specialTexts = specials
    identity = hash
    tree = TokenTree(bytes: bytes, offsets: offsets)
  }

  /// The bytes of a token; a special one's begin with `specialMarker`.
  func withBytes<Result>(of token: TokenID, _ body: (UnsafeBufferPointer<UInt8>) -> Result) -> Result {
    bytes.withUnsafeBufferPointer { buffer in
      body(UnsafeBufferPointer(rebasing: buffer[Int(offsets[Int(token)])..<Int(offsets[Int(token) + 1])]))
    }
  }

  /// The bytes of a token as text; empty for a special one.
  public func text(of token: TokenID) -> [UInt8] {
    withBytes(of: token) { $0.first == Self.specialMarker ? [] : Array($0) }
  }
}

/// Tokens as a tree in preorder: the nodes below node `i` are `i + 1 ..< end[i]`. Node 0 is the root. Tokens of equal bytes
/// have a leaf each.
final class TokenTree: @unchecked Sendable {
  let count: Int
  let bytes: UnsafeMutablePointer<UInt8>
  let depths: UnsafeMutablePointer<UInt16>
  let ends: UnsafeMutablePointer<Int32>
  /// The token that ends at a node, or -1.
  let tokens: UnsafeMutablePointer<Int32>
  /// Bytes of the longest way down from a node.
  let heights: UnsafeMutablePointer<UInt16>
  /// The classes (`ByteClass`) of the bytes below a node, its own left out.
  let classes: UnsafeMutablePointer<UInt64>
  /// The tokens in the order of their nodes, and how many of them come before a node; one entry more than there are nodes.
  let order: UnsafeMutablePointer<Int32>
  let firstToken: UnsafeMutablePointer<Int32>
  let maximumDepth: Int

  init(bytes text: [UInt8], offsets: [Int32]) {
    let tokenCount = offsets.count - 1
    var order = (0..<tokenCount).filter { offsets[$0 + 1] > offsets[$0] && offsets[$0 + 1] - offsets[$0] < 4096 }
    text.withUnsafeBufferPointer { text in
      order.sort { left, right in
        var a = Int(offsets[left])
        var b = Int(offsets[right])
        let endA = Int(offsets[left + 1])
        let endB = Int(offsets[right + 1])
        while a < endA, b < endB {
          if text[a] != text[b] { return text[a] < text[b] }
          a += 1
          b += 1
        }
        return endA - a != endB - b ? endA - a < endB - b : left < right
      }
    }
    var nodeBytes: [UInt8] = [0]
    var nodeDepths: [UInt16] = [0]
    var nodeTokens: [Int32] = [-1]
    var nodeEnds: [Int32] = [0]
    var path: [Int] = [0]  // Nodes from the root to the last token's.
    var previous: Range<Int> = 0..<0
    for token in order {
      let range = Int(offsets[token])..<Int(offsets[token + 1])
      var common = 0
      while common < min(previous.count, range.count),
        text[previous.lowerBound + common] == text[range.lowerBound + common]
      {
        common += 1
      }
      if common == range.count { common -= 1 }  // The same bytes again: a leaf of its own.
      while path.count > common + 1 { nodeEnds[path.removeLast()] = Int32(nodeBytes.count) }
      for index in common..<range.count {
        path.append(nodeBytes.count)
        nodeBytes.append(text[range.lowerBound + index])
        nodeDepths.append(UInt16(index + 1))
        nodeTokens.append(-1)
        nodeEnds.append(0)
      }
      nodeTokens[nodeTokens.count - 1] = Int32(token)
      previous = range
    }
    for node in path { nodeEnds[node] = Int32(nodeBytes.count) }
    count = nodeBytes.count
    var nodeHeights = [UInt16](repeating: 0, count: count)
    var parents: [Int] = [0]
    for node in 1..<max(count, 1) {
      while parents.count > Int(nodeDepths[node]) { parents.removeLast() }
      parents.append(node)
      for (level, ancestor) in parents.enumerated() {
        nodeHeights[ancestor] = max(nodeHeights[ancestor], nodeDepths[node] - UInt16(level))
      }
    }
    maximumDepth = Int(nodeDepths.max() ?? 0)
    var nodeClasses = [UInt64](repeating: 0, count: count)
    let bits = ByteClass.bits
    // Backwards, so that what is below a node is complete before the node passes it on.
    var parentOf: [Int] = []
    parents = []
    for node in 0..<count {
      parents.removeLast(max(0, parents.count - Int(nodeDepths[node])))
      parentOf.append(parents.last ?? -1)
      parents.append(node)
    }
    for node in stride(from: count - 1, to: 0, by: -1) {
      nodeClasses[parentOf[node]] |= nodeClasses[node] | bits[Int(nodeBytes[node])]
    }
    var tokensInOrder: [Int32] = []
    var tokensBefore: [Int32] = []
    tokensInOrder.reserveCapacity(tokenCount)
    tokensBefore.reserveCapacity(count + 1)
    for node in 0..<count {
      tokensBefore.append(Int32(tokensInOrder.count))
      if nodeTokens[node] >= 0 { tokensInOrder.append(nodeTokens[node]) }
    }
    tokensBefore.append(Int32(tokensInOrder.count))
    func copy<Element>(_ array: [Element]) -> UnsafeMutablePointer<Element> {
      let pointer = UnsafeMutablePointer<Element>.allocate(capacity: array.count)
      pointer.initialize(from: array, count: array.count)
      return pointer
    }
    bytes = copy(nodeBytes)
    depths = copy(nodeDepths)
    ends = copy(nodeEnds)
    tokens = copy(nodeTokens)
    heights = copy(nodeHeights)
    classes = copy(nodeClasses)
    self.order = copy(tokensInOrder)
    firstToken = copy(tokensBefore)
  }

  deinit {
    bytes.deallocate()
    depths.deallocate()
    ends.deallocate()
    tokens.deallocate()
    heights.deallocate()
    classes.deallocate()
    order.deallocate()
    firstToken.deallocate()
  }
}
