import ApusCore
import ApusModels
import ApusScheduling
import ApusTensors
import Glibc

/// Drafts with a model: a prediction layer of the target's checkpoint, an EAGLE head, or a small model of its own.
///
/// **K/V.** The drafter's pool has the target's pages under the same numbers, so that it needs no allocator: prefixes that
/// are cached, shared or retracted are so for both. `validCells` says how many of a page's first cells hold what belongs to
/// the target's; whatever the target writes makes a page's later cells invalid. What is missing is computed when drafts are
/// wanted, from the tokens and, for a prediction layer, from the target's hidden states, which are kept beside the pages for
/// every token. So a server that does not draft, because too much runs, computes nothing here, and a prompt that was cached
/// meanwhile is drafted for later.
///
/// **Drafting.** First the missing rows of all lines, in passes of at most `maxRows`; the last row of each line gives its
/// first draft. Then one row for each line and draft. Those rows' K/V go to cells behind the sequence, in the request's last
/// page or in scratch pages; they count for nothing afterwards, and the next time the rows are computed anew.
///
/// A head's row at position p depends on the token at p + 1. So the last row of a cached page may have been
/// computed for another continuation than the one that uses it: a slightly worse guess, at one position, and still no other
/// output.
final class ModelDrafter: Drafter {
  /// Who drafts.
  enum Network {
    /// A model of its own: the row at p is the token at p.
    case standalone(LanguageModel)
    /// A prediction layer or an EAGLE head: the row at p is a hidden state of the target at p and the token at p + 1.
    case prediction(any PredictionHead)

    /// Bytes that a page takes. Scratch pages keep no hidden states.
    func bytesPerPage(dtype: DType, isScratch: Bool = false) -> Int {
      switch self {
      case .standalone(let model):
        KVPool.bytesPerPage(layerCount: model.configuration.layerCount, layout: model.kvLayout, dtype: dtype)
      case .prediction(let head):
        KVPool.bytesPerPage(layerCount: 1, layout: head.kvLayout, dtype: dtype)
          + (isScratch ? 0 : kvPageSize * head.hiddenSize * 4)
      }
    }

    /// The target's layers that have to be captured.
    var capturedLayers: [Int] {
      if case .prediction(let head) = self { head.capturedLayers } else { [] }
    }

    var activationShape: ActivationShape {
      switch self {
      case .standalone(let model): model.activationShape
      case .prediction(let layer): layer.activationShape
      }
    }
  }

  /// Lines that are drafted for at once, at most; more get no drafts.
  static let maxLines = 64
  /// Pages of a line's scratch: room for the most drafts, and for the tokens of which the target has no K/V yet.
  static let scratchPages = 8
  /// Lines for which trees are drafted at once, at most; where there are more, chains are.
  static let treeLines = 4
  /// The deepest tree: a way through it lies in two pages behind the sequence's whole ones.
  static let treeDepth = 16

  private let network: Network
  private let target: LanguageModel
  private let backend: any Backend
  private let pool: KVPool
  /// The target's pages; scratch pages follow.
  private let pageCount: Int
  /// How many tokens are drafted for one place, and for all places of a tree; 1 for chains.
  private let tree: DraftTreeShape
  /// The first of the pages for ways through trees: by line, two for each way, twice in turns.
  private let treeBase: Int
  private let state: ForwardState
  private let maxRows: Int
  /// Rows that are made up for in one step, at most, so that a long prompt does not keep others waiting. The next steps go
  /// on with the rest.
  private let missingRows: Int
  /// By page: how many of its first cells hold K/V that belong to what the target's page holds.
  private var validCells: [UInt8]

  // For a prediction layer.
  /// By cell of the pool: the hidden state that the head takes from the target.
  private let hiddenCells: Tensor?
  private let targetScratch: HiddenScratch?
  /// The hidden states of a pass's rows, and its joined inputs.
  private let hiddenRows: Tensor?
  private let joinedRows: Tensor?
  /// By line: the hidden state that its last draft was made of.
  private let carriedRows: Tensor?

