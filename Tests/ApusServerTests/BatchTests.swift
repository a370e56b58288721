import ApusCore
import ApusServer
import ApusStore
import Foundation
import HTTPTypes
import Testing

/// A form with a purpose and a file, in that order.
private func form(
  _ content: String, purpose: String? = "batch", name: String = "in.jsonl", more: [(String, String)] = []
) -> String {
  var text = ""
  for (key, value) in (purpose.map { [("purpose", $0)] } ?? []) + more {
    text += "--B\r\nContent-Disposition: form-data; name=\"\(key)\"\r\n\r\n\(value)\r\n"
  }
  return text + "--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"\(name)\"\r\n"
    + "Content-Type: application/octet-stream\r\n\r\n\(content)\r\n--B--\r\n"
}

extension RouteClient {
  fileprivate func upload(_ body: String, type: String = "multipart/form-data; boundary=B") async throws -> Answer {
    try await send(.post, "/v1/files", body, headers: [.contentType: type])
  }

  /// Uploads lines and makes a batch of them. Returns its id.
  func batch(_ lines: [String], endpoint: String = "/v1/completions") async throws -> String {
    let file = try await upload(form(lines.joined(separator: "\n"))).json["id"]!
    let answer = try await post(
      "/v1/batches", ["input_file_id": file, "endpoint": .string(endpoint), "completion_window": "24h"])
    #expect(answer.status == 200, "\(answer.text)")
    return answer.json["id"]!.stringValue!
  }

  /// Waits for the end of a batch.
  func end(of batch: String) async throws -> JSONValue {
    try await until({ try await get("/v1/batches/\(batch)").json }) {
      ["completed", "failed", "expired", "cancelled"].contains($0["status"]?.stringValue)
    }
  }

  /// The lines of a file.
  func lines(of file: JSONValue?) async throws -> [JSONValue] {
    guard let id = file?.stringValue else { return [] }
    let text = try await get("/v1/files/\(id)/content").text
    #expect(text.hasSuffix("\n"))
    return try text.split(separator: "\n").map { try JSONValue.parse(String($0)) }
  }
}

/// A line that asks for a completion.
private func line(_ name: String, _ body: JSONValue = ["prompt": "a", "max_tokens": 1]) -> String {
  (["custom_id": .string(name), "method": "POST", "url": "/v1/completions", "body": body] as JSONValue).compactText
}

