package import ApusCore

/// How a schema is turned into a grammar.
package struct JSONSchemaOptions: Sendable, Hashable {
  /// The order of an object's members. By default any, as JSON Schema knows none; `declared` is what a model finds easiest.
  package var order = ObjectExpression.Order.any
  /// Where white space may stand.
  package var whitespace = WhitespacePolicy.standard
  /// What cannot be enforced is left out and listed, instead of refused.
  package var relaxed = false
  /// Whether `format` constrains strings, or only describes them as the specification has it by default.
  package var assertsFormats = true
  /// Numbers as people write them: integers as digits alone, no exponents.
  package var plainNumbers = false
  /// The schema must keep to the subset that OpenAI calls strict.
  package var strict = false

  /// Bytes of the schema.
  package var sizeLimit = 8 << 20
  /// Steps of combining alternatives.
  package var workLimit = 120_000
  /// Alternatives of objects or arrays that one schema may amount to.
  package var shapeLimit = 2_000
  /// Rules of the grammar.
  package var ruleLimit = 50_000

  package init() {}

  /// What `strict: true` of a request asks for: declared order, plain numbers, and a schema of the strict subset.
  package static var strictly: JSONSchemaOptions {
    var options = JSONSchemaOptions()
    options.order = .declared
    options.plainNumbers = true
    options.strict = true
    return options
  }
}

/// A part of a schema that is not enforced, because the options said so.
package struct JSONSchemaRelaxation: Sendable, Hashable {
  /// JSON pointer to the keyword.
  package var pointer: String
  /// Why it is not enforced.
  package var reason: String
}

/// A grammar made from a schema.
package struct JSONSchemaGrammar: Sendable {
  package var grammar: Grammar
  /// What the grammar does not enforce; empty unless the options allow it.
  package var relaxations: [JSONSchemaRelaxation]
  /// Steps that compilation took, of `workLimit`.
  package var work: Int
}

/// Turns JSON Schemas into grammars: drafts 2020-12, 2019-09, 7, 6 and 4.
///
/// The grammar accepts a text if and only if it is one JSON value that satisfies the schema, in any notation of its strings
/// and with white space as the options permit. What cannot be enforced throws, with the place in the schema and the
/// reason. Time and memory are bounded by the options' limits. `docs/json-schema.md` lists what is supported.
package enum JSONSchemaCompiler {
  package static func compile(
    _ schema: JSONValue, _ options: JSONSchemaOptions = JSONSchemaOptions()
  ) throws(JSONSchemaError) -> JSONSchemaGrammar {
    if options.strict { try StrictSchema.check(schema) }
    let document = try SchemaDocument(schema, relaxed: options.relaxed)
    let evaluator = SchemaEvaluator(document, options)
    var emitter = SchemaEmitter(evaluator, options)
    let grammar = try emitter.emit()
    return JSONSchemaGrammar(grammar: grammar, relaxations: evaluator.relaxations, work: evaluator.work)
  }

  /// Compiles the text of a schema.
  package static func compile(
    text: String, _ options: JSONSchemaOptions = JSONSchemaOptions()
  ) throws(JSONSchemaError) -> JSONSchemaGrammar {
    if text.utf8.count > options.sizeLimit {
      throw JSONSchemaError(.tooLarge, pointer: "", "the schema is longer than \(options.sizeLimit) bytes")
    }
    let value: JSONValue
    do {
      value = try JSONValue.parse(text)
    } catch {
      throw JSONSchemaError(.invalid, pointer: "", "the schema is not JSON: \(error)")
    }
    return try compile(value, options)
  }
}
