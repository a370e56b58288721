public import ApusCore
public import ApusScheduling

/// Everything that can be chosen about an engine. Only the model is required; the rest follows from hardware and model.
public struct EngineConfiguration: Sendable {
  /// Where weights come from.
  public enum LoadFormat: String, Sendable, CaseIterable {
    /// The checkpoint's files.
    case auto
    /// Random weights made from `config.json` alone, the same for the same seed. For benchmarks.
    case dummy
  }

  /// How numbers are stored and computed.
  public enum ElementType: String, Sendable, CaseIterable {
    /// As the checkpoint says.
    case auto
    case float32, bfloat16, float16
  }

  /// How keys and values are cached.
  public enum CacheType: String, Sendable, CaseIterable {
    /// float32 for float32 weights and bfloat16 otherwise.
    case auto
    case float32, bfloat16, float16
    /// 8 bits with a scale for each token and head; fp8 is e4m3.
    case int8, fp8
  }

  /// A format to which weights are converted while they are loaded. Products with weights of 4 and 8 bits round
  /// activations to int8, those with float8 to bfloat16.
  public enum Quantization: String, Sendable, CaseIterable {
    /// Plain numbers: a checkpoint's quantised weights are dequantised.
    case dense
    /// int8 weights with a scale per output channel, activations with one per token (W8A8). Layers that would lose too
    /// much get scales per group.
    case int8
    /// int8 weights with a scale per 32 inputs, activations with one per 128.
    case int8Group = "int8-group"
    /// 4-bit weights with a scale per 32 inputs, activations with one per 128.
    case int4
    /// float8 (e4m3) weights with a scale per 128 inputs.
    case fp8
  }

  /// What becomes of the output layer while it is loaded.
  public enum OutputLayerQuantization: String, Sendable, CaseIterable {
    /// int8 where other layers are quantised while they are loaded, to whatever format; otherwise as the checkpoint has it.
    case auto
    /// int8 as in `Quantization.int8`, whatever other layers are. What a checkpoint stores quantised stays so.
    case int8
    /// Plain numbers.
    case dense
  }

  /// Who drafts tokens in speculative decoding.
  public enum SpeculativeAlgorithm: String, Sendable, CaseIterable {
    /// A lookup of the last tokens in the request's own and in past outputs.
    case ngram
    /// The checkpoint's layer for multi-token prediction (DeepSeek-V3's MTP).
    case nextn
    /// A small model with the same tokenizer.
    case standalone
    /// An EAGLE head made for the model: one layer over its hidden states.
    case eagle
    /// An EAGLE head that must be one of EAGLE-3.
    case eagle3
  }

  /// How much is kept of what experts tokens are sent to.
  public enum ExpertRecorderMode: String, Sendable, CaseIterable {
    /// Sums over all passes.
    case stat
    /// The counts of each pass.
    case perPass = "per_pass"
    /// Each token's experts.
    case perToken = "per_token"
  }

  /// How rows reach experts. All forms give the same bits.
  public enum ExpertDispatch: String, Sendable, CaseIterable {
    /// Low latency for steps of few rows, normal for others.
    case auto
    /// Each expert gets exactly the rows that chose it.
    case normal
    /// Each expert has room for all rows of a step.
    case lowLatency = "low_latency"
  }

  /// Directory of the checkpoint.
  public var modelPath: String
  /// Directory or file of the tokenizer; `nil` takes the checkpoint's.
  public var tokenizerPath: String?
  /// The name that clients use; `nil` takes the last part of the path.
  public var servedModelName: String?
  /// A chat template: a file, or the name of a built-in one; `nil` takes the checkpoint's.
  public var chatTemplate: String?
  /// Where weights come from.
  public var loadFormat = LoadFormat.auto
  /// Type of weights.
  public var dtype = ElementType.auto
  /// Weights are converted to this format while they are loaded; `nil` keeps what a checkpoint stores quantised.
  public var quantization: Quantization?
  /// The output layer's format. The embedding table stays as the checkpoint has it, also where the two are one matrix.
  public var outputLayerQuantization = OutputLayerQuantization.auto
  /// Where packed weights are kept between starts.
  public enum PackedCache: Sendable, Equatable {
    /// Beside the checkpoint's files.
    case besideCheckpoint
    /// In a directory, which is made if need be.
    case directory(String)
  }

