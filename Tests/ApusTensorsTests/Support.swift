import ApusCore
import ApusTensors
import Testing

/// SplitMix64 as a generator: tests print its seed.
struct Generator: RandomNumberGenerator {
  let seed: UInt64
  private var state: UInt64

  init(_ seed: UInt64) {
    self.seed = seed
    state = seed
  }

  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
    return z ^ z >> 31
  }

  /// Uniform in -scale..<scale.
  mutating func float(_ scale: Float = 1) -> Float { (Float(next() >> 40) / Float(1 << 23) - 1) * scale }

  mutating func floats(_ count: Int, _ scale: Float = 1) -> [Float] {
    (0..<count).map { _ in float(scale) }
  }
}

/// Every level that this machine can run.
let levels = InstructionSet.supported

/// Levels with each number of threads that invariance is tested for.
let threadCounts = [1, 2, 3, 7]

func makeBackend(_ level: InstructionSet, threads: Int = 2) throws -> CPUBackend {
  try CPUBackend(threads: threads, isa: level)
}

/// A float32 tensor with the rows given. Rows lie `padding` numbers further apart than they must and everything
/// begins `shift` numbers into the memory, so that addresses are odd; the numbers between are NaN and must never be
/// read.
func tensor(_ values: [Float], rows: Int, columns: Int, padding: Int = 0, shift: Int = 0) throws -> Tensor {
  let stride = columns + padding
  let memory = try CPUBackend.hostMemory(byteCount: (shift + rows * stride) * 4)
  let numbers = memory.address.assumingMemoryBound(to: Float.self)
  for i in 0..<shift + rows * stride { numbers[i] = .nan }
  for r in 0..<rows {
    for c in 0..<columns { numbers[shift + r * stride + c] = values[r * columns + c] }
  }
  return Tensor(
    memory: memory, byteOffset: shift * 4, dtype: .float32, rows: rows, columns: columns, stride: stride)
}

/// The numbers of a float32 tensor, row by row.
func values(_ tensor: Tensor) -> [Float] {
  var result = [Float]()
  for r in 0..<tensor.rows {
    for c in 0..<tensor.columns { result.append(tensor.float32[r * tensor.stride + c]) }
  }
  return result
}

/// The bits, so that comparisons are exact and NaN equals itself.
func bits(_ tensor: Tensor) -> [UInt32] { values(tensor).map(\.bitPattern) }

/// Rounds to nearest even to bfloat16: a plain twin of the kernels' conversion, for finite numbers.
func bfloat16(_ x: Float) -> UInt16 {
  let bits = x.bitPattern
  return UInt16(truncatingIfNeeded: (bits &+ 0x7fff &+ (bits >> 16 & 1)) >> 16)
}

func float(bfloat16 bits: UInt16) -> Float { Float(bitPattern: UInt32(bits) << 16) }

/// Rounds to a type and back. float16 goes by the definition: the nearest multiple of the spacing, ties to even.
func rounded(_ x: Float, _ dtype: DType) -> Float {
  switch dtype {
  case .bfloat16: return float(bfloat16: bfloat16(x))
  case .float16:
    if x == 0 || !x.isFinite { return x }
    let exponent = max(Int(x.exponent), -14)
    var spacing = Double(1)
    for _ in 0..<abs(exponent - 10) { spacing *= exponent > 10 ? 2 : 0.5 }
    let result = (Double(x) / spacing).rounded(.toNearestOrEven) * spacing
    return abs(result) > 65504 ? (x > 0 ? .infinity : -.infinity) : Float(result)
  default: return x
  }
}

/// The bits of a finite number that float16 can hold.
func float16Bits(_ x: Float) -> UInt16 {
  let sign: UInt16 = x.sign == .minus ? 0x8000 : 0
  let magnitude = abs(x)
  if magnitude == 0 { return sign }
  if magnitude.isInfinite { return sign | 0x7c00 }
  if magnitude < 0x1p-14 { return sign | UInt16(magnitude * 0x1p24) }
  let significand = UInt16((magnitude / Float(sign: .plus, exponent: magnitude.exponent, significand: 1) - 1) * 1024)
  return sign | UInt16(magnitude.exponent + 15) << 10 | significand
}

/// Bytes of numbers of a type, `shift` bytes into memory of their own.
func bytes(_ numbers: [Float], _ dtype: DType, shift: Int = 0) throws -> (
  memory: DeviceMemory, address: UnsafeRawPointer
) {
  let memory = try CPUBackend.hostMemory(byteCount: numbers.count * dtype.byteCount + shift)
  let address = memory.address + shift
  for (i, x) in numbers.enumerated() {
    switch dtype {
    case .float32: address.storeBytes(of: x.bitPattern, toByteOffset: i * 4, as: UInt32.self)
    case .float16: address.storeBytes(of: float16Bits(rounded(x, .float16)), toByteOffset: i * 2, as: UInt16.self)
    default: address.storeBytes(of: bfloat16(x), toByteOffset: i * 2, as: UInt16.self)
    }
  }
  return (memory, UnsafeRawPointer(address))
}

/// A packed weight [outputs, inputs] from numbers that are first rounded to the source's type.
func pack(
  _ backend: CPUBackend, _ numbers: [Float], outputs: Int, inputs: Int, source: DType, format: WeightFormat,
  shift: Int = 1
) throws -> any LinearWeight {
  let (memory, address) = try bytes(numbers, source, shift: shift)
  return try backend.packLinear(
    [WeightSource(address: address, dtype: source, rows: outputs, columns: inputs, owner: memory)], format: format)
}
