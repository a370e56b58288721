import ApusCore
import ApusServer
import HTTPTypes
import Metrics
import Testing

@Suite struct GenerateTests {
  @Test func answersWithSGLangsShape() async throws {
    let service = FakeService()
    let answer = try await withRoutes(service) { client in
      try await client.post("/generate", ["text": "ab", "rid": "r", "sampling_params": ["temperature": 0]])
    }
    #expect(answer.status == 200)
    let json = answer.json
    #expect(json["text"] == .string(FakeService.answer))
    #expect(json["output_ids"] == [300, 301, 302, 303, 304, 305, 306, 307, 257])
    var meta = try #require(json["meta_info"]?.objectValue)
    #expect((meta["e2e_latency"]?.doubleValue ?? -1) >= 0)
    meta["e2e_latency"] = nil
    #expect(
      JSONValue.object(meta) == [
        "id": "r", "finish_reason": ["type": "stop", "matched": 257], "prompt_tokens": 3, "weight_version": "default",
        "total_retractions": 0, "completion_tokens": 9, "cached_tokens": 3,
      ])
    // The native API has defaults of its own and ignores the model's recommendations.
    #expect(service.requests[0].sampling.maxNewTokens == 128)
  }

  @Test func answersBatchesInOrder() async throws {
    let service = FakeService()
    let answer = try await withRoutes(service) { client in
      try await client.post(
        "/generate",
        [
          "input_ids": [[1], [2, 3]], "rid": ["x", "y"],
          "sampling_params": [["max_new_tokens": 1], ["max_new_tokens": 2]],
        ])
    }
    #expect(answer.json.arrayValue?.map { $0["meta_info"]?["id"] } == ["x", "y"])
    #expect(answer.json.arrayValue?.map { $0["text"] } == ["Hello", "Hello,"])
    #expect(service.requests.map(\.prompt) == [.tokens([1]), .tokens([2, 3])])
  }

  @Test func aListOfOnePromptIsAnsweredByAList() async throws {
    try await withRoutes { client in
      let one = try await client.post("/generate", ["input_ids": [[1]]])
      #expect(one.json.arrayValue?.count == 1)
      let plain = try await client.post("/generate", ["input_ids": [1]])
      #expect(plain.json["text"] != nil)
      let put = try await client.send(.put, "/generate", #"{"text":["a"]}"#)
      #expect(put.json.arrayValue?.count == 1)
      let samples = try await client.post("/generate", ["text": "a", "sampling_params": ["n": 2]])
      #expect(samples.json.arrayValue?.count == 2)
    }
  }

  @Test func reportsLogprobs() async throws {
    let answer = try await withRoutes { client in
      try await client.post(
        "/generate",
        [
          "input_ids": [65, 66], "sampling_params": ["max_new_tokens": 2], "return_logprob": true,
          "logprob_start_len": 0, "top_logprobs_num": 1, "token_ids_logprob": [70], "return_text_in_logprobs": true,
        ])
    }
    let meta = try #require(answer.json["meta_info"])
    #expect(meta["input_token_logprobs"] == [[nil, 65, "A"], [-1.0, 66, "B"]])
    #expect(meta["output_token_logprobs"] == [[-0.5, 300, "Hello"], [-1.0, 301, ","]])
    #expect(meta["input_top_logprobs"] == [nil, [[-0.25, 97, "a"]]])
    #expect(meta["output_top_logprobs"] == [[[-0.25, 97, "a"]], [[-0.25, 97, "a"]]])
    #expect(meta["input_token_ids_logprobs"] == [nil, [[-2.0, 70, "F"]]])
    #expect(meta["output_token_ids_logprobs"] == [[[-2.0, 70, "F"]], [[-2.0, 70, "F"]]])
    let outputsOnly = try await withRoutes { client in
      try await client.post(
        "/generate", ["text": "a", "sampling_params": ["max_new_tokens": 1], "return_logprob": true])
    }
    #expect(outputsOnly.json["meta_info"]?["input_token_logprobs"] == [])
    #expect(outputsOnly.json["meta_info"]?["output_token_logprobs"] == [[-0.5, 300, nil]])
  }

  @Test func streamsBatchesWithTheirIndices() async throws {
    let answer = try await withRoutes { client in
      try await client.post(
        "/generate", ["text": ["a", "b"], "stream": true, "sampling_params": ["max_new_tokens": 3]])
    }
    var last: [Int: JSONValue] = [:]
    for event in answer.events.dropLast() {
      let json = try JSONValue.parse(event)
      last[try #require(json["index"]?.intValue)] = json
    }
    #expect(last.count == 2)
    #expect(last.values.allSatisfy { $0["text"] == "Hello, world" })
  }

  @Test(
    arguments: [
      (["a": 1], "text or input_ids is required."),
      (["text": "a", "input_ids": [1]], "Give either text or input_ids, not both."),
      (["text": [1]], "text: expected a string or an array of strings; token ids go into input_ids."),
      (["input_ids": "a"], "input_ids: expected token ids or an array of such lists; strings go into text."),
      (["text": ["a", "b"], "rid": ["x"]], "rid has 1 names for 2 prompts."),
      (["text": ["a", "b"], "rid": ["x", "x"]], "rid must not name two prompts alike."),
      (
        ["text": "a", "sampling_params": [["n": 1], ["n": 1]]], "sampling_params has 2 elements for 1 prompts."
      ),
      (["text": "a", "sampling_params": 3], "sampling_params: expected an object, got a number."),
      (
        ["text": "a", "sampling_params": ["temperature": "x"]],
        "sampling_params.temperature: expected a number, got a string."
      ),
      (
        ["text": "a", "sampling_params": ["min_new_tokens": 200]],
        "min_new_tokens must not exceed max_new_tokens (128), got 200."
      ),
      (["text": "a", "image_data": "x"], "image_data: the model served here reads text only; leave the field out."),
      (
        ["text": "a", "logprob_start_len": -2],
        "logprob_start_len must be -1 (outputs only) or a prompt position, got -2."
      ),
      (
        ["text": "a", "return_logprob": true, "token_ids_logprob": [700]],
        "token_ids_logprob: token 700 at position 0 is not in the vocabulary of 512 tokens."
      ),
    ] as [(JSONValue, String)])
  func refusesBrokenBodies(body: JSONValue, message: String) async throws {
    let answer = try await withRoutes { try await $0.post("/generate", body) }
    #expect(answer.status == 400)
    #expect(answer.error == message)
  }

  @Test func namesInFlightAreUnique() async throws {
    let service = FakeService(.init(holdAfter: 0))
    try await withRoutes(service) { client in
      async let first = client.post("/generate", ["text": "a", "rid": "same"])
      while service.inFlight == 0 { await Task.yield() }
      let second = try await client.post("/generate", ["text": "a", "rid": "same"])
      #expect(second.status == 400)
      #expect(second.error == "A request named \"same\" is in flight already.")
      service.release()
      let status = try await first.status
      #expect(status == 200)
      let third = try await client.post("/generate", ["text": "a", "rid": "same"])
      #expect(third.status == 200)
    }
  }
}

@Suite struct UtilityTests {
  @Test func tokenizes() async throws {
    try await withRoutes { client in
      for path in ["/tokenize", "/v1/tokenize"] {
        let one = try await client.post(path, ["model": "fake/model", "prompt": "ab"])
        #expect(one.json == ["tokens": [256, 97, 98], "count": 3, "max_model_len": 4096])
      }
      let many = try await client.post("/tokenize", ["prompt": ["a", ""], "add_special_tokens": false])
      #expect(many.json == ["tokens": [[97], []], "count": [1, 0], "max_model_len": 4096])
      let chat = try await client.post("/tokenize", ["messages": [["role": "u", "content": "x"]]])
      #expect(chat.json["count"] == 15)
      for body in [[:], ["prompt": 3], ["prompt": [3]], ["prompt": "a", "model": "b"]] as [JSONValue] {
        let answer = try await client.post("/tokenize", body)
        #expect(answer.status == (body["model"] == nil ? 400 : 404))
      }
    }
  }

  @Test func detokenizes() async throws {
    try await withRoutes { client in
      for path in ["/detokenize", "/v1/detokenize"] {
        let one = try await client.post(path, ["tokens": [256, 97, 98]])
        #expect(one.json == ["text": "ab"])
      }
      let kept = try await client.post("/detokenize", ["tokens": [256, 97], "skip_special_tokens": false])
      #expect(kept.json == ["text": "<s>a"])
      let many = try await client.post("/detokenize", ["tokens": [[97], [98, 99]]])
      #expect(many.json == ["text": ["a", "bc"]])
      let none = try await client.post("/detokenize", ["tokens": []])
      #expect(none.json == ["text": ""])
      for body in [[:], ["tokens": "a"], ["tokens": [512]], ["tokens": [-1]], ["tokens": [nil]]] as [JSONValue] {
        let answer = try await client.post("/detokenize", body)
        #expect(answer.status == 400)
      }
    }
  }

  @Test func listsModels() async throws {
    try await withRoutes { client in
      let list = try await client.get("/v1/models")
      #expect(
        list.json == [
          "object": "list",
          "data": [
            [
              "id": "fake/model", "object": "model", "created": 1_700_000_000, "owned_by": "apus",
              "root": "/models/fake", "parent": nil, "max_model_len": 4096,
            ]
          ],
        ])
      for path in ["/v1/models/fake/model", "/v1/models/fake%2Fmodel"] {
        let model = try await client.get(path)
        #expect(model.json["id"] == "fake/model", "\(path): \(model.text)")
      }
      let unknown = try await client.get("/v1/models/gpt-4")
      #expect(unknown.status == 404)
      #expect(unknown.code == "model_not_found")
    }
  }

  @Test func reportsHealth() async throws {
    try await withRoutes { client in
      for path in ["/health", "/health_generate", "/ready"] {
        let answer = try await client.get(path)
        #expect(answer.status == 200)
        #expect(answer.text == "OK\n")
        let head = try await client.send(.head, path)
        #expect(head.status == 200)
        #expect(head.text.isEmpty)
      }
    }
    // A full queue is no illness as long as the engine makes steps.
    let full = FakeService(.init(capacity: 0))
    try await withRoutes(full, testConfiguration { $0.probeTimeout = 0.05 }) { client in
      let stuck = try await client.get("/health_generate")
      #expect(stuck.status == 503)
    }
    let hanging = FakeService(.init(holdAfter: 0))
    try await withRoutes(hanging, testConfiguration { $0.probeTimeout = 0.05 }) { client in
      let answer = try await client.get("/health_generate")
      #expect(answer.status == 503)
    }
    #expect(hanging.inFlight == 0)
    let failing = FakeService(.init(failure: (0, EngineError(.internalFailure, "No."))))
    try await withRoutes(failing) { client in
      let probe = try await client.get("/health_generate")
      #expect(probe.status == 500)
      let alive = try await client.get("/health")
      #expect(alive.status == 200)
    }
  }

  @Test func describesModelServerAndLoad() async throws {
    let configuration = testConfiguration { configuration in
      configuration.details["page_size"] = 16
      configuration.apiKey = "secret-key"
      configuration.adminKey = "secret-admin"
    }
    try await withRoutes(FakeService(), configuration) { client in
      let headers: HTTPFields = [.authorization: "Bearer secret-key"]
      for path in ["/model_info", "/get_model_info"] {
        let info = try await client.get(path, headers: headers)
        #expect(info.json["model_path"] == "/models/fake")
        #expect(info.json["is_generation"] == true)
        #expect(info.json["architectures"] == ["FakeForCausalLM"])
      }
      for path in ["/server_info", "/get_server_info"] {
        let info = try await client.get(path, headers: headers)
        #expect(info.json["page_size"] == 16)
        #expect(info.json["status"] == "ready")
        #expect(info.json["internal_states"]?[0]?["num_running_reqs"] == 0)
        #expect(!info.text.contains("secret"))
      }
      let loads = try await client.get("/v1/loads", headers: headers)
      #expect(loads.json["loads"]?[0]?["token_usage"] == 0.25)
      #expect(loads.json["aggregate"]?["total_reqs"] == 0)
      let text = try await client.get("/v1/loads?format=prometheus", headers: headers)
      #expect(text.text.contains("apus:token_usage{model_name=\"fake/model\"} 0.25\n"))
      let wrong = try await client.get("/v1/loads?format=xml", headers: headers)
      #expect(wrong.status == 400)
    }
  }
}

