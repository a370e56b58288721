import ApusCore
import ApusScheduling
import ApusTesting
import Testing

/// A scheduler and the fake executor, driven by hand.
private final class Bench {
  var scheduler: Scheduler
  var executor: FakeExecutor
  var events: [Event] = []
  var batches: [ScheduleBatch] = []
  private var result = StepResult()

  init(pages: Int = 64, context: Int = 512, _ change: (inout SchedulerConfiguration) -> Void = { _ in }) throws {
    var configuration = SchedulerConfiguration(pageCount: pages, contextLength: context)
    change(&configuration)
    scheduler = try Scheduler(configuration)
    executor = FakeExecutor(
      model: FakeModel(vocabularySize: 1000), pageCount: pages, maxRunningRequests: configuration.maxRunningRequests)
  }

  func submit(
    _ handle: UInt64, _ tokens: [TokenID], maxNew: Int? = 4, priority: Int = 0, salt: String = "",
    logprobs: LogprobOptions? = nil, gate: Submission.Gate = .open
  ) {
    var sampling = SamplingParameters()
    sampling.seed = 1
    sampling.maxNewTokens = maxNew
    apply(
      .submit(
        Submission(
          handle: handle, tokens: tokens, sampling: sampling, logprobs: logprobs, priority: priority, cacheSalt: salt,
          gate: gate)))
  }

  func apply(_ command: Command) {
    scheduler.apply(command)
    collect()
  }

  func launch() -> Bool {
    var batch = ScheduleBatch()
    let isLaunched = scheduler.next(into: &batch)
    if isLaunched {
      executor.launch(batch)
      batches.append(batch)
    }
    collect()
    scheduler.checkInvariants()
    return isLaunched
  }

  func complete() {
    result.removeAll()
    executor.wait(into: &result)
    scheduler.complete(batches[batches.count - 1 - executor.inFlight], result)
    collect()
    scheduler.checkInvariants()
  }

  /// A plain step.
  @discardableResult
  func step() -> Bool {
    guard launch() else { return false }
    complete()
    return true
  }

  func runToEnd() { while step() {} }

  private func collect() {
    events += scheduler.events
    scheduler.removeEvents()
  }

  func output(_ handle: UInt64) -> [TokenID] {
    events.compactMap { if case .token(handle, let token, _) = $0 { token } else { nil } }
  }

  func cachedTokens(_ handle: UInt64) -> Int? {
    events.compactMap { if case .started(handle, let count, _) = $0 { count } else { nil } }.first
  }

  func end(_ handle: UInt64) -> FinishReason? {
    events.compactMap { if case .finished(handle, let reason, _, _) = $0 { reason } else { nil } }.first
  }

  func rejection(_ handle: UInt64) -> EngineError? {
    events.compactMap { if case .rejected(handle, let error) = $0 { error } else { nil } }.first
  }

  var statistics: ServiceStatistics { scheduler.statistics }
  var isIdle: Bool { scheduler.isIdle }
  var isShuttingDown: Bool { scheduler.isShuttingDown }

  /// Handles in the order in which they started.
  var startOrder: [UInt64] {
    events.compactMap { if case .started(let handle, _, _) = $0 { handle } else { nil } }
  }
}

private func prompt(_ count: Int, _ salt: Int = 0) -> [TokenID] {
  (0..<count).map { TokenID(($0 &* 31 &+ salt &* 101) % 997) }
}

@Suite struct SchedulerTests {
  // MARK: Steps

  @Test func promptsAreCutToTheBudgetAndDecodesGoFirst() throws {
    let bench = try Bench { $0.tokenBudget = 20 }
    bench.submit(1, prompt(10), maxNew: 50)
    bench.step()
    bench.submit(2, prompt(50, 1))
    for _ in 0..<3 { bench.step() }
    let shapes = bench.batches.dropFirst().map { $0.requests.map(\.count) }
    #expect(shapes == [[1, 19], [1, 19], [1, 12]])
    #expect(bench.batches[3].requests.map(\.samples) == [true, true])
    #expect(bench.batches[2].requests.map(\.samples) == [true, false])
  }

  @Test func aChunkLimitHoldsForEachRequest() throws {
    let bench = try Bench { $0.maxChunkTokens = 7 }
    bench.submit(1, prompt(20))
    bench.submit(2, prompt(9, 1))
    bench.step()
    bench.step()
    #expect(bench.batches.map { $0.requests.map(\.count) } == [[7, 7], [7, 2]])
  }