  private let logitScratch: LogitScratch
  private let logits: Tensor
  private let vocabulary: Int
  /// Where the head drafts a part of the vocabulary: its logits, and the token of each column.
  private let reducedLogits: Tensor?
  private let tokenOfColumn: [TokenID]
  private let hiddenSize: Int
  /// Sees the logits that drafts are drawn from, for tests.
  var observer: (([Float]) -> Void)?

  private let tokens: UnsafeMutablePointer<TokenID>
  private let positions: UnsafeMutablePointer<Int32>
  private let kvSlots: UnsafeMutablePointer<Int32>
  private let rowStart: UnsafeMutablePointer<Int32>
  private let start: UnsafeMutablePointer<Int32>
  private let pageOffset: UnsafeMutablePointer<Int32>
  private let rowNumbers: UnsafeMutablePointer<Int32>

  /// Allocates all memory.
  /// - Throws: `outOfMemory`; `unsupported` for a cache format that the layers cannot have.
  init(
    _ network: Network, target: LanguageModel, pageCount: Int, kvDType: DType, maxTokensPerStep: Int,
    maxRunningRequests: Int, tree: DraftTreeShape = DraftTreeShape(), backend: any Backend
  ) throws(EngineError) {
    self.tree = tree
    self.network = network
    self.target = target
    self.backend = backend
    self.pageCount = pageCount
    let fewest = min(Self.maxLines, maxRunningRequests)
    let lines = max(fewest, Self.treeRows(tree))
    maxRows = min(max(lines, 256), max(lines, maxTokensPerStep))
    // A prediction layer is one layer of many.
    if case .prediction = network { missingRows = 8 * maxRows } else { missingRows = maxRows }
    treeBase = pageCount + lines * Self.scratchPages
    let allPages = treeBase + 4 * Self.treeRows(tree)
    let width: Int
    switch network {
    case .standalone(let model):
      pool = try KVPool(
        layerCount: model.configuration.layerCount, pageCount: allPages, layout: model.kvLayout, dtype: kvDType,
        backend: backend)
      state = try ForwardState(
        shape: model.activationShape, maxRows: maxRows, kvLayers: pool.layers, backend: backend)
      hiddenCells = nil
      targetScratch = nil
      hiddenRows = nil
      joinedRows = nil
      carriedRows = nil
      hiddenSize = model.configuration.hiddenSize
      width = model.configuration.vocabularySize
      tokenOfColumn = []
      logitScratch = try LogitScratch(rows: lines, hiddenSize: model.configuration.hiddenSize, backend: backend)
    case .prediction(let layer):
      pool = try KVPool(
        layerCount: 1, pageCount: allPages, layout: layer.kvLayout, dtype: kvDType, backend: backend)
      state = try ForwardState(
        shape: layer.activationShape, maxRows: maxRows, kvLayers: layer.kvLayers(pool.layers[0]), backend: backend)
      let hidden = layer.hiddenSize
      hiddenSize = hidden
      hiddenCells = try backend.allocate(rows: pageCount * kvPageSize, columns: hidden, dtype: .float32)
      targetScratch = try HiddenScratch(
        rows: Self.hiddenBlock, head: layer, targetHiddenSize: target.configuration.hiddenSize, backend: backend)
      hiddenRows = try backend.allocate(rows: maxRows, columns: hidden, dtype: .float32)
      joinedRows = try backend.allocate(rows: maxRows, columns: 2 * hidden, dtype: .float32)
      carriedRows = try backend.allocate(rows: lines, columns: hidden, dtype: .float32)
      width = layer.vocabularySize
      tokenOfColumn = layer.tokenOfColumn ?? []
      logitScratch = try LogitScratch(rows: lines, hiddenSize: hidden, backend: backend)
    }
    reducedLogits =
      tokenOfColumn.isEmpty ? nil : try backend.allocate(rows: lines, columns: width, dtype: .float32)
    vocabulary = width
    // A smaller vocabulary leaves the last tokens out: they are not drafted.
    logits = try backend.allocate(
      rows: lines, columns: max(width, target.configuration.vocabularySize), dtype: .float32)
    validCells = Array(repeating: 0, count: pageCount)
    tokens = .allocate(capacity: maxRows)
    positions = .allocate(capacity: maxRows)
    kvSlots = .allocate(capacity: maxRows)
    rowStart = .allocate(capacity: lines + 1)
    start = .allocate(capacity: lines)
    pageOffset = .allocate(capacity: lines)
    rowNumbers = .allocate(capacity: max(maxRows, Self.hiddenBlock))
  }

