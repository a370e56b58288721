import ApusChat
import ApusCore
import NIOCore

/// The body of Ollama's `POST /api/chat` and `POST /api/generate`.
struct OllamaRequest {
  /// `options`: the sampling fields under Ollama's names.
  struct Options {
    var sampling = SamplingFields()

    static let fields = FieldTable<Options>([
      Field(
        "num_predict", schema: ["type": "integer"], "The most tokens to generate; below 0 as many as the context holds."
      ) { (options, fields, reader, name) throws(JSONError) in
        guard let limit = try fields.integer(&reader, name) else { return }
        options.sampling.maxTokens = limit < 0 ? nil : limit
      },
      .number("temperature", to: \.sampling.temperature, "Divides the logits; 0 takes the likeliest token."),
      .integer("top_k", to: \.sampling.topK, "Draws from this many of the likeliest tokens; 0 from all."),
      .number("top_p", to: \.sampling.topP, "Draws from the likeliest tokens with this much probability; in (0, 1]."),
      .number("min_p", to: \.sampling.minP, "Drops tokens less likely than this share of the likeliest; in [0, 1]."),
      .integer("seed", to: \.sampling.seed, "Seed of the draws."),
      .strings("stop", to: \.sampling.stop, "Texts that end the answer."),
      .number("repeat_penalty", to: \.sampling.repetitionPenalty, "Penalty on tokens seen before; in (0, 2]."),
      .number("presence_penalty", to: \.sampling.presencePenalty, "Subtracted once per token seen; in [-2, 2]."),
      .number("frequency_penalty", to: \.sampling.frequencyPenalty, "Subtracted per occurrence; in [-2, 2]."),
      neutral("mirostat", 0, "mirostat sampling is not available; leave the field out"),
      neutral("typical_p", 1, "typical sampling is not available; leave the field out"),
      neutral("tfs_z", 1, "tail-free sampling is not available; leave the field out"),
      .ignored(
        "num_ctx", "num_batch", "num_keep", "num_gpu", "main_gpu", "num_thread", "repeat_last_n", "penalize_newline",
        "mirostat_tau", "mirostat_eta", "numa", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mmap",
        "use_mlock", "embedding_only", "draft_num_predict", schema: [:],
        "Ignored: the server's own settings hold, and penalties look at the whole text."),
    ])

    /// A way of sampling that this server does not know, where its value asks for it.
    private static func neutral(_ name: String, _ value: Double, _ sentence: String) -> Field<Options> {
      Field(name, schema: ["const": .double(value)], "Not available: anything but \(value) is refused.") {
        (_, fields, reader, name) throws(JSONError) in
        if let given = try fields.number(&reader, name), given != value {
          fields.note(name, sentence, code: .unsupported)
        }
      }
    }
  }

  var model: String?
  var messages: JSONValue?
  var tools: JSONValue?
  var prompt: String?
  var system: String?
  var isRaw = false
  var stream = true
  var think: JSONValue?
  var keepAlive: JSONValue?
  var options = Options()

  private static let common = FieldTable<OllamaRequest>([
    .string("model", to: \.model, "The model served; may be left out, and may end in `:latest`."),
    .flag("stream", to: \.stream, default: true, "Whether the answer is sent as lines of JSON while it is made."),
    Field("options", schema: Options.fields.schema, "How tokens are drawn and when to stop.") {
      (request, fields, reader, name) throws(JSONError) in
      try fields.object(&reader, name) { (fields, reader, key) throws(JSONError) in
        if try !Options.fields.read(key, into: &request.options, &fields, &reader) { try reader.skipValue() }
      }
    },
    Field(
      "format", schema: ["anyOf": [["enum": ["", "json"]], ["type": "object"]]],
      "What the text must look like: `json` or a JSON Schema."
    ) { (request, fields, reader, name) throws(JSONError) in
      switch try fields.value(&reader, name) {
      case nil, "": break
      case "json": request.options.sampling.grammar.set(.jsonObject)
      case .object(let schema): request.options.sampling.grammar.set(.jsonSchema(JSONValue.object(schema).compactText))
      case let other?: fields.note(name, "expected \"json\" or a JSON Schema, got \(other.kindName)")
      }
    },
    .value(
      "think", to: \.think, schema: ["anyOf": [["type": "boolean"], ["enum": ["low", "medium", "high"]]]],
      "Whether, or how much, the model should think before it answers."),
    .value(
      "keep_alive", to: \.keepAlive, schema: ["type": ["string", "number"]],
      "Ignored: the model stays in memory as long as the server runs."),
    Field("logprobs", schema: ["const": false], "Not available here: use the chat completions API.") {
      (_, fields, reader, name) throws(JSONError) in
      try fields.refuseUnlessFalse(&reader, name, "is not available here; use /v1/chat/completions")
    },
    .ignored("top_logprobs", schema: ["type": "integer"], "Ignored."),
    .ignored("truncate", "shift", schema: ["type": "boolean"], "Ignored: a prompt that is too long is an error."),
  ])

