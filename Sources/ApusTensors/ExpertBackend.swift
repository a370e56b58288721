internal import CKernels
internal import Glibc

/// How rows choose experts.
///
/// The order of operations is that of DeepSeek-V3's `inference/model.py`, of which other families leave parts out: scores,
/// correction, groups, experts, weights without the correction, sum to one, scale.
public struct ExpertRouting: Sendable, Equatable {
  /// How router logits become scores.
  public enum Score: Sendable {
    case softmax, sigmoid
    /// The logits choose, and the weights are the softmax of those that are chosen.
    case softmaxOfChosen
  }

  public var expertCount: Int
  /// Experts of a row, at most `expertCount`.
  public var expertsPerToken: Int
  public var score: Score
  /// Neighbouring experts form groups of equal size; only experts of the `groupsPerToken` best groups are chosen.
  public var groupCount: Int
  public var groupsPerToken: Int
  /// A group counts as much as this many of its best experts together: 1 or 2.
  public var expertsInGroupScore: Int
  /// Whether the weights of a row's experts are divided by their sum.
  public var normalizes: Bool
  /// Multiplies the weights.
  public var scale: Float

  /// Describes a router.
  public init(
    expertCount: Int, expertsPerToken: Int, score: Score = .softmax, groupCount: Int = 1, groupsPerToken: Int = 1,
    expertsInGroupScore: Int = 1, normalizes: Bool = true, scale: Float = 1
  ) {
    precondition(expertCount >= 1 && groupCount >= 1 && expertCount % groupCount == 0)
    precondition((1...groupCount).contains(groupsPerToken))
    precondition((1...expertCount / groupCount * groupsPerToken).contains(expertsPerToken))
    self.expertCount = expertCount
    self.expertsPerToken = expertsPerToken
    self.score = score
    self.groupCount = groupCount
    self.groupsPerToken = groupsPerToken
    self.expertsInGroupScore = expertsInGroupScore
    self.normalizes = normalizes
    self.scale = scale
  }
}

/// What joins the two halves of a gated feed-forward layer.
public enum GatedActivation: Sendable, Equatable {
  /// silu(gate) * up.
  case silu
  /// gate at most `limit`, up within +-`limit`; gate * sigmoid(alpha * gate) * (up + 1). gpt-oss.
  case clampedSwiGLU(alpha: Float, limit: Float)
}

/// Linear layers of equal shape, each of which is applied to rows of its own.
public protocol GroupedLinearWeight: AnyObject, Sendable {
  var groupCount: Int { get }
  var outputs: Int { get }
  var inputs: Int { get }
}

/// Which rows belong to each group: starts[g]..<starts[g] + counts[g]. Pointers are valid for the duration of a call.
public struct RowGroups {
  public var count: Int
  public var starts: UnsafePointer<Int32>
  public var counts: UnsafePointer<Int32>

  /// Describes groups.
  public init(count: Int, starts: UnsafePointer<Int32>, counts: UnsafePointer<Int32>) {
    self.count = count
    self.starts = starts
    self.counts = counts
  }
}

/// The operators that mixtures of experts need. As all operators they compute a row in an order that is a function of the
/// row alone.
public protocol ExpertBackend: Backend {
  /// Makes one object of the weights of all groups. Weights may occur several times; they are not copied.
  /// - Parameters:
  ///   - weights: the weight of each group, all of equal outputs and inputs.
  ///   - biases: float32 [1, outputs] of each group, or `nil`.
  func groupLinear(_ weights: [any LinearWeight], biases: [Tensor]?) -> any GroupedLinearWeight

  /// For each group, its rows of `out` are its rows of `x` times its weight, plus its bias: the bits of `linear`. Rows of no
  /// group are left alone.
  func groupedLinear(_ x: Tensor, _ weights: any GroupedLinearWeight, groups: RowGroups, out: Tensor)

  /// For each group g, the columns of `out` from g * outStep on are those of `x` from g * step on times its weight: the bits of
  /// `linear` over these columns. As heads have columns of their own.
  /// - Parameters:
  ///   - x: float32 [rows, at least (groups - 1) * step + inputs].
  ///   - out: float32 [rows, at least (groups - 1) * outStep + outputs].
  func columnLinear(_ x: Tensor, step: Int, _ weights: any GroupedLinearWeight, out: Tensor, outStep: Int)

