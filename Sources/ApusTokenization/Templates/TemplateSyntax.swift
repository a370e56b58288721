/// The tree that the parser makes of a template, before names are resolved.
indirect enum Expression {
  case constant(Value)
  case name(Text)
  case tuple([Expression])
  case list([Expression])
  case dict([(key: Expression, value: Expression)])
  case conditional(test: Expression, then: Expression, otherwise: Expression?, line: Int)
  case or(Expression, Expression)
  case and(Expression, Expression)
  case not(Expression)
  case compare(Expression, [(operation: Comparison, operand: Expression)])
  case binary(BinaryOperator, Expression, Expression)
  case negate(Expression)
  case plus(Expression)
  case concat([Expression])
  case attribute(Expression, Text)
  case item(Expression, Expression)
  case slice(Expression, start: Expression?, stop: Expression?, step: Expression?)
  case call(Expression, ArgumentList)
  /// A filter; without an operand in filter blocks and block assignments, where the block's text is the operand.
  case filter(Expression?, name: Text, ArgumentList, line: Int)
  case test(Expression, name: Text, ArgumentList, line: Int)
}

enum Comparison { case equal, notEqual, less, lessOrEqual, greater, greaterOrEqual, contained, notContained }

enum BinaryOperator: String {
  case add = "+", subtract = "-", multiply = "*", divide = "/", floorDivide = "//", modulo = "%", power = "**"
}

struct ArgumentList {
  var positional: [Expression] = []
  var keywords: [(name: Text, value: Expression)] = []
  var spread: Expression?
  var keywordSpread: Expression?
}

/// What a value can be assigned to.
indirect enum AssignmentTarget {
  case name(Text)
  case namespaceAttribute(Text, Text)
  case tuple([AssignmentTarget])
}

struct MacroSignature {
  var parameters: [Text] = []
  /// Defaults of the last parameters.
  var defaults: [Expression] = []
}

struct Statement {
  indirect enum Kind {
    case output([OutputPart])
    case loop(
      target: AssignmentTarget, over: Expression, test: Expression?, isRecursive: Bool, body: [Statement],
      otherwise: [Statement])
    case branch([(test: Expression, body: [Statement])], otherwise: [Statement])
    case set(AssignmentTarget, Expression)
    case setBlock(AssignmentTarget, filter: Expression?, body: [Statement])
    case macro(Text, MacroSignature, [Statement])
    case callBlock(MacroSignature, call: (Expression, ArgumentList), body: [Statement])
    case filterBlock(filter: Expression, body: [Statement])
    case with([(target: AssignmentTarget, value: Expression)], body: [Statement])
    /// A scope without effect of its own: `generation` and `autoescape false`.
    case scope([Statement])
    case breakLoop
    case continueLoop
  }
  var kind: Kind
  var line: Int
}

enum OutputPart {
  case data([UInt8])
  case expression(Expression, line: Int)
}
