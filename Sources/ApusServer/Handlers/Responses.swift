import ApusCore
import HTTPTypes
import Hummingbird
import Logging
import NIOCore

extension ServerState {
  /// `POST /v1/responses`.
  func createResponse(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let body = try ResponseRequest(try await body(of: request))
    try check(model: body.model)
    if stateful == nil, body.store == true || body.background || body.previousID != nil { throw noStore() }
    var items = body.input
    if let previousID = body.previousID { items = try await history(endingAt: previousID) + items }
    let (generation, reader) = try responseGeneration(body, items)
    let frame = ResponseFrame(
      id: generation.id.rawValue, created: unixTime(), model: service.model.name,
      isStored: stateful != nil && body.store != false, temperature: generation.sampling.temperature,
      topP: generation.sampling.topP, request: body)
    let group: GenerationGroup
    do {
      // A response in the background outlives its client's connection.
      group = try submit([generation], context, followsConnection: !body.background)
    } catch {
      throw ResponseRequest.inResponseTerms(error)
    }
    var builder = ResponseBuilder(frame, reader, isStreaming: body.stream)
    if body.background { return try await makeInBackground(group, builder) }
    if !body.stream {
      try await run(group, &builder) { _ in }
      try await keep(builder)
      return Response(
        status: .ok, headers: [.contentType: "application/json"],
        body: ResponseBody(byteBuffer: ByteBuffer(bytes: builder.object)))
    }
    let start = builder
    let output = ResponseBody { [self] writer in
      var builder = start
      builder.begin()
      do {
        try await run(group, &builder) { builder in try await writer.write(ByteBuffer(bytes: builder.takeEvents())) }
      } catch let error as EngineError {
        builder.fail(error.code == .aborted ? "aborted" : "server_error", error.message)
      }
      // Kept before its end is told, so that the next request may name it.
      do {
        try await keep(builder)
      } catch let error as EngineError {
        logger.error("\(error.message)", metadata: ["request": "\(context.requestID)"])
      }
      try await writer.write(ByteBuffer(bytes: builder.takeEvents()))
      try await writer.finish(nil)
    }
    return Response(
      status: .ok,
      headers: [
        .contentType: "text/event-stream; charset=utf-8", .cacheControl: "no-cache",
        HTTPField.Name("x-accel-buffering")!: "no",
      ], body: output)
  }

  /// `GET /v1/responses/{id}`.
  func getResponse(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    if request.uri.queryParameters.get("stream") == "true" {
      throw EngineError(.unsupported, "A stored response cannot be streamed; leave stream out.", parameter: "stream")
    }
    return jsonResponse(try await storedResponse(context).object)
  }

  /// `DELETE /v1/responses/{id}`.
  func deleteResponse(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let stored = try await storedResponse(context)
    _ = await stateful?.background.cancel(stored.id)
    guard try await requireStore().deleteResponse(stored.id) else { throw noResponse(stored.id) }
    return Response { writer in
      writer.member("id", stored.id)
      writer.member("object", "response")
      writer.member("deleted", true)
    }
  }

  /// `POST /v1/responses/{id}/cancel`.
  func cancelResponse(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let stored = try await storedResponse(context)
    let object = (try? JSONValue.parse(stored.object)) ?? .null
    if object["background"] != true {
      throw EngineError(
        .invalidRequest, "Only a response in the background can be cancelled.", parameter: "response_id")
    }
    // Cancelling what has ended changes nothing.
    _ = await stateful?.background.cancel(stored.id)
    return jsonResponse(try await storedResponse(context).object)
  }

  /// `GET /v1/responses/{id}/input_items`.
  func responseInputItems(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let page = try page(of: request, largest: 100)
    let stored = try await storedResponse(context)
    var items = (try? JSONValue.parse(stored.input))?.arrayValue ?? []
    if !page.isAscending { items.reverse() }
    if let after = page.after {
      guard let index = items.firstIndex(where: { $0["id"] == .string(after) }) else {
        throw EngineError(.invalidRequest, "after: there is no item \(after.debugDescription).", parameter: "after")
      }
      items.removeFirst(index + 1)
    }
    return listResponse(items, limit: page.limit)
  }

  // MARK: Parts

