public import ApusCore

/// One message of the harmony format, which gpt-oss models read and write.
///
/// Equal in meaning to the messages of OpenAI's `openai-harmony` library, whose JSON form `init(json:)` reads.
public struct HarmonyMessage: Sendable, Equatable {
  /// Who speaks.
  public enum Role: String, Sendable {
    case system, developer, user, assistant, tool
  }

  /// What a message says: one of these after another.
  public enum Content: Sendable, Equatable {
    case text(String)
    case system(HarmonySystemContent)
    case developer(HarmonyDeveloperContent)
  }

  /// Who speaks.
  public var role: Role
  /// The author's name. A tool's message is headed by it alone, such as `functions.get_weather`.
  public var name: String?
  /// Whom the message is for, such as `functions.get_weather`; `nil` and `all` are everybody.
  public var recipient: String?
  /// `analysis`, `commentary` or `final`.
  public var channel: String?
  /// What the content is written in, such as `<|constrain|>json`.
  public var contentType: String?
  /// The content's parts, written one after another.
  public var content: [Content]

  /// Makes a message.
  public init(
    _ role: Role, _ content: [Content], name: String? = nil, recipient: String? = nil, channel: String? = nil,
    contentType: String? = nil
  ) {
    self.role = role
    self.content = content
    self.name = name
    self.recipient = recipient
    self.channel = channel
    self.contentType = contentType
  }

  /// Makes a message of one text.
  public init(
    _ role: Role, _ text: String, name: String? = nil, recipient: String? = nil, channel: String? = nil,
    contentType: String? = nil
  ) {
    self.init(role, [.text(text)], name: name, recipient: recipient, channel: channel, contentType: contentType)
  }
}

/// What a system message sets up.
public struct HarmonySystemContent: Sendable, Equatable {
  /// How much the model thinks before it answers.
  public enum ReasoningEffort: String, Sendable {
    case low, medium, high
  }

  /// Who the model is; `nil` leaves the line out.
  public var modelIdentity: String? = "You are ChatGPT, a large language model trained by OpenAI."
  /// Until when the model knows of things; `nil` leaves the line out.
  public var knowledgeCutoff: String? = "2024-06"
  /// The current date as `2025-06-28`; `nil` leaves the line out.
  public var conversationStartDate: String?
  /// How much the model thinks; `nil` leaves the line out.
  public var reasoningEffort: ReasoningEffort? = .medium
  /// Channels that the model may write to; an empty list leaves the line out.
  public var validChannels = ["analysis", "commentary", "final"]
  /// Whether every message must name its channel.
  public var channelRequired = true
  /// Tools that the model was trained with. They are written in the order of their names.
  public var tools: [HarmonyToolNamespace] = []

  /// What the library writes unless it is told otherwise.
  public init() {}
}

/// What a developer message sets up.
public struct HarmonyDeveloperContent: Sendable, Equatable {
  /// What other formats call the system prompt.
  public var instructions: String?
  /// Tools of the application, as a rule one namespace `functions`. They are written in the order of their names.
  public var tools: [HarmonyToolNamespace] = []

  /// Makes the content of a developer message.
  public init(instructions: String? = nil, tools: [HarmonyToolNamespace] = []) {
    self.instructions = instructions
    self.tools = tools
  }
}

/// Tools under one name.
public struct HarmonyToolNamespace: Sendable, Equatable {
  /// A function that the model may call.
  public struct Tool: Sendable, Equatable {
    public var name: String
    public var description: String
    /// A JSON schema of the arguments; `nil` for a function without any.
    public var parameters: JSONValue?

    /// Makes a tool.
    public init(name: String, description: String, parameters: JSONValue?) {
      self.name = name
      self.description = description
      self.parameters = parameters
    }
  }

  public var name: String
  public var description: String?
  public var tools: [Tool]

  /// Makes a namespace.
  public init(name: String, description: String? = nil, tools: [Tool]) {
    self.name = name
    self.description = description
    self.tools = tools
  }
}

// MARK: JSON

/// Reads members of a JSON object of the library's form, with the place in errors.
private struct Members {
  let object: JSONObject
  let place: String

  init(_ value: JSONValue, _ place: String) throws(EngineError) {
    guard let object = value.objectValue else { throw failure(place, "must be an object, not \(value.kindName)") }
    self.object = object
    self.place = place
  }

  func has(_ name: String) -> Bool { object[name].map { !$0.isNull } ?? false }

  func text(_ name: String) throws(EngineError) -> String? {
    guard let value = object[name], !value.isNull else { return nil }
    guard let text = value.stringValue else {
      throw failure("\(place).\(name)", "must be a string, not \(value.kindName)")
    }
    return text
  }

