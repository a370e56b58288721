import ApusCore
import Logging
import Synchronization

/// Runs the batches of a store, one after another in the order of their making, a few lines of one at a time.
///
/// All that matters is in the store: each line's result is kept when it is there, so that a batch goes on after the end of
/// the process where it was, and no line that has a result is run again.
final class BatchRunner: Sendable {
  private struct State {
    var loop: Task<Void, Never>?
    /// The batch that is being run, and the task that runs its lines.
    var current: (id: String, lines: Task<Outcome, Never>)?
    var isStopping = false
    /// Whether there is news since the loop last looked into the store.
    var isAwake = false
  }

  /// How the running of a batch's lines ended.
  private enum Outcome: Sendable {
    /// All lines have results.
    case complete
    /// The completion window has passed.
    case expired
    case cancelled
    /// The server stops; another process goes on.
    case stopped
    case failed(code: String, message: String)
  }

  private let store: any ResponseStore
  private let concurrency: Int
  private let state = Mutex(State())

  init(_ store: any ResponseStore, concurrency: Int) {
    self.store = store
    self.concurrency = concurrency
  }

  /// Looks for batches to run.
  func wake(_ server: ServerState) {
    state.withLock { state in
      state.isAwake = true
      if state.isStopping || state.loop != nil { return }
      state.loop = Task { await self.loop(server) }
    }
  }

  /// Begins no more lines from now on.
  func beginStopping() { state.withLock { $0.isStopping = true } }

  /// Begins no more lines, and returns when those in work have ended.
  func stop() async {
    beginStopping()
    await state.withLock { $0.loop }?.value
  }

  /// Makes the lines of a batch that are in work end soon. The batch's state in the store says that it is to end.
  func cancelLines(of id: String) {
    let lines = state.withLock { $0.current?.id == id ? $0.current?.lines : nil }
    lines?.cancel()
  }

  private var isStopping: Bool { state.withLock { $0.isStopping } }

  private func loop(_ server: ServerState) async {
    while true {
      state.withLock { $0.isAwake = false }
      do {
        while !isStopping, let batch = try await store.oldestUnfinishedBatch() {
          if try await !run(batch, server) { break }
        }
      } catch {
        server.logger.error("Batches cannot go on: \(error)")
      }
      let isDone = state.withLock { state in
        if state.isAwake, !state.isStopping { return false }
        state.loop = nil
        return true
      }
      if isDone { return }
    }
  }

  /// Runs a batch to its end. Returns whether it has come there.
  private func run(_ batch: StoredBatch, _ server: ServerState) async throws(EngineError) -> Bool {
    let id = batch.id
    let lines = Task { await self.runLines(of: batch, server) }
    state.withLock { $0.current = (id, lines) }
    // A cancellation that came before the lines' task was known is in the store.
    if try await store.batch(id)?.object["status"] == "cancelling" { lines.cancel() }
    let outcome = await lines.value
    state.withLock { $0.current = nil }
    if case .stopped = outcome { return false }
    let now = unixTime()
    _ = try await store.updateBatch(id) { batch in
      if batch.object["status"] != "cancelling" { batch.object["status"] = "finalizing" }
      batch.object["finalizing_at"] = .int(Int64(now))
    }
    let counts = try await store.resultCounts(ofBatch: id)
    let expiry = batch.object["output_expires_after"]?["seconds"]?.intValue
    func file(_ kind: String) -> StoredFile {
      StoredFile(
        id: freshID("file-"), created: now, expires: expiry.map { now + $0 }, name: "\(id)_\(kind).jsonl",
        purpose: "batch_output")
    }
    let (output, errors) = (file("output"), file("error"))
    let finished = try await store.finishBatch(id, output: output, errors: errors) { batch, hasOutput, hasErrors in
      batch.isFinished = true
      if hasOutput { batch.object["output_file_id"] = .string(output.id) }
      if hasErrors { batch.object["error_file_id"] = .string(errors.id) }
      batch.object["request_counts"] = requestCounts(
        total: batch.object["request_counts"]?["total"]?.intValue ?? 0, counts.completed, counts.failed)
      let status: String
      switch outcome {
      case _ where batch.object["status"] == "cancelling": status = "cancelled"
      case .failed(let code, let message):
        status = "failed"
        batch.object["errors"] = batchErrors(code, message)
      case .expired: status = "expired"
      default: status = "completed"
      }
      batch.object["status"] = .string(status)
      batch.object[status + "_at"] = .int(Int64(now))
    }
    server.logger.info(
      "Batch \(finished?.object["status"]?.stringValue ?? "lost")", metadata: ["batch": "\(id)"])
    return true
  }

