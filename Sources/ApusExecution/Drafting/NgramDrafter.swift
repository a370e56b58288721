package import ApusCore
import ApusScheduling

/// Guesses what comes next by looking up where the last tokens stood before: prompt lookup decoding (Saxena, 2023), first in
/// the request's own tokens, then in what past requests generated.
///
/// Text that repeats itself, its prompt or an earlier answer (code under revision, quotations, tables, JSON) is guessed
/// well, other text is not guessed at all.
final class NgramDrafter: Drafter {
  private var indexes: [Int: (index: NgramIndex, salt: UInt64, promptCount: Int)] = [:]
  private let store: NgramStore

  /// - Parameter capacity: tokens of past outputs that are kept, at most.
  init(capacity: Int) { store = NgramStore(capacity: capacity) }

  func enter(slot: Int, _ assignment: SlotAssignment) {
    indexes[slot] = (NgramIndex(), NgramStore.hash(assignment.cacheSalt), assignment.promptCount)
  }

  func leave(slot: Int, tokens: [TokenID]) {
    guard let entry = indexes.removeValue(forKey: slot) else { return }
    store.add(tokens[min(entry.promptCount, tokens.count)...], salt: entry.salt)
  }

  func follow(_ step: FinishedStep) {}
  func measure() -> Double { 0 }

  func draft(_ lines: [DraftLine], in batch: ScheduleBatch) {
    for line in lines {
      guard let salt = indexes[line.slot]?.salt else { continue }
      // The longer the run that was found, the better the guess.
      let (own, length) = indexes[line.slot]!.index.propose(after: line.tokens, limit: line.limit)
      let other =
        length == NgramIndex.lengths[0]
        ? [] : store.propose(after: line.tokens, longerThan: length, salt: salt, limit: line.limit)
      line.take(other.isEmpty ? own : other)
    }
  }
}

/// Where the runs of one sequence stood last. The newest place of every run of 2, 3 and 5 tokens is kept: three entries for
/// each token.
package struct NgramIndex {
  static let lengths = [5, 3, 2]
  /// By a run's hash: the position after its newest place.
  private var places: [UInt64: Int32] = [:]
  private var indexed = 0

  package init() {}

  /// The tokens that followed the longest known run which the sequence ends with, and that run's length.
  /// - Parameter limit: how many are wanted at most. Fewer come only if there is none.
  package mutating func propose(after tokens: [TokenID], limit: Int) -> (drafts: [TokenID], length: Int) {
    guard limit > 0 else { return ([], 0) }
    // The run at the very end would only find itself.
    for end in indexed..<max(indexed, tokens.count) {
      for length in Self.lengths where length <= end {
        places[Self.hash(tokens[end - length..<end])] = Int32(end)
      }
    }
    indexed = max(indexed, tokens.count)
    for length in Self.lengths where length <= tokens.count {
      guard let place = places[Self.hash(tokens[(tokens.count - length)...])] else { continue }
      var drafts: [TokenID] = []
      drafts.reserveCapacity(limit)
      for offset in Int(place)..<Int(place) + limit {
        // A text that repeats within the run goes on repeating.
        drafts.append(offset < tokens.count ? tokens[offset] : drafts[offset - tokens.count])
      }
      return (drafts, length)
    }
    return ([], 0)
  }

  static func hash(_ run: ArraySlice<TokenID>, salt: UInt64 = 0) -> UInt64 {
    var hash = UInt64(run.count) ^ salt
    for token in run {
      hash = (hash ^ UInt64(UInt32(bitPattern: token))) &* 0xFF51_AFD7_ED55_8CCD
      hash ^= hash >> 32
    }
    return hash
  }
}

/// The latest outputs of past requests, in a ring, with the newest place of every run of 5 and 3 tokens. Runs of requests
/// with different cache salts do not find each other.
package final class NgramStore {
  private static let lengths = [5, 3]
  private var ring: [TokenID] = []
  private let capacity: Int
  /// Tokens added since the start; the next one goes to this number modulo the capacity.
  private var end = 0
  /// By a run's hash: the number of the token after its newest place.
  private var places: [UInt64: Int] = [:]

  package init(capacity: Int) { self.capacity = capacity }

  package static func hash(_ salt: String) -> UInt64 {
    var hash: UInt64 = 0xCBF2_9CE4_8422_2325
    for byte in salt.utf8 { hash = (hash ^ UInt64(byte)) &* 0x0000_0100_0000_01B3 }
    return hash
  }

  /// Number of runs known; for tests.
  package var runCount: Int { places.count }

  /// Adds an output. Of one that is longer than the ring, the beginning.
  package func add(_ output: ArraySlice<TokenID>, salt: UInt64) {
    // A run that is followed by nothing helps nobody.
    guard output.count > Self.lengths[1], capacity > 0 else { return }
    for (offset, token) in output.prefix(capacity).enumerated() {
      let place = end % capacity
      if place < ring.count { ring[place] = token } else { ring.append(token) }
      let position = output.startIndex + offset
      for length in Self.lengths where length <= offset {
        places[NgramIndex.hash(output[position - length..<position], salt: salt)] = end
      }
      end += 1
    }
    // A mark that ends what follows a run of the last output.
    if ring.count == capacity { ring[end % capacity] = -1 } else { ring.append(-1) }
    end += 1
    // Entries whose tokens were overwritten go when they are as many as the others.
    if places.count > 2 * Self.lengths.count * capacity {
      let oldest = end - capacity
      places = places.filter { $0.value >= oldest }
    }
  }

  /// What followed the longest run that a sequence ends with, of those longer than the length given.
  package func propose(after tokens: [TokenID], longerThan least: Int, salt: UInt64, limit: Int) -> [TokenID] {
    for length in Self.lengths where length > least && length <= tokens.count {
      guard let place = places[NgramIndex.hash(tokens[(tokens.count - length)...], salt: salt)] else { continue }
      var drafts: [TokenID] = []
      for number in place..<place + limit {
        guard number < end, number >= end - capacity else { break }
        let token = ring[number % capacity]
        if token < 0 { break }
        drafts.append(token)
      }
      if !drafts.isEmpty { return drafts }
    }
    return []
  }
}
