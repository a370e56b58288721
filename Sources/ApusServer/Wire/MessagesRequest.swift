import ApusChat
import ApusCore
import NIOCore

/// The body of Anthropic's `POST /v1/messages` and `POST /v1/messages/count_tokens`.
struct MessagesRequest {
  /// `thinking`.
  struct Thinking {
    var type: String?
    var budgetTokens: Int?

    static let fields = FieldTable<Thinking>([
      .string("type", to: \.type, "`enabled`, `adaptive` or `disabled`."),
      .integer("budget_tokens", to: \.budgetTokens, "How many tokens the chain of thought has at most."),
      .ignored("display", schema: ["type": "string"], "Ignored: the chain of thought is given as it is."),
    ])
  }

  /// `output_config`.
  struct OutputConfiguration {
    var format: JSONValue?
    var effort: String?

    static let fields = FieldTable<OutputConfiguration>([
      .value(
        "format", to: \.format, schema: ["type": "object"],
        "What the text must look like: `{\"type\": \"json_schema\", \"schema\": {...}}`."),
      .string("effort", to: \.effort, "How much the model should think; given to the chat template."),
    ])
  }

  var model: String?
  var messages: JSONValue?
  var system: JSONValue?
  var tools: JSONValue?
  var toolChoice: JSONValue?
  var thinking = Thinking()
  var output = OutputConfiguration()
  var stream = false
  var sampling = SamplingFields()

  /// What both endpoints read.
  private static let conversation = FieldTable<MessagesRequest>([
    .string("model", to: \.model, "The model served; may be left out."),
    Field.array(
      "messages", to: \.messages, of: "messages", items: message,
      "The conversation: messages with the roles `user` and `assistant`. A last message of the assistant is continued."
    ).required("an array of messages"),
    .value(
      "system", to: \.system, schema: ["anyOf": [["type": "string"], ["type": "array", "items": block]]],
      "The system prompt: a string or blocks of text."),
    .array(
      "tools", to: \.tools, of: "tools",
      items: [
        "type": "object",
        "properties": [
          "name": ["type": "string"], "description": ["type": "string"], "input_schema": ["type": "object"],
          "strict": ["type": "boolean"], "type": ["const": "custom"],
        ], "required": ["name", "input_schema"],
      ], "The tools that the model may call."),
    .value(
      "tool_choice", to: \.toolChoice,
      schema: [
        "type": "object",
        "properties": [
          "type": ["enum": ["auto", "any", "tool", "none"]], "name": ["type": "string"],
          "disable_parallel_tool_use": ["type": "boolean"],
        ], "required": ["type"],
      ], "Whether a tool may or must be called."),
    Field("thinking", schema: Thinking.fields.schema, "Whether the model should think before it answers.") {
      (request, fields, reader, name) throws(JSONError) in
      try fields.object(&reader, name) { (fields, reader, key) throws(JSONError) in
        if try !Thinking.fields.read(key, into: &request.thinking, &fields, &reader) { try reader.skipValue() }
      }
    },
    Field("output_config", schema: OutputConfiguration.fields.schema, "What the answer should look like.") {
      (request, fields, reader, name) throws(JSONError) in
      try fields.object(&reader, name) { (fields, reader, key) throws(JSONError) in
        if try !OutputConfiguration.fields.read(key, into: &request.output, &fields, &reader) {
          try reader.skipValue()
        }
      }
    },
    .refused("mcp_servers", because: "servers of tools are not available; leave the field out"),
    .refused("container", because: "containers are not available; leave the field out"),
  ])

  /// The members of the body of `/v1/messages/count_tokens`.
  static let countFields = conversation

  /// The members of the body of `/v1/messages`.
  static let fields =
    conversation
    + FieldTable<MessagesRequest>([
      Field.integer("max_tokens", to: \.sampling.maxTokens, "The most tokens to generate; at least 1.").required(
        "an integer of at least 1"),
      .flag("stream", to: \.stream, default: false, "Whether the answer is sent as events while it is made."),
      Field(
        "stop_sequences", schema: ["type": "array", "items": ["type": "string"]], "Texts that end the answer."
      ) { (request, fields, reader, name) throws(JSONError) in
        request.sampling.stop = try fields.array(&reader, name, of: "strings") {
          (fields, reader, name) throws(JSONError) in try fields.string(&reader, name)
        }
      },
      .number("temperature", to: \.sampling.temperature, "Divides the logits; 0 takes the likeliest token."),
      .number("top_p", to: \.sampling.topP, "Draws from the likeliest tokens with this much probability; in (0, 1]."),
      .integer("top_k", to: \.sampling.topK, "Draws from this many of the likeliest tokens."),
      Field("metadata", schema: ["type": "object"], "Checked to be an object, and ignored.") {
        (_, fields, reader, name) throws(JSONError) in
        try fields.object(&reader, name) { (_, reader, _) throws(JSONError) in try reader.skipValue() }
      },
      .ignored("service_tier", schema: ["type": "string"], "Ignored."),
    ])

