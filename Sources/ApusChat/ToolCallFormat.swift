/// How a family of models writes tool calls.
public struct ToolCallFormat: Sendable {
  /// Where calls get their ids.
  public enum IdentifierStyle: Sendable, Equatable {
    /// `call_` and random digits.
    case openAI
    /// Nine letters and digits, which the family's templates demand; the model's own where it wrote one.
    case mistral
    /// The model's own: `functions.name:0`, counted through the conversation.
    case kimi
  }

  /// The name by which it is chosen.
  public let name: String
  /// Further names.
  public let aliases: [String]
  /// What a call looks like, and which models write it.
  public let summary: String
  /// Where calls get their ids.
  public let identifierStyle: IdentifierStyle
  /// Whether the format is gpt-oss's, whose messages carry reasoning and content as well.
  let isHarmony: Bool
  /// What is added around JSON arguments when a call is enforced; `nil` where arguments are not JSON.
  let frame: CallFrame?
  /// What stands before and after the name of a tool where arguments are not JSON.
  let markup: (begin: String, afterName: String)?
  private let makeOpeners: @Sendable (ToolDefinitions) -> [Opener]
  private let isWritten: @Sendable (TemplateText) -> Bool

  init(
    _ name: String, aliases: [String] = [], _ summary: String, identifierStyle: IdentifierStyle = .openAI,
    isHarmony: Bool = false, frame: CallFrame? = nil, markup: (begin: String, afterName: String)? = nil,
    detect: @escaping @Sendable (TemplateText) -> Bool,
    openers: @escaping @Sendable (ToolDefinitions) -> [Opener] = { _ in [] }
  ) {
    self.name = name
    self.aliases = aliases
    self.summary = summary
    self.identifierStyle = identifierStyle
    self.isHarmony = isHarmony
    self.frame = frame
    self.markup = markup
    makeOpeners = openers
    isWritten = detect
  }

  func openers(_ tools: ToolDefinitions) -> [Opener] { makeOpeners(tools) }

  /// Whether marks of the format are among a vocabulary's special tokens, which decoding must then keep.
  public func needs(specialTokens: [String]) -> Bool {
    if isHarmony { return true }
    var texts = openers(ToolDefinitions()).map { String(decoding: $0.marker, as: UTF8.self) }
    if let frame { texts += [frame.begin, frame.afterName, frame.end] }
    return specialTokens.contains { token in !token.isEmpty && texts.contains { $0.utf8Contains(token) } }
  }

  /// The beginning of a call, of one tool or of any, which a prompt may end with so that a call must follow; the parser is
  /// fed with it first.
  public func callBeginning(of tool: String?) -> String {
    var text = opening
    if let tool { text += tool + afterName } else { return text }
    // A space before the arguments is a part of the token that follows.
    while text.hasSuffix(" ") { text.removeLast() }
    return text
  }

  /// What stands before the name of the first tool.
  private var opening: String { frame?.begin ?? markup!.begin }
  /// What stands after it.
  private var afterName: String { frame?.afterName ?? markup!.afterName }

  /// The format of a name or an alias; upper and lower case and `-` and `_` are the same.
  public static func named(_ name: String) -> ToolCallFormat? {
    let wanted = normalized(name)
    return all.first { ([$0.name] + $0.aliases).contains { normalized($0) == wanted } }
  }

  /// The format that a chat template teaches; `nil` if it teaches none.
  ///
  /// - Parameters:
  ///   - template: the template's text.
  ///   - specialTokens: texts of the vocabulary's special tokens, which decide where the template is silent.
  public static func detect(template: String, specialTokens: [String] = []) -> ToolCallFormat? {
    let text = TemplateText(template, specialTokens)
    return all.first { $0.isWritten(text) }
  }

