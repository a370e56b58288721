import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import Testing

/// Mixtures of experts behind softmax routers. Their logits against transformers are among `GoldenModelTests`.
struct MixtureTests {
  private static let derived = "models/derived-stories260K-mixtral8"

  /// Equal experts that are all the dense model's feed-forward: the dense model's tokens, whatever the router chooses.
  @Test(.enabled(if: Paths.dataHas(derived)))
  func equalExpertsGiveTheDenseModelsTokens() throws {
    let cases = try Paths.json("\(Paths.data)/\(Self.derived)/golden_greedy.json")["cases"]!.arrayValue!
    var options = ModelOptions(path: "\(Paths.data)/\(Self.derived)")
    options.maxTokensPerStep = 64
    options.maxRunningRequests = 8
    options.kvCacheBytes = 8 << 20
    let loaded = try ModelLoader.load(options, backend: testBackends.last!)
    let requests = cases.map {
      DriverRequest(prompt: $0["prompt_ids"]!.tokenIDs, newTokens: $0["greedy_ids"]!.arrayValue!.count)
    }
    var driver = Driver(model: loaded, generator: SeededGenerator(seed: 4))
    for (number, output) in driver.run(requests).enumerated() {
      #expect(output.tokens == cases[number]["greedy_ids"]!.tokenIDs, "case \(number)")
    }
  }