  @Test func noMoreRequestsRunThanTheBudgetServes() throws {
    let bench = try Bench { $0.tokenBudget = 3 }
    for handle in UInt64(1)...5 { bench.submit(handle, prompt(1, Int(handle)), maxNew: 30) }
    bench.runToEnd()
    #expect(bench.executor.largestBatch == (3, 3))
    #expect((UInt64(1)...5).allSatisfy { bench.output($0).count == 30 })
    // Whoever runs gets a token in every step.
    #expect(bench.batches.count == 60)
  }

  @Test func noStepIsSpentOnARequestThatItsTokenInFlightEnds() throws {
    let bench = try Bench()
    bench.submit(1, prompt(5), maxNew: 2)
    #expect(bench.launch())
    #expect(bench.launch())
    bench.complete()
    let third = bench.launch()
    #expect(!third)
    bench.complete()
    #expect(bench.end(1) == .length)
    #expect(bench.output(1).count == 2)
    #expect(bench.batches.map { $0.tokens.last } == [prompt(5).last, -1])
  }

  @Test func aRowWhoseRequestHasEndedIsDropped() throws {
    let bench = try Bench()
    bench.submit(1, prompt(20), maxNew: 10)
    #expect(bench.launch())
    #expect(bench.launch())
    bench.apply(.abort(handle: 1, reason: "gone"))
    #expect(bench.end(1) == .abort("gone"))
    #expect(bench.statistics.kvUsedTokens > 0, "two steps still use the pages")
    bench.complete()
    #expect(bench.statistics.kvUsedTokens > 0, "one step still uses the pages")
    bench.complete()
    #expect(bench.statistics.kvUsedTokens == 0)
    #expect(bench.output(1).isEmpty)
    #expect(bench.isIdle)
  }

  @Test func noOutputWantedComputesThePromptAndEnds() throws {
    let bench = try Bench()
    bench.submit(1, prompt(40), maxNew: 0, logprobs: LogprobOptions(promptStart: 3))
    bench.runToEnd()
    #expect(bench.end(1) == .length)
    #expect(bench.output(1).isEmpty)
    let logprobs = bench.events.compactMap { if case .started(_, _, let values) = $0 { values } else { nil } }.first
    #expect(logprobs?.count == 37)
    #expect(logprobs?.first?.chosen.token == prompt(40)[3])
  }

  // MARK: Prefixes

  @Test func aSecondRequestFindsTheFirstOnesPages() throws {
    let bench = try Bench()
    bench.submit(1, prompt(40), maxNew: 10)
    bench.runToEnd()
    // 40 + 9 tokens have K/V: three whole pages, the last with outputs.
    bench.submit(2, prompt(40) + bench.output(1))
    bench.runToEnd()
    #expect(bench.cachedTokens(2) == 48)
    bench.submit(3, prompt(40), salt: "other")
    bench.runToEnd()
    #expect(bench.cachedTokens(3) == 0)
  }

  @Test func atLeastOneTokenIsComputedOnAFullHit() throws {
    let bench = try Bench()
    bench.submit(1, prompt(32), maxNew: 1)
    bench.runToEnd()
    bench.submit(2, prompt(32), maxNew: 1)
    bench.runToEnd()
    #expect(bench.cachedTokens(2) == 16)
    #expect(bench.output(1) == bench.output(2))
  }

  @Test func promptLogprobsKeepTheirPositionsOutOfTheCache() throws {
    let bench = try Bench()
    bench.submit(1, prompt(64), maxNew: 1)
    bench.runToEnd()
    // The log-probability at position 40 needs the logits at 39.
    bench.submit(2, prompt(64), maxNew: 1, logprobs: LogprobOptions(promptStart: 40))
    bench.submit(3, prompt(64), maxNew: 1, logprobs: LogprobOptions(promptStart: 0))
    bench.submit(4, prompt(64), maxNew: 1, logprobs: LogprobOptions())
    bench.runToEnd()
    #expect(bench.cachedTokens(2) == 32)
    #expect(bench.cachedTokens(3) == 0)
    #expect(bench.cachedTokens(4) == 48)
  }

