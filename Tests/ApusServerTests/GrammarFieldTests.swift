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
    #expect(try await given(["type": "json_schema", "schema": schema]) == .jsonSchema(schema.compactText))
    #expect(try await given(["type": "json_object", "schema": schema]) == .jsonSchema(schema.compactText))
    #expect(try await given(["type": "json_object", "schema": nil]) == .jsonObject)
    let tag: JSONValue = ["type": "structural_tag", "structures": [], "triggers": []]
    #expect(try await given(tag) == .structuralTag(tag.compactText))
  }

  @Test func structuredOutputs() async throws {
    func given(_ outputs: JSONValue) async throws -> GrammarSpecification? {
      let text = try await grammar("/v1/completions", ["prompt": "Hi", "structured_outputs": outputs])
      let messages: JSONValue = [["role": "user", "content": "Hi"]]
      #expect(
        try await grammar("/v1/chat/completions", ["messages": messages, "structured_outputs": outputs]) == text)
      return text
    }
    let schema: JSONValue = ["type": "integer"]
    #expect(try await given(nil) == nil)
    #expect(try await given(["json": nil, "json_object": false, "backend": "x"]) == nil)
    #expect(try await given(["json": schema]) == .jsonSchema(schema.compactText))
    #expect(try await given(["json": "{}"]) == .jsonSchema("{}"))
    #expect(try await given(["json_object": true]) == .jsonObject)
    #expect(try await given(["regex": "a+", "whitespace_pattern": " "]) == .regex("a+"))
    #expect(try await given(["choice": ["a", "b"]]) == .choices(["a", "b"]))
    #expect(try await given(["grammar": "root ::= \"a\""]) == .ebnf("root ::= \"a\""))
    for (outputs, parameter) in [
      (["choice": "a"], "structured_outputs.choice"), (["regex": 1], "structured_outputs.regex"),
      (["regex": "a", "json_object": true], "structured_outputs.json_object"), ("a", "structured_outputs"),
    ] as [(JSONValue, String)] {
      let answer = try await withRoutes { client in
        try await client.post("/v1/completions", ["prompt": "Hi", "structured_outputs": outputs])
      }
      #expect(answer.status == 400 && answer.parameter == parameter, "\(answer.text)")
    }
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
