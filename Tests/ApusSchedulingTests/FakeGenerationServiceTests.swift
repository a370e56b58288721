import ApusCore
import ApusTesting
import Testing

@Suite struct FakeGenerationServiceTests {
  private func service(_ reply: String? = nil) -> FakeGenerationService {
    var configuration = FakeGenerationService.Configuration()
    if let reply { configuration.reply = { _, _ in reply } }
    return FakeGenerationService(configuration)
  }

  private func request(_ change: (inout SamplingParameters) -> Void = { _ in }) -> Request {
    var sampling = SamplingParameters()
    change(&sampling)
    return Request(prompt: .text("Hello"), sampling: sampling)
  }

  @Test func equalRequestsGiveEqualTextAndSeedsDifferentText() async throws {
    let service = service()
    let first = try await service.generate(request { $0.seed = 1 }).result()
    let second = try await service.generate(request { $0.seed = 1 }).result()
    let third = try await service.generate(request { $0.seed = 2 }).result()
    #expect(first == second)
    #expect(first.text != third.text)
    #expect(first.usage.promptTokens == 6)
    #expect(service.inFlightCount == 0)
  }

  @Test func lengthAndEndAreHonoured() async throws {
    let short = try await service("abcdef").generate(request { $0.maxNewTokens = 3 }).result()
    #expect(short.text == "abc")
    #expect(short.finishReason == .length)
    let whole = try await service("abcdef").generate(request()).result()
    #expect(whole.text == "abcdef")
    #expect(whole.finishReason == .stop(.token(FakeGenerationService.endToken)))
    let long = try await service("ab").generate(
      request {
        $0.ignoreEOS = true
        $0.maxNewTokens = 5
      }
    ).result()
    #expect(long.text == "ab...")
    let none = try await service("ab").generate(request { $0.maxNewTokens = 0 }).result()
    #expect(none.text == "" && none.finishReason == .length)
  }

  @Test func stopStringsNeverShow() async throws {
    let trimmed = try await service("one END two").generate(request { $0.stop = ["END"] }).result()
    #expect(trimmed.text == "one ")
    #expect(trimmed.finishReason == .stop(.text("END")))
    let kept = try await service("one END two").generate(
      request {
        $0.stop = ["END"]
        $0.noStopTrim = true
      }
    ).result()
    #expect(kept.text == "one END")
    let missed = try await service("one EN").generate(request { $0.stop = ["END"] }).result()
    #expect(missed.text == "one EN")
  }

  @Test func chunksHoldWholeCharacters() async throws {
    var text = ""
    for try await chunk in try service("naïve 🐦!").generate(request()) {
      #expect(!chunk.text.contains("\u{FFFD}"))
      text += chunk.text
    }
    #expect(text == "naïve 🐦!")
  }

  @Test func logprobsComeWithTheirTokens() async throws {
    var request = request { $0.maxNewTokens = 4 }
    request.logprobs = LogprobOptions(topCount: 2, promptStart: 0, tokenIDs: [65])
    let result = try await service("abcdef").generate(request).result()
    #expect(result.logprobs.map(\.chosen.token) == [97, 98, 99, 100])
    #expect(result.logprobs.allSatisfy { $0.top.count == 2 && $0.requested.map(\.token) == [65] })
    #expect(result.promptLogprobs?.count == 6)
    #expect(result.promptLogprobs?.first?.chosen.logprob == nil)
  }

  @Test func anAbortDoesNotWaitForTheHook() async throws {
    var configuration = FakeGenerationService.Configuration()
    let (reached, signal) = AsyncStream<Int>.makeStream()
    let (hold, release) = AsyncStream<Int>.makeStream()
    defer { release.finish() }
    configuration.reply = { _, _ in "abcdef" }
    configuration.beforeChunk = { _, count in
      signal.yield(count)
      // Held, as by a stuck engine, until the test is over.
      if count == 2 { for await _ in hold {} }
    }
    let service = FakeGenerationService(configuration)
    let request = request()
    let stream = try service.generate(request)
    let reader = Task { try await stream.result() }
    for await count in reached where count == 2 {
      service.abort(request.id)
      break
    }
    let result = try await reader.value
    guard case .abort? = Optional(result.finishReason) else {
      Issue.record("ended by \(result.finishReason)")
      return
    }
    #expect(result.text.count <= 3)
    #expect(service.inFlightCount == 0)
  }

  @Test func droppingTheIteratorAborts() async throws {
    let service = service("abcdef")
    do {
      let iterator = try service.generate(request()).makeAsyncIterator()
      _ = try await iterator.next(isolation: nil)
      #expect(service.inFlightCount == 1)
    }
    #expect(service.inFlightCount == 0)
    #expect(service.statistics().abortedRequests == 1)
  }

  @Test func refusals() async throws {
    let service = service()
    service.rejection = EngineError(.queueFull, "full")
    #expect(throws: EngineError(.queueFull, "full")) { try service.generate(request()) }
    service.rejection = nil
    await service.drain()
    #expect(throws: EngineError.self) { try service.generate(request()) }
    service.resume()
    _ = try await service.generate(request()).result()
    #expect(throws: EngineError.self) {
      try service.generate(Request(prompt: .tokens(Array(repeating: 1, count: 5000))))
    }
    #expect(service.requests.count == 1)
  }

  @Test func drainWaitsForThoseInFlight() async throws {
    let service = service("abc")
    let iterator = try service.generate(request()).makeAsyncIterator()
    let drained = Task { await service.drain() }
    while !service.statistics().isDraining { await Task.yield() }
    while try await iterator.next(isolation: nil) != nil {}
    await drained.value
    #expect(service.inFlightCount == 0)
  }
}
