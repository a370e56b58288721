import ApusCore
import ApusGrammar
import ApusTokenization
import Foundation
import Testing

@Suite("Token masks and random grammars")
struct MaskTests {
  /// Random grammars over a few letters.
  private struct Generator {
    var random: SeededGenerator
    var ruleCount = 0

    mutating func expression(_ depth: Int) -> GrammarExpression {
      let choice = random.below(depth <= 0 ? 4 : 11)
      switch choice {
      case 0, 1: return .literal((0...random.below(2)).map { _ in UInt8(ascii: "a") + UInt8(random.below(3)) })
      case 2: return .characters(ScalarRanges([0x61...(0x61 + UInt32(random.below(3)))]))
      case 3: return random.below(3) == 0 ? .empty : .text("\u{E9}")
      case 4, 5: return .sequence((0..<2).map { _ in expression(depth - 1) })
      case 6, 7: return .choice((0..<2).map { _ in expression(depth - 1) })
      case 8:
        let minimum = random.below(3)
        return .repetition(
          expression(depth - 1), minimum: minimum, maximum: random.below(2) == 0 ? nil : minimum + random.below(3))
      default: return .rule(RuleReference(index: random.below(ruleCount)))
      }
    }

    mutating func grammar() -> Grammar {
      ruleCount = 1 + random.below(4)
      var grammar = Grammar()
      for index in 0..<ruleCount { _ = grammar.addRule("r\(index)") }
      for index in 0..<ruleCount { grammar.define(RuleReference(index: index), expression(3)) }
      grammar.root = .rule(RuleReference(index: 0))
      return grammar
    }
  }

  /// Recognition by the definition: the ends at which an expression can match from each place, as a least fixed point.
  private struct Oracle {
    let grammar: Grammar
    let text: [UInt8]
    var ends: [[Int: Set<Int>]]

    init(_ grammar: Grammar, _ text: [UInt8]) {
      self.grammar = grammar
      self.text = text
      ends = Array(repeating: [:], count: grammar.rules.count)
      var changed = true
      while changed {
        changed = false
        for rule in grammar.rules.indices {
          for start in 0...text.count {
            let found = match(grammar.rules[rule].body, start)
            if found != ends[rule][start] ?? [] {
              ends[rule][start] = found
              changed = true
            }
          }
        }
      }
    }

    func match(_ expression: GrammarExpression, _ start: Int) -> Set<Int> {
      switch expression {
      case .empty: return [start]
      case .literal(let bytes): return text[start...].starts(with: bytes) ? [start + bytes.count] : []
      case .characters(let set):
        guard start < text.count, text[start] < 0x80 else { return [] }
        return set.ranges.contains { $0.contains(UInt32(text[start])) } ? [start + 1] : []
      case .sequence(let parts):
        var current: Set<Int> = [start]
        for part in parts { current = Set(current.flatMap { match(part, $0) }) }
        return current
      case .choice(let parts): return Set(parts.flatMap { match($0, start) })
      case .repetition(let part, let minimum, let maximum):
        var current: Set<Int> = [start]
        var result: Set<Int> = minimum == 0 ? current : []
        var round = 0
        while round < maximum ?? (minimum + text.count + 1) {
          current = Set(current.flatMap { match(part, $0) })
          round += 1
          if round >= minimum { result.formUnion(current) }
          if current.isEmpty { break }
        }
        return result
      case .rule(let reference): return ends[reference.index][start] ?? []
      default: return []
      }
    }

    var isMatch: Bool { match(grammar.root, 0).contains(text.count) }
  }

  private static let alphabet: [UInt8] = Array("abc".utf8) + [0xC3, 0xA9]

  private static func texts(_ length: Int) -> [[UInt8]] {
    var all: [[UInt8]] = [[]]
    var level: [[UInt8]] = [[]]
    for _ in 0..<length {
      level = level.flatMap { text in alphabet.map { text + [$0] } }
      all += level
    }
    return all
  }

