import ApusCore
import ApusEngine
import ApusExecution
import ApusTensors
import ApusTesting
import ApusTokenization
import ArgumentParser

/// `apus bench quality`
struct BenchQuality: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "quality",
    abstract: "Measures what formats of weights and of the K/V cache cost: how far predictions move from float32's.",
    discussion: """
      The same text goes through the model in float32, whatever its checkpoint stores dequantised, and through the model in \
      each format. Reported are the mean and the 99th percentile of the Kullback-Leibler divergence per token (0 where \
      nothing changed), how often both find the same token most likely, and the text's perplexity.

      int8, int8-group, fp8 and int4 have their output layer in int8, as --quantization has by default; with -dense-output \
      behind their names it stays in float32. output-int8 rounds the output layer alone.

      The text is a file (--text), or else the conversations of the questions beside the weights (evaluation.jsonl), which \
      the demo model has.

      Examples:
        apus bench quality
        apus bench quality models/Qwen2.5-0.5B-Instruct --text book.txt --format int8 --format int4
        apus bench quality model.gguf --text book.txt --format stored --json quality.json
      """)

  /// A way to load the model.
  enum Format: String, ExpressibleByArgument, CaseIterable {
    case stored, bfloat16, float16, int8, fp8, int4
    case int8Group = "int8-group"
    case outputInt8 = "output-int8"
    case int8DenseOutput = "int8-dense-output"
    case int8GroupDenseOutput = "int8-group-dense-output"
    case fp8DenseOutput = "fp8-dense-output"
    case int4DenseOutput = "int4-dense-output"
    case kvBfloat16 = "kv-bfloat16"
    case kvInt8 = "kv-int8"
    case kvFp8 = "kv-fp8"

    /// Weights of the reference with another cache, or the checkpoint's own type with other weights.
    func apply(to configuration: inout EngineConfiguration) {
      switch self {
      case .stored: (configuration.dtype, configuration.quantization) = (.auto, nil)
      case .bfloat16: configuration.dtype = .bfloat16
      case .float16: configuration.dtype = .float16
      case .int8, .int8DenseOutput: configuration.quantization = .int8
      case .int8Group, .int8GroupDenseOutput: configuration.quantization = .int8Group
      case .fp8, .fp8DenseOutput: configuration.quantization = .fp8
      case .int4, .int4DenseOutput: configuration.quantization = .int4
      case .outputInt8: configuration.outputLayerQuantization = .int8
      case .kvBfloat16: configuration.kvCacheDtype = .bfloat16
      case .kvInt8: configuration.kvCacheDtype = .int8
      case .kvFp8: configuration.kvCacheDtype = .fp8
      }
      if rawValue.hasSuffix("-dense-output") { configuration.outputLayerQuantization = .dense }
    }
  }

  @OptionGroup(title: "Model and engine") var engine: EngineOptions
  @Option(help: ArgumentHelp("A text file to predict; - is standard input.", valueName: "path"), completion: .file())
  var text: String?
  @Option(help: ArgumentHelp("A format to measure. May be repeated. Default: all but stored.", valueName: "format"))
  var format: [Format] = []
  @Option(help: ArgumentHelp("Tokens compared at most.", valueName: "tokens"))
  var tokens = 4096
  @Option(help: ArgumentHelp("A text is cut into pieces of so many tokens, each read by itself.", valueName: "tokens"))
  var context = 512
  @Option(
    name: [.customLong("json"), .long],
    help: ArgumentHelp("Writes every figure as JSON; - is standard output.", valueName: "path"))
  var outputFile: String?
  @Flag(name: [.long, .short], help: "Prints no progress and no table.")
  var quiet = false

  func validate() throws {
    if tokens < 1 { throw ValidationError("--tokens must be at least 1, got \(tokens).") }
    if context < 2 { throw ValidationError("--context must be at least 2, got \(context).") }
    if engine.quantization != nil || engine.outputLayerQuantization != .auto || engine.dtype != .auto
      || engine.kvCacheDtype != .auto
    {
      throw ValidationError("Name what is to be measured with --format; the reference is float32.")
    }
  }

  func run() async throws {
    var base = try await engine.configuration(isQuiet: quiet)
    (base.dtype, base.quantization, base.kvCacheDtype) = (.float32, .dense, .float32)
    base.maxTotalTokens = (context + 15) / 16 * 16
    base.maxRunningRequests = 1
    let pieces = try pieces(base)
    let count = pieces.reduce(0) { $0 + $1.count }
    let backend = try CPUBackend(threads: base.threads)
    let reference = try ModelLoader.load(Engine.modelOptions(base), backend: backend)
    let formats = format.isEmpty ? Format.allCases.filter { $0 != .stored } : format
    if !quiet {
      Terminal.output.line(
        "\(reference.description.architecture), \(count) tokens in \(pieces.count) pieces, against float32 of "
          + "\(byteSize(reference.description.weightBytes))")
    }
    var results: [JSONValue] = []
    var lines = [Self.header]
    let bar = ProgressBar("Comparing", total: Double(count * formats.count), isQuiet: quiet || outputFile == "-")
    for format in formats {
      var configuration = base
      format.apply(to: &configuration)
      let judged = try ModelLoader.load(Engine.modelOptions(configuration), backend: backend)
      var divergence = Divergence()
      for piece in pieces {
        let positions = Array(piece.indices)
        let expected = try reference.steps.promptLogits(piece, positions: positions)
        let found = try judged.steps.promptLogits(piece, positions: positions)
        for position in positions {
          divergence.add(
            reference: expected[position], other: found[position],
            next: position + 1 < piece.count ? Int(piece[position + 1]) : nil)
        }
        bar.advance(by: Double(piece.count), note: format.rawValue)
      }
      let result = Result(format: format, divergence: divergence, description: judged.description)
      results.append(result.json)
      lines.append(result.line)
    }
    bar.finish()
    if !quiet && outputFile != "-" { lines.forEach { Terminal.output.line($0) } }
    if let outputFile {
      try emit(
        [
          "architecture": .string(reference.description.architecture), "tokens": .int(Int64(count)),
          "pieces": .int(Int64(pieces.count)), "backend": .string(backend.name), "results": .array(results),
        ], to: outputFile)
    }
  }

  // MARK: Text

  /// The tokens to predict, in pieces that fit the context.
  private func pieces(_ configuration: EngineConfiguration) throws -> [[TokenID]] {
    let tokenizer = try Engine.loadTokenizer(configuration)
    var pieces: [[TokenID]] = []
    if let text {
      let ids = try tokenizer.encode(String(decoding: try readFile(text), as: UTF8.self), addSpecialTokens: false)
      for start in stride(from: 0, to: ids.count, by: context) {
        pieces.append(Array(ids[start..<min(start + context, ids.count)]))
      }
    } else {
      let path = "\(configuration.modelPath)/evaluation.jsonl"
      guard fileExists(path) else { throw CommandFailure.usage("There is no '\(path)'; name a text with --text.") }
      let templates = try ChatTemplateSet.load(directory: configuration.modelPath)
      for question in try EvalQuestion.read(try readFile(path)) {
        pieces.append(Array(try ids(question, tokenizer, templates).prefix(context)))
      }
    }
    var left = tokens
    for index in pieces.indices {
      pieces[index] = Array(pieces[index].prefix(left))
      left -= pieces[index].count
    }
    pieces.removeAll(where: \.isEmpty)
    guard !pieces.isEmpty else { throw CommandFailure("The text is empty.", status: ExitStatus.invalidInput) }
    return pieces
  }

  /// A question and, where it is a text, its answer, as the model reads them.
  private func ids(
    _ question: EvalQuestion, _ tokenizer: Tokenizer, _ templates: ChatTemplateSet
  ) throws -> [TokenID] {
    switch question.input {
    case .tokens(let ids): return ids
    case .prompt(let text): return try tokenizer.encode(text, addSpecialTokens: false)
    case .messages(let messages, let tools, let variables):
      var prompt = ChatPrompt(messages: messages, tools: tools, variables: variables)
      if case .exact(let answer) = question.rule {
        prompt.messages = .array((messages.arrayValue ?? []) + [["role": "assistant", "content": .string(answer)]])
        prompt.addGenerationPrompt = false
      }
      return try tokenizer.encode(templates.render(prompt), addSpecialTokens: false)
    }
  }

  // MARK: Report

  /// What one format cost.
  private struct Result {
    var format: Format
    var divergence: Divergence
    var description: ModelDescription

    var json: JSONValue {
      let nats = Summary(divergence.nats)
      return [
        "format": .string(format.rawValue), "tokens": .int(Int64(nats.count)), "kl_mean": .double(nats.mean),
        "kl_median": .double(nats.median), "kl_p99": .double(nats.p99), "kl_max": .double(nats.maximum),
        "agreement": .double(divergence.agreement), "perplexity": .double(divergence.perplexity),
        "reference_perplexity": .double(divergence.referencePerplexity),
        "weight_bytes": .int(Int64(description.weightBytes)), "output_dtype": .string(description.outputDtype),
        "regrouped_layers": .int(Int64(description.regroupedLayers)),
      ]
    }

    var line: String {
      let nats = Summary(divergence.nats)
      let columns = [
        byteSize(description.weightBytes), fixed(nats.mean, 5), fixed(nats.p99, 5),
        "\(fixed(divergence.agreement * 100, 2))%", fixed(divergence.perplexity, 3),
        fixed(divergence.perplexity / divergence.referencePerplexity, 4), "\(description.regroupedLayers)",
      ]
      return format.rawValue.padded(BenchQuality.nameWidth)
        + zip(columns, BenchQuality.widths).map { $0.aligned($1) }.joined()
    }
  }

  private static let nameWidth = 24
  private static let widths = [12, 11, 11, 12, 12, 10, 11]
  private static let header =
    "Format".padded(nameWidth)
    + zip(["weights", "KL mean", "KL p99", "same first", "perplexity", "ratio", "regrouped"], widths)
    .map { $0.aligned($1) }.joined()
}
