/// Calls a method of a built-in type.
func callMethod(_ machine: Machine, _ target: Value, _ name: Text, _ arguments: CallArguments) throws -> Value {
  try machine.charge(1)
  let method = name.string
  switch target {
  case .string(let text):
    guard let method = StringMethod(rawValue: method) else { break }
    return try stringMethod(machine, text, method, arguments)
  case .dict(let box):
    switch method {
    case "get":
      let bound = try positionals(arguments, "get", 1...2)
      try checkHashable(bound[0])
      return box.lookup(bound[0]) ?? (bound.count > 1 ? bound[1] : .none)
    case "items": return try noArguments(arguments, "items", .object(DictViewObject(.items, box)))
    case "keys": return try noArguments(arguments, "keys", .object(DictViewObject(.keys, box)))
    case "values": return try noArguments(arguments, "values", .object(DictViewObject(.values, box)))
    case "copy":
      return try noArguments(arguments, "copy", .dict(DictBox(uniqueKeys: box.keys, values: box.values)))
    default: break
    }
  case .list(let box), .tuple(let box):
    switch method {
    case "copy": return try noArguments(arguments, "copy", .list(box.items))
    case "count":
      let bound = try positionals(arguments, "count", 1...1)
      try machine.charge(box.items.count)
      return .int(box.items.count { pythonEqual($0, bound[0]) })
    case "index":
      let bound = try positionals(arguments, "index", 1...3)
      try machine.charge(box.items.count)
      let (start, end) = try bounds(bound, count: box.items.count)
      for position in start..<max(start, end) where pythonEqual(box.items[position], bound[0]) {
        return .int(position)
      }
      if case .tuple = target { throw TemplateFault.value("tuple.index(x): x not in tuple") }
      throw TemplateFault.value("\(repr(bound[0])) is not in list")
    default: break
    }
  case .object(let object as RangeObject):
    let bound = try positionals(arguments, method, 1...1)
    let isElement = try pythonContains(machine, target, bound[0])
    if method == "count" { return .int(isElement ? 1 : 0) }
    guard isElement, let value = integer(bound[0]) else {
      throw TemplateFault.value("\(repr(bound[0])) is not in range")
    }
    return .int((value - object.start) / object.step)
  case .int(let int): return try integerMethod(int, method, arguments)
  case .bool(let bool): return try integerMethod(bool ? 1 : 0, method, arguments)
  case .double(let double):
    if method == "is_integer" {
      return try noArguments(arguments, method, .bool(double.isFinite && double == double.rounded()))
    }
    return try noArguments(arguments, method, target)
  default: break
  }
  throw TemplateFault.unsupported("The method '\(method)' of '\(typeName(target))' is not supported")
}

private func integerMethod(_ int: Int, _ method: String, _ arguments: CallArguments) throws -> Value {
  switch method {
  case "bit_length": try noArguments(arguments, method, .int(Int.bitWidth - int.magnitude.leadingZeroBitCount))
  case "bit_count": try noArguments(arguments, method, .int(int.magnitude.nonzeroBitCount))
  default: try noArguments(arguments, method, .int(int))
  }
}

private func noArguments(_ arguments: CallArguments, _ name: String, _ value: Value) throws -> Value {
  if !arguments.isEmpty {
    throw TemplateFault.type("\(name)() takes no arguments (\(arguments.positional.count) given)")
  }
  return value
}

/// The arguments of a method that takes none by name.
private func positionals(_ arguments: CallArguments, _ name: String, _ count: ClosedRange<Int>) throws -> [Value] {
  if !arguments.keywords.isEmpty { throw TemplateFault.type("\(name)() takes no keyword arguments") }
  guard count.contains(arguments.positional.count) else {
    throw TemplateFault.type(
      "\(name) expected \(arguments.positional.count < count.lowerBound ? "at least" : "at most") "
        + "\(arguments.positional.count < count.lowerBound ? count.lowerBound : count.upperBound) argument"
        + "\(count.upperBound == 1 ? "" : "s"), got \(arguments.positional.count)")
  }
  return arguments.positional
}

/// The optional start and end of a search, the second and third argument.
private func bounds(_ arguments: [Value], count: Int) throws -> (Int, Int) {
  func bound(_ position: Int, _ otherwise: Int) throws -> Int {
    guard arguments.count > position else { return otherwise }
    if case .none = arguments[position] { return otherwise }
    guard let value = integer(arguments[position]) else {
      throw TemplateFault.type("slice indices must be integers or None or have an __index__ method")
    }
    return value < 0 ? max(0, value &+ count) : value
  }
  return (try bound(1, 0), min(try bound(2, count), count))
}

