import ApusCore
import ApusEngine

/// An engine in this process, as commands need it: the service, how to stop it, and what start-up decided.
struct RunningEngine: Sendable {
  /// Answers requests.
  var service: any GenerationService
  /// Lines for people: device, threads, K/V size, limits.
  var report: [String]
  /// Ends the engine's thread and frees its memory.
  var shutdown: @Sendable () async -> Void
}

/// The one place where commands construct the engine.
func startEngine(_ options: EngineOptions, isQuiet: Bool = false) async throws -> RunningEngine {
  let path = try options.requiredPath()
  throw EngineError(.unsupported, "This build holds no engine for '\(path)'.")
}
