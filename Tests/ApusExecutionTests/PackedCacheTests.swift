import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import Foundation
import Synchronization
import Testing

/// Files of packed weights between starts.
struct PackedCacheTests {
  /// A checkpoint of two layers with random weights; tied embeddings, biases of q, k and v.
  private static func writeCheckpoint(_ directory: TemporaryDirectory, seed: UInt64, outliers: Bool = false) throws {
    try directory.write(
      "config.json",
      """
      {"architectures":["Qwen2ForCausalLM"],"hidden_size":96,"intermediate_size":160,"num_hidden_layers":2,
       "num_attention_heads":4,"num_key_value_heads":2,"vocab_size":131,"max_position_embeddings":128,"eos_token_id":3,
       "tie_word_embeddings":true}
      """)
    var generator = SeededGenerator(seed: seed)
    var shapes: [(String, [Int])] = [("model.embed_tokens.weight", [131, 96])]
    for layer in 0..<2 {
      let prefix = "model.layers.\(layer)."
      shapes += [
        (prefix + "input_layernorm.weight", [96]), (prefix + "post_attention_layernorm.weight", [96]),
        (prefix + "self_attn.q_proj.weight", [96, 96]), (prefix + "self_attn.k_proj.weight", [48, 96]),
        (prefix + "self_attn.v_proj.weight", [48, 96]), (prefix + "self_attn.o_proj.weight", [96, 96]),
        (prefix + "self_attn.q_proj.bias", [96]), (prefix + "self_attn.k_proj.bias", [48]),
        (prefix + "self_attn.v_proj.bias", [48]), (prefix + "mlp.gate_proj.weight", [160, 96]),
        (prefix + "mlp.up_proj.weight", [160, 96]), (prefix + "mlp.down_proj.weight", [96, 160]),
      ]
    }
    shapes.append(("model.norm.weight", [96]))
    let tensors = shapes.map { name, shape in
      var values = (0..<shape.reduce(1, *)).map { _ in Float.random(in: -0.2...0.2, using: &generator) }
      if outliers, name.contains("down_proj") {
        for index in stride(from: 0, to: values.count, by: 97) { values[index] = 9 }
      }
      return FileTensor(name, shape, values)
    }
    try directory.write("model.safetensors", safetensors(tensors))
  }

  private static func load(
    _ path: String, _ cache: PackedWeightCache.Location?, quantization: WeightQuantization = .stored,
    outputLayer: OutputLayerQuantization = .auto, dtype: DType? = .bfloat16, backend: any Backend = testBackends.last!
  ) throws -> (logits: [[UInt32]], description: ModelDescription) {
    var options = ModelOptions(path: path)
    options.maxTokensPerStep = 16
    options.maxRunningRequests = 2
    options.kvCacheBytes = 1 << 18
    options.dtype = dtype
    options.quantization = quantization
    options.outputLayer = outputLayer
    options.packedCache = cache
    let loaded = try ModelLoader.load(options, backend: backend)
    let logits = try loaded.steps.promptLogits([1, 2, 3, 100, 5, 130], positions: [0, 3, 5])
    return (logits.map { $0.map(\.bitPattern) }, loaded.description)
  }

  private static func files(_ path: String) -> [String] {
    ((try? FileManager.default.contentsOfDirectory(atPath: path)) ?? []).filter { $0.contains("apus-packed") }.sorted()
  }

  private static func isMapped(_ description: ModelDescription) -> Bool {
    description.packedCache?.hasPrefix("Packed weights were mapped from ") == true
  }

  private static let formats: [WeightQuantization] = [
    .stored, .dense, .int8, .codes(.int8), .codes(.int4), .codes(.float8),
  ]

  @Test func logitsAreTheSameBits() throws {
    for level in InstructionSet.supported {
      let backend = try CPUBackend(threads: 2, isa: level)
      for (number, quantization) in Self.formats.enumerated() {
        let directory = try TemporaryDirectory()
        // Where int8 is too coarse for a layer, the file has to know.
        try Self.writeCheckpoint(directory, seed: 5, outliers: number % 2 == 0)
        let dtype: DType? = number == 0 ? nil : number == 1 ? .float16 : .bfloat16
        let plain = try Self.load(directory.path, nil, quantization: quantization, dtype: dtype, backend: backend)
        #expect(plain.description.packedCache == nil && Self.files(directory.path).isEmpty)
        let cache = PackedWeightCache.Location.besideCheckpoint
        let first = try Self.load(directory.path, cache, quantization: quantization, dtype: dtype, backend: backend)
        #expect(
          first.description.packedCache?.hasPrefix("Packed weights were written to \(directory.path)/model.") == true,
          "\(first.description.packedCache ?? "")")
        let second = try Self.load(directory.path, cache, quantization: quantization, dtype: dtype, backend: backend)
        #expect(Self.isMapped(second.description), "\(second.description.packedCache ?? "")")
        #expect(first.logits == plain.logits && second.logits == plain.logits, "\(quantization) at \(level.name)")
        #expect(second.description.dtype == plain.description.dtype)
        #expect(second.description.weightBytes == plain.description.weightBytes)
        #expect(second.description.regroupedLayers == plain.description.regroupedLayers)
        if quantization == .int8 { #expect(plain.description.regroupedLayers == 2) }
        #expect(Self.files(directory.path).count == 1)
      }
    }
  }

