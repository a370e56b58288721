import ApusCore

/// Byte-pair encoding (Sennrich et al., 2016) as Hugging Face `tokenizers` defines it: start from characters (or bytes),
/// merge the adjacent pair of lowest rank, leftmost first, until no pair can merge.
///
/// Two algorithms give the same result: scanning all pairs for the minimum, best for a word, and a heap over a linked
/// list, which costs O(n log n) for text of any length.
struct BytePairEncoding: Sendable {
  /// What a `BPE` model of a `tokenizer.json` sets.
  struct Options: Sendable {
    /// Token for characters that have none, and its id.
    var unknown: TokenID?
    /// The text of an unknown token that the vocabulary lacks; meeting an unknown character is then an error.
    var missingUnknown: String?
    /// Whether neighbouring unknown characters become one unknown token.
    var fuseUnknown = false
    /// Whether characters without a token become tokens of their bytes, `<0x00>` to `<0xFF>`.
    var byteFallback = false
    /// Whether a whole word that is a token is taken without merging.
    var ignoreMerges = false
    /// Written before every character but a word's first, when looking it up.
    var continuingPrefix: [UInt8] = []
    /// Written after a word's last character, when looking it up.
    var wordSuffix: [UInt8] = []
    /// Whether a piece is a string of raw bytes whose units are single bytes (byte-level BPE with its alphabet undone).
    var unitsAreBytes = false
  }

  var options: Options
  let vocabulary: TokenTable
  /// Value of a pair: rank in the upper half, id of the merged token in the lower.
  let merges: PairTable
  /// Token of each byte: of the raw byte where units are bytes, else of `<0xHH>`; -1 where there is none.
  let byteTokens: [TokenID]
  /// Token of each ASCII character, where units are characters; -1 where there is none.
  private let asciiTokens: [TokenID]
  private let hasAffixes: Bool
  /// Whether text can be cut before every U+2581 that follows another character, because no token reaches across such a
  /// place. Models whose pieces are whole texts (SentencePiece style) are then encoded word by word.
  private let cutsAtMarker: Bool
  private static let marker: [UInt8] = [0xE2, 0x96, 0x81]
  /// Tokens that are taken wherever their text stands, before anything merges.
  private let fixed: TokenTrie?

  /// Values of all pairs of byte tokens, where units are bytes: the pairs that every word starts with.
  private let bytePairs: [UInt64]

  init(options: Options, vocabulary: TokenTable, merges: PairTable, fixed: TokenTrie? = nil) {
    self.fixed = fixed
    self.options = options
    self.vocabulary = vocabulary
    self.merges = merges
    let digits = Array("0123456789ABCDEF".utf8)
    byteTokens = (0..<256).map { byte in
      if options.unitsAreBytes { return vocabulary.id(of: [UInt8(byte)]) ?? -1 }
      return vocabulary.id(of: Array("<0x".utf8) + [digits[byte >> 4], digits[byte & 15], UInt8(ascii: ">")]) ?? -1
    }
    asciiTokens = (0..<128).map { vocabulary.id(of: [UInt8($0)]) ?? -1 }
    hasAffixes = !options.continuingPrefix.isEmpty || !options.wordSuffix.isEmpty
    cutsAtMarker = !options.unitsAreBytes && !hasAffixes && Self.canCutAtMarker(vocabulary)
    if options.unitsAreBytes {
      let tokens = byteTokens
      bytePairs = [UInt64](unsafeUninitializedCapacity: 1 << 16) { buffer, count in
        for left in 0..<256 {
          for right in 0..<256 {
            buffer[left << 8 | right] = merges.value(
              TokenIndex(bitPattern: tokens[left]), TokenIndex(bitPattern: tokens[right]))
          }
        }
        count = 1 << 16
      }
    } else {
      bytePairs = []
    }
  }

