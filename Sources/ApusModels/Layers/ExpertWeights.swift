import ApusCore
import ApusTensors
import Glibc

/// How a model's experts are laid out and reached.
public struct ExpertOptions: Sendable, Equatable {
  /// Where weights lie; `nil` for each expert at its own number.
  public var location: ExpertLocation?
  public var dispatch: ExpertDispatchMode

  /// Describes the layout.
  public init(location: ExpertLocation? = nil, dispatch: ExpertDispatchMode = .normal) {
    self.location = location
    self.dispatch = dispatch
  }
}

/// The weights of all experts of a layer, in the order of their numbers.
struct ExpertWeights {
  /// [2 * width, hidden]: gate's outputs, then up's.
  private(set) var gateUp: [any LinearWeight] = []
  /// [hidden, width].
  private(set) var down: [any LinearWeight] = []
  /// float32 rows, where the family has biases.
  private(set) var gateUpBias: [Tensor]?
  private(set) var downBias: [Tensor]?

  /// Loads the experts of a layer.
  /// - Parameter block: the module of the layer's experts and router, ending in a dot.
  init(block: String, sizes: ExpertConfiguration, hidden: Int, loader: WeightLoader) throws(EngineError) {
    let path = block + "experts."
    gateUp.reserveCapacity(sizes.expertCount)
    down.reserveCapacity(sizes.expertCount)
    switch sizes.storage {
    case .outputsByInputs: try load(path, sizes, hidden, loader)
    case .fused: try loadFused(block, sizes, hidden, loader)
    case .inputsByOutputs: try loadTransposed(path, sizes, hidden, loader)
    }
  }

  /// Experts that are stored one by one, or, as transformers 5 has them in memory, in two stacks.
  private mutating func load(
    _ path: String, _ sizes: ExpertConfiguration, _ hidden: Int, _ loader: WeightLoader
  ) throws(EngineError) {
    let (count, width, names) = (sizes.expertCount, sizes.intermediateSize, sizes.names)
    let isStacked =
      !loader.store.contains("\(path)0.\(names.gate).weight") && loader.store.contains(path + "gate_up_proj")
    for expert in 0..<count {
      if isStacked {
        gateUp.append(
          try loader.stacked(path + "gate_up_proj", index: expert, of: count, outputs: 2 * width, inputs: hidden))
        down.append(
          try loader.stacked(path + "down_proj", index: expert, of: count, outputs: hidden, inputs: width))
      } else {
        let own = "\(path)\(expert)."
        gateUp.append(
          try loader.columnParallel(
            [(own + names.gate, width), (own + names.up, width)], inputs: hidden, rank: 0, ranks: 1))
        down.append(try loader.rowParallel((own + names.down, hidden), inputs: width, rank: 0, ranks: 1))
      }
    }
  }

  /// Granite: [count, 2 * width, hidden] and [count, hidden, width].
  private mutating func loadFused(
    _ block: String, _ sizes: ExpertConfiguration, _ hidden: Int, _ loader: WeightLoader
  ) throws(EngineError) {
    let (count, width) = (sizes.expertCount, sizes.intermediateSize)
    for expert in 0..<count {
      gateUp.append(
        try loader.stacked(
          block + "input_linear.weight", index: expert, of: count, outputs: 2 * width, inputs: hidden))
      down.append(
        try loader.stacked(block + "output_linear.weight", index: expert, of: count, outputs: hidden, inputs: width))
    }
  }

  /// gpt-oss: stacks whose matrices are [inputs, outputs], or MXFP4 blocks of [outputs, inputs]; gate and up take turns among
  /// the outputs of the first product.
  private mutating func loadTransposed(
    _ path: String, _ sizes: ExpertConfiguration, _ hidden: Int, _ loader: WeightLoader
  ) throws(EngineError) {
    let (count, width) = (sizes.expertCount, sizes.intermediateSize)
    let isSame: @Sendable (Int) -> Int = { $0 }
    let turns: @Sendable (Int) -> Int = { $0 < width ? 2 * $0 : 2 * ($0 - width) + 1 }
    var (first, second): ([Tensor], [Tensor]) = ([], [])
    for expert in 0..<count {
      gateUp.append(
        try loader.transposed(
          path + "gate_up_proj", index: expert, of: count, outputs: 2 * width, inputs: hidden, order: turns))
      down.append(
        try loader.transposed(
          path + "down_proj", index: expert, of: count, outputs: hidden, inputs: width, order: isSame))
      first.append(
        try loader.stackedBias(path + "gate_up_proj_bias", index: expert, of: count, outputs: 2 * width, order: turns))
      second.append(
        try loader.stackedBias(path + "down_proj_bias", index: expert, of: count, outputs: hidden, order: isSame))
    }
    (gateUpBias, downBias) = (first, second)
  }
}

