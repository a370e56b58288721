import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import Foundation
import Testing

/// Tiny random encoders and pooled decoders against Hugging Face transformers (Scripts/golden_encoders.py), and what a
/// vector does not depend on.
struct EncoderTests {
  static let directory = Paths.goldens + "/Encoders"
  static let names = [
    "bert", "bert-tanh-wide-head", "bert-relu", "roberta", "xlm-roberta", "bert-cross-encoder",
    "xlm-roberta-three-labels",
  ]
  static let backends = testBackends.compactMap { $0 as? any EncoderBackend }

  static func load(
    _ golden: JSONValue, _ backend: any EncoderBackend, pooling: EmbeddingInformation.Pooling = .mean
  ) throws -> EncoderModel {
    let configuration = try EncoderConfiguration(json: golden["config"]!)
    var settings = PoolingConfiguration()
    settings.pooling = pooling
    settings.normalizes = false
    return try EncoderModel(
      configuration, pooling: settings,
      store: NamedWeights(golden, configuration.initializerRange), backend: backend, maxTokensPerPass: 256)
  }

  static func inputs(_ golden: JSONValue) -> [EmbeddingInput] {
    golden["cases"]!.arrayValue!.map {
      EmbeddingInput(tokens: $0["tokens"]!.tokenIDs, firstSegmentCount: $0["first_segment"]?.intValue)
    }
  }

  static func difference(_ found: [Float], _ wanted: [Float]) -> Float {
    found.count == wanted.count ? zip(found, wanted).reduce(0) { max($0, abs($1.0 - $1.1)) } : .infinity
  }

  @Test(arguments: names)
  func vectorsEqualTransformers(name: String) throws {
    let golden = try Paths.json("\(Self.directory)/\(name).json")
    let inputs = Self.inputs(golden)
    let keys = golden["cases"]![0]?["labels"] == nil ? ["cls", "last", "mean"] : ["labels"]
    #expect(Self.backends.count >= 2)
    for backend in Self.backends {
      for key in keys {
        let model = try Self.load(golden, backend, pooling: EmbeddingInformation.Pooling(rawValue: key) ?? .mean)
        for (vector, expected) in zip(model.run(inputs), golden["cases"]!.arrayValue!) {
          let wanted = expected[key]!.floats
          let largest = wanted.reduce(1) { max($0, abs($1)) }
          let difference = Self.difference(vector, wanted)
          #expect(difference <= 1e-5 * largest, "\(name), \(key) on \(backend.name): off by \(difference)")
        }
      }
    }
  }

