import ApusCore
import ApusGrammar
import Testing

@Suite("Patterns")
struct PatternTests {
  private func language(_ pattern: String, search: Bool = false) throws -> CompiledGrammar {
    try .of(Grammar(root: .regular(.pattern(pattern, search: search))))
  }

  @Test(
    "Whole texts",
    arguments: [
      ("[a-c]+", ["a", "abc"], ["", "d", "abd"]),
      ("a{2,3}", ["aa", "aaa"], ["a", "aaaa"]),
      ("(?:ab|a)(c|bcd)?", ["ab", "abc", "abcd", "a", "ac", "abbcd"], ["abcdd", "b"]),
      ("\\d{3}-\\d{4}", ["555-1234"], ["555-123", "555_1234"]),
      ("^[A-Z]\\w*$", ["Apus", "A_1"], ["apus", "A-1", ""]),
      ("caf\u{E9}|\\u0041\\x42", ["caf\u{E9}", "AB"], ["cafe", "A"]),
      (".", ["x", "\u{1F600}"], ["\n", "\u{2028}", "xy"]),
      ("[^a]", ["b", "\n", "\u{4E2D}"], ["a", ""]),
      ("\\p{Lu}\\p{L}*", ["\u{C9}t\u{E9}", "Z"], ["\u{E9}t\u{E9}", "1"]),
      ("(?<year>\\d+)a*?b+?", ["12b", "1aabb"], ["ab", "12a"]),
      ("(?=.*\\d)(?=.*[a-z])[\\da-z]{4,8}", ["a123", "zzzz9"], ["1234", "abcd", "a12", "a12345678"]),
      ("(?!abc)[a-z]{3}", ["abd", "xyz"], ["abc", "ab"]),
      ("(?i)abc", ["ABC", "aBc"], ["abd"]),
      ("a(?:^b|c)?", ["a", "ac"], ["ab"]),
      ("(\\bfoo\\b|x)-bar", ["foo-bar", "x-bar"], ["xfoo-bar"]),
      ("a{0}b", ["b"], ["ab"]),
      ("a{,3}", ["a{,3}"], ["aa"]),
      ("[\\]\\-a]+", ["]-a"], ["b"]),
      ("", [""], ["a"]),
    ] as [(String, [String], [String])])
  func whole(_ pattern: String, _ accepted: [String], _ rejected: [String]) throws {
    let grammar = try language(pattern)
    for text in accepted { #expect(grammar.accepts(text), "\(pattern) must take \(text)") }
    for text in rejected { #expect(!grammar.accepts(text), "\(pattern) must not take \(text)") }
  }

  @Test("Found in a text, as JSON Schema's pattern is")
  func search() throws {
    let some = try language("b+", search: true)
    #expect(some.accepts("abba") && some.accepts("b") && !some.accepts("aa"))
    let start = try language("^ab", search: true)
    #expect(start.accepts("abc") && !start.accepts("xab"))
    let either = try language("^a|b$", search: true)
    #expect(either.accepts("axx") && either.accepts("xxb") && !either.accepts("xax"))
    let without = try language("^(?!.*secret)", search: true)
    #expect(without.accepts("open") && !without.accepts("a secret here"))
    let word = try language("\\bcat\\b", search: true)
    #expect(word.accepts("a cat!") && word.accepts("cat") && !word.accepts("concat") && !word.accepts("cats"))
    let empty = try language("^$", search: true)
    #expect(empty.accepts("") && !empty.accepts("a"))
  }

  @Test(
    "What is no regular language, or no pattern, is refused with the reason",
    arguments: [
      ("(a)\\1", "back-reference"), ("(?<=a)b", "look-behind"), ("(a", "not closed"), ("a)", "unmatched"),
      ("*a", "nothing to repeat"), ("[b-a]", "reversed"), ("a{3,2}", "reversed"), ("(^a)*", "unlimited repetition"),
      ("\\p{Nonsense}", "not known"), ("a{2000000}", "over"),
    ])
  func refused(_ pattern: String, _ reason: String) {
    let message = errorMessage { _ = try RegularExpression.pattern(pattern, search: false) }
    #expect(message?.contains(reason) == true, "\(pattern): \(message ?? "no error")")
  }

  @Test("Hostile patterns end in bounded time")
  func hostile() throws {
    // Exponential subsets, nested counts, and conditions that no text meets.
    for pattern in [
      "(a|b)*a(a|b){20}", "((a{0,100}){0,100}){0,100}", "(a*)*b", "(?=a{1000})(?=.*b)a+", "(x+x+)+y",
      "(?:(?:a?){50}){50}a{50}",
    ] {
      let message = errorMessage {
        let grammar = try language(pattern)
        let matcher = GrammarMatcher(grammar)
        for byte in String(repeating: "ab", count: 60).utf8 where !matcher.accept(byte: byte) { break }
      }
      if let message { #expect(message.contains("large") || message.contains("no text"), "\(pattern): \(message)") }
    }
  }

  @Test("Content of JSON strings, however it is escaped")
  func escapes() throws {
    let grammar = try CompiledGrammar.of(
      Grammar(root: .string(try .pattern("^[A\u{E9}\u{1F600}\"\n/]$", search: true))))
    for text in [
      #""A""#, #""\u0041""#, #""\u00e9""#, #""\u00E9""#, "\"\u{E9}\"", "\"\u{1F600}\"", #""\uD83D\uDE00""#, #""\"""#,
      #""\u0022""#, #""\n""#, #""\u000a""#, #""/""#, #""\/""#,
    ] { #expect(grammar.accepts(text), "\(text)") }
    for text in [
      #""B""#, #""\u0042""#, #""\a""#, #""\uD83D""#, #""\uD83D\uDE01""#, "\"\n\"", #""""#, #""\uDE00""#, #""AA""#,
    ] { #expect(!grammar.accepts(text), "\(text)") }
    // No prefix leads nowhere: after \u only digits of permitted characters fit.
    let matcher = GrammarMatcher(grammar)
    #expect(matcher.accept(bytes: #""\u0"#.utf8) == 4)
    #expect(!matcher.accept(byte: UInt8(ascii: "1")))
    #expect(matcher.accept(byte: UInt8(ascii: "0")))
    let length = try CompiledGrammar.of(Grammar(root: .string(.length(2, 3))))
    #expect(
      length.accepts(#""\uD83D\uDE00\u00e9x""#) && !length.accepts(#""\uD83D\uDE00""#) && length.accepts(#""ab""#))
  }

  @Test("Regular languages compose, and large counts cost nothing")
  func composition() throws {
    let word = try RegularExpression.pattern("[a-z]+", search: false)
    let composed = RegularExpression.intersection([
      word, .length(2, 100_000), .complement(.anyOf(["if", "else"])),
      .complement(.concatenation([.text("x"), .anything])),
    ])
    let grammar = try CompiledGrammar.of(Grammar(root: .regular(composed)))
    #expect(grammar.accepts("while") && !grammar.accepts("if") && !grammar.accepts("a") && !grammar.accepts("xyz"))
    #expect(grammar.accepts("iff") && grammar.accepts(String(repeating: "a", count: 5000)))
    #expect(try RegularLanguage(.intersection([word, .text("A")])).isEmpty())
    #expect(try RegularLanguage(composed).contains("swift"))
    #expect(throws: EngineError.self) {
      try CompiledGrammar.of(Grammar(root: .regular(.intersection([word, .length(0, 0)]))))
    }
  }
}

@Suite("EBNF")
struct EBNFTests {
  @Test("GBNF as llama.cpp writes it")
  func gbnf() throws {
    let grammar = try CompiledGrammar.of(
      .ebnf(
        #"""
        # A list of chess moves.
        root ::= "1. " move " " move "\n" ([1-9] [0-9]? ". " move " " move "\n")+
        move ::= (pawn | nonpawn | castle) [+#]?
        # piece type, optional file/rank, optional capture, dest file & rank
        nonpawn ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
        pawn ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
        castle ::= "O-O" "-O"?
        """#))
    #expect(grammar.accepts("1. e4 e5\n2. Nf3 Nc6\n3. O-O exd4+\n"))
    #expect(!grammar.accepts("1. e4 e5\n") && !grammar.accepts("1. e9 e5\n2. a4 a5\n"))
  }

  @Test("The W3C's style, with code points, quotes and comments")
  func w3c() throws {
    let grammar = try CompiledGrammar.of(
      .ebnf(
        """
        /* names and numbers */
        root ::= Name ( ',' Name ){1,2} // two or three
        Name ::= [#x41-#x5A] [a-z]* | #x31 #x32?
        """))
    #expect(
      grammar.accepts("Abc,12") && grammar.accepts("A,B,1") && !grammar.accepts("A") && !grammar.accepts("A,B,C,D"))
  }

  @Test("Left recursion, direct, indirect and behind what can be empty")
  func leftRecursion() throws {
    let sum = try CompiledGrammar.of(.ebnf("root ::= root \"+\" term | term\nterm ::= term \"*\" [0-9] | [0-9]"))
    #expect(sum.accepts("1+2*3+4") && sum.accepts("7") && !sum.accepts("1+") && !sum.accepts("+1"))
    let indirect = try CompiledGrammar.of(
      .ebnf("root ::= a \"x\" | \"r\"\na ::= b \"y\" | root \"z\"\nb ::= root | a \"w\""))
    #expect(
      indirect.accepts("ryx") && indirect.accepts("rzwyx") && indirect.accepts("ryxzx") && !indirect.accepts("rx"))
    let behind = try CompiledGrammar.of(.ebnf("root ::= ws root \"+\" | \"1\"\nws ::= \" \"*"))
    #expect(behind.accepts("  1++") && behind.accepts("1") && !behind.accepts("+1"))
    let unit = try CompiledGrammar.of(.ebnf("root ::= root | other | \"a\"\nother ::= root"))
    #expect(unit.accepts("a") && !unit.accepts("aa"))
  }

  @Test("Recursion in the middle")
  func nesting() throws {
    let grammar = try CompiledGrammar.of(.ebnf(#"root ::= "(" root ")" root | """#))
    let deep = String(repeating: "(", count: 1500) + String(repeating: ")", count: 1500)
    #expect(grammar.accepts("(()())()") && grammar.accepts(deep) && !grammar.accepts("(()") && !grammar.accepts(")("))
    // Deeper than the limit is not offered.
    let matcher = GrammarMatcher(grammar)
    var depth = 0
    while depth < 10_000, matcher.accept(byte: UInt8(ascii: "(")) { depth += 1 }
    #expect(depth > 2000 && depth < 10_000)
    #expect(matcher.accept(bytes: String(repeating: ")", count: depth).utf8) == depth && matcher.isAccepting)
  }

  @Test(
    "Errors name line and column",
    arguments: [
      ("root ::= \"a", "line 1, column 10"), ("root ::= a\nb ::= \"x\"", "line 1, column 10"),
      ("root ::= \"a\"\nroot ::= \"b\"", "line 2, column 1"), ("root ::= [z-a]", "line 1, column 13"),
      ("root = \"a\"", "line 1, column 1"), ("root ::= (\"a\"", "line 1, column 10"), ("", "no rule"),
      ("root ::= \"a\"{3,1}", "reversed"), ("root ::= \"\\q\"", "line 1, column 11"),
    ])
  func errors(_ source: String, _ place: String) {
    let message = errorMessage { _ = try Grammar(ebnf: source) }
    #expect(message?.contains(place) == true, "\(source): \(message ?? "no error")")
  }

  @Test("A grammar of nothing is refused")
  func nothing() {
    #expect(errorMessage { _ = try CompiledGrammar.of(.ebnf("root ::= \"a\" root")) }?.contains("no text") == true)
  }
}

@Suite("Structural tags")
struct StructuralTagTests {
  @Test("Free text, a trigger, a region, free text again")
  func regions() throws {
    var tags = TagsExpression(
      tags: [
        .init(begin: "<tool=a>", content: .text("1"), end: "</tool>"),
        .init(begin: "<tool=b>", content: .regular(try .pattern("[0-9]+", search: false)), end: "</tool>"),
      ], triggers: ["<tool="])
    let free = try CompiledGrammar.of(Grammar(root: .tags(tags)))
    for text in ["", "hello <to", "x<tool=a>1</tool>", "<tool=b>42</tool> then <tool=a>1</tool>."] {
      #expect(free.accepts(text), "\(text)")
    }
    for text in ["<tool=", "<tool=c>1</tool>", "<tool=a>2</tool>", "x<tool=a>1"] {
      #expect(!free.accepts(text), "\(text)")
    }
    tags.isRequired = true
    let required = try CompiledGrammar.of(Grammar(root: .tags(tags)))
    #expect(!required.accepts("") && !required.accepts("hi") && required.accepts("hi<tool=a>1</tool>bye"))
    tags.stopsAfterFirst = true
    let single = try CompiledGrammar.of(Grammar(root: .tags(tags)))
    #expect(single.accepts("hi<tool=a>1</tool>") && !single.accepts("hi<tool=a>1</tool>bye"))
    tags.allowsText = false
    tags.stopsAfterFirst = false
    tags.separator = "\n"
    let bare = try CompiledGrammar.of(Grammar(root: .tags(tags)))
    #expect(
      bare.accepts("<tool=a>1</tool>\n<tool=b>7</tool>") && !bare.accepts(" <tool=a>1</tool>") && !bare.accepts(""))
  }

  @Test("Special tokens open regions and occur nowhere else")
  func specials() throws {
    let texts = ["<|call|>", "<", "|call|>", "a", "1", "<|end|>", "b"]
    let vocabulary = TokenVocabulary(
      tokens: texts.map { Array($0.utf8) }, isSpecial: { $0 == 0 || $0 == 5 }, endTokens: [])
    let tags = TagsExpression(
      tags: [.init(begin: "<|call|>", content: .text("1"), end: "<|end|>")], triggers: ["<|call|>"])
    let grammar = try CompiledGrammar.of(Grammar(root: .tags(tags)), vocabulary)
    let matcher = GrammarMatcher(grammar)
    #expect(matcher.mask() == [0b1011111])  // Anything but the end.
    #expect(matcher.accept(3) && matcher.accept(0))
    #expect(matcher.mask() == [0b0010000])
    #expect(matcher.accept(4))
    #expect(matcher.mask() == [0b0100010])
    #expect(matcher.accept(5) && matcher.isAccepting)
  }

  @Test("The formats of XGrammar")
  func formats() throws {
    let grammar = try CompiledGrammar.of(
      .structuralTag(
        #"""
        {"type": "structural_tag", "format": {"type": "sequence", "elements": [
          {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"},
          {"type": "or", "elements": [{"type": "const_string", "value": "none"},
            {"type": "triggered_tags", "triggers": ["<f"], "at_least_one": true, "stop_after_first": true,
             "tags": [{"begin": "<f>", "content": {"type": "regex", "pattern": "[a-z]+"}, "end": "</f>"}]}]}]}}
        """#))
    #expect(grammar.accepts("<think>let me < see</think>none") && grammar.accepts("<think></think>so <f>abc</f>"))
    #expect(
      !grammar.accepts("none") && !grammar.accepts("<think>x</think>text") && !grammar.accepts("<think>x</think>"))
    // Strict mode holds within a tag as it does alone.
    func open(_ isStrict: Bool) throws {
      let format = #"{"type": "json_schema", "json_schema": {"type": "object"}, "strict": \#(isStrict)}"#
      _ = try Grammar(structuralTag: #"{"format": \#(format)}"#)
    }
    try open(false)
    #expect(throws: EngineError.self) { try open(true) }
    let message = errorMessage {
      _ = try Grammar(structuralTag: #"{"format": {"type": "sequence", "elements": [{"type": "poem"}]}}"#)
    }
    #expect(message?.contains("format.elements[0].type") == true)
  }
}
