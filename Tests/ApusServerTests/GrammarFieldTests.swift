import ApusCore
import Testing

/// What clients ask of a text reaches the service, under the names of both APIs.
@Suite struct GrammarFieldTests {
  private func grammar(_ path: String, _ body: JSONValue) async throws -> GrammarSpecification? {
    let service = FakeService()
    let answer = try await withRoutes(service) { try await $0.post(path, body) }
    #expect(answer.status == 200, "\(answer.text)")
    return service.requests.first?.sampling.grammar
  }

  @Test func responseFormats() async throws {
    func given(_ format: JSONValue) async throws -> GrammarSpecification? {
      let messages: JSONValue = [["role": "user", "content": "Hi"]]
      let chat = try await grammar("/v1/chat/completions", ["messages": messages, "response_format": format])
      let text = try await grammar("/v1/completions", ["prompt": "Hi", "response_format": format])
      #expect(chat == text)
      return chat
    }
    var strict = GrammarSpecification.SchemaOptions()
    strict.isStrict = true
    let schema: JSONValue = ["type": "integer"]
    #expect(try await given(["type": "text"]) == nil)
    #expect(try await given(["type": "json_object"]) == .jsonObject)
    #expect(
      try await given(["type": "json_schema", "json_schema": ["name": "x", "schema": schema]])
        == .jsonSchema(schema.compactText))
    #expect(
      try await given(["type": "json_schema", "json_schema": ["name": "x", "schema": schema, "strict": true]])
        == .jsonSchema(schema.compactText, strict))
    let tag: JSONValue = ["type": "structural_tag", "structures": [], "triggers": []]
    #expect(try await given(tag) == .structuralTag(tag.compactText))
  }

  @Test func nativeFields() async throws {
    func given(_ parameters: JSONValue) async throws -> GrammarSpecification? {
      try await grammar("/generate", ["text": "Hi", "sampling_params": parameters])
    }
    #expect(try await given([:]) == nil)
    #expect(try await given(["json_schema": "{}"]) == .jsonSchema("{}"))
    #expect(try await given(["regex": "a+"]) == .regex("a+"))
    #expect(try await given(["ebnf": "root ::= \"a\""]) == .ebnf("root ::= \"a\""))
    let two = try await withRoutes { client in
      try await client.post("/generate", ["text": "Hi", "sampling_params": ["regex": "a", "ebnf": "root ::= \"a\""]])
    }
    #expect(two.status == 400)
  }
}
