import ApusCore
import ApusServer
import AsyncHTTPClient
import Foundation
import HTTPTypes
import NIOCore
import NIOHTTP1
import NIOSSL
import Testing

/// What only a real socket shows.
@Suite struct LiveServerTests {
  @Test func keepsConnectionsOpen() async throws {
    try await withServer { port, server in
      #expect(server.port == port)
      let client = try await RawClient(port: port)
      for _ in 0..<3 {
        try await client.post("/v1/completions", ["prompt": "a", "max_tokens": 1])
        let answer = try await client.read(until: "\"cached_tokens\":3}}}")
        #expect(answer.hasPrefix("HTTP/1.1 200 OK\r\n"))
        #expect(answer.contains("Server: apus") || answer.contains("server: apus"))
      }
      // A streamed response ends without ending the connection.
      for _ in 0..<2 {
        try await client.post("/v1/completions", ["prompt": "a", "max_tokens": 2, "stream": true])
        let answer = try await client.read(until: "data: [DONE]\n\n\r\n0\r\n\r\n")
        #expect(answer.lowercased().contains("transfer-encoding: chunked"))
      }
    }
  }

  @Test(arguments: [true, false], [true, false])
  func aClientThatGoesAbortsItsRequest(stream: Bool, reset: Bool) async throws {
    let service = FakeService(.init(holdAfter: 2))
    try await withServer(service) { port, _ in
      let client = try await RawClient(port: port)
      try await client.post(
        "/v1/chat/completions",
        ["messages": [["role": "user", "content": "Hi"]], "stream": .bool(stream), "rid": "gone", "n": 2])
      if stream { try await client.read(until: "Hello") }
      while service.tokensRead < 4 { await Task.yield() }
      if reset { client.reset() } else { client.close() }
      await service.waitForAborts(2)
      #expect(Set(service.aborted) == ["gone-0", "gone-1"])
      #expect(service.inFlight == 0)
    }
  }

  @Test func aClientThatGoesWhileItsRequestIsReadChangesNothing() async throws {
    let service = FakeService()
    try await withServer(service) { port, _ in
      let client = try await RawClient(port: port)
      try await client.send("POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{\"text\":")
      client.close()
      let next = try await RawClient(port: port)
      try await next.post("/generate", ["text": "a"], headers: "Connection: close\r\n")
      let answer = try await next.read(until: nil)
      #expect(answer.hasPrefix("HTTP/1.1 200"))
      #expect(service.requests.count == 1)
    }
  }

