import ApusCore
import ApusTokenization
import Foundation
import Testing

/// Tokenizers and chat templates in GGUF files.
struct GGUFTokenizerTests {
  static let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent().path
  static let data = ProcessInfo.processInfo.environment["APUS_SHARED_DATA"] ?? root + "/../shared/data"
  static let vocabularies = data + "/tokenizers/llama.cpp-vocab"

  static func has(_ path: String) -> Bool {
    if FileManager.default.fileExists(atPath: path) { return true }
    print("Skipped: \(path) does not exist.")
    return false
  }

  /// llama.cpp's own vocabularies with its test vectors: texts, and the ids of each without special tokens.
  @Test(
    .enabled(if: has(vocabularies)), arguments: ["gpt-2", "llama-spm", "deepseek-llm", "phi-3"])
  func llamaVectors(name: String) throws {
    let base = "\(Self.vocabularies)/ggml-vocab-\(name).gguf"
    let tokenizer = try Tokenizer.load(file: base)
    let input = try String(decoding: Data(contentsOf: URL(fileURLWithPath: base + ".inp")), as: UTF8.self)
    let output = try String(decoding: Data(contentsOf: URL(fileURLWithPath: base + ".out")), as: UTF8.self)
    let texts = input.components(separatedBy: "\n__ggml_vocab_test__\n")
    let lines = output.split(separator: "\n", omittingEmptySubsequences: false)
    #expect(texts.count > 30 && lines.count >= texts.count)
    for (text, line) in zip(texts, lines) {
      let wanted = line.split(separator: " ").map { TokenID($0)! }
      let found = try tokenizer.encode(text, addSpecialTokens: false)
      #expect(found == wanted, "\(name): \(text.debugDescription)")
    }
  }

  @Test(.enabled(if: has(data + "/models/stories260K")))
  func specialTokensAndPrompts() throws {
    for (name, formats) in [("stories260K", ["F32", "F16", "Q8_0"]), ("infinitensor-story", ["F32", "Q8_0"])] {
      let directory = "\(Self.data)/models/\(name)"
      let goldens = try JSONValue.parse(
        [UInt8](Data(contentsOf: URL(fileURLWithPath: directory + "/golden_gguf.json"))))
      for format in formats {
        let tokenizer = try Tokenizer.load(file: "\(directory)/\(name)-\(format).gguf")
        #expect(tokenizer.bosID == 1 && tokenizer.eosID == 2 && tokenizer.unknownID == 0 && tokenizer.addsBOS)
        for golden in goldens.arrayValue! {
          let ids = golden["prompt_ids"]!.arrayValue!.map { TokenID($0.intValue!) }
          #expect(try tokenizer.encode(golden["prompt"]!.stringValue!) == ids)
          #expect(tokenizer.decode(ids, skipSpecialTokens: true) == golden["prompt"]!.stringValue!)
        }
      }
    }
  }

  @Test(.enabled(if: has(vocabularies)))
  func chatTemplate() throws {
    let set = try ChatTemplateSet.load(path: "\(Self.vocabularies)/ggml-vocab-phi-3.gguf")
    #expect(set.names == ["default"])
    #expect(set.specialTokens["bos_token"] == "<s>" && set.specialTokens["eos_token"] == "<|endoftext|>")
    let none = try ChatTemplateSet.load(directory: "\(Self.vocabularies)/ggml-vocab-gpt-2.gguf")
    #expect(none.isEmpty && none.specialTokens["bos_token"] == "<|endoftext|>")
  }

  /// A GGUF file of metadata alone.
  static func file(_ entries: [(String, UInt32, [UInt8])]) -> [UInt8] {
    func number<T: FixedWidthInteger>(_ value: T) -> [UInt8] { withUnsafeBytes(of: value.littleEndian) { Array($0) } }
    func text(_ text: String) -> [UInt8] { number(UInt64(text.utf8.count)) + text.utf8 }
    var bytes = Array("GGUF".utf8) + number(UInt32(3)) + number(UInt64(0)) + number(UInt64(entries.count))
    for (key, type, value) in entries { bytes += text(key) + number(type) + value }
    return bytes
  }

  @Test func whatCannotBeUsedIsRefused() throws {
    func number<T: FixedWidthInteger>(_ value: T) -> [UInt8] { withUnsafeBytes(of: value.littleEndian) { Array($0) } }
    func text(_ text: String) -> [UInt8] { number(UInt64(text.utf8.count)) + text.utf8 }
    func texts(_ list: [String]) -> [UInt8] {
      number(UInt32(8)) + number(UInt64(list.count)) + list.flatMap { text($0) }
    }
    let tokens = ("tokenizer.ggml.tokens", UInt32(9), texts(["a", "b", "ab"]))
    let gpt2 = ("tokenizer.ggml.model", UInt32(8), text("gpt2"))
    let pre = ("tokenizer.ggml.pre", UInt32(8), text("gpt-2"))
    let cases: [([(String, UInt32, [UInt8])], String)] = [
      ([], "tokenizer.ggml.model"), ([gpt2], "tokenizer.ggml.tokens"),
      (
        [gpt2, tokens, ("tokenizer.ggml.pre", 8, text("of tomorrow")), ("tokenizer.ggml.merges", 9, texts(["a b"]))],
        "of tomorrow"
      ),
      ([("tokenizer.ggml.model", 8, text("rwkv")), tokens], "rwkv"), ([gpt2, tokens, pre], "merges"),
      ([("tokenizer.ggml.model", 8, text("llama")), tokens], "scores"),
      ([gpt2, pre, tokens, ("tokenizer.ggml.merges", 9, texts(["ab"]))], "merge 0"),
      ([gpt2, pre, tokens, ("tokenizer.ggml.merges", 9, texts(["a c"]))], "a c"),
      (
        [gpt2, pre, ("tokenizer.ggml.tokens", 9, texts(["a", "a"])), ("tokenizer.ggml.merges", 9, texts([]))], "twice"
      ),
      (
        [
          gpt2, pre, tokens, ("tokenizer.ggml.merges", 9, texts(["a b"])),
          ("tokenizer.ggml.bos_token_id", 4, number(UInt32(9))),
        ], "bos_token_id is 9"
      ),
    ]
    let path = NSTemporaryDirectory() + "apus-\(UUID().uuidString).gguf"
    defer { try? FileManager.default.removeItem(atPath: path) }
    for (entries, says) in cases {
      try Data(Self.file(entries)).write(to: URL(fileURLWithPath: path))
      let error = #expect(throws: EngineError.self) { try Tokenizer.load(file: path) }
      #expect(error?.message.contains(says) == true && error?.message.contains(path) == true, "\(error?.message ?? "")")
    }
    try Data(Self.file([gpt2, pre, tokens, ("tokenizer.ggml.merges", 9, texts(["a b"]))]))
      .write(to: URL(fileURLWithPath: path))
    #expect(try Tokenizer.load(file: path).encode("abba") == [2, 1, 0])
  }
}