private func text(_ value: Value) throws -> Text {
  guard case .string(let text) = value else {
    throw TemplateFault.type("must be str, not \(typeName(value))")
  }
  return text
}

private func int(_ value: Value) throws -> Int {
  guard let integer = integer(value) else {
    throw TemplateFault.type("'\(typeName(value))' object cannot be interpreted as an integer")
  }
  return integer
}

/// The methods of strings, told apart when the template is compiled.
enum StringMethod: String {
  case capitalize, casefold, center, count, encode, endswith, expandtabs, find, format, format_map,
    index, isalnum, isalpha, isascii, isdecimal, isdigit, isidentifier, islower, isnumeric, isprintable,
    isspace, istitle, isupper, join, ljust, lower, lstrip, maketrans, partition, removeprefix,
    removesuffix, replace, rfind, rindex, rjust, rpartition, rsplit, rstrip, split, splitlines,
    startswith, strip, swapcase, title, translate, upper, zfill, striptags, escape, unescape

  /// Whether only markup has the method.
  var isOfMarkup: Bool { self == .striptags || self == .escape || self == .unescape }
}

/// Calls a method of a string.
func stringMethod(
  _ machine: Machine, _ text: Text, _ method: StringMethod, _ arguments: CallArguments
) throws -> Value {
  try machine.charge(text.bytes.count >> 5)
  func simple(_ result: @autoclosure () throws -> Text) throws -> Value {
    try noArguments(arguments, method.rawValue, .string(try result()))
  }
  func all(_ predicate: (Unicode.Scalar) -> Bool) throws -> Value {
    try noArguments(arguments, method.rawValue, .bool(!text.isEmpty && text.scalars.allSatisfy(predicate)))
  }
  switch method {
  case .upper: return try simple(text.uppercased())
  case .lower: return try simple(text.lowercased())
  case .title: return try simple(text.titlecased())
  case .capitalize: return try simple(text.capitalized())
  case .swapcase: return try simple(text.caseSwapped())
  case .casefold:
    guard text.isASCII else {
      throw TemplateFault.unsupported("The method 'casefold' is supported for ASCII text only")
    }
    return try simple(text.lowercased())
  case .strip, .lstrip, .rstrip:
    let bound = try positionals(arguments, method.rawValue, 0...1)
    var characters: Text?
    if let first = bound.first {
      switch first {
      case .none: break
      case .string(let set): characters = set
      default: throw TemplateFault.type("\(method.rawValue) arg must be None or str")
      }
    }
    return .string(text.stripped(characters, left: method != .rstrip, right: method != .lstrip))
  case .startswith, .endswith:
    let bound = try positionals(arguments, method.rawValue, 1...3)
    let (start, end) = try bounds(bound, count: text.count)
    // Past the end nothing matches, but the types of the arguments are checked all the same.
    let isPastEnd = start > text.count
    let part =
      bound.count == 1
      ? text
      : Text(
        slice: text.bytes[
          text.byteOffset(
            ofCodePoint: start)..<max(
              text.byteOffset(ofCodePoint: start), text.byteOffset(ofCodePoint: end))])
    func matches(_ value: Value) throws -> Bool {
      guard case .string(let affix) = value else {
        throw TemplateFault.type(
          bound[0].isTuple
            ? "tuple for \(method.rawValue) must only contain str, not \(typeName(value))"
            : "\(method.rawValue) first arg must be str or a tuple of str, not \(typeName(value))")
      }
      if start > end || isPastEnd { return false }
      return method == .startswith ? part.hasPrefix(affix) : part.hasSuffix(affix)
    }
    if case .tuple(let box) = bound[0] {
      for item in box.items { if try matches(item) { return .bool(true) } }
      return .bool(false)
    }
    return .bool(try matches(bound[0]))
  case .split, .rsplit:
    let bound = try arguments.bind(method.rawValue, ["sep", "maxsplit"])
    let limit = try bound[1].map(int) ?? -1
    switch bound[0] ?? .none {
    case .none:
      let parts = method == .split ? text.splitOnSpace(limit: limit) : text.splitOnSpaceFromRight(limit: limit)
      try machine.charge(parts.count)
      return .list(parts.map { .string($0) })
    case .string(let separator):
      if separator.isEmpty { throw TemplateFault.value("empty separator") }
      let parts =
        method == .split ? text.split(separator, limit: limit) : text.splitFromRight(separator, limit: limit)
      try machine.charge(parts.count)
      return .list(parts.map { .string($0) })
    case let other: throw TemplateFault.type("must be str or None, not \(typeName(other))")
    }
  case .splitlines:
    let bound = try arguments.bind(method.rawValue, ["keepends"])
    return .list(text.lines(keepEnds: bound[0].map(isTruthy) ?? false).map { .string($0) })
  case .partition, .rpartition:
    let bound = try positionals(arguments, method.rawValue, 1...1)
    let separator = try ApusTokenization.text(bound[0])
    if separator.isEmpty { throw TemplateFault.value("empty separator") }
    let found =
      method == .partition
      ? firstRange(of: separator.bytes, in: text.bytes) : lastRange(of: separator.bytes, in: text.bytes)
    let empty = Text(bytes: [], isMarkup: text.isMarkup)
    guard let found else {
      let parts = method == .partition ? [text, empty, empty] : [empty, empty, text]
      return .tuple(parts.map { .string($0) })
    }
    let parts = [
      Text(slice: text.bytes[..<found], isMarkup: text.isMarkup),
      Text(bytes: separator.bytes, isMarkup: text.isMarkup),
      Text(slice: text.bytes[(found + separator.bytes.count)...], isMarkup: text.isMarkup),
    ]
    return .tuple(parts.map { .string($0) })
  case .replace:
    let bound = try positionals(arguments, method.rawValue, 2...3)
    let old = try argument(bound[0], "replace() argument 1")
    var new = try argument(bound[1], "replace() argument 2")
    if text.isMarkup { new = new.escapedForHTML() }
    let limit = bound.count > 2 ? try int(bound[2]) : -1
    return .string(try replace(machine, text, old, new, limit))
  case .join:
    let bound = try positionals(arguments, method.rawValue, 1...1)
    var iterator: ValueIterator
    do {
      iterator = try ValueIterator(bound[0])
    } catch let fault as TemplateFault where fault.kind == "TypeError" {
      throw TemplateFault.type("can only join an iterable")
    }
    var parts: [Text] = []
    while let item = try iterator.next() {
      guard case .string(let part) = item else {
        if text.isMarkup {
          parts.append(pythonString(item))
          continue
        }
        throw TemplateFault.type(
          "sequence item \(parts.count): expected str instance, \(typeName(item)) found")
      }
      parts.append(part)
    }
    return .string(try join(machine, parts, text))
  case .find, .rfind, .index, .rindex, .count:
    let bound = try positionals(arguments, method.rawValue, 1...3)
    let part = try ApusTokenization.text(bound[0])
    let count = text.count
    let (start, end) = try bounds(bound, count: count)
    let from = text.byteOffset(ofCodePoint: start)
    let to = text.byteOffset(ofCodePoint: end)
    if method == .count {
      if start > count || from > to { return .int(0) }
      if part.isEmpty { return .int(max(0, codePointCount(text.bytes[from..<to]) + 1)) }
      var found = 0
      var position = from
      while let next = firstRange(of: part.bytes, in: text.bytes, from: position, to: to) {
        found += 1
        position = next + part.bytes.count
      }
      return .int(found)
    }
    var found: Int?
    if start <= count && start <= end {
      found =
        (method == .rfind || method == .rindex)
        ? lastRange(of: part.bytes, in: text.bytes, from: from, to: to)
        : firstRange(of: part.bytes, in: text.bytes, from: from, to: to)
    }
    if let found { return .int(codePointCount(text.bytes[..<found])) }
    if method == .index || method == .rindex { throw TemplateFault.value("substring not found") }
    return .int(-1)
  case .isdigit: return try all(isPythonDigit)
  case .isdecimal: return try all(isPythonDecimal)
  case .isnumeric: return try all(isPythonNumeric)
  case .isalpha: return try all(isPythonAlpha)
  case .isalnum: return try all { isPythonAlpha($0) || isPythonNumeric($0) }
  case .isspace: return try all(isPythonSpace)
  case .isascii: return try noArguments(arguments, method.rawValue, .bool(text.isASCII))
  case .isprintable:
    return try noArguments(arguments, method.rawValue, .bool(text.scalars.allSatisfy(isPythonPrintable)))
  case .islower: return try noArguments(arguments, method.rawValue, .bool(text.isLower))
  case .isupper: return try noArguments(arguments, method.rawValue, .bool(text.isUpper))
  case .istitle: return try noArguments(arguments, method.rawValue, .bool(text.isTitle))
  case .isidentifier:
    let scalars = text.scalars
    let valid =
      scalars.first.map { $0 == "_" || $0.properties.isXIDStart } ?? false
      && scalars.allSatisfy { $0.properties.isXIDContinue }
    return try noArguments(arguments, method.rawValue, .bool(valid))
  case .removeprefix, .removesuffix:
    let bound = try positionals(arguments, method.rawValue, 1...1)
    let affix = try argument(bound[0], "\(method.rawValue)() argument")
    if method == .removeprefix {
      return .string(
        text.hasPrefix(affix) ? Text(slice: text.bytes[affix.bytes.count...], isMarkup: text.isMarkup) : text)
    }
    return .string(
      text.hasSuffix(affix) && !affix.isEmpty
        ? Text(slice: text.bytes[..<(text.bytes.count - affix.bytes.count)], isMarkup: text.isMarkup) : text)
  case .center, .ljust, .rjust:
    let bound = try positionals(arguments, method.rawValue, 1...2)
    var fill = Text(" ")
    if bound.count > 1 {
      guard case .string(let text) = bound[1] else {
        throw TemplateFault.type(
          "The fill character must be a unicode character, not \(typeName(bound[1]))")
      }
      guard text.count == 1 else { throw TemplateFault.type("The fill character must be exactly one character long") }
      fill = text
    }
    let alignment: Alignment = method == .center ? .center : method == .ljust ? .left : .right
    return .string(try pad(machine, text, to: try int(bound[0]), with: fill, alignment))
  case .zfill:
    let bound = try positionals(arguments, method.rawValue, 1...1)
    let width = try int(bound[0])
    let missing = width - text.count
    if missing <= 0 { return .string(text) }
    try machine.chargeBytes(missing)
    let zeros = [UInt8](repeating: UInt8(ascii: "0"), count: missing)
    if let first = text.bytes.first, first == UInt8(ascii: "+") || first == UInt8(ascii: "-") {
      return .string(Text(bytes: [first] + zeros + text.bytes[1...], isMarkup: text.isMarkup))
    }
    return .string(Text(bytes: zeros + text.bytes, isMarkup: text.isMarkup))
  case .expandtabs:
    let bound = try arguments.bind(method.rawValue, ["tabsize"])
    let size = try bound[0].map(int) ?? 8
    var bytes: [UInt8] = []
    var column = 0
    for scalar in text.scalars {
      switch scalar {
      case "\t":
        if size > 0 {
          let spaces = size - column % size
          try machine.chargeBytes(bytes.count &+ spaces)
          bytes.append(contentsOf: [UInt8](repeating: 0x20, count: spaces))
          column += spaces
        }
      case "\n", "\r":
        appendUTF8(scalar, to: &bytes)
        column = 0
      default:
        appendUTF8(scalar, to: &bytes)
        column += 1
      }
    }
    return .string(Text(bytes: bytes, isMarkup: text.isMarkup))
  case .format: return .string(try braceFormat(machine, text, arguments))
  case .format_map:
    let bound = try positionals(arguments, method.rawValue, 1...1)
    guard case .dict(let box) = bound[0] else {
      throw TemplateFault.type("format_map() argument must be a mapping, not \(typeName(bound[0]))")
    }
    var mapped = CallArguments()
    for (key, value) in zip(box.keys, box.values) {
      if case .string(let name) = key { mapped.keywords.append((name, value)) }
    }
    return .string(try braceFormat(machine, text, mapped))
  case .striptags: return try simple(stripTags(text))
  case .escape, .unescape:
    throw TemplateFault.unsupported("The method '\(method.rawValue)' of markup is not supported")
  case .encode, .maketrans, .translate:
    throw TemplateFault.unsupported("The method '\(method.rawValue)' of 'str' is not supported")
  }
}

