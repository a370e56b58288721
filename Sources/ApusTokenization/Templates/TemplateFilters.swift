import Glibc

typealias Filter = @Sendable (Machine, Value, CallArguments) throws -> Value
typealias Test = @Sendable (Machine, Value, CallArguments) throws -> Bool

/// `str(value)`, but markup stays markup.
private func softText(_ value: Value) -> Text {
  if case .string(let text) = value { return text }
  return pythonString(value)
}

private func isNone(_ value: Value?) -> Bool {
  switch value {
  case nil, .some(.none): true
  default: false
  }
}

private func index(_ value: Value?, _ otherwise: Int) throws -> Int {
  guard let value else { return otherwise }
  guard let integer = integer(value) else {
    if case .undefined(let info) = value { throw info.fault }
    throw TemplateFault.type("'\(typeName(value))' object cannot be interpreted as an integer")
  }
  return integer
}

/// Strings in lower case, for comparisons without regard to case.
private func ignoringCase(_ value: Value) -> Value {
  if case .string(let text) = value { return .string(text.lowercased()) }
  return value
}

/// The parts of an attribute path such as `function.name` or `0`.
private func path(_ attribute: Value) -> [Value] {
  switch attribute {
  case .none: return []
  case .string(let text):
    return text.split(Text("."), limit: -1).map { part in
      !part.isEmpty && part.scalars.allSatisfy(isPythonDigit)
        ? Int(part.string).map { .int($0) } ?? .string(part)
        : .string(part)
    }
  default: return [attribute]
  }
}

/// Follows an attribute path; `otherwise` stands in for what is undefined.
private func follow(_ path: [Value], _ value: Value, otherwise: Value? = nil) throws -> Value {
  var value = value
  for part in path {
    value = try itemOrAttribute(value, part)
    if case .undefined = value, let otherwise, !isNone(otherwise) { value = otherwise }
  }
  return value
}

/// A generator over the items of a sequence.
private func lazily(
  _ machine: Machine, _ value: Value, _ transform: @escaping (Value) throws -> Value?
) -> Value {
  var iterator: ValueIterator?
  return .object(
    GeneratorObject {
      if iterator == nil { iterator = try ValueIterator(value) }
      while let item = try iterator!.next() {
        try machine.charge(1)
        if let result = try transform(item) { return result }
      }
      return nil
    })
}

/// `select`, `reject` and their forms for attributes.
private func selection(_ name: String, keeps: Bool, byAttribute: Bool) -> Filter {
  return { machine, value, arguments in
    var predicate: ((Value) throws -> Bool)?
    var iterator: ValueIterator?
    return .object(
      GeneratorObject {
        // Nothing is looked at, the arguments included, before the first item is asked for, and only if there are any.
        if predicate == nil {
          guard isTruthy(value) else { return nil }
          var positional = arguments.positional
          var attribute: [Value]?
          if byAttribute {
            guard !positional.isEmpty else {
              throw TemplateFault.argument("Missing parameter for attribute name")
            }
            attribute = path(positional.removeFirst())
          }
          if let testName = positional.first {
            positional.removeFirst()
            let rest = CallArguments(positional: positional, keywords: arguments.keywords)
            guard case .string(let text) = testName, let test = tests[text.string] else {
              throw unknown("test", testName)
            }
            predicate = { item in try test(machine, try attribute.map { try follow($0, item) } ?? item, rest) }
          } else {
            predicate = { item in isTruthy(try attribute.map { try follow($0, item) } ?? item) }
          }
          iterator = try ValueIterator(value)
        }
        while let item = try iterator!.next() {
          try machine.charge(1)
          if try predicate!(item) == keeps { return item }
        }
        return nil
      })
  }
}

private func unknown(_ kind: String, _ name: Value) -> TemplateFault {
  var message = "No \(kind) named \(repr(name))."
  if case .undefined(let info) = name {
    message += " (\(info.fault.message); did you forget to quote the callable name?)"
  }
  return .runtime(message)
}

private func extremum(_ name: String, _ ordering: Ordering) -> Filter {
  return { machine, value, arguments in
    let bound = try arguments.bind("do_\(name)", ["case_sensitive", "attribute"])
    let isCaseSensitive = bound[0].map(isTruthy) ?? false
    let attribute = path(bound[1] ?? .none)
    func key(_ item: Value) throws -> Value {
      let value = try follow(attribute, item)
      return isCaseSensitive ? value : ignoringCase(value)
    }
    var iterator = try ValueIterator(value)
    guard var best = try iterator.next() else {
      return .undefined(UndefinedInfo(.hint("No aggregated item, sequence was empty.")))
    }
    var bestKey = try key(best)
    while let item = try iterator.next() {
      try machine.charge(1)
      let itemKey = try key(item)
      if try pythonCompare(itemKey, bestKey, ordering) { (best, bestKey) = (item, itemKey) }
    }
    return best
  }
}

private func join(_ machine: Machine, _ items: [Value], _ separator: Value) throws -> Value {
  .string(try join(machine, items.map { pythonString($0) }, pythonString(separator)))
}

