import ApusConversion
import ApusCore
import ApusModels
import ApusTokenization
import Foundation
import Testing

/// Tokenizers of real models through GGUF metadata and back.
struct TokenizerConversionTests {
  static let base = Paths.data + "/tokenizers"

  /// A small model with a vocabulary of the right size, so that the tokenizer has something to go with.
  private func model(_ folder: Folder, vocabulary: Int, files: [(String, String)]) throws -> String {
    let path = folder.path + "/model"
    let config: [(String, JSONValue)] = [
      ("vocab_size", .int(Int64(vocabulary))), ("hidden_size", 8), ("intermediate_size", 8), ("num_hidden_layers", 1),
      ("num_attention_heads", 1), ("num_key_value_heads", 1), ("eos_token_id", 2), ("tie_word_embeddings", true),
    ]
    _ = try SmallModel(config).write(folder)
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
      try FileManager.default.removeItem(atPath: "\(path)/\(name)")
    }
    for (source, name) in files { try FileManager.default.copyItem(atPath: source, toPath: "\(path)/\(name)") }
    return path
  }

  static let texts: [String] = {
    var generator = SeededGenerator(seed: 3)
    let alphabet: [UnicodeScalar] = Array(
      "abcdefgh   \n\t'’.,;:!?0123456789ABCÄöéñßЖщ你好世界日本語한국어مرحبا🙂🎉\u{301}\u{A0}<|>_#\r".unicodeScalars)
    return (0..<300).map { _ in
      var text = String.UnicodeScalarView()
      for _ in 0..<Int.random(in: 1...40, using: &generator) { text.append(alphabet.randomElement(using: &generator)!) }
      return String(text)
    } + ["It's 2024-01-02, isn't it?  We'LL see…", "def f(x):\n    return x ** 2\n"]
  }()

  static let cases: [(name: String, vocabulary: Int, pre: String, files: [(String, String)])] = [
    (
      "llama2", 32000, "default",
      [("llama2/tokenizer.json", "tokenizer.json"), ("llama2/tokenizer_config.json", "tokenizer_config.json")]
    ),
    (
      "llama2", 32000, "default",
      [("llama2/tokenizer.model", "tokenizer.model"), ("llama2/tokenizer_config.json", "tokenizer_config.json")]
    ),
    (
      "minimind", 6400, "gpt-2",
      [("minimind/tokenizer.json", "tokenizer.json"), ("minimind/tokenizer_config.json", "tokenizer_config.json")]
    ),
    ("gpt2", 50257, "gpt-2", [("gpt2/vocab.json", "vocab.json"), ("gpt2/merges.txt", "merges.txt")]),
    (
      "qwen2", 151936, "qwen2",
      [
        ("qwen2/vocab.json", "vocab.json"), ("qwen2/merges.txt", "merges.txt"),
        ("qwen2/tokenizer_config.json", "tokenizer_config.json"),
      ]
    ),
    (
      "llama3", 128256, "llama-bpe",
      [
        ("llama3/derived_tokenizer.json", "tokenizer.json"),
        ("llama3/llama3-8b-instruct_tokenizer_config.json", "tokenizer_config.json"),
      ]
    ),
    ("gpt-oss", 201088, "gpt-4o", [("gpt-oss/derived_tokenizer.json", "tokenizer.json")]),
  ]

  @Test(.enabled(if: Paths.dataHas("tokenizers/llama2")), arguments: cases.indices)
  func realTokenizers(index: Int) throws {
    let (name, vocabulary, pre, files) = Self.cases[index]
    let folder = try Folder()
    let path = try model(folder, vocabulary: vocabulary, files: files.map { ("\(Self.base)/\($0.0)", $0.1) })
    let gguf = folder.path + "/x.gguf"
    let report = try convert(path, gguf, "gguf-f16")
    let original = try Tokenizer.load(directory: path)
    let written = try Tokenizer.load(directory: gguf)
    let header = try GGUFModelFiles(paths: [gguf]).headers[0]
    #expect(header.metadata["tokenizer.ggml.pre"]?.stringValue == pre, "\(name)")
    #expect(header.metadata["tokenizer.ggml.tokens"]?.arrayValue?.count == vocabulary)
    let back = try convert(gguf, folder.path + "/back", "fp32")
    // Llama 2 looks for its special tokens in the normalised text, which the metadata cannot say.
    let notes = report.notes.filter { name != "llama2" || !$0.contains("around the special tokens") }
    #expect(notes.isEmpty && back.notes.isEmpty, "\(name): \(report.notes) \(back.notes)")
    let rebuilt = try Tokenizer.load(directory: folder.path + "/back")
    for text in Self.texts {
      let ids = try original.encode(text)
      #expect(try written.encode(text) == ids, "\(name): \(text.debugDescription)")
      #expect(try rebuilt.encode(text) == ids, "\(name): \(text.debugDescription)")
      #expect(rebuilt.decode(ids, skipSpecialTokens: false) == original.decode(ids, skipSpecialTokens: false))
    }
    #expect(rebuilt.eosID == written.eosID && rebuilt.bosID == written.bosID && rebuilt.addsBOS == original.addsBOS)
    // Templates are the same text.
    let templates = try ChatTemplateSet.sources(directory: path)
    #expect(try ChatTemplateSet.sources(directory: folder.path + "/back") == templates)
  }

  /// What has no place in the metadata is refused, not written otherwise.
  @Test func whatCannotBeExpressed() throws {
    let folder = try Folder()
    let path = try SmallModel().write(folder)
    func refusal(_ change: (String) -> String) throws -> String? {
      try folder.write("model/tokenizer.json", change(smallTokenizer(size: 272)))
      defer { try? FileManager.default.removeItem(atPath: folder.path + "/x.gguf") }
      do {
        try convert(path, folder.path + "/x.gguf", "gguf-f16")
        return nil
      } catch { return (error as? EngineError)?.message }
    }
    #expect(try refusal { $0 } == nil)
    let lowercase = try refusal {
      $0.replacingOccurrences(of: #""normalizer":null"#, with: #""normalizer":{"type":"Lowercase"}"#)
    }
    #expect(lowercase?.contains("none of the kinds") == true, "\(lowercase ?? "accepted")")
    let pattern = try refusal {
      $0.replacingOccurrences(
        of: #""pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}"#,
        with: #""pre_tokenizer":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":false}"#)
    }
    #expect(pattern?.contains("none of the kinds") == true, "\(pattern ?? "accepted")")
    // More tokens than rows of embeddings.
    try folder.write("model/tokenizer.json", smallTokenizer(size: 272))
    let smaller = SmallModel([("vocab_size", 200), ("eos_token_id", 1)])
    try folder.write("model/config.json", JSONValue.object(smaller.config).compactText)
    try folder.write("model/model.safetensors", safetensors(smaller.weights()))
    let error = #expect(throws: EngineError.self) { try convert(path, folder.path + "/x.gguf", "gguf-f16") }
    #expect(error?.message.contains("263 tokens") == true && error?.message.contains("200 rows") == true)
  }

  /// Models without a tokenizer, or with one of another kind, convert with a note.
  @Test func ggufWithoutATokenizer() throws {
    let folder = try Folder()
    let path = try SmallModel().write(folder)
    let gguf = folder.path + "/x.gguf"
    try convert(path, gguf, "gguf-f32")
    var bytes = [UInt8](try Data(contentsOf: URL(fileURLWithPath: gguf)))
    // "gpt2" becomes a kind that is not known.
    let key = Array("tokenizer.ggml.model".utf8)
    let place = try #require((0..<bytes.count).first { bytes[$0...].starts(with: key) })
    bytes.replaceSubrange(place + key.count + 12..<place + key.count + 16, with: Array("rwkv".utf8))
    try folder.write("y.gguf", bytes)
    let report = try convert(folder.path + "/y.gguf", folder.path + "/out", "fp32")
    #expect(report.notes.count == 1 && report.notes[0].contains("rwkv"), "\(report.notes)")
    #expect(!folder.names("out").contains("tokenizer.json"))
    #expect(try logits(folder.path + "/out") == logits(path))
    // Ill-formed metadata of the tokenizer are a note, never a crash.
    var generator = SeededGenerator(seed: 21)
    for _ in 0..<200 {
      var mutated = [UInt8](try Data(contentsOf: URL(fileURLWithPath: gguf)))
      for _ in 0..<3 { mutated[.random(in: 24..<8000, using: &generator)] = .random(in: 0...255, using: &generator) }
      try folder.write("z.gguf", mutated)
      do {
        try convert(folder.path + "/z.gguf", folder.path + "/z", "bf16") { $0.overwrites = true }
      } catch let error as EngineError { #expect(error.message.count > 10) }
    }
  }
}
