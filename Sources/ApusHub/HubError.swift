/// Why something asked of a model hub or its cache did not happen: one sentence for people, and the kind.
package struct HubError: Error, Sendable, Equatable, CustomStringConvertible {
  /// What went wrong.
  package enum Kind: Sendable, Equatable {
    /// A name, revision or pattern that cannot be meant.
    case invalidName
    /// The hub has no such repository, revision or file, or says so to those who may not see it.
    case notFound
    /// The hub wants a token, a better one, or an accepted licence.
    case unauthorized
    /// The network is switched off and the cache does not hold what was asked for.
    case offline
    /// The hub could not be reached or did not answer in time, after all retries.
    case unreachable
    /// The hub answered with something that is wrong or dangerous.
    case invalidAnswer
    /// A file arrived whole and is not the file that was listed.
    case checksumMismatch
    /// The disk has too little room.
    case noSpace
    /// A file or folder cannot be read or written.
    case fileSystem
    /// The repository holds nothing of what was asked for.
    case nothingToPull
  }

  /// What went wrong.
  package var kind: Kind
  /// What was wrong and what to do about it.
  package var message: String

  /// Makes an error.
  package init(_ kind: Kind, _ message: String) {
    self.kind = kind
    self.message = message
  }

  package var description: String { message }
}

/// The part of a text from elsewhere that may be shown on a terminal: no control characters, limited length.
func printable(_ text: String, limit: Int = 300) -> String {
  var result = ""
  for scalar in text.unicodeScalars.prefix(limit) {
    let isControl =
      scalar.value < 0x20 || (0x7F..<0xA0).contains(scalar.value) || (0x2028...0x202E).contains(scalar.value)
    result.unicodeScalars.append(isControl ? " " : scalar)
  }
  return result
}
