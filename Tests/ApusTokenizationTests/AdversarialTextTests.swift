import ApusCore
import ApusTokenization
import Foundation
import Testing

/// Whether tests that compare times run: on a machine that does other things too they may fail for no reason.
private let measuresTime = ProcessInfo.processInfo.environment["APUS_FUZZ_SECONDS"] != nil

/// A megabyte that is as bad as can be: the cost must grow with the text, not with its square.
@Suite("Adversarial text")
struct AdversarialTextTests {
  private static let fills = [
    "a", " ", "\n", "\t", "😀", "\u{301}", "e\u{301}", "中", "\u{200D}", "▁", "ab", "1", "'", "A", "가",
    "\u{1100}\u{1161}", "İ", "ﬃ", "\u{0}", "_",
    " \n", "a ", "</", "\u{5B0}\u{323}",
  ]

  private static func seconds(_ body: () throws -> Void) rethrows -> Double {
    let clock = ContinuousClock()
    let time = try clock.measure(body)
    return Double(time.components.seconds) + Double(time.components.attoseconds) * 1e-18
  }

  private static func text(_ fill: String, _ size: Int) -> String {
    String(repeating: fill, count: max(1, size / fill.utf8.count))
  }

  /// Eight times the text may take at most 24 times as long, when it takes long at all.
  private static func check(_ tokenizer: Tokenizer, _ name: String, large: Int) throws {
    for fill in fills {
      let (small, big) = (text(fill, large / 8), text(fill, large))
      var ids: [TokenID] = []
      func encode(_ text: String) -> Double {
        seconds { ids = (try? tokenizer.encode(text, addSpecialTokens: false)) ?? [] }
      }
      _ = encode(String(small.prefix(100)))
      // The better of two, since other tests run beside.
      let short = min(encode(small), encode(small))
      var long = encode(big)
      if long > 0.2, long > short * 24 { long = min(long, encode(big)) }
      #expect(long < max(0.2, short * 24), "\(name): \(fill.debugDescription) took \(short) s and \(long) s")
      let decoding = seconds { _ = tokenizer.decode(ids) }
      #expect(decoding < 2, "\(name): \(fill.debugDescription) was decoded in \(decoding) s")
    }
  }

  /// Every tiny tokenizer of the goldens: each model with each normalizer, pre-tokenizer and decoder.
  @Test(.enabled(if: measuresTime, "APUS_FUZZ_SECONDS turns on what measures time"))
  func everyComponent() throws {
    for line in tokenizerGoldens.split(separator: "\n") {
      let group = try JSONValue.parse(String(line))
      let name = group["name"]!.stringValue!
      let tokenizer = try Tokenizer(json: Array(group["tokenizer"]!.compactText.utf8), name: name)
      try Self.check(tokenizer, name, large: 1 << 15)
    }
  }

  @Test(
    .enabled(if: SharedData.isPresent && measuresTime, "APUS_FUZZ_SECONDS turns on what measures time"),
    arguments: [
      "llama3/derived_tokenizer.json", "gpt-oss/derived_tokenizer.json", "qwen2/derived_qwen3_tokenizer.json",
      "llama2/tokenizer.json", "llama2/tokenizer.model", "phi-3/tokenizer.json", "bert-base-uncased/tokenizer.json",
      "deepseek-llm/derived_tokenizer.json", "gpt2/derived_tokenizer.json",
    ])
  func realTokenizers(_ path: String) throws {
    let tokenizer = try Tokenizer.load(file: SharedData.root + "tokenizers/" + path)
    try Self.check(tokenizer, path, large: 1 << 18)
  }

  /// Tokens that are white space and swallow white space: one run holds many of them.
  @Test func tokensWithinWhiteSpace() throws {
    for flags in [#""rstrip":true"#, #""lstrip":true"#, #""lstrip":true,"rstrip":true"#] {
      let document =
        #"{"added_tokens":[{"id":1,"content":"\n","normalized":false,\#(flags)}],"model":{"type":"WordLevel","unk_token":"u","vocab":{"u":0,"\n":1}}}"#
      let tokenizer = try Tokenizer(json: Array(document.utf8))
      let time = try Self.seconds {
        let ids = try tokenizer.encode(String(repeating: "\n ", count: 1 << 17))
        #expect(!ids.isEmpty)
      }
      // Linear cost is some hundredths of a second; the square of it is minutes.
      #expect(time < 30, "\(flags): \(time) s")
    }
  }

  /// White space that a token swallowed can hold another token whole, which is then nothing.
  @Test func tokensSwallowedByOthers() throws {
    func ids(_ flags: String, _ text: String) throws -> [TokenID] {
      let document =
        #"{"added_tokens":[{"id":1,"content":"\n","normalized":false,\#(flags)}],"model":{"type":"WordLevel","unk_token":"u","vocab":{"u":0,"\n":1}}}"#
      return try Tokenizer(json: Array(document.utf8)).encode(text)
    }
    // As tokenizers 0.23.3 gives them.
    #expect(try ids(#""rstrip":true"#, "\n \n \n a") == [1, 1, 1, 0])
    #expect(try ids(#""lstrip":true,"rstrip":true"#, "\n \n \n a") == [1, 0])
    #expect(try ids(#""lstrip":true"#, "b \n \n \n a") == [0, 1, 1, 1, 0])
  }

  /// Texts that look the same are different tokens where their bytes differ.
  @Test func lookalikesAreDifferentTokens() throws {
    let document =
      #"{"added_tokens":[{"id":1,"content":"\u00e9","normalized":false},{"id":2,"content":"e\u0301","normalized":false}],"model":{"type":"WordLevel","unk_token":"u","vocab":{"u":0,"\u00e9":1,"e\u0301":2}}}"#
    let tokenizer = try Tokenizer(json: Array(document.utf8))
    #expect(try tokenizer.encode("\u{E9}e\u{301}") == [1, 2])
    #expect(tokenizer.id(of: "\u{E9}") == 1 && tokenizer.id(of: "e\u{301}") == 2)
  }
}
