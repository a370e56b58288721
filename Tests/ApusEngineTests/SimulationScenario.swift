import ApusCore
import ApusEngine
import ApusScheduling
import ApusTesting

/// A schedule of commands for one simulated run, drawn from a seed. Each seed switches features off at random, since a
/// mistake that needs two features together hides when all of them are always on.
struct Scenario {
  var configuration: SchedulerConfiguration
  var model: FakeModel
  var submissions: [Submission] = []
  /// Commands by the round in which they arrive, in order.
  var commands: [(round: Int, command: Command)] = []
  /// After how many tokens of a request its reader has enough.
  var enough: [UInt64: Int] = [:]
  var fails = false
  /// Some tokens are forced, as by grammars.
  var forces = false
  /// Some draws are put off, as behind slow masks.
  var postpones = false

  init(seed: UInt64) {
    var random = SeededGenerator(seed: seed)
    let pages = random.chance(0.7) ? Int.random(in: 4...24, using: &random) : Int.random(in: 64...160, using: &random)
    var configuration = SchedulerConfiguration(
      pageCount: pages, contextLength: Int.random(in: 40...400, using: &random))
    configuration.tokenBudget = random.chance(0.5) ? Int.random(in: 1...40, using: &random) : 512
    configuration.maxChunkTokens = random.chance(0.3) ? Int.random(in: 1...30, using: &random) : nil
    configuration.maxRunningRequests = random.chance(0.3) ? Int.random(in: 1...3, using: &random) : 16
    configuration.maxQueuedRequests = random.chance(0.2) ? Int.random(in: 1...3, using: &random) : 200
    configuration.policy = SchedulingPolicy.allCases.randomElement(using: &random) ?? .firstComeFirstServed
    configuration.conservativeness = random.chance(0.5) ? 0.05 : 1
    configuration.preemptionThreshold = Int.random(in: 1...10, using: &random)
    configuration.cachesPrefixes = random.chance(0.85)
    configuration.sharesPrefixesInBatch = random.chance(0.8)
    // Many requests that grow together in a pool that holds each of them, but not all: retraction upon retraction.
    let isCrowded = random.chance(0.3)
    if isCrowded {
      configuration.pageCount = Int.random(in: 16...40, using: &random)
      configuration.contextLength = configuration.pageCount * kvPageSize
      configuration.conservativeness = 0.05
      configuration.maxRunningRequests = 16
    }
    self.configuration = configuration
    model = FakeModel(vocabularySize: !isCrowded && random.chance(0.5) ? 20 : 1000)

    let sharesPrefixes = random.chance(0.8)
    let aborts = random.chance(0.5)
    let finishes = random.chance(0.4)
    let gates = random.chance(0.3)
    let salts = random.chance(0.3)
    let logprobs = random.chance(0.4)
    let flushes = random.chance(0.2)
    let stops = !isCrowded && random.chance(0.5)
    let longest = isCrowded ? 250 : random.chance(0.5) ? 150 : 40
    let drains = random.chance(0.1)
    fails = random.chance(0.1)
    forces = seed % 3 == 0
    postpones = seed % 5 < 2
    if seed % 4 < 2 { self.configuration.draftTokens = 1 + Int(seed / 4 % 12) }
    if seed % 8 == 1 { self.configuration.maxDraftingRequests = 100 }
    if seed % 4 == 1 { model = FakeModel(vocabularySize: 2) }

    // A small forest of common beginnings, some of which continue others.
    var stems: [[TokenID]] = [[]]
    for _ in 0..<4 {
      let base = stems.randomElement(using: &random) ?? []
      let length = Int.random(in: 0...80, using: &random)
      stems.append(base + (0..<length).map { _ in TokenID.random(in: 0..<20, using: &random) })
    }

    let count = Int.random(in: 1...30, using: &random)
    var round = 0
    for index in 0..<count {
      if random.chance(0.4) { round += Int.random(in: 0...12, using: &random) }
      let handle = UInt64(index + 1)
      var sampling = SamplingParameters()
      sampling.seed = UInt64.random(in: 0...3, using: &random)
      sampling.maxNewTokens = !isCrowded && random.chance(0.1) ? nil : Int.random(in: 0...longest, using: &random)
      sampling.stopTokenIDs = stops ? [3] : []
      sampling.ignoreEOS = random.chance(0.5)
      var tokens = sharesPrefixes ? stems.randomElement(using: &random) ?? [] : []
      let own = random.chance(0.1) ? Int.random(in: 0...600, using: &random) : Int.random(in: 0...40, using: &random)
      tokens += (0..<own).map { _ in TokenID.random(in: 0..<20, using: &random) }
      var options: LogprobOptions?
      if logprobs && random.chance(0.5) {
        options = LogprobOptions(
          topCount: 2, promptStart: random.chance(0.6) ? Int.random(in: 0...tokens.count, using: &random) : nil,
          tokenIDs: [5])
      }
      let isGated = gates && random.chance(0.4)
      let submission = Submission(
        handle: handle, tokens: tokens, sampling: sampling, eosTokenIDs: stops ? [7] : [], logprobs: options,
        priority: Int.random(in: 0...20, using: &random), cacheSalt: salts && random.chance(0.5) ? "other" : "",
        gate: isGated ? .closed : .open)
      submissions.append(submission)
      commands.append((round, .submit(submission)))
      if isGated { commands.append((round + Int.random(in: 0...10, using: &random), .open(handle: handle))) }
      if aborts && random.chance(0.4) {
        commands.append((round + Int.random(in: 0...60, using: &random), .abort(handle: handle, reason: "client")))
      }
      if finishes && random.chance(0.4) { enough[handle] = Int.random(in: 1...30, using: &random) }
      if flushes && random.chance(0.2) {
        commands.append((round, .flushCache(reply: handle)))
        if random.chance(0.5) { commands.append((round + 3, .cancelFlush(reply: handle))) }
      }
    }
    if aborts && random.chance(0.1) { commands.append((round + 5, .abortAll(reason: "client"))) }
    if drains { commands.append((Int.random(in: 0...round, using: &random), .drain(reply: 1))) }
    if random.chance(0.1) {
      commands.append((Int.random(in: 0...round + 40, using: &random), .shutdown(reason: "client")))
    }
    // Stable, so that a request is submitted before it is aborted.
    commands = commands.enumerated().sorted { ($0.element.round, $0.offset) < ($1.element.round, $1.offset) }
      .map(\.element)
  }
}

