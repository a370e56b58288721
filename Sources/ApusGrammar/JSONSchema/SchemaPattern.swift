internal import ApusCore

/// A regular expression of a schema, in the dialect of ECMA-262 that JSON Schema prescribes, as a tree.
indirect enum PatternTree {
  case empty
  case scalars(ScalarRanges)
  case sequence([PatternTree])
  case alternation([PatternTree])
  case repetition(PatternTree, Int, Int?)
  case assertion(Assertion)

  indirect enum Assertion {
    case start
    case end
    case wordBoundary(negated: Bool)
    case ahead(PatternTree, negated: Bool)
    case behind(PatternTree, negated: Bool)
  }

  var holdsAssertion: Bool {
    switch self {
    case .empty, .scalars: false
    case .sequence(let parts), .alternation(let parts): parts.contains { $0.holdsAssertion }
    case .repetition(let inner, _, _): inner.holdsAssertion
    case .assertion: true
    }
  }
}

/// What is wrong with a pattern, as the end of a sentence that begins with the pattern.
struct PatternError: Error {
  var reason: String
  var isSyntax = true
}

/// Reads patterns. `\d`, `\w` and `\s` mean what ECMA-262 says (ASCII digits, ASCII word characters, Unicode spaces).
struct SchemaPatternParser {
  private let scalars: [UInt32]
  private var index = 0
  private var depth = 0

  static let digits = ScalarRanges([0x30...0x39])
  static let word = ScalarRanges([0x30...0x39, 0x41...0x5A, 0x5F...0x5F, 0x61...0x7A])
  static let spaces = ScalarRanges([
    0x09...0x0D, 0x20...0x20, 0xA0...0xA0, 0x1680...0x1680, 0x2000...0x200A, 0x2028...0x2029, 0x202F...0x202F,
    0x205F...0x205F, 0x3000...0x3000, 0xFEFF...0xFEFF,
  ])
  static let lineEnds = ScalarRanges([0x0A...0x0A, 0x0D...0x0D, 0x2028...0x2029])

  static func parse(_ source: String) throws(PatternError) -> PatternTree {
    if source.utf8.count > 20_000 { throw PatternError(reason: "is longer than 20000 bytes", isSyntax: false) }
    var parser = SchemaPatternParser(scalars: source.unicodeScalars.map(\.value))
    let tree = try parser.alternation()
    if parser.index < parser.scalars.count { throw PatternError(reason: "has a ')' without its '('") }
    return tree
  }

  private init(scalars: [UInt32]) { self.scalars = scalars }

  private func peek(_ offset: Int = 0) -> UInt32? {
    index + offset < scalars.count ? scalars[index + offset] : nil
  }

  private func next(is text: String) -> Bool {
    var position = index
    for scalar in text.unicodeScalars {
      guard position < scalars.count, scalars[position] == scalar.value else { return false }
      position += 1
    }
    return true
  }

  private mutating func consume(_ text: String) -> Bool {
    guard next(is: text) else { return false }
    index += text.unicodeScalars.count
    return true
  }

  private mutating func alternation() throws(PatternError) -> PatternTree {
    depth += 1
    defer { depth -= 1 }
    if depth > 200 { throw PatternError(reason: "nests more than 200 groups", isSyntax: false) }
    var branches: [PatternTree] = []
    var current: [PatternTree] = []
    while let scalar = peek(), scalar != 0x29 {
      if scalar == 0x7C {
        index += 1
        branches.append(.sequence(current))
        current = []
      } else {
        current.append(try quantified())
      }
    }
    branches.append(.sequence(current))
    return branches.count == 1 ? branches[0] : .alternation(branches)
  }

