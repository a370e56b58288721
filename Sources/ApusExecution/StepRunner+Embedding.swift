public import ApusCore
import ApusModels
import ApusScheduling
import ApusTensors

extension StepRunner {
  /// The vector of one sequence: the last layer's output, pooled, computed in chunks of at most `maxTokensPerStep` tokens.
  /// Uses the first pages of the pool and no slot, so it must not be mixed with steps in flight.
  ///
  /// - Parameters:
  ///   - pooling: how the tokens' vectors become one. A sum runs in double precision, token after token.
  ///   - chunk: tokens computed at once; `nil` for `maxTokensPerStep`. Changes no bit of the result.
  /// - Precondition: the tokens are in the vocabulary and fit the context and the pool.
  /// - Returns: `hiddenSize` numbers.
  public func embedding(
    _ tokens: [TokenID], pooling: EmbeddingInformation.Pooling, chunk: Int? = nil
  ) -> [Float] {
    let pageCount = (tokens.count + kvPageSize - 1) / kvPageSize
    precondition(!tokens.isEmpty && tokens.count <= model.contextLength && pageCount <= pool.pageCount)
    let columns = model.configuration.hiddenSize
    let block = StepRunner.logitRows(maxRunningRequests: maxRunningRequests)
    var sums = [Double](repeating: 0, count: pooling == .mean ? columns : 0)
    var vector: [Float] = []
    forwardAlone(tokens, chunk: chunk) { positions in
      let wanted: Range<Int> =
        switch pooling {
        case .cls: positions.lowerBound == 0 ? 0..<1 : 0..<0
        case .last: positions.upperBound == tokens.count ? positions.count - 1..<positions.count : 0..<0
        case .mean: 0..<positions.count
        }
      for begin in stride(from: wanted.lowerBound, to: wanted.upperBound, by: block) {
        let rows = min(block, wanted.upperBound - begin)
        for row in 0..<rows { rowNumbers[row] = Int32(begin + row) }
        let hidden = model.lastHidden(state, rows: rowNumbers, count: rows, scratch: logitScratch)
        for row in 0..<rows {
          let numbers = UnsafeBufferPointer(start: hidden.float32 + row * hidden.stride, count: columns)
          if pooling == .mean {
            for column in 0..<columns { sums[column] += Double(numbers[column]) }
          } else {
            vector = Array(numbers)
          }
        }
      }
    }
    return pooling == .mean ? sums.map { Float($0 / Double(tokens.count)) } : vector
  }
}
