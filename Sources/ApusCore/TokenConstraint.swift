/// What limits a request's tokens: a compiled grammar. Shared by any number of requests.
public protocol TokenConstraint: AnyObject, Sendable {
  /// Follows one request from its first output token.
  func makeTokenMatcher() -> any TokenMatcher
  /// What the matchers use by turns: while one computes a mask, whoever asks another one with the same object for anything
  /// waits.
  var exclusion: AnyObject { get }
}

extension TokenConstraint {
  /// Matchers of one constraint take turns, those of different ones do not.
  public var exclusion: AnyObject { self }
}

/// Follows the outputs of one request and says which token may come next. One thread at a time uses it.
public protocol TokenMatcher: AnyObject {
  /// Words of a mask: one bit for each token id of the vocabulary.
  var maskWordCount: Int { get }
  /// Whether the text has been ended by an end token.
  var isTerminated: Bool { get }
  /// Whether any token may come next, so that no mask is needed.
  var allowsEverything: Bool { get }
  /// Why nothing can follow, if a limit was reached.
  var failure: EngineError? { get }
  /// Writes which tokens may come next: bit `id % 32` of word `id / 32`.
  func fillMask(into mask: UnsafeMutablePointer<UInt32>)
  /// The same within a bound, for those who cannot be kept waiting.
  /// - Parameter work: steps that the search through the vocabulary may take.
  /// - Returns: false, with a mask that says nothing, if more are needed. Nothing else changes then.
  func fillMask(into mask: UnsafeMutablePointer<UInt32>, work: Int) -> Bool
  /// Takes the next token; false, and nothing changes, if it is not allowed.
  func accept(_ token: TokenID) -> Bool
  /// Takes the tokens that have to come next and gives them: where the constraint leaves one continuation, no forward
  /// pass is needed to find it. Empty where there is a choice.
  func takeForcedTokens() -> [TokenID]
  /// A matcher in the same place, which goes its own way from here, so that tokens can be tried; `nil` if there is none to
  /// be had.
  func fork() -> (any TokenMatcher)?
}

extension TokenMatcher {
  /// A matcher whose masks all cost little.
  public func fillMask(into mask: UnsafeMutablePointer<UInt32>, work: Int) -> Bool {
    fillMask(into: mask)
    return true
  }

  /// After the end of its text a constraint says nothing more.
  public var allowsEverything: Bool { isTerminated }

  /// A matcher that knows of no text forces none.
  public func takeForcedTokens() -> [TokenID] { [] }

  /// A matcher that cannot be copied.
  public func fork() -> (any TokenMatcher)? { nil }
}
