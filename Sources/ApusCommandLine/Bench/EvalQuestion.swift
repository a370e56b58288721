package import ApusCore

/// A question of an evaluation file: what the model is given, and what makes an answer right.
///
/// A line is an object with `messages` (and `tools` and `enable_thinking`), `prompt` (text) or `input_ids`; `match`, one of
/// the rules below; `answer`, or `words` for `contains`; and `skill`, under which it is counted. `training/evaluate.py`
/// writes such files and holds the same rules.
package struct EvalQuestion: Sendable, Equatable {
  /// When an answer is right.
  package enum Rule: Sendable, Equatable {
    /// It is this text, white space at both ends aside.
    case exact(String)
    /// It is this JSON value, whatever its spaces and the order of its keys.
    case json(JSONValue)
    /// Every one of these words occurs in it.
    case contains([String])
    /// It is one call of a tool: an object with `name` and `arguments`, equal as JSON.
    case tool(JSONValue)
  }

  /// What the question is counted under.
  package var skill: String
  /// What the model is given.
  package var input: BatchLine.Input
  /// When an answer is right.
  package var rule: Rule

  /// Reads a line.
  /// - Parameter number: the line's number, counting from 1, for errors.
  /// - Throws: `invalidRequest` with the line and the field at fault.
  package init(_ value: JSONValue, number: Int) throws(EngineError) {
    func refuse(_ field: String, _ what: String) -> EngineError {
      EngineError(.invalidRequest, "Line \(number): \(field) \(what).", parameter: field)
    }
    guard let object = value.objectValue else {
      throw EngineError(.invalidRequest, "Line \(number) must be a JSON object, got \(value.kindName).")
    }
    skill = object["skill"]?.stringValue ?? "all"
    let inputs = ["messages", "prompt", "input_ids"].filter { object[$0].map { !$0.isNull } ?? false }
    guard inputs.count == 1, let given = object[inputs[0]] else {
      throw refuse("messages", "or 'prompt' or 'input_ids', exactly one of them, must be given")
    }
    switch inputs[0] {
    case "messages":
      guard let messages = given.arrayValue, !messages.isEmpty else {
        throw refuse("messages", "must be an array with at least one message")
      }
      var variables: [String: JSONValue] = [:]
      if let thinks = object["enable_thinking"], !thinks.isNull {
        guard thinks.boolValue != nil else { throw refuse("enable_thinking", "must be true or false") }
        variables["enable_thinking"] = thinks
      }
      input = .messages(given, tools: object["tools"]?.nonNull, variables: variables)
    case "prompt":
      guard let text = given.stringValue else { throw refuse("prompt", "must be a string, got \(given.kindName)") }
      input = .prompt(text)
    default:
      let ids = (given.arrayValue ?? []).compactMap { $0.intValue.flatMap { TokenID(exactly: $0) } }
      guard !ids.isEmpty, ids.count == given.arrayValue?.count else {
        throw refuse("input_ids", "must be an array of token ids")
      }
      input = .tokens(ids)
    }
    let answer = object["answer"]
    switch object["match"]?.stringValue ?? "exact" {
    case "exact":
      guard let text = answer?.stringValue else { throw refuse("answer", "must be a string for 'exact'") }
      rule = .exact(trimmed(text))
    case "json":
      guard let answer else { throw refuse("answer", "is missing") }
      if let text = answer.stringValue {
        guard let parsed = try? JSONValue.parse(text) else { throw refuse("answer", "is not JSON") }
        rule = .json(parsed)
      } else {
        rule = .json(answer)
      }
    case "contains":
      let words = (object["words"]?.arrayValue ?? []).compactMap(\.stringValue)
      guard !words.isEmpty, words.count == object["words"]?.arrayValue?.count else {
        throw refuse("words", "must be an array of strings for 'contains'")
      }
      rule = .contains(words)
    case "tool":
      guard let answer, answer["name"]?.stringValue != nil, answer["arguments"] != nil else {
        throw refuse("answer", "must be an object with 'name' and 'arguments' for 'tool'")
      }
      rule = .tool(answer)
    case let other:
      throw refuse("match", "must be 'exact', 'json', 'contains' or 'tool', got '\(other)'")
    }
  }

  /// Reads a file's lines; empty ones are skipped.
  package static func read(_ bytes: [UInt8]) throws(EngineError) -> [EvalQuestion] {
    var questions: [EvalQuestion] = []
    for (index, line) in bytes.split(separator: 0x0A, omittingEmptySubsequences: false).enumerated() {
      if line.allSatisfy({ $0 == 0x20 || $0 == 0x09 || $0 == 0x0D }) { continue }
      let value: JSONValue
      do throws(JSONError) {
        value = try JSONValue.parse(Array(line))
      } catch {
        throw EngineError(.invalidRequest, "Line \(index + 1) is not JSON: \(error).")
      }
      questions.append(try EvalQuestion(value, number: index + 1))
    }
    return questions
  }

  /// Whether an answer is right. What the model thought, up to `</think>`, does not count, and an answer that did not end
  /// by itself is wrong.
  package func accepts(_ answer: EvalAnswer) -> Bool {
    guard answer.hasEnded, answer.error == nil else { return false }
    let text = trimmed(afterLast("</think>", in: answer.text))
    switch rule {
    case .exact(let wanted): return text.utf8.elementsEqual(wanted.utf8)
    case .contains(let words): return words.allSatisfy { firstIndex(of: Array($0.utf8), in: Array(text.utf8)) != nil }
    case .json(let wanted): return (try? JSONValue.parse(text)).map { isSame($0, wanted) } ?? false
    case .tool(let wanted):
      if let call = answer.call { return isSame(call, wanted) }
      let (start, end) = ("<tool_call>\n", "\n</tool_call>")
      guard text.utf8.count >= start.utf8.count + end.utf8.count, text.hasPrefix(start), text.hasSuffix(end) else {
        return false
      }
      let inner = text.utf8.dropFirst(start.utf8.count).dropLast(end.utf8.count)
      return (try? JSONValue.parse(Array(inner))).map { isSame($0, wanted) } ?? false
    }
  }
}

