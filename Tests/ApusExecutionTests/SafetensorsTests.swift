import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import Foundation
import Testing

/// A directory that is removed with the object.
final class TemporaryDirectory {
  let path: String

  init() throws {
    path = NSTemporaryDirectory() + "apus-models-" + UUID().uuidString
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
  }

  deinit { try? FileManager.default.removeItem(atPath: path) }

  func write(_ name: String, _ bytes: [UInt8]) throws {
    try Data(bytes).write(to: URL(fileURLWithPath: path + "/" + name))
  }
  func write(_ name: String, _ text: String) throws { try write(name, Array(text.utf8)) }
}

/// A tensor for a file.
struct FileTensor {
  var name: String
  var type = "F32"
  var shape: [Int]
  var bytes: [UInt8]

  init(_ name: String, type: String, _ shape: [Int], _ bytes: [UInt8]) {
    self.name = name
    self.type = type
    self.shape = shape
    self.bytes = bytes
  }

  init(_ name: String, _ shape: [Int], _ values: [Float]) {
    self.name = name
    self.shape = shape
    bytes = values.flatMap { value in withUnsafeBytes(of: value) { Array($0) } }
  }
}

func safetensors(header: String, data: [UInt8]) -> [UInt8] {
  withUnsafeBytes(of: UInt64(header.utf8.count).littleEndian) { Array($0) } + Array(header.utf8) + data
}

