public import ApusCore
public import ApusModels
public import ApusScheduling
public import ApusTensors
import Glibc

/// Computes one step after another on the calling thread: forward pass, logits of the rows that need them, draws.
///
/// All memory is allocated here at the start; a step allocates only for log-probabilities and for what a request that
/// enters a slot brings with it. `ModelRunner` runs this on a thread of its own.
public final class StepRunner: @unchecked Sendable {
  // Unchecked: one thread at a time uses it.

  /// The model.
  public let model: LanguageModel
  /// K and V of the requests.
  public let pool: KVPool
  /// The most tokens and requests of a step.
  public let maxTokensPerStep: Int
  public let maxRunningRequests: Int

  let backend: any Backend
  let state: ForwardState
  var slots: [SamplerSlot?]
  /// Who drafts tokens, if anybody does.
  var drafter: (any Drafter)?
  /// By slot: all tokens known, where somebody drafts.
  var sequences: [[TokenID]] = []
  /// Pages of the pool behind those that requests have, for the leaves of draft trees.
  let treePages: Int
  /// The step's trees.
  var trees = TreePass(ScheduleBatch(), scratch: 0..<0)
  /// By request of the step: the drafts that were accepted, where they are a tree.
  var acceptedNodes: [Int: [Int]] = [:]
  /// How many trees were verified, and how many times the text went another way than the most likely one. For tests.
  package internal(set) var treeCounts = (verified: 0, moved: 0)

  // The pass, flat.
  private let tokens: UnsafeMutablePointer<TokenID>
  private let positions: UnsafeMutablePointer<Int32>
  private let kvSlots: UnsafeMutablePointer<Int32>
  let rowStart: UnsafeMutablePointer<Int32>
  private let start: UnsafeMutablePointer<Int32>
  private let pageOffset: UnsafeMutablePointer<Int32>

  // The rows whose logits are computed, in blocks of at most `logits.rows`.
  let logitScratch: LogitScratch
  let logits: Tensor
  private let rawRow: Tensor
  let rowNumbers: UnsafeMutablePointer<Int32>
  private let samplingRows: UnsafeMutablePointer<SamplingRow>
  private let drawn: UnsafeMutablePointer<TokenID>
  private var plan: [LogitRow] = []
  /// Tokens that come after the one draw that was planned for: accepted drafts' successors, and what a grammar forces.
  private var extras: [(tokenIndex: Int, tokens: [TokenID])] = []
  /// Log-probabilities of draws: those of the planned draw have offset 0, those of the extras after it 1 and more.
  private var drawnLogprobs: [(tokenIndex: Int, offset: Int, values: PositionLogprobs)] = []
  /// Tokens drawn in the verification under way, and whether the last one was as drafted.
  private var verified: [TokenID] = []
  /// Tokens that a grammar forces after those, in reverse.
  private var stillForced: [TokenID] = []
  private var isVerifying = false
  /// The row that the next token is drawn from: the number of drafts before it in the list.
  private var verifiedDraft = 0
  let masks: MaskFiller
  private var asksForMasks = false
  /// When the last step ended.
  private var lastEnd = 0.0

  /// One row of logits and what it is for.
  private struct LogitRow {
    enum Purpose { case draw, drawWithLogprobs, verify, forced, prompt }
    var row: Int32
    /// Index in the batch's requests.
    var request: Int
    /// Index in the result's tokens of the token to draw.
    var tokenIndex = 0
    /// Of the token that the row predicts.
    var position: Int
    var purpose: Purpose
    /// For `verify`, how many draft tokens stand before the token that the row predicts.
    var draft = 0
    /// For `forced`, the token that the row predicts.
    var token: TokenID = 0
  }

  /// For each request of the batch, whether a token is drawn in the step.
  private var draws: [Bool] = []

