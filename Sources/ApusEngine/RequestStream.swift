package import ApusCore
import ApusTokenization
import Synchronization

/// Carries one request's tokens from the engine's thread to the task that reads them.
///
/// The engine's thread appends tokens and hands the reader over to be resumed; the reader's task turns them into text and
/// looks for stop strings, so that the engine spends nothing on text. Tokens that were not read yet are merged. The reader
/// leaves its emptied arrays in exchange for the full ones: two of each alternate, and the engine's thread allocates
/// nothing.
package final class RequestStream: GenerationSource {
  /// What a reader tells the engine.
  package enum Signal: Sendable {
    /// A stop string was found: the request is done.
    case finished
    /// The reader is gone.
    case abandoned
  }

  /// Guarded by `inbox`: what arrived and was not read yet.
  private struct Inbox: ~Copyable {
    var tokens: [TokenID] = []
    var logprobs: [PositionLogprobs] = []
    var promptLogprobs: [PositionLogprobs]?
    var finishReason: FinishReason?
    var error: EngineError?
    var usage: Usage
    var hasNews = false
    var isCancelled = false
    var reader: StreamDelivery.Reader?
  }

  /// The reader's own: used by its task alone, so that the lock is never contended.
  private struct Desk: ~Copyable {
    var assembler: OutputAssembler
    /// Empty between two reads.
    var tokens: [TokenID] = []
    var logprobs: [PositionLogprobs] = []
  }

  package let id: RequestID
  private let inbox: Mutex<Inbox>
  private let desk: Mutex<Desk>
  private let signal: @Sendable (Signal) -> Void

  package init(
    id: RequestID, promptCount: Int, assembler: consuming sending OutputAssembler,
    signal: @escaping @Sendable (Signal) -> Void
  ) {
    self.id = id
    var inbox = Inbox(usage: Usage(promptTokens: promptCount))
    var desk = Desk(assembler: assembler)
    // Here on the caller's thread, so that the engine's need not. More is needed only while the reader lags behind.
    inbox.tokens.reserveCapacity(16)
    desk.tokens.reserveCapacity(16)
    self.inbox = Mutex(inbox)
    self.desk = Mutex(desk)
    self.signal = signal
  }

  // MARK: The engine's side

  // These are called on the engine's thread. They wake nobody: once per step, whoever waits is taken and resumed.

  /// The prompt is computed.
  func start(cachedTokens: Int, promptLogprobs: [PositionLogprobs]?) {
    inbox.withLock { inbox in
      inbox.usage.cachedTokens = cachedTokens
      inbox.promptLogprobs = promptLogprobs
    }
  }

  /// Adds a token.
  func deliver(_ token: TokenID, logprobs: PositionLogprobs?) {
    inbox.withLock { inbox in
      inbox.tokens.append(token)
      if let logprobs { inbox.logprobs.append(logprobs) }
      inbox.hasNews = true
    }
  }

  /// Ends the stream.
  func finish(_ reason: FinishReason, retractions: Int, speculation: SpeculationCounts?) {
    inbox.withLock { inbox in
      inbox.usage.retractions = retractions
      inbox.usage.speculation = speculation
      inbox.finishReason = reason
      inbox.hasNews = true
    }
  }

  /// Ends the stream with an error: the request was refused after it had been submitted.
  func fail(_ error: EngineError) {
    inbox.withLock { inbox in
      inbox.error = error
      inbox.hasNews = true
    }
  }

  /// The reader, if it waits and there is something for it. Whoever takes it resumes it.
  func takeReader() -> StreamDelivery.Reader? {
    inbox.withLock { inbox in inbox.hasNews ? inbox.reader.take() : nil }
  }

  // MARK: The reader's side

  private enum Taken {
    case chunk(GenerationChunk)
    case failure(EngineError)
    case nothing
  }

  package func next() async throws(EngineError) -> GenerationChunk? {
    while true {
      if Task.isCancelled {
        cancel()
        throw EngineError(.aborted, "The task that read the generation was cancelled.")
      }
      switch take() {
      case .chunk(let chunk): return chunk
      case .failure(let error): throw error
      case .nothing: await waitForNews()
      }
    }
  }

  package func cancel() {
    let isFirst = inbox.withLock { inbox in
      defer { inbox.isCancelled = true }
      return !inbox.isCancelled && inbox.finishReason == nil && inbox.error == nil
    }
    if isFirst { signal(.abandoned) }
  }

  private func take() -> Taken {
    desk.withLock { desk in
      var prompt: [PositionLogprobs]?
      var reason: FinishReason?
      var usage = Usage()
      var error: EngineError?
      let hasNews = inbox.withLock { inbox in
        if !inbox.hasNews { return false }
        inbox.hasNews = false
        if inbox.error != nil {
          // Tokens that were delivered before a failure are still given out first.
          if inbox.tokens.isEmpty { error = inbox.error } else { inbox.hasNews = true }
        }
        swap(&inbox.tokens, &desk.tokens)
        swap(&inbox.logprobs, &desk.logprobs)
        prompt = inbox.promptLogprobs.take()
        reason = inbox.finishReason
        usage = inbox.usage
        return true
      }
      if !hasNews { return .nothing }
      if let error { return .failure(error) }
      defer {
        desk.tokens.removeAll(keepingCapacity: true)
        desk.logprobs.removeAll(keepingCapacity: true)
      }
      // The chunk gets copies: a shared array could not be emptied and used again.
      let tokens = desk.tokens.withUnsafeBufferPointer { Array($0) }
      let logprobs = desk.logprobs.withUnsafeBufferPointer { Array($0) }
      var chunk = desk.assembler.append(tokens, logprobs: logprobs, finishReason: reason)
      chunk.promptLogprobs = prompt
      usage.completionTokens = chunk.usage.completionTokens
      chunk.usage = usage
      if chunk.finishReason != nil, reason == nil {
        // A stop string was found here before the engine knew of any end.
        inbox.withLock { $0.isCancelled = true }
        signal(.finished)
      }
      return .chunk(chunk)
    }
  }

  private func waitForNews() async {
    await withTaskCancellationHandler {
      await withCheckedContinuation { continuation in
        let isReady = inbox.withLock { inbox in
          precondition(inbox.reader == nil, "A generation stream has one reader.")
          if inbox.hasNews || inbox.isCancelled || Task.isCancelled { return true }
          inbox.reader = continuation
          return false
        }
        if isReady { continuation.resume() }
      }
    } onCancel: {
      inbox.withLock { $0.reader.take() }?.resume()
    }
  }
}
