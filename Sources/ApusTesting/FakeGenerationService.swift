public import ApusCore
import Synchronization

/// A service without an engine, for tests of whatever stands on `GenerationService`.
///
/// Text is a function of the request alone: by default words of lower-case letters drawn from a hash of prompt and seed
/// (`FakeModel`), or whatever `Configuration.reply` returns. The tokenizer is one of bytes: token ids 0...255 are bytes,
/// 256 begins and 257 ends a sequence. Nothing runs on its own: a chunk is made when a reader asks for it, so there are
/// no threads, no sleeps and no races to wait for.
///
/// `maxNewTokens`, `stop`, `stopTokenIDs`, `ignoreEOS`, `minNewTokens`, `noStopTrim`, `skipSpecialTokens`, `logprobs`
/// and the context length are honoured. `stopRegex` and the parameters that shape the distribution are taken and have no
/// effect on the text.
public final class FakeGenerationService: GenerationService {
  /// Beginning-of-sequence token.
  public static let beginToken: TokenID = 256
  /// End-of-sequence token.
  public static let endToken: TokenID = 257

  /// How the service behaves.
  public struct Configuration: Sendable {
    /// The name of the model.
    public var modelName = "fake"
    /// The longest sequence in tokens.
    public var contextLength = 4096
    /// Whether there is a chat template.
    public var hasChatTemplate = true
    /// The most requests in flight; one more is refused with `queueFull`.
    public var maxInFlight = Int.max
    /// Tokens in one chunk.
    public var tokensPerChunk = 1
    /// Prompt tokens said to have come from a cache.
    public var cachedTokens = 0
    /// The text of the reply, after which the model would end the sequence; `nil` uses the hash.
    public var reply: (@Sendable (Request, [TokenID]) -> String)?
    /// Awaited before each chunk, with the request's name and the number of tokens generated so far: a test holds a
    /// generation here for as long as it likes. An abort does not wait for it.
    public var beforeChunk: (@Sendable (RequestID, Int) async -> Void)?
    /// Looked at before each chunk: an error ends the stream with it.
    public var failure: (@Sendable (RequestID, Int) -> EngineError?)?
    /// What the checkpoint would recommend.
    public var samplingDefaults = SamplingDefaults()

    /// The behaviour of a healthy service.
    public init() {}
  }

  private struct State {
    var inFlight: [RequestID: FakeGeneration] = [:]
    var requests: [Request] = []
    var isDraining = false
    var rejection: EngineError?
    var drainWaiters: [CheckedContinuation<Void, Never>] = []
    var statistics = ServiceStatistics()
  }

  public let model: ModelInformation
  private let configuration: Configuration
  private let state = Mutex(State())

  /// Makes a service.
  public init(_ configuration: Configuration = Configuration()) {
    self.configuration = configuration
    model = ModelInformation(
      name: configuration.modelName, path: "/models/\(configuration.modelName)", architecture: "FakeForCausalLM",
      parameterCount: 1_000_000, contextLength: configuration.contextLength, vocabularySize: 258, dtype: "float32",
      kvDtype: "float32", eosTokenIDs: [Self.endToken], bosTokenID: Self.beginToken,
      samplingDefaults: configuration.samplingDefaults, hasChatTemplate: configuration.hasChatTemplate,
      created: 1_700_000_000)
  }

  // MARK: What tests see and set

  /// Every request that was accepted, in order.
  public var requests: [Request] { state.withLock { $0.requests } }

  /// Requests in flight.
  public var inFlightCount: Int { state.withLock { $0.inFlight.count } }

  /// While set, `generate` refuses every request with this error, for example one of code `queueFull`.
  public var rejection: EngineError? {
    get { state.withLock { $0.rejection } }
    set { state.withLock { $0.rejection = newValue } }
  }

  /// Leaves the draining state that `drain` enters.
  public func resume() { state.withLock { $0.isDraining = false } }

  // MARK: GenerationService

