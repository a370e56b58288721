/// Apus for Swift programs: an engine in process.
///
/// ```swift
/// import Apus
///
/// try await withEngine(EngineConfiguration(modelPath: "Models/apus-demo")) { engine in
///   for try await chunk in try engine.generate("Once upon a time") {
///     print(chunk.text, terminator: "")
///   }
/// }
/// ```
@_exported public import ApusCore
@_exported public import ApusEngine