  /// Joins the halves of the groups' rows of `gateUp`, [rows, 2 * width]. `out`, [rows, width], may be the first half.
  func groupedActivation(_ gateUp: Tensor, _ activation: GatedActivation, groups: RowGroups, out: Tensor)

  /// Chooses experts for each row of `logits`. Ties go to the smaller number, of experts and of groups. Where logits are
  /// not finite, a row's experts are different ones all the same.
  /// - Parameters:
  ///   - correction: float32 [1, experts], added to scores for the choice alone.
  ///   - chosen: [rows, experts per token], written, in rising order of a row's experts.
  ///   - weights: [rows, experts per token], written.
  func route(
    _ logits: Tensor, _ routing: ExpertRouting, correction: Tensor?, chosen: UnsafeMutablePointer<Int32>,
    weights: UnsafeMutablePointer<Float>)

  /// out[r] = sum over k of weights[r, k] * results[places[r, k]], k in rising order.
  /// - Parameters:
  ///   - perRow: columns of `places` and `weights`.
  ///   - adds: whether what `out` holds is added last.
  ///   - gate: float32 [rows, 1]: logits with whose sigmoid that is multiplied first.
  func combine(
    _ results: Tensor, places: UnsafePointer<Int32>, weights: UnsafePointer<Float>, perRow: Int, adds: Bool,
    gate: Tensor?, out: Tensor)
}

// MARK: CPU

extension CPUBackend: ExpertBackend {
  public func groupLinear(_ weights: [any LinearWeight], biases: [Tensor]?) -> any GroupedLinearWeight {
    CPUGroupedWeight(weights, biases: biases)
  }

  public func groupedLinear(_ x: Tensor, _ weights: any GroupedLinearWeight, groups: RowGroups, out: Tensor) {
    guard let weights = weights as? CPUGroupedWeight else {
      preconditionFailure("A weight of another backend was given to the CPU backend.")
    }
    precondition(x.columns == weights.inputs && out.columns == weights.outputs && groups.count == weights.groupCount)
    locked {
      apus_grouped_run(
        $0, self.groupContexts, weights.parts, Int32(weights.partCount), groups.starts, groups.counts, x.float32,
        Int64(x.stride), out.float32, Int64(out.stride))
    }
  }

  public func columnLinear(
    _ x: Tensor, step: Int, _ weights: any GroupedLinearWeight, out: Tensor, outStep: Int
  ) {
    guard let weights = weights as? CPUGroupedWeight else {
      preconditionFailure("A weight of another backend was given to the CPU backend.")
    }
    precondition(x.rows == out.rows && step >= 0 && outStep >= weights.outputs)
    precondition(x.columns >= (weights.groupCount - 1) * step + weights.inputs)
    precondition(out.columns >= (weights.groupCount - 1) * outStep + weights.outputs)
    locked {
      apus_columns_run(
        $0, self.groupContexts, weights.parts, Int32(weights.partCount), x.float32, Int64(x.stride), Int64(step),
        Int64(x.rows), out.float32, Int64(out.stride), Int64(outStep))
    }
  }

  public func groupedActivation(_ gateUp: Tensor, _ activation: GatedActivation, groups: RowGroups, out: Tensor) {
    precondition(gateUp.columns >= 2 * out.columns)
    let gate =
      switch activation {
      case .silu: apus_gate(limit: 0, alpha: 1)
      case .clampedSwiGLU(let alpha, let limit): apus_gate(limit: limit, alpha: alpha)
      }
    locked {
      apus_grouped_gate(
        $0, groups.starts, groups.counts, Int32(groups.count), gate, gateUp.float32, Int64(gateUp.stride),
        Int64(out.columns), out.float32, Int64(out.stride))
    }
  }

