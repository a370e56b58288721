import ApusCore
import ApusServer
import Foundation
import HTTPTypes
import Testing

/// What each streaming endpoint sends, byte for byte: `Goldens/NAME.txt` holds the status, the headers that matter and the
/// body, with what differs from run to run replaced. `APUS_WRITE_TRANSCRIPTS=1` writes the files anew; the diff is then to be
/// read like code.
@Suite struct TranscriptTests {
  struct Case: Sendable, CustomStringConvertible {
    var name: String
    var path: String
    var body: JSONValue
    var words = FakeService.words
    var isIncremental = false
    /// What happens to the generation.
    var failure: (index: Int, error: EngineError)?
    /// Requests in flight at which the queue is full.
    var capacity = 10_000
    /// What ends the last event of one of several answers, each of which begins when the one before it has ended. Answers
    /// come in any order otherwise.
    var endOfAnswer: String?
    /// How many answers there are.
    var answerCount = 1
    var description: String { name }
  }

  private static let schema: JSONValue = [
    "type": "object", "properties": ["city": ["type": "string"], "days": ["type": "integer"]],
  ]
  private static let question: JSONValue = [["role": "user", "content": "Hi"]]
  private static let tools: JSONValue = [
    ["type": "function", "function": ["name": "get_weather", "parameters": schema]],
    ["type": "function", "function": ["name": "ping"]],
  ]
  private static let flatTools: JSONValue = [
    ["type": "function", "name": "get_weather", "parameters": schema, "strict": false],
    ["type": "function", "name": "ping"],
  ]

  private static let broken = (
    index: 2,
    error: EngineError(.internalFailure, "The model computed logits that are not finite numbers.")
  )

