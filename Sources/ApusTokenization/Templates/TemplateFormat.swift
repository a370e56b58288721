import Glibc

/// Digits of a float by the C library, which rounds exactly as Python does.
func printedFloat(_ value: Double, precision: Int, conversion: Character, alternate: Bool = false) -> String {
  let format = "%\(alternate ? "#" : "").*\(conversion)"
  let size = 400 + max(0, precision)
  return withUnsafeTemporaryAllocation(of: CChar.self, capacity: size) { buffer in
    let count = withVaList([Int32(truncatingIfNeeded: precision), value]) {
      vsnprintf(buffer.baseAddress!, size, format, $0)
    }
    let bytes = buffer.prefix(max(0, min(Int(count), size - 1))).map { UInt8(bitPattern: $0) }
    return String(decoding: bytes, as: UTF8.self)
  }
}

/// `round(value, digits)` of a float: the nearest decimal, ties by the exact value, as Python's `repr` would read it.
func pythonRound(_ value: Double, _ digits: Int) -> Double {
  if !value.isFinite || value == 0 || digits > 323 { return value }
  if digits < -308 { return copysign(0, value) }
  if digits >= 0 { return Double(printedFloat(value, precision: digits, conversion: "f")) ?? value }
  let power = pow(10, Double(-digits))
  let scaled = value / power
  var rounded = scaled.rounded(.toNearestOrAwayFromZero)
  if abs(scaled - rounded) == 0.5 { rounded = 2 * (scaled / 2).rounded(.toNearestOrAwayFromZero) }
  return rounded * power
}

// MARK: printf-style formatting

