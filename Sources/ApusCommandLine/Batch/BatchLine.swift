package import ApusCore

/// One line of a batch's input file.
package struct BatchLine: Sendable, Equatable {
  /// What the line gives the model.
  package enum Input: Sendable, Equatable {
    /// Text, tokenized as it is.
    case prompt(String)
    /// A conversation for the chat template; `tools` as in the API.
    case messages(JSONValue, tools: JSONValue?, variables: [String: JSONValue])
    /// Token ids.
    case tokens([TokenID])
  }

  /// The line's name, as the client wrote it, or the line's number.
  package var id: JSONValue
  /// What the line gives the model.
  package var input: Input
  /// How to sample, with the defaults given filled in.
  package var sampling: SamplingParameters
  /// Anything that should come back with the answer.
  package var metadata: JSONValue?

  /// Fields that have a meaning.
  static let fields = [
    "id", "custom_id", "prompt", "text", "messages", "input_ids", "tools", "chat_template_kwargs", "metadata",
    "sampling_params", "max_new_tokens", "max_tokens", "max_completion_tokens", "min_new_tokens", "min_tokens",
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "stop",
    "stop_token_ids", "stop_regex", "ignore_eos", "seed", "sampling_seed", "skip_special_tokens",
    "spaces_between_special_tokens", "no_stop_trim", "logit_bias",
  ]

  /// The name of a line, even of one that is wrong otherwise.
  /// - Parameter number: the line's number, counting from 1.
  package static func id(of value: JSONValue, number: Int) -> JSONValue {
    value["id"] ?? value["custom_id"] ?? .int(Int64(number))
  }

  /// Reads a line.
  /// - Parameters:
  ///   - value: the line's JSON.
  ///   - number: the line's number, counting from 1; it names lines without an id.
  ///   - defaults: sampling for what the line leaves open.
  ///   - ignoresUnknownFields: whether fields without a meaning are skipped instead of refused.
  /// - Throws: `invalidRequest` with the field at fault.
  package init(
    _ value: JSONValue, number: Int, defaults: SamplingParameters, ignoresUnknownFields: Bool = false
  ) throws(EngineError) {
    guard let object = value.objectValue else {
      throw EngineError(.invalidRequest, "A line must be a JSON object, got \(value.kindName).")
    }
    id = Self.id(of: value, number: number)
    switch id {
    case .string, .int: break
    default:
      throw EngineError(.invalidRequest, "id must be a string or an integer, got \(id.kindName).", parameter: "id")
    }
    if !ignoresUnknownFields {
      for key in object.keys where !Self.fields.contains(key) {
        let nearest = Self.fields.min { editDistance($0, key) < editDistance($1, key) }!
        let hint = editDistance(nearest, key) <= 2 ? "did you mean '\(nearest)'" : "put it under 'metadata' to keep it"
        throw EngineError(
          .invalidRequest, "Unknown field '\(key)'; \(hint), or pass --ignore-unknown-fields.", parameter: key)
      }
    }
    let inputs = ["prompt", "text", "messages", "input_ids"].filter { object[$0] != nil }
    guard inputs.count == 1, let input = object[inputs[0]] else {
      throw EngineError(
        .invalidRequest,
        inputs.isEmpty
          ? "A line needs one of 'prompt', 'messages' and 'input_ids'."
          : "A line takes one of \(inputs.map { "'\($0)'" }.joined(separator: " and ")), not both.",
        parameter: inputs.last ?? "prompt")
    }
    switch inputs[0] {
    case "messages":
      guard let messages = input.arrayValue, !messages.isEmpty else {
        throw EngineError(
          .invalidRequest, "messages must be an array with at least one message.", parameter: "messages")
      }
      var variables: [String: JSONValue] = [:]
      if let given = object["chat_template_kwargs"] {
        guard let given = given.objectValue else {
          throw EngineError(
            .invalidRequest, "chat_template_kwargs must be an object, got \(given.kindName).",
            parameter: "chat_template_kwargs")
        }
        for (name, value) in given { variables[name] = value }
      }
      self.input = .messages(input, tools: object["tools"], variables: variables)
    case "input_ids":
      let ids = (input.arrayValue ?? []).compactMap { $0.intValue.flatMap { TokenID(exactly: $0) } }
      guard let count = input.arrayValue?.count, count > 0, ids.count == count else {
        throw EngineError(.invalidRequest, "input_ids must be an array of token ids.", parameter: "input_ids")
      }
      self.input = .tokens(ids)
    default:
      guard let text = input.stringValue else {
        throw EngineError(
          .invalidRequest, "\(inputs[0]) must be a string, got \(input.kindName).", parameter: inputs[0])
      }
      self.input = .prompt(text)
    }
    metadata = object["metadata"]
    sampling = defaults
    try Self.read(object, into: &sampling)
    if let nested = object["sampling_params"] {
      guard let nested = nested.objectValue else {
        throw EngineError(
          .invalidRequest, "sampling_params must be an object, got \(nested.kindName).", parameter: "sampling_params")
      }
      if !ignoresUnknownFields, let key = nested.keys.first(where: { !Self.fields.contains($0) }) {
        throw EngineError(.invalidRequest, "Unknown field '\(key)' in sampling_params.", parameter: key)
      }
      try Self.read(nested, into: &sampling)
    }
  }

  private static func read(_ object: JSONObject, into parameters: inout SamplingParameters) throws(EngineError) {
    func refuse(_ name: String, _ what: String, _ value: JSONValue) -> EngineError {
      EngineError(.invalidRequest, "\(name) must be \(what), got \(value.kindName).", parameter: name)
    }
    func integer(_ names: String...) throws(EngineError) -> Int? {
      for name in names {
        guard let value = object[name], !value.isNull else { continue }
        guard let number = value.intValue else { throw refuse(name, "a whole number", value) }
        return number
      }
      return nil
    }
    func number(_ name: String) throws(EngineError) -> Float? {
      guard let value = object[name], !value.isNull else { return nil }
      guard let number = value.doubleValue else { throw refuse(name, "a number", value) }
      return Float(number)
    }
    func flag(_ name: String) throws(EngineError) -> Bool? {
      guard let value = object[name], !value.isNull else { return nil }
      guard let flag = value.boolValue else { throw refuse(name, "true or false", value) }
      return flag
    }
    func texts(_ name: String) throws(EngineError) -> [String]? {
      guard let value = object[name], !value.isNull else { return nil }
      if let text = value.stringValue { return [text] }
      let texts = (value.arrayValue ?? []).compactMap(\.stringValue)
      guard let count = value.arrayValue?.count, texts.count == count else {
        throw refuse(name, "a string or an array of strings", value)
      }
      return texts
    }
    if let value = try integer("max_new_tokens", "max_completion_tokens", "max_tokens") {
      parameters.maxNewTokens = value
    }
    if let value = try integer("min_new_tokens", "min_tokens") { parameters.minNewTokens = value }
    if let value = try number("temperature") { parameters.temperature = value }
    if let value = try number("top_p") { parameters.topP = value }
    if let value = try integer("top_k") { parameters.topK = value == 0 ? -1 : value }
    if let value = try number("min_p") { parameters.minP = value }
    if let value = try number("repetition_penalty") { parameters.repetitionPenalty = value }
    if let value = try number("frequency_penalty") { parameters.frequencyPenalty = value }
    if let value = try number("presence_penalty") { parameters.presencePenalty = value }
    if let value = try integer("seed", "sampling_seed") { parameters.seed = UInt64(bitPattern: Int64(value)) }
    if let value = try texts("stop") { parameters.stop = value }
    if let value = try texts("stop_regex") { parameters.stopRegex = value }
    if let value = try flag("ignore_eos") { parameters.ignoreEOS = value }
    if let value = try flag("skip_special_tokens") { parameters.skipSpecialTokens = value }
    if let value = try flag("spaces_between_special_tokens") { parameters.spacesBetweenSpecialTokens = value }
    if let value = try flag("no_stop_trim") { parameters.noStopTrim = value }
    if let value = object["stop_token_ids"], !value.isNull {
      let ids = (value.arrayValue ?? []).compactMap { $0.intValue.flatMap { TokenID(exactly: $0) } }
      guard let count = value.arrayValue?.count, ids.count == count else {
        throw refuse("stop_token_ids", "an array of token ids", value)
      }
      parameters.stopTokenIDs = ids
    }
    if let value = object["logit_bias"], !value.isNull {
      guard let biases = value.objectValue else { throw refuse("logit_bias", "an object", value) }
      parameters.logitBias = [:]
      for (token, bias) in biases {
        guard let token = TokenID(token), let bias = bias.doubleValue else {
          throw EngineError(
            .invalidRequest, "logit_bias must map token ids to numbers; '\(token)' does not.", parameter: "logit_bias")
        }
        parameters.logitBias[token] = Float(bias)
      }
    }
  }
}