  @Test func layersWithExperts() throws {
    func read(_ changes: [String: JSONValue]) throws -> ModelConfiguration {
      var config = JSONObject([
        ("architectures", ["Qwen3MoeForCausalLM"]), ("hidden_size", 2048), ("intermediate_size", 6144),
        ("num_hidden_layers", 48), ("num_attention_heads", 32), ("num_key_value_heads", 4), ("head_dim", 128),
        ("vocab_size", 151_936), ("num_experts", 128), ("num_experts_per_tok", 8), ("moe_intermediate_size", 768),
        ("norm_topk_prob", true), ("decoder_sparse_step", 1), ("mlp_only_layers", []),
      ])
      for (key, value) in changes { config[key] = value }
      return try ModelConfiguration(json: .object(config))
    }
    // Qwen3-30B-A3B.
    let whole = try read([:])
    #expect(whole.parameterCount == 30_532_122_624)
    #expect(whole.experts?.normalizes == true && whole.experts?.hasSharedGate == false)
    // The name that transformers 5 writes.
    #expect(try read(["num_experts": .null, "num_local_experts": 64]).experts?.expertCount == 64)
    let some = try #require(try read(["decoder_sparse_step": 3, "mlp_only_layers": [5]]).experts)
    #expect((0..<10).filter(some.covers) == [2, 8])
    // A model none of whose layers has experts is a dense one.
    #expect(try read(["decoder_sparse_step": 49]).experts == nil)
    #expect(try read(["num_experts": 0]).experts == nil)
    for (changes, word) in [
      (["num_experts_per_tok": 129], "num_experts_per_tok"), (["mlp_only_layers": ["x"]], "mlp_only_layers"),
      (["moe_intermediate_size": .null], "moe_intermediate_size"), (["norm_topk_prob": 1], "norm_topk_prob"),
      (["num_experts": -1], "num_experts"), (["decoder_sparse_step": 0], "decoder_sparse_step"),
      (["architectures": ["OlmoeForCausalLM"], "clip_qkv": 8], "clip_qkv"),
    ] as [([String: JSONValue], String)] {
      do {
        _ = try read(changes)
        Issue.record("\(changes) was accepted")
      } catch { #expect("\(error)".contains(word), "\(error)") }
    }
  }

  /// Checkpoints that hold a layer's experts as two tensors, as transformers has them in memory.
  @Test func stackedExpertsAreThoseStoredOneByOne() throws {
    let config = """
      {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
       "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50, "num_experts": 5,
       "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": true, "max_position_embeddings": 64}
      """
    var generator = SeededGenerator(seed: 31)
    func numbers(_ count: Int) -> [Float] { (0..<count).map { _ in .random(in: -0.3...0.3, using: &generator) } }
    let layer = "model.layers.0."
    var common = [
      FileTensor("model.embed_tokens.weight", [50, 32], numbers(50 * 32)),
      FileTensor("lm_head.weight", [50, 32], numbers(50 * 32)), FileTensor("model.norm.weight", [32], numbers(32)),
      FileTensor(layer + "mlp.gate.weight", [5, 32], numbers(5 * 32)),
    ]
    for (name, shape) in [
      ("input_layernorm", [32]), ("post_attention_layernorm", [32]), ("self_attn.q_norm", [16]),
      ("self_attn.k_norm", [16]), ("self_attn.q_proj", [32, 32]), ("self_attn.k_proj", [16, 32]),
      ("self_attn.v_proj", [16, 32]), ("self_attn.o_proj", [32, 32]),
    ] { common.append(FileTensor(layer + name + ".weight", shape, numbers(shape.reduce(1, *)))) }
    var single: [FileTensor] = []
    var gateUp: [Float] = []
    var down: [Float] = []
    for expert in 0..<5 {
      let (gate, up, last) = (numbers(12 * 32), numbers(12 * 32), numbers(32 * 12))
      let name = layer + "mlp.experts.\(expert)."
      single.append(FileTensor(name + "gate_proj.weight", [12, 32], gate))
      single.append(FileTensor(name + "up_proj.weight", [12, 32], up))
      single.append(FileTensor(name + "down_proj.weight", [32, 12], last))
      gateUp += gate + up
      down += last
    }
    let stacked = [
      FileTensor(layer + "mlp.experts.gate_up_proj", [5, 24, 32], gateUp),
      FileTensor(layer + "mlp.experts.down_proj", [5, 32, 12], down),
    ]
    func logits(_ experts: [FileTensor]) throws -> [[Float]] {
      let directory = try TemporaryDirectory()
      try directory.write("config.json", config)
      try directory.write("model.safetensors", safetensors(common + experts))
      var options = ModelOptions(path: directory.path)
      options.kvCacheBytes = 1 << 20
      let loaded = try ModelLoader.load(options, backend: testBackends.last!)
      return try loaded.steps.promptLogits([1, 17, 5, 33, 8, 41, 2], positions: [0, 3, 6])
    }
    let wanted = try logits(single)
    #expect(Set(wanted[0]).count > 30)
    #expect(try logits(stacked) == wanted)
  }

  // MARK: Dispatch

  static let mixture: [String: JSONValue] = [
    "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 23,
    "shared_expert_intermediate_size": 30, "norm_topk_prob": true,
  ]

  /// Both forms of dispatch, and any places of the experts' weights, give the same bits.
  @Test func dispatchAndPlacesChangeNothing() throws {
    var generator = SeededGenerator(seed: 71)
    let slots = (0..<2).map { _ in (Array(0..<10) + [3, 3, 7, 0]).shuffled(using: &generator) }
    let location = try ExpertLocation(expertOfSlot: slots, expertCount: 10)
    let prompt = (0..<40).map { _ in TokenID.random(in: 0..<61, using: &generator) }
    let probes = Array(prompt.indices)
    for backend in testBackends {
      var wanted: [[Float]]?
      for (place, mode) in [
        (nil, .normal), (nil, .lowLatency(capacity: 64)), (location, .normal), (location, .lowLatency(capacity: 64)),
        (location, .auto(capacity: 8)),
      ] as [(ExpertLocation?, ExpertDispatchMode)] {
        let loaded = try makeTinyModel(Self.mixture, backend: backend) {
          $0.experts = ExpertOptions(location: place, dispatch: mode)
        }
        for chunk in [40, 7] {
          let found = try loaded.steps.promptLogits(prompt, positions: probes, chunk: chunk)
          if wanted == nil { wanted = found }
          let isEqual = found == wanted
          #expect(isEqual, "\(mode), \(place == nil ? "identity" : "replicas"), chunks of \(chunk) on \(backend.name)")
        }
      }
      #expect(Set(wanted!.map { $0[0] }).count > 20)
    }
  }

  /// What a server can be told about places: the same bits, and the busiest experts get the replicas.
  @Test func placesFromOptionsChangeNothing() throws {
    let prompt: [TokenID] = [3, 60, 7, 7, 1, 42, 0, 13, 22, 9, 17, 5]
    let probes = Array(prompt.indices)
    let directory = try TemporaryDirectory()
    let busy = (0..<2).map { layer in (0..<10).map { ($0 * 7 + layer * 3) % 10 * 100 } }
    func list(_ layers: [[Int]]) -> String { "\(layers)" }
    try directory.write("counts.json", #"{"logical_count": \#(list(busy)), "physical_to_logical_map": [[9]]}"#)
    let slots = Array((0..<10).reversed()) + [4, 4]
    try directory.write("map.json", #"{"physical_to_logical_map": \#(list([slots, slots]))}"#)
    let wanted = try makeTinyModel(Self.mixture).steps.promptLogits(prompt, positions: probes)
    #expect(Set(wanted.map { $0[0] }).count > 8)
    for (redundant, file, lastSlots) in [
      (3, nil, [0, 1, 2]), (3, "counts.json", []), (2, "map.json", [4, 4]),
    ] as [(Int, String?, [Int])] {
      for dispatch in [ExpertDispatchMode.normal, .auto(capacity: 4), .lowLatency(capacity: 64)] {
        let loaded = try makeTinyModel(Self.mixture) {
          $0.redundantExperts = redundant
          $0.expertLocationPath = file.map { "\(directory.path)/\($0)" }
          $0.experts.dispatch = dispatch
          $0.expertRecorderMode = .stat
        }
        let recorder = try #require(loaded.expertRecorder)
        recorder.start()
        let isEqual = try loaded.steps.promptLogits(prompt, positions: probes) == wanted
        #expect(isEqual, "\(redundant) redundant, \(file ?? "trivial"), \(dispatch)")
        let places = recorder.dump()["physical_to_logical_map"]!.arrayValue![0].arrayValue!.compactMap(\.intValue)
        if file == "counts.json" {
          // Layer 0: 900 tokens for expert 7, 800 for 4, 700 for 1, and half of 900 is less than each.
          #expect(places.count == 13 && places.suffix(3) == [7, 4, 1])
        } else {
          #expect(places.suffix(lastSlots.count) == lastSlots[...])
        }
      }
    }
    // A prediction layer lies behind the last layer of the map.
    let drafting = try makeTinyModel([
      "architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 20,
      "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "first_k_dense_replace": 1,
      "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 22, "n_group": 4,
      "topk_group": 2, "num_nextn_predict_layers": 1,
    ]) {
      $0.redundantExperts = 3
      $0.drafting = .prediction
    }
    #expect(drafting.steps.draft(behind: prompt, count: 3).count == 3)
  }

  @Test func placesThatFilesCannotMean() throws {
    let directory = try TemporaryDirectory()
    for (text, word) in [
      ("[", "not JSON"), ("{}", "neither"), (#"{"logical_count": [[1, 2]]}"#, "layers"),
      (#"{"logical_count": [[1, 2], [3, 4]]}"#, "10 experts"), (#"{"logical_count": [[1, "x"], [1]]}"#, "integers"),
      (#"{"physical_to_logical_map": [[0], [0]]}"#, "slots"),
    ] {
      try directory.write("x.json", text)
      do {
        _ = try makeTinyModel(Self.mixture) { $0.expertLocationPath = directory.path + "/x.json" }
        Issue.record("\(text) was accepted")
      } catch { #expect("\(error)".contains(word), "\(error)") }
    }
    for path in [nil, directory.path + "/none.json"] as [String?] {
      #expect(throws: EngineError.self) {
        _ = try makeTinyModel(path == nil ? [:] : Self.mixture) {
          $0.redundantExperts = 1
          $0.expertLocationPath = path
        }
      }
    }
  }

  @Test func graniteConfigurations() throws {
    func read(_ changes: [String: JSONValue]) throws -> ModelConfiguration {
      // granite-3.1-1b-a400m.
      var config = JSONObject([
        ("architectures", ["GraniteMoeForCausalLM"]), ("hidden_size", 1024), ("intermediate_size", 512),
        ("num_hidden_layers", 24), ("num_attention_heads", 16), ("num_key_value_heads", 8), ("vocab_size", 49_155),
        ("num_local_experts", 32), ("num_experts_per_tok", 8), ("tie_word_embeddings", true),
        ("attention_multiplier", 0.015625), ("embedding_multiplier", 12), ("residual_multiplier", 0.22),
        ("logits_scaling", 6),
      ])
      for (key, value) in changes { config[key] = value }
      return try ModelConfiguration(json: .object(config))
    }
    let small = try read([:])
    #expect(small.parameterCount == 1_334_628_352)
    #expect(small.attentionScale == 0.015625 && small.embeddingMultiplier == 12 && small.logitsScaling == 6)
    #expect(small.experts?.score == .softmaxOfChosen && small.experts?.sharedIntermediateSize == 0)
    let shared = try read([
      "architectures": ["GraniteMoeSharedForCausalLM"], "shared_intermediate_size": 1024,
    ])
    #expect(shared.experts?.sharedIntermediateSize == 1024)
    for (changes, word) in [
      (["logits_scaling": 0], "logits_scaling"), (["residual_multiplier": "x"], "residual_multiplier"),
      (["num_experts_per_tok": 33], "num_experts_per_tok"),
    ] as [([String: JSONValue], String)] {
      do {
        _ = try read(changes)
        Issue.record("\(changes) was accepted")
      } catch { #expect("\(error)".contains(word), "\(error)") }
    }
  }

  @Test func impossiblePlacesAreRefused() throws {
    for (slots, word) in [
      ([[0, 1], [0, 1, 1]], "slots"), ([[0, 2]], "expert 2"), ([[0, 0]], "expert 1"),
    ] {
      do {
        _ = try ExpertLocation(expertOfSlot: slots, expertCount: 2)
        Issue.record("\(slots) was accepted")
      } catch { #expect("\(error)".contains(word), "\(error)") }
    }
    #expect(throws: EngineError.self) {
      _ = try makeTinyModel(Self.mixture) { $0.experts.dispatch = .lowLatency(capacity: 63) }
    }
  }

  // MARK: Loads

  @Test(.enabled(if: Paths.dataHas(derived)))
  func loadsAreThoseRecordedElsewhere() throws {
    var options = ModelOptions(path: "\(Paths.data)/\(Self.derived)")
    options.maxTokensPerStep = 64
    options.kvCacheBytes = 8 << 20
    options.expertRecorderMode = .stat
    let loaded = try ModelLoader.load(options, backend: testBackends.last!)
    let recorder = try #require(loaded.expertRecorder)
    for entry in try Paths.json("\(Paths.data)/\(Self.derived)/golden_greedy.json")["cases"]!.arrayValue! {
      recorder.start()
      _ = try loaded.steps.promptLogits(entry["prompt_ids"]!.tokenIDs + entry["greedy_ids"]!.tokenIDs, positions: [0])
      let wanted = entry["expert_load"]!.arrayValue!.map { $0.arrayValue!.map { $0.intValue! } }
      #expect(recorder.logicalCounts == wanted)
    }
  }

  @Test func recorderModes() throws {
    let location = try ExpertLocation(
      expertOfSlot: [Array(0..<10) + [2, 2], Array(0..<10) + [9, 0]], expertCount: 10)
    let prompt = (0..<30).map { TokenID(($0 * 17 + 3) % 61) }
    var totals: [ExpertLoadRecorder.Mode: [[Int]]] = [:]
    for mode in ExpertLoadRecorder.Mode.allCases {
      let loaded = try makeTinyModel(Self.mixture) {
        $0.experts.location = location
        $0.expertRecorderMode = mode
        $0.expertRecorderBufferSize = 2
      }
      let recorder = try #require(loaded.expertRecorder)
      // Nothing is recorded before the start.
      _ = try loaded.steps.promptLogits(prompt, positions: [0])
      #expect(recorder.logicalCounts.joined().allSatisfy { $0 == 0 } && recorder.balancedness(ranks: 4) == nil)
      recorder.start()
      _ = try loaded.steps.promptLogits(prompt, positions: [0], chunk: 10)
      recorder.stop()
      _ = try loaded.steps.promptLogits(prompt, positions: [0])
      totals[mode] = recorder.logicalCounts
      let balancedness = try #require(recorder.balancedness(ranks: 4))
      #expect(balancedness > 0.25 && balancedness < 1 && recorder.balancedness(ranks: 1) == 1)
      #expect(recorder.balancedness(ranks: 5) == nil)

      let dump = recorder.dump()
      #expect(dump["mode"]?.stringValue == mode.rawValue)
      #expect(dump["pass_count"]?.intValue == 3 && dump["token_count"]?.intValue == 30)
      func numbers(_ value: JSONValue?) -> [[Int]] {
        (value?.arrayValue ?? []).map { ($0.arrayValue ?? []).map { $0.intValue! } }
      }
      #expect(numbers(dump["logical_count"]) == totals[mode])
      #expect(numbers(dump["physical_to_logical_map"]) == location.expertOfSlot)
      let physical = numbers(dump["physical_count"])
      #expect(physical.allSatisfy { $0.count == 12 && $0.reduce(0, +) == 90 })
      // Replicas share an expert's tokens.
      #expect(physical[0][2] + physical[0][10] + physical[0][11] == totals[mode]![0][2])
      // The two newest passes.
      let records = dump["records"]?.arrayValue
      switch mode {
      case .stat: #expect(records == nil)
      case .perPass:
        #expect(records?.map { $0["forward_pass_id"]?.intValue } == [2, 3])
        for record in records! {
          #expect(numbers(record["physical_count"]).allSatisfy { $0.reduce(0, +) == 30 })
        }
      case .perToken:
        #expect(records?.map { $0["input_ids"]!.tokenIDs } == [Array(prompt[10..<20]), Array(prompt[20...])])
        #expect(records?[1]["positions"]?.arrayValue?.first?.intValue == 20)
        let chosen = records?[1]["topk_ids_of_layer"]?.arrayValue
        #expect(chosen?.count == 2 && numbers(chosen?[1]).count == 10)
        #expect(numbers(chosen?[0]).allSatisfy { $0 == Array(Set($0)).sorted() && $0.count == 3 })
      }
      // A dump begins anew.
      #expect(recorder.dump()["pass_count"]?.intValue == 0)
    }
    #expect(totals[.stat] == totals[.perPass] && totals[.stat] == totals[.perToken])
    #expect(totals[.stat]!.allSatisfy { $0.reduce(0, +) == 90 })
    #expect(throws: EngineError.self) { _ = try makeTinyModel { $0.expertRecorderMode = .stat } }
  }

  // MARK: gpt-oss

  /// MXFP4 experts against a checkpoint that stores the numbers they stand for, inputs by outputs.
  @Test func blocksOfMXFP4AreThoseOfTheDequantisedModel() throws {
    let (hidden, width, experts) = (64, 32, 3)
    let fields = """
      "architectures": ["GptOssForCausalLM"], "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1,
      "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50, "num_local_experts": 3,
      "num_experts_per_tok": 2, "max_position_embeddings": 64, "sliding_window": 4, "swiglu_limit": 7.0,
      "rope_scaling": {"rope_type": "default"}, "layer_types": ["sliding_attention"]
      """
    var generator = SeededGenerator(seed: 91)
    func numbers(_ count: Int) -> [Float] { (0..<count).map { _ in .random(in: -0.3...0.3, using: &generator) } }
    let layer = "model.layers.0."
    var common = [
      FileTensor("model.embed_tokens.weight", [50, hidden], numbers(50 * hidden)),
      FileTensor("lm_head.weight", [50, hidden], numbers(50 * hidden)),
    ]
    for (name, shape) in [
      ("input_layernorm.weight", [hidden]), ("post_attention_layernorm.weight", [hidden]),
      ("self_attn.q_proj.weight", [48, hidden]), ("self_attn.k_proj.weight", [16, hidden]),
      ("self_attn.v_proj.weight", [16, hidden]), ("self_attn.o_proj.weight", [hidden, 48]),
      ("self_attn.q_proj.bias", [48]), ("self_attn.k_proj.bias", [16]), ("self_attn.v_proj.bias", [16]),
      ("self_attn.o_proj.bias", [hidden]), ("self_attn.sinks", [3]), ("mlp.router.weight", [experts, hidden]),
      ("mlp.router.bias", [experts]), ("mlp.experts.gate_up_proj_bias", [experts, 2 * width]),
      ("mlp.experts.down_proj_bias", [experts, hidden]),
    ] { common.append(FileTensor(layer + name, shape, numbers(shape.reduce(1, *)))) }
    common.append(FileTensor("model.norm.weight", [hidden], numbers(hidden)))

    let levels: [Float] = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    var blocks: [FileTensor] = []
    var plain: [FileTensor] = []
    for (name, outputs, inputs) in [("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)] {
      let path = "\(layer)mlp.experts.\(name)"
      let codes = (0..<experts * outputs * inputs / 2).map { _ in UInt8.random(in: 0...255, using: &generator) }
      let exponents = (0..<experts * outputs * inputs / 32).map { _ in UInt8.random(in: 122...125, using: &generator) }
      blocks.append(FileTensor(path + "_blocks", type: "U8", [experts, outputs, inputs / 32, 16], codes))
      blocks.append(FileTensor(path + "_scales", type: "U8", [experts, outputs, inputs / 32], exponents))
      var turned = [Float](repeating: 0, count: experts * inputs * outputs)
      for expert in 0..<experts {
        for output in 0..<outputs {
          for input in 0..<inputs {
            let place = (expert * outputs + output) * inputs + input
            let code = codes[place / 2] >> (place % 2 == 0 ? 0 : 4) & 15
            let magnitude =
              levels[Int(code & 7)] * Float(sign: .plus, exponent: Int(exponents[place / 32]) - 127, significand: 1)
            turned[(expert * inputs + input) * outputs + output] = code & 8 == 0 ? magnitude : -magnitude
          }
        }
      }
      plain.append(FileTensor(path, [experts, inputs, outputs], turned))
    }
    func logits(
      _ config: String, _ tensors: [FileTensor], _ quantization: WeightQuantization, _ backend: any Backend
    ) throws -> [Float] {
      let directory = try TemporaryDirectory()
      try directory.write("config.json", "{\(config)}")
      try directory.write("model.safetensors", safetensors(common + tensors))
      var options = ModelOptions(path: directory.path)
      options.quantization = quantization
      options.kvCacheBytes = 1 << 20
      let loaded = try ModelLoader.load(options, backend: backend)
      return try loaded.steps.promptLogits([1, 17, 5, 33, 8, 41, 2, 9, 30], positions: [0, 4, 8]).flatMap { $0 }
    }
    let quantized = fields + #", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}"#
    for backend in [testBackends.first!, testBackends.last!] {
      let wanted = try logits(fields, plain, .stored, backend)
      #expect(wanted.allSatisfy(\.isFinite) && Set(wanted).count > 100)
      // As plain numbers: every bit.
      let dense = try logits(quantized, blocks, .dense, backend)
      #expect(dense == wanted, "\(backend.name)")
      // As they are stored: the same up to the rounding of activations.
      let found = try logits(quantized, blocks, .stored, backend)
      let error = zip(found, wanted).reduce(Float(0)) { $0 + ($1.0 - $1.1) * ($1.0 - $1.1) }
      let total = wanted.reduce(Float(0)) { $0 + $1 * $1 }
      #expect(error < 0.001 * total, "\(backend.name): \((error / total).squareRoot())")
    }
  }

  @Test func gptOssConfigurations() throws {
    func read(_ changes: [String: JSONValue]) throws -> ModelConfiguration {
      var config = JSONObject([
        ("architectures", ["GptOssForCausalLM"]), ("hidden_size", 2880), ("intermediate_size", 2880),
        ("num_hidden_layers", 24), ("num_attention_heads", 64), ("num_key_value_heads", 8), ("head_dim", 64),
        ("vocab_size", 201_088), ("num_local_experts", 32), ("num_experts_per_tok", 4), ("attention_bias", true),
        ("sliding_window", 128), ("swiglu_limit", 7.0), ("quantization_config", ["quant_method": "mxfp4"]),
        ("rope_scaling", ["rope_type": "yarn", "factor": 32, "original_max_position_embeddings": 4096]),
      ])
      for (key, value) in changes { config[key] = value }
      return try ModelConfiguration(json: .object(config))
    }
    let small = try read([:])
    #expect(small.parameterCount == 20_914_757_184)
    #expect(small.hasSinks && small.quantization == nil && small.slidingWindows.prefix(3) == [128, 0, 128])
    #expect(small.experts?.activation == .clampedSwiGLU(alpha: 1.702, limit: 7))
    for (changes, word) in [
      (["swiglu_limit": 0], "swiglu_limit"), (["rope_scaling": .null], "rope_scaling"),
      (["layer_types": ["full_attention"]], "layer_types"), (["num_experts_per_tok": 33], "num_experts_per_tok"),
      (["quantization_config": ["quant_method": "quark"]], "Quark"),
    ] as [([String: JSONValue], String)] {
      do {
        _ = try read(changes)
        Issue.record("\(changes) was accepted")
      } catch { #expect("\(error)".contains(word), "\(error)") }
    }
    // The method is that of these experts alone.
    #expect(throws: EngineError.self) {
      _ = try makeTinyModel(["quantization_config": ["quant_method": "mxfp4"]])
    }
  }
}
