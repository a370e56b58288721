public import ApusCore

/// A prefix tree from token ids to K/V pages.
///
/// Two prompts that begin alike have the same keys and values over their common beginning, so the pages that one
/// request computed serve every later one. The tree holds whole pages only: an edge is labelled with a multiple of
/// `kvPageSize` tokens, and the children of a node differ in their first *page*, not in their first token.
///
///     salt "" ── [system prompt: pages 0 1 2] ─┬─ [question A: pages 7 8]
///                                              └─ [question B: page 5] ── [its answer: pages 9 3]
///
/// **What it owns.** Pages in the tree are the tree's until `evict` or `removeAll` hands them back to the allocator.
/// Requests read them under a `PrefixLock`; nobody writes to them.
///
/// **Namespaces.** Each salt has its own root; requests of different salts never share a page.
///
/// **Eviction** takes the least recently used pages that no lock covers, from the ends of branches inwards, page by
/// page. The logical clock is the order of one list of all unlocked nodes, oldest first. Touching a path moves its
/// nodes to the young end beginning with the deepest, so a node is always older than its parent and the oldest node of
/// all is a leaf: no search, no heap, no time of day.
///
/// **Cost**, with `n` the tokens looked at and `d` the depth of the path: `peek` O(n); `matchPrefix` and `insert`
/// O(n + d), plus a copy of the node that they split; `lock` and `unlock` O(d); `evict` O(1) for each page.
///
/// The structure follows RadixAttention of SGLang (arXiv 2312.07104).
public struct RadixCache: ~Copyable {
  /// The first page of an edge's label, under the node it leaves.
  struct Edge: Hashable {
    var parent: Int32
    var page: SIMD16<TokenID>

    func hash(into hasher: inout Hasher) {
      hasher.combine(parent)
      withUnsafeBytes(of: page) { hasher.combine(bytes: $0) }
    }
  }

  /// A node with the label of the edge that leads to it. Nodes are named by their index, so walking the tree counts no
  /// references, and dropping a deep tree recurses nowhere.
  struct Node {
    /// The label; kvPageSize tokens for each page.
    var tokens: [TokenID] = []
    var pages: [Int32] = []
    /// -1 for a root.
    var parent: Int32 = -1
    var childCount: Int32 = 0
    /// Locks held on this node or below it.
    var lockCount: Int32 = 0
    /// Neighbours in the list of unlocked nodes; -1 at its ends and for nodes that are not in it.
    var older: Int32 = -1
    var newer: Int32 = -1
    /// The namespace; set for roots alone.
    var salt: String?
    /// Whether the entry is a node at all or waits for reuse.
    var isUsed = true
  }

  var nodes: [Node] = []
  var unusedNodes: [Int32] = []
  var edges: [Edge: Int32] = [:]
  var roots: [String: Int32] = [:]
  /// Ends of the list of unlocked nodes.
  var oldest: Int32 = -1
  var newest: Int32 = -1

  /// Pages that the tree holds.
  public internal(set) var cachedPages = 0
  /// Those of them that a lock protects.
  public internal(set) var lockedPages = 0
  /// Pages evicted since the cache was made.
  public internal(set) var evictedPages = 0

  /// Makes an empty cache.
  public init() {
    invariant(kvPageSize == SIMD16<TokenID>.scalarCount, "an edge's key holds exactly one page of tokens")
  }

  /// Pages that `evict` could hand back now.
  public var evictablePages: Int { cachedPages - lockedPages }

  // MARK: Looking

  /// What of a sequence the tree holds, as found without changing anything.
  public struct Peek: Equatable, Sendable {
    /// Whole pages found from the beginning of the sequence.
    public var pageCount: Int
    /// Those of them that are not locked; they stop being evictable once somebody locks the prefix.
    public var evictablePages: Int
    /// The deepest node touched, -1 if none. Valid until the tree changes.
    public var node: Int32
  }