  private mutating func quantified() throws(PatternError) -> PatternTree {
    let atom = try self.atom()
    let minimum: Int
    let maximum: Int?
    if consume("*") {
      (minimum, maximum) = (0, nil)
    } else if consume("+") {
      (minimum, maximum) = (1, nil)
    } else if consume("?") {
      (minimum, maximum) = (0, 1)
    } else if let counts = braces() {
      (minimum, maximum) = counts
      if let maximum, maximum < minimum { throw PatternError(reason: "has a repetition whose bounds are out of order") }
      if max(minimum, maximum ?? 0) > 1_000_000 {
        throw PatternError(reason: "repeats more than a million times", isSyntax: false)
      }
    } else {
      return atom
    }
    if case .assertion(let assertion) = atom {
      switch assertion {
      case .ahead: break
      default: throw PatternError(reason: "repeats an assertion")
      }
    }
    _ = consume("?")
    if let scalar = peek(), scalar == 0x2A || scalar == 0x2B || scalar == 0x3F {
      throw PatternError(reason: "has two quantifiers in a row")
    }
    return .repetition(atom, minimum, maximum)
  }

  /// Reads `{n}`, `{n,}` or `{n,m}`; anything else leaves the brace as a character.
  private mutating func braces() -> (Int, Int?)? {
    guard peek() == 0x7B else { return nil }
    var position = index + 1
    func number() -> Int? {
      var value = 0
      let start = position
      while position < scalars.count, scalars[position] >= 0x30, scalars[position] <= 0x39 {
        value = min(value * 10 + Int(scalars[position] - 0x30), 1_000_000_000)
        position += 1
      }
      return position == start ? nil : value
    }
    guard let minimum = number() else { return nil }
    var maximum: Int? = minimum
    if position < scalars.count, scalars[position] == 0x2C {
      position += 1
      maximum = number()
    }
    guard position < scalars.count, scalars[position] == 0x7D else { return nil }
    index = position + 1
    return (minimum, maximum)
  }

  private mutating func atom() throws(PatternError) -> PatternTree {
    guard let scalar = peek() else { throw PatternError(reason: "ends too early") }
    switch scalar {
    case 0x5E:
      index += 1
      return .assertion(.start)
    case 0x24:
      index += 1
      return .assertion(.end)
    case 0x2E:
      index += 1
      return .scalars(Self.lineEnds.inverted)
    case 0x28: return try group()
    case 0x5B: return .scalars(try characterClass())
    case 0x5C: return try escape()
    case 0x2A, 0x2B, 0x3F: throw PatternError(reason: "has a quantifier with nothing to repeat")
    default:
      if scalar == 0x7B, braces() != nil { throw PatternError(reason: "has a quantifier with nothing to repeat") }
      index += 1
      return .scalars(ScalarRanges([scalar...scalar]))
    }
  }

  private mutating func group() throws(PatternError) -> PatternTree {
    var assertion: ((PatternTree) -> PatternTree.Assertion)?
    index += 1
    if consume("?:") {
    } else if consume("?=") {
      assertion = { .ahead($0, negated: false) }
    } else if consume("?!") {
      assertion = { .ahead($0, negated: true) }
    } else if consume("?<=") {
      assertion = { .behind($0, negated: false) }
    } else if consume("?<!") {
      assertion = { .behind($0, negated: true) }
    } else if next(is: "?<") || next(is: "?P<") {
      guard let end = scalars[index...].firstIndex(of: 0x3E) else {
        throw PatternError(reason: "has a broken group name")
      }
      index = end + 1
    } else if next(is: "?") {
      throw PatternError(reason: "has a group that ECMA-262 does not know")
    }
    let inner = try alternation()
    if !consume(")") { throw PatternError(reason: "has a '(' without its ')'") }
    return assertion.map { .assertion($0(inner)) } ?? inner
  }

  private mutating func escape() throws(PatternError) -> PatternTree {
    switch peek(1) {
    case 0x62:
      index += 2
      return .assertion(.wordBoundary(negated: false))
    case 0x42:
      index += 2
      return .assertion(.wordBoundary(negated: true))
    case .some(0x31...0x39), 0x6B:
      throw PatternError(reason: "has a back-reference, which is not regular", isSyntax: false)
    default: return .scalars(try escapedSet(inClass: false))
    }
  }

