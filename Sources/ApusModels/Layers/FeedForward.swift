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
  ///   - isFused: whether gate and up are one matrix, `input_linear`, and down is called `output_linear`; not to be split.
  init(
    path: String, name: String, width: Int, hidden: Int, hasBias: Bool, isFused: Bool = false, loader: WeightLoader
  ) throws(EngineError) {
    let layout = loader.layout
    self.name = name
    let (rank, ranks) = (layout.rank % layout.denseTensorParallel, layout.denseTensorParallel)
    precondition(!isFused || ranks == 1)
    let inputs: [WeightLoader.Part] =
      isFused ? [(path + "input_linear", 2 * width)] : [(path + "gate_proj", width), (path + "up_proj", width)]
    gateUp = try loader.columnParallel(inputs, inputs: hidden, rank: rank, ranks: ranks)
    gateUpBias = hasBias ? try loader.bias(inputs, rank: rank, ranks: ranks) : nil
    let downPart: WeightLoader.Part = (path + (isFused ? "output_linear" : "down_proj"), hidden)
    down = try loader.rowParallel(downPart, inputs: width, rank: rank, ranks: ranks)
    downBias = hasBias && rank == 0 ? try loader.bias([downPart], rank: 0, ranks: 1) : nil
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
}
