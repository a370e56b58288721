/// The tensor types of GGUF files whose numbers can be read, with what turns their blocks into float32.
///
/// Every number is computed with the operations, in float32 and in the order, of the format's reference in Python (the
/// `gguf` package's `quants.py`), so the results agree in every bit. Layouts: ggml's `ggml-common.h`.
public enum GGUFWeightType: UInt32, Sendable, CaseIterable {
  case f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q2_K = 10, q3_K = 11, q4_K = 12, q5_K = 13,
    q6_K = 14, iq4_NL = 20, bf16 = 30, mxfp4 = 39

  /// Numbers in one block.
  public var blockLength: Int {
    switch self {
    case .f32, .f16, .bf16: 1
    case .q2_K, .q3_K, .q4_K, .q5_K, .q6_K: 256
    default: 32
    }
  }

  /// Bytes of one block.
  public var blockBytes: Int {
    switch self {
    case .f32: 4
    case .f16, .bf16: 2
    case .q4_0, .iq4_NL: 18
    case .q4_1: 20
    case .q5_0: 22
    case .q5_1: 24
    case .q8_0: 34
    case .q2_K: 84
    case .q3_K: 110
    case .q4_K: 144
    case .q5_K: 176
    case .q6_K: 210
    case .mxfp4: 17
    }
  }

  /// Turns `count` numbers, a multiple of `blockLength`, into float32.
  public func dequantize(_ source: UnsafeRawPointer, count: Int, to target: UnsafeMutablePointer<Float>) {
    let blocks = count / blockLength
    let length = blockLength
    let width = blockBytes
    switch self {
    case .f32:
      for index in 0..<count { target[index] = source.loadUnaligned(fromByteOffset: 4 * index, as: Float.self) }
    case .f16: for index in 0..<count { target[index] = half(source, 2 * index) }
    case .bf16:
      for index in 0..<count {
        let bits = source.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self)
        target[index] = Float(bitPattern: UInt32(bits) << 16)
      }
    case .q4_0: for i in 0..<blocks { dequantizeQ4_0(source + i * width, target + i * length) }
    case .q4_1: for i in 0..<blocks { dequantizeQ4_1(source + i * width, target + i * length) }
    case .q5_0: for i in 0..<blocks { dequantizeQ5_0(source + i * width, target + i * length) }
    case .q5_1: for i in 0..<blocks { dequantizeQ5_1(source + i * width, target + i * length) }
    case .q8_0: for i in 0..<blocks { dequantizeQ8_0(source + i * width, target + i * length) }
    case .q2_K: for i in 0..<blocks { dequantizeQ2_K(source + i * width, target + i * length) }
    case .q3_K: for i in 0..<blocks { dequantizeQ3_K(source + i * width, target + i * length) }
    case .q4_K: for i in 0..<blocks { dequantizeQ4_K(source + i * width, target + i * length) }
    case .q5_K: for i in 0..<blocks { dequantizeQ5_K(source + i * width, target + i * length) }
    case .q6_K: for i in 0..<blocks { dequantizeQ6_K(source + i * width, target + i * length) }
    case .iq4_NL: for i in 0..<blocks { dequantizeIQ4_NL(source + i * width, target + i * length) }
    case .mxfp4: for i in 0..<blocks { dequantizeMXFP4(source + i * width, target + i * length) }
    }
  }
}

/// The float16 number at an offset in bytes.
@inline(__always)
private func half(_ block: UnsafeRawPointer, _ offset: Int) -> Float {
  Float(Float16(bitPattern: block.loadUnaligned(fromByteOffset: offset, as: UInt16.self)))
}

/// The byte at an offset.
@inline(__always)
private func byte(_ block: UnsafeRawPointer, _ offset: Int) -> UInt8 {
  block.load(fromByteOffset: offset, as: UInt8.self)
}

// Blocks of 32: the low halves of 16 bytes are the first 16 numbers, the high halves the others.

private func dequantizeQ4_0(_ block: UnsafeRawPointer, _ target: UnsafeMutablePointer<Float>) {
  let scale = half(block, 0)
  for index in 0..<16 {
    let pair = byte(block, 2 + index)
    target[index] = scale * Float(Int32(pair & 15) - 8)
    target[index + 16] = scale * Float(Int32(pair >> 4) - 8)
  }
}