  deinit {
    tokens.deallocate()
    positions.deallocate()
    kvSlots.deallocate()
    rowStart.deallocate()
    start.deallocate()
    pageOffset.deallocate()
    rowNumbers.deallocate()
  }

  /// Rows of a pass over trees.
  private static func treeRows(_ tree: DraftTreeShape) -> Int { tree.width > 1 ? treeLines * tree.width : 0 }

  /// Rows whose hidden states are normalised at once.
  private static let hiddenBlock = 64

  /// Bytes beside the pages' own: activations, logits, scratch pages.
  static func fixedBytes(
    _ network: Network, target: LanguageModel, kvDType: DType, maxTokensPerStep: Int, maxRunningRequests: Int,
    tree: DraftTreeShape = DraftTreeShape()
  ) -> Int {
    let lines = max(min(maxLines, maxRunningRequests), treeRows(tree))
    let rows = min(max(lines, 256), max(lines, maxTokensPerStep))
    let hidden = target.configuration.hiddenSize
    return rows * (network.activationShape.bytesPerRow + 12 * hidden)
      + 4 * maxTokensPerStep * network.capturedLayers.count * hidden
      + lines * (8 * target.configuration.vocabularySize + 12 * hidden)
      + (lines * scratchPages + 4 * treeRows(tree)) * network.bytesPerPage(dtype: kvDType, isScratch: true)
  }

  func enter(slot: Int, _ assignment: SlotAssignment) {}
  func leave(slot: Int, tokens: [TokenID]) {}

  func measure() -> Double {
    var best = Double.infinity
    for _ in 0..<10 {
      let begin = monotonicSeconds()
      positions[0] = 0
      kvSlots[0] = Int32(pageCount * kvPageSize)
      tokens[0] = 0
      rowStart[0] = 0
      rowStart[1] = 1
      start[0] = 0
      pageOffset[0] = 0
      rowNumbers[0] = 0
      if let hiddenRows { memset(hiddenRows.pointer, 0, hiddenRows.stride * 4) }
      run(rows: 1, sequences: 1, reach: 1, [Int32(pageCount)])
      computeLogits(count: 1)
      best = min(best, monotonicSeconds() - begin)
    }
    return best
  }

  // MARK: Following the target

  func follow(_ step: FinishedStep) {
    for (index, share) in step.batch.requests.enumerated() {
      let first = Int(share.start)
      for position in stride(from: first / kvPageSize * kvPageSize, to: first + Int(share.count), by: kvPageSize) {
        let page = Int(step.batch.pages[Int(share.pageOffset) + position / kvPageSize])
        validCells[page] = min(validCells[page], UInt8(max(0, first - position)))
      }
      if let hiddenCells { keepHidden(step, index, in: hiddenCells) }
    }
  }

  /// Puts a request's hidden states beside its pages.
  private func keepHidden(_ step: FinishedStep, _ index: Int, in cells: Tensor) {
    guard case .prediction(let head) = network, let targetScratch else { return }
    let share = step.batch.requests[index]
    let bytes = 4 * hiddenSize
    let kept = step.keptCounts[index]
    for begin in Swift.stride(from: 0, to: kept, by: Self.hiddenBlock) {
      let count = min(Self.hiddenBlock, kept - begin)
      for row in 0..<count { rowNumbers[row] = step.row(request: index, token: begin + row) }
      let hidden = head.hidden(of: step.state, rows: rowNumbers, count: count, scratch: targetScratch)
      for row in 0..<count {
        let position = Int(share.start) + begin + row
        let page = Int(step.batch.pages[Int(share.pageOffset) + position / kvPageSize])
        memcpy(
          cells.float32 + (page * kvPageSize + position % kvPageSize) * cells.stride,
          hidden.float32 + row * hidden.stride, bytes)
      }
    }
  }

  // MARK: Drafting

  /// A line with what the passes need to know of it.
  private struct Work {
    let line: DraftLine
    /// The page table: the request's pages, then scratch.
    let pageOffset: Int
    let ownPages: Int
    /// The next row to compute, and the end of those whose tokens are known.
    var next: Int
    let end: Int
    /// Which scratch pages it has, and which row of `carriedRows`.
    let number: Int
  }

