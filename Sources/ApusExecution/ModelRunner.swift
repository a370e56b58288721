public import ApusScheduling
import CLinux
import Glibc

/// Runs steps on a thread of its own, in the order in which they were launched, so that the scheduler works on one step
/// while the model computes another.
///
/// `launch` and `wait` belong to one thread, the engine's. Waiting threads sleep; an idle runner uses no processor time.
public final class ModelRunner: ModelExecutor, @unchecked Sendable {
  // Unchecked: all state shared between the two threads lies in `Shared`, under its lock.

  /// The work itself, for those who need model, pool or limits. Its `run` must not be called beside the runner.
  public let steps: StepRunner
  private let shared: Shared
  private var thread = pthread_t()

  /// Starts the thread.
  public init(_ steps: StepRunner) {
    self.steps = steps
    shared = Shared()
    let box = Unmanaged.passRetained(ThreadArgument(steps: steps, shared: shared))
    let status = pthread_create(
      &thread, nil,
      { argument in
        let box = Unmanaged<ThreadArgument>.fromOpaque(argument!).takeRetainedValue()
        apus_thread_set_name("apus-model")
        box.shared.serve(box.steps)
        return nil
      }, box.toOpaque())
    precondition(status == 0, "The thread of the model runner could not be started (error \(status)).")
  }

  /// Finishes what was launched and ends the thread.
  deinit {
    shared.stop()
    pthread_join(thread, nil)
  }

  /// The most batches in flight: the one that runs and the next one.
  public static let depth = 2

  /// Queues a batch.
  /// - Precondition: fewer than `depth` batches are in flight.
  public func launch(_ batch: ScheduleBatch) { shared.launch(batch) }

  /// Blocks until the oldest batch in flight is done.
  /// - Precondition: a batch is in flight.
  public func wait(into result: inout StepResult) { shared.wait(into: &result) }
}

/// What the new thread is given.
private final class ThreadArgument {
  let steps: StepRunner
  let shared: Shared

  init(steps: StepRunner, shared: Shared) {
    self.steps = steps
    self.shared = shared
  }
}

/// A ring of batches and results under one lock. Counters only grow: launched >= finished >= collected.
///
/// A condition variable instead of `Mutex`, which cannot express the wait.
private final class Shared: @unchecked Sendable {
  // Unchecked: every field is read and written under the lock.
  private let lock = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
  private let changed = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
  private var batches = [ScheduleBatch](repeating: ScheduleBatch(), count: ModelRunner.depth)
  private var results = [StepResult](repeating: StepResult(), count: ModelRunner.depth)
  private var launched = 0
  private var finished = 0
  private var collected = 0
  private var isStopping = false

  init() {
    pthread_mutex_init(lock, nil)
    pthread_cond_init(changed, nil)
  }

  deinit {
    pthread_cond_destroy(changed)
    pthread_mutex_destroy(lock)
    changed.deallocate()
    lock.deallocate()
  }

  func launch(_ batch: ScheduleBatch) {
    pthread_mutex_lock(lock)
    precondition(launched - collected < ModelRunner.depth, "More than \(ModelRunner.depth) batches in flight.")
    batches[launched % ModelRunner.depth] = batch
    launched += 1
    pthread_cond_broadcast(changed)
    pthread_mutex_unlock(lock)
  }

  func wait(into result: inout StepResult) {
    pthread_mutex_lock(lock)
    precondition(collected < launched, "No batch is in flight.")
    while finished == collected { pthread_cond_wait(changed, lock) }
    // The caller's arrays come back here and serve a later step.
    swap(&results[collected % ModelRunner.depth], &result)
    collected += 1
    pthread_mutex_unlock(lock)
  }

  func stop() {
    pthread_mutex_lock(lock)
    isStopping = true
    pthread_cond_broadcast(changed)
    pthread_mutex_unlock(lock)
  }

  /// The thread's loop.
  func serve(_ steps: StepRunner) {
    var result = StepResult()
    while true {
      pthread_mutex_lock(lock)
      while finished == launched && !isStopping { pthread_cond_wait(changed, lock) }
      if finished == launched {
        pthread_mutex_unlock(lock)
        return
      }
      let index = finished % ModelRunner.depth
      var batch = ScheduleBatch()
      swap(&batch, &batches[index])
      swap(&result, &results[index])
      pthread_mutex_unlock(lock)

      result.removeAll()
      steps.run(batch, into: &result)
      // Let go of the arrays before the result is seen, so that the scheduler may change them in place.
      batch = ScheduleBatch()

      pthread_mutex_lock(lock)
      swap(&result, &results[index])
      finished += 1
      pthread_cond_broadcast(changed)
      pthread_mutex_unlock(lock)
    }
  }
}
