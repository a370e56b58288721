import ApusCore
import ApusExecution
import ApusScheduling

extension StepRunner {
  /// What the drafter proposes behind a prompt that is computed in one step.
  func draft(behind prompt: [TokenID], count: Int) -> [TokenID] {
    var result = StepResult()
    var batch = ScheduleBatch()
    var sampling = SamplingParameters.greedy
    sampling.seed = 1
    batch.assigned = [
      SlotAssignment(
        slot: 0, sampling: sampling, stopTokenIDs: [], logprobs: nil, tokens: prompt, promptCount: prompt.count)
    ]
    batch.tokens = prompt
    batch.pages = (0..<Int32((prompt.count + kvPageSize - 1) / kvPageSize)).map { $0 }
    batch.step = 1
    batch.requests = [
      ScheduledRequest(
        slot: 0, start: 0, count: Int32(prompt.count), tokenOffset: 0, pageOffset: 0,
        pageCount: Int32(batch.pages.count), lastTokenIsInFlight: false, samples: true, draftCount: 0,
        draftLimit: Int32(count))
    ]
    run(batch, into: &result)
    return result.drafts.first?.tokens ?? []
  }
}
