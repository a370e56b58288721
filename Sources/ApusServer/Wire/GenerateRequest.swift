import ApusCore
import NIOCore

/// The body of `POST /generate`, the native API, which follows SGLang's.
///
/// Fields that may be one value for all prompts or one per prompt are kept as lists; `element(_:at:)` picks.
struct GenerateRequest {
  var prompts: [ApusCore.Request.Prompt] = []
  /// Whether the prompt came as a list, so that the answer is a list too.
  var isBatch = false
  var sampling: [SamplingFields] = []
  var rids: [String] = []
  var stream = false
  var returnLogprob: [Bool] = []
  var logprobStart: [Int] = []
  var topLogprobs: [Int] = []
  /// Tokens whose log-probabilities are wanted, one list for all prompts or one per prompt.
  var tokenIDs: [[TokenID]] = []
  var returnsText = false
  var priority = 0
  var cacheSalt = ""
  /// For all prompts whose `sampling_params` say nothing of it.
  var thinkingBudget: Int?
  /// Samples per prompt.
  var count = 1

  /// The prompts as the client gave them.
  private var texts: PromptList?
  private var tokens: PromptList?

  /// The members of the body.
  static let fields = FieldTable<GenerateRequest>([
    Field("text", "prompt", schema: PromptList.textSchema, "The prompts: a string or an array of strings.") {
      (request, fields, reader, name) throws(JSONError) in
      request.texts = try fields.prompts(&reader, name)
      if let texts = request.texts, texts.prompts.contains(where: { !$0.isText }) {
        fields.note(name, "expected a string or an array of strings; token ids go into input_ids")
      }
    },
    Field("input_ids", schema: PromptList.tokenSchema, "The prompts as token ids, in place of `text`.") {
      (request, fields, reader, name) throws(JSONError) in
      request.tokens = try fields.prompts(&reader, name)
      if let tokens = request.tokens, tokens.prompts.contains(where: \.isText) {
        fields.note(name, "expected token ids or an array of such lists; strings go into text")
      }
    },
    Field(
      "sampling_params", schema: oneOrMore(SamplingFields.fields.schema),
      "How tokens are drawn and when to stop: for all prompts, or one per prompt."
    ) { (request, fields, reader, name) throws(JSONError) in
      let sampling = try fields.oneOrMore(&reader, name, of: "objects") { (fields, reader, name) throws(JSONError) in
        try SamplingFields(&fields, &reader, name)
      }
      request.sampling = sampling ?? []
    },
    Field("rid", schema: oneOrMore(["type": "string"]), "The requests' names, by which they can be aborted.") {
      (request, fields, reader, name) throws(JSONError) in request.rids = try fields.strings(&reader, name) ?? []
    },
    .flag("stream", to: \.stream, default: false, "Whether the answer is sent as events while it is made."),
    Field("return_logprob", schema: oneOrMore(["type": "boolean"]), "Whether log-probabilities are given.") {
      (request, fields, reader, name) throws(JSONError) in
      let values = try fields.oneOrMore(&reader, name, of: "booleans") { (fields, reader, name) throws(JSONError) in
        try fields.bool(&reader, name)
      }
      request.returnLogprob = values ?? []
    },
    Field(
      "logprob_start_len", schema: oneOrMore(["type": "integer"]),
      "The first prompt position whose log-probability is given; -1 gives those of the answer alone."
    ) { (request, fields, reader, name) throws(JSONError) in
      request.logprobStart = try fields.integers(&reader, name) ?? []
    },
    Field(
      "top_logprobs_num", schema: oneOrMore(["type": "integer"]),
      "How many of the likeliest tokens are given with each; in 0...1000."
    ) { (request, fields, reader, name) throws(JSONError) in
      request.topLogprobs = try fields.integers(&reader, name) ?? []
    },
    Field("token_ids_logprob", schema: PromptList.tokenSchema, "Tokens whose log-probabilities are always given.") {
      (request, fields, reader, name) throws(JSONError) in
      request.tokenIDs = try fields.tokenLists(&reader, name) ?? []
    },
    .flag(
      "return_text_in_logprobs", to: \.returnsText, default: false, "Whether log-probabilities name the tokens' texts."),
    Field("priority", schema: ["type": "integer", "default": 0], "Larger is more urgent, to the priority policy.") {
      (request, fields, reader, name) throws(JSONError) in request.priority = try fields.integer(&reader, name) ?? 0
    },
    Field(
      "cache_salt", "extra_key", schema: ["type": "string"],
      "Requests share cached prefixes only with those of the same salt."
    ) { (request, fields, reader, name) throws(JSONError) in
      request.cacheSalt = try fields.string(&reader, name) ?? ""
    },
    .integer(
      "max_thinking_tokens", to: \.thinkingBudget,
      "The most tokens of the chain of thought, as `thinking_budget` of `sampling_params`; -1 sets no limit."),
    .refused(
      "input_embeds", "image_data", "video_data", "audio_data",
      because: "the model served here reads text only; leave the field out"),
    .refused(
      "lora_path", "session_params", "custom_logit_processor", because: "is not available; leave the field out"),
    .refusedUnlessFalse("return_hidden_states", because: "hidden states are not available; leave the field out"),
  ])

