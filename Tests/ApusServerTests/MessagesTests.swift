import ApusCore
import ApusServer
import HTTPTypes
import Testing

private let weather: JSONValue = [
  "name": "get_weather", "description": "The weather in a city",
  "input_schema": ["type": "object", "properties": ["city": ["type": "string"], "days": ["type": "integer"]]],
]
private let ping: JSONValue = ["name": "ping", "input_schema": ["type": "object"]]
private let plain: JSONValue = ["max_tokens": 100, "messages": [["role": "user", "content": "Hi"]]]

private let chat = with(plain, ["tools": [weather, ping]])

/// A transcript with the names that differ from run to run replaced.
private func stable(_ answer: Answer) -> String {
  answer.text.replacing(/"msg_[0-9a-f]+"/, with: "\"msg_ID\"").replacing(/"toolu_[0-9a-f]+"/, with: "\"toolu_ID\"")
}

@Suite struct MessagesTests {
  private func send(_ members: JSONValue, _ fake: FakeService, _ body: JSONValue = plain) async throws -> Answer {
    try await withRoutes(fake) { try await $0.post("/v1/messages", with(body, members)) }
  }

  @Test func wholeAnswer() async throws {
    let plainAnswer = try await send([:], FakeService())
    #expect(plainAnswer.status == 200)
    #expect(plainAnswer.headers[HTTPField.Name("request-id")!]?.isEmpty == false)
    let text = FakeService.answer.replacing("\"", with: "\\\"").replacing("\n", with: "\\n")
    #expect(
      stable(plainAnswer)
        == #"{"id":"msg_ID","type":"message","role":"assistant","model":"fake/model","content":[{"type":"text","text":""#
        + text + #""}],"stop_reason":"end_turn","stop_sequence":null,"usage":{"input_tokens":16,"#
        + #""cache_creation_input_tokens":0,"cache_read_input_tokens":3,"output_tokens":9}}"#)
    let calls = try await send([:], callingService(), chat)
    #expect(calls.json["stop_reason"] == "tool_use")
    let content = try #require(calls.json["content"]?.arrayValue)
    #expect(content.count == 4)
    #expect(content[0] == ["type": "thinking", "thinking": "Hm.", "signature": ""])
    #expect(content[1] == ["type": "text", "text": "Let me see."])
    #expect(content[2]["name"] == "get_weather" && content[2]["input"] == ["city": "Zürich", "days": 3])
    #expect(content[3]["type"] == "tool_use" && content[3]["name"] == "ping" && content[3]["input"] == [:])
    #expect(content[2]["id"]?.stringValue?.wholeMatch(of: /toolu_[0-9a-f]{24}/) != nil)
    #expect(content[2]["id"] != content[3]["id"])
  }

