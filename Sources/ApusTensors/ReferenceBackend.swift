public import ApusCore
import Glibc

/// The slow twin of every fast backend: plain loops over host memory with sums in double precision.
///
/// It defines what the operators mean. Tests compare fast backends against it; nothing in it is ever made clever.
public final class ReferenceBackend: Backend {
  public let name = "reference (plain loops)"

  /// Makes the backend.
  public init() {}

  public func allocate(rows: Int, columns: Int, dtype: DType) throws(EngineError) -> Tensor {
    let byteCount = max(rows * columns * dtype.byteCount, 64)
    guard let address = calloc((byteCount + 63) / 64, 64) else {
      throw EngineError(.outOfMemory, "No memory for \(rows) x \(columns) numbers of type \(dtype.name).")
    }
    let memory = DeviceMemory(address: address, byteCount: byteCount) { address, _ in free(address) }
    return Tensor(memory: memory, dtype: dtype, rows: rows, columns: columns)
  }

  // MARK: Weights

  private final class Weight: LinearWeight {
    let outputs: Int
    let inputs: Int
    let format: WeightFormat
    /// [outputs, inputs] as float32, rounded to the format. For int8 the integers themselves.
    let values: [Float]
    /// [outputs] for int8, else empty.
    let scales: [Float]
    var byteCount: Int {
      switch format {
      case .dense(let dtype): outputs * inputs * dtype.byteCount
      case .int8PerChannel: outputs * (inputs + 4)
      case .codes(let layout):
        outputs * (inputs * layout.bits / 8 + layout.scaleCount(inputs) * layout.scaleType.byteCount)
      }
    }

    init(outputs: Int, inputs: Int, format: WeightFormat, values: [Float], scales: [Float]) {
      self.outputs = outputs
      self.inputs = inputs
      self.format = format
      self.values = values
      self.scales = scales
    }
  }

  public func packLinear(_ sources: [WeightSource], format: WeightFormat) throws(EngineError) -> any LinearWeight {
    let inputs = sources[0].columns
    precondition(sources.allSatisfy { $0.columns == inputs })
    var values: [Float] = []
    for source in sources {
      for index in 0..<source.rows * inputs { values.append(load(source.address, source.dtype, index)) }
    }
    let outputs = values.count / max(inputs, 1)
    switch format {
    case .dense(let dtype):
      values = values.map { round($0, to: dtype) }
      return Weight(outputs: outputs, inputs: inputs, format: format, values: values, scales: [])
    case .int8PerChannel:
      var scales: [Float] = []
      let given = sources.flatMap { source in (0..<source.rows).map { source.scales?[$0] } }
      for output in 0..<outputs {
        if let scale = given[output] {
          scales.append(scale)
          continue
        }
        let range = output * inputs..<(output + 1) * inputs
        let (scale, integers) = quantize(Array(values[range]))
        scales.append(scale)
        values.replaceSubrange(range, with: integers)
      }
      return Weight(outputs: outputs, inputs: inputs, format: format, values: values, scales: scales)
    case .codes:
      // Kept as they are: which codes a backend chooses is its own business, and tests judge it by these numbers.
      return Weight(outputs: outputs, inputs: inputs, format: format, values: values, scales: [])
    }
  }

  public func packLinear(_ sources: [QuantizedSource]) throws(EngineError) -> any LinearWeight {
    precondition(!sources.isEmpty && sources.allSatisfy(sources[0].matches))
    var values: [Float] = []
    for source in sources { values += source.dequantize(0..<source.rows) }
    return Weight(
      outputs: sources.reduce(0) { $0 + $1.rows }, inputs: sources[0].columns, format: .codes(sources[0].layout),
      values: values, scales: [])
  }

  public func joinLinear(_ parts: [any LinearWeight]) -> any LinearWeight {
    parts.count == 1 ? parts[0] : JoinedLinearWeight(parts)
  }

  public func int8Error(_ weight: any LinearWeight, _ sources: [WeightSource]) -> Double {
    // Integers that are taken as they are lose nothing.
    guard let weight = weight as? Weight, weight.format == .int8PerChannel, sources.allSatisfy({ $0.scales == nil })
    else { return 0 }
    var (index, error, total) = (0, 0.0, 0.0)
    for source in sources {
      for place in 0..<source.rows * source.columns {
        let number = Double(load(source.address, source.dtype, place))
        let rounded = Double(weight.values[index]) * Double(weight.scales[index / weight.inputs])
        error += (number - rounded) * (number - rounded)
        total += number * number
        index += 1
      }
    }
    return total > 0 ? (error / total).squareRoot() : 0
  }

