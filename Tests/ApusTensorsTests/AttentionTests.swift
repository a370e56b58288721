import ApusCore
import ApusTensors
import Glibc
import Testing

/// Sequences with K and V in pages that lie in no order, as a cache would have them.
struct AttentionCase {
  var shape: AttentionShape
  var dtype: DType
  /// Positions of each sequence that have K and V.
  var lengths: [Int]
  var keys: [[Float]]
  var values: [[Float]]
  var queries: [[Float]]
  /// Page tables.
  var tables: [[Int32]]
  var pageCount: Int

  init(_ generator: inout Generator, shape: AttentionShape, dtype: DType, lengths: [Int]) {
    self.shape = shape
    self.dtype = dtype
    self.lengths = lengths
    let kvColumns = shape.kvHeads * shape.headDimension
    let qColumns = shape.queryHeads * shape.headDimension
    keys = lengths.map { generator.floats($0 * kvColumns, 2) }
    values = lengths.map { generator.floats($0 * kvColumns, 2) }
    queries = lengths.map { generator.floats($0 * qColumns, 2) }
    let pages = lengths.map { ($0 + 15) / 16 }
    pageCount = pages.reduce(0, +) + 3
    var free = (0..<pageCount).map(Int32.init).shuffled(using: &generator)
    tables = pages.map { count in (0..<count).map { _ in free.removeLast() } }
  }

  /// Pages that hold every sequence; the places nobody wrote to are poisoned with NaN.
  func makeLayer(_ backend: CPUBackend) throws -> any KVLayer {
    let layer = try backend.makeKVLayer(
      pageCount: pageCount, kvHeads: shape.kvHeads, headDimension: shape.headDimension, dtype: dtype)
    let columns = shape.kvHeads * shape.headDimension
    let everywhere = pageCount * 16
    let poison = try tensor(
      [Float](repeating: .nan, count: everywhere * columns), rows: everywhere, columns: columns)
    backend.writeKV(poison, poison, slots: (0..<everywhere).map(Int32.init), layer: layer)
    for s in lengths.indices {
      let slots = (0..<lengths[s]).map { tables[s][$0 / 16] * 16 + Int32($0 % 16) }
      backend.writeKV(
        try tensor(keys[s], rows: lengths[s], columns: columns, padding: 3, shift: 1),
        try tensor(values[s], rows: lengths[s], columns: columns, padding: 1), slots: slots, layer: layer)
    }
    return layer
  }

  /// Attends for a range of positions of each of some sequences. Only the pages that positions need are given.
  func attend(
    _ backend: CPUBackend, _ layer: any KVLayer, _ parts: [(sequence: Int, positions: Range<Int>)]
  ) throws -> [[UInt32]] {
    let columns = shape.queryHeads * shape.headDimension
    var rowStart: [Int32] = [0]
    var start = [Int32]()
    var pageOffset = [Int32]()
    var pages = [Int32]()
    var q = [Float]()
    for (s, positions) in parts {
      rowStart.append(rowStart.last! + Int32(positions.count))
      start.append(Int32(positions.lowerBound))
      pageOffset.append(Int32(pages.count))
      pages += tables[s].prefix((positions.upperBound + 15) / 16)
      q += queries[s][positions.lowerBound * columns..<positions.upperBound * columns]
    }
    let rows = Int(rowStart.last!)
    let out = try tensor([Float](repeating: 0, count: rows * columns), rows: rows, columns: columns, padding: 5)
    backend.attention(
      try tensor(q, rows: rows, columns: columns, padding: 2, shift: 1), layer: layer,
      batch: AttentionBatch(
        sequenceCount: parts.count, rowStart: rowStart, start: start, pageOffset: pageOffset, pages: pages),
      shape: shape, out: out)
    let all = bits(out)
    return parts.indices.map { i in
      Array(all[Int(rowStart[i]) * columns..<Int(rowStart[i + 1]) * columns])
    }
  }

  /// A number as the pages round it.
  func cached(_ numbers: [Float], _ t: Int, _ head: Int, _ i: Int) -> Float {
    let d = shape.headDimension
    let begin = (t * shape.kvHeads + head) * d
    guard dtype.byteCount == 1 else { return rounded(numbers[begin + i], dtype) }
    let scale = numbers[begin..<begin + d].reduce(0) { max($0, abs($1)) } / (dtype == .int8 ? 127 : 448)
    let scaled = numbers[begin + i] / scale
    if dtype == .int8 { return scaled.rounded(.toNearestOrEven) * scale }
    let step = Float(sign: .plus, exponent: max(scaled == 0 ? -6 : Int(scaled.exponent), -6) - 3, significand: 1)
    return (scaled / step).rounded(.toNearestOrEven) * step * scale
  }

