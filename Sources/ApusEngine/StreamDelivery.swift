import CLinux
import Synchronization

/// Resumes the tasks that read streams, on a thread of its own (`apus-deliver`).
///
/// Resuming a task costs an allocation and often a system call. The engine's thread does none of it: after a step it
/// hands over the readers of all streams that have something new, and rings once, whatever their number. Where this
/// thread is still at work the ring is not even a system call.
///
/// Bounded by the streams in flight, since each has one reader, which is handed over at most once until it waits again.
package final class StreamDelivery: @unchecked Sendable {
  // Unchecked: the bell is safe to use from any thread, everything else is behind the lock.

  package typealias Reader = CheckedContinuation<Void, Never>

  private struct Queue: ~Copyable {
    var readers: [Reader] = []
    var isClosed = false
  }

  private let queue = Mutex(Queue())
  private let bell: OpaquePointer

  package init() {
    guard let bell = apus_doorbell_create() else { fatalError("There is no memory for a bell of a few bytes.") }
    self.bell = bell
  }

  deinit { apus_doorbell_free(bell) }

  /// Hands readers over, in order. One thread at a time, never after `close`.
  /// - Parameter readers: comes back empty, with memory for the next ones, so that nothing is allocated once the arrays
  ///   that go round are large enough.
  package func resume(_ readers: inout [Reader]) {
    if readers.isEmpty { return }
    queue.withLock { queue in
      precondition(!queue.isClosed, "Readers are handed over before the delivery ends.")
      if queue.readers.isEmpty {
        swap(&queue.readers, &readers)
      } else {
        queue.readers.append(contentsOf: readers)
        readers.removeAll(keepingCapacity: true)
      }
    }
    apus_doorbell_ring(bell)
  }

  /// Lets `run` return once everybody is resumed who was handed over.
  package func close() {
    queue.withLock { $0.isClosed = true }
    apus_doorbell_ring(bell)
  }

  /// Resumes readers until `close` was called.
  package func run() {
    var readers: [Reader] = []
    while true {
      let isLast = queue.withLock { queue in
        swap(&queue.readers, &readers)
        return queue.isClosed
      }
      for reader in readers { reader.resume() }
      // Nobody is handed over after the end, so what was taken with it was the last.
      if isLast { return }
      if readers.isEmpty { _ = apus_doorbell_wait(bell, -1) }
      readers.removeAll(keepingCapacity: true)
    }
  }
}