  /// Allocates everything a step needs.
  ///
  /// - Parameter maskThreads: threads that fill grammars' masks while the model computes, at most; `nil` for as many as the
  ///   machine suggests. With none every mask is filled just before its draw. Changes no bit of any result.
  /// - Parameter treePages: how many pages at the end of the pool belong to draft trees and to no request.
  /// - Throws: `outOfMemory`.
  public init(
    model: LanguageModel, pool: KVPool, backend: any Backend, maxTokensPerStep: Int, maxRunningRequests: Int,
    maskThreads: Int? = nil, treePages: Int = 0
  ) throws(EngineError) {
    self.treePages = treePages
    precondition(maxTokensPerStep >= 1 && maxRunningRequests >= 1)
    self.model = model
    self.pool = pool
    self.backend = backend
    self.maxTokensPerStep = maxTokensPerStep
    self.maxRunningRequests = maxRunningRequests
    state = try ForwardState(
      shape: model.activationShape, maxRows: maxTokensPerStep, kvLayers: pool.layers, backend: backend)
    let logitRows = Self.logitRows(maxRunningRequests: maxRunningRequests)
    let vocabulary = model.configuration.vocabularySize
    logitScratch = try LogitScratch(rows: logitRows, hiddenSize: model.configuration.hiddenSize, backend: backend)
    logits = try backend.allocate(rows: logitRows, columns: vocabulary, dtype: .float32)
    rawRow = try backend.allocate(rows: 1, columns: vocabulary, dtype: .float32)
    masks = MaskFiller(threadCount: maskThreads ?? MaskFiller.defaultThreadCount, capacity: maxRunningRequests)
    slots = Array(repeating: nil, count: maxRunningRequests)
    plan.reserveCapacity(maxTokensPerStep + maxRunningRequests)
    tokens = .allocate(capacity: maxTokensPerStep)
    positions = .allocate(capacity: maxTokensPerStep)
    kvSlots = .allocate(capacity: maxTokensPerStep)
    rowStart = .allocate(capacity: maxRunningRequests + 1)
    start = .allocate(capacity: maxRunningRequests)
    pageOffset = .allocate(capacity: maxRunningRequests)
    rowNumbers = .allocate(capacity: logitRows)
    samplingRows = .allocate(capacity: logitRows)
    drawn = .allocate(capacity: logitRows)
  }

  deinit {
    masks.stop()
    tokens.deallocate()
    positions.deallocate()
    kvSlots.deallocate()
    rowStart.deallocate()
    start.deallocate()
    pageOffset.deallocate()
    rowNumbers.deallocate()
    samplingRows.deallocate()
    drawn.deallocate()
  }

  /// Rows of logits computed at once. More rows are computed block by block, which changes no bit of any.
  /// At least 16, so that the log-probabilities of a long prompt do not read the output layer once per token.
  static func logitRows(maxRunningRequests: Int) -> Int { min(max(maxRunningRequests, 16), 64) }

  /// Bytes of activations and logits for the limits given.
  static func activationBytes(
    _ configuration: ModelConfiguration, shape: ActivationShape, maxTokensPerStep: Int, maxRunningRequests: Int
  ) -> Int {
    let logitRows = logitRows(maxRunningRequests: maxRunningRequests)
    return maxTokensPerStep * shape.bytesPerRow
      + 4 * logitRows * (configuration.vocabularySize + 3 * configuration.hiddenSize)
  }

  /// Runs one step and adds what it brought to `result`, which arrives empty.
  ///
  /// A request whose logits are not finite, or all of whose tokens are forbidden, is listed in `failures`; the token
  /// reported for it is 0 and means nothing.
  public func run(_ batch: ScheduleBatch, into result: inout StepResult) {
    let begin = monotonicSeconds()
    for slot in batch.released { release(Int(slot)) }
    for assignment in batch.assigned {
      assign(assignment)
      if let constraint = slots[Int(assignment.slot)]!.constraint { ask(constraint) }
    }
    startMasks()
    if !batch.requests.isEmpty {
      forward(batch)
      decideDraws(batch, into: &result)
      makePlan(batch, into: &result)
      runPlan(batch, into: &result)
      insertExtras(into: &result)
      if !trees.isEmpty { settleTrees(batch, result) }
      if drafter != nil {
        let begin = monotonicSeconds()
        draft(batch, into: &result)
        result.draftSeconds = monotonicSeconds() - begin
      }
      // What the tokens just drawn leave open is known now: the masks are filled beside the next pass. Not before all
      // draws are taken down, since requests of one grammar wait for one another.
      for request in batch.requests {
        if let constraint = slots[Int(request.slot)]!.constraint { ask(constraint) }
      }
      startMasks()
      if result.failures.count > 1 { result.failures.sort { $0.request < $1.request } }
    }
    let end = monotonicSeconds()
    result.forwardSeconds = end - begin
    result.stepSeconds = lastEnd > 0 ? end - lastEnd : 0
    lastEnd = end
  }