  /// Where packed weights are kept, so that the next start maps them instead of packing; `nil` packs at every start. A file
  /// that is damaged or does not belong to the checkpoint and the settings is not used and replaced.
  public var packedCache: PackedCache?
  /// Type of the K/V cache; `.auto` is float32 for float32 weights and bfloat16 otherwise.
  public var kvCacheDtype = CacheType.auto
  /// The longest sequence; `nil` takes the model's. Larger than the model's is refused.
  public var contextLength: Int?
  /// Tokens computed per step: longer prompts are computed in chunks between which others make progress. The default
  /// keeps a step on two cores below a second for a model of half a billion parameters, and is past the point where
  /// matrix products reach their full speed.
  public var tokenBudget = 256
  /// Requests computed at once.
  public var maxRunningRequests = 256
  /// Requests that may wait; one more is refused.
  public var maxQueuedRequests = 4096
  /// Tokens in the K/V pool; `nil` sizes it from memory.
  public var maxTotalTokens: Int?
  /// The share of the memory available at start that weights and K/V pool may take.
  public var memoryFraction = 0.7
  /// The order of admission.
  public var schedulePolicy = SchedulingPolicy.firstComeFirstServed
  /// Scales the memory reserved for outputs at admission; larger retracts less and runs fewer requests at once.
  public var scheduleConservativeness = 1.0
  /// Whether prefixes are kept and shared.
  public var enablesPrefixCache = true
  /// Whether the next step is decided while the present one runs. Off, each step is finished before the next is decided.
  public var enablesOverlap = true
  /// The most tokens drafted ahead per request and step (speculative decoding); 0 for none. Output is the same to the bit;
  /// it comes faster where few requests run and drafts are often right. How many are drafted follows from how they fare and
  /// from what they cost, which is measured at the start.
  public var speculativeDraftTokens = 0
  /// Tokens that a drafting model drafts for one place, at most: above 1 drafts are trees (SGLang's eagle-topk).
  public var speculativeTopK = 1
  /// The most tokens of a tree; `speculativeDraftTokens` is how many of them stand one behind the other, at most.
  public var speculativeTreeTokens = 8
  /// Who drafts them.
  public var speculativeAlgorithm = SpeculativeAlgorithm.ngram
  /// The checkpoint of the draft model for `.standalone`, which must have the model's tokenizer, or of the head for `.eagle`
  /// and `.eagle3`.
  public var speculativeDraftModelPath: String?
  /// Tokens of past outputs that `.ngram` looks into beside the request's own, at most.
  public var speculativeNgramCapacity = 1 << 17
  /// What drafts cost; `nil` measures it at the start and goes on measuring, so that tokens are drafted only where that is
  /// faster.
  public var speculativeCosts: DraftCosts?
  /// Whether text that a grammar forces is taken without a forward pass for each of its tokens (jump-forward).
  public var enablesJumpForward = true
  /// White space in JSON that a grammar describes, where a request does not say.
  public var jsonWhitespace = GrammarSpecification.Whitespace.fixed
  /// Makes a recorder of the loads of experts, which records when it is told to; `nil` for none.
  public var expertRecorderMode: ExpertRecorderMode?
  /// Passes that the recorder keeps one by one; older ones go.
  public var expertRecorderBufferSize = 1000
  /// How rows reach experts.
  public var expertDispatch = ExpertDispatch.normal
  /// Places for experts beyond one for each, which hold replicas; rows take an expert's replicas in turns.
  public var redundantExperts = 0
  /// A JSON file with the places of experts or with their loads; `nil` for each at its own number.
  public var expertLocationPath: String?
  /// Compute threads; `nil` takes one per physical core.
  public var threads: Int?
  /// Seed of dummy weights and of requests that bring no seed; `nil` draws one.
  public var randomSeed: UInt64?

