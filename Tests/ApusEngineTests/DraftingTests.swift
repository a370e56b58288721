import ApusCore
import ApusEngine
import ApusExecution
import ApusModels
import ApusScheduling
import ApusTensors
import ApusTesting
import Foundation
import Testing

/// The real loop, scheduler, runner and drafters over tiny models with random weights: what comes out is what plain decoding
/// gives, to the bit, whoever drafts and whatever else is asked for.
@Suite(.serialized) struct DraftingTests {
  /// A vocabulary so small that drafts are right now and then even where nothing was learnt.
  private static let vocabulary = 24

  private static func configuration(latent: Bool, layers: Int = 2) -> JSONObject {
    var config = JSONObject([
      ("architectures", ["LlamaForCausalLM"]), ("hidden_size", 16), ("intermediate_size", 24),
      ("num_hidden_layers", .int(Int64(layers))), ("num_attention_heads", 2), ("num_key_value_heads", 2),
      ("vocab_size", .int(Int64(vocabulary))), ("max_position_embeddings", 1024), ("initializer_range", 0.25),
    ])
    if latent {
      for (key, value) in [
        ("architectures", ["DeepseekV3ForCausalLM"]), ("q_lora_rank", 8), ("kv_lora_rank", 8), ("qk_nope_head_dim", 6),
        ("qk_rope_head_dim", 4), ("v_head_dim", 6), ("first_k_dense_replace", 1), ("n_routed_experts", 4),
        ("num_experts_per_tok", 2), ("n_group", 2), ("topk_group", 1), ("n_shared_experts", 1),
        ("moe_intermediate_size", 8),
      ] as [(String, JSONValue)] { config[key] = value }
    }
    return config
  }

  enum Drafter: String, CaseIterable {
    case ngram, prediction, model, eagle, predictionTree, modelTree, eagleTree

    var isTree: Bool { rawValue.hasSuffix("Tree") }
  }

  /// A model that lasts for many scenarios, which it does not know of each other.
  private static func load(_ drafter: Drafter?, latent: Bool) throws -> LoadedModel {
    var options = ModelOptions(path: "")
    options.loadFormat = .dummy(seed: 3)
    options.maxTokensPerStep = 640
    options.maxRunningRequests = 16
    options.kvCacheTokens = 200 * kvPageSize
    if drafter?.isTree == true { options.draftTree = DraftTreeShape(width: 4, tokens: 10) }
    switch drafter {
    case nil: break
    case .ngram: options.drafting = .ngram(capacity: 500)
    case .prediction, .predictionTree: options.drafting = .prediction
    case .model, .eagle, .modelTree, .eagleTree:
      // The first of the target's layers and its output layer: it often knows what the target will say. Or a head that knows
      // two thirds of the vocabulary.
      let folder = FileManager.default.temporaryDirectory.appendingPathComponent("apus-draft-\(UUID())").path
      try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
      defer { try? FileManager.default.removeItem(atPath: folder) }
      var members = configuration(latent: latent, layers: 1)
      if drafter == .eagle || drafter == .eagleTree {
        members["architectures"] = ["LlamaForCausalLMEagle3"]
        members["draft_vocab_size"] = 16
        members["eagle_aux_hidden_state_layer_ids"] = [0, 1]
      }
      let json = JSONValue.object(members)
      var writer = JSONWriter()
      writer.value(json)
      try Data(writer.bytes).write(to: URL(fileURLWithPath: folder + "/config.json"))
      options.drafting =
        drafter == .model || drafter == .modelTree ? .model(path: folder) : .eagle(path: folder, isThird: true)
      return try load(options, latent: latent)
    }
    return try load(options, latent: latent)
  }

  private static func load(_ options: ModelOptions, latent: Bool) throws -> LoadedModel {
    let configuration = try ModelConfiguration(json: .object(configuration(latent: latent)))
    return try ModelLoader.load(
      configuration, store: DummyWeights(seed: 3, initializerRange: configuration.initializerRange), options: options,
      backend: CPUBackend(threads: 1))
  }

