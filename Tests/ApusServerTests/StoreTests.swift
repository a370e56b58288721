import ApusCore
import ApusServer
import ApusStore
import Foundation
import Testing

/// Gives the path of a database in a folder of its own, which is removed afterwards.
func withStorePath<Value>(_ body: (String) async throws -> Value) async throws -> Value {
  let folder = FileManager.default.temporaryDirectory.appendingPathComponent("apus-store-\(UUID().uuidString)")
  try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
  defer { try? FileManager.default.removeItem(at: folder) }
  return try await body(folder.appendingPathComponent("store.sqlite").path)
}

private func response(_ id: String, after previous: String? = nil, size: Int = 10) -> StoredResponse {
  StoredResponse(
    id: id, created: 5, isFinished: true, previousID: previous, input: Array("[]".utf8),
    object: Array(repeating: UInt8(ascii: " "), count: size))
}

@Suite struct StoreTests {
  @Test func whatWasWrittenIsThereAfterReopening() async throws {
    try await withStorePath { path in
      let batch = StoredBatch(
        id: "batch_1", created: 3, isFinished: false, object: JSONObject([("z", 1), ("a", [nil, "é"])]))
      let first = try Store(path: path)
      try await first.save(response("r1"), nil)
      try await first.save(response("r2", after: "r1"), nil)
      try await first.beginFile("f1", created: 1)
      try await first.append(Array("hello ".utf8), toFile: "f1")
      try await first.append(Array("world".utf8), toFile: "f1")
      #expect(try await first.file("f1") == nil)
      let file = try await first.finishFile(StoredFile(id: "f1", created: 1, name: "a.txt", purpose: "batch"))
      #expect(file.size == 11)
      try await first.beginFile("f2", created: 1)
      try await first.append([1, 2, 3], toFile: "f2")
      try await first.insert(batch)
      try await first.record(BatchResult(line: 4, isError: false, bytes: [65]), inBatch: "batch_1")
      // The same path is in use, so nobody else may run its batches.
      #expect(throws: EngineError.self) { try Store(path: path) }
      first.close()
      let second = try Store(path: path)
      #expect(try await second.response("r2") == response("r2", after: "r1"))
      #expect(try await second.conversation(endingAt: "r2", limit: 9, byteLimit: 99).map(\.id) == ["r1", "r2"])
      #expect(try await second.conversation(endingAt: "r2", limit: 1, byteLimit: 99).map(\.id) == ["r2"])
      #expect(try await second.conversation(endingAt: "r2", limit: 9, byteLimit: 12).map(\.id) == ["r2"])
      #expect(try await second.file("f1") == file)
      #expect(try await second.read(file: "f1", from: 0) == Array("hello world".utf8))
      #expect(try await second.read(file: "f1", from: 2) == Array("llo world".utf8))
      #expect(try await second.read(file: "f1", from: 8) == Array("rld".utf8))
      #expect(try await second.read(file: "f1", from: 11) == [])
      // An upload that was broken off is gone.
      await #expect(throws: EngineError.self) { try await second.append([4], toFile: "f2") }
      #expect(try await second.oldestUnfinishedBatch() == batch)
      #expect(try await second.oldestUnfinishedBatch()?.object.keys == ["z", "a"])
      #expect(try await second.recordedLines(ofBatch: "batch_1") == [4])
      second.close()
    }
  }

