/// Checks one JSON value as its bytes arrive, and passes them on.
///
/// The grammar is RFC 8259's, with one leniency: control characters within strings, which models write where an escape
/// belongs, are passed on as escapes, so that what comes out is always JSON. Memory is one byte per level of nesting.
struct JSONScanner: Sendable {
  enum Step {
    case more
    /// The byte was the value's last.
    case done
    /// The value ended before the byte, as only numbers do.
    case doneBefore
    case failed
  }

  private enum State {
    case value, firstKey, key, colon, firstElement, afterValue
    case string, escape, unicode
    case minus, zero, integer, point, fraction, exponent, exponentSign, exponentDigits
    case literal
    case ended
  }

  static let depthLimit = 128

  private var state = State.value
  /// Whether each open container is an object.
  private var stack: [Bool] = []
  private var isKey = false
  private var hexDigits = 0
  private var literal: [UInt8] = []

  init() {}

  /// Whether the scanner is within a string.
  var isInString: Bool { state == .string || state == .escape || state == .unicode }

  mutating func consume(_ byte: UInt8, _ out: inout [UInt8]) -> Step {
    switch state {
    case .string:
      switch byte {
      case UInt8(ascii: "\""):
        out.append(byte)
        return endString()
      case UInt8(ascii: "\\"):
        state = .escape
        out.append(byte)
      case 0..<0x20: appendEscaped(byte, to: &out)
      default: out.append(byte)
      }
      return .more
    case .escape:
      switch byte {
      case UInt8(ascii: "u"):
        state = .unicode
        hexDigits = 0
      case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"), UInt8(ascii: "b"), UInt8(ascii: "f"),
        UInt8(ascii: "n"), UInt8(ascii: "r"), UInt8(ascii: "t"):
        state = .string
      default: return .failed
      }
      out.append(byte)
      return .more
    case .unicode:
      guard hexDigit(byte) != nil else { return .failed }
      out.append(byte)
      hexDigits += 1
      if hexDigits == 4 { state = .string }
      return .more
    case .minus, .zero, .integer, .point, .fraction, .exponent, .exponentSign, .exponentDigits:
      return number(byte, &out)
    case .literal:
      guard byte == literal.first else { return .failed }
      literal.removeFirst()
      out.append(byte)
      return literal.isEmpty ? endValue() : .more
    case .ended: return .failed
    case .value, .firstKey, .key, .colon, .firstElement, .afterValue: break
    }
    out.append(byte)
    if isWhitespace(byte) { return byte == 0x0C ? .failed : .more }
    switch (state, byte) {
    case (.firstKey, UInt8(ascii: "}")), (.firstElement, UInt8(ascii: "]")): return close()
    case (.firstKey, UInt8(ascii: "\"")), (.key, UInt8(ascii: "\"")):
      isKey = true
      state = .string
    case (.colon, UInt8(ascii: ":")): state = .value
    case (.afterValue, UInt8(ascii: ",")): state = stack.last! ? .key : .value
    case (.afterValue, UInt8(ascii: "}")) where stack.last!: return close()
    case (.afterValue, UInt8(ascii: "]")) where !stack.last!: return close()
    case (.value, _), (.firstElement, _): return begin(byte)
    default: return .failed
    }
    return .more
  }

  private mutating func begin(_ byte: UInt8) -> Step {
    switch byte {
    case UInt8(ascii: "{"), UInt8(ascii: "["):
      let isObject = byte == UInt8(ascii: "{")
      if stack.count == Self.depthLimit { return .failed }
      stack.append(isObject)
      state = isObject ? .firstKey : .firstElement
    case UInt8(ascii: "\""):
      isKey = false
      state = .string
    case UInt8(ascii: "-"): state = .minus
    case UInt8(ascii: "0"): state = .zero
    case UInt8(ascii: "1")...UInt8(ascii: "9"): state = .integer
    case UInt8(ascii: "t"): expect("rue")
    case UInt8(ascii: "f"): expect("alse")
    case UInt8(ascii: "n"): expect("ull")
    default: return .failed
    }
    return .more
  }

