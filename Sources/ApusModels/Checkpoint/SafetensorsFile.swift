public import ApusCore
import ApusTensors

/// One safetensors file: a header in JSON that names tensors, then their bytes.
///
/// Layout: 8 bytes little-endian header length, the header, the data. The checks are those of the format's reference
/// reader: tensors lie in the data without gap or overlap and end where the file ends. Source:
/// https://github.com/huggingface/safetensors (README, "Format").
public final class SafetensorsFile: Sendable {
  /// Where a tensor lies and what it is.
  public struct Entry: Sendable, Equatable {
    /// The type's name in the file, such as `BF16`.
    public var typeName: String
    /// The lengths of the dimensions.
    public var shape: [Int]
    /// Range in the file's data, in bytes from the end of the header.
    public var begin: Int
    public var end: Int
  }

  /// The largest header accepted, in bytes; the reference reader has the same limit.
  public static let headerLimit = 100_000_000

  /// The file.
  public let file: MappedFile
  /// The tensors by name.
  public let entries: [String: Entry]
  private let dataOffset: Int

  /// Maps a file and checks its header.
  /// - Throws: `invalidCheckpoint` with a sentence that names the file and what was expected.
  public init(path: String) throws(EngineError) {
    let file = try MappedFile(path: path)
    func broken(_ sentence: String) -> EngineError { EngineError(.invalidCheckpoint, "\(path): \(sentence).") }

    guard file.bytes.count >= 10 else {
      throw broken("a safetensors file has at least 10 bytes, this one has \(file.bytes.count)")
    }
    let length = UInt64(littleEndian: file.bytes.loadUnaligned(fromByteOffset: 0, as: UInt64.self))
    guard length <= UInt64(Self.headerLimit) else {
      throw broken(
        "the first 8 bytes give a header of \(length) bytes, more than the \(Self.headerLimit) allowed; this is not a "
          + "safetensors file")
    }
    guard Int(length) + 8 <= file.bytes.count else {
      throw broken("the header should have \(length) bytes, but the file ends after \(file.bytes.count - 8) of them")
    }
    let header = UnsafeRawBufferPointer(rebasing: file.bytes[8..<8 + Int(length)])
    let entries: [String: Entry]
    do {
      entries = try Self.parse(header: header.assumingMemoryBound(to: UInt8.self))
    } catch {
      throw broken("the header is not what the format prescribes: \(error)")
    }

    let dataCount = file.bytes.count - 8 - Int(length)
    try Self.check(entries, dataCount: dataCount, broken: broken)
    self.file = file
    self.entries = entries
    self.dataOffset = 8 + Int(length)
  }

  /// The bytes of a tensor.
  public func bytes(of entry: Entry) -> UnsafeRawBufferPointer {
    UnsafeRawBufferPointer(rebasing: file.bytes[dataOffset + entry.begin..<dataOffset + entry.end])
  }

  private static func parse(header: UnsafeBufferPointer<UInt8>) throws(JSONError) -> [String: Entry] {
    var reader = JSONReader(header, depthLimit: 16)
    var entries: [String: Entry] = [:]
    try reader.readObject { reader, name throws(JSONError) in
      if name == "__metadata__" { return try reader.skipValue() }
      let offset = reader.offset
      let value = try reader.readValue()
      func wrong(_ what: String) -> JSONError { JSONError("Tensor \(name) \(what)", at: offset) }
      guard let typeName = value["dtype"]?.stringValue else { throw wrong("has no \"dtype\" text") }
      guard let dimensions = value["shape"]?.arrayValue else { throw wrong("has no \"shape\" array") }
      var shape: [Int] = []
      for dimension in dimensions {
        guard let length = dimension.intValue, length >= 0 else {
          throw wrong("has a shape that is not made of non-negative integers")
        }
        shape.append(length)
      }
      guard let range = value["data_offsets"]?.arrayValue, range.count == 2, let begin = range[0].intValue,
        let end = range[1].intValue, begin >= 0, begin <= end
      else { throw wrong("needs \"data_offsets\" of two integers, the first not above the second") }
      let entry = Entry(typeName: typeName, shape: shape, begin: begin, end: end)
      guard entries.updateValue(entry, forKey: name) == nil else { throw wrong("is listed twice") }
    }
    try reader.finish()
    return entries
  }

  private static func check(
    _ entries: [String: Entry], dataCount: Int, broken: (String) -> EngineError
  ) throws(EngineError) {
    var next = 0
    // Tensors without numbers occupy no bytes and may share an offset with their neighbour.
    for (name, entry) in entries.sorted(by: { ($0.value.begin, $0.value.end) < ($1.value.begin, $1.value.end) }) {
      guard let width = bitWidths[entry.typeName] else {
        throw broken("tensor \(name) has the unknown type \(entry.typeName)")
      }
      var bits = width
      for length in entry.shape {
        let (product, overflow) = bits.multipliedReportingOverflow(by: length)
        guard !overflow else { throw broken("tensor \(name) has a shape too large for 64 bits: \(entry.shape)") }
        bits = product
      }
      guard bits % 8 == 0, bits / 8 == entry.end - entry.begin else {
        throw broken(
          "tensor \(name) of type \(entry.typeName) and shape \(entry.shape) needs \(bits / 8) bytes, but its offsets "
            + "\(entry.begin) to \(entry.end) hold \(entry.end - entry.begin)")
      }
      guard entry.begin == next else {
        throw broken(
          "tensor \(name) starts at byte \(entry.begin) of the data, but "
            + (entry.begin < next ? "overlaps the tensor before it, which ends" : "the tensor before it ends")
            + " at byte \(next)")
      }
      guard entry.end <= dataCount else {
        throw broken(
          "tensor \(name) ends at byte \(entry.end) of the data, but the file holds \(dataCount); it is truncated")
      }
      next = entry.end
    }
    guard next == dataCount else {
      throw broken("the tensors end at byte \(next) of the data, but the file holds \(dataCount)")
    }
  }

  /// Bits of one number of each type of the format.
  private static let bitWidths: [String: Int] = [
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "C64": 64,
  ]

  /// The types that weights can have here.
  static let weightTypes: [String: DType] = ["F32": .float32, "F16": .float16, "BF16": .bfloat16]
}
