/// An expression, compiled: names are slots, filters and tests are functions.
///
/// Nodes are immutable once the compiler is done, so that one template serves many threads.
class Node {
  func evaluate(_ machine: Machine) throws -> Value { fatalError("every node evaluates") }
  /// Writes `str(value)` to the output; overridden where the value need not be made.
  func emit(_ machine: Machine) throws { machine.emit(try evaluate(machine)) }
  /// The truth of the value.
  func holds(_ machine: Machine) throws -> Bool { isTruthy(try evaluate(machine)) }
}

final class ConstantNode: Node {
  let value: Value
  init(_ value: Value) { self.value = value }
  override func evaluate(_ machine: Machine) throws -> Value { value }
}

/// A variable of this activation or of one around it.
final class VariableNode: Node {
  let hops: Int
  let slot: Int
  let name: Text
  private let undefined: Value
  init(_ reference: Reference, _ name: Text) {
    hops = reference.hops
    slot = reference.slot
    self.name = name
    undefined = .undefined(UndefinedInfo(.name(name)))
  }

  override func evaluate(_ machine: Machine) throws -> Value {
    let value: Value
    if hops == 0 {
      value = machine.activation.slots[slot]
    } else {
      var activation = machine.activation
      for _ in 0..<hops { activation = activation.parent! }
      value = activation.slots[slot]
    }
    if case .missing = value { return undefined }
    return value
  }
}

struct Reference {
  var hops: Int
  var slot: Int

  func read(_ machine: Machine) -> Value {
    var activation = machine.activation
    for _ in 0..<hops { activation = activation.parent! }
    return activation.slots[slot]
  }
}

final class SequenceNode: Node {
  let items: [Node]
  let isTuple: Bool
  init(_ items: [Node], isTuple: Bool) {
    self.items = items
    self.isTuple = isTuple
  }
  override func evaluate(_ machine: Machine) throws -> Value {
    var values: [Value] = []
    values.reserveCapacity(items.count)
    for item in items { values.append(try item.evaluate(machine)) }
    return isTuple ? .tuple(values) : .list(values)
  }
}

final class DictNode: Node {
  let items: [(key: Node, value: Node)]
  init(_ items: [(key: Node, value: Node)]) { self.items = items }
  override func evaluate(_ machine: Machine) throws -> Value {
    var pairs: [(Value, Value)] = []
    pairs.reserveCapacity(items.count)
    for item in items { pairs.append((try item.key.evaluate(machine), try item.value.evaluate(machine))) }
    return .dict(try DictBox(pairs: pairs))
  }
}

final class ConditionalNode: Node {
  let test: Node
  let then: Node
  let otherwise: Node?
  private let undefined: Value
  init(_ test: Node, _ then: Node, _ otherwise: Node?, line: Int) {
    self.test = test
    self.then = then
    self.otherwise = otherwise
    undefined = .undefined(
      UndefinedInfo(
        .hint(
          "the inline if-expression on line \(line) evaluated to false and no else section was defined.")))
  }
  override func evaluate(_ machine: Machine) throws -> Value {
    if try test.holds(machine) { return try then.evaluate(machine) }
    return try otherwise?.evaluate(machine) ?? undefined
  }
  override func emit(_ machine: Machine) throws {
    if try test.holds(machine) { try then.emit(machine) } else { try otherwise?.emit(machine) }
  }
}

final class OrNode: Node {
  let left: Node
  let right: Node
  init(_ left: Node, _ right: Node) {
    self.left = left
    self.right = right
  }
  override func evaluate(_ machine: Machine) throws -> Value {
    let value = try left.evaluate(machine)
    return isTruthy(value) ? value : try right.evaluate(machine)
  }
  override func holds(_ machine: Machine) throws -> Bool { try left.holds(machine) || right.holds(machine) }
}

