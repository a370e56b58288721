package import ApusCore

/// A language as rules over bytes and JSON structure: what the front ends (JSON Schema, regular expressions, EBNF,
/// structural tags) produce and `GrammarCompiler` compiles.
package struct Grammar: Sendable, Equatable {
  /// A named rule.
  package struct Rule: Sendable, Equatable {
    /// The name, for messages alone.
    package var name: String
    /// What the rule matches.
    package var body: GrammarExpression

    /// Makes a rule.
    package init(name: String, body: GrammarExpression) {
      self.name = name
      self.body = body
    }
  }

  /// The rules, named by their index.
  package var rules: [Rule] = []
  /// What the whole text must match.
  package var root: GrammarExpression

  /// Makes a grammar. Rules can be added later; `root` may refer to them.
  package init(root: GrammarExpression = .never, rules: [Rule] = []) {
    self.root = root
    self.rules = rules
  }

  /// Adds a rule, to be defined now or by `define` later (recursion needs the reference before the body).
  package mutating func addRule(_ name: String, _ body: GrammarExpression = .never) -> RuleReference {
    rules.append(Rule(name: name, body: body))
    return RuleReference(index: rules.count - 1)
  }

  /// Gives a rule its body.
  package mutating func define(_ rule: RuleReference, _ body: GrammarExpression) { rules[rule.index].body = body }
}

/// Names a rule of a grammar.
package struct RuleReference: Sendable, Hashable {
  package var index: Int

  package init(index: Int) { self.index = index }
}

/// A language of texts, as UTF-8 bytes.
package indirect enum GrammarExpression: Sendable, Equatable {
  /// No text at all. A sequence with it, and an object that requires it, match nothing either; choices drop it.
  case never
  /// The empty text.
  case empty
  /// These bytes.
  case literal([UInt8])
  /// One scalar of a set.
  case characters(ScalarRanges)
  /// One after the other.
  case sequence([GrammarExpression])
  /// Any one of these.
  case choice([GrammarExpression])
  /// As many as stated, without limit if `maximum` is `nil`. Counted, not copied.
  case repetition(GrammarExpression, minimum: Int, maximum: Int?)
  /// What a rule matches.
  case rule(RuleReference)
  /// A regular language.
  case regular(RegularExpression)
  /// A JSON object.
  case object(ObjectExpression)
  /// A JSON array.
  case array(ArrayExpression)
  /// A special token of the vocabulary by its text, such as `<|tool_call|>`, or that text as ordinary bytes.
  case special(String)
  /// Free text with tagged regions.
  case tags(TagsExpression)

  /// The bytes of a text.
  package static func text(_ text: String) -> GrammarExpression { .literal(Array(text.utf8)) }

  /// A JSON string, quotes included, whose decoded content is in a language; each character of the content may be
  /// written in every way JSON permits.
  package static func string(_ content: RegularExpression) -> GrammarExpression {
    .regular(.jsonString(content))
  }
}

/// A regular language of texts, closed under intersection and complement.
package indirect enum RegularExpression: Sendable, Equatable {
  /// No text.
  case never
  /// The empty text.
  case empty
  /// Every text (any number of any scalars, line breaks included).
  case anything
  /// This text as UTF-8.
  case literal([UInt8])
  /// One scalar of a set.
  case scalars(ScalarRanges)
  case concatenation([RegularExpression])
  case union([RegularExpression])
  case intersection([RegularExpression])
  /// All texts but those.
  case complement(RegularExpression)
  /// As many as stated, without limit if `maximum` is `nil`. Large counts cost no memory.
  case repetition(RegularExpression, minimum: Int, maximum: Int?)
  /// Texts of decimal digits and points whose digits, read as one integer without regard to the points, are a multiple of
  /// a positive integer. `multipleOf` intersects it with the shape of a number.
  case digits(multipleOf: Int)
  /// The ways to write a text of a language between the quotes of a JSON string: each scalar as itself where JSON
  /// permits it, by its short escape where it has one, or as `\uXXXX` (a surrogate pair above U+FFFF). The operand
  /// speaks of the decoded content; it must not itself contain `jsonEscaped`.
  case jsonEscaped(RegularExpression)

  /// The UTF-8 of a text.
  package static func text(_ text: String) -> RegularExpression { .literal(Array(text.utf8)) }

  /// Any one of some texts; thousands are fine.
  package static func anyOf(_ texts: [String]) -> RegularExpression { .union(texts.map { .literal(Array($0.utf8)) }) }

  /// Texts of a number of scalars, as `minLength` and `maxLength` count them.
  package static func length(_ minimum: Int, _ maximum: Int?) -> RegularExpression {
    .repetition(.scalars(.all), minimum: minimum, maximum: maximum)
  }

  /// A JSON string, quotes included, whose decoded content is in a language.
  package static func jsonString(_ content: RegularExpression) -> RegularExpression {
    .concatenation([.literal([0x22]), .jsonEscaped(content), .literal([0x22])])
  }
}

