import ApusCore
import ApusScheduling
import ApusTensors
import Glibc

/// What a line collects where several tokens are drafted for one place: candidates with the product of the drafter's
/// probabilities on the way to them, of which the best ones are drafted (the dynamic draft tree of EAGLE-2, Li et al., 2024,
/// https://arxiv.org/abs/2406.16858).
struct DraftCandidate {
  let token: TokenID
  /// Index of the candidate before it; -1 for the last known token.
  let parent: Int
  /// 1 for a token behind the last known one.
  let depth: Int
  /// Never above its parent's.
  let score: Float
}

extension DraftLine {
  /// The most likely tokens behind a candidate become candidates. The first of them is the one that the sampler would draw
  /// with the random number of that place, since the target mostly draws the same where its distribution is similar.
  ///
  /// - Parameters:
  ///   - node: the candidate, -1 for the last known token.
  ///   - row: one row of the drafter's logits behind it, which is changed.
  ///   - width: how many tokens, at most.
  func branch(behind node: Int, _ row: Tensor, width: Int, backend: any Backend) {
    guard var sampler = openSamplers[node] else { return }
    let depth = node < 0 ? 0 : candidates[node].depth
    let score = node < 0 ? 1 : candidates[node].score
    sampler.prepare(row, row: 0, position: tokens.count + depth, backend: backend)
    openSamplers[node] = sampler
    let total = backend.logSumExp(logits: row, row: 0)
    let count = min(width, row.columns)
    var best = [TokenID](repeating: -1, count: count)
    var values = [Float](repeating: -.infinity, count: count)
    backend.topK(logits: row, row: 0, k: count, tokens: &best, values: &values)
    var sampling = sampler.row
    var drawn: TokenID = -1
    backend.sample(logits: row, rows: &sampling, tokens: &drawn)
    guard drawn >= 0, total.isFinite else { return }
    func share(_ index: Int) -> Float { min(1, expf(values[index] - total)) }
    candidates.append(DraftCandidate(token: drawn, parent: node, depth: depth + 1, score: score * share(0)))
    for index in 0..<count where best[index] != drawn && values[index].isFinite {
      if candidates.count(where: { $0.parent == node }) == width { break }
      candidates.append(
        DraftCandidate(token: best[index], parent: node, depth: depth + 1, score: score * share(index)))
    }
  }

  /// The best candidates of a depth behind which there is something to draft, at most `width`.
  func takeBeams(depth: Int, width: Int) -> [Int] {
    guard depth < limit else { return [] }
    let level = candidates.indices.filter { candidates[$0].depth == depth }.sorted {
      (candidates[$0].score, $1) > (candidates[$1].score, $0)
    }
    var beams: [Int] = []
    var samplers: [Int: SamplerSlot] = [:]
    for node in level where beams.count < width {
      let candidate = candidates[node]
      // Forced tokens have no sampler before them.
      guard var sampler = openSamplers[candidate.parent]?.fork(), sampler.tryAppend(candidate.token) else { continue }
      let forced = sampler.takeForcedTokens(after: tokens.count + depth - 1)
      // What is forced needs no drafter; behind it nothing is known yet.
      var parent = node
      for (offset, token) in forced.enumerated() where depth + offset < limit {
        candidates.append(
          DraftCandidate(token: token, parent: parent, depth: depth + 1 + offset, score: candidate.score))
        parent = candidates.count - 1
      }
      if !forced.isEmpty || sampler.stops(at: candidate.token) || sampler.isEnded { continue }
      samplers[node] = sampler
      beams.append(node)
    }
    openSamplers = samplers
    return beams
  }

  /// Drafts the best candidates: at most `count`, and of those that are not the best one only such as are worth their rows.
  func chooseCandidates(_ count: Int) {
    let order = candidates.indices.sorted { (candidates[$0].score, $1) > (candidates[$1].score, $0) }
    var numbers: [Int: Int32] = [-1: -1]
    var tokens: [TokenID] = []
    var parents: [Int32] = []
    for node in order.prefix(count) where parents.isEmpty || candidates[node].score >= least {
      // No score is above its parent's, so that the parent has come before.
      guard let parent = numbers[candidates[node].parent] else { continue }
      numbers[node] = Int32(tokens.count)
      tokens.append(candidates[node].token)
      parents.append(parent)
    }
    take(tokens: tokens, parents: parents)
    candidates = []
    openSamplers = [:]
    end()
  }
}
