import ApusCore
import Glibc
import NIOHTTP1
import Synchronization

/// What is to be pulled, and where to.
package struct PullRequest: Sendable {
  /// The repository and revision.
  package var reference: RepositoryReference
  /// Which files.
  package var selection: FileSelection
  /// A folder that receives real files instead of the cache.
  package var localDirectory: String?
  /// Whether files that are there are read and checked against their checksums.
  package var verifies = false

  /// Asks for what running the model needs.
  package init(_ reference: RepositoryReference, selection: FileSelection? = nil, localDirectory: String? = nil) {
    self.reference = reference
    self.selection = selection ?? FileSelection(quantization: reference.quantization)
    self.localDirectory = localDirectory.map(absolutePath)
  }
}

/// What a pull would do.
package struct PullPlan: Sendable {
  /// A file of the plan.
  package struct File: Sendable {
    /// The file.
    package var file: HubFile
    /// Whether it is there already.
    package var isPresent: Bool
    /// Bytes of it that an earlier run left.
    package var resumableBytes: Int
  }

  /// What was asked for.
  package var request: PullRequest
  /// The commit that the revision means.
  package var commit: String
  /// The files, in the order in which they are fetched.
  package var files: [File]
  /// Files of the repository that are not fetched, with the reason in a word or two.
  package var leftOut: [(file: HubFile, reason: String)]
  /// The GGUF file that stands for the model, if it is one.
  package var mainFile: String?
  /// What was chosen among several possibilities, as a sentence.
  package var note: String?
  /// All files of the commit, for noting what it does not hold.
  var listed: Set<String>

  /// Bytes of all files of the plan.
  package var totalBytes: Int { files.reduce(0) { $0 + $1.file.size } }
  /// Bytes still to fetch.
  package var missingBytes: Int { files.reduce(0) { $0 + ($1.isPresent ? 0 : $1.file.size - $1.resumableBytes) } }
}

/// What a pull did.
package struct PullResult: Sendable {
  /// What to load: the snapshot's or the local folder, or the GGUF file in it.
  package var path: String
  /// The commit.
  package var commit: String
  /// Bytes that came over the network.
  package var downloadedBytes: Int
}

/// What is told while a pull goes on.
package enum PullEvent: Sendable {
  /// Bytes there and bytes wanted, of all files together.
  case progress(done: Int, total: Int)
  /// Another process fetches this file; its end is waited for.
  case waiting(String)
  /// Something that a person may want to know.
  case remark(String)
}

