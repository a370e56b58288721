import ApusCore
import ApusTensors
import Testing

/// The operators of encoders on every level of instructions against plain loops.
struct EncoderOperatorTests {
  private static let reference = ReferenceBackend()
  private static let backends: [CPUBackend] = InstructionSet.allCases.enumerated().compactMap { index, level in
    try? CPUBackend(threads: 1 + index % 3, isa: level)
  }

  /// Numbers in -range...range.
  private func tensor(
    _ rows: Int, _ columns: Int, _ range: Float = 1, offset: Float = 0,
    using generator: inout Generator
  ) throws -> Tensor {
    let tensor = try Self.reference.allocate(rows: rows, columns: columns, dtype: .float32)
    for index in 0..<rows * columns {
      tensor.float32[index] = offset + Float.random(in: -range...range, using: &generator)
    }
    return tensor
  }

  private func copy(_ tensor: Tensor) throws -> Tensor {
    let copy = try Self.reference.allocate(rows: tensor.rows, columns: tensor.columns, dtype: .float32)
    for index in 0..<tensor.rows * tensor.columns { copy.float32[index] = tensor.float32[index] }
    return copy
  }

  private func largestDifference(_ first: Tensor, _ second: Tensor) -> Float {
    (0..<first.rows * first.columns).reduce(0) { max($0, abs(first.float32[$1] - second.float32[$1])) }
  }

  @Test func layerNorm() throws {
    #expect(!Self.backends.isEmpty)
    var generator = Generator(11)
    for columns in [1, 15, 16, 33, 64, 100, 384] {
      for offset in [Float(0), 50] {
        let x = try tensor(5, columns, 2, offset: offset, using: &generator)
        let y = try tensor(5, columns, 2, using: &generator)
        let (weight, bias) = (try tensor(1, columns, using: &generator), try tensor(1, columns, using: &generator))
        for other in [nil, y] {
          let wanted = try copy(x)
          Self.reference.layerNorm(x, adding: other, weight: weight, bias: bias, epsilon: 1e-5, out: wanted)
          for backend in Self.backends {
            let out = try copy(x)
            backend.layerNorm(out, adding: other, weight: weight, bias: bias, epsilon: 1e-5, out: out)
            // Around 50 a float's step is 4e-6, and differences from the mean are divided by about one.
            let bound: Float = columns == 1 ? 1e-2 : offset == 0 ? 5e-6 : 5e-5
            #expect(largestDifference(out, wanted) <= bound, "\(columns) columns on \(backend.name)")
          }
        }
      }
    }
  }

  @Test(arguments: [ActivationFunction.gelu, .geluTanh, .relu, .silu])
  func activations(function: ActivationFunction) throws {
    let count = 4001
    let x = try Self.reference.allocate(rows: 1, columns: count, dtype: .float32)
    for index in 0..<count { x.float32[index] = (Float(index) - 2000) / 150 }
    let wanted = try copy(x)
    Self.reference.activate(wanted, function)
    for backend in Self.backends {
      let out = try copy(x)
      backend.activate(out, function)
      #expect(largestDifference(out, wanted) <= 3e-6, "\(function) on \(backend.name)")
      // Far out nothing overflows.
      out.float32[0] = -1e4
      out.float32[1] = 1e4
      backend.activate(out.columns(0..<2), function)
      #expect(abs(out.float32[0]) < 1e-30 && out.float32[1] == 1e4, "\(function) on \(backend.name)")
    }
  }

  @Test func attention() throws {
    var generator = Generator(11)
    for (heads, dimension) in [(1, 5), (3, 16), (2, 40), (4, 32)] {
      let lengths = [1, 2, 16, 17, 70, 64]
      var starts: [Int32] = [0]
      for length in lengths { starts.append(starts.last! + Int32(length)) }
      let (rows, width) = (Int(starts.last!), heads * dimension)
      // Side by side, as the projection leaves them.
      let qkv = try tensor(rows, 3 * width, 2, using: &generator)
      let parts = (0..<3).map { qkv.columns($0 * width..<($0 + 1) * width) }
      func run(_ backend: any EncoderBackend, _ first: Int, _ last: Int) throws -> Tensor {
        let begin = Int(starts[first])
        let range = begin..<Int(starts[last])
        let out = try Self.reference.allocate(rows: range.count, columns: width, dtype: .float32)
        let local = starts[first...last].map { $0 - Int32(begin) }
        backend.attendToAll(
          parts[0].rows(range), parts[1].rows(range), parts[2].rows(range), rowStart: local,
          sequenceCount: last - first, heads: heads, headDimension: dimension,
          scale: 1 / Float(dimension).squareRoot(), out: out)
        return out
      }
      let wanted = try run(Self.reference, 0, lengths.count)
      for backend in Self.backends {
        let found = try run(backend, 0, lengths.count)
        #expect(largestDifference(found, wanted) <= 5e-6, "\(heads) x \(dimension) on \(backend.name)")
        // A sequence alone has the same bits.
        for index in lengths.indices {
          let alone = try run(backend, index, index + 1)
          let same = (0..<alone.rows * width).allSatisfy {
            alone.float32[$0] == found.float32[Int(starts[index]) * width + $0]
          }
          #expect(same, "sequence \(index) on \(backend.name)")
        }
      }
    }
  }
}
