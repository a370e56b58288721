import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import Testing

/// Mixtures of experts in GGUF files: layers for multi-token prediction, and experts in quantised types.
struct GGUFMixtureTests {
  @Test func predictionLayersAreThoseOfTheOriginal() throws {
    let folder = try GGUFTests.Folder()
    let config = GGUFTests.config(GGUFTests.glm + [("use_qk_norm", true)])
    let store = DummyWeights(seed: 77, initializerRange: 0.2)
    let prompt: [TokenID] = [3, 60, 7, 7, 1, 42, 0, 13, 22, 9]
    var options = GGUFTests.options("")
    options.drafting = .prediction
    func drafts(_ loaded: LoadedModel) -> (tokens: [TokenID], logits: [[Float]]) {
      var rows: [[Float]] = []
      loaded.steps.observeDraftLogits { rows.append($0) }
      return (loaded.steps.draft(behind: prompt, count: 3), rows)
    }
    let wanted = drafts(
      try ModelLoader.load(
        ModelConfiguration(json: .object(config)), store: store, options: options, backend: testBackends.last!))
    #expect(wanted.tokens.count == 3 && wanted.logits.count == 3 && Set(wanted.logits[0]).count > 30)
    var builder = try GGUFTests.builder("glm4moe", config, store: store)
    options.path = try folder.write("m.gguf", builder.build().bytes)
    let found = drafts(try ModelLoader.load(options, backend: testBackends.last!))
    #expect(found.tokens == wanted.tokens)
    let isEqual = found.logits == wanted.logits
    #expect(isEqual)

    // A layer with a head of its own drafts with that.
    let head = try store.load("another head", shape: [61, 32], role: .matrix)
    let bytes = withExtendedLifetime(head.owner) {
      Array(UnsafeRawBufferPointer(start: head.address, count: 61 * 32 * 4))
    }
    builder.tensors.append(("blk.2.nextn.shared_head_head.weight", [32, 61], 0, bytes))
    options.path = try folder.write("head.gguf", builder.build().bytes)
    let other = drafts(try ModelLoader.load(options, backend: testBackends.last!))
    #expect(other.logits != wanted.logits)

    // Files that leave the layer out count it all the same; they serve, but cannot draft.
    builder.tensors.removeAll { $0.name.hasPrefix("blk.2.") }
    options.path = try folder.write("without.gguf", builder.build().bytes)
    let error = #expect(throws: EngineError.self) { try ModelLoader.load(options, backend: testBackends.last!) }
    #expect(error?.message.contains("no layer for multi-token prediction") == true)
    options.drafting = .none
    #expect(try ModelLoader.load(options, backend: testBackends.last!).description.layerCount == 2)
  }

