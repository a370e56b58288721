import ApusCore
import NIOCore

/// `stream_options` of the OpenAI API.
struct StreamOptions {
  /// A last chunk without choices tells the usage.
  var includeUsage = false
  /// Every chunk tells the usage so far.
  var continuousUsage = false

  init() {}

  init(_ fields: inout FieldReader, _ reader: inout JSONReader, _ name: String) throws(JSONError) {
    var options = StreamOptions()
    try fields.object(&reader, name) { (fields, reader, key) throws(JSONError) in
      switch key {
      case "include_usage": options.includeUsage = try fields.bool(&reader, key) ?? false
      case "continuous_usage_stats": options.continuousUsage = try fields.bool(&reader, key) ?? false
      default: try reader.skipValue()
      }
    }
    self = options
  }
}

/// What all generating endpoints of the OpenAI API have in common.
struct CommonFields {
  var model: String?
  var stream = false
  var streamOptions: StreamOptions?
  var sampling = SamplingFields()
  var rid: String?
  var cacheSalt = ""
  var priority = 0

  /// Reads a member if it is one of the common ones.
  mutating func read(
    _ key: String, _ fields: inout FieldReader, _ reader: inout JSONReader
  ) throws(JSONError) -> Bool {
    switch key {
    case "model": model = try fields.string(&reader, key)
    case "stream": stream = try fields.bool(&reader, key) ?? false
    case "stream_options":
      streamOptions = try reader.peek() == .null ? nil : StreamOptions(&fields, &reader, key)
      if streamOptions == nil { try reader.skipValue() }
    case "rid", "request_id": rid = try fields.string(&reader, key)
    case "cache_salt", "extra_key":
      // Both separate prefix caches; a request may give both, and then both must match.
      if let salt = try fields.string(&reader, key) {
        cacheSalt = cacheSalt.isEmpty ? salt : cacheSalt + "\u{1F}" + salt
      }
    case "priority": priority = try fields.integer(&reader, key) ?? 0
    case "user": _ = try fields.string(&reader, key)
    case "metadata": try fields.object(&reader, key) { (_, reader, _) throws(JSONError) in try reader.skipValue() }
    case "lora_path", "session_params", "custom_logit_processor":
      try fields.refuse(&reader, key, "is not available; leave the field out")
    case "return_hidden_states":
      try fields.refuseIfTrue(&reader, key, "hidden states are not available; leave the field out")
    default: return try sampling.read(key, &fields, &reader)
    }
    return true
  }

  /// Refuses combinations that mean nothing.
  func validate() throws(EngineError) {
    if streamOptions != nil, !stream {
      throw EngineError(
        .invalidRequest, "stream_options is only allowed when stream is true.", parameter: "stream_options")
    }
    if let rid { try checkRequestName(rid) }
  }
}

/// Refuses names of requests that would not fit a log line or a header.
func checkRequestName(_ rid: String) throws(EngineError) {
  if rid.isEmpty || rid.utf8.count > 256 || rid.utf8.contains(where: { $0 < 0x21 || $0 == 0x7F }) {
    throw EngineError(
      .invalidRequest, "rid must have 1 to 256 bytes without spaces and control characters.", parameter: "rid")
  }
}

/// The body of `POST /v1/chat/completions`.
struct ChatCompletionRequest {
  var common = CommonFields()
  var messages: JSONValue?
  var tools: JSONValue?
  var toolChoice: JSONValue?
  var inputIDs: [TokenID]?
  var logprobs = false
  var topLogprobs: Int?
  var addGenerationPrompt = true
  var continueFinalMessage = false
  var templateVariables = JSONObject()
  var reasoningEffort: JSONValue?

  /// Reads and checks a body.
  init(_ body: ByteBuffer) throws(EngineError) {
    var request = ChatCompletionRequest()
    try readBody(body) { (fields, reader, key) throws(JSONError) in
      switch key {
      case "messages":
        if try fields.expect([.array], "an array of messages", &reader, key) {
          request.messages = try reader.readValue()
        }
      case "tools":
        if try fields.expect([.array], "an array of tools", &reader, key) { request.tools = try reader.readValue() }
      case "tool_choice": request.toolChoice = try fields.value(&reader, key)
      case "input_ids": request.inputIDs = try fields.tokens(&reader, key)
      case "logprobs": request.logprobs = try fields.bool(&reader, key) ?? false
      case "top_logprobs": request.topLogprobs = try fields.integer(&reader, key)
      case "add_generation_prompt": request.addGenerationPrompt = try fields.bool(&reader, key) ?? true
      case "continue_final_message": request.continueFinalMessage = try fields.bool(&reader, key) ?? false
      case "chat_template_kwargs":
        if try fields.expect([.object], "an object", &reader, key) {
          request.templateVariables = try reader.readValue().objectValue ?? JSONObject()
        }
      case "reasoning_effort": request.reasoningEffort = try fields.value(&reader, key)
      case "response_format": try request.common.sampling.grammar.readResponseFormat(key, &fields, &reader)
      case "functions", "function_call":
        try fields.refuse(&reader, key, "is OpenAI's old form; use tools and tool_choice")
      case "audio": try fields.refuse(&reader, key, "this model answers in text only; leave the field out")
      case "modalities":
        let modalities = try fields.strings(&reader, key)
        if let modalities, modalities.contains(where: { $0 != "text" }) {
          fields.note(key, "this model answers in text only", code: .unsupported)
        }
      default:
        if try !request.common.read(key, &fields, &reader) { try reader.skipValue() }
      }
    }
    self = request
    try validate()
  }

