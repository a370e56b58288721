package import ApusCore

/// The dialect of a pattern.
package enum PatternDialect: Sendable, Hashable {
  /// ECMA-262 with Unicode, as JSON Schema's `pattern` and guided decoding use it: `\d` and `\w` are ASCII, `.` stops at
  /// every line terminator. Escapes that mean nothing stand for their character; `\A`, `\z` and `\Z` are anchors and
  /// inline flags are read, since patterns written for other engines are common.
  case ecmaScript
  /// The syntax of Rust's `regex`: Unicode classes, set operations and POSIX classes in brackets, inline flags.
  case rust
}

extension RegularExpression {
  /// The texts in which a pattern is found, or the texts that it matches as a whole.
  ///
  /// Lazy quantifiers are equal to greedy ones, since only the language counts. Anchors, word boundaries and look-ahead are
  /// turned into conditions on the rest of the text, which works wherever they do not stand inside an unlimited repetition;
  /// there, and for back-references, look-behind and atomic groups, the pattern is refused.
  ///
  /// - Parameter search: whether text may stand before and after the match, as for JSON Schema's `pattern`.
  /// - Throws: `EngineError` with code `invalidRequest`, the reason and its place.
  package static func pattern(_ source: String, search: Bool, dialect: PatternDialect = .ecmaScript) throws(EngineError)
    -> RegularExpression
  {
    var parser = RegularPatternParser(source, dialect)
    let tree = try parser.parse()
    var translator = PatternTranslator()
    return try translator.translate(tree, search: search)
  }
}

/// A parsed pattern.
indirect enum RegularPatternTree {
  case empty
  case scalars(ScalarRanges)
  case sequence([RegularPatternTree])
  case alternation([RegularPatternTree])
  case repetition(RegularPatternTree, Int, Int?)
  case look(RegularPatternTree, negative: Bool)
  case textStart, textEnd, lineStart, lineEnd
  case wordBoundary(negative: Bool)

  /// Whether what it matches depends on nothing around it.
  var isPlain: Bool {
    switch self {
    case .empty, .scalars: true
    case .sequence(let parts), .alternation(let parts): parts.allSatisfy(\.isPlain)
    case .repetition(let part, _, _): part.isPlain
    default: false
    }
  }
}

/// Turns a pattern tree into a regular expression: from the back, each part as a function of the language of the rest of
/// the text, so that conditions on the rest become intersections.
private struct PatternTranslator {
  /// What stands before a place in the text.
  enum Context: Int, CaseIterable { case start, lineFeed, word, other, unknown }

  typealias Rest = (Context) throws(EngineError) -> RegularExpression

  private static let lineFeed = ScalarRanges(0x0A)
  private var work = 0

  private func refuse(_ reason: String) -> EngineError {
    EngineError(.unsupported, "The pattern cannot be enforced: \(reason)")
  }

  mutating func translate(_ tree: RegularPatternTree, search: Bool) throws(EngineError) -> RegularExpression {
    if tree.isPlain {
      let plain = try plain(tree)
      return search ? .concatenation([.anything, plain, .anything]) : plain
    }
    let end: Rest = { (_: Context) throws(EngineError) in search ? .anything : .empty }
    let fromStart = try language(tree, .start, end)
    guard search else { return fromStart }
    var parts = [fromStart]
    // Where context tells, text before the match is split by its last character.
    if Self.dependsOnContext(tree) {
      let others = ScalarRanges(RegularPatternTree.wordRanges).union(Self.lineFeed).inverted
      for (context, set) in [
        (Context.word, ScalarRanges(RegularPatternTree.wordRanges)), (.lineFeed, Self.lineFeed), (.other, others),
      ] {
        let rest = try language(tree, context, end)
        if rest != .never { parts.append(.concatenation([.anything, .scalars(set), rest])) }
      }
    } else {
      let rest = try language(tree, .unknown, end)
      if rest != .never { parts.append(.concatenation([.anything, rest])) }
    }
    return parts.count == 1 ? parts[0] : .union(parts)
  }

  private static func dependsOnContext(_ tree: RegularPatternTree) -> Bool {
    switch tree {
    case .lineStart, .wordBoundary: true
    case .sequence(let parts), .alternation(let parts): parts.contains { dependsOnContext($0) }
    case .repetition(let part, _, _), .look(let part, _): dependsOnContext(part)
    default: false
    }
  }

  private func plain(_ tree: RegularPatternTree) throws(EngineError) -> RegularExpression {
    switch tree {
    case .empty: return .empty
    case .scalars(let set): return .scalars(set)
    case .sequence(let parts):
      var result: [RegularExpression] = []
      for part in parts { result.append(try plain(part)) }
      return .concatenation(result)
    case .alternation(let parts):
      var result: [RegularExpression] = []
      for part in parts { result.append(try plain(part)) }
      return .union(result)
    case .repetition(let part, let minimum, let maximum):
      return .repetition(try plain(part), minimum: minimum, maximum: maximum)
    default: throw refuse("an assertion stands where it cannot be turned into a condition")
    }
  }

