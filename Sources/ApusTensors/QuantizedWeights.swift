/// How a linear layer's weights are stored as small integers ("codes") in groups:
///
///     weight = (level(code) - offset) * scale - minimum
///
/// where scale and minimum belong to a group of neighbouring inputs of one output. Products with such weights round each
/// block of a row of activations to int8 first (float8 weights: to bfloat16).
public struct CodeLayout: Sendable, Equatable, Hashable {
  /// What a code stands for.
  public enum Levels: Sendable, Equatable, Hashable {
    /// The integer itself.
    case linear
    /// Twice an e2m1 number of 4 bits, as in MXFP4.
    case e2m1
    /// The levels of GGUF's IQ4_NL.
    case iq4NL
    /// A float8 number, e4m3 without infinities. The two codes for NaN count as 480 and -480.
    case e4m3
  }

  /// Where minimums come from.
  public enum Minimum: Sendable, Equatable, Hashable {
    case none
    /// A number for each group; with factors one for each block, times an unsigned factor of 8 bits for each group.
    case own
    /// The group's scale times an unsigned factor of 8 bits: a zero point.
    case zeroPoint
  }

  /// Bits of a code: 4, 5, 6 or 8.
  public var bits: Int
  public var levels: Levels
  /// What is subtracted from a linear code, 0...255.
  public var offset: Int
  /// Inputs that share a scale: a multiple of 32, or 16 with linear codes of 4 or 6 bits; a divisor or a multiple of
  /// `blockSize`.
  public var groupSize: Int
  /// Inputs of a row of activations that share a scale: 32, 64, 128 or 256.
  public var blockSize: Int
  /// How scales are stored: float16, bfloat16 or float32.
  public var scaleType: DType
  /// Whether there is one scale for each block, times a signed factor of 8 bits for each group.
  public var hasFactors: Bool
  public var minimum: Minimum

  /// Describes a layout.
  public init(
    bits: Int, levels: Levels = .linear, offset: Int = 0, groupSize: Int, blockSize: Int = 128,
    scaleType: DType = .float16, hasFactors: Bool = false, minimum: Minimum = .none
  ) {
    self.bits = bits
    self.levels = levels
    self.offset = offset
    self.groupSize = groupSize
    self.blockSize = blockSize
    self.scaleType = scaleType
    self.hasFactors = hasFactors
    self.minimum = minimum
  }

  /// 4 bits in groups of 32 with a float16 scale: 4.5 bits for each weight.
  public static let int4 = CodeLayout(bits: 4, offset: 8, groupSize: 32)
  /// 8 bits in groups of 32 with a float16 scale: 8.5 bits for each weight.
  public static let int8 = CodeLayout(bits: 8, offset: 128, groupSize: 32)
  /// float8 e4m3 in groups of 128 with a float32 scale: 8.25 bits for each weight.
  public static let float8 = CodeLayout(bits: 8, levels: .e4m3, groupSize: 128, scaleType: .float32)

  /// A name for people, such as `int4`.
  public var name: String {
    switch levels {
    case .linear: "int\(bits)"
    case .e2m1: "mxfp4"
    case .iq4NL: "iq4_nl"
    case .e4m3: "float8"
    }
  }

  /// Groups of an output with that many inputs.
  public func groupCount(_ inputs: Int) -> Int { (inputs + groupSize - 1) / groupSize }

  /// Scales of an output with that many inputs: one for each group, or with factors for each block.
  public func scaleCount(_ inputs: Int) -> Int {
    hasFactors ? (inputs + blockSize - 1) / blockSize : groupCount(inputs)
  }

  /// A layout of a group size that a file prescribes; `nil` if products with such groups are not implemented.
  /// - Parameters:
  ///   - groupSize: 0 for all inputs of an output.
  ///   - inputs: numbers of an output.
  static func blockSize(groupSize: Int, bits: Int) -> Int? {
    if groupSize == 16 { return bits == 4 || bits == 6 ? 128 : nil }
    guard groupSize > 0, groupSize % 32 == 0 else { return nil }
    return [128, 64, 32].first { $0 % groupSize == 0 || groupSize % $0 == 0 }
  }

