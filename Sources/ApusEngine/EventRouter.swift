package import ApusCore
package import ApusScheduling
package import Synchronization

/// What the engine's thread and its callers share: the streams of requests in flight, and the latest counts.
package final class EngineState: Sendable {
  /// Guarded by `table`.
  package struct Table: ~Copyable {
    /// By the number that the scheduler knows.
    package var streams: [UInt64: RequestStream] = [:]
    /// The number of a request by its name.
    var handles: [RequestID: UInt64] = [:]
    /// Requests refused before they reached the scheduler.
    var refusedCount = 0
    var nextHandle: UInt64 = 1
    var isDraining = false
    var isStopped = false
    /// Who waits for an answer to a flush or a drain, by reply number.
    var replies: [UInt64: CheckedContinuation<Bool, Never>] = [:]
  }

  package let table = Mutex(Table())
  let statistics = Mutex(ServiceStatistics())

  package init() {}
}

/// Gives the scheduler's events to the streams they belong to. Runs on the engine's thread.
package struct EventRouter: EventSink {
  private let state: EngineState
  private let delivery: StreamDelivery
  /// Streams that got something in this call: their readers are handed over once each at the end.
  private var touched: [RequestStream] = []
  private var readers: [StreamDelivery.Reader] = []
  /// The stream of the last event: a step's events of one request follow each other.
  private var lastHandle: UInt64 = 0
  private var lastStream: RequestStream?

  package init(state: EngineState, delivery: StreamDelivery) {
    self.state = state
    self.delivery = delivery
  }

  package mutating func publish(_ events: [Event]) {
    for event in events {
      switch event {
      case .started(let handle, let cachedTokens, let promptLogprobs):
        stream(handle)?.start(cachedTokens: cachedTokens, promptLogprobs: promptLogprobs)
      case .token(let handle, let token, let logprobs):
        stream(handle)?.deliver(token, logprobs: logprobs)
      case .finished(let handle, let reason, let retractions, let speculation):
        stream(handle)?.finish(reason, retractions: retractions, speculation: speculation)
        forget(handle)
      case .rejected(let handle, let error):
        stream(handle)?.fail(error)
        forget(handle)
      case .flushed(let reply, let isDone): answer(reply, isDone)
      case .drained(let reply): answer(reply, true)
      }
    }
    for stream in touched {
      if let reader = stream.takeReader() { readers.append(reader) }
    }
    delivery.resume(&readers)
    touched.removeAll(keepingCapacity: true)
    lastStream = nil
    lastHandle = 0
  }

  package mutating func report(_ statistics: ServiceStatistics) {
    state.statistics.withLock { $0 = statistics }
  }

  private mutating func stream(_ handle: UInt64) -> RequestStream? {
    if handle == lastHandle { return lastStream }
    lastHandle = handle
    lastStream = state.table.withLock { $0.streams[handle] }
    if let lastStream { touched.append(lastStream) }
    return lastStream
  }

  private func forget(_ handle: UInt64) {
    state.table.withLock { table in
      if let stream = table.streams.removeValue(forKey: handle), table.handles[stream.id] == handle {
        table.handles.removeValue(forKey: stream.id)
      }
    }
  }

  private func answer(_ reply: UInt64, _ result: Bool) {
    state.table.withLock { $0.replies.removeValue(forKey: reply) }?.resume(returning: result)
  }
}