  private static func oneOrMore(_ schema: JSONValue) -> JSONValue {
    ["anyOf": [schema, ["type": "array", "items": schema]]]
  }

  /// Reads and checks a body.
  init(_ body: ByteBuffer) throws(EngineError) {
    var request = GenerateRequest()
    try Self.fields.read(body, into: &request)
    let prompts: PromptList
    switch (request.texts, request.tokens) {
    case (let list?, nil), (nil, let list?): prompts = list
    case (nil, nil): throw EngineError(.invalidRequest, "text or input_ids is required.", parameter: "text")
    case (_?, _?):
      throw EngineError(.invalidRequest, "Give either text or input_ids, not both.", parameter: "input_ids")
    }
    request.prompts = prompts.prompts
    request.texts = nil
    request.tokens = nil
    request.isBatch = prompts.isList
    self = request
    try validate()
  }

  private init() {}

  private mutating func validate() throws(EngineError) {
    func check(_ name: String, _ count: Int) throws(EngineError) {
      if count > 1, count != prompts.count {
        throw EngineError(
          .invalidRequest, "\(name) has \(count) elements for \(prompts.count) prompts.", parameter: name)
      }
    }
    try check("sampling_params", sampling.count)
    try check("return_logprob", returnLogprob.count)
    try check("logprob_start_len", logprobStart.count)
    try check("top_logprobs_num", topLogprobs.count)
    try check("token_ids_logprob", tokenIDs.count)
    if !rids.isEmpty, rids.count != prompts.count {
      throw EngineError(.invalidRequest, "rid has \(rids.count) names for \(prompts.count) prompts.", parameter: "rid")
    }
    if Set(rids).count != rids.count {
      throw EngineError(.invalidRequest, "rid must not name two prompts alike.", parameter: "rid")
    }
    for rid in rids { try checkRequestName(rid) }
    for count in topLogprobs where !(0...1000).contains(count) {
      throw EngineError(
        .invalidRequest, "top_logprobs_num must be in 0...1000, got \(count).", parameter: "top_logprobs_num")
    }
    for start in logprobStart where start < -1 {
      throw EngineError(
        .invalidRequest, "logprob_start_len must be -1 (outputs only) or a prompt position, got \(start).",
        parameter: "logprob_start_len")
    }
    count = try sampling.first?.sampleCount(limit: 128) ?? 1
    if sampling.contains(where: { ($0.count ?? 1) != count }) {
      throw EngineError(.invalidRequest, "n must be the same for all prompts of a request.", parameter: "n")
    }
  }

  /// The log-probabilities that prompt `index` asks for.
  func logprobOptions(at index: Int) -> LogprobOptions? {
    guard element(returnLogprob, at: index) ?? false else { return nil }
    let start = element(logprobStart, at: index) ?? -1
    return LogprobOptions(
      topCount: element(topLogprobs, at: index) ?? 0, promptStart: start < 0 ? nil : start,
      tokenIDs: element(tokenIDs, at: index) ?? [])
  }

  /// The value for prompt `index` of a field that has one value for all or one per prompt.
  func element<Value>(_ values: [Value], at index: Int) -> Value? {
    values.count > 1 ? values[index] : values.first
  }
}

extension ApusCore.Request.Prompt {
  /// Whether the prompt is text rather than token ids.
  var isText: Bool { if case .text = self { true } else { false } }
}

extension SamplingFields {
  /// Reads `sampling_params`.
  fileprivate init?(
    _ fields: inout FieldReader, _ reader: inout JSONReader, _ name: String
  ) throws(JSONError) {
    var sampling = SamplingFields()
    let isObject = try fields.object(&reader, name) { (fields, reader, key) throws(JSONError) in
      if try !sampling.read(key, &fields, &reader) { try reader.skipValue() }
    }
    guard isObject else { return nil }
    self = sampling
  }
}

extension FieldReader {
  fileprivate mutating func integers(_ reader: inout JSONReader, _ name: String) throws(JSONError) -> [Int]? {
    try oneOrMore(&reader, name, of: "integers") { (fields, reader, name) throws(JSONError) in
      try fields.integer(&reader, name)
    }
  }

  /// Reads one list of token ids, or one list per prompt; a `null` list is an empty one.
  fileprivate mutating func tokenLists(
    _ reader: inout JSONReader, _ name: String
  ) throws(JSONError) -> [[TokenID]]? {
    guard try expect([.array], "an array of token ids", &reader, name) else { return nil }
    var single: [TokenID] = []
    var lists: [[TokenID]] = []
    var fields = self
    try reader.readArray { (reader) throws(JSONError) in
      switch try reader.peek() {
      case .array: lists.append(try fields.tokens(&reader, name) ?? [])
      case .null:
        try reader.skipValue()
        lists.append([])
      default:
        if let token = try fields.token(&reader, name) { single.append(token) }
      }
    }
    self = fields
    if !single.isEmpty, !lists.isEmpty {
      note(name, "token ids and lists cannot be mixed in one array")
      return nil
    }
    return lists.isEmpty ? [single] : lists
  }
}
