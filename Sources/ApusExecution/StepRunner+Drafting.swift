import ApusCore
import ApusModels
public import ApusScheduling
import ApusTensors

extension StepRunner {
  /// A request leaves its slot.
  func release(_ slot: Int) {
    slots[slot]?.constraint?.forget()
    slots[slot] = nil
    guard let drafter else { return }
    drafter.leave(slot: slot, tokens: sequences[slot])
    sequences[slot] = []
  }

  /// A request enters a slot.
  func assign(_ assignment: SlotAssignment) {
    let slot = Int(assignment.slot)
    slots[slot] = SamplerSlot(assignment, masks: masks)
    guard let drafter else { return }
    if sequences.isEmpty { sequences = Array(repeating: [], count: maxRunningRequests) }
    sequences[slot] = assignment.tokens
    drafter.enter(slot: slot, assignment)
  }

  /// Tells the drafter what the step brought, and has it propose tokens for the next one.
  func draft(_ batch: ScheduleBatch, into result: inout StepResult) {
    guard let drafter else { return }
    var keptCounts: [Int] = []
    keptCounts.reserveCapacity(batch.requests.count)
    var lines: [DraftLine] = []
    var tokenIndex = 0
    var accepted = result.acceptedDrafts[...]
    for (index, share) in batch.requests.enumerated() {
      let slot = Int(share.slot)
      var kept = Int(share.count - share.draftCount)
      if let first = accepted.first, first.request == index {
        kept += first.count
        accepted.removeFirst()
      }
      keptCounts.append(kept)
      let count = Int(result.tokenCounts[index])
      sequences[slot] += result.tokens[tokenIndex..<tokenIndex + count]
      tokenIndex += count
      // A request whose masks take long would keep the others waiting with those behind its drafts.
      guard share.draftLimit > 0, count > 0, !result.failures.contains(where: { $0.request == index }),
        slots[slot]!.constraint?.isSuspect != true,
        let fork = slots[slot]!.fork()
      else { continue }
      let line = DraftLine(
        slot: slot, request: index, tokens: sequences[slot], computed: Int(share.start) + kept,
        limit: Int(share.draftLimit), least: share.draftLeast, sampler: fork)
      // Behind the end of a text nothing follows.
      if sequences[slot].suffix(count).contains(where: fork.stops(at:)) { line.end() }
      lines.append(line)
    }
    drafter.follow(
      FinishedStep(
        batch: batch, model: model, state: state, rowStart: rowStart, keptCounts: keptCounts,
        acceptedNodes: acceptedNodes))
    if lines.contains(where: { !$0.isDone }) { drafter.draft(lines, in: batch) }
    var pagesLeft = treePages
    for line in lines where !line.drafts.isEmpty {
      // As many leaves as there are pages for.
      while let tree = line.tree, !tree.isChain, tree.extraPages > pagesLeft { line.dropLast() }
      pagesLeft -= line.tree?.extraPages ?? 0
      result.drafts.append((line.request, line.drafts))
      if let tree = line.tree, !tree.isChain { result.draftParents.append((line.request, tree.parents)) }
    }
  }

  /// Has the logits seen that a drafting model's drafts are drawn from, one row after the other. For tests.
  package func observeDraftLogits(_ observer: @escaping ([Float]) -> Void) {
    (drafter as? ModelDrafter)?.observer = observer
  }

  /// What a draft token costs with this model on this machine, in the time of a step of one token: measured with few passes,
  /// which write into the first pages of the pool. To be called before any step.
  public func measureDraftCosts() -> DraftCosts {
    func seconds(rows: Int) -> Double {
      var best = Double.infinity
      var spent = 0.0
      for attempt in 0..<30 where attempt < 2 || spent < 0.2 {
        let begin = monotonicSeconds()
        // Different tokens: experts are then chosen as for a text.
        forwardAlone((0..<rows).map { TokenID(($0 * 7919 + 17) % model.configuration.vocabularySize) }, chunk: nil) {
          _ in
        }
        for row in 0..<rows { rowNumbers[row] = Int32(row) }
        model.logits(state, rows: rowNumbers, count: rows, scratch: logitScratch, out: logits.prefix(rows: rows))
        let taken = monotonicSeconds() - begin
        spent += taken
        best = min(best, taken)
      }
      return best
    }
    let rows = min(5, maxTokensPerStep, logits.rows, pool.pageCount * kvPageSize, model.contextLength)
    guard rows > 1 else { return DraftCosts() }
    let one = seconds(rows: 1)
    let several = seconds(rows: rows)
    let draft = drafter?.measure() ?? 0
    return DraftCosts(row: max(0.01, (several - one) / Double(rows - 1) / one), draft: draft / one)
  }
}