  func list(_ name: String) throws(EngineError) -> [JSONValue]? {
    guard let value = object[name], !value.isNull else { return nil }
    guard let list = value.arrayValue else {
      throw failure("\(place).\(name)", "must be an array, not \(value.kindName)")
    }
    return list
  }

  func namespaces(_ name: String) throws(EngineError) -> [HarmonyToolNamespace] {
    guard let value = object[name], !value.isNull else { return [] }
    guard let map = value.objectValue else {
      throw failure("\(place).\(name)", "must be an object of namespaces, not \(value.kindName)")
    }
    var result: [HarmonyToolNamespace] = []
    for (key, element) in map {
      result.append(try HarmonyToolNamespace(json: element, place: "\(place).\(name).\(key)"))
    }
    return result
  }
}

private func failure(_ place: String, _ reason: String) -> EngineError {
  EngineError(.invalidRequest, "\(place) \(reason).", parameter: "messages")
}

extension HarmonyMessage {
  /// Reads a message in the library's JSON form: `role`, `content` (a string, or a list of parts whose `type` is `text`,
  /// `system_content` or `developer_content`), and optionally `name`, `recipient`, `channel` and `content_type`.
  /// - Parameter place: what errors call the message.
  public init(json: JSONValue, place: String = "message") throws(EngineError) {
    let members = try Members(json, place)
    guard let text = try members.text("role") else { throw failure("\(place).role", "is missing") }
    guard let role = Role(rawValue: text) else {
      throw failure("\(place).role", "must be system, developer, user, assistant or tool, not '\(text)'")
    }
    var content: [Content] = []
    if let text = members.object["content"]?.stringValue {
      content = [.text(text)]
    } else {
      for (index, part) in (try members.list("content") ?? []).enumerated() {
        content.append(try Self.content(part, "\(place).content[\(index)]"))
      }
    }
    self.init(
      role, content, name: try members.text("name"), recipient: try members.text("recipient"),
      channel: try members.text("channel"), contentType: try members.text("content_type"))
  }

  private static func content(_ part: JSONValue, _ place: String) throws(EngineError) -> Content {
    let members = try Members(part, place)
    switch try members.text("type") {
    case "text"?:
      guard let text = try members.text("text") else { throw failure("\(place).text", "is missing") }
      return .text(text)
    case "system_content"?: return .system(try HarmonySystemContent(members))
    case "developer_content"?:
      return .developer(
        HarmonyDeveloperContent(instructions: try members.text("instructions"), tools: try members.namespaces("tools")))
    case let other:
      throw failure(
        "\(place).type",
        "must be text, system_content or developer_content, not \(other.map { "'\($0)'" } ?? "missing")")
    }
  }
}

extension HarmonySystemContent {
  fileprivate init(_ members: Members) throws(EngineError) {
    // What the JSON form leaves out was None in the object it was made of.
    modelIdentity = try members.text("model_identity")
    knowledgeCutoff = try members.text("knowledge_cutoff")
    conversationStartDate = try members.text("conversation_start_date")
    reasoningEffort = nil
    if let text = try members.text("reasoning_effort") {
      guard let effort = ReasoningEffort(rawValue: text.lowercased()) else {
        throw failure("\(members.place).reasoning_effort", "must be low, medium or high, not '\(text)'")
      }
      reasoningEffort = effort
    }
    validChannels = []
    if members.has("channel_config") {
      let channels = try Members(members.object["channel_config"] ?? .null, "\(members.place).channel_config")
      for (index, channel) in (try channels.list("valid_channels") ?? []).enumerated() {
        guard let text = channel.stringValue else {
          throw failure("\(channels.place).valid_channels[\(index)]", "must be a string, not \(channel.kindName)")
        }
        validChannels.append(text)
      }
      channelRequired = channels.object["channel_required"]?.boolValue ?? false
    }
    tools = try members.namespaces("tools")
  }
}

extension HarmonyToolNamespace {
  fileprivate init(json: JSONValue, place: String) throws(EngineError) {
    let members = try Members(json, place)
    guard let name = try members.text("name") else { throw failure("\(place).name", "is missing") }
    var tools: [Tool] = []
    for (index, element) in (try members.list("tools") ?? []).enumerated() {
      let tool = try Members(element, "\(place).tools[\(index)]")
      guard let name = try tool.text("name") else { throw failure("\(tool.place).name", "is missing") }
      let parameters = tool.object["parameters"]?.nonNull
      tools.append(Tool(name: name, description: try tool.text("description") ?? "", parameters: parameters))
    }
    self.init(name: name, description: try members.text("description"), tools: tools)
  }
}
