package import ApusCore
package import ApusTokenization

/// Limits the chain of thought: once it has used up its tokens, the tokens that end it are forced, and what follows is the
/// model's own again. A grammar may stand behind it, which sees every token.
package final class ThinkingBudgetConstraint: TokenConstraint {
  private let inner: (any TokenConstraint)?
  private let rules: ThinkingBudgetRules

  /// - Parameters:
  ///   - inner: what else limits the tokens.
  ///   - takesForced: whether the end is taken without a forward pass for each of its tokens (jump-forward); without, each
  ///     is drawn with a mask that allows nothing else.
  package init(
    _ inner: (any TokenConstraint)?, budget: Int, marks: ThinkingMarks, tokenizer: Tokenizer, vocabularySize: Int,
    takesForced: Bool
  ) {
    self.inner = inner
    rules = ThinkingBudgetRules(
      budget: budget, marks: marks, tokenizer: tokenizer, vocabularySize: vocabularySize, takesForced: takesForced)
  }

  package var exclusion: AnyObject { inner?.exclusion ?? self }

  package func makeTokenMatcher() -> any TokenMatcher { ThinkingBudgetMatcher(inner?.makeTokenMatcher(), rules) }
}

/// What is the same for all outputs of a request.
struct ThinkingBudgetRules: Sendable {
  let budget: Int
  let tokenizer: Tokenizer
  let vocabularySize: Int
  let takesForced: Bool
  let opens: [[UInt8]]
  let closes: [[UInt8]]
  let closing: [UInt8]
  let isOpen: Bool
  let opensAnywhere: Bool
  let longestMark: Int

  init(budget: Int, marks: ThinkingMarks, tokenizer: Tokenizer, vocabularySize: Int, takesForced: Bool) {
    self.budget = budget
    self.tokenizer = tokenizer
    self.vocabularySize = vocabularySize
    self.takesForced = takesForced
    opens = marks.opens.filter { !$0.isEmpty }.map { Array($0.utf8) }
    closes = marks.closes.filter { !$0.isEmpty }.map { Array($0.utf8) }
    closing = Array(marks.closing.utf8)
    isOpen = marks.isOpen
    opensAnywhere = marks.opensAnywhere
    longestMark = (opens + closes).map(\.count).max() ?? 0
  }
}

/// Follows an output through its chain of thought and counts its tokens.
///
/// Marks are looked for in the bytes of the tokens, so that it does not matter how many tokens spell one. Tokens that
/// spell marks count as well where they stand within the thought.
final class ThinkingBudgetMatcher: TokenMatcher {
  private enum Place {
    /// Before the first text that is not white space: a mark may begin the thought.
    case start
    case thinking
    /// The end is being forced.
    case closing
    /// Behind the thought or beside it.
    case answer
  }

  private let inner: (any TokenMatcher)?
  private let rules: ThinkingBudgetRules

  private var place: Place
  /// Tokens of the thought so far.
  private var used = 0
  /// The last bytes: as many as the longest mark has. At the start, all bytes but white space before them.
  private var tail: [UInt8] = []
  /// The tokens that end the thought, and how many of them came.
  private var ending: [TokenID] = []
  private var ended = 0

  init(_ inner: (any TokenMatcher)?, _ rules: ThinkingBudgetRules) {
    self.inner = inner
    self.rules = rules
    place = rules.isOpen ? .thinking : rules.opens.isEmpty ? .answer : .start
    closeIfUsedUp()
  }

  /// A matcher in the same place over a copy of the inner one.
  private init(_ other: ThinkingBudgetMatcher, _ inner: (any TokenMatcher)?) {
    self.inner = inner
    rules = other.rules
    place = other.place
    used = other.used
    tail = other.tail
    ending = other.ending
    ended = other.ended
  }

  func fork() -> (any TokenMatcher)? {
    guard let inner else { return ThinkingBudgetMatcher(self, nil) }
    guard let copy = inner.fork() else { return nil }
    return ThinkingBudgetMatcher(self, copy)
  }

  var maskWordCount: Int { (rules.vocabularySize + 31) / 32 }
  var isTerminated: Bool { inner?.isTerminated ?? false }
  var failure: EngineError? { inner?.failure }
  var allowsEverything: Bool { place != .closing && (inner?.allowsEverything ?? true) }

