import ApusCommunication
import ApusCore
import ApusTensors
import Glibc

/// Multi-head latent attention in its absorbed form (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1).
///
/// The expanded form computes each head's keys and values from the latents and attends over those:
///
///     score = q_plain . (K latent) + q_rotated . k_rotated,    out = sum of weights * (V latent)
///
/// The absorbed form moves the head's two matrices to the other side, so that all heads attend over the latents as they are
/// cached:
///
///     score = (K' q_plain) . latent + q_rotated . k_rotated,    out = V (sum of weights * latent)
///
/// Every row takes the absorbed form, prompts too. Which form a row takes must not depend on how it came to be computed: a
/// token that was generated in one request is part of the prompt in the next, and its hidden states lie in the cache for
/// both.
struct LatentAttention: AttentionBlock {
  private let name: String
  private let index: Int
  /// To queries directly, or to `queryRank` numbers first.
  private let queryDown: (weight: any LinearWeight, bias: Tensor?, norm: Tensor)?
  private let query: any LinearWeight
  private let latentDown: any LinearWeight
  private let latentBias: Tensor?
  private let latentNorm: Tensor
  /// For each head K transposed, [latentRank, plainDimension], and V, [valueDimension, latentRank].
  private let keys: any GroupedLinearWeight
  private let values: any GroupedLinearWeight
  private let headBackend: any ExpertBackend
  private let output: any LinearWeight
  private let outputBias: Tensor?
  private let sizes: LatentAttentionConfiguration
  private let shape: AttentionShape
  private let rotary: RotaryTable

  /// Both latents are normalised with transformers' default, whatever `rms_norm_eps` says; released checkpoints have the
  /// same value there.
  private static let epsilon: Float = 1e-6

  /// Loads this rank's heads, and the latents' weights, which every rank holds whole.
  init(
    index: Int, configuration: ModelConfiguration, sizes: LatentAttentionConfiguration, rotary: RotaryTable,
    loader: WeightLoader
  ) throws(EngineError) {
    let layout = loader.layout
    let hidden = configuration.hiddenSize
    let attention = "model.layers.\(index).self_attn."
    let (rank, ranks) = (layout.rank % layout.attentionTensorParallel, layout.attentionTensorParallel)
    let heads = ParallelLayout.share(of: configuration.queryHeads, rank: rank, ranks: ranks)
    guard let headBackend = loader.backend as? any ExpertBackend else {
      throw EngineError(.unsupported, "The backend \(loader.backend.name) has no operators for latent attention.")
    }
    self.headBackend = headBackend
    self.index = index
    self.sizes = sizes
    self.rotary = rotary
    name = "layers.\(index)."

    let queryWidth = configuration.queryHeads * sizes.headDimension
    if let queryRank = sizes.queryRank {
      let down: WeightLoader.Part = (attention + "q_a_proj", queryRank)
      queryDown = (
        try loader.columnParallel([down], inputs: hidden, rank: 0, ranks: 1),
        configuration.qkvBias ? try loader.bias([down], rank: 0, ranks: 1) : nil,
        try loader.norm(attention + "q_a_layernorm", count: queryRank)
      )
      query = try loader.columnParallel(
        [(attention + "q_b_proj", queryWidth)], inputs: queryRank, rank: rank, ranks: ranks)
    } else {
      queryDown = nil
      query = try loader.columnParallel(
        [(attention + "q_proj", queryWidth)], inputs: hidden, rank: rank, ranks: ranks)
    }
    let down: WeightLoader.Part = (attention + "kv_a_proj_with_mqa", sizes.cacheDimension)
    latentDown = try loader.columnParallel([down], inputs: hidden, rank: 0, ranks: 1)
    latentBias = configuration.qkvBias ? try loader.bias([down], rank: 0, ranks: 1) : nil
    latentNorm = try loader.norm(attention + "kv_a_layernorm", count: sizes.latentRank)
    let expansion = try loader.latentExpansion(
      attention + "kv_b_proj", allHeads: configuration.queryHeads, heads: heads, sizes: sizes)
    keys = headBackend.groupLinear(expansion.keys, biases: nil)
    values = headBackend.groupLinear(expansion.values, biases: nil)
    let outputPart: WeightLoader.Part = (attention + "o_proj", hidden)
    output = try loader.rowParallel(
      outputPart, inputs: configuration.queryHeads * sizes.valueDimension, rank: rank, ranks: ranks)
    outputBias =
      configuration.attentionOutputBias && rank == 0 ? try loader.bias([outputPart], rank: 0, ranks: 1) : nil
    shape = AttentionShape(
      queryHeads: heads.count, kvHeads: 1, headDimension: sizes.cacheDimension, scale: sizes.scale,
      slidingWindow: configuration.slidingWindows[index])
  }

