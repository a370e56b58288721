import ApusCore

/// Parses patterns into trees.
struct RegularPatternParser {
  private let source: [UInt32]
  private let dialect: PatternDialect
  private var index = 0
  private var depth = 0
  private var flags = Flags()

  private struct Flags {
    var foldsCase = false
    var dotMatchesAll = false
    var isMultiline = false
    var isExtended = false
    var isUnicode: Bool
    init(isUnicode: Bool = false) { self.isUnicode = isUnicode }
  }

  /// Scalars of a pattern at most.
  static let maximumLength = 1 << 17
  private static let maximumDepth = 200
  /// The largest count of a repetition.
  static let maximumCount = 1_000_000

  init(_ source: String, _ dialect: PatternDialect) {
    self.source = source.unicodeScalars.map(\.value)
    self.dialect = dialect
    flags = Flags(isUnicode: dialect == .rust)
  }

  private func failure(_ message: String) -> EngineError {
    EngineError(.invalidRequest, "The pattern is not usable: \(message) (at character \(index))")
  }

  private func unsupported(_ message: String) -> EngineError {
    EngineError(.unsupported, "The pattern cannot be enforced: \(message) (at character \(index))")
  }

  mutating func parse() throws(EngineError) -> RegularPatternTree {
    if source.count > Self.maximumLength { throw failure("it is longer than \(Self.maximumLength) characters") }
    // `/.../` is how JavaScript writes patterns, not a part of them; it is left as it is.
    let tree = try alternation()
    if index < source.count { throw failure("there is an unmatched ')'") }
    return tree
  }

  // MARK: Reading

  private var peek: UInt32? { index < source.count ? source[index] : nil }

  private func at(_ character: Unicode.Scalar, _ offset: Int = 0) -> Bool {
    index + offset < source.count && source[index + offset] == character.value
  }

  private mutating func take(_ text: String) -> Bool {
    let scalars = text.unicodeScalars.map(\.value)
    guard index + scalars.count <= source.count, source[index..<(index + scalars.count)].elementsEqual(scalars) else {
      return false
    }
    index += scalars.count
    return true
  }

  private mutating func until(_ end: Unicode.Scalar) throws(EngineError) -> String {
    var text = String.UnicodeScalarView()
    while let scalar = peek, scalar != end.value {
      text.append(Unicode.Scalar(scalar)!)
      index += 1
    }
    guard peek != nil else { throw failure("'\(end)' is missing") }
    index += 1
    return String(text)
  }

  // MARK: Structure

  private mutating func alternation() throws(EngineError) -> RegularPatternTree {
    depth += 1
    defer { depth -= 1 }
    if depth > Self.maximumDepth { throw failure("it is nested more than \(Self.maximumDepth) deep") }
    let saved = flags
    defer { flags = saved }
    var branches: [RegularPatternTree] = []
    var items: [RegularPatternTree] = []
    while let scalar = peek {
      if scalar == 0x29 { break }
      if scalar == 0x7C {
        index += 1
        branches.append(.sequence(items))
        items = []
        continue
      }
      if flags.isExtended, [0x20, 0x09, 0x0A, 0x0D, 0x0C, 0x0B].contains(scalar) {
        index += 1
        continue
      }
      if flags.isExtended, scalar == 0x23 {
        while let other = peek, other != 0x0A {
          _ = other
          index += 1
        }
        continue
      }
      if try inlineFlags() { continue }
      items.append(try quantified(try atom()))
    }
    branches.append(.sequence(items))
    return branches.count == 1 ? branches[0] : .alternation(branches)
  }

  /// Reads `(?ims-x)`, which holds to the end of the group.
  private mutating func inlineFlags() throws(EngineError) -> Bool {
    guard at("("), at("?", 1) else { return false }
    var end = index + 2
    while end < source.count, "imsxuUR-".unicodeScalars.contains(where: { $0.value == source[end] }) { end += 1 }
    guard end > index + 2, end < source.count, source[end] == 0x29 else { return false }
    let text = source[(index + 2)..<end]
    index = end + 1
    try apply(text)
    return true
  }

  private mutating func apply(_ text: ArraySlice<UInt32>) throws(EngineError) {
    var value = true
    for scalar in text {
      switch Unicode.Scalar(scalar)! {
      case "-": value = false
      case "i": flags.foldsCase = value
      case "m": flags.isMultiline = value
      case "s": flags.dotMatchesAll = value
      case "x": flags.isExtended = value
      case "u": flags.isUnicode = value
      case "U": break  // Which match is preferred does not change the language.
      default: throw unsupported("the flag \(Unicode.Scalar(scalar)!)")
      }
    }
  }

