import ApusCore
import Glibc

/// Reads a GGUF model's metadata as what `config.json` and `generation_config.json` say of other checkpoints.
///
/// Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What cannot be served is refused with the key's name.
struct GGUFMetadata {
  private let files: GGUFModelFiles
  private let architecture: String

  init(_ files: GGUFModelFiles) {
    self.files = files
    architecture = files.metadata["general.architecture"]?.stringValue ?? ""
  }

  private func invalid(_ sentence: String) -> EngineError {
    EngineError(.invalidCheckpoint, "\(files.path): \(sentence).")
  }
  private func unsupported(_ sentence: String) -> EngineError {
    EngineError(.unsupported, "\(files.path): \(sentence).")
  }

  // MARK: Entries

  private func entry(_ key: String) -> GGUFHeader.Value? { files.metadata["\(architecture).\(key)"] }

  /// A size, given for the model or equally for all its layers.
  private func size(_ key: String) throws(EngineError) -> Int? {
    guard let value = entry(key) else { return nil }
    var size = value.intValue
    if case .array(let array) = value {
      let numbers = try files.headers[0].numbers("\(architecture).\(key)", in: files.files[0].bytes) ?? []
      guard let first = numbers.first, numbers.allSatisfy({ $0 == first }) else {
        throw unsupported("\(architecture).\(key) differs between the \(array.count) layers, which is not implemented")
      }
      size = Int(exactly: first)
    }
    guard let size, size >= 1, size <= 1 << 30 else {
      throw invalid("\(architecture).\(key) must be an integer from 1 to \(1 << 30), found \(value.kindName)")
    }
    return size
  }

  private func requiredSize(_ key: String) throws(EngineError) -> Int {
    guard let size = try size(key) else { throw invalid("the metadata has no \(architecture).\(key)") }
    return size
  }

  private func number(_ key: String) throws(EngineError) -> Double? {
    guard let value = entry(key) else { return nil }
    guard let number = value.doubleValue, number.isFinite else {
      throw invalid("\(architecture).\(key) must be a number, found \(value.kindName)")
    }
    return number
  }

  // MARK: config.json

  /// The Hugging Face class of each architecture.
  static let classes = [
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
  ]

  /// Those of architectures whose files hold mixtures of experts.
  static let expertClasses = [
    "llama": "MixtralForCausalLM", "qwen2moe": "Qwen2MoeForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM",
    "glm4moe": "Glm4MoeForCausalLM",
  ]

  /// Layers for multi-token prediction behind the model's own. They count among `block_count`, and some files leave them out
  /// all the same.
  private var predictionLayers: Int { entry("nextn_predict_layers")?.intValue ?? 0 }

  /// Layers of the model itself.
  private func layerCount() throws(EngineError) -> Int {
    let all = try requiredSize("block_count")
    guard predictionLayers >= 0, predictionLayers < all else {
      throw invalid("\(architecture).nextn_predict_layers (\(predictionLayers)) must be less than block_count (\(all))")
    }
    return all - predictionLayers
  }

  private var expertCount: Int { entry("expert_count")?.intValue ?? 0 }

  /// The fields of GLM-4.5's mixture of experts.
  private func addGLMExperts(to config: inout JSONObject) throws(EngineError) {
    // 2 is the sigmoid, which llama.cpp takes where the file is silent.
    if let function = entry("expert_gating_func")?.intValue, function != 2 {
      throw unsupported("\(architecture).expert_gating_func \(function) is not implemented")
    }
    config["n_routed_experts"] = .int(Int64(expertCount))
    config["num_experts_per_tok"] = .int(Int64(try requiredSize("expert_used_count")))
    config["moe_intermediate_size"] = .int(Int64(try requiredSize("expert_feed_forward_length")))
    config["n_shared_experts"] = .int(Int64(entry("expert_shared_count")?.intValue ?? 0))
    config["first_k_dense_replace"] = .int(Int64(entry("leading_dense_block_count")?.intValue ?? 0))
    config["norm_topk_prob"] = .bool(entry("expert_weights_norm")?.boolValue ?? false)
    if let scale = try number("expert_weights_scale"), scale != 0 { config["routed_scaling_factor"] = .double(scale) }
    config["use_qk_norm"] = .bool(files.tensor("blk.0.attn_q_norm.weight") != nil)
  }

