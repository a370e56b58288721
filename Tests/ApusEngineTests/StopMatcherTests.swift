import ApusEngine
import Testing

@Suite struct StopMatcherTests {
  /// What a matcher gives out for a text fed in pieces.
  private func feed(_ pieces: [String], stops: [String], keepsMatch: Bool = false) -> (text: String, match: String?) {
    var matcher = StopMatcher(stops: stops, keepsMatch: keepsMatch)
    var given = ""
    for piece in pieces {
      let (text, match) = matcher.append(piece)
      given += text
      if let match { return (given, match.text) }
    }
    return (given + matcher.finish(), nil)
  }

  @Test func holdsBackOnlyWhatMightBegin() {
    var matcher = StopMatcher(stops: ["END", "ENough"], keepsMatch: false)
    #expect(matcher.append("the E").text == "the ")
    #expect(matcher.append("N").text == "")
    #expect(matcher.append("T").text == "ENT")
    let (text, match) = matcher.append("xEND tail")
    #expect(text == "x")
    #expect(match?.text == "END")
  }

  @Test func firstToBeginWinsThenTheLongest() {
    #expect(feed(["a<stop>b"], stops: ["stop", "<stop", "<stop>"]) == ("a", "<stop>"))
    #expect(feed(["ab", "cd"], stops: ["cd", "bc"]) == ("a", "bc"))
  }

  @Test func keepsTheMatchIfAsked() {
    #expect(feed(["one. ", "two"], stops: ["."], keepsMatch: true) == ("one.", "."))
  }

  @Test func wholeCharactersOnly() {
    // The stop string shares its first bytes with another character: what is given out is whole all the same.
    #expect(feed(["a", "é", "è", "b"], stops: ["èb"]) == ("aé", "èb"))
  }

  /// However a text is split, the same text is given out as when a plain search sees all of it.
  @Test func everySplitGivesWhatAPlainSearchGives() {
    var generator = SplitMix(seed: 0x5EED_0001)
    for round in 0..<3000 {
      let alphabet = Array("abé ")
      func random(_ count: Int) -> String {
        String((0..<count).map { _ in alphabet[Int(generator.next() % UInt64(alphabet.count))] })
      }
      let text = random(Int(generator.next() % 24))
      let stops = (0..<Int(1 + generator.next() % 3)).map { _ in random(Int(1 + generator.next() % 4)) }
      var pieces: [String] = []
      for character in text {
        if pieces.isEmpty || generator.next() % 2 == 0 { pieces.append("") }
        pieces[pieces.count - 1].append(character)
      }
      let got = feed(pieces, stops: stops)
      // Oracle: the first piece boundary at which some stop string is complete; of those complete there, the first.
      var seen = ""
      var expected: (String, String?) = (text, nil)
      for piece in pieces {
        seen += piece
        let bytes = Array(seen.utf8)
        var best: (start: Int, stop: String)?
        for stop in stops {
          let needle = Array(stop.utf8)
          guard needle.count <= bytes.count else { continue }
          for start in 0...(bytes.count - needle.count) where Array(bytes[start..<start + needle.count]) == needle {
            if best == nil || start < best!.start
              || (start == best!.start && stop.utf8.count > best!.stop.utf8.count)
            {
              best = (start, stop)
            }
            break
          }
        }
        if let best {
          expected = (String(decoding: bytes[..<best.start], as: UTF8.self), best.stop)
          break
        }
      }
      #expect(got == expected, "seed 0x5EED0001 round \(round): \(pieces) stops \(stops)")
    }
  }
}

/// A small seeded generator: splitmix64.
struct SplitMix: RandomNumberGenerator {
  private var state: UInt64

  init(seed: UInt64) { state = seed }

  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return z ^ (z >> 31)
  }
}
