import ApusCore
import ApusGrammar
import Foundation
import Testing

/// The official test suite and a sample of real schemas, where they are at hand.
@Suite("JSON Schema conformance", .serialized)
struct JSONSchemaConformanceTests {
  struct Draft: Sendable, CustomTestStringConvertible {
    var folder: String
    var identifier: String
    var testDescription: String { folder }
  }

  static let drafts = [
    Draft(folder: "draft2020-12", identifier: "https://json-schema.org/draft/2020-12/schema"),
    Draft(folder: "draft2019-09", identifier: "https://json-schema.org/draft/2019-09/schema"),
    Draft(folder: "draft7", identifier: "http://json-schema.org/draft-07/schema#"),
    Draft(folder: "draft6", identifier: "http://json-schema.org/draft-06/schema#"),
    Draft(folder: "draft4", identifier: "http://json-schema.org/draft-04/schema#"),
  ]

  /// What became of a file's tests.
  struct Tally {
    var passed = 0
    var refused = 0
    var failures: [String] = []
    /// Reasons of refusals with how often they occurred.
    var reasons: [String: Int] = [:]
  }

  /// Runs one file of the suite. A test passes if both the compact and the pretty-printed instance get the right answer.
  static func run(_ file: URL, _ draft: Draft, assertsFormats: Bool) throws -> Tally {
    var tally = Tally()
    for group in try SchemaTesting.read(file).arrayValue ?? [] {
      guard var schema = group["schema"], let tests = group["tests"]?.arrayValue else { continue }
      // The suite's schemas are meant for the draft of their folder.
      if case .object(var object) = schema, object["$schema"] == nil {
        object["$schema"] = .string(draft.identifier)
        schema = .object(object)
      }
      var options = JSONSchemaOptions()
      options.assertsFormats = assertsFormats
      var grammar: Grammar?
      do throws(JSONSchemaError) {
        grammar = try JSONSchemaCompiler.compile(schema, options).grammar
      } catch {
        // A schema that nothing satisfies is refused, too; its instances are all invalid.
        guard error.kind == .unsatisfiable else {
          tally.refused += tests.count
          tally.reasons[kind(error), default: 0] += tests.count
          continue
        }
      }
      let accepts = try grammar.map { try SchemaTesting.answers($0) } ?? { _ in false }
      for test in tests {
        let isValid = test["valid"] == .bool(true)
        let instance = test["data"]!
        let answers = [instance.compactText, SchemaTesting.pretty(instance)].map(accepts)
        if answers == [isValid, isValid] {
          tally.passed += 1
        } else {
          tally.failures.append(
            "\(group["description"]?.stringValue ?? "") / \(test["description"]?.stringValue ?? ""): "
              + (isValid ? "valid, rejected" : "invalid, accepted"))
        }
      }
    }
    return tally
  }

  /// A refusal's reason without what is particular to one schema.
  private static func kind(_ error: JSONSchemaError) -> String {
    if error.reason.contains("lies outside this document") { return "remote reference" }
    if error.reason.contains("the dialect") { return "unknown dialect" }
    if error.reason.contains("uniqueItems") { return "uniqueItems over many possible values" }
    if error.reason.contains("how many elements an array contains") { return "several contains at once" }
    if error.reason.contains("multiples of") { return "multipleOf of too many digits" }
    if error.reason.contains("the format") { return "format that is not regular" }
    return error.reason
  }

  @Test("The suite's required tests: no failures", .enabled(if: SchemaTesting.hasSuite), arguments: drafts)
  func suite(_ draft: Draft) throws {
    let folder = SchemaTesting.conformance.appendingPathComponent("JSON-Schema-Test-Suite/tests/\(draft.folder)")
    for file in try Self.files(folder) {
      let tally = try Self.run(file, draft, assertsFormats: false)
      for failure in tally.failures { Issue.record("\(draft.folder)/\(file.lastPathComponent): \(failure)") }
    }
  }

  private static func files(_ folder: URL) throws -> [URL] {
    try FileManager.default.contentsOfDirectory(at: folder, includingPropertiesForKeys: nil)
      .filter { $0.pathExtension == "json" }.sorted { $0.lastPathComponent < $1.lastPathComponent }
  }

  /// Tests of formats that ask for more than a finite automaton: labels that IDNA would have to judge are left out.
  static let exceptions: Set<String> = ["hostname.json", "idn-email.json"]

  @Test("The suite's tests of formats: nothing invalid is accepted", .enabled(if: SchemaTesting.hasSuite))
  func formats() throws {
    let folder = SchemaTesting.conformance.appendingPathComponent(
      "JSON-Schema-Test-Suite/tests/draft2020-12/optional/format")
    for file in try Self.files(folder) {
      let tally = try Self.run(file, Self.drafts[0], assertsFormats: true)
      for failure in tally.failures {
        if Self.exceptions.contains(file.lastPathComponent), failure.hasSuffix("valid, rejected") { continue }
        Issue.record("\(file.lastPathComponent): \(failure)")
      }
    }
  }

