public import ApusCore

/// Decides what each step computes, and keeps the books on what steps brought.
///
/// A value that takes facts and returns decisions: no tensors, no clock, no I/O, one thread. `apply` takes commands,
/// `next` decides a step, `complete` takes what a step brought; events for the outside collect in `events`. The same
/// calls in the same order give the same decisions, wherever they run.
///
/// **Overlap.** `next` may be called while one step is in flight, so that the executor never waits for the bookkeeping.
/// The token that the step in flight draws is then referred to and not named. Consequences, all of them here:
/// a request that turns out to have ended may have a row in the step already launched, whose token is dropped; pages and
/// slot of whoever leaves are given back only when no launched step names them; a request whose length is reached by the
/// draw in flight is not scheduled again.
public struct Scheduler: ~Copyable {
  /// The limits and the policy.
  public let configuration: SchedulerConfiguration
  /// What happened since `removeEvents`, in order.
  public private(set) var events: [Event] = []

  var allocator: PageAllocator
  var cache = RadixCache()

  /// Every request that has not ended.
  var live: [UInt64: Req] = [:]
  /// Those that wait, in the policy's fixed order (see `comesBefore`).
  var waiting: [Req] = []
  /// Those that are computed, in order of admission.
  var running: [Req] = []
  /// By slot: who has it. A slot outlives the request's stay in `running` while a launched step names it.
  var slots: [Req?]
  var freeSlots: [Int32]
  /// Slots given back since the last batch, which tells the runner.
  var releasedSlots: [Int32] = []
  /// Pages that left a page table while a launched step still reads them through it, with that step's number.
  var retiredPages: [(step: UInt64, page: Int32)] = []
  /// Pages that come free when the steps in flight end: those of requests that are retracting or finishing. An upper
  /// bound, since the tree may keep some for others.
  var leavingPages = 0

  /// A step in flight brings draft tokens for the next one.
  private var awaitsDrafts = false
  /// By `costClass`: whether drafts are worth it.
  private var drafting = Array(repeating: DraftRecord(), count: Self.costClassCount)
  private var draftCosts: DraftCosts
  /// How each launched step was meant to go.
  private var launchedWays: [(way: DraftGovernor.Way, costClass: Int)] = []
  /// The slots of the step that completed last, if it only decoded.
  private var decodedSlots: [Int32] = []
  var launchedStep: UInt64 = 0
  var completedStep: UInt64 = 0
  var arrivals: UInt64 = 0
  /// The share of requested output that admission reserves for each running request.
  var newTokenRatio: Double
  /// Scratch of the policies that order anew each time.
  var order: [Req] = []

  private var pendingFlushes: [UInt64] = []
  private var drainReplies: [UInt64] = []
  private var isDraining = false
  /// Whether `Command.shutdown` was applied. The loop ends once the scheduler is idle too.
  public private(set) var isShuttingDown = false

  var counts = ServiceStatistics()

  /// Makes a scheduler whose pool and cache are empty.
  /// - Throws: `invalidRequest` for an impossible configuration.
  public init(_ configuration: SchedulerConfiguration) throws(EngineError) {
    try configuration.validate()
    self.configuration = configuration
    draftCosts = configuration.draftCosts
    allocator = PageAllocator(capacity: configuration.pageCount)
    slots = Array(repeating: nil, count: configuration.maxRunningRequests)
    freeSlots = (0..<Int32(configuration.maxRunningRequests)).reversed()
    newTokenRatio = AdmissionConstants.initialRatio(configuration.conservativeness)
  }

  deinit {
    // The tree goes too, so the locks on it end without being given back.
    for case let req? in slots {
      if let lock = req.lock.take() { lock.end() }
    }
  }

  /// Whether there is nothing to do and nothing in flight, so that only a command can change that.
  public var isIdle: Bool { live.isEmpty && stepsInFlight == 0 }

  /// Steps launched and not completed; at most two.
  public var stepsInFlight: Int { Int(launchedStep - completedStep) }

  /// Forgets the events that were delivered, and keeps their memory.
  public mutating func removeEvents() { events.removeAll(keepingCapacity: true) }

  // MARK: apply

