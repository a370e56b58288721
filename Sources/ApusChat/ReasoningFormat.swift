public import ApusCore

/// How a family of models marks its chain of thought.
public struct ReasoningFormat: Sendable {
  /// The name by which it is chosen.
  public let name: String
  /// Further names.
  public let aliases: [String]
  /// What the marks are, and which models write them.
  public let summary: String
  /// Texts that begin the chain of thought.
  let opens: [String]
  /// Texts that end it.
  let closes: [String]
  /// Whether answers begin within it where the prompt does not tell.
  public let beginsOpen: Bool
  /// Whether it may begin anywhere in an answer, rather than at its start and after tool calls.
  let opensAnywhere: Bool
  /// Whether a tool call ends it, since the models forget to close it.
  let endsAtToolCalls: Bool
  /// Whether the format is gpt-oss's.
  let isHarmony: Bool
  private let isWritten: @Sendable (TemplateText) -> Bool

  init(
    _ name: String, aliases: [String] = [], _ summary: String, opens: [String] = ["<think>"],
    closes: [String] = ["</think>"], beginsOpen: Bool = false, opensAnywhere: Bool = false,
    endsAtToolCalls: Bool = false, isHarmony: Bool = false, detect: @escaping @Sendable (TemplateText) -> Bool
  ) {
    self.name = name
    self.aliases = aliases
    self.summary = summary
    self.opens = opens
    self.closes = closes
    self.beginsOpen = beginsOpen
    self.opensAnywhere = opensAnywhere
    self.endsAtToolCalls = endsAtToolCalls
    self.isHarmony = isHarmony
    isWritten = detect
  }

  /// The format of a name or an alias; upper and lower case and `-` and `_` are the same.
  public static func named(_ name: String) -> ReasoningFormat? {
    let wanted = normalized(name)
    return all.first { ([$0.name] + $0.aliases).contains { normalized($0) == wanted } }
  }

  /// The format that a chat template shows; `nil` if it shows none.
  public static func detect(template: String, specialTokens: [String] = []) -> ReasoningFormat? {
    let text = TemplateText(template, specialTokens)
    return all.first { $0.isWritten(text) }
  }

  /// Whether marks of the format are among a vocabulary's special tokens, which decoding must then keep.
  public func needs(specialTokens: [String]) -> Bool {
    isHarmony || specialTokens.contains { token in !token.isEmpty && (opens + closes).contains { $0 == token } }
  }

  /// What a prompt must add so that the chain of thought that it opened is closed.
  public var closing: String { closes.first.map { "\n\($0)\n\n" } ?? "" }

  /// The marks as an engine looks for them that limits the chain of thought.
  ///
  /// - Parameters:
  ///   - isOpen: whether the answer begins within it.
  ///   - calls: how tool calls are written, if tools are offered.
  public func marks(isOpen: Bool, calls: ToolCallFormat?) -> ThinkingMarks {
    if isHarmony {
      // Without tools nothing but the final message may follow.
      return ThinkingMarks(
        opens: ["<|channel|>analysis<|message|>"], closes: ["<|end|>"],
        closing: "<|end|><|start|>assistant" + (calls == nil ? "<|channel|>final<|message|>" : ""), isOpen: isOpen,
        opensAnywhere: true)
    }
    var marks = ThinkingMarks(opens: opens, closes: closes, isOpen: isOpen, opensAnywhere: opensAnywhere)
    if endsAtToolCalls, let calls {
      for opener in calls.openers(ToolDefinitions()) where !opener.isAnchored {
        marks.closes.append(String(decoding: opener.marker, as: UTF8.self))
      }
    }
    return marks
  }

  /// Whether a prompt leaves the chain of thought open, or has closed it; `nil` if it does neither.
  ///
  /// Templates open the block for models that always think, and write an empty one where thinking is turned off.
  /// - Parameter isContinued: whether the prompt ends within the assistant's own message.
  public func isOpen(atEndOf prompt: String, isContinued: Bool = false) -> Bool? {
    if isHarmony { return nil }
    if isContinued {
      let open = opens.compactMap { lastPosition(of: $0, in: prompt) }.max()
      let close = closes.compactMap { lastPosition(of: $0, in: prompt) }.max()
      guard let open else { return close == nil ? nil : false }
      return close.map { $0 < open } ?? true
    }
    var tail = prompt.utf8[...]
    while let last = tail.last, isWhitespace(last) { tail.removeLast() }
    let bytes = Array(tail.suffix(64))
    func ends(_ marker: String) -> Bool {
      bytes.count >= marker.utf8.count && bytes.suffix(marker.utf8.count).elementsEqual(marker.utf8)
    }
    if opens.contains(where: ends) { return true }
    return closes.contains(where: ends) ? false : nil
  }