/// A model hub and the cache of what came from it.
package final class Hub: Sendable {
  /// How the hub is spoken to.
  package let configuration: HubConfiguration
  /// The cache.
  package let cache: HubCache
  let transport: HubTransport

  /// Prepares to speak with a hub; nothing is sent yet.
  package init(_ configuration: HubConfiguration) throws(HubError) {
    self.configuration = configuration
    cache = HubCache(directory: configuration.cacheDirectory)
    transport = try HubTransport(configuration)
  }

  /// Closes the connections. Must be called once, last.
  package func shutdown() async { await transport.shutdown() }

  // MARK: Listing

  /// The commit of a revision and the files that it holds.
  package func list(_ reference: RepositoryReference) async throws -> RepositoryListing {
    if configuration.isOffline {
      throw HubError(.offline, "HF_HUB_OFFLINE is set, so \(configuration.endpoint) is not asked for \(reference).")
    }
    let repository = reference.repository
    let api = transport.endpoint.appending("/api/models/" + repository)
    let subject = "The repository \(repository) or its revision '\(reference.revision)'"
    let (info, _) = try await transport.json(
      api.appending("/revision/" + percentEncoded(reference.revision)), subject: subject, repository: repository)
    guard let commit = info["sha"]?.stringValue, isHexadecimal(commit, count: 40) else {
      throw HubError(.invalidAnswer, "\(configuration.endpoint) does not say which commit '\(reference.revision)' is.")
    }
    if isHexadecimal(reference.revision, count: 40) && commit != reference.revision {
      throw HubError(
        .invalidAnswer, "\(configuration.endpoint) was asked for \(reference.revision) and answers with \(commit).")
    }
    do {
      return try await RepositoryListing(commit: commit, files: tree(api, commit: commit, repository: repository))
    } catch let error as HubError where error.kind == .notFound {
      // A mirror without listings: names from the revision, the rest from each file's head.
      let names = (info["siblings"]?.arrayValue ?? []).compactMap { $0["rfilename"]?.stringValue }
      guard !names.isEmpty else { throw error }
      return try await RepositoryListing(commit: commit, files: heads(names, commit: commit, repository: repository))
    }
  }

  private func tree(_ api: HubURL, commit: String, repository: String) async throws -> [HubFile] {
    var files: [HubFile] = []
    var page: HubURL? = api.appending("/tree/\(commit)?recursive=true&expand=false")
    var pages = 0
    while let url = page {
      pages += 1
      guard pages <= configuration.maxPages, files.count <= configuration.maxFiles else {
        throw HubError(
          .invalidAnswer, "\(repository) lists more than \(configuration.maxFiles) files; that is refused.")
      }
      let (value, next) = try await transport.json(
        url, subject: "The listing of \(repository)", repository: repository)
      files += try ListingCheck.files(page: value)
      page = next
    }
    guard files.count <= configuration.maxFiles else {
      throw HubError(.invalidAnswer, "\(repository) lists more than \(configuration.maxFiles) files; that is refused.")
    }
    try ListingCheck.check(files)
    return files
  }

  private func heads(_ names: [String], commit: String, repository: String) async throws -> [HubFile] {
    guard names.count <= configuration.maxFiles else {
      throw HubError(.invalidAnswer, "\(repository) lists more than \(configuration.maxFiles) files; that is refused.")
    }
    for name in names {
      if let reason = ListingCheck.complaint(path: name) {
        throw HubError(.invalidAnswer, "The hub lists a file '\(printable(name))', which is refused: \(reason).")
      }
    }
    let workers = min(max(1, configuration.workers), names.count)
    let result = try await withThrowingTaskGroup(of: [(Int, HubFile)].self) { group in
      for worker in 0..<workers {
        group.addTask {
          var files: [(Int, HubFile)] = []
          for index in stride(from: worker, to: names.count, by: workers) {
            files.append((index, try await self.head(names[index], commit: commit, repository: repository)))
          }
          return files
        }
      }
      var files: [(Int, HubFile)] = []
      for try await part in group { files += part }
      return files.sorted { $0.0 < $1.0 }.map(\.1)
    }
    try ListingCheck.check(result)
    return result
  }

  private func head(_ path: String, commit: String, repository: String) async throws -> HubFile {
    let url = address(path, commit: commit, repository: repository)
    return try await transport.retrying("'\(path)' of \(repository)") {
      let answer = try await transport.exchange(.HEAD, url)
      try transport.check(answer, subject: "The file '\(path)' of \(repository)", repository: repository)
      guard let size = answer.size ?? answer.headers.first(name: "Content-Length").flatMap({ Int($0) }),
        let etag = answer.etag
      else {
        throw HubError(.invalidAnswer, "\(configuration.endpoint) does not say the size and checksum of '\(path)'.")
      }
      let file = HubFile(path: path, size: size, etag: etag)
      try ListingCheck.check(file)
      return file
    }
  }

  /// The address of a file's content.
  func address(_ path: String, commit: String, repository: String) -> HubURL {
    let escaped = path.split(separator: "/").map { percentEncoded(String($0)) }.joined(separator: "/")
    return transport.endpoint.appending("/\(repository)/resolve/\(commit)/\(escaped)")
  }

  // MARK: Planning

  /// Finds out what a pull would do. Nothing is written.
  package func plan(_ request: PullRequest) async throws -> PullPlan {
    let listing = try await list(request.reference)
    let repository = request.reference.repository
    let choice = try request.selection.choose(from: listing.files, of: repository)
    var total = 0
    for file in choice.files {
      let (sum, overflow) = total.addingReportingOverflow(file.size)
      guard !overflow, sum <= ListingCheck.maxFileSize else {
        throw HubError(.invalidAnswer, "\(repository) would take more than 64 TiB, which is not believed.")
      }
      total = sum
    }
    var plan = PullPlan(
      request: request, commit: listing.commit, files: [], leftOut: choice.leftOut, mainFile: choice.mainFile,
      note: choice.note, listed: Set(listing.files.map(\.path)))
    for file in choice.files {
      let target = target(file, plan)
      let isPresent = target.isPresent()
      plan.files.append(
        PullPlan.File(
          file: file, isPresent: isPresent,
          resumableBytes: isPresent ? 0 : PartialFile.resumableBytes(target.partialPath, size: file.size)))
    }
    return plan
  }

  /// Where a file of a plan goes.
  func target(_ file: HubFile, _ plan: PullPlan) -> PullTarget {
    let repository = plan.request.reference.repository
    if let directory = plan.request.localDirectory {
      return PullTarget(local: file, commit: plan.commit, directory: directory, cache: cache, repository: repository)
    }
    return PullTarget(cached: file, commit: plan.commit, cache: cache, repository: repository)
  }

  // MARK: Fetching

  /// Carries a plan out. A run that is stopped in any way is continued by the next.
  /// - Parameter onEvent: called from several tasks, often.
  package func fetch(_ plan: PullPlan, onEvent: @escaping @Sendable (PullEvent) -> Void) async throws -> PullResult {
    let base = plan.request.localDirectory ?? cache.directory
    let missing = plan.missingBytes
    // Some room must stay for records and for others.
    if missing > 0, let free = freeBytes(at: base), free < missing + (16 << 20) {
      throw HubError(
        .noSpace,
        "\(plan.request.reference) needs \(sizeText(missing)) more, but only \(sizeText(free)) are free at \(base).")
    }
    try makeDirectories(base)
    let repository = plan.request.reference.repository
    if plan.request.localDirectory == nil {
      HubCache.tag(cache.directory)
      try makeDirectories(cache.folder(repository) + "/blobs")
      try makeDirectories(cache.snapshot(repository, plan.commit))
    }
    let ledger = PullLedger(total: plan.totalBytes, onEvent: onEvent)
    for entry in plan.files {
      ledger.set(entry.file.path, entry.isPresent ? entry.file.size : entry.resumableBytes)
    }
    // Descriptions first, then weights: whoever finds weights in the cache then finds the rest as well.
    for isWeights in [false, true] {
      let targets = plan.files.filter {
        FileSelection.isWeights($0.file.path) == isWeights && (!$0.isPresent || plan.request.verifies)
      }.map { target($0.file, plan) }
      let fetcher = Fetcher(
        hub: self, targets: targets, commit: plan.commit, repository: repository, ledger: ledger,
        verifies: plan.request.verifies, onEvent: onEvent)
      try await fetcher.run()
    }
    let directory: String
    if let local = plan.request.localDirectory {
      directory = local
    } else {
      directory = cache.snapshot(repository, plan.commit)
      for name in Self.optionalNames where !plan.listed.contains(name) {
        cache.noteAbsence(of: name, repository, plan.commit)
      }
      try cache.setCommit(plan.commit, plan.request.reference)
    }
    return PullResult(
      path: plan.mainFile.map { directory + "/" + $0 } ?? directory, commit: plan.commit,
      downloadedBytes: ledger.downloadedBytes)
  }

  /// Files that programs look for in every repository.
  private static let optionalNames = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "adapter_config.json",
    "model.safetensors", "model.safetensors.index.json",
  ]
}

