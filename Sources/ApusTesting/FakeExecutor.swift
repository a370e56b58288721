public import ApusCore
public import ApusScheduling

/// A model without weights, whose text gives away every mistake in the books.
///
/// "K/V" of a token are the token and its position, stored in the page cell that the page table names. A drawn token is
/// a hash of the request's seed and of the *whole prefix, read back through the page table*; so a page that was lost,
/// swapped, freed too early or shared with the wrong request changes the text, and the text can be computed without an
/// engine (`FakeModel`).
///
/// Like a device, it runs batches in the order of launch and as late as it may: when they are waited for. Every batch
/// is checked when it is launched, against what was launched before; a violation is recorded in `violations`, with the
/// step's number, and the run goes on.
public struct FakeExecutor: ModelExecutor {
  /// What the executor found wrong with batches. Empty after a sound run.
  public private(set) var violations: [String] = []
  /// Tokens computed since the start: what a prefix cache is meant to keep down.
  public private(set) var computedTokens = 0
  /// The largest number of rows in one batch, and of requests.
  public private(set) var largestBatch = (tokens: 0, requests: 0)
  /// Decides whether a request's row fails alone: gets the tokens of the sequence. `nil` lets all succeed.
  public var failure: (@Sendable ([TokenID]) -> String?)?
  /// How many tokens after a drawn one are forced, as by a grammar: gets the sequence, the drawn token included. Forced
  /// tokens are those that would be drawn, so the text stays what `FakeModel` says.
  public var forcedCount: (@Sendable ([TokenID]) -> Int)?
  /// Decides whether a draw is put off, as behind a slow mask: gets the step's number and the slot.
  public var postpones: (@Sendable (UInt64, Int32) -> Bool)?
  /// The chance that a draft token is the one that will be drawn.
  public var draftAccuracy = 0.7
  /// Tokens that were forced since the start.
  public private(set) var forcedTokens = 0

  private struct Cell {
    var token: TokenID = -1
    var position: Int32 = -1
    /// The step that wrote the cell last.
    var step: UInt64 = 0
  }

  private struct Slot {
    var assignment: SlotAssignment
    /// Tokens whose K/V exist once launched batches have run.
    var launchedCount: Int
    /// The last token drawn, not yet an input.
    var drawn: TokenID = -1
    /// Draws in launched batches.
    var pendingDraws = 0
    /// The draw of a launched batch is of a token that is known by now.
    var nextDrawIsVoid = false
    /// What a launched batch computes goes on from a draw that was put off.
    var nextRowIsVoid = false
    /// How many of the last tokens were forced and have no log-probabilities yet.
    var unscored = 0
    /// Whether the launched batch holds draft tokens.
    var isDrafting = false
    /// What was proposed for the next step.
    var proposal: [TokenID] = []
    /// The step that brought it.
    var proposedStep: UInt64 = 0
    /// All tokens of the sequence; outputs are added when they are drawn.
    var tokens: [TokenID]
    /// Number of the assignment: tells whose cells are whose.
    var owner: Int
    /// Steps launched for the assignment and not run.
    var inFlight = 0
  }

  private let model: FakeModel
  private var cells: [Cell]
  private var slots: [Slot?]
  private var queue: [ScheduleBatch] = []
  private var owners = 0
  private var lastStep: UInt64 = 0

  /// Makes an executor with an empty pool.
  public init(model: FakeModel, pageCount: Int, maxRunningRequests: Int) {
    self.model = model
    cells = Array(repeating: Cell(), count: pageCount * kvPageSize)
    slots = Array(repeating: nil, count: maxRunningRequests)
  }

  /// Batches launched and not waited for.
  public var inFlight: Int { queue.count }

