import ApusCore
import ApusModels
import ApusTensors

/// The rows of a tensor, turned into float32 one at a time.
struct RowSource: @unchecked Sendable {
  // Unchecked: the memory is read-only and `owner` keeps it alive.
  let address: UnsafeRawPointer
  let type: GGUFWeightType
  let rows: Int
  let columns: Int
  let owner: AnyObject
  /// Rows of a head whose halves are interleaved, as GGUF's `llama` wants them; 0 for none.
  var interleavedHead = 0

  var rowBytes: Int { columns / type.blockLength * type.blockBytes }

  /// The row of the source that becomes row `row`.
  @inline(__always)
  func place(_ row: Int) -> Int {
    guard interleavedHead > 0 else { return row }
    let (head, place) = row.quotientAndRemainder(dividingBy: interleavedHead)
    return head * interleavedHead + place % 2 * (interleavedHead / 2) + place / 2
  }

  func read(_ row: Int, to target: UnsafeMutablePointer<Float>) {
    type.dequantize(address + place(row) * rowBytes, count: columns, to: target)
  }
}

/// A tensor that is to be converted.
struct SourceTensor: Sendable {
  /// Its name in the checkpoint, or the Hugging Face name of what it stands for.
  var name: String
  var shape: [Int]
  var storedAs: String
  /// The type of its numbers; `nil` where they can only be copied.
  var type: GGUFWeightType?
  /// Whether `type` is what a quantised tensor is read as, not what is stored.
  var isQuantized = false

  var count: Int { shape.reduce(1, *) }
  /// Numbers in a row, and rows.
  var columns: Int { shape.last ?? 1 }
  var rows: Int { shape.isEmpty ? 1 : shape.dropLast().reduce(1, *) }
}

extension DType {
  var weightType: GGUFWeightType {
    switch self {
    case .float16: .f16
    case .bfloat16: .bf16
    default: .f32
    }
  }
}

extension GGUFWeightType {
  /// The name of the type in safetensors files.
  var safetensorsName: String {
    switch self {
    case .f16: "F16"
    case .bf16: "BF16"
    default: "F32"
    }
  }
  var dtype: DType? {
    switch self {
    case .f32: .float32
    case .f16: .float16
    case .bf16: .bfloat16
    default: nil
    }
  }
  init?(typeName: String) {
    guard let match = Self.allCases.first(where: { $0.name == typeName }) else { return nil }
    self = match
  }
}

/// A checkpoint as a list of tensors.
protocol ConversionSource: Sendable {
  /// The file or directory, for messages.
  var path: String { get }
  var tensors: [SourceTensor] { get }
  /// The bytes of a tensor as they are stored.
  func bytes(_ tensor: SourceTensor) -> (UnsafeRawBufferPointer, AnyObject)?
  /// The rows of a tensor of numbers.
  func rows(_ tensor: SourceTensor) throws(EngineError) -> RowSource
}

/// A Hugging Face directory, quantised or not.
struct DirectorySource: ConversionSource {
  let path: String
  let tensors: [SourceTensor]
  let config: JSONObject
  /// `nil` where the class is not implemented: such a checkpoint can be cast and rounded, but not become a GGUF file.
  let configuration: ModelConfiguration?
  /// Why `configuration` is missing.
  let configurationError: EngineError?
  let quantizationMethod: String?
  private let plain: SafetensorsCheckpoint
  private let quantized: QuantizedCheckpoint?

  init(path: String, worker: CPUBackend) throws(EngineError) {
    self.path = path
    let configPath = path + "/config.json"
    guard let bytes = try readSmallFile(configPath) else {
      throw EngineError(
        .invalidCheckpoint, "\(configPath) does not exist; \(path) is not a Hugging Face checkpoint directory.")
    }
    let json: JSONValue
    do { json = try JSONValue.parse(bytes) } catch {
      throw EngineError(.invalidCheckpoint, "\(configPath): \(error).")
    }
    guard let config = json.objectValue else {
      throw EngineError(.invalidCheckpoint, "\(configPath): expected an object, found \(json.kindName).")
    }
    self.config = config
    let quantization = try ModelConfiguration.quantization(directory: path, json: json)
    do throws(EngineError) {
      configuration = try ModelConfiguration(directory: path)
      configurationError = nil
    } catch {
      configuration = nil
      configurationError = error
    }
    plain = try SafetensorsCheckpoint(directory: path)
    let listing: [ListedTensor]
    if let quantization {
      let checkpoint = QuantizedCheckpoint(plain, quantization, helper: worker)
      listing = try checkpoint.listing()
      quantized = checkpoint
      quantizationMethod = quantization.method
    } else {
      listing = plain.listing
      quantized = nil
      quantizationMethod = nil
    }
    tensors = listing.map { tensor in
      let dense = GGUFWeightType(typeName: tensor.storedAs).flatMap { $0.dtype == nil ? nil : $0 }
      return SourceTensor(
        name: tensor.name, shape: tensor.shape, storedAs: tensor.storedAs,
        type: tensor.isNumeric ? dense ?? .f32 : nil, isQuantized: tensor.isNumeric && dense == nil)
    }
  }