  /// The members of the body of `/api/chat`.
  static let chatFields =
    FieldTable<OllamaRequest>([
      .array(
        "messages", to: \.messages, of: "messages", items: message,
        "The conversation. None, or an empty one, asks only that the model be loaded, which it is."),
      .array(
        "tools", to: \.tools, of: "tools",
        items: [
          "type": "object",
          "properties": [
            "type": ["const": "function"],
            "function": [
              "type": "object",
              "properties": [
                "name": ["type": "string"], "description": ["type": "string"], "parameters": ["type": "object"],
              ], "required": ["name"],
            ],
          ], "required": ["function"],
        ], "The tools that the model may call."),
    ]) + common

  /// The members of the body of `/api/generate`.
  static let generateFields =
    FieldTable<OllamaRequest>([
      .string("prompt", to: \.prompt, "The text to answer. Without one the model is loaded, which it is."),
      .string("system", to: \.system, "The system prompt."),
      .flag("raw", to: \.isRaw, default: false, "Whether the prompt goes to the model as it is, without a template."),
      emptyOnly("template", "the model's own template is used; leave the field out"),
      emptyOnly("suffix", "filling in the middle is not available; leave the field out"),
      emptyOnly("context", "is Ollama's old form of a conversation; use /api/chat"),
      emptyOnly("images", "the model served here reads text only; leave the field out"),
    ]) + common

  private static let message: JSONValue = [
    "type": "object",
    "properties": [
      "role": ["enum": ["system", "user", "assistant", "tool"]], "content": ["type": "string"],
      "thinking": ["type": "string"],
      "tool_calls": [
        "type": "array",
        "items": [
          "type": "object",
          "properties": [
            "function": [
              "type": "object", "properties": ["name": ["type": "string"], "arguments": ["type": "object"]],
              "required": ["name", "arguments"],
            ]
          ], "required": ["function"],
        ],
      ], "tool_name": ["type": "string"], "tool_call_id": ["type": "string"],
    ], "required": ["role"],
  ]

  /// A member that clients send empty when they do not mean it, and that is refused otherwise.
  private static func emptyOnly(_ name: String, _ sentence: String) -> Field<OllamaRequest> {
    Field(name, schema: ["enum": ["", [], nil]], "Not available: \(sentence).") {
      (_, fields, reader, name) throws(JSONError) in
      switch try fields.value(&reader, name) {
      case nil, "", .array([]): break
      default: fields.note(name, sentence, code: .unsupported)
      }
    }
  }

  /// Reads and checks a body.
  ///
  /// - Parameter isChat: whether it is one of `/api/chat`.
  init(_ body: ByteBuffer, isChat: Bool) throws(EngineError) {
    var request = OllamaRequest()
    try (isChat ? Self.chatFields : Self.generateFields).read(body, into: &request)
    if request.isRaw, request.system?.isEmpty == false {
      throw EngineError(
        .invalidRequest, "raw takes no system: the prompt is all that the model sees.", parameter: "raw")
    }
    switch request.think {
    case nil, .bool, "low", "medium", "high": break
    default:
      throw EngineError(
        .invalidRequest, "think: expected a boolean or \"low\", \"medium\" or \"high\".", parameter: "think")
    }
    self = request
  }

  private init() { options.sampling.maxTokensName = "num_predict" }

  /// Whether nothing is asked but that the model be loaded.
  func isLoad(isChat: Bool) -> Bool { isChat ? messages?.arrayValue?.isEmpty ?? true : prompt?.isEmpty ?? true }

