import ApusCore

/// A rewriting of the text before it is cut into words.
indirect enum Normalizer: Sendable {
  case sequence([Normalizer])
  /// Puts a text before one that is not empty.
  case prepend([UInt8])
  /// Replaces every occurrence of a string.
  case replace(pattern: [UInt8], content: [UInt8])
  /// Replaces every match of a pattern.
  case replaceMatches(Pattern, content: [UInt8])
  /// Writes every byte as its character of the byte-level alphabet.
  case byteLevel
  case form(NormalizationForm)
  /// What SentencePiece's `nmt_*` rules do to control characters and odd spaces.
  case nmt
  /// SentencePiece's compiled character map.
  case precompiled(CharacterMap)
  /// What SentencePiece does to spaces after its character map: drop them at the ends and collapse runs, put one before
  /// the text, and write them as U+2581.
  case sentencePieceSpaces(collapses: Bool, adds: Bool, atEnd: Bool, escapes: Bool)
  /// Drops white space at the ends.
  case strip(left: Bool, right: Bool)
  case stripAccents
  case lowercase
  case bert(cleansText: Bool, spacesChinese: Bool, stripsAccents: Bool, lowercases: Bool)

  /// Rewrites a text.
  ///
  /// `start` keeps account of whether the first character left is still the first of the original text; a later step that
  /// treats the beginning in its own way asks for that.
  func apply(to text: inout [UInt8], start: inout TextStart) throws(EngineError) {
    switch self {
    case .sequence(let steps):
      for step in steps { try step.apply(to: &text, start: &start) }
    case .prepend(let prefix):
      if !text.isEmpty {
        text.insert(contentsOf: prefix, at: 0)
        start.insert(scalarCount(prefix))
      }
    case .replace(let pattern, let content):
      if !pattern.isEmpty, text.starts(with: pattern) {
        start.replace(scalarCount(pattern), with: scalarCount(content))
      }
      text = replacing(text, pattern, with: content)
    case .replaceMatches(let pattern, let content):
      var result: [UInt8] = []
      var copied = 0
      var replaced = 0
      try text.withUnsafeBufferPointer { (bytes) throws(EngineError) in
        try pattern.matches(in: bytes) { start, end in
          result.append(bytes: Bytes(rebasing: bytes[copied..<start]))
          result.append(contentsOf: content)
          if start == 0 { replaced = end }
          copied = end
        }
        result.append(bytes: Bytes(rebasing: bytes[copied...]))
      }
      if replaced > 0 { start.replace(scalarCount(text[..<replaced]), with: scalarCount(content)) }
      text = result
    case .byteLevel:
      var result: [UInt8] = []
      result.reserveCapacity(text.count * 2)
      text.withUnsafeBufferPointer { ByteAlphabet.encode($0, to: &result) }
      text = result
    case .form(let form): form.apply(to: &text)
    case .nmt:
      Self.rewrite(&text, &start) { scalar, result in
        if ScalarSets.nmtRemoved.contains(scalar) { return }
        appendScalar(ScalarSets.nmtSpaces.contains(scalar) ? 0x20 : scalar, to: &result)
      }
    case .precompiled(let map): map.apply(to: &text)
    case .sentencePieceSpaces(let collapses, let adds, let atEnd, let escapes):
      Self.space(&text, collapses: collapses, adds: adds, atEnd: atEnd, escapes: escapes)
    case .strip(let left, let right):
      Self.strip(&text, left: left, right: right, start: &start)
    case .stripAccents:
      Self.remove(ScalarSets.accents, from: &text, &start)
    case .lowercase: Self.lowercase(&text)
    case .bert(let cleansText, let spacesChinese, let stripsAccents, let lowercases):
      if cleansText {
        Self.rewrite(&text, &start) { scalar, result in
          if ScalarSets.bertRemoved.contains(scalar) { return }
          appendScalar(ScalarSets.bertSpaces.contains(scalar) ? 0x20 : scalar, to: &result)
        }
      }
      if spacesChinese, text.contains(where: { $0 >= 0xE3 }) {
        Self.rewrite(&text, &start) { scalar, result in
          let isChinese = ScalarSets.bertChinese.contains(scalar)
          if isChinese { result.append(0x20) }
          appendScalar(scalar, to: &result)
          if isChinese { result.append(0x20) }
        }
      }
      if stripsAccents {
        NormalizationForm.nfd.apply(to: &text)
        Self.remove(ScalarSets.bertAccents, from: &text, &start)
      }
      if lowercases { Self.lowercase(&text) }
    }
  }

  private static func space(_ text: inout [UInt8], collapses: Bool, adds: Bool, atEnd: Bool, escapes: Bool) {
    var result: [UInt8] = []
    result.reserveCapacity(text.count + text.count / 2 + 3)
    let space: [UInt8] = escapes ? [0xE2, 0x96, 0x81] : [0x20]
    var end = text.count
    var index = 0
    if collapses {
      while end > 0, text[end - 1] == 0x20 { end -= 1 }
      while index < end, text[index] == 0x20 { index += 1 }
    }
    let adds = adds && index < end
    if adds, !atEnd { result.append(contentsOf: space) }
    var previousIsSpace = false
    while index < end {
      let isSpace = text[index] == 0x20
      if isSpace {
        if !(collapses && previousIsSpace) { result.append(contentsOf: space) }
      } else {
        result.append(text[index])
      }
      previousIsSpace = isSpace
      index += 1
    }
    // SentencePiece looks at what it wrote, so that a U+2581 of the text itself counts as a space at the end.
    if collapses {
      while !result.isEmpty, result.suffix(space.count).elementsEqual(space) { result.removeLast(space.count) }
    }
    if adds, atEnd { result.append(contentsOf: space) }
    text = result
  }

  private static func isASCII(_ text: [UInt8]) -> Bool { text.allSatisfy { $0 < 0x80 } }

  /// Rewrites scalar by scalar.
  private static func rewrite(
    _ text: inout [UInt8], _ textStart: inout TextStart, _ body: (UInt32, inout [UInt8]) -> Void
  ) {
    var result: [UInt8] = []
    result.reserveCapacity(text.count)
    text.withUnsafeBufferPointer { bytes in
      guard let base = bytes.baseAddress else { return }
      var index = 0
      while index < bytes.count {
        let (scalar, length) = decodeScalar(base, index)
        body(scalar, &result)
        if result.isEmpty { textStart.drop(1) }
        index += length
      }
    }
    text = result
  }

  private static func remove(_ set: ScalarSet, from text: inout [UInt8], _ textStart: inout TextStart) {
    if isASCII(text) { return }
    rewrite(&text, &textStart) { scalar, result in
      if !set.contains(scalar) { appendScalar(scalar, to: &result) }
    }
  }

  private static func lowercase(_ text: inout [UInt8]) {
    if isASCII(text) {
      for index in text.indices where text[index] &- 0x41 < 26 { text[index] |= 0x20 }
      return
    }
    let map = ScalarSets.lowercase
    var unmoved = TextStart()
    rewrite(&text, &unmoved) { scalar, result in
      if scalar < 0x80 {
        result.append(scalar &- 0x41 < 26 ? UInt8(scalar) | 0x20 : UInt8(scalar))
      } else if let lower = map[scalar] {
        result.append(contentsOf: lower)
      } else {
        appendScalar(scalar, to: &result)
      }
    }
  }

  private static func strip(_ text: inout [UInt8], left: Bool, right: Bool, start textStart: inout TextStart) {
    var start = 0
    var end = text.count
    text.withUnsafeBufferPointer { bytes in
      guard let base = bytes.baseAddress else { return }
      while left, start < end {
        let (scalar, length) = decodeScalar(base, start)
        guard UnicodeTables.shared.isWhiteSpace(scalar) else { break }
        start += length
      }
      while right, end > start {
        let previous = previousScalarStart(base, end)
        guard UnicodeTables.shared.isWhiteSpace(decodeScalar(base, previous).scalar) else { break }
        end = previous
      }
    }
    if start > 0 { textStart.drop(scalarCount(text[..<start])) }
    if start > 0 || end < text.count { text = Array(text[start..<end]) }
  }
}

