public import ApusCore

/// What a server keeps between requests: responses, files and batches.
///
/// `ApusStore.Store` conforms over SQLite. Every call is one transaction: what it wrote is there when it returns, and all
/// of it or none. Calls may come from any task.
public protocol ResponseStore: Sendable {
  /// The largest file, in bytes.
  var maxFileBytes: Int { get }

  // MARK: Responses

  /// Keeps a response, in place of the one with its id. The oldest ones make room where the store's limit is reached.
  ///
  /// - Parameter turn: what is added to a conversation at the same time, if that is still there.
  /// - Throws: `outOfMemory` if there is no room for the turn.
  func save(_ response: StoredResponse, _ turn: ConversationTurn?) async throws(EngineError)
  /// The response of an id.
  func response(_ id: String) async throws(EngineError) -> StoredResponse?
  /// A response and those before it in its conversation, oldest first; empty if there is none of that id.
  ///
  /// A conversation of which not all is given begins with a response that has a `previousID`.
  ///
  /// - Parameters:
  ///   - limit: at most so many responses.
  ///   - byteLimit: no more once so many bytes are reached.
  func conversation(
    endingAt id: String, limit: Int, byteLimit: Int
  ) async throws(EngineError) -> [StoredResponse]
  /// Forgets a response. Returns whether there was one.
  func deleteResponse(_ id: String) async throws(EngineError) -> Bool
  /// The responses that were being made when they were last saved.
  func unfinishedResponses() async throws(EngineError) -> [StoredResponse]
  /// The input or output item of an id, as JSON, in any response or conversation.
  func item(_ id: String) async throws(EngineError) -> [UInt8]?

  // MARK: Conversations

  /// Keeps a new conversation.
  ///
  /// - Throws: `outOfMemory` if the store is full.
  func insert(_ conversation: StoredConversation, _ items: [StoredItem]) async throws(EngineError)
  /// The conversation of an id.
  func conversation(_ id: String) async throws(EngineError) -> StoredConversation?
  /// Changes a conversation's metadata. Returns whether there is such a conversation.
  func setMetadata(_ metadata: [UInt8], ofConversation id: String) async throws(EngineError) -> Bool
  /// Forgets a conversation and its items. Returns whether there was one.
  func deleteConversation(_ id: String) async throws(EngineError) -> Bool
  /// Puts items at the end of a conversation; those that it has stay where they are.
  ///
  /// - Throws: `notFound` if there is no such conversation, `outOfMemory` if the store is full.
  func add(_ turn: ConversationTurn) async throws(EngineError)
  /// Items of a conversation, newest first unless the page says otherwise.
  ///
  /// - Parameter byteLimit: no more once so many bytes are reached.
  func items(
    ofConversation id: String, _ page: StorePage, byteLimit: Int
  ) async throws(EngineError) -> [StoredItem]
  /// An item of a conversation.
  func item(_ id: String, ofConversation conversation: String) async throws(EngineError) -> StoredItem?
  /// Forgets an item of a conversation. Returns whether there was one.
  func deleteItem(_ id: String, ofConversation conversation: String) async throws(EngineError) -> Bool

  // MARK: Files

  /// Begins a file, which is invisible until it is finished.
  ///
  /// - Throws: `outOfMemory` if the store is full.
  func beginFile(_ id: String, created: Int) async throws(EngineError)
  /// Puts bytes at the end of a file that was begun.
  ///
  /// - Throws: `outOfMemory` if the store is full, `invalidRequest` if the file would be larger than `maxFileBytes`.
  func append(_ bytes: [UInt8], toFile id: String) async throws(EngineError)
  /// Makes a file visible. Its size is counted by the store.
  func finishFile(_ file: StoredFile) async throws(EngineError) -> StoredFile
  /// A finished file.
  func file(_ id: String) async throws(EngineError) -> StoredFile?
  /// Finished files, newest first unless the page says otherwise.
  func files(_ page: StorePage, purpose: String?) async throws(EngineError) -> [StoredFile]
  /// Bytes of a file: some from the offset on, as many as are at hand in one piece; empty at its end.
  func read(file id: String, from offset: Int) async throws(EngineError) -> [UInt8]
  /// Forgets a file, finished or not. Returns whether there was one.
  func deleteFile(_ id: String) async throws(EngineError) -> Bool

  // MARK: Batches

