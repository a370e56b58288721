import ApusCore
import HTTPTypes
import Hummingbird
import NIOCore

/// Server-sent events of one response: builds frames as bytes and writes them.
///
/// A write waits until the socket takes it, so a slow client holds back nothing but its own generation's reading.
struct EventWriter {
  private var writer: any ResponseBodyWriter
  private var frame: [UInt8] = []

  init(_ writer: any ResponseBodyWriter) {
    self.writer = writer
    frame.reserveCapacity(512)
  }

  /// Adds an event whose data is `prefix`, the text as a JSON string, and `suffix`: the fast path of streaming, where only
  /// the text is new.
  mutating func append(_ template: DeltaTemplate, _ text: String) {
    frame += template.prefix
    var json = JSONWriter(capacity: text.utf8.count + 16)
    json.value(text)
    frame += json.bytes
    frame += template.suffix
  }

  /// Adds an event whose data is a JSON document.
  mutating func append(_ json: JSONWriter) {
    frame += "data: ".utf8
    frame += json.bytes
    frame += "\n\n".utf8
  }

  /// Adds an event whose data is a JSON object.
  mutating func append(object: (inout JSONWriter) -> Void) {
    var json = JSONWriter()
    json.object(object)
    append(json)
  }

  /// Writes the events added so far, as one piece.
  mutating func flush() async throws {
    if frame.isEmpty { return }
    let buffer = ByteBuffer(bytes: frame)
    frame.removeAll(keepingCapacity: true)
    try await writer.write(buffer)
  }

  /// Writes what is left, the `[DONE]` that clients wait for, and ends the response.
  consuming func finish() async throws {
    frame += "data: [DONE]\n\n".utf8
    try await flush()
    try await writer.finish(nil)
  }
}

/// The constant bytes around the text of a streamed chunk.
struct DeltaTemplate: Sendable {
  fileprivate let prefix: [UInt8]
  fileprivate let suffix: [UInt8]

  /// Makes a template of a chunk written with the text `marker`, which must occur once.
  ///
  /// - Parameter write: writes the chunk with the given text.
  init(_ write: (inout JSONWriter, String) -> Void) {
    // A string that no name of a model or request can hold by chance: control characters are escaped in JSON.
    let marker = "\u{1}\u{2}\u{1}"
    var json = JSONWriter()
    write(&json, marker)
    var quoted = JSONWriter()
    quoted.value(marker)
    let start = json.bytes.firstRange(of: quoted.bytes)!
    prefix = Array("data: ".utf8) + json.bytes[..<start.lowerBound]
    suffix = json.bytes[start.upperBound...] + Array("\n\n".utf8)
  }
}

extension Response {
  /// A response of server-sent events.
  ///
  /// An error that `produce` throws is sent as an event with an error object before `[DONE]`: OpenAI's clients raise it,
  /// and clients that know no errors in streams still see the end they wait for.
  static func events(_ produce: @Sendable @escaping (inout EventWriter) async throws -> Void) -> Response {
    let body = ResponseBody { writer in
      var events = EventWriter(writer)
      do {
        try await produce(&events)
      } catch let error as EngineError {
        var json = JSONWriter()
        error.write(to: &json)
        events.append(json)
      }
      try await events.finish()
    }
    return Response(
      status: .ok,
      headers: [
        .contentType: "text/event-stream; charset=utf-8", .cacheControl: "no-cache",
        // Proxies such as nginx would otherwise collect the stream.
        HTTPField.Name("x-accel-buffering")!: "no",
      ], body: body)
  }
}