/// Hands out a scenario's commands round by round, together with what readers send on their own.
final class ScriptedSource: CommandSource {
  private var commands: ArraySlice<(round: Int, command: Command)>
  private var round = 0
  /// Commands that readers post while the run goes on.
  var posted: [Command] = []
  /// The loop asked to sleep and nothing will ever come.
  private(set) var isExhausted = false

  init(_ scenario: Scenario) { commands = scenario.commands[...] }

  func drain(into commands: inout [Command], wait: Bool) {
    round += 1
    swap(&commands, &posted)
    if wait && commands.isEmpty {
      if let next = self.commands.first {
        round = max(round, next.round)
      } else {
        isExhausted = true
        commands.append(.shutdown(reason: "the end"))
      }
    }
    while let next = self.commands.first, next.round <= round {
      commands.append(next.command)
      self.commands.removeFirst()
    }
  }
}

/// What became of one request.
struct Outcome: Equatable {
  var startedCount = 0
  var cachedTokens = 0
  var tokens: [TokenID] = []
  var logprobs: [PositionLogprobs] = []
  var promptLogprobs: [PositionLogprobs]?
  var reason: FinishReason?
  var error: EngineError?
  var retractions = 0
  var speculation: SpeculationCounts?
  /// Something arrived after the end, or out of order.
  var isMuddled = false

