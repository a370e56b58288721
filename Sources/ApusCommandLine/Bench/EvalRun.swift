package import ApusCore

/// Asks the questions of an evaluation, some at a time.
package enum EvalRun {
  /// Asks all questions.
  /// - Parameters:
  ///   - concurrency: questions in flight at most, at least 1.
  ///   - ask: answers a question.
  ///   - progress: is told after each answer.
  /// - Returns: the answers in the order of the questions.
  package static func answers(
    to questions: [EvalQuestion], concurrency: Int, ask: @escaping @Sendable (EvalQuestion) async -> EvalAnswer,
    progress: (EvalAnswer) -> Void = { _ in }
  ) async -> [EvalAnswer] {
    var answers = [EvalAnswer](repeating: EvalAnswer(), count: questions.count)
    await withTaskGroup(of: (Int, EvalAnswer).self) { group in
      func collect(_ result: (Int, EvalAnswer)) {
        answers[result.0] = result.1
        progress(result.1)
      }
      for (index, question) in questions.enumerated() {
        if index >= concurrency, let result = await group.next() { collect(result) }
        group.addTask { (index, await ask(question)) }
      }
      while let result = await group.next() { collect(result) }
    }
    return answers
  }

  /// A service's most likely answer to a question.
  package static func answer(
    to question: EvalQuestion, from service: any GenerationService, maxNewTokens: Int
  ) async -> EvalAnswer {
    var answer = EvalAnswer()
    do throws(EngineError) {
      let prompt: Request.Prompt
      switch question.input {
      case .prompt(let text): prompt = .text(text)
      case .tokens(let tokens): prompt = .tokens(tokens)
      case .messages(let messages, let tools, let variables):
        let text = try service.renderChat(ChatPrompt(messages: messages, tools: tools, variables: variables))
        prompt = .tokens(try service.encode(text, addSpecialTokens: false))
      }
      var sampling = SamplingParameters.greedy
      sampling.maxNewTokens = maxNewTokens
      let result = try await service.generate(Request(prompt: prompt, sampling: sampling)).result()
      answer.text = result.text
      answer.promptTokens = result.usage.promptTokens
      answer.completionTokens = result.usage.completionTokens
      switch result.finishReason {
      case .stop: answer.hasEnded = true
      case .length: break
      case .abort(let reason): answer.error = reason
      }
    } catch {
      answer.error = error.message
    }
    return answer
  }
}

/// What an evaluation found.
package struct EvalReport: Sendable {
  /// How the questions of one skill went.
  package struct Skill: Sendable, Equatable {
    package var name: String
    package var asked = 0
    package var right = 0

    /// A skill of which nothing was asked yet.
    package init(name: String) { self.name = name }

    /// Right answers of a hundred.
    package var score: Double { 100 * Double(right) / Double(max(1, asked)) }
  }

  /// The skills in the order in which the questions bring them.
  package var skills: [Skill] = []
  /// Answers that a stop token ended.
  package var ended = 0
  /// Questions that failed.
  package var failed = 0
  package var promptTokens = 0
  package var completionTokens = 0
  /// Seconds from the first question to the last answer.
  package var seconds: Double

  /// Counts right answers.
  package init(_ questions: [EvalQuestion], _ answers: [EvalAnswer], seconds: Double) {
    self.seconds = seconds
    var places: [String: Int] = [:]
    for (question, answer) in zip(questions, answers) {
      let place = places[question.skill] ?? skills.count
      if place == skills.count {
        places[question.skill] = place
        skills.append(Skill(name: question.skill))
      }
      skills[place].asked += 1
      if question.accepts(answer) { skills[place].right += 1 }
      if answer.hasEnded { ended += 1 }
      if answer.error != nil { failed += 1 }
      promptTokens += answer.promptTokens
      completionTokens += answer.completionTokens
    }
  }

  /// Questions asked.
  package var asked: Int { skills.reduce(0) { $0 + $1.asked } }
  /// Right answers of a hundred, each skill counting the same.
  package var mean: Double { skills.reduce(0) { $0 + $1.score } / Double(max(1, skills.count)) }
  /// Right answers of a hundred, each question counting the same.
  package var overall: Double { 100 * Double(skills.reduce(0) { $0 + $1.right }) / Double(max(1, asked)) }
  /// Answers of a hundred that a stop token ended.
  package var endedShare: Double { 100 * Double(ended) / Double(max(1, asked)) }
  /// Output tokens a second.
  package var throughput: Double { Double(completionTokens) / max(1e-9, seconds) }

  /// The report as a table for people.
  package var table: String {
    let width = max(24, (skills.map(\.name.count).max() ?? 0) + 2)
    var text = "\("Skill".padded(width))\("Right".aligned(8))\("Asked".aligned(8))\("Percent".aligned(9))\n"
    for skill in skills {
      text += "\(skill.name.padded(width))\("\(skill.right)".aligned(8))\("\(skill.asked)".aligned(8))"
      text += "\(fixed(skill.score, 1).aligned(9))\n"
    }
    text += "\n\("Mean of skills (%)".padded(width + 16))\(fixed(mean, 1).aligned(9))\n"
    text += "\("All questions (%)".padded(width + 16))\(fixed(overall, 1).aligned(9))\n"
    text += "\("Ended by itself (%)".padded(width + 16))\(fixed(endedShare, 2).aligned(9))\n"
    if failed > 0 { text += "\("Failed".padded(width + 16))\("\(failed)".aligned(9))\n" }
    text += "\("Output tokens".padded(width + 16))\(grouped(completionTokens).aligned(9))\n"
    text += "\("Output tokens per second".padded(width + 16))\(fixed(throughput, 1).aligned(9))\n"
    return text
  }

  /// The report as JSON, with the names that `training/evaluate.py` uses.
  package var json: JSONObject {
    func rounded(_ value: Double, _ scale: Double) -> JSONValue { .double((value * scale).rounded() / scale) }
    return JSONObject([
      ("scores", .object(JSONObject(skills.map { ($0.name, rounded($0.score, 10)) }))),
      ("asked", .object(JSONObject(skills.map { ($0.name, .int(Int64($0.asked))) }))),
      ("mean", rounded(mean, 10)), ("overall", rounded(overall, 10)), ("ended_by_itself", rounded(endedShare, 100)),
      ("failed", .int(Int64(failed))), ("prompt_tokens", .int(Int64(promptTokens))),
      ("completion_tokens", .int(Int64(completionTokens))), ("seconds", rounded(seconds, 1000)),
      ("output_throughput", rounded(throughput, 10)),
    ])
  }
}
