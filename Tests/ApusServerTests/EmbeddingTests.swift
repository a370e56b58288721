import ApusCore
import ApusServer
import ApusTesting
import Foundation
import HTTPTypes
import Synchronization
import Testing

private func fake(_ change: (inout FakeEmbeddingService.Configuration) -> Void = { _ in }) -> FakeEmbeddingService {
  var configuration = FakeEmbeddingService.Configuration()
  change(&configuration)
  return FakeEmbeddingService(configuration)
}

@Suite struct EmbeddingTests {
  @Test func answersWithOpenAIsShape() async throws {
    let service = fake { $0.dimensions = 4 }
    let answer = try await withRoutes(service) { client in
      try await client.post("/v1/embeddings", ["input": "ab", "model": "fake-embedding", "user": "u"])
    }
    #expect(answer.status == 200)
    // 256, 97, 98, 257: remainders 0, 1, 2, 1 of 4.
    #expect(
      answer.text == #"{"object":"list","data":[{"object":"embedding","index":0,"embedding":"#
        + #"[0.4082483,0.8164966,0.4082483,0.0]}],"model":"fake-embedding","#
        + #""usage":{"prompt_tokens":4,"total_tokens":4}}"#)
    #expect(service.calls == [[EmbeddingInput(tokens: [256, 97, 98, 257])]])
  }

  @Test func takesTextsAndTokensInAllForms() async throws {
    let service = fake()
    try await withRoutes(service) { client in
      for (input, count) in [
        ("a", 1), (["a", "b"], 2), ([97, 98], 1), ([[97], [98, 99]], 2), (["a", [98]], 2),
      ] as [(JSONValue, Int)] {
        let answer = try await client.post("/v1/embeddings", ["input": input])
        #expect(answer.json["data"]?.arrayValue?.compactMap { $0["index"]?.intValue } == Array(0..<count), "\(input)")
      }
    }
    // Token ids are taken as they are.
    #expect(service.calls[3] == [EmbeddingInput(tokens: [97]), EmbeddingInput(tokens: [98, 99])])
  }

