import ApusCore
import ApusTokenization
import Foundation
import Testing

@Suite("Harmony")
struct HarmonyTests {
  private typealias Message = HarmonyMessage

  private static func golden(_ name: String) throws -> String {
    // The reference's own tests leave white space at the end out.
    let text = String(decoding: try SharedData.bytes("tokenizers/harmony-goldens/\(name).txt"), as: UTF8.self)
    return String(text.reversed().drop { $0.isWhitespace }.reversed())
  }

  private static func system(_ change: (inout HarmonySystemContent) -> Void = { _ in }) -> HarmonyMessage {
    var content = HarmonySystemContent()
    change(&content)
    return HarmonyMessage(.system, [.system(content)])
  }

  private static func arithmetic(_ thought: String) -> [HarmonyMessage] {
    [
      Message(.user, "What is 2 + 2?"), Message(.assistant, thought, channel: "analysis"),
      Message(.assistant, "2 + 2 equals 4.", channel: "final"), Message(.user, "What about 9 / 2?"),
    ]
  }

  private static let weatherTools: [HarmonyToolNamespace.Tool] = [
    .init(name: "get_location", description: "Gets the location of the user.", parameters: nil),
    .init(
      name: "get_current_weather", description: "Gets the current weather in the provided location.",
      parameters: [
        "type": "object",
        "properties": [
          "location": ["type": "string", "description": "The city and state, e.g. San Francisco, CA"],
          "format": ["type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"],
        ],
        "required": ["location"],
      ]),
    .init(
      name: "get_multiple_weathers", description: "Gets the current weather in the provided list of locations.",
      parameters: [
        "type": "object",
        "properties": [
          "locations": [
            "type": "array", "items": ["type": "string"],
            "description": #"List of city and state, e.g. ["San Francisco, CA", "New York, NY"]"#,
          ],
          "format": ["type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"],
        ],
        "required": ["locations"],
      ]),
    .init(
      name: "kitchensink", description: "A function with various complex schemas.",
      parameters: [
        "description": "params object", "type": "object",
        "properties": [
          "string": ["type": "string", "title": "STRING", "description": "A string", "examples": ["hello", "world"]],
          "string_nullable": [
            "type": "string", "nullable": true, "description": "A nullable string", "default": "the default",
          ],
          "string_enum": ["type": "string", "enum": ["a", "b", "c"]],
          "oneof_string_or_number": [
            "oneOf": [
              ["type": "string", "default": "default_string_in_oneof"],
              ["type": "number", "description": "numbers can happen too"],
            ],
            "description": "a oneof", "default": 20,
          ],
        ],
      ]),
  ]

  private static func developer(_ instructions: String?, _ tools: [HarmonyToolNamespace.Tool] = []) -> HarmonyMessage {
    let namespaces = tools.isEmpty ? [] : [HarmonyToolNamespace(name: "functions", tools: tools)]
    return HarmonyMessage(
      .developer, [.developer(HarmonyDeveloperContent(instructions: instructions, tools: namespaces))])
  }