  public mutating func launch(_ batch: ScheduleBatch) {
    func check(_ holds: Bool, _ sentence: @autoclosure () -> String) {
      if !holds { violations.append("step \(batch.step): \(sentence())") }
    }
    check(queue.count < 2, "a third batch is in flight")
    check(
      queue.allSatisfy { $0.requests.allSatisfy { $0.draftLimit == 0 } }, "is launched although drafts are awaited")
    check(batch.step == lastStep + 1, "follows step \(lastStep)")
    check(!batch.requests.isEmpty, "computes nothing")
    lastStep = batch.step

    for slot in batch.released {
      check(slots[Int(slot)] != nil, "slot \(slot) is released and was not assigned")
      check(slots[Int(slot)]?.inFlight == 0, "slot \(slot) is released while a launched step uses it")
      slots[Int(slot)] = nil
    }
    var fresh: Set<Int32> = []
    for assignment in batch.assigned {
      check(slots[Int(assignment.slot)] == nil, "slot \(assignment.slot) is assigned and was not released")
      check(assignment.sampling.seed != nil, "slot \(assignment.slot) has no seed")
      check(assignment.promptCount <= assignment.tokens.count, "a prompt is longer than its sequence")
      owners += 1
      slots[Int(assignment.slot)] = Slot(
        assignment: assignment, launchedCount: -1, unscored: assignment.unscoredCount, tokens: assignment.tokens,
        owner: owners)
      fresh.insert(assignment.slot)
    }

    var seen: Set<Int32> = []
    // By page, the slot that writes it in this batch or in the one in flight.
    var writers: [Int32: Int32] = [:]
    for earlier in queue {
      for share in earlier.requests { for page in Self.written(share, earlier) { writers[page] = share.slot } }
    }
    let writersInFlight = writers
    var reserved = 0
    for share in batch.requests {
      check(seen.insert(share.slot).inserted, "slot \(share.slot) appears twice")
      check(share.count >= 1, "slot \(share.slot) computes nothing")
      check(Int(share.tokenOffset) == reserved, "slot \(share.slot)'s tokens are not in line")
      reserved += Int(share.count)
      guard var slot = slots[Int(share.slot)] else {
        check(false, "slot \(share.slot) is used and was not assigned")
        continue
      }
      let start = Int(share.start)
      let end = start + Int(share.count)
      check(
        Int(share.pageCount) == (end + kvPageSize - 1) / kvPageSize, "slot \(share.slot)'s page table does not cover it"
      )
      let pages = batch.pages[Int(share.pageOffset)..<Int(share.pageOffset + share.pageCount)]
      check(Set(pages).count == pages.count, "slot \(share.slot)'s page table names a page twice")
      check(pages.allSatisfy { $0 >= 0 && Int($0) < cells.count / kvPageSize }, "a page table names a missing page")

      if fresh.contains(share.slot) {
        check(start < slot.tokens.count, "slot \(share.slot) computes nothing of its prompt")
        // The cached prefix must be there already: computed by steps that are done.
        for position in 0..<start {
          let cell = cells[Self.cell(position, pages)]
          check(
            cell.token == slot.tokens[position] && Int(cell.position) == position,
            "slot \(share.slot)'s cached position \(position) holds something else")
        }
        for page in pages.prefix(start / kvPageSize) {
          check(writersInFlight[page] == nil, "slot \(share.slot) reads page \(page), which a step in flight writes")
        }
      } else {
        check(start == slot.launchedCount, "slot \(share.slot) starts at \(start), not at \(slot.launchedCount)")
      }
      slot.launchedCount = end

      // Inputs: known tokens by value; the one in flight by reference.
      let inputs = batch.tokens[Int(share.tokenOffset)..<Int(share.tokenOffset + share.count)]
      for (offset, token) in inputs.enumerated() {
        let position = start + offset
        if offset >= Int(share.count - share.draftCount) {
          check(position >= slot.tokens.count && token >= 0, "slot \(share.slot)'s guess at \(position) is none")
        } else if position < slot.tokens.count {
          check(token == slot.tokens[position], "slot \(share.slot)'s input at \(position) is not its token")
        } else {
          check(
            position == slot.tokens.count && slot.pendingDraws == 1 && token == -1 && share.lastTokenIsInFlight,
            "slot \(share.slot)'s input at \(position) is unknown and not in flight")
        }
      }
      check(
        share.lastTokenIsInFlight == (inputs.last == -1), "slot \(share.slot)'s mark of a token in flight is wrong")
      let known = slot.tokens.count + slot.pendingDraws
      if slot.assignment.sampling.maxNewTokens != 0 {
        check(share.samples == (end - Int(share.draftCount) == known), "slot \(share.slot) draws at the wrong moment")
      } else {
        check(!share.samples, "slot \(share.slot) draws and wants no output")
      }
      if share.draftCount > 0 {
        check(share.samples && slot.pendingDraws == 0, "slot \(share.slot) guesses behind a token it does not know")
        check(
          end < slot.assignment.promptCount + (slot.assignment.sampling.maxNewTokens ?? .max / 2),
          "slot \(share.slot) guesses past its end")
      }
      let drafts = batch.tokens[Int(share.tokenOffset) + Int(share.count - share.draftCount)..<reserved]
      check(slot.proposal.starts(with: drafts), "slot \(share.slot) verifies other drafts than those proposed")
      check(
        drafts.isEmpty || batch.step == slot.proposedStep + 1, "slot \(share.slot) verifies drafts of an older step")
      slot.proposal = []
      check(share.draftLimit == 0 || share.samples, "slot \(share.slot) wants drafts behind a token that is not drawn")
      check(!slot.isDrafting, "slot \(share.slot) is used while its guesses are verified")
      slot.isDrafting = share.draftCount > 0
      if share.samples { slot.pendingDraws += 1 }

      for page in Self.written(share, batch) {
        if let other = writers[page] {
          check(other == share.slot, "page \(page) is written by slots \(other) and \(share.slot)")
        }
        writers[page] = share.slot
      }
      slot.inFlight += 1
      slots[Int(share.slot)] = slot
    }
    check(reserved == batch.tokens.count, "there are tokens that nobody computes")
    // Whoever reads a page must not see it change: nobody else may write what is in some table, now or in flight.
    for other in queue + [batch] {
      for share in other.requests {
        for page in other.pages[Int(share.pageOffset)..<Int(share.pageOffset + share.pageCount)] {
          if let writer = writers[page] {
            check(writer == share.slot, "page \(page) is written by slot \(writer) and read by slot \(share.slot)")
          }
        }
      }
    }
    largestBatch.tokens = max(largestBatch.tokens, batch.tokens.count)
    largestBatch.requests = max(largestBatch.requests, batch.requests.count)
    queue.append(batch)
  }

