import ApusCore
import Hummingbird

/// The body of `POST /abort_request`.
struct AbortRequest {
  var rid: String?
  var abortAll = false

  /// The members.
  static let fields = FieldTable<AbortRequest>([
    .string("rid", to: \.rid, "The beginning of the names of the requests to abort."),
    .flag("abort_all", to: \.abortAll, default: false, "Whether all requests are aborted."),
  ])
}

extension ServerState {
  /// `GET` or `POST /flush_cache?timeout=`: empties the prefix cache once nothing runs.
  func flushCache(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var timeout = 0.0
    if let text = request.uri.queryParameters["timeout"] {
      guard let value = Double(String(text)), value >= 0, value <= 3600 else {
        throw EngineError(.invalidRequest, "timeout must be in 0...3600 seconds.", parameter: "timeout")
      }
      timeout = value
    }
    let flushed = await service.flushCache(timeout: timeout)
    return Response(status: flushed ? .ok : .badRequest) { writer in
      writer.member("success", flushed)
      writer.member(
        "message",
        flushed
          ? "The prefix cache is empty."
          : "The prefix cache was not emptied, because requests were still running; give a timeout to wait for them.")
    }
  }

  /// `POST /abort_request`: ends the requests whose names begin with `rid`, or all of them.
  func abortRequest(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var given = AbortRequest()
    try AbortRequest.fields.read(try await body(of: request), into: &given)
    let (rid, abortAll) = (given.rid, given.abortAll)
    var aborted = 0
    if abortAll {
      aborted = active.count
      service.abortAll()
    } else if let rid, !rid.isEmpty {
      for id in active.matching(prefix: rid) where service.abort(id) { aborted += 1 }
    } else {
      throw EngineError(
        .invalidRequest, "Give rid, the beginning of the names of the requests to abort, or abort_all: true.",
        parameter: "rid")
    }
    return Response { writer in
      writer.member("success", true)
      writer.member("aborted", aborted)
    }
  }
}
