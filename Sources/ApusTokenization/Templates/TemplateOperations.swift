import Glibc

// MARK: Arithmetic

/// `left + right`.
func add(_ machine: Machine, _ left: Value, _ right: Value) throws -> Value {
  try arithmetic(machine, .add, left, right)
}

/// Any binary operator, with Python's rules.
func arithmetic(_ machine: Machine, _ operation: BinaryOperator, _ left: Value, _ right: Value) throws -> Value {
  if case .undefined(let info) = left { throw info.fault }
  if case .string(let format) = left, operation == .modulo {
    let text = try percentFormat(machine, format, right)
    return .string(text)
  }
  if case .undefined(let info) = right { throw info.fault }
  if let a = number(left), let b = number(right) {
    switch (a, b) {
    case (.int(let a), .int(let b)): return try integerArithmetic(operation, a, b)
    case (.int(let a), .double(let b)): return .double(try floatArithmetic(operation, Double(a), b))
    case (.double(let a), .int(let b)): return .double(try floatArithmetic(operation, a, Double(b)))
    case (.double(let a), .double(let b)): return .double(try floatArithmetic(operation, a, b))
    }
  }
  switch operation {
  case .add:
    switch (left, right) {
    case (.string(let a), .string(let b)):
      try machine.chargeBytes(a.bytes.count + b.bytes.count)
      if a.isMarkup || b.isMarkup {
        return .string(Text(bytes: a.escapedForHTML().bytes + b.escapedForHTML().bytes, isMarkup: true))
      }
      return .string(Text(bytes: a.bytes + b.bytes))
    case (.list(let a), .list(let b)):
      try machine.charge(a.items.count + b.items.count)
      return .list(a.items + b.items)
    case (.tuple(let a), .tuple(let b)):
      try machine.charge(a.items.count + b.items.count)
      return .tuple(a.items + b.items)
    case (.string(let a), _):
      if a.isMarkup { break }
      throw TemplateFault.type("can only concatenate str (not \"\(typeName(right))\") to str")
    case (.list, _): throw TemplateFault.type("can only concatenate list (not \"\(typeName(right))\") to list")
    case (.tuple, _): throw TemplateFault.type("can only concatenate tuple (not \"\(typeName(right))\") to tuple")
    default: break
    }
  case .multiply:
    if isSequence(left), let count = integer(right) { return try repeated(machine, left, count) }
    if isSequence(right), let count = integer(left) { return try repeated(machine, right, count) }
    if isSequence(left) || isSequence(right) {
      let other = isSequence(left) ? right : left
      throw TemplateFault.type("can't multiply sequence by non-int of type '\(typeName(other))'")
    }
  default: break
  }
  let symbol = operation == .power ? "** or pow()" : operation.rawValue
  throw TemplateFault.type(
    "unsupported operand type(s) for \(symbol): '\(typeName(left))' and '\(typeName(right))'")
}

private func isSequence(_ value: Value) -> Bool {
  switch value {
  case .string, .list, .tuple: true
  default: false
  }
}

private func repeated(_ machine: Machine, _ value: Value, _ count: Int) throws -> Value {
  let count = max(0, count)
  switch value {
  case .string(let text):
    let (total, overflow) = text.bytes.count.multipliedReportingOverflow(by: count)
    try machine.chargeBytes(overflow ? .max : total)
    var bytes: [UInt8] = []
    bytes.reserveCapacity(total)
    if text.bytes.count > 0 { for _ in 0..<count { bytes.append(contentsOf: text.bytes) } }
    return .string(Text(bytes: bytes, isMarkup: text.isMarkup))
  case .list(let box), .tuple(let box):
    let (total, overflow) = box.items.count.multipliedReportingOverflow(by: count)
    try machine.charge(overflow ? .max : total)
    var items: [Value] = []
    items.reserveCapacity(total)
    if !box.items.isEmpty { for _ in 0..<count { items.append(contentsOf: box.items) } }
    if case .tuple = value { return .tuple(items) }
    return .list(items)
  default: return value
  }
}

