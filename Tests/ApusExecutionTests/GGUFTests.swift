import ApusCore
import ApusExecution
import ApusModels
import ApusScheduling
import ApusTensors
import Foundation
import Testing

/// Writes GGUF files.
struct GGUFBuilder {
  var version: UInt32 = 3
  var alignment = 32
  var entries: [(key: String, bytes: [UInt8])] = []
  var tensors: [(name: String, dimensions: [Int], type: UInt32, data: [UInt8])] = []

  static func number<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
    withUnsafeBytes(of: value.littleEndian) { Array($0) }
  }
  static func text(_ text: String) -> [UInt8] { number(UInt64(text.utf8.count)) + text.utf8 }

  mutating func set(_ key: String, _ bytes: [UInt8]) {
    entries.removeAll { $0.key == key }
    entries.append((key, bytes))
  }
  mutating func set(_ key: String, text: String) { set(key, Self.number(UInt32(8)) + Self.text(text)) }
  mutating func set(_ key: String, size: Int) { set(key, Self.number(UInt32(4)) + Self.number(UInt32(size))) }
  mutating func set(_ key: String, float: Float) { set(key, Self.number(UInt32(6)) + Self.number(float.bitPattern)) }

  /// The file, and the length of its header.
  func build() -> (bytes: [UInt8], header: Int) {
    var header = Array("GGUF".utf8) + Self.number(version) + Self.number(UInt64(tensors.count))
    header += Self.number(UInt64(entries.count))
    for entry in entries { header += Self.text(entry.key) + entry.bytes }
    var data: [UInt8] = []
    for tensor in tensors {
      data += [UInt8](repeating: 0, count: (alignment - data.count % alignment) % alignment)
      header += Self.text(tensor.name) + Self.number(UInt32(tensor.dimensions.count))
      for length in tensor.dimensions { header += Self.number(UInt64(length)) }
      header += Self.number(tensor.type) + Self.number(UInt64(data.count))
      data += tensor.data
    }
    let padding = [UInt8](repeating: 0, count: (alignment - header.count % alignment) % alignment)
    return (header + padding + data, header.count)
  }
}

struct GGUFTests {
  // MARK: Numbers

  static func bytes(hexadecimal text: String) -> [UInt8] {
    let digits = Array(text.utf8).map { $0 > 0x39 ? $0 - 0x57 : $0 - 0x30 }
    return stride(from: 0, to: digits.count, by: 2).map { digits[$0] << 4 | digits[$0 + 1] }
  }

  @Test func blocksBecomeTheReferenceNumbers() throws {
    let goldens = try Paths.json(Paths.goldens + "/gguf/blocks.json").objectValue!
    #expect(goldens.count == GGUFWeightType.allCases.count)
    for (name, golden) in goldens {
      let type = try #require(GGUFWeightType(rawValue: UInt32(golden["type"]!.intValue!)))
      let described = try #require(GGUFHeader.tensorTypes[type.rawValue])
      #expect(described.name == name && described.blockLength == type.blockLength)
      #expect(described.blockBytes == type.blockBytes)
      let blocks = Self.bytes(hexadecimal: golden["blocks"]!.stringValue!)
      let wanted = Self.bytes(hexadecimal: golden["numbers"]!.stringValue!)
      var found = [Float](repeating: .nan, count: wanted.count / 4)
      #expect(blocks.count / type.blockBytes * type.blockLength == found.count)
      let count = found.count
      blocks.withUnsafeBytes { type.dequantize($0.baseAddress!, count: count, to: &found) }
      #expect(found.withUnsafeBytes { Array($0) } == wanted, "\(name)")
      // What stays quantised stands for the same numbers; only the order of two roundings may differ.
      guard let layout = type.codeLayout else { continue }
      let source = QuantizedSource(layout: layout, rows: 1, columns: count, storedBytes: blocks.count) { _, rows in
        blocks.withUnsafeBytes { type.unpack($0.baseAddress!, count: count, into: rows) }
      }
      let numbers = source.dequantize(0..<1)
      let isEqual = numbers.indices.allSatisfy {
        let block = $0 / type.blockLength * type.blockLength
        let most = found[block..<block + type.blockLength].lazy.map(abs).max()!
        return abs(numbers[$0] - found[$0]) <= 1e-6 * most || !found[$0].isFinite
      }
      #expect(isEqual, "\(name)")
    }
  }

