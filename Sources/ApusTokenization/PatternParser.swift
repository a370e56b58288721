import ApusCore

/// The tree of a parsed pattern.
indirect enum PatternNode: Sendable {
  case empty
  case bytes([UInt8])
  case set(ScalarRanges)
  case sequence([PatternNode])
  case alternation([PatternNode])
  case repetition(PatternNode, minimum: Int, maximum: Int, kind: Repetition)
  case capture(PatternNode, Int)
  case look(PatternNode, ahead: Bool, negative: Bool)
  case atomic(PatternNode)
  case assertion(Assertion)
  case backreference(Int, foldsCase: Bool)
  case keep

  enum Repetition: Sendable { case greedy, lazy, possessive }

  enum Assertion: Sendable {
    case textStart, textEnd, textEndOrNewline, lineStart, lineEnd, wordBoundary, notWordBoundary, searchStart
  }
}

/// Parses patterns. The grammar is that of Oniguruma's Ruby syntax, or of Python's `re`, as far as both are regular
/// expressions with look-around; what is left out is refused by name.
struct PatternParser {
  private let source: [UInt32]
  private var index = 0
  private let syntax: Pattern.Syntax
  private var depth = 0
  private(set) var captureCount = 0
  private var names: [String: Int] = [:]

  private struct Flags {
    var foldsCase = false
    var dotMatchesNewline = false
    var anchorsMatchLines = false
    var isExtended = false
    var isASCII = false
  }
  private var flags = Flags()

  init(_ source: String, syntax: Pattern.Syntax) {
    self.source = source.unicodeScalars.map(\.value)
    self.syntax = syntax
    flags.anchorsMatchLines = syntax == .oniguruma
  }

  mutating func parse() throws(EngineError) -> PatternNode {
    let node = try alternation()
    if index < source.count { throw failure("there is an unmatched ')'") }
    return node
  }

  private func failure(_ message: String) -> EngineError {
    EngineError(.invalidRequest, "The regular expression is not usable: \(message) (at character \(index))")
  }

  private static let maximumDepth = 200

  // MARK: Reading

  private var peek: UInt32? { index < source.count ? source[index] : nil }

  private func at(_ character: Character, _ offset: Int = 0) -> Bool {
    index + offset < source.count && source[index + offset] == character.unicodeScalars.first!.value
  }

  private mutating func take(_ text: String) -> Bool {
    let scalars = Array(text.unicodeScalars.map(\.value))
    guard index + scalars.count <= source.count, source[index..<(index + scalars.count)].elementsEqual(scalars) else {
      return false
    }
    index += scalars.count
    return true
  }

  private mutating func until(_ end: Character) throws(EngineError) -> String {
    var text = String.UnicodeScalarView()
    while let scalar = peek, !at(end) {
      text.append(Unicode.Scalar(scalar)!)
      index += 1
    }
    guard take(String(end)) else { throw failure("'\(end)' is missing") }
    return String(text)
  }

  // MARK: Structure

  private mutating func alternation() throws(EngineError) -> PatternNode {
    depth += 1
    defer { depth -= 1 }
    if depth > Self.maximumDepth { throw failure("it is nested more than \(Self.maximumDepth) deep") }
    let saved = flags
    defer { flags = saved }
    var branches: [PatternNode] = []
    var items: [PatternNode] = []
    while let scalar = peek {
      if at(")") { break }
      if at("|") {
        index += 1
        branches.append(Self.sequence(items))
        items = []
        continue
      }
      if flags.isExtended, [0x20, 0x09, 0x0A, 0x0D, 0x0C, 0x0B].contains(scalar) {
        index += 1
        continue
      }
      if flags.isExtended, at("#") {
        while let other = peek, other != 0x0A {
          _ = other
          index += 1
        }
        continue
      }
      if let rest = try inlineFlags() {
        // Flags hold to the end of the group, alternatives included.
        if let rest { items.append(rest) }
        continue
      }
      var item = try atom()
      item = try quantified(item)
      items.append(item)
    }
    branches.append(Self.sequence(items))
    return branches.count == 1 ? branches[0] : .alternation(branches)
  }

