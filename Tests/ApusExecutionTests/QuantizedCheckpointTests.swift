import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import Foundation
import Testing

/// A configuration of a small Llama with something added.
private func configuration(_ changes: [(String, JSONValue)]) throws -> ModelConfiguration {
  var config = JSONObject([
    ("architectures", ["LlamaForCausalLM"]), ("hidden_size", 32), ("intermediate_size", 56),
    ("num_hidden_layers", 2), ("num_attention_heads", 4), ("num_key_value_heads", 2), ("vocab_size", 61),
    ("max_position_embeddings", 256),
  ])
  for (key, value) in changes { config[key] = value }
  return try ModelConfiguration(json: .object(config))
}

private func hex(_ text: String) -> [UInt8] {
  let digits = Array(text.utf8).map { UInt8($0 >= 97 ? $0 - 87 : $0 - 48) }
  return stride(from: 0, to: digits.count, by: 2).map { digits[$0] << 4 | digits[$0 + 1] }
}

private func text(_ json: JSONValue) -> String {
  var writer = JSONWriter()
  writer.value(json)
  return writer.text
}

private func bytes(of source: WeightSource) -> [UInt8] {
  withExtendedLifetime(source.owner) {
    Array(
      UnsafeRawBufferPointer(
        start: source.address, count: source.rows * source.columns * source.dtype.byteCount))
  }
}

private let helpers: [CPUBackend?] = [nil, try? CPUBackend(threads: 1), try? CPUBackend(threads: 3)]

/// Single matrices against numbers computed in Python (Scripts/golden_quantized.py).
struct QuantizedMatrixTests {
  struct Case {
    var name: String
    var json: JSONValue
    var shape: [Int]
    var tensors: [FileTensor]
    var expected: [UInt8]
  }

  static func cases() throws -> [Case] {
    try Paths.json(Paths.goldens + "/Quantized/quantized.json").arrayValue!.map { json in
      Case(
        name: json["name"]!.stringValue!, json: json["quantization_config"]!,
        shape: json["shape"]!.arrayValue!.map { $0.intValue! },
        tensors: json["tensors"]!.objectValue!.map { name, tensor in
          FileTensor(
            "model.layers.0.mlp.up_proj." + name, type: tensor["dtype"]!.stringValue!,
            tensor["shape"]!.arrayValue!.map { $0.intValue! }, hex(tensor["hex"]!.stringValue!))
        }, expected: hex(json["expected"]!.stringValue!))
    }
  }

  /// Writes tensors to a file and asks for the matrix.
  static func load(
    _ tensors: [FileTensor], _ json: JSONValue, shape: [Int], padding: Int = 0, helper: CPUBackend? = nil
  ) throws -> [UInt8] {
    let directory = try TemporaryDirectory()
    try directory.write("model.safetensors", safetensors(tensors, padding: padding))
    let quantization = try #require(try configuration([("quantization_config", json)]).quantization)
    let store = QuantizedCheckpoint(
      try SafetensorsCheckpoint(directory: directory.path), quantization, helper: helper)
    let name = "model.layers.0.mlp.up_proj.weight"
    let source = try store.load(name, shape: shape, role: .matrix)
    #expect(source.dtype == .float32 && store.dtype(of: name) == .bfloat16 && store.contains(name))
    // A word that is not full counts as if it were.
    let count = source.rows * source.columns
    #expect(store.byteCount >= 4 * count && store.byteCount < 4 * (count + 8 * source.rows))
    #expect(source.rows == shape[0] && source.columns == shape[1])
    return bytes(of: source)
  }

  @Test func everyBitIsTheReferences() throws {
    let cases = try Self.cases()
    #expect(cases.count == 27)
    for entry in cases {
      for (index, helper) in helpers.enumerated() {
        // Other paddings put the tensors at odd addresses.
        let found = try Self.load(entry.tensors, entry.json, shape: entry.shape, padding: index, helper: helper)
        #expect(found == entry.expected, "\(entry.name)")
      }
    }
  }