  func draft(_ lines: [DraftLine], in batch: ScheduleBatch) {
    var pages: [Int32] = []
    var works: [Work] = []
    for line in lines.prefix(min(Self.maxLines, logits.rows)) where !line.isDone {
      let share = batch.requests[line.request]
      let end: Int
      switch network {
      case .standalone(let model):
        end = line.tokens.count
        guard end + line.limit <= model.contextLength else { continue }
      case .prediction:
        end = line.computed
        // A step that computes forced tokens comes first: their hidden states are not there.
        guard line.tokens.count == end + 1 else { continue }
      }
      let own = Int(share.pageCount)
      guard end >= 1, end + line.limit <= (own + Self.scratchPages) * kvPageSize else { continue }
      let offset = pages.count
      pages += batch.pages[Int(share.pageOffset)..<Int(share.pageOffset) + own]
      for page in 0..<Self.scratchPages { pages.append(Int32(pageCount + works.count * Self.scratchPages + page)) }
      let valid = validPositions(pages[offset..<offset + own])
      works.append(
        Work(line: line, pageOffset: offset, ownPages: own, next: min(valid, end - 1), end: end, number: works.count))
    }
    guard !works.isEmpty else { return }
    if tree.width > 1 && works.count <= Self.treeLines {
      for work in works { work.line.beginTree() }
      computeKnown(&works, pages, makesTrees: true)
      computeTrees(works, pages)
      for work in works { work.line.chooseCandidates(tree.tokens) }
      return
    }
    computeKnown(&works, pages)
    var active = works.filter { !$0.line.isDone }
    while !active.isEmpty {
      computeDrafted(&active, pages)
      active.removeAll { $0.line.isDone }
    }
  }

  /// How many of a sequence's first positions have valid K/V.
  private func validPositions(_ pages: ArraySlice<Int32>) -> Int {
    var count = 0
    for page in pages {
      count += Int(validCells[Int(page)])
      if validCells[Int(page)] < kvPageSize { break }
    }
    return count
  }

  /// Computes the rows whose tokens are known, and draws each line's first draft.
  private func computeKnown(_ works: inout [Work], _ pages: [Int32], makesTrees: Bool = false) {
    var first = 0
    var left = missingRows
    while first < works.count && left > 0 {
      // As many rows as fit, line after line.
      var rows = 0
      var members: [Int] = []
      var index = first
      let limit = min(maxRows, left)
      while index < works.count && rows < limit {
        let count = min(works[index].end - works[index].next, limit - rows)
        rowStart[members.count] = Int32(rows)
        start[members.count] = Int32(works[index].next)
        pageOffset[members.count] = Int32(works[index].pageOffset)
        for offset in 0..<count { fill(rows + offset, works[index], works[index].next + offset, pages) }
        rows += count
        works[index].next += count
        members.append(index)
        index += 1
      }
      left -= rows
      rowStart[members.count] = Int32(rows)
      run(rows: rows, sequences: members.count, reach: members.map { works[$0].next }.max()!, pages)
      var finished: [Int] = []
      for (member, index) in members.enumerated() {
        markValid(works[index], pages)
        if works[index].next == works[index].end {
          rowNumbers[finished.count] = rowStart[member + 1] - 1
          finished.append(index)
        }
      }
      choose(finished, &works, makesTrees: makesTrees)
      first += finished.count
    }
    for work in works[first...] { work.line.end() }
  }

  /// Computes the rows of the drafts drawn last, one for each line, and draws the next.
  private func computeDrafted(_ works: inout [Work], _ pages: [Int32]) {
    for index in works.indices {
      rowStart[index] = Int32(index)
      start[index] = Int32(works[index].next)
      pageOffset[index] = Int32(works[index].pageOffset)
      fill(index, works[index], works[index].next, pages)
      works[index].next += 1
    }
    rowStart[works.count] = Int32(works.count)
    run(rows: works.count, sequences: works.count, reach: works.map(\.next).max()!, pages)
    for index in works.indices { rowNumbers[index] = Int32(index) }
    choose(Array(works.indices), &works)
  }

