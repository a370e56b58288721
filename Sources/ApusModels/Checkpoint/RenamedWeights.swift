import ApusCore
import ApusTensors

/// Weights that are stored under other names than those they are asked for by.
struct RenamedWeights: WeightStore {
  let base: any WeightStore
  /// The name in `base` for the name asked for.
  let storedName: @Sendable (_ name: String) -> String

  var origin: String { base.origin }
  var byteCount: Int { base.byteCount }
  var mappedFiles: [MappedFile] { base.mappedFiles }

  func contains(_ name: String) -> Bool { base.contains(storedName(name)) }

  func dtype(of name: String) -> DType? { base.dtype(of: storedName(name)) }

  func load(_ name: String, shape: [Int], role: WeightRole) throws(EngineError) -> WeightSource {
    try base.load(storedName(name), shape: shape, role: role)
  }

  func quantized(_ name: String, shape: [Int]) throws(EngineError) -> QuantizedSource? {
    try base.quantized(storedName(name), shape: shape)
  }

  func rowReader(
    _ name: String, shape: [Int]
  ) throws(EngineError) -> (@Sendable (_ row: Int, _ target: UnsafeMutablePointer<Float>) -> Void)? {
    try base.rowReader(storedName(name), shape: shape)
  }

  func loadInt8(_ name: String, shape: [Int]) throws(EngineError) -> WeightSource? {
    try base.loadInt8(storedName(name), shape: shape)
  }

  func bytes(_ name: String, shape: [Int]) throws(EngineError) -> StoredBytes? {
    try base.bytes(storedName(name), shape: shape)
  }

  func integers(_ name: String, count: Int) throws(EngineError) -> [Int]? {
    try base.integers(storedName(name), count: count)
  }
}
