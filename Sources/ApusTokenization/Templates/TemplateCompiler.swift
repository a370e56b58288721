/// Variables of one frame, found as jinja2's identifier tracking finds them: a name that is assigned anywhere in a frame
/// is a variable of that frame from its start, with the outer variable's value, the context's value, or none.
final class Symbols {
  enum Load {
    /// A parameter, set by whoever enters the frame.
    case parameter
    /// The value of the context at the frame's entry.
    case resolve(String)
    /// The value of an outer variable at the frame's entry.
    case alias(String)
    /// No value at the frame's entry.
    case undefined
  }

  let level: Int
  let parent: Symbols?
  var references: [String: String] = [:]
  var loads: [String: Load] = [:]
  /// Identifiers of `loads` in order of first appearance.
  var order: [String] = []
  var stores: Set<String> = []

  init(parent: Symbols?) {
    self.parent = parent
    level = parent.map { $0.level + 1 } ?? 0
  }

  private init(copying other: Symbols) {
    level = other.level
    parent = other.parent
    references = other.references
    loads = other.loads
    order = other.order
    stores = other.stores
  }

  func copy() -> Symbols { Symbols(copying: self) }

  func find(_ name: String) -> String? { references[name] ?? parent?.find(name) }

  private func setLoad(_ identifier: String, _ load: Load) {
    if loads.updateValue(load, forKey: identifier) == nil { order.append(identifier) }
  }

  @discardableResult
  private func define(_ name: String, _ load: Load) -> String {
    let identifier = "l_\(level)_\(name)"
    references[name] = identifier
    setLoad(identifier, load)
    return identifier
  }

  func store(_ name: String) {
    stores.insert(name)
    guard references[name] == nil else { return }
    if let outer = parent?.find(name) { define(name, .alias(outer)) } else { define(name, .undefined) }
  }

  @discardableResult
  func declareParameter(_ name: String) -> String {
    stores.insert(name)
    return define(name, .parameter)
  }

  func load(_ name: String) {
    if find(name) == nil { define(name, .resolve(name)) }
  }

  /// Merges what the branches of a condition assigned.
  func merge(_ branches: [Symbols]) {
    var added: Set<String> = []
    for branch in branches { added.formUnion(branch.stores) }
    added.subtract(stores)
    for branch in branches {
      references.merge(branch.references) { $1 }
      for identifier in branch.order { setLoad(identifier, branch.loads[identifier]!) }
      stores.formUnion(branch.stores)
    }
    for name in added.sorted() {
      guard let target = find(name) else { continue }
      if let outer = parent?.find(name) { setLoad(target, .alias(outer)) } else { setLoad(target, .resolve(name)) }
    }
  }

  // MARK: Walking the tree

  func visit(_ statements: [Statement]) {
    var current = self
    for statement in statements { Symbols.visit(statement, &current) }
  }

  /// Visits a statement as part of a frame. `symbols` stands for the frame, or for the branch being walked.
  private static func visit(_ statement: Statement, _ symbols: inout Symbols) {
    switch statement.kind {
    case .output(let parts):
      for case .expression(let expression, _) in parts { symbols.visit(expression) }
    case .loop(_, let over, _, _, _, _): symbols.visit(over)
    case .branch(let branches, let otherwise):
      symbols.visit(branches[0].test)
      let original = symbols
      func inner(_ body: (inout Symbols) -> Void) -> Symbols {
        var copy = original.copy()
        body(&copy)
        return copy
      }
      let first = inner { copy in for statement in branches[0].body { visit(statement, &copy) } }
      // The reference walks the further branches as nested conditions, one after the other in one copy.
      let further = inner { copy in
        for branch in branches.dropFirst() {
          let single = Statement(kind: .branch([branch], otherwise: []), line: statement.line)
          visit(single, &copy)
        }
      }
      let last = inner { copy in for statement in otherwise { visit(statement, &copy) } }
      original.merge([first, further, last])
    case .set(let target, let value):
      symbols.visit(value)
      symbols.visit(target)
    case .setBlock(let target, _, _): symbols.visit(target)
    case .macro(let name, _, _): symbols.store(name.string)
    case .callBlock(_, let call, _):
      symbols.visit(call.0)
      symbols.visit(call.1)
    case .filterBlock(let filter, _): symbols.visit(filter)
    case .with(let bindings, _): for binding in bindings { symbols.visit(binding.value) }
    case .scope, .breakLoop, .continueLoop: break
    }
  }