  /// What stays quantised stands for the same numbers; only the order of two roundings may differ.
  @Test func codesStandForTheReferences() throws {
    var kept = 0
    for entry in try Self.cases() {
      let directory = try TemporaryDirectory()
      try directory.write("model.safetensors", safetensors(entry.tensors))
      let quantization = try #require(try configuration([("quantization_config", entry.json)]).quantization)
      let store = QuantizedCheckpoint(try SafetensorsCheckpoint(directory: directory.path), quantization)
      let name = "model.layers.0.mlp.up_proj.weight"
      guard let source = try store.quantized(name, shape: entry.shape) else { continue }
      kept += 1
      let wanted = entry.expected.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
      for rows in [0..<entry.shape[0], entry.shape[0] / 3..<entry.shape[0]] {
        let found = source.rows(rows).dequantize(0..<rows.count)
        let isEqual = zip(found, wanted[(rows.lowerBound * entry.shape[1])...]).allSatisfy {
          // Codes times scale and zero point times scale cancel.
          abs($0 - $1) <= 1e-5 * max(abs($1), wanted.map(abs).max()!)
        }
        #expect(isEqual && found.count == rows.count * entry.shape[1], "\(entry.name)")
      }
    }
    #expect(kept >= 8, "\(kept)")
  }

  /// Large enough for several chunks and tiles, with sizes that are no multiples of them.
  @Test func largeMatrices() throws {
    var generator = SeededGenerator(seed: 5)
    let (outputs, inputs, group) = (328, 200, 40)
    let groups = inputs / group
    func word() -> UInt32 { UInt32(truncatingIfNeeded: generator.next()) }
    func raw(_ words: [UInt32]) -> [UInt8] { words.flatMap { w in withUnsafeBytes(of: w) { Array($0) } } }
    let scales = (0..<groups * outputs).map { _ in Float.random(in: 0.001...1, using: &generator) }
    let name = "model.layers.0.mlp.up_proj."
    for method in ["gptq", "awq"] {
      let isAWQ = method == "awq"
      let weights = (0..<inputs * outputs / 8).map { _ in word() }
      let zeros = (0..<groups * outputs / 8).map { _ in word() }
      let tensors = [
        FileTensor(
          name + "qweight", type: "I32", isAWQ ? [inputs, outputs / 8] : [inputs / 8, outputs], raw(weights)),
        FileTensor(name + "qzeros", type: "I32", [groups, outputs / 8], raw(zeros)),
        FileTensor(name + "scales", [groups, outputs], scales),
      ]
      let json: JSONValue = ["quant_method": .string(method), "bits": 4, "group_size": .int(Int64(group))]
      let found = try Self.load(tensors, json, shape: [outputs, inputs], helper: helpers[2])
      let place: [UInt32] = isAWQ ? [0, 4, 1, 5, 2, 6, 3, 7] : [0, 1, 2, 3, 4, 5, 6, 7]
      var expected: [Float] = []
      for n in 0..<outputs {
        for k in 0..<inputs {
          let code =
            isAWQ
            ? weights[k * outputs / 8 + n / 8] >> (4 * place[n % 8]) & 15
            : weights[k / 8 * outputs + n] >> UInt32(4 * (k % 8)) & 15
          let stored = zeros[k / group * (outputs / 8) + n / 8] >> (4 * place[n % 8]) & 15
          let zero = isAWQ ? stored : (stored + 1) % 16
          expected.append((Float(code) - Float(zero)) * scales[k / group * outputs + n])
        }
      }
      #expect(found == expected.flatMap { w in withUnsafeBytes(of: w) { Array($0) } }, "\(method)")
    }
  }

