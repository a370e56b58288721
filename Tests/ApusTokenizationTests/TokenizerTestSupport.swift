import ApusCore
import ApusTokenization
import Foundation
import Testing

/// Real files that tests read when they are there.
enum SharedData {
  static let root: String = {
    let package = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
      .deletingLastPathComponent()
    // The data lies beside the package, or beside the directory of its working copies.
    for path in ["../shared/data", "../../shared/data"] {
      let candidate = package.appendingPathComponent(path).standardizedFileURL.path
      if FileManager.default.fileExists(atPath: candidate) { return candidate + "/" }
    }
    print("The directory shared/data is absent: tests that read real tokenizers are skipped.")
    return ""
  }()

  static var isPresent: Bool { !root.isEmpty }

  static func bytes(_ path: String) throws -> [UInt8] {
    Array(try Data(contentsOf: URL(fileURLWithPath: root + path)))
  }

  static func json(_ path: String) throws -> JSONValue { try JSONValue.parse(bytes(path)) }

  static func exists(_ path: String) -> Bool {
    isPresent && FileManager.default.fileExists(atPath: root + path)
  }
}

/// A generator with a seed, so that a failure can be repeated (SplitMix64).
struct SeededGenerator: RandomNumberGenerator {
  private var state: UInt64

  init(seed: UInt64) { state = seed }

  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var value = state
    value = (value ^ value >> 30) &* 0xBF58_476D_1CE4_E5B9
    value = (value ^ value >> 27) &* 0x94D0_49BB_1331_11EB
    return value ^ value >> 31
  }
}

/// Random text of scripts, spaces, punctuation and odd characters.
func randomText(_ generator: inout SeededGenerator, length: Int) -> String {
  let words = [
    "hello", "World", "don't", "I'LL", "they're", "'s", "'ſ", "naïve", "北京", "こんにちは", "한국어", "Привет", "שלום", "😀",
    "👨‍👩‍👧", "123", "1234567", "½", "foo_bar", "HTTPServer", "ǅ", "ʰA", "e\u{301}", "\u{301}", "//", "/\n", ";\n", "...",
    "\u{200D}",
    "<|im_start|>", "▁", "Ġ", "ABC", "中a", "Ab\u{301}C",
  ]
  let spaces = [" ", "  ", "\n", "\r\n", "\t", " \n", "\u{A0}", "\u{3000}", "\n \n", "\u{85}", "     "]
  var text = ""
  while text.utf8.count < length {
    switch Int.random(in: 0..<10, using: &generator) {
    case 0..<4: text += words.randomElement(using: &generator)!
    case 4..<7: text += spaces.randomElement(using: &generator)!
    case 7: text += String(repeating: "a", count: Int.random(in: 1..<30, using: &generator))
    case 8: text.unicodeScalars.append(Unicode.Scalar(UInt8.random(in: 0..<128, using: &generator)))
    default:
      if let scalar = Unicode.Scalar(UInt32.random(in: 0x80..<0x30000, using: &generator)) {
        text.unicodeScalars.append(scalar)
      }
    }
  }
  return text
}

extension JSONValue {
  var ids: [TokenID] { arrayValue!.map { TokenID($0.intValue!) } }
}
