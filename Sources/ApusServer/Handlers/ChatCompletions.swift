import ApusChat
import ApusCore
import Hummingbird

extension ServerState {
  /// `POST /v1/chat/completions`.
  func chatCompletions(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let body = try ChatCompletionRequest(try await body(of: request))
    let common = body.common
    try check(model: common.model)
    let count = try common.sampling.sampleCount(limit: 128)
    var parameters = try common.sampling.parameters(
      for: service.model, defaultMaxTokens: service.model.samplingDefaults.maxNewTokens)
    let (tokens, reader) = try prompt(of: body, &parameters)
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
      return streamChat(group, head, reader, common.streamOptions ?? StreamOptions(), withLogprobs: body.logprobs)
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
            let answer = ChatAnswer(result, reader)
            if reader.tellsReasoning { usage.setReasoning(index, tokens: countTokens(answer.reasoning)) }
            writer.member("index", index)
            writer.key("message")
            writer.object(answer.write)
            writer.key("logprobs")
            if body.logprobs { writeChatLogprobs(result.logprobs, to: &writer) } else { writer.null() }
            writer.member("finish_reason", result.finishReason.openAIName(hasCalls: !answer.calls.isEmpty))
            writer.member("matched_stop", result.finishReason.matched)
          }
        }
      }
      writer.key("usage")
      usage.write(to: &writer)
    }
  }

  /// The prompt's tokens, and how its answers are read: what all chat APIs share.
  func prompt(
    of body: ChatCompletionRequest, _ parameters: inout SamplingParameters
  ) throws(EngineError) -> ([TokenID], AnswerReader) {
    let reading = body.reading
    var tokens: [TokenID] = []
    var text = ""
    if let inputIDs = body.inputIDs {
      try check(tokens: inputIDs, "input_ids")
      tokens = inputIDs
      text = try service.decode(inputIDs.suffix(32), skipSpecialTokens: false)
    } else {
      text = try service.renderChat(try body.prompt(formats))
    }
    var isOpen = formats.reasoning?.isOpen(atEndOf: text, isContinued: body.continueFinalMessage)
    var beginning = ""
    var added = ""
    let isForced = reading.choice == .required || reading.choice.name != nil
    if isForced, formats.calls == nil {
      throw EngineError(
        .unsupported,
        "tool_choice cannot force a call: the chat template shows no format of tool calls, and --tool-call-parser "
          + "names none.", parameter: "tool_choice")
    }
    if isForced, parameters.grammar != nil {
      throw EngineError(
        .invalidRequest, "tool_choice forces a call, which response_format and its like exclude; give one of them.",
        parameter: "tool_choice")
    }
    let startsOpen = isOpen ?? (formats.reasoning?.beginsOpen == true ? true : nil)
    if let grammar = parameters.grammar {
      // What the client asks of the text holds for what follows the chain of thought.
      if let reasoning = formats.reasoning, let format = grammar.structuralFormat {
        parameters.grammar = structuralTag(reasoning.format(beforeAnswer: format, isOpen: startsOpen))
      }
    } else if let calls = formats.calls,
      let constraint = ToolConstraint.make(
        tools: reading.tools, choice: reading.choice, format: calls, allowsParallelCalls: reading.allowsParallelCalls)
    {
      if isForced {
        parameters.grammar = structuralTag(
          formats.reasoning?.format(before: constraint.format, isOpen: startsOpen) ?? constraint.format)
      } else if formats.reasoning?.name != "gpt-oss" {
        // Free text around calls: the channels of gpt-oss are no such text.
        parameters.grammar = structuralTag(
          formats.reasoning?.format(before: constraint.format, isOpen: startsOpen) ?? constraint.format)
      }
    } else if isForced, let calls = formats.calls {
      // No grammar knows the format's arguments. The prompt begins the call instead, so that one must follow.
      beginning = calls.callBeginning(of: reading.choice.name)
      if let reasoning = formats.reasoning, startsOpen == true { added = reasoning.closing }
      added += beginning
      isOpen = false
    }
    if body.inputIDs == nil {
      // The template writes the special tokens itself, so the tokenizer must not add them again.
      tokens = try service.encode(text + added, addSpecialTokens: body.addsSpecialTokens)
    } else if !added.isEmpty {
      tokens += try service.encode(added, addSpecialTokens: false)
    }
    if parameters.thinkingBudget != nil, let reasoning = formats.reasoning {
      let offersCalls = !reading.tools.isEmpty && reading.choice != .none
      parameters.thinkingMarks = reasoning.marks(
        isOpen: isOpen ?? reasoning.beginsOpen, calls: offersCalls ? formats.calls : nil)
    }
    let reader = AnswerReader(formats, reading, beginsInReasoning: isOpen, beginning: beginning)
    if !reader.isPlain {
      let readsCalls = !reading.tools.isEmpty && reading.choice != .none
      if formats.reasoningNeedsSpecialTokens || (readsCalls && formats.callsNeedSpecialTokens) {
        parameters.skipSpecialTokens = false
      }
    }
    return (tokens, reader)
  }

  /// Says how the chain of thought of a plain prompt's answer is marked, if its length is limited: the prompt's end tells
  /// whether it opened one.
  func markThoughts(
    of prompt: ApusCore.Request.Prompt, _ parameters: inout SamplingParameters
  ) throws(EngineError) {
    guard parameters.thinkingBudget != nil, let reasoning = formats.reasoning else { return }
    let text =
      switch prompt {
      case .text(let text): text
      case .tokens(let tokens): try service.decode(tokens.suffix(32), skipSpecialTokens: false)
      }
    parameters.thinkingMarks = reasoning.marks(isOpen: reasoning.isOpen(atEndOf: text) ?? false, calls: nil)
  }

  /// Streams chat chunks: per choice one with the role, one per piece of reasoning, text or tool call, one with the reason
  /// of the end; then the usage, if asked for.
  private func streamChat(
    _ group: GenerationGroup, _ head: ResponseHead, _ reader: AnswerReader, _ options: StreamOptions,
    withLogprobs: Bool
  ) -> Response {
    let count = group.streams.count
    /// Writes one chunk; `delta` writes the members of its delta.
    @Sendable func chunk(
      _ index: Int, logprobs: [PositionLogprobs] = [], reason: FinishReason? = nil, hasCalls: Bool = false,
      usage: UsageTotal?, to writer: inout JSONWriter, delta: (inout JSONWriter) -> Void
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
            writer.member("finish_reason", reason.map { .string($0.openAIName(hasCalls: hasCalls)) } ?? .null)
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
      var readers = [AnswerReader](repeating: reader, count: count)
      let countsReasoning = reader.tellsReasoning && (options.includeUsage || options.continuousUsage)
      var reasoning = [String](repeating: "", count: count)
      // Log-probabilities of tokens whose text is held back go with the next piece.
      var logprobs = [[PositionLogprobs]](repeating: [], count: count)
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
        var deltas = readers[index].read(piece.text, isLast: piece.finishReason != nil)
        if countsReasoning {
          for case .reasoning(let text) in deltas { reasoning[index] += text }
          if piece.finishReason != nil { usage.setReasoning(index, tokens: countTokens(reasoning[index])) }
        }
        if withLogprobs || options.continuousUsage {
          logprobs[index] += piece.logprobs
          if deltas.isEmpty, !logprobs[index].isEmpty, readers[index].isPlain || piece.finishReason != nil {
            deltas = [.content("")]
          }
          for delta in deltas {
            var json = JSONWriter(capacity: 512 + piece.text.utf8.count)
            chunk(index, logprobs: logprobs[index], usage: usage, to: &json, delta: delta.write)
            logprobs[index] = []
            events.append(json)
          }
        } else {
          for delta in deltas {
            if case .content(let text) = delta {
              events.append(templates[index], text)
            } else {
              var json = JSONWriter()
              chunk(index, usage: nil, to: &json, delta: delta.write)
              events.append(json)
            }
          }
        }
        if let reason = piece.finishReason {
          var json = JSONWriter()
          chunk(index, reason: reason, hasCalls: readers[index].hasCalls, usage: usage, to: &json) { _ in }
          events.append(json)
        }
        try await events.flush()
      }
      if options.includeUsage { events.append(object: { writeUsageChunk(head, usage, to: &$0) }) }
    }
  }

  /// How many tokens a text is, as the model's tokenizer cuts it; 0 if it cannot be cut.
  func countTokens(_ text: String) -> Int {
    text.isEmpty ? 0 : (try? service.encode(text, addSpecialTokens: false).count) ?? 0
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

private func structuralTag(_ format: JSONValue) -> GrammarSpecification {
  .structuralTag((["type": "structural_tag", "format": format] as JSONValue).compactText)
}

extension GrammarSpecification {
  /// The same as a format within a structural tag; `nil` if it has no such form.
  fileprivate var structuralFormat: JSONValue? {
    switch self {
    case .jsonSchema(let schema, let options):
      guard let schema = try? JSONValue.parse(schema) else { return nil }
      var format = JSONObject([
        ("type", "json_schema"), ("json_schema", schema), ("strict", .bool(options.isStrict)),
      ])
      if let whitespace = options.whitespace { format["whitespace"] = .string(whitespace.rawValue) }
      return .object(format)
    case .jsonObject: return ["type": "json_schema", "json_schema": ["type": "object"]]
    case .regex(let pattern): return ["type": "regex", "pattern": .string(pattern)]
    case .ebnf(let grammar): return ["type": "grammar", "grammar": .string(grammar)]
    case .choices(let texts):
      return ["type": "or", "elements": .array(texts.map { ["type": "const_string", "value": .string($0)] })]
    case .structuralTag(let text): return (try? JSONValue.parse(text))?["format"]
    }
  }
}

extension ToolChoice {
  /// The tool that must be called.
  var name: String? { if case .named(let name) = self { name } else { nil } }
}
