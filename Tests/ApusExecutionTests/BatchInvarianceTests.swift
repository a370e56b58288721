import ApusCore
import ApusExecution
import ApusModels
import ApusScheduling
import ApusTensors
import Testing

/// The first law: a request's results are equal bit for bit whatever else is in the batch, however its prompt was chunked,
/// and wherever its pages lie.
struct BatchInvarianceTests {
  static let models: [[String: JSONValue]] = [
    [:],
    [
      "architectures": ["Qwen3ForCausalLM"], "head_dim": 18, "num_attention_heads": 6, "num_key_value_heads": 3,
      "attention_bias": true, "tie_word_embeddings": true,
    ],
    ["architectures": ["MistralForCausalLM"], "sliding_window": 19, "hidden_size": 40, "intermediate_size": 51],
    ["architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 1, "vocab_size": 133],
    LatentModelTests.dense,
    LatentModelTests.sparse,
  ]

  /// Requests with random prompts and parameters, some of which ask for log-probabilities.
  private func requests(_ generator: inout SeededGenerator, vocabulary: Int) -> [DriverRequest] {
    (0..<Int.random(in: 3...12, using: &generator)).map { _ in
      let tokens = TokenID(0)..<TokenID(vocabulary)
      var request = DriverRequest(
        prompt: (0..<Int.random(in: 1...90, using: &generator)).map { _ in .random(in: tokens, using: &generator) },
        newTokens: .random(in: 1...20, using: &generator))
      request.sampling.temperature = Bool.random(using: &generator) ? 0 : .random(in: 0.3...1.5, using: &generator)
      request.sampling.topK = Bool.random(using: &generator) ? -1 : .random(in: 2...30, using: &generator)
      request.sampling.topP = Bool.random(using: &generator) ? 1 : .random(in: 0.3...1, using: &generator)
      request.sampling.repetitionPenalty = Bool.random(using: &generator) ? 1 : 1.3
      request.sampling.frequencyPenalty = Bool.random(using: &generator) ? 0 : 0.4
      request.sampling.seed = generator.next()
      if Bool.random(using: &generator) {
        request.logprobs = LogprobOptions(
          topCount: .random(in: 0...5, using: &generator), promptStart: Bool.random(using: &generator) ? 1 : nil,
          tokenIDs: [.random(in: tokens, using: &generator)])
      }
      return request
    }
  }

  @Test(arguments: models.indices, [DType.float32, .bfloat16])
  func companyChunksAndPagesChangeNothing(model index: Int, kvDType: DType) throws {
    for backend in testBackends {
      let loaded = try makeTinyModel(Self.models[index], backend: backend) { $0.kvDType = kvDType }
      for seed in UInt64(1)...(backend is ReferenceBackend ? 1 : 6) {
        var generator = SeededGenerator(seed: seed)
        let requests = requests(&generator, vocabulary: loaded.description.vocabularySize)
        // The reference: each request alone, its prompt in one piece, no overlap.
        let alone = requests.map { request in
          var driver = Driver(
            model: loaded, generator: SeededGenerator(seed: seed + 100), overlap: false, largestChunk: 64,
            isRandom: false)
          return driver.run([request])[0]
        }
        for overlap in [false, true] {
          var driver = Driver(
            model: loaded, generator: SeededGenerator(seed: seed + 200), overlap: overlap,
            largestChunk: Int(seed) * 5 + 2)
          let together = driver.run(requests)
          for (number, output) in together.enumerated() {
            #expect(
              output == alone[number],
              "seed \(seed), model \(index), overlap \(overlap), request \(number) on \(backend.name)")
          }
        }
      }
    }
  }

  /// Raw logits at every position, whole prompt against chunks of every kind.
  @Test func logitsOfChunkedPrompts() throws {
    for backend in testBackends {
      for changes in Self.models {
        let loaded = try makeTinyModel(changes, backend: backend)
        var generator = SeededGenerator(seed: 11)
        let prompt = (0..<61).map { _ in TokenID.random(in: 0..<61, using: &generator) }
        let whole = try loaded.steps.promptLogits(prompt, positions: Array(prompt.indices))
        for chunk in [1, 3, 16, 17, 40] {
          let chunked = try loaded.steps.promptLogits(prompt, positions: Array(prompt.indices), chunk: chunk)
          for position in prompt.indices where chunked[position] != whole[position] {
            Issue.record("position \(position) differs with chunks of \(chunk) on \(backend.name)")
          }
        }
      }
    }
  }

  /// Where layers are rounded, the output layer is int8.
  static let formats:
    [(name: String, dtype: DType, quantization: WeightQuantization, outputLayer: OutputLayerQuantization)] = [
      ("float32", .float32, .stored, .auto), ("float16", .float16, .stored, .auto),
      ("bfloat16", .bfloat16, .stored, .auto), ("int8", .bfloat16, .int8, .auto),
      ("int8-group", .bfloat16, .codes(.int8), .auto), ("int4", .bfloat16, .codes(.int4), .auto),
      ("fp8", .bfloat16, .codes(.float8), .auto), ("output layer int8", .bfloat16, .stored, .int8),
    ]