  @Test func limits() async throws {
    var limits = StoreLimits.inMemory
    limits.responses = 3
    limits.responseBytes = 1000
    limits.fileBytes = 10
    limits.files = 2
    limits.totalFileBytes = 15
    limits.unfinishedBatches = 1
    let store = try Store(limits: limits)
    for index in 0..<5 { try await store.save(response("r\(index)"), nil) }
    var kept: [String] = []
    for index in 0..<5 where try await store.response("r\(index)") != nil { kept.append("r\(index)") }
    #expect(kept == ["r2", "r3", "r4"])
    // A large one makes the others go, itself never.
    try await store.save(response("large", size: 2000), nil)
    #expect(try await store.response("r4") == nil)
    #expect(try await store.response("large") != nil)
    try await store.save(response("r5"), nil)
    #expect(try await store.response("large") == nil)
    func code(_ body: () async throws -> Void) async -> EngineError.Code? {
      do {
        try await body()
        return nil
      } catch {
        return (error as? EngineError)?.code
      }
    }
    try await store.beginFile("a", created: 1)
    #expect(await code { try await store.append([UInt8](repeating: 0, count: 11), toFile: "a") } == .invalidRequest)
    try await store.append([UInt8](repeating: 0, count: 10), toFile: "a")
    try await store.beginFile("b", created: 1)
    #expect(await code { try await store.append([UInt8](repeating: 0, count: 6), toFile: "b") } == .outOfMemory)
    #expect(await code { try await store.beginFile("c", created: 1) } == .outOfMemory)
    // What is deleted makes room.
    #expect(try await store.deleteFile("a"))
    #expect(try await !store.deleteFile("a"))
    try await store.append([UInt8](repeating: 0, count: 6), toFile: "b")
    let batch = StoredBatch(id: "b1", created: 1, isFinished: false, object: JSONObject())
    try await store.insert(batch)
    #expect(
      await code { try await store.insert(StoredBatch(id: "b2", created: 1, isFinished: false, object: JSONObject())) }
        == .queueFull)
    #expect(
      await code {
        try await store.record(
          BatchResult(line: 0, isError: true, bytes: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), inBatch: "b1")
      } == .outOfMemory)
  }

  @Test func resultsBecomeFilesInTheOrderOfLines() async throws {
    let store = try Store()
    try await store.insert(StoredBatch(id: "b", created: 1, isFinished: false, object: JSONObject()))
    for line in [3, 0, 2, 1] {
      try await store.record(
        BatchResult(line: line, isError: line == 2, bytes: Array("line \(line)\n".utf8)), inBatch: "b")
    }
    // The first result of a line stays.
    try await store.record(BatchResult(line: 0, isError: true, bytes: [0]), inBatch: "b")
    let counts = try await store.resultCounts(ofBatch: "b")
    #expect(counts == (3, 1))
    let batch = try await store.finishBatch(
      "b", output: StoredFile(id: "out", created: 2, name: "o", purpose: "batch_output"),
      errors: StoredFile(id: "err", created: 2, name: "e", purpose: "batch_output")
    ) { batch, hasOutput, hasErrors in
      batch.isFinished = true
      batch.object["files"] = [.bool(hasOutput), .bool(hasErrors)]
    }
    #expect(batch?.object["files"] == [true, true])
    func text(_ id: String) async throws -> String {
      var bytes: [UInt8] = []
      while true {
        let more = try await store.read(file: id, from: bytes.count)
        if more.isEmpty { return String(decoding: bytes, as: UTF8.self) }
        bytes += more
      }
    }
    #expect(try await text("out") == "line 0\nline 1\nline 3\n")
    #expect(try await text("err") == "line 2\n")
    #expect(try await store.file("out")?.size == 21)
    #expect(try await store.recordedLines(ofBatch: "b").isEmpty)
    #expect(try await store.oldestUnfinishedBatch() == nil)
  }

  @Test func pages() async throws {
    let store = try Store()
    for index in 0..<5 {
      try await store.beginFile("f\(index)", created: 7)
      _ = try await store.finishFile(
        StoredFile(
          id: "f\(index)", created: 7, expires: index == 1 ? 8 : nil, name: "n",
          purpose: index == 2 ? "vision" : "batch"))
    }
    func ids(_ page: StorePage, _ purpose: String? = nil) async throws -> [String] {
      try await store.files(page, purpose: purpose).map(\.id)
    }
    // f1 has expired.
    #expect(try await ids(StorePage()) == ["f4", "f3", "f2", "f0"])
    #expect(try await ids(StorePage(isAscending: true)) == ["f0", "f2", "f3", "f4"])
    #expect(try await ids(StorePage(), "batch") == ["f4", "f3", "f0"])
    #expect(try await ids(StorePage(limit: 2, after: "f4")) == ["f3", "f2"])
    #expect(try await ids(StorePage(limit: 2, after: "f2", isAscending: true)) == ["f3", "f4"])
    #expect(try await ids(StorePage(after: "none")) == [])
  }
}
