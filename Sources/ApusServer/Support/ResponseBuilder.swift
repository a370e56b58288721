import ApusCore
import HTTPTypes
import Hummingbird
import NIOCore

/// The members of a response that are known before its answer is.
struct ResponseFrame: Sendable {
  var id: String
  var created: Int
  var model: String
  var isStored: Bool
  var temperature: Float
  var topP: Float
  var skipsSpecialTokens: Bool
  var request: ResponseRequest
}

/// A response in the making: takes an answer's pieces, keeps the output items and tells the events of a stream.
struct ResponseBuilder: Sendable {
  let frame: ResponseFrame
  var status = "in_progress"
  private(set) var output: [OutputItem] = []
  /// Seconds since 1970; set when the answer is complete.
  private(set) var completed: Int?
  private(set) var incompleteReason: String?
  private(set) var error: (code: String, message: String)?
  private var reader: AnswerReader
  private var usage: Usage?
  private var reasoningTokens = 0
  /// Log-probabilities of tokens whose text has not come yet.
  private var pendingLogprobs: [TokenLogprobText] = []
  /// Whether the last item may still grow.
  private var isOpen = false
  /// The events since they were last taken; `nil` where nobody streams.
  private var events: [[UInt8]]?
  private var sequenceNumber = 0

  /// Begins a response.
  init(_ frame: ResponseFrame, _ reader: AnswerReader, isStreaming: Bool) {
    self.frame = frame
    self.reader = reader
    events = isStreaming ? [] : nil
  }

  /// The events since the last call, each as the bytes of a server-sent event.
  mutating func takeEvents() -> [[UInt8]] {
    defer { events = events == nil ? nil : [] }
    return events ?? []
  }

  /// Tells that the response has begun. One in the background was queued before.
  mutating func begin() {
    if frame.request.background {
      status = "queued"
      tell("response.created")
      tell("response.queued")
      status = "in_progress"
    } else {
      tell("response.created")
    }
    tell("response.in_progress")
  }

  /// Takes a piece of the answer. The last one closes the open item, but does not end the response.
  ///
  /// - Parameter logprobs: the log-probabilities of the piece's tokens, if they are wanted.
  mutating func add(_ chunk: GenerationChunk, logprobs: [TokenLogprobText] = []) {
    usage = chunk.usage
    pendingLogprobs += logprobs
    let deltas = reader.read(chunk.text, isLast: chunk.finishReason != nil)
    for (index, delta) in deltas.enumerated() {
      switch delta {
      case .reasoning(let text): append(text, .reasoning)
      case .content(let text):
        let logprobs = takeLogprobs(of: text, isLast: index == deltas.count - 1)
        append(text, .message, logprobs)
      case .callBegin(_, let id, let name): open(.call(id: id, name: name))
      case .callArguments(_, let text):
        if !text.isEmpty, isOpen { appendToLast(text, []) }
      }
    }
    // Those of marks, reasoning and calls are told nowhere; those of text that is held back wait for it.
    if deltas.contains(where: { if case .content = $0 { false } else { true } }) { pendingLogprobs = [] }
  }

  /// The log-probabilities that go with a piece of text: all that wait, where an answer is nothing but text. Else marks may
  /// wait with them, before the text or behind it, so only as many tokens are taken as the text is long.
  private mutating func takeLogprobs(of text: String, isLast: Bool) -> [[UInt8]] {
    defer { pendingLogprobs = [] }
    if reader.isPlain { return pendingLogprobs.map(\.json) }
    var covered = 0
    func isNeeded(_ entry: TokenLogprobText) -> Bool {
      defer { covered += entry.byteCount }
      return covered < text.utf8.count
    }
    if isLast { return pendingLogprobs.reversed().prefix(while: isNeeded).reversed().map(\.json) }
    return pendingLogprobs.prefix(while: isNeeded).map(\.json)
  }