  private static func canBeEmpty(_ tree: RegularPatternTree) -> Bool {
    switch tree {
    case .empty: true
    case .scalars: false
    case .sequence(let parts): parts.allSatisfy { canBeEmpty($0) }
    case .alternation(let parts): parts.contains { canBeEmpty($0) }
    case .repetition(let part, let minimum, _): minimum == 0 || canBeEmpty(part)
    default: true
    }
  }

  /// The characters with which a plain tree can end.
  private static func lastScalars(_ tree: RegularPatternTree) -> ScalarRanges {
    switch tree {
    case .scalars(let set): return set
    case .sequence(let parts):
      var result = ScalarRanges()
      for part in parts.reversed() {
        result = result.union(lastScalars(part))
        if !canBeEmpty(part) { break }
      }
      return result
    case .alternation(let parts): return parts.reduce(ScalarRanges()) { $0.union(lastScalars($1)) }
    case .repetition(let part, _, _): return lastScalars(part)
    default: return ScalarRanges()
    }
  }

  private static func context(after set: ScalarRanges) -> Context {
    let word = ScalarRanges(RegularPatternTree.wordRanges)
    if set.intersection(word.inverted).isEmpty { return .word }
    if set == lineFeed { return .lineFeed }
    if set.intersection(word.union(lineFeed)).isEmpty { return .other }
    return .unknown
  }

  private mutating func language(_ tree: RegularPatternTree, _ context: Context, _ rest: Rest) throws(EngineError)
    -> RegularExpression
  {
    work += 1
    if work > 20_000 { throw refuse("its assertions multiply beyond 20000 cases") }
    switch tree {
    case .empty: return try rest(context)
    case .scalars(let set):
      let after = Self.context(after: set)
      if after != .unknown { return Self.then(.scalars(set), try rest(after)) }
      let word = ScalarRanges(RegularPatternTree.wordRanges)
      let sets: [(ScalarRanges, Context)] = [
        (set.intersection(word), .word), (set.intersection(Self.lineFeed), .lineFeed),
        (set.intersection(word.union(Self.lineFeed).inverted), .other),
      ]
      var results: [RegularExpression] = []
      for (_, context) in sets { results.append(try rest(context)) }
      if results[0] == results[1], results[1] == results[2] { return Self.then(.scalars(set), results[0]) }
      return .union(zip(sets, results).map { Self.then(.scalars($0.0), $1) })
    case _ where tree.isPlain:
      let expression = try plain(tree)
      let last = Self.lastScalars(tree)
      var after = Self.context(after: last)
      var rests: [RegularExpression] = []
      if after == .unknown {
        // Unknown is good enough where nothing asks.
        for context in [Context.word, .lineFeed, .other] { rests.append(try rest(context)) }
        if rests[0] == rests[1], rests[1] == rests[2] {
          after = .word
        } else if case .sequence(let parts) = tree {
          return try sequence(parts[...], context, rest)
        } else if case .alternation(let parts) = tree {
          var results: [RegularExpression] = []
          for part in parts { results.append(try language(part, context, rest)) }
          return .union(results)
        } else if case .repetition(let part, let minimum, let maximum) = tree {
          return try splitRepetition(part, minimum, maximum, context, rest)
        }
      }
      let following = try rest(after)
      guard Self.canBeEmpty(tree) else { return Self.then(expression, following) }
      let skipped = try rest(context)
      if skipped == following { return Self.then(expression, following) }
      return .union([skipped, Self.then(.intersection([expression, .complement(.empty)]), following)])
    case .sequence(let parts): return try sequence(parts[...], context, rest)
    case .alternation(let parts):
      var results: [RegularExpression] = []
      for part in parts {
        let result = try language(part, context, rest)
        if result != .never { results.append(result) }
      }
      return results.isEmpty ? .never : results.count == 1 ? results[0] : .union(results)
    case .repetition(let part, let minimum, let maximum):
      return try assertionRepetition(part, minimum, maximum, context, rest)
    case .look(let part, let negative):
      let condition = try language(part, context) { (_: Context) throws(EngineError) in .anything }
      let following = try rest(context)
      if following == .never { return .never }
      return .intersection([following, negative ? .complement(condition) : condition])
    case .textStart:
      // In the middle `^` never holds; `unknown` is the middle.
      return context == .start ? try rest(.start) : .never
    case .textEnd: return Self.atEnd(try rest(context))
    case .lineStart:
      switch context {
      case .start, .lineFeed: return try rest(context)
      case .word, .other: return .never
      case .unknown: throw refuse("a line anchor stands where the character before is not known")
      }
    case .lineEnd:
      let following = try rest(context)
      if following == .never { return .never }
      return .intersection([following, .union([.empty, .concatenation([.text("\n"), .anything])])])
    case .wordBoundary(let negative):
      let wordNext = RegularExpression.concatenation([.scalars(ScalarRanges(RegularPatternTree.wordRanges)), .anything])
      let following = try rest(context)
      if following == .never { return .never }
      switch context {
      case .unknown: throw refuse("a word boundary stands where the character before is not known")
      case .word:
        return .intersection([following, negative ? wordNext : .complement(wordNext)])
      default: return .intersection([following, negative ? .complement(wordNext) : wordNext])
      }
    }
  }

