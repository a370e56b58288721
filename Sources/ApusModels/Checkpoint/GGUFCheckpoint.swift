public import ApusCore
public import ApusTensors
import Glibc

/// The weights of a GGUF model under their Hugging Face names, with the conventions of the format undone.
///
/// F32, F16 and BF16 tensors are read in place. Quantised ones can be had as they are (`quantized`, and `rowReader` for
/// the embedding table), or are turned into float32 as they are asked for, one tensor at a time, and packed from there: in
/// bfloat16 unless another format is asked for. The embedding table is rounded to that format at once then. For `llama`, whose converter orders the rows of q and k for rotation
/// of neighbouring pairs, rows are put back into the half-split order.
public final class GGUFCheckpoint: WeightStore {
  public let origin: String
  public let byteCount: Int
  /// What the metadata says of the model.
  public let configuration: ModelConfiguration
  /// End-of-sequence tokens and what else `generation_config.json` would say.
  public let generation: GenerationConfiguration
  package let files: GGUFModelFiles
  /// GGUF name of each weight by its Hugging Face name.
  let names: [String: String]
  private let tableType: DType
  private let worker: CPUBackend?

  public var mappedFiles: [MappedFile] { files.files }

  /// Maps files and checks that they hold a model that can be served.
  /// - Parameters:
  ///   - paths: the file, or all parts of a split model in order (see `GGUFFiles.find`).
  ///   - dtype: the format of a quantised embedding table; `nil` for bfloat16.
  ///   - worker: turns blocks into numbers on its threads.
  ///   - readsAhead: whether the kernel is asked for the files at once.
  /// - Throws: `invalidCheckpoint` or `unsupported`.
  public convenience init(
    paths: [String], dtype: DType? = nil, worker: CPUBackend? = nil, readsAhead: Bool = true
  ) throws(EngineError) {
    try self.init(GGUFModelFiles(paths: paths), dtype: dtype, worker: worker, readsAhead: readsAhead)
  }

  init(
    _ files: GGUFModelFiles, dtype: DType? = nil, worker: CPUBackend? = nil, readsAhead: Bool = true
  ) throws(EngineError) {
    let metadata = GGUFMetadata(files)
    configuration = try metadata.configuration()
    generation = try metadata.generation(vocabularySize: configuration.vocabularySize)
    let names = try metadata.weightNames(layerCount: configuration.layerCount, experts: configuration.experts)
    var byteCount = 0
    for name in Set(names.values) {
      guard let tensor = files.tensor(name)?.tensor else { continue }
      guard let type = GGUFWeightType(rawValue: tensor.typeID) else {
        throw EngineError(
          .unsupported,
          "\(files.path): tensor \(name) has type \(tensor.typeName), which is not implemented; take a file whose "
            + "tensors are of \(Self.typeNames).")
      }
      let width = type == .f16 || type == .bf16 ? 2 : 4
      byteCount += tensor.dimensions.reduce(1, *) * width
    }
    if readsAhead { for file in files.files { file.readAhead() } }
    origin = files.path
    self.byteCount = byteCount
    self.files = files
    self.names = names
    tableType = dtype ?? .bfloat16
    self.worker = worker
  }

  /// The types that can be read, for messages.
  static var typeNames: String {
    GGUFWeightType.allCases.compactMap { GGUFHeader.tensorTypes[$0.rawValue]?.name }.joined(separator: ", ")
  }

  public func contains(_ name: String) -> Bool { names[name] != nil }

  public func dtype(of name: String) -> DType? {
    guard let own = names[name], let tensor = files.tensor(own)?.tensor,
      let type = GGUFWeightType(rawValue: tensor.typeID)
    else { return nil }
    return switch type {
    case .f32: .float32
    case .f16: .float16
    default: .bfloat16
    }
  }

