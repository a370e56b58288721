import ApusCommunication
public import ApusCore
public import ApusTensors
import Glibc

/// What `config.json` of an EAGLE head says.
public struct EagleConfiguration: Sendable {
  /// The two forms of heads.
  public enum Form: Sendable, Equatable {
    /// EAGLE-1 and EAGLE-2 (https://arxiv.org/abs/2401.15077): a layer over `fc [embedding ; last hidden state]`, with the
    /// target's output layer.
    case lastHidden
    /// EAGLE-3 (https://arxiv.org/abs/2503.01840): a layer whose queries, keys and values are made of the embedding and of
    /// `fc [low ; middle ; high hidden state]`, with an output layer of its own over a part of the vocabulary.
    case fused
  }

  /// The layer's sizes, as those of a model of one layer.
  public let layer: ModelConfiguration
  public let form: Form
  /// The target's hidden size.
  public let targetHiddenSize: Int
  /// Tokens that are drafted.
  public let draftVocabularySize: Int
  /// Whether the residual begins with the normalised hidden state.
  public let normBeforeResidual: Bool
  /// The target's layers whose outputs are fused; `nil` for the usual three.
  public let auxiliaryLayers: [Int]?
  let hasBias: Bool
  let path: String

  /// Reads the content of a `config.json`.
  /// - Parameter hasHiddenNorm: whether the checkpoint has a norm for hidden states, which EAGLE-3 heads have.
  /// - Throws: `invalidCheckpoint` or `unsupported` with a sentence.
  public init(json: JSONValue, path: String = "config.json", hasHiddenNorm: Bool) throws(EngineError) {
    let fields = try ConfigurationFields(json, path: path)
    self.path = path
    let name = fields.value("architectures")?.arrayValue?.first?.stringValue ?? "LlamaForCausalLM"
    let family: String
    if name.contains("Llama") {
      family = "LlamaForCausalLM"
    } else if name.contains("Qwen2") {
      family = "Qwen2ForCausalLM"
    } else {
      throw fields.unsupported("EAGLE heads have layers like Llama's or Qwen2's here; this one is a \(name)")
    }
    guard (try fields.optionalSize("num_hidden_layers", limit: 1 << 12) ?? 1) == 1 else {
      throw fields.unsupported("an EAGLE head has one layer here, but num_hidden_layers is not 1")
    }
    var members = json.objectValue ?? JSONObject()
    members["architectures"] = [.string(family)]
    members["num_hidden_layers"] = .int(1)
    layer = try ModelConfiguration(json: .object(members), path: path)
    let draftSize = try fields.optionalSize("draft_vocab_size", limit: 1 << 24)
    form = hasHiddenNorm || draftSize != nil || name.lowercased().contains("eagle3") ? .fused : .lastHidden
    draftVocabularySize = draftSize ?? layer.vocabularySize
    targetHiddenSize = try fields.optionalSize("target_hidden_size", limit: 1 << 20) ?? layer.hiddenSize
    normBeforeResidual = try fields.flag("norm_before_residual") ?? false
    hasBias = try fields.flag("bias") ?? false
    // At the top, or among the head's own settings.
    let inner = fields.value("eagle_config") ?? json
    let key = "eagle_aux_hidden_state_layer_ids"
    if let list = inner[key]?.nonNull ?? json[key]?.nonNull {
      guard let ids = list.arrayValue, !ids.isEmpty, ids.count <= 16, ids.allSatisfy({ $0.intValue != nil }) else {
        throw fields.invalid("\(key) must be an array of 1 to 16 layer numbers")
      }
      auxiliaryLayers = ids.map { $0.intValue! }
    } else {
      auxiliaryLayers = nil
    }
  }

