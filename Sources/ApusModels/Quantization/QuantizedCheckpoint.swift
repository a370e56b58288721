public import ApusCore
public import ApusTensors

/// A Hugging Face checkpoint whose linear layers are quantised, seen as one of plain numbers.
///
/// A matrix for which there are kernels can be had as it is stored (`quantized`). Others, and those of a caller who wants
/// numbers, are turned into float32 when they are asked for (`load`) and given up once they are packed, so there is never
/// a second copy of the model. What is stored decides: a layer whose `.weight` is F32, F16 or BF16 is read as it is,
/// whether or not the configuration lists it as unquantised; a layer that is listed so is never dequantised.
///
/// W8A8 of compressed-tensors, symmetric int8 with a scale for each output and inputs rounded per token, is the engine's
/// own int8 format: its integers and scales are taken as they are (`loadInt8`). Other integers with a scale for each
/// output have no codes and go through float32, since `WeightFormat.int8PerChannel` would compute scales of its own.
///
/// The formulas, all in float32 with the operations in this order (n an output, k an input, g its group):
/// - GPTQ: w[n, k] = (q[n, k] - z[g, n]) * s[g, n]; g is `g_idx[k]`, or k / group size. q and z are unsigned; z is the
///   stored number plus one modulo 2^bits in format v1, as later versions of AutoGPTQ have it (earlier ones take 2^bits
///   where the largest number is stored). `qweight` packs inputs, `qzeros` outputs, lowest bits first.
///   Source: AutoGPTQ, `nn_modules/qlinear/qlinear_cuda.py` and `qlinear_cuda_old.py`; GPTQModel for `gptq_v2`.
/// - AWQ: the same formula with g = k / group size; `qweight` and `qzeros` pack eight outputs in a word, in the order
///   0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits. Source: AutoAWQ, `awq/utils/packing_utils.py`.
/// - compressed-tensors: w[n, k] = (q[n, k] - z[n, g]) * s[n, g] with signed q and z, which packed words hold plus
///   2^(bits - 1), lowest bits first; words pack inputs of weights and outputs of zero points.
///   A g that is not k / group size comes from `weight_g_idx`.
///   Source: compressed-tensors, `quantization/lifecycle/forward.py` and `compressors/`.
/// - fp8: w[n, k] = q[n, k] * s[n / block rows, k / block columns]. `weight_scale_inv` is this factor itself, in spite of
///   its name. Source: DeepSeek-V3, `inference/kernel.py` (`weight_dequant`).
///
/// Where a reference implementation rounds the result to float16 or bfloat16, this does not; packing rounds once.
public final class QuantizedCheckpoint: WeightStore {
  public let origin: String
  public let byteCount: Int
  let checkpoint: SafetensorsCheckpoint
  let quantization: QuantizationConfiguration
  private let helper: CPUBackend?
  public var mappedFiles: [MappedFile] { checkpoint.mappedFiles }

  /// Describes a quantised checkpoint.
  /// - Parameter helper: dequantises on its threads; without one the caller's thread does it.
  public init(
    _ checkpoint: SafetensorsCheckpoint, _ quantization: QuantizationConfiguration, helper: CPUBackend? = nil
  ) {
    self.checkpoint = checkpoint
    self.quantization = quantization
    self.helper = helper
    origin = checkpoint.origin
    // Progress counts the numbers that `load` hands out.
    var total = 0
    for name in checkpoint.tensorNames {
      guard let (_, entry) = checkpoint.entry(name) else { continue }
      let bytes = entry.end - entry.begin
      let module = Self.module(of: name)
      if module == nil, !name.hasSuffix(".qweight"), !name.hasSuffix(".weight_packed") { continue }
      switch (entry.typeName, module.map { quantization.scheme(for: $0) } ?? nil) {
      case ("I32", nil):
        let layer = String(name[..<(name.lastIndex(of: ".") ?? name.endIndex)])
        total += bytes * 32 / Self.bits(quantization.scheme(for: layer))
      case ("I8", _), ("F8_E4M3", _): total += 4 * bytes
      default: total += bytes
      }
    }
    byteCount = total
  }

  public func integers(_ name: String, count: Int) throws(EngineError) -> [Int]? {
    try checkpoint.integers(name, count: count)
  }

  public func contains(_ name: String) -> Bool {
    guard let module = Self.module(of: name) else { return checkpoint.contains(name) }
    return checkpoint.contains(name) || checkpoint.contains(module + ".qweight")
      || checkpoint.contains(module + ".weight_packed")
  }