  /// Symmetric int8: value = scale * integer, the largest magnitude at 127, ties to even.
  private func quantize(_ row: [Float]) -> (scale: Float, integers: [Float]) {
    let largest = row.reduce(0) { max($0, abs($1)) }
    let scale = largest / 127
    if scale == 0 || !scale.isFinite { return (0, row.map { _ in 0 }) }
    return (scale, row.map { min(max(($0 / scale).rounded(.toNearestOrEven), -127), 127) })
  }

  // MARK: K/V

  private final class Layer: KVLayer, @unchecked Sendable {
    // Unchecked: the engine's thread is the only one that touches the pages.
    let pageCount: Int
    let kvHeads: Int
    let headDimension: Int
    let valueDimension: Int
    let isLatent: Bool
    let dtype: DType
    /// [slot, head, dimension], values rounded to `dtype`. Latent pages have no values of their own.
    var keys: [Float]
    var values: [Float]
    var byteCount: Int { (keys.count + values.count) * dtype.byteCount }

    init(
      pageCount: Int, kvHeads: Int, headDimension: Int, valueDimension: Int, isLatent: Bool, dtype: DType
    ) {
      self.valueDimension = valueDimension
      self.isLatent = isLatent
      self.pageCount = pageCount
      self.kvHeads = kvHeads
      self.headDimension = headDimension
      self.dtype = dtype
      keys = Array(repeating: 0, count: pageCount * 16 * kvHeads * headDimension)
      values = isLatent ? [] : keys
    }

    /// Number `i` of the value whose key begins at `base`.
    func value(_ base: Int, _ i: Int) -> Float { isLatent ? keys[base + i] : values[base + i] }
  }

  public func makeKVLayer(
    pageCount: Int, kvHeads: Int, headDimension: Int, dtype: DType
  ) throws(EngineError) -> any KVLayer {
    Layer(
      pageCount: pageCount, kvHeads: kvHeads, headDimension: headDimension, valueDimension: headDimension,
      isLatent: false, dtype: dtype)
  }

  public func makeLatentLayer(
    pageCount: Int, keyDimension: Int, valueDimension: Int, dtype: DType
  ) throws(EngineError) -> any KVLayer {
    guard [.float32, .float16, .bfloat16].contains(dtype) else { throw latentTypeError(dtype) }
    return Layer(
      pageCount: pageCount, kvHeads: 1, headDimension: keyDimension, valueDimension: valueDimension, isLatent: true,
      dtype: dtype)
  }

  public func writeLatents(_ latents: Tensor, slots: UnsafePointer<Int32>, layer: any KVLayer) {
    let layer = layer as! Layer
    for row in 0..<latents.rows {
      for column in 0..<latents.columns {
        layer.keys[Int(slots[row]) * layer.headDimension + column] = round(
          latents.float32[row * latents.stride + column], to: layer.dtype)
      }
    }
  }

  public func writeKV(_ k: Tensor, _ v: Tensor, slots: UnsafePointer<Int32>, layer: any KVLayer) {
    let layer = layer as! Layer
    let width = layer.kvHeads * layer.headDimension
    for row in 0..<k.rows {
      let target = Int(slots[row]) * width
      for head in 0..<layer.kvHeads {
        let columns = head * layer.headDimension..<(head + 1) * layer.headDimension
        let keys = roundHead(columns.map { k.float32[row * k.stride + $0] }, to: layer.dtype)
        let values = roundHead(columns.map { v.float32[row * v.stride + $0] }, to: layer.dtype)
        for (offset, column) in columns.enumerated() {
          layer.keys[target + column] = keys[offset]
          layer.values[target + column] = values[offset]
        }
      }
    }
  }

  public func copyPages(layer: any KVLayer, from: UnsafePointer<Int32>, to: UnsafePointer<Int32>, count: Int) {
    let layer = layer as! Layer
    let width = 16 * layer.kvHeads * layer.headDimension
    for index in 0..<count {
      for offset in 0..<width {
        layer.keys[Int(to[index]) * width + offset] = layer.keys[Int(from[index]) * width + offset]
        if layer.isLatent { continue }
        layer.values[Int(to[index]) * width + offset] = layer.values[Int(from[index]) * width + offset]
      }
    }
  }

