/// A recursive-descent parser with the grammar of jinja2 3.1, its loop controls and the `generation` block of
/// transformers. Templates that would need other files are refused.
struct TemplateParser {
  private let tokens: [TemplateToken]
  private var position = 0
  private var depth = 0
  private var tagStack: [Text] = []
  private var endTokenStack: [[String]] = []

  /// Deeper nesting is refused, since the tree is walked recursively.
  static let depthLimit = 150

  init(_ source: String) throws {
    tokens = try TemplateLexer.tokenize(source)
  }

  static func parse(_ source: String) throws -> [Statement] {
    var parser = try TemplateParser(source)
    return try parser.statements(until: nil)
  }

  // MARK: Tokens

  private var current: TemplateToken { tokens[position] }
  private var lookahead: TemplateToken { tokens[min(position + 1, tokens.count - 1)] }

  private mutating func advance() {
    if position < tokens.count - 1 { position += 1 }
  }

  private func isSymbol(_ text: StaticString) -> Bool { isSymbol(current, text) }

  private func isSymbol(_ token: TemplateToken, _ text: StaticString) -> Bool {
    token.kind == .symbol && equals(token.text, text)
  }

  private func isName(_ text: StaticString) -> Bool { isName(current, text) }

  private func isName(_ token: TemplateToken, _ text: StaticString) -> Bool {
    token.kind == .name && equals(token.text, text)
  }

  private func equals(_ text: Text, _ other: StaticString) -> Bool {
    text.bytes.count == other.utf8CodeUnitCount
      && text.bytes.elementsEqual(UnsafeBufferPointer(start: other.utf8Start, count: other.utf8CodeUnitCount))
  }

  private mutating func skip(symbol: StaticString) -> Bool {
    guard isSymbol(symbol) else { return false }
    advance()
    return true
  }

  private mutating func skip(name: StaticString) -> Bool {
    guard isName(name) else { return false }
    advance()
    return true
  }

  private func describe(_ token: TemplateToken) -> String {
    switch token.kind {
    case .name, .symbol: token.text.string
    case .string: "string"
    case .integer: "integer"
    case .float: "float"
    case .data: "template data / text"
    case .blockBegin: "begin of statement block"
    case .blockEnd: "end of statement block"
    case .variableBegin: "begin of print statement"
    case .variableEnd: "end of print statement"
    case .end: "end of template"
    }
  }

  private func fail(_ message: String, line: Int? = nil) -> TemplateFault {
    .syntax(message, line: line ?? current.line)
  }

  private func unexpected(_ expected: String) -> TemplateFault {
    current.kind == .end
      ? fail("unexpected end of template, expected \(repr(Text(expected))).")
      : fail("expected token \(repr(Text(expected))), got \(repr(Text(describe(current))))")
  }

  private mutating func expect(symbol: StaticString) throws {
    guard skip(symbol: symbol) else { throw unexpected(symbol.description) }
  }

  private mutating func expect(name: StaticString) throws {
    guard skip(name: name) else { throw unexpected(name.description) }
  }

  private mutating func expectName() throws -> Text {
    guard current.kind == .name else { throw unexpected("name") }
    defer { advance() }
    return current.text
  }

  private mutating func expectBlockEnd() throws {
    guard current.kind == .blockEnd else { throw unexpected("end of statement block") }
    advance()
  }

  /// Guards a level of nesting.
  private mutating func nested<T>(_ body: (inout TemplateParser) throws -> T) throws -> T {
    depth += 1
    defer { depth -= 1 }
    if depth > Self.depthLimit {
      throw fail("the template is nested more than \(Self.depthLimit) levels deep")
    }
    return try body(&self)
  }

  // MARK: Statements

