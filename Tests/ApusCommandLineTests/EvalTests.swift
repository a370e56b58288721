import ApusCommandLine
import ApusCore
import ApusEngine
import Foundation
import Synchronization
import Testing

@Suite struct EvalTests {
  private func question(_ members: String) throws -> EvalQuestion {
    try EvalQuestion(try JSONValue.parse(#"{"prompt": "?", \#(members)}"#), number: 1)
  }

  private func accepts(_ members: String, _ text: String, ended: Bool = true) throws -> Bool {
    var answer = EvalAnswer()
    answer.text = text
    answer.hasEnded = ended
    return try question(members).accepts(answer)
  }

  /// What `right` of training/evaluate.py says of the same pairs.
  @Test(arguments: [
    (#""match": "exact", "answer": "Yes.""#, "Yes.", true),
    (#""match": "exact", "answer": "Yes.\n""#, " Yes.\t", true),
    (#""match": "exact", "answer": "Yes.""#, "yes.", false),
    (#""match": "exact", "answer": "Yes.""#, "Yes", false),
    (#""match": "exact", "answer": "Yes.""#, "<think>\nNo.\n</think>\n\nYes.", true),
    (#""match": "exact", "answer": "Yes.""#, "Yes.</think>No.</think>Yes.", true),
    (#""match": "exact", "answer": "Yes.""#, "Yes.</think>", false),
    // An accented letter is another text when it is written as two code points.
    (#""match": "exact", "answer": "caf\u00e9""#, "cafe\u{301}", false),
    (#""match": "json", "answer": "{\"a\": 1, \"b\": [2, \"x\"]}""#, #"{"b":[2,"x"],"a":1}"#, true),
    (#""match": "json", "answer": {"a": 1, "b": [2, "x"]}"#, #"{"b":[2,"x"],"a":1.0}"#, true),
    (#""match": "json", "answer": "{\"a\": [1, 2]}""#, #"{"a": [2, 1]}"#, false),
    (#""match": "json", "answer": "{\"a\": 1}""#, #"{"a": "1"}"#, false),
    (#""match": "json", "answer": "{\"a\": 1}""#, #"{"a": 1, "b": 2}"#, false),
    (#""match": "json", "answer": "{\"a\": 1}""#, #"{"a": 1"#, false),
    (#""match": "json", "answer": "{\"a\": null}""#, #"{"a": null}"#, true),
    (#""match": "json", "answer": "{\"a\": true}""#, #"{"a": false}"#, false),
    (#""match": "contains", "words": ["fox", "bell"]"#, "The bell of a fox.", true),
    (#""match": "contains", "words": ["fox", "bell"]"#, "The bell of a Fox.", false),
    (
      #""match": "tool", "answer": {"name": "f", "arguments": {"x": 1, "y": "z"}}"#,
      "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"y\": \"z\", \"x\": 1}}\n</tool_call>", true
    ),
    (
      #""match": "tool", "answer": {"name": "f", "arguments": {"x": 1}}"#,
      "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call> and more", false
    ),
    (#""match": "tool", "answer": {"name": "f", "arguments": {}}"#, #"{"name": "f", "arguments": {}}"#, false),
    (#""match": "tool", "answer": {"name": "f", "arguments": {}}"#, "<tool_call>\n</tool_call>", false),
  ])
  func scoring(_ members: String, _ text: String, _ isRight: Bool) throws {
    #expect(try accepts(members, text) == isRight, "\(members) \(text)")
    // What does not end by itself is wrong, whatever it says.
    #expect(try !accepts(members, text, ended: false))
  }

  @Test func callsThatAServerHasParsedAreCompared() throws {
    let wanted = try question(#""match": "tool", "answer": {"name": "f", "arguments": {"x": [1]}}"#)
    var answer = EvalAnswer()
    answer.hasEnded = true
    answer.call = ["name": "f", "arguments": ["x": [1]]]
    #expect(wanted.accepts(answer))
    answer.call = ["name": "f", "arguments": ["x": [2]]]
    #expect(!wanted.accepts(answer))
    answer.call = ["name": "f", "arguments": ["x": [1]]]
    answer.error = "aborted"
    #expect(!wanted.accepts(answer))
  }

  @Test(arguments: [
    ("[]", "object"), (#"{"answer": "x"}"#, "messages"),
    (#"{"prompt": "a", "input_ids": [1], "answer": "x"}"#, "exactly"),
    (#"{"prompt": 1, "answer": "x"}"#, "prompt"), (#"{"messages": [], "answer": "x"}"#, "messages"),
    (#"{"input_ids": [1, "2"], "answer": "x"}"#, "input_ids"), (#"{"prompt": "a"}"#, "answer"),
    (#"{"prompt": "a", "match": "json", "answer": "{"}"#, "not JSON"), (#"{"prompt": "a", "match": "json"}"#, "answer"),
    (#"{"prompt": "a", "match": "contains", "words": []}"#, "words"),
    (#"{"prompt": "a", "match": "contains", "words": ["x", 1]}"#, "words"),
    (#"{"prompt": "a", "match": "tool", "answer": {"name": "f"}}"#, "arguments"),
    (#"{"prompt": "a", "match": "fuzzy", "answer": "x"}"#, "'fuzzy'"),
    (#"{"messages": [{"role": "user"}], "enable_thinking": 1, "answer": "x"}"#, "enable_thinking"), ("{", "not JSON"),
  ])
  func wrongLinesAreRefusedWithLineAndField(_ text: String, _ mention: String) throws {
    do {
      _ = try EvalQuestion.read(Array("\n{\"prompt\": \"a\", \"answer\": \"b\"}\r\n\(text)\n".utf8))
      Issue.record("\(text) was accepted")
    } catch {
      #expect(error.message.contains("Line 3") && error.message.contains(mention), "\(error.message)")
    }
  }

  @Test func questionsAreAskedOfAServiceInOrderAndAtMostSoManyAtOnce() async throws {
    let service = FakeGenerationService()
    // The fake's answers to three tokens are functions of the prompt; the token 13 makes it fail.
    let questions = try EvalQuestion.read(
      Array(
        """
        {"skill": "b", "input_ids": [3, 4], "answer": "8 9 10"}
        {"skill": "a", "prompt": "A", "answer": "67 68 69"}
        {"skill": "a", "messages": [{"role": "user", "content": "B"}], "enable_thinking": false, "answer": "67 68 69"}
        {"skill": "b", "input_ids": [13], "answer": "x"}
        {"skill": "b", "input_ids": [5], "answer": "6 7 9"}

        """.utf8))
    var told = 0
    let answers = await EvalRun.answers(
      to: questions, concurrency: 2,
      ask: { question in
        var answer = await EvalRun.answer(to: question, from: service, maxNewTokens: 3)
        // The fake stops at the length asked for.
        if answer.error == nil {
          #expect(!answer.hasEnded)
          answer.hasEnded = true
        }
        return answer
      },
      progress: { _ in told += 1 })
    #expect(told == 5)
    #expect(answers.map(\.text) == ["8 9 10", "67 68 69", "67 68 69", "", "6 7 8"])
    #expect(answers[3].error == "Unlucky.")
    #expect(service.counts.withLock { $0.peak } <= 2)
    #expect(
      service.counts.withLock { $0.prompts }.contains([66]), "no beginning-of-sequence token before a conversation")

    let report = EvalReport(questions, answers, seconds: 2)
    #expect(report.skills == [.init(name: "b", asked: 3, right: 1), .init(name: "a", asked: 2, right: 2)])
    #expect(report.asked == 5 && report.failed == 1 && report.ended == 4)
    #expect(report.completionTokens == 12 && report.throughput == 6)
    #expect(abs(report.mean - (100.0 / 3 + 100) / 2) < 1e-9 && report.overall == 60 && report.endedShare == 80)
    #expect(report.json["scores"]?["b"] == 33.3 && report.json["asked"]?["a"] == 2)
    #expect(report.json["ended_by_itself"] == 80 || report.json["ended_by_itself"] == 80.0)
    #expect(report.table.contains("33.3") && report.table.contains("Failed"))
  }
}

/// The demo model's held-out questions, through the engine and by the rules of `apus bench eval`.
@Suite struct DemoEvalTests {
  @Test func theDemoModelScoresAsItsCardSays() async throws {
    let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
      .appendingPathComponent("../../Models/apus-demo").standardizedFileURL
    let all = try EvalQuestion.read([UInt8](Data(contentsOf: folder.appendingPathComponent("evaluation.jsonl"))))
    let card = try JSONValue.parse([UInt8](Data(contentsOf: folder.appendingPathComponent("evaluation.json"))))
    var configuration = EngineConfiguration(modelPath: folder.path)
    configuration.maxTotalTokens = 8192
    let (questions, answers) = try await withEngine(configuration) { engine in
      let skills = ["extraction", "list_copy", "addition_thinking", "multiple_choice_thinking", "tool_call"]
      let questions = skills.flatMap { skill in all.filter { $0.skill == skill }.prefix(8) }
      let answers = await EvalRun.answers(
        to: questions, concurrency: 8,
        ask: { await EvalRun.answer(to: $0, from: engine, maxNewTokens: 200) }, progress: { _ in })
      return (questions, answers)
    }
    let report = EvalReport(questions, answers, seconds: 1)
    #expect(report.failed == 0 && report.ended >= report.asked - 1)
    #expect(report.skills.count == 5)
    for skill in report.skills {
      let promised = try #require(card["scores"]?[skill.name]?.doubleValue)
      // Of so few questions two may be wrong where the card counts many.
      let least = promised / 100 * Double(skill.asked) - 2
      #expect(Double(skill.right) >= least, "\(skill.name): \(skill.right) of \(skill.asked), \(promised)% promised")
    }
  }
}

extension EvalReport.Skill {
  fileprivate init(name: String, asked: Int, right: Int) {
    self.init(name: name)
    self.asked = asked
    self.right = right
  }
}
