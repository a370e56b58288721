import ApusCore

/// The sampling fields of a request, under the names of both APIs; `nil` is what the client left out.
struct SamplingFields {
  var maxTokens: Int?
  /// The name under which the client gave `maxTokens`.
  var maxTokensName: String?
  var minTokens: Int?
  var temperature: Float?
  var topK: Int?
  var topP: Float?
  var minP: Float?
  var repetitionPenalty: Float?
  var frequencyPenalty: Float?
  var presencePenalty: Float?
  var logitBias: [TokenID: Float]?
  var seed: Int?
  var stop: [String]?
  var stopTokenIDs: [TokenID]?
  var stopRegex: [String]?
  var ignoreEOS: Bool?
  var skipSpecialTokens: Bool?
  var spacesBetweenSpecialTokens: Bool?
  var noStopTrim: Bool?
  var count: Int?
  /// -1 sets no limit.
  var thinkingBudget: Int?
  var jsonWhitespace: GrammarSpecification.Whitespace?
  var grammar: GrammarFields = .init()

  /// The members.
  static let fields = FieldTable<SamplingFields>([
    Field(
      "max_tokens", "max_new_tokens", "max_completion_tokens", schema: ["type": "integer", "minimum": 0],
      "The most tokens to generate."
    ) { (sampling, fields, reader, name) throws(JSONError) in
      // `max_completion_tokens` replaces `max_tokens` in OpenAI's API; where both are given the newer name wins.
      let value = try fields.integer(&reader, name)
      if let value, name != "max_tokens" || sampling.maxTokensName == nil {
        sampling.maxTokens = value
        sampling.maxTokensName = name
      }
    },
    .integer("min_tokens", "min_new_tokens", to: \.minTokens, "The answer cannot end before this many tokens."),
    .number("temperature", to: \.temperature, "Divides the logits; 0 takes the likeliest token."),
    .integer("top_k", to: \.topK, "Draws from this many of the likeliest tokens; -1 from all."),
    .number("top_p", to: \.topP, "Draws from the likeliest tokens with this much probability; in (0, 1]."),
    .number("min_p", to: \.minP, "Drops tokens less likely than this share of the likeliest; in [0, 1]."),
    .number(
      "repetition_penalty", to: \.repetitionPenalty, "Penalty on tokens in the prompt or the answer; in (0, 2]."),
    .number("frequency_penalty", to: \.frequencyPenalty, "Subtracted per occurrence in the answer; in [-2, 2]."),
    .number("presence_penalty", to: \.presencePenalty, "Subtracted once per token in the answer; in [-2, 2]."),
    Field(
      "logit_bias", schema: ["type": "object", "additionalProperties": ["type": "number"]],
      "Added to the logits of tokens, by their ids; in [-100, 100]."
    ) { (sampling, fields, reader, name) throws(JSONError) in
      var bias: [TokenID: Float] = [:]
      let isObject = try fields.object(&reader, name) { (fields, reader, key) throws(JSONError) in
        let value = try fields.float(&reader, key)
        guard let token = TokenID(key), token >= 0 else {
          fields.note(key, "the key is no token id")
          return
        }
        if let value { bias[token] = value }
      }
      if isObject { sampling.logitBias = bias }
    },
    .integer("seed", "sampling_seed", to: \.seed, "Seed of the draws."),
    .strings("stop", to: \.stop, "Texts that end the answer; at most 32."),
    Field(
      "stop_token_ids",
      schema: ["anyOf": [["type": "integer"], ["type": "array", "items": ["type": "integer"]]]],
      "Tokens that end the answer."
    ) { (sampling, fields, reader, name) throws(JSONError) in
      sampling.stopTokenIDs = try fields.oneOrMore(&reader, name, of: "token ids") {
        (fields, reader, name) throws(JSONError) in try fields.token(&reader, name)
      }
    },
    .strings("stop_regex", to: \.stopRegex, "Patterns that end the answer; at most 32 of up to 256 bytes."),
    .bool("ignore_eos", to: \.ignoreEOS, "Whether end-of-sequence tokens do not end the answer."),
    .bool("skip_special_tokens", to: \.skipSpecialTokens, "Whether special tokens are left out of the text."),
    .bool(
      "spaces_between_special_tokens", to: \.spacesBetweenSpecialTokens,
      "Whether special tokens are followed by the decoder's space."),
    .bool(
      "no_stop_trim", "include_stop_str_in_output", to: \.noStopTrim, "Whether what ended the answer stays in the text."
    ),
    .integer("n", to: \.count, "How many answers to give; in 1...128."),
    Field(
      "thinking_budget", "thinking_token_budget", "max_thinking_tokens", schema: ["type": "integer", "minimum": -1],
      "The most tokens of the chain of thought, whose end is forced then; -1 sets no limit."
    ) { (sampling, fields, reader, name) throws(JSONError) in
      let value = try fields.integer(&reader, name)
      sampling.setThinkingBudget(value, name, &fields)
    },
    Field(
      "custom_params",
      schema: ["type": "object", "properties": ["thinking_budget": ["type": "integer", "minimum": -1]]],
      "What clients of SGLang give its logit processors. `thinking_budget` is read, as the field of that name."
    ) { (sampling, fields, reader, name) throws(JSONError) in
      _ = try fields.object(&reader, name) { (fields, reader, key) throws(JSONError) in
        if key == "thinking_budget" {
          let value = try fields.integer(&reader, key)
          sampling.setThinkingBudget(value, "\(name).\(key)", &fields)
        } else {
          try reader.skipValue()
        }
      }
    },
    Field(
      "json_whitespace",
      schema: ["enum": .array(GrammarSpecification.Whitespace.allCases.map { .string($0.rawValue) })],
      "White space in JSON that a grammar describes: `fixed` (one space after each colon and comma), `compact` (none) or "
        + "`flexible` (wherever JSON permits it). By default as the server was started."
    ) { (sampling, fields, reader, name) throws(JSONError) in
      guard let text = try fields.string(&reader, name) else { return }
      sampling.jsonWhitespace = .init(rawValue: text)
      if sampling.jsonWhitespace == nil { fields.note(name, "must be fixed, compact or flexible") }
    },
    grammar("json_schema", "guided_json", schema: [:], "A JSON Schema that the text must follow, or its text."),
    grammar("regex", "guided_regex", schema: ["type": "string"], "A pattern that the text must match."),
    grammar("ebnf", "guided_grammar", schema: ["type": "string"], "A grammar that the text must follow."),
    grammar(
      "structural_tag", schema: [:], "A structural tag: free text with regions that must follow a schema each."),
    grammar(
      "guided_choice", schema: ["type": "array", "items": ["type": "string"]], "Texts of which the answer must be one."),
    Field(
      "structured_outputs", schema: GrammarFields.structuredOutputsSchema,
      "What the text must look like, in one of vLLM's forms."
    ) { (sampling, fields, reader, name) throws(JSONError) in
      try sampling.grammar.readStructuredOutputs(name, &fields, &reader)
    },
    Field("bad_words", schema: ["type": "array", "maxItems": 0], "Not available: words cannot be forbidden.") {
      (_, fields, reader, name) throws(JSONError) in
      let words = try fields.strings(&reader, name) ?? []
      if !words.isEmpty {
        fields.note(name, "words cannot be forbidden; use logit_bias or a grammar", code: .unsupported)
      }
    },
    .refused("allowed_token_ids", because: "is not available; use guided_choice, regex or ebnf"),
    .refused("logits_processors", because: "code of clients is not run; leave the field out"),
    .refused("watermark", because: "texts are not watermarked; leave the field out"),
    Field(
      "beam_width", "use_beam_search", schema: ["enum": [false, 0, 1]],
      "Not available: beam search is refused where it would be used."
    ) { (_, fields, reader, name) throws(JSONError) in
      let value = try fields.value(&reader, name)
      if let value, value != .bool(false), (value.doubleValue ?? 2) > 1 {
        fields.note(name, "beam search is not available; leave the field out", code: .unsupported)
      }
    },
  ])

