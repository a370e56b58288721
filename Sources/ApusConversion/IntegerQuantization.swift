import ApusModels
import ApusTensors

/// The sums from which the error of a rounding follows.
struct ErrorSums: Sendable {
  var squares = 0.0
  var errorSquares = 0.0
  var largestError = 0.0
  /// Whether a number of the source, or one of the result, is infinite or no number.
  var sourceIsFinite = true
  var resultIsFinite = true

  mutating func add(_ numbers: UnsafePointer<Float>, _ results: UnsafePointer<Float>, count: Int) {
    for index in 0..<count {
      let number = Double(numbers[index])
      let error = abs(Double(results[index]) - number)
      squares += number * number
      errorSquares += error * error
      largestError = max(largestError, error)
    }
    // A number that is not finite makes its square so.
    if !squares.isFinite || !errorSquares.isFinite {
      for index in 0..<count {
        if !numbers[index].isFinite { sourceIsFinite = false }
        if !results[index].isFinite { resultIsFinite = false }
      }
    }
  }

  static func + (left: ErrorSums, right: ErrorSums) -> ErrorSums {
    ErrorSums(
      squares: left.squares + right.squares, errorSquares: left.errorSquares + right.errorSquares,
      largestError: max(left.largestError, right.largestError),
      sourceIsFinite: left.sourceIsFinite && right.sourceIsFinite,
      resultIsFinite: left.resultIsFinite && right.resultIsFinite)
  }
}

/// A matrix [outputs, inputs] whose numbers are integers times scales: w = (code - zero) * scale.
struct IntegerMatrix: Sendable {
  var outputs: Int
  var inputs: Int
  /// Groups of inputs that share a scale.
  var groups: Int
  /// [outputs, inputs]. int8 codes are stored as their two's complement.
  var codes: [UInt8]
  /// [outputs, groups]
  var scales: [Float]
  /// [outputs, groups]; empty for int8.
  var zeros: [UInt8]
  var error: ErrorSums
}

/// Rounds matrices to integers, in parallel over outputs.
struct IntegerQuantizer: @unchecked Sendable {
  // Unchecked: rows of the results are written by one thread each.

  let worker: CPUBackend

  private struct Results: @unchecked Sendable {
    let codes: UnsafeMutablePointer<UInt8>
    let scales: UnsafeMutablePointer<Float>
    let zeros: UnsafeMutablePointer<UInt8>
    let errors: UnsafeMutablePointer<ErrorSums>
  }

  private func run(
    _ source: RowSource, groups: Int, hasZeros: Bool,
    _ row:
      @Sendable (
        _ numbers: UnsafePointer<Float>, _ codes: UnsafeMutablePointer<UInt8>, _ scales: UnsafeMutablePointer<Float>,
        _ zeros: UnsafeMutablePointer<UInt8>, _ results: UnsafeMutablePointer<Float>
      ) -> Void
  ) -> IntegerMatrix {
    let (outputs, inputs) = (source.rows, source.columns)
    var codes = [UInt8](repeating: 0, count: outputs * inputs)
    var scales = [Float](repeating: 0, count: outputs * groups)
    var zeros = [UInt8](repeating: 0, count: hasZeros ? outputs * groups : 1)
    let rowsPerChunk = max(1, (1 << 15) / max(inputs, 1))
    let chunks = (outputs + rowsPerChunk - 1) / rowsPerChunk
    var errors = [ErrorSums](repeating: ErrorSums(), count: max(chunks, 1))
    codes.withUnsafeMutableBufferPointer { codes in
      scales.withUnsafeMutableBufferPointer { scales in
        zeros.withUnsafeMutableBufferPointer { zeros in
          errors.withUnsafeMutableBufferPointer { errors in
            let out = Results(
              codes: codes.baseAddress!, scales: scales.baseAddress!, zeros: zeros.baseAddress!,
              errors: errors.baseAddress!)
            worker.parallel(chunks: chunks) { chunk in
              withUnsafeTemporaryAllocation(of: Float.self, capacity: 2 * inputs) { scratch in
                let numbers = scratch.baseAddress!
                let results = numbers + inputs
                var sums = ErrorSums()
                for output in chunk * rowsPerChunk..<min(outputs, (chunk + 1) * rowsPerChunk) {
                  source.read(output, to: numbers)
                  row(
                    numbers, out.codes + output * inputs, out.scales + output * groups,
                    hasZeros ? out.zeros + output * groups : out.zeros, results)
                  sums.add(numbers, results, count: inputs)
                }
                out.errors[chunk] = sums
              }
            }
          }
        }
      }
    }
    return IntegerMatrix(
      outputs: outputs, inputs: inputs, groups: groups, codes: codes, scales: scales, zeros: hasZeros ? zeros : [],
      error: errors.reduce(ErrorSums(), +))
  }

