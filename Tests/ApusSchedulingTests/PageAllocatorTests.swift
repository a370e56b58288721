import ApusScheduling
import ApusTesting
import Testing

@Suite struct PageAllocatorTests {
  /// Against a set, through random sequences.
  @Test func agreesWithASet() {
    for seed in UInt64(1)...200 {
      var random = SeededGenerator(seed: seed)
      let capacity = Int.random(in: 1...40, using: &random)
      var allocator = PageAllocator(capacity: capacity)
      var used: Set<Int32> = []
      for _ in 0..<200 {
        if random.chance(0.55) {
          let page = allocator.allocate()
          #expect((page == nil) == (used.count == capacity), "seed \(seed)")
          if let page {
            #expect(page >= 0 && Int(page) < capacity, "seed \(seed)")
            #expect(used.insert(page).inserted, "seed \(seed): page \(page) was handed out twice")
          }
        } else if let page = used.randomElement(using: &random) {
          used.remove(page)
          allocator.release(page)
        }
        #expect(allocator.freeCount == capacity - used.count, "seed \(seed)")
        allocator.checkInvariants()
      }
    }
  }

  @Test func handsOutSmallNumbersFirst() {
    var allocator = PageAllocator(capacity: 3)
    let pages = [allocator.allocate(), allocator.allocate(), allocator.allocate(), allocator.allocate()]
    #expect(pages == [0, 1, 2, nil])
  }

  @Test func aPageReleasedTwiceStopsTheProcess() async {
    await #expect(processExitsWith: .failure) {
      var allocator = PageAllocator(capacity: 2)
      if let page = allocator.allocate() {
        allocator.release(page)
        allocator.release(page)
      }
    }
  }
}