/// Python's `int(text, base)`, or `nil` where it raises.
private func parseInteger(_ text: Text, base: Int) throws -> Int? {
  var scalars = text.stripped().scalars[...]
  var isNegative = false
  if let first = scalars.first, first == "+" || first == "-" {
    isNegative = first == "-"
    scalars = scalars.dropFirst()
  }
  var base = base
  func dropPrefix(_ letters: String) -> Bool {
    guard scalars.count > 1, scalars.first == "0", letters.unicodeScalars.contains(scalars.dropFirst().first!) else {
      return false
    }
    scalars = scalars.dropFirst(2)
    if scalars.first == "_" { scalars = scalars.dropFirst() }
    return true
  }
  switch base {
  case 0:
    if dropPrefix("xX") {
      base = 16
    } else if dropPrefix("oO") {
      base = 8
    } else if dropPrefix("bB") {
      base = 2
    } else {
      base = 10
      if scalars.first == "0", scalars.contains(where: { $0 != "0" && $0 != "_" }) { return nil }
    }
  case 16: _ = dropPrefix("xX")
  case 8: _ = dropPrefix("oO")
  case 2: _ = dropPrefix("bB")
  case 3...36: break
  default: return nil
  }
  var result = 0
  var previousIsDigit = false
  guard !scalars.isEmpty else { return nil }
  for scalar in scalars {
    if scalar == "_" {
      guard previousIsDigit else { return nil }
      previousIsDigit = false
      continue
    }
    var digit: Int
    switch scalar {
    case "0"..."9": digit = Int(scalar.value) - 0x30
    case "a"..."z": digit = Int(scalar.value) - 0x57
    case "A"..."Z": digit = Int(scalar.value) - 0x37
    default:
      guard isPythonDecimal(scalar), let value = scalar.properties.numericValue else { return nil }
      digit = Int(value)
    }
    guard digit < base else { return nil }
    previousIsDigit = true
    let (product, overflow) = result.multipliedReportingOverflow(by: base)
    let (sum, carry) = product.addingReportingOverflow(isNegative ? -digit : digit)
    if overflow || carry { throw TemplateFault.bigInteger }
    result = sum
  }
  return previousIsDigit ? result : nil
}

/// Python's `float(text)`, or `nil` where it raises.
private func parseFloat(_ text: Text) -> Double? {
  var characters: [UInt8] = []
  var previousIsDigit = false
  let scalars = text.stripped().scalars
  for (position, scalar) in scalars.enumerated() {
    if scalar == "_" {
      guard previousIsDigit, position + 1 < scalars.count, isPythonDecimal(scalars[position + 1]) else { return nil }
      previousIsDigit = false
      continue
    }
    if isPythonDecimal(scalar), let value = scalar.properties.numericValue {
      characters.append(0x30 + UInt8(value))
      previousIsDigit = true
    } else {
      guard scalar.isASCII else { return nil }
      characters.append(UInt8(scalar.value))
      previousIsDigit = false
    }
  }
  let string = String(decoding: characters, as: UTF8.self).lowercased()
  switch string {
  case "inf", "+inf", "infinity", "+infinity": return .infinity
  case "-inf", "-infinity": return -.infinity
  case "nan", "+nan", "-nan": return .nan
  default:
    // Swift also reads hexadecimal floats, which Python does not.
    guard string.allSatisfy({ "0123456789+-.e".contains($0) }) else { return nil }
    // Python reads ".5" and "5."; Swift reads neither.
    var repaired = string
    if let dot = repaired.firstIndex(of: ".") {
      let before = dot == repaired.startIndex ? false : repaired[repaired.index(before: dot)].isNumber
      let next = repaired.index(after: dot)
      let after = next < repaired.endIndex && repaired[next].isNumber
      guard before || after else { return nil }
      if !after { repaired.insert("0", at: next) }
      if !before { repaired.insert("0", at: dot) }
    }
    return Double(repaired)
  }
}

/// Python's `int(value)` for numbers.
private func truncated(_ double: Double) throws -> Int {
  if let value = Int(exactly: double.rounded(.towardZero)) { return value }
  throw TemplateFault.bigInteger
}

private func quoted(_ value: Value, forQuery: Bool) -> [UInt8] {
  var result: [UInt8] = []
  for byte in pythonString(value).bytes {
    switch byte {
    case UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "a")...UInt8(ascii: "z"),
      UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "_"), UInt8(ascii: "."), UInt8(ascii: "-"),
      UInt8(ascii: "~"):
      result.append(byte)
    case UInt8(ascii: "/") where !forQuery: result.append(byte)
    case UInt8(ascii: " ") where forQuery: result.append(UInt8(ascii: "+"))
    default:
      let digits = Array("0123456789ABCDEF".utf8)
      result.append(contentsOf: [UInt8(ascii: "%"), digits[Int(byte >> 4)], digits[Int(byte & 15)]])
    }
  }
  return result
}

private func refuse(_ name: String, _ reason: String) -> Filter {
  return { _, _, _ in throw TemplateFault.unsupported("The filter '\(name)' is not supported: \(reason)") }
}

private func lengthFilter(_ machine: Machine, _ value: Value, _ arguments: CallArguments) throws -> Value {
  .int(try pythonLength(value))
}

private func defaultFilter(_ machine: Machine, _ value: Value, _ arguments: CallArguments) throws -> Value {
  let bound = try arguments.bind("do_default", ["default_value", "boolean"])
  if case .undefined = value { return bound[0] ?? .string(.empty) }
  if let boolean = bound[1], isTruthy(boolean), !isTruthy(value) { return bound[0] ?? .string(.empty) }
  return value
}

