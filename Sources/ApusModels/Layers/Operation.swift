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
    for index in stage { operations[index].body!(state) }
  }
}
