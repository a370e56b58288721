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

  static let cases: [Case] = [
    Case(
      name: "chat", path: "/v1/chat/completions",
      body: [
        "messages": question, "stream": true, "stream_options": ["include_usage": true], "logprobs": true,
        "top_logprobs": 1, "max_tokens": 4,
      ]),
    Case(
      name: "chat-tools", path: "/v1/chat/completions",
      body: ["messages": question, "stream": true, "tools": tools], words: callingAnswer),
    Case(
      name: "responses", path: "/v1/responses", body: ["input": "Hi", "stream": true, "tools": flatTools],
      words: callingAnswer),
    Case(
      name: "responses-background", path: "/v1/responses",
      body: ["input": "Hi", "stream": true, "background": true, "max_output_tokens": 2]),
    Case(name: "messages", path: "/v1/messages", body: ["messages": question, "stream": true, "max_tokens": 3]),
    Case(
      name: "messages-tools", path: "/v1/messages",
      body: [
        "messages": question, "stream": true, "max_tokens": 100,
        "tools": [["name": "get_weather", "input_schema": schema], ["name": "ping", "input_schema": [:]]],
      ], words: callingAnswer),
    Case(
      name: "ollama-chat", path: "/api/chat",
      body: ["model": "fake/model", "messages": question, "tools": tools], words: callingAnswer),
    Case(name: "ollama-generate", path: "/api/generate", body: ["model": "fake/model", "prompt": "Hi"]),
    Case(
      name: "generate", path: "/generate",
      body: ["text": "ab", "stream": true, "sampling_params": ["max_new_tokens": 3], "return_logprob": true]),
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

  @Test(arguments: cases) func transcript(_ one: Case) async throws {
    let service = FakeService(.init(words: one.words), chatTemplate: qwenTemplate)
    let configuration = testConfiguration { $0.incrementalStreaming = one.isIncremental }
    let answer = try await withStore(service, nil, configuration) { client, _ in
      try await client.post(one.path, one.body)
    }
    var text = "\(answer.status)\n"
    for name in [HTTPField.Name.contentType, .cacheControl, HTTPField.Name("x-accel-buffering")!] {
      if let value = answer.headers[name] { text += "\(name): \(value)\n" }
    }
    text += "\n" + Self.stable(answer.text)
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