  // MARK: Masks

  /// How many masks were filled beside a forward pass, and how many by the thread that draws.
  package var maskCounts: (ahead: Int, onDemand: Int) { masks.counts }

  private func ask(_ constraint: MaskedMatcher) {
    constraint.fillAhead()
    asksForMasks = true
  }

  private func startMasks() {
    if asksForMasks || masks.isPaused { masks.start() }
    asksForMasks = false
  }

  // MARK: Forward pass

  func forward(_ batch: ScheduleBatch) {
    require(batch.requests.count <= maxRunningRequests, "A step has more requests than there are slots.")
    var rows = 0
    var reach = 0
    acceptedNodes.removeAll(keepingCapacity: true)
    trees = TreePass(batch, scratch: pool.pageCount - treePages..<pool.pageCount)
    for (index, request) in batch.requests.enumerated() {
      let (first, count) = (Int(request.start), Int(request.count))
      require(count >= 1 && rows + count <= maxTokensPerStep, "A step has more tokens than its limit.")
      require(
        first + count <= model.contextLength && first + count <= Int(request.pageCount) * kvPageSize,
        "A request's tokens lie beyond its pages or the context.")
      rowStart[index] = Int32(rows)
      start[index] = request.start
      pageOffset[index] = request.pageOffset
      let known = count - Int(request.draftCount)
      for offset in 0..<count {
        if !trees.isEmpty {
          let node = trees.layouts[index] != nil && offset >= known ? offset - known : -1
          let position = node < 0 ? first + offset : first + known - 1 + trees.layouts[index]!.depths[node]
          tokens[rows + offset] = batch.tokens[Int(request.tokenOffset) + offset]
          positions[rows + offset] = Int32(position)
          kvSlots[rows + offset] = trees.place(row: rows + offset, request: index, position: position, node: node)
          continue
        }
        let position = first + offset
        let page = batch.pages[Int(request.pageOffset) + position / kvPageSize]
        tokens[rows + offset] = batch.tokens[Int(request.tokenOffset) + offset]
        positions[rows + offset] = Int32(position)
        kvSlots[rows + offset] = page * Int32(kvPageSize) + Int32(position % kvPageSize)
      }
      if request.lastTokenIsInFlight { tokens[rows + count - 1] = slots[Int(request.slot)]!.lastToken }
      rows += count
      reach = max(reach, first + count)
    }
    rowStart[batch.requests.count] = Int32(rows)

    model.prepare(positions: reach)
    if !trees.isEmpty { return forwardTrees(rows: rows, tokens: tokens, positions: positions, slots: kvSlots) }
    batch.pages.withUnsafeBufferPointer { pages in
      state.begin(
        ForwardBatch(
          rowCount: rows, tokens: tokens, positions: positions, slots: kvSlots,
          attention: AttentionBatch(
            sequenceCount: batch.requests.count, rowStart: rowStart, start: start, pageOffset: pageOffset,
            pages: pages.baseAddress!)))
      model.executor.run(state)
    }
  }

  // MARK: Logits

