/// The one error type that crosses the engine's boundary.
///
/// A `Code` says what kind of mistake it was (servers map it to a status), `message` says in one sentence what was
/// wrong and what to do, and `parameter` names the request field at fault where there is one.
public struct EngineError: Error, Sendable, Equatable, CustomStringConvertible {
  /// The kind of an error. A struct over a private enum, so that a new kind breaks no caller's `switch`.
  public struct Code: Sendable, Hashable, CustomStringConvertible {
    private enum Kind: String {
      case invalidRequest, promptTooLong, modelNotFound, notFound, unauthorized, forbidden, queueFull, shuttingDown,
        aborted, unsupported, invalidCheckpoint, outOfMemory, timeout, internalFailure
    }
    private var kind: Kind
    private init(_ kind: Kind) { self.kind = kind }

    /// A field has a wrong type or an impossible value.
    public static let invalidRequest = Code(.invalidRequest)
    /// The prompt, or the prompt with its requested output, does not fit the model's context.
    public static let promptTooLong = Code(.promptTooLong)
    /// The request names a model that is not served here.
    public static let modelNotFound = Code(.modelNotFound)
    /// The thing named does not exist.
    public static let notFound = Code(.notFound)
    /// A key is missing or wrong.
    public static let unauthorized = Code(.unauthorized)
    /// The caller may not do this.
    public static let forbidden = Code(.forbidden)
    /// The waiting queue is full; try again later.
    public static let queueFull = Code(.queueFull)
    /// The engine is draining or stopped.
    public static let shuttingDown = Code(.shuttingDown)
    /// The request was aborted.
    public static let aborted = Code(.aborted)
    /// Something valid that this build, model or configuration cannot do.
    public static let unsupported = Code(.unsupported)
    /// A model file is missing, broken or of an unknown kind.
    public static let invalidCheckpoint = Code(.invalidCheckpoint)
    /// Memory for weights, cache or a request could not be had.
    public static let outOfMemory = Code(.outOfMemory)
    /// A limit on time was reached.
    public static let timeout = Code(.timeout)
    /// A failure of the engine itself.
    public static let internalFailure = Code(.internalFailure)

    public var description: String { kind.rawValue }
  }

  /// The kind of the error.
  public var code: Code
  /// One sentence for people.
  public var message: String
  /// The request field at fault, in the spelling of the API that carried it.
  public var parameter: String?

  /// Makes an error.
  public init(_ code: Code, _ message: String, parameter: String? = nil) {
    self.code = code
    self.message = message
    self.parameter = parameter
  }

  public var description: String { message }
}
