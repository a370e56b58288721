/// One activation of a function of the compiled template: the template itself, a macro, or a recursive loop.
final class Activation {
  var slots: [Value]
  /// The activation in which the function was defined.
  let parent: Activation?

  init(slotCount: Int, parent: Activation?) {
    slots = [Value](repeating: .missing, count: slotCount)
    self.parent = parent
  }
}

/// What a rendering in progress holds.
final class Machine {
  var output: [UInt8] = []
  var activation: Activation
  /// Values of the variables that the template takes from outside, by the compiler's numbers.
  let context: [Value]
  let clock: ChatTemplate.Clock
  /// The line of the statement being run.
  var line = 0
  /// How deep macros and recursive loops are nested.
  var depth = 0
  private var remainingSteps: Int
  private let limits: ChatTemplate.Limits

  init(slotCount: Int, context: [Value], limits: ChatTemplate.Limits, clock: @escaping ChatTemplate.Clock) {
    activation = Activation(slotCount: slotCount, parent: nil)
    self.context = context
    self.clock = clock
    self.limits = limits
    remainingSteps = limits.steps
  }

  /// Counts work; more than the limit stops the rendering.
  @inline(__always)
  func charge(_ steps: Int) throws {
    remainingSteps &-= steps
    if remainingSteps < 0 { throw TemplateFault.limit("the template ran for more than \(limits.steps) steps") }
  }

  /// Counts the making of a text.
  @inline(__always)
  func chargeBytes(_ count: Int) throws {
    if count > limits.outputBytes {
      throw TemplateFault.limit("a text grew larger than \(limits.outputBytes) bytes")
    }
    try charge(count >> 5)
  }

  @inline(__always)
  func write(_ bytes: [UInt8]) { output.append(contentsOf: bytes) }

  /// Checks the size of the output, after a statement wrote to it.
  @inline(__always)
  func checkOutput() throws {
    if output.count > limits.outputBytes {
      throw TemplateFault.limit("the output grew larger than \(limits.outputBytes) bytes")
    }
  }

  /// Writes `str(value)`.
  @inline(__always)
  func emit(_ value: Value) {
    switch value {
    case .string(let text): output.append(contentsOf: text.bytes)
    case .missing, .undefined: break
    default: output.append(contentsOf: pythonString(value).bytes)
    }
  }

  /// Collects what `body` writes.
  func capture(_ body: () throws -> Void) throws -> [UInt8] {
    var saved: [UInt8] = []
    swap(&saved, &output)
    defer { swap(&saved, &output) }
    try body()
    try chargeBytes(output.count)
    return output
  }

  /// Runs a function body in an activation of its own.
  func within(_ inner: Activation, _ body: () throws -> Void) throws {
    depth += 1
    if depth > limits.callDepth {
      throw TemplateFault("RecursionError", "maximum recursion depth exceeded")
    }
    let saved = activation
    activation = inner
    defer {
      activation = saved
      depth -= 1
    }
    try body()
  }
}

/// Where a statement hands control on.
enum Flow { case next, breakLoop, continueLoop }

/// The special variable of a loop, with one element of lookahead.
final class LoopObject: TemplateObject {
  private let iterable: Value
  private var iterator: ValueIterator
  private let recurse: ((Machine, Value, Int) throws -> Value)?
  private let depth0: Int
  private var index0 = -1
  private var cachedLength: Int?
  private var after: Value?
  private var exhausted = false
  private var current: Value = .missing
  private var before: Value = .missing
  private var lastChanged: [Value]?

  init(_ iterable: Value, depth0: Int = 0, recurse: ((Machine, Value, Int) throws -> Value)? = nil) throws {
    self.iterable = iterable
    self.iterator = try ValueIterator(iterable)
    self.depth0 = depth0
    self.recurse = recurse
  }

  override var isLoop: Bool { true }
  override var typeName: String { "LoopContext" }
  override var isBuiltinType: Bool { false }
  override var isCallable: Bool { true }
  override func repr(_ depth: Int) -> String { "<LoopContext \(index0 + 1)/\((try? length()) ?? 0)>" }
  override var isTruthy: Bool { ((try? length()) ?? 0) != 0 }

  func length() throws -> Int {
    if let cachedLength { return cachedLength }
    let result: Int
    if let known = try? pythonLength(iterable) {
      result = known
    } else {
      var rest: [Value] = []
      while let item = try iterator.next() { rest.append(item) }
      iterator = try ValueIterator(.list(rest))
      result = rest.count + index0 + 1 + (after == nil ? 0 : 1)
    }
    cachedLength = result
    return result
  }

  private func peek() throws -> Value? {
    if after == nil && !exhausted {
      after = try iterator.next()
      exhausted = after == nil
    }
    return after
  }

  func next() throws -> Value? {
    let item: Value
    if let after {
      item = after
      self.after = nil
    } else {
      guard !exhausted, let next = try iterator.next() else { return nil }
      item = next
    }
    index0 += 1
    before = current
    current = item
    return item
  }

  /// A step for a loop over the loop itself, which yields the item and the loop.
  func nextPair() throws -> Value? { try next().map { .tuple([$0, .object(self)]) } }

  override func attribute(_ name: Text) throws -> Value? {
    switch LoopAttribute(name) {
    case nil: nil
    case let attribute?: try self.attribute(attribute)
    }
  }

