internal import ApusCore

/// A set of numbers: an interval without what is not a multiple, or is one.
struct NumberClause: Hashable {
  struct Bound: Hashable {
    var value: ExactDecimal
    var isInclusive: Bool
  }

  var lower: Bound?
  var upper: Bound?
  /// Each member is a multiple of each of these.
  var multiples: [ExactDecimal] = []
  /// No member is a multiple of any of these.
  var excludedMultiples: [ExactDecimal] = []
  /// In draft 4, whether a number is an integer depends on how it is written: `1.0` is none.
  var spelling = Spelling.any

  enum Spelling { case any, integer, other }

  static let one = ExactDecimal(1 as Int64)

  static func point(_ value: ExactDecimal) -> NumberClause {
    let bound = Bound(value: value, isInclusive: true)
    return NumberClause(lower: bound, upper: bound)
  }

  /// The only member, if the interval is a point.
  var point: ExactDecimal? {
    guard let lower, let upper, lower.value == upper.value else { return nil }
    return lower.value
  }

  var isInteger: Bool { multiples.contains { $0.isMultiple(of: Self.one) } }

  mutating func raise(to bound: Bound) {
    guard let old = lower else {
      lower = bound
      return
    }
    if bound.value > old.value || (bound.value == old.value && !bound.isInclusive) { lower = bound }
  }

  mutating func cut(to bound: Bound) {
    guard let old = upper else {
      upper = bound
      return
    }
    if bound.value < old.value || (bound.value == old.value && !bound.isInclusive) { upper = bound }
  }

  mutating func addMultiple(_ divisor: ExactDecimal) {
    for index in multiples.indices {
      if let common = ExactDecimal.leastCommonMultiple(multiples[index], divisor) {
        multiples[index] = common
        return
      }
    }
    multiples.append(divisor)
  }

  /// `nil` if the spellings exclude each other.
  func intersection(_ other: NumberClause) -> NumberClause? {
    var result = self
    if result.spelling == .any {
      result.spelling = other.spelling
    } else if other.spelling != .any, other.spelling != spelling {
      return nil
    }
    if let lower = other.lower { result.raise(to: lower) }
    if let upper = other.upper { result.cut(to: upper) }
    for divisor in other.multiples { result.addMultiple(divisor) }
    for divisor in other.excludedMultiples where !result.excludedMultiples.contains(divisor) {
      result.excludedMultiples.append(divisor)
    }
    return result
  }

  func contains(_ value: ExactDecimal) -> Bool {
    if let lower, value < lower.value || (value == lower.value && !lower.isInclusive) { return false }
    if let upper, value > upper.value || (value == upper.value && !upper.isInclusive) { return false }
    return multiples.allSatisfy { value.isMultiple(of: $0) } && !excludedMultiples.contains { value.isMultiple(of: $0) }
  }

  var isEmpty: Bool {
    for excluded in excludedMultiples where multiples.contains(where: { $0.isMultiple(of: excluded) }) { return true }
    if spelling == .integer, let point, !point.isInteger { return true }
    guard let lower, let upper else { return false }
    if lower.value > upper.value { return true }
    if lower.value == upper.value { return !(lower.isInclusive && upper.isInclusive && contains(lower.value)) }
    // Between two bounds lie finitely many multiples; few of them are tried one by one.
    guard let step = multiples.first else { return false }
    let power = min(step.power, lower.value.power, upper.value.power)
    guard let low = lower.value.scaled(to: power), let high = upper.value.scaled(to: power),
      let grid = step.scaled(to: power), grid > 0
    else { return false }
    var first = low / grid * grid
    while first < low || (first == low && !lower.isInclusive) { first += grid }
    if first > high || (first == high && !upper.isInclusive) { return true }
    if (high - first) / grid > 256 { return false }
    while first <= high {
      let magnitude = first.magnitude
      if magnitude > UInt128(UInt64.max) { return false }
      if contains(ExactDecimal(coefficient: UInt64(magnitude), power: power, isNegative: first < 0)) { return false }
      first += grid
    }
    return true
  }

