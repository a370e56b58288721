import ApusCore
import HTTPTypes
import Hummingbird
import NIOCore

/// How long a file may be kept if it is to be forgotten, in seconds.
let fileLifetimes = 3600...2_592_000

extension ServerState {
  /// `POST /v1/files`.
  func uploadFile(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let store = try requireStore()
    guard var parser = request.headers[.contentType].flatMap({ MultipartParser(contentType: $0) }) else {
      throw EngineError(.invalidRequest, "The body must be multipart/form-data with a boundary.")
    }
    let limit = store.maxFileBytes
    func tooLarge() -> RouteError {
      RouteError(
        status: .contentTooLarge, message: "The file is larger than the \(limit) bytes that are allowed.",
        code: "file_too_large")
    }
    // The form's other fields are small.
    if let length = request.headers[.contentLength].flatMap({ Int($0) }), length > limit + (64 << 10) {
      throw tooLarge()
    }
    let id = freshID("file-")
    let now = unixTime()
    try await store.beginFile(id, created: now)
    do {
      var form = UploadForm()
      var pending: [UInt8] = []
      var size = 0
      for try await piece in request.body {
        let events: [MultipartParser.Event]
        do {
          events = try parser.feed(piece.readableBytesView)
        } catch {
          throw EngineError(.invalidRequest, "The body is malformed: \(error.message).")
        }
        for event in events {
          guard let bytes = try form.take(event) else { continue }
          size += bytes.count
          if size > limit { throw tooLarge() }
          pending += bytes
        }
        if pending.count >= 256 << 10 {
          try await store.append(pending, toFile: id)
          pending.removeAll(keepingCapacity: true)
        }
      }
      if !parser.isComplete { throw EngineError(.invalidRequest, "The body is malformed: it ends within a part.") }
      if !pending.isEmpty { try await store.append(pending, toFile: id) }
      let file = try await store.finishFile(try form.file(id, now))
      return Response { $0.members(of: file) }
    } catch {
      // In a task of its own, since the client may have gone and cancelled this one.
      await Task { _ = try? await store.deleteFile(id) }.value
      throw error
    }
  }

  /// `GET /v1/files`.
  func listFiles(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var page = try page(of: request, largest: 10_000, usual: 10_000)
    page.limit += 1
    let purpose = request.uri.queryParameters["purpose"].map { String($0) }
    let files = try await requireStore().files(page, purpose: purpose)
    return listResponse(
      files.map { file in
        var writer = JSONWriter()
        writer.object { $0.members(of: file) }
        return (try? JSONValue.parse(writer.bytes)) ?? .null
      }, limit: page.limit - 1)
  }

  /// `GET /v1/files/{id}`.
  func getFile(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let file = try await file(context)
    return Response { $0.members(of: file) }
  }

  /// `DELETE /v1/files/{id}`.
  func deleteFile(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let file = try await file(context)
    _ = try await requireStore().deleteFile(file.id)
    return Response { writer in
      writer.member("id", file.id)
      writer.member("object", "file")
      writer.member("deleted", true)
    }
  }

  /// `GET /v1/files/{id}/content`.
  func fileContent(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let store = try requireStore()
    let file = try await file(context)
    let body = ResponseBody(contentLength: file.size) { writer in
      var offset = 0
      while offset < file.size {
        let bytes = try await store.read(file: file.id, from: offset)
        // Deleted meanwhile: a body that is too short tells the client.
        if bytes.isEmpty { throw EngineError(.notFound, "The file has been deleted.") }
        offset += bytes.count
        try await writer.write(ByteBuffer(bytes: bytes))
      }
      try await writer.finish(nil)
    }
    return Response(status: .ok, headers: [.contentType: "application/octet-stream"], body: body)
  }

  private func file(_ context: ServerContext) async throws -> StoredFile {
    let id = try context.parameters.require("id")
    guard let file = try await requireStore().file(id) else {
      throw EngineError(.notFound, "There is no file \(id.debugDescription).", parameter: "file_id")
    }
    return file
  }
}

/// The fields of an upload.
struct UploadForm {
  private var current = ""
  private var fields: [String: [UInt8]] = [:]
  private var name: String?

  static let purposes = ["assistants", "batch", "evals", "fine-tune", "user_data", "vision"]

  /// Takes a piece of the body. Returns bytes of the file.
  mutating func take(_ event: MultipartParser.Event) throws(EngineError) -> [UInt8]? {
    switch event {
    case .begin("file", let fileName):
      if name != nil { throw EngineError(.invalidRequest, "Only one file may be sent at a time.", parameter: "file") }
      // Some clients send a path.
      let base = (fileName ?? "").split(separator: "/").last.map { String($0) } ?? "upload"
      name = String(base.prefix(255))
      current = "file"
    case .begin(let name, _):
      if fields.count >= 16 { throw EngineError(.invalidRequest, "The form has too many fields.") }
      fields[name] = []
      current = name
    case .data(let bytes):
      if current == "file" { return bytes }
      fields[current]! += bytes
      if fields[current]!.count > 4096 {
        throw EngineError(.invalidRequest, "\(current): the value is too long.", parameter: current)
      }
    case .end: break
    }
    return nil
  }

  /// The file that the form describes.
  func file(_ id: String, _ now: Int) throws(EngineError) -> StoredFile {
    guard let name else {
      throw EngineError(.invalidRequest, "file is required: a part with the file's bytes.", parameter: "file")
    }
    func text(_ name: String) -> String? { fields[name].map { String(decoding: $0, as: UTF8.self) } }
    guard let purpose = text("purpose") else {
      throw EngineError(.invalidRequest, "purpose is required.", parameter: "purpose")
    }
    if !Self.purposes.contains(purpose) {
      throw EngineError(
        .invalidRequest,
        "purpose must be one of \(Self.purposes.joined(separator: ", ")), got \(purpose.debugDescription).",
        parameter: "purpose")
    }
    var file = StoredFile(id: id, created: now, name: name, purpose: purpose)
    if let anchor = text("expires_after[anchor]"), anchor != "created_at" {
      throw EngineError(
        .invalidRequest, "expires_after.anchor must be \"created_at\", got \(anchor.debugDescription).",
        parameter: "expires_after.anchor")
    }
    if let text = text("expires_after[seconds]") {
      guard let seconds = Int(text), fileLifetimes.contains(seconds) else {
        throw EngineError(
          .invalidRequest,
          "expires_after.seconds must be in \(fileLifetimes.lowerBound)...\(fileLifetimes.upperBound), got "
            + "\(text.debugDescription).", parameter: "expires_after.seconds")
      }
      file.expires = now + seconds
    }
    return file
  }
}

extension JSONWriter {
  /// Writes the members of a file object.
  fileprivate mutating func members(of file: StoredFile) {
    member("id", file.id)
    member("object", "file")
    member("bytes", file.size)
    member("created_at", file.created)
    member("expires_at", file.expires.map { .int(Int64($0)) } ?? .null)
    member("filename", file.name)
    member("purpose", file.purpose)
    member("status", "processed")
    member("status_details", .null)
  }
}
