import ApusCore
import ApusTokenization
import Synchronization

/// Carries one request's tokens from the engine's thread to the task that reads them.
///
/// The engine's thread appends tokens and wakes the reader; the reader's task turns them into text and looks for stop
/// strings, so that the engine spends nothing on text. Tokens that were not read yet are merged.
final class RequestStream: GenerationSource {
  /// What a reader tells the engine.
  enum Signal: Sendable {
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
    var reader: CheckedContinuation<Void, Never>?
  }

  let id: RequestID
  private let inbox: Mutex<Inbox>
  /// Used by the reader's task alone; the lock is never contended.
  private let assembler: Mutex<OutputAssembler>
  private let signal: @Sendable (Signal) -> Void

  init(
    id: RequestID, promptCount: Int, assembler: consuming sending OutputAssembler,
    signal: @escaping @Sendable (Signal) -> Void
  ) {
    self.id = id
    self.inbox = Mutex(Inbox(usage: Usage(promptTokens: promptCount)))
    self.assembler = Mutex(assembler)
    self.signal = signal
  }

  // MARK: The engine's side

  // These are called on the engine's thread. They wake nobody: `wake` does, once per step.

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

  /// Resumes the reader if it waits.
  func wake() {
    inbox.withLock { inbox in inbox.hasNews ? inbox.reader.take() : nil }?.resume()
  }

  // MARK: The reader's side

  private enum Taken {
    case news(tokens: [TokenID], logprobs: [PositionLogprobs], prompt: [PositionLogprobs]?, FinishReason?, Usage)
    case failure(EngineError)
    case nothing
  }

  func next() async throws(EngineError) -> GenerationChunk? {
    while true {
      if Task.isCancelled {
        cancel()
        throw EngineError(.aborted, "The task that read the generation was cancelled.")
      }
      switch take() {
      case .failure(let error): throw error
      case .news(let tokens, let logprobs, let prompt, let reason, let usage):
        return assemble(tokens, logprobs, prompt, reason, usage)
      case .nothing: await waitForNews()
      }
    }
  }

  func cancel() {
    let isFirst = inbox.withLock { inbox in
      defer { inbox.isCancelled = true }
      return !inbox.isCancelled && inbox.finishReason == nil && inbox.error == nil
    }
    if isFirst { signal(.abandoned) }
  }

  private func take() -> Taken {
    inbox.withLock { inbox in
      if !inbox.hasNews { return .nothing }
      inbox.hasNews = false
      // Tokens that were delivered before a failure are still given out first.
      if let error = inbox.error, inbox.tokens.isEmpty { return .failure(error) }
      if inbox.error != nil { inbox.hasNews = true }
      let taken = Taken.news(
        tokens: inbox.tokens, logprobs: inbox.logprobs, prompt: inbox.promptLogprobs.take(), inbox.finishReason,
        inbox.usage)
      inbox.tokens = []
      inbox.logprobs = []
      return taken
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

  private func assemble(
    _ tokens: [TokenID], _ logprobs: [PositionLogprobs], _ prompt: [PositionLogprobs]?, _ reason: FinishReason?,
    _ usage: Usage
  ) -> GenerationChunk {
    var chunk = assembler.withLock { $0.append(tokens, logprobs: logprobs, finishReason: reason) }
    chunk.promptLogprobs = prompt
    let completion = chunk.usage.completionTokens
    chunk.usage = usage
    chunk.usage.completionTokens = completion
    if chunk.finishReason != nil, reason == nil {
      // A stop string was found here before the engine knew of any end.
      inbox.withLock { $0.isCancelled = true }
      signal(.finished)
    }
    return chunk
  }
}