  /// The fields of a mixture of experts.
  private func addExperts(to config: inout JSONObject) throws(EngineError) {
    config["num_experts"] = .int(Int64(expertCount))
    config["num_experts_per_tok"] = .int(Int64(try requiredSize("expert_used_count")))
    if let width = try size("expert_feed_forward_length") { config["moe_intermediate_size"] = .int(Int64(width)) }
    if config["moe_intermediate_size"] == nil { config["moe_intermediate_size"] = config["intermediate_size"] }
    config["norm_topk_prob"] = .bool(architecture != "qwen2moe")
    // Layers without experts have ordinary tensors instead.
    let layers = try layerCount()
    config["mlp_only_layers"] = .array(
      (0..<layers).filter { files.tensor("blk.\($0).ffn_gate_exps.weight") == nil }.map { .int(Int64($0)) })
    guard architecture == "qwen2moe" else { return }
    let shared = files.tensor("blk.0.ffn_gate_shexp.weight")?.tensor.dimensions.last
    if let width = try size("expert_shared_feed_forward_length") ?? shared {
      config["shared_expert_intermediate_size"] = .int(Int64(width))
    }
  }

  /// The model's configuration.
  func configuration() throws(EngineError) -> ModelConfiguration {
    guard !architecture.isEmpty else { throw invalid("the metadata has no general.architecture") }
    let hasExperts = expertCount > 0
    guard var className = hasExperts ? Self.expertClasses[architecture] : Self.classes[architecture] else {
      let known = hasExperts ? Self.expertClasses : Self.classes
      throw unsupported(
        "the architecture \(architecture)\(hasExperts ? " with \(expertCount) experts" : "") is not implemented; these "
          + "are: \(known.keys.sorted().joined(separator: ", "))")
    }
    try refuseUnknown()
    guard let table = files.tensor("token_embd.weight")?.tensor, table.dimensions.count == 2 else {
      throw invalid("there is no matrix token_embd.weight, so the file holds no model")
    }
    let heads = try requiredSize("attention.head_count")
    let hidden = try requiredSize("embedding_length")
    let contextLength = try requiredSize("context_length")
    guard let epsilon = try number("attention.layer_norm_rms_epsilon"), epsilon > 0 else {
      throw invalid("the metadata has no positive \(architecture).attention.layer_norm_rms_epsilon")
    }
    let keyLength = try size("attention.key_length")
    let valueLength = try size("attention.value_length")
    guard keyLength != nil || hidden % heads == 0 else {
      throw invalid(
        "\(architecture).embedding_length (\(hidden)) must be a multiple of attention.head_count (\(heads))")
    }
    let headLength = keyLength ?? hidden / heads
    guard valueLength ?? headLength == headLength else {
      throw unsupported("keys of \(headLength) and values of \(valueLength ?? 0) numbers per head are not implemented")
    }
    let rotated = try size("rope.dimension_count") ?? headLength
    guard rotated <= headLength, rotated % 2 == 0, headLength % 2 == 0 else {
      throw invalid("\(architecture).rope.dimension_count is \(rotated), but heads have \(headLength) numbers")
    }
    if architecture == "llama", rotated != headLength {
      throw unsupported("rotation of \(rotated) of the \(headLength) numbers of a head is not implemented for llama")
    }

    var config = JSONObject([
      ("hidden_size", .int(Int64(hidden))), ("intermediate_size", .int(Int64(try requiredSize("feed_forward_length")))),
      ("num_hidden_layers", .int(Int64(try layerCount()))), ("num_attention_heads", .int(Int64(heads))),
      ("num_key_value_heads", .int(Int64(try size("attention.head_count_kv") ?? heads))),
      ("head_dim", .int(Int64(headLength))), ("vocab_size", .int(Int64(table.dimensions[1]))),
      ("max_position_embeddings", .int(Int64(contextLength))), ("rms_norm_eps", .double(epsilon)),
      ("rope_theta", .double(try number("rope.freq_base") ?? 10_000)),
      ("partial_rotary_factor", .double(Double(rotated) / Double(headLength))),
      ("tie_word_embeddings", .bool(files.tensor("output.weight") == nil)),
    ])
    if architecture == "glm4moe" {
      try addGLMExperts(to: &config)
    } else {
      if hasExperts { try addExperts(to: &config) }
      guard predictionLayers == 0 else {
        throw unsupported("\(architecture).nextn_predict_layers is not implemented for this architecture")
      }
    }
    if let window = try size("attention.sliding_window"), window < contextLength {
      guard architecture == "llama" else {
        throw unsupported("\(architecture).attention.sliding_window is not implemented for \(architecture)")
      }
      // The class differs from Llama's in the window alone.
      if !hasExperts { className = "MistralForCausalLM" }
      config["sliding_window"] = .int(Int64(window))
    }
    config["architectures"] = [.string(className)]
    if let scaling = try scaling(contextLength) { config["rope_scaling"] = .object(scaling) }
    if let id = try token("bos") { config["bos_token_id"] = .int(Int64(id)) }
    if let id = try token("eos") { config["eos_token_id"] = .int(Int64(id)) }

    var result = try ModelConfiguration(json: .object(config), path: files.path)
    func has(_ names: String...) -> Bool { names.allSatisfy { files.tensor("blk.0.\($0).bias") != nil } }
    result.qkvBias = has("attn_q", "attn_k", "attn_v")
    result.attentionOutputBias = has("attn_output")
    result.mlpBias = !hasExperts && has("ffn_gate", "ffn_up", "ffn_down")
    if let factors = try rotationFactors(count: rotated / 2) {
      guard result.rotary.scaling == .none else {
        throw unsupported("rope_freqs.weight together with \(architecture).rope.scaling is not implemented")
      }
      result.rotary.scaling = Self.scaling(
        factors: factors, theta: result.rotary.theta, rotated: rotated, contextLength: contextLength)
    }
    return result
  }