@Suite struct AdministrationTests {
  private let configuration = testConfiguration { $0.adminKey = "k" }
  private let headers: HTTPFields = [.authorization: "Bearer k"]

  @Test func flushesTheCache() async throws {
    let service = FakeService(.init(holdAfter: 0))
    try await withRoutes(service, configuration) { client in
      for method in [HTTPRequest.Method.get, .post] {
        let answer = try await client.send(method, "/flush_cache?timeout=0.5", headers: headers)
        #expect(answer.status == 200)
        #expect(answer.json["success"] == true)
      }
      let wrong = try await client.get("/flush_cache?timeout=soon", headers: headers)
      #expect(wrong.status == 400)
      async let running = client.post("/generate", ["text": "a"])
      while service.inFlight == 0 { await Task.yield() }
      let busy = try await client.get("/flush_cache", headers: headers)
      #expect(busy.status == 400)
      #expect(busy.json["success"] == false)
      service.release()
      _ = try await running
    }
  }

  @Test func recordsTheLoadsOfExperts() async throws {
    let names = ["start", "stop", "dump"].map { "/\($0)_expert_distribution_record" }
    try await withRoutes(FakeService(), configuration) { client in
      for name in names {
        let answer = try await client.send(.post, name, headers: headers)
        #expect(answer.status == 400 && answer.text.contains("--expert-distribution-recorder-mode"))
      }
    }
    try await withRoutes(FakeService(expertLoads: FakeExpertLoads()), configuration) { client in
      for name in names {
        #expect(try await client.send(.post, name).status == 401)
      }
      #expect(!(try await client.get("/metrics").text.contains("eplb_balancedness")))
      for method in [HTTPRequest.Method.post, .get] {
        let started = try await client.send(method, names[0], headers: headers)
        #expect(started.status == 200 && started.json["is_recording"] == true)
        #expect(
          try await client.get("/metrics").text.contains("apus:eplb_balancedness{model_name=\"fake/model\"} 0.5\n"))
        let stopped = try await client.send(method, names[1], headers: headers)
        #expect(stopped.json["is_recording"] == false)
        let dump = try await client.send(method, names[2], headers: headers)
        #expect(dump.json["logical_count"] == [[1, 3]])
      }
    }
  }

  @Test func abortsByPrefixAndAll() async throws {
    let service = FakeService(.init(holdAfter: 1))
    try await withRoutes(service, configuration) { client in
      async let first = client.post("/generate", ["text": "a", "rid": "job-1"])
      async let second = client.post("/v1/completions", ["prompt": "a", "rid": "job-2"])
      async let third = client.post("/generate", ["text": "a", "rid": "other"])
      while service.inFlight < 3 { await Task.yield() }
      let answer = try await client.post("/abort_request", ["rid": "job-"], headers: headers)
      #expect(answer.json["aborted"] == 2)
      let aborted = try await first
      #expect(
        aborted.json["meta_info"]?["finish_reason"] == ["type": "abort", "message": "The request was aborted."])
      #expect(aborted.json["text"] == "Hello")
      let completion = try await second
      #expect(completion.json["choices"]?[0]?["finish_reason"] == "abort")
      let all = try await client.post("/abort_request", ["abort_all": true], headers: headers)
      #expect(all.json["aborted"] == 1)
      let last = try await third
      #expect(last.json["meta_info"]?["finish_reason"]?["type"] == "abort")
      let empty = try await client.post("/abort_request", [:], headers: headers)
      #expect(empty.status == 400)
    }
    #expect(service.inFlight == 0)
  }
}

