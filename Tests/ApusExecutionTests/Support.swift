import ApusCore
import ApusExecution
import ApusModels
import ApusScheduling
import ApusTensors
import Foundation

/// Where this package and the shared test data lie.
enum Paths {
  static let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent().path
  static let goldens = root + "/Tests/ApusExecutionTests/Goldens"
  /// `../shared/data` beside the package, or where APUS_SHARED_DATA says.
  static let data = ProcessInfo.processInfo.environment["APUS_SHARED_DATA"] ?? root + "/../shared/data"

  static func exists(_ path: String) -> Bool { FileManager.default.fileExists(atPath: path) }

  /// Whether shared data is there; prints a sentence where it is not.
  static func dataHas(_ path: String) -> Bool {
    if exists(data + "/" + path) { return true }
    print("Skipped: \(data)/\(path) does not exist.")
    return false
  }

  static func json(_ path: String) throws -> JSONValue {
    try JSONValue.parse([UInt8](Data(contentsOf: URL(fileURLWithPath: path))))
  }
}

/// A seeded generator: the splitmix64 sequence.
struct SeededGenerator: RandomNumberGenerator {
  private var state: UInt64
  init(seed: UInt64) { state = seed }

  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
    return z ^ z >> 31
  }
}

extension JSONValue {
  var tokenIDs: [TokenID] { (arrayValue ?? []).map { TokenID($0.intValue!) } }
  var floats: [Float] { (arrayValue ?? []).map { Float($0.doubleValue!) } }
}

/// The backends that every model test runs on.
let testBackends: [any Backend] = {
  var backends: [any Backend] = [ReferenceBackend()]
  // Every level of instructions that this machine has, with different numbers of threads.
  for (index, level) in InstructionSet.allCases.enumerated() {
    if let backend = try? CPUBackend(threads: 1 + index % 3, isa: level) { backends.append(backend) }
  }
  return backends
}()

/// A tiny model with random weights.
func makeTinyModel(
  _ changes: [String: JSONValue] = [:], seed: UInt64 = 1, backend: any Backend = testBackends.last!,
  store: (any WeightStore)? = nil, _ configure: (inout ModelOptions) -> Void = { _ in }
) throws -> LoadedModel {
  var config = JSONObject([
    ("architectures", ["LlamaForCausalLM"]), ("hidden_size", 32), ("intermediate_size", 56),
    ("num_hidden_layers", 2), ("num_attention_heads", 4), ("num_key_value_heads", 2), ("vocab_size", 61),
    ("max_position_embeddings", 256), ("initializer_range", 0.2),
  ])
  for (key, value) in changes { config[key] = value }
  let configuration = try ModelConfiguration(json: .object(config))
  var options = ModelOptions(path: "")
  options.maxTokensPerStep = 64
  options.maxRunningRequests = 8
  options.kvCacheBytes = 4 << 20
  configure(&options)
  return try ModelLoader.load(
    configuration, store: store ?? DummyWeights(seed: seed, initializerRange: configuration.initializerRange),
    options: options, backend: backend)
}

/// A request as the driver below sees it.
struct DriverRequest {
  var prompt: [TokenID]
  var sampling = SamplingParameters.greedy
  var logprobs: LogprobOptions?
  var stopTokenIDs: [TokenID] = []
  var newTokens: Int
  /// Tokens that count as output although they are given: a request that comes back after a retraction.
  var givenOutput: [TokenID] = []
  /// What limits the outputs.
  var constraint: (any TokenConstraint)?
}

/// What the driver collected for a request.
struct DriverOutput: Equatable {
  var tokens: [TokenID] = []
  var logprobs: [PositionLogprobs] = []
  var promptLogprobs: [Int: PositionLogprobs] = [:]
  var failure: String?
  /// Draws that were put off to a later step, which changes nothing else.
  var postponed = 0

  static func == (left: DriverOutput, right: DriverOutput) -> Bool {
    left.tokens == right.tokens && left.logprobs == right.logprobs && left.promptLogprobs == right.promptLogprobs
      && left.failure == right.failure
  }
}

/// A small scheduler without policy: random chunks, random pages, random company, optionally with one step of overlap so
/// that the input of a step is still in flight when it is launched.
struct Driver {
  let model: LoadedModel
  var generator: SeededGenerator
  var overlap = true
  /// The most prompt tokens computed at once.
  var largestChunk = 64
  /// Whether requests enter at random times and sit out steps at random.
  var isRandom = true

  private struct Progress {
    var slot: Int32
    var pages: [Int32]
    var computed = 0
    /// Tokens whose number is known to exist, drawn or in flight.
    var launchedOutputs = 0
    var known: [TokenID]
    var entered = false
    var left = false
  }

