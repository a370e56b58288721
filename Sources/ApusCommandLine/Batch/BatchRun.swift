package import ApusCore

/// Answers the lines of a file.
package struct BatchRun: Sendable {
  /// What came of a run.
  package struct Outcome: Sendable, Equatable {
    /// Lines answered by this run.
    package var answered = 0
    /// Lines that failed in this run.
    package var failed = 0
    /// Lines that an earlier run had done.
    package var skipped = 0
    /// Tokens of the prompts and of the answers of this run.
    package var promptTokens = 0
    package var completionTokens = 0

    /// Nothing.
    package init() {}
  }

  /// Answers the requests.
  package var service: any GenerationService
  /// Sampling for what a line leaves open.
  package var defaults: SamplingParameters
  /// Requests in flight at once.
  package var concurrency: Int
  /// Whether fields without a meaning are skipped instead of refused.
  package var ignoresUnknownFields = false

  /// Prepares a run.
  package init(
    service: any GenerationService, defaults: SamplingParameters, concurrency: Int, ignoresUnknownFields: Bool = false
  ) {
    self.service = service
    self.defaults = defaults
    self.concurrency = concurrency
    self.ignoresUnknownFields = ignoresUnknownFields
  }

  /// Reads lines one after another, keeps `concurrency` of them in flight and writes each answer as it ends. A line that
  /// fails is answered with an error and stops nothing.
  /// - Parameters:
  ///   - lines: gives the next line, `nil` after the last.
  ///   - done: names that an earlier run answered.
  ///   - write: takes each line of output.
  ///   - progress: is told after each line.
  /// - Throws: only where reading or writing fails.
  package func run(
    lines: () throws(CommandFailure) -> [UInt8]?, done: Set<String>, write: (String) throws(CommandFailure) -> Void,
    progress: (Outcome) -> Void = { _ in }
  ) async throws -> Outcome {
    var outcome = Outcome()
    var seen: Set<String> = []
    try await withThrowingTaskGroup(of: Answer.self) { group in
      var inFlight = 0
      var number = 0
      func finish(_ answer: Answer) throws {
        inFlight -= 1
        if answer.isFailure { outcome.failed += 1 } else { outcome.answered += 1 }
        outcome.promptTokens += answer.usage.promptTokens
        outcome.completionTokens += answer.usage.completionTokens
        try write(answer.line.compactText)
        progress(outcome)
      }
      while let bytes = try lines() {
        number += 1
        if bytes.allSatisfy({ $0 == 0x20 || $0 == 0x09 }) { continue }
        let value: JSONValue
        do throws(JSONError) {
          value = try JSONValue.parse(bytes)
        } catch {
          inFlight += 1
          if done.contains("\(number)") {
            inFlight -= 1
            outcome.skipped += 1
            continue
          }
          let failure = EngineError(.invalidRequest, "Line \(number) is not JSON: \(error).")
          try finish(Answer(id: .int(Int64(number)), failure: failure))
          continue
        }
        let id = BatchLine.id(of: value, number: number)
        let name = id.compactText
        if done.contains(name) {
          outcome.skipped += 1
          progress(outcome)
          continue
        }
        if !seen.insert(name).inserted {
          inFlight += 1
          try finish(
            Answer(
              id: id, failure: EngineError(.invalidRequest, "Line \(number) repeats the id \(name).", parameter: "id")))
          continue
        }
        if inFlight >= concurrency, let answer = try await group.next() { try finish(answer) }
        inFlight += 1
        let lineNumber = number
        group.addTask { try await answer(value, number: lineNumber) }
      }
      while let answer = try await group.next() { try finish(answer) }
    }
    return outcome
  }

  /// One line of output with what the counters need of it.
  private struct Answer: Sendable {
    var line: JSONValue
    var usage = Usage()
    var isFailure = false

    init(id: JSONValue, failure: EngineError, metadata: JSONValue? = nil) {
      line = BatchAnswer.line(id: id, error: failure, metadata: metadata)
      isFailure = true
    }

    init(id: JSONValue, result: GenerationResult, metadata: JSONValue?) {
      line = BatchAnswer.line(id: id, result: result, metadata: metadata)
      usage = result.usage
    }
  }

  /// Answers one line. Throws only if the run as a whole must end.
  private func answer(_ value: JSONValue, number: Int) async throws -> Answer {
    let id = BatchLine.id(of: value, number: number)
    var metadata = value["metadata"]
    do throws(EngineError) {
      let line = try BatchLine(
        value, number: number, defaults: defaults, ignoresUnknownFields: ignoresUnknownFields)
      metadata = line.metadata
      let request = Request(prompt: try prompt(of: line), sampling: line.sampling)
      let result = try await service.generate(request).result()
      if case .abort(let reason) = result.finishReason {
        return Answer(id: id, failure: EngineError(.aborted, reason), metadata: metadata)
      }
      return Answer(id: id, result: result, metadata: metadata)
    } catch {
      if Task.isCancelled { throw CancellationError() }
      // An engine that is gone would fail every line that is left; they are for the next run.
      if error.code == .shuttingDown { throw error }
      return Answer(id: id, failure: error, metadata: metadata)
    }
  }

  private func prompt(of line: BatchLine) throws(EngineError) -> Request.Prompt {
    switch line.input {
    case .prompt(let text): return .text(text)
    case .tokens(let tokens): return .tokens(tokens)
    case .messages(let messages, let tools, let variables):
      let text = try service.renderChat(ChatPrompt(messages: messages, tools: tools, variables: variables))
      return .tokens(try service.encode(text, addSpecialTokens: false))
    }
  }
}
