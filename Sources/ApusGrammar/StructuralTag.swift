package import ApusCore

extension Grammar {
  /// Reads a structural tag: free text in which certain texts open constrained regions.
  ///
  /// Two forms are read. The old one is `{"type": "structural_tag", "structures": [{"begin", "schema", "end"}...],
  /// "triggers": [...]}`, to which `at_least_one` and `stop_after_first` may be added. The new one is `{"type":
  /// "structural_tag", "format": {...}}` with XGrammar's formats: `const_string`, `json_schema`, `regex`, `grammar`,
  /// `any_text`, `sequence`, `or`, `tag`, `triggered_tags` and `tags_with_separator`.
  ///
  /// - Throws: `EngineError` with the place in the document and the reason.
  package init(structuralTag text: String, whitespace: WhitespacePolicy = .standard) throws(EngineError) {
    let value: JSONValue
    do throws(JSONError) {
      value = try JSONValue.parse(text)
    } catch {
      throw EngineError(.invalidRequest, "The structural tag is not JSON: \(error)")
    }
    try self.init(structuralTag: value, whitespace: whitespace)
  }

  /// Reads a structural tag from a parsed document.
  package init(structuralTag value: JSONValue, whitespace: WhitespacePolicy = .standard) throws(EngineError) {
    self.init()
    var reader = StructuralTagReader(whitespace: whitespace)
    let expression: GrammarExpression
    if value["structures"] != nil {
      expression = try reader.structures(value)
    } else if let format = value["format"] {
      expression = try reader.format(format, "format", nil)
    } else {
      throw EngineError(
        .invalidRequest, "The structural tag must have \"structures\" and \"triggers\", or a \"format\"")
    }
    self = reader.grammar
    root = expression
  }
}

private struct StructuralTagReader {
  var grammar = Grammar()
  private var depth = 0
  /// White space in JSON where the document does not say.
  private let whitespace: WhitespacePolicy

  init(whitespace: WhitespacePolicy) { self.whitespace = whitespace }

  private func failure(_ path: String, _ message: String) -> EngineError {
    EngineError(.invalidRequest, "The structural tag is not usable: \(path) \(message)")
  }

  private func string(_ value: JSONValue, _ key: String, _ path: String) throws(EngineError) -> String {
    guard let text = value[key]?.stringValue else { throw failure("\(path).\(key)", "must be a string") }
    return text
  }

  private func flag(_ value: JSONValue, _ key: String, _ path: String) throws(EngineError) -> Bool {
    guard let member = value[key], !member.isNull else { return false }
    guard let flag = member.boolValue else { throw failure("\(path).\(key)", "must be a boolean") }
    return flag
  }

  private func list(_ value: JSONValue, _ key: String, _ path: String) throws(EngineError) -> [JSONValue] {
    guard let list = value[key]?.arrayValue, !list.isEmpty else {
      throw failure("\(path).\(key)", "must be a list that is not empty")
    }
    return list
  }

  private mutating func schema(
    _ value: JSONValue, isStrict: Bool = false, whitespace policy: GrammarSpecification.Whitespace? = nil
  ) throws(EngineError) -> GrammarExpression {
    var options = GrammarSpecification.SchemaOptions()
    options.isStrict = isStrict
    options.whitespace = policy
    return grammar.absorb(try Grammar.schema(value.compactText, options, whitespace: whitespace))
  }

  /// The old form.
  mutating func structures(_ value: JSONValue) throws(EngineError) -> GrammarExpression {
    var tags: [TagsExpression.Tag] = []
    for (index, structure) in try list(value, "structures", "").enumerated() {
      let path = "structures[\(index)]"
      var content = GrammarExpression.empty
      guard let schema = structure["schema"] else { throw failure("\(path).schema", "is missing") }
      content = try self.schema(schema)
      tags.append(
        .init(
          begin: try string(structure, "begin", path), content: content, end: try string(structure, "end", path)))
    }
    var result = TagsExpression(tags: tags, triggers: try triggers(value, ""))
    result.isRequired = try flag(value, "at_least_one", "")
    result.stopsAfterFirst = try flag(value, "stop_after_first", "")
    return .tags(result)
  }