  public func load(_ name: String, shape: [Int], role: WeightRole) throws(EngineError) -> WeightSource {
    guard let own = names[name], let (tensor, file) = files.tensor(own), let bytes = files.bytes(own),
      let type = GGUFWeightType(rawValue: tensor.typeID)
    else {
      throw EngineError(
        .invalidCheckpoint, "\(origin): the tensor for \(name) is missing; expected one of shape \(shape).")
    }
    let expert = expert(of: name, in: own)
    // A matrix with one output may be stored as a vector.
    let isVector = shape.count == 2 && shape[0] == 1 && tensor.dimensions == [shape[1]]
    guard tensor.dimensions.reversed() == stored(shape, expert) || isVector else {
      throw EngineError(
        .invalidCheckpoint,
        "\(file.path): tensor \(own) has dimensions \(tensor.dimensions), but the metadata asks for "
          + "\(Array(stored(shape, expert).reversed())).")
    }
    let rows = shape.count == 1 ? 1 : shape[0]
    let columns = shape.last!
    let heads = rotatedHeads(name)
    let dense: DType? =
      switch type {
      case .f32: .float32
      case .f16: .float16
      case .bf16: .bfloat16
      default: nil
      }
    guard shape.count > 1 || dense != nil else {
      throw EngineError(
        .unsupported,
        "\(file.path): tensor \(own) is a vector of type \(tensor.typeName); F32, F16 and BF16 can be read.")
    }
    let address = bytes.baseAddress! + (expert ?? 0) * rows * (columns / type.blockLength * type.blockBytes)
    if let dense, heads == 0 {
      return WeightSource(address: address, dtype: dense, rows: rows, columns: columns, owner: file)
    }
    let target = dense ?? (name == "model.embed_tokens.weight" ? tableType : .float32)
    let memory = try CPUBackend.hostMemory(byteCount: rows * columns * target.byteCount)
    // A bias is a column of as many rows as it has numbers.
    let (units, width) = shape.count == 1 && heads > 0 ? (columns, 1) : (rows, columns)
    let copy = RowCopy(
      source: address, type: type, target: memory.address, targetType: target, rows: units, columns: width,
      headLength: heads > 0 ? units / heads : 0)
    let rowsPerChunk = max(1, (1 << 16) / width)
    let chunks = (units + rowsPerChunk - 1) / rowsPerChunk
    if let worker, chunks > 1 {
      worker.parallel(chunks: chunks) { copy.run($0 * rowsPerChunk..<min(units, ($0 + 1) * rowsPerChunk)) }
    } else {
      copy.run(0..<units)
    }
    return WeightSource(
      address: UnsafeRawPointer(memory.address), dtype: target, rows: rows, columns: columns, owner: memory)
  }

  /// A matrix with the file's own blocks taken apart; `nil` for one of plain numbers.
  public func quantized(_ name: String, shape: [Int]) throws(EngineError) -> QuantizedSource? {
    guard shape.count == 2, let own = names[name], let (tensor, file) = files.tensor(own),
      let bytes = files.bytes(own), let type = GGUFWeightType(rawValue: tensor.typeID), let layout = type.codeLayout
    else { return nil }
    let expert = expert(of: name, in: own)
    guard tensor.dimensions.reversed() == stored(shape, expert) else { return nil }
    let heads = rotatedHeads(name)
    let byteCount = shape[0] * (shape[1] / type.blockLength * type.blockBytes)
    let copy = RowCopy(
      source: bytes.baseAddress! + (expert ?? 0) * byteCount, type: type,
      target: UnsafeMutableRawPointer(mutating: bytes.baseAddress!), targetType: .float32, rows: shape[0],
      columns: shape[1], headLength: heads > 0 ? shape[0] / heads : 0)
    return QuantizedSource(layout: layout, rows: shape[0], columns: shape[1], storedBytes: byteCount) {
      copy.unpack($0, layout: layout, into: $1)
      withExtendedLifetime(file) {}
    }
  }

  public func rowReader(
    _ name: String, shape: [Int]
  ) throws(EngineError) -> (@Sendable (_ row: Int, _ target: UnsafeMutablePointer<Float>) -> Void)? {
    guard shape.count == 2, let own = names[name], let (tensor, file) = files.tensor(own),
      let bytes = files.bytes(own), let type = GGUFWeightType(rawValue: tensor.typeID), type.codeLayout != nil,
      tensor.dimensions.reversed() == shape, rotatedHeads(name) == 0
    else { return nil }
    let copy = RowCopy(
      source: bytes.baseAddress!, type: type, target: UnsafeMutableRawPointer(mutating: bytes.baseAddress!),
      targetType: .float32, rows: shape[0], columns: shape[1], headLength: 0)
    return { row, target in
      copy.type.dequantize(
        copy.source + row * (copy.columns / copy.type.blockLength * copy.type.blockBytes), count: copy.columns,
        to: target)
      withExtendedLifetime(file) {}
    }
  }

