internal import ApusCore

// Keywords of arrays and objects, and those that apply schemas in place.
extension SchemaEvaluator {
  // MARK: Arrays

  /// The shape that the array keywords of a schema ask for, or `nil` if there is no array of it.
  func arrayShape(
    _ schema: JSONObject, _ keywords: Keywords, _ place: Place, _ tracking: Bool
  ) throws(JSONSchemaError) -> ArrayShape? {
    let pointer = place.position.pointer
    var shape = ArrayShape()
    var tailKeyword = "items"
    if keywords.has(.draft202012), let places = try schemas("prefixItems", schema, place) {
      for place in places { shape.prefix.append(try formula(place)) }
      shape.evaluatedPrefix = shape.prefix.count
    } else if case .array(let elements)? = schema["items"] {
      for (index, element) in elements.enumerated() {
        shape.prefix.append(try formula(child(place, "/items/\(index)", element)))
      }
      shape.evaluatedPrefix = shape.prefix.count
      tailKeyword = keywords.had(until: .draft201909) ? "additionalItems" : ""
    }
    if let rest = schema[tailKeyword] {
      shape.rest = try formula(child(place, "/" + tailKeyword, rest))
      shape.evaluatesAll = true
    }
    shape.minimum = try count("minItems", schema, pointer) ?? 0
    shape.maximum = try count("maxItems", schema, pointer)
    if let contains = schema["contains"], keywords.has(.draft6) {
      let formula = try formula(child(place, "/contains", contains))
      var containment = ArrayShape.Containment(formula: formula)
      if keywords.has(.draft201909) {
        containment.minimum = try count("minContains", schema, pointer) ?? 1
        containment.maximum = try count("maxContains", schema, pointer)
      }
      shape.containments = [containment]
      if keywords.has(.draft202012) { shape.evaluatedBy = [formula] }
    }
    if schema["uniqueItems"]?.boolValue == true { shape.uniqueAt = pointer + "/uniqueItems" }
    if !tracking {
      shape.evaluatedPrefix = 0
      shape.evaluatesAll = false
      shape.evaluatedBy = []
    }
    return try normalized(shape)
  }

  // MARK: Objects

  /// The shape that the object keywords of a schema ask for.
  func objectShape(
    _ schema: JSONObject, _ keywords: Keywords, _ place: Place, _ tracking: Bool
  ) throws(JSONSchemaError) -> ObjectShape {
    let pointer = place.position.pointer
    var shape = ObjectShape(evaluated: texts.never)
    var looked: [TextLanguage] = []
    var patternLanguages: [TextLanguage] = []
    if let patterns = schema["patternProperties"] {
      guard case .object(let members) = patterns else {
        throw invalid(pointer + "/patternProperties", "patternProperties must be an object")
      }
      for (source, value) in members {
        let place = child(place, "/patternProperties/" + escaped(source), value)
        guard let language = try pattern(source, at: place.position.pointer) else { continue }
        patternLanguages.append(language)
        looked.append(language)
        let formula = try formula(place)
        if formula != .anything { shape.add(.init(keys: language, formula: formula)) }
      }
    }
    var names: [ExactText] = []
    if let properties = schema["properties"] {
      guard case .object(let members) = properties else {
        throw invalid(pointer + "/properties", "properties must be an object")
      }
      for (name, value) in members {
        let name = ExactText(name)
        names.append(name)
        looked.append(texts.literal(name.text))
        let own = try formula(child(place, "/properties/" + escaped(name.text), value))
        shape.set(.init(name: name, formula: and(own, ruleFormula(shape, name)), isRequired: false))
      }
    }
    if let additional = schema["additionalProperties"] {
      let formula = try formula(child(place, "/additionalProperties", additional))
      looked = [texts.everything]
      // The named ones are named; what is left to exclude are the patterns' keys.
      if formula != .anything {
        shape.add(.init(keys: texts.complement(texts.choice(patternLanguages)), formula: formula))
      }
    }
    if let required = schema["required"] {
      guard case .array(let members) = required else {
        throw invalid(pointer + "/required", "required must be an array of property names")
      }
      for member in members {
        guard let name = member.stringValue.map(ExactText.init) else {
          throw invalid(pointer + "/required", "required must be an array of property names")
        }
        let formula = shape.property(name)?.formula ?? ruleFormula(shape, name)
        shape.set(.init(name: name, formula: formula, isRequired: true))
      }
    }
    shape.minimum = try count("minProperties", schema, pointer) ?? 0
    shape.maximum = try count("maxProperties", schema, pointer)
    if let nameSchema = schema["propertyNames"], keywords.has(.draft6) {
      let formula = try formula(child(place, "/propertyNames", nameSchema))
      let keys = try keyLanguage(formula)
      if keys != texts.everything {
        for property in shape.properties where !texts.contains(keys, property.name.text) {
          shape.set(.init(name: property.name, formula: .never, isRequired: property.isRequired))
        }
        shape.add(.init(keys: texts.complement(keys), formula: .never))
      }
    }
    if keywords.has(.draft201909) { try addDependencies("dependentRequired", schema, place, &shape) }
    if keywords.had(until: .draft7) { try addDependencies("dependencies", schema, place, &shape) }
    if tracking { shape.evaluated = texts.choice(looked) }
    return shape
  }

