import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import Testing

/// Models with multi-head latent attention. Their logits against transformers are among `GoldenModelTests`.
struct LatentModelTests {
  /// DeepSeek-V3's layers without experts.
  static let dense: [String: JSONValue] = [
    "architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 24,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 12, "first_k_dense_replace": 9,
    "rope_scaling": [
      "type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "mscale": 1, "mscale_all_dim": 1,
    ],
  ]

  /// With experts in groups behind one dense layer.
  static let sparse = dense.merging([
    "first_k_dense_replace": 1, "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "n_shared_experts": 1, "moe_intermediate_size": 17, "norm_topk_prob": true, "routed_scaling_factor": 2.5,
  ]) { $1 }

  @Test func theCacheHoldsLatentsAlone() throws {
    let loaded = try makeTinyModel(Self.dense) { $0.kvDType = .bfloat16 }
    // Two layers of 24 + 6 numbers of two bytes.
    #expect(loaded.description.kvBytesPerToken == 2 * 30 * 2)
    #expect(loaded.steps.pool.byteCount == loaded.description.kvCapacityTokens * 120)
    #expect(loaded.steps.pool.layers.allSatisfy { $0.isLatent && $0.headDimension == 30 && $0.valueDimension == 24 })
  }

  @Test func configurationsAreRead() throws {
    func read(_ changes: [String: JSONValue]) throws -> ModelConfiguration {
      var config = JSONObject([
        ("architectures", ["DeepseekV3ForCausalLM"]), ("hidden_size", 7168), ("intermediate_size", 18432),
        ("num_hidden_layers", 3), ("num_attention_heads", 128), ("num_key_value_heads", 128), ("vocab_size", 129_280),
        ("max_position_embeddings", 163_840), ("first_k_dense_replace", 3), ("rope_theta", 10000),
        (
          "rope_scaling",
          [
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
          ]
        ),
      ])
      for (key, value) in changes { config[key] = value }
      return try ModelConfiguration(json: .object(config))
    }
    let v3 = try read([:])
    let sizes = try #require(v3.latentAttention)
    #expect(sizes.queryRank == 1536 && sizes.latentRank == 512 && sizes.cacheDimension == 576 && sizes.isInterleaved)
    #expect(v3.headDimension == 192 && v3.rotary.rotaryDimension == 64 && v3.kvNumbersPerToken == 3 * 576)
    // (0.1 ln 40 + 1)^2 / sqrt(192).
    #expect(abs(sizes.scale - 0.135234) < 1e-6)
    // 187.11 million weights of attention in a layer, 396.36 million in the feed-forward part.
    let attention = 7168 * 1536 + 1536 + 1536 * 24576 + 7168 * 576 + 512 + 512 * 32768 + 16384 * 7168
    #expect(
      v3.parameterCount == 3 * (attention + 3 * 7168 * 18432 + 2 * 7168) + 7168 + 2 * 129_280 * 7168)
    // V2-Lite: null means no matrix between hidden state and query; the family is also known by its type.
    let lite = try read([
      "architectures": .null, "model_type": "deepseek_v2", "q_lora_rank": .null, "rope_scaling": .null,
      "first_k_dense_replace": 3,
    ])
    #expect(lite.latentAttention?.queryRank == nil && lite.architecture == "DeepseekV2ForCausalLM")
    #expect(abs(lite.latentAttention!.scale - 1 / Float(192).squareRoot()) < 1e-7)
    for (changes, word) in [
      (["kv_lora_rank": 0], "kv_lora_rank"), (["v_head_dim": "x"], "v_head_dim"),
      (["rope_interleave": 1], "rope_interleave"),
      (["qk_rope_head_dim": 63], "rotated"),
    ] as [([String: JSONValue], String)] {
      do {
        _ = try read(changes)
        Issue.record("\(changes) was accepted")
      } catch { #expect("\(error)".contains(word), "\(error)") }
    }
  }

