import ApusCore
import ArgumentParser

/// `apus bench eval`
struct BenchEval: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "eval",
    abstract: "Asks a model questions with known answers and counts the right ones.",
    discussion: """
      Each line of the questions is an object with "messages" (and "tools", "enable_thinking"), "prompt" or "input_ids"; \
      "match", which is exact, json, contains or tool; "answer", or "words" for contains; and "skill", under which it is \
      counted. Answers are the most likely tokens. What a model thinks, up to </think>, does not count, and an answer \
      that does not end by itself is wrong.

      Without --questions it asks those beside the weights (evaluation.jsonl), without a model the demo model.

      Examples:
        apus bench eval --dtype float32
        apus bench eval models/Qwen2.5-0.5B-Instruct --questions questions.jsonl --output-file scores.json
        apus bench eval --url http://127.0.0.1:8000 --questions questions.jsonl --json
      """)

  @OptionGroup(title: "Model and engine") var engine: EngineOptions
  @Option(
    help: ArgumentHelp("The JSONL file of questions; - is standard input.", valueName: "path"), completion: .file())
  var questions: String?
  @Option(help: ArgumentHelp("Asks a server instead of an engine of its own.", valueName: "url"))
  var url: String?
  @Option(help: ArgumentHelp("The key that the server asks for. Default: $OPENAI_API_KEY.", valueName: "key"))
  var apiKey: String?
  @Option(help: ArgumentHelp("Asks only skills whose name begins with this. May be repeated.", valueName: "name"))
  var skill: [String] = []
  @Option(help: ArgumentHelp("Questions in flight at most.", valueName: "count"))
  var maxConcurrency = 16
  @Option(
    name: [.customLong("max-new-tokens"), .customLong("max-tokens")],
    help: ArgumentHelp("Ends answers that do not end by themselves.", valueName: "tokens"))
  var maxNewTokens = 320
  @Option(help: ArgumentHelp("Writes each question's answer as JSONL; - is standard output.", valueName: "path"))
  var answers: String?
  @Option(help: ArgumentHelp("Writes the result as JSON; - is standard output.", valueName: "path"))
  var outputFile: String?
  @Flag(help: "Prints the result as JSON instead of the table.")
  var json = false
  @Flag(name: [.long, .short], help: "Prints no progress and no table.")
  var quiet = false

  func validate() throws {
    if maxConcurrency < 1 { throw ValidationError("--max-concurrency must be at least 1, got \(maxConcurrency).") }
    if maxNewTokens < 1 { throw ValidationError("--max-new-tokens must be at least 1, got \(maxNewTokens).") }
    if url != nil && questions == nil { throw ValidationError("--url needs --questions.") }
    if url != nil && engine.path != nil { throw ValidationError("--url asks a server; leave out the model.") }
  }

  func run() async throws {
    let path: String
    if let questions {
      path = questions
    } else {
      path = try beside(await engine.requiredModel(isQuiet: quiet || json).path)
    }
    var asked = try EvalQuestion.read(try readFile(path))
    if !skill.isEmpty { asked.removeAll { question in !skill.contains { question.skill.hasPrefix($0) } } }
    guard !asked.isEmpty else {
      throw CommandFailure("\(path) holds no question to ask.", status: ExitStatus.invalidInput)
    }
    if let url {
      let client = try ServerClient(baseURL: url, apiKey: apiKey, connections: maxConcurrency)
      do {
        // The first request that may fail as a whole: where nobody answers, one sentence is enough.
        let server = EvalServer(client: client, model: try await client.firstModel() ?? "default", limit: maxNewTokens)
        try await measure(asked, name: server.model) { await server.ask($0) }
      } catch {
        await client.shutdown()
        throw serverFailure(error, at: client.baseURL)
      }
      await client.shutdown()
    } else {
      let running = try await startEngine(engine, isQuiet: quiet || json)
      let (service, limit) = (running.service, maxNewTokens)
      do {
        try await measure(asked, name: service.model.name, dtype: service.model.dtype) {
          await EvalRun.answer(to: $0, from: service, maxNewTokens: limit)
        }
      } catch {
        await running.shutdown()
        throw error
      }
      await running.shutdown()
    }
  }

  private func beside(_ model: String) throws(CommandFailure) -> String {
    let path = "\(model)/evaluation.jsonl"
    guard fileExists(path) else {
      throw .usage("There is no '\(path)'; name a file of questions with --questions.")
    }
    return path
  }

  private func measure(
    _ asked: [EvalQuestion], name: String, dtype: String? = nil,
    ask: @escaping @Sendable (EvalQuestion) async -> EvalAnswer
  ) async throws {
    let bar = ProgressBar("Questions", total: Double(asked.count), isQuiet: quiet || json)
    let start = monotonicSeconds()
    let given = await EvalRun.answers(
      to: asked, concurrency: maxConcurrency, ask: ask,
      progress: { answer in bar.advance(note: answer.error.map { "failed: \($0)" } ?? "") })
    bar.finish()
    let report = EvalReport(asked, given, seconds: monotonicSeconds() - start)
    var object = JSONObject([("model", .string(name))])
    if let dtype { object["dtype"] = .string(dtype) }
    for (key, value) in report.json { object[key] = value }
    if json {
      Terminal.output.line(JSONValue.object(object).compactText)
    } else if !quiet {
      Terminal.output.write(report.table)
    }
    if let outputFile { try emit(.object(object), to: outputFile) }
    if let answers {
      let lines = zip(asked, given).map { question, answer in
        var line = JSONObject([
          ("skill", .string(question.skill)), ("text", .string(answer.text)),
          ("right", .bool(question.accepts(answer))), ("ended", .bool(answer.hasEnded)),
        ])
        if let error = answer.error { line["error"] = .string(error) }
        return JSONValue.object(line).compactText + "\n"
      }
      if answers == "-" {
        Terminal.output.write(lines.joined())
      } else {
        try writeFile(answers, Array(lines.joined().utf8))
      }
    }
    if report.failed > 0 {
      let reason = given.lazy.compactMap(\.error).first ?? ""
      throw CommandFailure("\(report.failed) of \(asked.count) questions failed, the first one so: \(reason)")
    }
  }
}

