import ApusCore

/// The numbers of SGLang's admission control (`schedule_policy.py`, `scheduler.py`), which have served it well.
enum AdmissionConstants {
  /// The most output tokens that a request's reservation counts. A request that asks for more is admitted on trust.
  static let reservationLimit = 4096
  /// Completed steps over which the ratio falls from its initial to its least value.
  static let decaySteps = 600.0
  /// Steps of decoding that the ratio is raised by after a retraction.
  static let stepsAfterRetraction = 20
  /// Waiting requests above which policies that search the tree fall back to the order of arrival.
  static let prefixSearchLimit = 128
  /// Pages that a running request must be about to add, beyond what is cached, for another to wait for them.
  static let sharedPagesWorthWaiting = 2

  static func initialRatio(_ conservativeness: Double) -> Double { min(0.7 * conservativeness, 1) }
  static func leastRatio(_ conservativeness: Double) -> Double { 0.14 * initialRatio(conservativeness) }

  static func decay(_ ratio: Double, _ conservativeness: Double) -> Double {
    let least = leastRatio(conservativeness)
    return max(least, ratio - (initialRatio(conservativeness) - least) / decaySteps)
  }
}

/// Who enters, who makes room, in which order.
extension Scheduler {
  // MARK: Admission

  /// Admits waiting requests in the policy's order while budget, slots and pages last.
  ///
  /// A request is passed over, and blocks nobody, while its gate is closed or while a running request computes a prefix
  /// that both need. One that does not fit blocks those behind it: otherwise small requests would starve a large one.
  mutating func admit(into batch: inout ScheduleBatch, budget: inout Int) {
    guard budget > 0, !waiting.isEmpty, !freeSlots.isEmpty || configuration.policy == .priority else { return }
    let isReordered = orderWaiting()
    defer { order.removeAll(keepingCapacity: true) }
    var reserved = reservedTokens()
    var hasAdmitted = false
    var index = 0
    while budget > 0 && index < (isReordered ? order.count : waiting.count) {
      let req = isReordered ? order[index] : waiting[index]
      index += 1
      guard req.state == .waiting, req.gateIsOpen else { continue }
      let peek = peekPrefix(of: req)
      if waitsForPrefix(req, cachedPages: peek.pageCount) { continue }
      if !fits(req, peek, reserved: reserved) {
        if running.isEmpty && stepsInFlight == 0 && leavingPages == 0 {
          // The whole pool is to be had and is not enough. Outputs have made the request too long since it was taken.
          index -= 1
          abortForLackOfPages(req)
          continue
        }
        guard configuration.policy == .priority, preempt(for: req, peek), fits(req, peekPrefix(of: req), reserved: 0)
        else { break }
        reserved = reservedTokens()
      }
      enter(req, into: &batch, budget: &budget)
      hasAdmitted = true
      reserved += reservedTokens(for: req)
    }
    if hasAdmitted { waiting.removeAll { $0.state == .running } }
  }

  private func peekPrefix(of req: Req) -> RadixCache.Peek {
    guard configuration.cachesPrefixes else { return RadixCache.Peek(pageCount: 0, evictablePages: 0, node: -1) }
    return cache.peek(req.tokens, pageLimit: req.matchLimit, salt: req.salt)
  }

  /// Whether a request's tokens and its likely output fit beside what running requests are likely to need.
  private func fits(_ req: Req, _ peek: RadixCache.Peek, reserved: Int) -> Bool {
    if freeSlots.isEmpty { return false }
    let needed = pageCount(for: req.tokens.count) - peek.pageCount
    // The cached prefix stops being evictable once the request holds it.
    let available = allocator.freeCount + cache.evictablePages - peek.evictablePages
    if needed > available { return false }
    // Alone, a request may try with what there is: nobody can be retracted for it.
    if running.isEmpty { return true }
    let outputs = min(req.remainingOutputs, AdmissionConstants.reservationLimit)
    return needed * kvPageSize + outputs + reserved <= available * kvPageSize
  }

  /// Tokens that running requests will still need pages for: what is left of their prompts, and the share of their
  /// output that experience says is generated at the same time.
  private func reservedTokens() -> Int {
    var tokens = 0
    for req in running { tokens += reservedTokens(for: req) }
    return tokens
  }

  private func reservedTokens(for req: Req) -> Int {
    let outputs = min(req.remainingOutputs, AdmissionConstants.reservationLimit)
    let prompt = max(0, req.extendCount - 1)
    return prompt + Int((Double(outputs) * newTokenRatio).rounded(.up))
  }