private func dequantizeQ4_1(_ block: UnsafeRawPointer, _ target: UnsafeMutablePointer<Float>) {
  let scale = half(block, 0)
  let least = half(block, 2)
  for index in 0..<16 {
    let pair = byte(block, 4 + index)
    target[index] = scale * Float(pair & 15) + least
    target[index + 16] = scale * Float(pair >> 4) + least
  }
}

private func dequantizeQ5_0(_ block: UnsafeRawPointer, _ target: UnsafeMutablePointer<Float>) {
  let scale = half(block, 0)
  let high = UInt32(littleEndian: block.loadUnaligned(fromByteOffset: 2, as: UInt32.self))
  for index in 0..<16 {
    let pair = UInt32(byte(block, 6 + index))
    let first = pair & 15 | (high >> UInt32(index) & 1) << 4
    let second = pair >> 4 | (high >> UInt32(index + 16) & 1) << 4
    target[index] = scale * Float(Int32(first) - 16)
    target[index + 16] = scale * Float(Int32(second) - 16)
  }
}

private func dequantizeQ5_1(_ block: UnsafeRawPointer, _ target: UnsafeMutablePointer<Float>) {
  let scale = half(block, 0)
  let least = half(block, 2)
  let high = UInt32(littleEndian: block.loadUnaligned(fromByteOffset: 4, as: UInt32.self))
  for index in 0..<16 {
    let pair = UInt32(byte(block, 8 + index))
    let first = pair & 15 | (high >> UInt32(index) & 1) << 4
    let second = pair >> 4 | (high >> UInt32(index + 16) & 1) << 4
    target[index] = scale * Float(first) + least
    target[index + 16] = scale * Float(second) + least
  }
}

private func dequantizeQ8_0(_ block: UnsafeRawPointer, _ target: UnsafeMutablePointer<Float>) {
  let scale = half(block, 0)
  for index in 0..<32 { target[index] = Float(block.load(fromByteOffset: 2 + index, as: Int8.self)) * scale }
}

private func dequantizeIQ4_NL(_ block: UnsafeRawPointer, _ target: UnsafeMutablePointer<Float>) {
  let scale = half(block, 0)
  for index in 0..<16 {
    let pair = byte(block, 2 + index)
    target[index] = scale * nonLinearLevel(pair & 15)
    target[index + 16] = scale * nonLinearLevel(pair >> 4)
  }
}

/// The 16 levels of IQ4_NL.
@inline(__always)
private func nonLinearLevel(_ code: UInt8) -> Float {
  // -127 -104 -83 -65 -49 -35 -22 -10 and 1 13 25 38 53 69 89 113, one signed byte each, the first lowest.
  let levels: UInt64 = code < 8 ? 0xF6EA_DDCF_BFAD_9881 : 0x7159_4535_2619_0D01
  return Float(Int8(truncatingIfNeeded: levels >> (UInt64(code & 7) * 8)))
}

private func dequantizeMXFP4(_ block: UnsafeRawPointer, _ target: UnsafeMutablePointer<Float>) {
  // Levels are doubled, so the power of two is halved; the two least are below the normal numbers.
  let exponent = UInt32(byte(block, 0))
  let scale = Float(bitPattern: exponent < 2 ? 0x0020_0000 << exponent : (exponent - 1) << 23)
  for index in 0..<16 {
    let pair = byte(block, 1 + index)
    target[index] = scale * fourBitLevel(pair & 15)
    target[index + 16] = scale * fourBitLevel(pair >> 4)
  }
}

/// Twice the number that an E2M1 code stands for; minus zero is zero.
@inline(__always)
private func fourBitLevel(_ code: UInt8) -> Float {
  // 0 1 2 3 4 6 8 12, one byte each, the first lowest.
  let magnitude = Int32(truncatingIfNeeded: 0x0C08_0604_0302_0100 >> (UInt64(code & 7) * 8) & 0xFF)
  return Float(code & 8 == 0 ? magnitude : -magnitude)
}

// Blocks of 256 ("K"): sub-blocks with scales that are themselves quantised.