  /// A copy for groups of a size that a file prescribes.
  /// - Parameter size: 0 for all inputs of an output.
  /// - Returns: `nil` if products with such groups are not implemented.
  public func withGroups(_ size: Int, inputs: Int) -> CodeLayout? {
    let size = size == 0 || size >= inputs ? (max(inputs, 1) + 127) / 128 * 128 : size
    guard let block = Self.blockSize(groupSize: size, bits: bits) else { return nil }
    var copy = self
    copy.groupSize = size
    copy.blockSize = block
    return copy
  }
}

/// Where rows of codes are written: arrays row by row without gaps, for the rows that were asked for. See `CodeLayout` for
/// the numbers of groups and scales of a row.
public struct CodeRows {
  /// [rows, inputs].
  public var codes: UnsafeMutablePointer<UInt8>
  /// [rows, scaleCount].
  public var scales: UnsafeMutablePointer<Float>
  /// [rows, groupCount]; used only where the layout has factors.
  public var factors: UnsafeMutablePointer<Int8>
  /// [rows, scaleCount]; used only where the layout has minimums of its own.
  public var minimums: UnsafeMutablePointer<Float>
  /// [rows, groupCount]; used only where minimums have factors or are zero points.
  public var minimumFactors: UnsafeMutablePointer<UInt8>

  /// Describes arrays.
  public init(
    codes: UnsafeMutablePointer<UInt8>, scales: UnsafeMutablePointer<Float>, factors: UnsafeMutablePointer<Int8>,
    minimums: UnsafeMutablePointer<Float>, minimumFactors: UnsafeMutablePointer<UInt8>
  ) {
    self.codes = codes
    self.scales = scales
    self.factors = factors
    self.minimums = minimums
    self.minimumFactors = minimumFactors
  }

  /// The arrays from a later row on.
  public func advanced(rows: Int, layout: CodeLayout, inputs: Int) -> CodeRows {
    let (groups, scaleCount) = (layout.groupCount(inputs), layout.scaleCount(inputs))
    return CodeRows(
      codes: codes + rows * inputs, scales: scales + rows * scaleCount, factors: factors + rows * groups,
      minimums: minimums + rows * scaleCount, minimumFactors: minimumFactors + rows * groups)
  }

  /// Arrays for some rows, for the duration of a call. What they hold at first is undefined.
  static func withRows<Result>(
    _ rows: Int, layout: CodeLayout, inputs: Int, _ body: (CodeRows) -> Result
  ) -> Result {
    let (groups, scaleCount) = (rows * layout.groupCount(inputs), rows * layout.scaleCount(inputs))
    return withUnsafeTemporaryAllocation(byteCount: 8 * scaleCount + 2 * groups + rows * inputs, alignment: 16) { all in
      let scales = all.baseAddress!.assumingMemoryBound(to: Float.self)
      let bytes = UnsafeMutableRawPointer(scales + 2 * scaleCount).assumingMemoryBound(to: UInt8.self)
      return body(
        CodeRows(
          codes: bytes + 2 * groups, scales: scales,
          factors: UnsafeMutableRawPointer(bytes).assumingMemoryBound(to: Int8.self), minimums: scales + scaleCount,
          minimumFactors: bytes + groups))
    }
  }
}

/// A matrix [outputs, inputs] that is stored quantised and stays so when it is packed.
public struct QuantizedSource: Sendable {
  public var layout: CodeLayout
  public var rows: Int
  public var columns: Int
  /// Which input each place of a row of codes belongs to, where a file keeps groups together by reordering inputs
  /// ("act-order"); `nil` where places are inputs.
  public var order: [Int32]?
  /// Bytes of the matrix in its file, for progress reports.
  public var storedBytes: Int
  /// Writes some rows into arrays that begin with the first of them. Called by several threads at once.
  public var fill: @Sendable (Range<Int>, CodeRows) -> Void

  /// Describes a matrix.
  public init(
    layout: CodeLayout, rows: Int, columns: Int, order: [Int32]? = nil, storedBytes: Int,
    fill: @escaping @Sendable (Range<Int>, CodeRows) -> Void
  ) {
    self.layout = layout
    self.rows = rows
    self.columns = columns
    self.order = order
    self.storedBytes = storedBytes
    self.fill = fill
  }