  private mutating func quantified(_ atom: RegularPatternTree) throws(EngineError) -> RegularPatternTree {
    var node = atom
    while let scalar = peek {
      var minimum = 0
      var maximum: Int?
      switch Unicode.Scalar(scalar)! {
      case "*": index += 1
      case "+":
        index += 1
        minimum = 1
      case "?":
        index += 1
        maximum = 1
      case "{":
        guard let interval = try interval() else { return node }
        (minimum, maximum) = interval
      default: return node
      }
      if let maximum, minimum > maximum { throw failure("a repetition has its bounds reversed") }
      if minimum > Self.maximumCount || (maximum ?? 0) > Self.maximumCount {
        throw failure("a repetition is over \(Self.maximumCount)")
      }
      if at("?") {
        index += 1
      } else if at("+"), dialect == .ecmaScript {
        throw unsupported("a possessive quantifier")
      }
      node = .repetition(node, minimum, maximum)
      if dialect == .ecmaScript, at("*") || at("+") || at("?") { throw failure("a repetition has nothing to repeat") }
    }
    return node
  }

  /// Reads `{n}`, `{n,}` or `{n,m}`; in ECMAScript anything else is a brace.
  private mutating func interval() throws(EngineError) -> (Int, Int?)? {
    var position = index + 1
    func number() -> Int? {
      var value: Int?
      while position < source.count, source[position] >= 0x30, source[position] <= 0x39 {
        value = Swift.min((value ?? 0) * 10 + Int(source[position] - 0x30), Self.maximumCount + 1)
        position += 1
      }
      return value
    }
    func skip() {
      while dialect == .rust, position < source.count, source[position] == 0x20 { position += 1 }
    }
    skip()
    let first = number()
    skip()
    var result: (Int, Int?)?
    if position < source.count, source[position] == 0x2C {
      position += 1
      skip()
      let second = number()
      skip()
      if let first { result = (first, second) } else if dialect == .rust, let second { result = (0, second) }
    } else if let first {
      result = (first, first)
    }
    guard let result, position < source.count, source[position] == 0x7D else {
      if dialect == .rust { throw failure("a repetition count is not readable") }
      return nil
    }
    index = position + 1
    return result
  }

  // MARK: Atoms

  private static let lineTerminators = ScalarRanges([0x0A...0x0A, 0x0D...0x0D, 0x2028...0x2029])

  private mutating func atom() throws(EngineError) -> RegularPatternTree {
    let scalar = source[index]
    switch Unicode.Scalar(scalar)! {
    case "(": return try group()
    case "[":
      index += 1
      return .scalars(try characterClass())
    case ".":
      index += 1
      if flags.dotMatchesAll { return .scalars(.all) }
      return .scalars(dialect == .rust ? ScalarRanges(0x0A).inverted : Self.lineTerminators.inverted)
    case "^":
      index += 1
      return flags.isMultiline ? .lineStart : .textStart
    case "$":
      index += 1
      return flags.isMultiline ? .lineEnd : .textEnd
    case "\\":
      index += 1
      return try escape()
    case "*", "+", "?": throw failure("a repetition has nothing to repeat")
    case "{" where dialect == .rust: throw failure("a repetition has nothing to repeat")
    case "{":
      if try interval() != nil { throw failure("a repetition has nothing to repeat") }
      index += 1
      return .scalars(ScalarRanges(scalar))
    default:
      index += 1
      return literal(scalar)
    }
  }

  private func literal(_ scalar: UInt32) -> RegularPatternTree {
    let set = ScalarRanges(scalar)
    return .scalars(flags.foldsCase ? set.foldingCase : set)
  }

  private mutating func group() throws(EngineError) -> RegularPatternTree {
    index += 1
    func close(_ node: RegularPatternTree) throws(EngineError) -> RegularPatternTree {
      guard take(")") else { throw failure("a group is not closed") }
      return node
    }
    guard take("?") else { return try close(try alternation()) }
    if take(":") { return try close(try alternation()) }
    if take("=") { return try close(.look(try alternation(), negative: false)) }
    if take("!") { return try close(.look(try alternation(), negative: true)) }
    if take("<=") || take("<!") { throw unsupported("look-behind") }
    if take(">") { throw unsupported("an atomic group") }
    if take("#") {
      _ = try until(")")
      return .empty
    }
    if take("P<") || take("<") {
      _ = try until(">")
      return try close(try alternation())
    }
    if take("P=") { throw unsupported("a back-reference") }
    let start = index
    while let scalar = peek, scalar != 0x3A, scalar != 0x29 {
      _ = scalar
      index += 1
    }
    guard at(":") else { throw failure("this kind of group is not known") }
    let text = source[start..<index]
    index += 1
    let saved = flags
    try apply(text)
    let node = try alternation()
    flags = saved
    return try close(node)
  }