  private static func sequence(_ items: [PatternNode]) -> PatternNode {
    var result: [PatternNode] = []
    for item in items {
      if case .empty = item { continue }
      if case .bytes(let bytes) = item, case .bytes(let previous)? = result.last {
        result[result.count - 1] = .bytes(previous + bytes)
        continue
      }
      result.append(item)
    }
    return result.isEmpty ? .empty : result.count == 1 ? result[0] : .sequence(result)
  }

  /// Reads `(?imsx-imsx)`. Gives `nil` if there is none here; `.some(nil)` if it was read and holds no further nodes.
  private mutating func inlineFlags() throws(EngineError) -> PatternNode?? {
    guard at("("), at("?", 1), index + 2 < source.count else { return nil }
    var end = index + 2
    while end < source.count, "imsxauL-".unicodeScalars.contains(where: { $0.value == source[end] }) { end += 1 }
    guard end > index + 2, end < source.count, source[end] == 0x29 else { return nil }
    let text = source[(index + 2)..<end]
    index = end + 1
    try apply(text)
    if syntax == .oniguruma {
      let rest = try alternation()
      if case .empty = rest { return .some(nil) }
      return rest
    }
    return .some(nil)
  }

  private mutating func apply(_ text: ArraySlice<UInt32>) throws(EngineError) {
    var value = true
    for scalar in text {
      switch Character(Unicode.Scalar(scalar)!) {
      case "-": value = false
      case "i": flags.foldsCase = value
      case "x": flags.isExtended = value
      case "m":
        if syntax == .oniguruma { flags.dotMatchesNewline = value } else { flags.anchorsMatchLines = value }
      case "s":
        guard syntax == .python else { throw failure("the flag 's' is not known") }
        flags.dotMatchesNewline = value
      case "a": flags.isASCII = value
      case "u": flags.isASCII = !value
      default: throw failure("a flag is not known")
      }
    }
  }

  private mutating func quantified(_ atom: PatternNode) throws(EngineError) -> PatternNode {
    var node = atom
    while let scalar = peek {
      var minimum: Int
      var maximum: Int
      var isInterval = false
      switch Character(Unicode.Scalar(scalar)!) {
      case "*": (minimum, maximum) = (0, .max)
      case "+": (minimum, maximum) = (1, .max)
      case "?": (minimum, maximum) = (0, 1)
      case "{":
        guard let interval = interval() else { return node }
        (minimum, maximum) = interval
        isInterval = true
      default: return node
      }
      if !isInterval { index += 1 }
      if minimum > maximum { throw failure("a repetition has its bounds reversed") }
      if minimum > 1000 || (maximum != .max && maximum > 1000) { throw failure("a repetition is over 1000") }
      switch node {
      case .assertion, .keep:
        // Repeating what matches nothing changes nothing, except that it may be left out.
        node = minimum == 0 ? .empty : node
        _ = take("?") || take("+")
        continue
      default: break
      }
      var kind = PatternNode.Repetition.greedy
      if at("?"), !(isInterval && syntax == .oniguruma && minimum == maximum) {
        index += 1
        kind = .lazy
      } else if at("+"), !(isInterval && syntax == .oniguruma) {
        index += 1
        kind = .possessive
      }
      // A repetition binds to the last character of a literal; literals are still single here.
      node = .repetition(node, minimum: minimum, maximum: maximum, kind: kind)
    }
    return node
  }

  /// Reads `{n}`, `{n,}`, `{n,m}` or `{,m}`; anything else is not an interval and stays.
  private mutating func interval() -> (Int, Int)? {
    var position = index + 1
    func number() -> Int? {
      var value: Int?
      while position < source.count, source[position] >= 0x30, source[position] <= 0x39 {
        value = Swift.min((value ?? 0) * 10 + Int(source[position] - 0x30), 1_000_000)
        position += 1
      }
      return value
    }
    let first = number()
    var result: (Int, Int)?
    if position < source.count, source[position] == 0x2C {
      position += 1
      let second = number()
      if first != nil || second != nil { result = (first ?? 0, second ?? .max) }
    } else if let first {
      result = (first, first)
    }
    guard let result, position < source.count, source[position] == 0x7D else { return nil }
    index = position + 1
    return result
  }

