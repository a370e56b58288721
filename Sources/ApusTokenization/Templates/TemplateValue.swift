/// A value of the template language: what the reference implementation holds as Python objects.
enum Value {
  /// No value at all: a variable that was never set. Reading one gives an `undefined`.
  case missing
  case undefined(UndefinedInfo)
  case none
  case bool(Bool)
  case int(Int)
  case double(Double)
  case string(Text)
  case list(ListBox)
  case tuple(ListBox)
  case dict(DictBox)
  case object(TemplateObject)

  static func string(_ string: String) -> Value { .string(Text(string)) }
  static func list(_ items: [Value]) -> Value { .list(ListBox(items)) }
  static func tuple(_ items: [Value]) -> Value { .tuple(ListBox(items)) }
}

/// Why a value is undefined; turned into a message only when the value is used.
final class UndefinedInfo {
  enum Reason {
    /// A variable was never set.
    case name(Text)
    /// An object has no such attribute or item.
    case member(of: String, isBuiltin: Bool, key: Value)
    /// Access is refused by the sandbox.
    case unsafe(attribute: String, type: String)
    /// Any other, with the sentence of the reference.
    case hint(String)
  }

  let reason: Reason
  init(_ reason: Reason) { self.reason = reason }

  /// The error that using the value raises.
  var fault: TemplateFault {
    switch reason {
    case .name(let name): .undefined("\(repr(name)) is undefined")
    case .member(let type, let isBuiltin, let key):
      if case .string(let name) = key {
        .undefined("'\(type)\(isBuiltin ? " object" : "")' has no attribute \(repr(name))")
      } else {
        .undefined("\(type)\(isBuiltin ? " object" : "") has no element \(reprOrType(key))")
      }
    case .unsafe(let attribute, let type):
      .security("access to attribute '\(attribute)' of '\(type)' object is unsafe.")
    case .hint(let message): .undefined(message)
    }
  }
}

/// A list or tuple. Immutable, as the sandbox refuses every method that would change one; a class for identity's sake.
final class ListBox {
  let items: [Value]
  /// Whether this is the pair of `groupby`, which has names for its two elements.
  let isGroup: Bool
  init(_ items: [Value], isGroup: Bool = false) {
    self.items = items
    self.isGroup = isGroup
  }
}

/// A dictionary in order of insertion.
final class DictBox {
  let keys: [Value]
  let values: [Value]
  private let index: [HashableValue: Int]?

  /// Takes keys that are distinct and hashable.
  init(uniqueKeys keys: [Value], values: [Value]) {
    self.keys = keys
    self.values = values
    if keys.count > 8 {
      var index: [HashableValue: Int] = [:]
      index.reserveCapacity(keys.count)
      for (position, key) in keys.enumerated() { index[HashableValue(key)] = position }
      self.index = index
    } else {
      index = nil
    }
  }

  /// Takes pairs in order; a later value replaces an earlier one of an equal key, in the earlier one's place.
  convenience init(pairs: [(Value, Value)]) throws {
    var keys: [Value] = []
    var values: [Value] = []
    var seen: [HashableValue: Int] = [:]
    for (key, value) in pairs {
      try checkHashable(key)
      let hashed = HashableValue(key)
      if let position = seen[hashed] {
        values[position] = value
      } else {
        seen[hashed] = keys.count
        keys.append(key)
        values.append(value)
      }
    }
    self.init(uniqueKeys: keys, values: values)
  }

  var count: Int { keys.count }

  subscript(text: Text) -> Value? {
    if let index {
      guard let position = index[HashableValue(.string(text))] else { return nil }
      return values[position]
    }
    for position in 0..<keys.count {
      if case .string(let key) = keys[position], key == text { return values[position] }
    }
    return nil
  }

  /// The value of any hashable key.
  func lookup(_ key: Value) -> Value? {
    if case .string(let text) = key { return self[text] }
    if let index { return index[HashableValue(key)].map { values[$0] } }
    for position in 0..<keys.count where pythonEqual(keys[position], key) { return values[position] }
    return nil
  }