  private static func canCutAtMarker(_ vocabulary: TokenTable) -> Bool {
    guard vocabulary.id(of: marker) != nil else { return false }
    for entry in 0..<vocabulary.count {
      let token = vocabulary.bytes(entry: entry)
      var index = 3
      while index + 3 <= token.count {
        if isMarker(token, index), !isMarker(token, index - 3) { return false }
        index += 1
      }
      // A marker in one of the first three bytes but the first follows a shorter character.
      for index in 1..<3 where index + 3 <= token.count && isMarker(token, index) { return false }
    }
    return true
  }

  @inline(__always)
  private static func isMarker(_ bytes: Bytes, _ index: Int) -> Bool {
    bytes[index] == 0xE2 && bytes[index + 1] == 0x96 && bytes[index + 2] == 0x81
  }

  /// Memory that encoding reuses from word to word.
  struct Scratch: Sendable {
    fileprivate var symbols: [TokenIndex] = []
    fileprivate var values: [UInt64] = []
    fileprivate var next: [Int32] = []
    fileprivate var previous: [Int32] = []
    fileprivate var heap: [UInt64] = []
    fileprivate var unit: [UInt8] = []
    fileprivate var cache = WordCache()
  }

  /// Words of up to this many symbols are merged by scanning.
  private static let scanLimit = 48

  /// Appends the ids of one piece of text.
  func encode(_ piece: Bytes, into ids: inout [TokenID], scratch: inout Scratch) throws(EngineError) {
    guard let base = piece.baseAddress, piece.count > 0 else { return }
    if options.unitsAreBytes, piece.count == 1 {
      ids.append(byteTokens[Int(base[0])])
      return
    }
    if cutsAtMarker, piece.count > 3 {
      if options.ignoreMerges {
        let id = vocabulary.id(base, piece.count)
        if id >= 0 {
          ids.append(id)
          return
        }
      }
      var start = 0
      var index = 1
      while index + 3 <= piece.count {
        if piece[index] == 0xE2, Self.isMarker(piece, index), !(index >= 3 && Self.isMarker(piece, index - 3)) {
          try encodeWord(Bytes(start: base + start, count: index - start), into: &ids, scratch: &scratch)
          start = index
          index += 3
        } else {
          index += 1
        }
      }
      return try encodeWord(Bytes(start: base + start, count: piece.count - start), into: &ids, scratch: &scratch)
    }
    try encodeWord(piece, into: &ids, scratch: &scratch)
  }

  private func encodeWord(_ piece: Bytes, into ids: inout [TokenID], scratch: inout Scratch) throws(EngineError) {
    let base = piece.baseAddress!
    let key = WordCache.Key(base, piece.count)
    if let key, scratch.cache.append(key, to: &ids) { return }
    let start = ids.count
    if options.ignoreMerges, !cutsAtMarker {
      let id = vocabulary.id(base, piece.count)
      if id >= 0 {
        ids.append(id)
        if let key { scratch.cache.insert(key, ids, from: start) }
        return
      }
    }
    scratch.symbols.removeAll(keepingCapacity: true)
    if options.unitsAreBytes {
      byteTokens.withUnsafeBufferPointer { tokens in
        for byte in piece { scratch.symbols.append(TokenIndex(bitPattern: tokens[Int(byte)])) }
      }
    } else {
      try appendCharacters(piece, scratch: &scratch)
    }
    merge(piece, into: &ids, scratch: &scratch)
    if let key { scratch.cache.insert(key, ids, from: start) }
  }

