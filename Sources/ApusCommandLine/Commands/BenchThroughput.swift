import ApusCore
import ApusEngine
import ApusExecution
import ApusTensors
import ArgumentParser
import Glibc

/// `apus bench throughput`
struct BenchThroughput: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "throughput",
    abstract: "Measures a model's forward passes over static batches: prefill and decode by batch and context.",
    discussion: """
      No scheduler and no server take part: each figure is of passes of one kind, sampling included. Decode stands beside \
      the tokens per second that reading the weights once per step would allow at the memory speed measured in turns with \
      it.

      Examples:
        apus bench throughput models/Qwen2.5-0.5B-Instruct
        apus bench throughput models/Qwen2.5-0.5B-Instruct --load-format dummy --quantization int4 --batch 1 --batch 16
        apus bench throughput --compare before.json after.json
      """)

  @OptionGroup(title: "Model and engine") var engine: EngineOptions
  @Option(help: ArgumentHelp("Sequences that decode. May be repeated. Default: 1, 8 and 32.", valueName: "count"))
  var batch: [Int] = []
  @Option(help: ArgumentHelp("Tokens that each sequence holds. May be repeated.", valueName: "tokens"))
  var context: [Int] = [512]
  @Option(
    help: ArgumentHelp(
      "Tokens of a prompt that is computed; 0 leaves prefill out. May be repeated.", valueName: "tokens"))
  var prompt: [Int] = [512]
  @OptionGroup var options: MeasurementOptions

  func validate() throws {
    for count in batch where !(1...4096).contains(count) {
      throw ValidationError("--batch must be in 1...4096, got \(count).")
    }
    for tokens in context where tokens < 1 { throw ValidationError("--context must be at least 1, got \(tokens).") }
    for tokens in prompt where tokens < 0 { throw ValidationError("--prompt must be at least 0, got \(tokens).") }
  }

  func run() async throws {
    if try options.printsComparison() { return }
    var configuration = try await engine.configuration(isQuiet: options.quiet)
    let batches = batch.isEmpty ? [1, 8, 32] : batch
    let steps = 64
    let most = batches.max()!
    let longest = max((context.max() ?? 1) + steps, prompt.max() ?? 1)
    configuration.maxRunningRequests = max(configuration.maxRunningRequests, most)
    let pagesEach = (longest + 15) / 16
    configuration.maxTotalTokens = configuration.maxTotalTokens ?? most * pagesEach * 16
    let backend = try CPUBackend(threads: configuration.threads)
    let loaded = try ModelLoader.load(Engine.modelOptions(configuration), backend: backend)
    let model = loaded.description
    guard longest <= model.contextLength, most * pagesEach <= model.kvPageCount else {
      throw CommandFailure(
        "\(most) sequences of \(longest) tokens do not fit: the context is \(model.contextLength) and the cache holds "
          + "\(model.kvCapacityTokens) tokens.", status: ExitStatus.missingInput)
    }
    let runner = StaticBatchRunner(loaded.steps, vocabulary: model.vocabularySize)
    let memory = try CPUBackend.hostMemory(byteCount: 256 << 20)
    memset(memory.address, 1, memory.byteCount)
    if !options.quiet {
      Terminal.output.line("\(model.architecture), \(model.dtype), \(byteSize(model.weightBytes)), \(backend.name)")
      Terminal.output.line(Measurement.header)
    }
    var results: [Measurement] = []
    func add(_ result: Measurement) {
      results.append(result)
      if !options.quiet { Terminal.output.line(result.line) }
    }
    for tokens in prompt where tokens > 0 {
      var result = Measurement(
        name: "prefill \(tokens)", unit: "tokens/s", shape: [("prompt", tokens)], samples: [])
      for _ in 0..<options.samples {
        let seconds = options.seconds { runner.prefill(tokens, chunk: model.maxTokensPerStep) }
        result.samples.append(Double(tokens) / seconds)
      }
      add(result)
    }
    for tokens in context {
      for count in batches {
        var result = Measurement(
          name: "decode batch \(count) context \(tokens)", unit: "tokens/s",
          shape: [("batch", count), ("context", tokens)], samples: [], ceilingName: "reading weights once a step")
        for _ in 0..<options.samples {
          var step = 0
          let seconds = options.seconds {
            runner.decode(count, context: tokens + step % steps, pagesEach: pagesEach)
            step += 1
          }
          result.samples.append(Double(count) / seconds)
          let read = options.seconds { _ = backend.readMemory(memory) }
          result.ceilingSamples.append(
            Double(count) * Double(memory.byteCount) / read / Double(max(1, model.weightBytes)))
        }
        add(result)
      }
    }
    try options.write(
      results,
      [
        ("architecture", .string(model.architecture)), ("dtype", .string(model.dtype)),
        ("kv_dtype", .string(model.kvDtype)), ("weight_bytes", .int(Int64(model.weightBytes))),
        ("backend", .string(backend.name)), ("samples", .int(Int64(options.samples))),
      ])
  }
}