  public func generate(_ request: Request) throws(EngineError) -> GenerationStream {
    let tokens: [TokenID]
    switch request.prompt {
    case .text(let text): tokens = try encode(text, addSpecialTokens: true)
    case .tokens(let given): tokens = given
    }
    var error: EngineError?
    if tokens.isEmpty { error = EngineError(.invalidRequest, "The prompt must hold at least one token.") }
    if tokens.count >= configuration.contextLength {
      error = EngineError(
        .promptTooLong,
        "The prompt has \(tokens.count) tokens, but the longest sequence is \(configuration.contextLength) tokens, "
          + "output included.")
    }
    if let token = tokens.first(where: { $0 < 0 || $0 >= TokenID(model.vocabularySize) }) {
      error = EngineError(.invalidRequest, "The prompt names token \(token), which the vocabulary lacks.")
    }
    if let error { throw error }
    try request.sampling.validate(vocabularySize: model.vocabularySize)

    let generation = FakeGeneration(request, prompt: tokens, configuration: configuration, service: self)
    error = state.withLock { state -> EngineError? in
      let refusal: EngineError? =
        if state.isDraining {
          EngineError(.shuttingDown, "The service is stopping and takes no new requests.")
        } else if let rejection = state.rejection {
          rejection
        } else if state.inFlight.count >= configuration.maxInFlight {
          EngineError(.queueFull, "All \(configuration.maxInFlight) places in the queue are taken. Try again later.")
        } else if state.inFlight[request.id] != nil {
          EngineError(.invalidRequest, "A request named \(request.id) is in flight.", parameter: "rid")
        } else {
          nil
        }
      if let refusal {
        state.statistics.rejectedRequests += 1
        return refusal
      }
      state.inFlight[request.id] = generation
      state.requests.append(request)
      state.statistics.promptTokens += tokens.count
      return nil
    }
    if let error { throw error }
    return GenerationStream(id: request.id, source: generation)
  }

  @discardableResult
  public func abort(_ id: RequestID) -> Bool {
    guard let generation = state.withLock({ $0.inFlight[id] }) else { return false }
    generation.abort("The request was aborted.")
    return true
  }

  public func abortAll() {
    for generation in state.withLock({ Array($0.inFlight.values) }) { generation.abort("The request was aborted.") }
  }

  public func encode(_ text: String, addSpecialTokens: Bool) throws(EngineError) -> [TokenID] {
    (addSpecialTokens ? [Self.beginToken] : []) + text.utf8.map(TokenID.init)
  }

  public func decode(_ tokens: [TokenID], skipSpecialTokens: Bool) throws(EngineError) -> String {
    var bytes: [UInt8] = []
    for token in tokens {
      if token < 0 || token > Self.endToken {
        throw EngineError(.invalidRequest, "The vocabulary has no token \(token).")
      }
      if token < 256 || !skipSpecialTokens { bytes += tokenBytes(token) }
    }
    return String(decoding: bytes, as: UTF8.self)
  }

  public func tokenBytes(_ token: TokenID) -> [UInt8] {
    switch token {
    case Self.beginToken: Array("<s>".utf8)
    case Self.endToken: Array("</s>".utf8)
    default: [UInt8(truncatingIfNeeded: token)]
    }
  }

  /// Renders `<role>content` line by line, then `<assistant>`. A content of parts contributes their texts.
  public func renderChat(_ prompt: ChatPrompt) throws(EngineError) -> String {
    if !configuration.hasChatTemplate { throw EngineError(.unsupported, "The model has no chat template.") }
    guard let messages = prompt.messages.arrayValue, !messages.isEmpty else {
      throw EngineError(.invalidRequest, "messages must be a non-empty array.", parameter: "messages")
    }
    var lines: [String] = []
    for message in messages {
      guard let role = message["role"]?.stringValue else {
        throw EngineError(.invalidRequest, "A message has no role.", parameter: "messages")
      }
      let content = message["content"]
      let text = content?.stringValue ?? (content?.arrayValue ?? []).compactMap { $0["text"]?.stringValue }.joined()
      lines.append("<\(role)>\(text)")
    }
    if prompt.addGenerationPrompt && !prompt.continueFinalMessage { lines.append("<assistant>") }
    return lines.joined(separator: "\n")
  }

  public func statistics() -> ServiceStatistics {
    state.withLock { state in
      var statistics = state.statistics
      statistics.runningRequests = state.inFlight.count
      statistics.maxRunningRequests = 64
      statistics.maxQueuedRequests = 256
      statistics.kvCapacityTokens = 65_536
      statistics.kvFreeTokens = 65_536
      statistics.isDraining = state.isDraining
      return statistics
    }
  }

  /// Answers at once whether nothing is in flight; it waits for nothing.
  public func flushCache(timeout: Double) async -> Bool { inFlightCount == 0 }

  public func drain() async {
    await withCheckedContinuation { continuation in
      let isQuiet = state.withLock { state in
        state.isDraining = true
        if state.inFlight.isEmpty { return true }
        state.drainWaiters.append(continuation)
        return false
      }
      if isQuiet { continuation.resume() }
    }
  }

