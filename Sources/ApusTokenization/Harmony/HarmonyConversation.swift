import ApusCore

/// Conversations of the chat completions API, as the messages of the harmony format that gpt-oss was trained on.
struct HarmonyConversation {
  /// The messages, ready to be rendered.
  private(set) var messages: [HarmonyMessage] = []
  private var callNames: [String: String] = [:]
  private var lastCall: String?

  /// Reads a conversation.
  ///
  /// Leading system and developer messages become the developer message's instructions, functions offered its tools. An
  /// assistant's reasoning becomes a message of the analysis channel, its tool calls messages of the commentary channel to
  /// the function, text beside tool calls a preamble in the commentary channel, other text a final answer.
  ///
  /// - Parameters:
  ///   - variables: `messages`, and optionally `tools`, `builtin_tools` (`browser`, `python`), `reasoning_effort`,
  ///     `model_identity`, `knowledge_cutoff` and `current_date`.
  ///   - today: the current date, written as `2025-06-28`.
  init(_ variables: JSONObject, today: String) throws(EngineError) {
    guard let list = variables["messages"]?.arrayValue else {
      throw EngineError(
        .invalidRequest, "messages must be an array, not \((variables["messages"] ?? .null).kindName).",
        parameter: "messages")
    }
    messages.append(HarmonyMessage(.system, [.system(try Self.system(variables, today))]))
    var instructions: [String] = []
    var index = 0
    while index < list.count, let role = list[index]["role"]?.stringValue, role == "system" || role == "developer" {
      instructions.append(try Self.text(of: list[index], "messages[\(index)]") ?? "")
      index += 1
    }
    let functions = try Self.functions(variables["tools"])
    if !instructions.isEmpty || !functions.isEmpty {
      let namespace = HarmonyToolNamespace(name: "functions", tools: functions)
      let developer = HarmonyDeveloperContent(
        instructions: instructions.isEmpty ? nil : instructions.joined(separator: "\n\n"),
        tools: functions.isEmpty ? [] : [namespace])
      messages.append(HarmonyMessage(.developer, [.developer(developer)]))
    }
    while index < list.count {
      try append(list[index], "messages[\(index)]")
      index += 1
    }
  }

  // MARK: Set-up

  private static func system(_ variables: JSONObject, _ today: String) throws(EngineError) -> HarmonySystemContent {
    func text(_ name: String) throws(EngineError) -> String? {
      guard let value = variables[name], !value.isNull else { return nil }
      guard let text = value.stringValue else {
        throw EngineError(.invalidRequest, "\(name) must be a string, not \(value.kindName).", parameter: name)
      }
      return text
    }
    var system = HarmonySystemContent()
    if let identity = try text("model_identity") { system.modelIdentity = identity }
    if let cutoff = try text("knowledge_cutoff") { system.knowledgeCutoff = cutoff }
    system.conversationStartDate = try text("current_date") ?? today
    if let effort = try text("reasoning_effort") {
      guard let known = HarmonySystemContent.ReasoningEffort(rawValue: effort.lowercased()) else {
        throw EngineError(
          .invalidRequest, "reasoning_effort must be low, medium or high for this model, got '\(effort)'.",
          parameter: "reasoning_effort")
      }
      system.reasoningEffort = known
    }
    for tool in variables["builtin_tools"]?.arrayValue ?? [] {
      switch tool.stringValue {
      case "browser"?: system.tools.append(.browser)
      case "python"?: system.tools.append(.python)
      default:
        throw EngineError(
          .invalidRequest, "builtin_tools may hold \"browser\" and \"python\", got \(tool.compactText).",
          parameter: "builtin_tools")
      }
    }
    return system
  }

  private static func functions(_ tools: JSONValue?) throws(EngineError) -> [HarmonyToolNamespace.Tool] {
    var result: [HarmonyToolNamespace.Tool] = []
    for (index, tool) in (tools?.arrayValue ?? []).enumerated() {
      // Both the form of chat completions, with the function in a member of its own, and the flat one of responses.
      let function = tool["function"] ?? tool
      guard let name = function["name"]?.stringValue else {
        throw EngineError(.invalidRequest, "tools[\(index)] has no function with a name.", parameter: "tools")
      }
      let parameters = function["parameters"]?.nonNull
      result.append(
        HarmonyToolNamespace.Tool(
          name: name, description: function["description"]?.stringValue ?? "", parameters: parameters))
    }
    return result
  }

  // MARK: Messages

  private mutating func append(_ message: JSONValue, _ place: String) throws(EngineError) {
    guard let object = message.objectValue else {
      throw EngineError(.invalidRequest, "\(place) must be an object, not \(message.kindName).", parameter: "messages")
    }
    let text = try Self.text(of: message, place)
    let name = object["name"]?.stringValue
    switch object["role"]?.stringValue {
    case "system"?, "developer"?:
      messages.append(HarmonyMessage(.developer, [.developer(HarmonyDeveloperContent(instructions: text ?? ""))]))
    case "user"?: messages.append(HarmonyMessage(.user, text ?? "", name: name))
    case "assistant"?: try appendAssistant(object, text, place)
    case "tool"?:
      let called = object["tool_call_id"]?.stringValue.flatMap { callNames[$0] }
      guard let function = name ?? called ?? lastCall else {
        throw EngineError(
          .invalidRequest, "\(place) is the result of a tool, but no earlier message calls one.", parameter: "messages")
      }
      messages.append(
        HarmonyMessage(
          .tool, text ?? "", name: Self.qualified(function), recipient: "assistant", channel: "commentary"))
    case let role:
      throw EngineError(
        .invalidRequest,
        "\(place).role must be system, developer, user, assistant or tool, not \(role.map { "'\($0)'" } ?? "missing").",
        parameter: "messages")
    }
  }

