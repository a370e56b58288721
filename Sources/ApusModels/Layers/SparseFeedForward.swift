import ApusCommunication
import ApusCore
import ApusTensors
import Glibc

/// A mixture of experts: each token passes through a few of them, chosen by a router, and through the shared ones.
///
/// Rows that chose an expert are gathered and computed together; a row's sum adds its experts in the order of their
/// numbers, then the shared ones. Both are functions of the row alone, so company changes no bit.
struct SparseFeedForward: FeedForwardBlock {
  private let name: String
  /// [experts, hidden] in float32, whatever the model's type: a rounded logit would send tokens to other experts.
  private let router: any LinearWeight
  /// float32 [1, experts].
  private let correction: Tensor?
  private let experts: [DenseFeedForward]
  private let shared: DenseFeedForward?
  /// [1, hidden] in float32: a token's logit for the shared experts.
  private let sharedGate: (any LinearWeight)?
  private let sizes: ExpertConfiguration

  /// Loads all experts.
  /// - Throws: `unsupported` where the width is to be split over ranks.
  init(
    path: String, name: String, configuration: ModelConfiguration, sizes: ExpertConfiguration, loader: WeightLoader
  ) throws(EngineError) {
    guard loader.layout.denseTensorParallel == 1, loader.layout.expertParallel == 1 else {
      throw EngineError(.unsupported, "Experts that are split over ranks are not implemented.")
    }
    self.name = name
    self.sizes = sizes
    let hidden = configuration.hiddenSize
    let names = sizes.names
    router = try loader.router(path + names.router, experts: sizes.expertCount, hidden: hidden)
    correction =
      sizes.hasCorrection
      ? try loader.vector(path + names.router + ".e_score_correction_bias", count: sizes.expertCount) : nil
    var experts: [DenseFeedForward] = []
    experts.reserveCapacity(sizes.expertCount)
    // What transformers 5 keeps in memory is what some programs save.
    let stack = path + "experts."
    let isStacked =
      !loader.store.contains("\(stack)0.\(names.gate).weight") && loader.store.contains(stack + "gate_up_proj")
    for expert in 0..<sizes.expertCount {
      experts.append(
        isStacked
          ? try DenseFeedForward(
            stack: stack, index: expert, of: sizes.expertCount, width: sizes.intermediateSize, hidden: hidden,
            loader: loader)
          : try DenseFeedForward(
            path: "\(stack)\(expert).", name: "", width: sizes.intermediateSize, hidden: hidden, hasBias: false,
            names: names, loader: loader))
    }
    self.experts = experts
    shared =
      sizes.sharedIntermediateSize == 0
      ? nil
      : try DenseFeedForward(
        path: path + names.shared, name: name + "shared_", width: sizes.sharedIntermediateSize, hidden: hidden,
        hasBias: false, loader: loader)
    sharedGate =
      sizes.hasSharedGate
      ? try loader.router(path + names.shared.dropLast() + "_gate", experts: 1, hidden: hidden) : nil
  }

  func operations(backend: any Backend) -> [Operation] {
    var list: [Operation] = [
      .compute(name + "router") { state in
        let scratch = state.experts!
        let logits = scratch.logits.prefix(rows: state.batch.rowCount)
        backend.linear(state.normed, self.router, bias: nil, out: logits)
        for row in 0..<logits.rows { self.choose(row, logits, scratch) }
      },
      .compute(name + "dispatch") { state in state.experts!.group(rows: state.batch.rowCount) },
      .compute(name + "experts") { state in self.compute(state, backend) },
    ]
    if let shared { list += shared.operations(backend: backend) }
    if let sharedGate {
      list.append(
        .compute(name + "shared_gate") { state in
          let logits = state.experts!.sharedGate.prefix(rows: state.batch.rowCount)
          backend.linear(state.normed, sharedGate, bias: nil, out: logits)
        })
    }
    list.append(.compute(name + "combine") { state in self.combine(state) })
    return list
  }