  public mutating func wait(into result: inout StepResult) {
    let batch = queue.removeFirst()
    for (index, share) in batch.requests.enumerated() {
      guard var slot = slots[Int(share.slot)] else {
        violations.append("step \(batch.step): slot \(share.slot) was released before its step ran")
        result.tokenCounts.append(0)
        continue
      }
      let pages = batch.pages[Int(share.pageOffset)..<Int(share.pageOffset + share.pageCount)]
      let end = Int(share.start + share.count)
      for offset in 0..<Int(share.count) {
        var token = batch.tokens[Int(share.tokenOffset) + offset]
        if token == -1 { token = max(0, slot.drawn) }
        cells[Self.cell(Int(share.start) + offset, pages)] = Cell(
          token: token, position: share.start + Int32(offset), step: batch.step)
      }
      computedTokens += Int(share.count)
      slot.inFlight -= 1

      // Read everything back.
      var state = model.start()
      slot.isDrafting = false
      let rowIsVoid = slot.nextRowIsVoid
      slot.nextRowIsVoid = false
      var accepted = 0
      var states: [UInt64] = []
      var sequence: [TokenID] = []
      sequence.reserveCapacity(end)
      let wantsPromptLogprobs = share.promptLogprobStart != .max
      for position in 0..<end {
        let cell = cells[Self.cell(position, pages)]
        sequence.append(cell.token)
        state = model.advance(state, cell.token, at: Int(cell.position))
        if position >= end - 1 - Int(share.draftCount) { states.append(state) }
        if !rowIsVoid && slot.unscored > 0 && position + 1 == slot.tokens.count - slot.unscored
          && position >= Int(share.start) && position < end - Int(share.draftCount)
        {
          slot.unscored -= 1
          result.forcedLogprobs.append(
            (
              index, position + 1,
              model.logprobs(state, chosen: slot.tokens[position + 1], options: slot.assignment.logprobs)
            ))
        }
        if wantsPromptLogprobs && position >= max(Int(share.start), Int(share.promptLogprobStart))
          && position < Int(share.promptLogprobEnd)
        {
          let next = slot.tokens[position + 1]
          result.promptLogprobs.append(
            (index, position + 1, model.logprobs(state, chosen: next, options: slot.assignment.logprobs)))
        }
      }
      if rowIsVoid {
        slot.nextDrawIsVoid = false
        result.tokenCounts.append(0)
      } else if let reason = failure?(sequence) {
        result.failures.append((index, reason))
        result.tokenCounts.append(0)
        if share.samples {
          if slot.nextDrawIsVoid { slot.nextDrawIsVoid = false } else { slot.pendingDraws -= 1 }
        }
      } else if share.samples && slot.nextDrawIsVoid {
        slot.nextDrawIsVoid = false
        result.tokenCounts.append(0)
      } else if share.samples && postpones?(batch.step, share.slot) == true {
        slot.pendingDraws -= 1
        if slot.pendingDraws > 0 {
          slot.pendingDraws = 0
          slot.nextDrawIsVoid = true
          slot.nextRowIsVoid = true
        }
        slot.launchedCount = end - Int(share.draftCount) - 1
        result.postponed.append(index)
        result.tokenCounts.append(0)
      } else if share.samples {
        slot.pendingDraws -= 1
        for (draft, reached) in states.enumerated() {
          state = reached
          let token = model.draw(state, seed: slot.assignment.sampling.seed ?? 0)
          slot.drawn = token
          // A row whose request had ended draws on, as a device would.
          slot.tokens.append(token)
          if slot.assignment.logprobs != nil {
            result.logprobs.append(
              (result.tokens.count, model.logprobs(state, chosen: token, options: slot.assignment.logprobs)))
          }
          result.tokens.append(token)
          guard draft < Int(share.draftCount) else { break }
          let draftToken = batch.tokens[Int(share.tokenOffset + share.count - share.draftCount) + draft]
          guard draftToken == token else { break }
          accepted += 1
        }
        if share.draftCount > 0 {
          result.acceptedDrafts.append((index, accepted))
          slot.launchedCount = end - Int(share.draftCount) + accepted
        }
        let count = forcedCount?(slot.tokens) ?? 0
        if slot.assignment.logprobs != nil { slot.unscored = count }
        for _ in 0..<count {
          state = model.advance(state, slot.tokens[slot.tokens.count - 1], at: slot.tokens.count - 1)
          let forced = model.draw(state, seed: slot.assignment.sampling.seed ?? 0)
          slot.tokens.append(forced)
          result.tokens.append(forced)
        }
        forcedTokens += count
        if count > 0 && slot.pendingDraws > 0 {
          slot.pendingDraws = 0
          slot.nextDrawIsVoid = true
        }
        result.tokenCounts.append(Int32(1 + accepted + count))
        slot.proposal = propose(for: slot, state, limit: Int(share.draftLimit))
        slot.proposedStep = batch.step
        if !slot.proposal.isEmpty { result.drafts.append((index, slot.proposal)) }
      } else {
        result.tokenCounts.append(0)
      }
      slots[Int(share.slot)] = slot
    }
  }