final class AndNode: Node {
  let left: Node
  let right: Node
  init(_ left: Node, _ right: Node) {
    self.left = left
    self.right = right
  }
  override func evaluate(_ machine: Machine) throws -> Value {
    let value = try left.evaluate(machine)
    return isTruthy(value) ? try right.evaluate(machine) : value
  }
  override func holds(_ machine: Machine) throws -> Bool { try left.holds(machine) && right.holds(machine) }
}

final class NotNode: Node {
  let operand: Node
  init(_ operand: Node) { self.operand = operand }
  override func evaluate(_ machine: Machine) throws -> Value { .bool(try !operand.holds(machine)) }
  override func holds(_ machine: Machine) throws -> Bool { try !operand.holds(machine) }
}

final class CompareNode: Node {
  let first: Node
  let operations: [(operation: Comparison, operand: Node)]
  init(_ first: Node, _ operations: [(operation: Comparison, operand: Node)]) {
    self.first = first
    self.operations = operations
  }
  override func evaluate(_ machine: Machine) throws -> Value { .bool(try holds(machine)) }
  override func holds(_ machine: Machine) throws -> Bool {
    var left = try first.evaluate(machine)
    for (operation, operand) in operations {
      let right = try operand.evaluate(machine)
      let result: Bool =
        switch operation {
        case .equal: pythonEqual(left, right)
        case .notEqual: !pythonEqual(left, right)
        case .less: try pythonCompare(left, right, .less)
        case .lessOrEqual: try pythonCompare(left, right, .lessOrEqual)
        case .greater: try pythonCompare(left, right, .greater)
        case .greaterOrEqual: try pythonCompare(left, right, .greaterOrEqual)
        case .contained: try pythonContains(machine, right, left)
        case .notContained: try !pythonContains(machine, right, left)
        }
      if !result { return false }
      left = right
    }
    return true
  }
}

/// A chain of `+`, evaluated from the left. Plain strings are gathered and joined once.
final class AddNode: Node {
  let operands: [Node]
  init(_ operands: [Node]) { self.operands = operands }

  override func evaluate(_ machine: Machine) throws -> Value {
    var value = try operands[0].evaluate(machine)
    var position = 1
    if case .string(let text) = value, !text.isMarkup {
      var joined = text.bytes
      var rest: Value?
      while position < operands.count {
        let operand = try operands[position].evaluate(machine)
        position += 1
        guard case .string(let next) = operand, !next.isMarkup else {
          rest = operand
          break
        }
        joined.append(contentsOf: next.bytes)
      }
      try machine.chargeBytes(joined.count)
      value = .string(Text(bytes: joined))
      if let rest { value = try add(machine, value, rest) }
    }
    while position < operands.count {
      value = try add(machine, value, try operands[position].evaluate(machine))
      position += 1
    }
    return value
  }

  override func emit(_ machine: Machine) throws {
    let first = try operands[0].evaluate(machine)
    guard case .string(let text) = first, !text.isMarkup else {
      var value = first
      for operand in operands.dropFirst() { value = try add(machine, value, try operand.evaluate(machine)) }
      return machine.emit(value)
    }
    // Strings are written as they come, until something else is added to the text so far.
    let start = machine.output.count
    machine.write(text.bytes)
    for position in 1..<operands.count {
      let operand = try operands[position].evaluate(machine)
      if case .string(let next) = operand, !next.isMarkup {
        machine.write(next.bytes)
        continue
      }
      var value = Value.string(Text(slice: machine.output[start...]))
      machine.output.removeSubrange(start...)
      value = try add(machine, value, operand)
      for operand in operands[(position + 1)...] { value = try add(machine, value, try operand.evaluate(machine)) }
      return machine.emit(value)
    }
    try machine.charge((machine.output.count - start) >> 5)
  }
}

final class BinaryNode: Node {
  let operation: BinaryOperator
  let left: Node
  let right: Node
  init(_ operation: BinaryOperator, _ left: Node, _ right: Node) {
    self.operation = operation
    self.left = left
    self.right = right
  }
  override func evaluate(_ machine: Machine) throws -> Value {
    let left = try left.evaluate(machine)
    return try arithmetic(machine, operation, left, try right.evaluate(machine))
  }
}

