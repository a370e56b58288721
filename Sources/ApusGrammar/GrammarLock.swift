import Synchronization

/// A lock for state that a class keeps beside it.
final class GrammarLock: Sendable {
  private let mutex = Mutex(())

  @inline(__always)
  func withLock<Result, Failure: Error>(_ body: () throws(Failure) -> Result) throws(Failure) -> Result {
    try mutex.withLock { _ throws(Failure) in try UncheckedResult(value: body()) }.value
  }

  private struct UncheckedResult<Value>: @unchecked Sendable { var value: Value }
}