  /// Every format, in the order in which `detect` tries them.
  public static let all: [ReasoningFormat] = [
    ReasoningFormat(
      "gpt-oss", aliases: ["harmony", "openai"], "the analysis channel: gpt-oss", opens: [], closes: [],
      isHarmony: true, detect: { $0.has("<|channel|>", "<|message|>", "<|start|>") }),
    ReasoningFormat(
      "mistral", "[THINK]…[/THINK]: Magistral", opens: ["[THINK]"], closes: ["[/THINK]"],
      detect: { $0.has("[THINK]") || $0.hasToken("[THINK]") }),
    ReasoningFormat(
      "kimi", "◁think▷…◁/think▷: Kimi-VL thinking", opens: ["◁think▷"], closes: ["◁/think▷"],
      detect: { $0.has("◁think▷") || $0.hasToken("◁think▷") }),
    ReasoningFormat(
      "cohere", aliases: ["cohere_command", "cohere_command4"], "<|START_THINKING|>…<|END_THINKING|>: Command A, R7B",
      opens: ["<|START_THINKING|>"], closes: ["<|END_THINKING|>"],
      detect: { $0.has("<|START_THINKING|>") || $0.hasToken("<|START_THINKING|>") }),
    ReasoningFormat(
      "granite", aliases: ["granite_thinking_parser"],
      "\"Here is my thought process:\" … \"Here is my response:\": Granite 3.2",
      opens: ["Here is my thought process:", "Here's my thought process:"],
      closes: ["Here is my response:", "Here's my response:"],
      detect: { $0.has("Here is my thought process:") }),
    ReasoningFormat(
      "kimi_k2", "<think>…</think>, ended by a section of tool calls, too: Kimi K2 Thinking", opensAnywhere: true,
      endsAtToolCalls: true, detect: { $0.has("<|tool_calls_section_begin|>", "think>") }),
    ReasoningFormat(
      "minimax", aliases: ["minimax-m2", "minimax-append-think", "minimax-m1"],
      "<think>…</think>, also between tool calls: MiniMax M1, M2", opensAnywhere: true,
      detect: { $0.has("<minimax:tool_call>") || $0.has("<tool_calls>", "<think>") }),
    ReasoningFormat(
      "step3", aliases: ["step3p5"], "<think>…</think>, opened by the prompt: Step-3", beginsOpen: true,
      detect: { $0.has("steptml:") }),
    ReasoningFormat(
      "glm45", aliases: ["glm", "glm47"], "<think>…</think>, ended by a tool call, too: GLM-4.5, 4.6",
      endsAtToolCalls: true, detect: { $0.has("<arg_key>", "think>") }),
    ReasoningFormat(
      "deepseek-v3", aliases: ["deepseek_v31", "deepseek_v32", "deepseek-v4"],
      "<think>…</think>, if the prompt opens it: DeepSeek V3.1, V3.2",
      detect: { $0.has("<｜Assistant｜>", "</think>", "thinking") }),
    ReasoningFormat(
      "deepseek-r1", aliases: ["qwen3-thinking", "deepseek_r1"],
      "<think>…</think>, where answers begin within: DeepSeek R1 and its distilled models, Qwen3-Thinking",
      beginsOpen: true, detect: { $0.has("<｜Assistant｜>", "</think>") }),
    ReasoningFormat(
      "qwen3", aliases: ["think", "apus", "smollm3", "nemotron", "interns1", "phi4"],
      "<think>…</think>: Qwen3, SmolLM3, Phi-4 reasoning, the demo model, and most others",
      detect: { $0.has("<think>") || $0.has("</think>") || $0.hasToken("<think>") }),
  ]
}

private func lastPosition(of needle: String, in text: String) -> Int? {
  let haystack = Array(text.utf8)
  let needle = Array(needle.utf8)
  guard !needle.isEmpty, haystack.count >= needle.count else { return nil }
  for start in stride(from: haystack.count - needle.count, through: 0, by: -1)
  where haystack[start] == needle[0] && haystack[start..<start + needle.count].elementsEqual(needle) { return start }
  return nil
}