  func fillMask(into mask: UnsafeMutablePointer<UInt32>) { _ = fillMask(into: mask, work: .max) }

  func fillMask(into mask: UnsafeMutablePointer<UInt32>, work: Int) -> Bool {
    if let inner, !inner.allowsEverything {
      if !inner.fillMask(into: mask, work: work) { return false }
    } else {
      mask.update(repeating: ~0, count: maskWordCount)
    }
    guard place == .closing else { return true }
    let token = ending[ended]
    // A grammar that knows no end of thought here keeps its word.
    guard mask[Int(token >> 5)] >> UInt32(token & 31) & 1 == 1 else { return true }
    mask.update(repeating: 0, count: maskWordCount)
    mask[Int(token >> 5)] = 1 << UInt32(token & 31)
    return true
  }

  func accept(_ token: TokenID) -> Bool {
    if let inner, !inner.isTerminated, !inner.accept(token) { return false }
    follow(token)
    return true
  }

  func takeForcedTokens() -> [TokenID] {
    guard rules.takesForced else { return [] }
    var forced: [TokenID] = []
    while true {
      if place == .closing {
        let token = ending[ended]
        if let inner, !inner.isTerminated, !inner.accept(token) {
          // The grammar knows no end of thought here: what it allows is drawn.
          place = .answer
          continue
        }
        follow(token)
        forced.append(token)
        continue
      }
      let more = inner?.takeForcedTokens() ?? []
      if more.isEmpty { return forced }
      for token in more { follow(token) }
      forced += more
    }
  }

  /// Takes down a token that came.
  private func follow(_ token: TokenID) {
    if place == .closing {
      if token == ending[ended] {
        ended += 1
      } else {
        place = .answer
      }
      if ended == ending.count {
        place = .answer
        ending = []
        tail = []
      }
      return
    }
    let isWithin = place == .thinking
    for byte in rules.tokenizer.tokenBytes(token) { follow(byte) }
    if isWithin, place == .thinking { used += 1 }
    closeIfUsedUp()
  }

  private func follow(_ byte: UInt8) {
    switch place {
    case .start:
      if tail.isEmpty, byte == 0x20 || (0x09...0x0D).contains(byte) { return }
      tail.append(byte)
      if rules.opens.contains(tail) {
        place = .thinking
        tail = []
      } else if !rules.opens.contains(where: { $0.starts(with: tail) }) {
        place = .answer
        keepTail()
      }
    case .thinking:
      tail.append(byte)
      if rules.closes.contains(where: { tail.ends(with: $0) }) {
        place = .answer
        tail = []
      } else {
        keepTail()
      }
    case .answer:
      guard rules.opensAnywhere else { return }
      tail.append(byte)
      if rules.opens.contains(where: { tail.ends(with: $0) }) {
        place = .thinking
        tail = []
      } else {
        keepTail()
      }
    case .closing: break
    }
  }

  private func keepTail() {
    if tail.count > rules.longestMark { tail.removeFirst(tail.count - rules.longestMark) }
  }

  /// Begins to force the end where the tokens are used up. Not within a character.
  private func closeIfUsedUp() {
    guard place == .thinking, used >= rules.budget, !rules.closing.isEmpty, endsWithWholeCharacter else { return }
    // Of a mark that is half there the rest is written; otherwise the mark gets a line of its own, as templates write it.
    var text = rules.closing
    var length = min(rules.closing.count - 1, tail.count)
    while length > 0 && !tail.suffix(length).elementsEqual(rules.closing.prefix(length)) { length -= 1 }
    if length > 0 {
      text.removeFirst(length)
    } else if let last = tail.last, last != 0x0A {
      text.insert(0x0A, at: 0)
    }
    guard let tokens = try? rules.tokenizer.encode(bytes: text, addSpecialTokens: false), !tokens.isEmpty,
      tokens.allSatisfy({ $0 >= 0 && Int($0) < rules.vocabularySize })
    else { return }
    ending = tokens
    ended = 0
    place = .closing
  }

  private var endsWithWholeCharacter: Bool {
    var length = 0
    for byte in tail.reversed().prefix(4) {
      length += 1
      if byte & 0xC0 == 0x80 { continue }
      return length == (byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4)
    }
    return true
  }
}

extension [UInt8] {
  fileprivate func ends(with other: [UInt8]) -> Bool { suffix(other.count).elementsEqual(other) }
}
