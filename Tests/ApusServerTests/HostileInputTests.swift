import ApusCore
import ApusServer
import HTTPTypes
import Testing

@Suite struct HostileInputTests {
  private static let bodies: [(String, String)] = [
    (
      "/v1/chat/completions",
      #"{"model":"fake/model","messages":[{"role":"user","content":[{"type":"text","text":"Hi é"}]}],"max_tokens":3,"#
        + #""temperature":0.5,"stop":["x"],"logit_bias":{"5":1},"logprobs":true,"top_logprobs":2,"n":2,"seed":1}"#
    ),
    (
      "/v1/completions",
      #"{"prompt":[[1,2,3],[4]],"max_tokens":2,"echo":true,"logprobs":1,"stream":true,"stream_options":"#
        + #"{"include_usage":true},"best_of":1,"top_k":4,"stop_token_ids":[7]}"#
    ),
    (
      "/generate",
      #"{"input_ids":[[1,2],[3]],"sampling_params":[{"max_new_tokens":2,"stop":"a"},{"top_p":0.5}],"rid":["a","b"],"#
        + #""return_logprob":[true,false],"logprob_start_len":0,"token_ids_logprob":[[1],[2]]}"#
    ),
    ("/tokenize", #"{"prompt":["a","b \u00e9"],"add_special_tokens":false}"#),
    ("/detokenize", #"{"tokens":[[1,2],[3]],"skip_special_tokens":true}"#),
    (
      "/v1/score",
      #"{"query":[1,2],"items":[[3],[4,5]],"label_token_ids":[7,8],"apply_softmax":true,"item_first":false,"#
        + #""model":"fake/model"}"#
    ),
    ("/abort_request", #"{"rid":"nobody","abort_all":false}"#),
    (
      "/v1/messages",
      #"{"model":"fake/model","max_tokens":3,"system":[{"type":"text","text":"S"}],"messages":[{"role":"user","content":"#
        + #"[{"type":"text","text":"Hi é"}]},{"role":"assistant","content":[{"type":"tool_use","id":"a","name":"f","#
        + #""input":{"x":1}}]},{"role":"user","content":[{"type":"tool_result","tool_use_id":"a","content":"ok"}]}],"#
        + #""tools":[{"name":"f","input_schema":{}}],"tool_choice":{"type":"auto"},"stop_sequences":["x"],"top_k":3,"#
        + #""thinking":{"type":"enabled","budget_tokens":2},"stream":true}"#
    ),
    (
      "/api/chat",
      #"{"model":"fake/model","messages":[{"role":"user","content":"Hi é"},{"role":"assistant","content":"","tool_calls":"#
        + #"[{"function":{"name":"f","arguments":{"x":1}}}]},{"role":"tool","content":"ok"}],"format":"json","#
        + #""options":{"num_predict":3,"stop":["x"],"top_k":0,"mirostat":0},"keep_alive":"5m","think":false}"#
    ),
    (
      "/api/generate",
      #"{"prompt":"Hi","system":"S","raw":false,"stream":false,"context":[],"images":[],"options":{"num_predict":2}}"#
    ),
  ]

  /// Pieces that replace parts of a body: values of other types and things that break JSON.
  private static let pieces: [String] = [
    "null", "true", "-1", "0", "1e999", "9223372036854775808", "-9223372036854775808", "1.5", "\"\"", "[]", "{}",
    "[[[[]]]]", "{\"a\":{\"b\":[null]}}", "\"\\ud83d\"", "\"\\u0000\"", ",", ":", "}", "]", "\"", "\\", "\u{0}",
    "NaN", "Infinity", "[1,\"a\",null,{}]", "99999999999999999999999999", "0x10", "'a'", "\u{FEFF}",
  ]

  static func mutate(_ text: String, _ generator: inout SeededGenerator) -> [UInt8] {
    var bytes = Array(text.utf8)
    for _ in 0..<Int.random(in: 1...3, using: &generator) where !bytes.isEmpty {
      let start = Int.random(in: 0..<bytes.count, using: &generator)
      let end = min(bytes.count, start + Int.random(in: 0...12, using: &generator))
      switch Int.random(in: 0..<6, using: &generator) {
      case 0: bytes[start] = UInt8.random(in: .min ... .max, using: &generator)
      case 1: bytes.removeSubrange(start..<end)
      case 2: bytes.insert(contentsOf: bytes[start..<end], at: start)
      case 3: bytes.replaceSubrange(start..<end, with: pieces.randomElement(using: &generator)!.utf8)
      case 4: bytes.removeSubrange(start...)
      default:
        // Replaces a whole value: from a colon to the next comma or bracket.
        let colons = bytes.indices.filter { bytes[$0] == UInt8(ascii: ":") }
        guard let colon = colons.randomElement(using: &generator) else { continue }
        let stop = bytes[(colon + 1)...].firstIndex { ",]}".utf8.contains($0) } ?? bytes.count
        bytes.replaceSubrange((colon + 1)..<max(colon + 1, stop), with: pieces.randomElement(using: &generator)!.utf8)
      }
    }
    return bytes
  }

  @Test(arguments: bodies.indices) func mutatedBodiesAreRefusedOrAnswered(index: Int) async throws {
    let (path, body) = Self.bodies[index]
    let seed = UInt64(0xA9_05 + index)
    let service = FakeService()
    var statuses: [Int: Int] = [:]
    let counted = try await withRoutes(service, testConfiguration { $0.adminKey = "k" }) { client in
      var generator = SeededGenerator(seed: seed)
      var statuses: [Int: Int] = [:]
      for round in 0..<700 {
        let mutated = String(decoding: Self.mutate(body, &generator), as: UTF8.self)
        let answer = try await client.send(.post, path, mutated, headers: [.authorization: "Bearer k"])
        #expect(
          answer.status == 200 || (400..<500).contains(answer.status),
          "seed \(seed), round \(round): \(answer.status) for \(mutated)")
        if answer.status != 200 {
          let message = answer.json["error"]?["message"] ?? answer.json["error"]
          #expect(message?.stringValue?.isEmpty == false, "seed \(seed), round \(round)")
        }
        statuses[answer.status, default: 0] += 1
      }
      return statuses
    }
    statuses = counted
    // The mutations must reach both sides, or they test nothing.
    #expect((statuses[200] ?? 0) > 0)
    #expect((statuses[400] ?? 0) > 0)
    #expect(service.inFlight == 0)
  }

  @Test func rawBytesOnTheSocketBreakNothing() async throws {
    let service = FakeService()
    try await withServer(service) { port, _ in
      for text in [
        "\r\n\r\n", "GET\r\n\r\n", "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        "POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        "GET /" + String(repeating: "a", count: 200_000) + " HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n", "\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}\u{0}\u{1}",
        "GET /v1/models/%ff%fe%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        "GET /health?%%%=&&& HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
      ] {
        let client = try await RawClient(port: port)
        // The server may close while we still write.
        try? await client.send(text)
        client.close()
      }
      let client = try await RawClient(port: port)
      try await client.send("GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
      let answer = try await client.read(until: nil)
      #expect(answer.hasPrefix("HTTP/1.1 200"))
    }
  }
}
