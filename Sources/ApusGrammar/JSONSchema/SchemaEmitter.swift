internal import ApusCore

/// Writes the sets of values that a schema amounts to as a grammar.
///
/// First every formula that can be reached is prepared; then it is found which of them some finite value satisfies; then
/// the grammar is written without the rest, so that no text that is accepted so far leads nowhere.
struct SchemaEmitter {
  /// An array shape without anything the grammar has no word for.
  private struct ArrayPlan {
    var shape: ArrayShape
    /// Elements that count, if their number matters.
    var containment: ArrayShape.Containment?
    /// If elements must differ: all values they can have.
    var values: [JSONValue]?
  }

  /// An object shape with disjoint classes of keys.
  private struct ObjectPlan {
    var shape: ObjectShape
    /// In this order: a key belongs to the first class that contains it.
    var classes: [(keys: TextLanguage, formula: Formula)]
    var additional: Formula
  }

  private struct Plan {
    var scalars: ValueSet
    var arrays: [ArrayPlan] = []
    var objects: [ObjectPlan] = []
  }

  private let evaluator: SchemaEvaluator
  private let options: JSONSchemaOptions
  private let forms: NumberForms
  private var plans: [Formula: Plan] = [:]
  private var order: [Formula] = []
  private var productive: Set<Formula> = []
  private var grammar = Grammar()
  private var rules: [Formula: RuleReference] = [:]
  private var pending: [Formula] = []

  init(_ evaluator: SchemaEvaluator, _ options: JSONSchemaOptions) {
    self.evaluator = evaluator
    self.options = options
    forms = NumberForms(plain: options.plainNumbers)
  }

  mutating func emit() throws(JSONSchemaError) -> Grammar {
    let root = try evaluator.rootFormula
    try prepareAll(root)
    findProductive()
    guard isProductive(root) else {
      throw JSONSchemaError(.unsatisfiable, pointer: "", "no JSON value satisfies the schema")
    }
    grammar.root = try expression(root)
    while let formula = pending.popLast() {
      let body = try body(formula)
      grammar.define(rules[formula]!, body)
    }
    return grammar
  }

  // MARK: Preparation

  private mutating func prepareAll(_ root: Formula) throws(JSONSchemaError) {
    var queue = [root]
    var next = 0
    while next < queue.count {
      let formula = queue[next]
      next += 1
      if formula == .never || plans[formula] != nil { continue }
      if plans.count > options.ruleLimit {
        throw JSONSchemaError(.tooLarge, pointer: "", "the grammar needs more than \(options.ruleLimit) rules")
      }
      let plan = try prepare(formula)
      plans[formula] = plan
      order.append(formula)
      for array in plan.arrays {
        if array.values != nil { continue }
        queue += array.shape.prefix
        queue.append(array.shape.rest)
        if let containment = array.containment {
          for index in 0...array.shape.prefix.count {
            let element = array.shape.element(index)
            queue.append(evaluator.and(element, containment.formula))
            if containment.maximum != nil { queue.append(evaluator.and(element, evaluator.not(containment.formula))) }
          }
        }
      }
      for object in plan.objects {
        queue += object.shape.properties.map(\.formula)
        queue += object.classes.map(\.formula)
        queue.append(object.additional)
      }
    }
  }

  private func prepare(_ formula: Formula) throws(JSONSchemaError) -> Plan {
    let set = try evaluator.values(formula)
    let pointer = evaluator.pointer(formula)
    try evaluator.spend(1 + set.objects.count + set.arrays.count, at: pointer)
    var plan = Plan(scalars: set)
    for shape in set.arrays {
      if let array = try prepare(shape, pointer) { plan.arrays.append(array) }
    }
    for shape in set.objects {
      for resolved in try resolveExistences(shape) {
        plan.objects.append(try prepare(resolved, pointer))
      }
    }
    return plan
  }

