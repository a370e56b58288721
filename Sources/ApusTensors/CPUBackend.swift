public import ApusCore
internal import CKernels
internal import CLinux
internal import Glibc
internal import Synchronization

/// The backend on the processor's own cores.
///
/// It owns a pool of threads that sleep while there is nothing to do, and scratch memory that grows to what the
/// largest call needed. Calls from several threads wait for each other. Tensors are host memory and may be read and
/// written directly between calls.
public final class CPUBackend: Backend {
  // Used only under the lock.
  nonisolated(unsafe) private let context: OpaquePointer
  /// What products of many weights at once need. Used only under the lock.
  nonisolated(unsafe) let groupContexts: OpaquePointer
  private let lock = Mutex<Void>(())

  /// Threads that compute, the caller included.
  public let threads: Int
  /// The instructions in use.
  public let instructionSet: InstructionSet
  /// Whether attention reads pages that sequences of a batch share once for all of them. The bits are the same.
  public let sharesPrefixes: Bool

  /// Starts a backend.
  ///
  /// - Parameters:
  ///   - threads: Threads that compute, the caller included; by default one for each physical core that this
  ///     process may
  ///     use. Where there are cores enough, workers are pinned to the cores after the first; the caller is left
  ///     alone.
  ///   - sharesPrefixes: See there; off selects the plain form, for comparisons.
  ///   - isa: Instructions to use; by default what the environment variable `APUS_ISA` names, or the best there
  ///     are.
  /// - Throws: `invalidRequest` for a number of threads outside 1...1024 or an unknown `APUS_ISA`, `unsupported`
  ///   for a level
  ///   that this machine cannot run, `outOfMemory` when threads cannot be started.
  public init(
    threads: Int? = nil, isa: InstructionSet? = nil, sharesPrefixes: Bool = true
  ) throws(EngineError) {
    let level = if let isa { try isa.checked() } else { try InstructionSet.chosen() }
    let count = threads ?? Int(apus_usable_core_count())
    guard (1...1024).contains(count) else {
      throw EngineError(.invalidRequest, "The CPU backend needs between 1 and 1024 threads, not \(count).")
    }
    var cores = [Int32](repeating: 0, count: 4096)
    let coreCount = min(Int(apus_physical_cores(&cores, Int32(cores.count))), cores.count)
    let created = apus_context_create(
      Int32(count), apus_isa(UInt32(level.rawValue)), coreCount >= count && count > 1 ? cores : nil)
    guard let created else {
      throw EngineError(.outOfMemory, "The CPU backend could not start \(count) threads; ask for fewer.")
    }
    guard let groups = apus_groups_create(created) else {
      apus_context_free(created)
      throw EngineError(.outOfMemory, "The CPU backend has no memory for \(count) threads; ask for fewer.")
    }
    context = created
    groupContexts = groups
    self.threads = count
    instructionSet = level
    self.sharesPrefixes = sharesPrefixes
  }

  deinit {
    apus_groups_free(groupContexts)
    apus_context_free(context)
  }

  public var name: String {
    "cpu (\(instructionSet.name), \(threads) \(threads == 1 ? "thread" : "threads"))"
  }

  /// Bytes of scratch memory that operators have made the backend keep.
  public var scratchByteCount: Int {
    locked { Int(apus_context_scratch_bytes($0) + apus_groups_scratch_bytes(groupContexts)) }
  }

  func locked<Result>(_ body: (OpaquePointer) -> Result) -> Result {
    lock.withLock { _ in body(context) }
  }

  // MARK: Memory

  public func allocate(rows: Int, columns: Int, dtype: DType) throws(EngineError) -> Tensor {
    let (numbers, overflow) = rows.multipliedReportingOverflow(by: columns)
    guard rows >= 0, columns >= 0, !overflow, numbers <= Int.max / 16 else {
      throw EngineError(.outOfMemory, "A tensor of \(rows) x \(columns) numbers cannot be allocated.")
    }
    let memory = try Self.hostMemory(byteCount: numbers * dtype.byteCount)
    return Tensor(memory: memory, dtype: dtype, rows: rows, columns: columns)
  }

