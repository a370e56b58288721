import ApusCore
import ApusTensors
import Testing

/// The operators of mixtures of experts, against the plain loops and against those of single linear layers.
@Suite struct ExpertTests {
  private func choose(
    _ backend: any ExpertBackend, _ routing: ExpertRouting, _ logits: [Float], correction: [Float]? = nil
  ) throws -> (chosen: [Int32], weights: [Float]) {
    let rows = logits.count / routing.expertCount
    let x = try tensor(logits, rows: rows, columns: routing.expertCount, padding: 3, shift: 1)
    let bias = try correction.map { try tensor($0, rows: 1, columns: routing.expertCount) }
    var chosen = [Int32](repeating: -1, count: rows * routing.expertsPerToken)
    var weights = [Float](repeating: .nan, count: chosen.count)
    backend.route(x, routing, correction: bias, chosen: &chosen, weights: &weights)
    return (chosen, weights)
  }

  @Test func choicesAreThoseOfThePlainLoops() throws {
    var generator = Generator(81)
    let reference = ReferenceBackend()
    for round in 0..<120 {
      let groups = [1, 2, 4].randomElement(using: &generator)!
      let size = Int.random(in: 2...9, using: &generator)
      let count = groups * size
      let perRow = Int.random(in: 1...groups, using: &generator)
      let routing = ExpertRouting(
        expertCount: count, expertsPerToken: .random(in: 1...size * perRow, using: &generator),
        score: [.softmax, .sigmoid, .softmaxOfChosen].randomElement(using: &generator)!, groupCount: groups,
        groupsPerToken: perRow, expertsInGroupScore: .random(in: 1...2, using: &generator),
        normalizes: .random(using: &generator), scale: Bool.random(using: &generator) ? 1 : 2.5)
      // Quarters often tie.
      let rows = Int.random(in: 1...40, using: &generator)
      let logits = (0..<rows * count).map { _ in Float(Int.random(in: -8...8, using: &generator)) / 4 }
      let correction = Bool.random(using: &generator) ? generator.floats(count) : nil
      let wanted = try choose(reference, routing, logits, correction: correction)
      for level in levels {
        for threads in [1, 3] {
          let found = try choose(makeBackend(level, threads: threads), routing, logits, correction: correction)
          #expect(found.chosen == wanted.chosen, "seed 81, round \(round), \(level.name)")
          #expect(found.weights == wanted.weights, "seed 81, round \(round), \(level.name)")
        }
      }
    }
  }

  @Test func tiesAndImpossibleLogits() throws {
    for backend in [ReferenceBackend(), try makeBackend(levels.last!)] as [any ExpertBackend] {
      let plain = ExpertRouting(expertCount: 6, expertsPerToken: 3)
      #expect(try choose(backend, plain, [1, 2, 2, 1, 2, 2]).chosen == [1, 2, 4])
      let grouped = ExpertRouting(expertCount: 6, expertsPerToken: 2, groupCount: 3)
      #expect(try choose(backend, grouped, [0, 0, 0, 5, 5, 0]).chosen == [2, 3])
      // The correction chooses but does not weigh.
      let corrected = ExpertRouting(expertCount: 3, expertsPerToken: 1, score: .sigmoid, normalizes: false)
      let found = try choose(backend, corrected, [3, 2, 0], correction: [0, 0, 4])
      #expect(found.chosen == [2] && found.weights == [0.5])
      // Logits decide where softmax has lost the difference.
      let ofChosen = ExpertRouting(expertCount: 3, expertsPerToken: 2, score: .softmaxOfChosen)
      #expect(try choose(backend, ofChosen, [500, -300, -200]).chosen == [0, 2])
      // Whatever the logits are, a row's experts are different ones that exist.
      let routing = ExpertRouting(
        expertCount: 8, expertsPerToken: 4, groupCount: 4, groupsPerToken: 2, expertsInGroupScore: 2)
      for value in [Float.nan, .infinity, -.infinity] {
        let chosen = try choose(backend, routing, Array(repeating: value, count: 8)).chosen
        #expect(Set(chosen).count == 4 && chosen.allSatisfy { (0..<8).contains($0) })
      }
    }
  }

