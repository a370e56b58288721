/// What stands before the weights of a GGUF file: metadata and the list of tensors.
///
/// Layout: magic `GGUF`, 32-bit version, 64-bit counts of tensors and of metadata entries, the entries, the list of
/// tensors, padding to the alignment, the data; all little-endian. Versions 2 and 3 differ in nothing else. Source:
/// https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
///
/// Lengths are checked against what is left of the file before anything is made of them, and arrays stay where they are,
/// so the memory taken is a small multiple of the entries that really are there.
public struct GGUFHeader: Sendable {
  /// A value of the metadata.
  public enum Value: Sendable, Equatable {
    case integer(Int)
    /// An unsigned number beyond `Int.max`.
    case unsigned(UInt64)
    case number(Double)
    case flag(Bool)
    case text(String)
    case array(ArrayValue)

    /// The number, if the value is a whole one.
    public var intValue: Int? { if case .integer(let value) = self { value } else { nil } }
    /// The number, whole or not.
    public var doubleValue: Double? {
      switch self {
      case .integer(let value): Double(value)
      case .number(let value): value
      default: nil
      }
    }
    public var boolValue: Bool? { if case .flag(let value) = self { value } else { nil } }
    public var stringValue: String? { if case .text(let value) = self { value } else { nil } }
    public var arrayValue: ArrayValue? { if case .array(let value) = self { value } else { nil } }

    /// What kind of value it is, for messages.
    public var kindName: String {
      switch self {
      case .integer, .unsigned: "an integer"
      case .number: "a number"
      case .flag: "a boolean"
      case .text: "a string"
      case .array: "an array"
      }
    }
  }

  /// Where the elements of an array lie in the file.
  public struct ArrayValue: Sendable, Equatable {
    /// The format's number for the type of the elements; 8 for strings.
    public var elementType: UInt32
    public var count: Int
    /// From the start of the file, in bytes.
    public var offset: Int
  }

  /// Where an entry of the metadata lies in the file, for copying it as it is.
  public struct Entry: Sendable, Equatable {
    public var key: String
    /// The type's number and the value, in bytes from the start of the file.
    public var range: Range<Int>
  }

  /// One line of the list of tensors.
  public struct Tensor: Sendable, Equatable {
    public var name: String
    /// Lengths in the format's order: the first is that of a row, so [inputs, outputs] for a linear layer.
    public var dimensions: [Int]
    /// The format's number for the type.
    public var typeID: UInt32
    /// From the start of the data, in bytes.
    public var offset: Int
    /// Size of the tensor's data in bytes.
    public var byteCount: Int
    /// Name of the type, such as `Q4_K`.
    public var typeName: String { GGUFHeader.tensorTypes[typeID]?.name ?? "type \(typeID)" }
  }

  /// How a type stores numbers: blocks of so many numbers in so many bytes.
  public struct TensorType: Sendable {
    public var name: String
    public var blockLength: Int
    public var blockBytes: Int
  }