  var pairs: [Value] { (0..<keys.count).map { .tuple([keys[$0], values[$0]]) } }
}

/// A value as a dictionary key: Python's equality and a hash that agrees with it.
struct HashableValue: Hashable {
  let value: Value
  init(_ value: Value) { self.value = value }

  static func == (left: HashableValue, right: HashableValue) -> Bool { pythonEqual(left.value, right.value) }

  func hash(into hasher: inout Hasher) {
    switch value {
    case .missing, .undefined: hasher.combine(1)
    case .none: hasher.combine(2)
    case .bool(let bool): hasher.combine(bool ? 1.0 : 0.0)
    case .int(let int): hasher.combine(Double(int))
    case .double(let double): hasher.combine(double)
    case .string(let text): hasher.combine(text)
    case .tuple(let box): for item in box.items { HashableValue(item).hash(into: &hasher) }
    case .list, .dict: hasher.combine(3)
    case .object(let object): hasher.combine(ObjectIdentifier(object))
    }
  }
}

/// Refuses lists and dictionaries as keys, with the message of the reference.
func checkHashable(_ value: Value) throws {
  switch value {
  case .list, .dict: throw TemplateFault.type("unhashable type: '\(typeName(value))'")
  case .tuple(let box): for item in box.items { try checkHashable(item) }
  case .object(let object) where object is DictViewObject:
    if case .values = (object as! DictViewObject).kind { return }
    throw TemplateFault.type("unhashable type: '\(typeName(value))'")
  default: return
  }
}

/// An object of the runtime: a namespace, a macro, a loop, a generator, a method and so on.
class TemplateObject {
  /// The name that Python's `type(x).__name__` gives.
  var typeName: String { "object" }
  /// Whether the type is one of Python's own, which words some messages.
  var isBuiltinType: Bool { true }
  /// What `repr` and `str` show.
  func repr(_ depth: Int) -> String { "<\(typeName) object>" }
  var isTruthy: Bool { true }
  /// Whether the object is a `LoopObject`, which is asked for far too often to be found by a cast.
  var isLoop: Bool { false }
  /// The attribute of a name, or `nil` if there is none.
  func attribute(_ name: Text) throws -> Value? { nil }
  /// Calls the object, if it can be called.
  func call(_ machine: Machine, _ arguments: CallArguments) throws -> Value {
    throw TemplateFault.type("'\(typeName)' object is not callable")
  }
  var isCallable: Bool { false }
}

/// `namespace(...)`: the one thing that a template may change.
final class NamespaceObject: TemplateObject {
  var names: [Text] = []
  var values: [Value] = []

  override var typeName: String { "Namespace" }
  override var isBuiltinType: Bool { false }
  override func attribute(_ name: Text) throws -> Value? {
    for position in 0..<names.count where names[position] == name { return values[position] }
    return nil
  }

  func set(_ name: Text, _ value: Value) throws {
    if name.bytes.first == UInt8(ascii: "_") {
      throw TemplateFault.security(
        "Chat templates cannot store underscore-prefixed attributes on a namespace, but got "
          + "\(ApusTokenization.repr(name)). Please rename the attribute.")
    }
    for position in 0..<names.count where names[position] == name {
      values[position] = value
      return
    }
    names.append(name)
    values.append(value)
  }

  override func repr(_ depth: Int) -> String {
    if depth > 60 { return "<Namespace ...>" }
    let pairs = zip(names, values).map { "\(ApusTokenization.repr($0)): \(ApusTokenization.repr($1, depth + 1))" }
    return "<Namespace {" + pairs.joined(separator: ", ") + "}>"
  }
}

/// A lazy sequence: what `map`, `select` and their like return. Read once, from the front.
final class GeneratorObject: TemplateObject {
  private var step: (() throws -> Value?)?
  private let name: String
  init(_ name: String = "generator", _ step: @escaping () throws -> Value?) {
    self.name = name
    self.step = step
  }

  func next() throws -> Value? {
    guard let step else { return nil }
    guard let value = try step() else {
      self.step = nil
      return nil
    }
    return value
  }