  /// One row in double precision, from K and V as the pages round them.
  func oracle(sequence s: Int, position: Int) -> [Double] {
    let d = shape.headDimension
    let group = shape.queryHeads / shape.kvHeads
    let first = shape.slidingWindow > 0 ? max(0, position + 1 - shape.slidingWindow) : 0
    var result = [Double]()
    for head in 0..<shape.queryHeads {
      let kvHead = head / group
      var scores = [Double]()
      for t in first...position {
        var dot = 0.0
        for i in 0..<d {
          let q = queries[s][(position * shape.queryHeads + head) * d + i]
          let k = cached(keys[s], t, kvHead, i)
          let isNarrow = dtype == .bfloat16 || dtype.byteCount == 1
          dot += Double(isNarrow ? rounded(q, .bfloat16) : q) * Double(k)
        }
        var score = dot * Double(shape.scale)
        if shape.softCap > 0 { score = Double(shape.softCap) * tanh(score / Double(shape.softCap)) }
        scores.append(score)
      }
      let sink = shape.sinks.map { Double($0.float32[head]) }
      let most = max(scores.max()!, sink ?? -.infinity)
      let weights = scores.map { exp($0 - most) }
      let sum = weights.reduce(0, +) + (sink.map { exp($0 - most) } ?? 0)
      for i in 0..<d {
        var total = 0.0
        for t in first...position {
          total += weights[t - first] * Double(cached(values[s], t, kvHead, i))
        }
        result.append(total / sum)
      }
    }
    return result
  }
}

@Suite struct AttentionTests {
  static let dtypes: [DType] = [.float32, .float16, .bfloat16, .int8, .float8]

  static let shapes: [AttentionShape] = [
    AttentionShape(queryHeads: 4, kvHeads: 2, headDimension: 64, scale: 0.125),
    AttentionShape(queryHeads: 3, kvHeads: 3, headDimension: 24, scale: 0.2, slidingWindow: 37),
    AttentionShape(queryHeads: 7, kvHeads: 1, headDimension: 8, scale: 0.3, softCap: 5),
    AttentionShape(queryHeads: 5, kvHeads: 1, headDimension: 80, scale: 0.1),
    AttentionShape(queryHeads: 2, kvHeads: 1, headDimension: 96, scale: 0.1, slidingWindow: 300, softCap: 3),
    AttentionShape(queryHeads: 6, kvHeads: 2, headDimension: 100, scale: 0.1),
    AttentionShape(queryHeads: 8, kvHeads: 2, headDimension: 128, scale: 0.08),
    AttentionShape(queryHeads: 53, kvHeads: 1, headDimension: 16, scale: 0.25),
    AttentionShape(queryHeads: 2, kvHeads: 2, headDimension: 33, scale: 0.2),
  ]

  @Test(arguments: levels, dtypes)
  func matchesAPlainSoftmax(level: InstructionSet, dtype: DType) throws {
    let backend = try makeBackend(level)
    var generator = Generator(21)
    // Sinks far below, near and far above the scores.
    let sinks = try tensor([-200, 0.5, 3, 6, 200], rows: 1, columns: 5)
    let shapes =
      Self.shapes + [
        AttentionShape(queryHeads: 5, kvHeads: 1, headDimension: 48, scale: 0.1, softCap: 6, sinks: sinks),
        AttentionShape(queryHeads: 4, kvHeads: 2, headDimension: 64, scale: 0.1, slidingWindow: 290, sinks: sinks),
      ]
    for shape in shapes {
      let problem = AttentionCase(&generator, shape: shape, dtype: dtype, lengths: [1, 16, 45, 530])
      let layer = try problem.makeLayer(backend)
      #expect(layer.byteCount > 0 && layer.dtype == dtype && layer.headDimension == shape.headDimension)
      let parts = [(0, 0..<1), (1, 15..<16), (2, 3..<45), (3, 250..<262), (3, 529..<530)]
      let got = try problem.attend(backend, layer, parts.map { (sequence: $0.0, positions: $0.1) })
      // Weights are rounded to bfloat16 there: each is off by 2^-9 at most, and values are below 2.
      // With 8 bits, a number between two codes may also have gone to the other one here than there.
      let tolerance = dtype == .bfloat16 ? 8e-3 : dtype == .float8 ? 4e-2 : dtype == .int8 ? 2e-2 : 2e-5
      for (i, (s, positions)) in parts.enumerated() {
        let columns = shape.queryHeads * shape.headDimension
        for position in [positions.lowerBound, positions.upperBound - 1] {
          let expected = problem.oracle(sequence: s, position: position)
          let row = position - positions.lowerBound
          let isClose = (0..<columns).allSatisfy {
            abs(Double(Float(bitPattern: got[i][row * columns + $0])) - expected[$0]) <= tolerance
          }
          #expect(isClose, "seed 21, \(shape), sequence \(s), position \(position)")
        }
      }
    }
  }