  /// Parses until one of the tags given, which is left unread; with `nil`, until the end of the template.
  private mutating func statements(until ends: [String]?) throws -> [Statement] {
    var body: [Statement] = []
    var parts: [OutputPart] = []
    var partsLine = 0
    if let ends { endTokenStack.append(ends) }
    defer { if ends != nil { endTokenStack.removeLast() } }
    func flush() {
      if !parts.isEmpty { body.append(Statement(kind: .output(parts), line: partsLine)) }
      parts = []
    }
    while current.kind != .end {
      if parts.isEmpty { partsLine = current.line }
      switch current.kind {
      case .data:
        parts.append(.data(current.text.bytes))
        advance()
      case .variableBegin:
        let line = current.line
        advance()
        parts.append(.expression(try tuple(), line: line))
        guard current.kind == .variableEnd else { throw unexpected("end of print statement") }
        advance()
      default:
        flush()
        advance()
        if let ends, current.kind == .name, ends.contains(current.text.string) { return body }
        try body.append(contentsOf: nested { parser throws in try parser.statement() })
        try expectBlockEnd()
      }
    }
    flush()
    if ends != nil { throw endFault(tag: nil) }
    return body
  }

  /// Parses the end of a tag, then a body until one of the tags given.
  private mutating func body(until ends: [String]) throws -> [Statement] {
    _ = skip(symbol: ":")
    try expectBlockEnd()
    return try statements(until: ends)
  }

  private func endFault(tag: Text?) -> TemplateFault {
    var message = tag.map { "Encountered unknown tag \(repr($0))." } ?? "Unexpected end of template."
    if let ends = endTokenStack.last {
      let looking = ends.map { "'\($0)'" }.joined(separator: " or ")
      if let tag, endTokenStack.contains(where: { $0.contains(tag.string) }) {
        message +=
          " You probably made a nesting mistake. Jinja is expecting this tag, but currently looking for \(looking)."
      } else {
        message += " Jinja was looking for the following tags: \(looking)."
      }
    }
    if let innermost = tagStack.last {
      message += " The innermost block that needs to be closed is \(repr(innermost))."
    }
    return fail(message)
  }

  private mutating func statement() throws -> [Statement] {
    guard current.kind == .name else { throw fail("tag name expected") }
    let line = current.line
    let tag = current.text
    tagStack.append(tag)
    var popped = false
    defer { if !popped { tagStack.removeLast() } }
    let kind: Statement.Kind
    switch tag.string {
    case "for": kind = try forStatement()
    case "if": kind = try ifStatement()
    case "set": kind = try setStatement()
    case "macro":
      advance()
      let name = try assignableName()
      let signature = try signature()
      let body = try body(until: ["endmacro"])
      advance()
      kind = .macro(name, signature, body)
    case "call":
      advance()
      let signature = isSymbol("(") ? try signature() : MacroSignature()
      guard case .call(let callee, let arguments) = try expression() else {
        throw fail("expected call", line: line)
      }
      let body = try body(until: ["endcall"])
      advance()
      kind = .callBlock(signature, call: (callee, arguments), body: body)
    case "filter":
      advance()
      let filter = try filterChain(nil, startsInline: true)
      let body = try body(until: ["endfilter"])
      advance()
      kind = .filterBlock(filter: filter!, body: body)
    case "with":
      advance()
      var bindings: [(target: AssignmentTarget, value: Expression)] = []
      while current.kind != .blockEnd {
        if !bindings.isEmpty { try expect(symbol: ",") }
        let target = try assignmentTarget()
        try expect(symbol: "=")
        bindings.append((target, try expression()))
      }
      let body = try body(until: ["endwith"])
      advance()
      kind = .with(bindings, body: body)
    case "generation":
      advance()
      let body = try body(until: ["endgeneration"])
      advance()
      kind = .scope(body)
    case "autoescape":
      advance()
      guard case .constant(let value) = try expression(), !isTruthy(value) else {
        throw TemplateFault(
          TemplateFault.unsupportedKind, "automatic escaping is not supported in chat templates", line: line)
      }
      let body = try body(until: ["endautoescape"])
      advance()
      kind = .scope(body)
    case "print":
      advance()
      var parts: [OutputPart] = []
      while current.kind != .blockEnd {
        if !parts.isEmpty { try expect(symbol: ",") }
        parts.append(.expression(try expression(), line: line))
      }
      kind = .output(parts)
    case "break":
      advance()
      kind = .breakLoop
    case "continue":
      advance()
      kind = .continueLoop
    case "include", "import", "from", "extends", "block":
      throw TemplateFault(
        TemplateFault.unsupportedKind,
        "the tag '\(tag.string)' is not supported: a chat template must be one self-contained file", line: line)
    default:
      tagStack.removeLast()
      popped = true
      throw endFault(tag: tag)
    }
    return [Statement(kind: kind, line: line)]
  }