  var isEnded: Bool { reason != nil || error != nil }
}

/// Collects events, and plays the readers that have enough after some tokens.
final class Collector: EventSink {
  var outcomes: [UInt64: Outcome] = [:]
  var flushes: [UInt64: Int] = [:]
  var drainedCount = 0
  var statistics = ServiceStatistics()
  private let enough: [UInt64: Int]
  private let source: ScriptedSource

  init(_ scenario: Scenario, source: ScriptedSource) {
    enough = scenario.enough
    self.source = source
  }

  func publish(_ events: [Event]) {
    for event in events {
      switch event {
      case .started(let handle, let cachedTokens, let promptLogprobs):
        update(handle) {
          $0.isMuddled = $0.isMuddled || $0.startedCount > 0
          $0.startedCount += 1
          $0.cachedTokens = cachedTokens
          $0.promptLogprobs = promptLogprobs
        }
      case .token(let handle, let token, let logprobs):
        update(handle) {
          $0.isMuddled = $0.isMuddled || $0.startedCount == 0
          $0.tokens.append(token)
          if let logprobs { $0.logprobs.append(logprobs) }
        }
        if let limit = enough[handle], outcomes[handle]?.tokens.count == limit {
          source.posted.append(.finish(handle: handle, .stop(.text("enough"))))
        }
      case .finished(let handle, let reason, let retractions, let speculation):
        update(handle) {
          $0.reason = reason
          $0.retractions = retractions
          $0.speculation = speculation
        }
      case .rejected(let handle, let error):
        update(handle) {
          $0.isMuddled = $0.isMuddled || $0.startedCount > 0
          $0.error = error
        }
      case .flushed(let reply, _):
        flushes[reply, default: 0] += 1
      case .drained:
        drainedCount += 1
      }
    }
  }

  func report(_ statistics: ServiceStatistics) { self.statistics = statistics }

  private func update(_ handle: UInt64, _ change: (inout Outcome) -> Void) {
    var outcome = outcomes[handle] ?? Outcome()
    if outcome.isEnded { outcome.isMuddled = true }
    change(&outcome)
    outcomes[handle] = outcome
  }
}

/// A finished run.
struct Run {
  var outcomes: [UInt64: Outcome]
  var statistics: ServiceStatistics
  var violations: [String]
  var computedTokens: Int
  var flushes: [UInt64: Int]
  var drainedCount: Int
  var rounds: Int
}

/// Runs the real loop over the fake executor, checking the books after every round.
func simulate(_ scenario: Scenario, overlapped: Bool, checksInvariants: Bool = true) throws -> Run {
  let source = ScriptedSource(scenario)
  let sink = Collector(scenario, source: source)
  var executor = FakeExecutor(
    model: scenario.model, pageCount: scenario.configuration.pageCount,
    maxRunningRequests: scenario.configuration.maxRunningRequests)
  if scenario.fails {
    executor.failure = { $0.count % 29 == 0 && $0.count % 2 == 1 ? "logits are not numbers" : nil }
  }
  if scenario.forces {
    executor.forcedCount = { tokens in
      (tokens.count &* 7 &+ Int(tokens[tokens.count - 1])) % 5 == 0 ? 1 + tokens.count % 9 : 0
    }
  }
  if scenario.postpones {
    executor.postpones = { step, slot in (step &* 0x9E37_79B9_7F4A_7C15 ^ UInt64(slot)) >> 40 % 4 == 0 }
  }
  var loop = EngineLoop(
    source: source, sink: sink, runner: executor, scheduler: try Scheduler(scenario.configuration))
  var rounds = 0
  while overlapped ? loop.step() : loop.stepWithoutOverlap() {
    rounds += 1
    if checksInvariants { loop.scheduler.checkInvariants() }
    if rounds > 200_000 { break }
  }
  loop.scheduler.checkInvariants()
  return Run(
    outcomes: sink.outcomes, statistics: loop.scheduler.statistics, violations: loop.runner.violations,
    computedTokens: loop.runner.computedTokens, flushes: sink.flushes, drainedCount: sink.drainedCount,
    rounds: rounds)
}

