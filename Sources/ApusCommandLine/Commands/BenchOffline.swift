import ApusCore
import ArgumentParser

/// `apus bench offline`
struct BenchOffline: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "offline",
    abstract: "Measures the engine's throughput in this process, without HTTP.",
    discussion: """
      Examples:
        apus bench offline models/Qwen2.5-0.5B-Instruct --num-prompts 64 --random-input-len 256 --random-output-len 128
        apus bench offline models/Qwen2.5-0.5B-Instruct --load-format dummy --dataset-name generated-shared-prefix
        apus bench offline models/Qwen2.5-0.5B-Instruct --disable-radix-cache --dataset-name generated-shared-prefix
      """)

  @OptionGroup(title: "Model and engine") var engine: EngineOptions
  @OptionGroup(title: "Requests") var dataset: DatasetOptions
  @Option(help: ArgumentHelp("Requests in flight at most. Default: all.", valueName: "count"))
  var maxConcurrency: Int?
  @Option(help: ArgumentHelp("Writes the result as JSON; - is standard output.", valueName: "path"))
  var outputFile: String?
  @Flag(name: [.long, .short], help: "Prints no progress and no table.")
  var quiet = false

  func validate() throws {
    if let maxConcurrency, maxConcurrency < 1 {
      throw ValidationError("--max-concurrency must be at least 1, got \(maxConcurrency).")
    }
    if dataset.datasetName == .mooncake {
      throw ValidationError("A trace has arrival times; play it with 'apus bench serving'.")
    }
  }

  func run() async throws {
    let loadStart = monotonicSeconds()
    let running = try await startEngine(engine, isQuiet: quiet)
    let loadSeconds = monotonicSeconds() - loadStart
    do {
      try await measure(running.service, loadSeconds: loadSeconds)
    } catch {
      await running.shutdown()
      throw error
    }
    await running.shutdown()
  }

  private func measure(_ service: any GenerationService, loadSeconds: Double) async throws {
    let units = PromptUnits.tokens((0..<service.model.vocabularySize).map { TokenID($0) })
    let requests = try dataset.requests(unitCount: units.count)
    let bar = ProgressBar("Requests", total: Double(requests.count), isQuiet: quiet)
    let before = service.statistics()
    let limit = before.maxRunningRequests + before.maxQueuedRequests
    let driver = BenchDriver(
      arrivals: Array(repeating: 0, count: requests.count),
      maxConcurrency: maxConcurrency ?? (limit > 0 ? limit : nil))
    let cpuBefore = cpuSeconds()
    let records = try await driver.run(
      send: { await send(requests[$0], to: service) }, progress: { _ in bar.advance() })
    bar.finish()
    let report = BenchReport(records)
    let after = service.statistics()
    let scheduling = after.schedulerSeconds - before.schedulerSeconds
    let forward = after.forwardSeconds - before.forwardSeconds
    let steps = after.steps - before.steps
    if !quiet {
      Terminal.output.write(report.table)
      Terminal.output.line(
        "\nLoaded in \(duration(loadSeconds)); \(grouped(steps)) steps, model \(duration(forward)), scheduling "
          + "\(duration(scheduling)) (\(fixed(scheduling / max(1e-9, scheduling + forward) * 100, 2))%); "
          + "CPU \(fixed((cpuSeconds() - cpuBefore) / report.duration * 100, 0))%, peak memory \(byteSize(peakResidentBytes()))."
      )
    }
    if let outputFile {
      var object = JSONObject([
        ("backend", "offline"), ("model", .string(service.model.name)), ("dtype", .string(service.model.dtype)),
        ("num_prompts", .int(Int64(requests.count))), ("load_seconds", .double(loadSeconds)),
      ])
      for (key, value) in dataset.json { object[key] = value }
      for (key, value) in report.json { object[key] = value }
      object["steps"] = .int(Int64(steps))
      object["scheduler_seconds"] = .double(scheduling)
      object["forward_seconds"] = .double(forward)
      object["peak_rss_bytes"] = .int(Int64(peakResidentBytes()))
      try emit(.object(object), to: outputFile)
    }
    if report.failed > 0 { throw CommandFailure("\(report.failed) of \(requests.count) requests failed.") }
  }

  private func send(_ request: BenchRequest, to service: any GenerationService) async -> BenchRecord {
    var record = BenchRecord()
    record.sent = monotonicSeconds()
    do throws(EngineError) {
      let prompt: Request.Prompt
      switch request.prompt {
      case .units(let units): prompt = .tokens(units.map { TokenID($0) })
      case .tokens(let tokens): prompt = .tokens(tokens)
      case .text(let text): prompt = .text(text)
      case .messages(let messages):
        prompt = .tokens(
          try service.encode(try service.renderChat(ChatPrompt(messages: messages)), addSpecialTokens: false))
      }
      var sampling = SamplingParameters.greedy
      sampling.maxNewTokens = request.outputLength
      sampling.ignoreEOS = true
      let stream = try service.generate(Request(prompt: prompt, sampling: sampling))
      let iterator = stream.makeAsyncIterator()
      while let chunk = try await iterator.next(isolation: nil) {
        if !chunk.tokens.isEmpty { record.pieces.append((monotonicSeconds(), chunk.tokens.count)) }
        record.promptTokens = chunk.usage.promptTokens
        record.outputTokens = chunk.usage.completionTokens
        record.cachedTokens = chunk.usage.cachedTokens
        if case .abort(let reason) = chunk.finishReason {
          record.error = "aborted"
          record.detail = reason
        }
      }
    } catch {
      record.error = error.code.description
      record.detail = error.message
    }
    record.ended = monotonicSeconds()
    return record
  }
}