  /// Takes a command.
  public mutating func apply(_ command: Command) {
    switch command {
    case .submit(let submission):
      submit(submission)
    case .open(let handle, let constraint):
      if let req = live[handle] {
        req.gateIsOpen = true
        if let constraint { req.constraint = constraint }
      }
    case .reject(let handle, let error):
      if let req = live[handle], req.state == .waiting, !req.gateIsOpen {
        counts.rejectedRequests += 1
        events.append(.rejected(handle: handle, error))
        live[handle] = nil
        req.state = .finishing
        removeFromWaiting(req)
      }
    case .abort(let handle, let reason):
      if let req = live[handle] { finish(req, .abort(reason)) }
    case .abortAll(let reason):
      abortAll(reason)
    case .finish(let handle, let reason):
      if let req = live[handle] { finish(req, reason) }
    case .flushCache(let reply):
      pendingFlushes.append(reply)
    case .cancelFlush(let reply):
      if let index = pendingFlushes.firstIndex(of: reply) {
        pendingFlushes.remove(at: index)
        events.append(.flushed(reply: reply, false))
      }
    case .drain(let reply):
      isDraining = true
      drainReplies.append(reply)
    case .shutdown(let reason):
      isDraining = true
      isShuttingDown = true
      abortAll(reason)
      for reply in pendingFlushes { events.append(.flushed(reply: reply, false)) }
      pendingFlushes.removeAll()
    }
    settle()
  }

  private mutating func submit(_ submission: Submission) {
    if let error = refusal(of: submission) {
      counts.rejectedRequests += 1
      events.append(.rejected(handle: submission.handle, error))
      return
    }
    invariant(live[submission.handle] == nil, "handle \(submission.handle) is in use")
    invariant(submission.sampling.seed != nil, "a submission's seed is drawn before it is submitted")
    arrivals += 1
    let req = Req(submission, arrival: arrivals, contextLength: configuration.contextLength)
    live[req.handle] = req
    enqueue(req)
  }

  /// Why a submission is not taken, if it is not.
  private func refusal(of submission: Submission) -> EngineError? {
    let count = submission.tokens.count
    if isDraining { return EngineError(.shuttingDown, "The engine is stopping and takes no new requests.") }
    if count == 0 {
      return EngineError(.invalidRequest, "The prompt must hold at least one token.", parameter: "prompt")
    }
    let room = submission.sampling.maxNewTokens == 0 ? 0 : 1
    if count + room > configuration.contextLength {
      return EngineError(
        .promptTooLong,
        "The prompt has \(count) tokens, but the longest sequence is \(configuration.contextLength) tokens, output "
          + "included. Shorten the prompt.", parameter: "prompt")
    }
    if pageCount(for: count) > configuration.pageCount {
      return EngineError(
        .promptTooLong,
        "The prompt has \(count) tokens, but the K/V cache holds \(configuration.pageCount * kvPageSize). Shorten the "
          + "prompt or start the engine with a larger cache.", parameter: "prompt")
    }
    if let start = submission.logprobs?.promptStart, start < 0 || start > count {
      return EngineError(
        .invalidRequest, "logprob_start_len must lie between 0 and the prompt's length (\(count)), got \(start).",
        parameter: "logprob_start_len")
    }
    if waiting.count >= configuration.maxQueuedRequests {
      return EngineError(
        .queueFull, "All \(configuration.maxQueuedRequests) places in the queue are taken. Try again later.")
    }
    return nil
  }

  private mutating func abortAll(_ reason: String) {
    // In order of arrival, so that the same commands give the same events.
    for req in live.values.sorted(by: { $0.arrival < $1.arrival }) { finish(req, .abort(reason)) }
  }

  // MARK: next

  /// Decides the next step.
  ///
  /// There is no prefill and no decode phase. Each running request has tokens known (or about to be drawn) and tokens
  /// whose K/V exist; the second count chases the first under the step's token budget. A request that lags by one token
  /// is what others call decoding, by more is prefill, by more than the budget chunked prefill; a prefix hit makes it
  /// lag by less, a retraction by all. Those that lag by one come first, so a long prompt never holds up a running
  /// answer; then the others in order of admission; then, with what is left, new ones.
  ///
  /// - Parameter batch: replaced by the decision. Its arrays' memory is reused.
  /// - Returns: whether there is a step to launch. If not, and nothing is in flight, only a command can change that.
  /// - Precondition: at most one step is in flight. A batch returned is launched, and completed in order.
  public mutating func next(into batch: inout ScheduleBatch) -> Bool {
    invariant(stepsInFlight < 2, "a third step would be in flight")
    if awaitsDrafts { return false }
    while true {
      batch.removeAll()
      var budget = configuration.tokenBudget
      let hasRetracted = secureDecodePages()
      scheduleDecodes(into: &batch, budget: &budget)
      scheduleExtends(into: &batch, budget: &budget)
      if !hasRetracted { admit(into: &batch, budget: &budget) }
      if !batch.requests.isEmpty { break }
      // With a step in flight, what it frees is worth waiting for. Otherwise whoever cannot go on makes room.
      if stepsInFlight > 0 { return false }
      if !running.isEmpty {
        makeRoom()
      } else if !hasRetracted {
        settle()
        return false
      }
    }
    dropStaleDrafts()
    let way = askForDrafts(in: &batch)
    if configuration.measuresDrafting { launchedWays.append((way, Self.costClass(running.count))) }
    launchedStep += 1
    batch.step = launchedStep
    batch.released.append(contentsOf: releasedSlots)
    releasedSlots.removeAll(keepingCapacity: true)
    return true
  }

