import ApusCore
import ApusServer
import HTTPTypes
import Testing

private let ping: JSONValue = ["type": "function", "function": ["name": "ping"]]
private let plain: JSONValue = ["model": "fake/model", "messages": [["role": "user", "content": "Hi"]]]

/// A transcript with moments, durations and names of calls replaced.
private func stable(_ answer: Answer) -> String {
  answer.text.replacing(
    /"created_at":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"/, with: "\"created_at\":\"NOW\""
  ).replacing(/_duration":[1-9]\d*/, with: "_duration\":NS").replacing(/call_[0-9a-f]{24}/, with: "call_ID")
}

@Suite struct OllamaTests {
  private func chat(_ members: JSONValue, _ fake: FakeService) async throws -> Answer {
    try await withRoutes(fake) { try await $0.post("/api/chat", with(plain, members)) }
  }

  private func generate(_ members: JSONValue, _ fake: FakeService) async throws -> Answer {
    try await withRoutes(fake) { try await $0.post("/api/generate", with(["prompt": "Hi"], members)) }
  }

  @Test func chatTranscript() async throws {
    let streamed = try await chat(["tools": [ping]], callingService())
    #expect(streamed.headers[.contentType] == "application/x-ndjson")
    let head = #"{"model":"fake/model","created_at":"NOW","message":{"role":"assistant","content":"#
    let tail = #"},"done":false}"# + "\n"
    func call(_ name: String, _ arguments: String) -> String {
      #""","tool_calls":[{"id":"call_ID","function":{"name":"\#(name)","arguments":\#(arguments)}}]"#
    }
    let count = "<user>Hi<tools>\(JSONValue.array([ping]).compactText)<assistant>".utf8.count
    #expect(
      stable(streamed)
        == [
          head + #""","thinking":"Hm""# + tail,
          head + #""","thinking":".""# + tail,
          head + #""Let me""# + tail,
          head + #"" see.""# + tail,
          head + call("get_weather", #"{"city":"Zürich","days":3}"#) + tail,
          head + call("ping", "{}") + tail,
          head
            + #"""},"done":true,"done_reason":"stop","total_duration":NS,"load_duration":0,"prompt_eval_count":\#(count),"#
            + #""prompt_eval_duration":NS,"eval_count":22,"eval_duration":NS}"# + "\n",
        ].joined())
  }

