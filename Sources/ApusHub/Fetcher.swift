import AsyncHTTPClient
import Glibc
import NIOCore
import NIOHTTP1
import Synchronization

/// Fetches files with several transfers at once. Large files are divided into ranges, so that the last file does not
/// arrive over a single connection.
final class Fetcher: Sendable {
  private let hub: Hub
  private let commit: String
  private let repository: String
  private let ledger: PullLedger
  private let verifies: Bool
  private let onEvent: @Sendable (PullEvent) -> Void
  private let queue: Mutex<Queue>

  private struct Queue {
    /// Contents nobody has begun with, each with all files that have it.
    var waiting: [[PullTarget]]
    /// Files under way.
    var active: [ActiveFile] = []
    /// Workers that are about to begin with a file.
    var preparing = 0
  }

  /// A file under way.
  private final class ActiveFile: Sendable {
    let targets: [PullTarget]
    let partial: PartialFile
    /// Held as long as the object lives.
    let lock: FileLock
    let state: Mutex<State>

    struct State {
      var unclaimed: [Int]
      /// The chunk whose worker fetches the whole file, because the server knows no ranges.
      var wholeOwner: Int?
      var isFinished = false
      /// Where the hub sent us for the content.
      var location: HubURL?
    }

    var target: PullTarget { targets[0] }

    /// Whether the caller is the first to find the file whole, and so the one to check it.
    func claimEnd() -> Bool {
      state.withLock { state in
        defer { state.isFinished = true }
        return !state.isFinished
      }
    }

    init(_ targets: [PullTarget], _ partial: PartialFile, _ lock: FileLock) {
      self.targets = targets
      self.partial = partial
      self.lock = lock
      state = Mutex(State(unclaimed: partial.missingChunks.reversed()))
    }
  }

  init(
    hub: Hub, targets: [PullTarget], commit: String, repository: String, ledger: PullLedger, verifies: Bool,
    onEvent: @escaping @Sendable (PullEvent) -> Void
  ) {
    self.hub = hub
    self.commit = commit
    self.repository = repository
    self.ledger = ledger
    self.verifies = verifies
    self.onEvent = onEvent
    var groups: [[PullTarget]] = []
    var places: [String: Int] = [:]
    for target in targets {
      if let place = places[target.finalPath] {
        groups[place].append(target)
      } else {
        places[target.finalPath] = groups.count
        groups.append([target])
      }
    }
    queue = Mutex(Queue(waiting: groups.reversed()))
  }

  /// Fetches all files, or throws the first error, which ends all transfers.
  func run() async throws {
    guard queue.withLock({ !$0.waiting.isEmpty }) else { return }
    try await withThrowingTaskGroup(of: Void.self) { group in
      for _ in 0..<max(1, hub.configuration.workers) { group.addTask { try await self.work() } }
      do {
        try await group.waitForAll()
      } catch {
        group.cancelAll()
        throw error
      }
    }
  }

  private enum Work {
    case chunk(ActiveFile, Int)
    case begin([PullTarget])
    case pause
    case end
  }

  private func next() -> Work {
    queue.withLock { queue in
      for file in queue.active {
        if let chunk = file.state.withLock({ $0.unclaimed.popLast() }) { return .chunk(file, chunk) }
      }
      if let targets = queue.waiting.popLast() {
        queue.preparing += 1
        return .begin(targets)
      }
      // A file that is about to begin may have work for all.
      return queue.preparing > 0 ? .pause : .end
    }
  }

  private func work() async throws {
    while true {
      try Task.checkCancellation()
      switch next() {
      case .end: return
      case .pause: try await Task.sleep(for: .milliseconds(10))
      case .begin(let targets):
        defer { queue.withLock { $0.preparing -= 1 } }
        guard let file = try await begin(targets) else { continue }
        if file.partial.isComplete {
          // Nothing but the check is left, or there is nothing in it.
          try await finish(file)
        } else {
          queue.withLock { $0.active.append(file) }
        }
      case .chunk(let file, let chunk):
        try await fetch(file, chunk)
        guard file.partial.isComplete, file.claimEnd() else { continue }
        queue.withLock { queue in queue.active.removeAll { $0 === file } }
        try await finish(file)
      }
    }
  }

  /// Takes the lock of a content and opens what is there of it.
  /// - Returns: `nil` if the content is there by now and put in place.
  private func begin(_ targets: [PullTarget]) async throws -> ActiveFile? {
    let target = targets[0]
    for target in targets { try target.prepareFolders() }
    let lock = try await FileLock.acquire(target.lockPath) { onEvent(.waiting(target.file.path)) }
    if let path = target.existingContent() {
      // The name of a cached content is its checksum; a file in a folder may be anything of the same size.
      let mustCheck = verifies || (target.isLocal && path == target.finalPath && !target.isPresent())
      let isGood = mustCheck ? try await isIntact(path, target.file) : true
      if isGood {
        for target in targets {
          try target.publish(path, moving: false)
          ledger.set(target.file.path, target.file.size)
        }
        return nil
      }
      if target.isPresent() {
        onEvent(.remark("'\(target.file.path)' is damaged and is fetched again."))
      }
    }
    let configuration = hub.configuration
    let partial = try PartialFile(
      path: target.partialPath, size: target.file.size, chunkSize: configuration.chunkSize,
      prefixPath: target.prefixPath, keepsRecord: target.file.size > configuration.journalThreshold)
    ledger.set(target.file.path, partial.doneBytes)
    return ActiveFile(targets, partial, lock)
  }

