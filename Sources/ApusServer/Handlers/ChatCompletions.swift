import ApusCore
import Hummingbird

extension ServerState {
  /// `POST /v1/chat/completions`.
  func chatCompletions(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let body = try ChatCompletionRequest(try await body(of: request))
    let common = body.common
    try check(model: common.model)
    let count = try common.sampling.sampleCount(limit: 128)
    let parameters = try common.sampling.parameters(
      for: service.model, defaultMaxTokens: service.model.samplingDefaults.maxNewTokens)
    let tokens: [TokenID]
    if let inputIDs = body.inputIDs {
      try check(tokens: inputIDs, "input_ids")
      tokens = inputIDs
    } else {
      // The template writes the special tokens itself, so the tokenizer must not add them again.
      tokens = try service.encode(try service.renderChat(try body.prompt()), addSpecialTokens: false)
    }
    let id = common.rid ?? "chatcmpl-" + RequestID.unique().rawValue
    let logprobs = body.logprobs ? LogprobOptions(topCount: body.topLogprobs ?? 0) : nil
    let requests = (0..<count).map { index in
      ApusCore.Request(
        id: RequestID(count == 1 ? id : "\(id)-\(index)"), prompt: .tokens(tokens), sampling: parameters.sample(index),
        logprobs: logprobs, priority: common.priority, cacheSalt: common.cacheSalt)
    }
    let group: GenerationGroup
    do {
      group = try submit(requests, context)
    } catch {
      throw common.sampling.inOpenAITerms(error)
    }
    var head = ResponseHead(
      id: id, object: "chat.completion", created: unixTime(), model: service.model.name,
      systemFingerprint: systemFingerprint)
    if common.stream {
      head.object = "chat.completion.chunk"
      return streamChat(group, head, common.streamOptions ?? StreamOptions(), withLogprobs: body.logprobs)
    }
    let results = try await group.results()
    var usage = UsageTotal(count: count, samplesPerPrompt: count)
    return Response { writer in
      head.write(to: &writer)
      writer.key("choices")
      writer.array { writer in
        for (index, result) in results.enumerated() {
          usage.update(index, result.usage)
          writer.object { writer in
            writer.member("index", index)
            writer.key("message")
            writer.object { writer in
              writer.member("role", "assistant")
              writer.member("content", result.text)
              writer.member("refusal", .null)
            }
            writer.key("logprobs")
            if body.logprobs { writeChatLogprobs(result.logprobs, to: &writer) } else { writer.null() }
            writer.member("finish_reason", result.finishReason.openAIName)
            writer.member("matched_stop", result.finishReason.matched)
          }
        }
      }
      writer.key("usage")
      usage.write(to: &writer)
    }
  }

  /// Streams chat chunks: per choice one with the role, one per piece of text, one with the reason of the end; then the
  /// usage, if asked for.
  private func streamChat(
    _ group: GenerationGroup, _ head: ResponseHead, _ options: StreamOptions, withLogprobs: Bool
  ) -> Response {
    let count = group.streams.count
    /// Writes one chunk; `delta` writes the members of its delta.
    @Sendable func chunk(
      _ index: Int, logprobs: [PositionLogprobs] = [], reason: FinishReason? = nil, usage: UsageTotal?,
      to writer: inout JSONWriter, delta: (inout JSONWriter) -> Void
    ) {
      writer.object { writer in
        head.write(to: &writer)
        writer.key("choices")
        writer.array { writer in
          writer.object { writer in
            writer.member("index", index)
            writer.key("delta")
            writer.object(delta)
            writer.key("logprobs")
            if logprobs.isEmpty { writer.null() } else { writeChatLogprobs(logprobs, to: &writer) }
            writer.member("finish_reason", reason.map { .string($0.openAIName) } ?? .null)
            if let reason { writer.member("matched_stop", reason.matched) }
          }
        }
        writeStreamedUsage(usage, options, to: &writer)
      }
    }
    let templates = (0..<count).map { index in
      DeltaTemplate { writer, text in
        chunk(index, usage: nil, to: &writer) { $0.member("content", text) }
      }
    }
    return .events { [self] events in
      var usage = UsageTotal(count: count, samplesPerPrompt: count)
      var hasRole = [Bool](repeating: false, count: count)
      try await group.forEachChunk { index, piece in
        usage.update(index, piece.usage)
        if !hasRole[index] {
          hasRole[index] = true
          var json = JSONWriter()
          chunk(index, usage: usage, to: &json) { writer in
            writer.member("role", "assistant")
            writer.member("content", "")
          }
          events.append(json)
        }
        if withLogprobs || options.continuousUsage {
          if !piece.text.isEmpty || !piece.logprobs.isEmpty {
            var json = JSONWriter(capacity: 512 + piece.text.utf8.count)
            chunk(index, logprobs: piece.logprobs, usage: usage, to: &json) { $0.member("content", piece.text) }
            events.append(json)
          }
        } else if !piece.text.isEmpty {
          events.append(templates[index], piece.text)
        }
        if let reason = piece.finishReason {
          var json = JSONWriter()
          chunk(index, reason: reason, usage: usage, to: &json) { _ in }
          events.append(json)
        }
        try await events.flush()
      }
      if options.includeUsage { events.append(object: { writeUsageChunk(head, usage, to: &$0) }) }
    }
  }

  /// Writes the `usage` member of a streamed chunk: absent unless asked for, and `null` before the last chunk unless it
  /// was asked for on every chunk.
  func writeStreamedUsage(_ usage: UsageTotal?, _ options: StreamOptions, to writer: inout JSONWriter) {
    if options.continuousUsage, let usage {
      writer.key("usage")
      usage.write(to: &writer)
    } else if options.includeUsage {
      writer.member("usage", .null)
    }
  }

  /// Writes the members of the last chunk, which has the usage and no choices.
  func writeUsageChunk(_ head: ResponseHead, _ usage: UsageTotal, to writer: inout JSONWriter) {
    head.write(to: &writer)
    writer.key("choices")
    writer.array { _ in }
    writer.key("usage")
    usage.write(to: &writer)
  }
}
