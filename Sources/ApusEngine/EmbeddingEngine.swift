public import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import ApusTokenization
import CLinux
import Glibc
import Synchronization

/// A model that turns texts into vectors or judges pairs of texts, in this process: a bidirectional encoder, or a decoder
/// whose last hidden states are pooled.
///
/// It is a `GenerationService` that refuses to generate, so that whatever serves a model can serve it. Sequences are
/// computed by one thread, which lives while there is work; sequences of different requests take turns, so that a request
/// with thousands of texts does not hold up one with a single text.
public final class EmbeddingEngine: GenerationService, EmbeddingService {
  public let model: ModelInformation
  public let information: EmbeddingInformation
  /// What start-up decided, one sentence a line.
  public let report: [String]
  public var embeddings: (any EmbeddingService)? { self }

  private let tokenizer: Tokenizer
  private let network: any SequenceNetwork
  private let maxQueuedSequences: Int
  private let state = Mutex(State())

  private init(
    configuration: EngineConfiguration, tokenizer: Tokenizer, network: any SequenceNetwork, backend: String
  ) {
    self.tokenizer = tokenizer
    self.network = network
    maxQueuedSequences = configuration.maxQueuedRequests
    var now = timespec()
    clock_gettime(CLOCK_REALTIME, &now)
    information = network.information
    model = ModelInformation(
      name: configuration.servedModelName ?? Engine.lastPathComponent(configuration.modelPath),
      path: configuration.modelPath, architecture: network.architecture, parameterCount: network.parameterCount,
      contextLength: network.contextLength, vocabularySize: network.vocabularySize, dtype: network.dtype,
      kvDtype: network.kvDtype, eosTokenIDs: tokenizer.eosID.map { [$0] } ?? [], bosTokenID: tokenizer.bosID,
      samplingDefaults: SamplingDefaults(), hasChatTemplate: false, specialTokens: tokenizer.specialTokenTexts,
      created: now.tv_sec)
    let output =
      information.labelCount.map { "\($0) \($0 == 1 ? "score" : "labels") for a text or a pair" }
      ?? "\(information.dimensions) numbers, \(information.pooling.rawValue) pooling"
      + (information.isNormalized ? ", length 1" : "")
    report = [
      "model    \(model.name): \(model.architecture), \(Engine.grouped(model.parameterCount)) parameters, "
        + "\(model.dtype) (\(Engine.mebibytes(network.weightBytes))), context \(model.contextLength) tokens",
      "device   \(backend)",
      "output   \(output)",
      "limits   \(maxQueuedSequences) queued sequences, \(network.tokensPerPass) tokens per pass",
    ]
  }

  // MARK: Starting and stopping

  /// Whether a checkpoint can only be served by this engine.
  public static func isRequired(modelPath: String) -> Bool { EncoderConfiguration.isEncoder(directory: modelPath) }

  /// Loads a model.
  ///
  /// - Parameter progress: called while weights are packed, on a thread of the engine.
  /// - Throws: `invalidCheckpoint`, `unsupported`, `outOfMemory`, or `invalidRequest` for impossible settings, each with a
  ///   sentence that says what to do.
  public static func start(
    _ configuration: EngineConfiguration, progress: (@Sendable (LoadProgress) -> Void)? = nil
  ) async throws(EngineError) -> EmbeddingEngine {
    try configuration.validate()
    return try await EngineThread.result(name: "apus-load") { () throws(EngineError) in
      try load(configuration, progress: progress)
    }
  }

  private static func load(
    _ configuration: EngineConfiguration, progress: (@Sendable (LoadProgress) -> Void)?
  ) throws(EngineError) -> EmbeddingEngine {
    let tokenizer = try Engine.loadTokenizer(configuration)
    let backend = try CPUBackend(threads: configuration.threads)
    let report = progress.map { report in
      { (done: Int, total: Int) in
        report(LoadProgress(completedBytes: done, totalBytes: total))
      }
    }
    var options = try Engine.modelOptions(configuration)
    let network: any SequenceNetwork
    if EncoderConfiguration.isEncoder(directory: configuration.modelPath) {
      let encoder = try EncoderConfiguration(directory: configuration.modelPath)
      let store: any WeightStore =
        switch options.loadFormat {
        case .safetensors: try SafetensorsCheckpoint(directory: configuration.modelPath)
        case .dummy(let seed):
          DummyWeights(
            seed: seed, initializerRange: encoder.initializerRange, dtype: options.dtype ?? .float32, filler: backend)
        }
      network = EncoderNetwork(
        encoder: try EncoderModel(
          encoder, pooling: try PoolingConfiguration(directory: configuration.modelPath), store: store,
          backend: backend, options: WeightOptions(dtype: options.dtype, quantization: options.quantization),
          contextLength: options.contextLength, maxTokensPerPass: max(configuration.tokenBudget, 512),
          progress: report))
    } else {
      // Sequences that share a pass; a text has a few tokens at least, so more would seldom fit.
      options.maxRunningRequests = 32
      // Nothing is kept, and a sequence longer than a pass is computed alone.
      options.kvSequences = 2
      let isGGUF = try GGUFFiles.find(options.path) != nil
      let loaded: LoadedModel
      if isGGUF || options.loadFormat != .safetensors {
        loaded = try ModelLoader.load(options, backend: backend, progress: report)
      } else {
        let decoder = try BareDecoder(directory: options.path, helper: backend)
        loaded = try ModelLoader.load(
          decoder.configuration, store: decoder.store, options: options, backend: backend, progress: report)
      }
      let pooling = isGGUF ? PoolingConfiguration() : try PoolingConfiguration(directory: options.path)
      network = DecoderNetwork(loaded: loaded, pooling: pooling)
    }
    return EmbeddingEngine(
      configuration: configuration, tokenizer: tokenizer, network: network, backend: backend.name)
  }

