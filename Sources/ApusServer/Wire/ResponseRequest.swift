import ApusCore
import NIOCore

/// The body of `POST /v1/responses` and of `POST /v1/responses/input_tokens`.
///
/// What both APIs know under one meaning is translated to the chat API's body and read by its reader, so that tools,
/// formats and sampling values are judged alike.
struct ResponseRequest {
  var model: String?
  /// The input items, each with an id.
  var input: [JSONValue] = []
  var instructions: String?
  var previousID: String?
  var conversationID: String?
  var stream = false
  var store: Bool?
  var background = false
  var truncates = false
  var allowsParallelCalls = true
  var maxOutputTokens: Int?
  var maxToolCalls: Int?
  /// How many likely tokens are given with each token of the text; `nil` where no log-probabilities are wanted.
  var topLogprobs: Int?
  var metadata = JSONObject()
  var tools: [JSONValue] = []
  var toolChoice: JSONValue = "auto"
  var text = JSONObject([("format", ["type": "text"])])
  var effort: JSONValue = .null
  var summary: JSONValue = .null
  var user: String?
  var safetyIdentifier: String?
  var promptCacheKey: String?
  /// Members that go to the chat API's reader as they are.
  private var shared = JSONObject()
  /// Members that are checked once all are read.
  private var given = Given()

  private struct Given {
    var input: JSONValue?
    var tools: JSONValue?
    var metadata: JSONValue?
    var text: JSONValue?
  }