  private mutating func expect(_ rest: String) {
    literal = Array(rest.utf8)
    state = .literal
  }

  private mutating func close() -> Step {
    stack.removeLast()
    return endValue()
  }

  private mutating func endString() -> Step {
    if isKey {
      isKey = false
      state = .colon
      return .more
    }
    return endValue()
  }

  private mutating func endValue() -> Step {
    state = stack.isEmpty ? .ended : .afterValue
    return stack.isEmpty ? .done : .more
  }

  private mutating func number(_ byte: UInt8, _ out: inout [UInt8]) -> Step {
    let isDigit = byte >= UInt8(ascii: "0") && byte <= UInt8(ascii: "9")
    let isExponent = byte | 0x20 == UInt8(ascii: "e")
    let next: State?
    switch state {
    case .minus: next = byte == UInt8(ascii: "0") ? .zero : isDigit ? .integer : nil
    case .zero: next = byte == UInt8(ascii: ".") ? .point : isExponent ? .exponent : nil
    case .integer: next = isDigit ? .integer : byte == UInt8(ascii: ".") ? .point : isExponent ? .exponent : nil
    case .point: next = isDigit ? .fraction : nil
    case .fraction: next = isDigit ? .fraction : isExponent ? .exponent : nil
    case .exponent:
      next =
        isDigit
        ? .exponentDigits : byte == UInt8(ascii: "+") || byte == UInt8(ascii: "-") ? .exponentSign : nil
    case .exponentSign, .exponentDigits: next = isDigit ? .exponentDigits : nil
    default: next = nil
    }
    if let next {
      state = next
      out.append(byte)
      return .more
    }
    switch state {
    case .zero, .integer, .fraction, .exponentDigits: break
    default: return .failed
    }
    if endValue() == .done { return .doneBefore }
    return consume(byte, &out)
  }

  /// Whether a text is one JSON value and nothing else.
  static func accepts(_ text: some Sequence<UInt8>) -> Bool {
    var scanner = JSONScanner()
    var out: [UInt8] = []
    var isDone = false
    for byte in text {
      if isDone {
        if !isWhitespace(byte) { return false }
        continue
      }
      switch scanner.consume(byte, &out) {
      case .more: break
      case .done: isDone = true
      case .doneBefore:
        if !isWhitespace(byte) { return false }
        isDone = true
      case .failed: return false
      }
    }
    switch scanner.state {
    case .ended, .zero, .integer, .fraction, .exponentDigits: return scanner.stack.isEmpty
    default: return false
    }
  }
}

func hexDigit(_ byte: UInt8) -> UInt32? {
  switch byte {
  case UInt8(ascii: "0")...UInt8(ascii: "9"): UInt32(byte - UInt8(ascii: "0"))
  case UInt8(ascii: "a")...UInt8(ascii: "f"): UInt32(byte - UInt8(ascii: "a")) + 10
  case UInt8(ascii: "A")...UInt8(ascii: "F"): UInt32(byte - UInt8(ascii: "A")) + 10
  default: nil
  }
}

/// Appends a byte of a text as a JSON string holds it.
func appendEscaped(_ byte: UInt8, to out: inout [UInt8]) {
  switch byte {
  case UInt8(ascii: "\""), UInt8(ascii: "\\"): out += [UInt8(ascii: "\\"), byte]
  case 0x08: out += "\\b".utf8
  case 0x09: out += "\\t".utf8
  case 0x0A: out += "\\n".utf8
  case 0x0C: out += "\\f".utf8
  case 0x0D: out += "\\r".utf8
  case 0..<0x20:
    let digits = Array("0123456789abcdef".utf8)
    out += "\\u00".utf8
    out += [digits[Int(byte >> 4)], digits[Int(byte & 15)]]
  default: out.append(byte)
  }
}

/// A text as a JSON string.
func quoted(_ bytes: some Sequence<UInt8>) -> [UInt8] {
  var out: [UInt8] = [UInt8(ascii: "\"")]
  for byte in bytes { appendEscaped(byte, to: &out) }
  out.append(UInt8(ascii: "\""))
  return out
}