  /// Zeroed host memory: from the heap when small, with huge pages straight from the kernel when large.
  /// - Throws: `outOfMemory`.
  public static func hostMemory(byteCount: Int) throws(EngineError) -> DeviceMemory {
    let size = max(64, (byteCount + 63) / 64 * 64)
    if size >= 1 << 21 {
      guard let address = apus_memory_map(size) else {
        throw EngineError(.outOfMemory, "\(size) bytes of memory cannot be had.")
      }
      return DeviceMemory(address: address, byteCount: size) { apus_memory_unmap($0, $1) }
    }
    var address: UnsafeMutableRawPointer?
    guard posix_memalign(&address, 64, size) == 0, let address else {
      throw EngineError(.outOfMemory, "\(size) bytes of memory cannot be had.")
    }
    memset(address, 0, size)
    return DeviceMemory(address: address, byteCount: size) { address, _ in free(address) }
  }

  // MARK: Weights and pages

  public func packLinear(
    _ sources: [WeightSource], format: WeightFormat
  ) throws(EngineError) -> any LinearWeight {
    guard let first = sources.first else {
      throw EngineError(.internalFailure, "A linear layer needs at least one weight.")
    }
    var rows = [apus_weight_rows]()
    for source in sources {
      guard (source.dtype == .int8) == (source.scales != nil), source.scales == nil || format == .int8PerChannel else {
        throw EngineError(.internalFailure, "Weights of int8 numbers need scales and can only be packed as int8.")
      }
      guard source.columns == first.columns, source.rows >= 0, source.columns >= 0 else {
        throw EngineError(
          .invalidCheckpoint,
          "Weights that are packed together must have equal columns, not \(first.columns) and \(source.columns).")
      }
      rows.append(
        apus_weight_rows(
          address: source.address, dtype: source.scales == nil ? try source.dtype.kernel() : APUS_INT8,
          rows: Int64(source.rows), scales: source.scales))
    }
    let outputs = sources.reduce(0) { $0 + $1.rows }
    let created: OpaquePointer?
    switch format {
    case .dense(let dtype): created = apus_linear_create(Int64(outputs), Int64(first.columns), try dtype.kernel())
    case .int8PerChannel: created = apus_linear_create(Int64(outputs), Int64(first.columns), APUS_INT8)
    case .codes(let layout):
      guard !layout.hasFactors, layout.minimum == .none else {
        throw EngineError(.internalFailure, "Weights cannot be rounded to codes with factors or minimums.")
      }
      var kernelLayout = try layout.kernel()
      created = apus_linear_create_codes(Int64(outputs), Int64(first.columns), &kernelLayout, nil)
    }
    guard let packed = created else { throw Self.noMemory(outputs, first.columns) }
    locked {
      if case .codes = format {
        apus_linear_quantize($0, packed, rows, Int32(rows.count))
      } else {
        apus_linear_pack($0, packed, rows, Int32(rows.count))
      }
    }
    withExtendedLifetime(sources) {}
    return CPULinearWeight(packed: packed, outputs: outputs, inputs: first.columns, format: format)
  }

  private static func noMemory(_ outputs: Int, _ inputs: Int) -> EngineError {
    EngineError(.outOfMemory, "There is no memory for weights of \(outputs) x \(inputs) numbers.")
  }

  public func packLinear(_ sources: [QuantizedSource]) throws(EngineError) -> any LinearWeight {
    guard let first = sources.first, sources.allSatisfy(first.matches) else {
      throw EngineError(.internalFailure, "Quantised weights that are packed together must have equal layouts.")
    }
    let (outputs, inputs) = (sources.reduce(0) { $0 + $1.rows }, first.columns)
    var layout = try first.layout.kernel()
    guard let packed = apus_linear_create_codes(Int64(outputs), Int64(inputs), &layout, first.order) else {
      throw Self.noMemory(outputs, inputs)
    }
    let panel = Int(APUS_CODES_PANEL)
    nonisolated(unsafe) let target = packed
    parallel(chunks: (outputs + panel - 1) / panel) { chunk in
      let range = chunk * panel..<min(outputs, (chunk + 1) * panel)
      CodeRows.withRows(range.count, layout: first.layout, inputs: inputs) { rows in
        QuantizedSource.fill(sources, range, rows)
        var kernelRows = apus_code_rows(
          codes: rows.codes, scales: rows.scales, factors: rows.factors, minimums: rows.minimums,
          minimum_factors: rows.minimumFactors)
        apus_linear_pack_codes(target, Int64(chunk), &kernelRows)
      }
    }
    return CPULinearWeight(packed: packed, outputs: outputs, inputs: inputs, format: .codes(first.layout))
  }

