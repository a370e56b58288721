import ApusCore
import ApusEngine
import ApusServer
import Foundation
import HummingbirdTesting
import Testing

private let models = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
  .appendingPathComponent("../../../shared/data/models").standardizedFileURL.path

private let haveModels: Bool = {
  let found = FileManager.default.fileExists(atPath: models + "/stories260K/hf/config.json")
  if !found { print("Golden tests of /generate are skipped: there is no ../shared/data/models beside the project.") }
  return found
}()

/// Greedy continuations of an independent implementation come back through `/generate`.
@Suite(.serialized, .enabled(if: haveModels)) struct GoldenGenerateTests {
  @Test(arguments: [("stories260K", "stories260K/hf", 0), ("infinitensor-story", "infinitensor-story", 1)])
  func greedyIDs(golden: String, checkpoint: String, skipped: Int) async throws {
    let data = try Data(contentsOf: URL(fileURLWithPath: "\(models)/\(golden)/golden_greedy.json"))
    // The first case of infinitensor-story has a near-tie of 3e-6.
    let cases = try JSONValue.parse([UInt8](data))["cases"]!.arrayValue!.dropFirst(skipped)
    let engine = try await Engine.start(EngineConfiguration(modelPath: "\(models)/\(checkpoint)"))
    let server = try Server(service: engine, configuration: testConfiguration(), logger: quietLogger)
    try await server.makeApplication().test(.router) { client in
      let routes = RouteClient(client: client)
      func check(_ entry: JSONValue) async throws {
        let body: JSONValue = [
          "input_ids": entry["prompt_ids"]!,
          "sampling_params": ["temperature": 0, "max_new_tokens": 200, "ignore_eos": true],
        ]
        let answer = try await routes.post("/generate", body)
        #expect(answer.status == 200)
        #expect(answer.json["output_ids"] == entry["greedy_ids"])
        #expect(answer.json["meta_info"]?["finish_reason"]?["type"]?.stringValue == "length")
      }
      for entry in cases {
        try await check(entry)
        try await check(entry)
      }
      try await withThrowingTaskGroup(of: Void.self) { group in
        for seed in 0..<32 {
          let noise: JSONValue = [
            "text": "Once", "sampling_params": ["max_new_tokens": 120, "sampling_seed": .int(Int64(seed))],
          ]
          group.addTask { _ = try await routes.post("/generate", noise) }
        }
        for entry in cases { group.addTask { try await check(entry) } }
        try await group.waitForAll()
      }
    }
    await engine.shutdown()
  }
}