private func argument(_ value: Value, _ name: String) throws -> Text {
  guard case .string(let text) = value else {
    throw TemplateFault.type("\(name) must be str, not \(typeName(value))")
  }
  return text
}

extension Value {
  var isTuple: Bool { if case .tuple = self { true } else { false } }
}

/// `str.replace`, with the work counted before it is done.
func replace(_ machine: Machine, _ text: Text, _ old: Text, _ new: Text, _ limit: Int) throws -> Text {
  let possible = old.isEmpty ? text.bytes.count + 1 : text.bytes.count / old.bytes.count
  let (growth, overflow) = possible.multipliedReportingOverflow(by: new.bytes.count)
  // The bound is rough; only a text that might be too large is counted exactly.
  if overflow || growth > 1 << 20 {
    var found = 0
    var position = 0
    if old.isEmpty {
      found = text.count + 1
    } else {
      while let next = firstRange(of: old.bytes, in: text.bytes, from: position) {
        found += 1
        position = next + old.bytes.count
      }
    }
    let (exact, overflow) = found.multipliedReportingOverflow(by: new.bytes.count)
    try machine.chargeBytes(overflow ? .max : exact)
  }
  try machine.chargeBytes(text.bytes.count)
  return text.replacing(old, with: new, limit: limit)
}