  private func triggers(_ value: JSONValue, _ path: String) throws(EngineError) -> [String] {
    var result: [String] = []
    for (index, trigger) in try list(value, "triggers", path).enumerated() {
      guard let text = trigger.stringValue, !text.isEmpty else {
        throw failure("\(path).triggers[\(index)]", "must be a string that is not empty")
      }
      result.append(text)
    }
    return result
  }

  /// A format of the new form. `end` is the text that closes it, so that free text knows where to stop.
  mutating func format(_ value: JSONValue, _ path: String, _ end: String?) throws(EngineError) -> GrammarExpression {
    depth += 1
    defer { depth -= 1 }
    if depth > 100 { throw failure(path, "is nested more than 100 deep") }
    switch try string(value, "type", path) {
    case "const_string": return .text(try string(value, "value", path))
    case "json_schema":
      guard let schema = value["json_schema"] else { throw failure("\(path).json_schema", "is missing") }
      // `strict` and `whitespace` are this engine's own: a format of a response keeps them where it stands behind a chain
      // of thought.
      var policy: GrammarSpecification.Whitespace?
      if let name = value["whitespace"]?.stringValue {
        policy = .init(rawValue: name)
        if policy == nil { throw failure("\(path).whitespace", "must be compact, fixed or flexible") }
      }
      return try self.schema(schema, isStrict: value["strict"] == true, whitespace: policy)
    case "regex": return .regular(try .pattern(try string(value, "pattern", path), search: false))
    case "grammar": return grammar.absorb(try Grammar(ebnf: try string(value, "grammar", path)))
    case "any_text":
      var excluded: [String] = []
      for text in value["excludes"]?.arrayValue ?? [] {
        guard let text = text.stringValue, !text.isEmpty else {
          throw failure("\(path).excludes", "must be a list of strings that are not empty")
        }
        excluded.append(text)
      }
      if let end, !end.isEmpty { excluded.append(end) }
      if excluded.isEmpty { return .regular(.anything) }
      let found = RegularExpression.concatenation([
        .anything, .union(excluded.map { .text($0) }), .anything,
      ])
      return .regular(.complement(found))
    case "sequence":
      let elements = try list(value, "elements", path)
      var parts: [GrammarExpression] = []
      for (index, element) in elements.enumerated() {
        // Free text ends where the constant text after it begins.
        var next = index + 1 == elements.count ? end : nil
        if index + 1 < elements.count {
          next = elements[index + 1]["value"]?.stringValue ?? elements[index + 1]["begin"]?.stringValue
        }
        parts.append(try format(element, "\(path).elements[\(index)]", next))
      }
      return .sequence(parts)
    case "or":
      var parts: [GrammarExpression] = []
      for (index, element) in try list(value, "elements", path).enumerated() {
        parts.append(try format(element, "\(path).elements[\(index)]", end))
      }
      return .choice(parts)
    case "tag":
      let tag = try tag(value, path)
      var only = TagsExpression(tags: [tag], triggers: [])
      only.allowsText = false
      only.isRequired = true
      only.stopsAfterFirst = true
      return .tags(only)
    case "triggered_tags", "tags_with_separator":
      var tags: [TagsExpression.Tag] = []
      for (index, tag) in try list(value, "tags", path).enumerated() {
        tags.append(try self.tag(tag, "\(path).tags[\(index)]"))
      }
      let isTriggered = value["type"]?.stringValue == "triggered_tags"
      var result = TagsExpression(tags: tags, triggers: isTriggered ? try triggers(value, path) : [])
      if !isTriggered {
        result.allowsText = false
        result.separator = try string(value, "separator", path)
      }
      result.isRequired = try flag(value, "at_least_one", path)
      result.stopsAfterFirst = try flag(value, "stop_after_first", path)
      return .tags(result)
    case let type: throw failure("\(path).type", "'\(type)' is not supported")
    }
  }

  private mutating func tag(_ value: JSONValue, _ path: String) throws(EngineError) -> TagsExpression.Tag {
    let end: String
    if let ends = value["end"]?.arrayValue {
      guard ends.count == 1, let text = ends[0].stringValue else { throw failure("\(path).end", "must be one string") }
      end = text
    } else {
      end = try string(value, "end", path)
    }
    guard let content = value["content"] else { throw failure("\(path).content", "is missing") }
    return .init(
      begin: try string(value, "begin", path), content: try format(content, "\(path).content", end), end: end)
  }
}
