import ApusCore
import ApusEngine
import ApusScheduling
import ApusTesting
import Foundation
import Synchronization
import Testing

/// A value that several tasks change.
private final class Shared<Value: Sendable>: Sendable {
  private let value: Mutex<Value>

  init(_ value: Value) { self.value = Mutex(value) }

  func withLock<Result: Sendable>(_ body: (inout Value) -> Result) -> Result {
    value.withLock { body(&$0) }
  }
}

/// Streams between a thread that publishes events as the engine's does and tasks that read, drop and cancel.
@Suite struct StreamDeliveryTests {
  /// What happens to one stream.
  private struct Plan {
    enum Reading { case whole, dropped(afterChunks: Int), cancelled(afterMicroseconds: UInt32) }
    enum End { case finished, rejected }
    var count: Int
    var end: End
    var reading: Reading
    /// The reader does something else after one in this many chunks.
    var pause: Int
  }

  private enum Outcome: Sendable, Equatable {
    case read([TokenID], ends: Int)
    case failed(EngineError.Code, after: [TokenID])
    case gone
  }

  /// `FUZZ_SEED` repeats a run.
  private static let seed =
    ProcessInfo.processInfo.environment["FUZZ_SEED"].flatMap { UInt64($0) } ?? UInt64.random(in: 0...UInt64.max)

  /// Readers are at every point between looking and waiting when something arrives: whoever reads to the end gets every
  /// token once, in order, and one end; whoever goes is reported once; and nobody waits for ever.
  @Test(.timeLimit(.minutes(1))) func noWakeUpIsLost() async throws {
    let tokenizer = try PlaceholderTokenizer.make(vocabularySize: 300)
    for round in UInt64(0)..<24 {
      let seed = Self.seed &+ round
      var random = SeededGenerator(seed: seed)
      let plans = (0..<48).map { index in
        let reading: Plan.Reading =
          switch Int.random(in: 0..<10, using: &random) {
          case 0: .dropped(afterChunks: Int.random(in: 0..<4, using: &random))
          case 1: .cancelled(afterMicroseconds: UInt32.random(in: 0..<2000, using: &random))
          default: .whole
          }
        return Plan(
          count: Int.random(in: 0..<120, using: &random), end: index % 9 == 4 ? .rejected : .finished,
          reading: reading, pause: Int.random(in: 1..<12, using: &random))
      }
      let problems = try await run(
        plans, tokenizer: { try OutputAssembler(tokenizer: tokenizer, sampling: .greedy) }, seed)
      for problem in problems { Issue.record("FUZZ_SEED=\(seed): \(problem)") }
      if !problems.isEmpty { return }
    }
  }

  private func run(
    _ plans: [Plan], tokenizer makeAssembler: () throws -> OutputAssembler, _ seed: UInt64
  ) async throws -> [String] {
    let state = EngineState()
    let delivery = StreamDelivery()
    let gone = Shared<[UInt64]>([])
    for (index, _) in plans.enumerated() {
      let handle = UInt64(index) + 1
      let stream = RequestStream(id: RequestID("\(index)"), promptCount: 1, assembler: try makeAssembler()) { signal in
        if case .abandoned = signal { gone.withLock { $0.append(handle) } }
      }
      state.table.withLock { $0.streams[handle] = stream }
    }
    let streams = state.table.withLock { table in plans.indices.map { table.streams[UInt64($0) + 1]! } }
    let isDelivered = DispatchSemaphore(value: 0)
    Thread.detachNewThread {
      delivery.run()
      isDelivered.signal()
    }
    Thread.detachNewThread { publish(plans, EventRouter(state: state, delivery: delivery), delivery, seed) }

    let outcomes = Shared([Outcome?](repeating: nil, count: plans.count))
    let tasks = plans.indices.map { index in
      let (plan, stream) = (plans[index], GenerationStream(id: RequestID("\(index)"), source: streams[index]))
      let task = Task {
        let outcome = await read(stream, plan)
        outcomes.withLock { $0[index] = outcome }
      }
      if case .cancelled(let delay) = plan.reading {
        Task.detached {
          try? await Task.sleep(for: .microseconds(delay))
          task.cancel()
        }
      }
      return task
    }
    // A reader that waits for ever is found by patience alone; cancelling it lets the test end.
    let watch = Task {
      try await Task.sleep(for: .seconds(15))
      let waiting = outcomes.withLock { outcomes in plans.indices.filter { outcomes[$0] == nil } }
      for task in tasks { task.cancel() }
      return waiting
    }
    for task in tasks { await task.value }
    watch.cancel()
    if let waiting = try? await watch.value, !waiting.isEmpty { return ["readers \(waiting) were not woken"] }
    var problems: [String] = []
    if !isSignalled(isDelivered) { problems.append("the delivery did not end") }
    let abandoned = gone.withLock { $0 }
    if Set(abandoned).count != abandoned.count { problems.append("a reader was reported gone twice: \(abandoned)") }
    for (index, plan) in plans.enumerated() {
      let tokens = (0..<plan.count).map { TokenID($0 % 256) }
      let outcome = outcomes.withLock { $0[index] }
      let isGone = abandoned.contains(UInt64(index) + 1)
      switch (plan.reading, plan.end) {
      case (.whole, .finished):
        if outcome != .read(tokens, ends: 1) || isGone {
          problems.append("reader \(index) got \(String(describing: outcome)), gone: \(isGone)")
        }
      case (.whole, .rejected):
        if outcome != .failed(.queueFull, after: tokens) || isGone {
          problems.append("reader \(index) got \(String(describing: outcome)) for a failure")
        }
      case (.dropped, _), (.cancelled, _):
        // It may have come to the end before; otherwise it is reported, if the stream had not ended by then.
        if case .read(let read, ends: let ends)? = outcome, read != tokens || ends != 1 {
          problems.append("reader \(index) ended early with \(read.count) tokens")
        }
      }
    }
    return problems
  }

