/// Writes JSON into a growing array of UTF-8 bytes. Compact: no spaces, no line breaks, no escapes but the needed ones.
public struct JSONWriter: Sendable {
  /// What was written so far.
  public var bytes: [UInt8] = []
  private var needsComma = false

  /// An empty document.
  public init(capacity: Int = 256) { bytes.reserveCapacity(capacity) }

  /// The text written so far.
  public var text: String { String(decoding: bytes, as: UTF8.self) }

  /// Writes an object; `body` writes its members with `key` followed by a value each.
  public mutating func object(_ body: (inout JSONWriter) -> Void) {
    separate()
    bytes.append(UInt8(ascii: "{"))
    needsComma = false
    body(&self)
    bytes.append(UInt8(ascii: "}"))
    needsComma = true
  }

  /// Writes an array; `body` writes its elements.
  public mutating func array(_ body: (inout JSONWriter) -> Void) {
    separate()
    bytes.append(UInt8(ascii: "["))
    needsComma = false
    body(&self)
    bytes.append(UInt8(ascii: "]"))
    needsComma = true
  }

  /// Writes the key of the member that follows.
  public mutating func key(_ name: String) {
    separate()
    escape(name)
    bytes.append(UInt8(ascii: ":"))
    needsComma = false
  }

  public mutating func value(_ value: String) {
    separate()
    escape(value)
    needsComma = true
  }

  public mutating func value(_ value: Int) {
    separate()
    bytes.append(contentsOf: String(value).utf8)
    needsComma = true
  }

  /// Writes a number. A number that JSON cannot spell (infinite or not a number) is written as `null`.
  public mutating func value(_ value: Double) {
    separate()
    bytes.append(contentsOf: (value.isFinite ? "\(value)" : "null").utf8)
    needsComma = true
  }

  /// Writes a number in the shortest form that reads back as the same float.
  public mutating func value(_ value: Float) {
    separate()
    bytes.append(contentsOf: (value.isFinite ? "\(value)" : "null").utf8)
    needsComma = true
  }

  public mutating func value(_ value: Bool) {
    separate()
    bytes.append(contentsOf: (value ? "true" : "false").utf8)
    needsComma = true
  }

  public mutating func null() {
    separate()
    bytes.append(contentsOf: "null".utf8)
    needsComma = true
  }

  /// Writes a tree.
  public mutating func value(_ value: JSONValue) {
    switch value {
    case .null: null()
    case .bool(let value): self.value(value)
    case .int(let value): self.value(Int(value))
    case .double(let value): self.value(value)
    case .string(let value): self.value(value)
    case .array(let elements): array { writer in for element in elements { writer.value(element) } }
    case .object(let object):
      self.object { writer in
        for (key, value) in object {
          writer.key(key)
          writer.value(value)
        }
      }
    }
  }

  /// Writes a value that is JSON already, as it is. The caller vouches for it.
  public mutating func verbatim(_ json: some Sequence<UInt8>) {
    separate()
    bytes.append(contentsOf: json)
    needsComma = true
  }

  public mutating func member(_ name: String, _ value: String) { key(name); self.value(value) }
  public mutating func member(_ name: String, _ value: Int) { key(name); self.value(value) }
  public mutating func member(_ name: String, _ value: Double) { key(name); self.value(value) }
  public mutating func member(_ name: String, _ value: Bool) { key(name); self.value(value) }
  public mutating func member(_ name: String, _ value: JSONValue) { key(name); self.value(value) }

  private mutating func separate() {
    if needsComma { bytes.append(UInt8(ascii: ",")) }
  }

  /// Writes a quoted string.
  private mutating func escape(_ text: String) {
    bytes.append(UInt8(ascii: "\""))
    var text = text
    text.withUTF8 { utf8 in
      var start = 0
      for index in 0..<utf8.count {
        let byte = utf8[index]
        guard byte < 0x20 || byte == UInt8(ascii: "\"") || byte == UInt8(ascii: "\\") else { continue }
        bytes.append(contentsOf: UnsafeBufferPointer(rebasing: utf8[start..<index]))
        start = index + 1
        bytes.append(UInt8(ascii: "\\"))
        switch byte {
        case 0x08: bytes.append(UInt8(ascii: "b"))
        case 0x09: bytes.append(UInt8(ascii: "t"))
        case 0x0A: bytes.append(UInt8(ascii: "n"))
        case 0x0C: bytes.append(UInt8(ascii: "f"))
        case 0x0D: bytes.append(UInt8(ascii: "r"))
        case 0..<0x20:
          let digits = Array("0123456789abcdef".utf8)
          bytes.append(contentsOf: [UInt8(ascii: "u"), 0x30, 0x30, digits[Int(byte >> 4)], digits[Int(byte & 15)]])
        default: bytes.append(byte)
        }
      }
      bytes.append(contentsOf: UnsafeBufferPointer(rebasing: utf8[start...]))
    }
    bytes.append(UInt8(ascii: "\""))
  }
}

extension JSONValue {
  /// The compact text of the tree.
  public var compactText: String {
    var writer = JSONWriter()
    writer.value(self)
    return writer.text
  }
}