  /// All numbers outside the clause.
  var complement: [NumberClause] {
    var result: [NumberClause] = []
    if let lower {
      result.append(NumberClause(upper: Bound(value: lower.value, isInclusive: !lower.isInclusive)))
    }
    if let upper {
      result.append(NumberClause(lower: Bound(value: upper.value, isInclusive: !upper.isInclusive)))
    }
    for divisor in multiples { result.append(NumberClause(excludedMultiples: [divisor])) }
    for divisor in excludedMultiples { result.append(NumberClause(multiples: [divisor])) }
    switch spelling {
    case .any: break
    case .integer: result.append(NumberClause(spelling: .other))
    case .other: result.append(NumberClause(spelling: .integer))
    }
    return result
  }
}

/// A union of number clauses.
struct NumberSet: Hashable {
  private(set) var clauses: [NumberClause]

  static let never = NumberSet([])
  static let all = NumberSet([NumberClause()])
  static let integers = NumberSet([NumberClause(multiples: [NumberClause.one])])
  /// Numbers written without fraction and exponent.
  static let writtenIntegers = NumberSet([NumberClause(spelling: .integer)])

  init(_ clauses: [NumberClause]) {
    var seen: Set<NumberClause> = []
    self.clauses = clauses.filter { !$0.isEmpty && seen.insert($0).inserted }
    let everything = NumberClause()
    if self.clauses.count > 1, self.clauses.contains(everything) { self.clauses = [everything] }
  }

  var isEmpty: Bool { clauses.isEmpty }

  func intersection(_ other: NumberSet) -> NumberSet {
    if self == .all { return other }
    if other == .all { return self }
    var result: [NumberClause] = []
    for left in clauses {
      for right in other.clauses { if let both = left.intersection(right) { result.append(both) } }
    }
    return NumberSet(result)
  }

  func union(_ other: NumberSet) -> NumberSet { NumberSet(clauses + other.clauses) }

  var complement: NumberSet {
    clauses.reduce(NumberSet.all) { $0.intersection(NumberSet($1.complement)) }
  }
}

/// How numbers may be written.
struct NumberForms: Hashable {
  /// Integers as digits alone, other numbers without exponent: what programs write that print a number for people.
  /// Otherwise every form that has the value, as far as finite automata go (see `docs/json-schema.md`).
  var plain = false
}

/// The texts of numbers.
enum NumberTexts {
  private typealias Expression = RegularExpression

  private static let digit = Expression.scalars(ScalarRanges([0x30...0x39]))
  private static let digits = Expression.repetition(digit, minimum: 0, maximum: nil)
  private static let someDigits = Expression.repetition(digit, minimum: 1, maximum: nil)
  private static let nonzero = Expression.scalars(ScalarRanges([0x31...0x39]))
  private static let zeros = Expression.repetition(.text("0"), minimum: 0, maximum: nil)
  private static let minus = Expression.text("-")
  private static let point = Expression.text(".")
  private static let exponentMark = Expression.scalars(ScalarRanges([0x45...0x45, 0x65...0x65]))
  private static let integer = Expression.union([.text("0"), .concatenation([nonzero, digits])])
  private static let anyFraction = optional(.concatenation([point, someDigits]))
  private static let zeroFraction = optional(
    .concatenation([point, .repetition(.text("0"), minimum: 1, maximum: nil)]))
  private static let anyExponent = Expression.concatenation([
    exponentMark, optional(.scalars(ScalarRanges([0x2B...0x2B, 0x2D...0x2D]))), someDigits,
  ])
  /// An exponent that is not negative.
  private static let raisingExponent = Expression.concatenation([exponentMark, optional(.text("+")), someDigits])
  private static let unsignedPlain = Expression.concatenation([integer, anyFraction])

  private static func optional(_ expression: Expression) -> Expression {
    .repetition(expression, minimum: 0, maximum: 1)
  }

  /// The texts of all numbers.
  static func all(_ forms: NumberForms) -> RegularExpression {
    forms.plain
      ? .concatenation([optional(minus), unsignedPlain])
      : .concatenation([optional(minus), unsignedPlain, optional(anyExponent)])
  }