  @Test func expertsAreRead() throws {
    func read(_ architecture: JSONValue, _ changes: [String: JSONValue]) throws -> ModelConfiguration {
      var config = JSONObject([
        ("architectures", [architecture]), ("hidden_size", 2048), ("intermediate_size", 10944),
        ("num_hidden_layers", 27),
        ("num_attention_heads", 16), ("num_key_value_heads", 16), ("vocab_size", 102_400), ("q_lora_rank", .null),
        ("max_position_embeddings", 163_840), ("first_k_dense_replace", 1), ("n_routed_experts", 64),
        ("num_experts_per_tok", 6), ("n_group", 1), ("topk_group", 1), ("n_shared_experts", 2),
        ("moe_intermediate_size", 1408), ("moe_layer_freq", 1), ("norm_topk_prob", false),
        ("routed_scaling_factor", 1.0),
      ])
      for (key, value) in changes { config[key] = value }
      return try ModelConfiguration(json: .object(config))
    }
    // V2-Lite has 15.7 billion parameters.
    let lite = try read("DeepseekV2ForCausalLM", ["topk_method": "greedy", "scoring_func": "softmax"])
    let experts = try #require(lite.experts)
    #expect(experts.score == .softmax && !experts.hasCorrection && !experts.normalizes && experts.scale == 1)
    #expect(experts.sharedIntermediateSize == 2816 && !experts.covers(layer: 0) && experts.covers(layer: 26))
    #expect(lite.parameterCount == 15_706_484_224)
    // V3 has 671.03 billion.
    let v3 = try read(
      "DeepseekV3ForCausalLM",
      [
        "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 128,
        "vocab_size": 129_280, "q_lora_rank": 1536, "first_k_dense_replace": 3, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "n_shared_experts": 1, "moe_intermediate_size": 2048,
        "norm_topk_prob": true, "routed_scaling_factor": 2.5, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
      ])
    #expect(v3.experts?.hasCorrection == true && v3.experts?.groupsPerToken == 4)
    #expect(v3.parameterCount / 10_000_000 == 67_102)
    for (changes, word) in [
      (["n_routed_experts": .null], "n_routed_experts"), (["n_group": 7], "n_group"), (["topk_group": 2], "topk_group"),
      (["num_experts_per_tok": 65], "num_experts_per_tok"), (["topk_method": "best"], "topk_method"),
      (["scoring_func": "softmax"], "scoring_func"), (["first_k_dense_replace": -1], "first_k_dense_replace"),
      (["n_group": 64, "topk_group": 64], "n_group"),
    ] as [([String: JSONValue], String)] {
      do {
        _ = try read("DeepseekV3ForCausalLM", changes)
        Issue.record("\(changes) was accepted")
      } catch { #expect("\(error)".contains(word), "\(error)") }
    }
    #expect(throws: EngineError.self) { _ = try read("DeepseekV2ForCausalLM", ["norm_topk_prob": true]) }
  }

  @Test func cachesOfEightBitsAreRefused() {
    for backend in [testBackends.first!, testBackends.last!] {
      for dtype in [DType.int8, .float8] {
        do {
          _ = try makeTinyModel(Self.dense, backend: backend) { $0.kvDType = dtype }
          Issue.record("\(dtype.name) was accepted")
        } catch {
          #expect(
            (error as? EngineError)?.code == .unsupported && (error as? EngineError)?.parameter == "kv_cache_dtype")
        }
      }
    }
  }