  func visit(_ target: AssignmentTarget, asParameter: Bool = false) {
    switch target {
    case .name(let name): if asParameter { declareParameter(name.string) } else { store(name.string) }
    case .namespaceAttribute(let name, _): load(name.string)
    case .tuple(let targets): for target in targets { visit(target, asParameter: asParameter) }
    }
  }

  func visit(_ list: ArgumentList) {
    for expression in list.positional { visit(expression) }
    for keyword in list.keywords { visit(keyword.value) }
    if let spread = list.spread { visit(spread) }
    if let spread = list.keywordSpread { visit(spread) }
  }

  func visit(_ expression: Expression) {
    forEachName(expression) { load($0.string) }
  }
}

/// Calls `visit` with an expression and every expression within it.
func walk(_ expression: Expression, _ visit: (Expression) -> Void) {
  func walkAll(_ items: [Expression?]) { for case let item? in items { walk(item, visit) } }
  func walkList(_ list: ArgumentList) {
    walkAll(list.positional)
    walkAll(list.keywords.map(\.value))
    walkAll([list.spread, list.keywordSpread])
  }
  visit(expression)
  switch expression {
  case .constant, .name: break
  case .tuple(let items), .list(let items), .concat(let items): walkAll(items)
  case .dict(let items): for item in items { walkAll([item.key, item.value]) }
  case .conditional(let test, let then, let otherwise, _): walkAll([test, then, otherwise])
  case .or(let left, let right), .and(let left, let right), .binary(_, let left, let right):
    walkAll([left, right])
  case .not(let operand), .negate(let operand), .plus(let operand): walk(operand, visit)
  case .compare(let first, let operations):
    walk(first, visit)
    for operation in operations { walk(operation.operand, visit) }
  case .attribute(let object, _): walk(object, visit)
  case .item(let object, let key): walkAll([object, key])
  case .slice(let object, let start, let stop, let step): walkAll([object, start, stop, step])
  case .call(let callee, let arguments):
    walk(callee, visit)
    walkList(arguments)
  case .filter(let operand, _, let arguments, _):
    walkAll([operand])
    walkList(arguments)
  case .test(let operand, _, let arguments, _):
    walk(operand, visit)
    walkList(arguments)
  }
}

/// Calls `body` with every name that an expression reads.
func forEachName(_ expression: Expression, _ body: (Text) -> Void) {
  walk(expression) { if case .name(let name) = $0 { body(name) } }
}

/// Finds which of some special names a body reads before it assigns them, in the order of the tree.
struct UndeclaredNames {
  private var names: Set<String>
  private(set) var found: Set<String> = []

  init(_ names: Set<String>, in body: [Statement]) {
    self.names = names
    visit(body)
  }

  private mutating func visit(_ expression: Expression) {
    var read: [String] = []
    forEachName(expression) { read.append($0.string) }
    for name in read where names.contains(name) { found.insert(name) }
  }

  private mutating func visit(_ list: ArgumentList) {
    visit(.call(.constant(.none), list))
  }

  private mutating func visit(_ target: AssignmentTarget) {
    switch target {
    case .name(let name): names.remove(name.string)
    case .namespaceAttribute: break
    case .tuple(let targets): for target in targets { visit(target) }
    }
  }

  private mutating func visit(_ signature: MacroSignature) {
    for name in signature.parameters { names.remove(name.string) }
    for value in signature.defaults { visit(value) }
  }