  private func isIntact(_ path: String, _ file: HubFile) async throws -> Bool {
    let descriptor = open(path, O_RDONLY | O_CLOEXEC)
    guard descriptor >= 0 else { throw systemFailure("read", path) }
    defer { close(descriptor) }
    return try await Checksum.matches(descriptor: descriptor, path: path, size: file.size, etag: file.etag)
  }

  /// Checks a file that has arrived and puts it in its place. If it is not the one that was listed, it is fetched once
  /// more: what an earlier run left may be damaged.
  private func finish(_ file: ActiveFile) async throws {
    let target = file.target
    var file = file
    var hasTriedAgain = false
    while true {
      let isIntact = try await Checksum.matches(
        descriptor: file.partial.descriptor, path: file.partial.path, size: target.file.size, etag: target.file.etag)
      if isIntact { break }
      PartialFile.remove(target.partialPath)
      ledger.set(target.file.path, 0)
      guard !hasTriedAgain else {
        throw HubError(
          .checksumMismatch,
          "'\(target.file.path)' of \(repository) arrived twice and is not the file that the hub lists"
            + " (\(target.file.isSHA256 ? "SHA-256" : "git's SHA-1") should be \(target.file.etag)). It was thrown away."
        )
      }
      hasTriedAgain = true
      onEvent(.remark("'\(target.file.path)' does not have its checksum and is fetched again."))
      let configuration = hub.configuration
      let partial = try PartialFile(
        path: target.partialPath, size: target.file.size, chunkSize: configuration.chunkSize,
        keepsRecord: target.file.size > configuration.journalThreshold)
      file = ActiveFile(file.targets, partial, file.lock)
      // All workers help: the file is under way like any other, and this worker waits for its end.
      file.state.withLock { $0.isFinished = true }
      let again = file
      queue.withLock { $0.active.append(again) }
      defer { queue.withLock { queue in queue.active.removeAll { $0 === again } } }
      while let chunk = again.state.withLock({ $0.unclaimed.popLast() }) { try await fetch(again, chunk) }
      while !again.partial.isComplete { try await Task.sleep(for: .milliseconds(10)) }
    }
    guard fdatasync(file.partial.descriptor) == 0 else { throw systemFailure("write", file.partial.path) }
    for (index, target) in file.targets.enumerated() {
      try target.publish(index == 0 ? file.partial.path : file.target.finalPath, moving: index == 0)
      ledger.set(target.file.path, target.file.size)
    }
  }

  /// Fetches a chunk, in as many attempts as it takes while something arrives.
  private func fetch(_ file: ActiveFile, _ chunk: Int) async throws {
    let partial = file.partial
    var failures = 0
    while true {
      try Task.checkCancellation()
      let isOwner = file.state.withLock { $0.wholeOwner == chunk }
      if isOwner ? partial.isComplete : partial.isComplete(chunk) { return }
      let before = isOwner ? partial.doneBytes : partial.done(chunk)
      do {
        guard try await attempt(file, chunk) else { return }
        continue
      } catch {
        let isOwner = file.state.withLock { $0.wholeOwner == chunk }
        let after = isOwner ? partial.doneBytes : partial.done(chunk)
        if after - before >= min(hub.configuration.progressBytes, partial.chunkSize) { failures = 0 }
        failures += 1
        // The place that the hub named may have run out.
        file.state.withLock { $0.location = nil }
        try partial.flush(chunk)
        let failure = HubTransport.failure(error)
        if failures > 1, let failure = failure as? TransferFailure {
          onEvent(.remark("'\(file.target.file.path)': \(failure.reason); trying again."))
        }
        try await hub.transport.recover(
          from: failure, failures: failures, what: "'\(file.target.file.path)' of \(repository)")
      }
    }
  }

