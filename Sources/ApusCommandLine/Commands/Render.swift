import ApusCore
import ApusHub
import ApusTokenization
import ArgumentParser

/// `apus render`
struct Render: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Renders a conversation with a model's chat template.",
    discussion: """
      Reads one conversation as JSON from standard input and prints the prompt exactly, with nothing added. The members \
      of the object are the template's variables: "messages", and optionally "tools", "add_generation_prompt" and any \
      others; special tokens come from the checkpoint unless the object gives them, and what neither gives is undefined. A \
      mistake that the template reports goes to standard error, with exit status 1. With --jsonl each line is a \
      conversation and is answered by one line {"rendered": "..."} or {"error": "..."}; without --template each line then \
      is {"template": "...", "variables": {...}}.

      With --harmony the object may hold "harmony_messages" in the JSON form of OpenAI's library instead of "messages", \
      and those are written exactly; else the variables are "tools", "builtin_tools", "reasoning_effort", \
      "model_identity", "knowledge_cutoff", "current_date" and "auto_drop_analysis".

      Examples:
        echo '{"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": true}' | apus render --template models/Qwen2.5-0.5B-Instruct
        apus render --template chat_template.jinja < conversation.json
        apus render --template tokenizer_config.json --jsonl < conversations.jsonl
        apus render --harmony < conversation.json
      """)

  @Option(
    help: ArgumentHelp(
      "A Jinja file, a tokenizer_config.json, a checkpoint directory, OWNER/NAME of a hub, or a built-in template's name.",
      valueName: "path"), completion: .file())
  var template: String?
  @Option(
    help: ArgumentHelp(
      "The template to take where there are several. Default: tool_use if tools are offered, else default.",
      valueName: "name"))
  var name: String?
  @Flag(help: "Writes the harmony format of gpt-oss models with the native renderer; the same as --template harmony.")
  var harmony = false
  @Option(
    help: ArgumentHelp(
      "The time that templates see, as 2026-01-15T12:00:00. Default: the machine's.", valueName: "time"))
  var now: String?
  @Flag(help: "Reads a conversation a line and answers each with a line.")
  var jsonl = false

  func validate() throws {
    if harmony && template != nil { throw ValidationError("--harmony is a template; keep it or --template.") }
    if !harmony && template == nil && !jsonl {
      throw ValidationError("--template is missing: a file, a checkpoint or a built-in name.")
    }
    if let now, ChatTemplate.LocalTime(isoFormat: now) == nil {
      throw ValidationError("--now must be a date or a time such as 2026-01-15T12:00:00, got '\(now)'.")
    }
  }

  func run() async throws {
    var command = RenderCommand(nil)
    if var path = harmony ? BuiltInChatTemplates.harmonyName : template {
      if !fileExists(path), RepositoryReference.isReference(path) {
        path = try await locateModel(path, for: .tokenizer).path
      }
      do throws(EngineError) {
        command = try RenderCommand(template: path)
      } catch {
        throw CommandFailure(
          error.message, status: error.code == .notFound ? ExitStatus.missingInput : ExitStatus.failure)
      }
    }
    command.name = name
    if let now, let time = ChatTemplate.LocalTime(isoFormat: now) { command.clock = { time } }
    guard jsonl else {
      let bytes = try readFile("-")
      do throws(EngineError) {
        Terminal.output.write(try command.render(bytes))
      } catch {
        throw CommandFailure(error.message)
      }
      return
    }
    let reader = try LineReader(path: "-")
    let output = try LineAppender(path: "-")
    while let line = try reader.next() {
      if !line.isEmpty { try output.append(command.answer(line)) }
    }
  }
}