  /// The format in which a weight is packed unless a caller chooses: bfloat16 for one that is stored quantised.
  public func dtype(of name: String) -> DType? {
    if let dtype = checkpoint.dtype(of: name) { return dtype }
    guard let module = Self.module(of: name), contains(name) else { return nil }
    return quantization.scheme(for: module) == nil ? nil : .bfloat16
  }

  /// A weight's numbers: float32 for one that is stored quantised, else as they are in the file.
  public func load(_ name: String, shape: [Int], role: WeightRole) throws(EngineError) -> WeightSource {
    guard shape.count == 2, checkpoint.dtype(of: name) == nil, let module = Self.module(of: name),
      let scheme = quantization.scheme(for: module)
    else { return try checkpoint.load(name, shape: shape, role: role) }
    let (outputs, inputs) = (shape[0], shape[1])
    let memory: DeviceMemory
    switch scheme {
    case .gptq(let bits, let groupSize, let zeroOffset, let actOrder):
      memory = try gptq(
        module, outputs, inputs, bits: bits, groupSize: groupSize, zeroOffset: zeroOffset, actOrder: actOrder)
    case .awq(let groupSize):
      memory = try awq(module, outputs, inputs, groupSize: groupSize)
    case .packedInteger(let bits, let scales, let isSymmetric, let actOrder):
      let words = (inputs + 32 / bits - 1) / (32 / bits)
      let codes = try stored(module + ".weight_packed", types: ["I32"], shapes: [[outputs, words]])
      try checkShape(module, outputs, inputs)
      memory = try rowMajor(
        module, outputs, inputs, codes: .packed(codes, bits: bits, words: words), scales: scales,
        zeroBits: isSymmetric ? nil : bits, actOrder: actOrder)
    case .integer8(let scales, let isSymmetric, let actOrder):
      let codes = try stored(name, types: ["I8"], shapes: [shape])
      memory = try rowMajor(
        module, outputs, inputs, codes: .integer8(codes), scales: scales, zeroBits: isSymmetric ? nil : 8,
        actOrder: actOrder)
    case .float8(let scales):
      let codes = try stored(name, types: ["F8_E4M3"], shapes: [shape])
      memory = try rowMajor(
        module, outputs, inputs, codes: .float8(codes), scales: scales, zeroBits: nil, actOrder: false)
    }
    return WeightSource(
      address: UnsafeRawPointer(memory.address), dtype: .float32, rows: outputs, columns: inputs, owner: memory)
  }

  public func loadInt8(_ name: String, shape: [Int]) throws(EngineError) -> WeightSource? {
    guard shape.count == 2, let module = Self.module(of: name), checkpoint.dtype(of: name) == nil,
      let group = quantization.group(for: module), group.roundsInputs,
      case .integer8(.channel, isSymmetric: true, actOrder: false) = group.scheme
    else { return nil }
    let codes = try stored(name, types: ["I8"], shapes: [shape])
    let scales = try stored(module + ".weight_scale", types: Self.scaleTypes, shapes: [[shape[0], 1], [shape[0]]])
    let numbers = scales.floats()
    let memory = try CPUBackend.hostMemory(byteCount: 4 * numbers.count)
    let address = memory.address.assumingMemoryBound(to: Float.self)
    address.update(from: numbers, count: numbers.count)
    return WeightSource(
      address: codes.address, dtype: .int8, rows: shape[0], columns: shape[1], scales: UnsafePointer(address),
      owner: Int8Memory(file: codes.file, scales: memory))
  }

  // MARK: Tensors

  static func module(of name: String) -> String? {
    name.hasSuffix(".weight") ? String(name.dropLast(7)) : nil
  }

  private static func bits(_ scheme: QuantizationConfiguration.Scheme?) -> Int {
    switch scheme {
    case .gptq(let bits, _, _, _), .packedInteger(let bits, _, _, _): bits
    case .awq: 4
    default: 8
    }
  }

