import ApusCore
import ApusModels
import ApusScheduling
import ApusTensors

extension StepRunner {
  /// Runs the pass over rows some of which are nodes of draft trees.
  func forwardTrees(
    rows: Int, tokens: UnsafePointer<TokenID>, positions: UnsafePointer<Int32>, slots: UnsafePointer<Int32>
  ) {
    copyPages(from: trees.copiedFrom, to: trees.copiedTo)
    trees.rowStart.append(Int32(rows))
    var batch = ForwardBatch(
      rowCount: rows, tokens: tokens, positions: positions, slots: slots,
      attention: AttentionBatch(
        sequenceCount: trees.start.count, rowStart: tokens, start: tokens, pageOffset: tokens, pages: tokens))
    batch.copyCount = trees.copyRows.count
    // The pass keeps the pointers until it ends.
    trees.rowStart.withUnsafeBufferPointer { rowStart in
      trees.start.withUnsafeBufferPointer { start in
        trees.pageOffset.withUnsafeBufferPointer { pageOffset in
          trees.pages.withUnsafeBufferPointer { pages in
            trees.copyRows.withUnsafeBufferPointer { copyRows in
              trees.copySlots.withUnsafeBufferPointer { copySlots in
                batch.attention.rowStart = rowStart.baseAddress!
                batch.attention.start = start.baseAddress!
                batch.attention.pageOffset = pageOffset.baseAddress!
                batch.attention.pages = pages.baseAddress!
                batch.copyRows = copyRows.baseAddress
                batch.copySlots = copySlots.baseAddress
                state.begin(batch)
                model.executor.run(state)
              }
            }
          }
        }
      }
    }
  }

  /// Copies pages in all layers.
  private func copyPages(from: [Int32], to: [Int32]) {
    if from.isEmpty { return }
    for layer in pool.layers { backend.copyPages(layer: layer, from: from, to: to, count: from.count) }
  }

  /// How many drafts stand before a draft's successor on its way from the last known token, itself included.
  func depth(request: Int, draft: Int) -> Int {
    trees.isEmpty ? draft + 1 : trees.layouts[request]?.depths[draft] ?? draft + 1
  }

  /// The draft behind another one, or behind the last known token for -1, that is this token.
  func follower(of draft: Int, token: TokenID, request: Int, in batch: ScheduleBatch) -> Int? {
    let share = batch.requests[request]
    let first = Int(share.tokenOffset + share.count - share.draftCount)
    guard !trees.isEmpty, let layout = trees.layouts[request] else {
      return draft + 1 < Int(share.draftCount) && batch.tokens[first + draft + 1] == token ? draft + 1 : nil
    }
    let found = layout.parents.indices.first {
      $0 > draft && Int(layout.parents[$0]) == draft && batch.tokens[first + $0] == token
    }
    if let found { acceptedNodes[request, default: []].append(found) }
    return found
  }

  /// Gives each request the pages of the leaf that its text went on with.
  func settleTrees(_ batch: ScheduleBatch, _ result: StepResult) {
    var (from, to): ([Int32], [Int32]) = ([], [])
    treeCounts.verified += trees.layouts.count { $0 != nil }
    for (request, count) in result.acceptedDrafts {
      guard let layout = trees.layouts[request], let nodes = acceptedNodes[request] else { continue }
      // A draft behind which nothing could be drawn does not count.
      acceptedNodes[request] = Array(nodes.prefix(count))
      guard count > 0 else { continue }
      let leaf = layout.below[nodes[count - 1]][0]
      if leaf == 0 { continue }
      treeCounts.moved += 1
      for page in layout.firstPage...(layout.base + count) / kvPageSize {
        from.append(trees.pages[Int(trees.tables[request][leaf]) + page])
        to.append(batch.pages[Int(batch.requests[request].pageOffset) + page])
      }
    }
    copyPages(from: from, to: to)
  }
}