  private mutating func forStatement() throws -> Statement.Kind {
    advance()
    let target = try assignmentTarget(endsAtIn: true)
    try expect(name: "in")
    let over = try tuple(allowsConditional: false, endsAt: "recursive")
    let test = skip(name: "if") ? try expression() : nil
    let isRecursive = skip(name: "recursive")
    let body = try body(until: ["endfor", "else"])
    var otherwise: [Statement] = []
    if skip(name: "else") {
      otherwise = try self.body(until: ["endfor"])
    }
    advance()
    return .loop(
      target: target, over: over, test: test, isRecursive: isRecursive, body: body, otherwise: otherwise)
  }

  private mutating func ifStatement() throws -> Statement.Kind {
    advance()
    var branches: [(test: Expression, body: [Statement])] = []
    while true {
      let test = try tuple(allowsConditional: false)
      branches.append((test, try body(until: ["elif", "else", "endif"])))
      if skip(name: "elif") { continue }
      var otherwise: [Statement] = []
      if skip(name: "else") { otherwise = try body(until: ["endif"]) }
      advance()
      return .branch(branches, otherwise: otherwise)
    }
  }

  private mutating func setStatement() throws -> Statement.Kind {
    advance()
    let target = try assignmentTarget(allowsNamespace: true)
    if skip(symbol: "=") { return .set(target, try tuple()) }
    let filter = try filterChain(nil)
    let body = try body(until: ["endset"])
    advance()
    return .setBlock(target, filter: filter, body: body)
  }

  private mutating func signature() throws -> MacroSignature {
    var signature = MacroSignature()
    try expect(symbol: "(")
    while !isSymbol(")") {
      if !signature.parameters.isEmpty { try expect(symbol: ",") }
      let name = try assignableName()
      if signature.parameters.contains(name) {
        throw fail("duplicate argument \(repr(name)) in the definition of a macro")
      }
      if skip(symbol: "=") {
        signature.defaults.append(try expression())
      } else if !signature.defaults.isEmpty {
        throw fail("non-default argument follows default argument")
      }
      signature.parameters.append(name)
    }
    try expect(symbol: ")")
    return signature
  }

  private mutating func assignableName() throws -> Text {
    let line = current.line
    let name = try expectName()
    try checkAssignable(name, line: line)
    return name
  }

  private func checkAssignable(_ name: Text, line: Int) throws {
    switch name.string {
    case "true", "false", "none", "True", "False", "None":
      throw fail("can't assign to 'name'", line: line)
    default: return
    }
  }

  private mutating func assignmentTarget(
    allowsNamespace: Bool = false, endsAtIn: Bool = false
  ) throws -> AssignmentTarget {
    let line = current.line
    var targets: [AssignmentTarget] = []
    var isTuple = false
    while true {
      if !targets.isEmpty { try expect(symbol: ",") }
      if isTupleEnd() || (endsAtIn && isName("in")) { break }
      targets.append(
        try nested { parser throws in try parser.singleTarget(allowsNamespace: allowsNamespace, line: line) })
      guard isSymbol(",") else { break }
      isTuple = true
    }
    if !isTuple {
      guard let target = targets.first else {
        throw fail("Expected an expression, got \(repr(Text(describe(current))))")
      }
      return target
    }
    return .tuple(targets)
  }

  private mutating func singleTarget(allowsNamespace: Bool, line: Int) throws -> AssignmentTarget {
    if current.kind == .name {
      let name = current.text
      advance()
      if allowsNamespace && isSymbol(".") {
        advance()
        return .namespaceAttribute(name, try expectName())
      }
      try checkAssignable(name, line: line)
      return .name(name)
    }
    if skip(symbol: "(") {
      // Within parentheses the reference parses an expression, which must be names and tuples of names.
      let expression = try tuple(isParenthesized: true)
      try expect(symbol: ")")
      return try target(of: expression, line: line)
    }
    let expression = try primary()
    return try target(of: expression, line: line)
  }

