public import ApusCore
public import ApusTensors

/// Layers that stay quantised: the codes of the file are repacked, not turned into numbers. Formulas and layouts are those
/// that `QuantizedCheckpoint` states.
extension QuantizedCheckpoint {
  /// A matrix as it is stored, or `nil` if it is stored as plain numbers or in a way for which there are no kernels: groups
  /// of a size that `CodeLayout` does not allow, act-order with groups of unequal sizes, and integers of 8 bits with a
  /// scale for each output, for which `WeightFormat.int8PerChannel` is meant.
  public func quantized(_ name: String, shape: [Int]) throws(EngineError) -> QuantizedSource? {
    guard shape.count == 2, checkpoint.dtype(of: name) == nil, let module = Self.module(of: name),
      let scheme = quantization.scheme(for: module)
    else { return nil }
    let (outputs, inputs) = (shape[0], shape[1])
    guard outputs > 0, inputs > 0 else { return nil }
    switch scheme {
    case .gptq(let bits, let groupSize, let zeroOffset, let actOrder):
      return try gptqCodes(
        module, outputs, inputs, bits: bits, groupSize: groupSize, zeroOffset: zeroOffset, actOrder: actOrder)
    case .awq(let groupSize): return try awqCodes(module, outputs, inputs, groupSize: groupSize)
    case .packedInteger(let bits, let scales, let isSymmetric, let actOrder):
      let words = (inputs + 32 / bits - 1) / (32 / bits)
      let codes = try stored(module + ".weight_packed", types: ["I32"], shapes: [[outputs, words]])
      try checkShape(module, outputs, inputs)
      guard let parts = try rowScales(module, outputs, inputs, scales, actOrder: actOrder, bits: bits) else {
        return nil
      }
      let zeros = isSymmetric ? nil : try packedZeros(module, outputs, parts.groups, bits: bits, scales: scales)
      guard isSymmetric || zeros != nil else { return nil }
      var layout = parts.layout
      layout.bits = bits
      if isSymmetric { layout.offset = 1 << (bits - 1) } else { layout.minimum = .zeroPoint }
      let (order, groups, scaleNumbers) = (parts.order, parts.groups, parts.scales)
      let perGroup = parts.perOutput ? outputs : 1
      return QuantizedSource(
        layout: layout, rows: outputs, columns: inputs, order: order, storedBytes: outputs * words * 4
      ) { range, rows in
        let (shift, low, mask) = bits == 4 ? (3, 7, UInt32(15)) : (2, 3, UInt32(255))
        for (i, output) in range.enumerated() {
          let source = codes.address + 4 * output * words
          for place in 0..<inputs {
            let k = order.map { Int($0[place]) } ?? place
            let word = source.loadUnaligned(fromByteOffset: 4 * (k >> shift), as: UInt32.self)
            rows.codes[i * inputs + place] = UInt8(word >> UInt32((k & low) * bits) & mask)
          }
          let from = perGroup == 1 ? 0 : output * groups
          for group in 0..<groups {
            rows.scales[i * groups + group] = scaleNumbers[from + group]
            if let zeros { rows.minimumFactors[i * groups + group] = zeros[from + group] }
          }
        }
      }
    case .integer8(let scales, let isSymmetric, let actOrder):
      guard case .group = scales else { return nil }
      let codes = try stored(name, types: ["I8"], shapes: [shape])
      guard let parts = try rowScales(module, outputs, inputs, scales, actOrder: actOrder, bits: 8) else { return nil }
      var layout = parts.layout
      let (order, groups, scaleNumbers) = (parts.order, parts.groups, parts.scales)
      var zeros: StoredTensor?
      if isSymmetric {
        layout.offset = 128
      } else {
        zeros = try stored(module + ".weight_zero_point", types: ["I8"], shapes: [[outputs, groups]])
        layout.minimum = .zeroPoint
      }
      return QuantizedSource(
        layout: layout, rows: outputs, columns: inputs, order: order, storedBytes: outputs * inputs
      ) { [zeros] range, rows in
        for (i, output) in range.enumerated() {
          for place in 0..<inputs {
            let k = order.map { Int($0[place]) } ?? place
            rows.codes[i * inputs + place] = codes.load(output * inputs + k, as: UInt8.self) ^ 0x80
          }
          for group in 0..<groups {
            rows.scales[i * groups + group] = scaleNumbers[output * groups + group]
            if let zeros {
              rows.minimumFactors[i * groups + group] = zeros.load(output * groups + group, as: UInt8.self) ^ 0x80
            }
          }
        }
      }
    case .float8(let scales): return try float8Codes(name, module, outputs, inputs, scales)
    }
  }