  private mutating func escape() throws(EngineError) -> RegularPatternTree {
    guard let scalar = peek else { throw failure("it ends in a backslash") }
    if let set = try escapedSet() { return .scalars(set) }
    switch Unicode.Scalar(scalar)! {
    case "A":
      index += 1
      return .textStart
    case "z", "Z":
      index += 1
      return .textEnd
    case "b", "B":
      index += 1
      if dialect == .rust, at("{") { throw unsupported("a half word boundary") }
      if flags.isUnicode { throw unsupported("a Unicode word boundary") }
      return .wordBoundary(negative: scalar == 0x42)
    case "1"..."9": throw unsupported("a back-reference")
    case "k" where dialect == .ecmaScript && at("<", 1): throw unsupported("a back-reference")
    case "G" where dialect == .rust, "K" where dialect == .rust, "R" where dialect == .rust, "X" where dialect == .rust:
      throw failure("the escape \\\(Unicode.Scalar(scalar)!) is not known")
    default: return literal(try escapedScalar(inClass: false))
    }
  }

  private static let asciiWord = RegularPatternTree.wordRanges
  /// White space and line terminators of ECMA-262.
  private static let ecmaSpace: [ClosedRange<UInt32>] = [
    0x09...0x0D, 0x20...0x20, 0xA0...0xA0, 0x1680...0x1680, 0x2000...0x200A, 0x2028...0x2029, 0x202F...0x202F,
    0x205F...0x205F, 0x3000...0x3000, 0xFEFF...0xFEFF,
  ]

  /// Reads an escape that stands for a set, if the next one does.
  private mutating func escapedSet() throws(EngineError) -> ScalarRanges? {
    guard let scalar = peek else { return nil }
    let tables = UnicodeTables.shared
    var result: ScalarRanges
    switch Unicode.Scalar(scalar)! {
    case "d", "D": result = flags.isUnicode ? tables.categories(1 << 8) : ScalarRanges([0x30...0x39])
    case "w", "W": result = flags.isUnicode ? tables.word : ScalarRanges(Self.asciiWord)
    case "s", "S":
      result =
        dialect == .ecmaScript
        ? ScalarRanges(Self.ecmaSpace) : flags.isUnicode ? tables.whiteSpace : ScalarRanges([0x09...0x0D, 0x20...0x20])
    case "p", "P":
      var isNegated = at("P")
      let mark = index
      index += 1
      var name: String
      if take("{") {
        if take("^") { isNegated.toggle() }
        name = try until("}")
      } else if dialect == .rust, let letter = peek {
        name = String(Character(Unicode.Scalar(letter)!))
        index += 1
      } else {
        index = mark
        return nil
      }
      if let equals = name.firstIndex(of: "="),
        name[..<equals].lowercased().hasPrefix("script") || name.hasPrefix("scx")
      {
        name = String(name[name.index(after: equals)...])
      }
      guard let set = tables.property(named: name) else { throw failure("the property \(name) is not known") }
      return isNegated ? set.inverted : (flags.foldsCase ? set.foldingCase : set)
    default: return nil
    }
    index += 1
    if [0x44, 0x57, 0x53].contains(scalar) { result = result.inverted }
    return result
  }

  /// Reads an escape that stands for one character; the backslash has been read.
  private mutating func escapedScalar(inClass: Bool) throws(EngineError) -> UInt32 {
    let scalar = source[index]
    index += 1
    func hexadecimal(_ digits: Int) -> UInt32? {
      guard index + digits <= source.count else { return nil }
      var value: UInt32 = 0
      for offset in 0..<digits {
        guard let digit = Character(Unicode.Scalar(source[index + offset])!).hexDigitValue,
          source[index + offset] < 0x80
        else { return nil }
        value = value << 4 | UInt32(digit)
      }
      index += digits
      return value
    }
    func braced() throws(EngineError) -> UInt32 {
      let text = try until("}")
      guard let value = UInt32(text, radix: 16), Unicode.Scalar(value) != nil else {
        throw failure("an escape does not name a character")
      }
      return value
    }
    switch Unicode.Scalar(scalar)! {
    case "t": return 0x09
    case "n": return 0x0A
    case "r": return 0x0D
    case "f": return 0x0C
    case "v": return 0x0B
    case "a" where dialect == .rust: return 0x07
    case "x":
      if dialect == .rust, take("{") { return try braced() }
      if let value = hexadecimal(2) { return value }
    case "u":
      if take("{") { return try braced() }
      if let value = hexadecimal(4) {
        if value >= 0xD800, value < 0xDC00, at("\\"), at("u", 1) {
          index += 2
          if let low = hexadecimal(4), low >= 0xDC00, low < 0xE000 {
            return 0x10000 + (value - 0xD800) << 10 + (low - 0xDC00)
          }
          throw failure("an escape is half a surrogate pair")
        }
        guard Unicode.Scalar(value) != nil else { throw failure("an escape is half a surrogate pair") }
        return value
      }
    case "U" where dialect == .rust:
      if let value = hexadecimal(8), Unicode.Scalar(value) != nil { return value }
    case "0" where dialect == .ecmaScript: return 0
    case "c" where dialect == .ecmaScript:
      if let next = peek, next < 0x80, Character(Unicode.Scalar(next)!).isLetter {
        index += 1
        return next & 0x1F
      }
    case let other
    where dialect == .rust && other.value < 0x80 && (Character(other).isLetter || Character(other).isNumber):
      throw failure("the escape \\\(other) is not known")
    default: return scalar
    }
    if dialect == .rust { throw failure("an escape does not name a character") }
    return scalar
  }

