public import ApusCore

/// Tokens per K/V page: one constant for scheduler, cache, pools and kernels. A page is the unit of allocation and of
/// prefix sharing. Sixteen is the width of one vector of float32 in AVX-512, so a page's keys are one register of scores.
public let kvPageSize = 16

/// One request's share of a step.
public struct ScheduledRequest: Sendable, Equatable {
  /// Row of the runner's per-request tables, in 0..<maxRunningRequests.
  public var slot: Int32
  /// Tokens whose K/V exist before the step; the position of the first token computed.
  public var start: Int32
  /// Tokens computed in the step, at least 1.
  public var count: Int32
  /// Index in `ScheduleBatch.tokens` of the first token computed.
  public var tokenOffset: Int32
  /// Range in `ScheduleBatch.pages` of the request's page table, which covers positions 0..<start + count.
  public var pageOffset: Int32
  public var pageCount: Int32
  /// The last of the tokens is the one that the step before this one draws. Its value is not known yet (the entry in
  /// `tokens` is -1): the runner takes it from the slot.
  public var lastTokenIsInFlight: Bool
  /// Whether a token is drawn from the last row's logits.
  public var samples: Bool
  /// How many of the tokens, the last ones, are drafts (speculative decoding). The row before the first and the row of each
  /// are drawn from in turn, as long as the draw before was what had been drafted.
  public var draftCount: Int32
  /// How many draft tokens are wanted for the next step, one behind the other, at most; 0 for none.
  public var draftLimit: Int32
  /// The least chance of being accepted with which a draft token is worth its row, beside others of its place.
  public var draftLeast: Float = 0
  /// Where the drafts are a tree: the index in `ScheduleBatch.parents` of the first one's parent. -1 where each draft follows
  /// the one before.
  public var parentOffset: Int32 = -1
  /// The first position whose *next* token's log-probability is wanted, for prompt log-probabilities; `Int32.max` for
  /// none. Of the rows computed, those at positions in promptLogprobStart..<promptLogprobEnd are reported.
  public var promptLogprobStart: Int32
  public var promptLogprobEnd: Int32

  /// Makes a share.
  public init(
    slot: Int32, start: Int32, count: Int32, tokenOffset: Int32, pageOffset: Int32, pageCount: Int32,
    lastTokenIsInFlight: Bool, samples: Bool, draftCount: Int32 = 0, draftLimit: Int32 = 0,
    promptLogprobStart: Int32 = .max, promptLogprobEnd: Int32 = .max
  ) {
    self.slot = slot
    self.start = start
    self.count = count
    self.tokenOffset = tokenOffset
    self.pageOffset = pageOffset
    self.pageCount = pageCount
    self.lastTokenIsInFlight = lastTokenIsInFlight
    self.samples = samples
    self.draftCount = draftCount
    self.draftLimit = draftLimit
    self.promptLogprobStart = promptLogprobStart
    self.promptLogprobEnd = promptLogprobEnd
  }
}

/// A request enters a slot: what the runner must know to sample for it.
public struct SlotAssignment: Sendable {
  /// The slot.
  public var slot: Int32
  /// How to draw. `seed` is always set.
  public var sampling: SamplingParameters
  /// Tokens that `minNewTokens` forbids for a while: end-of-sequence and stop tokens.
  public var stopTokenIDs: [TokenID]
  /// Which log-probabilities to report.
  public var logprobs: LogprobOptions?
  /// All tokens known so far, prompt first. After a retraction the request's earlier outputs are among them.
  public var tokens: [TokenID]
  /// How many of `tokens` are the prompt's; the rest count as output for penalties and `minNewTokens`.
  public var promptCount: Int
  /// What limits the outputs, if anything does. It has to be told of the outputs among `tokens`.
  public var constraint: (any TokenConstraint)?
  /// How many of `tokens`, the last ones, still lack their log-probabilities, which the request asked for: the rows before
  /// them are among those computed.
  public var unscoredCount: Int
  /// Whose texts may serve as a source of draft tokens: those of requests with the same salt.
  public var cacheSalt: String

  /// Makes an assignment.
  public init(
    slot: Int32, sampling: SamplingParameters, stopTokenIDs: [TokenID], logprobs: LogprobOptions?, tokens: [TokenID],
    promptCount: Int, constraint: (any TokenConstraint)? = nil, unscoredCount: Int = 0, cacheSalt: String = ""
  ) {
    self.slot = slot
    self.sampling = sampling
    self.stopTokenIDs = stopTokenIDs
    self.logprobs = logprobs
    self.tokens = tokens
    self.promptCount = promptCount
    self.constraint = constraint
    self.unscoredCount = unscoredCount
    self.cacheSalt = cacheSalt
  }
}

