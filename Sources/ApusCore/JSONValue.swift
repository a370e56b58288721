/// A JSON document in memory. Objects keep the order of their keys, since templates and schemas depend on it.
public enum JSONValue: Sendable, Equatable {
  case null
  case bool(Bool)
  /// A number written without fraction or exponent that fits 64 bits.
  case int(Int64)
  /// Any other number.
  case double(Double)
  case string(String)
  case array([JSONValue])
  case object(JSONObject)
}

/// An object with its keys in order. A repeated key keeps its first place and its last value, as Python's `json` does.
public struct JSONObject: Sendable, Equatable, Sequence {
  /// Keys in the order in which they first appeared.
  public private(set) var keys: [String] = []
  private var storage: [Key: JSONValue] = [:]

  /// A key by its exact code units. Strings themselves are equal when they look the same (an accented letter written as
  /// one code point or as two), but JSON keeps such keys apart.
  private struct Key: Hashable {
    let text: String
    static func == (left: Key, right: Key) -> Bool { left.text.utf8.elementsEqual(right.text.utf8) }
    func hash(into hasher: inout Hasher) {
      var text = text
      text.withUTF8 { hasher.combine(bytes: UnsafeRawBufferPointer($0)) }
    }
  }

  /// An empty object.
  public init() {}

  /// An object of the pairs given, in their order.
  public init(_ pairs: [(String, JSONValue)]) {
    keys.reserveCapacity(pairs.count)
    for (key, value) in pairs { self[key] = value }
  }

  public var count: Int { keys.count }
  public var isEmpty: Bool { keys.isEmpty }

  /// The value of a key. Setting `nil` removes the key in time linear in the number of keys.
  public subscript(key: String) -> JSONValue? {
    get { storage[Key(text: key)] }
    set {
      if let newValue {
        if storage.updateValue(newValue, forKey: Key(text: key)) == nil { keys.append(key) }
      } else if storage.removeValue(forKey: Key(text: key)) != nil {
        keys.removeAll { $0.utf8.elementsEqual(key.utf8) }
      }
    }
  }

  public func makeIterator() -> AnyIterator<(key: String, value: JSONValue)> {
    var index = 0
    return AnyIterator {
      guard index < keys.count else { return nil }
      defer { index += 1 }
      return (keys[index], storage[Key(text: keys[index])]!)
    }
  }

  /// Equal keys and values, in any order.
  public static func == (left: JSONObject, right: JSONObject) -> Bool { left.storage == right.storage }
}

extension JSONValue: ExpressibleByStringLiteral, ExpressibleByBooleanLiteral, ExpressibleByIntegerLiteral,
  ExpressibleByFloatLiteral, ExpressibleByArrayLiteral, ExpressibleByDictionaryLiteral, ExpressibleByNilLiteral
{
  public init(stringLiteral value: String) { self = .string(value) }
  public init(booleanLiteral value: Bool) { self = .bool(value) }
  public init(integerLiteral value: Int64) { self = .int(value) }
  public init(floatLiteral value: Double) { self = .double(value) }
  public init(arrayLiteral elements: JSONValue...) { self = .array(elements) }
  public init(dictionaryLiteral elements: (String, JSONValue)...) { self = .object(JSONObject(elements)) }
  public init(nilLiteral: ()) { self = .null }

  /// The member of an object, or `nil`.
  public subscript(key: String) -> JSONValue? {
    if case .object(let object) = self { return object[key] }
    return nil
  }

  /// The element of an array, or `nil`.
  public subscript(index: Int) -> JSONValue? {
    if case .array(let array) = self, array.indices.contains(index) { return array[index] }
    return nil
  }

  public var isNull: Bool { self == .null }

  /// The value, or `nil` where it is null. Spelt out, since a bare `nil` of this type is a null.
  public var nonNull: JSONValue? { isNull ? JSONValue?.none : self }
  public var stringValue: String? { if case .string(let value) = self { value } else { nil } }
  public var boolValue: Bool? { if case .bool(let value) = self { value } else { nil } }
  public var arrayValue: [JSONValue]? { if case .array(let value) = self { value } else { nil } }
  public var objectValue: JSONObject? { if case .object(let value) = self { value } else { nil } }

  /// A number without fraction, however it was written (`1`, `1.0`, `1e3`).
  public var intValue: Int? {
    switch self {
    case .int(let value): Int(value)
    case .double(let value): Int(exactly: value)
    default: nil
    }
  }

  /// Any number.
  public var doubleValue: Double? {
    switch self {
    case .int(let value): Double(value)
    case .double(let value): value
    default: nil
    }
  }

  /// The name of the kind, for error messages.
  public var kindName: String {
    switch self {
    case .null: "null"
    case .bool: "a boolean"
    case .int: "an integer"
    case .double: "a number"
    case .string: "a string"
    case .array: "an array"
    case .object: "an object"
    }
  }
}