  @Test func aVectorDoesNotDependOnItsCompany() throws {
    let golden = try Paths.json("\(Self.directory)/bert.json")
    let seed = UInt64.random(in: 0..<1_000_000)
    print("Seed of aVectorDoesNotDependOnItsCompany: \(seed)")
    var generator = SeededGenerator(seed: seed)
    let sentences = (0..<10).map { _ in
      let count = Int.random(in: 1...40, using: &generator)
      return EmbeddingInput(
        tokens: (0..<count).map { _ in TokenID.random(in: 0..<89, using: &generator) },
        firstSegmentCount: Bool.random(using: &generator) ? Int.random(in: 1...count, using: &generator) : nil)
    }
    for backend in Self.backends where backend is CPUBackend {
      let model = try Self.load(golden, backend)
      let alone = sentences.map { model.run([$0])[0] }
      for _ in 0..<4 {
        let order = sentences.indices.shuffled(using: &generator).prefix(Int.random(in: 2...6, using: &generator))
        let together = model.run(order.map { sentences[$0] })
        for (vector, index) in zip(together, order) {
          #expect(
            vector.map(\.bitPattern) == alone[index].map(\.bitPattern), "\(backend.name), seed \(seed), order \(order)")
        }
      }
    }
  }

  @Test func threadsDoNotChangeAVector() throws {
    let golden = try Paths.json("\(Self.directory)/bert.json")
    let inputs = Self.inputs(golden)
    let plain = try Self.load(golden, CPUBackend(threads: 1)).run(inputs)
    for threads in [2, 3] { #expect(try Self.load(golden, CPUBackend(threads: threads)).run(inputs) == plain) }
  }

  @Test func pooledDecoderEqualsTransformers() throws {
    let golden = try Paths.json("\(Self.directory)/decoder-qwen3.json")
    // As sentence-transformers stores it: the bare class, no prefix, no output layer.
    let decoder = try Self.decoder(golden)
    for backend in testBackends {
      var options = ModelOptions(path: "")
      options.maxTokensPerStep = 32
      options.maxRunningRequests = 3
      options.kvSequences = 2
      options.kvCacheBytes = 4 << 20
      #expect(decoder.configuration.tiedEmbeddings && decoder.configuration.architecture == "Qwen3ForCausalLM")
      let model = try ModelLoader.load(
        decoder.configuration, store: decoder.store, options: options, backend: backend)
      for expected in golden["cases"]!.arrayValue! {
        let tokens = expected["tokens"]!.tokenIDs
        for pooling in [EmbeddingInformation.Pooling.last, .mean] {
          let wanted = expected[pooling.rawValue]!.floats
          let vector = model.steps.embeddings([tokens], pooling: pooling)[0]
          let largest = wanted.reduce(1) { max($0, abs($1)) }
          let difference = Self.difference(vector, wanted)
          #expect(
            difference <= 2e-5 * largest, "\(pooling) of \(tokens.count) on \(backend.name): off by \(difference)")
          // Law 1: chunks change no bit.
          if backend is CPUBackend {
            for chunk in [1, 7, 32] {
              #expect(model.steps.embeddings([tokens], pooling: pooling, chunk: chunk) == [vector], "chunk \(chunk)")
            }
          }
        }
      }
    }
  }

  /// The golden file's decoder, as sentence-transformers stores it.
  private static func decoder(_ golden: JSONValue) throws -> BareDecoder {
    let configuration = try ModelConfiguration(json: golden["config"]!)
    var fields = golden["config"]!.objectValue!
    fields["architectures"] = ["Qwen3Model"]
    return try BareDecoder(
      json: .object(fields),
      checkpoint: NamedWeights(golden, configuration.initializerRange, drawnUnder: "model.")
    ) { _ in fatalError("Nothing is quantised.") }
  }

  /// The bits of vectors.
  private static func bits(_ vectors: [[Float]]) -> [[UInt32]] { vectors.map { $0.map(\.bitPattern) } }

  @Test func aDecodersVectorDoesNotDependOnItsCompany() throws {
    let golden = try Paths.json("\(Self.directory)/decoder-qwen3.json")
    let decoder = try Self.decoder(golden)
    let seed = UInt64.random(in: 0..<1_000_000)
    print("Seed of aDecodersVectorDoesNotDependOnItsCompany: \(seed)")
    var generator = SeededGenerator(seed: seed)
    let vocabulary = TokenID(decoder.configuration.vocabularySize)
    // Short passes, full ones, and sequences longer than a pass are all met; the longest has 45 tokens.
    var sequences = (0..<24).map { _ in
      (0..<Int.random(in: 1...9, using: &generator)).map { _ in TokenID.random(in: 0..<vocabulary, using: &generator) }
    }
    for count in [16, 17, 31, 32, 33, 45] {
      sequences.append((0..<count).map { _ in TokenID.random(in: 0..<vocabulary, using: &generator) })
    }
    sequences += [sequences[0], sequences[0], sequences.last!]
    func load(_ backend: any Backend, requests: Int, kvTokens: Int?) throws -> LoadedModel {
      var options = ModelOptions(path: "")
      options.maxTokensPerStep = 32
      options.maxRunningRequests = requests
      options.kvSequences = 2
      options.kvCacheTokens = kvTokens
      options.kvCacheBytes = kvTokens == nil ? 4 << 20 : nil
      return try ModelLoader.load(decoder.configuration, store: decoder.store, options: options, backend: backend)
    }
    for backend in testBackends where backend is CPUBackend {
      // One at a time, as a row of its own: what all others must equal bit for bit.
      let model = try load(backend, requests: 1, kvTokens: nil)
      for pooling in [EmbeddingInformation.Pooling.last, .mean, .cls] {
        let alone = Self.bits(sequences.map { model.steps.embeddings([$0], pooling: pooling)[0] })
        // A pool of three pages holds the longest sequence and no more, so that pages, not tokens, end a pass.
        for (requests, kvTokens) in [(32, nil), (3, nil), (32, 48)] as [(Int, Int?)] {
          let model = try load(backend, requests: requests, kvTokens: kvTokens)
          if let kvTokens { #expect(model.description.kvCapacityTokens == kvTokens) }
          for chunk in [nil, 11, 1] {
            let order = sequences.indices.shuffled(using: &generator)
            let together = Self.bits(
              model.steps.embeddings(order.map { sequences[$0] }, pooling: pooling, chunk: chunk))
            #expect(
              together == order.map { alone[$0] },
              "\(backend.name), seed \(seed), \(pooling), \(requests) requests, chunks of \(chunk ?? 32)")
          }
        }
      }
    }
  }

  @Test func batchesOfADecoderTakeNoMoreMemoryThanTwoSequences() throws {
    let golden = try Paths.json("\(Self.directory)/decoder-qwen3.json")
    let decoder = try Self.decoder(golden)
    var options = ModelOptions(path: "")
    options.maxTokensPerStep = 64
    options.maxRunningRequests = 32
    options.contextLength = 40
    options.kvSequences = 2
    let model = try ModelLoader.load(
      decoder.configuration, store: decoder.store, options: options, backend: CPUBackend(threads: 1))
    // Three pages of 16 tokens hold 40.
    #expect(model.description.kvPageCount == 6)
    options.kvSequences = nil
    let serving = try ModelLoader.load(
      decoder.configuration, store: decoder.store, options: options, backend: CPUBackend(threads: 1))
    #expect(serving.description.kvPageCount == 6 * 32)
  }

  @Test func configurationsAreChecked() throws {
    func fails(_ changes: [String: JSONValue], _ code: EngineError.Code, _ part: String) {
      var config = JSONObject([
        ("architectures", ["BertModel"]), ("vocab_size", 10), ("hidden_size", 8), ("intermediate_size", 16),
        ("num_hidden_layers", 1), ("num_attention_heads", 2), ("max_position_embeddings", 16),
      ])
      for (key, value) in changes { config[key] = value }
      do throws(EngineError) {
        _ = try EncoderConfiguration(json: .object(config))
        Issue.record("accepted \(changes)")
      } catch {
        #expect(error.code == code && error.message.contains(part), "\(error)")
      }
    }
    fails(["architectures": ["LlamaForCausalLM"]], .unsupported, "LlamaForCausalLM")
    fails(["architectures": ["BertForQuestionAnswering"]], .unsupported, "BertForQuestionAnswering")
    fails(["num_attention_heads": 3], .invalidCheckpoint, "multiple")
    fails(["hidden_act": "mish"], .unsupported, "mish")
    fails(["position_embedding_type": "relative_key"], .unsupported, "relative_key")
    fails(["quantization_config": ["quant_method": "gptq"]], .unsupported, "quantization_config")
    fails(["is_decoder": true], .unsupported, "is_decoder")
    fails(["vocab_size": 0], .invalidCheckpoint, "vocab_size")
    fails(
      ["architectures": ["RobertaModel"], "pad_token_id": 40], .invalidCheckpoint, "pad_token_id")
  }

  @Test func poolingIsReadFromTheCheckpoint() throws {
    let directory = FileManager.default.temporaryDirectory.appendingPathComponent("apus-\(UUID())").path
    try FileManager.default.createDirectory(atPath: directory + "/1_Pooling", withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(atPath: directory) }
    func write(_ name: String, _ text: String) throws {
      try text.write(toFile: directory + "/" + name, atomically: true, encoding: .utf8)
    }
    func read() throws -> PoolingConfiguration { try PoolingConfiguration(directory: directory) }
    func message() -> String? {
      do throws(EngineError) {
        _ = try PoolingConfiguration(directory: directory)
        return nil
      } catch {
        return error.message
      }
    }

    // Nothing said: the model's own default, normalised.
    #expect(try read() == PoolingConfiguration())
    let transformer = #"{"type": "sentence_transformers.models.Transformer", "path": ""}"#
    let pooling = #"{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}"#
    let normalize = #"{"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}"#
    try write("modules.json", "[\(transformer), \(pooling)]")
    #expect(message()?.contains("1_Pooling/config.json") == true)
    try write("1_Pooling/config.json", #"{"pooling_mode_lasttoken": true, "pooling_mode_mean_tokens": false}"#)
    #expect(try read().pooling == .last)
    #expect(try !read().normalizes)
    try write("modules.json", "[\(transformer), \(pooling), \(normalize)]")
    try write("1_Pooling/config.json", #"{"pooling_mode_cls_token": true}"#)
    try write("sentence_bert_config.json", #"{"max_seq_length": 12}"#)
    #expect(try read().pooling == .cls)
    #expect(try read().normalizes)
    #expect(try read().maxSequenceLength == 12)
    try write("1_Pooling/config.json", #"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}"#)
    #expect(message()?.contains("several") == true)
    try write("1_Pooling/config.json", #"{"pooling_mode_max_tokens": true}"#)
    #expect(message()?.contains("max_tokens") == true)
    try write("modules.json", #"[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]"#)
    #expect(message()?.contains("Dense") == true)
    try write("modules.json", #"[{"type": "sentence_transformers.models.Pooling", "path": "../.."}]"#)
    #expect(message()?.contains("outside") == true)
    try write("modules.json", "{")
    #expect(message()?.contains("modules.json") == true)
  }
}

/// Random weights under the names that transformers stores, and no others.
private struct NamedWeights: WeightStore {
  let names: Set<String>
  let weights: DummyWeights
  /// Put before a name without prefix for the drawing of its numbers.
  let drawnUnder: String

  init(_ golden: JSONValue, _ initializerRange: Float, drawnUnder: String = "") {
    names = Set(golden["names"]!.arrayValue!.map { $0.stringValue! })
    weights = DummyWeights(seed: UInt64(golden["seed"]!.intValue!), initializerRange: initializerRange)
    self.drawnUnder = drawnUnder
  }

  var origin: String { "the golden file" }
  var byteCount: Int { 0 }

  func contains(_ name: String) -> Bool { names.contains(name) }

  func dtype(of name: String) -> DType? { contains(name) ? .float32 : nil }

  func load(_ name: String, shape: [Int], role: WeightRole) throws(EngineError) -> WeightSource {
    guard contains(name) else { throw EngineError(.invalidCheckpoint, "There is no weight \(name).") }
    let bare = ["bert.", "roberta."].first { name.hasPrefix($0) }.map { String(name.dropFirst($0.count)) } ?? name
    return try weights.load(drawnUnder + bare, shape: shape, role: role)
  }
}
