import ApusCommandLine
import Testing

@Suite struct StatisticsTests {
  /// The definition in words: the value below which `percent` of the way from first to last lies.
  private func plainPercentile(_ values: [Double], _ percent: Double) -> Double {
    let sorted = values.sorted()
    let position = percent / 100 * Double(sorted.count - 1)
    let below = sorted[Int(position.rounded(.down))], above = sorted[Int(position.rounded(.up))]
    let share = position - position.rounded(.down)
    return below * (1 - share) + above * share
  }

  @Test func percentilesAgreeWithThePlainDefinition() {
    var generator = SeededGenerator(seed: 17)
    for count in 1...60 {
      let values = (0..<count).map { _ in generator.uniform() * 100 - 50 }
      let summary = Summary(values)
      for (found, percent) in [(summary.median, 50.0), (summary.p90, 90), (summary.p95, 95), (summary.p99, 99)] {
        #expect(abs(found - plainPercentile(values, percent)) < 1e-9, "seed 17, \(count) values")
      }
      #expect(summary.minimum == values.min() && summary.maximum == values.max())
      #expect(abs(summary.mean - values.reduce(0, +) / Double(count)) < 1e-9)
    }
  }

  /// numpy.percentile([1, 2, 3, 4, 10], [50, 90, 95, 99]) and numpy.std.
  @Test func knownValues() {
    let summary = Summary([10, 1, 3, 2, 4])
    #expect(summary.median == 3)
    #expect(abs(summary.p90 - 7.6) < 1e-12)
    #expect(abs(summary.p95 - 8.8) < 1e-12)
    #expect(abs(summary.p99 - 9.76) < 1e-12)
    #expect(abs(summary.standardDeviation - 3.1622776601683795) < 1e-12)
  }

  @Test func nothingMeasuredIsZero() {
    #expect(Summary([]) == Summary([]))
    #expect(Summary([]).count == 0 && Summary([]).p99 == 0)
  }

  @Test func numbersAreWrittenWithFixedDecimals() {
    #expect(fixed(1.005, 1) == "1.0")
    #expect(fixed(0.05, 1) == "0.1")
    #expect(fixed(-0.04, 1) == "0.0")
    #expect(fixed(-12.345, 2) == "-12.35")
    #expect(fixed(7, 0) == "7")
    #expect(fixed(0.007, 3) == "0.007")
    #expect(fixed(.infinity, 2) == "inf" && fixed(.nan, 2) == "-")
    #expect(grouped(1_234_567) == "1,234,567" && grouped(999) == "999" && grouped(-1000) == "-1,000")
    #expect(byteSize(512) == "512 B" && byteSize(1536) == "1.50 KiB" && byteSize(24 << 30) == "24.0 GiB")
    #expect(duration(0.0000015) == "2 us" && duration(0.25) == "250 ms" && duration(75) == "1m15s")
  }

  @Test func theGeneratorIsSplitMix64() {
    // The first outputs for seed 1234567, as published with the algorithm.
    var generator = SeededGenerator(seed: 1_234_567)
    #expect(generator.next() == 6_457_827_717_110_365_317)
    #expect(generator.next() == 3_203_168_211_198_807_973)
    #expect(generator.next() == 9_817_491_932_198_370_423)
  }

  @Test func gapsOfAPoissonProcessHaveTheirMean() {
    var generator = SeededGenerator(seed: 5)
    let gaps = (0..<20_000).map { _ in generator.exponential(rate: 4) }
    // The mean of 20,000 gaps of mean 0.25 has a standard error of 0.0018.
    #expect(abs(gaps.reduce(0, +) / 20_000 - 0.25) < 0.01)
    #expect(gaps.allSatisfy { $0 >= 0 && $0.isFinite })
  }
}