  mutating func run(_ requests: [DriverRequest]) -> [DriverOutput] {
    let runner = model.makeRunner()
    var freePages = (0..<Int32(model.description.kvPageCount)).shuffled(using: &generator)
    var freeSlots = (0..<Int32(model.description.maxRunningRequests)).shuffled(using: &generator)
    var outputs = requests.map { _ in DriverOutput() }
    var progress: [Progress?] = requests.map { _ in nil }
    var released: [Int32] = []
    var inFlight: [[(request: Int, start: Int, count: Int)]] = []
    var result = StepResult()

    func collect() {
      let shares = inFlight.removeFirst()
      let members = shares.map(\.request)
      result.removeAll()
      runner.wait(into: &result)
      var next = 0
      for (index, request) in members.enumerated() where result.tokenCounts[index] == 1 {
        outputs[request].tokens.append(result.tokens[next])
        progress[request]!.known.append(result.tokens[next])
        next += 1
      }
      var offsets: [Int] = []
      for (index, request) in members.enumerated() where result.tokenCounts[index] == 1 { offsets.append(request) }
      for index in result.postponed {
        // The last token is computed again; what is in flight behind it is void.
        let request = members[index]
        progress[request]!.computed = shares[index].start + shares[index].count - 1
        progress[request]!.launchedOutputs =
          progress[request]!.known.count - requests[request].prompt.count - requests[request].givenOutput.count
        outputs[request].postponed += 1
      }
      for entry in result.logprobs { outputs[offsets[entry.index]].logprobs.append(entry.values) }
      for entry in result.promptLogprobs {
        outputs[members[entry.request]].promptLogprobs[entry.position] = entry.values
      }
      for entry in result.failures { outputs[members[entry.request]].failure = entry.reason }
    }

    func isFinished(_ index: Int) -> Bool {
      guard let state = progress[index] else { return false }
      return state.launchedOutputs >= requests[index].newTokens
    }

    while true {
      var batch = ScheduleBatch()
      batch.released = released
      released = []
      var members: [(request: Int, start: Int, count: Int)] = []
      var budget = model.description.maxTokensPerStep
      for index in requests.indices.shuffled(using: &generator) {
        if isFinished(index) || budget == 0 { continue }
        if isRandom && Int.random(in: 0..<4, using: &generator) == 0 { continue }
        let request = requests[index]
        if progress[index] == nil {
          let length = request.prompt.count + request.givenOutput.count + request.newTokens
          let pageCount = (length + kvPageSize - 1) / kvPageSize
          guard !freeSlots.isEmpty, freePages.count >= pageCount else { continue }
          let state = Progress(
            slot: freeSlots.removeLast(), pages: Array(freePages.suffix(pageCount)),
            known: request.prompt + request.givenOutput)
          freePages.removeLast(pageCount)
          progress[index] = state
          batch.assigned.append(
            SlotAssignment(
              slot: state.slot, sampling: request.sampling, stopTokenIDs: request.stopTokenIDs,
              logprobs: request.logprobs, tokens: state.known, promptCount: request.prompt.count,
              constraint: request.constraint))
        }
        var state = progress[index]!
        let given = request.prompt.count + request.givenOutput.count
        let total = given + state.launchedOutputs
        let limit = min(total - state.computed, largestChunk, budget)
        let count = isRandom && total - state.computed > 1 ? Int.random(in: 1...limit, using: &generator) : limit
        let end = state.computed + count
        let tokens = (state.computed..<end).map { $0 < state.known.count ? state.known[$0] : -1 }
        let samples = end == total
        let start = request.logprobs?.promptStart
        batch.requests.append(
          ScheduledRequest(
            slot: state.slot, start: Int32(state.computed), count: Int32(count),
            tokenOffset: Int32(batch.tokens.count), pageOffset: Int32(batch.pages.count),
            pageCount: Int32(state.pages.count), lastTokenIsInFlight: tokens.last == -1, samples: samples,
            promptLogprobStart: start.map { Int32(max($0 - 1, 0)) } ?? .max,
            promptLogprobEnd: start.map { _ in Int32(request.prompt.count - 1) } ?? .max))
        batch.tokens += tokens
        batch.pages += state.pages
        members.append((index, state.computed, count))
        state.computed = end
        if samples { state.launchedOutputs += 1 }
        budget -= count
        progress[index] = state
      }
      if members.isEmpty {
        if requests.indices.allSatisfy(isFinished) && inFlight.isEmpty { break }
        if inFlight.isEmpty && released.isEmpty && batch.assigned.isEmpty && batch.released.isEmpty {
          // An unlucky draw left everybody out.
          continue
        }
      }
      runner.launch(batch)
      inFlight.append(members)
      if inFlight.count > (overlap ? 1 : 0) { collect() }
      // With nothing left to launch, drain what is in flight.
      if requests.indices.allSatisfy(isFinished) { while !inFlight.isEmpty { collect() } }
      for index in requests.indices {
        guard let state = progress[index], isFinished(index), !state.left,
          !inFlight.contains(where: { $0.contains { $0.request == index } })
        else { continue }
        progress[index]!.left = true
        released.append(state.slot)
        freeSlots.insert(state.slot, at: 0)
        freePages.insert(contentsOf: state.pages, at: 0)
      }
    }
    return outputs
  }
}
