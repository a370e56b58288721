public import ApusCore
public import ApusModels
import ApusScheduling
public import ApusTensors
import CLinux

/// What to load and how much it may take.
public struct ModelOptions: Sendable {
  /// Where weights come from.
  public enum LoadFormat: Sendable, Equatable {
    /// The directory's safetensors files, or the GGUF files that the path stands for (`GGUFFiles.find`).
    case safetensors
    /// Random weights of the shapes in `config.json`, for benchmarks and tests.
    case dummy(seed: UInt64)
  }

  /// The checkpoint directory or GGUF file.
  public var path: String
  /// See `LoadFormat`.
  public var loadFormat = LoadFormat.safetensors
  /// The format of the weights; `nil` keeps the checkpoint's.
  public var dtype: DType?
  /// What becomes of linear layers.
  public var quantization = WeightQuantization.stored
  /// What becomes of the output layer.
  public var outputLayer = OutputLayerQuantization.auto
  /// The format of the K/V cache; `nil` takes bfloat16, or float32 where the weights are float32.
  public var kvDType: DType?
  /// Where packed weights are kept between starts; `nil` packs at every start. Only what `ModelLoader.load(_:backend:)` reads
  /// from files is kept, and not what drafts tokens.
  public var packedCache: PackedWeightCache.Location?
  /// Where the weights of experts lie and how rows reach them.
  public var experts = ExpertOptions()
  /// Slots for experts beyond one for each, which hold replicas. Where `experts` says no location.
  public var redundantExperts = 0
  /// A JSON file that says where experts lie, or how busy they were (`ExpertLocation.read`); `nil` for each at its own number
  /// and replicas of the first. Where `experts` says no location.
  public var expertLocationPath: String?
  /// Makes a recorder of experts' loads; `nil` for none.
  public var expertRecorderMode: ExpertLoadRecorder.Mode?
  /// Passes that the recorder keeps one by one.
  public var expertRecorderBufferSize = 1000
  /// The longest sequence; `nil` takes the model's own.
  public var contextLength: Int?
  /// The most tokens computed in one step.
  public var maxTokensPerStep = 2048
  /// The most requests that run at once.
  public var maxRunningRequests = 256
  /// The share of the memory still free after loading that the K/V cache may take.
  public var memoryFraction = 0.8
  /// The most sequences of the full length that the K/V cache is made for; `nil` is twice `maxRunningRequests`, half for
  /// running requests and half to keep the prefixes of finished ones.
  public var kvSequences: Int?
  /// Bytes of the K/V cache; `nil` derives them from `memoryFraction`.
  public var kvCacheBytes: Int?
  /// Tokens that the K/V cache holds; `nil` derives them from the bytes. Rounded up to whole pages.
  public var kvCacheTokens: Int?
  /// Threads that fill grammars' masks while the model computes; see `StepRunner.init`.
  public var maskThreads: Int?

  /// Who drafts tokens for speculative decoding.
  public var drafting = Drafting.none
  /// How wide a model drafts: a tree where more than one token is drafted for one place.
  public var draftTree = DraftTreeShape()

  /// Drafters of speculative decoding.
  public enum Drafting: Sendable, Equatable {
    case none
    /// A lookup in the request's tokens and in so many tokens of past outputs.
    case ngram(capacity: Int)
    /// The checkpoint's own layer for multi-token prediction.
    case prediction
    /// A small model at this path, in the same formats as the model.
    case model(path: String)
    /// An EAGLE head at this path. `isThird` refuses those of EAGLE-1 and EAGLE-2.
    case eagle(path: String, isThird: Bool)
  }

  /// Options for a directory; all else has defaults.
  public init(path: String) { self.path = path }

  /// How weights are stored, those of what drafts tokens too.
  var weights: WeightOptions { WeightOptions(dtype: dtype, quantization: quantization, outputLayer: outputLayer) }
}