  /// Refuses new requests, ends those that wait and returns when the pass that runs has ended.
  public func shutdown() async {
    abortAll()
    await drain()
  }

  public func drain() async {
    await withCheckedContinuation { continuation in
      let isIdle = state.withLock { state in
        state.isDraining = true
        if state.isRunning { state.drainWaiters.append(continuation) }
        return !state.isRunning
      }
      if isIdle { continuation.resume() }
    }
  }

  // MARK: Embedding

  public func encodePair(_ first: String, _ second: String) throws(EngineError) -> EmbeddingInput {
    let (ids, types) = try tokenizer.encode(first, pair: second)
    return EmbeddingInput(tokens: ids, firstSegmentCount: types.firstIndex { $0 != 0 })
  }

  public func embed(_ inputs: [EmbeddingInput]) async throws(EngineError) -> [[Float]] {
    do throws(EngineError) { try validate(inputs) } catch {
      state.withLock { $0.statistics.rejectedRequests += 1 }
      throw error
    }
    if inputs.isEmpty { return [] }
    let job = Job(inputs)
    let result: Result<[[Float]], EngineError> = await withTaskCancellationHandler {
      await withCheckedContinuation { continuation in enqueue(job, continuation) }
    } onCancel: {
      cancel(job)
    }
    return try result.get()
  }

  private func validate(_ inputs: [EmbeddingInput]) throws(EngineError) {
    for (index, input) in inputs.enumerated() {
      let name = inputs.count == 1 ? "input" : "input[\(index)]"
      if input.tokens.isEmpty {
        throw EngineError(.invalidRequest, "\(name) must hold at least one token.", parameter: "input")
      }
      if input.tokens.count > model.contextLength {
        throw EngineError(
          .promptTooLong,
          "The model takes at most \(model.contextLength) tokens, but \(name) has \(input.tokens.count). Shorten it, or "
            + "ask for it to be cut with truncate_prompt_tokens.", parameter: "input")
      }
      if let token = input.tokens.first(where: { $0 < 0 || Int($0) >= model.vocabularySize }) {
        throw EngineError(
          .invalidRequest, "\(name) holds token \(token), but the vocabulary has \(model.vocabularySize) entries.",
          parameter: "input")
      }
    }
  }

  private func enqueue(_ job: Job, _ continuation: CheckedContinuation<Result<[[Float]], EngineError>, Never>) {
    let (refusal, starts) = state.withLock { state -> (EngineError?, Bool) in
      if state.isDraining {
        return (EngineError(.shuttingDown, "The engine is stopping and takes no new requests."), false)
      }
      if job.isCancelled { return (EngineError(.aborted, "The request was aborted."), false) }
      // A request is taken whole, and one is always taken.
      if state.waitingCount > 0, state.waitingCount + job.inputs.count > maxQueuedSequences {
        state.statistics.rejectedRequests += 1
        return (
          EngineError(
            .queueFull,
            "\(state.waitingCount) sequences wait, of which there may be \(maxQueuedSequences). Try again later."),
          false
        )
      }
      job.continuation = continuation
      state.jobs.append(job)
      state.waitingCount += job.inputs.count
      defer { state.isRunning = true }
      return (nil, !state.isRunning)
    }
    if let refusal { return continuation.resume(returning: .failure(refusal)) }
    if starts { EngineThread.start(name: "apus-embed") { self.serve() } }
  }