  private func prepare(_ shape: ArrayShape, _ pointer: String) throws(JSONSchemaError) -> ArrayPlan? {
    var shape = shape
    var kept: [ArrayShape.Containment] = []
    for containment in shape.containments {
      // Where all elements count, or none, it is a matter of length.
      var isAll = true
      var isNone = true
      for index in containment.from...max(containment.from, shape.prefix.count) {
        let element = shape.element(index)
        if element == .never { continue }
        if isAll, try !evaluator.isContained(element, containment.formula) { isAll = false }
        if isNone, try !evaluator.isPlainlyEmpty(evaluator.and(element, containment.formula)) { isNone = false }
      }
      if isNone {
        if containment.minimum > 0 { return nil }
      } else if isAll {
        if containment.minimum > 0 { shape.minimum = max(shape.minimum, containment.from + containment.minimum) }
        if let maximum = containment.maximum {
          shape.maximum = min(shape.maximum ?? Int.max, containment.from + maximum)
        }
      } else if let index = kept.firstIndex(where: { $0.formula == containment.formula && $0.from == containment.from })
      {
        kept[index].minimum = max(kept[index].minimum, containment.minimum)
        kept[index].maximum = [kept[index].maximum, containment.maximum].compactMap { $0 }.min()
      } else {
        kept.append(containment)
      }
    }
    shape.containments = []
    guard let normalized = try evaluator.normalized(shape) else { return nil }
    shape = normalized
    if kept.count > 1 {
      try evaluator.refuse(pointer, "more than one condition on how many elements an array contains")
      kept.removeLast(kept.count - 1)
    }
    if let containment = kept.first {
      if let maximum = containment.maximum, maximum < containment.minimum { return nil }
      while shape.prefix.count < containment.from { shape.prefix.append(shape.rest) }
    }
    var plan = ArrayPlan(shape: shape, containment: kept.first)
    if let unique = shape.uniqueAt {
      if kept.isEmpty, let values = try distinctValues(shape) {
        plan.values = values
      } else {
        try evaluator.refuse(unique, "uniqueItems is enforced only for at most 8 possible values")
        plan.shape.uniqueAt = nil
      }
    }
    return plan
  }

  /// All values that elements of an array can have, if they are few.
  private func distinctValues(_ shape: ArrayShape) throws(JSONSchemaError) -> [JSONValue]? {
    var result: [JSONValue] = []
    for index in 0...shape.prefix.count where shape.element(index) != .never {
      guard let values = try evaluator.finiteValues(shape.element(index), limit: 8) else { return nil }
      for value in values where !result.contains(value) { result.append(value) }
      if result.count > 8 { return nil }
    }
    return result
  }

  /// Shapes without existences that amount to one with some: each existence is met by some property.
  private func resolveExistences(_ shape: ObjectShape) throws(JSONSchemaError) -> [ObjectShape] {
    guard let existence = shape.existences.first else { return [shape] }
    try evaluator.spend(1 + shape.properties.count / 8, at: existence.pointer)
    let texts = evaluator.texts
    var base = shape
    base.existences.removeFirst()
    var result: [ObjectShape] = []
    for property in shape.properties where property.formula != .never {
      guard texts.contains(existence.keys, property.name.text) else { continue }
      var met = base
      met.set(
        .init(
          name: property.name, formula: evaluator.and(property.formula, existence.formula), isRequired: true))
      if let met = try evaluator.normalized(met) { result += try resolveExistences(met) }
    }
    let names = texts.choice(shape.properties.map { texts.literal($0.name.text) })
    let open = texts.complement(texts.choice([names, evaluator.forbiddenKeys(shape)]))
    let candidates = texts.all([existence.keys, open])
    if texts.isEmpty(candidates) == true { return result }
    // A property that is not named is needed. If any such will do, their number says whether there is one.
    let optional = shape.properties.filter { !$0.isRequired && $0.formula != .never }
    var anyWillDo = texts.isEmpty(texts.all([open, texts.complement(existence.keys)])) == true
    if anyWillDo, existence.formula != .anything {
      anyWillDo = false
      for rule in shape.rules where rule.formula != .never {
        guard texts.isEmpty(texts.all([open, texts.complement(rule.keys)])) == true else { continue }
        if try evaluator.isContained(rule.formula, existence.formula) { anyWillDo = true }
      }
    }
    guard anyWillDo, optional.count <= 6 else {
      try evaluator.refuse(existence.pointer, "needs some property that is not named to have a certain value")
      result += try resolveExistences(base)
      return result
    }
    for subset in 0..<(1 << optional.count) {
      var met = base
      var present = shape.properties.count { $0.isRequired }
      for (index, property) in optional.enumerated() {
        let isPresent = subset >> index & 1 == 1
        if isPresent { present += 1 }
        met.set(
          .init(
            name: property.name, formula: isPresent ? property.formula : .never, isRequired: isPresent))
      }
      met.minimum = max(met.minimum, present + 1)
      if let met = try evaluator.normalized(met) { result += try resolveExistences(met) }
    }
    return result
  }

