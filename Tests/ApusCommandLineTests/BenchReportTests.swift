import ApusCommandLine
import ApusCore
import Synchronization
import Testing

@Suite struct BenchReportTests {
  private func record(sent: Double, pieces: [(Double, Int)], ended: Double, output: Int) -> BenchRecord {
    var record = BenchRecord()
    record.sent = sent
    record.pieces = pieces.map { (time: $0.0, tokens: $0.1) }
    record.ended = ended
    record.promptTokens = 10
    record.outputTokens = output
    return record
  }

  @Test func latenciesOfOneRequest() {
    let one = record(sent: 1, pieces: [(2, 1), (3, 1), (5, 2)], ended: 5.5, output: 4)
    #expect(one.timeToFirstToken == 1)
    #expect(one.timePerOutputToken == 1)
    #expect(one.interTokenLatencies == [1, 1, 1])
    #expect(one.latency == 4.5)
    #expect(record(sent: 0, pieces: [], ended: 1, output: 0).timeToFirstToken == nil)
    #expect(record(sent: 0, pieces: [(1, 1)], ended: 1, output: 1).timePerOutputToken == nil)
  }

  @Test func reportAddsUp() {
    var failed = BenchRecord()
    failed.sent = 0
    failed.ended = 1
    failed.error = "HTTP 429"
    failed.detail = "full"
    let report = BenchReport([
      record(sent: 0, pieces: [(1, 1), (2, 1)], ended: 2, output: 2),
      record(sent: 1, pieces: [(2, 1), (3, 1)], ended: 4, output: 2), failed,
    ])
    #expect(report.completed == 2 && report.failed == 1 && report.duration == 4)
    #expect(report.promptTokens == 20 && report.outputTokens == 4)
    #expect(report.peakConcurrency == 2 && report.meanConcurrency == 1.25)
    #expect(report.errors["HTTP 429"]?.count == 1)
    #expect(report.json["output_throughput"] == .double(1))
    #expect(report.json["mean_ttft_ms"] == .double(1000))
    #expect(report.table.contains("1 x HTTP 429: full"))
  }

  @Test func requestsBackToBackDoNotOverlap() {
    let records = (0..<4).map { record(sent: Double($0), pieces: [(Double($0), 1)], ended: Double($0 + 1), output: 1) }
    #expect(BenchReport(records).peakConcurrency == 1)
  }

  @Test func goodputCountsWhoKeptTheLimits() throws {
    let limits = try Goodput(["ttft:1000", "e2e:3000"])
    let fast = record(sent: 0, pieces: [(1, 1)], ended: 3, output: 1)
    let slow = record(sent: 0, pieces: [(1.5, 1)], ended: 2, output: 1)
    #expect(limits.accepts(fast) && !limits.accepts(slow))
    #expect(BenchReport([fast, slow], goodput: limits).goodRequests == 1)
    for text in ["ttft", "ttft:x", "latency:3", "tpot:-1"] {
      #expect(throws: CommandFailure.self) { try Goodput([text]) }
    }
  }

  @Test func theDriverKeepsTheLimitAndTheOrder() async throws {
    let level = Mutex((now: 0, peak: 0))
    let driver = BenchDriver(arrivals: Array(repeating: 0, count: 40), maxConcurrency: 3)
    let records = try await driver.run { index in
      level.withLock {
        $0.now += 1
        $0.peak = max($0.peak, $0.now)
      }
      await Task.yield()
      level.withLock { $0.now -= 1 }
      var record = BenchRecord()
      record.outputTokens = index
      return record
    }
    #expect(records.map(\.outputTokens) == Array(0..<40))
    #expect(level.withLock { $0.peak } <= 3)
  }

  @Test func theDriverWaitsForArrivals() async throws {
    let time = Mutex(0.0)
    let arrivals = [0, 0.5, 0.5, 2]
    let records = try await BenchDriver(arrivals: arrivals, maxConcurrency: nil).run(
      send: { index in
        var record = BenchRecord()
        record.promptTokens = index
        return record
      }, sleep: { seconds in time.withLock { $0 += seconds } }, now: { time.withLock { $0 } })
    #expect(records.count == 4)
    #expect(time.withLock { $0 } == 2)
  }

  @Test func eventsAreCutAnywhere() {
    let stream = "data: {\"a\": 1}\n\n: comment\r\nid: 3\r\ndata:two\r\ndata: lines\r\n\r\ndata: [DONE]\n\ndata: cut"
    let expected = ["{\"a\": 1}", "two\nlines", "[DONE]"]
    let bytes = Array(stream.utf8)
    for size in 1...bytes.count {
      var parser = EventStreamParser()
      var events: [String] = []
      for start in stride(from: 0, to: bytes.count, by: size) {
        parser.feed(bytes[start..<min(bytes.count, start + size)]) {
          events.append(String(decoding: $0, as: UTF8.self))
        }
      }
      #expect(events == expected)
    }
  }
}
