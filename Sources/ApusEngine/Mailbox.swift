public import ApusScheduling
import Glibc

/// Carries commands from any thread to the engine's thread.
///
/// Bounded: a submission is refused when `capacity` commands wait, and its sender answers "try again later". Commands
/// that end or steer requests always get in, since each names a request that was let in before, and refusing them would
/// keep work alive that nobody wants.
///
/// The engine's thread takes everything at once, in order. It sleeps in the kernel when it has nothing to do, and only
/// then does a sender pay for waking it.
public final class Mailbox: CommandSource, @unchecked Sendable {
  // Protected by `mutex`: everything mutable below. The pointers themselves never change.
  private let mutex: UnsafeMutablePointer<pthread_mutex_t>
  private let bell: UnsafeMutablePointer<pthread_cond_t>
  private var commands: [Command] = []
  private var isParked = false
  private var isClosed = false
  /// Commands that may wait before submissions are refused.
  public let capacity: Int

  /// Makes an empty mailbox.
  public init(capacity: Int) {
    precondition(capacity > 0, "a mailbox holds at least one command")
    self.capacity = capacity
    mutex = .allocate(capacity: 1)
    bell = .allocate(capacity: 1)
    mutex.initialize(to: pthread_mutex_t())
    bell.initialize(to: pthread_cond_t())
    let results = (pthread_mutex_init(mutex, nil), pthread_cond_init(bell, nil))
    precondition(results == (0, 0), "a mutex and a condition could not be made")
  }

  deinit {
    pthread_cond_destroy(bell)
    pthread_mutex_destroy(mutex)
    bell.deallocate()
    mutex.deallocate()
  }

  /// What became of a command.
  public enum Receipt: Sendable, Equatable {
    /// It waits for the engine.
    case accepted
    /// Too many commands wait; nothing was kept.
    case full
    /// The engine has ended; nothing was kept.
    case closed
  }

  /// Leaves a command for the engine. Any thread; blocks for no longer than it takes to append to an array.
  @discardableResult
  public func post(_ command: Command) -> Receipt {
    pthread_mutex_lock(mutex)
    defer { pthread_mutex_unlock(mutex) }
    if isClosed { return .closed }
    if case .submit = command, commands.count >= capacity { return .full }
    commands.append(command)
    if isParked { pthread_cond_signal(bell) }
    return .accepted
  }

  /// Takes every waiting command. Called by the engine's thread alone.
  /// - Parameters:
  ///   - taken: where the commands go; arrives empty, and its memory serves for the next ones.
  ///   - wait: whether to sleep until there is at least one.
  public func drain(into taken: inout [Command], wait: Bool) {
    pthread_mutex_lock(mutex)
    while wait && commands.isEmpty {
      isParked = true
      pthread_cond_wait(bell, mutex)
      isParked = false
    }
    swap(&commands, &taken)
    pthread_mutex_unlock(mutex)
  }

  /// Refuses everything from now on. Called when the loop has ended.
  /// - Returns: commands that came too late to be taken. Each submission among them needs an answer.
  public func close() -> [Command] {
    pthread_mutex_lock(mutex)
    defer { pthread_mutex_unlock(mutex) }
    isClosed = true
    defer { commands.removeAll() }
    return commands
  }
}