  private func prepare(_ shape: ObjectShape, _ pointer: String) throws(JSONSchemaError) -> ObjectPlan {
    let texts = evaluator.texts
    var shape = shape
    // Names in dependencies must be declared.
    for dependency in shape.dependencies {
      for name in [dependency.name] + dependency.required where shape.property(name) == nil {
        shape.set(.init(name: name, formula: evaluator.ruleFormula(shape, name), isRequired: false))
      }
    }
    // The rules split all keys into classes; each class has the rules that hold in it.
    var classes: [(exact: TextLanguage, keys: TextLanguage, formula: Formula, rules: Int)] = [
      (texts.everything, texts.everything, .anything, 0)
    ]
    for rule in shape.rules {
      var split: [(exact: TextLanguage, keys: TextLanguage, formula: Formula, rules: Int)] = []
      for part in classes {
        let inside = texts.all([part.exact, rule.keys])
        let outside = texts.all([part.exact, texts.complement(rule.keys)])
        if texts.isEmpty(inside) != true {
          split.append(
            (inside, texts.all([part.keys, rule.keys]), evaluator.and(part.formula, rule.formula), part.rules + 1))
        }
        if texts.isEmpty(outside) != true { split.append((outside, part.keys, part.formula, part.rules)) }
        try evaluator.spend(4, at: pointer)
      }
      classes = split
      if classes.count > 256 {
        throw JSONSchemaError(
          .tooLarge, pointer: pointer, "its patterns for property names overlap in more than 256 ways")
      }
    }
    // The first class that contains a key decides: with the classes of most rules first, a class need not exclude others.
    classes.sort { $0.rules > $1.rules }
    let last = classes.popLast()
    return ObjectPlan(
      shape: shape, classes: classes.map { ($0.keys, $0.formula) }, additional: last?.formula ?? .never)
  }

  // MARK: Productivity

  private func isProductive(_ formula: Formula) -> Bool { productive.contains(formula) }

  /// Finds the formulas that some finite value satisfies: the least fixed point.
  private mutating func findProductive() {
    var remaining = order
    var changed = true
    while changed {
      changed = false
      remaining.removeAll { formula in
        guard isSatisfiable(plans[formula]!) else { return false }
        productive.insert(formula)
        changed = true
        return true
      }
    }
  }

  private func isSatisfiable(_ plan: Plan) -> Bool {
    let set = plan.scalars
    if set.allowsNull || set.allowsTrue || set.allowsFalse || !set.numbers.isEmpty || !set.strings.isEmpty {
      return true
    }
    return plan.arrays.contains { isSatisfiable($0) } || plan.objects.contains { isSatisfiable($0) }
  }

  private func isSatisfiable(_ plan: ArrayPlan) -> Bool {
    if let values = plan.values { return plan.shape.minimum <= values.count }
    let possible = possibleLength(plan)
    if plan.shape.minimum > possible { return false }
    guard let containment = plan.containment, containment.minimum > 0 else { return true }
    // Elements before `from` do not count.
    var counting = 0
    for index in containment.from..<max(containment.from, min(plan.shape.prefix.count, possible)) {
      if isProductive(evaluator.and(plan.shape.prefix[index], containment.formula)) { counting += 1 }
    }
    if possible > plan.shape.prefix.count, isProductive(evaluator.and(plan.shape.rest, containment.formula)) {
      counting += possible - plan.shape.prefix.count
    }
    return counting >= containment.minimum
  }