  /// The texts of all integers: `1`, `1.0` and `1e3`, but not `10e-1`.
  private static func integers(_ forms: NumberForms) -> RegularExpression {
    forms.plain
      ? .concatenation([optional(minus), integer])
      : .concatenation([optional(minus), integer, zeroFraction, optional(raisingExponent)])
  }

  /// The texts of a set of numbers, or `nil` when they are not a regular language of bearable size.
  static func expression(_ set: NumberSet, _ forms: NumberForms) -> RegularExpression? {
    var parts: [RegularExpression] = []
    for clause in set.clauses {
      var clause = clause
      let spelling = clause.spelling
      clause.spelling = .any
      if spelling == .integer, !clause.isInteger { clause.addMultiple(NumberClause.one) }
      guard var part = expression(clause, spelling == .integer ? NumberForms(plain: true) : forms) else { return nil }
      if spelling == .other {
        part = .intersection([part, .complement(.concatenation([optional(minus), integer]))])
      }
      parts.append(part)
    }
    return parts.count == 1 ? parts[0] : .union(parts)
  }

  private static func expression(_ clause: NumberClause, _ forms: NumberForms) -> RegularExpression? {
    if let value = clause.point { return texts(of: value, forms) }
    let onlyIntegers = clause.multiples == [NumberClause.one]
    let isSimple = clause.excludedMultiples.isEmpty && (clause.multiples.isEmpty || onlyIntegers)
    if clause.lower == nil, clause.upper == nil, isSimple { return onlyIntegers ? integers(forms) : all(forms) }
    var constraints: [RegularExpression] = []
    if clause.lower != nil || clause.upper != nil {
      if isSimple, !forms.plain, let signed = signed(clause, onlyIntegers: onlyIntegers) { return signed }
      constraints.append(interval(clause, allowsExponent: isSimple && !forms.plain, onlyIntegers: onlyIntegers))
    }
    if constraints.isEmpty { constraints.append(.concatenation([optional(minus), unsignedPlain])) }
    if !onlyIntegers || forms.plain {
      for divisor in clause.multiples {
        guard let texts = multiples(of: divisor, forms) else { return nil }
        constraints.append(.concatenation([optional(minus), texts]))
      }
    }
    for divisor in clause.excludedMultiples {
      guard let texts = multiples(of: divisor, NumberForms()) else { return nil }
      constraints.append(.complement(.concatenation([optional(minus), texts])))
    }
    return constraints.count == 1 ? constraints[0] : .intersection(constraints)
  }

  /// The texts of one value.
  private static func texts(of value: ExactDecimal, _ forms: NumberForms) -> RegularExpression {
    if value.isZero {
      return forms.plain
        ? .text("0") : .concatenation([optional(minus), .text("0"), zeroFraction, optional(anyExponent)])
    }
    let sign: [RegularExpression] = value.isNegative ? [minus] : []
    let whole = value.integerDigits.isEmpty ? [0] : value.integerDigits
    let fraction = value.fractionDigits
    if forms.plain {
      return .concatenation(sign + [literal(whole)] + (fraction.isEmpty ? [] : [point, literal(fraction)]))
    }
    var parts: [RegularExpression] = []
    if whole.count + fraction.count < 60 {
      parts.append(
        .concatenation([literal(whole)] + (fraction.isEmpty ? [zeroFraction] : [point, literal(fraction), zeros])))
    }
    let mantissa: RegularExpression =
      value.digits.count == 1
      ? .concatenation([literal(value.digits), zeroFraction])
      : .concatenation([literal(value.digits.prefix(1)), point, literal(value.digits.dropFirst()), zeros])
    parts.append(.concatenation([mantissa, exponentMark, exponentTexts(equalTo: value.exponent - 1)]))
    return .concatenation(sign + [parts.count == 1 ? parts[0] : .union(parts)])
  }

