import ApusCore
import ApusServer
import ApusStore
import HTTPTypes
import Testing

@Suite struct ConversationTests {
  private func message(_ text: String, _ role: String = "user") -> JSONValue {
    ["role": .string(role), "content": .string(text)]
  }

  /// The texts of a conversation's items, oldest first.
  @Sendable private func texts(_ client: RouteClient, _ id: String) async throws -> [String] {
    let listed = try await client.get("/v1/conversations/\(id)/items?order=asc&limit=100")
    return listed.json["data"]?.arrayValue?.compactMap { $0["content"]?[0]?["text"]?.stringValue } ?? []
  }

  @Test func objectsAreKeptChangedAndDeleted() async throws {
    try await withStore { client, _ in
      let made = try await client.post(
        "/v1/conversations", ["metadata": ["topic": "x"], "items": [message("Hello"), message("Hm", "assistant")]])
      #expect(made.status == 200, "\(made.text)")
      let id = try #require(made.json["id"]?.stringValue)
      #expect(id.hasPrefix("conv_") && made.json["object"] == "conversation")
      #expect(made.json["metadata"] == ["topic": "x"] && made.json["created_at"]?.intValue ?? 0 > 0)
      #expect(try await client.get("/v1/conversations/\(id)").text == made.text)
      let changed = try await client.post("/v1/conversations/\(id)", ["metadata": ["topic": "y"]])
      #expect(changed.json["metadata"] == ["topic": "y"])
      #expect(try await client.get("/v1/conversations/\(id)").text == changed.text)
      let added = try await client.post(
        "/v1/conversations/\(id)/items",
        ["items": [["type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"], message("More")]])
      #expect(added.json["object"] == "list" && added.json["data"]?.arrayValue?.count == 2)
      #expect(added.json["has_more"] == false && added.json["last_id"] == added.json["data"]?[1]?["id"])
      let newest = try await client.get("/v1/conversations/\(id)/items?limit=1")
      #expect(newest.json["data"] == [added.json["data"]![1]!] && newest.json["has_more"] == true)
      let after = try await client.get(
        "/v1/conversations/\(id)/items?limit=1&after=\(newest.json["last_id"]!.stringValue!)")
      #expect(after.json["data"]?[0]?["type"] == "function_call")
      #expect(try await texts(client, id) == ["Hello", "Hm", "More"])
      let item = try #require(added.json["data"]?[1]?["id"]?.stringValue)
      let got = try await client.get("/v1/conversations/\(id)/items/\(item)")
      #expect(got.json == added.json["data"]?[1] && got.json["status"] == "completed")
      let rest = try await client.send(.delete, "/v1/conversations/\(id)/items/\(item)")
      #expect(rest.json["object"] == "conversation" && rest.json["id"] == .string(id))
      #expect(try await client.get("/v1/conversations/\(id)/items/\(item)").status == 404)
      #expect(try await texts(client, id) == ["Hello", "Hm"])
      let deleted = try await client.send(.delete, "/v1/conversations/\(id)")
      #expect(deleted.json == ["id": .string(id), "object": "conversation.deleted", "deleted": true])
      #expect(try await client.get("/v1/conversations/\(id)").status == 404)
      // A conversation may begin with nothing, not even a body.
      #expect(try await client.send(.post, "/v1/conversations").json["metadata"] == [:])
    }
  }

  @Test func responsesTakeAndAddItems() async throws {
    let service = FakeService(.init(words: ["Fine", "."]))
    try await withStore(service) { client, _ in
      let id = try await client.post("/v1/conversations", ["items": [message("Hello")]]).json["id"]!
      let first = try await client.post("/v1/responses", ["input": "How are you?", "conversation": id])
      #expect(first.status == 200 && first.json["conversation"] == ["id": id], "\(first.text)")
      #expect(service.messages.last == [message("Hello"), message("How are you?")])
      let whole = ["Hello", "How are you?", "Fine."]
      #expect(try await texts(client, id.stringValue!) == whole)
      // Streamed, not kept by itself, and with the object form.
      let second = try await client.post(
        "/v1/responses", ["input": "And now?", "conversation": ["id": id], "stream": true, "store": false])
      #expect(second.status == 200)
      #expect(service.messages.last?.arrayValue?.compactMap { $0["content"]?.stringValue } == whole + ["And now?"])
      #expect(try await texts(client, id.stringValue!) == whole + ["And now?", "Fine."])
      // What was cut off is said all the same; what failed is not.
      _ = try await client.post("/v1/responses", ["input": "Cut", "conversation": id, "max_output_tokens": 1])
      #expect(try await texts(client, id.stringValue!).suffix(2) == ["Cut", "Fine"])
      let count = try await client.post("/v1/responses/input_tokens", ["conversation": id]).json["input_tokens"]
      #expect(count?.intValue ?? 0 > 50)
      // Items of a conversation can be referred to.
      let items = try await client.get("/v1/conversations/\(id.stringValue!)/items?order=asc")
      let hello = try #require(items.json["data"]?[0]?["id"])
      #expect(try await client.post("/v1/responses", ["input": [["id": hello]]]).status == 200)
      #expect(service.messages.last == [message("Hello")])
    }
  }

