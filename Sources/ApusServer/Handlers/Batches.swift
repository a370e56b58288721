import ApusCore
import Hummingbird

extension ServerState {
  /// `POST /v1/batches`.
  func createBatch(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let store = try requireStore()
    var fileID: String?
    var endpoint: String?
    var window: String?
    var metadata: JSONValue?
    var expiry: JSONValue?
    try readBody(try await body(of: request)) { (fields, reader, key) throws(JSONError) in
      switch key {
      case "input_file_id": fileID = try fields.string(&reader, key)
      case "endpoint": endpoint = try fields.string(&reader, key)
      case "completion_window": window = try fields.string(&reader, key)
      case "metadata": metadata = try fields.value(&reader, key)
      case "output_expires_after": expiry = try fields.value(&reader, key)
      default: try reader.skipValue()
      }
    }
    func refuse(_ name: String, _ sentence: String, _ code: EngineError.Code = .invalidRequest) -> EngineError {
      EngineError(code, "\(name) \(sentence).", parameter: name)
    }
    guard let endpoint else { throw refuse("endpoint", "is required") }
    if !batchEndpoints.contains(endpoint) {
      throw refuse(
        "endpoint",
        "must be one of \(batchEndpoints.joined(separator: ", ")), got \(endpoint.debugDescription)")
    }
    guard let window else { throw refuse("completion_window", "is required: \"24h\"") }
    if window != "24h" { throw refuse("completion_window", "must be \"24h\", got \(window.debugDescription)") }
    let checked = try checkedMetadata(metadata)
    if let expiry {
      guard expiry["anchor"] == "created_at", let seconds = expiry["seconds"]?.intValue,
        fileLifetimes.contains(seconds)
      else {
        throw refuse("output_expires_after", "must be {\"anchor\": \"created_at\", \"seconds\": 3600 to 2592000}")
      }
    }
    guard let fileID else { throw refuse("input_file_id", "is required") }
    guard let file = try await store.file(fileID) else {
      throw refuse("input_file_id", "names no file: \(fileID.debugDescription)", .notFound)
    }
    if file.purpose != "batch" {
      throw refuse("input_file_id", "names a file of purpose \(file.purpose.debugDescription), which must be \"batch\"")
    }
    let now = unixTime()
    let id = freshID("batch_")
    var object = JSONObject([
      ("id", .string(id)), ("object", "batch"), ("endpoint", .string(endpoint)),
      ("model", .string(service.model.name)), ("errors", nil), ("input_file_id", .string(fileID)),
      ("completion_window", .string(window)), ("status", "validating"), ("output_file_id", nil),
      ("error_file_id", nil), ("created_at", .int(Int64(now))), ("in_progress_at", nil),
      ("expires_at", .int(Int64(now + 24 * 3600))), ("finalizing_at", nil), ("completed_at", nil), ("failed_at", nil),
      ("expired_at", nil), ("cancelling_at", nil), ("cancelled_at", nil),
      ("request_counts", requestCounts(total: 0, 0, 0)), ("metadata", .object(checked)),
    ])
    if let expiry { object["output_expires_after"] = expiry }
    let batch = StoredBatch(id: id, created: now, isFinished: false, object: object)
    try await store.insert(batch)
    stateful?.batches.wake(self)
    return jsonResponse(Array(JSONValue.object(object).compactText.utf8))
  }

  /// `GET /v1/batches`.
  func listBatches(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let store = try requireStore()
    var page = try page(of: request, largest: 100)
    page.limit += 1
    var entries: [JSONValue] = []
    for batch in try await store.batches(page) { entries.append(try await shown(batch)) }
    return listResponse(entries, limit: page.limit - 1)
  }

  /// `GET /v1/batches/{id}`.
  func getBatch(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    try await batchResponse(try await requireStore().batch(try context.parameters.require("id")), context)
  }

  /// `POST /v1/batches/{id}/cancel`.
  func cancelBatch(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let id = try context.parameters.require("id")
    let now = unixTime()
    let batch = try await requireStore().updateBatch(id) { batch in
      if batch.isFinished || batch.object["status"] == "cancelling" { return }
      batch.object["status"] = "cancelling"
      batch.object["cancelling_at"] = .int(Int64(now))
    }
    stateful?.batches.cancelLines(of: id)
    stateful?.batches.wake(self)
    return try await batchResponse(batch, context)
  }

  private func batchResponse(_ batch: StoredBatch?, _ context: ServerContext) async throws -> Response {
    guard let batch else {
      let id = try context.parameters.require("id")
      throw EngineError(.notFound, "There is no batch \(id.debugDescription).", parameter: "batch_id")
    }
    return jsonResponse(Array(try await shown(batch).compactText.utf8))
  }

  /// A batch as the API shows it.
  private func shown(_ batch: StoredBatch) async throws(EngineError) -> JSONValue {
    var object = batch.object
    if !batch.isFinished {
      let counts = try await requireStore().resultCounts(ofBatch: batch.id)
      object["request_counts"] = requestCounts(
        total: object["request_counts"]?["total"]?.intValue ?? 0, counts.completed, counts.failed)
    }
    return .object(object)
  }
}
