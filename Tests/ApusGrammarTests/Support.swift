import ApusCore
import ApusGrammar
import ApusTokenization
import Foundation
import Testing

/// Real files that tests read when they are there.
enum SharedData {
  static let root: String = {
    let package = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
      .deletingLastPathComponent()
    for path in ["../shared/data", "../../shared/data"] {
      let candidate = package.appendingPathComponent(path).standardizedFileURL.path
      if FileManager.default.fileExists(atPath: candidate) { return candidate + "/" }
    }
    print("The directory shared/data is absent: tests that read real tokenizers and conformance cases are skipped.")
    return ""
  }()

  static func exists(_ path: String) -> Bool {
    !root.isEmpty && FileManager.default.fileExists(atPath: root + path)
  }

  static func text(_ path: String) throws -> String {
    String(decoding: try Data(contentsOf: URL(fileURLWithPath: root + path)), as: UTF8.self)
  }
}

/// A generator with a seed, so that a failure can be repeated (SplitMix64).
struct SeededGenerator: RandomNumberGenerator {
  private var state: UInt64

  init(seed: UInt64) { state = seed }

  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return z ^ (z >> 31)
  }

  mutating func below(_ limit: Int) -> Int { Int(next() % UInt64(limit)) }
}

extension TokenVocabulary {
  /// A vocabulary of texts; the last token, empty, ends the text.
  static func of(_ texts: [[UInt8]]) -> TokenVocabulary {
    TokenVocabulary(tokens: texts + [[]], isSpecial: { _ in false }, endTokens: [TokenID(texts.count)])
  }

  static let none = TokenVocabulary(tokens: [], isSpecial: { _ in false }, endTokens: [])

  static func of(_ tokenizer: Tokenizer) -> TokenVocabulary {
    TokenVocabulary(
      tokens: (0..<tokenizer.vocabularySize).map { tokenizer.tokenBytes(TokenID($0)) },
      isSpecial: { tokenizer.isSpecial($0) }, endTokens: [tokenizer.eosID].compactMap(\.self))
  }
}

extension CompiledGrammar {
  static func of(_ grammar: Grammar, _ vocabulary: TokenVocabulary = .none) throws -> CompiledGrammar {
    try GrammarCompiler(vocabulary: vocabulary).compile(grammar)
  }

  static func of(_ specification: GrammarSpecification, _ vocabulary: TokenVocabulary = .none) throws -> CompiledGrammar
  {
    try GrammarCompiler(vocabulary: vocabulary).compile(specification)
  }

  /// Whether a text as a whole is in the language.
  func accepts(_ text: some Sequence<UInt8>) -> Bool {
    let matcher = GrammarMatcher(self)
    for byte in text where !matcher.accept(byte: byte) { return false }
    return matcher.isAccepting
  }

  func accepts(_ text: String) -> Bool { accepts(text.utf8) }
}

extension GrammarMatcher {
  /// The mask by trying each token by itself, or every so many from a place on; the others are taken from `known`.
  func maskByTrying(every step: Int = 1, from start: Int = 0, known: [UInt32]? = nil) -> [UInt32] {
    var words = known ?? [UInt32](repeating: 0, count: grammar.vocabulary.maskWordCount)
    let trial = copy()
    for token in stride(from: start, to: grammar.vocabulary.count, by: step) {
      words[token >> 5] &= ~(1 << UInt32(token & 31))
      guard trial.accept(TokenID(token)) else { continue }
      words[token >> 5] |= 1 << UInt32(token & 31)
      #expect(trial.rollback(1))
    }
    return words
  }
}

/// Tokens in which two masks differ, for messages.
func difference(_ left: [UInt32], _ right: [UInt32]) -> [Int] {
  zip(left, right).enumerated().flatMap { index, pair in
    (0..<32).filter { (pair.0 ^ pair.1) >> UInt32($0) & 1 != 0 }.map { index * 32 + $0 }
  }
}

func errorMessage(_ body: () throws -> Void) -> String? {
  do {
    try body()
    return nil
  } catch let error as EngineError {
    return error.message
  } catch {
    return "\(error)"
  }
}
