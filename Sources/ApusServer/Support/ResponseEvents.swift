import ApusCore
import Synchronization

/// The events of responses in the background, which their clients may read, and read again, from any of them on.
///
/// All logs together are bounded. Where they are full those of the responses that ended first are forgotten, and after
/// them the oldest events of those that are still being made.
final class ResponseEvents: Sendable {
  private struct Log {
    /// Events not forgotten, each as the bytes of a server-sent event. The place of an event among all is its sequence
    /// number.
    var events: [[UInt8]] = []
    /// How many events have been forgotten.
    var forgotten = 0
    var bytes = 0
    var isFinished = false
    var waiters: [CheckedContinuation<Void, Never>] = []

    /// The number of the next event.
    var end: Int { forgotten + events.count }
  }

  private struct State {
    var logs: [String: Log] = [:]
    /// The finished logs, oldest first.
    var finished: [String] = []
    var bytes = 0
  }

  private let limit: Int
  private let state = Mutex(State())

  /// Makes an empty collection.
  ///
  /// - Parameter limit: the most bytes of all events together.
  init(limit: Int = 64 << 20) { self.limit = limit }

  /// Begins a response's log.
  func open(_ id: String) { state.withLock { $0.logs[id] = Log() } }

  /// Adds events to a response's log.
  func append(_ events: [[UInt8]], to id: String) {
    if events.isEmpty { return }
    let waiters = state.withLock { state -> [CheckedContinuation<Void, Never>] in
      guard var log = state.logs.removeValue(forKey: id) else { return [] }
      let size = events.reduce(0) { $0 + $1.count }
      log.events += events
      log.bytes += size
      state.bytes += size
      while state.bytes > limit, let oldest = state.finished.first {
        state.finished.removeFirst()
        state.bytes -= state.logs.removeValue(forKey: oldest)?.bytes ?? 0
      }
      if state.bytes > limit, log.events.count > 1 {
        // Half of them at once, so that the cost is spread.
        let dropped = log.events.prefix(log.events.count / 2)
        let size = dropped.reduce(0) { $0 + $1.count }
        log.forgotten += dropped.count
        log.bytes -= size
        state.bytes -= size
        log.events.removeFirst(dropped.count)
      }
      let waiters = log.waiters
      log.waiters = []
      state.logs[id] = log
      return waiters
    }
    for waiter in waiters { waiter.resume() }
  }

  /// Ends a response's log, which is kept as long as there is room.
  func finish(_ id: String) {
    let waiters = state.withLock { state -> [CheckedContinuation<Void, Never>] in
      guard let log = state.logs[id], !log.isFinished else { return [] }
      state.logs[id]!.isFinished = true
      state.logs[id]!.waiters = []
      state.finished.append(id)
      return log.waiters
    }
    for waiter in waiters { waiter.resume() }
  }

  /// Forgets a response's log.
  func remove(_ id: String) {
    let waiters = state.withLock { state -> [CheckedContinuation<Void, Never>] in
      guard let log = state.logs.removeValue(forKey: id) else { return [] }
      state.bytes -= log.bytes
      state.finished.removeAll { $0 == id }
      return log.waiters
    }
    for waiter in waiters { waiter.resume() }
  }

  /// Checks that a response's events can be read from a number on.
  ///
  /// - Throws: `invalidRequest` where the log, or that part of it, is not kept.
  func check(_ id: String, from number: Int) throws(EngineError) {
    let known = state.withLock { state in state.logs[id].map { ($0.forgotten, $0.end) } }
    guard let (first, end) = known else {
      throw EngineError(
        .invalidRequest,
        "The events of \(id) are not kept: only a response in the background that was created with stream can be "
          + "streamed, and for a while. Leave stream out.", parameter: "stream")
    }
    if number < first || number > end {
      throw EngineError(
        .invalidRequest, "starting_after must be in \(first - 1)...\(end - 1), the events that are kept.",
        parameter: "starting_after")
    }
  }

  /// Waits for events of a response.
  ///
  /// - Parameter number: the number of the first event wanted.
  /// - Returns: the events from there on, at least one, joined, and the number of the one after them; `nil` after the last
  ///   event, and where the wanted one has been forgotten.
  func next(_ id: String, from number: Int) async -> (bytes: [UInt8], next: Int)? {
    while true {
      enum Found {
        case events([UInt8], Int)
        case end
        case wait
      }
      let found = state.withLock { state -> Found in
        guard let log = state.logs[id], number >= log.forgotten else { return .end }
        if number < log.end { return .events(Array(log.events[(number - log.forgotten)...].joined()), log.end) }
        return log.isFinished ? .end : .wait
      }
      switch found {
      case .events(let bytes, let next): return (bytes, next)
      case .end: return nil
      case .wait:
        await withCheckedContinuation { continuation in
          let isReady = state.withLock { state in
            guard let log = state.logs[id], log.end <= number, !log.isFinished else { return true }
            state.logs[id]!.waiters.append(continuation)
            return false
          }
          if isReady { continuation.resume() }
        }
      }
    }
  }
}