@Suite struct FileTests {
  @Test func aFileGoesInAndOut() async throws {
    try await withStore { client, _ in
      let content = "a\r\n--bee\r\nb\0ü\r\n"
      let made = try await client.upload(form(content, name: "dir/my \\\"file\\\".txt"))
      #expect(made.status == 200, "\(made.text)")
      let id = try #require(made.json["id"]?.stringValue)
      #expect(
        made.json.objectValue?.keys == [
          "id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "status_details",
        ])
      #expect(made.json["bytes"] == .int(Int64(content.utf8.count)))
      #expect(made.json["filename"] == "my \"file\".txt")
      #expect(made.json["status"] == "processed")
      #expect(try await client.get("/v1/files/\(id)").text == made.text)
      let got = try await client.get("/v1/files/\(id)/content")
      #expect(got.text == content)
      #expect(got.headers[.contentLength] == "\(content.utf8.count)")
      let second = try await client.upload(
        form(
          "", purpose: "vision", more: [("expires_after[anchor]", "created_at"), ("expires_after[seconds]", "3600")]))
      #expect(second.json["bytes"] == 0)
      #expect(
        second.json["expires_at"]?.intValue == (second.json["created_at"]?.intValue ?? 0) + 3600, "\(second.text)")
      let all = try await client.get("/v1/files")
      #expect(all.json["data"]?.arrayValue?.map { $0["id"] } == [second.json["id"], made.json["id"]])
      let page = try await client.get("/v1/files?limit=1")
      #expect(page.json["has_more"] == true)
      #expect(page.json["last_id"] == second.json["id"])
      let next = try await client.get("/v1/files?limit=1&after=\(page.json["last_id"]!.stringValue!)")
      #expect(next.json["data"]?[0] == made.json)
      #expect(next.json["has_more"] == false)
      let batch = try await client.get("/v1/files?purpose=batch")
      #expect(batch.json["data"] == [made.json])
      let deleted = try await client.send(.delete, "/v1/files/\(id)")
      #expect(deleted.json == ["id": .string(id), "object": "file", "deleted": true])
      #expect(try await client.get("/v1/files/\(id)").status == 404)
      #expect(try await client.get("/v1/files/\(id)/content").status == 404)
    }
  }

  @Test func badUploads() async throws {
    let limits: StoreLimits = {
      var limits = StoreLimits.inMemory
      limits.fileBytes = 100
      return limits
    }()
    try await withStore(FakeService(), try Store(limits: limits)) { client, _ in
      let cases: [(Answer, Int, String?)] = [
        (try await client.upload("{}", type: "application/json"), 400, nil),
        (try await client.upload("", type: "multipart/form-data"), 400, nil),
        (try await client.upload(""), 400, nil),
        (try await client.upload("no boundary at all"), 400, nil),
        (try await client.upload(String(form("x").dropLast(8))), 400, nil),
        (try await client.upload("--B\r\nX: y\r\n\r\nz\r\n--B--\r\n"), 400, nil),
        (try await client.upload("--B\r\n" + String(repeating: "h", count: 10_000)), 400, nil),
        (try await client.upload(form("x", purpose: nil)), 400, "purpose"),
        (try await client.upload(form("x", purpose: "fun")), 400, "purpose"),
        (try await client.upload(form("x", purpose: String(repeating: "p", count: 5000))), 400, "purpose"),
        (try await client.upload(form("x", more: [("expires_after[seconds]", "1")])), 400, "expires_after.seconds"),
        (
          try await client.upload("--B\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--B--"), 400,
          "file"
        ),
        (try await client.upload(form(String(repeating: "x", count: 101))), 413, nil),
        (try await client.get("/v1/files/none"), 404, "file_id"),
        (try await client.get("/v1/files?limit=0"), 400, "limit"),
        (try await client.get("/v1/files?order=up"), 400, "order"),
      ]
      for (index, (answer, status, parameter)) in cases.enumerated() {
        #expect(answer.status == status, "case \(index): \(answer.text)")
        #expect(answer.parameter == parameter, "case \(index): \(answer.text)")
      }
      #expect(try await client.get("/v1/files").json["data"] == [])
    }
  }

  /// However a body is cut, the same parts come out.
  @Test func multipartInPieces() throws {
    let content = "x\r\n--b\r\r\n--\r\n\r\n--C"
    let body = Array(
      ("preamble\r\n" + form(content, more: [("empty", "")]) + "epilogue").replacing("--B", with: "--Bo-undary").utf8)
    func parse(_ pieces: [ArraySlice<UInt8>]) throws -> [MultipartParser.Event] {
      var parser = try #require(MultipartParser(contentType: "multipart/form-data; boundary=\"Bo-undary\""))
      var events: [MultipartParser.Event] = []
      for piece in pieces {
        for event in try parser.feed(piece) {
          if case .data(let more) = event, case .data(let bytes)? = events.last {
            events[events.count - 1] = .data(bytes + more)
          } else {
            events.append(event)
          }
        }
      }
      #expect(parser.isComplete)
      return events
    }
    let whole = try parse([body[...]])
    #expect(
      whole == [
        .begin(name: "purpose", fileName: nil), .data(Array("batch".utf8)), .end,
        .begin(name: "empty", fileName: nil), .end,
        .begin(name: "file", fileName: "in.jsonl"), .data(Array(content.utf8)), .end,
      ])
    #expect(try parse(body.indices.map { body[$0...$0] }) == whole)
    let seed = UInt64.random(in: 0 ... .max)
    var generator = SeededGenerator(seed: seed)
    for _ in 0..<50 {
      let cuts = [0] + (0..<5).map { _ in Int.random(in: 0...body.count, using: &generator) }.sorted() + [body.count]
      #expect(try parse(zip(cuts, cuts.dropFirst()).map { body[$0..<$1] }) == whole, "seed \(seed)")
    }
  }
}