  /// Some rows as a matrix of their own.
  public func rows(_ range: Range<Int>) -> QuantizedSource {
    precondition(range.lowerBound >= 0 && range.upperBound <= rows)
    let fill = fill
    var copy = self
    copy.rows = range.count
    copy.storedBytes = rows == 0 ? 0 : storedBytes / rows * range.count
    copy.fill = { fill($0.lowerBound + range.lowerBound..<$0.upperBound + range.lowerBound, $1) }
    return copy
  }

  /// Whether two matrices can be packed as one.
  public func matches(_ other: QuantizedSource) -> Bool {
    layout == other.layout && columns == other.columns && order == other.order
  }

  /// Writes rows of stacked matrices.
  static func fill(_ sources: [QuantizedSource], _ range: Range<Int>, _ target: CodeRows) {
    var first = 0
    for source in sources {
      let part = range.clamped(to: first..<first + source.rows)
      if !part.isEmpty {
        source.fill(
          part.lowerBound - first..<part.upperBound - first,
          target.advanced(
            rows: part.lowerBound - range.lowerBound, layout: source.layout, inputs: source.columns))
      }
      first += source.rows
    }
  }

  /// The numbers that some rows stand for, [rows, columns] in the order of inputs, in float32: the slow way, for the
  /// reference backend and for tests.
  public func dequantize(_ range: Range<Int>) -> [Float] {
    let (groups, scaleCount) = (layout.groupCount(columns), layout.scaleCount(columns))
    var numbers = [Float](repeating: 0, count: range.count * columns)
    CodeRows.withRows(range.count, layout: layout, inputs: columns) { arrays in
      fill(range, arrays)
      for row in 0..<range.count {
        for place in 0..<columns {
          let group = row * groups + place / layout.groupSize
          let top =
            layout.hasFactors
            ? row * scaleCount + place / layout.blockSize : row * scaleCount + place / layout.groupSize
          let base = arrays.scales[top]
          let scale = layout.hasFactors ? base * Float(arrays.factors[group]) : base
          var minimum: Float = 0
          switch layout.minimum {
          case .none: break
          case .own:
            minimum = arrays.minimums[top]
            if layout.hasFactors { minimum *= Float(arrays.minimumFactors[group]) }
          case .zeroPoint: minimum = base * Float(arrays.minimumFactors[group])
          }
          let input = order.map { Int($0[place]) } ?? place
          numbers[row * columns + input] = level(arrays.codes[row * columns + place]) * scale - minimum
        }
      }
    }
    return numbers
  }

  private func level(_ code: UInt8) -> Float {
    switch layout.levels {
    case .linear: return Float(Int(code) - layout.offset)
    case .e2m1:
      let magnitudes: [Float] = [0, 1, 2, 3, 4, 6, 8, 12]
      return code & 8 == 0 ? magnitudes[Int(code & 7)] : -magnitudes[Int(code & 7)]
    case .iq4NL:
      let levels: [Float] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
      return levels[Int(code & 15)]
    case .e4m3:
      let (exponent, mantissa) = (Int(code >> 3 & 15), Float(code & 7))
      let magnitude =
        exponent == 0
        ? mantissa * 0x1p-9 : Float(sign: .plus, exponent: exponent - 7, significand: 1 + mantissa / 8)
      return code & 128 == 0 ? magnitude : -magnitude
    }
  }
}

/// Weights of several formats whose outputs lie side by side, such as the projections of a checkpoint that quantises values
/// less than queries.
final class JoinedLinearWeight: LinearWeight {
  let parts: [any LinearWeight]
  let outputs: Int
  var inputs: Int { parts[0].inputs }
  var format: WeightFormat { parts[0].format }
  var byteCount: Int { parts.reduce(0) { $0 + $1.byteCount } }

  init(_ parts: [any LinearWeight]) {
    self.parts = parts
    outputs = parts.reduce(0) { $0 + $1.outputs }
  }

  /// Hands out each part with its columns of the bias and of the result.
  func forEachPart(bias: Tensor?, out: Tensor, _ body: (any LinearWeight, Tensor?, Tensor) -> Void) {
    var first = 0
    for part in parts {
      let columns = first..<first + part.outputs
      body(part, bias?.columns(columns), out.columns(columns))
      first += part.outputs
    }
  }
}