final class SignNode: Node {
  let operand: Node
  let isNegative: Bool
  init(_ operand: Node, isNegative: Bool) {
    self.operand = operand
    self.isNegative = isNegative
  }
  override func evaluate(_ machine: Machine) throws -> Value {
    let value = try operand.evaluate(machine)
    switch value {
    case .undefined(let info): throw info.fault
    default: break
    }
    switch number(value) {
    case .int(let int):
      if !isNegative { return .int(int) }
      if int == .min { throw TemplateFault.bigInteger }
      return .int(-int)
    case .double(let double): return .double(isNegative ? -double : double)
    case nil:
      throw TemplateFault.type("bad operand type for unary \(isNegative ? "-" : "+"): '\(typeName(value))'")
    }
  }
}

final class ConcatNode: Node {
  let items: [Node]
  init(_ items: [Node]) { self.items = items }
  override func evaluate(_ machine: Machine) throws -> Value {
    var values: [Value] = []
    for item in items { values.append(try item.evaluate(machine)) }
    var bytes: [UInt8] = []
    for value in values { bytes.append(contentsOf: pythonString(value).bytes) }
    try machine.chargeBytes(bytes.count)
    return .string(Text(bytes: bytes))
  }
}

/// `object.name`: the attribute first, then the item.
final class AttributeNode: Node {
  let object: Node
  let name: AttributeName
  init(_ object: Node, _ name: AttributeName) {
    self.object = object
    self.name = name
  }
  override func evaluate(_ machine: Machine) throws -> Value {
    let value = try object.evaluate(machine)
    if case .dict(let box) = value, !name.isReserved, let member = box[name.text] { return member }
    return try attributeOrItem(value, name)
  }
}

/// `object[key]`: the item first, then the attribute.
final class ItemNode: Node {
  let object: Node
  let key: Node
  init(_ object: Node, _ key: Node) {
    self.object = object
    self.key = key
  }
  override func evaluate(_ machine: Machine) throws -> Value {
    let value = try object.evaluate(machine)
    return try itemOrAttribute(value, try key.evaluate(machine))
  }
}

/// `object['name']` with a constant key.
final class KeyNode: Node {
  let object: Node
  let key: Text
  init(_ object: Node, _ key: Text) {
    self.object = object
    self.key = key
  }
  override func evaluate(_ machine: Machine) throws -> Value {
    let value = try object.evaluate(machine)
    if case .dict(let box) = value, let member = box[key] { return member }
    return try itemOrAttribute(value, .string(key))
  }
}

final class SliceNode: Node {
  let object: Node
  let start: Node?
  let stop: Node?
  let step: Node?
  init(_ object: Node, _ start: Node?, _ stop: Node?, _ step: Node?) {
    self.object = object
    self.start = start
    self.stop = stop
    self.step = step
  }
  override func evaluate(_ machine: Machine) throws -> Value {
    let value = try object.evaluate(machine)
    let start = try start?.evaluate(machine) ?? .none
    let stop = try stop?.evaluate(machine) ?? .none
    let step = try step?.evaluate(machine) ?? .none
    return try slice(machine, value, start, stop, step)
  }
}

/// The arguments of a call, compiled.
final class ArgumentNodes {
  let positional: [Node]
  let keywords: [(name: Text, value: Node)]
  let spread: Node?
  let keywordSpread: Node?
  init(positional: [Node], keywords: [(name: Text, value: Node)], spread: Node?, keywordSpread: Node?) {
    self.positional = positional
    self.keywords = keywords
    self.spread = spread
    self.keywordSpread = keywordSpread
  }

