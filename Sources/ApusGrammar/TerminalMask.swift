/// What a terminal's state makes of every token, whatever surrounds the terminal.
final class TerminalMask: Sendable {
  /// Nodes of the token tree after whose bytes the terminal may end: whether the tokens below are allowed depends on what
  /// follows the terminal. Only nodes that have tokens below them.
  struct Exits: Sendable {
    /// The tags of the acceptance.
    var tags: [Int32]
    var nodes: [Int32]
  }

  /// Tokens allowed because the terminal takes all of their bytes: a bit each, or `nil` if `tokens` lists them.
  let words: [UInt32]?
  let tokens: [Int32]
  let exits: [Exits]

  init(words: [UInt32]?, tokens: [Int32], exits: [Exits]) {
    self.words = words
    self.tokens = tokens
    self.exits = exits
  }

  var byteCount: Int {
    (words?.count ?? 0) * 4 + tokens.count * 4 + exits.reduce(0) { $0 + $1.nodes.count * 4 + 64 } + 96
  }

  /// Adds the allowed tokens to a mask.
  func add(to mask: UnsafeMutablePointer<UInt32>) {
    if let words {
      words.withUnsafeBufferPointer { words in
        for index in 0..<words.count { mask[index] |= words[index] }
      }
    } else {
      for token in tokens { mask[Int(token >> 5)] |= 1 << UInt32(token & 31) }
    }
  }
}

/// Masks by content, shared by all grammars of a compiler; bounded by bytes.
final class MaskCache: @unchecked Sendable {
  private struct Key: Hashable {
    var hash: RegularStore.Hash128
    var kind: UInt8
  }

  private let lock = GrammarLock()
  private var terminals: [RegularStore.Hash128: TerminalMask] = [:]
  private var bytes = 0
  private let limit: Int

  init(limit: Int) { self.limit = limit }

  func terminal(_ hash: RegularStore.Hash128) -> TerminalMask? { lock.withLock { terminals[hash] } }

  func insert(_ mask: TerminalMask, for hash: RegularStore.Hash128) {
    lock.withLock {
      if bytes + mask.byteCount > limit {
        // Starting over is simple, rare, and costs what a cold start costs.
        terminals = [:]
        bytes = 0
      }
      if terminals.updateValue(mask, forKey: hash) == nil { bytes += mask.byteCount }
    }
  }
}

/// Computes terminal masks.
struct TerminalMaskBuilder {
  let tree: TokenTree
  let wordCount: Int
  let store: RegularStore
  /// Finds or computes the mask of a state on which another's can be based.
  let base: (RegularState) -> TerminalMask

  /// Counts of this or more are given up in the state on which a mask is based.
  private static let leastCount: Int32 = 4
  /// Successors that a state must have before a base is looked for.
  private static let wideRow = 64

  func build(_ state: RegularState) -> TerminalMask {
    let row = store.row(state)
    var live = 0
    for byte in 0x20..<0x7F where row[byte] != RegularStore.never { live += 1 }
    if live >= Self.wideRow {
      let relaxed = store.relaxed(state, least: Self.leastCount)
      if relaxed != state, store.isAlive(relaxed) { return difference(state, from: relaxed, isRelaxed: true) }
      // The state to which most bytes lead, if they lead from there to itself: the middle of free text.
      var counts: [RegularState: Int] = [:]
      for byte in 0x20..<0x7F where row[byte] != RegularStore.never { counts[row[byte], default: 0] += 1 }
      if let (target, count) = counts.max(by: { $0.value < $1.value || ($0.value == $1.value && $0.key < $1.key) }),
        count >= Self.wideRow / 2, target != state
      {
        let targetRow = store.row(target)
        var loops = 0
        for byte in 0x20..<0x7F where targetRow[byte] == target { loops += 1 }
        if loops >= Self.wideRow { return difference(state, from: target, isRelaxed: false) }
      }
    }
    return walk(state)
  }

  /// Walks the whole tree.
  private func walk(_ state: RegularState) -> TerminalMask {
    var exits: [Int32: [Int32]] = [:]
    var tokens: [Int32] = []
    let stack = UnsafeMutablePointer<UnsafeMutablePointer<RegularState>>.allocate(capacity: tree.maximumDepth + 2)
    defer { stack.deallocate() }
    stack[0] = store.row(state)
    let bytes = tree.bytes
    let depths = tree.depths
    let ends = tree.ends
    let ids = tree.tokens
    var node = 1
    let count = tree.count
    while node < count {
      let depth = Int(depths[node])
      let target = stack[depth - 1][Int(bytes[node])]
      let end = Int(ends[node])
      if target == RegularStore.never {
        node = end
        continue
      }
      if ids[node] >= 0 { tokens.append(ids[node]) }
      if end > node + 1 {
        let acceptance = store.acceptance[Int(target)]
        if acceptance != 0 { exits[acceptance, default: []].append(Int32(node)) }
        stack[depth] = store.row(target)
      }
      node += 1
    }
    return finish(tokens, exits)
  }