  override var typeName: String { name }
  override func repr(_ depth: Int) -> String { "<\(name) object>" }
}

/// `range(...)`.
final class RangeObject: TemplateObject {
  let start: Int
  let stop: Int
  let step: Int
  init(_ start: Int, _ stop: Int, _ step: Int) {
    self.start = start
    self.stop = stop
    self.step = step
  }

  var count: Int {
    if step > 0 { return start < stop ? (stop - start - 1) / step + 1 : 0 }
    return start > stop ? (start - stop - 1) / -step + 1 : 0
  }

  func element(_ position: Int) -> Int { start + position * step }
  override var typeName: String { "range" }
  override var isTruthy: Bool { count > 0 }
  override func repr(_ depth: Int) -> String {
    step == 1 ? "range(\(start), \(stop))" : "range(\(start), \(stop), \(step))"
  }
  override func attribute(_ name: Text) throws -> Value? {
    switch name.string {
    case "start": .int(start)
    case "stop": .int(stop)
    case "step": .int(step)
    case "index", "count": .object(MethodObject(.object(self), name))
    default: nil
    }
  }
}

/// The live view that `keys()`, `values()` and `items()` return.
final class DictViewObject: TemplateObject {
  enum Kind: String { case keys = "dict_keys", values = "dict_values", items = "dict_items" }
  let kind: Kind
  let dict: DictBox
  init(_ kind: Kind, _ dict: DictBox) {
    self.kind = kind
    self.dict = dict
  }

  var items: [Value] {
    switch kind {
    case .keys: dict.keys
    case .values: dict.values
    case .items: dict.pairs
    }
  }
  override var typeName: String { kind.rawValue }
  override var isTruthy: Bool { dict.count > 0 }
  override func repr(_ depth: Int) -> String {
    "\(kind.rawValue)(\(ApusTokenization.repr(.list(items), depth)))"
  }
}

/// A method bound to its value.
final class MethodObject: TemplateObject {
  let target: Value
  let name: Text
  init(_ target: Value, _ name: Text) {
    self.target = target
    self.name = name
  }
  override var typeName: String { "builtin_function_or_method" }
  override var isCallable: Bool { true }
  override func repr(_ depth: Int) -> String {
    "<built-in method \(name.string) of \(ApusTokenization.typeName(target)) object>"
  }
  override func call(_ machine: Machine, _ arguments: CallArguments) throws -> Value {
    try callMethod(machine, target, name, arguments)
  }
}

/// A function of the environment, such as `range` or `raise_exception`.
final class FunctionObject: TemplateObject {
  let name: String
  private let type: String
  private let body: (Machine, CallArguments) throws -> Value
  private let members: (Text) -> Value?
  init(
    _ name: String, type: String = "function", members: @escaping (Text) -> Value? = { _ in nil },
    _ body: @escaping (Machine, CallArguments) throws -> Value
  ) {
    self.name = name
    self.type = type
    self.body = body
    self.members = members
  }
  override var typeName: String { type }
  override var isCallable: Bool { true }
  override func repr(_ depth: Int) -> String { "<\(type) \(name)>" }
  override func attribute(_ name: Text) throws -> Value? { members(name) }
  override func call(_ machine: Machine, _ arguments: CallArguments) throws -> Value { try body(machine, arguments) }
}

/// `cycler(...)`.
final class CyclerObject: TemplateObject {
  let items: [Value]
  var position = 0
  init(_ items: [Value]) { self.items = items }
  override var typeName: String { "Cycler" }
  override var isBuiltinType: Bool { false }
  override func attribute(_ name: Text) throws -> Value? {
    switch name.string {
    case "current": items[position]
    case "pos": .int(position)
    case "items": .tuple(items)
    case "next":
      .object(
        FunctionObject("next", type: "method") { [self] _, _ in
          defer { position = (position + 1) % items.count }
          return items[position]
        })
    case "reset":
      .object(
        FunctionObject("reset", type: "method") { [self] _, _ in
          position = 0
          return .none
        })
    default: nil
    }
  }
}