  /// Tokens that are likely to follow, some of them wrong.
  /// - Parameter state: before the sequence's last token.
  private func propose(for slot: Slot, _ state: UInt64, limit: Int) -> [TokenID] {
    guard limit > 0 else { return [] }
    var random = SeededGenerator(seed: state)
    var state = state
    var last = slot.tokens[slot.tokens.count - 1]
    var drafts: [TokenID] = []
    for offset in 0..<Int.random(in: 0...limit, using: &random) {
      state = model.advance(state, last, at: slot.tokens.count - 1 + offset)
      last = model.draw(state, seed: slot.assignment.sampling.seed ?? 0)
      if !random.chance(draftAccuracy) { last = (last + 1) % TokenID(model.vocabularySize) }
      drafts.append(last)
    }
    return drafts
  }

  private static func cell(_ position: Int, _ pages: ArraySlice<Int32>) -> Int {
    Int(pages[pages.startIndex + position / kvPageSize]) * kvPageSize + position % kvPageSize
  }

  private static func written(_ share: ScheduledRequest, _ batch: ScheduleBatch) -> ArraySlice<Int32> {
    let first = Int(share.start) / kvPageSize
    let last = Int(share.start + share.count - 1) / kvPageSize
    return batch.pages[Int(share.pageOffset) + first...Int(share.pageOffset) + last]
  }
}

/// The function that `FakeExecutor` computes: the next token is a hash of all tokens before it and of the seed.
public struct FakeModel: Sendable {
  /// Tokens drawn lie in 0..<vocabularySize.
  public var vocabularySize: Int

  /// Makes a model.
  public init(vocabularySize: Int) {
    precondition(vocabularySize > 0, "a vocabulary holds at least one token")
    self.vocabularySize = vocabularySize
  }

  /// The state before the first token.
  func start() -> UInt64 { 0x243F_6A88_85A3_08D3 }

  /// The state after one more token.
  func advance(_ state: UInt64, _ token: TokenID, at position: Int) -> UInt64 {
    mix(state ^ UInt64(UInt32(bitPattern: token)) ^ UInt64(truncatingIfNeeded: position) << 32)
  }

