/// Sends requests at their times and keeps at most so many in flight.
package struct BenchDriver: Sendable {
  /// When each request is to be sent, in seconds after the start; not decreasing.
  package var arrivals: [Double]
  /// Requests in flight at most.
  package var maxConcurrency: Int?

  /// Plans a run.
  package init(arrivals: [Double], maxConcurrency: Int?) {
    self.arrivals = arrivals
    self.maxConcurrency = maxConcurrency
  }

  /// Runs all requests.
  /// - Parameters:
  ///   - send: sends request `index` and returns when it has ended.
  ///   - sleep: waits for so many seconds.
  ///   - now: the clock that `sleep` follows, in seconds.
  ///   - progress: is told after each record.
  /// - Returns: the records in the order of the requests.
  package func run(
    send: @escaping @Sendable (Int) async -> BenchRecord,
    sleep: (Double) async throws -> Void = { try await Task.sleep(nanoseconds: UInt64(max(0, $0) * 1e9)) },
    now: () -> Double = monotonicSeconds, progress: (BenchRecord) -> Void = { _ in }
  ) async throws -> [BenchRecord] {
    var records = [BenchRecord](repeating: BenchRecord(), count: arrivals.count)
    let start = now()
    try await withThrowingTaskGroup(of: (Int, BenchRecord).self) { group in
      var inFlight = 0
      func collect(_ result: (Int, BenchRecord)) {
        inFlight -= 1
        records[result.0] = result.1
        progress(result.1)
      }
      for (index, arrival) in arrivals.enumerated() {
        let wait = start + arrival - now()
        if wait > 0 { try await sleep(wait) }
        while inFlight >= maxConcurrency ?? .max, let result = try await group.next() { collect(result) }
        inFlight += 1
        group.addTask { (index, await send(index)) }
      }
      while let result = try await group.next() { collect(result) }
    }
    return records
  }
}