private func escapeFilter(_ machine: Machine, _ value: Value, _ arguments: CallArguments) throws -> Value {
  .string(softText(value).escapedForHTML())
}

/// The filters, by name.
let filters: [String: Filter] = [
  "abs": { _, value, _ in
    switch number(value) {
    case .int(let int): return .int(try int == .min ? { throw TemplateFault.bigInteger }() : abs(int))
    case .double(let double): return .double(abs(double))
    case nil: throw TemplateFault.type("bad operand type for abs(): '\(typeName(value))'")
    }
  },
  "attr": { _, value, arguments in
    let bound = try arguments.bind("do_attr", ["name"], required: 1)
    guard case .string(let name) = bound[0]! else {
      throw TemplateFault.type("attribute name must be string, not '\(typeName(bound[0]!))'")
    }
    if case .undefined(let info) = value { throw info.fault }
    if case .dict = value, try attribute(value, AttributeName(name)) == nil {
      return .undefined(UndefinedInfo(.member(of: "dict", isBuiltin: true, key: .string(name))))
    }
    return try attributeOrItem(value, AttributeName(name))
  },
  "batch": { machine, value, arguments in
    let bound = try arguments.bind("do_batch", ["linecount", "fill_with"], required: 1)
    let count = integer(bound[0]!)
    let fill = bound[1]
    var iterator: ValueIterator?
    var isDone = false
    return .object(
      GeneratorObject {
        if isDone { return nil }
        if iterator == nil { iterator = try ValueIterator(value) }
        var row: [Value] = []
        // A row that is full is handed out when the next item comes, so that a count of zero gives one empty row.
        while let item = try iterator!.next() {
          try machine.charge(1)
          row.append(item)
          if row.count == count { return .list(row) }
        }
        isDone = true
        if row.isEmpty { return nil }
        if let fill, !isNone(fill) {
          guard let count else {
            throw TemplateFault.type("'<' not supported between instances of 'int' and '\(typeName(bound[0]!))'")
          }
          try machine.charge(max(0, count &- row.count))
          while row.count < count { row.append(fill) }
        }
        return .list(row)
      })
  },
  "capitalize": { _, value, _ in .string(softText(value).capitalized()) },
  "center": { machine, value, arguments in
    let bound = try arguments.bind("do_center", ["width"])
    return .string(try pad(machine, softText(value), to: try index(bound[0], 80), with: Text(" "), .center))
  },
  "count": lengthFilter,
  "d": defaultFilter,
  "default": defaultFilter,
  "dictsort": { _, value, arguments in
    let bound = try arguments.bind("do_dictsort", ["case_sensitive", "by", "reverse"])
    let isCaseSensitive = bound[0].map(isTruthy) ?? false
    var position = 0
    switch bound[1] {
    case nil: break
    case .string(let text)? where text == Text("key"): break
    case .string(let text)? where text == Text("value"): position = 1
    default: throw TemplateFault.argument("You can only sort by either \"key\" or \"value\"")
    }
    guard case .dict(let box) = value else {
      if case .undefined(let info) = value { throw info.fault }
      throw TemplateFault.attribute("'\(typeName(value))' object has no attribute 'items'")
    }
    let keys = (position == 0 ? box.keys : box.values).map { isCaseSensitive ? $0 : ignoringCase($0) }
    return .list(
      try sorted(Array(0..<box.count), by: keys, reverse: bound[2].map(isTruthy) ?? false)
        .map { .tuple([box.keys[$0], box.values[$0]]) })
  },
  "e": escapeFilter,
  "escape": escapeFilter,
  "filesizeformat": { _, value, arguments in
    let bound = try arguments.bind("do_filesizeformat", ["binary"])
    let isBinary = bound[0].map(isTruthy) ?? false
    var size: Double
    switch number(value) {
    case .int(let int): size = Double(int)
    case .double(let double): size = double
    case nil:
      guard case .string(let text) = value else {
        if case .undefined(let info) = value { throw info.fault }
        throw TemplateFault.type(
          "float() argument must be a string or a real number, not '\(typeName(value))'")
      }
      guard let parsed = parseFloat(text) else {
        throw TemplateFault.value("could not convert string to float: \(repr(text))")
      }
      size = parsed
    }
    let base: Double = isBinary ? 1024 : 1000
    if size == 1 { return .string("1 Byte") }
    if size < base { return .string("\(try truncated(size)) Bytes") }
    var unit = base
    let names = ["k", "M", "G", "T", "P", "E", "Z", "Y"]
    for (position, name) in names.enumerated() {
      unit *= base
      if size < unit || position == names.count - 1 {
        let prefix = isBinary ? name.uppercased() + "i" : name
        return .string("\(printedFloat(base * size / unit, precision: 1, conversion: "f")) \(prefix)B")
      }
    }
    return .none
  },
  "first": { _, value, _ in
    var iterator = try ValueIterator(value)
    return try iterator.next() ?? .undefined(UndefinedInfo(.hint("No first item, sequence was empty.")))
  },
  "float": { _, value, arguments in
    let bound = try arguments.bind("do_float", ["default"])
    switch value {
    case .undefined(let info): throw info.fault
    case .string(let text):
      if let parsed = parseFloat(text) { return .double(parsed) }
    default:
      switch number(value) {
      case .int(let int): return .double(Double(int))
      case .double(let double): return .double(double)
      case nil: break
      }
    }
    return bound[0] ?? .double(0)
  },
  "forceescape": { _, value, _ in .string(pythonString(value).escapedForHTML()) },
  "format": { machine, value, arguments in
    if !arguments.positional.isEmpty && !arguments.keywords.isEmpty {
      throw TemplateFault.argument("can't handle positional and keyword arguments at the same time")
    }
    let text = softText(value)
    if !arguments.keywords.isEmpty {
      let box = DictBox(
        uniqueKeys: arguments.keywords.map { .string($0.name) }, values: arguments.keywords.map(\.value))
      return .string(try percentFormat(machine, text, .dict(box)))
    }
    return .string(try percentFormat(machine, text, .tuple(arguments.positional)))
  },
  "groupby": { machine, value, arguments in
    let bound = try arguments.bind("do_groupby", ["attribute", "default", "case_sensitive"], required: 1)
    let attribute = path(bound[0]!)
    let isCaseSensitive = bound[2].map(isTruthy) ?? false
    let items = try pythonList(machine, value)
    let exact = try items.map { try follow(attribute, $0, otherwise: bound[1]) }
    let keys = isCaseSensitive ? exact : exact.map(ignoringCase)
    var groups: [Value] = []
    var members: [Int] = []
    func flush() {
      guard let first = members.first else { return }
      let pair = ListBox([exact[first], .list(members.map { items[$0] })], isGroup: true)
      groups.append(.tuple(pair))
      members = []
    }
    try machine.charge(items.count * 8)
    for position in try sorted(Array(items.indices), by: keys, reverse: false) {
      if let first = members.first, !pythonEqual(keys[first], keys[position]) { flush() }
      members.append(position)
    }
    flush()
    return .list(groups)
  },
  "indent": { machine, value, arguments in
    let bound = try arguments.bind("do_indent", ["width", "first", "blank"])
    guard case .string(let text) = value else {
      if case .undefined(let info) = value { throw info.fault }
      if case .list = value { throw TemplateFault.attribute("'list' object has no attribute 'splitlines'") }
      if case .tuple = value { _ = try add(machine, value, .string(Text("\n"))) }
      throw TemplateFault.type("unsupported operand type(s) for +=: '\(typeName(value))' and 'str'")
    }
    let indentation: Text
    if case .string(let width)? = bound[0] {
      indentation = width
    } else {
      let width = try indexForRepeat(bound[0], 4)
      try machine.chargeBytes(max(0, width))
      indentation = Text(bytes: [UInt8](repeating: 0x20, count: max(0, width)))
    }
    let indentsBlank = bound[2].map(isTruthy) ?? false
    var bytes = text.bytes
    bytes.append(0x0A)
    let lines = Text(bytes: bytes).lines()
    try machine.chargeBytes(text.bytes.count + lines.count * indentation.bytes.count)
    var result: [UInt8] = []
    if bound[1].map(isTruthy) ?? false { result.append(contentsOf: indentation.bytes) }
    for (position, line) in lines.enumerated() {
      if position > 0 {
        result.append(0x0A)
        if indentsBlank || !line.isEmpty { result.append(contentsOf: indentation.bytes) }
      }
      result.append(contentsOf: line.bytes)
    }
    return .string(Text(bytes: result, isMarkup: text.isMarkup))
  },
  "int": { _, value, arguments in
    let bound = try arguments.bind("do_int", ["default", "base"])
    switch value {
    case .undefined(let info): throw info.fault
    case .string(let text):
      if let parsed = try parseInteger(text, base: try index(bound[1], 10)) { return .int(parsed) }
      if let parsed = parseFloat(text), parsed.isFinite { return .int(try truncated(parsed)) }
    case .double(let double):
      if double.isFinite { return .int(try truncated(double)) }
      if double.isInfinite { throw TemplateFault.overflow("cannot convert float infinity to integer") }
    default:
      if let integer = integer(value) { return .int(integer) }
    }
    return bound[0] ?? .int(0)
  },
  "items": { _, value, _ in
    // The reference's filter is a generator, so that a wrong operand is noticed when it is read.
    var position = 0
    return .object(
      GeneratorObject {
        switch value {
        case .undefined: return nil
        case .dict(let box):
          guard position < box.count else { return nil }
          defer { position += 1 }
          return .tuple([box.keys[position], box.values[position]])
        default: throw TemplateFault.type("Can only get item pairs from a mapping.")
        }
      })
  },
  "join": { machine, value, arguments in
    let bound = try arguments.bind("do_join", ["d", "attribute"])
    var items = try pythonList(machine, value)
    if let attribute = bound[1], !isNone(attribute) {
      let path = path(attribute)
      items = try items.map { try follow(path, $0) }
    }
    return try join(machine, items, bound[0] ?? .string(.empty))
  },
  "last": { _, value, _ in
    let items: [Value]
    switch value {
    case .list(let box), .tuple(let box): items = box.items
    case .dict(let box): items = box.keys
    case .string(let text): items = text.characters.map { .string($0.plain) }
    case .undefined: items = []
    case .object(let object as RangeObject):
      items = object.count > 0 ? [.int(object.element(object.count - 1))] : []
    case .object(let object as DictViewObject): items = object.items
    default: throw TemplateFault.type("'\(typeName(value))' object is not reversible")
    }
    return items.last ?? .undefined(UndefinedInfo(.hint("No last item, sequence was empty.")))
  },
  "length": lengthFilter,
  "list": { machine, value, _ in .list(try pythonList(machine, value)) },
  "lower": { machine, value, _ in
    let text = softText(value)
    try machine.charge(text.bytes.count >> 5)
    return .string(text.lowercased())
  },
  "map": { machine, value, arguments in
    // As with `select`, the arguments are looked at when the first item is asked for.
    var transform: ((Value) throws -> Value)?
    var iterator: ValueIterator?
    return .object(
      GeneratorObject {
        if transform == nil {
          guard isTruthy(value) else { return nil }
          if arguments.positional.isEmpty, let attribute = arguments.keyword("attribute") {
            if let other = arguments.keywords.first(where: {
              $0.name != Text("attribute") && $0.name != Text("default")
            }) {
              throw TemplateFault.argument("Unexpected keyword argument \(repr(other.name))")
            }
            let path = path(attribute)
            let otherwise = arguments.keyword("default")
            transform = { try follow(path, $0, otherwise: otherwise) }
          } else {
            guard let name = arguments.positional.first else {
              throw TemplateFault.argument("map requires a filter argument")
            }
            guard case .string(let text) = name, let filter = filters[text.string] else {
              throw unknown("filter", name)
            }
            let rest = CallArguments(
              positional: Array(arguments.positional.dropFirst()), keywords: arguments.keywords)
            transform = { try filter(machine, $0, rest) }
          }
          iterator = try ValueIterator(value)
        }
        guard let item = try iterator!.next() else { return nil }
        try machine.charge(1)
        return try transform!(item)
      })
  },
  "max": extremum("max", .greater),
  "min": extremum("min", .less),
  "pprint": refuse("pprint", "its layout belongs to debugging"),
  "random": refuse("random", "a prompt must not depend on chance"),
  "reject": selection("reject", keeps: false, byAttribute: false),
  "rejectattr": selection("rejectattr", keeps: false, byAttribute: true),
  "replace": { machine, value, arguments in
    let bound = try arguments.bind("do_replace", ["old", "new", "count"], required: 2)
    let limit = isNone(bound[2]) ? -1 : try index(bound[2], -1)
    return .string(
      try replace(machine, pythonString(value), pythonString(bound[0]!), pythonString(bound[1]!), limit))
  },
  "reverse": { machine, value, _ in
    switch value {
    case .string(let text):
      return .string(Text(scalars: text.scalars.reversed(), isMarkup: text.isMarkup))
    case .object(let object) where object is GeneratorObject:
      return .list(try pythonList(machine, value).reversed())
    default:
      let items: [Value]
      do {
        items = try pythonList(machine, value)
      } catch let fault as TemplateFault where fault.kind == "TypeError" {
        throw TemplateFault.argument("argument must be iterable")
      }
      var position = items.count
      let name =
        switch value {
        case .list: "list_reverseiterator"
        case .dict: "dict_reversekeyiterator"
        default: "reversed"
        }
      return .object(
        GeneratorObject(name) {
          guard position > 0 else { return nil }
          position -= 1
          return items[position]
        })
    }
  },
  "round": { _, value, arguments in
    let bound = try arguments.bind("do_round", ["precision", "method"])
    var method = "common"
    if let chosen = bound[1] {
      guard case .string(let text) = chosen, ["common", "ceil", "floor"].contains(text.string) else {
        throw TemplateFault.argument("method must be common, ceil or floor")
      }
      method = text.string
    }
    guard let number = number(value) else {
      if method == "common" {
        throw TemplateFault.type("type \(typeName(value)) doesn't define __round__ method")
      }
      _ = try arithmetic(
        Machine(slotCount: 0, context: [], limits: .init(), clock: { .init() }), .multiply, value, .int(1))
      throw TemplateFault.type("must be real number, not \(typeName(value))")
    }
    let precision = try index(bound[0], 0)
    if method == "common" {
      switch number {
      case .double(let double): return .double(pythonRound(double, precision))
      case .int(let int):
        if precision >= 0 { return .int(int) }
        if precision < -18 { return .int(0) }
        let power = (0..<(-precision)).reduce(1) { product, _ in product * 10 }
        let quotient = int / power
        let remainder = (int % power).magnitude
        let isUp = remainder * 2 > power.magnitude || (remainder * 2 == power.magnitude && quotient % 2 != 0)
        return .int((quotient + (isUp ? (int < 0 ? -1 : 1) : 0)) * power)
      }
    }
    let factor = pow(10, Double(precision))
    let double: Double =
      switch number {
      case .int(let int): Double(int)
      case .double(let double): double
      }
    let scaled = double * factor
    return .double((method == "ceil" ? scaled.rounded(.up) : scaled.rounded(.down)) / factor)
  },
  "safe": { _, value, _ in .string(Text(bytes: pythonString(value).bytes, isMarkup: true)) },
  "select": selection("select", keeps: true, byAttribute: false),
  "selectattr": selection("selectattr", keeps: true, byAttribute: true),
  "slice": { machine, value, arguments in
    let bound = try arguments.bind("do_slice", ["slices", "fill_with"], required: 1)
    var rows: [Value]?
    var position = 0
    return .object(
      GeneratorObject {
        if rows == nil {
          let items = try pythonList(machine, value)
          let slices = try index(bound[0], 0)
          if slices == 0 { throw TemplateFault.zeroDivision("integer division or modulo by zero") }
          try machine.charge(max(0, slices))
          var made: [Value] = []
          if slices > 0 {
            let (base, extra) = (items.count / slices, items.count % slices)
            var start = 0
            for number in 0..<slices {
              let end = start + base + (number < extra ? 1 : 0)
              var row = Array(items[start..<end])
              if let fill = bound[1], !isNone(fill), number >= extra { row.append(fill) }
              made.append(.list(row))
              start = end
            }
          }
          rows = made
        }
        guard position < rows!.count else { return nil }
        defer { position += 1 }
        return rows![position]
      })
  },
  "sort": { machine, value, arguments in
    let bound = try arguments.bind("do_sort", ["reverse", "case_sensitive", "attribute"])
    let isCaseSensitive = bound[1].map(isTruthy) ?? false
    var paths: [[Value]] = [[]]
    switch bound[2] {
    case .string(let text)?: paths = text.split(Text(","), limit: -1).map { path(.string($0)) }
    case let attribute?: paths = [path(attribute)]
    case nil: break
    }
    let items = try pythonList(machine, value)
    try machine.charge(items.count * 8)
    let keys = try items.map { item in
      Value.list(
        try paths.map {
          let value = try follow($0, item)
          return isCaseSensitive ? value : ignoringCase(value)
        })
    }
    return .list(
      try sorted(Array(items.indices), by: keys, reverse: bound[0].map(isTruthy) ?? false).map { items[$0] })
  },
  "string": { _, value, _ in .string(softText(value)) },
  "striptags": { _, value, _ in .string(try stripTags(pythonString(value))) },
  "sum": { machine, value, arguments in
    let bound = try arguments.bind("do_sum", ["attribute", "start"])
    var total = bound[1] ?? .int(0)
    let path = isNone(bound[0]) ? nil : path(bound[0]!)
    var iterator = try ValueIterator(value)
    if case .string = total {
      throw TemplateFault.type("sum() can't sum strings [use ''.join(seq) instead]")
    }
    while let item = try iterator.next() {
      total = try add(machine, total, try path.map { try follow($0, item) } ?? item)
    }
    return total
  },
  "title": { _, value, _ in
    // Words begin after white space, hyphens and opening brackets; within a word all is lower case.
    var result: [UInt8] = []
    var word: [Unicode.Scalar] = []
    func flush() {
      guard let first = word.first else { return }
      result.append(contentsOf: first.properties.uppercaseMapping.utf8)
      result.append(contentsOf: Text(scalars: word.dropFirst()).lowercased().bytes)
      word = []
    }
    for scalar in softText(value).scalars {
      if isPythonSpace(scalar) || "-({[<".unicodeScalars.contains(scalar) {
        flush()
        result.append(contentsOf: scalar.properties.lowercaseMapping.utf8)
      } else {
        word.append(scalar)
      }
    }
    flush()
    return .string(Text(bytes: result))
  },
  "tojson": { machine, value, arguments in
    let bound = try arguments.bind("tojson", ["ensure_ascii", "indent", "separators", "sort_keys"])
    var indent: Text?
    if let chosen = bound[1], !isNone(chosen) {
      if case .string(let text) = chosen {
        indent = text
      } else {
        let width = try indexForRepeat(chosen, 0)
        try machine.chargeBytes(max(0, width))
        indent = Text(bytes: [UInt8](repeating: 0x20, count: max(0, width)))
      }
    }
    var separators: (item: Text, key: Text)?
    if let chosen = bound[2], !isNone(chosen) {
      let parts = try pythonList(machine, chosen)
      guard parts.count == 2, case .string(let item) = parts[0], case .string(let key) = parts[1] else {
        throw TemplateFault.type("separators must be a pair of strings")
      }
      separators = (item, key)
    }
    var encoder = PythonJSONEncoder(
      machine, ensuresASCII: bound[0].map(isTruthy) ?? false, indent: indent, separators: separators,
      sortsKeys: bound[3].map(isTruthy) ?? false)
    try encoder.write(value)
    try machine.chargeBytes(encoder.output.count)
    return .string(Text(bytes: encoder.output))
  },
  "trim": { _, value, arguments in
    let bound = try arguments.bind("do_trim", ["chars"])
    switch bound[0] {
    case nil, .some(.none): return .string(softText(value).stripped())
    case .string(let characters)?: return .string(softText(value).stripped(characters))
    default: throw TemplateFault.type("strip arg must be None or str")
    }
  },
  "truncate": { _, value, arguments in
    let bound = try arguments.bind("do_truncate", ["length", "killwords", "end", "leeway"])
    let length = try index(bound[0], 255)
    guard case .string(let end) = bound[2] ?? .string("...") else {
      throw TemplateFault.type("object of type '\(typeName(bound[2]!))' has no len()")
    }
    let leeway = isNone(bound[3]) ? 5 : try index(bound[3], 5)
    guard length >= end.count else {
      throw TemplateFault("AssertionError", "expected length >= \(end.count), got \(length)")
    }
    guard leeway >= 0 else { throw TemplateFault("AssertionError", "expected leeway >= 0, got \(leeway)") }
    guard case .string(let text) = value else {
      if try pythonLength(value) <= length + leeway { return value }
      throw TemplateFault.type("the filter 'truncate' needs a string, not '\(typeName(value))'")
    }
    if text.count <= length + leeway { return value }
    var kept = Text(slice: text.bytes[..<text.byteOffset(ofCodePoint: length - end.count)])
    if !(bound[1].map(isTruthy) ?? false) { kept = kept.splitFromRight(Text(" "), limit: 1)[0] }
    return .string(Text(bytes: kept.bytes + end.bytes))
  },
  "unique": { machine, value, arguments in
    let bound = try arguments.bind("do_unique", ["case_sensitive", "attribute"])
    let isCaseSensitive = bound[0].map(isTruthy) ?? false
    let path = path(bound[1] ?? .none)
    var seen: Set<HashableValue> = []
    return lazily(machine, value) { item in
      let key = try follow(path, item)
      let compared = isCaseSensitive ? key : ignoringCase(key)
      try checkHashable(compared)
      return seen.insert(HashableValue(compared)).inserted ? item : nil
    }
  },
  "upper": { machine, value, _ in
    let text = softText(value)
    try machine.charge(text.bytes.count >> 5)
    return .string(text.uppercased())
  },
  "urlencode": { machine, value, _ in
    var pairs: [Value]
    switch value {
    case .dict(let box): pairs = box.pairs
    case .list, .tuple, .object: pairs = try pythonList(machine, value)
    case .undefined: pairs = []
    default: return .string(Text(bytes: quoted(value, forQuery: false)))
    }
    var result: [UInt8] = []
    for (position, pair) in pairs.enumerated() {
      let parts = try pythonList(machine, pair)
      guard parts.count == 2 else {
        throw TemplateFault.value(
          parts.count < 2
            ? "not enough values to unpack (expected 2, got \(parts.count))"
            : "too many values to unpack (expected 2)")
      }
      if position > 0 { result.append(UInt8(ascii: "&")) }
      result.append(contentsOf: quoted(parts[0], forQuery: true))
      result.append(UInt8(ascii: "="))
      result.append(contentsOf: quoted(parts[1], forQuery: true))
    }
    return .string(Text(bytes: result))
  },
  "urlize": refuse("urlize", "it makes HTML links"),
  "wordcount": { _, value, _ in
    var count = 0
    var inWord = false
    for scalar in softText(value).scalars {
      let isWord = isPythonAlpha(scalar) || isPythonNumeric(scalar) || scalar == "_"
      if isWord && !inWord { count += 1 }
      inWord = isWord
    }
    return .int(count)
  },
  "wordwrap": refuse("wordwrap", "its hyphenation rules are not implemented"),
  "xmlattr": { machine, value, arguments in
    let bound = try arguments.bind("do_xmlattr", ["autospace"])
    guard case .dict(let box) = value else {
      if case .undefined(let info) = value { throw info.fault }
      throw TemplateFault.attribute("'\(typeName(value))' object has no attribute 'items'")
    }
    var parts: [Text] = []
    for (key, item) in zip(box.keys, box.values) {
      switch item {
      case .none, .undefined: continue
      default: break
      }
      guard case .string(let name) = key else {
        throw TemplateFault.type("expected string or bytes-like object, got '\(typeName(key))'")
      }
      if name.bytes.contains(where: { " \t\n\r\u{0B}\u{0C}/>=".utf8.contains($0) }) {
        throw TemplateFault.value("Invalid character in attribute name: \(repr(key))")
      }
      parts.append(
        Text(
          bytes: name.escapedForHTML().bytes + Array("=\"".utf8) + softText(item).escapedForHTML().bytes
            + [UInt8(ascii: "\"")]))
    }
    let joined = try join(machine, parts, Text(" "))
    let spaced = bound[0].map(isTruthy) ?? true
    return .string(spaced && !joined.isEmpty ? Text(bytes: [0x20] + joined.bytes) : joined)
  },
]

