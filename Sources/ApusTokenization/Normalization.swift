import ApusCore

/// Unicode normalisation forms (Unicode Standard Annex 15), with the data that `tokenizers` uses.
///
/// Text that is normal already is copied in runs; only the neighbourhood of characters that may change is decomposed,
/// ordered and composed again.
enum NormalizationForm: Sendable {
  case nfc, nfd, nfkc, nfkd

  private var composes: Bool { self == .nfc || self == .nfkc }
  private var isCompatible: Bool { self == .nfkc || self == .nfkd }

  /// Rewrites well-formed UTF-8.
  func apply(to text: inout [UInt8]) {
    let tables = NormalizationTables.shared
    let flag: UInt8 =
      switch self {
      case .nfc: NormalizationTables.nfcFlag
      case .nfd: NormalizationTables.nfdFlag
      case .nfkc: NormalizationTables.nfkcFlag
      case .nfkd: NormalizationTables.nfkdFlag
      }
    let flags = tables.flags
    guard let first = text.withUnsafeBufferPointer({ firstFlagged($0, 0, flag, flags) }) else { return }
    var result: [UInt8] = []
    result.reserveCapacity(text.count + text.count / 4)
    var segment: [UInt32] = []
    text.withUnsafeBufferPointer { bytes in
      let base = bytes.baseAddress!
      var copied = 0
      var next: Int? = first
      while let position = next {
        // The character before may compose with what follows.
        var start = position
        if composes, position > copied { start = previousScalarStart(base, position) }
        result.append(bytes: Bytes(rebasing: bytes[copied..<start]))
        segment.removeAll(keepingCapacity: true)
        var index = start
        var isPrefix = start < position
        while index < bytes.count {
          let (scalar, length) = decodeScalar(base, index)
          if flags[Int(scalar)] & flag == 0, !isPrefix { break }
          isPrefix = false
          tables.appendDecomposition(of: scalar, isCompatible, to: &segment)
          index += length
        }
        tables.order(&segment)
        if composes { tables.compose(&segment) }
        for scalar in segment { appendScalar(scalar, to: &result) }
        copied = index
        next = firstFlagged(bytes, index, flag, flags)
      }
      result.append(bytes: Bytes(rebasing: bytes[copied...]))
    }
    text = result
  }

  private func firstFlagged(
    _ bytes: Bytes, _ start: Int, _ flag: UInt8, _ flags: UnsafeMutablePointer<UInt8>
  ) -> Int? {
    guard let base = bytes.baseAddress else { return nil }
    var index = start
    while index < bytes.count {
      if index + 8 <= bytes.count, load64(base + index) & 0x8080_8080_8080_8080 == 0 {
        index += 8
        continue
      }
      if base[index] < 0x80 {
        index += 1
        continue
      }
      let (scalar, length) = decodeScalar(base, index)
      if flags[Int(scalar)] & flag != 0 { return index }
      index += length
    }
    return nil
  }
}

/// Decompositions, combining classes and compositions.
final class NormalizationTables: @unchecked Sendable {
  static let shared = NormalizationTables()

  /// A scalar that a form changes, or that can interact with what stands before it.
  static let nfcFlag: UInt8 = 1
  static let nfdFlag: UInt8 = 2
  static let nfkcFlag: UInt8 = 4
  static let nfkdFlag: UInt8 = 8

  /// Flags per scalar; lives as long as the process.
  let flags: UnsafeMutablePointer<UInt8>
  private var canonical: [UInt32: [UInt32]] = [:]
  private var compatible: [UInt32: [UInt32]] = [:]
  private var classes: [UInt32: UInt8] = [:]
  private var compositions: [UInt64: UInt32] = [:]