  /// Fills `scratch.symbols` with one token per character, or its byte tokens, or the unknown token.
  private func appendCharacters(_ piece: Bytes, scratch: inout Scratch) throws(EngineError) {
    let base = piece.baseAddress!
    var index = 0
    // An unknown token is held back until a known character, another unknown one or the end follows, and byte tokens do
    // not release it: so does `tokenizers`, and the order of the result depends on it.
    var pending: TokenID?
    while index < piece.count {
      if let fixed, let found = fixed.longestPrefix(Bytes(start: base + index, count: piece.count - index)) {
        if let unknown = pending {
          scratch.symbols.append(TokenIndex(bitPattern: unknown))
          pending = nil
        }
        scratch.symbols.append(TokenIndex(bitPattern: found.id))
        index += found.length
        continue
      }
      let length = Swift.min(sequenceLength(base[index]), piece.count - index)
      var id: TokenID
      if hasAffixes {
        scratch.unit.removeAll(keepingCapacity: true)
        if index > 0 { scratch.unit.append(contentsOf: options.continuingPrefix) }
        scratch.unit.append(bytes: Bytes(start: base + index, count: length))
        if index + length == piece.count { scratch.unit.append(contentsOf: options.wordSuffix) }
        id = scratch.unit.withUnsafeBufferPointer { vocabulary.id($0.baseAddress!, $0.count) }
      } else if length == 1 {
        id = asciiTokens[Int(base[index] & 0x7F)]
      } else {
        id = vocabulary.id(base + index, length)
      }
      if id >= 0 {
        if let unknown = pending {
          scratch.symbols.append(TokenIndex(bitPattern: unknown))
          pending = nil
        }
        scratch.symbols.append(TokenIndex(bitPattern: id))
      } else if !appendByteTokens(Bytes(start: base + index, count: length), scratch: &scratch) {
        if let missing = options.missingUnknown {
          throw EngineError(
            .invalidCheckpoint, "The tokenizer's unknown token \"\(missing)\" is not in its vocabulary")
        }
        // Without an unknown token the character is dropped.
        if let unknown = options.unknown {
          if let held = pending, !options.fuseUnknown { scratch.symbols.append(TokenIndex(bitPattern: held)) }
          pending = unknown
        }
      }
      index += length
    }
    if let unknown = pending { scratch.symbols.append(TokenIndex(bitPattern: unknown)) }
  }

  /// Appends the byte tokens of a character, if the model falls back to bytes and has them all.
  private func appendByteTokens(_ character: Bytes, scratch: inout Scratch) -> Bool {
    guard options.byteFallback else { return false }
    if hasAffixes {
      for byte in scratch.unit where byteTokens[Int(byte)] < 0 { return false }
      for byte in scratch.unit { scratch.symbols.append(TokenIndex(bitPattern: byteTokens[Int(byte)])) }
    } else {
      for byte in character where byteTokens[Int(byte)] < 0 { return false }
      for byte in character { scratch.symbols.append(TokenIndex(bitPattern: byteTokens[Int(byte)])) }
    }
    return true
  }

  /// Merges `scratch.symbols` and appends what remains.
  private func merge(_ piece: Bytes, into ids: inout [TokenID], scratch: inout Scratch) {
    let count = scratch.symbols.count
    if count <= 1 {
      if count == 1 { ids.append(TokenID(bitPattern: scratch.symbols[0])) }
      return
    }
    // Values of the pairs at hand.
    scratch.values.removeAll(keepingCapacity: true)
    scratch.symbols.withUnsafeBufferPointer { symbols in
      if options.unitsAreBytes {
        bytePairs.withUnsafeBufferPointer { pairs in
          for index in 0..<(count - 1) {
            scratch.values.append(pairs[Int(piece[index]) << 8 | Int(piece[index + 1])])
          }
        }
      } else {
        for index in 0..<(count - 1) { scratch.values.append(merges.value(symbols[index], symbols[index + 1])) }
      }
    }
    scratch.values.append(.max)
    if count <= Self.scanLimit {
      mergeByScanning(count, into: &ids, scratch: &scratch)
    } else {
      mergeByHeap(count, into: &ids, scratch: &scratch)
    }
  }

