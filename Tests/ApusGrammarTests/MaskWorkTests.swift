import ApusCore
import ApusGrammar
import ApusTokenization
import Foundation
import Testing

/// Masks within a bound on work.
@Suite struct MaskWorkTests {
  /// All texts of one to three letters, and some longer ones: a tree of some thousand nodes.
  private static let vocabulary: TokenVocabulary = {
    let letters = Array("abcdef0123456789\"{}[]:, \\-".utf8)
    var texts = letters.map { [$0] }
    for first in letters { for second in letters { texts.append([first, second]) } }
    for first in letters { for second in letters { for third in letters { texts.append([first, second, third]) } } }
    for length in 4..<40 { texts.append((0..<length).map { letters[($0 * 7 + length) % letters.count] }) }
    return .of(texts)
  }()

  private static let schemas = [
    #"{"type": "object", "properties": {"a": {"type": "string", "pattern": "^(ab|cd)*e?f{2,9}$"}, "b": {"type": "integer"}}}"#,
    #"{"type": "array", "items": {"anyOf": [{"type": "string", "maxLength": 9}, {"type": "number"}, {"enum": ["abc", 12]}]}}"#,
    #"{"type": "object", "additionalProperties": {"type": "string", "minLength": 3}, "propertyNames": {"pattern": "^[a-d]+$"}}"#,
  ]

  /// What was given up, at any point, leaves nothing behind: the mask that follows is that of a grammar that was never
  /// interrupted.
  @Test func givingUpChangesNothing() throws {
    let seed =
      ProcessInfo.processInfo.environment["FUZZ_SEED"].flatMap { UInt64($0) } ?? UInt64.random(in: 0...UInt64.max)
    var random = SeededGenerator(seed: seed)
    var givenUp = 0
    for schema in Self.schemas {
      let specification = GrammarSpecification.jsonSchema(schema)
      // Two compilers, so that no mask is shared.
      let interrupted = GrammarMatcher(try .of(specification, Self.vocabulary))
      let plain = GrammarMatcher(try .of(specification, Self.vocabulary))
      var mask = [UInt32](repeating: 0, count: plain.maskWordCount)
      for _ in 0..<40 {
        let expected = plain.mask()
        var isDone = false
        var tries = 0
        while !isDone, tries < 6 {
          tries += 1
          isDone = mask.withUnsafeMutableBufferPointer { words in
            interrupted.fillMask(into: words.baseAddress!, work: random.below(1 << (1 + random.below(12))))
          }
          if !isDone { givenUp += 1 }
        }
        if !isDone {
          mask.withUnsafeMutableBufferPointer { interrupted.fillMask(into: $0.baseAddress!) }
        }
        #expect(mask == expected, "FUZZ_SEED=\(seed)")
        if mask != expected { return }
        let allowed = (0..<plain.maskWordCount * 32).filter { expected[$0 >> 5] >> UInt32($0 & 31) & 1 == 1 }
        guard !allowed.isEmpty else { break }
        let token = TokenID(allowed[random.below(allowed.count)])
        #expect(plain.accept(token) && interrupted.accept(token), "FUZZ_SEED=\(seed)")
        if plain.isTerminated { break }
      }
    }
    #expect(givenUp > 0, "FUZZ_SEED=\(seed)")
  }

  /// The bound holds: what no walk of a few nodes can find is given up, and enough work suffices.
  @Test func littleWorkDoesNotSuffice() throws {
    let grammar = try CompiledGrammar.of(.regex("(a|b1|c[0-9]e){3,40}[^x]*"), Self.vocabulary)
    let matcher = GrammarMatcher(grammar)
    #expect(matcher.accept(byte: UInt8(ascii: "a")) && matcher.accept(byte: UInt8(ascii: "b")))
    var mask = [UInt32](repeating: 0, count: matcher.maskWordCount)
    mask.withUnsafeMutableBufferPointer { words in
      #expect(!matcher.fillMask(into: words.baseAddress!, work: 3))
      #expect(matcher.fillMask(into: words.baseAddress!, work: 1 << 22))
      // Once known, it takes none.
      #expect(matcher.fillMask(into: words.baseAddress!, work: 0))
    }
    #expect(mask == matcher.mask())
  }
}
