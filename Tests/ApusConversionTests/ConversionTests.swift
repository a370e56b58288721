import ApusConversion
import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import ApusTokenization
import Foundation
import Testing

/// Checkpoints converted and read again.
struct ConversionTests {
  static let families: [(String, [(String, JSONValue)])] = [
    ("llama", []),
    (
      "llama with biases",
      [("attention_bias", true), ("mlp_bias", true), ("head_dim", 32), ("tie_word_embeddings", true)]
    ),
    (
      "llama 3",
      [
        ("rope_theta", 500000.0),
        (
          "rope_scaling",
          [
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
          ]
        ),
      ]
    ),
    ("mistral", [("architectures", ["MistralForCausalLM"]), ("model_type", "mistral"), ("sliding_window", 5)]),
    ("qwen2", [("architectures", ["Qwen2ForCausalLM"]), ("model_type", "qwen2"), ("tie_word_embeddings", true)]),
    ("qwen3", [("architectures", ["Qwen3ForCausalLM"]), ("model_type", "qwen3"), ("head_dim", 32)]),
    (
      "yarn",
      [
        ("architectures", ["Qwen2ForCausalLM"]), ("model_type", "qwen2"),
        ("rope_scaling", ["rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64]),
      ]
    ),
    ("linear", [("rope_scaling", ["rope_type": "linear", "factor": 2.0])]),
  ]

  /// float32 to GGUF and back: every bit of every tensor, and the same model.
  @Test(arguments: families.indices)
  func throughGGUFAndBack(index: Int) throws {
    let (name, changes) = Self.families[index]
    let folder = try Folder()
    let original = try SmallModel(changes).write(folder)
    let gguf = folder.path + "/x.gguf"
    let there = try convert(original, gguf, "gguf-f32")
    #expect(there.relativeError == 0 && there.worst(9).isEmpty && there.byteCount > 0, "\(name)")
    let wanted = try logits(original)
    #expect(try logits(gguf) == wanted, "\(name)")
    let back = folder.path + "/back"
    let report = try convert(gguf, back, "fp32")
    #expect(report.relativeError == 0, "\(name)")
    #expect(try tensors(back) == tensors(original), "\(name)")
    #expect(try logits(back) == wanted, "\(name)")
    let (first, second) = (try ModelConfiguration(directory: original), try ModelConfiguration(directory: back))
    #expect(first.rotary == second.rotary && first.slidingWindows == second.slidingWindows, "\(name)")
    #expect(second.eosTokenIDs == [262] && first.normEpsilon == second.normEpsilon)
    #expect(folder.names() == ["back", "model", "x.gguf"])
    // Tokens and the template came along.
    let tokenizer = try Tokenizer.load(directory: back)
    let text = "the other thing, is in there\n\n 12 é"
    #expect(try tokenizer.encode(text) == Tokenizer.load(directory: original).encode(text))
    #expect(try tokenizer.encode(text) == Tokenizer.load(directory: gguf).encode(text))
    #expect(tokenizer.eosID == 262)
    let template = try ChatTemplateSet.load(directory: back)
    #expect(template.names == ["default"] && template.specialTokens["eos_token"] == "<|end|>")
    #expect(try GenerationConfiguration(directory: back, vocabularySize: 272).eosTokenIDs == [262])
  }

  /// Every type: what is loaded from the file equals the reported rounding of the original.
  @Test(arguments: GGUFWeightType.writable)
  func everyType(type: GGUFWeightType) throws {
    let folder = try Folder()
    let model = SmallModel([("hidden_size", 256), ("intermediate_size", 96), ("head_dim", 32)])
    let original = try model.write(folder)
    let gguf = folder.path + "/x.gguf"
    let report = try convert(original, gguf, "gguf-\(type.name.lowercased())")
    let back = folder.path + "/back"
    try convert(gguf, back, "fp32")
    let (before, after) = (try tensors(original), try tensors(back))
    #expect(before.count == after.count && report.tensors.count == before.count)
    for tensor in report.tensors {
      let (x, y) = (floats(before[tensor.name]!), floats(after[tensor.name]!))
      var (squares, errors, largest) = (0.0, 0.0, 0.0)
      for (a, b) in zip(x, y) {
        let difference = abs(Double(a) - Double(b))
        (squares, errors, largest) = (
          squares + Double(a) * Double(a), errors + difference * difference, max(largest, difference)
        )
      }
      #expect(largest == tensor.largestError, "\(tensor.name)")
      #expect(abs((errors / squares).squareRoot() - tensor.relativeError) <= 1e-12, "\(tensor.name)")
      let isLinear = tensor.shape.count == 2 && tensor.name.contains(".layers.")
      let isDense = type.blockLength == 1
      if tensor.shape.count == 1 { #expect(tensor.writtenAs == "F32") }
      if isDense, tensor.shape.count == 2 { #expect(tensor.writtenAs == type.name) }
      if !isDense, !isLinear { #expect(tensor.writtenAs == "F32" && tensor.largestError == 0) }
      if !isDense, isLinear {
        // Rows of 96 and 128 are no blocks of 256, and become the nearest type of smaller ones.
        let smaller: [GGUFWeightType: String] = [.q4_K: "Q5_0", .q5_K: "Q5_1", .q6_K: "Q8_0"]
        #expect(
          tensor.writtenAs == (tensor.shape[1] % 256 != 0 ? smaller[type] ?? type.name : type.name), "\(tensor.name)")
        #expect(tensor.relativeError > 0)
      }
    }
    // GGUF to GGUF rounds what the first file holds.
    let second = folder.path + "/y.gguf"
    let again = try convert(gguf, second, "gguf-f32")
    #expect(again.relativeError == 0)
    #expect(try logits(second, dtype: .float32) == logits(back, dtype: .float32))
    #expect(
      try Tokenizer.load(directory: second).encode("the thing") == Tokenizer.load(directory: gguf).encode("the thing"))
  }

  static let integerCases: [(String, @Sendable (inout ConversionOptions) -> Void)] = [
    ("int8", { _ in }), ("int4", { $0.groupSize = 32 }),
    ("int4", { ($0.groupSize, $0.isSymmetric) = (32, false) }), ("int4", { ($0.groupSize, $0.layout) = (32, .gptq) }),
    ("int4", { ($0.groupSize, $0.layout, $0.isSymmetric) = (32, .gptq, false) }),
    ("int4", { ($0.groupSize, $0.layout, $0.isSymmetric) = (32, .awq, false) }),
    ("int4", { ($0.groupSize, $0.quantizesOutput) = (16, true) }),
  ]

  /// Integer formats: read again they are the numbers whose error was reported, and the model runs.
  @Test(arguments: integerCases.indices, [DType.float32, .bfloat16])
  func integers(index: Int, type: DType) throws {
    let (format, configure) = Self.integerCases[index]
    let folder = try Folder()
    var model = SmallModel([("torch_dtype", .string(type.name))])
    model.type = type
    let original = try model.write(folder)
    let output = folder.path + "/out"
    let report = try convert(original, output, format, configure)
    let configuration = try ModelConfiguration(directory: output)
    #expect(configuration.quantization != nil && configuration.dtype == type)
    let back = folder.path + "/back"
    try convert(output, back, "fp32")
    let (before, after) = (try tensors(original), try tensors(back))
    #expect(Set(before.keys) == Set(after.keys))
    var quantized = 0
    for tensor in report.tensors {
      let (x, y) = (floats(before[tensor.name]!), floats(after[tensor.name]!))
      let largest = zip(x, y).reduce(0.0) { max($0, abs(Double($1.0) - Double($1.1))) }
      #expect(largest == tensor.largestError, "\(tensor.name)")
      if tensor.writtenAs.hasPrefix("int") {
        quantized += 1
        #expect(tensor.relativeError > 0 && tensor.relativeError < (format == "int8" ? 0.012 : 0.13), "\(tensor.name)")
      } else {
        #expect(largest == 0)
      }
    }
    #expect(quantized == (index == 6 ? 15 : 14))
    #expect(try load(output).description.dtype == format)
    #expect(try logits(output, dtype: .float32) == logits(back, dtype: .float32))
  }

  /// A W8A8 checkpoint goes into the engine's int8 format as it is: the same bits as rounding the original while loading, its
  /// output layer included or not.
  @Test(arguments: [false, true]) func int8IsLossless(quantizesOutput: Bool) throws {
    for type in [DType.float32, .bfloat16, .float16] {
      let folder = try Folder()
      var model = SmallModel([("torch_dtype", .string(type.name))])
      model.type = type
      let original = try model.write(folder)
      try convert(original, folder.path + "/out", "int8") { $0.quantizesOutput = quantizesOutput }
      for backend in [backend, ReferenceBackend()] as [any Backend] {
        func logits(_ path: String, _ quantizes: Bool, _ dtype: DType?) throws -> [[Float]] {
          var options = ModelOptions(path: path)
          options.kvCacheBytes = 1 << 20
          options.quantization = quantizes ? .int8 : .stored
          if !quantizesOutput { options.outputLayer = .dense }
          options.dtype = dtype
          let loaded = try ModelLoader.load(options, backend: backend)
          #expect((loaded.steps.model.outputFormat == .int8PerChannel) == quantizesOutput)
          return try loaded.steps.promptLogits(prompt, positions: [0, 4, 9])
        }
        let output = folder.path + "/out"
        #expect(try logits(output, false, nil) == logits(output, true, nil), "\(backend.name)")
        // The reference rounds weights that are not int8 yet by dividing, the engine by multiplying.
        if backend is ReferenceBackend { continue }
        #expect(try logits(output, true, .float32) == logits(original, true, .float32), "\(backend.name), \(type)")
        if type == .bfloat16 { #expect(try logits(original, true, nil) == logits(output, false, nil)) }
      }
      // Scales that are not the largest number / 127 are kept: the path does not go through other numbers.
      var stored = try tensors(folder.path + "/out")
      for name in stored.keys where name.hasSuffix("weight_scale") {
        let scales = floats(stored[name]!).map { $0 * 1.25 }
        stored[name] = FileTensor(name, stored[name]!.shape, scales)
      }
      try folder.write("out/model.safetensors", safetensors(stored.values.sorted { $0.name < $1.name }))
      let loaded = try load(folder.path + "/out")
      #expect(loaded.description.dtype == "int8")
      #expect(try loaded.steps.promptLogits(prompt, positions: [9]).allSatisfy { $0.allSatisfy(\.isFinite) })
    }
  }

  @Test func shards() throws {
    let folder = try Folder()
    let original = try SmallModel().write(folder)
    let output = folder.path + "/out"
    try convert(original, output, "bf16") { $0.maxShardBytes = 40_000 }
    let names = folder.names("out")
    #expect(names.contains("model.safetensors.index.json") && !names.contains("model.safetensors"))
    let shards = names.filter { $0.hasSuffix(".safetensors") }
    #expect(shards.count > 3 && shards[0] == "model-00001-of-0000\(shards.count).safetensors")
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] { #expect(names.contains(name)) }
    for (name, tensor) in try tensors(output) {
      let wanted = floats(try tensors(original)[name]!).map { Float(bitPattern: UInt32(Self.bfloat16($0)) << 16) }
      #expect(tensor.type == "BF16" && floats(tensor) == wanted, "\(name)")
    }
    #expect(try ModelConfiguration(directory: output).dtype == .bfloat16)
    // A second conversion joins them again.
    try convert(output, folder.path + "/joined", "bf16")
    #expect(try tensors(folder.path + "/joined") == tensors(output))
  }

  static func bfloat16(_ number: Float) -> UInt16 {
    UInt16(truncatingIfNeeded: (number.bitPattern &+ 0x7FFF &+ (number.bitPattern >> 16 & 1)) >> 16)
  }

  /// Tensors of other types, scalars and empty ones go over as they are; patterns keep tensors.
  @Test func otherTensors() throws {
    let folder = try Folder()
    let original = try SmallModel().write(folder)
    try folder.write("model/config.json", #"{"architectures":["SomethingElse"],"model_type":"else","dtype":"float32"}"#)
    let list = [
      FileTensor("a.ids", "I64", [2], [UInt8](0..<16)), FileTensor("a.scalar", "F32", [], [0, 0, 0x80, 0x3F]),
      FileTensor("a.empty.weight", "F32", [0, 4], []), FileTensor("a.norm.weight", [3], [1, 2, 3]),
      FileTensor("a.proj.weight", [2, 128], (0..<256).map { Float($0) / 256 }),
      FileTensor("b.proj.weight", [2, 128], (0..<256).map { Float($0) / 256 }),
      FileTensor("b.experts.weight", [2, 3, 4], (0..<24).map { Float($0) }),
    ]
    try folder.write("model/model.safetensors", safetensors(list))
    try convert(original, folder.path + "/half", "fp16") { $0.kept = ["b.*"] }
    let half = try tensors(folder.path + "/half")
    #expect(
      half["a.ids"] == list[0] && half["a.scalar"]?.bytes == [0, 0x3C] && half["a.empty.weight"]?.shape == [0, 4])
    #expect(
      half["a.proj.weight"]?.type == "F16" && half["b.proj.weight"] == list[5] && half["b.experts.weight"] == list[6])
    let config = try Paths.json(folder.path + "/half/config.json")
    #expect(config["dtype"]?.stringValue == "float16" && config["model_type"]?.stringValue == "else")
    try convert(original, folder.path + "/int8", "int8") { $0.kept = ["b.proj"] }
    let int8 = try tensors(folder.path + "/int8")
    #expect(int8["a.proj.weight"]?.type == "I8" && int8["b.proj.weight"]?.type == "F32")
    let ignored = try Paths.json(folder.path + "/int8/config.json")["quantization_config"]?["ignore"]?.arrayValue
    #expect(ignored?.contains("b.proj") == true && ignored?.contains("a.proj") == false)
  }

  // MARK: Real models

  /// The greedy continuation of a prompt.
  private func greedy(_ path: String, _ prompt: [TokenID], _ count: Int) throws -> [TokenID] {
    let model = try load(path) {
      $0.quantization = .dense
      $0.dtype = .float32
      $0.kvDType = .float32
    }
    var tokens = prompt
    for _ in 0..<count {
      let row = try model.steps.promptLogits(tokens, positions: [tokens.count - 1])[0]
      tokens.append(TokenID(row.indices.max { (row[$0], $1) < (row[$1], $0) }!))
    }
    return Array(tokens[prompt.count...])
  }

  @Test(.enabled(if: Paths.dataHas("models/stories260K/hf")), arguments: ["F32", "F16", "Q8_0"])
  func goldenContinuations(type: String) throws {
    let base = "\(Paths.data)/models/stories260K"
    let folder = try Folder()
    let gguf = folder.path + "/x.gguf"
    try convert(base + "/hf", gguf, "gguf-\(type.lowercased())") {
      // The golden file's own choice for what stays dense.
      if type == "Q8_0" { ($0.denseType, $0.quantizesEmbeddings) = (.float16, true) }
    }
    let golden = try #require(
      Paths.json(base + "/golden_gguf.json").arrayValue!.first {
        $0["file"]?.stringValue == "stories260K-\(type).gguf"
      })
    let ids = golden["greedy_ids"]!.arrayValue!.map { TokenID($0.intValue!) }
    let prompt = golden["prompt_ids"]!.arrayValue!.map { TokenID($0.intValue!) }
    #expect(try Tokenizer.load(directory: gguf).encode(golden["prompt"]!.stringValue!) == prompt)
    #expect(try greedy(gguf, prompt, ids.count) == ids)
    // And back.
    let back = folder.path + "/back"
    try convert(gguf, back, "fp32")
    #expect(try greedy(back, prompt, ids.count) == ids)
    #expect(try Tokenizer.load(directory: back).encode(golden["prompt"]!.stringValue!) == prompt)
    if type == "F32" {
      let (first, second) = (try tensors(base + "/hf"), try tensors(back))
      #expect(Set(second.keys).isSubset(of: first.keys))
      for (name, tensor) in second { #expect(first[name] == tensor, "\(name)") }
    }
  }

  @Test(.enabled(if: Paths.dataHas("models/infinitensor-story")))
  func aSecondRealModel() throws {
    let folder = try Folder()
    let base = "\(Paths.data)/models/infinitensor-story"
    let gguf = folder.path + "/x.gguf"
    let report = try convert(base, gguf, "gguf-q5_k")
    #expect(report.notes.contains { $0.contains("not a multiple of 256") })
    #expect(report.relativeError > 0 && report.relativeError < 0.06)
    try convert(base, folder.path + "/four", "int4") { $0.groupSize = 64 }
    #expect(try load(folder.path + "/four").steps.promptLogits(prompt, positions: [9])[0].count == 2048)
    try convert("\(base)/infinitensor-story-Q8_0.gguf", folder.path + "/dense", "bf16")
    #expect(
      try Tokenizer.load(directory: folder.path + "/dense").encode("Once upon a time")
        == Tokenizer.load(directory: base).encode("Once upon a time"))
  }
}