/// `joiner(separator)`: empty the first time it is called, the separator after that.
final class JoinerObject: TemplateObject {
  let separator: Value
  var used = false
  init(_ separator: Value) { self.separator = separator }
  override var typeName: String { "Joiner" }
  override var isBuiltinType: Bool { false }
  override var isCallable: Bool { true }
  override func attribute(_ name: Text) throws -> Value? {
    switch name.string {
    case "sep": separator
    case "used": .bool(used)
    default: nil
    }
  }
  override func call(_ machine: Machine, _ arguments: CallArguments) throws -> Value {
    if used { return separator }
    used = true
    return .string(.empty)
  }
}

/// The arguments of a call, evaluated.
struct CallArguments {
  var positional: [Value] = []
  var keywords: [(name: Text, value: Value)] = []

  var isEmpty: Bool { positional.isEmpty && keywords.isEmpty }

  func keyword(_ name: String) -> Value? {
    for keyword in keywords where keyword.name == Text(name) { return keyword.value }
    return nil
  }

  /// Matches arguments with parameters as Python does: `nil` for those not given.
  func bind(_ function: String, _ parameters: [String], required: Int = 0) throws -> [Value?] {
    if keywords.isEmpty && positional.isEmpty && required == 0 {
      return [Value?](repeating: nil, count: parameters.count)
    }
    if positional.count > parameters.count {
      throw TemplateFault.type(
        "\(function)() takes from \(required) to \(parameters.count) positional arguments but "
          + "\(positional.count) were given")
    }
    var bound = [Value?](repeating: nil, count: parameters.count)
    for (position, value) in positional.enumerated() { bound[position] = value }
    for (name, value) in keywords {
      guard let position = parameters.firstIndex(of: name.string) else {
        throw TemplateFault.type("\(function)() got an unexpected keyword argument \(repr(name))")
      }
      if bound[position] != nil {
        throw TemplateFault.type("\(function)() got multiple values for argument \(repr(name))")
      }
      bound[position] = value
    }
    for position in 0..<required where bound[position] == nil {
      throw TemplateFault.type("\(function)() missing 1 required positional argument: '\(parameters[position])'")
    }
    return bound
  }
}

// MARK: What Python's built-in functions do

/// `type(value).__name__`.
func typeName(_ value: Value) -> String {
  switch value {
  case .missing, .undefined: "Undefined"
  case .none: "NoneType"
  case .bool: "bool"
  case .int: "int"
  case .double: "float"
  case .string(let text): text.isMarkup ? "Markup" : "str"
  case .list: "list"
  case .tuple(let box): box.isGroup ? "_GroupTuple" : "tuple"
  case .dict: "dict"
  case .object(let object): object.typeName
  }
}

/// `bool(value)`.
func isTruthy(_ value: Value) -> Bool {
  switch value {
  case .missing, .undefined, .none: false
  case .bool(let bool): bool
  case .int(let int): int != 0
  case .double(let double): double != 0
  case .string(let text): !text.bytes.isEmpty
  case .list(let box), .tuple(let box): !box.items.isEmpty
  case .dict(let box): box.count > 0
  case .object(let object): object.isTruthy
  }
}

/// `left == right`.
func pythonEqual(_ left: Value, _ right: Value, _ depth: Int = 0) -> Bool {
  if depth > 600 { return false }
  switch (left, right) {
  case (.string(let a), .string(let b)): return a.bytes == b.bytes
  case (.none, .none): return true
  case (.missing, .missing), (.missing, .undefined), (.undefined, .missing), (.undefined, .undefined): return true
  case (.bool(let a), .bool(let b)): return a == b
  case (.int(let a), .int(let b)): return a == b
  case (.list(let a), .list(let b)), (.tuple(let a), .tuple(let b)):
    guard a.items.count == b.items.count else { return false }
    for position in 0..<a.items.count where !pythonEqual(a.items[position], b.items[position], depth + 1) {
      return false
    }
    return true
  case (.dict(let a), .dict(let b)):
    guard a.count == b.count else { return false }
    for position in 0..<a.count {
      guard let other = b.lookup(a.keys[position]), pythonEqual(a.values[position], other, depth + 1) else {
        return false
      }
    }
    return true
  case (.object(let a), .object(let b)):
    if a === b { return true }
    if let a = a as? RangeObject, let b = b as? RangeObject {
      guard a.count == b.count else { return false }
      return a.count == 0 || (a.start == b.start && (a.count == 1 || a.step == b.step))
    }
    if let a = a as? DictViewObject, let b = b as? DictViewObject, a.kind != .values, b.kind != .values {
      guard a.dict.count == b.dict.count else { return false }
      let other = b.items
      return a.items.allSatisfy { item in other.contains { pythonEqual(item, $0, depth + 1) } }
    }
    return false
  default:
    guard let order = compareNumbers(left, right) else { return false }
    return order == .equal
  }
}

