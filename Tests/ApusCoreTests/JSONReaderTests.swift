import ApusCore
import Testing

@Suite("JSON reader without strings")
struct JSONReaderTests {
  private func read<Result>(_ text: String, _ body: (inout JSONReader) throws -> Result) throws -> Result {
    try Array(text.utf8).withUnsafeBufferPointer { bytes in
      var reader = JSONReader(bytes)
      let result = try body(&reader)
      try reader.finish()
      return result
    }
  }

  @Test func stringsAreGivenAsBytesUnescaped() throws {
    for (text, expected) in [
      (#" "plain" "#, "plain"), (#""""#, ""), (#""é😀""#, "é😀"), (#""a\n\u00e9\ud83d\ude00\"""#, "a\né😀\""),
    ] {
      #expect(try read(text) { try $0.withString { String(decoding: $0, as: UTF8.self) } } == expected)
    }
  }

  @Test func keysAreGivenAsBytes() throws {
    var keys: [String] = []
    try read(#" { "a" : 1 , "b\t": [2], "é":3} "#) { reader in
      try reader.readObjectBytes { (reader, key) throws(JSONError) in
        keys.append(String(decoding: key, as: UTF8.self))
        try reader.skipValue()
      }
    }
    #expect(keys == ["a", "b\t", "é"])
    try read("{}") { try $0.readObjectBytes { (_, _) throws(JSONError) in Issue.record("There is no member") } }
  }

  @Test func integersAreReadHoweverTheyAreWritten() throws {
    for (text, expected) in [
      ("0", 0), (" 7 ", 7), ("-12", -12), ("1e3", 1000), ("2.0", 2), ("9223372036854775807", Int.max),
      ("123456789012345678", 123_456_789_012_345_678),
    ] {
      #expect(try read(text) { try $0.readInt() } == expected)
    }
    for text in ["01", "1.5", "-", "9223372036854775808", "a", "\"1\"", ""] {
      #expect(throws: JSONError.self) { try read(text) { try $0.readInt() } }
    }
  }

  @Test func badStringsAreRefused() {
    let invalid: [[UInt8]] = [
      [0x22, 0x61], [0x22, 0xFF, 0x22], [0x22, 0xED, 0xA0, 0x80, 0x22], [0x22, 0xC3, 0x22], [0x22, 0x0A, 0x22],
      Array(#""\ud800""#.utf8), Array(#""\x""#.utf8), Array("a".utf8), [],
    ]
    for bytes in invalid {
      #expect(throws: JSONError.self, "\(bytes)") {
        try bytes.withUnsafeBufferPointer { buffer in
          var reader = JSONReader(buffer)
          _ = try reader.withString { $0.count }
        }
      }
    }
  }
}
