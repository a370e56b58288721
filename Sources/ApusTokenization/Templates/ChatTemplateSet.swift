public import ApusCore

/// The chat templates of a checkpoint. Interim: reads nothing yet.
public struct ChatTemplateSet: Sendable {
  public static func load(pathOrName: String) throws(EngineError) -> ChatTemplateSet? { nil }
  public static func load(directory: String) throws(EngineError) -> ChatTemplateSet? { nil }
  public func render(_ prompt: ChatPrompt) throws(EngineError) -> String { "" }
}
