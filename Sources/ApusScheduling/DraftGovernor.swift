/// Decides whether tokens are drafted at all, from how long steps took with drafts and without.
///
/// `DraftPace` knows what a draft costs at the margin. What drafting costs beside that follows from no such price: while
/// drafts are awaited steps do not overlap, and a drafter may do work of its own for each step. So both ways are measured as
/// they are, in seconds per token over whole steps, and the faster one is taken. Now and then some steps go the other way, to
/// see whether it has become the faster one: the more rarely, the longer it has not.
///
/// A value without a clock: seconds come with each step's result.
package struct DraftGovernor {
  /// The two ways.
  package enum Way: Sendable, Equatable { case drafting, plain }

  /// Steps of a probe.
  package static let probeSteps = 8
  /// After so many of them a probe that goes badly ends.
  package static let leastProbeSteps = 4
  /// Steps between two probes, at least and at most.
  package static let shortestWait = 64
  package static let longestWait = 1024
  /// By how much the other way has to be better, so that noise does not decide.
  private static let margin = 0.98
  /// What a step's weight becomes with each one after it: the last 50 or so count.
  private static let decay = 0.98

  /// Seconds and tokens of some steps.
  private struct Record {
    var seconds = 0.0
    var tokens = 0.0
    var steps = 0

    /// Infinite where nothing came.
    var secondsPerToken: Double { tokens > 0 ? seconds / tokens : .infinity }

    mutating func add(_ seconds: Double, _ tokens: Double, decay: Double) {
      self.seconds = self.seconds * decay + seconds
      self.tokens = self.tokens * decay + tokens
      steps += 1
    }
  }

  /// The way that seems the faster one.
  package private(set) var verdict = Way.drafting
  private var drafting = Record()
  private var plain = Record()
  private var probe: (way: Way, record: Record)?
  private var sinceProbe = 0
  private var wait = DraftGovernor.shortestWait

  package init() {}

  /// How the next step is to go.
  package var way: Way { probe?.way ?? verdict }

  /// Whether drafts are tried against the verdict.
  package var isTryingDrafts: Bool { probe?.way == .drafting }

  /// Another text begins, with which drafting may fare otherwise.
  package mutating func beginText() {
    if verdict == .plain && probe == nil && sinceProbe >= Self.shortestWait { probe = (.drafting, Record()) }
  }

  /// Takes what a step took and brought.
  package mutating func note(_ way: Way, seconds: Double, tokens: Int) {
    guard seconds > 0 && seconds.isFinite else { return }
    switch way {
    case .drafting: drafting.add(seconds, Double(tokens), decay: Self.decay)
    case .plain: plain.add(seconds, Double(tokens), decay: Self.decay)
    }
    if probe != nil {
      guard probe!.way == way else { return }
      probe!.record.add(seconds, Double(tokens), decay: 1)
      judgeProbe()
      return
    }
    sinceProbe += 1
    if verdict == .drafting && plain.steps >= Self.probeSteps && drafting.steps >= 2 * Self.probeSteps
      && drafting.secondsPerToken * Self.margin > plain.secondsPerToken
    {
      turn(to: .plain)
    } else if sinceProbe >= wait || (plain.steps == 0 && sinceProbe >= Self.probeSteps) {
      probe = (verdict == .drafting ? .plain : .drafting, Record())
    }
  }

  /// Ends a probe that says enough.
  private mutating func judgeProbe() {
    guard let (way, record) = probe else { return }
    let other = way == .drafting ? plain : drafting
    let isHopeless =
      record.steps >= Self.leastProbeSteps && record.secondsPerToken > 1.5 * other.secondsPerToken
    guard record.steps >= Self.probeSteps || isHopeless else { return }
    if record.secondsPerToken < Self.margin * other.secondsPerToken {
      turn(to: way)
      // What was known of it is out of date.
      if way == .drafting { drafting = record } else { plain = record }
    } else {
      wait = min(2 * wait, Self.longestWait)
    }
    probe = nil
    sinceProbe = 0
  }

  private mutating func turn(to way: Way) {
    verdict = way
    wait = Self.shortestWait
    sinceProbe = 0
  }
}
