import ApusCommunication
import ApusCore
import ApusTensors

/// A mixture of experts: each token passes through a few of them, chosen by a router, and through the shared ones.
///
///     router, dispatch_a | yield | dispatch_b, experts, combine_a | yield | shared experts, combine_b
///
/// Rows that chose an expert are computed together; a row's sum adds its experts in the order of their numbers, then the
/// shared ones. Both are functions of the row alone, so company changes no bit.
struct SparseFeedForward: FeedForwardBlock {
  private let name: String
  private let layer: Int
  /// [experts, hidden] in float32, whatever the model's type: a rounded logit would send tokens to other experts.
  private let router: any LinearWeight
  private let routerBias: Tensor?
  /// float32 [1, experts].
  private let correction: Tensor?
  /// [slots]: the first products of each slot's expert, gate and up side by side, and the second ones.
  private let gateUp: any GroupedLinearWeight
  private let down: any GroupedLinearWeight
  private let shared: DenseFeedForward?
  /// [1, hidden] in float32: a token's logit for the shared experts.
  private let sharedGate: (any LinearWeight)?
  private let routing: ExpertRouting
  private let activation: GatedActivation
  private let map: ExpertMap
  private let dispatcher: any TokenDispatcher
  private let backend: any ExpertBackend

  /// Loads all experts.
  /// - Throws: `unsupported` where the width is to be split over ranks or the backend has no operators for experts.
  init(
    layer: Int, path: String, name: String, configuration: ModelConfiguration, sizes: ExpertConfiguration,
    loader: WeightLoader
  ) throws(EngineError) {
    guard loader.layout.denseTensorParallel == 1, loader.layout.expertParallel == 1 else {
      throw EngineError(.unsupported, "Experts that are split over ranks are not implemented.")
    }
    guard let backend = loader.backend as? any ExpertBackend else {
      throw EngineError(.unsupported, "The backend \(loader.backend.name) has no operators for experts.")
    }
    self.name = name
    self.layer = layer
    self.backend = backend
    routing = sizes.routing
    activation = sizes.activation
    let hidden = configuration.hiddenSize
    let names = sizes.names
    router = try loader.router(path + names.router, experts: sizes.expertCount, hidden: hidden)
    routerBias =
      sizes.hasBiases ? try loader.bias([(path + names.router, sizes.expertCount)], rank: 0, ranks: 1) : nil
    correction =
      sizes.hasCorrection
      ? try loader.vector(path + names.router + ".e_score_correction_bias", count: sizes.expertCount) : nil
    let packedBefore = loader.packedBytes
    let weights = try ExpertWeights(block: path, sizes: sizes, hidden: hidden, loader: loader)
    loader.expertBytes[layer] = (loader.packedBytes - packedBefore) / sizes.expertCount
    let map = ExpertMap(loader.experts.location, layer: layer, expertCount: sizes.expertCount)
    func slots<Element>(_ list: [Element]) -> [Element] { map.expertOfSlot.map { list[$0] } }
    gateUp = backend.groupLinear(slots(weights.gateUp), biases: weights.gateUpBias.map(slots))
    down = backend.groupLinear(slots(weights.down), biases: weights.downBias.map(slots))
    self.map = map
    dispatcher = LocalTokenDispatcher(backend: backend, mode: loader.experts.dispatch)
    // Fused ones lie in a module of the layer, not of the block.
    let isFused = sizes.storage == .fused
    let sharedPath = isFused ? String(path.dropLast(names.block.count)) + names.shared : path + names.shared
    shared =
      sizes.sharedIntermediateSize == 0
      ? nil
      : try DenseFeedForward(
        path: sharedPath, name: name + "shared_", width: sizes.sharedIntermediateSize, hidden: hidden, hasBias: false,
        isFused: isFused, loader: loader)
    sharedGate =
      sizes.hasSharedGate
      ? try loader.router(path + names.shared.dropLast() + "_gate", experts: 1, hidden: hidden) : nil
  }

  func operations(backend _: any Backend) -> [Operation] {
    var list: [Operation] = [
      .compute(name + "router") { state in self.route(state) },
      .compute(name + "dispatch_a") { state in
        let activations = state.experts!
        self.dispatcher.beginDispatch(state.normed, activations, map: self.map)
        activations.recorder?.record(layer: self.layer, activations)
      },
      .yield,
      .compute(name + "dispatch_b") { state in self.dispatcher.endDispatch(state.normed, state.experts!) },
      .compute(name + "experts") { state in self.compute(state.experts!) },
      .compute(name + "combine_a") { state in self.dispatcher.beginCombine(state.experts!) },
      .yield,
    ]
    if let shared { list += shared.operations(backend: backend) }
    if let sharedGate {
      list.append(
        .compute(name + "shared_gate") { state in
          let logits = state.experts!.sharedGate.prefix(rows: state.batch.rowCount)
          self.backend.linear(state.normed, sharedGate, bias: nil, out: logits)
        })
    }
    list.append(
      .compute(name + "combine_b") { state in
        let activations = state.experts!
        self.dispatcher.endCombine(
          activations, adds: self.shared != nil,
          gate: self.sharedGate == nil ? nil : activations.sharedGate.prefix(rows: state.batch.rowCount),
          out: state.delta)
      })
    return list
  }

