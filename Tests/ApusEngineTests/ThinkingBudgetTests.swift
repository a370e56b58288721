import Apus
import ApusCore
import ApusEngine
import ApusTokenization
import Foundation
import Testing

private let model = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
  .appendingPathComponent("../../Models/apus-demo").standardizedFileURL.path

@Suite("Thinking budget", .serialized) struct ThinkingBudgetTests {
  // MARK: The matcher alone

  /// Follows a text and says after how many tokens the end was forced, and what was forced.
  private func follow(
    _ text: String, budget: Int, _ marks: ThinkingMarks = ThinkingMarks(), tokenizer: Tokenizer
  ) throws -> (after: Int?, forced: String, isFree: Bool) {
    let matcher = ThinkingBudgetConstraint(
      nil, budget: budget, marks: marks, tokenizer: tokenizer, vocabularySize: tokenizer.vocabularySize,
      takesForced: true
    ).makeTokenMatcher()
    var count = 0
    for token in try tokenizer.encode(text, addSpecialTokens: false) {
      #expect(matcher.accept(token))
      count += 1
      let forced = matcher.takeForcedTokens()
      if !forced.isEmpty {
        return (count, tokenizer.decode(forced, skipSpecialTokens: false), matcher.allowsEverything)
      }
    }
    return (nil, "", matcher.allowsEverything)
  }

  @Test("Tokens are counted within the thought alone, and its end is written once")
  func counting() throws {
    let tokenizer = try Tokenizer.load(directory: model)
    func count(_ text: String) throws -> Int { try tokenizer.encode(text, addSpecialTokens: false).count }
    var open = ThinkingMarks()
    open.isOpen = true

    // Opened by the prompt.
    let long = "one two three four five six seven eight nine ten eleven twelve"
    var result = try follow(long, budget: 4, open, tokenizer: tokenizer)
    #expect(result.after == 4 && result.forced == "\n</think>" && result.isFree)
    // Opened by the output, after white space; the mark itself does not count.
    let opening = try count("\n <think>")
    result = try follow("\n <think>\(long)", budget: 4, tokenizer: tokenizer)
    #expect(result.after == opening + 4 && result.forced == "\n</think>")
    // A mark later in an answer opens nothing, unless the format says so.
    result = try follow("An answer <think>\(long)", budget: 4, tokenizer: tokenizer)
    #expect(result.after == nil && result.isFree)
    var anywhere = ThinkingMarks()
    anywhere.opensAnywhere = true
    result = try follow("An answer <think>\(long)", budget: 4, anywhere, tokenizer: tokenizer)
    #expect(try result.after == count("An answer <think>") + 4)
    // Closed in time.
    result = try follow("one two</think>\(long)", budget: 8, open, tokenizer: tokenizer)
    #expect(result.after == nil && result.isFree)
    // No line break where one stands.
    result = try follow("one\n\ntwo\n", budget: try count("one\n\ntwo\n"), open, tokenizer: tokenizer)
    #expect(result.forced == "</think>")
    // A tool call ends the thought of some formats.
    open.closes.append("<tool_call>")
    result = try follow("one <tool_call>\(long)", budget: 8, open, tokenizer: tokenizer)
    #expect(result.after == nil)
  }

  @Test("Of a mark that is half there the rest is forced, and a character is not cut")
  func seams() throws {
    let tokenizer = try Tokenizer.load(directory: model)
    // A mark that is no token: fed in pieces as another spelling would have it.
    let marks = ThinkingMarks(opens: [], closes: ["END OF THOUGHT"], isOpen: true)
    let matcher = ThinkingBudgetConstraint(
      nil, budget: 0, marks: marks, tokenizer: tokenizer, vocabularySize: tokenizer.vocabularySize, takesForced: true
    ).makeTokenMatcher()
    #expect(try tokenizer.decode(matcher.takeForcedTokens()) == "END OF THOUGHT")
    for cut in 1..<14 {
      let text = "Hm. " + "END OF THOUGHT".prefix(cut)
      let tokens = try tokenizer.encode(text, addSpecialTokens: false)
      let result = try follow(text, budget: tokens.count, marks, tokenizer: tokenizer)
      #expect(text + result.forced == "Hm. END OF THOUGHT", "cut at \(cut)")
    }
    // Bytes of a character are tokens of their own where the vocabulary lacks it.
    let text = "Hm 𓀀𓀁"
    let tokens = try tokenizer.encode(text, addSpecialTokens: false)
    for budget in 1...tokens.count {
      let result = try follow(text, budget: budget, marks, tokenizer: tokenizer)
      let after = try #require(result.after)
      let bytes = tokens.prefix(after).flatMap { tokenizer.tokenBytes($0) }
      #expect(String(validating: bytes, as: UTF8.self) != nil && after - budget < 4)
    }
  }

