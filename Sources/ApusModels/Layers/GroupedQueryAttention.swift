import ApusCommunication
import ApusCore
import ApusTensors

/// The attention half of a layer: from the normalised input in `ForwardState.normed` to `ForwardState.delta`, of which the
/// ranks that split the heads hold summands.
protocol AttentionBlock: Sendable {
  /// The half as operations, without the sum over ranks.
  func operations(backend: any Backend) -> [Operation]
}

/// Attention in which each group of query heads shares a K/V head.
struct GroupedQueryAttention: AttentionBlock {
  private let name: String
  private let index: Int
  private let qkv: any LinearWeight
  private let qkvBias: Tensor?
  private let queryNorm: Tensor?
  private let keyNorm: Tensor?
  /// What the norms see of q and of k: heads, or whole rows as one head.
  private let queryNormShape: (heads: Int, dimension: Int)
  private let keyNormShape: (heads: Int, dimension: Int)
  private let output: any LinearWeight
  private let outputBias: Tensor?
  private let shape: AttentionShape
  private let epsilon: Float
  private let rotary: RotaryTable

  /// Loads this rank's heads.
  /// - Parameter inputWidth: numbers that queries, keys and values are made of; `nil` for the hidden size.
  init(
    index: Int, configuration: ModelConfiguration, rotary: RotaryTable, loader: WeightLoader, inputWidth: Int? = nil
  ) throws(EngineError) {
    let layout = loader.layout
    let hidden = configuration.hiddenSize
    let dimension = configuration.headDimension
    let queryWidth = configuration.queryHeads * dimension
    let keyWidth = configuration.kvHeads * dimension
    let attention = "model.layers.\(index).self_attn."
    self.index = index
    self.rotary = rotary
    name = "layers.\(index)."
    epsilon = configuration.normEpsilon

    let (headRank, headRanks) = (layout.rank % layout.attentionTensorParallel, layout.attentionTensorParallel)
    let projections: [WeightLoader.Part] = [
      (attention + "q_proj", queryWidth), (attention + "k_proj", keyWidth), (attention + "v_proj", keyWidth),
    ]
    qkv = try loader.columnParallel(projections, inputs: inputWidth ?? hidden, rank: headRank, ranks: headRanks)
    qkvBias = configuration.qkvBias ? try loader.bias(projections, rank: headRank, ranks: headRanks) : nil
    let normsRows = configuration.queryKeyNormSpansHeads
    guard !normsRows || headRanks == 1 else {
      throw EngineError(.unsupported, "Heads that are normalised together cannot be split over ranks.")
    }
    queryNormShape = normsRows ? (1, queryWidth) : (configuration.queryHeads / headRanks, dimension)
    keyNormShape = normsRows ? (1, keyWidth) : (configuration.kvHeads / headRanks, dimension)
    let hasNorms = configuration.queryKeyNorm
    queryNorm = hasNorms ? try loader.norm(attention + "q_norm", count: queryNormShape.dimension) : nil
    keyNorm = hasNorms ? try loader.norm(attention + "k_norm", count: keyNormShape.dimension) : nil
    let outputPart: WeightLoader.Part = (attention + "o_proj", hidden)
    output = try loader.rowParallel(outputPart, inputs: queryWidth, rank: headRank, ranks: headRanks)
    // Ranks add their outputs up, so only the first one adds the bias.
    outputBias =
      configuration.attentionOutputBias && headRank == 0 ? try loader.bias([outputPart], rank: 0, ranks: 1) : nil
    shape = AttentionShape(
      queryHeads: configuration.queryHeads / headRanks, kvHeads: configuration.kvHeads / headRanks,
      headDimension: dimension, scale: configuration.attentionScale ?? 1 / Float(dimension).squareRoot(),
      slidingWindow: configuration.slidingWindows[index],
      sinks: configuration.hasSinks
        ? try loader.vector(attention + "sinks", count: configuration.queryHeads)
          .columns(
            headRank * (configuration.queryHeads / headRanks)..<(headRank + 1) * (configuration.queryHeads / headRanks))
        : nil)
  }

  func operations(backend: any Backend) -> [Operation] {
    [.compute(name + "qkv") { state in self.project(state.normed, state, backend: backend) }]
      + operationsAfterProjection(backend: backend)
  }

  /// Makes queries, keys and values of an input.
  func project(_ input: Tensor, _ state: ForwardState, backend: any Backend) {
    backend.linear(input, qkv, bias: qkvBias, out: state.qkv)
  }

  /// What follows once queries, keys and values are there.
  func operationsAfterProjection(backend: any Backend) -> [Operation] {
    let layer = self
    let (shape, epsilon) = (shape, epsilon)
    var list: [Operation] = []
    if let queryNorm, let keyNorm {
      list.append(
        .compute(name + "qk_norm") { state in
          let (query, key) = (layer.queryNormShape, layer.keyNormShape)
          backend.headRMSNorm(
            state.query, heads: query.heads, headDimension: query.dimension, weight: queryNorm, epsilon: epsilon)
          backend.headRMSNorm(
            state.key, heads: key.heads, headDimension: key.dimension, weight: keyNorm, epsilon: epsilon)
        })
    }
    list += [
      .compute(name + "rope") { state in
        let positions = state.batch.positions
        backend.rope(
          state.query, heads: shape.queryHeads, headDimension: shape.headDimension, positions: positions,
          table: layer.rotary.tensor)
        backend.rope(
          state.key, heads: shape.kvHeads, headDimension: shape.headDimension, positions: positions,
          table: layer.rotary.tensor)
      },
      .compute(name + "write_kv") { state in
        let (batch, target) = (state.batch!, state.kvLayers[layer.index])
        backend.writeKV(state.key, state.value, slots: batch.slots, layer: target)
        for copy in 0..<batch.copyCount {
          let row = Int(batch.copyRows![copy])
          backend.writeKV(
            state.key.rows(row..<row + 1), state.value.rows(row..<row + 1), slots: batch.copySlots! + copy,
            layer: target)
        }
      },
      .compute(name + "attention") { state in
        backend.attention(
          state.query, layer: state.kvLayers[layer.index], batch: state.batch.attention, shape: layer.shape,
          out: state.attended)
      },
      .compute(name + "attention_output") { state in
        backend.linear(state.attended, layer.output, bias: layer.outputBias, out: state.delta)
      },
    ]
    return list
  }
}