  /// A simulated day with sampling, penalties, biases and constraints.
  private static func scenario(_ seed: UInt64) -> Scenario {
    var scenario = Scenario(seed: seed)
    scenario.configuration.pageCount = min(scenario.configuration.pageCount, 200)
    var random = SeededGenerator(seed: seed &* 77)
    let constrains = random.chance(0.5)
    func change(_ submission: inout Submission) {
      var random = SeededGenerator(seed: seed &* 1000 &+ submission.handle)
      submission.sampling.temperature = random.chance(0.4) ? 0 : Float.random(in: 0.3...1.2, using: &random)
      if random.chance(0.2) { submission.sampling.topP = 0.9 }
      if random.chance(0.2) { submission.sampling.topK = 5 }
      if random.chance(0.2) { submission.sampling.minP = 0.05 }
      if random.chance(0.2) { submission.sampling.repetitionPenalty = 1.3 }
      if random.chance(0.2) { submission.sampling.frequencyPenalty = 0.3 }
      if random.chance(0.2) { submission.sampling.logitBias = [1: 1.5, 2: -100] }
      if random.chance(0.2) { submission.sampling.minNewTokens = 10 }
      // Texts that repeat themselves.
      if random.chance(0.5) {
        let stem = submission.tokens.suffix(7)
        submission.tokens += stem + stem
      }
      if constrains && random.chance(0.6) { submission.constraint = PairConstraint(vocabulary: vocabulary) }
    }
    for index in scenario.submissions.indices { change(&scenario.submissions[index]) }
    for index in scenario.commands.indices {
      if case .submit(var submission) = scenario.commands[index].command {
        change(&submission)
        scenario.commands[index].command = .submit(submission)
      }
    }
    return scenario
  }

  private static func run(_ scenario: Scenario, _ model: LoadedModel, overlapped: Bool) throws -> Run {
    let source = ScriptedSource(scenario)
    let sink = Collector(scenario, source: source)
    var loop = EngineLoop(
      source: source, sink: sink, runner: model.makeRunner(), scheduler: try Scheduler(scenario.configuration))
    var rounds = 0
    while overlapped ? loop.step() : loop.stepWithoutOverlap() {
      rounds += 1
      if rounds % 7 == 0 { loop.scheduler.checkInvariants() }
      if rounds > 100_000 { break }
    }
    loop.scheduler.checkInvariants()
    return Run(
      outcomes: sink.outcomes, statistics: loop.scheduler.statistics, violations: [], computedTokens: 0,
      flushes: sink.flushes, drainedCount: sink.drainedCount, rounds: rounds)
  }

  /// How two outcomes of one request differ that must agree, ends that depend on the moment apart.
  private static func difference(_ plain: Outcome, _ drafted: Outcome) -> String? {
    if plain.error != nil || drafted.error != nil { return nil }
    func isTimed(_ outcome: Outcome) -> Bool {
      switch outcome.reason {
      case .abort?, .stop(.text("enough"))?: true
      default: false
      }
    }
    let count = min(plain.tokens.count, drafted.tokens.count)
    if plain.tokens.prefix(count) != drafted.tokens.prefix(count) { return "text" }
    if plain.logprobs.prefix(count) != drafted.logprobs.prefix(count) { return "log-probabilities" }
    if !isTimed(plain) && !isTimed(drafted) {
      if plain.tokens.count != drafted.tokens.count { return "length" }
      if plain.reason != drafted.reason { return "end" }
      if plain.promptLogprobs != drafted.promptLogprobs { return "prompt log-probabilities" }
    }
    return drafted.isMuddled ? "order of events" : nil
  }

  /// For longer hunts, set `APUS_DRAFTING_SEEDS`.
  static let seedCount =
    ProcessInfo.processInfo.environment["APUS_DRAFTING_SEEDS"].flatMap { UInt64($0) } ?? 30

  @Test(arguments: Drafter.allCases)
  func outputIsThatOfPlainDecoding(drafter: Drafter) throws {
    let latent = drafter == .prediction || drafter == .predictionTree
    let plain = try Self.load(nil, latent: latent)
    let drafting = try Self.load(drafter, latent: latent)
    var counts = SpeculationCounts()
    var compared = 0
    var forced = 0
    var retracted = 0
    for seed in 1...Self.seedCount {
      var scenario = Self.scenario(seed)
      scenario.configuration.draftTokens = 0
      let expected = try Self.run(scenario, plain, overlapped: seed % 2 == 0)
      scenario.configuration.draftTokens = 1 + Int(seed % 7)
      // Cheap drafts: all chances are taken.
      scenario.configuration.draftCosts = DraftCosts(row: 0.01, draft: 0)
      scenario.configuration.maxDraftingRequests = seed % 3 == 0 ? 2 : 32
      let run = try Self.run(scenario, drafting, overlapped: seed % 3 == 0)
      var sum = SpeculationCounts()
      for submission in scenario.submissions {
        guard let one = expected.outcomes[submission.handle], let other = run.outcomes[submission.handle] else {
          continue
        }
        let difference = Self.difference(one, other)
        #expect(difference == nil, "\(drafter), seed \(seed), request \(submission.handle): another \(difference!)")
        sum = sum + (other.speculation ?? SpeculationCounts())
        compared += min(one.tokens.count, other.tokens.count)
        retracted += min(1, other.retractions)
      }
      #expect(sum == run.statistics.speculation, "seed \(seed)")
      #expect(run.statistics.kvUsedTokens == 0)
      counts = counts + sum
      forced += run.statistics.forcedTokens
    }
    #expect(compared > 100 * Int(Self.seedCount) && retracted > 0 && forced > 0)
    #expect(counts.acceptedTokens > 30 && counts.draftTokens > counts.acceptedTokens + 100, "\(drafter): \(counts)")
    if drafter.isTree {
      let trees = drafting.steps.treeCounts
      #expect(trees.verified > 100 && trees.moved > 30, "\(drafter): \(trees)")
    }
  }

