/// The names of an object's declared properties as a tree over their UTF-8.
struct KeyTrie {
  struct Node {
    /// Names below this node have ranks from here, in the order of their bytes.
    var firstRank: Int32
    var endRank: Int32
    /// The tag of the name that ends here, or -1. It has the rank `firstRank`.
    var tag: Int32 = -1
    var firstChild: Int32 = 0
    var childCount: Int32 = 0
    var hash = RegularStore.Hash128(1, 2)
  }

  private(set) var nodes: [Node] = []
  private var bytes: [UInt8] = []
  private var targets: [Int32] = []
  /// The rank of each name, in the order given.
  private(set) var ranks: [Int32]

  /// A trie of distinct names; the tag of a name is its index.
  init(_ names: [[UInt8]]) {
    ranks = Array(repeating: 0, count: names.count)
    let order = names.indices.sorted { names[$0].lexicographicallyPrecedes(names[$1]) }
    for (rank, index) in order.enumerated() { ranks[index] = Int32(rank) }
    // Level by level, so that a node's children lie side by side.
    nodes.append(Node(firstRank: 0, endRank: Int32(order.count)))
    var depth = 0
    var level = 0..<1
    while !level.isEmpty {
      let start = nodes.count
      for node in level {
        var rank = Int(nodes[node].firstRank)
        let end = Int(nodes[node].endRank)
        if rank < end, names[order[rank]].count == depth {
          nodes[node].tag = Int32(order[rank])
          rank += 1
        }
        nodes[node].firstChild = Int32(bytes.count)
        while rank < end {
          let byte = names[order[rank]][depth]
          var stop = rank + 1
          while stop < end, names[order[stop]][depth] == byte { stop += 1 }
          bytes.append(byte)
          targets.append(Int32(nodes.count))
          nodes.append(Node(firstRank: Int32(rank), endRank: Int32(stop)))
          nodes[node].childCount += 1
          rank = stop
        }
      }
      level = start..<nodes.count
      depth += 1
    }
    for index in nodes.indices.reversed() {
      var hash = RegularStore.Hash128(7, 11)
      hash.combine(UInt64(UInt32(bitPattern: nodes[index].tag)))
      for child in Int(nodes[index].firstChild)..<Int(nodes[index].firstChild + nodes[index].childCount) {
        hash.combine(UInt64(bytes[child]))
        hash.combine(nodes[Int(targets[child])].hash)
      }
      nodes[index].hash = hash
    }
  }

  func child(of node: Int32, _ byte: UInt8) -> Int32? {
    let place = nodes[Int(node)]
    for index in Int(place.firstChild)..<Int(place.firstChild + place.childCount) where bytes[index] == byte {
      return targets[index]
    }
    return nil
  }

  func childBytes(of node: Int32) -> ArraySlice<UInt8> {
    let place = nodes[Int(node)]
    return bytes[Int(place.firstChild)..<Int(place.firstChild + place.childCount)]
  }

  /// A set of ranks cut down to a range, and how many it holds.
  static func restricted(_ words: [UInt64], _ range: Range<Int32>) -> (words: [UInt64], count: Int) {
    var result = [UInt64](repeating: 0, count: words.count)
    var count = 0
    guard !range.isEmpty else { return (result, 0) }
    for word in Int(range.lowerBound >> 6)...Int((range.upperBound - 1) >> 6) {
      var bits = words[word]
      let base = Int32(word << 6)
      if range.lowerBound > base { bits &= ~UInt64(0) << UInt64(range.lowerBound - base) }
      if range.upperBound < base + 64 { bits &= ~(~UInt64(0) << UInt64(range.upperBound - base)) }
      result[word] = bits
      count += bits.nonzeroBitCount
    }
    return (result, count)
  }
}

/// A search for the first of several texts in free text (Aho and Corasick 1975).
struct TextSearch {
  struct Node {
    /// The text that ends here, or -1.
    var tag: Int32 = -1
    var children: [UInt8: Int32] = [:]
    var failure: Int32 = 0
    /// Markers of special tokens on the way to this node.
    var markers: Int32 = 0
  }

  /// The tag under which free text without any of the texts is accepted.
  static let endTag: Int32 = 1 << 30

  private(set) var nodes: [Node] = [Node()]
  /// Bytes that occur in the texts.
  private(set) var bytes: [UInt8] = []
  let permitsEnd: Bool
  private(set) var hash = RegularStore.Hash128(3, 5)

  /// A search for texts, each with its tag.
  init(_ texts: [(bytes: [UInt8], tag: Int32)], permitsEnd: Bool) {
    self.permitsEnd = permitsEnd
    hash.combine(permitsEnd ? 1 : 0)
    var seen = Set<UInt8>()
    for (text, tag) in texts {
      var node: Int32 = 0
      for byte in text {
        seen.insert(byte)
        hash.combine(UInt64(byte))
        if let child = nodes[Int(node)].children[byte] {
          node = child
        } else {
          var child = Node()
          child.markers = nodes[Int(node)].markers + (byte == TokenVocabulary.specialMarker ? 1 : 0)
          nodes.append(child)
          nodes[Int(node)].children[byte] = Int32(nodes.count - 1)
          node = Int32(nodes.count - 1)
        }
      }
      hash.combine(UInt64(UInt32(bitPattern: tag)) | 1 << 40)
      if nodes[Int(node)].tag < 0 { nodes[Int(node)].tag = tag }
    }
    bytes = seen.sorted()
    var queue = nodes[0].children.values.sorted()
    var head = 0
    while head < queue.count {
      let node = queue[head]
      head += 1
      for (byte, child) in nodes[Int(node)].children {
        nodes[Int(child)].failure = next(nodes[Int(node)].failure, byte, afterEnd: true)
        queue.append(child)
      }
      let failure = nodes[Int(node)].failure
      if nodes[Int(node)].tag < 0 { nodes[Int(node)].tag = nodes[Int(failure)].tag }
    }
  }

  /// The node after a byte; -1 if no text may hold the byte. A special token is part of one of the texts or of none.
  func next(_ node: Int32, _ byte: UInt8, afterEnd: Bool = false) -> Int32 {
    var node = node
    while true {
      if let child = nodes[Int(node)].children[byte] { return child }
      if node == 0 { break }
      let failure = nodes[Int(node)].failure
      if !afterEnd, nodes[Int(failure)].markers < nodes[Int(node)].markers { return -1 }
      node = failure
    }
    // 0xFF marks special tokens and 0xF8 up never occurs in UTF-8.
    return byte >= 0xF8 && !afterEnd ? -1 : 0
  }
}
