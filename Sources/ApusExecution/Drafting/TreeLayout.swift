import ApusScheduling

/// Where the rows of a draft tree put their K/V and find those of others.
///
/// A tree is a set of chains from its root, which is the last known token, to its leaves. Each leaf has a page table of its
/// own: the sequence's pages up to the one that holds the first draft, then pages of its own, which begin as copies. A node is
/// computed once; its K/V go to the pages of each leaf below it, and its row attends through the table of the first of these.
/// So every row sees the K/V that it would see if the chain to it were the text, at the same positions: no mask is needed,
/// and no bit is another one. The first leaf, which is the most likely one, uses the sequence's own pages.
struct TreeLayout {
  /// Position of the last known token.
  let base: Int
  /// By node: its parent, -1 for the root. Parents come before children, the best child first.
  let parents: [Int32]
  /// By node: 1 for a child of the root.
  private(set) var depths: [Int]
  /// By leaf: its node.
  private(set) var leaves: [Int] = []
  /// By node: the leaves below it (itself if it is one), ascending.
  private(set) var below: [[Int]]

  init(parents: some Sequence<Int32>, base: Int) {
    self.base = base
    self.parents = Array(parents)
    depths = []
    var children = Array(repeating: [Int](), count: self.parents.count + 1)
    for (node, parent) in self.parents.enumerated() {
      depths.append(parent < 0 ? 1 : depths[Int(parent)] + 1)
      children[Int(parent) + 1].append(node)
    }
    below = Array(repeating: [], count: self.parents.count)
    // Depth first, the best child first: the first leaf is at the end of the best children.
    var stack = Array(children[0].reversed())
    while let node = stack.popLast() {
      if children[node + 1].isEmpty {
        var step = node
        while step >= 0 {
          below[step].append(leaves.count)
          step = Int(self.parents[step])
        }
        leaves.append(node)
      } else {
        stack += children[node + 1].reversed()
      }
    }
  }

  /// The first page that holds a draft, counted from the start of the sequence.
  var firstPage: Int { (base + 1) / kvPageSize }

  /// Pages of a leaf's own, if it is not the first.
  func pageCount(leaf: Int) -> Int { (base + depths[leaves[leaf]]) / kvPageSize - firstPage + 1 }

  /// Pages of all leaves but the first.
  var extraPages: Int { leaves.indices.dropFirst().reduce(0) { $0 + pageCount(leaf: $1) } }

  /// Whether each node is the child of the one before.
  var isChain: Bool { leaves.count == 1 }
}

/// The trees of a step, and what a pass over them needs beside an ordinary one.
struct TreePass {
  /// By request: its tree, where it has one.
  var layouts: [TreeLayout?] = []
  /// By request, then by leaf: where its page table begins in `pages`.
  var tables: [[Int32]] = []
  /// The batch's page tables, then those of leaves.
  var pages: [Int32] = []
  /// Whole pages to copy before the pass.
  var copiedFrom: [Int32] = []
  var copiedTo: [Int32] = []
  /// Rows whose K/V go to further cells too.
  var copyRows: [Int32] = []
  var copySlots: [Int32] = []
  /// What attention sees as sequences.
  var rowStart: [Int32] = []
  var start: [Int32] = []
  var pageOffset: [Int32] = []
  private var lastTable: Int32 = -1
  private var lastPosition = -1

  var isEmpty: Bool { layouts.isEmpty }

  /// Lays the trees of a batch out.
  /// - Parameter scratch: pages that belong to no request.
  init(_ batch: ScheduleBatch, scratch: Range<Int>) {
    guard batch.requests.contains(where: { $0.parentOffset >= 0 }) else { return }
    pages = batch.pages
    var next = scratch.lowerBound
    for request in batch.requests {
      guard request.parentOffset >= 0 else {
        layouts.append(nil)
        tables.append([request.pageOffset])
        continue
      }
      let offset = Int(request.parentOffset)
      let layout = TreeLayout(
        parents: batch.parents[offset..<offset + Int(request.draftCount)],
        base: Int(request.start + request.count - request.draftCount) - 1)
      let own = Int(request.pageOffset)
      var offsets = [request.pageOffset]
      for leaf in layout.leaves.indices.dropFirst() {
        offsets.append(Int32(pages.count))
        pages += batch.pages[own..<own + layout.firstPage]
        // K/V that stand before this step's in the page.
        if Int(request.start) > layout.firstPage * kvPageSize {
          copiedFrom.append(batch.pages[own + layout.firstPage])
          copiedTo.append(Int32(next))
        }
        for _ in 0..<layout.pageCount(leaf: leaf) {
          pages.append(Int32(next))
          next += 1
        }
      }
      if next > scratch.upperBound { fatalError("Draft trees have more leaves than there are pages for.") }
      layouts.append(layout)
      tables.append(offsets)
    }
  }

  /// Where a row's K/V go.
  /// - Parameter node: the draft, or -1 for a known token.
  /// - Returns: the cell; others are noted.
  mutating func place(row: Int, request: Int, position: Int, node: Int) -> Int32 {
    func cell(_ table: Int32) -> Int32 {
      pages[Int(table) + position / kvPageSize] * Int32(kvPageSize) + Int32(position % kvPageSize)
    }
    let layout = layouts[request]
    let leaves = node < 0 ? Array(tables[request].indices) : layout!.below[node]
    let table = tables[request][leaves[0]]
    if table != lastTable || position != lastPosition + 1 {
      rowStart.append(Int32(row))
      start.append(Int32(position))
      pageOffset.append(table)
    }
    (lastTable, lastPosition) = (table, position)
    if let layout, position >= layout.firstPage * kvPageSize {
      for leaf in leaves.dropFirst() {
        copyRows.append(Int32(row))
        copySlots.append(cell(tables[request][leaf]))
      }
    }
    return cell(table)
  }
}
