import ApusTesting
import Testing

@Suite(.serialized) struct SchedulerCostTests {
  /// Prints what a step costs. Nothing is asserted of times: machines differ, and this one may be busy.
  @Test(arguments: [1, 64, 256])
  func printsTheCostOfAStep(runningRequests: Int) {
    let result = SchedulerBenchmark(runningRequests: runningRequests).run()
    print(
      "scheduler step at \(runningRequests) running: median \(result.median) us, p99 \(result.p99) us, "
        + "of which next \(result.next) us")
    #expect(result.median > 0)
  }
}