  /// Gives one token to each running request that lags by one, as far as pages reach, and verifies its drafts. The budget
  /// reaches for all: a request is admitted only with budget that a step left over.
  private mutating func scheduleDecodes(into batch: inout ScheduleBatch, budget: inout Int) {
    var others = running.count { $0.extendCount == 1 }
    for req in running where req.extendCount == 1 {
      if budget == 0 { return }
      others -= 1
      // The tokens that others have a right to come before anybody's drafts.
      let drafts = takeDrafts(of: req, budget: budget - 1 - others)
      if !drafts.isEmpty && schedule(req, count: 1, drafts: drafts, into: &batch) {
        budget -= 1 + drafts.count
      } else if schedule(req, count: 1, into: &batch) {
        budget -= 1
      }
    }
  }

  // MARK: Speculation

  /// The tokens proposed for a request, as many as there is a use for.
  private func takeDrafts(of req: Req, budget: Int) -> [TokenID] {
    if req.drafts.isEmpty { return [] }
    let drafts = req.drafts
    // What is left out is the end of a list in which nobody comes before the one that it follows.
    req.drafts.removeAll(keepingCapacity: true)
    // A draft needs to know the tokens before it, and the last token wanted needs no draft behind it.
    guard req.pendingDraws == 0 else { return [] }
    return Array(drafts.prefix(max(0, min(req.remainingOutputs - 1, budget))))
  }

  /// Forgets drafts that found no place in the step that was made for them. The runner has pages for the trees that it
  /// proposes in one step, not for older ones beside them.
  private func dropStaleDrafts() {
    guard configuration.draftTokens > 0 else { return }
    for req in running where !req.drafts.isEmpty {
      req.drafts.removeAll(keepingCapacity: true)
      req.draftParents.removeAll(keepingCapacity: true)
    }
  }

  /// Asks for draft tokens for the requests that draw a token in this step, unless the time would better be spent on
  /// others: a prompt is being computed, or requests wait. While drafts are awaited no other step is launched, since it
  /// could not know them; where few requests run that costs little.
  /// - Returns: which way the step counts for.
  private mutating func askForDrafts(in batch: inout ScheduleBatch) -> DraftGovernor.Way {
    let hasDrafts = configuration.measuresDrafting && batch.requests.contains { $0.draftCount > 0 }
    guard configuration.draftTokens > 0, running.count <= configuration.maxDraftingRequests, waiting.isEmpty,
      running.allSatisfy({ $0.hasStarted || $0.extendCount == 0 || $0.pendingDraws > 0 })
    else { return hasDrafts ? .drafting : .plain }
    var isTrying = false
    if configuration.measuresDrafting {
      let number = Self.costClass(running.count)
      // A step that verifies what was drafted before belongs to the drafting.
      if drafting[number].governor.way == .plain { return hasDrafts ? .drafting : .plain }
      // Even against the prices now and then: these may be wrong, and without drafts nobody would see it.
      isTrying = drafting[number].governor.isTryingDrafts
      if draftCosts.leastChance(requests: running.count) >= 1 {
        drafting[number].forbiddenSteps += 1
        if drafting[number].forbiddenSteps % DraftGovernor.shortestWait < DraftGovernor.probeSteps { isTrying = true }
      }
      if running.count > Self.mostTrying { isTrying = false }
    }
    for index in batch.requests.indices where batch.requests[index].samples {
      guard let req = slots[Int(batch.requests[index].slot)] else { continue }
      let room = min(configuration.draftTokens, req.remainingOutputs - 1, configuration.tokenBudget - 1)
      let paced = req.pace.next(costs: draftCosts, requests: running.count)
      let limit = min(isTrying ? max(1, paced) : paced, room)
      guard limit > 0 else { continue }
      batch.requests[index].draftLimit = Int32(limit)
      batch.requests[index].draftLeast = Float(min(draftCosts.leastChance(requests: running.count), 1))
      awaitsDrafts = true
    }
    return .drafting
  }

