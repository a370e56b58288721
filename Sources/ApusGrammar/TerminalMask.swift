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
  /// Finds or computes the mask of a state on which another's can be based; `nil` if that takes more work than it may.
  let base: (RegularState) -> TerminalMask?

  /// Counts of this or more are given up in the state on which a mask is based.
  private static let leastCount: Int32 = 4
  /// Successors that a state must have before a base is looked for.
  private static let wideRow = 64

  /// - Returns: `nil` if it takes more work than it may (`RegularStore.limitMask`).
  func build(_ state: RegularState) -> TerminalMask? {
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

  /// Exits under way: nodes by acceptance, of which there are few.
  private struct ExitLists {
    var acceptances: [Int32] = []
    var nodes: [[Int32]] = []
    private var last = 0

    @inline(__always)
    mutating func add(_ node: Int32, _ acceptance: Int32) {
      if last >= acceptances.count || acceptances[last] != acceptance { find(acceptance) }
      nodes[last].append(node)
    }

    private mutating func find(_ acceptance: Int32) {
      if let index = acceptances.firstIndex(of: acceptance) {
        last = index
      } else {
        last = acceptances.count
        acceptances.append(acceptance)
        nodes.append([])
      }
    }

    func list(of acceptance: Int32) -> [Int32]? { acceptances.firstIndex(of: acceptance).map { nodes[$0] } }

    mutating func set(_ list: [Int32], _ acceptance: Int32) {
      find(acceptance)
      nodes[last] = list
    }

    /// In a fixed order.
    func exits(_ store: RegularStore) -> [TerminalMask.Exits] {
      acceptances.indices.sorted { acceptances[$0] < acceptances[$1] }.map {
        TerminalMask.Exits(tags: store.acceptanceSets[Int(acceptances[$0])], nodes: nodes[$0])
      }
    }
  }

  /// Walks the whole tree.
  private func walk(_ state: RegularState) -> TerminalMask? {
    var exits = ExitLists()
    let stack = UnsafeMutablePointer<RegularState>.allocate(capacity: tree.maximumDepth + 2)
    defer { stack.deallocate() }
    stack[0] = state
    let bytes = tree.bytes
    let depths = tree.depths
    let ends = tree.ends
    let ids = tree.tokens
    let classes = tree.classes
    let order = tree.order
    let firstToken = tree.firstToken
    var words = [UInt32](repeating: 0, count: wordCount)
    var tokenCount = 0
    var visited = 0
    let isDone = words.withUnsafeMutableBufferPointer { words in
      var node = 1
      let count = tree.count
      while node < count {
        if store.exceedsMaskWork(visited) { return false }
        visited += 1
        let depth = Int(depths[node])
        let target = store.successor(stack[depth - 1], bytes[node])
        let end = Int(ends[node])
        if target == RegularStore.never {
          node = end
          continue
        }
        if end > node + 1 {
          let acceptance = store.acceptance[Int(target)]
          if acceptance != 0 { exits.add(Int32(node), acceptance) }
          if store.isKnownToLoop(target, classes[node]) {
            // Nothing below leaves the state: all tokens are allowed.
            for index in Int(firstToken[node])..<Int(firstToken[end]) {
              let token = order[index]
              words[Int(token >> 5)] |= 1 << UInt32(token & 31)
            }
            tokenCount += Int(firstToken[end] - firstToken[node])
            if acceptance != 0 {
              for inner in node + 1..<end where Int(ends[inner]) > inner + 1 { exits.add(Int32(inner), acceptance) }
            }
            node = end
            continue
          }
          stack[depth] = target
        }
        let token = ids[node]
        if token >= 0 {
          words[Int(token >> 5)] |= 1 << UInt32(token & 31)
          tokenCount += 1
        }
        node += 1
      }
      return true
    }
    store.visitedNodes += visited
    if !isDone { return nil }
    if tokenCount * 4 > wordCount { return TerminalMask(words: words, tokens: [], exits: exits.exits(store)) }
    var tokens: [Int32] = []
    tokens.reserveCapacity(tokenCount)
    for (index, word) in words.enumerated() where word != 0 {
      var rest = word
      while rest != 0 {
        tokens.append(Int32(index << 5 | rest.trailingZeroBitCount))
        rest &= rest - 1
      }
    }
    return TerminalMask(words: nil, tokens: tokens, exits: exits.exits(store))
  }

  /// Walks the parts of the tree where a state and another do not agree, and takes the rest from the other's mask.
  private func difference(_ state: RegularState, from other: RegularState, isRelaxed: Bool) -> TerminalMask? {
    guard let known = base(other) else { return nil }
    guard var words = known.words else { return walk(state) }
    // Regions of the tree in which the exits of the base do not hold.
    var replaced: [Range<Int32>] = []
    var exits = ExitLists()
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
    var visited = 0
    let isDone = words.withUnsafeMutableBufferPointer { words in
      while node < count {
        if store.exceedsMaskWork(visited) { return false }
        visited += 1
        let depth = Int(tree.depths[node])
        let byte = tree.bytes[node]
        let mine = left[depth - 1] == RegularStore.never ? 0 : store.successor(left[depth - 1], byte)
        let theirs = right[depth - 1] == RegularStore.never ? 0 : store.successor(right[depth - 1], byte)
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
          for index in Int(tree.firstToken[node])..<Int(tree.firstToken[end]) {
            let token = tree.order[index]
            words[Int(token >> 5)] &= ~(1 << UInt32(token & 31))
          }
          replaced.append(Int32(node)..<Int32(end))
          node = end
          continue
        }
        if ids[node] >= 0 { words[Int(ids[node] >> 5)] |= 1 << UInt32(ids[node] & 31) }
        replaced.append(Int32(node)..<Int32(node + 1))
        if end > node + 1 {
          let acceptance = store.acceptance[Int(mine)]
          if acceptance != 0 { exits.add(Int32(node), acceptance) }
          left[depth] = mine
          right[depth] = theirs
        }
        node += 1
      }
      return true
    }
    store.visitedNodes += visited
    if !isDone { return nil }
    for group in known.exits {
      let acceptance = store.acceptanceSet(group.tags)
      var kept: [Int32] = []
      var region = 0
      for exit in group.nodes {
        while region < replaced.count, replaced[region].upperBound <= exit { region += 1 }
        if region < replaced.count, replaced[region].contains(exit) { continue }
        kept.append(exit)
      }
      if let added = exits.list(of: acceptance) {
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
        exits.set(merged, acceptance)
      } else if !kept.isEmpty {
        exits.set(kept, acceptance)
      }
    }
    return TerminalMask(words: words, tokens: [], exits: exits.exits(store))
  }
}
