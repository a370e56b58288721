/// What a client asked for: immutable once submitted.
public struct Request: Sendable {
  /// The input of a generation.
  public enum Prompt: Sendable, Equatable {
    /// Text, tokenized by the service with the tokenizer's own special tokens.
    case text(String)
    /// Token ids, taken as they are.
    case tokens([TokenID])
  }

  /// The request's name. Must be unique among the requests in flight.
  public var id: RequestID
  /// The input.
  public var prompt: Prompt
  /// How tokens are drawn and when to stop.
  public var sampling: SamplingParameters
  /// Which log-probabilities to return; `nil` returns none and costs nothing.
  public var logprobs: LogprobOptions?
  /// Larger is more urgent. Used by the priority policy alone.
  public var priority: Int
  /// Separates prefix caches: only requests with an equal salt share a prefix.
  public var cacheSalt: String

  /// Makes a request.
  public init(
    id: RequestID = .unique(), prompt: Prompt, sampling: SamplingParameters = .init(),
    logprobs: LogprobOptions? = nil, priority: Int = 0, cacheSalt: String = ""
  ) {
    self.id = id
    self.prompt = prompt
    self.sampling = sampling
    self.logprobs = logprobs
    self.priority = priority
    self.cacheSalt = cacheSalt
  }
}

/// Which log-probabilities a request wants.
public struct LogprobOptions: Sendable, Equatable {
  /// How many of the most likely tokens to report beside the chosen one.
  public var topCount: Int
  /// The first prompt position to report; `nil` reports outputs only. Position 0 has no log-probability, since nothing
  /// precedes it.
  public var promptStart: Int?
  /// Tokens whose log-probabilities are always reported.
  public var tokenIDs: [TokenID]

  /// Makes options; the default reports the chosen output tokens alone.
  public init(topCount: Int = 0, promptStart: Int? = nil, tokenIDs: [TokenID] = []) {
    self.topCount = topCount
    self.promptStart = promptStart
    self.tokenIDs = tokenIDs
  }
}

/// A token with its log-probability (natural logarithm, of the model's distribution before temperature and filters).
public struct TokenLogprob: Sendable, Equatable {
  /// The token.
  public var token: TokenID
  /// Its log-probability; `nil` for the very first token of a prompt.
  public var logprob: Float?

  /// Makes a pair.
  public init(token: TokenID, logprob: Float?) {
    self.token = token
    self.logprob = logprob
  }
}

/// The log-probabilities of one position.
public struct PositionLogprobs: Sendable, Equatable {
  /// The token at the position.
  public var chosen: TokenLogprob
  /// The most likely tokens, most likely first; ties by smaller token id.
  public var top: [TokenLogprob]
  /// The tokens asked for by id, in the order asked.
  public var requested: [TokenLogprob]

  /// Makes a position's log-probabilities.
  public init(chosen: TokenLogprob, top: [TokenLogprob] = [], requested: [TokenLogprob] = []) {
    self.chosen = chosen
    self.top = top
    self.requested = requested
  }
}
