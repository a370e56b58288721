public import ApusCore
public import ApusTensors
import Glibc

/// What a weight is for, which decides how `DummyWeights` draws it.
public enum WeightRole: Sendable { case matrix, bias, norm }

/// Where a model's weights come from, by their names in the checkpoint.
public protocol WeightStore: Sendable {
  /// Where the weights are, for messages.
  var origin: String { get }
  /// Bytes of all weights, or 0 if unknown; the total of progress reports.
  var byteCount: Int { get }
  /// Whether a weight of that name exists.
  func contains(_ name: String) -> Bool
  /// The number format of a weight that exists; `nil` if there is none or its type is no weight type.
  func dtype(of name: String) -> DType?
  /// A weight's numbers. A vector of n numbers is asked for with shape [n] and described as one row.
  /// - Throws: `invalidCheckpoint` naming the file, the weight, and what was expected and found.
  func load(_ name: String, shape: [Int], role: WeightRole) throws(EngineError) -> WeightSource
  /// A matrix as it is stored, if it is stored quantised and there are kernels for that; else `nil`.
  /// - Throws: as `load`.
  func quantized(_ name: String, shape: [Int]) throws(EngineError) -> QuantizedSource?
  /// What turns single rows of a matrix that is stored quantised into float32, for embedding tables; `nil` for others.
  func rowReader(
    _ name: String, shape: [Int]
  ) throws(EngineError) -> (@Sendable (_ row: Int, _ target: UnsafeMutablePointer<Float>) -> Void)?
  /// The integers and scales of a matrix that is stored as int8 with a scale for each output, to be multiplied with inputs
  /// rounded to int8 per token: the engine's own int8 format. `nil` for a weight that is stored otherwise.
  /// - Throws: as `load`.
  func loadInt8(_ name: String, shape: [Int]) throws(EngineError) -> WeightSource?
  /// A tensor of unsigned bytes; `nil` if there is none of that name and type.
  /// - Throws: `invalidCheckpoint` if it has another shape.
  func bytes(_ name: String, shape: [Int]) throws(EngineError) -> StoredBytes?
  /// A vector of 64-bit or 32-bit integers; `nil` if there is none of that name and type.
  /// - Throws: `invalidCheckpoint` if it has another length.
  func integers(_ name: String, count: Int) throws(EngineError) -> [Int]?
  /// The files that hold the weights; none for weights that are made up.
  var mappedFiles: [MappedFile] { get }
}

/// Bytes in a checkpoint.
public struct StoredBytes: @unchecked Sendable {
  // Unchecked: the memory is a read-only mapping that `owner` keeps alive.
  public var address: UnsafeRawPointer
  public var owner: AnyObject
}

extension WeightStore {
  public func quantized(_ name: String, shape: [Int]) throws(EngineError) -> QuantizedSource? { nil }
  public func rowReader(
    _ name: String, shape: [Int]
  ) throws(EngineError) -> (@Sendable (_ row: Int, _ target: UnsafeMutablePointer<Float>) -> Void)? { nil }
  public func loadInt8(_ name: String, shape: [Int]) throws(EngineError) -> WeightSource? { nil }
  public func bytes(_ name: String, shape: [Int]) throws(EngineError) -> StoredBytes? { nil }
  public func integers(_ name: String, count: Int) throws(EngineError) -> [Int]? { nil }
  public var mappedFiles: [MappedFile] { [] }
}

/// The safetensors files of a Hugging Face checkpoint directory: `model.safetensors`, or the shards that
/// `model.safetensors.index.json` lists.
public final class SafetensorsCheckpoint: WeightStore {
  public let origin: String
  public let byteCount: Int
  private let files: [SafetensorsFile]
  private let locations: [String: Int]

  public var mappedFiles: [MappedFile] { files.map(\.file) }

  /// Maps the files of a directory and checks their headers.
  /// - Parameter readsAhead: whether the kernel is asked for the files at once.
  /// - Throws: `invalidCheckpoint`.
  public init(directory: String, readsAhead: Bool = true) throws(EngineError) {
    var files: [SafetensorsFile] = []
    var locations: [String: Int] = [:]
    let indexPath = directory + "/model.safetensors.index.json"
    if let index = try readSmallFile(indexPath) {
      let shards = try Self.parseIndex(index, path: indexPath)
      for name in Set(shards.values).sorted() {
        let file = try SafetensorsFile(path: directory + "/" + name)
        for tensor in file.entries.keys where shards[tensor] == name { locations[tensor] = files.count }
        files.append(file)
      }
      for (tensor, name) in shards.sorted(by: { $0.key < $1.key }) where locations[tensor] == nil {
        throw EngineError(
          .invalidCheckpoint, "\(indexPath) says that tensor \(tensor) is in \(name), but that file does not hold it.")
      }
    } else {
      let path = directory + "/model.safetensors"
      guard access(path, F_OK) == 0 else {
        throw EngineError(
          .invalidCheckpoint,
          "\(directory) holds neither model.safetensors nor model.safetensors.index.json; weights can be read from "
            + "safetensors files only.")
      }
      let file = try SafetensorsFile(path: path)
      for tensor in file.entries.keys { locations[tensor] = 0 }
      files.append(file)
    }
    if readsAhead { for file in files { file.file.readAhead() } }
    self.origin = files.count == 1 ? files[0].file.path : directory
    self.byteCount = files.reduce(0) { $0 + $1.file.bytes.count }
    self.files = files
    self.locations = locations
  }