/// `format % value`.
func percentFormat(_ machine: Machine, _ format: Text, _ value: Value) throws -> Text {
  var result: [UInt8] = []
  let bytes = format.bytes
  var index = 0
  var position = 0
  var values: [Value]
  var isTuple = false
  if case .tuple(let box) = value {
    values = box.items
    isTuple = true
  } else {
    values = [value]
  }
  var mapping: DictBox?
  if case .dict(let box) = value { mapping = box }
  // Lists, dictionaries and undefined values count as mappings, which need not be used up.
  var isMapping = mapping != nil
  switch value {
  case .list, .undefined: isMapping = true
  case .object(let object): isMapping = object is RangeObject
  default: break
  }
  var usedMapping = false

  func nextValue() throws -> Value {
    if usedMapping { throw TemplateFault.type("not enough arguments for format string") }
    guard position < values.count else {
      throw TemplateFault.type("not enough arguments for format string")
    }
    defer { position += 1 }
    return values[position]
  }

  while index < bytes.count {
    guard bytes[index] == UInt8(ascii: "%") else {
      result.append(bytes[index])
      index += 1
      continue
    }
    index += 1
    var specification = FormatSpecification()
    var keyed: Value?
    if index < bytes.count, bytes[index] == UInt8(ascii: "(") {
      guard let mapping else { throw TemplateFault.type("format requires a mapping") }
      var depth = 1
      var end = index + 1
      while end < bytes.count && depth > 0 {
        if bytes[end] == UInt8(ascii: "(") { depth += 1 }
        if bytes[end] == UInt8(ascii: ")") { depth -= 1 }
        end += 1
      }
      if depth > 0 { throw TemplateFault.value("incomplete format key") }
      let key = Text(slice: bytes[(index + 1)..<(end - 1)])
      guard let found = mapping[key] else { throw TemplateFault.key(repr(key)) }
      keyed = found
      usedMapping = true
      index = end
    }
    flags: while index < bytes.count {
      switch bytes[index] {
      case UInt8(ascii: "-"): specification.alignment = .left
      case UInt8(ascii: "+"): specification.sign = "+"
      case UInt8(ascii: " "): if specification.sign != "+" { specification.sign = " " }
      case UInt8(ascii: "#"): specification.alternate = true
      case UInt8(ascii: "0"): specification.zeroPadded = true
      default: break flags
      }
      index += 1
    }
    func count() throws -> Int? {
      if index < bytes.count, bytes[index] == UInt8(ascii: "*") {
        index += 1
        guard let value = integer(try nextValue()) else { throw TemplateFault.type("* wants int") }
        return value
      }
      var value: Int?
      while index < bytes.count, bytes[index] >= 0x30, bytes[index] <= 0x39 {
        value = min((value ?? 0) * 10 + Int(bytes[index] - 0x30), 1 << 40)
        index += 1
      }
      return value
    }
    if let width = try count() {
      if width < 0 { specification.alignment = .left }
      specification.width = abs(width)
    }
    if index < bytes.count, bytes[index] == UInt8(ascii: ".") {
      index += 1
      specification.precision = max(0, try count() ?? 0)
    }
    while index < bytes.count, "hlL".utf8.contains(bytes[index]) { index += 1 }
    guard index < bytes.count else { throw TemplateFault.value("incomplete format") }
    let (conversion, length) = decodeScalar(bytes, at: index)
    index += length
    if conversion == "%" {
      result.append(UInt8(ascii: "%"))
      continue
    }
    let value = try keyed ?? nextValue()
    var piece: Text
    switch conversion {
    case "s", "r", "a":
      piece = conversion == "s" ? pythonString(value) : Text(repr(value))
      if conversion == "s", format.isMarkup, case .string(let text) = value { piece = text.escapedForHTML().plain }
      if let precision = specification.precision {
        piece = Text(slice: piece.bytes[..<piece.byteOffset(ofCodePoint: precision)])
      }
      specification.zeroPadded = false
    case "d", "i", "u", "x", "X", "o":
      let isHex = conversion == "x" || conversion == "X" || conversion == "o"
      let int: Int
      switch number(value) {
      case .int(let value): int = value
      case .double(let double) where !isHex:
        guard let whole = Int(exactly: double.rounded(.towardZero)) else {
          if double.isNaN { throw TemplateFault.value("cannot convert float NaN to integer") }
          if double.isInfinite { throw TemplateFault.overflow("cannot convert float infinity to integer") }
          throw TemplateFault.bigInteger
        }
        int = whole
      default:
        if case .undefined(let info) = value { throw info.fault }
        throw TemplateFault.type(
          isHex
            ? "%\(conversion) format: an integer is required, not \(typeName(value))"
            : "%\(conversion) format: a real number is required, not \(typeName(value))")
      }
      piece = specification.integer(int, conversion: conversion)
    case "e", "E", "f", "F", "g", "G":
      guard let number = number(value) else {
        if case .undefined(let info) = value { throw info.fault }
        throw TemplateFault.type("must be real number, not \(typeName(value))")
      }
      let double: Double =
        switch number {
        case .int(let int): Double(int)
        case .double(let double): double
        }
      piece = specification.float(double, conversion: Character(conversion))
    case "c":
      switch value {
      case .string(let text) where text.count == 1: piece = text
      case .int(let int):
        guard let scalar = UInt32(exactly: int).flatMap(Unicode.Scalar.init) else {
          throw TemplateFault.overflow("%c arg not in range(0x110000)")
        }
        piece = Text(scalar: scalar)
      default: throw TemplateFault.type("%c requires int or char")
      }
      specification.zeroPadded = false
    default:
      throw TemplateFault.value(
        "unsupported format character '\(conversion)' (0x\(String(conversion.value, radix: 16))) at index "
          + "\(codePointCount(bytes[..<(index - length)]))")
    }
    let padded = try specification.padded(machine, piece, default: .right)
    try machine.chargeBytes(result.count + padded.bytes.count)
    result.append(contentsOf: padded.bytes)
  }
  if position < values.count && !usedMapping && !(isMapping && !isTuple) {
    throw TemplateFault.type("not all arguments converted during string formatting")
  }
  return Text(bytes: result, isMarkup: format.isMarkup)
}

/// What stands between the `%` or `:` and the conversion.
struct FormatSpecification {
  var fill = Text(" ")
  var alignment: Alignment?
  var sign: Character?
  var alternate = false
  var zeroPadded = false
  var width = 0
  var grouping: Character?
  var precision: Int?

  func signText(_ isNegative: Bool) -> String { isNegative ? "-" : sign.map { $0 == "-" ? "" : String($0) } ?? "" }

  func integer(_ value: Int, conversion: Unicode.Scalar) -> Text {
    let radix = conversion == "x" || conversion == "X" ? 16 : conversion == "o" ? 8 : conversion == "b" ? 2 : 10
    var digits = String(value.magnitude, radix: radix, uppercase: conversion == "X")
    if let precision, digits.count < precision {
      digits = String(repeating: "0", count: min(precision, 1 << 20) - digits.count) + digits
    }
    if let grouping { digits = Self.grouped(digits, grouping, size: radix == 10 ? 3 : 4) }
    let prefix = alternate && radix != 10 ? "0\(conversion)" : ""
    return Text(signText(value < 0) + prefix + digits)
  }