  /// The schemas of a block and of a message, for the document.
  private static let block: JSONValue = [
    "type": "object",
    "properties": [
      "type": ["enum": ["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]],
      "text": ["type": "string"], "thinking": ["type": "string"], "id": ["type": "string"],
      "name": ["type": "string"], "input": ["type": "object"], "tool_use_id": ["type": "string"],
      "content": ["description": "Of a tool's result: a string or blocks of text."], "is_error": ["type": "boolean"],
    ], "required": ["type"],
  ]
  private static let message: JSONValue = [
    "type": "object",
    "properties": [
      "role": ["enum": ["user", "assistant"]],
      "content": ["anyOf": [["type": "string"], ["type": "array", "items": block]]],
    ], "required": ["role", "content"],
  ]

  /// Reads and checks a body.
  ///
  /// - Parameter isCount: whether only the prompt is asked for, so that no limit on the answer is needed.
  init(_ body: ByteBuffer, isCount: Bool) throws(EngineError) {
    var request = MessagesRequest()
    try (isCount ? Self.countFields : Self.fields).read(body, into: &request)
    self = request
    if let limit = sampling.maxTokens, limit < 1 {
      throw EngineError(.invalidRequest, "max_tokens must be at least 1, got \(limit).", parameter: "max_tokens")
    }
    try checkThinking()
    try readFormat()
  }

  private init() { sampling.maxTokensName = "max_tokens" }

  private func checkThinking() throws(EngineError) {
    func refuse(_ name: String, _ sentence: String) -> EngineError {
      EngineError(.invalidRequest, "thinking.\(name): \(sentence).", parameter: "thinking.\(name)")
    }
    switch thinking.type {
    case nil where thinking.budgetTokens == nil: break
    case "disabled", "adaptive": break
    case "enabled":
      guard let budget = thinking.budgetTokens else { throw refuse("budget_tokens", "is required: an integer") }
      if budget < 1 { throw refuse("budget_tokens", "must be at least 1, got \(budget)") }
      if let limit = sampling.maxTokens, budget >= limit {
        throw refuse("budget_tokens", "must be less than max_tokens (\(limit)), got \(budget)")
      }
    default: throw refuse("type", "must be \"enabled\", \"adaptive\" or \"disabled\"")
    }
  }

  private mutating func readFormat() throws(EngineError) {
    guard let format = output.format else { return }
    guard format["type"] == "json_schema", let schema = format["schema"], schema.objectValue != nil else {
      throw EngineError(
        .invalidRequest, "output_config.format: expected {\"type\": \"json_schema\", \"schema\": {...}}.",
        parameter: "output_config.format")
    }
    sampling.grammar.set(.jsonSchema(schema.compactText))
  }

  /// The same conversation as the chat API would carry it.
  ///
  /// - Throws: `invalidRequest` or `unsupported`, naming the member at fault.
  func chat() throws(EngineError) -> ChatCompletionRequest {
    var conversation = Conversation()
    if let system { try conversation.append(system: system) }
    for (index, message) in (messages?.arrayValue ?? []).enumerated() {
      try conversation.append(message, "messages[\(index)]")
    }
    let given = messages?.arrayValue ?? []
    if given.isEmpty {
      throw EngineError(.invalidRequest, "messages must not be empty.", parameter: "messages")
    }
    var chat = ChatCompletionRequest(messages: .array(conversation.messages))
    if let last = chat.messages?.arrayValue?.last, last["role"] == "assistant" {
      if last["tool_calls"] != nil {
        let path = "messages[\(given.count - 1)]"
        throw EngineError(
          .invalidRequest, "\(path): tool_use blocks must be followed by a message with their tool_result blocks.",
          parameter: path)
      }
      chat.continueFinalMessage = true
    }
    let tools = try Self.functions(self.tools)
    chat.tools = tools
    chat.reading.tools = try ChatCompletionRequest.definitions(tools)
    try readChoice(into: &chat.reading)
    chat.common.model = model
    chat.common.sampling = sampling
    switch thinking.type {
    case "enabled", "adaptive":
      // Templates of models that can do without thinking read one of these.
      chat.templateVariables["enable_thinking"] = true
      chat.templateVariables["thinking"] = true
      if let budget = thinking.budgetTokens {
        chat.templateVariables["thinking_budget"] = .int(Int64(budget))
        chat.common.sampling.thinkingBudget = budget
      }
    case "disabled":
      chat.templateVariables["enable_thinking"] = false
      chat.templateVariables["thinking"] = false
    default: break
    }
    chat.reasoningEffort = output.effort.map { .string($0) }
    return chat
  }

  /// Tools in the chat API's shape.
  private static func functions(_ tools: JSONValue?) throws(EngineError) -> JSONValue? {
    guard let tools = tools?.arrayValue, !tools.isEmpty else { return JSONValue?.none }
    var functions: [JSONValue] = []
    for (index, tool) in tools.enumerated() {
      func refuse(_ member: String, _ sentence: String, _ code: EngineError.Code = .invalidRequest) -> EngineError {
        EngineError(code, "tools[\(index)]\(member): \(sentence).", parameter: "tools[\(index)]\(member)")
      }
      guard tool.objectValue != nil else { throw refuse("", "expected an object, got \(tool.kindName)") }
      if let type = tool["type"], type != "custom" {
        throw refuse(".type", "only tools of type \"custom\" are available", .unsupported)
      }
      guard let name = tool["name"]?.stringValue, !name.isEmpty, name.utf8.count <= 256 else {
        throw refuse(".name", "is required: a string of 1 to 256 bytes")
      }
      guard let schema = tool["input_schema"], schema.objectValue != nil else {
        throw refuse(".input_schema", "is required: a JSON Schema object")
      }
      var function = JSONObject([("name", .string(name))])
      if let description = tool["description"]?.nonNull {
        guard description.stringValue != nil else {
          throw refuse(".description", "expected a string, got \(description.kindName)")
        }
        function["description"] = description
      }
      function["parameters"] = schema
      if tool["strict"] == true { function["strict"] = true }
      functions.append(["type": "function", "function": .object(function)])
    }
    return .array(functions)
  }

  private func readChoice(into reading: inout ChatReading) throws(EngineError) {
    func refuse(_ member: String, _ sentence: String) -> EngineError {
      EngineError(.invalidRequest, "tool_choice\(member): \(sentence).", parameter: "tool_choice\(member)")
    }
    guard let choice = toolChoice else { return }
    switch choice["disable_parallel_tool_use"] {
    case nil, .null: break
    case .bool(let disables): reading.allowsParallelCalls = !disables
    case let other?: throw refuse(".disable_parallel_tool_use", "expected a boolean, got \(other.kindName)")
    }
    switch choice["type"] {
    case "auto": return
    case "none": reading.choice = .none
    case "any": reading.choice = .required
    case "tool":
      guard let name = choice["name"]?.stringValue else { throw refuse(".name", "is required: a tool's name") }
      if reading.tools[name] == nil { throw refuse(".name", "\(name.debugDescription) is not among the tools") }
      reading.choice = .named(name)
    default: throw refuse(".type", "must be \"auto\", \"any\", \"tool\" or \"none\"")
    }
    if reading.choice != .none, reading.tools.isEmpty { throw refuse("", "is only allowed when tools are given") }
  }
}

/// A conversation in the chat API's shape, made of Anthropic's messages.
///
/// Results of tools become messages of their own, and neighbours of one role are joined, as Anthropic's API does.
private struct Conversation {
  /// A message whose parts are still being collected.
  private struct Turn {
    var role: String
    var texts: [String] = []
    var thoughts: [String] = []
    var calls: [JSONValue] = []
    /// Of a tool's result: the call's name and the tool's.
    var callID: String?
    var toolName: String?

    var message: JSONValue {
      var message = JSONObject([("role", .string(role))])
      if let callID { message["tool_call_id"] = .string(callID) }
      message["content"] = .string(texts.joined(separator: "\n"))
      // Some templates name the tool.
      if let toolName { message["name"] = .string(toolName) }
      if !thoughts.isEmpty { message["reasoning_content"] = .string(thoughts.joined(separator: "\n")) }
      if !calls.isEmpty { message["tool_calls"] = .array(calls) }
      return .object(message)
    }
  }

  private var turns: [Turn] = []
  private var toolNames: [String: String] = [:]

  /// The messages.
  var messages: [JSONValue] { turns.map(\.message) }

  private func refuse(_ path: String, _ sentence: String, _ code: EngineError.Code = .invalidRequest) -> EngineError {
    EngineError(code, "\(path): \(sentence).", parameter: path)
  }

  mutating func append(system: JSONValue) throws(EngineError) {
    let text = try text(system, "system")
    if !text.isEmpty { turns.append(Turn(role: "system", texts: [text])) }
  }

  mutating func append(_ message: JSONValue, _ path: String) throws(EngineError) {
    guard message.objectValue != nil else { throw refuse(path, "expected an object, got \(message.kindName)") }
    switch message["role"] {
    case "user": try append(user: message["content"], path + ".content")
    case "assistant": try append(assistant: message["content"], path + ".content")
    default: throw refuse(path + ".role", "must be \"user\" or \"assistant\"")
    }
  }

  /// Begins a message of a role, unless the last one has it.
  private mutating func open(_ role: String) {
    if turns.last?.role != role { turns.append(Turn(role: role)) }
  }

  private mutating func append(user content: JSONValue?, _ path: String) throws(EngineError) {
    for (block, path) in try blocks(content, path) {
      switch try type(of: block, path) {
      case "text":
        open("user")
        turns[turns.count - 1].texts.append(try string(block, "text", path))
      case "tool_result":
        let id = try string(block, "tool_use_id", path)
        var result = ""
        if let content = block["content"]?.nonNull { result = try text(content, path + ".content") }
        // Templates have no place for a failure, so the text says it.
        if block["is_error"] == true, !result.lowercased().hasPrefix("error") { result = "Error: " + result }
        turns.append(Turn(role: "tool", texts: [result], callID: id, toolName: toolNames[id]))
      case let type: throw unreadable(type, path)
      }
    }
  }

  private mutating func append(assistant content: JSONValue?, _ path: String) throws(EngineError) {
    open("assistant")
    for (block, path) in try blocks(content, path) {
      let last = turns.count - 1
      switch try type(of: block, path) {
      case "text": turns[last].texts.append(try string(block, "text", path))
      case "thinking": turns[last].thoughts.append(try string(block, "thinking", path))
      case "redacted_thinking": break
      case "tool_use":
        let id = try string(block, "id", path)
        let name = try string(block, "name", path)
        guard let input = block["input"], input.objectValue != nil else {
          throw refuse(path + ".input", "is required: an object")
        }
        toolNames[id] = name
        turns[last].calls.append([
          "id": .string(id), "type": "function", "function": ["name": .string(name), "arguments": input],
        ])
      case let type: throw unreadable(type, path)
      }
    }
  }

  /// The blocks of a message's content with their places.
  private func blocks(_ content: JSONValue?, _ path: String) throws(EngineError) -> [(JSONValue, String)] {
    switch content {
    case .string(let text)?: return [(["type": "text", "text": .string(text)], path)]
    case .array(let blocks)?: return blocks.enumerated().map { ($1, "\(path)[\($0)]") }
    case nil: throw refuse(path, "is required: a string or an array of blocks")
    case let other?: throw refuse(path, "expected a string or an array of blocks, got \(other.kindName)")
    }
  }

  /// The text of a string or of blocks of text.
  private func text(_ content: JSONValue, _ path: String) throws(EngineError) -> String {
    var texts: [String] = []
    for (block, path) in try blocks(content, path) {
      let type = try type(of: block, path)
      if type != "text" { throw unreadable(type, path) }
      texts.append(try string(block, "text", path))
    }
    return texts.joined(separator: "\n")
  }

  private func type(of block: JSONValue, _ path: String) throws(EngineError) -> String {
    guard block.objectValue != nil else { throw refuse(path, "expected an object, got \(block.kindName)") }
    return try string(block, "type", path)
  }

  private func string(_ block: JSONValue, _ member: String, _ path: String) throws(EngineError) -> String {
    guard let value = block[member] else { throw refuse("\(path).\(member)", "is required: a string") }
    guard let text = value.stringValue else {
      throw refuse("\(path).\(member)", "expected a string, got \(value.kindName)")
    }
    return text
  }

  private func unreadable(_ type: String, _ path: String) -> EngineError {
    let isKnown = ["text", "thinking", "redacted_thinking", "tool_use", "tool_result"].contains(type)
    return isKnown
      ? refuse(path, "a block of type \(type.debugDescription) has no place here")
      : refuse(
        path, "the model served here reads text only, so blocks of type \(type.debugDescription) cannot be taken",
        .unsupported)
  }
}
