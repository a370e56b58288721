import ApusCore
import AsyncHTTPClient
import NIOCore
import NIOHTTP1

/// A server's refusal.
struct ServerRefusal: Error, CustomStringConvertible {
  /// The HTTP status.
  var status: Int
  /// The server's own sentence.
  var message: String

  var description: String { "The server answered \(status): \(message)" }
}

/// Speaks JSON with a server over HTTP.
struct ServerClient: Sendable {
  /// The address without a slash at its end and without `/v1`.
  let baseURL: String
  private let apiKey: String?
  private let http: HTTPClient
  /// Seconds that a whole exchange may take.
  private let timeout: Int64

  /// Prepares to speak with a server; nothing is sent yet.
  /// - Parameters:
  ///   - connections: how many connections may be open at once.
  ///   - timeout: seconds that a whole exchange may take.
  init(baseURL: String, apiKey: String?, connections: Int = 8, timeout: Int64 = 6 * 3600) throws(CommandFailure) {
    var url = baseURL
    if !url.contains("://") { url = "http://" + url }
    guard url.hasPrefix("http://") || url.hasPrefix("https://") else {
      throw .usage("'\(baseURL)' is no address of a server; write it as 'http://127.0.0.1:8000'.")
    }
    while url.hasSuffix("/") { url.removeLast() }
    if url.hasSuffix("/v1") { url.removeLast(3) }
    self.baseURL = url
    self.apiKey = apiKey ?? environmentValue("OPENAI_API_KEY")
    self.timeout = timeout
    var configuration = HTTPClient.Configuration()
    configuration.httpVersion = .http1Only
    configuration.timeout.connect = .seconds(10)
    configuration.connectionPool.concurrentHTTP1ConnectionsPerHostSoftLimit = connections
    http = HTTPClient(eventLoopGroupProvider: .singleton, configuration: configuration)
  }

  /// Closes the connections. Must be called once, last.
  func shutdown() async { try? await http.shutdown() }

  /// The answer to a GET.
  func get(_ path: String) async throws -> JSONValue { try await exchange(path, method: .GET, body: nil) }

  /// The answer to a POST.
  func post(_ path: String, _ body: JSONValue) async throws -> JSONValue {
    try await exchange(path, method: .POST, body: body)
  }

  private func exchange(_ path: String, method: HTTPMethod, body: JSONValue?) async throws -> JSONValue {
    let response = try await send(path, method: method, body: body.map { Array($0.compactText.utf8) })
    let bytes = try await collect(response)
    // Some endpoints answer with text; its wrapping as a JSON string loses nothing.
    return (try? JSONValue.parse(bytes)) ?? .string(String(decoding: bytes, as: UTF8.self))
  }

  /// Posts a body and hands each event of the answer to `onEvent`, until `[DONE]` or the end of the stream.
  func stream(
    _ path: String, body: JSONValue, onEvent: (JSONValue) throws -> Void
  ) async throws {
    try await streamBytes(path, body: Array(body.compactText.utf8)) { payload in
      guard let event = try? JSONValue.parse(payload) else {
        throw CommandFailure("The server sent an event that is not JSON.")
      }
      try onEvent(event)
    }
  }

  /// As `stream`, with the event's bytes, for those who measure.
  func streamBytes(_ path: String, body: [UInt8], onEvent: ([UInt8]) throws -> Void) async throws {
    let response = try await send(path, method: .POST, body: body)
    var parser = EventStreamParser()
    let done = Array("[DONE]".utf8)
    for try await buffer in response.body {
      try parser.feed(buffer.readableBytesView) { payload in if payload != done { try onEvent(payload) } }
    }
  }

  private func send(_ path: String, method: HTTPMethod, body: [UInt8]?) async throws -> HTTPClientResponse {
    var request = HTTPClientRequest(url: baseURL + path)
    request.method = method
    if let apiKey { request.headers.add(name: "Authorization", value: "Bearer \(apiKey)") }
    if let body {
      request.headers.add(name: "Content-Type", value: "application/json")
      request.body = .bytes(ByteBuffer(bytes: body))
    }
    let response: HTTPClientResponse
    do {
      response = try await http.execute(request, timeout: .seconds(timeout))
    } catch let error as HTTPClientError where error == .invalidURL || error == .emptyHost {
      throw CommandFailure.usage("'\(baseURL)' is no address of a server; write it as 'http://127.0.0.1:8000'.")
    }
    guard (200..<300).contains(response.status.code) else {
      let bytes = try await collect(response)
      let json = try? JSONValue.parse(bytes)
      let message =
        json?["error"]?["message"]?.stringValue ?? json?["error"]?.stringValue ?? json?["message"]?.stringValue
        ?? String(String(decoding: bytes, as: UTF8.self).prefix(300))
      throw ServerRefusal(status: Int(response.status.code), message: message)
    }
    return response
  }

  private func collect(_ response: HTTPClientResponse) async throws -> [UInt8] {
    let buffer = try await response.body.collect(upTo: 256 << 20)
    return Array(buffer.readableBytesView)
  }

  /// The name of the only or first model of the server.
  func firstModel() async throws -> String? { try await get("/v1/models")["data"]?[0]?["id"]?.stringValue }
}

/// Says in a sentence why a server could not be reached or refused.
func serverFailure(_ error: any Error, at url: String) -> any Error {
  switch error {
  case is CommandFailure, is CancellationError: return error
  case let refusal as ServerRefusal: return CommandFailure(refusal.description)
  default:
    return CommandFailure(
      "The server at \(url) cannot be reached (\(error)); is it running?", status: ExitStatus.unavailable)
  }
}