func safetensors(_ tensors: [FileTensor], padding: Int = 0) -> [UInt8] {
  var entries = [#""__metadata__":{"format":"pt"}"#]
  var data: [UInt8] = []
  for tensor in tensors {
    let end = data.count + tensor.bytes.count
    entries.append(
      "\"\(tensor.name)\":{\"dtype\":\"\(tensor.type)\",\"shape\":\(tensor.shape),\"data_offsets\":[\(data.count),\(end)]}"
    )
    data += tensor.bytes
  }
  return safetensors(header: "{\(entries.joined(separator: ","))}" + String(repeating: " ", count: padding), data: data)
}

private let config = """
  {"architectures":["LlamaForCausalLM"],"hidden_size":8,"intermediate_size":12,"num_hidden_layers":1,
   "num_attention_heads":2,"num_key_value_heads":1,"vocab_size":10,"max_position_embeddings":32,"eos_token_id":3}
  """

/// All weights of the model above.
private func weights() -> [FileTensor] {
  let shapes: [(String, [Int])] = [
    ("model.embed_tokens", [10, 8]), ("model.layers.0.input_layernorm", [8]),
    ("model.layers.0.self_attn.q_proj", [8, 8]), ("model.layers.0.self_attn.k_proj", [4, 8]),
    ("model.layers.0.self_attn.v_proj", [4, 8]), ("model.layers.0.self_attn.o_proj", [8, 8]),
    ("model.layers.0.post_attention_layernorm", [8]), ("model.layers.0.mlp.gate_proj", [12, 8]),
    ("model.layers.0.mlp.up_proj", [12, 8]), ("model.layers.0.mlp.down_proj", [8, 12]), ("model.norm", [8]),
    ("lm_head", [10, 8]),
  ]
  var generator = SeededGenerator(seed: 9)
  return shapes.map { name, shape in
    FileTensor(
      name + ".weight", shape,
      (0..<shape.reduce(1, *)).map { _ in Float.random(in: -0.5...0.5, using: &generator) })
  }
}

struct SafetensorsTests {
  private func load(_ directory: TemporaryDirectory) throws -> LoadedModel {
    var options = ModelOptions(path: directory.path)
    options.maxTokensPerStep = 16
    options.maxRunningRequests = 2
    options.kvCacheBytes = 1 << 16
    return try ModelLoader.load(options, backend: testBackends.last!)
  }

  private func refusal(_ bytes: [UInt8]) throws -> EngineError? {
    let directory = try TemporaryDirectory()
    try directory.write("config.json", config)
    try directory.write("model.safetensors", bytes)
    do {
      _ = try load(directory)
      return nil
    } catch { return error as? EngineError }
  }

  @Test func singleAndShardedFilesGiveTheSameLogits() throws {
    let single = try TemporaryDirectory()
    try single.write("config.json", config)
    try single.write("generation_config.json", #"{"eos_token_id":[4,5],"temperature":0.5}"#)
    // An odd header length puts every number at an odd address.
    try single.write("model.safetensors", safetensors(weights(), padding: 3))
    let sharded = try TemporaryDirectory()
    try sharded.write("config.json", config)
    let (first, second) = (Array(weights()[..<5]), Array(weights()[5...]))
    try sharded.write("a.safetensors", safetensors(first))
    try sharded.write("b.safetensors", safetensors(second))
    let map = (first.map { "\"\($0.name)\":\"a.safetensors\"" } + second.map { "\"\($0.name)\":\"b.safetensors\"" })
      .joined(separator: ",")
    try sharded.write("model.safetensors.index.json", "{\"metadata\":{},\"weight_map\":{\(map)}}")

    let models = try [load(single), load(sharded)]
    let logits = try models.map { try $0.steps.promptLogits([1, 2, 3, 9], positions: [0, 3]) }
    #expect(logits[0] == logits[1])
    #expect(Set(logits[0][1]).count == 10)
    #expect(models[0].description.eosTokenIDs == [4, 5] && models[1].description.eosTokenIDs == [3])
    #expect(models[0].description.samplingDefaults.temperature == 0.5)
    #expect(models[0].description.parameterCount == weights().reduce(0) { $0 + $1.shape.reduce(1, *) })
  }

  @Test func tensorsAreFoundAtEveryAlignment() throws {
    let expected = try refusalFreeLogits(padding: 0)
    for padding in 1..<8 { #expect(try refusalFreeLogits(padding: padding) == expected) }
  }

  private func refusalFreeLogits(padding: Int) throws -> [[Float]] {
    let directory = try TemporaryDirectory()
    try directory.write("config.json", config)
    try directory.write("model.safetensors", safetensors(weights(), padding: padding))
    return try load(directory).steps.promptLogits([5, 6, 7], positions: [2])
  }

  @Test func brokenFilesAreRefused() throws {
    let good = safetensors(weights())
    #expect(try refusal(good) == nil)

    func changed(_ change: (inout [FileTensor]) -> Void) -> [UInt8] {
      var tensors = weights()
      change(&tensors)
      return safetensors(tensors)
    }
    let cases: [(bytes: [UInt8], says: [String])] = [
      ([], ["empty"]),
      ([1, 2, 3], ["at least 10 bytes"]),
      (Array(good.dropLast(5)), ["lm_head.weight", "truncated"]),
      (Array(good.prefix(40)), ["the file ends"]),
      (good + [0], ["the tensors end"]),
      (Array("GGUF".utf8) + [UInt8](repeating: 0xFF, count: 60), ["not a safetensors file"]),
      (safetensors(header: "[1,2]", data: []), ["header"]),
      (safetensors(header: "{\"a\":{\"dtype\":\"F32\"}}", data: []), ["a", "shape"]),
      (
        safetensors(header: "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", data: [0, 0, 0, 0]),
        ["non-negative"]
      ),
      (
        safetensors(header: "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", data: [0, 0, 0, 0]),
        ["data_offsets"]
      ),
      (
        safetensors(header: "{\"a\":{\"dtype\":\"Q9\",\"shape\":[1],\"data_offsets\":[0,4]}}", data: [0, 0, 0, 0]),
        ["unknown type Q9"]
      ),
      (
        safetensors(
          header: "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,16],\"data_offsets\":[0,4]}}",
          data: [0, 0, 0, 0]), ["too large"]
      ),
      (
        safetensors(header: "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", data: [0, 0, 0, 0]),
        ["needs 8 bytes"]
      ),
      (
        safetensors(
          header: "{\"a\":{\"dtype\":\"I8\",\"shape\":[3],\"data_offsets\":[0,3]},"
            + "\"b\":{\"dtype\":\"I8\",\"shape\":[3],\"data_offsets\":[2,5]}}", data: [0, 0, 0, 0, 0]),
        ["b", "overlaps"]
      ),
      (
        safetensors(
          header: "{\"a\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[0,1]},"
            + "\"b\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[3,4]}}", data: [0, 0, 0, 0]),
        ["b", "ends at byte 1"]
      ),
      (
        safetensors(
          header: "{\"a\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[0,1]},"
            + "\"a\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[1,2]}}", data: [0, 0]), ["listed twice"]
      ),
      (changed { $0.removeAll { $0.name.contains("v_proj") } }, ["self_attn.v_proj.weight", "missing", "[4, 8]"]),
      (changed { $0[2].shape = [4, 16] }, ["q_proj", "[4, 16]", "[8, 8]"]),
      (changed { $0[2].type = "I32" }, ["q_proj", "I32", "F32, F16 or BF16"]),
      (changed { $0[10].type = "U32" }, ["model.norm.weight", "U32"]),
    ]
    for entry in cases {
      let error = try refusal(entry.bytes)
      #expect(error?.code == .invalidCheckpoint, "\(entry.says)")
      for text in ["model.safetensors"] + entry.says {
        #expect(error?.message.contains(text) == true, "\(error?.message ?? "accepted"): \(text)")
      }
    }
  }

  /// Bytes of the header changed at random: an error or a model, never a crash.
  @Test func mutatedHeaders() throws {
    let good = safetensors(weights())
    let headerEnd = good.count - weights().reduce(0) { $0 + $1.bytes.count }
    var generator = SeededGenerator(seed: 77)
    var refused = 0
    for _ in 0..<300 {
      var bytes = good
      for _ in 0..<Int.random(in: 1...3, using: &generator) {
        bytes[.random(in: 0..<headerEnd, using: &generator)] = .random(in: 0...255, using: &generator)
      }
      if let error = try refusal(bytes) {
        #expect(error.code == .invalidCheckpoint && error.message.hasSuffix("."))
        refused += 1
      }
    }
    #expect(refused > 200)
  }

  @Test func brokenDirectoriesAreRefused() throws {
    func refusal(_ prepare: (TemporaryDirectory) throws -> Void) throws -> EngineError? {
      let directory = try TemporaryDirectory()
      try prepare(directory)
      do {
        _ = try load(directory)
        return nil
      } catch { return error as? EngineError }
    }
    #expect(try refusal { _ in }?.message.contains("config.json does not exist") == true)
    #expect(try refusal { try $0.write("config.json", "{") }?.message.contains("config.json") == true)
    #expect(try refusal { try $0.write("config.json", "[]") }?.message.contains("expected an object") == true)
    #expect(try refusal { try $0.write("config.json", config) }?.message.contains("model.safetensors") == true)
    let index = "model.safetensors.index.json"
    for (text, says) in [
      ("{", index), ("{}", "weight_map"), (#"{"weight_map":{"a":3}}"#, "plain file name"),
      (#"{"weight_map":{"a":"../x.safetensors"}}"#, "plain file name"),
      (#"{"weight_map":{"lm_head.weight":"x.safetensors"}}"#, "x.safetensors"),
    ] {
      let error = try refusal { directory in
        try directory.write("config.json", config)
        try directory.write(index, text)
      }
      #expect(error?.code == .invalidCheckpoint && error?.message.contains(says) == true, "\(text)")
    }
    let misplaced = try refusal { directory in
      try directory.write("config.json", config)
      try directory.write("x.safetensors", safetensors(weights()))
      try directory.write(index, #"{"weight_map":{"elsewhere.weight":"x.safetensors"}}"#)
    }
    #expect(misplaced?.message.contains("elsewhere.weight") == true)
  }

  @Test func impossibleOptionsAreRefused() throws {
    let cases: [((inout ModelOptions) -> Void, EngineError.Code)] = [
      ({ $0.contextLength = 0 }, .invalidRequest), ({ $0.contextLength = 100_000 }, .invalidRequest),
      ({ $0.maxTokensPerStep = 0 }, .invalidRequest), ({ $0.maxRunningRequests = 0 }, .invalidRequest),
      ({ $0.dtype = .int8 }, .invalidRequest), ({ $0.kvDType = .int32 }, .invalidRequest),
      ({ $0.memoryFraction = 1.5 }, .invalidRequest), ({ $0.kvCacheBytes = 10 }, .outOfMemory),
    ]
    for (configure, code) in cases {
      let error = #expect(throws: EngineError.self) { try makeTinyModel([:], configure) }
      #expect(error?.code == code)
    }
  }
}
