import ApusCore
import HTTPTypes
import Hummingbird
import Logging
import NIOCore

extension ServerState {
  /// `POST /v1/responses`.
  func createResponse(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var body = try ResponseRequest(try await body(of: request))
    try check(model: body.model)
    if stateful == nil, body.store == true || body.background || body.previousID != nil || body.conversationID != nil {
      throw noStore()
    }
    let items = try await wholeInput(of: &body)
    let (generation, reader) = try responseGeneration(body, items)
    let frame = ResponseFrame(
      id: generation.id.rawValue, created: unixTime(), model: service.model.name,
      isStored: stateful != nil && body.store != false, temperature: generation.sampling.temperature,
      topP: generation.sampling.topP, skipsSpecialTokens: generation.sampling.skipSpecialTokens, request: body)
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
    return eventStream { [self] writer in
      var builder = start
      builder.begin()
      do {
        try await run(group, &builder) { builder in
          try await writer.write(ByteBuffer(bytes: builder.takeEvents().joined()))
        }
      } catch let error as EngineError {
        builder.fail(error.code == .aborted ? "aborted" : "server_error", error.message)
      }
      // Kept before its end is told, so that the next request may name it.
      do {
        try await keep(builder)
      } catch let error as EngineError {
        logger.error("\(error.message)", metadata: ["request": "\(context.requestID)"])
      }
      try await writer.write(ByteBuffer(bytes: builder.takeEvents().joined()))
    }
  }

  /// `POST /v1/responses/input_tokens`: how many tokens the input of a response would have.
  func countInputTokens(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var body = try ResponseRequest(try await body(of: request), needsInput: false)
    try check(model: body.model)
    let items = try await wholeInput(of: &body)
    if items.isEmpty, body.instructions?.isEmpty != false {
      throw EngineError(.invalidRequest, "input is required: a string or an array of items.", parameter: "input")
    }
    let (generation, _) = try responseGeneration(body, items)
    guard case .tokens(let tokens) = generation.prompt else {
      throw EngineError(.internalFailure, "The prompt has not been tokenized.")
    }
    return Response { writer in
      writer.member("object", "response.input_tokens")
      writer.member("input_tokens", tokens.count)
    }
  }

  /// `POST /v1/responses/compact`, which is refused.
  func compactResponse(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    throw EngineError(
      .unsupported,
      "Conversations are not compacted here. Name previous_response_id or conversation, with truncation set to \"auto\" "
        + "where they outgrow the context.")
  }

  /// `GET /v1/responses/{id}`.
  func getResponse(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let stored = try await storedResponse(context)
    let query = request.uri.queryParameters
    guard query["stream"] == "true" else { return jsonResponse(stored.object) }
    var first = 0
    if let text = query["starting_after"].map({ String($0) }) {
      guard let number = Int(text), number >= -1, number < .max else {
        throw EngineError(
          .invalidRequest, "starting_after must be an event's sequence_number, got \(text.debugDescription).",
          parameter: "starting_after")
      }
      first = number + 1
    }
    return try events(of: stored.id, from: first)
  }

  /// `DELETE /v1/responses/{id}`.
  func deleteResponse(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let stored = try await storedResponse(context)
    _ = await stateful?.background.cancel(stored.id)
    stateful?.events.remove(stored.id)
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

  /// The items that a response answers: those of the response before or of the conversation, and the input, whose
  /// references are replaced by what they refer to.
  private func wholeInput(of body: inout ResponseRequest) async throws(EngineError) -> [JSONValue] {
    body.input = try await resolved(body.input, "input")
    if let previousID = body.previousID { return try await history(endingAt: previousID) + body.input }
    if let conversationID = body.conversationID { return try await conversationItems(conversationID) + body.input }
    return body.input
  }

  /// Items with references replaced by what they refer to.
  func resolved(_ items: [JSONValue], _ name: String) async throws(EngineError) -> [JSONValue] {
    var items = items
    for (index, item) in items.enumerated() where item["type"] == "item_reference" {
      let id = item["id"]?.stringValue ?? ""
      guard let found = try await requireStore().item(id), let item = try? JSONValue.parse(found) else {
        throw EngineError(
          .notFound, "\(name)[\(index)] refers to the item \(id.debugDescription), which is not there.",
          parameter: "\(name)[\(index)].id")
      }
      items[index] = item
    }
    return items
  }

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
            id: RequestID(freshID("resp_")), prompt: .tokens(tokens), sampling: parameters,
            logprobs: body.topLogprobs.map { LogprobOptions(topCount: $0) }, priority: common.priority,
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
    let skipped = Set(current.frame.skipsSpecialTokens ? service.model.specialTokens : [])
    try await group.forEachChunk { _, chunk in
      current.add(chunk, logprobs: logprobTexts(of: chunk, skipped: skipped))
      if case .abort? = chunk.finishReason, stateful?.background.isCancelled(current.frame.id) == true {
        current.cancel()
      } else if let reason = chunk.finishReason {
        current.end(reason, now: unixTime(), countTokens: countTokens)
      } else {
        try await progress(&current)
      }
    }
  }