  /// The strings that satisfy a formula, as a language of keys.
  private func keyLanguage(_ formula: Formula) throws(JSONSchemaError) -> TextLanguage {
    let clauses = try values(formula).strings
    return texts.choice(
      clauses.map { clause in
        if let values = clause.values { return texts.choice(values.map { texts.literal($0.text) }) }
        return texts.all([clause.language, texts.length(clause.minimum, clause.maximum)])
      })
  }

  private func addDependencies(
    _ keyword: String, _ schema: JSONObject, _ place: Place, _ shape: inout ObjectShape
  ) throws(JSONSchemaError) {
    guard let value = schema[keyword] else { return }
    let pointer = place.position.pointer + "/" + keyword
    guard case .object(let members) = value else { throw invalid(pointer, "\(keyword) must be an object") }
    for (name, value) in members {
      let required: [JSONValue]
      switch value {
      case .array(let elements): required = elements
      // Draft 3 allowed one name; some documents still have it.
      case .string: required = [value]
      default: continue
      }
      let names = required.compactMap { $0.stringValue.map(ExactText.init) }
      if !names.isEmpty { shape.dependencies.append(.init(name: ExactText(name), required: names)) }
    }
  }

  // MARK: Schemas in place

  /// `dependentSchemas`, and the schemas of `dependencies`: without the property, or with what it brings.
  func restrictDependencies(
    _ result: inout ValueSet, _ schema: JSONObject, _ keywords: Keywords, _ place: Place, _ tracking: Bool
  ) throws {
    var keywordNames: [String] = []
    if keywords.has(.draft201909) { keywordNames.append("dependentSchemas") }
    if keywords.had(until: .draft7) { keywordNames.append("dependencies") }
    for keyword in keywordNames {
      guard case .object(let members)? = schema[keyword] else { continue }
      for (name, value) in members {
        switch value {
        case .object, .bool: break
        default: continue
        }
        let place = child(place, "/" + keyword + "/" + escaped(name), value)
        if result.objects.isEmpty { return }
        var absent = everything
        var shape = ObjectShape(evaluated: texts.never)
        shape.set(.init(name: ExactText(name), formula: .never, isRequired: false))
        absent.objects = [shape]
        shape.set(.init(name: ExactText(name), formula: .anything, isRequired: true))
        var present = ValueSet()
        present.objects = [shape]
        present = try intersection(present, evaluate(inPlace: place, tracking: tracking), at: place.position.pointer)
        let isApproximate = present.isApproximate
        absent.objects += present.objects
        absent.isApproximate = isApproximate
        result = try intersection(result, absent, at: place.position.pointer)
      }
    }
  }

  func restrictConditional(
    _ result: inout ValueSet, _ condition: JSONValue, _ schema: JSONObject, _ place: Place, _ tracking: Bool
  ) throws {
    let then = schema["then"].map { child(place, "/then", $0) }
    let other = schema["else"].map { child(place, "/else", $0) }
    if then == nil, other == nil, !tracking { return }
    let conditionPlace = child(place, "/if", condition)
    let pointer = conditionPlace.position.pointer
    let condition = try evaluate(inPlace: conditionPlace, tracking: tracking)
    if condition.isApproximate {
      try refuse(pointer, "the condition cannot be enforced exactly")
      result.isApproximate = true
      return
    }
    var first = try intersection(result, condition, at: pointer)
    var second: ValueSet
    do {
      second = try complementWithin(result, condition, at: pointer)
    } catch let error as JSONSchemaError where error.kind == .unsupported {
      try refuse(pointer, error.reason)
      result.isApproximate = true
      return
    }
    if let then {
      first = try intersection(first, evaluate(inPlace: then, tracking: tracking), at: then.position.pointer)
    }
    if let other {
      second = try intersection(second, evaluate(inPlace: other, tracking: tracking), at: other.position.pointer)
    }
    result = try union(first, second)
  }

  /// What is in a set and not in another.
  private func complementWithin(_ set: ValueSet, _ other: ValueSet, at pointer: String) throws -> ValueSet {
    // Only the parts that both have something of need a complement.
    var relevant = other
    if set.arrays.isEmpty { relevant.arrays = [] }
    if set.objects.isEmpty { relevant.objects = [] }
    if set.strings.isEmpty { relevant.strings = [] }
    if set.numbers.isEmpty { relevant.numbers = .never }
    return try intersection(set, complement(relevant, at: pointer), at: pointer)
  }

