import ApusCore
import Synchronization

/// Answers each request with tokens that are a function of its prompt, at once, and counts what it is asked.
final class FakeGenerationService: GenerationService {
  struct Counts {
    var inFlight = 0
    var peak = 0
    var prompts: [[TokenID]] = []
  }

  let model = ModelInformation(
    name: "fake", path: "fake", architecture: "Fake", parameterCount: 1, contextLength: 64, vocabularySize: 100,
    dtype: "float32", kvDtype: "float32", eosTokenIDs: [2], bosTokenID: 1, samplingDefaults: SamplingDefaults(),
    hasChatTemplate: true, created: 0)
  let counts = Mutex(Counts())

  func generate(_ request: Request) throws(EngineError) -> GenerationStream {
    try request.sampling.validate(vocabularySize: 100)
    let prompt: [TokenID]
    switch request.prompt {
    case .text(let text): prompt = try encode(text, addSpecialTokens: true)
    case .tokens(let tokens): prompt = tokens
    }
    if prompt.count > 64 { throw EngineError(.promptTooLong, "The prompt has \(prompt.count) tokens, 64 fit.") }
    counts.withLock {
      $0.prompts.append(prompt)
      $0.inFlight += 1
      $0.peak = max($0.peak, $0.inFlight)
    }
    return GenerationStream(
      id: request.id, source: Source(service: self, prompt: prompt, count: request.sampling.maxNewTokens ?? 8))
  }

  private final class Source: GenerationSource {
    let service: FakeGenerationService
    let prompt: [TokenID]
    let count: Int
    let produced = Mutex(0)

    init(service: FakeGenerationService, prompt: [TokenID], count: Int) {
      self.service = service
      self.prompt = prompt
      self.count = count
    }

    func next() async throws(EngineError) -> GenerationChunk? {
      await Task.yield()
      // A prompt that holds token 13 is unlucky.
      if prompt.contains(13) { throw end(EngineError(.internalFailure, "Unlucky.")) }
      let index = produced.withLock { value in
        value += 1
        return value
      }
      let token = (prompt.reduce(0, &+) &+ TokenID(index)) % 100
      let usage = Usage(promptTokens: prompt.count, completionTokens: index)
      guard index >= count else { return GenerationChunk(text: "\(token) ", tokens: [token], usage: usage) }
      return end(GenerationChunk(text: "\(token)", tokens: [token], finishReason: .length, usage: usage))
    }

    private func end<Value>(_ value: Value) -> Value {
      service.counts.withLock { $0.inFlight -= 1 }
      return value
    }

    func cancel() {}
  }

  func abort(_ id: RequestID) -> Bool { false }
  func abortAll() {}

  /// A letter is a token: its number in the alphabet.
  func encode(_ text: String, addSpecialTokens: Bool) throws(EngineError) -> [TokenID] {
    (addSpecialTokens ? [1] : []) + text.utf8.map { TokenID($0 % 100) }
  }

  func decode(_ tokens: [TokenID], skipSpecialTokens: Bool) throws(EngineError) -> String {
    tokens.map { "\($0)" }.joined(separator: " ")
  }

  func tokenBytes(_ token: TokenID) -> [UInt8] { Array("\(token)".utf8) }

  func renderChat(_ prompt: ChatPrompt) throws(EngineError) -> String {
    guard let text = prompt.messages[0]?["content"]?.stringValue else {
      throw EngineError(.invalidRequest, "The template wants a text.")
    }
    return text
  }

  func statistics() -> ServiceStatistics { ServiceStatistics() }
  func flushCache(timeout: Double) async -> Bool { true }
  func drain() async {}
}
