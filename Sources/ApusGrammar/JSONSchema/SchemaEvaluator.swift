internal import ApusCore

/// Turns schemas into sets of values.
///
/// A schema becomes a `ValueSet`: per JSON type, a union of shapes. The in-place keywords (`allOf`, `anyOf`, `oneOf`,
/// `not`, `if`, `$ref`, ...) become intersections, unions and complements of such sets. The values inside arrays and
/// objects stay `Formula`s, conjunctions of schemas and negated schemas, which are evaluated when they are needed: there
/// are finitely many, so recursive schemas end.
final class SchemaEvaluator {
  private enum AtomKind: Hashable {
    /// A schema by its text; the resource and scope matter only if it holds references.
    case schema(ExactText, resource: Int, draft: Int, scope: [Int])
    /// All of a formula, so that it can be negated as one.
    case conjunction(Formula)
    /// Any of some formulas.
    case disjunction([Formula])
  }

  private struct Atom {
    var kind: AtomKind
    var position: SchemaPosition
    var scope: [Int]
  }

  /// Where a schema lies and the resources entered on the way to it, outermost first.
  struct Place {
    var position: SchemaPosition
    var scope: [Int]
  }

  private struct EvaluationKey: Hashable {
    var formula: Formula
    var tracking: Bool
  }

  private struct LiteralKey: Hashable {
    /// An atom's index times two, plus one if it is negated.
    var literal: Int32
    var tracking: Bool
  }

  /// Evaluation came back to where it is.
  private struct LoopError: Error {}

  let document: SchemaDocument
  let options: JSONSchemaOptions
  let texts = TextLanguages()
  let formats: StringFormats
  private var atoms: [Atom] = []
  private var atomIndex: [AtomKind: Int32] = [:]
  private var formulas: [[Int32]] = [[], []]
  private var formulaIndex: [[Int32]: Formula] = [[]: .anything]
  private var evaluated: [EvaluationKey: ValueSet] = [:]
  private var evaluatedLiterals: [LiteralKey: ValueSet] = [:]
  private var inProgress: Set<LiteralKey> = []
  private var probes = 0
  private var knownEmptiness: [Formula: Bool] = [:]
  private var patterns: [String: TextLanguage] = [:]
  private(set) var relaxations: [JSONSchemaRelaxation] = []
  /// Work done so far, in steps of like cost; bounds time and memory.
  private(set) var work = 0
  private var depth = 0

  init(_ document: SchemaDocument, _ options: JSONSchemaOptions) {
    self.document = document
    self.options = options
    formats = StringFormats(texts)
  }

  // MARK: Limits and refusals

  func spend(_ amount: Int, at pointer: String) throws(JSONSchemaError) {
    work += amount
    if work > options.workLimit || texts.isFull {
      throw JSONSchemaError(.tooLarge, pointer: pointer, "the combinations of its alternatives are too many")
    }
  }

  /// Refuses what cannot be enforced, or notes that it is not enforced.
  func refuse(_ pointer: String, _ reason: String) throws(JSONSchemaError) {
    if !options.relaxed { throw JSONSchemaError(.unsupported, pointer: pointer, reason) }
    let relaxation = JSONSchemaRelaxation(pointer: pointer, reason: reason)
    if !relaxations.contains(relaxation), relaxations.count < 1_000 { relaxations.append(relaxation) }
  }

  func invalid(_ pointer: String, _ reason: String) -> JSONSchemaError {
    JSONSchemaError(.invalid, pointer: pointer, reason)
  }

  // MARK: Formulas

  var rootFormula: Formula {
    get throws(JSONSchemaError) {
      let root = document.resources[0].root
      return try formula(Place(position: root, scope: entering(root.resource, [])))
    }
  }

  private func entering(_ resource: Int, _ scope: [Int]) -> [Int] {
    if document.resources[resource].dynamicAnchors.isEmpty || scope.contains(resource) { return scope }
    return scope + [resource]
  }

