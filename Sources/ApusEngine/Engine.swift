public import ApusCore
package import ApusExecution
import ApusGrammar
import ApusModels
import ApusScheduling
import ApusTensors
package import ApusTokenization
import CLinux
import Glibc
import Synchronization

/// A language model, ready to generate, in this process.
///
/// ```swift
/// try await withEngine(EngineConfiguration(modelPath: "Models/apus-demo")) { engine in
///   for try await chunk in try engine.generate("Once upon a time") { print(chunk.text, terminator: "") }
/// }
/// ```
///
/// The engine owns a thread for its loop, one that wakes readers, one for the model and a pool for the kernels. It is
/// safe to use from any thread or task. Stop it with `shutdown()`; `withEngine` does so by itself.
public final class Engine: GenerationService {
  public let model: ModelInformation
  /// What start-up decided, one sentence a line: device, threads, formats, K/V size, limits.
  public let report: [String]
  public let expertLoads: (any ExpertLoadService)?

  private let configuration: EngineConfiguration
  private let tokenizer: Tokenizer
  private let templates: ChatTemplateSet
  private let mailbox: Mailbox
  private let state: EngineState
  private let grammars: GrammarService
  private let terminated = TerminationSignal()

  private init(
    configuration: EngineConfiguration, draftCosts: DraftCosts?, loaded: LoadedModel, tokenizer: Tokenizer,
    templates: ChatTemplateSet, scheduler: consuming Scheduler, created: Int
  ) {
    self.configuration = configuration
    self.tokenizer = tokenizer
    self.templates = templates
    expertLoads = loaded.expertRecorder
    let description = loaded.description
    var eos = description.eosTokenIDs
    // The tokenizer's end-of-turn token ends a chat even where the model's configuration forgot it.
    if let id = tokenizer.eosID, !eos.contains(id), Int(id) < description.vocabularySize { eos.append(id) }
    model = ModelInformation(
      name: configuration.servedModelName ?? Engine.lastPathComponent(configuration.modelPath),
      path: configuration.modelPath, architecture: description.architecture,
      parameterCount: description.parameterCount, contextLength: description.contextLength,
      vocabularySize: description.vocabularySize, dtype: description.dtype, kvDtype: description.kvDtype,
      eosTokenIDs: eos, bosTokenID: tokenizer.bosID ?? description.bosTokenID,
      samplingDefaults: description.samplingDefaults, hasChatTemplate: !templates.isEmpty,
      chatTemplate: (try? templates.template(hasTools: true).source) ?? "",
      specialTokens: tokenizer.specialTokenTexts, created: created)
    grammars = GrammarService(tokenizer: tokenizer, size: description.vocabularySize, endTokens: eos)
    report =
      Engine.describe(description, configuration: configuration, name: model.name)
      + (description.packedCache.map { [$0] } ?? [])
      + (draftCosts.map { [Engine.describe($0, configuration)] } ?? [])
    // Submissions beyond what may wait are refused before they are posted; the mailbox only has to hold them between
    // two steps.
    mailbox = Mailbox(capacity: configuration.maxRunningRequests + configuration.maxQueuedRequests + 1)
    state = EngineState()
    state.statistics.withLock { $0 = scheduler.statistics }

    let overlaps = configuration.enablesOverlap
    let mailbox = mailbox
    let state = state
    let terminated = terminated
    let delivery = StreamDelivery()
    let handoff = Handoff(
      EngineLoop(
        source: mailbox, sink: EventRouter(state: state, delivery: delivery), runner: loaded.makeRunner(),
        scheduler: scheduler))
    EngineThread.start(name: "apus-engine") {
      var loop = handoff.take()
      if overlaps { loop.run() } else { loop.runWithoutOverlap() }
      Engine.answerLatecomers(mailbox.close(), state)
      delivery.close()
    }
    EngineThread.start(name: "apus-deliver") {
      delivery.run()
      terminated.signal()
    }
  }

  deinit { mailbox.post(.shutdown(reason: "The engine was released.")) }

  // MARK: Starting and stopping

  /// Loads a model and starts an engine.
  ///
  /// - Parameter progress: called while weights are packed, on a thread of the engine.
  /// - Throws: `invalidCheckpoint`, `unsupported`, `outOfMemory`, or `invalidRequest` for impossible settings, each with a
  ///   sentence that says what to do.
  public static func start(
    _ configuration: EngineConfiguration, progress: (@Sendable (LoadProgress) -> Void)? = nil
  ) async throws(EngineError) -> Engine {
    try configuration.validate()
    // Loading blocks for as long as the disk takes: on a thread of its own it keeps no task waiting.
    return try await EngineThread.result(name: "apus-load") { () throws(EngineError) in
      try load(configuration, progress: progress)
    }
  }

