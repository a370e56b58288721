import Apus
import ApusCore
import ApusScheduling
import Foundation
import Testing

private let directory = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
  .appendingPathComponent("../../Models/apus-demo-moe").standardizedFileURL.path

/// What the demo mixture of experts was trained to show: answers, drafts that are often right, skewed loads.
@Suite("Demo mixture of experts", .serialized) struct MixtureModelTests {
  /// The first held-out questions of a kind, as messages.
  private func questions(_ skill: String, _ count: Int) throws -> [JSONValue] {
    let lines = try String(contentsOfFile: directory + "/evaluation.jsonl", encoding: .utf8).split(separator: "\n")
    let values = try lines.map { try JSONValue.parse(Array($0.utf8)) }
    return Array(values.filter { $0["skill"]?.stringValue?.hasPrefix(skill) ?? false }.prefix(count))
  }

  private func ask(_ question: JSONValue, _ engine: Engine) async throws -> [TokenID] {
    var variables: [String: JSONValue] = [:]
    if let thinks = question["enable_thinking"]?.nonNull { variables["enable_thinking"] = thinks }
    let text = try engine.renderChat(
      ChatPrompt(messages: question["messages"]!, tools: question["tools"]?.nonNull, variables: variables))
    var sampling = SamplingParameters.greedy
    sampling.maxNewTokens = 200
    let prompt = Request.Prompt.tokens(try engine.encode(text, addSpecialTokens: false))
    return try await engine.generate(Request(prompt: prompt, sampling: sampling)).result().tokens
  }

  private func configuration() -> EngineConfiguration {
    var configuration = EngineConfiguration(modelPath: directory)
    configuration.maxTotalTokens = 4096
    return configuration
  }

  @Test("It adds and copies out of a text into JSON")
  func answers() async throws {
    try await withEngine(configuration()) { engine in
      for (question, words) in [
        ("What is 89 + 35?", ["124"]),
        ("Story: Victor is a baker. Victor owns a blue donkey.\nQuestion: What does Victor work as?", ["baker"]),
      ] {
        let tokens = try await ask(["messages": [["role": "user", "content": .string(question)]]], engine)
        let text = try engine.decode(tokens, skipSpecialTokens: true)
        #expect(words.allSatisfy(text.contains), "\(question) \(text)")
      }
    }
  }

  @Test("Its prediction layer's first token is right six times in ten on held-out chat, and no token changes")
  func drafts() async throws {
    let asked = try ["story", "extraction", "addition_thinking", "list_copy"].flatMap { try questions($0, 6) }
    #expect(asked.count >= 18)
    var plain: [[TokenID]] = []
    try await withEngine(configuration()) { engine in
      for question in asked { plain.append(try await ask(question, engine)) }
    }
    var drafting = configuration()
    drafting.speculativeAlgorithm = .nextn
    drafting.speculativeDraftTokens = 1
    drafting.speculativeCosts = DraftCosts(row: 0.02, draft: 0)
    try await withEngine(drafting) { engine in
      for (question, expected) in zip(asked, plain) {
        let tokens = try await ask(question, engine)
        #expect(tokens == expected)
      }
      let counts = engine.statistics().speculation
      #expect(counts.draftTokens > 150, "\(counts)")
      #expect(counts.acceptRate >= 0.6, "\(counts)")
    }
  }

  @Test("Trees of its prediction layer bring at least as many tokens per verification as chains, and no token changes")
  func draftTrees() async throws {
    let asked = try ["story", "extraction", "list_copy"].flatMap { try questions($0, 3) }
    var lengths: [Double] = []
    var answers: [[[TokenID]]] = []
    for width in [1, 4] {
      var drafting = configuration()
      drafting.speculativeAlgorithm = .nextn
      drafting.speculativeDraftTokens = 3
      drafting.speculativeTopK = width
      drafting.speculativeTreeTokens = 12
      drafting.speculativeCosts = DraftCosts(row: 0.02, draft: 0)
      try await withEngine(drafting) { engine in
        var texts: [[TokenID]] = []
        for question in asked { texts.append(try await ask(question, engine)) }
        answers.append(texts)
        let counts = engine.statistics().speculation
        #expect(counts.verifications > 30, "\(counts)")
        lengths.append(counts.acceptLength)
      }
    }
    #expect(answers[0] == answers[1])
    #expect(lengths[1] >= lengths[0], "\(lengths)")
    print("Tokens per verification: \(lengths[0]) with chains, \(lengths[1]) with trees.")
  }

  @Test("Where packed weights are kept and where experts lie is what the model is told")
  func optionsOfWeights() async throws {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent("apus-packed-\(UUID())").path
    defer { try? FileManager.default.removeItem(atPath: folder) }
    var kept = configuration()
    kept.packedCache = .directory(folder)
    for start in ["Packed weights were written to \(folder)/", "Packed weights were mapped from \(folder)/"] {
      try await withEngine(kept) { engine in
        #expect(engine.report.contains { $0.hasPrefix(start) }, "\(engine.report)")
      }
    }
    for (quantization, outputLayer, format) in [
      (nil, .auto, "bfloat16"), (nil, .int8, "int8"), (.int4, .auto, "int8"), (.int4, .dense, "bfloat16"),
    ] as [(EngineConfiguration.Quantization?, EngineConfiguration.OutputLayerQuantization, String)] {
      var chosen = configuration()
      (chosen.quantization, chosen.outputLayerQuantization) = (quantization, outputLayer)
      try await withEngine(chosen) { engine in
        #expect(engine.report[0].contains(", output layer \(format) ("), "\(engine.report)")
      }
    }
    // A dense model has nothing to place.
    var dense = configuration()
    dense.modelPath = directory.replacingOccurrences(of: "apus-demo-moe", with: "apus-demo")
    dense.redundantExperts = 2
    do {
      try await withEngine(dense) { _ in }
      Issue.record("replicas of experts in a model without any")
    } catch let error as EngineError {
      #expect(error.parameter == "ep_num_redundant_experts")
    }
    dense.redundantExperts = 0
    dense.expertLocationPath = folder
    do {
      try await withEngine(dense) { _ in }
      Issue.record("places of experts in a model without any")
    } catch let error as EngineError {
      #expect(error.parameter == "init_expert_location")
    }
  }

  @Test("On questions of one kind the busiest expert of every layer has more than twice the mean's tokens")
  func loads() async throws {
    var recording = configuration()
    recording.expertRecorderMode = .stat
    let asked = try questions("addition_thinking", 8)
    #expect(!asked.isEmpty)
    try await withEngine(recording) { engine in
      let recorder = try #require(engine.expertLoads)
      recorder.start()
      for question in asked { _ = try await ask(question, engine) }
      recorder.stop()
      let counts = recorder.dump()["logical_count"]?.arrayValue ?? []
      let loads = counts.map { ($0.arrayValue ?? []).compactMap(\.intValue) }.filter { $0.contains { $0 > 0 } }
      #expect(loads.count == 5)
      for load in loads {
        #expect(load.count == 32)
        #expect(load.max()! * load.count > 2 * load.reduce(0, +), "\(load)")
      }
    }
  }
}
