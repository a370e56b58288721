public import ApusModels

extension GGUFWeightType {
  /// The types that can be written.
  public static let writable: [GGUFWeightType] = [
    .f32, .f16, .bf16, .q8_0, .q4_0, .q4_1, .q5_0, .q5_1, .q4_K, .q5_K, .q6_K,
  ]

  /// The name in the format's documents, such as `Q4_K`.
  public var name: String {
    switch self {
    case .f32: "F32"
    case .f16: "F16"
    case .bf16: "BF16"
    case .q4_0: "Q4_0"
    case .q4_1: "Q4_1"
    case .q5_0: "Q5_0"
    case .q5_1: "Q5_1"
    case .q8_0: "Q8_0"
    case .q2_K: "Q2_K"
    case .q3_K: "Q3_K"
    case .q4_K: "Q4_K"
    case .q5_K: "Q5_K"
    case .q6_K: "Q6_K"
    case .iq4_NL: "IQ4_NL"
    case .mxfp4: "MXFP4"
    }
  }

  /// Turns `count` finite numbers, a multiple of `blockLength`, into blocks.
  ///
  /// Blocks of 32 are, bit for bit, those of the reference in Python (the `gguf` package's `quants.py`): operations are in
  /// float32 and in the order in which they are there. For blocks of 256 that package has no quantiser;
  /// scales are searched for here, see `quantizeWithMinimum` and `quantizeQ6_K`.
  /// - Parameter type: must be one of `writable`.
  public func quantize(_ source: UnsafePointer<Float>, count: Int, to target: UnsafeMutableRawPointer) {
    let (length, width) = (blockLength, blockBytes)
    switch self {
    case .f32: target.copyMemory(from: source, byteCount: 4 * count)
    case .f16:
      for index in 0..<count {
        target.storeBytes(of: Float16(source[index]).bitPattern, toByteOffset: 2 * index, as: UInt16.self)
      }
    case .bf16:
      for index in 0..<count {
        target.storeBytes(of: bfloat16(source[index]), toByteOffset: 2 * index, as: UInt16.self)
      }
    case .q8_0: for i in 0..<count / length { quantizeQ8_0(source + i * length, target + i * width) }
    case .q4_0: for i in 0..<count / length { quantizeAroundZero(source + i * length, target + i * width, bits: 4) }
    case .q5_0: for i in 0..<count / length { quantizeAroundZero(source + i * length, target + i * width, bits: 5) }
    case .q4_1: for i in 0..<count / length { quantizeFromLeast(source + i * length, target + i * width, bits: 4) }
    case .q5_1: for i in 0..<count / length { quantizeFromLeast(source + i * length, target + i * width, bits: 5) }
    case .q4_K: for i in 0..<count / length { quantizeWithMinimum(source + i * length, target + i * width, bits: 4) }
    case .q5_K: for i in 0..<count / length { quantizeWithMinimum(source + i * length, target + i * width, bits: 5) }
    case .q6_K: for i in 0..<count / length { quantizeQ6_K(source + i * length, target + i * width) }
    default: fatalError("\(name) cannot be written; see GGUFWeightType.writable.")
    }
  }
}

/// The bfloat16 number nearest to a number, ties to even; a NaN stays one.
@inline(__always)
func bfloat16(_ number: Float) -> UInt16 {
  let bits = number.bitPattern
  if number.isNaN { return UInt16(truncatingIfNeeded: (bits & 0xFFFF_0000 | 64 << 16) >> 16) }
  return UInt16(truncatingIfNeeded: (bits &+ 0x7FFF &+ (bits >> 16 & 1)) >> 16)
}

@inline(__always)
private func store(_ number: Float, _ target: UnsafeMutableRawPointer, _ offset: Int) {
  target.storeBytes(of: Float16(number).bitPattern, toByteOffset: offset, as: UInt16.self)
}

