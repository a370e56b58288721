import ApusCore

/// The tokens of a vocabulary: bytes to id and id to bytes, in one arena.
///
/// Entries keep their order of insertion. The lookup is an open-addressing table with linear probing over 32-bit entry
/// numbers and 32-bit tags, so that a miss rarely touches the arena.
final class TokenTable: @unchecked Sendable {
  // Mutated only while a tokenizer is built, before it is shared.
  private(set) var arena: [UInt8] = []
  private var offsets: [UInt32] = [0]
  private var ids: [TokenID] = []
  /// Entry number + 1 by id; zero where an id has no token.
  private var entryByID: [UInt32] = []
  private var slots: [UInt64] = []
  private var mask = 0

  init(capacity: Int = 0) {
    resize(to: Swift.max(16, capacity))
    ids.reserveCapacity(capacity)
    offsets.reserveCapacity(capacity + 1)
  }

  /// How many distinct tokens there are.
  var count: Int { ids.count }
  /// One more than the greatest id.
  var idLimit: Int { entryByID.count }

  private func resize(to capacity: Int) {
    var size = 16
    while size < capacity * 2 { size *= 2 }
    if size <= slots.count { return }
    slots = [UInt64](repeating: 0, count: size)
    mask = size - 1
    for entry in 0..<ids.count {
      let start = Int(offsets[entry])
      let length = Int(offsets[entry + 1]) - start
      let hash = arena.withUnsafeBufferPointer { hashBytes($0.baseAddress! + start, length) }
      place(hash, entry)
    }
  }

  private func place(_ hash: UInt64, _ entry: Int) {
    var slot = Int(truncatingIfNeeded: hash) & mask
    while slots[slot] != 0 { slot = (slot + 1) & mask }
    slots[slot] = (hash & 0xFFFF_FFFF_0000_0000) | UInt64(entry + 1)
  }

  /// The entry of a token, or -1.
  @inline(__always)
  func entry(_ pointer: UnsafePointer<UInt8>, _ length: Int) -> Int {
    let hash = hashBytes(pointer, length)
    let tag = hash & 0xFFFF_FFFF_0000_0000
    var slot = Int(truncatingIfNeeded: hash) & mask
    return slots.withUnsafeBufferPointer { slots in
      while true {
        let word = slots[slot]
        if word == 0 { return -1 }
        if word & 0xFFFF_FFFF_0000_0000 == tag {
          let entry = Int(word & 0xFFFF_FFFF) - 1
          let start = Int(offsets[entry])
          if Int(offsets[entry + 1]) - start == length,
            arena.withUnsafeBufferPointer({ length == 0 || bytesEqual($0.baseAddress! + start, pointer, length) })
          {
            return entry
          }
        }
        slot = (slot + 1) & mask
      }
    }
  }

  /// The id of a token, or -1.
  @inline(__always)
  func id(_ pointer: UnsafePointer<UInt8>, _ length: Int) -> TokenID {
    let entry = entry(pointer, length)
    return entry < 0 ? -1 : ids[entry]
  }

  /// The id of a token, or `nil`.
  func id(of text: some Collection<UInt8>) -> TokenID? {
    let id = Array(text).withUnsafeBufferPointer { buffer in
      buffer.baseAddress.map { self.id($0, buffer.count) } ?? withUnsafeBytePlaceholder { self.id($0, 0) }
    }
    return id < 0 ? nil : id
  }

  /// Adds a token, or gives a token already there a new id, as a repeated key of a JSON object does.
  func insert(_ bytes: Bytes, id: TokenID) {
    let hash: UInt64
    if let base = bytes.baseAddress {
      let existing = self.entry(base, bytes.count)
      if existing >= 0 {
        ids[existing] = id
        return
      }
      hash = hashBytes(base, bytes.count)
    } else {
      let existing = withUnsafeBytePlaceholder { self.entry($0, 0) }
      if existing >= 0 {
        ids[existing] = id
        return
      }
      hash = withUnsafeBytePlaceholder { hashBytes($0, 0) }
    }
    if (ids.count + 1) * 2 > slots.count { resize(to: ids.count * 2 + 2) }
    let entry = ids.count
    arena.append(contentsOf: bytes)
    offsets.append(UInt32(arena.count))
    ids.append(id)
    place(hash, entry)
  }

  /// Builds the map from ids to tokens. Throws when two tokens share an id or an id is absurd for so many tokens.
  func seal(_ file: String) throws(EngineError) {
    let limit = ids.count * 8 + 1 << 20
    var greatest: TokenID = -1
    for id in ids {
      guard id >= 0, Int(id) < limit else {
        throw EngineError(
          .invalidCheckpoint, "\(file): the token id \(id) is out of range for a vocabulary of \(ids.count) tokens")
      }
      greatest = Swift.max(greatest, id)
    }
    entryByID = [UInt32](repeating: 0, count: Int(greatest) + 1)
    for entry in 0..<ids.count {
      let id = Int(ids[entry])
      if entryByID[id] != 0 {
        let first = String(decoding: self.bytes(entry: Int(entryByID[id]) - 1), as: UTF8.self)
        let second = String(decoding: self.bytes(entry: entry), as: UTF8.self)
        throw EngineError(
          .invalidCheckpoint, "\(file): the tokens \"\(first)\" and \"\(second)\" have the same id \(id)")
      }
      entryByID[id] = UInt32(entry + 1)
    }
  }

  /// The id of an entry.
  @inline(__always)
  func id(entry: Int) -> TokenID { ids[entry] }

  /// The bytes of an entry.
  func bytes(entry: Int) -> ArraySlice<UInt8> { arena[Int(offsets[entry])..<Int(offsets[entry + 1])] }

  /// The bytes of a token, or `nil` for an id that has none.
  func bytes(of id: TokenID) -> ArraySlice<UInt8>? {
    guard id >= 0, Int(id) < entryByID.count, entryByID[Int(id)] != 0 else { return nil }
    return bytes(entry: Int(entryByID[Int(id)]) - 1)
  }

  /// Calls `body` with the bytes of an entry in place.
  @inline(__always)
  func withBytes<Result>(entry: Int, _ body: (Bytes) -> Result) -> Result {
    let start = Int(offsets[entry])
    let end = Int(offsets[entry + 1])
    return arena.withUnsafeBufferPointer { body(Bytes(rebasing: $0[start..<end])) }
  }
}

/// Calls `body` with a pointer that may be compared but holds nothing of use, for the empty string.
@inline(__always)
func withUnsafeBytePlaceholder<Result>(_ body: (UnsafePointer<UInt8>) -> Result) -> Result {
  var byte: UInt8 = 0
  return withUnsafePointer(to: &byte) { body($0) }
}
