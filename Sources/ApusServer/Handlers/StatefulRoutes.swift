import ApusCore
import HTTPTypes
import Hummingbird
import NIOCore
import Synchronization

extension ServerState {
  /// The endpoints that keep something between requests.
  var statefulRoutes: [Route] {
    [
      Route([.post], "/v1/responses", isWork: true, createResponse),
      Route([.post], "/v1/responses/input_tokens", countInputTokens),
      Route([.post], "/v1/responses/compact", compactResponse),
      Route([.get], "/v1/responses/{id}", getResponse),
      Route([.delete], "/v1/responses/{id}", deleteResponse),
      Route([.post], "/v1/responses/{id}/cancel", cancelResponse),
      Route([.get], "/v1/responses/{id}/input_items", responseInputItems),
      Route([.post], "/v1/conversations", createConversation),
      Route([.get], "/v1/conversations/{id}", getConversation),
      Route([.post], "/v1/conversations/{id}", updateConversation),
      Route([.delete], "/v1/conversations/{id}", deleteConversation),
      Route([.post], "/v1/conversations/{id}/items", addConversationItems),
      Route([.get], "/v1/conversations/{id}/items", listConversationItems),
      Route([.get], "/v1/conversations/{id}/items/{item}", getConversationItem),
      Route([.delete], "/v1/conversations/{id}/items/{item}", deleteConversationItem),
      Route([.post], "/v1/files", uploadFile),
      Route([.get], "/v1/files", listFiles),
      Route([.get], "/v1/files/{id}", getFile),
      Route([.delete], "/v1/files/{id}", deleteFile),
      Route([.get], "/v1/files/{id}/content", fileContent),
      Route([.post], "/v1/batches", isWork: true, createBatch),
      Route([.get], "/v1/batches", listBatches),
      Route([.get], "/v1/batches/{id}", getBatch),
      Route([.post], "/v1/batches/{id}/cancel", cancelBatch),
    ]
  }

  /// The endpoints that a batch may name, of those that there are.
  var batchEndpoints: [String] {
    let possible = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    let paths = Set(routes.filter { $0.methods.contains(.post) }.map(\.path))
    return possible.filter(paths.contains)
  }

  /// The handler that answers a batch's lines: the endpoint's own, with errors turned into responses as for HTTP.
  ///
  /// Each answer is its status and its body.
  func batchHandler(
    of endpoint: String
  ) -> (@Sendable (_ requestID: String, _ body: JSONValue) async throws -> (status: Int, body: [UInt8]))? {
    guard let route = routes.first(where: { $0.path == endpoint && $0.methods.contains(.post) }) else { return nil }
    let errors = ErrorMiddleware(logger: logger, methods: [:])
    let handler = route.handler
    return { [logger] requestID, body in
      let request = Hummingbird.Request(
        head: HTTPRequest(method: .post, scheme: "http", authority: "localhost", path: endpoint),
        body: RequestBody(buffer: ByteBuffer(string: body.compactText)))
      let context = ServerContext(internal: requestID, logger: logger)
      let response = try await errors.handle(request, context: context) { request, context in
        try await handler(request, context)
      }
      let collected = CollectedBody()
      try await response.body.write(CollectingWriter(collected))
      return (response.status.code, collected.take())
    }
  }
}

/// Where a response's body is collected.
private final class CollectedBody: Sendable {
  private let bytes = Mutex<[UInt8]>([])
  func append(_ buffer: ByteBuffer) { bytes.withLock { $0 += buffer.readableBytesView } }
  func take() -> [UInt8] { bytes.withLock { $0 } }
}

private struct CollectingWriter: ResponseBodyWriter {
  let body: CollectedBody
  init(_ body: CollectedBody) { self.body = body }
  mutating func write(_ buffer: ByteBuffer) async throws { body.append(buffer) }
  consuming func finish(_ trailingHeaders: HTTPFields?) async throws {}
}