  func bytes(_ tensor: SourceTensor) -> (UnsafeRawBufferPointer, AnyObject)? {
    plain.stored(tensor.name).map { ($0.bytes, $0.owner) }
  }

  func rows(_ tensor: SourceTensor) throws(EngineError) -> RowSource {
    if tensor.isQuantized, let quantized {
      let source = try quantized.load(tensor.name, shape: tensor.shape, role: .matrix)
      return RowSource(
        address: source.address, type: source.dtype.weightType, rows: tensor.rows, columns: tensor.columns,
        owner: source.owner)
    }
    guard let (bytes, owner) = bytes(tensor), let type = tensor.type else {
      throw EngineError(.internalFailure, "\(path): tensor \(tensor.name) has no numbers.")
    }
    // A tensor without numbers has no address.
    return RowSource(
      address: bytes.baseAddress ?? UnsafeRawPointer(bitPattern: 1)!, type: type, rows: tensor.rows,
      columns: tensor.columns, owner: owner)
  }
}

/// A GGUF model under Hugging Face names, in the order of rows that Hugging Face has.
struct GGUFWeightSource: ConversionSource {
  let path: String
  let tensors: [SourceTensor]
  let checkpoint: GGUFCheckpoint

  init(paths: [String], worker: CPUBackend) throws(EngineError) {
    path = paths[0]
    checkpoint = try GGUFCheckpoint(paths: paths, dtype: .float32, worker: worker)
    tensors = checkpoint.listing.map { tensor in
      let stored = GGUFWeightType(typeName: tensor.storedAs)
      let dense = stored?.dtype == nil ? nil : stored
      return SourceTensor(
        name: tensor.name, shape: tensor.shape, storedAs: tensor.storedAs, type: dense ?? .f32,
        isQuantized: dense == nil)
    }
  }

  func bytes(_ tensor: SourceTensor) -> (UnsafeRawBufferPointer, AnyObject)? { nil }

  func rows(_ tensor: SourceTensor) throws(EngineError) -> RowSource {
    let source = try checkpoint.load(tensor.name, shape: tensor.shape, role: .matrix)
    return RowSource(
      address: source.address, type: source.dtype.weightType, rows: tensor.rows, columns: tensor.columns,
      owner: source.owner)
  }
}

/// The tensors of a GGUF model as they are, for another GGUF file.
struct GGUFTensorSource: ConversionSource {
  let path: String
  let tensors: [SourceTensor]
  let files: GGUFModelFiles

  init(paths: [String]) throws(EngineError) {
    path = paths[0]
    let files = try GGUFModelFiles(paths: paths)
    self.files = files
    tensors = files.tensors.map { tensor in
      let type = GGUFWeightType(rawValue: tensor.typeID)
      return SourceTensor(
        name: tensor.name, shape: tensor.dimensions.reversed(), storedAs: tensor.typeName, type: type,
        isQuantized: type != nil && type?.dtype == nil)
    }
  }

  func bytes(_ tensor: SourceTensor) -> (UnsafeRawBufferPointer, AnyObject)? {
    guard let bytes = files.bytes(tensor.name), let file = files.tensor(tensor.name)?.file else { return nil }
    return (bytes, file)
  }

  func rows(_ tensor: SourceTensor) throws(EngineError) -> RowSource {
    guard let (bytes, owner) = bytes(tensor), let type = tensor.type, let address = bytes.baseAddress else {
      throw EngineError(
        .unsupported,
        "\(path): tensor \(tensor.name) has type \(tensor.storedAs), whose numbers cannot be read; take a file of "
          + "another type.")
    }
    return RowSource(address: address, type: type, rows: tensor.rows, columns: tensor.columns, owner: owner)
  }
}
