package import ApusCore
package import ApusTokenization

/// Turns a request's tokens into text, looks for stop strings and stop patterns, and counts.
package struct OutputAssembler: Sendable {
  private var detokenizer: IncrementalDetokenizer
  private var stopStrings: StopMatcher
  private var stopPatterns: StopPatternMatcher
  private let minNewTokens: Int
  private let keepsStopToken: Bool
  private var completionCount = 0

  /// For a generation with these parameters.
  /// - Throws: `invalidRequest` if a stop regex cannot be read.
  package init(tokenizer: Tokenizer, sampling: SamplingParameters) throws(EngineError) {
    detokenizer = IncrementalDetokenizer(tokenizer, skipSpecialTokens: sampling.skipSpecialTokens)
    stopStrings = StopMatcher(stops: sampling.stop, keepsMatch: sampling.noStopTrim)
    stopPatterns = try StopPatternMatcher(patterns: sampling.stopRegex, keepsMatch: sampling.noStopTrim)
    minNewTokens = sampling.minNewTokens
    keepsStopToken = sampling.noStopTrim
  }

  /// Takes tokens, and the reason if they are the last, and returns what the reader gets. If a stop string ends within
  /// the tokens, those after it are dropped and the chunk carries the reason.
  mutating func append(
    _ tokens: [TokenID], logprobs: [PositionLogprobs], finishReason: FinishReason?
  ) -> GenerationChunk {
    var chunk = GenerationChunk(tokens: tokens, logprobs: logprobs, finishReason: finishReason)
    var stopToken: TokenID?
    if case .stop(.token(let token)) = finishReason, !keepsStopToken { stopToken = token }
    for (index, token) in tokens.enumerated() {
      completionCount += 1
      if token == stopToken, index == tokens.count - 1 { continue }
      let (text, end) = filter(detokenizer.append(token))
      chunk.text += text
      if let end {
        chunk.tokens = Array(tokens[...index])
        if !logprobs.isEmpty { chunk.logprobs = Array(logprobs[...index]) }
        chunk.finishReason = end
        chunk.usage.completionTokens = completionCount
        return chunk
      }
    }
    if finishReason != nil {
      let (text, end) = filter(detokenizer.finish())
      chunk.text += text
      if let end {
        chunk.finishReason = end
      } else {
        let (held, end) = filterPatterns(stopStrings.finish())
        chunk.text += held
        if let end { chunk.finishReason = end } else { chunk.text += stopPatterns.finish(after: "") }
      }
    }
    chunk.usage.completionTokens = completionCount
    return chunk
  }

  /// Lets text through the stop conditions. Before `minNewTokens` nothing stops.
  private mutating func filter(_ piece: String) -> (text: String, end: FinishReason?) {
    if completionCount <= minNewTokens || piece.isEmpty { return (piece, nil) }
    let (text, match) = stopStrings.append(piece)
    // What precedes a stop string may itself match a pattern, which then came first.
    let (filtered, end) = filterPatterns(text)
    if end != nil { return (filtered, end) }
    guard let match else { return (filtered, nil) }
    return (filtered + stopPatterns.finish(after: ""), .stop(.text(match.text)))
  }

  private mutating func filterPatterns(_ text: String) -> (text: String, end: FinishReason?) {
    let (filtered, outcome) = stopPatterns.append(text)
    switch outcome {
    case .none: return (filtered, nil)
    case .match(let text): return (filtered, .stop(.text(text)))
    case .failure(let reason): return (filtered, .abort(reason))
    }
  }
}