  /// Every quantization, every format of the output layer and every level of instructions has a file of its own.
  @Test func settingsDoNotShareFiles() throws {
    let (directory, cache) = (try TemporaryDirectory(), try TemporaryDirectory())
    try Self.writeCheckpoint(directory, seed: 6)
    let location = PackedWeightCache.Location.directory(cache.path + "/a/b")
    for quantization in Self.formats {
      #expect(!Self.isMapped(try Self.load(directory.path, location, quantization: quantization).description))
    }
    #expect(Self.files(cache.path + "/a/b").count == Self.formats.count)
    for quantization in Self.formats {
      #expect(Self.isMapped(try Self.load(directory.path, location, quantization: quantization).description))
    }
    // What auto comes to is what counts.
    for quantization in [WeightQuantization.int8, .codes(.int4)] {
      let plain = try Self.load(directory.path, nil, quantization: quantization, outputLayer: .dense)
      for isMapped in [false, true] {
        let dense = try Self.load(directory.path, location, quantization: quantization, outputLayer: .dense)
        #expect(Self.isMapped(dense.description) == isMapped)
        #expect(dense.description.outputDtype == "bfloat16" && dense.logits == plain.logits)
      }
      let named = try Self.load(directory.path, location, quantization: quantization, outputLayer: .int8)
      #expect(Self.isMapped(named.description) && named.description.outputDtype == "int8")
      #expect(named.logits != plain.logits)
    }
    for isMapped in [false, true] {
      let stored = try Self.load(directory.path, location, outputLayer: .int8).description
      #expect(Self.isMapped(stored) == isMapped && stored.outputDtype == "int8")
    }
    #expect(!Self.isMapped(try Self.load(directory.path, location, dtype: .float32).description))
    if InstructionSet.supported.count > 1 {
      let portable = try CPUBackend(threads: 1, isa: .portable)
      #expect(!Self.isMapped(try Self.load(directory.path, location, backend: portable).description))
      #expect(Self.isMapped(try Self.load(directory.path, location, backend: portable).description))
    }
    #expect(Self.files(directory.path).isEmpty)
  }

  @Test func changedCheckpointsAreNoticed() throws {
    let directory = try TemporaryDirectory()
    try Self.writeCheckpoint(directory, seed: 7)
    let first = try Self.load(directory.path, .besideCheckpoint)
    #expect(Self.isMapped(try Self.load(directory.path, .besideCheckpoint).description))
    // Other weights of equal size at an equal time.
    let path = directory.path + "/model.safetensors"
    let date = try #require(try FileManager.default.attributesOfItem(atPath: path)[.modificationDate] as? Date)
    try Self.writeCheckpoint(directory, seed: 8)
    try FileManager.default.setAttributes([.modificationDate: date], ofItemAtPath: path)
    let plain = try Self.load(directory.path, nil)
    let second = try Self.load(directory.path, .besideCheckpoint)
    #expect(second.description.packedCache?.contains("another checkpoint") == true)
    #expect(second.logits == plain.logits && second.logits != first.logits)
    let third = try Self.load(directory.path, .besideCheckpoint)
    #expect(Self.isMapped(third.description) && third.logits == plain.logits)
    #expect(Self.files(directory.path).count == 1)
    // A change of the configuration alone.
    let text = try String(contentsOfFile: directory.path + "/config.json", encoding: .utf8)
    try directory.write("config.json", text.replacingOccurrences(of: "}", with: ",\"rms_norm_eps\":0.25}"))
    #expect(!Self.isMapped(try Self.load(directory.path, .besideCheckpoint).description))
  }