  func child(_ place: Place, _ suffix: String, _ value: JSONValue) -> Place {
    let position = document.child(of: place.position, suffix, value)
    let scope =
      position.resource == place.position.resource ? place.scope : entering(position.resource, place.scope)
    return Place(position: position, scope: scope)
  }

  private static let annotations: Set<String> = [
    "title", "description", "default", "examples", "example", "$comment", "deprecated", "readOnly", "writeOnly",
    "$schema",
    "definitions", "$defs", "$id", "id", "$anchor", "$dynamicAnchor",
  ]

  /// The conjunction of one schema. References that stand alone are followed, so that equal schemas are equal formulas.
  func formula(_ start: Place) throws(JSONSchemaError) -> Formula {
    var place = start
    var hops = 0
    while case .object(let object) = place.position.value, let reference = object["$ref"]?.stringValue {
      let draft = document.resources[place.position.resource].draft
      if draft.keepsReferenceSiblings, object.keys.contains(where: { $0 != "$ref" && !Self.annotations.contains($0) }) {
        break
      }
      hops += 1
      if hops > 100 { throw invalid(start.position.pointer, "the reference leads back to itself") }
      place = try follow(reference, place)
    }
    switch place.position.value {
    case .bool(let allows): return allows ? .anything : .never
    case .object(let object):
      if object.isEmpty { return .anything }
      let text = place.position.value.compactText
      let draft = document.resources[place.position.resource].draft
      let holdsReference = Self.holdsReference(text)
      let kind = AtomKind.schema(
        ExactText(text), resource: holdsReference ? place.position.resource : -1, draft: draft.rawValue,
        scope: holdsReference ? place.scope : [])
      return conjunction([atom(kind, place) << 1])
    default:
      throw invalid(place.position.pointer, "a schema is an object or a boolean, not \(place.position.value.kindName)")
    }
  }

  private func follow(_ reference: String, _ place: Place) throws(JSONSchemaError) -> Place {
    let pointer = place.position.pointer + "/$ref"
    let target = try document.resolve(reference, from: place.position.resource, at: pointer)
    return Place(position: target, scope: entering(target.resource, place.scope))
  }

  /// Whether a schema's text has a member named `$ref`, `$dynamicRef` or `$recursiveRef`, or something that looks like one.
  private static func holdsReference(_ text: String) -> Bool {
    var text = text
    return text.withUTF8 { bytes in
      guard bytes.count > 6 else { return false }
      for index in 3..<bytes.count where bytes[index] == UInt8(ascii: "\"") && bytes[index - 1] == UInt8(ascii: "f") {
        if bytes[index - 2] == UInt8(ascii: "e"), bytes[index - 3] | 0x20 == UInt8(ascii: "r") { return true }
      }
      return false
    }
  }

  private func atom(_ kind: AtomKind, _ place: Place) -> Int32 {
    if let found = atomIndex[kind] { return found }
    let index = Int32(atoms.count)
    atoms.append(Atom(kind: kind, position: place.position, scope: place.scope))
    atomIndex[kind] = index
    return index
  }

  private func conjunction(_ literals: [Int32]) -> Formula {
    var sorted = Array(Set(literals)).sorted()
    for index in sorted.indices.dropFirst() where sorted[index] == sorted[index - 1] ^ 1 && sorted[index] & 1 == 1 {
      return .never
    }
    if sorted.isEmpty { return .anything }
    if let found = formulaIndex[sorted] { return found }
    let result = Formula(index: Int32(formulas.count))
    sorted.reserveCapacity(0)
    formulas.append(sorted)
    formulaIndex[sorted] = result
    return result
  }

  func and(_ left: Formula, _ right: Formula) -> Formula {
    if left == right || right == .anything { return left }
    if left == .anything { return right }
    if left == .never || right == .never { return .never }
    return conjunction(formulas[Int(left.index)] + formulas[Int(right.index)])
  }

  private var nowhere: Place { Place(position: SchemaPosition(value: .null, resource: 0, pointer: ""), scope: []) }

  func not(_ formula: Formula) -> Formula {
    if formula == .never { return .anything }
    if formula == .anything { return .never }
    let literals = formulas[Int(formula.index)]
    if literals.count == 1 { return conjunction([literals[0] ^ 1]) }
    return conjunction([atom(.conjunction(formula), nowhere) << 1 | 1])
  }