  /// Ends the response as the generation ended.
  ///
  /// - Parameter countTokens: counts the tokens of a text, for the share of the chain of thought.
  mutating func end(_ reason: FinishReason, now: Int, countTokens: (String) -> Int) {
    reasoningTokens = 0
    for item in output where item.kind == .reasoning { reasoningTokens += countTokens(item.text) }
    reasoningTokens = min(reasoningTokens, usage?.completionTokens ?? 0)
    switch reason {
    case .stop:
      close("completed")
      // An answer without any text is a message without any.
      if output.isEmpty {
        open(.message)
        close("completed")
      }
      status = "completed"
      completed = now
      tell("response.completed")
    case .length:
      close("incomplete")
      status = "incomplete"
      incompleteReason = "max_output_tokens"
      tell("response.incomplete")
    case .abort(let message): fail("aborted", message)
    }
  }

  /// Ends the response with an error.
  mutating func fail(_ code: String, _ message: String) {
    close("incomplete")
    status = "failed"
    error = (code, message)
    tell("response.failed")
  }

  /// Ends the response because its client cancelled it. There is no event of that name, so the stream's end is told by
  /// `response.failed`, whose response says what happened.
  mutating func cancel() {
    close("incomplete")
    status = "cancelled"
    tell("response.failed")
  }

  /// The output items as the API shows them.
  var outputItems: [JSONValue] {
    output.map { item in
      var writer = JSONWriter()
      item.write(to: &writer)
      return (try? JSONValue.parse(writer.bytes)) ?? .null
    }
  }

  // MARK: Items

  private mutating func append(_ text: String, _ kind: OutputItem.Kind, _ logprobs: [[UInt8]] = []) {
    if text.isEmpty { return }
    if !isOpen || output.last?.kind != kind { open(kind) }
    appendToLast(text, logprobs)
  }

  private mutating func open(_ kind: OutputItem.Kind) {
    close("completed")
    let item = OutputItem(kind)
    let index = output.count
    output.append(item)
    isOpen = true
    event("response.output_item.added") { writer in
      writer.member("output_index", index)
      writer.key("item")
      item.write(to: &writer, isBegin: true)
    }
    if case .call = kind { return }
    partEvent("response.content_part.added", item) { writer in
      writer.key("part")
      item.writePart("", [], to: &writer)
    }
  }

  private mutating func appendToLast(_ text: String, _ logprobs: [[UInt8]]) {
    output[output.count - 1].text += text
    output[output.count - 1].logprobs += logprobs
    let item = output[output.count - 1]
    switch item.kind {
    case .reasoning: partEvent("response.reasoning_text.delta", item) { $0.member("delta", text) }
    case .message:
      partEvent("response.output_text.delta", item) { writer in
        writer.member("delta", text)
        writer.verbatim("logprobs", logprobs)
      }
    case .call: itemEvent("response.function_call_arguments.delta", item) { $0.member("delta", text) }
    }
  }

  private mutating func close(_ status: String) {
    guard isOpen else { return }
    isOpen = false
    output[output.count - 1].status = status
    let item = output[output.count - 1]
    switch item.kind {
    case .reasoning: partEvent("response.reasoning_text.done", item) { $0.member("text", item.text) }
    case .message:
      partEvent("response.output_text.done", item) { writer in
        writer.member("text", item.text)
        writer.verbatim("logprobs", item.logprobs)
      }
    case .call(_, let name):
      itemEvent("response.function_call_arguments.done", item) { writer in
        writer.member("name", name)
        writer.member("arguments", item.text)
      }
    }
    if item.kind == .reasoning || item.kind == .message {
      partEvent("response.content_part.done", item) { writer in
        writer.key("part")
        item.writePart(item.text, item.logprobs, to: &writer)
      }
    }
    let index = output.count - 1
    event("response.output_item.done") { writer in
      writer.member("output_index", index)
      writer.key("item")
      item.write(to: &writer)
    }
  }

  // MARK: Events

  /// An event that shows the whole response.
  private mutating func tell(_ type: String) {
    if events == nil { return }
    let object = object
    event(type) { writer in
      writer.key("response")
      writer.verbatim(object)
    }
  }

  private mutating func itemEvent(_ type: String, _ item: OutputItem, _ members: (inout JSONWriter) -> Void) {
    let index = output.count - 1
    event(type) { writer in
      writer.member("item_id", item.id)
      writer.member("output_index", index)
      members(&writer)
    }
  }

