import ApusCore
import ApusServer
import ApusStore
import Foundation
import Hummingbird
import HummingbirdTesting
import Synchronization
import Testing

/// Calls the routes of a server with a store, without a socket.
func withStore<Value: Sendable>(
  _ service: any GenerationService = FakeService(), _ store: Store? = nil,
  _ configuration: ServerConfiguration = testConfiguration(),
  _ body: @Sendable (RouteClient, Server) async throws -> Value
) async throws -> Value {
  let server = try Server(
    service: service, configuration: configuration, logger: quietLogger, store: try store ?? Store())
  return try await server.makeApplication().test(.router) { try await body(RouteClient(client: $0), server) }
}

/// Waits until a value is as wanted, at most half a minute.
func until<Value: Sendable>(
  _ value: @Sendable () async throws -> Value, _ isGood: @Sendable (Value) -> Bool
) async throws -> Value {
  for _ in 0..<6000 {
    let found = try await value()
    if isGood(found) { return found }
    try await Task.sleep(for: .milliseconds(5))
  }
  throw EngineError(.timeout, "What was waited for did not come.")
}

/// A text with ids, times and the like replaced by their kinds.
private func stable(_ text: String) -> String {
  text.replacing(/(resp|msg|rs|fc)_[0-9a-f]{32}/) { "\($0.output.1)_ID" }
    .replacing(/call_[0-9a-f]{24}/, with: "call_ID")
    .replacing(/"(created_at|completed_at)":[0-9]+/) { "\"\($0.output.1)\":0" }
}

private let weather: JSONValue = [
  "type": "function", "name": "get_weather",
  "parameters": ["type": "object", "properties": ["city": ["type": "string"]]], "strict": false,
]
private let answer = [
  "<think>", "\n", "Hm", ".\n", "</think>", "\n\n", "Let me", " see.", "\n", "<tool_call>", "\n", "{\"name\": \"get_",
  "weather\", \"arg", "uments\": {\"city\": \"Zü", "rich\"}}", "\n</tool", "_call>",
]

@Suite struct ResponsesTests {
  /// The response object around what varies.
  private func object(
    _ status: String, output: String = "[]", usage: String = "null", completed: String = "null",
    tools: String = "[]", incomplete: String = "null", error: String = "null"
  ) -> String {
    #"{"id":"resp_ID","object":"response","created_at":0,"status":""# + status
      + #"","background":false,"completed_at":"# + completed + #","conversation":null,"error":"# + error
      + #","incomplete_details":"#
      + incomplete
      + #","instructions":null,"max_output_tokens":null,"max_tool_calls":null,"model":"fake/model","output":"#
      + output + #","parallel_tool_calls":true,"previous_response_id":null,"prompt_cache_key":null,"#
      + #""reasoning":{"effort":null,"summary":null},"safety_identifier":null,"service_tier":"default","#
      + #""store":true,"temperature":1.0,"text":{"format":{"type":"text"}},"tool_choice":"auto","tools":"# + tools
      + #","top_logprobs":0,"top_p":1.0,"truncation":"disabled","usage":"# + usage + #","user":null,"metadata":{}}"#
  }