/// What was loaded, in numbers.
public struct ModelDescription: Sendable {
  /// The class in `config.json`.
  public var architecture: String
  public var parameterCount: Int
  public var layerCount: Int
  /// The longest sequence, prompt and output together.
  public var contextLength: Int
  public var vocabularySize: Int
  /// The weights' format, such as `bfloat16` or `int8`.
  public var dtype: String
  /// The output layer's format.
  public var outputDtype: String
  /// Linear layers for which int8 with a scale for each output was too coarse; they have a scale for each group.
  public var regroupedLayers: Int
  /// Bytes of the packed weights.
  public var weightBytes: Int
  /// What became of the file of packed weights, as a sentence; `nil` where none is kept.
  public var packedCache: String?
  /// The K/V cache's format, its pages and bytes, and what one token takes.
  public var kvDtype: String
  public var kvPageCount: Int
  public var kvCacheBytes: Int
  public var kvBytesPerToken: Int
  public var maxTokensPerStep: Int
  public var maxRunningRequests: Int
  /// End-of-sequence tokens: `generation_config.json`'s, else `config.json`'s.
  public var eosTokenIDs: [TokenID]
  public var bosTokenID: TokenID?
  public var samplingDefaults: SamplingDefaults
  /// The backend's name.
  public var backend: String

  /// Tokens that the K/V cache holds.
  public var kvCapacityTokens: Int { kvPageCount * kvPageSize }
}

/// A model ready to run.
public struct LoadedModel: Sendable {
  /// Computes steps on the caller's thread.
  public let steps: StepRunner
  public let description: ModelDescription
  /// Counts which experts tokens are sent to; `nil` unless it was asked for.
  public let expertRecorder: ExpertLoadRecorder?

  /// A runner with a thread of its own. Make one at most.
  public func makeRunner() -> ModelRunner { ModelRunner(steps) }
}

/// Turns a checkpoint directory or GGUF file into a model ready to run.
public enum ModelLoader {
  /// Loads a model.
  ///
  /// - Parameter progress: called with bytes read so far and in all, on the calling thread.
  /// - Throws: `invalidCheckpoint` or `unsupported` with a sentence naming file, tensor and expectation; `outOfMemory`;
  ///   `invalidRequest` for impossible options.
  public static func load(
    _ options: ModelOptions, backend: any Backend, progress: ((_ done: Int, _ total: Int) -> Void)? = nil
  ) throws(EngineError) -> LoadedModel {
    let source = try open(options, backend: backend, readsAhead: options.packedCache == nil)
    let cache = try options.packedCache.map { location throws(EngineError) in
      try PackedWeightCache(
        location, modelPath: options.path, files: source.store.mappedFiles, settings: settings(options),
        backend: backend as? CPUBackend)
    }
    // What is not to be packed is not to be read either.
    if let cache, !cache.hasWeights { for file in source.store.mappedFiles { file.readAhead() } }
    return try load(
      source.configuration, generation: source.generation, store: source.store, options: options, backend: backend,
      cache: cache, progress: progress)
  }

  /// What decides beside the checkpoint how weights are packed. Experts are packed in the order of their numbers, wherever
  /// they lie.
  private static func settings(_ options: ModelOptions) -> String {
    "dtype \(options.dtype?.name ?? "stored"), quantization \(options.quantization), "
      + "output layer \(options.weights.effectiveOutputLayer)"
  }

  /// A checkpoint's configuration and weights.
  private typealias Source = (
    configuration: ModelConfiguration, generation: GenerationConfiguration, store: any WeightStore
  )

  private static func open(
    _ options: ModelOptions, backend: any Backend, readsAhead: Bool = true
  ) throws(EngineError) -> Source {
    if let paths = try GGUFFiles.find(options.path) {
      return try open(gguf: paths, options, backend: backend, readsAhead: readsAhead)
    }
    let configuration = try ModelConfiguration(directory: options.path)
    let generation = try GenerationConfiguration(
      directory: options.path, vocabularySize: configuration.vocabularySize)
    let store: any WeightStore
    switch options.loadFormat {
    case .safetensors:
      let checkpoint = try SafetensorsCheckpoint(directory: options.path, readsAhead: readsAhead)
      store =
        if let quantization = configuration.quantization {
          QuantizedCheckpoint(checkpoint, quantization, helper: backend as? CPUBackend)
        } else { checkpoint }
    case .dummy(let seed):
      store = DummyWeights(
        seed: seed, initializerRange: configuration.initializerRange,
        dtype: options.dtype ?? configuration.dtype ?? .float32, filler: backend as? CPUBackend)
    }
    return (configuration, generation, store)
  }