  public func attention(
    _ q: Tensor, layer: any KVLayer, batch: AttentionBatch, shape: AttentionShape, out: Tensor
  ) {
    let layer = layer as! Layer
    let dimension = shape.headDimension
    let group = shape.queryHeads / shape.kvHeads
    for sequence in 0..<batch.sequenceCount {
      let pages = batch.pages + Int(batch.pageOffset[sequence])
      for row in Int(batch.rowStart[sequence])..<Int(batch.rowStart[sequence + 1]) {
        let position = Int(batch.start[sequence]) + row - Int(batch.rowStart[sequence])
        let first = shape.slidingWindow > 0 ? max(0, position - shape.slidingWindow + 1) : 0
        for head in 0..<shape.queryHeads {
          func offset(_ position: Int) -> Int {
            ((Int(pages[position / 16]) * 16 + position % 16) * shape.kvHeads + head / group) * dimension
          }
          let query = q.float32 + row * q.stride + head * dimension
          var scores: [Double] = []
          for other in first...position {
            let base = offset(other)
            var score = 0.0
            for i in 0..<dimension { score += Double(query[i]) * Double(layer.keys[base + i]) }
            score *= Double(shape.scale)
            if shape.softCap > 0 { score = Double(shape.softCap) * tanh(score / Double(shape.softCap)) }
            scores.append(score)
          }
          let sink = shape.sinks.map { Double($0.float32[head]) }
          let largest = scores.reduce(sink ?? -.infinity, max)
          let weights = scores.map { exp($0 - largest) }
          let total = weights.reduce(0, +) + (sink.map { exp($0 - largest) } ?? 0)
          for i in 0..<layer.valueDimension {
            var sum = 0.0
            for other in first...position { sum += weights[other - first] * Double(layer.value(offset(other), i)) }
            out.float32[row * out.stride + head * layer.valueDimension + i] = Float(sum / total)
          }
        }
      }
    }
  }

  // MARK: Rows

  public func embed(table: Tensor, tokens: UnsafePointer<TokenID>, count: Int, out: Tensor) {
    for row in 0..<count {
      let base = Int(tokens[row]) * table.stride
      for column in 0..<table.columns {
        out.float32[row * out.stride + column] = load(table.pointer, table.dtype, base + column)
      }
    }
  }

  public func rmsNorm(_ x: Tensor, weight: Tensor, epsilon: Float, out: Tensor) {
    for row in 0..<x.rows {
      normalize(x.float32 + row * x.stride, x.columns, weight.float32, epsilon, out.float32 + row * out.stride)
    }
  }

  public func addRMSNorm(residual: Tensor, delta: Tensor, weight: Tensor, epsilon: Float, out: Tensor) {
    add(residual, delta)
    rmsNorm(residual, weight: weight, epsilon: epsilon, out: out)
  }

  public func headRMSNorm(_ x: Tensor, heads: Int, headDimension: Int, weight: Tensor, epsilon: Float) {
    for row in 0..<x.rows {
      for head in 0..<heads {
        let numbers = x.float32 + row * x.stride + head * headDimension
        normalize(numbers, headDimension, weight.float32, epsilon, numbers)
      }
    }
  }

  private func normalize(
    _ x: UnsafeMutablePointer<Float>, _ count: Int, _ weight: UnsafeMutablePointer<Float>, _ epsilon: Float,
    _ out: UnsafeMutablePointer<Float>
  ) {
    var squares = 0.0
    for i in 0..<count { squares += Double(x[i]) * Double(x[i]) }
    let scale = 1 / (squares / Double(count) + Double(epsilon)).squareRoot()
    for i in 0..<count { out[i] = Float(Double(x[i]) * scale * Double(weight[i])) }
  }

  public func add(_ x: Tensor, _ y: Tensor) {
    for row in 0..<x.rows {
      for column in 0..<x.columns { x.float32[row * x.stride + column] += y.float32[row * y.stride + column] }
    }
  }