  private func possibleLength(_ plan: ArrayPlan) -> Int {
    let shape = plan.shape
    if let first = shape.prefix.firstIndex(where: { !isProductive($0) }) { return min(first, shape.maximum ?? first) }
    return isProductive(shape.rest) ? shape.maximum ?? Int.max : min(shape.prefix.count, shape.maximum ?? Int.max)
  }

  private func isSatisfiable(_ plan: ObjectPlan) -> Bool {
    var possible = 0
    for property in plan.shape.properties {
      if isProductive(property.formula) { possible += 1 } else if property.isRequired { return false }
    }
    if plan.shape.minimum <= possible { return true }
    return isProductive(plan.additional) || plan.classes.contains { isProductive($0.formula) }
  }

  // MARK: Expressions

  /// What a formula's values look like in place: scalars as they are, the rest by a rule.
  private mutating func expression(_ formula: Formula) throws(JSONSchemaError) -> GrammarExpression {
    guard isProductive(formula), let plan = plans[formula] else { return .never }
    if plan.arrays.isEmpty, plan.objects.isEmpty { return try scalars(plan.scalars, formula) }
    if let known = rules[formula] { return .rule(known) }
    let name = formula == .anything ? "any" : evaluator.pointer(formula)
    let rule = grammar.addRule(name.isEmpty ? "root" : name)
    rules[formula] = rule
    pending.append(formula)
    return .rule(rule)
  }

  private mutating func body(_ formula: Formula) throws(JSONSchemaError) -> GrammarExpression {
    let plan = plans[formula]!
    var choices: [GrammarExpression] = []
    let scalars = try scalars(plan.scalars, formula)
    if scalars != .never { choices.append(scalars) }
    for array in plan.arrays where isSatisfiable(array) { choices.append(try expression(array)) }
    for object in plan.objects where isSatisfiable(object) { choices.append(try expression(object)) }
    return choices.count == 1 ? choices[0] : .choice(choices)
  }

  private func scalars(_ set: ValueSet, _ formula: Formula) throws(JSONSchemaError) -> GrammarExpression {
    var parts: [RegularExpression] = []
    if set.allowsNull { parts.append(.text("null")) }
    if set.allowsTrue { parts.append(.text("true")) }
    if set.allowsFalse { parts.append(.text("false")) }
    if !set.numbers.isEmpty {
      if let numbers = NumberTexts.expression(set.numbers, forms) {
        parts.append(numbers)
      } else {
        try evaluator.refuse(evaluator.pointer(formula), "its multiples need an automaton of too many states")
        parts.append(NumberTexts.all(forms))
      }
    }
    if !set.strings.isEmpty { parts.append(.jsonString(strings(set.strings))) }
    if parts.isEmpty { return .never }
    return .regular(parts.count == 1 ? parts[0] : .union(parts))
  }

  /// The contents of strings.
  private func strings(_ clauses: [StringClause]) -> RegularExpression {
    let parts = clauses.map { clause in
      if let values = clause.values { return RegularExpression.anyOf(values.map(\.text)) }
      var constraints: [RegularExpression] = []
      let language = clause.language
      if language != evaluator.texts.everything {
        if let counted = evaluator.texts.counted(language, clause.minimum, clause.maximum) {
          return evaluator.texts.expression(counted)
        }
        constraints.append(evaluator.texts.expression(language))
      }
      let (shortest, longest) = evaluator.texts.lengths(language)
      let minimum = clause.minimum <= shortest ? 0 : clause.minimum
      var maximum = clause.maximum
      if let bound = clause.maximum, let longest, longest <= bound { maximum = nil }
      if minimum > 0 || maximum != nil { constraints.append(.length(minimum, maximum)) }
      if constraints.isEmpty { return .anything }
      return constraints.count == 1 ? constraints[0] : .intersection(constraints)
    }
    return parts.count == 1 ? parts[0] : .union(parts)
  }

