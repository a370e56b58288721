/// A Python string: a sequence of Unicode code points, stored as UTF-8.
///
/// Swift's own strings compare by canonical equivalence and count grapheme clusters, both of which would differ from
/// what templates were written for. Here equality, order and hashing are by code point, which is byte order in UTF-8.
struct Text: Hashable, Comparable {
  /// Well-formed UTF-8.
  var bytes: [UInt8]
  /// Whether the text is markup (`safe`, `escape`): joined with other text, that other text is escaped.
  var isMarkup = false

  init(bytes: [UInt8], isMarkup: Bool = false) {
    self.bytes = bytes
    self.isMarkup = isMarkup
  }

  init(_ string: String, isMarkup: Bool = false) {
    self.bytes = Array(string.utf8)
    self.isMarkup = isMarkup
  }

  init(slice: ArraySlice<UInt8>, isMarkup: Bool = false) {
    self.bytes = Array(slice)
    self.isMarkup = isMarkup
  }

  init(scalar: Unicode.Scalar) {
    bytes = []
    appendUTF8(scalar, to: &bytes)
  }

  init(scalars: some Sequence<Unicode.Scalar>, isMarkup: Bool = false) {
    bytes = []
    self.isMarkup = isMarkup
    for scalar in scalars { appendUTF8(scalar, to: &bytes) }
  }

  static let empty = Text(bytes: [])

  static func == (left: Text, right: Text) -> Bool { left.bytes == right.bytes }

  func hash(into hasher: inout Hasher) {
    bytes.withUnsafeBytes { hasher.combine(bytes: $0) }
  }

  static func < (left: Text, right: Text) -> Bool { left.bytes.lexicographicallyPrecedes(right.bytes) }

  var string: String { String(decoding: bytes, as: UTF8.self) }
  var isEmpty: Bool { bytes.isEmpty }

  var isASCII: Bool {
    bytes.withUnsafeBufferPointer { buffer in
      var all: UInt8 = 0
      for byte in buffer { all |= byte }
      return all < 0x80
    }
  }

  /// The number of code points.
  var count: Int { codePointCount(bytes[...]) }

  /// The code points.
  var scalars: [Unicode.Scalar] {
    var result: [Unicode.Scalar] = []
    result.reserveCapacity(bytes.count)
    var index = 0
    while index < bytes.count {
      let (scalar, length) = decodeScalar(bytes, at: index)
      result.append(scalar)
      index += length
    }
    return result
  }

  /// One text per code point.
  var characters: [Text] {
    if isASCII { return bytes.map { Text(bytes: [$0], isMarkup: isMarkup) } }
    var result: [Text] = []
    var index = 0
    while index < bytes.count {
      let length = sequenceLength(bytes[index])
      result.append(Text(slice: bytes[index..<index + length], isMarkup: isMarkup))
      index += length
    }
    return result
  }

  /// The byte offset of the code point with the given number; the end for numbers past it.
  func byteOffset(ofCodePoint number: Int) -> Int {
    var seen = 0
    var index = 0
    while index < bytes.count {
      if seen == number { return index }
      index += sequenceLength(bytes[index])
      seen += 1
    }
    return bytes.count
  }
}

/// The number of code points in well-formed UTF-8.
func codePointCount(_ bytes: ArraySlice<UInt8>) -> Int {
  bytes.withUnsafeBufferPointer { buffer in
    var count = 0
    for byte in buffer where byte & 0xC0 != 0x80 { count &+= 1 }
    return count
  }
}

/// The code point at a byte offset of well-formed UTF-8, and its length.
func decodeScalar(_ bytes: [UInt8], at index: Int) -> (Unicode.Scalar, Int) {
  let first = bytes[index]
  if first < 0x80 { return (Unicode.Scalar(first), 1) }
  let length = sequenceLength(first)
  guard index + length <= bytes.count else { return ("\u{FFFD}", bytes.count - index) }
  var value = UInt32(first) & (length == 2 ? 0x1F : length == 3 ? 0x0F : 0x07)
  for offset in 1..<length { value = value << 6 | UInt32(bytes[index + offset] & 0x3F) }
  return (Unicode.Scalar(value) ?? "\u{FFFD}", length)
}

/// Appends a code point as UTF-8.
func appendUTF8(_ scalar: Unicode.Scalar, to bytes: inout [UInt8]) {
  let value = scalar.value
  switch value {
  case 0..<0x80: bytes.append(UInt8(value))
  case 0x80..<0x800:
    bytes.append(UInt8(0xC0 | value >> 6))
    bytes.append(UInt8(0x80 | value & 0x3F))
  case 0x800..<0x10000:
    bytes.append(UInt8(0xE0 | value >> 12))
    bytes.append(UInt8(0x80 | value >> 6 & 0x3F))
    bytes.append(UInt8(0x80 | value & 0x3F))
  default:
    bytes.append(UInt8(0xF0 | value >> 18))
    bytes.append(UInt8(0x80 | value >> 12 & 0x3F))
    bytes.append(UInt8(0x80 | value >> 6 & 0x3F))
    bytes.append(UInt8(0x80 | value & 0x3F))
  }
}