  /// The defaults for a model.
  public init(modelPath: String) { self.modelPath = modelPath }

  /// Refuses values that cannot work together.
  public func validate() throws(EngineError) {
    func refuse(_ sentence: String) -> EngineError { EngineError(.invalidRequest, sentence) }
    if tokenBudget < 1 { throw refuse("The token budget per step must be at least 1, got \(tokenBudget).") }
    if maxRunningRequests < 1 || maxRunningRequests > 65_536 {
      throw refuse("The number of running requests must be in 1...65536, got \(maxRunningRequests).")
    }
    if speculativeDraftTokens < 0 || speculativeDraftTokens > 64 {
      throw refuse("The number of draft tokens must be in 0...64, got \(speculativeDraftTokens).")
    }
    if speculativeTopK < 1 || speculativeTopK > 8 {
      throw refuse("The number of tokens drafted for one place must be in 1...8, got \(speculativeTopK).")
    }
    if speculativeTopK > 1 && speculativeDraftTokens > 0 && speculativeAlgorithm == .ngram {
      throw refuse("Draft trees need a model that drafts; n-grams are looked up one after the other.")
    }
    if speculativeTreeTokens < 1 || speculativeTreeTokens > 64 {
      throw refuse("The number of tokens of a draft tree must be in 1...64, got \(speculativeTreeTokens).")
    }
    if speculativeNgramCapacity < 0 || speculativeNgramCapacity > 1 << 28 {
      throw refuse("The n-gram capacity must be in 0...\(1 << 28) tokens, got \(speculativeNgramCapacity).")
    }
    let needsModel = [.standalone, .eagle, .eagle3].contains(speculativeAlgorithm)
    if speculativeDraftTokens > 0, needsModel != (speculativeDraftModelPath != nil) {
      throw refuse(
        "A draft model belongs to the speculative algorithms standalone, eagle and eagle3, and they need one.")
    }
    if expertRecorderBufferSize < 1 || expertRecorderBufferSize > 1 << 20 {
      throw refuse("The expert recorder must keep 1...1048576 passes, got \(expertRecorderBufferSize).")
    }
    if redundantExperts < 0 || redundantExperts > 4096 {
      throw refuse("The number of redundant experts must be in 0...4096, got \(redundantExperts).")
    }
    if maxQueuedRequests < 0 {
      throw refuse("The number of queued requests must be at least 0, got \(maxQueuedRequests).")
    }
    if !(memoryFraction > 0 && memoryFraction <= 1) {
      throw refuse("The memory fraction must be in (0, 1], got \(memoryFraction).")
    }
    if !(scheduleConservativeness > 0 && scheduleConservativeness <= 10) {
      throw refuse("The schedule conservativeness must be in (0, 10], got \(scheduleConservativeness).")
    }
    if let threads, threads < 1 || threads > 1024 {
      throw refuse("The number of threads must be in 1...1024, got \(threads).")
    }
    if let maxTotalTokens, maxTotalTokens < 1 {
      throw refuse("The K/V pool must hold at least 1 token, got \(maxTotalTokens).")
    }
    if let contextLength, contextLength < 1 {
      throw refuse("The context length must be at least 1, got \(contextLength).")
    }
  }
}

/// How far loading has come.
public struct LoadProgress: Sendable, Equatable {
  /// Bytes of weights packed so far.
  public var completedBytes: Int
  /// Bytes of weights in all.
  public var totalBytes: Int

  /// Makes a level of progress.
  public init(completedBytes: Int, totalBytes: Int) {
    self.completedBytes = completedBytes
    self.totalBytes = totalBytes
  }
}