  /// A tensor of the checkpoint that has one of some types and shapes.
  func stored(_ name: String, types: [String], shapes: [[Int]]) throws(EngineError) -> StoredTensor {
    guard let (file, entry) = checkpoint.entry(name) else {
      throw EngineError(
        .invalidCheckpoint,
        "\(origin): tensor \(name) is missing; config.json says that the weights are stored by the method "
          + "\(quantization.method), which needs one of shape \(Self.list(shapes)).")
    }
    let tensor = StoredTensor(name: name, file: file, entry: entry)
    guard types.contains(entry.typeName) else {
      throw tensor.broken(
        "has type \(entry.typeName), but the method \(quantization.method) stores it as "
          + types.joined(separator: " or "))
    }
    guard shapes.contains(entry.shape) else {
      throw tensor.broken(
        "has shape \(entry.shape), but config.json and the method \(quantization.method) ask for \(Self.list(shapes))")
    }
    return tensor
  }

  private static func list(_ shapes: [[Int]]) -> String {
    shapes.map { "\($0)" }.joined(separator: " or ")
  }

  /// Packed integers have a tensor that states the shape.
  func checkShape(_ module: String, _ outputs: Int, _ inputs: Int) throws(EngineError) {
    guard checkpoint.contains(module + ".weight_shape") else { return }
    let tensor = try stored(module + ".weight_shape", types: ["I64"], shapes: [[2]])
    guard tensor.load(0, as: Int64.self) == outputs, tensor.load(1, as: Int64.self) == inputs else {
      throw tensor.broken(
        "says [\(tensor.load(0, as: Int64.self)), \(tensor.load(1, as: Int64.self))], but config.json asks for "
          + "[\(outputs), \(inputs)]")
    }
  }

  /// The group of each input: from a tensor where there is one, else a division.
  func groupIndices(
    _ name: String, inputs: Int, groupSize: Int, groups: Int, isRequired: Bool
  ) throws(EngineError) -> [Int32] {
    guard isRequired || checkpoint.contains(name) else {
      return (0..<inputs).map { Int32(groupSize == 0 ? 0 : $0 / groupSize) }
    }
    let tensor = try stored(name, types: ["I32"], shapes: [[inputs]])
    var indices: [Int32] = []
    indices.reserveCapacity(inputs)
    for input in 0..<inputs {
      let index = tensor.load(input, as: Int32.self)
      guard index >= 0, index < groups else {
        throw tensor.broken("puts input \(input) into group \(index), but there are \(groups) groups")
      }
      indices.append(index)
    }
    return indices
  }

  // MARK: Dequantisation

  /// Runs chunks on the helper's threads, or one after the other.
  private func forEach(chunks: Int, _ body: @Sendable (_ chunk: Int) -> Void) {
    if let helper { return helper.parallel(chunks: chunks, body) }
    for chunk in 0..<chunks { body(chunk) }
  }

  /// GPTQ: `qweight` [inputs / per word, outputs], `qzeros` [groups, outputs / per word], `scales` [groups, outputs].
  private func gptq(
    _ module: String, _ outputs: Int, _ inputs: Int, bits: Int, groupSize: Int, zeroOffset: Int, actOrder: Bool
  ) throws(EngineError) -> DeviceMemory {
    let perWord = 32 / bits
    let groups = groupSize == 0 ? 1 : (inputs + groupSize - 1) / groupSize
    try divisible(module, outputs, inputs, by: perWord, both: true)
    let weights = try stored(module + ".qweight", types: ["I32"], shapes: [[inputs / perWord, outputs]])
    let zeros = try stored(module + ".qzeros", types: ["I32"], shapes: [[groups, outputs / perWord]])
    let scales = try stored(module + ".scales", types: Self.scaleTypes, shapes: [[groups, outputs]]).floats()
    let indices = try groupIndices(
      module + ".g_idx", inputs: inputs, groupSize: groupSize, groups: groups, isRequired: actOrder)

    let mask = UInt32(1) << UInt32(bits) - 1
    var zeroNumbers = [Float](repeating: 0, count: groups * outputs)
    for group in 0..<groups {
      for output in 0..<outputs {
        let word = zeros.load(group * (outputs / perWord) + output / perWord, as: UInt32.self)
        let zero = (word >> UInt32(output % perWord * bits) &+ UInt32(zeroOffset)) & mask
        zeroNumbers[group * outputs + output] = Float(zero)
      }
    }
    // A word whose inputs are all of one group, as without act-order, needs one scale and one zero.
    let isOrdered = (0..<inputs).allSatisfy { indices[$0] == indices[$0 / perWord * perWord] }
    let block = 32
    return try dequantize(outputs * inputs, scales, zeroNumbers, indices) { out, scale, zero, group in
      nonisolated(unsafe) let (out, words) = (out, weights.address)
      nonisolated(unsafe) let (scale, zero, group) = (scale, zero, group)
      forEach(chunks: (outputs + block - 1) / block) { chunk in
        let range = chunk * block..<min((chunk + 1) * block, outputs)
        for row in 0..<inputs / perWord {
          let first = row * perWord
          for output in range {
            var word = words.loadUnaligned(fromByteOffset: 4 * (row * outputs + output), as: UInt32.self)
            let target = out + output * inputs + first
            if isOrdered {
              let index = Int(group[first]) * outputs + output
              let (s, z) = (scale[index], zero[index])
              for offset in 0..<perWord {
                target[offset] = (Float(word & mask) - z) * s
                word >>= UInt32(truncatingIfNeeded: bits)
              }
            } else {
              for offset in 0..<perWord {
                let index = Int(group[first + offset]) * outputs + output
                target[offset] = (Float(word & mask) - zero[index]) * scale[index]
                word >>= UInt32(truncatingIfNeeded: bits)
              }
            }
          }
        }
      }
    }
  }