  /// - Parameter caller: the body of a call block, which goes between keywords and what a mapping adds to them.
  func evaluate(_ machine: Machine, caller: Value? = nil) throws -> CallArguments {
    var arguments = CallArguments()
    if !positional.isEmpty {
      arguments.positional.reserveCapacity(positional.count)
      for node in positional { arguments.positional.append(try node.evaluate(machine)) }
    }
    for (name, node) in keywords { arguments.keywords.append((name, try node.evaluate(machine))) }
    if let caller { arguments.keywords.append((Text("caller"), caller)) }
    if let spread {
      let value = try spread.evaluate(machine)
      do {
        arguments.positional.append(contentsOf: try pythonList(machine, value))
      } catch let fault as TemplateFault where fault.kind == "TypeError" {
        throw TemplateFault.type(
          "Value after * must be an iterable, not \(typeName(value))")
      }
    }
    if let keywordSpread {
      let value = try keywordSpread.evaluate(machine)
      guard case .dict(let box) = value else {
        if case .undefined(let info) = value { throw info.fault }
        throw TemplateFault.type("argument after ** must be a mapping, not \(typeName(value))")
      }
      for (key, value) in zip(box.keys, box.values) {
        guard case .string(let name) = key else { throw TemplateFault.type("keywords must be strings") }
        if arguments.keywords.contains(where: { $0.name == name }) {
          throw TemplateFault.type("got multiple values for keyword argument \(repr(name))")
        }
        arguments.keywords.append((name, value))
      }
    }
    return arguments
  }
}

final class CallNode: Node {
  let callee: Node
  let arguments: ArgumentNodes
  private let attribute: AttributeNode?
  init(_ callee: Node, _ arguments: ArgumentNodes) {
    self.callee = callee
    self.arguments = arguments
    attribute = callee as? AttributeNode
  }
  override func evaluate(_ machine: Machine) throws -> Value {
    try machine.charge(1)
    if let attribute {
      // A method of a string or dictionary is called without making a bound method first.
      let target = try attribute.object.evaluate(machine)
      switch target {
      case .string(let text):
        if let method = attribute.name.stringMethod, text.isMarkup || !method.isOfMarkup {
          return try stringMethod(machine, text, method, try arguments.evaluate(machine))
        }
        let function = try attributeOrItem(target, attribute.name)
        return try call(machine, function, try arguments.evaluate(machine))
      case .dict where attribute.name.isDictMethod:
        return try callMethod(machine, target, attribute.name.text, try arguments.evaluate(machine))
      default:
        let function = try attributeOrItem(target, attribute.name)
        return try call(machine, function, try arguments.evaluate(machine))
      }
    }
    let function = try callee.evaluate(machine)
    return try call(machine, function, try arguments.evaluate(machine))
  }
}

/// Calls a value.
func call(_ machine: Machine, _ function: Value, _ arguments: CallArguments) throws -> Value {
  switch function {
  case .object(let object): return try object.call(machine, arguments)
  case .undefined(let info): throw info.fault
  default: throw TemplateFault.type("'\(typeName(function))' object is not callable")
  }
}

final class FilterNode: Node {
  let operand: Node
  let filter: Filter
  let arguments: ArgumentNodes?
  init(_ operand: Node, _ filter: @escaping Filter, _ arguments: ArgumentNodes?) {
    self.operand = operand
    self.filter = filter
    self.arguments = arguments
  }
  override func evaluate(_ machine: Machine) throws -> Value {
    try machine.charge(1)
    let value = try operand.evaluate(machine)
    return try filter(machine, value, try arguments?.evaluate(machine) ?? CallArguments())
  }
}

final class TestNode: Node {
  let operand: Node
  let test: Test
  let arguments: ArgumentNodes?
  init(_ operand: Node, _ test: @escaping Test, _ arguments: ArgumentNodes?) {
    self.operand = operand
    self.test = test
    self.arguments = arguments
  }
  override func evaluate(_ machine: Machine) throws -> Value { .bool(try holds(machine)) }
  override func holds(_ machine: Machine) throws -> Bool {
    let value = try operand.evaluate(machine)
    return try test(machine, value, try arguments?.evaluate(machine) ?? CallArguments())
  }
}