  public func route(
    _ logits: Tensor, _ routing: ExpertRouting, correction: Tensor?, chosen: UnsafeMutablePointer<Int32>,
    weights: UnsafeMutablePointer<Float>
  ) {
    precondition(logits.columns == routing.expertCount && (correction?.columns ?? .max) >= routing.expertCount)
    let score =
      switch routing.score {
      case .softmax: APUS_SCORE_SOFTMAX
      case .sigmoid: APUS_SCORE_SIGMOID
      case .softmaxOfChosen: APUS_SCORE_SOFTMAX_OF_CHOSEN
      }
    var kernel = apus_routing(
      experts: Int32(routing.expertCount), per_row: Int32(routing.expertsPerToken), score: score,
      groups: Int32(routing.groupCount), groups_per_row: Int32(routing.groupsPerToken),
      experts_in_group_score: Int32(routing.expertsInGroupScore), normalizes: routing.normalizes ? 1 : 0,
      scale: routing.scale, correction: correction.map { UnsafePointer($0.float32) })
    locked {
      apus_route($0, &kernel, logits.float32, Int64(logits.stride), Int64(logits.rows), chosen, weights)
    }
  }

  public func combine(
    _ results: Tensor, places: UnsafePointer<Int32>, weights: UnsafePointer<Float>, perRow: Int, adds: Bool,
    gate: Tensor?, out: Tensor
  ) {
    precondition(results.columns == out.columns && perRow >= 1 && (gate?.rows ?? .max) >= out.rows)
    locked {
      apus_combine(
        $0, results.float32, Int64(results.stride), places, weights, Int32(perRow), adds ? 1 : 0,
        gate.map { UnsafePointer($0.float32) }, Int64(gate?.stride ?? 0), Int64(out.rows), Int64(out.columns),
        out.float32, Int64(out.stride))
    }
  }
}

/// Grouped weights of the CPU backend.
private final class CPUGroupedWeight: GroupedLinearWeight, @unchecked Sendable {
  // Unchecked: written once, before anyone else sees it.
  let groupCount: Int
  let outputs: Int
  let inputs: Int
  let parts: UnsafeMutablePointer<apus_group_part>
  let partCount: Int
  /// What the parts point into.
  private let weights: [any LinearWeight]
  private let biases: [Tensor]?

  init(_ weights: [any LinearWeight], biases: [Tensor]?) {
    precondition(!weights.isEmpty && (biases?.count ?? weights.count) == weights.count)
    precondition(weights.allSatisfy { $0.outputs == weights[0].outputs && $0.inputs == weights[0].inputs })
    (groupCount, outputs, inputs) = (weights.count, weights[0].outputs, weights[0].inputs)
    self.weights = weights
    self.biases = biases
    var list: [apus_group_part] = []
    for (group, weight) in weights.enumerated() {
      var column = 0
      for part in (weight as? JoinedLinearWeight)?.parts ?? [weight] {
        guard let part = part as? CPULinearWeight else {
          preconditionFailure("A weight of another backend was given to the CPU backend.")
        }
        list.append(
          apus_group_part(
            weight: part.packed, bias: biases.map { UnsafePointer($0[group].float32) + column },
            column: Int64(column), group: Int32(group)))
        column += part.outputs
      }
    }
    partCount = list.count
    parts = .allocate(capacity: list.count)
    parts.initialize(from: list, count: list.count)
  }

  deinit { parts.deallocate() }
}

// MARK: Reference

extension ReferenceBackend: ExpertBackend {
  private final class Grouped: GroupedLinearWeight {
    let weights: [any LinearWeight]
    let biases: [Tensor]?
    var groupCount: Int { weights.count }
    var outputs: Int { weights[0].outputs }
    var inputs: Int { weights[0].inputs }

    init(_ weights: [any LinearWeight], _ biases: [Tensor]?) {
      self.weights = weights
      self.biases = biases
    }
  }

  public func groupLinear(_ weights: [any LinearWeight], biases: [Tensor]?) -> any GroupedLinearWeight {
    Grouped(weights, biases)
  }

  public func groupedLinear(_ x: Tensor, _ weights: any GroupedLinearWeight, groups: RowGroups, out: Tensor) {
    let weights = weights as! Grouped
    for group in 0..<groups.count where groups.counts[group] > 0 {
      let rows = Int(groups.starts[group])..<Int(groups.starts[group] + groups.counts[group])
      linear(x.rows(rows), weights.weights[group], bias: weights.biases?[group], out: out.rows(rows))
    }
  }

  public func columnLinear(
    _ x: Tensor, step: Int, _ weights: any GroupedLinearWeight, out: Tensor, outStep: Int
  ) {
    let weights = weights as! Grouped
    for (group, weight) in weights.weights.enumerated() {
      linear(
        x.columns(group * step..<group * step + weights.inputs), weight, bias: weights.biases?[group],
        out: out.columns(group * outStep..<group * outStep + weights.outputs))
    }
  }

