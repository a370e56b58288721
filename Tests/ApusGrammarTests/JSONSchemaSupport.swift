import ApusCore
import ApusGrammar
import Foundation
import Testing

/// What the tests of JSON Schema share.
enum SchemaTesting {
  /// `../shared/data/conformance` beside the package, or where APUS_SHARED_DATA says.
  static let conformance: URL = {
    if let data = ProcessInfo.processInfo.environment["APUS_SHARED_DATA"] {
      return URL(fileURLWithPath: data).appendingPathComponent("conformance")
    }
    return URL(fileURLWithPath: #filePath).deletingLastPathComponent()
      .appendingPathComponent("../../../shared/data/conformance").standardizedFileURL
  }()

  static let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().appendingPathComponent("../..")
    .standardizedFileURL

  static let hasSuite = has("JSON-Schema-Test-Suite/tests")
  static let hasBenchmark = has("jsonschemabench-dev.jsonl")

  private static func has(_ path: String) -> Bool {
    let found = FileManager.default.fileExists(atPath: conformance.appendingPathComponent(path).path)
    if !found { print("Tests of JSON Schema are skipped: there is no ../shared/data/conformance/\(path).") }
    return found
  }

  static func read(_ url: URL) throws -> JSONValue { try JSONValue.parse(Array(Data(contentsOf: url))) }

  /// An instance as Python's `json.dumps(value, indent=2)` prints it.
  static func pretty(_ value: JSONValue, _ indent: String = "") -> String {
    let inner = indent + "  "
    switch value {
    case .array(let elements) where !elements.isEmpty:
      return "[\n" + elements.map { inner + pretty($0, inner) }.joined(separator: ",\n") + "\n\(indent)]"
    case .object(let object) where !object.isEmpty:
      let members = object.map { inner + JSONValue.string($0.key).compactText + ": " + pretty($0.value, inner) }
      return "{\n" + members.joined(separator: ",\n") + "\n\(indent)}"
    default: return value.compactText
    }
  }

  /// An instance as Python's `json.dumps(value)` prints it.
  static func spaced(_ value: JSONValue) -> String {
    switch value {
    case .array(let elements): return "[" + elements.map(spaced).joined(separator: ", ") + "]"
    case .object(let object):
      return "{" + object.map { JSONValue.string($0.key).compactText + ": " + spaced($0.value) }.joined(separator: ", ")
        + "}"
    default: return value.compactText
    }
  }

  /// Whether a text belongs to a grammar, decided byte by byte by the matcher. A short text is put to the interpreter, too.
  static func answers(_ grammar: Grammar) throws -> (String) -> Bool {
    let compiled = try compiler.compile(grammar)
    return { text in
      let matcher = GrammarMatcher(compiled)
      let answer = matcher.accept(bytes: text.utf8) == text.utf8.count && matcher.isAccepting
      if text.utf8.count <= 120, GrammarInterpreter.accepts(grammar, text) != answer {
        Issue.record("The matcher's answer is \(answer), the interpreter's another: \(text)")
      }
      return answer
    }
  }

  private static let compiler = GrammarCompiler(vocabulary: .none)

  static func accepts(_ grammar: Grammar, _ text: String) throws -> Bool { try answers(grammar)(text) }

  /// Whether a schema accepts an instance in every layout; throws if it is not compiled.
  static func accepts(_ schema: String, _ instance: JSONValue, _ options: JSONSchemaOptions = .init()) throws -> Bool {
    let grammar = try JSONSchemaCompiler.compile(text: schema, options).grammar
    return try accepts(grammar, instance.compactText)
  }
}
