public import ApusCore
public import ApusServer
import Foundation
import GRDB
import Glibc
import Synchronization

/// The limits of a store.
public struct StoreLimits: Sendable, Equatable {
  /// The most responses; the oldest make room for new ones.
  public var responses = 100_000
  /// The most bytes of responses together; the oldest make room for new ones.
  public var responseBytes = 1 << 30
  /// The most conversations. New ones are refused beyond it.
  public var conversations = 100_000
  /// The most bytes of conversations' items together. New ones are refused beyond it.
  public var conversationBytes = 1 << 30
  /// The largest file, in bytes.
  public var fileBytes = 200 << 20
  /// The most files. New ones are refused beyond it.
  public var files = 10_000
  /// The most bytes of files and of batches' results together. New ones are refused beyond it.
  public var totalFileBytes = 10 << 30
  /// The most batches that are not finished. New ones are refused beyond it.
  public var unfinishedBatches = 1000
  /// The most finished batches; the oldest make room for new ones. Their files stay.
  public var finishedBatches = 10_000

  /// Limits for a store on disk.
  public init() {}

  /// Limits for a store in memory.
  public static let inMemory: StoreLimits = {
    var limits = StoreLimits()
    limits.responses = 10_000
    limits.responseBytes = 256 << 20
    limits.conversations = 10_000
    limits.conversationBytes = 256 << 20
    limits.totalFileBytes = 1 << 30
    limits.files = 1000
    return limits
  }()
}

/// Responses, files and batches in an SQLite database.
///
/// A database on disk is in WAL mode: readers do not wait for the writer, and what was written survives the end of the
/// process at any moment (and the machine's, but for the last transactions). It belongs to one process at a time.
public final class Store: ResponseStore {
  private let database: any DatabaseWriter
  private let limits: StoreLimits
  private let lock: FileLock?

  public var maxFileBytes: Int { limits.fileBytes }

  /// Opens a store, making or migrating its database.
  ///
  /// - Parameters:
  ///   - path: the database's file, beside which SQLite keeps two of its own; `nil` keeps everything in memory.
  ///   - limits: what it may hold; by default those fit for its place.
  /// - Throws: `invalidRequest` if the database cannot be opened, is of a newer version, or is in use by another process.
  public init(path: String? = nil, limits: StoreLimits? = nil) throws(EngineError) {
    self.limits = limits ?? (path == nil ? .inMemory : StoreLimits())
    var configuration = Configuration()
    configuration.label = "apus-store"
    configuration.maximumReaderCount = 4
    do {
      if let path {
        lock = try FileLock(path + ".lock")
        database = try DatabasePool(path: path, configuration: configuration)
      } else {
        lock = nil
        database = try DatabaseQueue(configuration: configuration)
      }
      let migrator = Self.migrator
      if try database.read({ try migrator.hasBeenSuperseded($0) }) {
        throw EngineError(.invalidRequest, "The store was written by a newer version of Apus.")
      }
      try migrator.migrate(database)
      // Uploads that a stopping process broke off.
      try database.write { db in
        try db.execute(sql: "DELETE FROM file WHERE isFinished = 0")
      }
    } catch let error as EngineError {
      throw EngineError(error.code, "Cannot open the store \(path ?? "in memory"): \(error.message)")
    } catch {
      throw EngineError(.invalidRequest, "Cannot open the store \(path ?? "in memory"): \(error).")
    }
  }

  /// Ends all use of the database, so that another process may open it. Calls after it fail.
  public func close() {
    try? database.close()
    lock?.release()
  }

  deinit { close() }