  /// A member that constrains the text.
  private static func grammar(_ names: String..., schema: JSONValue, _ summary: String) -> Field<SamplingFields> {
    var field = Field<SamplingFields>(schema: schema, summary) { (sampling, fields, reader, name) throws(JSONError) in
      try sampling.grammar.read(name, &fields, &reader)
    }
    field.names = names
    return field
  }

  /// Reads a member if it is a sampling field.
  ///
  /// - Returns: whether it was one, and its value has been read.
  mutating func read(
    _ key: String, _ fields: inout FieldReader, _ reader: inout JSONReader
  ) throws(JSONError) -> Bool {
    try Self.fields.read(key, into: &self, &fields, &reader)
  }

  /// Puts what the client gave over what `parameters` holds.
  func apply(to parameters: inout SamplingParameters) {
    if let maxTokens { parameters.maxNewTokens = maxTokens }
    if let minTokens { parameters.minNewTokens = minTokens }
    if let temperature { parameters.temperature = temperature }
    // 0 is what some clients send for "all".
    if let topK { parameters.topK = topK == 0 ? -1 : topK }
    if let topP { parameters.topP = topP }
    if let minP { parameters.minP = minP }
    if let repetitionPenalty { parameters.repetitionPenalty = repetitionPenalty }
    if let frequencyPenalty { parameters.frequencyPenalty = frequencyPenalty }
    if let presencePenalty { parameters.presencePenalty = presencePenalty }
    if let logitBias { parameters.logitBias = logitBias }
    if let seed { parameters.seed = UInt64(bitPattern: Int64(seed)) }
    if let stop { parameters.stop = stop }
    if let stopTokenIDs { parameters.stopTokenIDs = stopTokenIDs }
    if let stopRegex { parameters.stopRegex = stopRegex }
    if let ignoreEOS { parameters.ignoreEOS = ignoreEOS }
    if let skipSpecialTokens { parameters.skipSpecialTokens = skipSpecialTokens }
    if let spacesBetweenSpecialTokens { parameters.spacesBetweenSpecialTokens = spacesBetweenSpecialTokens }
    if let noStopTrim { parameters.noStopTrim = noStopTrim }
    if let thinkingBudget { parameters.thinkingBudget = thinkingBudget < 0 ? nil : thinkingBudget }
    if let jsonWhitespace { parameters.jsonWhitespace = jsonWhitespace }
    if let grammar = grammar.specification { parameters.grammar = grammar }
  }

