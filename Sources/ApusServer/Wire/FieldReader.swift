import ApusCore
import NIOCore

/// Reads the members of a request body by type, and collects what was wrong with them.
///
/// Every reading function consumes exactly one value. A value of the wrong type is skipped, its mistake is noted as
/// "temperature: expected a number, got a string", and the result is `nil`, as it is for `null`: clients send `null`
/// for what they leave out. Thus one answer names all mistakes of a body.
struct FieldReader {
  /// What was wrong so far.
  private(set) var problems: [EngineError] = []
  /// Put before the names of members, such as `stream_options.`.
  private(set) var prefix = ""

  /// Notes a mistake.
  mutating func note(_ name: String, _ sentence: String, code: EngineError.Code = .invalidRequest) {
    // A body with a thousand wrong members needs no thousand sentences.
    if problems.count < 8 {
      problems.append(EngineError(code, "\(prefix)\(name): \(sentence)", parameter: prefix + name))
    }
  }

  /// All mistakes as one error, or `nil`.
  var error: EngineError? {
    guard var error = problems.first else { return nil }
    error.message = problems.map(\.message).joined(separator: "; ") + "."
    return error
  }

  // MARK: Scalars

  mutating func string(_ reader: inout JSONReader, _ name: String) throws(JSONError) -> String? {
    guard try expect([.string], "a string", &reader, name) else { return nil }
    return try reader.readString()
  }

  mutating func bool(_ reader: inout JSONReader, _ name: String) throws(JSONError) -> Bool? {
    guard try expect([.bool], "a boolean", &reader, name) else { return nil }
    return try reader.readBool()
  }

  mutating func number(_ reader: inout JSONReader, _ name: String) throws(JSONError) -> Double? {
    guard try expect([.number], "a number", &reader, name) else { return nil }
    return try reader.readNumber().doubleValue
  }

  mutating func float(_ reader: inout JSONReader, _ name: String) throws(JSONError) -> Float? {
    guard let value = try number(&reader, name) else { return nil }
    let float = Float(value)
    if !float.isFinite { note(name, "the number is too large") }
    return float
  }

  mutating func integer(_ reader: inout JSONReader, _ name: String) throws(JSONError) -> Int? {
    guard try expect([.number], "an integer", &reader, name) else { return nil }
    let value = try reader.readNumber()
    guard let integer = value.intValue else {
      note(name, "expected an integer, got \(value.compactText)")
      return nil
    }
    return integer
  }

  mutating func token(_ reader: inout JSONReader, _ name: String) throws(JSONError) -> TokenID? {
    guard let value = try integer(&reader, name) else { return nil }
    guard let token = TokenID(exactly: value), token >= 0 else {
      note(name, "\(value) is no token id")
      return nil
    }
    return token
  }

  /// Reads anything into a tree; `null` is `nil`.
  mutating func value(_ reader: inout JSONReader, _ name: String) throws(JSONError) -> JSONValue? {
    try reader.readValue().nonNull
  }

  // MARK: Lists

  /// Reads an array, whose elements `element` reads one by one. A `null` element is a mistake.
  mutating func array<Element>(
    _ reader: inout JSONReader, _ name: String, of kind: String,
    _ element: (inout FieldReader, inout JSONReader, String) throws(JSONError) -> Element?
  ) throws(JSONError) -> [Element]? {
    guard try expect([.array], "an array of \(kind)", &reader, name) else { return nil }
    var elements: [Element] = []
    var fields = self
    var index = 0
    try reader.readArray { (reader) throws(JSONError) in
      let isNull = try reader.peek() == .null
      if isNull { fields.note("\(name)[\(index)]", "must not be null") }
      // The element's own name is only made where a mistake needs it: prompts have a hundred thousand elements.
      let noted = fields.problems.count
      if let value = try element(&fields, &reader, name), !isNull {
        elements.append(value)
      } else if fields.problems.count > noted, !isNull {
        fields.locateLastProblem(name, index)
      }
      index += 1
    }
    self = fields
    return elements
  }

  /// Puts an element's index into the mistake noted last.
  private mutating func locateLastProblem(_ name: String, _ index: Int) {
    let last = problems.count - 1
    let path = prefix + name
    guard problems[last].parameter == path else { return }
    problems[last].parameter = "\(path)[\(index)]"
    problems[last].message = "\(path)[\(index)]" + problems[last].message.dropFirst(path.count)
  }

