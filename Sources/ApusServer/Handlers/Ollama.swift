import ApusCore
import Glibc
import Hummingbird

extension ServerState {
  /// `POST /api/chat`, Ollama's API.
  func ollamaChat(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    try await ollamaAnswer(try OllamaRequest(try await body(of: request), isChat: true), isChat: true, context)
  }

  /// `POST /api/generate`, Ollama's API.
  func ollamaGenerate(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    try await ollamaAnswer(try OllamaRequest(try await body(of: request), isChat: false), isChat: false, context)
  }

  private func ollamaAnswer(
    _ body: OllamaRequest, isChat: Bool, _ context: ServerContext
  ) async throws -> Response {
    try checkOllama(model: body.model)
    if body.isLoad(isChat: isChat) {
      // Ollama's clients load and unload models so; this one is there as long as the server.
      let unloads = body.keepAlive?.doubleValue == 0 || body.keepAlive == "0"
      var line = OllamaLine(model: service.model.name, isChat: isChat)
      line.done = .init(reason: unloads ? "unload" : "load")
      return Response(object: line.write)
    }
    if body.think == true || body.think?.stringValue != nil, formats.reasoning == nil {
      throw EngineError(
        .unsupported, "\(service.model.name.debugDescription) does not support thinking.", parameter: "think")
    }
    if body.tools?.arrayValue?.isEmpty == false, formats.calls == nil {
      throw EngineError(
        .unsupported, "\(service.model.name.debugDescription) does not support tools.", parameter: "tools")
    }
    let submission = try ollamaSubmission(body, isChat: isChat)
    let group: GenerationGroup
    do throws(EngineError) {
      group = try submit([submission.request], context)
    } catch {
      throw inOllamaTerms(body.options.sampling.inOpenAITerms(error))
    }
    return body.stream
      ? streamOllama(group, submission.reader, isChat: isChat)
      : try await wholeOllama(group, submission.reader, isChat: isChat)
  }

  /// The generation that a body asks for, and how its answer is read.
  private func ollamaSubmission(
    _ body: OllamaRequest, isChat: Bool
  ) throws(EngineError) -> (request: ApusCore.Request, reader: AnswerReader) {
    do throws(EngineError) {
      var parameters = try body.options.sampling.parameters(
        for: service.model, defaultMaxTokens: service.model.samplingDefaults.maxNewTokens)
      // A model without a template reads prompts as they are.
      if !isChat, body.isRaw || !service.model.hasChatTemplate {
        var reading = ChatReading()
        reading.separatesReasoning = false
        let reader = AnswerReader(formats, reading, beginsInReasoning: nil, beginning: "")
        let text = [body.system ?? "", body.prompt ?? ""].filter { !$0.isEmpty }.joined(separator: "\n\n")
        return (ApusCore.Request(prompt: .text(text), sampling: parameters), reader)
      }
      let (tokens, reader) = try prompt(of: try body.chat(), &parameters)
      return (ApusCore.Request(prompt: .tokens(tokens), sampling: parameters), reader)
    } catch {
      throw inOllamaTerms(error)
    }
  }

  private func wholeOllama(
    _ group: GenerationGroup, _ reader: AnswerReader, isChat: Bool
  ) async throws -> Response {
    var line = OllamaLine(model: service.model.name, isChat: isChat)
    var answer = OllamaAnswer(reader)
    var clock = OllamaClock(group)
    try await group.forEachChunk { _, piece in
      clock.observe()
      for part in answer.read(piece.text, isLast: piece.finishReason != nil) { line.append(part) }
      if let reason = piece.finishReason { line.done = try clock.end(reason, piece.usage) }
    }
    return Response(object: line.write)
  }