  /// Lists the rows that need logits: draws first, those with log-probabilities last among them, then prompt rows.
  private func makePlan(_ batch: ScheduleBatch, into result: inout StepResult) {
    plan.removeAll(keepingCapacity: true)
    for wantsLogprobs in [false, true] {
      var tokenIndex = 0
      for (index, request) in batch.requests.enumerated() where draws[index] {
        if request.draftCount == 0 && (slots[Int(request.slot)]!.logprobs != nil) == wantsLogprobs {
          plan.append(
            LogitRow(
              row: rowStart[index + 1] - 1, request: index, tokenIndex: tokenIndex,
              position: Int(request.start + request.count), purpose: wantsLogprobs ? .drawWithLogprobs : .draw))
        }
        tokenIndex += 1
      }
    }
    var tokenIndex = 0
    for (index, request) in batch.requests.enumerated() where draws[index] {
      if request.draftCount > 0 {
        let base = Int(request.start + request.count - request.draftCount)
        for draft in 0...request.draftCount {
          let fromEnd = request.draftCount - draft
          let depth = draft == 0 ? 0 : depth(request: index, draft: Int(draft) - 1)
          plan.append(
            LogitRow(
              row: rowStart[index + 1] - 1 - fromEnd, request: index, tokenIndex: tokenIndex,
              position: base + depth, purpose: .verify, draft: Int(draft)))
        }
      }
      tokenIndex += 1
    }
    for (index, request) in batch.requests.enumerated() {
      result.tokenCounts.append(draws[index] ? 1 : 0)
      if draws[index] { result.tokens.append(0) }
      let slot = Int(request.slot)
      if slots[slot]!.logprobs != nil {
        // The row of a forced token's predecessor, wherever it lies. Those among drafts are seen to in verifying them.
        let (forced, position) = slots[slot]!.takeUnscored(
          before: Int(request.start + request.count - request.draftCount) + 1)
        for (offset, token) in forced.enumerated() {
          plan.append(
            LogitRow(
              row: rowStart[index] + Int32(position + offset) - 1 - request.start, request: index,
              position: position + offset, purpose: .forced, token: token))
        }
      }
      let first = max(request.start, request.promptLogprobStart)
      let end = min(request.start + request.count, request.promptLogprobEnd)
      guard first < end else { continue }
      for position in first..<end {
        plan.append(
          LogitRow(
            row: rowStart[index] + position - request.start, request: index, position: Int(position) + 1,
            purpose: .prompt))
      }
    }
  }

  /// Decides for which requests a token is drawn. Not if the step before this one, which ran after this one was decided,
  /// brought that token already, because a grammar forced it, or brought no token that this one could go on from; and not if
  /// the mask of what may follow is not there in time.
  private func decideDraws(_ batch: ScheduleBatch, into result: inout StepResult) {
    draws.removeAll(keepingCapacity: true)
    var wanted: [MaskedMatcher] = []
    var wantedRequests: [Int] = []
    for (index, request) in batch.requests.enumerated() {
      let slot = Int(request.slot)
      var draws = request.samples && slots[slot]!.forcedEnd <= Int(request.start + request.count)
      if slots[slot]!.isPostponed {
        if request.lastTokenIsInFlight { draws = false } else { slots[slot]!.isPostponed = false }
      }
      self.draws.append(draws)
      guard draws, let constraint = slots[slot]!.constraint else { continue }
      wanted.append(constraint)
      wantedRequests.append(index)
    }
    if wanted.isEmpty { return }
    let isThere = masks.gather(wanted, othersGoOn: wanted.count < batch.requests.count)
    for (number, index) in wantedRequests.enumerated() where !isThere[number] {
      draws[index] = false
      slots[Int(batch.requests[index].slot)]!.isPostponed = true
      result.postponed.append(index)
    }
  }

  private func runPlan(_ batch: ScheduleBatch, into result: inout StepResult) {
    var begin = 0
    while begin < plan.count {
      let end = min(begin + logits.rows, plan.count)
      for index in begin..<end { rowNumbers[index - begin] = plan[index].row }
      let block = logits.prefix(rows: end - begin)
      model.logits(state, rows: rowNumbers, count: end - begin, scratch: logitScratch, out: block)

      // Finish the plain draws of the block in one call, then the rows with log-probabilities one by one.
      var plainCount = 0
      while begin + plainCount < end, plan[begin + plainCount].purpose == .draw { plainCount += 1 }
      if plainCount > 0 { drawPlain(batch, block.prefix(rows: plainCount), planOffset: begin, into: &result) }
      for index in begin + plainCount..<end {
        let row = block.rows(index - begin..<index - begin + 1)
        switch plan[index].purpose {
        case .prompt: reportPrompt(batch, plan[index], row, into: &result)
        case .forced: reportForced(batch, plan[index], row, into: &result)
        case .verify: verify(batch, plan[index], row, into: &result)
        case .draw, .drawWithLogprobs:
          if let token = draw(batch, plan[index], row, offset: 0, into: &result) {
            finishDraw(batch, plan[index], token, into: &result)
          }
        }
      }
      begin = end
    }
  }