/// What is wrong with a run, in sentences; empty if nothing is.
func faults(of run: Run, in scenario: Scenario) -> [String] {
  var faults = run.violations
  if run.rounds > 200_000 { faults.append("the run does not end") }
  if run.statistics.kvUsedTokens != 0 { faults.append("\(run.statistics.kvUsedTokens) tokens of K/V leaked") }
  if run.statistics.runningRequests + run.statistics.waitingRequests != 0 { faults.append("requests are left over") }
  var wasSubmitted: Set<UInt64> = []
  var isStopped = false
  for (_, command) in scenario.commands {
    if case .shutdown = command { isStopped = true }
    if case .submit(let submission) = command, !isStopped { wasSubmitted.insert(submission.handle) }
  }
  for submission in scenario.submissions {
    guard let outcome = run.outcomes[submission.handle] else {
      if wasSubmitted.contains(submission.handle) { faults.append("request \(submission.handle) was never answered") }
      continue
    }
    func fault(_ sentence: String) { faults.append("request \(submission.handle) \(sentence)") }
    if outcome.isMuddled { fault("got events out of order") }
    if !outcome.isEnded {
      fault("never ended")
      continue
    }
    if let error = outcome.error {
      if outcome.reason != nil { fault("ended twice") }
      let known: [EngineError.Code] = [.promptTooLong, .queueFull, .shuttingDown, .invalidRequest]
      if !known.contains(error.code) { fault("was rejected for \(error.code)") }
      continue
    }
    let capacity = scenario.configuration.pageCount * kvPageSize
    let contextLength = scenario.configuration.contextLength
    var reference = scenario.model.reference(submission, contextLength: contextLength, capacityTokens: capacity)
    if scenario.forces && outcome.tokens.count > reference.tokens.count && reference.reason == nil {
      // Forced tokens are known before there is room for their K/V, so the text may go a little past the pool's end.
      let longer = scenario.model.reference(submission, contextLength: contextLength, capacityTokens: capacity + 9)
      if longer.reason == outcome.reason {
        reference = longer
      } else if longer.tokens.starts(with: outcome.tokens) {
        reference.tokens = outcome.tokens
      }
    }
    switch outcome.reason {
    case .abort("client")?, .abort("logits are not numbers")?, .stop(.text("enough"))?:
      if !reference.tokens.starts(with: outcome.tokens) { fault("has wrong text before its early end") }
    case .abort(let reason)?:
      if reference.reason != nil { fault("was aborted: \(reason)") }
      // Forced tokens are not reported without their log-probabilities.
      let isWhole = reference.tokens == outcome.tokens
      if !isWhole, !scenario.forces || submission.logprobs == nil || !reference.tokens.starts(with: outcome.tokens) {
        fault("has wrong text before it filled the cache")
      }
    default:
      if reference.reason != outcome.reason {
        fault("ended by \(String(describing: outcome.reason)), not \(String(describing: reference.reason))")
      }
      if reference.tokens != outcome.tokens { fault("has wrong text") }
    }
    if outcome.startedCount > 0 {
      if outcome.promptLogprobs != scenario.model.promptLogprobs(submission) { fault("has wrong prompt logprobs") }
      let logprobs = submission.logprobs == nil ? [] : scenario.model.logprobs(submission, outputs: outcome.tokens)
      if outcome.logprobs != logprobs { fault("has wrong logprobs") }
      if outcome.cachedTokens >= submission.tokens.count { fault("computed nothing of its prompt") }
    }
  }
  for (reply, count) in run.flushes where count != 1 { faults.append("flush \(reply) was answered \(count) times") }
  return faults
}