  func or(_ members: [Formula]) -> Formula {
    if members.contains(.anything) { return .anything }
    let members = Array(Set(members)).filter { $0 != .never }.sorted { $0.index < $1.index }
    if members.isEmpty { return .never }
    if members.count == 1 { return members[0] }
    return conjunction([atom(.disjunction(members), nowhere) << 1])
  }

  /// The formula that only one value satisfies.
  private func formula(constant value: JSONValue, _ pointer: String) -> Formula {
    let schema = JSONValue.object(JSONObject([("const", value)]))
    let kind = AtomKind.schema(
      ExactText(schema.compactText), resource: -1, draft: SchemaDraft.draft202012.rawValue, scope: [])
    let position = SchemaPosition(value: schema, resource: constantResource, pointer: pointer)
    return conjunction([atom(kind, Place(position: position, scope: [])) << 1])
  }

  /// Constants are read by no draft's rules; `-1` stands for the latest.
  private var constantResource: Int { -1 }

  /// Where a formula's first schema lies, for messages.
  func pointer(_ formula: Formula) -> String {
    for literal in formulas[Int(formula.index)] {
      let atom = atoms[Int(literal >> 1)]
      switch atom.kind {
      case .schema: return atom.position.pointer
      case .conjunction(let inner): return pointer(inner)
      case .disjunction(let members): return members.first.map { pointer($0) } ?? ""
      }
    }
    return ""
  }

  /// Whether no value can satisfy a formula. `false` may also mean that this was not found out.
  func isPlainlyEmpty(_ formula: Formula) throws(JSONSchemaError) -> Bool {
    if formula == .never { return true }
    if formula == .anything { return false }
    if let known = knownEmptiness[formula] { return known }
    if probes > 40 { return false }
    probes += 1
    let count = relaxations.count
    defer {
      probes -= 1
      // A question enforces nothing.
      if relaxations.count > count { relaxations.removeLast(relaxations.count - count) }
    }
    do {
      let result = try evaluate(formula, tracking: false).isPlainlyEmpty
      knownEmptiness[formula] = result
      return result
    } catch let error as JSONSchemaError {
      if error.kind == .tooLarge { throw error }
      return false
    } catch {
      return false
    }
  }

  /// Whether a formula is made of more than one schema, so that it may be empty though each of them is not.
  func isCompound(_ formula: Formula) -> Bool {
    let literals = formulas[Int(formula.index)]
    return literals.count > 1 || literals.first.map { $0 & 1 == 1 } == true
  }

  /// Whether a formula lists its values, as a property that tells objects apart does.
  func isDiscriminating(_ formula: Formula) -> Bool {
    formulas[Int(formula.index)].contains { literal in
      guard literal & 1 == 0, case .schema = atoms[Int(literal >> 1)].kind else { return false }
      let schema = atoms[Int(literal >> 1)].position.value
      return schema["const"] != nil || schema["enum"] != nil
    }
  }

  /// Whether one formula asks for all that another asks for.
  func implies(_ special: Formula, _ general: Formula) -> Bool {
    if special == general || general == .anything || special == .never { return true }
    if special == .anything || general == .never { return false }
    let literals = formulas[Int(special.index)]
    return formulas[Int(general.index)].allSatisfy { literals.contains($0) }
  }

  /// Whether every value of one formula is seen to satisfy another.
  func isContained(_ inner: Formula, _ outer: Formula) throws(JSONSchemaError) -> Bool {
    if inner == outer || outer == .anything { return true }
    return try isPlainlyEmpty(and(inner, not(outer)))
  }

  // MARK: Evaluation

  /// The values that satisfy a formula.
  func values(_ formula: Formula) throws(JSONSchemaError) -> ValueSet {
    do {
      return try evaluate(formula, tracking: false)
    } catch let error as JSONSchemaError {
      throw error
    } catch {
      throw invalid(pointer(formula), "the schema refers to itself without ever reaching a value")
    }
  }

