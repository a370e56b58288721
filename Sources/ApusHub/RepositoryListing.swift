import ApusCore

/// A file of a repository, as the hub lists it.
package struct HubFile: Sendable, Hashable {
  /// The path in the repository.
  package var path: String
  /// The size in bytes.
  package var size: Int
  /// The checksum that names the content in the cache: SHA-256 for large files, git's SHA-1 of the blob for others.
  package var etag: String

  /// Makes an entry.
  package init(path: String, size: Int, etag: String) {
    (self.path, self.size, self.etag) = (path, size, etag)
  }

  /// Whether `etag` is the SHA-256 of the content (git LFS), not git's SHA-1 of the blob.
  var isSHA256: Bool { etag.utf8.count == 64 }
}

/// The files of a repository at a commit.
package struct RepositoryListing: Sendable, Equatable {
  /// The commit, 40 hexadecimal digits.
  package var commit: String
  /// The files, in the hub's order; no two share a path.
  package var files: [HubFile]
}

/// What may come from a hub: names that stay inside a folder, sizes and checksums that can be true.
enum ListingCheck {
  /// The largest file that is believed: 64 TiB.
  static let maxFileSize = 1 << 46

  /// What is wrong with a file's name, if anything.
  static func complaint(path: String) -> String? {
    guard !path.isEmpty, path.utf8.count <= 1024 else { return "its name is empty or too long" }
    if path.unicodeScalars.contains(where: { $0.value < 0x20 || (0x7F..<0xA0).contains($0.value) || $0 == "\\" }) {
      return "its name holds control characters or backslashes"
    }
    for part in path.split(separator: "/", omittingEmptySubsequences: false) {
      if part.isEmpty { return "its name is absolute or holds an empty part" }
      if part == "." || part == ".." { return "its name leads out of the folder" }
      if part.utf8.count > 255 { return "a part of its name is too long" }
      if part.lowercased() == ".git" { return "its name lies in a .git folder" }
      // As Windows reads it, for caches that are shared: a drive.
      if part.utf8.dropFirst().first == 0x3A { return "its name holds a drive" }
    }
    return nil
  }

  /// Refuses a file that cannot be meant well.
  static func check(_ file: HubFile) throws(HubError) {
    func refuse(_ reason: String) -> HubError {
      HubError(.invalidAnswer, "The hub lists a file '\(printable(file.path))', which is refused: \(reason).")
    }
    if let reason = complaint(path: file.path) { throw refuse(reason) }
    guard (0...maxFileSize).contains(file.size) else { throw refuse("its size of \(file.size) bytes is absurd") }
    guard isHexadecimal(file.etag, count: 40) || isHexadecimal(file.etag, count: 64) else {
      throw refuse("'\(printable(file.etag, limit: 80))' is no checksum")
    }
  }

  /// Refuses files that share a path, or of which one is the other's folder, and sums that overflow.
  static func check(_ files: [HubFile]) throws(HubError) {
    var paths: Set<String> = []
    for file in files {
      guard paths.insert(file.path).inserted else {
        throw HubError(.invalidAnswer, "The hub lists the file '\(printable(file.path))' twice.")
      }
    }
    for file in files {
      var folder = Substring(file.path)
      while let slash = folder.lastIndex(of: "/") {
        folder = folder[..<slash]
        if paths.contains(String(folder)) {
          throw HubError(.invalidAnswer, "The hub lists '\(printable(String(folder)))' as a file and as a folder.")
        }
      }
    }
  }

  /// The files on a page of `/api/models/NAME/tree/COMMIT`.
  static func files(page: JSONValue) throws(HubError) -> [HubFile] {
    guard let entries = page.arrayValue else {
      throw HubError(.invalidAnswer, "The hub's listing is not a JSON array.")
    }
    var files: [HubFile] = []
    for entry in entries {
      guard let type = entry["type"]?.stringValue, let path = entry["path"]?.stringValue else {
        throw HubError(.invalidAnswer, "The hub lists an entry without type or path.")
      }
      if type == "directory" { continue }
      let large = entry["lfs"]?.nonNull
      guard let size = large?["size"]?.intValue ?? entry["size"]?.intValue,
        let etag = large.map({ $0["oid"]?.stringValue ?? $0["sha256"]?.stringValue }) ?? entry["oid"]?.stringValue
      else {
        throw HubError(.invalidAnswer, "The hub lists '\(printable(path))' without size or checksum.")
      }
      let file = HubFile(path: path, size: size, etag: etag)
      try check(file)
      files.append(file)
    }
    return files
  }
}