  // MARK: GPTQ and AWQ

  private func gptqCodes(
    _ module: String, _ outputs: Int, _ inputs: Int, bits: Int, groupSize: Int, zeroOffset: Int, actOrder: Bool
  ) throws(EngineError) -> QuantizedSource? {
    let perWord = 32 / bits
    let groups = groupSize == 0 ? 1 : (inputs + groupSize - 1) / groupSize
    guard outputs % perWord == 0, inputs % perWord == 0,
      var layout = CodeLayout(bits: bits, groupSize: 128).withGroups(groupSize, inputs: inputs)
    else { return nil }
    let weights = try stored(module + ".qweight", types: ["I32"], shapes: [[inputs / perWord, outputs]])
    let zeros = try stored(module + ".qzeros", types: ["I32"], shapes: [[groups, outputs / perWord]])
    let scaleTensor = try stored(module + ".scales", types: Self.scaleTypes, shapes: [[groups, outputs]])
    let indices = try groupIndices(
      module + ".g_idx", inputs: inputs, groupSize: groupSize, groups: groups, isRequired: actOrder)
    let (isPossible, order) = Self.order(indices, groupSize: groupSize == 0 ? inputs : groupSize)
    guard isPossible else { return nil }
    layout.scaleType = scaleTensor.numberType
    let mask = UInt32(1) << UInt32(bits) - 1
    let (scales, words) = (scaleTensor.floats(), outputs / perWord)
    var zeroCodes = [UInt8](repeating: 0, count: groups * outputs)
    for group in 0..<groups {
      for output in 0..<outputs {
        let word = zeros.load(group * words + output / perWord, as: UInt32.self)
        zeroCodes[group * outputs + output] = UInt8(
          (word >> UInt32(output % perWord * bits) &+ UInt32(zeroOffset)) & mask)
      }
    }
    // Zero points in the middle, as symmetric quantisation has them, need not be stored.
    let isSymmetric = zeroCodes.allSatisfy { $0 == 1 << (bits - 1) }
    if isSymmetric { layout.offset = 1 << (bits - 1) } else { layout.minimum = .zeroPoint }
    return QuantizedSource(
      layout: layout, rows: outputs, columns: inputs, order: order, storedBytes: inputs / perWord * outputs * 4
    ) { [zeroCodes] range, rows in
      for place in 0..<inputs {
        let k = order.map { Int($0[place]) } ?? place
        let line = weights.address + 4 * (k / perWord * outputs)
        let shift = UInt32(k % perWord * bits)
        for (i, output) in range.enumerated() {
          let word = line.loadUnaligned(fromByteOffset: 4 * output, as: UInt32.self)
          rows.codes[i * inputs + place] = UInt8(word >> shift & mask)
        }
      }
      for (i, output) in range.enumerated() {
        for group in 0..<groups {
          rows.scales[i * groups + group] = scales[group * outputs + output]
          if !isSymmetric { rows.minimumFactors[i * groups + group] = zeroCodes[group * outputs + output] }
        }
      }
    }
  }

