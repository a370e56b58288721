import ApusCore
import ApusModels
import ApusTokenization
import ArgumentParser

/// `apus inspect`
struct Inspect: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Says what a checkpoint holds, without loading it.",
    discussion: """
      Reads headers and configuration files only: architecture, sizes, tensors by format, chat template. Then says why \
      the checkpoint would be refused, if it would be; the exit status is 1 in that case.

      Examples:
        apus inspect models/Qwen2.5-0.5B-Instruct
        apus inspect model.gguf --json
      """)

  @Argument(
    help: ArgumentHelp("A checkpoint directory or a GGUF file.", valueName: "path"), completion: .directory)
  var path: String
  @Flag(help: "Prints JSON.")
  var json = false

  func run() throws {
    guard fileExists(path) else {
      throw CommandFailure("There is no file or directory '\(path)'.", status: ExitStatus.missingInput)
    }
    let inspection = CheckpointInspection(path: path)
    var refusals = inspection.refusals
    func check(_ body: () throws(EngineError) -> Void) {
      do throws(EngineError) { try body() } catch {
        if !refusals.contains(error.message) { refusals.append(error.message) }
      }
    }
    check { () throws(EngineError) in _ = try ChatTemplateSet.load(directory: path) }
    if inspection.lines.contains(where: { $0.label == "tokenizer" && $0.text != "none" }) {
      check { () throws(EngineError) in _ = try Tokenizer.load(directory: path) }
    }
    let lines = inspection.lines.map { ($0.label, $0.text) }
    if json {
      var writer = JSONWriter()
      writer.object { writer in
        writer.member("path", path)
        // Tensors come in lines of a type each; all else is there once.
        for (label, text) in lines where label != "tensors" {
          writer.member(label.split(separator: " ").joined(separator: "_"), text)
        }
        writer.key("tensors")
        writer.array { writer in for (label, text) in lines where label == "tensors" { writer.value(text) } }
        writer.member("servable", refusals.isEmpty)
        writer.key("refusals")
        writer.array { writer in for refusal in refusals { writer.value(refusal) } }
      }
      Terminal.output.write(writer.text + "\n")
    } else {
      let width = lines.map(\.0.count).max() ?? 0
      for (label, text) in lines {
        Terminal.output.write(label + String(repeating: " ", count: width - label.count + 2) + text + "\n")
      }
      for refusal in refusals { Terminal.output.write("refused: \(refusal)\n") }
      if refusals.isEmpty { Terminal.output.write("This build can serve it.\n") }
    }
    if !refusals.isEmpty { throw ExitCode(ExitStatus.failure) }
  }
}
