/// A failure while a template is compiled or rendered, before it becomes an `EngineError`.
///
/// The kind is the name of the Python exception that the reference implementation (jinja2 on CPython) raises in the
/// same place, so that the two can be compared case by case.
package struct TemplateFault: Error, Equatable, CustomStringConvertible {
  /// The name of the Python exception, such as `TypeError`, or one of the interpreter's own kinds below.
  package var kind: String
  /// What went wrong, worded as the reference does wherever that is possible.
  package var message: String
  /// The line of the template, counted from one, where it is known.
  package var line: Int?

  package init(_ kind: String, _ message: String, line: Int? = nil) {
    self.kind = kind
    self.message = message
    self.line = line
  }

  package var description: String { "\(kind): \(message)" }

  /// The kind of what `raise_exception` raises.
  static let raised = "TemplateError"
  /// The kind of mistakes in the template's text.
  static let syntaxKind = "TemplateSyntaxError"
  /// The kind of a construct that is valid for the reference but refused here.
  static let unsupportedKind = "Unsupported"
  /// The kind of a limit that was reached.
  static let limitKind = "LimitExceeded"

  static func type(_ message: String) -> TemplateFault { TemplateFault("TypeError", message) }
  static func value(_ message: String) -> TemplateFault { TemplateFault("ValueError", message) }
  static func undefined(_ message: String) -> TemplateFault { TemplateFault("UndefinedError", message) }
  static func security(_ message: String) -> TemplateFault { TemplateFault("SecurityError", message) }
  static func runtime(_ message: String) -> TemplateFault { TemplateFault("TemplateRuntimeError", message) }
  static func argument(_ message: String) -> TemplateFault { TemplateFault("FilterArgumentError", message) }
  static func attribute(_ message: String) -> TemplateFault { TemplateFault("AttributeError", message) }
  static func zeroDivision(_ message: String) -> TemplateFault { TemplateFault("ZeroDivisionError", message) }
  static func overflow(_ message: String) -> TemplateFault { TemplateFault("OverflowError", message) }
  static func index(_ message: String) -> TemplateFault { TemplateFault("IndexError", message) }
  static func key(_ message: String) -> TemplateFault { TemplateFault("KeyError", message) }
  static func limit(_ message: String) -> TemplateFault { TemplateFault(limitKind, message) }
  static func unsupported(_ message: String) -> TemplateFault { TemplateFault(unsupportedKind, message) }
  static func syntax(_ message: String, line: Int) -> TemplateFault {
    TemplateFault(syntaxKind, message, line: line)
  }

  /// Integers are 64 bits here; a result that needs more is refused rather than rounded.
  static var bigInteger: TemplateFault {
    unsupported("An integer of the template needs more than 64 bits, which is not supported")
  }
}
