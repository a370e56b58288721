import ApusChat
import ApusCore
import Glibc
import Hummingbird

/// Seconds since 1970.
func unixTime() -> Int { time(nil) }

extension ServerState {
  /// `GET /v1/models`.
  func models(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    Response { writer in
      writer.member("object", "list")
      writer.key("data")
      writer.array { writer in writer.object(writeModel) }
    }
  }

  /// `GET /v1/models/{id}`, where the id may hold slashes.
  func model(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let prefix = "/v1/models/"
    let path = request.uri.path
    let name = String(path.dropFirst(path.hasPrefix(prefix) ? prefix.count : 0))
    let decoded = percentDecoded(name)
    try check(model: decoded)
    return Response(object: writeModel)
  }

  private func writeModel(_ writer: inout JSONWriter) {
    let model = service.model
    writer.member("id", model.name)
    writer.member("object", "model")
    writer.member("created", model.created)
    writer.member("owned_by", "apus")
    writer.member("root", model.path)
    writer.member("parent", .null)
    writer.member("max_model_len", model.contextLength)
  }

  /// `GET /health`: whether the server is alive and not stopping. Costs nothing.
  func health(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    isDraining || service.statistics().isDraining ? shuttingDown : Response(text: "OK\n")
  }

  /// `GET /ready`: whether new requests are admitted at this moment.
  func ready(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let statistics = service.statistics()
    let isFull = statistics.maxQueuedRequests > 0 && statistics.waitingRequests >= statistics.maxQueuedRequests
    if isDraining || statistics.isDraining { return shuttingDown }
    if isFull { return Response(status: .serviceUnavailable, text: "The waiting queue is full.\n") }
    return Response(text: "OK\n")
  }

  private var shuttingDown: Response {
    Response(status: .serviceUnavailable, text: "The server is shutting down.\n")
  }

  /// `GET /health_generate`: whether the model answers, by a request for one token. A server whose queue is full is
  /// healthy if its engine makes steps.
  func healthGenerate(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    if isDraining { return shuttingDown }
    if let embeddings = service.embeddings { return try await healthEmbed(embeddings, context) }
    var parameters = SamplingParameters.greedy
    parameters.maxNewTokens = 1
    parameters.ignoreEOS = true
    let token = service.model.bosTokenID ?? service.model.eosTokenIDs.first ?? 0
    let request = ApusCore.Request(
      id: RequestID("health-" + RequestID.unique().rawValue), prompt: .tokens([token]), sampling: parameters,
      // Larger is more urgent: the probe must not wait for a long queue to be served.
      priority: Int(Int32.max))
    let submitted = Result { () throws(EngineError) in try submit([request], context) }
    let probe: GenerationGroup?
    switch submitted {
    case .success(let group): probe = group
    case .failure(let error) where error.code == .queueFull: probe = nil
    case .failure(let error): throw error
    }
    let limit = configuration.probeTimeout
    let service = service
    let answered = try await withThrowingTaskGroup(of: Bool.self) { tasks in
      tasks.addTask {
        if let probe {
          guard case .abort = try await probe.results()[0].finishReason else { return true }
          return false
        }
        let steps = service.statistics().steps
        while !Task.isCancelled, service.statistics().steps == steps { try await Task.sleep(for: .milliseconds(20)) }
        return true
      }
      tasks.addTask {
        try? await Task.sleep(for: .seconds(limit))
        return false
      }
      let first = try await tasks.next() ?? false
      tasks.cancelAll()
      probe?.finish()
      return first
    }
    return answered
      ? Response(text: "OK\n")
      : Response(status: .serviceUnavailable, text: "The model gave no token within \(limit) seconds.\n")
  }

  /// `GET /model_info`.
  func modelInfo(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let model = service.model
    return Response { writer in
      writer.member("model_path", model.path)
      writer.member("tokenizer_path", model.path)
      writer.member("served_model_name", model.name)
      writer.member("is_generation", true)
      writer.key("preferred_sampling_params")
      writeSamplingDefaults(model.samplingDefaults, to: &writer)
      writer.member("weight_version", "default")
      writer.key("architectures")
      writer.array { $0.value(model.architecture) }
      writer.member("num_parameters", model.parameterCount)
      writer.member("context_length", model.contextLength)
      writer.member("vocab_size", model.vocabularySize)
      writer.member("dtype", model.dtype)
      writer.member("kv_cache_dtype", model.kvDtype)
      writer.key("eos_token_ids")
      writer.tokens(model.eosTokenIDs)
      writer.member("bos_token_id", model.bosTokenID.map { .int(Int64($0)) } ?? .null)
      writer.member("has_chat_template", model.hasChatTemplate)
      writer.member("has_image_understanding", false)
      writer.member("has_audio_understanding", false)
    }
  }

  private func writeSamplingDefaults(_ defaults: SamplingDefaults, to writer: inout JSONWriter) {
    writer.object { writer in
      if let value = defaults.temperature { writer.key("temperature"); writer.value(value) }
      if let value = defaults.topK { writer.member("top_k", value) }
      if let value = defaults.topP { writer.key("top_p"); writer.value(value) }
      if let value = defaults.minP { writer.key("min_p"); writer.value(value) }
      if let value = defaults.repetitionPenalty { writer.key("repetition_penalty"); writer.value(value) }
      if let value = defaults.maxNewTokens { writer.member("max_new_tokens", value) }
    }
  }

