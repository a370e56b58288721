public import ApusCore
import ApusModels
import ApusTensors
import Glibc

/// Writes checkpoints in other formats.
public enum Converter {
  /// Bytes of float32 numbers that are in work at once.
  private static let batchBytes = 32 << 20

  /// Converts a checkpoint.
  ///
  /// One tensor is in work at a time, large ones in pieces, so memory does not grow with the model. The output appears
  /// under its name when it is whole; until then it grows beside it under a name that ends in `.partial`.
  /// - Parameters:
  ///   - threads: of the arithmetic; `nil` for one per core.
  ///   - progress: called with bytes written so far and in all, and the tensor in work; false ends the conversion.
  /// - Returns: what became of each tensor.
  /// - Throws: `invalidCheckpoint` or `unsupported` naming file, tensor and reason; `invalidRequest` for impossible options
  ///   and for an output that exists; `internalFailure` if writing fails; `aborted`.
  public static func convert(
    _ options: ConversionOptions, threads: Int? = nil,
    progress: ((_ done: Int, _ total: Int, _ tensor: String) -> Bool)? = nil
  ) throws(EngineError) -> ConversionReport {
    try check(options)
    let worker = try CPUBackend(threads: threads)
    let plan = try makePlan(options, worker: worker)
    let staged = try StagedOutput(path: options.output, isDirectory: plan.isDirectory, overwrites: options.overwrites)
    let copied = plan.copies.reduce(0) { $0 + size($1.path) }
    let needed = plan.layout.byteCount + copied + plan.files.reduce(0) { $0 + $1.bytes.count }
    if let free = options.freeBytes ?? staged.freeBytes, needed > free {
      throw EngineError(
        .invalidRequest,
        "\(staged.path) needs \(needed) bytes, but only \(free) are free on its disk; choose another place or a smaller "
          + "format.", parameter: "output")
    }

    var report = ConversionReport(input: options.input, output: staged.path, format: options.format.name)
    report.notes = plan.notes
    report.byteCount = plan.layout.byteCount
    var files: [OutputFile] = []
    for file in plan.layout.files {
      let path = plan.isDirectory ? "\(staged.temporary)/\(file.name)" : staged.temporary
      let output = try OutputFile(path: path, byteCount: file.byteCount)
      try output.write(file.header, at: 0)
      files.append(output)
    }
    let total = plan.steps.reduce(0) { $0 + $1.outputs.reduce(0) { $0 + $1.byteCount } }
    var done = 0
    for step in plan.steps {
      func place(_ index: Int) -> (OutputFile, Int) {
        let place = plan.layout.places[step.outputs[index].name]!
        return (files[place.file], place.offset)
      }
      func advance(_ bytes: Int) throws(EngineError) {
        done += bytes
        if let progress, !progress(done, total, step.tensor.name) {
          throw EngineError(.aborted, "The conversion was stopped; nothing was written.")
        }
      }
      try advance(0)
      let sums = try run(step, options, plan.source, worker: worker, place: place, advance: advance)
      let bytes = step.outputs.reduce(0) { $0 + $1.byteCount }
      report.add(
        TensorReport(
          name: step.tensor.name, shape: step.tensor.shape, storedAs: step.tensor.storedAs, writtenAs: step.writtenAs,
          byteCount: bytes,
          relativeError: sums.squares > 0 ? (sums.errorSquares / sums.squares).squareRoot() : 0,
          largestError: sums.largestError), squares: sums.squares, errorSquares: sums.errorSquares)
    }
    for file in files { try file.flush() }
    if plan.isDirectory { try writeCompanions(plan, to: staged.temporary) }
    try staged.commit()
    return report
  }