  @Test func brokenCheckpointsAreRefused() throws {
    let cases = Dictionary(uniqueKeysWithValues: try Self.cases().map { ($0.name, $0) })
    typealias Change = (inout [FileTensor]) -> Void
    func drop(_ name: String) -> Change { { $0.removeAll { $0.name.hasSuffix("." + name) } } }
    func edit(_ name: String, _ body: @escaping (inout FileTensor) -> Void) -> Change {
      { tensors in
        let index = tensors.firstIndex { $0.name.hasSuffix("." + name) }!
        body(&tensors[index])
      }
    }
    let reshape: (inout FileTensor) -> Void = { $0.shape = [1] + $0.shape }
    let retype: (inout FileTensor) -> Void = {
      $0.type = $0.type == "I32" ? "U32" : $0.type == "I8" ? "U8" : $0.type == "F8_E4M3" ? "F8_E5M2" : "I32"
      if $0.type == "I32" { ($0.shape, $0.bytes) = ([1], [0, 0, 0, 0]) }
    }
    func index(_ value: Int32) -> Change {
      edit("g_idx") { tensor in
        tensor.bytes.replaceSubrange(12..<16, with: withUnsafeBytes(of: value) { Array($0) })
      }
    }
    let list: [(String, Change, [String])] = [
      ("gptq 4 bits, zero points", drop("qweight"), ["up_proj.qweight", "missing", "[4, 16]"]),
      ("gptq 4 bits, zero points", drop("qzeros"), ["up_proj.qzeros", "missing"]),
      ("gptq 4 bits, zero points", drop("scales"), ["up_proj.scales", "missing", "[4, 16]"]),
      ("gptq 4 bits, zero points", edit("qweight", reshape), ["up_proj.qweight", "[1, 4, 16]", "[4, 16]"]),
      ("gptq 4 bits, zero points", edit("scales", retype), ["up_proj.scales", "I32", "F16"]),
      ("gptq 4 bits, zero points", edit("qzeros", retype), ["up_proj.qzeros", "U32", "I32"]),
      ("gptq 4 bits, zero points", index(4), ["up_proj.g_idx", "input 3", "group 4", "4 groups"]),
      ("gptq 4 bits, zero points", index(-1), ["up_proj.g_idx", "group -1"]),
      (
        "gptq 4 bits, act-order, bfloat16 scales", drop("g_idx"), ["up_proj.g_idx", "missing", "[32]"]
      ),
      ("gptq 8 bits, act-order", edit("g_idx", reshape), ["up_proj.g_idx", "[1, 24]", "[24]"]),
      ("awq", drop("qweight"), ["up_proj.qweight", "missing", "[32, 2]"]),
      ("awq", drop("scales"), ["up_proj.scales", "missing"]),
      ("awq", drop("qzeros"), ["up_proj.qzeros", "missing"]),
      ("awq", edit("qweight", reshape), ["up_proj.qweight", "[1, 32, 2]"]),
      ("packed int4, groups", drop("weight_packed"), ["up_proj.weight_packed", "missing"]),
      ("packed int4, groups", drop("weight_scale"), ["up_proj.weight_scale", "missing", "[9, 4]"]),
      ("packed int4, groups", edit("weight_shape") { $0.bytes[0] = 8 }, ["up_proj.weight_shape", "[8, 32]"]),
      ("packed int4, groups, zero points", drop("weight_zero_point"), ["up_proj.weight_zero_point", "missing"]),
      ("packed int4, groups, act-order", drop("weight_g_idx"), ["up_proj.weight_g_idx", "missing"]),
      (
        "packed int4, groups, act-order", edit("weight_g_idx") { $0.bytes[3] = 0x80 },
        ["up_proj.weight_g_idx", "input 0"]
      ),
      ("int8, channels", drop("weight"), ["up_proj.weight", "missing"]),
      ("int8, channels", drop("weight_scale"), ["up_proj.weight_scale", "missing", "[7, 1]"]),
      ("int8, channels", edit("weight", retype), ["up_proj.weight", "U8", "I8"]),
      ("int8, tensor", edit("weight_scale") { $0.shape = [1, 1, 1] }, ["up_proj.weight_scale", "[1, 1, 1]"]),
      ("float8, channels", edit("weight", retype), ["up_proj.weight", "F8_E5M2", "F8_E4M3"]),
      ("fp8 blocks", drop("weight_scale_inv"), ["up_proj.weight_scale_inv", "missing", "[3, 2]"]),
      ("fp8 blocks", edit("weight_scale_inv") { $0.shape = [2, 3] }, ["up_proj.weight_scale_inv", "[2, 3]"]),
      ("fp8 channels", drop("weight_scale"), ["up_proj.weight_scale", "missing"]),
    ]
    for (name, change, says) in list {
      let entry = try #require(cases[name])
      var tensors = entry.tensors
      change(&tensors)
      let error = #expect(throws: EngineError.self, "\(name)") {
        try Self.load(tensors, entry.json, shape: entry.shape)
      }
      #expect(error?.code == .invalidCheckpoint && error?.message.hasSuffix(".") == true)
      for text in says { #expect(error?.message.contains(text) == true, "\(error?.message ?? ""): \(text)") }
    }
    // Sizes that the format cannot hold.
    for name in ["gptq 4 bits, zero points", "awq"] {
      let entry = try #require(cases[name])
      let error = #expect(throws: EngineError.self) {
        try Self.load(entry.tensors, entry.json, shape: [entry.shape[0] + 4, entry.shape[1]])
      }
      #expect(error?.message.contains("up_proj.qweight") == true && error?.code == .invalidCheckpoint)
    }
    // An ignored layer has to be plain.
    let entry = try #require(cases["fp8 blocks"])
    guard case .object(var json) = entry.json else { return }
    json["modules_to_not_convert"] = ["up_proj"]
    let error = #expect(throws: EngineError.self) {
      try Self.load(entry.tensors, .object(json), shape: entry.shape)
    }
    #expect(error?.message.contains("up_proj.weight has type F8_E4M3") == true)
  }

  /// Headers and configurations changed at random: an error with a sentence or a matrix, never a crash.
  @Test func mutatedFilesAreRefusedOrRead() throws {
    var generator = SeededGenerator(seed: 31)
    var refused = 0
    let junk: [JSONValue] = [
      .null, 0, -1, 3, 7, 1.5, "", "group", "gptq", [], [0], [1_099_511_627_776, 2], ["a"], true,
    ]
    for entry in try Self.cases() {
      let good = safetensors(entry.tensors)
      let headerEnd = good.count - entry.tensors.reduce(0) { $0 + $1.bytes.count }
      for round in 0..<24 {
        var bytes = good
        var json = entry.json
        if round % 2 == 0 {
          for _ in 0..<2 {
            bytes[.random(in: 8..<headerEnd, using: &generator)] = .random(in: 32..<127, using: &generator)
          }
        } else {
          json = Self.mutated(json, with: junk.randomElement(using: &generator)!, &generator)
        }
        let directory = try TemporaryDirectory()
        try directory.write("model.safetensors", bytes)
        do {
          let quantization = try configuration([("quantization_config", json)]).quantization
          guard let quantization else { continue }
          let store = QuantizedCheckpoint(try SafetensorsCheckpoint(directory: directory.path), quantization)
          _ = try store.load("model.layers.0.mlp.up_proj.weight", shape: entry.shape, role: .matrix)
        } catch let error as EngineError {
          #expect([.invalidCheckpoint, .unsupported].contains(error.code) && error.message.hasSuffix("."))
          refused += 1
        }
      }
    }
    #expect(refused > 200)
  }

  /// One value somewhere in a tree replaced.
  private static func mutated(_ json: JSONValue, with value: JSONValue, _ generator: inout SeededGenerator) -> JSONValue
  {
    guard case .object(var object) = json, let key = object.keys.randomElement(using: &generator) else { return value }
    if Bool.random(using: &generator), case .object? = object[key] {
      object[key] = mutated(object[key]!, with: value, &generator)
    } else {
      object[key] = value
    }
    return .object(object)
  }
}

