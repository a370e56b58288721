/// How tokens are drawn and when a generation stops.
///
/// One flat value with the defaults of the native API. Names and meanings follow SGLang's sampling parameters, which
/// follow OpenAI's. Nothing is clamped: `validate` refuses an impossible value with a sentence.
public struct SamplingParameters: Sendable, Equatable {
  /// The most tokens to generate; `nil` generates until the context is full.
  public var maxNewTokens: Int? = 128
  /// End-of-sequence and stop tokens cannot be drawn before this many tokens.
  public var minNewTokens = 0
  /// Divides the logits; below 1e-6 the most likely token is taken (greedy).
  public var temperature: Float = 1
  /// Only this many most likely tokens are kept; -1 keeps all.
  public var topK = -1
  /// The smallest set of most likely tokens whose probabilities add up to this is kept; in (0, 1].
  public var topP: Float = 1
  /// Tokens less likely than this share of the most likely one are dropped; in [0, 1].
  public var minP: Float = 0
  /// Divides positive and multiplies negative logits of tokens seen in prompt or output; in (0, 2].
  public var repetitionPenalty: Float = 1
  /// Subtracted once per occurrence in the output; in [-2, 2].
  public var frequencyPenalty: Float = 0
  /// Subtracted if the token occurs in the output; in [-2, 2].
  public var presencePenalty: Float = 0
  /// Added to the logits of the tokens named.
  public var logitBias: [TokenID: Float] = [:]
  /// Seed of the draws. A draw depends on the seed and the token's position alone. `nil` draws a seed at submission.
  public var seed: UInt64?
  /// Texts that end the generation when they appear.
  public var stop: [String] = []
  /// Tokens that end the generation, beside the model's end-of-sequence tokens.
  public var stopTokenIDs: [TokenID] = []
  /// Regular expressions that end the generation when they match the output.
  public var stopRegex: [String] = []
  /// What the text must look like. Where it asks for more tokens or fewer than `minNewTokens`, it wins; after its end (with
  /// `ignoreEOS`) the text is free.
  public var grammar: GrammarSpecification?
  /// White space in JSON that a grammar describes; `nil` takes the engine's default.
  public var jsonWhitespace: GrammarSpecification.Whitespace?
  /// The most tokens of the chain of thought; its end is forced when they are used up. `nil` sets no limit.
  public var thinkingBudget: Int?
  /// How the chain of thought is marked, for `thinkingBudget`.
  public var thinkingMarks = ThinkingMarks()
  /// End-of-sequence tokens do not end the generation.
  public var ignoreEOS = false
  /// Special tokens are left out of the text.
  public var skipSpecialTokens = true
  /// Special tokens are followed by a space where the tokenizer's decoder would put one.
  public var spacesBetweenSpecialTokens = true
  /// The matched stop text or token stays in the text.
  public var noStopTrim = false

  /// Makes the default parameters.
  public init() {}

  /// The most likely token at every step.
  public static let greedy: SamplingParameters = {
    var parameters = SamplingParameters()
    parameters.temperature = 0
    return parameters
  }()

  /// Whether the most likely token is always taken.
  public var isGreedy: Bool { temperature < 1e-6 || topK == 1 }

  /// Refuses impossible values.
  ///
  /// - Parameter vocabularySize: the number of rows of the model's output; token ids must lie below it.
  /// - Throws: `EngineError` with code `invalidRequest` and the field's name in `parameter`.
  public func validate(vocabularySize: Int) throws(EngineError) {
    func refuse(_ field: String, _ sentence: String) -> EngineError {
      EngineError(.invalidRequest, "\(field) \(sentence).", parameter: field)
    }
    if let maxNewTokens, maxNewTokens < 0 {
      throw refuse("max_new_tokens", "must be at least 0, got \(maxNewTokens)")
    }
    if minNewTokens < 0 { throw refuse("min_new_tokens", "must be at least 0, got \(minNewTokens)") }
    if let maxNewTokens, minNewTokens > maxNewTokens {
      throw refuse("min_new_tokens", "must not exceed max_new_tokens (\(maxNewTokens)), got \(minNewTokens)")
    }
    if !(temperature >= 0 && temperature.isFinite) {
      throw refuse("temperature", "must be a finite number of at least 0, got \(temperature)")
    }
    if !(topK == -1 || topK >= 1) { throw refuse("top_k", "must be -1 (all) or at least 1, got \(topK)") }
    if !(topP > 0 && topP <= 1) { throw refuse("top_p", "must be in (0, 1], got \(topP)") }
    if !(minP >= 0 && minP <= 1) { throw refuse("min_p", "must be in [0, 1], got \(minP)") }
    if !(repetitionPenalty > 0 && repetitionPenalty <= 2) {
      throw refuse("repetition_penalty", "must be in (0, 2], got \(repetitionPenalty)")
    }
    if !(frequencyPenalty >= -2 && frequencyPenalty <= 2) {
      throw refuse("frequency_penalty", "must be in [-2, 2], got \(frequencyPenalty)")
    }
    if !(presencePenalty >= -2 && presencePenalty <= 2) {
      throw refuse("presence_penalty", "must be in [-2, 2], got \(presencePenalty)")
    }
    for (token, bias) in logitBias {
      if token < 0 || Int(token) >= vocabularySize {
        throw refuse("logit_bias", "names token \(token), but the vocabulary has \(vocabularySize) entries")
      }
      if !(bias >= -100 && bias <= 100) { throw refuse("logit_bias", "must be in [-100, 100], got \(bias)") }
    }
    for token in stopTokenIDs where token < 0 || Int(token) >= vocabularySize {
      throw refuse("stop_token_ids", "names token \(token), but the vocabulary has \(vocabularySize) entries")
    }
    if let thinkingBudget, thinkingBudget < 0 {
      throw refuse("thinking_budget", "must be at least 0, got \(thinkingBudget)")
    }
    if stop.count > 32 { throw refuse("stop", "may hold at most 32 strings, got \(stop.count)") }
    if stop.contains("") { throw refuse("stop", "must not hold an empty string") }
    if stopRegex.count > 32 { throw refuse("stop_regex", "may hold at most 32 patterns, got \(stopRegex.count)") }
    if stopRegex.contains(where: { $0.utf8.count > 256 || $0.isEmpty }) {
      throw refuse("stop_regex", "patterns must have 1 to 256 bytes")
    }
  }
}