  /// An interval that only asks for a sign permits every exponent.
  private static func signed(_ clause: NumberClause, onlyIntegers: Bool) -> RegularExpression? {
    if let lower = clause.lower, !lower.value.isZero { return nil }
    if let upper = clause.upper, !upper.value.isZero { return nil }
    if clause.lower != nil, clause.upper != nil { return nil }
    let mantissa = onlyIntegers ? .concatenation([integer, zeroFraction]) : unsignedPlain
    let exponent = optional(onlyIntegers ? raisingExponent : anyExponent)
    let zero = Expression.concatenation([.text("0"), zeroFraction])
    let above = Expression.concatenation([.intersection([mantissa, .complement(zero)]), exponent])
    let isInclusive = clause.lower?.isInclusive ?? clause.upper?.isInclusive ?? false
    let texts = clause.lower != nil ? above : .concatenation([minus, above])
    if !isInclusive { return texts }
    return .union([texts, .concatenation([optional(minus), zero, optional(anyExponent)])])
  }

  private static func interval(
    _ clause: NumberClause, allowsExponent: Bool, onlyIntegers: Bool
  ) -> RegularExpression {
    var parts: [RegularExpression] = []
    let zero = ExactDecimal.zero
    // Numbers without a sign lie between max(lower, 0) and upper; those with one, between max(-upper, 0) and -lower.
    func add(_ low: NumberClause.Bound?, _ high: NumberClause.Bound?, negative: Bool) {
      if let high, high.value < zero || (high.value == zero && !high.isInclusive) { return }
      var low = low
      if let bound = low, bound.value < zero { low = nil }
      var constraints: [RegularExpression] = [onlyIntegers ? .concatenation([integer, zeroFraction]) : unsignedPlain]
      if let low { constraints.append(atLeast(low)) }
      if let high { constraints.append(atMost(high)) }
      var texts: RegularExpression = .intersection(constraints)
      if constraints.count == 1 { texts = constraints[0] }
      if allowsExponent { texts = .union([texts, scientific(low, high, onlyIntegers: onlyIntegers)]) }
      parts.append(negative ? .concatenation([minus, texts]) : texts)
    }
    func negated(_ bound: NumberClause.Bound?) -> NumberClause.Bound? {
      bound.map { NumberClause.Bound(value: -$0.value, isInclusive: $0.isInclusive) }
    }
    add(clause.lower, clause.upper, negative: false)
    add(negated(clause.upper), negated(clause.lower), negative: true)
    return .union(parts)
  }

  /// Unsigned texts without exponent, at least a bound that is not negative.
  private static func atLeast(_ bound: NumberClause.Bound) -> RegularExpression {
    let whole = bound.value.integerDigits.isEmpty ? [0] : bound.value.integerDigits
    let fraction = bound.value.fractionDigits
    var parts: [RegularExpression] = [
      .concatenation([nonzero, .repetition(digit, minimum: whole.count, maximum: nil), anyFraction])
    ]
    for (index, limit) in whole.enumerated() where limit < 9 {
      parts.append(
        .concatenation([
          literal(whole[..<index]), digitRange(limit + 1, 9), exactly(whole.count - index - 1), anyFraction,
        ]))
    }
    parts.append(.concatenation([literal(whole), fractionAtLeast(fraction, bound.isInclusive)]))
    return .union(parts)
  }

  /// A fraction with its point, or none, of at least some digits.
  private static func fractionAtLeast(_ fraction: [UInt8], _ isInclusive: Bool) -> RegularExpression {
    let above = Expression.concatenation([digits, nonzero, digits])
    if fraction.isEmpty { return isInclusive ? anyFraction : .concatenation([point, above]) }
    var parts: [RegularExpression] = []
    for (index, limit) in fraction.enumerated() where limit < 9 {
      parts.append(.concatenation([literal(fraction[..<index]), digitRange(limit + 1, 9), digits]))
    }
    parts.append(.concatenation([literal(fraction), isInclusive ? digits : above]))
    return .concatenation([point, .union(parts)])
  }