  private static func load(
    _ configuration: EngineConfiguration, progress: (@Sendable (LoadProgress) -> Void)?
  ) throws(EngineError) -> Engine {
    // First what is quick, so that a mistake in it shows before gigabytes were read.
    let tokenizer = try loadTokenizer(configuration)
    let templates = try loadTemplates(configuration)
    try checkDraftTokenizer(configuration, tokenizer)
    let backend = try CPUBackend(threads: configuration.threads)
    let loaded = try ModelLoader.load(
      modelOptions(configuration), backend: backend,
      progress: progress.map { report in { report(LoadProgress(completedBytes: $0, totalBytes: $1)) } })
    var settings = SchedulerConfiguration(
      pageCount: loaded.description.kvPageCount, contextLength: loaded.description.contextLength)
    settings.tokenBudget = configuration.tokenBudget
    settings.maxRunningRequests = configuration.maxRunningRequests
    // `submit` bounds running and waiting requests together, and refuses at once. Requests that arrive between two steps
    // all wait for a moment, also those that will run in the next one, so that the scheduler's own limit is the sum.
    settings.maxQueuedRequests = configuration.maxRunningRequests + configuration.maxQueuedRequests
    settings.policy = configuration.schedulePolicy
    settings.conservativeness = configuration.scheduleConservativeness
    settings.cachesPrefixes = configuration.enablesPrefixCache
    settings.sharesPrefixesInBatch = configuration.enablesPrefixCache
    settings.draftTokens = min(configuration.speculativeDraftTokens, max(0, configuration.tokenBudget - 1))
    if settings.draftTokens > 0 {
      settings.draftCosts = configuration.speculativeCosts ?? loaded.steps.measureDraftCosts()
      settings.measuresDrafting = configuration.speculativeCosts == nil
    }
    let scheduler = try Scheduler(settings)
    var now = timespec()
    clock_gettime(CLOCK_REALTIME, &now)
    return Engine(
      configuration: configuration, draftCosts: settings.draftTokens > 0 ? settings.draftCosts : nil, loaded: loaded,
      tokenizer: tokenizer, templates: templates, scheduler: scheduler,
      created: now.tv_sec)
  }

  /// What the configuration means for loading the model.
  package static func modelOptions(_ configuration: EngineConfiguration) throws(EngineError) -> ModelOptions {
    func dtype(_ type: EngineConfiguration.ElementType) -> DType? {
      switch type {
      case .auto: nil
      case .float32: .float32
      case .bfloat16: .bfloat16
      case .float16: .float16
      }
    }
    var options = ModelOptions(path: configuration.modelPath)
    if configuration.loadFormat == .dummy { options.loadFormat = .dummy(seed: configuration.randomSeed ?? 0) }
    options.dtype = dtype(configuration.dtype)
    options.quantization =
      switch configuration.quantization {
      case nil: .stored
      case .dense: .dense
      case .int8: .int8
      case .int8Group: .codes(.int8)
      case .int4: .codes(.int4)
      case .fp8: .codes(.float8)
      }
    options.outputLayer =
      switch configuration.outputLayerQuantization {
      case .auto: .auto
      case .int8: .int8
      case .dense: .dense
      }
    options.expertRecorderMode =
      switch configuration.expertRecorderMode {
      case nil: nil
      case .stat: .stat
      case .perPass: .perPass
      case .perToken: .perToken
      }
    options.expertRecorderBufferSize = configuration.expertRecorderBufferSize
    options.kvDType =
      switch configuration.kvCacheDtype {
      case .auto: nil
      case .float32: .float32
      case .bfloat16: .bfloat16
      case .float16: .float16
      case .int8: .int8
      case .fp8: .float8
      }
    options.packedCache =
      switch configuration.packedCache {
      case nil: nil
      case .besideCheckpoint: .besideCheckpoint
      case .directory(let path): .directory(path)
      }
    options.contextLength = configuration.contextLength
    options.maxTokensPerStep = max(configuration.tokenBudget, configuration.maxRunningRequests)
    options.maxRunningRequests = configuration.maxRunningRequests
    options.experts.dispatch =
      switch configuration.expertDispatch {
      case .normal: .normal
      // SGLang's low-latency form has room for 128 rows of a rank.
      case .auto: .auto(capacity: min(128, options.maxTokensPerStep))
      case .lowLatency: .lowLatency(capacity: options.maxTokensPerStep)
      }
    options.redundantExperts = configuration.redundantExperts
    options.expertLocationPath = configuration.expertLocationPath
    options.memoryFraction = configuration.memoryFraction
    options.kvCacheTokens = configuration.maxTotalTokens
    if configuration.speculativeDraftTokens > 0 {
      options.draftTree = DraftTreeShape(
        width: configuration.speculativeTopK, tokens: configuration.speculativeTreeTokens)
      options.drafting =
        switch configuration.speculativeAlgorithm {
        case .ngram: .ngram(capacity: configuration.speculativeNgramCapacity)
        case .nextn: .prediction
        case .standalone: .model(path: configuration.speculativeDraftModelPath ?? "")
        case .eagle, .eagle3:
          .eagle(
            path: configuration.speculativeDraftModelPath ?? "", isThird: configuration.speculativeAlgorithm == .eagle3)
        }
    }
    return options
  }