/// `is defined` and `is none`, which need no call.
final class KindTestNode: Node {
  enum Kind { case defined, undefined, none, string, mapping }
  let operand: Node
  let kind: Kind
  init(_ operand: Node, _ kind: Kind) {
    self.operand = operand
    self.kind = kind
  }
  override func evaluate(_ machine: Machine) throws -> Value { .bool(try holds(machine)) }
  override func holds(_ machine: Machine) throws -> Bool {
    switch (kind, try operand.evaluate(machine)) {
    case (.defined, .undefined): false
    case (.defined, _): true
    case (.undefined, .undefined): true
    case (.none, .none): true
    case (.string, .string): true
    case (.mapping, .dict): true
    default: false
    }
  }
}

/// An attribute of the loop variable.
final class LoopAttributeNode: Node {
  let loop: Node
  let attribute: LoopAttribute
  let name: AttributeName
  init(_ loop: Node, _ attribute: LoopAttribute, _ name: AttributeName) {
    self.loop = loop
    self.attribute = attribute
    self.name = name
  }
  override func evaluate(_ machine: Machine) throws -> Value {
    let value = try loop.evaluate(machine)
    if case .object(let object) = value, object.isLoop {
      return try unsafeDowncast(object, to: LoopObject.self).attribute(attribute)
    }
    return try attributeOrItem(value, name)
  }
}

/// The text captured by a block, as the operand of its filters.
final class CapturedNode: Node {
  let slot: Int
  init(slot: Int) { self.slot = slot }
  override func evaluate(_ machine: Machine) throws -> Value { machine.activation.slots[slot] }
}

// MARK: Statements

class StatementNode {
  func run(_ machine: Machine) throws -> Flow { fatalError("every statement runs") }
}

/// Runs statements in order, until one of them leaves a loop.
@inline(__always)
func runAll(_ statements: [StatementNode], _ machine: Machine) throws -> Flow {
  for statement in statements {
    let flow = try statement.run(machine)
    if flow != .next { return flow }
  }
  return .next
}

final class OutputNode: StatementNode {
  enum Part {
    case data([UInt8])
    case node(Node)
  }
  let parts: [Part]
  let line: Int
  init(_ parts: [Part], line: Int) {
    self.parts = parts
    self.line = line
  }
  override func run(_ machine: Machine) throws -> Flow {
    machine.line = line
    try machine.charge(parts.count)
    for part in parts {
      switch part {
      case .data(let bytes): machine.write(bytes)
      case .node(let node): try node.emit(machine)
      }
    }
    try machine.checkOutput()
    return .next
  }
}

/// How the variables of a frame get their first values.
enum FrameEntry {
  case resolve(slot: Int, context: Int)
  case alias(slot: Int, of: Reference)
  case clear(slot: Int)

  @inline(__always)
  static func enter(_ entries: [FrameEntry], _ machine: Machine) {
    for entry in entries {
      switch entry {
      case .resolve(let slot, let context): machine.activation.slots[slot] = machine.context[context]
      case .alias(let slot, let reference): machine.activation.slots[slot] = reference.read(machine)
      case .clear(let slot): machine.activation.slots[slot] = .missing
      }
    }
  }
}