/// Whether Python's `str.isspace` holds for a code point: what `strip` and `split` take for white space.
func isPythonSpace(_ scalar: Unicode.Scalar) -> Bool {
  switch scalar.value {
  case 0x09...0x0D, 0x1C...0x20, 0x85, 0xA0, 0x1680, 0x2000...0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000: true
  default: false
  }
}

/// The offset of the first occurrence of `needle` in `haystack[from..<to]`, or `nil`. An empty needle is found at once.
func firstRange(of needle: [UInt8], in haystack: [UInt8], from: Int = 0, to: Int? = nil) -> Int? {
  let end = to ?? haystack.count
  let count = needle.count
  if count == 0 { return from <= end ? from : nil }
  guard end - from >= count else { return nil }
  return haystack.withUnsafeBufferPointer { hay in
    needle.withUnsafeBufferPointer { pin in
      let first = pin[0]
      var index = from
      let last = end - count
      while index <= last {
        if hay[index] == first {
          var offset = 1
          while offset < count && hay[index &+ offset] == pin[offset] { offset &+= 1 }
          if offset == count { return index }
        }
        index &+= 1
      }
      return nil
    }
  }
}

/// The offset of the last occurrence of `needle` in `haystack[from..<to]`, or `nil`.
func lastRange(of needle: [UInt8], in haystack: [UInt8], from: Int = 0, to: Int? = nil) -> Int? {
  let end = to ?? haystack.count
  let count = needle.count
  guard end - from >= count else { return nil }
  var index = end - count
  while index >= from {
    if haystack[index..<index + count].elementsEqual(needle) { return index }
    index -= 1
  }
  return nil
}

extension Text {
  /// `str.strip` and its one-sided forms: without `characters` white space is stripped.
  func stripped(_ characters: Text? = nil, left: Bool = true, right: Bool = true) -> Text {
    var start = 0
    var end = bytes.count
    if let characters {
      let set = Set(characters.scalars)
      if left {
        while start < end {
          let (scalar, length) = decodeScalar(bytes, at: start)
          guard set.contains(scalar) else { break }
          start += length
        }
      }
      if right {
        while end > start {
          let previous = previousBoundary(end)
          guard set.contains(decodeScalar(bytes, at: previous).0) else { break }
          end = previous
        }
      }
    } else {
      if left {
        while start < end {
          let (scalar, length) = decodeScalar(bytes, at: start)
          guard isPythonSpace(scalar) else { break }
          start += length
        }
      }
      if right {
        while end > start {
          let previous = previousBoundary(end)
          guard isPythonSpace(decodeScalar(bytes, at: previous).0) else { break }
          end = previous
        }
      }
    }
    if start == 0 && end == bytes.count { return self }
    return Text(slice: bytes[start..<end], isMarkup: isMarkup)
  }

  private func previousBoundary(_ end: Int) -> Int {
    var index = end - 1
    while index > 0 && bytes[index] & 0xC0 == 0x80 { index -= 1 }
    return index
  }

  func hasPrefix(_ other: Text) -> Bool { bytes.starts(with: other.bytes) }

  func hasSuffix(_ other: Text) -> Bool {
    bytes.count >= other.bytes.count && bytes[(bytes.count - other.bytes.count)...].elementsEqual(other.bytes)
  }

  func contains(_ other: Text) -> Bool { firstRange(of: other.bytes, in: bytes) != nil }

  /// `str.replace`; a negative limit replaces all.
  func replacing(_ old: Text, with new: Text, limit: Int = -1) -> Text {
    var result: [UInt8] = []
    var remaining = limit < 0 ? Int.max : limit
    if remaining == 0 { return self }
    result.reserveCapacity(bytes.count)
    if old.isEmpty {
      var index = 0
      while remaining > 0 {
        result.append(contentsOf: new.bytes)
        remaining -= 1
        guard index < bytes.count else { return Text(bytes: result, isMarkup: isMarkup) }
        let length = sequenceLength(bytes[index])
        result.append(contentsOf: bytes[index..<index + length])
        index += length
      }
      result.append(contentsOf: bytes[index...])
      return Text(bytes: result, isMarkup: isMarkup)
    }
    var index = 0
    while remaining > 0, let found = firstRange(of: old.bytes, in: bytes, from: index) {
      result.append(contentsOf: bytes[index..<found])
      result.append(contentsOf: new.bytes)
      index = found + old.bytes.count
      remaining -= 1
    }
    if index == 0 { return self }
    result.append(contentsOf: bytes[index...])
    return Text(bytes: result, isMarkup: isMarkup)
  }

