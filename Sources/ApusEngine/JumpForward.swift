import ApusCore
import ApusGrammar
import ApusTokenization

/// A grammar together with the tokenizer, so that text which the grammar forces becomes tokens at once.
final class JumpForwardConstraint: TokenConstraint {
  private let grammar: CompiledGrammar
  private let tokenizer: Tokenizer

  init(_ grammar: CompiledGrammar, tokenizer: Tokenizer) {
    self.grammar = grammar
    self.tokenizer = tokenizer
  }

  var exclusion: AnyObject { grammar }

  func makeTokenMatcher() -> any TokenMatcher { JumpForwardMatcher(GrammarMatcher(grammar), tokenizer) }
}

/// Follows a text through a grammar and, where only one continuation is left, tokenizes it as the model would have
/// written it (jump-forward decoding, after SGLang: Zheng et al., 2024).
///
/// Tokens that were drawn stay as they are, since their K/V exist. The forced text is tokenized together with the end of
/// what stands before it, so that its tokens are those that belong after it. Its last token is left to a draw, unless the
/// text ends there: what follows might have become a part of it.
final class JumpForwardMatcher: TokenMatcher {
  private let matcher: GrammarMatcher
  private let tokenizer: Tokenizer
  /// The last tokens: enough for a tokenizer to see what comes before the forced text.
  private var context: [TokenID] = []
  private static let contextTokens = 8

  init(_ matcher: GrammarMatcher, _ tokenizer: Tokenizer) {
    self.matcher = matcher
    self.tokenizer = tokenizer
  }

  var maskWordCount: Int { matcher.maskWordCount }
  var isTerminated: Bool { matcher.isTerminated }
  var failure: EngineError? { matcher.failure }

  func fillMask(into mask: UnsafeMutablePointer<UInt32>) { matcher.fillMask(into: mask) }

  func fillMask(into mask: UnsafeMutablePointer<UInt32>, work: Int) -> Bool { matcher.fillMask(into: mask, work: work) }

  func accept(_ token: TokenID) -> Bool {
    guard matcher.accept(token) else { return false }
    if context.count == Self.contextTokens { context.removeFirst() }
    context.append(token)
    return true
  }

  func fork() -> (any TokenMatcher)? {
    let twin = JumpForwardMatcher(matcher.copy(), tokenizer)
    twin.context = context
    return twin
  }

  func takeForcedTokens() -> [TokenID] {
    var forced = matcher.forcedBytes()
    // A lone byte is one token at most, and that one is left to the draw.
    guard forced.count > 1 else { return [] }
    // Whole characters only. A text that breaks off within a character is not a text for a tokenizer.
    var before = context.flatMap(matcher.grammar.vocabulary.text(of:))
    guard Self.isWhole(before[...], from: before.startIndex) else { return [] }
    before.removeFirst(Self.leadingContinuations(before))
    while !forced.isEmpty && !Self.isWhole(forced[...], from: 0) { forced.removeLast() }
    if forced.isEmpty || forced[0] & 0xC0 == 0x80 { return [] }

    let probe = matcher.copy()
    var tokens = self.tokens(of: forced, after: before) ?? self.tokens(of: forced, after: []) ?? []
    for (index, token) in tokens.enumerated() where !probe.accept(token) {
      // Text that spells a special token, for one. What was accepted up to here stands.
      tokens.removeSubrange(index...)
      break
    }
    if tokens.isEmpty { return [] }
    if !mustEnd(probe) { tokens.removeLast() }
    for token in tokens where !accept(token) { fatalError("a copy of a matcher accepted another token than itself") }
    return tokens
  }

  /// The tokens of `text` where `before` stands before it; `nil` if a token of the whole lies across the border.
  private func tokens(of text: [UInt8], after before: [UInt8]) -> [TokenID]? {
    let whole = before + text
    guard let ids = try? tokenizer.encode(bytes: whole, addSpecialTokens: false) else { return nil }
    var spelled: [UInt8] = []
    var border: Int?
    // Some tokenizers put a space before a text that begins without one.
    var offset = 0
    for (index, id) in ids.enumerated() {
      if spelled.count - offset == before.count { border = index }
      spelled += matcher.grammar.vocabulary.text(of: id)
      if index == 0 && !before.isEmpty && spelled.first == 0x20 && whole.first != 0x20 { offset = 1 }
    }
    guard let border, spelled.dropFirst(offset).elementsEqual(whole) else { return nil }
    return Array(ids[border...])
  }

  /// Whether nothing but an end may follow.
  private func mustEnd(_ matcher: GrammarMatcher) -> Bool {
    guard matcher.isAccepting else { return false }
    return withUnsafeTemporaryAllocation(of: UInt32.self, capacity: maskWordCount) { mask in
      guard let words = mask.baseAddress else { return false }
      matcher.fillMask(into: words)
      for token in matcher.grammar.vocabulary.endTokens { words[Int(token >> 5)] &= ~(1 << UInt32(token & 31)) }
      return mask.allSatisfy { $0 == 0 }
    }
  }

  /// How many bytes at the beginning belong to a character that began before.
  private static func leadingContinuations(_ bytes: [UInt8]) -> Int {
    bytes.prefix { $0 & 0xC0 == 0x80 }.count
  }

  /// Whether bytes end with a whole character.
  private static func isWhole(_ bytes: ArraySlice<UInt8>, from start: Int) -> Bool {
    var index = bytes.endIndex
    while index > start && bytes.endIndex - index < 4 {
      index -= 1
      let byte = bytes[index]
      if byte & 0xC0 == 0x80 { continue }
      let length = byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4
      return bytes.endIndex - index == length
    }
    return bytes.isEmpty
  }
}