  var everything: ValueSet {
    ValueSet(
      allowsNull: true, allowsTrue: true, allowsFalse: true, numbers: .all,
      strings: [StringClause(language: texts.everything)], arrays: [ArrayShape()],
      objects: [ObjectShape(evaluated: texts.never)])
  }

  private func evaluate(_ formula: Formula, tracking: Bool) throws -> ValueSet {
    if formula == .never { return ValueSet() }
    if formula == .anything { return everything }
    let key = EvaluationKey(formula: formula, tracking: tracking)
    if let known = evaluated[key] { return known }
    guard depth < 300 else {
      throw JSONSchemaError(
        .tooLarge, pointer: pointer(formula), "schemas refer to each other more than 300 levels deep")
    }
    depth += 1
    defer { depth -= 1 }
    var result = everything
    for literal in formulas[Int(formula.index)] {
      let atom = try evaluate(literal: literal, tracking: tracking)
      result = try intersection(result, atom, at: atoms[Int(literal >> 1)].position.pointer)
    }
    evaluated[key] = result
    return result
  }

  private func evaluate(literal: Int32, tracking: Bool) throws -> ValueSet {
    let key = LiteralKey(literal: literal, tracking: tracking)
    if let known = evaluatedLiterals[key] { return known }
    guard inProgress.insert(key).inserted else { throw LoopError() }
    defer { inProgress.remove(key) }
    let atom = atoms[Int(literal >> 1)]
    try spend(1, at: atom.position.pointer)
    let result: ValueSet
    if literal & 1 == 1 {
      let positive = try evaluate(literal: literal ^ 1, tracking: false)
      result = try complement(positive, at: atom.position.pointer)
    } else {
      switch atom.kind {
      case .schema:
        result = try evaluateSchema(Place(position: atom.position, scope: atom.scope), tracking: tracking)
      case .conjunction(let formula): result = try evaluate(formula, tracking: tracking)
      case .disjunction(let members):
        var union = ValueSet()
        for member in members { union = try self.union(union, evaluate(member, tracking: tracking)) }
        result = union
      }
    }
    evaluatedLiterals[key] = result
    return result
  }

  /// A schema in place: the same instance, so annotations count and a loop is an error.
  func evaluate(inPlace place: Place, tracking: Bool) throws -> ValueSet {
    try evaluate(formula(place), tracking: tracking)
  }

