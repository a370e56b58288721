/// A map from pairs of token ids to a 64-bit value, by open addressing with linear probing.
///
/// Keys and values are interleaved, so that a lookup usually costs one cache line. The key of an empty slot is all ones,
/// which no pair of ids has, because ids are not negative. Most pairs looked up are absent: a bitmap of hashes, small
/// enough for the second-level cache, answers for nearly all of those.
final class PairTable: @unchecked Sendable {
  // Mutated only while a tokenizer is built, before it is shared.
  private var storage: UnsafeMutablePointer<UInt64>
  private var mask: Int
  private(set) var count = 0
  private let filter: UnsafeMutablePointer<UInt64>
  private static let filterBits = 22

  init(capacity: Int) {
    filter = .allocate(capacity: 1 << (Self.filterBits - 6))
    filter.initialize(repeating: 0, count: 1 << (Self.filterBits - 6))
    var size = 16
    while size < capacity * 2 { size *= 2 }
    mask = size - 1
    storage = .allocate(capacity: size * 2)
    storage.initialize(repeating: .max, count: size * 2)
  }

  deinit {
    storage.deallocate()
    filter.deallocate()
  }

  @inline(__always)
  private static func key(_ left: TokenIndex, _ right: TokenIndex) -> UInt64 {
    UInt64(left) << 32 | UInt64(right)
  }

  @inline(__always)
  private static func hash(_ key: UInt64) -> UInt64 {
    let product = key.multipliedFullWidth(by: 0x9E37_79B9_7F4A_7C15)
    return product.high ^ product.low
  }

  /// The value of a pair, or `UInt64.max`.
  @inline(__always)
  func value(_ left: TokenIndex, _ right: TokenIndex) -> UInt64 {
    let key = Self.key(left, right)
    let hash = Self.hash(key)
    let bit = hash >> UInt64(64 - Self.filterBits)
    if filter[Int(bit >> 6)] >> (bit & 63) & 1 == 0 { return .max }
    var slot = Int(truncatingIfNeeded: hash) & mask
    while true {
      let found = storage[slot * 2]
      if found == key { return storage[slot * 2 + 1] }
      if found == .max { return .max }
      slot = (slot + 1) & mask
    }
  }

  /// Sets the value of a pair. A pair given twice keeps its last value.
  func insert(_ left: TokenIndex, _ right: TokenIndex, _ value: UInt64) {
    if (count + 1) * 2 > mask + 1 { grow() }
    let key = Self.key(left, right)
    let hash = Self.hash(key)
    let bit = hash >> UInt64(64 - Self.filterBits)
    filter[Int(bit >> 6)] |= 1 << (bit & 63)
    var slot = Int(truncatingIfNeeded: hash) & mask
    while storage[slot * 2] != .max, storage[slot * 2] != key { slot = (slot + 1) & mask }
    if storage[slot * 2] == .max { count += 1 }
    storage[slot * 2] = key
    storage[slot * 2 + 1] = value
  }

  private func grow() {
    let old = storage
    let size = mask + 1
    mask = size * 2 - 1
    storage = .allocate(capacity: size * 4)
    storage.initialize(repeating: .max, count: size * 4)
    count = 0
    for index in 0..<size where old[index * 2] != .max {
      insert(TokenIndex(old[index * 2] >> 32), TokenIndex(truncatingIfNeeded: old[index * 2]), old[index * 2 + 1])
    }
    old.deallocate()
  }
}

/// A token id without its sign, as the tables of this module hold it.
typealias TokenIndex = UInt32