  public func groupedActivation(_ gateUp: Tensor, _ activation: GatedActivation, groups: RowGroups, out: Tensor) {
    let width = out.columns
    for group in 0..<groups.count {
      for row in Int(groups.starts[group])..<Int(groups.starts[group] + groups.counts[group]) {
        for column in 0..<width {
          let (gate, up) = (
            Double(gateUp.float32[row * gateUp.stride + column]),
            Double(gateUp.float32[row * gateUp.stride + width + column])
          )
          let value =
            switch activation {
            case .silu: gate / (1 + exp(-gate)) * up
            case .clampedSwiGLU(let alpha, let limit):
              min(gate, Double(limit)) / (1 + exp(-min(gate, Double(limit)) * Double(alpha)))
                * (min(max(up, -Double(limit)), Double(limit)) + 1)
            }
          out.float32[row * out.stride + column] = Float(value)
        }
      }
    }
  }

  public func route(
    _ logits: Tensor, _ routing: ExpertRouting, correction: Tensor?, chosen: UnsafeMutablePointer<Int32>,
    weights: UnsafeMutablePointer<Float>
  ) {
    for row in 0..<logits.rows {
      let own = (0..<logits.columns).map { logits.float32[row * logits.stride + $0] }
      let scores: [Float]
      switch routing.score {
      case .sigmoid: scores = own.map { 1 / (1 + expf(-$0)) }
      case .softmaxOfChosen: scores = own
      case .softmax:
        let largest = own.reduce(-.infinity) { $1 > $0 ? $1 : $0 }
        let powers = own.map { expf($0 - largest) }
        let sum = powers.reduce(0, +)
        scores = powers.map { $0 / sum }
      }
      let ranks = scores.enumerated().map { $1 + (correction?.float32[$0] ?? 0) }
      // Experts of the best groups, groups with equal scores in their order.
      let size = routing.expertCount / routing.groupCount
      let groupScores = (0..<routing.groupCount).map { group in
        ranks[group * size..<(group + 1) * size].sorted(by: >).prefix(routing.expertsInGroupScore).reduce(0, +)
      }
      let groups = groupScores.indices.sorted { isBefore((groupScores[$0], $0), (groupScores[$1], $1)) }
        .prefix(routing.groupsPerToken)
      let best = ranks.indices.filter { groups.contains($0 / size) }
        .sorted { isBefore((ranks[$0], $0), (ranks[$1], $1)) }.prefix(routing.expertsPerToken).sorted()
      var numbers = best.map { scores[$0] }
      if routing.score == .softmaxOfChosen {
        let largest = numbers.reduce(-.infinity) { $1 > $0 ? $1 : $0 }
        numbers = numbers.map { expf($0 - largest) }
      }
      let sum = numbers.reduce(0, +)
      let factor = routing.normalizes ? routing.scale / (sum + 1e-20) : routing.scale
      for (place, expert) in best.enumerated() {
        chosen[row * routing.expertsPerToken + place] = Int32(expert)
        weights[row * routing.expertsPerToken + place] = numbers[place] * factor
      }
    }
  }

  /// Larger numbers first, what is no number last, equal ones in their order.
  private func isBefore(_ a: (number: Float, index: Int), _ b: (number: Float, index: Int)) -> Bool {
    if a.number.isNaN || b.number.isNaN {
      return a.number.isNaN == b.number.isNaN ? a.index < b.index : b.number.isNaN
    }
    return a.number == b.number ? a.index < b.index : a.number > b.number
  }

  public func combine(
    _ results: Tensor, places: UnsafePointer<Int32>, weights: UnsafePointer<Float>, perRow: Int, adds: Bool,
    gate: Tensor?, out: Tensor
  ) {
    for row in 0..<out.rows {
      let factor = gate.map { 1 / (1 + exp(-Double($0.float32[row * $0.stride]))) } ?? 1
      for column in 0..<out.columns {
        var sum = 0.0
        for place in row * perRow..<(row + 1) * perRow {
          sum += Double(weights[place]) * Double(results.float32[Int(places[place]) * results.stride + column])
        }
        if adds { sum += factor * Double(out.float32[row * out.stride + column]) }
        out.float32[row * out.stride + column] = Float(sum)
      }
    }
  }
}
