import ApusCore
import Synchronization

/// A generation service without a model: what it answers is a function of the request alone.
///
/// Text is tokenized by bytes. An answer is the words of `FakeService.words`, one token each, ended by the
/// end-of-sequence token. Chunks are made when they are read, one token each, so that transcripts are exact; a request
/// can be told to hold its breath after some tokens until it is released or aborted.
final class FakeService: GenerationService {
  let expertLoads: (any ExpertLoadService)?
  static let words = ["Hello", ",", " world", "!", " \"quoted\"", "\n", "é", " 🐦"]
  static let answer = words.joined()
  static let firstWord: TokenID = 300
  static let bos: TokenID = 256
  static let eos: TokenID = 257

  /// How requests behave.
  struct Behaviour: Sendable {
    /// Tokens after which a request waits for `release()`; `nil` never waits.
    var holdAfter: Int?
    /// Requests in flight at which the queue is full.
    var capacity = 10_000
    /// An error that takes the place of the token with this index.
    var failure: (index: Int, error: EngineError)?
    /// Repeats of each word's text, to make answers large.
    var repeats = 1
    /// Whether an answer goes on until its limit.
    var isEndless = false
    /// The answer, one token each.
    var words = FakeService.words
    /// Whether each request but the first waits before its first token for `releaseNext()`, so that the order of what
    /// several of them answer is known.
    var isOneByOne = false
    /// What the chat template writes at a prompt's end.
    var promptEnd = "<assistant>"
  }

  private struct State {
    var behaviour: Behaviour
    var sources: [RequestID: FakeSource] = [:]
    var requests: [Request] = []
    /// The requests that wait for `releaseNext()`.
    var queue: [FakeSource] = []
    var messages: [JSONValue] = []
    var aborted: [RequestID] = []
    var statistics = ServiceStatistics()
    var drainWaiters: [CheckedContinuation<Void, Never>] = []
    var abortWaiters: [(Int, CheckedContinuation<Void, Never>)] = []
  }

  let model: ModelInformation
  private let state: Mutex<State>

  init(
    _ behaviour: Behaviour = Behaviour(), defaults: SamplingDefaults = SamplingDefaults(), contextLength: Int = 4096,
    chatTemplate: String = "", specialTokens: [String] = [], expertLoads: (any ExpertLoadService)? = nil
  ) {
    self.expertLoads = expertLoads
    state = Mutex(State(behaviour: behaviour))
    model = ModelInformation(
      name: "fake/model", path: "/models/fake", architecture: "FakeForCausalLM", parameterCount: 42,
      contextLength: contextLength, vocabularySize: 512, dtype: "bfloat16", kvDtype: "bfloat16",
      eosTokenIDs: [Self.eos], bosTokenID: Self.bos, samplingDefaults: defaults, hasChatTemplate: true,
      chatTemplate: chatTemplate, specialTokens: specialTokens, created: 1_700_000_000)
  }

  /// The requests submitted so far.
  var requests: [Request] { state.withLock { $0.requests } }
  /// The conversations rendered so far.
  var messages: [JSONValue] { state.withLock { $0.messages } }
  /// The names of the requests aborted while in flight.
  var aborted: [RequestID] { state.withLock { $0.aborted } }
  /// Requests in flight.
  var inFlight: Int { state.withLock { $0.sources.count } }
  /// Tokens that were read so far.
  var tokensRead: Int { state.withLock { $0.statistics.generatedTokens } }

  /// Lets requests that hold go on.
  func release() {
    let sources = state.withLock { state in
      state.behaviour.holdAfter = nil
      return Array(state.sources.values)
    }
    for source in sources { source.release() }
  }

  /// Lets the next of the requests that come one by one go on.
  func releaseNext() {
    let source = state.withLock { $0.queue.isEmpty ? nil : $0.queue.removeFirst() }
    source?.release()
  }