  /// The layers of a target whose inputs are fused: those after layers 1, half - 1 and all but 4, as the published heads were
  /// trained with (SGLang's `set_eagle3_layers_to_capture`), or those after the layers that the head names.
  func capturedLayers(of target: ModelConfiguration) throws(EngineError) -> [Int] {
    if form == .lastHidden { return [] }
    let count = target.layerCount
    let layers = auxiliaryLayers.map { $0.map { $0 + 1 } } ?? [2, count / 2, count - 3]
    let isUsable =
      layers.allSatisfy { (0...count).contains($0) } && zip(layers, layers.dropFirst()).allSatisfy { $0 < $1 }
    guard isUsable else {
      throw EngineError(
        .invalidRequest,
        "\(path): the EAGLE-3 head wants the outputs of layers \(layers.map { $0 - 1 }), which the model with its \(count) "
          + "layers does not have in that order; a head with eagle_aux_hidden_state_layer_ids names its own.",
        parameter: "speculative_draft_model_path")
    }
    return layers
  }
}

/// An EAGLE head (Li et al., 2024 and 2025): one decoder layer that drafts from hidden states of the target. For position p,
/// with e the embedding of the token at p + 1 and h the hidden state at p:
///
///     EAGLE-3    h = fc [outputs of a low, a middle and a high layer of the target], where p is not a draft
///                q, k, v = projections of [input_layernorm(e) ; hidden_norm(h)],  residual h
///                logits = lm_head norm(layer's output) over the draft vocabulary; the output is h of p + 1
///     EAGLE-1    h = the target's last hidden state after its final norm, where p is not a draft
///                x = fc [e ; h],  q, k, v = projections of x,  residual x
///                logits = the target's lm_head of the layer's output, which is h of p + 1
public final class EagleModel: PredictionHead {
  public let activationShape: ActivationShape
  public let kvLayout: KVLayout
  public let weightBytes: Int
  public let vocabularySize: Int
  public let tokenOfColumn: [TokenID]?
  public let capturedLayers: [Int]
  /// Which of the two forms it has.
  public let form: EagleConfiguration.Form
  public var hiddenSize: Int { width }

  private let target: LanguageModel
  private let width: Int
  private let epsilon: Float
  private let normBeforeResidual: Bool
  private let rotary: RotaryTable
  private let embed: @Sendable (_ tokens: UnsafePointer<TokenID>, _ count: Int, _ out: Tensor) -> Void
  private let fuse: any LinearWeight
  private let fuseBias: Tensor?
  /// Of an EAGLE-3 head.
  private let tokenNorm: Tensor?
  private let hiddenNorm: Tensor?
  private let finalNorm: Tensor?
  private let attention: GroupedQueryAttention
  private let executor: OperationExecutor
  /// Any norm's weight: what is made with it is not used.
  private let middleNorm: Tensor
  private let output: any LinearWeight

  /// Whether a checkpoint has a norm for hidden states.
  public static func hasHiddenNorm(_ store: any WeightStore) -> Bool {
    !(store is DummyWeights) && headWeights(store).contains("model.layers.0.hidden_norm.weight")
  }

