import Dispatch
import Glibc
import Synchronization

/// Turns Ctrl-C into a call. While one of these lives, the signal does not end the program by itself.
final class Interrupts {
  private final class Action: Sendable {
    let body = Mutex<(@Sendable () -> Void)?>(nil)
  }

  private let source: any DispatchSourceSignal
  private let action = Action()

  /// Catches SIGINT from now on. Without an action set, a signal ends the program as usual.
  init() {
    // On Linux Dispatch catches the signal with a handler of its own; one that is ignored would never reach it.
    source = DispatchSource.makeSignalSource(signal: SIGINT, queue: DispatchQueue(label: "apus.interrupts"))
    source.setEventHandler { [action] in
      guard let body = action.body.withLock({ $0 }) else { _exit(ExitStatus.interrupted) }
      body()
    }
    source.resume()
  }

  deinit {
    // Whoever catches the signal next must not meet a source that is about to go.
    let isGone = DispatchSemaphore(value: 0)
    source.setCancelHandler { isGone.signal() }
    source.cancel()
    _ = isGone.wait(timeout: .now() + 1)
    signal(SIGINT, SIG_DFL)
  }

  /// What Ctrl-C does from now on; `nil` ends the program.
  func set(_ body: (@Sendable () -> Void)?) { action.body.withLock { $0 = body } }
}
