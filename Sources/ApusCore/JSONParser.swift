/// A mistake in a JSON text, with the byte offset where it was seen.
public struct JSONError: Error, Sendable, Equatable, CustomStringConvertible {
  /// What was wrong.
  public var message: String
  /// Offset in bytes from the start of the text.
  public var offset: Int

  public init(_ message: String, at offset: Int) {
    self.message = message
    self.offset = offset
  }

  public var description: String { "\(message) at byte \(offset)" }
}

/// A pull parser over UTF-8 bytes: the caller asks for what it expects, so large documents need no tree.
///
/// Strict RFC 8259, with two limits: nesting depth, and the size of the input by construction. Lone surrogate escapes and
/// invalid UTF-8 are errors, because a text that cannot be represented must not be guessed. A number that overflows a
/// double is an error too.
public struct JSONReader {
  private let bytes: UnsafeBufferPointer<UInt8>
  /// Offset of the next byte to be read.
  public private(set) var offset = 0
  /// How many bytes are left.
  public var remaining: Int { bytes.count - offset }
  private var depth = 0
  private let depthLimit: Int

  /// Reads from memory that must outlive the reader.
  public init(_ bytes: UnsafeBufferPointer<UInt8>, depthLimit: Int = 512) {
    self.bytes = bytes
    self.depthLimit = depthLimit
  }

  // MARK: Structure

  /// The kind of the value that comes next, without reading it.
  public enum Kind: Sendable { case object, array, string, number, bool, null }

  /// Looks at the next value.
  public mutating func peek() throws(JSONError) -> Kind {
    skipWhitespace()
    guard offset < bytes.count else { throw JSONError("The text ends where a value was expected", at: offset) }
    switch bytes[offset] {
    case UInt8(ascii: "{"): return .object
    case UInt8(ascii: "["): return .array
    case UInt8(ascii: "\""): return .string
    case UInt8(ascii: "t"), UInt8(ascii: "f"): return .bool
    case UInt8(ascii: "n"): return .null
    case UInt8(ascii: "-"), UInt8(ascii: "0")...UInt8(ascii: "9"): return .number
    default: throw JSONError("Unexpected character", at: offset)
    }
  }

  /// Reads an object: `body` is called once per member with the key read, and must read exactly one value.
  public mutating func readObject(
    _ body: (inout JSONReader, String) throws(JSONError) -> Void
  ) throws(JSONError) {
    try open(UInt8(ascii: "{"))
    skipWhitespace()
    if consume(UInt8(ascii: "}")) {
      depth -= 1
      return
    }
    while true {
      skipWhitespace()
      let key = try readString()
      skipWhitespace()
      guard consume(UInt8(ascii: ":")) else { throw JSONError("Expected ':'", at: offset) }
      try body(&self, key)
      skipWhitespace()
      if consume(UInt8(ascii: ",")) { continue }
      guard consume(UInt8(ascii: "}")) else { throw JSONError("Expected ',' or '}'", at: offset) }
      depth -= 1
      return
    }
  }

  /// Reads an array: `body` is called once per element and must read exactly one value.
  public mutating func readArray(_ body: (inout JSONReader) throws(JSONError) -> Void) throws(JSONError) {
    try open(UInt8(ascii: "["))
    skipWhitespace()
    if consume(UInt8(ascii: "]")) {
      depth -= 1
      return
    }
    while true {
      try body(&self)
      skipWhitespace()
      if consume(UInt8(ascii: ",")) { continue }
      guard consume(UInt8(ascii: "]")) else { throw JSONError("Expected ',' or ']'", at: offset) }
      depth -= 1
      return
    }
  }

  /// Reads any value into a tree.
  public mutating func readValue() throws(JSONError) -> JSONValue {
    switch try peek() {
    case .null:
      try expect("null")
      return .null
    case .bool: return .bool(try readBool())
    case .number: return try readNumber()
    case .string: return .string(try readString())
    case .array:
      var elements: [JSONValue] = []
      try readArray { (reader) throws(JSONError) in elements.append(try reader.readValue()) }
      return .array(elements)
    case .object:
      var object = JSONObject()
      try readObject { (reader, key) throws(JSONError) in object[key] = try reader.readValue() }
      return .object(object)
    }
  }

  /// Reads any value and forgets it. It is checked as strictly as one that is kept.
  public mutating func skipValue() throws(JSONError) {
    switch try peek() {
    case .null: try expect("null")
    case .bool: _ = try readBool()
    case .number: _ = try readNumber()
    case .string: _ = try readString()
    case .array: try readArray { (reader) throws(JSONError) in try reader.skipValue() }
    case .object: try readObject { (reader, _) throws(JSONError) in try reader.skipValue() }
    }
  }