  /// Pearson's test of the third token of 4000 sampled answers against its exact distribution, at a level of 0.001. The seeds
  /// of the draws are 1 to 4000.
  @Test(arguments: [Drafter.model, .modelTree, .ngram])
  func samplesHaveTheExactDistribution(drafter: Drafter) throws {
    let model = try Self.load(drafter, latent: false)
    let prompt: [TokenID] = [1, 5, 9, 2, 1, 5, 9, 2, 1, 5]
    // The exact distribution, over all beginnings.
    var exact = [Double](repeating: 0, count: Self.vocabulary)
    func probabilities(_ tokens: [TokenID]) throws -> [Double] {
      let logits = try model.steps.promptLogits(tokens, positions: [tokens.count - 1])[0]
      let powers = logits.map { exp(Double($0)) }
      let sum = powers.reduce(0, +)
      return powers.map { $0 / sum }
    }
    for (first, share) in try probabilities(prompt).enumerated() {
      for (second, next) in try probabilities(prompt + [TokenID(first)]).enumerated() {
        for (token, last) in try probabilities(prompt + [TokenID(first), TokenID(second)]).enumerated() {
          exact[token] += share * next * last
        }
      }
    }
    var scenario = Scenario(seed: 2)
    scenario.configuration = SchedulerConfiguration(pageCount: 200, contextLength: 64)
    scenario.configuration.maxRunningRequests = 16
    scenario.configuration.maxQueuedRequests = 5000
    scenario.configuration.draftTokens = 4
    scenario.configuration.draftCosts = DraftCosts(row: 0.01, draft: 0)
    let samples = 4000
    scenario.submissions = (1...UInt64(samples)).map { seed in
      var sampling = SamplingParameters()
      sampling.seed = seed
      sampling.maxNewTokens = 5
      sampling.ignoreEOS = true
      return Submission(handle: seed, tokens: prompt, sampling: sampling)
    }
    // A few at a time: drafts are for quiet moments.
    scenario.commands = scenario.submissions.enumerated().map { ($0.offset / 16 * 40, .submit($0.element)) }
    scenario.enough = [:]
    let run = try Self.run(scenario, model, overlapped: true)
    var found = [Int](repeating: 0, count: Self.vocabulary)
    for outcome in run.outcomes.values { found[Int(outcome.tokens[2])] += 1 }
    #expect(
      found.reduce(0, +) == samples && run.statistics.acceptedDraftTokens > samples / 200,
      "\(run.statistics.speculation)")
    func statistic(_ distribution: [Double]) -> Double {
      zip(found, distribution).reduce(0) { sum, pair in
        let expected = pair.1 * Double(samples)
        return sum + (Double(pair.0) - expected) * (Double(pair.0) - expected) / expected
      }
    }
    #expect(exact.allSatisfy { $0 * Double(samples) >= 5 })
    // The 0.999 quantile of chi square with 23 degrees of freedom.
    #expect(statistic(exact) < 49.73, "\(statistic(exact))")
    // The test can fail: it tells the distribution from one that is off by a fifth.
    let other = exact.enumerated().map { $0.element * ($0.offset % 2 == 0 ? 1.2 : 0.8) }
    let sum = other.reduce(0, +)
    #expect(statistic(other.map { $0 / sum }) > 49.73)
  }
}

/// Allows some tokens after each token, and forces some.
private final class PairConstraint: TokenConstraint {
  private let vocabulary: Int
  init(vocabulary: Int) { self.vocabulary = vocabulary }
  func makeTokenMatcher() -> any TokenMatcher { Matcher(vocabulary: vocabulary, last: 0) }

  final class Matcher: TokenMatcher {
    private let vocabulary: Int
    private var last: TokenID

    init(vocabulary: Int, last: TokenID) {
      self.vocabulary = vocabulary
      self.last = last
    }

    var maskWordCount: Int { (vocabulary + 31) / 32 }
    var isTerminated: Bool { false }
    var failure: EngineError? { nil }

    private func allows(_ token: TokenID) -> Bool { (token &* 5 &+ last &* 3) % 4 != 1 }

    func fillMask(into mask: UnsafeMutablePointer<UInt32>) {
      for word in 0..<maskWordCount { mask[word] = 0 }
      for token in 0..<TokenID(vocabulary) where allows(token) { mask[Int(token >> 5)] |= 1 << UInt32(token & 31) }
    }