/// Whole tiny models.
struct QuantizedModelTests {
  struct Method {
    var name: String
    var changes: [(String, JSONValue)] = []
    var json: JSONValue
    /// The tensors of one matrix, by the ends of their names.
    var tensors: @Sendable (_ outputs: Int, _ inputs: Int, inout SeededGenerator) -> [FileTensor]
  }

  private static func random(
    _ name: String, _ type: String, _ shape: [Int], _ generator: inout SeededGenerator
  ) -> FileTensor {
    let count = shape.reduce(1, *)
    switch type {
    case "F32": return FileTensor(name, shape, (0..<count).map { _ in .random(in: 0.002...0.02, using: &generator) })
    case "F16":
      return FileTensor(
        name, type: type, shape,
        (0..<count).flatMap { _ in
          let bits = Float16(Float.random(in: 0.01...0.05, using: &generator)).bitPattern
          return [UInt8(bits & 255), UInt8(bits >> 8)]
        })
    case "F8_E4M3":
      // Below 240 in size, and no NaN.
      return FileTensor(
        name, type: type, shape, (0..<count).map { _ in UInt8.random(in: 0...255, using: &generator) & 0xBF })
    default:
      return FileTensor(
        name, type: type, shape,
        (0..<count * (type == "I32" ? 4 : 1)).map { _ in UInt8.random(in: 0...255, using: &generator) })
    }
  }

  private static func compressed(_ format: String, _ weights: JSONValue) -> JSONValue {
    [
      "quant_method": "compressed-tensors", "format": .string(format), "ignore": ["lm_head", "re:.*layers\\.1\\.mlp"],
      "config_groups": ["group_0": ["targets": ["Linear"], "weights": weights]],
    ]
  }

