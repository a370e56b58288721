public import ApusCore

/// The tools that a request offers: their names and the schemas of their parameters.
public struct ToolDefinitions: Sendable, Equatable {
  /// One tool.
  public struct Tool: Sendable, Equatable {
    /// The function's name.
    public var name: String
    /// The JSON Schema of its arguments, an object; `nil` where none was given.
    public var parameters: JSONValue?
    /// Whether arguments must follow the schema exactly.
    public var isStrict: Bool

    /// Describes a tool.
    public init(name: String, parameters: JSONValue? = nil, isStrict: Bool = false) {
      self.name = name
      self.parameters = parameters
      self.isStrict = isStrict
    }
  }

  /// The tools in the order given.
  public var tools: [Tool]

  /// A set of tools.
  public init(_ tools: [Tool] = []) { self.tools = tools }

  /// Reads `tools` as requests carry them: `[{"type": "function", "function": {"name": …, "parameters": …}}]`. Functions
  /// without the wrapper are read too; what is no function is passed over.
  public init(json: JSONValue?) {
    tools = (json?.arrayValue ?? []).compactMap { entry in
      let function = entry["function"] ?? entry
      guard let name = function["name"]?.stringValue, !name.isEmpty else { return nil }
      return Tool(
        name: name, parameters: function["parameters"]?.nonNull,
        isStrict: function["strict"] == .bool(true))
    }
  }

  public var isEmpty: Bool { tools.isEmpty }

  /// The tool of a name.
  public subscript(name: String) -> Tool? { tools.first { $0.name == name } }

  /// The schema of one parameter; `nil` if nothing is known of it.
  func schema(of parameter: String, in tool: String) -> JSONValue? {
    guard let parameters = self[tool]?.parameters else { return nil }
    return parameters["properties"]?[parameter]
      ?? parameters["additionalProperties"].flatMap { $0.objectValue == nil ? nil : $0 }
  }

  /// The kinds that a parameter may have.
  func kinds(of parameter: String, in tool: String) -> ValueKinds {
    guard let schema = schema(of: parameter, in: tool) else { return .any }
    return ValueKinds(schema: schema, root: self[tool]?.parameters, depth: 0)
  }

  /// The name of the parameter that is declared at a place, counted from zero.
  func parameter(at position: Int, in tool: String) -> String? {
    guard let keys = self[tool]?.parameters?["properties"]?.objectValue?.keys, position < keys.count else { return nil }
    return keys[position]
  }
}

/// A set of kinds of JSON values.
struct ValueKinds: OptionSet, Sendable {
  let rawValue: Int
  static let string = ValueKinds(rawValue: 1)
  static let integer = ValueKinds(rawValue: 2)
  static let number = ValueKinds(rawValue: 4)
  static let boolean = ValueKinds(rawValue: 8)
  static let null = ValueKinds(rawValue: 16)
  static let object = ValueKinds(rawValue: 32)
  static let array = ValueKinds(rawValue: 64)
  static let any: ValueKinds = [.string, .integer, .number, .boolean, .null, .object, .array]

  init(rawValue: Int) { self.rawValue = rawValue }

  private init(name: String) {
    self =
      switch name {
      case "string", "str", "text", "enum", "char", "varchar": .string
      case "integer", "int", "int32", "int64", "long": .integer
      case "number", "float", "double": [.number, .integer]
      case "boolean", "bool": .boolean
      case "null", "none": .null
      case "object", "dict", "map": .object
      case "array", "list", "tuple": .array
      default: .any
      }
  }

  private init(of value: JSONValue) {
    self =
      switch value {
      case .null: .null
      case .bool: .boolean
      case .int: .integer
      case .double: .number
      case .string: .string
      case .array: .array
      case .object: .object
      }
  }

  /// The kinds that a schema allows, as far as its `type`, `enum`, `const`, alternatives and local references tell.
  init(schema: JSONValue, root: JSONValue?, depth: Int) {
    guard schema.objectValue != nil, depth < 8 else {
      self = .any
      return
    }
    if let type = schema["type"] {
      switch type {
      case .string(let name): self.init(name: name)
      case .array(let names): self = names.reduce([]) { $0.union(ValueKinds(name: $1.stringValue ?? "")) }
      default: self = .any
      }
      return
    }
    if let constant = schema["const"] {
      self.init(of: constant)
      return
    }
    if let values = schema["enum"]?.arrayValue, !values.isEmpty {
      self = values.reduce([]) { $0.union(ValueKinds(of: $1)) }
      return
    }
    for key in ["anyOf", "oneOf"] {
      if let branches = schema[key]?.arrayValue, !branches.isEmpty {
        self = branches.reduce([]) { $0.union(ValueKinds(schema: $1, root: root, depth: depth + 1)) }
        return
      }
    }
    if let parts = schema["allOf"]?.arrayValue, !parts.isEmpty {
      self = parts.reduce(.any) { $0.intersection(ValueKinds(schema: $1, root: root, depth: depth + 1)) }
      if isEmpty { self = .any }
      return
    }
    if let reference = schema["$ref"]?.stringValue, reference.hasPrefix("#/"), let root {
      var target: JSONValue? = root
      for part in reference.dropFirst(2).split(separator: "/") { target = target?[String(part)] }
      if let target {
        self.init(schema: target, root: root, depth: depth + 1)
        return
      }
    }
    self =
      schema["properties"] != nil ? .object : schema["items"] != nil ? .array : .any
  }
}

/// The JSON of a value that a format wrote as bare text.
///
/// What the schema allows decides; where it allows several kinds, or nothing is known of it, the first of null, boolean,
/// number, object and array that the text spells is taken, in JSON's spelling or Python's, and a string otherwise.
func typedJSON(_ text: [UInt8], _ kinds: ValueKinds) -> [UInt8] {
  if kinds == .string { return quoted(text) }
  let trimmed = trimmed(text)
  let word = String(decoding: trimmed.prefix(8), as: UTF8.self).lowercased()
  if kinds.contains(.null), word == "null" || word == "none" { return Array("null".utf8) }
  if kinds.contains(.boolean), word == "true" || word == "false" { return Array(word.utf8) }
  // A number is one in JSON's spelling, or the text stays as it is: leading zeros tell of a code, not of a count.
  if !kinds.isDisjoint(with: [.integer, .number]), let first = trimmed.first,
    first == UInt8(ascii: "-") || (first >= UInt8(ascii: "0") && first <= UInt8(ascii: "9")),
    JSONScanner.accepts(trimmed)
  {
    return trimmed
  }
  let bracket = trimmed.first
  if (kinds.contains(.object) && bracket == UInt8(ascii: "{"))
    || (kinds.contains(.array) && (bracket == UInt8(ascii: "[") || bracket == UInt8(ascii: "(")))
  {
    if JSONScanner.accepts(trimmed) { return trimmed }
    if let json = PythonLiteral.json(trimmed) { return json }
  }
  return quoted(text)
}

private func trimmed(_ text: [UInt8]) -> [UInt8] {
  let start = text.drop(while: isWhitespace)
  return Array(start[..<(start.lastIndex { !isWhitespace($0) }.map { $0 + 1 } ?? start.startIndex)])
}