  private mutating func visit(_ statements: [Statement]) {
    for statement in statements {
      switch statement.kind {
      case .output(let parts): for case .expression(let expression, _) in parts { visit(expression) }
      case .loop(let target, let over, let test, _, let body, let otherwise):
        visit(target)
        visit(over)
        visit(body)
        visit(otherwise)
        if let test { visit(test) }
      case .branch(let branches, let otherwise):
        for branch in branches {
          visit(branch.test)
          visit(branch.body)
        }
        visit(otherwise)
      case .set(let target, let value):
        visit(target)
        visit(value)
      case .setBlock(let target, let filter, let body):
        visit(target)
        if let filter { visit(filter) }
        visit(body)
      case .macro(_, let signature, let body):
        visit(signature)
        visit(body)
      case .callBlock(let signature, let call, let body):
        visit(call.0)
        visit(call.1)
        visit(signature)
        visit(body)
      case .filterBlock(let filter, let body):
        visit(body)
        visit(filter)
      case .with(let bindings, let body):
        for binding in bindings { visit(binding.target) }
        for binding in bindings { visit(binding.value) }
        visit(body)
      case .scope(let body): visit(body)
      case .breakLoop, .continueLoop: break
      }
    }
  }
}

/// The slots of one function of the compiled template.
final class FunctionScope {
  let parent: FunctionScope?
  private var slots: [String: Int] = [:]
  private(set) var slotCount = 0
  init(parent: FunctionScope?) { self.parent = parent }

  func slot(_ identifier: String) -> Int? { slots[identifier] }

  @discardableResult
  func declare(_ identifier: String) -> Int {
    if let slot = slots[identifier] { return slot }
    slots[identifier] = slotCount
    slotCount += 1
    return slotCount - 1
  }

  /// A slot that no name refers to.
  func declareHidden() -> Int {
    slotCount += 1
    return slotCount - 1
  }
}

/// Turns the tree into nodes with slots for names.
struct TemplateCompiler {
  private var function = FunctionScope(parent: nil)
  private var symbols = Symbols(parent: nil)
  /// Prefix of the identifiers of a loop's filter, which has variables of its own.
  private var identifierPrefix: (level: Int, prefix: String)?
  private var contextIndices: [String: Int] = [:]
  private(set) var contextNames: [String] = []
  private var loopDepth = 0
  /// Whether an unknown filter or test is an error only when it is reached, as it is within conditions.
  private var isSoft = false
  private var filterCount = 0
  private var capturedSlot: Int?
  private var line = 1

  static func compile(_ statements: [Statement]) throws -> CompiledTemplate {
    var compiler = TemplateCompiler()
    compiler.symbols.visit(statements)
    let entries = compiler.enter(compiler.symbols)
    let body = try compiler.compile(statements)
    return CompiledTemplate(
      function: compiler.function, entries: entries, body: body, contextNames: compiler.contextNames)
  }

  // MARK: Frames

  private mutating func contextIndex(_ name: String) -> Int {
    if let index = contextIndices[name] { return index }
    contextIndices[name] = contextNames.count
    contextNames.append(name)
    return contextNames.count - 1
  }

  private func identifier(_ identifier: String) -> String {
    if let identifierPrefix, identifier.hasPrefix("l_\(identifierPrefix.level)_") {
      return identifierPrefix.prefix + identifier
    }
    return identifier
  }

  /// Declares a frame's variables in the current function and says how they get their values.
  private mutating func enter(_ frame: Symbols) -> [FrameEntry] {
    var entries: [FrameEntry] = []
    for name in frame.order {
      let slot = function.declare(identifier(name))
      switch frame.loads[name]! {
      case .parameter: break
      case .resolve(let variable): entries.append(.resolve(slot: slot, context: contextIndex(variable)))
      case .alias(let outer): entries.append(.alias(slot: slot, of: reference(outer)))
      case .undefined: entries.append(.clear(slot: slot))
      }
    }
    return entries
  }

  private func reference(_ identifier: String) -> Reference {
    var hops = 0
    var scope: FunctionScope? = function
    let name = self.identifier(identifier)
    while let current = scope {
      if let slot = current.slot(name) { return Reference(hops: hops, slot: slot) }
      hops += 1
      scope = current.parent
    }
    // Every identifier is declared when its frame is entered, which is before anything refers to it.
    preconditionFailure("undeclared identifier \(name)")
  }

  /// The reference of a name. A name that the analysis did not meet is added to the frame as a lookup in the context.
  private mutating func reference(of name: Text) -> Reference? {
    symbols.find(name.string).map { reference($0) }
  }

