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
}