  /// Reads an escape that stands for scalars, from its backslash on.
  private mutating func escapedSet(inClass: Bool) throws(PatternError) -> ScalarRanges {
    index += 1
    guard let scalar = peek() else { throw PatternError(reason: "ends with a backslash") }
    index += 1
    switch scalar {
    case 0x64: return Self.digits
    case 0x44: return Self.digits.inverted
    case 0x77: return Self.word
    case 0x57: return Self.word.inverted
    case 0x73: return Self.spaces
    case 0x53: return Self.spaces.inverted
    case 0x74: return ScalarRanges("\t")
    case 0x6E: return ScalarRanges("\n")
    case 0x72: return ScalarRanges("\r")
    case 0x66: return ScalarRanges("\u{C}")
    case 0x76: return ScalarRanges("\u{B}")
    case 0x30: return ScalarRanges("\0")
    case 0x62 where inClass: return ScalarRanges("\u{8}")
    case 0x63:
      guard let letter = peek(), (letter | 0x20) >= 0x61, (letter | 0x20) <= 0x7A else {
        throw PatternError(reason: "has a broken control escape")
      }
      index += 1
      return ScalarRanges([letter % 32...letter % 32])
    case 0x78:
      guard let value = hexadecimal(2) else { throw PatternError(reason: "has a broken \\x escape") }
      return ScalarRanges([value...value])
    case 0x75: return try unicodeEscape()
    case 0x70, 0x50:
      let set = try property()
      return scalar == 0x50 ? set.inverted : set
    case 0x30...0x39, 0x41...0x5A, 0x61...0x7A:
      throw PatternError(reason: "has an escape that ECMA-262 does not know")
    default: return ScalarRanges([scalar...scalar])
    }
  }

  private mutating func hexadecimal(_ count: Int) -> UInt32? {
    guard index + count <= scalars.count else { return nil }
    var value: UInt32 = 0
    for offset in 0..<count {
      guard let scalar = Unicode.Scalar(scalars[index + offset]), let digit = Character(scalar).hexDigitValue,
        scalar.isASCII
      else { return nil }
      value = value * 16 + UInt32(digit)
    }
    index += count
    return value
  }

  private mutating func unicodeEscape() throws(PatternError) -> ScalarRanges {
    if consume("{") {
      var value: UInt32 = 0
      var count = 0
      while let digit = hexadecimal(1), count < 8 {
        value = value << 4 | digit
        count += 1
      }
      guard consume("}"), count > 0, value <= 0x10FFFF else { throw PatternError(reason: "has a broken \\u escape") }
      return ScalarRanges([value...value])
    }
    guard var value = hexadecimal(4) else { throw PatternError(reason: "has a broken \\u escape") }
    if value >= 0xD800, value < 0xDC00, next(is: "\\u") {
      let start = index
      index += 2
      if let low = hexadecimal(4), low >= 0xDC00, low < 0xE000 {
        value = 0x10000 + ((value - 0xD800) << 10) + (low - 0xDC00)
      } else {
        index = start
      }
    }
    return ScalarRanges([value...value])
  }

  private mutating func property() throws(PatternError) -> ScalarRanges {
    guard consume("{"), let end = scalars[index...].firstIndex(of: 0x7D) else {
      throw PatternError(reason: "has a broken \\p escape")
    }
    var name = String(String.UnicodeScalarView(scalars[index..<end].compactMap(Unicode.Scalar.init)))
    index = end + 1
    for prefix in ["General_Category=", "gc="] where name.hasPrefix(prefix) { name.removeFirst(prefix.count) }
    if name == "Any" { return .all }
    if name == "ASCII" { return ScalarRanges([0...0x7F]) }
    guard let test = Self.propertyTest(name) else {
      throw PatternError(reason: "uses the Unicode property \(quoted(name)), which is not built in", isSyntax: false)
    }
    var ranges: [ClosedRange<UInt32>] = []
    for value in UInt32(0)...0x10FFFF {
      guard let scalar = Unicode.Scalar(value), test(scalar.properties) else { continue }
      if let last = ranges.last, last.upperBound + 1 == value {
        ranges[ranges.count - 1] = last.lowerBound...value
      } else {
        ranges.append(value...value)
      }
    }
    return ScalarRanges(ranges)
  }