  /// Heads with columns of their own have the bits of a layer for each, and what lies between them stays as it is.
  @Test(arguments: [WeightFormat.dense(.float32), .dense(.bfloat16), .int8PerChannel, .codes(.int4)])
  func productsOfColumnsAreThoseOfSingleLayers(format: WeightFormat) throws {
    var generator = Generator(83)
    for (groups, outputs, inputs, rows) in [(1, 64, 32, 1), (5, 70, 33, 1), (3, 7, 64, 3), (4, 130, 96, 140)] {
      let (step, outStep) = (inputs + 3, outputs + 2)
      let numbers = (0..<groups).map { _ in generator.floats(outputs * inputs) }
      let x = try tensor(generator.floats(rows * groups * step), rows: rows, columns: groups * step, padding: 5)
      for level in levels {
        for threads in [1, 2, 3] {
          let backend = try makeBackend(level, threads: threads)
          let owner = try tensor([0], rows: 1, columns: 1).memory
          let weights = try numbers.map { numbers in
            try numbers.withUnsafeBytes { bytes in
              try backend.packLinear(
                [
                  WeightSource(
                    address: bytes.baseAddress!, dtype: .float32, rows: outputs, columns: inputs, owner: owner)
                ], format: format)
            }
          }
          let count = rows * groups * outStep
          let out = try tensor(Array(repeating: -7, count: count), rows: rows, columns: groups * outStep, padding: 1)
          let wanted = try tensor(Array(repeating: -7, count: count), rows: rows, columns: groups * outStep)
          backend.columnLinear(x, step: step, backend.groupLinear(weights, biases: nil), out: out, outStep: outStep)
          for (group, weight) in weights.enumerated() {
            backend.linear(
              x.columns(group * step..<group * step + inputs), weight, bias: nil,
              out: wanted.columns(group * outStep..<group * outStep + outputs))
          }
          let isEqual = bits(out) == bits(wanted)
          #expect(isEqual, "\(format.name), \(groups) of \(outputs) x \(inputs), \(level.name), \(threads) threads")
        }
      }
    }
  }

