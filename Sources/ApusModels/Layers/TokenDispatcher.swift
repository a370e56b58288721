import ApusTensors

/// How rows travel to experts.
public enum ExpertDispatchMode: Sendable, Equatable {
  /// Each slot gets exactly the rows that chose its expert, one slot's behind the other's: the least memory, any number of
  /// rows. What prompts want.
  case normal
  /// Each slot has room for `capacity` rows, of which as many count as chose its expert. Sizes and places do not depend on
  /// what was chosen, so nobody waits for a count. Passes have at most `capacity` rows. What short steps want.
  case lowLatency(capacity: Int)
  /// Low latency for passes of at most `capacity` rows, normal for others.
  case auto(capacity: Int)

  /// Rows that a slot has room for whatever is chosen; 0 for none.
  var capacity: Int {
    switch self {
    case .normal: 0
    case .lowLatency(let capacity), .auto(let capacity): capacity
    }
  }
}

/// Brings rows to the slots of the experts that they chose, and weighted sums of results back.
///
/// Each way has two halves, so that another batch can compute while rows travel: the first one submits, the second one waits.
/// Between `endDispatch` and `beginCombine` the rows of slot s lie in `ExpertActivations.rows`, at `groups`, where results
/// take their places.
protocol TokenDispatcher: Sendable {
  /// Submits the rows of `x`; each one's experts are in `activations.chosen`.
  func beginDispatch(_ x: Tensor, _ activations: ExpertActivations, map: ExpertMap)
  /// Waits for the rows.
  func endDispatch(_ x: Tensor, _ activations: ExpertActivations)
  /// Submits the results.
  func beginCombine(_ activations: ExpertActivations)
  /// Waits for the results, and writes each row's sum over its experts, weighted, in the order of their numbers.
  /// - Parameters:
  ///   - adds: whether what `out` holds is added to it.
  ///   - gate: logits with whose sigmoid that is multiplied first.
  func endCombine(_ activations: ExpertActivations, adds: Bool, gate: Tensor?, out: Tensor)
}

/// All experts are in this process: nothing travels further than to another place in memory.
struct LocalTokenDispatcher: TokenDispatcher {
  let backend: any ExpertBackend
  let mode: ExpertDispatchMode

  func beginDispatch(_ x: Tensor, _ activations: ExpertActivations, map: ExpertMap) {
    let isMasked: Bool
    switch mode {
    case .normal: isMasked = false
    case .lowLatency(let capacity):
      precondition(x.rows <= capacity, "A pass has more rows than low-latency dispatch has room for.")
      isMasked = true
    case .auto(let capacity): isMasked = x.rows <= capacity
    }
    activations.place(rows: x.rows, map: map, capacity: isMasked ? mode.capacity : nil)
  }

  func endDispatch(_ x: Tensor, _ activations: ExpertActivations) {
    if activations.isContiguous {
      let count = activations.choiceCount
      backend.gather(x, rows: activations.sources, count: count, out: activations.rows.prefix(rows: count))
      return
    }
    for slot in 0..<activations.shape.slotCount {
      let (first, count) = (Int(activations.starts[slot]), Int(activations.counts[slot]))
      if count == 0 { continue }
      backend.gather(
        x, rows: activations.sources + first, count: count, out: activations.rows.rows(first..<first + count))
    }
  }

  func beginCombine(_ activations: ExpertActivations) {}

  func endCombine(_ activations: ExpertActivations, adds: Bool, gate: Tensor?, out: Tensor) {
    backend.combine(
      activations.rows, places: activations.places, weights: activations.weights,
      perRow: activations.shape.expertsPerToken, adds: adds, gate: gate, out: out)
  }
}
