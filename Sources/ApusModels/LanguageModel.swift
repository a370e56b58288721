public import ApusCommunication
public import ApusCore
public import ApusTensors

/// A decoder that turns tokens into logits: weights and the list of operations over them, constant once loaded.
///
/// What a pass computes lives in a `ForwardState`; a model can serve several states in turns.
public final class LanguageModel: Sendable {
  /// What the model is.
  public let configuration: ModelConfiguration
  /// The longest sequence, prompt and output together.
  public let contextLength: Int
  /// The format of the first layer's weights.
  public let weightFormat: WeightFormat
  /// The format of the output layer's weights.
  public var outputFormat: WeightFormat { output.format }
  /// Linear layers that were to have int8 with a scale for each output and got one for each group instead, because that
  /// would have rounded them too coarsely.
  public let regroupedLayers: Int
  /// The format of weights that are not quantised.
  public let dtype: DType
  /// Bytes of packed weights, as stored.
  public let weightBytes: Int
  /// [layer]: bytes of the packed weights of one expert; 0 for layers without any.
  public let expertBytes: [Int]
  /// Where experts lie; `nil` for each at its own number.
  public let expertLocation: ExpertLocation?
  /// The passes' operations, from the embedding to the last layer.
  public let executor: OperationExecutor
  /// Widths of this rank's activations.
  public let activationShape: ActivationShape
  /// What this rank's layers remember of a token.
  public let kvLayout: KVLayout

  let backend: any Backend
  let rotary: RotaryTable
  /// Writes tokens' embeddings, float32 [count, hidden].
  let embed: @Sendable (_ tokens: UnsafePointer<TokenID>, _ count: Int, _ out: Tensor) -> Void
  let output: any LinearWeight
  private let finalNorm: Tensor
  /// The final norm's weight divided by what logits are divided by.
  private let logitNorm: Tensor

  /// Loads a model's weights and builds its operations.
  ///
  /// - Parameters:
  ///   - experts: where the weights of experts lie and how rows reach them.
  ///   - contextLength: the longest sequence served; `nil` for the model's own.
  ///   - cache: has what an earlier start packed.
  ///   - groups: the ranks that split the heads and those that split the feed-forward layers.
  ///   - progress: called with bytes read so far and in all.
  /// - Throws: `invalidCheckpoint` naming file, tensor and what was expected; `outOfMemory`; `invalidRequest` if the
  ///   context length is impossible.
  public init(
    _ configuration: ModelConfiguration, store: any WeightStore, backend: any Backend,
    options: WeightOptions = WeightOptions(), experts: ExpertOptions = ExpertOptions(), contextLength: Int? = nil,
    layout: ParallelLayout = .single,
    attentionGroup: any ProcessGroup = SingleProcessGroup(), mlpGroup: any ProcessGroup = SingleProcessGroup(),
    cache: PackedWeightCache? = nil, progress: ((_ done: Int, _ total: Int) -> Void)? = nil
  ) throws(EngineError) {
    let context = contextLength ?? configuration.defaultContextLength
    guard context >= 1, context <= configuration.maximumContextLength else {
      throw EngineError(
        .invalidRequest,
        "The context length must be from 1 to \(configuration.maximumContextLength), which is what the model's "
          + "positions allow; got \(context).", parameter: "context_length")
    }
    let headRanks = layout.attentionTensorParallel
    guard configuration.kvHeads % headRanks == 0, configuration.intermediateSize % layout.denseTensorParallel == 0
    else {
      throw EngineError(
        .unsupported,
        "\(configuration.kvHeads) K/V heads and a feed-forward width of \(configuration.intermediateSize) cannot be "
          + "split over \(headRanks) and \(layout.denseTensorParallel) ranks.")
    }
    let width = (options.dtype ?? configuration.dtype ?? .float32).byteCount
    let loader = WeightLoader(
      store: store, backend: backend, options: options, layout: layout, experts: experts,
      sample: "model.layers.0.self_attn.o_proj.weight", expectedBytes: configuration.parameterCount * width,
      cache: cache, progress: progress)

    let rotary = try RotaryTable(
      configuration.rotary, contextLength: context, maxPositionEmbeddings: configuration.maxPositionEmbeddings,
      backend: backend)
    // A tied matrix may be stored under either of its two names.
    let tableName =
      configuration.tiedEmbeddings && !store.contains("model.embed_tokens.weight") && store.contains("lm_head.weight")
      ? "lm_head" : "model.embed_tokens"
    let (vocabulary, hidden) = (configuration.vocabularySize, configuration.hiddenSize)
    let (plainEmbed, table) = try loader.embeddingFunction(tableName, rows: vocabulary, columns: hidden)
    let embed: @Sendable (UnsafePointer<TokenID>, Int, Tensor) -> Void
    if configuration.embeddingMultiplier == 1 {
      embed = plainEmbed
    } else {
      let multiplier = configuration.embeddingMultiplier
      embed = { (tokens: UnsafePointer<TokenID>, count: Int, out: Tensor) in
        plainEmbed(tokens, count, out)
        out.prefix(rows: count).multiply(by: multiplier)
      }
    }
    var operations: [Operation] = [
      .compute("embedding") { state in embed(state.batch.tokens, state.batch.rowCount, state.residual) }
    ]
    for index in 0..<configuration.layerCount {
      let layer = try DecoderLayer(index: index, configuration: configuration, rotary: rotary, loader: loader)
      operations += layer.operations(backend: backend, attentionGroup: attentionGroup, mlpGroup: mlpGroup)
    }
    finalNorm = try loader.norm("model.norm", count: configuration.hiddenSize)
    if configuration.logitsScaling == 1 {
      logitNorm = finalNorm
    } else {
      logitNorm = try loader.norm("model.norm", count: configuration.hiddenSize)
      logitNorm.multiply(by: 1 / configuration.logitsScaling)
    }
    output =
      if configuration.tiedEmbeddings {
        try loader.tiedOutputLayer((tableName, vocabulary), inputs: hidden, table: table)
      } else {
        try loader.outputLayer(("lm_head", vocabulary), inputs: hidden)
      }

    self.configuration = configuration
    self.contextLength = context
    self.dtype = loader.dtype
    self.weightFormat = loader.firstFormat ?? .dense(loader.dtype)
    self.regroupedLayers = loader.regroupedLayers
    self.weightBytes = loader.packedBytes
    self.expertBytes = (0..<configuration.layerCount).map { loader.expertBytes[$0] ?? 0 }
    self.expertLocation = experts.location
    self.backend = backend
    self.rotary = rotary
    self.embed = embed
    self.executor = OperationExecutor(operations)
    let (queryHeads, kvHeads) = (configuration.queryHeads / headRanks, configuration.kvHeads / headRanks)
    let latent = configuration.latentAttention
    // Latents are whole on every rank.
    self.kvLayout =
      latent == nil ? .heads(kvHeads, dimension: configuration.headDimension) : configuration.kvLayout
    self.activationShape = ActivationShape(
      hidden: configuration.hiddenSize, queryWidth: latent == nil ? queryHeads * configuration.headDimension : 0,
      keyWidth: latent == nil ? kvHeads * configuration.headDimension : 0,
      intermediate: max(
        configuration.intermediateSize / layout.denseTensorParallel,
        configuration.experts?.sharedIntermediateSize ?? 0),
      latent: latent.map { LatentShape(heads: queryHeads, sizes: $0) },
      experts: configuration.experts.map {
        ExpertShape(
          expertCount: $0.expertCount, expertsPerToken: $0.expertsPerToken, intermediate: $0.intermediateSize,
          hidden: configuration.hiddenSize, slotCount: experts.location?.slotCount ?? $0.expertCount,
          slotCapacity: experts.dispatch.capacity)
      })
  }