/// `separator.join(parts)`.
func join(_ machine: Machine, _ parts: [Text], _ separator: Text) throws -> Text {
  var size = separator.bytes.count * max(0, parts.count - 1)
  for part in parts { size += part.bytes.count }
  try machine.chargeBytes(size)
  try machine.charge(parts.count)
  var bytes: [UInt8] = []
  bytes.reserveCapacity(size)
  for (position, part) in parts.enumerated() {
    if position > 0 { bytes.append(contentsOf: separator.bytes) }
    bytes.append(contentsOf: separator.isMarkup ? part.escapedForHTML().bytes : part.bytes)
  }
  return Text(bytes: bytes, isMarkup: separator.isMarkup)
}

enum Alignment { case left, right, center, afterSign }

/// Pads a text to a number of code points.
func pad(
  _ machine: Machine, _ text: Text, to width: Int, with fill: Text, _ alignment: Alignment
) throws -> Text {
  let missing = width - text.count
  if missing <= 0 { return text }
  let (size, overflow) = missing.multipliedReportingOverflow(by: fill.bytes.count)
  try machine.chargeBytes(overflow ? .max : size)
  let left: Int =
    switch alignment {
    case .left: 0
    case .right, .afterSign: missing
    // Python's rule for the odd space.
    case .center: missing / 2 + (missing & width & 1)
    }
  var bytes: [UInt8] = []
  bytes.reserveCapacity(text.bytes.count + size)
  for _ in 0..<left { bytes.append(contentsOf: fill.bytes) }
  bytes.append(contentsOf: text.bytes)
  for _ in left..<missing { bytes.append(contentsOf: fill.bytes) }
  return Text(bytes: bytes, isMarkup: text.isMarkup)
}