  /// Refuses anything but whitespace after the document.
  public mutating func finish() throws(JSONError) {
    skipWhitespace()
    if offset != bytes.count { throw JSONError("Unexpected text after the document", at: offset) }
  }

  // MARK: Scalars

  /// Reads `true` or `false`.
  public mutating func readBool() throws(JSONError) -> Bool {
    skipWhitespace()
    if offset < bytes.count, bytes[offset] == UInt8(ascii: "t") {
      try expect("true")
      return true
    }
    try expect("false")
    return false
  }

  /// Reads a number: `.int` if it is written as an integer that fits 64 bits, else `.double`.
  public mutating func readNumber() throws(JSONError) -> JSONValue {
    skipWhitespace()
    let start = offset
    let isNegative = consume(UInt8(ascii: "-"))
    var magnitude: UInt64 = 0
    var overflow = false
    var digits = 0
    while let digit = digit() {
      let (product, first) = magnitude.multipliedReportingOverflow(by: 10)
      let (sum, second) = product.addingReportingOverflow(UInt64(digit))
      magnitude = sum
      overflow = overflow || first || second
      digits += 1
      offset += 1
    }
    let firstDigit = start + (isNegative ? 1 : 0)
    if digits == 0 { throw JSONError("Expected a digit", at: offset) }
    if digits > 1, bytes[firstDigit] == UInt8(ascii: "0") {
      throw JSONError("A number must not start with 0", at: firstDigit)
    }
    var isInteger = true
    if consume(UInt8(ascii: ".")) {
      isInteger = false
      guard digit() != nil else { throw JSONError("Expected a digit", at: offset) }
      while digit() != nil { offset += 1 }
    }
    if offset < bytes.count, bytes[offset] | 0x20 == UInt8(ascii: "e") {
      isInteger = false
      offset += 1
      if !consume(UInt8(ascii: "+")) { _ = consume(UInt8(ascii: "-")) }
      guard digit() != nil else { throw JSONError("Expected a digit", at: offset) }
      while digit() != nil { offset += 1 }
    }
    if isInteger, !overflow {
      if isNegative, magnitude <= UInt64(Int64.max) + 1 { return .int(Int64(truncatingIfNeeded: 0 &- magnitude)) }
      if !isNegative, magnitude <= UInt64(Int64.max) { return .int(Int64(magnitude)) }
    }
    let text = String(decoding: UnsafeBufferPointer(rebasing: bytes[start..<offset]), as: UTF8.self)
    guard let value = Double(text), value.isFinite else { throw JSONError("The number is too large", at: start) }
    return .double(value)
  }

  /// Reads an integer.
  public mutating func readInt() throws(JSONError) -> Int {
    skipWhitespace()
    let start = offset
    // Most integers are a few plain digits.
    var value = 0
    while offset < bytes.count, offset - start < 18, let digit = digit() {
      value = value * 10 + Int(digit)
      offset += 1
    }
    if offset > start, offset - start < 18, bytes[start] != UInt8(ascii: "0") || offset == start + 1,
      offset == bytes.count || !Self.continuesNumber(bytes[offset])
    {
      return value
    }
    offset = start
    guard let value = try readNumber().intValue else { throw JSONError("Expected an integer", at: start) }
    return value
  }