  /// Waits until so many requests have been aborted while in flight.
  func waitForAborts(_ count: Int) async {
    await withCheckedContinuation { continuation in
      let isReached = state.withLock { state in
        if state.aborted.count >= count { return true }
        state.abortWaiters.append((count, continuation))
        return false
      }
      if isReached { continuation.resume() }
    }
  }

  // MARK: GenerationService

  func generate(_ request: Request) throws(EngineError) -> GenerationStream {
    try request.sampling.validate(vocabularySize: model.vocabularySize)
    let tokens: [TokenID]
    switch request.prompt {
    case .tokens(let ids): tokens = ids
    case .text(let text): tokens = try encode(text, addSpecialTokens: true)
    }
    if tokens.isEmpty { throw EngineError(.invalidRequest, "The prompt is empty.", parameter: "prompt") }
    let limit = request.sampling.maxNewTokens ?? max(1, model.contextLength - tokens.count)
    if tokens.count + (request.sampling.maxNewTokens ?? 1) > model.contextLength {
      throw EngineError(
        .promptTooLong,
        "The prompt has \(tokens.count) tokens and max_new_tokens is \(limit), but the context holds \(model.contextLength)."
      )
    }
    let result: Result<FakeSource, EngineError> = state.withLock { state in
      if state.statistics.isDraining { return .failure(EngineError(.shuttingDown, "The engine is stopping.")) }
      if state.sources.count >= state.behaviour.capacity {
        state.statistics.rejectedRequests += 1
        return .failure(EngineError(.queueFull, "The queue is full."))
      }
      var behaviour = state.behaviour
      if behaviour.isOneByOne, !state.requests.isEmpty { behaviour.holdAfter = 0 }
      let source = FakeSource(service: self, request: request, prompt: tokens, limit: limit, behaviour: behaviour)
      if behaviour.isOneByOne, !state.requests.isEmpty { state.queue.append(source) }
      state.sources[request.id] = source
      state.requests.append(request)
      state.statistics.promptTokens += tokens.count
      return .success(source)
    }
    return GenerationStream(id: request.id, source: try result.get())
  }

  @discardableResult
  func abort(_ id: RequestID) -> Bool {
    let source = state.withLock { $0.sources[id] }
    source?.abort("The request was aborted.")
    return source != nil
  }

  func abortAll() {
    for source in state.withLock({ Array($0.sources.values) }) { source.abort("All requests were aborted.") }
  }

  func encode(_ text: String, addSpecialTokens: Bool) throws(EngineError) -> [TokenID] {
    (addSpecialTokens ? [Self.bos] : []) + text.utf8.map { TokenID($0) }
  }

  func decode(_ tokens: [TokenID], skipSpecialTokens: Bool) throws(EngineError) -> String {
    let kept = tokens.filter { !skipSpecialTokens || !($0 == Self.bos || $0 == Self.eos) }
    return String(decoding: kept.flatMap(tokenBytes), as: UTF8.self)
  }

  func tokenBytes(_ token: TokenID) -> [UInt8] {
    switch token {
    case 0..<256: [UInt8(token)]
    case Self.bos: Array("<s>".utf8)
    case Self.eos: Array("</s>".utf8)
    default:
      state.withLock { state in
        let words = state.behaviour.words
        return Array(words[Int(token - Self.firstWord) % words.count].utf8)
      }
    }
  }

  func renderChat(_ prompt: ChatPrompt) throws(EngineError) -> String {
    state.withLock { $0.messages.append(prompt.messages) }
    var text = ""
    for message in prompt.messages.arrayValue ?? [] {
      let role = message["role"]?.stringValue ?? ""
      if role == "raise" { throw EngineError(.invalidRequest, "The template says: no such role.") }
      text += "<\(role)>\(message["content"]?.stringValue ?? "?")"
    }
    if let tools = prompt.tools { text += "<tools>\(tools.compactText)" }
    for (name, value) in prompt.variables.sorted(by: { $0.key < $1.key }) { text += "<\(name)=\(value.compactText)>" }
    return prompt.addGenerationPrompt ? text + state.withLock { $0.behaviour.promptEnd } : text
  }

