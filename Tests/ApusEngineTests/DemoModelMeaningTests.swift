import Apus
import ApusCore
import ApusScheduling
import Foundation
import Testing

private let directory = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
  .appendingPathComponent("../../Models/apus-demo").standardizedFileURL.path

/// What constraints and the cache are for, on weights that understand what they are asked; tools and protocols are asked
/// through the server.
@Suite("What the demo model means", .serialized) struct DemoModelMeaningTests {
  private func configuration() -> EngineConfiguration {
    var configuration = EngineConfiguration(modelPath: directory)
    configuration.maxTotalTokens = 4096
    return configuration
  }

  private func tokens(_ messages: JSONValue, _ engine: Engine) throws -> [TokenID] {
    let text = try engine.renderChat(ChatPrompt(messages: messages, variables: ["enable_thinking": false]))
    return try engine.encode(text, addSpecialTokens: false)
  }

  private func request(
    _ prompt: [TokenID], schema: String? = nil, maximum: Int = 80,
    _ change: (inout SamplingParameters) -> Void = { _ in }
  ) -> Request {
    var sampling = SamplingParameters.greedy
    sampling.seed = 3
    sampling.maxNewTokens = maximum
    sampling.grammar = schema.map { .jsonSchema($0, .init()) }
    change(&sampling)
    return Request(prompt: .tokens(prompt), sampling: sampling)
  }

  /// Held-out questions of a kind.
  private func questions(_ skill: String, _ count: Int) throws -> [JSONValue] {
    let lines = try String(contentsOfFile: directory + "/evaluation.jsonl", encoding: .utf8).split(separator: "\n")
    let values = try lines.map { try JSONValue.parse(Array($0.utf8)) }
    return Array(values.filter { $0["skill"]?.stringValue == skill && $0["tools"]?.nonNull == nil }.prefix(count))
  }

  /// The schema of an answer: its keys and the types of its values.
  private func schema(of answer: JSONValue) -> String {
    var properties = JSONObject()
    var required: [JSONValue] = []
    for (key, value) in answer.objectValue ?? JSONObject() {
      required.append(.string(key))
      properties[key] =
        value.intValue != nil
        ? ["type": "integer"] : value.boolValue != nil ? ["type": "boolean"] : ["type": "string", "maxLength": 30]
    }
    let schema: JSONValue = [
      "type": "object", "properties": .object(properties), "required": .array(required), "additionalProperties": false,
    ]
    return schema.compactText
  }

  private static let house = "Jonas is 17 years old and lives in Birchley.\nReturn JSON with name, age and town."
  private static let houseSchema = """
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"},
     "town": {"type": "string", "maxLength": 20}}, "required": ["name", "age", "town"], "additionalProperties": false}
    """

  @Test("Held to a schema it extracts what the text says, and the keys cost no draws")
  func extraction() async throws {
    try await withEngine(configuration()) { engine in
      var right = 0
      let asked = try questions("extraction", 8)
      #expect(asked.count == 8)
      for question in asked {
        let answer = try JSONValue.parse(question["answer"]!.stringValue!)
        let prompt = try tokens(question["messages"]!, engine)
        let result = try await engine.generate(request(prompt, schema: schema(of: answer))).result()
        let value = try JSONValue.parse(result.text)
        #expect(value.objectValue?.keys == answer.objectValue?.keys, "\(result.text)")
        if value == answer { right += 1 }
      }
      #expect(right >= 6, "\(right) of 8 are right.")
      #expect(engine.statistics().forcedTokens > 60)
    }
  }

  /// The log-probabilities of a text's tokens, computed as those of a prompt.
  private func scores(_ prompt: [TokenID], _ outputs: [TokenID], _ engine: Engine) async throws -> [PositionLogprobs] {
    var request = request(prompt + outputs, maximum: 0)
    request.logprobs = LogprobOptions(topCount: 3, promptStart: prompt.count)
    return try await engine.generate(request).result().promptLogprobs ?? []
  }

