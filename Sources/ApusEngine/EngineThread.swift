import ApusCore
import CLinux
import Glibc
import Synchronization

/// Threads for work that blocks: the engine's loop may not sit on the cooperative pool, where a step of milliseconds
/// would keep every task waiting.
enum EngineThread {
  private final class Body {
    let name: String
    let run: @Sendable () -> Void
    init(name: String, run: @escaping @Sendable () -> Void) {
      self.name = name
      self.run = run
    }
  }

  /// Starts a thread that ends when `run` returns. Linux shows the first 15 bytes of `name`.
  static func start(name: String, _ run: @escaping @Sendable () -> Void) {
    let body = Unmanaged.passRetained(Body(name: name, run: run))
    var attributes = pthread_attr_t()
    pthread_attr_init(&attributes)
    // The main thread's usual size; the system's default for others is less on some machines.
    pthread_attr_setstacksize(&attributes, 8 << 20)
    pthread_attr_setdetachstate(&attributes, CInt(PTHREAD_CREATE_DETACHED))
    defer { pthread_attr_destroy(&attributes) }
    var thread = pthread_t()
    let status = pthread_create(
      &thread, &attributes,
      { pointer in
        let body = Unmanaged<Body>.fromOpaque(pointer!).takeRetainedValue()
        apus_thread_set_name(body.name)
        body.run()
        return nil
      }, body.toOpaque())
    precondition(status == 0, "The system refused a thread (error \(status)).")
  }

  /// What `run` brings, computed on a thread of its own while the caller's task is suspended.
  static func result<Value: Sendable>(
    name: String, _ run: @escaping @Sendable () throws(EngineError) -> Value
  ) async throws(EngineError) -> Value {
    let result: Result<Value, EngineError> = await withCheckedContinuation { continuation in
      start(name: name) {
        do throws(EngineError) {
          continuation.resume(returning: .success(try run()))
        } catch {
          continuation.resume(returning: .failure(error))
        }
      }
    }
    return try result.get()
  }
}

/// Carries a value that is not Sendable to the one thread that will own it.
final class Handoff<Value: ~Copyable>: @unchecked Sendable {
  // Unchecked: `take` is called once, by the thread that owns the value from then on.
  private var value: Value?

  init(_ value: consuming Value) { self.value = consume value }

  /// Gives the value out, once.
  func take() -> Value {
    let taken = value.take()
    guard let taken else { preconditionFailure("A handed-over value was taken twice.") }
    return taken
  }
}

/// An event that happens once and that any number of tasks may wait for.
final class TerminationSignal: Sendable {
  private enum State: Sendable {
    case pending([CheckedContinuation<Void, Never>])
    case done
  }
  private let state = Mutex(State.pending([]))

  /// It has happened.
  func signal() {
    let waiters: [CheckedContinuation<Void, Never>] = state.withLock { state in
      defer { state = .done }
      if case .pending(let waiters) = state { return waiters }
      return []
    }
    for waiter in waiters { waiter.resume() }
  }

  /// Returns when it has happened.
  func wait() async {
    await withCheckedContinuation { continuation in
      let isDone = state.withLock { state in
        guard case .pending(var waiters) = state else { return true }
        waiters.append(continuation)
        state = .pending(waiters)
        return false
      }
      if isDone { continuation.resume() }
    }
  }
}