@Suite struct AuthorizationTests {
  /// What each caller gets at a client endpoint, an administrative one and an open one, under each set of keys.
  @Test(
    arguments: [
      // apiKey, adminKey, header, client, admin, open. Without a socket a caller counts as remote.
      (nil, nil, nil, 200, 403, 200),
      (nil, nil, "Bearer x", 200, 403, 200),
      ("api", nil, nil, 401, 401, 200),
      ("api", nil, "Bearer api", 200, 200, 200),
      ("api", nil, "bearer api", 200, 200, 200),
      ("api", nil, "Bearer apj", 401, 401, 200),
      ("api", nil, "Bearer ap", 401, 401, 200),
      ("api", nil, "Bearer apiapi", 401, 401, 200),
      ("api", nil, "Bearer ", 401, 401, 200),
      ("api", nil, "api", 401, 401, 200),
      ("api", nil, "Basic api", 401, 401, 200),
      (nil, "admin", nil, 200, 401, 200),
      (nil, "admin", "Bearer admin", 200, 200, 200),
      ("api", "admin", "Bearer api", 200, 401, 200),
      ("api", "admin", "Bearer admin", 200, 200, 200),
    ] as [(String?, String?, String?, Int, Int, Int)])
  func matrix(
    apiKey: String?, adminKey: String?, header: String?, client expected: Int, admin: Int, open: Int
  ) async throws {
    let configuration = testConfiguration { configuration in
      configuration.apiKey = apiKey
      configuration.adminKey = adminKey
    }
    var headers = HTTPFields()
    headers[.authorization] = header
    let sent = headers
    try await withRoutes(FakeService(), configuration) { client in
      for path in ["/v1/models", "/v1/models/fake/model", "/server_info", "/v1/loads", "/model_info"] {
        let answer = try await client.get(path, headers: sent)
        #expect(answer.status == expected, "\(path)")
      }
      let completion = try await client.post("/v1/completions", ["prompt": "a"], headers: sent)
      #expect(completion.status == expected)
      let flush = try await client.get("/flush_cache", headers: sent)
      #expect(flush.status == admin)
      for path in ["/health", "/ready", "/metrics", "/health_generate"] {
        let answer = try await client.get(path, headers: sent)
        #expect(answer.status == open, "\(path)")
      }
      if expected == 401 {
        #expect(completion.code == "invalid_api_key")
        #expect(completion.headers[.wwwAuthenticate] == "Bearer")
      }
    }
  }
}