  private mutating func setThinkingBudget(_ value: Int?, _ name: String, _ fields: inout FieldReader) {
    guard let value else { return }
    if value < -1 { return fields.note(name, "must be at least -1 (no limit), got \(value)") }
    thinkingBudget = value
  }

  /// The parameters of a request to the OpenAI API: the model's recommended values, then the client's.
  ///
  /// - Parameter defaultMaxTokens: the limit where the client gave none; `nil` is the rest of the context.
  func parameters(for model: ModelInformation, defaultMaxTokens: Int?) throws(EngineError) -> SamplingParameters {
    var parameters = SamplingParameters()
    model.samplingDefaults.apply(to: &parameters)
    parameters.maxNewTokens = defaultMaxTokens
    apply(to: &parameters)
    do {
      try parameters.validate(vocabularySize: model.vocabularySize)
    } catch {
      throw inOpenAITerms(error)
    }
    return parameters
  }

  /// An error with the native API's field names replaced by those the client used.
  func inOpenAITerms(_ error: EngineError) -> EngineError {
    var error = error
    let names = [("max_new_tokens", maxTokensName ?? "max_tokens"), ("min_new_tokens", "min_tokens")]
    for (native, open) in names {
      if error.parameter == native { error.parameter = open }
      error.message = error.message.replacing(native, with: open)
    }
    return error
  }

  /// The number of samples asked for; one if the client was silent.
  ///
  /// - Throws: `invalidRequest` unless it is in 1...`limit`.
  func sampleCount(limit: Int) throws(EngineError) -> Int {
    let count = count ?? 1
    if count < 1 || count > limit {
      throw EngineError(.invalidRequest, "n must be in 1...\(limit), got \(count).", parameter: "n")
    }
    return count
  }
}

extension FieldReader {
  /// Skips a value; anything but `null` is noted as something this server cannot do.
  mutating func refuse(_ reader: inout JSONReader, _ name: String, _ sentence: String) throws(JSONError) {
    if try reader.peek() != .null { note(name, sentence, code: .unsupported) }
    try reader.skipValue()
  }

  /// Skips a value; anything but `false` and `null` is noted as something this server cannot do.
  mutating func refuseUnlessFalse(
    _ reader: inout JSONReader, _ name: String, _ sentence: String
  ) throws(JSONError) {
    let value = try reader.readValue()
    if value != .bool(false), value != .null { note(name, sentence, code: .unsupported) }
  }
}

extension SamplingParameters {
  /// The parameters of sample `index` of a request for several.
  ///
  /// Sample 0 keeps the seed, so that `n = 1` and the first of several agree. The others get a seed that depends on the
  /// request's seed and their index alone, mixed by the finaliser of splitmix64 so that neighbours share no draws.
  func sample(_ index: Int) -> SamplingParameters {
    guard index > 0, let seed else { return self }
    var parameters = self
    var mixed = seed &+ UInt64(index) &* 0x9E37_79B9_7F4A_7C15
    mixed = (mixed ^ (mixed >> 30)) &* 0xBF58_476D_1CE4_E5B9
    mixed = (mixed ^ (mixed >> 27)) &* 0x94D0_49BB_1331_11EB
    parameters.seed = mixed ^ (mixed >> 31)
    return parameters
  }
}
