internal import ApusCore

/// Which edition of JSON Schema a resource is written in.
enum SchemaDraft: Int, Comparable, Sendable {
  case draft4 = 4
  case draft6 = 6
  case draft7 = 7
  case draft201909 = 8
  case draft202012 = 9

  static func < (left: SchemaDraft, right: SchemaDraft) -> Bool { left.rawValue < right.rawValue }

  /// The edition that a `$schema` names, or `nil` for a dialect that is not known here.
  init?(identifier: String) {
    var text = identifier[...]
    if text.hasSuffix("#") { text = text.dropLast() }
    if text.hasPrefix("http://") {
      text = text.dropFirst(7)
    } else if text.hasPrefix("https://") {
      text = text.dropFirst(8)
    }
    switch text {
    case "json-schema.org/draft-04/schema": self = .draft4
    case "json-schema.org/draft-06/schema": self = .draft6
    case "json-schema.org/draft-07/schema": self = .draft7
    case "json-schema.org/draft/2019-09/schema": self = .draft201909
    case "json-schema.org/draft/2020-12/schema", "json-schema.org/schema": self = .draft202012
    default: return nil
    }
  }

  /// Whether keywords beside `$ref` count.
  var keepsReferenceSiblings: Bool { self >= .draft201909 }
}

/// A schema of the document together with what its references resolve against.
struct SchemaPosition: Sendable {
  var value: JSONValue
  /// Index of the resource (the part of a document under one `$id`) it lies in.
  var resource: Int
  /// JSON pointer from the document's root, for messages.
  var pointer: String
}

/// A schema document: its resources, anchors and references.
///
/// Only the places where a specification puts a schema are searched for `$id` and anchors, so that an `$id` among the values
/// of an `enum` names nothing.
struct SchemaDocument {
  struct Resource {
    var uri: URIReference
    var root: SchemaPosition
    var draft: SchemaDraft
    /// Whether a `$schema` says so.
    var isDeclared = false
    var anchors: [String: SchemaPosition] = [:]
    /// `$dynamicAnchor`s; the empty name stands for `$recursiveAnchor: true`.
    var dynamicAnchors: [String: SchemaPosition] = [:]
  }

  private(set) var resources: [Resource] = []
  private var resourceByURI: [String: Int] = [:]
  private var resourceByPointer: [String: Int] = ["": 0]
  let relaxed: Bool

  init(_ root: JSONValue, relaxed: Bool) throws(JSONSchemaError) {
    self.relaxed = relaxed
    let base = URIReference("schema:/")
    let position = SchemaPosition(value: root, resource: 0, pointer: "")
    resources.append(Resource(uri: base, root: position, draft: .draft202012))
    resources[0].draft = try draft(of: root, parent: .draft202012, pointer: "")
    resources[0].isDeclared = root["$schema"]?.stringValue != nil
    register(0, as: base)
    if let identifier = identifier(of: root, draft: resources[0].draft) {
      resources[0].uri = URIReference(identifier).resolved(against: base).withoutFragment
      register(0, as: resources[0].uri)
    }
    try collect(position, isRoot: true, depth: 0)
  }

  private mutating func register(_ resource: Int, as uri: URIReference) {
    let text = uri.withoutFragment.description
    if resourceByURI[text] == nil { resourceByURI[text] = resource }
  }

  private func draft(of schema: JSONValue, parent: SchemaDraft, pointer: String) throws(JSONSchemaError) -> SchemaDraft
  {
    guard let identifier = schema["$schema"]?.stringValue else { return parent }
    if let draft = SchemaDraft(identifier: identifier) { return draft }
    if relaxed { return parent }
    throw JSONSchemaError(
      .unsupported, pointer: pointer + "/$schema",
      "the dialect \(quoted(identifier)) is not one of drafts 4, 6, 7, 2019-09 and 2020-12")
  }