  /// Opens GGUF files. Quantised weights stay so unless plain numbers are asked for, which are bfloat16 then;
  /// others keep the file's own format.
  private static func open(
    gguf paths: [String], _ options: ModelOptions, backend: any Backend, readsAhead: Bool
  ) throws(EngineError) -> Source {
    let worker = backend as? CPUBackend
    let checkpoint = try GGUFCheckpoint(
      paths: paths, dtype: options.dtype, worker: worker, readsAhead: readsAhead)
    var store: any WeightStore = checkpoint
    if case .dummy(let seed) = options.loadFormat {
      store = DummyWeights(
        seed: seed, initializerRange: checkpoint.configuration.initializerRange, dtype: options.dtype ?? .bfloat16,
        filler: worker)
    }
    return (checkpoint.configuration, checkpoint.generation, store)
  }

  /// Loads a model whose configuration and weights are already at hand; `options.path` and `options.packedCache` are not
  /// looked at.
  /// - Parameter cache: has what an earlier start packed.
  public static func load(
    _ configuration: ModelConfiguration, generation: GenerationConfiguration = GenerationConfiguration(),
    store: any WeightStore, options: ModelOptions, backend: any Backend, cache: PackedWeightCache? = nil,
    progress: ((_ done: Int, _ total: Int) -> Void)? = nil
  ) throws(EngineError) -> LoadedModel {
    func require(_ condition: Bool, _ field: String, _ sentence: String) throws(EngineError) {
      if !condition { throw EngineError(.invalidRequest, "\(field) \(sentence).", parameter: field) }
    }
    let numberFormats: [DType?] = [nil, .float32, .float16, .bfloat16]
    try require(numberFormats.contains(options.dtype), "dtype", "must be float32, float16 or bfloat16")
    try require(
      (numberFormats + [.int8, .float8]).contains(options.kvDType), "kv_cache_dtype",
      "must be float32, float16, bfloat16, int8 or float8")
    try require(options.maxTokensPerStep >= 1, "max_tokens_per_step", "must be at least 1")
    try require(options.maxRunningRequests >= 1, "max_running_requests", "must be at least 1")
    try require(options.kvSequences ?? 1 >= 1, "kv_sequences", "must be at least 1")
    try require(
      options.memoryFraction > 0 && options.memoryFraction <= 1, "memory_fraction", "must be in (0, 1]")

    if case .lowLatency(let capacity) = options.experts.dispatch {
      try require(
        capacity >= options.maxTokensPerStep, "max_tokens_per_step",
        "may be at most \(capacity), the rows for which low-latency dispatch has room")
    }
    let experts = try placedExperts(options, configuration)
    let recorder = try options.expertRecorderMode.map { mode throws(EngineError) in
      try ExpertLoadRecorder(
        configuration, location: experts.location, mode: mode, bufferSize: options.expertRecorderBufferSize)
    }

    let model = try LanguageModel(
      configuration, store: store, backend: backend,
      options: options.weights, experts: experts,
      contextLength: options.contextLength, cache: cache, progress: progress)
    let cacheReport = cache?.finish()
    let kvDType = options.kvDType ?? (model.dtype == .float32 ? .float32 : .bfloat16)
    let network = try draftNetwork(for: model, store: store, options: options, backend: backend)
    let bytesPerPage =
      KVPool.bytesPerPage(layerCount: configuration.layerCount, layout: model.kvLayout, dtype: kvDType)
      + (network?.bytesPerPage(dtype: kvDType) ?? 0)
    var activations = StepRunner.activationBytes(
      configuration, shape: model.activationShape, maxTokensPerStep: options.maxTokensPerStep,
      maxRunningRequests: options.maxRunningRequests)
    if let network {
      activations += ModelDrafter.fixedBytes(
        network, target: model, kvDType: kvDType, maxTokensPerStep: options.maxTokensPerStep,
        maxRunningRequests: options.maxRunningRequests, tree: options.draftTree)
    }
    // For the leaves of trees: those of four requests or so.
    let treePages = network != nil && options.draftTree.width > 1 ? 64 : 0
    activations +=
      treePages * KVPool.bytesPerPage(layerCount: configuration.layerCount, layout: model.kvLayout, dtype: kvDType)
    let pageCount = try pageCount(
      options: options, bytesPerPage: bytesPerPage, contextLength: model.contextLength, activationBytes: activations)
    let pool = try KVPool(
      layerCount: configuration.layerCount, pageCount: pageCount + treePages, layout: model.kvLayout, dtype: kvDType,
      backend: backend)
    let steps = try StepRunner(
      model: model, pool: pool, backend: backend, maxTokensPerStep: options.maxTokensPerStep,
      maxRunningRequests: options.maxRunningRequests, maskThreads: options.maskThreads, treePages: treePages)
    if let network {
      if !network.capturedLayers.isEmpty {
        steps.state.capture = try HiddenCapture(
          layers: network.capturedLayers, hiddenSize: configuration.hiddenSize, rows: options.maxTokensPerStep,
          backend: backend)
      }
      steps.drafter = try ModelDrafter(
        network, target: model, pageCount: pageCount, kvDType: kvDType, maxTokensPerStep: options.maxTokensPerStep,
        maxRunningRequests: options.maxRunningRequests, tree: options.draftTree, backend: backend)
    } else if case .ngram(let capacity) = options.drafting {
      steps.drafter = NgramDrafter(capacity: capacity)
    }
    steps.state.experts?.recorder = recorder

    let description = ModelDescription(
      architecture: configuration.architecture, parameterCount: configuration.parameterCount,
      layerCount: configuration.layerCount, contextLength: model.contextLength,
      vocabularySize: configuration.vocabularySize, dtype: model.weightFormat.name,
      outputDtype: model.outputFormat.name, regroupedLayers: model.regroupedLayers, weightBytes: model.weightBytes,
      packedCache: cacheReport, kvDtype: kvDType.name,
      kvPageCount: pageCount, kvCacheBytes: pool.byteCount,
      kvBytesPerToken: bytesPerPage / kvPageSize, maxTokensPerStep: options.maxTokensPerStep,
      maxRunningRequests: options.maxRunningRequests,
      eosTokenIDs: generation.eosTokenIDs.isEmpty ? configuration.eosTokenIDs : generation.eosTokenIDs,
      bosTokenID: generation.bosTokenID ?? configuration.bosTokenID, samplingDefaults: generation.sampling,
      backend: backend.name)
    return LoadedModel(steps: steps, description: description, expertRecorder: recorder)
  }

