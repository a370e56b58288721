public import ApusCommunication
public import ApusCore
public import ApusTensors
import Glibc

/// What becomes of linear layers while they are loaded. `OutputLayerQuantization` says what becomes of the last one; the
/// embedding table stays as it is.
public enum WeightQuantization: Sendable, Equatable {
  /// What the checkpoint stores quantised stays so where there are kernels for it; all else becomes plain numbers.
  case stored
  /// All layers become plain numbers.
  case dense
  /// int8 with a scale for each output; in groups of 32 where that would round too coarsely
  /// (`WeightLoader.int8ErrorBound`).
  case int8
  /// The codes of a layout without factors and minimums.
  case codes(CodeLayout)
}

/// What becomes of the output layer, which turns hidden states into logits. It is rounded less than other layers: what it loses
/// goes straight into the order of the most likely tokens, with no later layer to even it out.
public enum OutputLayerQuantization: Sendable, Equatable {
  /// int8 where linear layers are rounded while they are loaded, to whatever format; as the checkpoint has it elsewhere.
  case auto
  /// int8 with a scale for each output; in groups of 32 where that would round too coarsely
  /// (`WeightLoader.int8ErrorBound`). What is stored quantised and is to stay so does.
  case int8
  /// Plain numbers.
  case dense
}

/// How weights are stored once loaded.
public struct WeightOptions: Sendable, Equatable {
  /// The format of plain numbers; `nil` keeps the checkpoint's.
  public var dtype: DType?
  /// The format of linear layers.
  public var quantization: WeightQuantization
  /// The format of the output layer, tied to the embedding table or not, and of those that draft models have of their own.
  public var outputLayer: OutputLayerQuantization

  /// Describes storage.
  public init(
    dtype: DType? = nil, quantization: WeightQuantization = .stored, outputLayer: OutputLayerQuantization = .auto
  ) {
    self.dtype = dtype
    self.quantization = quantization
    self.outputLayer = outputLayer
  }

  /// What `outputLayer` comes to; `.auto` only where the checkpoint decides.
  package var effectiveOutputLayer: OutputLayerQuantization {
    switch (outputLayer, quantization) {
    case (.auto, .int8), (.auto, .codes): .int8
    case (.auto, .dense): .dense
    default: outputLayer
    }
  }
}

/// Turns a checkpoint's tensors into a rank's packed weights.
public final class WeightLoader {
  /// The memory and kernels.
  public let backend: any Backend
  /// Every rank's place.
  public let layout: ParallelLayout
  /// The format of dense linear layers.
  public let dtype: DType
  let store: any WeightStore
  /// Where experts lie and how rows reach them.
  let experts: ExpertOptions
  private let layerFormat: WeightFormat
  /// The format of an output layer that is stored as plain numbers.
  private let outputFormat: WeightFormat
  /// Whether an output layer that the checkpoint stores quantised is taken as it is, and whether its int8 weights are.
  private let keepsStoredOutput: Bool
  private let takesInt8Output: Bool
  /// Whether what the checkpoint stores quantised is taken as it is.
  private let keepsStored: Bool
  /// Whether int8 weights of the checkpoint with a scale for each output are.
  private let takesInt8: Bool
  private let progress: ((_ done: Int, _ total: Int) -> Void)?
  /// Weights that an earlier start packed.
  private let cache: PackedWeightCache?
  private let total: Int
  private var done = 0
  /// Bytes of the weights packed so far.
  public private(set) var packedBytes = 0
  /// By layer, the bytes of one expert's packed weights.
  var expertBytes: [Int: Int] = [:]
  /// The format of the first linear layer that was packed.
  public private(set) var firstFormat: WeightFormat?
  /// Linear layers that were to have int8 with a scale for each output and got one for each group.
  public private(set) var regroupedLayers = 0

  /// The most that int8 with a scale for each output may be off, relative to the weights themselves (root of the summed
  /// squares). Normally distributed weights are at 0.008 to 0.009: their largest of some thousands is 3.5 to 4 deviations
  /// off, a step is a 127th of that, and rounding errs by a step / sqrt(12). Twice that means outputs in which few
  /// numbers stand out so far that the others lose a bit.
  public static let int8ErrorBound = 0.018

