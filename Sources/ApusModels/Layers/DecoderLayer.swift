import ApusCommunication
import ApusCore
import ApusTensors

/// The weights of one decoder layer and the operations over them.
///
///     attention | yield | reduce, mlp | yield | reduce
///
/// A half layer leaves what it adds in `ForwardState.delta`; the next norm adds it to the residual on its way.
struct DecoderLayer {
  private let name: String
  private let index: Int
  private let attentionNorm: Tensor
  private let attention: any AttentionBlock
  private let mlpNorm: Tensor
  private let feedForward: any FeedForwardBlock
  private let epsilon: Float
  private let residualMultiplier: Float

  /// Loads a layer's weights: this rank's heads and its share of the feed-forward width.
  init(
    index: Int, configuration: ModelConfiguration, rotary: RotaryTable, loader: WeightLoader
  ) throws(EngineError) {
    let hidden = configuration.hiddenSize
    let width = configuration.intermediateSize
    let prefix = "model.layers.\(index)."
    let mlp = prefix + "mlp."
    self.index = index
    name = "layers.\(index)."
    epsilon = configuration.normEpsilon
    residualMultiplier = configuration.residualMultiplier

    attentionNorm = try loader.norm(prefix + "input_layernorm", count: hidden)
    attention =
      if let sizes = configuration.latentAttention {
        try LatentAttention(
          index: index, configuration: configuration, sizes: sizes, rotary: rotary, loader: loader)
      } else {
        try GroupedQueryAttention(index: index, configuration: configuration, rotary: rotary, loader: loader)
      }

    mlpNorm = try loader.norm(prefix + "post_attention_layernorm", count: hidden)
    feedForward =
      if let experts = configuration.experts, experts.covers(layer: index) {
        try SparseFeedForward(
          layer: index, path: prefix + experts.names.block, name: name, configuration: configuration, sizes: experts,
          loader: loader)
      } else {
        try DenseFeedForward(
          path: mlp, name: name, width: width, hidden: hidden, hasBias: configuration.mlpBias, loader: loader)
      }
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
        // The residual is the layer's whole input now.
        state.capture?.take(layer: layer.index, state.residual)
      }
    ]
    list += attention.operations(backend: backend)
    list += [
      .yield,
      .compute(name + "attention_reduce") { state in
        attentionGroup.allReduce(state.delta)
        layer.scale(state.delta)
      },
      .compute(name + "mlp_norm") { state in
        backend.addRMSNorm(
          residual: state.residual, delta: state.delta, weight: layer.mlpNorm, epsilon: epsilon, out: state.normed)
      },
    ]
    list += feedForward.operations(backend: backend)
    list += [
      .yield,
      .compute(name + "mlp_reduce") { state in
        mlpGroup.allReduce(state.delta)
        layer.scale(state.delta)
      },
    ]
    return list
  }

  /// Multiplies what a half layer adds, where the family has a multiplier.
  private func scale(_ delta: Tensor) {
    if residualMultiplier != 1 { delta.multiply(by: residualMultiplier) }
  }
}

extension Tensor {
  /// Multiplies each number of a float32 tensor.
  func multiply(by factor: Float) {
    for row in 0..<rows {
      let numbers = float32 + row * stride
      for column in 0..<columns { numbers[column] *= factor }
    }
  }
}