  private static func propertyTest(_ name: String) -> ((Unicode.Scalar.Properties) -> Bool)? {
    func category(_ members: Unicode.GeneralCategory...) -> (Unicode.Scalar.Properties) -> Bool {
      { members.contains($0.generalCategory) }
    }
    switch name {
    case "L", "Letter":
      return category(.uppercaseLetter, .lowercaseLetter, .titlecaseLetter, .modifierLetter, .otherLetter)
    case "LC", "Cased_Letter": return category(.uppercaseLetter, .lowercaseLetter, .titlecaseLetter)
    case "Lu", "Uppercase_Letter": return category(.uppercaseLetter)
    case "Ll", "Lowercase_Letter": return category(.lowercaseLetter)
    case "Lt", "Titlecase_Letter": return category(.titlecaseLetter)
    case "Lm", "Modifier_Letter": return category(.modifierLetter)
    case "Lo", "Other_Letter": return category(.otherLetter)
    case "M", "Mark": return category(.nonspacingMark, .spacingMark, .enclosingMark)
    case "Mn", "Nonspacing_Mark": return category(.nonspacingMark)
    case "Mc", "Spacing_Mark": return category(.spacingMark)
    case "Me", "Enclosing_Mark": return category(.enclosingMark)
    case "N", "Number": return category(.decimalNumber, .letterNumber, .otherNumber)
    case "Nd", "Decimal_Number", "digit": return category(.decimalNumber)
    case "Nl", "Letter_Number": return category(.letterNumber)
    case "No", "Other_Number": return category(.otherNumber)
    case "P", "Punctuation", "punct":
      return category(
        .connectorPunctuation, .dashPunctuation, .openPunctuation, .closePunctuation, .initialPunctuation,
        .finalPunctuation, .otherPunctuation)
    case "S", "Symbol": return category(.mathSymbol, .currencySymbol, .modifierSymbol, .otherSymbol)
    case "Sm", "Math_Symbol": return category(.mathSymbol)
    case "Sc", "Currency_Symbol": return category(.currencySymbol)
    case "Z", "Separator": return category(.spaceSeparator, .lineSeparator, .paragraphSeparator)
    case "Zs", "Space_Separator": return category(.spaceSeparator)
    case "Alphabetic", "Alpha": return { $0.isAlphabetic }
    case "Uppercase", "Upper": return { $0.isUppercase }
    case "Lowercase", "Lower": return { $0.isLowercase }
    case "White_Space", "space": return { $0.isWhitespace }
    case "Emoji": return { $0.isEmoji }
    default: return nil
    }
  }

  private mutating func characterClass() throws(PatternError) -> ScalarRanges {
    index += 1
    let negated = consume("^")
    var set: [ClosedRange<UInt32>] = []
    while true {
      guard let scalar = peek() else { throw PatternError(reason: "has a '[' without its ']'") }
      if scalar == 0x5D {
        index += 1
        break
      }
      let low = try classMember()
      guard peek() == 0x2D, let after = peek(1), after != 0x5D else {
        set += low.ranges
        continue
      }
      let dash = index
      index += 1
      let high = try classMember()
      if let first = low.single, let last = high.single {
        guard first <= last else { throw PatternError(reason: "has a range out of order in a class") }
        set.append(first...last)
      } else {
        // `[\w-x]`: the hyphen is a character (Annex B).
        set += low.ranges + ScalarRanges([scalars[dash]...scalars[dash]]).ranges + high.ranges
      }
    }
    let result = ScalarRanges(set)
    return negated ? result.inverted : result
  }

  private mutating func classMember() throws(PatternError) -> ScalarRanges {
    guard let scalar = peek() else { throw PatternError(reason: "has a '[' without its ']'") }
    if scalar == 0x5C { return try escapedSet(inClass: true) }
    index += 1
    return ScalarRanges([scalar...scalar])
  }
}

extension ScalarRanges {
  /// The only member, if there is just one.
  fileprivate var single: UInt32? {
    ranges.count == 1 && ranges[0].count == 1 ? ranges[0].lowerBound : nil
  }
}

extension TextLanguages {
  /// The texts in which a pattern finds a match.
  func search(_ source: String) throws(PatternError) -> TextLanguage {
    try search(SchemaPatternParser.parse(source))
  }

  func search(_ tree: PatternTree) throws(PatternError) -> TextLanguage {
    if !tree.holdsAssertion { return sequence([everything, try language(tree), everything]) }
    var parts: [TextLanguage] = []
    for flat in try flattened(tree) {
      parts.append(try language(flat[...], left: everything, knowsStart: true, after: everything))
    }
    return choice(parts)
  }

