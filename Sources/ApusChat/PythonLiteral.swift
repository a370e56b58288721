/// Turns one Python literal into JSON as its bytes arrive.
///
/// Strings (plain, raw, triple-quoted), numbers, `True`, `False`, `None` (and JSON's spellings), lists, tuples and
/// dictionaries. Keys of dictionaries become strings. A sign or an underscore that JSON has no room for is dropped; numbers
/// that JSON cannot spell become `null`.
struct PythonLiteral: Sendable {
  private enum State {
    case value, firstElement, element, firstKey, key, colon, afterValue
    case string, escape, codePoint
    /// One, then two quotes were read: an empty string or the beginning of a triple-quoted one.
    case oneQuote, twoQuotes
    case number, word
    case ended
  }
  private enum Container { case list, tuple, dictionary }

  private var state = State.value
  private var stack: [Container] = []
  /// Whether the value being read is a key.
  private var isKey = false
  private var quote: UInt8 = 0
  private var isTriple = false
  private var isRaw = false
  private var isEscaped = false
  /// Quotes at what may be the end of a triple-quoted string.
  private var closingQuotes = 0
  private var codePoint: UInt32 = 0
  private var digitsLeft = 0
  private var token: [UInt8] = []

  init() {}

  private static let tokenLimit = 4096

  /// What was read of a number or a word and not passed on yet.
  var unwritten: [UInt8] { state == .number || state == .word ? token : [] }