  /// The conversation as the chat API would carry it.
  ///
  /// - Throws: `invalidRequest` or `unsupported`, naming the message at fault.
  func chat() throws(EngineError) -> ChatCompletionRequest {
    var messages: [JSONValue] = []
    if let prompt {
      if let system, !system.isEmpty { messages.append(["role": "system", "content": .string(system)]) }
      messages.append(["role": "user", "content": .string(prompt)])
    } else {
      messages = try Self.messages(self.messages?.arrayValue ?? [])
    }
    var chat = ChatCompletionRequest(messages: .array(messages))
    chat.tools = tools
    chat.reading.tools = try ChatCompletionRequest.definitions(tools)
    chat.common.sampling = options.sampling
    if let last = messages.last, last["role"] == "assistant", last["tool_calls"] == nil {
      chat.continueFinalMessage = true
    }
    switch think {
    case .bool(let thinks)?:
      chat.templateVariables["enable_thinking"] = .bool(thinks)
      chat.templateVariables["thinking"] = .bool(thinks)
    case .string?:
      chat.templateVariables["enable_thinking"] = true
      chat.templateVariables["thinking"] = true
      chat.reasoningEffort = think
    default: break
    }
    return chat
  }

  /// Messages in the chat API's shape.
  ///
  /// Ollama's calls have no names; they get some, and results take them in the order of the calls.
  private static func messages(_ given: [JSONValue]) throws(EngineError) -> [JSONValue] {
    var messages: [JSONValue] = []
    messages.reserveCapacity(given.count)
    var calls: [(id: String, name: String)] = []
    var answered = 0
    for (index, message) in given.enumerated() {
      func refuse(_ member: String, _ sentence: String, _ code: EngineError.Code = .invalidRequest) -> EngineError {
        let name = "messages[\(index)]\(member)"
        return EngineError(code, "\(name): \(sentence).", parameter: name)
      }
      func string(_ member: String) throws(EngineError) -> String? {
        guard let value = message[member]?.nonNull else { return nil }
        guard let text = value.stringValue else {
          throw refuse("." + member, "expected a string, got \(value.kindName)")
        }
        return text
      }
      guard message.objectValue != nil else { throw refuse("", "expected an object, got \(message.kindName)") }
      guard let role = try string("role"), ["system", "user", "assistant", "tool"].contains(role) else {
        throw refuse(".role", "must be \"system\", \"user\", \"assistant\" or \"tool\"")
      }
      if let images = message["images"]?.nonNull, images != [] {
        throw refuse(".images", "the model served here reads text only", .unsupported)
      }
      var object = JSONObject([("role", .string(role)), ("content", .string(try string("content") ?? ""))])
      if let thinking = try string("thinking"), !thinking.isEmpty { object["reasoning_content"] = .string(thinking) }
      if let made = message["tool_calls"]?.nonNull {
        guard let made = made.arrayValue else { throw refuse(".tool_calls", "expected an array, got \(made.kindName)") }
        var converted: [JSONValue] = []
        for (number, call) in made.enumerated() {
          let path = ".tool_calls[\(number)].function"
          guard let name = call["function"]?["name"]?.stringValue else {
            throw refuse(path + ".name", "is required: a string")
          }
          let arguments = call["function"]?["arguments"] ?? [:]
          guard arguments.objectValue != nil else {
            throw refuse(path + ".arguments", "expected an object, got \(arguments.kindName)")
          }
          // Nine letters and digits, which the strictest of templates asks for.
          let ordinal = String(calls.count % 100_000)
          let id =
            call["id"]?.stringValue ?? "call" + String(repeating: "0", count: 5 - ordinal.utf8.count) + ordinal
          calls.append((id, name))
          converted.append([
            "id": .string(id), "type": "function", "function": ["name": .string(name), "arguments": arguments],
          ])
        }
        if !converted.isEmpty { object["tool_calls"] = .array(converted) }
      }
      if role == "tool" {
        let call = answered < calls.count ? calls[answered] : nil
        answered += 1
        if let id = try string("tool_call_id") ?? call?.id { object["tool_call_id"] = .string(id) }
        if let name = try string("tool_name") ?? call?.name { object["name"] = .string(name) }
      }
      messages.append(.object(object))
    }
    return messages
  }
}