  /// Settings that change what a model computes and that nothing here implements.
  private func refuseUnknown() throws(EngineError) {
    for (key, neutral) in [
      ("logit_scale", 1.0), ("embedding_scale", 1), ("residual_scale", 1), ("attn_logit_softcapping", 0),
      ("final_logit_softcapping", 0), ("attention.clamp_kqv", 0), ("attention.max_alibi_bias", 0),
      ("attention.scale", 0), ("expert_weights_scale", 1),
    ] where key != "expert_weights_scale" || architecture != "glm4moe" {
      if let value = try number(key), value != neutral, value != 0 {
        throw unsupported("\(architecture).\(key) of \(value) is not implemented")
      }
    }
    if entry("attention.causal")?.boolValue == false {
      throw unsupported("attention to later tokens (\(architecture).attention.causal = false) is not implemented")
    }
    if let type = files.metadata["general.type"]?.stringValue, type != "model" {
      throw unsupported("the file is of general.type \(type), not a model")
    }
  }

  /// `rope_scaling` of the `rope.scaling` entries.
  private func scaling(_ contextLength: Int) throws(EngineError) -> JSONObject? {
    let older = try number("rope.scale_linear")
    let type = entry("rope.scaling.type")?.stringValue ?? (older.map { $0 != 1 } ?? false ? "linear" : "none")
    let given = try number("rope.scaling.factor")
    guard let factor = given ?? older, factor != 1 || type == "yarn", factor != 0 else {
      guard type == "none" || given != nil || older != nil else {
        throw invalid("\(architecture).rope.scaling.type is \(type), but there is no rope.scaling.factor")
      }
      return nil
    }
    switch type {
    case "none": return nil
    case "linear": return JSONObject([("rope_type", "linear"), ("factor", .double(factor))])
    case "yarn":
      var scaling = JSONObject([("rope_type", "yarn"), ("factor", .double(factor))])
      if let length = try size("rope.scaling.original_context_length") {
        scaling["original_max_position_embeddings"] = .int(Int64(length))
      }
      if let value = try number("rope.scaling.yarn_beta_fast") { scaling["beta_fast"] = .double(value) }
      if let value = try number("rope.scaling.yarn_beta_slow") { scaling["beta_slow"] = .double(value) }
      // The format's factor comes on top of the method's own.
      if let value = try number("rope.scaling.attn_factor"), value != 1 {
        scaling["attention_factor"] = .double(value * (factor <= 1 ? 1 : 0.1 * log(factor) + 1))
      }
      return scaling
    default: throw unsupported("\(architecture).rope.scaling.type \(type) is not one of none, linear and yarn")
    }
  }

