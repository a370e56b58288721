package import ApusCore
import ApusTokenization

/// Looks for stop patterns (regular expressions) in a text that arrives in pieces.
///
/// The generation ends with the piece after which some pattern matches for the first time, as if the text so far were
/// searched after each piece. Text that could belong to a match is held back: from the first place where a search ran
/// into the end of the text without failing before.
package struct StopPatternMatcher: Sendable {
  /// What a piece of text led to.
  package enum Outcome: Equatable, Sendable {
    /// Nothing; the text goes on.
    case none
    /// A pattern matched this text.
    case match(String)
    /// A pattern could not be applied: it takes too many steps.
    case failure(String)
  }

  /// No more than this many bytes are held back: a pattern such as `.*x` could otherwise hold everything.
  private static let heldLimit = 4096
  /// Bytes kept before the place where the next search starts, for look-behind and word boundaries.
  private static let contextLength = 64
  /// Steps per search: more than any sensible pattern takes on the few bytes that are new, and well below a millisecond.
  private static let stepLimit = 100_000

  private let patterns: [Pattern]
  private let keepsMatch: Bool
  /// The text's last bytes.
  private var buffer: [UInt8] = []
  /// Bytes at the start of `buffer` that were given out.
  private var given = 0
  /// Where the next search starts: no match begins before, whatever follows.
  private var scanStart = 0

  /// - Throws: `invalidRequest` if a pattern is no regular expression.
  package init(patterns: [String], keepsMatch: Bool) throws(EngineError) {
    var compiled: [Pattern] = []
    for source in patterns {
      do throws(EngineError) {
        compiled.append(try Pattern(source, syntax: .python))
      } catch {
        throw EngineError(.invalidRequest, "stop_regex '\(source)': \(error.message)", parameter: "stop_regex")
      }
    }
    self.patterns = compiled
    self.keepsMatch = keepsMatch
  }

  /// Takes a piece of text and returns what may be given out.
  package mutating func append(_ piece: String) -> (text: String, outcome: Outcome) {
    if patterns.isEmpty || piece.isEmpty { return (piece, .none) }
    buffer.append(contentsOf: piece.utf8)
    var first: Range<Int>?
    var open = buffer.count
    for pattern in patterns {
      do throws(EngineError) {
        let search = try pattern.search(in: buffer, from: scanStart, stepLimit: Self.stepLimit)
        if let match = search.match, first == nil || match.lowerBound < first!.lowerBound { first = match }
        open = min(open, search.firstOpenStart ?? buffer.count)
      } catch {
        return (finish(after: ""), .failure("A stop_regex could not be applied: \(error.message)"))
      }
    }
    if let first {
      let end = max(given, keepsMatch ? first.upperBound : first.lowerBound)
      let text = String(decoding: buffer[given..<end], as: UTF8.self)
      return (text, .match(String(decoding: buffer[first], as: UTF8.self)))
    }
    scanStart = open
    let end = max(given, open, characterStart(buffer.count - Self.heldLimit))
    let text = String(decoding: buffer[given..<end], as: UTF8.self)
    given = end
    let drop = characterStart(min(given, scanStart) - Self.contextLength)
    // The start of the text must stay recognisable as such, so that something stays before every later position.
    if drop > Self.contextLength {
      buffer.removeFirst(drop)
      given -= drop
      scanStart -= drop
    }
    return (text, .none)
  }

  /// Gives out what was held back, followed by `text`: the text has ended.
  package mutating func finish(after text: String) -> String {
    if patterns.isEmpty { return text }
    let held = String(decoding: buffer[given...], as: UTF8.self)
    given = buffer.count
    return held + text
  }

  /// The last start of a character at or before an offset.
  private func characterStart(_ offset: Int) -> Int {
    var start = max(0, min(offset, buffer.count))
    while start > 0, start < buffer.count, buffer[start] & 0xC0 == 0x80 { start -= 1 }
    return start
  }
}