  @Test("The table in docs/json-schema.md is the suite's result", .enabled(if: SchemaTesting.hasSuite))
  func table() throws {
    var lines = [
      "| keyword | 2020-12: passed | refused | failed | 7: passed | refused | failed |",
      "|---|---|---|---|---|---|---|",
    ]
    var rows: [String: [Tally?]] = [:]
    var reasons: [String: Int] = [:]
    for (index, draft) in [Self.drafts[0], Self.drafts[2]].enumerated() {
      let folder = SchemaTesting.conformance.appendingPathComponent("JSON-Schema-Test-Suite/tests/\(draft.folder)")
      for file in try Self.files(folder) {
        let tally = try Self.run(file, draft, assertsFormats: false)
        rows[file.deletingPathExtension().lastPathComponent, default: [nil, nil]][index] = tally
        reasons.merge(tally.reasons) { $0 + $1 }
      }
    }
    func cells(_ tally: Tally?) -> String {
      tally.map { "\($0.passed) | \($0.refused) | \($0.failures.count)" } ?? "| |"
    }
    for (keyword, tallies) in rows.sorted(by: { $0.key < $1.key }) {
      lines.append("| \(keyword) | \(cells(tallies[0])) | \(cells(tallies[1])) |")
    }
    func total(_ index: Int) -> String {
      let tallies = rows.values.compactMap { $0[index] }
      return "\(tallies.map(\.passed).reduce(0, +)) | \(tallies.map(\.refused).reduce(0, +)) | "
        + "\(tallies.map(\.failures.count).reduce(0, +))"
    }
    lines.append("| **all** | \(total(0)) | \(total(1)) |")
    lines += ["", "Refusals by reason, both drafts:", ""]
    for (reason, count) in reasons.sorted(by: { ($1.value, $0.key) < ($0.value, $1.key) }) {
      lines.append("- \(reason): \(count)")
    }
    let table = lines.joined(separator: "\n")
    let page = SchemaTesting.root.appendingPathComponent("docs/json-schema.md")
    let text = try String(contentsOf: page, encoding: .utf8)
    let parts = text.components(separatedBy: "<!-- table -->")
    try #require(parts.count == 3)
    if ProcessInfo.processInfo.environment["APUS_WRITE_DOCS"] != nil {
      try [parts[0], "\n" + table + "\n", parts[2]].joined(separator: "<!-- table -->")
        .write(to: page, atomically: true, encoding: .utf8)
    } else {
      #expect(
        parts[1].trimmingCharacters(in: .whitespacesAndNewlines) == table,
        "Scripts/json_schema_table.sh writes the table anew.")
    }
  }

  @Test("Real schemas: right answers, few refusals", .enabled(if: SchemaTesting.hasBenchmark))
  func benchmark() throws {
    // APUS_ALL_SCHEMAS runs all 1,500; without it a tenth keeps the suite fast.
    let step = ProcessInfo.processInfo.environment["APUS_ALL_SCHEMAS"] == nil ? 10 : 1
    let bytes = try Data(contentsOf: SchemaTesting.conformance.appendingPathComponent("jsonschemabench-dev.jsonl"))
    var compiled = 0
    var refused: [String] = []
    for (index, line) in bytes.split(separator: 0x0A).enumerated() where index % step == 0 {
      let entry = try JSONValue.parse(Array(line))
      let name = entry["name"]?.stringValue ?? ""
      let grammar: Grammar
      do throws(JSONSchemaError) {
        grammar = try JSONSchemaCompiler.compile(entry["schema"]!).grammar
      } catch {
        refused.append("\(name): \(error)")
        continue
      }
      compiled += 1
      let accepts = try SchemaTesting.answers(grammar)
      for (number, test) in (entry["tests"]?.arrayValue ?? []).enumerated() {
        let isValid = test["valid"] == .bool(true)
        for text in [SchemaTesting.spaced(test["data"]!), SchemaTesting.pretty(test["data"]!)] {
          let answer = accepts(text)
          #expect(answer == isValid, "\(name), instance \(number)")
        }
      }
    }
    let share = Double(compiled) / Double(compiled + refused.count)
    print("Of \(compiled + refused.count) real schemas, \(compiled) are compiled.")
    #expect(share >= 0.97, "\(refused.joined(separator: "\n"))")
  }
}

/// Random schemas and instances, judged by the Python package jsonschema (`Scripts/golden_json_schema.py`).
@Suite("JSON Schema, random schemas")
struct JSONSchemaRandomTests {
  @Test("Answers are those of another implementation, and few schemas are refused")
  func goldens() throws {
    let file = SchemaTesting.root.appendingPathComponent("Tests/ApusGrammarTests/Goldens/json_schema_random.jsonl")
    var count = 0
    var refused: [String] = []
    for line in try Data(contentsOf: file).split(separator: 0x0A) {
      let entry = try JSONValue.parse(Array(line))
      let schema = entry["schema"]!
      count += 1
      var grammar: Grammar?
      do throws(JSONSchemaError) {
        grammar = try JSONSchemaCompiler.compile(schema).grammar
      } catch {
        if error.kind != .unsatisfiable {
          refused.append("\(error)")
          continue
        }
      }
      let answer: (String) -> Bool
      do {
        answer = try grammar.map { try SchemaTesting.answers($0) } ?? { _ in false }
      } catch {
        Issue.record("\(error): \(schema.compactText)")
        continue
      }
      for instance in entry["valid"]?.arrayValue ?? [] where !answer(SchemaTesting.spaced(instance)) {
        Issue.record("\(instance.compactText) is valid under \(schema.compactText)")
      }
      for instance in entry["invalid"]?.arrayValue ?? [] where answer(SchemaTesting.spaced(instance)) {
        Issue.record("\(instance.compactText) is invalid under \(schema.compactText)")
      }
    }
    #expect(count > 200)
    if refused.count * 10 > count { Issue.record("\(refused.count) of \(count) are refused: \(refused.prefix(20))") }
  }
}