  public func joinLinear(_ parts: [any LinearWeight]) -> any LinearWeight {
    precondition(!parts.isEmpty && parts.allSatisfy { $0.inputs == parts[0].inputs })
    return parts.count == 1 ? parts[0] : JoinedLinearWeight(parts)
  }

  public func int8Error(_ weight: any LinearWeight, _ sources: [WeightSource]) -> Double {
    guard let weight = weight as? CPULinearWeight, weight.format == .int8PerChannel else { return 0 }
    var rows = [apus_weight_rows]()
    for source in sources {
      // Integers that are taken as they are lose nothing.
      guard source.scales == nil, let dtype = try? source.dtype.kernel() else { return 0 }
      rows.append(
        apus_weight_rows(address: source.address, dtype: dtype, rows: Int64(source.rows), scales: nil))
    }
    defer { withExtendedLifetime(sources) {} }
    return locked { apus_linear_int8_error($0, weight.packed, rows, Int32(rows.count)) }
  }

  /// The numbers that an output of weights with codes stands for, in the order of inputs; for tests and reports.
  public func codeNumbers(_ weight: any LinearWeight, output: Int) -> [Float] {
    guard let weight = weight as? CPULinearWeight, case .codes = weight.format else { return [] }
    precondition(output >= 0 && output < weight.outputs)
    return [Float](unsafeUninitializedCapacity: weight.inputs) { buffer, count in
      if weight.inputs > 0 { apus_linear_read_codes(weight.packed, Int64(output), buffer.baseAddress) }
      count = weight.inputs
    }
  }

  public func makeKVLayer(
    pageCount: Int, kvHeads: Int, headDimension: Int, dtype: DType
  ) throws(EngineError) -> any KVLayer {
    guard pageCount >= 0, pageCount <= Int(Int32.max) / Self.kvPageSize, (1...65536).contains(kvHeads),
      (1...65536).contains(headDimension)
    else {
      throw EngineError(
        .internalFailure,
        "K/V pages of \(pageCount) x \(kvHeads) heads x \(headDimension) numbers are not possible.")
    }
    guard
      let pages = apus_kv_create(Int64(pageCount), Int32(kvHeads), Int32(headDimension), try dtype.kvKernel())
    else {
      throw EngineError(
        .outOfMemory, "There is no memory for \(pageCount) K/V pages; lower the share of memory for the cache.")
    }
    return CPUKVLayer(
      pages: pages, pageCount: pageCount, kvHeads: kvHeads, headDimension: headDimension,
      valueDimension: headDimension, isLatent: false, dtype: dtype)
  }

  public func makeLatentLayer(
    pageCount: Int, keyDimension: Int, valueDimension: Int, dtype: DType
  ) throws(EngineError) -> any KVLayer {
    guard pageCount >= 0, pageCount <= Int(Int32.max) / Self.kvPageSize, (1...65536).contains(keyDimension),
      (1...keyDimension).contains(valueDimension)
    else {
      throw EngineError(
        .internalFailure,
        "Latent pages of \(pageCount) x \(keyDimension) numbers with values of \(valueDimension) are not possible.")
    }
    guard [.float32, .float16, .bfloat16].contains(dtype) else { throw latentTypeError(dtype) }
    guard
      let pages = apus_kv_create_latent(
        Int64(pageCount), Int32(keyDimension), Int32(valueDimension), try dtype.kvKernel())
    else {
      throw EngineError(
        .outOfMemory, "There is no memory for \(pageCount) latent pages; lower the share of memory for the cache.")
    }
    return CPUKVLayer(
      pages: pages, pageCount: pageCount, kvHeads: 1, headDimension: keyDimension, valueDimension: valueDimension,
      isLatent: true, dtype: dtype)
  }

  /// Tokens in a K/V page; equal to `ApusScheduling.kvPageSize`.
  public static let kvPageSize = Int(APUS_KV_PAGE_SIZE)

  // MARK: Rows