  private mutating func expression(_ plan: ArrayPlan) throws(JSONSchemaError) -> GrammarExpression {
    let shape = plan.shape
    if let values = plan.values { return try distinct(plan, values) }
    var array = ArrayExpression(of: nil)
    array.whitespace = options.whitespace
    func element(_ index: Int, _ emitter: inout SchemaEmitter) throws(JSONSchemaError) -> ArrayExpression.Element {
      let formula = shape.element(index)
      guard let containment = plan.containment, index >= containment.from else {
        return .init(try emitter.expression(formula))
      }
      let matching = emitter.evaluator.and(formula, containment.formula)
      let plain =
        containment.maximum == nil
        ? formula : emitter.evaluator.and(formula, emitter.evaluator.not(containment.formula))
      return .init(try emitter.expression(plain), matching: try emitter.expression(matching))
    }
    let possible = possibleLength(plan)
    let prefix = min(shape.prefix.count, possible)
    for index in 0..<prefix { array.prefix.append(try element(index, &self)) }
    if possible > prefix { array.items = try element(shape.prefix.count, &self) }
    array.minimumCount = shape.minimum
    array.maximumCount = shape.maximum.map { min($0, possible) }
    if let containment = plan.containment {
      array.minimumMatches = containment.minimum
      array.maximumMatches = containment.maximum
    }
    return .array(array)
  }

  private mutating func expression(_ plan: ObjectPlan) throws(JSONSchemaError) -> GrammarExpression {
    var object = ObjectExpression()
    object.order = options.order
    object.whitespace = options.whitespace
    for property in plan.shape.properties {
      object.properties.append(
        .init(property.name.text, try expression(property.formula), isRequired: property.isRequired))
    }
    for part in plan.classes {
      object.patternProperties.append(
        .init(evaluator.texts.expression(part.keys), try expression(part.formula)))
    }
    let additional = try expression(plan.additional)
    object.additional = additional == .never ? nil : additional
    object.minimumCount = plan.shape.minimum
    object.maximumCount = plan.shape.maximum
    object.dependentRequired = plan.shape.dependencies.map { ($0.name.text, $0.required.map(\.text)) }
    return .object(object)
  }

  /// An array of different values out of a few: a rule for each set of values used so far.
  private mutating func distinct(
    _ plan: ArrayPlan, _ values: [JSONValue]
  ) throws(JSONSchemaError) -> GrammarExpression {
    let shape = plan.shape
    var texts: [GrammarExpression] = []
    for value in values { texts.append(.regular(evaluator.text(of: value, forms))) }
    var allowed: [[Bool]] = []
    for index in 0...shape.prefix.count {
      let possible =
        shape.element(index) == .never ? [] : try evaluator.finiteValues(shape.element(index), limit: 8) ?? []
      allowed.append(values.map { possible.contains($0) })
    }
    let space: GrammarExpression
    let separator: GrammarExpression
    let spaces = ScalarRanges([0x09...0x0A, 0x0D...0x0D, 0x20...0x20])
    switch options.whitespace {
    case .compact: (space, separator) = (.empty, .text(","))
    case .fixed: (space, separator) = (.empty, .text(", "))
    case .spaced:
      (space, separator) = (
        .empty, .sequence([.text(","), .repetition(.text(" "), minimum: 0, maximum: 1)])
      )
    case .flexible(let maximum):
      space = .repetition(.characters(spaces), minimum: 0, maximum: maximum)
      separator = .sequence([space, .text(","), space])
    }
    let close = GrammarExpression.sequence([space, .text("]")])
    // From the fullest sets down, so that what follows a set exists before it does.
    var after: [Int: GrammarExpression] = [:]
    let full = 1 << values.count
    for used in stride(from: full - 1, through: 0, by: -1) {
      let count = used.nonzeroBitCount
      if let maximum = shape.maximum, count > maximum { continue }
      var choices: [GrammarExpression] = []
      if count >= shape.minimum, count > 0 { choices.append(close) }
      if shape.maximum.map({ count < $0 }) ?? true {
        for (index, text) in texts.enumerated() where used >> index & 1 == 0 {
          guard allowed[min(count, shape.prefix.count)][index], let rest = after[used | 1 << index] else { continue }
          choices.append(.sequence(count == 0 ? [text, rest] : [separator, text, rest]))
        }
      }
      if choices.isEmpty { continue }
      after[used] = .rule(grammar.addRule("distinct", choices.count == 1 ? choices[0] : .choice(choices)))
    }
    var choices: [GrammarExpression] = []
    if shape.minimum == 0 { choices.append(.text("]")) }
    if let some = after[0] { choices.append(some) }
    if choices.isEmpty { return .never }
    return .sequence([.text("["), space, .choice(choices)])
  }
}