  private func drawPlain(_ batch: ScheduleBatch, _ block: Tensor, planOffset: Int, into result: inout StepResult) {
    for index in 0..<block.rows {
      let entry = plan[planOffset + index]
      let slot = Int(batch.requests[entry.request].slot)
      if !block.isFinite(row: index) {
        fail(entry.request, "The model computed logits that are not finite numbers.", into: &result)
      }
      slots[slot]!.prepare(block, row: index, position: entry.position, backend: backend)
      samplingRows[index] = slots[slot]!.row
    }
    backend.sample(logits: block, rows: samplingRows, tokens: drawn)
    for index in 0..<block.rows {
      finishDraw(batch, plan[planOffset + index], drawn[index], into: &result)
    }
  }

  /// Draws from one row, with log-probabilities if they are wanted.
  /// - Parameter offset: how many tokens the step has brought the request before this one.
  /// - Returns: the token, negative if all are forbidden; `nil` if the logits are no numbers, which is reported.
  private func draw(
    _ batch: ScheduleBatch, _ entry: LogitRow, _ row: Tensor, offset: Int, into result: inout StepResult
  ) -> TokenID? {
    let slot = Int(batch.requests[entry.request].slot)
    guard row.isFinite(row: 0) else {
      fail(entry.request, "The model computed logits that are not finite numbers.", into: &result)
      return nil
    }
    // The draw changes the row; log-probabilities are those of the raw logits.
    let options = slots[slot]!.logprobs
    if options != nil {
      var first: Int32 = 0
      backend.gather(row, rows: &first, count: 1, out: rawRow)
    }
    slots[slot]!.prepare(row, row: 0, position: entry.position, backend: backend)
    samplingRows[0] = slots[slot]!.row
    backend.sample(logits: row, rows: samplingRows, tokens: drawn)
    let token = drawn[0]
    if token >= 0, let options {
      drawnLogprobs.append((entry.tokenIndex, offset, positionLogprobs(rawRow, chosen: token, options: options)))
    }
    return token
  }

  /// Draws from the row before a draft token or of one, as plain decoding would: the random number of a draw is its
  /// position's, so the tokens are the same with and without drafts.
  private func verify(_ batch: ScheduleBatch, _ entry: LogitRow, _ row: Tensor, into result: inout StepResult) {
    if entry.draft == 0 {
      isVerifying = true
      verifiedDraft = 0
      acceptedNodes[entry.request] = nil
      verified.removeAll(keepingCapacity: true)
      stillForced.removeAll(keepingCapacity: true)
    }
    // Of a tree only the rows on the way of the text count.
    guard isVerifying, entry.draft == verifiedDraft else { return }
    let request = batch.requests[entry.request]
    let slot = Int(request.slot)
    // What a grammar forces is not drawn here either: plain decoding would not have asked the model how to spell it.
    var next = stillForced.popLast()
    // A row behind the first that cannot be drawn from fails when it comes first in a later step, as in plain decoding. What
    // was drawn before it stands, and may have ended the request.
    let isFirst = verified.isEmpty
    if next == nil, isFirst || row.isFinite(row: 0),
      let token = draw(batch, entry, row, offset: verified.count, into: &result), token >= 0
    {
      slots[slot]!.append(token)
      stillForced = slots[slot]!.takeForcedTokens(after: entry.position).reversed()
      next = token
    } else if let token = next, !row.isFinite(row: 0) {
      stillForced.append(token)
      next = nil
    } else if let token = next, let options = slots[slot]!.logprobs {
      _ = slots[slot]!.takeUnscored(before: entry.position + 1)
      drawnLogprobs.append((entry.tokenIndex, verified.count, positionLogprobs(row, chosen: token, options: options)))
    }
    if let token = next {
      verified.append(token)
      if let draft = follower(of: entry.draft - 1, token: token, request: entry.request, in: batch) {
        verifiedDraft = draft + 1
        return
      }
    } else if isFirst, !result.failures.contains(where: { $0.request == entry.request }) {
      failDraw(entry.request, slot: slot, into: &result)
    }
    isVerifying = false
    result.acceptedDrafts.append((request: entry.request, count: max(0, verified.count - 1)))
    guard let first = verified.first else { return }
    result.tokens[entry.tokenIndex] = first
    let more = verified.dropFirst() + stillForced.reversed()
    if !more.isEmpty { extras.append((entry.tokenIndex, Array(more))) }
  }