@Suite struct RouteTests {
  @Test func tellsWrongPathsFromWrongMethods() async throws {
    try await withRoutes { client in
      let path = try await client.get("/v1/nothing")
      #expect(path.status == 404)
      #expect(path.error == "There is no GET /v1/nothing.")
      let method = try await client.get("/v1/chat/completions")
      #expect(method.status == 405)
      #expect(method.headers[.allow] == "POST")
      #expect(method.error == "/v1/chat/completions does not take GET; it takes POST.")
      let delete = try await client.send(.delete, "/v1/models/fake")
      #expect(delete.status == 405)
      #expect(delete.headers[.allow] == "GET, HEAD")
    }
  }

  @Test func keepsTheClientsRequestID() async throws {
    let name = HTTPField.Name("x-request-id")!
    try await withRoutes { client in
      let kept = try await client.get("/health", headers: [name: "abc-1"])
      #expect(kept.headers[name] == "abc-1")
      let replaced = try await client.get("/health", headers: [name: "has spaces in it"])
      #expect(replaced.headers[name]?.hasPrefix("req_") == true)
      let error = try await client.get("/nothing", headers: [name: "abc-2"])
      #expect(error.headers[name] == "abc-2")
    }
  }

  @Test func refusesBodiesThatAreTooLarge() async throws {
    try await withRoutes(FakeService(), testConfiguration { $0.maxBodyBytes = 100 }) { client in
      let body = #"{"prompt":""# + String(repeating: "a", count: 100) + #""}"#
      let answer = try await client.send(.post, "/v1/completions", body)
      #expect(answer.status == 413)
      #expect(answer.error == "The request body is larger than the 100 bytes that are allowed.")
    }
  }