  static let methods: [Method] = [
    Method(
      name: "GPTQ, Qwen2", changes: [("architectures", ["Qwen2ForCausalLM"])],
      json: ["quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": true, "lm_head": false]
    ) { outputs, inputs, generator in
      let index = (0..<inputs).map { Int32($0 / 8) }.shuffled(using: &generator)
      return [
        random("qweight", "I32", [inputs / 8, outputs], &generator),
        random("qzeros", "I32", [inputs / 8, outputs / 8], &generator),
        random("scales", "F16", [inputs / 8, outputs], &generator),
        FileTensor(
          "g_idx", type: "I32", [inputs], index.flatMap { w in withUnsafeBytes(of: w) { Array($0) } }),
      ]
    },
    Method(
      name: "AWQ, Mistral", changes: [("architectures", ["MistralForCausalLM"])],
      json: [
        "quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": true,
        "modules_to_not_convert": ["model.layers.1.mlp"],
      ]
    ) { outputs, inputs, generator in
      [
        random("qweight", "I32", [inputs, outputs / 8], &generator),
        random("qzeros", "I32", [inputs / 8, outputs / 8], &generator),
        random("scales", "F16", [inputs / 8, outputs], &generator),
      ]
    },
    Method(
      name: "packed int4, Qwen3", changes: [("architectures", ["Qwen3ForCausalLM"]), ("head_dim", 8)],
      json: compressed("pack-quantized", ["num_bits": 4, "type": "int", "strategy": "group", "group_size": 8])
    ) { outputs, inputs, generator in
      [
        random("weight_packed", "I32", [outputs, inputs / 8], &generator),
        random("weight_scale", "F16", [outputs, inputs / 8], &generator),
      ]
    },
    Method(
      name: "int8 for each channel, tied", changes: [("tie_word_embeddings", true)],
      json: compressed("int-quantized", ["num_bits": 8, "type": "int", "strategy": "channel"])
    ) { outputs, inputs, generator in
      [
        random("weight", "I8", [outputs, inputs], &generator),
        random("weight_scale", "F32", [outputs, 1], &generator),
      ]
    },
    Method(
      name: "float8 for each tensor",
      json: compressed("float-quantized", ["num_bits": 8, "type": "float", "strategy": "tensor"])
    ) { outputs, inputs, generator in
      [random("weight", "F8_E4M3", [outputs, inputs], &generator), random("weight_scale", "F32", [1], &generator)]
    },
    Method(
      name: "fp8 blocks", changes: [("hidden_size", 160), ("intermediate_size", 200)],
      json: ["quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"]
    ) { outputs, inputs, generator in
      [
        random("weight", "F8_E4M3", [outputs, inputs], &generator),
        random("weight_scale_inv", "F32", [(outputs + 127) / 128, (inputs + 127) / 128], &generator),
      ]
    },
    Method(
      name: "ModelOpt fp8",
      json: ["quant_algo": "FP8", "ignore": ["lm_head"], "producer": ["name": "modelopt"]]
    ) { outputs, inputs, generator in
      [random("weight", "F8_E4M3", [outputs, inputs], &generator), random("weight_scale", "F32", [], &generator)]
    },
  ]

  private func shapes(_ model: ModelConfiguration) -> [(String, [Int])] {
    let (hidden, width, dimension) = (model.hiddenSize, model.intermediateSize, model.headDimension)
    let (query, keys) = (model.queryHeads * dimension, model.kvHeads * dimension)
    var list: [(String, [Int])] = [("model.embed_tokens.weight", [model.vocabularySize, hidden])]
    for layer in 0..<model.layerCount {
      let prefix = "model.layers.\(layer)."
      list += [
        (prefix + "input_layernorm.weight", [hidden]), (prefix + "post_attention_layernorm.weight", [hidden]),
        (prefix + "self_attn.q_proj.weight", [query, hidden]), (prefix + "self_attn.k_proj.weight", [keys, hidden]),
        (prefix + "self_attn.v_proj.weight", [keys, hidden]), (prefix + "self_attn.o_proj.weight", [hidden, query]),
        (prefix + "mlp.gate_proj.weight", [width, hidden]), (prefix + "mlp.up_proj.weight", [width, hidden]),
        (prefix + "mlp.down_proj.weight", [hidden, width]),
      ]
      if model.qkvBias {
        for (name, count) in [("q", query), ("k", keys), ("v", keys)] {
          list.append((prefix + "self_attn.\(name)_proj.bias", [count]))
        }
      }
      if model.queryKeyNorm {
        for name in ["q", "k"] { list.append((prefix + "self_attn.\(name)_norm.weight", [dimension])) }
      }
    }
    list.append(("model.norm.weight", [hidden]))
    if !model.tiedEmbeddings { list.append(("lm_head.weight", [model.vocabularySize, hidden])) }
    return list
  }

