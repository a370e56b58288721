import ApusCore
import Hummingbird

extension ServerState {
  /// `POST /generate`, the native API.
  func generate(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let body = try GenerateRequest(try await body(of: request))
    let total = body.prompts.count * body.count
    if total > configuration.maxGenerationsPerRequest {
      throw EngineError(
        .invalidRequest,
        "The request asks for \(total) answers; at most \(configuration.maxGenerationsPerRequest) may be asked for at once."
      )
    }
    var requests: [ApusCore.Request] = []
    for (index, prompt) in body.prompts.enumerated() {
      if case .tokens(let tokens) = prompt { try check(tokens: tokens, "input_ids") }
      var parameters = SamplingParameters()
      if let budget = body.thinkingBudget, budget != -1 { parameters.thinkingBudget = budget }
      body.element(body.sampling, at: index)?.apply(to: &parameters)
      try markThoughts(of: prompt, &parameters)
      try parameters.validate(vocabularySize: service.model.vocabularySize)
      let logprobs = body.logprobOptions(at: index)
      if let logprobs { try check(tokens: logprobs.tokenIDs, "token_ids_logprob") }
      let id = body.rids.isEmpty ? RequestID.unique().rawValue : body.rids[index]
      for sample in 0..<body.count {
        requests.append(
          ApusCore.Request(
            id: RequestID(body.count == 1 ? id : "\(id)-\(sample)"), prompt: prompt,
            sampling: parameters.sample(sample), logprobs: logprobs, priority: body.priority,
            cacheSalt: body.cacheSalt))
      }
    }
    let isList = body.isBatch || body.count > 1
    let group = try submit(requests, context)
    if body.stream { return streamGenerations(group, requests, isList: isList, returnsText: body.returnsText) }
    let results = try await group.results()
    let elapsed = group.elapsed
    var writer = JSONWriter(capacity: 1024)
    func write(_ index: Int, _ writer: inout JSONWriter) {
      let result = results[index]
      var text = JSONWriter(capacity: result.text.utf8.count + 16)
      text.value(result.text)
      writer.object { writer in
        writeGeneration(
          NativeAnswer(result, request: requests[index], quotedText: text.bytes, elapsed: elapsed),
          returnsText: body.returnsText, to: &writer)
      }
    }
    if isList {
      writer.array { writer in for index in results.indices { write(index, &writer) } }
    } else {
      write(0, &writer)
    }
    return Response(json: writer)
  }

  /// Streams answers. By default each event holds the whole text so far, as SGLang's does; the escaped text is kept and
  /// grows, so that an event costs a copy and no second escaping.
  private func streamGenerations(
    _ group: GenerationGroup, _ requests: [ApusCore.Request], isList: Bool, returnsText: Bool
  ) -> Response {
    let incremental = configuration.incrementalStreaming
    return .events { [self] events in
      var results = [GenerationResult](repeating: GenerationResult(), count: requests.count)
      // Escaped text with its opening quote; the closing one is added per event.
      var texts = [[UInt8]](repeating: [UInt8(ascii: "\"")], count: requests.count)
      try await group.forEachChunk { index, piece in
        if incremental {
          results[index] = GenerationResult()
          texts[index] = [UInt8(ascii: "\"")]
        }
        var escaped = JSONWriter(capacity: piece.text.utf8.count + 16)
        escaped.value(piece.text)
        texts[index] += escaped.bytes.dropFirst().dropLast()
        // The text lives in `texts`; a second copy in the result would only be carried along.
        var silent = piece
        silent.text = ""
        results[index].append(silent)
        var answer = NativeAnswer(
          results[index], request: requests[index], quotedText: texts[index] + [UInt8(ascii: "\"")],
          elapsed: group.elapsed)
        answer.finishReason = piece.finishReason
        events.append { writer in
          if isList { writer.member("index", index) }
          writeGeneration(answer, returnsText: returnsText, to: &writer)
        }
        try await events.flush()
      }
    }
  }