  /// What steps of about as many requests showed.
  private struct DraftRecord {
    var governor = DraftGovernor()
    /// Seconds that the model ran for a step without drafts; 0 before there was one.
    var plainSeconds = 0.0
    /// Steps for which the prices forbade all drafts.
    var forbiddenSteps = 0
  }

  /// Above that many requests drafts are not tried against the prices.
  private static let mostTrying = 4
  private static let costClassCount = 18

  /// Numbers of requests that are taken as one: 1, 2, 3 and 4, 5 to 8, and so on.
  private static func costClass(_ requests: Int) -> Int {
    min(Int.bitWidth - max(0, requests - 1).leadingZeroBitCount, costClassCount - 1)
  }

  /// Learns from what a step took, if it and the one before only continued texts: then there was no pause between them.
  /// Called before anything else is noted of the step.
  private mutating func learn(_ batch: ScheduleBatch, _ result: StepResult) {
    let launched = launchedWays.removeFirst()
    let isDecoding = batch.requests.allSatisfy { $0.samples && slots[Int($0.slot)]?.hasStarted == true }
    let hasPredecessor = isDecoding && batch.requests.contains { decodedSlots.contains($0.slot) }
    decodedSlots.removeAll(keepingCapacity: true)
    guard isDecoding, batch.requests.count <= configuration.maxDraftingRequests else { return }
    for request in batch.requests { decodedSlots.append(request.slot) }
    guard hasPredecessor, result.failures.isEmpty else { return }
    let number = launched.costClass
    let verified = batch.requests.reduce(0) { $0 + Int($1.draftCount) }
    let asks = batch.requests.contains { $0.draftLimit > 0 }
    drafting[number].governor.note(launched.way, seconds: result.stepSeconds, tokens: result.tokens.count)
    if verified == 0 && !asks {
      let old = drafting[number].plainSeconds
      drafting[number].plainSeconds = old == 0 ? result.forwardSeconds : old + 0.05 * (result.forwardSeconds - old)
    } else if drafting[number].plainSeconds > 0 {
      draftCosts.correct(
        seconds: result.forwardSeconds - result.draftSeconds, draftSeconds: result.draftSeconds,
        plainSeconds: drafting[number].plainSeconds, requests: batch.requests.count, verified: verified,
        drafted: result.drafts.reduce(0) { $0 + $1.tokens.count })
    }
  }

  /// Takes how many of a request's draft tokens were accepted, and frees what the others took.
  private mutating func settleDrafts(_ req: Req, accepted: Int, of count: Int) {
    counts.draftTokens += count
    counts.acceptedDraftTokens += accepted
    counts.verifications += 1
    req.speculation =
      req.speculation + SpeculationCounts(verifications: 1, draftTokens: count, acceptedTokens: accepted)
    req.pace.note(accepted: accepted, of: req.draftDepth)
    rewind(req)
  }

  /// Forgets what was scheduled and does not count as computed.
  private mutating func rewind(_ req: Req) {
    guard req.state == .running || req.state == .retracting else { return }
    req.scheduledCount = req.computedCount
    while req.pages.count > pageCount(for: req.scheduledCount) {
      retire(req.pages.removeLast())
      if req.state == .retracting { leavingPages -= 1 }
    }
  }

  /// Gives chunks to running requests that lag by more than one, in order of admission.
  private mutating func scheduleExtends(into batch: inout ScheduleBatch, budget: inout Int) {
    for req in running {
      if budget == 0 { return }
      let wanted = req.extendCount
      guard wanted > 1 else { continue }
      let count = chunk(wanted, for: req, budget: budget)
      // After forced tokens.
      let drafts = count == wanted ? takeDrafts(of: req, budget: budget - count) : []
      if !drafts.isEmpty && schedule(req, count: count, drafts: drafts, into: &batch) {
        budget -= count + drafts.count
      } else if count > 0 && schedule(req, count: count, into: &batch) {
        budget -= count
      }
    }
  }

  /// How many of the tokens wanted the budget and the pages to be had allow.
  func chunk(_ wanted: Int, for req: Req, budget: Int) -> Int {
    let room = (req.pages.count + allocator.freeCount + cache.evictablePages) * kvPageSize - req.scheduledCount
    return min(wanted, budget, configuration.maxChunkTokens ?? .max, room)
  }