  func float(_ value: Double, conversion: Character) -> Text {
    let isUpper = conversion.isUppercase
    if !value.isFinite {
      let name = value.isNaN ? "nan" : "inf"
      return Text(signText(value.sign == .minus && !value.isNaN) + (isUpper ? name.uppercased() : name))
    }
    var digits = printedFloat(
      value.magnitude, precision: min(precision ?? 6, 1 << 16), conversion: conversion, alternate: alternate)
    if let grouping {
      let end = digits.firstIndex { !$0.isNumber } ?? digits.endIndex
      digits = Self.grouped(String(digits[..<end]), grouping, size: 3) + digits[end...]
    }
    return Text(signText(value.sign == .minus) + digits)
  }

  static func grouped(_ digits: String, _ separator: Character, size: Int) -> String {
    var result: [Character] = []
    for (position, digit) in digits.reversed().enumerated() {
      if position > 0 && position % size == 0 { result.append(separator) }
      result.append(digit)
    }
    return String(result.reversed())
  }

  func padded(_ machine: Machine, _ text: Text, default alignment: Alignment) throws -> Text {
    let missing = width - text.count
    if missing <= 0 { return text }
    var chosen = self.alignment ?? alignment
    var fill = fill
    if zeroPadded && self.alignment == nil {
      chosen = .afterSign
      fill = Text("0")
    }
    if chosen == .afterSign {
      try machine.chargeBytes(missing)
      var prefix = 0
      if let first = text.bytes.first, "+- ".utf8.contains(first) { prefix = 1 }
      if text.bytes.count > prefix + 1, text.bytes[prefix] == UInt8(ascii: "0"),
        "xXob".utf8.contains(text.bytes[prefix + 1]), alternate
      {
        prefix += 2
      }
      var bytes = Array(text.bytes[..<prefix])
      for _ in 0..<missing { bytes.append(contentsOf: fill.bytes) }
      bytes.append(contentsOf: text.bytes[prefix...])
      return Text(bytes: bytes)
    }
    return try formatPad(machine, text, width, fill, chosen)
  }

  /// Padding of `format`, whose centre puts the odd space to the right, unlike `str.center`.
  private func formatPad(
    _ machine: Machine, _ text: Text, _ width: Int, _ fill: Text, _ alignment: Alignment
  ) throws -> Text {
    guard alignment == .center else { return try pad(machine, text, to: width, with: fill, alignment) }
    let missing = width - text.count
    let left = try pad(machine, text, to: text.count + missing / 2, with: fill, .right)
    return try pad(machine, left, to: width, with: fill, .left)
  }
}

// MARK: str.format

/// `text.format(...)`.
func braceFormat(_ machine: Machine, _ format: Text, _ arguments: CallArguments, _ depth: Int = 0) throws -> Text {
  var counter = 0
  return try braceFormat(machine, format, arguments, depth, &counter)
}

private func braceFormat(
  _ machine: Machine, _ format: Text, _ arguments: CallArguments, _ depth: Int, _ counter: inout Int
) throws -> Text {
  if depth > 1 { throw TemplateFault.value("Max string recursion exceeded") }
  var result: [UInt8] = []
  let bytes = format.bytes
  var index = 0
  while index < bytes.count {
    let byte = bytes[index]
    if byte == UInt8(ascii: "{") || byte == UInt8(ascii: "}") {
      if index + 1 < bytes.count && bytes[index + 1] == byte {
        result.append(byte)
        index += 2
        continue
      }
      if byte == UInt8(ascii: "}") {
        throw TemplateFault.value("Single '}' encountered in format string")
      }
      var level = 1
      var end = index + 1
      while end < bytes.count {
        if bytes[end] == UInt8(ascii: "{") { level += 1 }
        if bytes[end] == UInt8(ascii: "}") {
          level -= 1
          if level == 0 { break }
        }
        end += 1
      }
      guard end < bytes.count else {
        throw TemplateFault.value(
          index + 1 < bytes.count ? "expected '}' before end of string" : "Single '{' encountered in format string")
      }
      let field = Array(bytes[(index + 1)..<end])
      index = end + 1
      var nameEnd = field.count
      var bracket = false
      for (position, byte) in field.enumerated() {
        if byte == UInt8(ascii: "[") { bracket = true }
        if byte == UInt8(ascii: "]") { bracket = false }
        if !bracket && (byte == UInt8(ascii: ":") || byte == UInt8(ascii: "!")) {
          nameEnd = position
          break
        }
      }
      var rest = field[nameEnd...]
      var conversion: UInt8?
      if rest.first == UInt8(ascii: "!") {
        guard rest.count >= 2 else {
          throw TemplateFault.value("end of string while looking for conversion specifier")
        }
        conversion = rest[rest.startIndex + 1]
        rest = rest.dropFirst(2)
        if let first = rest.first, first != UInt8(ascii: ":") {
          throw TemplateFault.value("expected ':' after conversion specifier")
        }
      }
      var value = try fieldValue(Text(slice: field[..<nameEnd]), arguments, &counter)
      switch conversion {
      case nil: break
      case UInt8(ascii: "s")?: value = .string(pythonString(value))
      case UInt8(ascii: "r")?, UInt8(ascii: "a")?: value = .string(Text(repr(value)))
      case let other?:
        throw TemplateFault.value("Unknown conversion specifier \(String(UnicodeScalar(other)))")
      }
      var specification = Text(slice: rest.dropFirst())
      if specification.bytes.contains(UInt8(ascii: "{")) || specification.bytes.contains(UInt8(ascii: "}")) {
        specification = try braceFormat(machine, specification, arguments, depth + 1, &counter)
      }
      var piece = try formatted(machine, value, specification)
      if format.isMarkup { piece = piece.escapedForHTML() }
      try machine.chargeBytes(result.count + piece.bytes.count)
      result.append(contentsOf: piece.bytes)
      continue
    }
    result.append(byte)
    index += 1
  }
  return Text(bytes: result, isMarkup: format.isMarkup)
}

