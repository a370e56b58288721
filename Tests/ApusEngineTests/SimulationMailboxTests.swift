import ApusCore
import ApusEngine
import ApusScheduling
import ApusTesting
import Glibc
import Synchronization
import Testing

@Suite struct SimulationMailboxTests {
  @Test func submissionsAreBoundedAndOtherCommandsAlwaysGetIn() {
    let mailbox = Mailbox(capacity: 2)
    var sampling = SamplingParameters()
    sampling.seed = 1
    func submission(_ handle: UInt64) -> Command {
      .submit(Submission(handle: handle, tokens: [1], sampling: sampling))
    }
    #expect(mailbox.post(submission(1)) == .accepted)
    #expect(mailbox.post(submission(2)) == .accepted)
    #expect(mailbox.post(submission(3)) == .full)
    #expect(mailbox.post(.abort(handle: 1, reason: "gone")) == .accepted)
    var commands: [Command] = []
    mailbox.drain(into: &commands, wait: false)
    #expect(commands.count == 3)
    #expect(mailbox.post(submission(4)) == .accepted)
    #expect(mailbox.close().count == 1)
    #expect(mailbox.post(submission(5)) == .closed)
    #expect(mailbox.post(.abort(handle: 1, reason: "gone")) == .closed)
  }

  /// The loop on a thread of its own, several threads that submit, and readers that wait for the answers: nothing is
  /// lost between posting and parking.
  @Test(arguments: [true, false])
  func aLoopOnItsOwnThreadAnswersEverySender(overlapped: Bool) async throws {
    let configuration = SchedulerConfiguration(pageCount: 64, contextLength: 200)
    let model = FakeModel(vocabularySize: 1000)
    let mailbox = Mailbox(capacity: 1000)
    let answers = Answers()
    let thread = Thread {
      guard let scheduler = try? Scheduler(configuration) else { return }
      var loop = EngineLoop(
        source: mailbox, sink: answers,
        runner: FakeExecutor(
          model: model, pageCount: configuration.pageCount, maxRunningRequests: configuration.maxRunningRequests),
        scheduler: scheduler)
      if overlapped { loop.run() } else { loop.runWithoutOverlap() }
      answers.violations = loop.runner.violations
    }
    await withTaskGroup(of: Void.self) { group in
      for sender in UInt64(0)..<4 {
        group.addTask {
          for index in UInt64(0)..<25 {
            var sampling = SamplingParameters()
            sampling.seed = index
            sampling.maxNewTokens = Int(index % 7) + 1
            let submission = Submission(
              handle: sender * 1000 + index, tokens: [TokenID(sender), TokenID(index)], sampling: sampling)
            #expect(mailbox.post(.submit(submission)) == .accepted)
            // Waiting for each answer lets the loop park again and again.
            let tokens = await answers.tokens(of: submission.handle)
            let reference = model.reference(submission, contextLength: 200, capacityTokens: 1024)
            #expect(tokens == reference.tokens)
          }
        }
      }
    }
    mailbox.post(.shutdown(reason: "the end"))
    thread.join()
    #expect(answers.violations.isEmpty)
  }
}

/// Routes events to whoever awaits them.
private final class Answers: EventSink, Sendable {
  private struct State {
    var tokens: [UInt64: [TokenID]] = [:]
    var ended: Set<UInt64> = []
    var waiters: [UInt64: CheckedContinuation<[TokenID], Never>] = [:]
    var violations: [String] = []
  }

  private let state = Mutex(State())

  var violations: [String] {
    get { state.withLock { $0.violations } }
    set { state.withLock { $0.violations = newValue } }
  }

  func publish(_ events: [Event]) {
    for event in events {
      let resume = state.withLock { state -> (CheckedContinuation<[TokenID], Never>, [TokenID])? in
        switch event {
        case .token(let handle, let token, _): state.tokens[handle, default: []].append(token)
        case .finished(let handle, _, _, _):
          state.ended.insert(handle)
          if let waiter = state.waiters.removeValue(forKey: handle) { return (waiter, state.tokens[handle] ?? []) }
        default: break
        }
        return nil
      }
      resume?.0.resume(returning: resume?.1 ?? [])
    }
  }

  func report(_ statistics: ServiceStatistics) {}

  func tokens(of handle: UInt64) async -> [TokenID] {
    await withCheckedContinuation { continuation in
      let known = state.withLock { state -> [TokenID]? in
        if state.ended.contains(handle) { return state.tokens[handle] ?? [] }
        state.waiters[handle] = continuation
        return nil
      }
      if let known { continuation.resume(returning: known) }
    }
  }
}

/// A kernel thread that runs a closure.
private struct Thread {
  private let thread: pthread_t

  init(_ body: @escaping @Sendable () -> Void) {
    final class Box {
      let body: @Sendable () -> Void
      init(_ body: @escaping @Sendable () -> Void) { self.body = body }
    }
    var thread = pthread_t()
    let box = Unmanaged.passRetained(Box(body)).toOpaque()
    let result = pthread_create(
      &thread, nil,
      { @Sendable argument in
        guard let argument else { return nil }
        Unmanaged<Box>.fromOpaque(argument).takeRetainedValue().body()
        return nil
      }, box)
    precondition(result == 0, "a thread could not be made")
    self.thread = thread
  }

  func join() { pthread_join(thread, nil) }
}
