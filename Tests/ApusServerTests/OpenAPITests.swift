import ApusCore
import ApusServer
import HTTPTypes
import Testing

@Suite struct OpenAPITests {
  private func document(_ configuration: ServerConfiguration = testConfiguration()) async throws -> JSONValue {
    let headers: HTTPFields = configuration.apiKey.map { [.authorization: "Bearer \($0)"] } ?? [:]
    let answer = try await withRoutes(FakeService(), configuration) {
      try await $0.get("/openapi.json", headers: headers)
    }
    #expect(answer.status == 200 && answer.headers[.contentType] == "application/json")
    return answer.json
  }

  /// The schema of an endpoint's body, its reference followed.
  private func body(_ document: JSONValue, _ path: String) -> JSONValue? {
    let content = document["paths"]?[path]?["post"]?["requestBody"]?["content"]?["application/json"]
    guard let reference = content?["schema"]?["$ref"]?.stringValue?.split(separator: "/").last else {
      return JSONValue?.none
    }
    return document["components"]?["schemas"]?[String(reference)]
  }

  @Test func isAWholeDocument() async throws {
    let document = try await document()
    #expect(document["openapi"] == "3.1.0" && document["info"]?["title"] == "Apus")
    let paths = try #require(document["paths"]?.objectValue)
    for path in [
      "/v1/chat/completions", "/v1/completions", "/v1/models/{rest}", "/v1/messages", "/v1/messages/count_tokens",
      "/api/chat", "/api/generate", "/api/show", "/generate", "/v1/tokenize", "/abort_request", "/openapi.json",
    ] {
      #expect(paths[path] != nil, "\(path)")
    }
    var names: Set<String> = []
    for (path, item) in paths {
      for (method, operation) in item.objectValue ?? JSONObject() {
        let name = operation["operationId"]?.stringValue ?? ""
        #expect(names.insert(name).inserted, "\(method) \(path)")
        #expect(operation["responses"]?["200"] != nil && operation["responses"]?["default"] != nil)
        // What the path leaves open is a parameter.
        let parameters = operation["parameters"]?.arrayValue?.filter { $0["in"] == "path" } ?? []
        #expect(parameters.count == path.filter { $0 == "{" }.count, "\(method) \(path)")
      }
    }
    #expect(paths["/generate"]?.objectValue?["post"] != nil && paths["/generate"]?.objectValue?["put"] != nil)
    let errors = ["/v1/messages": "AnthropicError", "/api/chat": "OllamaError", "/generate": "Error"]
    for (path, name) in errors {
      let error = paths[path]?["post"]?["responses"]?["default"]?["content"]?["application/json"]?["schema"]
      #expect(error == ["$ref": .string("#/components/schemas/\(name)")])
    }
  }

  @Test func keysAreTold() async throws {
    let open = try await document()
    #expect(open["paths"]?["/generate"]?["post"]?["security"] == [])
    let guarded = try await document(testConfiguration { $0.apiKey = "k" })
    #expect(guarded["paths"]?["/generate"]?["post"]?["security"] == [["bearer": []], ["apiKey": []]])
    #expect(guarded["paths"]?["/health"]?["get"]?["security"] == [])
    let admin = try await document(testConfiguration { $0.adminKey = "k" })
    #expect(admin["paths"]?["/abort_request"]?["post"]?["security"]?.arrayValue?.count == 2)
    #expect(admin["paths"]?["/generate"]?["post"]?["security"] == [])
  }

