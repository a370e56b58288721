import ApusCore
import ApusTensors
import Testing

@Suite struct LinearTests {
  static let formats: [WeightFormat] = [
    .dense(.float32), .dense(.float16), .dense(.bfloat16), .int8PerChannel,
  ]
  static let shapes: [(rows: Int, outputs: Int, inputs: Int)] = [
    (1, 1, 1), (1, 64, 64), (2, 65, 33), (3, 7, 130), (5, 100, 31), (6, 128, 64), (7, 200, 96), (13, 63, 257),
    (29, 130, 2100), (64, 192, 96), (1, 16, 4200), (9, 17, 4097),
  ]

  /// What the layer computes, in double precision from the numbers as the format rounds them, and how large the
  /// error may be.
  static func oracle(
    x: [Float], w: [Float], bias: [Float]?, rows: Int, outputs: Int, inputs: Int, format: WeightFormat
  ) -> (values: [Double], tolerance: [Double]) {
    var weights = w
    var scales = [Float](repeating: 1, count: outputs)
    var activations = x
    var rowScales = [Float](repeating: 1, count: rows)
    switch format {
    case .dense(let dtype):
      weights = w.map { rounded($0, dtype) }
      if dtype == .bfloat16 { activations = x.map { rounded($0, .bfloat16) } }
    case .int8PerChannel:
      for n in 0..<outputs {
        let row = w[n * inputs..<(n + 1) * inputs]
        let largest = row.map(abs).max()!
        scales[n] = largest / 127
        for k in 0..<inputs {
          weights[n * inputs + k] = largest > 0 ? (row[n * inputs + k] * (127 / largest)).rounded(.toNearestOrEven) : 0
        }
      }
      for r in 0..<rows {
        let row = x[r * inputs..<(r + 1) * inputs]
        let largest = row.map(abs).max()!
        rowScales[r] = largest / 127
        for k in 0..<inputs {
          activations[r * inputs + k] =
            largest > 0 ? (row[r * inputs + k] * (127 / largest)).rounded(.toNearestOrEven) : 0
        }
      }
    case .codes: fatalError("See CodesTests.")
    }
    var values = [Double]()
    var tolerance = [Double]()
    for r in 0..<rows {
      for n in 0..<outputs {
        var sum = 0.0
        var magnitude = 0.0
        for k in 0..<inputs {
          let product = Double(activations[r * inputs + k]) * Double(weights[n * inputs + k])
          sum += product
          magnitude += abs(product)
        }
        let scale = Double(scales[n]) * Double(rowScales[r])
        let added = Double(bias?[n] ?? 0)
        values.append(sum * scale + added)
        // Float32 sums of k terms: an error of at most k roundings; in practice far less. Integer sums are exact.
        let roundings = format == .int8PerChannel ? 4 : Double(inputs).squareRoot() * 2 + 4
        let sumError = (format == .int8PerChannel ? abs(sum * scale) : magnitude) * roundings * 0x1p-23
        tolerance.append(sumError + abs(added) * 0x1p-22 + 1e-30)
      }
    }
    return (values, tolerance)
  }

  @Test(arguments: levels, formats)
  func matchesAPlainSum(level: InstructionSet, format: WeightFormat) throws {
    let backend = try makeBackend(level)
    var generator = Generator(11)
    for (rows, outputs, inputs) in Self.shapes {
      for source in [DType.float32, .bfloat16, .float16] {
        let x = generator.floats(rows * inputs, 3)
        let w = generator.floats(outputs * inputs, 0.5).map { rounded($0, source) }
        let bias = source == .float32 ? generator.floats(outputs) : nil
        let weight = try pack(backend, w, outputs: outputs, inputs: inputs, source: source, format: format)
        #expect(weight.outputs == outputs && weight.inputs == inputs && weight.byteCount > 0)
        let out = try tensor(
          [Float](repeating: .nan, count: rows * outputs), rows: rows, columns: outputs, padding: 5, shift: 3)
        backend.linear(
          try tensor(x, rows: rows, columns: inputs, padding: 3, shift: 1), weight,
          bias: try bias.map { try tensor($0, rows: 1, columns: outputs, shift: 1) }, out: out)
        let expected = Self.oracle(
          x: x, w: w, bias: bias, rows: rows, outputs: outputs, inputs: inputs, format: format)
        let got = values(out)
        let worst = (0..<got.count).max {
          abs(Double(got[$0]) - expected.values[$0]) / expected.tolerance[$0]
            < abs(Double(got[$1]) - expected.values[$1]) / expected.tolerance[$1]
        }!
        let isClose = got.indices.allSatisfy {
          abs(Double(got[$0]) - expected.values[$0]) <= expected.tolerance[$0]
        }
        #expect(
          isClose,
          "seed 11, \(rows)x\(outputs)x\(inputs) from \(source.name): \(got[worst]), not \(expected.values[worst])"
        )
        // Nothing may be written between the rows.
        for r in 0..<rows - 1 {
          for c in outputs..<out.stride { #expect(out.float32[r * out.stride + c].isNaN) }
        }
      }
    }
  }