  @Test(arguments: [true, false])
  func aPrefixThatArrivesTogetherIsComputedOnce(shares: Bool) throws {
    let bench = try Bench(pages: 128) {
      $0.sharesPrefixesInBatch = shares
      $0.tokenBudget = 64
    }
    for handle in UInt64(1)...8 { bench.submit(handle, prompt(160) + prompt(5, Int(handle)), maxNew: 1) }
    bench.runToEnd()
    let once = 160 + 8 * 5
    if shares {
      #expect(bench.executor.computedTokens == once)
      #expect((UInt64(2)...8).allSatisfy { bench.cachedTokens($0) == 160 })
    } else {
      #expect(bench.executor.computedTokens > once)
    }
    #expect(bench.executor.violations.isEmpty)
  }

  @Test func aFollowerGoesOnWhenItsLeaderIsAborted() throws {
    let bench = try Bench { $0.tokenBudget = 32 }
    bench.submit(1, prompt(160))
    bench.submit(2, prompt(160) + [1])
    bench.step()
    bench.apply(.abort(handle: 1, reason: "gone"))
    bench.runToEnd()
    #expect(bench.end(2) == .length)
    #expect(bench.cachedTokens(2) == 32, "what the leader had computed is used")
  }

  @Test func theCacheCanBeSwitchedOff() throws {
    let bench = try Bench { $0.cachesPrefixes = false }
    bench.submit(1, prompt(64))
    bench.runToEnd()
    bench.submit(2, prompt(64))
    bench.runToEnd()
    #expect(bench.cachedTokens(2) == 0)
    #expect(bench.statistics.kvEvictableTokens == 0)
    #expect(bench.output(1) == bench.output(2))
  }

  @Test func aFlushWaitsForQuietAndCanBeGivenUp() throws {
    let bench = try Bench()
    bench.submit(1, prompt(40), maxNew: 3)
    bench.step()
    bench.apply(.flushCache(reply: 7))
    bench.apply(.flushCache(reply: 8))
    bench.apply(.cancelFlush(reply: 8))
    func answers() -> [String] {
      bench.events.compactMap { if case .flushed(let reply, let done) = $0 { "\(reply) \(done)" } else { nil } }
    }
    #expect(answers() == ["8 false"])
    bench.runToEnd()
    #expect(answers() == ["8 false", "7 true"])
    #expect(bench.statistics.kvFreeTokens == 64 * kvPageSize)
  }

  // MARK: Order

  @Test func firstComeFirstServed() throws {
    let bench = try Bench { $0.maxRunningRequests = 1 }
    for handle in UInt64(1)...4 { bench.submit(handle, prompt(10, Int(handle))) }
    bench.runToEnd()
    #expect(bench.startOrder == [1, 2, 3, 4])
  }

  @Test func theLongestCachedPrefixFirst() throws {
    let bench = try Bench {
      $0.maxRunningRequests = 1
      $0.policy = .longestPrefixMatch
    }
    bench.submit(1, prompt(64), maxNew: 1)
    bench.runToEnd()
    bench.submit(2, prompt(40, 1), maxNew: 1)
    bench.submit(3, prompt(20), maxNew: 1)
    bench.submit(4, prompt(60), maxNew: 1)
    bench.submit(5, prompt(40, 2), maxNew: 1)
    bench.runToEnd()
    #expect(bench.startOrder == [1, 4, 3, 2, 5])
  }

  @Test func theHeaviestBranchFirst() throws {
    let bench = try Bench { $0.policy = .depthFirstWeight }
    bench.submit(1, prompt(32, 1), maxNew: 1)
    bench.submit(2, prompt(32, 2), maxNew: 1)
    bench.runToEnd()
    bench.submit(3, prompt(20, 3), maxNew: 1)
    bench.submit(4, prompt(32, 1) + [1], maxNew: 1)
    bench.submit(5, prompt(32, 2) + [1], maxNew: 1)
    bench.submit(6, prompt(32, 2) + [2], maxNew: 1)
    bench.runToEnd()
    #expect(bench.startOrder == [1, 2, 5, 6, 4, 3])
  }

  @Test func theLongestOutputFirst() throws {
    let bench = try Bench {
      $0.maxRunningRequests = 1
      $0.policy = .longestOutputFirst
    }
    for handle in UInt64(1)...4 { bench.submit(handle, prompt(10, Int(handle)), maxNew: Int(handle % 3) + 1) }
    bench.runToEnd()
    #expect(bench.startOrder == [2, 1, 4, 3])
  }

