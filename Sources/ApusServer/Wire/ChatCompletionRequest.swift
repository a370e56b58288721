import ApusChat
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
  /// The tools and what is asked of calls and reasoning; whole once the body is checked.
  var reading = ChatReading()
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
      case "parallel_tool_calls": request.reading.allowsParallelCalls = try fields.bool(&reader, key) ?? true
      case "separate_reasoning": request.reading.separatesReasoning = try fields.bool(&reader, key) ?? true
      case "stream_reasoning": request.reading.streamsReasoning = try fields.bool(&reader, key) ?? true
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

  private mutating func validate() throws(EngineError) {
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
    reading.tools = try Self.definitions(tools)
    reading.choice = try Self.choice(toolChoice, reading.tools)
  }

  /// The tools, each of which must be a function with a name.
  static func definitions(_ tools: JSONValue?) throws(EngineError) -> ToolDefinitions {
    func refuse(_ path: String, _ sentence: String, _ code: EngineError.Code = .invalidRequest) -> EngineError {
      EngineError(code, "\(path): \(sentence).", parameter: path)
    }
    var seen: Set<String> = []
    for (index, tool) in (tools?.arrayValue ?? []).enumerated() {
      let path = "tools[\(index)]"
      guard tool.objectValue != nil else { throw refuse(path, "expected an object, got \(tool.kindName)") }
      if let type = tool["type"], type != "function" {
        throw refuse(path + ".type", "only tools of type \"function\" are available", .unsupported)
      }
      guard let function = tool["function"], function.objectValue != nil else {
        throw refuse(path + ".function", "is required: an object with a name")
      }
      guard let name = function["name"]?.stringValue, !name.isEmpty, name.utf8.count <= 256 else {
        throw refuse(path + ".function.name", "is required: a string of 1 to 256 bytes")
      }
      if !seen.insert(name).inserted {
        throw refuse(path + ".function.name", "\(name.debugDescription) is given twice")
      }
      if let parameters = function["parameters"], !parameters.isNull, parameters.objectValue == nil {
        throw refuse(path + ".function.parameters", "expected a JSON Schema object, got \(parameters.kindName)")
      }
    }
    return ToolDefinitions(json: tools)
  }

  private static func choice(_ choice: JSONValue?, _ tools: ToolDefinitions) throws(EngineError) -> ToolChoice {
    func refuse(_ sentence: String) -> EngineError {
      EngineError(.invalidRequest, "tool_choice \(sentence).", parameter: "tool_choice")
    }
    let found: ToolChoice
    switch choice {
    case nil, .string("auto"): return .auto
    case .string("none"): return .none
    case .string("required"): found = .required
    case .object(let object):
      guard object["type"] == "function", let name = (object["function"]?["name"] ?? object["name"])?.stringValue else {
        throw refuse("must name a function, as in {\"type\": \"function\", \"function\": {\"name\": \"f\"}}")
      }
      if tools[name] == nil { throw refuse("names \(name.debugDescription), which is not among the tools") }
      found = .named(name)
    default: throw refuse("must be \"auto\", \"none\", \"required\" or an object")
    }
    if tools.isEmpty { throw refuse("is only allowed when tools are given") }
    return found
  }

  /// The conversation for the chat template.
  ///
  /// - Parameter keepsDeveloperRole: whether the template knows the role `developer`, which is `system` to others.
  /// - Throws: `invalidRequest` or `unsupported`, naming the message at fault.
  func prompt(keepsDeveloperRole: Bool) throws(EngineError) -> ChatPrompt {
    guard let messages = messages?.arrayValue else {
      throw EngineError(.invalidRequest, "messages is required: an array of messages.", parameter: "messages")
    }
    if messages.isEmpty {
      throw EngineError(.invalidRequest, "messages must not be empty.", parameter: "messages")
    }
    var normalized: [JSONValue] = []
    normalized.reserveCapacity(messages.count)
    for (index, message) in messages.enumerated() {
      var message = try chatMessage(message, index)
      if !keepsDeveloperRole, message["role"] == "developer", case .object(var object) = message {
        object["role"] = "system"
        message = .object(object)
      }
      normalized.append(message)
    }
    if continueFinalMessage, normalized.last?["role"] != .string("assistant") {
      throw EngineError(
        .invalidRequest, "continue_final_message needs the last message to have the role assistant.",
        parameter: "continue_final_message")
    }
    var variables: [String: JSONValue] = [:]
    if let reasoningEffort {
      variables["reasoning_effort"] = reasoningEffort
      if reasoningEffort == "none" {
        // Templates of models that can do without thinking read one of these.
        variables["enable_thinking"] = false
        variables["thinking"] = false
      }
    }
    for (name, value) in templateVariables { variables[name] = value }
    let offersTools = reading.choice != .none && !reading.tools.isEmpty
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
