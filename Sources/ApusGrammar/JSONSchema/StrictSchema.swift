internal import ApusCore

/// OpenAI's rules for `strict: true`: every object closed, every property required, and a subset of keywords.
///
/// The messages read like OpenAI's, because people search for them. Source: the "Structured model outputs" guide.
enum StrictSchema {
  /// Nesting of objects, arrays and `anyOf`.
  private static let depthLimit = 10
  private static let propertyLimit = 5_000
  private static let enumLimit = 1_000

  private struct Counts {
    var properties = 0
    var values = 0
  }

  /// Keywords that the strict subset knows, besides annotations.
  private static let keywords: Set<String> = [
    "type", "properties", "required", "additionalProperties", "items", "anyOf", "enum", "const", "$ref", "$defs",
    "definitions", "title", "description", "default", "examples", "$schema", "$id", "$comment", "pattern", "format",
    "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum", "minItems", "maxItems", "minLength",
    "maxLength", "$anchor", "deprecated", "readOnly", "writeOnly",
  ]

  static func check(_ schema: JSONValue) throws(JSONSchemaError) {
    guard case .object(let root) = schema else {
      throw JSONSchemaError(.invalid, pointer: "", "schema must be a JSON object")
    }
    if root["anyOf"] != nil {
      throw failure([], "schema must have type 'object' and not have 'anyOf' at the top level")
    }
    if root["$ref"] == nil, root["type"]?.stringValue != "object" {
      throw failure(
        [],
        "schema must be a JSON Schema of 'type: \"object\"', got 'type: \(root["type"].map { $0.compactText } ?? "None")'"
      )
    }
    var counts = Counts()
    try check(schema, [], 0, &counts)
  }

  /// An error in the words of OpenAI's.
  private static func failure(_ path: [String], _ reason: String) -> JSONSchemaError {
    let context = path.map { "'\($0)'" }.joined(separator: ", ")
    let tuple = path.count == 1 ? "(\(context),)" : "(\(context))"
    return JSONSchemaError(
      .invalid, pointer: path.map { "/" + escaped($0) }.joined(), "In context=\(tuple), \(reason)")
  }

  private static func check(
    _ schema: JSONValue, _ path: [String], _ depth: Int, _ counts: inout Counts
  ) throws(JSONSchemaError) {
    guard case .object(let object) = schema else {
      throw failure(path, "schema must be a JSON object, got \(schema.kindName)")
    }
    if depth > depthLimit { throw failure(path, "the schema exceeds the limit of \(depthLimit) levels of nesting") }
    for keyword in object.keys where !keywords.contains(keyword) {
      throw failure(path, "'\(keyword)' is not permitted")
    }
    let type = object["type"]
    if type == nil, object["$ref"] == nil, object["anyOf"] == nil, object["enum"] == nil, object["const"] == nil {
      throw failure(path, "schema must have a 'type' key")
    }
    let types = type?.arrayValue?.compactMap(\.stringValue) ?? type?.stringValue.map { [$0] } ?? []
    if types.contains("object") || object["properties"] != nil {
      if object["additionalProperties"] != .bool(false) {
        throw failure(path, "'additionalProperties' is required to be supplied and to be false")
      }
      let properties = object["properties"]?.objectValue ?? JSONObject()
      let required = Set((object["required"]?.arrayValue ?? []).compactMap { $0.stringValue.map(ExactText.init) })
      for name in properties.keys where !required.contains(ExactText(name)) {
        throw failure(
          path,
          "'required' is required to be supplied and to be an array including every key in properties. Missing '\(name)'"
        )
      }
      for name in required.sorted() where properties[name.text] == nil {
        throw failure(
          path,
          "'required' is required to be supplied and to be an array including every key in properties. "
            + "Extra required key '\(name.text)' supplied")
      }
      counts.properties += properties.count
      if counts.properties > propertyLimit {
        throw failure(path, "the schema exceeds the limit of \(propertyLimit) object properties in total")
      }
      for (name, value) in properties { try check(value, path + ["properties", name], depth + 1, &counts) }
    }
    if types.contains("array") {
      guard let items = object["items"] else { throw failure(path, "array schema missing items") }
      try check(items, path + ["items"], depth + 1, &counts)
    }
    if let members = object["anyOf"] {
      guard case .array(let members) = members, !members.isEmpty else {
        throw failure(path, "'anyOf' must be a non-empty array")
      }
      for (index, member) in members.enumerated() {
        try check(member, path + ["anyOf", String(index)], depth + 1, &counts)
      }
    }
    if let values = object["enum"]?.arrayValue {
      counts.values += values.count
      if counts.values > enumLimit {
        throw failure(path, "the schema exceeds the limit of \(enumLimit) enum values in total")
      }
    }
    for keyword in ["$defs", "definitions"] {
      guard case .object(let definitions)? = object[keyword] else { continue }
      for (name, value) in definitions { try check(value, path + [keyword, name], 0, &counts) }
    }
  }
}