  @Test func letsChosenPagesIn() async throws {
    let preflight: HTTPFields = [
      .origin: "https://a.example", .accessControlRequestMethod: "POST",
      .accessControlRequestHeaders: "authorization, x-stainless-os",
    ]
    try await withRoutes(
      FakeService(),
      testConfiguration {
        $0.apiKey = "k"; $0.allowedOrigins = ["https://a.example"]
      }
    ) {
      client in
      let asked = try await client.send(.options, "/v1/chat/completions", headers: preflight)
      #expect(asked.status == 204)
      #expect(asked.headers[.accessControlAllowOrigin] == "https://a.example")
      #expect(asked.headers[.accessControlAllowHeaders] == "authorization, x-stainless-os")
      // An error can be read by the page too.
      let refused = try await client.post("/v1/completions", ["prompt": "a"], headers: [.origin: "https://a.example"])
      #expect(refused.status == 401)
      #expect(refused.headers[.accessControlAllowOrigin] == "https://a.example")
      let other = try await client.get("/health", headers: [.origin: "https://b.example"])
      #expect(other.status == 200)
      #expect(other.headers[.accessControlAllowOrigin] == nil)
      #expect(other.headers[.vary] == "Origin")
    }
    try await withRoutes(FakeService(), testConfiguration { $0.allowedOrigins = ["*"] }) { client in
      let answer = try await client.get("/health", headers: [.origin: "https://b.example"])
      #expect(answer.headers[.accessControlAllowOrigin] == "*")
    }
    try await withRoutes { client in
      let answer = try await client.send(.options, "/v1/chat/completions", headers: preflight)
      #expect(answer.status == 405)
      #expect(answer.headers[.accessControlAllowOrigin] == nil)
    }
  }