  /// AWQ: `qweight` [inputs, outputs / 8], `qzeros` [groups, outputs / 8], `scales` [groups, outputs].
  private func awq(
    _ module: String, _ outputs: Int, _ inputs: Int, groupSize: Int
  ) throws(EngineError) -> DeviceMemory {
    let groupSize = groupSize == 0 ? inputs : groupSize
    let groups = (inputs + groupSize - 1) / groupSize
    try divisible(module, outputs, inputs, by: 8, both: false)
    let weights = try stored(module + ".qweight", types: ["I32"], shapes: [[inputs, outputs / 8]])
    let zeros = try stored(module + ".qzeros", types: ["I32"], shapes: [[groups, outputs / 8]])
    let scales = try stored(module + ".scales", types: Self.scaleTypes, shapes: [[groups, outputs]]).floats()
    var zeroNumbers = [Float](repeating: 0, count: groups * outputs)
    for index in 0..<groups * outputs {
      let word = zeros.load(index / 8, as: UInt32.self)
      zeroNumbers[index] = Float(word >> Self.awqShift(index % 8) & 15)
    }
    let words = outputs / 8
    // Tiles of inputs by words, so that a line of either matrix is used whole before it leaves the cache.
    let (tile, block) = (64, 16)
    return try dequantize(outputs * inputs, scales, zeroNumbers, []) { out, scale, zero, _ in
      nonisolated(unsafe) let (out, codes) = (out, weights.address)
      nonisolated(unsafe) let (scale, zero) = (scale, zero)
      forEach(chunks: (words + block - 1) / block) { chunk in
        for start in stride(from: 0, to: inputs, by: tile) {
          for word in chunk * block..<min((chunk + 1) * block, words) {
            for input in start..<min(start + tile, inputs) {
              let packed = codes.loadUnaligned(fromByteOffset: 4 * (input * words + word), as: UInt32.self)
              let parameters = input / groupSize * outputs + 8 * word
              let target = out + 8 * word * inputs + input
              for offset in 0..<8 {
                let code = Float(packed >> Self.awqShift(offset) & 15)
                target[offset * inputs] = (code - zero[parameters + offset]) * scale[parameters + offset]
              }
            }
          }
        }
      }
    }
  }

  /// Where AWQ keeps the bits of the output that is at `offset` among the eight of a word.
  @inline(__always)
  static func awqShift(_ offset: Int) -> UInt32 {
    UInt32(truncatingIfNeeded: 4 * (offset / 2 + offset % 2 * 4))
  }

  /// Numbers that lie in rows of outputs.
  private enum Codes {
    case packed(StoredTensor, bits: Int, words: Int)
    case integer8(StoredTensor)
    case float8(StoredTensor)
  }

  static let scaleTypes = ["F32", "F16", "BF16"]

