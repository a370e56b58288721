public import ApusCore
import Synchronization

/// An embedding service without a model: a vector counts a sequence's tokens, so that sequences with the same tokens have
/// the same vector, and a pair's score is how many tokens its second text shares with its first.
///
/// It generates nothing. Texts are tokenized by bytes, as `FakeGenerationService` does: 256 begins a text and 257 ends it.
public final class FakeEmbeddingService: GenerationService, EmbeddingService {
  /// How the service behaves.
  public struct Configuration: Sendable {
    /// Numbers in a vector.
    public var dimensions = 8
    /// Outputs of a classifier; `nil` gives vectors.
    public var labelCount: Int?
    /// The longest sequence in tokens.
    public var contextLength = 64
    /// An error that every call of `embed` ends with.
    public var failure: EngineError?
    /// Awaited before an answer: a test holds a request here for as long as it likes.
    public var beforeAnswer: (@Sendable () async -> Void)?

    /// The behaviour of a healthy model that gives vectors.
    public init() {}
  }

  public let model: ModelInformation
  public let information: EmbeddingInformation
  public var embeddings: (any EmbeddingService)? { self }
  private let configuration: Configuration
  private let received = Mutex<[[EmbeddingInput]]>([])

  /// The inputs of every call so far.
  public var calls: [[EmbeddingInput]] { received.withLock { $0 } }

  /// Makes a service.
  public init(_ configuration: Configuration = Configuration()) {
    self.configuration = configuration
    information = EmbeddingInformation(
      dimensions: configuration.dimensions, pooling: .mean, isNormalized: true, labelCount: configuration.labelCount)
    model = ModelInformation(
      name: "fake-embedding", path: "/models/fake-embedding", architecture: "FakeModel", parameterCount: 1_000,
      contextLength: configuration.contextLength, vocabularySize: 258, dtype: "float32", kvDtype: "none",
      eosTokenIDs: [257], bosTokenID: 256, samplingDefaults: SamplingDefaults(), hasChatTemplate: false,
      created: 1_700_000_000)
  }

  public func encodePair(_ first: String, _ second: String) throws(EngineError) -> EmbeddingInput {
    let left = try encode(first, addSpecialTokens: true)
    let right = Array(second.utf8.map(TokenID.init)) + [257]
    return EmbeddingInput(tokens: left + right, firstSegmentCount: left.count)
  }

  public func embed(_ inputs: [EmbeddingInput]) async throws(EngineError) -> [[Float]] {
    received.withLock { $0.append(inputs) }
    await configuration.beforeAnswer?()
    if let failure = configuration.failure { throw failure }
    if Task.isCancelled { throw EngineError(.aborted, "The request was aborted.") }
    if let input = inputs.first(where: { $0.tokens.count > configuration.contextLength }) {
      throw EngineError(
        .promptTooLong, "The model takes at most \(configuration.contextLength) tokens, not \(input.tokens.count).",
        parameter: "input")
    }
    return inputs.map { input in
      if let labelCount = configuration.labelCount {
        let split = input.firstSegmentCount ?? input.tokens.count
        let known = Set(input.tokens[..<split])
        let shared = input.tokens[split...].dropLast().count { known.contains($0) }
        return Array(repeating: Float(shared), count: labelCount)
      }
      var vector = [Float](repeating: 0, count: configuration.dimensions)
      for token in input.tokens { vector[Int(token) % vector.count] += 1 }
      return normalizedEmbedding(vector)
    }
  }

  // MARK: GenerationService

  public func generate(_ request: Request) throws(EngineError) -> GenerationStream {
    throw EngineError(.unsupported, "fake-embedding does not generate text.", parameter: "model")
  }

  public func abort(_ id: RequestID) -> Bool { false }

  public func abortAll() {}

  public func encode(_ text: String, addSpecialTokens: Bool) throws(EngineError) -> [TokenID] {
    let bytes = text.utf8.map(TokenID.init)
    return addSpecialTokens ? [256] + bytes + [257] : bytes
  }

  public func decode(_ tokens: [TokenID], skipSpecialTokens: Bool) throws(EngineError) -> String {
    String(decoding: tokens.compactMap(UInt8.init(exactly:)), as: UTF8.self)
  }

  public func tokenBytes(_ token: TokenID) -> [UInt8] { UInt8(exactly: token).map { [$0] } ?? [] }

  public func renderChat(_ prompt: ChatPrompt) throws(EngineError) -> String {
    throw EngineError(.unsupported, "fake-embedding has no chat template.")
  }

  public func statistics() -> ServiceStatistics { ServiceStatistics() }

  public func flushCache(timeout: Double) async -> Bool { true }

  public func drain() async {}
}
