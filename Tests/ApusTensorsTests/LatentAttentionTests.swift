import ApusCore
import ApusTensors
import Glibc
import Testing

/// Sequences with latents in pages that lie in no order.
private struct LatentCase {
  var heads: Int
  var keyDimension: Int
  var valueDimension: Int
  var dtype: DType
  var lengths: [Int]
  var latents: [[Float]]
  var queries: [[Float]]
  var tables: [[Int32]]
  var pageCount: Int
  var scale: Float { 1 / Float(keyDimension).squareRoot() }

  init(_ generator: inout Generator, heads: Int, key: Int, value: Int, dtype: DType, lengths: [Int]) {
    self.heads = heads
    keyDimension = key
    valueDimension = value
    self.dtype = dtype
    self.lengths = lengths
    latents = lengths.map { generator.floats($0 * key, 2) }
    queries = lengths.map { generator.floats($0 * heads * key, 2) }
    let pages = lengths.map { ($0 + 15) / 16 }
    pageCount = pages.reduce(0, +) + 3
    var free = (0..<pageCount).map(Int32.init).shuffled(using: &generator)
    tables = pages.map { count in (0..<count).map { _ in free.removeLast() } }
  }

  /// Pages that hold every sequence; the places nobody wrote to are poisoned with NaN.
  func makeLayer(_ backend: any Backend) throws -> any KVLayer {
    let layer = try backend.makeLatentLayer(
      pageCount: pageCount, keyDimension: keyDimension, valueDimension: valueDimension, dtype: dtype)
    let everywhere = pageCount * 16
    backend.writeLatents(
      try tensor([Float](repeating: .nan, count: everywhere * keyDimension), rows: everywhere, columns: keyDimension),
      slots: (0..<everywhere).map(Int32.init), layer: layer)
    for s in lengths.indices {
      backend.writeLatents(
        try tensor(latents[s], rows: lengths[s], columns: keyDimension, padding: 3, shift: 1),
        slots: (0..<lengths[s]).map { tables[s][$0 / 16] * 16 + Int32($0 % 16) }, layer: layer)
    }
    return layer
  }

  func attend(
    _ backend: any Backend, _ layer: any KVLayer, _ parts: [(sequence: Int, positions: Range<Int>)]
  ) throws -> [[Float]] {
    let (wide, narrow) = (heads * keyDimension, heads * valueDimension)
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
      q += queries[s][positions.lowerBound * wide..<positions.upperBound * wide]
    }
    let rows = Int(rowStart.last!)
    let out = try tensor([Float](repeating: 0, count: rows * narrow), rows: rows, columns: narrow, padding: 5)
    backend.attention(
      try tensor(q, rows: rows, columns: wide, padding: 2, shift: 1), layer: layer,
      batch: AttentionBatch(
        sequenceCount: parts.count, rowStart: rowStart, start: start, pageOffset: pageOffset, pages: pages),
      shape: AttentionShape(queryHeads: heads, kvHeads: 1, headDimension: keyDimension, scale: scale), out: out)
    let all = values(out)
    return parts.indices.map { Array(all[Int(rowStart[$0]) * narrow..<Int(rowStart[$0 + 1]) * narrow]) }
  }
}

@Suite struct LatentAttentionTests {
  static let dtypes: [DType] = [.float32, .float16, .bfloat16]
  /// Heads, numbers of a key, of a value: DeepSeek's proportions, odd ones, values as long as keys.
  static let shapes = [(4, 72, 64), (7, 29, 20), (1, 40, 40), (53, 18, 17), (16, 48, 33), (96, 24, 16)]

  @Test(arguments: levels, dtypes)
  func matchesThePlainLoops(level: InstructionSet, dtype: DType) throws {
    let backend = try makeBackend(level)
    let reference = ReferenceBackend()
    var generator = Generator(31)
    for (heads, key, value) in Self.shapes {
      let problem = LatentCase(
        &generator, heads: heads, key: key, value: value, dtype: dtype, lengths: [1, 16, 45, 300])
      let layer = try problem.makeLayer(backend)
      #expect(layer.isLatent && layer.headDimension == key && layer.valueDimension == value && layer.kvHeads == 1)
      let parts = [(0, 0..<1), (1, 15..<16), (2, 3..<12), (3, 255..<258), (3, 299..<300)]
        .map { (sequence: $0.0, positions: $0.1) }
      let got = try problem.attend(backend, layer, parts)
      let expected = try problem.attend(reference, try problem.makeLayer(reference), parts)
      // Queries and weights are rounded to bfloat16 there: scores of |q| |k| <= 4 per number err by 2^-9 of their terms.
      let tolerance: Float = dtype == .bfloat16 ? 4e-2 : dtype == .float16 ? 5e-5 : 2e-5
      for (row, (a, b)) in zip(got, expected).enumerated() {
        let error = zip(a, b).reduce(0) { max($0, abs($1.0 - $1.1)) }
        // A comparison that NaN fails.
        #expect(error <= tolerance, "seed 31, \(heads) heads, \(key), \(value), part \(row): \(error)")
      }
    }
  }