  /// How experts are reached, with the places that the options ask for.
  private static func placedExperts(
    _ options: ModelOptions, _ configuration: ModelConfiguration
  ) throws(EngineError) -> ExpertOptions {
    var experts = options.experts
    guard experts.location == nil, options.redundantExperts > 0 || options.expertLocationPath != nil else {
      return experts
    }
    guard let sizes = configuration.experts else {
      throw EngineError(
        .invalidRequest, "Experts cannot be placed: \(configuration.architecture) has none here.",
        parameter: options.expertLocationPath == nil ? "ep_num_redundant_experts" : "init_expert_location")
    }
    if let path = options.expertLocationPath {
      experts.location = try .read(
        path, layerCount: configuration.layerCount, expertCount: sizes.expertCount, redundant: options.redundantExperts)
    } else {
      experts.location = try .trivial(
        layerCount: configuration.layerCount, expertCount: sizes.expertCount, redundant: options.redundantExperts)
    }
    return experts
  }

  /// Loads what drafts tokens, if a model does.
  private static func draftNetwork(
    for target: LanguageModel, store: any WeightStore, options: ModelOptions, backend: any Backend
  ) throws(EngineError) -> ModelDrafter.Network? {
    switch options.drafting {
    case .none, .ngram: return nil
    case .prediction:
      guard PredictionModel.isPresent(target.configuration, in: store) else {
        throw EngineError(
          .invalidRequest,
          "The checkpoint has no layer for multi-token prediction (no model.layers.\(target.configuration.layerCount)"
            + ".eh_proj). Draft with ngram or with a draft model.", parameter: "speculative_algorithm")
      }
      return .prediction(
        try PredictionModel(
          target: target, store: store,
          options: options.weights))
    case .model(let path):
      var draftOptions = options
      draftOptions.path = path
      let source = try open(draftOptions, backend: backend)
      let context = min(target.contextLength, source.configuration.maximumContextLength)
      return .standalone(
        try LanguageModel(
          source.configuration, store: source.store, backend: backend,
          options: options.weights, contextLength: context))
    case .eagle(let path, let isThird):
      let head = try eagleHead(for: target, path: path, options: options, backend: backend)
      if isThird && head.form != .fused {
        throw EngineError(
          .invalidRequest,
          "The head at \(path) is one of EAGLE-1 or EAGLE-2: it has no hidden_norm. Use it with the speculative algorithm "
            + "eagle.", parameter: "speculative_algorithm")
      }
      return .prediction(head)
    }
  }