  /// Refuses a draft model that spells texts with other tokens. Equal spelling of every id is what drafts need; how texts are
  /// split into tokens is the target's affair.
  private static func checkDraftTokenizer(
    _ configuration: EngineConfiguration, _ tokenizer: Tokenizer
  ) throws(EngineError) {
    guard configuration.speculativeDraftTokens > 0, configuration.speculativeAlgorithm == .standalone,
      let path = configuration.speculativeDraftModelPath
    else { return }
    var draft = EngineConfiguration(modelPath: path)
    draft.loadFormat = configuration.loadFormat
    let other = try loadTokenizer(draft)
    let count = min(tokenizer.vocabularySize, other.vocabularySize)
    let wrong = (0..<TokenID(count)).first { tokenizer.tokenBytes($0) != other.tokenBytes($0) }
    // Checkpoints of one family differ in how many unused ids stand at the end.
    guard wrong == nil, 2 * count >= max(tokenizer.vocabularySize, other.vocabularySize) else {
      throw EngineError(
        .invalidRequest,
        "The draft model at \(path) has another vocabulary than the model"
          + (wrong.map { ": token \($0) is another text" } ?? "") + ". Choose a draft model of the same family.",
        parameter: "speculative_draft_model_path")
    }
  }

  /// The tokenizer that a configuration names, else the checkpoint's, else one made up for weights that are.
  package static func loadTokenizer(_ configuration: EngineConfiguration) throws(EngineError) -> Tokenizer {
    let path = configuration.tokenizerPath ?? configuration.modelPath
    var information = stat()
    guard stat(path, &information) == 0 else {
      throw EngineError(.invalidCheckpoint, "There is no file or directory \(path). Name a checkpoint directory.")
    }
    if information.st_mode & S_IFMT != S_IFDIR { return try Tokenizer.load(file: path) }
    if configuration.loadFormat == .dummy, configuration.tokenizerPath == nil, !hasTokenizer(path) {
      let size =
        EmbeddingEngine.isRequired(modelPath: configuration.modelPath)
        ? try EncoderConfiguration(directory: configuration.modelPath).vocabularySize
        : try ModelConfiguration(directory: configuration.modelPath).vocabularySize
      return try PlaceholderTokenizer.make(vocabularySize: size)
    }
    return try Tokenizer.load(directory: path)
  }

  private static func hasTokenizer(_ directory: String) -> Bool {
    ["tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt"].contains {
      access("\(directory)/\($0)", F_OK) == 0
    }
  }

  /// The checkpoint's chat templates, replaced by the one asked for if there is one. Models of the harmony format are
  /// written to by the native renderer: their own template knows one tool call a message and fewer schemas.
  private static func loadTemplates(_ configuration: EngineConfiguration) throws(EngineError) -> ChatTemplateSet {
    var templates = try ChatTemplateSet.load(directory: configuration.modelPath)
    if let path = configuration.tokenizerPath, templates.isEmpty { templates = try .load(directory: path) }
    if let name = configuration.chatTemplate {
      try templates.choose(name)
    } else if templates.speaksHarmony {
      templates = ChatTemplateSet(.harmony, specialTokens: templates.specialTokens)
    }
    return templates
  }