  /// A tree without assertions as a language.
  private func language(_ tree: PatternTree) throws(PatternError) -> TextLanguage {
    if isFull { throw PatternError(reason: "grows too large", isSyntax: false) }
    switch tree {
    case .empty: return empty
    case .scalars(let set): return scalars(set)
    case .sequence(let members):
      var parts: [TextLanguage] = []
      for member in members { parts.append(try language(member)) }
      return sequence(parts)
    case .alternation(let members):
      var parts: [TextLanguage] = []
      for member in members { parts.append(try language(member)) }
      return choice(parts)
    case .repetition(let inner, let minimum, let maximum): return repetition(try language(inner), minimum, maximum)
    case .assertion: throw PatternError(reason: "repeats a group with an assertion in it", isSyntax: false)
    }
  }

  /// Assertions without look-around inside and stretches of plain text, in turn.
  private enum Piece {
    case text(TextLanguage)
    case start
    case end
    /// The text up to here is in this language.
    case behind(TextLanguage, width: Int?)
    /// The text from here on is in this language.
    case ahead(TextLanguage)
    /// `((?!x)c)*`: no text of the first language starts anywhere in a run of the second.
    case tempered(avoiding: TextLanguage, TextLanguage)
  }

  /// A tree as alternatives, each a list of pieces.
  private func flattened(_ tree: PatternTree) throws(PatternError) -> [[Piece]] {
    if !tree.holdsAssertion { return [[.text(try language(tree))]] }
    switch tree {
    case .empty, .scalars: return [[.text(try language(tree))]]
    case .alternation(let members):
      var result: [[Piece]] = []
      for member in members { result += try flattened(member) }
      if result.count > 200 {
        throw PatternError(reason: "has too many alternatives around assertions", isSyntax: false)
      }
      return result
    case .sequence(let members):
      var result: [[Piece]] = [[]]
      for member in members {
        let parts = try flattened(member)
        if result.count * parts.count > 200 {
          throw PatternError(reason: "has too many alternatives around assertions", isSyntax: false)
        }
        result = result.flatMap { head in parts.map { head + $0 } }
      }
      return result
    case .repetition(let inner, let minimum, let maximum):
      if maximum == 0 { return [[.text(empty)]] }
      if case .assertion = inner { return minimum == 0 ? [[.text(empty)]] : try flattened(inner) }
      if maximum == 1 { return try (minimum == 0 ? [[.text(empty)]] : []) + flattened(inner) }
      // The first and last round of a repetition may hold anchors; what is left is a tempered run.
      if case .sequence(let members) = inner, minimum == 0, maximum == nil, members.count == 2,
        case .assertion(.ahead(let avoided, negated: true)) = members[0], case .scalars(let set) = members[1],
        !avoided.holdsAssertion
      {
        return [[.tempered(avoiding: try language(avoided), scalars(set))]]
      }
      if case .sequence(let members) = inner, minimum == 1, maximum == nil, members.count == 2,
        case .assertion(.ahead(_, negated: true)) = members[0], case .scalars = members[1]
      {
        let first = try flattened(inner)
        let rest = try flattened(.repetition(inner, 0, nil))
        return first.flatMap { head in rest.map { head + $0 } }
      }
      throw PatternError(reason: "repeats a group with an assertion in it", isSyntax: false)
    case .assertion(let assertion): return try flattened(assertion)
    }
  }

  private func flattened(_ assertion: PatternTree.Assertion) throws(PatternError) -> [[Piece]] {
    switch assertion {
    case .start: return [[.start]]
    case .end: return [[.end]]
    case .wordBoundary(let negated):
      let word = scalars(SchemaPatternParser.word)
      let wordBefore = sequence(everything, word)
      let wordAfter = sequence(word, everything)
      let pairs =
        negated
        ? [(wordBefore, wordAfter), (complement(wordBefore), complement(wordAfter))]
        : [(wordBefore, complement(wordAfter)), (complement(wordBefore), wordAfter)]
      return pairs.map { [.behind($0.0, width: 1), .ahead($0.1)] }
    case .ahead(let inner, let negated):
      var parts: [TextLanguage] = []
      for flat in try flattened(inner) {
        parts.append(try language(flat[...], left: empty, knowsStart: false, after: everything))
      }
      let found = choice(parts)
      return [[.ahead(negated ? complement(found) : found)]]
    case .behind(let inner, let negated):
      if inner.holdsAssertion {
        throw PatternError(reason: "has an assertion inside a look-behind", isSyntax: false)
      }
      let found = sequence(everything, try language(inner))
      return [[.behind(negated ? complement(found) : found, width: Self.width(inner))]]
    }
  }

