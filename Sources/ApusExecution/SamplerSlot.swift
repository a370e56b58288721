import ApusCore
import ApusScheduling
import ApusTensors

/// What the sampler knows of one running request.
struct SamplerSlot {
  /// How one row becomes a token; `uniform` is set for each draw.
  private(set) var row = SamplingRow()
  /// Which log-probabilities to report.
  let logprobs: LogprobOptions?
  /// The prompt and what was generated before the request entered the slot.
  let knownTokens: [TokenID]
  /// Length of the sequence up to the last forced token; 0 before the first one.
  private(set) var forcedEnd = 0
  /// Tokens that were forced and whose log-probabilities are wanted and not known, and the position of the first.
  private var unscored: [TokenID] = []
  private var unscoredStart = 0
  /// The last draw was put off: the step launched behind it has nothing to go on with.
  var isPostponed = false
  /// The token drawn last: the input of the next step where that one was launched before the draw.
  var lastToken: TokenID = 0

  /// Follows the outputs where something limits them.
  private(set) var constraint: MaskedMatcher?

  private let seed: UInt64
  private let promptCount: Int
  private let minNewTokens: Int
  private let stopTokenIDs: [TokenID]
  private let biasTokens: [TokenID]
  private let biases: [Float]
  private let repetition: Float
  private let frequency: Float
  private let presence: Float

  /// Tokens that penalties apply to, and how often each occurred in the output. Empty without penalties.
  private var seenTokens: [TokenID] = []
  private var outputCounts: [Int32] = []
  private var seenIndex: [TokenID: Int] = [:]

  init(_ assignment: SlotAssignment, masks: MaskFiller) {
    let sampling = assignment.sampling
    row.temperature = sampling.isGreedy ? 0 : sampling.temperature
    row.topK = Int32(clamping: sampling.topK)
    row.topP = sampling.topP
    row.minP = sampling.minP
    seed = sampling.seed ?? 0
    logprobs = assignment.logprobs
    knownTokens = assignment.tokens
    promptCount = assignment.promptCount
    minNewTokens = sampling.minNewTokens
    stopTokenIDs = assignment.stopTokenIDs
    let bias = sampling.logitBias.sorted { $0.key < $1.key }
    biasTokens = bias.map(\.key)
    biases = bias.map(\.value)
    repetition = sampling.repetitionPenalty
    frequency = sampling.frequencyPenalty
    presence = sampling.presencePenalty
    constraint = assignment.constraint.map {
      MaskedMatcher($0, earlierOutputs: assignment.tokens.dropFirst(assignment.promptCount), filler: masks)
    }
    if logprobs != nil && assignment.unscoredCount > 0 {
      unscored = Array(assignment.tokens.suffix(assignment.unscoredCount))
      unscoredStart = assignment.tokens.count - assignment.unscoredCount
    }
    if hasPenalties {
      for (index, token) in assignment.tokens.enumerated() {
        if index < promptCount {
          // Only repetition looks at the prompt.
          if repetition != 1 { see(token, outputs: 0) }
        } else {
          see(token, outputs: 1)
        }
      }
    }
  }

  private var hasPenalties: Bool { repetition != 1 || frequency != 0 || presence != 0 }

  /// Notes a token that was drawn.
  mutating func append(_ token: TokenID) {
    lastToken = token
    constraint?.accept(token)
    if hasPenalties { see(token, outputs: 1) }
  }

  /// Notes and gives the tokens that have to follow the token drawn last. Where log-probabilities are wanted, the tokens
  /// wait for the rows that know them (`takeUnscored`).
  ///
  /// `lastToken` stays the token drawn: it is the input of a step that was launched before this was known.
  ///
  /// - Parameter position: of the token drawn last.
  mutating func takeForcedTokens(after position: Int) -> [TokenID] {
    guard let constraint else { return [] }
    let tokens = constraint.takeForcedTokens()
    if tokens.isEmpty { return [] }
    forcedEnd = position + 1 + tokens.count
    if logprobs != nil {
      unscored = tokens
      unscoredStart = position + 1
    }
    if hasPenalties { for token in tokens { see(token, outputs: 1) } }
    return tokens
  }