  @Test("Random grammars with every kind of recursion agree with the definition")
  func oracle() throws {
    let seed = UInt64.random(in: 0..<1_000_000)
    print("MaskTests.oracle: seed \(seed)")
    var generator = Generator(random: SeededGenerator(seed: seed))
    let texts = Self.texts(4)
    var compiledCount = 0
    for round in 0..<50 {
      let grammar = generator.grammar()
      let compiled: CompiledGrammar
      do {
        compiled = try .of(grammar)
      } catch let error as EngineError {
        // No text at all, or left recursion of a kind that is refused.
        if error.message.contains("no text") {
          for text in texts.prefix(200) {
            #expect(!Oracle(grammar, text).isMatch, "round \(round), seed \(seed): \(grammar)")
          }
        } else {
          #expect(error.message.contains("left-recursive"), "round \(round), seed \(seed): \(error.message)")
        }
        continue
      }
      compiledCount += 1
      for text in texts {
        let expected = Oracle(grammar, text).isMatch
        #expect(compiled.accepts(text) == expected, "round \(round), seed \(seed): \(text) \(expected) in \(grammar)")
      }
    }
    #expect(compiledCount > 15)
  }

  @Test("Masks of random grammars over random vocabularies equal trying each token; rollback leads back")
  func randomMasks() throws {
    let seed = UInt64.random(in: 0..<1_000_000)
    print("MaskTests.randomMasks: seed \(seed)")
    var generator = Generator(random: SeededGenerator(seed: seed))
    for round in 0..<100 {
      let grammar = generator.grammar()
      let tokens = (0..<40).map { _ in
        (0...generator.random.below(4)).map { _ in Self.alphabet[generator.random.below(Self.alphabet.count)] }
      }
      guard let compiled = try? CompiledGrammar.of(grammar, .of(tokens)) else { continue }
      let matcher = GrammarMatcher(compiled)
      var masks: [[UInt32]] = []
      var accepted = 0
      for _ in 0..<12 {
        // Near the limit of ambiguity tokens are left out, in an order that trying one by one does not repeat.
        if matcher.threadCount > 100 { break }
        let mask = matcher.mask()
        let tried = matcher.maskByTrying()
        #expect(mask == tried, "round \(round), seed \(seed), tokens \(difference(mask, tried)) in \(grammar)")
        masks.append(mask)
        let allowed = (0..<tokens.count).filter { mask[$0 >> 5] >> UInt32($0 & 31) & 1 != 0 }
        guard let token = allowed.randomElement(using: &generator.random) else { break }
        #expect(matcher.accept(TokenID(token)))
        accepted += 1
      }
      // The last mask may be of a place after which no token fits.
      for (step, mask) in masks.enumerated().reversed() {
        if step + 1 < masks.count || accepted == masks.count {
          #expect(matcher.rollback(1), "round \(round), seed \(seed)")
        }
        #expect(matcher.mask() == mask, "round \(round), seed \(seed)")
      }
    }
  }

  @Test("Rolling back any number of tokens gives the masks that were there")
  func rollback() throws {
    let texts = [
      "{", "}", "\"", "\"a", "a\"", "a", "b", ":", "1", ",", "[", "]", "\":", "\",\"", "true", " ", "\n", "{\"",
    ]
    let compiled = try CompiledGrammar.of(.jsonObject, .of(texts.map { Array($0.utf8) }))
    let seed = UInt64.random(in: 0..<1_000_000)
    print("MaskTests.rollback: seed \(seed)")
    var random = SeededGenerator(seed: seed)
    for _ in 0..<40 {
      let matcher = GrammarMatcher(compiled)
      var masks = [matcher.mask()]
      for _ in 0..<60 {
        let count = random.below(4)
        if random.below(4) == 0, count < masks.count {
          #expect(matcher.rollback(count))
          masks.removeLast(count)
        } else {
          let mask = masks[masks.count - 1]
          let allowed = (0...texts.count).filter { mask[$0 >> 5] >> UInt32($0 & 31) & 1 != 0 }
          guard let token = allowed.randomElement(using: &random) else { continue }
          #expect(matcher.accept(TokenID(token)))
          masks.append(matcher.mask())
        }
        #expect(matcher.mask() == masks[masks.count - 1], "seed \(seed)")
        #expect(matcher.copy().mask() == masks[masks.count - 1], "seed \(seed)")
      }
    }
  }

