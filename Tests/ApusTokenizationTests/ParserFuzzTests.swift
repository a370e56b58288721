import ApusCore
import ApusTesting
import ApusTokenization
import Foundation
import Testing

/// Parsers over damaged input: whatever comes, they answer with a value or with an error that says why, in bounded time
/// and memory. `Scripts/fuzz.sh` runs each for ten minutes.
@Suite("Fuzz: parsers of text")
struct ParserFuzzTests {
  /// Reads an input and uses what comes of it; an error must be of the kind that blames the input.
  private func attempt(_ body: () throws -> Void) {
    do {
      try body()
    } catch let error as EngineError {
      #expect(error.code != .internalFailure && !error.message.isEmpty, "\(error)")
    } catch {
      Issue.record("\(error)")
    }
  }

  private func use(_ tokenizer: Tokenizer) throws {
    _ = try tokenizer.encode("Hello the world 123 \u{E9}\u{301} 北京😀 <s>  ▁\n")
    _ = tokenizer.decode((0..<Int32(min(40, tokenizer.vocabularySize))))
  }

  @Test func tokenizerJSON() throws {
    let documents = try tokenizerGoldens.split(separator: "\n").map { line in
      Array(try JSONValue.parse(String(line))["tokenizer"]!.compactText.utf8)
    }
    let words = [
      #""type":"Sequence""#, #""type":"Split""#, #""type":"Replace""#, #""normalizer":"#, #""Regex":"(a|b)*""#, "null",
      "{}",
      "[]", #""merges":["#, #""vocab":{"#, #""lstrip":true,"#, "\\u0000", "1e9", #""<0x00>""#,
      #""byte_fallback":true,"#,
    ]
    let report = fuzz("tokenizer.json") { generator in
      let damaged = generator.mutated(generator.pick(documents), words: words)
      attempt { try use(Tokenizer(json: damaged, name: "damaged.json")) }
    }
    #expect(report.isBounded, "\(report)")
  }

  /// Writes a message of protocol buffers.
  private struct Message {
    var bytes: [UInt8] = []
    private mutating func varint(_ value: UInt64) {
      var value = value
      while value >= 0x80 {
        bytes.append(UInt8(truncatingIfNeeded: value) | 0x80)
        value >>= 7
      }
      bytes.append(UInt8(value))
    }
    mutating func integer(_ field: UInt64, _ value: UInt64) {
      varint(field << 3)
      varint(value)
    }
    mutating func bytes(_ field: UInt64, _ value: [UInt8]) {
      varint(field << 3 | 2)
      varint(UInt64(value.count))
      bytes += value
    }
    mutating func float(_ field: UInt64, _ value: Float) {
      varint(field << 3 | 5)
      withUnsafeBytes(of: value.bitPattern.littleEndian) { bytes += $0 }
    }
  }