  private static func check(_ options: ConversionOptions) throws(EngineError) {
    func require(_ condition: Bool, _ field: String, _ sentence: String) throws(EngineError) {
      if !condition { throw EngineError(.invalidRequest, "\(field) \(sentence).", parameter: field) }
    }
    try require(fileKind(options.input) != nil, "input", "must exist; there is no \(options.input)")
    try require(
      [nil, .float32, .float16, .bfloat16].contains(options.denseType), "dense type",
      "must be float32, float16 or bfloat16")
    try require(options.maxShardBytes >= 1 << 10, "max shard size", "must be at least 1024 bytes")
    try require(
      options.groupSize >= 8 && options.groupSize <= 1 << 16 && options.groupSize % 8 == 0, "group size",
      "must be a multiple of 8 up to 65536, got \(options.groupSize)")
    let isInt4 = options.format == .int4
    try require(isInt4 || options.layout == .compressedTensors, "layout", "goes with the format int4 only")
    try require(isInt4 || options.isSymmetric, "asymmetric", "goes with the format int4 only")
    if case .gguf = options.format {
    } else {
      try require(
        !options.quantizesEmbeddings, "quantize embeddings", "goes with GGUF formats only; others keep the table dense")
    }
    // The checkpoint is read while the output is written.
    let (input, output) = (resolved(options.input), resolved(options.output))
    try require(
      input != output && !output.hasPrefix(input + "/"), "output",
      "must not be the input or lie in it: \(options.output)")
  }

  /// A path without links, or as it is if there is nothing.
  private static func resolved(_ path: String) -> String {
    var path = path
    while path.count > 1, path.hasSuffix("/") { path.removeLast() }
    if let real = realpath(path, nil) {
      defer { free(real) }
      return String(cString: real)
    }
    // The last part need not exist yet.
    guard let slash = path.lastIndex(of: "/") else { return resolved(".") + "/" + path }
    let parent = slash == path.startIndex ? "/" : String(path[..<slash])
    guard access(parent, F_OK) == 0 else { return path }
    return resolved(parent) + "/" + path[path.index(after: slash)...]
  }

  private static func makePlan(
    _ options: ConversionOptions, worker: CPUBackend
  ) throws(EngineError) -> ConversionPlan {
    if let paths = try GGUFFiles.find(options.input) {
      if case .gguf(let type) = options.format {
        return try ConversionPlan(gguf: type, options, source: GGUFTensorSource(paths: paths))
      }
      let source = try GGUFWeightSource(paths: paths, worker: worker)
      let configuration = source.checkpoint.configuration
      // The type of the plain matrices where there are any; quantised ones become bfloat16.
      let plain = source.tensors.first { $0.shape.count == 2 && !$0.isQuantized }?.type?.dtype
      let dtype: DType = options.denseType ?? plain ?? .bfloat16
      let config = try configuration.configJSON(
        dtype: dtype.name, generation: source.checkpoint.generation, path: source.path)
      var plan = try ConversionPlan(directory: options, source: source, config: config, sourceDType: dtype)
      let tokenizer = try TokenizerFiles(source.checkpoint.files, contextLength: configuration.maxPositionEmbeddings)
      plan.files += tokenizer.files
      plan.notes += tokenizer.notes
      var generation = JSONObject()
      for key in ["bos_token_id", "eos_token_id"] { if let value = config[key] { generation[key] = value } }
      var writer = PrettyJSON()
      writer.write(.object(generation))
      plan.files.append(("generation_config.json", writer.bytes))
      return plan
    }
    guard fileKind(options.input) == .directory else {
      throw EngineError(
        .invalidCheckpoint, "\(options.input) is neither a checkpoint directory nor a GGUF file.")
    }
    let source = try DirectorySource(path: options.input, worker: worker)
    if case .gguf(let type) = options.format {
      return try ConversionPlan(gguf: type, options, source: source)
    }
    let name = (source.config["dtype"] ?? source.config["torch_dtype"])?.stringValue
    let stated = [DType.float32, .float16, .bfloat16].first { $0.name == name }
    let found = source.tensors.first { $0.shape.count == 2 && !$0.isQuantized }?.type?.dtype
    var plan = try ConversionPlan(
      directory: options, source: source, config: source.config, sourceDType: stated ?? found ?? .bfloat16)
    plan.copies = ConversionPlan.companions(of: options.input)
    return plan
  }

  private static func size(_ path: String) -> Int {
    var status = stat()
    return stat(path, &status) == 0 ? Int(status.st_size) : 0
  }