  /// The items of a conversation up to and including a response.
  private func history(endingAt id: String) async throws(EngineError) -> [JSONValue] {
    // Far more than fits the context, unless turns are left out.
    let limit = 1024
    let chain = try await requireStore().conversation(endingAt: id, limit: limit, byteLimit: 64 << 20)
    func refuse(_ code: EngineError.Code, _ message: String) -> EngineError {
      EngineError(code, message, parameter: "previous_response_id")
    }
    guard let last = chain.last else {
      throw refuse(.notFound, "There is no response \(id.debugDescription) to follow.")
    }
    if !last.isFinished { throw refuse(.invalidRequest, "The response \(id) is not finished; wait for it.") }
    if let missing = chain[0].previousID {
      if try await requireStore().response(missing) != nil {
        throw refuse(.invalidRequest, "The conversation of \(id) is longer than \(limit) responses or 64 MiB.")
      }
      throw refuse(.notFound, "The conversation of \(id) is not whole: \(missing) has been deleted.")
    }
    var items: [JSONValue] = []
    for response in chain {
      items += (try? JSONValue.parse(response.input))?.arrayValue ?? []
      items += (try? JSONValue.parse(response.object))?["output"]?.arrayValue ?? []
    }
    return items
  }

  /// The generation that answers items.
  ///
  /// With `truncation: auto`, as many of the oldest turns are left out as it takes for the rest to fit the context.
  private func responseGeneration(
    _ body: ResponseRequest, _ items: [JSONValue]
  ) throws(EngineError) -> (ApusCore.Request, AnswerReader) {
    let messages = chatMessages(items, instructions: body.instructions)
    func attempt(_ messages: [JSONValue]) throws(EngineError) -> (ApusCore.Request, AnswerReader) {
      do {
        let chat = try body.chatRequest(messages)
        let common = chat.common
        var parameters = try common.sampling.parameters(
          for: service.model, defaultMaxTokens: service.model.samplingDefaults.maxNewTokens)
        let (tokens, reader) = try prompt(of: chat, &parameters)
        return (
          ApusCore.Request(
            id: RequestID(freshID("resp_")), prompt: .tokens(tokens), sampling: parameters, priority: common.priority,
            cacheSalt: common.cacheSalt), reader
        )
      } catch {
        throw ResponseRequest.inResponseTerms(error)
      }
    }
    let whole = try attempt(messages)
    let context = service.model.contextLength
    func fits(_ request: ApusCore.Request) -> Bool {
      guard case .tokens(let tokens) = request.prompt else { return true }
      return tokens.count + (request.sampling.maxNewTokens ?? 1) <= context
    }
    if !body.truncates || fits(whole.0) { return whole }
    let systemCount = messages.prefix { $0["role"] == "system" || $0["role"] == "developer" }.count
    // A conversation may begin at a user's message only: anything else answers what is left out.
    let beginnings = messages.indices.filter { $0 > systemCount && messages[$0]["role"] == "user" }
    func cut(_ beginning: Int) throws(EngineError) -> (ApusCore.Request, AnswerReader) {
      try attempt(Array(messages[..<systemCount] + messages[beginning...]))
    }
    var (low, high) = (0, beginnings.count)
    var best: (ApusCore.Request, AnswerReader)?
    while low < high {
      let middle = (low + high) / 2
      let candidate = try cut(beginnings[middle])
      if fits(candidate.0) {
        best = candidate
        high = middle
      } else {
        low = middle + 1
      }
    }
    // Where even the last turn is too long, the engine says so.
    if let best { return best }
    return try beginnings.last.map(cut) ?? whole
  }

  /// Reads a generation to its end.
  ///
  /// - Parameter progress: called after each piece but the last.
  private func run(
    _ group: GenerationGroup, _ builder: inout ResponseBuilder,
    _ progress: (inout ResponseBuilder) async throws -> Void
  ) async throws {
    var current = builder
    defer { builder = current }
    try await group.forEachChunk { _, chunk in
      current.add(chunk)
      if let reason = chunk.finishReason {
        current.end(reason, now: unixTime()) { text in
          (try? service.encode(text, addSpecialTokens: false).count) ?? 0
        }
      } else {
        try await progress(&current)
      }
    }
  }