  /// A quantised model and the same one with its dequantised matrices stored as float32: equal logits, every bit.
  @Test(arguments: methods.indices)
  func logitsAreThoseOfTheDequantisedModel(index: Int) throws {
    let method = Self.methods[index]
    var generator = SeededGenerator(seed: UInt64(100 + index))
    var config = JSONObject([
      ("architectures", ["LlamaForCausalLM"]), ("hidden_size", 32), ("intermediate_size", 56),
      ("num_hidden_layers", 2), ("num_attention_heads", 4), ("num_key_value_heads", 2), ("vocab_size", 61),
      ("max_position_embeddings", 256), ("eos_token_id", 3), ("torch_dtype", "float16"),
    ])
    for (key, value) in method.changes { config[key] = value }
    let dense = try TemporaryDirectory()
    try dense.write("config.json", text(.object(config)))
    config["quantization_config"] = method.json
    let quantized = try TemporaryDirectory()
    try quantized.write("config.json", text(.object(config)))
    let model = try ModelConfiguration(directory: quantized.path)
    let quantization = try #require(model.quantization)

    var stored: [FileTensor] = []
    var plain: [FileTensor] = []
    var matrices: [(String, [Int])] = []
    for (name, shape) in shapes(model) {
      let module = String(name.dropLast(7))
      let isLinear = shape.count == 2 && name.contains("layers")
      if isLinear, quantization.scheme(for: module) != nil {
        for var tensor in method.tensors(shape[0], shape[1], &generator) {
          tensor.name = module + "." + tensor.name
          stored.append(tensor)
        }
        matrices.append((name, shape))
      } else {
        let range: ClosedRange<Float> = shape.count == 2 ? -0.3...0.3 : 0.5...1.5
        let tensor = FileTensor(
          name, shape, (0..<shape.reduce(1, *)).map { _ in .random(in: range, using: &generator) })
        stored.append(tensor)
        plain.append(tensor)
      }
    }
    #expect(matrices.count >= 11)
    try quantized.write("model.safetensors", safetensors(stored, padding: index))
    let store = QuantizedCheckpoint(try SafetensorsCheckpoint(directory: quantized.path), quantization)
    for (name, shape) in matrices {
      plain.append(
        FileTensor(name, type: "F32", shape, bytes(of: try store.load(name, shape: shape, role: .matrix))))
    }
    try dense.write("model.safetensors", safetensors(plain))

    let prompt: [TokenID] = [1, 17, 5, 60, 33, 8, 8, 41, 2]
    for backend in [testBackends.first!, testBackends.last!] {
      for dtype in [nil, DType.float32, .float16] {
        func logits(_ path: String, _ dtype: DType?) throws -> ([[UInt32]], ModelDescription) {
          var options = ModelOptions(path: path)
          options.dtype = dtype
          options.quantization = .dense
          options.kvCacheBytes = 1 << 20
          let loaded = try ModelLoader.load(options, backend: backend)
          let found = try loaded.steps.promptLogits(prompt, positions: [0, 4, 8])
          #expect(found.allSatisfy { $0.allSatisfy(\.isFinite) })
          return (found.map { $0.map(\.bitPattern) }, loaded.description)
        }
        let (found, description) = try logits(quantized.path, dtype)
        let (wanted, _) = try logits(dense.path, dtype ?? .bfloat16)
        #expect(found == wanted, "\(method.name) on \(backend.name)")
        #expect(Set(found[0]).count > 30)
        #expect(description.dtype == (dtype ?? .bfloat16).name)
      }
      // As it is stored: the same up to the rounding of activations. The output layer's plain numbers are rounded on request
      // only.
      var options = ModelOptions(path: quantized.path)
      options.kvCacheBytes = 1 << 20
      options.outputLayer = .int8
      let roundedFormat = try ModelLoader.load(options, backend: backend).steps.model.outputFormat
      #expect(roundedFormat == .int8PerChannel, "\(method.name)")
      options.outputLayer = .auto
      let loaded = try ModelLoader.load(options, backend: backend)
      #expect(loaded.steps.model.outputFormat == .dense(.bfloat16), "\(method.name)")
      options.quantization = .dense
      let plainModel = try ModelLoader.load(options, backend: backend)
      let found = try loaded.steps.promptLogits(prompt, positions: [0, 4, 8]).flatMap { $0 }
      let wanted = try plainModel.steps.promptLogits(prompt, positions: [0, 4, 8]).flatMap { $0 }
      let error = zip(found, wanted).reduce(Float(0)) { $0 + ($1.0 - $1.1) * ($1.0 - $1.1) }
      let total = wanted.reduce(Float(0)) { $0 + $1 * $1 }
      #expect(error < 0.01 * total, "\(method.name) on \(backend.name): \((error / total).squareRoot())")
    }
  }

