/// Finds stop strings in a text that arrives in pieces, and holds back what might be the beginning of one.
///
/// Text given out is never taken back: a suffix that could still grow into a stop string waits until it cannot. Work per
/// piece is proportional to the piece and the stop strings, not to the text so far.
package struct StopMatcher {
  /// A stop string found.
  package struct Match: Equatable {
    /// Which of the strings given at the start.
    package var index: Int
    /// The string's text.
    package var text: String
  }

  private let stops: [[UInt8]]
  private let texts: [String]
  private let longest: Int
  /// Whether the matched text is given out too.
  private let keepsMatch: Bool
  /// Text that was not given out yet: always a suffix that might begin a stop string.
  private var held: [UInt8] = []

  /// Looks for any of `stops`; none may be empty.
  package init(stops: [String], keepsMatch: Bool) {
    texts = stops
    self.stops = stops.map { Array($0.utf8) }
    longest = self.stops.map(\.count).max() ?? 0
    self.keepsMatch = keepsMatch
  }

  /// Whether there is nothing to look for.
  package var isEmpty: Bool { stops.isEmpty }

  /// Takes a piece of text and returns what may be given out now, with the match if one is complete. Of several complete
  /// ones the one that begins first counts, and of those that begin together the longest.
  package mutating func append(_ piece: String) -> (text: String, match: Match?) {
    if stops.isEmpty { return (piece, nil) }
    let oldCount = held.count
    held.append(contentsOf: piece.utf8)
    if let (start, index) = firstMatch(endingAfter: oldCount) {
      let end = keepsMatch ? start + stops[index].count : start
      let text = String(decoding: held[..<end], as: UTF8.self)
      held.removeAll()
      return (text, Match(index: index, text: texts[index]))
    }
    let keep = longestPossibleBeginning()
    let text = String(decoding: held[..<(held.count - keep)], as: UTF8.self)
    held.removeFirst(held.count - keep)
    return (text, nil)
  }

  /// Gives out what was held back: the text has ended.
  package mutating func finish() -> String {
    defer { held.removeAll() }
    return String(decoding: held, as: UTF8.self)
  }

  /// The first complete match. Matches that lie wholly within the first `oldCount` bytes would have been found before.
  private func firstMatch(endingAfter oldCount: Int) -> (start: Int, index: Int)? {
    var best: (start: Int, index: Int)?
    for (index, stop) in stops.enumerated() where stop.count <= held.count {
      var start = max(0, oldCount - stop.count + 1)
      while start + stop.count <= held.count {
        if held[start] == stop[0], held[start..<start + stop.count].elementsEqual(stop) {
          if best == nil || start < best!.start
            || (start == best!.start && stop.count > stops[best!.index].count)
          {
            best = (start, index)
          }
          break
        }
        start += 1
      }
    }
    return best
  }

  /// The length of the longest suffix that is a proper beginning of a stop string.
  private func longestPossibleBeginning() -> Int {
    var length = min(longest - 1, held.count)
    while length > 0 {
      let suffix = held[(held.count - length)...]
      if stops.contains(where: { $0.count > length && suffix.elementsEqual($0[..<length]) }) { return length }
      length -= 1
    }
    return 0
  }
}
