import ApusCore
import ArgumentParser

/// `apus bench`
struct Bench: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Measures servers, the engine and models.",
    discussion: """
      Every benchmark prints a table for people and, with --output-file, JSON for scripts; all take a seed and repeat \
      exactly what they did.

      Examples:
        apus bench serving --base-url http://127.0.0.1:8000 --num-prompts 200 --max-concurrency 16
        apus bench offline models/Qwen2.5-0.5B-Instruct --load-format dummy --num-prompts 64
        apus bench throughput models/Qwen2.5-0.5B-Instruct --load-format dummy --quantization int4
        apus bench kernels --format int4 --rows 1
        apus bench startup models/Qwen2.5-0.5B-Instruct --repeats 5
        apus bench eval --dtype float32
      """,
    subcommands: [
      BenchServing.self, BenchOffline.self, BenchThroughput.self, BenchKernels.self, BenchScheduler.self,
      BenchStartup.self, BenchEval.self, BenchQuality.self, BenchGrammar.self, BenchTokenizer.self,
    ])
}

/// `apus bench serving`
struct BenchServing: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "serving",
    abstract: "Drives a server with requests and measures latencies and throughput.",
    discussion: """
      Works with Apus and with any server that speaks OpenAI's API or SGLang's native one. Synthetic prompts are token \
      ids of exact lengths where the protocol takes ids, and words that the server's tokenizer counts as one token each \
      where it does not (--text, openai-chat).

      TTFT is the time to the first token, TPOT the mean time of the tokens after it, ITL the gap between tokens, E2E the \
      time to the end.

      Examples:
        apus bench serving --base-url http://127.0.0.1:8000 --random-input-len 256 --random-output-len 128 --max-concurrency 16
        apus bench serving --dataset-name generated-shared-prefix --gsp-num-groups 8 --request-rate 4
        apus bench serving --backend vllm --base-url http://gpu:8000 --dataset-name sharegpt --dataset-path sharegpt.json
        apus bench serving --dataset-name mooncake --dataset-path conversation_trace.jsonl --trace-scale 0.02 --num-prompts 500
      """)

  @OptionGroup(title: "Requests") var dataset: DatasetOptions

  @Option(help: "The server's protocol: apus and sglang are native, openai and vllm completions, openai-chat chats.")
  var backend: BenchBackend = .apus
  @Option(help: ArgumentHelp("The server.", valueName: "url"))
  var baseUrl = "http://127.0.0.1:8000"
  @Option(help: ArgumentHelp("The model to ask for. Default: the server's first.", valueName: "name"))
  var model: String?
  @Option(help: ArgumentHelp("The key that the server asks for. Default: $OPENAI_API_KEY.", valueName: "key"))
  var apiKey: String?
  @Option(
    help: ArgumentHelp(
      "Requests a second, at the random times of a Poisson process; inf sends all at once. A trace has its own times.",
      valueName: "rate"))
  var requestRate = Double.infinity
  @Option(help: ArgumentHelp("Requests in flight at most.", valueName: "count"))
  var maxConcurrency: Int?
  @Option(help: ArgumentHelp("Requests sent one by one before the measurement.", valueName: "count"))
  var warmupRequests = 1
  @Flag(help: "Empties the server's prefix cache after the warm-up (POST /flush_cache).")
  var flushCache = false
  @Option(help: ArgumentHelp("0 always takes the most likely token.", valueName: "number"))
  var temperature: Float = 0
  @Flag(help: "Lets answers end early; otherwise every answer has the length asked for.")
  var disableIgnoreEos = false
  @Flag(help: "Sends prompts as text even where ids would do.")
  var text = false
  @Option(
    help: ArgumentHelp("Ids of random prompts are below this. Default: what the server says.", valueName: "count"))
  var vocabSize: Int?
  @Option(help: ArgumentHelp("JSON members added to each request.", valueName: "json"))
  var extraRequestBody: String?
  @Option(
    help: ArgumentHelp(
      "A limit that good requests keep, in milliseconds: ttft:500, tpot:50 or e2e:5000. May be repeated.",
      valueName: "limit"))
  var goodput: [String] = []
  @Option(help: ArgumentHelp("Writes the result as JSON; - is standard output.", valueName: "path"))
  var outputFile: String?
  @Flag(help: "Adds each request's own numbers to the JSON.")
  var outputDetails = false
  @Flag(name: [.long, .short], help: "Prints no progress and no table.")
  var quiet = false

  func validate() throws {
    guard requestRate > 0 else { throw ValidationError("--request-rate must be above 0, got \(requestRate).") }
    if let maxConcurrency, maxConcurrency < 1 {
      throw ValidationError("--max-concurrency must be at least 1, got \(maxConcurrency).")
    }
    if warmupRequests < 0 { throw ValidationError("--warmup-requests must be at least 0, got \(warmupRequests).") }
    if let vocabSize, vocabSize < 2 { throw ValidationError("--vocab-size must be at least 2, got \(vocabSize).") }
    if outputDetails && outputFile == nil { throw ValidationError("--output-details needs --output-file.") }
    if dataset.datasetName == .mooncake && requestRate.isFinite {
      throw ValidationError("A trace has its own arrival times; use --trace-speed instead of --request-rate.")
    }
    _ = try extraMembers()
    do throws(CommandFailure) { _ = try Goodput(goodput) } catch { throw ValidationError(error.message) }
  }

  private func extraMembers() throws -> JSONObject {
    guard let extraRequestBody else { return JSONObject() }
    guard let object = (try? JSONValue.parse(extraRequestBody))?.objectValue else {
      throw ValidationError("--extra-request-body must be a JSON object.")
    }
    return object
  }

  func run() async throws {
    let client = try ServerClient(
      baseURL: baseUrl, apiKey: apiKey, connections: max(8, min(maxConcurrency ?? 4096, 4096)))
    do {
      try await measure(client)
    } catch {
      await client.shutdown()
      throw serverFailure(error, at: client.baseURL)
    }
    await client.shutdown()
  }

  private func measure(_ client: ServerClient) async throws {
    let models = try? await client.firstModel()
    let name = model ?? models.flatMap { $0 } ?? "default"
    if models == nil { _ = try await client.get("/health") }
    var units: PromptUnits?
    var added = 0
    if dataset.isSynthetic {
      let discovery = UnitDiscovery(client: client, model: name)
      if text || !backend.takesTokens {
        let (words, overhead, isExact) = await discovery.words()
        units = words
        // A chat's template adds tokens that nobody can know; the message itself has the length asked for.
        added = backend == .openaiChat ? 0 : overhead
        if !isExact && !quiet {
          Terminal.error.line(
            "The server cannot count tokens of words (POST /tokenize); prompt lengths are approximate.")
        }
      } else {
        units = try await discovery.tokens(vocabularySize: vocabSize)
      }
    }
    let requests = try dataset.requests(unitCount: units?.count ?? 1)
    try checkProtocol(requests)
    let sender = BenchSender(
      backend: backend, client: client, model: name, units: units, addedTokens: added, temperature: temperature,
      ignoresEOS: !disableIgnoreEos, extra: try extraMembers())
    try await warmUp(sender, requests)
    if flushCache { _ = try await client.post("/flush_cache", .object(JSONObject())) }

    // Bodies are made beforehand, so that making them takes no time from the measurement.
    let bodies = requests.map(sender.body)
    let arrivals =
      requests.allSatisfy { $0.arrival != nil }
      ? requests.map { $0.arrival! }
      : BenchDataset.poissonArrivals(count: requests.count, rate: requestRate, seed: dataset.seed)
    let bar = ProgressBar("Requests", total: Double(requests.count), isQuiet: quiet)
    let cpuBefore = cpuSeconds()
    let records = try await BenchDriver(arrivals: arrivals, maxConcurrency: maxConcurrency).run(
      send: { await sender.send(bodies[$0]) },
      progress: { record in bar.advance(note: record.error.map { "failed: \($0)" } ?? "") })
    bar.finish()
    let report = BenchReport(records, goodput: try Goodput(goodput))
    if !quiet {
      Terminal.output.write(report.completed > 0 ? report.table : report.failures)
      let share = (cpuSeconds() - cpuBefore) / report.duration
      Terminal.output.line(
        "\nThis client used \(fixed(share * 100, 0))% of a core and \(byteSize(peakResidentBytes())) at its peak.")
    }
    if let outputFile {
      var object = JSONObject([
        ("backend", .string(backend.rawValue)), ("base_url", .string(client.baseURL)), ("model", .string(name)),
        ("num_prompts", .int(Int64(requests.count))),
        ("request_rate", requestRate.isFinite ? .double(requestRate) : "inf"),
        ("max_concurrency", maxConcurrency.map { .int(Int64($0)) } ?? .null),
      ])
      for (key, value) in dataset.json { object[key] = value }
      for (key, value) in report.json { object[key] = value }
      object["client_cpu_share"] = .double((cpuSeconds() - cpuBefore) / report.duration)
      object["client_peak_rss_bytes"] = .int(Int64(peakResidentBytes()))
      if outputDetails { object["requests"] = .array(records.map(details)) }
      try emit(.object(object), to: outputFile)
    }
    if report.completed == 0 { throw CommandFailure("No request succeeded.") }
    if report.failed > 0 { throw CommandFailure("\(report.failed) of \(requests.count) requests failed.") }
  }

  private func checkProtocol(_ requests: [BenchRequest]) throws {
    for (index, request) in requests.enumerated() {
      switch request.prompt {
      case .messages where backend != .openaiChat:
        throw CommandFailure.usage("Request \(index + 1) is a conversation; conversations need --backend openai-chat.")
      case .tokens where !backend.takesTokens:
        throw CommandFailure.usage("Request \(index + 1) holds token ids, which --backend openai-chat does not take.")
      default: break
      }
    }
  }

  /// Sends requests that share nothing with those that are measured, as far as prompts are synthetic.
  private func warmUp(_ sender: BenchSender, _ requests: [BenchRequest]) async throws {
    guard warmupRequests > 0 else { return }
    var strangers = requests
    if let units = sender.units {
      strangers = BenchDataset.random(
        count: warmupRequests, inputLength: min(64, dataset.randomInputLen), outputLength: 8, rangeRatio: 1,
        unitCount: units.count, seed: ~dataset.seed)
    }
    for index in 0..<warmupRequests {
      let record = await sender.send(sender.body(strangers[index % strangers.count]))
      if let error = record.error {
        throw CommandFailure("The warm-up request failed (\(error)): \(record.detail ?? "")")
      }
    }
  }

  private func details(_ record: BenchRecord) -> JSONValue {
    .object(
      JSONObject([
        ("prompt_tokens", .int(Int64(record.promptTokens))), ("output_tokens", .int(Int64(record.outputTokens))),
        ("cached_tokens", .int(Int64(record.cachedTokens))), ("sent", .double(record.sent)),
        ("ttft", record.timeToFirstToken.map { .double($0) } ?? .null), ("latency", .double(record.latency)),
        ("error", record.error.map { .string($0) } ?? .null),
      ]))
  }
}

/// Writes a benchmark's result.
func emit(_ value: JSONValue, to path: String) throws {
  let text = value.compactText + "\n"
  if path == "-" { Terminal.output.write(text) } else { try writeFile(path, Array(text.utf8)) }
}