  private func finish(_ tokens: [Int32], _ exits: [Int32: [Int32]]) -> TerminalMask {
    let list = exits.sorted { $0.key < $1.key }.map {
      TerminalMask.Exits(tags: store.acceptanceSets[Int($0.key)], nodes: $0.value)
    }
    if tokens.count * 4 <= wordCount { return TerminalMask(words: nil, tokens: tokens, exits: list) }
    var words = [UInt32](repeating: 0, count: wordCount)
    words.withUnsafeMutableBufferPointer { words in
      for token in tokens { words[Int(token >> 5)] |= 1 << UInt32(token & 31) }
    }
    return TerminalMask(words: words, tokens: [], exits: list)
  }

  /// Walks the parts of the tree where a state and another do not agree, and takes the rest from the other's mask.
  private func difference(_ state: RegularState, from other: RegularState, isRelaxed: Bool) -> TerminalMask {
    let known = base(other)
    guard var words = known.words else { return walk(state) }
    // Regions of the tree in which the exits of the base do not hold.
    var replaced: [Range<Int32>] = []
    var exits: [Int32: [Int32]] = [:]
    let left = UnsafeMutablePointer<RegularState>.allocate(capacity: tree.maximumDepth + 2)
    let right = UnsafeMutablePointer<RegularState>.allocate(capacity: tree.maximumDepth + 2)
    defer {
      left.deallocate()
      right.deallocate()
    }
    left[0] = state
    right[0] = other
    let ends = tree.ends
    let ids = tree.tokens
    var node = 1
    let count = tree.count
    words.withUnsafeMutableBufferPointer { words in
      while node < count {
        let depth = Int(tree.depths[node])
        let byte = Int(tree.bytes[node])
        let mine = left[depth - 1] == RegularStore.never ? 0 : store.row(left[depth - 1])[byte]
        let theirs = right[depth - 1] == RegularStore.never ? 0 : store.row(right[depth - 1])[byte]
        let end = Int(ends[node])
        if mine == theirs {
          node = end
          continue
        }
        if isRelaxed, mine != RegularStore.never, theirs != RegularStore.never,
          let slack = store.slack(mine, least: Self.leastCount), slack >= Int32(tree.heights[node]),
          store.relaxed(mine, least: Self.leastCount) == theirs,
          store.acceptance[Int(mine)] == store.acceptance[Int(theirs)]
        {
          node = end
          continue
        }
        if mine == RegularStore.never {
          // Nothing below is allowed.
          for inner in node..<end where ids[inner] >= 0 {
            words[Int(ids[inner] >> 5)] &= ~(1 << UInt32(ids[inner] & 31))
          }
          replaced.append(Int32(node)..<Int32(end))
          node = end
          continue
        }
        if ids[node] >= 0 { words[Int(ids[node] >> 5)] |= 1 << UInt32(ids[node] & 31) }
        replaced.append(Int32(node)..<Int32(node + 1))
        if end > node + 1 {
          let acceptance = store.acceptance[Int(mine)]
          if acceptance != 0 { exits[acceptance, default: []].append(Int32(node)) }
          left[depth] = mine
          right[depth] = theirs
        }
        node += 1
      }
    }
    for group in known.exits {
      let acceptance = store.acceptanceSet(group.tags)
      var kept: [Int32] = []
      var region = 0
      for exit in group.nodes {
        while region < replaced.count, replaced[region].upperBound <= exit { region += 1 }
        if region < replaced.count, replaced[region].contains(exit) { continue }
        kept.append(exit)
      }
      if let added = exits[acceptance] {
        var merged: [Int32] = []
        merged.reserveCapacity(kept.count + added.count)
        var first = 0
        var second = 0
        while first < kept.count || second < added.count {
          if second == added.count || (first < kept.count && kept[first] < added[second]) {
            merged.append(kept[first])
            first += 1
          } else {
            merged.append(added[second])
            second += 1
          }
        }
        exits[acceptance] = merged
      } else if !kept.isEmpty {
        exits[acceptance] = kept
      }
    }
    let list = exits.sorted { $0.key < $1.key }.map {
      TerminalMask.Exits(tags: store.acceptanceSets[Int($0.key)], nodes: $0.value)
    }
    return TerminalMask(words: words, tokens: [], exits: list)
  }
}
