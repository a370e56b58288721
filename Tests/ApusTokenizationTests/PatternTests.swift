import ApusCore
import ApusTokenization
import Testing

@Suite("Patterns")
struct PatternTests {
  private func match(_ pattern: String, _ text: String, _ syntax: Pattern.Syntax = .oniguruma) throws -> String? {
    let bytes = Array(text.utf8)
    return try Pattern(pattern, syntax: syntax).firstMatch(in: bytes).map { String(decoding: bytes[$0], as: UTF8.self) }
  }

  @Test(arguments: [
    ("a+b", "xaaab", "aaab"), ("a|ab", "ab", "a"), ("(?:a|ab)c", "abc", "abc"), ("a*?b", "aab", "aab"),
    ("a{2,3}", "aaaa", "aaa"), ("a{2,3}?", "aaaa", "aa"), ("a{,2}", "aaa", "aa"), ("x{a}", "x{a}", "x{a}"),
    ("[^a-c]+", "abcdef", "def"), ("[a-z&&[^aeiou]]+", "aeixyz", "xyz"), ("[[:alpha:]_]+", "1é_2", "é_"),
    (#"\p{Lu}\p{Ll}+"#, "xÉcole", "École"), (#"\P{L}+"#, "ab12c", "12"), (#"\p{^L}+"#, "ab12c", "12"),
    (#"\p{Han}+"#, "a北京b", "北京"), (#"\s+(?!\S)"#, "a   b", "  "), (#"(?<=a)b"#, "b ab", "b"), (#"(?<!a)b"#, "abb", "b"),
    (#"(?<=a|xy)z"#, "xyz", "z"), (#"(?i:'S)"#, "'ſ", "'ſ"), (#"(?i)straSSe"#, "STRASSE", "STRASSE"),
    (#"(\w)\1"#, "abccd", "cc"), (#"(?<c>\w)\k<c>"#, "abccd", "cc"), (#"(?>a+)b"#, "aab", "aab"),
    (#"a++b"#, "aab", "aab"),
    (#"\bfoo\b"#, "xfoo foo", "foo"), (#"^b"#, "a\nb", "b"), (#"a$"#, "ba\nc", "a"), (#"\Aa|b\z"#, "xab", "b"),
    (#"\x{1F600}|\u00e9"#, "é", "é"), (#"[\x00-\x1f]"#, "a\tb", "\t"), (#"(?m).+"#, "a\nb", "a\nb"),
    (#"\h+"#, "xyzbeef", "beef"),
    (#"\R"#, "a\r\nb", "\r\n"), ("(?#note)a", "ba", "a"), ("(?x) a b # c", "ab", "ab"), ("a.c", "a中c", "a中c"),
    ("(a*)*b", "aaab", "aaab"), ("(a|b|)+c", "abc", "abc"), (#"\d{1,3}(?=(?:\d{3})*\b)"#, "1234567", "1"),
  ])
  func matches(_ pattern: String, _ text: String, _ expected: String) throws {
    #expect(try match(pattern, text) == expected)
  }

  @Test(arguments: [
    ("a{2}", "a"), (#"(?>a+)a"#, "aaa"), ("a++a", "aaa"), ("(?=b)a", "ab"), (#"\bfoo"#, "xfoo"),
    ("[^\u{0}-\u{10FFFF}]", "a"),
    ("b(?<!b)", "b"),
  ])
  func doesNotMatch(_ pattern: String, _ text: String) throws {
    #expect(try match(pattern, text) == nil)
  }

  @Test func pythonAnchorsAndFlagsDiffer() throws {
    #expect(try match("^b", "a\nb", .python) == nil)
    #expect(try match("(?m)^b", "a\nb", .python) == "b")
    #expect(try match("(?s)a.b", "a\nb", .python) == "a\nb")
    #expect(try match("a$", "a\n", .python) == "a")
    #expect(try match(#"a\Z"#, "a\n", .python) == nil)
    #expect(try match("[a[]", "[", .python) == "[")
  }

  @Test(arguments: [
    "(", ")", "[a", "a**b)", "*a", "(?<n", #"\p{Nonsense}"#, #"\2(a)"#, "a{3,2}", "(?<=a*)b", #"\"#, "[b-a]", "(?~a)",
    String(repeating: "(", count: 300) + String(repeating: ")", count: 300), "a{2000}", #"\g<1>"#,
  ])
  func isRefused(_ pattern: String) {
    #expect(throws: EngineError.self) { try Pattern(pattern, syntax: .oniguruma) }
  }

  @Test func hostilePatternsStopWithAnError() throws {
    let pattern = try Pattern("(a+)+b")
    #expect(throws: EngineError.self) { try pattern.firstMatch(in: String(repeating: "a", count: 60)) }
  }

  @Test func longRunsNeedLittleMemory() throws {
    let text = Array(String(repeating: " ", count: 1 << 20).utf8)
    #expect(try Pattern(#"\s*[\r\n]+|\s+(?!\S)|\s+"#).firstMatch(in: text) == 0..<(1 << 20))
  }

  /// The hand-made matchers cut text exactly as the engine does with the same pattern.
  @Test(arguments: WordScannerPatterns.all)
  func scannersAgreeWithTheEngine(_ pattern: String) throws {
    let seed: UInt64 = 21
    var generator = SeededGenerator(seed: seed)
    let compiled = try Pattern(pattern, syntax: .oniguruma)
    for _ in 0..<150 {
      let text = Array(randomText(&generator, length: 50).utf8)
      let ends = try #require(WordScannerPatterns.ends(pattern, text))
      var expected: [Int] = []
      var position = 0
      while position < text.count {
        let match = try #require(try compiled.firstMatch(in: text, from: position))
        #expect(match.lowerBound == position)
        expected.append(match.upperBound)
        position = match.upperBound
      }
      #expect(ends == expected, "seed \(seed), \(pattern), \(String(decoding: text, as: UTF8.self).debugDescription)")
    }
  }
}
