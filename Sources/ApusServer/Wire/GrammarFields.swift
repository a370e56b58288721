import ApusCore

/// The fields that constrain a text, under the names of both APIs: at most one may be given.
struct GrammarFields {
  private(set) var specification: GrammarSpecification?
  private var name = ""

  /// Reads one of the native fields `json_schema`, `regex`, `ebnf` and `structural_tag` (texts; a schema or tag may be an
  /// object, too), or vLLM's `guided_json`, `guided_regex`, `guided_grammar` and `guided_choice`.
  ///
  /// - Parameter kind: the field whose meaning it has, if that is another.
  mutating func read(
    _ key: String, as kind: String? = nil, _ fields: inout FieldReader, _ reader: inout JSONReader
  ) throws(JSONError) {
    guard let value = try fields.value(&reader, key) else { return }
    let made: GrammarSpecification?
    let kind = kind ?? key
    switch kind {
    case "json_schema", "guided_json":
      made =
        value.objectValue != nil || value.stringValue != nil || value.boolValue != nil
        ? .jsonSchema(value.stringValue ?? value.compactText) : nil
    case "structural_tag":
      made =
        value.objectValue != nil || value.stringValue != nil
        ? .structuralTag(value.stringValue ?? value.compactText) : nil
    case "guided_choice":
      let texts = value.arrayValue?.compactMap(\.stringValue)
      made = texts?.count == value.arrayValue?.count ? texts.map { .choices($0) } : nil
    case "regex", "guided_regex": made = value.stringValue.map { .regex($0) }
    default: made = value.stringValue.map { .ebnf($0) }
    }
    guard let made else {
      let expected = kind == "guided_choice" ? "a list of strings" : "a string"
      return fields.note(key, "expected \(expected), got \(value.kindName)")
    }
    set(made, key, &fields)
  }

  /// The JSON Schema of `structured_outputs`.
  static let structuredOutputsSchema: JSONValue = [
    "type": "object",
    "properties": [
      "json": ["type": ["object", "string"]], "json_object": ["type": "boolean"], "regex": ["type": "string"],
      "choice": ["type": "array", "items": ["type": "string"]], "grammar": ["type": "string"],
      "structural_tag": ["type": ["object", "string"]],
    ],
  ]

  /// Reads vLLM's `structured_outputs`, an object with one constraint. What else it holds chooses and tunes vLLM's own
  /// implementations.
  mutating func readStructuredOutputs(
    _ key: String, _ fields: inout FieldReader, _ reader: inout JSONReader
  ) throws(JSONError) {
    var grammar = self
    try fields.object(&reader, key) { (fields, reader, key) throws(JSONError) in
      switch key {
      case "json": try grammar.read(key, as: "guided_json", &fields, &reader)
      case "regex": try grammar.read(key, as: "guided_regex", &fields, &reader)
      case "choice": try grammar.read(key, as: "guided_choice", &fields, &reader)
      case "grammar": try grammar.read(key, as: "guided_grammar", &fields, &reader)
      case "structural_tag": try grammar.read(key, &fields, &reader)
      case "json_object":
        if try fields.bool(&reader, key) == true { grammar.set(.jsonObject, key, &fields) }
      default: try reader.skipValue()
      }
    }
    self = grammar
  }

  /// The JSON Schema of `response_format`.
  static let responseFormatSchema: JSONValue = [
    "type": "object",
    "properties": [
      "type": ["enum": ["text", "json_object", "json_schema", "structural_tag"]],
      "json_schema": [
        "type": "object",
        "properties": ["name": ["type": "string"], "schema": [:], "strict": ["type": "boolean"]],
        "required": ["schema"],
      ],
    ], "required": ["type"],
  ]

  /// Reads `response_format`: `text`, `json_object`, `json_schema` and `structural_tag`.
  mutating func readResponseFormat(
    _ key: String, _ fields: inout FieldReader, _ reader: inout JSONReader
  ) throws(JSONError) {
    guard let format = try fields.value(&reader, key) else { return }
    guard let type = format["type"]?.stringValue else {
      return fields.note(key, "expected an object with a type, got \(format.kindName)")
    }
    switch type {
    case "text": break
    case "json_object":
      // llama.cpp's server and others take a schema here.
      guard let schema = format["schema"]?.nonNull else { return set(.jsonObject, key, &fields) }
      guard schema.objectValue != nil else { return fields.note("\(key).schema", "expected a JSON Schema") }
      set(.jsonSchema(schema.compactText), key, &fields)
    case "json_schema":
      // Some clients leave out the object around name and schema.
      let description = format["json_schema"]?.nonNull ?? format
      guard let schema = description["schema"],
        schema.objectValue != nil || schema.boolValue != nil
      else { return fields.note("\(key).json_schema.schema", "expected a JSON Schema") }
      var options = GrammarSpecification.SchemaOptions()
      switch description["strict"] {
      case nil, .null: break
      case .bool(let isStrict): options.isStrict = isStrict
      case let other?: return fields.note("\(key).json_schema.strict", "expected a boolean, got \(other.kindName)")
      }
      set(.jsonSchema(schema.compactText, options), key, &fields)
    case "structural_tag": set(.structuralTag(format.compactText), key, &fields)
    default:
      fields.note(
        "\(key).type", "\(type.debugDescription) is none of text, json_object, json_schema and structural_tag")
    }
  }

  /// Sets the constraint that a field of another API asks for.
  mutating func set(_ made: GrammarSpecification) { specification = made }

  private mutating func set(_ made: GrammarSpecification, _ key: String, _ fields: inout FieldReader) {
    if specification != nil {
      return fields.note(key, "only one constraint may be given, and \(name) is there already")
    }
    specification = made
    name = key
  }
}
