public import ApusCore
public import ApusScheduling
import Glibc

/// Where commands come from.
public protocol CommandSource {
  /// Takes every waiting command.
  /// - Parameters:
  ///   - commands: where they go; arrives empty.
  ///   - wait: there is nothing else to do: return only with at least one command.
  mutating func drain(into commands: inout [Command], wait: Bool)
}

/// Where events go.
public protocol EventSink {
  /// Delivers events, in order. Called from the loop's thread, up to twice a step, never with an empty array. The array
  /// is reused: keep the events and not the array.
  mutating func publish(_ events: [Event])
  /// Counts and levels after a step, and before the loop goes to sleep.
  mutating func report(_ statistics: ServiceStatistics)
}

/// The engine's hot path: commands in, steps through the executor, events out.
///
/// Run it on a thread of its own. It is generic over its three edges, so what runs in production is what the tests
/// run with a source they hold in their hand and an executor that computes hashes.
///
/// Two loops do the same. `runWithoutOverlap` is the plain one and says what is meant:
///
///     commands -> next -> launch -> wait -> complete -> events
///
/// `run` keeps the executor busy while the books are kept. It decides and launches step n + 1 before it waits for
/// step n, whose tokens it does not know yet (they are "in flight", see `Scheduler`):
///
///     executor   ...│ step n          │ step n + 1      │ step n + 2 ...
///     this thread   │ complete n - 1, │ complete n,     │
///                   │ commands,       │ commands,       │
///                   │ next n + 1      │ next n + 2      │
///
/// Both give every request the same tokens, to the bit.
public struct EngineLoop<Source: CommandSource, Sink: EventSink, Runner: ModelExecutor>: ~Copyable {
  /// The edges and the state. Between two steps they may be looked at.
  public var source: Source
  public var sink: Sink
  public var runner: Runner
  public var scheduler: Scheduler

  private var commands: [Command] = []
  private var result = StepResult()
  /// Two batches take turns: one is in flight while the other is decided.
  private var inFlight = ScheduleBatch()
  private var upcoming = ScheduleBatch()
  private var hasInFlight = false
  /// Nothing is in flight and nothing can be launched until a command comes.
  private var isStuck = true
  private var clock = StepClock()

  /// Puts a loop together.
  public init(source: Source, sink: Sink, runner: Runner, scheduler: consuming Scheduler) {
    self.source = source
    self.sink = sink
    self.runner = runner
    self.scheduler = scheduler
  }

  /// Runs overlapped until `Command.shutdown` was taken and nothing is in flight.
  public mutating func run() {
    while step() {}
  }

  /// Runs the plain loop until `Command.shutdown` was taken.
  public mutating func runWithoutOverlap() {
    while stepWithoutOverlap() {}
  }

  /// One round of the overlapped loop.
  /// - Returns: whether there is another.
  public mutating func step() -> Bool {
    takeCommands()
    let isLaunched = scheduler.next(into: &upcoming)
    if isLaunched { runner.launch(upcoming) }
    // Rejections and the like need not wait for the step in flight.
    publish()
    let isCompleting = hasInFlight
    if isCompleting { completeInFlight() }
    swap(&inFlight, &upcoming)
    hasInFlight = isLaunched
    return endRound(isStuck: !isLaunched && !isCompleting)
  }

  /// One round of the plain loop.
  /// - Returns: whether there is another.
  public mutating func stepWithoutOverlap() -> Bool {
    takeCommands()
    let isLaunched = scheduler.next(into: &inFlight)
    if isLaunched { runner.launch(inFlight) }
    publish()
    if isLaunched { completeInFlight() }
    return endRound(isStuck: !isLaunched)
  }

  private mutating func takeCommands() {
    commands.removeAll(keepingCapacity: true)
    source.drain(into: &commands, wait: isStuck)
    if isStuck { clock.restartWindow(generated: scheduler.statistics.generatedTokens) }
    clock.start()
    for command in commands { scheduler.apply(command) }
  }

  /// Waits for the step in flight and takes what it brought.
  private mutating func completeInFlight() {
    result.removeAll()
    clock.stop()
    runner.wait(into: &result)
    clock.start()
    scheduler.complete(inFlight, result)
    publish()
  }

  private mutating func publish() {
    if scheduler.events.isEmpty { return }
    sink.publish(scheduler.events)
    scheduler.removeEvents()
  }

  private mutating func endRound(isStuck: Bool) -> Bool {
    self.isStuck = isStuck
    clock.stop()
    var statistics = scheduler.statistics
    statistics.schedulerSeconds = clock.seconds
    statistics.generationThroughput = isStuck ? 0 : clock.throughput(generated: statistics.generatedTokens)
    sink.report(statistics)
    return !(scheduler.isShuttingDown && scheduler.isIdle)
  }
}

/// Measures the loop's own time, for statistics; no decision depends on it.
private struct StepClock {
  /// Time spent between `start` and `stop`.
  var seconds = 0.0
  private var started = 0.0
  /// Where the current measurement of throughput began.
  private var windowStart = 0.0
  private var windowTokens = 0
  private var rate = 0.0

  mutating func start() { started = now() }

  mutating func stop() { seconds += now() - started }

  /// Begins a new measurement of throughput: what went on while the loop slept is not work.
  mutating func restartWindow(generated: Int) {
    windowStart = now()
    windowTokens = generated
    rate = 0
  }

  /// Output tokens per second over the last whole window, each of which is at least a second long.
  mutating func throughput(generated: Int) -> Double {
    let time = now()
    if time - windowStart >= 1 {
      rate = Double(generated - windowTokens) / (time - windowStart)
      windowStart = time
      windowTokens = generated
    }
    return rate
  }

  private func now() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
  }
}