/// Where white space may stand between the tokens of JSON.
package enum WhitespacePolicy: Sendable, Hashable {
  /// Nowhere.
  case compact
  /// Nowhere but one optional space after `:` and `,`.
  case spaced
  /// One space after `:` and `,`, and none elsewhere.
  case fixed
  /// Runs of space, tab, line feed and carriage return of at most this many bytes before and after every token.
  case flexible(maximum: Int)

  /// Permits what pretty-printers write, and bounds what a model can waste.
  package static let standard = WhitespacePolicy.flexible(maximum: 128)

  /// What a specification calls so.
  package init(_ whitespace: GrammarSpecification.Whitespace) {
    switch whitespace {
    case .compact: self = .compact
    case .fixed: self = .fixed
    case .flexible: self = .standard
    }
  }
}

/// A JSON object.
///
/// Which member a key belongs to is decided by its decoded text: a declared property by its exact name; else the first
/// pattern that contains it; else an additional one. A front end whose members overlap (a name that matches a pattern,
/// two patterns) merges their values and passes disjoint members.
package struct ObjectExpression: Sendable, Equatable {
  /// A declared property.
  package struct Property: Sendable, Equatable {
    package var name: String
    /// The value; `never` forbids the property (an additional member of that name included).
    package var value: GrammarExpression
    package var isRequired: Bool

    package init(_ name: String, _ value: GrammarExpression, isRequired: Bool = false) {
      self.name = name
      self.value = value
      self.isRequired = isRequired
    }
  }

  /// Members whose keys are in a language.
  package struct PatternProperty: Sendable, Equatable {
    /// The language of the decoded key: the whole key, not a search.
    package var keys: RegularExpression
    /// The value; `never` forbids such keys.
    package var value: GrammarExpression

    package init(_ keys: RegularExpression, _ value: GrammarExpression) {
      self.keys = keys
      self.value = value
    }
  }

  /// The order of members.
  package enum Order: Sendable, Hashable {
    /// Declared properties in the order given, then all others.
    case declared
    /// Any order.
    case any
  }

  package var properties: [Property] = []
  package var patternProperties: [PatternProperty] = []
  /// The value of members that are neither declared nor match a pattern; `nil` or `never` forbids them.
  package var additional: GrammarExpression?
  /// Every key must be in this language, declared ones included.
  package var propertyNames: RegularExpression?
  package var minimumCount = 0
  package var maximumCount: Int?
  /// If the first property occurs, the others must, too. All names must be declared.
  package var dependentRequired: [(String, [String])] {
    get { dependencies.map { ($0.name, $0.required) } }
    set { dependencies = newValue.map { Dependency(name: $0.0, required: $0.1) } }
  }
  private var dependencies: [Dependency] = []
  package var order = Order.any
  package var whitespace = WhitespacePolicy.standard

  private struct Dependency: Sendable, Equatable {
    var name: String
    var required: [String]
  }

  /// An object of these properties and no others.
  package init(_ properties: [Property] = [], additional: GrammarExpression? = nil) {
    self.properties = properties
    self.additional = additional
  }
}

/// A JSON array.
package struct ArrayExpression: Sendable, Equatable {
  /// One element: what it may be, split by whether it counts for `contains`.
  package struct Element: Sendable, Equatable {
    /// Values that do not count; `never` if there are none.
    package var plain: GrammarExpression
    /// Values that count; `never` if there are none. If only `minimumMatches` matters, `plain` may contain them, too: the
    /// matcher finds a way to read the array that counts enough. `maximumMatches` needs disjoint languages.
    package var matching: GrammarExpression

    package init(_ plain: GrammarExpression, matching: GrammarExpression = .never) {
      self.plain = plain
      self.matching = matching
    }
  }

  /// The first elements, one by one.
  package var prefix: [Element] = []
  /// The elements after the prefix; `nil` forbids them.
  package var items: Element?
  package var minimumCount = 0
  package var maximumCount: Int?
  /// How many elements must be read as `matching` ones.
  package var minimumMatches = 0
  package var maximumMatches: Int?
  package var whitespace = WhitespacePolicy.standard

  /// An array of any number of the same element.
  package init(of items: GrammarExpression?, prefix: [GrammarExpression] = []) {
    self.items = items.map { Element($0) }
    self.prefix = prefix.map { Element($0) }
  }
}

/// Free text, in which certain texts open constrained regions.
package struct TagsExpression: Sendable, Equatable {
  /// A region.
  package struct Tag: Sendable, Equatable {
    /// The text that opens it.
    package var begin: String
    package var content: GrammarExpression
    /// The text that closes it.
    package var end: String

    package init(begin: String, content: GrammarExpression, end: String) {
      self.begin = begin
      self.content = content
      self.end = end
    }
  }

  package var tags: [Tag]
  /// Free text may hold none of these outside regions; each region's begin must start with one of them.
  package var triggers: [String]
  /// At least one region must occur.
  package var isRequired = false
  /// The text ends with the first region.
  package var stopsAfterFirst = false
  /// Whether free text may stand before, between and after regions.
  package var allowsText = true
  /// What stands between two regions if `allowsText` is false.
  package var separator = ""

  /// Makes tagged text.
  package init(tags: [Tag], triggers: [String]) {
    self.tags = tags
    self.triggers = triggers
  }
}
