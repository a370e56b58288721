extension Scheduler {
  /// Stops the process unless the books are right: every page is free, in the tree, or held by exactly one request;
  /// counts agree with what they count; whoever waits holds nothing. O(pages + tree + requests): for tests, and for
  /// moments when nothing runs.
  public func checkInvariants() {
    allocator.checkInvariants()
    invariant(stepsInFlight <= 2, "more than two steps are in flight")

    // Everyone who holds pages has a slot, so the slots name all holders.
    var locks: [Int32] = []
    for case let req? in slots where req.lock != nil { locks.append(req.lock?.node ?? -1) }
    let isCached = cache.checkInvariants(capacity: allocator.capacity, heldLocks: locks)

    var isHeld = Array(repeating: false, count: allocator.capacity)
    var heldCount = 0
    func hold(_ page: Int32) {
      invariant(!allocator.contains(page), "page \(page) is in use and free")
      invariant(!isCached[Int(page)], "page \(page) is a request's own and in the tree")
      invariant(!isHeld[Int(page)], "page \(page) is held twice")
      isHeld[Int(page)] = true
      heldCount += 1
    }
    var leaving = 0
    var usedSlots = 0
    var inFlightRows = 0
    for (slot, req) in slots.enumerated() {
      guard let req else { continue }
      usedSlots += 1
      invariant(req.slot == Int32(slot), "a request is in a slot that it does not know")
      invariant(req.state != .waiting, "a waiting request has a slot")
      invariant((live[req.handle] === req) == (req.state != .finishing), "live requests and their handles differ")
      invariant(req.computedCount <= req.scheduledCount, "more was computed than scheduled")
      invariant(
        req.state == .finishing || req.scheduledCount <= req.tokens.count + req.pendingDraws,
        "more was scheduled than is known")
      invariant(req.pages.count == pageCount(for: req.scheduledCount), "a page table does not fit its sequence")
      invariant(req.sharedPages * kvPageSize <= req.computedCount, "pages were shared before they were computed")
      invariant(
        req.pendingDraws - req.draftCount <= req.inFlightCount && req.inFlightCount <= stepsInFlight,
        "draws without a step")
      invariant((req.lock != nil) == (req.sharedPages > 0), "shared pages and the lock on them do not go together")
      for page in req.pages[..<req.sharedPages] {
        invariant(isCached[Int(page)], "page \(page) is shared and not in the tree")
      }
      for page in req.pages[req.sharedPages...] { hold(page) }
      if req.state == .running {
        invariant(running.contains { $0 === req }, "a running request is not in the list of those that run")
      } else {
        invariant(req.inFlightCount > 0, "a request that left holds pages although no step needs them")
        leaving += req.pages.count
      }
      inFlightRows += req.inFlightCount
    }
    for entry in retiredPages {
      invariant(entry.step > completedStep, "a retired page outlived its step")
      hold(entry.page)
    }
    invariant(leaving == leavingPages, "pages about to leave are miscounted")
    invariant(
      allocator.freeCount + cache.cachedPages + heldCount == allocator.capacity,
      "pages leaked: \(allocator.freeCount) free + \(cache.cachedPages) cached + \(heldCount) held is not "
        + "\(allocator.capacity)")
    for (page, cached) in isCached.enumerated() where cached {
      invariant(!allocator.contains(Int32(page)), "page \(page) is cached and free")
    }
    invariant(inFlightRows == 0 || stepsInFlight > 0, "rows are in flight and no step is")
    invariant(usedSlots + freeSlots.count == slots.count, "slots leaked")
    invariant(Set(freeSlots).count == freeSlots.count, "a slot is free twice")

    invariant(running.count + waiting.count == live.count, "a request is in no list, or in two")
    for req in running { invariant(req.state == .running && slots[Int(req.slot)] === req, "not really running") }
    for (index, req) in waiting.enumerated() {
      invariant(req.state == .waiting || req.state == .retracting, "a request waits that is not waiting")
      invariant(index == 0 || comesBefore(waiting[index - 1], req), "the queue is out of order")
      guard req.state == .waiting else { continue }
      invariant(
        req.slot < 0 && req.pages.isEmpty && req.sharedPages == 0 && req.lock == nil && req.scheduledCount == 0
          && req.computedCount == 0 && req.pendingDraws == 0 && req.inFlightCount == 0,
        "a waiting request holds something")
    }
  }
}