  /// Every format, in the order in which `detect` tries them: the more particular marker first.
  public static let all: [ToolCallFormat] = [
    ToolCallFormat(
      "gpt-oss", aliases: ["harmony", "openai"],
      "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>: gpt-oss", isHarmony: true,
      frame: CallFrame(
        begin: "<|channel|>commentary to=functions.", afterName: " <|constrain|>json<|message|>", end: "",
        trigger: "<|channel|>commentary to=functions.", allowsSeveral: false),
      detect: { $0.has("<|channel|>", "<|message|>", "<|start|>") }),
    ToolCallFormat(
      "deepseekv32", aliases: ["deepseek_v32", "deepseekv4"],
      "<｜DSML｜function_calls> with <｜DSML｜invoke name=\"NAME\"> and parameter elements: DeepSeek V3.2",
      markup: ("<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"", "\">\n"),
      detect: { $0.has("｜DSML｜") || $0.hasToken("｜DSML｜") },
      openers: { tools in
        ["function_calls", "tool_calls"].map { section in
          Opener(
            "<｜DSML｜\(section)>",
            .calls(CallMachine(MarkupCallMachine(.deepSeek(section), tools, isInCall: false))))
        }
      }),
    ToolCallFormat(
      "deepseekv3", aliases: ["deepseek_v3"],
      "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME, a line break, ```json {…} ```: DeepSeek V3, R1",
      frame: CallFrame(
        begin: "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>", afterName: "\n```json\n",
        end: "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", trigger: "<｜tool▁calls▁begin｜>"),
      detect: { $0.has("<｜tool▁call▁begin｜>", "```json") }, openers: deepSeekOpeners),
    ToolCallFormat(
      "deepseekv31", aliases: ["deepseek_v31"],
      "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>: DeepSeek V3.1",
      frame: CallFrame(
        begin: "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", afterName: "<｜tool▁sep｜>",
        end: "<｜tool▁call▁end｜><｜tool▁calls▁end｜>", trigger: "<｜tool▁calls▁begin｜>"),
      detect: { $0.has("<｜tool▁call▁begin｜>") }, openers: deepSeekOpeners),
    ToolCallFormat(
      "kimi_k2", aliases: ["kimi"],
      "<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}<|tool_call_end|>: Kimi K2",
      identifierStyle: .kimi,
      frame: CallFrame(
        begin: "<|tool_calls_section_begin|><|tool_call_begin|>functions.",
        afterName: ":0<|tool_call_argument_begin|>", end: "<|tool_call_end|><|tool_calls_section_end|>",
        trigger: "<|tool_calls_section_begin|>"),
      detect: { $0.has("<|tool_calls_section_begin|>") || $0.hasToken("<|tool_calls_section_begin|>") },
      openers: { _ in
        [
          Opener("<|tool_calls_section_begin|>", .calls(CallMachine(NamedCallMachine(.kimi, isInCall: false)))),
          Opener("<|tool_call_begin|>", .calls(CallMachine(NamedCallMachine(.kimi, isInCall: true)))),
        ]
      }),
    ToolCallFormat(
      "minimax-m2", aliases: ["minimax"],
      "<minimax:tool_call> with <invoke name=\"NAME\"> and parameter elements: MiniMax M2",
      markup: ("<minimax:tool_call>\n<invoke name=\"", "\">\n"),
      detect: { $0.has("<minimax:tool_call>") || $0.hasToken("<minimax:tool_call>") },
      openers: { tools in
        [
          Opener(
            "<minimax:tool_call>", .calls(CallMachine(MarkupCallMachine(.miniMax, tools, isInCall: false))))
        ]
      }),
    ToolCallFormat(
      "step3", "<｜tool_calls_begin｜> with <steptml:invoke name=\"NAME\"> and parameter elements: Step-3",
      markup: (
        "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name=\"", "\">\n"
      ),
      detect: { $0.has("steptml:") },
      openers: { tools in
        [
          Opener("<｜tool_calls_begin｜>", .calls(CallMachine(MarkupCallMachine(.step, tools, isInCall: false)))),
          Opener("<｜tool_call_begin｜>", .calls(CallMachine(MarkupCallMachine(.step, tools, isInCall: false)))),
        ]
      }),
    ToolCallFormat(
      "glm45", aliases: ["glm", "glm4_moe", "glm46", "glm47"],
      "<tool_call>NAME with <arg_key>K</arg_key> and <arg_value>V</arg_value>: GLM-4.5, 4.6, 4.7",
      markup: ("<tool_call>", "\n"),
      detect: { $0.has("<arg_key>") },
      openers: { tools in
        [Opener("<tool_call>", .calls(CallMachine(MarkupCallMachine(.glm, tools, isInCall: true))))]
      }),
    ToolCallFormat(
      "qwen3_coder", aliases: ["qwen3_xml"],
      "<tool_call> with <function=NAME> and <parameter=K>V</parameter>: Qwen3-Coder, Qwen3.5",
      markup: ("<tool_call>\n<function=", ">\n"),
      detect: { $0.has("<function=", "<parameter=") },
      openers: { tools in
        [
          Opener("<tool_call>", .calls(CallMachine(MarkupCallMachine(.qwenCoder, tools, isInCall: false)))),
          // The models leave the outer element out at times.
          Opener("<function=", .calls(CallMachine(MarkupCallMachine(.qwenCoder, tools, isInCall: true)))),
        ]
      }),
    ToolCallFormat(
      "mistral", "[TOOL_CALLS] with [{\"name\": …, \"arguments\": {…}}] or NAME[ARGS]{…}: Mistral",
      identifierStyle: .mistral,
      frame: CallFrame(
        begin: "[TOOL_CALLS][{\"name\": \"", afterName: "\", \"arguments\": ", end: "}]", trigger: "[TOOL_CALLS]",
        allowsSeveral: false),
      detect: { $0.has("[TOOL_CALLS]") || $0.hasToken("[TOOL_CALLS]") },
      openers: { _ in [Opener("[TOOL_CALLS]", .calls(CallMachine(NamedCallMachine(.mistral, isInCall: false))))] }),
    ToolCallFormat(
      "internlm", aliases: ["internlm2"],
      "<|action_start|><|plugin|>{\"name\": …}<|action_end|>: InternLM2, 2.5, 3",
      frame: .json(begin: "<|action_start|><|plugin|>\n", end: "<|action_end|>", trigger: "<|action_start|>"),
      detect: { $0.has("<|action_start|>") || $0.hasToken("<|action_start|>") },
      openers: { tools in
        ["<|action_start|><|plugin|>", "<|action_start|> <|plugin|>"].map {
          Opener($0, json(close: "<|action_end|>", allowsArray: false, tools))
        }
      }),
    ToolCallFormat(
      "cohere", aliases: ["cohere_command", "cohere_command4"],
      "<|START_ACTION|>[{\"tool_name\": …, \"parameters\": {…}}]<|END_ACTION|>: Command R7B, Command A",
      frame: CallFrame(
        begin: "<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"", afterName: "\", \"parameters\": ",
        end: "}\n]<|END_ACTION|>", trigger: "<|START_ACTION|>", allowsSeveral: false),
      detect: { $0.has("<|START_ACTION|>") || $0.hasToken("<|START_ACTION|>") },
      openers: { tools in
        [Opener("<|START_ACTION|>", json(close: "<|END_ACTION|>", allowsArray: true, tools))]
          + ["<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"].map { Opener($0, .ignored) }
      }),
    ToolCallFormat(
      "minimax-m1",
      "<tool_calls> with one {\"name\": …, \"arguments\": {…}} a line: MiniMax M1",
      frame: .json(begin: "<tool_calls>\n", end: "\n</tool_calls>", trigger: "<tool_calls>"),
      detect: { $0.has("<tool_calls>") },
      openers: { tools in [Opener("<tool_calls>", json(close: "</tool_calls>", allowsArray: true, tools))] }),
    ToolCallFormat(
      "phi4", aliases: ["phi4_mini_json", "phi"],
      "functools[{\"name\": …}] or <|tool_call|>[…]<|/tool_call|>: Phi-4-mini",
      frame: CallFrame(
        begin: "<|tool_call|>[{\"name\": \"", afterName: "\", \"arguments\": ", end: "}]<|/tool_call|>",
        trigger: "<|tool_call|>", allowsSeveral: false),
      detect: { $0.has("<|/tool_call|>") || $0.has("functools") || $0.has("<|/tool|>") },
      openers: { tools in
        [
          Opener("functools[", json(close: nil, allowsArray: true, tools), replayed: 1),
          Opener("<|tool_call|>", json(close: "<|/tool_call|>", allowsArray: true, tools)),
        ]
      }),
    ToolCallFormat(
      "granite", aliases: ["granite-20b-fc"],
      "<|tool_call|>[{\"name\": …}], <tool_call>… or <function_call>…: Granite",
      frame: CallFrame(
        begin: "<|tool_call|>[{\"name\": \"", afterName: "\", \"arguments\": ", end: "}]", trigger: "<|tool_call|>",
        allowsSeveral: false),
      detect: { $0.has("<|tool_call|>") || $0.has("<function_call>") },
      openers: { tools in
        [
          Opener("<|tool_call|>", json(close: nil, allowsArray: true, tools)),
          Opener("<tool_call>", json(close: "</tool_call>", allowsArray: true, tools)),
          Opener("<function_call>", json(close: nil, allowsArray: true, tools)),
        ]
      }),
    ToolCallFormat(
      "hermes", aliases: ["qwen", "qwen25", "qwen3", "apus"],
      "<tool_call>{\"name\": …, \"arguments\": {…}}</tool_call>: Hermes, Qwen 2.5 and 3, SmolLM3, the demo model",
      frame: .json(begin: "<tool_call>\n", end: "\n</tool_call>", trigger: "<tool_call>", separator: "\n"),
      detect: { $0.has("<tool_call>") || $0.hasToken("<tool_call>") },
      openers: { tools in [Opener("<tool_call>", json(close: "</tool_call>", allowsArray: true, tools))] }),
    ToolCallFormat(
      "pythonic", aliases: ["llama4", "llama4_pythonic"],
      "[NAME(key=value), …]: Llama 4, Llama 3.2 with its pythonic prompt",
      markup: ("[", "("),
      detect: { $0.has("func_name1(") || $0.has("<|header_start|>") || $0.has("tool_call.name + '('") },
      openers: { tools in
        tools.tools.map { tool in
          Opener("[\(tool.name)(", .calls(CallMachine(PythonicCallMachine(tools, name: tool.name))))
        } + ["<|python_start|>", "<|python_end|>", "<|python_tag|>"].map { Opener($0, .ignored) }
      }),
    ToolCallFormat(
      "llama3", aliases: ["llama3_json", "llama4_json"],
      "{\"name\": …, \"parameters\": {…}}, after <|python_tag|> or as the whole answer: Llama 3.1, 3.2, 3.3",
      frame: CallFrame(
        begin: "{\"name\": \"", afterName: "\", \"parameters\": ", end: "}", trigger: "{\"name\": \"",
        allowsSeveral: false),
      detect: { $0.has("<|start_header_id|>", "\"parameters\"") || $0.has("<|python_tag|>") },
      openers: { tools in
        [
          Opener("<|python_tag|>", json(close: nil, allowsArray: false, tools)),
          Opener(
            "{", .calls(CallMachine(JSONCallMachine(JSONCallSyntax(needsKnownTool: true), tools))), isAnchored: true,
            replayed: 1),
        ]
      }),
  ]