/// One line of a batch's output file.
package enum BatchAnswer {
  /// The line for a generation that ended.
  package static func line(id: JSONValue, result: GenerationResult, metadata: JSONValue?) -> JSONValue {
    var object = JSONObject([("id", id), ("text", .string(result.text))])
    switch result.finishReason {
    case .stop(let match):
      object["finish_reason"] = "stop"
      switch match {
      case .token(let token): object["matched"] = .int(Int64(token))
      case .text(let text): object["matched"] = .string(text)
      case nil: break
      }
    case .length: object["finish_reason"] = "length"
    case .abort(let reason): object["finish_reason"] = .string("abort: \(reason)")
    }
    object["output_ids"] = .array(result.tokens.map { .int(Int64($0)) })
    object["usage"] = .object(
      JSONObject([
        ("prompt_tokens", .int(Int64(result.usage.promptTokens))),
        ("completion_tokens", .int(Int64(result.usage.completionTokens))),
        ("cached_tokens", .int(Int64(result.usage.cachedTokens))),
      ]))
    if let metadata { object["metadata"] = metadata }
    return .object(object)
  }

  /// The line for a failure.
  package static func line(id: JSONValue, error: EngineError, metadata: JSONValue?) -> JSONValue {
    var details = JSONObject([("code", .string(error.code.description)), ("message", .string(error.message))])
    if let parameter = error.parameter { details["param"] = .string(parameter) }
    var object = JSONObject([("id", id), ("error", .object(details))])
    if let metadata { object["metadata"] = metadata }
    return .object(object)
  }
}