/// What a model said to a question.
package struct EvalAnswer: Sendable, Equatable {
  /// The text, reasoning included.
  package var text = ""
  /// The only call of a tool, where a server has parsed it: `name` and `arguments`.
  package var call: JSONValue?
  /// Whether a stop token ended it.
  package var hasEnded = false
  /// Tokens of the prompt and of the answer.
  package var promptTokens = 0
  package var completionTokens = 0
  /// Why there is no answer.
  package var error: String?

  /// Nothing said yet.
  package init() {}
}

/// Whether two JSON values are equal, where 1 and 1.0 are the same number.
private func isSame(_ left: JSONValue, _ right: JSONValue) -> Bool {
  switch (left, right) {
  case (.int(let integer), .double(let number)), (.double(let number), .int(let integer)):
    return number == Double(integer)
  case (.string(let left), .string(let right)): return left.utf8.elementsEqual(right.utf8)
  case (.array(let left), .array(let right)):
    return left.count == right.count && zip(left, right).allSatisfy { isSame($0, $1) }
  case (.object(let left), .object(let right)):
    return left.count == right.count
      && left.keys.allSatisfy { key in right[key].map { isSame(left[key]!, $0) } ?? false }
  default: return left == right
  }
}

/// The text without white space at its ends.
private func trimmed(_ text: String) -> String {
  var scalars = text.unicodeScalars[...]
  while let first = scalars.first, first.properties.isWhitespace { scalars.removeFirst() }
  while let last = scalars.last, last.properties.isWhitespace { scalars.removeLast() }
  return String(scalars)
}

/// The part of a text after the last occurrence of a mark, or all of it.
private func afterLast(_ mark: String, in text: String) -> String {
  var bytes = Array(text.utf8)
  let mark = Array(mark.utf8)
  while let index = firstIndex(of: mark, in: bytes) { bytes.removeFirst(index + mark.count) }
  return String(decoding: bytes, as: UTF8.self)
}

/// Where bytes first occur in others.
private func firstIndex(of needle: [UInt8], in haystack: [UInt8]) -> Int? {
  guard needle.count <= haystack.count else { return nil }
  return (0...(haystack.count - needle.count)).first { haystack[$0...].starts(with: needle) }
}