  /// A model wide enough that kernels split their work, in every weight format: chunks, company and numbers of threads
  /// change no bit.
  @Test(arguments: formats.indices)
  func threadsAndChunksChangeNothingInAnyFormat(format index: Int) throws {
    let format = Self.formats[index]
    var generator = SeededGenerator(seed: 21)
    let prompt = (0..<90).map { _ in TokenID.random(in: 0..<500, using: &generator) }
    var requests = (1...6).map { number in
      DriverRequest(prompt: Array(prompt[..<(number * 13)]), newTokens: 3)
    }
    requests[2].logprobs = LogprobOptions(topCount: 3, promptStart: 1)
    requests[4].sampling.temperature = 1
    for level in InstructionSet.allCases where level.isSupported {
      var expectedLogits: [[Float]] = []
      var expectedOutputs: [DriverOutput] = []
      for threads in [1, 2, 3] {
        let loaded = try makeTinyModel(
          [
            "hidden_size": 200, "intermediate_size": 413, "num_attention_heads": 5, "num_key_value_heads": 1,
            "vocab_size": 500, "initializer_range": 0.08,
          ], backend: CPUBackend(threads: threads, isa: level)
        ) {
          $0.dtype = format.dtype
          $0.quantization = format.quantization
          $0.outputLayer = format.outputLayer
          $0.maxTokensPerStep = 100
        }
        if format.quantization != .stored || format.outputLayer == .int8 {
          #expect(loaded.steps.model.outputFormat == .int8PerChannel)
        }
        let whole = try loaded.steps.promptLogits(prompt, positions: Array(prompt.indices))
        var driver = Driver(
          model: loaded, generator: SeededGenerator(seed: 31 + UInt64(threads)), largestChunk: 10 * threads)
        let outputs = driver.run(requests)
        if threads == 1 { (expectedLogits, expectedOutputs) = (whole, outputs) }
        let isEqual = whole == expectedLogits
        #expect(isEqual, "\(format.name), \(level.name), \(threads) threads")
        #expect(outputs == expectedOutputs, "\(format.name), \(level.name), \(threads) threads")
        for chunk in [1, 7, 33] {
          let chunked = try loaded.steps.promptLogits(prompt, positions: Array(prompt.indices), chunk: chunk)
          let isEqual = chunked == expectedLogits
          #expect(isEqual, "\(format.name), \(level.name), \(threads) threads, chunks of \(chunk)")
        }
      }
    }
  }

  /// Families whose states differ: K/V heads, experts behind a dispatcher, latents and experts in groups.
  static let families: [String: [String: JSONValue]] = [
    "dense": ["architectures": ["Qwen2ForCausalLM"]],
    "experts": MixtureTests.mixture,
    "latents": LatentModelTests.sparse,
  ]

  /// Two half batches in turns, as two-batch overlap will run them, give what each gives alone.
  @Test(arguments: families.keys.sorted(), [0, 1, 2, 5])
  func interleavedHalvesEqualStraightRuns(family: String, offset: Int) throws {
    let backend = testBackends.last!
    var config = JSONObject([
      ("hidden_size", 32), ("intermediate_size", 40), ("num_hidden_layers", 3), ("num_attention_heads", 4),
      ("num_key_value_heads", 2), ("vocab_size", 50), ("max_position_embeddings", 256),
    ])
    for (key, value) in Self.families[family]! { config[key] = value }
    let configuration = try ModelConfiguration(json: .object(config))
    let model = try LanguageModel(
      configuration, store: DummyWeights(initializerRange: 0.2), backend: backend,
      experts: ExpertOptions(dispatch: .auto(capacity: 9)))
    model.prepare(positions: 16)
    let pool = try KVPool(
      layerCount: 3, pageCount: 2, layout: model.kvLayout, dtype: .float32, backend: backend)
    let states = try (0..<2).map { _ in
      try ForwardState(shape: model.activationShape, maxRows: 16, kvLayers: pool.layers, backend: backend)
    }

    /// Runs a prompt per page and returns the residual plus delta of all rows.
    func run(_ body: ([ForwardState]) -> Void) -> [[Float]] {
      var halves: [HalfBatch] = []
      for (number, state) in states.enumerated() {
        halves.append(HalfBatch(page: Int32(number), tokens: (0..<(9 + number)).map { TokenID($0 * 5 + number) }))
        state.begin(halves[number].batch)
      }
      body(states)
      return withExtendedLifetime(halves) {
        states.map { state in
          (0..<state.batch.rowCount * 32).map { state.residual.float32[$0] + state.delta.float32[$0] }
        }
      }
    }
    let straight = run { states in states.forEach { model.executor.run($0) } }
    let interleaved = run { states in model.executor.run(states[0], states[1], offset: offset) }
    let isEqual = straight == interleaved
    #expect(isEqual)
    // Timing changes nothing and covers every operation of both passes.
    let profile = OperationProfile()
    let timed = run { states in
      states.forEach { $0.profile = profile }
      model.executor.run(states[0], states[1], offset: offset)
      states.forEach { $0.profile = nil }
    }
    #expect(timed == straight)
    let times = profile.times
    #expect(times["layers.0.attention"]?.count == 2 && times.values.allSatisfy { $0.count == 2 && $0.seconds >= 0 })
    #expect(times.keys.contains("layers.2.dispatch_b") == (family != "dense"))
    #expect(straight[0].contains { $0 != 0 })
  }
}

/// A prompt in one page, with the arrays that a pass points to.
private final class HalfBatch {
  let batch: ForwardBatch
  private let memory: UnsafeMutablePointer<Int32>

  init(page: Int32, tokens: [TokenID]) {
    let count = tokens.count
    memory = .allocate(capacity: 3 * count + 6)
    for index in 0..<count {
      memory[index] = tokens[index]
      memory[count + index] = Int32(index)
      memory[2 * count + index] = page * Int32(kvPageSize) + Int32(index)
    }
    let tail = memory + 3 * count
    tail[0] = 0
    tail[1] = Int32(count)
    tail[2] = 0
    tail[3] = 0
    tail[4] = page
    batch = ForwardBatch(
      rowCount: count, tokens: memory, positions: memory + count, slots: memory + 2 * count,
      attention: AttentionBatch(
        sequenceCount: 1, rowStart: tail, start: tail + 2, pageOffset: tail + 3, pages: tail + 4))
  }

  deinit { memory.deallocate() }
}
