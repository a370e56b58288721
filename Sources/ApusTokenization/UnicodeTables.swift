/// The Unicode properties that tokenizers ask for, as flat tables.
final class UnicodeTables: @unchecked Sendable {
  static let shared = UnicodeTables()

  /// One byte per scalar: general category in the low five bits, `whiteSpaceBit`, `wordBit`.
  let properties: UnsafeMutablePointer<UInt8>

  static let whiteSpaceBit: UInt8 = 0x80
  static let wordBit: UInt8 = 0x40

  private init() {
    properties = .allocate(capacity: 0x11_0000)
    properties.initialize(repeating: Category.unassigned, count: 0x11_0000)
    for value in UInt32(0)..<0x11_0000 {
      guard let scalar = Unicode.Scalar(value) else {
        properties[Int(value)] = Category.surrogate
        continue
      }
      let all = scalar.properties
      var byte = Category.of(all.generalCategory)
      if all.isWhitespace { byte |= Self.whiteSpaceBit }
      if all.isAlphabetic || all.isJoinControl
        || Category.mask(byte & 31, in: Category.marks | 1 << 8 | 1 << 11)
      {
        byte |= Self.wordBit
      }
      properties[Int(value)] = byte
    }
  }

  @inline(__always)
  func isWhiteSpace(_ scalar: UInt32) -> Bool { properties[Int(scalar)] & Self.whiteSpaceBit != 0 }

  /// `\w`: alphabetic, mark, decimal digit, connector punctuation or join control.
  @inline(__always)
  func isWord(_ scalar: UInt32) -> Bool { properties[Int(scalar)] & Self.wordBit != 0 }
}

/// Codes of general categories.
enum Category {
  static let names = [
    "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc",
    "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co", "Cn",
  ]
  static let surrogate: UInt8 = 27
  static let unassigned: UInt8 = 29
  static let letters: UInt32 = 0x1F
  static let marks: UInt32 = 0xE0
  static let numbers: UInt32 = 0x700
  static let punctuation: UInt32 = 0x3F800
  static let symbols: UInt32 = 0x3C0000

  @inline(__always)
  static func mask(_ category: UInt8, in mask: UInt32) -> Bool { mask >> UInt32(category) & 1 != 0 }

  static func of(_ category: Unicode.GeneralCategory) -> UInt8 {
    switch category {
    case .uppercaseLetter: 0
    case .lowercaseLetter: 1
    case .titlecaseLetter: 2
    case .modifierLetter: 3
    case .otherLetter: 4
    case .nonspacingMark: 5
    case .spacingMark: 6
    case .enclosingMark: 7
    case .decimalNumber: 8
    case .letterNumber: 9
    case .otherNumber: 10
    case .connectorPunctuation: 11
    case .dashPunctuation: 12
    case .openPunctuation: 13
    case .closePunctuation: 14
    case .initialPunctuation: 15
    case .finalPunctuation: 16
    case .otherPunctuation: 17
    case .mathSymbol: 18
    case .currencySymbol: 19
    case .modifierSymbol: 20
    case .otherSymbol: 21
    case .spaceSeparator: 22
    case .lineSeparator: 23
    case .paragraphSeparator: 24
    case .control: 25
    case .format: 26
    case .surrogate: 27
    case .privateUse: 28
    case .unassigned: 29
    @unknown default: 29
    }
  }
}
