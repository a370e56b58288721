import ApusCommunication
import ApusCore
import ApusTensors

/// The feed-forward half of a layer: from the normalised input in `ForwardState.normed` to `ForwardState.delta`, of which
/// the ranks that split the width hold summands.
protocol FeedForwardBlock: Sendable {
  /// The half as operations, without the sum over ranks.
  func operations(backend: any Backend) -> [Operation]
}

/// down(silu(gate(x)) * up(x)).
struct DenseFeedForward: FeedForwardBlock {
  private let name: String
  private let gateUp: any LinearWeight
  private let gateUpBias: Tensor?
  private let down: any LinearWeight
  private let downBias: Tensor?

  /// Loads this rank's share of the width.
  /// - Parameters:
  ///   - path: the module in the checkpoint, ending in a dot.
  ///   - name: what operations are called.
  ///   - names: what the matrices are called.
  init(
    path: String, name: String, width: Int, hidden: Int, hasBias: Bool, names: ExpertNames = ExpertNames(),
    loader: WeightLoader
  ) throws(EngineError) {
    let layout = loader.layout
    self.name = name
    let (rank, ranks) = (layout.rank % layout.denseTensorParallel, layout.denseTensorParallel)
    let inputs: [WeightLoader.Part] = [(path + names.gate, width), (path + names.up, width)]
    gateUp = try loader.columnParallel(inputs, inputs: hidden, rank: rank, ranks: ranks)
    gateUpBias = hasBias ? try loader.bias(inputs, rank: rank, ranks: ranks) : nil
    let downPart: WeightLoader.Part = (path + names.down, hidden)
    down = try loader.rowParallel(downPart, inputs: width, rank: rank, ranks: ranks)
    downBias = hasBias && rank == 0 ? try loader.bias([downPart], rank: 0, ranks: 1) : nil
  }

  /// Loads an expert of those that a checkpoint stores as two tensors, [count, 2 * width, hidden] and
  /// [count, hidden, width].
  init(
    stack path: String, index: Int, of count: Int, width: Int, hidden: Int, loader: WeightLoader
  ) throws(EngineError) {
    name = ""
    gateUp = try loader.stacked(path + "gate_up_proj", index: index, of: count, outputs: 2 * width, inputs: hidden)
    down = try loader.stacked(path + "down_proj", index: index, of: count, outputs: hidden, inputs: width)
    (gateUpBias, downBias) = (nil, nil)
  }

  func operations(backend: any Backend) -> [Operation] {
    [
      .compute(name + "gate_up") { state in
        backend.linear(
          state.normed, self.gateUp, bias: self.gateUpBias, out: state.gateUp.columns(0..<self.gateUp.outputs))
      },
      .compute(name + "activation") { state in
        backend.siluMul(
          state.gateUp.columns(0..<self.gateUp.outputs), out: state.activated.columns(0..<self.down.inputs))
      },
      .compute(name + "down") { state in
        backend.linear(
          state.activated.columns(0..<self.down.inputs), self.down, bias: self.downBias, out: state.delta)
      },
    ]
  }

  /// Computes some rows at once.
  func run(_ x: Tensor, gateUp products: Tensor, activated: Tensor, out: Tensor, backend: any Backend) {
    backend.linear(x, gateUp, bias: gateUpBias, out: products)
    backend.siluMul(products, out: activated)
    backend.linear(activated, down, bias: downBias, out: out)
  }
}
