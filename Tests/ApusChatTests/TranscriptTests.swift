import ApusChat
import ApusCore
import Testing

/// An answer and what it means.
struct Transcript: Sendable, CustomStringConvertible {
  var calls: String?
  var reasoning: String?
  var begins: Bool?
  var text: String
  var expected: [Piece]

  init(
    _ calls: String?, reasoning: String? = nil, begins: Bool? = nil, _ text: String, _ expected: [Piece]
  ) {
    self.calls = calls
    self.reasoning = reasoning
    self.begins = begins
    self.text = text
    self.expected = expected
  }

  var description: String { "\(calls ?? "-"), \(reasoning ?? "-"): \(text.prefix(60).debugDescription)" }

  func parser() throws -> ChatOutputParser {
    var options = ChatOutputParser.Options()
    options.beginsInReasoning = begins
    return ChatOutputParser(
      reasoning: try reasoning.map { try #require(ReasoningFormat.named($0)) },
      calls: try calls.map { try #require(ToolCallFormat.named($0)) }, tools: testTools, options: options)
  }
}

/// Arguments with everything that is hard: quotes, escapes, line breaks, braces, tags, other scripts.
private let hard: JSONValue = [
  "city": "Zürich \"Nord\"\n{brace} </b> \\ 東京 😀", "days": -3, "scale": 1.5, "fine": true,
  "extra": ["a": [1, 2, ["b": nil]], "c": "}]"], "list": ["x", []],
]
private let hardJSON =
  #"{"city": "Z\u00fcrich \"Nord\"\n{brace} <\/b> \\ 東京 😀", "days": -3, "scale": 1.5, "fine": true, "#
  + #""extra": {"a": [1, 2, {"b": null}], "c": "}]"}, "list": ["x", []]}"#

/// The same arguments as bare texts, in order.
private let hardValues: [(String, String)] = [
  ("city", "Zürich \"Nord\"\n{brace} </b> \\ 東京 😀"), ("days", "-3"), ("scale", "1.5"), ("fine", "true"),
  ("extra", #"{"a": [1, 2, {"b": null}], "c": "}]"}"#), ("list", #"["x", []]"#),
]

private let three: [Piece] = [.call("get_weather", hard), .call("ping", [:]), .call("search", ["query": "a < b"])]

/// Transcripts of formats whose calls are JSON within marks.
private func wrapped(_ format: String, one: (String, String) -> String, all: ([(String, String)]) -> String)
  -> [Transcript]
{
  let calls = [("get_weather", hardJSON), ("ping", "{}"), ("search", #"{"query": "a < b"}"#)]
  return [
    Transcript(format, one("ping", "{}"), [.call("ping", [:])]),
    Transcript(format, one("ping", "{ }"), [.call("ping", [:])]),
    Transcript(format, all(calls), three),
    Transcript(format, "Let me see.\n" + all(calls), [.content("Let me see.")] + three),
    Transcript(format, "Naïve — 東京.\n\n" + one("get_weather", hardJSON), [.content("Naïve — 東京."), three[0]]),
  ]
}

private func markup(
  _ format: String, wrap: (String) -> String, call: (String, [(String, String)]) -> String, between: String = "\n"
) -> [Transcript] {
  let calls = [
    call("get_weather", hardValues), call("ping", []), call("search", [("query", "a < b")]),
  ]
  return [
    Transcript(format, wrap(calls[1]), [.call("ping", [:])]),
    Transcript(format, wrap(calls[0]), [three[0]]),
    Transcript(format, wrap(calls.joined(separator: between)), three),
    Transcript(format, "Let me see.\n\n" + wrap(calls.joined(separator: between)), [.content("Let me see.")] + three),
    Transcript(
      format, wrap(calls[2]) + "\nDone < that.", [three[2], .content("\nDone < that.")]),
    Transcript(
      format,
      wrap(
        call(
          "get_weather",
          [
            ("city", "12"), ("days", "many"), ("fine", "False"), ("maybe", "null"), ("unit", "c"), ("other", "7"),
            ("extra", "{'a': True, 'b': (1, None)}"), ("list", "not a list"), ("scale", "007"), ("city", ""),
          ])),
      [
        .call(
          "get_weather",
          [
            "city": "", "days": "many", "fine": false, "maybe": nil, "unit": "c", "other": 7,
            "extra": ["a": true, "b": [1, nil]], "list": "not a list", "scale": "007",
          ])
      ]),
  ]
}

private let jsonTranscripts: [Transcript] =
  wrapped(
    "hermes", one: { "<tool_call>\n{\"name\": \"\($0)\", \"arguments\": \($1)}\n</tool_call>" },
    all: { $0.map { "<tool_call>\n{\"name\": \"\($0)\", \"arguments\": \($1)}\n</tool_call>" }.joined(separator: "\n") }
  )
  + wrapped(
    "minimax-m1", one: { "<tool_calls>\n{\"name\": \"\($0)\", \"arguments\": \($1)}\n</tool_calls>" },
    all: { "<tool_calls>\n" + $0.map { "{\"name\": \"\($0)\", \"arguments\": \($1)}\n" }.joined() + "</tool_calls>" })
  + wrapped(
    "internlm", one: { "<|action_start|><|plugin|>\n{\"name\": \"\($0)\", \"parameters\": \($1)}<|action_end|>" },
    all: {
      $0.map { "<|action_start|><|plugin|>\n{\"name\": \"\($0)\", \"arguments\": \($1)}<|action_end|>" }.joined()
    })
  + wrapped(
    "mistral", one: { "[TOOL_CALLS] [{\"name\": \"\($0)\", \"arguments\": \($1)}]" },
    all: {
      "[TOOL_CALLS]["
        + $0.map { "{\"name\": \"\($0)\", \"arguments\": \($1), \"id\": \"abcdefghi\"}" }
        .joined(separator: ", ") + "]"
    })
  + wrapped(
    "mistral", one: { "[TOOL_CALLS]\($0)[ARGS]\($1)" },
    all: { $0.map { "[TOOL_CALLS]\($0)[CALL_ID]abc123XYZ[ARGS]\($1)" }.joined() })
  + wrapped(
    "mistral", one: { "[TOOL_CALLS]\($0)\($1)" }, all: { $0.map { "[TOOL_CALLS]\($0)\($1)" }.joined(separator: "\n") })
  + wrapped(
    "deepseekv3",
    one: {
      "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>\($0)\n```json\n\($1)\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    },
    all: {
      "<｜tool▁calls▁begin｜>"
        + $0.map { "<｜tool▁call▁begin｜>function<｜tool▁sep｜>\($0)\n```json\n\($1)\n```<｜tool▁call▁end｜>" }
        .joined(separator: "\n") + "<｜tool▁calls▁end｜>"
    })
  + wrapped(
    "deepseekv31",
    one: { "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>\($0)<｜tool▁sep｜>\($1)<｜tool▁call▁end｜><｜tool▁calls▁end｜>" },
    all: {
      "<｜tool▁calls▁begin｜>" + $0.map { "<｜tool▁call▁begin｜>\($0)<｜tool▁sep｜>\($1)<｜tool▁call▁end｜>" }.joined()
        + "<｜tool▁calls▁end｜>"
    })
  + wrapped(
    "kimi_k2",
    one: {
      "<|tool_calls_section_begin|><|tool_call_begin|>functions.\($0):0<|tool_call_argument_begin|>\($1)<|tool_call_end|>"
        + "<|tool_calls_section_end|>"
    },
    all: {
      "<|tool_calls_section_begin|>"
        + $0.enumerated().map {
          "<|tool_call_begin|>functions.\($1.0):\($0)<|tool_call_argument_begin|>\($1.1)<|tool_call_end|>"
        }.joined() + "<|tool_calls_section_end|>"
    })
  + wrapped(
    "granite", one: { "<|tool_call|>[{\"name\": \"\($0)\", \"arguments\": \($1)}]" },
    all: { "<|tool_call|>[" + $0.map { "{\"name\": \"\($0)\", \"arguments\": \($1)}" }.joined(separator: ", ") + "]" })
  + wrapped(
    "granite", one: { "<function_call> {\"name\": \"\($0)\", \"arguments\": \($1)}" },
    all: { $0.map { "<function_call> {\"name\": \"\($0)\", \"arguments\": \($1)}" }.joined(separator: " ") })
  + wrapped(
    "phi4", one: { "functools[{\"name\": \"\($0)\", \"arguments\": \($1)}]" },
    all: {
      "<|tool_call|>[" + $0.map { "{\"name\": \"\($0)\", \"arguments\": \($1)}" }.joined(separator: ",")
        + "]<|/tool_call|>"
    })
  + wrapped(
    "cohere",
    one: {
      "<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"\($0)\", \"parameters\": \($1)}\n]<|END_ACTION|>"
    },
    all: {
      "<|START_ACTION|>[\n"
        + $0.map { "    {\"tool_call_id\": \"0\", \"tool_name\": \"\($0)\", \"parameters\": \($1)}" }
        .joined(separator: ",\n") + "\n]<|END_ACTION|>"
    })
  + wrapped(
    "llama3", one: { "<|python_tag|>{\"name\": \"\($0)\", \"parameters\": \($1)}" },
    all: { "<|python_tag|>" + $0.map { "{\"name\": \"\($0)\", \"parameters\": \($1)}" }.joined(separator: "; ") })

private let markupTranscripts: [Transcript] =
  markup(
    "qwen3_coder", wrap: { $0 },
    call: { name, values in
      "<tool_call>\n<function=\(name)>\n" + values.map { "<parameter=\($0)>\n\($1)\n</parameter>\n" }.joined()
        + "</function>\n</tool_call>"
    })
  + markup(
    "qwen3_coder", wrap: { "<tool_call>\n" + $0 + "\n</tool_call>" },
    call: { name, values in
      "<function=\(name)>\n" + values.map { "<parameter=\($0)>\($1)</parameter>\n" }.joined() + "</function>"
    })
  + markup(
    "glm45", wrap: { $0 },
    call: { name, values in
      "<tool_call>\(name)\n" + values.map { "<arg_key>\($0)</arg_key>\n<arg_value>\($1)</arg_value>\n" }.joined()
        + "</tool_call>"
    })
  + markup(
    "glm45", wrap: { $0 },
    call: { name, values in
      "<tool_call>\(name)" + values.map { "<arg_key>\($0)</arg_key><arg_value>\($1)</arg_value>" }.joined()
        + "</tool_call>"
    }, between: "")
  + markup(
    "minimax-m2", wrap: { "<minimax:tool_call>\n" + $0 + "\n</minimax:tool_call>" },
    call: { name, values in
      "<invoke name=\"\(name)\">\n" + values.map { "<parameter name=\"\($0)\">\($1)</parameter>\n" }.joined()
        + "</invoke>"
    })
  + markup(
    "step3", wrap: { "<｜tool_calls_begin｜>\n" + $0 + "\n<｜tool_calls_end｜>" },
    call: { name, values in
      "<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name=\"\(name)\">\n"
        + values.map { "<steptml:parameter name=\"\($0)\">\($1)</steptml:parameter>\n" }.joined()
        + "</steptml:invoke><｜tool_call_end｜>"
    })
  + markup(
    "deepseekv32", wrap: { "<｜DSML｜function_calls>\n" + $0 + "\n</｜DSML｜function_calls>" },
    call: { name, values in
      "<｜DSML｜invoke name=\"\(name)\">\n"
        + values.map {
          "<｜DSML｜parameter name=\"\($0)\" string=\"\($0 == "city" || $0 == "query")\">\($1)</｜DSML｜parameter>\n"
        }.joined() + "</｜DSML｜invoke>"
    })

private let pythonicTranscripts: [Transcript] = [
  Transcript("pythonic", "[ping()]", [.call("ping", [:])]),
  Transcript("pythonic", "<|python_start|>[ping( )]<|python_end|>", [.call("ping", [:])]),
  Transcript(
    "pythonic",
    #"Let me see."# + "\n"
      + #"[get_weather(city="Zürich \"Nord\"\n{brace} </b> \\ 東京 \U0001F600", days=-3, scale=1.5, fine=True, "#
      + #"extra={'a': [1, 2, {'b': None}], "c": '}]'}, list=['x', []]), ping(), search(query='a < b')]"#,
    [.content("Let me see.")] + three),
  Transcript(
    "pythonic", #"[search(query='''it's "so"''' , ), get_weather('Oslo', 0x10, fine = False, scale=.5)] ok"#,
    [
      .call("search", ["query": "it's \"so\""]),
      .call("get_weather", ["city": "Oslo", "days": 16, "fine": false, "scale": 0.5]), .content(" ok"),
    ]),
  Transcript("pythonic", "[ping() is a function] and [ping", [.content("[ping() is a function] and [ping")]),
  Transcript("pythonic", "a[0] = [1, 2] [unknown(x=1)]", [.content("a[0] = [1, 2] [unknown(x=1)]")]),
  Transcript(
    "pythonic", "[search(query=unquoted), ping()]",
    [.brokenCall("search", "{\"query\": "), .content("unquoted), ping()]")]),
]

private let harmonyTranscripts: [Transcript] = [
  Transcript(
    "gpt-oss", reasoning: "gpt-oss",
    "<|channel|>analysis<|message|>Think < about\nit.<|end|><|start|>assistant<|channel|>final<|message|>Zürich!",
    [.reasoning("Think < about\nit."), .content("Zürich!")]),
  Transcript(
    "gpt-oss", reasoning: "gpt-oss",
    "<|channel|>analysis<|message|>Need it.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
      + "<|constrain|>json<|message|>\(hardJSON)<|call|>",
    [.reasoning("Need it."), three[0]]),
  Transcript(
    "gpt-oss", reasoning: "gpt-oss",
    "<|channel|>commentary<|message|>First.<|end|><|start|>assistant to=functions.ping<|channel|>commentary json"
      + "<|message|>{}<|end|><|start|>assistant<|channel|>commentary to=functions.search <|constrain|>json<|message|>"
      + "{\"query\": \"a < b\"}",
    [.content("First."), .call("ping", [:]), three[2]]),
  Transcript(
    "gpt-oss", reasoning: "gpt-oss",
    "<|channel|>analysis to=browser.search code<|message|>{\"query\": 1}<|end|><|start|>assistant<|channel|>final"
      + "<|message|>Yes<|return|>", [.reasoning("{\"query\": 1}"), .content("Yes")]),
  Transcript(
    "gpt-oss", reasoning: "gpt-oss", "<|channel|>commentary to=functions.search<|message|>{\"query\": nope<|call|>",
    [.brokenCall("search", "{\"query\": n"), .content("ope")]),
  Transcript("gpt-oss", reasoning: "gpt-oss", "Plain < text", [.content("Plain < text")]),
  Transcript(
    "gpt-oss", reasoning: "gpt-oss", "<|channel|>final<|message|>a<|channel|>final<|message|>b", [.content("ab")]),
  Transcript(
    nil, reasoning: "gpt-oss", "<|channel|>commentary to=functions.ping<|message|>{}<|call|>", [.content("{}")]),
]

private let oneCall = "<tool_call>\n{\"name\": \"ping\", \"arguments\": {}}\n</tool_call>"

private let reasoningTranscripts: [Transcript] = [
  Transcript(
    nil, reasoning: "qwen3", "<think>\nHm, 1 < 2.\n\nSo.\n</think>\n\nYes <b>.",
    [.reasoning("Hm, 1 < 2.\n\nSo."), .content("Yes <b>.")]),
  Transcript(nil, reasoning: "qwen3", "<think>\n\n</think>\n\n  indented", [.content("  indented")]),
  Transcript(nil, reasoning: "qwen3", "No thought, but <think> named.", [.content("No thought, but <think> named.")]),
  Transcript(nil, reasoning: "qwen3", begins: true, "Hm.\n</think>\nYes.", [.reasoning("Hm."), .content("Yes.")]),
  Transcript(nil, reasoning: "deepseek-r1", "Hm.</think>Yes.", [.reasoning("Hm."), .content("Yes.")]),
  Transcript(nil, reasoning: "deepseek-r1", "<think>\nHm.</think>Yes.", [.reasoning("Hm."), .content("Yes.")]),
  Transcript(nil, reasoning: "deepseek-r1", begins: false, "Yes.", [.content("Yes.")]),
  Transcript(nil, reasoning: "deepseek-r1", "Never ends", [.reasoning("Never ends")]),
  Transcript(
    "step3", reasoning: "step3",
    "Hm < 1.\n</think>\n\n<｜tool_calls_begin｜>\n<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name=\"ping\">"
      + "</steptml:invoke><｜tool_call_end｜>\n<｜tool_calls_end｜>", [.reasoning("Hm < 1."), .call("ping", [:])]),
  Transcript("step3", reasoning: "step3", begins: false, "Yes.", [.content("Yes.")]),
  Transcript(
    "deepseekv31", reasoning: "deepseek-v3", begins: true, "Hm.</think>Yes <b>.",
    [.reasoning("Hm."), .content("Yes <b>.")]
  ),
  Transcript(
    "deepseekv31", reasoning: "deepseek-v3",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>ping<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>", [.call("ping", [:])]
  ),
  Transcript(nil, reasoning: "kimi", "◁think▷é◁x◁/think▷ok", [.reasoning("é◁x"), .content("ok")]),
  Transcript(nil, reasoning: "mistral", "[THINK]a[b][/THINK]c[THINK]", [.reasoning("a[b]"), .content("c[THINK]")]),
  Transcript(
    nil, reasoning: "granite", "Here is my thought process:\n\nHere is.\n\nHere is my response:\n\nHere.",
    [.reasoning("Here is."), .content("Here.")]),
  Transcript(
    nil, reasoning: "granite", "Here's my thought process: a Here's my response: b",
    [.reasoning("a "), .content(" b")]),
  Transcript(
    nil, reasoning: "cohere", "<|START_THINKING|>a<|END_THINKING|>b", [.reasoning("a"), .content("b")]),
  Transcript(
    "cohere", reasoning: "cohere", "<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>b\nc<|END_RESPONSE|>",
    [.reasoning("a"), .content("b\nc")]),
  Transcript(
    "hermes", reasoning: "qwen3", "<think>\n\(oneCall)\n</think>\n\nOk.\n\(oneCall)",
    [.reasoning(oneCall), .content("Ok."), .call("ping", [:])]),
  Transcript(
    "hermes", reasoning: "qwen3", "<think>a</think>\n\(oneCall)\n<think>\nb\n</think>\n\(oneCall)\n",
    [.reasoning("a"), .call("ping", [:]), .reasoning("b"), .call("ping", [:])]),
  Transcript(
    "glm45", reasoning: "glm45", "\n<think>a\n<tool_call>ping\n</tool_call>", [.reasoning("a"), .call("ping", [:])]),
  Transcript(
    "kimi_k2", reasoning: "kimi_k2",
    "<think>a<|tool_calls_section_begin|><|tool_call_begin|>functions.ping:3<|tool_call_argument_begin|>"
      + "<|tool_call_end|><|tool_calls_section_end|>", [.reasoning("a"), .call("ping", [:])]),
  Transcript(
    "minimax-m2", reasoning: "minimax", begins: true,
    "a\n</think>\n\nNow <think>b</think><minimax:tool_call>\n<invoke name='ping'>\n</invoke>\n</minimax:tool_call>",
    [.reasoning("a"), .content("Now "), .reasoning("b"), .call("ping", [:])]),
]

private let oddTranscripts: [Transcript] = [
  // What is no call stays text, and calls after it are found.
  Transcript("hermes", "<tool_call>\nnot JSON</tool_call>", [.content("<tool_call>\nnot JSON</tool_call>")]),
  Transcript("hermes", "<tool_call>{\"x\": 1}</tool_call>", [.content("<tool_call>{\"x\": 1}</tool_call>")]),
  Transcript(
    "hermes", "<tool_call><tool_call>\(oneCall)", [.content("<tool_call><tool_call>"), .call("ping", [:])]),
  Transcript("hermes", "a <tool_", [.content("a <tool_")]),
  Transcript("hermes", "\n\n\n", [.content("\n\n\n")]),
  Transcript("hermes", "a\n\n\n\nb\n", [.content("a\n\n\n\nb\n")]),
  Transcript("hermes", oneCall + "\n\n", [.call("ping", [:])]),
  Transcript("hermes", oneCall + "\n and more", [.call("ping", [:]), .content("\n and more")]),
  Transcript(
    "hermes", "<tool_call>{\"name\": \"ping\", \"arguments\": {\"a\": }}</tool_call>",
    [.brokenCall("ping", "{\"a\": "), .content("}}</tool_call>")]),
  // Members in another order, more of them, arguments as a string or null, a line break within a string.
  Transcript(
    "hermes", "<tool_call>{\"arguments\": {\"a\": [{}]}, \"x\": {\"name\": 1}, \"name\": \"ping\"}</tool_call>",
    [.call("ping", ["a": [[:]]])]),
  Transcript(
    "hermes", "<tool_call>{\"name\": \"ping\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>",
    [.call("ping", ["a": 1])]),
  Transcript("hermes", "<tool_call>{\"name\": \"ping\", \"arguments\": null}</tool_call>", [.call("ping", [:])]),
  Transcript("hermes", "<tool_call>{\"name\": \"ping\"}</tool_call>", [.call("ping", [:])]),
  Transcript(
    "hermes", "<tool_call>{\"name\": \"search\", \"arguments\": {\"query\": \"a\nb\tc\"}}</tool_call>",
    [.call("search", ["query": "a\nb\tc"])]),
  Transcript(
    "hermes", "<tool_call>[{\"name\": \"ping\", \"arguments\": {}}, {\"name\": \"ping\"}]</tool_call>",
    [.call("ping", [:]), .call("ping", [:])]),
  Transcript("hermes", oneCall.replacing("\n</tool_call>", with: ""), [.call("ping", [:])]),
  // Llama writes calls without marks: only an object that names a tool is one.
  Transcript("llama3", "{\"name\": \"ping\", \"parameters\": {}}", [.call("ping", [:])]),
  Transcript(
    "llama3", " {\"type\": \"function\", \"name\": \"search\", \"parameters\": {\"query\": \"x\"}}",
    [.call("search", ["query": "x"])]),
  Transcript(
    "llama3", "{\"name\": \"Bob\", \"parameters\": {}}", [.content("{\"name\": \"Bob\", \"parameters\": {}}")]),
  Transcript("llama3", "{\"name\": \"ping\", \"age\": 3}", [.content("{\"name\": \"ping\", \"age\": 3}")]),
  Transcript("llama3", "See {\"name\": \"ping\"}", [.content("See {\"name\": \"ping\"}")]),
  Transcript(
    "llama3", "{\"name\": \"ping\", \"parameters\": {}}; {\"name\": \"ping\", \"parameters\": {}}",
    [.call("ping", [:]), .call("ping", [:])]),
  Transcript("llama3", "<|python_tag|>print(1)", [.content("<|python_tag|>print(1)")]),
  Transcript("mistral", "[TOOL_CALLS] none", [.content("[TOOL_CALLS] none")]),
  Transcript("glm45", "<tool_call>{\"name\": 1}</tool_call>", [.content("<tool_call>{\"name\": 1}</tool_call>")]),
  Transcript("glm45", "<tool_call>two words</tool_call>", [.content("<tool_call>two words</tool_call>")]),
  Transcript("qwen3_coder", "<tool_call>\n<function>x", [.content("<tool_call>\n<function>x")]),
  Transcript(
    "qwen3_coder", "<function=ping>\nstray</function>",
    [.brokenCall("ping", ""), .content("stray</function>")]),
  Transcript("deepseekv31", "<｜tool▁call▁begin｜>a{b", [.content("<｜tool▁call▁begin｜>a{b")]),
  Transcript(
    "deepseekv31", "<｜tool▁call▁begin｜>ping<｜tool▁sep｜>{}<｜tool▁call▁end｜>", [.call("ping", [:])]),
  Transcript(
    "deepseekv3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>ping\n{}\n<｜tool▁call▁end｜>",
    [.call("ping", [:])]),
]

@Suite("Transcripts")
struct TranscriptTests {
  static let all =
    jsonTranscripts + markupTranscripts + pythonicTranscripts + harmonyTranscripts + reasoningTranscripts
    + oddTranscripts

  @Test("Every format has transcripts")
  func coverage() {
    #expect(Set(Self.all.compactMap(\.calls)) == Set(ToolCallFormat.all.map(\.name)))
    #expect(Set(Self.all.compactMap(\.reasoning)) == Set(ReasoningFormat.all.map(\.name)))
  }

  @Test("Every transcript means what it should", arguments: all)
  func meaning(_ transcript: Transcript) throws {
    let parser = try transcript.parser()
    #expect(try pieces(events(parser, Array(transcript.text.utf8), cuts: [])) == transcript.expected)
  }

  @Test("Pieces do not change the events, wherever an answer is cut or breaks off", arguments: all)
  func splits(_ transcript: Transcript) throws {
    var generator = SeededGenerator(seed: UInt64(transcript.text.utf8.count))
    checkSplits(try transcript.parser(), transcript.text, &generator)
  }

  @Test("Reasoning that is not separated stays in the content, and calls are found all the same")
  func notSeparated() throws {
    var options = ChatOutputParser.Options()
    options.separatesReasoning = false
    let parser = ChatOutputParser(
      reasoning: .named("qwen3"), calls: .named("hermes"), tools: testTools, options: options)
    let text = "<think>\n\(oneCall)\n</think>\n\nOk.\n\(oneCall)"
    #expect(
      try pieces(events(parser, Array(text.utf8), cuts: []))
        == [.content("<think>\n\(oneCall)\n</think>\n\nOk."), .call("ping", [:])])
    var generator = SeededGenerator(seed: 1)
    checkSplits(parser, text, &generator)
    let harmony = ChatOutputParser(reasoning: .named("gpt-oss"), options: options)
    let answer = "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b"
    #expect(try pieces(events(harmony, Array(answer.utf8), cuts: [])) == [.content("ab")])
  }

  @Test("Reasoning that is not streamed comes in one piece")
  func notStreamed() throws {
    var options = ChatOutputParser.Options()
    options.streamsReasoning = false
    var parser = ChatOutputParser(reasoning: .named("qwen3"), options: options)
    var events: [[ChatEvent]] = []
    for byte in "<think>ab</think>cd".utf8 { events.append(parser.feed([byte])) }
    events.append(parser.finish())
    #expect(events.flatMap { $0 } == [.reasoning("ab"), .content("c"), .content("d")])
  }

  @Test("Only what may be a marker is held back")
  func latency() throws {
    var parser = ChatOutputParser(reasoning: .named("qwen3"), calls: .named("hermes"), tools: testTools)
    #expect(parser.feed("Hello") == [.content("Hello")])
    #expect(parser.feed(" world<") == [.content(" world")])
    #expect(parser.feed("b") == [.content("<b")])
    #expect(parser.feed("<tool_cal") == [])
    #expect(parser.feed("m") == [.content("<tool_calm")])
    #expect(parser.feed("\n") == [])
    #expect(parser.feed("x") == [.content("\nx")])
    #expect(parser.feed("<tool_call>{\"name\": \"search\", \"arg") == [])
    #expect(
      parser.feed("uments\": {\"q") == [
        .toolCallBegin(index: 0, name: "search", id: nil), .toolCallArguments(index: 0, "{\"q"),
      ])
    #expect(parser.feed("uery\": \"é") == [.toolCallArguments(index: 0, "uery\": \"é")])
    #expect(
      parser.feed("\"}}") == [.toolCallArguments(index: 0, "\"}"), .toolCallEnd(index: 0, isComplete: true)])
    // A parser without formats passes everything on, in whole characters.
    var plain = ChatOutputParser()
    #expect(plain.feed(Array("é<".utf8)[..<1]) == [])
    #expect(plain.feed(Array("é<\n".utf8)[1...]) == [.content("é<\n")])
  }

  @Test("String arguments of markup formats stream as they come")
  func markupStreams() throws {
    var parser = ChatOutputParser(calls: .named("qwen3_coder"), tools: testTools)
    #expect(parser.feed("<tool_call>\n<function=search") == [])
    #expect(
      parser.feed(">\n<parameter=query>\nab") == [
        .toolCallBegin(index: 0, name: "search", id: nil), .toolCallArguments(index: 0, "{\"query\": \"ab"),
      ])
    #expect(parser.feed("c\"\n</para") == [.toolCallArguments(index: 0, "c\\\"")])
    #expect(parser.feed("x") == [.toolCallArguments(index: 0, "\\n</parax")])
  }

  @Test("Ids that models give to calls are kept")
  func ids() throws {
    func ids(_ format: String, _ text: String) -> [String?] {
      var parser = ChatOutputParser(calls: .named(format), tools: testTools)
      return (parser.feed(text) + parser.finish()).compactMap { event in
        if case .toolCallBegin(_, _, let id) = event { return .some(id) }
        return nil
      }
    }
    #expect(
      ids("kimi", "<|tool_call_begin|>functions.ping:12<|tool_call_argument_begin|>{}<|tool_call_end|>")
        == ["functions.ping:12"])
    #expect(ids("mistral", "[TOOL_CALLS]ping[CALL_ID]abc123XYZ[ARGS]{}") == ["abc123XYZ"])
    #expect(
      ids("mistral", "[TOOL_CALLS][{\"id\": \"123456789\", \"name\": \"ping\", \"arguments\": {}}]") == ["123456789"])
    #expect(ids("hermes", oneCall) == [nil])
  }

  @Test("Memory is bounded: a call must show itself soon")
  func bounds() throws {
    var parser = ChatOutputParser(calls: .named("hermes"), tools: testTools)
    let filler = String(repeating: "<tool_call>{\"x\": \"", count: 10_000)
    var given = 0
    var held = 0
    var worst = 0
    for byte in filler.utf8 {
      held += 1
      for case .content(let text) in parser.feed([byte]) {
        given += text.utf8.count
        held -= text.utf8.count
      }
      worst = max(worst, held)
    }
    for case .content(let text) in parser.finish() { given += text.utf8.count }
    #expect(given == filler.utf8.count)
    #expect(worst <= 1 << 17)
    let deep = String(repeating: "[", count: 100_000)
    var nested = ChatOutputParser(calls: .named("hermes"), tools: testTools)
    _ = nested.feed("<tool_call>{\"name\": \"ping\", \"arguments\": {\"a\": " + deep)
    #expect(nested.callCount == 1)
    // A value of unknown kind is kept, but not without end.
    var markup = ChatOutputParser(calls: .named("qwen3_coder"), tools: testTools)
    let long = String(repeating: "a", count: 1 << 19)
    let found = markup.feed("<function=ping><parameter=x>" + long + "</parameter></function>") + markup.finish()
    #expect(try pieces(found) == [.call("ping", ["x": .string(long)])])
  }
}
