import ApusCore
import ApusEngine
import ApusScheduling
import ApusTesting
import ArgumentParser

/// `apus bench scheduler`
struct BenchScheduler: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "scheduler",
    abstract: "Measures what the engine's loop costs per step, over a model that costs nothing.",
    discussion: """
      Runs the production loop and scheduler over a fake model whose next token is a hash of the sequence, with a fixed \
      number of requests that all generate, and leaves the fake model's own time out. What is left is what a step costs \
      besides the model: taking commands, building the batch, appending tokens, checking stops, delivering events. The \
      share is of a step whose model takes --model-ms; the overlapped loop hides it behind that model.

      Examples:
        apus bench scheduler
        apus bench scheduler --running 1 --running 512 --steps 5000 --output-file scheduler.json
      """)

  @Option(help: ArgumentHelp("Requests that run. May be repeated. Default: 1, 64 and 256.", valueName: "count"))
  var running: [Int] = []
  @Option(help: ArgumentHelp("Steps measured.", valueName: "count"))
  var steps = 2000
  @Option(help: ArgumentHelp("Tokens of each prompt.", valueName: "tokens"))
  var inputLen = 256
  @Option(help: ArgumentHelp("The model's time that the share refers to.", valueName: "milliseconds"))
  var modelMs = 20.0
  @Flag(help: "Measures the plain loop instead of the overlapped one.")
  var disableOverlapSchedule = false
  @Option(help: ArgumentHelp("Writes the result as JSON; - is standard output.", valueName: "path"))
  var outputFile: String?
  @Flag(name: [.long, .short], help: "Prints no table.")
  var quiet = false

  func validate() throws {
    for count in running where count < 1 { throw ValidationError("--running must be at least 1, got \(count).") }
    if steps < 10 { throw ValidationError("--steps must be at least 10, got \(steps).") }
    if inputLen < 1 { throw ValidationError("--input-len must be at least 1, got \(inputLen).") }
    if !(modelMs > 0) { throw ValidationError("--model-ms must be above 0, got \(modelMs).") }
  }

  func run() throws {
    if !quiet {
      Terminal.output.line(
        "Running".padded(10)
          + ["mean us", "median us", "p99 us", "us/request", "share"].map { $0.aligned(12) }.joined())
    }
    var rows: [JSONValue] = []
    for count in running.isEmpty ? [1, 64, 256] : running {
      let summary = Summary(try measure(running: count))
      let share = summary.median / (summary.median + modelMs / 1000)
      if !quiet {
        let columns = [
          fixed(summary.mean * 1e6, 2), fixed(summary.median * 1e6, 2), fixed(summary.p99 * 1e6, 2),
          fixed(summary.median * 1e6 / Double(count), 3), "\(fixed(share * 100, 2))%",
        ]
        Terminal.output.line("\(count)".padded(10) + columns.map { $0.aligned(12) }.joined())
      }
      rows.append(["running": .int(Int64(count)), "microseconds": summary.json(scale: 1e6), "share": .double(share)])
    }
    if !quiet { Terminal.output.line("Peak memory: \(byteSize(peakResidentBytes())).") }
    if let outputFile {
      let result: JSONValue = [
        "steps": .int(Int64(steps)), "input_len": .int(Int64(inputLen)), "model_ms": .double(modelMs),
        "overlap": .bool(!disableOverlapSchedule), "results": .array(rows),
        "peak_rss_bytes": .int(Int64(peakResidentBytes())),
      ]
      try emit(result, to: outputFile)
    }
  }

  /// Seconds of each step besides the executor's.
  private func measure(running count: Int) throws -> [Double] {
    let length = inputLen + steps + 200
    let pages = count * ((length + kvPageSize - 1) / kvPageSize + 1)
    var settings = SchedulerConfiguration(pageCount: pages, contextLength: length)
    settings.maxRunningRequests = count
    settings.maxQueuedRequests = count
    settings.tokenBudget = max(settings.tokenBudget, count)
    let vocabulary = 32_000
    let executor = FakeExecutor(
      model: FakeModel(vocabularySize: vocabulary), pageCount: pages, maxRunningRequests: count)
    var loop = EngineLoop(
      source: Commands(submissions(count, vocabulary)), sink: Discarded(), runner: TimedExecutor(executor),
      scheduler: try Scheduler(settings))
    func round() { _ = disableOverlapSchedule ? loop.stepWithoutOverlap() : loop.step() }
    // First all prompts are computed and every request generates.
    while loop.scheduler.statistics.generatedTokens < count * 20 { round() }
    var samples: [Double] = []
    samples.reserveCapacity(steps)
    for _ in 0..<steps {
      let executing = loop.runner.seconds
      let start = monotonicSeconds()
      round()
      samples.append(max(0, monotonicSeconds() - start - (loop.runner.seconds - executing)))
    }
    guard loop.scheduler.statistics.runningRequests == count else {
      throw CommandFailure("Only \(loop.scheduler.statistics.runningRequests) of \(count) requests ran.")
    }
    return samples
  }

  private func submissions(_ count: Int, _ vocabulary: Int) -> [Command] {
    var generator = SeededGenerator(seed: 1)
    var sampling = SamplingParameters.greedy
    sampling.maxNewTokens = nil
    sampling.ignoreEOS = true
    sampling.seed = 0
    return (0..<count).map { index in
      let tokens = (0..<inputLen).map { _ in TokenID(generator.next() % UInt64(vocabulary)) }
      return .submit(Submission(handle: UInt64(index), tokens: tokens, sampling: sampling))
    }
  }

  /// Hands all commands over at once.
  private struct Commands: CommandSource {
    private var waiting: [Command]

    init(_ commands: [Command]) { waiting = commands }

    mutating func drain(into commands: inout [Command], wait: Bool) {
      commands += waiting
      waiting = []
    }
  }

  /// Takes events and does nothing with them.
  private struct Discarded: EventSink {
    mutating func publish(_ events: [Event]) {}
    mutating func report(_ statistics: ServiceStatistics) {}
  }

  /// An executor that adds up its own time.
  private struct TimedExecutor: ModelExecutor {
    private var executor: FakeExecutor
    private(set) var seconds = 0.0

    init(_ executor: FakeExecutor) { self.executor = executor }

    mutating func launch(_ batch: ScheduleBatch) {
      let start = monotonicSeconds()
      executor.launch(batch)
      seconds += monotonicSeconds() - start
    }

    mutating func wait(into result: inout StepResult) {
      let start = monotonicSeconds()
      executor.wait(into: &result)
      seconds += monotonicSeconds() - start
    }
  }
}
