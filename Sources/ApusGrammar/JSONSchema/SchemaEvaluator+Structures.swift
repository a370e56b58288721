internal import ApusCore

// Arrays and objects of `SchemaEvaluator`: shapes from keywords, and the algebra of sets.
extension SchemaEvaluator {
  // MARK: Sets

  func intersection(_ left: ValueSet, _ right: ValueSet, at pointer: String) throws(JSONSchemaError) -> ValueSet {
    var result = ValueSet()
    result.allowsNull = left.allowsNull && right.allowsNull
    result.allowsTrue = left.allowsTrue && right.allowsTrue
    result.allowsFalse = left.allowsFalse && right.allowsFalse
    result.isApproximate = left.isApproximate || right.isApproximate
    if !left.numbers.isEmpty, !right.numbers.isEmpty {
      try spend(left.numbers.clauses.count * right.numbers.clauses.count, at: pointer)
      result.numbers = left.numbers.intersection(right.numbers)
    }
    try spend(left.strings.count * right.strings.count * 2, at: pointer)
    result.strings = left.strings.flatMap { first in right.strings.compactMap { intersection(first, $0) } }
    for first in left.arrays {
      for second in right.arrays {
        try spend(1, at: pointer)
        if let both = try intersection(first, second) { result.arrays.append(both) }
      }
    }
    for first in left.objects {
      for second in right.objects {
        if let both = try intersection(first, second, at: pointer) { result.objects.append(both) }
      }
    }
    try simplify(&result, at: pointer)
    return result
  }

  func union(_ left: ValueSet, _ right: ValueSet) throws(JSONSchemaError) -> ValueSet {
    var result = left
    result.allowsNull = left.allowsNull || right.allowsNull
    result.allowsTrue = left.allowsTrue || right.allowsTrue
    result.allowsFalse = left.allowsFalse || right.allowsFalse
    result.isApproximate = left.isApproximate || right.isApproximate
    result.numbers = left.numbers.union(right.numbers)
    result.strings += right.strings
    result.arrays += right.arrays
    result.objects += right.objects
    try simplify(&result, at: "")
    return result
  }

  /// Drops what occurs twice and what another alternative contains.
  private func simplify(_ set: inout ValueSet, at pointer: String) throws(JSONSchemaError) {
    if set.strings.count > 1 {
      let everything = StringClause(language: texts.everything)
      if set.strings.contains(everything) {
        set.strings = [everything]
      } else {
        var seen: Set<StringClause> = []
        set.strings = set.strings.filter { seen.insert($0).inserted }
      }
    }
    if set.arrays.count > 1 {
      // A shape that has evaluated something says more than one that holds it.
      let isTracked = set.arrays.contains { $0.evaluatedPrefix > 0 || $0.evaluatesAll || !$0.evaluatedBy.isEmpty }
      if !isTracked, set.arrays.contains(ArrayShape()) {
        set.arrays = [ArrayShape()]
      } else {
        var seen: Set<ArrayShape> = []
        set.arrays = set.arrays.filter { seen.insert($0).inserted }
      }
    }
    if set.objects.count > 1 {
      let everything = ObjectShape(evaluated: texts.never)
      if set.objects.contains(everything), set.objects.allSatisfy({ $0.evaluated == texts.never }) {
        set.objects = [everything]
      } else {
        var seen: Set<ObjectShape> = []
        set.objects = set.objects.filter { seen.insert($0).inserted }
        if set.objects.count > 2 { set.objects = try withoutContained(set.objects, at: pointer) }
      }
    }
    if set.objects.count > options.shapeLimit || set.arrays.count > options.shapeLimit {
      throw JSONSchemaError(
        .tooLarge, pointer: pointer, "it amounts to more than \(options.shapeLimit) alternatives of objects or arrays")
    }
  }

  /// The shapes that no other one contains. Unions of what several schemas forbid hold many that others contain.
  private func withoutContained(_ shapes: [ObjectShape], at pointer: String) throws(JSONSchemaError) -> [ObjectShape] {
    // The comparison of all pairs must stay cheap.
    if shapes.count > 400 { return shapes }
    // The general ones come first: those that name and ask for less.
    let order = shapes.indices.sorted { (shapes[$0].weight, $0) < (shapes[$1].weight, $1) }
    var kept: [Int] = []
    var comparisons = 0
    for index in order {
      var isContained = false
      for other in kept {
        comparisons += 1
        if contains(shapes[other], shapes[index]) {
          isContained = true
          break
        }
      }
      if !isContained { kept.append(index) }
    }
    try spend(comparisons / 16, at: pointer)
    return kept.sorted().map { shapes[$0] }
  }