/// The count of a repetition such as `' ' * width`.
private func indexForRepeat(_ value: Value?, _ otherwise: Int) throws -> Int {
  guard let value else { return otherwise }
  guard let integer = integer(value) else {
    if case .undefined(let info) = value { throw info.fault }
    throw TemplateFault.type("can't multiply sequence by non-int of type '\(typeName(value))'")
  }
  return integer
}

/// Positions sorted by their keys, stably in both directions.
private func sorted(_ positions: [Int], by keys: [Value], reverse: Bool) throws -> [Int] {
  // Python reverses, sorts and reverses again, so that equal elements keep their order.
  let ordered = try mergeSorted(reverse ? positions.reversed() : positions) {
    try pythonCompare(keys[$0], keys[$1], .less)
  }
  return reverse ? ordered.reversed() : ordered
}

// MARK: Tests

private func comparisonTest(_ ordering: Ordering) -> Test {
  return { _, value, arguments in
    try pythonCompare(value, try operand(arguments), ordering)
  }
}

private func operand(_ arguments: CallArguments) throws -> Value {
  guard arguments.positional.count == 1 && arguments.keywords.isEmpty else {
    throw TemplateFault.type("expected 2 arguments, got \(arguments.positional.count + 1)")
  }
  return arguments.positional[0]
}

