internal import ApusCore

/// A decimal number held exactly, as JSON Schema's `minimum`, `maximum` and `multipleOf` need it.
///
/// The value is `0.d1 d2 d3... x 10^exponent`, with neither a leading nor a trailing zero among the digits, so that equal
/// values are equal structures. Zero has no digits.
struct ExactDecimal: Hashable, Comparable, Sendable, CustomStringConvertible {
  private(set) var isNegative = false
  /// Significant digits, most significant first, each from 0 to 9.
  private(set) var digits: [UInt8] = []
  private(set) var exponent = 0

  static let zero = ExactDecimal()

  init() {}

  init(_ value: Int64) { self.init(parsing: String(value))! }

  /// The shortest decimal that reads back as this double, which is what the schema's author wrote unless it had more
  /// than 17 digits.
  init(_ value: Double) { self = ExactDecimal(parsing: value.description) ?? .zero }

  /// A number of a schema or an instance.
  init?(_ value: JSONValue) {
    switch value {
    case .int(let value): self.init(value)
    case .double(let value): self.init(value)
    default: return nil
    }
  }

  /// Reads a JSON number (leading zeros and a leading `+` do no harm).
  init?(parsing text: String) {
    var point: Int?
    var shift = 0
    var bytes = Array(text.utf8)[...]
    if bytes.first == UInt8(ascii: "-") {
      isNegative = true
      bytes.removeFirst()
    } else if bytes.first == UInt8(ascii: "+") {
      bytes.removeFirst()
    }
    while let byte = bytes.first {
      bytes.removeFirst()
      switch byte {
      case UInt8(ascii: "0")...UInt8(ascii: "9"): digits.append(byte - UInt8(ascii: "0"))
      case UInt8(ascii: "."):
        if point != nil { return nil }
        point = digits.count
      case UInt8(ascii: "e"), UInt8(ascii: "E"):
        guard let value = Int(String(decoding: bytes, as: UTF8.self)), abs(value) < 1_000_000 else { return nil }
        shift = value
        bytes = []
      default: return nil
      }
    }
    if digits.isEmpty { return nil }
    exponent = (point ?? digits.count) + shift
    normalize()
  }

  /// `coefficient x 10^power`.
  init(coefficient: UInt64, power: Int, isNegative: Bool = false) {
    digits = String(coefficient).utf8.map { $0 - UInt8(ascii: "0") }
    exponent = digits.count + power
    self.isNegative = isNegative
    normalize()
  }

  private mutating func normalize() {
    let leading = digits.prefix { $0 == 0 }.count
    digits.removeFirst(leading)
    exponent -= leading
    while digits.last == 0 { digits.removeLast() }
    if digits.isEmpty {
      exponent = 0
      isNegative = false
    }
  }

  var isZero: Bool { digits.isEmpty }

  var magnitude: ExactDecimal {
    var result = self
    result.isNegative = false
    return result
  }

  /// The power of ten of the last digit: the value is an integer times `10^power`.
  var power: Int { exponent - digits.count }

  var isInteger: Bool { power >= 0 || isZero }

  /// The digits as an integer, if it fits.
  var coefficient: UInt64? {
    var result: UInt64 = 0
    for digit in digits {
      let (product, first) = result.multipliedReportingOverflow(by: 10)
      let (sum, second) = product.addingReportingOverflow(UInt64(digit))
      if first || second { return nil }
      result = sum
    }
    return result
  }

  static func < (left: ExactDecimal, right: ExactDecimal) -> Bool {
    if left.isNegative != right.isNegative { return left.isNegative }
    return left.isNegative
      ? magnitudeIsLess(right, left)
      : magnitudeIsLess(left, right)
  }

  private static func magnitudeIsLess(_ left: ExactDecimal, _ right: ExactDecimal) -> Bool {
    if left.isZero || right.isZero { return left.isZero && !right.isZero }
    if left.exponent != right.exponent { return left.exponent < right.exponent }
    return left.digits.lexicographicallyPrecedes(right.digits)
  }

  static prefix func - (value: ExactDecimal) -> ExactDecimal {
    var result = value
    if !result.isZero { result.isNegative.toggle() }
    return result
  }

  /// Whether this is an integer multiple of a positive divisor whose coefficient fits 64 bits.
  func isMultiple(of divisor: ExactDecimal) -> Bool {
    if isZero { return true }
    guard let modulus = divisor.coefficient, modulus > 0 else { return false }
    // Neither coefficient ends in zero: a finer last digit than the divisor's cannot be a multiple.
    if power < divisor.power { return false }
    var remainder: UInt64 = 0
    for digit in digits { remainder = Self.step(remainder, digit, modulus) }
    for _ in 0..<(power - divisor.power) where remainder != 0 { remainder = Self.step(remainder, 0, modulus) }
    return remainder == 0
  }

  private static func step(_ remainder: UInt64, _ digit: UInt8, _ modulus: UInt64) -> UInt64 {
    let (high, low) = remainder.multipliedFullWidth(by: 10)
    let (sum, carry) = low.addingReportingOverflow(UInt64(digit))
    return modulus.dividingFullWidth((high + (carry ? 1 : 0), sum)).remainder
  }

  /// The least common multiple of two positive decimals, if its coefficient fits 64 bits.
  static func leastCommonMultiple(_ left: ExactDecimal, _ right: ExactDecimal) -> ExactDecimal? {
    let power = min(left.power, right.power)
    guard let first = left.scaled(to: power), let second = right.scaled(to: power), first > 0, second > 0 else {
      return nil
    }
    var (a, b) = (first, second)
    while b != 0 { (a, b) = (b, a % b) }
    let (product, overflow) = (first / a).multipliedReportingOverflow(by: second)
    if overflow || product > Int128(UInt64.max) { return nil }
    return ExactDecimal(coefficient: UInt64(product), power: power)
  }

  /// The value divided by `10^power`, if that is an integer that fits.
  func scaled(to power: Int) -> Int128? {
    if isZero { return 0 }
    if self.power < power { return nil }
    if exponent - power > 37 { return nil }
    var result: Int128 = 0
    for digit in digits { result = result * 10 + Int128(digit) }
    for _ in 0..<(self.power - power) { result *= 10 }
    return isNegative ? -result : result
  }

  /// Digits before the decimal point, without leading zeros; empty below one.
  var integerDigits: [UInt8] {
    if exponent <= 0 { return [] }
    if exponent <= digits.count { return Array(digits.prefix(exponent)) }
    return digits + Array(repeating: 0, count: exponent - digits.count)
  }

  /// Digits after the decimal point, without trailing zeros.
  var fractionDigits: [UInt8] {
    if exponent >= digits.count { return [] }
    if exponent >= 0 { return Array(digits.dropFirst(exponent)) }
    return Array(repeating: 0, count: -exponent) + digits
  }

  var description: String {
    let whole = integerDigits.isEmpty ? "0" : String(decoding: integerDigits.map { $0 + 48 }, as: UTF8.self)
    let fraction = fractionDigits.isEmpty ? "" : "." + String(decoding: fractionDigits.map { $0 + 48 }, as: UTF8.self)
    return (isNegative ? "-" : "") + whole + fraction
  }
}
