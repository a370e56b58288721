import ApusCore

/// The tokens of a vocabulary: bytes to id and id to bytes, in one arena.
///
/// Entries keep their order of insertion. The lookup is an open-addressing table with linear probing over 32-bit entry
/// numbers and 32-bit tags, so that a miss rarely touches more than one cache line. Memory is managed by hand, because
/// vocabularies are built and looked up hundreds of thousands of times while a tokenizer loads.
final class TokenTable: @unchecked Sendable {
  // Mutated only while a tokenizer is built, before it is shared.
  private struct Entry {
    var start: UInt32
    var length: UInt32
    var id: TokenID
  }

  private var arenaStart: UnsafeMutablePointer<UInt8>
  private var arenaCapacity: Int
  private var arenaCount = 0
  private var entries: UnsafeMutablePointer<Entry>
  private var entryCapacity: Int
  private(set) var count = 0
  private var slots: UnsafeMutablePointer<UInt64>
  private var mask: Int
  /// Entry number + 1 by id; zero where an id has no token.
  private var entryByID: [UInt32] = []

  init(capacity: Int = 0) {
    entryCapacity = Swift.max(16, capacity)
    entries = .allocate(capacity: entryCapacity)
    arenaCapacity = entryCapacity * 8
    arenaStart = .allocate(capacity: arenaCapacity)
    var size = 32
    while size < entryCapacity * 2 { size *= 2 }
    slots = .allocate(capacity: size)
    slots.initialize(repeating: 0, count: size)
    mask = size - 1
  }

  deinit {
    arenaStart.deallocate()
    entries.deallocate()
    slots.deallocate()
  }

  /// One more than the greatest id.
  var idLimit: Int { entryByID.count }
  /// All tokens' bytes, one after the other.
  var arena: Bytes { Bytes(start: arenaStart, count: arenaCount) }

  private static let tagMask: UInt64 = 0xFFFF_FFFF_0000_0000

  private func grow() {
    let capacity = entryCapacity * 2
    let moved = UnsafeMutablePointer<Entry>.allocate(capacity: capacity)
    moved.moveInitialize(from: entries, count: count)
    entries.deallocate()
    entries = moved
    entryCapacity = capacity
    let size = (mask + 1) * 2
    slots.deallocate()
    slots = .allocate(capacity: size)
    slots.initialize(repeating: 0, count: size)
    mask = size - 1
    for index in 0..<count {
      place(hashBytes(arenaStart + Int(entries[index].start), Int(entries[index].length)), index)
    }
  }

  @inline(__always)
  private func place(_ hash: UInt64, _ entry: Int) {
    var slot = Int(truncatingIfNeeded: hash) & mask
    while slots[slot] != 0 { slot = (slot + 1) & mask }
    slots[slot] = hash & Self.tagMask | UInt64(entry + 1)
  }

  /// Whether an entry has the bytes given.
  @inline(__always)
  func matches(entry: Int, _ pointer: UnsafePointer<UInt8>, _ length: Int) -> Bool {
    Int(entries[entry].length) == length && bytesEqual(arenaStart + Int(entries[entry].start), pointer, length)
  }

  @inline(__always)
  private func find(_ hash: UInt64, _ pointer: UnsafePointer<UInt8>, _ length: Int) -> Int {
    let tag = hash & Self.tagMask
    var slot = Int(truncatingIfNeeded: hash) & mask
    while true {
      let word = slots[slot]
      if word == 0 { return -1 }
      if word & Self.tagMask == tag {
        let entry = Int(word & 0xFFFF_FFFF) - 1
        if matches(entry: entry, pointer, length) { return entry }
      }
      slot = (slot + 1) & mask
    }
  }

  /// The entry of a token, or -1.
  @inline(__always)
  func entry(_ pointer: UnsafePointer<UInt8>, _ length: Int) -> Int {
    find(hashBytes(pointer, length), pointer, length)
  }

  /// The id of a token, or -1.
  @inline(__always)
  func id(_ pointer: UnsafePointer<UInt8>, _ length: Int) -> TokenID {
    let entry = entry(pointer, length)
    return entry < 0 ? -1 : entries[entry].id
  }

  /// The id of a token, or `nil`.
  func id(of text: some Collection<UInt8>) -> TokenID? {
    let id = Array(text).withUnsafeBufferPointer { buffer in
      // The address of an empty buffer is never read.
      self.id(buffer.baseAddress ?? UnsafePointer(arenaStart), buffer.count)
    }
    return id < 0 ? nil : id
  }

  /// Adds a token, or gives a token already there a new id, as a repeated key of a JSON object does.
  func insert(_ bytes: Bytes, id: TokenID) {
    let base = bytes.baseAddress ?? UnsafePointer(arenaStart)
    let hash = hashBytes(base, bytes.count)
    let existing = find(hash, base, bytes.count)
    if existing >= 0 {
      entries[existing].id = id
      return
    }
    if count == entryCapacity { grow() }
    if arenaCount + bytes.count > arenaCapacity {
      let capacity = Swift.max(arenaCapacity * 2, arenaCount + bytes.count)
      let moved = UnsafeMutablePointer<UInt8>.allocate(capacity: capacity)
      moved.moveInitialize(from: arenaStart, count: arenaCount)
      arenaStart.deallocate()
      arenaStart = moved
      arenaCapacity = capacity
    }
    if bytes.count > 0 { (arenaStart + arenaCount).initialize(from: bytes.baseAddress!, count: bytes.count) }
    entries[count] = Entry(
      start: UInt32(truncatingIfNeeded: arenaCount), length: UInt32(truncatingIfNeeded: bytes.count), id: id)
    arenaCount += bytes.count
    place(hash, count)
    count += 1
  }

  /// Builds the map from ids to tokens. Throws when two tokens share an id or an id is absurd for so many tokens.
  func seal(_ file: String) throws(EngineError) {
    let limit = count * 8 + (1 << 20)
    var greatest: TokenID = -1
    for entry in 0..<count {
      let id = entries[entry].id
      guard id >= 0, Int(id) < limit else {
        throw EngineError(
          .invalidCheckpoint, "\(file): the token id \(id) is out of range for a vocabulary of \(count) tokens")
      }
      greatest = Swift.max(greatest, id)
    }
    entryByID = [UInt32](repeating: 0, count: Int(greatest) + 1)
    for entry in 0..<count {
      let id = Int(entries[entry].id)
      if entryByID[id] != 0 {
        let first = String(decoding: bytes(entry: Int(entryByID[id]) - 1), as: UTF8.self)
        let second = String(decoding: bytes(entry: entry), as: UTF8.self)
        throw EngineError(
          .invalidCheckpoint, "\(file): the tokens \"\(first)\" and \"\(second)\" have the same id \(id)")
      }
      entryByID[id] = UInt32(entry + 1)
    }
  }

  /// The id of an entry.
  @inline(__always)
  func id(entry: Int) -> TokenID { entries[entry].id }

  /// The bytes of an entry; valid as long as the table and until the next insertion.
  @inline(__always)
  func bytes(entry: Int) -> Bytes {
    Bytes(start: arenaStart + Int(entries[entry].start), count: Int(entries[entry].length))
  }

  /// The bytes of a token, or `nil` for an id that has none.
  func bytes(of id: TokenID) -> Bytes? {
    guard id >= 0, Int(id) < entryByID.count, entryByID[Int(id)] != 0 else { return nil }
    return bytes(entry: Int(entryByID[Int(id)]) - 1)
  }
}
