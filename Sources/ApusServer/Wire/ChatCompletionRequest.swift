import ApusChat
import ApusCore
import NIOCore

/// `stream_options` of the OpenAI API.
struct StreamOptions {
  /// A last chunk without choices tells the usage.
  var includeUsage = false
  /// Every chunk tells the usage so far.
  var continuousUsage = false

  /// The members.
  static let fields = FieldTable<StreamOptions>([
    .flag("include_usage", to: \.includeUsage, default: false, "Whether a last chunk without choices tells the usage."),
    .flag(
      "continuous_usage_stats", to: \.continuousUsage, default: false, "Whether every chunk tells the usage so far."),
    .ignored("include_obfuscation", schema: ["type": "boolean"], "Has no effect: chunks are never padded."),
  ])

  init() {}

  init(_ fields: inout FieldReader, _ reader: inout JSONReader, _ name: String) throws(JSONError) {
    var options = StreamOptions()
    try fields.object(&reader, name) { (fields, reader, key) throws(JSONError) in
      if try !Self.fields.read(key, into: &options, &fields, &reader) { try reader.skipValue() }
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

  /// The members, those of sampling included.
  static let fields =
    FieldTable<CommonFields>([
      .string("model", to: \.model, "The model served; may be left out."),
      .flag("stream", to: \.stream, default: false, "Whether the answer is sent as events while it is made."),
      Field("stream_options", schema: StreamOptions.fields.schema, "What a stream tells beside the answer.") {
        (common, fields, reader, name) throws(JSONError) in
        common.streamOptions = try reader.peek() == .null ? nil : StreamOptions(&fields, &reader, name)
        if common.streamOptions == nil { try reader.skipValue() }
      },
      .string("rid", "request_id", to: \.rid, "The request's name, by which it can be aborted."),
      Field(
        "cache_salt", "extra_key", schema: ["type": "string"],
        "Requests share cached prefixes only with those of the same salt."
      ) { (common, fields, reader, name) throws(JSONError) in
        // Both separate prefix caches; a request may give both, and then both must match.
        if let salt = try fields.string(&reader, name) {
          common.cacheSalt = common.cacheSalt.isEmpty ? salt : common.cacheSalt + "\u{1F}" + salt
        }
      },
      Field("priority", schema: ["type": "integer", "default": 0], "Larger is more urgent, to the priority policy.") {
        (common, fields, reader, name) throws(JSONError) in
        common.priority = try fields.integer(&reader, name) ?? 0
      },
      Field("user", schema: ["type": "string"], "Checked to be a string, and ignored.") {
        (_, fields, reader, name) throws(JSONError) in
        _ = try fields.string(&reader, name)
      },
      Field("safety_identifier", "prompt_cache_key", schema: ["type": "string"], "Checked to be a string, and ignored.")
      {
        (_, fields, reader, name) throws(JSONError) in
        _ = try fields.string(&reader, name)
      },
      .ignored(
        "service_tier", "prompt_cache_options", "prompt_cache_retention", schema: [:], "Has no effect here."),
      Field("metadata", schema: ["type": "object"], "Checked to be an object, and ignored.") {
        (_, fields, reader, name) throws(JSONError) in
        try fields.object(&reader, name) { (_, reader, _) throws(JSONError) in try reader.skipValue() }
      },
      .refused(
        "lora_path", "session_params", "custom_logit_processor", because: "is not available; leave the field out"),
      .refusedUnlessFalse(
        "return_hidden_states", "return_routed_experts", "return_sampling_mask",
        because: "is not available; leave the field out"),
      .refusedUnlessFalse(
        "return_token_ids", "return_tokens_as_token_ids", "return_prompt_token_ids", "return_meta_info",
        because: "tokens are told by /generate (output_ids); leave the field out"),
      .refused(
        "prompt_logprobs", because: "is told by /v1/completions with echo, or by /generate; leave the field out"),
      .refused("truncate_prompt_tokens", because: "prompts are not cut; shorten the prompt"),
    ]) + SamplingFields.fields.within(\.sampling)

  /// Reads a member if it is one of the common ones.
  mutating func read(
    _ key: String, _ fields: inout FieldReader, _ reader: inout JSONReader
  ) throws(JSONError) -> Bool {
    try Self.fields.read(key, into: &self, &fields, &reader)
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
  var verbosity: String?
  /// Whether the model should think; `nil` leaves it to the template.
  var thinks: Bool?
  var documents: JSONValue?
  var addsSpecialTokens = false

  /// The members of the body.
  static let fields =
    FieldTable<ChatCompletionRequest>([
      .array(
        "messages", to: \.messages, of: "messages", items: message,
        "The conversation. Required unless `input_ids` is given."),
      .array("tools", to: \.tools, of: "tools", items: tool, "The functions that the model may call."),
      .value(
        "tool_choice", to: \.toolChoice,
        schema: [
          "anyOf": [
            ["enum": ["auto", "none", "required"]],
            [
              "type": "object",
              "properties": [
                "type": ["const": "function"],
                "function": ["type": "object", "properties": ["name": ["type": "string"]], "required": ["name"]],
              ], "required": ["type"],
            ],
            [
              "type": "object",
              "properties": [
                "type": ["const": "allowed_tools"],
                "allowed_tools": [
                  "type": "object",
                  "properties": [
                    "mode": ["enum": ["auto", "required"]], "tools": ["type": "array", "items": ["type": "object"]],
                  ], "required": ["mode", "tools"],
                ],
              ], "required": ["type", "allowed_tools"],
            ],
          ]
        ], "Whether a function may or must be called."),
      .flag(
        "parallel_tool_calls", to: \.reading.allowsParallelCalls, default: true,
        "Whether an answer may hold several calls."),
      .flag(
        "separate_reasoning", to: \.reading.separatesReasoning, default: true,
        "Whether the chain of thought is told apart from the answer."),
      .flag(
        "stream_reasoning", to: \.reading.streamsReasoning, default: true,
        "Whether the chain of thought is streamed as it comes rather than in one piece."),
      .flag(
        "include_reasoning", to: \.reading.includesReasoning, default: true,
        "Whether the chain of thought that is told apart is given at all."),
      Field(
        "thinking",
        schema: [
          "anyOf": [
            ["type": "boolean"],
            [
              "type": "object",
              "properties": [
                "type": ["enum": ["enabled", "disabled", "adaptive", "auto"]],
                "budget_tokens": ["type": "integer", "minimum": 0],
              ], "required": ["type"],
            ],
          ]
        ],
        "Whether the model should think, given to the chat template as `thinking` and `enable_thinking`; "
          + "`budget_tokens` is a `thinking_budget`."
      ) { (request, fields, reader, name) throws(JSONError) in
        try request.readThinking(name, &fields, &reader)
      },
      Field(
        "enable_thinking", schema: ["type": "boolean"],
        "The same for clients of Qwen's API: given to the chat template as `thinking` and `enable_thinking`."
      ) { (request, fields, reader, name) throws(JSONError) in
        if let thinks = try fields.bool(&reader, name) { request.thinks = thinks }
      },
      .array(
        "documents", to: \.documents, of: "documents", items: ["type": "object"],
        "Documents for chat templates that read them."),
      .flag(
        "add_special_tokens", to: \.addsSpecialTokens, default: false,
        "Whether the tokenizer's special tokens are added to what the template wrote, which has its own."),
      .refused("chat_template", because: "templates of clients are not run; leave the field out"),
      .refusedUnlessFalse("echo", because: "a chat's prompt is not repeated; leave the field out"),
      .tokens("input_ids", to: \.inputIDs, "The prompt as token ids, in place of the template's."),
      .flag("logprobs", to: \.logprobs, default: false, "Whether log-probabilities of the answer's tokens are given."),
      .integer("top_logprobs", to: \.topLogprobs, "How many of the likeliest tokens are given with each; in 0...20."),
      .flag(
        "add_generation_prompt", to: \.addGenerationPrompt, default: true,
        "Whether the prompt ends with the opening of the assistant's turn."),
      .flag(
        "continue_final_message", to: \.continueFinalMessage, default: false,
        "Whether the last message, which is the assistant's, is continued."),
      Field("chat_template_kwargs", schema: ["type": "object"], "Further variables for the chat template.") {
        (request, fields, reader, name) throws(JSONError) in
        if try fields.expect([.object], "an object", &reader, name) {
          request.templateVariables = try reader.readValue().objectValue ?? JSONObject()
        }
      },
      .value(
        "reasoning_effort", to: \.reasoningEffort,
        "How much the model should think, given to the chat template; `none` asks it not to."),
      Field(
        "response_format", schema: GrammarFields.responseFormatSchema, "What the text must look like."
      ) { (request, fields, reader, name) throws(JSONError) in
        try request.common.sampling.grammar.readResponseFormat(name, &fields, &reader)
      },
      Field(
        "verbosity", schema: ["enum": ["low", "medium", "high"]],
        "How long the answer should be, given to the chat template."
      ) { (request, fields, reader, name) throws(JSONError) in
        guard let text = try fields.string(&reader, name) else { return }
        if !["low", "medium", "high"].contains(text) {
          fields.note(name, "must be \"low\", \"medium\" or \"high\", got \(text.debugDescription)")
        }
        request.verbosity = text
      },
      .refused("functions", "function_call", because: "is OpenAI's old form; use tools and tool_choice"),
      .refused("web_search_options", because: "this server searches nothing; leave the field out"),
      .refused("moderation", because: "moderation is not available; leave the field out"),
      .refusedUnlessFalse("store", because: "chat completions are not kept; leave the field out, or use /v1/responses"),
      .ignored("prediction", schema: ["type": "object"], "Has no effect: it could only make the answer faster."),
      .refused("audio", because: "this model answers in text only; leave the field out"),
      Field("modalities", schema: ["const": ["text"]], "Only text is available.") {
        (_, fields, reader, name) throws(JSONError) in
        let modalities = try fields.strings(&reader, name)
        if let modalities, modalities.contains(where: { $0 != "text" }) {
          fields.note(name, "this model answers in text only", code: .unsupported)
        }
      },
    ]) + CommonFields.fields.within(\.common)

  /// The schemas of a message and of a tool, for the document.
  private static let message: JSONValue = [
    "type": "object",
    "properties": [
      "role": ["type": "string", "description": "`system`, `developer`, `user`, `assistant` or `tool`."],
      "content": [
        "anyOf": [
          ["type": ["string", "null"]],
          [
            "type": "array",
            "items": [
              "type": "object", "properties": ["type": ["const": "text"], "text": ["type": "string"]],
              "required": ["type"],
            ],
          ],
        ]
      ], "reasoning_content": ["type": "string"], "tool_call_id": ["type": "string"],
      "tool_calls": [
        "type": "array",
        "items": [
          "type": "object",
          "properties": [
            "id": ["type": "string"], "type": ["const": "function"],
            "function": [
              "type": "object", "properties": ["name": ["type": "string"], "arguments": ["type": "string"]],
              "required": ["name"],
            ],
          ],
        ],
      ],
    ], "required": ["role"],
  ]
  private static let tool: JSONValue = [
    "type": "object",
    "properties": [
      "type": ["const": "function"],
      "function": [
        "type": "object",
        "properties": [
          "name": ["type": "string"], "description": ["type": "string"], "parameters": ["type": "object"],
          "strict": ["type": "boolean"],
        ], "required": ["name"],
      ],
    ], "required": ["function"],
  ]

  /// Reads and checks a body.
  init(_ body: ByteBuffer) throws(EngineError) {
    var request = ChatCompletionRequest()
    try Self.fields.read(body, into: &request)
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
    try restrictTools()
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

  /// Leaves the tools that a `tool_choice` of type `allowed_tools` names, and turns it into its mode.
  ///
  /// Tools that may not be called are not shown to the model either: not all formats of calls can be constrained, and a
  /// model does not call what it does not know.
  private mutating func restrictTools() throws(EngineError) {
    guard let choice = toolChoice, choice["type"] == "allowed_tools" else { return }
    func refuse(_ sentence: String) -> EngineError {
      EngineError(.invalidRequest, "tool_choice \(sentence).", parameter: "tool_choice")
    }
    // The responses API has the members without the inner object.
    let allowed = choice["allowed_tools"] ?? choice
    guard let mode = allowed["mode"]?.stringValue, mode == "auto" || mode == "required" else {
      throw refuse("of type allowed_tools needs a mode, \"auto\" or \"required\"")
    }
    var names: Set<String> = []
    for tool in allowed["tools"]?.arrayValue ?? [] {
      guard tool["type"] == "function", let name = (tool["function"]?["name"] ?? tool["name"])?.stringValue else {
        throw refuse("of type allowed_tools must name functions only")
      }
      if reading.tools[name] == nil { throw refuse("names \(name.debugDescription), which is not among the tools") }
      names.insert(name)
    }
    if names.isEmpty { throw refuse("of type allowed_tools needs tools") }
    let kept = (tools?.arrayValue ?? []).filter { $0["function"]?["name"]?.stringValue.map(names.contains) == true }
    tools = .array(kept)
    reading.tools = ToolDefinitions(json: tools)
    toolChoice = .string(mode)
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

  /// Reads `thinking`: a boolean, or an object with a type as the APIs of DeepSeek, GLM and Kimi have it.
  private mutating func readThinking(
    _ name: String, _ fields: inout FieldReader, _ reader: inout JSONReader
  ) throws(JSONError) {
    switch try fields.value(&reader, name) {
    case nil: break
    case .bool(let thinks): self.thinks = thinks
    case .object(let object):
      switch object["type"] {
      case "enabled":
        thinks = true
        guard let budget = object["budget_tokens"]?.nonNull else { break }
        if let budget = budget.intValue, budget >= 0 {
          common.sampling.thinkingBudget = budget
        } else {
          fields.note("\(name).budget_tokens", "expected an integer of at least 0, got \(budget.compactText)")
        }
      case "disabled": thinks = false
      case "adaptive", "auto": thinks = nil
      default: fields.note("\(name).type", "must be \"enabled\", \"disabled\", \"adaptive\" or \"auto\"")
      }
    case let other?: fields.note(name, "expected a boolean or an object, got \(other.kindName)")
    }
  }

  /// The conversation for the chat template. Arguments of calls stay as the client gave them: the template's renderer knows
  /// which form the template wants.
  ///
  /// - Parameter formats: whether the template knows the role `developer`, which is `system` to others.
  /// - Throws: `invalidRequest` or `unsupported`, naming the message at fault.
  func prompt(_ formats: ChatFormats) throws(EngineError) -> ChatPrompt {
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
      if !formats.knowsDeveloperRole, message["role"] == "developer", case .object(var object) = message {
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
    if let thinks {
      variables["enable_thinking"] = .bool(thinks)
      variables["thinking"] = .bool(thinks)
    }
    if let verbosity { variables["verbosity"] = .string(verbosity) }
    if let documents { variables["documents"] = documents }
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
/// Content given as a list of text parts becomes one string (joined by spaces, as SGLang does), and missing content the
/// empty string. An empty list of calls is left out, since templates ask whether there is one, and parts that are thoughts
/// become `reasoning_content`.
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
  case nil, .null:
    // A message of the assistant may be a refusal in place of content.
    object["content"] = object["refusal"]?.stringValue.map { .string($0) } ?? .string("")
  case .array(let parts):
    var texts: [String] = []
    var thoughts: [String] = []
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
      case "thinking":
        guard let text = part["thinking"]?.stringValue else { throw refuse(path + ".thinking", "expected a string") }
        thoughts.append(text)
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
    if !thoughts.isEmpty, object["reasoning_content"]?.nonNull == nil {
      object["reasoning_content"] = .string(thoughts.joined(separator: "\n"))
    }
  case let other?: throw refuse(".content", "expected a string or an array of parts, got \(other.kindName)")
  }
  if object["function_call"]?.nonNull != nil {
    throw refuse(".function_call", "is OpenAI's old form; use tool_calls", .unsupported)
  }
  if let calls = object["tool_calls"], !calls.isNull {
    guard let calls = calls.arrayValue else { throw refuse(".tool_calls", "expected an array, got \(calls.kindName)") }
    if calls.isEmpty { object["tool_calls"] = JSONValue?.none }
  }
  return .object(object)
}