  /// A model wide enough that kernels split their work: chunks, company and numbers of threads change no bit.
  @Test(arguments: [WeightQuantization.stored, .int8])
  func threadsAndChunksChangeNothing(quantization: WeightQuantization) throws {
    var changes = Self.sparse
    changes["hidden_size"] = 200
    changes["num_attention_heads"] = 5
    changes["num_key_value_heads"] = 5
    changes["kv_lora_rank"] = 64
    changes["initializer_range"] = 0.08
    changes["max_position_embeddings"] = 512
    var generator = SeededGenerator(seed: 41)
    let prompt = (0..<300).map { _ in TokenID.random(in: 0..<61, using: &generator) }
    let probes = [0, 1, 15, 16, 89, 254, 255, 256, 257, 299]
    let requests = (1...4).map { DriverRequest(prompt: Array(prompt[..<($0 * 13)]), newTokens: 3) }
    for level in InstructionSet.allCases where level.isSupported {
      var expectedLogits: [[Float]] = []
      var expectedOutputs: [DriverOutput] = []
      for threads in [1, 3] {
        let loaded = try makeTinyModel(changes, backend: CPUBackend(threads: threads, isa: level)) {
          $0.dtype = .bfloat16
          $0.quantization = quantization
          $0.maxTokensPerStep = 300
        }
        let whole = try loaded.steps.promptLogits(prompt, positions: probes)
        var driver = Driver(
          model: loaded, generator: SeededGenerator(seed: 51 + UInt64(threads)), largestChunk: 10 * threads)
        let outputs = driver.run(requests)
        if threads == 1 { (expectedLogits, expectedOutputs) = (whole, outputs) }
        #expect(whole == expectedLogits, "\(level.name), \(threads) threads")
        #expect(outputs == expectedOutputs, "\(level.name), \(threads) threads")
        for chunk in [7, 64] {
          let chunked = try loaded.steps.promptLogits(prompt, positions: probes, chunk: chunk)
          #expect(chunked == expectedLogits, "\(level.name), \(threads) threads, chunks of \(chunk)")
        }
      }
    }
  }