  /// The token drawn in a state.
  func draw(_ state: UInt64, seed: UInt64) -> TokenID {
    TokenID(mix(state ^ mix(seed)) % UInt64(vocabularySize))
  }

  /// Log-probabilities that are as reproducible as the text.
  func logprobs(_ state: UInt64, chosen: TokenID, options: LogprobOptions?) -> PositionLogprobs {
    func entry(_ token: TokenID) -> TokenLogprob {
      TokenLogprob(token: token, logprob: -Float(mix(state ^ UInt64(UInt32(bitPattern: token))) % 1000) / 100)
    }
    let top = (0..<TokenID(options?.topCount ?? 0)).map(entry).sorted {
      ($1.logprob ?? 0, $0.token) < ($0.logprob ?? 0, $1.token)
    }
    return PositionLogprobs(chosen: entry(chosen), top: top, requested: (options?.tokenIDs ?? []).map(entry))
  }

  private func mix(_ value: UInt64) -> UInt64 {
    // The finalizer of SplitMix64.
    var hash = value &+ 0x9E37_79B9_7F4A_7C15
    hash = (hash ^ (hash >> 30)) &* 0xBF58_476D_1CE4_E5B9
    hash = (hash ^ (hash >> 27)) &* 0x94D0_49BB_1331_11EB
    return hash ^ (hash >> 31)
  }

  /// The generation of a request, computed without an engine: its output tokens and why it ends.
  ///
  /// - Parameters:
  ///   - contextLength: the longest sequence.
  ///   - capacityTokens: tokens that the K/V pool holds; a longer sequence is aborted, which is `nil` here.
  public func reference(
    _ submission: Submission, contextLength: Int, capacityTokens: Int
  ) -> (tokens: [TokenID], reason: FinishReason?) {
    let stops = submission.sampling.stopTokenIDs + (submission.sampling.ignoreEOS ? [] : submission.eosTokenIDs)
    let limit = min(submission.sampling.maxNewTokens ?? .max, contextLength - submission.tokens.count)
    var state = start()
    for (position, token) in submission.tokens.enumerated() { state = advance(state, token, at: position) }
    var outputs: [TokenID] = []
    while outputs.count < limit {
      // The next draw needs the K/V of everything before it.
      let count = submission.tokens.count + outputs.count
      if count > capacityTokens { return (outputs, nil) }
      let token = draw(state, seed: submission.sampling.seed ?? 0)
      outputs.append(token)
      if stops.contains(token) { return (outputs, .stop(.token(token))) }
      state = advance(state, token, at: count)
    }
    return (outputs, .length)
  }

  /// The prompt's log-probabilities from a position on, computed without an engine.
  public func promptLogprobs(_ submission: Submission) -> [PositionLogprobs]? {
    guard let first = submission.logprobs?.promptStart else { return nil }
    var state = start()
    var values: [PositionLogprobs] = []
    for (position, token) in submission.tokens.enumerated() {
      if position >= first {
        values.append(
          position == 0
            ? PositionLogprobs(chosen: TokenLogprob(token: token, logprob: nil))
            : logprobs(state, chosen: token, options: submission.logprobs))
      }
      state = advance(state, token, at: position)
    }
    return values
  }

  /// The log-probabilities of outputs, computed without an engine.
  public func logprobs(_ submission: Submission, outputs: [TokenID]) -> [PositionLogprobs] {
    var state = start()
    for (position, token) in submission.tokens.enumerated() { state = advance(state, token, at: position) }
    var values: [PositionLogprobs] = []
    for (index, token) in outputs.enumerated() {
      values.append(logprobs(state, chosen: token, options: submission.logprobs))
      state = advance(state, token, at: submission.tokens.count + index)
    }
    return values
  }
}

/// A small deterministic generator (SplitMix64) for tests that must repeat from a seed.
public struct SeededGenerator: RandomNumberGenerator, Sendable {
  private var state: UInt64

  /// Equal seeds give equal sequences.
  public init(seed: UInt64) { state = seed }

  public mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var hash = state
    hash = (hash ^ (hash >> 30)) &* 0xBF58_476D_1CE4_E5B9
    hash = (hash ^ (hash >> 27)) &* 0x94D0_49BB_1331_11EB
    return hash ^ (hash >> 31)
  }

  /// True with the chance given.
  public mutating func chance(_ probability: Double) -> Bool { Double.random(in: 0..<1, using: &self) < probability }
}