  /// The schema, version by version. A version that has been released is never changed.
  private static var migrator: DatabaseMigrator {
    var migrator = DatabaseMigrator()
    migrator.registerMigration("1") { db in
      // `number` orders what was made in the same second. Contents are apart from what is listed, so that a list reads
      // no blobs; a chunk's `position` is the offset of its first byte.
      try db.execute(
        sql: """
          CREATE TABLE response (
            number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created INTEGER NOT NULL, isFinished INTEGER NOT NULL,
            previousID TEXT, size INTEGER NOT NULL, input BLOB NOT NULL, object BLOB NOT NULL);
          CREATE INDEX responseUnfinished ON response (number) WHERE isFinished = 0;
          CREATE TABLE file (
            number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created INTEGER NOT NULL, expires INTEGER,
            isFinished INTEGER NOT NULL, name TEXT NOT NULL, purpose TEXT NOT NULL, size INTEGER NOT NULL);
          CREATE TABLE fileChunk (
            number INTEGER PRIMARY KEY, file INTEGER NOT NULL REFERENCES file ON DELETE CASCADE,
            position INTEGER NOT NULL, bytes BLOB NOT NULL, UNIQUE (file, position));
          CREATE TABLE batch (
            number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created INTEGER NOT NULL, isFinished INTEGER NOT NULL,
            object BLOB NOT NULL);
          CREATE INDEX batchUnfinished ON batch (number) WHERE isFinished = 0;
          CREATE TABLE batchResult (
            number INTEGER PRIMARY KEY, batch INTEGER NOT NULL REFERENCES batch ON DELETE CASCADE,
            line INTEGER NOT NULL, isError INTEGER NOT NULL, size INTEGER NOT NULL, bytes BLOB NOT NULL,
            UNIQUE (batch, line));
          CREATE INDEX batchResultKind ON batchResult (batch, isError, line, size);
          -- One row of totals, so that limits cost no scan.
          CREATE TABLE total (
            id INTEGER PRIMARY KEY CHECK (id = 1), responses INTEGER NOT NULL, responseBytes INTEGER NOT NULL,
            fileBytes INTEGER NOT NULL);
          INSERT INTO total VALUES (1, 0, 0, 0);
          CREATE TRIGGER responseInserted AFTER INSERT ON response BEGIN
            UPDATE total SET responses = responses + 1, responseBytes = responseBytes + new.size;
          END;
          CREATE TRIGGER responseUpdated AFTER UPDATE OF size ON response BEGIN
            UPDATE total SET responseBytes = responseBytes + new.size - old.size;
          END;
          CREATE TRIGGER responseDeleted AFTER DELETE ON response BEGIN
            UPDATE total SET responses = responses - 1, responseBytes = responseBytes - old.size;
          END;
          CREATE TRIGGER fileInserted AFTER INSERT ON file BEGIN
            UPDATE total SET fileBytes = fileBytes + new.size;
          END;
          CREATE TRIGGER fileUpdated AFTER UPDATE OF size ON file BEGIN
            UPDATE total SET fileBytes = fileBytes + new.size - old.size;
          END;
          CREATE TRIGGER fileDeleted AFTER DELETE ON file BEGIN
            UPDATE total SET fileBytes = fileBytes - old.size;
          END;
          CREATE TRIGGER batchResultInserted AFTER INSERT ON batchResult BEGIN
            UPDATE total SET fileBytes = fileBytes + new.size;
          END;
          CREATE TRIGGER batchResultDeleted AFTER DELETE ON batchResult BEGIN
            UPDATE total SET fileBytes = fileBytes - old.size;
          END;
          """)
    }
    migrator.registerMigration("2") { db in
      // Items of responses are found by their ids; they themselves stay in the response.
      try db.execute(
        sql: """
          CREATE TABLE responseItem (
            number INTEGER PRIMARY KEY, id TEXT NOT NULL, response INTEGER NOT NULL REFERENCES response ON DELETE CASCADE);
          CREATE INDEX responseItemID ON responseItem (id);
          CREATE INDEX responseItemResponse ON responseItem (response);
          INSERT INTO responseItem (id, response)
            SELECT json_extract(value, '$.id'), response.number FROM response,
              json_each(iif(json_valid(CAST(input AS TEXT)), CAST(input AS TEXT), '[]'))
            WHERE json_extract(value, '$.id') IS NOT NULL;
          INSERT INTO responseItem (id, response)
            SELECT json_extract(value, '$.id'), response.number FROM response,
              json_each(iif(json_valid(CAST(object AS TEXT)), CAST(object AS TEXT), '{}'), '$.output')
            WHERE json_extract(value, '$.id') IS NOT NULL;
          CREATE TABLE conversation (
            number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created INTEGER NOT NULL, metadata BLOB NOT NULL);
          CREATE TABLE conversationItem (
            number INTEGER PRIMARY KEY, conversation INTEGER NOT NULL REFERENCES conversation ON DELETE CASCADE,
            id TEXT NOT NULL, size INTEGER NOT NULL, object BLOB NOT NULL, UNIQUE (conversation, id));
          CREATE INDEX conversationItemID ON conversationItem (id);
          CREATE INDEX conversationItemOrder ON conversationItem (conversation, number);
          CREATE TABLE conversationTotal (
            id INTEGER PRIMARY KEY CHECK (id = 1), conversations INTEGER NOT NULL, bytes INTEGER NOT NULL);
          INSERT INTO conversationTotal VALUES (1, 0, 0);
          CREATE TRIGGER conversationInserted AFTER INSERT ON conversation BEGIN
            UPDATE conversationTotal SET conversations = conversations + 1;
          END;
          CREATE TRIGGER conversationDeleted AFTER DELETE ON conversation BEGIN
            UPDATE conversationTotal SET conversations = conversations - 1;
          END;
          CREATE TRIGGER conversationItemInserted AFTER INSERT ON conversationItem BEGIN
            UPDATE conversationTotal SET bytes = bytes + new.size;
          END;
          CREATE TRIGGER conversationItemDeleted AFTER DELETE ON conversationItem BEGIN
            UPDATE conversationTotal SET bytes = bytes - old.size;
          END;
          """)
    }
    return migrator
  }

