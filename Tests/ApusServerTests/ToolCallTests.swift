import ApusCore
import ApusServer
import Foundation
import Testing

private let weather: JSONValue = [
  "type": "function",
  "function": [
    "name": "get_weather",
    "parameters": ["type": "object", "properties": ["city": ["type": "string"], "days": ["type": "integer"]]],
  ],
]
private let ping: JSONValue = ["type": "function", "function": ["name": "ping"]]
private let chat: JSONValue = ["messages": [["role": "user", "content": "Hi"]], "tools": [weather, ping]]

/// A transcript with the values that differ from run to run replaced: times, fingerprints and the ids of calls.
private func stable(_ answer: Answer) -> [String] {
  let json = answer.events.first.flatMap { try? JSONValue.parse($0) } ?? .null
  var text = answer.text
  if let created = json["created"]?.intValue { text = text.replacing("\"created\":\(created)", with: "\"created\":0") }
  if let fingerprint = json["system_fingerprint"]?.stringValue { text = text.replacing(fingerprint, with: "fp") }
  text = text.replacing(/"call_[0-9a-f]{24}"/, with: "\"call_ID\"")
  return text.split(separator: "\n\n", omittingEmptySubsequences: true).map(String.init)
}

@Suite struct ToolCallTests {
  @Test func streamTranscript() async throws {
    let answer = try await withRoutes(callingService()) { client in
      try await client.post("/v1/chat/completions", with(chat, ["stream": true, "rid": "r"]))
    }
    let head =
      #"data: {"id":"r","object":"chat.completion.chunk","created":0,"model":"fake/model","system_fingerprint":"fp","#
      + #""choices":[{"index":0,"delta":"#
    let tail = #","logprobs":null,"finish_reason":null}]}"#
    func call(_ index: Int, _ members: String) -> String { "{\"tool_calls\":[{\"index\":\(index),\(members)}]}" }
    func arguments(_ text: String) -> String {
      "\"function\":{\"arguments\":\"" + text.replacing("\"", with: "\\\"") + "\"}"
    }
    #expect(
      stable(answer) == [
        head + #"{"role":"assistant","content":""}"# + tail,
        head + #"{"reasoning_content":"Hm"}"# + tail,
        head + #"{"reasoning_content":"."}"# + tail,
        head + #"{"content":"Let me"}"# + tail,
        head + #"{"content":" see."}"# + tail,
        head + call(0, #""id":"call_ID","type":"function","function":{"name":"get_weather","arguments":""}"#) + tail,
        head + call(0, arguments("{\"city\": \"Zü")) + tail,
        head + call(0, arguments("rich\", \"days\"")) + tail,
        head + call(0, arguments(": 3}")) + tail,
        head + call(1, #""id":"call_ID","type":"function","function":{"name":"ping","arguments":""}"#) + tail,
        head + call(1, arguments("{}")) + tail,
        head + #"{},"logprobs":null,"finish_reason":"tool_calls","matched_stop":257}]}"#,
        "data: [DONE]",
      ])
  }

  @Test func wholeAnswer() async throws {
    let answer = try await withRoutes(callingService()) { try await $0.post("/v1/chat/completions", chat) }
    let choice = answer.json["choices"]?[0]
    #expect(choice?["finish_reason"] == "tool_calls")
    let message = try #require(choice?["message"])
    #expect(message.objectValue?.keys == ["role", "content", "refusal", "reasoning_content", "tool_calls"])
    #expect(message["content"] == "Let me see.")
    #expect(message["reasoning_content"] == "Hm.")
    let calls = try #require(message["tool_calls"]?.arrayValue)
    #expect(calls.count == 2)
    #expect(calls[0]["type"] == "function")
    #expect(calls[0]["function"] == ["name": "get_weather", "arguments": "{\"city\": \"Zürich\", \"days\": 3}"])
    #expect(calls[1]["function"] == ["name": "ping", "arguments": "{}"])
    let ids = calls.map { $0["id"]?.stringValue ?? "" }
    #expect(ids.allSatisfy { $0.wholeMatch(of: /call_[0-9a-f]{24}/) != nil } && ids[0] != ids[1])
    // Without text, content is null.
    let bare = try await withRoutes(callingService(Array(Self.callOnly))) {
      try await $0.post("/v1/chat/completions", chat)
    }
    #expect(bare.json["choices"]?[0]?["message"]?["content"] == .null)
  }

  private static let callOnly = callingAnswer.suffix(3)

  @Test func reasoningOptions() async throws {
    let words = ["<think>", "a", "b", "</think>", "\n\nc"]
    let body: JSONValue = ["messages": [["role": "user", "content": "Hi"]], "stream": true]
    func deltas(_ members: JSONValue, _ fake: FakeService) async throws -> [JSONValue] {
      let answer = try await withRoutes(fake) { try await $0.post("/v1/chat/completions", with(body, members)) }
      return answer.events.dropFirst().dropLast(2).compactMap { try? JSONValue.parse($0)["choices"]?[0]?["delta"] }
    }
    #expect(
      try await deltas([:], callingService(words))
        == [["reasoning_content": "a"], ["reasoning_content": "b"], ["content": "c"]])
    #expect(
      try await deltas(["stream_reasoning": false], callingService(words))
        == [["reasoning_content": "ab"], ["content": "c"]])
    #expect(
      try await deltas(["separate_reasoning": false], callingService(words)) == words.map { ["content": .string($0)] })
    // The prompt decides whether the answer begins within the chain of thought.
    let open = callingService(["a", "</think>", "b"], promptEnd: "<assistant><think>\n")
    #expect(try await deltas([:], open) == [["reasoning_content": "a"], ["content": "b"]])
    let closed = callingService(["a"], promptEnd: "<think>\n\n</think>\n\n")
    #expect(try await deltas([:], closed) == [["content": "a"]])
    // So does a prompt of tokens.
    let tokens: JSONValue = ["input_ids": .array("x<think>\n".utf8.map { .int(Int64($0)) })]
    #expect(
      try await deltas(tokens, callingService(["a", "</think>", "b"])) == [
        ["reasoning_content": "a"], ["content": "b"],
      ])
    // Reasoning without an answer: content is null.
    let cut = try await withRoutes(callingService(words)) { client in
      try await client.post("/v1/chat/completions", with(body, ["stream": false, "max_tokens": 2]))
    }
    #expect(cut.json["choices"]?[0]?["message"]?["content"] == .null)
    #expect(cut.json["choices"]?[0]?["message"]?["reasoning_content"] == "a")
    #expect(cut.json["choices"]?[0]?["finish_reason"] == "length")
  }

  @Test func choices() async throws {
    func send(_ members: JSONValue, _ fake: FakeService) async throws -> Answer {
      try await withRoutes(fake) { try await $0.post("/v1/chat/completions", with(chat, members)) }
    }
    // Without tools, the marks are text.
    let none = try await send(["tool_choice": "none"], callingService(Array(Self.callOnly)))
    #expect(none.json["choices"]?[0]?["message"]?["content"]?.stringValue == Self.callOnly.joined())
    #expect(none.json["choices"]?[0]?["finish_reason"] == "stop")
    // A forced call is what the grammar allows, after the chain of thought if the prompt opened it.
    let function: JSONValue = ["type": "function", "function": ["name": "get_weather"]]
    func grammar(_ members: JSONValue, _ fake: FakeService) async throws -> JSONValue? {
      let answer = try await send(members, fake)
      #expect(answer.status == 200)
      guard case .structuralTag(let text)? = fake.requests.first?.sampling.grammar else { return nil }
      return try JSONValue.parse(text)["format"]
    }
    let named = try #require(try await grammar(["tool_choice": function], callingService(promptEnd: "<think></think>")))
    #expect(named["type"] == "tags_with_separator" && named["stop_after_first"] == true)
    #expect(named["tags"]?[0]?["begin"] == "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": ")
    #expect(named["tags"]?[0]?["content"]?["json_schema"] == weather["function"]?["parameters"])
    let required = try #require(try await grammar(["tool_choice": "required"], callingService(promptEnd: "<think>\n")))
    #expect(required["elements"]?[0]?["end"] == "</think>")
    #expect(required["elements"]?[2]?["tags"]?.arrayValue?.count == 2)
    #expect(try await grammar([:], callingService()) == nil)
    let strict: JSONValue = [
      "tools": [["type": "function", "function": ["name": "ping", "strict": true, "parameters": ["type": "object"]]]]
    ]
    #expect(try await grammar(strict, callingService(promptEnd: "<think></think>"))?["type"] == "triggered_tags")
    // Where the prompt neither opens nor closes the chain of thought the model may open one, or not.
    for (members, type) in [(strict, "triggered_tags"), (["response_format": ["type": "json_object"]], "json_schema")] {
      let either = try #require(try await grammar(members, callingService()))
      #expect(either["type"] == "or" && either["elements"]?[1]?["type"]?.stringValue == type)
      #expect(either["elements"]?[0]?["elements"]?[0]?["begin"] == "<think>")
      #expect(either["elements"]?[0]?["elements"]?[2]?["type"]?.stringValue == type)
    }
    // What the client asks of the text holds after the chain of thought, too.
    let format: JSONValue = ["response_format": ["type": "json_object"]]
    let json = try #require(try await grammar(format, callingService(promptEnd: "<think>\n")))
    #expect(json["elements"]?[2]?["json_schema"] == ["type": "object"])
    let schema: JSONValue = [
      "response_format": ["type": "json_schema", "json_schema": ["schema": ["type": "integer"], "strict": true]]
    ]
    let thought = try #require(try await grammar(schema, callingService(promptEnd: "<think>\n")))
    #expect(thought["elements"]?[2]?["json_schema"] == ["type": "integer"])
    #expect(thought["elements"]?[2]?["strict"] == true)
    let both = try await send(with(format, ["tool_choice": "required"]), callingService())
    #expect(both.status == 400 && both.parameter == "tool_choice")
    // A format without such a grammar: the prompt begins the call.
    let coder = callingService(
      ["<parameter=city>\n", "x\n</parameter>", "\n</function>\n</tool_call>"], template: "<function= <parameter=")
    let forced = try await send(["tool_choice": function], coder)
    #expect(promptText(coder.requests.first).hasSuffix("<assistant><tool_call>\n<function=get_weather>\n"))
    let call = forced.json["choices"]?[0]?["message"]?["tool_calls"]?[0]
    #expect(call?["function"] == ["name": "get_weather", "arguments": "{\"city\": \"x\"}"])
    #expect(forced.json["choices"]?[0]?["finish_reason"] == "tool_calls")
    let opened = callingService(
      ["ping>", "</function>"], template: "<function= <parameter= <think>", promptEnd: "<think>\n")
    let any = try await send(["tool_choice": "required", "stream": true], opened)
    #expect(promptText(opened.requests.first).hasSuffix("<think>\n\n</think>\n\n<tool_call>\n<function="))
    #expect(any.text.contains("\"name\":\"ping\",\"arguments\":\"\""))
    let silent = try await send(["tool_choice": "required"], callingService(template: ""))
    #expect(silent.status == 400)
    #expect(silent.parameter == "tool_choice")
    // One call is all that a client gets that wants no more.
    let single = try await send(["parallel_tool_calls": false], callingService())
    #expect(single.json["choices"]?[0]?["message"]?["tool_calls"]?.arrayValue?.count == 1)
    // A call that breaks off keeps what there is of its arguments.
    let broken = try await send(["max_tokens": 15], callingService())
    #expect(broken.json["choices"]?[0]?["finish_reason"] == "length")
    #expect(
      broken.json["choices"]?[0]?["message"]?["tool_calls"]?[0]?["function"]?["arguments"]
        == "{\"city\": \"Zürich\", \"days\"")
  }

  @Test func identifiersOfFamilies() async throws {
    func ids(_ words: [String], _ template: String) async throws -> [String] {
      let answer = try await withRoutes(callingService(words, template: template)) {
        try await $0.post("/v1/chat/completions", chat)
      }
      return (answer.json["choices"]?[0]?["message"]?["tool_calls"]?.arrayValue ?? []).map {
        $0["id"]?.stringValue ?? ""
      }
    }
    let kimi = [
      "<|tool_calls_section_begin|><|tool_call_begin|>functions.ping:7<|tool_call_argument_begin|>{}<|tool_call_end|>",
      "<|tool_calls_section_end|>",
    ]
    #expect(try await ids(kimi, "<|tool_calls_section_begin|>") == ["functions.ping:7"])
    let mistral = try await ids(
      ["[TOOL_CALLS]ping[ARGS]{}", "[TOOL_CALLS]ping[CALL_ID]abc123XYZ[ARGS]{}"], "[TOOL_CALLS]")
    #expect(mistral.count == 2 && mistral[1] == "abc123XYZ")
    #expect(mistral[0].wholeMatch(of: /[0-9A-Za-z]{9}/) != nil)
  }

  @Test func keepsSpecialTokensThatAreMarks() async throws {
    func skips(_ template: String, _ tokens: [String], _ members: JSONValue = [:]) async throws -> Bool? {
      let fake = callingService(["x"], template: template, specialTokens: tokens)
      _ = try await withRoutes(fake) { try await $0.post("/v1/chat/completions", with(chat, members)) }
      return fake.requests.first?.sampling.skipSpecialTokens
    }
    #expect(try await skips("[TOOL_CALLS]", ["[TOOL_CALLS]"]) == false)
    #expect(try await skips("[TOOL_CALLS]", ["[TOOL_CALLS]"], ["tools": []]) == true)
    #expect(try await skips(qwenTemplate, ["<|im_end|>"]) == true)
    #expect(try await skips(qwenTemplate, ["<think>"], ["tools": []]) == false)
    #expect(try await skips("<|start|><|channel|><|message|>", []) == false)
  }

  @Test func logprobsGoWithTheNextPiece() async throws {
    let answer = try await withRoutes(callingService()) { client in
      try await client.post("/v1/chat/completions", with(chat, ["stream": true, "logprobs": true]))
    }
    var count = 0
    for event in answer.events.dropLast() {
      count += try JSONValue.parse(event)["choices"]?[0]?["logprobs"]?["content"]?.arrayValue?.count ?? 0
    }
    // Every token, and the one that ends the answer.
    #expect(count == callingAnswer.count + 1)
  }

  @Test func conversationsWithTools() async throws {
    let fake = callingService(["x"])
    let body: JSONValue = [
      "messages": [
        ["role": "developer", "content": "Be brief"], ["role": "user", "content": "Hi"],
        [
          "role": "assistant", "content": nil, "reasoning_content": "Hm",
          "tool_calls": [
            ["id": "call_1", "type": "function", "function": ["name": "ping", "arguments": "{\"a\": [1]}"]]
          ],
        ],
        ["role": "tool", "tool_call_id": "call_1", "content": [["type": "text", "text": "pong"]]],
      ], "reasoning_effort": "none",
    ]
    let answer = try await withRoutes(fake) { try await $0.post("/v1/chat/completions", body) }
    #expect(answer.status == 200)
    let messages = try #require(fake.messages.first)
    #expect(messages[0]?["role"] == "system")
    #expect(messages[2]?["tool_calls"]?[0]?["function"]?["arguments"] == "{\"a\": [1]}")
    #expect(messages[2]?["reasoning_content"] == "Hm")
    #expect(messages[3]?["content"] == "pong")
    #expect(promptText(fake.requests.first).contains("<enable_thinking=false>"))
    let knowing = callingService(["x"], template: "{% if message.role == 'developer' %}")
    _ = try await withRoutes(knowing) { try await $0.post("/v1/chat/completions", body) }
    #expect(knowing.messages.first?[0]?["role"] == "developer")
  }

  @Test func thinkingBudgets() async throws {
    let chat: JSONValue = ["messages": [["role": "user", "content": "Hi"]]]
    for (members, budget) in [
      (["thinking_budget": 7], 7), (["thinking_token_budget": 0], 0), (["max_thinking_tokens": -1], nil), ([:], nil),
      (["custom_params": ["thinking_budget": 9, "other": ["x"]]], 9),
    ] as [(JSONValue, Int?)] {
      for promptEnd in ["<think>\n", "<think></think>", "<assistant>"] {
        let fake = callingService(promptEnd: promptEnd)
        let answer = try await withRoutes(fake) { try await $0.post("/v1/chat/completions", with(chat, members)) }
        #expect(answer.status == 200, "\(answer.text)")
        let sampling = try #require(fake.requests.first?.sampling)
        #expect(sampling.thinkingBudget == budget)
        #expect(sampling.thinkingMarks.isOpen == (budget != nil && promptEnd == "<think>\n"))
        #expect(sampling.thinkingMarks.opens == ["<think>"] && sampling.thinkingMarks.closing == "</think>")
      }
    }
    // The native API looks at the prompt's end itself.
    for (text, isOpen) in [("Hi<think>\n", true), ("Hi", false)] {
      let fake = callingService()
      let native: JSONValue = [
        "text": .string(text), "max_thinking_tokens": 5, "sampling_params": ["max_new_tokens": 2],
      ]
      let answer = try await withRoutes(fake) { try await $0.post("/generate", native) }
      #expect(answer.status == 200, "\(answer.text)")
      #expect(fake.requests.first?.sampling.thinkingBudget == 5)
      #expect(fake.requests.first?.sampling.thinkingMarks.isOpen == isOpen)
    }
    let wrong = try await withRoutes(callingService()) {
      try await $0.post("/v1/chat/completions", with(chat, ["thinking_budget": -2]))
    }
    #expect(wrong.status == 400 && wrong.parameter == "thinking_budget")
    let white = callingService()
    _ = try await withRoutes(white) {
      try await $0.post("/v1/chat/completions", with(chat, ["json_whitespace": "compact"]))
    }
    #expect(white.requests.first?.sampling.jsonWhitespace == .compact)
    let unknown = try await withRoutes(callingService()) {
      try await $0.post("/v1/chat/completions", with(chat, ["json_whitespace": "wide"]))
    }
    #expect(unknown.status == 400 && unknown.parameter == "json_whitespace")
  }

  @Test(
    arguments: [
      (["tools": ["f"]], "tools[0]", "tools[0]: expected an object, got a string."),
      (
        ["tools": [["type": "retrieval"]]], "tools[0].type",
        "tools[0].type: only tools of type \"function\" are available."
      ),
      (
        ["tools": [["type": "function"]]], "tools[0].function", "tools[0].function: is required: an object with a name."
      ),
      (
        ["tools": [["type": "function", "function": ["name": ""]]]], "tools[0].function.name",
        "tools[0].function.name: is required: a string of 1 to 256 bytes."
      ),
      (["tools": [ping, ping]], "tools[1].function.name", "tools[1].function.name: \"ping\" is given twice."),
      (
        ["tools": [["type": "function", "function": ["name": "f", "parameters": 3]]]], "tools[0].function.parameters",
        "tools[0].function.parameters: expected a JSON Schema object, got an integer."
      ),
      (["tool_choice": "any"], "tool_choice", "tool_choice must be \"auto\", \"none\", \"required\" or an object."),
      (
        ["tool_choice": ["type": "function", "function": ["name": "nobody"]]], "tool_choice",
        "tool_choice names \"nobody\", which is not among the tools."
      ),
      (
        ["tool_choice": ["type": "function"]], "tool_choice",
        "tool_choice must name a function, as in {\"type\": \"function\", \"function\": {\"name\": \"f\"}}."
      ),
      (["parallel_tool_calls": 1], "parallel_tool_calls", "parallel_tool_calls: expected a boolean, got a number."),
      (["separate_reasoning": "no"], "separate_reasoning", "separate_reasoning: expected a boolean, got a string."),
    ] as [(JSONValue, String, String)])
  func refusals(members: JSONValue, parameter: String, message: String) async throws {
    let answer = try await withRoutes(callingService()) {
      try await $0.post("/v1/chat/completions", with(chat, members))
    }
    #expect(answer.status == 400)
    #expect(answer.parameter == parameter)
    #expect(answer.error == message)
  }

  @Test func parsersAsEndpoints() async throws {
    try await withRoutes(callingService()) { client in
      let calls = try await client.post(
        "/parse_function_call",
        ["text": "Ok.\n<function=ping></function>", "tools": [ping], "tool_call_parser": "qwen3_coder"])
      #expect(
        calls.json == [
          "normal_text": "Ok.", "calls": [["tool_index": 0, "name": "ping", "parameters": "{}"]],
        ])
      let reasoning = try await client.post("/separate_reasoning", ["text": "<think>a</think>b"])
      #expect(reasoning.json == ["reasoning_text": "a", "text": "b"])
      for (path, body) in [
        ("/parse_function_call", ["tools": []]), ("/separate_reasoning", ["text": "x", "reasoning_parser": "none"]),
        ("/parse_function_call", ["text": "x", "tool_call_parser": "nonsense"]),
      ] as [(String, JSONValue)] {
        #expect(try await client.post(path, body).status == 400)
      }
    }
  }

  @Test func configuration() async throws {
    #expect(throws: EngineError.self) { try testConfiguration { $0.toolCallParser = "nonsense" }.validate() }
    #expect(throws: EngineError.self) { try testConfiguration { $0.reasoningParser = "nonsense" }.validate() }
    func formats(_ fake: FakeService, _ configuration: ServerConfiguration) async throws -> [JSONValue?] {
      let answer = try await withRoutes(fake, configuration) { try await $0.get("/server_info") }
      return [answer.json["tool_call_parser"], answer.json["reasoning_parser"]]
    }
    #expect(try await formats(callingService(), testConfiguration()) == ["hermes", "qwen3"])
    #expect(try await formats(callingService(template: ""), testConfiguration()) == [.null, .null])
    let chosen = testConfiguration {
      $0.toolCallParser = "qwen25"
      $0.reasoningParser = "none"
    }
    #expect(try await formats(callingService(template: ""), chosen) == ["hermes", .null])
  }
}
