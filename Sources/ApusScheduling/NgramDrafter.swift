import ApusCore

/// Guesses what comes next by looking up where the last tokens stood before: prompt lookup decoding (Saxena, 2023).
///
/// Text that repeats itself or its prompt (code under revision, quotations, tables, JSON) is guessed well, other text is
/// not guessed at all. The newest place of every run of 2, 3 and 5 tokens is kept: three entries for each token.
struct NgramDrafter {
  private static let lengths = [5, 3, 2]
  /// By a run's hash: the position after its newest place.
  private var places: [UInt64: Int32] = [:]
  private var indexed = 0

  /// The tokens that followed the longest known run which the sequence ends with.
  /// - Parameter limit: how many are wanted at most. Fewer come only if there is none.
  mutating func propose(after tokens: [TokenID], limit: Int) -> [TokenID] {
    guard limit > 0 else { return [] }
    // The run at the very end would only find itself.
    for end in indexed..<tokens.count {
      for length in Self.lengths where length <= end { places[Self.hash(tokens, end, length)] = Int32(end) }
    }
    indexed = max(indexed, tokens.count)
    for length in Self.lengths where length <= tokens.count {
      guard let place = places[Self.hash(tokens, tokens.count, length)] else { continue }
      var drafts: [TokenID] = []
      drafts.reserveCapacity(limit)
      for offset in Int(place)..<Int(place) + limit {
        // A text that repeats within the run goes on repeating.
        drafts.append(offset < tokens.count ? tokens[offset] : drafts[offset - tokens.count])
      }
      return drafts
    }
    return []
  }

  private static func hash(_ tokens: [TokenID], _ end: Int, _ length: Int) -> UInt64 {
    var hash = UInt64(length)
    for token in tokens[end - length..<end] {
      hash = (hash ^ UInt64(UInt32(bitPattern: token))) &* 0xFF51_AFD7_ED55_8CCD
      hash ^= hash >> 32
    }
    return hash
  }
}
