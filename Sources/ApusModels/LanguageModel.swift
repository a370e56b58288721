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
  /// The format of the linear layers' weights.
  public let weightFormat: WeightFormat
  /// The format of weights that are not quantised.
  public let dtype: DType
  /// Bytes of packed weights, as stored.
  public let weightBytes: Int
  /// The passes' operations, from the embedding to the last layer.
  public let executor: OperationExecutor
  /// Widths of this rank's activations.
  public let activationShape: ActivationShape
  /// K/V heads of this rank.
  public let kvHeads: Int

  private let backend: any Backend
  private let rotary: RotaryTable
  private let finalNorm: Tensor
  private let output: any LinearWeight

  /// Loads a model's weights and builds its operations.
  ///
  /// - Parameters:
  ///   - contextLength: the longest sequence served; `nil` for the model's own.
  ///   - groups: the ranks that split the heads and those that split the feed-forward layers.
  ///   - progress: called with bytes read so far and in all.
  /// - Throws: `invalidCheckpoint` naming file, tensor and what was expected; `outOfMemory`; `invalidRequest` if the
  ///   context length is impossible.
  public init(
    _ configuration: ModelConfiguration, store: any WeightStore, backend: any Backend,
    options: WeightOptions = WeightOptions(), contextLength: Int? = nil, layout: ParallelLayout = .single,
    attentionGroup: any ProcessGroup = SingleProcessGroup(), mlpGroup: any ProcessGroup = SingleProcessGroup(),
    progress: ((_ done: Int, _ total: Int) -> Void)? = nil
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
      store: store, backend: backend, options: options, layout: layout,
      sample: "model.layers.0.self_attn.q_proj.weight", expectedBytes: configuration.parameterCount * width,
      progress: progress)

    let rotary = try RotaryTable(
      configuration.rotary, contextLength: context, maxPositionEmbeddings: configuration.maxPositionEmbeddings,
      backend: backend)
    // A tied matrix may be stored under either of its two names.
    let tableName =
      configuration.tiedEmbeddings && !store.contains("model.embed_tokens.weight") && store.contains("lm_head.weight")
      ? "lm_head" : "model.embed_tokens"
    let table = try loader.embedding(
      tableName, rows: configuration.vocabularySize, columns: configuration.hiddenSize)
    var operations: [Operation] = [
      .compute("embedding") { state in
        backend.embed(
          table: table, tokens: state.batch.tokens, count: state.batch.rowCount, out: state.residual)
      }
    ]
    for index in 0..<configuration.layerCount {
      let layer = try DecoderLayer(index: index, configuration: configuration, rotary: rotary, loader: loader)
      operations += layer.operations(backend: backend, attentionGroup: attentionGroup, mlpGroup: mlpGroup)
    }
    finalNorm = try loader.norm("model.norm", count: configuration.hiddenSize)
    output =
      configuration.tiedEmbeddings
      ? try loader.tiedOutput(table)
      : try loader.replicated(("lm_head", configuration.vocabularySize), inputs: configuration.hiddenSize)

    self.configuration = configuration
    self.contextLength = context
    self.dtype = loader.dtype
    self.weightFormat = options.quantizeToInt8 || loader.hasStoredInt8 ? .int8PerChannel : .dense(loader.dtype)
    self.weightBytes = loader.packedBytes
    self.backend = backend
    self.rotary = rotary
    self.executor = OperationExecutor(operations)
    self.kvHeads = configuration.kvHeads / headRanks
    self.activationShape = ActivationShape(
      hidden: configuration.hiddenSize, queryWidth: configuration.queryHeads / headRanks * configuration.headDimension,
      keyWidth: configuration.kvHeads / headRanks * configuration.headDimension,
      intermediate: configuration.intermediateSize / layout.denseTensorParallel)
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
    let residual = scratch.residual.prefix(rows: count)
    let delta = scratch.delta.prefix(rows: count)
    let normed = scratch.normed.prefix(rows: count)
    backend.gather(state.residual, rows: rows, count: count, out: residual)
    backend.gather(state.delta, rows: rows, count: count, out: delta)
    backend.addRMSNorm(
      residual: residual, delta: delta, weight: finalNorm, epsilon: configuration.normEpsilon, out: normed)
    backend.linear(normed, output, bias: nil, out: out)
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