  private static func writeCompanions(_ plan: ConversionPlan, to directory: String) throws(EngineError) {
    func makeFolder(_ name: String) throws(EngineError) {
      guard let slash = name.lastIndex(of: "/") else { return }
      let path = "\(directory)/\(name[..<slash])"
      if fileKind(path) == nil, mkdir(path, 0o755) != 0 { throw OutputFile.failure("made", path) }
    }
    for (name, bytes) in plan.files {
      try makeFolder(name)
      try writeWhole(bytes, "\(directory)/\(name)")
    }
    for (name, path) in plan.copies {
      guard let bytes = try readSmallFile(path, limit: 1 << 30) else { continue }
      try makeFolder(name)
      try writeWhole(bytes, "\(directory)/\(name)")
    }
  }

  // MARK: Tensors

  private static func run(
    _ step: ConversionStep, _ options: ConversionOptions, _ source: any ConversionSource, worker: CPUBackend,
    place: (Int) -> (OutputFile, Int), advance: (Int) throws(EngineError) -> Void
  ) throws(EngineError) -> ErrorSums {
    let tensor = step.tensor
    var sums = ErrorSums()
    switch step.action {
    case .bytes(let bytes):
      let (file, offset) = place(0)
      try file.write(bytes, at: offset)
      try advance(bytes.count)
      return sums
    case .copy:
      guard let (bytes, owner) = source.bytes(tensor) else {
        throw EngineError(.internalFailure, "\(source.path): tensor \(tensor.name) cannot be found.")
      }
      let (file, offset) = place(0)
      var start = 0
      while start < bytes.count {
        let end = min(bytes.count, start + batchBytes)
        try file.write(UnsafeRawBufferPointer(rebasing: bytes[start..<end]), at: offset + start)
        try advance(end - start)
        start = end
      }
      withExtendedLifetime(owner) {}
      return sums
    case .rows(let type):
      sums = try rows(step, type, source, worker: worker, place: place, advance: advance)
    case .int8, .int4:
      let matrix = try integers(step, options, source, worker: worker, place: place)
      sums = matrix.error
      try advance(step.outputs.reduce(0) { $0 + $1.byteCount })
    }
    let isCast = if case .rows(let type) = step.action { type.dtype != nil } else { false }
    guard sums.sourceIsFinite || isCast else {
      throw EngineError(
        .invalidCheckpoint,
        "\(source.path): tensor \(tensor.name) holds numbers that are infinite or none, which \(step.writtenAs) cannot "
          + "hold; keep it as it is with --keep.")
    }
    guard sums.resultIsFinite || !sums.sourceIsFinite else {
      throw EngineError(
        .unsupported,
        "\(source.path): tensor \(tensor.name) holds numbers too large for \(step.writtenAs); choose another format, such "
          + "as bf16.")
    }
    return sums
  }

  private struct Batch: @unchecked Sendable {
    // Unchecked: each row is written by one thread.
    let output: UnsafeMutableRawPointer
    let errors: UnsafeMutablePointer<ErrorSums>
  }

