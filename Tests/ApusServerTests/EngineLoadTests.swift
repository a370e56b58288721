import ApusCore
import ApusEngine
import ApusServer
import AsyncHTTPClient
import Foundation
import NIOCore
import NIOHTTP1
import Synchronization
import Testing

/// The demo model behind a real server: hundreds of streams, of which a third break off and some are slow. The others get the
/// right answer, which ends by itself.
@Suite(.serialized) struct EngineLoadTests {
  private final class Flag: Sendable { let isSet = Atomic(false) }

  private enum Outcome: Sendable, Equatable { case complete, brokenOff }

  @Test func everythingComesBackAfterALoad() async throws {
    var configuration = EngineConfiguration(modelPath: demoModel)
    configuration.maxRunningRequests = 128
    configuration.maxTotalTokens = 24_000
    let engine = try await Engine.start(configuration)
    let (ports, continuation) = AsyncStream<Int>.makeStream()
    let server = try Server(service: engine, configuration: testConfiguration(), logger: quietLogger) { port in
      continuation.yield(port)
    }
    let running = Task { try await server.run() }
    let port = try #require(await ports.first { _ in true })

    // The first round brings pools and caches to their steady size.
    try await round(port: port, streams: 128, seed: 1)
    let descriptors = try openDescriptors()
    let resident = engine.statistics().residentBytes
    try await round(port: port, streams: 384, seed: 2)

    #expect(await engine.flushCache(timeout: 60), "A request still holds pages.")
    let statistics = engine.statistics()
    #expect(statistics.runningRequests == 0)
    #expect(statistics.waitingRequests == 0)
    #expect(statistics.abortedRequests > 0, "Nobody broke off, so the test shows nothing.")
    var left = try openDescriptors()
    for _ in 0..<500 where left > descriptors {
      try await Task.sleep(for: .milliseconds(10))
      left = try openDescriptors()
    }
    #expect(left <= descriptors)
    // 384 streams with their sockets, buffers and tasks: what stays must be far less than a megabyte each.
    #expect(engine.statistics().residentBytes - resident < 128 << 20)

    await server.shutdown()
    try await running.value
    await engine.shutdown()
  }

  private func openDescriptors() throws -> Int {
    try FileManager.default.contentsOfDirectory(atPath: "/proc/self/fd").count
  }

  /// Runs streams at once while the health endpoint is asked again and again.
  private func round(port: Int, streams: Int, seed: Int) async throws {
    var settings = HTTPClient.Configuration()
    settings.connectionPool.concurrentHTTP1ConnectionsPerHostSoftLimit = streams + 1
    settings.timeout.connect = .seconds(60)
    let client = HTTPClient(eventLoopGroupProvider: .singleton, configuration: settings)
    let base = "http://127.0.0.1:\(port)"
    let done = Flag()
    do {
      try await withThrowingTaskGroup(of: Outcome?.self) { group in
        group.addTask {
          while !done.isSet.load(ordering: .relaxed) {
            let response = try await client.execute(HTTPClientRequest(url: base + "/health"), timeout: .seconds(60))
            #expect(response.status == .ok)
            try await Task.sleep(for: .milliseconds(20))
          }
          return nil
        }
        for index in 0..<streams {
          group.addTask { try await stream(client, base, index: index, seed: seed) }
        }
        var outcomes: [Outcome] = []
        while outcomes.count < streams, let outcome = try await group.next() {
          if let outcome { outcomes.append(outcome) }
        }
        done.isSet.store(true, ordering: .relaxed)
        try await group.waitForAll()
        #expect(outcomes.count { $0 == .brokenOff } == (streams + 2) / 3)
      }
    } catch {
      try await client.shutdown()
      throw error
    }
    try await client.shutdown()
  }

  /// Questions, and a word of their answers: a short answer, a list, and a sum after its worked steps.
  private static let questions = [
    ("Story: Victor is a baker. Victor owns a blue donkey.\nQuestion: What colour is the donkey?", "blue"),
    ("Repeat after me: Mimer, frog, singer, purple, Yara, letter, red, bottle", "letter, red, bottle"),
    ("What is 89 + 35?", "89 + 35 = 124"),
  ]

  /// One streamed answer: every third client goes away after a few events, every eighth reads slowly.
  private func stream(_ client: HTTPClient, _ base: String, index: Int, seed: Int) async throws -> Outcome {
    var request = HTTPClientRequest(url: base + "/v1/completions")
    request.method = .POST
    let (question, word) = Self.questions[index / 3 % 3]
    let body: JSONValue = [
      "prompt": .string("<|im_start|>user\n\(question)<|im_end|>\n<|im_start|>assistant\n"), "max_tokens": 100,
      "temperature": 0, "seed": .int(Int64(seed * 1000 + index)), "stream": true,
    ]
    request.body = .bytes(ByteBuffer(string: body.compactText))
    let response = try await client.execute(request, timeout: .seconds(240))
    #expect(response.status == .ok)
    var received = ""
    var chunks = 0
    for try await var chunk in response.body {
      received += chunk.readString(length: chunk.readableBytes) ?? ""
      chunks += 1
      // Leaving the loop drops the body, which closes the connection.
      if index % 3 == 0, chunks > index % 4 { return .brokenOff }
      if index % 8 == 1 { try await Task.sleep(for: .milliseconds(10)) }
    }
    if index % 3 == 0 { return .brokenOff }
    #expect(received.hasSuffix("data: [DONE]\n\n"), "A stream ended early: \(received.suffix(200))")
    var text = ""
    for event in received.components(separatedBy: "\n\n") where event.hasPrefix("data: {") {
      text += try JSONValue.parse(String(event.dropFirst(6)))["choices"]?[0]?["text"]?.stringValue ?? ""
    }
    #expect(text.hasSuffix(word) || text.hasSuffix("\(word)."), "\(question) \(text)")
    return .complete
  }
}