  private func streamOllama(_ group: GenerationGroup, _ reader: AnswerReader, isChat: Bool) -> Response {
    let name = service.model.name
    return .lines { lines in
      var answer = OllamaAnswer(reader)
      var clock = OllamaClock(group)
      func append(_ line: OllamaLine) {
        var json = JSONWriter()
        json.object(line.write)
        lines.append(line: json)
      }
      try await group.forEachChunk { _, piece in
        clock.observe()
        for part in answer.read(piece.text, isLast: piece.finishReason != nil) {
          var line = OllamaLine(model: name, isChat: isChat)
          line.append(part)
          append(line)
        }
        if let reason = piece.finishReason {
          var line = OllamaLine(model: name, isChat: isChat)
          line.done = try clock.end(reason, piece.usage)
          append(line)
        }
        try await lines.flush()
      }
    } fail: { error, lines in
      var json = JSONWriter()
      json.object { $0.member("error", error.message) }
      lines.append(line: json)
    }
  }

  /// Refuses a model name that is not served here. A name without a tag means the tag `latest` to Ollama.
  private func checkOllama(model name: String?) throws(EngineError) {
    guard let name, name != service.model.name + ":latest" else { return }
    try check(model: name)
  }

  /// An error with the native API's field names replaced by Ollama's.
  private func inOllamaTerms(_ error: EngineError) -> EngineError {
    var error = error
    error.message = error.message.replacing("repetition_penalty", with: "repeat_penalty")
    return error
  }

  // MARK: What is served

  /// `GET /api/version`.
  func ollamaVersion(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    Response { $0.member("version", configuration.version) }
  }

  /// `GET /api/tags`: the models there are.
  func ollamaTags(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    Response { writer in
      writer.key("models")
      writer.array { writer in
        writer.object { writer in
          writeOllamaModel(to: &writer)
          writer.member("modified_at", timestamp(service.model.created))
        }
      }
    }
  }

  /// `GET /api/ps`: the models in memory.
  func ollamaProcesses(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    Response { writer in
      writer.key("models")
      writer.array { writer in
        writer.object { writer in
          writeOllamaModel(to: &writer)
          // It stays; this is the last moment that all clients' calendars can hold.
          writer.member("expires_at", "9999-12-31T23:59:59Z")
          writer.member("size_vram", 0)
          writer.member("context_length", service.model.contextLength)
        }
      }
    }
  }

  /// The members of `POST /api/show`.
  static let ollamaShowFields = FieldTable<OllamaShow>([
    .string("model", "name", to: \.model, "The model served."),
    .flag("verbose", to: \.isVerbose, default: false, "Has no effect: nothing is left out."),
  ])

  /// `POST /api/show`: what is known of a model.
  func ollamaShow(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var body = OllamaShow()
    try Self.ollamaShowFields.read(try await self.body(of: request), into: &body)
    try checkOllama(model: body.model)
    let model = service.model
    let family = ollamaFamily
    var capabilities = ["completion"]
    if formats.calls != nil { capabilities.append("tools") }
    if formats.reasoning != nil { capabilities.append("thinking") }
    var parameters: [String] = []
    let defaults = model.samplingDefaults
    if let value = defaults.temperature { parameters.append("temperature \(value)") }
    if let value = defaults.topK { parameters.append("top_k \(value)") }
    if let value = defaults.topP { parameters.append("top_p \(value)") }
    if let value = defaults.minP { parameters.append("min_p \(value)") }
    if let value = defaults.repetitionPenalty { parameters.append("repeat_penalty \(value)") }
    return Response { [parameters, capabilities] writer in
      writer.member("modelfile", "FROM \(model.path)\n")
      writer.member("parameters", parameters.joined(separator: "\n"))
      writer.member("template", model.chatTemplate)
      writer.key("details")
      writer.object(writeOllamaDetails)
      writer.key("model_info")
      writer.object { writer in
        writer.member("general.architecture", family)
        writer.member("general.parameter_count", model.parameterCount)
        writer.member("\(family).context_length", model.contextLength)
        writer.member("\(family).vocab_size", model.vocabularySize)
      }
      writer.key("capabilities")
      writer.array { writer in for capability in capabilities { writer.value(capability) } }
      writer.member("modified_at", timestamp(model.created))
    }
  }