  /// The conversations of the reference's own tests, by the names of its goldens.
  private static func conversations() -> [(name: String, messages: [HarmonyMessage], keepsAnalysis: Bool, opens: Bool)]
  {
    func required(_ channels: [String], _ change: (inout HarmonySystemContent) -> Void = { _ in }) -> HarmonyMessage {
      system {
        $0.validChannels = channels
        change(&$0)
      }
    }
    let today: (inout HarmonySystemContent) -> Void = { $0.conversationStartDate = "2025-06-28" }
    let lookup = HarmonyToolNamespace.Tool(
      name: "lookup_weather",
      description: "Use this tool to lookup the weather in a given location. Call it with the parameter 'location', "
        + "can be any textual description of a location.",
      parameters: ["type": "object", "properties": ["location": ["type": "string"]], "required": ["location"]])
    var cases: [(String, [HarmonyMessage], Bool, Bool)] = [
      ("test_simple_convo", [system(), Message(.user, "What is 2 + 2?")], false, true),
      ("test_no_tools", [system(today)], false, true),
      (
        "test_browser_tool_only",
        [
          system {
            today(&$0)
            $0.tools = [.browser]
          }
        ], false, true
      ),
      (
        "test_browser_and_python_tool",
        [
          system {
            today(&$0)
            $0.tools = [.python, .browser]
          }
        ], false, true
      ),
      (
        "test_browser_and_function_tool",
        [
          system {
            today(&$0)
            $0.tools = [.browser]
          }, developer(nil, [lookup]),
        ], false, true
      ),
      (
        "test_render_functions_with_parameters",
        [
          system {
            today(&$0)
            $0.reasoningEffort = .high
          }, developer("Always respond in riddles", weatherTools),
          Message(.user, "What is the weather like in SF?"),
        ], false, true
      ),
      (
        "test_reasoning_system_message", [required(["analysis", "final"]), Message(.user, "What is 2 + 2?")], false,
        true
      ),
      (
        "test_reasoning_system_message_no_instruction",
        [
          required(["analysis", "final"]) { $0.reasoningEffort = .high },
          Message(.user, "What is the best place to eat candy in the world?"),
        ], false, true
      ),
      (
        "test_reasoning_system_message_with_dates",
        [
          required(["analysis", "final"]) {
            $0.conversationStartDate = "2021-01-01"
            $0.knowledgeCutoff = "2021-01"
          }, Message(.user, "What is 42 * pi?"),
        ], false, true
      ),
      (
        "test_dropping_cot_by_default",
        arithmetic("User asks: “What is 2 + 2?” Simple arithmetic. Provide answer."), false, true
      ),
      (
        "test_preserve_cot",
        arithmetic(#"User asks a simple question: "What is 2 + 2?" The answer: 4."#), true, true
      ),
      (
        "test_does_not_drop_if_ongoing_analysis",
        [
          Message(.user, "What is the weather in SF?"),
          Message(
            .assistant, "User asks: “What is the weather in SF?” We need to use lookup_weather tool.",
            channel: "analysis"),
          Message(
            .assistant, #"{"location": "San Francisco"}"#, recipient: "functions.lookup_weather", channel: "commentary",
            contentType: "<|constrain|>json"),
          Message(.tool, #"{"temperature": 20, "description": "sunny"}"#, name: "functions.lookup_weather"),
        ], false, true
      ),
      (
        "test_keep_analysis_between_finals",
        [
          Message(.user, "What is 2 + 2?"), Message(.assistant, "thinking 2+2", channel: "analysis"),
          Message(.assistant, "4", channel: "final"), Message(.user, "What is 3 + 5?"),
          Message(.assistant, "thinking 3+5", channel: "analysis"), Message(.assistant, "8", channel: "final"),
        ], false, false
      ),
    ]
    for (name, effort) in [("low", HarmonySystemContent.ReasoningEffort.low), ("medium", .medium), ("high", .high)] {
      let start = system { $0.reasoningEffort = effort }
      let question = Message(.user, "What is the capital of the largest country in the world?")
      let robot = developer("Answer the user's questions like a robot.")
      cases.append(("test_simple_convo_\(name)_effort", [start, robot, question], false, true))
      cases.append(("test_simple_convo_\(name)_effort_no_instruction", [start, question], false, true))
    }
    return cases
  }

  @Test("All goldens of renderings", .enabled(if: SharedData.exists("tokenizers/harmony-goldens")))
  func renderings() throws {
    var count = 0
    for (name, messages, keepsAnalysis, opens) in Self.conversations() {
      var renderer = HarmonyRenderer()
      renderer.dropsAnalysis = !keepsAnalysis
      let text = try renderer.render(messages, nextRole: opens ? .assistant : nil)
      #expect(text == (try Self.golden(name)), "\(name)")
      count += 1
    }
    #expect(count == 19)
  }

  @Test("All goldens of completions", .enabled(if: SharedData.exists("tokenizers/harmony-goldens")))
  func completions() throws {
    let tokenizer = try Tokenizer.load(file: SharedData.root + "tokenizers/gpt-oss/derived_tokenizer.json")
    func ids(_ name: String) throws -> [TokenID] {
      try Self.golden(name).split(whereSeparator: \.isWhitespace).map { try #require(TokenID($0)) }
    }
    let response = try ids("test_simple_reasoning_response")
    let reasoning = try HarmonyParser.messages(of: tokenizer.decode(response), role: .assistant)
    #expect(
      reasoning == [
        Message(.assistant, "User asks: \"What is 2 + 2?\" Simple arithmetic. Provide answer.", channel: "analysis"),
        Message(.assistant, "2 + 2 = 4.", channel: "final"),
      ])
    // Written again, the messages are the ids that were read, with the ends that a history has.
    var renderer = HarmonyRenderer()
    renderer.dropsAnalysis = false
    let again = try tokenizer.encode(try renderer.render(reasoning, nextRole: nil), addSpecialTokens: false)
    #expect(again.map { $0 == 200007 ? 200002 : $0 } == [200006, 173781] + response + [200002])

    let call = try HarmonyParser.messages(of: tokenizer.decode(try ids("test_simple_tool_call")), role: .assistant)
    #expect(
      call == [
        Message(
          .assistant, "User asks: \"What is the weather in Tokyo?\" We need to use lookup_weather tool.",
          channel: "analysis"),
        Message(
          .assistant, #"{"location": "Tokyo"}"#, recipient: "lookup_weather", channel: "analysis", contentType: "code"),
      ])

    let tool = try Self.golden("test_tool_response_parsing")
    #expect(
      try HarmonyParser.messages(of: tool, role: nil) == [
        Message(
          .tool, #"{"result": "https://openai.com/"}"#, name: "browser.search", recipient: "assistant",
          channel: "commentary")
      ])
    let stream = try HarmonyParser.messages(of: try Self.golden("test_streamable_parser"), role: .assistant)
    #expect(stream.count == 3)
    #expect(
      stream[1].recipient == "browser.search" && stream[1].contentType == "code" && stream[1].channel == "commentary")
    #expect(stream[2].role == .tool && stream[2].name == "browser.search")
  }