  /// The divisors of the frequencies in rope_freqs.weight.
  private func rotationFactors(count: Int) throws(EngineError) -> [Double]? {
    guard let tensor = files.tensor("rope_freqs.weight")?.tensor, let bytes = files.bytes("rope_freqs.weight") else {
      return nil
    }
    guard tensor.typeID == GGUFWeightType.f32.rawValue, tensor.dimensions == [count] else {
      throw invalid(
        "tensor rope_freqs.weight has type \(tensor.typeName) and dimensions \(tensor.dimensions), expected F32 and "
          + "[\(count)]")
    }
    let factors = (0..<count).map { Double(bytes.loadUnaligned(fromByteOffset: 4 * $0, as: Float.self)) }
    guard factors.allSatisfy({ $0.isFinite && $0 > 0 }) else {
      throw invalid("tensor rope_freqs.weight holds a number that is not positive")
    }
    return factors
  }

  /// The scaling that divisors stand for. Those of Llama 3.1 and 3.2 are recognised, so that the frequencies come from the
  /// formula, as they do for the original checkpoint, and not from its results rounded to float32.
  static func scaling(
    factors: [Double], theta: Double, rotated: Int, contextLength: Int
  ) -> RotaryConfiguration.Scaling {
    if factors.allSatisfy({ $0 == 1 }) { return .none }
    let factor = factors.max()!.rounded()
    let (low, high, length) = (1.0, 4.0, 8192)
    let isLlama3 = factors.enumerated().allSatisfy { index, found in
      let turns = Double(length) * pow(theta, -Double(2 * index) / Double(rotated)) / (2 * .pi)
      let smooth = (turns - low) / (high - low)
      let expected = turns < low ? factor : turns > high ? 1 : 1 / ((1 - smooth) / factor + smooth)
      return abs(found - expected) <= 1e-5 * expected
    }
    if isLlama3 {
      return .llama3(factor: factor, lowFrequencyFactor: low, highFrequencyFactor: high, originalLength: length)
    }
    return .longRoPE(
      shortFactors: factors, longFactors: factors, attentionFactor: 1, originalLength: contextLength)
  }

  // MARK: generation_config.json

  private func token(_ name: String) throws(EngineError) -> Int? {
    guard let value = files.metadata["tokenizer.ggml.\(name)_token_id"] else { return nil }
    guard let id = value.intValue, id >= 0, id <= Int(Int32.max) else { return nil }
    return id
  }

  /// Control tokens that end a turn in the chat formats of the architectures served.
  private static let turnEnds: Set<String> = [
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>",
  ]

  /// End-of-sequence tokens. The metadata names one, so control tokens known to end turns join it.
  func generation(vocabularySize: Int) throws(EngineError) -> GenerationConfiguration {
    var result = GenerationConfiguration()
    var ends: [Int] = []
    for name in ["eos", "eot", "eom"] {
      if let id = try token(name), id < vocabularySize, !ends.contains(id) { ends.append(id) }
    }
    let bytes = files.files[0].bytes
    let header = files.headers[0]
    let kinds = try header.numbers("tokenizer.ggml.token_type", in: bytes) ?? []
    var id = 0
    try header.forEachText("tokenizer.ggml.tokens", in: bytes) { (text) throws(EngineError) in
      // Kind 3 is a control token.
      if id < kinds.count, kinds[id] == 3, id < vocabularySize, text.count < 16, !ends.contains(id),
        Self.turnEnds.contains(String(decoding: text, as: UTF8.self))
      {
        ends.append(id)
      }
      id += 1
    }
    result.eosTokenIDs = ends.map { TokenID($0) }
    if let bos = try token("bos"), bos < vocabularySize { result.bosTokenID = TokenID(bos) }
    return result
  }

  // MARK: Weights

  static let modelNames = [
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
  ]
  static let layerNames = [
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
  ]

  /// Names within GLM's layers, beside those above.
  private static let glmLayerNames = [
    "post_attention_norm": "post_attention_layernorm", "exp_probs_b": "mlp.gate.e_score_correction_bias",
  ]

  /// Names within a layer for multi-token prediction, behind `blk.N.nextn`.
  private static let predictionNames = [
    "eh_proj": "eh_proj", "enorm": "enorm", "hnorm": "hnorm", "embed_tokens": "embed_tokens",
    "shared_head_head": "shared_head.head", "shared_head_norm": "shared_head.norm",
  ]