  func statistics() -> ServiceStatistics {
    state.withLock { state in
      var statistics = state.statistics
      statistics.runningRequests = state.sources.count
      statistics.maxRunningRequests = state.behaviour.capacity
      statistics.maxQueuedRequests = state.behaviour.capacity
      statistics.kvCapacityTokens = 1000
      statistics.kvUsedTokens = 250
      return statistics
    }
  }

  func flushCache(timeout: Double) async -> Bool { inFlight == 0 }

  func drain() async {
    await withCheckedContinuation { continuation in
      let isIdle = state.withLock { state in
        state.statistics.isDraining = true
        if state.sources.isEmpty { return true }
        state.drainWaiters.append(continuation)
        return false
      }
      if isIdle { continuation.resume() }
    }
  }

  // MARK: Called by sources

  fileprivate func tokenWasRead() { state.withLock { $0.statistics.generatedTokens += 1 } }

  fileprivate func ended(_ id: RequestID, isAborted: Bool) {
    let waiters = state.withLock { state -> [CheckedContinuation<Void, Never>] in
      guard state.sources.removeValue(forKey: id) != nil else { return [] }
      var ready: [CheckedContinuation<Void, Never>] = []
      if isAborted {
        state.aborted.append(id)
        state.statistics.abortedRequests += 1
        ready += state.abortWaiters.filter { $0.0 <= state.aborted.count }.map(\.1)
        state.abortWaiters.removeAll { $0.0 <= state.aborted.count }
      } else {
        state.statistics.finishedRequests += 1
      }
      if state.sources.isEmpty {
        ready += state.drainWaiters
        state.drainWaiters = []
      }
      return ready
    }
    for waiter in waiters { waiter.resume() }
  }
}

/// Makes the chunks of one request as they are read.
private final class FakeSource: GenerationSource {
  private struct State {
    var usage = Usage()
    /// Characters of the answer so far.
    var length = 0
    var isEnded = false
    var abortReason: String?
    var isHolding: Bool
    var waiter: CheckedContinuation<Void, Never>?
  }

  private let service: FakeService
  private let request: Request
  private let prompt: [TokenID]
  private let limit: Int
  private let behaviour: FakeService.Behaviour
  /// The first place in the answer where a stop text occurs.
  private let stop: (text: String, start: Int)?
  private let state: Mutex<State>

  init(
    service: FakeService, request: Request, prompt: [TokenID], limit: Int, behaviour: FakeService.Behaviour
  ) {
    self.service = service
    self.request = request
    self.prompt = prompt
    self.limit = limit
    self.behaviour = behaviour
    let answer = behaviour.words.joined()
    stop = request.sampling.stop.compactMap { text in
      answer.firstRange(of: text).map { (text, answer.distance(from: answer.startIndex, to: $0.lowerBound)) }
    }.min { $0.1 + $0.0.count < $1.1 + $1.0.count }
    state = Mutex(
      State(usage: Usage(promptTokens: prompt.count, cachedTokens: 3), isHolding: behaviour.holdAfter != nil))
  }

  func release() {
    let waiter = state.withLock { state in
      state.isHolding = false
      defer { state.waiter = nil }
      return state.waiter
    }
    waiter?.resume()
  }

  func abort(_ reason: String) {
    let (waiter, isFirst) = state.withLock { state in
      let isFirst = !state.isEnded && state.abortReason == nil
      if isFirst { state.abortReason = reason }
      defer { state.waiter = nil }
      return (state.waiter, isFirst)
    }
    if isFirst { service.ended(request.id, isAborted: true) }
    waiter?.resume()
  }

  func cancel() { abort("The reader has gone.") }