  public func embed(table: Tensor, tokens: UnsafePointer<TokenID>, count: Int, out: Tensor) {
    precondition(table.columns == out.columns && count <= out.rows)
    let columns = Int64(out.columns)
    locked {
      apus_embed(
        $0, table.pointer, table.kernelDType, Int64(table.stride), tokens, Int64(count), columns, out.float32,
        Int64(out.stride))
    }
  }

  public func rmsNorm(_ x: Tensor, weight: Tensor, epsilon: Float, out: Tensor) {
    precondition(x.rows == out.rows && x.columns == out.columns && weight.columns >= x.columns)
    locked {
      apus_rms_norm(
        $0, x.float32, Int64(x.stride), Int64(x.rows), Int64(x.columns), weight.pointer, weight.kernelDType, epsilon,
        out.float32, Int64(out.stride))
    }
  }

  public func addRMSNorm(residual: Tensor, delta: Tensor, weight: Tensor, epsilon: Float, out: Tensor) {
    precondition(residual.rows == delta.rows && residual.columns == delta.columns)
    precondition(residual.rows == out.rows && residual.columns == out.columns && weight.columns >= out.columns)
    locked {
      apus_add_rms_norm(
        $0, residual.float32, Int64(residual.stride), delta.float32, Int64(delta.stride), Int64(residual.rows),
        Int64(residual.columns), weight.pointer, weight.kernelDType, epsilon, out.float32, Int64(out.stride))
    }
  }

  public func add(_ x: Tensor, _ y: Tensor) {
    precondition(x.rows == y.rows && x.columns == y.columns)
    locked {
      apus_add(
        $0, x.float32, Int64(x.stride), y.float32, Int64(y.stride), Int64(x.rows), Int64(x.columns))
    }
  }

  public func linear(_ x: Tensor, _ weight: any LinearWeight, bias: Tensor?, out: Tensor) {
    if let joined = weight as? JoinedLinearWeight {
      return joined.forEachPart(bias: bias, out: out) { linear(x, $0, bias: $1, out: $2) }
    }
    guard let weight = weight as? CPULinearWeight else {
      preconditionFailure("A weight of another backend was given to the CPU backend.")
    }
    precondition(x.columns == weight.inputs && out.columns == weight.outputs && x.rows == out.rows)
    precondition(bias.map { $0.columns >= weight.outputs } ?? true)
    locked {
      apus_linear_run(
        $0, weight.packed, x.float32, Int64(x.stride), Int64(x.rows), bias.map { UnsafePointer($0.float32) },
        out.float32, Int64(out.stride))
    }
  }

  public func headRMSNorm(_ x: Tensor, heads: Int, headDimension: Int, weight: Tensor, epsilon: Float) {
    precondition(x.columns >= heads * headDimension && weight.columns >= headDimension)
    locked {
      apus_head_rms_norm(
        $0, x.float32, Int64(x.stride), Int64(x.rows), Int32(heads), Int32(headDimension), weight.pointer,
        weight.kernelDType, epsilon)
    }
  }

  public func rope(
    _ x: Tensor, heads: Int, headDimension: Int, positions: UnsafePointer<Int32>, table: Tensor
  ) {
    precondition(x.columns >= heads * headDimension && table.columns <= headDimension && table.columns % 2 == 0)
    locked {
      apus_rope(
        $0, x.float32, Int64(x.stride), Int64(x.rows), Int32(heads), Int32(headDimension), positions, table.float32,
        Int64(table.stride), Int32(table.columns / 2))
    }
  }

  public func ropeInterleaved(
    _ x: Tensor, heads: Int, headDimension: Int, offset: Int, positions: UnsafePointer<Int32>, table: Tensor
  ) {
    precondition(x.columns >= heads * headDimension && table.columns % 2 == 0)
    precondition(offset >= 0 && offset + table.columns <= headDimension)
    locked {
      apus_rope_interleaved(
        $0, x.float32, Int64(x.stride), Int64(x.rows), Int32(heads), Int32(headDimension), Int32(offset), positions,
        table.float32, Int64(table.stride), Int32(table.columns / 2))
    }
  }

  public func siluMul(_ gateUp: Tensor, out: Tensor) {
    precondition(gateUp.rows == out.rows && gateUp.columns >= 2 * out.columns)
    locked {
      apus_silu_mul(
        $0, gateUp.float32, Int64(gateUp.stride), Int64(out.rows), Int64(out.columns), out.float32,
        Int64(out.stride))
    }
  }