  @Test(arguments: [
    ("", "The body is empty, where a JSON object was expected at byte 0"), ("{", "Expected a string at byte 1"),
    ("[1]", "body: expected an object, got an array"), ("null", "body: expected an object, got null"),
    (#"{"prompt":"a"} x"#, "Unexpected text after the document at byte 15"),
    (#"{"prompt":"\ud800"}"#, "A lone surrogate has no character"),
    (#"{"prompt":01}"#, "A number must not start with 0"),
    (#"{"prompt":\#(String(repeating: "[", count: 100_000))"#, "Nesting is deeper than 64 levels"),
  ])
  func saysWhatIsWrongWithTheJSON(body: String, message: String) async throws {
    let answer = try await withRoutes { try await $0.send(.post, "/v1/completions", body) }
    #expect(answer.status == 400)
    #expect(answer.error.contains(message), "\(answer.error)")
  }

  @Test func refusesImpossibleConfigurations() {
    for change in [
      { $0.port = 70_000 }, { $0.host = "" }, { $0.certificateFile = "x" }, { $0.apiKey = "" }, { $0.maxBodyBytes = 0 },
      { $0.drainTimeout = .infinity },
    ] as [(inout ServerConfiguration) -> Void] {
      #expect(throws: EngineError.self) {
        try Server(service: FakeService(), configuration: testConfiguration(change), logger: quietLogger)
      }
    }
  }
}

@Suite struct AccessLogTests {
  @Test func logsRequestsButNotProbes() async throws {
    let log = RecordingLog()
    let failing = FakeService(.init(failure: (1, EngineError(.internalFailure, "The model fell over."))))
    try await withRoutes(failing, testConfiguration { $0.accessLog = true }, logger: log.logger()) { client in
      _ = try await client.get("/health")
      _ = try await client.get("/v1/models?x=secret")
      _ = try await client.post("/v1/completions", ["prompt": "a", "max_tokens": 1, "stream": true])
      _ = try await client.post("/v1/completions", ["prompt": "a"])
      _ = try await client.get("/nowhere")
    }
    #expect(
      log.lines == [
        "info GET /v1/models 200", "info POST /v1/completions 200", "error The model fell over.",
        "info POST /v1/completions 500", "info GET /nowhere 404",
      ])
  }
}

@Suite struct MetricsTests {
  @Test func countsRequestsTokensAndLatencies() async throws {
    let service = FakeService()
    let text = try await withRoutes(service) { client in
      _ = try await client.post("/v1/completions", ["prompt": "a"])
      _ = try await client.post("/v1/completions", ["prompt": "a", "temperature": -1])
      _ = try await client.get("/nowhere")
      return try await client.get("/metrics").text
    }
    for line in [
      "# TYPE apus:num_running_reqs gauge", "apus:num_running_reqs{model_name=\"fake/model\"} 0",
      "apus:token_usage{model_name=\"fake/model\"} 0.25", "# TYPE apus:prompt_tokens_total counter",
      "apus:prompt_tokens_total{model_name=\"fake/model\"} 2",
      "apus:time_to_first_token_seconds_count{model_name=\"fake/model\"} 1",
      "apus:inter_token_latency_seconds_count{model_name=\"fake/model\"} 8",
      "apus:e2e_request_latency_seconds_bucket{model_name=\"fake/model\",le=\"+Inf\"} 1",
      "apus:generation_tokens_histogram_bucket{model_name=\"fake/model\",le=\"8.0\"} 0",
      "apus:generation_tokens_histogram_bucket{model_name=\"fake/model\",le=\"16.0\"} 1",
      "apus:generation_tokens_histogram_sum{model_name=\"fake/model\"} 9",
      "apus:http_requests_total{endpoint=\"/v1/completions\",method=\"POST\"} 2",
      "apus:http_responses_total{endpoint=\"/v1/completions\",method=\"POST\",status_code=\"200\"} 1",
      "apus:http_responses_total{endpoint=\"/v1/completions\",method=\"POST\",status_code=\"400\"} 1",
      "apus:http_responses_total{endpoint=\"unknown\",method=\"GET\",status_code=\"404\"} 1",
      "apus:http_requests_active 1", "apus:num_requests_total{model_name=\"fake/model\"} 1",
    ] {
      #expect(text.contains(line + "\n"), "\(line)")
    }
  }

  /// Every line is a comment or a sample, every family is declared once and before its samples.
  @Test func rendersPrometheusText() async throws {
    let text = try await withRoutes { client in
      _ = try await client.post("/v1/completions", ["prompt": "a"])
      return try await client.get("/metrics").text
    }
    var families: Set<Substring> = []
    for line in text.split(separator: "\n") {
      if line.hasPrefix("# TYPE ") {
        let name = line.split(separator: " ")[2]
        #expect(families.insert(name).inserted, "\(name) twice")
      } else if !line.hasPrefix("# HELP ") {
        let match = try #require(
          line.wholeMatch(of: /([a-zA-Z_:][a-zA-Z0-9_:]*)(\{[^{}]*\})? (-?[0-9.e+-]+|NaN|\+Inf)/), "\(line)")
        let name = match.1.replacing(/_(bucket|sum|count)$/, with: "")
        #expect(families.contains(match.1) || families.contains(Substring(name)), "\(line)")
      }
    }
    #expect(families.count > 20)
  }

  @Test func escapesLabels() {
    let registry = PrometheusRegistry()
    Counter(label: "odd name", dimensions: [("a:b", "x\"\\\n")], factory: registry).increment(by: 2)
    #expect(registry.render() == "# TYPE odd_name counter\nodd_name{a_b=\"x\\\"\\\\\\n\"} 2\n")
  }
}