extension SchemaEvaluator {
  /// The scalars that satisfy a formula, if they are few and nothing else does.
  func finiteValues(_ formula: Formula, limit: Int) throws(JSONSchemaError) -> [JSONValue]? {
    if formula == .never { return [] }
    let set = try values(formula)
    guard set.arrays.isEmpty, set.objects.isEmpty, set.numbers.clauses.count <= limit else { return nil }
    var result: [JSONValue] = []
    if set.allowsNull { result.append(.null) }
    if set.allowsTrue { result.append(true) }
    if set.allowsFalse { result.append(false) }
    for clause in set.numbers.clauses {
      guard let point = clause.point else { return nil }
      let value = try? JSONValue.parse(point.description)
      guard let value else { return nil }
      if !result.contains(value) { result.append(value) }
    }
    for clause in set.strings {
      guard let values = clause.values, result.count + values.count <= limit else { return nil }
      for value in values where !result.contains(.string(value.text)) { result.append(.string(value.text)) }
    }
    return result.count <= limit ? result : nil
  }

  /// All texts of a scalar.
  func text(of value: JSONValue, _ forms: NumberForms) -> RegularExpression {
    switch value {
    case .string(let text): .jsonString(.text(text))
    case .int, .double: NumberTexts.expression(NumberSet([.point(ExactDecimal(value) ?? .zero)]), forms) ?? .never
    default: .text(value.compactText)
    }
  }
}

extension TextLanguages {
  /// A repetition of one character class with bounds on its length, as one repetition.
  func counted(_ language: TextLanguage, _ minimum: Int, _ maximum: Int?) -> TextLanguage? {
    guard case .repetition(let inner, let low, let high) = self[language], case .scalars = self[inner] else {
      return nil
    }
    return repetition(inner, max(low, minimum), [high, maximum].compactMap { $0 }.min())
  }

  /// Bounds on the number of scalars in a language's texts: a lower one, and an upper one if there is any.
  func lengths(_ language: TextLanguage) -> (shortest: Int, longest: Int?) {
    switch self[language] {
    case .never, .empty: return (0, 0)
    case .scalars: return (1, 1)
    case .complement: return (0, nil)
    case .sequence(let first, let second):
      let (a, b) = (lengths(first), lengths(second))
      return (min(a.shortest + b.shortest, 1 << 30), a.longest.flatMap { x in b.longest.map { min(x + $0, 1 << 30) } })
    case .choice(let members):
      let bounds = members.map { lengths($0) }
      let isBounded = bounds.allSatisfy { $0.longest != nil }
      return (bounds.map(\.shortest).min() ?? 0, isBounded ? bounds.compactMap(\.longest).max() : nil)
    case .all(let members):
      let bounds = members.map { lengths($0) }
      return (bounds.map(\.shortest).max() ?? 0, bounds.compactMap(\.longest).min())
    case .repetition(let inner, let minimum, let maximum):
      let (shortest, longest) = lengths(inner)
      let upper = maximum.flatMap { count in longest.map { min($0 &* count, 1 << 30) } }
      return (min(shortest * min(minimum, 1 << 20), 1 << 30), longest == 0 ? 0 : upper)
    }
  }
}