  func operations(backend: any Backend) -> [Operation] {
    let layer = self
    var list: [Operation] = []
    if let queryDown {
      list.append(
        .compute(name + "query_down") { state in
          let compressed = state.latent!.compressedQuery
          backend.linear(state.normed, queryDown.weight, bias: queryDown.bias, out: compressed)
          backend.rmsNorm(compressed, weight: queryDown.norm, epsilon: Self.epsilon, out: compressed)
        })
    }
    list += [
      .compute(name + "query") { state in
        let latent = state.latent!
        backend.linear(
          layer.queryDown == nil ? state.normed : latent.compressedQuery, layer.query, bias: nil, out: latent.query)
      },
      .compute(name + "latent_down") { state in
        let latents = state.latent!.latents
        backend.linear(state.normed, layer.latentDown, bias: layer.latentBias, out: latents)
        let plain = latents.columns(0..<layer.sizes.latentRank)
        backend.rmsNorm(plain, weight: layer.latentNorm, epsilon: Self.epsilon, out: plain)
      },
      .compute(name + "rope") { state in
        let latent = state.latent!
        layer.rotate(
          latent.query, heads: layer.shape.queryHeads, headDimension: layer.sizes.headDimension,
          offset: layer.sizes.plainDimension, state, backend)
        layer.rotate(
          latent.latents, heads: 1, headDimension: layer.sizes.cacheDimension, offset: layer.sizes.latentRank, state,
          backend)
      },
      .compute(name + "write_latents") { state in
        let (batch, target) = (state.batch!, state.kvLayers[layer.index])
        backend.writeLatents(state.latent!.latents, slots: batch.slots, layer: target)
        for copy in 0..<batch.copyCount {
          let row = Int(batch.copyRows![copy])
          backend.writeLatents(state.latent!.latents.rows(row..<row + 1), slots: batch.copySlots! + copy, layer: target)
        }
      },
      .compute(name + "absorb") { state in layer.absorb(state.latent!) },
      .compute(name + "attention") { state in
        let latent = state.latent!
        backend.attention(
          latent.absorbedQuery, layer: state.kvLayers[layer.index], batch: state.batch.attention, shape: layer.shape,
          out: latent.attended)
      },
      .compute(name + "expand") { state in
        layer.headBackend.columnLinear(
          state.latent!.attended, step: layer.sizes.latentRank, layer.values, out: state.attended,
          outStep: layer.sizes.valueDimension)
      },
      .compute(name + "attention_output") { state in
        backend.linear(state.attended, layer.output, bias: layer.outputBias, out: state.delta)
      },
    ]
    return list
  }

  /// Rotates the last numbers of each head.
  private func rotate(
    _ x: Tensor, heads: Int, headDimension: Int, offset: Int, _ state: ForwardState, _ backend: any Backend
  ) {
    let (positions, table) = (state.batch.positions, rotary.tensor)
    if sizes.isInterleaved {
      return backend.ropeInterleaved(
        x, heads: heads, headDimension: headDimension, offset: offset, positions: positions, table: table)
    }
    for head in 0..<heads {
      let first = head * headDimension + offset
      backend.rope(
        x.columns(first..<first + sizes.rotaryDimension), heads: 1, headDimension: sizes.rotaryDimension,
        positions: positions, table: table)
    }
  }

  /// Makes queries over latents: each head's plain part through K transposed, then its rotated part as it is.
  private func absorb(_ latent: LatentActivations) {
    let (head, wide, rank, plain) = (
      sizes.headDimension, sizes.cacheDimension, sizes.latentRank, sizes.plainDimension
    )
    headBackend.columnLinear(latent.query, step: head, keys, out: latent.absorbedQuery, outStep: wide)
    let bytes = sizes.rotaryDimension * MemoryLayout<Float>.stride
    for row in 0..<latent.query.rows {
      let from = latent.query.float32 + row * latent.query.stride + plain
      let to = latent.absorbedQuery.float32 + row * latent.absorbedQuery.stride + rank
      for number in 0..<keys.groupCount { memcpy(to + number * wide, from + number * head, bytes) }
    }
  }
}

extension WeightLoader {
  /// Loads the matrix that expands latents to the keys and values of all heads, [heads * (plain + value), latentRank], and
  /// splits it into the two of each of some heads: K transposed and V. They are plain numbers, whatever the matrix is stored
  /// as: a quantised matrix has its scales along the wrong side for K transposed.
  func latentExpansion(
    _ name: String, allHeads: Int, heads: Range<Int>, sizes: LatentAttentionConfiguration
  ) throws(EngineError) -> (keys: [any LinearWeight], values: [any LinearWeight]) {
    let (plain, value, rank) = (sizes.plainDimension, sizes.valueDimension, sizes.latentRank)
    let source = try store.load(name + ".weight", shape: [allHeads * (plain + value), rank], role: .matrix)
    let width = source.dtype.byteCount
    var keys: [any LinearWeight] = []
    var values: [any LinearWeight] = []
    let turned = try backend.allocate(rows: rank, columns: plain, dtype: source.dtype)
    for head in heads {
      let first = source.address + head * (plain + value) * rank * width
      // Numbers are moved as they are; their type matters to nobody here.
      for row in 0..<plain {
        for column in 0..<rank {
          memcpy(turned.pointer + (column * plain + row) * width, first + (row * rank + column) * width, width)
        }
      }
      keys.append(
        try packPlain(
          WeightSource(
            address: turned.pointer, dtype: source.dtype, rows: rank, columns: plain, owner: turned.memory)))
      values.append(
        try packPlain(
          WeightSource(
            address: first + plain * rank * width, dtype: source.dtype, rows: value, columns: rank,
            owner: source.owner)))
    }
    return (keys, values)
  }
}
