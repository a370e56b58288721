import ApusCommunication
import ApusCore
import ApusTensors

/// The weights of one dense decoder layer and the operations over them.
///
///     attention | yield | reduce, mlp | yield | reduce
///
/// A half layer leaves what it adds in `ForwardState.delta`; the next norm adds it to the residual on its way.
struct DecoderLayer {
  private let name: String
  private let index: Int
  private let attentionNorm: Tensor
  private let qkv: any LinearWeight
  private let qkvBias: Tensor?
  private let queryNorm: Tensor?
  private let keyNorm: Tensor?
  private let attentionOutput: any LinearWeight
  private let attentionOutputBias: Tensor?
  private let mlpNorm: Tensor
  private let gateUp: any LinearWeight
  private let gateUpBias: Tensor?
  private let down: any LinearWeight
  private let downBias: Tensor?
  private let shape: AttentionShape
  private let epsilon: Float
  private let rotary: RotaryTable

  /// Loads a layer's weights: this rank's heads and its share of the feed-forward width.
  init(
    index: Int, configuration: ModelConfiguration, rotary: RotaryTable, loader: WeightLoader
  ) throws(EngineError) {
    let layout = loader.layout
    let hidden = configuration.hiddenSize
    let dimension = configuration.headDimension
    let queryWidth = configuration.queryHeads * dimension
    let keyWidth = configuration.kvHeads * dimension
    let width = configuration.intermediateSize
    let prefix = "model.layers.\(index)."
    let attention = prefix + "self_attn."
    let mlp = prefix + "mlp."
    self.index = index
    self.rotary = rotary
    name = "layers.\(index)."
    epsilon = configuration.normEpsilon

    let (headRank, headRanks) = (layout.rank % layout.attentionTensorParallel, layout.attentionTensorParallel)
    let projections: [WeightLoader.Part] = [
      (attention + "q_proj", queryWidth), (attention + "k_proj", keyWidth), (attention + "v_proj", keyWidth),
    ]
    attentionNorm = try loader.norm(prefix + "input_layernorm", count: hidden)
    qkv = try loader.columnParallel(projections, inputs: hidden, rank: headRank, ranks: headRanks)
    qkvBias = configuration.qkvBias ? try loader.bias(projections, rank: headRank, ranks: headRanks) : nil
    queryNorm = configuration.queryKeyNorm ? try loader.norm(attention + "q_norm", count: dimension) : nil
    keyNorm = configuration.queryKeyNorm ? try loader.norm(attention + "k_norm", count: dimension) : nil
    let output: WeightLoader.Part = (attention + "o_proj", hidden)
    attentionOutput = try loader.rowParallel(output, inputs: queryWidth, rank: headRank, ranks: headRanks)
    // Ranks add their outputs up, so only the first one adds the bias.
    attentionOutputBias =
      configuration.attentionOutputBias && headRank == 0 ? try loader.bias([output], rank: 0, ranks: 1) : nil

    let (mlpRank, mlpRanks) = (layout.rank % layout.denseTensorParallel, layout.denseTensorParallel)
    let inputs: [WeightLoader.Part] = [(mlp + "gate_proj", width), (mlp + "up_proj", width)]
    mlpNorm = try loader.norm(prefix + "post_attention_layernorm", count: hidden)
    gateUp = try loader.columnParallel(inputs, inputs: hidden, rank: mlpRank, ranks: mlpRanks)
    gateUpBias = configuration.mlpBias ? try loader.bias(inputs, rank: mlpRank, ranks: mlpRanks) : nil
    let downPart: WeightLoader.Part = (mlp + "down_proj", hidden)
    down = try loader.rowParallel(downPart, inputs: width, rank: mlpRank, ranks: mlpRanks)
    downBias = configuration.mlpBias && mlpRank == 0 ? try loader.bias([downPart], rank: 0, ranks: 1) : nil

    shape = AttentionShape(
      queryHeads: configuration.queryHeads / headRanks, kvHeads: configuration.kvHeads / headRanks,
      headDimension: dimension, scale: 1 / Float(dimension).squareRoot(),
      slidingWindow: configuration.slidingWindows[index])
  }

  /// The layer as operations. `attentionGroup` holds the ranks that split the heads, `mlpGroup` those that split the
  /// feed-forward width.
  func operations(
    backend: any Backend, attentionGroup: any ProcessGroup, mlpGroup: any ProcessGroup
  ) -> [Operation] {
    let layer = self
    let epsilon = epsilon
    let first = index == 0
    var list: [Operation] = [
      .compute(name + "attention_norm") { state in
        if first {
          backend.rmsNorm(state.residual, weight: layer.attentionNorm, epsilon: epsilon, out: state.normed)
        } else {
          backend.addRMSNorm(
            residual: state.residual, delta: state.delta, weight: layer.attentionNorm, epsilon: epsilon,
            out: state.normed)
        }
      },
      .compute(name + "qkv") { state in
        backend.linear(state.normed, layer.qkv, bias: layer.qkvBias, out: state.qkv)
      },
    ]
    if let queryNorm, let keyNorm {
      let shape = shape
      list.append(
        .compute(name + "qk_norm") { state in
          backend.headRMSNorm(
            state.query, heads: shape.queryHeads, headDimension: shape.headDimension, weight: queryNorm,
            epsilon: epsilon)
          backend.headRMSNorm(
            state.key, heads: shape.kvHeads, headDimension: shape.headDimension, weight: keyNorm, epsilon: epsilon)
        })
    }
    list += [
      .compute(name + "rope") { state in
        let (shape, positions) = (layer.shape, state.batch.positions)
        backend.rope(
          state.query, heads: shape.queryHeads, headDimension: shape.headDimension, positions: positions,
          table: layer.rotary.tensor)
        backend.rope(
          state.key, heads: shape.kvHeads, headDimension: shape.headDimension, positions: positions,
          table: layer.rotary.tensor)
      },
      .compute(name + "write_kv") { state in
        backend.writeKV(state.key, state.value, slots: state.batch.slots, layer: state.kvLayers[layer.index])
      },
      .compute(name + "attention") { state in
        backend.attention(
          state.query, layer: state.kvLayers[layer.index], batch: state.batch.attention, shape: layer.shape,
          out: state.attended)
      },
      .compute(name + "attention_output") { state in
        backend.linear(state.attended, layer.attentionOutput, bias: layer.attentionOutputBias, out: state.delta)
      },
      .yield,
      .compute(name + "attention_reduce") { state in attentionGroup.allReduce(state.delta) },
      .compute(name + "mlp_norm") { state in
        backend.addRMSNorm(
          residual: state.residual, delta: state.delta, weight: layer.mlpNorm, epsilon: epsilon, out: state.normed)
      },
      .compute(name + "gate_up") { state in
        backend.linear(state.normed, layer.gateUp, bias: layer.gateUpBias, out: state.gateUp)
      },
      .compute(name + "activation") { state in backend.siluMul(state.gateUp, out: state.activated) },
      .compute(name + "down") { state in
        backend.linear(state.activated, layer.down, bias: layer.downBias, out: state.delta)
      },
      .yield,
      .compute(name + "mlp_reduce") { state in mlpGroup.allReduce(state.delta) },
    ]
    return list
  }
}