  /// Aborts what is in flight and returns when the engine's threads have ended. May be called more than once.
  public func shutdown() async {
    state.table.withLock { $0.isDraining = true }
    mailbox.post(.shutdown(reason: "The engine is shutting down."))
    await terminated.wait()
  }

  public func drain() async {
    state.table.withLock { $0.isDraining = true }
    _ = await ask { .drain(reply: $0) }
  }

  /// Answers commands that came after the loop's end.
  private static func answerLatecomers(_ commands: [Command], _ state: EngineState) {
    let error = EngineError(.shuttingDown, "The engine is stopping and takes no new requests.")
    let (streams, replies) = state.table.withLock { table in
      table.isStopped = true
      defer {
        table.streams.removeAll()
        table.handles.removeAll()
        table.replies.removeAll()
      }
      return (Array(table.streams.values), Array(table.replies.values))
    }
    for stream in streams {
      stream.fail(error)
      stream.takeReader()?.resume()
    }
    for reply in replies { reply.resume(returning: false) }
  }

  // MARK: Generating

  public func generate(_ request: Request) throws(EngineError) -> GenerationStream {
    do throws(EngineError) {
      return try submit(request)
    } catch {
      state.table.withLock { $0.refusedCount += 1 }
      throw error
    }
  }

  private func submit(_ request: Request) throws(EngineError) -> GenerationStream {
    if state.table.withLock({ $0.isDraining }) {
      throw EngineError(.shuttingDown, "The engine is stopping and takes no new requests.")
    }
    let tokens =
      switch request.prompt {
      case .text(let text): try encode(text, addSpecialTokens: true)
      case .tokens(let tokens): tokens
      }
    try validate(request, tokens)
    var sampling = request.sampling
    if sampling.seed == nil { sampling.seed = UInt64.random(in: 0...UInt64.max) }
    let assembler = try OutputAssembler(tokenizer: tokenizer, sampling: sampling)

    // A grammar that was compiled before costs nothing; another is compiled while the request waits at its gate.
    let whitespace = sampling.jsonWhitespace ?? configuration.jsonWhitespace
    let known = try sampling.grammar.flatMap { (grammar) throws(EngineError) in
      try grammars.known(grammar, whitespace: whitespace)?.get()
    }
    let isGated = sampling.grammar != nil && known == nil
    let constraint = isGated ? nil : self.constraint(known, sampling)

    let limit = configuration.maxRunningRequests + configuration.maxQueuedRequests
    let mailbox = mailbox
    let (handle, stream) = try state.table.withLock { (table) throws(EngineError) in
      if table.streams.count >= limit {
        throw EngineError(
          .queueFull,
          "All \(configuration.maxRunningRequests) places for running and \(configuration.maxQueuedRequests) for "
            + "waiting requests are taken. Try again later.")
      }
      if table.handles[request.id] != nil {
        throw EngineError(.invalidRequest, "A request named \(request.id) is in flight already.", parameter: "rid")
      }
      let handle = table.nextHandle
      table.nextHandle += 1
      let stream = RequestStream(id: request.id, promptCount: tokens.count, assembler: assembler) { signal in
        switch signal {
        case .finished: mailbox.post(.finish(handle: handle, .stop(nil)))
        case .abandoned: mailbox.post(.abort(handle: handle, reason: "The reader is gone."))
        }
      }
      table.streams[handle] = stream
      table.handles[request.id] = handle
      return (handle, stream)
    }
    let receipt = mailbox.post(
      .submit(
        Submission(
          handle: handle, tokens: tokens, sampling: sampling, eosTokenIDs: model.eosTokenIDs,
          logprobs: request.logprobs, priority: request.priority, cacheSalt: request.cacheSalt,
          gate: isGated ? .closed : .open, constraint: constraint)))
    if receipt != .accepted {
      state.table.withLock { table in
        table.streams.removeValue(forKey: handle)
        table.handles.removeValue(forKey: request.id)
      }
      throw receipt == .full
        ? EngineError(.queueFull, "Too many requests arrive at once. Try again later.")
        : EngineError(.shuttingDown, "The engine is stopping and takes no new requests.")
    }
    if isGated, let grammar = sampling.grammar {
      grammars.compile(grammar, whitespace: whitespace) { [sampling] result in
        switch result {
        case .success(let compiled):
          mailbox.post(.open(handle: handle, constraint: self.constraint(compiled, sampling)))
        case .failure(let error): mailbox.post(.reject(handle: handle, error))
        }
      }
    }
    return GenerationStream(id: request.id, source: stream)
  }