private func dequantizeQ2_K(_ block: UnsafeRawPointer, _ target: UnsafeMutablePointer<Float>) {
  let scale = half(block, 80)
  let least = half(block, 82)
  for sub in 0..<16 {
    let packed = byte(block, sub)
    let factor = scale * Float(packed & 15)
    let offset = least * Float(packed >> 4)
    // Two sub-blocks of 16 share 32 bytes at one shift; four shifts make half a block.
    let source = block + 16 + sub / 8 * 32 + sub % 2 * 16
    let shift = UInt8(sub / 2 % 4 * 2)
    for index in 0..<16 { target[16 * sub + index] = factor * Float(byte(source, index) >> shift & 3) - offset }
  }
}

private func dequantizeQ3_K(_ block: UnsafeRawPointer, _ target: UnsafeMutablePointer<Float>) {
  let scale = half(block, 108)
  for sub in 0..<16 {
    let low = byte(block, 96 + sub % 8) >> UInt8(sub / 8 * 4) & 15
    let high = byte(block, 104 + sub % 4) >> UInt8(sub / 4 * 2) & 3
    let factor = scale * Float(Int32(low | high << 4) - 32)
    let source = block + 32 + sub / 8 * 32 + sub % 2 * 16
    let mask = block + sub % 2 * 16
    let shift = UInt8(sub / 2 % 4 * 2)
    let bit = UInt8(sub / 2)
    for index in 0..<16 {
      let code = Int32(byte(source, index) >> shift & 3)
      // The mask says where nothing is taken away.
      let offset: Int32 = byte(mask, index) >> bit & 1 == 1 ? 0 : 4
      target[16 * sub + index] = factor * Float(code - offset)
    }
  }
}

/// The 6-bit scale and minimum of one of 8 sub-blocks, in 12 bytes.
@inline(__always)
private func scaleAndMinimum(_ packed: UnsafeRawPointer, _ sub: Int) -> (scale: Float, minimum: Float) {
  if sub < 4 { return (Float(byte(packed, sub) & 63), Float(byte(packed, sub + 4) & 63)) }
  let low = byte(packed, sub + 4)
  let scale = low & 15 | byte(packed, sub - 4) >> 2 & 0x30
  let minimum = low >> 4 | byte(packed, sub) >> 2 & 0x30
  return (Float(scale), Float(minimum))
}

private func dequantizeQ4_K(_ block: UnsafeRawPointer, _ target: UnsafeMutablePointer<Float>) {
  let scale = half(block, 0)
  let least = half(block, 2)
  for sub in 0..<8 {
    let own = scaleAndMinimum(block + 4, sub)
    let factor = scale * own.scale
    let offset = least * own.minimum
    let source = block + 16 + sub / 2 * 32
    let shift = UInt8(sub % 2 * 4)
    for index in 0..<32 { target[32 * sub + index] = factor * Float(byte(source, index) >> shift & 15) - offset }
  }
}

private func dequantizeQ5_K(_ block: UnsafeRawPointer, _ target: UnsafeMutablePointer<Float>) {
  let scale = half(block, 0)
  let least = half(block, 2)
  for sub in 0..<8 {
    let own = scaleAndMinimum(block + 4, sub)
    let factor = scale * own.scale
    let offset = least * own.minimum
    let source = block + 48 + sub / 2 * 32
    let high = block + 16
    let shift = UInt8(sub % 2 * 4)
    for index in 0..<32 {
      let code = byte(source, index) >> shift & 15 | (byte(high, index) >> UInt8(sub) & 1) << 4
      target[32 * sub + index] = factor * Float(code) - offset
    }
  }
}

private func dequantizeQ6_K(_ block: UnsafeRawPointer, _ target: UnsafeMutablePointer<Float>) {
  let scale = half(block, 208)
  for sub in 0..<16 {
    let factor = scale * Float(block.load(fromByteOffset: 192 + sub, as: Int8.self))
    // 32 numbers share a shift of their upper two bits; 64 a half of their lower four.
    let run = sub / 2
    let low = block + run / 4 * 64 + run % 2 * 32 + sub % 2 * 16
    let lowShift = UInt8(run / 2 % 2 * 4)
    let high = block + 128 + run / 4 * 32 + sub % 2 * 16
    let highShift = UInt8(run % 4 * 2)
    for index in 0..<16 {
      let code = byte(low, index) >> lowShift & 15 | (byte(high, index) >> highShift & 3) << 4
      target[16 * sub + index] = factor * Float(Int32(code) - 32)
    }
  }
}
