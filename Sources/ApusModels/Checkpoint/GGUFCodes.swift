public import ApusTensors

/// How GGUF's quantised types stay quantised when they are packed.
extension GGUFWeightType {
  /// The layout of the codes; `nil` for types that hold plain numbers.
  public var codeLayout: CodeLayout? {
    switch self {
    case .f32, .f16, .bf16: nil
    case .q4_0: CodeLayout(bits: 4, offset: 8, groupSize: 32)
    case .q4_1: CodeLayout(bits: 4, groupSize: 32, minimum: .own)
    case .q5_0: CodeLayout(bits: 5, offset: 16, groupSize: 32)
    case .q5_1: CodeLayout(bits: 5, groupSize: 32, minimum: .own)
    case .q8_0: CodeLayout(bits: 8, offset: 128, groupSize: 32)
    // 2 and 3 bits take the room of 4.
    case .q2_K: CodeLayout(bits: 4, groupSize: 16, blockSize: 256, hasFactors: true, minimum: .own)
    case .q3_K: CodeLayout(bits: 4, offset: 4, groupSize: 16, blockSize: 256, hasFactors: true)
    case .q4_K: CodeLayout(bits: 4, groupSize: 32, blockSize: 256, hasFactors: true, minimum: .own)
    case .q5_K: CodeLayout(bits: 5, groupSize: 32, blockSize: 256, hasFactors: true, minimum: .own)
    case .q6_K: CodeLayout(bits: 6, offset: 32, groupSize: 16, blockSize: 256, hasFactors: true)
    case .iq4_NL: CodeLayout(bits: 4, levels: .iq4NL, groupSize: 32)
    // Powers of two down to 2^-128, which bfloat16 holds and float16 does not.
    case .mxfp4: CodeLayout(bits: 4, levels: .e2m1, groupSize: 32, scaleType: .bfloat16)
    }
  }

  /// Takes a row's blocks apart: writes `count` codes (a multiple of `blockLength`) and what belongs to them into the
  /// first row of some arrays. The layouts are those of `dequantize`.
  public func unpack(_ source: UnsafeRawPointer, count: Int, into rows: CodeRows) {
    for index in 0..<count / blockLength {
      let block = source + index * blockBytes
      let codes = rows.codes + index * blockLength
      switch self {
      case .f32, .f16, .bf16: break
      case .q4_0, .iq4_NL:
        rows.scales[index] = half(block, 0)
        nibbles(block + 2, codes)
      case .q4_1:
        rows.scales[index] = half(block, 0)
        rows.minimums[index] = -half(block, 2)
        nibbles(block + 4, codes)
      case .q5_0:
        rows.scales[index] = half(block, 0)
        nibbles(block + 6, codes)
        fifthBits(block + 2, codes)
      case .q5_1:
        rows.scales[index] = half(block, 0)
        rows.minimums[index] = -half(block, 2)
        nibbles(block + 8, codes)
        fifthBits(block + 4, codes)
      case .q8_0:
        rows.scales[index] = half(block, 0)
        for i in 0..<32 { codes[i] = byte(block, 2 + i) ^ 0x80 }
      case .mxfp4:
        let exponent = UInt32(byte(block, 0))
        rows.scales[index] = Float(bitPattern: exponent < 2 ? 0x0020_0000 << exponent : (exponent - 1) << 23)
        nibbles(block + 1, codes)
      case .q2_K:
        rows.scales[index] = half(block, 80)
        rows.minimums[index] = half(block, 82)
        for sub in 0..<16 {
          rows.factors[16 * index + sub] = Int8(byte(block, sub) & 15)
          rows.minimumFactors[16 * index + sub] = byte(block, sub) >> 4
          let from = 16 + sub / 8 * 32 + sub % 2 * 16
          let shift = UInt8(sub / 2 % 4 * 2)
          for i in 0..<16 { codes[16 * sub + i] = byte(block, from + i) >> shift & 3 }
        }
      case .q3_K:
        rows.scales[index] = half(block, 108)
        for sub in 0..<16 {
          let low = byte(block, 96 + sub % 8) >> UInt8(sub / 8 * 4) & 15
          let high = byte(block, 104 + sub % 4) >> UInt8(sub / 4 * 2) & 3
          rows.factors[16 * index + sub] = Int8(Int32(low | high << 4) - 32)
          let from = 32 + sub / 8 * 32 + sub % 2 * 16
          let shift = UInt8(sub / 2 % 4 * 2)
          let bit = UInt8(sub / 2)
          for i in 0..<16 {
            let upper = byte(block, sub % 2 * 16 + i) >> bit & 1
            codes[16 * sub + i] = (byte(block, from + i) >> shift & 3) | upper << 2
          }
        }
      case .q4_K, .q5_K:
        rows.scales[index] = half(block, 0)
        rows.minimums[index] = half(block, 2)
        for sub in 0..<8 {
          let (scale, minimum) = scaleAndMinimum(block + 4, sub)
          rows.factors[8 * index + sub] = Int8(scale)
          rows.minimumFactors[8 * index + sub] = minimum
          let from = (self == .q4_K ? 16 : 48) + sub / 2 * 32
          let shift = UInt8(sub % 2 * 4)
          for i in 0..<32 { codes[32 * sub + i] = byte(block, from + i) >> shift & 15 }
          if self == .q5_K {
            for i in 0..<32 { codes[32 * sub + i] |= (byte(block, 16 + i) >> UInt8(sub) & 1) << 4 }
          }
        }
      case .q6_K:
        rows.scales[index] = half(block, 208)
        for sub in 0..<16 {
          rows.factors[16 * index + sub] = block.load(fromByteOffset: 192 + sub, as: Int8.self)
          let run = sub / 2
          let low = run / 4 * 64 + run % 2 * 32 + sub % 2 * 16
          let lowShift = UInt8(run / 2 % 2 * 4)
          let high = 128 + run / 4 * 32 + sub % 2 * 16
          let highShift = UInt8(run % 4 * 2)
          for i in 0..<16 {
            codes[16 * sub + i] =
              byte(block, low + i) >> lowShift & 15 | (byte(block, high + i) >> highShift & 3) << 4
          }
        }
      }
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

/// 16 bytes: the low halves are the first 16 codes, the high halves the others.
@inline(__always)
private func nibbles(_ source: UnsafeRawPointer, _ codes: UnsafeMutablePointer<UInt8>) {
  for i in 0..<16 {
    codes[i] = byte(source, i) & 15
    codes[16 + i] = byte(source, i) >> 4
  }
}

/// Adds the fifth bits of 32 codes.
@inline(__always)
private func fifthBits(_ source: UnsafeRawPointer, _ codes: UnsafeMutablePointer<UInt8>) {
  let high = UInt32(littleEndian: source.loadUnaligned(as: UInt32.self))
  for i in 0..<32 { codes[i] |= UInt8(high >> UInt32(i) & 1) << 4 }
}

/// The 6-bit scale and minimum of one of 8 sub-blocks, in 12 bytes.
@inline(__always)
private func scaleAndMinimum(_ packed: UnsafeRawPointer, _ sub: Int) -> (scale: UInt8, minimum: UInt8) {
  if sub < 4 { return (byte(packed, sub) & 63, byte(packed, sub + 4) & 63) }
  let low = byte(packed, sub + 4)
  return (low & 15 | byte(packed, sub - 4) >> 2 & 0x30, low >> 4 | byte(packed, sub) >> 2 & 0x30)
}
