import ApusCore
import ApusServer
import Dispatch
import Foundation
import Glibc
import HTTPTypes
import Hummingbird
import HummingbirdTesting
import Logging
import NIOCore
import Synchronization
import Testing

/// A logger that keeps tests silent.
let quietLogger: Logger = {
  var logger = Logger(label: "test")
  logger.logLevel = .critical
  return logger
}()

/// A configuration for a test server: any free port, no signals, no log.
func testConfiguration(_ change: (inout ServerConfiguration) -> Void = { _ in }) -> ServerConfiguration {
  var configuration = ServerConfiguration()
  configuration.port = 0
  configuration.handlesSignals = false
  configuration.accessLog = false
  change(&configuration)
  return configuration
}

/// Sends requests straight to the routes of a server.
struct RouteClient: Sendable {
  let client: any TestClientProtocol

  func send(
    _ method: HTTPRequest.Method, _ path: String, _ body: String? = nil, headers: HTTPFields = [:]
  ) async throws -> Answer {
    let response = try await client.executeRequest(
      uri: path, method: method, headers: headers, body: body.map { ByteBuffer(string: $0) })
    return Answer(
      status: response.status.code, headers: response.headers, text: String(buffer: response.body))
  }

  func post(_ path: String, _ body: JSONValue, headers: HTTPFields = [:]) async throws -> Answer {
    try await send(.post, path, body.compactText, headers: headers)
  }

  func get(_ path: String, headers: HTTPFields = [:]) async throws -> Answer {
    try await send(.get, path, headers: headers)
  }
}

/// A response.
struct Answer: Sendable {
  var status: Int
  var headers: HTTPFields
  var text: String

  /// The body as JSON; `null` if it is none.
  var json: JSONValue { (try? JSONValue.parse(text)) ?? .null }
  /// The message of the error object.
  var error: String { json["error"]?["message"]?.stringValue ?? "no error object: \(text)" }
  var parameter: String? { json["error"]?["param"]?.stringValue }
  var code: String? { json["error"]?["code"]?.stringValue }
  /// The data of the server-sent events.
  var events: [String] {
    text.components(separatedBy: "\n\n").filter { !$0.isEmpty }.map { String($0.dropFirst("data: ".count)) }
  }
}

/// A body with members added or replaced.
func with(_ body: JSONValue, _ members: JSONValue) -> JSONValue {
  var object = body.objectValue!
  for (key, value) in members.objectValue! { object[key] = value }
  return .object(object)
}

/// A template that shows Qwen's formats of calls and reasoning.
let qwenTemplate = "<tool_call> <think>"

/// An answer in those formats with reasoning, text and two calls, in tokens that cut marks and characters' neighbours.
let callingAnswer = [
  "<think>", "\n", "Hm", ".\n", "</think>", "\n\n", "Let me", " see.", "\n", "<tool_call>", "\n", "{\"name\": \"get_",
  "weather\", \"arg", "uments\": {\"city\": \"Zü", "rich\", \"days\"", ": 3}}", "\n</tool", "_call>\n", "<tool_call>",
  "{\"name\": \"ping\"}", "</tool_call>",
]

/// A service that answers with calls.
func callingService(
  _ words: [String] = callingAnswer, template: String = qwenTemplate, promptEnd: String = "<assistant>",
  specialTokens: [String] = []
) -> FakeService {
  FakeService(.init(words: words, promptEnd: promptEnd), chatTemplate: template, specialTokens: specialTokens)
}

/// The prompt of a request to the fake service as text.
func promptText(_ request: ApusCore.Request?) -> String {
  guard case .tokens(let tokens)? = request?.prompt else { return "" }
  return String(decoding: tokens.map { UInt8($0) }, as: UTF8.self)
}

/// Calls the routes of a server over a service, without a socket.
func withRoutes<Value: Sendable>(
  _ service: any GenerationService = FakeService(), _ configuration: ServerConfiguration = testConfiguration(),
  logger: Logger = quietLogger, _ body: @Sendable (RouteClient) async throws -> Value
) async throws -> Value {
  let server = try Server(service: service, configuration: configuration, logger: logger)
  return try await server.makeApplication().test(.router) { try await body(RouteClient(client: $0)) }
}

/// Runs a server on a free loopback port for as long as `body` takes, then drains it.
func withServer<Value: Sendable>(
  _ service: any GenerationService = FakeService(), _ configuration: ServerConfiguration = testConfiguration(),
  _ body: @Sendable (Int, Server) async throws -> Value
) async throws -> Value {
  let (ports, continuation) = AsyncStream<Int>.makeStream()
  let server = try Server(service: service, configuration: configuration, logger: quietLogger) { port in
    continuation.yield(port)
  }
  return try await withThrowingTaskGroup(of: Void.self) { group in
    group.addTask {
      defer { continuation.finish() }
      try await server.run()
    }
    guard let port = await ports.first(where: { _ in true }) else {
      try await group.next()
      throw EngineError(.internalFailure, "The server ended before it listened.")
    }
    do {
      let value = try await body(port, server)
      service.abortAll()
      await server.shutdown()
      try await group.waitForAll()
      return value
    } catch {
      service.abortAll()
      await server.shutdown()
      throw error
    }
  }
}