  /// Keeps a new batch.
  ///
  /// - Throws: `queueFull` if there are too many unfinished ones.
  func insert(_ batch: StoredBatch) async throws(EngineError)
  /// The batch of an id.
  func batch(_ id: String) async throws(EngineError) -> StoredBatch?
  /// Batches, newest first.
  func batches(_ page: StorePage) async throws(EngineError) -> [StoredBatch]
  /// Changes a batch. Returns it as it is then, or `nil` if there is none.
  func updateBatch(
    _ id: String, _ change: @escaping @Sendable (inout StoredBatch) -> Void
  ) async throws(EngineError) -> StoredBatch?
  /// The oldest batch that is not finished.
  func oldestUnfinishedBatch() async throws(EngineError) -> StoredBatch?
  /// Keeps the result of a line. The first one of a line stays.
  func record(_ result: BatchResult, inBatch id: String) async throws(EngineError)
  /// The lines that have results.
  func recordedLines(ofBatch id: String) async throws(EngineError) -> Set<Int>
  /// How many lines have results, of either kind.
  func resultCounts(ofBatch id: String) async throws(EngineError) -> (completed: Int, failed: Int)
  /// Makes files of a batch's results, in the order of its lines, and changes the batch, at once. A kind of result of which
  /// there is none makes no file.
  ///
  /// - Parameters:
  ///   - output: the file for lines that were answered.
  ///   - errors: the file for lines that were not.
  ///   - change: changes the batch; knows which of the files there are.
  func finishBatch(
    _ id: String, output: StoredFile, errors: StoredFile,
    _ change: @escaping @Sendable (_ batch: inout StoredBatch, _ hasOutput: Bool, _ hasErrors: Bool) -> Void
  ) async throws(EngineError) -> StoredBatch?
}

/// A response with what led to it.
public struct StoredResponse: Sendable, Equatable {
  /// Its id.
  public var id: String
  /// When it was asked for, in seconds since 1970.
  public var created: Int
  /// Whether it will not change any more.
  public var isFinished: Bool
  /// The response before it in its conversation.
  public var previousID: String?
  /// Its own input items: a JSON array. Those of earlier responses are not among them.
  public var input: [UInt8]
  /// The response as the API shows it: a JSON object.
  public var object: [UInt8]

  /// Makes a record.
  public init(id: String, created: Int, isFinished: Bool, previousID: String?, input: [UInt8], object: [UInt8]) {
    self.id = id
    self.created = created
    self.isFinished = isFinished
    self.previousID = previousID
    self.input = input
    self.object = object
  }
}

extension ResponseStore {
  /// Keeps a response that belongs to no conversation.
  public func save(_ response: StoredResponse) async throws(EngineError) { try await save(response, nil) }
}

/// A conversation beside its items.
public struct StoredConversation: Sendable, Equatable {
  /// Its id.
  public var id: String
  /// When it was made, in seconds since 1970.
  public var created: Int
  /// Its metadata: a JSON object.
  public var metadata: [UInt8]

  /// Makes a record.
  public init(id: String, created: Int, metadata: [UInt8]) {
    self.id = id
    self.created = created
    self.metadata = metadata
  }
}

/// An item of a conversation.
public struct StoredItem: Sendable, Equatable {
  /// Its id.
  public var id: String
  /// The item as the API shows it: a JSON object.
  public var object: [UInt8]

  /// Makes a record.
  public init(id: String, object: [UInt8]) {
    self.id = id
    self.object = object
  }
}

/// Items that belong at the end of a conversation.
public struct ConversationTurn: Sendable, Equatable {
  /// The conversation's id.
  public var conversation: String
  /// The items, in order.
  public var items: [StoredItem]

  /// Makes a record.
  public init(conversation: String, items: [StoredItem]) {
    self.conversation = conversation
    self.items = items
  }
}

/// What is known of a file beside its contents.
public struct StoredFile: Sendable, Equatable {
  /// Its id.
  public var id: String
  /// When it was made, in seconds since 1970.
  public var created: Int
  /// When it is forgotten, in seconds since 1970; `nil` is never.
  public var expires: Int?
  /// Its name.
  public var name: String
  /// What it is for, such as `batch`.
  public var purpose: String
  /// Its size in bytes.
  public var size: Int

  /// Makes a record.
  public init(id: String, created: Int, expires: Int? = nil, name: String, purpose: String, size: Int = 0) {
    self.id = id
    self.created = created
    self.expires = expires
    self.name = name
    self.purpose = purpose
    self.size = size
  }
}

/// A batch: its state as the API shows it, but for the counts of results while it runs.
public struct StoredBatch: Sendable, Equatable {
  /// Its id.
  public var id: String
  /// When it was asked for, in seconds since 1970.
  public var created: Int
  /// Whether it will not change any more.
  public var isFinished: Bool
  /// The batch as the API shows it.
  public var object: JSONObject

  /// Makes a record.
  public init(id: String, created: Int, isFinished: Bool, object: JSONObject) {
    self.id = id
    self.created = created
    self.isFinished = isFinished
    self.object = object
  }
}

/// The result of one line of a batch.
public struct BatchResult: Sendable, Equatable {
  /// The line's place in the input file, from 0.
  public var line: Int
  /// Whether it belongs to the file of errors.
  public var isError: Bool
  /// The line of the output or error file, with its line feed.
  public var bytes: [UInt8]

  /// Makes a result.
  public init(line: Int, isError: Bool, bytes: [UInt8]) {
    self.line = line
    self.isError = isError
    self.bytes = bytes
  }
}

/// Which part of a list is asked for.
public struct StorePage: Sendable, Equatable {
  /// At most so many entries.
  public var limit: Int
  /// Begins after the entry of this id; an id that is not there gives an empty page.
  public var after: String?
  /// Whether the oldest comes first.
  public var isAscending: Bool

  /// Makes a page.
  public init(limit: Int = 20, after: String? = nil, isAscending: Bool = false) {
    self.limit = limit
    self.after = after
    self.isAscending = isAscending
  }
}