  /// Puts a response into the store, if it is to be stored.
  private func keep(_ builder: ResponseBuilder) async throws(EngineError) {
    guard builder.frame.isStored, let stateful else { return }
    let frame = builder.frame
    var input = JSONWriter()
    input.value(.array(frame.request.input))
    try await stateful.store.save(
      StoredResponse(
        id: frame.id, created: frame.created, isFinished: !["queued", "in_progress"].contains(builder.status),
        previousID: frame.request.previousID, input: input.bytes, object: builder.object))
  }

  /// Goes on with a response without its client, and tells the client how to find it.
  private func makeInBackground(_ group: GenerationGroup, _ start: ResponseBuilder) async throws -> Response {
    guard let stateful else { throw noStore() }
    var queued = start
    queued.status = "queued"
    try await keep(queued)
    let id = start.frame.id
    stateful.background.start(id, abort: group.finish) { [self] in
      var builder = start
      do {
        try await keep(builder)
        try await run(group, &builder) { _ in }
      } catch {
        let error = error as? EngineError ?? EngineError(.aborted, "The request was cancelled.")
        builder.fail(error.code == .aborted ? "aborted" : "server_error", error.message)
      }
      group.finish()
      if builder.status == "failed", stateful.background.isCancelled(id) { builder.cancelAfterFailure() }
      do {
        try await keep(builder)
      } catch {
        logger.error("\(error)", metadata: ["request": "\(id)"])
      }
    }
    return jsonResponse(queued.object)
  }

  /// Marks the responses that an earlier process left unfinished as failed.
  func failLostResponses() async throws(EngineError) {
    guard let stateful else { return }
    for var response in try await stateful.store.unfinishedResponses() where !stateful.background.contains(response.id)
    {
      guard var object = (try? JSONValue.parse(response.object))?.objectValue else { continue }
      object["status"] = "failed"
      object["error"] = ["code": "server_error", "message": "The server stopped before the response was complete."]
      response.object = Array(JSONValue.object(object).compactText.utf8)
      response.isFinished = true
      try await stateful.store.save(response)
    }
  }

  private func storedResponse(_ context: ServerContext) async throws -> StoredResponse {
    let id = try context.parameters.require("id")
    guard let stored = try await requireStore().response(id) else { throw noResponse(id) }
    return stored
  }

  private func noResponse(_ id: String) -> EngineError {
    EngineError(.notFound, "There is no response \(id.debugDescription).", parameter: "response_id")
  }

  private func noStore() -> EngineError {
    EngineError(.unsupported, "This server keeps nothing between requests.")
  }

  /// The store.
  ///
  /// - Throws: `unsupported` if the server has none.
  func requireStore() throws(EngineError) -> any ResponseStore {
    guard let stateful else { throw noStore() }
    return stateful.store
  }

  func jsonResponse(_ bytes: [UInt8]) -> Response {
    Response(
      status: .ok, headers: [.contentType: "application/json"],
      body: ResponseBody(byteBuffer: ByteBuffer(bytes: bytes)))
  }

  /// The part of a list that a request's `limit`, `after` and `order` ask for.
  func page(of request: Hummingbird.Request, largest: Int, usual: Int = 20) throws(EngineError) -> StorePage {
    let query = request.uri.queryParameters
    var page = StorePage(limit: usual)
    if let text = query["limit"].map(String.init) {
      guard let limit = Int(text), (1...largest).contains(limit) else {
        throw EngineError(
          .invalidRequest, "limit must be in 1...\(largest), got \(text.debugDescription).", parameter: "limit")
      }
      page.limit = limit
    }
    switch query["order"].map(String.init) {
    case nil, "desc"?: break
    case "asc"?: page.isAscending = true
    case let other?:
      throw EngineError(
        .invalidRequest, "order must be \"asc\" or \"desc\", got \(other.debugDescription).", parameter: "order")
    }
    page.after = query["after"].map(String.init)
    return page
  }

  /// A list object of the entries up to a limit.
  func listResponse(_ entries: [JSONValue], limit: Int) -> Response {
    let shown = entries.prefix(limit)
    return Response { writer in
      writer.member("object", "list")
      writer.member("data", .array(Array(shown)))
      writer.member("first_id", shown.first?["id"] ?? .null)
      writer.member("last_id", shown.last?["id"] ?? .null)
      writer.member("has_more", entries.count > limit)
    }
  }
}
