import ApusCore

/// A live sequence: a request on its way through the scheduler. One thread only; it never leaves this module.
///
/// Three counts say all about its progress, and nothing else is stored that follows from them:
///
///     computedCount  <=  scheduledCount  <=  tokens.count + pendingDraws
///     K/V exist          K/V exist once       tokens known, and tokens that steps
///                        launched steps end   in flight are about to draw
///
/// Its pages, half open:
///
///     0            sharedPages                        pages.count
///     ├──────────────┼─────────────────────────────────────┤
///     │ the tree's,  │ the request's own                   │
///     │ under `lock` │                                     │
final class Req {
  /// Where a sequence stands. Transitions:
  ///
  ///     waiting ──admit──▶ running ──finish──▶ finishing ──last step in flight ends──▶ (gone)
  ///        ▲                  │
  ///        │               retract
  ///        └─ last step in ── ▼
  ///           flight ends  retracting ──finish──▶ finishing
  ///
  /// A retraction or an end with no step in flight passes through the intermediate state at once.
  enum State {
    /// Holds no page and no slot.
    case waiting
    /// Has a slot.
    case running
    /// Back in the queue; a step in flight still reads and writes its pages.
    case retracting
    /// Its end is reported; a step in flight still reads and writes its pages.
    case finishing
  }

  let handle: UInt64
  /// Number in the order of arrival.
  let arrival: UInt64
  /// Prompt and known outputs.
  var tokens: [TokenID]
  let promptCount: Int
  let sampling: SamplingParameters
  /// Tokens that end the generation: the caller's and, unless ignored, the model's.
  let stopTokenIDs: [TokenID]
  let logprobs: LogprobOptions?
  let priority: Int
  let salt: String
  /// The most outputs: what was asked for or what the context leaves. Known in advance, so no step is wasted on a
  /// request that its next token ends.
  let maxOutputs: Int
  /// By page of the prompt: a hash of everything up to the page's end, the salt included. Equal hashes mean a common
  /// prefix, up to an error that costs a needless wait and nothing else.
  let pageHashes: [UInt64]

  var state = State.waiting
  var gateIsOpen: Bool
  var constraint: (any TokenConstraint)?
  var slot: Int32 = -1
  var pages: [Int32] = []
  var sharedPages = 0
  var lock: PrefixLock?
  var scheduledCount = 0
  var computedCount = 0
  /// Draws of launched steps whose tokens are not known yet; at most two.
  var pendingDraws = 0
  /// The draw of a launched step brings nothing, since the step before it brought the token that it would draw, and more.
  var nextDrawIsVoid = false
  /// The step in flight took a token as its input that was not drawn after all: what it computes for the request is void.
  var nextRowIsVoid = false
  /// Outputs, the last ones, that were not reported yet: forced tokens, until their log-probabilities are known.
  var unreportedCount = 0
  /// How the request ends once all outputs are reported.
  var pendingEnd: FinishReason?
  /// Draft tokens that the launched step verifies. Until it ends nobody knows where the sequence goes on.
  var draftCount = 0
  /// Tokens that the executor proposed to follow `tokens`; the next step verifies them.
  var drafts: [TokenID] = []
  /// Which of them each one follows, or -1 for the last token; empty where each follows the one before.
  var draftParents: [Int32] = []
  /// How many of the drafts being verified stand one behind the other, at most.
  var draftDepth = 0
  /// How many tokens are drafted for the request at a time.
  var pace = DraftPace()
  /// How its draft tokens fared.
  var speculation = SpeculationCounts()
  /// Launched steps that compute for this request; at most two.
  var inFlightCount = 0
  /// Whole pages known at admission: those that go into the tree while prompt chunks complete.
  var checkpointPages = 0

  var hasStarted = false
  var cachedTokens = 0
  var retractions = 0
  var promptLogprobs: [PositionLogprobs] = []
  /// Scratch of the policies.
  var sortKey = 0

  init(_ submission: Submission, arrival: UInt64, contextLength: Int) {
    handle = submission.handle
    self.arrival = arrival
    tokens = submission.tokens
    promptCount = submission.tokens.count
    sampling = submission.sampling
    stopTokenIDs = submission.sampling.stopTokenIDs + (submission.sampling.ignoreEOS ? [] : submission.eosTokenIDs)
    logprobs = submission.logprobs
    priority = submission.priority
    salt = submission.cacheSalt
    maxOutputs = min(submission.sampling.maxNewTokens ?? .max, contextLength - submission.tokens.count)
    pageHashes = Req.hashPages(submission.tokens, salt: submission.cacheSalt)
    gateIsOpen = submission.gate == .open
    constraint = submission.constraint
    // Position 0 has no log-probability: nothing precedes it.
    if logprobs?.promptStart == 0 {
      promptLogprobs.append(PositionLogprobs(chosen: TokenLogprob(token: tokens[0], logprob: nil)))
    }
  }

  var outputCount: Int { tokens.count - promptCount }

  /// Tokens to compute before the next draw; 0 if the steps in flight bring all that is still wanted.
  var extendCount: Int {
    if maxOutputs == 0 { return promptCount - scheduledCount }
    if draftCount > 0 { return 0 }
    // Nothing is drawn any more: what is still computed are the rows before forced tokens.
    if pendingEnd != nil { return max(0, tokens.count - 1 - scheduledCount) }
    return outputCount + pendingDraws >= maxOutputs ? 0 : tokens.count + pendingDraws - scheduledCount
  }

  /// Outputs that may still come.
  var remainingOutputs: Int { pendingEnd == nil ? max(0, maxOutputs - outputCount - pendingDraws) : 0 }

  /// The first prompt position whose logits are still wanted, for the log-probability of the token after it; `nil` for
  /// none.
  var nextPromptRow: Int? {
    guard !hasStarted, let start = logprobs?.promptStart else { return nil }
    // Rows are reported in order, each for the position after it: the next one follows from what is there.
    let row = start + promptLogprobs.count - 1
    return row < promptCount - 1 ? row : nil
  }

  /// The most pages that may come from the cache: at least one token is computed, since a draw needs logits, and so is
  /// every position whose logits are wanted.
  var matchLimit: Int { min(tokens.count - 1 - unreportedCount, nextPromptRow ?? .max) / kvPageSize }

  /// Whether pages of the tokens known at admission are still to come into the tree.
  var isFillingCache: Bool { sharedPages < checkpointPages }

  private static func hashPages(_ tokens: [TokenID], salt: String) -> [UInt64] {
    var hash: UInt64 = 0x9E37_79B9_7F4A_7C15
    for byte in salt.utf8 { hash = (hash ^ UInt64(byte)) &* 0x0000_0100_0000_01B3 }
    var hashes: [UInt64] = []
    hashes.reserveCapacity(tokens.count / kvPageSize)
    for page in 0..<tokens.count / kvPageSize {
      for token in tokens[page * kvPageSize..<(page + 1) * kvPageSize] {
        hash = (hash ^ UInt64(UInt32(bitPattern: token))) &* 0xFF51_AFD7_ED55_8CCD
        hash ^= hash >> 32
      }
      hashes.append(hash)
    }
    return hashes
  }
}
