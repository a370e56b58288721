import ApusCore
import NIOCore

/// One member of a request body: its names, what it means and how it is read.
///
/// The decoder of a body reads through a table of these and the OpenAPI document is made of the same table, so that no
/// member can be read without being documented.
struct Field<Target>: Sendable {
  /// Reads the member's value, exactly one, into the target. The last argument is the name that the client used.
  typealias Reading =
    @Sendable (
      inout Target, inout FieldReader, inout JSONReader, String
    ) throws(JSONError) -> Void
  typealias Path<Value> = any WritableKeyPath<Target, Value> & Sendable

  /// The names that the member goes by; the first is the one that the document recommends.
  var names: [String]
  /// The JSON Schema of the value.
  var schema: JSONValue
  /// One sentence on what the member means.
  var summary: String
  /// What must be there, in words, where a body without the member is refused.
  var requirement: String?
  /// Whether the names mean the same, rather than sharing what there is to say of them.
  var namesAreAliases = true
  /// Reads the value.
  var read: Reading

  init(
    _ names: String..., schema: JSONValue, _ summary: String, requirement: String? = nil, read: @escaping Reading
  ) {
    self.names = names
    self.schema = schema
    self.summary = summary
    self.requirement = requirement
    self.read = read
  }

  private init(_ names: [String], _ schema: JSONValue, _ summary: String, _ read: @escaping Reading) {
    self.names = names
    self.schema = schema
    self.summary = summary
    self.read = read
  }

  /// A string.
  static func string(_ names: String..., to path: Path<String?>, _ summary: String) -> Field {
    Field(names, ["type": "string"], summary) { (target, fields, reader, name) throws(JSONError) in
      target[keyPath: path] = try fields.string(&reader, name)
    }
  }

  /// A boolean that may be left out.
  static func bool(_ names: String..., to path: Path<Bool?>, _ summary: String) -> Field {
    Field(names, ["type": "boolean"], summary) { (target, fields, reader, name) throws(JSONError) in
      target[keyPath: path] = try fields.bool(&reader, name)
    }
  }

  /// A boolean with a default.
  static func flag(_ names: String..., to path: Path<Bool>, default value: Bool, _ summary: String) -> Field {
    Field(names, ["type": "boolean", "default": .bool(value)], summary) {
      (target, fields, reader, name) throws(JSONError) in
      target[keyPath: path] = try fields.bool(&reader, name) ?? value
    }
  }

  /// An integer.
  static func integer(_ names: String..., to path: Path<Int?>, _ summary: String) -> Field {
    Field(names, ["type": "integer"], summary) { (target, fields, reader, name) throws(JSONError) in
      target[keyPath: path] = try fields.integer(&reader, name)
    }
  }

  /// A number.
  static func number(_ names: String..., to path: Path<Float?>, _ summary: String) -> Field {
    Field(names, ["type": "number"], summary) { (target, fields, reader, name) throws(JSONError) in
      target[keyPath: path] = try fields.float(&reader, name)
    }
  }

  /// A string or an array of strings.
  static func strings(_ names: String..., to path: Path<[String]?>, _ summary: String) -> Field {
    Field(names, ["anyOf": [["type": "string"], ["type": "array", "items": ["type": "string"]]]], summary) {
      (target, fields, reader, name) throws(JSONError) in
      target[keyPath: path] = try fields.strings(&reader, name)
    }
  }

  /// Token ids.
  static func tokens(_ names: String..., to path: Path<[TokenID]?>, _ summary: String) -> Field {
    Field(names, ["type": "array", "items": ["type": "integer", "minimum": 0]], summary) {
      (target, fields, reader, name) throws(JSONError) in
      target[keyPath: path] = try fields.tokens(&reader, name)
    }
  }

  /// Any value; `null` is as if it were left out.
  static func value(
    _ names: String..., to path: Path<JSONValue?>, schema: JSONValue = [:], _ summary: String
  ) -> Field {
    Field(names, schema, summary) { (target, fields, reader, name) throws(JSONError) in
      target[keyPath: path] = try fields.value(&reader, name)
    }
  }

  /// An object that is kept as it is.
  static func object(_ names: String..., to path: Path<JSONValue?>, _ summary: String) -> Field {
    Field(names, ["type": "object"], summary) { (target, fields, reader, name) throws(JSONError) in
      if try fields.expect([.object], "an object", &reader, name) { target[keyPath: path] = try reader.readValue() }
    }
  }