  /// What follows a request's tokens: through a grammar, through the chain of thought, or both; `nil` if nothing limits them.
  private func constraint(_ grammar: CompiledGrammar?, _ sampling: SamplingParameters) -> (any TokenConstraint)? {
    var constraint: (any TokenConstraint)?
    if let grammar {
      constraint = configuration.enablesJumpForward ? JumpForwardConstraint(grammar, tokenizer: tokenizer) : grammar
    }
    guard let budget = sampling.thinkingBudget else { return constraint }
    return ThinkingBudgetConstraint(
      constraint, budget: budget, marks: sampling.thinkingMarks, tokenizer: tokenizer,
      vocabularySize: model.vocabularySize, takesForced: configuration.enablesJumpForward)
  }

  private func validate(_ request: Request, _ tokens: [TokenID]) throws(EngineError) {
    try request.sampling.validate(vocabularySize: model.vocabularySize)
    if tokens.isEmpty {
      throw EngineError(.invalidRequest, "The prompt must hold at least one token.", parameter: "prompt")
    }
    if let token = tokens.first(where: { $0 < 0 || Int($0) >= model.vocabularySize }) {
      throw EngineError(
        .invalidRequest, "The prompt holds token \(token), but the vocabulary has \(model.vocabularySize) entries.",
        parameter: "prompt")
    }
    if request.sampling.thinkingBudget != nil {
      // The end of a chain of thought is forced in tokens: where none spell it the budget could not be kept.
      let closing = request.sampling.thinkingMarks.closing
      let ending = try tokenizer.encode(closing, addSpecialTokens: false)
      // A tokenizer may put a space before a text, and leaves out what it cannot spell.
      guard ending.allSatisfy({ $0 >= 0 && Int($0) < model.vocabularySize }),
        ending.flatMap({ tokenizer.tokenBytes($0) }).suffix(closing.utf8.count).elementsEqual(closing.utf8)
      else {
        throw EngineError(
          .unsupported, "The model has no tokens for \(closing), which ends its chain of thought.",
          parameter: "thinking_budget")
      }
    }
    let output = request.sampling.maxNewTokens
    if tokens.count + (output ?? 1) > model.contextLength {
      throw EngineError(
        .promptTooLong,
        "The model's context holds \(model.contextLength) tokens, but the request has \(tokens.count) in its prompt"
          + (output.map { " and asks for \($0) more" } ?? "") + ". Shorten the prompt or the output.",
        parameter: "prompt")
    }
    guard let logprobs = request.logprobs else { return }
    if logprobs.topCount < 0 || logprobs.topCount > model.vocabularySize {
      throw EngineError(
        .invalidRequest, "top_logprobs must be in 0...\(model.vocabularySize), got \(logprobs.topCount).",
        parameter: "top_logprobs")
    }
    if let start = logprobs.promptStart, start < 0 || start > tokens.count {
      throw EngineError(
        .invalidRequest, "logprob_start_len must be in 0...\(tokens.count), the prompt's length, got \(start).",
        parameter: "logprob_start_len")
    }
    if let token = logprobs.tokenIDs.first(where: { $0 < 0 || Int($0) >= model.vocabularySize }) {
      throw EngineError(
        .invalidRequest,
        "token_ids_logprob names token \(token), but the vocabulary has \(model.vocabularySize) entries.",
        parameter: "token_ids_logprob")
    }
  }

  @discardableResult
  public func abort(_ id: RequestID) -> Bool {
    guard let handle = state.table.withLock({ $0.handles[id] }) else { return false }
    mailbox.post(.abort(handle: handle, reason: "The request was aborted."))
    return true
  }

  public func abortAll() { mailbox.post(.abortAll(reason: "All requests were aborted.")) }

