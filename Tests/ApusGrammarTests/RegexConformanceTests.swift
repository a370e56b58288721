import ApusCore
import ApusGrammar
import Foundation
import Testing

/// The cases of Rust's regex crate that ask for no more than a language.
@Suite("rust-regex cases")
struct RegexConformanceTests {
  private struct Case {
    var name = ""
    var regex: String?
    var haystack: String?
    var isMatch: Bool?
    var isUsable = true
  }

  private static let files = [
    "anchored", "crazy", "empty", "expensive", "flags", "iter", "leftmost-all", "misc", "multiline", "overlapping",
    "regression", "substring", "unicode", "utf8", "word-boundary", "no-unicode", "crlf", "earliest", "line-terminator",
    "fowler/basic", "fowler/nullsubexpr", "fowler/repetition",
  ]

  @Test("Where a pattern matches, the language of texts that hold it takes the text, and only there", arguments: files)
  func cases(_ file: String) throws {
    let path = "conformance/rust-regex/testdata/\(file).toml"
    guard SharedData.exists(path) else { return }
    var checked = 0
    var refused = 0
    for test in Self.parse(try SharedData.text(path)) {
      guard test.isUsable, let regex = test.regex, let haystack = test.haystack, let isMatch = test.isMatch else {
        continue
      }
      let grammar: CompiledGrammar
      do {
        grammar = try .of(Grammar(root: .regular(.pattern(regex, search: true, dialect: .rust))))
      } catch let error as EngineError {
        // A pattern that matches nothing is told by a refusal.
        if error.message.contains("no text") { #expect(!isMatch, "\(file)/\(test.name): \(regex)") }
        #expect(
          error.code == .unsupported || error.code == .invalidRequest && !isMatch || regex.contains("\\p"),
          "\(file)/\(test.name): \(regex): \(error.message)")
        refused += 1
        continue
      }
      checked += 1
      #expect(
        grammar.accepts(haystack) == isMatch, "\(file)/\(test.name): \(regex) on '\(haystack)' must give \(isMatch)")
    }
    print("rust-regex \(file): \(checked) checked, \(refused) refused")
  }

  /// Reads as much TOML as these files use.
  private static func parse(_ text: String) -> [Case] {
    var cases: [Case] = []
    var lines = text.split(separator: "\n", omittingEmptySubsequences: false)[...]
    func unescape(_ text: Substring) -> String? {
      var result = String.UnicodeScalarView()
      var scalars = text.unicodeScalars[...]
      while let scalar = scalars.popFirst() {
        guard scalar == "\\" else {
          result.append(scalar)
          continue
        }
        guard let kind = scalars.popFirst() else { return nil }
        switch kind {
        case "n": result.append("\n")
        case "r": result.append("\r")
        case "t": result.append("\t")
        case "b": result.append("\u{08}")
        case "f": result.append("\u{0C}")
        case "\"", "\\": result.append(kind)
        case "u", "U":
          let count = kind == "u" ? 4 : 8
          guard let value = UInt32(String(scalars.prefix(count)), radix: 16), let scalar = Unicode.Scalar(value) else {
            return nil
          }
          result.append(scalar)
          scalars = scalars.dropFirst(count)
        default: return nil
        }
      }
      return String(result)
    }
    while let line = lines.popFirst() {
      if line == "[[test]]" {
        cases.append(Case())
        continue
      }
      guard let equals = line.range(of: " = "), !cases.isEmpty, !line.hasPrefix("#") else { continue }
      let key = line[..<equals.lowerBound]
      var value = line[equals.upperBound...]
      var current = cases.removeLast()
      defer { cases.append(current) }
      if value.hasPrefix("'''") {
        value = value.dropFirst(3)
        var whole = String(value)
        while !whole.hasSuffix("'''"), let next = lines.popFirst() { whole += "\n" + next }
        if whole.hasPrefix("\n") { whole.removeFirst() }
        value = Substring("'" + whole.dropLast(3) + "'")
        if value.contains("\n") { value = Substring("'" + value.dropFirst().dropLast() + "'") }
      }
      let string: String? =
        value.hasPrefix("'") && value.hasSuffix("'") && value.count > 1
        ? String(value.dropFirst().dropLast())
        : value.hasPrefix("\"") && value.hasSuffix("\"") && value.count > 1
          ? unescape(value.dropFirst().dropLast()) : nil
      switch key {
      case "name": current.name = string ?? ""
      case "regex":
        current.regex = string
        if string == nil { current.isUsable = false }
      case "haystack": current.haystack = string
      case "matches":
        // More than one line holds matches, too.
        current.isMatch = !(value.hasPrefix("[]"))
      case "match-limit", "match-kind", "search-kind": break
      case "anchored", "bounds", "case-insensitive", "unicode", "utf8", "compiles", "unescape", "line-terminator":
        current.isUsable = false
      default: break
      }
    }
    return cases
  }
}
