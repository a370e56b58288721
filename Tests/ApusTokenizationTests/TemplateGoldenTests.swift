import ApusCore
import ApusTokenization
import Foundation
import Testing

private let packageRoot = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
  .deletingLastPathComponent()
private let sharedData = packageRoot.deletingLastPathComponent().appendingPathComponent("shared/data")
private let goldenFile = sharedData.appendingPathComponent("goldens/chat_template_renders.json")
private let harmonyTemplate = sharedData.appendingPathComponent("tokenizers/config-only/gpt-oss/chat_template.jinja")

private let hasGoldens: Bool = {
  let exists = FileManager.default.fileExists(atPath: goldenFile.path)
  if !exists { print("Skipping the goldens of real templates: \(goldenFile.path) is not there.") }
  return exists
}()

private let noon: ChatTemplate.Clock = { .init(year: 2026, month: 1, day: 15, hour: 12) }

private func read(_ file: URL) throws -> [UInt8] { Array(try Data(contentsOf: file)) }

@Suite("Goldens of templates")
struct TemplateGoldenTests {
  @Test("Real templates render as jinja2 renders them, with the errors they raise", .enabled(if: hasGoldens))
  func realTemplates() throws {
    let goldens = try JSONValue.parse(try read(goldenFile))
    let inputs = try #require(goldens["inputs"]?.objectValue)
    var checked = 0
    for result in try #require(goldens["results"]?.arrayValue) {
      guard let cases = result["cases"]?.objectValue, let name = result["template"]?.stringValue else { continue }
      let parts = name.split(separator: "#")
      let bytes = try read(sharedData.appendingPathComponent(String(parts[0])))
      var source = String(decoding: bytes, as: UTF8.self)
      if parts.count > 1 {
        let configuration = try JSONValue.parse(bytes)
        source = try #require(
          configuration["chat_template"]?.stringValue
            ?? configuration["chat_template"]?.arrayValue?.first { $0["name"] == "default" }?["template"]?.stringValue)
      }
      var template = try ChatTemplate(source: source)
      template.clock = noon
      for (input, expected) in cases {
        var variables = try #require(result["vars"]?.objectValue)
        for (key, value) in try #require(inputs[input]?.objectValue) { variables[key] = value }
        variables["add_generation_prompt"] = true
        do {
          let rendered = try template.renderFaulting(variables)
          #expect(expected["rendered"]?.stringValue == rendered, "\(name), \(input)")
        } catch {
          #expect(expected["error"]?.stringValue == "\(error)", "\(name), \(input)")
        }
        checked += 1
      }
    }
    #expect(checked > 300)
  }

  /// Random cases written by `Scripts/golden_templates.py generate`.
  @Test("Random templates render as jinja2 renders them")
  func randomTemplates() throws {
    let file = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
      .appendingPathComponent("Fixtures/template_cases.jsonl")
    let lines = String(decoding: try read(file), as: UTF8.self).split(separator: "\n")
    #expect(lines.count > 300)
    var refused = 0
    for line in lines {
      let golden = try JSONValue.parse(String(line))
      let source = try #require(golden["template"]?.stringValue)
      let expected = golden["rendered"]?.stringValue ?? golden["error"]?.stringValue
      guard var template = try? ChatTemplate(source: source) else {
        #expect(expected?.hasPrefix("Compile:") == true, "\(line)")
        continue
      }
      template.clock = noon
      do {
        let rendered = try template.renderFaulting(try #require(golden["vars"]?.objectValue))
        #expect(golden["rendered"]?.stringValue == rendered, "\(line)")
      } catch let error as TemplateFault {
        if error.kind == "Unsupported" {
          refused += 1
          continue
        }
        // The kind of the failure; its wording differs in a few places.
        let kind = golden["error"]?.stringValue?.split(separator: ":").first.map(String.init)
        #expect(kind == error.kind, "\(error) for \(line)")
      }
    }
    // Integers beyond 64 bits and the like, refused with a sentence.
    #expect(refused <= 3)
  }

  @Test("gpt-oss: the template writes the harmony format", .enabled(if: hasGoldens))
  func harmony() throws {
    var template = try ChatTemplate(source: String(decoding: try read(harmonyTemplate), as: UTF8.self))
    template.clock = { .init(year: 2025, month: 6, day: 28) }
    for effort in ["low", "medium", "high"] {
      let prompt = ChatPrompt(
        messages: [
          ["role": "system", "content": "Answer the user's questions like a robot."],
          ["role": "user", "content": "What is the capital of the largest country in the world?"],
        ], variables: ["reasoning_effort": .string(effort)])
      let rendered = try template.render(prompt)
      // This release of the template words the system message otherwise than the reference library in three places:
      // it always writes the date and the line on tools, and begins "reasoning" with a small letter.
      let adapted = rendered.replacingOccurrences(of: "Current date: 2025-06-28\n", with: "")
        .replacingOccurrences(of: "\nCalls to these tools must go to the commentary channel: 'functions'.", with: "")
        .replacingOccurrences(of: "\nreasoning:", with: "\nReasoning:")
      let golden = sharedData.appendingPathComponent(
        "tokenizers/harmony-goldens/test_simple_convo_\(effort)_effort.txt")
      #expect(adapted == String(decoding: try read(golden), as: UTF8.self), "\(effort)")
    }
  }
}