  // MARK: Classes

  /// Reads a class; the opening bracket has been read.
  private mutating func characterClass() throws(EngineError) -> ScalarRanges {
    depth += 1
    defer { depth -= 1 }
    if depth > Self.maximumDepth { throw failure("it is nested more than \(Self.maximumDepth) deep") }
    let isNegated = take("^")
    enum Operation { case union, intersection, difference, symmetricDifference }
    var result: ScalarRanges?
    var pending = Operation.union
    var ranges: [ClosedRange<UInt32>] = []
    func apply(_ next: ScalarRanges) {
      guard let left = result else {
        result = next
        return
      }
      switch pending {
      case .union: result = left.union(next)
      case .intersection: result = left.intersection(next)
      case .difference: result = left.intersection(next.inverted)
      case .symmetricDifference:
        result = left.intersection(next.inverted).union(next.intersection(left.inverted))
      }
    }
    var isFirst = true
    while true {
      guard let scalar = peek else { throw failure("a class is not closed") }
      if scalar == 0x5D, !(isFirst && dialect == .rust) {
        index += 1
        break
      }
      isFirst = false
      if dialect == .rust {
        if flags.isExtended, [0x20, 0x09, 0x0A, 0x0D].contains(scalar) {
          index += 1
          continue
        }
        let operation: Operation? =
          at("&") && at("&", 1)
          ? .intersection
          : at("-") && at("-", 1) && !at("]", 2) ? .difference : at("~") && at("~", 1) ? .symmetricDifference : nil
        if let operation {
          index += 2
          let set = ScalarRanges(ranges)
          apply(flags.foldsCase ? set.foldingCase : set)
          ranges = []
          pending = operation
          continue
        }
        if scalar == 0x5B {
          if at(":", 1), let set = posixClass() {
            ranges += set.ranges
          } else {
            index += 1
            ranges += try characterClass().ranges
          }
          continue
        }
      }
      var low = scalar
      index += 1
      if scalar == 0x5C {
        guard peek != nil else { throw failure("it ends in a backslash") }
        if let set = try escapedSet() {
          ranges += set.ranges
          continue
        }
        low = try classScalar()
      }
      guard at("-"), !at("]", 1), index + 1 < source.count, !(dialect == .rust && at("-", 1)) else {
        ranges.append(low...low)
        continue
      }
      index += 1
      var high = source[index]
      index += 1
      if high == 0x5C {
        guard peek != nil else { throw failure("it ends in a backslash") }
        if let set = try escapedSet() {
          if dialect == .rust { throw failure("a range in a class ends in a set") }
          ranges.append(low...low)
          ranges.append(0x2D...0x2D)
          ranges += set.ranges
          continue
        }
        high = try classScalar()
      }
      guard low <= high else { throw failure("a range in a class is reversed") }
      ranges.append(low...high)
    }
    let set = ScalarRanges(ranges)
    apply(flags.foldsCase ? set.foldingCase : set)
    let all = result!
    return isNegated ? all.inverted : all
  }

  private mutating func classScalar() throws(EngineError) -> UInt32 {
    if at("b"), dialect == .ecmaScript {
      index += 1
      return 0x08
    }
    return try escapedScalar(inClass: true)
  }

  private mutating func posixClass() -> ScalarRanges? {
    let mark = index
    index += 2
    let isNegated = take("^")
    var name = ""
    while let scalar = peek, scalar >= 0x61, scalar <= 0x7A {
      name.unicodeScalars.append(Unicode.Scalar(scalar)!)
      index += 1
    }
    // Rust's classes of these names are ASCII.
    guard take(":]"), let set = name == "word" ? ScalarRanges(Self.asciiWord) : UnicodeTables.shared.posix(name) else {
      index = mark
      return nil
    }
    let ascii = set.intersection(ScalarRanges([0...0x7F]))
    return isNegated ? ascii.inverted : ascii
  }
}
