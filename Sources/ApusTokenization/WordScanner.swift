import ApusCore

/// Hand-made matchers for the pre-tokenizer patterns that most byte-level models share.
///
/// All patterns of the family are alternations, tried in order at each place: contractions, letters with an optional lead
/// character, numbers, punctuation with an optional space, and four kinds of white space. They match every character, so
/// a text is cut without gaps. A scanner is selected by the text of the pattern (`WordScanner.init?(pattern:)`); tests
/// compare each with the general engine on random text.
struct WordScanner: Sendable {
  /// How words of letters are matched.
  enum Words: Sendable {
    /// ` ?\p{L}+`
    case spaced
    /// `[^\r\n\p{L}\p{N}]?\p{L}+`
    case lead
    /// `[^\r\n\p{L}\p{N}]?[upper]*[lower]+|[^\r\n\p{L}\p{N}]?[upper]+[lower]*`, each followed by an optional contraction
    /// where the pattern has contractions; upper is Lu Lt Lm Lo M, lower is Ll Lm Lo M.
    case cased
  }

  /// How white space is matched.
  enum Spaces: Sendable {
    /// `\s+(?!\S)|\s+`
    case plain
    /// `\s*[\r\n]+|\s+(?!\S)|\s+`
    case newlineRuns
    /// `\s*[\r\n]|\s+(?!\S)|\s+`
    case newline
  }

  var words: Words
  /// Categories of letters in words (`\p{L}`, or with marks).
  var letters: UInt32 = Category.letters
  /// Whether contractions are matched at all, and whether their case matters.
  var hasContractions = true
  var foldsCase = false
  /// The most digits of one piece: 1, 3, or `Int.max` for ` ?\p{N}+`.
  var maximumDigits: Int
  /// Bytes that may follow punctuation: none, `[\r\n]*`, or `[\r\n/]*`.
  var trailing: Trailing
  var spaces: Spaces

  /// What may follow a run of punctuation.
  enum Trailing: Sendable { case nothing, newlines, newlinesAndSlashes }

  /// The scanner for a pattern, if the pattern is one of the family.
  init?(pattern: String) {
    guard let known = Self.known[pattern] else { return nil }
    self = known
  }

  private init(
    _ words: Words, letters: UInt32 = Category.letters, contractions: Bool = true, foldsCase: Bool = false, digits: Int,
    trailing: Trailing, spaces: Spaces
  ) {
    self.words = words
    self.letters = letters
    hasContractions = contractions
    self.foldsCase = foldsCase
    maximumDigits = digits
    self.trailing = trailing
    self.spaces = spaces
  }

  /// The pattern of GPT-2, which the ByteLevel pre-tokenizer uses by itself.
  static let gpt2 = WordScanner(.spaced, digits: .max, trailing: .nothing, spaces: .plain)