  private func isSignalled(_ semaphore: DispatchSemaphore) -> Bool {
    semaphore.wait(timeout: .now() + 15) == .success
  }

  private func read(_ stream: GenerationStream, _ plan: Plan) async -> Outcome {
    var tokens: [TokenID] = []
    var (chunks, ends) = (0, 0)
    do throws(EngineError) {
      let iterator = stream.makeAsyncIterator()
      while true {
        if case .dropped(let count) = plan.reading, chunks == count { return .gone }
        guard let chunk = try await iterator.next(isolation: nil) else { return .read(tokens, ends: ends) }
        tokens += chunk.tokens
        chunks += 1
        if chunk.usage.completionTokens != tokens.count { return .gone }
        if chunk.finishReason != nil { ends += 1 }
        if chunks % plan.pause == 0 { await Task.yield() }
      }
    } catch {
      return error.code == .aborted ? .gone : .failed(error.code, after: tokens)
    }
  }

  /// Steps as the engine's thread takes them: some streams get tokens, some end; then a pause, or none.
  private func publish(_ plans: [Plan], _ router: EventRouter, _ delivery: StreamDelivery, _ seed: UInt64) {
    var router = router
    var random = SeededGenerator(seed: ~seed)
    var given = [Int](repeating: 0, count: plans.count)
    var live = Array(plans.indices)
    while !live.isEmpty {
      var events: [Event] = []
      for index in live where Bool.random(using: &random) {
        let handle = UInt64(index) + 1
        let plan = plans[index]
        if given[index] == 0 { events.append(.started(handle: handle, cachedTokens: 0, promptLogprobs: nil)) }
        let count = min(plan.count - given[index], Int.random(in: 1...3, using: &random))
        for _ in 0..<count {
          events.append(.token(handle: handle, token: TokenID(given[index] % 256), logprobs: nil))
          given[index] += 1
        }
        // The end comes with the last token or in a step of its own.
        guard given[index] == plan.count, Bool.random(using: &random) else { continue }
        switch plan.end {
        case .finished: events.append(.finished(handle: handle, .length, retractions: 0, speculation: nil))
        case .rejected: events.append(.rejected(handle: handle, EngineError(.queueFull, "enough")))
        }
        live.removeAll { $0 == index }
      }
      if !events.isEmpty { router.publish(events) }
      switch Int.random(in: 0..<8, using: &random) {
      case 0: usleep(UInt32.random(in: 1..<60, using: &random))
      case 1: sched_yield()
      default: break
      }
    }
    delivery.close()
  }

  /// Whoever was handed over before the end is resumed, also when the thread starts late.
  @Test(.timeLimit(.minutes(1))) func readersHandedOverBeforeTheEndAreResumed() async {
    let delivery = StreamDelivery()
    let waiting = Shared<[StreamDelivery.Reader]>([])
    await withTaskGroup(of: Void.self) { group in
      for _ in 0..<20 {
        group.addTask { await withCheckedContinuation { reader in waiting.withLock { $0.append(reader) } } }
      }
      while waiting.withLock({ $0.count }) < 20 { await Task.yield() }
      var (first, second) = waiting.withLock { (Array($0[..<7]), Array($0[7...])) }
      delivery.resume(&first)
      delivery.resume(&second)
      #expect(first.isEmpty && second.isEmpty)
      delivery.close()
      Thread.detachNewThread { delivery.run() }
    }
  }
}