  /// The number of a weight's expert within a tensor that holds all experts of a layer; `nil` for other tensors.
  private func expert(of name: String, in own: String) -> Int? {
    guard own.hasSuffix("_exps.weight") else { return nil }
    let parts = name.split(separator: ".")
    return parts.firstIndex(of: "experts").flatMap { Int(parts[$0 + 1]) }
  }

  /// The shape of the tensor that holds a weight.
  private func stored(_ shape: [Int], _ expert: Int?) -> [Int] {
    expert == nil ? shape : [configuration.experts?.expertCount ?? 0] + shape
  }

  /// The number of heads whose rows were reordered, or 0.
  private func rotatedHeads(_ name: String) -> Int {
    guard files.metadata["general.architecture"]?.stringValue == "llama" else { return 0 }
    if name.hasSuffix(".self_attn.q_proj.weight") || name.hasSuffix(".self_attn.q_proj.bias") {
      return configuration.queryHeads
    }
    if name.hasSuffix(".self_attn.k_proj.weight") || name.hasSuffix(".self_attn.k_proj.bias") {
      return configuration.kvHeads
    }
    return 0
  }
}

/// Turns rows of a tensor into rows of a weight.
private struct RowCopy: @unchecked Sendable {
  // Unchecked: each row of the target is written by one thread, the source is only read.
  let source: UnsafeRawPointer
  let type: GGUFWeightType
  let target: UnsafeMutableRawPointer
  let targetType: DType
  let rows: Int
  let columns: Int
  /// Rows of a head whose order is undone; 0 for none.
  let headLength: Int

  func run(_ range: Range<Int>) {
    let rowBytes = columns / type.blockLength * type.blockBytes
    let targetBytes = columns * targetType.byteCount
    let isCopy = type.blockLength == 1 && type.blockBytes == targetType.byteCount
    withUnsafeTemporaryAllocation(of: Float.self, capacity: isCopy ? 1 : columns) { scratch in
      for row in range {
        let from = source + sourceRow(row) * rowBytes
        let to = target + row * targetBytes
        if isCopy {
          memcpy(to, from, rowBytes)
        } else if targetType == .float32 {
          type.dequantize(from, count: columns, to: to.assumingMemoryBound(to: Float.self))
        } else {
          type.dequantize(from, count: columns, to: scratch.baseAddress!)
          let numbers = to.assumingMemoryBound(to: UInt16.self)
          if targetType == .bfloat16 {
            for index in 0..<columns {
              // Round to nearest, ties to even; a scale of a broken file may be no number.
              let bits = scratch[index].bitPattern
              numbers[index] =
                scratch[index].isNaN
                ? 0x7FC0 : UInt16(truncatingIfNeeded: (bits &+ 0x7FFF &+ (bits >> 16 & 1)) >> 16)
            }
          } else {
            for index in 0..<columns { numbers[index] = Float16(scratch[index]).bitPattern }
          }
        }
      }
    }
  }

  /// Takes the blocks of some rows apart.
  func unpack(_ range: Range<Int>, layout: CodeLayout, into rows: CodeRows) {
    let rowBytes = columns / type.blockLength * type.blockBytes
    for (i, row) in range.enumerated() {
      type.unpack(
        source + sourceRow(row) * rowBytes, count: columns,
        into: rows.advanced(rows: i, layout: layout, inputs: columns))
    }
  }

  /// Where a row of the weight lies in the tensor: rows i and i + length / 2 of a head are neighbours there.
  private func sourceRow(_ row: Int) -> Int {
    guard headLength > 0 else { return row }
    let (head, place) = row.quotientAndRemainder(dividingBy: headLength)
    let half = headLength / 2
    return head * headLength + place % half * 2 + place / half
  }
}