  fileprivate func ended(_ id: RequestID, generatedTokens: Int, wasAborted: Bool) {
    let waiters = state.withLock { state -> [CheckedContinuation<Void, Never>] in
      guard state.inFlight.removeValue(forKey: id) != nil else { return [] }
      if wasAborted { state.statistics.abortedRequests += 1 } else { state.statistics.finishedRequests += 1 }
      state.statistics.generatedTokens += generatedTokens
      guard state.inFlight.isEmpty else { return [] }
      defer { state.drainWaiters = [] }
      return state.drainWaiters
    }
    for waiter in waiters { waiter.resume() }
  }
}

/// One generation of the fake service.
private final class FakeGeneration: GenerationSource {
  private struct State {
    var outputs: [TokenID] = []
    /// Bytes of text whose delivery waits for the rest of a character or of a stop string.
    var held: [UInt8] = []
    var abortReason: String?
    var isEnded = false
    /// Resumed by the hook's end or by an abort, whichever comes first.
    var waiter: CheckedContinuation<Void, Never>?
  }

  private let request: Request
  private let prompt: [TokenID]
  private let script: [TokenID]
  private let limit: Int
  private let configuration: FakeGenerationService.Configuration
  private let service: FakeGenerationService
  private let state = Mutex(State())

  init(
    _ request: Request, prompt: [TokenID], configuration: FakeGenerationService.Configuration,
    service: FakeGenerationService
  ) {
    self.request = request
    self.prompt = prompt
    self.configuration = configuration
    self.service = service
    let sampling = request.sampling
    let limit = min(sampling.maxNewTokens ?? .max, configuration.contextLength - prompt.count)
    self.limit = limit
    if let reply = configuration.reply {
      var script = Array(reply(request, prompt).utf8.map(TokenID.init).prefix(limit))
      // Whoever ignores or forbids the end of a sequence gets what a model would go on with.
      let least = sampling.ignoreEOS ? limit : min(sampling.minNewTokens, limit)
      while script.count < least { script.append(0x2E) }
      if script.count < limit { script.append(FakeGenerationService.endToken) }
      self.script = script
    } else {
      script = Self.babble(prompt, seed: sampling.seed ?? 0, sampling: sampling, limit: limit)
    }
  }

  /// Words of letters. About one word in sixteen ends the sequence, unless that is ignored.
  private static func babble(
    _ prompt: [TokenID], seed: UInt64, sampling: SamplingParameters, limit: Int
  ) -> [TokenID] {
    let model = FakeModel(vocabularySize: 1 << 20)
    var hash = model.start()
    for (position, token) in prompt.enumerated() { hash = model.advance(hash, token, at: position) }
    var script: [TokenID] = []
    while script.count < limit {
      let draw = Int(model.draw(hash, seed: seed))
      let afterSpace = script.last == 0x20 || script.isEmpty
      let mayEnd = !sampling.ignoreEOS && script.count >= max(1, sampling.minNewTokens)
      let token: TokenID =
        if mayEnd && draw % 96 == 0 {
          FakeGenerationService.endToken
        } else if !afterSpace && draw % 6 == 1 {
          0x20
        } else {
          TokenID(0x61 + (draw / 96) % 26)
        }
      script.append(token)
      if token == FakeGenerationService.endToken { break }
      hash = model.advance(hash, token, at: prompt.count + script.count)
    }
    return script
  }

  func cancel() { abort("The client went away.") }

  func abort(_ reason: String) {
    let (waiter, isFirst) = state.withLock { state -> (CheckedContinuation<Void, Never>?, Bool) in
      if state.isEnded || state.abortReason != nil { return (nil, false) }
      state.abortReason = reason
      defer { state.waiter = nil }
      return (state.waiter, true)
    }
    waiter?.resume()
    if isFirst { report(wasAborted: true) }
  }

  func next() async throws(EngineError) -> GenerationChunk? {
    if state.withLock({ $0.isEnded }) { return nil }
    let generated = state.withLock { $0.outputs.count }
    if let hook = configuration.beforeChunk { await run(hook, generated) }
    if let error = configuration.failure?(request.id, generated) {
      state.withLock { $0.isEnded = true }
      report(wasAborted: true)
      throw error
    }
    let chunk = state.withLock { makeChunk(&$0) }
    if let reason = chunk.finishReason {
      // An abort has reported itself.
      if case .abort = reason {} else { report(wasAborted: false) }
    }
    return chunk
  }

  /// Awaits the hook, or an abort, or the end of the reader's task.
  private func run(_ hook: @escaping @Sendable (RequestID, Int) async -> Void, _ generated: Int) async {
    let id = request.id
    await withTaskCancellationHandler {
      await withCheckedContinuation { continuation in
        let isAborted = state.withLock { state in
          if state.abortReason != nil { return true }
          state.waiter = continuation
          return false
        }
        if isAborted {
          continuation.resume()
          return
        }
        Task {
          await hook(id, generated)
          let waiter = self.state.withLock { state in
            defer { state.waiter = nil }
            return state.waiter
          }
          waiter?.resume()
        }
      }
    } onCancel: {
      cancel()
    }
  }

