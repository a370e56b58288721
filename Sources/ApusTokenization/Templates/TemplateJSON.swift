/// `json.dumps` as the `tojson` filter of transformers calls it.
struct PythonJSONEncoder {
  var ensuresASCII = false
  /// What a level is indented by; `nil` writes everything on one line.
  var indent: Text?
  var itemSeparator: Text
  var keySeparator: Text
  var sortsKeys = false
  private let machine: Machine
  private(set) var output: [UInt8] = []

  init(
    _ machine: Machine, ensuresASCII: Bool, indent: Text?, separators: (item: Text, key: Text)?, sortsKeys: Bool
  ) {
    self.machine = machine
    self.ensuresASCII = ensuresASCII
    self.indent = indent
    itemSeparator = separators?.item ?? Text(indent == nil ? ", " : ",")
    keySeparator = separators?.key ?? Text(": ")
    self.sortsKeys = sortsKeys
  }

  mutating func write(_ value: Value, _ depth: Int = 0) throws {
    try machine.charge(1)
    if depth > 600 { throw TemplateFault("RecursionError", "maximum recursion depth exceeded") }
    switch value {
    case .none: append("null")
    case .bool(let bool): append(bool ? "true" : "false")
    case .int(let int): append(String(int))
    case .double(let double): append(number(double))
    case .string(let text): writeString(text)
    case .list(let box), .tuple(let box):
      if box.items.isEmpty { return append("[]") }
      append("[")
      for (position, item) in box.items.enumerated() {
        separate(isFirst: position == 0, depth + 1)
        try write(item, depth + 1)
      }
      newLine(depth)
      append("]")
    case .dict(let box):
      if box.count == 0 { return append("{}") }
      append("{")
      var order = Array(0..<box.count)
      if sortsKeys {
        order = try mergeSorted(order) { try pythonCompare(box.keys[$0], box.keys[$1], .less) }
      }
      for (position, index) in order.enumerated() {
        separate(isFirst: position == 0, depth + 1)
        switch box.keys[index] {
        case .string(let text): writeString(text)
        case .bool(let bool): writeString(Text(bool ? "true" : "false"))
        case .int(let int): writeString(Text(String(int)))
        case .double(let double): writeString(Text(number(double)))
        case .none: writeString(Text("null"))
        default:
          throw TemplateFault.type(
            "keys must be str, int, float, bool or None, not \(typeName(box.keys[index]))")
        }
        output.append(contentsOf: keySeparator.bytes)
        try write(box.values[index], depth + 1)
      }
      newLine(depth)
      append("}")
    case .missing, .undefined, .object:
      throw TemplateFault.type("Object of type \(typeName(value)) is not JSON serializable")
    }
    try machine.chargeBytes(0)
  }

  private mutating func append(_ string: String) { output.append(contentsOf: string.utf8) }

  private func number(_ double: Double) -> String {
    double.isNaN ? "NaN" : double.isInfinite ? (double < 0 ? "-Infinity" : "Infinity") : pythonFloat(double)
  }

  private mutating func separate(isFirst: Bool, _ depth: Int) {
    if !isFirst { output.append(contentsOf: itemSeparator.bytes) }
    newLine(depth)
  }

  private mutating func newLine(_ depth: Int) {
    guard let indent else { return }
    output.append(0x0A)
    for _ in 0..<depth { output.append(contentsOf: indent.bytes) }
  }

  private mutating func writeString(_ text: Text) {
    output.append(UInt8(ascii: "\""))
    func unicode(_ value: UInt32) {
      let digits = String(value, radix: 16)
      append("\\u" + String(repeating: "0", count: 4 - digits.count) + digits)
    }
    var index = 0
    while index < text.bytes.count {
      let byte = text.bytes[index]
      index += 1
      switch byte {
      case UInt8(ascii: "\""): append("\\\"")
      case UInt8(ascii: "\\"): append("\\\\")
      case 0x0A: append("\\n")
      case 0x0D: append("\\r")
      case 0x09: append("\\t")
      case 0x0C: append("\\f")
      case 0x08: append("\\b")
      case 0..<0x20: unicode(UInt32(byte))
      case 0x7F where ensuresASCII: output.append(byte)
      case 0x80...:
        let (scalar, length) = decodeScalar(text.bytes, at: index - 1)
        if ensuresASCII {
          if scalar.value < 0x10000 {
            unicode(scalar.value)
          } else {
            unicode(0xD800 + (scalar.value - 0x10000) >> 10)
            unicode(0xDC00 + (scalar.value - 0x10000) & 0x3FF)
          }
        } else {
          output.append(contentsOf: text.bytes[(index - 1)..<(index - 1 + length)])
        }
        index += length - 1
      default: output.append(byte)
      }
    }
    output.append(UInt8(ascii: "\""))
  }
}

/// A stable merge sort with a comparison that may fail, comparing later elements with earlier ones as Python does.
func mergeSorted<T>(_ items: [T], _ precedes: (T, T) throws -> Bool) throws -> [T] {
  guard items.count > 1 else { return items }
  let middle = items.count / 2
  let left = try mergeSorted(Array(items[..<middle]), precedes)
  let right = try mergeSorted(Array(items[middle...]), precedes)
  var result: [T] = []
  result.reserveCapacity(items.count)
  var (i, j) = (0, 0)
  while i < left.count && j < right.count {
    if try precedes(right[j], left[i]) {
      result.append(right[j])
      j += 1
    } else {
      result.append(left[i])
      i += 1
    }
  }
  result.append(contentsOf: left[i...])
  result.append(contentsOf: right[j...])
  return result
}