  /// Writes the members that lists of models share.
  private func writeOllamaModel(to writer: inout JSONWriter) {
    let model = service.model
    writer.member("name", model.name)
    writer.member("model", model.name)
    writer.member("size", checkpointBytes(model.path))
    writer.member("digest", ollamaDigest)
    writer.key("details")
    writer.object(writeOllamaDetails)
  }

  private func writeOllamaDetails(to writer: inout JSONWriter) {
    let model = service.model
    writer.member("parent_model", "")
    writer.member("format", model.path.hasSuffix(".gguf") ? "gguf" : "safetensors")
    writer.member("family", ollamaFamily)
    writer.key("families")
    writer.array { $0.value(ollamaFamily) }
    let count = model.parameterCount
    let size =
      switch count {
      case 1_000_000_000...: "\(Double(count / 100_000_000) / 10)B"
      case 1_000_000...: "\(Double(count / 10_000) / 100)M"
      case 1000...: "\(Double(count / 10) / 100)K"
      default: "\(count)"
      }
    writer.member("parameter_size", size)
    let dtype = model.dtype
    writer.member(
      "quantization_level",
      ["bfloat16": "BF16", "float16": "F16", "float32": "F32"][dtype] ?? dtype.uppercased())
  }

  /// The architecture as GGUF files would name it.
  private var ollamaFamily: String {
    let name = service.model.architecture
    for suffix in ["ForCausalLM", "LMHeadModel", "Model"] where name.hasSuffix(suffix) {
      return name.dropLast(suffix.count).lowercased()
    }
    return name.lowercased()
  }

  /// 64 hexadecimal digits that tell one served model from another: a hash of what it is called and of how it is held, not
  /// of its weights, which nobody has read for the purpose.
  private var ollamaDigest: String {
    let model = service.model
    return (0..<4).map { salt in
      // FNV-1a.
      var hash: UInt64 = 0xCBF2_9CE4_8422_2325 ^ UInt64(salt)
      for part in [model.name, model.path, model.architecture, model.dtype, "\(model.parameterCount)"] {
        for byte in part.utf8 { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01B3 }
        hash = (hash ^ 0xFF) &* 0x100_0000_01B3
      }
      let digits = String(hash, radix: 16)
      return String(repeating: "0", count: 16 - digits.utf8.count) + digits
    }.joined()
  }
}

/// The body of `POST /api/show`.
struct OllamaShow {
  var model: String?
  var isVerbose = false
}

/// The bytes of a checkpoint's weights: of its one file, or the sum that its index tells; 0 if there is neither.
private func checkpointBytes(_ path: String) -> Int {
  func length(_ path: String) -> Int {
    guard let file = fopen(path, "rb") else { return 0 }
    defer { fclose(file) }
    return fseek(file, 0, SEEK_END) == 0 ? max(0, ftell(file)) : 0
  }
  if path.hasSuffix(".gguf") { return length(path) }
  let single = length(path + "/model.safetensors")
  if single > 0 { return single }
  // An index has a line per tensor; the largest there are stay far below this.
  let limit = 64 << 20
  let index = path + "/model.safetensors.index.json"
  let size = length(index)
  guard size > 0, size < limit, let file = fopen(index, "rb") else { return 0 }
  defer { fclose(file) }
  var bytes = [UInt8](repeating: 0, count: size)
  guard fread(&bytes, 1, size, file) == size else { return 0 }
  return (try? JSONValue.parse(bytes))?["metadata"]?["total_size"]?.intValue ?? 0
}

/// Measures an answer.
private struct OllamaClock {
  private let group: GenerationGroup
  /// Seconds from the submission to the first chunk.
  private var first: Double?

  init(_ group: GenerationGroup) { self.group = group }

  /// A chunk has come.
  mutating func observe() { if first == nil { first = group.elapsed } }

