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
  /// Whether the last item may still grow.
  private var isOpen = false
  /// The events since the last `takeEvents()`; `nil` where nobody streams.
  private var events: [UInt8]?
  private var sequenceNumber = 0

  /// Begins a response.
  init(_ frame: ResponseFrame, _ reader: AnswerReader, isStreaming: Bool) {
    self.frame = frame
    self.reader = reader
    events = isStreaming ? [] : nil
  }

  /// The events since the last call, as the bytes of server-sent events.
  mutating func takeEvents() -> [UInt8] {
    defer { events = events == nil ? nil : [] }
    return events ?? []
  }

  /// Tells that the response has begun.
  mutating func begin() {
    tell("response.created")
    tell("response.in_progress")
  }

  /// Takes a piece of the answer. The last one closes the open item, but does not end the response.
  mutating func add(_ chunk: GenerationChunk) {
    usage = chunk.usage
    for delta in reader.read(chunk.text, isLast: chunk.finishReason != nil) {
      switch delta {
      case .reasoning(let text): append(text, .reasoning)
      case .content(let text): append(text, .message)
      case .callBegin(_, let id, let name): open(.call(id: id, name: name))
      case .callArguments(_, let text):
        if !text.isEmpty, isOpen { appendToLast(text) }
      }
    }
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

  /// Tells that the response failed because its client cancelled it.
  mutating func cancelAfterFailure() {
    status = "cancelled"
    error = nil
  }

  // MARK: Items

  private mutating func append(_ text: String, _ kind: OutputItem.Kind) {
    if text.isEmpty { return }
    if !isOpen || output.last?.kind != kind { open(kind) }
    appendToLast(text)
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
      item.writePart("", to: &writer)
    }
  }

  private mutating func appendToLast(_ text: String) {
    output[output.count - 1].text += text
    let item = output[output.count - 1]
    switch item.kind {
    case .reasoning: partEvent("response.reasoning_text.delta", item) { $0.member("delta", text) }
    case .message:
      partEvent("response.output_text.delta", item) { writer in
        writer.member("delta", text)
        writer.key("logprobs")
        writer.array { _ in }
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
        writer.key("logprobs")
        writer.array { _ in }
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
        item.writePart(item.text, to: &writer)
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
    events! += "event: \(type)\ndata: ".utf8
    events! += json.bytes
    events! += "\n\n".utf8
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
      writer.member("model", frame.model)
      writer.key("output")
      writer.array { writer in for item in output { item.write(to: &writer) } }
      writer.member("parallel_tool_calls", request.allowsParallelCalls)
      writer.member("previous_response_id", optional(request.previousID))
      writer.key("reasoning")
      writer.object { writer in
        writer.member("effort", request.effort)
        writer.member("summary", request.summary)
      }
      writer.member("store", frame.isStored)
      writer.key("temperature")
      writer.value(frame.temperature)
      writer.member("text", .object(request.text))
      writer.member("tool_choice", request.toolChoice)
      writer.member("tools", .array(request.tools))
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
      writer.member("user", request.user)
      writer.member("metadata", .object(request.metadata))
    }
  }
}