  /// Puts a request's next tokens into the batch.
  /// - Returns: `false`, with nothing changed, if there is no page for them.
  mutating func schedule(
    _ req: Req, count: Int, drafts: [TokenID] = [], into batch: inout ScheduleBatch
  ) -> Bool {
    let start = req.scheduledCount
    let end = start + count + drafts.count
    let needed = pageCount(for: end)
    guard needed - req.pages.count <= allocator.freeCount + cache.evictablePages else { return false }
    while req.pages.count < needed { req.pages.append(takePage()) }

    let inFlight = start + count > req.tokens.count
    let tokenOffset = batch.tokens.count
    if count == 1 {
      batch.tokens.append(inFlight ? -1 : req.tokens[start])
    } else {
      batch.tokens.append(contentsOf: req.tokens[start..<min(start + count, req.tokens.count)])
      if inFlight { batch.tokens.append(-1) }
    }
    invariant(batch.tokens.count - tokenOffset == count, "only the last token of a share may be in flight")
    batch.tokens.append(contentsOf: drafts)

    let samples = req.extendCount == count && req.maxOutputs > 0 && req.pendingEnd == nil
    var share = ScheduledRequest(
      slot: req.slot, start: Int32(start), count: Int32(count + drafts.count), tokenOffset: Int32(tokenOffset),
      pageOffset: Int32(batch.pages.count), pageCount: Int32(needed), lastTokenIsInFlight: inFlight, samples: samples,
      draftCount: Int32(drafts.count))
    if let row = req.nextPromptRow {
      share.promptLogprobStart = Int32(row)
      share.promptLogprobEnd = Int32(req.promptCount - 1)
    }
    req.draftDepth = drafts.count
    if !drafts.isEmpty && !req.draftParents.isEmpty {
      share.parentOffset = Int32(batch.parents.count)
      batch.parents.append(contentsOf: req.draftParents.prefix(drafts.count))
      req.draftDepth = Self.depth(req.draftParents.prefix(drafts.count))
    }
    batch.pages.append(contentsOf: req.pages)
    batch.requests.append(share)
    req.scheduledCount = end
    req.inFlightCount += 1
    req.drafts.removeAll(keepingCapacity: true)
    req.draftParents.removeAll(keepingCapacity: true)
    if samples { req.pendingDraws += 1 + drafts.count }
    req.draftCount = drafts.count
    return true
  }

  /// How many drafts of a tree stand one behind the other, at most.
  private static func depth(_ parents: ArraySlice<Int32>) -> Int {
    var depths: [Int] = []
    for parent in parents { depths.append(parent < 0 ? 1 : depths[Int(parent)] + 1) }
    return depths.max() ?? 0
  }

  /// A page that is free or, at the cost of the least recently used prefix, made so. The caller has seen that there is one.
  private mutating func takePage() -> Int32 {
    if let page = allocator.allocate() { return page }
    cache.evict(1, into: &allocator)
    guard let page = allocator.allocate() else { fatalError("a page was counted on that is not there") }
    return page
  }

  // MARK: complete