  @Test(arguments: levels, dtypes)
  func aRowIsTheSameHoweverItIsComputed(level: InstructionSet, dtype: DType) throws {
    var generator = Generator(22)
    let shapes = [
      AttentionShape(queryHeads: 4, kvHeads: 2, headDimension: 40, scale: 0.2),
      AttentionShape(queryHeads: 3, kvHeads: 1, headDimension: 64, scale: 0.2, slidingWindow: 270),
      AttentionShape(queryHeads: 1, kvHeads: 1, headDimension: 18, scale: 0.2, softCap: 4),
      AttentionShape(
        queryHeads: 4, kvHeads: 2, headDimension: 24, scale: 0.2, slidingWindow: 280,
        sinks: try tensor([-3, 0, 1, 40], rows: 1, columns: 4)),
    ]
    for shape in shapes {
      let lengths = [70, 600, 17, 270]
      let problem = AttentionCase(&generator, shape: shape, dtype: dtype, lengths: lengths)
      let columns = shape.queryHeads * shape.headDimension
      // The reference: one thread, one row at a time.
      let single = try makeBackend(level, threads: 1)
      var layer = try problem.makeLayer(single)
      var alone = [[UInt32]]()
      for s in lengths.indices {
        var rows = [UInt32]()
        for position in 0..<lengths[s] {
          rows += try problem.attend(single, layer, [(sequence: s, positions: position..<position + 1)])[0]
        }
        alone.append(rows)
      }
      for threads in threadCounts {
        let backend = try makeBackend(level, threads: threads)
        layer = try problem.makeLayer(backend)
        for _ in 0..<12 {
          // Some sequences in some order, each with some run of positions: decode rows and chunks mixed.
          let sequences = lengths.indices.shuffled(using: &generator).prefix(Int(generator.next() % 4) + 1)
          var parts = [(sequence: Int, positions: Range<Int>)]()
          for s in sequences {
            let count = [1, 1, 2, 5, 33, 150, lengths[s]].randomElement(using: &generator)!
            let first = Int(generator.next() % UInt64(max(1, lengths[s] - count + 1)))
            parts.append((s, first..<min(lengths[s], first + count)))
          }
          let got = try problem.attend(backend, layer, parts)
          for (i, (s, positions)) in parts.enumerated() {
            let expected = Array(alone[s][positions.lowerBound * columns..<positions.upperBound * columns])
            #expect(got[i] == expected, "seed 22, \(shape), \(threads) threads, \(parts)")
          }
        }
      }
    }
  }

  /// Sequences whose first two pieces, or first one, lie in the same pages.
  @Test(arguments: levels, dtypes)
  func sharedPagesChangeNothing(level: InstructionSet, dtype: DType) throws {
    var generator = Generator(24)
    for (shape, newTokens) in [
      (AttentionShape(queryHeads: 6, kvHeads: 2, headDimension: 40, scale: 0.2), 1),
      (AttentionShape(queryHeads: 2, kvHeads: 2, headDimension: 64, scale: 0.2), 3),
    ] {
      var problem = AttentionCase(&generator, shape: shape, dtype: dtype, lengths: [600, 530, 45, 700, 400, 512])
      let columns = shape.kvHeads * shape.headDimension
      for (s, shared) in [(1, 512), (3, 512), (4, 256), (5, 512)] {
        problem.keys[s].replaceSubrange(0..<shared * columns, with: problem.keys[0].prefix(shared * columns))
        problem.values[s].replaceSubrange(0..<shared * columns, with: problem.values[0].prefix(shared * columns))
        problem.tables[s].replaceSubrange(0..<shared / 16, with: problem.tables[0].prefix(shared / 16))
      }
      let parts = [3, 0, 2, 4, 1, 5].map { s in
        (sequence: s, positions: problem.lengths[s] - newTokens..<problem.lengths[s])
      }
      let single = try makeBackend(level, threads: 1)
      let singleLayer = try problem.makeLayer(single)
      let alone = try parts.map { try problem.attend(single, singleLayer, [$0])[0] }
      for threads in [1, 2, 7] {
        for shares in [true, false] {
          let backend = try CPUBackend(threads: threads, isa: level, sharesPrefixes: shares)
          let together = try problem.attend(backend, try problem.makeLayer(backend), parts)
          #expect(together == alone, "seed 24, \(shape), \(threads) threads")
        }
      }
    }
  }

  @Test(arguments: levels, dtypes)
  func copiedPagesAttendAlike(level: InstructionSet, dtype: DType) throws {
    let backend = try makeBackend(level)
    var generator = Generator(23)
    let shape = AttentionShape(queryHeads: 4, kvHeads: 4, headDimension: 72, scale: 0.1)
    var problem = AttentionCase(&generator, shape: shape, dtype: dtype, lengths: [64])
    let layer = try problem.makeLayer(backend)
    let before = try problem.attend(backend, layer, [(sequence: 0, positions: 0..<64)])
    let used = Set(problem.tables[0])
    let free = (0..<Int32(problem.pageCount)).filter { !used.contains($0) }
    backend.copyPages(layer: layer, from: Array(problem.tables[0].prefix(3)), to: free, count: 3)
    problem.tables[0].replaceSubrange(0..<3, with: free.prefix(3))
    #expect(try problem.attend(backend, layer, [(sequence: 0, positions: 0..<64)]) == before)
  }
}