  @Test(arguments: levels, dtypes)
  func aRowIsTheSameHoweverItIsComputed(level: InstructionSet, dtype: DType) throws {
    var generator = Generator(32)
    for (heads, key, value) in [(4, 40, 32), (7, 19, 15), (64, 24, 16)] {
      let lengths = [70, 560, 17]
      var problem = LatentCase(&generator, heads: heads, key: key, value: value, dtype: dtype, lengths: lengths)
      // The third sequence begins as the second one, in the same page.
      problem.latents[2].replaceSubrange(0..<16 * key, with: problem.latents[1].prefix(16 * key))
      problem.tables[2][0] = problem.tables[1][0]
      let columns = heads * value
      let single = try makeBackend(level, threads: 1)
      var layer = try problem.makeLayer(single)
      let probes = [0: [0, 15, 16, 69], 1: [0, 255, 256, 500, 530, 559], 2: [0, 16]]
      var alone: [Int: [Int: [Float]]] = [:]
      for (s, positions) in probes {
        for p in positions { alone[s, default: [:]][p] = try problem.attend(single, layer, [(s, p..<p + 1)])[0] }
      }
      for threads in threadCounts {
        let backend = try makeBackend(level, threads: threads)
        layer = try problem.makeLayer(backend)
        for _ in 0..<6 {
          var parts = [(sequence: Int, positions: Range<Int>)]()
          for s in lengths.indices.shuffled(using: &generator).prefix(Int(generator.next() % 3) + 1) {
            let count = [1, 2, 5, 33, lengths[s]].randomElement(using: &generator)!
            let p = probes[s]!.randomElement(using: &generator)!
            let first = max(0, min(p - Int(generator.next() % UInt64(count)), lengths[s] - count))
            parts.append((s, first..<max(p + 1, min(lengths[s], first + count))))
          }
          let got = try problem.attend(backend, layer, parts)
          for (i, (s, positions)) in parts.enumerated() {
            for (p, expected) in alone[s]! where positions.contains(p) {
              let row = p - positions.lowerBound
              let isEqual = Array(got[i][row * columns..<(row + 1) * columns]) == expected
              #expect(isEqual, "seed 32, \(heads) heads, \(threads) threads, sequence \(s), position \(p)")
            }
          }
        }
      }
    }
  }

  /// Sequences whose first two pieces lie in the same pages, as the prefix cache leaves them.
  @Test(arguments: levels, dtypes)
  func sharedPagesChangeNothing(level: InstructionSet, dtype: DType) throws {
    var generator = Generator(33)
    var problem = LatentCase(&generator, heads: 6, key: 40, value: 32, dtype: dtype, lengths: [600, 530, 45, 700])
    for (s, shared) in [(1, 512), (3, 256)] {
      problem.latents[s].replaceSubrange(0..<shared * 40, with: problem.latents[0].prefix(shared * 40))
      problem.tables[s].replaceSubrange(0..<shared / 16, with: problem.tables[0].prefix(shared / 16))
    }
    let parts = [3, 0, 2, 1].map { (sequence: $0, positions: problem.lengths[$0] - 2..<problem.lengths[$0]) }
    let single = try makeBackend(level, threads: 1)
    let singleLayer = try problem.makeLayer(single)
    let alone = try parts.map { try problem.attend(single, singleLayer, [$0])[0] }
    for threads in [1, 2, 7] {
      for shares in [true, false] {
        let backend = try CPUBackend(threads: threads, isa: level, sharesPrefixes: shares)
        let together = try problem.attend(backend, try problem.makeLayer(backend), parts)
        #expect(together == alone, "seed 33, \(threads) threads")
      }
    }
  }