private func integerArithmetic(_ operation: BinaryOperator, _ a: Int, _ b: Int) throws -> Value {
  func checked(_ result: (partialValue: Int, overflow: Bool)) throws -> Value {
    if result.overflow { throw TemplateFault.bigInteger }
    return .int(result.partialValue)
  }
  switch operation {
  case .add: return try checked(a.addingReportingOverflow(b))
  case .subtract: return try checked(a.subtractingReportingOverflow(b))
  case .multiply: return try checked(a.multipliedReportingOverflow(by: b))
  case .divide:
    if b == 0 { throw TemplateFault.zeroDivision("division by zero") }
    return .double(Double(a) / Double(b))
  case .floorDivide:
    if b == 0 { throw TemplateFault.zeroDivision("integer division or modulo by zero") }
    if a == .min && b == -1 { throw TemplateFault.bigInteger }
    let quotient = a / b
    return .int(a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient)
  case .modulo:
    if b == 0 { throw TemplateFault.zeroDivision("integer modulo by zero") }
    if b == -1 { return .int(0) }
    let remainder = a % b
    return .int(remainder != 0 && (remainder < 0) != (b < 0) ? remainder + b : remainder)
  case .power:
    if b < 0 {
      if a == 0 { throw TemplateFault.zeroDivision("0.0 cannot be raised to a negative power") }
      return .double(pow(Double(a), Double(b)))
    }
    var result = 1
    var base = a
    var exponent = b
    while exponent > 0 {
      if exponent & 1 == 1 {
        let (product, overflow) = result.multipliedReportingOverflow(by: base)
        if overflow { throw TemplateFault.bigInteger }
        result = product
      }
      exponent >>= 1
      if exponent > 0 {
        let (square, overflow) = base.multipliedReportingOverflow(by: base)
        if overflow { throw TemplateFault.bigInteger }
        base = square
      }
    }
    return .int(result)
  }
}

private func floatArithmetic(_ operation: BinaryOperator, _ a: Double, _ b: Double) throws -> Double {
  switch operation {
  case .add: return a + b
  case .subtract: return a - b
  case .multiply: return a * b
  case .divide:
    if b == 0 { throw TemplateFault.zeroDivision("float division by zero") }
    return a / b
  case .floorDivide:
    if b == 0 { throw TemplateFault.zeroDivision("float floor division by zero") }
    return floorDivision(a, b).quotient
  case .modulo:
    if b == 0 { throw TemplateFault.zeroDivision("float modulo") }
    return floorDivision(a, b).remainder
  case .power:
    if a == 0 && b < 0 { throw TemplateFault.zeroDivision("0.0 cannot be raised to a negative power") }
    if a < 0 && a.isFinite && b.isFinite && b != b.rounded() {
      throw TemplateFault.unsupported("A power of the template is a complex number, which is not supported")
    }
    let result = pow(a, b)
    if result.isInfinite && a.isFinite && b.isFinite {
      throw TemplateFault.overflow("(34, 'Numerical result out of range')")
    }
    return result
  }
}

/// Python's `divmod` of floats.
private func floorDivision(_ a: Double, _ b: Double) -> (quotient: Double, remainder: Double) {
  var remainder = fmod(a, b)
  var quotient = (a - remainder) / b
  if remainder != 0 {
    if (b < 0) != (remainder < 0) {
      remainder += b
      quotient -= 1
    }
  } else {
    remainder = copysign(0, b)
  }
  if quotient != 0 {
    let floored = quotient.rounded(.down)
    quotient = quotient - floored > 0.5 ? floored + 1 : floored
  } else {
    quotient = copysign(0, a / b)
  }
  return (quotient, remainder)
}

// MARK: Attributes and items

/// A name after a dot, with what it means for the built-in types looked up once.
struct AttributeName {
  let text: Text
  let stringMethod: StringMethod?
  let isDictMethod: Bool
  /// Whether a dictionary has an attribute of this name, which hides an item.
  let isReserved: Bool

  init(_ text: Text) {
    self.text = text
    let name = text.string
    stringMethod = StringMethod(rawValue: name)
    isDictMethod = dictMethods.contains(name)
    isReserved = isDictMethod || mutatingDictMethods.contains(name) || name == "fromkeys" || isDunder(name)
  }
}

private let dictMethods: Set<String> = ["copy", "get", "items", "keys", "values"]
private let mutatingDictMethods: Set<String> = ["clear", "pop", "popitem", "setdefault", "update"]
private let listMethods: Set<String> = ["copy", "count", "index"]
private let mutatingListMethods: Set<String> = [
  "append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort",
]