  // MARK: Real files

  static let models = ["stories260K", "infinitensor-story"]

  @Test(.enabled(if: Paths.dataHas("models/stories260K")), arguments: models, ["F32", "F16", "Q8_0"])
  func greedyContinuations(model: String, format: String) throws {
    let goldens = try Paths.json("\(Paths.data)/models/\(model)/golden_gguf.json").arrayValue!
    let file = "\(model)-\(format).gguf"
    let golden = try #require(goldens.first { $0["file"]?.stringValue == file })
    for backend in testBackends where !(backend is ReferenceBackend) {
      var options = ModelOptions(path: "\(Paths.data)/models/\(model)/\(file)")
      options.kvCacheBytes = 8 << 20
      options.quantization = .dense
      options.dtype = .float32
      options.kvDType = .float32
      let loaded = try ModelLoader.load(options, backend: backend)
      #expect(loaded.description.eosTokenIDs.first == 2 && loaded.description.bosTokenID == 1)
      var driver = Driver(
        model: loaded, generator: SeededGenerator(seed: 1), overlap: false, largestChunk: 256, isRandom: false)
      let ids = golden["greedy_ids"]!.tokenIDs
      let output = driver.run([DriverRequest(prompt: golden["prompt_ids"]!.tokenIDs, newTokens: ids.count)])[0]
      #expect(output.tokens == ids, "\(file) on \(backend.name)")
    }
  }