/// A compiled target of an assignment.
indirect enum TargetNode {
  case slot(Int)
  case namespace(Reference, Text)
  case tuple([TargetNode])

  /// Refuses attributes of anything but a namespace, before the value is evaluated.
  func checkNamespaces(_ machine: Machine) throws {
    switch self {
    case .slot: return
    case .namespace(let reference, _):
      guard case .object(let object) = reference.read(machine), object is NamespaceObject else {
        throw TemplateFault.runtime("cannot assign attribute on non-namespace object")
      }
    case .tuple(let targets): for target in targets { try target.checkNamespaces(machine) }
    }
  }

  func assign(_ machine: Machine, _ value: Value) throws {
    switch self {
    case .slot(let slot): machine.activation.slots[slot] = value
    case .namespace(let reference, let name):
      guard case .object(let object) = reference.read(machine), let namespace = object as? NamespaceObject else {
        throw TemplateFault.runtime("cannot assign attribute on non-namespace object")
      }
      try machine.charge(1 + namespace.names.count)
      try namespace.set(name, value)
    case .tuple(let targets):
      let values = try unpack(value, targets.count)
      for position in targets.indices { try targets[position].assign(machine, values[position]) }
    }
  }

  private func unpack(_ value: Value, _ count: Int) throws -> [Value] {
    switch value {
    case .list(let box), .tuple(let box):
      if box.items.count == count { return box.items }
    default: break
    }
    var iterator: ValueIterator
    do {
      iterator = try ValueIterator(value)
    } catch {
      throw TemplateFault.type("cannot unpack non-iterable \(typeName(value)) object")
    }
    var values: [Value] = []
    while values.count < count, let item = try iterator.next() { values.append(item) }
    guard values.count == count else {
      throw TemplateFault.value("not enough values to unpack (expected \(count), got \(values.count))")
    }
    if try iterator.next() != nil {
      throw TemplateFault.value("too many values to unpack (expected \(count))")
    }
    return values
  }

  /// The value of the target's variables, put together as it was taken apart.
  func gather(_ machine: Machine) -> Value {
    switch self {
    case .slot(let slot): machine.activation.slots[slot]
    case .namespace(let reference, _): reference.read(machine)
    case .tuple(let targets): .tuple(targets.map { $0.gather(machine) })
    }
  }
}

final class SetNode: StatementNode {
  let target: TargetNode
  let value: Node
  let line: Int
  init(_ target: TargetNode, _ value: Node, line: Int) {
    self.target = target
    self.value = value
    self.line = line
  }
  override func run(_ machine: Machine) throws -> Flow {
    machine.line = line
    try machine.charge(1)
    if case .slot(let slot) = target {
      machine.activation.slots[slot] = try value.evaluate(machine)
    } else {
      try target.checkNamespaces(machine)
      try target.assign(machine, try value.evaluate(machine))
    }
    return .next
  }
}

/// `{% set %}` with a body, and filter blocks: the body's text is captured, filtered, and assigned or written.
final class CaptureNode: StatementNode {
  let target: TargetNode?
  let entries: [FrameEntry]
  let body: [StatementNode]
  let captured: Int
  let filter: Node?
  let line: Int
  init(
    target: TargetNode?, entries: [FrameEntry], body: [StatementNode], captured: Int, filter: Node?, line: Int
  ) {
    self.target = target
    self.entries = entries
    self.body = body
    self.captured = captured
    self.filter = filter
    self.line = line
  }
  override func run(_ machine: Machine) throws -> Flow {
    machine.line = line
    FrameEntry.enter(entries, machine)
    var flow = Flow.next
    let bytes = try machine.capture { flow = try runAll(body, machine) }
    if flow != .next { return flow }
    var value = Value.string(Text(bytes: bytes))
    if let filter {
      machine.activation.slots[captured] = value
      value = try filter.evaluate(machine)
    }
    if let target { try target.assign(machine, value) } else { machine.emit(value) }
    return .next
  }
}

final class BranchNode: StatementNode {
  let branches: [(test: Node, body: [StatementNode])]
  let otherwise: [StatementNode]
  let line: Int
  init(_ branches: [(test: Node, body: [StatementNode])], _ otherwise: [StatementNode], line: Int) {
    self.branches = branches
    self.otherwise = otherwise
    self.line = line
  }
  override func run(_ machine: Machine) throws -> Flow {
    machine.line = line
    try machine.charge(1)
    for branch in branches where try branch.test.holds(machine) { return try runAll(branch.body, machine) }
    return try runAll(otherwise, machine)
  }
}