/// `Markup.striptags`: comments and tags go, white space collapses, and entities become characters.
func stripTags(_ text: Text) throws -> Text {
  var bytes = text.bytes
  while let start = firstRange(of: Array("<!--".utf8), in: bytes) {
    guard let end = firstRange(of: Array("-->".utf8), in: bytes, from: start) else { break }
    bytes.removeSubrange(start..<(end + 3))
  }
  while let start = firstRange(of: [UInt8(ascii: "<")], in: bytes) {
    guard let end = firstRange(of: [UInt8(ascii: ">")], in: bytes, from: start) else { break }
    bytes.removeSubrange(start..<(end + 1))
  }
  let words = Text(bytes: bytes).splitOnSpace(limit: -1)
  var joined: [UInt8] = []
  for (position, word) in words.enumerated() {
    if position > 0 { joined.append(0x20) }
    joined.append(contentsOf: word.bytes)
  }
  guard joined.contains(UInt8(ascii: "&")) else { return Text(bytes: joined) }
  return try unescapeHTML(Text(bytes: joined))
}

/// The entities that `escape` writes, and numeric ones. Named entities beyond these are refused.
private func unescapeHTML(_ text: Text) throws -> Text {
  var result: [UInt8] = []
  var index = 0
  let bytes = text.bytes
  while index < bytes.count {
    guard bytes[index] == UInt8(ascii: "&") else {
      result.append(bytes[index])
      index += 1
      continue
    }
    let limit = min(bytes.count, index + 34)
    guard let end = bytes[(index + 1)..<limit].firstIndex(of: UInt8(ascii: ";")) else {
      result.append(bytes[index])
      index += 1
      continue
    }
    let name = String(decoding: bytes[(index + 1)..<end], as: UTF8.self)
    var scalar: Unicode.Scalar?
    switch name {
    case "amp": scalar = "&"
    case "lt": scalar = "<"
    case "gt": scalar = ">"
    case "quot": scalar = "\""
    case "apos": scalar = "'"
    case "nbsp": scalar = "\u{A0}"
    default:
      if name.hasPrefix("#x") || name.hasPrefix("#X") {
        scalar = UInt32(name.dropFirst(2), radix: 16).flatMap(Unicode.Scalar.init)
      } else if name.hasPrefix("#") {
        scalar = UInt32(name.dropFirst()).flatMap(Unicode.Scalar.init)
      } else if !name.isEmpty && name.allSatisfy({ $0.isASCII && ($0.isLetter || $0.isNumber) }) {
        throw TemplateFault.unsupported("The HTML entity '&\(name);' is not supported")
      }
    }
    if let scalar {
      appendUTF8(scalar, to: &result)
      index = end + 1
    } else {
      result.append(bytes[index])
      index += 1
    }
  }
  return Text(bytes: result)
}