  /// Whether each object of one shape is seen to have another, which is when what the other asks for is asked for.
  private func contains(_ general: ObjectShape, _ special: ObjectShape) -> Bool {
    if general.evaluated != special.evaluated { return false }
    if let maximum = general.maximum, special.maximum.map({ $0 > maximum }) ?? true { return false }
    if general.minimum > special.minimum, general.minimum > special.properties.count(where: \.isRequired) {
      return false
    }
    for property in general.properties {
      let own = special.property(property.name)
      if property.isRequired, own?.isRequired != true { return false }
      if property.formula != .anything,
        !implies(own?.formula ?? ruleFormula(special, property.name), property.formula)
      {
        return false
      }
    }
    for rule in general.rules {
      guard special.rules.contains(where: { $0.keys == rule.keys && implies($0.formula, rule.formula) }) else {
        return false
      }
    }
    if !general.rules.isEmpty {
      for property in special.properties where general.property(property.name) == nil {
        if !implies(property.formula, ruleFormula(general, property.name)) { return false }
      }
    }
    for existence in general.existences
    where !special.existences.contains(where: { $0.keys == existence.keys && $0.formula == existence.formula }) {
      return false
    }
    for dependency in general.dependencies where !special.dependencies.contains(dependency) { return false }
    return true
  }

  /// All values outside a set.
  func complement(_ set: ValueSet, at pointer: String) throws(JSONSchemaError) -> ValueSet {
    if set.isApproximate {
      throw JSONSchemaError(.unsupported, pointer: pointer, "its negation cannot be enforced")
    }
    var result = everything
    result.allowsNull = !set.allowsNull
    result.allowsTrue = !set.allowsTrue
    result.allowsFalse = !set.allowsFalse
    try spend(set.numbers.clauses.count, at: pointer)
    result.numbers = set.numbers.complement
    for clause in set.strings {
      if let values = clause.values, values.count > 4_000 {
        throw JSONSchemaError(.tooLarge, pointer: pointer, "the negation of more than 4000 strings")
      }
      var strings = everything
      strings.strings = complement(clause)
      result = try intersection(result, strings, at: pointer)
    }
    for shape in set.arrays {
      var arrays = everything
      arrays.arrays = try complement(shape, at: pointer)
      result = try intersection(result, arrays, at: pointer)
    }
    for shape in set.objects {
      var objects = everything
      objects.objects = try complement(shape, at: pointer)
      result = try intersection(result, objects, at: pointer)
    }
    return result
  }

  // MARK: Arrays

  func intersection(_ left: ArrayShape, _ right: ArrayShape) throws(JSONSchemaError) -> ArrayShape? {
    var result = left
    let count = max(left.prefix.count, right.prefix.count)
    result.prefix = (0..<count).map { and(left.element($0), right.element($0)) }
    result.rest = and(left.rest, right.rest)
    result.minimum = max(left.minimum, right.minimum)
    result.maximum = [left.maximum, right.maximum].compactMap { $0 }.min()
    for containment in right.containments where !result.containments.contains(containment) {
      result.containments.append(containment)
    }
    result.uniqueAt = left.uniqueAt ?? right.uniqueAt
    result.evaluatedPrefix = max(left.evaluatedPrefix, right.evaluatedPrefix)
    result.evaluatesAll = left.evaluatesAll || right.evaluatesAll
    result.evaluatedBy = left.evaluatedBy + right.evaluatedBy.filter { !left.evaluatedBy.contains($0) }
    return try normalized(result)
  }