  /// The patterns known, as the files of the models spell them.
  static let known: [String: WordScanner] = {
    let fold = #"(?i:'s|'t|'re|'ve|'m|'ll|'d)"#
    let foldShort = #"'(?i:[sdmt]|ll|ve|re)"#
    let end = #"\s*[\r\n]+|\s+(?!\S)|\s+"#
    let upper = #"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"#
    let lower = #"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"#
    let lead = #"[^\r\n\p{L}\p{N}]?"#
    var known: [String: WordScanner] = [:]
    known[#"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#] = gpt2
    known[#"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#] = gpt2
    known[#"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"#] = gpt2
    for (digits, text) in [(1, #"\p{N}"#), (3, #"\p{N}{1,3}"#), (Int.max, #"\p{N}+"#)] {
      let scanner = WordScanner(.lead, foldsCase: true, digits: digits, trailing: .newlines, spaces: .newlineRuns)
      known[#"\#(fold)|\#(lead)\p{L}+|\#(text)| ?[^\s\p{L}\p{N}]+[\r\n]*|\#(end)"#] = scanner
      known[#"\#(foldShort)|\#(lead)\p{L}+|\#(text)| ?[^\s\p{L}\p{N}]+[\r\n]*|\#(end)"#] = scanner
      var single = scanner
      single.spaces = .newline
      known[
        #"\#(foldShort)|[^\r\n\p{L}\p{N}]?+\p{L}+|\#(text)| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"#] =
        single
      for (contractions, suffix) in [(true, fold + "?"), (false, "")] {
        let cased = WordScanner(
          .cased, contractions: contractions, foldsCase: true, digits: digits, trailing: .newlinesAndSlashes,
          spaces: .newlineRuns)
        let words = #"\#(lead)\#(upper)*\#(lower)+\#(suffix)|\#(lead)\#(upper)+\#(lower)*\#(suffix)"#
        known[#"\#(words)|\#(text)| ?[^\s\p{L}\p{N}]+[\r\n/]*|\#(end)"#] = cased
      }
    }
    return known
  }()

  /// Appends the ends of all pieces of a text, the last of which is the end of the text.
  func scan(_ text: Bytes, ends: inout [Int32]) {
    guard let base = text.baseAddress else { return }
    let properties = UnicodeTables.shared.properties
    let count = text.count
    var index = 0
    while index < count {
      index = pieceEnd(base, index, count, properties)
      ends.append(Int32(truncatingIfNeeded: index))
    }
  }

  /// The class of the scalar at an index: its category bit, its white-space flag, and its length.
  @inline(__always)
  private static func look(
    _ base: UnsafePointer<UInt8>, _ index: Int, _ properties: UnsafeMutablePointer<UInt8>
  ) -> (bit: UInt32, isSpace: Bool, length: Int) {
    let first = base[index]
    if first < 0x80 {
      let property = properties[Int(first)]
      return (1 << UInt32(property & 31), property & 0x80 != 0, 1)
    }
    let (scalar, length) = decodeScalar(base, index)
    let property = properties[Int(scalar)]
    return (1 << UInt32(property & 31), property & 0x80 != 0, length)
  }

  @inline(__always)
  private static func runEnd(
    _ base: UnsafePointer<UInt8>, _ start: Int, _ count: Int, _ mask: UInt32,
    _ properties: UnsafeMutablePointer<UInt8>
  ) -> Int {
    var index = start
    while index < count {
      let (bit, _, length) = look(base, index, properties)
      if bit & mask == 0 { break }
      index += length
    }
    return index
  }

  /// The end of a contraction that starts with the apostrophe at `index`, or `index`.
  @inline(__always)
  private func contractionEnd(_ base: UnsafePointer<UInt8>, _ index: Int, _ count: Int) -> Int {
    guard index + 1 < count else { return index }
    if foldsCase {
      switch base[index + 1] | 0x20 {
      case UInt8(ascii: "s"), UInt8(ascii: "t"), UInt8(ascii: "m"), UInt8(ascii: "d"):
        return base[index + 1] & 0x40 != 0 ? index + 2 : index
      case UInt8(ascii: "r"), UInt8(ascii: "v"):
        return index + 2 < count && base[index + 2] | 0x20 == UInt8(ascii: "e") ? index + 3 : index
      case UInt8(ascii: "l"):
        return index + 2 < count && base[index + 2] | 0x20 == UInt8(ascii: "l") ? index + 3 : index
      case 0xE5:
        // U+017F, the long s, is a case of s.
        return base[index + 1] == 0xC5 && index + 2 < count && base[index + 2] == 0xBF ? index + 3 : index
      default: return index
      }
    }
    switch base[index + 1] {
    case UInt8(ascii: "s"), UInt8(ascii: "t"), UInt8(ascii: "m"), UInt8(ascii: "d"): return index + 2
    case UInt8(ascii: "r"), UInt8(ascii: "v"):
      return index + 2 < count && base[index + 2] == UInt8(ascii: "e") ? index + 3 : index
    case UInt8(ascii: "l"):
      return index + 2 < count && base[index + 2] == UInt8(ascii: "l") ? index + 3 : index
    default: return index
    }
  }

  /// The end of the piece that starts at `start`.
  @inline(__always)
  private func pieceEnd(
    _ base: UnsafePointer<UInt8>, _ start: Int, _ count: Int, _ properties: UnsafeMutablePointer<UInt8>
  ) -> Int {
    if words != .cased, hasContractions, base[start] == UInt8(ascii: "'") {
      let end = contractionEnd(base, start, count)
      if end > start { return end }
    }
    let (bit, isSpace, length) = Self.look(base, start, properties)
    let next = start + length
    switch words {
    case .spaced:
      if bit & letters != 0 { return Self.runEnd(base, next, count, letters, properties) }
      if bit & Category.numbers != 0 { return Self.runEnd(base, next, count, Category.numbers, properties) }
      if base[start] == 0x20, next < count {
        let (following, followingIsSpace, followingLength) = Self.look(base, next, properties)
        let after = next + followingLength
        if following & letters != 0 { return Self.runEnd(base, after, count, letters, properties) }
        if following & Category.numbers != 0 { return Self.runEnd(base, after, count, Category.numbers, properties) }
        if !followingIsSpace { return punctuationEnd(base, after, count, properties) }
      } else if !isSpace {
        return punctuationEnd(base, next, count, properties)
      }
      return spaceEnd(base, start, count, properties)
    case .lead:
      if bit & letters != 0 { return Self.runEnd(base, next, count, letters, properties) }
      if bit & Category.numbers != 0 { return digitsEnd(base, next, count, properties) }
      if next < count, base[start] != 0x0A, base[start] != 0x0D {
        let (following, followingIsSpace, followingLength) = Self.look(base, next, properties)
        if following & letters != 0 {
          return Self.runEnd(base, next + followingLength, count, letters, properties)
        }
        if base[start] == 0x20, !followingIsSpace, following & (Category.letters | Category.numbers) == 0 {
          return punctuationEnd(base, next + followingLength, count, properties)
        }
      }
      if !isSpace { return punctuationEnd(base, next, count, properties) }
      return spaceEnd(base, start, count, properties)
    case .cased:
      if bit & Self.casedLetters != 0 {
        let end = casedEnd(base, start, count, properties)
        if end > start { return end }
      }
      if bit & Category.numbers != 0 { return digitsEnd(base, next, count, properties) }
      if next < count, base[start] != 0x0A, base[start] != 0x0D, bit & Category.letters == 0 {
        let end = casedEnd(base, next, count, properties)
        if end > next { return end }
        if base[start] == 0x20 {
          let (following, followingIsSpace, followingLength) = Self.look(base, next, properties)
          if !followingIsSpace, following & (Category.letters | Category.numbers) == 0 {
            return punctuationEnd(base, next + followingLength, count, properties)
          }
        }
      }
      if !isSpace { return punctuationEnd(base, next, count, properties) }
      return spaceEnd(base, start, count, properties)
    }
  }

  private static let upper: UInt32 = 0b1_1101 | Category.marks
  private static let lower: UInt32 = 0b1_1010 | Category.marks
  private static let casedLetters: UInt32 = Category.letters | Category.marks

  /// The end of `[upper]*[lower]+` or else `[upper]+[lower]*` from `start`, with a contraction; `start` if neither matches.
  private func casedEnd(
    _ base: UnsafePointer<UInt8>, _ start: Int, _ count: Int, _ properties: UnsafeMutablePointer<UInt8>
  ) -> Int {
    let upperEnd = Self.runEnd(base, start, count, Self.upper, properties)
    var end = Self.runEnd(base, upperEnd, count, Self.lower, properties)
    if end == upperEnd {
      // The first form must give back characters until the last one given back is also lower (Lm, Lo or M).
      var position = upperEnd
      var found = false
      while position > start {
        let previous = previousScalarStart(base, position)
        if Self.look(base, previous, properties).bit & Self.lower != 0 {
          found = true
          break
        }
        position = previous
      }
      // Lower letters of both classes run on to the end of the upper run at most.
      if found { end = Self.runEnd(base, previousScalarStart(base, position), count, Self.lower, properties) }
      if !found { end = upperEnd }
    }
    if end == start { return start }
    if hasContractions, end < count, base[end] == UInt8(ascii: "'") { end = contractionEnd(base, end, count) }
    return end
  }

  @inline(__always)
  private func digitsEnd(
    _ base: UnsafePointer<UInt8>, _ start: Int, _ count: Int, _ properties: UnsafeMutablePointer<UInt8>
  ) -> Int {
    var index = start
    var remaining = maximumDigits - 1
    while remaining > 0, index < count {
      let (bit, _, length) = Self.look(base, index, properties)
      if bit & Category.numbers == 0 { break }
      index += length
      remaining -= 1
    }
    return index
  }

  @inline(__always)
  private func punctuationEnd(
    _ base: UnsafePointer<UInt8>, _ start: Int, _ count: Int, _ properties: UnsafeMutablePointer<UInt8>
  ) -> Int {
    var index = start
    while index < count {
      let (bit, isSpace, length) = Self.look(base, index, properties)
      if isSpace || bit & (Category.letters | Category.numbers) != 0 { break }
      index += length
    }
    switch trailing {
    case .nothing: break
    case .newlines:
      while index < count, base[index] == 0x0A || base[index] == 0x0D { index += 1 }
    case .newlinesAndSlashes:
      while index < count, base[index] == 0x0A || base[index] == 0x0D || base[index] == UInt8(ascii: "/") { index += 1 }
    }
    return index
  }

  /// The end of a piece of white space that starts at `start`.
  @inline(__always)
  private func spaceEnd(
    _ base: UnsafePointer<UInt8>, _ start: Int, _ count: Int, _ properties: UnsafeMutablePointer<UInt8>
  ) -> Int {
    var index = start
    var last = start
    var newlineEnd = -1
    while index < count {
      let (_, isSpace, length) = Self.look(base, index, properties)
      if !isSpace { break }
      last = index
      if base[index] == 0x0A || base[index] == 0x0D { newlineEnd = index + 1 }
      index += length
    }
    if spaces != .plain, newlineEnd >= 0 { return newlineEnd }
    // A run before a word leaves its last character to the word; a single one stands alone.
    if index < count, last > start { return last }
    return index
  }
}

/// The hand-made matchers as tests see them.
package enum WordScannerPatterns {
  /// The text of every pattern that has a hand-made matcher.
  package static var all: [String] { WordScanner.known.keys.sorted() }

  /// The ends of all pieces of a text, or `nil` for a pattern without a matcher.
  package static func ends(_ pattern: String, _ text: [UInt8]) -> [Int]? {
    guard let scanner = WordScanner(pattern: pattern) else { return nil }
    var ends: [Int32] = []
    text.withUnsafeBufferPointer { scanner.scan($0, ends: &ends) }
    return ends.map(Int.init)
  }
}