  /// The base URI that a schema sets, if it sets one. A mere fragment is an anchor in drafts up to 7.
  private func identifier(of schema: JSONValue, draft: SchemaDraft) -> String? {
    if !draft.keepsReferenceSiblings, schema["$ref"]?.stringValue != nil { return nil }
    let text = draft == .draft4 ? schema["id"]?.stringValue : schema["$id"]?.stringValue
    guard let text, !text.hasPrefix("#"), !text.isEmpty else { return nil }
    return text
  }

  private mutating func collect(_ schema: SchemaPosition, isRoot: Bool, depth: Int) throws(JSONSchemaError) {
    guard case .object(let object) = schema.value else { return }
    if depth > 256 {
      throw JSONSchemaError(.tooLarge, pointer: schema.pointer, "the schema is nested more than 256 levels deep")
    }
    var schema = schema
    var draft = resources[schema.resource].draft
    if !isRoot {
      draft = try self.draft(of: schema.value, parent: draft, pointer: schema.pointer)
      if let identifier = identifier(of: schema.value, draft: draft) {
        let uri = URIReference(identifier).resolved(against: resources[schema.resource].uri).withoutFragment
        let index = resources.count
        if index > 10_000 {
          throw JSONSchemaError(.tooLarge, pointer: schema.pointer, "the schema holds more than 10000 identifiers")
        }
        let parent = schema.resource
        schema.resource = index
        let isDeclared = resources[parent].isDeclared || object["$schema"]?.stringValue != nil
        resources.append(Resource(uri: uri, root: schema, draft: draft, isDeclared: isDeclared))
        resourceByPointer[schema.pointer] = index
        register(index, as: uri)
      }
    }
    let ignoresSiblings = !draft.keepsReferenceSiblings && object["$ref"]?.stringValue != nil
    if !ignoresSiblings {
      if draft < .draft201909, let text = (draft == .draft4 ? object["id"] : object["$id"])?.stringValue,
        let hash = text.firstIndex(of: "#"), text.index(after: hash) < text.endIndex
      {
        resources[schema.resource].anchors[String(text[text.index(after: hash)...])] = schema
      }
      if draft >= .draft201909 {
        if let anchor = object["$anchor"]?.stringValue { resources[schema.resource].anchors[anchor] = schema }
        if let anchor = object["$dynamicAnchor"]?.stringValue {
          resources[schema.resource].anchors[anchor] = schema
          resources[schema.resource].dynamicAnchors[anchor] = schema
        }
        if object["$recursiveAnchor"]?.boolValue == true { resources[schema.resource].dynamicAnchors[""] = schema }
      }
    }
    for (keyword, value) in object {
      if ignoresSiblings, keyword != "definitions", keyword != "$defs" { continue }
      for child in Self.children(keyword, value) {
        try collect(
          SchemaPosition(
            value: child.value, resource: schema.resource,
            pointer: schema.pointer + "/" + escaped(keyword) + child.suffix), isRoot: false, depth: depth + 1)
      }
    }
  }

  /// The schemas directly under a keyword, with the rest of their pointers.
  private static func children(_ keyword: String, _ value: JSONValue) -> [(suffix: String, value: JSONValue)] {
    switch keyword {
    case "$defs", "definitions", "properties", "patternProperties", "dependentSchemas", "dependencies":
      guard case .object(let members) = value else { return [] }
      return members.map { ("/" + escaped($0.key), $0.value) }
    case "allOf", "anyOf", "oneOf", "prefixItems", "items":
      guard case .array(let elements) = value else { return [("", value)] }
      return elements.enumerated().map { ("/\($0.offset)", $0.element) }
    case "not", "if", "then", "else", "additionalItems", "additionalProperties", "propertyNames", "contains",
      "unevaluatedItems", "unevaluatedProperties", "contentSchema":
      return [("", value)]
    default: return []
    }
  }

