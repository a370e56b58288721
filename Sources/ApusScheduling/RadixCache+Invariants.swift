extension RadixCache {
  /// Stops the process unless the tree is sound: edges and nodes agree, the counts of pages are right, no page occurs
  /// twice, locks cover whole paths, and the list of unlocked nodes is complete and in order. O(size of the tree).
  ///
  /// - Parameters:
  ///   - capacity: pages of the pool; the tree's numbers lie below it.
  ///   - heldLocks: for each lock that is out, the node it names. The locks counted in the tree must be exactly these.
  /// - Returns: by page, whether the tree holds it.
  @discardableResult
  package func checkInvariants(capacity: Int, heldLocks: [Int32]) -> [Bool] {
    var isCached = Array(repeating: false, count: capacity)
    var locks = Array(repeating: Int32(0), count: nodes.count)
    for lock in heldLocks {
      var node = lock
      while node >= 0 && nodes[Int(node)].parent >= 0 {
        locks[Int(node)] += 1
        node = nodes[Int(node)].parent
      }
    }

    var pageCount = 0
    var lockedCount = 0
    var edgeCount = 0
    var childCounts = Array(repeating: Int32(0), count: nodes.count)
    for (index, node) in nodes.enumerated() where node.isUsed {
      if node.parent < 0 {
        invariant(node.salt.flatMap { roots[$0] } == Int32(index), "a root is not filed under its salt")
        invariant(node.pages.isEmpty && node.tokens.isEmpty && node.childCount > 0, "a root is not a bare branching")
        continue
      }
      invariant(!node.pages.isEmpty, "node \(index) holds no page")
      invariant(node.tokens.count == node.pages.count * kvPageSize, "node \(index) has tokens without pages")
      invariant(nodes[Int(node.parent)].isUsed, "node \(index) hangs on a node that is gone")
      childCounts[Int(node.parent)] += 1
      edgeCount += 1
      let key = node.tokens.withUnsafeBytes {
        Edge(parent: node.parent, page: $0.loadUnaligned(as: SIMD16<Int32>.self))
      }
      invariant(edges[key] == Int32(index), "node \(index) cannot be reached from its parent")
      for page in node.pages {
        invariant(!isCached[Int(page)], "page \(page) occurs twice in the tree")
        isCached[Int(page)] = true
      }
      pageCount += node.pages.count
      if node.lockCount > 0 { lockedCount += node.pages.count }
      invariant(
        node.lockCount == locks[Int(index)], "node \(index) counts \(node.lockCount) locks, not \(locks[index])")
    }
    invariant(edgeCount == edges.count, "the tree has edges that lead nowhere")
    for (index, node) in nodes.enumerated() where node.isUsed {
      invariant(node.childCount == childCounts[index], "node \(index) miscounts its children")
    }
    invariant(pageCount == cachedPages, "the tree holds \(pageCount) pages and counts \(cachedPages)")
    invariant(lockedCount == lockedPages, "the tree has \(lockedCount) locked pages and counts \(lockedPages)")

    // The list: every unlocked node once, each older than its parent.
    var position = Array(repeating: -1, count: nodes.count)
    var length = 0
    var node = oldest
    var previous: Int32 = -1
    while node >= 0 {
      invariant(position[Int(node)] < 0, "the list of unlocked nodes runs in a circle")
      invariant(nodes[Int(node)].lockCount == 0 && nodes[Int(node)].isUsed, "a locked node is up for eviction")
      invariant(nodes[Int(node)].older == previous, "the list of unlocked nodes is torn")
      position[Int(node)] = length
      length += 1
      previous = node
      node = nodes[Int(node)].newer
    }
    invariant(previous == newest, "the list of unlocked nodes does not end at its end")
    for (index, node) in nodes.enumerated() where node.isUsed && node.parent >= 0 && node.lockCount == 0 {
      invariant(position[index] >= 0, "node \(index) is unlocked and cannot be evicted")
      let parent = position[Int(node.parent)]
      invariant(parent < 0 || parent > position[index], "node \(index) is younger than its parent")
    }
    return isCached
  }
}
