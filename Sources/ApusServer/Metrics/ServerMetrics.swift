import ApusCore
import Metrics
import Synchronization

/// What the server counts, and how it reports that together with the service's own counts.
///
/// Names are those of SGLang with the prefix `apus:` where the meaning is the same.
final class ServerMetrics: Sendable {
  /// The registry that everything is recorded in.
  let registry: PrometheusRegistry
  private let dimensions: [(String, String)]
  private let requests: Counter
  private let timeToFirstToken: Recorder
  private let interTokenLatency: Recorder
  private let endToEnd: Recorder
  private let promptTokens: Recorder
  private let generationTokens: Recorder
  private let activeHTTP = Atomic<Int>(0)

  /// When a generation started and when its last chunk came.
  struct Clock {
    fileprivate var start: ContinuousClock.Instant
    fileprivate var last: ContinuousClock.Instant?
    fileprivate var tokens = 0
  }

  init(modelName: String, registry: PrometheusRegistry) {
    self.registry = registry
    let dimensions = [("model_name", modelName)]
    self.dimensions = dimensions
    let tokenBuckets: [Double] = [
      1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072,
    ]
    registry.describe("apus:num_requests_total", help: "Generations submitted.")
    registry.describe(
      "apus:time_to_first_token_seconds", help: "Seconds from a request's submission to its first token.")
    registry.describe("apus:inter_token_latency_seconds", help: "Seconds between the tokens of a request.")
    registry.describe("apus:e2e_request_latency_seconds", help: "Seconds from a request's submission to its end.")
    registry.describe("apus:prompt_tokens_histogram", help: "Prompt tokens per request.", buckets: tokenBuckets)
    registry.describe("apus:generation_tokens_histogram", help: "Output tokens per request.", buckets: tokenBuckets)
    registry.describe("apus:http_requests_total", help: "HTTP requests received.")
    registry.describe("apus:http_responses_total", help: "HTTP responses sent, by status.")
    registry.describe("apus:http_request_duration_seconds", help: "Seconds from a request to the end of its response.")
    requests = Counter(label: "apus:num_requests_total", dimensions: dimensions, factory: registry)
    func histogram(_ name: String) -> Recorder {
      Recorder(label: name, dimensions: dimensions, aggregate: true, factory: registry)
    }
    timeToFirstToken = histogram("apus:time_to_first_token_seconds")
    interTokenLatency = histogram("apus:inter_token_latency_seconds")
    endToEnd = histogram("apus:e2e_request_latency_seconds")
    promptTokens = histogram("apus:prompt_tokens_histogram")
    generationTokens = histogram("apus:generation_tokens_histogram")
  }

  func requestsStarted(_ count: Int) { requests.increment(by: count) }

  func startClock() -> Clock { Clock(start: .now) }

  /// Records the latencies that a chunk ends.
  func observe(_ chunk: GenerationChunk, _ clock: inout Clock) {
    let now = ContinuousClock.now
    let count = chunk.usage.completionTokens - clock.tokens
    if count > 0 {
      if let last = clock.last {
        // A chunk of several tokens ends as many intervals, of equal length as far as anybody can tell.
        let interval = seconds(now - last) / Double(count)
        for _ in 0..<count { interTokenLatency.record(interval) }
      } else {
        timeToFirstToken.record(seconds(now - clock.start))
      }
      clock.last = now
      clock.tokens = chunk.usage.completionTokens
    }
    if chunk.finishReason != nil {
      endToEnd.record(seconds(now - clock.start))
      promptTokens.record(chunk.usage.promptTokens)
      generationTokens.record(chunk.usage.completionTokens)
    }
  }

  /// HTTP requests whose responses have not ended.
  var activeHTTPRequests: Int { activeHTTP.load(ordering: .relaxed) }

  /// An HTTP request came in.
  func httpStarted(endpoint: String, method: String) {
    activeHTTP.wrappingAdd(1, ordering: .relaxed)
    Counter(
      label: "apus:http_requests_total", dimensions: [("endpoint", endpoint), ("method", method)], factory: registry
    ).increment()
  }

  /// An HTTP response has ended.
  func httpEnded(endpoint: String, method: String, status: Int, seconds: Double) {
    activeHTTP.wrappingSubtract(1, ordering: .relaxed)
    Counter(
      label: "apus:http_responses_total",
      dimensions: [("endpoint", endpoint), ("method", method), ("status_code", "\(status)")], factory: registry
    ).increment()
    Recorder(
      label: "apus:http_request_duration_seconds", dimensions: [("endpoint", endpoint)], aggregate: true,
      factory: registry
    ).record(seconds)
  }

  /// All metrics in Prometheus' text format.
  func render(_ statistics: ServiceStatistics, expertLoads: (any ExpertLoadService)? = nil) -> String {
    var text = PrometheusText()
    write(statistics, &text)
    if let balancedness = expertLoads?.balancedness {
      text.single(
        "apus:eplb_balancedness", .gauge,
        "Mean over layers of mean / largest load of the places of experts' weights, of what was recorded.",
        prometheusLabels(dimensions), balancedness)
    }
    text.single(
      "apus:http_requests_active", .gauge, "HTTP requests whose responses have not ended.", "",
      Double(activeHTTPRequests))
    registry.render(into: &text)
    return text.text
  }