/// Attributes that every Python object has; the sandbox refuses them.
private func isDunder(_ name: String) -> Bool {
  switch name {
  case "__class__", "__doc__", "__dir__", "__eq__", "__format__", "__ge__", "__getattribute__", "__gt__", "__hash__",
    "__init__", "__init_subclass__", "__le__", "__lt__", "__ne__", "__new__", "__reduce__", "__reduce_ex__",
    "__repr__", "__setattr__", "__delattr__", "__sizeof__", "__str__", "__subclasshook__", "__getstate__":
    true
  case "__len__", "__getitem__", "__contains__", "__iter__": true
  default: false
  }
}

private func undefinedMember(_ value: Value, _ key: Value) -> Value {
  let type: String
  var isBuiltin = true
  switch value {
  case .none:
    type = "None"
    isBuiltin = false
  case .object(let object) where !object.isBuiltinType:
    type = object is NamespaceObject ? "__main__.TemplateNamespace object" : "jinja2.\(object.typeName) object"
    isBuiltin = false
  default: type = typeName(value)
  }
  return .undefined(UndefinedInfo(.member(of: type, isBuiltin: isBuiltin, key: key)))
}

private func unsafe(_ value: Value, _ name: Text) -> Value {
  .undefined(UndefinedInfo(.unsafe(attribute: name.string, type: typeName(value))))
}

/// `getattr(value, name)`, or `nil` if the value has no such attribute.
func attribute(_ value: Value, _ name: AttributeName) throws -> Value? {
  let text = name.text
  switch value {
  case .string(let string):
    if let method = name.stringMethod, string.isMarkup || !method.isOfMarkup {
      return .object(MethodObject(value, text))
    }
  case .dict:
    if name.isDictMethod { return .object(MethodObject(value, text)) }
    if name.isReserved { return unsafe(value, text) }
    return nil
  case .list:
    if listMethods.contains(text.string) { return .object(MethodObject(value, text)) }
    if mutatingListMethods.contains(text.string) { return unsafe(value, text) }
  case .tuple(let box):
    if text.string == "count" || text.string == "index" { return .object(MethodObject(value, text)) }
    if box.isGroup {
      if text.string == "grouper" { return box.items[0] }
      if text.string == "list" { return box.items[1] }
    }
  case .int(let int):
    switch text.string {
    case "real", "numerator": return .int(int)
    case "imag": return .int(0)
    case "denominator": return .int(1)
    case "bit_length", "bit_count", "conjugate": return .object(MethodObject(value, text))
    default: break
    }
  case .bool(let bool):
    switch text.string {
    case "real", "numerator": return .int(bool ? 1 : 0)
    case "imag": return .int(0)
    case "denominator": return .int(1)
    case "bit_length", "bit_count", "conjugate": return .object(MethodObject(value, text))
    default: break
    }
  case .double(let double):
    switch text.string {
    case "real": return .double(double)
    case "imag": return .double(0)
    case "is_integer", "conjugate": return .object(MethodObject(value, text))
    default: break
    }
  case .object(let object):
    if let member = try object.attribute(text) { return member }
    if object is NamespaceObject { return text.string == "__class__" ? unsafe(value, text) : nil }
  case .undefined(let info):
    if text.string.hasPrefix("__") && text.string.hasSuffix("__") { return nil }
    throw info.fault
  case .none, .missing: break
  }
  return isDunder(text.string) ? unsafe(value, text) : nil
}

/// `value.name` in a template.
func attributeOrItem(_ value: Value, _ name: AttributeName) throws -> Value {
  if let member = try attribute(value, name) { return member }
  if case .undefined(let info) = value { throw info.fault }
  if case .dict(let box) = value, let member = box[name.text] { return member }
  return undefinedMember(value, .string(name.text))
}

