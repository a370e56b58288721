package import ApusCore

extension Grammar {
  /// Reads a grammar in EBNF: the dialect of llama.cpp (GBNF), and that of the W3C as XGrammar reads it.
  ///
  /// Rules are `name ::= alternatives`. Items are strings in double or single quotes, character classes (`[a-z]`, `[^"\\]`),
  /// `.` (any character), `#x41` (a code point), names, and groups in parentheses; `?`, `*`, `+`, `{m}`, `{m,}`, `{m,n}`
  /// repeat an item. `#` (not followed by `x` and a digit) and `//` start a comment, `/* */` encloses one. The root is the
  /// rule named `root`, or the first one if no rule has that name.
  ///
  /// - Throws: `EngineError` with code `invalidRequest`, the reason, line and column.
  package init(ebnf source: String) throws(EngineError) {
    var parser = EBNFParser(source)
    self = try parser.parse()
  }
}

private struct EBNFParser {
  private let source: [UInt32]
  private var index = 0
  private var grammar = Grammar()
  private var rules: [String: RuleReference] = [:]
  private var isDefined: [Bool] = []
  /// Where each name was first used.
  private var places: [Int] = []
  private var depth = 0

  private static let maximumDepth = 300
  private static let maximumRules = 1 << 16

  init(_ source: String) { self.source = source.unicodeScalars.map(\.value) }

  // MARK: Reading

  private func failure(_ message: String, at place: Int? = nil) -> EngineError {
    var line = 1
    var column = 1
    for scalar in source[..<min(place ?? index, source.count)] {
      if scalar == 0x0A {
        line += 1
        column = 1
      } else {
        column += 1
      }
    }
    return EngineError(.invalidRequest, "The EBNF grammar is not usable: line \(line), column \(column): \(message)")
  }

  private var peek: UInt32? { index < source.count ? source[index] : nil }

  private func at(_ text: String, offset: Int = 0) -> Bool {
    var position = index + offset
    for scalar in text.unicodeScalars {
      guard position < source.count, source[position] == scalar.value else { return false }
      position += 1
    }
    return true
  }

  private mutating func take(_ text: String) -> Bool {
    guard at(text) else { return false }
    index += text.unicodeScalars.count
    return true
  }

  private static func isNameStart(_ scalar: UInt32) -> Bool {
    (0x41...0x5A).contains(scalar) || (0x61...0x7A).contains(scalar) || scalar == 0x5F
  }

  private static func isNamePart(_ scalar: UInt32) -> Bool {
    isNameStart(scalar) || (0x30...0x39).contains(scalar) || scalar == 0x2D || scalar == 0x2E
  }

  private static func digit(_ scalar: UInt32) -> UInt32? {
    switch scalar {
    case 0x30...0x39: scalar - 0x30
    case 0x41...0x46: scalar - 0x41 + 10
    case 0x61...0x66: scalar - 0x61 + 10
    default: nil
    }
  }

  /// Whether a code point such as `#x41` is here, and not a comment.
  private var isAtCodePoint: Bool { at("#x") && index + 2 < source.count && Self.digit(source[index + 2]) != nil }

  private mutating func skipSpace() throws(EngineError) {
    while let scalar = peek {
      if [0x20, 0x09, 0x0A, 0x0D].contains(scalar) {
        index += 1
      } else if (scalar == 0x23 && !isAtCodePoint) || at("//") {
        while let other = peek, other != 0x0A {
          _ = other
          index += 1
        }
      } else if at("/*") {
        let start = index
        index += 2
        while index < source.count, !at("*/") { index += 1 }
        guard take("*/") else { throw failure("a comment is not closed", at: start) }
      } else {
        return
      }
    }
  }

  private mutating func name() -> String? {
    guard let first = peek, Self.isNameStart(first) else { return nil }
    var name = String.UnicodeScalarView()
    while let scalar = peek, Self.isNamePart(scalar) {
      name.append(Unicode.Scalar(scalar)!)
      index += 1
    }
    return String(name)
  }

  /// Whether a rule begins here: a name and `::=`.
  private var isAtRule: Bool {
    guard let first = peek, Self.isNameStart(first) else { return false }
    var position = index
    while position < source.count, Self.isNamePart(source[position]) { position += 1 }
    while position < source.count, [0x20, 0x09, 0x0A, 0x0D].contains(source[position]) { position += 1 }
    return position + 2 < source.count && source[position] == 0x3A && source[position + 1] == 0x3A
      && source[position + 2] == 0x3D
  }

