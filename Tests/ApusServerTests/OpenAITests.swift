import ApusCore
import ApusServer
import HTTPTypes
import Testing

private let chat: JSONValue = ["model": "fake/model", "messages": [["role": "user", "content": "Hi"]]]

/// A body with members added or replaced.
@Suite struct ChatCompletionTests {
  @Test func answersWithOpenAIsShape() async throws {
    let service = FakeService()
    let answer = try await withRoutes(service) { try await $0.post("/v1/chat/completions", chat) }
    #expect(answer.status == 200)
    #expect(answer.headers[.contentType] == "application/json")
    let json = answer.json
    #expect(json["object"] == "chat.completion")
    #expect(json["model"] == "fake/model")
    #expect(json["id"]?.stringValue?.hasPrefix("chatcmpl-") == true)
    #expect(json["system_fingerprint"]?.stringValue?.hasPrefix("fp_") == true)
    let choice = try #require(json["choices"]?[0])
    #expect(choice["index"] == 0)
    #expect(choice["message"] == ["role": "assistant", "content": .string(FakeService.answer), "refusal": nil])
    #expect(choice["logprobs"] == .null)
    #expect(choice["finish_reason"] == "stop")
    #expect(choice["matched_stop"] == 257)
    // "<user>Hi<assistant>" is 19 bytes, and the template writes the special tokens itself.
    #expect(
      json["usage"] == [
        "prompt_tokens": 19, "completion_tokens": 9, "total_tokens": 28, "prompt_tokens_details": ["cached_tokens": 3],
      ])
    let prompt = try #require(service.requests.first?.prompt)
    #expect(prompt == .tokens("<user>Hi<assistant>".utf8.map { TokenID($0) }))
  }

  @Test func takesEverySamplingField() async throws {
    let service = FakeService()
    let body = with(
      chat,
      [
        "max_tokens": 7, "min_tokens": 2, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1,
        "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": -0.3,
        "logit_bias": ["65": 1.5, "66": -100], "seed": -1, "stop": ["x", "yy"], "stop_token_ids": [1, 2],
        "stop_regex": "a+", "ignore_eos": true, "skip_special_tokens": false,
        "spaces_between_special_tokens": false, "no_stop_trim": true, "rid": "mine", "priority": 4,
        "cache_salt": "pepper", "user": "me", "metadata": ["a": "b"], "unknown_field": [1, 2, ["x": nil]],
        "logprobs": true, "top_logprobs": 2,
      ])
    let answer = try await withRoutes(service) { try await $0.post("/v1/chat/completions", body) }
    #expect(answer.status == 200, "\(answer.text)")
    let request = try #require(service.requests.first)
    var expected = SamplingParameters()
    expected.maxNewTokens = 7
    expected.minNewTokens = 2
    expected.temperature = 0.5
    expected.topK = 5
    expected.topP = 0.9
    expected.minP = 0.1
    expected.repetitionPenalty = 1.1
    expected.frequencyPenalty = 0.2
    expected.presencePenalty = -0.3
    expected.logitBias = [65: 1.5, 66: -100]
    expected.seed = .max
    expected.stop = ["x", "yy"]
    expected.stopTokenIDs = [1, 2]
    expected.stopRegex = ["a+"]
    expected.ignoreEOS = true
    expected.skipSpecialTokens = false
    expected.spacesBetweenSpecialTokens = false
    expected.noStopTrim = true
    #expect(request.sampling == expected)
    #expect(request.id == "mine")
    #expect(request.priority == 4)
    #expect(request.cacheSalt == "pepper")
    #expect(request.logprobs == LogprobOptions(topCount: 2))
    #expect(answer.json["id"] == "mine")
  }

  @Test func fillsInTheModelsDefaults() async throws {
    var defaults = SamplingDefaults()
    defaults.temperature = 0.25
    defaults.topK = 3
    defaults.maxNewTokens = 4
    let service = FakeService(defaults: defaults)
    try await withRoutes(service) { client in
      _ = try await client.post("/v1/chat/completions", chat)
      _ = try await client.post("/v1/chat/completions", with(chat, ["temperature": 1.5, "max_completion_tokens": 2]))
      _ = try await client.post("/v1/completions", ["prompt": "x"])
    }
    let sampling = service.requests.map(\.sampling)
    #expect(sampling.map(\.temperature) == [0.25, 1.5, 0.25])
    #expect(sampling.map(\.topK) == [3, 3, 3])
    #expect(sampling.map(\.maxNewTokens) == [4, 2, 16])
  }

  @Test func withoutALimitTheContextIsTheLimit() async throws {
    let service = FakeService()
    _ = try await withRoutes(service) { try await $0.post("/v1/chat/completions", chat) }
    #expect(service.requests[0].sampling.maxNewTokens == nil)
  }

  @Test func drawsSeveralSamplesWithSeedsOfTheirOwn() async throws {
    let service = FakeService()
    let answer = try await withRoutes(service) { client in
      try await client.post("/v1/chat/completions", with(chat, ["n": 3, "seed": 7, "rid": "r"]))
    }
    #expect(answer.json["choices"]?.arrayValue?.map { $0["index"] } == [0, 1, 2])
    // A prompt counts once, its answers each.
    #expect(answer.json["usage"]?["prompt_tokens"] == 19)
    #expect(answer.json["usage"]?["completion_tokens"] == 27)
    let requests = service.requests
    #expect(requests.map(\.id) == ["r-0", "r-1", "r-2"])
    #expect(requests[0].sampling.seed == 7)
    #expect(Set(requests.map(\.sampling.seed)).count == 3)
    let again = FakeService()
    _ = try await withRoutes(again) { client in
      try await client.post("/v1/chat/completions", with(chat, ["n": 2, "seed": 7]))
    }
    #expect(again.requests.map(\.sampling.seed) == requests.prefix(2).map(\.sampling.seed))
  }

  @Test func reportsLogprobs() async throws {
    let answer = try await withRoutes { client in
      try await client.post(
        "/v1/chat/completions", with(chat, ["logprobs": true, "top_logprobs": 1, "max_tokens": 7]))
    }
    let content = try #require(answer.json["choices"]?[0]?["logprobs"]?["content"]?.arrayValue)
    #expect(content.count == 7)
    #expect(
      content[6] == [
        "token": "é", "logprob": -3.5, "bytes": [195, 169],
        "top_logprobs": [["token": "a", "logprob": -0.25, "bytes": [97]]],
      ])
  }

  @Test func stopsAtAStopString() async throws {
    let answer = try await withRoutes { client in
      try await client.post("/v1/chat/completions", with(chat, ["stop": "world"]))
    }
    #expect(answer.json["choices"]?[0]?["message"]?["content"] == "Hello, ")
    #expect(answer.json["choices"]?[0]?["finish_reason"] == "stop")
    #expect(answer.json["choices"]?[0]?["matched_stop"] == "world")
  }

  @Test func reportsTheEndByLength() async throws {
    let answer = try await withRoutes { try await $0.post("/v1/chat/completions", with(chat, ["max_tokens": 2])) }
    #expect(answer.json["choices"]?[0]?["finish_reason"] == "length")
    #expect(answer.json["choices"]?[0]?["matched_stop"] == .null)
  }

  @Test func rendersConversations() async throws {
    let service = FakeService()
    let body: JSONValue = [
      "messages": [
        ["role": "system", "content": [["type": "text", "text": "Be"], ["type": "text", "text": "brief"]]],
        ["role": "user", "content": nil], ["role": "assistant", "content": "I think"],
      ], "continue_final_message": true, "chat_template_kwargs": ["thinking": false],
      "reasoning_effort": "low", "tools": [["type": "function", "function": ["name": "f"]]],
    ]
    var withoutTools = body.objectValue!
    withoutTools["tool_choice"] = "none"
    let second = JSONValue.object(withoutTools)
    try await withRoutes(service) { client in
      for body in [body, second] {
        let answer = try await client.post("/v1/chat/completions", body)
        #expect(answer.status == 200)
      }
    }
    let texts = service.requests.map { request in
      guard case .tokens(let tokens) = request.prompt else { return "" }
      return String(decoding: tokens.map { UInt8($0) }, as: UTF8.self)
    }
    let start = "<system>Be brief<user><assistant>I think"
    let end = "<reasoning_effort=\"low\"><thinking=false>"
    #expect(texts == ["\(start)<tools>[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]\(end)", start + end])
  }

  @Test func whatHasNoEffectIsTaken() async throws {
    let service = FakeService()
    let answer = try await withRoutes(service) { client in
      try await client.post(
        "/v1/chat/completions",
        with(
          chat,
          [
            "store": false, "service_tier": "flex", "prediction": ["type": "content", "content": "x"],
            "prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "low",
            "messages": [["role": "user", "content": "Hi"], ["role": "assistant", "content": nil, "refusal": "No."]],
          ]))
    }
    #expect(answer.status == 200, "\(answer.text)")
    #expect(promptText(service.requests.first) == "<user>Hi<assistant>No.<verbosity=\"low\"><assistant>")
  }

  @Test func takesTokenIDsInsteadOfMessages() async throws {
    let service = FakeService()
    _ = try await withRoutes(service) { try await $0.post("/v1/chat/completions", ["input_ids": [1, 2, 3]]) }
    #expect(service.requests.first?.prompt == .tokens([1, 2, 3]))
  }

  @Test(
    arguments: [
      ("messages", nil, "messages is required: an array of messages."),
      ("messages", [], "messages must not be empty."),
      ("messages", "Hi", "messages: expected an array of messages, got a string."),
      ("messages[0]", ["Hi"], "messages[0]: expected an object, got a string."),
      ("messages[0].role", [["content": "Hi"]], "messages[0].role: is required."),
      ("messages[0].role", [["role": 3]], "messages[0].role: expected a string, got an integer."),
      (
        "messages[0].content", [["role": "user", "content": 3]],
        "messages[0].content: expected a string or an array of parts, got an integer."
      ),
      (
        "messages[0].content[1]",
        [
          [
            "role": "user",
            "content": [["type": "text", "text": "What?"], ["type": "image_url", "image_url": ["url": "x"]]],
          ]
        ],
        "messages[0].content[1]: the model served here reads text only, so parts of type \"image_url\" cannot be taken."
      ),
      (
        "messages[0].function_call", [["role": "assistant", "function_call": ["name": "f"]]],
        "messages[0].function_call: is OpenAI's old form; use tool_calls."
      ),
      (
        "messages[0].tool_calls", [["role": "assistant", "tool_calls": 5]],
        "messages[0].tool_calls: expected an array, got an integer."
      ),
    ] as [(String, JSONValue, String)])
  func refusesBrokenMessages(parameter: String, messages: JSONValue, message: String) async throws {
    let answer = try await withRoutes { try await $0.post("/v1/chat/completions", ["messages": messages]) }
    #expect(answer.status == 400)
    #expect(answer.error == message)
    #expect(answer.parameter == parameter)
    #expect(answer.json["error"]?["type"] == "invalid_request_error")
  }

  @Test(
    arguments: [
      ("temperature", "hot", "temperature: expected a number, got a string."),
      ("temperature", -1, "temperature must be a finite number of at least 0, got -1.0."),
      ("temperature", 1e300, "temperature: the number is too large."),
      ("max_tokens", 1.5, "max_tokens: expected an integer, got 1.5."),
      ("max_tokens", -1, "max_tokens must be at least 0, got -1."),
      ("top_p", 0, "top_p must be in (0, 1], got 0.0."),
      ("n", 0, "n must be in 1...128, got 0."),
      ("n", 129, "n must be in 1...128, got 129."),
      ("stop", [1], "stop[0]: expected a string, got a number."),
      ("stop", ["a", nil], "stop[1]: must not be null."),
      ("logit_bias", [1], "logit_bias: expected an object, got an array."),
      ("logit_bias", ["a": 1], "logit_bias.a: the key is no token id."),
      ("logit_bias", ["5": "x"], "logit_bias.5: expected a number, got a string."),
      ("logit_bias", ["512": 1], "logit_bias names token 512, but the vocabulary has 512 entries."),
      ("stream", "yes", "stream: expected a boolean, got a string."),
      ("stream_options", ["include_usage": true], "stream_options is only allowed when stream is true."),
      ("top_logprobs", 3, "top_logprobs needs logprobs to be true."),
      ("top_logprobs", 21, "top_logprobs must be in 0...20, got 21."),
      (
        "response_format", ["type": "xml"],
        "response_format.type: \"xml\" is none of text, json_object, json_schema and structural_tag."
      ),
      (
        "tool_choice", "required",
        "tool_choice is only allowed when tools are given."
      ),
      ("response_format", "json", "response_format: expected an object with a type, got a string."),
      (
        "response_format", ["type": "json_schema", "json_schema": ["name": "x"]],
        "response_format.json_schema.schema: expected a JSON Schema."
      ),
      ("verbosity", "huge", "verbosity: must be \"low\", \"medium\" or \"high\", got \"huge\"."),
      ("web_search_options", [:], "web_search_options: this server searches nothing; leave the field out."),
      ("moderation", ["model": "m"], "moderation: moderation is not available; leave the field out."),
      ("store", true, "store: chat completions are not kept; leave the field out, or use /v1/responses."),
      ("prompt_cache_key", 3, "prompt_cache_key: expected a string, got a number."),
      (
        "tool_choice", ["type": "allowed_tools"],
        "tool_choice of type allowed_tools needs a mode, \"auto\" or \"required\"."
      ),
      ("regex", 3, "regex: expected a string, got an integer."),
      ("rid", "a b", "rid must have 1 to 256 bytes without spaces and control characters."),
      ("input_ids", [5, -1], "input_ids[1]: -1 is no token id."),
      ("input_ids", [5, 600], "input_ids: token 600 at position 1 is not in the vocabulary of 512 tokens."),
      ("model", 3, "model: expected a string, got a number."),
      (
        "continue_final_message", true, "continue_final_message needs the last message to have the role assistant."
      ),
    ] as [(String, JSONValue, String)])
  func refusesImpossibleFields(field: String, value: JSONValue, message: String) async throws {
    let service = FakeService()
    let answer = try await withRoutes(service) { client in
      try await client.post("/v1/chat/completions", with(chat, .object(JSONObject([(field, value)]))))
    }
    #expect(answer.status == 400)
    #expect(answer.error == message)
    #expect(answer.parameter?.hasPrefix(field) == true)
    #expect(service.requests.isEmpty)
  }

  @Test func namesAllMistakesAtOnce() async throws {
    let answer = try await withRoutes { client in
      try await client.post("/v1/chat/completions", with(chat, ["temperature": "x", "top_k": 0.5, "seed": []]))
    }
    #expect(
      answer.error == """
        temperature: expected a number, got a string; top_k: expected an integer, got 0.5; \
        seed: expected an integer, got an array.
        """)
  }

  @Test func refusesUnknownModels() async throws {
    try await withRoutes { client in
      for name in ["default", "", "fake/model"] {
        let answer = try await client.post("/v1/chat/completions", with(chat, ["model": .string(name)]))
        #expect(answer.status == 200)
      }
      let answer = try await client.post("/v1/chat/completions", with(chat, ["model": "gpt-4"]))
      #expect(answer.status == 404)
      #expect(answer.code == "model_not_found")
      #expect(answer.parameter == "model")
      #expect(answer.error == "The model \"gpt-4\" does not exist here; this server has \"fake/model\".")
    }
  }

  @Test func mapsTheServicesErrors() async throws {
    let small = FakeService(contextLength: 10)
    let long = try await withRoutes(small) { try await $0.post("/v1/chat/completions", with(chat, ["max_tokens": 5])) }
    #expect(long.status == 400)
    #expect(long.code == "context_length_exceeded")
    #expect(long.error.contains("max_tokens is 5"))
    let full = FakeService(.init(capacity: 2))
    let refused = try await withRoutes(full) { try await $0.post("/v1/chat/completions", with(chat, ["n": 3])) }
    #expect(refused.status == 429)
    #expect(refused.code == "rate_limit_exceeded")
    #expect(refused.headers[.retryAfter] == "1")
    // The samples that had found room were given back.
    #expect(full.inFlight == 0)
    #expect(full.aborted.count == 2)
    let failing = FakeService(.init(failure: (2, EngineError(.internalFailure, "The model fell over."))))
    let failed = try await withRoutes(failing) { try await $0.post("/v1/chat/completions", chat) }
    #expect(failed.status == 500)
    #expect(failed.error == "The model fell over.")
    let raised = try await withRoutes { client in
      try await client.post("/v1/chat/completions", ["messages": [["role": "raise", "content": ""]]])
    }
    #expect(raised.status == 400)
    #expect(raised.error == "The template says: no such role.")
  }

  @Test func messagesAreWhatTemplatesAskFor() async throws {
    let call: JSONValue = ["type": "function", "function": ["name": "f", "arguments": "{\"a\":1}"]]
    let empty: JSONValue = ["type": "function", "function": ["name": "g", "arguments": " "]]
    let messages: JSONValue = [
      ["role": "assistant", "content": "Hi", "tool_calls": [], "function_call": nil],
      ["role": "assistant", "content": nil, "tool_calls": [call, empty]],
      ["role": "assistant", "content": [["type": "thinking", "thinking": "Hm."], ["type": "text", "text": "Hi"]]],
    ]
    func rendered(_ service: FakeService) async throws -> JSONValue {
      let answer = try await withRoutes(service) { try await $0.post("/v1/chat/completions", ["messages": messages]) }
      #expect(answer.status == 200, "\(answer.text)")
      return try #require(service.messages.last)
    }
    let expected: JSONValue = [
      ["role": "assistant", "content": "Hi", "function_call": nil],
      [
        "role": "assistant", "content": "",
        "tool_calls": [call, empty],
      ], ["role": "assistant", "content": "Hi", "reasoning_content": "Hm."],
    ]
    #expect(try await rendered(FakeService()) == expected)
    // Templates that ask for an absent content, or want arguments as objects, get them from their renderer.
    #expect(try await rendered(FakeService(chatTemplate: "{% if message['content'] is none %}")) == expected)
    // An error that texts do not mend is the first one.
    let broken: JSONValue = [["role": "raise"], ["role": "assistant", "tool_calls": [call]]]
    let answer = try await withRoutes { try await $0.post("/v1/chat/completions", ["messages": broken]) }
    #expect(answer.status == 400 && answer.error == "The template says: no such role.")
  }

  @Test(
    arguments: [
      (["thinking": ["type": "disabled"]], "<enable_thinking=false><thinking=false>"),
      (["thinking": ["type": "enabled", "budget_tokens": 5]], "<enable_thinking=true><thinking=true>"),
      (["thinking": true], "<enable_thinking=true><thinking=true>"),
      (["enable_thinking": false], "<enable_thinking=false><thinking=false>"),
      (["thinking": ["type": "adaptive"]], ""), (["thinking": nil, "enable_thinking": nil], ""),
      (["thinking": true, "chat_template_kwargs": ["thinking": false]], "<enable_thinking=true><thinking=false>"),
      (["documents": [["text": "x"]]], "<documents=[{\"text\":\"x\"}]>"),
      (["add_special_tokens": false], ""),
    ] as [(JSONValue, String)])
  func variablesReachTheTemplate(members: JSONValue, written: String) async throws {
    let service = FakeService()
    let answer = try await withRoutes(service) { try await $0.post("/v1/chat/completions", with(chat, members)) }
    #expect(answer.status == 200, "\(answer.text)")
    #expect(promptText(service.requests.first) == "<user>Hi\(written)<assistant>")
    #expect(service.requests.first?.sampling.thinkingBudget == members["thinking"]?["budget_tokens"]?.intValue)
  }

  @Test func specialTokensAreAddedWhereTheyAreAskedFor() async throws {
    let service = FakeService()
    try await withRoutes(service) { client in
      for (path, body) in [
        ("/v1/chat/completions", with(chat, ["add_special_tokens": true])), ("/v1/completions", ["prompt": "a"]),
        ("/v1/completions", ["prompt": ["a", [98]], "add_special_tokens": false]),
      ] as [(String, JSONValue)] {
        let answer = try await client.post(path, body)
        #expect(answer.status == 200, "\(answer.text)")
      }
    }
    guard case .tokens(let tokens)? = service.requests.first?.prompt else {
      Issue.record("The chat has no tokens.")
      return
    }
    #expect(tokens.first == FakeService.bos)
    #expect(service.requests.dropFirst().map(\.prompt) == [.text("a"), .tokens([97]), .tokens([98])])
  }

  @Test func reasoningIsLeftOutIfAskedFor() async throws {
    let body = with(chat, ["include_reasoning": false])
    let whole = try await withRoutes(callingService(Array(callingAnswer.prefix(8)))) {
      try await $0.post("/v1/chat/completions", body)
    }
    #expect(whole.json["choices"]?[0]?["message"] == ["role": "assistant", "content": "Let me see.", "refusal": nil])
    let streamed = try await withRoutes(callingService(Array(callingAnswer.prefix(8)))) {
      try await $0.post("/v1/chat/completions", with(body, ["stream": true]))
    }
    #expect(!streamed.text.contains("reasoning") && !streamed.text.contains("Hm"))
    #expect(streamed.text.contains("Let me"))
  }

  @Test(
    arguments: [
      ("chat_template", "{{ messages }}"), ("echo", true), ("bad_words", ["x"]), ("allowed_token_ids", [1]),
      ("logits_processors", ["x"]), ("watermark", true), ("prompt_logprobs", 1), ("truncate_prompt_tokens", 5),
      ("return_token_ids", true), ("return_hidden_states", "last"), ("return_routed_experts", true),
    ] as [(String, JSONValue)])
  func whatCannotBeDoneIsRefused(field: String, value: JSONValue) async throws {
    try await withRoutes { client in
      let answer = try await client.post("/v1/chat/completions", with(chat, .object(JSONObject([(field, value)]))))
      #expect(answer.status == 400 && answer.parameter == field && answer.code == "unsupported_value", "\(answer.text)")
      // What asks for nothing is taken.
      for nothing in [nil, field == "bad_words" ? [] : nil, value.boolValue == nil ? nil : false] as [JSONValue]
      where field != "watermark" || nothing.isNull {
        let answer = try await client.post("/v1/chat/completions", with(chat, .object(JSONObject([(field, nothing)]))))
        #expect(answer.status == 200, "\(answer.text)")
      }
    }
  }

  @Test func argumentsOfCallsStayAsTheClientGaveThem() async throws {
    let service = FakeService()
    let body: JSONValue = [
      "messages": [
        [
          "role": "assistant", "content": nil,
          "tool_calls": [["type": "function", "function": ["name": "f", "arguments": "{\"a\":1}"]]],
        ]
      ]
    ]
    let answer = try await withRoutes(service) { try await $0.post("/v1/chat/completions", body) }
    #expect(answer.status == 200)
    #expect(service.messages.first?[0]?["tool_calls"]?[0]?["function"]?["arguments"] == "{\"a\":1}")
  }
}

