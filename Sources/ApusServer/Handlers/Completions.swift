import ApusCore
import Hummingbird

extension ServerState {
  /// `POST /v1/completions`.
  func completions(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var body = try CompletionRequest(try await body(of: request))
    let common = body.common
    try check(model: common.model)
    let count = try common.sampling.sampleCount(limit: 128)
    let candidates = body.bestOf ?? count
    if candidates > 128 {
      throw EngineError(.invalidRequest, "best_of must be in 1...128, got \(candidates).", parameter: "best_of")
    }
    let parameters = try common.sampling.parameters(for: service.model, defaultMaxTokens: 16)
    for prompt in body.prompts {
      if case .tokens(let tokens) = prompt { try check(tokens: tokens, "prompt") }
    }
    // What echo puts before the answers; the same for all samples of a prompt.
    var echoes: [String] = []
    if body.echo {
      for prompt in body.prompts {
        switch prompt {
        case .text(let text): echoes.append(text)
        case .tokens(let tokens): echoes.append(try service.decode(tokens, skipSpecialTokens: false))
        }
      }
    }
    if !body.addsSpecialTokens {
      for (index, prompt) in body.prompts.enumerated() {
        if case .text(let text) = prompt {
          body.prompts[index] = .tokens(try service.encode(text, addSpecialTokens: false))
        }
      }
    }
    var logprobs = body.logprobs.map { LogprobOptions(topCount: $0, promptStart: body.echo ? 0 : nil) }
    if logprobs == nil, candidates > count { logprobs = LogprobOptions() }
    let id = common.rid ?? "cmpl-" + RequestID.unique().rawValue
    let total = body.prompts.count * candidates
    if total > configuration.maxGenerationsPerRequest {
      // Checked before the requests are made, because each holds its prompt.
      throw EngineError(
        .invalidRequest,
        "The request asks for \(total) answers; at most \(configuration.maxGenerationsPerRequest) may be asked for at once.",
        parameter: "prompt")
    }
    var requests: [ApusCore.Request] = []
    for prompt in body.prompts {
      var parameters = parameters
      try markThoughts(of: prompt, &parameters)
      for sample in 0..<candidates {
        requests.append(
          ApusCore.Request(
            id: RequestID(total == 1 ? id : "\(id)-\(requests.count)"), prompt: prompt,
            sampling: parameters.sample(sample), logprobs: logprobs, priority: common.priority,
            cacheSalt: common.cacheSalt))
      }
    }
    let group: GenerationGroup
    do {
      group = try submit(requests, context)
    } catch {
      throw common.sampling.inOpenAITerms(error)
    }
    let head = ResponseHead(
      id: id, object: "text_completion", created: unixTime(), model: service.model.name,
      systemFingerprint: systemFingerprint)
    let withLogprobs = body.logprobs != nil
    if common.stream {
      return streamCompletions(
        group, head, common.streamOptions ?? StreamOptions(), samplesPerPrompt: count, echoes: echoes,
        withLogprobs: withLogprobs)
    }
    let results = try await group.results()
    var usage = UsageTotal(count: total, samplesPerPrompt: candidates)
    for (index, result) in results.enumerated() { usage.update(index, result.usage) }
    return Response { writer in
      head.write(to: &writer)
      writer.key("choices")
      writer.array { writer in
        for prompt in body.prompts.indices {
          let answers = best(count, of: Array(results[prompt * candidates..<(prompt + 1) * candidates]))
          for (sample, result) in answers.enumerated() {
            writer.object { writer in
              writer.member("index", prompt * count + sample)
              writer.member("text", (body.echo ? echoes[prompt] : "") + result.text)
              writer.key("logprobs")
              if withLogprobs {
                var offset = 0
                let positions = (body.echo ? result.promptLogprobs ?? [] : []) + result.logprobs
                writeCompletionLogprobs(positions, offset: &offset, to: &writer)
              } else {
                writer.null()
              }
              writer.member("finish_reason", result.finishReason.openAIName)
              writer.member("matched_stop", result.finishReason.matched)
            }
          }
        }
      }
      writer.key("usage")
      usage.write(to: &writer)
    }
  }