  /// Takes what the oldest launched step brought.
  ///
  /// - Parameters:
  ///   - batch: the step, as `next` decided it.
  ///   - result: what the executor reported. Lists that name requests or tokens are in ascending order.
  public mutating func complete(_ batch: ScheduleBatch, _ result: StepResult) {
    invariant(batch.step == completedStep + 1 && batch.step <= launchedStep, "steps complete in the order of launch")
    invariant(result.tokenCounts.count == batch.requests.count, "the result belongs to another batch")
    completedStep = batch.step
    if configuration.measuresDrafting { learn(batch, result) }
    // Only the last step launched can have been asked for drafts.
    if stepsInFlight == 0 { awaitsDrafts = false }
    releaseRetiredPages()

    var tokenIndex = 0
    var logprobIndex = 0
    var promptIndex = 0
    var forcedIndex = 0
    var postponedIndex = 0
    var failureIndex = 0
    var draftIndex = 0
    var proposalIndex = 0
    var treeIndex = 0
    var hasEnds = false
    for index in batch.requests.indices {
      let share = batch.requests[index]
      guard let req = slots[Int(share.slot)] else { fatalError("slot \(share.slot) was given away in flight") }
      req.inFlightCount -= 1

      let drawn = tokenIndex..<tokenIndex + Int(result.tokenCounts[index])
      tokenIndex = drawn.upperBound
      let rowIsVoid = req.nextRowIsVoid
      req.nextRowIsVoid = false
      let isVoid = share.samples && req.nextDrawIsVoid
      if isVoid { req.nextDrawIsVoid = false } else if share.samples { req.pendingDraws -= 1 + Int(share.draftCount) }
      var isPostponed = false
      if postponedIndex < result.postponed.count && result.postponed[postponedIndex] == index {
        isPostponed = true
        postponedIndex += 1
      }
      var accepted = 0
      if share.draftCount > 0 {
        req.draftCount = 0
        if draftIndex < result.acceptedDrafts.count && result.acceptedDrafts[draftIndex].request == index {
          accepted = result.acceptedDrafts[draftIndex].count
          draftIndex += 1
        }
      }
      if (drawn.count > 1 || isPostponed) && req.pendingDraws > 0 {
        invariant(req.pendingDraws == 1, "two draws are in flight behind the one that ended")
        req.pendingDraws = 0
        req.nextDrawIsVoid = true
      }
      if isPostponed {
        invariant(share.samples && !isVoid && drawn.isEmpty, "a draw is postponed that was not to be")
        req.nextRowIsVoid = req.inFlightCount > 0
        counts.postponedDraws += 1
      }
      var proposal: [TokenID] = []
      if proposalIndex < result.drafts.count && result.drafts[proposalIndex].request == index {
        proposal = result.drafts[proposalIndex].tokens
        proposalIndex += 1
      }
      var parents: [Int32] = []
      if treeIndex < result.draftParents.count && result.draftParents[treeIndex].request == index {
        parents = result.draftParents[treeIndex].parents
        treeIndex += 1
      }
      let firstForced = forcedIndex
      while forcedIndex < result.forcedLogprobs.count && result.forcedLogprobs[forcedIndex].request == index {
        forcedIndex += 1
      }
      let firstPrompt = promptIndex
      while promptIndex < result.promptLogprobs.count && result.promptLogprobs[promptIndex].request == index {
        promptIndex += 1
      }
      let firstLogprob = logprobIndex
      while logprobIndex < result.logprobs.count && result.logprobs[logprobIndex].index < tokenIndex {
        logprobIndex += 1
      }
      var failure: String?
      if failureIndex < result.failures.count && result.failures[failureIndex].request == index {
        failure = result.failures[failureIndex].reason
        failureIndex += 1
      }

      if req.state != .finishing {
        if let failure {
          // Nothing of the request goes into the tree from here on: its K/V are not to be trusted.
          finish(req, .abort(failure), keepsPrefix: false, compacts: false)
        } else {
          invariant(
            drawn.isEmpty == (!share.samples || isVoid || isPostponed),
            "a share that samples brings tokens, and no other brings any")
          if isPostponed {
            // The last token that is known is computed again. Nobody's drafts are to blame.
            req.computedCount = Int(share.start + share.count - share.draftCount) - 1
            rewind(req)
          } else if !rowIsVoid {
            req.computedCount = Int(share.start + share.count - share.draftCount) + accepted
            if share.draftCount > 0 { settleDrafts(req, accepted: accepted, of: Int(share.draftCount)) }
          }
          for entry in result.forcedLogprobs[firstForced..<forcedIndex] where req.state != .finishing {
            reportForced(entry, of: req)
          }
          for entry in result.promptLogprobs[firstPrompt..<promptIndex] { appendPromptLogprobs(entry, to: req) }
          invariant(
            req.state == .finishing || req.unreportedCount == 0
              || req.tokens.count - req.unreportedCount > req.computedCount,
            "the log-probability of a forced token did not come with the row before it")
          if req.isFillingCache && req.state == .running { checkpoint(req) }
          if share.samples {
            var logprob = firstLogprob
            for index in drawn where req.state != .finishing && req.pendingEnd == nil {
              var entry: PositionLogprobs?
              if logprob < logprobIndex && result.logprobs[logprob].index == index {
                entry = result.logprobs[logprob].values
                logprob += 1
              }
              appendToken(result.tokens[index], logprobs: entry, to: req)
              if index > drawn.lowerBound + accepted { counts.forcedTokens += 1 }
            }
            if req.state == .running { (req.drafts, req.draftParents) = (proposal, parents) }
          } else if req.maxOutputs == 0 && req.computedCount == req.promptCount {
            start(req)
            finish(req, .length, compacts: false)
          }
        }
      }
      if req.state == .finishing || req.state == .retracting { hasEnds = true }
      if req.inFlightCount == 0 { leave(req) }
    }
    invariant(
      tokenIndex == result.tokens.count && promptIndex == result.promptLogprobs.count
        && logprobIndex == result.logprobs.count && failureIndex == result.failures.count
        && forcedIndex == result.forcedLogprobs.count && postponedIndex == result.postponed.count
        && draftIndex == result.acceptedDrafts.count && proposalIndex == result.drafts.count
        && treeIndex == result.draftParents.count,
      "the result's lists are not in the batch's order")

    if hasEnds { running.removeAll { $0.state != .running } }
    counts.forwardSeconds += result.forwardSeconds
    counts.steps += 1
    newTokenRatio = AdmissionConstants.decay(newTokenRatio, configuration.conservativeness)
    settle()
  }

