public import ApusCore

/// In which order waiting requests are admitted.
public enum SchedulingPolicy: String, Sendable, CaseIterable {
  /// In order of arrival. The default: nobody is overtaken for ever, the order costs nothing to keep, and requests that
  /// arrive together still share their prefix, because followers wait for the one that computes it.
  case firstComeFirstServed = "fcfs"
  /// The longest cached prefix first, which raises the cache's hit rate when requests of several families mix in a long
  /// queue. A request with no cached prefix can wait for long. With more than 128 waiting requests the order of
  /// arrival is used, since the search for prefixes would cost more than it brings.
  case longestPrefixMatch = "lpm"
  /// The branch of the prefix tree with most waiting requests first, depth first. Falls back as above.
  case depthFirstWeight = "dfs-weight"
  /// The request that may generate most first.
  case longestOutputFirst = "lof"
  /// The largest priority first, in order of arrival within one priority. A waiting request that does not fit retracts
  /// running ones whose priority is lower by `preemptionThreshold` or more.
  case priority
}

/// How much a scheduler may do at once.
public struct SchedulerConfiguration: Sendable {
  /// Pages of the K/V pool, each of `kvPageSize` tokens.
  public var pageCount: Int
  /// The longest sequence, prompt and output together, in tokens.
  public var contextLength: Int
  /// The most tokens that one step computes. Chunked prefill is this limit at work.
  public var tokenBudget = 512
  /// The most tokens of one request that one step computes; `nil` leaves the step's budget as the only limit.
  public var maxChunkTokens: Int?
  /// The most requests that are computed at once; the number of slots.
  public var maxRunningRequests = 256
  /// The most requests that wait; one more is rejected with `queueFull`.
  public var maxQueuedRequests = 2048
  /// In which order waiting requests are admitted.
  public var policy = SchedulingPolicy.firstComeFirstServed
  /// Scales the share of requested output that admission reserves. Larger admits fewer and retracts less.
  public var conservativeness = 1.0
  /// By how much a waiting request's priority must exceed a running one's to take its place.
  public var preemptionThreshold = 10
  /// Whether prefixes are kept and shared at all. Off is the plain twin that tests compare with.
  public var cachesPrefixes = true
  /// Whether a request waits while a running one computes a prefix that both need.
  public var sharesPrefixesInBatch = true

  /// The most draft tokens verified per request and step (speculative decoding); 0 for none. Output is the same to the bit
  /// with any value.
  public var draftTokens = 0
  /// The most running requests for which tokens are drafted.
  public var maxDraftingRequests = 32
  /// What drafting and verifying a token costs, which decides how many are worth it.
  public var draftCosts = DraftCosts()
  /// Whether what steps take corrects these costs and decides whether tokens are drafted at all. Off, decisions depend on
  /// no measurement.
  public var measuresDrafting = false

  /// Makes a configuration with the defaults above.
  public init(pageCount: Int, contextLength: Int) {
    self.pageCount = pageCount
    self.contextLength = contextLength
  }

  /// Refuses impossible values.
  /// - Throws: `EngineError` with code `invalidRequest` that names the value.
  public func validate() throws(EngineError) {
    func check(_ holds: Bool, _ name: String, _ value: Int, _ rule: String) throws(EngineError) {
      if !holds { throw EngineError(.invalidRequest, "\(name) must be \(rule), got \(value).", parameter: name) }
    }
    try check(pageCount >= 1 && pageCount < Int(Int32.max), "pageCount", pageCount, "between 1 and 2^31 - 2")
    try check(
      contextLength >= 2 && contextLength < Int(Int32.max), "contextLength", contextLength, "between 2 and 2^31 - 2")
    try check(tokenBudget >= 1, "tokenBudget", tokenBudget, "at least 1")
    if let maxChunkTokens { try check(maxChunkTokens >= 1, "maxChunkTokens", maxChunkTokens, "at least 1") }
    try check(
      maxRunningRequests >= 1 && maxRunningRequests < Int(Int32.max), "maxRunningRequests", maxRunningRequests,
      "between 1 and 2^31 - 2")
    try check(maxQueuedRequests >= 1, "maxQueuedRequests", maxQueuedRequests, "at least 1")
    try check(preemptionThreshold >= 1, "preemptionThreshold", preemptionThreshold, "at least 1")
    try check(draftTokens >= 0 && draftTokens <= 64, "draftTokens", draftTokens, "between 0 and 64")
    try draftCosts.validate()
    if !(conservativeness > 0 && conservativeness.isFinite) {
      throw EngineError(
        .invalidRequest, "conservativeness must be a finite number above 0, got \(conservativeness).",
        parameter: "conservativeness")
    }
  }
}