  /// The members of the body.
  static let fields =
    FieldTable<ResponseRequest>([
      .string("model", to: \.model, "The model served; may be left out."),
      .value(
        "input", to: \.given.input,
        schema: ["anyOf": [["type": "string"], ["type": "array", "items": itemSchema]]],
        "A text, or items. Required unless only tokens are counted."),
      .string("instructions", to: \.instructions, "A system message that goes before everything else."),
      .string("previous_response_id", to: \.previousID, "The response that this one follows."),
      Field(
        "conversation",
        schema: [
          "anyOf": [
            ["type": "string"], ["type": "object", "properties": ["id": ["type": "string"]], "required": ["id"]],
          ]
        ], "The conversation whose items go before the input, and to which input and answer are added."
      ) { (request, fields, reader, name) throws(JSONError) in
        if try reader.peek() == .string {
          request.conversationID = try reader.readString()
        } else {
          let isObject = try fields.object(&reader, name) { (fields, reader, key) throws(JSONError) in
            if key == "id" { request.conversationID = try fields.string(&reader, key) } else { try reader.skipValue() }
          }
          if isObject, request.conversationID == nil { fields.note(name, "needs an id") }
        }
      },
      .flag("stream", to: \.stream, default: false, "Whether the answer is sent as events while it is made."),
      Field(
        "stream_options", schema: ["type": "object", "properties": ["include_obfuscation": ["type": "boolean"]]],
        "Checked to be an object; events are never padded."
      ) { (_, fields, reader, name) throws(JSONError) in
        try fields.object(&reader, name) { (_, reader, _) throws(JSONError) in try reader.skipValue() }
      },
      .bool("store", to: \.store, "Whether the response is kept; true by default."),
      .flag(
        "background", to: \.background, default: false, "Whether the response goes on when its client has gone."),
      Field(
        "truncation", schema: ["enum": ["auto", "disabled"], "default": "disabled"],
        "`auto` leaves out the oldest turns where the input would be too long."
      ) { (request, fields, reader, name) throws(JSONError) in
        switch try fields.string(&reader, name) {
        case nil, "disabled"?: break
        case "auto"?: request.truncates = true
        case let other?: fields.note(name, "must be \"auto\" or \"disabled\", got \(other.debugDescription)")
        }
      },
      .flag(
        "parallel_tool_calls", to: \.allowsParallelCalls, default: true, "Whether an answer may hold several calls."),
      .integer(
        "max_output_tokens", to: \.maxOutputTokens, "The most tokens to generate, the chain of thought included."),
      .integer(
        "max_tool_calls", to: \.maxToolCalls, "The most calls of built-in tools, of which there are none here."),
      .value("metadata", to: \.given.metadata, schema: metadataSchema, "Kept with the response."),
      .array(
        "tools", to: \.given.tools, of: "tools", items: toolSchema, "The functions that the model may call."),
      Field(
        "tool_choice",
        schema: [
          "anyOf": [
            ["enum": ["auto", "none", "required"]],
            [
              "type": "object", "properties": ["type": ["const": "function"], "name": ["type": "string"]],
              "required": ["type", "name"],
            ],
            [
              "type": "object",
              "properties": [
                "type": ["const": "allowed_tools"], "mode": ["enum": ["auto", "required"]],
                "tools": ["type": "array", "items": ["type": "object"]],
              ], "required": ["type", "mode", "tools"],
            ],
          ]
        ], "Whether a function may or must be called."
      ) { (request, fields, reader, name) throws(JSONError) in
        request.toolChoice = try fields.value(&reader, name) ?? "auto"
      },
      .value(
        "text", to: \.given.text,
        schema: [
          "anyOf": [
            [
              "type": "object",
              "properties": ["format": ["type": "object"], "verbosity": ["enum": ["low", "medium", "high"]]],
            ]
          ]
        ], "`format` says what the text must look like; `verbosity` is given to the chat template."),
      Field(
        "reasoning",
        schema: [
          "type": "object",
          "properties": [
            "effort": [
              "type": "string", "description": "How much the model should think; given to the chat template.",
            ],
            "summary": ["type": "string", "description": "Kept; there are no summaries, the text itself is given."],
          ],
        ], "How the model should think."
      ) { (request, fields, reader, name) throws(JSONError) in
        try fields.object(&reader, name) { (fields, reader, key) throws(JSONError) in
          switch key {
          case "effort": request.effort = try fields.string(&reader, key).map { .string($0) } ?? .null
          case "summary", "generate_summary":
            request.summary = try fields.string(&reader, key).map { .string($0) } ?? .null
          default: try reader.skipValue()
          }
        }
      },
      Field(
        "include", schema: ["type": "array", "items": ["type": "string"]],
        "Kinds of output to add: `message.output_text.logprobs`. Those of tools and inputs that do not occur add nothing."
      ) { (request, fields, reader, name) throws(JSONError) in
        let names =
          try fields.array(&reader, name, of: "strings") { (fields, reader, name) throws(JSONError) in
            try fields.string(&reader, name)
          } ?? []
        if names.contains("message.output_text.logprobs") { request.topLogprobs = request.topLogprobs ?? 0 }
      },
      Field(
        "top_logprobs", schema: ["type": "integer", "minimum": 0, "maximum": 20],
        "How many of the likeliest tokens are given with each token of the text."
      ) { (request, fields, reader, name) throws(JSONError) in
        guard let count = try fields.integer(&reader, name) else { return }
        if !(0...20).contains(count) { fields.note(name, "must be in 0...20, got \(count)") }
        if count > 0 { request.topLogprobs = count }
      },
      .string("user", to: \.user, "Kept with the response."),
      .string("safety_identifier", to: \.safetyIdentifier, "Kept with the response."),
      .string(
        "prompt_cache_key", to: \.promptCacheKey,
        "Kept with the response; every request finds all cached prefixes (`cache_salt` keeps them apart)."),
      .ignored(
        "prompt_cache_retention", "prompt_cache_options", "service_tier", "background_options", "access_programs",
        "image", schema: [:], "Has no effect here."),
      .refused("prompt", because: "stored prompts are not available; give instructions and input"),
      .refused(
        "context_management", because: "conversations are not compacted; use truncation: \"auto\""),
      .refused("moderation", because: "moderation is not available; leave the field out"),
      .refused("personality", because: "is not available; use instructions"),
      .refused("messages", because: "is the chat API's name; use input"),
      .refused("max_tokens", "max_completion_tokens", because: "is the chat API's name; use max_output_tokens"),
      .refused("response_format", because: "is the chat API's name; use text.format"),
      .refused("n", because: "a response has one answer"),
    ]) + FieldTable(sharedFields)