  /// Unsigned texts without exponent, at most a bound that is not negative.
  private static func atMost(_ bound: NumberClause.Bound) -> RegularExpression {
    let whole = bound.value.integerDigits.isEmpty ? [0] : bound.value.integerDigits
    let fraction = bound.value.fractionDigits
    var parts: [RegularExpression] = []
    if whole.count > 1 {
      parts.append(.concatenation([.text("0"), anyFraction]))
      parts.append(
        .concatenation([nonzero, .repetition(digit, minimum: 0, maximum: whole.count - 2), anyFraction]))
    }
    for (index, limit) in whole.enumerated() {
      let least: UInt8 = index == 0 && whole.count > 1 ? 1 : 0
      guard limit > least else { continue }
      parts.append(
        .concatenation([
          literal(whole[..<index]), digitRange(least, limit - 1), exactly(whole.count - index - 1), anyFraction,
        ]))
    }
    parts.append(.concatenation([literal(whole), fractionAtMost(fraction, bound.isInclusive)]))
    return .union(parts)
  }

  private static func fractionAtMost(_ fraction: [UInt8], _ isInclusive: Bool) -> RegularExpression {
    if fraction.isEmpty { return isInclusive ? zeroFraction : .never }
    var parts: [RegularExpression] = []
    for (index, limit) in fraction.enumerated() {
      if limit > 0 { parts.append(.concatenation([literal(fraction[..<index]), digitRange(0, limit - 1), digits])) }
      // A proper beginning is less, because the last digit is not zero.
      if index > 0 { parts.append(literal(fraction[..<index])) }
    }
    if isInclusive { parts.append(.concatenation([literal(fraction), zeros])) }
    return optional(.concatenation([point, .union(parts)]))
  }

  /// Texts with one digit other than zero before the point, and an exponent, between two bounds.
  private static func scientific(
    _ low: NumberClause.Bound?, _ high: NumberClause.Bound?, onlyIntegers: Bool
  ) -> RegularExpression {
    let mantissa = Expression.concatenation([nonzero, onlyIntegers ? zeroFraction : anyFraction])
    var constraints: [RegularExpression] = [
      .concatenation([mantissa, onlyIntegers ? raisingExponent : anyExponent])
    ]
    if let low, !low.value.isZero {
      let exponent = low.value.exponent - 1
      let bound = NumberClause.Bound(value: leading(low.value), isInclusive: low.isInclusive)
      constraints.append(
        .union([
          .concatenation([mantissa, exponentMark, exponentTexts(atLeast: exponent + 1)]),
          .concatenation([atLeast(bound), exponentMark, exponentTexts(equalTo: exponent)]),
        ]))
    }
    if let high {
      if high.value.isZero { return .never }
      let exponent = high.value.exponent - 1
      let bound = NumberClause.Bound(value: leading(high.value), isInclusive: high.isInclusive)
      constraints.append(
        .union([
          .concatenation([mantissa, exponentMark, exponentTexts(atMost: exponent - 1)]),
          .concatenation([atMost(bound), exponentMark, exponentTexts(equalTo: exponent)]),
        ]))
    }
    return constraints.count == 1 ? constraints[0] : .intersection(constraints)
  }

  /// The value shifted so that one digit stands before the point.
  private static func leading(_ value: ExactDecimal) -> ExactDecimal {
    ExactDecimal(parsing: value.magnitude.shiftedToOneDigit)!
  }

  private static func exponentTexts(equalTo value: Int) -> RegularExpression {
    if value == 0 {
      return .concatenation([
        optional(.scalars(ScalarRanges([0x2B...0x2B, 0x2D...0x2D]))), .repetition(.text("0"), minimum: 1, maximum: nil),
      ])
    }
    return .concatenation([value < 0 ? minus : optional(.text("+")), zeros, .text(String(abs(value)))])
  }

  private static func exponentTexts(atLeast value: Int) -> RegularExpression {
    if value > 0 { return .concatenation([optional(.text("+")), zeros, wholeAtLeast(value)]) }
    let upwards = Expression.concatenation([optional(.text("+")), someDigits])
    return .union([upwards, .concatenation([minus, wholeAtMost(-value)])])
  }

