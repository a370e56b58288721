import ApusCore
import Synchronization

/// The generations in flight by name, so that operators can abort them by prefix and names stay unique.
final class ActiveGenerations: Sendable {
  private let ids = Mutex<Set<RequestID>>([])

  /// Enters names.
  ///
  /// - Throws: `invalidRequest` if one of them is in flight already; then none is entered.
  func insert(_ new: [RequestID]) throws(EngineError) {
    let clash: RequestID? = ids.withLock { ids in
      if let clash = new.first(where: ids.contains) { return clash }
      ids.formUnion(new)
      return nil
    }
    if let clash {
      throw EngineError(
        .invalidRequest, "A request named \(clash.rawValue.debugDescription) is in flight already.", parameter: "rid")
    }
  }

  func remove(_ old: [RequestID]) { ids.withLock { $0.subtract(old) } }

  /// The names that begin with a text.
  func matching(prefix: String) -> [RequestID] { ids.withLock { $0.filter { $0.rawValue.hasPrefix(prefix) } } }

  var count: Int { ids.withLock { $0.count } }
}

/// The generations of one HTTP request, which live and die together.
///
/// Whatever happens to the HTTP request (the client goes, a write fails, a sample fails, the response's body is never
/// asked for), the generations that have not ended are aborted when the group is finished or let go.
final class GenerationGroup: Sendable {
  /// The generations, in the order submitted.
  let streams: [GenerationStream]
  private let service: any GenerationService
  private let active: ActiveGenerations
  private let metrics: ServerMetrics
  private let connection: ConnectionMonitor?
  private let closeKey: Int
  private let unfinished: Unfinished
  private let started = ContinuousClock.now

  /// The generations of a group that have not ended. Shared with the connection's monitor, which must not keep the group.
  private final class Unfinished: Sendable {
    private let ids: Mutex<Set<RequestID>>
    init(_ ids: [RequestID]) { self.ids = Mutex(Set(ids)) }
    func remove(_ id: RequestID) { ids.withLock { _ = $0.remove(id) } }
    func abort(in service: any GenerationService) {
      for id in ids.withLock({ $0 }) { service.abort(id) }
    }
    func takeAll() -> Set<RequestID> {
      ids.withLock { ids in
        defer { ids = [] }
        return ids
      }
    }
  }

  /// Submits requests; if one is refused, those before it are aborted.
  ///
  /// - Throws: what the service throws, and `invalidRequest` for a name that is in flight.
  init(
    _ requests: [ApusCore.Request], service: any GenerationService, active: ActiveGenerations,
    metrics: ServerMetrics, connection: ConnectionMonitor?
  ) throws(EngineError) {
    let ids = requests.map(\.id)
    try active.insert(ids)
    var streams: [GenerationStream] = []
    streams.reserveCapacity(requests.count)
    do throws(EngineError) {
      for request in requests { streams.append(try service.generate(request)) }
    } catch {
      for stream in streams { service.abort(stream.id) }
      active.remove(ids)
      throw error
    }
    let unfinished = Unfinished(ids)
    self.streams = streams
    self.service = service
    self.active = active
    self.metrics = metrics
    self.connection = connection
    self.unfinished = unfinished
    closeKey = connection?.onClose { unfinished.abort(in: service) } ?? 0
    metrics.requestsStarted(requests.count)
  }

  deinit { finish() }

  /// Seconds since the group was submitted.
  var elapsed: Double { seconds(ContinuousClock.now - started) }

  /// Aborts what has not ended and frees the names. May be called more than once.
  func finish() {
    connection?.remove(closeKey)
    for id in unfinished.takeAll() { service.abort(id) }
    active.remove(streams.map(\.id))
  }

  /// Reads all generations to their ends, giving each chunk with its generation's index to `body` as it arrives.
  ///
  /// While `body` waits for a slow client nothing is read, and the streams merge what arrives meanwhile.
  ///
  /// - Throws: the first error of a generation, or what `body` throws; the other generations are aborted.
  func forEachChunk(_ body: (Int, GenerationChunk) async throws -> Void) async throws {
    defer { finish() }
    if streams.count == 1 {
      var clock = metrics.startClock()
      let iterator = streams[0].makeAsyncIterator()
      while let chunk = try await iterator.next(isolation: nil) {
        metrics.observe(chunk, &clock)
        if chunk.finishReason != nil { unfinished.remove(streams[0].id) }
        try await body(0, chunk)
        if chunk.finishReason != nil { return }
      }
      throw endedWithoutReason()
    }
    // One task per generation waits for its next chunk; the loop hands chunks on one after another, so that there is
    // never more than one unread chunk per generation outside its stream.
    var clocks = streams.map { _ in metrics.startClock() }
    try await withThrowingTaskGroup(of: (Int, GenerationChunk?).self) { group in
      let readers = streams.map { ChunkReader($0.makeAsyncIterator()) }
      for (index, reader) in readers.enumerated() { group.addTask { (index, try await reader.next()) } }
      while let (index, chunk) = try await group.next() {
        guard let chunk else { throw endedWithoutReason() }
        metrics.observe(chunk, &clocks[index])
        if chunk.finishReason != nil {
          unfinished.remove(streams[index].id)
        } else {
          let reader = readers[index]
          group.addTask { (index, try await reader.next()) }
        }
        try await body(index, chunk)
      }
    }
  }

  /// Reads all generations to their ends.
  func results() async throws(EngineError) -> [GenerationResult] {
    var results = [GenerationResult](repeating: GenerationResult(), count: streams.count)
    do {
      try await forEachChunk { index, chunk in results[index].append(chunk) }
    } catch let error as EngineError {
      throw error
    } catch {
      throw EngineError(.aborted, "The request was cancelled.")
    }
    return results
  }

  private func endedWithoutReason() -> EngineError {
    EngineError(.internalFailure, "The engine ended the request without saying why.")
  }
}

/// Carries a stream's iterator into the tasks that wait for its chunks.
///
/// Unchecked because the iterator is no `Sendable` class; sound because a new task is added only after the one before it
/// has delivered its chunk, so no two tasks ever use the iterator at once.
private struct ChunkReader: @unchecked Sendable {
  private let iterator: GenerationStream.Iterator
  init(_ iterator: GenerationStream.Iterator) { self.iterator = iterator }
  func next() async throws(EngineError) -> GenerationChunk? { try await iterator.next(isolation: nil) }
}

/// A duration in seconds.
func seconds(_ duration: Duration) -> Double {
  let (seconds, attoseconds) = duration.components
  return Double(seconds) + Double(attoseconds) * 1e-18
}