  /// A prefix found by `matchPrefix`. Valid until the next change of the tree: lock it, or forget it.
  public struct PrefixMatch: Equatable, Sendable {
    /// Whole pages found from the beginning of the sequence.
    public var pageCount: Int
    /// The node at which they end, -1 if there are none.
    public var node: Int32
  }

  /// How many whole pages of a sequence the tree holds, at most `pageLimit`. Changes nothing, not even ages.
  public func peek(_ tokens: [TokenID], pageLimit: Int, salt: String) -> Peek {
    var peek = Peek(pageCount: 0, evictablePages: 0, node: -1)
    guard let root = roots[salt] else { return peek }
    tokens.withUnsafeBufferPointer { tokens in
      var node = root
      while let (child, count) = step(from: node, tokens, at: peek.pageCount, limit: pageLimit) {
        peek.pageCount += count
        if nodes[Int(child)].lockCount == 0 { peek.evictablePages += count }
        peek.node = child
        if count < nodes[Int(child)].pages.count { break }
        node = child
      }
    }
    return peek
  }

  /// Finds the longest prefix of whole pages, at most `pageLimit`, and makes it the most recently used. A node that
  /// matches in part is split, so that the match ends at a node and a lock covers what was matched and no more.
  public mutating func matchPrefix(_ tokens: [TokenID], pageLimit: Int, salt: String) -> PrefixMatch {
    guard let root = roots[salt] else { return PrefixMatch(pageCount: 0, node: -1) }
    let match = descend(tokens, pageLimit: pageLimit, from: root)
    if match.node == root { return PrefixMatch(pageCount: 0, node: -1) }
    touch(match.node)
    return match
  }

  /// Writes the pages of a match to the front of `pages`, replacing what is there or appending.
  public func copyPages(of match: PrefixMatch, to pages: inout [Int32]) {
    while pages.count < match.pageCount { pages.append(-1) }
    var node = match.node
    var end = match.pageCount
    while end > 0 {
      let count = nodes[Int(node)].pages.count
      for index in 0..<count { pages[end - count + index] = nodes[Int(node)].pages[index] }
      end -= count
      node = nodes[Int(node)].parent
    }
  }

  // MARK: Adding

  /// Adds the first `pageCount` pages of a sequence whose K/V are complete.
  ///
  /// Ranges of `pages`, half open, when `insert` returns `present`:
  ///
  ///     0            locked               present                 pageCount        pages.count
  ///     ├──────────────┼─────────────────────┼───────────────────────┼──────────────────┤
  ///     │ the tree's   │ the caller's copies │ were the caller's,    │ the caller's,    │
  ///     │ before, under│ of pages that the   │ are the tree's now:   │ as before: not   │
  ///     │ caller's lock│ tree has: caller    │ caller must not free  │ complete or not  │
  ///     │              │ frees its own       │ them                  │ to be shared     │
  ///
  /// - Returns: how many of the pages the tree held already.
  public mutating func insert(_ tokens: [TokenID], pages: [Int32], pageCount: Int, salt: String) -> Int {
    invariant(pageCount <= pages.count && pageCount * kvPageSize <= tokens.count, "there are fewer pages than named")
    if pageCount == 0 { return 0 }
    let root: Int32
    if let known = roots[salt] {
      root = known
    } else {
      root = makeNode(Node(salt: salt))
      roots[salt] = root
    }
    let match = descend(tokens, pageLimit: pageCount, from: root)
    var last = match.node
    if match.pageCount < pageCount {
      let range = match.pageCount * kvPageSize..<pageCount * kvPageSize
      last = makeNode(
        Node(tokens: Array(tokens[range]), pages: Array(pages[match.pageCount..<pageCount]), parent: match.node))
      edges[edge(from: match.node, to: last)] = last
      nodes[Int(match.node)].childCount += 1
      cachedPages += pageCount - match.pageCount
      append(last)
    }
    touch(last)
    return match.pageCount
  }

  // MARK: Locks