  /// All types that the format knows, by their number.
  public static let tensorTypes: [UInt32: TensorType] = {
    let rows: [(UInt32, String, Int, Int)] = [
      (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22),
      (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 36), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110),
      (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292),
      (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50),
      (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136),
      (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8), (28, "F64", 1, 8),
      (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66),
      (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36),
    ]
    return Dictionary(
      uniqueKeysWithValues: rows.map { ($0.0, TensorType(name: $0.1, blockLength: $0.2, blockBytes: $0.3)) })
  }()

  /// The largest header accepted: text, metadata entries and tensors beyond these are no model's.
  public static let textLimit = 64 << 20
  public static let entryLimit = 1 << 16
  public static let tensorLimit = 1 << 20
  public static let nestingLimit = 4

  /// The file, for messages.
  public let path: String
  public let version: Int
  public let metadata: [String: Value]
  /// The entries of the metadata in the order of the file.
  public let entries: [Entry]
  public let tensors: [Tensor]
  /// Offsets of tensors are multiples of this.
  public let alignment: Int
  /// Where the data begins.
  public let dataOffset: Int

  /// Reads and checks the header of a whole file in memory.
  /// - Throws: `invalidCheckpoint` with a sentence that names the file, the tensor or entry, and what was expected;
  ///   `unsupported` for versions and byte orders that are not read.
  public init(_ bytes: UnsafeRawBufferPointer, path: String) throws(EngineError) {
    var reader = GGUFReader(bytes, path: path)
    guard bytes.count >= 24, bytes[0] == 0x47, bytes[1] == 0x47, bytes[2] == 0x55, bytes[3] == 0x46 else {
      throw reader.broken(
        "a GGUF file starts with the letters GGUF and has at least 24 bytes, this one has \(bytes.count) and "
          + "does not or is cut short")
    }
    reader.offset = 4
    let version = try reader.integer(UInt32.self, "the version")
    guard version == 2 || version == 3 else {
      throw EngineError(
        .unsupported,
        version.byteSwapped == 2 || version.byteSwapped == 3
          ? "\(path) is a big-endian GGUF file; only little-endian ones can be read."
          : "\(path) is a GGUF file of version \(version); versions 2 and 3 can be read. Convert the model again.")
    }
    let tensorCount = try reader.integer(UInt64.self, "the number of tensors")
    let entryCount = try reader.integer(UInt64.self, "the number of metadata entries")
    // An entry takes at least 8 + 4 + 1 bytes, a line of the list 8 + 4 + 4 + 8.
    guard entryCount <= UInt64(Self.entryLimit), entryCount <= UInt64(reader.remaining / 13) else {
      throw reader.broken("it claims \(entryCount) metadata entries, more than it can hold")
    }
    guard tensorCount <= UInt64(Self.tensorLimit), tensorCount <= UInt64(reader.remaining / 24) else {
      throw reader.broken("it claims \(tensorCount) tensors, more than it can hold")
    }
    var metadata: [String: Value] = [:]
    var entries: [Entry] = []
    entries.reserveCapacity(Int(entryCount))
    for index in 0..<Int(entryCount) {
      let key = try reader.text("the key of metadata entry \(index)", limit: 1 << 16)
      let start = reader.offset
      let type = try reader.integer(UInt32.self, "the type of \(key)")
      let value = try reader.value(type, key)
      entries.append(Entry(key: key, range: start..<reader.offset))
      guard metadata.updateValue(value, forKey: key) == nil else {
        throw reader.broken("the metadata entry \(key) occurs twice")
      }
    }
    var alignment = 32
    if let value = metadata["general.alignment"] {
      guard let number = value.intValue, number >= 1, number <= 1 << 20, number & (number - 1) == 0 else {
        throw reader.broken("general.alignment must be a power of two up to \(1 << 20)")
      }
      alignment = number
    }
    var tensors: [Tensor] = []
    tensors.reserveCapacity(Int(tensorCount))
    var names: Set<String> = []
    for index in 0..<Int(tensorCount) {
      let tensor = try Self.tensor(&reader, index, alignment)
      guard names.insert(tensor.name).inserted else { throw reader.broken("tensor \(tensor.name) is listed twice") }
      tensors.append(tensor)
    }
    // A file of metadata alone (a vocabulary, or the first of a split) may end without the padding.
    let dataOffset = tensors.isEmpty ? reader.offset : (reader.offset + alignment - 1) / alignment * alignment
    try Self.check(tensors, dataCount: bytes.count - dataOffset, reader)
    self.path = path
    self.version = Int(version)
    self.metadata = metadata
    self.entries = entries
    self.tensors = tensors
    self.alignment = alignment
    self.dataOffset = dataOffset
  }

  private static func tensor(_ reader: inout GGUFReader, _ index: Int, _ alignment: Int) throws(EngineError) -> Tensor {
    let name = try reader.text("the name of tensor \(index)", limit: 1 << 10)
    guard !name.isEmpty else { throw reader.broken("tensor \(index) has no name") }
    let rank = try reader.integer(UInt32.self, "the number of dimensions of tensor \(name)")
    guard rank >= 1, rank <= 4 else {
      throw reader.broken("tensor \(name) has \(rank) dimensions; the format has 1 to 4")
    }
    var dimensions: [Int] = []
    var count = 1
    for _ in 0..<rank {
      let length = try reader.integer(UInt64.self, "a dimension of tensor \(name)")
      let (product, overflow) = count.multipliedReportingOverflow(by: Int(clamping: length))
      guard length >= 1, length < 1 << 48, !overflow, product < 1 << 56 else {
        throw reader.broken("tensor \(name) has an impossible dimension, \(length)")
      }
      count = product
      dimensions.append(Int(length))
    }
    let typeID = try reader.integer(UInt32.self, "the type of tensor \(name)")
    guard let type = tensorTypes[typeID] else {
      throw reader.broken("tensor \(name) has the unknown type \(typeID)")
    }
    guard dimensions[0] % type.blockLength == 0 else {
      throw reader.broken(
        "tensor \(name) has rows of \(dimensions[0]) numbers, but \(type.name) stores blocks of \(type.blockLength)")
    }
    let offset = try reader.integer(UInt64.self, "the offset of tensor \(name)")
    guard offset < 1 << 56, Int(offset) % alignment == 0 else {
      throw reader.broken("tensor \(name) starts at byte \(offset) of the data, not a multiple of \(alignment)")
    }
    return Tensor(
      name: name, dimensions: dimensions, typeID: typeID, offset: Int(offset),
      byteCount: count / type.blockLength * type.blockBytes)
  }

  private static func check(_ tensors: [Tensor], dataCount: Int, _ reader: GGUFReader) throws(EngineError) {
    var end = 0
    var previous = ""
    for tensor in tensors.sorted(by: { ($0.offset, $0.name) < ($1.offset, $1.name) }) {
      guard tensor.offset >= end else {
        throw reader.broken(
          "tensor \(tensor.name) starts at byte \(tensor.offset) of the data, but overlaps tensor \(previous), which "
            + "ends at byte \(end)")
      }
      end = tensor.offset + tensor.byteCount
      guard end <= dataCount else {
        throw reader.broken(
          "tensor \(tensor.name) ends at byte \(end) of the data, but the file holds \(max(dataCount, 0)); it is "
            + "truncated")
      }
      previous = tensor.name
    }
  }

  /// The values of an array of numbers or booleans, widened.
  /// - Parameters:
  ///   - key: the metadata entry.
  ///   - bytes: the file that the header was read from.
  /// - Returns: `nil` if there is no such entry.
  /// - Throws: `invalidCheckpoint` if the entry is no array of numbers.
  public func numbers(_ key: String, in bytes: UnsafeRawBufferPointer) throws(EngineError) -> [Double]? {
    guard let value = metadata[key] else { return nil }
    var reader = GGUFReader(bytes, path: path)
    guard let array = value.arrayValue, GGUFReader.width(array.elementType) != nil else {
      throw reader.broken("\(key) must be an array of numbers, found \(value.kindName)")
    }
    reader.offset = array.offset
    var numbers: [Double] = []
    numbers.reserveCapacity(array.count)
    for _ in 0..<array.count {
      switch try reader.value(array.elementType, key) {
      case .integer(let value): numbers.append(Double(value))
      case .unsigned(let value): numbers.append(Double(value))
      case .number(let value): numbers.append(value)
      case .flag(let value): numbers.append(value ? 1 : 0)
      default: break
      }
    }
    return numbers
  }

  /// The bytes of an array of numbers of one byte each.
  /// - Returns: `nil` if there is no such entry.
  /// - Throws: `invalidCheckpoint` if the entry is no such array.
  public func byteArray(_ key: String, in bytes: UnsafeRawBufferPointer) throws(EngineError) -> [UInt8]? {
    guard let value = metadata[key] else { return nil }
    guard let array = value.arrayValue, array.elementType <= 1 else {
      throw GGUFReader(bytes, path: path).broken("\(key) must be an array of bytes, found \(value.kindName)")
    }
    return Array(bytes[array.offset..<array.offset + array.count])
  }

  /// Calls `body` with the bytes of each string of an array, in order.
  /// - Returns: the number of strings, or `nil` if there is no such entry.
  /// - Throws: `invalidCheckpoint` if the entry is no array of strings, and what `body` throws.
  @discardableResult
  public func forEachText(
    _ key: String, in bytes: UnsafeRawBufferPointer,
    _ body: (UnsafeBufferPointer<UInt8>) throws(EngineError) -> Void
  ) throws(EngineError) -> Int? {
    guard let value = metadata[key] else { return nil }
    var reader = GGUFReader(bytes, path: path)
    guard let array = value.arrayValue, array.elementType == 8 else {
      throw reader.broken("\(key) must be an array of strings, found \(value.kindName)")
    }
    reader.offset = array.offset
    for _ in 0..<array.count { try body(try reader.textBytes(key, limit: Self.textLimit)) }
    return array.count
  }
}

