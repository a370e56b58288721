import ApusCore
import ApusEngine
import ApusHub
import ApusScheduling
import ArgumentParser

/// An engine in this process, as commands need it: the service, how to stop it, and what start-up decided.
struct RunningEngine: Sendable {
  /// Answers requests.
  var service: any GenerationService
  /// Lines for people: device, threads, K/V size, limits.
  var report: [String]
  /// Ends the engine's thread and frees its memory.
  var shutdown: @Sendable () async -> Void
}

/// The one place where commands construct the engine. Shows a progress bar while weights are loaded.
/// - Parameter isEmbedding: whether the model serves vectors instead of text. Encoders can do nothing else.
func startEngine(
  _ options: EngineOptions, isEmbedding: Bool = false, isQuiet: Bool = false
) async throws -> RunningEngine {
  let configuration = try await options.configuration(isQuiet: isQuiet)
  let bar = ProgressBar("Loading", total: 0, isQuiet: isQuiet)
  defer { bar.finish() }
  let show: @Sendable (LoadProgress) -> Void = { progress in
    bar.update(
      done: Double(progress.completedBytes), total: Double(progress.totalBytes),
      note: "\(byteSize(progress.completedBytes)) of \(byteSize(progress.totalBytes))")
  }
  if isEmbedding || EmbeddingEngine.isRequired(modelPath: configuration.modelPath) {
    let engine = try await EmbeddingEngine.start(configuration, progress: show)
    return RunningEngine(service: engine, report: engine.report) { await engine.shutdown() }
  }
  let engine = try await Engine.start(configuration, progress: show)
  return RunningEngine(service: engine, report: engine.report) { await engine.shutdown() }
}

extension EngineOptions {
  /// The engine's configuration that the flags describe. Pulls what is named and not on this machine.
  func configuration(isQuiet: Bool) async throws -> EngineConfiguration {
    let model = try await requiredModel(isQuiet: isQuiet)
    var configuration = EngineConfiguration(modelPath: model.path)
    if let tokenizerPath {
      configuration.tokenizerPath = try await locateModel(tokenizerPath, for: .tokenizer, isQuiet: isQuiet).path
    }
    configuration.servedModelName = servedModelName ?? model.name
    configuration.chatTemplate = chatTemplate
    configuration.loadFormat = loadFormat
    configuration.dtype = dtype
    configuration.quantization = quantization
    configuration.outputLayerQuantization = outputLayerQuantization
    configuration.packedCache = packedCache.map { $0 == "beside" ? .besideCheckpoint : .directory($0) }
    configuration.kvCacheDtype = kvCacheDtype
    configuration.contextLength = contextLength
    configuration.tokenBudget = chunkedPrefillSize
    configuration.maxRunningRequests = maxRunningRequests
    configuration.maxQueuedRequests = maxQueuedRequests
    configuration.maxTotalTokens = maxTotalTokens
    if let memFractionStatic { configuration.memoryFraction = memFractionStatic }
    configuration.schedulePolicy = schedulePolicy
    configuration.scheduleConservativeness = scheduleConservativeness
    configuration.enablesPrefixCache = !disableRadixCache
    configuration.enablesOverlap = !disableOverlapSchedule
    configuration.enablesJumpForward = !disableJumpForward
    configuration.jsonWhitespace = constrainedJsonWhitespace
    configuration.speculativeDraftTokens = draftTokens
    if let speculativeEagleTopk { configuration.speculativeTopK = speculativeEagleTopk }
    if let speculativeNumDraftTokens { configuration.speculativeTreeTokens = speculativeNumDraftTokens }
    if let drafting { configuration.speculativeAlgorithm = drafting.engineAlgorithm }
    if let speculativeDraftModelPath {
      configuration.speculativeDraftModelPath = try await locateModel(speculativeDraftModelPath, isQuiet: isQuiet).path
    }
    if let speculativeNgramCapacity { configuration.speculativeNgramCapacity = speculativeNgramCapacity }
    configuration.expertRecorderMode = expertDistributionRecorderMode
    configuration.expertRecorderBufferSize = expertDistributionRecorderBufferSize
    configuration.expertDispatch = moeDispatch
    configuration.redundantExperts = epNumRedundantExperts
    configuration.expertLocationPath = initExpertLocation == "trivial" ? nil : initExpertLocation
    configuration.threads = threads
    configuration.randomSeed = randomSeed
    return configuration
  }
}