private let equalTest: Test = { _, value, arguments in pythonEqual(value, try operand(arguments)) }
private let unequalTest: Test = { _, value, arguments in !pythonEqual(value, try operand(arguments)) }

private func remainder(_ machine: Machine, _ value: Value, _ divisor: Value) throws -> Value {
  try arithmetic(machine, .modulo, value, divisor)
}

/// A test that takes no argument beyond the value.
private func plainTest(_ name: String, _ test: @escaping @Sendable (Machine, Value) throws -> Bool) -> Test {
  return { machine, value, arguments in
    if !arguments.isEmpty {
      throw TemplateFault.type(
        "test_\(name)() takes 1 positional argument but \(arguments.positional.count + 1) were given")
    }
    return try test(machine, value)
  }
}

/// The tests, by name.
let tests: [String: Test] = [
  "odd": plainTest("odd") { machine, value in pythonEqual(try remainder(machine, value, .int(2)), .int(1)) },
  "even": plainTest("even") { machine, value in pythonEqual(try remainder(machine, value, .int(2)), .int(0)) },
  "divisibleby": { machine, value, arguments in
    let bound = try arguments.bind("test_divisibleby", ["num"], required: 1)
    return pythonEqual(try remainder(machine, value, bound[0]!), .int(0))
  },
  "defined": plainTest("defined") { _, value in if case .undefined = value { false } else { true } },
  "undefined": plainTest("undefined") { _, value in if case .undefined = value { true } else { false } },
  "filter": plainTest("filter") { _, value in
    try checkHashable(value)
    if case .string(let name) = value { return filters[name.string] != nil }
    return false
  },
  "test": plainTest("test") { _, value in
    try checkHashable(value)
    if case .string(let name) = value { return isTest(name.string) }
    return false
  },
  "none": plainTest("none") { _, value in if case .none = value { true } else { false } },
  "boolean": plainTest("boolean") { _, value in if case .bool = value { true } else { false } },
  "false": plainTest("false") { _, value in if case .bool(false) = value { true } else { false } },
  "true": plainTest("true") { _, value in if case .bool(true) = value { true } else { false } },
  "integer": plainTest("integer") { _, value in if case .int = value { true } else { false } },
  "float": plainTest("float") { _, value in if case .double = value { true } else { false } },
  "lower": plainTest("lower") { _, value in pythonString(value).isLower },
  "upper": plainTest("upper") { _, value in pythonString(value).isUpper },
  "string": plainTest("string") { _, value in if case .string = value { true } else { false } },
  "mapping": plainTest("mapping") { _, value in if case .dict = value { true } else { false } },
  "number": plainTest("number") { _, value in number(value) != nil },
  "sequence": plainTest("sequence") { _, value in
    switch value {
    case .string, .list, .tuple, .dict: true
    case .object(let object): object is RangeObject
    // An undefined value has a length and refuses items only when asked for one.
    case .undefined: true
    default: false
    }
  },
  "iterable": plainTest("iterable") { _, value in
    switch value {
    case .string, .list, .tuple, .dict, .undefined: true
    case .object(let object):
      object is RangeObject || object is DictViewObject || object is GeneratorObject || object is LoopObject
    default: false
    }
  },
  "callable": plainTest("callable") { _, value in
    switch value {
    case .object(let object): object.isCallable
    case .undefined: true
    default: false
    }
  },
  "sameas": { _, value, arguments in
    let bound = try arguments.bind("test_sameas", ["other"], required: 1)
    switch (value, bound[0]!) {
    case (.none, .none): return true
    case (.bool(let a), .bool(let b)): return a == b
    case (.int(let a), .int(let b)): return a == b
    case (.string(let a), .string(let b)): return a == b && a.isMarkup == b.isMarkup
    case (.list(let a), .list(let b)), (.tuple(let a), .tuple(let b)): return a === b
    case (.dict(let a), .dict(let b)): return a === b
    case (.object(let a), .object(let b)): return a === b
    case (.undefined(let a), .undefined(let b)): return a === b
    default: return false
    }
  },
  "escaped": plainTest("escaped") { _, value in
    if case .string(let text) = value { text.isMarkup } else { false }
  },
  "in": { machine, value, arguments in
    let bound = try arguments.bind("test_in", ["seq"], required: 1)
    return try pythonContains(machine, bound[0]!, value)
  },
  "==": equalTest, "eq": equalTest, "equalto": equalTest,
  "!=": unequalTest, "ne": unequalTest,
  ">": comparisonTest(.greater), "gt": comparisonTest(.greater), "greaterthan": comparisonTest(.greater),
  ">=": comparisonTest(.greaterOrEqual), "ge": comparisonTest(.greaterOrEqual),
  "<": comparisonTest(.less), "lt": comparisonTest(.less), "lessthan": comparisonTest(.less),
  "<=": comparisonTest(.lessOrEqual), "le": comparisonTest(.lessOrEqual),
]

/// Whether a test exists, for the test `test` itself, which cannot refer to the table it stands in.
private func isTest(_ name: String) -> Bool { tests[name] != nil }