  @Test func generateTranscript() async throws {
    let streamed = try await generate(["options": ["num_predict": 3]], FakeService())
    let head = #"{"model":"fake/model","created_at":"NOW","response":"#
    #expect(
      stable(streamed)
        == [
          head + #""Hello","done":false}"# + "\n", head + #"",","done":false}"# + "\n",
          head + #"" world","done":false}"# + "\n",
          head + #""","done":true,"done_reason":"length","total_duration":NS,"load_duration":0,"prompt_eval_count":19,"#
            + #""prompt_eval_duration":NS,"eval_count":3,"eval_duration":NS}"# + "\n",
        ].joined())
  }

  @Test func wholeAnswers() async throws {
    let whole = try await chat(["stream": false, "tools": [ping]], callingService())
    #expect(whole.headers[.contentType] == "application/json")
    let message = try #require(whole.json["message"])
    #expect(message["content"] == "Let me see." && message["thinking"] == "Hm.")
    #expect(
      message["tool_calls"]?.arrayValue?.map { $0["function"] } == [
        ["name": "get_weather", "arguments": ["city": "Zürich", "days": 3]], ["name": "ping", "arguments": [:]],
      ])
    #expect(whole.json["done"] == true && whole.json["done_reason"] == "stop" && whole.json["eval_count"] == 22)
    let text = try await generate(["stream": false], FakeService())
    #expect(text.json["response"] == .string(FakeService.answer))
    #expect(text.json["message"] == nil)
    let total = try #require(text.json["total_duration"]?.intValue)
    let parts = ["prompt_eval_duration", "eval_duration"].compactMap { text.json[$0]?.intValue }
    #expect(parts.count == 2 && parts.reduce(0, +) <= total && total < 60_000_000_000)
    // A call that broke off is none.
    let cut = try await chat(["stream": false, "tools": [ping], "options": ["num_predict": 15]], callingService())
    #expect(cut.json["message"]?["tool_calls"] == nil && cut.json["done_reason"] == "length")
  }

  @Test func takesEveryOption() async throws {
    let fake = FakeService()
    let answer = try await chat(
      [
        "options": [
          "num_predict": 7, "temperature": 0.5, "top_k": 0, "top_p": 0.9, "min_p": 0.1, "seed": 3, "stop": ["x", "yy"],
          "repeat_penalty": 1.1, "presence_penalty": -0.3, "frequency_penalty": 0.2, "mirostat": 0, "typical_p": 1.0,
          "num_ctx": 2048, "num_thread": 4, "unknown": true,
        ], "format": ["type": "object"], "keep_alive": "5m",
      ], fake)
    #expect(answer.status == 200, "\(answer.text)")
    var expected = SamplingParameters()
    expected.maxNewTokens = 7
    expected.temperature = 0.5
    expected.topP = 0.9
    expected.minP = 0.1
    expected.seed = 3
    expected.stop = ["x", "yy"]
    expected.repetitionPenalty = 1.1
    expected.presencePenalty = -0.3
    expected.frequencyPenalty = 0.2
    expected.grammar = .jsonSchema("{\"type\":\"object\"}")
    #expect(fake.requests.first?.sampling == expected)
    let json = FakeService()
    _ = try await generate(["format": "json", "options": ["num_predict": -1, "stop": "x"]], json)
    #expect(json.requests.first?.sampling.grammar == .jsonObject)
    #expect(json.requests.first?.sampling.maxNewTokens == nil && json.requests.first?.sampling.stop == ["x"])
  }

  @Test func conversations() async throws {
    let fake = callingService(["x"])
    let answer = try await chat(
      [
        "messages": [
          ["role": "system", "content": "Be brief"], ["role": "user", "content": "Hi", "images": []],
          [
            "role": "assistant", "thinking": "Hm",
            "tool_calls": [
              ["function": ["name": "ping", "arguments": ["a": [1]]]],
              ["function": ["name": "pong", "arguments": [:]]],
            ],
          ],
          ["role": "tool", "content": "1", "tool_name": "ping"], ["role": "tool", "content": "2"],
        ], "think": "high", "tools": [ping],
      ], fake)
    #expect(answer.status == 200, "\(answer.text)")
    #expect(
      fake.messages.first == [
        ["role": "system", "content": "Be brief"], ["role": "user", "content": "Hi"],
        [
          "role": "assistant", "content": "", "reasoning_content": "Hm",
          "tool_calls": [
            ["id": "call00000", "type": "function", "function": ["name": "ping", "arguments": ["a": [1]]]],
            ["id": "call00001", "type": "function", "function": ["name": "pong", "arguments": [:]]],
          ],
        ],
        ["role": "tool", "content": "1", "tool_call_id": "call00000", "name": "ping"],
        ["role": "tool", "content": "2", "tool_call_id": "call00001", "name": "pong"],
      ])
    #expect(
      promptText(fake.requests.first).contains("<enable_thinking=true><reasoning_effort=\"high\"><thinking=true>"))
  }

  @Test func promptsOfGenerate() async throws {
    let fake = callingService(["<think>a</think>b"])
    let templated = try await generate(["system": "S", "think": false, "stream": false], fake)
    #expect(promptText(fake.requests.first) == "<system>S<user>Hi<enable_thinking=false><thinking=false><assistant>")
    #expect(templated.json["response"] == "b" && templated.json["thinking"] == "a")
    let raw = callingService(["<think>a</think>b"])
    let answer = try await generate(["raw": true, "stream": false], raw)
    #expect(raw.requests.first?.prompt == .text("Hi"))
    #expect(answer.json["response"] == "<think>a</think>b" && answer.json["thinking"] == nil)
  }

  @Test(
    arguments: [
      (0, "1970-01-01T00:00:00Z"), (951_782_399, "2000-02-28T23:59:59Z"), (951_782_400, "2000-02-29T00:00:00Z"),
      (951_868_800, "2000-03-01T00:00:00Z"), (1_700_000_000, "2023-11-14T22:13:20Z"),
      (1_709_164_800, "2024-02-29T00:00:00Z"), (1_735_689_599, "2024-12-31T23:59:59Z"),
      (4_107_542_400, "2100-03-01T00:00:00Z"),
    ]) func moments(seconds: Int, text: String)
  {
    #expect(timestamp(seconds) == text)
  }

  @Test func loading() async throws {
    let fake = FakeService()
    let load = try await chat(["messages": []], fake)
    #expect(load.json["done_reason"] == "load" && load.json["done"] == true)
    #expect(load.json["message"] == ["role": "assistant", "content": ""])
    let unload = try await withRoutes(fake) { try await $0.post("/api/generate", ["keep_alive": 0]) }
    #expect(unload.json["done_reason"] == "unload" && unload.json["response"] == "")
    #expect(fake.requests.isEmpty)
  }

  @Test func whatIsServed() async throws {
    try await withRoutes(callingService()) { client in
      let version = try await client.get("/api/version")
      #expect(version.text == #"{"version":"0.1.0"}"#)
      let model = try #require(try await client.get("/api/tags").json["models"]?[0])
      #expect(model["name"] == "fake/model" && model["modified_at"] == "2023-11-14T22:13:20Z")
      #expect(model["digest"]?.stringValue?.wholeMatch(of: /[0-9a-f]{64}/) != nil)
      #expect(
        model["details"] == [
          "parent_model": "", "format": "safetensors", "family": "fake", "families": ["fake"], "parameter_size": "42",
          "quantization_level": "BF16",
        ])
      let running = try #require(try await client.get("/api/ps").json["models"]?[0])
      #expect(running["context_length"] == 4096 && running["digest"] == model["digest"])
      for name in ["fake/model", "fake/model:latest"] {
        let shown = try await client.post("/api/show", ["model": .string(name)]).json
        #expect(shown["capabilities"] == ["completion", "tools", "thinking"])
        #expect(shown["model_info"]?["fake.context_length"] == 4096)
        #expect(shown["template"] == "<tool_call> <think>")
      }
      let unknown = try await client.post("/api/show", ["model": "llama3"])
      #expect(unknown.status == 404 && unknown.json["error"]?.stringValue?.contains("llama3") == true)
      #expect(try await client.post("/api/show", ["name": 3]).status == 400)
    }
  }

  @Test(
    arguments: [
      ("chat", ["messages": "Hi"], "messages: expected an array of messages, got a string."),
      ("chat", ["messages": ["Hi"]], "messages[0]: expected an object, got a string."),
      (
        "chat", ["messages": [["content": "x"]]],
        "messages[0].role: must be \"system\", \"user\", \"assistant\" or \"tool\"."
      ),
      (
        "chat", ["messages": [["role": "user", "content": [1]]]],
        "messages[0].content: expected a string, got an array."
      ),
      (
        "chat", ["messages": [["role": "user", "content": "x", "images": ["AAAA"]]]],
        "messages[0].images: the model served here reads text only."
      ),
      (
        "chat", ["messages": [["role": "assistant", "tool_calls": [["function": ["name": "f", "arguments": "{}"]]]]]],
        "messages[0].tool_calls[0].function.arguments: expected an object, got a string."
      ),
      (
        "chat", ["messages": [["role": "assistant", "tool_calls": [[:]]]]],
        "messages[0].tool_calls[0].function.name: is required: a string."
      ),
      ("chat", ["tools": [["type": "function"]]], "tools[0].function: is required: an object with a name."),
      ("chat", ["stream": "no"], "stream: expected a boolean, got a string."),
      ("chat", ["options": 1], "options: expected an object, got a number."),
      ("chat", ["options": ["temperature": "x"]], "options.temperature: expected a number, got a string."),
      ("chat", ["options": ["temperature": -1]], "temperature must be a finite number of at least 0, got -1.0."),
      ("chat", ["options": ["repeat_penalty": 0]], "repeat_penalty must be in (0, 2], got 0.0."),
      (
        "chat", ["options": ["mirostat": 2]],
        "options.mirostat: mirostat sampling is not available; leave the field out."
      ),
      ("chat", ["format": "xml"], "format: expected \"json\" or a JSON Schema, got a string."),
      ("chat", ["think": 3], "think: expected a boolean or \"low\", \"medium\" or \"high\"."),
      ("chat", ["logprobs": true], "logprobs: is not available here; use /v1/chat/completions."),
      ("generate", ["prompt": 1], "prompt: expected a string, got a number."),
      ("generate", ["template": "{{ x }}"], "template: the model's own template is used; leave the field out."),
      ("generate", ["context": [1]], "context: is Ollama's old form of a conversation; use /api/chat."),
      ("generate", ["suffix": "x"], "suffix: filling in the middle is not available; leave the field out."),
      ("generate", ["images": ["AAAA"]], "images: the model served here reads text only; leave the field out."),
      ("generate", ["raw": true, "system": "x"], "raw takes no system: the prompt is all that the model sees."),
    ] as [(String, JSONValue, String)])
  func refusals(path: String, members: JSONValue, message: String) async throws {
    let answer = try await path == "chat" ? chat(members, callingService()) : generate(members, callingService())
    #expect(answer.status == 400)
    #expect(answer.json == ["error": .string(message)])
  }

  @Test func errorsHaveOllamasShape() async throws {
    @Sendable func hasShape(_ answer: Answer, _ status: Int) -> Bool {
      answer.status == status && answer.json.objectValue?.keys == ["error"] && answer.json["error"]?.stringValue != nil
    }
    #expect(hasShape(try await chat(["think": true], FakeService()), 400))
    #expect(hasShape(try await chat(["tools": [ping]], FakeService()), 400))
    #expect(hasShape(try await chat(["model": "llama3"], FakeService()), 404))
    #expect(hasShape(try await chat([:], FakeService(.init(capacity: 0))), 429))
    try await withRoutes(FakeService(), testConfiguration { $0.apiKey = "k" }) { client in
      let key = try await client.get("/api/tags")
      let path = try await client.post("/api/pull", [:])
      let method = try await client.get("/api/chat")
      #expect(hasShape(key, 401) && hasShape(path, 404) && hasShape(method, 405))
    }
    let failing = FakeService(.init(failure: (1, EngineError(.internalFailure, "The model fell over."))))
    let streamed = try await chat([:], failing)
    #expect(streamed.status == 200)
    #expect(streamed.text.hasSuffix("\"done\":false}\n{\"error\":\"The model fell over.\"}\n"))
  }
}
