package import ApusCore

/// What happened to one request of a benchmark. Times are seconds of one monotonic clock.
package struct BenchRecord: Sendable, Equatable {
  /// When it was sent.
  package var sent = 0.0
  /// When each piece of output arrived, and how many tokens it brought (0 where the server does not say).
  package var pieces: [(time: Double, tokens: Int)] = []
  /// When the answer ended.
  package var ended = 0.0
  /// Tokens as the server counted them.
  package var promptTokens = 0
  package var outputTokens = 0
  package var cachedTokens = 0
  /// The kind of failure, such as `HTTP 429`; `nil` for success.
  package var error: String?
  /// The failure's first words.
  package var detail: String?

  /// An empty record.
  package init() {}

  package static func == (left: BenchRecord, right: BenchRecord) -> Bool {
    left.sent == right.sent && left.ended == right.ended && left.promptTokens == right.promptTokens
      && left.outputTokens == right.outputTokens && left.cachedTokens == right.cachedTokens && left.error == right.error
      && left.detail == right.detail && left.pieces.elementsEqual(right.pieces) { $0 == $1 }
  }

  /// Seconds to the first piece of output.
  package var timeToFirstToken: Double? { pieces.first.map { $0.time - sent } }
  /// Seconds from sending to the end.
  package var latency: Double { ended - sent }
  /// Seconds per token after the first.
  package var timePerOutputToken: Double? {
    guard let first = pieces.first, let last = pieces.last, outputTokens > 1 else { return nil }
    return (last.time - first.time) / Double(outputTokens - 1)
  }
  /// Gaps between tokens. A piece of several tokens counts as that many equal gaps, so that servers that send rarely
  /// do not look smoother than they are paid for.
  package var interTokenLatencies: [Double] {
    var gaps: [Double] = []
    for (previous, piece) in zip(pieces, pieces.dropFirst()) {
      let tokens = max(1, piece.tokens)
      for _ in 0..<tokens { gaps.append((piece.time - previous.time) / Double(tokens)) }
    }
    return gaps
  }
}

/// Limits on latencies that a request must keep to count as good.
package struct Goodput: Sendable, Equatable {
  /// Seconds; `nil` sets no limit.
  package var timeToFirstToken: Double?
  package var timePerOutputToken: Double?
  package var latency: Double?

  /// No limit.
  package init() {}

  /// Reads limits such as `ttft:500`, in milliseconds.
  package init(_ texts: [String]) throws(CommandFailure) {
    for text in texts {
      let parts = text.split(separator: ":", maxSplits: 1)
      guard parts.count == 2, let milliseconds = Double(parts[1]), milliseconds > 0 else {
        throw .usage("A goodput limit is written as 'ttft:500' (milliseconds), got '\(text)'.")
      }
      switch parts[0] {
      case "ttft": timeToFirstToken = milliseconds / 1000
      case "tpot": timePerOutputToken = milliseconds / 1000
      case "e2e", "e2el": latency = milliseconds / 1000
      default: throw .usage("A goodput limit is one of ttft, tpot and e2e, got '\(parts[0])'.")
      }
    }
  }

  /// Whether there is any limit.
  package var isEmpty: Bool { self == Goodput() }

  /// Whether a request kept the limits.
  package func accepts(_ record: BenchRecord) -> Bool {
    func within(_ value: Double?, _ limit: Double?) -> Bool { limit.map { (value ?? 0) <= $0 } ?? true }
    return record.error == nil && within(record.timeToFirstToken, timeToFirstToken)
      && within(record.timePerOutputToken, timePerOutputToken) && within(record.latency, latency)
  }
}