  /// The Hugging Face name of a tensor that only GLM has.
  private func glmWeightName(_ name: String, layerCount: Int) -> String? {
    guard architecture == "glm4moe" else { return nil }
    let parts = name.split(separator: ".", omittingEmptySubsequences: false)
    guard parts.count >= 4, parts[0] == "blk", let layer = Int(parts[1]), (0..<layerCount).contains(layer) else {
      return nil
    }
    let prefix = "model.layers.\(layer)."
    if parts.count == 4, let inner = Self.glmLayerNames[String(parts[2])] {
      // A correction is called a bias and is no bias of a matrix.
      let isCorrection = parts[2] == "exp_probs_b"
      guard parts[3] == (isCorrection ? "bias" : "weight") else { return nil }
      return prefix + inner + (isCorrection ? "" : ".weight")
    }
    guard parts.count == 5, parts[2] == "nextn", parts[4] == "weight",
      let inner = Self.predictionNames[String(parts[3])]
    else { return nil }
    return prefix + inner + ".weight"
  }

  /// Names within a layer with experts, behind the block's module. The first three hold all experts of the layer.
  private static func expertNames(_ names: ExpertNames) -> [String: String] {
    [
      "ffn_gate_exps": names.gate, "ffn_up_exps": names.up, "ffn_down_exps": names.down, "ffn_gate_inp": names.router,
      "ffn_gate_shexp": names.shared + "gate_proj", "ffn_up_shexp": names.shared + "up_proj",
      "ffn_down_shexp": names.shared + "down_proj", "ffn_gate_inp_shexp": names.shared.dropLast() + "_gate",
    ]
  }

  /// The GGUF name of each weight by its Hugging Face name. A tensor that holds all experts of a layer has as many names.
  /// - Throws: `unsupported` if there is a tensor that the model's class does not use: leaving it out would change results.
  func weightNames(
    layerCount ownLayerCount: Int, experts: ExpertConfiguration?
  ) throws(EngineError) -> [String: String] {
    let hasPrediction = files.tensor("blk.\(ownLayerCount).nextn.eh_proj.weight") != nil
    let layerCount = ownLayerCount + (hasPrediction ? predictionLayers : 0)
    var names: [String: String] = [:]
    let expertNames = experts.map { Self.expertNames($0.names) } ?? [:]
    for tensor in files.tensors where tensor.name != "rope_freqs.weight" {
      let parts = tensor.name.split(separator: ".")
      if let experts, parts.count == 4, parts[0] == "blk", parts[3] == "weight", let layer = Int(parts[1]),
        (0..<layerCount).contains(layer), let inner = expertNames[String(parts[2])]
      {
        let block = "model.layers.\(layer).\(experts.names.block)"
        if parts[2].hasSuffix("_exps") {
          for expert in 0..<experts.expertCount { names["\(block)experts.\(expert).\(inner).weight"] = tensor.name }
        } else {
          names["\(block)\(inner).weight"] = tensor.name
        }
        continue
      }
      let glmName = glmWeightName(tensor.name, layerCount: layerCount)
      guard let name = glmName ?? Self.weightName(tensor.name, layerCount: layerCount) else {
        throw unsupported(
          "tensor \(tensor.name) has no place in the architecture \(architecture) with \(layerCount) layers")
      }
      // Only Qwen3 and GLM normalise q and k.
      if !architecture.hasPrefix("qwen3"), architecture != "glm4moe",
        tensor.name.contains("_q_norm") || tensor.name.contains("_k_norm")
      {
        throw unsupported("tensor \(tensor.name) has no place in the architecture \(architecture)")
      }
      names[name] = tensor.name
    }
    // A bias that only some projections or layers have would be left out silently.
    for (kinds, what) in [
      (["attn_q", "attn_k", "attn_v"], "the query, key and value"), (["attn_output"], "the output"),
      (["ffn_gate", "ffn_up", "ffn_down"], "the feed-forward"),
    ] {
      let count = (0..<layerCount).reduce(0) { count, layer in
        count + kinds.count { files.tensor("blk.\(layer).\($0).bias") != nil }
      }
      guard count == 0 || count == layerCount * kinds.count && !(expertCount > 0 && kinds[0] == "ffn_gate") else {
        throw unsupported("only some of \(what) projections have biases")
      }
    }
    return names
  }

  static func weightName(_ name: String, layerCount: Int) -> String? {
    if let known = modelNames[name] { return known }
    let parts = name.split(separator: ".", omittingEmptySubsequences: false)
    guard parts.count == 4, parts[0] == "blk", let layer = Int(parts[1]), layer >= 0, layer < layerCount,
      String(layer) == parts[1], let inner = layerNames[String(parts[2])],
      parts[3] == "weight" || parts[3] == "bias" && !parts[2].contains("norm")
    else { return nil }
    return "model.layers.\(layer).\(inner).\(parts[3])"
  }
}
