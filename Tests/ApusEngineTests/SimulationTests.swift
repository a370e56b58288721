import ApusCore
import ApusEngine
import ApusScheduling
import ApusTesting
import Testing

@Suite struct SimulationTests {
  /// Enough schedules to meet rare combinations, few enough for every run of the tests.
  static let seedCount: UInt64 = 1000

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
    print(met)
  }
}

/// What the schedules of a test met, so that a change that makes them tame is noticed.
struct Coverage {
  var requests = 0
  var ended = 0
  var retractions = 0
  var preemptions = 0
  var retractedByPolicy = 0
  var lackOfPages = 0
  var cachedTokens = 0
  var evictedTokens = 0
  var aborted = 0
  var failed = 0
  var queueFull = 0
  var tooLong = 0
  var shuttingDown = 0
  var flushed = 0
  var drained = 0
  var rounds = 0
  var generated = 0

  mutating func add(_ run: Run, _ scenario: Scenario) {
    rounds += run.rounds
    generated += run.statistics.generatedTokens
    retractions += run.statistics.retractions
    if scenario.configuration.policy == .priority { preemptions += run.statistics.retractions }
    cachedTokens += run.statistics.cachedTokens
    evictedTokens += run.statistics.evictedTokens
    flushed += run.flushes.count
    drained += run.drainedCount
    for outcome in run.outcomes.values {
      requests += 1
      switch outcome.error?.code {
      case .queueFull?: queueFull += 1
      case .promptTooLong?: tooLong += 1
      case .shuttingDown?: shuttingDown += 1
      default: break
      }
      switch outcome.reason {
      case .abort("client")?: aborted += 1
      case .abort("logits are not numbers")?: failed += 1
      case .abort?: lackOfPages += 1
      case .some: ended += 1
      case nil: break
      }
    }
  }
}