  @Test func aSlowReaderHoldsBackOnlyItself() async throws {
    // Each token is 64 KiB of text and the answer has no end, so a server that read ahead would read for ever.
    let service = FakeService(.init(repeats: 1 << 14, isEndless: true), contextLength: 1 << 30)
    try await withServer(service) { port, _ in
      let slow = try await RawClient(port: port, receiveBuffer: 4096)
      try await slow.post("/v1/completions", ["prompt": "a", "max_tokens": 100_000_000, "stream": true, "rid": "slow"])
      // The pipe is full when a while passes in which nothing is read, however often others are served.
      var before = -1
      while service.tokensRead != before || before == 0 {
        before = service.tokensRead
        for _ in 0..<20 {
          let other = try await RawClient(port: port)
          try await other.send("GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
          let answer = try await other.read(until: nil)
          #expect(answer.hasPrefix("HTTP/1.1 200"))
        }
      }
      // Kernel buffers on both sides hold a few MiB at most.
      #expect(service.tokensRead < 1000)
      try await slow.read(until: "Hello")
      slow.close()
      await service.waitForAborts(1)
      #expect(service.aborted == ["slow"])
    }
  }

  @Test func aReaderThatStallsForGoodIsDropped() async throws {
    let service = FakeService(.init(repeats: 1 << 14, isEndless: true), contextLength: 1 << 30)
    try await withServer(service, testConfiguration { $0.stalledWriteTimeout = 0.05 }) { port, _ in
      let slow = try await RawClient(port: port, receiveBuffer: 4096)
      try await slow.post(
        "/generate", ["text": "a", "stream": true, "sampling_params": ["max_new_tokens": 10_000_000]])
      await service.waitForAborts(1)
      #expect(service.inFlight == 0)
    }
  }

  @Test func aDrainingServerFinishesItsRequestsAndRefusesOthers() async throws {
    let service = FakeService(.init(holdAfter: 1))
    try await withServer(service) { port, server in
      let running = try await RawClient(port: port)
      try await running.post("/v1/completions", ["prompt": "a", "stream": true])
      try await running.read(until: "Hello")
      let open = try await RawClient(port: port)
      async let shutdown: Void = server.shutdown()
      // The refusal is immediate, but another task begins the shutdown.
      while !service.statistics().isDraining { await Task.yield() }
      let refused = try await RawClient(port: port)
      for client in [open, refused] {
        try await client.post("/v1/completions", ["prompt": "b"])
        let answer = try await client.read(until: "\"code\":\"shutting_down\"}}")
        #expect(answer.hasPrefix("HTTP/1.1 503"))
        try await client.send("GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        let health = try await client.read(until: "shutting down.\n")
        #expect(health.hasPrefix("HTTP/1.1 503"))
      }
      service.release()
      let rest = try await running.read(until: "[DONE]")
      #expect(rest.contains("\"finish_reason\":\"stop\""))
      await shutdown
      // Idle connections are closed, so that the server can end.
      let end = try await open.read(until: nil)
      #expect(end.isEmpty)
    }
    #expect(service.requests.count == 1)
    #expect(service.aborted.isEmpty)
  }

  @Test func aDrainThatTakesTooLongAborts() async throws {
    let service = FakeService(.init(holdAfter: 1))
    try await withServer(service, testConfiguration { $0.drainTimeout = 0.05 }) { port, server in
      let client = try await RawClient(port: port)
      try await client.post("/generate", ["text": "a", "rid": "stuck"])
      while service.inFlight == 0 { await Task.yield() }
      await server.shutdown()
      let answer = try await client.read(until: nil)
      #expect(answer.contains("\"type\":\"abort\""))
    }
    #expect(service.aborted == ["stuck"])
  }

  @Test func localCallersMayAdministerAServerWithoutKeys() async throws {
    try await withServer { port, _ in
      for (header, status) in [
        ("", 200), ("Origin: http://evil.example\r\n", 403), ("X-Forwarded-For: 10.0.0.1\r\n", 403),
        ("Forwarded: for=10.0.0.1\r\n", 403),
      ] {
        let client = try await RawClient(port: port)
        try await client.send("GET /flush_cache HTTP/1.1\r\nHost: x\r\n\(header)Connection: close\r\n\r\n")
        let answer = try await client.read(until: nil)
        #expect(answer.hasPrefix("HTTP/1.1 \(status)"), "\(header)")
      }
    }
  }

  @Test func aBodyThatIsTooLargeIsRefusedWithoutReadingIt() async throws {
    try await withServer(FakeService(), testConfiguration { $0.maxBodyBytes = 1000 }) { port, _ in
      let declared = try await RawClient(port: port)
      try await declared.send("POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
      let answer = try await declared.read(until: "\"body_too_large\"}}")
      #expect(answer.hasPrefix("HTTP/1.1 413"))
      let chunked = try await RawClient(port: port)
      try await chunked.send("POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
      for _ in 0..<3 { try await chunked.send("200\r\n" + String(repeating: " ", count: 512) + "\r\n") }
      let second = try await chunked.read(until: "\"body_too_large\"}}")
      #expect(second.hasPrefix("HTTP/1.1 413"))
    }
  }

  @Test func anAddressInUseIsAnError() async throws {
    try await withServer { port, _ in
      let second = try Server(
        service: FakeService(), configuration: testConfiguration { $0.port = port }, logger: quietLogger)
      let error = await #expect(throws: EngineError.self) { try await second.run() }
      #expect(error?.message.hasPrefix("Cannot listen on 127.0.0.1, port \(port)") == true)
    }
  }

  @Test func manyStreamsAtOnce() async throws {
    let service = FakeService()
    let streams = 256
    try await withServer(service) { port, server in
      try await withThrowingTaskGroup(of: Int.self) { group in
        for index in 0..<streams {
          group.addTask {
            let client = try await RawClient(port: port)
            try await client.post(
              "/v1/chat/completions", ["messages": [["role": "user", "content": "Hi"]], "stream": true])
            if index % 3 == 0 {
              // A third goes away, before or within its answer.
              if index % 2 == 0 { try await client.read(until: "Hello") }
              client.close()
              return 0
            }
            let text = try await client.read(until: "data: [DONE]")
            return text.components(separatedBy: "\"content\":\"").count - 1
          }
        }
        for try await pieces in group where pieces != 0 { #expect(pieces == FakeService.words.count + 1) }
      }
      while service.inFlight > 0 { await Task.yield() }
      let client = try await RawClient(port: port)
      try await client.send("GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
      let text = try await client.read(until: nil)
      #expect(text.contains("apus:http_requests_active 1\n"))
    }
  }

  private static let openssl: String? = ["/usr/bin/openssl", "/usr/local/bin/openssl", "/opt/homebrew/bin/openssl"]
    .first { FileManager.default.isExecutableFile(atPath: $0) }

  @Test(.enabled(if: openssl != nil, "openssl is not installed, so there is no certificate to test TLS with."))
  func servesOverTLS() async throws {
    let directory = FileManager.default.temporaryDirectory.appendingPathComponent("apus-tls-\(RequestID.unique())")
    try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: directory) }
    let certificate = directory.appendingPathComponent("certificate.pem").path
    let key = directory.appendingPathComponent("key.pem").path
    let process = Process()
    process.executableURL = URL(fileURLWithPath: Self.openssl!)
    process.arguments = [
      "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
      "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", certificate,
    ]
    process.standardError = FileHandle.nullDevice
    try process.run()
    process.waitUntilExit()
    try #require(process.terminationStatus == 0)
    let configuration = testConfiguration { configuration in
      configuration.certificateFile = certificate
      configuration.privateKeyFile = key
    }
    var tls = TLSConfiguration.makeClientConfiguration()
    tls.trustRoots = .file(certificate)
    let clientConfiguration = HTTPClient.Configuration(tlsConfiguration: tls)
    let service = FakeService(.init(holdAfter: 2))
    try await withServer(service, configuration) { port, _ in
      let client = HTTPClient(configuration: clientConfiguration)
      var request = HTTPClientRequest(url: "https://127.0.0.1:\(port)/v1/completions")
      request.method = .POST
      request.body = .bytes(ByteBuffer(string: #"{"prompt":"a","stream":true,"rid":"tls"}"#))
      let task = Task { [request] in
        let response = try await client.execute(request, timeout: .seconds(30))
        for try await _ in response.body {}
      }
      while service.tokensRead < 2 { await Task.yield() }
      // Cancelling closes the connection, which must abort the request under TLS too.
      task.cancel()
      await service.waitForAborts(1)
      _ = await task.result
      try await client.shutdown()
    }
    #expect(service.aborted == ["tls"])
    let broken = testConfiguration { configuration in
      configuration.certificateFile = key
      configuration.privateKeyFile = key
    }
    await #expect(throws: EngineError.self) {
      try await Server(service: service, configuration: broken, logger: quietLogger).run()
    }
  }

  @Test func sigtermDrainsAndASecondOneEndsAtOnce() async throws {
    await #expect(processExitsWith: .success) {
      let service = FakeService(.init(holdAfter: 1))
      let (ports, continuation) = AsyncStream<Int>.makeStream()
      var configuration = testConfiguration()
      configuration.handlesSignals = true
      let server = try Server(service: service, configuration: configuration, logger: quietLogger) {
        continuation.yield($0)
      }
      let run = Task { try await server.run() }
      let port = await ports.first { _ in true }!
      let client = try await RawClient(port: port)
      try await client.post("/generate", ["text": "a"])
      while service.inFlight == 0 { await Task.yield() }
      kill(getpid(), SIGTERM)
      while !service.statistics().isDraining { await Task.yield() }
      service.release()
      let answer = try await client.read(until: nil)
      guard answer.hasPrefix("HTTP/1.1 200") else { exit(3) }
      try await run.value
      exit(0)
    }
    await #expect(processExitsWith: .exitCode(128 + 15)) {
      let service = FakeService(.init(holdAfter: 1))
      let (ports, continuation) = AsyncStream<Int>.makeStream()
      var configuration = testConfiguration()
      configuration.handlesSignals = true
      let server = try Server(service: service, configuration: configuration, logger: quietLogger) {
        continuation.yield($0)
      }
      let run = Task { try await server.run() }
      let port = await ports.first { _ in true }!
      let client = try await RawClient(port: port)
      try await client.post("/generate", ["text": "a"])
      while service.inFlight == 0 { await Task.yield() }
      kill(getpid(), SIGTERM)
      while !service.statistics().isDraining { await Task.yield() }
      kill(getpid(), SIGTERM)
      try await run.value
      exit(4)
    }
  }
}
