/// A repository of a model hub, as users write it: `OWNER/NAME`, `OWNER/NAME@REVISION`, `OWNER/NAME:QUANT`.
package struct RepositoryReference: Sendable, Equatable, CustomStringConvertible {
  /// `OWNER/NAME`.
  package var repository: String
  /// A branch, tag or commit.
  package var revision: String
  /// The form of a GGUF model that is meant, such as `Q4_K_M`.
  package var quantization: String?

  /// The revision that is meant where none is named.
  package static let defaultRevision = "main"

  /// Reads a reference, also as `hf://OWNER/NAME` or as the address of a repository's page.
  /// - Throws: `invalidName` with the reason.
  package init(_ text: String) throws(HubError) {
    func refuse(_ reason: String) -> HubError {
      HubError(.invalidName, "'\(printable(text))' is no repository of a hub: \(reason).")
    }
    var rest = Substring(text)
    var revision: String?
    var quantization: String?
    for prefix in ["hf://", "https://huggingface.co/", "https://hf.co/"] where rest.hasPrefix(prefix) {
      rest = rest.dropFirst(prefix.count)
      while rest.hasSuffix("/") { rest.removeLast() }
      let parts = rest.split(separator: "/", maxSplits: 3)
      if parts.count == 4 && ["tree", "blob", "resolve"].contains(parts[2]) {
        revision = String(parts[3])
        rest = rest.prefix(upTo: parts[1].endIndex)
      }
    }
    let end = rest.firstIndex { $0 == "@" || $0 == ":" } ?? rest.endIndex
    repository = String(rest[..<end])
    rest = rest[end...]
    while let mark = rest.first {
      rest = rest.dropFirst()
      let next = rest.firstIndex { $0 == "@" || $0 == ":" } ?? rest.endIndex
      let value = String(rest[..<next])
      rest = rest[next...]
      if value.isEmpty { throw refuse("nothing follows '\(mark)'") }
      if mark == "@" {
        if revision != nil { throw refuse("it names two revisions") }
        revision = value
      } else {
        if quantization != nil { throw refuse("it names two quantizations") }
        quantization = value
      }
    }
    self.revision = revision ?? Self.defaultRevision
    self.quantization = quantization
    if let reason = Self.complaint(repository: repository) { throw refuse(reason) }
    if let reason = Self.complaint(revision: self.revision) { throw refuse(reason) }
    if let quantization, !quantization.utf8.allSatisfy({ isWordByte($0) || $0 == 0x2D || $0 == 0x2E }) {
      throw refuse("a quantization is made of letters, digits, '_', '-' and '.', as in 'Q4_K_M'")
    }
  }

  /// Whether a text has the form of a reference, so that it may be looked up where no file has that name.
  package static func isReference(_ text: String) -> Bool { (try? RepositoryReference(text)) != nil }

  package var description: String {
    repository + (revision == Self.defaultRevision ? "" : "@\(revision)") + (quantization.map { ":\($0)" } ?? "")
  }

  /// What is wrong with a repository's name, if anything.
  private static func complaint(repository: String) -> String? {
    let parts = repository.split(separator: "/", omittingEmptySubsequences: false)
    guard parts.count == 2 else { return "it must have the form OWNER/NAME" }
    guard repository.utf8.count <= 96 else { return "the name has more than 96 characters" }
    for part in parts {
      guard let first = part.utf8.first, let last = part.utf8.last else { return "it must have the form OWNER/NAME" }
      guard part.utf8.allSatisfy({ isWordByte($0) || $0 == 0x2D || $0 == 0x2E }) else {
        return "owner and name are made of letters, digits, '-', '_' and '.'"
      }
      if [0x2D, 0x2E].contains(first) || [0x2D, 0x2E].contains(last) {
        return "owner and name begin and end with a letter or digit"
      }
    }
    if contains(repository, "--") || contains(repository, "..") { return "it holds '--' or '..'" }
    if repository.hasSuffix(".git") { return "it ends with '.git'" }
    return nil
  }

  /// What is wrong with a revision, if anything. It becomes the path of a file below `refs`.
  private static func complaint(revision: String) -> String? {
    guard revision.utf8.count <= 255 else { return "the revision is too long" }
    for part in revision.split(separator: "/", omittingEmptySubsequences: false) {
      guard !part.isEmpty, part.utf8.first != 0x2E else { return "the revision is not one that git allows" }
    }
    let isPlain = revision.utf8.allSatisfy { isWordByte($0) || [0x2D, 0x2E, 0x2F, 0x2B, 0x23, 0x3D].contains($0) }
    return isPlain && !contains(revision, "..") ? nil : "the revision is not one that git allows"
  }
}

private func isWordByte(_ byte: UInt8) -> Bool {
  switch byte {
  case 0x30...0x39, 0x41...0x5A, 0x61...0x7A, 0x5F: true
  default: false
  }
}

private func contains(_ text: String, _ pair: String) -> Bool {
  let bytes = Array(text.utf8), pair = Array(pair.utf8)
  return bytes.count >= 2 && (1..<bytes.count).contains { bytes[$0 - 1] == pair[0] && bytes[$0] == pair[1] }
}

/// Whether a text is so many lower-case hexadecimal digits.
func isHexadecimal(_ text: String, count: Int) -> Bool {
  text.utf8.count == count && text.utf8.allSatisfy { (0x30...0x39).contains($0) || (0x61...0x66).contains($0) }
}