  /// Compiles in a frame within the current one, in the same function.
  private mutating func inFrame<T>(
    _ frame: Symbols, _ body: (inout TemplateCompiler, [FrameEntry]) throws -> T
  ) rethrows -> T {
    let saved = (symbols, isSoft)
    let entries = enter(frame)
    symbols = frame
    isSoft = false
    defer { (symbols, isSoft) = saved }
    return try body(&self, entries)
  }

  /// Compiles in a function of its own.
  private mutating func inFunction<T>(_ body: (inout TemplateCompiler, FunctionScope) throws -> T) rethrows -> T {
    let saved = (function, loopDepth, isSoft)
    function = FunctionScope(parent: function)
    loopDepth = 0
    isSoft = false
    defer { (function, loopDepth, isSoft) = saved }
    return try body(&self, function)
  }

  // MARK: Statements

  private mutating func compile(_ statements: [Statement]) throws -> [StatementNode] {
    var nodes: [StatementNode] = []
    for statement in statements {
      line = statement.line
      nodes.append(try compile(statement))
    }
    return nodes
  }

  private mutating func compile(_ statement: Statement) throws -> StatementNode {
    let line = statement.line
    switch statement.kind {
    case .output(let parts):
      var compiled: [OutputNode.Part] = []
      for part in parts {
        switch part {
        case .data(let bytes): compiled.append(.data(bytes))
        case .expression(let expression, let line):
          self.line = line
          let node = try compile(expression)
          if let constant = node as? ConstantNode {
            compiled.append(.data(pythonString(constant.value).bytes))
          } else {
            compiled.append(.node(node))
          }
        }
      }
      return OutputNode(compiled, line: line)
    case .loop(let target, let over, let test, let isRecursive, let body, let otherwise):
      return try compileLoop(target, over, test, isRecursive, body, otherwise, line: line)
    case .branch(let branches, let otherwise):
      let savedSoft = isSoft
      isSoft = true
      defer { isSoft = savedSoft }
      var compiled: [(test: Node, body: [StatementNode])] = []
      for branch in branches { compiled.append((try compile(branch.test), try compile(branch.body))) }
      return BranchNode(compiled, try compile(otherwise), line: line)
    case .set(let target, let value):
      try checkLoopName(target, line: line)
      return SetNode(compile(target), try compile(value), line: line)
    case .setBlock(let target, let filter, let body):
      try checkLoopName(target, line: line)
      return try compileCapture(target: target, filter: filter, body: body, line: line)
    case .filterBlock(let filter, let body):
      return try compileCapture(target: nil, filter: filter, body: body, line: line)
    case .macro(let name, let signature, let body):
      if loopDepth > 0 && name == Text("loop") { throw loopNameFault(line) }
      let definition = try compileMacro(name, signature, body, line: line)
      return MacroNode(slot: reference(of: name)!.slot, definition)
    case .callBlock(let signature, let call, let body):
      let definition = try compileMacro(nil, signature, body, line: line)
      return CallBlockNode(try compile(call.0), try compile(call.1), definition, line: line)
    case .with(let bindings, let body):
      let frame = Symbols(parent: symbols)
      for binding in bindings { frame.visit(binding.target, asParameter: true) }
      frame.visit(body)
      var values: [Node] = []
      for binding in bindings { values.append(try compile(binding.value)) }
      return try inFrame(frame) { compiler, entries in
        var compiled: [(target: TargetNode, value: Node)] = []
        for (binding, value) in zip(bindings, values) {
          compiled.append((compiler.compile(binding.target), value))
        }
        return ScopeNode(entries, compiled, try compiler.compile(body), line: line)
      }
    case .scope(let body):
      let frame = Symbols(parent: symbols)
      frame.visit(body)
      return try inFrame(frame) { compiler, entries in
        ScopeNode(entries, [], try compiler.compile(body), line: line)
      }
    case .breakLoop, .continueLoop:
      var isBreak = false
      if case .breakLoop = statement.kind { isBreak = true }
      guard loopDepth > 0 else {
        throw TemplateFault.syntax(
          isBreak ? "'break' outside loop" : "'continue' not properly in loop", line: line)
      }
      return JumpNode(isBreak ? .breakLoop : .continueLoop)
    }
  }

  private func loopNameFault(_ line: Int) -> TemplateFault {
    .syntax("Can't assign to special loop variable in for-loop target", line: line)
  }