  /// Gives a request its slot, its cached prefix and its first chunk.
  private mutating func enter(_ req: Req, into batch: inout ScheduleBatch, budget: inout Int) {
    guard let slot = freeSlots.popLast() else { fatalError("a request was admitted without a slot") }
    slots[Int(slot)] = req
    req.slot = slot
    req.state = .running
    if configuration.cachesPrefixes {
      let match = cache.matchPrefix(req.tokens, pageLimit: req.matchLimit, salt: req.salt)
      if match.pageCount > 0 {
        cache.copyPages(of: match, to: &req.pages)
        req.lock = cache.lock(match)
        req.sharedPages = match.pageCount
      }
    }
    req.checkpointPages = configuration.cachesPrefixes ? req.tokens.count / kvPageSize : 0
    req.scheduledCount = req.sharedPages * kvPageSize
    req.computedCount = req.scheduledCount
    if req.retractions == 0 {
      req.cachedTokens = req.scheduledCount
      counts.promptTokens += req.promptCount
      counts.cachedTokens += req.cachedTokens
    }
    running.append(req)
    batch.assigned.append(
      SlotAssignment(
        slot: slot, sampling: req.sampling, stopTokenIDs: req.stopTokenIDs, logprobs: req.logprobs,
        tokens: req.tokens, promptCount: req.promptCount, constraint: req.constraint,
        unscoredCount: req.unreportedCount, cacheSalt: req.salt))
    let count = chunk(req.extendCount, for: req, budget: budget)
    let isScheduled = count > 0 && schedule(req, count: count, into: &batch)
    invariant(isScheduled, "a request was admitted for which there is no page")
    budget -= count
  }

  /// Whether a running request is about to put pages into the tree that this one can use: then waiting is cheaper than
  /// computing them again. The wait ends with the other's prompt, however that ends.
  private func waitsForPrefix(_ req: Req, cachedPages: Int) -> Bool {
    guard configuration.cachesPrefixes, configuration.sharesPrefixesInBatch else { return false }
    let page = cachedPages + AdmissionConstants.sharedPagesWorthWaiting - 1
    guard page < min(req.matchLimit, req.pageHashes.count) else { return false }
    let hash = req.pageHashes[page]
    return running.contains { leader in
      leader.isFillingCache && page < leader.pageHashes.count && leader.pageHashes[page] == hash
    }
  }

  // MARK: Order

  /// Whether one request stands before another in `waiting`. Policies that look at the tree order anew at each
  /// admission, from the order of arrival.
  func comesBefore(_ left: Req, _ right: Req) -> Bool {
    switch configuration.policy {
    case .longestOutputFirst where left.maxOutputs != right.maxOutputs: left.maxOutputs > right.maxOutputs
    case .priority where left.priority != right.priority: left.priority > right.priority
    default: left.arrival < right.arrival
    }
  }

  /// Puts a request into `waiting`, at its place. O(1) for a newcomer who goes last.
  mutating func enqueue(_ req: Req) {
    var low = 0
    var high = waiting.count
    if let last = waiting.last, comesBefore(last, req) { low = high }
    while low < high {
      let middle = (low + high) / 2
      if comesBefore(waiting[middle], req) { low = middle + 1 } else { high = middle }
    }
    waiting.insert(req, at: low)
  }

  /// Fills `order` if the policy depends on the tree.
  private mutating func orderWaiting() -> Bool {
    guard waiting.count <= AdmissionConstants.prefixSearchLimit, configuration.cachesPrefixes else { return false }
    switch configuration.policy {
    case .firstComeFirstServed, .longestOutputFirst, .priority:
      return false
    case .longestPrefixMatch:
      for req in waiting { req.sortKey = peekPrefix(of: req).pageCount }
      order.append(contentsOf: waiting)
      order.sort { ($0.sortKey, $1.arrival) > ($1.sortKey, $0.arrival) }
      return true
    case .depthFirstWeight:
      orderByWeight()
      return true
    }
  }

  /// Fills `order` by walking the part of the tree that waiting requests match, branches with more requests first, and
  /// a node's branches before the requests that end at it.
  private mutating func orderByWeight() {
    var weights: [Int32: Int] = [:]
    var children: [Int32: [Int32]] = [:]
    var endings: [Int32: [Req]] = [:]
    for req in waiting {
      var node = peekPrefix(of: req).node
      endings[node, default: []].append(req)
      // -1 stands for the whole forest of namespaces, above all roots.
      while node >= 0 {
        let parent = cache.nodes[Int(node)].parent
        if weights[node] == nil { children[parent, default: []].append(node) }
        weights[node, default: 0] += 1
        node = parent
      }
    }
    var stack: [(node: Int32, isEnd: Bool)] = [(-1, false)]
    while let (node, isEnd) = stack.popLast() {
      if isEnd {
        order.append(contentsOf: endings[node] ?? [])
        continue
      }
      stack.append((node, true))
      // The heaviest is pushed last and so comes first. Equal weights go by number, so that runs repeat.
      let branches = (children[node] ?? []).sorted {
        (weights[$0] ?? 0, $1) < (weights[$1] ?? 0, $0)
      }
      for child in branches { stack.append((child, false)) }
    }
  }