  /// A SentencePiece model of a few pieces.
  private func sentencePieceModel(kind: UInt64) -> [UInt8] {
    var model = Message()
    let pieces: [(String, Float, UInt64)] =
      [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), ("<user>", 0, 4)]
      + (0..<256).map { ("<0x" + String(format: "%02X", $0) + ">", 0, 6) }
      + [("▁", -1, 1), ("▁the", -2, 1), ("t", -3, 1), ("h", -3.5, 1), ("e", -4, 1), ("th", -5, 1), ("▁t", -6, 1)]
    for (text, score, type) in pieces {
      var piece = Message()
      piece.bytes(1, Array(text.utf8))
      piece.float(2, score)
      piece.integer(3, type)
      model.bytes(1, piece.bytes)
    }
    var trainer = Message()
    trainer.integer(3, kind)
    trainer.integer(35, 1)
    model.bytes(2, trainer.bytes)
    var normalizer = Message()
    normalizer.bytes(1, Array("identity".utf8))
    normalizer.integer(3, 1)
    normalizer.integer(4, 1)
    model.bytes(3, normalizer.bytes)
    return model.bytes
  }

  /// Writes bytes to a file and loads them as a tokenizer.
  private func load(_ bytes: [UInt8], _ name: String, _ folder: String) throws {
    let path = folder + "/" + name
    try Data(bytes).write(to: URL(fileURLWithPath: path))
    try use(try Tokenizer.load(file: path))
  }

  private func withFolder(_ body: (String) throws -> Void) throws {
    let folder = NSTemporaryDirectory() + "apus-fuzz-" + UUID().uuidString
    try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(atPath: folder) }
    try body(folder)
  }

  @Test func sentencePiece() throws {
    try withFolder { folder in
      let models = [1, 2, 3, 4].map { sentencePieceModel(kind: $0) }
      for model in models[0..<2] { #expect(throws: Never.self) { try load(model, "whole.model", folder) } }
      let report = fuzz("SentencePiece") { generator in
        let damaged = generator.mutated(generator.pick(models))
        attempt { try load(damaged, "damaged.model", folder) }
      }
      #expect(report.isBounded, "\(report)")
    }
  }

  @Test func tiktoken() throws {
    try withFolder { folder in
      var text = ""
      for byte in 0..<256 { text += Data([UInt8(byte)]).base64EncodedString() + " \(byte)\n" }
      for (index, word) in ["th", "the", " t", " the", "é", "in"].enumerated() {
        text += Data(word.utf8).base64EncodedString() + " \(256 + index)\n"
      }
      let whole = Array(text.utf8)
      #expect(throws: Never.self) { try load(whole, "whole.tiktoken", folder) }
      let report = fuzz("tiktoken") { generator in
        let damaged = generator.mutated(whole, words: [" ", "\n", "==", "AAAA", "\r\n"])
        attempt { try load(damaged, "damaged.tiktoken", folder) }
      }
      #expect(report.isBounded, "\(report)")
    }
  }

  @Test func gguf() throws {
    func number<T: FixedWidthInteger>(_ value: T) -> [UInt8] { withUnsafeBytes(of: value.littleEndian) { Array($0) } }
    func text(_ text: String) -> [UInt8] { number(UInt64(text.utf8.count)) + text.utf8 }
    func texts(_ list: [String]) -> [UInt8] {
      number(UInt32(8)) + number(UInt64(list.count)) + list.flatMap { text($0) }
    }
    let letters = (0..<256).map { byte -> String in
      // The byte alphabet: printable bytes stand for themselves, the others for letters from U+0100 on.
      let printable = (0x21...0x7E).contains(byte) || (0xA1...0xAC).contains(byte) || (0xAE...0xFF).contains(byte)
      let others = (0..<byte).filter {
        !((0x21...0x7E).contains($0) || (0xA1...0xAC).contains($0) || (0xAE...0xFF).contains($0))
      }.count
      return String(Unicode.Scalar(UInt32(printable ? byte : 0x100 + others))!)
    }
    let whole = GGUFTokenizerTests.file([
      ("tokenizer.ggml.model", 8, text("gpt2")), ("tokenizer.ggml.pre", 8, text("gpt-2")),
      ("tokenizer.ggml.tokens", 9, texts(letters + ["th", "the"])),
      ("tokenizer.ggml.merges", 9, texts(["t h", "th e"])),
      (
        "tokenizer.ggml.token_type", 9,
        number(UInt32(5)) + number(UInt64(258)) + (0..<258).flatMap { _ in number(Int32(1)) }
      ),
      ("tokenizer.ggml.bos_token_id", 4, number(UInt32(1))),
      ("tokenizer.chat_template", 8, text("{% for m in messages %}{{ m.content }}{% endfor %}")),
    ])
    try withFolder { folder in
      #expect(throws: Never.self) { try load(whole, "whole.gguf", folder) }
      let report = fuzz("GGUF header and tokenizer") { generator in
        let damaged = generator.mutated(whole)
        attempt { try damaged.withUnsafeBytes { _ = try GGUFHeader($0, path: "damaged.gguf") } }
        attempt { try load(damaged, "damaged.gguf", folder) }
        attempt { _ = try ChatTemplateSet(gguf: folder + "/damaged.gguf") }
      }
      #expect(report.isBounded, "\(report)")
    }
  }

  @Test func jinja() throws {
    let fixture = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
      .appendingPathComponent("Fixtures/template_cases.jsonl")
    let lines = String(decoding: try Data(contentsOf: fixture), as: UTF8.self).split(separator: "\n")
    let cases = try lines.map { try JSONValue.parse(String($0)) }
    let words = [
      "{{", "}}", "{%", "%}", "{#", "#}", "{%-", "-%}", " if ", " for x in range(1000000000) ", " * 99999999",
      "|tojson",
      "|join(s)", " loop(", "**", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "%1000000000d", "|center(10**9)",
      "namespace()",
      "|indent(1000000)", ".format(", ".__class__", "|map(attribute='", "[::-1]", "{% endfor %}", "|batch(0)",
      "'\\N{DASH}'",
    ]
    let report = fuzz("Jinja") { generator in
      let golden = generator.pick(cases)
      let source = golden["template"]?.stringValue ?? ""
      let damaged = String(decoding: generator.mutated(Array(source.utf8), words: words), as: UTF8.self)
      attempt {
        var template = try ChatTemplate(source: damaged)
        template.limits.steps = 20_000
        template.limits.outputBytes = 1 << 20
        _ = try template.render(golden["vars"]?.objectValue ?? JSONObject())
      }
    }
    #expect(report.isBounded, "\(report)")
  }

  @Test func harmony() throws {
    let whole = Array(
      #"{"harmony_messages":[{"role":"system","content":[{"type":"system_content","model_identity":"x","tools":{"b":{"name":"b","tools":[{"name":"f","description":"d","parameters":{"type":"object","properties":{"p":{"oneOf":[{"type":"array","items":{"type":"string","default":1.5}}],"default":[1]}}}}]}}}]},{"role":"assistant","content":"hi","channel":"analysis"}],"messages":[{"role":"user","content":"q"},{"role":"assistant","tool_calls":[{"id":"1","function":{"name":"f","arguments":"{}"}}]},{"role":"tool","content":[{"type":"text","text":"r"}]}],"tools":[{"function":{"name":"f","parameters":{}}}]}"#
        .utf8)
    let words = [
      #""oneOf":["#, #""type":"object","#, #""properties":{"#, "harmony_messages", "null", "[[[[", #""role":"tool","#,
    ]
    let markers = [
      "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "assistant", " to=", "functions.f", " ",
    ]
    let command = RenderCommand(ChatTemplateSet(.harmony))
    let report = fuzz("Harmony") { generator in
      let damaged = generator.mutated(whole, words: words)
      attempt { _ = try command.render(damaged) }
      let text = (0..<generator.below(12)).map { _ in generator.pick(markers) }.joined()
      attempt { _ = try HarmonyParser.messages(of: text, role: generator.below(2) == 0 ? nil : .assistant) }
    }
    #expect(report.isBounded, "\(report)")
  }

  @Test func json() throws {
    let whole = Array(
      #"{"a":[1,-2.5e-3,true,false,null,{"b":"\u00e9\ud83d\ude00\n\"x\""}],"":[],"k":{"k":{"k":[[[0]]]}},"n":12345678901234567890}"#
        .utf8)
    let words = ["{", "[", "\"", "\\u", "\\ud800", "1e999", "-", "0x", "NaN", ",", ":", "\u{FEFF}", "//", "''"]
    let report = fuzz("JSON") { generator in
      var damaged = generator.mutated(whole, words: words)
      if generator.below(50) == 0 {
        damaged = Array(repeating: generator.pick([0x5B, 0x7B, 0x22]), count: generator.below(100_000))
      }
      do throws(JSONError) {
        let value = try JSONValue.parse(damaged)
        // What can be read can be written and read again.
        let text = value.compactText
        let again = try? JSONValue.parse(text)
        #expect(again?.compactText == text)
      } catch {
        #expect(error.offset >= 0 && error.offset <= damaged.count && !error.message.isEmpty)
      }
    }
    #expect(report.isBounded, "\(report)")
  }

  @Test func patterns() throws {
    let pieces = [
      "a", "b", ".", "\\w", "\\s+", "\\p{L}", "\\p{^Lu}", "[^a-z]", "[a&&[^b]]", "(", ")", "(?:", "(?i:", "(?=", "(?!",
      "(?<=", "(?<!",
      "(?>", "|", "*", "+", "?", "++", "*?", "{2,5}", "{1000000}", "{,3}", "\\1", "^", "$", "\\b", "\\G", "\\X", "\\R",
      "[[:alpha:]]", "]",
      "[", "\\", "\\x{1F600}", "é", "(?<n>", "\\k<n>", "\\u00e9", "(?#", "\\Q",
    ]
    let text = "Hello the aaaaaaaaaaaaaaaaaaaaaaaaaaaa world 123 \u{E9}\u{301} 北京😀 ab\r\n  ba"
    let report = fuzz("regex patterns") { generator in
      var source = (0..<(1 + generator.below(12))).map { _ in generator.pick(pieces) }.joined()
      if generator.below(4) == 0 { source = String(decoding: generator.mutated(Array(source.utf8)), as: UTF8.self) }
      attempt {
        let pattern = try Pattern(source, syntax: generator.below(2) == 0 ? .python : .oniguruma)
        var bytes = Array(text.utf8)
        if generator.below(8) == 0 { bytes = Array(repeating: 0x61, count: 5000) }
        var start = 0
        for _ in 0..<20 {
          guard let match = try pattern.firstMatch(in: bytes, from: start) else { break }
          if match.lowerBound < start || match.upperBound > bytes.count { Issue.record("\(source): \(match)") }
          start = match.isEmpty ? match.upperBound + 1 : match.upperBound
          if start > bytes.count { break }
        }
      }
    }
    #expect(report.isBounded, "\(report)")
  }
}