/// The value that a replacement field names: an argument, and attributes and items of it.
private func fieldValue(_ field: Text, _ arguments: CallArguments, _ counter: inout Int) throws -> Value {
  let bytes = field.bytes
  var end = 0
  while end < bytes.count && bytes[end] != UInt8(ascii: ".") && bytes[end] != UInt8(ascii: "[") { end += 1 }
  let first = Text(slice: bytes[..<end])
  var value: Value
  func positional(_ position: Int) throws -> Value {
    guard arguments.positional.indices.contains(position) else {
      throw TemplateFault.index("Replacement index \(position) out of range for positional args tuple")
    }
    return arguments.positional[position]
  }
  if first.isEmpty {
    if counter < 0 {
      throw TemplateFault.value("cannot switch from manual field specification to automatic field numbering")
    }
    value = try positional(counter)
    counter += 1
  } else if let position = Int(first.string), position >= 0 {
    if counter > 0 {
      throw TemplateFault.value("cannot switch from automatic field numbering to manual field specification")
    }
    counter = -1
    value = try positional(position)
  } else {
    guard let found = arguments.keywords.first(where: { $0.name == first }) else {
      throw TemplateFault.key(repr(first))
    }
    value = found.value
  }
  var index = end
  while index < bytes.count {
    if bytes[index] == UInt8(ascii: ".") {
      var next = index + 1
      while next < bytes.count && bytes[next] != UInt8(ascii: ".") && bytes[next] != UInt8(ascii: "[") { next += 1 }
      let name = Text(slice: bytes[(index + 1)..<next])
      if name.isEmpty { throw TemplateFault.value("Empty attribute in format string") }
      value = try attributeOrItem(value, AttributeName(name))
      index = next
    } else {
      guard let close = bytes[index...].firstIndex(of: UInt8(ascii: "]")) else {
        throw TemplateFault.value("Missing ']' in format string")
      }
      let name = Text(slice: bytes[(index + 1)..<close])
      value = try itemOrAttribute(value, Int(name.string).map { .int($0) } ?? .string(name))
      index = close + 1
      if index < bytes.count, bytes[index] != UInt8(ascii: "."), bytes[index] != UInt8(ascii: "[") {
        throw TemplateFault.value("Only '.' or '[' may follow ']' in format field specifier")
      }
    }
  }
  return value
}