  /// The schema that a reference names, with the resource that it was looked up in.
  func resolve(
    _ reference: String, from resource: Int, at pointer: String
  ) throws(JSONSchemaError) -> SchemaPosition {
    let target = URIReference(reference).resolved(against: resources[resource].uri)
    let fragment = target.fragment ?? ""
    guard let index = resourceByURI[target.withoutFragment.description] else {
      throw JSONSchemaError(
        .unsupported, pointer: pointer, "\(quoted(reference)) lies outside this document and is not fetched")
    }
    if fragment.isEmpty { return resources[index].root }
    if fragment.hasPrefix("/") {
      if let found = lookUp(fragment, in: resources[index].root) { return found }
      // Documents older than draft 2019-09 often mean the whole document where a nested `id` says otherwise.
      if let found = lookUp(fragment, in: resources[0].root) { return found }
    } else if let found = resources[index].anchors[percentDecoded(fragment)] {
      return found
    }
    throw JSONSchemaError(.invalid, pointer: pointer, "\(quoted(reference)) names nothing in this document")
  }

  /// The schema that a `$dynamicRef` or `$recursiveRef` names, given the resources entered so far, outermost first.
  func resolveDynamically(
    _ reference: String, isRecursive: Bool, from resource: Int, scope: [Int], at pointer: String
  ) throws(JSONSchemaError) -> SchemaPosition {
    let initial = try resolve(reference, from: resource, at: pointer)
    let name: String
    if isRecursive {
      name = ""
      guard initial.value["$recursiveAnchor"]?.boolValue == true else { return initial }
    } else {
      guard let fragment = URIReference(reference).fragment, !fragment.hasPrefix("/"),
        resources[initial.resource].dynamicAnchors[fragment]?.pointer == initial.pointer
      else { return initial }
      name = fragment
    }
    for resource in scope {
      if let found = resources[resource].dynamicAnchors[name] { return found }
    }
    return initial
  }

  /// The schema under a keyword of another.
  func child(of position: SchemaPosition, _ suffix: String, _ value: JSONValue) -> SchemaPosition {
    let pointer = position.pointer + suffix
    return SchemaPosition(value: value, resource: resourceByPointer[pointer] ?? position.resource, pointer: pointer)
  }

  private func lookUp(_ fragment: String, in root: SchemaPosition) -> SchemaPosition? {
    var position = root
    for part in fragment.split(separator: "/", omittingEmptySubsequences: false).dropFirst() {
      let key = percentDecoded(String(part)).replacingTilde()
      switch position.value {
      case .object(let object):
        guard let value = object[key] else { return nil }
        position.value = value
      case .array(let elements):
        guard let index = Int(key), elements.indices.contains(index) else { return nil }
        position.value = elements[index]
      default: return nil
      }
      position.pointer += "/" + escaped(key)
      // A resource nested on the way changes what references in it mean.
      if let nested = resourceByPointer[position.pointer] { position.resource = nested }
    }
    return position
  }
}

/// A member name as a step of a JSON pointer (RFC 6901).
func escaped(_ key: String) -> String {
  var result = ""
  for scalar in key.unicodeScalars {
    switch scalar {
    case "~": result += "~0"
    case "/": result += "~1"
    default: result.unicodeScalars.append(scalar)
    }
  }
  return result
}

/// A text of the schema inside a message, cut to a bearable length.
func quoted(_ text: String) -> String {
  text.count > 80 ? "\"\(text.prefix(77))...\"" : "\"\(text)\""
}

func percentDecoded(_ text: String) -> String {
  guard text.utf8.contains(UInt8(ascii: "%")) else { return text }
  let bytes = Array(text.utf8)
  var result: [UInt8] = []
  var index = 0
  while index < bytes.count {
    if bytes[index] == UInt8(ascii: "%"), index + 2 < bytes.count,
      let value = UInt8(String(decoding: bytes[index + 1...index + 2], as: UTF8.self), radix: 16)
    {
      result.append(value)
      index += 3
    } else {
      result.append(bytes[index])
      index += 1
    }
  }
  return String(decoding: result, as: UTF8.self)
}

