import ApusCore
import ApusModels
import Glibc

/// A float32 number as the shortest decimal that stands for it, so that 1e-05 does not become 9.99999974e-06.
func shortest(_ number: Float) -> Double { Double("\(number)") ?? Double(number) }

extension ModelConfiguration {
  /// The model as `config.json` describes it to transformers, for checkpoints that come without one.
  /// - Parameters:
  ///   - dtype: the name of the number format of what is not quantised.
  ///   - path: names the source in messages.
  /// - Throws: `unsupported` if the class has no field for what the model has.
  func configJSON(dtype: String, generation: GenerationConfiguration, path: String) throws(EngineError) -> JSONObject {
    func refuse(_ sentence: String) -> EngineError { EngineError(.unsupported, "\(path): \(sentence).") }
    let types = [
      "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2",
      "Qwen3ForCausalLM": "qwen3",
    ]
    guard let modelType = types[architecture] else {
      throw refuse("no config.json can be written for the class \(architecture)")
    }
    var config = JSONObject([
      ("architectures", [.string(architecture)]), ("model_type", .string(modelType)),
      ("hidden_size", .int(Int64(hiddenSize))), ("intermediate_size", .int(Int64(intermediateSize))),
      ("num_hidden_layers", .int(Int64(layerCount))), ("num_attention_heads", .int(Int64(queryHeads))),
      ("num_key_value_heads", .int(Int64(kvHeads))), ("head_dim", .int(Int64(headDimension))),
      ("vocab_size", .int(Int64(vocabularySize))), ("max_position_embeddings", .int(Int64(maxPositionEmbeddings))),
      ("hidden_act", "silu"), ("rms_norm_eps", .double(shortest(normEpsilon))),
      ("rope_theta", .double(rotary.theta)), ("rope_scaling", ropeScaling().map { .object($0) } ?? .null),
      ("tie_word_embeddings", .bool(tiedEmbeddings)), ("attention_dropout", .double(0)),
      ("initializer_range", .double(shortest(initializerRange))), ("use_cache", true), ("torch_dtype", .string(dtype)),
    ])
    let isPartial = rotary.rotaryDimension != headDimension
    if isPartial {
      config["partial_rotary_factor"] = .double(Double(rotary.rotaryDimension) / Double(headDimension))
    }
    switch architecture {
    case "LlamaForCausalLM":
      guard qkvBias == attentionOutputBias else {
        throw refuse("LlamaForCausalLM has biases in all four attention projections or in none, this model in some")
      }
      config["attention_bias"] = .bool(qkvBias)
      config["mlp_bias"] = .bool(mlpBias)
    case "Qwen3ForCausalLM":
      guard qkvBias == attentionOutputBias, !mlpBias else {
        throw refuse("Qwen3ForCausalLM has no place for the biases of this model")
      }
      config["attention_bias"] = .bool(qkvBias)
      config["use_sliding_window"] = false
    case "Qwen2ForCausalLM":
      guard qkvBias, !attentionOutputBias, !mlpBias else {
        throw refuse("Qwen2ForCausalLM has biases in q, k and v and nowhere else, this model has others")
      }
      config["use_sliding_window"] = false
    default:
      guard !qkvBias, !attentionOutputBias, !mlpBias else { throw refuse("\(architecture) has no biases") }
      config["sliding_window"] = slidingWindows.first.map { $0 > 0 ? .int(Int64($0)) : .null } ?? .null
    }
    if let id = generation.bosTokenID ?? bosTokenID { config["bos_token_id"] = .int(Int64(id)) }
    let ends = generation.eosTokenIDs.isEmpty ? eosTokenIDs : generation.eosTokenIDs
    if let first = ends.first {
      config["eos_token_id"] = ends.count == 1 ? .int(Int64(first)) : .array(ends.map { .int(Int64($0)) })
    }
    return config
  }

  private func ropeScaling() -> JSONObject? {
    switch rotary.scaling {
    case .none: nil
    case .linear(let factor): JSONObject([("rope_type", "linear"), ("factor", .double(factor))])
    case .dynamic(let factor): JSONObject([("rope_type", "dynamic"), ("factor", .double(factor))])
    case .llama3(let factor, let low, let high, let length):
      JSONObject([
        ("rope_type", "llama3"), ("factor", .double(factor)), ("low_freq_factor", .double(low)),
        ("high_freq_factor", .double(high)), ("original_max_position_embeddings", .int(Int64(length))),
      ])
    case .yarn(let factor, let attention, let fast, let slow, let length, let truncate):
      JSONObject([
        ("rope_type", "yarn"), ("factor", .double(factor)), ("attention_factor", .double(attention)),
        ("beta_fast", .double(fast)), ("beta_slow", .double(slow)),
        ("original_max_position_embeddings", .int(Int64(length))), ("truncate", .bool(truncate)),
      ])
    case .longRoPE(let short, let long, let attention, let length):
      JSONObject([
        ("rope_type", "longrope"), ("short_factor", .array(short.map { .double($0) })),
        ("long_factor", .array(long.map { .double($0) })), ("attention_factor", .double(attention)),
        ("factor", .double(1)), ("original_max_position_embeddings", .int(Int64(length))),
      ])
    }
  }