  private func target(of expression: Expression, line: Int) throws -> AssignmentTarget {
    switch expression {
    case .name(let name):
      try checkAssignable(name, line: line)
      return .name(name)
    case .tuple(let items): return .tuple(try items.map { try target(of: $0, line: line) })
    case .constant: throw fail("can't assign to 'const'", line: line)
    case .list: throw fail("can't assign to 'list'", line: line)
    case .dict: throw fail("can't assign to 'dict'", line: line)
    default: throw fail("can't assign to an expression", line: line)
    }
  }

  // MARK: Expressions

  private func isTupleEnd() -> Bool {
    current.kind == .variableEnd || current.kind == .blockEnd || isSymbol(")")
  }

  /// Parses an expression, or a tuple if a comma follows one.
  private mutating func tuple(
    allowsConditional: Bool = true, endsAt: StaticString? = nil, isParenthesized: Bool = false
  ) throws -> Expression {
    var items: [Expression] = []
    var isTuple = false
    while true {
      if !items.isEmpty { try expect(symbol: ",") }
      if isTupleEnd() { break }
      if let endsAt, isName(endsAt) { break }
      items.append(try expression(allowsConditional: allowsConditional))
      guard isSymbol(",") else { break }
      isTuple = true
    }
    if !isTuple {
      if let item = items.first { return item }
      if !isParenthesized { throw fail("Expected an expression, got \(repr(Text(describe(current))))") }
    }
    return .tuple(items)
  }

  private mutating func expression(allowsConditional: Bool = true) throws -> Expression {
    try nested { parser throws in
      allowsConditional ? try parser.conditional() : try parser.or()
    }
  }

  /// Counts the links of a chain, each of which makes the tree deeper.
  private func checkChain(_ links: inout Int) throws {
    links += 1
    if links > 200 { throw fail("an expression chains more than 200 operations") }
  }

  private mutating func conditional() throws -> Expression {
    let line = current.line
    var left = try or()
    var links = 0
    while skip(name: "if") {
      try checkChain(&links)
      let test = try or()
      let otherwise: Expression? =
        skip(name: "else") ? try nested { parser throws in try parser.conditional() } : nil
      left = .conditional(test: test, then: left, otherwise: otherwise, line: line)
    }
    return left
  }

  private mutating func or() throws -> Expression {
    var left = try and()
    var links = 0
    while skip(name: "or") {
      try checkChain(&links)
      left = .or(left, try and())
    }
    return left
  }

  private mutating func and() throws -> Expression {
    var left = try not()
    var links = 0
    while skip(name: "and") {
      try checkChain(&links)
      left = .and(left, try not())
    }
    return left
  }

  private mutating func not() throws -> Expression {
    if skip(name: "not") { return .not(try nested { parser throws in try parser.not() }) }
    return try compare()
  }

  private mutating func compare() throws -> Expression {
    let left = try sum()
    var operations: [(operation: Comparison, operand: Expression)] = []
    while true {
      if skip(symbol: "==") {
        operations.append((.equal, try sum()))
      } else if skip(symbol: "!=") {
        operations.append((.notEqual, try sum()))
      } else if skip(symbol: "<=") {
        operations.append((.lessOrEqual, try sum()))
      } else if skip(symbol: "<") {
        operations.append((.less, try sum()))
      } else if skip(symbol: ">=") {
        operations.append((.greaterOrEqual, try sum()))
      } else if skip(symbol: ">") {
        operations.append((.greater, try sum()))
      } else if skip(name: "in") {
        operations.append((.contained, try sum()))
      } else if isName("not") && isName(lookahead, "in") {
        advance()
        advance()
        operations.append((.notContained, try sum()))
      } else {
        return operations.isEmpty ? left : .compare(left, operations)
      }
    }
  }

  private mutating func sum() throws -> Expression {
    var left = try concat()
    // Chains of additions are evaluated in a loop, so that only other operators count.
    var links = 0
    while true {
      if skip(symbol: "+") {
        left = .binary(.add, left, try concat())
        links += 1
        if links > 2000 { throw fail("an expression chains more than 2000 additions") }
      } else if skip(symbol: "-") {
        links += 10
        if links > 2000 { throw fail("an expression chains more than 200 subtractions") }
        left = .binary(.subtract, left, try concat())
      } else {
        return left
      }
    }
  }

  private mutating func concat() throws -> Expression {
    var items = [try product()]
    while skip(symbol: "~") { items.append(try product()) }
    return items.count == 1 ? items[0] : .concat(items)
  }