  /// `GET /server_info`: settings and state.
  func serverInfo(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let statistics = service.statistics()
    let model = service.model
    return Response { writer in
      writer.member("version", configuration.version)
      writer.member("status", isDraining ? "draining" : "ready")
      writer.member("model_path", model.path)
      writer.member("served_model_name", model.name)
      writer.member("context_length", model.contextLength)
      writer.member("dtype", model.dtype)
      writer.member("kv_cache_dtype", model.kvDtype)
      writer.member("host", configuration.host)
      writer.member("port", configuration.port)
      writer.member("tool_call_parser", formats.calls.map { .string($0.name) } ?? .null)
      writer.member("reasoning_parser", formats.reasoning.map { .string($0.name) } ?? .null)
      writer.member("tls", configuration.certificateFile != nil)
      writer.member("api_key_required", configuration.apiKey != nil)
      writer.member("max_body_bytes", configuration.maxBodyBytes)
      writer.member("max_connections", configuration.maxConnections)
      writer.member("uptime_seconds", seconds(ContinuousClock.now - started))
      writer.member("open_connections", monitors.count)
      for (name, value) in configuration.details { writer.member(name, value) }
      writer.key("internal_states")
      writer.array { $0.object { writeState(statistics, to: &$0) } }
    }
  }

  private func writeState(_ s: ServiceStatistics, to writer: inout JSONWriter) {
    writer.member("num_running_reqs", s.runningRequests)
    writer.member("num_waiting_reqs", s.waitingRequests)
    writer.member("max_running_requests", s.maxRunningRequests)
    writer.member("max_queued_requests", s.maxQueuedRequests)
    writer.member("num_used_tokens", s.kvUsedTokens)
    writer.member("num_evictable_tokens", s.kvEvictableTokens)
    writer.member("num_free_tokens", s.kvFreeTokens)
    writer.member("max_total_num_tokens", s.kvCapacityTokens)
    writer.member("token_usage", s.tokenUsage)
    writer.member("gen_throughput", s.generationThroughput)
    writer.member("cache_hit_rate", s.cacheHitRate)
    writer.member("new_token_ratio", s.newTokenRatio)
    writer.member("utilization", s.utilization)
    writer.member("steps", s.steps)
    writer.member("num_finished_reqs", s.finishedRequests)
    writer.member("num_aborted_reqs", s.abortedRequests)
    writer.member("num_rejected_reqs", s.rejectedRequests)
    writer.member("num_retractions", s.retractions)
    writer.member("prompt_tokens", s.promptTokens)
    writer.member("cached_tokens", s.cachedTokens)
    writer.member("generated_tokens", s.generatedTokens)
    writer.member("jump_forward_tokens", s.forcedTokens)
    writer.member("spec_draft_tokens", s.draftTokens)
    writer.member("spec_accepted_tokens", s.acceptedDraftTokens)
    writer.member("spec_verify_calls", s.verifications)
    writer.member("spec_accept_rate", s.speculation.acceptRate)
    writer.member("spec_accept_length", s.speculation.acceptLength)
    writer.member("evicted_tokens", s.evictedTokens)
    writer.member("resident_bytes", s.residentBytes)
    writer.member("scheduler_seconds", s.schedulerSeconds)
    writer.member("forward_seconds", s.forwardSeconds)
  }

  /// `GET /v1/loads`: the load, as JSON or (`format=prometheus`) as metrics.
  func loads(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let statistics = service.statistics()
    switch request.uri.queryParameters["format"] {
    case nil, "json"?: break
    case "prometheus"?:
      var text = PrometheusText()
      metrics.write(statistics, &text)
      return Response(text: text.text, contentType: prometheusContentType)
    case let format?:
      throw EngineError(
        .invalidRequest, "format must be json or prometheus, got \(String(format).debugDescription).",
        parameter: "format")
    }
    return Response { writer in
      writer.member("timestamp", unixTime())
      writer.member("version", configuration.version)
      writer.member("dp_rank_count", 1)
      writer.key("loads")
      writer.array { writer in
        writer.object { writer in
          writer.member("dp_rank", 0)
          writeState(statistics, to: &writer)
        }
      }
      writer.key("aggregate")
      writer.object { writer in
        writer.member("total_running_reqs", statistics.runningRequests)
        writer.member("total_waiting_reqs", statistics.waitingRequests)
        writer.member("total_reqs", statistics.runningRequests + statistics.waitingRequests)
        writer.member("avg_token_usage", statistics.tokenUsage)
        writer.member("avg_throughput", statistics.generationThroughput)
        writer.member("avg_utilization", statistics.utilization)
      }
    }
  }

  /// `GET /metrics`.
  func metricsPage(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    Response(
      text: metrics.render(service.statistics(), expertLoads: service.expertLoads), contentType: prometheusContentType)
  }

  private var prometheusContentType: String { "text/plain; version=0.0.4; charset=utf-8" }
}

/// A text with `%41` replaced by the byte it names. An escape that is none stays as it is.
func percentDecoded(_ text: String) -> String {
  var bytes: [UInt8] = []
  let utf8 = Array(text.utf8)
  func digit(_ byte: UInt8) -> UInt8? {
    switch byte {
    case UInt8(ascii: "0")...UInt8(ascii: "9"): byte - UInt8(ascii: "0")
    case UInt8(ascii: "a")...UInt8(ascii: "f"): byte - UInt8(ascii: "a") + 10
    case UInt8(ascii: "A")...UInt8(ascii: "F"): byte - UInt8(ascii: "A") + 10
    default: nil
    }
  }
  var index = 0
  while index < utf8.count {
    if utf8[index] == UInt8(ascii: "%"), index + 2 < utf8.count, let high = digit(utf8[index + 1]),
      let low = digit(utf8[index + 2])
    {
      bytes.append(high << 4 | low)
      index += 3
    } else {
      bytes.append(utf8[index])
      index += 1
    }
  }
  return String(decoding: bytes, as: UTF8.self)
}
