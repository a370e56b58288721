import ApusConversion
import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import Foundation
import Testing

/// Where this package and the shared test data lie.
enum Paths {
  static let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent().path
  static let goldens = root + "/Tests/ApusConversionTests/Goldens"
  /// `../shared/data` beside the package, or where APUS_SHARED_DATA says.
  static let data = ProcessInfo.processInfo.environment["APUS_SHARED_DATA"] ?? root + "/../shared/data"

  /// Whether shared data is there; prints a sentence where it is not.
  static func dataHas(_ path: String) -> Bool {
    if FileManager.default.fileExists(atPath: data + "/" + path) { return true }
    print("Skipped: \(data)/\(path) does not exist.")
    return false
  }

  static func json(_ path: String) throws -> JSONValue {
    try JSONValue.parse([UInt8](Data(contentsOf: URL(fileURLWithPath: path))))
  }
}

/// A seeded generator: the splitmix64 sequence.
struct SeededGenerator: RandomNumberGenerator {
  private var state: UInt64
  init(seed: UInt64) { state = seed }

  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
    return z ^ z >> 31
  }

  /// Roughly normal.
  mutating func normal() -> Float {
    (0..<6).reduce(Float(0)) { sum, _ in sum + .random(in: -1...1, using: &self) } / 1.414
  }
}

/// A directory that goes away with the test.
final class Folder {
  let path = NSTemporaryDirectory() + "apus-\(UUID().uuidString)"
  init() throws { try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true) }
  deinit { try? FileManager.default.removeItem(atPath: path) }
  @discardableResult func write(_ name: String, _ bytes: [UInt8]) throws -> String {
    try Data(bytes).write(to: URL(fileURLWithPath: "\(path)/\(name)"))
    return "\(path)/\(name)"
  }
  @discardableResult func write(_ name: String, _ text: String) throws -> String { try write(name, Array(text.utf8)) }
  func names(_ name: String = "") -> [String] {
    ((try? FileManager.default.contentsOfDirectory(atPath: path + "/" + name)) ?? []).sorted()
  }
}

/// A tensor of a file.
struct FileTensor: Equatable {
  var name: String
  var type: String
  var shape: [Int]
  var bytes: [UInt8]

  init(_ name: String, _ type: String, _ shape: [Int], _ bytes: [UInt8]) {
    (self.name, self.type, self.shape, self.bytes) = (name, type, shape, bytes)
  }
  init(_ name: String, _ shape: [Int], _ numbers: [Float]) {
    self.init(name, "F32", shape, numbers.flatMap { number in withUnsafeBytes(of: number) { Array($0) } })
  }
}

func safetensors(_ tensors: [FileTensor]) -> [UInt8] {
  var entries: [String] = []
  var data: [UInt8] = []
  for tensor in tensors {
    let end = data.count + tensor.bytes.count
    entries.append(
      "\"\(tensor.name)\":{\"dtype\":\"\(tensor.type)\",\"shape\":\(tensor.shape),\"data_offsets\":[\(data.count),\(end)]}"
    )
    data += tensor.bytes
  }
  let header = Array("{\(entries.joined(separator: ","))}".utf8)
  return withUnsafeBytes(of: UInt64(header.count).littleEndian) { Array($0) } + header + data
}

/// The tensors of a directory, by name.
func tensors(_ directory: String) throws -> [String: FileTensor] {
  let checkpoint = try SafetensorsCheckpoint(directory: directory)
  var result: [String: FileTensor] = [:]
  for tensor in checkpoint.listing {
    let stored = try #require(checkpoint.stored(tensor.name))
    result[tensor.name] = FileTensor(tensor.name, stored.typeName, tensor.shape, Array(stored.bytes))
  }
  return result
}

func floats(_ tensor: FileTensor) -> [Float] {
  tensor.bytes.withUnsafeBytes { bytes in
    (0..<tensor.shape.reduce(1, *)).map { index in
      switch tensor.type {
      case "F16": Float(Float16(bitPattern: bytes.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self)))
      case "BF16": Float(bitPattern: UInt32(bytes.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self)) << 16)
      default: bytes.loadUnaligned(fromByteOffset: 4 * index, as: Float.self)
      }
    }
  }
}

/// A small tokenizer that works on bytes: tokens for all 256 and for some merges.
func smallTokenizer(size: Int) -> String {
  // GPT-2's alphabet: visible bytes stand for themselves, others for characters from U+0100 on.
  let visible = Set(33...126).union(161...172).union(174...255)
  var next = 256
  var letters: [String] = []
  for byte in 0..<256 {
    if visible.contains(byte) {
      letters.append(String(UnicodeScalar(UInt8(byte))))
    } else {
      letters.append(String(UnicodeScalar(UInt32(next))!))
      next += 1
    }
  }
  let merges = [("t", "h"), ("th", "e"), ("i", "n"), (letters[32], "the"), ("e", "r"), (letters[32], "a")]
  var tokens = letters + merges.map { $0.0 + $0.1 }
  tokens.append("<|end|>")
  precondition(tokens.count <= size)
  func quoted(_ text: String) -> String { JSONValue.string(text).compactText }
  let vocabulary = tokens.enumerated().map { "\(quoted($1)):\($0)" }.joined(separator: ",")
  let pairs = merges.map { "[\(quoted($0.0)),\(quoted($0.1))]" }.joined(separator: ",")
  return """
    {"version":"1.0","truncation":null,"padding":null,
     "added_tokens":[{"id":\(tokens.count - 1),"content":"<|end|>","single_word":false,"lstrip":false,"rstrip":false,
       "normalized":false,"special":true}],
     "normalizer":null,"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},
     "post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},
     "model":{"type":"BPE","dropout":null,"unk_token":null,"fuse_unk":false,"byte_fallback":false,
       "vocab":{\(vocabulary)},"merges":[\(pairs)]}}
    """
}