  mutating func consume(_ byte: UInt8, _ out: inout [UInt8]) -> JSONScanner.Step {
    switch state {
    case .string: return string(byte, &out)
    case .escape: return escape(byte, &out)
    case .codePoint:
      guard let digit = hexDigit(byte) else { return .failed }
      codePoint = codePoint << 4 | digit
      digitsLeft -= 1
      if digitsLeft == 0 {
        state = .string
        return append(codePoint, &out) ? .more : .failed
      }
      return .more
    case .oneQuote:
      if byte == quote {
        state = .twoQuotes
        return .more
      }
      state = .string
      return string(byte, &out)
    case .twoQuotes:
      if byte == quote {
        isTriple = true
        closingQuotes = 0
        state = .string
        return .more
      }
      out.append(UInt8(ascii: "\""))
      return endValueBefore(byte, &out)
    case .number:
      switch byte {
      case UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "a")...UInt8(ascii: "z"),
        UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "_"), UInt8(ascii: "."), UInt8(ascii: "+"),
        UInt8(ascii: "-"):
        token.append(byte)
        return token.count > Self.tokenLimit ? .failed : .more
      default:
        guard let number = Self.number(token) else { return .failed }
        out += isKey ? quoted(number) : number
        return endValueBefore(byte, &out)
      }
    case .word:
      if isIdentifier(byte) {
        token.append(byte)
        return token.count > 16 ? .failed : .more
      }
      if byte == UInt8(ascii: "'") || byte == UInt8(ascii: "\"") {
        let prefix = String(decoding: token, as: UTF8.self).lowercased()
        guard ["r", "u", "b", "f", "rb", "br", "rf", "fr"].contains(prefix) else { return .failed }
        beginString(byte, isRaw: prefix.contains("r"), &out)
        return .more
      }
      guard let word = Self.word(token) else { return .failed }
      out += isKey ? quoted(word) : word
      return endValueBefore(byte, &out)
    case .ended: return .failed
    case .value, .firstElement, .element, .firstKey, .key, .colon, .afterValue: break
    }
    if isWhitespace(byte) { return .more }
    switch state {
    case .colon:
      if byte != UInt8(ascii: ":") { return .failed }
      out += ": ".utf8
      state = .value
      return .more
    case .afterValue:
      if byte == UInt8(ascii: ",") {
        state = stack.last! == .dictionary ? .key : .element
        return .more
      }
      return close(byte, &out)
    case .firstElement, .firstKey: if isClosing(byte) { return close(byte, &out) }
    case .element, .key:
      // A comma may stand before the closing bracket.
      if isClosing(byte) { return close(byte, &out) }
      out += ", ".utf8
    default: break
    }
    isKey = state == .firstKey || state == .key
    return begin(byte, &out)
  }

  private func isClosing(_ byte: UInt8) -> Bool {
    switch stack.last {
    case .list?: byte == UInt8(ascii: "]")
    case .tuple?: byte == UInt8(ascii: ")")
    case .dictionary?: byte == UInt8(ascii: "}")
    case nil: false
    }
  }

  private mutating func close(_ byte: UInt8, _ out: inout [UInt8]) -> JSONScanner.Step {
    guard isClosing(byte) else { return .failed }
    out.append(stack.removeLast() == .dictionary ? UInt8(ascii: "}") : UInt8(ascii: "]"))
    return endValue()
  }

  private mutating func begin(_ byte: UInt8, _ out: inout [UInt8]) -> JSONScanner.Step {
    func open(_ container: Container, _ bracket: UInt8, _ next: State) -> JSONScanner.Step {
      if isKey || stack.count == JSONScanner.depthLimit { return .failed }
      stack.append(container)
      out.append(bracket)
      state = next
      return .more
    }
    switch byte {
    case UInt8(ascii: "["): return open(.list, byte, .firstElement)
    case UInt8(ascii: "("): return open(.tuple, UInt8(ascii: "["), .firstElement)
    case UInt8(ascii: "{"): return open(.dictionary, byte, .firstKey)
    case UInt8(ascii: "'"), UInt8(ascii: "\""): beginString(byte, isRaw: false, &out)
    case UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "-"), UInt8(ascii: "+"), UInt8(ascii: "."):
      token = [byte]
      state = .number
    case _ where isIdentifier(byte):
      token = [byte]
      state = .word
    default: return .failed
    }
    return .more
  }

  private mutating func beginString(_ byte: UInt8, isRaw: Bool, _ out: inout [UInt8]) {
    quote = byte
    isTriple = false
    isEscaped = false
    self.isRaw = isRaw
    out.append(UInt8(ascii: "\""))
    state = .oneQuote
  }

  private mutating func string(_ byte: UInt8, _ out: inout [UInt8]) -> JSONScanner.Step {
    if isTriple, !isEscaped {
      if byte == quote {
        closingQuotes += 1
        if closingQuotes < 3 { return .more }
        out.append(UInt8(ascii: "\""))
        return endValue()
      }
      for _ in 0..<closingQuotes { appendEscaped(quote, to: &out) }
      closingQuotes = 0
    } else if byte == quote, !isEscaped {
      out.append(UInt8(ascii: "\""))
      return endValue()
    }
    if byte == UInt8(ascii: "\\"), !isRaw {
      state = .escape
      return .more
    }
    // In a raw string a backslash keeps the quote after it from closing, and stays.
    isEscaped = isRaw && byte == UInt8(ascii: "\\") && !isEscaped
    appendEscaped(byte, to: &out)
    return .more
  }

  private mutating func escape(_ byte: UInt8, _ out: inout [UInt8]) -> JSONScanner.Step {
    state = .string
    switch byte {
    case UInt8(ascii: "n"): appendEscaped(0x0A, to: &out)
    case UInt8(ascii: "t"): appendEscaped(0x09, to: &out)
    case UInt8(ascii: "r"): appendEscaped(0x0D, to: &out)
    case UInt8(ascii: "a"): appendEscaped(0x07, to: &out)
    case UInt8(ascii: "b"): appendEscaped(0x08, to: &out)
    case UInt8(ascii: "f"): appendEscaped(0x0C, to: &out)
    case UInt8(ascii: "v"): appendEscaped(0x0B, to: &out)
    case UInt8(ascii: "0"): appendEscaped(0, to: &out)
    case UInt8(ascii: "\\"), UInt8(ascii: "'"), UInt8(ascii: "\""): appendEscaped(byte, to: &out)
    case 0x0A: break
    case UInt8(ascii: "x"): expectDigits(2)
    case UInt8(ascii: "u"): expectDigits(4)
    case UInt8(ascii: "U"): expectDigits(8)
    default:
      // Python keeps the backslash of an escape that it does not know.
      appendEscaped(UInt8(ascii: "\\"), to: &out)
      appendEscaped(byte, to: &out)
    }
    return .more
  }

  private mutating func expectDigits(_ count: Int) {
    codePoint = 0
    digitsLeft = count
    state = .codePoint
  }

  private func append(_ codePoint: UInt32, _ out: inout [UInt8]) -> Bool {
    if let scalar = Unicode.Scalar(codePoint) {
      for byte in UTF8.encode(scalar)! { appendEscaped(byte, to: &out) }
      return true
    }
    // Half of a surrogate pair: JSON's escapes may spell it, and the other half follows.
    guard codePoint < 0x10000 else { return false }
    out += "\\u".utf8
    out += String(codePoint, radix: 16).utf8
    return true
  }

  private mutating func endValue() -> JSONScanner.Step {
    if isKey {
      isKey = false
      state = .colon
      return .more
    }
    state = stack.isEmpty ? .ended : .afterValue
    return stack.isEmpty ? .done : .more
  }

  private mutating func endValueBefore(_ byte: UInt8, _ out: inout [UInt8]) -> JSONScanner.Step {
    if endValue() == .done { return .doneBefore }
    return consume(byte, &out)
  }

  /// A number as JSON spells it.
  private static func number(_ token: [UInt8]) -> [UInt8]? {
    var digits = token.filter { $0 != UInt8(ascii: "_") }
    let isNegative = digits.first == UInt8(ascii: "-")
    if isNegative || digits.first == UInt8(ascii: "+") { digits.removeFirst() }
    let text = String(decoding: digits, as: UTF8.self).lowercased()
    if text == "inf" || text == "nan" { return Array("null".utf8) }
    let sign: [UInt8] = isNegative ? [UInt8(ascii: "-")] : []
    for (prefix, radix) in [("0x", 16), ("0o", 8), ("0b", 2)] where text.hasPrefix(prefix) {
      return UInt64(text.dropFirst(2), radix: radix).map { sign + Array(String($0).utf8) }
    }
    if digits.first == UInt8(ascii: ".") { digits.insert(UInt8(ascii: "0"), at: 0) }
    if let point = digits.firstIndex(of: UInt8(ascii: ".")) {
      let after = point + 1
      if after == digits.count || digits[after] | 0x20 == UInt8(ascii: "e") {
        digits.insert(UInt8(ascii: "0"), at: after)
      }
    }
    return JSONScanner.accepts(digits) && digits.first != UInt8(ascii: "-") ? sign + digits : nil
  }

  private static func word(_ token: [UInt8]) -> [UInt8]? {
    switch String(decoding: token, as: UTF8.self) {
    case "True", "true": Array("true".utf8)
    case "False", "false": Array("false".utf8)
    case "None", "null", "nan", "inf": Array("null".utf8)
    default: nil
    }
  }

  /// The JSON of a whole text that is one literal, or `nil`.
  static func json(_ text: some Sequence<UInt8>) -> [UInt8]? {
    var literal = PythonLiteral()
    var out: [UInt8] = []
    var isDone = false
    for byte in Array(text) + [UInt8(ascii: " ")] {
      if isDone {
        if !isWhitespace(byte) { return nil }
        continue
      }
      switch literal.consume(byte, &out) {
      case .more: break
      case .done: isDone = true
      case .doneBefore:
        if !isWhitespace(byte) { return nil }
        isDone = true
      case .failed: return nil
      }
    }
    return isDone ? out : nil
  }
}

/// Whether a byte may stand in an identifier.
func isIdentifier(_ byte: UInt8) -> Bool {
  switch byte {
  case UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "a")...UInt8(ascii: "z"),
    UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "_"):
    true
  default: byte >= 0x80
  }
}
