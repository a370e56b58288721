import ApusHub
import Dispatch
import Glibc
import Synchronization

/// A model that a command was given, on this machine.
struct LocatedModel: Sendable {
  /// A directory, or a GGUF file.
  var path: String
  /// The repository's name, if the model came from a hub; a path in the cache would tell a client nothing.
  var name: String?
}

/// Finds a model that is named by a path or by the name of a repository (`OWNER/NAME[@REVISION][:QUANT]`). What exists as
/// a file or directory wins; then what the cache holds; anything else is pulled.
func locateModel(
  _ text: String, for purpose: FileSelection.Purpose = .model, isQuiet: Bool = false
) async throws -> LocatedModel {
  if fileExists(text) { return LocatedModel(path: text, name: HubCache.repository(ofSnapshot: text)) }
  guard RepositoryReference.isReference(text) else {
    throw CommandFailure(
      "There is no file or directory '\(text)'; name one, or a repository as OWNER/NAME.",
      status: ExitStatus.missingInput)
  }
  do {
    let reference = try RepositoryReference(text)
    let configuration = try HubConfiguration.current()
    let cached = HubCache(directory: configuration.cacheDirectory).lookUp(reference, for: purpose)
    if case .complete(let path) = cached { return LocatedModel(path: path, name: reference.repository) }
    // Who has a folder of that name most likely mistyped what follows.
    let folder = String(text.prefix { $0 != "/" })
    if cached == .missing && fileExists(folder) {
      throw CommandFailure(
        "There is no file or directory '\(text)' in '\(folder)'. If a repository of that name is meant, pull it first: apus pull \(text)",
        status: ExitStatus.missingInput)
    }
    let path = try await withHub(configuration) { hub in
      let display = PullDisplay(isQuiet: isQuiet)
      defer { display.finish() }
      return try await interruptible {
        try await hub.locate(
          reference, for: purpose,
          onPull: { plan in
            display.announce(
              "'\(text)' is no file here and not in the cache; pulling \(plan.files.count) files "
                + "(\(byteSize(plan.totalBytes))) from \(configuration.endpoint) to \(configuration.cacheDirectory).")
            if let note = plan.note { display.announce(note) }
          }, onEvent: display.show)
      }
    }
    return LocatedModel(path: path, name: reference.repository)
  } catch let error as HubError {
    throw CommandFailure(error)
  }
}

/// Speaks with a hub and closes its connections at the end.
func withHub<Result: Sendable>(
  _ configuration: HubConfiguration, _ body: (Hub) async throws -> Result
) async throws -> Result {
  let hub = try Hub(configuration)
  do {
    let result = try await body(hub)
    await hub.shutdown()
    return result
  } catch {
    await hub.shutdown()
    throw error
  }
}

/// Does something that Ctrl-C stops in order; pressed once more it ends the program at once.
func interruptible<Result: Sendable>(_ body: @escaping @Sendable () async throws -> Result) async throws -> Result {
  let interrupts = Interrupts()
  let task = Task { try await body() }
  let presses = PressCount()
  interrupts.set {
    guard presses.isFirst() else { _exit(ExitStatus.interrupted) }
    task.cancel()
    // A server that does not answer need not be waited for: what has arrived is on record at any time.
    DispatchQueue.global().asyncAfter(deadline: .now() + 3) {
      Terminal.error.line("apus: \(stoppedSentence)")
      _exit(ExitStatus.interrupted)
    }
  }
  let result = await task.result
  interrupts.set(nil)
  switch result {
  case .success(let value): return value
  case .failure where task.isCancelled:
    throw CommandFailure(stoppedSentence, status: ExitStatus.interrupted)
  case .failure(let error): throw error
  }
}

private let stoppedSentence = "Stopped. What was downloaded is kept; the same command goes on from there."

/// Counts presses of Ctrl-C.
private final class PressCount: Sendable {
  private let wasPressed = Atomic(false)

  func isFirst() -> Bool { !wasPressed.exchange(true, ordering: .relaxed) }
}

/// Shows a pull's progress: a bar with speed on a terminal, plain lines elsewhere.
final class PullDisplay: Sendable {
  private let bar: ProgressBar
  private let isQuiet: Bool
  private let lastShown = Mutex(-1.0)
  private let samples = Mutex<[(time: Double, bytes: Int)]>([])

  init(isQuiet: Bool) {
    self.isQuiet = isQuiet
    bar = ProgressBar("Pulling", total: 0, isQuiet: isQuiet)
  }

  /// Prints a line above the bar.
  func announce(_ text: String) { if !isQuiet { bar.say(text) } }

  /// Takes note of an event.
  func show(_ event: PullEvent) {
    switch event {
    case .progress(let done, let total):
      guard isDue(done, total) else { return }
      let rate = speed(done)
      let speed = rate.map { ", \(byteSize(Int($0)))/s" } ?? ""
      bar.update(done: Double(done), total: Double(total), note: "\(byteSize(done)) of \(byteSize(total))\(speed)")
    case .waiting(let path): announce("Another process fetches '\(path)'; waiting for it.")
    case .remark(let text): announce(text)
    }
  }

  /// Whether an update is worth drawing: bytes come in thousands of pieces a second.
  private func isDue(_ done: Int, _ total: Int) -> Bool {
    let now = monotonicSeconds()
    return lastShown.withLock { last in
      guard done >= total || now - last >= 0.05 else { return false }
      last = now
      return true
    }
  }

  /// Ends the bar.
  func finish() { bar.finish() }

  /// Bytes a second over the last seconds.
  private func speed(_ done: Int) -> Double? {
    let now = monotonicSeconds()
    return samples.withLock { samples in
      // A new sample each tenth of a second is enough for a window of five.
      if samples.last.map({ now - $0.time >= 0.1 || done < $0.bytes }) ?? true {
        if let last = samples.last, done < last.bytes { samples.removeAll() }
        samples.append((now, done))
      }
      while samples.count > 2 && now - samples[0].time > 5 { samples.removeFirst() }
      guard let first = samples.first, now - first.time > 0.5 else { return nil }
      return Double(done - first.bytes) / (now - first.time)
    }
  }
}

extension CommandFailure {
  /// The failure that fits the kind of a hub's error.
  init(_ error: HubError) {
    let status =
      switch error.kind {
      case .invalidName: ExitStatus.usage
      case .notFound, .offline, .nothingToPull: ExitStatus.missingInput
      case .unauthorized: ExitStatus.noPermission
      case .unreachable: ExitStatus.unavailable
      case .invalidAnswer, .checksumMismatch: ExitStatus.invalidInput
      case .noSpace, .fileSystem: ExitStatus.cannotWrite
      }
    self.init(error.message, status: status)
  }
}