  // MARK: Making room

  /// Sees to it that every running request that lags by one token can have its page, retracting others if need be.
  /// - Returns: whether somebody was retracted; then nobody is admitted in this step.
  mutating func secureDecodePages() -> Bool {
    var needed = 0
    for req in running where req.extendCount == 1 && req.scheduledCount == req.pages.count * kvPageSize { needed += 1 }
    var hasRetracted = false
    // Pages that leave with a step in flight count as there: whoever gets none in this step gets one in the next.
    while needed > allocator.freeCount + cache.evictablePages + leavingPages && running.count > 1 {
      guard let victim = victim(among: running) else { break }
      if victim.extendCount == 1 && victim.scheduledCount == victim.pages.count * kvPageSize { needed -= 1 }
      retract(victim)
      hasRetracted = true
    }
    if hasRetracted { raiseRatio() }
    return hasRetracted
  }

  /// Called when nothing is in flight and nobody can go on for lack of pages.
  mutating func makeRoom() {
    guard running.count > 1, let victim = victim(among: running) else {
      abortForLackOfPages(running[0])
      return
    }
    retract(victim)
    raiseRatio()
  }

  private mutating func abortForLackOfPages(_ req: Req) {
    finish(
      req,
      .abort(
        "The K/V cache of \(allocator.capacity * kvPageSize) tokens is too small for this request, which has "
          + "\(req.tokens.count) tokens and is not finished. Ask for fewer tokens or start the engine with a larger cache."
      ))
  }

  /// Who is retracted first: the least urgent, then the one that has generated least, whose work is cheapest to repeat,
  /// then the one with the longest prompt, which frees most, then the youngest.
  ///
  /// Whoever has generated most is retracted last, so some request always runs to its end: retractions cannot go on for
  /// ever.
  private func victim(among candidates: [Req]) -> Req? {
    let isByPriority = configuration.policy == .priority
    return candidates.min { left, right in
      if isByPriority && left.priority != right.priority { return left.priority < right.priority }
      if left.outputCount != right.outputCount { return left.outputCount < right.outputCount }
      if left.promptCount != right.promptCount { return left.promptCount > right.promptCount }
      return left.arrival > right.arrival
    }
  }

  /// Takes a running request back to the queue. Its outputs stay; its pages go into the tree, where they are the first
  /// to be used if it returns in time and the first to be evicted for others if it does not.
  private mutating func retract(_ req: Req) {
    guard let index = running.firstIndex(where: { $0 === req }) else {
      fatalError("only a running request can be retracted")
    }
    running.remove(at: index)
    req.state = .retracting
    req.retractions += 1
    req.drafts.removeAll()
    req.draftParents.removeAll()
    counts.retractions += 1
    leavingPages += req.pages.count
    enqueue(req)
    if req.inFlightCount == 0 { leave(req) }
  }

  /// After a retraction: the ratio was too hopeful. The new one covers what was generated and some steps more.
  private mutating func raiseRatio() {
    var generated = 0
    var requested = 0
    for req in running {
      generated += req.outputCount
      requested += min(req.maxOutputs, AdmissionConstants.reservationLimit)
    }
    let estimate =
      Double(generated + AdmissionConstants.stepsAfterRetraction * running.count) / Double(requested + 1)
    newTokenRatio = min(1, max(newTokenRatio, estimate))
  }

  /// Retracts running requests that are less urgent by the threshold, least urgent first, until a waiting one may fit.
  /// Whoever has a row in a launched step, or in the one being decided, leaves when that step ends.
  /// - Returns: whether somebody was retracted.
  private mutating func preempt(for req: Req, _ peek: RadixCache.Peek) -> Bool {
    // What is already leaving comes first: see what that brings.
    if leavingPages > 0 { return false }
    var candidates = running.filter { req.priority - $0.priority >= configuration.preemptionThreshold }
    let needed = pageCount(for: req.tokens.count) - peek.pageCount
    var supply = allocator.freeCount + cache.evictablePages - peek.evictablePages
    var slotCount = freeSlots.count
    var hasRetracted = false
    while supply < needed || slotCount == 0 || !hasRetracted, let victim = victim(among: candidates) {
      candidates.removeAll { $0 === victim }
      supply += victim.pages.count
      slotCount += 1
      retract(victim)
      hasRetracted = true
    }
    return hasRetracted
  }
}
