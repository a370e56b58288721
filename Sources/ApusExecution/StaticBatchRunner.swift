public import ApusCore
public import ApusModels
import ApusScheduling

/// Runs passes of one kind again and again, without a scheduler, over pages that hold whatever they hold: for benchmarks.
public final class StaticBatchRunner {
  private let steps: StepRunner
  private let vocabulary: Int
  private var result = StepResult()
  private var step: UInt64 = 0
  private var occupied = 0

  /// Prepares to run. The runner must have no steps in flight.
  public init(_ steps: StepRunner, vocabulary: Int) {
    self.steps = steps
    self.vocabulary = vocabulary
  }

  /// Computes a prompt in chunks and draws one token.
  public func prefill(_ count: Int, chunk: Int) {
    occupy(1)
    for start in stride(from: 0, to: count, by: chunk) {
      let here = min(chunk, count - start)
      var batch = ScheduleBatch()
      batch.tokens = (start..<start + here).map { TokenID($0 * 7 % vocabulary) }
      batch.pages = (0..<Int32((start + here + kvPageSize - 1) / kvPageSize)).map { $0 }
      batch.requests = [
        ScheduledRequest(
          slot: 0, start: Int32(start), count: Int32(here), tokenOffset: 0, pageOffset: 0,
          pageCount: Int32(batch.pages.count), lastTokenIsInFlight: false, samples: start + here == count)
      ]
      run(batch)
    }
  }

  /// Computes and draws one token for each of some sequences, all of which hold `context` tokens in pages of their own.
  public func decode(_ count: Int, context: Int, pagesEach: Int) {
    occupy(count)
    var batch = ScheduleBatch()
    let pages = (context + 1 + kvPageSize - 1) / kvPageSize
    precondition(pages <= pagesEach)
    for sequence in 0..<count {
      batch.tokens.append(TokenID((sequence * 31 + context) % vocabulary))
      batch.requests.append(
        ScheduledRequest(
          slot: Int32(sequence), start: Int32(context), count: 1, tokenOffset: Int32(sequence),
          pageOffset: Int32(batch.pages.count), pageCount: Int32(pages), lastTokenIsInFlight: false, samples: true))
      for page in 0..<pages { batch.pages.append(Int32(sequence * pagesEach + page)) }
    }
    run(batch)
  }

  /// Times the operations of the passes that follow; `nil` for none.
  public var profile: OperationProfile? {
    get { steps.state.profile }
    set { steps.state.profile = newValue }
  }

  /// Bytes of the packed weights that a decoding step reads: all but those of experts that no row chose.
  /// - Parameter contexts: tokens that the sequences hold; a step is run for each, and the result is the mean.
  public func activeWeightBytes(_ count: Int, contexts: some Collection<Int>, pagesEach: Int) throws(EngineError) -> Int
  {
    let model = steps.model
    guard let experts = model.configuration.experts, let activations = steps.state.experts else {
      return model.weightBytes
    }
    let recorder = try ExpertLoadRecorder(model.configuration, location: model.expertLocation, mode: .stat)
    let previous = activations.recorder
    activations.recorder = recorder
    defer { activations.recorder = previous }
    var total = 0
    for context in contexts {
      recorder.start()
      decode(count, context: context, pagesEach: pagesEach)
      for (counts, bytes) in zip(recorder.logicalCounts, model.expertBytes) {
        total += (counts.count { $0 > 0 } - experts.expertCount) * bytes
      }
    }
    return model.weightBytes + total / contexts.count
  }

  /// Gives slots to sequences that have none yet.
  private func occupy(_ count: Int) {
    guard occupied < count else { return }
    var batch = ScheduleBatch()
    for slot in occupied..<count {
      var sampling = SamplingParameters()
      sampling.temperature = 0
      sampling.seed = 1
      batch.assigned.append(
        SlotAssignment(
          slot: Int32(slot), sampling: sampling, stopTokenIDs: [], logprobs: nil, tokens: [0], promptCount: 1))
    }
    occupied = count
    run(batch)
  }

  private func run(_ batch: ScheduleBatch) {
    var batch = batch
    step += 1
    batch.step = step
    result.removeAll()
    steps.run(batch, into: &result)
  }
}
