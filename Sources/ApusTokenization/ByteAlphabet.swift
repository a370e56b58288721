/// The alphabet of byte-level BPE: every byte is written as one printable character, so that vocabularies are text.
///
/// Printable Latin-1 stands for itself; the other 68 bytes take the code points from U+0100 on, in order (GPT-2).
enum ByteAlphabet {
  /// The scalar that stands for each byte.
  static let scalars: [UInt32] = {
    var next: UInt32 = 0x100
    return (0..<256).map { (byte: UInt32) in
      switch byte {
      case 0x21...0x7E, 0xA1...0xAC, 0xAE...0xFF: return byte
      default:
        next += 1
        return next - 1
      }
    }
  }()

  /// The byte for each scalar below U+0144, or -1.
  static let bytes: [Int16] = {
    var table = [Int16](repeating: -1, count: 0x144)
    for (byte, scalar) in scalars.enumerated() { table[Int(scalar)] = Int16(byte) }
    return table
  }()

  /// The bytes that a text in the alphabet stands for, or `nil` if it has a character outside of it.
  static func decode(_ text: Bytes) -> [UInt8]? {
    var result: [UInt8] = []
    result.reserveCapacity(text.count)
    return append(text, to: &result) ? result : nil
  }

  /// Appends the bytes that a text stands for; on failure nothing is kept.
  static func append(_ text: Bytes, to result: inout [UInt8]) -> Bool {
    let start = result.count
    guard let base = text.baseAddress else { return true }
    let complete = bytes.withUnsafeBufferPointer { table in
      var index = 0
      while index < text.count {
        let (scalar, length) = decodeScalar(base, index)
        guard scalar < 0x144, table[Int(scalar)] >= 0 else { return false }
        result.append(UInt8(truncatingIfNeeded: table[Int(scalar)]))
        index += length
      }
      return true
    }
    if !complete { result.removeSubrange(start...) }
    return complete
  }

  /// Appends the text of bytes.
  static func encode(_ bytes: Bytes, to result: inout [UInt8]) {
    for byte in bytes { appendScalar(scalars[Int(byte)], to: &result) }
  }
}
