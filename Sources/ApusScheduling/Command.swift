public import ApusCore

/// A request as the scheduler takes it: tokenized, validated against the vocabulary, its seed drawn.
public struct Submission: Sendable {
  /// What must happen before a request may be computed.
  public enum Gate: Sendable, Equatable {
    /// Nothing.
    case open
    /// Something outside, such as a grammar that is being compiled. `Command.open` says that it happened. The request
    /// keeps its place in the queue and blocks nobody.
    case closed
  }

  /// The request's number, chosen by the submitter; never used twice.
  public var handle: UInt64
  /// The prompt.
  public var tokens: [TokenID]
  /// How tokens are drawn and when to stop; `seed` must be set. Stop strings and regular expressions are the
  /// submitter's affair: it watches the text and sends `Command.finish`.
  public var sampling: SamplingParameters
  /// The model's end-of-sequence tokens. Ignored if `sampling.ignoreEOS` is set.
  public var eosTokenIDs: [TokenID]
  /// Which log-probabilities to report.
  public var logprobs: LogprobOptions?
  /// Larger is more urgent. Used by `SchedulingPolicy.priority` alone.
  public var priority: Int
  /// The namespace of the prefix cache.
  public var cacheSalt: String
  /// Whether the request may be computed at once.
  public var gate: Gate
  /// What limits the tokens, if anything does. May come with the opening of the gate.
  public var constraint: (any TokenConstraint)?

  /// Makes a submission.
  public init(
    handle: UInt64, tokens: [TokenID], sampling: SamplingParameters, eosTokenIDs: [TokenID] = [],
    logprobs: LogprobOptions? = nil, priority: Int = 0, cacheSalt: String = "", gate: Gate = .open,
    constraint: (any TokenConstraint)? = nil
  ) {
    self.handle = handle
    self.tokens = tokens
    self.sampling = sampling
    self.eosTokenIDs = eosTokenIDs
    self.logprobs = logprobs
    self.priority = priority
    self.cacheSalt = cacheSalt
    self.gate = gate
    self.constraint = constraint
  }
}

/// What the scheduler is told. Commands that name a request which has ended, or never was, are ignored: its end may be
/// on its way to the sender.
public enum Command: Sendable {
  /// A new request. It is answered by exactly one `Event.finished` or `Event.rejected`, now or later.
  case submit(Submission)
  /// The request's gate opens. A constraint that came to be behind it takes the place of the submission's.
  case open(handle: UInt64, constraint: (any TokenConstraint)? = nil)
  /// What the gate waited for cannot be had: a request whose gate is closed ends with the error.
  case reject(handle: UInt64, EngineError)
  /// The request ends early, with `FinishReason.abort`.
  case abort(handle: UInt64, reason: String)
  /// Every request ends early.
  case abortAll(reason: String)
  /// The request has what it needs, for example a stop string was seen: it ends with this reason.
  case finish(handle: UInt64, FinishReason)
  /// Empties the prefix cache as soon as no request holds a page. Answered by `Event.flushed(reply, true)`.
  case flushCache(reply: UInt64)
  /// Gives up a flush that has not happened yet. Answered by `Event.flushed(reply, false)`.
  case cancelFlush(reply: UInt64)
  /// From now on new requests are rejected with `shuttingDown`. Answered by `Event.drained` when the last one has ended.
  case drain(reply: UInt64)
  /// Ends every request and, when nothing is in flight any more, the loop.
  case shutdown(reason: String)
}

/// What the scheduler tells. In order, per request:
/// `started` (token, token, ...)? `finished`, or `finished` alone, or `rejected` alone.
public enum Event: Sendable {
  /// The prompt is computed; the first token follows. `promptLogprobs` are those of the prompt's positions from the one
  /// asked for to the last.
  case started(handle: UInt64, cachedTokens: Int, promptLogprobs: [PositionLogprobs]?)
  /// One more output token. The token that ends a generation is reported too.
  case token(handle: UInt64, token: TokenID, logprobs: PositionLogprobs?)
  /// The request has ended. Nothing follows.
  case finished(handle: UInt64, FinishReason, retractions: Int, speculation: SpeculationCounts?)
  /// The request was not taken. Nothing follows.
  case rejected(handle: UInt64, EngineError)
  /// The answer to a flush: whether the cache was emptied.
  case flushed(reply: UInt64, Bool)
  /// The answer to `Command.drain`.
  case drained(reply: UInt64)
}
