import ApusCore
import ApusTensors
import Testing

/// Weights that stay quantised.
@Suite struct CodesTests {
  static let layouts: [CodeLayout] = [
    // As GGUF has them.
    CodeLayout(bits: 4, offset: 8, groupSize: 32), CodeLayout(bits: 4, groupSize: 32, minimum: .own),
    CodeLayout(bits: 5, offset: 16, groupSize: 32), CodeLayout(bits: 5, groupSize: 32, minimum: .own),
    CodeLayout(bits: 8, offset: 128, groupSize: 32),
    CodeLayout(bits: 4, groupSize: 16, blockSize: 256, hasFactors: true, minimum: .own),
    CodeLayout(bits: 4, offset: 4, groupSize: 16, blockSize: 256, hasFactors: true),
    CodeLayout(bits: 4, groupSize: 32, blockSize: 256, hasFactors: true, minimum: .own),
    CodeLayout(bits: 5, groupSize: 32, blockSize: 256, hasFactors: true, minimum: .own),
    CodeLayout(bits: 6, offset: 32, groupSize: 16, blockSize: 256, hasFactors: true),
    CodeLayout(bits: 4, levels: .iq4NL, groupSize: 32),
    CodeLayout(bits: 4, levels: .e2m1, groupSize: 32, scaleType: .bfloat16),
    // As GPTQ, AWQ and compressed-tensors have them.
    CodeLayout(bits: 4, groupSize: 128, minimum: .zeroPoint),
    CodeLayout(bits: 4, offset: 8, groupSize: 1024, scaleType: .bfloat16),
    CodeLayout(bits: 8, groupSize: 64, scaleType: .float32, minimum: .zeroPoint),
    CodeLayout(bits: 4, offset: 8, groupSize: 96, blockSize: 32),
    // float8.
    CodeLayout(bits: 8, levels: .e4m3, groupSize: 128, scaleType: .float32),
    CodeLayout(bits: 8, levels: .e4m3, groupSize: 1024, scaleType: .float32),
  ]

  /// Random codes and scales that the scale's type holds, a function of the row alone.
  static func source(
    _ layout: CodeLayout, rows: Int, columns: Int, seed: UInt64, order: [Int32]? = nil
  ) -> QuantizedSource {
    QuantizedSource(layout: layout, rows: rows, columns: columns, order: order, storedBytes: rows * columns) {
      range, target in
      let (groups, scaleCount) = (layout.groupCount(columns), layout.scaleCount(columns))
      for (i, row) in range.enumerated() {
        var generator = Generator(seed &+ UInt64(row) &* 977)
        for k in 0..<columns {
          var code = UInt8(generator.next() & (1 << UInt64(layout.bits) - 1))
          if layout.levels == .e4m3, code & 127 == 127 { code ^= 1 }
          target.codes[i * columns + k] = code
        }
        for s in 0..<scaleCount {
          // Few bits, so that every type of scale holds them.
          target.scales[i * scaleCount + s] = Float(generator.next() % 200) * 0x1p-14 - 0x1p-8
          target.minimums[i * scaleCount + s] = Float(generator.next() % 128) * 0x1p-12
        }
        for g in 0..<groups {
          target.factors[i * groups + g] = Int8(truncatingIfNeeded: generator.next())
          target.minimumFactors[i * groups + g] = UInt8(truncatingIfNeeded: generator.next() & 63)
        }
      }
    }
  }

  /// x as a layer with such weights reads it.
  static func rounded(_ x: [Float], _ layout: CodeLayout, order: [Int32]?) -> [Double] {
    if layout.levels == .e4m3 { return x.map { Double(ApusTensorsTests.rounded($0, .bfloat16)) } }
    var result = [Double](repeating: 0, count: x.count)
    for begin in stride(from: 0, to: x.count, by: layout.blockSize) {
      let places = (begin..<min(x.count, begin + layout.blockSize)).map { place in
        if let order { Int(order[place]) } else { place }
      }
      let largest = places.map { abs(x[$0]) }.max()!
      for place in places where largest > 0 {
        let code = (x[place] * (127 / largest)).rounded(.toNearestOrEven)
        result[place] = Double(code) * Double(largest / 127)
      }
    }
    return result
  }

