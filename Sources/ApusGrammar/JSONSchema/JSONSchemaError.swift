/// Why a schema was not compiled: where in it, and the reason.
public struct JSONSchemaError: Error, Sendable, Equatable, CustomStringConvertible {
  /// What kind of reason it was.
  public enum Kind: Sendable, Equatable {
    /// The schema itself is malformed, or a reference in it leads nowhere.
    case invalid
    /// The schema says something that the grammar cannot enforce. An option relaxes this.
    case unsupported
    /// No JSON value satisfies the schema.
    case unsatisfiable
    /// A limit on size, depth, number of alternatives or number of automaton states was reached.
    case tooLarge
  }

  public var kind: Kind
  /// JSON pointer to the keyword at fault; empty for the whole schema.
  public var pointer: String
  /// The reason, a sentence without its full stop.
  public var reason: String

  public init(_ kind: Kind, pointer: String, _ reason: String) {
    self.kind = kind
    self.pointer = pointer
    self.reason = reason
  }

  public var description: String { "at \(pointer.isEmpty ? "the root" : pointer): \(reason)" }
}
