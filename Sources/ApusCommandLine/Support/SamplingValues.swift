package import ApusCore

/// Sampling values of which some are left to the model: what a command line, a chat's /set or a batch's line says.
package struct SamplingValues: Sendable, Equatable {
  package var maxNewTokens: Int?
  package var temperature: Float?
  package var topP: Float?
  package var topK: Int?
  package var minP: Float?
  package var repetitionPenalty: Float?
  package var frequencyPenalty: Float?
  package var presencePenalty: Float?
  package var seed: UInt64?
  package var stop: [String]?

  /// The values given; the rest is left to the model.
  package init(
    maxNewTokens: Int? = nil, temperature: Float? = nil, topP: Float? = nil, topK: Int? = nil, minP: Float? = nil,
    repetitionPenalty: Float? = nil, frequencyPenalty: Float? = nil, presencePenalty: Float? = nil,
    seed: UInt64? = nil, stop: [String]? = nil
  ) {
    self.maxNewTokens = maxNewTokens
    self.temperature = temperature
    self.topP = topP
    self.topK = topK
    self.minP = minP
    self.repetitionPenalty = repetitionPenalty
    self.frequencyPenalty = frequencyPenalty
    self.presencePenalty = presencePenalty
    self.seed = seed
    self.stop = stop
  }

  /// Parameters with the values given put over `base`.
  package func applied(to base: SamplingParameters) -> SamplingParameters {
    var parameters = base
    if let maxNewTokens { parameters.maxNewTokens = maxNewTokens }
    if let temperature { parameters.temperature = temperature }
    if let topP { parameters.topP = topP }
    if let topK { parameters.topK = topK == 0 ? -1 : topK }
    if let minP { parameters.minP = minP }
    if let repetitionPenalty { parameters.repetitionPenalty = repetitionPenalty }
    if let frequencyPenalty { parameters.frequencyPenalty = frequencyPenalty }
    if let presencePenalty { parameters.presencePenalty = presencePenalty }
    if let seed { parameters.seed = seed }
    if let stop { parameters.stop = stop }
    return parameters
  }

  /// The names that `/set` understands, in the order in which help lists them.
  package static let names = [
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "seed", "stop",
  ]

  /// Sets a value by its name; `default` leaves it to the model again.
  /// - Throws: `invalidRequest` for an unknown name or a text that is no such value.
  package mutating func set(_ name: String, to text: String) throws(EngineError) {
    let isDefault = text == "default" || text == "auto"
    func parsed<Value: LosslessStringConvertible>(_ kind: Value.Type, _ what: String) throws(EngineError) -> Value? {
      if isDefault { return nil }
      guard let value = Value(text) else {
        throw EngineError(.invalidRequest, "\(name) must be \(what) or 'default', got '\(text)'.", parameter: name)
      }
      return value
    }
    var changed = self
    switch name.replacing("-", with: "_") {
    case "max_tokens", "max_new_tokens": changed.maxNewTokens = try parsed(Int.self, "a whole number")
    case "temperature", "temp": changed.temperature = try parsed(Float.self, "a number")
    case "top_p": changed.topP = try parsed(Float.self, "a number")
    case "top_k": changed.topK = try parsed(Int.self, "a whole number")
    case "min_p": changed.minP = try parsed(Float.self, "a number")
    case "repetition_penalty": changed.repetitionPenalty = try parsed(Float.self, "a number")
    case "frequency_penalty": changed.frequencyPenalty = try parsed(Float.self, "a number")
    case "presence_penalty": changed.presencePenalty = try parsed(Float.self, "a number")
    case "seed": changed.seed = try parsed(UInt64.self, "a whole number")
    case "stop": changed.stop = isDefault ? nil : [text]
    default:
      throw EngineError(
        .invalidRequest, "Unknown setting '\(name)'; the settings are \(Self.names.joined(separator: ", ")).")
    }
    try changed.applied(to: SamplingParameters()).validate(vocabularySize: Int(Int32.max))
    self = changed
  }

  /// The values given, as members of an OpenAI request. Values beyond OpenAI's are sent under the names that vLLM and
  /// SGLang share.
  package var openAIMembers: [(String, JSONValue)] {
    var members: [(String, JSONValue)] = []
    if let maxNewTokens { members.append(("max_tokens", .int(Int64(maxNewTokens)))) }
    func number(_ name: String, _ value: Float?) { if let value { members.append((name, decimal(value))) } }
    number("temperature", temperature)
    number("top_p", topP)
    if let topK { members.append(("top_k", .int(Int64(topK == 0 ? -1 : topK)))) }
    number("min_p", minP)
    number("repetition_penalty", repetitionPenalty)
    number("frequency_penalty", frequencyPenalty)
    number("presence_penalty", presencePenalty)
    if let seed { members.append(("seed", .int(Int64(bitPattern: seed)))) }
    if let stop { members.append(("stop", .array(stop.map { .string($0) }))) }
    return members
  }

  /// What is set, for people.
  package var description: String {
    var parts: [String] = []
    for (name, value) in openAIMembers { parts.append("\(name) \(value.compactText)") }
    return parts.isEmpty ? "the model's defaults" : parts.joined(separator: ", ")
  }
}

/// A float as the decimal that a person would write for it: 0.7 and not 0.699999988079071.
func decimal(_ value: Float) -> JSONValue { Double("\(value)").map { .double($0) } ?? .double(Double(value)) }