  func restrictAny(_ result: inout ValueSet, _ members: [Place], _ tracking: Bool, _ pointer: String) throws {
    let pointer = pointer + "/anyOf"
    if members.isEmpty { throw invalid(pointer, "anyOf must not be empty") }
    var sets: [ValueSet] = []
    for member in members {
      sets.append(try intersection(result, evaluate(inPlace: member, tracking: tracking), at: member.position.pointer))
    }
    var union = ValueSet()
    for set in sets { union = try self.union(union, set) }
    if tracking {
      // What is evaluated depends on all branches that hold: each combination is an alternative of its own.
      var combinations = sets
      for index in sets.indices.dropFirst() {
        var more: [ValueSet] = []
        for (earlier, combination) in combinations.enumerated() where earlier < index || earlier >= sets.count {
          let both = try intersection(combination, sets[index], at: pointer)
          if !both.isPlainlyEmpty { more.append(both) }
        }
        for set in more { union = try self.union(union, set) }
        combinations += more
        try spend(combinations.count, at: pointer)
      }
    }
    result = union
  }

  func restrictOne(_ result: inout ValueSet, _ members: [Place], _ tracking: Bool, _ pointer: String) throws {
    let pointer = pointer + "/oneOf"
    if members.isEmpty { throw invalid(pointer, "oneOf must not be empty") }
    var sets: [ValueSet] = []
    for member in members {
      sets.append(try intersection(result, evaluate(inPlace: member, tracking: tracking), at: member.position.pointer))
    }
    // Branches that have nothing in common exclude each other by themselves.
    var overlaps: [[Int]] = Array(repeating: [], count: sets.count)
    for first in sets.indices {
      for second in sets.indices where second > first {
        if try !intersection(sets[first], sets[second], at: pointer).isPlainlyEmpty {
          overlaps[first].append(second)
          overlaps[second].append(first)
        }
      }
    }
    var union = ValueSet()
    for (index, set) in sets.enumerated() {
      var set = set
      for other in overlaps[index] where !set.isPlainlyEmpty {
        let place = members[other]
        do {
          let excluded = try evaluate(inPlace: place, tracking: false)
          if excluded.isApproximate {
            throw JSONSchemaError(.unsupported, pointer: pointer, "a branch cannot be enforced exactly")
          }
          set = try complementWithin(set, excluded, at: pointer)
        } catch let error as JSONSchemaError where error.kind == .unsupported {
          try refuse(pointer, "branches \(index) and \(other) overlap and are not told apart: " + error.reason)
          set.isApproximate = true
        }
      }
      union = try self.union(union, set)
    }
    result = union
  }

  // MARK: Unevaluated

  func restrictUnevaluated(
    _ result: inout ValueSet, _ schema: JSONObject, _ place: Place
  ) throws {
    var tracked = result
    if let value = schema["unevaluatedProperties"], !result.objects.isEmpty {
      let formula = try formula(child(place, "/unevaluatedProperties", value))
      tracked.objects = try tracked.objects.compactMap { shape in
        var shape = shape
        for property in shape.properties where !texts.contains(shape.evaluated, property.name.text) {
          shape.set(
            .init(name: property.name, formula: and(property.formula, formula), isRequired: property.isRequired))
        }
        if formula != .anything { shape.add(.init(keys: texts.complement(shape.evaluated), formula: formula)) }
        shape.evaluated = texts.everything
        return try normalized(shape)
      }
    }
    if let value = schema["unevaluatedItems"], !result.arrays.isEmpty {
      let formula = try formula(child(place, "/unevaluatedItems", value))
      tracked.arrays = try tracked.arrays.compactMap { shape in
        var shape = shape
        if !shape.evaluatesAll {
          let rest = or([formula] + shape.evaluatedBy)
          while shape.prefix.count < shape.evaluatedPrefix { shape.prefix.append(shape.rest) }
          for index in shape.evaluatedPrefix..<shape.prefix.count {
            shape.prefix[index] = and(shape.prefix[index], rest)
          }
          shape.rest = and(shape.rest, rest)
        }
        shape.evaluatesAll = true
        return try normalized(shape)
      }
    }
    result = tracked
  }

  /// Drops the notes of what was evaluated, so that shapes that differ in them alone become one.
  func forgetEvaluated(_ set: inout ValueSet) {
    for index in set.objects.indices { set.objects[index].evaluated = texts.never }
    for index in set.arrays.indices {
      set.arrays[index].evaluatedPrefix = 0
      set.arrays[index].evaluatesAll = false
      set.arrays[index].evaluatedBy = []
    }
  }
}