  private static func then(_ first: RegularExpression, _ rest: RegularExpression) -> RegularExpression {
    if first == .never || rest == .never { return .never }
    if rest == .empty { return first }
    if case .concatenation(let parts) = rest { return .concatenation([first] + parts) }
    return .concatenation([first, rest])
  }

  /// The empty text if a language holds it.
  private static func atEnd(_ rest: RegularExpression) -> RegularExpression {
    if rest.acceptsEmpty { return .empty }
    return .never
  }

  private mutating func sequence(_ parts: ArraySlice<RegularPatternTree>, _ context: Context, _ rest: Rest)
    throws(EngineError) -> RegularExpression
  {
    guard let first = parts.first else { return try rest(context) }
    let tail = parts.dropFirst()
    // Plain parts in a row are one, so that contexts are asked for once.
    if tail.allSatisfy(\.isPlain), first.isPlain, parts.count > 1 {
      let whole = try plainRun(parts, context, rest)
      if let whole { return whole }
    }
    var copy = self
    var known: [Context: RegularExpression] = [:]
    let result = try language(first, context) { (context: Context) throws(EngineError) in
      if let found = known[context] { return found }
      let value = try copy.sequence(tail, context, rest)
      known[context] = value
      return value
    }
    work = max(work, copy.work)
    return result
  }

  private mutating func plainRun(_ parts: ArraySlice<RegularPatternTree>, _ context: Context, _ rest: Rest)
    throws(EngineError) -> RegularExpression?
  {
    var rests: [RegularExpression] = []
    for context in [context, .word, .lineFeed, .other] { rests.append(try rest(context)) }
    guard rests.allSatisfy({ $0 == rests[0] }) else { return nil }
    var result = rests[0]
    for part in parts.reversed() { result = Self.then(try plain(part), result) }
    return result
  }

  /// A plain repetition after which the context matters: the last round stands alone.
  private mutating func splitRepetition(
    _ part: RegularPatternTree, _ minimum: Int, _ maximum: Int?, _ context: Context, _ rest: Rest
  ) throws(EngineError) -> RegularExpression {
    if Self.canBeEmpty(part) { throw refuse("an assertion follows a repetition of what can be empty") }
    var results: [RegularExpression] = []
    if minimum == 0 { results.append(try rest(context)) }
    if maximum != 0 {
      let before = RegularExpression.repetition(
        try plain(part), minimum: max(minimum - 1, 0), maximum: maximum.map { $0 - 1 })
      results.append(Self.then(before, try language(part, .unknown, rest)))
    }
    return .union(results)
  }

  /// A repetition of something with assertions: unrolled if it is short; an unlimited one only if it can be once.
  private mutating func assertionRepetition(
    _ part: RegularPatternTree, _ minimum: Int, _ maximum: Int?, _ context: Context, _ rest: Rest
  ) throws(EngineError) -> RegularExpression {
    if maximum == 0 { return try rest(context) }
    let isSingle: Bool
    switch part {
    case .look, .textStart, .textEnd, .lineStart, .lineEnd, .wordBoundary: isSingle = true
    default: isSingle = false
    }
    if isSingle { return minimum == 0 ? try rest(context) : try language(part, context, rest) }
    guard let maximum, maximum <= 16 else {
      throw refuse("an anchor, boundary or look-ahead stands inside an unlimited repetition")
    }
    var trees: RegularPatternTree = .empty
    for round in stride(from: maximum, to: 0, by: -1) {
      let one = RegularPatternTree.sequence([part, trees])
      trees = round > minimum ? .alternation([.empty, one]) : one
    }
    return try language(trees, context, rest)
  }
}

extension RegularPatternTree {
  /// `\w` in ASCII.
  static let wordRanges: [ClosedRange<UInt32>] = [0x30...0x39, 0x41...0x5A, 0x5F...0x5F, 0x61...0x7A]
}

extension RegularExpression {
  /// Whether the empty text is in the language.
  package var acceptsEmpty: Bool {
    switch self {
    case .never, .scalars: false
    case .empty, .anything, .digits: true
    case .literal(let bytes): bytes.isEmpty
    case .concatenation(let parts), .intersection(let parts): parts.allSatisfy(\.acceptsEmpty)
    case .union(let parts): parts.contains(where: \.acceptsEmpty)
    case .complement(let part): !part.acceptsEmpty
    case .repetition(let part, let minimum, _): minimum == 0 || part.acceptsEmpty
    case .jsonEscaped(let part): part.acceptsEmpty
    }
  }
}
