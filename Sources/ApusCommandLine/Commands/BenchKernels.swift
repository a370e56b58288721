import ApusCore
import ApusTensors
import ArgumentParser

/// `apus bench kernels`
struct BenchKernels: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "kernels",
    abstract: "Measures matrix products and attention against what this machine can do at best.",
    discussion: """
      Each figure stands beside a ceiling measured in the same run, in turns with it: how fast all threads read memory, \
      or how many products of that kind they make in registers. Weights and K/V are too large for the caches. Products \
      of few rows are judged by the bytes of weights they read, those of many rows by their arithmetic.

      Examples:
        apus bench kernels
        apus bench kernels --format int4 --format bfloat16 --rows 1 --rows 128 --json kernels.json
        apus bench kernels --compare before.json after.json
      """)

  /// What can be measured.
  enum Format: String, CaseIterable, ExpressibleByArgument {
    case float32, float16, bfloat16, int8
    case int8Group = "int8-group"
    case int4, fp8
    case q4_0, q4_k, q5_k, q6_k, q8_0, mxfp4

    var weight: WeightFormat {
      switch self {
      case .float32: .dense(.float32)
      case .float16: .dense(.float16)
      case .bfloat16: .dense(.bfloat16)
      case .int8: .int8PerChannel
      case .int8Group, .q8_0: .codes(.int8)
      case .int4, .q4_0: .codes(.int4)
      case .fp8: .codes(.float8)
      case .q4_k: .codes(CodeLayout(bits: 4, groupSize: 32, blockSize: 256, hasFactors: true, minimum: .own))
      case .q5_k: .codes(CodeLayout(bits: 5, groupSize: 32, blockSize: 256, hasFactors: true, minimum: .own))
      case .q6_k: .codes(CodeLayout(bits: 6, offset: 32, groupSize: 16, blockSize: 256, hasFactors: true))
      case .mxfp4: .codes(CodeLayout(bits: 4, levels: .e2m1, groupSize: 32, scaleType: .bfloat16))
      }
    }

    var product: CPUBackend.Product {
      switch self {
      case .float32, .float16: .float32
      case .bfloat16, .fp8: .bfloat16
      case .int8, .int8Group, .q8_0: .int8
      case .int4, .q4_0, .q4_k, .q5_k, .q6_k, .mxfp4: .codes
      }
    }
  }

  @Option(help: ArgumentHelp("Formats of weights. May be repeated. Default: all.", valueName: "format"))
  var format: [Format] = []
  @Option(
    help: ArgumentHelp(
      "Rows of activations. May be repeated. Default: 1, 8, 32, 128 and 512.", valueName: "count"))
  var rows: [Int] = []
  @Option(
    help: ArgumentHelp(
      "Outputs and inputs of a matrix, as in 9728x896. May be repeated. Default: gate-up and down of Qwen2.5-0.5B.",
      valueName: "sizes"))
  var shape: [String] = []
  @Option(
    help: ArgumentHelp("Tokens that decoding attends to; 0 leaves attention out. May be repeated.", valueName: "tokens")
  )
  var context: [Int] = [4096]
  @Option(help: ArgumentHelp("Compute threads. Default: the physical cores at hand.", valueName: "count"))
  var threads: Int?
  @OptionGroup var options: MeasurementOptions

  func validate() throws {
    for count in rows where !(1...65536).contains(count) {
      throw ValidationError("--rows must be in 1...65536, got \(count).")
    }
    for tokens in context where !(0...1 << 20).contains(tokens) {
      throw ValidationError("--context must be in 0...1048576, got \(tokens).")
    }
    _ = try shapes()
  }

  private func shapes() throws -> [(outputs: Int, inputs: Int)] {
    try (shape.isEmpty ? ["9728x896", "896x4864"] : shape).map { text in
      let sizes = text.split(separator: "x").map { Int($0) ?? 0 }
      guard sizes.count == 2, sizes.allSatisfy({ (16...1 << 20).contains($0) }), sizes[0] * sizes[1] <= 1 << 30 else {
        throw ValidationError("--shape is outputs x inputs, as in 9728x896, each at least 16; got '\(text)'.")
      }
      return (sizes[0], sizes[1])
    }
  }

  func run() throws {
    if try options.printsComparison() { return }
    let backend = try CPUBackend(threads: threads)
    if !options.quiet {
      Terminal.output.line(backend.name)
      Terminal.output.line(Measurement.header)
    }
    var results: [Measurement] = []
    func add(_ result: Measurement) {
      results.append(result)
      if !options.quiet { Terminal.output.line(result.line) }
    }
    let memory = try CPUBackend.hostMemory(byteCount: 256 << 20)
    // The kernel provides pages when they are written.
    backend.parallel(chunks: 64) { [address = Address(memory.address)] chunk in
      for offset in stride(from: chunk << 22, to: (chunk + 1) << 22, by: 64) {
        address.pointer.storeBytes(of: offset, toByteOffset: offset, as: Int.self)
      }
    }
    for (outputs, inputs) in try shapes() {
      for format in format.isEmpty ? Format.allCases : format {
        if case .codes(let layout) = format.weight, layout.hasFactors, inputs % 256 != 0 { continue }
        let weights = try makeWeights(format, outputs, inputs, backend)
        for count in rows.isEmpty ? [1, 8, 32, 128, 512] : rows {
          add(try product(format, weights, outputs, inputs, count, backend, memory))
        }
      }
    }
    for tokens in context where tokens > 0 {
      for dtype in [DType.bfloat16, .int8, .float8] { add(try decode(dtype, tokens, backend, memory)) }
    }
    try options.write(
      results,
      [
        ("backend", .string(backend.name)), ("threads", .int(Int64(backend.threads))),
        ("samples", .int(Int64(options.samples))), ("sample_ms", .double(options.sampleMs)),
      ])
  }

  /// Copies of a random matrix, enough that none is in a cache when its turn comes.
  private func makeWeights(
    _ format: Format, _ outputs: Int, _ inputs: Int, _ backend: CPUBackend
  ) throws -> [any LinearWeight] {
    func make() throws -> any LinearWeight {
      if case .codes(let layout) = format.weight, layout.hasFactors || layout.levels == .e2m1 {
        let source = QuantizedSource(layout: layout, rows: outputs, columns: inputs, storedBytes: 0) { range, rows in
          for index in 0..<range.count * inputs {
            rows.codes[index] = UInt8(truncatingIfNeeded: (index &* 0x9E37_79B9) >> 16) & (1 << UInt8(layout.bits) - 1)
          }
          for index in 0..<range.count * layout.scaleCount(inputs) {
            rows.scales[index] = 0.001
            rows.minimums[index] = 0.001
          }
          for index in 0..<range.count * layout.groupCount(inputs) {
            rows.factors[index] = 9
            rows.minimumFactors[index] = 9
          }
        }
        return try backend.packLinear([source])
      }
      let memory = try CPUBackend.hostMemory(byteCount: outputs * inputs * 2)
      try backend.fillUniform(memory.address, dtype: .bfloat16, count: outputs * inputs, key: 1, scale: 0.05)
      return try backend.packLinear(
        [
          WeightSource(
            address: UnsafeRawPointer(memory.address), dtype: .bfloat16, rows: outputs, columns: inputs, owner: memory)
        ], format: format.weight)
    }
    var weights = [try make()]
    while weights.count < 64, weights.count * weights[0].byteCount < 96 << 20 { weights.append(try make()) }
    return weights
  }

  private func product(
    _ format: Format, _ weights: [any LinearWeight], _ outputs: Int, _ inputs: Int, _ rows: Int, _ backend: CPUBackend,
    _ memory: DeviceMemory
  ) throws -> Measurement {
    let x = try backend.allocate(rows: rows, columns: inputs, dtype: .float32)
    try backend.fillUniform(x.pointer, dtype: .float32, count: rows * inputs, key: 2, scale: 1)
    let out = try backend.allocate(rows: rows, columns: outputs, dtype: .float32)
    let isStream = rows <= 8
    let operations = 2 * Double(rows) * Double(outputs) * Double(inputs)
    var result = Measurement(
      name: "linear \(format.rawValue) \(outputs)x\(inputs) rows \(rows)", unit: isStream ? "GB/s" : "GFLOP/s",
      shape: [("outputs", outputs), ("inputs", inputs), ("rows", rows)], samples: [],
      ceilingName: isStream ? "memory read" : "\(format.product) products in registers")
    var turn = 0
    for _ in 0..<options.samples {
      let seconds = options.seconds {
        backend.linear(x, weights[turn % weights.count], bias: nil, out: out)
        turn += 1
      }
      result.samples.append((isStream ? Double(weights[0].byteCount) : operations) / seconds * 1e-9)
      result.ceilingSamples.append(isStream ? readSpeed(backend, memory) : peak(format.product, backend))
    }
    return result
  }

  /// Decoding: one row of 14 query heads over 2 K/V heads of 64 numbers, for 16 sequences of their own pages.
  private func decode(
    _ dtype: DType, _ tokens: Int, _ backend: CPUBackend, _ memory: DeviceMemory
  ) throws -> Measurement {
    let (sequences, queryHeads, kvHeads, dimension) = (16, 14, 2, 64)
    let pagesEach = (tokens + CPUBackend.kvPageSize - 1) / CPUBackend.kvPageSize
    let layer = try backend.makeKVLayer(
      pageCount: sequences * pagesEach, kvHeads: kvHeads, headDimension: dimension, dtype: dtype)
    let k = try backend.allocate(rows: 256, columns: kvHeads * dimension, dtype: .float32)
    try backend.fillUniform(k.pointer, dtype: .float32, count: 256 * kvHeads * dimension, key: 3, scale: 1)
    let slotCount = sequences * pagesEach * CPUBackend.kvPageSize
    for first in stride(from: 0, to: slotCount, by: 256) {
      let slots = (first..<min(slotCount, first + 256)).map(Int32.init)
      backend.writeKV(k.prefix(rows: slots.count), k.prefix(rows: slots.count), slots: slots, layer: layer)
    }
    let q = try backend.allocate(rows: sequences, columns: queryHeads * dimension, dtype: .float32)
    try backend.fillUniform(q.pointer, dtype: .float32, count: sequences * queryHeads * dimension, key: 4, scale: 1)
    let out = try backend.allocate(rows: sequences, columns: queryHeads * dimension, dtype: .float32)
    let rowStart = (0...sequences).map(Int32.init)
    let start = [Int32](repeating: Int32(tokens - 1), count: sequences)
    let pageOffset = (0..<sequences).map { Int32($0 * pagesEach) }
    let pages = (0..<sequences * pagesEach).map(Int32.init)
    var result = Measurement(
      name: "decode attention \(dtype.name) context \(tokens) x \(sequences)", unit: "GB/s",
      shape: [
        ("sequences", sequences), ("context", tokens), ("query_heads", queryHeads), ("kv_heads", kvHeads),
        ("head_dimension", dimension),
      ], samples: [], ceilingName: "memory read")
    for _ in 0..<options.samples {
      let seconds = options.seconds {
        backend.attention(
          q, layer: layer,
          batch: AttentionBatch(
            sequenceCount: sequences, rowStart: rowStart, start: start, pageOffset: pageOffset, pages: pages),
          shape: AttentionShape(
            queryHeads: queryHeads, kvHeads: kvHeads, headDimension: dimension, scale: 0.125), out: out)
      }
      result.samples.append(Double(layer.byteCount) / seconds * 1e-9)
      result.ceilingSamples.append(readSpeed(backend, memory))
    }
    return result
  }

  /// GB/s of reading memory.
  private func readSpeed(_ backend: CPUBackend, _ memory: DeviceMemory) -> Double {
    Double(memory.byteCount) / options.seconds { _ = backend.readMemory(memory) } * 1e-9
  }

  /// GFLOP/s of products in registers.
  private func peak(_ product: CPUBackend.Product, _ backend: CPUBackend) -> Double {
    var operations = 0.0
    let seconds = options.seconds { operations = backend.doProducts(product, rounds: 400_000) }
    return operations / seconds * 1e-9
  }
}

/// An address that goes to other threads.
private struct Address: @unchecked Sendable {
  // Unchecked: each thread writes a part of its own.
  let pointer: UnsafeMutableRawPointer
  init(_ pointer: UnsafeMutableRawPointer) { self.pointer = pointer }
}