  private func evaluateSchema(_ place: Place, tracking: Bool) throws -> ValueSet {
    let pointer = place.position.pointer
    guard case .object(let schema) = place.position.value else { return everything }
    if place.position.resource < 0 { return set(of: schema["const"] ?? .null, pointer) }
    let resource = document.resources[place.position.resource]
    let keywords = Keywords(draft: resource.draft, isDeclared: resource.isDeclared)
    if let reference = schema["$ref"]?.stringValue, !resource.draft.keepsReferenceSiblings {
      return try evaluate(inPlace: follow(reference, place), tracking: tracking)
    }
    let isTracked = tracking
    let tracking =
      tracking
      || (keywords.has(.draft201909) && (schema["unevaluatedProperties"] != nil || schema["unevaluatedItems"] != nil))
    var result = everything
    func restrict(_ other: ValueSet) throws { result = try intersection(result, other, at: pointer) }

    try restrictType(&result, schema, keywords, pointer)
    if let values = schema["enum"] {
      guard case .array(let values) = values else { throw invalid(pointer + "/enum", "enum must be an array") }
      var union = ValueSet()
      for value in values { add(set(of: value, pointer + "/enum"), to: &union) }
      try spend(values.count / 64, at: pointer + "/enum")
      try restrict(union)
    }
    if let value = schema["const"], keywords.has(.draft6) { try restrict(set(of: value, pointer + "/const")) }
    if !result.numbers.isEmpty { try restrictNumbers(&result, schema, keywords, pointer) }
    if !result.strings.isEmpty { try restrictStrings(&result, schema, pointer) }
    if !result.arrays.isEmpty {
      let shape = try arrayShape(schema, keywords, place, tracking)
      result.arrays = try shape.map { shape in try result.arrays.compactMap { try intersection($0, shape) } } ?? []
    }
    if !result.objects.isEmpty {
      var shapes: [ObjectShape] = []
      if let shape = try normalized(objectShape(schema, keywords, place, tracking)) {
        for old in result.objects { if let new = try intersection(old, shape, at: pointer) { shapes.append(new) } }
      }
      result.objects = shapes
    }
    if let reference = schema["$ref"] {
      guard let reference = reference.stringValue else { throw invalid(pointer + "/$ref", "$ref must be a string") }
      try restrict(evaluate(inPlace: follow(reference, place), tracking: tracking))
    }
    for (keyword, isRecursive) in [("$dynamicRef", false), ("$recursiveRef", true)] {
      guard let reference = schema[keyword]?.stringValue, keywords.has(isRecursive ? .draft201909 : .draft202012),
        !isRecursive || resource.draft == .draft201909
      else { continue }
      let target = try document.resolveDynamically(
        reference, isRecursive: isRecursive, from: place.position.resource, scope: place.scope,
        at: pointer + "/" + keyword)
      let found = Place(position: target, scope: entering(target.resource, place.scope))
      try restrict(evaluate(inPlace: found, tracking: tracking))
    }
    if let members = try schemas("allOf", schema, place) {
      for member in members { try restrict(evaluate(inPlace: member, tracking: tracking)) }
    }
    try restrictDependencies(&result, schema, keywords, place, tracking)
    if let inner = schema["not"] {
      let place = child(place, "/not", inner)
      let set = try evaluate(inPlace: place, tracking: false)
      if set.isApproximate {
        try refuse(place.position.pointer, "the schema under not cannot be enforced exactly")
        result.isApproximate = true
      } else {
        try restrict(complement(set, at: place.position.pointer))
      }
    }
    if let condition = schema["if"], keywords.has(.draft7) {
      try restrictConditional(&result, condition, schema, place, tracking)
    }
    if let members = try schemas("anyOf", schema, place) { try restrictAny(&result, members, tracking, pointer) }
    if let members = try schemas("oneOf", schema, place) { try restrictOne(&result, members, tracking, pointer) }
    if tracking, keywords.has(.draft201909) { try restrictUnevaluated(&result, schema, place) }
    if tracking, !isTracked { forgetEvaluated(&result) }
    return result
  }

  func schemas(_ keyword: String, _ schema: JSONObject, _ place: Place) throws(JSONSchemaError) -> [Place]? {
    guard let value = schema[keyword] else { return nil }
    guard case .array(let elements) = value else {
      throw invalid(place.position.pointer + "/" + keyword, "\(keyword) must be an array of schemas")
    }
    return elements.enumerated().map { child(place, "/\(keyword)/\($0.offset)", $0.element) }
  }

  /// Which keywords a draft knows. A schema that names no draft may use those of all.
  struct Keywords {
    var draft: SchemaDraft
    var isDeclared: Bool

    func has(_ since: SchemaDraft) -> Bool { !isDeclared || draft >= since }
    func had(until last: SchemaDraft) -> Bool { !isDeclared || draft <= last }
  }

  // MARK: Constants and types

  /// The set of one value.
  func set(of value: JSONValue, _ pointer: String) -> ValueSet {
    var result = ValueSet()
    switch value {
    case .null: result.allowsNull = true
    case .bool(true): result.allowsTrue = true
    case .bool(false): result.allowsFalse = true
    case .int, .double: result.numbers = NumberSet([.point(ExactDecimal(value) ?? .zero)])
    case .string(let text):
      result.strings = [StringClause(language: texts.everything, values: [ExactText(text)])]
    case .array(let elements):
      var shape = ArrayShape()
      shape.prefix = elements.map { formula(constant: $0, pointer) }
      shape.rest = .never
      shape.minimum = elements.count
      shape.maximum = elements.count
      result.arrays = [shape]
    case .object(let members):
      var shape = ObjectShape(evaluated: texts.never)
      for (key, value) in members {
        shape.set(.init(name: ExactText(key), formula: formula(constant: value, pointer), isRequired: true))
      }
      shape.rules = [.init(keys: texts.everything, formula: .never)]
      result.objects = [shape]
    }
    return result
  }