  /// The greatest number of scalars that a tree matches.
  private static func width(_ tree: PatternTree) -> Int? {
    switch tree {
    case .empty, .assertion: return 0
    case .scalars: return 1
    case .sequence(let members):
      var sum = 0
      for member in members {
        guard let width = width(member) else { return nil }
        sum += width
      }
      return sum
    case .alternation(let members):
      var most = 0
      for member in members {
        guard let width = width(member) else { return nil }
        most = max(most, width)
      }
      return most
    case .repetition(let inner, _, let maximum):
      guard let maximum, let width = width(inner) else { return nil }
      return min(width * maximum, 1_000_000)
    }
  }

  /// Texts that pieces match after `left`, with `after` behind them.
  ///
  /// Assertions that look back are applied to the text read since the last look-ahead, which they must not look past;
  /// those that look ahead, to the language of all that follows.
  /// - Parameter knowsStart: whether `left` begins at the start of the whole text.
  private func language(
    _ pieces: ArraySlice<Piece>, left: TextLanguage, knowsStart: Bool, after: TextLanguage
  ) throws(PatternError) -> TextLanguage {
    var left = left
    func lookBack(_ piece: Piece) throws(PatternError) {
      switch piece {
      case .start:
        if !isNullable(left) {
          left = never
        } else if knowsStart {
          left = empty
        } else {
          throw PatternError(reason: "has '^' behind or inside a look-ahead", isSyntax: false)
        }
      case .behind(let language, let width):
        guard knowsStart || width.map({ $0 <= shortest(left) }) == true else {
          throw PatternError(reason: "looks behind over a look-ahead", isSyntax: false)
        }
        left = all([left, language])
      default: break
      }
    }
    var index = pieces.startIndex
    while index < pieces.endIndex {
      switch pieces[index] {
      case .text(let text): left = sequence(left, text)
      case .start, .behind: try lookBack(pieces[index])
      case .tempered(let avoided, let run):
        // Only where nothing may follow is "nowhere in the rest" the same as "nowhere in the run".
        let following = try language(pieces[(index + 1)...], left: empty, knowsStart: false, after: after)
        guard following == empty else {
          throw PatternError(reason: "repeats a group with an assertion in it", isSyntax: false)
        }
        if isNullable(avoided) { return left }
        return sequence(
          left, all([repetition(run, 0, nil), complement(sequence([everything, avoided, everything]))]))
      case .end, .ahead:
        // All assertions at one place hold at once: those that look back are taken first.
        var ahead: [TextLanguage] = []
        place: while index < pieces.endIndex {
          switch pieces[index] {
          case .start, .behind: try lookBack(pieces[index])
          case .end: ahead.append(empty)
          case .ahead(let language): ahead.append(language)
          case .text(let text) where text == empty: break
          default: break place
          }
          index += 1
        }
        ahead.append(try language(pieces[index...], left: empty, knowsStart: false, after: after))
        return sequence(left, all(ahead))
      }
      index += 1
    }
    return sequence(left, after)
  }

  /// A lower bound of the number of scalars of a language's texts.
  func shortest(_ language: TextLanguage) -> Int {
    switch self[language] {
    case .never, .empty, .complement: 0
    case .scalars: 1
    case .sequence(let first, let second): shortest(first) + shortest(second)
    case .choice(let members): members.map { shortest($0) }.min() ?? 0
    case .all(let members): members.map { shortest($0) }.max() ?? 0
    case .repetition(let inner, let minimum, _): min(shortest(inner) * minimum, 1_000_000)
    }
  }
}