  /// Reads a value or an array of such values.
  mutating func oneOrMore<Element>(
    _ reader: inout JSONReader, _ name: String, of kind: String,
    _ element: (inout FieldReader, inout JSONReader, String) throws(JSONError) -> Element?
  ) throws(JSONError) -> [Element]? {
    if try reader.peek() == .array { return try array(&reader, name, of: kind, element) }
    return try element(&self, &reader, name).map { [$0] }
  }

  mutating func strings(_ reader: inout JSONReader, _ name: String) throws(JSONError) -> [String]? {
    try oneOrMore(&reader, name, of: "strings") { (fields, reader, name) throws(JSONError) in
      try fields.string(&reader, name)
    }
  }

  mutating func tokens(_ reader: inout JSONReader, _ name: String) throws(JSONError) -> [TokenID]? {
    try array(&reader, name, of: "token ids") { (fields, reader, name) throws(JSONError) in
      try fields.token(&reader, name)
    }
  }

  // MARK: Objects

  /// Reads an object: `member` reads the value of each key, or skips it.
  ///
  /// - Returns: whether the value was an object.
  @discardableResult
  mutating func object(
    _ reader: inout JSONReader, _ name: String,
    _ member: (inout FieldReader, inout JSONReader, String) throws(JSONError) -> Void
  ) throws(JSONError) -> Bool {
    guard try expect([.object], "an object", &reader, name) else { return false }
    var fields = self
    fields.prefix = "\(prefix)\(name)."
    try reader.readObject { (reader, key) throws(JSONError) in try member(&fields, &reader, key) }
    problems = fields.problems
    return true
  }

  /// Whether the next value has one of the kinds; if not, notes the mistake (unless it is `null`) and skips the value.
  mutating func expect(
    _ kinds: [JSONReader.Kind], _ expected: String, _ reader: inout JSONReader, _ name: String
  ) throws(JSONError) -> Bool {
    let kind = try reader.peek()
    if kinds.contains(kind) { return true }
    if kind != .null { note(name, "expected \(expected), got \(kind.words)") }
    try reader.skipValue()
    return false
  }
}

extension JSONReader.Kind {
  /// The kind in words, for error messages.
  var words: String {
    switch self {
    case .object: "an object"
    case .array: "an array"
    case .string: "a string"
    case .number: "a number"
    case .bool: "a boolean"
    case .null: "null"
    }
  }
}

/// Reads a request body that must be a JSON object.
///
/// - Parameters:
///   - body: the bytes of the body.
///   - member: reads the value of one key, or skips it.
/// - Throws: `invalidRequest` for malformed JSON, for a body that is no object and for wrong types.
func readBody(
  _ body: ByteBuffer,
  _ member: (inout FieldReader, inout JSONReader, String) throws(JSONError) -> Void
) throws(EngineError) {
  // Nesting deeper than this has no meaning in any request; the limit keeps the recursion off the stack's end.
  let depthLimit = 64
  var fields = FieldReader()
  do throws(JSONError) {
    try body.withBytes { (bytes) throws(JSONError) in
      if bytes.isEmpty { throw JSONError("The body is empty, where a JSON object was expected", at: 0) }
      var reader = JSONReader(bytes, depthLimit: depthLimit)
      let kind = try reader.peek()
      if kind == .object {
        try reader.readObject { (reader, key) throws(JSONError) in try member(&fields, &reader, key) }
      } else {
        fields.note("body", "expected an object, got \(kind.words)")
        try reader.skipValue()
      }
      try reader.finish()
    }
  } catch {
    throw EngineError(.invalidRequest, "The request body is not valid JSON: \(error.description).")
  }
  if let error = fields.error { throw error }
}

extension ByteBuffer {
  /// Gives the readable bytes to a closure with typed errors.
  fileprivate func withBytes<Failure: Error>(
    _ body: (UnsafeBufferPointer<UInt8>) throws(Failure) -> Void
  ) throws(Failure) {
    let result: Result<Void, Failure> = withUnsafeReadableBytes { raw in
      raw.withMemoryRebound(to: UInt8.self) { bytes in
        do throws(Failure) {
          return .success(try body(bytes))
        } catch {
          return .failure(error)
        }
      }
    }
    try result.get()
  }
}
