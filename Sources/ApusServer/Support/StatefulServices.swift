import ApusCore
import Synchronization

/// What the stateful endpoints share: the store and the work that goes on without a client.
final class StatefulServices: Sendable {
  let store: any ResponseStore
  let background = BackgroundResponses()
  let events = ResponseEvents()
  let batches: BatchRunner

  init(_ store: any ResponseStore, batchConcurrency: Int) {
    self.store = store
    batches = BatchRunner(store, concurrency: batchConcurrency)
  }
}

/// The responses that are being made in the background.
final class BackgroundResponses: Sendable {
  private struct Entry {
    var abort: @Sendable () -> Void
    var task: Task<Void, Never>?
    var isCancelled = false
  }

  private let entries = Mutex<[String: Entry]>([:])

  /// Makes a response.
  ///
  /// - Parameters:
  ///   - abort: makes `body` end soon.
  ///   - body: makes the response to its end, and asks `isCancelled` then.
  func start(_ id: String, abort: @escaping @Sendable () -> Void, _ body: @escaping @Sendable () async -> Void) {
    // The entry is there before the task can end and remove it.
    entries.withLock { $0[id] = Entry(abort: abort) }
    let task = Task {
      await body()
      self.entries.withLock { _ = $0.removeValue(forKey: id) }
    }
    entries.withLock { $0[id]?.task = task }
  }

  /// Whether a response is being made.
  func contains(_ id: String) -> Bool { entries.withLock { $0[id] != nil } }

  /// Whether a response's client has cancelled it.
  func isCancelled(_ id: String) -> Bool { entries.withLock { $0[id]?.isCancelled ?? false } }

  /// Cancels a response and returns when it has ended. Returns whether it was being made.
  func cancel(_ id: String) async -> Bool {
    let entry = entries.withLock { entries in
      entries[id]?.isCancelled = true
      return entries[id]
    }
    guard let entry else { return false }
    entry.abort()
    await entry.task?.value
    return true
  }

  /// Returns when all have ended.
  func wait() async {
    while let task = entries.withLock({ $0.values.lazy.compactMap(\.task).first }) {
      await task.value
      await Task.yield()
    }
  }
}
