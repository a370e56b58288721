import ApusCore
import Hummingbird
import NIOCore

/// The body of `POST /v1/batches`.
struct BatchRequest {
  var fileID = ""
  var endpoint = ""
  var metadata = JSONObject()
  /// When the files of results are forgotten.
  var expiry: JSONValue?

  private var givenMetadata: JSONValue?

  /// The members of the body.
  static let fields = FieldTable<BatchRequest>([
    Field("input_file_id", schema: ["type": "string"], "A file of purpose `batch`.", requirement: "a file's id") {
      (request, fields, reader, name) throws(JSONError) in
      request.fileID = try fields.string(&reader, name) ?? ""
    },
    Field(
      "endpoint",
      schema: ["enum": ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]],
      "The endpoint that answers the lines, of those that the server has.", requirement: "an endpoint's path"
    ) { (request, fields, reader, name) throws(JSONError) in request.endpoint = try fields.string(&reader, name) ?? ""
    },
    Field(
      "completion_window", schema: ["const": "24h"], "How long the batch may take.", requirement: "\"24h\""
    ) { (request, fields, reader, name) throws(JSONError) in
      if let window = try fields.string(&reader, name), window != "24h" {
        fields.note(name, "must be \"24h\", got \(window.debugDescription)")
      }
    },
    .value("metadata", to: \.givenMetadata, schema: metadataSchema, "Kept with the batch."),
    .value(
      "output_expires_after", to: \.expiry,
      schema: [
        "type": "object",
        "properties": [
          "anchor": ["const": "created_at"],
          "seconds": [
            "type": "integer", "minimum": .int(Int64(fileLifetimes.lowerBound)),
            "maximum": .int(Int64(fileLifetimes.upperBound)),
          ],
        ], "required": ["anchor", "seconds"],
      ], "When the files of results are forgotten."),
  ])

  /// Reads and checks a body.
  ///
  /// - Parameter endpoints: those that a batch may name.
  init(_ body: ByteBuffer, endpoints: [String]) throws(EngineError) {
    var request = BatchRequest()
    try Self.fields.read(body, into: &request)
    if !endpoints.contains(request.endpoint) {
      throw EngineError(
        .invalidRequest,
        "endpoint must be one of \(endpoints.joined(separator: ", ")), got \(request.endpoint.debugDescription).",
        parameter: "endpoint")
    }
    if let expiry = request.expiry {
      guard expiry["anchor"] == "created_at", let seconds = expiry["seconds"]?.intValue,
        fileLifetimes.contains(seconds)
      else {
        throw EngineError(
          .invalidRequest,
          "output_expires_after must be {\"anchor\": \"created_at\", \"seconds\": 3600 to 2592000}.",
          parameter: "output_expires_after")
      }
    }
    request.metadata = try checkedMetadata(request.givenMetadata)
    self = request
  }

  private init() {}
}

extension ServerState {
  /// `POST /v1/batches`.
  func createBatch(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let body = try BatchRequest(try await body(of: request), endpoints: batchEndpoints)
    let store = try requireStore()
    guard let file = try await store.file(body.fileID) else {
      throw EngineError(
        .notFound, "input_file_id names no file: \(body.fileID.debugDescription).", parameter: "input_file_id")
    }
    if file.purpose != "batch" {
      throw EngineError(
        .invalidRequest,
        "input_file_id names a file of purpose \(file.purpose.debugDescription), which must be \"batch\".",
        parameter: "input_file_id")
    }
    let now = unixTime()
    let id = freshID("batch_")
    var object = JSONObject([
      ("id", .string(id)), ("object", "batch"), ("endpoint", .string(body.endpoint)),
      ("model", .string(service.model.name)), ("errors", nil), ("input_file_id", .string(body.fileID)),
      ("completion_window", "24h"), ("status", "validating"), ("output_file_id", nil),
      ("error_file_id", nil), ("created_at", .int(Int64(now))), ("in_progress_at", nil),
      ("expires_at", .int(Int64(now + 24 * 3600))), ("finalizing_at", nil), ("completed_at", nil), ("failed_at", nil),
      ("expired_at", nil), ("cancelling_at", nil), ("cancelled_at", nil),
      ("request_counts", requestCounts(total: 0, 0, 0)), ("metadata", .object(body.metadata)),
    ])
    if let expiry = body.expiry { object["output_expires_after"] = expiry }
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