  /// `str.split(separator, limit)`.
  func split(_ separator: Text, limit: Int) -> [Text] {
    var parts: [Text] = []
    var remaining = limit < 0 ? Int.max : limit
    var index = 0
    while remaining > 0, let found = firstRange(of: separator.bytes, in: bytes, from: index) {
      parts.append(Text(slice: bytes[index..<found], isMarkup: isMarkup))
      index = found + separator.bytes.count
      remaining -= 1
    }
    parts.append(Text(slice: bytes[index...], isMarkup: isMarkup))
    return parts
  }

  /// `str.rsplit(separator, limit)`.
  func splitFromRight(_ separator: Text, limit: Int) -> [Text] {
    var parts: [Text] = []
    var remaining = limit < 0 ? Int.max : limit
    var end = bytes.count
    while remaining > 0, let found = lastRange(of: separator.bytes, in: bytes, to: end) {
      parts.append(Text(slice: bytes[(found + separator.bytes.count)..<end], isMarkup: isMarkup))
      end = found
      remaining -= 1
    }
    parts.append(Text(slice: bytes[..<end], isMarkup: isMarkup))
    return parts.reversed()
  }

  /// `str.split(None, limit)`: runs of white space separate.
  func splitOnSpace(limit: Int) -> [Text] {
    var parts: [Text] = []
    var remaining = limit < 0 ? Int.max : limit
    var index = 0
    while true {
      while index < bytes.count {
        let (scalar, length) = decodeScalar(bytes, at: index)
        guard isPythonSpace(scalar) else { break }
        index += length
      }
      guard index < bytes.count else { return parts }
      if remaining == 0 {
        // The rest keeps the white space at its end.
        parts.append(Text(slice: bytes[index...], isMarkup: isMarkup))
        return parts
      }
      let start = index
      while index < bytes.count {
        let (scalar, length) = decodeScalar(bytes, at: index)
        if isPythonSpace(scalar) { break }
        index += length
      }
      parts.append(Text(slice: bytes[start..<index], isMarkup: isMarkup))
      remaining -= 1
    }
  }

  /// `str.rsplit(None, limit)`.
  func splitOnSpaceFromRight(limit: Int) -> [Text] {
    let reversedParts = Text(scalars: scalars.reversed()).splitOnSpace(limit: limit)
    return reversedParts.reversed().map { Text(scalars: $0.scalars.reversed(), isMarkup: isMarkup) }
  }

  /// `str.splitlines`.
  func lines(keepEnds: Bool = false) -> [Text] {
    var result: [Text] = []
    var start = 0
    var index = 0
    while index < bytes.count {
      let (scalar, length) = decodeScalar(bytes, at: index)
      var end = index + length
      switch scalar.value {
      case 0x0A...0x0D, 0x1C...0x1E, 0x85, 0x2028, 0x2029:
        if scalar.value == 0x0D && end < bytes.count && bytes[end] == 0x0A { end += 1 }
        result.append(Text(slice: bytes[start..<(keepEnds ? end : index)], isMarkup: isMarkup))
        start = end
      default: break
      }
      index = end
    }
    if start < bytes.count { result.append(Text(slice: bytes[start...], isMarkup: isMarkup)) }
    return result
  }

  // MARK: Case

  func uppercased() -> Text {
    if isASCII { return Text(bytes: bytes.map { $0 >= 0x61 && $0 <= 0x7A ? $0 - 32 : $0 }, isMarkup: isMarkup) }
    var result: [UInt8] = []
    for scalar in scalars { result.append(contentsOf: scalar.properties.uppercaseMapping.utf8) }
    return Text(bytes: result, isMarkup: isMarkup)
  }

  func lowercased() -> Text {
    if isASCII { return Text(bytes: bytes.map { $0 >= 0x41 && $0 <= 0x5A ? $0 + 32 : $0 }, isMarkup: isMarkup) }
    let all = scalars
    var result: [UInt8] = []
    for index in all.indices { Text.appendLower(all, index, to: &result) }
    return Text(bytes: result, isMarkup: isMarkup)
  }

  /// Appends the lower case of one code point. Sigma has a form for the end of a word, as Unicode and Python have it.
  private static func appendLower(_ all: [Unicode.Scalar], _ index: Int, to result: inout [UInt8]) {
    if all[index].value == 0x3A3 {
      var before = index - 1
      while before >= 0 && all[before].properties.isCaseIgnorable { before -= 1 }
      var after = index + 1
      while after < all.count && all[after].properties.isCaseIgnorable { after += 1 }
      let isFinal =
        before >= 0 && all[before].properties.isCased && !(after < all.count && all[after].properties.isCased)
      appendUTF8(isFinal ? "\u{3C2}" : "\u{3C3}", to: &result)
    } else {
      result.append(contentsOf: all[index].properties.lowercaseMapping.utf8)
    }
  }