/// `value[key]` in a template.
func itemOrAttribute(_ value: Value, _ key: Value) throws -> Value {
  switch value {
  case .dict(let box):
    if isHashable(key), let member = box.lookup(key) { return member }
  case .list(let box), .tuple(let box):
    if let position = integer(key) {
      let index = position < 0 ? position + box.items.count : position
      if box.items.indices.contains(index) { return box.items[index] }
    }
  case .string(let text):
    if let position = integer(key) {
      if text.isASCII {
        let index = position < 0 ? position + text.bytes.count : position
        if text.bytes.indices.contains(index) {
          return .string(Text(bytes: [text.bytes[index]], isMarkup: text.isMarkup))
        }
      } else {
        let scalars = text.scalars
        let index = position < 0 ? position + scalars.count : position
        if scalars.indices.contains(index) {
          return .string(Text(scalars: [scalars[index]], isMarkup: text.isMarkup))
        }
      }
    }
  case .object(let object):
    if let range = object as? RangeObject, let position = integer(key) {
      let index = position < 0 ? position + range.count : position
      if index >= 0 && index < range.count { return .int(range.element(index)) }
    }
  case .undefined(let info): throw info.fault
  default: break
  }
  if case .string(let name) = key, let member = try attribute(value, AttributeName(name)) { return member }
  return undefinedMember(value, key)
}

private func isHashable(_ value: Value) -> Bool { (try? checkHashable(value)) != nil }

/// `value[start:stop:step]`.
func slice(_ machine: Machine, _ value: Value, _ start: Value, _ stop: Value, _ step: Value) throws -> Value {
  if case .undefined(let info) = value { throw info.fault }
  let count: Int
  switch value {
  case .string(let text): count = text.count
  case .list(let box), .tuple(let box): count = box.items.count
  case .object(let object as RangeObject): count = object.count
  case .dict: throw TemplateFault.type("unhashable type: 'slice'")
  default: throw TemplateFault.type("'\(typeName(value))' object is not subscriptable")
  }
  func bound(_ value: Value) throws -> Int? {
    switch value {
    case .none: return nil
    default:
      guard let integer = integer(value) else {
        throw TemplateFault.type("slice indices must be integers or None or have an __index__ method")
      }
      return integer
    }
  }
  let step = try bound(step) ?? 1
  if step == 0 { throw TemplateFault.value("slice step cannot be zero") }
  let (startValue, stopValue) = (try bound(start), try bound(stop))
  func clamp(_ value: Int, _ low: Int, _ high: Int) -> Int {
    let absolute = value < 0 ? (value < -count ? -1 : value + count) : value
    return min(max(absolute, low), high)
  }
  let indices: (first: Int, last: Int)
  if step > 0 {
    indices = (startValue.map { clamp($0, 0, count) } ?? 0, stopValue.map { clamp($0, 0, count) } ?? count)
  } else {
    indices = (
      startValue.map { clamp($0, -1, count - 1) } ?? count - 1, stopValue.map { clamp($0, -1, count - 1) } ?? -1
    )
  }
  var positions: [Int] = []
  var position = indices.first
  while step > 0 ? position < indices.last : position > indices.last {
    positions.append(position)
    let (next, overflow) = position.addingReportingOverflow(step)
    if overflow { break }
    position = next
  }
  try machine.charge(positions.count)
  switch value {
  case .string(let text):
    if text.isASCII {
      return .string(Text(bytes: positions.map { text.bytes[$0] }, isMarkup: text.isMarkup))
    }
    let scalars = text.scalars
    return .string(Text(scalars: positions.map { scalars[$0] }, isMarkup: text.isMarkup))
  case .list(let box): return .list(positions.map { box.items[$0] })
  case .tuple(let box): return .tuple(positions.map { box.items[$0] })
  case .object(let object as RangeObject):
    return .object(
      RangeObject(
        object.element(indices.first), object.element(indices.last), object.step &* step))
  default: return .none
  }
}

// MARK: str and repr

/// `str(value)`.
func pythonString(_ value: Value) -> Text {
  switch value {
  case .missing, .undefined: .empty
  case .none: Text("None")
  case .bool(let bool): Text(bool ? "True" : "False")
  case .int(let int): Text(String(int))
  case .double(let double): Text(pythonFloat(double))
  case .string(let text): text.plain
  default: Text(repr(value))
  }
}