  @Test func failedResponsesAddNothing() async throws {
    let service = FakeService(.init(failure: (1, EngineError(.internalFailure, "It broke."))))
    try await withStore(service) { client, _ in
      let id = try await client.post("/v1/conversations", ["items": [message("Hello")]]).json["id"]!
      _ = try await client.post("/v1/responses", ["input": "Hi", "conversation": id, "stream": true])
      #expect(try await client.post("/v1/responses", ["input": "Hi", "conversation": id]).status == 500)
      #expect(try await texts(client, id.stringValue!) == ["Hello"])
    }
  }

  @Test func badRequests() async throws {
    let many = JSONValue.array((0..<21).map { _ in message("x") })
    let cases: [(String, JSONValue, Int, String?)] = [
      ("", ["items": "x"], 400, "items"), ("", ["items": many], 400, "items"),
      ("", ["items": [["role": "robot", "content": "x"]]], 400, "items[0].role"),
      ("", ["items": [["id": "none"]]], 404, "items[0].id"), ("", ["metadata": ["a": 1]], 400, "metadata.a"),
      ("/conv_none", [:], 400, "metadata"), ("/conv_none", ["metadata": [:]], 404, "conversation_id"),
      ("/conv_none/items", [:], 400, "items"), ("/conv_none/items", ["items": []], 404, "conversation_id"),
    ]
    try await withStore { client, _ in
      for (path, body, status, parameter) in cases {
        let got = try await client.post("/v1/conversations" + path, body)
        #expect(got.status == status && got.parameter == parameter, "\(path) \(body.compactText): \(got.text)")
      }
      for path in ["/conv_none", "/conv_none/items", "/conv_none/items/msg_none"] {
        #expect(try await client.get("/v1/conversations" + path).status == 404)
      }
      #expect(try await client.send(.delete, "/v1/conversations/conv_none").status == 404)
    }
    try await withRoutes { client in
      let made = try await client.post("/v1/conversations", [:])
      #expect(made.status == 400)
      let answered = try await client.post("/v1/responses", ["input": "x", "conversation": "c"])
      #expect(answered.status == 400)
    }
  }

  @Test func theStoreKeepsItsLimits() async throws {
    var limits = StoreLimits.inMemory
    limits.conversations = 2
    limits.conversationBytes = 100
    let store = try Store(limits: limits)
    func item(_ id: String, _ size: Int) -> StoredItem { StoredItem(id: id, object: Array(repeating: 32, count: size)) }
    func insert(_ id: String, _ items: [StoredItem]) async throws(EngineError) {
      try await store.insert(StoredConversation(id: id, created: 1, metadata: []), items)
    }
    func add(_ id: String, _ items: [StoredItem]) async throws(EngineError) {
      try await store.add(ConversationTurn(conversation: id, items: items))
    }
    func code(_ body: () async throws -> Void) async -> EngineError.Code? {
      do {
        try await body()
        return nil
      } catch {
        return (error as? EngineError)?.code
      }
    }
    try await insert("a", [item("1", 40), item("2", 20)])
    let refusal1 = await code { try await insert("b", [item("3", 50)]) }
    #expect(refusal1 == .outOfMemory)
    #expect(try await store.conversation("b") == nil)
    try await insert("b", [])
    let refusal2 = await code { try await insert("c", []) }
    #expect(refusal2 == .outOfMemory)
    let refusal3 = await code { try await add("c", []) }
    #expect(refusal3 == .notFound)
    try await add("b", [item("3", 40)])
    let refusal4 = await code { try await add("b", [item("4", 1)]) }
    #expect(refusal4 == .outOfMemory)
    // An item that is there stays as it is; deleting makes room.
    #expect(try await store.deleteItem("2", ofConversation: "a"))
    #expect(try await store.deleteItem("2", ofConversation: "a") == false)
    try await add("b", [item("3", 10), item("5", 10)])
    let kept = try await store.items(ofConversation: "b", StorePage(limit: 9, isAscending: true), byteLimit: .max)
    #expect(kept == [item("3", 40), item("5", 10)])
    #expect(try await store.items(ofConversation: "b", StorePage(limit: 9), byteLimit: 5).map(\.id) == ["5"])
    #expect(try await store.deleteConversation("b"))
    try await insert("d", [item("3", 60)])
    #expect(try await store.item("1") == item("1", 40).object)
    #expect(try await store.item("5") == nil)
  }
}