  public func gather(_ x: Tensor, rows: UnsafePointer<Int32>, count: Int, out: Tensor) {
    precondition(x.columns == out.columns && count <= out.rows)
    locked {
      apus_gather(
        $0, x.float32, Int64(x.stride), rows, Int64(count), Int64(x.columns), out.float32, Int64(out.stride))
    }
  }

  // MARK: Attention

  public func writeKV(_ k: Tensor, _ v: Tensor, slots: UnsafePointer<Int32>, layer: any KVLayer) {
    let layer = own(layer)
    precondition(
      !layer.isLatent && k.rows == v.rows && k.columns == layer.kvHeads * layer.headDimension && v.columns == k.columns)
    locked {
      apus_kv_write(
        $0, layer.pages, k.float32, Int64(k.stride), v.float32, Int64(v.stride), Int64(k.rows), slots)
    }
  }

  public func writeLatents(_ latents: Tensor, slots: UnsafePointer<Int32>, layer: any KVLayer) {
    let layer = own(layer)
    precondition(layer.isLatent && latents.columns == layer.headDimension)
    locked {
      apus_kv_write(
        $0, layer.pages, latents.float32, Int64(latents.stride), nil, 0, Int64(latents.rows), slots)
    }
  }

  public func attention(
    _ q: Tensor, layer: any KVLayer, batch: AttentionBatch, shape: AttentionShape, out: Tensor
  ) {
    let layer = own(layer)
    precondition(shape.kvHeads == layer.kvHeads && shape.headDimension == layer.headDimension)
    precondition(shape.queryHeads > 0 && shape.queryHeads % shape.kvHeads == 0)
    precondition(q.columns == shape.queryHeads * shape.headDimension)
    precondition(out.columns == shape.queryHeads * layer.valueDimension)
    precondition(shape.sinks.map { $0.columns >= shape.queryHeads } ?? true)
    var arguments = apus_attention_arguments(
      sequences: Int32(batch.sequenceCount), row_start: batch.rowStart, start: batch.start,
      page_offset: batch.pageOffset, pages: batch.pages, query_heads: Int32(shape.queryHeads), scale: shape.scale,
      window: Int32(shape.slidingWindow), soft_cap: shape.softCap,
      sinks: shape.sinks.map { UnsafePointer($0.float32) }, is_plain: sharesPrefixes ? 0 : 1)
    locked {
      apus_attention(
        $0, layer.pages, q.float32, Int64(q.stride), out.float32, Int64(out.stride), &arguments)
    }
  }

  public func copyPages(
    layer: any KVLayer, from: UnsafePointer<Int32>, to: UnsafePointer<Int32>, count: Int
  ) {
    let layer = own(layer)
    locked { apus_kv_copy($0, layer.pages, from, to, Int32(count)) }
  }

  private func own(_ layer: any KVLayer) -> CPUKVLayer {
    guard let layer = layer as? CPUKVLayer else {
      preconditionFailure("K/V pages of another backend were given to the CPU backend.")
    }
    return layer
  }

  // MARK: Logits

  public func applyPenalties(
    logits: Tensor, row: Int, tokens: UnsafePointer<TokenID>, outputCounts: UnsafePointer<Int32>, count: Int,
    repetition: Float, frequency: Float, presence: Float
  ) {
    precondition(row >= 0 && row < logits.rows)
    apus_apply_penalties(
      logits.float32 + row * logits.stride, Int64(logits.columns), tokens, outputCounts, Int64(count), repetition,
      frequency, presence)
  }

  public func applyMask(logits: Tensor, row: Int, mask: UnsafePointer<UInt32>, words: Int) {
    precondition(row >= 0 && row < logits.rows)
    apus_mask_logits(logits.float32 + row * logits.stride, Int64(logits.columns), mask, Int64(words))
  }

  public func sample(
    logits: Tensor, rows: UnsafePointer<SamplingRow>, tokens: UnsafeMutablePointer<TokenID>
  ) {
    withUnsafeTemporaryAllocation(of: apus_sampling_row.self, capacity: max(1, logits.rows)) { parameters in
      for r in 0..<logits.rows {
        let row = rows[r]
        parameters.initializeElement(
          at: r,
          to: apus_sampling_row(
            temperature: row.temperature, top_k: row.topK, top_p: row.topP, min_p: row.minP, uniform: row.uniform))
      }
      locked {
        apus_sample(
          $0, logits.float32, Int64(logits.stride), Int64(logits.rows), Int64(logits.columns), parameters.baseAddress,
          tokens)
      }
    }
  }

