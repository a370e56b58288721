import ApusCore
import ArgumentParser

/// `apus generate`
struct Generate: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Answers a file of prompts: JSONL in, JSONL out.",
    discussion: """
      Each input line is an object with one of "prompt" (text), "messages" (a conversation) and "input_ids" (token ids), \
      an optional "id", and sampling fields such as "max_new_tokens", "temperature", "top_p", "stop", "seed". Each answer \
      is one line with the same "id", in the order in which answers end; a line without "id" is named by its number.

      A run that was stopped goes on where it stopped: ids that the output file holds are skipped. A line that fails is \
      answered with an "error" and stops nothing; the exit status is then 1.

      Examples:
        apus generate models/Qwen2.5-0.5B-Instruct --input prompts.jsonl --output answers.jsonl
        echo '{"prompt": "Once upon a time"}' | apus generate models/stories --input - --output - --max-new-tokens 64
        apus generate models/Qwen2.5-0.5B-Instruct -i prompts.jsonl -o answers.jsonl --retry-failed
      """)

  @OptionGroup(title: "Model and engine") var engine: EngineOptions
  @OptionGroup(title: "Sampling, where a line leaves it open") var sampling: SamplingOptions

  @Option(
    name: [.long, .short], help: ArgumentHelp("The JSONL file to read; - is standard input.", valueName: "path"),
    completion: .file())
  var input: String
  @Option(
    name: [.long, .short],
    help: ArgumentHelp("The JSONL file to write or continue; - is standard output.", valueName: "path"),
    completion: .file())
  var output = "-"
  @Option(help: ArgumentHelp("Requests in flight at once. Default: what the engine runs at once.", valueName: "count"))
  var concurrency: Int?
  @Flag(help: "Answers lines again that an earlier run answered with an error.")
  var retryFailed = false
  @Flag(help: "Starts over: an output file that exists is replaced.")
  var overwrite = false
  @Flag(help: "Skips fields of a line that have no meaning instead of refusing the line.")
  var ignoreUnknownFields = false
  @Flag(name: [.long, .short], help: "Prints nothing but errors.")
  var quiet = false

  func validate() throws {
    if let concurrency, concurrency < 1 {
      throw ValidationError("--concurrency must be at least 1, got \(concurrency).")
    }
    if retryFailed && overwrite {
      throw ValidationError("--retry-failed continues a file and --overwrite replaces it; keep one of them.")
    }
    if retryFailed && output == "-" { throw ValidationError("--retry-failed needs an --output file.") }
    if input == output && input != "-" { throw ValidationError("--input and --output name the same file '\(input)'.") }
  }

  func run() async throws {
    if input != "-" && !fileExists(input) {
      throw CommandFailure("There is no file '\(input)'.", status: ExitStatus.missingInput)
    }
    var earlier = BatchOutput()
    if output != "-" {
      if overwrite { try writeFile(output, []) }
      earlier = try BatchOutput.resume(path: output, retriesFailures: retryFailed)
    }
    let total = input == "-" ? 0 : try countLines()
    let running = try await startEngine(engine, isQuiet: quiet)
    do {
      let outcome = try await answer(running.service, earlier: earlier, total: total)
      await running.shutdown()
      if outcome.failed > 0 || earlier.failures > 0 {
        let sum = outcome.failed + earlier.failures
        throw CommandFailure(
          "\(sum) line\(sum == 1 ? "" : "s") failed; the output says why ('--retry-failed' tries again).")
      }
    } catch let failure as CommandFailure {
      throw failure
    } catch {
      await running.shutdown()
      throw error
    }
  }

  private func answer(
    _ service: any GenerationService, earlier: BatchOutput, total: Int
  ) async throws -> BatchRun.Outcome {
    var defaults = SamplingParameters()
    service.model.samplingDefaults.apply(to: &defaults)
    let batch = BatchRun(
      service: service, defaults: sampling.values.applied(to: defaults),
      concurrency: concurrency ?? max(1, min(256, service.statistics().maxRunningRequests)),
      ignoresUnknownFields: ignoreUnknownFields)
    let bar = ProgressBar("Answering", total: Double(total), isQuiet: quiet)
    let reader = try LineReader(path: input)
    let appender = try LineAppender(path: output)
    let start = monotonicSeconds()
    func lines() throws(CommandFailure) -> [UInt8]? { try reader.next() }
    func write(_ line: String) throws(CommandFailure) { try appender.append(line) }
    let outcome = try await batch.run(lines: lines, done: earlier.finished, write: write) { outcome in
      let done = outcome.answered + outcome.failed + outcome.skipped
      let rate = Double(outcome.completionTokens) / max(1e-9, monotonicSeconds() - start)
      bar.update(done: Double(done), note: "\(fixed(rate, 0)) tokens/s")
    }
    bar.finish()
    if !quiet {
      let seconds = monotonicSeconds() - start
      var text = "Answered \(grouped(outcome.answered)) lines in \(duration(seconds))"
      if outcome.failed > 0 { text += ", \(grouped(outcome.failed)) failed" }
      if outcome.skipped > 0 { text += ", \(grouped(outcome.skipped)) were done before" }
      text += ": \(grouped(outcome.promptTokens)) prompt and \(grouped(outcome.completionTokens)) output tokens"
      text += " (\(fixed(Double(outcome.completionTokens) / max(1e-9, seconds), 1)) output tokens/s);"
      Terminal.error.line(text + " peak memory \(byteSize(peakResidentBytes())).")
    }
    return outcome
  }

  private func countLines() throws(CommandFailure) -> Int {
    let reader = try LineReader(path: input)
    var count = 0
    while let line = try reader.next() { if !line.isEmpty { count += 1 } }
    return count
  }
}