  /// Puts a drawn token into the result and the slot.
  private func finishDraw(
    _ batch: ScheduleBatch, _ entry: LogitRow, _ token: TokenID, into result: inout StepResult
  ) {
    if token >= 0 {
      result.tokens[entry.tokenIndex] = token
      let slot = Int(batch.requests[entry.request].slot)
      slots[slot]!.append(token)
      let tokens = slots[slot]!.takeForcedTokens(after: entry.position)
      if !tokens.isEmpty { extras.append((entry.tokenIndex, tokens)) }
    } else if !result.failures.contains(where: { $0.request == entry.request }) {
      failDraw(entry.request, slot: Int(batch.requests[entry.request].slot), into: &result)
    }
  }

  private func failDraw(_ request: Int, slot: Int, into result: inout StepResult) {
    let failure = slots[slot]!.constraint?.failure
    fail(request, failure?.message ?? "No token can be drawn: every one of them is forbidden.", into: &result)
  }

  /// Puts tokens behind the planned draws that they follow, and log-probabilities beside the tokens that they are of.
  private func insertExtras(into result: inout StepResult) {
    if extras.isEmpty && drawnLogprobs.isEmpty { return }
    extras.sort { $0.tokenIndex < $1.tokenIndex }
    drawnLogprobs.sort { ($0.tokenIndex, $0.offset) < ($1.tokenIndex, $1.offset) }
    let planned = result.tokens
    result.tokens.removeAll(keepingCapacity: true)
    var extra = 0
    var logprob = 0
    var request = 0
    for (index, token) in planned.enumerated() {
      while result.tokenCounts[request] == 0 { request += 1 }
      while logprob < drawnLogprobs.count && drawnLogprobs[logprob].tokenIndex == index {
        result.logprobs.append(
          (index: result.tokens.count + drawnLogprobs[logprob].offset, values: drawnLogprobs[logprob].values))
        logprob += 1
      }
      result.tokens.append(token)
      if extra < extras.count && extras[extra].tokenIndex == index {
        result.tokens += extras[extra].tokens
        result.tokenCounts[request] += Int32(extras[extra].tokens.count)
        extra += 1
      }
      request += 1
    }
    extras.removeAll(keepingCapacity: true)
    drawnLogprobs.removeAll(keepingCapacity: true)
  }

  private func reportPrompt(
    _ batch: ScheduleBatch, _ entry: LogitRow, _ row: Tensor, into result: inout StepResult
  ) {
    let slot = slots[Int(batch.requests[entry.request].slot)]!
    guard let options = slot.logprobs, entry.position < slot.knownTokens.count else { return }
    let token = slot.knownTokens[entry.position]
    result.promptLogprobs.append(
      (
        request: entry.request, position: entry.position,
        values: positionLogprobs(row, chosen: token, options: options)
      ))
  }

  /// Gives a forced token the log-probability that it would have had as a draw.
  private func reportForced(
    _ batch: ScheduleBatch, _ entry: LogitRow, _ row: Tensor, into result: inout StepResult
  ) {
    guard let options = slots[Int(batch.requests[entry.request].slot)]!.logprobs else { return }
    guard row.isFinite(row: 0) else {
      if !result.failures.contains(where: { $0.request == entry.request }) {
        fail(entry.request, "The model computed logits that are not finite numbers.", into: &result)
      }
      return
    }
    result.forcedLogprobs.append(
      (
        request: entry.request, position: entry.position,
        values: positionLogprobs(row, chosen: entry.token, options: options)
      ))
  }

  /// Log-softmax of a row of raw logits at the tokens wanted: before temperature, penalties and bias.
  private func positionLogprobs(_ row: Tensor, chosen: TokenID, options: LogprobOptions) -> PositionLogprobs {
    let total = backend.logSumExp(logits: row, row: 0)
    let values = row.float32
    func entry(_ token: TokenID) -> TokenLogprob {
      TokenLogprob(token: token, logprob: values[Int(token)] - total)
    }
    let count = min(max(options.topCount, 0), row.columns)
    var top: [TokenLogprob] = []
    if count > 0 {
      let best = withUnsafeTemporaryAllocation(of: TokenID.self, capacity: count) { tokens in
        withUnsafeTemporaryAllocation(of: Float.self, capacity: count) { numbers in
          backend.topK(
            logits: row, row: 0, k: count, tokens: tokens.baseAddress!, values: numbers.baseAddress!)
          return zip(tokens, numbers).map { TokenLogprob(token: $0, logprob: $1 - total) }
        }
      }
      top = best
    }
    return PositionLogprobs(chosen: entry(chosen), top: top, requested: options.tokenIDs.map(entry))
  }