  // MARK: Access

  /// Runs a transaction.
  private func write<Value: Sendable>(
    _ body: @escaping @Sendable (Database) throws -> Value
  ) async throws(EngineError) -> Value {
    do {
      return try await database.write(body)
    } catch let error as EngineError {
      throw error
    } catch let error as DatabaseError where error.resultCode == .SQLITE_FULL {
      throw EngineError(.outOfMemory, "The disk of the server's store is full.")
    } catch is CancellationError {
      throw EngineError(.aborted, "The request was cancelled.")
    } catch {
      throw EngineError(.internalFailure, "The store failed: \(error).")
    }
  }

  private func read<Value: Sendable>(
    _ body: @escaping @Sendable (Database) throws -> Value
  ) async throws(EngineError) -> Value {
    do {
      return try await database.read(body)
    } catch let error as EngineError {
      throw error
    } catch is CancellationError {
      throw EngineError(.aborted, "The request was cancelled.")
    } catch {
      throw EngineError(.internalFailure, "The store failed: \(error).")
    }
  }

  // MARK: Responses

  public func save(_ response: StoredResponse, _ turn: ConversationTurn?) async throws(EngineError) {
    let limits = limits
    try await write { db in
      if let turn { _ = try appendTurn(turn, db, limits) }
      try db.execute(
        sql: """
          INSERT INTO response (id, created, isFinished, previousID, size, input, object) VALUES (?, ?, ?, ?, ?, ?, ?)
          ON CONFLICT (id) DO UPDATE SET
            isFinished = excluded.isFinished, size = excluded.size, input = excluded.input, object = excluded.object
          """,
        arguments: [
          response.id, response.created, response.isFinished, response.previousID,
          response.input.count + response.object.count, blob(response.input), blob(response.object),
        ])
      try db.execute(
        sql: "DELETE FROM responseItem WHERE response = (SELECT number FROM response WHERE id = ?)",
        arguments: [response.id])
      try db.execute(
        sql: """
          INSERT INTO responseItem (id, response)
          SELECT json_extract(value, '$.id'), (SELECT number FROM response WHERE id = ?1) FROM (
            SELECT value FROM json_each(iif(json_valid(CAST(?2 AS TEXT)), CAST(?2 AS TEXT), '[]'))
            UNION ALL
            SELECT value FROM json_each(iif(json_valid(CAST(?3 AS TEXT)), CAST(?3 AS TEXT), '{}'), '$.output'))
          WHERE json_extract(value, '$.id') IS NOT NULL
          """, arguments: [response.id, blob(response.input), blob(response.object)])
      while let total = try Row.fetchOne(db, sql: "SELECT responses, responseBytes FROM total"),
        total[0] as Int > limits.responses || total[1] as Int > limits.responseBytes
      {
        try db.execute(
          sql: "DELETE FROM response WHERE number = (SELECT min(number) FROM response) AND id <> ?",
          arguments: [response.id])
        if db.changesCount == 0 { return }
      }
    }
  }