  @Test func theUrgentTakeThePlaceOfTheLessUrgent() throws {
    let bench = try Bench {
      $0.maxRunningRequests = 1
      $0.policy = .priority
      $0.preemptionThreshold = 10
    }
    bench.submit(1, prompt(20), maxNew: 20)
    for _ in 0..<3 { bench.step() }
    bench.submit(2, prompt(20, 2), maxNew: 3, priority: 9)
    bench.submit(3, prompt(20, 3), maxNew: 3, priority: 10)
    bench.runToEnd()
    #expect(bench.startOrder == [1, 3, 2], "9 is not urgent enough to retract 1, but goes before its return")
    let ends = bench.events.compactMap {
      if case .finished(let handle, _, let count, _) = $0 { [Int(handle), count] } else { nil }
    }
    #expect(ends == [[3, 0], [2, 0], [1, 1]])
    #expect(bench.output(1).count == 20)
  }

  // MARK: Room

  @Test func requestsThatCanNeverFitAreRefused() throws {
    let bench = try Bench(pages: 4, context: 1000)
    bench.submit(1, prompt(65))
    bench.submit(2, prompt(64))
    bench.submit(3, [])
    bench.submit(4, prompt(3), logprobs: LogprobOptions(promptStart: 4))
    #expect(bench.rejection(1)?.code == .promptTooLong)
    #expect(bench.rejection(2) == nil)
    #expect(bench.rejection(3)?.code == .invalidRequest)
    #expect(bench.rejection(4)?.parameter == "logprob_start_len")
    let short = try Bench(pages: 64, context: 100)
    short.submit(1, prompt(100))
    short.submit(2, prompt(99))
    short.submit(3, prompt(100), maxNew: 0)
    #expect(short.rejection(1)?.code == .promptTooLong)
    short.runToEnd()
    #expect(short.output(2).count == 1)
    #expect(short.end(3) == .length)
  }

  @Test func theContextEndsAGeneration() throws {
    let bench = try Bench(context: 50)
    bench.submit(1, prompt(20), maxNew: nil)
    bench.runToEnd()
    #expect(bench.output(1).count == 30)
    #expect(bench.end(1) == .length)
  }

  @Test func aLoneRequestThatOutgrowsThePoolIsAborted() throws {
    let bench = try Bench(pages: 4, context: 1000)
    bench.submit(1, prompt(60), maxNew: 100)
    bench.runToEnd()
    // The 65th token would need a fifth page.
    #expect(bench.output(1).count == 5)
    guard case .abort(let reason)? = bench.end(1) else {
      Issue.record("ended by \(String(describing: bench.end(1)))")
      return
    }
    #expect(reason.contains("64 tokens is too small"))
    #expect(bench.isIdle)
  }

  @Test func requestsThatOutgrowThePoolTogetherAreRetractedAndAllEnd() throws {
    let bench = try Bench(pages: 12, context: 1000) { $0.conservativeness = 0.01 }
    for handle in UInt64(1)...6 { bench.submit(handle, prompt(20, Int(handle)), maxNew: 100) }
    bench.runToEnd()
    for handle in UInt64(1)...6 {
      #expect(bench.output(handle).count == 100)
      #expect(bench.end(handle) == .length)
    }
    #expect(bench.statistics.retractions > 0)
    #expect(bench.executor.violations.isEmpty)
  }

  @Test func theRatioRisesWithRetractionsAndFallsWithSteps() throws {
    let bench = try Bench(pages: 12, context: 1000) { $0.conservativeness = 0.1 }
    let initial = bench.statistics.newTokenRatio
    #expect(abs(initial - 0.07) < 1e-12)
    for handle in UInt64(1)...6 { bench.submit(handle, prompt(20, Int(handle)), maxNew: 100) }
    bench.step()
    #expect(bench.statistics.newTokenRatio < initial)
    var highest = 0.0
    while bench.step() { highest = max(highest, bench.statistics.newTokenRatio) }
    #expect(highest > initial)
    #expect(bench.statistics.newTokenRatio == initial, "idle resets it")
  }

  @Test func aFullQueueIsAnAnswer() throws {
    let bench = try Bench { $0.maxQueuedRequests = 2 }
    for handle in UInt64(1)...3 { bench.submit(handle, prompt(5)) }
    #expect(bench.rejection(3)?.code == .queueFull)
    bench.runToEnd()
    #expect(bench.end(1) == .length)
    #expect(bench.end(2) == .length)
  }

