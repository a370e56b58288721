import ApusChat
import ApusCore
import Hummingbird

/// The body of `POST /parse_function_call`.
struct FunctionCallText {
  var text: String?
  var tools: JSONValue?
  var parser: String?

  /// The members.
  static let fields = FieldTable<FunctionCallText>([
    Field.string("text", to: \.text, "What the model wrote.").required("a string"),
    .array("tools", to: \.tools, of: "tools", items: ["type": "object"], "The tools that the model may call."),
    .string("tool_call_parser", to: \.parser, "The format of the calls; the served model's by default."),
  ])
}

/// The body of `POST /separate_reasoning`.
struct ReasoningText {
  var text: String?
  var parser: String?

  /// The members.
  static let fields = FieldTable<ReasoningText>([
    Field.string("text", to: \.text, "What the model wrote.").required("a string"),
    .string(
      "reasoning_parser", to: \.parser, "How the chain of thought is marked; as the served model does by default."),
  ])
}

extension ServerState {
  /// `POST /parse_function_call`: the tool calls in a text, as SGLang answers it.
  func parseFunctionCall(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var given = FunctionCallText()
    try FunctionCallText.fields.read(try await body(of: request), into: &given)
    let (text, tools, parser) = (given.text, given.tools, given.parser)
    guard let text else { throw EngineError(.invalidRequest, "text is required: a string.", parameter: "text") }
    guard let format = parser.map({ ToolCallFormat.named($0) }) ?? formats.calls else {
      throw EngineError(
        .invalidRequest,
        "tool_call_parser must be one of \(ToolCallFormat.all.map(\.name).joined(separator: ", ")).",
        parameter: "tool_call_parser")
    }
    let definitions = try ChatCompletionRequest.definitions(tools)
    var machine = ChatOutputParser(calls: format, tools: definitions)
    var content = ""
    var calls: [(name: String, arguments: String)] = []
    for event in machine.feed(text) + machine.finish() {
      switch event {
      case .content(let text), .reasoning(let text): content += text
      case .toolCallBegin(_, let name, _): calls.append((name, ""))
      case .toolCallArguments(let index, let text): calls[index].arguments += text
      case .toolCallEnd: break
      }
    }
    return Response { [content, calls] writer in
      writer.member("normal_text", content)
      writer.key("calls")
      writer.array { writer in
        for (index, call) in calls.enumerated() {
          writer.object { writer in
            writer.member("tool_index", index)
            writer.member("name", call.name)
            writer.member("parameters", call.arguments)
          }
        }
      }
    }
  }

  /// `POST /separate_reasoning`: the chain of thought in a text, as SGLang answers it.
  func separateReasoning(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var given = ReasoningText()
    try ReasoningText.fields.read(try await body(of: request), into: &given)
    let (text, parser) = (given.text, given.parser)
    guard let text else { throw EngineError(.invalidRequest, "text is required: a string.", parameter: "text") }
    guard let format = parser.map({ ReasoningFormat.named($0) }) ?? formats.reasoning else {
      throw EngineError(
        .invalidRequest,
        "reasoning_parser must be one of \(ReasoningFormat.all.map(\.name).joined(separator: ", ")).",
        parameter: "reasoning_parser")
    }
    var machine = ChatOutputParser(reasoning: format)
    var content = ""
    var reasoning = ""
    for event in machine.feed(text) + machine.finish() {
      switch event {
      case .content(let text): content += text
      case .reasoning(let text): reasoning += text
      default: break
      }
    }
    return Response { [content, reasoning] writer in
      writer.member("reasoning_text", reasoning)
      writer.member("text", content)
    }
  }
}