  /// The shape in a form in which nothing is said twice, or `nil` if no array has it.
  func normalized(_ shape: ArrayShape) throws(JSONSchemaError) -> ArrayShape? {
    var shape = shape
    for index in shape.prefix.indices where try isConjunctionEmpty(shape.prefix[index]) { shape.prefix[index] = .never }
    if try isConjunctionEmpty(shape.rest) { shape.rest = .never }
    if let first = shape.prefix.firstIndex(of: .never) {
      shape.maximum = min(shape.maximum ?? first, first)
    } else if shape.rest == .never {
      shape.maximum = min(shape.maximum ?? shape.prefix.count, shape.prefix.count)
    }
    if let maximum = shape.maximum {
      if shape.minimum > maximum { return nil }
      if shape.prefix.count >= maximum {
        shape.prefix.removeLast(shape.prefix.count - maximum)
        shape.rest = .never
      }
    }
    while let last = shape.prefix.last, last == shape.rest { shape.prefix.removeLast() }
    var kept: [ArrayShape.Containment] = []
    for var containment in shape.containments {
      if containment.formula == .anything {
        if containment.minimum > 0 { shape.minimum = max(shape.minimum, containment.from + containment.minimum) }
        if let maximum = containment.maximum {
          shape.maximum = min(shape.maximum ?? Int.max, containment.from + maximum)
        }
        continue
      }
      if try isConjunctionEmpty(containment.formula) { containment.formula = .never }
      if containment.formula == .never {
        if containment.minimum > 0 { return nil }
        continue
      }
      if containment.maximum == 0 {
        if containment.minimum > 0 { return nil }
        // None: every element is something else.
        let other = not(containment.formula)
        while shape.prefix.count < containment.from { shape.prefix.append(shape.rest) }
        for index in containment.from..<max(containment.from, shape.prefix.count) {
          shape.prefix[index] = and(shape.prefix[index], other)
        }
        shape.rest = and(shape.rest, other)
        continue
      }
      if containment.minimum == 0, containment.maximum == nil { continue }
      if let maximum = containment.maximum, maximum < containment.minimum { return nil }
      kept.append(containment)
    }
    let changed = kept.count != shape.containments.count
    shape.containments = kept
    if let maximum = shape.maximum, shape.minimum > maximum { return nil }
    if shape.maximum.map({ $0 <= 1 }) == true { shape.uniqueAt = nil }
    return changed ? try normalized(shape) : shape
  }

  /// Whether a conjunction of several schemas is seen to be empty. Single schemas are left for later.
  private func isConjunctionEmpty(_ formula: Formula) throws(JSONSchemaError) -> Bool {
    if formula == .never { return true }
    return isCompound(formula) ? try isPlainlyEmpty(formula) : false
  }

  private func complement(_ shape: ArrayShape, at pointer: String) throws(JSONSchemaError) -> [ArrayShape] {
    if shape.uniqueAt != nil {
      throw JSONSchemaError(.unsupported, pointer: pointer, "the negation of uniqueItems cannot be enforced")
    }
    var result: [ArrayShape] = []
    if shape.minimum > 0 {
      var short = ArrayShape()
      short.maximum = shape.minimum - 1
      result.append(short)
    }
    let lengthOfPrefix = shape.rest == .never ? shape.prefix.count : nil
    if let maximum = shape.maximum ?? lengthOfPrefix {
      var long = ArrayShape()
      long.minimum = maximum + 1
      result.append(long)
    }
    for (index, formula) in shape.prefix.enumerated() where formula != .anything {
      var other = ArrayShape()
      other.prefix = Array(repeating: .anything, count: index) + [not(formula)]
      other.minimum = index + 1
      if let other = try normalized(other) { result.append(other) }
    }
    if shape.rest != .anything, shape.rest != .never {
      var other = ArrayShape()
      other.containments = [.init(formula: not(shape.rest), from: shape.prefix.count)]
      if let other = try normalized(other) { result.append(other) }
    }
    for containment in shape.containments {
      var fewer = ArrayShape()
      if containment.minimum > 0 {
        fewer.containments = [
          .init(
            formula: containment.formula, from: containment.from, minimum: 0, maximum: containment.minimum - 1)
        ]
        if let fewer = try normalized(fewer) { result.append(fewer) }
      }
      if let maximum = containment.maximum {
        var more = ArrayShape()
        more.containments = [.init(formula: containment.formula, from: containment.from, minimum: maximum + 1)]
        if let more = try normalized(more) { result.append(more) }
      }
    }
    return result
  }

  // MARK: Objects

  /// What the rules of a shape ask of the value under a key that is not named.
  func ruleFormula(_ shape: ObjectShape, _ name: ExactText) -> Formula {
    var formula = Formula.anything
    for rule in shape.rules where texts.contains(rule.keys, name.text) { formula = and(formula, rule.formula) }
    return formula
  }