/// A TCP connection to the loopback interface, with blocking calls that run off the cooperative threads.
final class RawClient: Sendable {
  private let socket: Int32
  private let isClosed = Mutex(false)
  private let received = Mutex<[UInt8]>([])

  struct Failure: Error, CustomStringConvertible { var description: String }

  /// Connects. A read that takes longer than 30 seconds fails.
  ///
  /// - Parameter receiveBuffer: bytes that the kernel buffers for this end, to make a slow reader quickly.
  init(port: Int, receiveBuffer: Int32? = nil) async throws {
    let descriptor = Glibc.socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
    guard descriptor >= 0 else { throw Failure(description: "socket: \(errno)") }
    socket = descriptor
    if var size = receiveBuffer {
      setsockopt(descriptor, SOL_SOCKET, SO_RCVBUF, &size, socklen_t(MemoryLayout<Int32>.size))
    }
    var limit = timeval(tv_sec: 30, tv_usec: 0)
    setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_port = in_port_t(port).bigEndian
    address.sin_addr.s_addr = UInt32(0x7F00_0001).bigEndian
    let target = address
    let result = await off {
      withUnsafePointer(to: target) { pointer in
        pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
          connect(descriptor, $0, socklen_t(MemoryLayout<sockaddr_in>.size))
        }
      }
    }
    if result != 0 { throw Failure(description: "connect: \(errno)") }
  }

  deinit { close() }

  /// Ends the connection.
  func close() {
    let isFirst = isClosed.withLock { isClosed in
      defer { isClosed = true }
      return !isClosed
    }
    if isFirst { _ = Glibc.close(socket) }
  }

  /// Ends the connection with a reset instead of a polite end.
  func reset() {
    var option = linger(l_onoff: 1, l_linger: 0)
    setsockopt(socket, SOL_SOCKET, SO_LINGER, &option, socklen_t(MemoryLayout<linger>.size))
    close()
  }

  func send(_ text: String) async throws {
    let bytes = Array(text.utf8)
    let descriptor = socket
    let sent = await off {
      var offset = 0
      while offset < bytes.count {
        let count = bytes.withUnsafeBytes {
          Glibc.send(descriptor, $0.baseAddress! + offset, bytes.count - offset, Int32(MSG_NOSIGNAL))
        }
        if count <= 0 { return false }
        offset += count
      }
      return true
    }
    if !sent { throw Failure(description: "send: \(errno)") }
  }

  /// Sends a request with a JSON body.
  func post(_ path: String, _ body: JSONValue, headers: String = "") async throws {
    let text = body.compactText
    try await send(
      "POST \(path) HTTP/1.1\r\nHost: localhost\r\n\(headers)Content-Length: \(text.utf8.count)\r\n\r\n\(text)")
  }

  /// Reads until what was received since the last call holds a text, and returns it; `nil` reads to the end.
  @discardableResult
  func read(until marker: String?) async throws -> String {
    let descriptor = socket
    while true {
      let text = received.withLock { String(decoding: $0, as: UTF8.self) }
      if let marker, text.contains(marker) {
        received.withLock { $0 = [] }
        return text
      }
      let piece: [UInt8]? = await off {
        var buffer = [UInt8](repeating: 0, count: 1 << 16)
        let count = recv(descriptor, &buffer, buffer.count, 0)
        return count < 0 ? nil : Array(buffer[..<count])
      }
      guard let piece else {
        if marker == nil { return text }
        throw Failure(description: "recv: \(errno), after \(text.suffix(200))")
      }
      if piece.isEmpty {
        if marker == nil { return text }
        throw Failure(description: "The server closed the connection after \(text.suffix(200))")
      }
      received.withLock { $0 += piece }
    }
  }
}

/// Runs blocking work on a thread of its own, so that it cannot starve the few cooperative threads.
func off<Value: Sendable>(_ work: @escaping @Sendable () -> Value) async -> Value {
  await withCheckedContinuation { continuation in
    Thread.detachNewThread { continuation.resume(returning: work()) }
  }
}

/// A seeded generator for property tests (splitmix64).
struct SeededGenerator: RandomNumberGenerator {
  private var state: UInt64
  init(seed: UInt64) { state = seed }
  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var mixed = state
    mixed = (mixed ^ (mixed >> 30)) &* 0xBF58_476D_1CE4_E5B9
    mixed = (mixed ^ (mixed >> 27)) &* 0x94D0_49BB_1331_11EB
    return mixed ^ (mixed >> 31)
  }
}

/// A log that keeps its lines.
final class RecordingLog: Sendable {
  private let recorded = Mutex<[String]>([])

  /// The lines so far: the level and the message.
  var lines: [String] { recorded.withLock { $0 } }

  /// A logger that writes here.
  func logger() -> Logger { Logger(label: "test") { _ in Handler(log: self) } }

  private struct Handler: LogHandler {
    let log: RecordingLog
    var metadata: Logger.Metadata = [:]
    var logLevel = Logger.Level.info

    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
      get { metadata[key] }
      set { metadata[key] = newValue }
    }

    func log(event: LogEvent) {
      log.recorded.withLock { $0.append("\(event.level) \(event.message)") }
    }
  }
}
