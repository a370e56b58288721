import ApusCore

/// What a chat needs of a model, here or behind a URL.
protocol ChatBackend: Sendable {
  /// A line that says who answers.
  var title: String { get }
  /// Streams an answer: `onText` is called with each piece. Cancelling the task ends the answer.
  func answer(
    _ messages: [ChatMessage], sampling: SamplingValues, onText: @Sendable (String) -> Void
  ) async throws -> ChatAnswer
}

/// How an answer ended.
struct ChatAnswer: Sendable {
  /// Why it ended: `stop`, `length` or what stopped it.
  var reason = "stop"
  /// Tokens of the prompt, tokens of it that were cached, tokens of the answer.
  var usage = Usage()
}

/// Answers from an engine in this process.
struct LocalChatBackend: ChatBackend {
  let service: any GenerationService

  var title: String {
    let model = service.model
    return model.hasChatTemplate
      ? model.name : "\(model.name) has no chat template: it continues what you write instead of answering"
  }

  func answer(
    _ messages: [ChatMessage], sampling: SamplingValues, onText: @Sendable (String) -> Void
  ) async throws -> ChatAnswer {
    var base = SamplingParameters()
    base.maxNewTokens = nil
    service.model.samplingDefaults.apply(to: &base)
    let request = Request(prompt: try prompt(messages), sampling: sampling.applied(to: base))
    var answer = ChatAnswer()
    for try await chunk in try service.generate(request) {
      if !chunk.text.isEmpty { onText(chunk.text) }
      answer.usage = chunk.usage
      switch chunk.finishReason {
      case .abort(let reason): answer.reason = reason
      case .length: answer.reason = "length"
      case .stop, nil: break
      }
    }
    try Task.checkCancellation()
    return answer
  }

  private func prompt(_ messages: [ChatMessage]) throws(EngineError) -> Request.Prompt {
    guard service.model.hasChatTemplate else {
      // Without a template there are no roles: the model continues the text of all turns.
      return .text(messages.map(\.content).joined(separator: "\n"))
    }
    // The template writes the special tokens itself, so the tokenizer must not add its own.
    let text = try service.renderChat(ChatPrompt(messages: .array(messages.map(\.json))))
    return .tokens(try service.encode(text, addSpecialTokens: false))
  }
}

/// Answers from any OpenAI-compatible server.
struct RemoteChatBackend: ChatBackend {
  let client: ServerClient
  let model: String

  var title: String { "\(model) at \(client.baseURL)" }

  func answer(
    _ messages: [ChatMessage], sampling: SamplingValues, onText: @Sendable (String) -> Void
  ) async throws -> ChatAnswer {
    let body = JSONObject(
      [
        ("model", .string(model)), ("messages", .array(messages.map(\.json))), ("stream", true),
        ("stream_options", ["include_usage": true]),
      ] + sampling.openAIMembers)
    var answer = ChatAnswer()
    try await client.stream("/v1/chat/completions", body: .object(body)) { event in
      if let message = event["error"]?["message"]?.stringValue ?? event["error"]?.stringValue {
        throw CommandFailure("The server ended the answer: \(message)")
      }
      if let usage = event["usage"], !usage.isNull {
        answer.usage.promptTokens = usage["prompt_tokens"]?.intValue ?? 0
        answer.usage.completionTokens = usage["completion_tokens"]?.intValue ?? 0
        answer.usage.cachedTokens = usage["prompt_tokens_details"]?["cached_tokens"]?.intValue ?? 0
      }
      guard let choice = event["choices"]?[0] else { return }
      if let text = choice["delta"]?["reasoning_content"]?.stringValue, !text.isEmpty { onText(text) }
      if let text = choice["delta"]?["content"]?.stringValue, !text.isEmpty { onText(text) }
      if let reason = choice["finish_reason"]?.stringValue { answer.reason = reason }
    }
    return answer
  }
}
