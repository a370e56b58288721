import ApusCore
import ApusEngine
import ApusExecution
import ApusModels
import ApusTensors
import ApusTokenization
import ArgumentParser
import Glibc

/// `apus bench quality`
struct BenchQuality: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "quality",
    abstract: "Measures how far formats of weights and of the K/V cache move a model's predictions.",
    discussion: """
      A text is computed in float32 and in each format. For every token the distributions of the next one are compared: \
      the mean Kullback-Leibler divergence from float32's (in nats for a token), the largest one, and how often both have \
      the same most likely token. Perplexity is of the text itself. The text is cut into pieces of --piece tokens that know \
      nothing of each other; logits of all tokens are kept, so that memory is tokens times vocabulary times 4 bytes.

      Examples:
        apus bench quality Models/apus-demo --text README.md
        apus bench quality models/Qwen2.5-0.5B-Instruct --text book.txt --tokens 256 --format int8 --format int4
      """)

  /// What float32 is compared with.
  enum Format: String, CaseIterable, ExpressibleByArgument {
    case bfloat16, float16, int8
    case int8Group = "int8-group"
    case fp8, int4
    case kvInt8 = "kv-int8"
    case kvFP8 = "kv-fp8"

    func apply(to options: inout ModelOptions) {
      switch self {
      case .bfloat16: options.dtype = .bfloat16
      case .float16: options.dtype = .float16
      case .int8: options.quantization = .int8
      case .int8Group: options.quantization = .codes(.int8)
      case .fp8: options.quantization = .codes(.float8)
      case .int4: options.quantization = .codes(.int4)
      case .kvInt8: options.kvDType = .int8
      case .kvFP8: options.kvDType = .float8
      }
    }
  }

  @OptionGroup(title: "Model and engine") var engine: EngineOptions
  @Option(
    help: ArgumentHelp("Text whose tokens are predicted; - is standard input.", valueName: "path"),
    completion: .file())
  var text: String
  @Option(help: ArgumentHelp("The most tokens of the text.", valueName: "count"))
  var tokens = 512
  @Option(help: ArgumentHelp("Tokens of a piece.", valueName: "count"))
  var piece = 128
  @Option(help: ArgumentHelp("Formats. May be repeated. Default: all.", valueName: "format"))
  var format: [Format] = []
  @Option(
    name: [.customLong("json"), .long],
    help: ArgumentHelp("Writes every figure as JSON; - is standard output.", valueName: "path"))
  var outputFile: String?
  @Flag(name: [.long, .short], help: "Prints no table.")
  var quiet = false

  func validate() throws {
    if !(2...65536).contains(tokens) { throw ValidationError("--tokens must be in 2...65536, got \(tokens).") }
    if !(2...8192).contains(piece) { throw ValidationError("--piece must be in 2...8192, got \(piece).") }
  }

  /// The logits' limit in bytes.
  private static let mostBytes = 4 << 30

  /// How one format compares with float32.
  private struct Figures {
    var name: String
    var divergence = 0.0
    var largest = 0.0
    var agreement = 1.0
    var perplexity: Double
    var weightBytes: Int
    var regroupedLayers: Int

    var json: JSONValue {
      .object(
        JSONObject([
          ("format", .string(name)), ("kl_divergence", .double(divergence)),
          ("largest_kl_divergence", .double(largest)),
          ("greedy_agreement", .double(agreement)), ("perplexity", .double(perplexity)),
          ("weight_bytes", .int(Int64(weightBytes))), ("regrouped_layers", .int(Int64(regroupedLayers))),
        ]))
    }
  }

  func run() async throws {
    var configuration = try await engine.configuration(isQuiet: quiet)
    configuration.maxRunningRequests = 1
    configuration.maxTotalTokens = configuration.maxTotalTokens ?? 2 * piece + 16
    let backend = try CPUBackend(threads: configuration.threads)
    let base = try Engine.modelOptions(configuration)
    func load(_ change: (inout ModelOptions) -> Void) throws -> LoadedModel {
      var options = base
      options.dtype = .float32
      options.quantization = .dense
      options.kvDType = nil
      change(&options)
      return try ModelLoader.load(options, backend: backend)
    }
    let original = try load { _ in }
    let vocabulary = original.description.vocabularySize
    let pieces = try pieces(configuration, contextLength: original.description.contextLength)
    let count = pieces.reduce(0) { $0 + $1.count }
    guard count * vocabulary <= Self.mostBytes / 4 else {
      throw CommandFailure(
        "The logits of \(count) tokens over a vocabulary of \(vocabulary) take more than \(byteSize(Self.mostBytes)); lower --tokens.",
        status: ExitStatus.invalidInput)
    }
    let expected = try pieces.map { try original.steps.promptLogits($0, positions: Array($0.indices)) }
    var results = [
      Figures(
        name: "float32", perplexity: Self.perplexity(expected, pieces), weightBytes: original.description.weightBytes,
        regroupedLayers: 0)
    ]
    if !quiet {
      Terminal.output.line("\(original.description.architecture), \(count) tokens, \(backend.name)")
      Terminal.output.line(
        "Format".padded(14)
          + ["KL", "largest KL", "same greedy", "perplexity", "weights", "regrouped"].map { $0.aligned(13) }.joined())
      show(results[0])
    }
    for format in format.isEmpty ? Format.allCases : format {
      let loaded = try load(format.apply)
      var figures = Figures(
        name: format.rawValue, perplexity: 0, weightBytes: loaded.description.weightBytes,
        regroupedLayers: loaded.description.regroupedLayers)
      var logits: [[[Float]]] = []
      var agreed = 0
      for (tokens, originals) in zip(pieces, expected) {
        logits.append(try loaded.steps.promptLogits(tokens, positions: Array(tokens.indices)))
        for (p, q) in zip(originals, logits.last!) {
          let (divergence, agrees) = Self.compare(p, q)
          figures.divergence += divergence / Double(count)
          figures.largest = max(figures.largest, divergence)
          if agrees { agreed += 1 }
        }
      }
      figures.agreement = Double(agreed) / Double(count)
      figures.perplexity = Self.perplexity(logits, pieces)
      results.append(figures)
      if !quiet { show(figures) }
    }
    if let outputFile {
      try emit(
        .object(
          JSONObject([
            ("architecture", .string(original.description.architecture)), ("backend", .string(backend.name)),
            ("tokens", .int(Int64(count))), ("results", .array(results.map(\.json))),
          ])), to: outputFile)
    }
  }

  private func show(_ figures: Figures) {
    let columns = [
      fixed(figures.divergence, 6), fixed(figures.largest, 4), "\(fixed(figures.agreement * 100, 1))%",
      fixed(figures.perplexity, 4), byteSize(figures.weightBytes), "\(figures.regroupedLayers)",
    ]
    Terminal.output.line(figures.name.padded(14) + columns.map { $0.aligned(13) }.joined())
  }

  /// The text's tokens, cut. A piece of one token, which predicts nothing, is left out.
  private func pieces(_ configuration: EngineConfiguration, contextLength: Int) throws -> [[TokenID]] {
    let path = configuration.tokenizerPath ?? configuration.modelPath
    let tokenizer = isDirectory(path) ? try Tokenizer.load(directory: path) : try Tokenizer.load(file: path)
    let ids = try tokenizer.encode(bytes: readFile(text), addSpecialTokens: true).prefix(tokens)
    let length = min(piece, contextLength)
    let pieces = stride(from: 0, to: ids.count, by: length).map { Array(ids[$0..<min(ids.count, $0 + length)]) }
      .filter { $0.count > 1 }
    guard !pieces.isEmpty else {
      throw CommandFailure("The text of --text has fewer than two tokens.", status: ExitStatus.invalidInput)
    }
    return pieces
  }

  private static func normalizer(_ logits: [Float]) -> Double {
    let most = Double(logits.max()!)
    return most + log(logits.reduce(0.0) { $0 + exp(Double($1) - most) })
  }

  /// The Kullback-Leibler divergence from the first to the second, and whether their largest logits are at the same token.
  static func compare(_ p: [Float], _ q: [Float]) -> (divergence: Double, agrees: Bool) {
    let (a, b) = (normalizer(p), normalizer(q))
    var divergence = 0.0
    for (x, y) in zip(p, q) {
      let weight = exp(Double(x) - a)
      if weight > 0 { divergence += weight * ((Double(x) - a) - (Double(y) - b)) }
    }
    return (divergence, p.firstIndex(of: p.max()!) == q.firstIndex(of: q.max()!))
  }

  /// e to the mean negative log-probability of the pieces' tokens after their first ones.
  static func perplexity(_ logits: [[[Float]]], _ pieces: [[TokenID]]) -> Double {
    var (sum, count) = (0.0, 0)
    for (rows, tokens) in zip(logits, pieces) {
      for i in 1..<tokens.count {
        sum += normalizer(rows[i - 1]) - Double(rows[i - 1][Int(tokens[i])])
        count += 1
      }
    }
    return exp(sum / Double(count))
  }
}