/// A checkpoint directory with random weights of a small model.
struct SmallModel {
  var config: JSONObject
  var type = DType.float32
  var seed: UInt64 = 1

  init(_ changes: [(String, JSONValue)] = []) {
    config = JSONObject([
      ("architectures", ["LlamaForCausalLM"]), ("model_type", "llama"), ("hidden_size", 64), ("intermediate_size", 96),
      ("num_hidden_layers", 2), ("num_attention_heads", 4), ("num_key_value_heads", 2), ("vocab_size", 272),
      ("max_position_embeddings", 256), ("initializer_range", 0.2), ("rms_norm_eps", 1e-5), ("eos_token_id", 262),
      ("torch_dtype", "float32"),
    ])
    for (key, value) in changes { config[key] = value }
  }

  func weights() throws -> [FileTensor] {
    var plain = config
    plain["quantization_config"] = nil
    let configuration = try ModelConfiguration(json: .object(plain))
    let store = DummyWeights(seed: seed, initializerRange: configuration.initializerRange, dtype: type)
    let name = [DType.float32: "F32", .float16: "F16", .bfloat16: "BF16"][type]!
    return try Self.shapes(configuration).map { weight, shape in
      let role: WeightRole = shape.count == 2 ? .matrix : weight.hasSuffix(".bias") ? .bias : .norm
      let source = try store.load(weight, shape: shape, role: role)
      let bytes = UnsafeRawBufferPointer(start: source.address, count: shape.reduce(1, *) * type.byteCount)
      return withExtendedLifetime(source.owner) { FileTensor(weight, name, shape, Array(bytes)) }
    }
  }

  static func shapes(_ c: ModelConfiguration) -> [(String, [Int])] {
    let (query, keyValue) = (c.queryHeads * c.headDimension, c.kvHeads * c.headDimension)
    var list: [(String, [Int])] = [
      ("model.embed_tokens.weight", [c.vocabularySize, c.hiddenSize]), ("model.norm.weight", [c.hiddenSize]),
    ]
    if !c.tiedEmbeddings { list.append(("lm_head.weight", [c.vocabularySize, c.hiddenSize])) }
    for layer in 0..<c.layerCount {
      let name = "model.layers.\(layer)."
      func linear(_ part: String, _ outputs: Int, _ inputs: Int, _ hasBias: Bool) {
        list.append((name + part + ".weight", [outputs, inputs]))
        if hasBias { list.append((name + part + ".bias", [outputs])) }
      }
      linear("self_attn.q_proj", query, c.hiddenSize, c.qkvBias)
      linear("self_attn.k_proj", keyValue, c.hiddenSize, c.qkvBias)
      linear("self_attn.v_proj", keyValue, c.hiddenSize, c.qkvBias)
      linear("self_attn.o_proj", c.hiddenSize, query, c.attentionOutputBias)
      linear("mlp.gate_proj", c.intermediateSize, c.hiddenSize, c.mlpBias)
      linear("mlp.up_proj", c.intermediateSize, c.hiddenSize, c.mlpBias)
      linear("mlp.down_proj", c.hiddenSize, c.intermediateSize, c.mlpBias)
      for norm in ["input_layernorm", "post_attention_layernorm"] {
        list.append((name + norm + ".weight", [c.hiddenSize]))
      }
      if c.queryKeyNorm {
        for norm in ["q_norm", "k_norm"] { list.append((name + "self_attn.\(norm).weight", [c.headDimension])) }
      }
    }
    return list
  }

  /// Writes the directory.
  func write(_ folder: Folder, _ name: String = "model") throws -> String {
    let path = "\(folder.path)/\(name)"
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    try folder.write("\(name)/config.json", JSONValue.object(config).compactText)
    try folder.write("\(name)/model.safetensors", safetensors(weights()))
    try folder.write("\(name)/tokenizer.json", smallTokenizer(size: 272))
    try folder.write(
      "\(name)/tokenizer_config.json",
      #"{"eos_token":"<|end|>","tokenizer_class":"PreTrainedTokenizerFast","chat_template":"{{ messages[0].content }}"}"#
    )
    try folder.write("\(name)/generation_config.json", #"{"eos_token_id":262,"temperature":0.7}"#)
    return path
  }
}

let backend: CPUBackend = try! CPUBackend(threads: 2)

func load(_ path: String, _ configure: (inout ModelOptions) -> Void = { _ in }) throws -> LoadedModel {
  var options = ModelOptions(path: path)
  options.maxTokensPerStep = 512
  options.maxRunningRequests = 4
  options.kvCacheBytes = 4 << 20
  configure(&options)
  return try ModelLoader.load(options, backend: backend)
}

let prompt: [TokenID] = [3, 60, 7, 7, 1, 42, 0, 13, 22, 9]

func logits(_ path: String, dtype: DType? = nil) throws -> [[Float]] {
  try load(path) {
    $0.dtype = dtype
    // With a type, the numbers that the file stands for.
    if dtype != nil { $0.quantization = .dense }
  }.steps.promptLogits(prompt, positions: [0, 4, 9])
}

@discardableResult
func convert(
  _ input: String, _ output: String, _ format: String, _ configure: (inout ConversionOptions) -> Void = { _ in }
) throws -> ConversionReport {
  var options = ConversionOptions(input: input, output: output, format: try #require(ConversionFormat(name: format)))
  configure(&options)
  return try Converter.convert(options, threads: 2)
}