  /// Loads an EAGLE head from its directory.
  private static func eagleHead(
    for target: LanguageModel, path: String, options: ModelOptions, backend: any Backend
  ) throws(EngineError) -> EagleModel {
    let file = path + "/config.json"
    let json = try ModelConfiguration.json(directory: path)
    let store: any WeightStore
    switch options.loadFormat {
    case .safetensors: store = try SafetensorsCheckpoint(directory: path)
    case .dummy(let seed):
      let range = Float(json["initializer_range"]?.doubleValue ?? 0.02)
      store = DummyWeights(
        seed: seed, initializerRange: range, dtype: options.dtype ?? target.dtype, filler: backend as? CPUBackend)
    }
    return try EagleModel(
      EagleConfiguration(json: json, path: file, hasHiddenNorm: EagleModel.hasHiddenNorm(store)), target: target,
      store: store, options: options.weights)
  }

  /// Pages of the K/V cache: what the budget allows, and at most what `kvSequences` can fill.
  private static func pageCount(
    options: ModelOptions, bytesPerPage: Int, contextLength: Int, activationBytes: Int
  ) throws(EngineError) -> Int {
    let budget: Int
    if let tokens = options.kvCacheTokens {
      let pages = (tokens + kvPageSize - 1) / kvPageSize
      let bytes = pages.multipliedReportingOverflow(by: bytesPerPage)
      budget = bytes.overflow ? .max : bytes.partialValue
    } else if let bytes = options.kvCacheBytes {
      budget = bytes
    } else {
      let available = Int(clamping: apus_memory_available()) - activationBytes
      budget = Int(Double(max(available, 0)) * options.memoryFraction)
    }
    let pagesPerRequest = (contextLength + kvPageSize - 1) / kvPageSize
    // Half for running requests at their longest, half to keep the prefixes of finished ones.
    let useful = pagesPerRequest.multipliedReportingOverflow(by: options.kvSequences ?? 2 * options.maxRunningRequests)
    let limit = useful.overflow ? Int(Int32.max) : useful.partialValue
    // A slot number (page * page size + offset) must fit 32 bits.
    let count = min(budget / bytesPerPage, limit, Int(Int32.max) / kvPageSize)
    guard count >= 1 else {
      throw EngineError(
        .outOfMemory,
        "The K/V cache may take \(budget) bytes, but a single page of \(kvPageSize) tokens takes \(bytesPerPage); give "
          + "it more memory or choose a smaller model.")
    }
    return count
  }
}