  @Test func base64HoldsTheSameNumbers() async throws {
    try await withRoutes(fake { $0.dimensions = 7 }) { client in
      let plain = try await client.post("/v1/embeddings", ["input": "hello", "encoding_format": "float"])
      let coded = try await client.post("/v1/embeddings", ["input": "hello", "encoding_format": "base64"])
      let numbers = try #require(plain.json["data"]?[0]?["embedding"]?.arrayValue).map { Float($0.doubleValue!) }
      let text = try #require(coded.json["data"]?[0]?["embedding"]?.stringValue)
      let bytes = [UInt8](try #require(Data(base64Encoded: text)))
      let wanted = numbers.flatMap { number in (0..<4).map { UInt8(number.bitPattern >> (UInt32($0) * 8) & 255) } }
      #expect(bytes == wanted)
    }
  }

  @Test func dimensionsCutAndNormalise() async throws {
    try await withRoutes(fake { $0.dimensions = 4 }) { client in
      let answer = try await client.post("/v1/embeddings", ["input": "ab", "dimensions": 2])
      let numbers = try #require(answer.json["data"]?[0]?["embedding"]?.arrayValue).map { $0.doubleValue! }
      #expect(numbers.count == 2)
      #expect(abs(numbers[0] - 1 / 5.0.squareRoot()) < 1e-6 && abs(numbers[1] - 2 / 5.0.squareRoot()) < 1e-6)
    }
  }

  @Test func longTextsAreRefusedOrCut() async throws {
    let service = fake { $0.contextLength = 6 }
    try await withRoutes(service) { client in
      let refused = try await client.post("/v1/embeddings", ["input": "abcdefgh"])
      #expect(refused.status == 400 && refused.code == "context_length_exceeded")
      let cut = try await client.post("/v1/embeddings", ["input": "abcdefgh", "truncate_prompt_tokens": -1])
      #expect(cut.status == 200)
      let shorter = try await client.post("/v1/embeddings", ["input": ["abc", "a"], "truncate_prompt_tokens": 4])
      #expect(shorter.json["usage"]?["total_tokens"] == 7)
      let wrong = try await client.post("/v1/embeddings", ["input": "a", "truncate_prompt_tokens": 7])
      #expect(wrong.status == 400 && wrong.parameter == "truncate_prompt_tokens")
    }
    // The tokens at the ends stay.
    #expect(service.calls[1] == [EmbeddingInput(tokens: [256, 97, 98, 99, 100, 257])])
    #expect(service.calls[2].map(\.tokens) == [[256, 97, 98, 257], [256, 97, 257]])
  }

  @Test(
    arguments: [
      ([:], "input"), (["input": ""], "input"), (["input": []], "input"), (["input": ["a", ""]], "input"),
      (["input": 3], "input"), (["input": [1, "a"]], "input"), (["input": [258]], "input"),
      (["input": "a", "dimensions": 0], "dimensions"), (["input": "a", "dimensions": 9], "dimensions"),
      (["input": "a", "encoding_format": "int8"], "encoding_format"), (["input": "a", "model": "other"], "model"),
    ] as [(JSONValue, String)])
  func mistakesAreNamed(body: JSONValue, parameter: String) async throws {
    let service = fake()
    let answer = try await withRoutes(service) { try await $0.post("/v1/embeddings", body) }
    #expect(answer.status == (parameter == "model" ? 404 : 400), "\(body)")
    #expect(answer.parameter == parameter, "\(body): \(answer.text)")
    #expect(service.calls.isEmpty)
  }

  @Test func limitsHold() async throws {
    let service = fake { $0.contextLength = 1 << 20 }
    try await withRoutes(service) { client in
      let many = try await client.post("/v1/embeddings", ["input": .array(Array(repeating: "a", count: 2049))])
      #expect(many.status == 400 && many.parameter == "input" && many.error.contains("2048"))
      let long = try await client.post("/v1/embeddings", ["input": .string(String(repeating: "a", count: 300_000))])
      #expect(long.status == 400 && long.error.contains("300000 may be sent"))
    }
    #expect(service.calls.isEmpty)
  }

  @Test func theServicesErrorsArrive() async throws {
    let service = fake { $0.failure = EngineError(.queueFull, "Full.") }
    let answer = try await withRoutes(service) { try await $0.post("/v1/embeddings", ["input": "a"]) }
    #expect(answer.status == 429 && answer.headers[.retryAfter] == "1")
  }

  @Test func eachModelSaysWhatItCannotDo() async throws {
    try await withRoutes(fake()) { client in
      let text = try await client.post("/v1/completions", ["prompt": "a"])
      #expect(text.status == 400 && text.code == "unsupported_value")
      let labels = try await client.post("/v1/score", ["query": "a", "items": ["b"], "label_token_ids": [1]])
      #expect(labels.status == 400 && labels.error.contains("text_1"))
      #expect(try await client.get("/health_generate").status == 200)
    }
    try await withRoutes(fake { $0.labelCount = 1 }) { client in
      let vectors = try await client.post("/v1/embeddings", ["input": "a"])
      #expect(vectors.status == 400 && vectors.error.contains("/v1/rerank"))
    }
    try await withRoutes(fake { $0.labelCount = 3 }) { client in
      let answer = try await client.post("/v1/rerank", ["query": "a", "documents": ["b"]])
      #expect(answer.status == 400 && answer.error.contains("3 labels"))
    }
    try await withRoutes { client in
      for (path, body) in [
        ("/v1/embeddings", ["input": "a"]), ("/v1/rerank", ["query": "a", "documents": ["b"]]),
        ("/v1/score", ["text_1": "a", "text_2": "b"]),
      ] as [(String, JSONValue)] {
        let answer = try await client.post(path, body)
        #expect(answer.status == 400 && answer.error.contains("--is-embedding"), "\(path)")
      }
    }
  }

  @Test(
    arguments: [
      (
        "/v1/embeddings",
        #"{"input":["a","bé"],"model":"fake-embedding","encoding_format":"base64","dimensions":3,"#
          + #""truncate_prompt_tokens":-1,"user":"u"}"#
      ),
      ("/v1/embeddings", #"{"input":[[1,2],[3]],"encoding_format":"float","dimensions":8}"#),
      ("/v1/score", #"{"text_1":"ab","text_2":["c","d \u00e9"],"truncate_prompt_tokens":9}"#),
      (
        "/v1/rerank",
        #"{"query":"q","documents":["a",{"text":"b"}],"top_n":1,"return_documents":true,"model":"default"}"#
      ),
    ]) func mutatedBodiesAreRefusedOrAnswered(path: String, body: String) async throws
  {
    let seed: UInt64 = 0xE3_B0 + UInt64(body.utf8.count)
    let statuses = try await withRoutes(fake()) { client in
      var generator = SeededGenerator(seed: seed)
      var statuses: [Int: Int] = [:]
      for round in 0..<500 {
        let mutated = String(decoding: HostileInputTests.mutate(body, &generator), as: UTF8.self)
        let answer = try await client.send(.post, path, mutated)
        #expect(
          answer.status == 200 || (400..<500).contains(answer.status),
          "seed \(seed), round \(round): \(answer.status) for \(mutated)")
        statuses[answer.status, default: 0] += 1
      }
      return statuses
    }
    #expect((statuses[200] ?? 0) > 0 && (statuses[400] ?? 0) > 0)
  }

  @Test func aClosedConnectionCancelsTheRequest() async throws {
    let wasCancelled = Mutex(false)
    let service = fake {
      $0.beforeAnswer = {
        try? await Task.sleep(for: .seconds(60))
        wasCancelled.withLock { $0 = Task.isCancelled }
      }
    }
    /// Waits for something that happens within a moment.
    @Sendable func wait(_ condition: @Sendable () -> Bool) async throws -> Bool {
      for _ in 0..<2000 {
        if condition() { return true }
        try await Task.sleep(for: .milliseconds(10))
      }
      return false
    }
    try await withServer(service) { port, _ in
      let client = try await RawClient(port: port)
      let body = #"{"input":"a"}"#
      try await client.send(
        "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: \(body.utf8.count)\r\n\r\n\(body)")
      #expect(try await wait { service.calls.count == 1 })
      client.close()
      #expect(try await wait { wasCancelled.withLock { $0 } })
    }
  }
}

@Suite struct ScoringTests {
  @Test func cosinesOfEmbeddings() async throws {
    let service = fake()
    try await withRoutes(service) { client in
      let answer = try await client.post("/v1/score", ["text_1": "ab", "text_2": ["ab", "ba", "zzz"]])
      #expect(answer.status == 200)
      #expect(answer.json["object"] == "list")
      let data = try #require(answer.json["data"]?.arrayValue)
      #expect(data.map { $0["index"]?.intValue } == [0, 1, 2])
      let scores = data.compactMap { $0["score"]?.doubleValue }
      #expect(abs(scores[0] - 1) < 1e-9 && abs(scores[1] - 1) < 1e-9 && scores[2] < 0.9)
      // Texts that are equal are embedded once.
      #expect(answer.json["usage"]?["total_tokens"] == 13)
      let pairs = try await client.post("/score", ["text_1": ["a", "b"], "text_2": ["a", "c"]])
      #expect(pairs.json["data"]?.arrayValue?.count == 2)
      let uneven = try await client.post("/v1/score", ["text_1": ["a", "b"], "text_2": ["a", "b", "c"]])
      #expect(uneven.status == 400 && uneven.parameter == "text_1")
      let half = try await client.post("/v1/score", ["text_1": "a"])
      #expect(half.status == 400 && half.parameter == "text_2")
      let neither = try await client.post("/v1/score", [:])
      #expect(neither.status == 400 && neither.parameter == "query")
    }
  }

  @Test func crossEncodersJudgePairs() async throws {
    let service = fake { $0.labelCount = 1 }
    try await withRoutes(service) { client in
      let answer = try await client.post("/v1/score", ["text_1": "ab", "text_2": ["ab", "xy"]])
      let scores = answer.json["data"]?.arrayValue?.compactMap { $0["score"]?.doubleValue } ?? []
      #expect(scores.count == 2 && abs(scores[0] - 1 / (1 + exp(-2.0))) < 1e-7 && scores[1] == 0.5)
      let cut = try await client.post(
        "/v1/score", ["text_1": "ab", "text_2": "abcdef", "truncate_prompt_tokens": 7])
      #expect(cut.json["usage"]?["total_tokens"] == 7)
    }
    #expect(
      service.calls[1] == [EmbeddingInput(tokens: [256, 97, 98, 257, 97, 98, 257], firstSegmentCount: 4)])
  }

  @Test func rerankSorts() async throws {
    try await withRoutes(fake { $0.labelCount = 1 }) { client in
      let body: JSONValue = ["query": "abc", "documents": ["x", "ab", ["text": "abc", "id": 7], "y"]]
      let answer = try await client.post("/v1/rerank", body)
      #expect(answer.status == 200)
      let results = try #require(answer.json["results"]?.arrayValue)
      // Equal scores keep the order of the request.
      #expect(results.map { $0["index"]?.intValue } == [2, 1, 0, 3])
      #expect(results.map { $0["document"]?["text"]?.stringValue } == ["abc", "ab", "x", "y"])
      #expect(results[3]["relevance_score"] == 0.5)
      #expect((answer.json["usage"]?["total_tokens"]?.intValue ?? 0) == 4 * 5 + 7 + 4)
      var few = body.objectValue!
      few["top_n"] = 2
      few["return_documents"] = false
      let best = try await client.post("/rerank", .object(few))
      #expect(best.json["results"]?.arrayValue?.map { $0["index"]?.intValue } == [2, 1])
      #expect(best.json["results"]?[0]?["document"] == nil)
      for (key, value, parameter) in [
        ("top_n", 0, "top_n"), ("query", "", "query"), ("documents", [], "documents"),
        ("documents", [["title": "a"]], "documents[0]"), ("documents", ["a", ""], "documents"),
      ] as [(String, JSONValue, String)] {
        var wrong = body.objectValue!
        wrong[key] = value
        let refused = try await client.post("/v1/rerank", .object(wrong))
        #expect(refused.status == 400 && refused.parameter == parameter, "\(key) \(value): \(refused.text)")
      }
    }
  }

  @Test func labelProbabilitiesOfAGenerator() async throws {
    let service = FakeService()
    try await withRoutes(service) { client in
      let body: JSONValue = ["query": "q", "items": ["x", "yz"], "label_token_ids": [70, 71], "model": "default"]
      let answer = try await client.post("/v1/score", body)
      #expect(answer.status == 200)
      #expect(answer.json["object"] == "scoring")
      let rows = try #require(answer.json["scores"]?.arrayValue).map { $0.arrayValue!.map { $0.doubleValue! } }
      // The fake reports a log-probability of -2 for every token asked for.
      #expect(rows.count == 2 && rows.allSatisfy { $0.allSatisfy { abs($0 - exp(-2.0)) < 1e-9 } })
      var softmax = body.objectValue!
      softmax["apply_softmax"] = true
      softmax["item_first"] = true
      let shares = try await client.post("/v1/score", .object(softmax))
      #expect(shares.json["scores"] == [[0.5, 0.5], [0.5, 0.5]])
      let tokens = try await client.post(
        "/v1/score", ["query": [1, 2], "items": [[3], [4, 5]], "label_token_ids": [70]])
      #expect(tokens.status == 200)
      for (wrong, parameter) in [
        (["query": "q", "items": [[1]], "label_token_ids": [1]], "items"),
        (["query": "q", "items": ["a"]], "label_token_ids"),
        (["query": "q", "items": ["a"], "label_token_ids": [512]], "label_token_ids"),
        (["query": "q", "label_token_ids": [1]], "items"),
      ] as [(JSONValue, String)] {
        let refused = try await client.post("/v1/score", wrong)
        #expect(refused.status == 400 && refused.parameter == parameter, "\(wrong): \(refused.text)")
      }
    }
    let prompts = service.requests.map(\.prompt)
    #expect(
      prompts == [.text("qx"), .text("qyz"), .text("xq"), .text("yzq"), .tokens([1, 2, 3]), .tokens([1, 2, 4, 5])])
    #expect(service.requests.allSatisfy { $0.sampling.maxNewTokens == 1 && $0.sampling.temperature == 0 })
  }
}
