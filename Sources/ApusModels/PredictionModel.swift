import ApusCommunication
public import ApusCore
public import ApusTensors
import Glibc

/// A multi-token prediction layer: from the target's last hidden state at a position and the token after it, a hidden state
/// that predicts the token after that (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 2.2; SGLang's NEXTN).
///
///     x = eh_proj [ enorm(embedding of token p + 1) ; hnorm(hidden state at p) ]
///     h = shared_head.norm(decoder layer(x)),    logits = shared_head.head h
///
/// The hidden state at p is the target's after its final norm, or, where that position is a draft itself, h of the position
/// before. The layer has K/V of its own, at position p.
public final class PredictionModel: PredictionHead {
  public let activationShape: ActivationShape
  public let kvLayout: KVLayout
  /// Bytes of the layer's packed weights.
  public let weightBytes: Int

  private let target: LanguageModel
  private let embed: @Sendable (_ tokens: UnsafePointer<TokenID>, _ count: Int, _ out: Tensor) -> Void
  private let tokenNorm: Tensor
  private let hiddenNorm: Tensor
  private let join: any LinearWeight
  private let executor: OperationExecutor
  private let finalNorm: Tensor
  private let output: any LinearWeight

  public var hiddenSize: Int { target.configuration.hiddenSize }
  public var vocabularySize: Int { target.configuration.vocabularySize }
  public var tokenOfColumn: [TokenID]? { nil }
  public var capturedLayers: [Int] { [] }

  /// Where a target's first prediction layer lies in a checkpoint.
  static func prefix(_ configuration: ModelConfiguration) -> String { "model.layers.\(configuration.layerCount)." }

  /// Whether a checkpoint has a prediction layer.
  public static func isPresent(_ configuration: ModelConfiguration, in store: any WeightStore) -> Bool {
    store.contains(prefix(configuration) + "eh_proj.weight")
  }

  /// Loads the layer behind a target's last one. Embedding and head are the target's where the layer has none of its own.
  /// - Throws: `invalidCheckpoint` naming file, tensor and what was expected; `outOfMemory`.
  public init(
    target: LanguageModel, store: any WeightStore, options: WeightOptions = WeightOptions()
  ) throws(EngineError) {
    var configuration = target.configuration
    let backend = target.backend
    let index = configuration.layerCount
    let prefix = Self.prefix(configuration)
    let (vocabulary, hidden) = (configuration.vocabularySize, configuration.hiddenSize)
    configuration.slidingWindows.append(0)
    let loader = WeightLoader(
      store: store, backend: backend, options: options, layout: .single,
      experts: ExpertOptions(location: target.expertLocation), sample: prefix + "eh_proj.weight",
      expectedBytes: 0, progress: nil)

    tokenNorm = try loader.norm(prefix + "enorm", count: hidden)
    hiddenNorm = try loader.norm(prefix + "hnorm", count: hidden)
    join = try loader.replicated((prefix + "eh_proj", hidden), inputs: 2 * hidden)
    let layer = try DecoderLayer(index: index, configuration: configuration, rotary: target.rotary, loader: loader)
    let group = SingleProcessGroup()
    executor = OperationExecutor(layer.operations(backend: backend, attentionGroup: group, mlpGroup: group))
    finalNorm = try loader.norm(prefix + "shared_head.norm", count: hidden)
    // Random weights are there under every name.
    let hasOwn = !configuration.tiedEmbeddings && !(store is DummyWeights)
    if hasOwn, store.contains(prefix + "embed_tokens.weight") {
      embed = try loader.embeddingFunction(prefix + "embed_tokens", rows: vocabulary, columns: hidden).embed
    } else {
      embed = target.embed
    }
    if hasOwn, store.contains(prefix + "shared_head.head.weight") {
      output = try loader.outputLayer((prefix + "shared_head.head", vocabulary), inputs: hidden)
    } else {
      output = target.output
    }
    self.target = target
    activationShape = target.activationShape
    kvLayout = target.kvLayout
    weightBytes = loader.packedBytes
  }

  /// The layer's number follows the target's last.
  public func kvLayers(_ own: any KVLayer) -> [any KVLayer] {
    Array(repeating: own, count: target.configuration.layerCount + 1)
  }

  public func prepare(positions count: Int) { target.prepare(positions: count) }

  public func hidden(
    of state: ForwardState, rows: UnsafePointer<Int32>, count: Int, scratch: HiddenScratch
  ) -> Tensor {
    target.lastHidden(state, rows: rows, count: count, scratch: scratch.rows)
  }

  public func run(_ state: ForwardState, hidden: Tensor, joined: Tensor) {
    let (backend, width) = (target.backend, target.configuration.hiddenSize)
    let (rows, epsilon) = (state.batch.rowCount, target.configuration.normEpsilon)
    embed(state.batch.tokens, rows, state.normed)
    backend.rmsNorm(state.normed, weight: tokenNorm, epsilon: epsilon, out: joined.columns(0..<width))
    backend.rmsNorm(hidden, weight: hiddenNorm, epsilon: epsilon, out: joined.columns(width..<2 * width))
    // The layer begins by adding what came before it to the residual.
    for row in 0..<rows { memset(state.residual.float32 + row * state.residual.stride, 0, 4 * width) }
    backend.linear(joined, join, bias: nil, out: state.delta)
    executor.run(state)
  }

  public func logits(
    _ state: ForwardState, rows: UnsafePointer<Int32>, count: Int, scratch: LogitScratch, out: Tensor
  ) -> Tensor {
    let normed = target.lastHidden(state, rows: rows, count: count, norm: finalNorm, scratch: scratch)
    target.backend.linear(normed, output, bias: nil, out: out)
    return normed
  }
}
