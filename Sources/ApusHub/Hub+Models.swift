extension Hub {
  /// The path of a model, from the cache if it holds it, else pulled.
  ///
  /// What the cache holds whole is used without asking the hub, so that a model that was pulled starts without a network.
  /// - Parameters:
  ///   - onPull: called with the plan before something is fetched.
  ///   - onEvent: called from several tasks, often.
  /// - Returns: a directory, or a GGUF file.
  package func locate(
    _ reference: RepositoryReference, for purpose: FileSelection.Purpose,
    onPull: @Sendable (PullPlan) -> Void, onEvent: @escaping @Sendable (PullEvent) -> Void
  ) async throws -> String {
    let lookup = cache.lookUp(reference, for: purpose)
    var usable: String?
    switch lookup {
    case .complete(let path): return path
    case .incomplete(_, let path): usable = path
    case .missing: break
    }
    if configuration.isOffline {
      if let usable { return usable }
      throw HubError(.offline, offlineSentence(reference, lookup))
    }
    let plan: PullPlan
    do {
      plan = try await self.plan(
        PullRequest(reference, selection: FileSelection(purpose: purpose, quantization: reference.quantization)))
    } catch let error as HubError where error.kind == .unreachable && usable != nil {
      onEvent(.remark(error.message + " What the cache holds is used."))
      return usable!
    }
    onPull(plan)
    let result = try await fetch(plan, onEvent: onEvent)
    if plan.mainFile != nil { return result.path }
    switch HubCache.examine(result.path, quantization: nil, for: purpose) {
    case .incomplete(let missing, path: nil):
      throw HubError(
        .nothingToPull, "\(reference) was pulled to \(result.path), but it lacks \(missing.joined(separator: ", ")).")
    default: return result.path
    }
  }

  /// Why a model cannot be had offline.
  private func offlineSentence(_ reference: RepositoryReference, _ lookup: HubCache.Lookup) -> String {
    let advice = "Unset HF_HUB_OFFLINE, or pull it where there is a network: apus pull \(reference)"
    if case .incomplete(let missing, _) = lookup {
      let shown =
        missing.prefix(4).joined(separator: ", ") + (missing.count > 4 ? " and \(missing.count - 4) more" : "")
      return
        "HF_HUB_OFFLINE is set and \(cache.directory) holds only a part of \(reference): it lacks \(shown). \(advice)"
    }
    return "HF_HUB_OFFLINE is set and \(cache.directory) does not hold \(reference). \(advice)"
  }
}