  /// The end's counts and durations.
  ///
  /// - Throws: `aborted` for an aborted request, since Ollama's API has no such reason.
  func end(_ reason: FinishReason, _ usage: Usage) throws(EngineError) -> OllamaLine.Done {
    if case .abort(let message) = reason { throw EngineError(.aborted, message) }
    let total = group.elapsed
    let first = first ?? total
    var done = OllamaLine.Done(reason: reason.openAIName)
    done.usage = usage
    done.total = Int(total * 1e9)
    done.prompt = Int(first * 1e9)
    done.evaluation = Int((total - first) * 1e9)
    return done
  }
}

/// Reads one answer in pieces as Ollama's API carries them: calls are whole.
private struct OllamaAnswer {
  enum Part {
    case thinking(String)
    case content(String)
    case call(id: String, name: String, arguments: JSONValue)
  }

  private var reader: AnswerReader
  private var open: (id: String, name: String, arguments: String)?

  init(_ reader: AnswerReader) { self.reader = reader }

  /// Takes a chunk's text, and ends the answer if it is the last.
  mutating func read(_ text: String, isLast: Bool) -> [Part] {
    var parts: [Part] = []
    for delta in reader.read(text, isLast: isLast) {
      if case .callArguments(_, let more) = delta {
        open?.arguments += more
        continue
      }
      closeCall(&parts)
      switch delta {
      case .reasoning(let text): parts.append(.thinking(text))
      case .content(let text): parts.append(.content(text))
      case .callBegin(_, let id, let name): open = (id, name, "")
      case .callArguments: break
      }
    }
    if isLast { closeCall(&parts) }
    return parts
  }

  /// Gives out the call that has ended. One that broke off within its arguments is no call.
  private mutating func closeCall(_ parts: inout [Part]) {
    guard let call = open else { return }
    open = nil
    guard let arguments = try? JSONValue.parse(call.arguments, depthLimit: 64), arguments.objectValue != nil else {
      return
    }
    parts.append(.call(id: call.id, name: call.name, arguments: arguments))
  }
}

/// One object of an answer: a piece of it, its end, or all of it.
private struct OllamaLine {
  /// What the last object tells.
  struct Done {
    var reason: String
    var usage: Usage?
    /// Nanoseconds.
    var total = 0
    var prompt = 0
    var evaluation = 0
  }

  let model: String
  let isChat: Bool
  var content = ""
  var thinking = ""
  var calls: [(id: String, name: String, arguments: JSONValue)] = []
  var done: Done?

  init(model: String, isChat: Bool) {
    self.model = model
    self.isChat = isChat
  }

  mutating func append(_ part: OllamaAnswer.Part) {
    switch part {
    case .thinking(let text): thinking += text
    case .content(let text): content += text
    case .call(let id, let name, let arguments): calls.append((id, name, arguments))
    }
  }

  func write(to writer: inout JSONWriter) {
    writer.member("model", model)
    writer.member("created_at", timestamp(unixTime()))
    if isChat {
      writer.key("message")
      writer.object { writer in
        writer.member("role", "assistant")
        writer.member("content", content)
        if !thinking.isEmpty { writer.member("thinking", thinking) }
        if !calls.isEmpty { writeCalls(to: &writer) }
      }
    } else {
      writer.member("response", content)
      if !thinking.isEmpty { writer.member("thinking", thinking) }
    }
    writer.member("done", done != nil)
    guard let done else { return }
    writer.member("done_reason", done.reason)
    guard let usage = done.usage else { return }
    writer.member("total_duration", done.total)
    writer.member("load_duration", 0)
    writer.member("prompt_eval_count", usage.promptTokens)
    writer.member("prompt_eval_duration", done.prompt)
    writer.member("eval_count", usage.completionTokens)
    writer.member("eval_duration", done.evaluation)
  }

  private func writeCalls(to writer: inout JSONWriter) {
    writer.key("tool_calls")
    writer.array { writer in
      for call in calls {
        writer.object { writer in
          writer.member("id", call.id)
          writer.key("function")
          writer.object { writer in
            writer.member("name", call.name)
            writer.member("arguments", call.arguments)
          }
        }
      }
    }
  }
}
