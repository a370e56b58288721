import ApusCommandLine
import ApusCore
import Foundation
import Testing

@Suite struct BenchDatasetTests {
  private func units(_ request: BenchRequest) -> [Int] {
    if case .units(let units) = request.prompt { units } else { [] }
  }

  @Test func randomIsSeededAndExact() {
    func make(_ seed: UInt64) -> [BenchRequest] {
      BenchDataset.random(count: 20, inputLength: 33, outputLength: 9, rangeRatio: 1, unitCount: 50, seed: seed)
    }
    #expect(make(3) == make(3))
    #expect(make(3) != make(4))
    for request in make(3) {
      #expect(units(request).count == 33 && request.outputLength == 9)
      #expect(units(request).allSatisfy { (0..<50).contains($0) })
    }
  }

  @Test func rangeRatioBoundsLengths() {
    let requests = BenchDataset.random(
      count: 300, inputLength: 100, outputLength: 20, rangeRatio: 0.5, unitCount: 9, seed: 1)
    let inputs = Set(requests.map { units($0).count }), outputs = Set(requests.map(\.outputLength))
    #expect(inputs.min()! >= 50 && inputs.max()! <= 100 && inputs.count > 20)
    #expect(outputs.min()! >= 10 && outputs.max()! <= 20 && outputs.count > 5)
  }

  @Test func groupsShareTheirPrefixAndNothingElse() {
    let requests = BenchDataset.sharedPrefix(
      groups: 4, promptsPerGroup: 5, prefixLength: 40, questionLength: 7, outputLength: 3, rangeRatio: 1,
      unitCount: 10_000, seed: 9)
    #expect(requests.count == 20)
    let groups = Dictionary(grouping: requests) { units($0).prefix(40) }
    #expect(groups.count == 4 && groups.values.allSatisfy { $0.count == 5 })
    #expect(Set(requests.map { units($0).suffix(7) }).count == 20)
    #expect(requests.map { units($0).first! } != requests.map { units($0).first! }.sorted())
  }

  @Test func aTraceSharesExactlyItsBlocks() throws {
    let texts = [
      #"{"timestamp": 100, "input_length": 1300, "output_length": 52, "hash_ids": [1, 2, 3]}"#,
      #"{"timestamp": 1100, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 9]}"#,
      #"{"timestamp": 3100, "input_length": 700, "output_length": 0, "hash_ids": [4]}"#,
    ]
    let lines = try texts.map { try #require(BenchDataset.TraceLine(try JSONValue.parse($0))) }
    let requests = BenchDataset.trace(
      lines, blockSize: 512, scale: 1, speed: 2, maxInputLength: nil, unitCount: 1000, seed: 1)
    let prompts = requests.map(units)
    #expect(prompts.map(\.count) == [1300, 1100, 700])
    #expect(prompts[0][..<1024] == prompts[1][..<1024])
    #expect(prompts[0][1024..<1100] != prompts[1][1024...])
    #expect(prompts[0][..<512] != prompts[2][..<512])
    #expect(requests.map(\.outputLength) == [52, 5, 1])
    #expect(requests.map(\.arrival) == [0, 0.5, 1.5])

    let scaled = BenchDataset.trace(
      lines, blockSize: 512, scale: 0.125, speed: 1, maxInputLength: 100, unitCount: 1000, seed: 1)
    #expect(scaled.map { units($0).count } == [100, 100, 88])
    #expect(units(scaled[0]) == units(scaled[1]))
    #expect(BenchDataset.TraceLine(["timestamp": 1]) == nil)
  }

  @Test func shareGPTTakesTheFirstQuestionOfEachConversation() throws {
    let file = """
      [{"id": "a", "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A model of text."}]},
       {"id": "b", "conversations": [{"from": "gpt", "value": "Hm."}, {"from": "human", "value": "Why?"}]},
       {"id": "c", "conversations": []}]
      """
    let requests = try BenchDataset.shareGPT(Array(file.utf8), count: 1, outputLength: nil, seed: 1)
    #expect(requests == [BenchRequest(prompt: .text("Who?"), outputLength: 4)])
    let both = try BenchDataset.shareGPT(Array(file.utf8), count: 5, outputLength: 7, seed: 1)
    #expect(both.count == 5 && Set(both.map { "\($0.prompt)" }).count == 2)
    #expect(both.allSatisfy { $0.outputLength == 7 })
    #expect(throws: EngineError.self) {
      try BenchDataset.shareGPT(Array("[]".utf8), count: 1, outputLength: nil, seed: 1)
    }
  }

  @Test func customTakesEveryKindOfPrompt() throws {
    let file = """
      {"prompt": "Hi", "output_len": 3}
      {"messages": [{"role": "user", "content": "Hi"}]}

      {"input_ids": [1, 2, 3], "arrival": 1.5}
      """
    let requests = try BenchDataset.custom(Array(file.utf8), count: nil, outputLength: 64, seed: 1)
    #expect(requests.map(\.outputLength) == [3, 64, 64])
    #expect(requests[0].prompt == .text("Hi") && requests[2].prompt == .tokens([1, 2, 3]))
    #expect(requests[2].arrival == 1.5)
    #expect(throws: EngineError.self) {
      try BenchDataset.custom(Array("{}".utf8), count: nil, outputLength: 1, seed: 1)
    }
    #expect(throws: EngineError.self) {
      try BenchDataset.custom(Array("{".utf8), count: nil, outputLength: 1, seed: 1)
    }
  }

  @Test func arrivals() {
    #expect(BenchDataset.poissonArrivals(count: 3, rate: .infinity, seed: 1) == [0, 0, 0])
    let times = BenchDataset.poissonArrivals(count: 5000, rate: 10, seed: 1)
    #expect(times == BenchDataset.poissonArrivals(count: 5000, rate: 10, seed: 1))
    #expect(times[0] == 0 && times == times.sorted())
    #expect(abs(times.last! / 499.9 - 1) < 0.06)
  }

  @Test func wordsAreWrittenWithSpaces() {
    let units = PromptUnits.words(["the", "of"])
    #expect(units.count == 2 && units.text([1, 0, 0]) == "of the the")
    #expect(Set(PromptUnits.commonWords).count > 300)
  }

  private static let trace = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent().appending(path: "../shared/data/traces/mooncake/traces/conversation_trace.jsonl")

  @Test(.enabled(if: FileManager.default.fileExists(atPath: trace.path), "the real Mooncake trace is not here"))
  func aRealTraceKeepsItsPrefixes() throws {
    let text = try String(contentsOf: Self.trace, encoding: .utf8)
    let lines = try text.split(separator: "\n").prefix(200).map {
      try #require(BenchDataset.TraceLine(try JSONValue.parse(String($0))))
    }
    let requests = BenchDataset.trace(
      lines, blockSize: 512, scale: 1.0 / 64, speed: 1, maxInputLength: nil, unitCount: 5000, seed: 2)
    var compared = 0
    for (left, a) in zip(lines, requests) {
      for (right, b) in zip(lines, requests) where left != right {
        let shared = zip(left.hashes, right.hashes).prefix { $0 == $1 }.count * 8
        let x = units(a), y = units(b)
        let common = zip(x, y).prefix { $0 == $1 }.count
        #expect(common >= min(shared, x.count, y.count))
        compared += 1
      }
    }
    #expect(compared > 1000)
  }
}
