import ApusCore
import ArgumentParser
import Dispatch
import Synchronization

/// `apus chat`
struct Chat: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Talks with a model in the terminal.",
    discussion: """
      Answers stream as they are made. Ctrl-C stops an answer and not the program; pressed twice at an empty prompt it \
      leaves. /help lists the commands: /system, /set temperature 0.7, /undo, /retry, /save, /load, ... Input may also \
      be a pipe: each line is a message.

      Examples:
        apus chat models/Qwen2.5-0.5B-Instruct
        apus chat models/Qwen2.5-0.5B-Instruct --system 'Answer in French.' --temperature 0
        apus chat --url http://127.0.0.1:8000
        echo 'Why is the sky blue?' | apus chat models/Qwen2.5-0.5B-Instruct
      """)

  @OptionGroup(title: "Model and engine") var engine: EngineOptions
  @OptionGroup(title: "Sampling") var sampling: SamplingOptions

  @Option(
    help: ArgumentHelp(
      "Talks with this server instead of loading a model; MODEL is then the name to ask for.", valueName: "url"))
  var url: String?
  @Option(help: ArgumentHelp("The key that the server asks for. Default: $OPENAI_API_KEY.", valueName: "key"))
  var apiKey: String?
  @Option(help: ArgumentHelp("The system message.", valueName: "text"))
  var system = ""
  @Option(
    help: ArgumentHelp("Continues a conversation that /save wrote.", valueName: "path"), completion: .file())
  var load: String?
  @Flag(help: "Prints counts and speed after each answer.")
  var stats = false

  func validate() throws {
    if url != nil && (engine.modelPath != nil) {
      throw ValidationError("--url names a server and --model-path a model; keep one of them.")
    }
    if url == nil && apiKey != nil { throw ValidationError("--api-key is for a server; it needs --url.") }
  }

  func run() async throws {
    var session = ChatSession(system: system, sampling: sampling.values)
    if let load { try loadConversation(load, into: &session) }
    if let url {
      let client = try ServerClient(baseURL: url, apiKey: apiKey)
      do {
        let model = if let name = engine.model { name } else { try await client.firstModel() ?? "default" }
        try await converse(&session, with: RemoteChatBackend(client: client, model: model))
      } catch {
        await client.shutdown()
        throw serverFailure(error, at: client.baseURL)
      }
      await client.shutdown()
    } else {
      let running = try await startEngine(engine)
      do {
        try await converse(&session, with: LocalChatBackend(service: running.service))
      } catch {
        await running.shutdown()
        throw error
      }
      await running.shutdown()
    }
  }

  private func loadConversation(_ path: String, into session: inout ChatSession) throws {
    let bytes = try readFile(path)
    let document: JSONValue
    do {
      document = try JSONValue.parse(bytes)
    } catch {
      throw CommandFailure("\(path) is not JSON: \(error).", status: ExitStatus.invalidInput)
    }
    try session.load(document)
  }

  /// Reads lines and answers them until the input ends.
  private func converse(_ session: inout ChatSession, with backend: some ChatBackend) async throws {
    let terminal = Terminal.output
    let input = ChatLines()
    let interrupts = Interrupts()
    if terminal.isInteractive {
      Terminal.error.line(terminal.dim("\(backend.title). /help lists the commands."))
    }
    var interruptions = 0
    while true {
      switch await input.next(prompt: "> ") {
      case .end: return
      case .interrupt:
        interruptions += 1
        if interruptions > 1 { return }
        terminal.line(terminal.dim("Press Ctrl-C again, or Ctrl-D, to leave."))
        continue
      case .line(let line):
        interruptions = 0
        guard try await obey(ChatInput(line), &session, backend, interrupts) else { return }
      }
    }
  }

  /// Does what a line asks for.
  /// - Returns: whether the chat goes on.
  private func obey(
    _ input: ChatInput, _ session: inout ChatSession, _ backend: some ChatBackend, _ interrupts: Interrupts
  ) async throws -> Bool {
    let terminal = Terminal.output
    func say(_ text: String) { Terminal.error.line(terminal.dim(text)) }
    switch input {
    case .empty: break
    case .exit: return false
    case .mistake(let sentence): say(sentence)
    case .help:
      let width = ChatInput.commands.map(\.usage.count).max() ?? 0
      for command in ChatInput.commands { say("\(command.usage.padded(width + 2))\(command.meaning)") }
      say("A line that begins with // is a message that begins with /.")
    case .reset:
      session.reset()
      say("The conversation is forgotten.")
    case .system(let text):
      if let text { session.system = text }
      say(session.system.isEmpty ? "No system message." : "System: \(session.system)")
    case .showSettings: say("Sampling: \(session.sampling.description).")
    case .set(let name, let value):
      do throws(EngineError) {
        try session.sampling.set(name, to: value)
        say("Sampling: \(session.sampling.description).")
      } catch {
        say(error.message)
      }
    case .history:
      for message in session.messages { say("\(message.role): \(message.content)") }
      if session.messages.isEmpty { say("Nothing was said yet.") }
    case .undo:
      if let question = session.undo() { say("Taken back: \(question)") } else { say("There is nothing to take back.") }
    case .save(let path):
      do throws(CommandFailure) {
        try writeFile(path, Array((session.document.compactText + "\n").utf8))
        say("Saved to \(path).")
      } catch {
        say(error.message)
      }
    case .load(let path):
      do {
        try loadConversation(path, into: &session)
        say("Loaded \(session.turns.count) messages.")
      } catch {
        say("\(error)")
      }
    case .retry:
      if session.retry() {
        try await answer(&session, backend, interrupts)
      } else {
        say("There is nothing to ask again.")
      }
    case .message(let text):
      session.ask(text)
      try await answer(&session, backend, interrupts)
    }
    return true
  }

  /// Streams one answer. Ctrl-C ends it; what came so far stays in the conversation.
  private func answer(
    _ session: inout ChatSession, _ backend: some ChatBackend, _ interrupts: Interrupts
  ) async throws {
    let terminal = Terminal.output
    let received = Mutex(Received())
    let messages = session.messages
    let sampling = session.sampling
    let start = monotonicSeconds()
    let task = Task {
      try await backend.answer(messages, sampling: sampling) { text in
        received.withLock { received in
          if received.firstText == nil { received.firstText = monotonicSeconds() }
          received.text += text
        }
        terminal.write(text)
      }
    }
    interrupts.set { task.cancel() }
    let result = await task.result
    interrupts.set(nil)
    let (text, firstText) = received.withLock { ($0.text, $0.firstText) }
    if !text.isEmpty { session.answer(text) }
    if !text.hasSuffix("\n") { terminal.line() }
    switch result {
    case .success(let answer):
      if answer.reason != "stop" { Terminal.error.line(terminal.dim("[ended: \(answer.reason)]")) }
      if stats {
        let now = monotonicSeconds()
        let wait = (firstText ?? now) - start
        let rate = Double(max(0, answer.usage.completionTokens - 1)) / max(1e-9, now - start - wait)
        Terminal.error.line(
          terminal.dim(
            "[\(answer.usage.promptTokens) prompt tokens, \(answer.usage.cachedTokens) cached, first text after "
              + "\(duration(wait)); \(answer.usage.completionTokens) tokens at \(fixed(rate, 1))/s]"))
      }
    case .failure(let error):
      if task.isCancelled {
        Terminal.error.line(terminal.dim("[stopped]"))
      } else if let error = error as? EngineError, error.code != .shuttingDown {
        Terminal.error.line("apus: \(error.message)")
      } else if let refusal = error as? ServerRefusal {
        Terminal.error.line("apus: \(refusal.description)")
      } else {
        throw error
      }
    }
  }

  private struct Received {
    var text = ""
    var firstText: Double?
  }
}

/// Reads lines on a thread of its own, so that waiting for a person blocks no task.
private final class ChatLines: Sendable {
  private let queue = DispatchQueue(label: "apus.chat.input")
  private let input = Mutex(LineInput())

  func next(prompt: String) async -> LineInput.Result {
    await withCheckedContinuation { continuation in
      queue.async { continuation.resume(returning: self.input.withLock { $0.read(prompt: prompt) }) }
    }
  }
}