  public func logSumExp(logits: Tensor, row: Int) -> Float {
    precondition(row >= 0 && row < logits.rows)
    return locked { apus_log_sum_exp($0, logits.float32 + row * logits.stride, Int64(logits.columns)) }
  }

  public func topK(
    logits: Tensor, row: Int, k: Int, tokens: UnsafeMutablePointer<TokenID>, values: UnsafeMutablePointer<Float>
  ) {
    precondition(row >= 0 && row < logits.rows && k >= 0 && k <= Int(Int32.max))
    locked {
      apus_top_k(
        $0, logits.float32 + row * logits.stride, Int64(logits.columns), Int32(k), tokens, values)
    }
  }

  // MARK: Beyond the protocol

  /// Fills memory with reproducible dummy weights.
  ///
  /// Number i is offset + scale * (2 u - 1), computed in float32 and rounded to nearest even, where u =
  /// (splitmix64(key + i * 0x9E3779B97F4A7C15) >> 40) / 2^24 and splitmix64 is the generator's standard finaliser.
  /// - Throws: `unsupported` for a type that is not float32, float16 or bfloat16.
  public func fillUniform(
    _ address: UnsafeMutableRawPointer, dtype: DType, count: Int, key: UInt64, scale: Float, offset: Float = 0
  ) throws(EngineError) {
    let kernel = try dtype.kernel()
    locked { apus_fill_uniform($0, address, kernel, count, key, scale, offset) }
  }

  /// Converts numbers between float32, float16 and bfloat16, rounding to nearest even. The areas may not overlap.
  /// - Throws: `unsupported` for another type.
  public func convert(
    from: UnsafeRawPointer, _ fromDType: DType, to: UnsafeMutableRawPointer, _ toDType: DType, count: Int
  ) throws(EngineError) {
    let source = try fromDType.kernel()
    let target = try toDType.kernel()
    locked { apus_convert($0, from, source, to, target, count) }
  }

  /// The uniform number in [0, 1) that belongs to a position of a seeded request: the first word of Philox4x32-10
  /// (Salmon et al., 2011) over (position, seed), in steps of 2^-24.
  public static func uniform(seed: UInt64, position: UInt64) -> Float { apus_uniform(seed, position) }

  /// Products that a machine's peak is measured with.
  public enum Product: Sendable {
    /// float32 fused multiply-add.
    case float32
    /// Pairs of bfloat16 numbers; where there are no instructions for them, as float32.
    case bfloat16
    /// int8: four at a time (VNNI), else as 16-bit pairs.
    case int8
    /// Codes of up to 6 bits times int8: as int8 with VNNI, else pairs summed in 16 bits.
    case codes
  }

  /// Reads memory front to back on all threads: the ceiling of what streams weights or K/V.
  /// - Returns: something that depends on what was read.
  public func readMemory(_ memory: DeviceMemory) -> UInt64 {
    locked { apus_read_memory($0, memory.address, memory.byteCount) }
  }

  /// Does independent products in registers on all threads: the ceiling of what computes.
  /// - Returns: the arithmetic operations done, a product and a sum being two.
  public func doProducts(_ product: Product, rounds: Int) -> Double {
    let kind =
      switch product {
      case .float32: APUS_PRODUCT_FLOAT32
      case .bfloat16: APUS_PRODUCT_BFLOAT16
      case .int8: APUS_PRODUCT_INT8
      case .codes: APUS_PRODUCT_CODES
      }
    return locked { apus_do_products($0, kind, Int64(rounds)) }
  }

  /// Runs `body` once for each chunk on the backend's threads and returns when all have finished. Which thread runs
  /// which chunk is not determined. For work around the operators, such as preparing inputs; `body` may not call
  /// the backend.
  public func parallel(chunks: Int, _ body: @Sendable (_ chunk: Int) -> Void) {
    withoutActuallyEscaping(body) { body in
      var box: @Sendable (Int) -> Void = body
      withUnsafeMutablePointer(to: &box) { pointer in
        locked {
          apus_parallel(
            $0, Int32(chunks),
            { @Sendable argument, chunk, _ in
              argument!.assumingMemoryBound(to: (@Sendable (Int) -> Void).self).pointee(Int(chunk))
            }, pointer)
        }
      }
    }
  }
}

