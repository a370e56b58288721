import ApusCore
import ApusExecution
import ApusModels
import ApusScheduling
import ApusTensors
import Testing

/// Real small checkpoints through `ModelRunner`, against greedy continuations computed in float32 elsewhere.
struct CheckpointModelTests {
  /// Directory, golden file, and the cases to compare. Case 0 of the second model holds a near-tie of 3e-6.
  static let models = [
    (directory: "models/stories260K/hf", golden: "models/stories260K/golden_greedy.json", cases: 0..<4),
    (directory: "models/infinitensor-story", golden: "models/infinitensor-story/golden_greedy.json", cases: 1..<4),
  ]

  @Test(
    .enabled(if: Paths.dataHas("models/stories260K/hf")),
    arguments: models.indices, ["alone", "whole prompts together", "random chunks, company and pages", "chunks of 7"])
  func greedyContinuations(model index: Int, how: String) throws {
    let entry = Self.models[index]
    let cases = try Paths.json("\(Paths.data)/\(entry.golden)")["cases"]!.arrayValue!
    let requests = entry.cases.map { number in
      DriverRequest(
        prompt: cases[number]["prompt_ids"]!.tokenIDs, newTokens: cases[number]["greedy_ids"]!.arrayValue!.count)
    }
    // The plain loops take their time with the larger model; one way of feeding it is enough there.
    let backends = testBackends.filter { !($0 is ReferenceBackend) || (index == 0 && how != "alone") }
    for backend in backends {
      var options = ModelOptions(path: "\(Paths.data)/\(entry.directory)")
      options.maxTokensPerStep = 256
      options.maxRunningRequests = 40
      options.kvCacheBytes = 64 << 20
      let loaded = try ModelLoader.load(options, backend: backend)
      #expect(loaded.description.dtype == "float32" && loaded.description.kvDtype == "float32")
      #expect(loaded.description.eosTokenIDs == [2])

      let found: [DriverOutput]
      switch how {
      case "alone":
        found = requests.map { request in
          var driver = Driver(
            model: loaded, generator: SeededGenerator(seed: 3), overlap: false, largestChunk: 256, isRandom: false)
          return driver.run([request])[0]
        }
      case "whole prompts together":
        var driver = Driver(
          model: loaded, generator: SeededGenerator(seed: 4), largestChunk: 256, isRandom: false)
        found = driver.run(requests)
      case "chunks of 7":
        var driver = Driver(model: loaded, generator: SeededGenerator(seed: 5), largestChunk: 7, isRandom: false)
        found = driver.run(requests)
      default:
        // 32 others with random prompts and random draws.
        var generator = SeededGenerator(seed: 6)
        var all = requests
        for _ in 0..<(backend is ReferenceBackend ? 4 : 32) {
          var request = DriverRequest(
            prompt: (0..<Int.random(in: 1...60, using: &generator)).map { _ in .random(in: 3..<500, using: &generator)
            },
            newTokens: .random(in: 1...80, using: &generator))
          request.sampling = SamplingParameters()
          request.sampling.seed = generator.next()
          all.append(request)
        }
        var driver = Driver(model: loaded, generator: SeededGenerator(seed: 7))
        found = driver.run(all)
      }
      for (number, output) in zip(entry.cases, found) {
        #expect(
          output.tokens == cases[number]["greedy_ids"]!.tokenIDs, "case \(number) \(how) on \(backend.name)")
        #expect(output.failure == nil)
      }
    }
  }

  @Test(.enabled(if: Paths.dataHas("models/stories260K/hf")))
  func firstLogits() throws {
    let cases = try Paths.json("\(Paths.data)/models/stories260K/golden_greedy.json")["cases"]!.arrayValue!
    for backend in testBackends {
      var options = ModelOptions(path: "\(Paths.data)/models/stories260K/hf")
      options.kvCacheBytes = 1 << 20
      let loaded = try ModelLoader.load(options, backend: backend)
      for entry in cases {
        let prompt = entry["prompt_ids"]!.tokenIDs
        let wanted = entry["first_logits"]!.floats
        let found = try loaded.steps.promptLogits(prompt, positions: [prompt.count - 1])[0]
        let difference = zip(found, wanted).reduce(0) { max($0, abs($1.0 - $1.1)) }
        #expect(difference < 1e-3, "off by \(difference) on \(backend.name)")
      }
    }
  }

  @Test(.enabled(if: Paths.dataHas("models/stories260K/hf")))
  func progressEndsAtTheTotal() throws {
    var options = ModelOptions(path: "\(Paths.data)/models/stories260K/hf")
    options.kvCacheBytes = 1 << 20
    var reports: [(done: Int, total: Int)] = []
    _ = try ModelLoader.load(options, backend: testBackends[0]) { reports.append(($0, $1)) }
    #expect(reports.count > 10)
    #expect(zip(reports, reports.dropFirst()).allSatisfy { $0.done <= $1.done && $0.total == $1.total })
    // The header is the only part of the file that is not a weight.
    #expect(reports.last!.done > reports.last!.total * 9 / 10 && reports.last!.done <= reports.last!.total)
  }
}