  private static func exponentTexts(atMost value: Int) -> RegularExpression {
    if value < 0 { return .concatenation([minus, zeros, wholeAtLeast(-value)]) }
    return .union([
      .concatenation([minus, someDigits]), .concatenation([optional(.text("+")), wholeAtMost(value)]),
    ])
  }

  /// Digits, with leading zeros, of at least a positive integer.
  private static func wholeAtLeast(_ value: Int) -> RegularExpression {
    let limit = String(value).utf8.map { $0 - 0x30 }
    var parts: [RegularExpression] = [
      .concatenation([nonzero, .repetition(digit, minimum: limit.count, maximum: nil)]), literal(limit),
    ]
    for (index, digit) in limit.enumerated() where digit < 9 {
      parts.append(
        .concatenation([literal(limit[..<index]), digitRange(digit + 1, 9), exactly(limit.count - index - 1)]))
    }
    return .union(parts)
  }

  /// Digits, with leading zeros, of at most an integer that is not negative.
  private static func wholeAtMost(_ value: Int) -> RegularExpression {
    let limit = String(value).utf8.map { $0 - 0x30 }
    var parts: [RegularExpression] = [literal(limit)]
    if limit.count > 1 { parts.append(.repetition(digit, minimum: 1, maximum: limit.count - 1)) }
    for (index, digit) in limit.enumerated() where digit > 0 {
      parts.append(
        .concatenation([literal(limit[..<index]), digitRange(0, digit - 1), exactly(limit.count - index - 1)]))
    }
    return .concatenation([zeros, .union(parts)])
  }

  /// Unsigned texts without exponent of the multiples of a decimal, or `nil` when there are too many remainders.
  private static func multiples(of divisor: ExactDecimal, _ forms: NumberForms) -> RegularExpression? {
    guard let coefficient = divisor.coefficient, coefficient > 0, coefficient <= 10_000, abs(divisor.power) <= 30 else {
      return nil
    }
    let tail = forms.plain ? Expression.empty : zeroFraction
    if divisor.power >= 0 {
      let whole =
        coefficient == 1
        ? Expression.concatenation([nonzero, digits])
        : .intersection([.concatenation([nonzero, digits]), .digits(multipleOf: Int(coefficient))])
      return .union([
        .concatenation([.text("0"), tail]),
        .concatenation([whole, .text(String(repeating: "0", count: divisor.power)), tail]),
      ])
    }
    let places = -divisor.power
    if coefficient == 1 {
      return .concatenation([
        integer,
        optional(
          .concatenation([point, .repetition(digit, minimum: 1, maximum: places), forms.plain ? .empty : zeros])),
      ])
    }
    // With fewer digits behind the point than the divisor has, zeros are implied, which may supply factors.
    var parts: [RegularExpression] = []
    var factor = coefficient
    for count in stride(from: places, through: 0, by: -1) {
      let shape: RegularExpression =
        count == 0 ? integer : .concatenation([integer, point, exactly(count)])
      let trailing = count == places && !forms.plain ? zeros : .empty
      let texts = factor == 1 ? shape : .intersection([shape, .digits(multipleOf: Int(factor))])
      parts.append(.concatenation([texts, trailing]))
      var (a, b) = (factor, UInt64(10))
      while b != 0 { (a, b) = (b, a % b) }
      factor /= a
    }
    return .union(parts)
  }

  private static func literal(_ digits: some Sequence<UInt8>) -> RegularExpression {
    .literal(digits.map { $0 + 0x30 })
  }

  private static func digitRange(_ low: UInt8, _ high: UInt8) -> RegularExpression {
    .scalars(ScalarRanges([UInt32(low) + 0x30...UInt32(high) + 0x30]))
  }

  private static func exactly(_ count: Int) -> RegularExpression { .repetition(digit, minimum: count, maximum: count) }
}

extension ExactDecimal {
  fileprivate var shiftedToOneDigit: String {
    let text = String(decoding: digits.map { $0 + 0x30 }, as: UTF8.self)
    return text.prefix(1) + (digits.count > 1 ? "." + text.dropFirst() : "")
  }
}