  /// Prepares to load.
  /// - Parameters:
  ///   - cache: has what an earlier start packed. Weights are asked for in the order in which they are loaded.
  ///   - progress: called after each weight with bytes read and the bytes there are.
  public init(
    store: any WeightStore, backend: any Backend, options: WeightOptions, layout: ParallelLayout,
    experts: ExpertOptions = ExpertOptions(), sample: String, expectedBytes: Int, cache: PackedWeightCache? = nil,
    progress: ((_ done: Int, _ total: Int) -> Void)?
  ) {
    self.cache = cache
    self.experts = experts
    self.store = store
    self.backend = backend
    self.layout = layout
    dtype = options.dtype ?? store.dtype(of: sample) ?? .float32
    layerFormat =
      switch options.quantization {
      case .stored, .dense: .dense(dtype)
      case .int8: .int8PerChannel
      case .codes(let layout): .codes(layout)
      }
    keepsStored = options.quantization == .stored
    takesInt8 = options.quantization == .int8 || (keepsStored && options.dtype == nil)
    let outputLayer = options.effectiveOutputLayer
    outputFormat = outputLayer == .int8 ? .int8PerChannel : .dense(dtype)
    keepsStoredOutput = keepsStored && outputLayer != .dense
    takesInt8Output = outputLayer == .int8 || (outputLayer == .auto && takesInt8)
    self.progress = progress
    total = store.byteCount > 0 ? store.byteCount : expectedBytes
  }

  /// Where one matrix of a fused weight comes from: name and number of outputs.
  public typealias Part = (name: String, outputs: Int)

  /// Loads matrices [outputs, inputs] with equal inputs and packs them as one; this rank's share of each one's outputs.
  public func columnParallel(
    _ parts: [Part], inputs: Int, rank: Int, ranks: Int
  ) throws(EngineError) -> any LinearWeight {
    if let weight = try stored(parts, inputs: inputs, rank: rank, ranks: ranks) { return weight }
    func share(_ part: Part, _ source: WeightSource) -> WeightSource {
      var source = source
      let rows = ParallelLayout.share(of: part.outputs, rank: rank, ranks: ranks)
      source.address += rows.lowerBound * inputs * source.dtype.byteCount
      source.scales = source.scales.map { $0 + rows.lowerBound }
      source.rows = rows.count
      return source
    }
    if takesInt8, let sources = try int8(parts, inputs: inputs) {
      return try pack(zip(parts, sources).map { share($0, $1) }, format: .int8PerChannel)
    }
    var sources: [WeightSource] = []
    for part in parts {
      sources.append(
        share(part, try store.load(part.name + ".weight", shape: [part.outputs, inputs], role: .matrix)))
    }
    return try pack(sources, format: layerFormat)
  }

  /// Loads a matrix [outputs, inputs] of which this rank holds its share of the inputs; the ranks' results add up.
  public func rowParallel(_ part: Part, inputs: Int, rank: Int, ranks: Int) throws(EngineError) -> any LinearWeight {
    if ranks == 1, let weight = try stored([part], inputs: inputs, rank: 0, ranks: 1) { return weight }
    let integers = takesInt8 ? try int8([part], inputs: inputs)?.first : nil
    let layerFormat = integers == nil ? layerFormat : .int8PerChannel
    let source =
      if let integers { integers } else {
        try store.load(part.name + ".weight", shape: [part.outputs, inputs], role: .matrix)
      }
    if ranks == 1 { return try pack([source], format: layerFormat) }
    let columns = ParallelLayout.share(of: inputs, rank: rank, ranks: ranks)
    let width = source.dtype.byteCount
    let share = try backend.allocate(rows: part.outputs, columns: columns.count, dtype: source.dtype)
    for row in 0..<part.outputs {
      memcpy(
        share.pointer + row * columns.count * width,
        source.address + (row * inputs + columns.lowerBound) * width, columns.count * width)
    }
    // Scales lie in the memory of the source, which lives until packing is done.
    return try withExtendedLifetime(source) { () throws(EngineError) in
      try pack(
        [
          WeightSource(
            address: share.pointer, dtype: source.dtype, rows: part.outputs, columns: columns.count,
            scales: source.scales, owner: share.memory)
        ], format: layerFormat)
    }
  }