  private func runLines(of batch: StoredBatch, _ server: ServerState) async -> Outcome {
    do {
      return try await runLinesOrThrow(of: batch, server)
    } catch let error as EngineError {
      if Task.isCancelled { return .cancelled }
      return .failed(code: error.code == .outOfMemory ? "store_full" : "server_error", message: error.message)
    } catch {
      return .cancelled
    }
  }

  private func runLinesOrThrow(of batch: StoredBatch, _ server: ServerState) async throws -> Outcome {
    let endpoint = batch.object["endpoint"]?.stringValue ?? ""
    let fileID = batch.object["input_file_id"]?.stringValue ?? ""
    guard let handler = server.batchHandler(of: endpoint) else {
      return .failed(code: "invalid_endpoint", message: "There is no endpoint \(endpoint).")
    }
    let lineLimit = server.configuration.maxBodyBytes
    var total = batch.object["request_counts"]?["total"]?.intValue ?? 0
    if batch.object["status"] == "validating" {
      var reader = LineReader(store, fileID, limit: lineLimit)
      while try await reader.next() != nil {
        if isStopping { return .stopped }
        if reader.count > batchLineLimit {
          return .failed(
            code: "too_many_requests", message: "The file has more than the \(batchLineLimit) lines that are allowed.")
        }
      }
      total = reader.count
      if total == 0 { return .failed(code: "empty_file", message: "The input file holds no requests.") }
      let (now, count) = (unixTime(), total)
      _ = try await store.updateBatch(batch.id) { batch in
        if batch.object["status"] == "validating" { batch.object["status"] = "in_progress" }
        batch.object["in_progress_at"] = .int(Int64(now))
        batch.object["request_counts"] = requestCounts(total: count, 0, 0)
      }
    }
    let expires = batch.object["expires_at"]?.intValue ?? .max
    let recorded = try await store.recordedLines(ofBatch: batch.id)
    return try await withThrowingTaskGroup(of: BatchResult?.self) { group in
      var reader = LineReader(store, fileID, limit: lineLimit)
      var names: Set<String> = []
      var inWork = 0
      var hasExpired = false
      while let text = try await reader.next() {
        let line = BatchLine(text, number: reader.count - 1, endpoint: endpoint, &names)
        if recorded.contains(line.number) { continue }
        if inWork == concurrency {
          if let result = try await group.next() { try await record(result, batch.id) }
          inWork -= 1
        }
        if Task.isCancelled || isStopping { break }
        if let error = line.error {
          try await record(line.result(error: error.code, error.message), batch.id)
        } else if unixTime() >= expires {
          hasExpired = true
          try await record(
            line.result(
              error: "batch_expired",
              "This request could not be executed before the completion window expired."), batch.id)
        } else {
          inWork += 1
          group.addTask { try await self.run(line, handler) }
        }
      }
      while let result = try await group.next() { try await record(result, batch.id) }
      if Task.isCancelled { return .cancelled }
      if isStopping { return .stopped }
      if reader.count < total {
        return .failed(code: "input_file_missing", message: "The input file has been deleted.")
      }
      return hasExpired ? .expired : .complete
    }
  }

  /// Runs one line. `nil` if it has no result because the batch is cancelled or the server stops.
  private func run(
    _ line: BatchLine,
    _ handler: @Sendable (_ requestID: String, _ body: JSONValue) async throws -> (status: Int, body: [UInt8])
  ) async throws -> BatchResult? {
    let requestID = freshID("req_")
    var pause = 0.05
    while true {
      if Task.isCancelled || isStopping { return nil }
      let (status, body) = try await handler(requestID, line.body)
      // A full queue is no fault of the line: it waits, longer each time, up to two seconds.
      if status == 429 {
        try? await Task.sleep(for: .seconds(pause))
        pause = min(2, pause * 2)
        continue
      }
      if Task.isCancelled || isStopping, status >= 500 || isAborted(body) { return nil }
      return line.result(status: status, requestID: requestID, body: body)
    }
  }

  /// Whether an answer was broken off.
  private func isAborted(_ body: [UInt8]) -> Bool {
    guard let json = try? JSONValue.parse(body) else { return false }
    if json["error"]?["code"] == "aborted" { return true }
    return json["choices"]?.arrayValue?.contains { $0["finish_reason"] == "abort" } ?? false
  }

  private func record(_ result: BatchResult?, _ id: String) async throws(EngineError) {
    guard let result else { return }
    let store = store
    // In a task of its own, since what is there is worth keeping though the batch be cancelled.
    let written = await Task { () -> EngineError? in
      do throws(EngineError) {
        try await store.record(result, inBatch: id)
        return nil
      } catch {
        return error
      }
    }.value
    if let written { throw written }
  }
}

/// The most lines that a batch may have; OpenAI's limit.
let batchLineLimit = 50_000

/// `request_counts` of a batch.
func requestCounts(total: Int, _ completed: Int, _ failed: Int) -> JSONValue {
  ["total": .int(Int64(total)), "completed": .int(Int64(completed)), "failed": .int(Int64(failed))]
}

