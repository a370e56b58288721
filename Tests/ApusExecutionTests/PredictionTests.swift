import ApusCore
import ApusExecution
import ApusModels
import ApusScheduling
import ApusTensors
import Foundation
import Testing

/// The layer for multi-token prediction against transformers' decoder layer (Scripts/golden_prediction.py), and verification
/// of drafts by hand.
@Suite struct PredictionTests {
  static let directory = Paths.goldens + "/Prediction"
  static let names: [String] = {
    let files = (try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? []
    return files.filter { $0.hasSuffix(".json") }.map { String($0.dropLast(5)) }.sorted()
  }()

  @Test func goldensAreThere() { #expect(Self.names.count >= 3) }

  @Test(arguments: names)
  func draftLogitsEqualTheReference(name: String) throws {
    let golden = try Paths.json("\(Self.directory)/\(name).json")
    let configuration = try ModelConfiguration(json: golden["config"]!)
    let expected = golden["logits"]!.arrayValue!.map(\.floats)
    let drafts = golden["drafts"]!.tokenIDs
    let prompt = golden["prompt"]!.tokenIDs
    for (number, backend) in testBackends.enumerated() {
      let model = try makeTinyModel(
        golden["config"]!.objectDictionary, backend: backend,
        store: DummyWeights(
          seed: UInt64(golden["seed"]!.intValue!), initializerRange: configuration.initializerRange)
      ) {
        $0.maxTokensPerStep = 128
        $0.drafting = .prediction
      }
      let rows = expectDrafts(
        of: model, drafts, behind: prompt, next: golden["next"]!.intValue!,
        chunks: number % 2 == 1 ? [7, 16, prompt.count - 24] : [], "\(name) on \(backend.name)")
      #expect(rows.count == expected.count)
      for (row, wanted) in zip(rows, expected) {
        let largest = wanted.reduce(0) { max($0, abs($1)) }
        let difference = zip(row, wanted).reduce(0) { max($0, abs($1.0 - $1.1)) }
        #expect(difference <= 1e-4 * largest, "\(name) on \(backend.name): off by \(difference) of \(largest)")
      }
    }
  }

  /// K/V of a prediction layer are the same to the bit whether they came with each step or all at once, over rejections.
  @Test func draftsDoNotDependOnWhenTheyWereAskedFor() throws {
    let golden = try Paths.json("\(Self.directory)/deepseek-v3.json")
    let prompt = golden["prompt"]!.tokenIDs
    func logits(eager: Bool) throws -> [[Float]] {
      let model = try makeTinyModel(golden["config"]!.objectDictionary, seed: 5) { $0.drafting = .prediction }
      var rows: [[Float]] = []
      let sequence = StepSequence(model.steps, prompt: prompt, sampling: .greedy)
      sequence.run(prompt, start: 0, wanted: eager ? 3 : 0)
      var known = prompt + sequence.result.tokens
      for step in 0..<12 {
        // Drafts of which the first is right now and then.
        let next = step % 3 == 0 ? sequence.result.drafts.first?.tokens ?? [1, 2] : [3, 4]
        sequence.run(
          [known.last!] + next, start: known.count - 1, drafts: next.count, wanted: eager || step == 11 ? 3 : 0)
        known += sequence.result.tokens
        if step == 10 { model.steps.observeDraftLogits { rows.append($0) } }
      }
      return Array(rows.suffix(3))
    }
    let late = try logits(eager: false)
    #expect(late.count == 3)
    let eager = try logits(eager: true)
    #expect(eager == late)
  }

  /// Behind a draft nothing can be drawn: what was drawn before stands, and the next step fails, as in plain decoding. Behind
  /// a rejected draft it matters to nobody.
  @Test func aRowThatCannotBeDrawnFromInsideAVerification() throws {
    let model = try makeTinyModel()
    func plain(_ prompt: [TokenID], _ count: Int, constraint: (any TokenConstraint)? = nil) -> (
      tokens: [TokenID], failure: String?
    ) {
      let sequence = StepSequence(model.steps, prompt: prompt, sampling: .greedy, constraint: constraint)
      sequence.run(prompt, start: 0)
      var tokens = sequence.result.tokens
      while tokens.count < count, sequence.result.failures.isEmpty {
        sequence.run([tokens.last!], start: prompt.count + tokens.count - 1)
        if sequence.result.failures.isEmpty { tokens += sequence.result.tokens }
      }
      return (tokens, sequence.result.failures.first?.reason)
    }
    // The third token of the answer is the dead end; it must not come before.
    let prompts = (0..<61).map { start in (0..<12).map { TokenID(($0 * 7 + start) % 61) } }
    let prompt = try #require(
      prompts.first { prompt in
        let text = plain(prompt, 3).tokens
        return !text[..<2].contains(text[2])
      })
    let text = plain(prompt, 6).tokens
    let end = DeadEnd(behind: text[2])
    let expected = plain(prompt, 6, constraint: end)
    #expect(expected.tokens == Array(text[..<3]) && expected.failure != nil)

    // Accepted, and in the middle of the drafts.
    let sequence = StepSequence(model.steps, prompt: prompt, sampling: .greedy, constraint: end)
    sequence.run(prompt, start: 0)
    #expect(sequence.result.tokens == [text[0]])
    sequence.run([text[0], text[1], text[2], 5, 6], start: prompt.count, drafts: 4)
    #expect(sequence.result.tokens == [text[1], text[2]] && sequence.result.failures.isEmpty)
    #expect(sequence.result.tokenCounts == [2])
    sequence.run([text[2]], start: prompt.count + 2)
    #expect(sequence.result.failures.map(\.reason) == [expected.failure!])

    // Rejected: what is behind it is not looked at.
    let other = StepSequence(model.steps, prompt: prompt, sampling: .greedy, constraint: end)
    other.run(prompt, start: 0)
    other.run([text[0], text[2], text[1]], start: prompt.count, drafts: 2)
    #expect(other.result.tokens == [text[1]] && other.result.failures.isEmpty)
    #expect(other.result.acceptedDrafts.map(\.count) == [0])
  }
}

extension StepRunner {
  /// What the drafter proposes behind a prompt that is computed in one step.
  func draft(behind prompt: [TokenID], count: Int) -> [TokenID] {
    let sequence = StepSequence(self, prompt: prompt, sampling: .greedy)
    sequence.run(prompt, start: 0, wanted: count)
    return sequence.result.drafts.first?.tokens ?? []
  }
}

/// Has a model draft behind a prompt that is computed whole, or in chunks and the last token alone, and expects tokens.
/// - Returns: the logits that the drafts are drawn from.
func expectDrafts(
  of model: LoadedModel, _ drafts: [TokenID], behind prompt: [TokenID], next: Int, chunks: [Int], _ what: Comment
) -> [[Float]] {
  var rows: [[Float]] = []
  model.steps.observeDraftLogits { rows.append($0) }
  let sequence = StepSequence(model.steps, prompt: prompt, sampling: .greedy)
  var start = 0
  for chunk in chunks {
    sequence.run(Array(prompt[start..<start + chunk]), start: start, samples: false)
    start += chunk
  }
  sequence.run(Array(prompt[start...]), start: start, wanted: drafts.count)
  #expect(sequence.result.tokens == [TokenID(next)], what)
  #expect(sequence.result.drafts.map(\.tokens) == [drafts], what)
  return rows
}

/// Runs steps of one sequence by hand.
final class StepSequence {
  let steps: StepRunner
  private var step: UInt64 = 0
  private(set) var result = StepResult()
  /// Pages in an order of their own.
  private let pages: [Int32] = Array(2..<18).reversed()