  private mutating func appendPromptLogprobs(
    _ entry: (request: Int, position: Int, values: PositionLogprobs), to req: Req
  ) {
    invariant(entry.position - 1 == req.nextPromptRow, "prompt log-probabilities come in order, each once")
    var values = entry.values
    values.chosen.token = req.tokens[entry.position]
    req.promptLogprobs.append(values)
  }

  /// Reports, once, that the prompt is computed.
  private mutating func start(_ req: Req) {
    if req.hasStarted { return }
    req.hasStarted = true
    if configuration.measuresDrafting {
      for number in drafting.indices { drafting[number].governor.beginText() }
    }
    events.append(
      .started(
        handle: req.handle, cachedTokens: req.cachedTokens,
        promptLogprobs: req.logprobs?.promptStart == nil ? nil : req.promptLogprobs))
    req.promptLogprobs.removeAll(keepingCapacity: false)
  }

  private mutating func appendToken(_ token: TokenID, logprobs: PositionLogprobs?, to req: Req) {
    start(req)
    req.tokens.append(token)
    counts.generatedTokens += 1
    var end: FinishReason?
    if !req.stopTokenIDs.isEmpty && req.stopTokenIDs.contains(token) {
      end = .stop(.token(token))
    } else if req.outputCount >= req.maxOutputs {
      end = .length
    }
    if req.logprobs != nil && logprobs == nil {
      // A forced token: it and the end behind it are reported when the row before it was computed.
      req.unreportedCount += 1
      req.pendingEnd = end
      return
    }
    invariant(req.unreportedCount == 0, "a token was drawn behind one that is not reported")
    events.append(.token(handle: req.handle, token: token, logprobs: logprobs))
    if let end { finish(req, end, compacts: false) }
  }

  /// Reports the next of the forced tokens that wait for their log-probabilities, and the end behind the last of them.
  private mutating func reportForced(
    _ entry: (request: Int, position: Int, values: PositionLogprobs), of req: Req
  ) {
    let position = req.tokens.count - req.unreportedCount
    invariant(
      req.unreportedCount > 0 && entry.position == position,
      "log-probabilities of forced tokens come in order, each once")
    req.unreportedCount -= 1
    events.append(.token(handle: req.handle, token: req.tokens[position], logprobs: entry.values))
    if req.unreportedCount == 0, let end = req.pendingEnd { finish(req, end, compacts: false) }
  }

  // MARK: Ends

  /// Reports a request's end and gives back what it holds, now or when the last step in flight that names it ends.
  ///
  /// - Parameters:
  ///   - keepsPrefix: whether the whole pages computed so far go into the tree.
  ///   - compacts: whether `running` is tidied here; `complete` does so once for all.
  mutating func finish(_ req: Req, _ reason: FinishReason, keepsPrefix: Bool = true, compacts: Bool = true) {
    events.append(
      .finished(
        handle: req.handle, reason, retractions: req.retractions,
        speculation: configuration.draftTokens > 0 ? req.speculation : nil))
    if case .abort = reason { counts.abortedRequests += 1 } else { counts.finishedRequests += 1 }
    live[req.handle] = nil
    if !keepsPrefix { req.computedCount = req.sharedPages * kvPageSize }
    let state = req.state
    req.state = .finishing
    switch state {
    case .waiting: removeFromWaiting(req)
    case .running:
      if compacts, let index = running.firstIndex(where: { $0 === req }) { running.remove(at: index) }
      leavingPages += req.pages.count
      // In `complete` the caller lets go, after it has read all that concerns the request.
      if req.inFlightCount == 0 && compacts { leave(req) }
    case .retracting: removeFromWaiting(req)
    case .finishing: fatalError("a request ended twice")
    }
  }