@Suite struct BatchTests {
  @Test func linesBecomeAnswersAndErrors() async throws {
    let service = FakeService()
    try await withStore(service) { client, _ in
      let lines = [
        line("a"), "", "{\"custom_id\": ", line("b", ["prompt": "b", "model": "other"]), "[1]",
        line("a"), line("c").replacing("POST", with: "GET"), line("d").replacing("/v1/c", with: "/v2/c"),
        line("e", ["prompt": "x", "stream": true]), "{\"method\":\"POST\"}",
        line("f", ["prompt": "f", "max_tokens": 2]),
        "  \r", line("g", "body"),
      ]
      let id = try await client.batch(lines)
      let batch = try await client.end(of: id)
      #expect(batch["status"] == "completed")
      #expect(batch["request_counts"] == ["total": 11, "completed": 2, "failed": 9])
      for name in ["created_at", "in_progress_at", "finalizing_at", "completed_at", "expires_at"] {
        #expect((batch[name]?.intValue ?? 0) > 0, "\(name)")
      }
      let output = try await client.lines(of: batch["output_file_id"])
      #expect(output.map { $0["custom_id"] } == ["a", "f"])
      #expect(output[0].objectValue?.keys == ["id", "custom_id", "response", "error"])
      #expect(output[1]["response"]?["status_code"] == 200)
      #expect(output[1]["response"]?["body"]?["choices"]?[0]?["text"] == "Hello,")
      #expect(output[1]["error"] == .null)
      let errors = try await client.lines(of: batch["error_file_id"])
      #expect(
        errors.map { $0["error"]?["code"]?.stringValue ?? "\($0["response"]?["status_code"]?.intValue ?? 0)" } == [
          "invalid_json_line", "404", "invalid_json_line", "duplicate_custom_id", "invalid_method", "invalid_url",
          "invalid_request", "missing_required_parameter", "missing_required_parameter",
        ])
      #expect(errors[1]["response"]?["body"]?["error"]?["code"] == "model_not_found")
      #expect(errors[1]["custom_id"] == "b")
      let file = try await client.get("/v1/files/\(batch["output_file_id"]!.stringValue!)")
      #expect(file.json["purpose"] == "batch_output")
      let list = try await client.get("/v1/batches?limit=1")
      #expect(list.json["data"] == [batch])
      #expect(list.json["has_more"] == false)
    }
  }

  @Test func everyEndpointThereIs() async throws {
    try await withStore { client, _ in
      for (endpoint, body) in [
        ("/v1/chat/completions", ["messages": [["role": "user", "content": "Hi"]]]), ("/v1/responses", ["input": "Hi"]),
      ] as [(String, JSONValue)] {
        let line: JSONValue = ["custom_id": "x", "method": "POST", "url": .string(endpoint), "body": body]
        let batch = try await client.end(of: try await client.batch([line.compactText], endpoint: endpoint))
        #expect(batch["request_counts"] == ["total": 1, "completed": 1, "failed": 0])
        #expect(batch["error_file_id"] == .null)
      }
    }
  }

  @Test func aBatchGoesOnAfterACrash() async throws {
    try await withStorePath { path in
      // Lines that ask for one token end; the others hold after their second.
      let lines = (0..<8).map { line("\($0)", ["prompt": "p", "max_tokens": $0 % 4 == 3 ? 5 : 1]) }
      let configuration = testConfiguration { $0.batchConcurrency = 2 }
      let first = FakeService(.init(holdAfter: 2))
      let store = try Store(path: path)
      let id = try await withStore(first, store, configuration) { client, _ in
        let id = try await client.batch(lines)
        _ = try await until({ try await client.get("/v1/batches/\(id)").json }) {
          $0["request_counts"]?["completed"] == 6 && first.inFlight == 2
        }
        #expect(try await client.get("/v1/batches/\(id)").json["status"] == "in_progress")
        store.close()
        return id
      }
      #expect(first.requests.count == 8)
      first.abortAll()
      let second = FakeService()
      let reopened = try Store(path: path)
      try await withStore(second, reopened, configuration) { client, server in
        try await server.resume()
        let batch = try await client.end(of: id)
        #expect(batch["status"] == "completed")
        #expect(batch["request_counts"] == ["total": 8, "completed": 8, "failed": 0])
        #expect(
          try await client.lines(of: batch["output_file_id"]).map { $0["custom_id"]?.stringValue }
            == (0..<8).map { "\($0)" })
      }
      // Only what had no result was run again.
      #expect(second.requests.map(\.sampling.maxNewTokens) == [5, 5])
      reopened.close()
    }
  }

  @Test func aStoppingServerFinishesItsLinesAndLeavesTheRest() async throws {
    let store = try Store()
    let service = FakeService(.init(holdAfter: 1))
    let lines = (0..<5).map { line("\($0)", ["prompt": "p", "max_tokens": 2]) }
    let configuration = testConfiguration { $0.batchConcurrency = 2 }
    let id = try await withStore(service, store, configuration) { client, server in
      let id = try await client.batch(lines)
      _ = try await until({ service.inFlight }) { $0 == 2 }
      async let shutdown: Void = server.shutdown()
      // Once the server refuses work it begins no more lines either.
      _ = try await until({ try await client.post("/v1/batches", [:]).status }) { $0 == 503 }
      service.release()
      await shutdown
      #expect(try await client.get("/v1/batches/\(id)").json["request_counts"]?["completed"] == 2)
      #expect(try await client.get("/v1/batches/\(id)").json["status"] == "in_progress")
      return id
    }
    #expect(service.requests.count == 2)
    let next = FakeService()
    try await withStore(next, store, configuration) { client, server in
      try await server.resume()
      #expect(try await client.end(of: id)["request_counts"]?["completed"] == 5)
    }
    #expect(next.requests.count == 3)
  }

  @Test func concurrencyIsBoundedAndAFullQueueIsWaitedFor() async throws {
    let service = FakeService(.init(holdAfter: 0, capacity: 2))
    try await withStore(service, nil, testConfiguration { $0.batchConcurrency = 3 }) { client, _ in
      let id = try await client.batch((0..<6).map { line("\($0)") })
      _ = try await until({ service.statistics().rejectedRequests }) { $0 > 0 }
      #expect(service.inFlight == 2)
      service.release()
      let batch = try await client.end(of: id)
      #expect(batch["request_counts"] == ["total": 6, "completed": 6, "failed": 0])
    }
    let wide = FakeService(.init(holdAfter: 0))
    try await withStore(wide, nil, testConfiguration { $0.batchConcurrency = 3 }) { client, _ in
      let id = try await client.batch((0..<6).map { line("\($0)") })
      _ = try await until({ wide.inFlight }) { $0 == 3 }
      try await Task.sleep(for: .milliseconds(20))
      #expect(wide.inFlight == 3)
      wide.release()
      _ = try await client.end(of: id)
    }
  }

  @Test func cancelling() async throws {
    let service = FakeService(.init(holdAfter: 2))
    try await withStore(service, nil, testConfiguration { $0.batchConcurrency = 2 }) { client, _ in
      let lines = (0..<6).map { line("\($0)", ["prompt": "p", "max_tokens": $0 == 0 ? 1 : 3]) }
      let id = try await client.batch(lines)
      let waiting = try await client.batch([line("x")])
      _ = try await until({ try await client.get("/v1/batches/\(id)").json }) {
        $0["request_counts"]?["completed"] == 1 && service.inFlight == 2
      }
      let cancelling = try await client.post("/v1/batches/\(id)/cancel", [:])
      #expect(cancelling.json["status"] == "cancelling")
      // This service does not notice that its reader is cancelled, so the lines in work come to their ends.
      service.release()
      let batch = try await client.end(of: id)
      #expect(batch["status"] == "cancelled")
      #expect((batch["cancelled_at"]?.intValue ?? 0) > 0)
      #expect(batch["request_counts"]?["failed"] == 0)
      let output = try await client.lines(of: batch["output_file_id"])
      #expect(output.first?["custom_id"] == "0" && output.count < 6)
      // The next one has its turn, and cancelling what has ended changes nothing.
      let done = try await client.end(of: waiting)
      #expect(done["status"] == "completed")
      #expect(try await client.post("/v1/batches/\(waiting)/cancel", [:]).json == done)
    }
  }

  @Test func whatIsLeftAfterTheWindowExpires() async throws {
    let store = try Store()
    try await store.beginFile("f", created: 1)
    try await store.append(Array((line("a") + "\n" + line("b")).utf8), toFile: "f")
    _ = try await store.finishFile(StoredFile(id: "f", created: 1, name: "f", purpose: "batch"))
    try await store.insert(
      StoredBatch(
        id: "batch_1", created: 1, isFinished: false,
        object: JSONObject([
          ("status", "in_progress"), ("endpoint", "/v1/completions"), ("input_file_id", "f"), ("expires_at", 2),
          ("request_counts", ["total": 2, "completed": 0, "failed": 0]),
        ])))
    try await store.record(BatchResult(line: 0, isError: false, bytes: Array("{}\n".utf8)), inBatch: "batch_1")
    let service = FakeService()
    try await withStore(service, store) { client, server in
      try await server.resume()
      let ended = try await client.end(of: "batch_1")
      #expect(ended["status"] == "expired")
      #expect(ended["request_counts"] == ["total": 2, "completed": 1, "failed": 1])
      #expect(try await client.lines(of: ended["output_file_id"]) == [[:]])
      let error = try await client.lines(of: ended["error_file_id"])[0]
      #expect(error["custom_id"] == "b")
      #expect(error["error"]?["code"] == "batch_expired")
    }
    #expect(service.requests.isEmpty)
  }

  @Test func badBatches() async throws {
    try await withStore { client, _ in
      let good = try await client.upload(form(line("a"))).json["id"]!
      let other = try await client.upload(form(line("a"), purpose: "user_data")).json["id"]!
      let body: JSONValue = ["input_file_id": good, "endpoint": "/v1/completions", "completion_window": "24h"]
      func with(_ name: String, _ value: JSONValue?) -> JSONValue {
        var object = body.objectValue!
        object[name] = value
        return .object(object)
      }
      let cases: [(JSONValue, Int, String)] = [
        (with("input_file_id", JSONValue?.none), 400, "input_file_id"),
        (with("input_file_id", "file-none"), 404, "input_file_id"),
        (with("input_file_id", other), 400, "input_file_id"),
        (with("endpoint", JSONValue?.none), 400, "endpoint"),
        (with("endpoint", "/generate"), 400, "endpoint"),
        (with("completion_window", "1h"), 400, "completion_window"),
        (with("metadata", ["a": 1]), 400, "metadata.a"),
        (with("output_expires_after", ["seconds": 5]), 400, "output_expires_after"),
      ]
      for (body, status, parameter) in cases {
        let got = try await client.post("/v1/batches", body)
        #expect(got.status == status && got.parameter == parameter, "\(body.compactText): \(got.text)")
      }
      #expect(try await client.get("/v1/batches/batch_none").status == 404)
      #expect(try await client.post("/v1/batches/batch_none/cancel", [:]).status == 404)
      // A file without lines fails as a whole.
      let failed = try await client.end(of: try await client.batch(["", " "]))
      #expect(failed["status"] == "failed")
      #expect(failed["errors"]?["data"]?[0]?["code"] == "empty_file")
    }
    // A line that is larger than a body may be is an error of its own.
    try await withStore(FakeService(), nil, testConfiguration { $0.maxBodyBytes = 2000 }) { client, _ in
      let long = line("a", ["prompt": .string(String(repeating: "x", count: 3000))])
      let batch = try await client.end(of: try await client.batch([long, line("b")]))
      #expect(try await client.lines(of: batch["error_file_id"]).map { $0["error"]?["code"] } == ["line_too_large"])
      #expect(try await client.lines(of: batch["output_file_id"]).map { $0["custom_id"] } == ["b"])
    }
  }
}
