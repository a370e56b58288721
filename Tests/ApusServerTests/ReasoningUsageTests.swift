import ApusCore
import ApusServer
import Testing

/// `usage.completion_tokens_details.reasoning_tokens` of chat completions. The fake tokenizer has a token for each byte.
@Suite struct ReasoningUsageTests {
  private let chat: JSONValue = ["messages": [["role": "user", "content": "Hi"]]]
  private let words = ["<think>", "Hm", ".", "</think>", "\n\nOh", " yes", " so", " it", " is"]

  private func details(_ members: JSONValue, _ fake: FakeService) async throws -> JSONValue? {
    let answer = try await withRoutes(fake) { try await $0.post("/v1/chat/completions", with(chat, members)) }
    #expect(answer.status == 200, "\(answer.text)")
    return answer.json["usage"]?["completion_tokens_details"]
  }

  @Test func thoughtsAreCounted() async throws {
    #expect(try await details([:], callingService(words)) == ["reasoning_tokens": 3])
    // None where there is none, and nothing is said where thoughts are not told apart.
    #expect(try await details([:], callingService(["Oh", " yes"])) == ["reasoning_tokens": 0])
    #expect(try await details(["separate_reasoning": false], callingService(words)) == nil)
    #expect(try await details([:], FakeService()) == nil)
    // A chain of thought that breaks off counts as far as it came, and never as more than was generated.
    let cut = try await details(["max_tokens": 2], callingService(words))
    #expect(cut == ["reasoning_tokens": 2])
    let long = try await details(["max_tokens": 2], callingService(["<think>", "a long thought in one token"]))
    #expect(long == ["reasoning_tokens": 2])
    // Each sample's thoughts are counted.
    #expect(try await details(["n": 2], callingService(words)) == ["reasoning_tokens": 6])
  }

  @Test func streamsSayTheSameAtTheirEnd() async throws {
    func usages(_ options: JSONValue) async throws -> [JSONValue] {
      let answer = try await withRoutes(callingService(words)) { client in
        try await client.post(
          "/v1/chat/completions", with(chat, ["stream": true, "n": 2, "stream_options": options]))
      }
      return answer.events.dropLast().compactMap { try? JSONValue.parse($0)["usage"]?.nonNull }
    }
    let last = try await usages(["include_usage": true])
    #expect(last.count == 1)
    #expect(last[0]["completion_tokens_details"] == ["reasoning_tokens": 6])
    // On every chunk, a choice's thoughts count when it has ended.
    let continuous = try await usages(["include_usage": true, "continuous_usage_stats": true])
    let counts = continuous.compactMap { $0["completion_tokens_details"]?["reasoning_tokens"]?.intValue }
    #expect(counts.last == 6 && Set(counts).isSubset(of: [3, 6]) && counts == counts.sorted())
    #expect(continuous.first?["completion_tokens_details"] == nil)
  }
}
