import ApusCore
import ApusEngine
import ApusExecution
import ApusModels
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
      it. Of a mixture of experts only those count that the step's rows chose.

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
  @Flag(help: "Also shows how a decoding step's time is spent, by operation, over all layers.")
  var operations = false
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
      Terminal.output.line(
        "\(model.architecture), \(model.dtype), output layer \(model.outputDtype), \(byteSize(model.weightBytes)), "
          + backend.name)
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
        let active = try runner.activeWeightBytes(
          count, contexts: Array(stride(from: tokens, to: tokens + steps, by: steps / 8)), pagesEach: pagesEach)
        var result = Measurement(
          name: "decode batch \(count) context \(tokens)", unit: "tokens/s",
          shape: [("batch", count), ("context", tokens), ("active_weight_bytes", active)], samples: [],
          ceilingName: "reading active weights once a step")
        for _ in 0..<options.samples {
          var step = 0
          let seconds = options.seconds {
            runner.decode(count, context: tokens + step % steps, pagesEach: pagesEach)
            step += 1
          }
          result.samples.append(Double(count) / seconds)
          let read = options.seconds { _ = backend.readMemory(memory) }
          result.ceilingSamples.append(
            Double(count) * Double(memory.byteCount) / read / Double(max(1, active)))
        }
        add(result)
        if active != model.weightBytes, !options.quiet {
          Terminal.output.line("  weights read in a step: \(byteSize(active)) of \(byteSize(model.weightBytes))")
        }
        if operations, !options.quiet {
          let profile = OperationProfile()
          runner.profile = profile
          var step = 0
          let seconds = options.seconds {
            runner.decode(count, context: tokens + step % steps, pagesEach: pagesEach)
            step += 1
          }
          runner.profile = nil
          printOperations(profile, passes: step, secondsEach: seconds)
        }
      }
    }
    try options.write(
      results,
      [
        ("architecture", .string(model.architecture)), ("dtype", .string(model.dtype)),
        ("output_dtype", .string(model.outputDtype)), ("kv_dtype", .string(model.kvDtype)),
        ("weight_bytes", .int(Int64(model.weightBytes))),
        ("backend", .string(backend.name)), ("samples", .int(Int64(options.samples))),
      ])
  }

  /// Milliseconds of a pass by operation, those of all layers together, the longest first.
  private func printOperations(_ profile: OperationProfile, passes: Int, secondsEach: Double) {
    var sums: [String: Double] = [:]
    for (name, time) in profile.times {
      let kind = name.hasPrefix("layers.") ? String(name.split(separator: ".", maxSplits: 2).last ?? "") : name
      sums[kind, default: 0] += time.seconds / Double(passes)
    }
    sums["logits, sampling, rest"] = secondsEach - sums.values.reduce(0, +)
    for (name, seconds) in sums.sorted(by: { ($1.value, $0.key) < ($0.value, $1.key) }) {
      let share = "\(fixed(100 * seconds / secondsEach, 1))%"
      Terminal.output.line("  " + name.padded(40) + "\(fixed(1000 * seconds, 3)) ms".aligned(14) + share.aligned(9))
    }
  }
}