  /// Every member that is documented is decoded, and with its type: a value of a type that its schema excludes is refused
  /// with the member's name.
  @Test(
    arguments: [
      "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens", "/api/chat",
      "/api/generate", "/api/show", "/generate", "/tokenize", "/detokenize", "/parse_function_call",
      "/separate_reasoning", "/abort_request", "/v1/responses", "/v1/responses/input_tokens", "/v1/conversations",
      "/v1/conversations/{id}", "/v1/conversations/{id}/items", "/v1/batches", "/v1/embeddings", "/v1/score",
      "/v1/rerank",
    ]) func documentedMembersAreDecoded(path: String) async throws
  {
    let schema = try #require(body(try await document(), path))
    let properties = try #require(schema["properties"]?.objectValue)
    #expect(!properties.isEmpty)
    // What must be there, so that nothing else is missed.
    let whole: JSONObject = JSONObject([
      ("messages", [["role": "user", "content": "Hi"]]), ("max_tokens", 5), ("prompt", "x"), ("text", "x"),
      ("input", "x"), ("input_file_id", "x"), ("endpoint", "/v1/completions"), ("completion_window", "24h"),
      ("query", "x"), ("documents", ["x"]), ("items", [["role": "user", "content": "Hi"]]), ("metadata", [:]),
    ])
    var base = JSONObject()
    // Not required where tokens are counted, but judged before what the chat API's reader judges.
    if path.hasPrefix("/v1/responses") { base["input"] = "x" }
    for name in schema["required"]?.arrayValue ?? [] {
      let name = try #require(name.stringValue)
      base[name] = try #require(whole[name] as JSONValue?)
    }
    try await withRoutes(FakeService(), testConfiguration { $0.adminKey = "k" }) { [base] client in
      for (name, property) in properties {
        let description = try #require(property["description"]?.stringValue)
        #expect(description.hasSuffix("."), "\(name)")
        let hasEffect = !["Ignored", "Has no effect"].contains { description.hasPrefix($0) }
        guard hasEffect, let type = property["type"]?.stringValue else { continue }
        var body = base
        body[name] = type == "string" || type == "object" || type == "null" ? 17 : "wrong"
        let answer = try await client.post(path, .object(body), headers: [.authorization: "Bearer k"])
        #expect(answer.status == 400, "\(name)")
        #expect(answer.text.contains(name), "\(name): \(answer.text)")
      }
      // What must be there is missed.
      for name in schema["required"]?.arrayValue ?? [] {
        let answer = try await client.post(path, [:], headers: [.authorization: "Bearer k"])
        #expect(answer.status == 400)
        #expect(name.stringValue.map(properties.keys.contains) == true)
      }
    }
  }

  /// Every route of the server is in the document, with words of its own, what is left open in its path, and a body where
  /// it takes one.
  @Test func everyRouteIsDescribed() async throws {
    let document = try await document()
    let server = try Server(service: FakeService(), configuration: testConfiguration(), logger: quietLogger)
    let endpoints = server.endpoints
    #expect(endpoints.count > 40)
    // Those that are told all they need by their path.
    let bodiless = ["/v1/responses/compact"]
    var found = 0
    for (method, path) in endpoints {
      let template = path.replacing("**", with: "{rest}")
      let operation = try #require(
        document["paths"]?[template]?[method.lowercased()], "\(method) \(path) is not in the document")
      found += 1
      #expect(operation["summary"]?.stringValue?.hasSuffix(".") == true, "\(method) \(path) is not described")
      #expect(operation["tags"]?.arrayValue?.count == 1)
      let isOrder = path.hasSuffix("/cancel") || operation["tags"] == ["Administration"]
      guard method == "POST", !isOrder, !bodiless.contains(path) else { continue }
      let content = operation["requestBody"]?["content"]?.objectValue
      let reference = content?.first(where: { _ in true })?.value["schema"]?["$ref"]?.stringValue?.split(separator: "/")
        .last
      let schema = document["components"]?["schemas"]?[String(reference ?? "")]
      #expect(schema?["properties"]?.objectValue?.isEmpty == false, "\(method) \(path) tells nothing of its body")
    }
    let operations = document["paths"]?.objectValue?.reduce(0) { sum, entry in
      sum + (entry.value.objectValue?.count ?? 0)
    }
    #expect(operations == found)
  }

  /// Bodies that the other tests send are in the document: what decodes them has no members of its own.
  @Test func decodedMembersAreDocumented() async throws {
    let document = try await document()
    let known: [(String, [String])] = [
      (
        "/v1/chat/completions",
        [
          "model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "temperature",
          "top_p",
          "n", "stop", "seed", "logprobs", "top_logprobs", "tools", "tool_choice", "response_format", "regex", "ebnf",
          "chat_template_kwargs", "cache_salt", "guided_choice",
        ]
      ), ("/v1/completions", ["prompt", "echo", "logprobs", "best_of", "suffix", "stop_regex"]),
      ("/generate", ["text", "input_ids", "sampling_params", "rid", "return_logprob", "token_ids_logprob"]),
      ("/v1/messages", ["max_tokens", "messages", "system", "tools", "tool_choice", "thinking", "stop_sequences"]),
      ("/api/chat", ["messages", "options", "format", "think", "keep_alive", "stream", "tools"]),
    ]
    for (path, names) in known {
      let properties = try #require(body(document, path)?["properties"]?.objectValue)
      for name in names { #expect(properties[name] != nil, "\(path): \(name)") }
    }
    let options = body(document, "/api/chat")?["properties"]?["options"]?["properties"]?.objectValue
    #expect(options?["num_predict"] != nil && options?["num_ctx"] != nil)
    #expect(body(document, "/v1/messages")?["required"] == ["messages", "max_tokens"])
  }
}