/// How many of the first characters of a text that is being rewritten stand where the original text begins.
///
/// `tokenizers` aligns every character with the original text: one that replaces others stands where the last of those did,
/// one put before the text stands where its first does. A text whose first character stands elsewhere does not begin where
/// the original does.
struct TextStart {
  private var leading = 1

  /// Whether the text begins with something else than the original.
  var isMoved: Bool { leading == 0 }

  /// Characters were put before the text.
  mutating func insert(_ count: Int) { if leading > 0 { leading += count } }

  /// The first characters were taken away.
  mutating func drop(_ count: Int) { leading = Swift.max(0, leading - count) }

  /// The first characters were replaced by so many others.
  mutating func replace(_ count: Int, with others: Int) {
    leading = count <= leading ? leading - count + others : 0
  }
}

/// The number of characters in well-formed UTF-8.
private func scalarCount(_ bytes: some Sequence<UInt8>) -> Int {
  bytes.reduce(0) { $0 + ($1 & 0xC0 == 0x80 ? 0 : 1) }
}

/// SentencePiece's compiled character map: a double-array trie from byte strings to replacements.
struct CharacterMap: Sendable {
  private let units: [UInt32]
  private let replacements: [UInt8]
  /// Whether the longest match at each place is replaced, as SentencePiece does, and not clusters and characters.
  private let takesLongest: Bool
  /// Texts that are left as they are.
  private let spares: TokenTrie?