/// Bytes in the unit that keeps the number short.
func sizeText(_ bytes: Int) -> String {
  let units = ["B", "KiB", "MiB", "GiB", "TiB"]
  var value = Double(bytes)
  var unit = 0
  while value >= 1024 && unit < units.count - 1 {
    value /= 1024
    unit += 1
  }
  return unit == 0 ? "\(bytes) B" : "\((value * 100).rounded() / 100) \(units[unit])"
}

/// Counts bytes per file and tells the sums.
final class PullLedger: Sendable {
  private let total: Int
  private let onEvent: @Sendable (PullEvent) -> Void
  private let state = Mutex(State())

  private struct State {
    var done: [String: Int] = [:]
    var sum = 0
    var downloaded = 0
  }

  init(total: Int, onEvent: @escaping @Sendable (PullEvent) -> Void) {
    self.total = total
    self.onEvent = onEvent
  }

  /// Bytes that came over the network.
  var downloadedBytes: Int { state.withLock { $0.downloaded } }

  /// Sets what is there of a file.
  func set(_ path: String, _ bytes: Int) {
    tell { state in
      state.sum += bytes - (state.done[path] ?? 0)
      state.done[path] = bytes
    }
  }

  /// Adds bytes that have just come over the network.
  func add(_ path: String, _ bytes: Int) {
    tell { state in
      state.sum += bytes
      state.done[path, default: 0] += bytes
      state.downloaded += bytes
    }
  }

  private func tell(_ change: (inout State) -> Void) {
    let sum = state.withLock { state in
      change(&state)
      return state.sum
    }
    onEvent(.progress(done: sum, total: total))
  }
}