@Suite struct CompletionTests {
  @Test func answersWithOpenAIsShape() async throws {
    let service = FakeService()
    let answer = try await withRoutes(service) { client in
      try await client.post("/v1/completions", ["model": "fake/model", "prompt": "Once"])
    }
    #expect(answer.status == 200)
    let json = answer.json
    #expect(json["object"] == "text_completion")
    #expect(
      json["choices"]?[0] == [
        "index": 0, "text": .string(FakeService.answer), "logprobs": nil, "finish_reason": "stop", "matched_stop": 257,
      ])
    #expect(json["usage"]?["prompt_tokens"] == 5)
    #expect(service.requests[0].prompt == .text("Once"))
    #expect(service.requests[0].sampling.maxNewTokens == 16)
  }

  @Test(
    arguments: [
      ("ab", [.text("ab")]), ([97, 98], [.tokens([97, 98])]), (["a", "b"], [.text("a"), .text("b")]),
      ([[97], [98, 99]], [.tokens([97]), .tokens([98, 99])]),
    ] as [(JSONValue, [Request.Prompt])])
  func takesEveryKindOfPrompt(prompt: JSONValue, expected: [Request.Prompt]) async throws {
    let service = FakeService()
    let answer = try await withRoutes(service) { client in
      try await client.post("/v1/completions", ["prompt": prompt, "n": 2, "max_tokens": 1])
    }
    #expect(service.requests.map(\.prompt) == expected.flatMap { [$0, $0] })
    #expect(answer.json["choices"]?.arrayValue?.compactMap { $0["index"]?.intValue } == Array(0..<expected.count * 2))
  }

  @Test(
    arguments: [
      ([], "prompt: must not be empty."), ([1, "a"], "prompt: token ids and prompts cannot be mixed in one array."),
      ([[]], "The prompt is empty."), ([[1, "x"]], "prompt[0][1]: expected an integer, got a string."),
      (nil, "prompt is required: a string, token ids, or an array of either."),
      (["a": 1], "prompt: expected a string, an array of token ids, or an array of either, got an object."),
      ([513], "prompt: token 513 at position 0 is not in the vocabulary of 512 tokens."),
      ([99_999_999_999], "prompt: 99999999999 is no token id."),
    ] as [(JSONValue, String)])
  func refusesBrokenPrompts(prompt: JSONValue, message: String) async throws {
    let answer = try await withRoutes { try await $0.post("/v1/completions", ["prompt": prompt]) }
    #expect(answer.status == 400)
    #expect(answer.error.hasSuffix(message), "\(answer.error)")
  }

  @Test func echoesThePromptWithLogprobs() async throws {
    let answer = try await withRoutes { client in
      try await client.post(
        "/v1/completions", ["prompt": [72, 195], "echo": true, "logprobs": 1, "max_tokens": 2])
    }
    let choice = try #require(answer.json["choices"]?[0])
    #expect(choice["text"] == "H\u{FFFD}Hello,")
    #expect(
      choice["logprobs"] == [
        "text_offset": [0, 1, 2, 7], "token_logprobs": [nil, -1.0, -0.5, -1.0],
        "tokens": ["H", "bytes:\\xc3", "Hello", ","],
        "top_logprobs": [
          nil, ["a": -0.25, "bytes:\\xc3": -1.0], ["a": -0.25, "Hello": -0.5], ["a": -0.25, ",": -1.0],
        ],
      ])
  }

  @Test func scoresAPromptWithoutGenerating() async throws {
    let answer = try await withRoutes { client in
      try await client.post("/v1/completions", ["prompt": "ab", "echo": true, "logprobs": 0, "max_tokens": 0])
    }
    #expect(answer.json["choices"]?[0]?["text"] == "ab")
    #expect(answer.json["choices"]?[0]?["logprobs"]?["token_logprobs"] == [nil, -1.0, -1.0])
  }

  @Test func returnsTheBestOfSeveral() async throws {
    let service = FakeService()
    let answer = try await withRoutes(service) { client in
      try await client.post("/v1/completions", ["prompt": "a", "best_of": 3, "n": 1])
    }
    #expect(service.requests.count == 3)
    #expect(answer.json["choices"]?.arrayValue?.count == 1)
    #expect(answer.json["choices"]?[0]?["logprobs"] == .null)
    #expect(answer.json["usage"]?["completion_tokens"] == 27)
  }

  @Test(
    arguments: [
      (["best_of": 1, "n": 2], "best_of"), (["best_of": 2, "stream": true], "best_of"), (["best_of": 500], "best_of"),
      (["suffix": "end"], "suffix"), (["logprobs": 21], "logprobs"), (["logprobs": true], "logprobs"),
    ] as [(JSONValue, String)])
  func refusesWhatItCannotDo(members: JSONValue, parameter: String) async throws {
    let answer = try await withRoutes { try await $0.post("/v1/completions", with(["prompt": "a"], members)) }
    #expect(answer.status == 400)
    #expect(answer.parameter == parameter)
  }

  @Test func refusesMoreAnswersThanAllowed() async throws {
    let answer = try await withRoutes(FakeService(), testConfiguration { $0.maxGenerationsPerRequest = 5 }) { client in
      try await client.post("/v1/completions", ["prompt": ["a", "b"], "n": 3])
    }
    #expect(answer.status == 400)
    #expect(answer.error == "The request asks for 6 answers; at most 5 may be asked for at once.")
  }
}

