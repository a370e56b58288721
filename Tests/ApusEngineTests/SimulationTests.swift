import ApusCore
import ApusEngine
import ApusScheduling
import ApusTesting
import Glibc
import Testing

@Suite struct SimulationTests {
  /// Enough schedules to meet rare combinations, few enough for every run of the tests. For longer hunts, set
  /// `APUS_SIMULATION_SEEDS`.
  static let seedCount = getenv("APUS_SIMULATION_SEEDS").flatMap { UInt64(String(cString: $0)) } ?? 1000

  @Test(arguments: [true, false])
  func everyRequestEndsOnceWithTheRightText(overlapped: Bool) throws {
    var met = Coverage()
    for seed in 1...Self.seedCount {
      let scenario = Scenario(seed: seed)
      let run = try simulate(scenario, overlapped: overlapped)
      let faults = faults(of: run, in: scenario)
      #expect(faults.isEmpty, "seed \(seed), overlapped \(overlapped): \(faults.prefix(5))")
      met.add(run, scenario)
    }
    met.expectEverything()
  }

  /// The fake is no judge if it lets mistakes pass: whoever reads a page that another request wrote must be caught.
  @Test func theFakeNoticesAForeignPage() throws {
    let model = FakeModel(vocabularySize: 100)
    var executor = FakeExecutor(model: model, pageCount: 4, maxRunningRequests: 2)
    var sampling = SamplingParameters()
    sampling.seed = 1
    let prompt: [TokenID] = Array(1...16)
    var batch = ScheduleBatch()
    batch.step = 1
    batch.assigned = [
      SlotAssignment(
        slot: 0, sampling: sampling, stopTokenIDs: [], logprobs: nil, tokens: prompt, promptCount: 16)
    ]
    batch.requests = [
      ScheduledRequest(
        slot: 0, start: 0, count: 16, tokenOffset: 0, pageOffset: 0, pageCount: 1, lastTokenIsInFlight: false,
        samples: true)
    ]
    batch.tokens = prompt
    batch.pages = [2]
    executor.launch(batch)
    var result = StepResult()
    executor.wait(into: &result)
    let reference = model.reference(
      Submission(handle: 1, tokens: prompt, sampling: sampling), contextLength: 17, capacityTokens: 64)
    #expect(result.tokens == reference.tokens)
    #expect(executor.violations.isEmpty)

    // The same prefix again, read from a page that nobody wrote.
    batch.step = 2
    batch.assigned[0].slot = 1
    batch.assigned[0].tokens = prompt + [5]
    batch.requests[0].slot = 1
    batch.requests[0].start = 16
    batch.requests[0].count = 1
    batch.requests[0].pageCount = 2
    batch.tokens = [5]
    batch.pages = [3, 1]
    executor.launch(batch)
    result.removeAll()
    executor.wait(into: &result)
    #expect(!executor.violations.isEmpty)
  }
}

/// What the schedules of a test met, so that a change that makes them tame is noticed.
struct Coverage {
  private var counts: [String: Int] = [:]

  mutating func add(_ run: Run, _ scenario: Scenario) {
    func count(_ name: String, _ number: Int) { counts[name, default: 0] += number }
    let policy = scenario.configuration.policy
    count(policy == .priority ? "retractions by priority" : "retractions for lack of pages", run.statistics.retractions)
    count("cached tokens", run.statistics.cachedTokens)
    count("right guesses", run.statistics.acceptedDraftTokens)
    count("wrong guesses", run.statistics.draftTokens - run.statistics.acceptedDraftTokens)
    count("forced tokens", run.statistics.forcedTokens)
    count("postponed draws", run.statistics.postponedDraws)
    count("evicted tokens", run.statistics.evictedTokens)
    count("flushes", run.flushes.count)
    count("drains", run.drainedCount)
    for outcome in run.outcomes.values {
      if scenario.forces { count("log-probabilities beside forced tokens", outcome.logprobs.count) }
      if outcome.retractions > 1 { count("requests retracted twice", 1) }
      if outcome.retractions > 0 && outcome.promptLogprobs != nil { count("retracted with prompt logprobs", 1) }
      switch outcome.error?.code {
      case .queueFull?: count("full queues", 1)
      case .promptTooLong?: count("prompts too long", 1)
      case .shuttingDown?: count("requests after the end", 1)
      default: break
      }
      switch outcome.reason {
      case .stop(.token)?: count("stop tokens", 1)
      case .stop?: count("readers who have enough", 1)
      case .length?: count("ends by length", 1)
      case .abort("client")?: count("aborts", 1)
      case .abort("logits are not numbers")?: count("failures", 1)
      case .abort?: count("ends for lack of pages", 1)
      case nil: break
      }
    }
  }

  func expectEverything() {
    let names = [
      "retractions by priority", "retractions for lack of pages", "cached tokens", "evicted tokens", "flushes",
      "drains", "requests retracted twice", "retracted with prompt logprobs", "full queues", "prompts too long",
      "requests after the end", "stop tokens", "readers who have enough", "ends by length", "aborts", "failures",
      "ends for lack of pages", "forced tokens", "postponed draws",
      "log-probabilities beside forced tokens", "right guesses", "wrong guesses",
    ]
    for name in names { #expect(counts[name, default: 0] >= 20, "the schedules met only \(counts[name] ?? 0) \(name)") }
  }
}
