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
  var grammar: GrammarFields = .init()

  /// Reads a member if it is a sampling field.
  ///
  /// - Returns: whether it was one, and its value has been read.
  mutating func read(
    _ key: String, _ fields: inout FieldReader, _ reader: inout JSONReader
  ) throws(JSONError) -> Bool {
    switch key {
    case "max_tokens", "max_new_tokens", "max_completion_tokens":
      // `max_completion_tokens` replaces `max_tokens` in OpenAI's API; where both are given the newer name wins.
      let value = try fields.integer(&reader, key)
      if let value, key != "max_tokens" || maxTokensName == nil {
        maxTokens = value
        maxTokensName = key
      }
    case "min_tokens", "min_new_tokens": minTokens = try fields.integer(&reader, key)
    case "temperature": temperature = try fields.float(&reader, key)
    case "top_k": topK = try fields.integer(&reader, key)
    case "top_p": topP = try fields.float(&reader, key)
    case "min_p": minP = try fields.float(&reader, key)
    case "repetition_penalty": repetitionPenalty = try fields.float(&reader, key)
    case "frequency_penalty": frequencyPenalty = try fields.float(&reader, key)
    case "presence_penalty": presencePenalty = try fields.float(&reader, key)
    case "logit_bias":
      var bias: [TokenID: Float] = [:]
      let isObject = try fields.object(&reader, key) { (fields, reader, key) throws(JSONError) in
        let value = try fields.float(&reader, key)
        guard let token = TokenID(key), token >= 0 else {
          fields.note(key, "the key is no token id")
          return
        }
        if let value { bias[token] = value }
      }
      if isObject { logitBias = bias }
    case "seed", "sampling_seed": seed = try fields.integer(&reader, key)
    case "stop": stop = try fields.strings(&reader, key)
    case "stop_token_ids":
      stopTokenIDs = try fields.oneOrMore(&reader, key, of: "token ids") { (fields, reader, name) throws(JSONError) in
        try fields.token(&reader, name)
      }
    case "stop_regex": stopRegex = try fields.strings(&reader, key)
    case "ignore_eos": ignoreEOS = try fields.bool(&reader, key)
    case "skip_special_tokens": skipSpecialTokens = try fields.bool(&reader, key)
    case "spaces_between_special_tokens": spacesBetweenSpecialTokens = try fields.bool(&reader, key)
    case "no_stop_trim": noStopTrim = try fields.bool(&reader, key)
    case "n": count = try fields.integer(&reader, key)
    case "json_schema", "regex", "ebnf", "structural_tag", "guided_json", "guided_regex", "guided_grammar",
      "guided_choice":
      try grammar.read(key, &fields, &reader)
    case "beam_width", "use_beam_search":
      let value = try fields.value(&reader, key)
      if let value, value != .bool(false), (value.doubleValue ?? 2) > 1 {
        fields.note(key, "beam search is not available; leave the field out", code: .unsupported)
      }
    default: return false
    }
    return true
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
    if let grammar = grammar.specification { parameters.grammar = grammar }
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

  /// Skips a value; `true` is noted as something this server cannot do.
  mutating func refuseIfTrue(_ reader: inout JSONReader, _ name: String, _ sentence: String) throws(JSONError) {
    if try reader.readValue() == .bool(true) { note(name, sentence, code: .unsupported) }
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
