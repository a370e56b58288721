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
    for seed in 1...Self.seedCount {
      let scenario = Scenario(seed: seed)
      let run = try simulate(scenario, overlapped: overlapped)
      let faults = faults(of: run, in: scenario)
      #expect(faults.isEmpty, "seed \(seed), overlapped \(overlapped): \(faults.prefix(5))")
    }
  }
}