@inline(__always)
private func load(_ target: UnsafeMutableRawPointer, _ offset: Int) -> Float {
  Float(Float16(bitPattern: target.loadUnaligned(fromByteOffset: offset, as: UInt16.self)))
}

/// One over a scale; 0 for a scale so small that there is no such number.
@inline(__always)
private func reciprocal(_ scale: Float) -> Float {
  let inverse = 1 / scale
  return inverse.isFinite ? inverse : 0
}

/// A number within limits; the upper one for what is no number. Sums of the largest numbers may overflow: the result is
/// useless then, but no trap, and the error says so.
@inline(__always)
private func clamped(_ number: Float, _ lower: Float, _ upper: Float) -> Float {
  number < lower ? lower : number < upper ? number : upper
}

private func quantizeQ8_0(_ x: UnsafePointer<Float>, _ block: UnsafeMutableRawPointer) {
  var most: Float = 0
  for index in 0..<32 { most = max(most, abs(x[index])) }
  let scale = most / 127
  let inverse = reciprocal(scale)
  store(scale, block, 0)
  // Ties go away from zero.
  for index in 0..<32 {
    let number = x[index] * inverse
    block.storeBytes(of: Int8(clamped(number.rounded(), -128, 127)), toByteOffset: 2 + index, as: Int8.self)
  }
}

/// Writes 32 codes of 4 or 5 bits: the low halves of 16 bytes are the first 16, fifth bits lie in a word before them.
@inline(__always)
private func storeCodes(_ block: UnsafeMutableRawPointer, _ offset: Int, bits: Int, _ code: (Int) -> UInt32) {
  var high: UInt32 = 0
  let bytes = block + offset + (bits == 5 ? 4 : 0)
  for index in 0..<16 {
    let (first, second) = (code(index), code(index + 16))
    bytes.storeBytes(of: UInt8(first & 15 | (second & 15) << 4), toByteOffset: index, as: UInt8.self)
    high |= (first >> 4) << UInt32(index) | (second >> 4) << UInt32(index + 16)
  }
  if bits == 5 { (block + offset).storeBytes(of: high.littleEndian, as: UInt32.self) }
}

/// Q4_0 and Q5_0: the number of largest magnitude becomes the lowest code.
private func quantizeAroundZero(_ x: UnsafePointer<Float>, _ block: UnsafeMutableRawPointer, bits: Int) {
  var most: Float = 0
  var extreme: Float = x[0]
  for index in 0..<32 where abs(x[index]) > most { (most, extreme) = (abs(x[index]), x[index]) }
  let middle = Float(1 << (bits - 1))
  let scale = extreme / -middle
  let inverse = reciprocal(scale)
  let limit = Float(1 << bits - 1)
  store(scale, block, 0)
  storeCodes(block, 2, bits: bits) { index in
    let number = (x[index] * inverse + (middle + 0.5)).rounded(.towardZero)
    return UInt32(clamped(number, 0, limit))
  }
}

/// Q4_1 and Q5_1: codes count from the least number.
private func quantizeFromLeast(_ x: UnsafePointer<Float>, _ block: UnsafeMutableRawPointer, bits: Int) {
  var (least, most) = (x[0], x[0])
  for index in 1..<32 { (least, most) = (min(least, x[index]), max(most, x[index])) }
  let limit = Float(1 << bits - 1)
  let scale = (most - least) / limit
  let inverse = reciprocal(scale)
  store(scale, block, 0)
  store(least, block, 2)
  storeCodes(block, 4, bits: bits) { index in
    let number = ((x[index] - least) * inverse + 0.5).rounded(.towardZero)
    return UInt32(clamped(number, 0, limit))
  }
}

// Blocks of 256 ("K"): sub-blocks whose scales are quantised themselves.