  // MARK: Text

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
    try templates.render(prompt)
  }

  // MARK: Operating

  public func statistics() -> ServiceStatistics {
    var statistics = state.statistics.withLock { $0 }
    let (inFlight, refused, isDraining) = state.table.withLock {
      ($0.streams.count, $0.refusedCount, $0.isDraining)
    }
    // Submissions that the loop has not taken yet wait too.
    statistics.waitingRequests = max(statistics.waitingRequests, inFlight - statistics.runningRequests)
    statistics.maxQueuedRequests = configuration.maxQueuedRequests
    statistics.rejectedRequests += refused
    statistics.isDraining = isDraining
    statistics.residentBytes = Int(apus_memory_resident())
    return statistics
  }

  public func flushCache(timeout: Double) async -> Bool {
    let reply = newReply()
    let giveUp: @Sendable () -> Void = { [mailbox] in _ = mailbox.post(.cancelFlush(reply: reply)) }
    let timer = Mutex<Task<Void, Never>?>(nil)
    // The time begins when the flush is on its way, which it so cannot be told to give up before.
    let isFlushed = await ask(reply) {
      .flushCache(reply: $0)
    } then: {
      guard timeout > 0 else { return giveUp() }
      timer.withLock {
        $0 = Task {
          do { try await Task.sleep(for: .seconds(timeout)) } catch { return }
          giveUp()
        }
      }
    }
    timer.withLock { $0?.cancel() }
    return isFlushed
  }

  private func newReply() -> UInt64 {
    state.table.withLock { table in
      defer { table.nextHandle += 1 }
      return table.nextHandle
    }
  }

  private func ask(_ makeCommand: (UInt64) -> Command) async -> Bool { await ask(newReply(), makeCommand) }

  /// Posts a command and waits for its answer; `false` if the engine has stopped.
  /// - Parameter posted: called when the command has been posted.
  private func ask(
    _ reply: UInt64, _ makeCommand: (UInt64) -> Command, then posted: () -> Void = {}
  ) async -> Bool {
    await withCheckedContinuation { continuation in
      let isStopped = state.table.withLock { table in
        if !table.isStopped { table.replies[reply] = continuation }
        return table.isStopped
      }
      if isStopped {
        continuation.resume(returning: false)
      } else if mailbox.post(makeCommand(reply)) == .closed {
        state.table.withLock { $0.replies.removeValue(forKey: reply) }?.resume(returning: false)
      } else {
        posted()
      }
    }
  }

  // MARK: Words

  static func lastPathComponent(_ path: String) -> String {
    let parts = path.split(separator: "/").filter { $0 != "." }
    return parts.last.map(String.init) ?? path
  }

  private static func describe(
    _ model: ModelDescription, configuration: EngineConfiguration, name: String
  ) -> [String] {
    [
      "model    \(name): \(model.architecture), \(grouped(model.parameterCount)) parameters, "
        + "\(model.dtype), output layer \(model.outputDtype) (\(mebibytes(model.weightBytes))), "
        + "context \(model.contextLength) tokens",
      "device   \(model.backend)",
      "kv cache \(model.kvCapacityTokens) tokens in \(model.kvDtype), up to \(mebibytes(model.kvCacheBytes))"
        + (configuration.enablesPrefixCache ? ", prefixes shared" : ", prefixes not shared"),
      "limits   \(configuration.maxRunningRequests) running, \(configuration.maxQueuedRequests) queued, "
        + "\(configuration.tokenBudget) tokens per step, policy \(configuration.schedulePolicy.rawValue)"
        + (configuration.enablesOverlap ? "" : ", no overlap"),
    ]
  }

  private static func describe(_ costs: DraftCosts, _ configuration: EngineConfiguration) -> String {
    func share(_ cost: Double) -> String {
      let hundredths = Int((min(cost, 1e6) * 100).rounded())
      return "\(hundredths / 100).\(hundredths % 100 < 10 ? "0" : "")\(hundredths % 100)"
    }
    return
      "drafts   \(configuration.speculativeAlgorithm.rawValue), at most \(configuration.speculativeDraftTokens) a step"
      + (configuration.speculativeTopK > 1
        ? " in a row, \(configuration.speculativeTreeTokens) in a tree of \(configuration.speculativeTopK) for one place; "
        : "; ")
      + "a further row costs \(share(costs.row)) of a step of one, drafting it \(share(costs.draft))"
  }

  static func mebibytes(_ bytes: Int) -> String {
    bytes < 10 << 20 ? "\(Double((bytes * 10) >> 20) / 10) MiB" : "\(bytes >> 20) MiB"
  }

  static func grouped(_ number: Int) -> String {
    var digits = String(number)
    var groups: [String] = []
    while digits.count > 3 {
      groups.insert(String(digits.suffix(3)), at: 0)
      digits.removeLast(3)
    }
    return ([digits] + groups).joined(separator: ",")
  }
}