  private func route(_ state: ForwardState) {
    let activations = state.experts!
    let logits = activations.logits.prefix(rows: state.batch.rowCount)
    backend.linear(state.normed, router, bias: routerBias, out: logits)
    backend.route(
      logits, routing, correction: correction, chosen: activations.chosen, weights: activations.weights)
  }

  /// Runs each slot's expert over its rows; results take the rows' places.
  private func compute(_ activations: ExpertActivations) {
    let groups = activations.groups
    let halves = activations.gateUp
    let activated = halves.columns(0..<down.inputs)
    backend.groupedLinear(activations.rows, gateUp, groups: groups, out: halves)
    backend.groupedActivation(halves, activation, groups: groups, out: activated)
    backend.groupedLinear(activated, down, groups: groups, out: activations.rows)
  }
}

/// Widths of the activations of layers with experts.
public struct ExpertShape: Sendable, Equatable {
  public var expertCount: Int
  public var expertsPerToken: Int
  /// Width of one expert.
  public var intermediate: Int
  public var hidden: Int
  /// Places for experts' weights: as many as experts, or more.
  public var slotCount: Int
  /// Rows that low-latency dispatch has room for in each slot; 0 without it.
  public var slotCapacity: Int

  /// Bytes of the activations of one row.
  var bytesPerRow: Int { 4 * (expertCount + 1 + expertsPerToken * (hidden + 2 * intermediate + 4)) }
}

/// What layers with experts carry from operation to operation.
public final class ExpertActivations: @unchecked Sendable {
  // Unchecked: owned by the thread that runs the model, as the state that holds it.

  let shape: ExpertShape
  /// Counts what is chosen, where somebody wants to know.
  public var recorder: ExpertLoadRecorder?
  /// float32 [rows, experts].
  let logits: Tensor
  /// float32 [rows, 1]: logits for the shared experts.
  let sharedGate: Tensor
  /// float32 [places, hidden]: the rows of all slots, and then their results.
  let rows: Tensor
  /// float32 [places, 2 * intermediate].
  let gateUp: Tensor
  /// [rows, experts per token]: experts in the order of their numbers, their weights, and the places of their rows.
  let chosen: UnsafeMutablePointer<Int32>
  let weights: UnsafeMutablePointer<Float>
  let places: UnsafeMutablePointer<Int32>
  /// [places]: the row of the pass that lies there.
  let sources: UnsafeMutablePointer<Int32>
  /// [slots]: the first place of each slot, and how many are taken.
  let starts: UnsafeMutablePointer<Int32>
  let counts: UnsafeMutablePointer<Int32>
  /// Whether the places of all slots lie one behind the other.
  private(set) var isContiguous = true
  /// Rows of the pass times experts per token.
  private(set) var choiceCount = 0

  init(_ shape: ExpertShape, rows count: Int, backend: any Backend) throws(EngineError) {
    self.shape = shape
    let choices = count * shape.expertsPerToken
    let places = max(choices, shape.slotCount * shape.slotCapacity)
    logits = try backend.allocate(rows: count, columns: shape.expertCount, dtype: .float32)
    sharedGate = try backend.allocate(rows: count, columns: 1, dtype: .float32)
    rows = try backend.allocate(rows: places, columns: shape.hidden, dtype: .float32)
    gateUp = try backend.allocate(rows: places, columns: 2 * shape.intermediate, dtype: .float32)
    chosen = .allocate(capacity: choices)
    weights = .allocate(capacity: choices)
    self.places = .allocate(capacity: choices)
    sources = .allocate(capacity: places)
    starts = .allocate(capacity: shape.slotCount)
    counts = .allocate(capacity: shape.slotCount)
  }

  deinit {
    for memory in [chosen, places, sources, starts, counts] { memory.deallocate() }
    weights.deallocate()
  }

  var groups: RowGroups { RowGroups(count: shape.slotCount, starts: starts, counts: counts) }

  /// Gives each choice of `count` rows a place among its slot's, in the order of rows.
  /// - Parameter capacity: places of each slot; `nil` for as many as are needed, one slot's behind the other's.
  func place(rows count: Int, map: ExpertMap, capacity: Int?) {
    choiceCount = count * shape.expertsPerToken
    isContiguous = capacity == nil
    counts.update(repeating: 0, count: shape.slotCount)
    for row in 0..<count {
      for choice in row * shape.expertsPerToken..<(row + 1) * shape.expertsPerToken {
        let slot = map.slot(expert: chosen[choice], row: row)
        // Its slot, which becomes a place in the loop below, once all are counted.
        places[choice] = slot
        counts[Int(slot)] += 1
      }
    }
    var start: Int32 = 0
    for slot in 0..<shape.slotCount {
      starts[slot] = capacity.map { Int32(slot * $0) } ?? start
      start += counts[slot]
      counts[slot] = 0
    }
    for choice in 0..<choiceCount {
      let slot = Int(places[choice])
      let place = starts[slot] + counts[slot]
      counts[slot] += 1
      places[choice] = place
      sources[Int(place)] = Int32(choice / shape.expertsPerToken)
    }
  }
}