/// The scale and the minimum of a sub-block of 32 numbers, x = scale * code - minimum with codes from 0 to `limit`.
///
/// A least-squares fit, weighted so that large numbers count more: for each of some trial scales the codes are found, and
/// for these codes the best scale and minimum, as ggml's quantiser of these types does it.
private func fit(_ x: UnsafePointer<Float>, limit: Int) -> (scale: Float, minimum: Float) {
  var (least, most, squares) = (min(x[0], 0), x[0], Float(0))
  for index in 0..<32 {
    (least, most) = (min(least, x[index]), max(most, x[index]))
    squares += x[index] * x[index]
  }
  guard most > least else { return (0, -least) }
  let typical = (squares / 32).squareRoot()
  let range = most - least
  var best = (scale: range / Float(limit), least: least, error: Float.infinity)
  for trial in 0...21 {
    let factor = trial == 0 ? Float(limit) / range : (Float(limit) - 1 + 0.1 * Float(trial - 1)) / range
    var (sw, sx, sl, sll, sxl) = (Float(0), Float(0), Float(0), Float(0), Float(0))
    for index in 0..<32 {
      let code = min(max((factor * (x[index] - least)).rounded(.toNearestOrEven), 0), Float(limit))
      let weight = typical + abs(x[index])
      sw += weight
      sx += weight * x[index]
      sl += weight * code
      sll += weight * code * code
      sxl += weight * x[index] * code
    }
    let determinant = sw * sll - sl * sl
    guard determinant > 0, sll > 0 else { continue }
    var scale = (sw * sxl - sx * sl) / determinant
    var offset = (sll * sx - sl * sxl) / determinant
    if offset > 0 { (scale, offset) = (sxl / sll, 0) }
    guard scale > 0, scale.isFinite, offset.isFinite else { continue }
    var error: Float = 0
    for index in 0..<32 {
      let code = min(max((factor * (x[index] - least)).rounded(.toNearestOrEven), 0), Float(limit))
      let difference = scale * code + offset - x[index]
      error += (typical + abs(x[index])) * difference * difference
    }
    if error < best.error { best = (scale, offset, error) }
  }
  return (best.scale, -best.least)
}

/// Q4_K and Q5_K: eight sub-blocks of 32 with a scale and a minimum of 6 bits each.
private func quantizeWithMinimum(_ x: UnsafePointer<Float>, _ block: UnsafeMutableRawPointer, bits: Int) {
  let limit = 1 << bits - 1
  withUnsafeTemporaryAllocation(of: Float.self, capacity: 16) { fitted in
    var (largestScale, largestMinimum) = (Float(0), Float(0))
    for sub in 0..<8 {
      let (scale, minimum) = fit(x + 32 * sub, limit: limit)
      fitted[sub] = scale
      fitted[8 + sub] = minimum
      (largestScale, largestMinimum) = (max(largestScale, scale), max(largestMinimum, minimum))
    }
    store(largestScale / 63, block, 0)
    store(largestMinimum / 63, block, 2)
    let (superScale, superMinimum) = (load(block, 0), load(block, 2))
    let packed = block + 4
    for byte in 0..<12 { packed.storeBytes(of: 0, toByteOffset: byte, as: UInt8.self) }
    func add(_ bits: UInt8, _ place: Int) {
      packed.storeBytes(
        of: packed.load(fromByteOffset: place, as: UInt8.self) | bits, toByteOffset: place, as: UInt8.self)
    }
    let codes = block + (bits == 5 ? 48 : 16)
    if bits == 5 { for byte in 0..<32 { block.storeBytes(of: 0, toByteOffset: 16 + byte, as: UInt8.self) } }
    for sub in 0..<8 {
      func six(_ value: Float, _ unit: Float) -> UInt8 {
        unit > 0 ? UInt8(clamped((value / unit).rounded(.toNearestOrEven), 0, 63)) : 0
      }
      let (scaleCode, minimumCode) = (six(fitted[sub], superScale), six(fitted[8 + sub], superMinimum))
      if sub < 4 {
        add(scaleCode, sub)
        add(minimumCode, sub + 4)
      } else {
        add(scaleCode & 15 | (minimumCode & 15) << 4, sub + 4)
        add((scaleCode >> 4) << 6, sub - 4)
        add((minimumCode >> 4) << 6, sub)
      }
      let scale = superScale * Float(scaleCode)
      let minimum = superMinimum * Float(minimumCode)
      for index in 0..<32 {
        let number = scale > 0 ? ((x[32 * sub + index] + minimum) / scale).rounded(.toNearestOrEven) : 0
        let code = UInt8(clamped(number, 0, Float(limit)))
        let place = sub / 2 * 32 + index
        let own = (code & 15) << UInt8(sub % 2 * 4)
        let other = sub % 2 == 0 ? 0 : codes.load(fromByteOffset: place, as: UInt8.self)
        codes.storeBytes(of: own | other, toByteOffset: place, as: UInt8.self)
        if bits == 5 {
          let high = block.load(fromByteOffset: 16 + index, as: UInt8.self) | (code >> 4) << UInt8(sub)
          block.storeBytes(of: high, toByteOffset: 16 + index, as: UInt8.self)
        }
      }
    }
  }
}