/// `errors` of a batch.
func batchErrors(_ code: String, _ message: String) -> JSONValue {
  [
    "object": "list",
    "data": [["code": .string(code), "message": .string(message), "param": nil, "line": nil]],
  ]
}

/// Reads a file's lines, blank ones left out, a piece of the file at a time.
struct LineReader {
  /// A line; `nil` in place of its bytes is one that is too long.
  struct Line {
    var bytes: [UInt8]?
  }

  private let store: any ResponseStore
  private let file: String
  private let limit: Int
  private var offset = 0
  private var piece: [UInt8] = []
  private var position = 0
  /// Lines given so far.
  private(set) var count = 0

  init(_ store: any ResponseStore, _ file: String, limit: Int) {
    self.store = store
    self.file = file
    self.limit = limit
  }

  mutating func next() async throws(EngineError) -> Line? {
    var line: [UInt8] = []
    var isTooLong = false
    var isAtEnd = false
    while !isAtEnd {
      if position == piece.count {
        piece = try await store.read(file: file, from: offset)
        offset += piece.count
        position = 0
        isAtEnd = piece.isEmpty
      }
      let end = piece[position...].firstIndex(of: UInt8(ascii: "\n"))
      let part = piece[position..<(end ?? piece.count)]
      if line.count + part.count > limit {
        isTooLong = true
        line = []
      } else if !isTooLong {
        line += part
      }
      position = end.map { $0 + 1 } ?? piece.count
      if end == nil && !isAtEnd { continue }
      if isTooLong {
        count += 1
        return Line(bytes: nil)
      }
      if line.contains(where: { $0 != 0x20 && $0 != 0x09 && $0 != 0x0D }) {
        count += 1
        return Line(bytes: line)
      }
      line = []
    }
    return nil
  }
}

/// One line of a batch's input.
struct BatchLine: Sendable {
  let number: Int
  private(set) var name: JSONValue = .null
  private(set) var body: JSONValue = .null
  /// Why the line cannot be run.
  private(set) var error: (code: String, message: String)?

  /// Reads a line.
  ///
  /// - Parameter names: the `custom_id`s seen so far.
  init(_ line: LineReader.Line, number: Int, endpoint: String, _ names: inout Set<String>) {
    self.number = number
    guard let bytes = line.bytes else {
      error = ("line_too_large", "The line is larger than a request's body may be.")
      return
    }
    let json: JSONValue
    do {
      json = try JSONValue.parse(bytes, depthLimit: 64)
    } catch {
      self.error = ("invalid_json_line", "The line is not valid JSON: \(error.description).")
      return
    }
    guard json.objectValue != nil else {
      error = ("invalid_json_line", "Expected an object, got \(json.kindName).")
      return
    }
    guard let name = json["custom_id"]?.stringValue, !name.isEmpty, name.utf8.count <= 512 else {
      error = ("missing_required_parameter", "custom_id is required: a string of 1 to 512 bytes.")
      return
    }
    self.name = .string(name)
    if !names.insert(name).inserted {
      error = ("duplicate_custom_id", "The custom_id \(name.debugDescription) is given twice.")
    } else if json["method"] != "POST" {
      error = ("invalid_method", "method must be \"POST\".")
    } else if json["url"] != .string(endpoint) {
      error = ("invalid_url", "url must be the batch's endpoint, \(endpoint.debugDescription).")
    } else if json["body"]?.objectValue == nil {
      error = ("missing_required_parameter", "body is required: an object.")
    } else if json["body"]?["stream"] == true || json["body"]?["background"] == true {
      error = ("invalid_request", "stream and background are not allowed in a batch.")
    } else {
      body = json["body"]!
    }
  }

  /// The result of a line that was run.
  func result(status: Int, requestID: String, body: [UInt8]) -> BatchResult {
    result(isError: status != 200) { writer in
      writer.key("response")
      writer.object { writer in
        writer.member("status_code", status)
        writer.member("request_id", requestID)
        writer.key("body")
        writer.verbatim(body)
      }
      writer.member("error", .null)
    }
  }

  /// The result of a line that was not run.
  func result(error code: String, _ message: String) -> BatchResult {
    result(isError: true) { writer in
      writer.member("response", .null)
      writer.key("error")
      writer.object { writer in
        writer.member("code", code)
        writer.member("message", message)
      }
    }
  }

  private func result(isError: Bool, _ members: (inout JSONWriter) -> Void) -> BatchResult {
    var writer = JSONWriter(capacity: 1024)
    writer.object { writer in
      writer.member("id", freshID("batch_req_"))
      writer.member("custom_id", name)
      members(&writer)
    }
    return BatchResult(line: number, isError: isError, bytes: writer.bytes + [UInt8(ascii: "\n")])
  }
}