  /// Adds one constant's set to a union, keeping strings in one list.
  private func add(_ set: ValueSet, to union: inout ValueSet) {
    union.allowsNull = union.allowsNull || set.allowsNull
    union.allowsTrue = union.allowsTrue || set.allowsTrue
    union.allowsFalse = union.allowsFalse || set.allowsFalse
    if !set.numbers.isEmpty { union.numbers = union.numbers.union(set.numbers) }
    if let values = set.strings.first?.values {
      if union.strings.isEmpty {
        union.strings = set.strings
      } else {
        union.strings[0].values!.append(contentsOf: values)
      }
    }
    union.arrays += set.arrays
    union.objects += set.objects
  }

  private func restrictType(
    _ result: inout ValueSet, _ schema: JSONObject, _ keywords: Keywords, _ pointer: String
  ) throws(JSONSchemaError) {
    guard let type = schema["type"] else { return }
    let names: [JSONValue]
    switch type {
    case .string: names = [type]
    case .array(let elements): names = elements
    default: throw invalid(pointer + "/type", "type must be a string or an array of strings")
    }
    var allowed = ValueSet()
    for name in names {
      switch name.stringValue {
      case "null": allowed.allowsNull = true
      case "boolean":
        allowed.allowsTrue = true
        allowed.allowsFalse = true
      case "integer":
        let writesIntegers = keywords.isDeclared && keywords.draft == .draft4
        allowed.numbers = allowed.numbers.union(writesIntegers ? .writtenIntegers : .integers)
      case "number": allowed.numbers = .all
      case "string": allowed.strings = result.strings
      case "array": allowed.arrays = result.arrays
      case "object": allowed.objects = result.objects
      default: throw invalid(pointer + "/type", "\(name.compactText) is not a type")
      }
    }
    result = allowed
  }

  // MARK: Numbers and strings

  func number(_ keyword: String, _ schema: JSONObject, _ pointer: String) throws(JSONSchemaError) -> ExactDecimal? {
    guard let value = schema[keyword] else { return nil }
    guard let number = ExactDecimal(value) else {
      throw invalid(pointer + "/" + keyword, "\(keyword) must be a number, not \(value.kindName)")
    }
    return number
  }

  func count(_ keyword: String, _ schema: JSONObject, _ pointer: String) throws(JSONSchemaError) -> Int? {
    guard let value = schema[keyword] else { return nil }
    guard let count = value.intValue, count >= 0 else {
      throw invalid(pointer + "/" + keyword, "\(keyword) must be an integer that is not negative")
    }
    return min(count, Int(Int32.max))
  }

  private func restrictNumbers(
    _ result: inout ValueSet, _ schema: JSONObject, _ keywords: Keywords, _ pointer: String
  ) throws(JSONSchemaError) {
    var clause = NumberClause()
    if let minimum = try number("minimum", schema, pointer) {
      clause.raise(to: .init(value: minimum, isInclusive: schema["exclusiveMinimum"]?.boolValue != true))
    }
    if let maximum = try number("maximum", schema, pointer) {
      clause.cut(to: .init(value: maximum, isInclusive: schema["exclusiveMaximum"]?.boolValue != true))
    }
    if schema["exclusiveMinimum"]?.boolValue == nil, let minimum = try number("exclusiveMinimum", schema, pointer) {
      clause.raise(to: .init(value: minimum, isInclusive: false))
    }
    if schema["exclusiveMaximum"]?.boolValue == nil, let maximum = try number("exclusiveMaximum", schema, pointer) {
      clause.cut(to: .init(value: maximum, isInclusive: false))
    }
    if let divisor = try number("multipleOf", schema, pointer) {
      guard divisor > .zero else { throw invalid(pointer + "/multipleOf", "multipleOf must be greater than zero") }
      if divisor.coefficient.map({ $0 <= 10_000 }) != true || abs(divisor.power) > 30 {
        try refuse(pointer + "/multipleOf", "multiples of \(divisor) need an automaton of too many states")
        result.isApproximate = true
      } else {
        clause.addMultiple(divisor)
      }
    }
    if clause != NumberClause() { result.numbers = result.numbers.intersection(NumberSet([clause])) }
  }

