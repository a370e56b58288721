import Glibc

/// Where one file goes: into the cache under its checksum with a link in the snapshot, or into a local folder.
struct PullTarget: Sendable {
  let file: HubFile
  let commit: String
  /// Where the content lies in the end.
  let finalPath: String
  /// Where the content gathers.
  let partialPath: String
  /// Where other programs gather the beginning of the content.
  let prefixPath: String?
  /// Who holds this lock fetches.
  let lockPath: String

  private let cache: HubCache
  private let repository: String
  /// The local folder, if it is one.
  private let directory: String?

  /// Into the cache.
  init(cached file: HubFile, commit: String, cache: HubCache, repository: String) {
    self.file = file
    self.commit = commit
    self.cache = cache
    self.repository = repository
    directory = nil
    finalPath = cache.blob(repository, file.etag)
    // huggingface_hub takes a file `CHECKSUM.incomplete` for the plain beginning of the content. This one has holes.
    partialPath = finalPath + ".apus.incomplete"
    prefixPath = file.isSHA256 ? finalPath + ".incomplete" : nil
    lockPath = cache.lock(repository, file.etag)
  }

  /// Into a folder, with huggingface_hub's notes of what lies there in `.cache/huggingface`.
  init(local file: HubFile, commit: String, directory: String, cache: HubCache, repository: String) {
    self.file = file
    self.commit = commit
    self.cache = cache
    self.repository = repository
    self.directory = directory
    finalPath = directory + "/" + file.path
    let metadata = Self.metadataPath(directory, file.path)
    let folder = metadata[..<(metadata.lastIndex(of: "/") ?? metadata.endIndex)]
    let name = String(metadata[folder.endIndex...].dropFirst())
    partialPath = "\(folder)/\(Checksum.shortName(name)).\(file.etag).apus.incomplete"
    prefixPath = nil
    lockPath = metadata.dropLast("metadata".count) + "lock"
  }

  private static func metadataPath(_ directory: String, _ path: String) -> String {
    directory + "/.cache/huggingface/download/" + path + ".metadata"
  }

  /// Whether the file goes into a folder of its own and not into the cache.
  var isLocal: Bool { directory != nil }

  /// Whether the file is there and, as far as can be said without reading it, the right one.
  func isPresent() -> Bool {
    guard let directory else { return cache.holds(file, repository, commit) }
    guard linkTarget(finalPath) == nil, fileKind(finalPath) == .file(size: file.size),
      let text = smallTextFile(Self.metadataPath(directory, file.path))
    else { return false }
    let lines = text.split(separator: "\n", omittingEmptySubsequences: false)
    guard lines.count >= 3, lines[1] == file.etag, let time = Double(lines[2]) else { return false }
    var status = stat()
    // Whoever changed the file since then made it another.
    return stat(finalPath, &status) == 0 && Double(status.st_mtim.tv_sec) - 1 <= time
  }

  /// A file that holds the content already, which only has to be checked or put in place.
  func existingContent() -> String? {
    if directory == nil { return fileKind(finalPath) == .file(size: file.size) ? finalPath : nil }
    if linkTarget(finalPath) == nil, fileKind(finalPath) == .file(size: file.size) { return finalPath }
    let blob = cache.blob(repository, file.etag)
    return fileKind(blob) == .file(size: file.size) ? blob : nil
  }

  /// Makes the folders that lock and content need.
  func prepareFolders() throws(HubError) {
    if let directory {
      if file.path.hasPrefix(".cache/huggingface/") {
        throw HubError(
          .invalidAnswer, "The hub lists '\(file.path)', where notes about downloads are kept; that is refused.")
      }
      try makeFolders(of: ".cache/huggingface/download/" + file.path, below: directory)
      try makeFolders(of: file.path, below: directory)
      let notes = directory + "/.cache/huggingface"
      HubCache.tag(notes)
      if fileKind(notes + "/.gitignore") == .nothing { try replaceTextFile(notes + "/.gitignore", "*") }
    } else {
      try makeFolders(of: HubCache.folderName(repository) + "/x", below: cache.directory + "/.locks")
      try makeFolders(of: "blobs/x", below: cache.folder(repository))
    }
  }

  /// Puts content that was checked in its place.
  /// - Parameter path: a file beside the final one, which is moved, or an existing one, which is copied where it must be.
  func publish(_ path: String, moving: Bool) throws(HubError) {
    if path != finalPath {
      if moving {
        guard rename(path, finalPath) == 0 else { throw systemFailure("write", finalPath) }
        PartialFile.remove(partialPath)
      } else {
        try copyFile(from: path, to: finalPath)
      }
    }
    if let directory {
      try replaceTextFile(
        Self.metadataPath(directory, file.path), "\(commit)\n\(file.etag)\n\(wallSeconds())\n")
    } else {
      try cache.link(file.path, to: file.etag, repository, commit)
    }
  }
}