  /// Loads a matrix that every rank holds whole: as it is stored, or in the dense format.
  public func replicated(_ part: Part, inputs: Int) throws(EngineError) -> any LinearWeight {
    if let weight = try stored([part], inputs: inputs, rank: 0, ranks: 1) { return weight }
    return try pack(
      [try store.load(part.name + ".weight", shape: [part.outputs, inputs], role: .matrix)], format: .dense(dtype))
  }

  /// Loads an output layer of its own, [vocabulary, hidden], in the format that the options say.
  func outputLayer(_ part: Part, inputs: Int) throws(EngineError) -> any LinearWeight {
    if keepsStoredOutput, let weight = try stored([part], inputs: inputs, rank: 0, ranks: 1) { return weight }
    if takesInt8Output, let sources = try int8([part], inputs: inputs) {
      return try pack(sources, format: .int8PerChannel)
    }
    return try pack(
      [try store.load(part.name + ".weight", shape: [part.outputs, inputs], role: .matrix)], format: outputFormat)
  }

  /// Packs an output layer that is the embedding table, in the format that the options say.
  /// - Parameters:
  ///   - part: the table's name and rows.
  ///   - table: the table where it has been loaded as plain numbers.
  func tiedOutputLayer(_ part: Part, inputs: Int, table: Tensor?) throws(EngineError) -> any LinearWeight {
    if keepsStoredOutput, let weight = try stored([part], inputs: inputs, rank: 0, ranks: 1, isReported: false) {
      return weight
    }
    if takesInt8Output, let sources = try int8([part], inputs: inputs) {
      return try pack(sources, format: .int8PerChannel, isReported: false)
    }
    let table = if let table { table } else { try embedding(part.name, rows: part.outputs, columns: inputs) }
    return try pack(
      [
        WeightSource(
          address: table.pointer, dtype: table.dtype, rows: table.rows, columns: table.columns, owner: table.memory)
      ], format: outputFormat, isReported: false)
  }

  /// Loads biases side by side as one float32 row; this rank's share of each.
  public func bias(_ parts: [Part], rank: Int, ranks: Int) throws(EngineError) -> Tensor {
    let shares = parts.map { ParallelLayout.share(of: $0.outputs, rank: rank, ranks: ranks) }
    let row = try backend.allocate(rows: 1, columns: shares.reduce(0) { $0 + $1.count }, dtype: .float32)
    var column = 0
    for (part, share) in zip(parts, shares) {
      let source = try store.load(part.name + ".bias", shape: [part.outputs], role: .bias)
      widen(source, share, to: row.float32 + column)
      column += share.count
      report(source)
    }
    return row
  }

  /// Loads a norm's weight as one float32 row.
  public func norm(_ name: String, count: Int) throws(EngineError) -> Tensor {
    let source = try store.load(name + ".weight", shape: [count], role: .norm)
    let row = try backend.allocate(rows: 1, columns: count, dtype: .float32)
    widen(source, 0..<count, to: row.float32)
    report(source)
    return row
  }

  /// Loads a table of embeddings in the checkpoint's own format. The table stays in the mapped file where its address
  /// allows that.
  public func embedding(_ name: String, rows: Int, columns: Int) throws(EngineError) -> Tensor {
    let source = try store.load(name + ".weight", shape: [rows, columns], role: .matrix)
    report(source)
    let byteCount = rows * columns * source.dtype.byteCount
    if Int(bitPattern: source.address) % source.dtype.byteCount == 0 {
      let owner = source.owner
      let memory = DeviceMemory(
        address: UnsafeMutableRawPointer(mutating: source.address), byteCount: byteCount,
        release: { [retained = Retained(object: owner)] _, _ in withExtendedLifetime(retained) {} })
      return Tensor(memory: memory, dtype: source.dtype, rows: rows, columns: columns)
    }
    let table = try backend.allocate(rows: rows, columns: columns, dtype: source.dtype)
    memcpy(table.pointer, source.address, byteCount)
    return table
  }

  /// What reads rows of an embedding table that is stored quantised; `nil` for other tables and where all weights are to
  /// become plain numbers.
  public func embeddingReader(
    _ name: String, rows: Int, columns: Int
  ) throws(EngineError) -> (@Sendable (_ row: Int, _ target: UnsafeMutablePointer<Float>) -> Void)? {
    guard keepsStored, let reader = try store.rowReader(name + ".weight", shape: [rows, columns]) else { return nil }
    report(bytes: rows * columns * 4)
    return reader
  }

