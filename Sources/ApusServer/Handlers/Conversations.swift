import ApusCore
import Hummingbird
import NIOCore

/// The bodies of the endpoints of conversations.
struct ConversationRequest {
  var items: [JSONValue] = []
  var metadata = JSONObject()
  private var givenItems: JSONValue?
  private var givenMetadata: JSONValue?

  /// The members of `POST /v1/conversations`.
  static let fields = FieldTable<ConversationRequest>([items, metadata])
  /// The members of `POST /v1/conversations/{id}`.
  static let updateFields = FieldTable<ConversationRequest>([
    metadata.required("an object, which takes the place of the one before")
  ])
  /// The members of `POST /v1/conversations/{id}/items`.
  static let itemFields = FieldTable<ConversationRequest>([items.required("an array of items")])

  private static let items: Field<ConversationRequest> = .array(
    "items", to: \.givenItems, of: "items", items: ResponseRequest.itemSchema, "Items of the conversation; at most 20.")
  private static let metadata: Field<ConversationRequest> = .value(
    "metadata", to: \.givenMetadata, schema: metadataSchema, "Kept with the conversation.")

  /// Reads and checks a body.
  init(_ body: ByteBuffer, _ fields: FieldTable<ConversationRequest>) throws(EngineError) {
    var request = ConversationRequest()
    // A conversation may begin with nothing, which some clients send as no body at all.
    if body.readableBytes > 0 || fields.fields.contains(where: { $0.requirement != nil }) {
      try fields.read(body, into: &request)
    }
    let items = request.givenItems?.arrayValue ?? []
    if items.count > 20 {
      throw EngineError(
        .invalidRequest, "items may hold at most 20 items at a time, got \(items.count).", parameter: "items")
    }
    request.items = try inputItems(items, "items")
    request.metadata = try checkedMetadata(request.givenMetadata)
    self = request
  }

  private init() {}
}

extension StoredItem {
  /// An item that the API shows, under its own id.
  init(json: JSONValue) {
    self.init(id: json["id"]?.stringValue ?? "", object: Array(json.compactText.utf8))
  }

  fileprivate var json: JSONValue { (try? JSONValue.parse(object)) ?? .null }
}

extension ServerState {
  /// `POST /v1/conversations`.
  func createConversation(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let body = try ConversationRequest(try await body(of: request), ConversationRequest.fields)
    let store = try requireStore()
    let items = try await resolved(body.items, "items")
    let conversation = StoredConversation(
      id: freshID("conv_"), created: unixTime(), metadata: Array(JSONValue.object(body.metadata).compactText.utf8))
    try await store.insert(conversation, items.map(StoredItem.init(json:)))
    return response(conversation)
  }

  /// `GET /v1/conversations/{id}`.
  func getConversation(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    response(try await conversation(context))
  }

  /// `POST /v1/conversations/{id}`.
  func updateConversation(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let body = try ConversationRequest(try await body(of: request), ConversationRequest.updateFields)
    var conversation = try await conversation(context)
    conversation.metadata = Array(JSONValue.object(body.metadata).compactText.utf8)
    guard try await requireStore().setMetadata(conversation.metadata, ofConversation: conversation.id) else {
      throw noConversation(conversation.id)
    }
    return response(conversation)
  }

  /// `DELETE /v1/conversations/{id}`.
  func deleteConversation(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let id = try context.parameters.require("id")
    guard try await requireStore().deleteConversation(id) else { throw noConversation(id) }
    return Response { writer in
      writer.member("id", id)
      writer.member("object", "conversation.deleted")
      writer.member("deleted", true)
    }
  }

  /// `POST /v1/conversations/{id}/items`.
  func addConversationItems(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let body = try ConversationRequest(try await body(of: request), ConversationRequest.itemFields)
    let conversation = try await conversation(context)
    let items = try await resolved(body.items, "items")
    // A conversation that may not be answered any more need not grow either.
    _ = try await conversationItems(conversation.id)
    try await requireStore().add(
      ConversationTurn(conversation: conversation.id, items: items.map(StoredItem.init(json:))))
    return listResponse(items, limit: items.count)
  }

  /// `GET /v1/conversations/{id}/items`.
  func listConversationItems(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var page = try page(of: request, largest: 100)
    let conversation = try await conversation(context)
    page.limit += 1
    let items = try await requireStore().items(ofConversation: conversation.id, page, byteLimit: .max)
    return listResponse(items.map(\.json), limit: page.limit - 1)
  }

  /// `GET /v1/conversations/{id}/items/{item}`.
  func getConversationItem(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let conversation = try await conversation(context)
    let id = try context.parameters.require("item")
    guard let item = try await requireStore().item(id, ofConversation: conversation.id) else {
      throw noItem(id, conversation.id)
    }
    return jsonResponse(item.object)
  }

  /// `DELETE /v1/conversations/{id}/items/{item}`.
  func deleteConversationItem(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let conversation = try await conversation(context)
    let id = try context.parameters.require("item")
    guard try await requireStore().deleteItem(id, ofConversation: conversation.id) else {
      throw noItem(id, conversation.id)
    }
    return response(conversation)
  }

  // MARK: Parts

  /// All items of a conversation, for a response that belongs to it.
  ///
  /// - Throws: `notFound` if there is none, `invalidRequest` if it has more items than any context holds.
  func conversationItems(_ id: String) async throws(EngineError) -> [JSONValue] {
    let store = try requireStore()
    guard try await store.conversation(id) != nil else {
      throw EngineError(.notFound, "There is no conversation \(id.debugDescription).", parameter: "conversation")
    }
    let (limit, byteLimit) = (8192, 64 << 20)
    let items = try await store.items(
      ofConversation: id, StorePage(limit: limit + 1, isAscending: true), byteLimit: byteLimit)
    if items.count > limit || items.reduce(0, { $0 + $1.object.count }) >= byteLimit {
      throw EngineError(
        .invalidRequest, "The conversation \(id) is longer than \(limit) items or 64 MiB; begin another.",
        parameter: "conversation")
    }
    return items.map(\.json)
  }

  private func conversation(_ context: ServerContext) async throws -> StoredConversation {
    let id = try context.parameters.require("id")
    guard let conversation = try await requireStore().conversation(id) else { throw noConversation(id) }
    return conversation
  }

  private func noConversation(_ id: String) -> EngineError {
    EngineError(.notFound, "There is no conversation \(id.debugDescription).", parameter: "conversation_id")
  }

  private func noItem(_ id: String, _ conversation: String) -> EngineError {
    EngineError(
      .notFound, "The conversation \(conversation) has no item \(id.debugDescription).", parameter: "item_id")
  }

  private func response(_ conversation: StoredConversation) -> Response {
    Response { writer in
      writer.member("id", conversation.id)
      writer.member("object", "conversation")
      writer.member("created_at", conversation.created)
      writer.member("metadata", (try? JSONValue.parse(conversation.metadata)) ?? [:])
    }
  }
}
