import ApusCore
import Glibc

/// The cache directory in the layout of huggingface_hub, which it shares with every program that uses that library.
///
///     models--OWNER--NAME/refs/main                     the commit that a revision meant when it was last asked for
///     models--OWNER--NAME/blobs/CHECKSUM                contents
///     models--OWNER--NAME/snapshots/COMMIT/config.json  -> ../../blobs/CHECKSUM
///     models--OWNER--NAME/.no_exist/COMMIT/FILE         known not to exist
///     .locks/models--OWNER--NAME/CHECKSUM.lock          who holds this fetches that content
package struct HubCache: Sendable {
  /// The cache directory.
  package let directory: String

  /// A cache in a directory, which need not exist.
  package init(directory: String) { self.directory = directory }

  /// The folder's name of a repository.
  static func folderName(_ repository: String) -> String {
    "models--" + repository.split(separator: "/").joined(separator: "--")
  }

  /// The folder of a repository.
  func folder(_ repository: String) -> String { directory + "/" + Self.folderName(repository) }
  /// The folder of a repository's files at a commit.
  package func snapshot(_ repository: String, _ commit: String) -> String {
    folder(repository) + "/snapshots/" + commit
  }
  func blob(_ repository: String, _ etag: String) -> String { folder(repository) + "/blobs/" + etag }
  func lock(_ repository: String, _ etag: String) -> String {
    directory + "/.locks/" + Self.folderName(repository) + "/" + etag + ".lock"
  }

  /// The commit that a revision meant when it was last asked for.
  package func commit(_ reference: RepositoryReference) -> String? {
    if isHexadecimal(reference.revision, count: 40) { return reference.revision }
    guard let text = smallTextFile(folder(reference.repository) + "/refs/" + reference.revision) else { return nil }
    let commit = String(text.prefix { !$0.isWhitespace })
    return isHexadecimal(commit, count: 40) ? commit : nil
  }

  /// Notes the commit that a revision means.
  func setCommit(_ commit: String, _ reference: RepositoryReference) throws(HubError) {
    if reference.revision == commit { return }
    let refs = folder(reference.repository) + "/refs"
    if self.commit(reference) == commit { return }
    try makeFolders(of: reference.revision, below: refs)
    try replaceTextFile(refs + "/" + reference.revision, commit)
  }

  /// Whether a snapshot holds a file of the content listed.
  func holds(_ file: HubFile, _ repository: String, _ commit: String) -> Bool {
    let path = snapshot(repository, commit) + "/" + file.path
    guard fileKind(path) == .file(size: file.size) else { return false }
    // Where links cannot be made the file itself lies here, and its name says nothing of its content.
    return linkTarget(path).map { $0.hasSuffix("/" + file.etag) } ?? true
  }

  /// Makes a snapshot's file a link to its content.
  func link(_ path: String, to etag: String, _ repository: String, _ commit: String) throws(HubError) {
    let snapshot = snapshot(repository, commit)
    try makeFolders(of: path, below: snapshot)
    let depth = path.split(separator: "/").count
    let up = String(repeating: "../", count: depth + 1)
    try replaceLink(snapshot + "/" + path, target: up + "blobs/" + etag)
  }

  /// Notes that a commit holds no file of a name, so that other programs need not ask.
  func noteAbsence(of path: String, _ repository: String, _ commit: String) {
    let base = folder(repository) + "/.no_exist/" + commit
    guard (try? makeFolders(of: path, below: base)) != nil else { return }
    let descriptor = open(base + "/" + path, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0o666)
    if descriptor >= 0 { close(descriptor) }
  }

  /// Marks the directory as a cache for programs that make backups (bford.info/cachedir).
  static func tag(_ directory: String) {
    let path = directory + "/CACHEDIR.TAG"
    guard fileKind(path) == .nothing else { return }
    try? replaceTextFile(
      path,
      "Signature: 8a477f597d28d172789f06886806bc55\n# A cache of models in the layout of huggingface_hub.\n"
        + "# See https://bford.info/cachedir/\n")
  }

  /// The repository whose snapshot a path lies in, as the folders' names say it.
  package static func repository(ofSnapshot path: String) -> String? {
    let parts = absolutePath(path).split(separator: "/").map(String.init)
    guard let index = parts.lastIndex(of: "snapshots"), index > 0, index + 1 < parts.count,
      parts[index - 1].hasPrefix("models--"), isHexadecimal(parts[index + 1], count: 40)
    else { return nil }
    let name = parts[index - 1].dropFirst("models--".count).split(separator: "--", maxSplits: 1).joined(separator: "/")
    return RepositoryReference.isReference(name) ? name : nil
  }

  /// What the cache has of a model.
  package enum Lookup: Sendable, Equatable {
    /// Everything: the path to load, a directory or a GGUF file.
    case complete(path: String)
    /// Something is missing. `path` is there if the weights are, and only things that not every model has are not.
    case incomplete(missing: [String], path: String?)
    /// Nothing of this revision.
    case missing
  }

  /// Looks a model up without the network.
  package func lookUp(_ reference: RepositoryReference, for purpose: FileSelection.Purpose) -> Lookup {
    guard let commit = commit(reference) else { return .missing }
    let directory = snapshot(reference.repository, commit)
    guard fileKind(directory) == .directory else { return .missing }
    return Self.examine(directory, quantization: reference.quantization, for: purpose)
  }

  /// Whether a directory holds what a model needs.
  static func examine(
    _ directory: String, quantization: String?, for purpose: FileSelection.Purpose
  ) -> Lookup {
    let files = files(below: directory)
    let names = Set(files.map(\.path))
    let hasTokenizer = names.contains { FileSelection.tokenizerNames.contains($0) || $0.hasSuffix(".tiktoken") }
    let models = GGUFModel.models(in: files)
    let hasTensors = names.contains { $0.hasSuffix(".safetensors") && !$0.contains("/") }
    if quantization == nil && purpose == .tokenizer && hasTokenizer { return .complete(path: directory) }
    if quantization != nil || (!models.isEmpty && !hasTensors) {
      let picked =
        try? quantization.map { form throws(HubError) in
          try GGUFModel.pick(form, from: models, of: "").0
        } ?? GGUFModel.pickDefault(from: models, of: "").0
      guard let model = picked else {
        return .incomplete(missing: [quantization.map { "a GGUF file of the form \($0)" } ?? "a GGUF file"], path: nil)
      }
      guard model.parts.count == model.count else {
        return .incomplete(
          missing: ["\(model.count - model.parts.count) of \(model.count) parts of \(model.stem)"], path: nil)
      }
      return .complete(path: directory + "/" + model.parts[0].path)
    }
    var missing: [String] = []
    if !names.contains("config.json") { missing.append("config.json") }
    if purpose == .model {
      if names.contains("model.safetensors.index.json") {
        let index = smallFile(directory + "/model.safetensors.index.json", limit: 256 << 20)
        let map = index.flatMap { try? JSONValue.parse($0) }?["weight_map"]?.objectValue
        let shards = Set((map.map(Array.init) ?? []).compactMap(\.value.stringValue))
        if shards.isEmpty { missing.append("a readable model.safetensors.index.json") }
        missing += shards.filter { !names.contains($0) }.sorted()
      } else if !names.contains("model.safetensors") {
        missing.append("model.safetensors")
      }
    }
    guard missing.isEmpty else { return .incomplete(missing: missing, path: nil) }
    return hasTokenizer ? .complete(path: directory) : .incomplete(missing: ["a tokenizer"], path: directory)
  }

  /// The regular files below a directory, links followed, four levels deep.
  private static func files(below directory: String, prefix: String = "", depth: Int = 0) -> [HubFile] {
    var files: [HubFile] = []
    for name in entryNames(directory + (prefix.isEmpty ? "" : "/" + prefix), limit: 10_000) {
      if name.hasSuffix(".tmp") || (prefix.isEmpty && name == ".cache") { continue }
      let path = prefix.isEmpty ? name : prefix + "/" + name
      switch fileKind(directory + "/" + path) {
      case .file(let size): files.append(HubFile(path: path, size: size, etag: ""))
      case .directory: if depth < 3 { files += self.files(below: directory, prefix: path, depth: depth + 1) }
      default: break
      }
    }
    return files
  }
}