  @Test("End tokens are allowed exactly where the text may end")
  func endTokens() throws {
    let compiled = try CompiledGrammar.of(.regex("ab?"), .of(["a", "b", "ab"].map { Array($0.utf8) }))
    let matcher = GrammarMatcher(compiled)
    #expect(matcher.mask() == [0b0101] && !matcher.accept(3))
    #expect(matcher.accept(0) && matcher.mask() == [0b1010] && matcher.isAccepting)
    #expect(matcher.accept(3) && matcher.isTerminated && matcher.mask() == [0] && !matcher.accept(1))
    #expect(matcher.rollback(1) && matcher.accept(1) && matcher.mask() == [0b1000])
  }

  @Test("Forced text")
  func forced() throws {
    let object = ObjectExpression([
      .init("name", .string(.anything), isRequired: true), .init("age", .regular(.jsonNumber), isRequired: true),
    ])
    var compact = object
    compact.whitespace = .compact
    compact.order = .declared
    let matcher = GrammarMatcher(try .of(Grammar(root: .object(compact))))
    #expect(String(decoding: matcher.forcedBytes(), as: UTF8.self) == #"{"name":""#)
    #expect(matcher.accept(bytes: #"{"name":"x""#.utf8) == 11)
    #expect(String(decoding: matcher.forcedBytes(), as: UTF8.self) == #","age":"#)
    #expect(matcher.accept(bytes: #","age":0"#.utf8) == 8)
    #expect(matcher.forcedBytes().isEmpty)
  }

  private static let vocabularies = ["llama3", "qwen2", "minimind", "gpt-oss"]

  /// Real vocabularies, each in a state reached by following a text, and then at random.
  @Test("Masks over real vocabularies equal trying each token", arguments: vocabularies)
  func realVocabularies(_ name: String) throws {
    let paths = ["derived_tokenizer.json", "derived_qwen3_tokenizer.json", "tokenizer.json"].map {
      "tokenizers/\(name)/\($0)"
    }
    guard let path = paths.first(where: { SharedData.exists($0) }) else { return }
    let tokenizer = try Tokenizer.load(file: SharedData.root + path)
    let compiler = GrammarCompiler(vocabulary: .of(tokenizer))
    let seed = UInt64.random(in: 0..<1_000_000)
    print("MaskTests.realVocabularies: \(name), seed \(seed)")
    var random = SeededGenerator(seed: seed)
    var person = ObjectExpression(
      [
        .init("name", .string(.length(1, 20)), isRequired: true),
        .init("mail", .string(try .pattern("^[a-z0-9._]+@[a-z]{2,8}\\.com$", search: true))),
        .init("na\u{EF}ve", .regular(.jsonNumber)),
      ], additional: .string(.anything))
    person.order = .any
    let grammars: [Grammar] = [
      try Grammar(.jsonObject), Grammar(root: .object(person)),
      try Grammar(.regex("[a-z]{3,9}( [\\p{L}]+){2,}[.!?]")), try Grammar(.choices(["yes", "no", "maybe, not sure"])),
      try Grammar(.ebnf("root ::= (\"\u{4E2D}\u{6587}\" | [^ab]{2,5} \"\\n\")+")),
    ]
    for (index, grammar) in grammars.enumerated() {
      let compiled = try compiler.compile(grammar)
      let matcher = GrammarMatcher(compiled)
      for step in 0..<8 {
        let mask = matcher.mask()
        // All tokens are tried in one state of each grammar, a part of them in some others: it takes a while.
        if step == index % 3 || random.below(2) == 0 {
          let part = step == index % 3 ? 1 : 16
          let tried = matcher.maskByTrying(every: part, from: random.below(part), known: mask)
          let wrong = difference(mask, tried)
          #expect(
            wrong.isEmpty,
            "grammar \(index), step \(step), seed \(seed): tokens \(wrong.prefix(5)) of \(wrong.count) differ")
        }
        let allowed = (0..<tokenizer.vocabularySize).filter { mask[$0 >> 5] >> UInt32($0 & 31) & 1 != 0 }
        guard let token = allowed.randomElement(using: &random) else { break }
        #expect(matcher.accept(TokenID(token)))
      }
    }
  }
}