  private func mergeByScanning(_ initial: Int, into ids: inout [TokenID], scratch: inout Scratch) {
    scratch.symbols.withUnsafeMutableBufferPointer { symbols in
      scratch.values.withUnsafeMutableBufferPointer { values in
        var count = initial
        while count > 1 {
          var best = 0
          var bestValue = values[0]
          // Equal ranks merge left to right: the id in the lower half is the same then, so whole words can be compared.
          for index in 1..<count where values[index] < bestValue {
            best = index
            bestValue = values[index]
          }
          if bestValue == .max { break }
          symbols[best] = TokenIndex(truncatingIfNeeded: bestValue)
          count -= 1
          let moved = count - best - 1
          if moved > 0 {
            (symbols.baseAddress! + best + 1).update(from: symbols.baseAddress! + best + 2, count: moved)
            (values.baseAddress! + best).update(from: values.baseAddress! + best + 1, count: moved)
            values[best] = merges.value(symbols[best], symbols[best + 1])
          }
          values[count - 1] = .max
          if best > 0 { values[best - 1] = merges.value(symbols[best - 1], symbols[best]) }
        }
        for index in 0..<count { ids.append(TokenID(bitPattern: symbols[index])) }
      }
    }
  }

  private func mergeByHeap(_ count: Int, into ids: inout [TokenID], scratch: inout Scratch) {
    scratch.next.removeAll(keepingCapacity: true)
    scratch.previous.removeAll(keepingCapacity: true)
    scratch.heap.removeAll(keepingCapacity: true)
    for index in 0..<count {
      scratch.next.append(Int32(truncatingIfNeeded: index + 1))
      scratch.previous.append(Int32(truncatingIfNeeded: index - 1))
      let value = scratch.values[index]
      if value != .max { scratch.heap.append(value & 0xFFFF_FFFF_0000_0000 | UInt64(index)) }
    }
    scratch.symbols.withUnsafeMutableBufferPointer { symbols in
      scratch.values.withUnsafeMutableBufferPointer { values in
        scratch.next.withUnsafeMutableBufferPointer { next in
          scratch.previous.withUnsafeMutableBufferPointer { previous in
            // The heap orders by rank, then by position. An entry is stale when the pair at its position has another
            // rank now; the position of a symbol merged into its left neighbour has no pair (all ones).
            var heap = MinimumHeap(scratch.heap)
            while let entry = heap.popMinimum() {
              let position = Int(entry & 0xFFFF_FFFF)
              let value = values[position]
              guard value != .max, value >> 32 == entry >> 32 else { continue }
              let right = Int(next[position])
              symbols[position] = TokenIndex(truncatingIfNeeded: value)
              values[right] = .max
              let after = Int(next[right])
              next[position] = Int32(truncatingIfNeeded: after)
              if after < count {
                previous[after] = Int32(truncatingIfNeeded: position)
                let merged = merges.value(symbols[position], symbols[after])
                values[position] = merged
                if merged != .max { heap.insert(merged & 0xFFFF_FFFF_0000_0000 | UInt64(position)) }
              } else {
                values[position] = .max
              }
              let before = Int(previous[position])
              if before >= 0 {
                let merged = merges.value(symbols[before], symbols[position])
                values[before] = merged
                if merged != .max { heap.insert(merged & 0xFFFF_FFFF_0000_0000 | UInt64(before)) }
              }
            }
            scratch.heap = heap.release()
            var index = 0
            while index < count {
              ids.append(TokenID(bitPattern: symbols[index]))
              index = Int(next[index])
            }
          }
        }
      }
    }
  }
}

/// A binary heap of words, least first.
struct MinimumHeap {
  private var storage: [UInt64]

  /// Makes a heap of the elements given, in linear time.
  init(_ elements: consuming [UInt64]) {
    storage = elements
    var index = storage.count / 2 - 1
    while index >= 0 {
      siftDown(index)
      index -= 1
    }
  }

  /// Gives back the memory.
  consuming func release() -> [UInt64] { storage }