  public func response(_ id: String) async throws(EngineError) -> StoredResponse? {
    try await read { db in
      try Row.fetchOne(db, sql: "SELECT * FROM response WHERE id = ?", arguments: [id]).map(StoredResponse.init(row:))
    }
  }

  public func conversation(
    endingAt id: String, limit: Int, byteLimit: Int
  ) async throws(EngineError) -> [StoredResponse] {
    try await read { db in
      try Row.fetchAll(
        db,
        sql: """
          WITH RECURSIVE link (number, previousID, depth, bytes) AS (
            SELECT number, previousID, 1, size FROM response WHERE id = ?1
            UNION
            SELECT response.number, response.previousID, depth + 1, bytes + response.size
            FROM response JOIN link ON response.id = link.previousID WHERE depth < ?2 AND bytes < ?3)
          SELECT response.* FROM link JOIN response USING (number) ORDER BY depth DESC
          """, arguments: [id, limit, byteLimit]
      ).map(StoredResponse.init(row:))
    }
  }

  public func deleteResponse(_ id: String) async throws(EngineError) -> Bool {
    try await write { db in
      try db.execute(sql: "DELETE FROM response WHERE id = ?", arguments: [id])
      return db.changesCount > 0
    }
  }

  public func unfinishedResponses() async throws(EngineError) -> [StoredResponse] {
    try await read { db in
      try Row.fetchAll(db, sql: "SELECT * FROM response WHERE isFinished = 0 ORDER BY number")
        .map(StoredResponse.init(row:))
    }
  }

  public func item(_ id: String) async throws(EngineError) -> [UInt8]? {
    try await read { db in
      if let row = try Row.fetchOne(
        db, sql: "SELECT object FROM conversationItem WHERE id = ? LIMIT 1", arguments: [id])
      {
        return bytes(row, 0)
      }
      guard
        let row = try Row.fetchOne(
          db,
          sql: """
            SELECT input, object FROM response
            WHERE number = (SELECT response FROM responseItem WHERE id = ? ORDER BY number DESC LIMIT 1)
            """, arguments: [id])
      else { return nil }
      let input = try JSONValue.parse(bytes(row, 0)).arrayValue ?? []
      let output = try JSONValue.parse(bytes(row, 1))["output"]?.arrayValue ?? []
      return (input + output).first { $0["id"] == .string(id) }.map { Array($0.compactText.utf8) }
    }
  }

  // MARK: Conversations

  public func insert(_ conversation: StoredConversation, _ items: [StoredItem]) async throws(EngineError) {
    let limits = limits
    try await write { db in
      let count = try Int.fetchOne(db, sql: "SELECT conversations FROM conversationTotal") ?? 0
      if count >= limits.conversations {
        throw EngineError(.outOfMemory, "The store holds \(count) conversations, which is its limit; delete some.")
      }
      try db.execute(
        sql: "INSERT INTO conversation (id, created, metadata) VALUES (?, ?, ?)",
        arguments: [conversation.id, conversation.created, blob(conversation.metadata)])
      _ = try appendTurn(ConversationTurn(conversation: conversation.id, items: items), db, limits)
    }
  }

  public func conversation(_ id: String) async throws(EngineError) -> StoredConversation? {
    try await read { db in
      try Row.fetchOne(db, sql: "SELECT id, created, metadata FROM conversation WHERE id = ?", arguments: [id]).map {
        StoredConversation(id: $0[0], created: $0[1], metadata: bytes($0, 2))
      }
    }
  }

  public func setMetadata(_ metadata: [UInt8], ofConversation id: String) async throws(EngineError) -> Bool {
    try await write { db in
      try db.execute(sql: "UPDATE conversation SET metadata = ? WHERE id = ?", arguments: [blob(metadata), id])
      return db.changesCount > 0
    }
  }