  /// Takes what has not been computed of a request out of the queue and ends it.
  private func cancel(_ job: Job) {
    let continuation = state.withLock { state in
      job.isCancelled = true
      state.remove(job)
      if job.continuation != nil { state.statistics.abortedRequests += 1 }
      return job.continuation.take()
    }
    continuation?.resume(returning: .failure(EngineError(.aborted, "The request was aborted.")))
  }

  /// Computes until nothing waits.
  private func serve() {
    var pass: [State.Place] = []
    while true {
      let waiters = state.withLock { state -> [CheckedContinuation<Void, Never>]? in
        pass = state.takePass(tokens: network.tokensPerPass)
        state.statistics.runningRequests = pass.count
        if !pass.isEmpty { return nil }
        state.isRunning = false
        defer { state.drainWaiters = [] }
        return state.drainWaiters
      }
      if let waiters {
        for waiter in waiters { waiter.resume() }
        return
      }
      let begin = monotonicSeconds()
      let vectors = network.run(pass.map { $0.job.inputs[$0.index] })
      let seconds = monotonicSeconds() - begin
      let finished = state.withLock { $0.deliver(vectors, to: pass, seconds: seconds) }
      for job in finished { job.0.resume(returning: job.1) }
    }
  }

  // MARK: What a service answers

  public func generate(_ request: Request) throws(EngineError) -> GenerationStream {
    throw EngineError(
      .unsupported,
      "\(model.name) is served for embeddings and does not generate text; use /v1/embeddings, /v1/score or /v1/rerank.",
      parameter: "model")
  }

  public func abort(_ id: RequestID) -> Bool { false }

  public func abortAll() {
    for job in state.withLock({ $0.unfinished }) { cancel(job) }
  }

  public func encode(_ text: String, addSpecialTokens: Bool) throws(EngineError) -> [TokenID] {
    try tokenizer.encode(text, addSpecialTokens: addSpecialTokens)
  }

  public func decode(_ tokens: [TokenID], skipSpecialTokens: Bool) throws(EngineError) -> String {
    if let token = tokens.first(where: { $0 < 0 || Int($0) >= model.vocabularySize }) {
      throw EngineError(
        .invalidRequest, "There is no token \(token): the vocabulary has \(model.vocabularySize) entries.",
        parameter: "tokens")
    }
    return tokenizer.decode(tokens, skipSpecialTokens: skipSpecialTokens)
  }

  public func tokenBytes(_ token: TokenID) -> [UInt8] { tokenizer.tokenBytes(token) }

  public func renderChat(_ prompt: ChatPrompt) throws(EngineError) -> String {
    throw EngineError(.unsupported, "\(model.name) is served for embeddings and has no chat template.")
  }

  public func statistics() -> ServiceStatistics {
    var statistics = state.withLock { state in
      var statistics = state.statistics
      statistics.waitingRequests = state.waitingCount
      statistics.isDraining = state.isDraining
      return statistics
    }
    statistics.maxRunningRequests = network.tokensPerPass
    statistics.maxQueuedRequests = maxQueuedSequences
    statistics.residentBytes = Int(apus_memory_resident())
    return statistics
  }

  /// There is no cache.
  public func flushCache(timeout: Double) async -> Bool { true }
}

/// The inputs of one request and their vectors so far. All that changes is guarded by the engine's state.
private final class Job: @unchecked Sendable {
  // Unchecked: see above.
  let inputs: [EmbeddingInput]
  var vectors: [[Float]]
  /// The first input that has not been taken into a pass.
  var next = 0
  var computed = 0
  var isCancelled = false
  var continuation: CheckedContinuation<Result<[[Float]], EngineError>, Never>?

  init(_ inputs: [EmbeddingInput]) {
    self.inputs = inputs
    vectors = Array(repeating: [], count: inputs.count)
  }
}

/// What wants to be computed. No thread, no clock.
private struct State: Sendable {
  /// An input of a job.
  struct Place: Sendable {
    var job: Job
    var index: Int
  }

  /// Requests with inputs that were not taken yet, in the order of turns.
  var jobs: [Job] = []
  /// Requests all of whose inputs were taken, some of which are being computed.
  var lastInputsRunning: [Job] = []
  /// Inputs that were not taken yet.
  var waitingCount = 0
  var isRunning = false
  var isDraining = false
  var drainWaiters: [CheckedContinuation<Void, Never>] = []
  var statistics = ServiceStatistics()

  var unfinished: [Job] { jobs + lastInputsRunning }

