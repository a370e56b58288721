import ApusCore
import ApusScheduling
import ApusTesting
import Testing

/// Whether tokens are drafted follows from what steps take.
@Suite struct DraftGovernorTests {
  /// Seconds per token of the two ways, by step.
  private func seconds(
    steps: Int, seed: UInt64, noise: Double = 0.1, newText: Int? = nil, drafting: (Int) -> Double
  ) -> (taken: Double, draftingSteps: Int) {
    var governor = DraftGovernor()
    var random = SeededGenerator(seed: seed)
    var taken = 0.0
    var draftingSteps = 0
    for step in 0..<steps {
      if let newText, step % newText == 0 { governor.beginText() }
      let way = governor.way
      let plain = 1 + Double.random(in: -noise...noise, using: &random)
      let cost =
        way == .plain ? plain : drafting(step) * (1 + Double.random(in: -3 * noise...3 * noise, using: &random))
      taken += cost
      if way == .drafting { draftingSteps += 1 }
      governor.note(way, seconds: cost, tokens: 1)
    }
    return (taken, draftingSteps)
  }

  @Test func draftingThatIsSlowerCostsLittle() {
    for seed in 1...20 as ClosedRange<UInt64> {
      for slowness in [1.1, 1.25, 2, 5] {
        let steps = 3000
        let (taken, _) = seconds(steps: steps, seed: seed) { _ in slowness }
        #expect(taken < (1.02 + 0.01 * slowness) * Double(steps), "seed \(seed), \(slowness): \(taken)")
        // Texts of 80 tokens, one after the other: each may be one for which drafts are good.
        let (short, _) = seconds(steps: steps, seed: seed, newText: 80) { _ in slowness }
        #expect(short < 1.3 * Double(steps), "seed \(seed), \(slowness): \(short)")
      }
    }
  }

  @Test func draftingThatIsFasterIsKept() {
    for seed in 1...20 as ClosedRange<UInt64> {
      for speed in [0.9, 0.7, 0.4] {
        let steps = 3000
        let (taken, drafting) = seconds(steps: steps, seed: seed) { _ in speed }
        #expect(taken < (speed + 0.03) * Double(steps), "seed \(seed), \(speed): \(taken)")
        #expect(drafting > steps * 9 / 10, "seed \(seed), \(speed): \(drafting)")
      }
    }
  }

  @Test func whatChangesIsNoticed() {
    for seed in 1...20 as ClosedRange<UInt64> {
      let (taken, _) = seconds(steps: 6000, seed: seed) { step in step < 2000 || step >= 4000 ? 0.6 : 1.5 }
      // At best 4000 * 0.6 + 2000.
      #expect(taken < 1.12 * 4400, "seed \(seed): \(taken)")
    }
    // New texts are tried at once, of which a wait of a thousand steps would miss most.
    let (taken, _) = seconds(steps: 6000, seed: 3, newText: 200) { $0 / 200 % 10 < 8 ? 1.3 : 0.4 }
    #expect(taken < 6000 * 0.95, "\(taken)")
  }

  @Test func stepsOfUnknownLengthSayNothing() {
    var governor = DraftGovernor()
    for _ in 0..<1000 {
      #expect(governor.way == .drafting)
      governor.note(.drafting, seconds: 0, tokens: 1)
    }
  }

  /// A scheduler over an executor whose steps take what a model says: `row` for each row beyond the first, `draft` for each
  /// token drafted, `gap` where nothing overlaps.
  private func run(
    row: Double, draft: Double, gap: Double, accuracy: Double, said: DraftCosts, requests: Int = 1, tokens: Int = 1500
  ) throws -> (seconds: Double, counts: ServiceStatistics) {
    var configuration = SchedulerConfiguration(pageCount: 2000, contextLength: 4096)
    configuration.draftTokens = 5
    configuration.draftCosts = said
    configuration.measuresDrafting = true
    var scheduler = try Scheduler(configuration)
    var executor = FakeExecutor(
      model: FakeModel(vocabularySize: 1000), pageCount: 2000, maxRunningRequests: configuration.maxRunningRequests)
    executor.draftAccuracy = accuracy
    for handle in 1...UInt64(requests) {
      var sampling = SamplingParameters()
      sampling.seed = handle
      sampling.maxNewTokens = tokens
      sampling.ignoreEOS = true
      scheduler.apply(.submit(Submission(handle: handle, tokens: [TokenID(handle), 2, 3], sampling: sampling)))
    }
    var total = 0.0
    // The overlapped loop. A step that was launched when none was in flight had a gap before it.
    var inFlight: (batch: ScheduleBatch, hasGap: Bool)?
    while true {
      var batch = ScheduleBatch()
      let isLaunched = scheduler.next(into: &batch)
      let hasGap = inFlight == nil
      if isLaunched { executor.launch(batch) }
      if let current = inFlight {
        var result = StepResult()
        executor.wait(into: &result)
        let drafted = result.drafts.reduce(0) { $0 + $1.tokens.count }
        result.draftSeconds = draft * Double(drafted)
        result.forwardSeconds = 1 + row * Double(current.batch.tokens.count - 1) + result.draftSeconds
        result.stepSeconds = result.forwardSeconds + (current.hasGap ? gap : 0)
        total += result.stepSeconds
        scheduler.complete(current.batch, result)
        scheduler.removeEvents()
      } else if !isLaunched {
        break
      }
      inFlight = isLaunched ? (batch, hasGap) : nil
    }
    scheduler.checkInvariants()
    return (total, scheduler.statistics)
  }

  @Test func aGapThatThePricesDoNotKnowStopsDrafting() throws {
    // Prices say that drafts pay; the gap eats it up.
    let (slow, counts) = try run(
      row: 0.3, draft: 0.1, gap: 0.8, accuracy: 0.6, said: DraftCosts(row: 0.3, draft: 0.1))
    #expect(slow < 1.06 * 1500 && counts.draftTokens > 0, "\(slow), \(counts.draftTokens)")
    // Without the gap they pay.
    let (fast, others) = try run(
      row: 0.1, draft: 0.1, gap: 0, accuracy: 0.8, said: DraftCosts(row: 0.1, draft: 0.1))
    #expect(fast < 0.75 * 1500 && others.draftTokens > 1000, "\(fast), \(others.draftTokens)")
  }

  @Test func pricesFromABusyMomentAreCorrected() throws {
    let truth = try run(row: 0.1, draft: 0.05, gap: 0, accuracy: 0.8, said: DraftCosts(row: 0.1, draft: 0.05))
    let wrong = try run(row: 0.1, draft: 0.05, gap: 0, accuracy: 0.8, said: DraftCosts(row: 0.9, draft: 0.4))
    #expect(wrong.counts.draftTokens > truth.counts.draftTokens / 2, "\(wrong.counts.draftTokens)")
    #expect(wrong.seconds < 1.2 * truth.seconds, "\(wrong.seconds), \(truth.seconds)")
  }

  @Test func manyRequestsHaveTheirOwnVerdict() throws {
    let (_, counts) = try run(
      row: 0.9, draft: 0.2, gap: 0.2, accuracy: 0.5, said: DraftCosts(row: 0.9, draft: 0.2), requests: 16, tokens: 200)
    #expect(counts.draftTokens == 0)
  }
}
