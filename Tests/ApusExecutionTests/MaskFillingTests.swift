import ApusCore
import ApusExecution
import ApusScheduling
import ApusTensors
import Foundation
import Synchronization
import Testing

/// Allows tokens by a hash of the outputs so far. What happens while a mask is filled is the test's to say.
private final class HashedConstraint: TokenConstraint {
  let vocabulary: Int
  let salt: UInt64
  let whileFilling: @Sendable (_ outputs: Int) -> Void

  init(vocabulary: Int, salt: UInt64, whileFilling: @escaping @Sendable (Int) -> Void = { _ in }) {
    self.vocabulary = vocabulary
    self.salt = salt
    self.whileFilling = whileFilling
  }

  func makeTokenMatcher() -> any TokenMatcher { HashedMatcher(self) }

  static func mask(_ outputs: [TokenID], salt: UInt64, vocabulary: Int) -> [UInt32] {
    var hash = salt
    for token in outputs { hash = (hash ^ UInt64(token)) &* 0x9E37_79B9_7F4A_7C15 ^ hash >> 29 }
    var generator = SeededGenerator(seed: hash)
    var words = (0..<(vocabulary + 31) / 32).map { _ in UInt32.random(in: 0...UInt32.max, using: &generator) }
    words[0] |= 1
    return words
  }
}

private final class HashedMatcher: TokenMatcher {
  private let constraint: HashedConstraint
  private var outputs: [TokenID] = []
  private(set) var failure: EngineError?

  init(_ constraint: HashedConstraint) { self.constraint = constraint }

  var maskWordCount: Int { (constraint.vocabulary + 31) / 32 }
  var isTerminated: Bool { false }

  func fillMask(into mask: UnsafeMutablePointer<UInt32>) {
    constraint.whileFilling(outputs.count)
    let words = HashedConstraint.mask(outputs, salt: constraint.salt, vocabulary: constraint.vocabulary)
    mask.update(from: words, count: words.count)
  }

  func accept(_ token: TokenID) -> Bool {
    outputs.append(token)
    return true
  }
}

/// Waits, and gives up after a time that only a hang reaches.
private func expectSignal(_ semaphore: DispatchSemaphore, _ what: Comment) {
  let isSignalled = semaphore.wait(timeout: .now() + 20) == .success
  #expect(isSignalled, what)
}

/// Keeps the thread busy.
private func burnProcessorTime(seconds: Double) {
  func now() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
  }
  let end = now() + seconds
  while now() < end {}
}

@Suite("Masks beside the forward pass") struct MaskFillingTests {
  private let vocabulary = 61

  private func request(
    _ prompt: [TokenID], seed: UInt64, newTokens: Int, _ constraint: (any TokenConstraint)?
  ) -> DriverRequest {
    var request = DriverRequest(prompt: prompt, newTokens: newTokens)
    request.sampling = SamplingParameters()
    request.sampling.seed = seed
    request.constraint = constraint
    return request
  }