  // MARK: Atoms

  private mutating func atom() throws(EngineError) -> PatternNode {
    let scalar = source[index]
    switch Character(Unicode.Scalar(scalar)!) {
    case "(": return try group()
    case "[":
      index += 1
      return .set(try characterClass())
    case ".":
      index += 1
      return .set(flags.dotMatchesNewline ? .all : ScalarRanges(0x0A).inverted)
    case "^":
      index += 1
      return .assertion(flags.anchorsMatchLines ? .lineStart : .textStart)
    case "$":
      index += 1
      return .assertion(flags.anchorsMatchLines ? .lineEnd : .textEndOrNewline)
    case "\\":
      index += 1
      return try escape()
    case "*", "+", "?": throw failure("a repetition has nothing to repeat")
    default:
      index += 1
      return literal(scalar)
    }
  }

  private func literal(_ scalar: UInt32) -> PatternNode {
    if flags.foldsCase, let variants = UnicodeTables.shared.caseVariants[scalar] {
      return .set(ScalarRanges((variants + [scalar]).map { $0...$0 }))
    }
    var bytes: [UInt8] = []
    appendScalar(scalar, to: &bytes)
    return .bytes(bytes)
  }

  private mutating func group() throws(EngineError) -> PatternNode {
    index += 1
    func close(_ node: PatternNode) throws(EngineError) -> PatternNode {
      guard take(")") else { throw failure("a group is not closed") }
      return node
    }
    guard take("?") else {
      captureCount += 1
      let number = captureCount
      return try close(.capture(try alternation(), number))
    }
    if take(":") { return try close(try alternation()) }
    if take("=") { return try close(.look(try alternation(), ahead: true, negative: false)) }
    if take("!") { return try close(.look(try alternation(), ahead: true, negative: true)) }
    if take("<=") { return try close(.look(try alternation(), ahead: false, negative: false)) }
    if take("<!") { return try close(.look(try alternation(), ahead: false, negative: true)) }
    if take(">") { return try close(.atomic(try alternation())) }
    if take("#") {
      _ = try until(")")
      return .empty
    }
    if take("P<") || take("<") { return try close(try named(">")) }
    if take("'") { return try close(try named("'")) }
    if take("P=") {
      let name = try until(")")
      guard let number = names[name] else { throw failure("there is no group named \(name)") }
      return .backreference(number, foldsCase: flags.foldsCase)
    }
    if at("~") { throw failure("absent operators are not supported") }
    if at("(") { throw failure("conditionals are not supported") }
    let start = index
    while let scalar = peek, scalar != 0x3A, scalar != 0x29 {
      _ = scalar
      index += 1
    }
    let text = source[start..<index]
    guard at(":"), text.allSatisfy({ scalar in "imsxauL-".unicodeScalars.contains { $0.value == scalar } }) else {
      throw failure("this kind of group is not supported")
    }
    index += 1
    let saved = flags
    try apply(text)
    let node = try alternation()
    flags = saved
    return try close(node)
  }

  private mutating func named(_ end: Character) throws(EngineError) -> PatternNode {
    let name = try until(end)
    captureCount += 1
    let number = captureCount
    names[name] = number
    return .capture(try alternation(), number)
  }

