import CLinux
import Dispatch
import Glibc
import Synchronization

/// Turns Ctrl-C into a call. While one of these lives, the signal does not end the program by itself. One lives at a time.
///
/// The signal is caught by a handler of ours and not by Dispatch's signal source: that one never sees a signal that is
/// ignored, and leaves its traces to whoever catches the signal next, such as the server.
final class Interrupts {
  private final class Action: Sendable {
    let body = Mutex<(@Sendable () -> Void)?>(nil)
  }

  private let source: (any DispatchSourceRead)?
  private let action = Action()

  /// Catches SIGINT from now on. Without an action set, a signal ends the program as usual.
  init() {
    let descriptor = apus_interrupts_begin()
    guard descriptor >= 0 else {
      source = nil
      return
    }
    let source = DispatchSource.makeReadSource(
      fileDescriptor: descriptor, queue: DispatchQueue(label: "apus.interrupts"))
    source.setEventHandler { [action] in
      var byte: UInt8 = 0
      // Presses in one go are pressed one after another all the same.
      while read(descriptor, &byte, 1) == 1 {
        guard let body = action.body.withLock({ $0 }) else { _exit(ExitStatus.interrupted) }
        body()
      }
    }
    source.resume()
    self.source = source
  }

  deinit {
    guard let source else { return }
    apus_interrupts_end()
    // The next one watches the same descriptor and must not meet this one.
    let isGone = DispatchSemaphore(value: 0)
    source.setCancelHandler { isGone.signal() }
    source.cancel()
    _ = isGone.wait(timeout: .now() + 1)
  }

  /// What Ctrl-C does from now on; `nil` ends the program.
  func set(_ body: (@Sendable () -> Void)?) { action.body.withLock { $0 = body } }
}
