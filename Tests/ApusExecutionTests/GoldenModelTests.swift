import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import Foundation
import Testing

/// Tiny random models against Hugging Face transformers (Scripts/golden_models.py).
struct GoldenModelTests {
  static let names: [String] = {
    let files = (try? FileManager.default.contentsOfDirectory(atPath: Paths.goldens)) ?? []
    return files.filter { $0.hasSuffix(".json") }.map { String($0.dropLast(5)) }.sorted()
  }()

  private func load(_ golden: JSONValue, _ backend: any Backend) throws -> LoadedModel {
    let configuration = try ModelConfiguration(json: golden["config"]!)
    var options = ModelOptions(path: "")
    options.contextLength = golden["context_length"]?.intValue
    options.maxTokensPerStep = 128
    options.maxRunningRequests = 4
    options.kvCacheBytes = 8 << 20
    return try ModelLoader.load(
      configuration,
      store: DummyWeights(
        seed: UInt64(golden["seed"]!.intValue!), initializerRange: configuration.initializerRange),
      options: options, backend: backend)
  }

  @Test func goldensAreThere() { #expect(Self.names.count >= 22) }

  @Test(arguments: names)
  func logitsEqualTransformers(name: String) throws {
    let golden = try Paths.json("\(Paths.goldens)/\(name).json")
    for backend in testBackends {
      let model = try load(golden, backend)
      let positions = golden["positions"]!.arrayValue!.map { $0.intValue! }
      let expected = golden["logits"]!.arrayValue!.map(\.floats)
      let found = try model.steps.promptLogits(golden["prompt"]!.tokenIDs, positions: positions)
      for (row, wanted) in zip(found, expected) {
        let largest = wanted.reduce(0) { max($0, abs($1)) }
        let difference = zip(row, wanted).reduce(0) { max($0, abs($1.0 - $1.1)) }
        #expect(difference <= 1e-4 * largest, "\(name) on \(backend.name): off by \(difference) of \(largest)")
      }
    }
  }

  @Test(arguments: names)
  func greedyContinuationEqualsTransformers(name: String) throws {
    let golden = try Paths.json("\(Paths.goldens)/\(name).json")
    let expected = golden["greedy"]!.tokenIDs
    if expected.isEmpty { return }
    for backend in testBackends {
      var driver = Driver(model: try load(golden, backend), generator: SeededGenerator(seed: 1), isRandom: false)
      let output = driver.run([DriverRequest(prompt: golden["prompt"]!.tokenIDs, newTokens: expected.count)])
      #expect(output[0].tokens == expected, "\(name) on \(backend.name)")
    }
  }
}
