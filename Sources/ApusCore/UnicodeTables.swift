/// The Unicode properties that tokenizers ask for, unpacked from `UnicodeData` when first needed.
@usableFromInline package final class UnicodeTables: @unchecked Sendable {
  @usableFromInline package static let shared = UnicodeTables()

  /// One byte per scalar: general category in the low five bits and the bits below. Never freed: the one instance lives
  /// as long as the process.
  @usableFromInline package let properties: UnsafeMutablePointer<UInt8>

  /// White space.
  @usableFromInline package static let whiteSpaceBit: UInt8 = 0x80
  /// `\w` of patterns.
  @usableFromInline package static let wordBit: UInt8 = 0x40
  /// `\w` of the Whitespace pre-tokenizer and of added tokens, whose Unicode version is another.
  @usableFromInline package static let plainWordBit: UInt8 = 0x20

  /// Other scalars that a scalar matches when case does not matter.
  package let caseVariants: [UInt32: [UInt32]]
  package let whiteSpace: ScalarRanges
  /// `\w` of patterns.
  package let word: ScalarRanges

  private init() {
    properties = .allocate(capacity: 0x11_0000)
    properties.initialize(repeating: 0, count: 0x11_0000)
    var reader = UnicodeDataReader(UnicodeData.categories)
    var position = 0
    while let category = reader.next() {
      let length = Int(reader.next()!) + 1
      let byte = UInt8(category)
      let isWord = Category.word >> category & 1 != 0
      (properties + position).update(
        repeating: byte | (isWord ? Self.wordBit | Self.plainWordBit : 0), count: length)
      position += length
    }
    whiteSpace = UnicodeDataReader.ranges(UnicodeData.whiteSpace)
    for range in whiteSpace.ranges { for scalar in range { properties[Int(scalar)] |= Self.whiteSpaceBit } }
    for range in UnicodeDataReader.ranges(UnicodeData.wordDifferences).ranges {
      for scalar in range { properties[Int(scalar)] ^= Self.wordBit | Self.plainWordBit }
    }
    for range in UnicodeDataReader.ranges(UnicodeData.plainWordDifferences).ranges {
      for scalar in range { properties[Int(scalar)] ^= Self.plainWordBit }
    }
    word = Self.ranges(properties) { $0 & Self.wordBit != 0 }
    var variants: [UInt32: [UInt32]] = [:]
    reader = UnicodeDataReader(UnicodeData.caseVariants)
    var scalar: UInt32 = 0
    while let gap = reader.next() {
      scalar += gap
      let count = reader.next()! + 1
      variants[scalar] = (0..<count).map { _ in reader.nextDifference(from: scalar) }
    }
    caseVariants = variants
  }

  private static func ranges(_ properties: UnsafeMutablePointer<UInt8>, _ isMember: (UInt8) -> Bool) -> ScalarRanges {
    var result: [ClosedRange<UInt32>] = []
    var start: Int?
    for scalar in 0...0x11_0000 {
      let isIn = scalar < 0x11_0000 && isMember(properties[scalar])
      if isIn, start == nil { start = scalar }
      if !isIn, let first = start {
        result.append(UInt32(first)...UInt32(scalar - 1))
        start = nil
      }
    }
    return ScalarRanges(result)
  }

  @inlinable @inline(__always)
  package func isWhiteSpace(_ scalar: UInt32) -> Bool { properties[Int(scalar)] & Self.whiteSpaceBit != 0 }

  /// Whether a scalar is a word character next to added tokens and for the Whitespace pre-tokenizer.
  @inlinable @inline(__always)
  package func isWord(_ scalar: UInt32) -> Bool { properties[Int(scalar)] & Self.plainWordBit != 0 }

  /// Whether a scalar is a word character for patterns.
  @inlinable @inline(__always)
  package func isPatternWord(_ scalar: UInt32) -> Bool { properties[Int(scalar)] & Self.wordBit != 0 }

  /// Scalars of the categories in a mask.
  package func categories(_ mask: UInt32) -> ScalarRanges {
    Self.ranges(properties) { mask >> UInt32($0 & 31) & 1 != 0 }
  }

  // MARK: Properties by name

  /// The scalars of `\p{name}`: a general category, a script, or a binary property. Case, spaces, hyphens and underscores
  /// in names do not matter.
  package func property(named name: String) -> ScalarRanges? {
    var key = Self.key(name)
    for prefix in ["generalcategory=", "gc=", "script=", "sc="] where key.hasPrefix(prefix) {
      key.removeFirst(prefix.count)
    }
    if let mask = Self.categoryMasks[key] { return categories(mask) }
    if let index = UnicodeData.scriptNames.firstIndex(where: { $0.lowercased() == key }) { return script(index) }
    if let alias = Self.scriptAliases[key] {
      return UnicodeData.scriptNames.firstIndex(of: alias).map(script)
    }
    if let set = posix(key) { return set }
    guard let test = Self.binaryProperties[key] else { return nil }
    var result: [ClosedRange<UInt32>] = []
    var start: UInt32?
    for value in UInt32(0)...0x11_0000 {
      let isIn = Unicode.Scalar(value).map { test($0.properties) } ?? false
      if isIn, start == nil { start = value }
      if !isIn, let first = start {
        result.append(first...(value - 1))
        start = nil
      }
    }
    return ScalarRanges(result)
  }

  private static func key(_ name: String) -> String {
    String(name.lowercased().filter { $0 != " " && $0 != "-" && $0 != "_" })
  }

  private static let categoryMasks: [String: UInt32] = {
    var masks: [String: UInt32] = [:]
    for (index, name) in Category.names.enumerated() {
      masks[name.lowercased()] = 1 << UInt32(index)
      masks[String(name.lowercased().first!), default: 0] |= 1 << UInt32(index)
    }
    masks["lc"] = 0b111
    masks["l&"] = 0b111
    let long = [
      "letter": "l", "casedletter": "lc", "uppercaseletter": "lu", "lowercaseletter": "ll", "titlecaseletter": "lt",
      "modifierletter": "lm", "otherletter": "lo", "mark": "m", "combiningmark": "m", "nonspacingmark": "mn",
      "spacingmark": "mc", "enclosingmark": "me", "number": "n", "decimalnumber": "nd", "letternumber": "nl",
      "othernumber": "no", "punctuation": "p", "connectorpunctuation": "pc", "dashpunctuation": "pd",
      "openpunctuation": "ps", "closepunctuation": "pe", "initialpunctuation": "pi", "finalpunctuation": "pf",
      "otherpunctuation": "po", "symbol": "s", "mathsymbol": "sm", "currencysymbol": "sc", "modifiersymbol": "sk",
      "othersymbol": "so", "separator": "z", "spaceseparator": "zs", "lineseparator": "zl", "paragraphseparator": "zp",
      "other": "c", "control": "cc", "format": "cf", "surrogate": "cs", "privateuse": "co", "unassigned": "cn",
    ]
    for (name, short) in long { masks[name] = masks[short]! }
    return masks
  }()

  private static let scriptAliases = [
    "hani": "Han", "hira": "Hiragana", "kana": "Katakana", "latn": "Latin", "cyrl": "Cyrillic", "grek": "Greek",
    "arab": "Arabic", "hebr": "Hebrew", "thaa": "Thaana", "deva": "Devanagari", "beng": "Bengali", "hang": "Hangul",
    "zyyy": "Common", "zinh": "Inherited", "qaai": "Inherited", "geor": "Georgian", "armn": "Armenian", "khmr": "Khmer",
    "laoo": "Lao", "mymr": "Myanmar", "taml": "Tamil", "telu": "Telugu", "tibt": "Tibetan", "ethi": "Ethiopic",
    "mong": "Mongolian", "sinh": "Sinhala", "gujr": "Gujarati", "guru": "Gurmukhi", "knda": "Kannada",
    "mlym": "Malayalam", "orya": "Oriya", "bopo": "Bopomofo",
  ]

  private static let binaryProperties: [String: @Sendable (Unicode.Scalar.Properties) -> Bool] = [
    "alphabetic": { $0.isAlphabetic }, "lowercase": { $0.isLowercase }, "uppercase": { $0.isUppercase },
    "whitespace": { $0.isWhitespace }, "emoji": { $0.isEmoji }, "emojipresentation": { $0.isEmojiPresentation },
    "emojimodifier": { $0.isEmojiModifier }, "emojimodifierbase": { $0.isEmojiModifierBase },
    "ideographic": { $0.isIdeographic }, "unifiedideograph": { $0.isUnifiedIdeograph }, "math": { $0.isMath },
    "dash": { $0.isDash }, "diacritic": { $0.isDiacritic }, "extender": { $0.isExtender },
    "quotationmark": { $0.isQuotationMark }, "cased": { $0.isCased }, "hexdigit": { $0.isHexDigit },
    "asciihexdigit": { $0.isASCIIHexDigit }, "idstart": { $0.isIDStart }, "idcontinue": { $0.isIDContinue },
    "xidstart": { $0.isXIDStart }, "xidcontinue": { $0.isXIDContinue }, "joincontrol": { $0.isJoinControl },
    "variationselector": { $0.isVariationSelector }, "radical": { $0.isRadical },
    "defaultignorablecodepoint": { $0.isDefaultIgnorableCodePoint }, "caseignorable": { $0.isCaseIgnorable },
  ]

  /// The scalars of a POSIX class name, with their Unicode meaning.
  package func posix(_ name: String) -> ScalarRanges? {
    switch name.lowercased() {
    case "alnum": property(named: "Alphabetic")!.union(categories(Category.numbers & 1 << 8))
    case "alpha": property(named: "Alphabetic")
    case "ascii": ScalarRanges([0...0x7F])
    case "any": .all
    case "assigned": categories(1 << 29).inverted
    case "blank": categories(1 << 22).union(ScalarRanges(0x09))
    case "cntrl": categories(1 << 25)
    case "digit": categories(1 << 8)
    case "graph": categories(1 << 25 | 1 << 27 | 1 << 29).union(whiteSpace).inverted
    case "lower": property(named: "Lowercase")
    case "print":
      categories(1 << 25 | 1 << 27 | 1 << 29).union(
        ScalarRanges([0x09...0x0D, 0x85...0x85, 0x2028...0x2029])
      ).inverted
    case "punct":
      categories(Category.punctuation).union(
        ScalarRanges([0x24...0x24, 0x2B...0x2B, 0x3C...0x3E, 0x5E...0x5E, 0x60...0x60, 0x7C...0x7C, 0x7E...0x7E]))
    case "space": whiteSpace
    case "upper": property(named: "Uppercase")
    case "word": word
    case "xdigit": ScalarRanges([0x30...0x39, 0x41...0x46, 0x61...0x66])
    default: nil
    }
  }

  private func script(_ index: Int) -> ScalarRanges {
    var result: [ClosedRange<UInt32>] = []
    UnicodeDataReader.forEachValuedRange(UnicodeData.scripts) { range, value in
      if value == UInt32(index) { result.append(range) }
    }
    return ScalarRanges(result)
  }

  /// A set of categories but for the scalars of a table of differences.
  package func differing(_ mask: UInt32, _ differences: StaticString) -> ScalarRanges {
    let base = categories(mask)
    let other = UnicodeDataReader.ranges(differences)
    return base.intersection(other.inverted).union(other.intersection(base.inverted))
  }
}