  private func awqCodes(
    _ module: String, _ outputs: Int, _ inputs: Int, groupSize: Int
  ) throws(EngineError) -> QuantizedSource? {
    let size = groupSize == 0 ? inputs : groupSize
    let groups = (inputs + size - 1) / size
    guard outputs % 8 == 0, var layout = CodeLayout(bits: 4, groupSize: 128).withGroups(groupSize, inputs: inputs)
    else { return nil }
    let words = outputs / 8
    let weights = try stored(module + ".qweight", types: ["I32"], shapes: [[inputs, words]])
    let zeros = try stored(module + ".qzeros", types: ["I32"], shapes: [[groups, words]])
    let scaleTensor = try stored(module + ".scales", types: Self.scaleTypes, shapes: [[groups, outputs]])
    layout.scaleType = scaleTensor.numberType
    layout.minimum = .zeroPoint
    let scales = scaleTensor.floats()
    return QuantizedSource(
      layout: layout, rows: outputs, columns: inputs, storedBytes: inputs * words * 4
    ) { range, rows in
      for k in 0..<inputs {
        let line = weights.address + 4 * k * words
        for (i, output) in range.enumerated() {
          let word = line.loadUnaligned(fromByteOffset: 4 * (output / 8), as: UInt32.self)
          rows.codes[i * inputs + k] = UInt8(word >> Self.awqShift(output % 8) & 15)
        }
      }
      for (i, output) in range.enumerated() {
        for group in 0..<groups {
          rows.scales[i * groups + group] = scales[group * outputs + output]
          let word = zeros.load(group * words + output / 8, as: UInt32.self)
          rows.minimumFactors[i * groups + group] = UInt8(word >> Self.awqShift(output % 8) & 15)
        }
      }
    }
  }

  /// The order that puts groups of equal size one after the other; `nil` where inputs are in that order already.
  private static func order(_ indices: [Int32], groupSize: Int) -> (isPossible: Bool, order: [Int32]?) {
    if indices.indices.allSatisfy({ Int(indices[$0]) == $0 / groupSize }) { return (true, nil) }
    var order = indices.indices.map(Int32.init)
    order.sort { (indices[Int($0)], $0) < (indices[Int($1)], $1) }
    for place in order.indices where Int(indices[Int(order[place])]) != place / groupSize { return (false, nil) }
    return (true, order)
  }

  // MARK: Rows of outputs

  /// The scales of a layer whose codes lie in rows of outputs.
  private struct RowScales {
    var layout: CodeLayout
    var order: [Int32]?
    var groups: Int
    /// [outputs, groups], or [groups] where all outputs share them.
    var scales: [Float]
    var perOutput: Bool
  }

  private func rowScales(
    _ module: String, _ outputs: Int, _ inputs: Int, _ scales: QuantizationConfiguration.Scales, actOrder: Bool,
    bits: Int
  ) throws(EngineError) -> RowScales? {
    let shapes: [[Int]]
    var (size, groups, perOutput) = (0, 1, true)
    switch scales {
    case .tensor: (shapes, perOutput) = ([[], [1], [1, 1]], false)
    case .channel: shapes = [[outputs, 1], [outputs]]
    case .group(let count):
      (size, groups) = (count, (inputs + count - 1) / count)
      shapes = [[outputs, groups]]
    case .block, .tensorOrChannel: return nil
    }
    guard var layout = CodeLayout(bits: bits, groupSize: 128).withGroups(size, inputs: inputs) else { return nil }
    let tensor = try stored(module + ".weight_scale", types: Self.scaleTypes, shapes: shapes)
    layout.scaleType = tensor.numberType
    var order: [Int32]?
    if actOrder {
      let indices = try groupIndices(
        module + ".weight_g_idx", inputs: inputs, groupSize: size, groups: groups, isRequired: true)
      let (isPossible, found) = Self.order(indices, groupSize: size == 0 ? inputs : size)
      guard isPossible else { return nil }
      order = found
    }
    return RowScales(
      layout: layout, order: order, groups: groups, scales: tensor.floats(), perOutput: perOutput)
  }