  @Test("Headers of messages are read in every order")
  func headers() throws {
    let call = Message(
      .assistant, "{}", recipient: "functions.get_weather", channel: "commentary", contentType: "<|constrain|>json")
    for text in [
      "<|start|>assistant<|channel|>commentary to=functions.get_weather<|constrain|>json<|message|>{}<|call|>",
      "<|start|>assistant to=functions.get_weather<|channel|>commentary<|constrain|>json<|message|>{}<|end|>",
      "<|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{}",
    ] {
      #expect(try HarmonyParser.messages(of: text, role: nil) == [call], "\(text)")
    }
    for text in [
      "hello", "<|start|>", "<|start|>nobody<|message|>x", "<|start|>user<|channel|><|message|>x",
      "<|start|>user a b c d<|message|>x", "<|channel|>commentary Hello<|end|>",
    ] {
      #expect(throws: EngineError.self, "\(text)") { try HarmonyParser.messages(of: text, role: nil) }
    }
  }

  @Test("Chat completions become harmony messages")
  func chat() throws {
    var template = ChatTemplate.harmony
    template.clock = { .init(year: 2025, month: 6, day: 28) }
    let head =
      "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
      + "Current date: 2025-06-28\n\nReasoning: low\n\n# Valid channels: analysis, commentary, final. Channel must be "
      + "included for every message."
    var prompt = ChatPrompt(
      messages: [
        ["role": "system", "content": "Be brief."],
        ["role": "developer", "content": [["type": "text", "text": "Rhyme."]]],
        ["role": "user", "content": "Weather?"],
        [
          "role": "assistant", "reasoning_content": "Ask.", "content": "Let me look.",
          "tool_calls": [
            ["id": "a", "function": ["name": "f", "arguments": "{\"x\": 1}"]],
            ["id": "b", "function": ["name": "g", "arguments": ["y": [1.5, "é"]]]],
          ],
        ],
        ["role": "tool", "tool_call_id": "a", "content": "1"], ["role": "tool", "tool_call_id": "b", "content": "2"],
      ],
      tools: [["type": "function", "function": ["name": "f", "description": "F.", "parameters": .null]]],
      variables: ["reasoning_effort": "low"])
    let body =
      "<|end|><|start|>developer<|message|># Instructions\n\nBe brief.\n\nRhyme.\n\n# Tools\n\n## functions\n\nnamespace "
      + "functions {\n\n// F.\ntype f = () => any;\n\n} // namespace functions<|end|><|start|>user<|message|>Weather?"
      + "<|end|><|start|>assistant<|channel|>analysis<|message|>Ask.<|end|><|start|>assistant<|channel|>commentary"
      + "<|message|>Let me look.<|end|><|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json"
      + "<|message|>{\"x\": 1}<|call|><|start|>assistant to=functions.g<|channel|>commentary <|constrain|>json"
      + "<|message|>{\"y\":[1.5,\"é\"]}<|call|><|start|>functions.f to=assistant<|channel|>commentary<|message|>1<|end|>"
      + "<|start|>functions.g to=assistant<|channel|>commentary<|message|>2<|end|><|start|>assistant"
    #expect(
      try template.render(prompt)
        == head + "\nCalls to these tools must go to the commentary channel: 'functions'." + body)

    prompt = ChatPrompt(
      messages: [["role": "user", "content": "Hi"], ["role": "assistant", "content": "Hel"]],
      addGenerationPrompt: false, continueFinalMessage: true, variables: ["reasoning_effort": "LOW"])
    #expect(
      try template.render(prompt)
        == head + "<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hel")
    for blank in ["", " \n"] as [JSONValue] {
      let call: JSONValue = ["role": "assistant", "tool_calls": [["function": ["name": "f", "arguments": blank]]]]
      let text = try template.render(ChatPrompt(messages: [call], addGenerationPrompt: false))
      #expect(text.hasSuffix("to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"))
    }
    for (messages, variables): (JSONValue, [String: JSONValue]) in [
      ([["role": "robot", "content": "x"]], [:]), ([["role": "tool", "content": "x"]], [:]), ("x", [:]),
      ([["role": "user", "content": [["type": "image_url"]]]], [:]), ([], ["reasoning_effort": "extreme"]),
      ([], ["builtin_tools": ["calculator"]]),
    ] {
      let error = #expect(throws: EngineError.self) {
        try template.render(ChatPrompt(messages: messages, variables: variables))
      }
      #expect(error?.code == .invalidRequest)
    }
  }

  @Test("A model whose template writes the format speaks it", .enabled(if: SharedData.isPresent))
  func detection() throws {
    #expect(try ChatTemplateSet.load(path: SharedData.root + "tokenizers/config-only/gpt-oss").speaksHarmony)
    #expect(try !ChatTemplateSet.load(path: SharedData.root + "tokenizers/config-only/kimi_k2/tokenizer").speaksHarmony)
    var set = ChatTemplateSet(sources: ["default": "{{ messages }}"])
    #expect(!set.speaksHarmony)
    try set.choose("harmony")
    #expect(
      try set.render(ChatPrompt(messages: [["role": "user", "content": "q"]])).hasSuffix("q<|end|><|start|>assistant"))
  }
}