  private mutating func partEvent(_ type: String, _ item: OutputItem, _ members: (inout JSONWriter) -> Void) {
    itemEvent(type, item) { writer in
      writer.member("content_index", 0)
      members(&writer)
    }
  }

  private mutating func event(_ type: String, _ members: (inout JSONWriter) -> Void) {
    guard events != nil else { return }
    var json = JSONWriter()
    json.object { writer in
      writer.member("type", type)
      writer.member("sequence_number", sequenceNumber)
      members(&writer)
    }
    sequenceNumber += 1
    events!.append(Array("event: \(type)\ndata: ".utf8) + json.bytes + Array("\n\n".utf8))
  }

  // MARK: The response object

  /// The response as the API shows it.
  var object: [UInt8] {
    var writer = JSONWriter()
    write(to: &writer)
    return writer.bytes
  }

  /// Writes the response as the API shows it.
  func write(to writer: inout JSONWriter) {
    let request = frame.request
    func optional(_ value: String?) -> JSONValue { value.map { .string($0) } ?? .null }
    func optional(_ value: Int?) -> JSONValue { value.map { .int(Int64($0)) } ?? .null }
    writer.object { writer in
      writer.member("id", frame.id)
      writer.member("object", "response")
      writer.member("created_at", frame.created)
      writer.member("status", status)
      writer.member("background", request.background)
      writer.member("completed_at", optional(completed))
      writer.member("conversation", request.conversationID.map { ["id": .string($0)] } ?? .null)
      writer.key("error")
      if let error {
        writer.object { writer in
          writer.member("code", error.code)
          writer.member("message", error.message)
        }
      } else {
        writer.null()
      }
      writer.key("incomplete_details")
      if let incompleteReason { writer.object { $0.member("reason", incompleteReason) } } else { writer.null() }
      writer.member("instructions", optional(request.instructions))
      writer.member("max_output_tokens", optional(request.maxOutputTokens))
      writer.member("max_tool_calls", optional(request.maxToolCalls))
      writer.member("model", frame.model)
      writer.key("output")
      writer.array { writer in for item in output { item.write(to: &writer) } }
      writer.member("parallel_tool_calls", request.allowsParallelCalls)
      writer.member("previous_response_id", optional(request.previousID))
      writer.member("prompt_cache_key", optional(request.promptCacheKey))
      writer.key("reasoning")
      writer.object { writer in
        writer.member("effort", request.effort)
        writer.member("summary", request.summary)
      }
      writer.member("safety_identifier", optional(request.safetyIdentifier))
      writer.member("service_tier", "default")
      writer.member("store", frame.isStored)
      writer.key("temperature")
      writer.value(frame.temperature)
      writer.member("text", .object(request.text))
      writer.member("tool_choice", request.toolChoice)
      writer.member("tools", .array(request.tools))
      writer.member("top_logprobs", request.topLogprobs ?? 0)
      writer.key("top_p")
      writer.value(frame.topP)
      writer.member("truncation", request.truncates ? "auto" : "disabled")
      writer.key("usage")
      if let usage, status != "in_progress", status != "queued" {
        writer.object { writer in
          writer.member("input_tokens", usage.promptTokens)
          writer.key("input_tokens_details")
          writer.object { $0.member("cached_tokens", usage.cachedTokens) }
          writer.member("output_tokens", usage.completionTokens)
          writer.key("output_tokens_details")
          writer.object { $0.member("reasoning_tokens", reasoningTokens) }
          writer.member("total_tokens", usage.promptTokens + usage.completionTokens)
        }
      } else {
        writer.null()
      }
      writer.member("user", optional(request.user))
      writer.member("metadata", .object(request.metadata))
    }
  }
}

/// The log-probabilities of a token as the API shows them.
struct TokenLogprobText: Sendable {
  /// A JSON object.
  var json: [UInt8]
  /// The length of the token's text.
  var byteCount: Int
}

extension JSONWriter {
  /// Writes a member that is an array of JSON texts.
  mutating func verbatim(_ name: String, _ values: [[UInt8]]) {
    key(name)
    array { writer in for value in values { writer.verbatim(value) } }
  }
}