  private static func parseIndex(_ bytes: [UInt8], path: String) throws(EngineError) -> [String: String] {
    func broken(_ sentence: String) -> EngineError { EngineError(.invalidCheckpoint, "\(path): \(sentence).") }
    let index: JSONValue
    do { index = try JSONValue.parse(bytes) } catch { throw broken("\(error)") }
    guard let map = index["weight_map"]?.objectValue, !map.isEmpty else {
      throw broken("\"weight_map\" must be an object that names a file for each tensor")
    }
    var shards: [String: String] = [:]
    for (tensor, value) in map {
      guard let name = value.stringValue, !name.isEmpty, !name.contains("/"), !name.utf8.contains(0) else {
        throw broken("the file of tensor \(tensor) must be a plain file name, got \(value.kindName)")
      }
      shards[tensor] = name
    }
    return shards
  }

  /// How many tensors of each type there are, and their bytes.
  var typeTotals: [String: (count: Int, bytes: Int)] {
    var totals: [String: (count: Int, bytes: Int)] = [:]
    for (name, location) in locations {
      guard let entry = files[location].entries[name] else { continue }
      totals[entry.typeName, default: (0, 0)].count += 1
      totals[entry.typeName, default: (0, 0)].bytes += entry.end - entry.begin
    }
    return totals
  }

  public func contains(_ name: String) -> Bool { locations[name] != nil }

  public func dtype(of name: String) -> DType? {
    guard let location = locations[name], let entry = files[location].entries[name] else { return nil }
    return SafetensorsFile.weightTypes[entry.typeName]
  }

  /// The names of all tensors.
  var tensorNames: some Sequence<String> { locations.keys }

  /// Where a tensor of any type lies; `nil` if there is none of that name.
  func entry(_ name: String) -> (file: SafetensorsFile, entry: SafetensorsFile.Entry)? {
    guard let location = locations[name], let entry = files[location].entries[name] else { return nil }
    return (files[location], entry)
  }

  public func bytes(_ name: String, shape: [Int]) throws(EngineError) -> StoredBytes? {
    guard let (file, entry) = entry(name), entry.typeName == "U8" else { return nil }
    guard entry.shape == shape else {
      throw EngineError(
        .invalidCheckpoint,
        "\(file.file.path): tensor \(name) has shape \(entry.shape), but config.json asks for \(shape).")
    }
    return StoredBytes(address: file.bytes(of: entry).baseAddress!, owner: file)
  }

  public func integers(_ name: String, count: Int) throws(EngineError) -> [Int]? {
    guard let (file, entry) = entry(name), ["I64", "I32"].contains(entry.typeName) else { return nil }
    guard entry.shape == [count] else {
      throw EngineError(
        .invalidCheckpoint,
        "\(file.file.path): tensor \(name) has shape \(entry.shape), but config.json asks for \([count]).")
    }
    let bytes = file.bytes(of: entry)
    return (0..<count).map { index in
      entry.typeName == "I64"
        ? Int(Int64(littleEndian: bytes.loadUnaligned(fromByteOffset: 8 * index, as: Int64.self)))
        : Int(Int32(littleEndian: bytes.loadUnaligned(fromByteOffset: 4 * index, as: Int32.self)))
    }
  }

  public func load(_ name: String, shape: [Int], role: WeightRole) throws(EngineError) -> WeightSource {
    guard let location = locations[name], let entry = files[location].entries[name] else {
      throw EngineError(
        .invalidCheckpoint, "\(origin): tensor \(name) is missing; expected one of shape \(shape).")
    }
    let file = files[location]
    guard entry.shape == shape else {
      throw EngineError(
        .invalidCheckpoint,
        "\(file.file.path): tensor \(name) has shape \(entry.shape), but config.json asks for \(shape).")
    }
    guard let dtype = SafetensorsFile.weightTypes[entry.typeName] else {
      throw EngineError(
        .invalidCheckpoint,
        "\(file.file.path): tensor \(name) has type \(entry.typeName), but weights must be F32, F16 or BF16.")
    }
    return WeightSource(
      address: file.bytes(of: entry).baseAddress!, dtype: dtype, rows: shape.count == 1 ? 1 : shape[0],
      columns: shape.last!, owner: file)
  }
}