  /// What writes tokens' embeddings, and the table itself where it is plain numbers.
  func embeddingFunction(
    _ name: String, rows: Int, columns: Int
  ) throws(EngineError) -> (
    embed: @Sendable (_ tokens: UnsafePointer<TokenID>, _ count: Int, _ out: Tensor) -> Void, table: Tensor?
  ) {
    if let read = try embeddingReader(name, rows: rows, columns: columns) {
      return (
        { tokens, count, out in for row in 0..<count { read(Int(tokens[row]), out.float32 + row * out.stride) } }, nil
      )
    }
    let table = try embedding(name, rows: rows, columns: columns)
    let backend = backend
    return ({ tokens, count, out in backend.embed(table: table, tokens: tokens, count: count, out: out) }, table)
  }

  /// The integers and scales of matrices that the checkpoint stores in the engine's int8 format; `nil` unless all are.
  private func int8(_ parts: [Part], inputs: Int) throws(EngineError) -> [WeightSource]? {
    var sources: [WeightSource] = []
    for part in parts {
      guard let source = try store.loadInt8(part.name + ".weight", shape: [part.outputs, inputs]) else { return nil }
      sources.append(source)
    }
    return sources
  }

  /// Loads a router's matrix, [experts, hidden], in float32.
  func router(_ name: String, experts: Int, hidden: Int) throws(EngineError) -> any LinearWeight {
    try pack(
      [try store.load(name + ".weight", shape: [experts, hidden], role: .matrix)], format: .dense(.float32))
  }

  /// Loads a vector by its whole name as one float32 row.
  func vector(_ name: String, count: Int) throws(EngineError) -> Tensor {
    let source = try store.load(name, shape: [count], role: .bias)
    let row = try backend.allocate(rows: 1, columns: count, dtype: .float32)
    widen(source, 0..<count, to: row.float32)
    report(source)
    return row
  }

  /// Loads a matrix [outputs, inputs] of those that a checkpoint stores one behind the other as a tensor
  /// [count, outputs, inputs].
  func stacked(
    _ name: String, index: Int, of count: Int, outputs: Int, inputs: Int
  ) throws(EngineError) -> any LinearWeight {
    var source = try store.load(name, shape: [count, outputs, inputs], role: .matrix)
    source.address += index * outputs * inputs * source.dtype.byteCount
    (source.rows, source.columns) = (outputs, inputs)
    return try pack([source], format: layerFormat)
  }

  /// One row of a stored matrix of plain numbers.
  func matrix(_ name: String, rows: Int, columns: Int, row: Int) throws(EngineError) -> [Float] {
    var source = try store.load(name, shape: [rows, columns], role: .bias)
    source.address += row * columns * source.dtype.byteCount
    source.rows = 1
    report(source)
    return [Float](unsafeUninitializedCapacity: columns) { buffer, count in
      widen(source, 0..<columns, to: buffer.baseAddress!)
      count = columns
    }
  }

  /// Packs a matrix of plain numbers in the format of linear layers.
  func packLayer(_ source: WeightSource) throws(EngineError) -> any LinearWeight {
    try pack([source], format: layerFormat)
  }

  /// Packs a matrix that is stored as codes: as they are, or as the numbers that they stand for.
  func packCodes(_ source: QuantizedSource) throws(EngineError) -> any LinearWeight {
    if keepsStored {
      let weight = try packed([source])
      packedBytes += weight.byteCount
      if firstFormat == nil { firstFormat = weight.format }
      report(bytes: source.storedBytes)
      return weight
    }
    let numbers = try backend.allocate(rows: source.rows, columns: source.columns, dtype: .float32)
    for row in 0..<source.rows {
      let values = source.dequantize(row..<row + 1)
      (numbers.float32 + row * source.columns).update(from: values, count: values.count)
    }
    return try packLayer(
      WeightSource(
        address: UnsafeRawPointer(numbers.pointer), dtype: .float32, rows: source.rows, columns: source.columns,
        owner: numbers.memory))
  }

  /// Packs a matrix of plain numbers in the dense format.
  func packPlain(_ source: WeightSource) throws(EngineError) -> any LinearWeight {
    try pack([source], format: .dense(dtype))
  }

