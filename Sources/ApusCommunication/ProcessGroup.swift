public import ApusTensors

/// The collectives that layers need. Each call is made by every rank of the group in the same order.
public protocol ProcessGroup: AnyObject, Sendable {
  /// This rank's number in the group.
  var rank: Int { get }
  /// Ranks in the group.
  var size: Int { get }
  /// x becomes the sum of all ranks' x, added in the order of ranks.
  func allReduce(_ x: Tensor)
}

/// A group of one: every collective is the identity.
public final class SingleProcessGroup: ProcessGroup {
  public let rank = 0
  public let size = 1

  /// Makes the group.
  public init() {}

  public func allReduce(_ x: Tensor) {}
}
