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
      mistake that the template reports goes to standard error, with exit status 1. With --jsonl each line is a conversation and is answered by one \
      line {"rendered": "..."} or {"error": "..."}.

      Examples:
        echo '{"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": true}' | apus render --template models/Qwen2.5-0.5B-Instruct
        apus render --template chat_template.jinja < conversation.json
        apus render --template tokenizer_config.json --jsonl < conversations.jsonl
      """)

  @Option(
    help: ArgumentHelp(
      "A Jinja file, a tokenizer_config.json, a checkpoint directory, or OWNER/NAME of a hub.", valueName: "path"),
    completion: .file())
  var template: String
  @Option(
    help: ArgumentHelp(
      "The template to take where there are several. Default: tool_use if tools are offered, else default.",
      valueName: "name"))
  var name: String?
  @Flag(help: "Reads a conversation a line and answers each with a line.")
  var jsonl = false

  func run() async throws {
    let template = try await locateModel(template, for: .tokenizer).path
    let templates: ChatTemplateSet
    do throws(EngineError) {
      templates = try ChatTemplateSet.load(path: template)
    } catch {
      throw CommandFailure(
        error.message, status: error.code == .notFound ? ExitStatus.missingInput : ExitStatus.failure)
    }
    guard jsonl else {
      let bytes = try readFile("-")
      do throws(EngineError) {
        Terminal.output.write(try render(bytes, templates))
      } catch {
        throw CommandFailure(error.message)
      }
      return
    }
    let reader = try LineReader(path: "-")
    let output = try LineAppender(path: "-")
    while let line = try reader.next() {
      if line.isEmpty { continue }
      var writer = JSONWriter(capacity: 1024)
      do throws(EngineError) {
        let text = try render(line, templates)
        writer.object { $0.member("rendered", text) }
      } catch {
        writer.object { $0.member("error", error.message) }
      }
      try output.append(writer.text)
    }
  }

  /// Renders one conversation.
  private func render(_ bytes: [UInt8], _ templates: ChatTemplateSet) throws(EngineError) -> String {
    let value: JSONValue
    do throws(JSONError) { value = try JSONValue.parse(bytes) } catch {
      throw EngineError(.invalidRequest, "The conversation is not JSON: \(error).")
    }
    guard let given = value.objectValue else {
      throw EngineError(.invalidRequest, "The conversation must be a JSON object, got \(value.kindName).")
    }
    let hasTools = given["tools"]?.arrayValue?.isEmpty == false
    let template = try templates.template(named: name, hasTools: hasTools)
    if given["continue_final_message"]?.boolValue == true {
      var prompt = ChatPrompt(messages: given["messages"] ?? .null, tools: given["tools"])
      prompt.addGenerationPrompt = given["add_generation_prompt"]?.boolValue ?? false
      prompt.continueFinalMessage = true
      let own = ["messages", "tools", "add_generation_prompt", "continue_final_message"]
      for (name, value) in given where !own.contains(name) { prompt.variables[name] = value }
      return try template.render(prompt, specialTokens: templates.specialTokens)
    }
    var variables = JSONObject()
    for (name, token) in templates.specialTokens.sorted(by: { $0.key < $1.key }) { variables[name] = .string(token) }
    for (name, value) in given { variables[name] = value }
    return try template.render(variables)
  }
}