  public func deleteConversation(_ id: String) async throws(EngineError) -> Bool {
    try await write { db in
      try db.execute(sql: "DELETE FROM conversation WHERE id = ?", arguments: [id])
      return db.changesCount > 0
    }
  }

  public func add(_ turn: ConversationTurn) async throws(EngineError) {
    let limits = limits
    try await write { db in
      if try !appendTurn(turn, db, limits) {
        throw EngineError(
          .notFound, "There is no conversation \(turn.conversation.debugDescription).", parameter: "conversation_id")
      }
    }
  }

  public func items(
    ofConversation id: String, _ page: StorePage, byteLimit: Int
  ) async throws(EngineError) -> [StoredItem] {
    try await read { db in
      let after =
        page.after == nil
        ? "1"
        : "number \(page.isAscending ? ">" : "<") (SELECT number FROM conversationItem WHERE conversation = "
          + "(SELECT number FROM conversation WHERE id = ?1) AND id = ?2)"
      let rows = try Row.fetchCursor(
        db,
        sql: """
          SELECT id, object FROM conversationItem
          WHERE conversation = (SELECT number FROM conversation WHERE id = ?1) AND (?2 IS NULL OR \(after))
          ORDER BY number \(page.order) LIMIT ?3
          """, arguments: [id, page.after, page.limit])
      var items: [StoredItem] = []
      var size = 0
      while size < byteLimit, let row = try rows.next() {
        items.append(StoredItem(id: row[0], object: bytes(row, 1)))
        size += items[items.count - 1].object.count
      }
      return items
    }
  }

  public func item(_ id: String, ofConversation conversation: String) async throws(EngineError) -> StoredItem? {
    try await read { db in
      try Row.fetchOne(
        db,
        sql: """
          SELECT id, object FROM conversationItem
          WHERE conversation = (SELECT number FROM conversation WHERE id = ?) AND id = ?
          """, arguments: [conversation, id]
      ).map { StoredItem(id: $0[0], object: bytes($0, 1)) }
    }
  }

  public func deleteItem(_ id: String, ofConversation conversation: String) async throws(EngineError) -> Bool {
    try await write { db in
      try db.execute(
        sql: """
          DELETE FROM conversationItem WHERE conversation = (SELECT number FROM conversation WHERE id = ?) AND id = ?
          """, arguments: [conversation, id])
      return db.changesCount > 0
    }
  }

  // MARK: Files

  public func beginFile(_ id: String, created: Int) async throws(EngineError) {
    let limits = limits
    try await write { db in
      try db.execute(sql: "DELETE FROM file WHERE expires <= ?", arguments: [created])
      let count = try Int.fetchOne(db, sql: "SELECT count(*) FROM file") ?? 0
      if count >= limits.files {
        throw EngineError(.outOfMemory, "The store holds \(count) files, which is its limit; delete some.")
      }
      try db.execute(
        sql: "INSERT INTO file (id, created, isFinished, name, purpose, size) VALUES (?, ?, 0, '', '', 0)",
        arguments: [id, created])
    }
  }

  public func append(_ bytes: [UInt8], toFile id: String) async throws(EngineError) {
    let limits = limits
    try await write { db in
      guard let row = try Row.fetchOne(db, sql: "SELECT number, size FROM file WHERE id = ?", arguments: [id]) else {
        throw EngineError(.notFound, "There is no file \(id.debugDescription).")
      }
      let (number, size) = (row[0] as Int64, row[1] as Int)
      if size + bytes.count > limits.fileBytes {
        throw EngineError(
          .invalidRequest, "The file is larger than the \(limits.fileBytes) bytes that are allowed.", parameter: "file")
      }
      if try storedBytes(db) + bytes.count > limits.totalFileBytes {
        throw EngineError(
          .outOfMemory, "The store holds \(limits.totalFileBytes) bytes of files, which is its limit; delete some.")
      }
      try db.execute(
        sql: "INSERT INTO fileChunk (file, position, bytes) VALUES (?, ?, ?)", arguments: [number, size, blob(bytes)])
      try db.execute(
        sql: "UPDATE file SET size = size + ? WHERE number = ?", arguments: [bytes.count, number])
    }
  }