  @Test("Masks leave the end alone where forced text is not taken")
  func masks() throws {
    let tokenizer = try Tokenizer.load(directory: model)
    var open = ThinkingMarks()
    open.isOpen = true
    let matcher = ThinkingBudgetConstraint(
      nil, budget: 0, marks: open, tokenizer: tokenizer, vocabularySize: tokenizer.vocabularySize, takesForced: false
    ).makeTokenMatcher()
    #expect(matcher.takeForcedTokens().isEmpty && !matcher.allowsEverything)
    for token in try tokenizer.encode("</think>", addSpecialTokens: false) {
      let mask = [UInt32](unsafeUninitializedCapacity: matcher.maskWordCount) { words, count in
        matcher.fillMask(into: words.baseAddress!)
        count = words.count
      }
      #expect(mask.map(\.nonzeroBitCount).reduce(0, +) == 1 && mask[Int(token >> 5)] >> UInt32(token & 31) & 1 == 1)
      #expect(matcher.accept(token))
    }
    #expect(matcher.allowsEverything)
  }

  // MARK: In the engine

  /// Sums that the demo model works out in steps before it answers.
  private static let sums = [(89, 35), (47, 27), (38, 54)]

  /// A request for a sum. The demo model opens its thought itself, unless the prompt has done so.
  private func request(
    _ sum: (Int, Int), budget: Int?, isOpen: Bool = false, seed: UInt64? = nil, grammar: GrammarSpecification? = nil,
    logprobs: Bool = false
  ) -> Request {
    var sampling = seed == nil ? SamplingParameters.greedy : SamplingParameters()
    sampling.seed = seed
    sampling.maxNewTokens = 120
    sampling.thinkingBudget = budget
    sampling.thinkingMarks.isOpen = isOpen
    sampling.skipSpecialTokens = false
    sampling.grammar = grammar
    let prompt =
      "<|im_start|>user\nWhat is \(sum.0) + \(sum.1)?<|im_end|>\n<|im_start|>assistant\n" + (isOpen ? "<think>\n" : "")
    return Request(prompt: .text(prompt), sampling: sampling, logprobs: logprobs ? LogprobOptions() : nil)
  }

  /// The thought and the answer of a text.
  private func parts(_ text: String) -> (thought: String, answer: String)? {
    let parts = text.components(separatedBy: "</think>")
    guard parts.count == 2 else { return nil }
    let thought = parts[0].hasPrefix("<think>\n") ? String(parts[0].dropFirst(8)) : parts[0]
    return (thought, parts[1].replacing("<|im_end|>", with: "").trimmingCharacters(in: .whitespacesAndNewlines))
  }