  /// The `count` answers with the highest log-probability per token, best first; all of them in their order if none is
  /// to be left out.
  private func best(_ count: Int, of results: [GenerationResult]) -> [GenerationResult] {
    if results.count <= count { return results }
    func score(_ result: GenerationResult) -> Float {
      let logprobs = result.logprobs.compactMap(\.chosen.logprob)
      return logprobs.isEmpty ? -.infinity : logprobs.reduce(0, +) / Float(logprobs.count)
    }
    let ranked = results.map { (score($0), $0) }.enumerated().sorted {
      $0.element.0 != $1.element.0 ? $0.element.0 > $1.element.0 : $0.offset < $1.offset
    }
    return ranked.prefix(count).map(\.element.1)
  }

  /// Streams completion chunks: per choice the echoed prompt, if asked for, one per piece of text, one with the reason of
  /// the end; then the usage, if asked for.
  private func streamCompletions(
    _ group: GenerationGroup, _ head: ResponseHead, _ options: StreamOptions, samplesPerPrompt: Int,
    echoes: [String], withLogprobs: Bool
  ) -> Response {
    let count = group.streams.count
    @Sendable func chunk(
      _ index: Int, _ text: String, reason: FinishReason? = nil, usage: UsageTotal?, to writer: inout JSONWriter,
      logprobs: (inout JSONWriter) -> Void = { $0.null() }
    ) {
      writer.object { writer in
        head.write(to: &writer)
        writer.key("choices")
        writer.array { writer in
          writer.object { writer in
            writer.member("index", index)
            writer.member("text", text)
            writer.key("logprobs")
            logprobs(&writer)
            writer.member("finish_reason", reason.map { .string($0.openAIName) } ?? .null)
            if let reason { writer.member("matched_stop", reason.matched) }
          }
        }
        writeStreamedUsage(usage, options, to: &writer)
      }
    }
    let templates = (0..<count).map { index in
      DeltaTemplate { writer, text in chunk(index, text, usage: nil, to: &writer) }
    }
    return .events { [self] events in
      var usage = UsageTotal(count: count, samplesPerPrompt: samplesPerPrompt)
      var hasEchoed = [Bool](repeating: echoes.isEmpty, count: count)
      var offsets = [Int](repeating: 0, count: count)
      try await group.forEachChunk { index, piece in
        usage.update(index, piece.usage)
        if !hasEchoed[index] {
          hasEchoed[index] = true
          var json = JSONWriter()
          chunk(index, echoes[index / samplesPerPrompt], usage: usage, to: &json) { writer in
            if withLogprobs {
              writeCompletionLogprobs(piece.promptLogprobs ?? [], offset: &offsets[index], to: &writer)
            } else {
              writer.null()
            }
          }
          events.append(json)
        }
        if withLogprobs || options.continuousUsage {
          if !piece.text.isEmpty || !piece.logprobs.isEmpty {
            var json = JSONWriter(capacity: 512 + piece.text.utf8.count)
            chunk(index, piece.text, usage: usage, to: &json) { writer in
              if withLogprobs, !piece.logprobs.isEmpty {
                writeCompletionLogprobs(piece.logprobs, offset: &offsets[index], to: &writer)
              } else {
                writer.null()
              }
            }
            events.append(json)
          }
        } else if !piece.text.isEmpty {
          events.append(templates[index], piece.text)
        }
        if let reason = piece.finishReason {
          var json = JSONWriter()
          chunk(index, "", reason: reason, usage: usage, to: &json)
          events.append(json)
        }
        try await events.flush()
      }
      if options.includeUsage { events.append(object: { writeUsageChunk(head, usage, to: &$0) }) }
    }
  }
}