  /// Takes inputs for a pass: one of each request in turn, until the next one does not fit.
  mutating func takePass(tokens budget: Int) -> [Place] {
    var places: [Place] = []
    var tokens = 0
    while let job = jobs.first {
      let count = job.inputs[job.next].tokens.count
      if !places.isEmpty, tokens + count > budget { break }
      places.append(Place(job: job, index: job.next))
      tokens += count
      job.next += 1
      waitingCount -= 1
      jobs.removeFirst()
      if job.next < job.inputs.count { jobs.append(job) } else { lastInputsRunning.append(job) }
    }
    return places
  }

  /// Takes the rest of a request out.
  mutating func remove(_ job: Job) {
    if let index = jobs.firstIndex(where: { $0 === job }) {
      jobs.remove(at: index)
      waitingCount -= job.inputs.count - job.next
    }
    lastInputsRunning.removeAll { $0 === job }
  }

  /// Enters the results of a pass.
  /// - Returns: requests that are complete, with their answers.
  mutating func deliver(
    _ vectors: [[Float]], to places: [Place], seconds: Double
  ) -> [(CheckedContinuation<Result<[[Float]], EngineError>, Never>, Result<[[Float]], EngineError>)] {
    var finished: [(CheckedContinuation<Result<[[Float]], EngineError>, Never>, Result<[[Float]], EngineError>)] = []
    statistics.runningRequests = 0
    statistics.steps += 1
    statistics.forwardSeconds += seconds
    for (place, vector) in zip(places, vectors) {
      let job = place.job
      statistics.promptTokens += job.inputs[place.index].tokens.count
      job.vectors[place.index] = vector
      job.computed += 1
      guard job.computed == job.inputs.count, let continuation = job.continuation.take() else { continue }
      lastInputsRunning.removeAll { $0 === job }
      // Numbers that are not finite come from a broken checkpoint or one whose numbers outgrow their format.
      if job.vectors.contains(where: { vector in vector.contains { !$0.isFinite } }) {
        finished.append(
          (
            continuation,
            .failure(EngineError(.internalFailure, "The model computed numbers that are not finite."))
          ))
      } else {
        statistics.finishedRequests += 1
        finished.append((continuation, .success(job.vectors)))
      }
    }
    return finished
  }
}

/// A model as the engine sees it.
private protocol SequenceNetwork: Sendable {
  var architecture: String { get }
  var parameterCount: Int { get }
  var vocabularySize: Int { get }
  var contextLength: Int { get }
  var dtype: String { get }
  var kvDtype: String { get }
  var weightBytes: Int { get }
  var information: EmbeddingInformation { get }
  /// Tokens in a pass, unless a single sequence has more.
  var tokensPerPass: Int { get }
  /// Computes a pass on the caller's thread.
  func run(_ inputs: [EmbeddingInput]) -> [[Float]]
}

private struct EncoderNetwork: SequenceNetwork {
  let encoder: EncoderModel

  var architecture: String { encoder.configuration.architecture }
  var parameterCount: Int { encoder.configuration.parameterCount }
  var vocabularySize: Int { encoder.configuration.vocabularySize }
  var contextLength: Int { encoder.contextLength }
  var dtype: String { encoder.weightFormat.name }
  var kvDtype: String { "none" }
  var weightBytes: Int { encoder.weightBytes }
  var tokensPerPass: Int { encoder.maxTokensPerPass }
  var information: EmbeddingInformation {
    EmbeddingInformation(
      dimensions: encoder.configuration.hiddenSize, pooling: encoder.pooling, isNormalized: encoder.normalizes,
      labelCount: encoder.configuration.labelCount)
  }

  func run(_ inputs: [EmbeddingInput]) -> [[Float]] { encoder.run(inputs) }
}

private struct DecoderNetwork: SequenceNetwork {
  let loaded: LoadedModel
  let information: EmbeddingInformation

  init(loaded: LoadedModel, pooling: PoolingConfiguration) {
    self.loaded = loaded
    information = EmbeddingInformation(
      dimensions: loaded.steps.model.configuration.hiddenSize, pooling: pooling.pooling ?? .last,
      isNormalized: pooling.normalizes)
  }

  var architecture: String { loaded.description.architecture }
  var parameterCount: Int { loaded.description.parameterCount }
  var vocabularySize: Int { loaded.description.vocabularySize }
  var contextLength: Int { min(loaded.description.contextLength, loaded.description.kvCapacityTokens) }
  var dtype: String { loaded.description.dtype }
  var kvDtype: String { loaded.description.kvDtype }
  var weightBytes: Int { loaded.description.weightBytes }
  var tokensPerPass: Int { loaded.description.maxTokensPerStep }

  func run(_ inputs: [EmbeddingInput]) -> [[Float]] {
    let vectors = loaded.steps.embeddings(inputs.map(\.tokens), pooling: information.pooling)
    return information.isNormalized ? vectors.map(normalizedEmbedding) : vectors
  }
}
