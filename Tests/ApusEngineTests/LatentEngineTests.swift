import Apus
import ApusCore
import ApusEngine
import Foundation
import Testing

private let directory = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
  .appendingPathComponent("../../Models/apus-demo-moe").standardizedFileURL.path

/// An MLA model with experts behind the whole engine: what is cached, chunked, retracted or shared changes no token, no
/// log-probability and so no answer.
@Suite struct LatentEngineTests {
  /// Questions about one text, with a word of the answer: the text is what they share.
  private static let questions = [
    ("What does Victor work as?", "baker"), ("In which town does Jonas live?", "Ashford"),
    ("What colour is the donkey?", "blue"), ("How old is Selma?", "34"), ("What does Jonas like to eat?", "rice"),
    ("Where does Selma live?", "Millbrook"),
  ]

  private func generate(
    _ change: (inout EngineConfiguration) -> Void = { _ in }
  ) async throws -> [GenerationResult] {
    var configuration = EngineConfiguration(modelPath: directory)
    configuration.maxTotalTokens = 2048
    change(&configuration)
    let story =
      "Story: Victor is a baker. Victor owns a blue donkey. Its name is Ursula. Jonas lives in Ashford. Jonas loves rice. "
      + "Selma is 34 years old. On Wednesday Jonas went to the kitchen. Selma lives in Millbrook. It is a windy day."
    return try await withEngine(configuration) { engine in
      func request(_ index: Int) throws -> Request {
        // The most likely answer, and one that is drawn.
        var sampling = index % 2 == 0 ? SamplingParameters.greedy : SamplingParameters()
        sampling.maxNewTokens = 40
        sampling.seed = UInt64(index)
        let question = JSONValue.string("\(story)\nQuestion: \(Self.questions[index / 2].0)")
        let text = try engine.renderChat(
          ChatPrompt(messages: [["role": "user", "content": question]], variables: ["enable_thinking": false]))
        return Request(
          prompt: .tokens(try engine.encode(text, addSpecialTokens: false)), sampling: sampling,
          logprobs: LogprobOptions(topCount: 2))
      }
      // The first one alone, so that the others find its pages.
      var results = [try await engine.generate(request(0)).result()]
      let streams = try (1..<2 * Self.questions.count).map { try engine.generate(request($0)) }
      for stream in streams { results.append(try await stream.result()) }
      return results
    }
  }

  @Test func cachesChunksAndRetractionsChangeNoToken() async throws {
    let plain = try await generate {
      $0.enablesPrefixCache = false
      $0.enablesOverlap = false
      $0.maxRunningRequests = 1
    }
    #expect(plain.allSatisfy { $0.usage.cachedTokens == 0 })
    // The most likely answers: most are right, and they end by themselves.
    let greedy = zip(Self.questions, plain.enumerated().filter { $0.offset % 2 == 0 }.map(\.element))
    let right = greedy.filter { $0.1.text.contains($0.0.1) }.count
    #expect(right >= 4, "\(greedy.map(\.1.text))")
    #expect(greedy.filter { if case .stop = $0.1.finishReason { true } else { false } }.count >= 5)
    let cached = try await generate()
    #expect(cached.dropFirst().allSatisfy { $0.usage.cachedTokens >= 48 }, "\(cached.map(\.usage.cachedTokens))")
    let chunked = try await generate { $0.tokenBudget = 16 }
    // Too few pages for all of them at once.
    let tight = try await generate {
      $0.maxTotalTokens = 256
      $0.scheduleConservativeness = 0.1
    }
    for (name, results) in [("cached", cached), ("chunked", chunked), ("tight", tight)] {
      for (index, result) in results.enumerated() {
        #expect(result.tokens == plain[index].tokens, "\(name), request \(index)")
        #expect(result.logprobs == plain[index].logprobs, "\(name), request \(index)")
      }
    }
  }
}
