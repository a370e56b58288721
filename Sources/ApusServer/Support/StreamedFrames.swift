import ApusCore
import HTTPTypes
import Hummingbird
import NIOCore

/// The frames of one streamed response that is no stream of OpenAI's: events with names, or lines of JSON.
///
/// A write waits until the socket takes it, so a slow client holds back nothing but its own generation's reading.
struct FrameWriter {
  private var writer: any ResponseBodyWriter
  private var bytes: [UInt8] = []

  fileprivate init(_ writer: any ResponseBodyWriter) {
    self.writer = writer
    bytes.reserveCapacity(512)
  }

  /// Adds a server-sent event whose data is a JSON object.
  mutating func append(event name: String, _ object: (inout JSONWriter) -> Void) {
    var json = JSONWriter()
    json.object(object)
    append(event: name, json)
  }

  /// Adds a server-sent event whose data is a JSON document.
  mutating func append(event name: String, _ json: JSONWriter) {
    bytes += "event: ".utf8
    bytes += name.utf8
    bytes += "\ndata: ".utf8
    bytes += json.bytes
    bytes += "\n\n".utf8
  }

  /// Adds a JSON document on a line of its own.
  mutating func append(line json: JSONWriter) {
    bytes += json.bytes
    bytes.append(UInt8(ascii: "\n"))
  }

  /// Writes what was added so far, as one piece.
  mutating func flush() async throws {
    if bytes.isEmpty { return }
    let buffer = ByteBuffer(bytes: bytes)
    bytes.removeAll(keepingCapacity: true)
    try await writer.write(buffer)
  }

  fileprivate consuming func finish() async throws {
    try await flush()
    try await writer.finish(nil)
  }
}

extension Response {
  /// A response of server-sent events that have names.
  ///
  /// - Parameters:
  ///   - produce: adds the events.
  ///   - fail: adds the event that reports an error which `produce` threw; the stream ends after it.
  static func namedEvents(
    _ produce: @Sendable @escaping (inout FrameWriter) async throws -> Void,
    fail: @Sendable @escaping (EngineError, inout FrameWriter) -> Void
  ) -> Response {
    frames(
      [
        .contentType: "text/event-stream; charset=utf-8", .cacheControl: "no-cache",
        // Proxies such as nginx would otherwise collect the stream.
        HTTPField.Name("x-accel-buffering")!: "no",
      ], produce, fail)
  }

  /// A response of lines that are JSON documents.
  ///
  /// - Parameters:
  ///   - produce: adds the lines.
  ///   - fail: adds the line that reports an error which `produce` threw; the stream ends after it.
  static func lines(
    _ produce: @Sendable @escaping (inout FrameWriter) async throws -> Void,
    fail: @Sendable @escaping (EngineError, inout FrameWriter) -> Void
  ) -> Response {
    frames(
      [.contentType: "application/x-ndjson", HTTPField.Name("x-accel-buffering")!: "no"], produce, fail)
  }

  private static func frames(
    _ headers: HTTPFields, _ produce: @Sendable @escaping (inout FrameWriter) async throws -> Void,
    _ fail: @Sendable @escaping (EngineError, inout FrameWriter) -> Void
  ) -> Response {
    Response(
      status: .ok, headers: headers,
      body: ResponseBody { writer in
        var frames = FrameWriter(writer)
        do {
          try await produce(&frames)
        } catch let error as EngineError {
          fail(error, &frames)
        }
        try await frames.finish()
      })
  }
}
