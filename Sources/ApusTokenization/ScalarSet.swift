import ApusCore

/// A set of scalars for matching: a bitmap for ASCII, and a two-level bitmap for the rest.
struct ScalarSet: Sendable {
  let asciiLow: UInt64
  let asciiHigh: UInt64
  /// Number of the 256-scalar block of each block of code points; blocks 0 and 1 are all absent and all present.
  private let blocks: [UInt16]
  private let bits: [UInt64]
  /// First bytes of UTF-8 that members have.
  let firstBytes: ByteSet

  init(_ set: ScalarRanges) {
    var low: UInt64 = 0
    var high: UInt64 = 0
    var blocks = [UInt16](repeating: 0, count: 0x1100)
    var bits = [UInt64](repeating: 0, count: 4) + [UInt64](repeating: .max, count: 4)
    var first = ByteSet()
    for range in set.ranges {
      for scalar in range.lowerBound...Swift.min(Swift.max(range.lowerBound, 127), range.upperBound) where scalar < 128
      {
        if scalar < 64 { low |= 1 << UInt64(scalar) } else { high |= 1 << UInt64(scalar - 64) }
        first.insert(UInt8(scalar))
      }
      if range.upperBound >= 0x80 {
        let lead = { (scalar: UInt32) -> UInt8 in
          scalar < 0x80
            ? 0xC2
            : scalar < 0x800
              ? UInt8(0xC0 | scalar >> 6)
              : scalar < 0x10000 ? UInt8(0xE0 | scalar >> 12) : UInt8(0xF0 | scalar >> 18)
        }
        for byte in lead(range.lowerBound)...lead(range.upperBound) { first.insert(byte) }
      }
      for block in (range.lowerBound >> 8)...(range.upperBound >> 8) {
        let start = Swift.max(range.lowerBound, block << 8)
        let end = Swift.min(range.upperBound, block << 8 | 0xFF)
        if start & 0xFF == 0, end & 0xFF == 0xFF {
          blocks[Int(block)] = 1
          continue
        }
        if blocks[Int(block)] == 0 {
          blocks[Int(block)] = UInt16(bits.count / 4)
          bits += [0, 0, 0, 0]
        }
        let base = Int(blocks[Int(block)]) * 4
        for scalar in start...end {
          bits[base + Int(scalar & 0xFF) >> 6] |= 1 << UInt64(scalar & 63)
        }
      }
    }
    asciiLow = low
    asciiHigh = high
    self.blocks = blocks
    self.bits = bits
    firstBytes = first
  }

  /// Whether a scalar is a member.
  @inline(__always)
  func contains(_ scalar: UInt32) -> Bool {
    if scalar < 0x80 {
      return (scalar < 64 ? asciiLow >> UInt64(scalar) : asciiHigh >> UInt64(scalar - 64)) & 1 != 0
    }
    let block = blocks.withUnsafeBufferPointer { Int($0[Int(scalar >> 8)]) }
    return bits.withUnsafeBufferPointer { $0[block * 4 + Int(scalar & 0xFF) >> 6] } >> UInt64(scalar & 63) & 1 != 0
  }
}

/// A set of bytes.
struct ByteSet: Sendable, Equatable {
  private var words: SIMD4<UInt64> = .zero

  static let all: ByteSet = {
    var set = ByteSet()
    set.words = SIMD4(repeating: .max)
    return set
  }()

  mutating func insert(_ byte: UInt8) { words[Int(byte >> 6)] |= 1 << UInt64(byte & 63) }

  mutating func formUnion(_ other: ByteSet) { words |= other.words }

  @inline(__always)
  func contains(_ byte: UInt8) -> Bool { words[Int(byte >> 6)] >> UInt64(byte & 63) & 1 != 0 }
}

/// Sets of scalars that single steps ask for.
enum ScalarSets {
  /// What the Digits pre-tokenizer takes for a digit.
  static let numeric = ScalarSet(
    UnicodeTables.shared.differing(Category.numbers, UnicodeData.numericDifferences))
  /// What the Punctuation and Bert pre-tokenizers take for punctuation.
  static let punctuation = ScalarSet(
    UnicodeTables.shared.differing(Category.punctuation, UnicodeData.punctuationDifferences))
  static let bertRemoved = ScalarSet(UnicodeDataReader.ranges(UnicodeData.bertRemoved))
  static let bertSpaces = ScalarSet(UnicodeDataReader.ranges(UnicodeData.bertSpaces))
  static let bertAccents = ScalarSet(UnicodeDataReader.ranges(UnicodeData.bertAccents))
  static let bertChinese = ScalarSet(UnicodeDataReader.ranges(UnicodeData.bertChinese))
  static let accents = ScalarSet(UnicodeDataReader.ranges(UnicodeData.accents))
  static let nmtRemoved = ScalarSet(UnicodeDataReader.ranges(UnicodeData.nmtRemoved))
  static let nmtSpaces = ScalarSet(UnicodeDataReader.ranges(UnicodeData.nmtSpaces))

  /// Lower case of every scalar that has one.
  static let lowercase: [UInt32: [UInt8]] = {
    var result: [UInt32: [UInt8]] = [:]
    var reader = UnicodeDataReader(UnicodeData.lowercase)
    var scalar: UInt32 = 0
    while let gap = reader.next() {
      scalar += gap
      var bytes: [UInt8] = []
      for _ in 0...reader.next()! { appendScalar(reader.nextDifference(from: scalar), to: &bytes) }
      result[scalar] = bytes
    }
    return result
  }()

  /// Scripts for the UnicodeScripts pre-tokenizer, one byte per scalar; `anyScript` where a scalar goes with every script.
  static let splitScripts: [UInt8] = {
    let any = UInt8(UnicodeData.scriptNames.count)
    var merged = Array(0...any)
    var reader = UnicodeDataReader(UnicodeData.splitScriptMerges)
    while let script = reader.next() { merged[Int(script)] = UInt8(reader.next()!) }
    var table = [UInt8](repeating: any, count: 0x11_0000)
    UnicodeDataReader.forEachValuedRange(UnicodeData.scripts) { range, value in
      for scalar in range { table[Int(scalar)] = merged[Int(value)] }
    }
    UnicodeDataReader.forEachValuedRange(UnicodeData.splitScriptDifferences) { range, value in
      for scalar in range { table[Int(scalar)] = UInt8(value) }
    }
    return table
  }()

  static var anyScript: UInt8 { UInt8(UnicodeData.scriptNames.count) }
}