/// Reads the values of a GGUF header one after another.
struct GGUFReader {
  let bytes: UnsafeRawBufferPointer
  let path: String
  var offset = 0

  init(_ bytes: UnsafeRawBufferPointer, path: String) {
    self.bytes = bytes
    self.path = path
  }

  var remaining: Int { bytes.count - offset }

  func broken(_ sentence: String) -> EngineError { EngineError(.invalidCheckpoint, "\(path): \(sentence).") }

  mutating func integer<T: FixedWidthInteger>(_ type: T.Type, _ what: String) throws(EngineError) -> T {
    let width = T.bitWidth / 8
    guard remaining >= width else { throw broken("the file ends within \(what), at byte \(bytes.count)") }
    defer { offset += width }
    return T(littleEndian: bytes.loadUnaligned(fromByteOffset: offset, as: T.self))
  }

  mutating func textBytes(_ what: String, limit: Int) throws(EngineError) -> UnsafeBufferPointer<UInt8> {
    let length = try integer(UInt64.self, what)
    guard length <= UInt64(limit) else {
      throw broken("\(what) should have \(length) bytes, more than the \(limit) allowed")
    }
    guard Int(length) <= remaining else {
      throw broken("\(what) should have \(length) bytes, but the file ends after \(remaining) of them")
    }
    defer { offset += Int(length) }
    return UnsafeRawBufferPointer(rebasing: bytes[offset..<offset + Int(length)]).assumingMemoryBound(to: UInt8.self)
  }