enum NumberOrder { case less, equal, greater, unordered }

/// Compares two numbers exactly; `nil` if one is not a number.
func compareNumbers(_ left: Value, _ right: Value) -> NumberOrder? {
  switch (number(left), number(right)) {
  case (.int(let a)?, .int(let b)?): return a < b ? .less : a == b ? .equal : .greater
  case (.double(let a)?, .double(let b)?):
    return a < b ? .less : a == b ? .equal : a > b ? .greater : .unordered
  case (.int(let a)?, .double(let b)?): return compare(a, b)
  case (.double(let a)?, .int(let b)?):
    switch compare(b, a) {
    case .less: return .greater
    case .greater: return .less
    case let other: return other
    }
  default: return nil
  }
}

private func compare(_ int: Int, _ double: Double) -> NumberOrder {
  if double.isNaN { return .unordered }
  if double >= 9.223372036854775807e18 { return .less }
  if double < -9.223372036854775808e18 { return .greater }
  let whole = Int(double.rounded(.towardZero))
  if int != whole { return int < whole ? .less : .greater }
  let fraction = double - double.rounded(.towardZero)
  return fraction > 0 ? .less : fraction < 0 ? .greater : .equal
}

enum Number {
  case int(Int)
  case double(Double)
}

/// The number in a value; a truth value counts as 0 or 1.
func number(_ value: Value) -> Number? {
  switch value {
  case .bool(let bool): .int(bool ? 1 : 0)
  case .int(let int): .int(int)
  case .double(let double): .double(double)
  default: nil
  }
}

/// The integer in a value where Python wants an index; `nil` for any other type, a float included.
func integer(_ value: Value) -> Int? {
  switch value {
  case .bool(let bool): bool ? 1 : 0
  case .int(let int): int
  default: nil
  }
}

enum Ordering: String { case less = "<", lessOrEqual = "<=", greater = ">", greaterOrEqual = ">=" }

/// `left < right` and its like.
func pythonCompare(_ left: Value, _ right: Value, _ ordering: Ordering, _ depth: Int = 0) throws -> Bool {
  if case .undefined(let info) = left { throw info.fault }
  if case .undefined(let info) = right { throw info.fault }
  func decide(_ order: NumberOrder) -> Bool {
    switch ordering {
    case .less: order == .less
    case .lessOrEqual: order == .less || order == .equal
    case .greater: order == .greater
    case .greaterOrEqual: order == .greater || order == .equal
    }
  }
  if let order = compareNumbers(left, right) { return decide(order) }
  switch (left, right) {
  case (.string(let a), .string(let b)):
    return decide(a.bytes == b.bytes ? .equal : a < b ? .less : .greater)
  case (.list(let a), .list(let b)), (.tuple(let a), .tuple(let b)):
    if depth > 600 { throw TemplateFault("RecursionError", "maximum recursion depth exceeded in comparison") }
    for position in 0..<min(a.items.count, b.items.count)
    where !pythonEqual(a.items[position], b.items[position]) {
      return try pythonCompare(a.items[position], b.items[position], ordering, depth + 1)
    }
    let counts = (a.items.count, b.items.count)
    return decide(counts.0 < counts.1 ? .less : counts.0 == counts.1 ? .equal : .greater)
  default:
    throw TemplateFault.type(
      "'\(ordering.rawValue)' not supported between instances of '\(typeName(left))' and '\(typeName(right))'")
  }
}

