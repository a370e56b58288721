import ApusTesting
import Glibc
import Testing

/// The measure behind `apus bench quality`, against distributions whose divergence is known.
@Suite struct DivergenceTests {
  @Test func knownDistributions() {
    // Logits may lie anywhere: only their differences count.
    let p = [0.5, 0.25, 0.25].map { Float(log($0)) + 3 }
    let q = [0.25, 0.5, 0.25].map { Float(log($0)) - 7 }
    var divergence = Divergence()
    divergence.add(reference: p, other: q, next: 0)
    divergence.add(reference: p, other: p.map { $0 + 1 }, next: 1)
    #expect(abs(divergence.nats[0] - 0.25 * log(2)) < 1e-6)
    #expect(divergence.nats[1] < 1e-6)
    #expect(divergence.agreement == 0.5)
    #expect(abs(divergence.referencePerplexity - exp((log(2) + log(4)) / 2)) < 1e-5)
    #expect(abs(divergence.perplexity - 4) < 1e-5)
  }

  @Test func impossibleTokensAndEnds() {
    var divergence = Divergence()
    divergence.add(reference: [0, -.infinity], other: [0, 0], next: nil)
    #expect(abs(divergence.nats[0] - log(2)) < 1e-12 && divergence.predicted == 0)
  }
}