  /// Keeps a match from being evicted until the lock is given back.
  public mutating func lock(_ match: PrefixMatch) -> PrefixLock {
    var node = match.node
    while node >= 0 && nodes[Int(node)].parent >= 0 {
      if nodes[Int(node)].lockCount == 0 {
        unlink(node)
        lockedPages += nodes[Int(node)].pages.count
      }
      nodes[Int(node)].lockCount += 1
      node = nodes[Int(node)].parent
    }
    return PrefixLock(node: match.node)
  }

  /// Ends a lock. What nobody else has locked becomes evictable, as the most recently used of all.
  public mutating func unlock(_ lock: consuming PrefixLock) {
    var node = lock.node
    while node >= 0 && nodes[Int(node)].parent >= 0 {
      invariant(nodes[Int(node)].lockCount > 0, "a lock was given back that was never taken")
      nodes[Int(node)].lockCount -= 1
      if nodes[Int(node)].lockCount == 0 {
        lockedPages -= nodes[Int(node)].pages.count
        append(node)
      }
      node = nodes[Int(node)].parent
    }
    lock.end()
  }

  // MARK: Removing

  /// Hands at most `count` pages back, least recently used first.
  /// - Returns: how many; fewer than asked for only if everything left is locked.
  @discardableResult
  public mutating func evict(_ count: Int, into allocator: inout PageAllocator) -> Int {
    var remaining = count
    while remaining > 0 && oldest >= 0 {
      let node = oldest
      invariant(nodes[Int(node)].childCount == 0, "the oldest unlocked node has children")
      let taken = min(remaining, nodes[Int(node)].pages.count)
      for _ in 0..<taken { allocator.release(nodes[Int(node)].pages.removeLast()) }
      remaining -= taken
      cachedPages -= taken
      if nodes[Int(node)].pages.isEmpty {
        remove(node)
      } else {
        nodes[Int(node)].tokens.removeLast(taken * kvPageSize)
      }
    }
    evictedPages += count - remaining
    return count - remaining
  }

  /// Hands every page back. Nothing may be locked.
  public mutating func removeAll(into allocator: inout PageAllocator) {
    invariant(lockedPages == 0, "the cache is emptied while \(lockedPages) of its pages are in use")
    for node in nodes where node.isUsed {
      for page in node.pages { allocator.release(page) }
    }
    nodes.removeAll()
    unusedNodes.removeAll()
    edges.removeAll()
    roots.removeAll()
    oldest = -1
    newest = -1
    cachedPages = 0
  }

  // MARK: Inner workings

  /// One edge down: the child that continues the sequence at page `page`, and how many pages of its label match.
  private func step(
    from node: Int32, _ tokens: UnsafeBufferPointer<TokenID>, at page: Int, limit: Int
  ) -> (child: Int32, pages: Int)? {
    let limit = min(limit, tokens.count / kvPageSize)
    guard page < limit, nodes[Int(node)].childCount > 0, let start = tokens.baseAddress else { return nil }
    let key = UnsafeRawPointer(start + page * kvPageSize).loadUnaligned(as: SIMD16<TokenID>.self)
    guard let child = edges[Edge(parent: node, page: key)] else { return nil }
    let longest = min(limit - page, nodes[Int(child)].pages.count)
    var count = 1
    nodes[Int(child)].tokens.withUnsafeBufferPointer { label in
      while count < longest {
        let from = count * kvPageSize
        for offset in from..<from + kvPageSize where label[offset] != tokens[page * kvPageSize + offset] { return }
        count += 1
      }
    }
    return (child, count)
  }

  /// Walks down from a root as far as the sequence matches, splitting the node in which it ends.
  private mutating func descend(_ tokens: [TokenID], pageLimit: Int, from root: Int32) -> PrefixMatch {
    var match = PrefixMatch(pageCount: 0, node: root)
    while let (child, count) = tokens.withUnsafeBufferPointer({
      step(from: match.node, $0, at: match.pageCount, limit: pageLimit)
    }) {
      match.pageCount += count
      if count < nodes[Int(child)].pages.count {
        match.node = split(child, at: count)
        break
      }
      match.node = child
    }
    return match
  }