/// The scheduler's decision for one step: plain arrays, complete in themselves.
public struct ScheduleBatch: Sendable {
  /// Number of the step, counting from 1.
  public var step: UInt64 = 0
  /// Slots whose request left since the last batch. Handled before `assigned`.
  public var released: [Int32] = []
  /// Slots that a request enters with this batch.
  public var assigned: [SlotAssignment] = []
  /// Who computes how much.
  public var requests: [ScheduledRequest] = []
  /// Input tokens, flat: request by request. A token in flight is -1.
  public var tokens: [TokenID] = []
  /// Page tables, flat: page `p` of a request holds positions p * kvPageSize..<(p + 1) * kvPageSize.
  public var pages: [Int32] = []
  /// Of drafts that are trees, flat: the number of the draft that each one follows, among its request's, or -1 for the last
  /// known token. A draft comes before those that follow it.
  public var parents: [Int32] = []

  /// An empty batch.
  public init() {}

  /// Empties the arrays and keeps their memory.
  public mutating func removeAll() {
    released.removeAll(keepingCapacity: true)
    assigned.removeAll(keepingCapacity: true)
    requests.removeAll(keepingCapacity: true)
    tokens.removeAll(keepingCapacity: true)
    pages.removeAll(keepingCapacity: true)
    parents.removeAll(keepingCapacity: true)
  }
}

/// What a step brought.
public struct StepResult: Sendable {
  /// Output tokens, flat: request by request in the batch's order. A request that samples gets the token drawn and, after
  /// it, tokens that its grammar forces (jump-forward), whose K/V do not exist yet. When a step brings a request more than
  /// one token, the step launched after it, which took the first of them as its input, brings the request none. The
  /// log-probabilities of forced tokens come later, in `forcedLogprobs`.
  public var tokens: [TokenID] = []
  /// How many tokens of `tokens` belong to each request of the batch.
  public var tokenCounts: [Int32] = []
  /// How many draft tokens were accepted, for each request that had some: (index in `requests`, count).
  public var acceptedDrafts: [(request: Int, count: Int)] = []
  /// Tokens that a drafter proposes to follow those that the step brought, for requests whose share has a `draftLimit`:
  /// (index in `requests`, at most that many tokens one behind the other). A request for which nothing is proposed is missing.
  public var drafts: [(request: Int, tokens: [TokenID])] = []
  /// For those of `drafts` that are trees: the number of the draft that each one follows, or -1 for none, as in
  /// `ScheduleBatch.parents`.
  public var draftParents: [(request: Int, parents: [Int32])] = []
  /// Log-probabilities of drawn tokens, only for requests that asked: (index in `tokens`, values).
  public var logprobs: [(index: Int, values: PositionLogprobs)] = []
  /// Log-probabilities of tokens that a grammar forced in this or an earlier step, for requests that asked: (index in the
  /// batch's `requests`, position of the token, values). They come with the step that computes the row before the token.
  public var forcedLogprobs: [(request: Int, position: Int, values: PositionLogprobs)] = []
  /// Requests that sample and got no token, since what their grammar allows is not known yet: indices in `requests`. The last
  /// of their known tokens is to be computed again, to the same bits, and the draw with it. What a step launched
  /// behind this one computes for them is void.
  public var postponed: [Int] = []
  /// Log-probabilities of prompt tokens: (index in the batch's `requests`, position of the token, values). `chosen` is
  /// filled in by the scheduler's side, which knows the tokens; the runner reports the token it was given.
  public var promptLogprobs: [(request: Int, position: Int, values: PositionLogprobs)] = []
  /// Requests whose computation failed alone (for example logits that are not numbers): (index in `requests`, reason).
  public var failures: [(request: Int, reason: String)] = []
  /// Seconds that the model ran, and how many of them went into drafting.
  public var forwardSeconds = 0.0
  public var draftSeconds = 0.0
  /// Seconds from the end of the step before to the end of this one, on the model's thread: with what it waited for; 0 if
  /// unknown.
  public var stepSeconds = 0.0

  /// An empty result.
  public init() {}

  /// Empties the arrays and keeps their memory.
  public mutating func removeAll() {
    tokens.removeAll(keepingCapacity: true)
    tokenCounts.removeAll(keepingCapacity: true)
    acceptedDrafts.removeAll(keepingCapacity: true)
    drafts.removeAll(keepingCapacity: true)
    draftParents.removeAll(keepingCapacity: true)
    logprobs.removeAll(keepingCapacity: true)
    forcedLogprobs.removeAll(keepingCapacity: true)
    postponed.removeAll(keepingCapacity: true)
    promptLogprobs.removeAll(keepingCapacity: true)
    failures.removeAll(keepingCapacity: true)
    forwardSeconds = 0
    draftSeconds = 0
    stepSeconds = 0
  }
}

/// Computes steps. The model runner conforms; so does the fake of the simulator.
///
/// Batches run in the order in which they were launched. At most two are in flight: the one that runs and the next one,
/// whose tokens in flight are those that the first one draws.
public protocol ModelExecutor {
  /// Hands a batch over; returns as soon as it is queued. The executor keeps no reference to the batch's arrays after
  /// the matching `wait`.
  mutating func launch(_ batch: ScheduleBatch)
  /// Blocks until the oldest launched batch is done and fills in what it brought. `result` arrives empty.
  mutating func wait(into result: inout StepResult)
}