  /// Sampling values and the like, which the chat API's reader takes and judges.
  private static var sharedFields: [Field<ResponseRequest>] {
    let own: Set<String> = ["max_tokens", "n"]
    let common: Set<String> = ["cache_salt", "priority", "chat_template_kwargs"]
    let fields =
      SamplingFields.fields.within(\ChatCompletionRequest.common.sampling).fields.filter { !own.contains($0.names[0]) }
      + ChatCompletionRequest.fields.fields.filter { common.contains($0.names[0]) }
    return fields.map { field in
      var shared = Field<ResponseRequest>(schema: field.schema, field.summary) {
        (request, fields, reader, name) throws(JSONError) in
        request.shared[name] = try fields.value(&reader, name)
      }
      shared.names = field.names
      shared.namesAreAliases = field.namesAreAliases
      return shared
    }
  }

  /// The schema of an input item, for the document.
  static let itemSchema: JSONValue = [
    "type": "object",
    "properties": [
      "type": ["enum": ["message", "function_call", "function_call_output", "reasoning", "item_reference"]],
      "id": ["type": "string"], "role": ["enum": ["user", "assistant", "system", "developer"]],
      "content": [
        "anyOf": [
          ["type": "string"],
          [
            "type": "array",
            "items": [
              "type": "object",
              "properties": ["type": ["type": "string"], "text": ["type": "string"]], "required": ["type"],
            ],
          ],
        ]
      ], "call_id": ["type": "string"], "name": ["type": "string"], "arguments": ["type": "string"],
      "output": ["anyOf": [["type": "string"], ["type": "array", "items": ["type": "object"]]]],
    ],
  ]

  private static let toolSchema: JSONValue = [
    "type": "object",
    "properties": [
      "type": ["const": "function"], "name": ["type": "string"], "description": ["type": "string"],
      "parameters": ["type": "object"], "strict": ["type": "boolean"],
    ], "required": ["type", "name"],
  ]

  /// Reads and checks a body.
  ///
  /// - Parameter needsInput: whether a body without input is refused.
  /// - Throws: `invalidRequest` and `unsupported` with the field at fault.
  init(_ body: ByteBuffer, needsInput: Bool = true) throws(EngineError) {
    var request = ResponseRequest()
    try Self.fields.read(body, into: &request)
    if let effort = request.effort.stringValue,
      !["none", "minimal", "low", "medium", "high", "xhigh", "max"].contains(effort)
    {
      throw EngineError(
        .invalidRequest,
        "reasoning.effort must be none, minimal, low, medium, high, xhigh or max, got \(effort.debugDescription).",
        parameter: "reasoning.effort")
    }
    for (name, limit) in [("max_output_tokens", request.maxOutputTokens), ("max_tool_calls", request.maxToolCalls)] {
      if let limit, limit < 1 {
        throw EngineError(.invalidRequest, "\(name) must be at least 1, got \(limit).", parameter: name)
      }
    }
    if request.background, request.store == false {
      throw EngineError(.invalidRequest, "background needs store to be true.", parameter: "background")
    }
    if request.previousID != nil, request.conversationID != nil {
      throw EngineError(
        .invalidRequest, "previous_response_id and conversation exclude each other; give one.",
        parameter: "previous_response_id")
    }
    request.metadata = try checkedMetadata(request.given.metadata)
    if needsInput || request.given.input?.nonNull != nil { request.input = try inputItems(request.given.input) }
    request.tools = try Self.checkedTools(request.given.tools)
    if let text = request.given.text { request.text = try Self.checkedText(text) }
    request.given = Given()
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
    if let verbosity = object["verbosity"]?.nonNull, !["low", "medium", "high"].contains(verbosity) {
      throw refuse("text.verbosity", "must be \"low\", \"medium\" or \"high\"")
    }
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
    if let verbosity = text["verbosity"]?.nonNull { body["verbosity"] = verbosity }
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

/// The schema of `metadata`, for the document.
let metadataSchema: JSONValue = [
  "anyOf": [
    ["type": "object", "maxProperties": 16, "additionalProperties": ["type": "string", "maxLength": 512]]
  ]
]

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