  /// Writes the members of one answer.
  private func writeGeneration(_ answer: NativeAnswer, returnsText: Bool, to writer: inout JSONWriter) {
    let result = answer.result
    writer.key("text")
    writer.verbatim(answer.quotedText)
    writer.key("output_ids")
    writer.array { writer in for token in result.tokens { writer.value(Int(token)) } }
    writer.key("meta_info")
    writer.object { writer in
      writer.member("id", answer.request.id.rawValue)
      writer.key("finish_reason")
      writeFinishReason(answer.finishReason, result.usage, to: &writer)
      writer.member("prompt_tokens", result.usage.promptTokens)
      writer.member("weight_version", "default")
      writer.member("total_retractions", result.usage.retractions)
      if let options = answer.request.logprobs {
        writeLogprobs(result, options, returnsText: returnsText, to: &writer)
      }
      writer.member("completion_tokens", result.usage.completionTokens)
      writer.member("cached_tokens", result.usage.cachedTokens)
      if let counts = result.usage.speculation {
        writer.member("spec_accept_rate", counts.acceptRate)
        writer.member("spec_accept_length", counts.acceptLength)
        writer.member("spec_accept_token_num", counts.acceptedTokens)
        writer.member("spec_draft_token_num", counts.draftTokens)
        writer.member("spec_verify_ct", counts.verifications)
      }
      writer.member("e2e_latency", answer.elapsed)
    }
  }

  private func writeFinishReason(_ reason: FinishReason?, _ usage: Usage, to writer: inout JSONWriter) {
    guard let reason else {
      writer.null()
      return
    }
    writer.object { writer in
      switch reason {
      case .stop:
        writer.member("type", "stop")
        writer.member("matched", reason.matched)
      case .length:
        writer.member("type", "length")
        writer.member("length", usage.completionTokens)
      case .abort(let message):
        writer.member("type", "abort")
        writer.member("message", message)
      }
    }
  }

  /// Writes the lists of `[logprob, id, text or null]`.
  private func writeLogprobs(
    _ result: GenerationResult, _ options: LogprobOptions, returnsText: Bool, to writer: inout JSONWriter
  ) {
    func entry(_ entry: TokenLogprob, _ writer: inout JSONWriter) {
      writer.array { writer in
        writer.value(entry.logprob)
        writer.value(Int(entry.token))
        if returnsText { writer.value(text(of: entry.token).text) } else { writer.null() }
      }
    }
    func lists(
      _ name: String, _ positions: [PositionLogprobs], _ pick: (PositionLogprobs) -> [TokenLogprob],
      _ writer: inout JSONWriter
    ) {
      writer.key(name)
      writer.array { writer in
        for position in positions {
          let entries = pick(position)
          if entries.isEmpty {
            writer.null()
          } else {
            writer.array { writer in for item in entries { entry(item, &writer) } }
          }
        }
      }
    }
    let prompt = result.promptLogprobs ?? []
    writer.key("input_token_logprobs")
    writer.array { writer in for position in prompt { entry(position.chosen, &writer) } }
    writer.key("output_token_logprobs")
    writer.array { writer in for position in result.logprobs { entry(position.chosen, &writer) } }
    if options.topCount > 0 {
      lists("input_top_logprobs", prompt, \.top, &writer)
      lists("output_top_logprobs", result.logprobs, \.top, &writer)
    }
    if !options.tokenIDs.isEmpty {
      lists("input_token_ids_logprobs", prompt, \.requested, &writer)
      lists("output_token_ids_logprobs", result.logprobs, \.requested, &writer)
    }
  }
}

/// An answer of the native API, whole or so far.
private struct NativeAnswer {
  var result: GenerationResult
  var request: ApusCore.Request
  /// The text as a JSON string.
  var quotedText: [UInt8]
  var elapsed: Double
  var finishReason: FinishReason?

  init(_ result: GenerationResult, request: ApusCore.Request, quotedText: [UInt8], elapsed: Double) {
    self.result = result
    self.request = request
    self.quotedText = quotedText
    self.elapsed = elapsed
    finishReason = result.finishReason
  }
}