  @Test("With log-probabilities the same text is forced, each token with the bits that it has in a prompt")
  func logprobsOfForcedTokens() async throws {
    var whole: [TokenID]?
    for (index, name) in ["overlapped", "plain, small chunks", "drafting"].enumerated() {
      var configuration = configuration()
      configuration.enablesOverlap = index != 1
      if index == 1 { configuration.tokenBudget = 3 }
      if index == 2 {
        configuration.speculativeDraftTokens = 3
        configuration.speculativeCosts = DraftCosts(row: 0.01, draft: 0)
      }
      try await withEngine(configuration) { engine in
        let prompt = try tokens([["role": "user", "content": .string(Self.house)]], engine)
        let plain = try await engine.generate(request(prompt, schema: Self.houseSchema)).result()
        #expect(plain.text == #"{"name": "Jonas", "age": 17, "town": "Birchley"}"#, "\(name)")
        if let whole { #expect(plain.tokens == whole, "\(name)") }
        whole = plain.tokens
        let expected = try await scores(prompt, plain.tokens, engine)
        #expect(expected.count == plain.tokens.count)
        let (before, stepsBefore) = (engine.statistics().forcedTokens, engine.statistics().steps)
        // Cut after every number of tokens: in the middle of forced text, too.
        for maximum in [80] + Array(1..<plain.tokens.count) where index != 1 || maximum % 3 == 2 {
          var asked = request(prompt, schema: Self.houseSchema, maximum: maximum)
          asked.logprobs = LogprobOptions(topCount: 3)
          let result = try await engine.generate(asked).result()
          let count = min(maximum, plain.tokens.count)
          #expect(result.tokens == Array(plain.tokens.prefix(count)), "\(name), \(maximum) tokens")
          #expect(result.logprobs == Array(expected.prefix(count)), "\(name), \(maximum) tokens")
          if maximum == 80 {
            #expect(result.finishReason == plain.finishReason)
            let after = engine.statistics()
            #expect(after.forcedTokens - before > 5, "\(name)")
            if index != 1 { #expect(after.steps - stepsBefore < plain.tokens.count, "\(name)") }
          } else {
            #expect(result.finishReason == .length)
          }
        }
        // A stop token within forced text ends the answer there.
        let stop = plain.tokens[3]
        let position = plain.tokens.firstIndex(of: stop)!
        var asked = request(prompt, schema: Self.houseSchema) { $0.stopTokenIDs = [stop] }
        asked.logprobs = LogprobOptions(topCount: 3)
        let stopped = try await engine.generate(asked).result()
        #expect(stopped.tokens == Array(plain.tokens[...position]) && stopped.finishReason == .stop(.token(stop)))
        #expect(stopped.logprobs == Array(expected[...position]))
        // A bias on what is forced changes nothing, and nothing is drawn for it.
        let forced = engine.statistics().forcedTokens
        let banned = request(prompt, schema: Self.houseSchema) {
          for token in plain.tokens.prefix(3) { $0.logitBias[token] = 5 }
        }
        let biased = try await engine.generate(banned).result()
        #expect(try JSONValue.parse(biased.text).objectValue?.keys == ["name", "age", "town"])
        #expect(engine.statistics().forcedTokens - forced > 5, "\(name)")
      }
    }
  }

  @Test(
    "In a conversation of several turns only what is new is computed, and the answers are right and the same to the bit"
  )
  func turns() async throws {
    let story = "Story: Victor is a baker. Victor owns a blue donkey. Jonas lives in Ashford. Jonas loves rice."
    let turns = [
      ("\(story)\nQuestion: What does Victor work as?", "baker"), ("In which town does Jonas live?", "Ashford"),
      ("What colour is the donkey?", "blue"),
    ]
    var answers: [[[PositionLogprobs]]] = []
    for caches in [true, false] {
      var configuration = configuration()
      configuration.enablesPrefixCache = caches
      try await withEngine(configuration) { engine in
        var messages: [JSONValue] = []
        var bits: [[PositionLogprobs]] = []
        var known = 0
        for (question, word) in turns {
          messages.append(["role": "user", "content": .string(question)])
          let prompt = try tokens(.array(messages), engine)
          var asked = request(prompt)
          asked.logprobs = LogprobOptions(topCount: 2)
          let result = try await engine.generate(asked).result()
          #expect(result.text.contains(word), "\(question) \(result.text)")
          // Whole pages of what came before, the mark that opens an answer aside.
          let cached = result.usage.cachedTokens
          if caches { #expect(cached >= (known - 16) / 16 * 16, "\(cached) of \(known)") } else { #expect(cached == 0) }
          known = prompt.count + result.tokens.count
          bits.append(result.logprobs)
          messages.append(["role": "assistant", "content": .string(result.text)])
        }
        answers.append(bits)
      }
    }
    #expect(answers[0] == answers[1])
  }
}