  func intersection(
    _ left: ObjectShape, _ right: ObjectShape, at pointer: String
  ) throws(JSONSchemaError) -> ObjectShape? {
    if left.isUniversal, left.evaluated == texts.never { return right }
    if right.isUniversal, right.evaluated == texts.never { return left }
    try spend(1 + (left.properties.count + right.properties.count) / 8, at: pointer)
    var result = left
    for property in right.properties {
      if let own = left.property(property.name) {
        result.set(
          .init(
            name: property.name, formula: and(own.formula, property.formula),
            isRequired: own.isRequired || property.isRequired))
      } else {
        result.set(
          .init(
            name: property.name, formula: and(property.formula, ruleFormula(left, property.name)),
            isRequired: property.isRequired))
      }
    }
    if !right.rules.isEmpty {
      for property in left.properties where right.property(property.name) == nil {
        result.set(
          .init(
            name: property.name, formula: and(property.formula, ruleFormula(right, property.name)),
            isRequired: property.isRequired))
      }
    }
    for rule in right.rules { result.add(rule) }
    for existence in right.existences where !result.existences.contains(existence) {
      result.existences.append(existence)
    }
    for dependency in right.dependencies where !result.dependencies.contains(dependency) {
      result.dependencies.append(dependency)
    }
    result.minimum = max(left.minimum, right.minimum)
    result.maximum = [left.maximum, right.maximum].compactMap { $0 }.min()
    result.evaluated = texts.choice([left.evaluated, right.evaluated])
    return try normalized(result)
  }

  /// The keys that no property may have unless it is named.
  func forbiddenKeys(_ shape: ObjectShape) -> TextLanguage {
    texts.choice(shape.rules.filter { $0.formula == .never }.map(\.keys))
  }

  /// The shape in a form in which nothing is said twice, or `nil` if no object has it.
  func normalized(_ shape: ObjectShape) throws(JSONSchemaError) -> ObjectShape? {
    var shape = shape
    for property in shape.properties where property.formula != .never && isCompound(property.formula) {
      if try isPlainlyEmpty(property.formula) {
        shape.set(.init(name: property.name, formula: .never, isRequired: property.isRequired))
      }
    }
    for index in shape.rules.indices
    where shape.rules[index].formula != .never && isCompound(shape.rules[index].formula) {
      if try isPlainlyEmpty(shape.rules[index].formula) { shape.rules[index].formula = .never }
    }
    guard applyDependencies(&shape) else { return nil }
    for property in shape.properties where property.isRequired && property.formula == .never { return nil }
    let required = shape.properties.count { $0.isRequired }
    if let maximum = shape.maximum, required > maximum { return nil }
    let forbidden = forbiddenKeys(shape)
    if shape.minimum > 0 || shape.maximum != nil {
      let possible = shape.properties.count { $0.formula != .never }
      if shape.minimum > possible || shape.maximum.map({ $0 >= possible }) == true,
        texts.isEmpty(texts.complement(forbidden)) == true
      {
        if shape.minimum > possible { return nil }
        if shape.maximum.map({ $0 >= possible }) == true { shape.maximum = nil }
      }
      if shape.minimum <= required { shape.minimum = 0 }
    }
    var kept: [ObjectShape.Existence] = []
    for existence in shape.existences {
      if existence.keys == texts.never { return nil }
      if try isPlainlyEmpty(existence.formula) { return nil }
      var isMet = false
      for property in shape.properties
      where property.isRequired && texts.contains(existence.keys, property.name.text) {
        if try isContained(property.formula, existence.formula) {
          isMet = true
          break
        }
      }
      if !isMet { kept.append(existence) }
    }
    shape.existences = kept
    return shape
  }

  /// Draws conclusions from "if this property, then those". `false` if no object is left.
  private func applyDependencies(_ shape: inout ObjectShape) -> Bool {
    guard !shape.dependencies.isEmpty else { return true }
    var changed = true
    while changed {
      changed = false
      var kept: [ObjectShape.Dependency] = []
      for dependency in shape.dependencies {
        let subject = shape.property(dependency.name)
        if subject?.formula == .never { continue }
        var missing: [ExactText] = []
        var isImpossible = false
        for name in dependency.required where name != dependency.name {
          let object = shape.property(name)
          if object?.isRequired == true { continue }
          if (object?.formula ?? ruleFormula(shape, name)) == .never { isImpossible = true }
          missing.append(name)
        }
        if isImpossible {
          if subject?.isRequired == true { return false }
          shape.set(.init(name: dependency.name, formula: .never, isRequired: false))
          changed = true
        } else if subject?.isRequired == true {
          for name in missing {
            let formula = shape.property(name)?.formula ?? ruleFormula(shape, name)
            shape.set(.init(name: name, formula: formula, isRequired: true))
            changed = true
          }
        } else if !missing.isEmpty {
          kept.append(.init(name: dependency.name, required: missing))
        }
      }
      shape.dependencies = kept
    }
    return true
  }