/// `format(value, specification)`.
private func formatted(_ machine: Machine, _ value: Value, _ text: Text) throws -> Text {
  if text.isEmpty { return pythonString(value) }
  var specification = FormatSpecification()
  let scalars = text.scalars
  var index = 0
  func alignment(_ scalar: Unicode.Scalar) -> Alignment? {
    switch scalar {
    case "<": .left
    case ">": .right
    case "^": .center
    case "=": .afterSign
    default: nil
    }
  }
  if scalars.count > 1, let chosen = alignment(scalars[1]) {
    specification.fill = Text(scalar: scalars[0])
    specification.alignment = chosen
    index = 2
  } else if let chosen = alignment(scalars[0]) {
    specification.alignment = chosen
    index = 1
  }
  func take(_ candidates: String) -> Unicode.Scalar? {
    guard index < scalars.count, candidates.unicodeScalars.contains(scalars[index]) else { return nil }
    index += 1
    return scalars[index - 1]
  }
  func digits() -> Int? {
    var value: Int?
    while let digit = take("0123456789") { value = min((value ?? 0) * 10 + Int(digit.value - 0x30), 1 << 40) }
    return value
  }
  if let sign = take("+- ") { specification.sign = Character(sign) }
  if take("#") != nil { specification.alternate = true }
  if take("0") != nil {
    specification.zeroPadded = true
    if specification.alignment == nil {
      specification.fill = Text("0")
    }
  }
  specification.width = digits() ?? 0
  if let separator = take(",_") { specification.grouping = Character(separator) }
  if take(".") != nil {
    guard let precision = digits() else { throw TemplateFault.value("Format specifier missing precision") }
    specification.precision = precision
  }
  let conversion = index < scalars.count ? scalars[index] : nil
  if index + 1 < scalars.count { throw TemplateFault.value("Invalid format specifier") }
  let type = typeName(value)
  func unknown() -> TemplateFault {
    .value("Unknown format code '\(conversion.map { String($0) } ?? "")' for object of type '\(type)'")
  }
  switch value {
  case .string(let string):
    if let conversion, conversion != "s" { throw unknown() }
    if specification.sign != nil { throw TemplateFault.value("Sign not allowed in string format specifier") }
    if specification.alternate {
      throw TemplateFault.value("Alternate form (#) not allowed in string format specifier")
    }
    if specification.alignment == .afterSign {
      throw TemplateFault.value("'=' alignment not allowed in string format specifier")
    }
    if specification.zeroPadded && specification.alignment == nil { specification.alignment = .left }
    if specification.grouping != nil {
      throw TemplateFault.value("Cannot specify '\(specification.grouping!)' with 's'.")
    }
    var piece = string
    if let precision = specification.precision {
      piece = Text(slice: string.bytes[..<string.byteOffset(ofCodePoint: precision)], isMarkup: string.isMarkup)
    }
    return try specification.padded(machine, piece, default: .left)
  case .int, .bool, .double:
    var number = number(value)!
    if specification.zeroPadded && specification.alignment == nil { specification.alignment = .afterSign }
    if specification.grouping != nil && specification.alignment == .afterSign {
      throw TemplateFault.unsupported("Zero padding of grouped digits is not supported in str.format")
    }
    switch conversion {
    case "d"?, "b"?, "o"?, "x"?, "X"?, "c"?:
      guard case .int(let int) = number else { throw unknown() }
      if specification.precision != nil {
        throw TemplateFault.value("Precision not allowed in integer format specifier")
      }
      if conversion == "c" {
        guard let scalar = UInt32(exactly: int).flatMap(Unicode.Scalar.init) else {
          throw TemplateFault.overflow("%c arg not in range(0x110000)")
        }
        return try specification.padded(machine, Text(scalar: scalar), default: .left)
      }
      return try specification.padded(
        machine, specification.integer(int, conversion: conversion!), default: .right)
    case "e"?, "E"?, "f"?, "F"?, "g"?, "G"?, "%"?:
      var double: Double =
        switch number {
        case .int(let int): Double(int)
        case .double(let double): double
        }
      if conversion == "%" {
        double *= 100
        let piece = specification.float(double, conversion: "f")
        return try specification.padded(machine, Text(bytes: piece.bytes + [UInt8(ascii: "%")]), default: .right)
      }
      return try specification.padded(
        machine, specification.float(double, conversion: Character(conversion!)), default: .right)
    case nil:
      if case .bool = value, case .int(let int) = number { number = .int(int) }
      switch number {
      case .int(let int):
        if specification.precision != nil {
          throw TemplateFault.value("Precision not allowed in integer format specifier")
        }
        return try specification.padded(machine, specification.integer(int, conversion: "d"), default: .right)
      case .double(let double):
        guard specification.precision == nil else {
          throw TemplateFault.unsupported("A precision without a type is not supported for floats in str.format")
        }
        var digits = pythonFloat(double.magnitude)
        if let grouping = specification.grouping {
          let end = digits.firstIndex { !$0.isNumber } ?? digits.endIndex
          digits = FormatSpecification.grouped(String(digits[..<end]), grouping, size: 3) + digits[end...]
        }
        return try specification.padded(
          machine, Text(specification.signText(double.sign == .minus) + digits), default: .right)
      }
    default: throw unknown()
    }
  default:
    throw TemplateFault.type("unsupported format string passed to \(type).__format__")
  }
}
