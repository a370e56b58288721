public import ApusCore

/// Runs `body` with an engine that is stopped when `body` returns or throws.
///
/// Generations that are still in flight when `body` returns are aborted.
///
/// - Throws: `EngineError` if the model cannot be loaded, and whatever `body` throws.
public func withEngine<Result>(
  _ configuration: EngineConfiguration, isolation: isolated (any Actor)? = #isolation,
  progress: (@Sendable (LoadProgress) -> Void)? = nil, _ body: (Engine) async throws -> Result
) async throws -> Result {
  let engine = try await Engine.start(configuration, progress: progress)
  do {
    let result = try await body(engine)
    await engine.shutdown()
    return result
  } catch {
    await engine.shutdown()
    throw error
  }
}

extension GenerationService {
  /// Sampling parameters with the checkpoint's own recommendations.
  public var defaultSampling: SamplingParameters {
    var sampling = SamplingParameters()
    model.samplingDefaults.apply(to: &sampling)
    return sampling
  }

  /// Continues a text.
  ///
  /// - Parameter sampling: how to draw; `nil` takes the checkpoint's recommendations.
  /// - Throws: see `generate(_:)` of `GenerationService`.
  public func generate(_ text: String, sampling: SamplingParameters? = nil) throws(EngineError) -> GenerationStream {
    try generate(Request(prompt: .text(text), sampling: sampling ?? defaultSampling))
  }

  /// Answers a conversation, rendered with the model's chat template.
  ///
  /// - Throws: as `renderChat(_:)` and `generate(_:)` of `GenerationService`.
  public func generate(
    _ conversation: ChatPrompt, sampling: SamplingParameters? = nil
  ) throws(EngineError) -> GenerationStream {
    // The template writes its own special tokens, so that the tokenizer must not add them again.
    let tokens = try encode(renderChat(conversation), addSpecialTokens: false)
    return try generate(Request(prompt: .tokens(tokens), sampling: sampling ?? defaultSampling))
  }
}