  /// The absorbed form, as layers compute it, against the expanded one: keys and values of all heads made from the latents
  /// and ordinary attention over them. Sizes are drawn at random.
  @Test(arguments: levels)
  func absorbedEqualsExpanded(level: InstructionSet) throws {
    let backend = try makeBackend(level)
    for seed in UInt64(1)...12 {
      var generator = Generator(seed)
      func draw(_ range: ClosedRange<Int>) -> Int { Int.random(in: range, using: &generator) }
      let (heads, rank, plain, rotated) = (draw(1...9), draw(3...48), draw(1...24), 2 * draw(1...8))
      let (value, length) = (draw(1...24), draw(1...300))
      let scale = 1 / Float(plain + rotated).squareRoot()
      let k = (0..<heads).map { _ in generator.floats(plain * rank, 0.5) }
      let v = (0..<heads).map { _ in generator.floats(value * rank, 0.5) }
      let cached = generator.floats(length * (rank + rotated), 1.5)
      let q = generator.floats(heads * (plain + rotated), 1.5)

      // Absorbed.
      var problem = LatentCase(
        &generator, heads: heads, key: rank + rotated, value: rank, dtype: .float32, lengths: [length])
      problem.latents[0] = cached
      let layer = try problem.makeLayer(backend)
      let query = try tensor(q, rows: 1, columns: q.count)
      let absorbed = try backend.allocate(rows: 1, columns: heads * (rank + rotated), dtype: .float32)
      for h in 0..<heads {
        let turned = (0..<rank * plain).map { k[h][$0 % plain * rank + $0 / plain] }
        let weight = try pack(
          backend, turned, outputs: rank, inputs: plain, source: .float32, format: .dense(.float32))
        let (from, to) = (h * (plain + rotated), h * (rank + rotated))
        backend.linear(
          query.columns(from..<from + plain), weight, bias: nil, out: absorbed.columns(to..<to + rank))
        for i in 0..<rotated { absorbed.float32[to + rank + i] = q[from + plain + i] }
      }
      let attended = try backend.allocate(rows: 1, columns: heads * rank, dtype: .float32)
      // Named, so that they live as long as the batch points to them.
      let (rowStart, start, pageOffset): ([Int32], [Int32], [Int32]) = ([0, 1], [Int32(length - 1)], [0])
      let table = problem.tables[0]
      withExtendedLifetime((rowStart, start, pageOffset, table)) {
        backend.attention(
          absorbed, layer: layer,
          batch: AttentionBatch(
            sequenceCount: 1, rowStart: rowStart, start: start, pageOffset: pageOffset, pages: table),
          shape: AttentionShape(queryHeads: heads, kvHeads: 1, headDimension: rank + rotated, scale: scale),
          out: attended)
      }

      for h in 0..<heads {
        // Expanded, in double precision.
        func dot(_ matrix: [Float], _ row: Int, _ t: Int) -> Double {
          (0..<rank).reduce(0.0) { $0 + Double(matrix[row * rank + $1]) * Double(cached[t * (rank + rotated) + $1]) }
        }
        let scores = (0..<length).map { t in
          var score = 0.0
          for i in 0..<plain { score += Double(q[h * (plain + rotated) + i]) * dot(k[h], i, t) }
          for i in 0..<rotated {
            score +=
              Double(q[h * (plain + rotated) + plain + i]) * Double(cached[t * (rank + rotated) + rank + i])
          }
          return score * Double(scale)
        }
        let weights = scores.map { exp($0 - scores.max()!) }
        let total = weights.reduce(0, +)
        for i in 0..<value {
          let expected = (0..<length).reduce(0.0) { $0 + weights[$1] * dot(v[h], i, $1) } / total
          let found = (0..<rank).reduce(0.0) {
            $0 + Double(v[h][i * rank + $1]) * Double(attended.float32[h * rank + $1])
          }
          #expect(abs(found - expected) <= 1e-4, "seed \(seed), head \(h), number \(i): \(found), not \(expected)")
        }
      }
    }
  }

  @Test(arguments: levels)
  func interleavedRotationMatchesThePlainLoops(level: InstructionSet) throws {
    let backend = try makeBackend(level)
    var generator = Generator(34)
    let (rows, heads, dimension, offset, half) = (9, 3, 17, 5, 5)
    let numbers = generator.floats(rows * heads * dimension)
    let table = try tensor(generator.floats(20 * 2 * half), rows: 20, columns: 2 * half)
    let positions = (0..<rows).map { Int32($0 * 2) }
    let a = try tensor(numbers, rows: rows, columns: heads * dimension, padding: 2)
    let b = try tensor(numbers, rows: rows, columns: heads * dimension)
    backend.ropeInterleaved(
      a, heads: heads, headDimension: dimension, offset: offset, positions: positions, table: table)
    ReferenceBackend().ropeInterleaved(
      b, heads: heads, headDimension: dimension, offset: offset, positions: positions, table: table)
    #expect(zip(values(a), values(b)).allSatisfy { abs($0 - $1) < 1e-6 })
    // What lies before the offset and behind the rotated numbers stays.
    for i in numbers.indices where !(offset..<offset + 2 * half).contains(i % dimension) {
      #expect(values(a)[i] == numbers[i])
    }
  }

  @Test func typesOfEightBitsAreRefused() throws {
    for backend in [try makeBackend(levels[0]) as any Backend, ReferenceBackend()] {
      for dtype in [DType.int8, .float8] {
        do {
          _ = try backend.makeLatentLayer(pageCount: 1, keyDimension: 8, valueDimension: 4, dtype: dtype)
          Issue.record("accepted \(dtype)")
        } catch {
          #expect(error.code == .unsupported)
        }
      }
    }
  }
}