  public func linear(_ x: Tensor, _ weight: any LinearWeight, bias: Tensor?, out: Tensor) {
    if let joined = weight as? JoinedLinearWeight {
      return joined.forEachPart(bias: bias, out: out) { linear(x, $0, bias: $1, out: $2) }
    }
    let weight = weight as! Weight
    for row in 0..<x.rows {
      var input = (0..<weight.inputs).map { x.float32[row * x.stride + $0] }
      var inputScale: Float = 1
      if weight.format == .int8PerChannel { (inputScale, input) = quantize(input) }
      for output in 0..<weight.outputs {
        var sum = 0.0
        for i in 0..<weight.inputs { sum += Double(input[i]) * Double(weight.values[output * weight.inputs + i]) }
        if weight.format == .int8PerChannel { sum *= Double(inputScale) * Double(weight.scales[output]) }
        if let bias { sum += Double(bias.float32[output]) }
        out.float32[row * out.stride + output] = Float(sum)
      }
    }
  }

  public func rope(
    _ x: Tensor, heads: Int, headDimension: Int, positions: UnsafePointer<Int32>, table: Tensor
  ) {
    let half = table.columns / 2
    for row in 0..<x.rows {
      let rotation = table.float32 + Int(positions[row]) * table.stride
      for head in 0..<heads {
        let numbers = x.float32 + row * x.stride + head * headDimension
        for pair in 0..<half {
          let (a, b) = (Double(numbers[pair]), Double(numbers[pair + half]))
          let (cosine, sine) = (Double(rotation[pair]), Double(rotation[half + pair]))
          numbers[pair] = Float(a * cosine - b * sine)
          numbers[pair + half] = Float(b * cosine + a * sine)
        }
      }
    }
  }

  public func ropeInterleaved(
    _ x: Tensor, heads: Int, headDimension: Int, offset: Int, positions: UnsafePointer<Int32>, table: Tensor
  ) {
    let half = table.columns / 2
    for row in 0..<x.rows {
      let rotation = table.float32 + Int(positions[row]) * table.stride
      for head in 0..<heads {
        let numbers = x.float32 + row * x.stride + head * headDimension + offset
        for pair in 0..<half {
          let (a, b) = (Double(numbers[2 * pair]), Double(numbers[2 * pair + 1]))
          let (cosine, sine) = (Double(rotation[pair]), Double(rotation[half + pair]))
          numbers[2 * pair] = Float(a * cosine - b * sine)
          numbers[2 * pair + 1] = Float(b * cosine + a * sine)
        }
      }
    }
  }

  public func siluMul(_ gateUp: Tensor, out: Tensor) {
    for row in 0..<out.rows {
      let (gate, up) = (gateUp.float32 + row * gateUp.stride, gateUp.float32 + row * gateUp.stride + out.columns)
      for i in 0..<out.columns {
        out.float32[row * out.stride + i] = Float(Double(gate[i]) / (1 + exp(-Double(gate[i]))) * Double(up[i]))
      }
    }
  }

  public func gather(_ x: Tensor, rows: UnsafePointer<Int32>, count: Int, out: Tensor) {
    for row in 0..<count {
      for column in 0..<x.columns {
        out.float32[row * out.stride + column] = x.float32[Int(rows[row]) * x.stride + column]
      }
    }
  }

  // MARK: Logits

  public func applyPenalties(
    logits: Tensor, row: Int, tokens: UnsafePointer<TokenID>, outputCounts: UnsafePointer<Int32>, count: Int,
    repetition: Float, frequency: Float, presence: Float
  ) {
    let values = logits.float32 + row * logits.stride
    for index in 0..<count {
      var value = values[Int(tokens[index])]
      value = value > 0 ? value / repetition : value * repetition
      if outputCounts[index] > 0 { value -= frequency * Float(outputCounts[index]) + presence }
      values[Int(tokens[index])] = value
    }
  }

  public func applyMask(logits: Tensor, row: Int, mask: UnsafePointer<UInt32>, words: Int) {
    let values = logits.float32 + row * logits.stride
    for token in 0..<logits.columns {
      let isAllowed = token / 32 < words && mask[token / 32] >> UInt32(token % 32) & 1 != 0
      if !isAllowed { values[token] = -.infinity }
    }
  }

  public func sample(
    logits: Tensor, rows: UnsafePointer<SamplingRow>, tokens: UnsafeMutablePointer<TokenID>
  ) {
    for row in 0..<logits.rows {
      tokens[row] = draw(
        Array(UnsafeBufferPointer(start: logits.float32 + row * logits.stride, count: logits.columns)), rows[row])
    }
  }

