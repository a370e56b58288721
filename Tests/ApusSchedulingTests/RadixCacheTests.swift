import ApusCore
import ApusScheduling
import ApusTesting
import Testing

/// What a radix cache does, said with a dictionary: every cached prefix of whole pages, by salt, with its page and the
/// time of its last use.
private struct Model {
  struct Key: Hashable {
    var salt: String
    var tokens: ArraySlice<TokenID>
  }

  struct Entry {
    var page: Int32
    var locks = 0
  }

  var entries: [Key: Entry] = [:]

  static func key(_ tokens: [TokenID], _ pages: Int, _ salt: String) -> Key {
    Key(salt: salt, tokens: tokens[..<(pages * kvPageSize)])
  }

  func matchedPages(_ tokens: [TokenID], limit: Int, salt: String) -> [Int32] {
    var pages: [Int32] = []
    while pages.count < min(limit, tokens.count / kvPageSize),
      let entry = entries[Self.key(tokens, pages.count + 1, salt)]
    {
      pages.append(entry.page)
    }
    return pages
  }

  var evictable: Int { entries.values.count { $0.locks == 0 } }
}

@Suite struct RadixCacheTests {
  /// Against the dictionary, through random inserts, matches, locks and evictions.
  @Test func agreesWithADictionaryOfPrefixes() {
    for seed in UInt64(1)...300 {
      var random = SeededGenerator(seed: seed)
      let capacity = Int.random(in: 4...60, using: &random)
      var allocator = PageAllocator(capacity: capacity)
      var cache = RadixCache()
      var model = Model()
      var locked: [(tokens: [TokenID], pages: Int, salt: String)] = []
      let locks = LockBox()
      // Few different pages, so that sequences share beginnings and part at every place.
      func sequence() -> (tokens: [TokenID], salt: String) {
        let pages = (0..<Int.random(in: 0...6, using: &random)).map { _ in TokenID.random(in: 0...2, using: &random) }
        let tail = (0..<Int.random(in: 0..<kvPageSize, using: &random)).map { _ in TokenID(9) }
        // Pages differ in their last token, the hardest place.
        let tokens = pages.flatMap { Array(repeating: TokenID(1), count: kvPageSize - 1) + [$0] } + tail
        return (tokens, random.chance(0.2) ? "salt" : "")
      }

      for _ in 0..<120 {
        let (tokens, salt) = sequence()
        let whole = tokens.count / kvPageSize
        switch Int.random(in: 0..<10, using: &random) {
        case 0..<4:
          // Insert, as a request does: pages that match are the tree's, the others are fresh.
          let known = model.matchedPages(tokens, limit: whole, salt: salt).count
          var pages: [Int32] = []
          while pages.count < whole, let page = allocator.allocate() { pages.append(page) }
          let count = pages.count
          let present = cache.insert(tokens, pages: pages, pageCount: count, salt: salt)
          #expect(present == min(known, count), "seed \(seed)")
          for index in present..<max(count, present) {
            model.entries[Model.key(tokens, index + 1, salt)] = Model.Entry(page: pages[index])
          }
          for page in pages[..<present] { allocator.release(page) }
        case 4..<6:
          let limit = Int.random(in: 0...7, using: &random)
          let expected = model.matchedPages(tokens, limit: limit, salt: salt)
          let peek = cache.peek(tokens, pageLimit: limit, salt: salt)
          #expect(peek.pageCount == expected.count, "seed \(seed)")
          let open = (0..<expected.count).count { model.entries[Model.key(tokens, $0 + 1, salt)]?.locks == 0 }
          #expect(peek.evictablePages == open, "seed \(seed)")
          let match = cache.matchPrefix(tokens, pageLimit: limit, salt: salt)
          var pages: [Int32] = []
          cache.copyPages(of: match, to: &pages)
          #expect(pages == expected, "seed \(seed)")
        case 6:
          let match = cache.matchPrefix(tokens, pageLimit: whole, salt: salt)
          locks.append(cache.lock(match))
          locked.append((tokens, match.pageCount, salt))
          for index in 0..<match.pageCount { model.entries[Model.key(tokens, index + 1, salt)]?.locks += 1 }
        case 7:
          guard let index = locked.indices.randomElement(using: &random) else { break }
          let entry = locked.remove(at: index)
          cache.unlock(locks.remove(at: index))
          for page in 0..<entry.pages { model.entries[Model.key(entry.tokens, page + 1, entry.salt)]?.locks -= 1 }
        default:
          let wanted = Int.random(in: 0...5, using: &random)
          let before = model.evictable
          let free = allocator.freeCount
          let count = cache.evict(wanted, into: &allocator)
          #expect(count == min(wanted, before), "seed \(seed): evicts what it can and no more")
          #expect(allocator.freeCount == free + count, "seed \(seed)")
          // Which ones: those whose page is free now. They must be unlocked, and ends of branches.
          let gone = model.entries.filter { allocator.contains($0.value.page) }
          #expect(gone.count == count, "seed \(seed)")
          for key in gone.keys { model.entries[key] = nil }
          for (key, entry) in gone {
            #expect(entry.locks == 0, "seed \(seed): a locked page was evicted")
            let orphans = model.entries.keys.contains {
              $0.salt == key.salt && $0.tokens.count > key.tokens.count && $0.tokens.starts(with: key.tokens)
            }
            #expect(!orphans, "seed \(seed): a page was evicted before those that follow it")
          }
        }
        #expect(cache.cachedPages == model.entries.count, "seed \(seed)")
        #expect(cache.evictablePages == model.evictable, "seed \(seed)")
        #expect(allocator.freeCount + cache.cachedPages == capacity, "seed \(seed)")
        cache.checkInvariants(capacity: capacity, locks: locks)
      }
      while locks.count > 0 { cache.unlock(locks.remove(at: 0)) }
      cache.removeAll(into: &allocator)
      #expect(allocator.freeCount == capacity, "seed \(seed)")
    }
  }