  public func finishFile(_ file: StoredFile) async throws(EngineError) -> StoredFile {
    try await write { db in
      try db.execute(
        sql: "UPDATE file SET isFinished = 1, created = ?, expires = ?, name = ?, purpose = ? WHERE id = ?",
        arguments: [file.created, file.expires, file.name, file.purpose, file.id])
      guard let row = try Row.fetchOne(db, sql: "SELECT * FROM file WHERE id = ?", arguments: [file.id]) else {
        throw EngineError(.notFound, "There is no file \(file.id.debugDescription).")
      }
      return StoredFile(row: row)
    }
  }

  public func file(_ id: String) async throws(EngineError) -> StoredFile? {
    try await read { db in
      try Row.fetchOne(
        db, sql: "SELECT * FROM file WHERE id = ? AND isFinished = 1 AND \(isNotExpired)", arguments: [id]
      ).map(StoredFile.init(row:))
    }
  }

  public func files(_ page: StorePage, purpose: String?) async throws(EngineError) -> [StoredFile] {
    try await read { db in
      try Row.fetchAll(
        db,
        sql: """
          SELECT * FROM file WHERE isFinished = 1 AND \(isNotExpired) AND (?1 IS NULL OR purpose = ?1)
          AND \(page.condition("file", "?2")) ORDER BY number \(page.order) LIMIT ?3
          """, arguments: [purpose, page.after, page.limit]
      ).map(StoredFile.init(row:))
    }
  }

  public func read(file id: String, from offset: Int) async throws(EngineError) -> [UInt8] {
    try await read { db in
      // From the chunk that holds the offset on. Chunks may be as small as a line, so several are given at once.
      let chunks = try Row.fetchCursor(
        db,
        sql: """
          SELECT position, bytes FROM fileChunk WHERE file = (SELECT number FROM file WHERE id = ?1) AND position >=
            (SELECT max(position) FROM fileChunk WHERE file = (SELECT number FROM file WHERE id = ?1) AND position <= ?2)
          ORDER BY position
          """, arguments: [id, offset])
      var found: [UInt8] = []
      while found.count < pieceSize, let row = try chunks.next() {
        let position: Int = row[0]
        try row.withUnsafeData(atIndex: 1) { found += $0?.dropFirst(max(0, offset - position)) ?? .init() }
      }
      return found
    }
  }

  public func deleteFile(_ id: String) async throws(EngineError) -> Bool {
    try await write { db in
      try db.execute(sql: "DELETE FROM file WHERE id = ?", arguments: [id])
      return db.changesCount > 0
    }
  }

  // MARK: Batches

  public func insert(_ batch: StoredBatch) async throws(EngineError) {
    let limits = limits
    try await write { db in
      let unfinished = try Int.fetchOne(db, sql: "SELECT count(*) FROM batch WHERE isFinished = 0") ?? 0
      if unfinished >= limits.unfinishedBatches {
        throw EngineError(.queueFull, "\(unfinished) batches are waiting or running, which is the limit.")
      }
      try db.execute(
        sql: """
          DELETE FROM batch WHERE isFinished = 1 AND number NOT IN
            (SELECT number FROM batch WHERE isFinished = 1 ORDER BY number DESC LIMIT ?)
          """, arguments: [limits.finishedBatches])
      try db.execute(
        sql: "INSERT INTO batch (id, created, isFinished, object) VALUES (?, ?, ?, ?)",
        arguments: [batch.id, batch.created, batch.isFinished, blob(batch.encoded)])
    }
  }

  public func batch(_ id: String) async throws(EngineError) -> StoredBatch? {
    try await read { db in try fetchBatch(db, id)?.batch }
  }

  public func batches(_ page: StorePage) async throws(EngineError) -> [StoredBatch] {
    try await read { db in
      try Row.fetchAll(
        db, sql: "SELECT * FROM batch WHERE \(page.condition("batch", "?1")) ORDER BY number \(page.order) LIMIT ?2",
        arguments: [page.after, page.limit]
      ).map(StoredBatch.init(row:))
    }
  }

