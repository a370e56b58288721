import ApusCore
import Hummingbird

extension ServerState {
  /// `POST /v1/messages`, Anthropic's API.
  func messages(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let body = try MessagesRequest(try await self.body(of: request), isCount: false)
    try check(model: body.model)
    let chat = try body.chat()
    var parameters: SamplingParameters
    let reader: AnswerReader
    let group: GenerationGroup
    do throws(EngineError) {
      parameters = try chat.common.sampling.parameters(for: service.model, defaultMaxTokens: nil)
      let tokens: [TokenID]
      (tokens, reader) = try prompt(of: chat, &parameters)
      group = try submit([ApusCore.Request(prompt: .tokens(tokens), sampling: parameters)], context)
    } catch {
      throw inAnthropicTerms(chat.common.sampling.inOpenAITerms(error))
    }
    let id = "msg_" + RequestID.unique().rawValue
    if body.stream { return streamMessage(group, id, reader) }
    let result = try await group.results()[0]
    var blocks = MessageBlocks(reader)
    let content = MessageBlocks.whole(blocks.read(result.text, isLast: true))
    let (reason, sequence) = try stopReason(result.finishReason, hasCalls: blocks.hasCalls)
    return Response { writer in
      writeMessageHead(id, to: &writer)
      writer.key("content")
      writer.array { writer in for block in content { writer.value(block) } }
      writer.member("stop_reason", reason)
      writer.member("stop_sequence", sequence)
      writer.key("usage")
      writer.object { writeUsage(result.usage, to: &$0) }
    }
  }

  /// `POST /v1/messages/count_tokens`: the length of the prompt.
  func countMessageTokens(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let body = try MessagesRequest(try await self.body(of: request), isCount: true)
    try check(model: body.model)
    var parameters = SamplingParameters()
    let (tokens, _) = try prompt(of: try body.chat(), &parameters)
    return Response { $0.member("input_tokens", tokens.count) }
  }

  /// Streams a message: its head with the first token, then block after block, then the reason of the end.
  private func streamMessage(_ group: GenerationGroup, _ id: String, _ reader: AnswerReader) -> Response {
    .namedEvents { [self] events in
      var blocks = MessageBlocks(reader)
      var hasBegun = false
      try await group.forEachChunk { _, piece in
        if !hasBegun {
          hasBegun = true
          events.append(event: "message_start") { writer in
            writer.member("type", "message_start")
            writer.key("message")
            writer.object { writer in
              writeMessageHead(id, to: &writer)
              writer.key("content")
              writer.array { _ in }
              writer.member("stop_reason", .null)
              writer.member("stop_sequence", .null)
              writer.key("usage")
              var usage = piece.usage
              usage.completionTokens = 0
              writer.object { writeUsage(usage, to: &$0) }
            }
          }
          events.append(event: "ping") { $0.member("type", "ping") }
        }
        for event in blocks.read(piece.text, isLast: piece.finishReason != nil) {
          events.append(event: event.name) { event.write(to: &$0) }
        }
        if let finish = piece.finishReason {
          let (reason, sequence) = try stopReason(finish, hasCalls: blocks.hasCalls)
          events.append(event: "message_delta") { writer in
            writer.member("type", "message_delta")
            writer.key("delta")
            writer.object { writer in
              writer.member("stop_reason", reason)
              writer.member("stop_sequence", sequence)
            }
            writer.key("usage")
            writer.object { writeUsage(piece.usage, to: &$0) }
          }
          events.append(event: "message_stop") { $0.member("type", "message_stop") }
        }
        try await events.flush()
      }
    } fail: { error, events in
      events.append(event: "error") { writer in
        writeAnthropicError(type: anthropicErrorType(error.status), message: error.message, to: &writer)
      }
    }
  }

  /// Writes the members that a message begins with.
  private func writeMessageHead(_ id: String, to writer: inout JSONWriter) {
    writer.member("id", id)
    writer.member("type", "message")
    writer.member("role", "assistant")
    writer.member("model", service.model.name)
  }

  /// Writes the members of `usage`. Tokens found in the prefix cache are counted apart from the other input.
  private func writeUsage(_ usage: Usage, to writer: inout JSONWriter) {
    writer.member("input_tokens", usage.promptTokens - usage.cachedTokens)
    writer.member("cache_creation_input_tokens", 0)
    writer.member("cache_read_input_tokens", usage.cachedTokens)
    writer.member("output_tokens", usage.completionTokens)
  }

