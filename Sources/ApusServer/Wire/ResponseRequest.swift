import ApusCore
import NIOCore

/// The body of `POST /v1/responses`.
///
/// What both APIs know under one meaning is translated to the chat API's body and read by its reader, so that tools,
/// formats and sampling values are judged alike.
struct ResponseRequest {
  var model: String?
  /// The input items, each with an id.
  var input: [JSONValue] = []
  var instructions: String?
  var previousID: String?
  var stream = false
  var store: Bool?
  var background = false
  var truncates = false
  var allowsParallelCalls = true
  var maxOutputTokens: Int?
  var metadata = JSONObject()
  var tools: [JSONValue] = []
  var toolChoice: JSONValue = "auto"
  var text = JSONObject([("format", ["type": "text"])])
  var effort: JSONValue = .null
  var summary: JSONValue = .null
  var user: JSONValue = .null
  /// Members that go to the chat API's reader as they are.
  private var shared = JSONObject()

  /// Sampling values that the chat API takes, too.
  private static let sharedNames: Set<String> = [
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "logit_bias", "seed", "stop", "stop_token_ids", "stop_regex", "ignore_eos", "min_tokens", "skip_special_tokens",
    "cache_salt", "priority", "chat_template_kwargs",
  ]

  /// Reads and checks a body.
  ///
  /// - Throws: `invalidRequest` and `unsupported` with the field at fault.
  init(_ body: ByteBuffer) throws(EngineError) {
    var request = ResponseRequest()
    var input: JSONValue?
    var tools: JSONValue?
    var metadata: JSONValue?
    var text: JSONValue?
    try readBody(body) { (fields, reader, key) throws(JSONError) in
      switch key {
      case "model": request.model = try fields.string(&reader, key)
      case "input": input = try fields.value(&reader, key)
      case "instructions": request.instructions = try fields.string(&reader, key)
      case "previous_response_id": request.previousID = try fields.string(&reader, key)
      case "stream": request.stream = try fields.bool(&reader, key) ?? false
      case "store": request.store = try fields.bool(&reader, key)
      case "background": request.background = try fields.bool(&reader, key) ?? false
      case "parallel_tool_calls": request.allowsParallelCalls = try fields.bool(&reader, key) ?? true
      case "max_output_tokens": request.maxOutputTokens = try fields.integer(&reader, key)
      case "metadata": metadata = try fields.value(&reader, key)
      case "tools": tools = try fields.value(&reader, key)
      case "tool_choice": request.toolChoice = try fields.value(&reader, key) ?? "auto"
      case "text": text = try fields.value(&reader, key)
      case "user", "safety_identifier": request.user = try fields.string(&reader, key).map { .string($0) } ?? .null
      case "truncation":
        switch try fields.string(&reader, key) {
        case nil, "disabled"?: break
        case "auto"?: request.truncates = true
        case let other?: fields.note(key, "must be \"auto\" or \"disabled\", got \(other.debugDescription)")
        }
      case "reasoning":
        try fields.object(&reader, key) { (fields, reader, key) throws(JSONError) in
          switch key {
          case "effort": request.effort = try fields.string(&reader, key).map { .string($0) } ?? .null
          case "summary", "generate_summary":
            request.summary = try fields.string(&reader, key).map { .string($0) } ?? .null
          default: try reader.skipValue()
          }
        }
      case "include":
        let names = try fields.strings(&reader, key) ?? []
        if names.contains("message.output_text.logprobs") {
          fields.note(key, "log-probabilities are given by /v1/chat/completions only", code: .unsupported)
        }
      case "top_logprobs":
        if let count = try fields.integer(&reader, key), count != 0 {
          fields.note(key, "log-probabilities are given by /v1/chat/completions only", code: .unsupported)
        }
      case "prompt": try fields.refuse(&reader, key, "stored prompts are not available; give instructions and input")
      case "conversation": try fields.refuse(&reader, key, "is not available; use previous_response_id")
      case _ where Self.sharedNames.contains(key):
        request.shared[key] = try fields.value(&reader, key)
      default: try reader.skipValue()
      }
    }
    if let effort = request.effort.stringValue,
      !["none", "minimal", "low", "medium", "high", "xhigh"].contains(effort)
    {
      throw EngineError(
        .invalidRequest,
        "reasoning.effort must be none, minimal, low, medium, high or xhigh, got \(effort.debugDescription).",
        parameter: "reasoning.effort")
    }
    if let limit = request.maxOutputTokens, limit < 1 {
      throw EngineError(
        .invalidRequest, "max_output_tokens must be at least 1, got \(limit).", parameter: "max_output_tokens")
    }
    if request.background, request.stream {
      throw EngineError(
        .unsupported, "A response in the background cannot be streamed; leave stream out and fetch it by its id.",
        parameter: "stream")
    }
    if request.background, request.store == false {
      throw EngineError(.invalidRequest, "background needs store to be true.", parameter: "background")
    }
    request.metadata = try checkedMetadata(metadata)
    request.input = try inputItems(input)
    request.tools = try Self.checkedTools(tools)
    if let text { request.text = try Self.checkedText(text) }
    self = request
  }