  static let cases: [Case] = [
    Case(
      name: "chat", path: "/v1/chat/completions",
      body: [
        "messages": question, "stream": true, "stream_options": ["include_usage": true], "logprobs": true,
        "top_logprobs": 1, "max_tokens": 4,
      ]),
    Case(
      name: "chat-usage", path: "/v1/chat/completions",
      body: [
        "messages": question, "stream": true, "max_tokens": 3,
        "stream_options": ["include_usage": true, "continuous_usage_stats": true],
      ]),
    Case(
      name: "chat-two", path: "/v1/chat/completions",
      body: [
        "messages": question, "stream": true, "max_tokens": 2, "n": 2, "stream_options": ["include_usage": true],
      ], endOfAnswer: "\"matched_stop\"", answerCount: 2),
    Case(
      name: "chat-reasoning-whole", path: "/v1/chat/completions",
      body: ["messages": question, "stream": true, "stream_reasoning": false], words: Array(callingAnswer.prefix(8))),
    Case(
      name: "chat-reasoning-mixed", path: "/v1/chat/completions",
      body: ["messages": question, "stream": true, "separate_reasoning": false],
      words: Array(callingAnswer.prefix(8))),
    Case(
      name: "chat-error", path: "/v1/chat/completions", body: ["messages": question, "stream": true], failure: broken),
    Case(
      name: "chat-refused", path: "/v1/chat/completions", body: ["messages": question, "stream": true], capacity: 0),
    Case(
      name: "completions", path: "/v1/completions",
      body: [
        "prompt": ["ab", "c"], "stream": true, "echo": true, "stop": "!", "stream_options": ["include_usage": true],
      ], endOfAnswer: "\"matched_stop\"", answerCount: 2),
    Case(
      name: "completions-usage", path: "/v1/completions",
      body: [
        "prompt": "ab", "stream": true, "max_tokens": 2, "logprobs": 1,
        "stream_options": ["include_usage": true, "continuous_usage_stats": true],
      ]),
    Case(name: "completions-error", path: "/v1/completions", body: ["prompt": "ab", "stream": true], failure: broken),
    Case(
      name: "chat-tools", path: "/v1/chat/completions",
      body: ["messages": question, "stream": true, "tools": tools], words: callingAnswer),
    Case(
      name: "responses", path: "/v1/responses", body: ["input": "Hi", "stream": true, "tools": flatTools],
      words: callingAnswer),
    Case(
      name: "responses-background", path: "/v1/responses",
      body: ["input": "Hi", "stream": true, "background": true, "max_output_tokens": 2]),
    Case(
      name: "responses-error", path: "/v1/responses", body: ["input": "Hi", "stream": true], failure: broken),
    Case(name: "messages", path: "/v1/messages", body: ["messages": question, "stream": true, "max_tokens": 3]),
    Case(
      name: "messages-tools", path: "/v1/messages",
      body: [
        "messages": question, "stream": true, "max_tokens": 100,
        "tools": [["name": "get_weather", "input_schema": schema], ["name": "ping", "input_schema": [:]]],
      ], words: callingAnswer),
    Case(
      name: "messages-error", path: "/v1/messages", body: ["messages": question, "stream": true, "max_tokens": 9],
      failure: broken),
    Case(
      name: "messages-refused", path: "/v1/messages", body: ["messages": question, "stream": true, "max_tokens": 9],
      capacity: 0),
    Case(name: "messages-invalid", path: "/v1/messages", body: ["messages": question, "stream": true]),
    Case(
      name: "ollama-chat", path: "/api/chat",
      body: ["model": "fake/model", "messages": question, "tools": tools], words: callingAnswer),
    Case(name: "ollama-generate", path: "/api/generate", body: ["model": "fake/model", "prompt": "Hi"]),
    Case(
      name: "ollama-chat-error", path: "/api/chat", body: ["model": "fake/model", "messages": question],
      failure: broken),
    Case(
      name: "ollama-generate-error", path: "/api/generate", body: ["model": "fake/model", "prompt": "Hi"],
      failure: broken),
    Case(name: "ollama-invalid", path: "/api/chat", body: ["model": "other", "messages": question]),
    Case(
      name: "generate", path: "/generate",
      body: ["text": "ab", "stream": true, "sampling_params": ["max_new_tokens": 3], "return_logprob": true]),
    Case(
      name: "generate-incremental", path: "/generate",
      body: ["text": "ab", "stream": true, "sampling_params": ["max_new_tokens": 3], "return_logprob": true],
      isIncremental: true),
    Case(
      name: "generate-batch", path: "/generate",
      body: [
        "text": ["ab", "c"], "rid": ["first", "second"], "stream": true, "sampling_params": ["max_new_tokens": 2],
      ], endOfAnswer: "\"finish_reason\":{", answerCount: 2),
    Case(
      name: "generate-batch-incremental", path: "/generate",
      body: [
        "text": ["ab", "c"], "rid": ["first", "second"], "stream": true, "sampling_params": ["max_new_tokens": 2],
      ], isIncremental: true, endOfAnswer: "\"finish_reason\":{", answerCount: 2),
    Case(name: "generate-error", path: "/generate", body: ["text": "ab", "stream": true], failure: broken),
  ]

  private static let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent().appendingPathComponent(
    "Goldens")

  /// A transcript with names, moments and durations replaced.
  private static func stable(_ text: String) -> String {
    var text = text
    text = text.replacing(/(resp|msg|rs|fc|call|toolu|chatcmpl|cmpl)([-_])[0-9a-f]{24,32}/) { match in
      "\(match.output.1)\(match.output.2)ID"
    }
    text = text.replacing(/"(id|rid)":"[0-9a-f]{32}"/) { match in "\"\(match.output.1)\":\"ID\"" }
    text = text.replacing(/fp_[0-9a-f]{16}/, with: "fp_HASH")
    text = text.replacing(/"(created|created_at|completed_at)":[0-9]+/) { match in "\"\(match.output.1)\":0" }
    text = text.replacing(/"created_at":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"/, with: "\"created_at\":\"NOW\"")
    text = text.replacing(/_duration":[1-9]\d*/, with: "_duration\":NS")
    return text.replacing(/"e2e_latency":[0-9.e-]+/, with: "\"e2e_latency\":S")
  }