  init(
    _ steps: StepRunner, prompt: [TokenID], sampling: SamplingParameters, constraint: (any TokenConstraint)? = nil
  ) {
    self.steps = steps
    var sampling = sampling
    sampling.seed = sampling.seed ?? 1
    var batch = ScheduleBatch()
    batch.assigned = [
      SlotAssignment(
        slot: 0, sampling: sampling, stopTokenIDs: [], logprobs: nil, tokens: prompt, promptCount: prompt.count,
        constraint: constraint)
    ]
    steps.run(batch, into: &result)
  }

  func run(_ tokens: [TokenID], start: Int, drafts: Int = 0, samples: Bool = true, wanted: Int = 0) {
    var batch = ScheduleBatch()
    step += 1
    batch.step = step
    batch.tokens = tokens
    let count = (start + tokens.count + kvPageSize - 1) / kvPageSize
    batch.pages = Array(pages[..<count])
    batch.requests = [
      ScheduledRequest(
        slot: 0, start: Int32(start), count: Int32(tokens.count), tokenOffset: 0, pageOffset: 0,
        pageCount: Int32(count), lastTokenIsInFlight: false, samples: samples, draftCount: Int32(drafts),
        draftLimit: Int32(wanted))
    ]
    result.removeAll()
    steps.run(batch, into: &result)
  }
}

/// Allows every token, but none behind one of them.
private final class DeadEnd: TokenConstraint {
  private let token: TokenID
  init(behind token: TokenID) { self.token = token }
  func makeTokenMatcher() -> any TokenMatcher { Matcher(token) }

  private final class Matcher: TokenMatcher {
    private let token: TokenID
    private var isStuck = false
    init(_ token: TokenID) { self.token = token }
    var maskWordCount: Int { 2 }
    var isTerminated: Bool { false }
    var failure: EngineError? { nil }
    func fillMask(into mask: UnsafeMutablePointer<UInt32>) {
      for word in 0..<2 { mask[word] = isStuck ? 0 : ~0 }
    }
    func accept(_ token: TokenID) -> Bool {
      if isStuck { return false }
      isStuck = token == self.token
      return true
    }
  }
}

extension JSONValue {
  /// The members of an object.
  var objectDictionary: [String: JSONValue] {
    var members: [String: JSONValue] = [:]
    for (key, value) in objectValue! { members[key] = value }
    return members
  }
}
