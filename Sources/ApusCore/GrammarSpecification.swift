/// What a generated text must look like, as a client states it.
public enum GrammarSpecification: Sendable, Hashable {
  /// JSON that is valid against a JSON Schema, given as text.
  case jsonSchema(String, SchemaOptions = .init())
  /// Any JSON object.
  case jsonObject
  /// A text that a regular expression matches as a whole.
  case regex(String)
  /// A grammar in EBNF: the dialect of llama.cpp (GBNF) or of the W3C, whose root rule is `root`.
  case ebnf(String)
  /// One of some texts.
  case choices([String])
  /// Free text with constrained regions, as a JSON text in the form of SGLang and XGrammar.
  case structuralTag(String)

  /// White space between the tokens of JSON. The raw values are the names in requests and flags.
  public enum Whitespace: String, Sendable, Hashable, CaseIterable {
    /// None.
    case compact
    /// One space after each colon and comma and none elsewhere, as Python's `json.dumps` writes: what most models have
    /// read most, on one line. It leaves no choice, so that it costs no draws.
    case fixed
    /// Wherever JSON permits it, in runs of a bounded length.
    case flexible
  }

  /// How a JSON Schema is read.
  public struct SchemaOptions: Sendable, Hashable {
    /// The order of an object's members.
    public enum PropertyOrder: Sendable, Hashable {
      /// As declared, then those that are not declared.
      case declared
      /// Any.
      case any
    }

    /// Where white space may stand; `nil` leaves it to the request and the engine.
    public var whitespace: Whitespace?
    /// The order of an object's members.
    public var propertyOrder = PropertyOrder.declared
    /// Numbers as people write them: integers as digits alone, fractions without needless zeros, no exponents. Otherwise
    /// every notation of a number is accepted, `20.000` for 20 too, which a model that is unsure may draw out for long.
    public var plainNumbers = true
    /// OpenAI's strict mode: the schema must keep to the subset that OpenAI calls strict.
    public var isStrict = false
    /// Ignores what cannot be enforced instead of refusing it.
    public var isLenient = false

    /// Makes the default options.
    public init() {}
  }
}