  // MARK: Rules

  mutating func parse() throws(EngineError) -> Grammar {
    try skipSpace()
    var first: RuleReference?
    while index < source.count {
      let start = index
      guard isAtRule, let name = name() else {
        throw failure("a rule was expected: a name followed by '::='")
      }
      try skipSpace()
      _ = take("::=")
      let rule = try reference(name, at: start)
      if isDefined[rule.index] { throw failure("the rule '\(name)' is defined twice", at: start) }
      isDefined[rule.index] = true
      first = first ?? rule
      grammar.define(rule, try alternatives())
      try skipSpace()
    }
    guard let first else { throw failure("there is no rule") }
    for (name, rule) in rules.sorted(by: { $0.key < $1.key }) where !isDefined[rule.index] {
      throw failure("the rule '\(name)' is not defined", at: places[rule.index])
    }
    grammar.root = .rule(rules["root"] ?? first)
    return grammar
  }

  private mutating func reference(_ name: String, at place: Int) throws(EngineError) -> RuleReference {
    if let known = rules[name] { return known }
    if rules.count >= Self.maximumRules { throw failure("there are more than \(Self.maximumRules) rules", at: place) }
    let rule = grammar.addRule(name)
    rules[name] = rule
    isDefined.append(false)
    places.append(place)
    return rule
  }

  private mutating func alternatives() throws(EngineError) -> GrammarExpression {
    depth += 1
    defer { depth -= 1 }
    if depth > Self.maximumDepth { throw failure("it is nested more than \(Self.maximumDepth) deep") }
    var choices = [try sequence()]
    while true {
      try skipSpace()
      guard take("|") else { break }
      choices.append(try sequence())
    }
    return choices.count == 1 ? choices[0] : .choice(choices)
  }

  private mutating func sequence() throws(EngineError) -> GrammarExpression {
    var items: [GrammarExpression] = []
    while true {
      try skipSpace()
      guard let scalar = peek, scalar != 0x7C, scalar != 0x29, !isAtRule else { break }
      if scalar == 0x3B {  // Some write a semicolon after a rule.
        index += 1
        break
      }
      items.append(try repeated(try item()))
    }
    return items.isEmpty ? .empty : items.count == 1 ? items[0] : .sequence(items)
  }

  private mutating func repeated(_ item: GrammarExpression) throws(EngineError) -> GrammarExpression {
    var result = item
    while let scalar = peek {
      switch Unicode.Scalar(scalar) {
      case "*":
        index += 1
        result = .repetition(result, minimum: 0, maximum: nil)
      case "+":
        index += 1
        result = .repetition(result, minimum: 1, maximum: nil)
      case "?":
        index += 1
        result = .repetition(result, minimum: 0, maximum: 1)
      case "{":
        index += 1
        try skipSpace()
        let minimum = try number()
        try skipSpace()
        var maximum: Int? = minimum
        if take(",") {
          try skipSpace()
          maximum = at("}") ? nil : try number()
          try skipSpace()
        }
        guard take("}") else { throw failure("'}' was expected") }
        if let maximum, maximum < minimum { throw failure("a repetition has its bounds reversed") }
        result = .repetition(result, minimum: minimum, maximum: maximum)
      default: return result
      }
    }
    return result
  }

  private mutating func number() throws(EngineError) -> Int {
    let start = index
    var value = 0
    while let scalar = peek, (0x30...0x39).contains(scalar) {
      value = value * 10 + Int(scalar - 0x30)
      if value > RegularPatternParser.maximumCount {
        throw failure("a repetition is over \(RegularPatternParser.maximumCount)", at: start)
      }
      index += 1
    }
    if index == start { throw failure("a number was expected") }
    return value
  }

  private mutating func item() throws(EngineError) -> GrammarExpression {
    let start = index
    switch Unicode.Scalar(peek!) {
    case "\"", "'": return try string()
    case "[": return try characterClass()
    case ".":
      index += 1
      return .characters(.all)
    case "(":
      index += 1
      if at("=") { throw failure("look-ahead is not supported") }
      let inner = try alternatives()
      guard take(")") else { throw failure("a group is not closed", at: start) }
      return inner
    case "#":
      let scalar = try codePoint()
      return .literal(Array(String(Character(scalar)).utf8))
    case "<": throw failure("token references are not supported")
    default:
      guard let name = name() else {
        throw failure("'\(Character(Unicode.Scalar(peek!)!))' was not expected")
      }
      return .rule(try reference(name, at: start))
    }
  }