  /// The objects that do not have a shape, as shapes with nothing in common: what breaks the first condition; what keeps
  /// the first and breaks the second; and so on. With a discriminating property first, the complements of many such
  /// shapes intersect without multiplying.
  private func complement(_ shape: ObjectShape, at pointer: String) throws(JSONSchemaError) -> [ObjectShape] {
    let all = ObjectShape(evaluated: texts.never)
    var result: [ObjectShape] = []
    var kept = all
    /// Adds what breaks a condition, and keeps it from here on.
    func split(broken: ObjectShape, held: ObjectShape) throws(JSONSchemaError) -> Bool {
      try spend(1, at: pointer)
      if let alternative = try intersection(kept, broken, at: pointer) { result.append(alternative) }
      guard let rest = try intersection(kept, held, at: pointer) else { return false }
      kept = rest
      return true
    }
    let required = shape.properties.filter(\.isRequired)
    let ordered = required.filter { isDiscriminating($0.formula) } + required.filter { !isDiscriminating($0.formula) }
    for property in ordered {
      // Not "present and as asked": absent, or present and otherwise.
      var broken = all
      broken.set(.init(name: property.name, formula: not(property.formula), isRequired: false))
      var held = all
      held.set(property)
      if try !split(broken: broken, held: held) { return result }
    }
    if shape.minimum > 0 {
      var (broken, held) = (all, all)
      broken.maximum = shape.minimum - 1
      held.minimum = shape.minimum
      if try !split(broken: broken, held: held) { return result }
    }
    if let maximum = shape.maximum {
      var (broken, held) = (all, all)
      broken.minimum = maximum + 1
      held.maximum = maximum
      if try !split(broken: broken, held: held) { return result }
    }
    for property in shape.properties where !property.isRequired && property.formula != .anything {
      var (broken, held) = (all, all)
      broken.set(.init(name: property.name, formula: not(property.formula), isRequired: true))
      held.set(property)
      if try !split(broken: broken, held: held) { return result }
    }
    let others = texts.complement(texts.choice(shape.properties.map { texts.literal($0.name.text) }))
    for rule in shape.rules where rule.formula != .anything {
      let keys = texts.all([rule.keys, others])
      var (broken, held) = (all, all)
      broken.existences = [.init(keys: keys, formula: not(rule.formula), pointer: pointer)]
      held.rules = [.init(keys: keys, formula: rule.formula)]
      if try !split(broken: broken, held: held) { return result }
    }
    for existence in shape.existences {
      var (broken, held) = (all, all)
      broken.rules = [.init(keys: existence.keys, formula: not(existence.formula))]
      held.existences = [existence]
      if try !split(broken: broken, held: held) { return result }
    }
    for dependency in shape.dependencies {
      for name in dependency.required {
        var (broken, held) = (all, all)
        broken.set(.init(name: dependency.name, formula: .anything, isRequired: true))
        broken.set(.init(name: name, formula: .never, isRequired: false))
        held.dependencies = [.init(name: dependency.name, required: [name])]
        if try !split(broken: broken, held: held) { return result }
      }
    }
    return result
  }
}

extension ObjectShape {
  /// Whether every object has this shape.
  var isUniversal: Bool {
    properties.isEmpty && rules.isEmpty && existences.isEmpty && dependencies.isEmpty && minimum == 0 && maximum == nil
  }

  /// How much the shape asks for, roughly.
  var weight: Int {
    properties.reduce(0) { $0 + ($1.formula == .anything ? 0 : 1) + ($1.isRequired ? 1 : 0) } + rules.count
      + existences.count + dependencies.count + (minimum > 0 ? 1 : 0) + (maximum == nil ? 0 : 1)
  }

  mutating func add(_ rule: Rule) {
    for index in rules.indices where rules[index].keys == rule.keys {
      if rules[index].formula == rule.formula { return }
    }
    rules.append(rule)
  }
}