  @Test func tokensAreTheSameWithAnyNumberOfThreads() throws {
    let seed = UInt64.random(in: 0...UInt64.max)
    var requests: [DriverRequest] = []
    for index in 0..<10 {
      let salt = UInt64(index)
      let limit = index % 4 == 3 ? nil : HashedConstraint(vocabulary: vocabulary, salt: salt)
      var made = request(
        (0...TokenID(3 * index)).map { $0 % 61 }, seed: salt, newTokens: 12 + index % 5, limit)
      if index % 5 == 4 { made.givenOutput = [5, 9] }
      if index % 5 == 2 { made.logprobs = LogprobOptions(topCount: 2) }
      requests.append(made)
    }
    var known: [DriverOutput]?
    for threads in [0, 1, 3] {
      let model = try makeTinyModel { $0.maskThreads = threads }
      for overlap in [false, true] {
        var driver = Driver(model: model, generator: SeededGenerator(seed: seed), overlap: overlap)
        let outputs = driver.run(requests)
        if let known { #expect(outputs == known, "seed \(seed), \(threads) threads, overlap \(overlap)") }
        known = outputs
      }
      for (request, output) in zip(requests, known ?? []) {
        guard let limit = request.constraint as? HashedConstraint else { continue }
        var past = request.givenOutput
        for token in output.tokens {
          let mask = HashedConstraint.mask(past, salt: limit.salt, vocabulary: vocabulary)
          #expect(mask[Int(token >> 5)] >> UInt32(token & 31) & 1 == 1, "seed \(seed)")
          past.append(token)
        }
      }
      let counts = model.steps.maskCounts
      if threads == 0 { #expect(counts.ahead == 0) }
      #expect(counts.ahead + counts.onDemand > 100)
    }
  }

  /// The next step is not launched before the mask of its draw is being filled: filled just before the draw, it never would be.
  @Test func aMaskIsFilledAsSoonAsTheTokenBeforeItIsDrawn() throws {
    let model = try makeTinyModel { $0.maskThreads = 1 }
    let runner = model.makeRunner()
    let begun = DispatchSemaphore(value: 0)
    let constraint = HashedConstraint(vocabulary: vocabulary, salt: 1) { outputs in
      // The first mask is asked for when the request enters its slot.
      if outputs > 0 { begun.signal() }
    }
    var sampling = SamplingParameters()
    sampling.seed = 1
    var result = StepResult()
    for step in 0..<8 {
      var batch = ScheduleBatch()
      batch.step = UInt64(step + 1)
      if step == 0 {
        batch.assigned = [
          SlotAssignment(
            slot: 0, sampling: sampling, stopTokenIDs: [], logprobs: nil, tokens: [1, 2, 3], promptCount: 3,
            constraint: constraint)
        ]
      }
      batch.tokens = step == 0 ? [1, 2, 3] : [result.tokens[0]]
      batch.pages = [0]
      batch.requests = [
        ScheduledRequest(
          slot: 0, start: Int32(step == 0 ? 0 : step + 2), count: Int32(batch.tokens.count), tokenOffset: 0,
          pageOffset: 0, pageCount: 1, lastTokenIsInFlight: false, samples: true)
      ]
      runner.launch(batch)
      result.removeAll()
      runner.wait(into: &result)
      #expect(result.tokens.count == 1 && result.failures.isEmpty)
      expectSignal(begun, "Nothing fills the mask of the draw after step \(step) before that step is launched.")
    }
    let counts = model.steps.maskCounts
    #expect(counts.ahead >= 7, "\(counts)")
  }

  /// One thread, and it is held up by the first request's mask until all others of the step have theirs.
  @Test func aSlowMaskDoesNotHoldUpTheMasksOfOthers() throws {
    let model = try makeTinyModel { $0.maskThreads = 1 }
    let others = 5
    let steps = 6
    let filled = DispatchSemaphore(value: 0)
    let slow = HashedConstraint(vocabulary: vocabulary, salt: 0) { outputs in
      // Nothing is drawn with the mask behind the last token.
      if outputs == steps { return }
      for _ in 0..<others { expectSignal(filled, "The other masks of step \(outputs) wait for the slow one.") }
    }
    var requests = [request([1, 2], seed: 0, newTokens: steps, slow)]
    for index in 1...others {
      let quick = HashedConstraint(vocabulary: vocabulary, salt: UInt64(index)) { outputs in
        if outputs < steps { filled.signal() }
      }
      requests.append(request([1, 2], seed: UInt64(index), newTokens: steps, quick))
    }
    var driver = Driver(model: model, generator: SeededGenerator(seed: 3), overlap: true)
    driver.isRandom = false
    let outputs = driver.run(requests)
    #expect(outputs.allSatisfy { $0.tokens.count == steps && $0.failure == nil })
  }

  /// The masks of one grammar take for ever, until all other requests have all of their masks: those go on without it.
  @Test(arguments: [1, 2]) func aSlowMaskDoesNotHoldUpTheStepsOfOthers(threads: Int) throws {
    let others = 4
    let steps = 8
    let filled = DispatchSemaphore(value: 0)
    let areDone = Mutex(false)
    func requests(slowly: Bool) -> [DriverRequest] {
      let slow = HashedConstraint(vocabulary: vocabulary, salt: 0) { outputs in
        guard slowly, !areDone.withLock({ $0 }) else { return }
        // The first mask shows that the grammar is slow; the drawing thread might fill the next one itself otherwise.
        if outputs == 0 { return burnProcessorTime(seconds: 0.005) }
        for _ in 0..<others { expectSignal(filled, "Other requests wait for the slow mask.") }
        areDone.withLock { $0 = true }
      }
      // Two requests of the slow grammar, whose masks take turns, and one without any.
      var made = [
        request([1, 2], seed: 0, newTokens: steps, slow), request([1, 2, 3], seed: 9, newTokens: steps, slow),
        request([4, 5], seed: 10, newTokens: steps, nil),
      ]
      made[1].logprobs = LogprobOptions(topCount: 2)
      for index in 1...others {
        let quick = HashedConstraint(vocabulary: vocabulary, salt: UInt64(index)) { outputs in
          if slowly && outputs == steps - 1 { filled.signal() }
        }
        made.append(request([1, 2], seed: UInt64(index), newTokens: steps, quick))
      }
      return made
    }
    for overlap in [true, false] {
      areDone.withLock { $0 = false }
      let model = try makeTinyModel { $0.maskThreads = threads }
      var driver = Driver(model: model, generator: SeededGenerator(seed: 3), overlap: overlap)
      driver.isRandom = false
      let outputs = driver.run(requests(slowly: true))
      #expect(outputs.allSatisfy { $0.tokens.count == steps && $0.failure == nil })
      #expect(outputs[0].postponed + outputs[1].postponed > steps - 4, "\(outputs.map(\.postponed))")
      // What was put off is drawn from the same bits.
      let plain = try makeTinyModel { $0.maskThreads = 0 }
      var other = Driver(model: plain, generator: SeededGenerator(seed: 4), overlap: overlap)
      let expected = other.run(requests(slowly: false))
      #expect(outputs == expected)
      #expect(expected.allSatisfy { $0.postponed == 0 })
    }
  }

  /// A request that leaves while its mask is being filled keeps nobody waiting.
  @Test func leavingDoesNotWaitForAMask() throws {
    let model = try makeTinyModel { $0.maskThreads = 1 }
    let runner = model.makeRunner()
    let release = DispatchSemaphore(value: 0)
    let begun = DispatchSemaphore(value: 0)
    let isReleased = Mutex(false)
    let stuck = HashedConstraint(vocabulary: vocabulary, salt: 0) { _ in
      begun.signal()
      expectSignal(release, "The mask was never let go.")
      isReleased.withLock { $0 = true }
    }
    var batch = ScheduleBatch()
    batch.step = 1
    batch.assigned = [
      SlotAssignment(
        slot: 0, sampling: .greedy, stopTokenIDs: [], logprobs: nil, tokens: [1, 2, 3], promptCount: 3,
        constraint: stuck)
    ]
    // A part of the prompt: nothing is drawn.
    batch.tokens = [1, 2]
    batch.pages = [0]
    batch.requests = [
      ScheduledRequest(
        slot: 0, start: 0, count: 2, tokenOffset: 0, pageOffset: 0, pageCount: 1, lastTokenIsInFlight: false,
        samples: false)
    ]
    runner.launch(batch)
    var result = StepResult()
    runner.wait(into: &result)
    expectSignal(begun, "The first mask is not filled while the prompt is computed.")
    var next = ScheduleBatch()
    next.step = 2
    next.released = [0]
    next.assigned = [
      SlotAssignment(
        slot: 0, sampling: .greedy, stopTokenIDs: [], logprobs: nil, tokens: [1, 2, 3], promptCount: 3,
        constraint: HashedConstraint(vocabulary: vocabulary, salt: 1))
    ]
    next.tokens = [1, 2, 3]
    next.pages = [1]
    next.requests = [
      ScheduledRequest(
        slot: 0, start: 0, count: 3, tokenOffset: 0, pageOffset: 0, pageCount: 1, lastTokenIsInFlight: false,
        samples: true)
    ]
    result.removeAll()
    runner.launch(next)
    runner.wait(into: &result)
    #expect(result.tokens.count == 1 && result.failures.isEmpty)
    #expect(!isReleased.withLock { $0 })
    release.signal()
  }
}