  @Test func streamTranscript() async throws {
    let streamed = try await send(["stream": true], callingService(), chat)
    #expect(streamed.headers[.contentType] == "text/event-stream; charset=utf-8")
    func event(_ name: String, _ members: String = "") -> String {
      "event: \(name)\ndata: {\"type\":\"\(name)\"\(members)}\n\n"
    }
    func start(_ index: Int, _ block: String) -> String {
      event("content_block_start", #","index":\#(index),"content_block":\#(block)"#)
    }
    func delta(_ index: Int, _ type: String, _ member: String, _ text: String) -> String {
      let text = text.replacing("\"", with: "\\\"")
      return event("content_block_delta", #","index":\#(index),"delta":{"type":"\#(type)","\#(member)":"\#(text)"}"#)
    }
    func stop(_ index: Int) -> String { event("content_block_stop", #","index":\#(index)"#) }
    func usage(_ prompt: Int, _ output: Int) -> String {
      #""usage":{"input_tokens":\#(prompt),"cache_creation_input_tokens":0,"cache_read_input_tokens":3,"#
        + #""output_tokens":\#(output)}"#
    }
    let input = try #require(try? JSONValue.parse(streamed.events[0].split(separator: "data: ")[1].description))
    let prompt = try #require(input["message"]?["usage"]?["input_tokens"]?.intValue)
    let pieces = [
      event(
        "message_start",
        #","message":{"id":"msg_ID","type":"message","role":"assistant","model":"fake/model","content":[],"#
          + #""stop_reason":null,"stop_sequence":null,"# + usage(prompt, 0) + "}"),
      event("ping"),
      start(0, #"{"type":"thinking","thinking":"","signature":""}"#),
      delta(0, "thinking_delta", "thinking", "Hm"),
      delta(0, "thinking_delta", "thinking", "."),
      stop(0),
      start(1, #"{"type":"text","text":""}"#),
      delta(1, "text_delta", "text", "Let me"),
      delta(1, "text_delta", "text", " see."),
      stop(1),
      start(2, #"{"type":"tool_use","id":"toolu_ID","name":"get_weather","input":{}}"#),
      delta(2, "input_json_delta", "partial_json", "{\"city\": \"Zü"),
      delta(2, "input_json_delta", "partial_json", "rich\", \"days\""),
      delta(2, "input_json_delta", "partial_json", ": 3}"),
      stop(2),
      start(3, #"{"type":"tool_use","id":"toolu_ID","name":"ping","input":{}}"#),
      delta(3, "input_json_delta", "partial_json", "{}"),
      stop(3),
      event("message_delta", #","delta":{"stop_reason":"tool_use","stop_sequence":null},"# + usage(prompt, 22)),
      event("message_stop"),
    ]
    #expect(stable(streamed) == pieces.joined())
  }

  @Test func streamTranscriptOfText() async throws {
    let streamed = try await send(["stream": true, "stop_sequences": ["x", "!"]], FakeService())
    #expect(
      stable(streamed) == """
        event: message_start
        data: {"type":"message_start","message":{"id":"msg_ID","type":"message","role":"assistant","model":"fake/model",\
        "content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":16,"cache_creation_input_tokens":0,\
        "cache_read_input_tokens":3,"output_tokens":0}}}

        event: ping
        data: {"type":"ping"}

        event: content_block_start
        data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}

        event: content_block_delta
        data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello"}}

        event: content_block_delta
        data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":","}}

        event: content_block_delta
        data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" world"}}

        event: content_block_stop
        data: {"type":"content_block_stop","index":0}

        event: message_delta
        data: {"type":"message_delta","delta":{"stop_reason":"stop_sequence","stop_sequence":"!"},"usage":\
        {"input_tokens":16,"cache_creation_input_tokens":0,"cache_read_input_tokens":3,"output_tokens":4}}

        event: message_stop
        data: {"type":"message_stop"}


        """)
  }

  @Test func reasonsOfTheEnd() async throws {
    let cut = try await send(["max_tokens": 2], FakeService())
    #expect(cut.json["stop_reason"] == "max_tokens" && cut.json["content"]?[0]?["text"] == "Hello,")
    let stopped = try await send(["stop_sequences": [" world"]], FakeService())
    #expect(stopped.json["stop_reason"] == "stop_sequence" && stopped.json["stop_sequence"] == " world")
    // A call that breaks off has no input that could be told.
    let broken = try await send(["max_tokens": 15], callingService(), chat)
    #expect(broken.json["stop_reason"] == "max_tokens" && broken.json["content"]?[2]?["input"] == [:])
  }

  @Test func takesEverySamplingField() async throws {
    let fake = FakeService()
    let answer = try await send(
      [
        "model": "fake/model", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "stop_sequences": ["x"],
        "metadata": ["user_id": "me"], "service_tier": "auto", "some_new_field": [1],
        "output_config": ["format": ["type": "json_schema", "schema": ["type": "object"]], "effort": "low"],
      ], fake)
    #expect(answer.status == 200, "\(answer.text)")
    var expected = SamplingParameters()
    expected.maxNewTokens = 7
    expected.temperature = 0.5
    expected.topP = 0.9
    expected.topK = 5
    expected.stop = ["x"]
    expected.grammar = .jsonSchema("{\"type\":\"object\"}")
    #expect(fake.requests.first?.sampling == expected)
  }

  @Test func conversations() async throws {
    let fake = callingService(["x"])
    let answer = try await send(
      [
        "system": [["type": "text", "text": "Be brief"], ["type": "text", "text": "Be kind"]],
        "messages": [
          ["role": "user", "content": "Hi"], ["role": "user", "content": [["type": "text", "text": "there"]]],
          [
            "role": "assistant",
            "content": [
              ["type": "thinking", "thinking": "Hm", "signature": "s"], ["type": "redacted_thinking", "data": "x"],
              ["type": "text", "text": "Ok"],
              ["type": "tool_use", "id": "t1", "name": "ping", "input": ["a": [1]]],
              ["type": "tool_use", "id": "t2", "name": "get_weather", "input": [:]],
            ],
          ],
          [
            "role": "user",
            "content": [
              ["type": "tool_result", "tool_use_id": "t1", "content": [["type": "text", "text": "pong"]]],
              ["type": "tool_result", "tool_use_id": "t2", "content": "no such city", "is_error": true],
              ["type": "text", "text": "Go on"],
            ],
          ],
        ], "tools": [ping],
      ], fake)
    #expect(answer.status == 200, "\(answer.text)")
    #expect(
      fake.messages.first == [
        ["role": "system", "content": "Be brief\nBe kind"], ["role": "user", "content": "Hi\nthere"],
        [
          "role": "assistant", "content": "Ok", "reasoning_content": "Hm",
          "tool_calls": [
            ["id": "t1", "type": "function", "function": ["name": "ping", "arguments": ["a": [1]]]],
            ["id": "t2", "type": "function", "function": ["name": "get_weather", "arguments": [:]]],
          ],
        ],
        ["role": "tool", "tool_call_id": "t1", "content": "pong", "name": "ping"],
        ["role": "tool", "tool_call_id": "t2", "content": "Error: no such city", "name": "get_weather"],
        ["role": "user", "content": "Go on"],
      ])
    guard case .tokens(let tokens)? = fake.requests.first?.prompt else { return }
    let prompt = String(decoding: tokens.map { UInt8($0) }, as: UTF8.self)
    // The tools reach the template in its own terms.
    #expect(prompt.contains(#"[{"type":"function","function":{"name":"ping","parameters":{"type":"object"}}}]"#))
  }

  @Test func theLastAnswerIsContinued() async throws {
    let fake = FakeService()
    let body: JSONValue = [
      "messages": [["role": "user", "content": "Hi"], ["role": "assistant", "content": "It is"]]
    ]
    _ = try await send(body, fake)
    // The fake template ends a prompt with the assistant's mark only if a generation prompt is asked for.
    #expect(fake.requests.first?.prompt == .tokens("<user>Hi<assistant>It is".utf8.map { TokenID($0) }))
  }

  @Test func choicesOfTools() async throws {
    func grammar(_ choice: JSONValue) async throws -> JSONValue? {
      let fake = callingService(promptEnd: "<think></think>")
      let answer = try await send(["tool_choice": choice], fake, chat)
      #expect(answer.status == 200, "\(answer.text)")
      guard case .structuralTag(let text)? = fake.requests.first?.sampling.grammar else { return JSONValue?.none }
      return try JSONValue.parse(text)["format"]
    }
    #expect(try await grammar(["type": "auto"]) == nil)
    let any = try #require(try await grammar(["type": "any"]))
    #expect(any["tags"]?.arrayValue?.count == 2 && any["stop_after_first"] == false)
    let single = try #require(try await grammar(["type": "any", "disable_parallel_tool_use": true]))
    #expect(single["stop_after_first"] == true)
    let named = try #require(try await grammar(["type": "tool", "name": "ping"]))
    #expect(named["tags"]?.arrayValue?.count == 1)
    let none = try await send(["tool_choice": ["type": "none"]], callingService(Array(callingAnswer.suffix(3))), chat)
    #expect(none.json["content"]?[0]?["type"] == "text" && none.json["stop_reason"] == "end_turn")
    let one = try await send(
      ["tool_choice": ["type": "auto", "disable_parallel_tool_use": true]], callingService(), chat)
    #expect(one.json["content"]?.arrayValue?.count == 3)
  }

  @Test func thinkingReachesTheTemplate() async throws {
    func prompt(_ thinking: JSONValue) async throws -> String {
      let fake = FakeService()
      let answer = try await send(["thinking": thinking], fake)
      #expect(answer.status == 200, "\(answer.text)")
      guard case .tokens(let tokens)? = fake.requests.first?.prompt else { return "" }
      return String(decoding: tokens.map { UInt8($0) }, as: UTF8.self)
    }
    let enabled = try await prompt(["type": "enabled", "budget_tokens": 50])
    #expect(enabled.contains("<enable_thinking=true><thinking=true><thinking_budget=50>"))
    #expect(try await prompt(["type": "disabled"]).contains("<enable_thinking=false><thinking=false>"))
    #expect(try await prompt(nil) == "<user>Hi<assistant>")
  }

  @Test func countsTokens() async throws {
    let fake = FakeService()
    let answer = try await withRoutes(fake) { client in
      try await client.post("/v1/messages/count_tokens", ["messages": [["role": "user", "content": "Hi"]]])
    }
    #expect(answer.text == #"{"input_tokens":19}"#)
    #expect(fake.requests.isEmpty)
  }

  private static func message(_ content: JSONValue) -> JSONValue {
    ["messages": [["role": "user", "content": content]]]
  }

  @Test(
    arguments: [
      (["max_tokens": nil], "max_tokens is required: an integer of at least 1."),
      (["max_tokens": 0], "max_tokens must be at least 1, got 0."),
      (["max_tokens": "x"], "max_tokens: expected an integer, got a string."),
      (["messages": nil], "messages is required: an array of messages."),
      (["messages": []], "messages must not be empty."),
      (["messages": "Hi"], "messages: expected an array of messages, got a string."),
      (["messages": ["Hi"]], "messages[0]: expected an object, got a string."),
      (["messages": [["role": "system", "content": "x"]]], "messages[0].role: must be \"user\" or \"assistant\"."),
      (["messages": [["role": "user"]]], "messages[0].content: is required: a string or an array of blocks."),
      (message(3), "messages[0].content: expected a string or an array of blocks, got an integer."),
      (message([["text": "x"]]), "messages[0].content[0].type: is required: a string."),
      (message([["type": "text"]]), "messages[0].content[0].text: is required: a string."),
      (
        message([["type": "image", "source": ["type": "base64"]]]),
        "messages[0].content[0]: the model served here reads text only, so blocks of type \"image\" cannot be taken."
      ),
      (
        message([["type": "tool_use", "id": "a", "name": "b", "input": [:]]]),
        "messages[0].content[0]: a block of type \"tool_use\" has no place here."
      ),
      (message([["type": "tool_result"]]), "messages[0].content[0].tool_use_id: is required: a string."),
      (
        [
          "messages": [
            ["role": "user", "content": "x"],
            ["role": "assistant", "content": [["type": "tool_use", "id": "a", "name": "ping", "input": [:]]]],
          ]
        ], "messages[1]: tool_use blocks must be followed by a message with their tool_result blocks."
      ),
      (["system": 1], "system: expected a string or an array of blocks, got an integer."),
      (["temperature": -1], "temperature must be a finite number of at least 0, got -1.0."),
      (["stop_sequences": "x"], "stop_sequences: expected an array of strings, got a string."),
      (["stop_sequences": [""]], "stop_sequences must not hold an empty string."),
      (["metadata": "x"], "metadata: expected an object, got a string."),
      (["stream": 1], "stream: expected a boolean, got a number."),
      (["thinking": ["type": "maybe"]], "thinking.type: must be \"enabled\", \"adaptive\" or \"disabled\"."),
      (["thinking": ["type": "enabled"]], "thinking.budget_tokens: is required: an integer."),
      (
        ["thinking": ["type": "enabled", "budget_tokens": 100]],
        "thinking.budget_tokens: must be less than max_tokens (100), got 100."
      ),
      (["tools": [["name": "f"]]], "tools[0].input_schema: is required: a JSON Schema object."),
      (["tools": [["input_schema": [:]]]], "tools[0].name: is required: a string of 1 to 256 bytes."),
      (
        ["tools": [["type": "bash_20250124", "name": "bash"]]],
        "tools[0].type: only tools of type \"custom\" are available."
      ),
      (["tools": [ping, ping]], "tools[1].function.name: \"ping\" is given twice."),
      (["tool_choice": "any"], "tool_choice.type: must be \"auto\", \"any\", \"tool\" or \"none\"."),
      (["tool_choice": ["type": "any"]], "tool_choice: is only allowed when tools are given."),
      (["tools": [ping], "tool_choice": ["type": "tool"]], "tool_choice.name: is required: a tool's name."),
      (
        ["tools": [ping], "tool_choice": ["type": "tool", "name": "f"]],
        "tool_choice.name: \"f\" is not among the tools."
      ),
      (
        ["output_config": ["format": ["type": "xml"]]],
        "output_config.format: expected {\"type\": \"json_schema\", \"schema\": {...}}."
      ),
      (["container": "c"], "container: containers are not available; leave the field out."),
    ] as [(JSONValue, String)])
  func refusals(members: JSONValue, message: String) async throws {
    let answer = try await send(members, callingService())
    #expect(answer.status == 400)
    #expect(answer.json == ["type": "error", "error": ["type": "invalid_request_error", "message": .string(message)]])
  }

  @Test func errorsHaveAnthropicsShape() async throws {
    @Sendable func type(_ answer: Answer) -> JSONValue? {
      answer.json["type"] == "error" ? answer.json["error"]?["type"] : nil
    }
    let model = try await send(["model": "claude"], FakeService())
    #expect(model.status == 404 && type(model) == "not_found_error")
    let full = try await send([:], FakeService(.init(capacity: 0)))
    #expect(full.status == 429 && type(full) == "rate_limit_error")
    #expect(full.headers[.retryAfter] == "1")
    try await withRoutes(FakeService(), testConfiguration { $0.maxBodyBytes = 10 }) { client in
      let large = try await client.post("/v1/messages", plain)
      #expect(large.status == 413 && type(large) == "request_too_large")
      let method = try await client.get("/v1/messages")
      #expect(method.status == 405 && type(method) == "invalid_request_error")
      let path = try await client.post("/v1/messages/nonsense", plain)
      #expect(path.status == 404 && type(path) == "not_found_error")
    }
    let broken = try await withRoutes { try await $0.send(.post, "/v1/messages", "{") }
    #expect(broken.status == 400 && type(broken) == "invalid_request_error")
    let failing = FakeService(.init(failure: (1, EngineError(.internalFailure, "The model fell over."))))
    let whole = try await send([:], failing)
    #expect(whole.status == 500 && type(whole) == "api_error")
    let streamed = try await send(
      ["stream": true], FakeService(.init(failure: (1, EngineError(.internalFailure, "The model fell over.")))))
    #expect(
      streamed.text.hasSuffix(
        """
        event: error
        data: {"type":"error","error":{"type":"api_error","message":"The model fell over."}}


        """))
  }

  @Test func keysOfBothKinds() async throws {
    let key = HTTPField.Name("x-api-key")!
    try await withRoutes(FakeService(), testConfiguration { $0.apiKey = "k" }) { client in
      func status(_ headers: HTTPFields) async throws -> Int {
        try await client.post("/v1/messages", plain, headers: headers).status
      }
      #expect(try await status([key: "k", HTTPField.Name("anthropic-version")!: "2023-06-01"]) == 200)
      #expect(try await status([.authorization: "Bearer k"]) == 200)
      #expect(try await status([key: "x", .authorization: "Bearer k"]) == 200)
      #expect(try await status([key: "x"]) == 401)
      let none = try await client.post("/v1/messages", plain)
      #expect(none.status == 401 && none.json["error"]?["type"] == "authentication_error")
      #expect(try await client.get("/v1/models", headers: [key: "k"]).status == 200)
    }
  }
}