  /// An array that is kept as it is and checked later.
  ///
  /// - Parameter elements: what the array holds, in words, for error messages.
  static func array(
    _ names: String..., to path: Path<JSONValue?>, of elements: String, items: JSONValue, _ summary: String
  ) -> Field {
    Field(names, ["type": "array", "items": items], summary) { (target, fields, reader, name) throws(JSONError) in
      if try fields.expect([.array], "an array of \(elements)", &reader, name) {
        target[keyPath: path] = try reader.readValue()
      }
    }
  }

  /// Members that have no effect here.
  static func ignored(_ names: String..., schema: JSONValue, _ summary: String) -> Field {
    var field = Field(names, schema, summary) { (_, _, reader, _) throws(JSONError) in try reader.skipValue() }
    field.namesAreAliases = false
    return field
  }

  /// A member that this server cannot honour: anything but `null` is refused with the sentence.
  static func refused(_ names: String..., because sentence: String) -> Field {
    var field = Field(names, ["type": "null"], "Not available: \(sentence).") {
      (_, fields, reader, name) throws(JSONError) in
      try fields.refuse(&reader, name, sentence)
    }
    field.namesAreAliases = false
    return field
  }

  /// Members that this server cannot honour: all but `false` and `null` is refused with the sentence.
  static func refusedUnlessFalse(_ names: String..., because sentence: String) -> Field {
    var field = Field(names, ["const": false], "Not available: \(sentence).") {
      (_, fields, reader, name) throws(JSONError) in
      try fields.refuseUnlessFalse(&reader, name, sentence)
    }
    field.namesAreAliases = false
    return field
  }

  /// The same field, without which a body is refused.
  ///
  /// - Parameter words: what must be there.
  func required(_ words: String) -> Field {
    var field = self
    field.requirement = words
    return field
  }
}

/// The members of a request body.
struct FieldTable<Target>: Sendable {
  /// The members in the order of the document.
  let fields: [Field<Target>]
  private let places: [String: Int]

  /// Makes a table. A name that two fields have belongs to the first of them.
  init(_ fields: [Field<Target>]) {
    self.fields = fields
    var places: [String: Int] = [:]
    for (place, field) in fields.enumerated() {
      for name in field.names where places[name] == nil { places[name] = place }
    }
    self.places = places
  }

  /// The members of both.
  static func + (left: FieldTable, right: FieldTable) -> FieldTable { FieldTable(left.fields + right.fields) }

  /// The members of a part as members of the whole.
  func within<Whole>(_ path: Field<Whole>.Path<Target>) -> FieldTable<Whole> {
    FieldTable<Whole>(
      fields.map { field in
        var lifted = Field<Whole>(schema: field.schema, field.summary, requirement: field.requirement) {
          (whole, fields, reader, name) throws(JSONError) in
          try field.read(&whole[keyPath: path], &fields, &reader, name)
        }
        lifted.names = field.names
        lifted.namesAreAliases = field.namesAreAliases
        return lifted
      })
  }

  /// Reads a member if it is one of the table's.
  ///
  /// - Returns: whether it was one, and its value has been read.
  func read(
    _ key: String, into target: inout Target, _ fields: inout FieldReader, _ reader: inout JSONReader
  ) throws(JSONError) -> Bool {
    guard let place = places[key] else { return false }
    try self.fields[place].read(&target, &fields, &reader, key)
    return true
  }

  /// Reads a body that must be a JSON object. Members that are not in the table are ignored.
  ///
  /// - Throws: `invalidRequest` for malformed JSON, wrong types and members that are missing.
  func read(_ body: ByteBuffer, into target: inout Target) throws(EngineError) {
    var seen: Set<Int> = []
    try readBody(body) { (fields, reader, key) throws(JSONError) in
      if let place = places[key], try reader.peek() != .null { seen.insert(place) }
      if try !read(key, into: &target, &fields, &reader) { try reader.skipValue() }
    }
    for (place, field) in fields.enumerated() where !seen.contains(place) {
      guard let requirement = field.requirement else { continue }
      throw EngineError(
        .invalidRequest, "\(field.names[0]) is required: \(requirement).", parameter: field.names[0])
    }
  }

  /// The JSON Schema of the body.
  var schema: JSONValue {
    var properties = JSONObject()
    var required: [JSONValue] = []
    for field in fields {
      for (index, name) in field.names.enumerated() where properties[name] == nil {
        guard case .object(var schema) = field.schema else { continue }
        schema["description"] = .string(
          index == 0 || !field.namesAreAliases ? field.summary : "The same as `\(field.names[0])`.")
        properties[name] = .object(schema)
      }
      if field.requirement != nil { required.append(.string(field.names[0])) }
    }
    var schema: JSONObject = JSONObject([("type", "object"), ("properties", .object(properties))])
    if !required.isEmpty { schema["required"] = .array(required) }
    return .object(schema)
  }
}