  /// Any byte that is changed, and any length, is found before it does harm.
  @Test func damagedFilesAreReplaced() throws {
    let directory = try TemporaryDirectory()
    try Self.writeCheckpoint(directory, seed: 9)
    let plain = try Self.load(directory.path, .besideCheckpoint, quantization: .int8)
    let path = directory.path + "/" + Self.files(directory.path)[0]
    let bytes = [UInt8](try Data(contentsOf: URL(fileURLWithPath: path)))
    let seed = UInt64.random(in: 0...UInt64.max)
    print("seed \(seed)")
    var generator = SeededGenerator(seed: seed)
    for round in 0..<40 {
      var changed = bytes
      switch round {
      case 0: changed = []
      case 1: changed = Array(bytes.prefix(40))
      case 2: changed = Array(bytes.dropLast())
      case 3: changed += [0]
      case 4..<16: changed[Int.random(in: 0..<56, using: &generator)] ^= 1 << UInt8.random(in: 0..<8, using: &generator)
      case 16..<20: changed[changed.count - Int.random(in: 1...200, using: &generator)] ^= 2
      default:
        // A byte of a weight: what pads them out is not looked at.
        let place = 4096 + Int.random(in: 0..<96 * 64, using: &generator)
        changed[place] ^= 1 << UInt8.random(in: 0..<8, using: &generator)
      }
      try Data(changed).write(to: URL(fileURLWithPath: path))
      let found = try Self.load(directory.path, .besideCheckpoint, quantization: .int8)
      #expect(found.logits == plain.logits, "round \(round)")
      #expect(
        found.description.packedCache?.contains("The file that was there could not be used") == true,
        "round \(round): \(found.description.packedCache ?? "")")
      #expect([UInt8](try Data(contentsOf: URL(fileURLWithPath: path))) == bytes, "round \(round)")
    }
  }

  @Test func placesThatCannotBeWrittenAreSaid() throws {
    let directory = try TemporaryDirectory()
    try Self.writeCheckpoint(directory, seed: 10)
    try directory.write("file", "no directory")
    let plain = try Self.load(directory.path, nil)
    let found = try Self.load(directory.path, .directory(directory.path + "/file"))
    #expect(found.logits == plain.logits)
    #expect(found.description.packedCache?.hasPrefix("Packed weights cannot be kept in ") == true)
    // A directory where the file would lie.
    let first = try Self.load(directory.path, .besideCheckpoint)
    let path = directory.path + "/" + Self.files(directory.path)[0]
    try FileManager.default.removeItem(atPath: path)
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: false)
    let second = try Self.load(directory.path, .besideCheckpoint)
    #expect(second.logits == first.logits)
    #expect(second.description.packedCache?.hasPrefix("Packed weights cannot be kept in ") == true)
    #expect(Self.files(directory.path).count == 1, "a temporary file stayed")
    let reference = try Self.load(directory.path, .besideCheckpoint, backend: ReferenceBackend())
    #expect(reference.description.packedCache?.hasPrefix("Packed weights are not kept: ") == true)
  }

  /// Experts, a router, latent attention: kinds of weights that a dense model does not have. Where experts lie changes nothing.
  @Test(arguments: [WeightQuantization.stored, .int8]) func mixturesAreKeptToo(quantization: WeightQuantization) throws
  {
    let directory = try TemporaryDirectory()
    let model = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
      .appendingPathComponent("../../Models/apus-demo-moe").standardizedFileURL.path
    func load(_ cache: PackedWeightCache.Location?, redundantExperts: Int = 0) throws -> ([[Float]], ModelDescription) {
      var options = ModelOptions(path: model)
      options.maxTokensPerStep = 16
      options.maxRunningRequests = 2
      options.kvCacheBytes = 1 << 20
      options.quantization = quantization
      options.redundantExperts = redundantExperts
      options.packedCache = cache
      let loaded = try ModelLoader.load(options, backend: testBackends.last!)
      return (try loaded.steps.promptLogits([1, 200, 3, 1000], positions: [0, 3]), loaded.description)
    }
    let plain = try load(nil)
    let written = try load(.directory(directory.path))
    #expect(written.1.packedCache?.hasPrefix("Packed weights were written to ") == true)
    #expect(written.0 == plain.0)
    for redundant in [0, 5] {
      let mapped = try load(.directory(directory.path), redundantExperts: redundant)
      #expect(Self.isMapped(mapped.1), "\(mapped.1.packedCache ?? "")")
      #expect(mapped.0 == plain.0)
    }
  }

  /// Whoever starts meanwhile finds no file or a whole one.
  @Test func writersAtOnce() throws {
    let directory = try TemporaryDirectory()
    try Self.writeCheckpoint(directory, seed: 11)
    let plain = try Self.load(directory.path, nil)
    let path = directory.path
    let failures = Mutex<[String]>([])
    DispatchQueue.concurrentPerform(iterations: 8) { number in
      do {
        let backend = try CPUBackend(threads: 1 + number % 2)
        for _ in 0..<4 {
          if number % 4 == 0 {
            for file in Self.files(path) where !file.hasSuffix(".tmp") {
              try? FileManager.default.removeItem(atPath: path + "/" + file)
            }
          }
          let found = try Self.load(path, .besideCheckpoint, backend: backend)
          let report = found.description.packedCache ?? ""
          if found.logits != plain.logits || report.contains("could not") || report.contains("cannot") {
            failures.withLock { $0.append(report) }
          }
        }
      } catch { failures.withLock { $0.append("\(error)") } }
    }
    #expect(failures.withLock { $0 } == [])
    #expect(Self.isMapped(try Self.load(directory.path, .besideCheckpoint).description))
    #expect(Self.files(directory.path).count == 1)
  }
}