  private mutating func appendAssistant(_ object: JSONObject, _ text: String?, _ place: String) throws(EngineError) {
    let reasoning = ["reasoning_content", "thinking", "reasoning"].lazy.compactMap { object[$0]?.stringValue }.first
    if let reasoning, !reasoning.isEmpty {
      messages.append(HarmonyMessage(.assistant, reasoning, channel: "analysis"))
    }
    let calls = object["tool_calls"]?.arrayValue ?? []
    // An assistant that only called tools, or only thought, has empty text.
    if let text, !text.isEmpty || (calls.isEmpty && (reasoning ?? "").isEmpty) {
      let channel = object["channel"]?.stringValue ?? (calls.isEmpty ? "final" : "commentary")
      messages.append(HarmonyMessage(.assistant, text, channel: channel))
    }
    for (index, call) in calls.enumerated() {
      let function = call["function"] ?? call
      guard let name = function["name"]?.stringValue else {
        throw EngineError(
          .invalidRequest, "\(place).tool_calls[\(index)] has no function with a name.", parameter: "messages")
      }
      let arguments: String
      switch function["arguments"] {
      // No text is no arguments.
      case .string(let text)?: arguments = text.allSatisfy(\.isWhitespace) ? "{}" : text
      case nil, .null?: arguments = "{}"
      case let value?: arguments = TypeScriptType.json(value)
      }
      messages.append(
        HarmonyMessage(
          .assistant, arguments, recipient: Self.qualified(name), channel: "commentary",
          contentType: "<|constrain|>json"))
      lastCall = name
      if let id = call["id"]?.stringValue { callNames[id] = name }
    }
  }

  /// A function's name with its namespace. Tools that the model was trained with have one of their own.
  private static func qualified(_ name: String) -> String {
    name == "python" || name.hasPrefix("browser.") || name.hasPrefix("functions.") ? name : "functions." + name
  }

  /// The text of a message's content, or `nil` if it has none.
  private static func text(of message: JSONValue, _ place: String) throws(EngineError) -> String? {
    switch message["content"] {
    case nil, .null?: return nil
    case .string(let text)?: return text
    case .array(let parts)?:
      var texts: [String] = []
      for (index, part) in parts.enumerated() {
        guard let text = part.stringValue ?? part["text"]?.stringValue else {
          throw EngineError(
            .invalidRequest, "\(place).content[\(index)] is no text, and gpt-oss models read nothing else.",
            parameter: "messages")
        }
        texts.append(text)
      }
      return texts.joined(separator: "\n")
    case let other?:
      throw EngineError(
        .invalidRequest, "\(place).content must be a string or an array of parts, not \(other.kindName).",
        parameter: "messages")
    }
  }
}

extension HarmonyRenderer {
  /// Renders what a chat template would be given.
  ///
  /// With `harmony_messages`, a list in the JSON form of OpenAI's library, exactly those messages are written; else the
  /// messages of the chat completions API with the system and developer messages that the format wants before them.
  /// `auto_drop_analysis` set to false keeps the analysis of earlier turns.
  static func render(
    _ variables: JSONObject, clock: ChatTemplate.Clock, continuesLast: Bool = false
  ) throws(EngineError) -> String {
    var renderer = HarmonyRenderer()
    renderer.dropsAnalysis = variables["auto_drop_analysis"]?.boolValue ?? true
    let opensTurn = variables["add_generation_prompt"]?.boolValue ?? false
    var messages: [HarmonyMessage] = []
    if let given = variables["harmony_messages"], !given.isNull {
      guard let list = given.arrayValue else {
        throw EngineError(
          .invalidRequest, "harmony_messages must be an array, not \(given.kindName).", parameter: "harmony_messages")
      }
      for (index, message) in list.enumerated() {
        messages.append(try HarmonyMessage(json: message, place: "harmony_messages[\(index)]"))
      }
    } else {
      let now = clock()
      func padded(_ number: Int, _ width: Int) -> String {
        let digits = String(number)
        return String(repeating: "0", count: Swift.max(0, width - digits.utf8.count)) + digits
      }
      let today = "\(padded(now.year, 4))-\(padded(now.month, 2))-\(padded(now.day, 2))"
      messages = try HarmonyConversation(variables, today: today).messages
    }
    if continuesLast, messages.last?.role != .assistant || messages.last?.recipient != nil {
      throw EngineError(
        .invalidRequest, "The final message cannot be continued: it is not a text of the assistant.",
        parameter: "messages")
    }
    return try renderer.render(messages, nextRole: opensTurn ? .assistant : nil, continuesLast: continuesLast)
  }
}
