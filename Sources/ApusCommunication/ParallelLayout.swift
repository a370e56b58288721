/// Every rank's place: which ranks share a layer's weights, which share its requests.
///
/// Today one rank does everything; layers are built from a layout all the same, so that splitting them later changes no
/// model.
public struct ParallelLayout: Sendable, Equatable {
  /// Ranks that split attention heads among them.
  public var attentionTensorParallel: Int
  /// Groups that hold different requests.
  public var attentionDataParallel: Int
  /// Ranks that split the experts among them.
  public var expertParallel: Int
  /// Ranks that split the dense feed-forward layers among them.
  public var denseTensorParallel: Int
  /// This rank, in 0..<size.
  public var rank: Int

  /// The number of ranks.
  public var size: Int { attentionTensorParallel * attentionDataParallel }

  /// One rank that does everything.
  public static let single = ParallelLayout(
    attentionTensorParallel: 1, attentionDataParallel: 1, expertParallel: 1, denseTensorParallel: 1, rank: 0)

  /// The share of `count` equal parts (heads, rows) that falls to `rank` of `ranks`.
  /// - Precondition: `count` is a multiple of `ranks`.
  public static func share(of count: Int, rank: Int, ranks: Int) -> Range<Int> {
    precondition(count % ranks == 0, "\(count) parts cannot be split evenly over \(ranks) ranks.")
    let size = count / ranks
    return rank * size..<(rank + 1) * size
  }
}
