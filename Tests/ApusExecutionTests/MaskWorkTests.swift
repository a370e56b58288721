import ApusCore
import ApusExecution
import ApusScheduling
import ApusTensors
import Foundation
import Synchronization
import Testing

/// Allows all tokens but one that depends on the outputs so far. Every fourth mask is one that takes much work.
private final class HeavyConstraint: TokenConstraint {
  let vocabulary: Int
  /// Called while a heavy mask is filled, whatever it takes, with the number of outputs before it.
  let whileFilling: @Sendable (Int) -> Void
  /// Masks given up since they would have taken more work than allowed.
  let givenUp = Mutex(0)
  /// Names of the threads that filled a heavy mask.
  let threads = Mutex<Set<String>>([])

  init(vocabulary: Int, whileFilling: @escaping @Sendable (Int) -> Void = { _ in }) {
    self.vocabulary = vocabulary
    self.whileFilling = whileFilling
  }

  static func isHeavy(_ outputs: Int) -> Bool { outputs % 4 == 3 }

  func makeTokenMatcher() -> any TokenMatcher { HeavyMatcher(self) }
}

private final class HeavyMatcher: TokenMatcher {
  private let constraint: HeavyConstraint
  private var count = 0

  init(_ constraint: HeavyConstraint) { self.constraint = constraint }

  var maskWordCount: Int { (constraint.vocabulary + 31) / 32 }
  var isTerminated: Bool { false }
  var failure: EngineError? { nil }

  func fillMask(into mask: UnsafeMutablePointer<UInt32>) {
    if HeavyConstraint.isHeavy(count) {
      let name = (try? String(contentsOfFile: "/proc/thread-self/comm", encoding: .utf8)) ?? "?"
      constraint.threads.withLock { _ = $0.insert(name.trimmingCharacters(in: .newlines)) }
      constraint.whileFilling(count)
    }
    mask.update(repeating: ~0, count: maskWordCount)
    mask[0] &= ~(1 << UInt32(count % 32))
  }

  func fillMask(into mask: UnsafeMutablePointer<UInt32>, work: Int) -> Bool {
    if HeavyConstraint.isHeavy(count) {
      constraint.givenUp.withLock { $0 += 1 }
      return false
    }
    fillMask(into: mask)
    return true
  }

  func accept(_ token: TokenID) -> Bool {
    count += 1
    return true
  }
}

@Suite("Masks that turn out to take much work") struct MaskWorkTests {
  /// The only thread is held up, so that the drawing thread looks after a request whose masks were quick so far: it gives up
  /// the one that is not, another thread fills it, and the tokens are those of a plain run.
  @Test func theDrawingThreadGivesUpAHeavyMask() throws {
    let vocabulary = 61
    let steps = 12
    var givenUp = 0
    func requests(_ constraints: [HeavyConstraint]) -> [DriverRequest] {
      constraints.enumerated().map { index, constraint in
        var request = DriverRequest(prompt: [1, 2, TokenID(index)], newTokens: steps)
        request.sampling = SamplingParameters()
        request.sampling.seed = UInt64(index)
        request.constraint = constraint
        return request
      }
    }
    let plain = try makeTinyModel { $0.maskThreads = 0 }
    var other = Driver(model: plain, generator: SeededGenerator(seed: 4), overlap: true)
    let expected = other.run(requests((0..<3).map { _ in HeavyConstraint(vocabulary: vocabulary) }))
    for round in 0..<6 {
      let isFilled = DispatchSemaphore(value: 0)
      let hasWaited = Mutex(false)
      let model = try makeTinyModel { $0.maskThreads = 1 }
      let holding = HeavyConstraint(vocabulary: vocabulary) { _ in
        if hasWaited.withLock({ hasWaited in
          defer { hasWaited = true }; return hasWaited
        }) {
          return
        }
        #expect(isFilled.wait(timeout: .now() + 20) == .success, "Nobody fills the other request's mask.")
      }
      let others = (0..<2).map { _ in HeavyConstraint(vocabulary: vocabulary) { _ in isFilled.signal() } }
      var driver = Driver(model: model, generator: SeededGenerator(seed: UInt64(round)), overlap: round % 2 == 0)
      driver.isRandom = false
      let outputs = driver.run(requests([holding] + others))
      #expect(outputs == expected)
      for constraint in [holding] + others {
        #expect(constraint.threads.withLock { $0 } == ["apus-mask"])
        givenUp += constraint.givenUp.withLock { $0 }
      }
    }
    #expect(givenUp > 0)
  }
}