  /// int8 with a scale for each output, the largest magnitude at 127 and ties to even: what the engine computes when it
  /// rounds weights to int8 while loading, bit for bit.
  func int8(_ source: RowSource) -> IntegerMatrix {
    let inputs = source.columns
    return run(source, groups: 1, hasZeros: false) { numbers, codes, scales, _, results in
      var largest: Float = 0
      for index in 0..<inputs { largest = max(largest, abs(numbers[index])) }
      var factor = largest > 0 ? 127 / largest : 0
      if !(factor <= 3.0e38) { factor = 0 }
      let scale = factor > 0 ? largest / 127 : 0
      scales[0] = scale
      for index in 0..<inputs {
        let rounded = min(max(numbers[index] * factor, -127), 127).rounded(.toNearestOrEven)
        let code = rounded.isNaN ? 0 : Int8(rounded)
        codes[index] = UInt8(bitPattern: code)
        results[index] = Float(code) * scale
      }
    }
  }

  /// Codes of 4 bits in groups of inputs.
  ///
  /// For each group some ranges are tried, from the whole one down to 0.7 of it, and the one with the least squared error
  /// is taken: a few clipped numbers may cost less than a coarser step for all. Codes are rounded with the scale as the
  /// file will hold it, so the rounding of the scale does not add to the error.
  /// - Parameters:
  ///   - groupSize: divides the number of inputs.
  ///   - scaleType: the type in which scales are stored.
  func int4(_ source: RowSource, groupSize: Int, isSymmetric: Bool, scaleType: DType) -> IntegerMatrix {
    let inputs = source.columns
    let groups = inputs / groupSize
    return run(source, groups: groups, hasZeros: true) { numbers, codes, scales, zeros, results in
      for group in 0..<groups {
        let x = numbers + group * groupSize
        var (least, most) = (Float(0), Float(0))
        for index in 0..<groupSize { (least, most) = (min(least, x[index]), max(most, x[index])) }
        // A zero of 0 is left out below, so a group without negative numbers has one code less.
        let steps: Float = -least < (most - least) / 30 ? 14 : 15
        let whole = isSymmetric ? max(-least, most) / 7.5 : (most - least) / steps
        var best = (scale: Float(1), zero: Float(8), error: Float.infinity)
        for trial in 0...12 where whole > 0 && whole.isFinite {
          let scale = Self.rounded(whole * (1 - 0.025 * Float(trial)), to: scaleType)
          guard scale > 0, scale.isFinite else { continue }
          // Some readers cannot hold a zero of 0.
          let zero = isSymmetric ? 8 : min(max((-least / scale).rounded(.toNearestOrEven), 1), 15)
          let inverse = 1 / scale
          guard inverse.isFinite else { continue }
          var error: Float = 0
          for index in 0..<groupSize {
            let code = min(max((x[index] * inverse).rounded(.toNearestOrEven) + zero, 0), 15)
            let difference = (code - zero) * scale - x[index]
            error += difference * difference
          }
          if error < best.error { best = (scale, zero, error) }
        }
        scales[group] = best.scale
        zeros[group] = UInt8(best.zero)
        for index in 0..<groupSize {
          let code = min(max((x[index] / best.scale).rounded(.toNearestOrEven) + best.zero, 0), 15)
          codes[group * groupSize + index] = code.isNaN ? 8 : UInt8(code)
          results[group * groupSize + index] = (code - best.zero) * best.scale
        }
      }
    }
  }

  private static func rounded(_ number: Float, to type: DType) -> Float {
    switch type {
    case .float16: Float(Float16(number))
    case .bfloat16: Float(bitPattern: UInt32(bfloat16(number)) << 16)
    default: number
    }
  }
}

/// Puts codes into 32-bit words, as the formats want them.
extension IntegerMatrix {
  private func words(_ count: Int, _ word: (Int) -> UInt32) -> [UInt8] {
    [UInt8](unsafeUninitializedCapacity: 4 * count) { bytes, initialized in
      let raw = UnsafeMutableRawBufferPointer(bytes)
      for index in 0..<count { raw.storeBytes(of: word(index).littleEndian, toByteOffset: 4 * index, as: UInt32.self) }
      initialized = 4 * count
    }
  }