  func next() async throws(EngineError) -> GenerationChunk? {
    await withCheckedContinuation { continuation in
      let mustWait = state.withLock { state in
        guard state.isHolding, state.abortReason == nil, state.usage.completionTokens >= behaviour.holdAfter ?? .max
        else { return false }
        state.waiter = continuation
        return true
      }
      if !mustWait { continuation.resume() }
    }
    let result: Result<GenerationChunk?, EngineError> = state.withLock { state in
      if state.isEnded { return .success(nil) }
      if let reason = state.abortReason {
        state.isEnded = true
        return .success(GenerationChunk(finishReason: .abort(reason), usage: state.usage))
      }
      let index = state.usage.completionTokens
      if let failure = behaviour.failure, failure.index == index {
        state.isEnded = true
        return .failure(failure.error)
      }
      return .success(chunk(index, &state))
    }
    if case .success(let chunk?) = result, chunk.finishReason == nil { service.tokenWasRead() }
    switch result {
    case .success(let chunk):
      if let reason = chunk?.finishReason {
        if case .abort = reason {} else { service.ended(request.id, isAborted: false) }
      }
      return chunk
    case .failure(let error):
      service.ended(request.id, isAborted: false)
      throw error
    }
  }

  private func chunk(_ index: Int, _ state: inout State) -> GenerationChunk {
    var chunk = GenerationChunk(usage: state.usage)
    if index == 0, let start = request.logprobs?.promptStart {
      chunk.promptLogprobs = prompt.indices.dropFirst(start).map { position in
        self.logprobs(prompt[position], position == 0 ? nil : -1)
      }
    }
    if index >= limit {
      // Only a request for no tokens at all comes here.
      state.isEnded = true
      chunk.finishReason = .length
      return chunk
    }
    let isEnd = !behaviour.isEndless && index == behaviour.words.count
    let token = isEnd ? FakeService.eos : FakeService.firstWord + TokenID(index % behaviour.words.count)
    state.usage.completionTokens += 1
    chunk.usage = state.usage
    chunk.tokens = [token]
    if request.logprobs != nil { chunk.logprobs = [logprobs(token, -0.5 * Float(index + 1))] }
    if isEnd {
      chunk.finishReason = .stop(.token(FakeService.eos))
    } else {
      chunk.text = String(repeating: behaviour.words[Int(token - FakeService.firstWord)], count: behaviour.repeats)
      let start = state.length
      state.length += chunk.text.count
      if let stop, state.length > stop.start {
        // What belongs to the stop text is held back, even where it began in an earlier token.
        chunk.text = String(chunk.text.prefix(max(0, stop.start - start)))
      }
      if let stop, state.length >= stop.start + stop.text.count {
        chunk.finishReason = .stop(.text(stop.text))
      } else if index + 1 == limit {
        chunk.finishReason = .length
      }
    }
    if chunk.finishReason != nil { state.isEnded = true }
    return chunk
  }

  private func logprobs(_ token: TokenID, _ logprob: Float?) -> PositionLogprobs {
    let options = request.logprobs ?? LogprobOptions()
    return PositionLogprobs(
      chosen: TokenLogprob(token: token, logprob: logprob),
      top: logprob == nil
        ? [] : (0..<options.topCount).map { TokenLogprob(token: TokenID(97 + $0), logprob: -0.25 - Float($0)) },
      requested: logprob == nil ? [] : options.tokenIDs.map { TokenLogprob(token: $0, logprob: -2) })
  }
}

/// Loads of two experts.
final class FakeExpertLoads: ExpertLoadService {
  private let flag = Mutex(false)
  var isRecording: Bool { flag.withLock { $0 } }
  var balancedness: Double? { isRecording ? 0.5 : nil }
  func start() { flag.withLock { $0 = true } }
  func stop() { flag.withLock { $0 = false } }
  func dump() -> JSONValue { ["logical_count": [[1, 3]]] }
}