/// Reads the numbers of one table.
package struct UnicodeDataReader {
  private let bytes: UnsafeBufferPointer<UInt8>
  private var index = 0

  package init(_ text: StaticString) {
    bytes = UnsafeBufferPointer(start: text.utf8Start, count: text.utf8CodeUnitCount)
  }

  /// The next number, or `nil` at the end.
  package mutating func next() -> UInt32? {
    var value: UInt32 = 0
    var shift: UInt32 = 0
    while index < bytes.count {
      let byte = bytes[index]
      index += 1
      if byte < 0x30 { continue }  // Lines are broken and indented.
      let digit = UInt32(byte - 0x30)
      value |= (digit & 31) << shift
      if digit < 32 { return value }
      shift += 5
    }
    return nil
  }

  /// The next number as a signed difference from a scalar.
  package mutating func nextDifference(from scalar: UInt32) -> UInt32 {
    let value = next()!
    return value & 1 == 0 ? scalar &+ (value >> 1) : scalar &- ((value + 1) >> 1)
  }

  /// A table of ranges.
  package static func ranges(_ text: StaticString) -> ScalarRanges {
    var reader = UnicodeDataReader(text)
    var result: [ClosedRange<UInt32>] = []
    var position: UInt32 = 0
    while let gap = reader.next() {
      let start = position + gap
      let end = start + reader.next()!
      result.append(start...end)
      position = end + 1
    }
    return ScalarRanges(result)
  }

  /// A table of ranges with a value each.
  package static func forEachValuedRange(_ text: StaticString, _ body: (ClosedRange<UInt32>, UInt32) -> Void) {
    var reader = UnicodeDataReader(text)
    var position: UInt32 = 0
    while let gap = reader.next() {
      let start = position + gap
      let end = start + reader.next()!
      body(start...end, reader.next()!)
      position = end + 1
    }
  }
}

/// Codes of general categories, as `UnicodeData.categories` numbers them.
package enum Category {
  package static let names = [
    "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm",
    "Sc",
    "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co", "Cn",
  ]
  package static let letters: UInt32 = 0x1F
  package static let marks: UInt32 = 0xE0
  package static let numbers: UInt32 = 0x700
  package static let punctuation: UInt32 = 0x3F800
  package static let symbols: UInt32 = 0x3C0000
  /// Letters, marks, decimal digits and connectors.
  package static let word: UInt32 = 0x1F | 0xE0 | 1 << 8 | 1 << 11
}
