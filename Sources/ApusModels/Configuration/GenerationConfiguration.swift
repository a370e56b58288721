public import ApusCore

/// What `generation_config.json` recommends.
public struct GenerationConfiguration: Sendable, Equatable {
  /// End-of-sequence tokens; empty where the file is silent or absent.
  public var eosTokenIDs: [TokenID] = []
  public var bosTokenID: TokenID?
  /// Values for requests that are silent.
  public var sampling = SamplingDefaults()

  /// Nothing recommended.
  public init() {}

  /// Reads the file of a checkpoint directory; a directory without one recommends nothing.
  /// - Throws: `invalidCheckpoint` if the file is broken.
  public init(directory: String, vocabularySize: Int) throws(EngineError) {
    let path = directory + "/generation_config.json"
    guard let bytes = try readSmallFile(path) else {
      self.init()
      return
    }
    let json: JSONValue
    do { json = try JSONValue.parse(bytes) } catch {
      throw EngineError(.invalidCheckpoint, "\(path): \(error).")
    }
    try self.init(json: json, path: path, vocabularySize: vocabularySize)
  }

  /// Reads the content of a `generation_config.json`.
  public init(json: JSONValue, path: String = "generation_config.json", vocabularySize: Int) throws(EngineError) {
    let fields = try ConfigurationFields(json, path: path)
    eosTokenIDs = try fields.tokens("eos_token_id", vocabularySize: vocabularySize)
    bosTokenID = try fields.tokens("bos_token_id", vocabularySize: vocabularySize).first
    // `do_sample` is not looked at: servers sample unless a request says otherwise, and so do SGLang and vLLM.
    sampling.temperature = try fields.number("temperature").map { Float($0) }
    sampling.topK = try fields.number("top_k").map { $0 >= 1 ? Int(min($0, 1e9)) : -1 }
    sampling.topP = try fields.number("top_p").map { Float($0) }
    sampling.minP = try fields.number("min_p").map { Float($0) }
    sampling.repetitionPenalty = try fields.number("repetition_penalty").map { Float($0) }
    sampling.maxNewTokens = try fields.optionalSize("max_new_tokens", limit: 1 << 30)

    // Out-of-range values would make every silent request fail; a checkpoint should not be able to do that.
    var probe = SamplingParameters()
    probe.maxNewTokens = nil
    sampling.apply(to: &probe)
    do { try probe.validate(vocabularySize: vocabularySize) } catch {
      throw fields.invalid("a recommended value is impossible: \(error.message)")
    }
  }
}