  @Test func predictionLayersThatCannotBe() throws {
    let folder = try GGUFTests.Folder()
    let store = DummyWeights(seed: 77, initializerRange: 0.2)
    let glm = try GGUFTests.builder("glm4moe", GGUFTests.config(GGUFTests.glm), store: store)
    let llama = try GGUFTests.builder(
      "llama", GGUFTests.config([("architectures", ["LlamaForCausalLM"])]), store: store)
    for (base, key, value, word) in [
      (glm, "glm4moe.nextn_predict_layers", 3, "nextn_predict_layers"),
      (glm, "glm4moe.expert_gating_func", 1, "expert_gating_func"),
      (glm, "glm4moe.leading_dense_block_count", 0, "ffn_gate_inp"),
      (llama, "llama.nextn_predict_layers", 1, "nextn_predict_layers"),
    ] {
      var builder = base
      builder.set(key, size: value)
      let path = try folder.write("x.gguf", builder.build().bytes)
      do {
        _ = try ModelLoader.load(GGUFTests.options(path), backend: testBackends.last!)
        Issue.record("\(key) of \(value) was accepted")
      } catch { #expect("\(error)".contains(word) || "\(error)".contains("mlp.gate"), "\(error)") }
    }
  }

  /// Experts that a file stores quantised: as plain numbers every bit of those the blocks stand for, and as they are stored the
  /// same up to the rounding of activations.
  @Test(arguments: [GGUFWeightType.q8_0, .q4_0, .q4_K, .q6_K, .mxfp4])
  func quantisedExpertsAreTheirNumbers(type: GGUFWeightType) throws {
    let folder = try GGUFTests.Folder()
    let config = GGUFTests.config([
      ("architectures", ["Qwen3MoeForCausalLM"]), ("hidden_size", 256), ("head_dim", 64), ("num_experts", 4),
      ("num_experts_per_tok", 2), ("moe_intermediate_size", 256), ("norm_topk_prob", true), ("num_hidden_layers", 1),
    ])
    var blocks = try GGUFTests.builder("qwen3moe", config, store: DummyWeights(seed: 3, initializerRange: 0.1))
    var plain = blocks
    var generator = SeededGenerator(seed: 91)
    for index in blocks.tensors.indices where blocks.tensors[index].name.contains("_exps") {
      let count = blocks.tensors[index].dimensions.reduce(1, *)
      let blockCount = count / type.blockLength
      var data = (0..<blockCount * type.blockBytes).map { _ in UInt8.random(in: 0...255, using: &generator) }
      for block in 0..<blockCount {
        let first = block * type.blockBytes
        func set(_ offset: Int, _ scale: Float) {
          let bits = Float16(scale).bitPattern
          (data[first + offset], data[first + offset + 1]) = (UInt8(bits & 255), UInt8(bits >> 8))
        }
        let scale = Float.random(in: 0.5...1, using: &generator)
        switch type {
        case .q8_0: set(0, 0.002 * scale)
        case .q4_0: set(0, 0.03 * scale)
        case .q4_K:
          set(0, 0.0005 * scale)
          set(2, 0.003 * scale)
        case .q6_K: set(208, 0.0001 * scale)
        default: data[first] = UInt8.random(in: 121...123, using: &generator)
        }
      }
      var numbers = [Float](repeating: 0, count: count)
      data.withUnsafeBytes { type.dequantize($0.baseAddress!, count: count, to: &numbers) }
      let areFinite = numbers.allSatisfy { $0.isFinite }
      #expect(areFinite)
      (blocks.tensors[index].type, blocks.tensors[index].data) = (type.rawValue, data)
      plain.tensors[index].data = numbers.flatMap { GGUFBuilder.number($0.bitPattern) }
    }
    let prompt: [TokenID] = [3, 60, 7, 7, 1, 42, 0, 13, 22, 9]
    func logits(
      _ name: String, _ builder: GGUFBuilder, _ quantization: WeightQuantization, _ backend: any Backend
    ) throws -> [Float] {
      var options = GGUFTests.options(try folder.write(name, builder.build().bytes))
      options.quantization = quantization
      options.dtype = .float32
      options.kvDType = .float32
      let loaded = try ModelLoader.load(options, backend: backend)
      return try loaded.steps.promptLogits(prompt, positions: [0, 4, 9]).flatMap { $0 }
    }
    for backend in [testBackends.first!, testBackends.last!] {
      let wanted = try logits("plain.gguf", plain, .stored, backend)
      #expect(wanted.allSatisfy(\.isFinite) && Set(wanted).count > 100)
      let dense = try logits("blocks.gguf", blocks, .dense, backend)
      let isEqual = dense == wanted
      #expect(isEqual, "\(type) on \(backend.name)")
      let found = try logits("blocks.gguf", blocks, .stored, backend)
      let error = zip(found, wanted).reduce(Float(0)) { $0 + ($1.0 - $1.1) * ($1.0 - $1.1) }
      let total = wanted.reduce(Float(0)) { $0 + $1 * $1 }
      #expect(error < 0.001 * total, "\(type) on \(backend.name): \((error / total).squareRoot())")
      #expect(found != wanted || backend is ReferenceBackend)
    }
  }
}
