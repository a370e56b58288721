import ApusCore
import ApusModels
import ApusScheduling
import ApusTensors

/// Proposes tokens for the next step: the one seam behind which lookups and models stand alike.
///
/// A drafter runs on the model's thread. Whatever it proposes, the verifier takes only what the target draws itself, so a
/// drafter decides how fast tokens come and never which.
protocol Drafter: AnyObject {
  /// A request enters a slot, for the first time or after a retraction.
  func enter(slot: Int, _ assignment: SlotAssignment)
  /// The request in a slot is gone.
  /// - Parameter tokens: all of it, prompt first.
  func leave(slot: Int, tokens: [TokenID])
  /// A step has run. Called for each one, whether or not drafts are wanted, while the target's state still holds it.
  func follow(_ step: FinishedStep)
  /// Proposes tokens through `lines`, of which there is at least one. Called after `follow`.
  func draft(_ lines: [DraftLine], in batch: ScheduleBatch)
  /// Seconds that drafting one more token takes. Called before any step.
  func measure() -> Double
}

/// A step as a drafter sees it.
struct FinishedStep {
  let batch: ScheduleBatch
  /// The target and its state, whose rows are the batch's.
  let model: LanguageModel
  let state: ForwardState
  /// For each request of the batch, its first row.
  let rowStart: UnsafePointer<Int32>
  /// For each request of the batch, how many of its tokens stay: all but rejected drafts.
  let keptCounts: [Int]
  /// By request whose drafts are a tree: those that were accepted.
  let acceptedNodes: [Int: [Int]]

  /// The row of a token that stays.
  func row(request: Int, token: Int) -> Int32 {
    let share = batch.requests[request]
    let known = Int(share.count - share.draftCount)
    guard token >= known, let nodes = acceptedNodes[request] else { return rowStart[request] + Int32(token) }
    return rowStart[request] + Int32(known + nodes[token - known])
  }
}

/// A request for which tokens are drafted, and its drafts so far. It goes the way that the sampler would: penalties,
/// grammar and the random number of each position are those of the draws to come.
final class DraftLine {
  let slot: Int
  /// Index in the batch's requests.
  let request: Int
  /// All tokens known, prompt first.
  let tokens: [TokenID]
  /// Positions whose K/V the target has.
  let computed: Int
  let limit: Int
  /// The least score with which a draft is worth its row beside others of its place.
  let least: Float
  private(set) var drafts: [TokenID] = []
  /// Where the drafts are a tree: which of them each one follows, -1 for none.
  private(set) var parents: [Int32] = []
  /// While a tree is made: its candidates, and the sampler behind each of those that are gone on from (-1 for the last known
  /// token).
  var candidates: [DraftCandidate] = []
  var openSamplers: [Int: SamplerSlot] = [:]
  private(set) var isDone: Bool
  private var sampler: SamplerSlot

  init(
    slot: Int, request: Int, tokens: [TokenID], computed: Int, limit: Int, least: Float = 0, sampler: SamplerSlot
  ) {
    self.least = least
    self.slot = slot
    self.request = request
    self.tokens = tokens
    self.computed = computed
    self.limit = limit
    self.sampler = sampler
    isDone = limit <= 0 || sampler.isEnded
  }

  /// Takes tokens that were looked up, as far as they may follow.
  func take(_ proposal: [TokenID]) {
    var index = 0
    while index < proposal.count, !isDone {
      guard sampler.tryAppend(proposal[index]) else { return end() }
      let forced = add(proposal[index])
      index += 1
      for token in forced {
        if index < proposal.count && proposal[index] == token { index += 1 } else { index = proposal.count }
      }
    }
  }

  /// Draws the next token from a drafter's logits, with the random number that the target's draw will have.
  /// - Parameter row: one row of logits, which is changed.
  func draw(_ row: Tensor, backend: any Backend) {
    guard !isDone else { return }
    sampler.prepare(row, row: 0, position: tokens.count + drafts.count, backend: backend)
    var sampling = sampler.row
    var token: TokenID = -1
    backend.sample(logits: row, rows: &sampling, tokens: &token)
    guard token >= 0, sampler.tryAppend(token) else { return end() }
    // What is forced needs no drafter; behind it nothing is known yet.
    if !add(token).isEmpty { end() }
  }

  /// Makes ready for a tree.
  func beginTree() { openSamplers = [-1: sampler] }

  /// Takes a tree.
  func take(tokens: [TokenID], parents: [Int32]) {
    drafts = tokens
    self.parents = parents
  }

  /// The tree that the drafts are; `nil` where they are a chain.
  var tree: TreeLayout? {
    parents.isEmpty ? nil : TreeLayout(parents: parents, base: tokens.count - 1)
  }

  /// Leaves the last draft of a tree out.
  func dropLast() {
    drafts.removeLast()
    parents.removeLast()
  }

  /// Drafts no more.
  func end() { isDone = true }

  /// Adds a token that the sampler has taken.
  /// - Returns: the tokens that are forced after it, which were added too.
  private func add(_ token: TokenID) -> [TokenID] {
    drafts.append(token)
    let forced = sampler.takeForcedTokens(after: tokens.count + drafts.count - 1)
    drafts += forced
    if drafts.count >= limit {
      drafts.removeSubrange(limit...)
      end()
    }
    if sampler.stops(at: token) || sampler.isEnded { end() }
    return forced
  }
}