  private static func rows(
    _ step: ConversionStep, _ type: GGUFWeightType, _ source: any ConversionSource, worker: CPUBackend,
    place: (Int) -> (OutputFile, Int), advance: (Int) throws(EngineError) -> Void
  ) throws(EngineError) -> ErrorSums {
    guard step.tensor.count > 0 else { return ErrorSums() }
    var rows = try source.rows(step.tensor)
    if step.interleavedHead > 0 {
      // A bias is a column of as many rows as it has numbers.
      if step.tensor.shape.count == 1 {
        rows = RowSource(address: rows.address, type: rows.type, rows: rows.columns, columns: 1, owner: rows.owner)
      }
      rows.interleavedHead = step.interleavedHead
    }
    let numbers = rows
    let columns = numbers.columns
    let rowBytes = columns / type.blockLength * type.blockBytes
    let rowsPerBatch = max(1, min(numbers.rows, batchBytes / 4 / columns))
    let rowsPerChunk = max(1, (1 << 15) / columns)
    let memory = try CPUBackend.hostMemory(byteCount: rowsPerBatch * rowBytes)
    var sums = ErrorSums()
    let (file, offset) = place(0)
    for first in stride(from: 0, to: numbers.rows, by: rowsPerBatch) {
      let last = min(numbers.rows, first + rowsPerBatch)
      let chunks = (last - first + rowsPerChunk - 1) / rowsPerChunk
      var errors = [ErrorSums](repeating: ErrorSums(), count: chunks)
      errors.withUnsafeMutableBufferPointer { errors in
        let batch = Batch(output: memory.address, errors: errors.baseAddress!)
        worker.parallel(chunks: chunks) { chunk in
          withUnsafeTemporaryAllocation(of: Float.self, capacity: 2 * columns) { scratch in
            let (row, result) = (scratch.baseAddress!, scratch.baseAddress! + columns)
            var own = ErrorSums()
            let start = first + chunk * rowsPerChunk
            for index in start..<min(last, start + rowsPerChunk) {
              numbers.read(index, to: row)
              let target = batch.output + (index - first) * rowBytes
              type.quantize(row, count: columns, to: target)
              type.dequantize(target, count: columns, to: result)
              own.add(row, result, count: columns)
            }
            batch.errors[chunk] = own
          }
        }
      }
      for error in errors { sums = sums + error }
      let bytes = (last - first) * rowBytes
      try file.write(UnsafeRawBufferPointer(start: memory.address, count: bytes), at: offset + first * rowBytes)
      try advance(bytes)
    }
    return sums
  }

  private static func integers(
    _ step: ConversionStep, _ options: ConversionOptions, _ source: any ConversionSource, worker: CPUBackend,
    place: (Int) -> (OutputFile, Int)
  ) throws(EngineError) -> IntegerMatrix {
    let quantizer = IntegerQuantizer(worker: worker)
    let rows = try source.rows(step.tensor)
    func write(_ suffix: String, _ bytes: [UInt8]) throws(EngineError) {
      let index = step.outputs.firstIndex { $0.name.hasSuffix("." + suffix) }!
      let (file, offset) = place(index)
      guard bytes.count == step.outputs[index].byteCount else {
        throw EngineError(.internalFailure, "\(step.outputs[index].name) has \(bytes.count) bytes, not as planned.")
      }
      try file.write(bytes, at: offset)
    }
    if case .int8 = step.action {
      let matrix = quantizer.int8(rows)
      try write("weight", matrix.codes)
      try write("weight_scale", matrix.scaleBytes(.float32))
      return matrix
    }
    let scaleName = step.outputs.first { $0.name.hasSuffix("scale") || $0.name.hasSuffix("scales") }!.typeName
    let scaleType = GGUFWeightType(typeName: scaleName)?.dtype ?? .float16
    let matrix = quantizer.int4(
      rows, groupSize: options.groupSize, isSymmetric: options.isSymmetric, scaleType: scaleType)
    switch options.layout {
    case .compressedTensors:
      try write("weight_packed", matrix.packedByRow)
      try write("weight_scale", matrix.scaleBytes(scaleType))
      let shape = step.tensor.shape.map { Int64($0).littleEndian }
      try write("weight_shape", shape.flatMap { length in withUnsafeBytes(of: length) { Array($0) } })
      if !options.isSymmetric { try write("weight_zero_point", matrix.zerosPackedByColumn) }
    case .gptq:
      try write("qweight", matrix.packedByInput)
      try write("qzeros", matrix.zerosPackedByOutput)
      try write("scales", matrix.scaleBytes(scaleType, isTransposed: true))
      let groups = (0..<matrix.inputs).map { Int32($0 / options.groupSize).littleEndian }
      try write("g_idx", groups.flatMap { group in withUnsafeBytes(of: group) { Array($0) } })
    case .awq:
      try write("qweight", matrix.packedForAWQ)
      try write("qzeros", matrix.zerosPackedForAWQ)
      try write("scales", matrix.scaleBytes(scaleType, isTransposed: true))
    }
    return matrix
  }
}