  @Test(arguments: levels, formats)
  func aRowIsTheSameInAnyBatchOnAnyThreads(level: InstructionSet, format: WeightFormat) throws {
    var generator = Generator(12)
    for (rows, outputs, inputs) in [(61, 200, 515), (17, 70, 4300)] {
      let x = generator.floats(rows * inputs)
      let w = generator.floats(outputs * inputs)
      var alone = [UInt32]()
      for threads in threadCounts {
        let backend = try makeBackend(level, threads: threads)
        let weight = try pack(backend, w, outputs: outputs, inputs: inputs, source: .float32, format: format)
        if alone.isEmpty {
          for r in 0..<rows {
            let out = try tensor([Float](repeating: 0, count: outputs), rows: 1, columns: outputs)
            backend.linear(
              try tensor(Array(x[r * inputs..<(r + 1) * inputs]), rows: 1, columns: inputs), weight, bias: nil,
              out: out)
            alone += bits(out)
          }
        }
        let all = try tensor(x, rows: rows, columns: inputs, padding: 1)
        for count in [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 24, rows] where count <= rows {
          let first = Int(generator.next() % UInt64(rows - count + 1))
          let out = try tensor(
            [Float](repeating: 0, count: count * outputs), rows: count, columns: outputs, padding: 2)
          backend.linear(all.rows(first..<first + count), weight, bias: nil, out: out)
          #expect(
            bits(out) == Array(alone[first * outputs..<(first + count) * outputs]),
            "seed 12, rows \(first)..<\(first + count), \(threads) threads")
        }
      }
    }
  }

  @Test(arguments: levels)
  func stackedSourcesAreOneWeight(level: InstructionSet) throws {
    let backend = try makeBackend(level)
    var generator = Generator(13)
    let inputs = 75
    let x = generator.floats(4 * inputs)
    for format in Self.formats {
      let parts = [3, 70, 1, 64, 30].map { generator.floats($0 * inputs) }
      let dtypes: [DType] = [.float32, .bfloat16, .float16, .bfloat16, .float32]
      var sources = [WeightSource]()
      var whole = [Float]()
      for (part, dtype) in zip(parts, dtypes) {
        let (memory, address) = try bytes(part, dtype, shift: 2)
        sources.append(
          WeightSource(
            address: address, dtype: dtype, rows: part.count / inputs, columns: inputs, owner: memory))
        whole += part.map { rounded($0, dtype) }
      }
      let stacked = try backend.packLinear(sources, format: format)
      let plain = try pack(backend, whole, outputs: 168, inputs: inputs, source: .float32, format: format)
      let a = try tensor([Float](repeating: 0, count: 4 * 168), rows: 4, columns: 168)
      let b = try tensor([Float](repeating: 0, count: 4 * 168), rows: 4, columns: 168)
      let input = try tensor(x, rows: 4, columns: inputs)
      backend.linear(input, stacked, bias: nil, out: a)
      backend.linear(input, plain, bias: nil, out: b)
      #expect(bits(a) == bits(b))
    }
  }

  @Test(arguments: levels)
  func int8SumsAreExactAtTheirLargest(level: InstructionSet) throws {
    let backend = try makeBackend(level)
    let inputs = 40_000
    let weight = try pack(
      backend, [Float](repeating: -1, count: inputs) + [Float](repeating: 1, count: inputs), outputs: 2,
      inputs: inputs, source: .float32, format: .int8PerChannel)
    for sign in [Float(1), -1] {
      let out = try tensor([0, 0], rows: 1, columns: 2)
      backend.linear(
        try tensor([Float](repeating: sign, count: inputs), rows: 1, columns: inputs), weight, bias: nil, out: out)
      #expect(abs(values(out)[0] + sign * Float(inputs)) < 0.02)
      #expect(abs(values(out)[1] - sign * Float(inputs)) < 0.02)
    }
  }

  /// Checkpoints may hold -128, whose magnitude is no signed number of 8 bits.
  @Test(arguments: levels)
  func theLeastInt8NumberKeepsItsValue(level: InstructionSet) throws {
    let backend = try makeBackend(level)
    let inputs = 70
    let numbers = (0..<3 * inputs).map { i in i < inputs || i % 3 == 0 ? Int8.min : Int8(truncatingIfNeeded: i * 37) }
    for rows in [1, 2, 3, 5] {
      // The largest magnitude of each row is 127, so that its scale is 1.
      let x = (0..<rows * inputs).map { i -> Float in
        (i + i / inputs) % 3 == 0 ? 127 : i % 7 == 0 ? Float(i % 100) : -127
      }
      let weight = try numbers.withUnsafeBytes { bytes in
        try [Float](repeating: 1, count: 3).withUnsafeBufferPointer { scales in
          try backend.packLinear(
            [
              WeightSource(
                address: bytes.baseAddress!, dtype: .int8, rows: 3, columns: inputs, scales: scales.baseAddress,
                owner: backend)
            ], format: .int8PerChannel)
        }
      }
      let out = try tensor([Float](repeating: 0, count: rows * 3), rows: rows, columns: 3)
      backend.linear(try tensor(x, rows: rows, columns: inputs), weight, bias: nil, out: out)
      var expected: [Float] = []
      for r in 0..<rows {
        for n in 0..<3 {
          expected.append((0..<inputs).reduce(0) { $0 + x[r * inputs + $1] * Float(numbers[n * inputs + $1]) })
        }
      }
      #expect(values(out) == expected, "\(rows) rows")
    }
  }

  @Test(arguments: levels)
  func int8ErrorIsMeasured(level: InstructionSet) throws {
    let backend = try makeBackend(level)
    let reference = ReferenceBackend()
    var generator = Generator(14)
    for outlier in [Float(1), 60] {
      var w = generator.floats(70 * 131)
      for n in 0..<70 { w[n * 131 + n] = outlier }
      let (memory, address) = try bytes(w, .bfloat16)
      let sources = [
        WeightSource(address: address, dtype: .bfloat16, rows: 30, columns: 131, owner: memory),
        WeightSource(address: address + 30 * 131 * 2, dtype: .bfloat16, rows: 40, columns: 131, owner: memory),
      ]
      let found = backend.int8Error(try backend.packLinear(sources, format: .int8PerChannel), sources)
      let wanted = reference.int8Error(try reference.packLinear(sources, format: .int8PerChannel), sources)
      #expect(abs(found - wanted) < 0.02 * wanted && (outlier > 1) == (found > 0.01), "\(found), \(wanted)")
    }
  }

  @Test func mistakesAreReported() throws {
    let backend = try makeBackend(.portable)
    let (memory, address) = try bytes([1, 2, 3, 4], .float32)
    let wide = WeightSource(address: address, dtype: .float32, rows: 1, columns: 4, owner: memory)
    let narrow = WeightSource(address: address, dtype: .float32, rows: 2, columns: 2, owner: memory)
    let integers = WeightSource(address: address, dtype: .int32, rows: 1, columns: 4, owner: memory)
    #expect(throws: EngineError.self) { try backend.packLinear([], format: .dense(.float32)) }
    #expect(throws: EngineError.self) { try backend.packLinear([wide, narrow], format: .dense(.float32)) }
    #expect(throws: EngineError.self) { try backend.packLinear([integers], format: .dense(.float32)) }
    #expect(throws: EngineError.self) { try backend.packLinear([wide], format: .dense(.int32)) }
    #expect(throws: EngineError.self) { try CPUBackend(threads: 0) }
    #expect(throws: EngineError.self) {
      try backend.makeKVLayer(pageCount: 1, kvHeads: 1, headDimension: 8, dtype: .int32)
    }
    #expect(throws: EngineError.self) { try backend.allocate(rows: .max, columns: 2, dtype: .float32) }
  }
}