  /// A request that comes back after a retraction computes its output again as if it were prompt.
  @Test func recomputedOutputChangesNothing() throws {
    for backend in testBackends {
      let loaded = try makeTinyModel(Self.sparse, backend: backend)
      let prompt: [TokenID] = [3, 9, 27, 20, 60, 58, 52, 34]
      func run(_ given: [TokenID], _ count: Int) -> [TokenID] {
        var driver = Driver(model: loaded, generator: SeededGenerator(seed: 5))
        var request = DriverRequest(prompt: prompt, newTokens: count)
        request.givenOutput = given
        request.sampling.temperature = 1
        request.sampling.seed = 77
        return driver.run([request])[0].tokens
      }
      let whole = run([], 20)
      for kept in [1, 7, 16] { #expect(Array(whole[..<kept]) + run(Array(whole[..<kept]), 20 - kept) == whole) }
    }
  }

  /// fp8 with a scale for each block of 128 x 128, as DeepSeek-V3 is published, against the same model with its matrices
  /// stored as float32. The matrix that expands latents is split and turned while it is loaded.
  @Test func blocksOfFloat8AreThoseOfTheDequantisedModel() throws {
    var config = JSONObject(Array(Self.dense).sorted { $0.key < $1.key }.map { ($0.key, $0.value) })
    for (key, value) in [
      ("hidden_size", 160), ("intermediate_size", 200), ("num_hidden_layers", 2), ("num_attention_heads", 9),
      ("num_key_value_heads", 9), ("vocab_size", 61), ("max_position_embeddings", 256), ("q_lora_rank", 140),
      ("kv_lora_rank", 136), ("eos_token_id", 3),
    ] as [(String, JSONValue)] { config[key] = value }
    let dense = try TemporaryDirectory()
    try dense.write("config.json", Self.text(.object(config)))
    config["quantization_config"] = [
      "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
    ]
    let quantized = try TemporaryDirectory()
    try quantized.write("config.json", Self.text(.object(config)))
    let quantization = try #require(try ModelConfiguration(directory: quantized.path).quantization)

    var generator = SeededGenerator(seed: 61)
    var stored: [FileTensor] = []
    var plain: [FileTensor] = []
    var matrices: [(String, [Int])] = []
    func add(_ name: String, _ shape: [Int]) {
      let range: ClosedRange<Float> = shape.count == 2 ? -0.3...0.3 : 0.5...1.5
      let tensor = FileTensor(
        name, shape, (0..<shape.reduce(1, *)).map { _ in .random(in: range, using: &generator) })
      stored.append(tensor)
      plain.append(tensor)
    }
    func addBlocks(_ module: String, _ outputs: Int, _ inputs: Int) {
      let blocks = [(outputs + 127) / 128, (inputs + 127) / 128]
      stored.append(
        FileTensor(
          module + ".weight", type: "F8_E4M3", [outputs, inputs],
          (0..<outputs * inputs).map { _ in UInt8.random(in: 0...255, using: &generator) & 0xBF }))
      stored.append(
        FileTensor(
          module + ".weight_scale_inv", blocks,
          (0..<blocks[0] * blocks[1]).map { _ in .random(in: 0.01...0.06, using: &generator) }))
      matrices.append((module + ".weight", [outputs, inputs]))
    }
    add("model.embed_tokens.weight", [61, 160])
    for layer in 0..<2 {
      let name = "model.layers.\(layer)."
      add(name + "input_layernorm.weight", [160])
      add(name + "post_attention_layernorm.weight", [160])
      add(name + "self_attn.q_a_layernorm.weight", [140])
      add(name + "self_attn.kv_a_layernorm.weight", [136])
      addBlocks(name + "self_attn.q_a_proj", 140, 160)
      addBlocks(name + "self_attn.q_b_proj", 9 * 16, 140)
      addBlocks(name + "self_attn.kv_a_proj_with_mqa", 142, 160)
      addBlocks(name + "self_attn.kv_b_proj", 9 * 22, 136)
      addBlocks(name + "self_attn.o_proj", 160, 9 * 12)
      addBlocks(name + "mlp.gate_proj", 200, 160)
      addBlocks(name + "mlp.up_proj", 200, 160)
      addBlocks(name + "mlp.down_proj", 160, 200)
    }
    add("model.norm.weight", [160])
    add("lm_head.weight", [61, 160])
    try quantized.write("model.safetensors", safetensors(stored))
    let store = QuantizedCheckpoint(try SafetensorsCheckpoint(directory: quantized.path), quantization)
    for (name, shape) in matrices {
      let source = try store.load(name, shape: shape, role: .matrix)
      let bytes = withExtendedLifetime(source.owner) {
        Array(UnsafeRawBufferPointer(start: source.address, count: 4 * shape[0] * shape[1]))
      }
      plain.append(FileTensor(name, type: "F32", shape, bytes))
    }
    try dense.write("model.safetensors", safetensors(plain))

    let prompt: [TokenID] = [1, 17, 5, 60, 33, 8, 8, 41, 2]
    for backend in [testBackends.first!, testBackends.last!] {
      func logits(_ path: String, _ dtype: DType?, _ quantization: WeightQuantization) throws -> [[Float]] {
        var options = ModelOptions(path: path)
        options.dtype = dtype
        options.quantization = quantization
        options.kvCacheBytes = 1 << 20
        let loaded = try ModelLoader.load(options, backend: backend)
        if quantization == .stored, path == quantized.path { #expect(loaded.description.dtype.contains("float8")) }
        return try loaded.steps.promptLogits(prompt, positions: [0, 4, 8])
      }
      // As plain numbers: every bit.
      for dtype in [DType.float32, .bfloat16] {
        let found = try logits(quantized.path, dtype, .dense)
        #expect(found == (try logits(dense.path, dtype, .stored)), "\(dtype.name) on \(backend.name)")
        #expect(found.allSatisfy { $0.allSatisfy(\.isFinite) } && Set(found[0]).count > 30)
      }
      // As it is stored: the same up to the rounding of activations.
      let found = try logits(quantized.path, nil, .stored).flatMap { $0 }
      let wanted = try logits(quantized.path, nil, .dense).flatMap { $0 }
      let error = zip(found, wanted).reduce(Float(0)) { $0 + ($1.0 - $1.1) * ($1.0 - $1.1) }
      let total = wanted.reduce(Float(0)) { $0 + $1 * $1 }
      #expect(error < 0.01 * total, "\(backend.name): \((error / total).squareRoot())")
    }
  }

  private static func text(_ json: JSONValue) -> String {
    var writer = JSONWriter()
    writer.value(json)
    return writer.text
  }
}