  static func run(_ backend: CPUBackend, _ weight: any LinearWeight, _ x: [Float], bias: [Float]?) throws -> [Float] {
    let rows = x.count / weight.inputs
    let out = try tensor(
      [Float](repeating: .nan, count: rows * weight.outputs), rows: rows, columns: weight.outputs, padding: 5, shift: 3)
    backend.linear(
      try tensor(x, rows: rows, columns: weight.inputs, padding: 3, shift: 1), weight,
      bias: try bias.map { try tensor($0, rows: 1, columns: weight.outputs, shift: 1) }, out: out)
    for r in 0..<rows - 1 {
      for c in weight.outputs..<out.stride { #expect(out.float32[r * out.stride + c].isNaN) }
    }
    return values(out)
  }

  @Test(arguments: layouts.indices)
  func productsAreThoseOfTheNumbers(index: Int) throws {
    let layout = Self.layouts[index]
    var generator = Generator(41)
    for (rows, outputs, inputs) in [(1, 1, 1), (3, 70, 37), (8, 65, 300), (13, 33, 1024)] {
      // Files of K-quants have whole blocks only.
      let inputs = layout.hasFactors ? (inputs + 255) / 256 * 256 : inputs
      let order = index % 3 == 0 ? (0..<Int32(inputs)).shuffled(using: &generator) : nil
      let source = Self.source(layout, rows: outputs, columns: inputs, seed: 41, order: order)
      let numbers = source.dequantize(0..<outputs)
      let x = (0..<rows * inputs).map { generator.float($0 % 41 == 7 ? 30 : 2) }
      let bias = generator.floats(outputs)
      var portable: [UInt32]?
      for level in levels {
        let backend = try makeBackend(level)
        let weight = try backend.packLinear([source])
        #expect(weight.format == .codes(layout) && weight.outputs == outputs && weight.inputs == inputs)
        for output in [0, outputs / 2, outputs - 1] {
          let found = backend.codeNumbers(weight, output: output)
          let wanted = Array(numbers[output * inputs..<(output + 1) * inputs])
          #expect(found == wanted, "seed 41, \(layout), output \(output)")
        }
        let got = try Self.run(backend, weight, x, bias: bias)
        for r in 0..<rows {
          let row = Self.rounded(Array(x[r * inputs..<(r + 1) * inputs]), layout, order: order)
          for n in 0..<outputs {
            var (sum, magnitude) = (Double(bias[n]), Double(abs(bias[n])))
            for k in 0..<inputs {
              let product = row[k] * Double(numbers[n * inputs + k])
              sum += product
              magnitude += abs(product)
            }
            let isClose = abs(Double(got[r * outputs + n]) - sum) <= magnitude * 1e-5 + 1e-30
            #expect(isClose, "seed 41, \(layout), \(level.name), row \(r), output \(n)")
          }
        }
        let bits = got.map(\.bitPattern)
        if let portable, layout.levels != .e4m3 { #expect(bits == portable, "\(layout), \(level.name)") }
        portable = portable ?? bits
      }
    }
  }

  @Test(arguments: levels)
  func aRowIsTheSameInAnyBatchOnAnyThreads(level: InstructionSet) throws {
    var generator = Generator(42)
    for layout in Self.layouts {
      let (rows, outputs, inputs) = (37, 200, 512)
      let source = Self.source(layout, rows: outputs, columns: inputs, seed: 42)
      let x = generator.floats(rows * inputs)
      var alone = [UInt32]()
      for threads in [1, 2, 7] {
        let backend = try makeBackend(level, threads: threads)
        let weight = try backend.packLinear([source])
        if alone.isEmpty {
          for r in 0..<rows {
            alone += try Self.run(backend, weight, Array(x[r * inputs..<(r + 1) * inputs]), bias: nil)
              .map(\.bitPattern)
          }
        }
        for count in [1, 2, 3, 4, 5, 6, 7, 13, rows] {
          let first = Int(generator.next() % UInt64(rows - count + 1))
          let got = try Self.run(
            backend, weight, Array(x[first * inputs..<(first + count) * inputs]), bias: nil
          ).map(\.bitPattern)
          let isEqual = got == Array(alone[first * outputs..<(first + count) * outputs])
          #expect(isEqual, "seed 42, \(layout), rows \(first)..<\(first + count), \(threads) threads")
        }
      }
    }
  }

  @Test func roundingAtLoadIsAsGoodAsTheFormat() throws {
    var generator = Generator(43)
    let (outputs, inputs) = (70, 290)
    // About normal.
    let w = (0..<outputs * inputs).map { _ in (0..<6).reduce(Float(0)) { sum, _ in sum + generator.float(0.02) } }
    // Relative errors of normally distributed numbers, measured, with a little room.
    for (layout, bound) in [(CodeLayout.int4, 0.085), (.int8, 0.0056), (.float8, 0.028)] {
      var first: [[Float]]?
      for level in levels {
        let backend = try makeBackend(level, threads: 3)
        let weight = try pack(
          backend, w, outputs: outputs, inputs: inputs, source: .float32, format: .codes(layout))
        let numbers = (0..<outputs).map { backend.codeNumbers(weight, output: $0) }
        let flat = numbers.flatMap { $0 }
        let error = zip(flat, w).reduce(0.0) { $0 + Double($1.0 - $1.1) * Double($1.0 - $1.1) }
        let total = w.reduce(0.0) { $0 + Double($1) * Double($1) }
        #expect((error / total).squareRoot() < bound, "\(layout), \(level.name)")
        if let first { #expect(first == numbers, "\(layout), \(level.name)") }
        first = first ?? numbers
        let x = generator.floats(inputs)
        #expect(try Self.run(backend, weight, x, bias: nil).allSatisfy(\.isFinite))
      }
    }
    // Numbers that a format holds stay as they are: each group has its extreme, -8 steps.
    let backend = try makeBackend(levels.last!)
    let exact = (0..<64 * 64).map { (index: Int) -> Float in
      let step = index % 32 == 0 ? -8 : index * 7 % 15 - 7
      return Float(step) * 0.25
    }
    let weight = try pack(backend, exact, outputs: 64, inputs: 64, source: .bfloat16, format: .codes(.int4))
    for output in 0..<64 {
      #expect(backend.codeNumbers(weight, output: output) == Array(exact[output * 64..<output * 64 + 64]))
    }
  }

  @Test func joinedWeightsAreTheirParts() throws {
    var generator = Generator(44)
    let inputs = 256
    let sources = [Self.layouts[7], Self.layouts[9], Self.layouts[0]].enumerated().map {
      Self.source($1, rows: [128, 40, 7][$0], columns: inputs, seed: UInt64($0))
    }
    let x = generator.floats(3 * inputs)
    let bias = generator.floats(175)
    for level in levels {
      let backend = try makeBackend(level)
      let parts = try sources.map { try backend.packLinear([$0]) }
      let joined = backend.joinLinear(parts)
      #expect(joined.outputs == 175 && joined.byteCount == parts.reduce(0) { $0 + $1.byteCount })
      let got = try Self.run(backend, joined, x, bias: bias)
      var first = 0
      for part in parts {
        let (count, begin) = (part.outputs, first)
        let own = try Self.run(backend, part, x, bias: Array(bias[begin..<begin + count]))
        for r in 0..<3 {
          let wanted = Array(got[r * 175 + begin..<r * 175 + begin + count])
          #expect(Array(own[r * count..<(r + 1) * count]) == wanted, "\(level.name)")
        }
        first += part.outputs
      }
    }
    // Stacked sources of one layout are one weight; others are refused.
    let backend = try makeBackend(levels.last!)
    let whole = Self.source(Self.layouts[0], rows: 150, columns: inputs, seed: 9)
    let stacked = try backend.packLinear([whole.rows(0..<3), whole.rows(3..<100), whole.rows(100..<150)])
    #expect(
      try Self.run(backend, stacked, x, bias: nil) == Self.run(backend, backend.packLinear([whole]), x, bias: nil))
    #expect(throws: EngineError.self) { try backend.packLinear([sources[0], sources[1]]) }
    #expect(throws: EngineError.self) { try backend.packLinear([QuantizedSource]()) }
  }

  @Test(arguments: levels)
  func notNumbersStayInTheirRow(level: InstructionSet) throws {
    let backend = try makeBackend(level)
    let source = Self.source(Self.layouts[0], rows: 20, columns: 200, seed: 3)
    let weight = try backend.packLinear([source])
    var generator = Generator(45)
    var x = generator.floats(3 * 200)
    x[200 + 5] = .nan
    x[400 + 150] = .infinity
    let got = try Self.run(backend, weight, x, bias: nil)
    #expect(got[..<20].allSatisfy(\.isFinite) && got[20...].allSatisfy(\.isNaN))
  }
}