/// The shape that plain and recursive loops share.
final class LoopDefinition {
  let target: TargetNode
  let loopSlot: Int?
  let entries: [FrameEntry]
  let body: [StatementNode]
  let otherwiseEntries: [FrameEntry]
  let otherwise: [StatementNode]
  let filter: LoopFilter?
  init(
    target: TargetNode, loopSlot: Int?, entries: [FrameEntry], body: [StatementNode],
    otherwiseEntries: [FrameEntry], otherwise: [StatementNode], filter: LoopFilter?
  ) {
    self.target = target
    self.loopSlot = loopSlot
    self.entries = entries
    self.body = body
    self.otherwiseEntries = otherwiseEntries
    self.otherwise = otherwise
    self.filter = filter
  }

  func run(
    _ machine: Machine, over iterable: Value, depth: Int,
    recurse: ((Machine, Value, Int) throws -> Value)?
  ) throws -> Flow {
    let sequence = try filter?.apply(machine, iterable) ?? iterable
    // What the reference calls an iteration is a body that ran to its end; only then is the else branch left out.
    var completed = false
    if let loopSlot {
      let loop = try LoopObject(sequence, depth0: depth, recurse: recurse)
      while let item = try loop.next() {
        try target.assign(machine, item)
        machine.activation.slots[loopSlot] = .object(loop)
        if try step(machine, &completed) { break }
      }
    } else {
      var iterator = try ValueIterator(sequence)
      while let item = try iterator.next() {
        try target.assign(machine, item)
        if try step(machine, &completed) { break }
      }
    }
    if !completed && !otherwise.isEmpty {
      FrameEntry.enter(otherwiseEntries, machine)
      return try runAll(otherwise, machine)
    }
    return .next
  }

  @inline(__always)
  private func step(_ machine: Machine, _ completed: inout Bool) throws -> Bool {
    try machine.charge(2)
    FrameEntry.enter(entries, machine)
    switch try runAll(body, machine) {
    case .next: completed = true
    case .continueLoop: break
    case .breakLoop: return true
    }
    return false
  }
}

/// The `if` of a loop: a generator that takes items as the loop asks for them. It has variables of its own, since the
/// loop may ask for the next item while the body still uses this one.
final class LoopFilter {
  let target: TargetNode
  let entries: [FrameEntry]
  let test: Node
  init(target: TargetNode, entries: [FrameEntry], test: Node) {
    self.target = target
    self.entries = entries
    self.test = test
  }

  func apply(_ machine: Machine, _ iterable: Value) throws -> Value {
    let activation = machine.activation
    var iterator: ValueIterator?
    return .object(
      GeneratorObject { [self] in
        let saved = machine.activation
        machine.activation = activation
        defer { machine.activation = saved }
        if iterator == nil {
          FrameEntry.enter(entries, machine)
          iterator = try ValueIterator(iterable)
        }
        while let item = try iterator!.next() {
          try machine.charge(1)
          try target.assign(machine, item)
          if try test.holds(machine) { return target.gather(machine) }
        }
        return nil
      })
  }
}

final class LoopNode: StatementNode {
  let iterable: Node
  let definition: LoopDefinition
  let line: Int
  init(_ iterable: Node, _ definition: LoopDefinition, line: Int) {
    self.iterable = iterable
    self.definition = definition
    self.line = line
  }
  override func run(_ machine: Machine) throws -> Flow {
    machine.line = line
    try machine.charge(1)
    return try definition.run(machine, over: try iterable.evaluate(machine), depth: 0, recurse: nil)
  }
}

/// A loop that can call itself. Its body is a function with an activation of its own.
final class RecursiveLoopNode: StatementNode {
  let iterable: Node
  let function: FunctionScope
  let definition: LoopDefinition
  let line: Int
  init(_ iterable: Node, _ function: FunctionScope, _ definition: LoopDefinition, line: Int) {
    self.iterable = iterable
    self.function = function
    self.definition = definition
    self.line = line
  }
  override func run(_ machine: Machine) throws -> Flow {
    machine.line = line
    let closure = machine.activation
    let value = try iterate(machine, closure, try iterable.evaluate(machine), 0)
    machine.emit(value)
    return .next
  }