  private init() {}

  /// The tools, which must be functions in the flat form of this API.
  private static func checkedTools(_ tools: JSONValue?) throws(EngineError) -> [JSONValue] {
    guard let tools else { return [] }
    guard let tools = tools.arrayValue else {
      throw EngineError(.invalidRequest, "tools: expected an array, got \(tools.kindName).", parameter: "tools")
    }
    for (index, tool) in tools.enumerated() {
      let path = "tools[\(index)]"
      guard tool.objectValue != nil else {
        throw EngineError(.invalidRequest, "\(path): expected an object, got \(tool.kindName).", parameter: path)
      }
      guard tool["type"] == "function" else {
        throw EngineError(
          .unsupported, "\(path).type: only tools of type \"function\" are available.", parameter: path + ".type")
      }
    }
    return tools
  }

  /// `text` with its format filled in.
  private static func checkedText(_ text: JSONValue) throws(EngineError) -> JSONObject {
    func refuse(_ path: String, _ sentence: String) -> EngineError {
      EngineError(.invalidRequest, "\(path): \(sentence).", parameter: path)
    }
    guard var object = text.objectValue else { throw refuse("text", "expected an object, got \(text.kindName)") }
    guard let format = object["format"]?.nonNull else {
      object["format"] = ["type": "text"]
      return object
    }
    guard let type = format["type"]?.stringValue else {
      throw refuse("text.format", "expected an object with a type, got \(format.kindName)")
    }
    switch type {
    case "text", "json_object": break
    case "json_schema":
      guard let name = format["name"]?.stringValue, !name.isEmpty else {
        throw refuse("text.format.name", "is required: a string")
      }
      guard let schema = format["schema"], schema.objectValue != nil || schema.boolValue != nil else {
        throw refuse("text.format.schema", "expected a JSON Schema")
      }
    default: throw refuse("text.format.type", "\(type.debugDescription) is none of text, json_object and json_schema")
    }
    return object
  }

  /// The body for the chat API.
  ///
  /// - Parameter messages: the conversation, as `chatMessages` makes it.
  /// - Throws: what the chat API's reader throws, in the terms of this API.
  func chatRequest(_ messages: [JSONValue]) throws(EngineError) -> ChatCompletionRequest {
    var body = shared
    body["messages"] = .array(messages)
    if let model { body["model"] = .string(model) }
    if let maxOutputTokens { body["max_completion_tokens"] = .int(Int64(maxOutputTokens)) }
    if !tools.isEmpty { body["tools"] = .array(tools.map(nested)) }
    if toolChoice != "auto" { body["tool_choice"] = toolChoice }
    body["parallel_tool_calls"] = .bool(allowsParallelCalls)
    if !effort.isNull { body["reasoning_effort"] = effort }
    if let format = text["format"], format["type"] != "text" {
      body["response_format"] =
        format["type"] == "json_schema" ? ["type": "json_schema", "json_schema": format] : format
    }
    do {
      return try ChatCompletionRequest(ByteBuffer(string: JSONValue.object(body).compactText))
    } catch {
      throw Self.inResponseTerms(error)
    }
  }

  /// A tool in the chat API's form.
  private func nested(_ tool: JSONValue) -> JSONValue {
    var function = tool.objectValue ?? JSONObject()
    function["type"] = JSONValue?.none
    return ["type": "function", "function": .object(function)]
  }

  /// An error with the chat API's field names replaced by this API's.
  static func inResponseTerms(_ error: EngineError) -> EngineError {
    var error = error
    let names = [
      ("max_completion_tokens", "max_output_tokens"), ("max_new_tokens", "max_output_tokens"),
      ("response_format.json_schema", "text.format"), ("response_format", "text.format"),
      ("reasoning_effort", "reasoning.effort"), (".function.", "."), ("messages", "input"),
    ]
    for (chat, own) in names {
      error.message = error.message.replacing(chat, with: own)
      error.parameter = error.parameter?.replacing(chat, with: own)
    }
    return error
  }
}

/// `metadata`: at most 16 pairs, keys of 64 and values of 512 characters at most.
func checkedMetadata(_ metadata: JSONValue?) throws(EngineError) -> JSONObject {
  guard let metadata = metadata?.nonNull else { return JSONObject() }
  guard let object = metadata.objectValue else {
    throw EngineError(
      .invalidRequest, "metadata: expected an object, got \(metadata.kindName).", parameter: "metadata")
  }
  if object.count > 16 {
    throw EngineError(
      .invalidRequest, "metadata may hold at most 16 pairs, got \(object.count).", parameter: "metadata")
  }
  for (key, value) in object {
    guard let text = value.stringValue else {
      throw EngineError(
        .invalidRequest, "metadata.\(key): expected a string, got \(value.kindName).", parameter: "metadata.\(key)")
    }
    if key.count > 64 || text.count > 512 {
      throw EngineError(
        .invalidRequest, "metadata: keys may have at most 64 characters and values at most 512.",
        parameter: "metadata.\(key)")
    }
  }
  return object
}