  /// `stop_reason` and `stop_sequence`.
  ///
  /// - Throws: `aborted` for an aborted request, since Anthropic's API has no such reason.
  private func stopReason(
    _ reason: FinishReason, hasCalls: Bool
  ) throws(EngineError) -> (reason: JSONValue, sequence: JSONValue) {
    switch reason {
    case .stop(.text(let text)): ("stop_sequence", .string(text))
    case .stop: (hasCalls ? "tool_use" : "end_turn", .null)
    case .length: ("max_tokens", .null)
    case .abort(let message): throw EngineError(.aborted, message)
    }
  }

  /// An error with the chat API's field names replaced by Anthropic's.
  private func inAnthropicTerms(_ error: EngineError) -> EngineError {
    var error = error
    let names = [("stop", "stop_sequences"), ("response_format and its like", "output_config.format")]
    for (open, own) in names {
      if error.parameter == open { error.parameter = own }
      if error.message.hasPrefix(open + " ") || open.contains(" ") {
        error.message = error.message.replacing(open, with: own, maxReplacements: 1)
      }
    }
    return error
  }
}

/// Makes the blocks of a message of what an answer reader finds.
struct MessageBlocks {
  /// What happens to the blocks of a message.
  enum Event {
    case start(index: Int, Kind)
    case delta(index: Int, Kind, String)
    case stop(index: Int)
  }

  /// A kind of block.
  enum Kind: Equatable {
    case text
    case thinking
    case call(id: String, name: String)
  }

  private var reader: AnswerReader
  private var index = -1
  private var open: Kind?

  init(_ reader: AnswerReader) { self.reader = reader }

  /// Whether the message holds a call.
  var hasCalls: Bool { reader.hasCalls }

  /// Takes a chunk's text, and ends the message if it is the last.
  mutating func read(_ text: String, isLast: Bool) -> [Event] {
    var events: [Event] = []
    for delta in reader.read(text, isLast: isLast) {
      switch delta {
      case .reasoning(let text): add(.thinking, text, &events)
      case .content(let text): add(.text, text, &events)
      case .callBegin(_, let id, let name):
        // Where the model's family has no style of its own, the name begins as Anthropic's do.
        begin(.call(id: id.hasPrefix("call_") ? "toolu_" + id.dropFirst(5) : id, name: name), &events)
      case .callArguments(_, let text):
        if let open { events.append(.delta(index: index, open, text)) }
      }
    }
    if isLast { end(&events) }
    return events
  }

  private mutating func add(_ kind: Kind, _ text: String, _ events: inout [Event]) {
    if open != kind { begin(kind, &events) }
    events.append(.delta(index: index, kind, text))
  }

  private mutating func begin(_ kind: Kind, _ events: inout [Event]) {
    end(&events)
    index += 1
    open = kind
    events.append(.start(index: index, kind))
  }

  private mutating func end(_ events: inout [Event]) {
    if open != nil { events.append(.stop(index: index)) }
    open = nil
  }

  /// The blocks that events add up to.
  static func whole(_ events: [Event]) -> [JSONValue] {
    var blocks: [JSONValue] = []
    var text = ""
    var current: Kind?
    for event in events {
      switch event {
      case .start(_, let kind): (current, text) = (kind, "")
      case .delta(_, _, let more): text += more
      case .stop:
        if let current { blocks.append(current.block(text)) }
      }
    }
    return blocks
  }
}

extension MessageBlocks.Kind {
  /// A block of this kind with its text, which for a call is the text of its arguments.
  func block(_ text: String) -> JSONValue {
    switch self {
    case .text: ["type": "text", "text": .string(text)]
    case .thinking: ["type": "thinking", "thinking": .string(text), "signature": ""]
    case .call(let id, let name):
      [
        "type": "tool_use", "id": .string(id), "name": .string(name),
        // Arguments that broke off are no object; that the answer was cut tells the reason of its end.
        "input": (try? JSONValue.parse(text, depthLimit: 64)).flatMap { $0.objectValue == nil ? nil : $0 } ?? [:],
      ]
    }
  }
}

extension MessageBlocks.Event {
  /// The event's name.
  var name: String {
    switch self {
    case .start: "content_block_start"
    case .delta: "content_block_delta"
    case .stop: "content_block_stop"
    }
  }

  /// Writes the members of the event.
  func write(to writer: inout JSONWriter) {
    writer.member("type", name)
    switch self {
    case .start(let index, let kind):
      writer.member("index", index)
      writer.member("content_block", kind.block(""))
    case .delta(let index, let kind, let text):
      writer.member("index", index)
      writer.key("delta")
      writer.object { writer in
        let (type, member) =
          switch kind {
          case .text: ("text_delta", "text")
          case .thinking: ("thinking_delta", "thinking")
          case .call: ("input_json_delta", "partial_json")
          }
        writer.member("type", type)
        writer.member(member, text)
      }
    case .stop(let index): writer.member("index", index)
    }
  }
}