  /// Puts a new node with the first `count` pages above the node, which keeps the rest. The lower part keeps its number,
  /// since locks name the deepest node that they cover and cover everything above it.
  private mutating func split(_ node: Int32, at count: Int) -> Int32 {
    let parent = nodes[Int(node)].parent
    let tokens = nodes[Int(node)].tokens
    let pages = nodes[Int(node)].pages
    let tokenCount = count * kvPageSize
    let oldEdge = edge(from: parent, to: node)
    let upper = makeNode(
      Node(
        tokens: Array(tokens[..<tokenCount]), pages: Array(pages[..<count]), parent: parent, childCount: 1,
        lockCount: nodes[Int(node)].lockCount))
    nodes[Int(node)].tokens = Array(tokens[tokenCount...])
    nodes[Int(node)].pages = Array(pages[count...])
    nodes[Int(node)].parent = upper
    edges[oldEdge] = upper
    edges[edge(from: upper, to: node)] = node
    // Younger than its child and, like the child was, older than its parent.
    if nodes[Int(upper)].lockCount == 0 { link(upper, after: node) }
    return upper
  }

  private mutating func remove(_ node: Int32) {
    // The label is still there: only the pages were taken out.
    let parent = nodes[Int(node)].parent
    edges[edge(from: parent, to: node)] = nil
    unlink(node)
    recycle(node)
    nodes[Int(parent)].childCount -= 1
    // A namespace that holds nothing is forgotten, so salts that come once do not pile up.
    if nodes[Int(parent)].childCount == 0, let salt = nodes[Int(parent)].salt {
      roots[salt] = nil
      recycle(parent)
    }
  }

  private func edge(from parent: Int32, to node: Int32) -> Edge {
    nodes[Int(node)].tokens.withUnsafeBytes {
      Edge(parent: parent, page: $0.loadUnaligned(as: SIMD16<TokenID>.self))
    }
  }

  private mutating func makeNode(_ node: Node) -> Int32 {
    if let index = unusedNodes.popLast() {
      nodes[Int(index)] = node
      return index
    }
    nodes.append(node)
    return Int32(nodes.count - 1)
  }

  private mutating func recycle(_ node: Int32) {
    nodes[Int(node)] = Node(isUsed: false)
    unusedNodes.append(node)
  }

  /// Makes a path the most recently used, the deepest node first.
  private mutating func touch(_ deepest: Int32) {
    var node = deepest
    while nodes[Int(node)].parent >= 0 {
      if nodes[Int(node)].lockCount == 0 {
        unlink(node)
        append(node)
      }
      node = nodes[Int(node)].parent
    }
  }

  private mutating func append(_ node: Int32) { link(node, after: newest) }

  /// Puts a node into the list behind another; behind -1 is the old end.
  private mutating func link(_ node: Int32, after older: Int32) {
    let newer = older >= 0 ? nodes[Int(older)].newer : oldest
    nodes[Int(node)].older = older
    nodes[Int(node)].newer = newer
    if older >= 0 { nodes[Int(older)].newer = node } else { oldest = node }
    if newer >= 0 { nodes[Int(newer)].older = node } else { newest = node }
  }

  private mutating func unlink(_ node: Int32) {
    let older = nodes[Int(node)].older
    let newer = nodes[Int(node)].newer
    if older >= 0 { nodes[Int(older)].newer = newer } else { oldest = newer }
    if newer >= 0 { nodes[Int(newer)].older = older } else { newest = older }
    nodes[Int(node)].older = -1
    nodes[Int(node)].newer = -1
  }
}

/// The duty to give a lock on a prefix back: it cannot be copied, and dropping it stops the process. `RadixCache.unlock`
/// consumes it.
public struct PrefixLock: ~Copyable {
  /// The deepest node locked, -1 for the empty prefix.
  package let node: Int32

  fileprivate init(node: Int32) { self.node = node }

  /// Ends the duty. Only the cache may do so, or the one that drops the cache itself.
  consuming func end() { discard self }

  deinit {
    invariant(node < -1, "a lock on a prefix was dropped and not given back")
  }
}
