import ApusConversion
import ApusCore
import ArgumentParser
import Synchronization

/// `apus convert`
struct Convert: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Writes a checkpoint in another format.",
    discussion: """
      Reads what `apus serve` reads: a Hugging Face directory, plain or quantised, or a GGUF file. Formats: \
      \(ConversionFormat.named.map(\.name).joined(separator: ", ")). The first five write a Hugging Face directory, the \
      others a GGUF file. Embeddings, norms and the output layer stay dense in quantised formats. Says at the end how \
      far the numbers are from those that were read.

      Examples:
        apus convert models/Qwen2.5-0.5B-Instruct qwen-int8 --format int8
        apus convert models/Qwen2.5-0.5B-Instruct qwen-int4 --format int4 --group-size 64
        apus convert models/Qwen2.5-0.5B-Instruct qwen.gguf --format gguf-q8_0 --report errors.json
        apus convert llama.Q4_K_M.gguf llama-hf --format bf16
      """)

  @Argument(
    help: ArgumentHelp("A checkpoint directory or a GGUF file.", valueName: "input"), completion: .directory)
  var input: String
  @Argument(
    help: ArgumentHelp("The directory or, for GGUF, the file to write.", valueName: "output"),
    completion: .directory)
  var output: String
  @Option(help: ArgumentHelp("The format to write; see above.", valueName: "name"))
  var format: String
  @Option(help: ArgumentHelp("int4: inputs that share a scale.", valueName: "n"))
  var groupSize = 128
  @Flag(help: "int4: stores zero points, so that groups need not be centred on zero.")
  var asymmetric = false
  @Option(
    help: ArgumentHelp(
      "int4: how words are packed: \(IntegerLayout.allCases.map(\.rawValue).joined(separator: ", ")).",
      valueName: "name"))
  var layout = IntegerLayout.compressedTensors.rawValue
  @Option(
    help: ArgumentHelp(
      "Leaves a tensor or module dense; * stands for any text. May be given several times.", valueName: "pattern"))
  var keep: [String] = []
  @Flag(help: "GGUF: quantises the embedding table, too.")
  var quantizeEmbeddings = false
  @Flag(help: "Quantises the output layer, too.")
  var quantizeLmHead = false
  @Option(
    help: ArgumentHelp(
      "The number format of what stays dense in a quantised format: fp32, fp16 or bf16. By default its own.",
      valueName: "name"))
  var denseType: String?
  @Option(help: ArgumentHelp("The size of safetensors files, such as 5GB or 500MB.", valueName: "size"))
  var maxShardSize = "5GB"
  @Flag(help: "Replaces the output if it exists.")
  var force = false
  @Option(help: ArgumentHelp("Writes the error of every tensor as JSON.", valueName: "file"), completion: .file())
  var report: String?
  @Option(help: ArgumentHelp("Threads that compute; by default one for each core.", valueName: "n"))
  var threads: Int?
  @Flag(help: "Prints no progress and no summary.")
  var quiet = false

  func run() throws {
    let options = try makeOptions()
    if let report, fileExists(report), !force {
      throw CommandFailure.usage("\(report) exists; add --force to replace it, or choose another name.")
    }
    let bar = ProgressBar("Converting", total: 0, isQuiet: quiet)
    let interrupts = Interrupts()
    let result: ConversionReport
    do {
      defer { bar.finish() }
      result = try withExtendedLifetime(interrupts) {
        // The first Ctrl-C ends the work between two pieces, so that nothing half-written stays.
        let stop = StopFlag()
        interrupts.set { stop.raise() }
        return try Converter.convert(options, threads: threads) { done, total, tensor in
          bar.update(done: Double(done), total: Double(total), note: tensor)
          return !stop.isRaised
        }
      }
    } catch let error as EngineError where error.code == .aborted {
      throw CommandFailure(error.message, status: ExitStatus.interrupted)
    }
    if let report { try writeFile(report, Array((result.json + "\n").utf8)) }
    if !quiet { summarize(result) }
  }

  private func makeOptions() throws -> ConversionOptions {
    guard let format = ConversionFormat(name: format) else {
      let names = ConversionFormat.named.map(\.name).joined(separator: ", ")
      throw CommandFailure.usage("'\(self.format)' is no format; these are: \(names).")
    }
    guard let layout = IntegerLayout(rawValue: layout) else {
      let names = IntegerLayout.allCases.map(\.rawValue).joined(separator: ", ")
      throw CommandFailure.usage("'\(self.layout)' is no layout; these are: \(names).")
    }
    guard fileExists(input) else {
      throw CommandFailure("There is no file or directory '\(input)'.", status: ExitStatus.missingInput)
    }
    var options = ConversionOptions(input: input, output: output, format: format)
    options.layout = layout
    options.groupSize = groupSize
    options.isSymmetric = !asymmetric
    options.kept = keep
    options.quantizesEmbeddings = quantizeEmbeddings
    options.quantizesOutput = quantizeLmHead
    options.overwrites = force
    if let denseType {
      guard case .dense(let type)? = ConversionFormat(name: denseType) else {
        throw CommandFailure.usage("--dense-type must be fp32, fp16 or bf16, not '\(denseType)'.")
      }
      options.denseType = type
    }
    guard let size = Self.bytes(maxShardSize) else {
      throw CommandFailure.usage("--max-shard-size must be a size such as 5GB or 500MB, not '\(maxShardSize)'.")
    }
    options.maxShardBytes = size
    return options
  }

  /// A size in bytes: digits, with a unit of powers of 1000 (`KB`) or 1024 (`KiB`).
  static func bytes(_ text: String) -> Int? {
    let digits = text.prefix { $0.isASCII && $0.isNumber }
    let units = [
      "": 1, "B": 1, "KB": 1000, "MB": 1_000_000, "GB": 1_000_000_000, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30,
    ]
    guard let number = Int(digits), let unit = units[text.dropFirst(digits.count).uppercased()] else { return nil }
    let (bytes, overflow) = number.multipliedReportingOverflow(by: unit)
    return overflow || bytes < 1 ? nil : bytes
  }

  private func summarize(_ result: ConversionReport) {
    func percent(_ error: Double) -> String {
      error < 1e-4 && error > 0 ? "\(fixed(error * 1e6, 1)) ppm" : "\(fixed(error * 100, 3)) %"
    }
    Terminal.output.line("Wrote \(result.output): \(byteSize(result.byteCount)) in \(result.tensors.count) tensors.")
    var types: [String: (count: Int, bytes: Int)] = [:]
    for tensor in result.tensors {
      types[tensor.writtenAs, default: (0, 0)].count += 1
      types[tensor.writtenAs, default: (0, 0)].bytes += tensor.byteCount
    }
    for (type, total) in types.sorted(by: { ($1.value.bytes, $0.key) < ($0.value.bytes, $1.key) }) {
      Terminal.output.line("  \(total.count) as \(type), \(byteSize(total.bytes))")
    }
    let worst = result.worst(5)
    if worst.isEmpty {
      Terminal.output.line("Every number was kept as it was.")
    } else {
      Terminal.output.line("Root mean square error over that of the weights: \(percent(result.relativeError)). Worst:")
      for tensor in worst {
        Terminal.output.line(
          "  \(tensor.name) (\(tensor.writtenAs)): \(percent(tensor.relativeError)), at most \(tensor.largestError)")
      }
    }
    // A model may have a hundred tensors of one kind.
    for note in result.notes.prefix(8) { Terminal.output.line("note: \(note)") }
    if result.notes.count > 8 { Terminal.output.line("note: \(result.notes.count - 8) more in --report.") }
  }
}

/// A flag that a signal raises.
private final class StopFlag: Sendable {
  private let flag = Atomic(false)
  var isRaised: Bool { flag.load(ordering: .relaxed) }
  func raise() { flag.store(true, ordering: .relaxed) }
}