  @Test(.enabled(if: Paths.dataHas("models/stories260K")))
  func formatsWithoutARequest() throws {
    for (format, dtype) in [("F32", "float32"), ("F16", "float16"), ("Q8_0", "int8")] {
      var options = ModelOptions(path: "\(Paths.data)/models/stories260K/stories260K-\(format).gguf")
      options.kvCacheBytes = 1 << 20
      var reports: [(done: Int, total: Int)] = []
      let loaded = try ModelLoader.load(options, backend: testBackends.last!) { reports.append(($0, $1)) }
      #expect(loaded.description.dtype == dtype)
      #expect(reports.allSatisfy { $0.done <= $0.total } && reports.last!.done > reports.last!.total * 9 / 10)
      // An output layer that is stored quantised stays so unless plain numbers are asked for.
      var formats: [WeightFormat] = []
      for outputLayer in [OutputLayerQuantization.auto, .int8, .dense] {
        options.outputLayer = outputLayer
        formats.append(try ModelLoader.load(options, backend: testBackends.last!).steps.model.outputFormat)
      }
      let plain = WeightFormat.dense(loaded.steps.model.dtype)
      #expect(
        formats == (format == "Q8_0" ? [.codes(.int8), .codes(.int8), plain] : [plain, .int8PerChannel, plain]),
        "\(format)")
      (options.quantization, options.outputLayer) = (.int8, .auto)
      let rounded = try ModelLoader.load(options, backend: testBackends.last!)
      #expect(rounded.description.dtype == "int8" && rounded.steps.model.outputFormat == .int8PerChannel)
    }
  }

  @Test(.enabled(if: Paths.dataHas("models/stories260K/hf")))
  func logitsEqualTheOriginalCheckpoint() throws {
    func logits(_ path: String) throws -> [[Float]] {
      var options = ModelOptions(path: "\(Paths.data)/models/stories260K/\(path)")
      options.kvCacheBytes = 1 << 20
      let loaded = try ModelLoader.load(options, backend: testBackends.last!)
      return try loaded.steps.promptLogits([1, 403, 407, 261, 378], positions: [0, 4])
    }
    #expect(try logits("hf") == logits("stories260K-F32.gguf"))
  }

  // MARK: Made-up models

  /// A model of random weights as a GGUF file's builder.
  static func builder(_ architecture: String, _ config: JSONObject, store: DummyWeights) throws -> GGUFBuilder {
    let configuration = try ModelConfiguration(json: .object(config))
    var builder = GGUFBuilder()
    builder.set("general.architecture", text: architecture)
    func set(_ key: String, _ size: Int) { builder.set("\(architecture).\(key)", size: size) }
    set("embedding_length", configuration.hiddenSize)
    set("feed_forward_length", configuration.intermediateSize)
    let predicted = config["num_nextn_predict_layers"]?.intValue ?? 0
    let isGLM = architecture == "glm4moe"
    set("block_count", configuration.layerCount + predicted)
    if isGLM, let experts = configuration.experts {
      set("nextn_predict_layers", predicted)
      set("rope.dimension_count", configuration.headDimension / 2)
      set("expert_shared_count", experts.sharedIntermediateSize / experts.intermediateSize)
      set("leading_dense_block_count", experts.firstLayer)
      set("expert_gating_func", 2)
      builder.set("glm4moe.expert_weights_scale", float: experts.scale)
      builder.set("glm4moe.expert_weights_norm", GGUFBuilder.number(UInt32(7)) + [experts.normalizes ? 1 : 0])
    }
    set("attention.head_count", configuration.queryHeads)
    set("attention.head_count_kv", configuration.kvHeads)
    set("attention.key_length", configuration.headDimension)
    set("attention.value_length", configuration.headDimension)
    set("context_length", configuration.maxPositionEmbeddings)
    builder.set("\(architecture).attention.layer_norm_rms_epsilon", float: configuration.normEpsilon)
    builder.set("\(architecture).rope.freq_base", float: Float(configuration.rotary.theta))
    if let window = configuration.slidingWindows.first, window > 0 { set("attention.sliding_window", window) }

    if let experts = configuration.experts {
      set("expert_count", experts.expertCount)
      set("expert_used_count", experts.expertsPerToken)
      if architecture != "llama" { set("expert_feed_forward_length", experts.intermediateSize) }
    }

    func add(_ name: String, _ own: String, _ shape: [Int], _ role: WeightRole, heads: Int = 0) throws {
      let source = try store.load(name, shape: shape, role: role)
      let width = shape.count == 1 ? 1 : shape[1]
      let numbers = (0..<shape.reduce(1, *)).map { source.address.load(fromByteOffset: 4 * $0, as: Float.self) }
      // What the converter does: [heads, 2, half, width] becomes [heads, half, 2, width].
      let length = heads > 0 ? shape[0] / heads : 1
      var data: [UInt8] = []
      for row in 0..<shape[0] {
        let (head, place) = row.quotientAndRemainder(dividingBy: length)
        let from = heads > 0 ? head * length + place % 2 * (length / 2) + place / 2 : row
        for number in numbers[from * width..<(from + 1) * width] { data += GGUFBuilder.number(number.bitPattern) }
      }
      builder.tensors.append((own, shape.reversed(), 0, data))
    }
    let c = configuration
    let (query, keyValue) = (c.queryHeads * c.headDimension, c.kvHeads * c.headDimension)
    let permutes = architecture == "llama"
    try add("model.embed_tokens.weight", "token_embd.weight", [c.vocabularySize, c.hiddenSize], .matrix)
    try add("model.norm.weight", "output_norm.weight", [c.hiddenSize], .norm)
    if !c.tiedEmbeddings { try add("lm_head.weight", "output.weight", [c.vocabularySize, c.hiddenSize], .matrix) }
    for layer in 0..<c.layerCount + predicted {
      let (name, own) = ("model.layers.\(layer)", "blk.\(layer)")
      func matrix(_ hf: String, _ gguf: String, _ outputs: Int, _ inputs: Int, bias: Bool, heads: Int = 0) throws {
        try add("\(name).\(hf).weight", "\(own).\(gguf).weight", [outputs, inputs], .matrix, heads: heads)
        if bias { try add("\(name).\(hf).bias", "\(own).\(gguf).bias", [outputs], .bias, heads: heads) }
      }
      try matrix(
        "self_attn.q_proj", "attn_q", query, c.hiddenSize, bias: c.qkvBias, heads: permutes ? c.queryHeads : 0)
      try matrix(
        "self_attn.k_proj", "attn_k", keyValue, c.hiddenSize, bias: c.qkvBias, heads: permutes ? c.kvHeads : 0)
      try matrix("self_attn.v_proj", "attn_v", keyValue, c.hiddenSize, bias: c.qkvBias)
      try matrix("self_attn.o_proj", "attn_output", c.hiddenSize, query, bias: c.attentionOutputBias)
      if let experts = c.experts, experts.covers(layer: layer) {
        try addExperts(experts, name + "." + experts.names.block, own, hidden: c.hiddenSize, store, &builder)
      } else {
        try matrix("mlp.gate_proj", "ffn_gate", c.intermediateSize, c.hiddenSize, bias: c.mlpBias)
        try matrix("mlp.up_proj", "ffn_up", c.intermediateSize, c.hiddenSize, bias: c.mlpBias)
        try matrix("mlp.down_proj", "ffn_down", c.hiddenSize, c.intermediateSize, bias: c.mlpBias)
      }
      try add("\(name).input_layernorm.weight", "\(own).attn_norm.weight", [c.hiddenSize], .norm)
      try add(
        "\(name).post_attention_layernorm.weight", "\(own).\(isGLM ? "post_attention_norm" : "ffn_norm").weight",
        [c.hiddenSize], .norm)
      if c.queryKeyNorm {
        try add("\(name).self_attn.q_norm.weight", "\(own).attn_q_norm.weight", [c.headDimension], .norm)
        try add("\(name).self_attn.k_norm.weight", "\(own).attn_k_norm.weight", [c.headDimension], .norm)
      }
      if layer >= c.layerCount {
        try add("\(name).eh_proj.weight", "\(own).nextn.eh_proj.weight", [c.hiddenSize, 2 * c.hiddenSize], .matrix)
        try add("\(name).enorm.weight", "\(own).nextn.enorm.weight", [c.hiddenSize], .norm)
        try add("\(name).hnorm.weight", "\(own).nextn.hnorm.weight", [c.hiddenSize], .norm)
        try add("\(name).shared_head.norm.weight", "\(own).nextn.shared_head_norm.weight", [c.hiddenSize], .norm)
      }
    }
    return builder
  }

  /// A layer's experts, all gates, ups and downs in one tensor each.
  private static func addExperts(
    _ experts: ExpertConfiguration, _ block: String, _ own: String, hidden: Int, _ store: DummyWeights,
    _ builder: inout GGUFBuilder
  ) throws {
    func add(_ gguf: String, _ parts: [String], _ outputs: Int, _ inputs: Int, dimensions: [Int]) throws {
      var data: [UInt8] = []
      for part in parts {
        let source = try store.load(block + part + ".weight", shape: [outputs, inputs], role: .matrix)
        data += withExtendedLifetime(source.owner) {
          Array(UnsafeRawBufferPointer(start: source.address, count: 4 * outputs * inputs))
        }
      }
      builder.tensors.append(("\(own).\(gguf).weight", dimensions, 0, data))
    }
    let (count, width) = (experts.expertCount, experts.intermediateSize)
    func each(_ part: String) -> [String] { (0..<count).map { "experts.\($0).\(part)" } }
    try add("ffn_gate_inp", ["gate"], count, hidden, dimensions: [hidden, count])
    try add("ffn_gate_exps", each(experts.names.gate), width, hidden, dimensions: [hidden, width, count])
    try add("ffn_up_exps", each(experts.names.up), width, hidden, dimensions: [hidden, width, count])
    try add("ffn_down_exps", each(experts.names.down), hidden, width, dimensions: [width, hidden, count])
    if experts.hasCorrection {
      let source = try store.load(block + "gate.e_score_correction_bias", shape: [count], role: .bias)
      let data = withExtendedLifetime(source.owner) {
        Array(UnsafeRawBufferPointer(start: source.address, count: 4 * count))
      }
      builder.tensors.append(("\(own).exp_probs_b.bias", [count], 0, data))
    }
    let shared = experts.sharedIntermediateSize
    guard shared > 0 else { return }
    if experts.hasSharedGate { try add("ffn_gate_inp_shexp", ["shared_expert_gate"], 1, hidden, dimensions: [hidden]) }
    let name = experts.names.shared
    try add("ffn_gate_shexp", [name + "gate_proj"], shared, hidden, dimensions: [hidden, shared])
    try add("ffn_up_shexp", [name + "up_proj"], shared, hidden, dimensions: [hidden, shared])
    try add("ffn_down_shexp", [name + "down_proj"], hidden, shared, dimensions: [shared, hidden])
  }

  static func config(_ changes: [(String, JSONValue)]) -> JSONObject {
    var config = JSONObject([
      ("hidden_size", 32), ("intermediate_size", 56), ("num_hidden_layers", 2), ("num_attention_heads", 4),
      ("num_key_value_heads", 2), ("vocab_size", 61), ("max_position_embeddings", 256), ("rope_theta", 10000.0),
    ])
    for (key, value) in changes { config[key] = value }
    return config
  }

  /// A directory that goes away with the test.
  final class Folder {
    let path = NSTemporaryDirectory() + "apus-\(UUID().uuidString)"
    init() throws { try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true) }
    deinit { try? FileManager.default.removeItem(atPath: path) }
    func write(_ name: String, _ bytes: [UInt8]) throws -> String {
      try Data(bytes).write(to: URL(fileURLWithPath: "\(path)/\(name)"))
      return "\(path)/\(name)"
    }
  }

  static func options(_ path: String) -> ModelOptions {
    var options = ModelOptions(path: path)
    options.maxTokensPerStep = 64
    options.maxRunningRequests = 8
    options.kvCacheBytes = 1 << 20
    return options
  }

  /// GLM-4.5 with a layer for multi-token prediction.
  static let glm: [(String, JSONValue)] = [
    ("architectures", ["Glm4MoeForCausalLM"]), ("head_dim", 12), ("n_routed_experts", 6), ("n_shared_experts", 1),
    ("num_experts_per_tok", 2), ("moe_intermediate_size", 20), ("first_k_dense_replace", 1), ("n_group", 1),
    ("topk_group", 1), ("norm_topk_prob", true), ("routed_scaling_factor", 1.5), ("num_nextn_predict_layers", 1),
  ]

  @Test func architecturesEqualTheirOriginals() throws {
    let folder = try Folder()
    var cases: [(String, [(String, JSONValue)])] = [
      ("llama", [("architectures", ["LlamaForCausalLM"])]),
      (
        "llama",
        [
          ("architectures", ["LlamaForCausalLM"]), ("attention_bias", true), ("mlp_bias", true), ("head_dim", 12),
          ("tie_word_embeddings", true),
        ]
      ),
      ("llama", [("architectures", ["MistralForCausalLM"]), ("sliding_window", 5)]),
      ("qwen2", [("architectures", ["Qwen2ForCausalLM"])]),
      ("qwen3", [("architectures", ["Qwen3ForCausalLM"]), ("head_dim", 16), ("tie_word_embeddings", true)]),
      ("llama", [("architectures", ["MixtralForCausalLM"]), ("num_local_experts", 5), ("num_experts_per_tok", 2)]),
      (
        "qwen2moe",
        [
          ("architectures", ["Qwen2MoeForCausalLM"]), ("num_experts", 6), ("num_experts_per_tok", 3),
          ("moe_intermediate_size", 20), ("shared_expert_intermediate_size", 24),
        ]
      ),
      (
        "qwen3moe",
        [
          ("architectures", ["Qwen3MoeForCausalLM"]), ("head_dim", 16), ("num_experts", 4), ("num_experts_per_tok", 2),
          ("moe_intermediate_size", 12), ("norm_topk_prob", true), ("mlp_only_layers", [0]),
        ]
      ),
    ]
    cases.append(
      ("glm4moe", Self.glm + [("use_qk_norm", true), ("attention_bias", true), ("num_nextn_predict_layers", 0)]))
    cases.append(("glm4moe", Self.glm + [("n_shared_experts", 2), ("norm_topk_prob", false)]))
    let prompt: [TokenID] = [3, 60, 7, 7, 1, 42, 0, 13, 22, 9]
    for (number, (architecture, changes)) in cases.enumerated() {
      let config = Self.config(changes)
      let store = DummyWeights(seed: UInt64(number), initializerRange: 0.2)
      let original = try ModelLoader.load(
        ModelConfiguration(json: .object(config)), store: store, options: Self.options(""),
        backend: testBackends.last!)
      let wanted = try original.steps.promptLogits(prompt, positions: [0, 4, 9])
      var builder = try Self.builder(architecture, config, store: store)
      builder.version = number % 2 == 0 ? 3 : 2
      let path = try folder.write("\(number).gguf", builder.build().bytes)
      let loaded = try ModelLoader.load(Self.options(path), backend: testBackends.last!)
      #expect(loaded.description.architecture == original.description.architecture)
      #expect(try loaded.steps.promptLogits(prompt, positions: [0, 4, 9]) == wanted, "case \(number)")

      // The same in two parts, named by their directory.
      let parts = try Folder()
      var (first, second) = (builder, GGUFBuilder())
      second.tensors = Array(builder.tensors[5...])
      first.tensors.removeLast(second.tensors.count)
      for (part, name) in [(0, "m-00001-of-00002.gguf"), (1, "m-00002-of-00002.gguf")] {
        var file = part == 0 ? first : second
        file.set("split.no", size: part)
        file.set("split.count", size: 2)
        file.set("split.tensors.count", size: builder.tensors.count)
        _ = try parts.write(name, file.build().bytes)
      }
      let joined = try ModelLoader.load(Self.options(parts.path), backend: testBackends.last!)
      #expect(try joined.steps.promptLogits(prompt, positions: [0, 4, 9]) == wanted, "case \(number), split")
      try FileManager.default.removeItem(atPath: parts.path + "/m-00001-of-00002.gguf")
      let error = #expect(throws: EngineError.self) {
        try ModelLoader.load(Self.options(parts.path + "/m-00002-of-00002.gguf"), backend: testBackends.last!)
      }
      #expect(error?.message.contains("m-00001-of-00002.gguf does not exist") == true)
    }
  }

  @Test func rotations() throws {
    let folder = try Folder()
    let store = DummyWeights(seed: 5, initializerRange: 0.2)
    let base = try Self.builder(
      "llama", Self.config([("architectures", ["LlamaForCausalLM"]), ("rope_theta", 500000.0)]), store: store)
    func rotary(_ change: (inout GGUFBuilder) -> Void) throws -> RotaryConfiguration {
      var builder = base
      change(&builder)
      return try GGUFCheckpoint(paths: [folder.write("r.gguf", builder.build().bytes)]).configuration.rotary
    }
    func factors(_ numbers: [Float]) -> (inout GGUFBuilder) -> Void {
      {
        $0.tensors.append(
          ("rope_freqs.weight", [numbers.count], 0, numbers.flatMap { GGUFBuilder.number($0.bitPattern) }))
      }
    }
    #expect(try rotary { _ in }.scaling == .none)
    #expect(try rotary(factors([1, 1, 1, 1])).scaling == .none)
    // Frequencies of pairs are 1, 0.0376, 0.00141, 0.0000532: turns within 8192 are 1304, 49, 1.84 and 0.07.
    let turns = 8192 * pow(500_000, -4.0 / 8) / (2 * Double.pi)
    let smooth = (turns - 1) / 3
    let middle = Float(1 / ((1 - smooth) / 8 + smooth))
    #expect(
      try rotary(factors([1, 1, middle, 8])).scaling
        == .llama3(factor: 8, lowFrequencyFactor: 1, highFrequencyFactor: 4, originalLength: 8192))
    #expect(
      try rotary(factors([1, 2, 3, 8])).scaling
        == .longRoPE(shortFactors: [1, 2, 3, 8], longFactors: [1, 2, 3, 8], attentionFactor: 1, originalLength: 256))
    #expect(
      try rotary {
        $0.set("llama.rope.scaling.type", text: "linear")
        $0.set("llama.rope.scaling.factor", float: 4)
      }.scaling == .linear(factor: 4))
    let yarn = try rotary {
      $0.set("llama.rope.scaling.type", text: "yarn")
      $0.set("llama.rope.scaling.factor", float: 4)
      $0.set("llama.rope.scaling.original_context_length", size: 64)
    }
    guard case .yarn(let factor, _, _, _, let length, _) = yarn.scaling else {
      Issue.record("no yarn: \(yarn)")
      return
    }
    #expect(factor == 4 && length == 64)
  }

  // MARK: Broken files

  static func small() throws -> GGUFBuilder {
    var builder = try builder(
      "llama", config([("architectures", ["LlamaForCausalLM"]), ("num_hidden_layers", 1)]),
      store: DummyWeights(seed: 9))
    builder.set(
      "tokenizer.ggml.tokens",
      GGUFBuilder.number(UInt32(9)) + GGUFBuilder.number(UInt32(8))
        + GGUFBuilder.number(UInt64(2)) + GGUFBuilder.text("a") + GGUFBuilder.text("b"))
    return builder
  }

  @Test func truncatedFilesAreRefused() throws {
    let (bytes, header) = try Self.small().build()
    // Every length of the header, and some of the data.
    let lengths = Array(0..<header) + stride(from: header, to: bytes.count, by: 997) + [bytes.count - 1]
    for length in lengths {
      bytes.withUnsafeBytes { buffer in
        let part = UnsafeRawBufferPointer(rebasing: buffer[..<length])
        let error = #expect(throws: EngineError.self) { try GGUFHeader(part, path: "x.gguf") }
        #expect(error?.code == .invalidCheckpoint && error?.message.hasPrefix("x.gguf: ") == true)
      }
    }
    #expect(throws: Never.self) { try bytes.withUnsafeBytes { _ = try GGUFHeader($0, path: "x.gguf") } }
  }

  @Test func mutatedHeadersNeverCrash() throws {
    let folder = try Folder()
    let (bytes, header) = try Self.small().build()
    var generator = SeededGenerator(seed: 11)
    var refused = 0
    for round in 0..<3000 {
      var mutated = bytes
      for _ in 0...(round % 3) {
        let place = Int.random(in: 0..<header, using: &generator)
        mutated[place] = [0, 1, 0x7F, 0x80, 0xFF, UInt8.random(in: 0...255, using: &generator)]
          .randomElement(using: &generator)!
      }
      do {
        // The whole way for some, the header alone for all.
        try mutated.withUnsafeBytes { _ = try GGUFHeader($0, path: "x.gguf") }
        if round % 10 == 0 { _ = try GGUFCheckpoint(paths: [folder.write("x.gguf", mutated)]) }
      } catch let error as EngineError {
        refused += 1
        #expect(!error.message.isEmpty)
      }
    }
    #expect(refused > 1000, "seed 11")
  }

  @Test func refusalsNameTheReason() throws {
    let folder = try Folder()
    let cases: [(String, (inout GGUFBuilder) -> Void)] = [
      ("version 1", { $0.version = 1 }), ("big-endian", { $0.version = 3 << 24 }),
      ("architecture gemma9 is not", { $0.set("general.architecture", text: "gemma9") }),
      ("llama.expert_used_count", { $0.set("llama.expert_count", size: 8) }),
      ("llama.block_count", { $0.entries.removeAll { $0.key == "llama.block_count" } }),
      ("llama.logit_scale", { $0.set("llama.logit_scale", float: 2) }),
      ("attn_q_norm", { $0.tensors.append(("blk.0.attn_q_norm.weight", [8], 0, Array(repeating: 0, count: 32))) }),
      (
        "some of the output",
        {
          $0.set("llama.block_count", size: 2)
          $0.tensors.append(("blk.0.attn_output.bias", [32], 0, Array(repeating: 0, count: 128)))
        }
      ),
      ("listed twice", { $0.tensors.append($0.tensors[0]) }),
      ("blk.7.attn_q.weight has no place", { $0.tensors.append(("blk.7.attn_q.weight", [1], 0, [0, 0, 0, 0])) }),
      ("unknown type 99", { $0.tensors[0].type = 99 }), ("blocks of 256", { $0.tensors[1].type = 12 }),
      ("type IQ1_S", { $0.tensors[0] = ("token_embd.weight", [256, 61], 19, Array(repeating: 0, count: 61 * 50)) }),
      ("impossible dimension", { $0.tensors[0].dimensions = [1 << 40, 1 << 40] }),
      ("impossible dimension", { $0.tensors[0].dimensions = [0, 1] }),
      ("has 5 dimensions", { $0.tensors[0].dimensions = [1, 1, 1, 1, 1] }),
      ("power of two", { $0.set("general.alignment", size: 24) }),
      ("overlaps", { $0.tensors[0].dimensions = [32, 122] }),
      ("truncated", { $0.tensors[$0.tensors.count - 1].dimensions = [1 << 30] }),
      ("split.count", { $0.set("split.count", size: 3) }),
      (
        "differs between",
        {
          $0.set(
            "llama.feed_forward_length",
            GGUFBuilder.number(UInt32(9))
              + GGUFBuilder.number(UInt32(4)) + GGUFBuilder.number(UInt64(2)) + GGUFBuilder.number(UInt32(56))
              + GGUFBuilder.number(UInt32(57)))
        }
      ),
      (
        "deeper than",
        {
          $0.set(
            "x",
            GGUFBuilder.number(UInt32(9))
              + (0..<9).flatMap { _ in GGUFBuilder.number(UInt32(9)) + GGUFBuilder.number(UInt64(1)) })
        }
      ),
      (
        "more than the file can hold",
        {
          $0.set(
            "x",
            GGUFBuilder.number(UInt32(9)) + GGUFBuilder.number(UInt32(0))
              + GGUFBuilder.number(UInt64.max))
        }
      ),
      (
        "more than the \(GGUFHeader.textLimit) allowed",
        {
          $0.set(
            "x",
            GGUFBuilder.number(UInt32(8))
              + GGUFBuilder.number(UInt64.max))
        }
      ),
    ]
    for (says, change) in cases {
      var builder = try Self.small()
      change(&builder)
      let path = try folder.write("x.gguf", builder.build().bytes)
      let error = #expect(throws: EngineError.self) { try GGUFCheckpoint(paths: [path]) }
      #expect(
        error?.message.contains(says) == true && error?.message.contains("x.gguf") == true,
        "\(says): \(error?.message ?? "")")
    }
    // Shapes are compared when a weight is loaded.
    var builder = try Self.small()
    builder.tensors[1].dimensions = [16]
    builder.tensors[1].data.removeLast(64)
    let path = try folder.write("x.gguf", builder.build().bytes)
    let error = #expect(throws: EngineError.self) {
      try ModelLoader.load(Self.options(path), backend: testBackends.last!)
    }
    #expect(error?.message.contains("output_norm.weight has dimensions [16]") == true)
    // Two models in a directory leave a choice.
    _ = try folder.write("y.gguf", builder.build().bytes)
    let ambiguous = #expect(throws: EngineError.self) { try GGUFFiles.find(folder.path) }
    #expect(ambiguous?.message.contains("2 GGUF models") == true)
    _ = try folder.write("config.json", [0x7B, 0x7D])
    #expect(try GGUFFiles.find(folder.path) == nil)
  }
}