  /// One transfer of what a chunk lacks.
  /// - Returns: whether this worker goes on with the chunk; not if another fetches the whole file.
  private func attempt(_ file: ActiveFile, _ chunk: Int) async throws -> Bool {
    let partial = file.partial
    let transport = hub.transport
    let (location, isOwner) = file.state.withLock { ($0.location, $0.wholeOwner == chunk) }
    let range = partial.range(chunk)
    let start = isOwner ? 0 : range.lowerBound + partial.done(chunk)
    let end = isOwner ? partial.size : range.upperBound
    let isWhole = start == 0 && end == partial.size
    let url = location ?? hub.address(file.target.file.path, commit: commit, repository: repository)
    let answer = try await transport.exchange(
      .GET, url, headers: isWhole ? [] : [("Range", "bytes=\(start)-\(end - 1)")])
    let subject = "The file '\(file.target.file.path)' of \(repository)"
    try checkIdentity(answer, file.target.file)
    if answer.status == 416 {
      throw HubError(.invalidAnswer, "\(subject) is shorter at \(answer.url.host) than the hub lists it.")
    }
    try transport.check(answer, subject: subject, repository: repository)
    if answer.url.origin != transport.endpoint.origin { file.state.withLock { $0.location = answer.url } }
    let length = answer.headers.first(name: "Content-Length").flatMap { Int($0) }
    if let coding = answer.headers.first(name: "Content-Encoding"), coding.lowercased() != "identity" {
      throw HubError(
        .invalidAnswer,
        "\(answer.url.host) sends '\(file.target.file.path)' in the coding '\(printable(coding))', which was not asked for."
      )
    }
    let position: Int, limit: Int
    if answer.status == 206 {
      guard let given = contentRange(answer.headers), given.range.lowerBound == start, given.range.upperBound <= end,
        given.total == nil || given.total == partial.size
      else {
        throw TransferFailure.length("\(answer.url.host) answered with another range than was asked for")
      }
      (position, limit) = (start, given.range.upperBound)
    } else {
      // The whole file, asked for or not.
      if !isWhole {
        let isMine = file.state.withLock { state in
          if state.wholeOwner == nil { (state.wholeOwner, state.unclaimed) = (chunk, []) }
          return state.wholeOwner == chunk
        }
        guard isMine else { return false }
      }
      (position, limit) = (0, partial.size)
    }
    if let length, length != limit - position {
      throw TransferFailure.length("\(answer.url.host) announces \(length) bytes where \(limit - position) belong")
    }
    try await receive(answer, file, chunk, from: position, to: limit)
    return true
  }

  /// The hub must speak of the file that was listed.
  private func checkIdentity(_ answer: HubTransport.Answer, _ file: HubFile) throws {
    let isChecksum = answer.etag.map { isHexadecimal($0, count: 40) || isHexadecimal($0, count: 64) } ?? false
    if isChecksum, let etag = answer.etag, etag.utf8.count == file.etag.utf8.count, etag != file.etag {
      throw HubError(
        .invalidAnswer,
        "'\(file.path)' of \(repository) changed at the hub while it was being fetched. Run the command again.")
    }
    if let size = answer.size, size != file.size {
      throw HubError(
        .invalidAnswer, "The hub lists '\(file.path)' of \(repository) with \(file.size) bytes and sends \(size).")
    }
  }

  private func receive(
    _ answer: HubTransport.Answer, _ file: ActiveFile, _ chunk: Int, from start: Int, to limit: Int
  ) async throws {
    let configuration = hub.configuration
    let path = file.target.file.path
    var position = start
    var windowStart = monotonicSeconds()
    var windowBytes = 0
    for try await buffer in answer.body {
      try Task.checkCancellation()
      let count = buffer.readableBytes
      guard position + count <= limit else {
        throw TransferFailure.length("\(answer.url.host) sends more bytes than belong to the file")
      }
      let gained = try buffer.withUnsafeReadableBytes { try file.partial.write($0, at: position) }
      if gained > 0 { ledger.add(path, gained) }
      position += count
      windowBytes += count
      let elapsed = monotonicSeconds() - windowStart
      if elapsed >= configuration.stallWindow {
        guard Double(windowBytes) >= configuration.minimumRate * elapsed else {
          throw TransferFailure.connection(
            "\(answer.url.host) sent only \(windowBytes) bytes in \(Int(elapsed.rounded())) s")
        }
        windowStart += elapsed
        windowBytes = 0
      }
    }
    try Task.checkCancellation()
    try file.partial.flush(chunk)
    guard position == limit else {
      throw TransferFailure.length("\(answer.url.host) sent \(position - start) of \(limit - start) bytes")
    }
  }
}

/// The range that a part of a file is, and the size of the whole if it is said.
func contentRange(_ headers: HTTPHeaders) -> (range: Range<Int>, total: Int?)? {
  guard let text = headers.first(name: "Content-Range"), text.hasPrefix("bytes ") else { return nil }
  let parts = text.dropFirst(6).split(separator: "/")
  guard parts.count == 2 else { return nil }
  let ends = parts[0].split(separator: "-")
  guard ends.count == 2, let first = Int(ends[0]), let last = Int(ends[1]), first >= 0, last >= first, last < Int.max
  else {
    return nil
  }
  if parts[1] == "*" { return (first..<last + 1, nil) }
  guard let total = Int(parts[1]), total > last else { return nil }
  return (first..<last + 1, total)
}