  func attribute(_ attribute: LoopAttribute) throws -> Value {
    switch attribute {
    case .index: return .int(index0 + 1)
    case .index0: return .int(index0)
    case .revindex: return .int(try length() - index0)
    case .revindex0: return .int(try length() - index0 - 1)
    case .first: return .bool(index0 == 0)
    case .last: return .bool(try peek() == nil)
    case .length: return .int(try length())
    case .depth: return .int(depth0 + 1)
    case .depth0: return .int(depth0)
    case .previtem:
      return index0 == 0 ? .undefined(UndefinedInfo(.hint("there is no previous item"))) : before
    case .nextitem:
      return try peek() ?? .undefined(UndefinedInfo(.hint("there is no next item")))
    case .cycle:
      return .object(
        FunctionObject("cycle", type: "method") { [self] _, arguments in
          guard !arguments.positional.isEmpty else { throw TemplateFault.type("no items for cycling given") }
          return arguments.positional[index0 % arguments.positional.count]
        })
    case .changed:
      return .object(
        FunctionObject("changed", type: "method") { [self] _, arguments in
          if let lastChanged, pythonEqual(.tuple(lastChanged), .tuple(arguments.positional)) { return .bool(false) }
          lastChanged = arguments.positional
          return .bool(true)
        })
    }
  }

  override func call(_ machine: Machine, _ arguments: CallArguments) throws -> Value {
    let bound = try arguments.bind("__call__", ["iterable"], required: 1)
    guard let recurse else {
      throw TemplateFault.type("The loop must have the 'recursive' marker to be called recursively.")
    }
    return try recurse(machine, bound[0]!, depth0 + 1)
  }
}

/// The attributes of a loop, told apart when the template is compiled.
enum LoopAttribute: String {
  case index, index0, revindex, revindex0, first, last, length, depth, depth0, previtem, nextitem, cycle, changed

  init?(_ name: Text) { self.init(rawValue: name.string) }
}

/// A macro, or the body of a call block, with the activation it was defined in.
final class MacroObject: TemplateObject {
  private let definition: MacroDefinition
  private let closure: Activation
  init(_ definition: MacroDefinition, closure: Activation) {
    self.definition = definition
    self.closure = closure
  }

  override var typeName: String { "Macro" }
  override var isBuiltinType: Bool { false }
  override var isCallable: Bool { true }
  override func repr(_ depth: Int) -> String {
    "<Macro \(definition.name.map { ApusTokenization.repr($0) } ?? "anonymous")>"
  }

  override func attribute(_ name: Text) throws -> Value? {
    switch name.string {
    case "name": definition.name.map { .string($0) } ?? Value.none
    case "arguments": .tuple(definition.parameters.map { .string($0.name) })
    case "catch_kwargs": .bool(definition.keywordsSlot != nil)
    case "catch_varargs": .bool(definition.positionalsSlot != nil)
    case "caller": .bool(definition.callerSlot != nil)
    case "explicit_caller": .bool(definition.hasExplicitCaller)
    default: nil
    }
  }

  override func call(_ machine: Machine, _ arguments: CallArguments) throws -> Value {
    let parameters = definition.parameters
    let inner = Activation(slotCount: definition.function.slotCount, parent: closure)
    var keywords = arguments.keywords
    let given = min(arguments.positional.count, parameters.count)
    for position in 0..<given { inner.slots[parameters[position].slot] = arguments.positional[position] }
    var foundCaller = false
    if given < parameters.count {
      for parameter in parameters[given...] {
        if let position = keywords.firstIndex(where: { $0.name == parameter.name }) {
          inner.slots[parameter.slot] = keywords.remove(at: position).value
        }
        if parameter.name == Text("caller") { foundCaller = true }
      }
    } else {
      foundCaller = definition.hasExplicitCaller
    }
    if let slot = definition.callerSlot, !foundCaller {
      if let position = keywords.firstIndex(where: { $0.name == Text("caller") }),
        case let caller = keywords.remove(at: position).value, !isNone(caller)
      {
        inner.slots[slot] = caller
      } else {
        inner.slots[slot] = .undefined(UndefinedInfo(.hint("No caller defined")))
      }
    }
    let shownName = definition.name.map { ApusTokenization.repr($0) } ?? "None"
    if let slot = definition.keywordsSlot {
      inner.slots[slot] = .dict(
        DictBox(uniqueKeys: keywords.map { .string($0.name) }, values: keywords.map(\.value)))
    } else if let first = keywords.first {
      if keywords.contains(where: { $0.name == Text("caller") }) {
        throw TemplateFault.type(
          "macro \(shownName) was invoked with two values for the special caller argument. "
            + "This is most likely a bug.")
      }
      throw TemplateFault.type("macro \(shownName) takes no keyword argument \(ApusTokenization.repr(first.name))")
    }
    if let slot = definition.positionalsSlot {
      inner.slots[slot] = .tuple(Array(arguments.positional.dropFirst(parameters.count)))
    } else if arguments.positional.count > parameters.count {
      throw TemplateFault.type("macro \(shownName) takes not more than \(parameters.count) argument(s)")
    }
    try machine.charge(8)
    var bytes: [UInt8] = []
    try machine.within(inner) {
      bytes = try machine.capture { try definition.run(machine) }
    }
    return .string(Text(bytes: bytes))
  }

  private func isNone(_ value: Value) -> Bool {
    if case .none = value { true } else { false }
  }
}