  /// A candidate whose successors are drafted.
  private struct Beam {
    let work: Int
    let node: Int
    /// Its two pages, and where its page table begins.
    let pages: (Int32, Int32)
    let table: Int
  }

  /// Computes the rows of trees' candidates, depth by depth. Each of those that are gone on from has two pages, which begin as
  /// copies of its predecessor's.
  private func computeTrees(_ works: [Work], _ linePages: [Int32]) {
    var previous: [[Int: (row: Int, pages: (Int32, Int32)?)]] = works.map { [-1: ($0.number, nil)] }
    let hiddenBytes = 4 * hiddenSize
    for depth in 1..<Self.treeDepth {
      var beams: [Beam] = []
      var pages = linePages
      var (from, to): ([Int32], [Int32]) = ([], [])
      for (index, work) in works.enumerated() where !work.line.isDone {
        let whole = work.end / kvPageSize
        for (number, node) in work.line.takeBeams(depth: depth, width: tree.width).enumerated() {
          let first = Int32(treeBase + (((index * 2 + depth % 2) * tree.width) + number) * 2)
          let own = (first, first + 1)
          if let old = previous[index][work.line.candidates[node].parent]?.pages {
            from += [old.0, old.1]
            to += [own.0, own.1]
          } else if work.end % kvPageSize > 0 {
            from.append(linePages[work.pageOffset + whole])
            to.append(own.0)
          }
          beams.append(Beam(work: index, node: node, pages: own, table: pages.count))
          pages += linePages[work.pageOffset..<work.pageOffset + whole]
          pages += [own.0, own.1]
        }
      }
      if beams.isEmpty { return }
      if !from.isEmpty {
        for layer in pool.layers { backend.copyPages(layer: layer, from: from, to: to, count: from.count) }
      }
      for (row, beam) in beams.enumerated() {
        let work = works[beam.work]
        let position = work.end + depth - 1
        let token = work.line.candidates[beam.node].token
        tokens[row] = carriedRows != nil || Int(token) < vocabulary ? token : 0
        positions[row] = Int32(position)
        kvSlots[row] = pages[beam.table + position / kvPageSize] * Int32(kvPageSize) + Int32(position % kvPageSize)
        rowStart[row] = Int32(row)
        start[row] = Int32(position)
        pageOffset[row] = Int32(beam.table)
        rowNumbers[row] = Int32(row)
        if let carriedRows, let hiddenRows {
          let parent = previous[beam.work][work.line.candidates[beam.node].parent]!.row
          memcpy(
            hiddenRows.float32 + row * hiddenRows.stride, carriedRows.float32 + parent * carriedRows.stride, hiddenBytes
          )
        }
      }
      rowStart[beams.count] = Int32(beams.count)
      run(
        rows: beams.count, sequences: beams.count, reach: (works.map(\.end).max() ?? 0) + depth, pages)
      previous = works.map { _ in [:] }
      let hidden = computeLogits(count: beams.count)
      for (row, beam) in beams.enumerated() {
        if let carriedRows {
          memcpy(
            carriedRows.float32 + row * carriedRows.stride, hidden.float32 + row * hidden.stride, hiddenBytes)
        }
        previous[beam.work][beam.node] = (row, beam.pages)
        if let numbers = expandedLogits(row) {
          works[beam.work].line.branch(behind: beam.node, numbers, width: tree.width, backend: backend)
        }
      }
    }
  }

  /// Fills in one row of a pass.
  private func fill(_ row: Int, _ work: Work, _ position: Int, _ pages: [Int32]) {
    func token(_ index: Int) -> TokenID {
      let line = work.line
      return index < line.tokens.count ? line.tokens[index] : line.drafts[index - line.tokens.count]
    }
    positions[row] = Int32(position)
    let cell = Int(pages[work.pageOffset + position / kvPageSize]) * kvPageSize + position % kvPageSize
    kvSlots[row] = Int32(cell)
    switch network {
    case .standalone:
      let input = token(position)
      // A token that the drafter does not know.
      tokens[row] = Int(input) < vocabulary ? input : 0
    case .prediction:
      tokens[row] = token(position + 1)
      let bytes = 4 * hiddenSize
      let target = hiddenRows!.float32 + row * hiddenRows!.stride
      if position < work.line.computed {
        memcpy(target, hiddenCells!.float32 + cell * hiddenCells!.stride, bytes)
      } else {
        memcpy(target, carriedRows!.float32 + work.number * carriedRows!.stride, bytes)
      }
    }
  }