  /// A conversation with every other field left out.
  init(messages: JSONValue) { self.messages = messages }

  private init() {}

  private func validate() throws(EngineError) {
    try common.validate()
    if let topLogprobs {
      if !(0...20).contains(topLogprobs) {
        throw EngineError(
          .invalidRequest, "top_logprobs must be in 0...20, got \(topLogprobs).", parameter: "top_logprobs")
      }
      if !logprobs, topLogprobs > 0 {
        throw EngineError(.invalidRequest, "top_logprobs needs logprobs to be true.", parameter: "top_logprobs")
      }
    }
    switch toolChoice {
    case nil, .string("auto"), .string("none"): break
    case .string("required"), .object:
      throw EngineError(
        .unsupported,
        "tool_choice can be \"auto\" or \"none\": forcing a call needs constrained decoding, which is not available yet.",
        parameter: "tool_choice")
    default:
      throw EngineError(
        .invalidRequest, "tool_choice must be \"auto\", \"none\", \"required\" or an object.", parameter: "tool_choice")
    }
  }

  /// The conversation for the chat template.
  ///
  /// - Throws: `invalidRequest` or `unsupported`, naming the message at fault.
  func prompt() throws(EngineError) -> ChatPrompt {
    guard let messages = messages?.arrayValue else {
      throw EngineError(.invalidRequest, "messages is required: an array of messages.", parameter: "messages")
    }
    if messages.isEmpty {
      throw EngineError(.invalidRequest, "messages must not be empty.", parameter: "messages")
    }
    var normalized: [JSONValue] = []
    normalized.reserveCapacity(messages.count)
    for (index, message) in messages.enumerated() { normalized.append(try chatMessage(message, index)) }
    if continueFinalMessage, normalized.last?["role"] != .string("assistant") {
      throw EngineError(
        .invalidRequest, "continue_final_message needs the last message to have the role assistant.",
        parameter: "continue_final_message")
    }
    var variables: [String: JSONValue] = [:]
    if let reasoningEffort { variables["reasoning_effort"] = reasoningEffort }
    for (name, value) in templateVariables { variables[name] = value }
    let offersTools = toolChoice != .string("none") && tools?.arrayValue?.isEmpty == false
    // add_generation_prompt is true by default, so a client that continues a message need not turn it off.
    return ChatPrompt(
      messages: .array(normalized), tools: offersTools ? tools : nil,
      addGenerationPrompt: addGenerationPrompt && !continueFinalMessage,
      continueFinalMessage: continueFinalMessage, variables: variables)
  }
}

/// A message as chat templates expect it.
///
/// Content given as a list of text parts becomes one string (joined by spaces, as SGLang does), missing content becomes
/// the empty string, and the arguments of tool calls, which the API carries as JSON inside a string, become objects.
private func chatMessage(_ message: JSONValue, _ index: Int) throws(EngineError) -> JSONValue {
  func refuse(_ path: String, _ sentence: String, _ code: EngineError.Code = .invalidRequest) -> EngineError {
    let name = "messages[\(index)]\(path)"
    return EngineError(code, "\(name): \(sentence).", parameter: name)
  }
  guard case .object(var object) = message else { throw refuse("", "expected an object, got \(message.kindName)") }
  switch object["role"] {
  case .string(let role) where !role.isEmpty: break
  case nil: throw refuse(".role", "is required")
  case .string: throw refuse(".role", "must not be empty")
  case let other?: throw refuse(".role", "expected a string, got \(other.kindName)")
  }
  switch object["content"] {
  case .string: break
  case nil, .null: object["content"] = .string("")
  case .array(let parts):
    var texts: [String] = []
    for (number, part) in parts.enumerated() {
      let path = ".content[\(number)]"
      if case .string(let text) = part {
        texts.append(text)
        continue
      }
      guard part.objectValue != nil else { throw refuse(path, "expected an object, got \(part.kindName)") }
      guard let type = part["type"]?.stringValue else { throw refuse(path + ".type", "expected a string") }
      switch type {
      case "text", "input_text", "output_text":
        guard let text = part["text"]?.stringValue else { throw refuse(path + ".text", "expected a string") }
        texts.append(text)
      case "refusal":
        guard let text = part["refusal"]?.stringValue else { throw refuse(path + ".refusal", "expected a string") }
        texts.append(text)
      default:
        throw refuse(
          path, "the model served here reads text only, so parts of type \(type.debugDescription) cannot be taken",
          .unsupported)
      }
    }
    object["content"] = .string(texts.joined(separator: " "))
  case let other?: throw refuse(".content", "expected a string or an array of parts, got \(other.kindName)")
  }
  if let calls = object["tool_calls"], !calls.isNull {
    guard let calls = calls.arrayValue else { throw refuse(".tool_calls", "expected an array, got \(calls.kindName)") }
    object["tool_calls"] = .array(calls.map(withParsedArguments))
  }
  return .object(object)
}

/// A tool call whose arguments are an object rather than its JSON text, where the text is valid.
private func withParsedArguments(_ call: JSONValue) -> JSONValue {
  guard case .object(var call) = call, case .object(var function)? = call["function"],
    case .string(let text)? = function["arguments"], let arguments = try? JSONValue.parse(text, depthLimit: 64),
    arguments.objectValue != nil
  else { return call }
  function["arguments"] = arguments
  call["function"] = .object(function)
  return .object(call)
}