  /// The model as the metadata of a GGUF file describe it.
  /// - Returns: the architecture's name, and the divisors of `rope_freqs.weight` if there are any.
  /// - Throws: `unsupported` if the format has no entry for what the model has.
  func write(
    to metadata: inout GGUFMetadataWriter, path: String
  ) throws(EngineError) -> (architecture: String, rotationDivisors: [Float]?) {
    func refuse(_ sentence: String) -> EngineError { EngineError(.unsupported, "\(path): \(sentence).") }
    guard let name = GGUFNames.architecture(ofClass: architecture) else {
      throw refuse("the class \(architecture) has no GGUF architecture that is implemented here")
    }
    metadata.set("general.architecture", text: name)
    metadata.set("general.type", text: "model")
    metadata.set("\(name).vocab_size", size: vocabularySize)
    metadata.set("\(name).context_length", size: maxPositionEmbeddings)
    metadata.set("\(name).embedding_length", size: hiddenSize)
    metadata.set("\(name).block_count", size: layerCount)
    metadata.set("\(name).feed_forward_length", size: intermediateSize)
    metadata.set("\(name).attention.head_count", size: queryHeads)
    metadata.set("\(name).attention.head_count_kv", size: kvHeads)
    metadata.set("\(name).attention.key_length", size: headDimension)
    metadata.set("\(name).attention.value_length", size: headDimension)
    metadata.set("\(name).attention.layer_norm_rms_epsilon", number: normEpsilon)
    guard name != "llama" || rotary.rotaryDimension == headDimension else {
      throw refuse("GGUF's llama rotates whole heads; here \(rotary.rotaryDimension) of \(headDimension) numbers are")
    }
    metadata.set("\(name).rope.dimension_count", size: rotary.rotaryDimension)
    metadata.set("\(name).rope.freq_base", number: Float(rotary.theta))
    let windows = Set(slidingWindows.map { $0 >= maxPositionEmbeddings ? 0 : $0 })
    if windows != [0], !windows.isEmpty {
      guard name == "llama", windows.count == 1 else {
        throw refuse("GGUF's \(name) has no place for a sliding window over some of the layers")
      }
      metadata.set("\(name).attention.sliding_window", size: slidingWindows[0])
    }

    switch rotary.scaling {
    case .none: break
    case .linear(let factor):
      metadata.set("\(name).rope.scaling.type", text: "linear")
      metadata.set("\(name).rope.scaling.factor", number: Float(factor))
    case .yarn(let factor, let attention, let fast, let slow, let length, let truncate):
      guard truncate else { throw refuse("YaRN without truncation has no place in a GGUF file") }
      metadata.set("\(name).rope.scaling.type", text: "yarn")
      metadata.set("\(name).rope.scaling.factor", number: Float(factor))
      metadata.set("\(name).rope.scaling.original_context_length", size: length)
      if fast != 32 { metadata.set("\(name).rope.scaling.yarn_beta_fast", number: Float(fast)) }
      if slow != 1 { metadata.set("\(name).rope.scaling.yarn_beta_slow", number: Float(slow)) }
      // The format's factor comes on top of the method's own.
      let own = factor <= 1 ? 1 : 0.1 * log(factor) + 1
      if abs(attention - own) > 1e-9 {
        metadata.set("\(name).rope.scaling.attn_factor", number: Float(attention / own))
      }
    case .llama3(let factor, let low, let high, let length):
      let divisors = (0..<rotary.rotaryDimension / 2).map { index -> Float in
        let frequency = pow(rotary.theta, -Double(2 * index) / Double(rotary.rotaryDimension))
        let turns = Double(length) * frequency / (2 * .pi)
        if turns < low { return Float(factor) }
        if turns > high { return 1 }
        let smooth = (turns - low) / (high - low)
        return Float(1 / ((1 - smooth) / factor + smooth))
      }
      return (name, divisors)
    case .longRoPE(let short, let long, let attention, _) where short == long && attention == 1:
      // What divisors in a GGUF file are read as.
      return (name, short.map { Float($0) })
    case .dynamic, .longRoPE:
      throw refuse("the rotation (\(architecture), dynamic or longrope scaling) has no place in a GGUF file")
    }
    return (name, nil)
  }
}