  private init() {
    flags = .allocate(capacity: 0x11_0000)
    flags.initialize(repeating: 0, count: 0x11_0000)
    canonical = Self.decompositions(UnicodeData.canonical)
    compatible = Self.decompositions(UnicodeData.compatible)
    let all = Self.nfcFlag | Self.nfdFlag | Self.nfkcFlag | Self.nfkdFlag
    for scalar in canonical.keys { flags[Int(scalar)] |= all }
    for scalar in compatible.keys { flags[Int(scalar)] |= Self.nfkcFlag | Self.nfkdFlag }
    var reader = UnicodeDataReader(UnicodeData.compositions)
    var scalar: UInt32 = 0
    var seconds: [UInt32] = []
    var composites: [UInt32] = []
    while let gap = reader.next() {
      scalar += gap
      let first = reader.nextDifference(from: scalar)
      let second = reader.nextDifference(from: scalar)
      compositions[UInt64(first) << 32 | UInt64(second)] = scalar
      seconds.append(second)
      composites.append(scalar)
    }
    for scalar in composites { flags[Int(scalar)] &= ~(Self.nfcFlag | Self.nfkcFlag) }
    for scalar in seconds { flags[Int(scalar)] |= Self.nfcFlag | Self.nfkcFlag }
    // A composite whose compatibility decomposition is another must be taken apart all the same.
    for scalar in composites where compatible[scalar] != nil { flags[Int(scalar)] |= Self.nfkcFlag }
    for scalar in 0xAC00...0xD7A3 { flags[scalar] |= Self.nfdFlag | Self.nfkdFlag }
    for scalar in Array(0x1161...0x1175) + Array(0x11A8...0x11C2) {
      flags[scalar] |= Self.nfcFlag | Self.nfkcFlag
    }
    reader = UnicodeDataReader(UnicodeData.combiningClasses)
    scalar = 0
    while let gap = reader.next() {
      scalar += gap
      classes[scalar] = UInt8(reader.next()!)
      flags[Int(scalar)] |= all
    }
  }

  private static func decompositions(_ text: StaticString) -> [UInt32: [UInt32]] {
    var result: [UInt32: [UInt32]] = [:]
    var reader = UnicodeDataReader(text)
    var scalar: UInt32 = 0
    while let gap = reader.next() {
      scalar += gap
      let count = reader.next()! + 1
      result[scalar] = (0..<count).map { _ in reader.nextDifference(from: scalar) }
    }
    return result
  }

  /// Appends the full decomposition of a scalar.
  func appendDecomposition(of scalar: UInt32, _ isCompatible: Bool, to result: inout [UInt32]) {
    if scalar < 0xA0 {
      result.append(scalar)
    } else if scalar >= 0xAC00, scalar <= 0xD7A3 {
      let index = scalar - 0xAC00
      result.append(0x1100 + index / 588)
      result.append(0x1161 + index % 588 / 28)
      if index % 28 != 0 { result.append(0x11A7 + index % 28) }
    } else if isCompatible, let parts = compatible[scalar] {
      result.append(contentsOf: parts)
    } else if let parts = canonical[scalar] {
      result.append(contentsOf: parts)
    } else {
      result.append(scalar)
    }
  }

  @inline(__always)
  private func combiningClass(_ scalar: UInt32) -> UInt8 {
    scalar < 0x300 || flags[Int(scalar)] & Self.nfdFlag == 0 ? 0 : classes[scalar] ?? 0
  }

  /// Puts runs of marks in canonical order.
  func order(_ segment: inout [UInt32]) {
    var index = 0
    while index < segment.count {
      guard combiningClass(segment[index]) != 0 else {
        index += 1
        continue
      }
      var end = index + 1
      while end < segment.count, combiningClass(segment[end]) != 0 { end += 1 }
      if end - index > 1 {
        // Class first, then place, so that marks of one class keep their order.
        var keys: [(key: UInt64, scalar: UInt32)] = []
        for position in index..<end {
          keys.append((UInt64(combiningClass(segment[position])) << 32 | UInt64(position), segment[position]))
        }
        keys.sort { $0.key < $1.key }
        for (offset, key) in keys.enumerated() { segment[index + offset] = key.scalar }
      }
      index = end
    }
  }

  /// Composes an ordered segment in place.
  func compose(_ segment: inout [UInt32]) {
    var starter = -1
    var lastClass: UInt8 = 0
    var output = 0
    for index in 0..<segment.count {
      let scalar = segment[index]
      let combining = combiningClass(scalar)
      if starter >= 0 {
        // A mark is blocked from its starter by a mark of the same or a higher class between them, or by a starter.
        let isAdjacent = output == starter + 1
        if isAdjacent || (lastClass < combining && lastClass != 0), let composite = composite(segment[starter], scalar)
        {
          segment[starter] = composite
          continue
        }
      }
      segment[output] = scalar
      if combining == 0 { starter = output }
      lastClass = combining
      output += 1
    }
    segment.removeLast(segment.count - output)
  }

  private func composite(_ first: UInt32, _ second: UInt32) -> UInt32? {
    if first >= 0x1100, first < 0x1113, second >= 0x1161, second < 0x1176 {
      return 0xAC00 + ((first - 0x1100) * 21 + (second - 0x1161)) * 28
    }
    if first >= 0xAC00, first <= 0xD7A3, (first - 0xAC00) % 28 == 0, second > 0x11A7, second < 0x11C3 {
      return first + (second - 0x11A7)
    }
    return compositions[UInt64(first) << 32 | UInt64(second)]
  }
}
