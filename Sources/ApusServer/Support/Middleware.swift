import ApusCore
import HTTPTypes
import Hummingbird
import Logging
import NIOCore

extension HTTPField.Name {
  fileprivate static let requestID = Self("x-request-id")!
  fileprivate static let anthropicRequestID = Self("request-id")!
}

/// The outermost layer: names requests, counts and logs them.
struct RequestMiddleware: RouterMiddleware {
  let state: ServerState

  func handle(
    _ request: Request, context: ServerContext, next: (Request, ServerContext) async throws -> Response
  ) async throws -> Response {
    let start = ContinuousClock.now
    var context = context
    context.requestID = requestID(request)
    let endpoint = context.endpointPath ?? "unknown"
    let method = request.method.rawValue
    state.metrics.httpStarted(endpoint: endpoint, method: method)
    var response = try await next(request, context)
    response.headers[.requestID] = context.requestID
    // Anthropic's clients look for the name under their own header.
    if ErrorStyle(path: request.uri.path) == .anthropic { response.headers[.anthropicRequestID] = context.requestID }
    let status = response.status.code
    let (state, requestID, path) = (state, context.requestID, request.uri.path)
    let end: @Sendable () -> Void = {
      let elapsed = seconds(ContinuousClock.now - start)
      state.metrics.httpEnded(endpoint: endpoint, method: method, status: status, seconds: elapsed)
      if state.configuration.accessLog {
        // Probes arrive every second from every load balancer; they would bury the requests.
        let isProbe = endpoint == "/health" || endpoint == "/ready" || endpoint == "/metrics"
        state.logger.log(
          level: isProbe ? .debug : .info, "\(method) \(path) \(status)",
          metadata: ["ms": "\((elapsed * 1e5).rounded() / 100)", "request": "\(requestID)"])
      }
    }
    guard response.body.contentLength == nil else {
      end()
      return response
    }
    let body = response.body
    response.body = ResponseBody { writer in
      defer { end() }
      try await body.write(writer)
    }
    return response
  }

  /// The client's own name for the request, if it is fit for a header and a log line, or a fresh one.
  private func requestID(_ request: Request) -> String {
    if let given = request.headers[.requestID], (1...128).contains(given.utf8.count),
      given.utf8.allSatisfy({ $0 > 0x20 && $0 < 0x7F })
    {
      return given
    }
    return "req_" + RequestID.unique().rawValue
  }

}

/// Turns errors into responses.
struct ErrorMiddleware: RouterMiddleware {
  let logger: Logger
  /// The methods of each path, to tell a wrong method from a wrong path.
  let methods: [String: [HTTPRequest.Method]]

  func handle(
    _ request: Request, context: ServerContext, next: (Request, ServerContext) async throws -> Response
  ) async throws -> Response {
    do {
      return try await next(request, context)
    } catch {
      return response(to: error, request, context)
    }
  }

  private func response(to error: any Error, _ request: Request, _ context: ServerContext) -> Response {
    let style = ErrorStyle(path: request.uri.path)
    func answer(_ error: EngineError) -> Response { style.restyled(error.response, message: error.message) }
    func answer(_ error: RouteError) -> Response { style.restyled(error.response, message: error.message) }
    switch error {
    case let error as EngineError:
      if error.status.code >= 500, error.code != .shuttingDown {
        logger.error("\(error.message)", metadata: ["request": "\(context.requestID)"])
      }
      return answer(error)
    case let error as RouteError: return answer(error)
    case let error as HTTPError where error.status == .notFound: return answer(unknownRoute(request))
    case let error as HTTPError:
      return answer(RouteError(status: error.status, message: error.body ?? error.status.reasonPhrase))
    case is CancellationError: return answer(EngineError(.aborted, "The request was cancelled."))
    default:
      // What the message says of the server's inside is for its log, not for its clients.
      logger.error("Unexpected error: \(error)", metadata: ["request": "\(context.requestID)"])
      return answer(EngineError(.internalFailure, "The server failed to answer the request."))
    }
  }

  private func unknownRoute(_ request: Request) -> RouteError {
    let path = request.uri.path
    let allowed = methods[path] ?? (path.hasPrefix("/v1/models/") ? [.get] : [])
    if allowed.isEmpty {
      return RouteError(
        status: .notFound, message: "There is no \(request.method.rawValue) \(path).", code: "not_found")
    }
    let names = (allowed + (allowed.contains(.get) ? [.head] : [])).map(\.rawValue).joined(separator: ", ")
    return RouteError(
      status: .methodNotAllowed,
      message: "\(path) does not take \(request.method.rawValue); it takes \(names).", code: "method_not_allowed",
      headers: [.allow: names])
  }
}

/// Refuses new work while the server drains.
struct DrainMiddleware: RouterMiddleware {
  let state: ServerState

  func handle(
    _ request: Request, context: ServerContext, next: (Request, ServerContext) async throws -> Response
  ) async throws -> Response {
    if state.isDraining {
      throw EngineError(.shuttingDown, "The server is shutting down and takes no new requests.")
    }
    return try await next(request, context)
  }
}

/// Tells browsers which pages may call the server.
///
/// Ours because Hummingbird's takes its list of origins at compile time only.
struct CrossOriginMiddleware: RouterMiddleware {
  let origins: [String]

  func handle(
    _ request: Request, context: ServerContext, next: (Request, ServerContext) async throws -> Response
  ) async throws -> Response {
    guard let origin = request.headers[.origin] else { return try await next(request, context) }
    let allowsAll = origins.contains("*")
    let isAllowed = allowsAll || origins.contains(origin)
    let isPreflight = request.method == .options && request.headers[.accessControlRequestMethod] != nil
    var response: Response
    if isPreflight, isAllowed {
      response = Response(status: .noContent)
      response.headers[.accessControlAllowMethods] = "GET, HEAD, POST, PUT, DELETE, OPTIONS"
      // Clients send headers of their own (OpenAI's a dozen beginning with x-stainless-), so what was asked is allowed.
      response.headers[.accessControlAllowHeaders] =
        request.headers[.accessControlRequestHeaders] ?? "authorization, content-type"
      response.headers[.accessControlMaxAge] = "86400"
    } else {
      response = try await next(request, context)
    }
    if isAllowed {
      response.headers[.accessControlAllowOrigin] = allowsAll ? "*" : origin
      response.headers[.accessControlExposeHeaders] = "x-request-id, retry-after"
    }
    if !allowsAll { response.headers[.vary] = "Origin" }
    return response
  }
}