  /// The forced tokens that the rows before some positions score, which count as scored from now on.
  /// - Returns: the tokens, and the position of the first.
  mutating func takeUnscored(before end: Int) -> (tokens: ArraySlice<TokenID>, start: Int) {
    let count = max(0, min(unscored.count, end - unscoredStart))
    let taken = unscored.prefix(count)
    let start = unscoredStart
    unscoredStart += count
    // Copied, since the slice that is given keeps the old memory.
    unscored = count == unscored.count ? [] : Array(unscored.dropFirst(count))
    return (taken, start)
  }

  /// What the sampler would know if it went on from here on its own, to try tokens; `nil` if the constraint cannot be copied.
  func fork() -> SamplerSlot? {
    var twin = self
    if let constraint {
      guard let fork = constraint.fork() else { return nil }
      twin.constraint = fork
    }
    return twin
  }

  /// Whether nothing can follow: the constraint's text has ended, or it failed.
  var isEnded: Bool { constraint?.isEnded ?? false }

  /// Whether a token ends the generation.
  func stops(at token: TokenID) -> Bool { stopTokenIDs.contains(token) }

  /// Notes a token that was not drawn, if the constraint allows it.
  mutating func tryAppend(_ token: TokenID) -> Bool {
    if let constraint, !constraint.tryAccept(token) { return false }
    lastToken = token
    if hasPenalties { see(token, outputs: 1) }
    return true
  }

  private mutating func see(_ token: TokenID, outputs: Int32) {
    if let index = seenIndex[token] {
      outputCounts[index] += outputs
    } else {
      seenIndex[token] = seenTokens.count
      seenTokens.append(token)
      outputCounts.append(outputs)
    }
  }

  /// Changes a row of raw logits as the request asks: penalties, then bias, then the ban on stop tokens while fewer than
  /// `minNewTokens` were generated, then what a grammar forbids. Sets the random number of the draw.
  ///
  /// - Parameter position: of the token to be drawn, counted from the start of the prompt.
  mutating func prepare(_ logits: Tensor, row index: Int, position: Int, backend: any Backend) {
    row.uniform = CPUBackend.uniform(seed: seed, position: UInt64(position))
    if !seenTokens.isEmpty {
      backend.applyPenalties(
        logits: logits, row: index, tokens: seenTokens, outputCounts: outputCounts, count: seenTokens.count,
        repetition: repetition, frequency: frequency, presence: presence)
    }
    for (token, bias) in zip(biasTokens, biases) {
      backend.add(bias, toLogitOf: token, logits: logits, row: index)
    }
    var endsAreAllowed = position - promptCount >= minNewTokens
    // After the end of its text a grammar says nothing more.
    if let mask = constraint?.takeMask(), let words = mask.baseAddress {
      backend.applyMask(logits: logits, row: index, mask: words, words: mask.count)
      // Where only the end may come, it comes.
      if !endsAreAllowed { endsAreAllowed = !allowsOthers(words, mask.count) }
    }
    if !endsAreAllowed {
      for token in stopTokenIDs { backend.add(-.infinity, toLogitOf: token, logits: logits, row: index) }
    }
  }
}

extension SamplerSlot {
  /// Whether a mask allows any token that does not end the generation.
  private func allowsOthers(_ words: UnsafeMutablePointer<UInt32>, _ count: Int) -> Bool {
    for token in stopTokenIDs where token >= 0 && Int(token >> 5) < count {
      words[Int(token >> 5)] &= ~(1 << UInt32(token & 31))
    }
    for index in 0..<count where words[index] != 0 { return true }
    return false
  }
}

extension Backend {
  /// Adds to one logit. A frequency penalty of the opposite sign on a token that occurred once is the same thing.
  fileprivate func add(_ value: Float, toLogitOf token: TokenID, logits: Tensor, row: Int) {
    var token = token
    var count: Int32 = 1
    applyPenalties(
      logits: logits, row: row, tokens: &token, outputCounts: &count, count: 1, repetition: 1, frequency: -value,
      presence: 0)
  }
}
