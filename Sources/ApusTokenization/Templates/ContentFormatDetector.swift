/// Finds out whether a template reads the content of messages as a list of parts.
///
/// As SGLang and vLLM do it: a template that iterates over the content of a message, or over what it took from there,
/// expects parts; any other expects a string.
struct ContentFormatDetector {
  /// Names of variables that hold a message.
  private var messages: Set<Text> = []
  /// Names of variables that hold the content of a message.
  private var contents: Set<Text> = []
  /// Names of variables that hold the list of messages.
  private var lists: Set<Text> = [Text("messages")]
  /// Whether the template iterates over content.
  private(set) var iteratesContent = false
  /// Whether the template asks of content what type it has, so that it can do with either.
  private(set) var testsContent = false

  init(_ statements: [Statement]) {
    // Names may be used above the line that sets them, as in macros; a second pass knows them all.
    for _ in 0..<2 { visit(statements) }
  }

  private func isList(_ expression: Expression) -> Bool {
    switch expression {
    case .name(let name): lists.contains(name)
    case .slice(let object, _, _, _): isList(object)
    case .attribute(_, let name): lists.contains(name)
    case .filter(let operand?, let name, _, _):
      ["list", "selectattr", "rejectattr", "reverse"].contains(name.string) && isList(operand)
    case .conditional(_, let then, let otherwise, _): isList(then) || otherwise.map(isList) ?? false
    default: false
    }
  }

  private func isMessage(_ expression: Expression) -> Bool {
    switch expression {
    case .name(let name): messages.contains(name)
    case .item(let object, _): isList(object)
    case .filter(let operand?, let name, _, _): (name.string == "first" || name.string == "last") && isList(operand)
    default: false
    }
  }

  private func isContent(_ expression: Expression) -> Bool {
    switch expression {
    case .name(let name): contents.contains(name)
    case .attribute(let object, let name): name.string == "content" && isMessage(object)
    case .item(let object, .constant(.string(let key))): key.string == "content" && isMessage(object)
    case .slice(let object, _, _, _): isContent(object)
    case .filter(let operand?, let name, _, _):
      ["list", "selectattr", "rejectattr", "reverse", "default", "d"].contains(name.string) && isContent(operand)
    case .call(.attribute(let object, let method), let arguments):
      if method.string == "get", case .constant(.string(let key))? = arguments.positional.first {
        key.string == "content" && isMessage(object)
      } else {
        false
      }
    case .conditional(_, let then, let otherwise, _): isContent(then) || otherwise.map(isContent) ?? false
    case .or(let left, let right): isContent(left) || isContent(right)
    default: false
    }
  }

  private mutating func inspect(_ expression: Expression) {
    walk(expression) { part in
      guard case .test(let operand, let name, _, _) = part, isContent(operand) else { return }
      if ["string", "iterable", "sequence", "mapping"].contains(name.string) { testsContent = true }
    }
  }

  private mutating func bind(_ target: AssignmentTarget, to expression: Expression) {
    guard case .name(let name) = target else {
      if case .namespaceAttribute(_, let name) = target, isList(expression) { lists.insert(name) }
      return
    }
    if isList(expression) { lists.insert(name) }
    if isMessage(expression) { messages.insert(name) }
    if isContent(expression) { contents.insert(name) }
  }

  private mutating func visit(_ statements: [Statement]) {
    for statement in statements {
      switch statement.kind {
      case .loop(let target, let over, _, _, let body, let otherwise):
        inspect(over)
        if isContent(over) { iteratesContent = true }
        if isList(over), case .name(let name) = target { messages.insert(name) }
        visit(body)
        visit(otherwise)
      case .branch(let branches, let otherwise):
        for branch in branches {
          inspect(branch.test)
          visit(branch.body)
        }
        visit(otherwise)
      case .set(.tuple(let targets), .tuple(let values)) where targets.count == values.count:
        for (target, value) in zip(targets, values) { bind(target, to: value) }
      case .set(let target, let value):
        inspect(value)
        bind(target, to: value)
      case .macro(_, let signature, let body):
        // A macro that is handed a message or its content most often calls it so.
        for parameter in signature.parameters {
          if parameter.string == "message" { messages.insert(parameter) }
          if parameter.string == "content" { contents.insert(parameter) }
        }
        visit(body)
      case .setBlock(_, _, let body), .callBlock(_, _, let body), .filterBlock(_, let body), .with(_, let body),
        .scope(let body):
        visit(body)
      case .output(let parts): for case .expression(let expression, _) in parts { inspect(expression) }
      case .breakLoop, .continueLoop: break
      }
    }
  }
}