extension WeightLoader {
  /// Loads a matrix [outputs, inputs] of those that a checkpoint stores as [count, inputs, outputs], or, with `_blocks` and
  /// `_scales` behind the name, as MXFP4 (OCP Microscaling Formats 1.0) along the inputs.
  /// - Parameter order: the stored output of each output.
  func transposed(
    _ name: String, index: Int, of count: Int, outputs: Int, inputs: Int,
    order: @escaping @Sendable (_ output: Int) -> Int
  ) throws(EngineError) -> any LinearWeight {
    if let source = try mxfp4(name, index: index, of: count, outputs: outputs, inputs: inputs, order: order) {
      return try packCodes(source)
    }
    let stored = try store.load(name, shape: [count, inputs, outputs], role: .matrix)
    let width = stored.dtype.byteCount
    let turned = try backend.allocate(rows: outputs, columns: inputs, dtype: stored.dtype)
    let from = stored.address + index * inputs * outputs * width
    for output in 0..<outputs {
      let column = from + order(output) * width
      let row = turned.pointer + output * inputs * width
      if width == 4 {
        for input in 0..<inputs {
          (row + 4 * input).storeBytes(
            of: column.loadUnaligned(fromByteOffset: input * outputs * 4, as: UInt32.self), as: UInt32.self)
        }
      } else {
        for input in 0..<inputs {
          (row + 2 * input).storeBytes(
            of: column.loadUnaligned(fromByteOffset: input * outputs * 2, as: UInt16.self), as: UInt16.self)
        }
      }
    }
    return try packLayer(
      WeightSource(
        address: UnsafeRawPointer(turned.pointer), dtype: stored.dtype, rows: outputs, columns: inputs,
        owner: turned.memory))
  }

  /// A matrix of a stack of MXFP4 blocks; `nil` if the checkpoint has none of that name.
  private func mxfp4(
    _ name: String, index: Int, of count: Int, outputs: Int, inputs: Int,
    order: @escaping @Sendable (_ output: Int) -> Int
  ) throws(EngineError) -> QuantizedSource? {
    guard inputs % 32 == 0,
      let blocks = try store.bytes(name + "_blocks", shape: [count, outputs, inputs / 32, 16]),
      let scales = try store.bytes(name + "_scales", shape: [count, outputs, inputs / 32])
    else { return nil }
    let groups = inputs / 32
    return QuantizedSource(
      layout: CodeLayout(bits: 4, levels: .e2m1, groupSize: 32, scaleType: .bfloat16), rows: outputs, columns: inputs,
      storedBytes: outputs * groups * 17
    ) { range, target in
      for (row, output) in range.enumerated() {
        let group = (index * outputs + order(output)) * groups
        let bytes = blocks.address + 16 * group
        for place in 0..<16 * groups {
          let byte = bytes.load(fromByteOffset: place, as: UInt8.self)
          target.codes[row * inputs + 2 * place] = byte & 15
          target.codes[row * inputs + 2 * place + 1] = byte >> 4
        }
        for place in 0..<groups {
          // 2^(exponent - 127), halved because the levels of the codes are twice the numbers'.
          let exponent = UInt32((scales.address + group).load(fromByteOffset: place, as: UInt8.self))
          target.scales[row * groups + place] = Float(
            bitPattern: exponent < 2 ? 0x0020_0000 << exponent : (exponent - 1) << 23)
        }
      }
      withExtendedLifetime((blocks, scales)) {}
    }
  }

  /// Loads a bias of those that a checkpoint stores one behind the other, as a float32 row.
  func stackedBias(
    _ name: String, index: Int, of count: Int, outputs: Int, order: (_ output: Int) -> Int
  ) throws(EngineError) -> Tensor {
    let all = try matrix(name, rows: count, columns: outputs, row: index)
    let row = try backend.allocate(rows: 1, columns: outputs, dtype: .float32)
    for output in 0..<outputs { row.float32[output] = all[order(output)] }
    return row
  }
}