  /// Chooses a row's experts and their weights.
  private func choose(_ row: Int, _ logits: Tensor, _ scratch: ExpertActivations) {
    let count = sizes.expertCount
    let scores = logits.float32 + row * logits.stride
    switch sizes.score {
    case .sigmoid:
      for expert in 0..<count { scores[expert] = 1 / (1 + expf(-scores[expert])) }
    case .softmax:
      var largest = -Float.infinity
      for expert in 0..<count { largest = max(largest, scores[expert]) }
      var sum: Float = 0
      for expert in 0..<count {
        scores[expert] = expf(scores[expert] - largest)
        sum += scores[expert]
      }
      for expert in 0..<count { scores[expert] /= sum }
    }
    // What experts are chosen by; the weights come from the scores themselves.
    let ranks = scratch.ranks
    for expert in 0..<count { ranks[expert] = scores[expert] + (correction?.float32[expert] ?? 0) }
    if sizes.groupsPerToken < sizes.groupCount { keepBestGroups(ranks) }
    let chosen = scratch.chosen + row * sizes.expertsPerToken
    for place in 0..<sizes.expertsPerToken {
      // Ties go to the smaller number. Without finite logits any expert will do: the row's result is not finite either way.
      var best = -1
      for expert in 0..<count where !ranks[expert].isNaN && (best < 0 || ranks[expert] > ranks[best]) { best = expert }
      if best < 0 { best = place }
      chosen[place] = Int32(best)
      ranks[best] = .nan
    }
    // In the order of their numbers, in which their results are added.
    var order = UnsafeMutableBufferPointer(start: chosen, count: sizes.expertsPerToken)
    order.sort()
    let weights = scratch.weights + row * sizes.expertsPerToken
    var sum: Float = 0
    for place in 0..<sizes.expertsPerToken {
      weights[place] = scores[Int(chosen[place])]
      sum += weights[place]
    }
    let factor = sizes.normalizes ? sizes.scale / (sum + 1e-20) : sizes.scale
    for place in 0..<sizes.expertsPerToken { weights[place] *= factor }
  }

  /// Takes experts of all but the best groups out of the choice.
  private func keepBestGroups(_ ranks: UnsafeMutablePointer<Float>) {
    let size = sizes.expertCount / sizes.groupCount
    withUnsafeTemporaryAllocation(of: Float.self, capacity: sizes.groupCount) { groups in
      for group in 0..<sizes.groupCount {
        var (first, second) = (-Float.infinity, -Float.infinity)
        for expert in group * size..<(group + 1) * size {
          let rank = ranks[expert]
          if rank > first {
            (first, second) = (rank, first)
          } else if rank > second {
            second = rank
          }
        }
        groups[group] = sizes.expertsInGroupScore == 2 ? first + second : first
      }
      for _ in sizes.groupsPerToken..<sizes.groupCount {
        // The worst group that is left; of equal ones the last, so that the first are kept.
        var worst = -1
        for group in 0..<sizes.groupCount
        where !groups[group].isNaN && (worst < 0 || groups[group] <= groups[worst]) { worst = group }
        if worst < 0 { return }
        groups[worst] = .nan
        for expert in worst * size..<(worst + 1) * size { ranks[expert] = .nan }
      }
    }
  }

  /// Runs each expert over the rows that chose it.
  private func compute(_ state: ForwardState, _ backend: any Backend) {
    let scratch = state.experts!
    for expert in 0..<sizes.expertCount {
      let (first, end) = (Int(scratch.starts[expert]), Int(scratch.starts[expert + 1]))
      let count = end - first
      if count == 0 { continue }
      let inputs = scratch.inputs.prefix(rows: count)
      backend.gather(state.normed, rows: scratch.rows + first, count: count, out: inputs)
      experts[expert].run(
        inputs, gateUp: scratch.gateUp.prefix(rows: count), activated: scratch.activated.prefix(rows: count),
        out: scratch.outputs.rows(first..<end), backend: backend)
    }
  }

  /// delta = sum of weights * experts' results, plus the shared experts', which lie there already.
  private func combine(_ state: ForwardState) {
    let scratch = state.experts!
    let (width, perToken) = (state.delta.columns, sizes.expertsPerToken)
    let hasShared = shared != nil
    for row in 0..<state.batch.rowCount {
      let out = state.delta.float32 + row * state.delta.stride
      // The gathered input's memory is free again: a row's sum without the shared experts.
      let sum = scratch.inputs.float32
      for place in 0..<perToken {
        let from = scratch.outputs.float32 + Int(scratch.places[row * perToken + place]) * scratch.outputs.stride
        let weight = scratch.weights[row * perToken + place]
        if place == 0 {
          for column in 0..<width { sum[column] = weight * from[column] }
        } else {
          for column in 0..<width { sum[column] += weight * from[column] }
        }
      }
      if sharedGate != nil {
        let gate = 1 / (1 + expf(-scratch.sharedGate.float32[row * scratch.sharedGate.stride]))
        for column in 0..<width { out[column] = sum[column] + gate * out[column] }
      } else if hasShared {
        for column in 0..<width { out[column] += sum[column] }
      } else {
        for column in 0..<width { out[column] = sum[column] }
      }
    }
  }
}