/// Packed weights of the CPU backend.
final class CPULinearWeight: LinearWeight, @unchecked Sendable {
  // Unchecked: written once, before anyone else sees it.
  let packed: OpaquePointer
  let outputs: Int
  let inputs: Int
  let format: WeightFormat
  /// What keeps the memory alive where it is not the weight's own.
  private let owner: AnyObject?

  init(packed: OpaquePointer, outputs: Int, inputs: Int, format: WeightFormat, owner: AnyObject? = nil) {
    self.packed = packed
    self.owner = owner
    self.outputs = outputs
    self.inputs = inputs
    self.format = format
  }

  var byteCount: Int { Int(apus_linear_bytes(packed)) }

  deinit { apus_linear_free(packed) }
}

/// The error of latent pages of a type that they cannot have.
func latentTypeError(_ dtype: DType) -> EngineError {
  EngineError(
    .unsupported,
    "The latents of multi-head latent attention are kept as float32, float16 or bfloat16, not \(dtype.name).",
    parameter: "kv_cache_dtype")
}

/// K/V pages of the CPU backend.
final class CPUKVLayer: KVLayer, @unchecked Sendable {
  // Unchecked: written only by backend calls, which wait for each other.
  let pages: OpaquePointer
  let pageCount: Int
  let kvHeads: Int
  let headDimension: Int
  let valueDimension: Int
  let isLatent: Bool
  let dtype: DType

  init(
    pages: OpaquePointer, pageCount: Int, kvHeads: Int, headDimension: Int, valueDimension: Int, isLatent: Bool,
    dtype: DType
  ) {
    self.pages = pages
    self.pageCount = pageCount
    self.kvHeads = kvHeads
    self.headDimension = headDimension
    self.valueDimension = valueDimension
    self.isLatent = isLatent
    self.dtype = dtype
  }

  var byteCount: Int { Int(apus_kv_bytes(pages)) }

  deinit { apus_kv_free(pages) }
}

extension CodeLayout {
  /// The kernels' description of the layout.
  /// - Throws: `unsupported` for scales that are no float type.
  func kernel() throws(EngineError) -> apus_code_layout {
    let kernelLevels =
      switch levels {
      case .linear: APUS_LEVELS_LINEAR
      case .e2m1: APUS_LEVELS_E2M1
      case .iq4NL: APUS_LEVELS_IQ4_NL
      case .e4m3: APUS_LEVELS_E4M3
      }
    let kernelMinimum =
      switch minimum {
      case .none: APUS_MINIMUM_NONE
      case .own: APUS_MINIMUM_OWN
      case .zeroPoint: APUS_MINIMUM_ZERO_POINT
      }
    return apus_code_layout(
      bits: Int32(bits), levels: kernelLevels, offset: Int32(offset), group: Int32(groupSize),
      block: Int32(blockSize), scale_dtype: try scaleType.kernel(), has_factors: hasFactors ? 1 : 0,
      minimum: kernelMinimum)
  }
}

extension DType {
  /// The kernels' name for a float type.
  /// - Throws: `unsupported` for others.
  func kernel() throws(EngineError) -> apus_dtype {
    switch self {
    case .float32: return APUS_FLOAT32
    case .float16: return APUS_FLOAT16
    case .bfloat16: return APUS_BFLOAT16
    default:
      throw EngineError(
        .unsupported, "The CPU backend computes with float32, float16 and bfloat16 numbers, not \(name).")
    }
  }
}

extension DType {
  /// The kernels' name for a type of K/V pages.
  /// - Throws: `unsupported` for others.
  fileprivate func kvKernel() throws(EngineError) -> apus_dtype {
    switch self {
    case .int8: return APUS_INT8
    case .float8: return APUS_FLOAT8
    default: return try kernel()
    }
  }
}

extension Tensor {
  fileprivate var kernelDType: apus_dtype {
    switch dtype {
    case .float32: return APUS_FLOAT32
    case .float16: return APUS_FLOAT16
    case .bfloat16: return APUS_BFLOAT16
    default: preconditionFailure("The CPU backend computes with float types, not \(dtype.name).")
    }
  }
}