  /// `str.capitalize`.
  func capitalized() -> Text {
    let all = scalars
    var result: [UInt8] = []
    for index in all.indices {
      if index == 0 {
        result.append(contentsOf: all[0].properties.titlecaseMapping.utf8)
      } else {
        Text.appendLower(all, index, to: &result)
      }
    }
    return Text(bytes: result, isMarkup: isMarkup)
  }

  /// `str.title`: a letter after a letter becomes lower case, any other title case.
  func titlecased() -> Text {
    let all = scalars
    var result: [UInt8] = []
    var previousIsCased = false
    for index in all.indices {
      if previousIsCased {
        Text.appendLower(all, index, to: &result)
      } else {
        result.append(contentsOf: all[index].properties.titlecaseMapping.utf8)
      }
      previousIsCased = all[index].properties.isCased
    }
    return Text(bytes: result, isMarkup: isMarkup)
  }

  /// `str.swapcase`.
  func caseSwapped() -> Text {
    let all = scalars
    var result: [UInt8] = []
    for index in all.indices {
      let properties = all[index].properties
      if properties.isUppercase {
        Text.appendLower(all, index, to: &result)
      } else if properties.isLowercase {
        result.append(contentsOf: properties.uppercaseMapping.utf8)
      } else {
        appendUTF8(all[index], to: &result)
      }
    }
    return Text(bytes: result, isMarkup: isMarkup)
  }

  var isLower: Bool {
    var cased = false
    for scalar in scalars {
      if scalar.properties.isUppercase || scalar.properties.generalCategory == .titlecaseLetter { return false }
      if scalar.properties.isLowercase { cased = true }
    }
    return cased
  }

  var isUpper: Bool {
    var cased = false
    for scalar in scalars {
      if scalar.properties.isLowercase || scalar.properties.generalCategory == .titlecaseLetter { return false }
      if scalar.properties.isUppercase { cased = true }
    }
    return cased
  }

  var isTitle: Bool {
    var cased = false
    var previousIsCased = false
    for scalar in scalars {
      if scalar.properties.isUppercase || scalar.properties.generalCategory == .titlecaseLetter {
        if previousIsCased { return false }
        previousIsCased = true
        cased = true
      } else if scalar.properties.isLowercase {
        if !previousIsCased { return false }
        cased = true
      } else {
        previousIsCased = false
      }
    }
    return cased
  }

  /// HTML escapes, as markupsafe writes them.
  func escapedForHTML() -> Text {
    if isMarkup { return self }
    var result: [UInt8] = []
    result.reserveCapacity(bytes.count)
    for byte in bytes {
      switch byte {
      case UInt8(ascii: "&"): result.append(contentsOf: "&amp;".utf8)
      case UInt8(ascii: "<"): result.append(contentsOf: "&lt;".utf8)
      case UInt8(ascii: ">"): result.append(contentsOf: "&gt;".utf8)
      case UInt8(ascii: "'"): result.append(contentsOf: "&#39;".utf8)
      case UInt8(ascii: "\""): result.append(contentsOf: "&#34;".utf8)
      default: result.append(byte)
      }
    }
    return Text(bytes: result, isMarkup: true)
  }

  /// The plain text of markup.
  var plain: Text { isMarkup ? Text(bytes: bytes) : self }
}

func isPythonAlpha(_ scalar: Unicode.Scalar) -> Bool {
  switch scalar.properties.generalCategory {
  case .uppercaseLetter, .lowercaseLetter, .titlecaseLetter, .modifierLetter, .otherLetter: true
  default: false
  }
}

func isPythonDecimal(_ scalar: Unicode.Scalar) -> Bool { scalar.properties.numericType == .decimal }

func isPythonDigit(_ scalar: Unicode.Scalar) -> Bool {
  let type = scalar.properties.numericType
  return type == .decimal || type == .digit
}

func isPythonNumeric(_ scalar: Unicode.Scalar) -> Bool { scalar.properties.numericType != nil }

/// Whether Python's `repr` shows a code point as itself.
func isPythonPrintable(_ scalar: Unicode.Scalar) -> Bool {
  if scalar.value < 0x7F { return scalar.value >= 0x20 }
  switch scalar.properties.generalCategory {
  case .control, .format, .surrogate, .privateUse, .unassigned, .lineSeparator, .paragraphSeparator, .spaceSeparator:
    return false
  default: return true
  }
}