  /// Products of many weights at once have the bits of the weights' own, however work is cut.
  @Test(arguments: [
    WeightFormat.dense(.float32), .dense(.bfloat16), .dense(.float16), .int8PerChannel, .codes(.int4), .codes(.int8),
  ])
  func productsAreThoseOfSingleLayers(format: WeightFormat) throws {
    var generator = Generator(82)
    for (outputs, inputs) in [(7, 33), (64, 64), (200, 96), (130, 130)] {
      let groups = 9
      let counts: [Int32] = [0, 1, 5, 0, 2, 140, 17, 0, 3]
      var starts: [Int32] = []
      var place: Int32 = 4
      // Gaps between groups, whose rows stay as they are.
      for count in counts {
        starts.append(place)
        place += count + 2
      }
      let rows = Int(place) + 3
      let x = try tensor(generator.floats(rows * inputs), rows: rows, columns: inputs, padding: 5)
      let numbers = (0..<groups).map { _ in generator.floats(outputs * inputs) }
      let biases = try (0..<groups).map { _ in try tensor(generator.floats(outputs), rows: 1, columns: outputs) }
      for level in levels {
        for threads in [1, 2, 3] {
          let backend = try makeBackend(level, threads: threads)
          let owner = try tensor([0], rows: 1, columns: 1).memory
          var weights: [any LinearWeight] = []
          for (group, numbers) in numbers.enumerated() {
            try numbers.withUnsafeBytes { bytes in
              func pack(_ range: Range<Int>, _ format: WeightFormat) throws -> any LinearWeight {
                try backend.packLinear(
                  [
                    WeightSource(
                      address: bytes.baseAddress! + range.lowerBound * inputs * 4, dtype: .float32, rows: range.count,
                      columns: inputs, owner: owner)
                  ], format: format)
              }
              // One weight is made of two formats.
              weights.append(
                group == 6 && outputs > 64
                  ? backend.joinLinear([
                    try pack(0..<70 % outputs, format), try pack(70 % outputs..<outputs, .dense(.float32)),
                  ])
                  : try pack(0..<outputs, format))
            }
          }
          // A weight may stand in several places.
          weights[4] = weights[1]
          let grouped = backend.groupLinear(weights, biases: biases)
          #expect(grouped.groupCount == groups && grouped.outputs == outputs && grouped.inputs == inputs)
          let out = try tensor(Array(repeating: -7, count: rows * outputs), rows: rows, columns: outputs, padding: 1)
          let wanted = try tensor(Array(repeating: -7, count: rows * outputs), rows: rows, columns: outputs)
          backend.groupedLinear(x, grouped, groups: RowGroups(count: groups, starts: starts, counts: counts), out: out)
          for group in 0..<groups where counts[group] > 0 {
            let range = Int(starts[group])..<Int(starts[group] + counts[group])
            backend.linear(x.rows(range), weights[group], bias: biases[group], out: wanted.rows(range))
          }
          let isEqual = bits(out) == bits(wanted)
          #expect(isEqual, "\(format.name), \(outputs) x \(inputs), \(level.name), \(threads) threads")
        }
      }
    }
  }

  @Test func activationsAndSums() throws {
    var generator = Generator(83)
    let reference = ReferenceBackend()
    let (rows, width, perRow) = (50, 37, 3)
    let (starts, counts): ([Int32], [Int32]) = ([2, 10, 11, 30], [5, 0, 12, 20])
    let halves = generator.floats(rows * 2 * width, 9)
    let places = (0..<20 * perRow).map { _ in Int32.random(in: 0..<Int32(rows), using: &generator) }
    let weights = generator.floats(20 * perRow)
    let results = try tensor(generator.floats(rows * width), rows: rows, columns: width, padding: 2)
    let gate = try tensor(generator.floats(20, 3), rows: 20, columns: 1)
    let before = generator.floats(20 * width)
    func close(_ a: Tensor, _ b: Tensor) -> Bool {
      zip(values(a), values(b)).allSatisfy { abs($0 - $1) <= 2e-6 * max(1, abs($1)) }
    }
    for activation in [GatedActivation.silu, .clampedSwiGLU(alpha: 1.702, limit: 7)] {
      let wanted = try tensor(halves, rows: rows, columns: 2 * width)
      let groups = RowGroups(count: 4, starts: starts, counts: counts)
      reference.groupedActivation(wanted, activation, groups: groups, out: wanted.columns(0..<width))
      for level in levels {
        for threads in [1, 3] {
          let found = try tensor(halves, rows: rows, columns: 2 * width)
          try makeBackend(level, threads: threads).groupedActivation(
            found, activation, groups: groups, out: found.columns(0..<width))
          #expect(close(found, wanted), "\(activation), \(level.name)")
        }
      }
    }
    for (adds, hasGate) in [(false, false), (true, false), (true, true)] {
      let wanted = try tensor(before, rows: 20, columns: width)
      reference.combine(
        results, places: places, weights: weights, perRow: perRow, adds: adds, gate: hasGate ? gate : nil, out: wanted)
      for level in levels {
        for threads in [1, 3] {
          let found = try tensor(before, rows: 20, columns: width)
          try makeBackend(level, threads: threads).combine(
            results, places: places, weights: weights, perRow: perRow, adds: adds, gate: hasGate ? gate : nil,
            out: found)
          #expect(close(found, wanted), "\(adds), \(hasGate), \(level.name)")
        }
      }
    }
  }
}
