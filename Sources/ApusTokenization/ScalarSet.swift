/// A set of Unicode scalars as sorted, disjoint, inclusive ranges: the working form while a pattern is parsed.
struct ScalarRanges: Sendable, Equatable {
  private(set) var ranges: [ClosedRange<UInt32>] = []

  init() {}

  /// A set of the ranges given, in any order.
  init(_ unsorted: [ClosedRange<UInt32>]) {
    ranges.reserveCapacity(unsorted.count)
    for range in unsorted.sorted(by: { $0.lowerBound < $1.lowerBound }) {
      if let last = ranges.last, range.lowerBound <= last.upperBound &+ 1 {
        ranges[ranges.count - 1] = last.lowerBound...Swift.max(last.upperBound, range.upperBound)
      } else {
        ranges.append(range)
      }
    }
  }

  init(_ scalar: UInt32) { ranges = [scalar...scalar] }

  static let all = ScalarRanges([0...0x10FFFF])

  var isEmpty: Bool { ranges.isEmpty }

  func union(_ other: ScalarRanges) -> ScalarRanges {
    if isEmpty { return other }
    if other.isEmpty { return self }
    return ScalarRanges(ranges + other.ranges)
  }

  var inverted: ScalarRanges {
    var result = ScalarRanges()
    var next: UInt32 = 0
    for range in ranges {
      if range.lowerBound > next { result.ranges.append(next...(range.lowerBound - 1)) }
      next = range.upperBound + 1
    }
    if next <= 0x10FFFF { result.ranges.append(next...0x10FFFF) }
    return result
  }

  func intersection(_ other: ScalarRanges) -> ScalarRanges {
    var result = ScalarRanges()
    var left = 0
    var right = 0
    while left < ranges.count, right < other.ranges.count {
      let low = Swift.max(ranges[left].lowerBound, other.ranges[right].lowerBound)
      let high = Swift.min(ranges[left].upperBound, other.ranges[right].upperBound)
      if low <= high { result.ranges.append(low...high) }
      if ranges[left].upperBound < other.ranges[right].upperBound { left += 1 } else { right += 1 }
    }
    return result
  }

  /// The set with every case variant of its members.
  var foldingCase: ScalarRanges {
    var extra: [ClosedRange<UInt32>] = []
    let variants = UnicodeTables.shared.caseVariants
    for range in ranges {
      if range.count > variants.count {
        for (scalar, others) in variants where range.contains(scalar) { extra += others.map { $0...$0 } }
      } else {
        for scalar in range { if let others = variants[scalar] { extra += others.map { $0...$0 } } }
      }
    }
    return extra.isEmpty ? self : ScalarRanges(ranges + extra)
  }
}

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