  /// The status, the headers that matter and the body of an answer.
  private struct Reply {
    var status: Int
    var headers: [(String, String)]
    var body: String
  }

  private static let headers = ["Content-Type", "Cache-Control", "x-accel-buffering", "Retry-After"]

  /// The reply as the routes give it.
  private static func reply(
    _ one: Case, _ service: FakeService, _ configuration: ServerConfiguration
  ) async throws -> Reply {
    let answer = try await withStore(service, nil, configuration) { client, _ in
      try await client.post(one.path, one.body)
    }
    let headers = Self.headers.compactMap { name in answer.headers[HTTPField.Name(name)!].map { (name, $0) } }
    return Reply(status: answer.status, headers: headers, body: answer.text)
  }

  /// The reply as it comes over a connection, over which each answer's end is seen before the next one begins.
  private static func orderedReply(
    _ one: Case, end: String, _ service: FakeService, _ configuration: ServerConfiguration
  ) async throws -> Reply {
    try await withServer(service, configuration) { port, _ in
      let client = try await RawClient(port: port)
      try await client.post(one.path, one.body)
      var text = ""
      for _ in 1..<one.answerCount {
        text += try await client.read(until: end)
        service.releaseNext()
      }
      text += try await client.read(until: "\r\n0\r\n\r\n")
      let head = try #require(text.range(of: "\r\n\r\n"))
      let lines = text[..<head.lowerBound].components(separatedBy: "\r\n")
      let status = try #require(lines[0].split(separator: " ").dropFirst().first.flatMap { Int($0) })
      let headers = Self.headers.compactMap { name in
        lines.first { $0.lowercased().hasPrefix(name.lowercased() + ":") }.map {
          (name, $0.dropFirst(name.count + 1).trimmingCharacters(in: .whitespaces))
        }
      }
      // The body comes in chunks, each with its length in bytes before it.
      var rest = Array(text[head.upperBound...].utf8)[...]
      var body: [UInt8] = []
      while true {
        let size = rest.prefix { $0 != 0x0D }
        let count = try #require(Int(String(decoding: size, as: UTF8.self), radix: 16))
        if count == 0 { break }
        rest = rest.dropFirst(size.count + 2)
        body += rest.prefix(count)
        rest = rest.dropFirst(count + 2)
      }
      return Reply(status: status, headers: headers, body: String(decoding: body, as: UTF8.self))
    }
  }

  @Test(arguments: cases) func transcript(_ one: Case) async throws {
    let service = FakeService(
      .init(
        capacity: one.capacity, failure: one.failure, words: one.words, isOneByOne: one.endOfAnswer != nil),
      chatTemplate: qwenTemplate)
    let configuration = testConfiguration { $0.incrementalStreaming = one.isIncremental }
    let reply =
      if let end = one.endOfAnswer {
        try await Self.orderedReply(one, end: end, service, configuration)
      } else {
        try await Self.reply(one, service, configuration)
      }
    var text = "\(reply.status)\n"
    for (name, value) in reply.headers { text += "\(name): \(value)\n" }
    text += "\n" + Self.stable(reply.body)
    let file = Self.folder.appendingPathComponent(one.name + ".txt")
    if ProcessInfo.processInfo.environment["APUS_WRITE_TRANSCRIPTS"] == "1" {
      try Data(text.utf8).write(to: file)
      return
    }
    let golden = String(decoding: try Data(contentsOf: file), as: UTF8.self)
    if text != golden {
      let (found, wanted) = (text.components(separatedBy: "\n"), golden.components(separatedBy: "\n"))
      let line = zip(found, wanted).enumerated().first { $1.0 != $1.1 }?.offset ?? min(found.count, wanted.count)
      Issue.record(
        """
        \(one.name) differs from line \(line + 1) on:
        found  \(found.dropFirst(line).first ?? "its end")
        wanted \(wanted.dropFirst(line).first ?? "its end")
        """)
    }
    #expect(Array(text.utf8) == Array(golden.utf8))
  }
}