  @Test("A whole thought leads to the sum, a cut one is its beginning; tokens are the same in every way of running")
  func budgets() async throws {
    var known: [Int: [TokenID]] = [:]
    for (overlap, jumps, drafts) in [(true, true, 0), (false, true, 0), (true, false, 0), (true, true, 4)] {
      var configuration = EngineConfiguration(modelPath: model)
      configuration.enablesOverlap = overlap
      configuration.enablesJumpForward = jumps
      configuration.speculativeDraftTokens = drafts
      configuration.maxTotalTokens = 4096
      try await withEngine(configuration) { engine in
        // Greedy and drawn, and for each sum the budgets; the whole thoughts come first.
        let budgets: [Int?] = [nil, 3, 6, 12, 1000]
        func asked(_ index: Int, logprobs: Bool = false) -> Request {
          request(
            Self.sums[index % 3], budget: budgets[index / 3 % 5], seed: index < 15 ? nil : UInt64(index),
            logprobs: logprobs)
        }
        let streams = try (0..<20).map { try engine.generate(asked($0, logprobs: $0 == 4)) }
        for (index, stream) in streams.enumerated() {
          let result = try await stream.result()
          if let tokens = known[index] {
            #expect(result.tokens == tokens, "request \(index), overlap \(overlap), jumps \(jumps), drafts \(drafts)")
          } else {
            let alone = try await engine.generate(asked(index)).result()
            #expect(alone.tokens == result.tokens, "request \(index) alone")
          }
          known[index] = result.tokens
          if result.logprobs.count > 0 { #expect(result.logprobs.count == result.tokens.count) }
          if case .stop = result.finishReason {} else { Issue.record("\(result.finishReason): \(result.text)") }
          guard index < 15, let (thought, answer) = parts(result.text) else {
            if index < 15 { Issue.record("no thought: \(result.text)") }
            continue
          }
          let (first, second) = Self.sums[index % 3]
          let whole = try #require(parts(try engine.decode(known[index % 3]!, skipSpecialTokens: false)))
          guard let budget = budgets[index / 3 % 5], budget < 1000 else {
            #expect(answer == "\(first) + \(second) = \(first + second)" && thought == whole.thought, "\(result.text)")
            continue
          }
          // The answer is of the same form, though without the steps it is a guess.
          #expect(answer.hasPrefix("\(first) + \(second) = ") && answer.count <= 15, "\(result.text)")
          let kept = thought.trimmingCharacters(in: .whitespacesAndNewlines)
          #expect(whole.thought.hasPrefix(kept) && kept.count < whole.thought.count, "\(result.text)")
          #expect(try engine.encode(kept, addSpecialTokens: false).count <= budget)
        }
      }
    }
  }

  @Test("A grammar behind the thought goes on after the forced end, whoever opened the thought")
  func grammars() async throws {
    let thought = #"{"type": "tag", "begin": "BEGIN", "content": {"type": "any_text"}, "end": "</think>"}"#
    for isOpen in [true, false] {
      let begin = isOpen ? "" : "<think>"
      for overlap in [true, false] {
        var configuration = EngineConfiguration(modelPath: model)
        configuration.enablesOverlap = overlap
        configuration.maxTotalTokens = 4096
        try await withEngine(configuration) { engine in
          for (index, sum) in Self.sums.enumerated() {
            // With other words than the model's own.
            let rest = #"{"type": "regex", "pattern": "\\n{0,2}\#(sum.0) and \#(sum.1) = [0-9]{2,3}"}"#
            let tag =
              #"{"type": "structural_tag", "format": {"type": "sequence", "elements": ["#
              + thought.replacing("BEGIN", with: begin) + "," + rest + "]}}"
            for budget in [6, nil] {
              // Greedy, and drawn.
              for seed in [nil, UInt64(index)] {
                let result = try await engine.generate(
                  request(sum, budget: budget, isOpen: isOpen, seed: seed, grammar: .structuralTag(tag))
                ).result()
                if case .stop = result.finishReason {} else { Issue.record("\(result.finishReason): \(result.text)") }
                #expect(result.text.hasPrefix(begin))
                let (steps, answer) = try #require(parts(result.text), "\(result.text)")
                #expect(answer.hasPrefix("\(sum.0) and \(sum.1) = "), "\(result.text)")
                if let budget {
                  let kept = steps.trimmingCharacters(in: .whitespacesAndNewlines)
                  #expect(try engine.encode(kept, addSpecialTokens: false).count <= budget, "\(result.text)")
                } else if seed == nil {
                  #expect(answer.hasSuffix(" = \(sum.0 + sum.1)"), "\(result.text)")
                }
              }
            }
          }
        }
      }
    }
  }

  @Test("A budget is refused where the tokenizer cannot spell the end of a thought")
  func unspeakableEnd() async throws {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent("apus-budget-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: folder) }
    // 80 bytes are tokens; lower-case letters lie beyond them.
    let config = """
      {"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
       "num_attention_heads": 2, "vocab_size": 80, "max_position_embeddings": 64, "eos_token_id": 3}
      """
    try Data(config.utf8).write(to: folder.appendingPathComponent("config.json"))
    var configuration = EngineConfiguration(modelPath: folder.path)
    configuration.loadFormat = .dummy
    try await withEngine(configuration) { engine in
      var request = Request(prompt: .tokens([1, 2]), sampling: .greedy)
      request.sampling.maxNewTokens = 4
      _ = try await engine.generate(request).result()
      request.sampling.thinkingBudget = 2
      #expect(throws: EngineError.self) { _ = try engine.generate(request) }
    }
  }
}
