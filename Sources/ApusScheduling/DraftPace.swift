import ApusCore

/// What drafting and verifying a token costs, in the time of a step that computes one token.
public struct DraftCosts: Sendable, Equatable {
  /// One more token in a step, where the weights are read anyway.
  public var row: Double
  /// Drafting a token.
  public var draft: Double

  /// Makes costs. The defaults are those of a model whose weights are read from memory for each step, and of a lookup.
  public init(row: Double = 0.2, draft: Double = 0) {
    self.row = row
    self.draft = draft
  }

  func validate() throws(EngineError) {
    for (name, value) in [("row", row), ("draft", draft)] where !(value >= 0 && value <= 1e6) {
      throw EngineError(.invalidRequest, "draftCosts.\(name) must be between 0 and 1e6, got \(value).")
    }
  }

  /// How likely a draft token has to be accepted to be worth its time where a number of requests run.
  ///
  /// Without drafts a step of `requests` tokens takes 1 + row * (requests - 1). A draft adds row + draft and brings a token
  /// with its chance; it raises the rate of tokens if that chance is above the time it adds times the rate so far.
  package func leastChance(requests: Int) -> Double {
    (row + draft) * Double(requests) / (1 + row * Double(requests - 1))
  }
}

extension DraftCosts {
  /// Brings the costs nearer to what a step showed.
  ///
  /// - Parameters:
  ///   - seconds: that the model ran, drafting apart, and `draftSeconds` for drafting.
  ///   - plainSeconds: of such a step without drafts, for as many requests.
  ///   - verified: draft tokens in the step; `drafted`: those that it proposed.
  mutating func correct(
    seconds: Double, draftSeconds: Double, plainSeconds: Double, requests: Int, verified: Int, drafted: Int
  ) {
    let weight = 0.1
    let unit = plainSeconds / (1 + row * Double(requests - 1))
    guard unit > 0, seconds.isFinite, draftSeconds.isFinite else { return }
    if verified > 0 {
      let seen = min(max((seconds - plainSeconds) / Double(verified) / unit, 0.005), 2)
      row += weight * (seen - row)
    }
    if drafted > 0 {
      // The first drafts of a text have its prompt to make up for.
      let seen = min(draftSeconds / Double(drafted) / unit, 4 * draft + 0.05)
      draft += weight * (seen - draft)
    }
  }
}

/// Decides how many tokens are drafted for a request, from how its drafts fared and how many requests share the step.
package struct DraftPace {
  /// The estimated chance that a draft token is accepted whose predecessors were.
  package private(set) var chance = 0.7
  /// Steps without drafts still to come.
  private var pause = 0
  /// How many steps the last pause took.
  private var lastPause = 0
  private static let longestPause = 31

  package init() {}

  /// How many tokens to draft for the next step. Called once for each token that is drawn.
  package mutating func next(costs: DraftCosts, requests: Int) -> Int {
    if pause > 0 {
      pause -= 1
      return 0
    }
    let least = costs.leastChance(requests: requests)
    // Where not even a certain draft would pay, nothing is to be learnt from trying one.
    if least >= 1 { return 0 }
    var length = 0
    var reached = chance
    while length < 64 && reached > least {
      length += 1
      reached *= chance
    }
    if length > 0 {
      lastPause = 0
      return length
    }
    // Text that cannot be foreseen is tried ever more rarely.
    lastPause = min(2 * lastPause + 1, Self.longestPause)
    pause = lastPause
    return 1
  }

  /// Takes how many of some draft tokens were accepted.
  package mutating func note(accepted: Int, of count: Int) {
    let trials = min(accepted + 1, count)
    // The more drafts were judged, the more their outcome says.
    let weight = 1 - 1 / (1 + 0.4 * Double(trials))
    chance += weight * (Double(accepted) / Double(trials) - chance)
  }
}