  /// compressed-tensors and fp8: numbers in rows of outputs, scales in rows of outputs or of blocks of them.
  /// - Parameter zeroBits: the bits of zero points; `nil` where there are none.
  private func rowMajor(
    _ module: String, _ outputs: Int, _ inputs: Int, codes: Codes, scales: QuantizationConfiguration.Scales,
    zeroBits: Int?, actOrder: Bool
  ) throws(EngineError) -> DeviceMemory {
    let one = [[], [1], [1, 1]]
    let each = [[outputs, 1], [outputs]]
    var (rows, columns, shapes) = (1, 1, one)
    var (rowBlock, columnBlock) = (max(outputs, 1), max(inputs, 1))
    switch scales {
    case .tensor: break
    case .channel: (rows, rowBlock, shapes) = (outputs, 1, each)
    case .tensorOrChannel: shapes = one + each
    case .group(let size):
      (rows, rowBlock, columns, columnBlock) = (outputs, 1, (inputs + size - 1) / size, size)
      shapes = [[rows, columns]]
    case .block(let height, let width):
      (rows, rowBlock) = ((outputs + height - 1) / height, height)
      (columns, columnBlock) = ((inputs + width - 1) / width, width)
      shapes = [[rows, columns]]
    }
    let suffix = checkpoint.contains(module + ".weight_scale_inv") ? ".weight_scale_inv" : ".weight_scale"
    // Names what the method needs where neither is there.
    let wanted =
      if case .block = scales, quantization.method == "fp8", !checkpoint.contains(module + suffix) {
        ".weight_scale_inv"
      } else { suffix }
    let scaleTensor = try stored(module + wanted, types: Self.scaleTypes + ["F8_E8M0"], shapes: shapes)
    let scaleNumbers = scaleTensor.floats()
    if scales == .tensorOrChannel, !one.contains(scaleTensor.entry.shape) { (rows, rowBlock) = (outputs, 1) }

    var zeroNumbers = [Float](repeating: 0, count: scaleNumbers.count)
    if let zeroBits {
      let perWord = 32 / zeroBits
      let packedShape = [(rows + perWord - 1) / perWord, columns]
      let isPacked: Bool
      if case .packed = codes { isPacked = scales != .tensor } else { isPacked = false }
      let zeros = try stored(
        module + ".weight_zero_point", types: [isPacked ? "I32" : "I8"], shapes: isPacked ? [packedShape] : shapes)
      for index in zeroNumbers.indices {
        if isPacked {
          let (row, column) = (index / columns, index % columns)
          let word = zeros.load(row / perWord * columns + column, as: UInt32.self)
          let code = word >> UInt32(row % perWord * zeroBits) & (UInt32(1) << UInt32(zeroBits) - 1)
          zeroNumbers[index] = Float(Int(code) - 1 << (zeroBits - 1))
        } else {
          zeroNumbers[index] = Float(zeros.load(index, as: Int8.self))
        }
      }
    }
    let indices =
      actOrder
      ? try groupIndices(
        module + ".weight_g_idx", inputs: inputs, groupSize: columnBlock, groups: columns, isRequired: true)
      : (0..<inputs).map { Int32($0 / columnBlock) }
    // Inputs in a row that share a scale.
    var runs: [(range: Range<Int>, group: Int)] = []
    var start = 0
    while start < inputs {
      var end = start + 1
      while end < inputs, indices[end] == indices[start] { end += 1 }
      runs.append((start..<end, Int(indices[start])))
      start = end
    }

    let block = 16
    let (groups, height, segments) = (columns, rowBlock, runs)
    return try dequantize(outputs * inputs, scaleNumbers, zeroNumbers, indices) { out, scale, zero, _ in
      Self.float8Numbers.withUnsafeBufferPointer { table in
        nonisolated(unsafe) let (out, scale, zero, table) = (out, scale, zero, table.baseAddress!)
        forEach(chunks: (outputs + block - 1) / block) { chunk in
          for output in chunk * block..<min((chunk + 1) * block, outputs) {
            let target = out + output * inputs
            for (range, group) in segments {
              let index = output / height * groups + group
              let (s, z) = (scale[index], zero[index])
              switch codes {
              case .integer8(let tensor):
                let row = tensor.address + output * inputs
                for k in range { target[k] = (Float(row.loadUnaligned(fromByteOffset: k, as: Int8.self)) - z) * s }
              case .float8(let tensor):
                let row = tensor.address + output * inputs
                for k in range { target[k] = table[Int(row.loadUnaligned(fromByteOffset: k, as: UInt8.self))] * s }
              case .packed(let tensor, let bits, let words):
                let row = tensor.address + 4 * output * words
                let mask = UInt32(1) << UInt32(bits) - 1
                // The stored offset and the zero point are small integers; their sum is exact.
                let zero = z + Float(1 << (bits - 1))
                // 4 or 8 bits: 8 or 4 numbers in a word.
                let (shift, low) = bits == 4 ? (3, 7) : (2, 3)
                for k in range {
                  let word = row.loadUnaligned(fromByteOffset: 4 * (k >> shift), as: UInt32.self)
                  let code = word &>> UInt32(truncatingIfNeeded: (k & low) &* bits) & mask
                  target[k] = (Float(code) - zero) * s
                }
              }
            }
          }
        }
      }
    }
  }