  /// Zero points of packed integers plus 2^(bits - 1), [outputs, groups]; `nil` where one zero point is for all outputs.
  private func packedZeros(
    _ module: String, _ outputs: Int, _ groups: Int, bits: Int, scales: QuantizationConfiguration.Scales
  ) throws(EngineError) -> [UInt8]? {
    if scales == .tensor { return nil }
    let perWord = 32 / bits
    let tensor = try stored(
      module + ".weight_zero_point", types: ["I32"], shapes: [[(outputs + perWord - 1) / perWord, groups]])
    let mask = UInt32(1) << UInt32(bits) - 1
    return (0..<outputs * groups).map { index in
      let (output, group) = index.quotientAndRemainder(dividingBy: groups)
      let word = tensor.load(output / perWord * groups + group, as: UInt32.self)
      return UInt8(word >> UInt32(output % perWord * bits) & mask)
    }
  }

  /// Whether one of some float8 numbers is no number.
  private static func hasNaN(_ codes: UnsafeRawPointer, count: Int) -> Bool {
    for word in 0..<count / 8 {
      // A byte of zeros where all bits but the sign are set.
      let low = ~codes.loadUnaligned(fromByteOffset: 8 * word, as: UInt64.self) & 0x7F7F_7F7F_7F7F_7F7F
      if (low &- 0x0101_0101_0101_0101) & ~low & 0x8080_8080_8080_8080 != 0 { return true }
    }
    return (count / 8 * 8..<count).contains { codes.load(fromByteOffset: $0, as: UInt8.self) & 127 == 127 }
  }

  private func float8Codes(
    _ name: String, _ module: String, _ outputs: Int, _ inputs: Int, _ scales: QuantizationConfiguration.Scales
  ) throws(EngineError) -> QuantizedSource? {
    let one = [[], [1], [1, 1]]
    let each = [[outputs, 1], [outputs]]
    var (height, width, shapes) = (outputs, 0, one)
    switch scales {
    case .tensor: break
    case .channel: (height, shapes) = (1, each)
    case .tensorOrChannel: shapes = one + each
    case .group(let size): (height, width, shapes) = (1, size, [[outputs, (inputs + size - 1) / size]])
    case .block(let rows, let columns):
      (height, width) = (rows, columns)
      shapes = [[(outputs + rows - 1) / rows, (inputs + columns - 1) / columns]]
    }
    guard width != 16,
      let layout = CodeLayout(bits: 8, levels: .e4m3, groupSize: 128, scaleType: .float32)
        .withGroups(width, inputs: inputs)
    else { return nil }
    let codes = try stored(name, types: ["F8_E4M3"], shapes: [[outputs, inputs]])
    let suffix = checkpoint.contains(module + ".weight_scale_inv") ? ".weight_scale_inv" : ".weight_scale"
    // `load` names what is missing.
    guard checkpoint.contains(module + suffix) else { return nil }
    let tensor = try stored(module + suffix, types: Self.scaleTypes + ["F8_E8M0"], shapes: shapes)
    if scales == .tensorOrChannel, !one.contains(tensor.entry.shape) { height = 1 }
    // The kernels know no NaN: a file with one is left to the form that does.
    if Self.hasNaN(codes.address, count: outputs * inputs) { return nil }
    let (numbers, groups, rowsPerScale) = (tensor.floats(), layout.groupCount(inputs), height)
    return QuantizedSource(
      layout: layout, rows: outputs, columns: inputs, storedBytes: outputs * inputs
    ) { range, rows in
      for (i, output) in range.enumerated() {
        for k in 0..<inputs { rows.codes[i * inputs + k] = codes.load(output * inputs + k, as: UInt8.self) }
        for group in 0..<groups {
          rows.scales[i * groups + group] = numbers[output / rowsPerScale * groups + group]
        }
      }
    }
  }
}