extension String {
  /// A step of a JSON pointer as the member name it stands for.
  fileprivate func replacingTilde() -> String {
    guard utf8.contains(UInt8(ascii: "~")) else { return self }
    var result = ""
    var afterTilde = false
    for scalar in unicodeScalars {
      if afterTilde {
        switch scalar {
        case "0": result += "~"
        case "1": result += "/"
        default:
          result += "~"
          result.unicodeScalars.append(scalar)
        }
        afterTilde = false
      } else if scalar == "~" {
        afterTilde = true
      } else {
        result.unicodeScalars.append(scalar)
      }
    }
    return afterTilde ? result + "~" : result
  }
}

/// A URI reference in its five parts, with the resolution of RFC 3986, section 5.2.
struct URIReference: Hashable, CustomStringConvertible, Sendable {
  var scheme: String?
  var authority: String?
  var path = ""
  var query: String?
  var fragment: String?

  init(_ text: String) {
    var rest = text[...]
    if let hash = rest.firstIndex(of: "#") {
      fragment = String(rest[rest.index(after: hash)...])
      rest = rest[..<hash]
    }
    if let mark = rest.firstIndex(of: "?") {
      query = String(rest[rest.index(after: mark)...])
      rest = rest[..<mark]
    }
    if let colon = rest.firstIndex(of: ":"), colon != rest.startIndex,
      rest[..<colon].utf8.allSatisfy({ byte in
        (byte | 0x20 >= 0x61 && byte | 0x20 <= 0x7A) || (byte >= 0x30 && byte <= 0x39) || byte == 0x2B || byte == 0x2D
          || byte == 0x2E
      })
    {
      scheme = rest[..<colon].lowercased()
      rest = rest[rest.index(after: colon)...]
    }
    if rest.hasPrefix("//") {
      rest = rest.dropFirst(2)
      let end = rest.firstIndex(of: "/") ?? rest.endIndex
      authority = String(rest[..<end])
      rest = rest[end...]
    }
    path = String(rest)
  }

  var withoutFragment: URIReference {
    var result = self
    result.fragment = nil
    return result
  }

  func resolved(against base: URIReference) -> URIReference {
    var result = self
    if scheme != nil {
      result.path = Self.removingDotSegments(path)
      return result
    }
    result.scheme = base.scheme
    if authority != nil {
      result.path = Self.removingDotSegments(path)
      return result
    }
    result.authority = base.authority
    if path.isEmpty {
      result.path = base.path
      if query == nil { result.query = base.query }
      return result
    }
    if path.hasPrefix("/") {
      result.path = Self.removingDotSegments(path)
      return result
    }
    if base.authority != nil, base.path.isEmpty {
      result.path = Self.removingDotSegments("/" + path)
    } else if let slash = base.path.lastIndex(of: "/") {
      result.path = Self.removingDotSegments(base.path[...slash] + path)
    } else {
      result.path = Self.removingDotSegments(path)
    }
    return result
  }

  private static func removingDotSegments(_ path: String) -> String {
    guard path.contains("/") || path == "." || path == ".." else { return path }
    var output: [Substring] = []
    let segments = path.split(separator: "/", omittingEmptySubsequences: false)
    for (index, segment) in segments.enumerated() {
      let isLast = index == segments.count - 1
      switch segment {
      case ".": if isLast { output.append("") }
      case "..":
        if output.count > 1 || (output.count == 1 && output[0] != "") { output.removeLast() }
        if isLast { output.append("") }
      default: output.append(segment)
      }
    }
    return output.joined(separator: "/")
  }

  var description: String {
    (scheme.map { $0 + ":" } ?? "") + (authority.map { "//" + $0 } ?? "") + path + (query.map { "?" + $0 } ?? "")
      + (fragment.map { "#" + $0 } ?? "")
  }
}