  private func report(wasAborted: Bool) {
    service.ended(
      request.id, generatedTokens: state.withLock { $0.outputs.count }, wasAborted: wasAborted)
  }

  private func makeChunk(_ state: inout State) -> GenerationChunk {
    var chunk = GenerationChunk()
    if let reason = state.abortReason {
      state.isEnded = true
      chunk.finishReason = .abort(reason)
    } else {
      if state.outputs.isEmpty { chunk.promptLogprobs = promptLogprobs() }
      if limit == 0 { chunk.finishReason = .length }
      while chunk.finishReason == nil && chunk.tokens.count < configuration.tokensPerChunk {
        generate(&state, &chunk)
      }
      if chunk.finishReason != nil {
        state.isEnded = true
        chunk.text += String(decoding: state.held, as: UTF8.self)
      }
    }
    chunk.usage = Usage(
      promptTokens: prompt.count, completionTokens: state.outputs.count,
      cachedTokens: min(configuration.cachedTokens, prompt.count - 1))
    return chunk
  }

  /// One token more.
  private func generate(_ state: inout State, _ chunk: inout GenerationChunk) {
    let sampling = request.sampling
    let token = script[state.outputs.count]
    state.outputs.append(token)
    chunk.tokens.append(token)
    if let options = request.logprobs { chunk.logprobs.append(logprobs(state.outputs, options)) }
    let isEnd = token == FakeGenerationService.endToken && !sampling.ignoreEOS
    if (isEnd || sampling.stopTokenIDs.contains(token)) && state.outputs.count > sampling.minNewTokens {
      if sampling.noStopTrim { state.held += service.tokenBytes(token) }
      chunk.finishReason = .stop(.token(token))
      return
    }
    if token < 256 || !sampling.skipSpecialTokens { state.held += service.tokenBytes(token) }
    // The earliest stop string in what is held back; delivered text cannot hold one.
    var found: (start: Int, stop: String)?
    for stop in sampling.stop {
      if let start = Self.firstIndex(of: Array(stop.utf8), in: state.held), start < found?.start ?? .max {
        found = (start, stop)
      }
    }
    if let found {
      let end = sampling.noStopTrim ? found.start + found.stop.utf8.count : found.start
      state.held.removeLast(state.held.count - end)
      chunk.finishReason = .stop(.text(found.stop))
      return
    }
    if state.outputs.count >= limit {
      chunk.finishReason = .length
      return
    }
    let count = deliverable(state.held)
    chunk.text += String(decoding: state.held[..<count], as: UTF8.self)
    state.held.removeFirst(count)
  }

  /// How many bytes can be no part of a stop string and end with a whole character.
  private func deliverable(_ bytes: [UInt8]) -> Int {
    var count = bytes.count
    for stop in request.sampling.stop {
      let stop = Array(stop.utf8)
      for length in stride(from: min(stop.count - 1, bytes.count), to: 0, by: -1)
      where bytes.suffix(length).elementsEqual(stop[..<length]) {
        count = min(count, bytes.count - length)
        break
      }
    }
    while count > 0 && String(validating: bytes[..<count], as: UTF8.self) == nil { count -= 1 }
    return count
  }

  private static func firstIndex(of pattern: [UInt8], in bytes: [UInt8]) -> Int? {
    guard !pattern.isEmpty, bytes.count >= pattern.count else { return nil }
    return (0...bytes.count - pattern.count).first { bytes[$0..<$0 + pattern.count].elementsEqual(pattern) }
  }

  private func logprobs(_ outputs: [TokenID], _ options: LogprobOptions) -> PositionLogprobs {
    let model = FakeModel(vocabularySize: 258)
    let state = model.advance(model.start(), TokenID(outputs.count), at: prompt.count)
    return model.logprobs(state, chosen: outputs[outputs.count - 1], options: options)
  }

  private func promptLogprobs() -> [PositionLogprobs]? {
    guard let options = request.logprobs, let start = options.promptStart, start <= prompt.count else { return nil }
    let model = FakeModel(vocabularySize: 258)
    return (start..<prompt.count).map { position in
      if position == 0 { return PositionLogprobs(chosen: TokenLogprob(token: prompt[0], logprob: nil)) }
      let state = model.advance(model.start(), prompt[position - 1], at: position)
      return model.logprobs(state, chosen: prompt[position], options: options)
    }
  }
}
