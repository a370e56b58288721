import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import Testing

/// What becomes of the output layer while a model is loaded.
struct OutputLayerTests {
  private static let prompt: [TokenID] = [1, 17, 5, 60, 33, 8, 8, 41, 2]

  /// Random weights in which the output layer is the embedding table, whether it is stored as such or under its own name, and
  /// in which one number of every `outlierSpacing` of the table is `outlierFactor` times as large.
  private struct SharedTable: WeightStore {
    let base = DummyWeights(seed: 3, initializerRange: 0.2, dtype: .float32)
    var outlierSpacing = Int.max
    var outlierFactor: Float = 1
    var origin: String { base.origin }
    var byteCount: Int { 0 }
    func contains(_ name: String) -> Bool { true }
    func dtype(of name: String) -> DType? { .float32 }
    func load(_ name: String, shape: [Int], role: WeightRole) throws(EngineError) -> WeightSource {
      guard name == "lm_head.weight" || name == "model.embed_tokens.weight" else {
        return try base.load(name, shape: shape, role: role)
      }
      let source = try base.load("model.embed_tokens.weight", shape: shape, role: role)
      let memory = try CPUBackend.hostMemory(byteCount: 4 * shape[0] * shape[1])
      let numbers = memory.address.assumingMemoryBound(to: Float.self)
      for index in 0..<shape[0] * shape[1] {
        let number = source.address.load(fromByteOffset: 4 * index, as: Float.self)
        numbers[index] = index % outlierSpacing == 7 ? outlierFactor * number : number
      }
      return WeightSource(
        address: UnsafeRawPointer(numbers), dtype: .float32, rows: shape[0], columns: shape[1], owner: memory)
    }
  }

  private static func load(
    _ quantization: WeightQuantization, _ outputLayer: OutputLayerQuantization, isTied: Bool = true,
    store: SharedTable = SharedTable(), dtype: DType? = nil, backend: any Backend = testBackends.last!
  ) throws -> LoadedModel {
    try makeTinyModel(
      ["tie_word_embeddings": .bool(isTied), "hidden_size": 128, "vocab_size": 97], backend: backend, store: store
    ) {
      $0.quantization = quantization
      $0.outputLayer = outputLayer
      $0.dtype = dtype
    }
  }

  private static func logits(_ model: LoadedModel) throws -> [Float] {
    try model.steps.promptLogits(prompt, positions: Array(prompt.indices)).flatMap { $0 }
  }

  private static func relativeError(_ found: [Float], _ wanted: [Float]) -> Float {
    let error = zip(found, wanted).reduce(Float(0)) { $0 + ($1.0 - $1.1) * ($1.0 - $1.1) }
    return (error / wanted.reduce(Float(0)) { $0 + $1 * $1 }).squareRoot()
  }

  /// Where layers are rounded, to whatever format, the output layer is int8 unless it is to stay dense.
  @Test(arguments: [true, false]) func formatFollowsSettings(isTied: Bool) throws {
    let plain = WeightFormat.dense(.bfloat16)
    let cases: [(WeightQuantization, OutputLayerQuantization, WeightFormat)] = [
      (.stored, .auto, plain), (.dense, .auto, plain), (.int8, .auto, .int8PerChannel),
      (.codes(.int8), .auto, .int8PerChannel), (.codes(.int4), .auto, .int8PerChannel),
      (.codes(.float8), .auto, .int8PerChannel), (.int8, .dense, plain), (.codes(.int4), .dense, plain),
      (.stored, .int8, .int8PerChannel), (.dense, .int8, .int8PerChannel), (.stored, .dense, plain),
    ]
    for (quantization, outputLayer, format) in cases {
      let model = try Self.load(quantization, outputLayer, isTied: isTied, dtype: .bfloat16)
      #expect(model.steps.model.outputFormat == format, "\(quantization), \(outputLayer)")
      #expect(model.description.outputDtype == format.name && model.description.regroupedLayers == 0)
      #expect((model.steps.model.weightFormat == plain) == [.stored, .dense].contains(quantization))
    }
  }

  /// An output layer in int8 changes logits a little and nothing before them, and a matrix of its own gives the same bits as
  /// the embedding table.
  @Test func logitsAloneChange() throws {
    for backend in testBackends {
      let dense = try Self.load(.stored, .dense, backend: backend)
      let int8 = try Self.load(.stored, .int8, backend: backend)
      #expect(
        dense.steps.embeddings([Self.prompt], pooling: .last) == int8.steps.embeddings([Self.prompt], pooling: .last))
      let (wanted, found) = (try Self.logits(dense), try Self.logits(int8))
      // Weights and activations are rounded to 8 bits, each of which errs by about 0.5 to 0.9 percent.
      let error = Self.relativeError(found, wanted)
      #expect(error > 0 && error < 0.02, "\(error) on \(backend.name)")
      #expect(try Self.logits(Self.load(.stored, .int8, isTied: false, backend: backend)) == found, "\(backend.name)")
      #expect(try Self.logits(Self.load(.stored, .dense, isTied: false, backend: backend)) == wanted)
    }
  }

  /// Where a few numbers stand out, the output layer gets a scale for each group like any other.
  @Test func outliersRegroupIt() throws {
    let store = SharedTable(outlierSpacing: 131, outlierFactor: 60)
    let dense = try Self.load(.stored, .dense, store: store)
    let int8 = try Self.load(.stored, .int8, store: store)
    #expect(int8.steps.model.outputFormat == .codes(.int8) && int8.description.regroupedLayers == 1)
    #expect(dense.description.regroupedLayers == 0)
    #expect(Self.relativeError(try Self.logits(int8), try Self.logits(dense)) < 0.02)
  }

  /// An output layer that a drafting head has of its own follows the same setting.
  @Test func draftingHeadsFollow() throws {
    let golden = try Paths.json("\(EagleTests.directory)/eagle3/golden.json")
    let target = try makeTinyModel(golden["target"]!.objectDictionary).steps.model
    let configuration = try EagleConfiguration(
      json: Paths.json("\(EagleTests.directory)/eagle3/config.json"), hasHiddenNorm: true)
    func bytes(_ options: WeightOptions) throws -> Int {
      try EagleModel(configuration, target: target, store: DummyWeights(), options: options).weightBytes
    }
    let dense = try bytes(WeightOptions())
    #expect(try bytes(WeightOptions(outputLayer: .int8)) < dense)
    #expect(
      try bytes(WeightOptions(quantization: .int8)) < bytes(WeightOptions(quantization: .int8, outputLayer: .dense)))
    #expect(try bytes(WeightOptions(outputLayer: .dense)) == dense)
  }
}