  private mutating func escape() throws(EngineError) -> PatternNode {
    guard let scalar = peek else { throw failure("it ends in a backslash") }
    if let set = try escapedSet() { return .set(set) }
    let character = Character(Unicode.Scalar(scalar)!)
    switch character {
    case "A":
      index += 1
      return .assertion(.textStart)
    case "z":
      index += 1
      return .assertion(.textEnd)
    case "Z":
      index += 1
      return .assertion(syntax == .python ? .textEnd : .textEndOrNewline)
    case "b":
      index += 1
      return .assertion(.wordBoundary)
    case "B":
      index += 1
      return .assertion(.notWordBoundary)
    case "G" where syntax == .oniguruma:
      index += 1
      return .assertion(.searchStart)
    case "K" where syntax == .oniguruma:
      index += 1
      return .keep
    case "R" where syntax == .oniguruma:
      index += 1
      return .atomic(
        .alternation([.bytes([0x0D, 0x0A]), .set(ScalarRanges([0x0A...0x0D, 0x85...0x85, 0x2028...0x2029]))]))
    case "X": throw failure("\\X is not supported")
    case "g" where syntax == .oniguruma: throw failure("subexpression calls are not supported")
    case "k" where syntax == .oniguruma:
      index += 1
      guard take("<") else { throw failure("'<' is missing after \\k") }
      let name = try until(">")
      guard let number = names[name] ?? Int(name) else { throw failure("there is no group named \(name)") }
      return .backreference(number, foldsCase: flags.foldsCase)
    case "1"..."9":
      var number = 0
      while let digit = peek, digit >= 0x30, digit <= 0x39, number < 100 {
        number = number * 10 + Int(digit - 0x30)
        index += 1
      }
      guard number <= captureCount else { throw failure("there is no group \(number)") }
      return .backreference(number, foldsCase: flags.foldsCase)
    default: return literal(try escapedScalar())
    }
  }

  /// Reads an escape that stands for a set, if the next one does.
  private mutating func escapedSet() throws(EngineError) -> ScalarRanges? {
    guard let scalar = peek else { return nil }
    let tables = UnicodeTables.shared
    func plain(_ set: ScalarRanges, _ ascii: [ClosedRange<UInt32>]) -> ScalarRanges {
      flags.isASCII ? ScalarRanges(ascii) : set
    }
    let result: ScalarRanges
    switch Character(Unicode.Scalar(scalar)!) {
    case "d": result = plain(tables.categories(1 << 8), [0x30...0x39])
    case "D": result = plain(tables.categories(1 << 8), [0x30...0x39]).inverted
    case "s", "S":
      var set = plain(tables.whiteSpace, [0x09...0x0D, 0x20...0x20])
      // Python counts the four separators among white space, too.
      if syntax == .python, !flags.isASCII { set = set.union(ScalarRanges([0x1C...0x1F])) }
      result = at("s") ? set : set.inverted
    case "w": result = plain(tables.word, Self.asciiWord)
    case "W": result = plain(tables.word, Self.asciiWord).inverted
    case "h" where syntax == .oniguruma: result = ScalarRanges(Self.hexadecimal)
    case "H" where syntax == .oniguruma: result = ScalarRanges(Self.hexadecimal).inverted
    case "p", "P":
      let isNegated = at("P")
      index += 1
      guard take("{") else { throw failure("'{' is missing after \\p") }
      var negated = isNegated
      if take("^") { negated.toggle() }
      let name = try until("}")
      guard let set = tables.property(named: name) else { throw failure("the property \(name) is not known") }
      return negated ? set.inverted : (flags.foldsCase ? set.foldingCase : set)
    default: return nil
    }
    index += 1
    return result
  }

  private static let asciiWord: [ClosedRange<UInt32>] = [0x30...0x39, 0x41...0x5A, 0x5F...0x5F, 0x61...0x7A]
  private static let hexadecimal: [ClosedRange<UInt32>] = [0x30...0x39, 0x41...0x46, 0x61...0x66]