  /// Loads a head for a target, with a table of tokens of its own where its hidden size is another than the target's.
  /// - Throws: `invalidRequest` if the head does not belong to the target; `invalidCheckpoint` naming file, tensor and what
  ///   was expected; `outOfMemory`.
  public init(
    _ configuration: EagleConfiguration, target: LanguageModel, store: any WeightStore,
    options: WeightOptions = WeightOptions()
  ) throws(EngineError) {
    let isRandom = store is DummyWeights
    let store = headWeights(store)
    let layer = configuration.layer
    let (hidden, wide) = (layer.hiddenSize, configuration.targetHiddenSize)
    let isFused = configuration.form == .fused
    func refuse(_ sentence: String) -> EngineError {
      EngineError(.invalidRequest, "\(configuration.path): \(sentence).", parameter: "speculative_draft_model_path")
    }
    guard wide == target.configuration.hiddenSize, isFused || wide == hidden else {
      throw refuse(
        "the EAGLE head was made for a model of hidden size \(wide), but the model's is \(target.configuration.hiddenSize)"
      )
    }
    guard layer.vocabularySize == target.configuration.vocabularySize else {
      throw refuse(
        "the EAGLE head was made for a vocabulary of \(layer.vocabularySize) tokens, but the model's has "
          + "\(target.configuration.vocabularySize)")
    }
    guard store.contains("fc.weight") else {
      throw refuse("\(store.origin) has no fc.weight, so it is no EAGLE head")
    }
    let backend = target.backend
    let sources = try configuration.capturedLayers(of: target.configuration)
    let loader = WeightLoader(
      store: store, backend: backend, options: options, layout: .single, sample: "fc.weight", expectedBytes: 0,
      progress: nil)
    rotary = try RotaryTable(
      layer.rotary, contextLength: target.contextLength, maxPositionEmbeddings: layer.maxPositionEmbeddings,
      backend: backend)
    fuse = try loader.replicated(("fc", hidden), inputs: isFused ? sources.count * wide : 2 * hidden)
    let hasBias = isRandom ? configuration.hasBias : store.contains("fc.bias")
    fuseBias = hasBias ? try loader.bias([("fc", hidden)], rank: 0, ranks: 1) : nil
    let prefix = "model.layers.0."
    tokenNorm = isFused ? try loader.norm(prefix + "input_layernorm", count: hidden) : nil
    hiddenNorm = isFused ? try loader.norm(prefix + "hidden_norm", count: hidden) : nil
    let attention = try GroupedQueryAttention(
      index: 0, configuration: layer, rotary: rotary, loader: loader, inputWidth: isFused ? 2 * hidden : nil)
    let middleNorm = try loader.norm(prefix + "post_attention_layernorm", count: hidden)
    let feedForward = try DenseFeedForward(
      path: prefix + "mlp.", name: "layers.0.", width: layer.intermediateSize, hidden: hidden, hasBias: layer.mlpBias,
      loader: loader)
    let epsilon = layer.normEpsilon
    executor = OperationExecutor(
      attention.operationsAfterProjection(backend: backend) + [
        .compute("layers.0.mlp_norm") { state in
          backend.addRMSNorm(
            residual: state.residual, delta: state.delta, weight: middleNorm, epsilon: epsilon, out: state.normed)
        }
      ] + feedForward.operations(backend: backend))
    finalNorm = isFused ? try loader.norm("norm", count: hidden) : nil
    if hidden == target.configuration.hiddenSize {
      embed = target.embed
    } else {
      embed = try loader.embeddingFunction("embed_tokens", rows: layer.vocabularySize, columns: hidden).embed
    }
    let isReduced = isFused && configuration.draftVocabularySize < layer.vocabularySize
    if !isFused || (!isRandom && !isReduced && !store.contains("lm_head.weight") && hidden == wide) {
      output = target.output
      vocabularySize = target.configuration.vocabularySize
    } else {
      output = try loader.outputLayer(("lm_head", configuration.draftVocabularySize), inputs: hidden)
      vocabularySize = configuration.draftVocabularySize
    }
    if isReduced && isRandom {
      // Spread evenly.
      let (count, all) = (vocabularySize, layer.vocabularySize)
      tokenOfColumn = (0..<count).map { TokenID($0 * all / count) }
    } else if isReduced {
      guard let offsets = try store.integers("d2t", count: vocabularySize) else {
        throw refuse(
          "the EAGLE-3 head drafts \(vocabularySize) of \(layer.vocabularySize) tokens, but \(store.origin) has no table "
            + "d2t of integers that says which")
      }
      var tokens: [TokenID] = []
      for (column, offset) in offsets.enumerated() {
        let (token, overflow) = column.addingReportingOverflow(offset)
        guard !overflow, (0..<layer.vocabularySize).contains(token) else {
          throw refuse("d2t maps draft token \(column) outside the vocabulary, by an offset of \(offset)")
        }
        tokens.append(TokenID(token))
      }
      tokenOfColumn = tokens
    } else {
      tokenOfColumn = nil
    }
    self.attention = attention
    self.middleNorm = middleNorm
    self.epsilon = epsilon
    self.target = target
    width = hidden
    form = configuration.form
    normBeforeResidual = configuration.normBeforeResidual
    capturedLayers = sources
    kvLayout = layer.kvLayout
    activationShape = ActivationShape(
      hidden: hidden, queryWidth: layer.queryHeads * layer.headDimension, keyWidth: layer.kvHeads * layer.headDimension,
      intermediate: layer.intermediateSize)
    weightBytes = loader.packedBytes
  }