/// `needle in haystack`.
func pythonContains(_ machine: Machine, _ haystack: Value, _ needle: Value) throws -> Bool {
  switch haystack {
  case .string(let text):
    guard case .string(let part) = needle else {
      throw TemplateFault.type("'in <string>' requires string as left operand, not \(typeName(needle))")
    }
    return text.contains(part)
  case .dict(let box):
    try checkHashable(needle)
    return box.lookup(needle) != nil
  case .list(let box), .tuple(let box):
    try machine.charge(box.items.count)
    return box.items.contains { pythonEqual($0, needle) }
  case .undefined: return false
  case .object(let object):
    if let range = object as? RangeObject {
      switch number(needle) {
      case .int(let int):
        let offset = int - range.start
        return offset % range.step == 0 && offset / range.step >= 0 && offset / range.step < range.count
      case .double(let double):
        guard let int = Int(exactly: double) else { return false }
        return try pythonContains(machine, haystack, .int(int))
      case nil: return false
      }
    }
    if let view = object as? DictViewObject, view.kind == .keys { try checkHashable(needle) }
    if object is DictViewObject || object is GeneratorObject || object is LoopObject {
      var iterator = try ValueIterator(haystack)
      while let item = try iterator.next() {
        try machine.charge(1)
        if pythonEqual(item, needle) { return true }
      }
      return false
    }
    throw TemplateFault.type("argument of type '\(object.typeName)' is not iterable")
  default: throw TemplateFault.type("argument of type '\(typeName(haystack))' is not iterable")
  }
}

/// `len(value)`.
func pythonLength(_ value: Value) throws -> Int {
  switch value {
  case .string(let text): return text.count
  case .list(let box), .tuple(let box): return box.items.count
  case .dict(let box): return box.count
  case .undefined: return 0
  case .object(let object):
    if let range = object as? RangeObject { return range.count }
    if let view = object as? DictViewObject { return view.dict.count }
    if let loop = object as? LoopObject { return try loop.length() }
    throw TemplateFault.type("object of type '\(object.typeName)' has no len()")
  default: throw TemplateFault.type("object of type '\(typeName(value))' has no len()")
  }
}

/// Iterates over whatever Python would.
struct ValueIterator {
  private enum Source {
    case array([Value])
    case range(RangeObject)
    case generator(GeneratorObject)
    case loop(LoopObject)
  }
  private let source: Source
  private var position = 0

  init(_ value: Value) throws {
    switch value {
    case .list(let box), .tuple(let box): source = .array(box.items)
    case .dict(let box): source = .array(box.keys)
    case .string(let text): source = .array(text.characters.map { .string($0.plain) })
    case .undefined: source = .array([])
    case .object(let object):
      switch object {
      case let range as RangeObject: source = .range(range)
      case let generator as GeneratorObject: source = .generator(generator)
      case let view as DictViewObject: source = .array(view.items)
      case let loop as LoopObject: source = .loop(loop)
      default: throw TemplateFault.type("'\(object.typeName)' object is not iterable")
      }
    default: throw TemplateFault.type("'\(typeName(value))' object is not iterable")
    }
  }

  mutating func next() throws -> Value? {
    switch source {
    case .array(let items):
      guard position < items.count else { return nil }
      defer { position += 1 }
      return items[position]
    case .range(let range):
      guard position < range.count else { return nil }
      defer { position += 1 }
      return .int(range.element(position))
    case .generator(let generator): return try generator.next()
    case .loop(let loop): return try loop.nextPair()
    }
  }
}

/// `list(value)`.
func pythonList(_ machine: Machine, _ value: Value) throws -> [Value] {
  switch value {
  case .list(let box), .tuple(let box): return box.items
  case .dict(let box): return box.keys
  default:
    var iterator = try ValueIterator(value)
    var items: [Value] = []
    while let item = try iterator.next() {
      try machine.charge(1)
      items.append(item)
    }
    return items
  }
}