  @Test func progressCountsDequantisedNumbers() throws {
    var generator = SeededGenerator(seed: 3)
    let method = Self.methods[1]
    let model = try configuration(method.changes + [("quantization_config", method.json)])
    var tensors: [FileTensor] = []
    for (name, shape) in shapes(model) {
      let module = String(name.dropLast(7))
      if shape.count == 2, name.contains("layers"), model.quantization!.scheme(for: module) != nil {
        for var tensor in method.tensors(shape[0], shape[1], &generator) {
          tensor.name = module + "." + tensor.name
          tensors.append(tensor)
        }
      } else {
        tensors.append(FileTensor(name, shape, [Float](repeating: 1, count: shape.reduce(1, *))))
      }
    }
    let directory = try TemporaryDirectory()
    try directory.write("model.safetensors", safetensors(tensors))
    let store = QuantizedCheckpoint(try SafetensorsCheckpoint(directory: directory.path), model.quantization!)
    var reports: [(done: Int, total: Int)] = []
    _ = try LanguageModel(
      model, store: store, backend: testBackends[0], options: WeightOptions(quantization: .dense)
    ) { reports.append(($0, $1)) }
    #expect(zip(reports, reports.dropFirst()).allSatisfy { $0.done <= $1.done })
    #expect(reports.last!.done == reports.last!.total && reports.dropLast(2).allSatisfy { $0.done < $0.total })
  }
}

/// What `quantization_config` may say.
struct QuantizationConfigurationTests {
  @Test func variantsAreRefusedWithASentence() throws {
    func compressed(_ format: JSONValue, _ weights: JSONValue, _ more: [(String, JSONValue)] = []) -> JSONValue {
      .object(
        JSONObject(
          [
            ("quant_method", "compressed-tensors"), ("format", format),
            ("config_groups", ["group_0": ["targets": ["Linear"], "weights": weights]]),
          ] + more))
    }
    let list: [(JSONValue, EngineError.Code, [String])] = [
      (["quant_method": "bitsandbytes", "load_in_4bit": true], .unsupported, ["bitsandbytes", "GPTQ"]),
      (["quant_method": "exl2", "bits": 4.5], .unsupported, ["EXL2"]),
      (["quant_method": "hqq"], .unsupported, ["HQQ"]),
      (["quant_method": "quark"], .unsupported, ["Quark"]),
      (["quant_method": "mxfp4"], .unsupported, ["MXFP4"]),
      (["quant_method": "auto-round"], .unsupported, ["AutoRound"]),
      (["quant_method": "modelopt", "quant_algo": "NVFP4"], .unsupported, ["ModelOpt", "NVFP4"]),
      (["quant_algo": "NVFP4"], .unsupported, ["NVFP4"]),
      (["quant_method": "somethingnew"], .unsupported, ["somethingnew"]),
      (["bits": 4], .invalidCheckpoint, ["quant_method is missing"]),
      ("gptq", .invalidCheckpoint, ["object"]),
      (["quant_method": "gptq", "bits": 3, "group_size": 8], .unsupported, ["3 bits"]),
      (["quant_method": "gptq", "group_size": 8], .invalidCheckpoint, ["bits is missing"]),
      (["quant_method": "gptq", "bits": 4], .invalidCheckpoint, ["group_size"]),
      (["quant_method": "gptq", "bits": 4, "group_size": 0], .invalidCheckpoint, ["group_size"]),
      (
        ["quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": "marlin"], .unsupported, ["marlin"]
      ),
      (
        ["quant_method": "gptq", "bits": 4, "group_size": 8, "dynamic": ["+:.*": ["bits": 8]]], .unsupported,
        ["dynamic"]
      ),
      (["quant_method": "awq", "bits": 8, "group_size": 8], .unsupported, ["8 bits"]),
      (["quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemv"], .unsupported, ["gemv"]),
      (
        ["quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "backend": "llm-awq"], .unsupported,
        ["llm-awq"]
      ),
      (["quant_method": "fp8", "fmt": "e5m2"], .unsupported, ["e5m2"]),
      (["quant_method": "fp8", "weight_block_size": [128]], .invalidCheckpoint, ["weight_block_size"]),
      (["quant_method": "fp8", "ignored_layers": "lm_head"], .invalidCheckpoint, ["ignored_layers"]),
      (compressed("pack-quantized", ["num_bits": 3, "type": "int"]), .unsupported, ["3 bits"]),
      (compressed("nvfp4-pack-quantized", ["num_bits": 4, "type": "float"]), .unsupported, ["nvfp4-pack-quantized"]),
      (compressed("marlin-24", ["num_bits": 4, "type": "int"]), .unsupported, ["marlin-24"]),
      (
        compressed("int-quantized", ["num_bits": 8, "type": "int", "strategy": "token"]), .unsupported,
        ["strategy token"]
      ),
      (
        compressed(
          "int-quantized", ["num_bits": 8, "type": "int"], [("sparsity_config", ["format": "sparse-24-bitmask"])]),
        .unsupported, ["sparse-24-bitmask"]
      ),
      (
        compressed("int-quantized", ["num_bits": 8, "type": "int"], [("ignore", ["re:(("])]), .invalidCheckpoint,
        ["re:((", "regular expression"]
      ),
      (["quant_method": "compressed-tensors", "format": "int-quantized"], .invalidCheckpoint, ["config_groups"]),
    ]
    for (json, code, says) in list {
      let error = #expect(throws: EngineError.self, "\(json)") {
        try configuration([("quantization_config", json)])
      }
      #expect(error?.code == code && error?.message.hasSuffix(".") == true, "\(error?.message ?? "")")
      for text in ["config.json: quantization_config"] + says {
        #expect(error?.message.contains(text) == true, "\(error?.message ?? ""): \(text)")
      }
    }
  }