  /// [outputs, inputs / 8 rounded up]: eight inputs in a word, lowest bits first (compressed-tensors `weight_packed`).
  var packedByRow: [UInt8] {
    let perRow = (inputs + 7) / 8
    return codes.withUnsafeBufferPointer { codes in
      words(outputs * perRow) { index in
        let (output, word) = index.quotientAndRemainder(dividingBy: perRow)
        var value: UInt32 = 0
        for offset in 0..<min(8, inputs - 8 * word) {
          value |= UInt32(codes[output * inputs + 8 * word + offset]) << UInt32(4 * offset)
        }
        return value
      }
    }
  }

  /// [outputs / 8 rounded up, groups]: zeros of eight outputs in a word (compressed-tensors `weight_zero_point`).
  var zerosPackedByColumn: [UInt8] {
    words((outputs + 7) / 8 * groups) { index in
      let (word, group) = index.quotientAndRemainder(dividingBy: groups)
      var value: UInt32 = 0
      for offset in 0..<min(8, outputs - 8 * word) {
        value |= UInt32(zeros[(8 * word + offset) * groups + group]) << UInt32(4 * offset)
      }
      return value
    }
  }

  /// [inputs / 8, outputs]: eight inputs in a word (GPTQ `qweight`).
  var packedByInput: [UInt8] {
    codes.withUnsafeBufferPointer { codes in
      words(inputs / 8 * outputs) { index in
        let (word, output) = index.quotientAndRemainder(dividingBy: outputs)
        var value: UInt32 = 0
        for offset in 0..<8 { value |= UInt32(codes[output * inputs + 8 * word + offset]) << UInt32(4 * offset) }
        return value
      }
    }
  }

  /// [groups, outputs / 8]: zeros minus one of eight outputs in a word (GPTQ `qzeros`, format v1).
  var zerosPackedByOutput: [UInt8] {
    words(groups * (outputs / 8)) { index in
      let (group, word) = index.quotientAndRemainder(dividingBy: outputs / 8)
      var value: UInt32 = 0
      for offset in 0..<8 { value |= UInt32(zeros[(8 * word + offset) * groups + group] - 1) << UInt32(4 * offset) }
      return value
    }
  }

  /// Where AWQ keeps the bits of the output that is at `offset` among the eight of a word.
  private static func awqShift(_ offset: Int) -> UInt32 { UInt32(4 * (offset / 2 + offset % 2 * 4)) }

  /// [inputs, outputs / 8]: eight outputs in a word, in AWQ's order (`qweight`).
  var packedForAWQ: [UInt8] {
    codes.withUnsafeBufferPointer { codes in
      words(inputs * (outputs / 8)) { index in
        let (input, word) = index.quotientAndRemainder(dividingBy: outputs / 8)
        var value: UInt32 = 0
        for offset in 0..<8 {
          value |= UInt32(codes[(8 * word + offset) * inputs + input]) << Self.awqShift(offset)
        }
        return value
      }
    }
  }

  /// [groups, outputs / 8]: zeros in AWQ's order (`qzeros`).
  var zerosPackedForAWQ: [UInt8] {
    words(groups * (outputs / 8)) { index in
      let (group, word) = index.quotientAndRemainder(dividingBy: outputs / 8)
      var value: UInt32 = 0
      for offset in 0..<8 { value |= UInt32(zeros[(8 * word + offset) * groups + group]) << Self.awqShift(offset) }
      return value
    }
  }

  /// Scales as numbers of a type: [outputs, groups], or transposed.
  func scaleBytes(_ type: DType, isTransposed: Bool = false) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.reserveCapacity(scales.count * type.byteCount)
    for index in scales.indices {
      let number = isTransposed ? scales[index % outputs * groups + index / outputs] : scales[index]
      switch type {
      case .float16: withUnsafeBytes(of: Float16(number).bitPattern.littleEndian) { bytes.append(contentsOf: $0) }
      case .bfloat16: withUnsafeBytes(of: bfloat16(number).littleEndian) { bytes.append(contentsOf: $0) }
      default: withUnsafeBytes(of: number.bitPattern.littleEndian) { bytes.append(contentsOf: $0) }
      }
    }
    return bytes
  }
}
