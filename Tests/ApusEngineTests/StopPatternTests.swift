import ApusEngine
import ApusTokenization
import Testing

@Suite struct StopPatternTests {
  private func feed(_ pieces: [String], _ patterns: [String], keepsMatch: Bool = false) throws
    -> (text: String, match: String?)
  {
    var matcher = try StopPatternMatcher(patterns: patterns, keepsMatch: keepsMatch)
    var given = ""
    for piece in pieces {
      let (text, outcome) = matcher.append(piece)
      given += text
      switch outcome {
      case .none: break
      case .match(let match): return (given, match)
      case .failure(let reason): return (given, "failure: \(reason)")
      }
    }
    return (given + matcher.finish(after: ""), nil)
  }

  @Test func holdsBackWhatMightMatch() throws {
    var matcher = try StopPatternMatcher(patterns: ["a[0-9]+z"], keepsMatch: false)
    #expect(matcher.append("xy a").text == "xy ")
    #expect(matcher.append("12").text == "")
    #expect(matcher.append("3b").text == "a123b")
    let (text, outcome) = matcher.append(" a7z rest")
    #expect(text == " ")
    #expect(outcome == .match("a7z"))
  }

  @Test func keepsTheMatchIfAsked() throws {
    #expect(try feed(["one 1", "2 two"], ["[0-9]+ "], keepsMatch: true) == ("one 12 ", "12 "))
  }

  @Test func aHostilePatternFailsItsOwnRequest() throws {
    let (_, match) = try feed([String(repeating: "a", count: 60)], ["(a+)+$x"])
    #expect(match?.hasPrefix("failure") == true)
  }

  @Test func holdsBackABoundedAmount() throws {
    var matcher = try StopPatternMatcher(patterns: ["(?s)b.*z"], keepsMatch: false)
    var given = 0
    for _ in 0..<400 { given += matcher.append("b" + String(repeating: "é", count: 49)).text.utf8.count }
    #expect(given >= 400 * 99 - 5000)
  }

  /// Whatever the pieces, the text ends after the first piece with which the whole text so far matches, and what is given
  /// out is what precedes the match.
  @Test func everySplitGivesWhatSearchingTheTextSoFarGives() throws {
    let patterns = ["ab+c", "(?i)BA\\b", "c{2,3}a", "é.b", "(ab|ba)ca", "a(?=c)", "(?<=b)cé"]
    var generator = SplitMix(seed: 0x5EED_0002)
    let alphabet = Array("abcé ")
    for round in 0..<3000 {
      let chosen = (0..<Int(1 + generator.next() % 2)).map { _ in
        patterns[Int(generator.next() % UInt64(patterns.count))]
      }
      let pieces = (0..<Int(generator.next() % 12)).map { _ in
        String((0..<Int(1 + generator.next() % 4)).map { _ in alphabet[Int(generator.next() % 5)] })
      }
      var seen = ""
      var expected: (String, String?)?
      for piece in pieces {
        seen += piece
        let bytes = Array(seen.utf8)
        let matches = try chosen.compactMap { try Pattern($0).firstMatch(in: bytes) }
        if let first = matches.min(by: { $0.lowerBound < $1.lowerBound }) {
          expected = (
            String(decoding: bytes[..<first.lowerBound], as: UTF8.self), String(decoding: bytes[first], as: UTF8.self)
          )
          break
        }
      }
      let got = try feed(pieces, chosen)
      let (text, match) = expected ?? (seen, nil)
      #expect(got.text == text && got.match == match, "seed 0x5EED0002 round \(round): \(pieces) \(chosen)")
    }
  }
}
