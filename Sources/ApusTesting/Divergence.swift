import Glibc

/// How far one model's predictions are from another's over the same tokens: what `apus bench quality` reports
/// and tests of formats hold.
package struct Divergence: Sendable {
  /// Kullback-Leibler divergence from the reference's distribution to the other's at each position, in nats.
  package private(set) var nats: [Double] = []
  /// Positions at which both find the same token most likely.
  package private(set) var agreed = 0
  /// Positions whose next token is known, and the sums of its negative log-likelihood in nats under both models.
  package private(set) var predicted = 0
  package private(set) var referenceLoss = 0.0
  package private(set) var loss = 0.0

  /// Nothing compared yet.
  package init() {}

  /// Compares logits at as many positions, whose next tokens do not matter.
  package init(reference: [[Float]], other: [[Float]]) {
    for (reference, other) in zip(reference, other) { add(reference: reference, other: other, next: nil) }
  }

  /// Compares one position.
  /// - Parameters:
  ///   - reference: the logits of the model that is taken as true, one for each token of the vocabulary.
  ///   - other: the logits of the model that is judged, as many.
  ///   - next: the token that follows in the text, where there is one.
  package mutating func add(reference: [Float], other: [Float], next: Int?) {
    let (p, q) = (normalizer(reference), normalizer(other))
    var sum = 0.0
    for index in reference.indices {
      let logP = Double(reference[index]) - p.log
      // A probability that underflows adds nothing, whatever the other model says of the token.
      if logP > -700 { sum += exp(logP) * (logP - (Double(other[index]) - q.log)) }
    }
    // Rounding can leave a divergence of nothing a little below zero.
    nats.append(max(0, sum))
    if p.first == q.first { agreed += 1 }
    if let next {
      predicted += 1
      referenceLoss += p.log - Double(reference[next])
      loss += q.log - Double(other[next])
    }
  }

  /// Mean Kullback-Leibler divergence, in nats for a token.
  package var mean: Double { nats.reduce(0, +) / Double(max(1, nats.count)) }
  /// Share of positions at which both find the same token most likely, in 0...1.
  package var agreement: Double { Double(agreed) / Double(max(1, nats.count)) }
  /// exp of the mean negative log-likelihood of the text's tokens, under the reference and under the other model.
  package var referencePerplexity: Double { exp(referenceLoss / Double(max(1, predicted))) }
  package var perplexity: Double { exp(loss / Double(max(1, predicted))) }

  /// The logarithm of the sum of exponentials, and the first of the largest logits.
  private func normalizer(_ logits: [Float]) -> (log: Double, first: Int) {
    var first = 0
    for index in logits.indices where logits[index] > logits[first] { first = index }
    let most = Double(logits[first])
    var sum = 0.0
    for logit in logits { sum += exp(Double(logit) - most) }
    return (most + log(sum), first)
  }
}
