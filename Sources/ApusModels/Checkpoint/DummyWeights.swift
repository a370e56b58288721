public import ApusCore
public import ApusTensors
import Synchronization

/// Random weights that need no file: a function of seed, name and index alone, so that any program can make the same.
///
/// The key of a weight is FNV-1a-64 of its name's UTF-8 bytes, xor seed * 0x9E3779B97F4A7C15. Element i is
/// offset + scale * (2 u - 1) in float32, where u = (splitmix64(key + i * 0x9E3779B97F4A7C15) >> 40) / 2^24 and splitmix64
/// is that generator's output function. Matrices and biases have offset 0 and scale = initializer range * sqrt(3), which
/// gives them the standard deviation of a freshly initialised model; norm weights have offset 1 and scale 0.1.
/// `Scripts/golden_models.py` computes the same in Python.
public final class DummyWeights: WeightStore {
  public let origin = "random weights"
  public let byteCount = 0
  private let seed: UInt64
  private let scale: Float
  private let storage: DType
  private let filler: CPUBackend?
  private let buffers = Mutex<[DeviceMemory]>([])

  /// Describes random weights.
  /// - Parameters:
  ///   - seed: another seed gives other weights.
  ///   - initializerRange: standard deviation of matrices and biases.
  ///   - dtype: numbers are rounded to this type, as a checkpoint would store them.
  ///   - filler: makes the numbers on its threads; without one a plain loop makes the same numbers.
  public init(
    seed: UInt64 = 0, initializerRange: Float = 0.02, dtype: DType = .float32, filler: CPUBackend? = nil
  ) {
    precondition([.float32, .float16, .bfloat16].contains(dtype))
    self.seed = seed
    self.scale = initializerRange * Float(3).squareRoot()
    self.storage = dtype
    self.filler = filler
  }

  public func contains(_ name: String) -> Bool { true }

  public func dtype(of name: String) -> DType? { storage }

  public func load(_ name: String, shape: [Int], role: WeightRole) throws(EngineError) -> WeightSource {
    let count = shape.reduce(1, *)
    let memory = try memory(byteCount: count * storage.byteCount)
    let address = memory.address
    let offset: Float = role == .norm ? 1 : 0
    let scale = role == .norm ? 0.1 : scale
    let key = Self.key(name: name, seed: seed)
    if let filler {
      try filler.fillUniform(address, dtype: storage, count: count, key: key, scale: scale, offset: offset)
    } else {
      fill(address, count: count, key: key, scale: scale, offset: offset)
    }
    return WeightSource(
      address: UnsafeRawPointer(address), dtype: storage, rows: shape.count == 1 ? 1 : shape[0],
      columns: shape.last!, owner: memory)
  }

  /// Memory for a weight: a buffer whose weight has been packed and dropped, or a new one. Fresh memory is what costs time
  /// here, since the kernel clears it.
  private func memory(byteCount: Int) throws(EngineError) -> DeviceMemory {
    let free: DeviceMemory? = buffers.withLock { buffers in
      for index in buffers.indices
      where buffers[index].byteCount >= byteCount && isKnownUniquelyReferenced(&buffers[index]) {
        return buffers[index]
      }
      return nil
    }
    if let free { return free }
    let memory = try CPUBackend.hostMemory(byteCount: byteCount)
    buffers.withLock { buffers in
      // Buffers that are too small for what comes now are seldom needed again.
      buffers.removeAll { $0.byteCount < byteCount }
      if buffers.count == 4 { buffers.removeFirst() }
      buffers.append(memory)
    }
    return memory
  }

  /// The plain twin of `CPUBackend.fillUniform`.
  private func fill(_ address: UnsafeMutableRawPointer, count: Int, key: UInt64, scale: Float, offset: Float) {
    switch storage {
    case .float32:
      let numbers = address.assumingMemoryBound(to: Float.self)
      for index in 0..<count { numbers[index] = Self.element(index, key: key, offset: offset, scale: scale) }
    case .bfloat16:
      let numbers = address.assumingMemoryBound(to: UInt16.self)
      for index in 0..<count {
        // Round to nearest, ties to even; the values are finite.
        let bits = Self.element(index, key: key, offset: offset, scale: scale).bitPattern
        numbers[index] = UInt16(truncatingIfNeeded: (bits &+ 0x7FFF &+ (bits >> 16 & 1)) >> 16)
      }
    default:
      let numbers = address.assumingMemoryBound(to: UInt16.self)
      for index in 0..<count {
        numbers[index] = Float16(Self.element(index, key: key, offset: offset, scale: scale)).bitPattern
      }
    }
  }

  /// The key of a weight.
  static func key(name: String, seed: UInt64) -> UInt64 {
    var hash: UInt64 = 0xcbf2_9ce4_8422_2325
    for byte in name.utf8 { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01b3 }
    return hash ^ (seed &* 0x9E37_79B9_7F4A_7C15)
  }

  /// One number of a weight.
  @inline(__always)
  static func element(_ index: Int, key: UInt64, offset: Float, scale: Float) -> Float {
    var z = key &+ UInt64(truncatingIfNeeded: index) &* 0x9E37_79B9_7F4A_7C15
    z ^= z >> 30
    z = z &* 0xBF58_476D_1CE4_E5B9
    z ^= z >> 27
    z = z &* 0x94D0_49BB_1331_11EB
    z ^= z >> 31
    let u = Float(UInt32(truncatingIfNeeded: z >> 40)) * 0x1p-24
    return offset + scale * (2 * u - 1)
  }
}