/// Widths of the activations of layers with experts.
public struct ExpertShape: Sendable, Equatable {
  public var expertCount: Int
  public var expertsPerToken: Int
  /// Width of one expert.
  public var intermediate: Int
  public var hidden: Int

  /// Bytes of the activations of one row.
  var bytesPerRow: Int {
    4 * (expertCount + 1 + (1 + expertsPerToken) * hidden + 3 * intermediate + 4 * expertsPerToken)
  }
}

/// What layers with experts carry from operation to operation.
public final class ExpertActivations: @unchecked Sendable {
  // Unchecked: owned by the thread that runs the model, as the state that holds it.

  /// float32 [rows, experts]: logits, then scores.
  let logits: Tensor
  /// float32 [rows, 1]: logits for the shared experts.
  let sharedGate: Tensor
  /// float32 [rows, hidden]: the rows of one expert.
  let inputs: Tensor
  /// float32 [rows, 2 * intermediate] and [rows, intermediate].
  let gateUp: Tensor
  let activated: Tensor
  /// float32 [rows * experts per token, hidden]: the results of all experts, one expert's rows after the other's.
  let outputs: Tensor
  /// [experts]: one row's scores as experts are chosen by them; NaN for those out of the choice.
  let ranks: UnsafeMutablePointer<Float>
  /// [rows, experts per token]: experts in the order of their numbers, their weights, and where their results lie in
  /// `outputs`.
  let chosen: UnsafeMutablePointer<Int32>
  let weights: UnsafeMutablePointer<Float>
  let places: UnsafeMutablePointer<Int32>
  /// [rows * experts per token]: the row of each place in `outputs`.
  let rows: UnsafeMutablePointer<Int32>
  /// [experts + 1]: the first place of each expert, and the number of places.
  let starts: UnsafeMutablePointer<Int32>
  private let shape: ExpertShape

  init(_ shape: ExpertShape, rows count: Int, backend: any Backend) throws(EngineError) {
    self.shape = shape
    logits = try backend.allocate(rows: count, columns: shape.expertCount, dtype: .float32)
    sharedGate = try backend.allocate(rows: count, columns: 1, dtype: .float32)
    inputs = try backend.allocate(rows: count, columns: shape.hidden, dtype: .float32)
    gateUp = try backend.allocate(rows: count, columns: 2 * shape.intermediate, dtype: .float32)
    activated = try backend.allocate(rows: count, columns: shape.intermediate, dtype: .float32)
    outputs = try backend.allocate(rows: count * shape.expertsPerToken, columns: shape.hidden, dtype: .float32)
    let choices = count * shape.expertsPerToken
    ranks = .allocate(capacity: shape.expertCount)
    chosen = .allocate(capacity: choices)
    weights = .allocate(capacity: choices)
    places = .allocate(capacity: choices)
    rows = .allocate(capacity: choices)
    starts = .allocate(capacity: shape.expertCount + 1)
  }

  deinit {
    ranks.deallocate()
    chosen.deallocate()
    weights.deallocate()
    places.deallocate()
    rows.deallocate()
    starts.deallocate()
  }

  /// Sorts the choices of `count` rows by expert, and within an expert by row.
  func group(rows count: Int) {
    let choices = count * shape.expertsPerToken
    starts.update(repeating: 0, count: shape.expertCount + 1)
    for choice in 0..<choices { starts[Int(chosen[choice]) + 1] += 1 }
    for expert in 0..<shape.expertCount { starts[expert + 1] += starts[expert] }
    for choice in 0..<choices {
      let expert = Int(chosen[choice])
      places[choice] = starts[expert]
      rows[Int(starts[expert])] = Int32(choice / shape.expertsPerToken)
      starts[expert] += 1
    }
    // Each start has moved to the next one's place.
    for expert in stride(from: shape.expertCount, to: 0, by: -1) { starts[expert] = starts[expert - 1] }
    starts[0] = 0
  }
}