@Suite struct StreamTranscriptTests {
  /// A transcript with the values that differ from run to run replaced.
  private func stable(_ answer: Answer) -> [String] {
    let json = answer.events.first.flatMap { try? JSONValue.parse($0) } ?? .null
    var text = answer.text
    if let created = json["created"]?.intValue {
      text = text.replacing("\"created\":\(created)", with: "\"created\":0")
    }
    if let fingerprint = json["system_fingerprint"]?.stringValue { text = text.replacing(fingerprint, with: "fp") }
    return text.split(separator: "\n\n", omittingEmptySubsequences: true).map(String.init)
  }

  @Test func chatTranscript() async throws {
    let answer = try await withRoutes { client in
      try await client.post(
        "/v1/chat/completions",
        with(
          chat,
          ["stream": true, "rid": "r", "max_tokens": 5, "stream_options": ["include_usage": true], "temperature": 0]))
    }
    #expect(answer.headers[.contentType] == "text/event-stream; charset=utf-8")
    #expect(answer.headers[.cacheControl] == "no-cache")
    #expect(answer.text.hasSuffix("}\n\ndata: [DONE]\n\n"))
    let head =
      #"data: {"id":"r","object":"chat.completion.chunk","created":0,"model":"fake/model","system_fingerprint":"fp","#
    let tail = #","logprobs":null,"finish_reason":null}],"usage":null}"#
    #expect(
      stable(answer) == [
        head + #""choices":[{"index":0,"delta":{"role":"assistant","content":""}"# + tail,
        head + #""choices":[{"index":0,"delta":{"content":"Hello"}"# + tail,
        head + #""choices":[{"index":0,"delta":{"content":","}"# + tail,
        head + #""choices":[{"index":0,"delta":{"content":" world"}"# + tail,
        head + #""choices":[{"index":0,"delta":{"content":"!"}"# + tail,
        head + #""choices":[{"index":0,"delta":{"content":" \"quoted\""}"# + tail,
        head + #""choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length","matched_stop":null}],"#
          + #""usage":null}"#,
        head + #""choices":[],"usage":{"prompt_tokens":19,"completion_tokens":5,"total_tokens":24,"#
          + #""prompt_tokens_details":{"cached_tokens":3}}}"#,
        "data: [DONE]",
      ])
  }

  @Test func completionsTranscript() async throws {
    let answer = try await withRoutes { client in
      try await client.post(
        "/v1/completions", ["prompt": "ab", "stream": true, "rid": "r", "echo": true, "stop": "!"])
    }
    let head =
      #"data: {"id":"r","object":"text_completion","created":0,"model":"fake/model","system_fingerprint":"fp","#
    let tail = #","logprobs":null,"finish_reason":null}]}"#
    #expect(
      stable(answer) == [
        head + #""choices":[{"index":0,"text":"ab""# + tail,
        head + #""choices":[{"index":0,"text":"Hello""# + tail,
        head + #""choices":[{"index":0,"text":",""# + tail,
        head + #""choices":[{"index":0,"text":" world""# + tail,
        head + #""choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"stop","matched_stop":"!"}]}"#,
        "data: [DONE]",
      ])
  }

  @Test func generateTranscript() async throws {
    let body: JSONValue = ["text": "ab", "stream": true, "rid": "r", "sampling_params": ["max_new_tokens": 2]]
    func events(_ configuration: ServerConfiguration) async throws -> [JSONValue] {
      let answer = try await withRoutes(FakeService(), configuration) { try await $0.post("/generate", body) }
      #expect(answer.events.last == "[DONE]")
      return try answer.events.dropLast().map { try JSONValue.parse($0) }
    }
    let cumulative = try await events(testConfiguration())
    #expect(cumulative.map { $0["text"] } == ["Hello", "Hello,"])
    #expect(cumulative.map { $0["output_ids"] } == [[300], [300, 301]])
    #expect(cumulative.map { $0["meta_info"]?["finish_reason"] } == [.null, ["type": "length", "length": 2]])
    #expect(cumulative.map { $0["meta_info"]?["completion_tokens"] } == [1, 2])
    let incremental = try await events(testConfiguration { $0.incrementalStreaming = true })
    #expect(incremental.map { $0["text"] } == ["Hello", ","])
    #expect(incremental.map { $0["output_ids"] } == [[300], [301]])
  }

  @Test func severalSamplesShareOneStream() async throws {
    let answer = try await withRoutes { client in
      try await client.post("/v1/chat/completions", with(chat, ["stream": true, "n": 3]))
    }
    var texts = ["", "", ""]
    var ends = 0
    for event in answer.events.dropLast() {
      let choice = try #require(try JSONValue.parse(event)["choices"]?[0])
      let index = try #require(choice["index"]?.intValue)
      texts[index] += choice["delta"]?["content"]?.stringValue ?? ""
      if choice["finish_reason"] == "stop" { ends += 1 }
    }
    #expect(texts == Array(repeating: FakeService.answer, count: 3))
    #expect(ends == 3)
    #expect(answer.events.last == "[DONE]")
  }

  @Test func usageOnEveryChunkIfAskedFor() async throws {
    let answer = try await withRoutes { client in
      try await client.post(
        "/v1/completions",
        ["prompt": "a", "stream": true, "max_tokens": 3, "stream_options": ["continuous_usage_stats": true]])
    }
    let usages = try answer.events.dropLast().map { try JSONValue.parse($0)["usage"]?["completion_tokens"] }
    #expect(usages == [1, 2, 3, 3])
  }

  @Test func logprobsTravelWithTheirTokens() async throws {
    let answer = try await withRoutes { client in
      try await client.post("/v1/chat/completions", with(chat, ["stream": true, "logprobs": true, "max_tokens": 2]))
    }
    let tokens = try answer.events.dropLast().flatMap { event in
      try JSONValue.parse(event)["choices"]?[0]?["logprobs"]?["content"]?.arrayValue?.compactMap {
        $0["token"]?.stringValue
      } ?? []
    }
    #expect(tokens == ["Hello", ","])
    let completion = try await withRoutes { client in
      try await client.post("/v1/completions", ["prompt": "a", "stream": true, "logprobs": 0, "max_tokens": 2])
    }
    let offsets = try completion.events.dropLast().compactMap {
      try JSONValue.parse($0)["choices"]?[0]?["logprobs"]?["text_offset"]?[0]?.intValue
    }
    #expect(offsets == [0, 5])
  }

  @Test func errorsComeAsAnEventBeforeTheEnd() async throws {
    let service = FakeService(.init(failure: (1, EngineError(.internalFailure, "The model fell over."))))
    let answer = try await withRoutes(service) { client in
      try await client.post("/v1/completions", ["prompt": "a", "stream": true])
    }
    #expect(answer.status == 200)
    #expect(
      answer.events.suffix(2) == [
        #"{"error":{"message":"The model fell over.","type":"server_error","param":null,"code":null}}"#, "[DONE]",
      ])
  }

  @Test func refusalsBeforeTheStreamHaveAStatus() async throws {
    let answer = try await withRoutes(FakeService(.init(capacity: 0))) { client in
      try await client.post("/v1/chat/completions", with(chat, ["stream": true]))
    }
    #expect(answer.status == 429)
  }
}
