import Apus
import ApusCore
import ApusEngine
import Foundation
import Testing

/// An MLA model behind the whole engine: what is cached, chunked, retracted or shared changes no token.
@Suite struct LatentEngineTests {
  private func generate(
    _ prompts: [[TokenID]], _ change: (inout EngineConfiguration) -> Void = { _ in }
  ) async throws -> [GenerationResult] {
    let directory = FileManager.default.temporaryDirectory.appendingPathComponent("apus-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: directory) }
    let config = """
      {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 32,
       "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3,
       "q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 12,
       "first_k_dense_replace": 2, "vocab_size": 300, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
       "hidden_act": "silu", "torch_dtype": "float32", "initializer_range": 0.3, "eos_token_id": 299}
      """
    try Data(config.utf8).write(to: directory.appendingPathComponent("config.json"))
    var configuration = EngineConfiguration(modelPath: directory.path)
    configuration.loadFormat = .dummy
    configuration.randomSeed = 7
    configuration.contextLength = 512
    change(&configuration)
    func request(_ index: Int) -> Request {
      var sampling = index % 2 == 0 ? SamplingParameters.greedy : SamplingParameters()
      sampling.maxNewTokens = 24
      sampling.seed = UInt64(index)
      sampling.ignoreEOS = true
      return Request(prompt: .tokens(prompts[index]), sampling: sampling)
    }
    return try await withEngine(configuration) { engine in
      // The first one alone, so that the others find its pages.
      var results = [try await engine.generate(request(0)).result()]
      let streams = try (1..<prompts.count).map { try engine.generate(request($0)) }
      for stream in streams { results.append(try await stream.result()) }
      return results
    }
  }

  @Test func cachesChunksAndRetractionsChangeNoToken() async throws {
    let shared = (0..<150).map { TokenID($0 * 37 % 299) }
    var prompts = [shared]
    for n in 1...5 { prompts.append(shared.prefix(n * 29) + [TokenID(n), TokenID(2 * n)]) }
    let plain = try await generate(prompts) {
      $0.enablesPrefixCache = false
      $0.enablesOverlap = false
      $0.maxRunningRequests = 1
    }
    #expect(plain.allSatisfy { $0.tokens.count == 24 && $0.usage.cachedTokens == 0 })
    #expect(Set(plain[0].tokens).count > 3)
    let cached = try await generate(prompts)
    #expect(cached[5].usage.cachedTokens >= 128)
    let chunked = try await generate(prompts) { $0.tokenBudget = 16 }
    // Too few pages for all of them at once.
    let tight = try await generate(prompts) {
      $0.maxTotalTokens = 256
      $0.scheduleConservativeness = 0.1
    }
    for (name, results) in [("cached", cached), ("chunked", chunked), ("tight", tight)] {
      for (index, result) in results.enumerated() {
        #expect(result.tokens == plain[index].tokens, "\(name), request \(index)")
      }
    }
  }
}