  /// Refuses assignments to `loop` within a loop.
  private func checkLoopName(_ target: AssignmentTarget, line: Int) throws {
    guard loopDepth > 0 else { return }
    switch target {
    case .name(let name): if name == Text("loop") { throw loopNameFault(line) }
    case .namespaceAttribute: break
    case .tuple(let targets): for target in targets { try checkLoopName(target, line: line) }
    }
  }

  private mutating func compile(_ target: AssignmentTarget) -> TargetNode {
    switch target {
    case .name(let name): .slot(reference(of: name)!.slot)
    case .namespaceAttribute(let name, let attribute): .namespace(reference(of: name)!, attribute)
    case .tuple(let targets): .tuple(targets.map { compile($0) })
    }
  }

  private mutating func compileCapture(
    target: AssignmentTarget?, filter: Expression?, body: [Statement], line: Int
  ) throws -> StatementNode {
    let frame = Symbols(parent: symbols)
    frame.visit(body)
    if let filter { frame.visit(filter) }
    let captured = function.declareHidden()
    let targetNode = target.map { compile($0) }
    return try inFrame(frame) { compiler, entries in
      let statements = try compiler.compile(body)
      var filterNode: Node?
      if let filter {
        let saved = compiler.capturedSlot
        compiler.capturedSlot = captured
        defer { compiler.capturedSlot = saved }
        filterNode = try compiler.compile(filter)
      }
      return CaptureNode(
        target: targetNode, entries: entries, body: statements, captured: captured, filter: filterNode, line: line)
    }
  }

  private mutating func compileLoop(
    _ target: AssignmentTarget, _ over: Expression, _ test: Expression?, _ isRecursive: Bool, _ body: [Statement],
    _ otherwise: [Statement], line: Int
  ) throws -> StatementNode {
    loopDepth += 1
    defer { loopDepth -= 1 }
    try checkLoopName(target, line: line)
    let usesLoop = isRecursive || !UndeclaredNames(["loop"], in: body).found.isEmpty
    let loopFrame = Symbols(parent: symbols)
    let testFrame = Symbols(parent: symbols)
    let otherwiseFrame = Symbols(parent: symbols)
    if usesLoop { loopFrame.declareParameter("loop") }
    loopFrame.visit(target, asParameter: true)
    loopFrame.visit(body)
    otherwiseFrame.visit(otherwise)
    let iterable = try compile(over)

    func definition(_ compiler: inout TemplateCompiler) throws -> LoopDefinition {
      var filter: LoopFilter?
      if let test {
        testFrame.visit(target, asParameter: true)
        testFrame.visit(test)
        compiler.filterCount += 1
        let savedPrefix = compiler.identifierPrefix
        compiler.identifierPrefix = (testFrame.level, "t\(compiler.filterCount)_")
        defer { compiler.identifierPrefix = savedPrefix }
        filter = try compiler.inFrame(testFrame) { compiler, entries in
          LoopFilter(target: compiler.compile(target), entries: entries, test: try compiler.compile(test))
        }
      }
      let (targetNode, loopSlot, entries, statements) = try compiler.inFrame(loopFrame) { compiler, entries in
        (
          compiler.compile(target), usesLoop ? compiler.reference(of: Text("loop"))!.slot : nil, entries,
          try compiler.compile(body)
        )
      }
      compiler.loopDepth -= 1
      defer { compiler.loopDepth += 1 }
      let (otherwiseEntries, otherwiseStatements) = try compiler.inFrame(otherwiseFrame) { compiler, entries in
        (entries, try compiler.compile(otherwise))
      }
      return LoopDefinition(
        target: targetNode, loopSlot: loopSlot, entries: entries, body: statements,
        otherwiseEntries: otherwiseEntries, otherwise: otherwiseStatements, filter: filter)
    }

    if isRecursive {
      return try inFunction { compiler, function in
        compiler.loopDepth = 1
        return RecursiveLoopNode(iterable, function, try definition(&compiler), line: line)
      }
    }
    return LoopNode(iterable, try definition(&self), line: line)
  }