  private func run(rows: Int, sequences: Int, reach: Int, _ pages: [Int32]) {
    pages.withUnsafeBufferPointer { pages in
      state.begin(
        ForwardBatch(
          rowCount: rows, tokens: tokens, positions: positions, slots: kvSlots,
          attention: AttentionBatch(
            sequenceCount: sequences, rowStart: rowStart, start: start, pageOffset: pageOffset,
            pages: pages.baseAddress!)))
      switch network {
      case .standalone(let model):
        model.prepare(positions: reach)
        model.executor.run(state)
      case .prediction(let layer):
        layer.prepare(positions: reach)
        layer.run(state, hidden: hiddenRows!.prefix(rows: rows), joined: joinedRows!.prefix(rows: rows))
      }
    }
  }

  private func markValid(_ work: Work, _ pages: [Int32]) {
    // The positions before `next` are valid, as far as they lie in the request's own pages.
    for page in 0..<work.ownPages where page * kvPageSize < work.next {
      let number = Int(pages[work.pageOffset + page])
      validCells[number] = max(validCells[number], UInt8(min(kvPageSize, work.next - page * kvPageSize)))
    }
  }

  /// Computes logits of the rows that `rowNumbers` lists.
  /// - Returns: the hidden states that they are made of.
  @discardableResult
  private func computeLogits(count: Int) -> Tensor {
    let out = (reducedLogits ?? logits).prefix(rows: count).columns(0..<vocabulary)
    switch network {
    case .standalone(let model):
      model.logits(state, rows: rowNumbers, count: count, scratch: logitScratch, out: out)
      return out
    case .prediction(let layer):
      return layer.logits(state, rows: rowNumbers, count: count, scratch: logitScratch, out: out)
    }
  }

  /// Draws a draft for some lines, whose rows `rowNumbers` lists, or finds the first candidates of their trees.
  private func choose(_ members: [Int], _ works: inout [Work], makesTrees: Bool = false) {
    if members.isEmpty { return }
    let hidden = computeLogits(count: members.count)
    if let carriedRows {
      for (row, index) in members.enumerated() {
        memcpy(
          carriedRows.float32 + works[index].number * carriedRows.stride,
          hidden.float32 + row * hidden.stride, 4 * hiddenSize)
      }
    }
    for (row, index) in members.enumerated() {
      guard let numbers = expandedLogits(row) else {
        works[index].line.end()
        continue
      }
      if makesTrees {
        works[index].line.branch(behind: -1, numbers, width: tree.width, backend: backend)
      } else {
        works[index].line.draw(numbers, backend: backend)
      }
    }
  }

  /// A row of the logits just computed, over the target's vocabulary; `nil` if they are not finite.
  private func expandedLogits(_ row: Int) -> Tensor? {
    let wanted = target.configuration.vocabularySize
    let known = (reducedLogits ?? logits).rows(row..<row + 1).columns(0..<vocabulary)
    guard known.isFinite(row: 0) else { return nil }
    let numbers = logits.rows(row..<row + 1).columns(0..<wanted)
    if let reducedLogits {
      for column in 0..<wanted { numbers.float32[column] = -.infinity }
      let source = reducedLogits.float32 + row * reducedLogits.stride
      for (column, token) in tokenOfColumn.enumerated() { numbers.float32[Int(token)] = source[column] }
    } else {
      for column in min(vocabulary, wanted)..<wanted { numbers.float32[column] = -.infinity }
    }
    observer?(Array(UnsafeBufferPointer(start: numbers.float32, count: wanted)))
    return numbers
  }
}

/// How wide drafts are.
public struct DraftTreeShape: Sendable, Equatable {
  /// Tokens drafted behind one token, at most; 1 for chains.
  public var width: Int
  /// Tokens of a tree, at most.
  public var tokens: Int

  /// Makes a shape.
  public init(width: Int = 1, tokens: Int = 8) {
    self.width = width
    self.tokens = tokens
  }
}
