import Synchronization

/// A named step of a model. Layers are lists of operations, built once when the model is loaded.
///
/// A `yield` marks a place where another batch may run: right after something was submitted that takes time without
/// computing (a collective). Executed straight through, yields do nothing.
public struct Operation: Sendable {
  /// A name for profiles, such as `layers.3.attention`.
  public let name: String
  /// The work; `nil` for a yield.
  let body: (@Sendable (ForwardState) -> Void)?

  /// Something to compute or to submit.
  public static func compute(_ name: String, _ body: @escaping @Sendable (ForwardState) -> Void) -> Operation {
    Operation(name: name, body: body)
  }

  /// A place where another batch may run.
  public static let yield = Operation(name: "yield", body: nil)

  /// Whether this is a yield.
  public var isYield: Bool { body == nil }
}

/// Runs a list of operations over one batch or over two half batches.
public struct OperationExecutor: Sendable {
  private let operations: [Operation]
  /// The operations between two yields, in order.
  private let stages: [Range<Int>]

  /// Prepares a list.
  public init(_ operations: [Operation]) {
    self.operations = operations
    var stages: [Range<Int>] = []
    var start = 0
    for (index, operation) in operations.enumerated() where operation.isYield {
      stages.append(start..<index)
      start = index + 1
    }
    stages.append(start..<operations.count)
    self.stages = stages
  }

  /// Runs the list straight through.
  public func run(_ state: ForwardState) {
    for stage in stages { run(stage, state) }
  }

  /// Runs the list over two half batches in turns. `second` starts `offset` stages behind `first`, so that while the
  /// tokens of one travel, the other computes.
  public func run(_ first: ForwardState, _ second: ForwardState, offset: Int) {
    for turn in 0..<stages.count + offset {
      if turn < stages.count { run(stages[turn], first) }
      if turn >= offset { run(stages[turn - offset], second) }
    }
  }

  private func run(_ stage: Range<Int>, _ state: ForwardState) {
    guard let profile = state.profile else {
      for index in stage { operations[index].body!(state) }
      return
    }
    for index in stage {
      let begin = ContinuousClock.now
      operations[index].body!(state)
      profile.add(operations[index].name, begin.duration(to: .now))
    }
  }
}

/// How long each operation took, summed over passes. States that have one are timed; the others pay for one comparison per
/// stage.
public final class OperationProfile: Sendable {
  /// The passes of an operation and the time in them.
  public struct Time: Sendable, Equatable {
    public var count = 0
    public var seconds = 0.0
  }

  private let storage = Mutex<[String: Time]>([:])

  /// Starts at nothing.
  public init() {}

  /// What was measured so far, by the operations' names.
  public var times: [String: Time] { storage.withLock { $0 } }

  func add(_ name: String, _ duration: Duration) {
    let (seconds, attoseconds) = duration.components
    storage.withLock {
      $0[name, default: Time()].count += 1
      $0[name, default: Time()].seconds += Double(seconds) + Double(attoseconds) * 1e-18
    }
  }
}