  private func pack(
    _ sources: [WeightSource], format: WeightFormat, isReported: Bool = true
  ) throws(EngineError) -> any LinearWeight {
    let outputs = sources.reduce(0) { $0 + $1.rows }
    let weight = try packed(outputs: outputs, inputs: sources[0].columns) { () throws(EngineError) in
      let weight = try backend.packLinear(sources, format: format)
      let isCoarse = format == .int8PerChannel && backend.int8Error(weight, sources) > Self.int8ErrorBound
      return isCoarse ? try backend.packLinear(sources, format: .codes(.int8)) : weight
    }
    if weight.format != format { regroupedLayers += 1 }
    packedBytes += weight.byteCount
    if firstFormat == nil { firstFormat = weight.format }
    if isReported { for source in sources { report(source) } }
    return weight
  }

  private func packed(_ sources: [QuantizedSource]) throws(EngineError) -> any LinearWeight {
    let outputs = sources.reduce(0) { $0 + $1.rows }
    return try packed(outputs: outputs, inputs: sources[0].columns) { () throws(EngineError) in
      try backend.packLinear(sources)
    }
  }

  /// The next weight of the cache, or one that is packed now and put there.
  private func packed(
    outputs: Int, inputs: Int, _ pack: () throws(EngineError) -> any LinearWeight
  ) throws(EngineError) -> any LinearWeight {
    if let weight = cache?.next(outputs: outputs, inputs: inputs) { return weight }
    let weight = try pack()
    cache?.add(weight)
    return weight
  }

  /// Packs matrices as they are stored, each one this rank's share of its outputs.
  /// - Returns: `nil` if none of them is stored quantised, or if plain numbers are asked for.
  private func stored(
    _ parts: [Part], inputs: Int, rank: Int, ranks: Int, isReported: Bool = true
  ) throws(EngineError) -> (any LinearWeight)? {
    guard keepsStored else { return nil }
    var quantized: [QuantizedSource?] = []
    for part in parts {
      let source = try store.quantized(part.name + ".weight", shape: [part.outputs, inputs])
      quantized.append(source?.rows(ParallelLayout.share(of: part.outputs, rank: rank, ranks: ranks)))
    }
    guard quantized.contains(where: { $0 != nil }) else { return nil }
    // Neighbours of one layout are packed as one weight.
    var weights: [any LinearWeight] = []
    var run: [QuantizedSource] = []
    func finishRun() throws(EngineError) {
      if !run.isEmpty { weights.append(try packed(run)) }
      run = []
    }
    for (part, source) in zip(parts, quantized) {
      if let source {
        if let last = run.last, !last.matches(source) { try finishRun() }
        run.append(source)
        if isReported { report(bytes: source.rows * source.columns * 4) }
      } else {
        try finishRun()
        var plain = try store.load(part.name + ".weight", shape: [part.outputs, inputs], role: .matrix)
        let rows = ParallelLayout.share(of: part.outputs, rank: rank, ranks: ranks)
        plain.address += rows.lowerBound * inputs * plain.dtype.byteCount
        plain.rows = rows.count
        weights.append(
          try packed(outputs: rows.count, inputs: inputs) { () throws(EngineError) in
            try backend.packLinear([plain], format: .dense(dtype))
          })
        report(plain)
      }
    }
    try finishRun()
    let weight = backend.joinLinear(weights)
    packedBytes += weight.byteCount
    if firstFormat == nil { firstFormat = weight.format }
    return weight
  }

  private func report(_ source: WeightSource) {
    report(bytes: source.rows * source.columns * source.dtype.byteCount)
  }

  private func report(bytes: Int) {
    done += bytes
    progress?(min(done, total), total)
  }

  /// Converts a range of a vector to float32.
  private func widen(_ source: WeightSource, _ range: Range<Int>, to target: UnsafeMutablePointer<Float>) {
    for (offset, index) in range.enumerated() {
      switch source.dtype {
      case .bfloat16:
        let bits = source.address.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self)
        target[offset] = Float(bitPattern: UInt32(bits) << 16)
      case .float16:
        let bits = source.address.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self)
        target[offset] = Float(Float16(bitPattern: bits))
      default:
        target[offset] = source.address.loadUnaligned(fromByteOffset: 4 * index, as: Float.self)
      }
    }
  }
}

/// Carries the owner of read-only memory into a closure that may run on any thread.
private struct Retained: @unchecked Sendable {
  // Unchecked: the object is only kept alive, never used.
  let object: AnyObject
}