  private func restrictStrings(
    _ result: inout ValueSet, _ schema: JSONObject, _ pointer: String
  ) throws(JSONSchemaError) {
    var clause = StringClause(language: texts.everything)
    clause.minimum = try count("minLength", schema, pointer) ?? 0
    clause.maximum = try count("maxLength", schema, pointer)
    if let pattern = schema["pattern"] {
      guard let source = pattern.stringValue else { throw invalid(pointer + "/pattern", "pattern must be a string") }
      if let language = try self.pattern(source, at: pointer + "/pattern") {
        clause.language = language
      } else {
        result.isApproximate = true
      }
    }
    if options.assertsFormats, let name = schema["format"]?.stringValue {
      switch formats.language(name) {
      case .language(let language): clause.language = texts.all([clause.language, language])
      case .unknown: break
      case .refused(let reason):
        try refuse(pointer + "/format", "the format \(quoted(name)) \(reason)")
        result.isApproximate = true
      }
    }
    if clause == StringClause(language: texts.everything) { return }
    result.strings = result.strings.compactMap { intersection($0, clause) }
  }

  /// The language of a pattern, or `nil` when it is not enforced.
  func pattern(_ source: String, at pointer: String) throws(JSONSchemaError) -> TextLanguage? {
    if let known = patterns[source] { return known }
    do {
      let language = try texts.search(source)
      patterns[source] = language
      return language
    } catch {
      let reason = "the pattern \(quoted(source)) \(error.reason)"
      if error.isSyntax, !options.relaxed { throw invalid(pointer, reason) }
      try refuse(pointer, reason)
      return nil
    }
  }

  func intersection(_ left: StringClause, _ right: StringClause) -> StringClause? {
    var result = left
    result.minimum = max(left.minimum, right.minimum)
    result.maximum = [left.maximum, right.maximum].compactMap { $0 }.min()
    result.language = texts.all([left.language, right.language])
    if var values = left.values ?? right.values {
      if left.values != nil, let others = right.values {
        let set = Set(others)
        values = values.filter { set.contains($0) }
      }
      values = values.filter { value in
        if result.minimum > 0 || result.maximum != nil {
          let length = value.text.unicodeScalars.count
          if length < result.minimum || result.maximum.map({ length > $0 }) == true { return false }
        }
        return result.language == texts.everything || texts.contains(result.language, value.text)
      }
      if values.isEmpty { return nil }
      var seen: Set<ExactText> = []
      result.values = values.filter { seen.insert($0).inserted }
      result.minimum = 0
      result.maximum = nil
      result.language = texts.everything
      return result
    }
    return isEmpty(result) ? nil : result
  }

  private func isEmpty(_ clause: StringClause) -> Bool {
    if let maximum = clause.maximum, maximum < clause.minimum { return true }
    if clause.language == texts.everything { return false }
    let length = texts.length(clause.minimum, clause.maximum)
    return texts.isEmpty(
      clause.minimum == 0 && clause.maximum == nil ? clause.language : texts.all([clause.language, length]))
      == true
  }

  func complement(_ clause: StringClause) -> [StringClause] {
    let all = StringClause(language: texts.everything)
    if let values = clause.values {
      var result = all
      result.language = texts.complement(texts.choice(values.map { texts.literal($0.text) }))
      return [result]
    }
    var result: [StringClause] = []
    if clause.minimum > 0 {
      var short = all
      short.maximum = clause.minimum - 1
      result.append(short)
    }
    if let maximum = clause.maximum {
      var long = all
      long.minimum = maximum + 1
      result.append(long)
    }
    if clause.language != texts.everything {
      var other = all
      other.language = texts.complement(clause.language)
      result.append(other)
    }
    return result
  }
}