  @Test func listsNameModules() throws {
    let json: JSONValue = [
      "quant_method": "compressed-tensors", "format": "mixed-precision",
      "ignore": ["lm_head", "re:.*self_attn\\.o_proj", "gate", "model.layers.3", "*layers.4.mlp*"],
      "config_groups": [
        "group_0": [
          "targets": ["Linear"], "format": "pack-quantized",
          "weights": ["num_bits": 4, "group_size": 32, "actorder": "group"],
        ],
        "group_1": [
          "targets": ["re:.*down_proj"], "format": "float-quantized",
          "weights": ["num_bits": 8, "type": "float", "strategy": "channel"],
        ],
      ],
    ]
    let read = try #require(try configuration([("quantization_config", json)]).quantization)
    let packed = QuantizationConfiguration.Scheme.packedInteger(
      bits: 4, scales: .group(32), isSymmetric: true, actOrder: true)
    #expect(read.scheme(for: "model.layers.0.mlp.gate_proj") == packed)
    #expect(read.scheme(for: "model.layers.30.mlp.gate_proj") == packed)
    #expect(read.scheme(for: "model.layers.0.mlp.down_proj") == .float8(scales: .channel))
    for module in [
      "lm_head", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate", "model.layers.3.mlp.up_proj",
      "model.layers.4.mlp.up_proj",
    ] {
      #expect(read.scheme(for: module) == nil, "\(module)")
    }
    #expect(read.scheme(for: "model.layers.4.self_attn.q_proj") == packed)
    #expect(try configuration([("quantization_config", .null)]).quantization == nil)
    #expect(try configuration([("compression_config", json)]).quantization == read)
  }

  @Test(.enabled(if: Paths.dataHas("configs/aiconfigurator")))
  func realConfigurations() throws {
    for (name, scales) in [
      ("Qwen--Qwen3-32B-FP8_config", QuantizationConfiguration.Scales.block(128, 128)),
      ("Qwen--Qwen3-32B-FP8-Static-PerTensor_config", .tensorOrChannel),
    ] {
      let path = "\(Paths.data)/configs/aiconfigurator/\(name).json"
      guard Paths.exists(path) else { continue }
      let read = try #require(try ModelConfiguration(json: Paths.json(path), path: name).quantization)
      #expect(read.scheme(for: "model.layers.0.mlp.up_proj") == .float8(scales: scales))
    }
    // The other quantised files are of architectures that are not here: what their entries say of weights is still
    // read, or refused with a sentence.
    var methods: [String: Int] = [:]
    let files = FileManager.default.enumerator(atPath: Paths.data + "/configs")!
    for case let file as String in files where file.hasSuffix(".json") {
      guard let json = try? Paths.json(Paths.data + "/configs/" + file) else { continue }
      guard let entry = json["quantization_config"] ?? json["text_config"]?["quantization_config"], !entry.isNull
      else { continue }
      do {
        let read = try #require(try configuration([("quantization_config", entry)]).quantization)
        methods[read.method, default: 0] += 1
        #expect(!read.groups.isEmpty, "\(file)")
      } catch let error as EngineError {
        methods["refused", default: 0] += 1
        #expect(error.code == .unsupported && error.message.hasSuffix("."), "\(file): \(error.message)")
        let refused = ["NVFP4", "MXFP4", "mxfp4", "MIXED_PRECISION", "W4A8"]
        #expect(refused.contains { error.message.contains($0) }, "\(file): \(error.message)")
      }
    }
    print("Quantised configurations: \(methods.sorted { $0.key < $1.key }.map { "\($0.key) \($0.value)" }).")
    #expect((methods["fp8"] ?? 0) >= 10)
  }
}