  /// Writes a service's counts and levels, which are read when somebody asks and recorded nowhere.
  func write(_ s: ServiceStatistics, _ text: inout PrometheusText) {
    let labels = prometheusLabels(dimensions)
    func gauge(_ name: String, _ help: String, _ value: Double) {
      text.single("apus:\(name)", .gauge, help, labels, value)
    }
    func counter(_ name: String, _ help: String, _ value: Double) {
      text.single("apus:\(name)", .counter, help, labels, value)
    }
    gauge("num_running_reqs", "Requests being computed.", Double(s.runningRequests))
    gauge("num_queue_reqs", "Requests waiting for their first step.", Double(s.waitingRequests))
    gauge("max_running_requests", "The most requests that may run at once.", Double(s.maxRunningRequests))
    gauge("max_queued_requests", "The most requests that may wait.", Double(s.maxQueuedRequests))
    gauge("token_usage", "Share of the K/V pool that requests in flight hold.", s.tokenUsage)
    gauge("num_used_tokens", "Tokens of the K/V pool that requests in flight hold.", Double(s.kvUsedTokens))
    gauge("max_total_num_tokens", "Capacity of the K/V pool in tokens.", Double(s.kvCapacityTokens))
    gauge("kv_used_tokens", "Tokens of the K/V pool that requests in flight hold.", Double(s.kvUsedTokens))
    gauge("kv_evictable_tokens", "Tokens of the K/V pool that hold unused prefixes.", Double(s.kvEvictableTokens))
    gauge("kv_available_tokens", "Tokens of the K/V pool that hold nothing.", Double(s.kvFreeTokens))
    gauge("gen_throughput", "Output tokens per second over the last seconds.", s.generationThroughput)
    gauge("cache_hit_rate", "Share of prompt tokens found in the prefix cache since the start.", s.cacheHitRate)
    gauge("new_token_ratio", "Share of requested output that admission reserves.", s.newTokenRatio)
    gauge("process_resident_memory_bytes", "Bytes of memory the process has resident.", Double(s.residentBytes))
    gauge("is_draining", "Whether new requests are refused because the server is stopping.", s.isDraining ? 1 : 0)
    counter("prompt_tokens_total", "Prompt tokens since the start.", Double(s.promptTokens))
    counter("generation_tokens_total", "Output tokens since the start.", Double(s.generatedTokens))
    counter("spec_draft_tokens_total", "Draft tokens verified in speculative decoding.", Double(s.draftTokens))
    counter("spec_accepted_tokens_total", "Draft tokens that were accepted.", Double(s.acceptedDraftTokens))
    counter(
      "spec_verify_calls_total", "Verifications of draft tokens: one for each request and step that had some.",
      Double(s.verifications))
    gauge("spec_accept_rate", "Share of draft tokens accepted since the start.", s.speculation.acceptRate)
    gauge("spec_accept_length", "Tokens that a verification brings, on average.", s.speculation.acceptLength)
    counter(
      "jump_forward_tokens_total", "Output tokens that a grammar forced, taken without a draw.", Double(s.forcedTokens))
    counter("cached_tokens_total", "Prompt tokens found in the prefix cache since the start.", Double(s.cachedTokens))
    counter("num_finished_requests_total", "Requests that ended by themselves.", Double(s.finishedRequests))
    counter("num_aborted_requests_total", "Requests that were aborted.", Double(s.abortedRequests))
    counter("num_rejected_requests_total", "Requests that were refused.", Double(s.rejectedRequests))
    counter("num_retracted_reqs_total", "Retractions of running requests.", Double(s.retractions))
    counter("evicted_tokens_total", "Tokens evicted from the prefix cache.", Double(s.evictedTokens))
    counter("engine_steps_total", "Steps of the engine.", Double(s.steps))
    counter("scheduler_seconds_total", "Seconds spent deciding and delivering.", s.schedulerSeconds)
    counter("forward_execution_seconds_total", "Seconds the model ran.", s.forwardSeconds)
  }
}

extension ServiceStatistics {
  /// The share of the K/V pool that requests in flight hold; in [0, 1].
  var tokenUsage: Double { kvCapacityTokens > 0 ? Double(kvUsedTokens) / Double(kvCapacityTokens) : 0 }

  /// The share of prompt tokens that came from the prefix cache since the start; in [0, 1].
  var cacheHitRate: Double { promptTokens > 0 ? Double(cachedTokens) / Double(promptTokens) : 0 }

  /// The share of the running slots in use; in [0, 1].
  var utilization: Double {
    maxRunningRequests > 0 ? Double(runningRequests) / Double(maxRunningRequests) : 0
  }
}