/// Q6_K: sixteen sub-blocks of 16 with a signed scale of 8 bits each and codes from -32 to 31.
///
/// The scale of a sub-block is the least-squares fit, weighted by squares, for the best of some trial scales.
private func quantizeQ6_K(_ x: UnsafePointer<Float>, _ block: UnsafeMutableRawPointer) {
  withUnsafeTemporaryAllocation(of: Float.self, capacity: 16) { scales in
    var extremeScale: Float = 0
    for sub in 0..<16 {
      let y = x + 16 * sub
      var extreme: Float = 0
      for index in 0..<16 where abs(y[index]) > abs(extreme) { extreme = y[index] }
      scales[sub] = 0
      guard abs(extreme) > 1e-30 else { continue }
      var best: Float = -1
      for trial in -9...9 {
        let factor = -(32 + 0.1 * Float(trial)) / extreme
        var (sxl, sll) = (Float(0), Float(0))
        for index in 0..<16 {
          let code = min(max((factor * y[index]).rounded(.toNearestOrEven), -32), 31)
          let weight = y[index] * y[index]
          sxl += weight * y[index] * code
          sll += weight * code * code
        }
        // What the fit explains of the sub-block; the rest is its error.
        guard sll > 0, sxl * sxl / sll > best else { continue }
        best = sxl * sxl / sll
        scales[sub] = sxl / sll
      }
      if abs(scales[sub]) > abs(extremeScale) { extremeScale = scales[sub] }
    }
    store(extremeScale / -128, block, 208)
    let unit = load(block, 208)
    for byte in 0..<192 { block.storeBytes(of: 0, toByteOffset: byte, as: UInt8.self) }
    for sub in 0..<16 {
      let scaleCode =
        unit == 0 ? 0 : Int8(clamped((scales[sub] / unit).rounded(.toNearestOrEven), -128, 127))
      block.storeBytes(of: scaleCode, toByteOffset: 192 + sub, as: Int8.self)
      let scale = unit * Float(scaleCode)
      let run = sub / 2
      let low = block + run / 4 * 64 + run % 2 * 32 + sub % 2 * 16
      let lowShift = UInt8(run / 2 % 2 * 4)
      let high = block + 128 + run / 4 * 32 + sub % 2 * 16
      let highShift = UInt8(run % 4 * 2)
      for index in 0..<16 {
        let number = scale == 0 ? 0 : (x[16 * sub + index] / scale).rounded(.toNearestOrEven)
        let code = UInt8(clamped(number, -32, 31) + 32)
        let lowByte = low.load(fromByteOffset: index, as: UInt8.self) | (code & 15) << lowShift
        let highByte = high.load(fromByteOffset: index, as: UInt8.self) | (code >> 4) << highShift
        low.storeBytes(of: lowByte, toByteOffset: index, as: UInt8.self)
        high.storeBytes(of: highByte, toByteOffset: index, as: UInt8.self)
      }
    }
  }
}