  @Test func streamTranscript() async throws {
    let service = FakeService(.init(words: answer), chatTemplate: qwenTemplate)
    let got = try await withStore(service) { client, _ in
      try await client.post("/v1/responses", ["input": "Hi", "tools": [weather], "stream": true])
    }
    #expect(got.status == 200)
    #expect(got.headers[.contentType] == "text/event-stream; charset=utf-8")
    let tools = "[" + weather.compactText + "]"
    var number = 0
    func event(_ type: String, _ members: String) -> String {
      defer { number += 1 }
      return "event: response.\(type)\ndata: {\"type\":\"response.\(type)\",\"sequence_number\":\(number),\(members)}"
    }
    func reasoning(_ text: String?, _ status: String) -> String {
      let content = text.map { #"{"type":"reasoning_text","text":""# + $0 + #""}"# } ?? ""
      return #"{"id":"rs_ID","type":"reasoning","summary":[],"content":["# + content + #"],"status":""# + status
        + #""}"#
    }
    func part(_ text: String) -> String {
      #"{"type":"output_text","text":""# + text + #"","annotations":[],"logprobs":[]}"#
    }
    func message(_ text: String?, _ status: String) -> String {
      #"{"id":"msg_ID","type":"message","status":""# + status + #"","role":"assistant","content":["#
        + (text.map(part) ?? "") + "]}"
    }
    func call(_ arguments: String, _ status: String) -> String {
      #"{"id":"fc_ID","type":"function_call","status":""# + status
        + #"","call_id":"call_ID","name":"get_weather","arguments":""# + arguments + #""}"#
    }
    let rs = #""item_id":"rs_ID","output_index":0,"content_index":0,"#
    let msg = #""item_id":"msg_ID","output_index":1,"content_index":0,"#
    let fc = #""item_id":"fc_ID","output_index":2,"#
    let arguments = #"{\"city\": \"Zürich\"}"#
    let output =
      "[\(reasoning("Hm.", "completed")),\(message("Let me see.", "completed")),\(call(arguments, "completed"))]"
    // "<user>Hi<assistant>" is 19 bytes and the tools in the chat API's form are 148; 18 tokens answer, and the chain of
    // thought is 3 bytes.
    let usage =
      #"{"input_tokens":167,"input_tokens_details":{"cached_tokens":3},"output_tokens":18,"#
      + #""output_tokens_details":{"reasoning_tokens":3},"total_tokens":185}"#
    let expected = [
      event("created", #""response":"# + object("in_progress", tools: tools)),
      event("in_progress", #""response":"# + object("in_progress", tools: tools)),
      event("output_item.added", #""output_index":0,"item":"# + reasoning(nil, "in_progress")),
      event("content_part.added", rs + #""part":{"type":"reasoning_text","text":""}"#),
      event("reasoning_text.delta", rs + #""delta":"Hm""#),
      event("reasoning_text.delta", rs + #""delta":".""#),
      event("reasoning_text.done", rs + #""text":"Hm.""#),
      event("content_part.done", rs + #""part":{"type":"reasoning_text","text":"Hm."}"#),
      event("output_item.done", #""output_index":0,"item":"# + reasoning("Hm.", "completed")),
      event("output_item.added", #""output_index":1,"item":"# + message(nil, "in_progress")),
      event("content_part.added", msg + #""part":"# + part("")),
      event("output_text.delta", msg + #""delta":"Let me","logprobs":[]"#),
      event("output_text.delta", msg + #""delta":" see.","logprobs":[]"#),
      event("output_text.done", msg + #""text":"Let me see.","logprobs":[]"#),
      event("content_part.done", msg + #""part":"# + part("Let me see.")),
      event("output_item.done", #""output_index":1,"item":"# + message("Let me see.", "completed")),
      event("output_item.added", #""output_index":2,"item":"# + call("", "in_progress")),
      event("function_call_arguments.delta", fc + #""delta":"{\"city\": \"Zü""#),
      event("function_call_arguments.delta", fc + #""delta":"rich\"}""#),
      event("function_call_arguments.done", fc + #""name":"get_weather","arguments":""# + arguments + #"""#),
      event("output_item.done", #""output_index":2,"item":"# + call(arguments, "completed")),
      event(
        "completed",
        #""response":"# + object("completed", output: output, usage: usage, completed: "0", tools: tools)),
    ]
    let events = stable(got.text).components(separatedBy: "\n\n").filter { !$0.isEmpty }
    #expect(events == expected)
    #expect(got.text.hasSuffix("}\n\n"))
  }

  @Test func wholeAnswerIsKeptAndForgotten() async throws {
    try await withStore { client, _ in
      let got = try await client.post("/v1/responses", ["input": "Hi", "metadata": ["a": "b"]])
      #expect(got.status == 200)
      let id = try #require(got.json["id"]?.stringValue)
      #expect(got.json["status"] == "completed")
      #expect(got.json["output"]?[0]?["content"]?[0]?["text"] == .string(FakeService.answer))
      #expect(got.json["metadata"] == ["a": "b"])
      let fetched = try await client.get("/v1/responses/\(id)")
      #expect(fetched.text == got.text)
      let items = try await client.get("/v1/responses/\(id)/input_items")
      #expect(items.json["data"]?[0]?["content"] == [["type": "input_text", "text": "Hi"]])
      #expect(items.json["has_more"] == false)
      #expect(items.json["first_id"] == items.json["data"]?[0]?["id"])
      let cancelled = try await client.post("/v1/responses/\(id)/cancel", [:])
      #expect(cancelled.status == 400)
      let deleted = try await client.send(.delete, "/v1/responses/\(id)")
      #expect(deleted.json == ["id": .string(id), "object": "response", "deleted": true])
      #expect(try await client.get("/v1/responses/\(id)").status == 404)
      #expect(try await client.send(.delete, "/v1/responses/\(id)").status == 404)
      // What is not to be stored is not found.
      let unstored = try await client.post("/v1/responses", ["input": "Hi", "store": false])
      #expect(unstored.json["store"] == false)
      #expect(try await client.get("/v1/responses/\(unstored.json["id"]!.stringValue!)").status == 404)
    }
  }

  @Test func conversationsGoOn() async throws {
    let service = FakeService(.init(words: answer), chatTemplate: qwenTemplate)
    try await withStore(service) { client, _ in
      let first = try await client.post(
        "/v1/responses", ["input": "Weather?", "tools": [weather], "instructions": "Be brief."])
      let callID = try #require(first.json["output"]?[2]?["call_id"])
      let second = try await client.post(
        "/v1/responses",
        [
          "previous_response_id": first.json["id"]!, "tools": [weather],
          "input": [["type": "function_call_output", "call_id": callID, "output": "Snow"]],
        ])
      #expect(second.status == 200, "\(second.text)")
      #expect(second.json["previous_response_id"] == first.json["id"])
      let third = try await client.post(
        "/v1/responses",
        [
          "previous_response_id": second.json["id"]!, "instructions": "Sing.",
          "input": [["role": "user", "content": [["type": "input_text", "text": "Thanks"]]]],
        ])
      #expect(third.status == 200, "\(third.text)")
      let secondCall = try #require(second.json["output"]?[2]?["call_id"])
      func assistant(_ id: JSONValue) -> JSONValue {
        [
          "role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.",
          "tool_calls": [
            [
              "id": id, "type": "function",
              "function": ["name": "get_weather", "arguments": "{\"city\": \"Zürich\"}"],
            ]
          ],
        ]
      }
      // Instructions are not carried over; the rest of the conversation is.
      #expect(
        service.messages.last == [
          ["role": "system", "content": "Sing."], ["role": "user", "content": "Weather?"], assistant(callID),
          ["role": "tool", "tool_call_id": callID, "content": "Snow"], assistant(secondCall),
          ["role": "user", "content": "Thanks"],
        ])
      // Without a link in the middle the conversation is lost.
      _ = try await client.send(.delete, "/v1/responses/\(first.json["id"]!.stringValue!)")
      let broken = try await client.post(
        "/v1/responses", ["previous_response_id": second.json["id"]!, "input": "More"])
      #expect(broken.status == 404)
      #expect(broken.parameter == "previous_response_id")
    }
  }

  @Test func background() async throws {
    let service = FakeService(.init(holdAfter: 2))
    try await withStore(service) { client, _ in
      let body: JSONValue = ["input": "Hi", "background": true]
      let first = try await client.post("/v1/responses", body)
      #expect(first.status == 200)
      #expect(first.json["status"] == "queued")
      let id = first.json["id"]!.stringValue!
      @Sendable func fetch(_ id: String) async throws -> JSONValue { try await client.get("/v1/responses/\(id)").json }
      _ = try await until({ try await fetch(id) }) { $0["status"] == "in_progress" }
      // It cannot be followed before it ends.
      let early = try await client.post("/v1/responses", ["input": "x", "previous_response_id": .string(id)])
      #expect(early.status == 400)
      let cancelled = try await client.post("/v1/responses/\(id)/cancel", [:])
      #expect(cancelled.json["status"] == "cancelled")
      #expect(cancelled.json["error"] == .null)
      #expect(try await fetch(id) == cancelled.json)
      #expect(service.inFlight == 0)
      let second = try await client.post("/v1/responses", body).json["id"]!.stringValue!
      service.release()
      let done = try await until({ try await fetch(second) }) { $0["status"] == "completed" }
      #expect(done["output"]?[0]?["content"]?[0]?["text"] == .string(FakeService.answer))
      // Cancelling what has ended changes nothing.
      #expect(try await client.post("/v1/responses/\(second)/cancel", [:]).json == done)
    }
  }

  @Test func whatAProcessLeftUnfinishedHasFailed() async throws {
    let store = try Store()
    try await store.save(
      StoredResponse(
        id: "resp_1", created: 1, isFinished: false, previousID: nil, input: Array("[]".utf8),
        object: Array(#"{"id":"resp_1","status":"in_progress","error":null}"#.utf8)), nil)
    try await withStore(FakeService(), store) { client, server in
      try await server.resume()
      let got = try await client.get("/v1/responses/resp_1")
      #expect(got.json["status"] == "failed")
      #expect(got.json["error"]?["code"] == "server_error")
    }
  }

  @Test func fieldsReachTheGeneration() async throws {
    let service = FakeService()
    try await withStore(service) { client, _ in
      let got = try await client.post(
        "/v1/responses",
        [
          "input": "Hi", "temperature": 0.5, "top_p": 0.25, "max_output_tokens": 4, "top_k": 7,
          "reasoning": ["effort": "low"], "user": "me", "truncation": "auto",
          "text": ["format": ["type": "json_schema", "name": "n", "schema": ["type": "object"], "strict": false]],
        ])
      #expect(got.status == 200, "\(got.text)")
      let sampling = try #require(service.requests.first?.sampling)
      #expect(sampling.temperature == 0.5)
      #expect(sampling.topP == 0.25)
      #expect(sampling.topK == 7)
      #expect(sampling.maxNewTokens == 4)
      #expect(sampling.grammar == .jsonSchema(#"{"type":"object"}"#))
      #expect(got.json["status"] == "incomplete")
      #expect(got.json["incomplete_details"] == ["reason": "max_output_tokens"])
      #expect(got.json["output"]?[0]?["status"] == "incomplete")
      #expect(got.json["temperature"] == 0.5)
      #expect(got.json["reasoning"] == ["effort": "low", "summary": nil])
      #expect(got.json["text"]?["format"]?["name"] == "n")
      let object = try await client.post(
        "/v1/responses", ["input": "Hi", "text": ["format": ["type": "json_object"]]])
      #expect(object.status == 200)
      #expect(service.requests.last?.sampling.grammar == .jsonObject)
    }
  }

  @Test func truncationLeavesOutTheOldestTurns() async throws {
    let service = FakeService(contextLength: 100)
    try await withStore(service) { client, _ in
      let turn = String(repeating: "x", count: 30)
      var input: [JSONValue] = [["role": "system", "content": "S"]]
      for index in 0..<4 {
        input.append(["role": "user", "content": .string("\(index)" + turn)])
        input.append(["role": "assistant", "content": "a"])
      }
      input.append(["role": "user", "content": "last"])
      let refused = try await client.post("/v1/responses", ["input": .array(input), "max_output_tokens": 5])
      #expect(refused.status == 400)
      #expect(refused.code == "context_length_exceeded")
      let got = try await client.post(
        "/v1/responses", ["input": .array(input), "max_output_tokens": 5, "truncation": "auto"])
      #expect(got.status == 200, "\(got.text)")
      let messages = try #require(service.requests.last.map { $0.prompt })
      guard case .tokens(let tokens) = messages else { return }
      let text = String(decoding: tokens.map { UInt8($0) }, as: UTF8.self)
      #expect(text == "<system>S<user>3\(turn)<assistant>a<user>last<assistant>")
    }
  }

  @Test func failuresEndTheStream() async throws {
    let error = EngineError(.internalFailure, "It broke.")
    let service = FakeService(.init(failure: (2, error)))
    try await withStore(service) { client, _ in
      let got = try await client.post("/v1/responses", ["input": "Hi", "stream": true])
      let last = try #require(got.text.components(separatedBy: "\n\n").last { !$0.isEmpty })
      #expect(last.hasPrefix("event: response.failed\ndata: "))
      let response = try JSONValue.parse(String(last.dropFirst("event: response.failed\ndata: ".count)))["response"]
      #expect(response?["status"] == "failed")
      #expect(response?["error"] == ["code": "server_error", "message": "It broke."])
      #expect(response?["output"]?[0]?["status"] == "incomplete")
      let stored = try await client.get("/v1/responses/\(response?["id"]?.stringValue ?? "")")
      #expect(stored.json == response)
      #expect(try await client.post("/v1/responses", ["input": "Hi"]).status == 500)
    }
  }

  @Test func badRequests() async throws {
    let cases: [(JSONValue, Int, String?)] = [
      ([:], 400, "input"),
      (["input": []], 400, "input"),
      (["input": 3], 400, "input"),
      (["input": "x", "model": "other"], 404, "model"),
      (["input": "x", "previous_response_id": "resp_none"], 404, "previous_response_id"),
      (["input": "x", "temperature": "hot"], 400, "temperature"),
      (["input": "x", "temperature": -1], 400, "temperature"),
      (["input": "x", "max_output_tokens": 0], 400, "max_output_tokens"),
      (["input": "x", "max_output_tokens": 1.5], 400, "max_output_tokens"),
      (["input": "x", "truncation": "some"], 400, "truncation"),
      (["input": "x", "reasoning": ["effort": "huge"]], 400, "reasoning.effort"),
      (["input": "x", "background": true, "store": false], 400, "background"),
      (["input": "x", "metadata": ["a": 1]], 400, "metadata.a"),
      (["input": "x", "metadata": [1]], 400, "metadata"),
      (["input": "x", "conversation": "c"], 404, "conversation"),
      (["input": "x", "conversation": [:]], 400, "conversation"),
      (["input": "x", "conversation": 3], 400, "conversation"),
      (["input": "x", "conversation": "c", "previous_response_id": "r"], 400, "previous_response_id"),
      (["input": "x", "prompt": ["id": "p"]], 400, "prompt"),
      (["input": "x", "context_management": [["type": "compaction"]]], 400, "context_management"),
      (["input": "x", "moderation": ["model": "m"]], 400, "moderation"),
      (["input": "x", "max_tokens": 5], 400, "max_tokens"),
      (["input": "x", "response_format": ["type": "json_object"]], 400, "response_format"),
      (["input": "x", "max_tool_calls": 0], 400, "max_tool_calls"),
      (["input": "x", "top_logprobs": 21], 400, "top_logprobs"),
      (["input": "x", "text": ["verbosity": "huge"]], 400, "text.verbosity"),
      (["input": "x", "top_k": "many"], 400, "top_k"),
      (["input": "x", "tools": [["type": "web_search"]]], 400, "tools[0].type"),
      (["input": "x", "tools": [["type": "function"]]], 400, "tools[0].name"),
      (["input": "x", "tool_choice": "required"], 400, "tool_choice"),
      (["input": "x", "text": ["format": ["type": "xml"]]], 400, "text.format.type"),
      (["input": "x", "text": ["format": ["type": "json_schema", "name": "n"]]], 400, "text.format.schema"),
      (["input": "x", "include": "message.output_text.logprobs"], 400, "include"),
      (["input": [["role": "user"]]], 400, "input[0].content"),
      (["input": [["role": "robot", "content": "x"]]], 400, "input[0].role"),
      (["input": [["role": "user", "content": [["type": "input_image"]]]]], 400, "input[0].content[0]"),
      (["input": [["type": "function_call", "name": "f", "arguments": "{}"]]], 400, "input[0].call_id"),
      (["input": [["type": "item_reference"]]], 400, "input[0].id"),
      (["input": [["type": "item_reference", "id": "x"]]], 404, "input[0].id"),
      (["input": [["id": "x"]]], 404, "input[0].id"),
      (["input": [["type": "compaction", "encrypted_content": "x"]]], 400, "input[0].type"),
    ]
    try await withStore { client, _ in
      for (body, status, parameter) in cases {
        let got = try await client.post("/v1/responses", body)
        #expect(got.status == status, "\(body.compactText): \(got.text)")
        #expect(got.parameter == parameter, "\(body.compactText): \(got.text)")
      }
      #expect(try await client.get("/v1/responses/resp_none").status == 404)
      #expect(try await client.get("/v1/responses/resp_none/input_items").status == 404)
      #expect(try await client.post("/v1/responses/resp_none/cancel", [:]).status == 404)
    }
    // A server without a store answers what needs none.
    try await withRoutes { client in
      let got = try await client.post("/v1/responses", ["input": "x"])
      #expect(got.status == 200)
      #expect(got.json["store"] == false)
      #expect(try await client.post("/v1/responses", ["input": "x", "store": true]).status == 400)
      #expect(try await client.get("/v1/responses/resp_none").status == 400)
      #expect(try await client.get("/v1/files").status == 400)
    }
  }

  @Test func whatHasNoEffectIsTakenAndShown() async throws {
    let service = FakeService()
    try await withStore(service) { client, _ in
      let got = try await client.post(
        "/v1/responses",
        [
          "input": "Hi", "include": ["reasoning.encrypted_content", "file_search_call.results"], "max_tool_calls": 3,
          "prompt_cache_key": "k", "prompt_cache_retention": "24h", "safety_identifier": "someone",
          "service_tier": "flex", "stream_options": ["include_obfuscation": false], "text": ["verbosity": "low"],
          "top_logprobs": 0, "background_options": ["completion_window": "2h"],
        ])
      #expect(got.status == 200, "\(got.text)")
      #expect(got.json["max_tool_calls"] == 3 && got.json["prompt_cache_key"] == "k")
      #expect(got.json["safety_identifier"] == "someone" && got.json["user"] == .null)
      #expect(got.json["service_tier"] == "default")
      #expect(got.json["text"] == ["verbosity": "low", "format": ["type": "text"]])
      #expect(promptText(service.requests.last).contains("<verbosity=\"low\">"))
    }
  }

  @Test func allowedToolsAreTheOnlyOnes() async throws {
    let other: JSONValue = ["type": "function", "name": "other", "parameters": ["type": "object"]]
    let service = FakeService(chatTemplate: qwenTemplate)
    try await withStore(service) { client, _ in
      func send(_ mode: JSONValue, _ names: [String]) async throws -> Answer {
        let tools = names.map { ["type": "function", "name": .string($0)] as JSONValue }
        return try await client.post(
          "/v1/responses",
          [
            "input": "Hi", "tools": [weather, other],
            "tool_choice": ["type": "allowed_tools", "mode": mode, "tools": .array(tools)],
          ])
      }
      #expect(try await send("auto", ["other"]).status == 200)
      #expect(
        promptText(service.requests.last).contains("other")
          && !promptText(service.requests.last).contains("get_weather"))
      #expect(service.requests.last?.sampling.grammar == nil)
      #expect(try await send("required", ["other"]).status == 200)
      #expect(service.requests.last?.sampling.grammar != nil)
      for (mode, names) in [("auto", []), ("auto", ["third"]), ("some", ["other"])] as [(JSONValue, [String])] {
        let got = try await send(mode, names)
        #expect(got.status == 400 && got.parameter == "tool_choice", "\(got.text)")
      }
    }
  }

  @Test func tokensOfTheInputAreCounted() async throws {
    try await withStore { client, _ in
      let body: JSONValue = ["input": "Hi", "instructions": "Be brief."]
      let first = try await client.post("/v1/responses", body)
      let count = try await client.post("/v1/responses/input_tokens", body)
      #expect(count.json["object"] == "response.input_tokens")
      #expect(count.json["input_tokens"] == first.json["usage"]?["input_tokens"])
      let next = try await client.post("/v1/responses/input_tokens", ["previous_response_id": first.json["id"]!])
      // "<user>Hi<assistant>", the answer and "<assistant>" once more, without the instructions.
      #expect(next.json["input_tokens"] == .int(Int64(19 + FakeService.answer.utf8.count + 11)))
      #expect(try await client.post("/v1/responses/input_tokens", [:]).parameter == "input")
      let compacted = try await client.post("/v1/responses/compact", ["input": "Hi"])
      #expect(compacted.status == 400 && compacted.error.contains("compact"))
    }
  }

  /// The text's tokens have log-probabilities; reasoning, calls and marks have none.
  @Test func logprobsOfTheText() async throws {
    let service = FakeService(.init(words: answer), chatTemplate: qwenTemplate)
    try await withStore(service) { client, _ in
      for body in [
        ["include": ["message.output_text.logprobs"]],
        ["include": ["message.output_text.logprobs"], "top_logprobs": 2],
      ] as [JSONValue] {
        let got = try await client.post("/v1/responses", with(["input": "Hi", "tools": [weather]], body))
        #expect(got.status == 200, "\(got.text)")
        let top = body["top_logprobs"]?.intValue ?? 0
        #expect(got.json["top_logprobs"]?.intValue == top)
        #expect(service.requests.last?.logprobs?.topCount == top)
        let entries = try #require(got.json["output"]?[1]?["content"]?[0]?["logprobs"]?.arrayValue)
        #expect(entries.map { $0["token"] } == ["Let me", " see."])
        #expect(entries.map { $0["logprob"]?.doubleValue } == [-3.5, -4])
        #expect(entries.allSatisfy { $0["top_logprobs"]?.arrayValue?.count == top })
        let streamed = try await client.post(
          "/v1/responses", with(with(["input": "Hi", "tools": [weather]], body), ["stream": true]))
        var pieces: [JSONValue] = []
        for event in streamed.text.components(separatedBy: "\n\n") where event.contains("output_text.delta") {
          let data = try JSONValue.parse(String(event.split(separator: "\n")[1].dropFirst("data: ".count)))
          pieces += data["logprobs"]?.arrayValue ?? []
        }
        #expect(pieces == entries)
      }
      #expect(try await client.post("/v1/responses", ["input": "Hi"]).json["top_logprobs"] == 0)
      #expect(service.requests.last?.logprobs == nil)
    }
  }

  /// Input and output items of earlier responses may be named instead of repeated.
  @Test func referencesToItems() async throws {
    let service = FakeService()
    try await withStore(service) { client, _ in
      let first = try await client.post("/v1/responses", ["input": "Weather?"])
      let output = try #require(first.json["output"]?[0]?["id"])
      let items = try await client.get("/v1/responses/\(first.json["id"]!.stringValue!)/input_items")
      let input = try #require(items.json["data"]?[0]?["id"])
      let second = try await client.post(
        "/v1/responses",
        ["input": [["id": input], ["type": "item_reference", "id": output], ["role": "user", "content": "More"]]])
      #expect(second.status == 200, "\(second.text)")
      #expect(
        service.messages.last == [
          ["role": "user", "content": "Weather?"], ["role": "assistant", "content": .string(FakeService.answer)],
          ["role": "user", "content": "More"],
        ])
      _ = try await client.send(.delete, "/v1/responses/\(first.json["id"]!.stringValue!)")
      // The second response keeps what it was given.
      let third = try await client.post("/v1/responses", ["input": [["type": "item_reference", "id": output]]])
      #expect(third.status == 200, "\(third.text)")
      _ = try await client.send(.delete, "/v1/responses/\(second.json["id"]!.stringValue!)")
      _ = try await client.send(.delete, "/v1/responses/\(third.json["id"]!.stringValue!)")
      let fourth = try await client.post("/v1/responses", ["input": [["type": "item_reference", "id": output]]])
      #expect(fourth.status == 404)
    }
  }

  @Test func streamsInTheBackground() async throws {
    let service = FakeService(.init(holdAfter: 2))
    try await withStore(service) { client, _ in
      let stream = Task {
        try await client.post("/v1/responses", ["input": "Hi", "background": true, "stream": true])
      }
      _ = try await until({ service.tokensRead }) { $0 == 2 }
      let id = service.requests[0].id.rawValue
      // Two readers join while it is being made, one after the third event.
      let follower = Task { try await client.get("/v1/responses/\(id)?stream=true&starting_after=2") }
      let other = Task { try await client.get("/v1/responses/\(id)?stream=true") }
      service.release()
      let whole = try await stream.value
      #expect(whole.status == 200, "\(whole.text)")
      #expect(whole.headers[.contentType] == "text/event-stream; charset=utf-8")
      let events = whole.text.components(separatedBy: "\n\n").filter { !$0.isEmpty }
      let types = events.map { $0.split(separator: "\n")[0].dropFirst("event: response.".count) }
      #expect(types.prefix(5) == ["created", "queued", "in_progress", "output_item.added", "content_part.added"])
      #expect(types.filter { $0 == "output_text.delta" }.count == FakeService.words.count)
      #expect(types.last == "completed")
      for (number, event) in events.enumerated() { #expect(event.contains("\"sequence_number\":\(number),")) }
      #expect(events[0].contains(#""status":"queued""#) && events[2].contains(#""status":"in_progress""#))
      #expect(try await follower.value.text == events.dropFirst(3).map { $0 + "\n\n" }.joined())
      #expect(try await other.value.text == whole.text)
      // Also once it has ended.
      #expect(try await client.get("/v1/responses/\(id)?stream=true").text == whole.text)
      let last = events.count - 1
      let tail = try await client.get("/v1/responses/\(id)?stream=true&starting_after=\(last - 1)")
      #expect(tail.text == events[last] + "\n\n")
      #expect(try await client.get("/v1/responses/\(id)?stream=true&starting_after=\(last)").text == "")
      for bad in ["\(last + 1)", "-2", "x"] {
        let got = try await client.get("/v1/responses/\(id)?stream=true&starting_after=\(bad)")
        #expect(got.status == 400 && got.parameter == "starting_after", "\(got.text)")
      }
      let stored = try await client.get("/v1/responses/\(id)")
      #expect(stored.json["status"] == "completed")
      #expect(events[last].hasSuffix("\"response\":" + stored.text + "}"))
      // Others have no events.
      for body in [["input": "Hi"], ["input": "Hi", "background": true]] as [JSONValue] {
        let plain = try await client.post("/v1/responses", body).json["id"]!.stringValue!
        let got = try await client.get("/v1/responses/\(plain)?stream=true")
        #expect(got.status == 400 && got.parameter == "stream")
      }
      _ = try await client.send(.delete, "/v1/responses/\(id)")
      #expect(try await client.get("/v1/responses/\(id)?stream=true").status == 404)
    }
  }

  @Test func cancellingEndsAStreamInTheBackground() async throws {
    let service = FakeService(.init(holdAfter: 2))
    try await withStore(service) { client, _ in
      let stream = Task {
        try await client.post("/v1/responses", ["input": "Hi", "background": true, "stream": true])
      }
      _ = try await until({ service.tokensRead }) { $0 == 2 }
      let id = service.requests[0].id.rawValue
      let cancelled = try await client.post("/v1/responses/\(id)/cancel", [:])
      #expect(cancelled.json["status"] == "cancelled" && cancelled.json["error"] == .null)
      let last = try #require(try await stream.value.text.components(separatedBy: "\n\n").last { !$0.isEmpty })
      #expect(last.hasPrefix("event: response.failed\n") && last.contains("\"response\":" + cancelled.text))
    }
  }
}