  private func draw(_ logits: [Float], _ row: SamplingRow) -> TokenID {
    var ranked = logits.indices.filter { logits[$0].isFinite }
    // Largest first, ties to the smaller token.
    ranked.sort { logits[$0] == logits[$1] ? $0 < $1 : logits[$0] > logits[$1] }
    guard let best = ranked.first else { return -1 }
    if row.temperature < 1e-6 || row.topK == 1 { return TokenID(best) }
    if row.topK > 0 { ranked = Array(ranked.prefix(Int(row.topK))) }
    var weights = ranked.map { exp((Double(logits[$0]) - Double(logits[best])) / Double(row.temperature)) }
    if row.topP < 1 {
      let total = weights.reduce(0, +)
      var (sum, count) = (0.0, 0)
      while count < weights.count && sum < Double(row.topP) * total {
        sum += weights[count]
        count += 1
      }
      weights = Array(weights.prefix(count))
    }
    // The best token's weight is 1.
    if row.minP > 0 { weights = Array(weights.prefix { $0 >= Double(row.minP) }) }
    // In the order of token ids, so that the draw is a function of the kept set alone.
    let kept = zip(ranked, weights).sorted { $0.0 < $1.0 }
    let target = Double(row.uniform) * kept.reduce(0) { $0 + $1.1 }
    var sum = 0.0
    for (token, weight) in kept {
      sum += weight
      if sum > target { return TokenID(token) }
    }
    return TokenID(kept.last!.0)
  }

  public func logSumExp(logits: Tensor, row: Int) -> Float {
    let values = UnsafeBufferPointer(start: logits.float32 + row * logits.stride, count: logits.columns)
    let largest = Double(values.reduce(-.infinity, max))
    return Float(largest + log(values.reduce(0.0) { $0 + exp(Double($1) - largest) }))
  }

  public func topK(
    logits: Tensor, row: Int, k: Int, tokens: UnsafeMutablePointer<TokenID>, values: UnsafeMutablePointer<Float>
  ) {
    let numbers = logits.float32 + row * logits.stride
    let ranked = (0..<logits.columns).sorted {
      numbers[$0] == numbers[$1] ? $0 < $1 : numbers[$0] > numbers[$1]
    }
    for index in 0..<k {
      tokens[index] = TokenID(ranked[index])
      values[index] = numbers[ranked[index]]
    }
  }

  // MARK: Numbers

  private func load(_ address: UnsafeRawPointer, _ dtype: DType, _ index: Int) -> Float {
    switch dtype {
    case .bfloat16:
      Float(bitPattern: UInt32(address.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self)) << 16)
    case .float16:
      Float(Float16(bitPattern: address.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self)))
    case .int8: Float(address.loadUnaligned(fromByteOffset: index, as: Int8.self))
    default: address.loadUnaligned(fromByteOffset: 4 * index, as: Float.self)
    }
  }

  /// One head of a token: numbers of 8 bits share a scale, largest magnitude / 127 (float8: / 448).
  private func roundHead(_ numbers: [Float], to dtype: DType) -> [Float] {
    guard dtype == .int8 || dtype == .float8 else { return numbers.map { round($0, to: dtype) } }
    let scale = numbers.reduce(0) { max($0, abs($1)) } / (dtype == .int8 ? 127 : 448)
    guard scale > 0, scale.isFinite else { return numbers.map { $0 * 0 } }
    return numbers.map { number in
      let scaled = number / scale
      if dtype == .int8 { return scaled.rounded(.toNearestOrEven) * scale }
      // Three bits of mantissa; below 2^-6 a fixed step.
      let exponent = max(scaled == 0 ? -6 : Int(scaled.exponent), -6)
      let step = Float(sign: .plus, exponent: exponent - 3, significand: 1)
      return min(max((scaled / step).rounded(.toNearestOrEven) * step, -448), 448) * scale
    }
  }

  private func round(_ value: Float, to dtype: DType) -> Float {
    switch dtype {
    case .bfloat16:
      guard value.isFinite else { return value }
      let bits = value.bitPattern
      return Float(bitPattern: (bits &+ 0x7FFF &+ (bits >> 16 & 1)) & 0xFFFF_0000)
    case .float16: return Float(Float16(value))
    default: return value
    }
  }
}
