public import ApusCore
import ApusModels
import ApusScheduling
import ApusTensors

extension StepRunner {
  /// The vectors of sequences: the last layer's output, pooled. Short sequences are computed together, as many as fit a step;
  /// a long one is computed alone, in chunks. Uses the first pages of the pool and no slot, so it must not be mixed with
  /// steps in flight.
  ///
  /// - Parameters:
  ///   - pooling: how the tokens' vectors become one. A sum runs in double precision, token after token.
  ///   - chunk: tokens computed at once; `nil` for `maxTokensPerStep`. Changes no bit of the result, and neither do the other
  ///     sequences.
  /// - Precondition: the tokens are in the vocabulary, and each sequence fits the context and the pool.
  /// - Returns: `hiddenSize` numbers for each sequence.
  public func embeddings(
    _ sequences: [[TokenID]], pooling: EmbeddingInformation.Pooling, chunk: Int? = nil
  ) -> [[Float]] {
    let step = min(chunk ?? maxTokensPerStep, maxTokensPerStep)
    let columns = model.configuration.hiddenSize
    var vectors = [[Float]](repeating: [], count: sequences.count)
    // Of the sequences under way, for means.
    var sums: [Int: [Double]] = [:]

    /// Takes the hidden states of rows, each of which belongs to a sequence.
    func take(_ wanted: [(row: Int, sequence: Int)]) {
      let block = StepRunner.logitRows(maxRunningRequests: maxRunningRequests)
      for begin in stride(from: 0, to: wanted.count, by: block) {
        let rows = wanted[begin..<min(begin + block, wanted.count)]
        for (index, entry) in rows.enumerated() { rowNumbers[index] = Int32(entry.row) }
        let hidden = model.lastHidden(state, rows: rowNumbers, count: rows.count, scratch: logitScratch)
        for (index, entry) in rows.enumerated() {
          let numbers = UnsafeBufferPointer(start: hidden.float32 + index * hidden.stride, count: columns)
          if pooling == .mean {
            var sum = sums.removeValue(forKey: entry.sequence) ?? Array(repeating: 0, count: columns)
            for column in 0..<columns { sum[column] += Double(numbers[column]) }
            sums[entry.sequence] = sum
          } else {
            vectors[entry.sequence] = Array(numbers)
          }
        }
      }
    }

    /// The rows that the pooling needs, of those that hold some positions of a sequence.
    func wanted(_ positions: Range<Int>, of sequence: Int, firstRow: Int) -> [(row: Int, sequence: Int)] {
      let last = sequences[sequence].count - 1
      let needed: Range<Int> =
        switch pooling {
        case .cls: positions.contains(0) ? 0..<1 : 0..<0
        case .last: positions.contains(last) ? last..<last + 1 : 0..<0
        case .mean: positions
        }
      return needed.map { (firstRow + $0 - positions.lowerBound, sequence) }
    }

    var begin = 0
    while begin < sequences.count {
      var batch = ScheduleBatch()
      var end = begin
      while end < sequences.count, end - begin < maxRunningRequests {
        let tokens = sequences[end]
        let pageCount = (tokens.count + kvPageSize - 1) / kvPageSize
        precondition(!tokens.isEmpty && tokens.count <= model.contextLength && pageCount <= pool.pageCount)
        if batch.tokens.count + tokens.count > step || batch.pages.count + pageCount > pool.pageCount { break }
        batch.requests.append(
          ScheduledRequest(
            slot: 0, start: 0, count: Int32(tokens.count), tokenOffset: Int32(batch.tokens.count),
            pageOffset: Int32(batch.pages.count), pageCount: Int32(pageCount), lastTokenIsInFlight: false,
            samples: false))
        batch.tokens += tokens
        batch.pages += (batch.pages.count..<batch.pages.count + pageCount).map(Int32.init)
        end += 1
      }
      if end > begin {
        forward(batch)
        take(
          (begin..<end).flatMap { index in
            wanted(
              sequences[index].indices, of: index, firstRow: Int(batch.requests[index - begin].tokenOffset))
          })
      } else {
        // Longer than a step.
        end = begin + 1
        forwardAlone(sequences[begin], chunk: step) { positions in take(wanted(positions, of: begin, firstRow: 0)) }
      }
      for (index, sum) in sums { vectors[index] = sum.map { Float($0 / Double(sequences[index].count)) } }
      sums.removeAll()
      begin = end
    }
    return vectors
  }
}
