internal import ApusCore

/// A text by its exact scalars. Swift's own strings are equal when they look the same, which JSON's are not.
struct ExactText: Hashable, Sendable, Comparable {
  let text: String

  init(_ text: String) { self.text = text }

  static func == (left: ExactText, right: ExactText) -> Bool { left.text.utf8.elementsEqual(right.text.utf8) }

  static func < (left: ExactText, right: ExactText) -> Bool {
    left.text.utf8.lexicographicallyPrecedes(right.text.utf8)
  }

  func hash(into hasher: inout Hasher) {
    var text = text
    text.withUTF8 { hasher.combine(bytes: UnsafeRawBufferPointer($0)) }
  }
}

/// The constraints on a value that lies inside another: a conjunction of schemas, by its index in `SchemaFormulas`.
///
/// A formula is not evaluated before it is needed, so recursion through `$ref` meets the same formula again and ends there.
struct Formula: Hashable, Sendable {
  var index: Int32

  /// No value.
  static let never = Formula(index: 0)
  /// Every value.
  static let anything = Formula(index: 1)
}

/// A set of strings: a list of them, or a language with bounds on the length.
struct StringClause: Hashable {
  /// Length in scalars.
  var minimum = 0
  var maximum: Int?
  var language: TextLanguage
  /// If there is a list, it has been filtered by all else.
  var values: [ExactText]?
}

/// A set of JSON arrays.
struct ArrayShape: Hashable {
  struct Containment: Hashable {
    var formula: Formula
    /// Elements before this index do not count.
    var from = 0
    var minimum = 1
    var maximum: Int?
  }

  /// The first elements, as far as they differ from `rest`.
  var prefix: [Formula] = []
  var rest = Formula.anything
  var minimum = 0
  var maximum: Int?
  var containments: [Containment] = []
  /// Where uniqueness was asked for.
  var uniqueAt: String?
  /// For `unevaluatedItems`: how many first elements, or all, or those that satisfy one of some formulas.
  var evaluatedPrefix = 0
  var evaluatesAll = false
  var evaluatedBy: [Formula] = []

  func element(_ index: Int) -> Formula { index < prefix.count ? prefix[index] : rest }
}

/// A set of JSON objects.
struct ObjectShape: Hashable {
  struct Property: Hashable {
    var name: ExactText
    var formula: Formula
    var isRequired: Bool
  }

  /// All properties that are not named and whose keys are in a language have values that satisfy a formula.
  struct Rule: Hashable {
    var keys: TextLanguage
    var formula: Formula
  }

  /// Some property, named or not, has a key in a language and a value that satisfies a formula.
  struct Existence: Hashable {
    var keys: TextLanguage
    var formula: Formula
    var pointer: String
  }

  struct Dependency: Hashable {
    var name: ExactText
    var required: [ExactText]
  }

  private(set) var properties: [Property] = []
  private var indices: [ExactText: Int] = [:]
  var rules: [Rule] = []
  var existences: [Existence] = []
  var dependencies: [Dependency] = []
  var minimum = 0
  var maximum: Int?
  /// For `unevaluatedProperties`: keys that a keyword has looked at.
  var evaluated: TextLanguage

  init(evaluated: TextLanguage) { self.evaluated = evaluated }

  func property(_ name: ExactText) -> Property? { indices[name].map { properties[$0] } }

  mutating func set(_ property: Property) {
    if let index = indices[property.name] {
      properties[index] = property
    } else {
      indices[property.name] = properties.count
      properties.append(property)
    }
  }

  static func == (left: ObjectShape, right: ObjectShape) -> Bool {
    left.properties == right.properties && left.rules == right.rules && left.existences == right.existences
      && left.dependencies == right.dependencies && left.minimum == right.minimum && left.maximum == right.maximum
      && left.evaluated == right.evaluated
  }

  func hash(into hasher: inout Hasher) {
    hasher.combine(properties)
    hasher.combine(rules)
    hasher.combine(minimum)
    hasher.combine(maximum)
  }
}

/// All values that satisfy a schema, type by type. Types have nothing in common, so sets of values are intersected,
/// united and complemented type by type, too.
struct ValueSet {
  var allowsNull = false
  var allowsTrue = false
  var allowsFalse = false
  var numbers = NumberSet.never
  /// A union.
  var strings: [StringClause] = []
  /// A union.
  var arrays: [ArrayShape] = []
  /// A union.
  var objects: [ObjectShape] = []
  /// Whether something was left out of account, so that the set may hold too much.
  var isApproximate = false

  /// Whether nothing is in the set, as far as one sees without looking inside arrays and objects.
  var isPlainlyEmpty: Bool {
    !allowsNull && !allowsTrue && !allowsFalse && numbers.isEmpty && strings.isEmpty && arrays.isEmpty
      && objects.isEmpty
  }
}