  private mutating func product() throws -> Expression {
    var left = try power()
    var links = 0
    while true {
      let operation: BinaryOperator
      if skip(symbol: "*") {
        operation = .multiply
      } else if skip(symbol: "/") {
        operation = .divide
      } else if skip(symbol: "//") {
        operation = .floorDivide
      } else if skip(symbol: "%") {
        operation = .modulo
      } else {
        return left
      }
      try checkChain(&links)
      left = .binary(operation, left, try power())
    }
  }

  private mutating func power() throws -> Expression {
    var left = try unary()
    var links = 0
    while skip(symbol: "**") {
      try checkChain(&links)
      left = .binary(.power, left, try unary())
    }
    return left
  }

  private mutating func unary(allowsFilter: Bool = true) throws -> Expression {
    var node: Expression
    if skip(symbol: "-") {
      node = .negate(try nested { parser throws in try parser.unary(allowsFilter: false) })
    } else if skip(symbol: "+") {
      node = .plus(try nested { parser throws in try parser.unary(allowsFilter: false) })
    } else {
      node = try primary()
    }
    node = try postfix(node)
    return allowsFilter ? try filtersAndTests(node) : node
  }

  private mutating func primary() throws -> Expression {
    let token = current
    switch token.kind {
    case .name:
      advance()
      switch token.text.string {
      case "true", "True": return .constant(.bool(true))
      case "false", "False": return .constant(.bool(false))
      case "none", "None": return .constant(.none)
      default: return .name(token.text)
      }
    case .string:
      var text = token.text
      advance()
      while current.kind == .string {
        text.bytes.append(contentsOf: current.text.bytes)
        advance()
      }
      return .constant(.string(text))
    case .integer:
      advance()
      guard let value = parseIntegerLiteral(token.text.string) else {
        throw fail("the integer \(token.text.string) needs more than 64 bits, which is not supported", line: token.line)
      }
      return .constant(.int(value))
    case .float:
      advance()
      return .constant(.double(Double(token.text.string) ?? .infinity))
    case .symbol where isSymbol("("):
      advance()
      let inner = try tuple(isParenthesized: true)
      try expect(symbol: ")")
      return inner
    case .symbol where isSymbol("["):
      advance()
      var items: [Expression] = []
      while !isSymbol("]") {
        if !items.isEmpty { try expect(symbol: ",") }
        if isSymbol("]") { break }
        items.append(try expression())
      }
      try expect(symbol: "]")
      return .list(items)
    case .symbol where isSymbol("{"):
      advance()
      var items: [(key: Expression, value: Expression)] = []
      while !isSymbol("}") {
        if !items.isEmpty { try expect(symbol: ",") }
        if isSymbol("}") { break }
        let key = try expression()
        try expect(symbol: ":")
        items.append((key, try expression()))
      }
      try expect(symbol: "}")
      return .dict(items)
    default: throw fail("unexpected \(repr(Text(describe(token))))", line: token.line)
    }
  }

  private func parseIntegerLiteral(_ text: String) -> Int? {
    if text.hasPrefix("0x") || text.hasPrefix("0X") { return Int(text.dropFirst(2), radix: 16) }
    if text.hasPrefix("0o") || text.hasPrefix("0O") { return Int(text.dropFirst(2), radix: 8) }
    if text.hasPrefix("0b") || text.hasPrefix("0B") { return Int(text.dropFirst(2), radix: 2) }
    return Int(text)
  }

  private mutating func postfix(_ start: Expression) throws -> Expression {
    var node = start
    var links = 0
    while true {
      if isSymbol(".") || isSymbol("[") {
        try checkChain(&links)
        node = try subscripted(node)
      } else if isSymbol("(") {
        try checkChain(&links)
        node = .call(node, try arguments())
      } else {
        return node
      }
    }
  }

  private mutating func filtersAndTests(_ start: Expression) throws -> Expression {
    var node = start
    var links = 0
    while true {
      if isSymbol("|") {
        node = try filterChain(node)!
      } else if isName("is") {
        node = try test(node)
      } else if isSymbol("(") {
        node = .call(node, try arguments())
      } else {
        return node
      }
      try checkChain(&links)
    }
  }