  /// Allocates a matrix and hands it to a loop, with the addresses of its parameters. Comes after all checks of what the
  /// file holds, so that impossible sizes are refused before memory for them is asked for.
  private func dequantize(
    _ count: Int, _ scales: [Float], _ zeros: [Float], _ groups: [Int32],
    _ body: (UnsafeMutablePointer<Float>, UnsafePointer<Float>, UnsafePointer<Float>, UnsafePointer<Int32>) -> Void
  ) throws(EngineError) -> DeviceMemory {
    let memory = try CPUBackend.hostMemory(byteCount: 4 * count)
    body(memory.address.assumingMemoryBound(to: Float.self), scales, zeros, groups)
    return memory
  }

  /// Packed formats hold whole words only.
  private func divisible(
    _ module: String, _ outputs: Int, _ inputs: Int, by count: Int, both: Bool
  ) throws(EngineError) {
    guard outputs % count == 0, !both || inputs % count == 0 else {
      throw EngineError(
        .invalidCheckpoint,
        "\(origin): tensor \(module).qweight cannot hold a matrix of \(outputs) x \(inputs) numbers: the method "
          + "\(quantization.method) packs \(count) of them in a word, and the sizes in config.json are not multiples.")
    }
  }

  /// The number that each byte stands for in float8 e4m3: sign, 4 bits of exponent with bias 7, 3 of mantissa; no
  /// infinities, NaN where all other bits are set. Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
  static let float8Numbers: [Float] = (0..<256).map { byte in
    let (exponent, mantissa) = (byte >> 3 & 15, byte & 7)
    if byte & 127 == 127 { return .nan }
    let magnitude =
      exponent == 0
      ? Float(mantissa) * 0x1p-9
      : Float(sign: .plus, exponent: exponent - 7, significand: 1 + Float(mantissa) / 8)
    return byte >= 128 ? -magnitude : magnitude
  }
}

/// Keeps the memory of a matrix of integers.
private final class Int8Memory {
  let file: SafetensorsFile
  let scales: DeviceMemory
  init(file: SafetensorsFile, scales: DeviceMemory) {
    self.file = file
    self.scales = scales
  }
}

/// A tensor of a file in whatever type it has.
struct StoredTensor: @unchecked Sendable {
  // Unchecked: the address points into a read-only mapping that `file` keeps.
  let name: String
  let file: SafetensorsFile
  let entry: SafetensorsFile.Entry
  let address: UnsafeRawPointer

  init(name: String, file: SafetensorsFile, entry: SafetensorsFile.Entry) {
    self.name = name
    self.file = file
    self.entry = entry
    address = file.bytes(of: entry).baseAddress!
  }

  /// An element. Addresses in a file need not be aligned.
  @inline(__always)
  func load<Number: BitwiseCopyable>(_ index: Int, as type: Number.Type) -> Number {
    address.loadUnaligned(fromByteOffset: index * MemoryLayout<Number>.size, as: type)
  }

  /// The type of the numbers. Only for the types of scales.
  var numberType: DType {
    switch entry.typeName {
    case "F16": .float16
    case "BF16": .bfloat16
    default: .float32
    }
  }

  /// All numbers, in float32. Only for the types of scales.
  func floats() -> [Float] {
    (0..<entry.shape.reduce(1, *)).map { index in
      switch entry.typeName {
      case "F16": Float(Float16(bitPattern: load(index, as: UInt16.self)))
      case "BF16": Float(bitPattern: UInt32(load(index, as: UInt16.self)) << 16)
      case "F8_E8M0": Self.powerOfTwo(load(index, as: UInt8.self))
      default: load(index, as: Float.self)
      }
    }
  }

  /// A number of eight bits of exponent with bias 127. Source: OCP Microscaling Formats v1.0, 5.4.1.
  private static func powerOfTwo(_ byte: UInt8) -> Float {
    switch byte {
    case 0: 0x1p-127
    case 255: .nan
    default: Float(bitPattern: UInt32(byte) << 23)
    }
  }

  func broken(_ sentence: String) -> EngineError {
    EngineError(.invalidCheckpoint, "\(file.file.path): tensor \(name) \(sentence).")
  }
}
