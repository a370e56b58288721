import ApusCore
import ApusEngine
import ApusScheduling

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
func startEngine(_ options: EngineOptions, isQuiet: Bool = false) async throws -> RunningEngine {
  let configuration = try engineConfiguration(options)
  let bar = ProgressBar("loading", total: 0, isQuiet: isQuiet)
  defer { bar.finish() }
  let engine = try await Engine.start(configuration) { progress in
    bar.update(done: Double(progress.completedBytes), total: Double(progress.totalBytes))
  }
  return RunningEngine(service: engine, report: engine.report, shutdown: { await engine.shutdown() })
}

/// What the flags say, in the engine's terms.
private func engineConfiguration(_ options: EngineOptions) throws -> EngineConfiguration {
  var configuration = EngineConfiguration(modelPath: try options.requiredPath())
  configuration.tokenizerPath = options.tokenizerPath
  configuration.servedModelName = options.servedModelName
  configuration.chatTemplate = options.chatTemplate
  configuration.loadFormat = options.loadFormat == .dummy ? .dummy : .auto
  configuration.dtype = EngineConfiguration.ElementType(rawValue: options.dtype.rawValue) ?? .auto
  configuration.quantization = options.quantization == .int8 ? .int8 : nil
  configuration.kvCacheDtype = EngineConfiguration.ElementType(rawValue: options.kvCacheDtype.rawValue) ?? .auto
  configuration.contextLength = options.contextLength
  if let value = options.maxRunningRequests { configuration.maxRunningRequests = value }
  if let value = options.maxQueuedRequests { configuration.maxQueuedRequests = value }
  if let value = options.chunkedPrefillSize { configuration.tokenBudget = value }
  configuration.maxTotalTokens = options.maxTotalTokens
  if let value = options.memFractionStatic { configuration.memoryFraction = value }
  configuration.schedulePolicy = SchedulingPolicy(rawValue: options.schedulePolicy.rawValue) ?? .firstComeFirstServed
  configuration.scheduleConservativeness = options.scheduleConservativeness
  configuration.enablesPrefixCache = !options.disableRadixCache
  configuration.enablesOverlap = !options.disableOverlapSchedule
  configuration.threads = options.threads
  configuration.randomSeed = options.randomSeed
  return configuration
}