  /// Makes the table of rotations ready for positions 0..<count. Called before a pass that reaches so far.
  public func prepare(positions count: Int) { rotary.prepare(positions: count) }

  /// Computes logits of some rows of a finished pass.
  ///
  /// - Parameters:
  ///   - rows: [count], rows of the pass.
  ///   - scratch: three float32 tensors of at least [count, hidden].
  ///   - out: float32 [count, vocabulary].
  public func logits(
    _ state: ForwardState, rows: UnsafePointer<Int32>, count: Int, scratch: LogitScratch, out: Tensor
  ) {
    let normed = lastHidden(state, rows: rows, count: count, norm: logitNorm, scratch: scratch)
    backend.linear(normed, output, bias: nil, out: out)
  }

  /// The last layer's output of some rows of a finished pass, after the final norm: what logits and embeddings are made
  /// of.
  ///
  /// - Returns: float32 [count, hidden], in the scratch memory.
  public func lastHidden(
    _ state: ForwardState, rows: UnsafePointer<Int32>, count: Int, scratch: LogitScratch
  ) -> Tensor {
    lastHidden(state, rows: rows, count: count, norm: finalNorm, scratch: scratch)
  }

  func lastHidden(
    _ state: ForwardState, rows: UnsafePointer<Int32>, count: Int, norm: Tensor, scratch: LogitScratch
  ) -> Tensor {
    let residual = scratch.residual.prefix(rows: count)
    let delta = scratch.delta.prefix(rows: count)
    let normed = scratch.normed.prefix(rows: count)
    backend.gather(state.residual, rows: rows, count: count, out: residual)
    backend.gather(state.delta, rows: rows, count: count, out: delta)
    backend.addRMSNorm(
      residual: residual, delta: delta, weight: norm, epsilon: configuration.normEpsilon, out: normed)
    return normed
  }
}

/// Memory of the rows whose logits are computed.
public struct LogitScratch: Sendable {
  let residual: Tensor
  let delta: Tensor
  let normed: Tensor

  /// Allocates for `rows` rows.
  /// - Throws: `outOfMemory`.
  public init(rows: Int, hiddenSize: Int, backend: any Backend) throws(EngineError) {
    residual = try backend.allocate(rows: rows, columns: hiddenSize, dtype: .float32)
    delta = try backend.allocate(rows: rows, columns: hiddenSize, dtype: .float32)
    normed = try backend.allocate(rows: rows, columns: hiddenSize, dtype: .float32)
  }
}
