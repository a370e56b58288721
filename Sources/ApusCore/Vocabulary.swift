/// A token of a model's vocabulary. Signed, 32 bits, as every tokenizer format and kernel spells it.
public typealias TokenID = Int32

/// The name by which clients and logs know one request. Unique among the requests in flight.
public struct RequestID: Hashable, Sendable, CustomStringConvertible, ExpressibleByStringLiteral {
  /// The text of the name, as a client gave it or as `RequestID.unique()` made it.
  public var rawValue: String

  /// Names a request with the client's own text.
  public init(_ rawValue: String) { self.rawValue = rawValue }

  /// Names a request with a literal.
  public init(stringLiteral value: String) { self.rawValue = value }

  /// A fresh name: 128 random bits in hexadecimal.
  public static func unique() -> RequestID {
    var generator = SystemRandomNumberGenerator()
    return RequestID(hexadecimal(generator.next()) + hexadecimal(generator.next()))
  }

  public var description: String { rawValue }
}

/// Sixteen lower-case hexadecimal digits of a 64-bit number.
public func hexadecimal(_ value: UInt64) -> String {
  let digits = String(value, radix: 16)
  return String(repeating: "0", count: 16 - digits.count) + digits
}

/// Why a generation ended.
public enum FinishReason: Sendable, Equatable {
  /// What a stop condition matched.
  public enum Match: Sendable, Equatable {
    /// A stop token, the end-of-sequence token among them.
    case token(TokenID)
    /// A stop string or the text that a stop regex matched.
    case text(String)
  }

  /// A stop condition was met.
  case stop(Match?)
  /// `maxNewTokens` or the context length was reached.
  case length
  /// The request was aborted by its client, by an operator or by a failure; the text says which.
  case abort(String)
}

/// How a request's tokens add up.
public struct Usage: Sendable, Equatable {
  /// Tokens of the prompt.
  public var promptTokens: Int
  /// Tokens generated so far.
  public var completionTokens: Int
  /// Tokens of the prompt whose K/V came from the prefix cache.
  public var cachedTokens: Int
  /// How often the request was retracted to make room for others.
  public var retractions: Int
  /// What speculative decoding brought the request; `nil` where the service does not speculate.
  public var speculation: SpeculationCounts?

  /// Makes a count; everything starts at zero.
  public init(
    promptTokens: Int = 0, completionTokens: Int = 0, cachedTokens: Int = 0, retractions: Int = 0,
    speculation: SpeculationCounts? = nil
  ) {
    self.promptTokens = promptTokens
    self.completionTokens = completionTokens
    self.cachedTokens = cachedTokens
    self.retractions = retractions
    self.speculation = speculation
  }
}

/// How draft tokens fared.
public struct SpeculationCounts: Sendable, Equatable {
  /// Forward passes that verified draft tokens.
  public var verifications: Int
  /// Draft tokens verified, and how many of them were accepted.
  public var draftTokens: Int
  public var acceptedTokens: Int

  /// Makes counts.
  public init(verifications: Int = 0, draftTokens: Int = 0, acceptedTokens: Int = 0) {
    self.verifications = verifications
    self.draftTokens = draftTokens
    self.acceptedTokens = acceptedTokens
  }

  /// The share of draft tokens that were accepted; 0 before the first.
  public var acceptRate: Double { draftTokens == 0 ? 0 : Double(acceptedTokens) / Double(draftTokens) }

  /// Tokens that a verification brings on average: the accepted drafts and one more; 0 before the first.
  public var acceptLength: Double {
    verifications == 0 ? 0 : Double(acceptedTokens + verifications) / Double(verifications)
  }

  /// Adds up counts.
  public static func + (left: SpeculationCounts, right: SpeculationCounts) -> SpeculationCounts {
    SpeculationCounts(
      verifications: left.verifications + right.verifications, draftTokens: left.draftTokens + right.draftTokens,
      acceptedTokens: left.acceptedTokens + right.acceptedTokens)
  }
}