  private func iterate(_ machine: Machine, _ closure: Activation, _ iterable: Value, _ depth: Int) throws -> Value {
    try machine.charge(4)
    var bytes: [UInt8] = []
    try machine.within(Activation(slotCount: function.slotCount, parent: closure)) {
      bytes = try machine.capture {
        _ = try definition.run(machine, over: iterable, depth: depth) { [self] machine, inner, depth in
          try iterate(machine, closure, inner, depth)
        }
      }
    }
    return .string(Text(bytes: bytes))
  }
}

/// The function that a macro or the body of a call block is compiled to.
final class MacroDefinition {
  struct Parameter {
    var name: Text
    var slot: Int
    var defaultValue: Node?
  }
  let name: Text?
  let function: FunctionScope
  let parameters: [Parameter]
  let hasExplicitCaller: Bool
  let callerSlot: Int?
  let keywordsSlot: Int?
  let positionalsSlot: Int?
  let entries: [FrameEntry]
  let body: [StatementNode]
  init(
    name: Text?, function: FunctionScope, parameters: [Parameter], callerSlot: Int?, keywordsSlot: Int?,
    positionalsSlot: Int?, entries: [FrameEntry], body: [StatementNode]
  ) {
    self.name = name
    self.function = function
    self.parameters = parameters
    hasExplicitCaller = parameters.contains { $0.name == Text("caller") }
    self.callerSlot = callerSlot
    self.keywordsSlot = keywordsSlot
    self.positionalsSlot = positionalsSlot
    self.entries = entries
    self.body = body
  }

  /// Runs the body; the parameters given are in their slots.
  func run(_ machine: Machine) throws {
    FrameEntry.enter(entries, machine)
    for parameter in parameters {
      guard case .missing = machine.activation.slots[parameter.slot] else { continue }
      machine.activation.slots[parameter.slot] =
        try parameter.defaultValue?.evaluate(machine)
        ?? .undefined(UndefinedInfo(.hint("parameter \(repr(parameter.name)) was not provided")))
    }
    _ = try runAll(body, machine)
  }
}

final class MacroNode: StatementNode {
  let slot: Int
  let definition: MacroDefinition
  init(slot: Int, _ definition: MacroDefinition) {
    self.slot = slot
    self.definition = definition
  }
  override func run(_ machine: Machine) throws -> Flow {
    machine.activation.slots[slot] = .object(MacroObject(definition, closure: machine.activation))
    return .next
  }
}

final class CallBlockNode: StatementNode {
  let callee: Node
  let arguments: ArgumentNodes
  let definition: MacroDefinition
  let line: Int
  init(_ callee: Node, _ arguments: ArgumentNodes, _ definition: MacroDefinition, line: Int) {
    self.callee = callee
    self.arguments = arguments
    self.definition = definition
    self.line = line
  }
  override func run(_ machine: Machine) throws -> Flow {
    machine.line = line
    let caller = Value.object(MacroObject(definition, closure: machine.activation))
    let function = try callee.evaluate(machine)
    machine.emit(try call(machine, function, try arguments.evaluate(machine, caller: caller)))
    try machine.checkOutput()
    return .next
  }
}

/// `{% with %}` and the scopes without effect.
final class ScopeNode: StatementNode {
  let entries: [FrameEntry]
  let bindings: [(target: TargetNode, value: Node)]
  let body: [StatementNode]
  let line: Int
  init(_ entries: [FrameEntry], _ bindings: [(target: TargetNode, value: Node)], _ body: [StatementNode], line: Int) {
    self.entries = entries
    self.bindings = bindings
    self.body = body
    self.line = line
  }
  override func run(_ machine: Machine) throws -> Flow {
    machine.line = line
    FrameEntry.enter(entries, machine)
    for (target, value) in bindings { try target.assign(machine, try value.evaluate(machine)) }
    return try runAll(body, machine)
  }
}

final class JumpNode: StatementNode {
  let flow: Flow
  init(_ flow: Flow) { self.flow = flow }
  override func run(_ machine: Machine) throws -> Flow { flow }
}