  private mutating func compileMacro(
    _ name: Text?, _ signature: MacroSignature, _ body: [Statement], line: Int
  ) throws -> MacroDefinition {
    let frame = Symbols(parent: symbols)
    for parameter in signature.parameters { frame.declareParameter(parameter.string) }
    for value in signature.defaults { frame.visit(value) }
    frame.visit(body)
    let special = UndeclaredNames(["caller", "kwargs", "varargs"], in: body).found
    var needsCaller = false
    if special.contains("caller") {
      if let position = signature.parameters.firstIndex(of: Text("caller")) {
        if position < signature.parameters.count - signature.defaults.count {
          throw TemplateFault.syntax(
            "When defining macros or call blocks the special \"caller\" argument must be omitted or be given a "
              + "default.", line: line)
        }
      } else {
        needsCaller = true
        frame.declareParameter("caller")
      }
    }
    let needsKeywords = special.contains("kwargs") && !signature.parameters.contains(Text("kwargs"))
    let needsPositionals = special.contains("varargs") && !signature.parameters.contains(Text("varargs"))
    if needsKeywords { frame.declareParameter("kwargs") }
    if needsPositionals { frame.declareParameter("varargs") }
    return try inFunction { compiler, function in
      try compiler.inFrame(frame) { compiler, entries in
        func slot(_ name: String) -> Int { function.slot("l_\(frame.level)_\(name)")! }
        var parameters: [MacroDefinition.Parameter] = []
        let firstDefault = signature.parameters.count - signature.defaults.count
        for (position, name) in signature.parameters.enumerated() {
          let value = position >= firstDefault ? try compiler.compile(signature.defaults[position - firstDefault]) : nil
          parameters.append(.init(name: name, slot: slot(name.string), defaultValue: value))
        }
        return MacroDefinition(
          name: name, function: function, parameters: parameters, callerSlot: needsCaller ? slot("caller") : nil,
          keywordsSlot: needsKeywords ? slot("kwargs") : nil,
          positionalsSlot: needsPositionals ? slot("varargs") : nil, entries: entries,
          body: try compiler.compile(body))
      }
    }
  }

  // MARK: Expressions

  private mutating func compile(_ list: [Expression]) throws -> [Node] {
    var nodes: [Node] = []
    nodes.reserveCapacity(list.count)
    for expression in list { nodes.append(try compile(expression)) }
    return nodes
  }

  private mutating func compile(_ list: ArgumentList) throws -> ArgumentNodes {
    var keywords: [(name: Text, value: Node)] = []
    for keyword in list.keywords { keywords.append((keyword.name, try compile(keyword.value))) }
    return ArgumentNodes(
      positional: try compile(list.positional), keywords: keywords, spread: try list.spread.map { try compile($0) },
      keywordSpread: try list.keywordSpread.map { try compile($0) })
  }

  private mutating func compileIfAny(_ list: ArgumentList) throws -> ArgumentNodes? {
    if list.positional.isEmpty && list.keywords.isEmpty && list.spread == nil && list.keywordSpread == nil {
      return nil
    }
    return try compile(list)
  }

