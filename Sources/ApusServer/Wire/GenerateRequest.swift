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
  /// Samples per prompt.
  var count = 1

  /// Reads and checks a body.
  init(_ body: ByteBuffer) throws(EngineError) {
    var request = GenerateRequest()
    var texts: PromptList?
    var tokens: PromptList?
    try readBody(body) { (fields, reader, key) throws(JSONError) in
      switch key {
      case "text", "prompt":
        texts = try fields.prompts(&reader, key)
        if let texts, texts.prompts.contains(where: { !$0.isText }) {
          fields.note(key, "expected a string or an array of strings; token ids go into input_ids")
        }
      case "input_ids":
        tokens = try fields.prompts(&reader, key)
        if let tokens, tokens.prompts.contains(where: \.isText) {
          fields.note(key, "expected token ids or an array of such lists; strings go into text")
        }
      case "sampling_params":
        let sampling = try fields.oneOrMore(&reader, key, of: "objects") { (fields, reader, name) throws(JSONError) in
          try SamplingFields(&fields, &reader, name)
        }
        request.sampling = sampling ?? []
      case "rid": request.rids = try fields.strings(&reader, key) ?? []
      case "stream": request.stream = try fields.bool(&reader, key) ?? false
      case "return_logprob":
        let values = try fields.oneOrMore(&reader, key, of: "booleans") { (fields, reader, name) throws(JSONError) in
          try fields.bool(&reader, name)
        }
        request.returnLogprob = values ?? []
      case "logprob_start_len": request.logprobStart = try fields.integers(&reader, key) ?? []
      case "top_logprobs_num": request.topLogprobs = try fields.integers(&reader, key) ?? []
      case "token_ids_logprob": request.tokenIDs = try fields.tokenLists(&reader, key) ?? []
      case "return_text_in_logprobs": request.returnsText = try fields.bool(&reader, key) ?? false
      case "priority": request.priority = try fields.integer(&reader, key) ?? 0
      case "cache_salt", "extra_key": request.cacheSalt = try fields.string(&reader, key) ?? ""
      case "input_embeds", "image_data", "video_data", "audio_data":
        try fields.refuse(&reader, key, "the model served here reads text only; leave the field out")
      case "lora_path", "session_params", "custom_logit_processor":
        try fields.refuse(&reader, key, "is not available; leave the field out")
      case "return_hidden_states":
        try fields.refuseIfTrue(&reader, key, "hidden states are not available; leave the field out")
      default: try reader.skipValue()
      }
    }
    let prompts: PromptList
    switch (texts, tokens) {
    case (let list?, nil), (nil, let list?): prompts = list
    case (nil, nil): throw EngineError(.invalidRequest, "text or input_ids is required.", parameter: "text")
    case (_?, _?):
      throw EngineError(.invalidRequest, "Give either text or input_ids, not both.", parameter: "input_ids")
    }
    request.prompts = prompts.prompts
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