  private static func continuesNumber(_ byte: UInt8) -> Bool {
    switch byte {
    case UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "."), UInt8(ascii: "e"), UInt8(ascii: "E"): true
    default: false
    }
  }

  /// Reads a string.
  public mutating func readString() throws(JSONError) -> String {
    skipWhitespace()
    guard consume(UInt8(ascii: "\"")) else { throw JSONError("Expected a string", at: offset) }
    let start = offset
    // Most strings hold no escapes: find the closing quote and take the bytes as they are.
    while offset < bytes.count {
      let byte = bytes[offset]
      if byte == UInt8(ascii: "\"") {
        let slice = UnsafeBufferPointer(rebasing: bytes[start..<offset])
        offset += 1
        guard let text = String(validating: slice, as: UTF8.self) else { throw JSONError("Invalid UTF-8", at: start) }
        return text
      }
      if byte == UInt8(ascii: "\\") { return try readEscapedString(from: start) }
      if byte < 0x20 { throw JSONError("A control character must be escaped", at: offset) }
      offset += 1
    }
    throw JSONError("The text ends inside a string", at: offset)
  }

  /// Reads a string without making one: `body` gets its UTF-8, unescaped and valid, for the duration of the call.
  ///
  /// This is how large vocabularies are read: a string without escapes is passed in place.
  @inlinable
  public mutating func withString<Result>(
    _ body: (UnsafeBufferPointer<UInt8>) -> Result
  ) throws(JSONError) -> Result {
    if let slice = try readPlainString() { return body(slice) }
    return try readEscapedBytes().withUnsafeBufferPointer(body)
  }

  /// Reads an object without making strings of its keys: `body` is called once per member with the key's UTF-8, and must
  /// read exactly one value. The key is valid until `body` returns.
  public mutating func readObjectBytes(
    _ body: (inout JSONReader, UnsafeBufferPointer<UInt8>) throws(JSONError) -> Void
  ) throws(JSONError) {
    try open(UInt8(ascii: "{"))
    skipWhitespace()
    if consume(UInt8(ascii: "}")) {
      depth -= 1
      return
    }
    while true {
      skipWhitespace()
      if let key = try readPlainString() {
        try colon()
        try body(&self, key)
      } else {
        let key = try readEscapedBytes()
        try colon()
        try key.withUnsafeBufferPointer { (buffer) throws(JSONError) in try body(&self, buffer) }
      }
      skipWhitespace()
      if consume(UInt8(ascii: ",")) { continue }
      guard consume(UInt8(ascii: "}")) else { throw JSONError("Expected ',' or '}'", at: offset) }
      depth -= 1
      return
    }
  }

  private mutating func colon() throws(JSONError) {
    skipWhitespace()
    guard consume(UInt8(ascii: ":")) else { throw JSONError("Expected ':'", at: offset) }
  }

  /// Reads a string that holds no escapes and gives its bytes in place, or `nil`, with the offset at the string's start,
  /// if it holds some.
  @usableFromInline
  mutating func readPlainString() throws(JSONError) -> UnsafeBufferPointer<UInt8>? {
    skipWhitespace()
    guard offset < bytes.count, bytes[offset] == UInt8(ascii: "\"") else {
      throw JSONError("Expected a string", at: offset)
    }
    let start = offset + 1
    var index = start
    var bits: UInt8 = 0
    while index < bytes.count {
      let byte = bytes[index]
      if byte == UInt8(ascii: "\"") {
        let slice = UnsafeBufferPointer(rebasing: bytes[start..<index])
        if bits >= 0x80, !Self.isValidUTF8(slice) { throw JSONError("Invalid UTF-8", at: start) }
        offset = index + 1
        return slice
      }
      if byte == UInt8(ascii: "\\") { return nil }
      if byte < 0x20 { throw JSONError("A control character must be escaped", at: index) }
      bits |= byte
      index += 1
    }
    throw JSONError("The text ends inside a string", at: index)
  }

  /// Reads a string that may hold escapes.
  @usableFromInline
  mutating func readEscapedBytes() throws(JSONError) -> [UInt8] {
    skipWhitespace()
    guard consume(UInt8(ascii: "\"")) else { throw JSONError("Expected a string", at: offset) }
    return Array(try readEscapedString(from: offset).utf8)
  }

  /// Whether bytes are well-formed UTF-8 (Unicode 3.9, table 3-7).
  private static func isValidUTF8(_ bytes: UnsafeBufferPointer<UInt8>) -> Bool {
    var index = 0
    while index < bytes.count {
      let first = bytes[index]
      var low: UInt8 = 0x80
      var high: UInt8 = 0xBF
      let length: Int
      switch first {
      case 0..<0x80:
        index += 1
        continue
      case 0xC2...0xDF: length = 2
      case 0xE0: (length, low) = (3, 0xA0)
      case 0xED: (length, high) = (3, 0x9F)
      case 0xE1...0xEF: length = 3
      case 0xF0: (length, low) = (4, 0x90)
      case 0xF1...0xF3: length = 4
      case 0xF4: (length, high) = (4, 0x8F)
      default: return false
      }
      if index + length > bytes.count { return false }
      for position in 1..<length {
        let byte = bytes[index + position]
        if byte < low || byte > high { return false }
        low = 0x80
        high = 0xBF
      }
      index += length
    }
    return true
  }

  private mutating func readEscapedString(from start: Int) throws(JSONError) -> String {
    var buffer = Array(bytes[start..<offset])
    while offset < bytes.count {
      let byte = bytes[offset]
      offset += 1
      switch byte {
      case UInt8(ascii: "\""):
        guard let text = String(validating: buffer, as: UTF8.self) else { throw JSONError("Invalid UTF-8", at: start) }
        return text
      case UInt8(ascii: "\\"):
        guard offset < bytes.count else { throw JSONError("The text ends inside a string", at: offset) }
        let escape = bytes[offset]
        offset += 1
        switch escape {
        case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): buffer.append(escape)
        case UInt8(ascii: "b"): buffer.append(0x08)
        case UInt8(ascii: "f"): buffer.append(0x0C)
        case UInt8(ascii: "n"): buffer.append(0x0A)
        case UInt8(ascii: "r"): buffer.append(0x0D)
        case UInt8(ascii: "t"): buffer.append(0x09)
        case UInt8(ascii: "u"): buffer.append(contentsOf: try readUnicodeEscape())
        default: throw JSONError("Unknown escape", at: offset - 1)
        }
      case 0..<0x20: throw JSONError("A control character must be escaped", at: offset - 1)
      default: buffer.append(byte)
      }
    }
    throw JSONError("The text ends inside a string", at: offset)
  }

  private mutating func readUnicodeEscape() throws(JSONError) -> [UInt8] {
    let start = offset
    var code = UInt32(try readHex4())
    if code >= 0xD800 && code < 0xDC00 {
      guard consume(UInt8(ascii: "\\")), consume(UInt8(ascii: "u")) else {
        throw JSONError("A lone surrogate has no character", at: start)
      }
      let low = UInt32(try readHex4())
      guard low >= 0xDC00 && low < 0xE000 else { throw JSONError("A lone surrogate has no character", at: start) }
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
    }
    guard let scalar = Unicode.Scalar(code) else { throw JSONError("A lone surrogate has no character", at: start) }
    return Array(UTF8.encode(scalar)!)
  }

  private mutating func readHex4() throws(JSONError) -> UInt16 {
    guard offset + 4 <= bytes.count else { throw JSONError("The text ends inside an escape", at: offset) }
    var value: UInt16 = 0
    for _ in 0..<4 {
      let byte = bytes[offset]
      let digit: UInt8
      switch byte {
      case UInt8(ascii: "0")...UInt8(ascii: "9"): digit = byte - UInt8(ascii: "0")
      case UInt8(ascii: "a")...UInt8(ascii: "f"): digit = byte - UInt8(ascii: "a") + 10
      case UInt8(ascii: "A")...UInt8(ascii: "F"): digit = byte - UInt8(ascii: "A") + 10
      default: throw JSONError("Expected four hexadecimal digits", at: offset)
      }
      value = value << 4 | UInt16(digit)
      offset += 1
    }
    return value
  }

  // MARK: Bytes

  private mutating func open(_ bracket: UInt8) throws(JSONError) {
    skipWhitespace()
    guard consume(bracket) else {
      throw JSONError("Expected '\(Character(Unicode.Scalar(bracket)))'", at: offset)
    }
    depth += 1
    if depth > depthLimit { throw JSONError("Nesting is deeper than \(depthLimit) levels", at: offset) }
  }

  private mutating func expect(_ word: StaticString) throws(JSONError) {
    skipWhitespace()
    let count = word.utf8CodeUnitCount
    guard offset + count <= bytes.count else { throw JSONError("Expected \(word)", at: offset) }
    for index in 0..<count where bytes[offset + index] != word.utf8Start[index] {
      throw JSONError("Expected \(word)", at: offset)
    }
    offset += count
  }

  private func digit() -> UInt8? {
    guard offset < bytes.count else { return nil }
    let byte = bytes[offset]
    return byte >= UInt8(ascii: "0") && byte <= UInt8(ascii: "9") ? byte - UInt8(ascii: "0") : nil
  }

  private mutating func consume(_ byte: UInt8) -> Bool {
    guard offset < bytes.count, bytes[offset] == byte else { return false }
    offset += 1
    return true
  }

  private mutating func skipWhitespace() {
    while offset < bytes.count {
      switch bytes[offset] {
      case 0x20, 0x09, 0x0A, 0x0D: offset += 1
      default: return
      }
    }
  }
}

extension JSONValue {
  /// Parses a whole document.
  public static func parse(_ text: String, depthLimit: Int = 512) throws(JSONError) -> JSONValue {
    try parse(Array(text.utf8), depthLimit: depthLimit)
  }

  /// Parses a whole document of UTF-8 bytes.
  public static func parse(_ bytes: [UInt8], depthLimit: Int = 512) throws(JSONError) -> JSONValue {
    try bytes.withUnsafeBufferPointer { (buffer) throws(JSONError) in
      var reader = JSONReader(buffer, depthLimit: depthLimit)
      let value = try reader.readValue()
      try reader.finish()
      return value
    }
  }
}