  private static func json(close: String?, allowsArray: Bool, _ tools: ToolDefinitions) -> Opener.Action {
    .calls(CallMachine(JSONCallMachine(JSONCallSyntax(close: close, allowsArray: allowsArray), tools)))
  }

  @Sendable private static func deepSeekOpeners(_ tools: ToolDefinitions) -> [Opener] {
    [
      Opener("<｜tool▁calls▁begin｜>", .calls(CallMachine(NamedCallMachine(.deepSeek, isInCall: false)))),
      Opener("<｜tool▁call▁begin｜>", .calls(CallMachine(NamedCallMachine(.deepSeek, isInCall: true)))),
    ]
  }
}

/// The texts around the JSON arguments of a call, from which a constraint is made.
struct CallFrame: Sendable {
  /// Up to the name.
  var begin: String
  /// From the name to the arguments.
  var afterName: String
  /// After the arguments.
  var end: String
  /// The text after which a call must be completed, a beginning of `begin`.
  var trigger: String
  /// Whether one such call may follow another.
  var allowsSeveral = true
  /// What stands between two calls.
  var separator = ""

  static func json(begin: String, end: String, trigger: String, separator: String = "") -> CallFrame {
    CallFrame(
      begin: begin + "{\"name\": \"", afterName: "\", \"arguments\": ", end: "}" + end, trigger: trigger,
      separator: separator)
  }
}

/// The text of a chat template, and the special tokens beside it, in which formats look for their markers.
struct TemplateText: Sendable {
  private let text: String
  private let tokens: Set<String>

  init(_ template: String, _ specialTokens: [String]) {
    text = template
    tokens = Set(specialTokens)
  }

  /// Whether the template holds all of the texts.
  func has(_ markers: String...) -> Bool { markers.allSatisfy { text.utf8Contains($0) } }

  /// Whether a special token has exactly this text.
  func hasToken(_ token: String) -> Bool { tokens.contains(token) }
}

extension String {
  /// Whether a text occurs, byte by byte.
  fileprivate func utf8Contains(_ needle: String) -> Bool {
    var text = self
    var needle = needle
    return text.withUTF8 { haystack in
      needle.withUTF8 { needle in
        guard let first = needle.first, haystack.count >= needle.count else { return needle.isEmpty }
        for start in 0...(haystack.count - needle.count) where haystack[start] == first {
          if haystack[start..<start + needle.count].elementsEqual(needle) { return true }
        }
        return false
      }
    }
  }
}

/// A name of a format with spellings that mean the same made equal.
func normalized(_ name: String) -> String { name.lowercased().replacing("-", with: "_") }