  mutating func insert(_ element: UInt64) {
    storage.append(element)
    storage.withUnsafeMutableBufferPointer { heap in
      var child = heap.count - 1
      while child > 0 {
        let parent = (child - 1) / 2
        if heap[parent] <= element { break }
        heap[child] = heap[parent]
        child = parent
      }
      heap[child] = element
    }
  }

  mutating func popMinimum() -> UInt64? {
    guard let last = storage.popLast() else { return nil }
    if storage.isEmpty { return last }
    let minimum = storage[0]
    storage[0] = last
    siftDown(0)
    return minimum
  }

  private mutating func siftDown(_ start: Int) {
    storage.withUnsafeMutableBufferPointer { heap in
      let element = heap[start]
      var parent = start
      while true {
        var child = parent * 2 + 1
        if child >= heap.count { break }
        if child + 1 < heap.count, heap[child + 1] < heap[child] { child += 1 }
        if heap[child] >= element { break }
        heap[parent] = heap[child]
        parent = child
      }
      heap[parent] = element
    }
  }
}

/// Recent words and their ids: a direct-mapped table whose entries take one or two cache lines. Encoding state owns one, so
/// there is no locking.
struct WordCache: Sendable {
  /// The bytes of a word, padded with zeros.
  struct Key {
    fileprivate var first: UInt64
    fileprivate var second: UInt64
    fileprivate var third: UInt64
    fileprivate var length: UInt32

    static let longest = 24

    /// Makes a key, or `nil` for a word that is too long.
    @inline(__always)
    init?(_ pointer: UnsafePointer<UInt8>, _ count: Int) {
      guard count <= Self.longest else { return nil }
      length = UInt32(truncatingIfNeeded: count)
      (first, second, third) = (0, 0, 0)
      if count < 8 {
        first = loadTail(pointer, count)
        return
      }
      first = load64(pointer)
      if count < 16 {
        second = loadTail(pointer + 8, count - 8)
        return
      }
      second = load64(pointer + 8)
      third = count == Self.longest ? load64(pointer + 16) : loadTail(pointer + 16, count - 16)
    }

    @inline(__always)
    fileprivate var slot: Int {
      let hash = mixHash(first ^ 0x9E37_79B9_7F4A_7C15, second ^ 0xA076_1D64_78BD_642F)
      return Int(truncatingIfNeeded: mixHash(hash ^ third, UInt64(length) ^ 0xE703_7ED1_A0B4_28DB))
        & (WordCache.size - 1)
    }
  }

  private struct Entry {
    var first: UInt64 = 0
    var second: UInt64 = 0
    var third: UInt64 = 0
    /// Zero for an empty entry.
    var length: UInt32 = 0
    var count: UInt32 = 0
    var ids: SIMD8<TokenID> = .zero
  }

  fileprivate static let size = 1 << 14
  private var entries: [Entry] = []

  /// Appends the ids of a word, if they are known.
  @inline(__always)
  func append(_ key: Key, to ids: inout [TokenID]) -> Bool {
    guard !entries.isEmpty else { return false }
    return entries.withUnsafeBufferPointer { entries in
      let entry = entries.baseAddress! + key.slot
      guard entry.pointee.first == key.first, entry.pointee.second == key.second, entry.pointee.third == key.third,
        entry.pointee.length == key.length
      else { return false }
      for index in 0..<Int(entry.pointee.count) { ids.append(entry.pointee.ids[index]) }
      return true
    }
  }

  /// Remembers the ids from `start` on, unless they are too many.
  @inline(__always)
  mutating func insert(_ key: Key, _ ids: [TokenID], from start: Int) {
    let count = ids.count - start
    guard count <= 8 else { return }
    if entries.isEmpty { entries = [Entry](repeating: Entry(), count: Self.size) }
    var entry = Entry(
      first: key.first, second: key.second, third: key.third, length: key.length,
      count: UInt32(truncatingIfNeeded: count))
    for index in 0..<count { entry.ids[index] = ids[start + index] }
    entries[key.slot] = entry
  }
}