  /// Reads the binary form: the size of the trie in bytes, the trie, then replacements that end in zero bytes.
  init(_ blob: [UInt8], takesLongest: Bool = false, spares: TokenTrie? = nil) throws(EngineError) {
    self.takesLongest = takesLongest
    self.spares = spares
    func word(_ offset: Int) -> UInt32 {
      UInt32(blob[offset]) | UInt32(blob[offset + 1]) << 8 | UInt32(blob[offset + 2]) << 16
        | UInt32(blob[offset + 3]) << 24
    }
    guard blob.count >= 4 else {
      throw EngineError(.invalidCheckpoint, "The precompiled character map is too short")
    }
    let size = Int(word(0))
    guard size % 4 == 0, size >= 4, size <= blob.count - 4 else {
      throw EngineError(.invalidCheckpoint, "The precompiled character map states a wrong size")
    }
    units = (0..<(size / 4)).map { word(4 + $0 * 4) }
    replacements = Array(blob[(4 + size)...])
  }

  private static func offset(_ unit: UInt32) -> Int { Int((unit >> 10) << ((unit & 1 << 9) >> 6)) }

  /// The length and replacement of the shortest (or longest) prefix of `bytes` that the map knows, if any.
  private func match(_ bytes: Bytes, longest: Bool) -> (length: Int, replacement: ArraySlice<UInt8>)? {
    var position = Self.offset(units[0])
    var found: (length: Int, start: Int)?
    for (index, byte) in bytes.enumerated() {
      if byte == 0 { break }
      position ^= Int(byte)
      guard position < units.count else { break }
      let unit = units[position]
      guard unit & (1 << 31 | 0xFF) == UInt32(byte) else { break }
      position ^= Self.offset(unit)
      if unit >> 8 & 1 == 1 {
        guard position < units.count else { break }
        found = (index + 1, Int(units[position] & 0x7FFF_FFFF))
        if !longest { break }
      }
    }
    guard let found, found.start <= replacements.count else { return nil }
    let end = replacements[found.start...].firstIndex(of: 0) ?? replacements.count
    return (found.length, replacements[found.start..<end])
  }

  private func replacement(_ bytes: Bytes) -> ArraySlice<UInt8>? { match(bytes, longest: false)?.replacement }

  /// Rewrites a text: whole grapheme clusters of under six bytes where the map knows a prefix of them, else character by
  /// character, as the reference does.
  func apply(to text: inout [UInt8]) {
    var result: [UInt8] = []
    result.reserveCapacity(text.count)
    text.withUnsafeBufferPointer { bytes in
      guard let base = bytes.baseAddress else { return }
      var index = 0
      while takesLongest, index < bytes.count {
        if let spared = spares?.longestPrefix(Bytes(rebasing: bytes[index...])) {
          result.append(bytes: Bytes(rebasing: bytes[index..<(index + spared.length)]))
          index += spared.length
        } else if let match = match(Bytes(rebasing: bytes[index...]), longest: true) {
          result.append(contentsOf: match.replacement)
          index += match.length
        } else {
          let length = sequenceLength(base[index])
          result.append(bytes: Bytes(rebasing: bytes[index..<(index + length)]))
          index += length
        }
      }
      while index < bytes.count {
        let end = Self.clusterEnd(bytes, index)
        if end - index < 6, let replacement = replacement(Bytes(rebasing: bytes[index..<end])) {
          result.append(contentsOf: replacement)
        } else {
          while index < end {
            let length = sequenceLength(base[index])
            let character = Bytes(rebasing: bytes[index..<(index + length)])
            if let replacement = replacement(character) {
              result.append(contentsOf: replacement)
            } else {
              result.append(bytes: character)
            }
            index += length
          }
        }
        index = end
      }
    }
    text = result
  }

  /// The end of the grapheme cluster at an index.
  private static func clusterEnd(_ bytes: Bytes, _ start: Int) -> Int {
    if bytes[start] < 0x80, start + 1 == bytes.count || bytes[start + 1] < 0x80 {
      return bytes[start] == 0x0D && start + 1 < bytes.count && bytes[start + 1] == 0x0A ? start + 2 : start + 1
    }
    // Look at enough text for any cluster that matters: those of six bytes and more are all treated alike, so a longer one
    // may be cut anywhere after that.
    var end = start
    while end < bytes.count, end - start < 64 { end += sequenceLength(bytes[end]) }
    let window = String(decoding: Bytes(rebasing: bytes[start..<end]), as: UTF8.self)
    return start + window[window.startIndex].utf8.count
  }
}