    func accept(_ token: TokenID) -> Bool {
      guard allows(token) else { return false }
      last = token
      return true
    }

    func takeForcedTokens() -> [TokenID] {
      guard last % 6 == 5 else { return [] }
      let forced = (0..<TokenID(vocabulary)).first { allows($0) }!
      last = forced
      return [forced]
    }

    func fork() -> (any TokenMatcher)? { Matcher(vocabulary: vocabulary, last: last) }
  }
}

/// The parts that look things up and those that decide how much.
@Suite struct DraftPartTests {
  @Test func longerRunsAndNewerPlacesWin() {
    var index = NgramIndex()
    let tokens: [TokenID] = [1, 2, 3, 4, 5, 6, 9, 4, 5, 7, 1, 2, 3, 4, 5]
    // Five tokens lead to the 6; the newest place of the last two would lead to the 7.
    #expect(index.propose(after: tokens, limit: 3) == ([6, 9, 4], 5))
    var other = NgramIndex()
    #expect(other.propose(after: Array(tokens.dropFirst(3)), limit: 3) == ([7, 1, 2], 2))
    var repeating = NgramIndex()
    #expect(repeating.propose(after: [8, 9, 8, 9], limit: 5) == ([8, 9, 8, 9, 8], 2))
    #expect(repeating.propose(after: [8, 9, 8, 9, 3], limit: 5) == ([], 0))
    #expect(repeating.propose(after: [8, 9, 8, 9, 3], limit: 0) == ([], 0))
  }

  @Test func pastOutputsAreFoundAndForgotten() {
    let store = NgramStore(capacity: 100)
    let (salt, other) = (NgramStore.hash(""), NgramStore.hash("tenant"))
    let output: [TokenID] = Array(10..<30)
    store.add(output[...], salt: salt)
    #expect(store.propose(after: [1, 14, 15, 16], longerThan: 0, salt: salt, limit: 4) == [17, 18, 19, 20])
    #expect(store.propose(after: [14, 15, 16], longerThan: 3, salt: salt, limit: 4) == [])
    #expect(store.propose(after: [25, 26, 27], longerThan: 0, salt: salt, limit: 9) == [28, 29])
    #expect(store.propose(after: [14, 15, 16], longerThan: 0, salt: other, limit: 4) == [])
    // What was overwritten is not found, and does not pile up.
    var random = SeededGenerator(seed: 4)
    for _ in 0..<200 {
      let text = (0..<50).map { _ in TokenID.random(in: 1000..<2000, using: &random) }
      store.add(text[...], salt: salt)
      #expect(store.runCount <= 4 * 100 + 2 * 50)
    }
    #expect(store.propose(after: [14, 15, 16], longerThan: 0, salt: salt, limit: 4) == [])
    // Longer than the whole store.
    store.add((0..<1000).map { TokenID($0) }[...], salt: salt)
    #expect(store.propose(after: [50, 51, 52], longerThan: 0, salt: salt, limit: 2) == [53, 54])
    let none = NgramStore(capacity: 0)
    none.add(output[...], salt: salt)
    #expect(none.propose(after: [14, 15, 16], longerThan: 0, salt: salt, limit: 4) == [])
  }

  @Test func aLoadedServerDraftsNothing() {
    // A row costs a fifth of a step, drafting it a tenth.
    let costs = DraftCosts(row: 0.2, draft: 0.1)
    var length: [Int: Int] = [:]
    for requests in [1, 2, 4, 8, 16, 64, 256] {
      var pace = DraftPace()
      for _ in 0..<50 { pace.note(accepted: 3, of: 3) }
      length[requests] = pace.next(costs: costs, requests: requests)
    }
    #expect(length[1] == 64 && length[2]! > 20)
    // Past 8 requests, 1.5 times a row's cost is not repaid by a certain token.
    #expect(length[16] == 0 && length[64] == 0 && length[256] == 0, "\(length)")
    #expect(DraftCosts(row: 1, draft: 0).leastChance(requests: 1) == 1)
  }

  @Test func wrongDraftsAreTriedEverMoreRarely() {
    let costs = DraftCosts(row: 0.2, draft: 0)
    var pace = DraftPace()
    var tries: [Int] = []
    for token in 0..<300 {
      let count = pace.next(costs: costs, requests: 1)
      if count > 0 {
        tries.append(token)
        pace.note(accepted: 0, of: count)
      }
    }
    #expect(tries.count < 25 && tries.last! > 200, "\(tries)")
    // It recovers as soon as they are right.
    for _ in 0..<100 where pace.chance < 0.5 {
      let count = pace.next(costs: costs, requests: 1)
      if count > 0 { pace.note(accepted: count, of: count) }
    }
    #expect(pace.next(costs: costs, requests: 1) > 1)
  }
}