  public func updateBatch(
    _ id: String, _ change: @escaping @Sendable (inout StoredBatch) -> Void
  ) async throws(EngineError) -> StoredBatch? {
    try await write { db in
      guard let (number, found) = try fetchBatch(db, id) else { return nil }
      var batch = found
      change(&batch)
      try update(db, number, batch)
      return batch
    }
  }

  public func oldestUnfinishedBatch() async throws(EngineError) -> StoredBatch? {
    try await read { db in
      try Row.fetchOne(db, sql: "SELECT * FROM batch WHERE isFinished = 0 ORDER BY number LIMIT 1")
        .map(StoredBatch.init(row:))
    }
  }

  public func record(_ result: BatchResult, inBatch id: String) async throws(EngineError) {
    let limits = limits
    try await write { db in
      if try storedBytes(db) + result.bytes.count > limits.totalFileBytes {
        throw EngineError(
          .outOfMemory, "The store holds \(limits.totalFileBytes) bytes of files, which is its limit; delete some.")
      }
      try db.execute(
        sql: """
          INSERT INTO batchResult (batch, line, isError, size, bytes)
          SELECT number, ?, ?, ?, ? FROM batch WHERE id = ? ON CONFLICT DO NOTHING
          """, arguments: [result.line, result.isError, result.bytes.count, blob(result.bytes), id])
    }
  }

  public func recordedLines(ofBatch id: String) async throws(EngineError) -> Set<Int> {
    try await read { db in
      try Set(
        Int.fetchAll(
          db, sql: "SELECT line FROM batchResult WHERE batch = (SELECT number FROM batch WHERE id = ?)",
          arguments: [id]))
    }
  }

  public func resultCounts(ofBatch id: String) async throws(EngineError) -> (completed: Int, failed: Int) {
    try await read { db in
      let row = try Row.fetchOne(
        db,
        sql: """
          SELECT count(*) FILTER (WHERE isError = 0), count(*) FILTER (WHERE isError = 1) FROM batchResult
          WHERE batch = (SELECT number FROM batch WHERE id = ?)
          """, arguments: [id])
      return (row?[0] ?? 0, row?[1] ?? 0)
    }
  }

  public func finishBatch(
    _ id: String, output: StoredFile, errors: StoredFile,
    _ change: @escaping @Sendable (_ batch: inout StoredBatch, _ hasOutput: Bool, _ hasErrors: Bool) -> Void
  ) async throws(EngineError) -> StoredBatch? {
    try await write { db in
      guard let (number, found) = try fetchBatch(db, id) else { return nil }
      var batch = found
      func makeFile(_ file: StoredFile, isError: Bool) throws -> Bool {
        let size = try Int.fetchOne(
          db, sql: "SELECT sum(size) FROM batchResult WHERE batch = ? AND isError = ?", arguments: [number, isError])
        guard let size else { return false }
        try db.execute(
          sql: """
            INSERT INTO file (id, created, expires, isFinished, name, purpose, size) VALUES (?, ?, ?, 1, ?, ?, ?)
            """, arguments: [file.id, file.created, file.expires, file.name, file.purpose, size])
        // A result becomes a chunk as it is.
        try db.execute(
          sql: """
            INSERT INTO fileChunk (file, position, bytes)
            SELECT ?, sum(size) OVER (ORDER BY line) - size, bytes FROM batchResult WHERE batch = ? AND isError = ?
            """, arguments: [db.lastInsertedRowID, number, isError])
        return true
      }
      let hasOutput = try makeFile(output, isError: false)
      let hasErrors = try makeFile(errors, isError: true)
      try db.execute(sql: "DELETE FROM batchResult WHERE batch = ?", arguments: [number])
      change(&batch, hasOutput, hasErrors)
      try update(db, number, batch)
      return batch
    }
  }
}

/// How many bytes of a file are given at once, but for the last chunk's.
private let pieceSize = 256 << 10

// MARK: Rows

private let isNotExpired = "(expires IS NULL OR expires > unixepoch())"

