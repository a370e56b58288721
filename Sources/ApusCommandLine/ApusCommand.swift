import ApusCore
import ArgumentParser
import Glibc

/// The program: arguments in, exit status out.
public enum ApusProgram {
  /// The version of the program and of everything in this package.
  public static let version = "0.1.0"

  /// Runs the command that the arguments name.
  /// - Parameter arguments: the words after the program's name.
  /// - Returns: the exit status.
  public static func run(_ arguments: [String]) async -> Int32 {
    // A closed pipe is reported by the write that meets it.
    signal(SIGPIPE, SIG_IGN)
    do {
      var command = try await ApusCommand.asyncParseAsRoot(arguments)
      if var command = command as? any AsyncParsableCommand {
        try await command.run()
      } else {
        try command.run()
      }
      return ExitStatus.success
    } catch {
      return report(error, arguments: arguments)
    }
  }

  /// Says what went wrong in one sentence on standard error and picks the exit status.
  private static func report(_ error: any Error, arguments: [String]) -> Int32 {
    switch error {
    case let failure as CommandFailure:
      if !failure.message.isEmpty { Terminal.error.line("apus: \(failure.message)") }
      return failure.status
    case let error as EngineError:
      Terminal.error.line("apus: \(error.message)")
      return error.exitStatus
    case is CancellationError:
      return ExitStatus.interrupted
    default:
      break
    }
    let status = ApusCommand.exitCode(for: error).rawValue
    if status == ExitStatus.success {
      Terminal.output.line(ApusCommand.fullMessage(for: error))
    } else if status == ExitStatus.usage {
      let sentence = commandModel().flatMap { FlagSuggestions(root: $0).complaint(about: arguments) }
      Terminal.error.line("apus: \(sentence ?? ApusCommand.message(for: error))")
    } else if let message = Optional(ApusCommand.message(for: error)), !message.isEmpty {
      Terminal.error.line("apus: \(message)")
    }
    return status
  }

  /// The commands and their flags as declared.
  package static func commandModel() -> CommandModel? {
    guard let dump = try? JSONValue.parse(ApusCommand._dumpHelp()) else { return nil }
    return CommandModel(dump: dump)
  }

  /// The content of `docs/reference/flags.md`.
  package static func referencePage() -> String { commandModel()?.referencePage() ?? "" }
}

/// `apus`: the root of all commands.
struct ApusCommand: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "apus",
    abstract: "Serves large language models.",
    discussion: """
      A checkpoint directory goes in; an OpenAI-compatible server, a terminal chat or a file of answers comes out.

      Examples:
        apus serve models/Qwen2.5-0.5B-Instruct --port 8000
        apus chat models/Qwen2.5-0.5B-Instruct
        apus generate models/Qwen2.5-0.5B-Instruct --input prompts.jsonl --output answers.jsonl
        apus bench serving --base-url http://127.0.0.1:8000 --dataset random --num-prompts 100
        apus doctor
      """,
    version: ApusProgram.version,
    groupedSubcommands: [
      CommandGroup(name: "Running models:", subcommands: [Serve.self, Chat.self, Generate.self]),
      CommandGroup(name: "Measuring:", subcommands: [Bench.self]),
      CommandGroup(
        name: "Looking inside:", subcommands: [Inspect.self, Tokenize.self, Render.self, GrammarCommand.self]),
      CommandGroup(name: "Looking around:", subcommands: [Doctor.self, Reference.self, Version.self]),
    ])
}

/// `apus version`
struct Version: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Prints the version.", discussion: "Example:\n  apus version")

  func run() { Terminal.output.line("apus \(ApusProgram.version)") }
}

/// `apus reference`
struct Reference: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Prints the reference page of all commands and flags, in Markdown.",
    discussion: "Example:\n  apus reference > docs/reference/flags.md")

  func run() { Terminal.output.write(ApusProgram.referencePage()) }
}