  private mutating func subscripted(_ node: Expression) throws -> Expression {
    let line = current.line
    if skip(symbol: ".") {
      let token = current
      advance()
      if token.kind == .name { return .attribute(node, token.text) }
      guard token.kind == .integer, let value = parseIntegerLiteral(token.text.string) else {
        throw fail("expected name or number", line: token.line)
      }
      return .item(node, .constant(.int(value)))
    }
    try expect(symbol: "[")
    var items: [Expression] = []
    var slice: (start: Expression?, stop: Expression?, step: Expression?)?
    while !isSymbol("]") {
      if !items.isEmpty || slice != nil { try expect(symbol: ",") }
      if slice != nil { throw fail("a slice among several subscripts is not supported", line: line) }
      var first: Expression?
      if !isSymbol(":") {
        let item = try expression()
        guard isSymbol(":") else {
          items.append(item)
          continue
        }
        first = item
      }
      if !items.isEmpty { throw fail("a slice among several subscripts is not supported", line: line) }
      advance()
      func endsPart() -> Bool { isSymbol(":") || isSymbol("]") || isSymbol(",") }
      let stop = endsPart() ? nil : try expression()
      var step: Expression?
      if skip(symbol: ":") { step = endsPart() ? nil : try expression() }
      slice = (first, stop, step)
    }
    try expect(symbol: "]")
    if let slice { return .slice(node, start: slice.start, stop: slice.stop, step: slice.step) }
    return .item(node, items.count == 1 ? items[0] : .tuple(items))
  }

  private mutating func arguments() throws -> ArgumentList {
    let line = current.line
    try expect(symbol: "(")
    var list = ArgumentList()
    var needsComma = false
    let fault = fail("invalid syntax for function call expression", line: line)
    while !isSymbol(")") {
      if needsComma {
        try expect(symbol: ",")
        if isSymbol(")") { break }
      }
      if skip(symbol: "*") {
        guard list.spread == nil && list.keywordSpread == nil else { throw fault }
        list.spread = try expression()
      } else if skip(symbol: "**") {
        guard list.keywordSpread == nil else { throw fault }
        list.keywordSpread = try expression()
      } else if current.kind == .name && isSymbol(lookahead, "=") {
        guard list.keywordSpread == nil else { throw fault }
        let name = current.text
        if list.keywords.contains(where: { $0.name == name }) {
          throw fail("keyword argument repeated: \(name.string)", line: line)
        }
        advance()
        advance()
        list.keywords.append((name, try expression()))
      } else {
        guard list.spread == nil && list.keywordSpread == nil && list.keywords.isEmpty else { throw fault }
        list.positional.append(try expression())
      }
      needsComma = true
    }
    try expect(symbol: ")")
    return list
  }

  private mutating func dottedName() throws -> Text {
    var name = try expectName()
    while skip(symbol: ".") {
      name.bytes.append(UInt8(ascii: "."))
      name.bytes.append(contentsOf: try expectName().bytes)
    }
    return name
  }

  private mutating func filterChain(_ start: Expression?, startsInline: Bool = false) throws -> Expression? {
    var node = start
    var startsInline = startsInline
    var links = 0
    while startsInline || isSymbol("|") {
      try checkChain(&links)
      if !startsInline { advance() }
      startsInline = false
      let line = current.line
      let name = try dottedName()
      let arguments = isSymbol("(") ? try arguments() : ArgumentList()
      node = .filter(node, name: name, arguments, line: line)
    }
    return node
  }

  private mutating func test(_ node: Expression) throws -> Expression {
    let line = current.line
    advance()
    let isNegated = skip(name: "not")
    let name = try dottedName()
    var list = ArgumentList()
    if isSymbol("(") {
      list = try arguments()
    } else {
      let takesOperand: Bool =
        switch current.kind {
        case .name: !(isName("else") || isName("or") || isName("and"))
        case .string, .integer, .float: true
        case .symbol: isSymbol("[") || isSymbol("{")
        default: false
        }
      if takesOperand {
        if isName("is") { throw fail("You cannot chain multiple tests with is") }
        let operand = try primary()
        list.positional = [try postfix(operand)]
      }
    }
    let result = Expression.test(node, name: name, list, line: line)
    return isNegated ? .not(result) : result
  }
}