/// What a benchmark found.
package struct BenchReport: Sendable {
  /// Seconds from the first request to the last answer.
  package var duration: Double
  package var completed: Int
  package var failed: Int
  /// Failures by kind with an example of each.
  package var errors: [String: (count: Int, example: String)]
  package var promptTokens: Int
  package var outputTokens: Int
  package var cachedTokens: Int
  /// Requests in flight, averaged over time, and at most.
  package var meanConcurrency: Double
  package var peakConcurrency: Int
  package var goodRequests: Int
  package var goodput: Goodput
  package var timeToFirstToken: Summary
  package var timePerOutputToken: Summary
  package var interTokenLatency: Summary
  package var latency: Summary

  /// Summarises records.
  package init(_ records: [BenchRecord], goodput: Goodput = Goodput()) {
    let good = records.filter { $0.error == nil }
    let start = records.map(\.sent).min() ?? 0
    duration = max(1e-9, (records.map(\.ended).max() ?? 0) - start)
    completed = good.count
    failed = records.count - good.count
    errors = [:]
    for record in records {
      guard let kind = record.error else { continue }
      errors[kind, default: (0, record.detail ?? "")].count += 1
    }
    promptTokens = good.reduce(0) { $0 + $1.promptTokens }
    outputTokens = good.reduce(0) { $0 + $1.outputTokens }
    cachedTokens = good.reduce(0) { $0 + $1.cachedTokens }
    meanConcurrency = good.reduce(0) { $0 + $1.latency } / duration
    self.goodput = goodput
    goodRequests = good.filter(goodput.accepts).count
    timeToFirstToken = Summary(good.compactMap(\.timeToFirstToken))
    timePerOutputToken = Summary(good.compactMap(\.timePerOutputToken))
    interTokenLatency = Summary(good.flatMap(\.interTokenLatencies))
    latency = Summary(good.map(\.latency))
    // A sweep over starts and ends; at equal times ends come first, so that back-to-back requests do not overlap.
    let edges = (good.map { ($0.sent, 1) } + good.map { ($0.ended, -1) }).sorted { $0 < $1 }
    var level = 0
    peakConcurrency = 0
    for (_, step) in edges {
      level += step
      peakConcurrency = max(peakConcurrency, level)
    }
  }

  /// The report as a table for people.
  package var table: String {
    var text = ""
    func row(_ name: String, _ value: String) { text += "\(name.padded(34))\(value.aligned(14))\n" }
    row("Successful requests", grouped(completed))
    if failed > 0 { row("Failed requests", grouped(failed)) }
    row("Duration (s)", fixed(duration, 2))
    row("Prompt tokens", grouped(promptTokens))
    row("  of them cached", grouped(cachedTokens))
    row("Output tokens", grouped(outputTokens))
    row("Request throughput (1/s)", fixed(Double(completed) / duration, 2))
    row("Prompt token throughput (1/s)", fixed(Double(promptTokens) / duration, 1))
    row("Output token throughput (1/s)", fixed(Double(outputTokens) / duration, 1))
    row("Total token throughput (1/s)", fixed(Double(promptTokens + outputTokens) / duration, 1))
    row("Concurrency, mean", fixed(meanConcurrency, 2))
    row("Concurrency, peak", grouped(peakConcurrency))
    if !goodput.isEmpty { row("Goodput (1/s)", fixed(Double(goodRequests) / duration, 2)) }
    text += "\n\("Milliseconds".padded(16))"
    let columns = ["mean", "median", "p90", "p95", "p99", "max"]
    text += columns.map { $0.aligned(11) }.joined() + "\n"
    for (name, summary) in [
      ("TTFT", timeToFirstToken), ("TPOT", timePerOutputToken), ("ITL", interTokenLatency), ("E2E", latency),
    ] {
      let values = [summary.mean, summary.median, summary.p90, summary.p95, summary.p99, summary.maximum]
      text += name.padded(16) + values.map { fixed($0 * 1000, 2).aligned(11) }.joined() + "\n"
    }
    return errors.isEmpty ? text : text + "\n" + failures
  }

  /// A line for each kind of failure, with an example.
  package var failures: String {
    errors.sorted { $0.key < $1.key }.map { "\($0.value.count) x \($0.key): \($0.value.example)\n" }.joined()
  }

  /// The report as JSON, with the field names of SGLang's serving benchmark where the meaning is the same.
  package var json: JSONObject {
    var object = JSONObject([
      ("duration", .double(duration)), ("completed", .int(Int64(completed))), ("failed", .int(Int64(failed))),
      ("total_input_tokens", .int(Int64(promptTokens))), ("total_output_tokens", .int(Int64(outputTokens))),
      ("total_cached_tokens", .int(Int64(cachedTokens))),
      ("request_throughput", .double(Double(completed) / duration)),
      ("input_throughput", .double(Double(promptTokens) / duration)),
      ("output_throughput", .double(Double(outputTokens) / duration)),
      ("total_throughput", .double(Double(promptTokens + outputTokens) / duration)),
      ("concurrency", .double(meanConcurrency)), ("max_concurrent_requests", .int(Int64(peakConcurrency))),
    ])
    if !goodput.isEmpty { object["request_goodput"] = .double(Double(goodRequests) / duration) }
    for (name, summary) in [
      ("ttft", timeToFirstToken), ("tpot", timePerOutputToken), ("itl", interTokenLatency), ("e2e_latency", latency),
    ] {
      for (statistic, value) in [
        ("mean", summary.mean), ("median", summary.median), ("std", summary.standardDeviation), ("p90", summary.p90),
        ("p95", summary.p95), ("p99", summary.p99), ("max", summary.maximum),
      ] {
        object["\(statistic)_\(name)_ms"] = .double(value * 1000)
      }
    }
    object["errors"] = .object(
      JSONObject(errors.sorted { $0.key < $1.key }.map { ($0.key, .int(Int64($0.value.count))) }))
    return object
  }
}
