import ApusCore
import ApusScheduling
import Glibc

/// What the scheduler costs per step, with nothing to wait for.
public struct SchedulerBenchmark: Sendable {
  /// Requests that run at once.
  public var runningRequests: Int
  /// Tokens of each prompt.
  public var promptTokens = 512
  /// Steps measured, after all requests have begun to decode.
  public var steps = 2000

  /// Makes a benchmark of steady decoding.
  public init(runningRequests: Int) { self.runningRequests = runningRequests }

  /// Microseconds that one step takes to decide, to complete, and to report its events.
  public struct Result: Sendable {
    public var median: Double
    public var p99: Double
    /// The share of `median` spent in `next`; the rest is `complete`.
    public var next: Double
  }

  /// Runs it: two steps in flight, as in the overlapped loop, over an executor that answers at once.
  public func run() -> Result {
    let tokens = promptTokens + steps + 64
    var configuration = SchedulerConfiguration(
      pageCount: runningRequests * (tokens / kvPageSize + 2), contextLength: tokens + 1)
    configuration.maxRunningRequests = runningRequests
    configuration.maxQueuedRequests = runningRequests
    configuration.tokenBudget = 8192 + runningRequests
    guard var scheduler = try? Scheduler(configuration) else { fatalError("the benchmark's configuration is invalid") }
    var sampling = SamplingParameters()
    sampling.seed = 1
    sampling.maxNewTokens = nil
    for handle in 0..<runningRequests {
      let prompt = (0..<promptTokens).map { TokenID(truncatingIfNeeded: ($0 &* 31 &+ handle &* 7919) & 0x7FFF) }
      scheduler.apply(
        .submit(Submission(handle: UInt64(handle), tokens: prompt, sampling: sampling, eosTokenIDs: [-2])))
    }
    var batches = [ScheduleBatch(), ScheduleBatch()]
    var result = StepResult()
    var hasInFlight = false
    var times: [Double] = []
    var nextTimes: [Double] = []
    var index = 0
    while times.count < steps {
      let start = now()
      let isLaunched = scheduler.next(into: &batches[index])
      let decided = now()
      index = 1 - index
      var spent = decided - start
      if hasInFlight {
        // What the executor would have brought is not the scheduler's cost.
        result.removeAll()
        for share in batches[index].requests {
          result.tokenCounts.append(share.samples ? 1 : 0)
          if share.samples { result.tokens.append(17) }
        }
        let done = now()
        scheduler.complete(batches[index], result)
        scheduler.removeEvents()
        spent += now() - done
        let isSteady =
          batches[index].requests.count == runningRequests && batches[index].tokens.count == runningRequests
        if isSteady {
          times.append(spent * 1e6)
          nextTimes.append((decided - start) * 1e6)
        }
      }
      hasInFlight = isLaunched
      if !isLaunched && scheduler.isIdle { break }
    }
    times.sort()
    nextTimes.sort()
    return Result(
      median: times[times.count / 2], p99: times[times.count * 99 / 100], next: nextTimes[nextTimes.count / 2])
  }

  private func now() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
  }
}