/// `repr(value)`.
func repr(_ value: Value, _ depth: Int = 0) -> String {
  if depth > 600 { return "..." }
  switch value {
  case .missing, .undefined: return "Undefined"
  case .none: return "None"
  case .bool(let bool): return bool ? "True" : "False"
  case .int(let int): return String(int)
  case .double(let double): return pythonFloat(double)
  case .string(let text): return text.isMarkup ? "Markup(\(repr(text)))" : repr(text)
  case .list(let box): return "[" + box.items.map { repr($0, depth + 1) }.joined(separator: ", ") + "]"
  case .tuple(let box):
    if box.items.count == 1 { return "(" + repr(box.items[0], depth + 1) + ",)" }
    return "(" + box.items.map { repr($0, depth + 1) }.joined(separator: ", ") + ")"
  case .dict(let box):
    let pairs = zip(box.keys, box.values).map { "\(repr($0, depth + 1)): \(repr($1, depth + 1))" }
    return "{" + pairs.joined(separator: ", ") + "}"
  case .object(let object): return object.repr(depth)
  }
}

/// `repr` of a string.
func repr(_ text: Text) -> String {
  let hasSingle = text.bytes.contains(UInt8(ascii: "'"))
  let hasDouble = text.bytes.contains(UInt8(ascii: "\""))
  let quote: Unicode.Scalar = hasSingle && !hasDouble ? "\"" : "'"
  var result = String.UnicodeScalarView()
  result.append(quote)
  func append(_ string: String) { result.append(contentsOf: string.unicodeScalars) }
  for scalar in text.scalars {
    switch scalar {
    case "\\": append("\\\\")
    case "\n": append("\\n")
    case "\r": append("\\r")
    case "\t": append("\\t")
    case quote:
      append("\\")
      result.append(quote)
    default:
      if isPythonPrintable(scalar) {
        result.append(scalar)
      } else {
        let (letter, width) = scalar.value < 0x100 ? ("x", 2) : scalar.value < 0x10000 ? ("u", 4) : ("U", 8)
        let digits = String(scalar.value, radix: 16)
        append("\\\(letter)\(String(repeating: "0", count: width - digits.count))\(digits)")
      }
    }
  }
  result.append(quote)
  return String(result)
}

/// `repr` of a key in the message of an undefined element; types have no literal form.
func reprOrType(_ value: Value) -> String { repr(value) }

/// `repr` of a float: the shortest digits that read back as the same number, in Python's layout.
func pythonFloat(_ value: Double) -> String {
  if value.isNaN { return "nan" }
  if value.isInfinite { return value < 0 ? "-inf" : "inf" }
  if value == 0 { return value.sign == .minus ? "-0.0" : "0.0" }
  let (digits, exponent) = shortestDigits(value.magnitude)
  let sign = value < 0 ? "-" : ""
  // `exponent` is the decimal exponent of the first digit.
  if exponent < -4 || exponent >= 16 {
    let fraction = digits.dropFirst()
    let magnitude = exponent.magnitude
    return sign + String(digits.first!) + (fraction.isEmpty ? "" : "." + fraction)
      + (exponent < 0 ? "e-" : "e+") + (magnitude < 10 ? "0" : "") + String(magnitude)
  }
  if exponent < 0 { return sign + "0." + String(repeating: "0", count: -exponent - 1) + digits }
  if digits.count <= exponent + 1 {
    return sign + digits + String(repeating: "0", count: exponent + 1 - digits.count) + ".0"
  }
  return sign + digits.prefix(exponent + 1) + "." + digits.dropFirst(exponent + 1)
}

/// The shortest decimal digits of a positive number, without trailing zeros, and the exponent of the first.
private func shortestDigits(_ value: Double) -> (digits: String, exponent: Int) {
  var mantissa = "\(value)"
  var exponent = 0
  if let e = mantissa.firstIndex(where: { $0 == "e" || $0 == "E" }) {
    exponent = Int(mantissa[mantissa.index(after: e)...]) ?? 0
    mantissa = String(mantissa[..<e])
  }
  var whole = mantissa
  var fraction = ""
  if let dot = mantissa.firstIndex(of: ".") {
    whole = String(mantissa[..<dot])
    fraction = String(mantissa[mantissa.index(after: dot)...])
  }
  var digits = whole + fraction
  exponent += whole.count - 1
  while digits.hasPrefix("0") && digits.count > 1 {
    digits.removeFirst()
    exponent -= 1
  }
  while digits.hasSuffix("0") && digits.count > 1 { digits.removeLast() }
  return (digits, exponent)
}