/// Asks a server that speaks OpenAI's API, and the native one for token ids.
struct EvalServer: Sendable {
  var client: ServerClient
  var model: String
  /// The most tokens of an answer.
  var limit: Int

  /// The server's most likely answer.
  func ask(_ question: EvalQuestion) async -> EvalAnswer {
    var body = JSONObject()
    let path: String
    switch question.input {
    case .messages(let messages, let tools, let variables):
      path = "/v1/chat/completions"
      body["messages"] = messages
      if let tools { body["tools"] = tools }
      if !variables.isEmpty { body["chat_template_kwargs"] = .object(JSONObject(variables.map { ($0, $1) })) }
    case .prompt(let text):
      path = "/v1/completions"
      body["prompt"] = .string(text)
    case .tokens(let tokens):
      path = "/v1/completions"
      body["prompt"] = .array(tokens.map { .int(Int64($0)) })
    }
    body["model"] = .string(model)
    body["max_tokens"] = .int(Int64(limit))
    body["temperature"] = 0
    do {
      return Self.answer(try await client.post(path, .object(body)))
    } catch let refusal as ServerRefusal {
      return Self.failure(refusal.description)
    } catch {
      return Self.failure("\(error)")
    }
  }

  private static func failure(_ reason: String) -> EvalAnswer {
    var answer = EvalAnswer()
    answer.error = reason
    return answer
  }

  /// Reads an answer of the chat or completions API.
  static func answer(_ value: JSONValue) -> EvalAnswer {
    guard let choice = value["choices"]?[0] else { return failure("The server's answer has no choice.") }
    var answer = EvalAnswer()
    answer.text = choice["text"]?.stringValue ?? choice["message"]?["content"]?.stringValue ?? ""
    answer.promptTokens = value["usage"]?["prompt_tokens"]?.intValue ?? 0
    answer.completionTokens = value["usage"]?["completion_tokens"]?.intValue ?? 0
    let reason = choice["finish_reason"]?.stringValue
    answer.hasEnded = reason == "stop" || reason == "tool_calls"
    if let calls = choice["message"]?["tool_calls"]?.arrayValue, calls.count == 1,
      let name = calls[0]["function"]?["name"], let arguments = calls[0]["function"]?["arguments"]
    {
      let parsed = arguments.stringValue.flatMap { try? JSONValue.parse($0) } ?? arguments
      answer.call = ["name": name, "arguments": parsed]
    }
    return answer
  }
}