  private mutating func removeFromWaiting(_ req: Req) {
    guard let index = waiting.firstIndex(where: { $0 === req }) else {
      fatalError("a waiting request is not in the queue")
    }
    waiting.remove(at: index)
  }

  /// Lets go of what a request holds that is no longer running and that no launched step names.
  mutating func leave(_ req: Req) {
    guard req.state == .finishing || req.state == .retracting, req.slot >= 0 else { return }
    invariant(req.inFlightCount == 0 && req.pendingDraws == 0, "a step in flight still names the request")
    leavingPages -= req.pages.count
    checkpoint(req)
    if let lock = req.lock.take() { cache.unlock(lock) }
    for page in req.pages[req.sharedPages...] { allocator.release(page) }
    req.pages.removeAll(keepingCapacity: req.state == .retracting)
    req.sharedPages = 0
    req.scheduledCount = 0
    req.computedCount = 0
    slots[Int(req.slot)] = nil
    freeSlots.append(req.slot)
    releasedSlots.append(req.slot)
    req.slot = -1
    if req.state == .retracting { req.state = .waiting }
  }

  /// Puts the whole pages computed so far into the tree, so that others can use them from now on.
  private mutating func checkpoint(_ req: Req) {
    let count = req.computedCount / kvPageSize
    guard configuration.cachesPrefixes, count > req.sharedPages else { return }
    let present = cache.insert(req.tokens, pages: req.pages, pageCount: count, salt: req.salt)
    // 0..<sharedPages were the tree's. sharedPages..<present are copies of pages that the tree has: K/V of equal
    // prefixes are equal to the bit, so the table changes over to the tree's, and the copies go once no launched step
    // reads them. present..<count have just become the tree's.
    for page in req.pages[req.sharedPages..<max(present, req.sharedPages)] { retire(page) }
    let match = cache.matchPrefix(req.tokens, pageLimit: count, salt: req.salt)
    invariant(match.pageCount == count, "the tree lost what was just inserted")
    cache.copyPages(of: match, to: &req.pages)
    let newLock = cache.lock(match)
    if let oldLock = req.lock.take() { cache.unlock(oldLock) }
    req.lock = consume newLock
    req.sharedPages = count
  }

  private mutating func retire(_ page: Int32) {
    if stepsInFlight == 0 { allocator.release(page) } else { retiredPages.append((launchedStep, page)) }
  }

  private mutating func releaseRetiredPages() {
    guard let first = retiredPages.first, first.step <= completedStep else { return }
    let count = retiredPages.firstIndex { $0.step > completedStep } ?? retiredPages.count
    for entry in retiredPages[..<count] { allocator.release(entry.page) }
    retiredPages.removeFirst(count)
  }

  /// Answers what waits for quiet.
  private mutating func settle() {
    if !pendingFlushes.isEmpty && freeSlots.count == slots.count && stepsInFlight == 0 {
      cache.removeAll(into: &allocator)
      for reply in pendingFlushes { events.append(.flushed(reply: reply, true)) }
      pendingFlushes.removeAll()
    }
    guard live.isEmpty else { return }
    newTokenRatio = AdmissionConstants.initialRatio(configuration.conservativeness)
    for reply in drainReplies { events.append(.drained(reply: reply)) }
    drainReplies.removeAll()
  }

  // MARK: Levels

  /// Pages that hold a number of tokens.
  func pageCount(for tokens: Int) -> Int { (tokens + kvPageSize - 1) / kvPageSize }

  /// Counts and levels now. `schedulerSeconds`, `generationThroughput` and `residentBytes` are the loop's and the
  /// process's to fill in.
  public var statistics: ServiceStatistics {
    var statistics = counts
    statistics.runningRequests = running.count
    statistics.waitingRequests = waiting.count
    statistics.maxRunningRequests = configuration.maxRunningRequests
    statistics.maxQueuedRequests = configuration.maxQueuedRequests
    statistics.kvCapacityTokens = allocator.capacity * kvPageSize
    statistics.kvFreeTokens = allocator.freeCount * kvPageSize
    statistics.kvEvictableTokens = cache.evictablePages * kvPageSize
    statistics.kvUsedTokens =
      statistics.kvCapacityTokens - statistics.kvFreeTokens - statistics.kvEvictableTokens
    statistics.newTokenRatio = newTokenRatio
    statistics.evictedTokens = cache.evictedPages * kvPageSize
    statistics.isDraining = isDraining
    return statistics
  }
}