  /// The log-probabilities of a chunk's tokens that are in its text.
  ///
  /// - Parameter skipped: texts of tokens that are left out.
  private func logprobTexts(of chunk: GenerationChunk, skipped: Set<String>) -> [TokenLogprobText] {
    var positions = chunk.logprobs[...]
    if case .stop(.token)? = chunk.finishReason { positions = positions.dropLast() }
    return positions.compactMap { position in
      let (bytes, text) = text(of: position.chosen.token)
      if skipped.contains(text) { return nil }
      var writer = JSONWriter()
      writeLogprobs(position, to: &writer)
      return TokenLogprobText(json: writer.bytes, byteCount: bytes.count)
    }
  }

  /// Puts a response into the store, if it is to be stored, and what was said into its conversation, if it has one.
  private func keep(_ builder: ResponseBuilder) async throws(EngineError) {
    guard let stateful else { return }
    let frame = builder.frame
    var turn: ConversationTurn?
    if let conversation = frame.request.conversationID, ["completed", "incomplete"].contains(builder.status) {
      let items = frame.request.input + builder.outputItems
      turn = ConversationTurn(conversation: conversation, items: items.map(StoredItem.init(json:)))
    }
    guard frame.isStored else {
      if let turn {
        do throws(EngineError) {
          try await stateful.store.add(turn)
        } catch {
          // It may have been deleted while the answer was made.
          if error.code != .notFound { throw error }
        }
      }
      return
    }
    var input = JSONWriter()
    input.value(.array(frame.request.input))
    try await stateful.store.save(
      StoredResponse(
        id: frame.id, created: frame.created, isFinished: !["queued", "in_progress"].contains(builder.status),
        previousID: frame.request.previousID, input: input.bytes, object: builder.object), turn)
  }

  /// Goes on with a response without its client, and tells the client how to find it, or its events as they come.
  private func makeInBackground(_ group: GenerationGroup, _ start: ResponseBuilder) async throws -> Response {
    guard let stateful else { throw noStore() }
    var queued = start
    queued.status = "queued"
    do {
      try await keep(queued)
    } catch {
      group.finish()
      throw error
    }
    let id = start.frame.id
    let isStreamed = start.frame.request.stream
    if isStreamed { stateful.events.open(id) }
    stateful.background.start(id, abort: group.finish) { [self] in
      var builder = start
      builder.begin()
      do {
        try await keep(builder)
        stateful.events.append(builder.takeEvents(), to: id)
        try await run(group, &builder) { builder in stateful.events.append(builder.takeEvents(), to: id) }
      } catch {
        let error = error as? EngineError ?? EngineError(.aborted, "The request was cancelled.")
        if stateful.background.isCancelled(id) {
          builder.cancel()
        } else {
          builder.fail(error.code == .aborted ? "aborted" : "server_error", error.message)
        }
      }
      group.finish()
      do {
        try await keep(builder)
      } catch {
        logger.error("\(error)", metadata: ["request": "\(id)"])
      }
      stateful.events.append(builder.takeEvents(), to: id)
      stateful.events.finish(id)
    }
    return isStreamed ? try events(of: id, from: 0) : jsonResponse(queued.object)
  }

  /// The events of a response in the background from a number on, those to come included.
  private func events(of id: String, from first: Int) throws(EngineError) -> Response {
    guard let events = stateful?.events else { throw noStore() }
    try events.check(id, from: first)
    return eventStream { writer in
      var place = first
      while let (bytes, next) = await events.next(id, from: place) {
        try await writer.write(ByteBuffer(bytes: bytes))
        place = next
      }
    }
  }

  /// A stream of server-sent events.
  private func eventStream(
    _ write: @escaping @Sendable (inout any ResponseBodyWriter) async throws -> Void
  ) -> Response {
    Response(
      status: .ok,
      headers: [
        .contentType: "text/event-stream; charset=utf-8", .cacheControl: "no-cache",
        HTTPField.Name("x-accel-buffering")!: "no",
      ],
      body: ResponseBody { writer in
        try await write(&writer)
        try await writer.finish(nil)
      })
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