  private func fail(_ request: Int, _ reason: String, into result: inout StepResult) {
    result.failures.append((request: request, reason: reason))
  }

  // MARK: Without a scheduler

  /// Runs the forward pass over one sequence, in chunks of at most `maxTokensPerStep` tokens. Uses the first pages of the pool
  /// and no slot, so it must not be mixed with steps in flight.
  ///
  /// - Parameters:
  ///   - chunk: tokens computed at once; `nil` for `maxTokensPerStep`. Changes no bit of the result.
  ///   - body: called after each chunk with its positions, whose hidden states are rows 0, 1, ... of the state.
  func forwardAlone(_ tokens: [TokenID], chunk: Int?, _ body: (Range<Int>) -> Void) {
    let step = min(chunk ?? maxTokensPerStep, maxTokensPerStep)
    let pageCount = (tokens.count + kvPageSize - 1) / kvPageSize
    for start in stride(from: 0, to: tokens.count, by: step) {
      let positions = start..<min(start + step, tokens.count)
      var batch = ScheduleBatch()
      batch.tokens = Array(tokens[positions])
      batch.pages = (0..<pageCount).map(Int32.init)
      batch.requests = [
        ScheduledRequest(
          slot: 0, start: Int32(start), count: Int32(positions.count), tokenOffset: 0, pageOffset: 0,
          pageCount: Int32(pageCount), lastTokenIsInFlight: false, samples: false)
      ]
      forward(batch)
      body(positions)
    }
  }

  /// The raw logits of the positions given, for a prompt computed alone in chunks. Uses the first pages of the pool and no
  /// slot, so it must not be mixed with steps in flight. For tests and tools.
  ///
  /// - Throws: `invalidRequest` if a token or position is impossible or the prompt does not fit.
  public func promptLogits(
    _ prompt: [TokenID], positions wanted: [Int], chunk: Int? = nil
  ) throws(EngineError) -> [[Float]] {
    let vocabulary = model.configuration.vocabularySize
    guard !prompt.isEmpty, prompt.allSatisfy({ $0 >= 0 && Int($0) < vocabulary }),
      wanted.allSatisfy({ prompt.indices.contains($0) })
    else { throw EngineError(.invalidRequest, "The prompt holds an impossible token, or a position lies outside it.") }
    let pageCount = (prompt.count + kvPageSize - 1) / kvPageSize
    guard pageCount <= pool.pageCount, prompt.count <= model.contextLength else {
      throw EngineError(.invalidRequest, "The prompt of \(prompt.count) tokens does not fit the pool or the context.")
    }
    var found: [Int: [Float]] = [:]
    forwardAlone(prompt, chunk: chunk) { chunk in
      for position in wanted where chunk.contains(position) {
        var row = Int32(position - chunk.lowerBound)
        model.logits(state, rows: &row, count: 1, scratch: logitScratch, out: rawRow)
        found[position] = Array(UnsafeBufferPointer(start: rawRow.float32, count: vocabulary))
      }
    }
    return wanted.map { found[$0]! }
  }
}

extension Tensor {
  /// Whether all numbers of a row of float32 are finite: zero times each adds up to zero only then.
  func isFinite(row: Int) -> Bool {
    let values = float32 + row * stride
    var sums = SIMD16<Float>(repeating: 0)
    var index = 0
    while index + 16 <= columns {
      let numbers = UnsafeRawPointer(values + index).loadUnaligned(as: SIMD16<Float>.self)
      sums += numbers * 0
      index += 16
    }
    var sum = sums.sum()
    while index < columns {
      sum += values[index] * 0
      index += 1
    }
    return sum == 0
  }
}

/// Stops the process with a sentence that survives in release builds: the scheduler broke its contract.
private func require(_ condition: Bool, _ sentence: StaticString) {
  if !condition { fatalError("\(sentence)") }
}

/// Seconds of the monotonic clock.
package func monotonicSeconds() -> Double {
  var time = timespec()
  clock_gettime(CLOCK_MONOTONIC, &time)
  return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
}