  // MARK: Commands

  @Test func aClosedGateBlocksNobody() throws {
    let bench = try Bench()
    bench.submit(1, prompt(5), gate: .closed)
    bench.submit(2, prompt(5, 1))
    bench.runToEnd()
    #expect(bench.end(1) == nil)
    #expect(bench.end(2) == .length)
    #expect(!bench.isIdle)
    bench.apply(.open(handle: 1))
    bench.runToEnd()
    #expect(bench.end(1) == .length)
  }

  @Test func aRejectedGateEndsItsRequestAlone() throws {
    let bench = try Bench()
    bench.submit(1, prompt(5), gate: .closed)
    bench.submit(2, prompt(5, 1))
    // An open gate is past being rejected.
    bench.apply(.reject(handle: 2, EngineError(.invalidRequest, "no")))
    bench.apply(.reject(handle: 1, EngineError(.invalidRequest, "no")))
    bench.apply(.reject(handle: 1, EngineError(.invalidRequest, "twice")))
    bench.runToEnd()
    #expect(bench.end(1) == nil)
    #expect(bench.end(2) == .length)
    #expect(bench.isIdle)
  }

  @Test func finishEndsQuietlyAndKeepsThePrefix() throws {
    let bench = try Bench()
    bench.submit(1, prompt(40), maxNew: 100)
    for _ in 0..<10 { bench.step() }
    bench.apply(.finish(handle: 1, .stop(.text("stop"))))
    #expect(bench.end(1) == .stop(.text("stop")))
    // 40 + 9 tokens have K/V.
    #expect(bench.statistics.kvEvictableTokens == 48)
    bench.apply(.abort(handle: 1, reason: "too late"))
    #expect(bench.events.count { if case .finished = $0 { true } else { false } } == 1)
  }

  @Test func drainingAnswersWhenTheLastOneEnds() throws {
    let bench = try Bench()
    bench.submit(1, prompt(5), maxNew: 3)
    bench.apply(.drain(reply: 9))
    bench.submit(2, prompt(5))
    #expect(bench.rejection(2)?.code == .shuttingDown)
    func isDrained() -> Bool { bench.events.contains { if case .drained(9) = $0 { true } else { false } } }
    #expect(!isDrained())
    bench.runToEnd()
    #expect(isDrained())
    #expect(bench.end(1) == .length)
  }

  @Test func shutdownEndsEverything() throws {
    let bench = try Bench()
    bench.submit(1, prompt(5), maxNew: 30)
    bench.submit(2, prompt(5), gate: .closed)
    #expect(bench.launch())
    bench.apply(.shutdown(reason: "bye"))
    #expect(bench.end(1) == .abort("bye"))
    #expect(bench.end(2) == .abort("bye"))
    #expect(!bench.isIdle, "a step is in flight")
    bench.complete()
    #expect(bench.isIdle && bench.isShuttingDown)
  }

  @Test func aFailedRowEndsItsRequestAlone() throws {
    let bench = try Bench()
    bench.executor.failure = { $0.first == 77 && $0.count > 33 ? "logits are not numbers" : nil }
    bench.submit(1, [77] + prompt(32), maxNew: 5)
    bench.submit(2, prompt(33, 2), maxNew: 5)
    bench.runToEnd()
    #expect(bench.end(1) == .abort("logits are not numbers"))
    #expect(bench.end(2) == .length)
    #expect(bench.output(2).count == 5)
  }

  @Test func impossibleConfigurationsAreRefused() {
    func refusal(_ change: (inout SchedulerConfiguration) -> Void) -> EngineError? {
      var configuration = SchedulerConfiguration(pageCount: 8, contextLength: 64)
      change(&configuration)
      do {
        try configuration.validate()
        return nil
      } catch {
        return error
      }
    }
    #expect(refusal { _ in } == nil)
    #expect(refusal { $0.tokenBudget = 0 }?.parameter == "tokenBudget")
    #expect(refusal { $0.pageCount = 0 }?.parameter == "pageCount")
    #expect(refusal { $0.conservativeness = .nan }?.parameter == "conservativeness")
    #expect(refusal { $0.maxChunkTokens = 0 }?.parameter == "maxChunkTokens")
  }
}
