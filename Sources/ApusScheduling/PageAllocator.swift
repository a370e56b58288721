/// Knows which pages of the K/V pool are free. It deals in page numbers and never sees what a page holds.
///
/// A page is either free or out; every change of hands is checked on both sides, so a page released twice or one that
/// was never handed out stops the process at the place of the mistake. Allocation and release are O(1) and reuse the
/// page released last, whose bytes are the likeliest to be in a processor's cache.
public struct PageAllocator: ~Copyable {
  /// Pages in all; their numbers are 0..<capacity.
  public let capacity: Int
  /// The free pages, used as a stack.
  private var free: [Int32]
  /// By page: whether it lies on the stack.
  private var isFree: [Bool]

  /// Makes an allocator whose pages are all free. The first pages handed out are those with the smallest numbers.
  public init(capacity: Int) {
    invariant(capacity > 0 && capacity <= Int(Int32.max), "a pool has between 1 and 2^31 - 1 pages")
    self.capacity = capacity
    free = (0..<Int32(capacity)).reversed()
    isFree = Array(repeating: true, count: capacity)
  }

  /// Pages that are free.
  public var freeCount: Int { free.count }

  /// Hands out a page, or answers `nil` if none is free, which is an ordinary outcome.
  public mutating func allocate() -> Int32? {
    guard let page = free.popLast() else { return nil }
    invariant(isFree[Int(page)], "page \(page) was handed out although it is in use")
    isFree[Int(page)] = false
    return page
  }

  /// Takes a page back.
  public mutating func release(_ page: Int32) {
    invariant(page >= 0 && Int(page) < capacity, "page \(page) does not exist")
    invariant(!isFree[Int(page)], "page \(page) was released twice")
    isFree[Int(page)] = true
    free.append(page)
  }

  /// Whether a page is free. For checks.
  public func contains(_ page: Int32) -> Bool { isFree[Int(page)] }

  /// Stops the process unless stack and marks tell the same story. O(capacity).
  public func checkInvariants() {
    invariant(free.count == isFree.count(where: { $0 }), "the stack of free pages and their marks differ in number")
    for page in free { invariant(isFree[Int(page)], "page \(page) is on the stack and not marked free") }
  }
}
