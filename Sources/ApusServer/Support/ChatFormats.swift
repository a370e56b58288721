import ApusChat
import ApusCore

/// How the served model writes tool calls and marks its chain of thought.
struct ChatFormats: Sendable {
  let calls: ToolCallFormat?
  let reasoning: ReasoningFormat?
  /// Whether marks are special tokens, which decoding would leave out.
  let callsNeedSpecialTokens: Bool
  let reasoningNeedsSpecialTokens: Bool
  /// Whether the chat template knows the role `developer`.
  let knowsDeveloperRole: Bool

  /// What the configuration names or, with `auto`, the model's chat template and vocabulary show.
  init(_ configuration: ServerConfiguration, _ model: ModelInformation) {
    let template = model.chatTemplate
    let tokens = model.specialTokens
    calls =
      switch configuration.toolCallParser {
      case "auto": ToolCallFormat.detect(template: template, specialTokens: tokens)
      case "none": nil
      case let name: ToolCallFormat.named(name)
      }
    reasoning =
      switch configuration.reasoningParser {
      case "auto": ReasoningFormat.detect(template: template, specialTokens: tokens)
      case "none": nil
      case let name: ReasoningFormat.named(name)
      }
    callsNeedSpecialTokens = calls?.needs(specialTokens: tokens) ?? false
    reasoningNeedsSpecialTokens = reasoning?.needs(specialTokens: tokens) ?? false
    knowsDeveloperRole = template.contains("developer")
  }
}

/// What a request asks of the reading of its answers.
struct ChatReading: Sendable {
  var tools = ToolDefinitions()
  var choice = ToolChoice.auto
  var allowsParallelCalls = true
  var separatesReasoning = true
  var streamsReasoning = true
  /// Whether reasoning that is told apart is given at all.
  var includesReasoning = true
}

/// Reads one answer: turns chunks of text into what clients are told.
struct AnswerReader: Sendable {
  /// A piece of the answer, as the API carries it.
  enum Delta: Sendable, Equatable {
    case reasoning(String)
    case content(String)
    case callBegin(index: Int, id: String, name: String)
    case callArguments(index: Int, String)
  }

  private var parser: ChatOutputParser?
  private let identifierStyle: ToolCallFormat.IdentifierStyle
  private let allowsParallelCalls: Bool
  private let includesReasoning: Bool
  /// Whether the answer's chain of thought, if it has one, is given apart from the rest.
  let tellsReasoning: Bool
  /// What the prompt already holds of the answer.
  private var beginning: String
  /// Whether the answer holds a tool call.
  private(set) var hasCalls = false

  /// Makes a reader.
  ///
  /// - Parameters:
  ///   - formats: how the model writes.
  ///   - reading: what the request asks.
  ///   - beginsInReasoning: whether the prompt ends within the chain of thought; `nil` leaves it to the format.
  ///   - beginning: what the prompt already holds of the answer.
  init(_ formats: ChatFormats, _ reading: ChatReading, beginsInReasoning: Bool?, beginning: String) {
    let calls = reading.tools.isEmpty || reading.choice == .none ? nil : formats.calls
    // Calls are not looked for within the chain of thought, so it matters to them even where it is not told apart.
    let reasoning = calls != nil || reading.separatesReasoning ? formats.reasoning : nil
    if calls != nil || reasoning != nil {
      var options = ChatOutputParser.Options()
      options.separatesReasoning = reading.separatesReasoning
      options.streamsReasoning = reading.streamsReasoning
      options.beginsInReasoning = beginsInReasoning
      parser = ChatOutputParser(reasoning: reasoning, calls: calls, tools: reading.tools, options: options)
    }
    identifierStyle = formats.calls?.identifierStyle ?? .openAI
    allowsParallelCalls = reading.allowsParallelCalls
    includesReasoning = reading.includesReasoning
    tellsReasoning = reasoning != nil && reading.separatesReasoning && reading.includesReasoning
    self.beginning = beginning
  }