  private mutating func compile(_ expression: Expression) throws -> Node {
    switch expression {
    case .constant(let value): return ConstantNode(value)
    case .name(let name):
      guard let reference = reference(of: name) else {
        // Met by no analysis: a name within a part that the reference does not analyse. It is not set.
        return ConstantNode(.undefined(UndefinedInfo(.name(name))))
      }
      return VariableNode(reference, name)
    case .tuple(let items): return SequenceNode(try compile(items), isTuple: true)
    case .list(let items): return SequenceNode(try compile(items), isTuple: false)
    case .dict(let items):
      var compiled: [(key: Node, value: Node)] = []
      for item in items { compiled.append((try compile(item.key), try compile(item.value))) }
      return DictNode(compiled)
    case .conditional(let test, let then, let otherwise, let line):
      let savedSoft = isSoft
      isSoft = true
      defer { isSoft = savedSoft }
      return ConditionalNode(
        try compile(test), try compile(then), try otherwise.map { try compile($0) }, line: line)
    case .or(let left, let right): return OrNode(try compile(left), try compile(right))
    case .and(let left, let right): return AndNode(try compile(left), try compile(right))
    case .not(let operand): return NotNode(try compile(operand))
    case .compare(let first, let operations):
      var compiled: [(operation: Comparison, operand: Node)] = []
      let left = try compile(first)
      for operation in operations { compiled.append((operation.operation, try compile(operation.operand))) }
      return CompareNode(left, compiled)
    case .binary(.add, _, _):
      var operands: [Expression] = []
      var current = expression
      while case .binary(.add, let left, let right) = current {
        operands.append(right)
        current = left
      }
      operands.append(current)
      return AddNode(try compile(operands.reversed()))
    case .binary(let operation, let left, let right):
      return BinaryNode(operation, try compile(left), try compile(right))
    case .negate(let operand): return fold(SignNode(try compile(operand), isNegative: true))
    case .plus(let operand): return SignNode(try compile(operand), isNegative: false)
    case .concat(let items): return ConcatNode(try compile(items))
    case .attribute(let object, let name):
      let node = try compile(object)
      let attribute = AttributeName(name)
      if let variable = node as? VariableNode, variable.name == Text("loop"), let loop = LoopAttribute(name) {
        return LoopAttributeNode(node, loop, attribute)
      }
      return AttributeNode(node, attribute)
    case .item(let object, .constant(.string(let key))): return KeyNode(try compile(object), key)
    case .item(let object, let key): return ItemNode(try compile(object), try compile(key))
    case .slice(let object, let start, let stop, let step):
      return SliceNode(
        try compile(object), try start.map { try compile($0) }, try stop.map { try compile($0) },
        try step.map { try compile($0) })
    case .call(let callee, let arguments): return CallNode(try compile(callee), try compile(arguments))
    case .filter(let operand, let name, let arguments, let line):
      let node = try operand.map { try compile($0) } ?? CapturedNode(slot: capturedSlot!)
      guard let filter = filters[name.string] else {
        if !isSoft { throw TemplateFault.syntax("No filter named \(repr(name)).", line: line) }
        return FilterNode(
          node, { _, _, _ in throw TemplateFault.runtime("No filter named \(repr(name)) found.") },
          try compileIfAny(arguments))
      }
      return FilterNode(node, filter, try compileIfAny(arguments))
    case .test(let operand, let name, let arguments, let line):
      let node = try compile(operand)
      let compiledArguments = try compileIfAny(arguments)
      if compiledArguments == nil {
        switch name.string {
        case "defined": return KindTestNode(node, .defined)
        case "undefined": return KindTestNode(node, .undefined)
        case "none": return KindTestNode(node, .none)
        case "string": return KindTestNode(node, .string)
        case "mapping": return KindTestNode(node, .mapping)
        default: break
        }
      }
      guard let test = tests[name.string] else {
        if !isSoft { throw TemplateFault.syntax("No test named \(repr(name)).", line: line) }
        return TestNode(
          node, { _, _, _ in throw TemplateFault.runtime("No test named \(repr(name)) found.") }, compiledArguments)
      }
      return TestNode(node, test, compiledArguments)
    }
  }

  /// A negative literal is a constant.
  private func fold(_ node: SignNode) -> Node {
    if let constant = node.operand as? ConstantNode {
      switch constant.value {
      case .int(let value) where value != .min: return ConstantNode(.int(-value))
      case .double(let value): return ConstantNode(.double(-value))
      default: break
      }
    }
    return node
  }
}

/// A template ready to be run. Immutable.
final class CompiledTemplate: @unchecked Sendable {
  let function: FunctionScope
  let entries: [FrameEntry]
  let body: [StatementNode]
  /// The variables that the template takes from outside.
  let contextNames: [String]

  init(function: FunctionScope, entries: [FrameEntry], body: [StatementNode], contextNames: [String]) {
    self.function = function
    self.entries = entries
    self.body = body
    self.contextNames = contextNames
  }

  /// Renders with the values of `contextNames`.
  func run(_ context: [Value], limits: ChatTemplate.Limits, clock: @escaping ChatTemplate.Clock) throws -> [UInt8] {
    let machine = Machine(slotCount: function.slotCount, context: context, limits: limits, clock: clock)
    machine.output.reserveCapacity(4096)
    do {
      FrameEntry.enter(entries, machine)
      _ = try runAll(body, machine)
      return machine.output
    } catch var fault as TemplateFault {
      if fault.line == nil { fault.line = machine.line }
      throw fault
    }
  }
}