extension StorePage {
  fileprivate var order: String { isAscending ? "ASC" : "DESC" }

  /// The condition that a row comes after the one whose id is the argument, if that is not null.
  fileprivate func condition(_ table: String, _ argument: String) -> String {
    let comparison = isAscending ? ">" : "<"
    return "(\(argument) IS NULL OR number \(comparison) (SELECT number FROM \(table) WHERE id = \(argument)))"
  }
}

extension StoredResponse {
  fileprivate init(row: Row) {
    self.init(
      id: row["id"], created: row["created"], isFinished: row["isFinished"], previousID: row["previousID"],
      input: bytes(row, "input"), object: bytes(row, "object"))
  }
}

extension StoredFile {
  fileprivate init(row: Row) {
    self.init(
      id: row["id"], created: row["created"], expires: row["expires"], name: row["name"], purpose: row["purpose"],
      size: row["size"])
  }
}

extension StoredBatch {
  fileprivate init(row: Row) {
    let object = (try? JSONValue.parse(bytes(row, "object")))?.objectValue
    self.init(
      id: row["id"], created: row["created"], isFinished: row["isFinished"], object: object ?? JSONObject())
  }

  fileprivate var encoded: [UInt8] {
    var writer = JSONWriter()
    writer.value(.object(object))
    return writer.bytes
  }
}

private func fetchBatch(_ db: Database, _ id: String) throws -> (number: Int64, batch: StoredBatch)? {
  try Row.fetchOne(db, sql: "SELECT * FROM batch WHERE id = ?", arguments: [id]).map {
    ($0["number"], StoredBatch(row: $0))
  }
}

private func update(_ db: Database, _ number: Int64, _ batch: StoredBatch) throws {
  try db.execute(
    sql: "UPDATE batch SET isFinished = ?, object = ? WHERE number = ?",
    arguments: [batch.isFinished, blob(batch.encoded), number])
}

/// Bytes of all files and results.
private func storedBytes(_ db: Database) throws -> Int {
  try Int.fetchOne(db, sql: "SELECT fileBytes FROM total") ?? 0
}

/// Puts items at the end of a conversation. Returns whether there is such a conversation.
private func appendTurn(_ turn: ConversationTurn, _ db: Database, _ limits: StoreLimits) throws -> Bool {
  guard
    let number = try Int64.fetchOne(
      db, sql: "SELECT number FROM conversation WHERE id = ?", arguments: [turn.conversation])
  else { return false }
  let held = try Int.fetchOne(db, sql: "SELECT bytes FROM conversationTotal") ?? 0
  if held + turn.items.reduce(0, { $0 + $1.object.count }) > limits.conversationBytes {
    throw EngineError(
      .outOfMemory,
      "The store holds \(limits.conversationBytes) bytes of conversations, which is its limit; delete some.")
  }
  for item in turn.items {
    try db.execute(
      sql: "INSERT OR IGNORE INTO conversationItem (conversation, id, size, object) VALUES (?, ?, ?, ?)",
      arguments: [number, item.id, item.object.count, blob(item.object)])
  }
  return true
}

/// Bytes as SQLite takes them.
private func blob(_ bytes: [UInt8]) -> Data { Data(bytes) }

private func bytes(_ row: Row, _ column: String) -> [UInt8] { Array(row[column] as Data) }
private func bytes(_ row: Row, _ column: Int) -> [UInt8] { Array(row[column] as Data) }

/// Holds a file's lock, so that two processes do not run the same batches.
private final class FileLock: Sendable {
  private let descriptor: Mutex<Int32?>

  init(_ path: String) throws(EngineError) {
    let opened = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
    if opened < 0 {
      throw EngineError(.invalidRequest, "\(path) cannot be opened: \(String(cString: strerror(errno))).")
    }
    if flock(opened, LOCK_EX | LOCK_NB) != 0 {
      Glibc.close(opened)
      throw EngineError(.invalidRequest, "another process uses it.")
    }
    descriptor = Mutex(opened)
  }

  func release() {
    descriptor.withLock { descriptor in
      if let open = descriptor { Glibc.close(open) }
      descriptor = nil
    }
  }

  deinit { release() }
}