  /// Whether text passes through as it is.
  var isPlain: Bool { parser == nil }

  /// Takes a chunk's text, and ends the answer if it is the last.
  mutating func read(_ text: String, isLast: Bool) -> [Delta] {
    guard parser != nil else { return text.isEmpty ? [] : [.content(text)] }
    var events: [ChatEvent] = []
    if !beginning.isEmpty {
      events += parser!.feed(beginning)
      beginning = ""
    }
    events += parser!.feed(text)
    if isLast { events += parser!.finish() }
    return ChatEvent.merged(events).compactMap { event in
      switch event {
      case .reasoning(let text): return includesReasoning ? .reasoning(text) : nil
      case .content(let text): return .content(text)
      case .toolCallBegin(let index, let name, let id):
        if !allowsParallelCalls, index > 0 { return nil }
        hasCalls = true
        return .callBegin(index: index, id: identifier(id, index, name), name: name)
      case .toolCallArguments(let index, let text):
        return !allowsParallelCalls && index > 0 ? nil : .callArguments(index: index, text)
      case .toolCallEnd: return nil
      }
    }
  }

  /// The id of a call in the style of the model's family.
  private func identifier(_ own: String?, _ index: Int, _ name: String) -> String {
    switch identifierStyle {
    case .openAI: return "call_" + RequestID.unique().rawValue.prefix(24)
    case .kimi: return own ?? "functions.\(name):\(index)"
    case .mistral:
      if let own, own.utf8.count == 9 { return own }
      let letters = Array("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
      return String((0..<9).map { _ in letters.randomElement()! })
    }
  }
}

/// A whole answer, for clients that do not stream.
struct ChatAnswer: Sendable {
  struct Call: Sendable {
    var id: String
    var name: String
    var arguments = ""
  }

  var content = ""
  var reasoning = ""
  var calls: [Call] = []

  init(_ result: GenerationResult, _ reader: AnswerReader) {
    var reader = reader
    for delta in reader.read(result.text, isLast: true) {
      switch delta {
      case .reasoning(let text): reasoning += text
      case .content(let text): content += text
      case .callBegin(_, let id, let name): calls.append(Call(id: id, name: name))
      case .callArguments(_, let text): calls[calls.count - 1].arguments += text
      }
    }
  }

  /// Writes the members of the message.
  func write(to writer: inout JSONWriter) {
    writer.member("role", "assistant")
    if content.isEmpty, !calls.isEmpty || !reasoning.isEmpty {
      writer.member("content", .null)
    } else {
      writer.member("content", content)
    }
    writer.member("refusal", .null)
    if !reasoning.isEmpty { writer.member("reasoning_content", reasoning) }
    if calls.isEmpty { return }
    writer.key("tool_calls")
    writer.array { writer in
      for call in calls {
        writer.object { writer in
          writer.member("id", call.id)
          writer.member("type", "function")
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

extension AnswerReader.Delta {
  /// Writes the members of a streamed delta.
  func write(to writer: inout JSONWriter) {
    func call(_ index: Int, _ writer: inout JSONWriter, _ members: (inout JSONWriter) -> Void) {
      writer.key("tool_calls")
      writer.array { writer in
        writer.object { writer in
          writer.member("index", index)
          members(&writer)
        }
      }
    }
    switch self {
    case .reasoning(let text): writer.member("reasoning_content", text)
    case .content(let text): writer.member("content", text)
    case .callBegin(let index, let id, let name):
      call(index, &writer) { writer in
        writer.member("id", id)
        writer.member("type", "function")
        writer.key("function")
        writer.object { writer in
          writer.member("name", name)
          writer.member("arguments", "")
        }
      }
    case .callArguments(let index, let text):
      call(index, &writer) { writer in
        writer.key("function")
        writer.object { $0.member("arguments", text) }
      }
    }
  }
}