  /// Branches go in the order of their last use, whether that was an insert, a match or the end of a lock.
  @Test func evictsTheLeastRecentlyUsedFirst() {
    for seed in UInt64(1)...200 {
      var random = SeededGenerator(seed: seed)
      var allocator = PageAllocator(capacity: 20)
      var cache = RadixCache()
      var order: [Int] = []
      var pages: [Int: Int32] = [:]
      func tokens(_ branch: Int) -> [TokenID] { Array(repeating: TokenID(branch), count: kvPageSize) }
      for branch in 0..<10 {
        guard let page = allocator.allocate() else { break }
        pages[branch] = page
        _ = cache.insert(tokens(branch), pages: [page], pageCount: 1, salt: "")
        order.append(branch)
      }
      for _ in 0..<30 {
        let branch = Int.random(in: 0..<10, using: &random)
        let match = cache.matchPrefix(tokens(branch), pageLimit: 1, salt: "")
        if random.chance(0.5) { cache.unlock(cache.lock(match)) }
        order.removeAll { $0 == branch }
        order.append(branch)
      }
      for branch in order {
        cache.evict(1, into: &allocator)
        let isGone = allocator.contains(pages[branch] ?? 0)
        #expect(isGone, "seed \(seed): branch \(branch) was next in \(order)")
      }
    }
  }

  @Test func aSharedBeginningOutlivesItsBranches() {
    var allocator = PageAllocator(capacity: 8)
    var cache = RadixCache()
    let stem = Array(repeating: TokenID(1), count: 2 * kvPageSize)
    for branch in 0..<2 {
      let tokens = stem + Array(repeating: TokenID(5 + branch), count: kvPageSize)
      let pages = (0..<3).compactMap { _ in allocator.allocate() }
      let present = cache.insert(tokens, pages: pages, pageCount: 3, salt: "")
      for page in pages[..<present] { allocator.release(page) }
      #expect(present == (branch == 0 ? 0 : 2))
    }
    #expect(cache.cachedPages == 4)
    cache.evict(2, into: &allocator)
    let whole = cache.peek(stem, pageLimit: 9, salt: "")
    #expect(whole.pageCount == 2)
    cache.evict(1, into: &allocator)
    // A long label goes page by page from its end.
    let rest = cache.peek(stem, pageLimit: 9, salt: "")
    #expect(rest.pageCount == 1)
    cache.removeAll(into: &allocator)
  }

  @Test func saltsShareNothingAndLeaveNothing() {
    var allocator = PageAllocator(capacity: 4)
    var cache = RadixCache()
    let tokens = Array(repeating: TokenID(1), count: kvPageSize)
    for salt in ["", "a"] {
      guard let page = allocator.allocate() else { return }
      let present = cache.insert(tokens, pages: [page], pageCount: 1, salt: salt)
      #expect(present == 0)
    }
    let other = cache.peek(tokens, pageLimit: 1, salt: "b")
    #expect(other.pageCount == 0)
    #expect(cache.cachedPages == 2)
    cache.evict(2, into: &allocator)
    cache.checkInvariants(capacity: 4, locks: LockBox())
    #expect(allocator.freeCount == 4)
  }

  @Test func aDroppedLockStopsTheProcess() async {
    await #expect(processExitsWith: .failure) {
      var cache = RadixCache()
      let match = cache.matchPrefix([1], pageLimit: 1, salt: "")
      _ = cache.lock(match)
    }
  }
}

/// Locks cannot be copied and so cannot lie in an array of the standard library: each gets a box.
private final class LockBox {
  private final class Box {
    var lock: PrefixLock?
    let node: Int32

    init(_ lock: consuming PrefixLock) {
      node = lock.node
      self.lock = consume lock
    }
  }

  private var boxes: [Box] = []
  var count: Int { boxes.count }
  var nodes: [Int32] { boxes.map(\.node) }

  func append(_ lock: consuming PrefixLock) { boxes.append(Box(lock)) }

  func remove(at index: Int) -> PrefixLock {
    let box = boxes.remove(at: index)
    guard let lock = box.lock.take() else { fatalError("a lock was taken twice") }
    return lock
  }
}

extension RadixCache {
  fileprivate func checkInvariants(capacity: Int, locks: LockBox) {
    checkInvariants(capacity: capacity, heldLocks: locks.nodes)
  }
}
