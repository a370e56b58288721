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
  _ service: FakeService = FakeService(), _ store: Store? = nil,
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

private func with(_ body: JSONValue, _ members: JSONValue) -> JSONValue {
  var object = body.objectValue!
  for (key, value) in members.objectValue! { object[key] = value }
  return .object(object)
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
private let qwen = "<tool_call> <think>"
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
      + #"","background":false,"completed_at":"# + completed + #","error":"# + error + #","incomplete_details":"#
      + incomplete + #","instructions":null,"max_output_tokens":null,"model":"fake/model","output":"# + output
      + #","parallel_tool_calls":true,"previous_response_id":null,"reasoning":{"effort":null,"summary":null},"#
      + #""store":true,"temperature":1.0,"text":{"format":{"type":"text"}},"tool_choice":"auto","tools":"# + tools
      + #","top_p":1.0,"truncation":"disabled","usage":"# + usage + #","user":null,"metadata":{}}"#
  }

  @Test func streamTranscript() async throws {
    let service = FakeService(.init(words: answer), chatTemplate: qwen)
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
    let service = FakeService(.init(words: answer), chatTemplate: qwen)
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
            ["id": id, "type": "function", "function": ["name": "get_weather", "arguments": ["city": "Zürich"]]]
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
        object: Array(#"{"id":"resp_1","status":"in_progress","error":null}"#.utf8)))
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
      (["input": "x", "background": true, "stream": true], 400, "stream"),
      (["input": "x", "background": true, "store": false], 400, "background"),
      (["input": "x", "metadata": ["a": 1]], 400, "metadata.a"),
      (["input": "x", "metadata": [1]], 400, "metadata"),
      (["input": "x", "conversation": "c"], 400, "conversation"),
      (["input": "x", "tools": [["type": "web_search"]]], 400, "tools[0].type"),
      (["input": "x", "tools": [["type": "function"]]], 400, "tools[0].name"),
      (["input": "x", "tool_choice": "required"], 400, "tool_choice"),
      (["input": "x", "text": ["format": ["type": "xml"]]], 400, "text.format.type"),
      (["input": "x", "text": ["format": ["type": "json_schema", "name": "n"]]], 400, "text.format.schema"),
      (["input": "x", "include": ["message.output_text.logprobs"]], 400, "include"),
      (["input": [["role": "user"]]], 400, "input[0].content"),
      (["input": [["role": "robot", "content": "x"]]], 400, "input[0].role"),
      (["input": [["role": "user", "content": [["type": "input_image"]]]]], 400, "input[0].content[0]"),
      (["input": [["type": "function_call", "name": "f", "arguments": "{}"]]], 400, "input[0].call_id"),
      (["input": [["type": "item_reference", "id": "x"]]], 400, "input[0].type"),
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
}
