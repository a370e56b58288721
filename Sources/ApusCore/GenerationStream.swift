/// What arrived since the last chunk of a generation.
public struct GenerationChunk: Sendable, Equatable {
  /// Text that is new. Always whole characters.
  public var text: String
  /// Tokens that are new. Their text may lag behind while a character is incomplete or a stop string is possible.
  public var tokens: [TokenID]
  /// Log-probabilities of `tokens`, if asked for.
  public var logprobs: [PositionLogprobs]
  /// Log-probabilities of the prompt from the position asked for, on the first chunk only.
  public var promptLogprobs: [PositionLogprobs]?
  /// Set on the last chunk.
  public var finishReason: FinishReason?
  /// Counts up to and including this chunk.
  public var usage: Usage

  /// Makes a chunk.
  public init(
    text: String = "", tokens: [TokenID] = [], logprobs: [PositionLogprobs] = [],
    promptLogprobs: [PositionLogprobs]? = nil, finishReason: FinishReason? = nil, usage: Usage = Usage()
  ) {
    self.text = text
    self.tokens = tokens
    self.logprobs = logprobs
    self.promptLogprobs = promptLogprobs
    self.finishReason = finishReason
    self.usage = usage
  }
}

/// A whole generation, for callers who do not stream.
public struct GenerationResult: Sendable, Equatable {
  /// The text.
  public var text = ""
  /// The output tokens, the stop token among them.
  public var tokens: [TokenID] = []
  /// Log-probabilities of the tokens, if asked for.
  public var logprobs: [PositionLogprobs] = []
  /// Log-probabilities of the prompt, if asked for.
  public var promptLogprobs: [PositionLogprobs]?
  /// Why it ended.
  public var finishReason: FinishReason = .length
  /// Token counts.
  public var usage = Usage()

  /// An empty result.
  public init() {}

  /// Adds what a chunk brought.
  public mutating func append(_ chunk: GenerationChunk) {
    text += chunk.text
    tokens += chunk.tokens
    logprobs += chunk.logprobs
    if let prompt = chunk.promptLogprobs { promptLogprobs = prompt }
    if let reason = chunk.finishReason { finishReason = reason }
    usage = chunk.usage
  }
}

/// A generation in flight, as a sequence of chunks. It has one consumer.
///
/// Chunks that were not yet read are merged, so a slow reader costs memory for its own text and nothing else. Dropping
/// the iterator before the last chunk aborts the request; so does cancelling the task that awaits `next()`.
public struct GenerationStream: AsyncSequence, Sendable {
  public typealias Element = GenerationChunk
  public typealias Failure = EngineError

  /// The request's name.
  public let id: RequestID
  private let source: any GenerationSource

  /// Wraps what a service delivers.
  public init(id: RequestID, source: any GenerationSource) {
    self.id = id
    self.source = source
  }

  public func makeAsyncIterator() -> Iterator { Iterator(source) }

  /// Reads the whole generation.
  public func result() async throws(EngineError) -> GenerationResult {
    var result = GenerationResult()
    let iterator = makeAsyncIterator()
    while let chunk = try await iterator.next(isolation: nil) { result.append(chunk) }
    return result
  }

  /// Reads a stream's chunks in order. Its last reference aborts the request if the last chunk was not read.
  public final class Iterator: AsyncIteratorProtocol {
    public typealias Element = GenerationChunk
    public typealias Failure = EngineError

    private let source: any GenerationSource
    private var isFinished = false

    init(_ source: any GenerationSource) { self.source = source }

    deinit { if !isFinished { source.cancel() } }

    public func next(isolation actor: isolated (any Actor)?) async throws(EngineError) -> GenerationChunk? {
      if isFinished { return nil }
      let chunk: GenerationChunk?
      do {
        chunk = try await source.next()
      } catch {
        isFinished = true
        throw error
      }
      if chunk == nil || chunk?.finishReason != nil { isFinished = true }
      return chunk
    }
  }
}

/// Where a stream's chunks come from. Conformers merge chunks that were not read in time.
public protocol GenerationSource: Sendable {
  /// The next chunk; `nil` after the last.
  func next() async throws(EngineError) -> GenerationChunk?
  /// The reader is gone: abort the request. May be called at any time, more than once.
  func cancel()
}
