import ApusHub
import CHash
import Testing

@Suite(.serialized) struct ChecksumTests {
  private func digest(_ bytes: [UInt8], isSHA256: Bool, step: Int = .max) -> String {
    var hash = Hash(isSHA256: isSHA256)
    var start = 0
    while start < bytes.count {
      let end = start + min(step, bytes.count - start)
      Array(bytes[start..<end]).withUnsafeBytes { hash.update($0) }
      start = end
    }
    return hash.finish()
  }

  /// FIPS 180's examples.
  @Test func examplesOfTheStandard() {
    let long = Array("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq".utf8)
    #expect(
      digest(Array("abc".utf8), isSHA256: true) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    #expect(digest(long, isSHA256: true) == "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1")
    #expect(digest([], isSHA256: true) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    #expect(digest(Array("abc".utf8), isSHA256: false) == "a9993e364706816aba3e25717850c26c9cd0d89d")
    #expect(digest(long, isSHA256: false) == "84983e441c3bd26ebaae4aa1f95129e5e54670f1")
    #expect(
      digest([UInt8](repeating: 0x61, count: 1_000_000), isSHA256: true)
        == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0")
  }

  /// The digest of the digests of all lengths up to 399, from Python:
  /// `x = bytes((i*7+3) & 255 for i in range(400)); d = sha256(); [d.update(sha256(x[:n]).digest()) for n in range(400)]`.
  @Test(arguments: [false, true], [1, 13, 64, 100, Int.max]) func allLengthsInAllPieces(isPortable: Bool, step: Int) {
    apus_sha256_set_portable(isPortable ? 1 : 0)
    defer { apus_sha256_set_portable(0) }
    let bytes = (0..<400).map { UInt8(truncatingIfNeeded: $0 * 7 + 3) }
    func digestOfDigests(isSHA256: Bool) -> String {
      var outer = Hash(isSHA256: isSHA256)
      for count in 0..<400 {
        var inner = Hash(isSHA256: isSHA256)
        var start = 0
        while start < count {
          let end = start + min(step, count - start)
          bytes[start..<end].withUnsafeBytes { inner.update($0) }
          start = end
        }
        inner.digest().withUnsafeBytes { outer.update($0) }
      }
      return outer.finish()
    }
    #expect(digestOfDigests(isSHA256: true) == "feb329aeacf6bfc44e1b83200e62da6c14d5e5dcede17c879ddc58563a2c5311")
    #expect(digestOfDigests(isSHA256: false) == "93b392533a7b2a3c54761c192a8b1adc57f37441")
  }

  @Test func namesAndDates() {
    #expect(Hash.etag(Array("hello".utf8), isSHA256: false) == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0")
    #expect(Checksum.shortName("config.json.metadata") == "8_PA_wEVGiVa2goH2H4KQOQpvVY=")
    #expect(secondsSince1970(httpDate: "Sat, 28 Feb 2026 23:59:58 GMT") == 1_772_323_198)
    #expect(secondsSince1970(httpDate: "Tue, 29 Feb 2000 00:00:00 GMT") == 951_782_400)
    #expect(secondsSince1970(httpDate: "Mon, 01 Mar 2100 00:00:00 GMT") == 4_107_542_400)
    for text in [
      "", "soon", "Mon, 01 Mar 2100 00:00:00 CET", "Mon, 01 Mar 99999 00:00:00 GMT", "Mon, 1 X 2100 25:00 GMT",
    ] {
      #expect(secondsSince1970(httpDate: text) == nil)
    }
  }
}