  private mutating func codePoint() throws(EngineError) -> Unicode.Scalar {
    let start = index
    index += 2
    var value: UInt32 = 0
    while let scalar = peek, let digit = Self.digit(scalar), value < 0x11_0000 {
      value = value << 4 | digit
      index += 1
    }
    guard let scalar = Unicode.Scalar(value) else { throw failure("the code point does not exist", at: start) }
    return scalar
  }

  private mutating func string() throws(EngineError) -> GrammarExpression {
    let start = index
    let quote = peek!
    index += 1
    var bytes: [UInt8] = []
    while true {
      guard let scalar = peek, scalar != 0x0A else { throw failure("a string is not closed", at: start) }
      if scalar == quote {
        index += 1
        return bytes.isEmpty ? .empty : .literal(bytes)
      }
      let value = scalar == 0x5C ? try escape() : Unicode.Scalar(scalar)!
      if scalar != 0x5C { index += 1 }
      bytes += Array(String(Character(value)).utf8)
    }
  }

  /// Reads an escape, backslash included.
  private mutating func escape() throws(EngineError) -> Unicode.Scalar {
    let start = index
    index += 1
    guard let scalar = peek else { throw failure("it ends in a backslash", at: start) }
    index += 1
    func hexadecimal(_ count: Int) throws(EngineError) -> Unicode.Scalar {
      var value: UInt32 = 0
      for _ in 0..<count {
        guard let next = peek, let digit = Self.digit(next) else {
          throw failure("an escape has fewer than \(count) hexadecimal digits", at: start)
        }
        value = value << 4 | digit
        index += 1
      }
      guard let scalar = Unicode.Scalar(value) else { throw failure("an escape names no character", at: start) }
      return scalar
    }
    switch Unicode.Scalar(scalar)! {
    case "n": return "\n"
    case "r": return "\r"
    case "t": return "\t"
    case "f": return "\u{0C}"
    case "v": return "\u{0B}"
    case "b": return "\u{08}"
    case "a": return "\u{07}"
    case "0": return "\0"
    case "e": return "\u{1B}"
    case "x": return try hexadecimal(2)
    case "u":
      if take("{") {
        var value: UInt32 = 0
        while let next = peek, let digit = Self.digit(next), value < 0x11_0000 {
          value = value << 4 | digit
          index += 1
        }
        guard take("}"), let scalar = Unicode.Scalar(value) else {
          throw failure("an escape names no character", at: start)
        }
        return scalar
      }
      return try hexadecimal(4)
    case "U": return try hexadecimal(8)
    case let other where Character(other).isASCII && (Character(other).isLetter || Character(other).isNumber):
      throw failure("the escape \\\(other) is not known", at: start)
    case let other: return other
    }
  }

  private mutating func characterClass() throws(EngineError) -> GrammarExpression {
    let start = index
    index += 1
    let isNegated = take("^")
    var ranges: [ClosedRange<UInt32>] = []
    func end() -> Bool { peek == 0x5D }
    func one(_ parser: inout EBNFParser) throws(EngineError) -> UInt32 {
      guard let scalar = parser.peek, scalar != 0x0A else { throw parser.failure("a class is not closed", at: start) }
      if scalar == 0x5C { return try parser.escape().value }
      if parser.isAtCodePoint { return try parser.codePoint().value }
      parser.index += 1
      return scalar
    }
    func classEscape(_ parser: inout EBNFParser) -> [ClosedRange<UInt32>]? {
      let sets: [(String, [ClosedRange<UInt32>])] = [
        ("\\d", [0x30...0x39]), ("\\w", RegularPatternTree.wordRanges), ("\\s", [0x09...0x0D, 0x20...0x20]),
      ]
      for (text, set) in sets where parser.at(text) {
        parser.index += 2
        return set
      }
      return nil
    }
    while !end() {
      if let set = classEscape(&self) {
        ranges += set
        continue
      }
      let low = try one(&self)
      if at("-"), !at("-]") {
        index += 1
        let place = index
        let high = try one(&self)
        if high < low { throw failure("a range in a class is reversed", at: place) }
        ranges.append(low...high)
      } else {
        ranges.append(low...low)
      }
    }
    index += 1
    let set = ScalarRanges(ranges)
    return .characters(isNegated ? set.inverted : set)
  }
}
