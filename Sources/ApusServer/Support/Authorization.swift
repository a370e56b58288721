import ApusCore
import Hummingbird
import HTTPTypes
import NIOCore

/// Who may use an endpoint.
enum Access: Sendable {
  /// Everybody: what load balancers and monitoring ask for, which carry no keys.
  case open
  /// Holders of the API key or the admin key; everybody if there is no API key.
  case client
  /// Holders of the admin key; of the API key if there is no admin key; callers on this host if there is neither.
  case admin
}

/// Lets a request pass or refuses it.
struct AuthorizationMiddleware: RouterMiddleware {
  let access: Access
  let configuration: ServerConfiguration

  func handle(
    _ request: Request, context: ServerContext, next: (Request, ServerContext) async throws -> Response
  ) async throws -> Response {
    try authorize(request, context)
    return try await next(request, context)
  }

  private func authorize(_ request: Request, _ context: ServerContext) throws(EngineError) {
    let accepted: [String]
    switch access {
    case .open: return
    case .client:
      guard let apiKey = configuration.apiKey else { return }
      accepted = [apiKey] + (configuration.adminKey.map { [$0] } ?? [])
    case .admin:
      guard let key = configuration.adminKey ?? configuration.apiKey else {
        if isLocal(request, context) { return }
        throw EngineError(
          .forbidden,
          "This endpoint is open to callers on the server's own host only, unless the server is started with an admin key."
        )
      }
      accepted = [key]
    }
    // Anthropic's clients send the key as x-api-key, and a token beside it if they are given both.
    let given = [bearerToken(request), request.headers[.apiKey]].compactMap { $0 }
    if given.isEmpty {
      throw EngineError(.unauthorized, "Send the key as \"Authorization: Bearer <key>\" or as \"x-api-key: <key>\".")
    }
    // Every key is compared, so that the time taken does not tell which of them was nearly right.
    var isAccepted = false
    for given in given {
      for key in accepted where constantTimeEqual(given, key) { isAccepted = true }
    }
    if !isAccepted { throw EngineError(.unauthorized, "The key is wrong.") }
  }

  private func bearerToken(_ request: Request) -> String? {
    guard let value = request.headers[.authorization] else { return nil }
    let scheme = "bearer "
    guard value.count > scheme.count, value.prefix(scheme.count).lowercased() == scheme else { return nil }
    return String(value.dropFirst(scheme.count).drop { $0 == " " })
  }

  /// Whether the caller is on this host.
  ///
  /// A proxy on this host speaks for callers elsewhere, and a page in a browser on this host for its author: both leave
  /// a header that says so.
  private func isLocal(_ request: Request, _ context: ServerContext) -> Bool {
    guard request.headers[.origin] == nil, request.headers[.forwarded] == nil,
      request.headers[HTTPField.Name("x-forwarded-for")!] == nil
    else { return false }
    return context.channel?.remoteAddress?.isLoopback ?? false
  }
}

extension HTTPField.Name {
  fileprivate static let forwarded = Self("forwarded")!
  fileprivate static let apiKey = Self("x-api-key")!
}

extension SocketAddress {
  /// Whether the address belongs to this host alone: 127.0.0.0/8, ::1, their IPv4-mapped forms, or a Unix socket.
  var isLoopback: Bool {
    if case .unixDomainSocket = self { return true }
    guard let address = ipAddress else { return false }
    return address == "::1" || address.hasPrefix("127.") || address.hasPrefix("::ffff:127.")
  }
}

/// Whether two texts are equal, in time that depends on their lengths alone.
func constantTimeEqual(_ left: String, _ right: String) -> Bool {
  let left = Array(left.utf8)
  let right = Array(right.utf8)
  var difference = left.count ^ right.count
  for index in right.indices { difference |= Int(right[index] ^ (left.isEmpty ? 0xFF : left[index % left.count])) }
  return difference == 0
}