  /// Reads an escape that stands for one character; the backslash has been read.
  private mutating func escapedScalar() throws(EngineError) -> UInt32 {
    let scalar = source[index]
    index += 1
    func hex(_ digits: Int) throws(EngineError) -> UInt32 {
      var value: UInt32 = 0
      var count = 0
      while count < digits, let next = peek, let digit = Character(Unicode.Scalar(next)!).hexDigitValue {
        value = value << 4 | UInt32(digit)
        index += 1
        count += 1
      }
      guard count > 0, value < 0x110000, !(0xD800..<0xE000).contains(value) else {
        throw failure("an escape does not name a character")
      }
      return value
    }
    switch Character(Unicode.Scalar(scalar)!) {
    case "t": return 0x09
    case "n": return 0x0A
    case "r": return 0x0D
    case "f": return 0x0C
    case "v": return 0x0B
    case "a": return 0x07
    case "e": return 0x1B
    case "x":
      if take("{") {
        let value = try hex(6)
        guard take("}") else { throw failure("'}' is missing") }
        return value
      }
      return try hex(2)
    case "u": return try hex(4)
    case "U" where syntax == .python: return try hex(8)
    case "0":
      var value: UInt32 = 0
      var count = 0
      while count < 2, let next = peek, next >= 0x30, next <= 0x37 {
        value = value << 3 | (next - 0x30)
        index += 1
        count += 1
      }
      return value
    case "c":
      guard let next = peek, next < 0x80 else { throw failure("\\c needs a character") }
      index += 1
      return next & 0x1F
    case let character where character.isASCII && (character.isLetter || character.isNumber):
      throw failure("the escape \\\(character) is not known")
    default: return scalar
    }
  }

  // MARK: Classes

  /// Reads a class; the opening bracket has been read.
  private mutating func characterClass() throws(EngineError) -> ScalarRanges {
    depth += 1
    defer { depth -= 1 }
    if depth > Self.maximumDepth { throw failure("it is nested more than \(Self.maximumDepth) deep") }
    let isNegated = take("^")
    var operands: [ScalarRanges] = []
    var ranges: [ClosedRange<UInt32>] = []
    var isFirst = true
    while true {
      guard let scalar = peek else { throw failure("a class is not closed") }
      if at("]"), !isFirst {
        index += 1
        break
      }
      isFirst = false
      if at("&"), at("&", 1), syntax == .oniguruma {
        index += 2
        operands.append(ScalarRanges(ranges))
        ranges = []
        continue
      }
      if at("["), at(":", 1), let set = try posixClass() {
        ranges += set.ranges
        continue
      }
      if at("["), syntax == .oniguruma {
        index += 1
        ranges += try characterClass().ranges
        continue
      }
      var low = scalar
      if at("\\") {
        index += 1
        guard peek != nil else { throw failure("it ends in a backslash") }
        if let set = try escapedSet() {
          ranges += set.ranges
          continue
        }
        low = try classScalar()
      } else {
        index += 1
      }
      guard at("-"), !at("]", 1), index + 1 < source.count else {
        ranges.append(low...low)
        continue
      }
      let mark = index
      index += 1
      var high = source[index]
      if at("\\") {
        index += 1
        guard peek != nil else { throw failure("it ends in a backslash") }
        let before = index
        if try escapedSet() != nil {
          // A set cannot end a range: the hyphen is a character.
          index = before - 1
          ranges.append(low...low)
          ranges.append(0x2D...0x2D)
          continue
        }
        high = try classScalar()
      } else if at("["), syntax == .oniguruma {
        index = mark + 1
        ranges.append(low...low)
        ranges.append(0x2D...0x2D)
        continue
      } else {
        index += 1
      }
      guard low <= high else { throw failure("a range in a class is reversed") }
      ranges.append(low...high)
    }
    operands.append(ScalarRanges(ranges))
    var result = operands[0]
    for operand in operands.dropFirst() { result = result.intersection(operand) }
    if flags.foldsCase { result = result.foldingCase }
    return isNegated ? result.inverted : result
  }

  private mutating func classScalar() throws(EngineError) -> UInt32 {
    if at("b") {
      index += 1
      return 0x08
    }
    return try escapedScalar()
  }

  private mutating func posixClass() throws(EngineError) -> ScalarRanges? {
    let mark = index
    index += 2
    let isNegated = take("^")
    var name = ""
    while let scalar = peek, let character = Unicode.Scalar(scalar), Character(character).isLetter {
      name.unicodeScalars.append(character)
      index += 1
    }
    guard take(":]"), let set = UnicodeTables.shared.posix(name) else {
      index = mark
      return nil
    }
    return isNegated ? set.inverted : set
  }
}
