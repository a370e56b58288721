/// What a server needs of a model that turns texts into vectors or judges pairs of texts.
///
/// A `GenerationService` offers one through `embeddings`. Texts become tokens through the generation service's own
/// `encode`, pairs through `encodePair`.
public protocol EmbeddingService: Sendable {
  /// What the model gives. Constant for the life of the service.
  var information: EmbeddingInformation { get }

  /// The tokens of a pair of texts, as the model takes them: with separators, and with the place where the second text
  /// begins.
  func encodePair(_ first: String, _ second: String) throws(EngineError) -> EmbeddingInput

  /// Computes one vector for each input, in their order. A vector does not depend on the other inputs, nor on what else
  /// the service computes at the time.
  ///
  /// - Returns: vectors of `dimensions` numbers, of length 1 if the model normalises; for a classifier, vectors of
  ///   `labelCount` raw outputs.
  /// - Throws: `invalidRequest` for an empty input or an impossible token, `promptTooLong`, `queueFull` (nothing was
  ///   queued), `shuttingDown`.
  func embed(_ inputs: [EmbeddingInput]) async throws(EngineError) -> [[Float]]
}

/// One sequence to be embedded.
public struct EmbeddingInput: Sendable, Equatable {
  /// The tokens, special ones included.
  public var tokens: [TokenID]
  /// How many tokens belong to the first segment; the others have token type 1. `nil` if all do.
  public var firstSegmentCount: Int?

  /// Makes an input.
  public init(tokens: [TokenID], firstSegmentCount: Int? = nil) {
    self.tokens = tokens
    self.firstSegmentCount = firstSegmentCount
  }
}

/// What an embedding model gives.
public struct EmbeddingInformation: Sendable, Equatable {
  /// How the vectors of a sequence's tokens become one vector.
  public enum Pooling: String, Sendable, CaseIterable {
    /// The first token's vector.
    case cls
    /// The last token's vector.
    case last
    /// The mean of all tokens' vectors.
    case mean
  }

  /// Numbers in a vector.
  public var dimensions: Int
  /// How tokens become one vector.
  public var pooling: Pooling
  /// Whether vectors have length 1.
  public var isNormalized: Bool
  /// Outputs of a sequence classifier; `nil` for a model that gives vectors. A cross-encoder has one output: how well the
  /// second text of a pair answers the first, before the sigmoid.
  public var labelCount: Int?

  /// Makes a description.
  public init(dimensions: Int, pooling: Pooling, isNormalized: Bool, labelCount: Int? = nil) {
    self.dimensions = dimensions
    self.pooling = pooling
    self.isNormalized = isNormalized
    self.labelCount = labelCount
  }
}

extension GenerationService {
  public var embeddings: (any EmbeddingService)? { nil }
}

/// A vector's first numbers, brought back to length 1: for models whose leading numbers are an embedding of their own
/// (Kusupati et al.: Matryoshka representation learning, 2022).
///
/// - Precondition: `count` is from 1 to the vector's size.
/// - Returns: the vector itself if it has `count` numbers.
public func truncatedEmbedding(_ vector: [Float], to count: Int) -> [Float] {
  if count == vector.count { return vector }
  return normalizedEmbedding(Array(vector[..<count]))
}

/// A vector divided by its length; unchanged if that is zero. Sums run in double precision in the order of the numbers.
public func normalizedEmbedding(_ vector: [Float]) -> [Float] {
  var sum = 0.0
  for number in vector { sum += Double(number) * Double(number) }
  let length = sum.squareRoot()
  return length > 0 ? vector.map { Float(Double($0) / length) } : vector
}

/// The cosine of the angle between two vectors; 0 if one of them is zero.
/// - Precondition: both have equally many numbers.
public func cosineSimilarity(_ first: [Float], _ second: [Float]) -> Double {
  precondition(first.count == second.count)
  var (dot, left, right) = (0.0, 0.0, 0.0)
  for (a, b) in zip(first, second) {
    dot += Double(a) * Double(b)
    left += Double(a) * Double(a)
    right += Double(b) * Double(b)
  }
  let product = (left * right).squareRoot()
  return product > 0 ? dot / product : 0
}