  public func kvLayers(_ own: any KVLayer) -> [any KVLayer] { [own] }

  public func prepare(positions count: Int) { rotary.prepare(positions: count) }

  public func hidden(
    of state: ForwardState, rows: UnsafePointer<Int32>, count: Int, scratch: HiddenScratch
  ) -> Tensor {
    guard form == .fused, let capture = state.capture else {
      return target.lastHidden(state, rows: rows, count: count, scratch: scratch.rows)
    }
    let backend = target.backend
    let captured = scratch.captured.prefix(rows: count)
    backend.gather(capture.numbers, rows: rows, count: count, out: captured)
    // No layer gets the last one's output.
    if let place = capturedLayers.firstIndex(of: target.configuration.layerCount) {
      let wide = target.configuration.hiddenSize
      for row in 0..<count {
        let source = Int(rows[row])
        let out = captured.float32 + row * captured.stride + place * wide
        let (residual, delta) = (
          state.residual.float32 + source * state.residual.stride, state.delta.float32 + source * state.delta.stride
        )
        for column in 0..<wide { out[column] = residual[column] + delta[column] }
      }
    }
    let fused = scratch.fused.prefix(rows: count)
    backend.linear(captured, fuse, bias: fuseBias, out: fused)
    return fused
  }

  public func run(_ state: ForwardState, hidden: Tensor, joined: Tensor) {
    let (backend, rows) = (target.backend, state.batch.rowCount)
    embed(state.batch.tokens, rows, state.normed)
    let (first, second) = (joined.columns(0..<width), joined.columns(width..<2 * width))
    if let tokenNorm, let hiddenNorm {
      backend.rmsNorm(state.normed, weight: tokenNorm, epsilon: epsilon, out: first)
      backend.rmsNorm(hidden, weight: hiddenNorm, epsilon: epsilon, out: second)
      copy(normBeforeResidual ? second : hidden, to: state.residual)
      attention.project(joined, state, backend: backend)
    } else {
      copy(state.normed, to: first)
      copy(hidden, to: second)
      backend.linear(joined, fuse, bias: fuseBias, out: state.residual)
      attention.project(state.residual, state, backend: backend)
    }
    executor.run(state)
  }

  private func copy(_ source: Tensor, to target: Tensor) {
    for row in 0..<target.rows {
      memcpy(target.float32 + row * target.stride, source.float32 + row * source.stride, 4 * width)
    }
  }

  public func logits(
    _ state: ForwardState, rows: UnsafePointer<Int32>, count: Int, scratch: LogitScratch, out: Tensor
  ) -> Tensor {
    let backend = target.backend
    let (residual, delta) = (scratch.residual.prefix(rows: count), scratch.delta.prefix(rows: count))
    let normed = scratch.normed.prefix(rows: count)
    backend.gather(state.residual, rows: rows, count: count, out: residual)
    backend.gather(state.delta, rows: rows, count: count, out: delta)
    backend.addRMSNorm(
      residual: residual, delta: delta, weight: finalNorm ?? middleNorm, epsilon: epsilon, out: normed)
    backend.linear(finalNorm == nil ? residual : normed, output, bias: nil, out: out)
    return residual
  }
}

/// A head's weights by the names that a model of one layer has, whichever of the published names they are stored under:
/// `midlayer.*` (EAGLE-3) or `layers.0.*`, with or without `model.`.
private func headWeights(_ base: any WeightStore) -> RenamedWeights {
  RenamedWeights(base: base) { name in
    let prefix = "model.layers.0."
    let names: [String]
    if name.hasPrefix(prefix) {
      let part = name.dropFirst(prefix.count)
      names = ["midlayer.", "layers.0.", "model.midlayer.", prefix].map { $0 + part }
    } else {
      names = [name, "model." + name]
    }
    return names.first { base.contains($0) } ?? names[0]
  }
}