  mutating func text(_ what: String, limit: Int) throws(EngineError) -> String {
    let content = try textBytes(what, limit: limit)
    guard let text = String(validating: content, as: UTF8.self) else {
      throw broken("\(what) is not valid UTF-8")
    }
    return text
  }

  /// Bytes of a number or boolean of a type; `nil` for other types.
  static func width(_ type: UInt32) -> Int? {
    switch type {
    case 0, 1, 7: 1
    case 2, 3: 2
    case 4, 5, 6: 4
    case 10, 11, 12: 8
    default: nil
    }
  }

  mutating func value(_ type: UInt32, _ key: String) throws(EngineError) -> GGUFHeader.Value {
    switch type {
    case 0: return .integer(Int(try integer(UInt8.self, key)))
    case 1: return .integer(Int(try integer(Int8.self, key)))
    case 2: return .integer(Int(try integer(UInt16.self, key)))
    case 3: return .integer(Int(try integer(Int16.self, key)))
    case 4: return .integer(Int(try integer(UInt32.self, key)))
    case 5: return .integer(Int(try integer(Int32.self, key)))
    case 6: return .number(Double(Float(bitPattern: try integer(UInt32.self, key))))
    case 7:
      let byte = try integer(UInt8.self, key)
      guard byte <= 1 else { throw broken("\(key) is a boolean of value \(byte)") }
      return .flag(byte == 1)
    case 8: return .text(try text(key, limit: GGUFHeader.textLimit))
    case 9:
      let elementType = try integer(UInt32.self, key)
      let count = try integer(UInt64.self, key)
      let start = offset
      try skip(elementType, count, key, depth: 1)
      return .array(GGUFHeader.ArrayValue(elementType: elementType, count: Int(count), offset: start))
    case 10:
      let value = try integer(UInt64.self, key)
      return Int(exactly: value).map { .integer($0) } ?? .unsigned(value)
    case 11: return .integer(Int(try integer(Int64.self, key)))
    case 12: return .number(Double(bitPattern: try integer(UInt64.self, key)))
    default: throw broken("\(key) has the unknown type \(type)")
    }
  }

  /// Steps over the elements of an array and checks that they are there.
  private mutating func skip(_ type: UInt32, _ count: UInt64, _ key: String, depth: Int) throws(EngineError) {
    guard depth <= GGUFHeader.nestingLimit else {
      throw broken("\(key) nests arrays deeper than \(GGUFHeader.nestingLimit)")
    }
    let least = Self.width(type) ?? (type == 8 ? 8 : 12)
    guard count <= UInt64(remaining / least) else {
      throw broken("\(key) claims \(count) elements, more than the file can hold")
    }
    if let width = Self.width(type) {
      offset += Int(count) * width
      return
    }
    switch type {
    case 8: for _ in 0..<count { _ = try textBytes("an element of \(key)", limit: GGUFHeader.textLimit) }
    case 9:
      for _ in 0..<count {
        let inner = try integer(UInt32.self, key)
        let innerCount = try integer(UInt64.self, key)
        try skip(inner, innerCount, key, depth: depth + 1)
      }
    default: throw broken("\(key) is an array of the unknown type \(type)")
    }
  }
}
