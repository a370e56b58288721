import ApusCommandLine
import ApusCore
import Foundation
import Synchronization
import Testing

@Suite struct BatchTests {
  private func line(_ text: String) throws -> BatchLine {
    try BatchLine(try JSONValue.parse(text), number: 7, defaults: SamplingParameters())
  }

  @Test func linesAreRead() throws {
    let first = try line(
      #"{"prompt": "Hi", "max_tokens": 5, "temperature": 0, "stop": "x", "seed": 3, "metadata": {"a": [1]}}"#)
    #expect(first.id == 7 && first.input == .prompt("Hi"))
    #expect(first.sampling.maxNewTokens == 5 && first.sampling.isGreedy && first.sampling.stop == ["x"])
    #expect(first.sampling.seed == 3 && first.metadata == ["a": [1]])
    let second = try line(
      #"{"id": "q", "input_ids": [3, 4], "sampling_params": {"top_k": 0, "logit_bias": {"5": -1}, "ignore_eos": true}}"#
    )
    #expect(second.id == "q" && second.input == .tokens([3, 4]))
    #expect(second.sampling.topK == -1 && second.sampling.logitBias == [5: -1] && second.sampling.ignoreEOS)
    let third = try line(
      #"{"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"thinking": true}}"#)
    #expect(
      third.input
        == .messages([["role": "user", "content": "Hi"]], tools: nil, variables: ["thinking": true]))
  }

  @Test(arguments: [
    ("[]", ""), ("{}", "'prompt'"), (#"{"prompt": 1}"#, "string"), (#"{"prompt": "a", "messages": [1]}"#, "not both"),
    (#"{"prompt": "a", "temprature": 1}"#, "'temperature'"), (#"{"prompt": "a", "colour": 1}"#, "'metadata'"),
    (#"{"prompt": "a", "max_tokens": "5"}"#, "max_tokens"), (#"{"prompt": "a", "max_tokens": 1.5}"#, "max_tokens"),
    (#"{"input_ids": []}"#, "input_ids"), (#"{"input_ids": [1, "2"]}"#, "input_ids"),
    (#"{"messages": []}"#, "messages"),
    (#"{"prompt": "a", "stop": [1]}"#, "stop"), (#"{"prompt": "a", "id": [1]}"#, "id"),
    (#"{"prompt": "a", "logit_bias": {"x": 1}}"#, "logit_bias"), (#"{"prompt": "a", "sampling_params": 3}"#, "object"),
    (#"{"input_ids": [99999999999]}"#, "input_ids"),
  ])
  func wrongLinesAreRefusedWithTheFieldAtFault(_ text: String, _ mention: String) throws {
    do {
      _ = try line(text)
      Issue.record("\(text) was accepted")
    } catch let error as EngineError {
      #expect(mention.isEmpty || error.message.contains(mention), "\(error.message)")
    }
  }

  /// A directory of its own for each test.
  private func temporaryFile(_ name: String) throws -> String {
    let directory = FileManager.default.temporaryDirectory.appending(path: "apus-batch-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
    return directory.appending(path: name).path
  }

  private func run(
    _ input: String, to path: String, service: FakeGenerationService = FakeGenerationService(), retries: Bool = false,
    concurrency: Int = 3
  ) async throws -> BatchRun.Outcome {
    let earlier = try BatchOutput.resume(path: path, retriesFailures: retries)
    let appender = try LineAppender(path: path)
    var lines = input.split(separator: "\n", omittingEmptySubsequences: false).map { Array($0.utf8) }[...]
    var defaults = SamplingParameters()
    defaults.maxNewTokens = 3
    let batch = BatchRun(service: service, defaults: defaults, concurrency: concurrency)
    func next() throws(CommandFailure) -> [UInt8]? { lines.popFirst() }
    func write(_ line: String) throws(CommandFailure) { try appender.append(line) }
    return try await batch.run(lines: next, done: earlier.finished, write: write)
  }

  private func answers(_ path: String) throws -> [String: JSONValue] {
    let lines = try String(contentsOfFile: path, encoding: .utf8).split(separator: "\n")
    var answers: [String: JSONValue] = [:]
    for line in lines {
      let value = try JSONValue.parse(String(line))
      let id = try #require(value["id"]).compactText
      #expect(answers.updateValue(value, forKey: id) == nil, "\(id) was answered twice")
    }
    return answers
  }

  @Test func aWholeFile() async throws {
    let path = try temporaryFile("out.jsonl")
    let service = FakeGenerationService()
    let input = """
      {"id": "a", "input_ids": [5, 6]}
      {"id": 2, "prompt": "A", "max_tokens": 1, "metadata": "kept"}

      junk
      {"id": "c", "messages": [{"role": "user", "content": "A"}]}
      {"id": "unlucky", "input_ids": [13]}
      {"id": "a", "prompt": "again"}
      {"id": "long", "input_ids": [\(Array(repeating: "1", count: 65).joined(separator: ","))]}
      {"id": "bad", "input_ids": [1], "top_p": 7}
      """
    let outcome = try await run(input, to: path, service: service)
    let found = try String(contentsOfFile: path, encoding: .utf8).split(separator: "\n").map {
      try JSONValue.parse(String($0))
    }
    #expect(outcome.answered == 3 && outcome.failed == 5 && outcome.skipped == 0 && found.count == 8)
    func lines(_ id: JSONValue) -> [JSONValue] { found.filter { $0["id"] == id } }
    let a = try #require(lines("a").first { $0["text"] != nil })
    #expect(a["text"] == "12 13 14" && a["output_ids"] == [12, 13, 14] && a["finish_reason"] == "length")
    #expect(a["usage"]?["prompt_tokens"] == 2 && a["usage"]?["completion_tokens"] == 3)
    #expect(lines("a").contains { $0["error"]?["message"]?.stringValue?.contains("repeats") == true })
    // "A" is token 65; a prompt gets the special token before it, a rendered conversation has its own.
    #expect(lines(2).first?["output_ids"] == [67] && lines(2).first?["metadata"] == "kept")
    #expect(lines("c").first?["output_ids"]?[0] == 66)
    #expect(lines(4).first?["error"]?["message"]?.stringValue?.contains("Line 4 is not JSON") == true)
    #expect(lines("unlucky").first?["error"]?["code"] == "internalFailure")
    #expect(lines("long").first?["error"]?["code"] == "promptTooLong")
    #expect(lines("bad").first?["error"]?["param"] == "top_p")
    #expect(service.counts.withLock { $0.peak } <= 3)
  }

  @Test func aStoppedRunGoesOn() async throws {
    let path = try temporaryFile("out.jsonl")
    let input = (1...9).map { #"{"input_ids": [\#($0 + 20)]}"# }.joined(separator: "\n")
    let half = input.split(separator: "\n").prefix(4).joined(separator: "\n")
    #expect(try await run(half, to: path).answered == 4)
    // The process died while it wrote the fifth line.
    let handle = try #require(FileHandle(forWritingAtPath: path))
    try handle.seekToEnd()
    try handle.write(contentsOf: Data(#"{"id":5,"tex"#.utf8))
    try handle.close()
    let service = FakeGenerationService()
    let outcome = try await run(input, to: path, service: service)
    #expect(outcome.answered == 5 && outcome.skipped == 4 && outcome.failed == 0)
    #expect(service.counts.withLock { $0.prompts.count } == 5)
    let all = try answers(path)
    #expect(all.count == 9)
    for number in 1...9 { #expect(all["\(number)"]?["output_ids"]?[0] == .int(Int64(number + 21))) }
    // A third run has nothing to do.
    #expect(try await run(input, to: path).skipped == 9)
  }

  @Test func failuresAreTriedAgainOnlyWhenAsked() async throws {
    let path = try temporaryFile("out.jsonl")
    let bad = #"{"id": "x", "input_ids": [13]}"# + "\n" + #"{"id": "y", "input_ids": [3]}"#
    #expect(try await run(bad, to: path).failed == 1)
    let good = bad.replacingOccurrences(of: "13", with: "14")
    let again = try await run(good, to: path)
    #expect(again.skipped == 2 && again.answered == 0)
    let retried = try await run(good, to: path, retries: true)
    #expect(retried.skipped == 1 && retried.answered == 1)
    #expect(try answers(path)["\"x\""]?["output_ids"]?[0] == 15)
  }

  @Test func aStrangersFileIsLeftAlone() throws {
    let path = try temporaryFile("notes.txt")
    try "my notes\nmore".write(toFile: path, atomically: true, encoding: .utf8)
    #expect(throws: CommandFailure.self) { try BatchOutput.resume(path: path, retriesFailures: true) }
    #expect(try String(contentsOfFile: path, encoding: .utf8) == "my notes\nmore")
  }

  @Test func linesAreCutAtTheirEnds() throws {
    let path = try temporaryFile("lines")
    let long = String(repeating: "x", count: 200_000)
    try "a\r\n\n\(long)\nend".write(toFile: path, atomically: true, encoding: .utf8)
    let reader = try LineReader(path: path)
    var lengths: [Int] = []
    while let line = try reader.next() { lengths.append(line.count) }
    #expect(lengths == [1, 0, 200_000, 3])
    let limited = try LineReader(path: path, lengthLimit: 1000)
    #expect(throws: CommandFailure.self) { while try limited.next() != nil {} }
    #expect(throws: CommandFailure.self) { try LineReader(path: path + ".missing") }
  }
}
