public import ApusCore

/// Writes conversations in the harmony format, as OpenAI's `openai-harmony` 0.0.8 writes them.
public struct HarmonyRenderer: Sendable {
  /// Whether the analysis of turns that came to an end is left out, as the model expects it: the messages of the analysis
  /// channel before the first final answer, once the last message of the assistant is a final one.
  public var dropsAnalysis = true

  /// Leaves out the analysis of turns that came to an end.
  public init() {}

  /// The text of a conversation.
  ///
  /// - Parameters:
  ///   - messages: the conversation.
  ///   - nextRole: whose message is opened at the end; `nil` opens none.
  ///   - continuesLast: whether the last message is left open.
  /// - Throws: `invalidRequest` for a tool's message without a name and for content that its role cannot have.
  public func render(
    _ messages: [HarmonyMessage], nextRole: HarmonyMessage.Role? = .assistant, continuesLast: Bool = false
  ) throws(EngineError) -> String {
    let hasFunctions = messages.contains { message in
      message.content.contains { content in
        guard case .developer(let developer) = content else { return false }
        return developer.tools.contains { $0.name == "functions" && !$0.tools.isEmpty }
      }
    }
    let lastIsFinal = messages.last { $0.role == .assistant }?.channel == "final"
    let firstFinal = messages.firstIndex { $0.channel == "final" } ?? 0
    var output = ""
    for (index, message) in messages.enumerated() {
      if dropsAnalysis, lastIsFinal, index < firstFinal, message.channel == "analysis" { continue }
      try append(
        message, to: &output, hasFunctions: hasFunctions, isOpen: continuesLast && index == messages.count - 1,
        place: "messages[\(index)]")
    }
    if let nextRole { output += "<|start|>" + nextRole.rawValue }
    return output
  }

  private func append(
    _ message: HarmonyMessage, to output: inout String, hasFunctions: Bool, isOpen: Bool, place: String
  ) throws(EngineError) {
    output += "<|start|>"
    if message.role == .tool {
      guard let name = message.name else {
        throw EngineError(.invalidRequest, "\(place): a tool's message needs the tool's name.", parameter: "messages")
      }
      output += name
    } else {
      output += message.role.rawValue
      if let name = message.name { output += ":" + name }
    }
    if let recipient = message.recipient, recipient != "all" { output += " to=" + recipient }
    if let channel = message.channel { output += "<|channel|>" + channel }
    if let type = message.contentType { output += " " + type }
    output += "<|message|>"
    for content in message.content {
      switch content {
      case .text(let text): output += text
      case .system(let system):
        guard message.role == .system else {
          throw EngineError(
            .invalidRequest, "\(place): system_content belongs into a system message, not \(message.role.rawValue).",
            parameter: "messages")
        }
        output += Self.text(system, hasFunctions: hasFunctions)
      case .developer(let developer):
        guard message.role == .developer else {
          throw EngineError(
            .invalidRequest,
            "\(place): developer_content belongs into a developer message, not \(message.role.rawValue).",
            parameter: "messages")
        }
        output += Self.text(developer)
      }
    }
    if isOpen { return }
    output += message.role == .assistant && message.recipient != nil ? "<|call|>" : "<|end|>"
  }

  // MARK: Content

  private static func text(_ system: HarmonySystemContent, hasFunctions: Bool) -> String {
    var top: [String] = []
    if let identity = system.modelIdentity { top.append(identity) }
    if let cutoff = system.knowledgeCutoff { top.append("Knowledge cutoff: \(cutoff)") }
    if let date = system.conversationStartDate { top.append("Current date: \(date)") }
    var sections: [String] = []
    if !top.isEmpty { sections.append(top.joined(separator: "\n")) }
    if let effort = system.reasoningEffort { sections.append("Reasoning: \(effort.rawValue)") }
    if !system.tools.isEmpty { sections.append(toolSection(system.tools)) }
    if !system.validChannels.isEmpty {
      var line = "# Valid channels: \(system.validChannels.joined(separator: ", "))."
      if system.channelRequired { line += " Channel must be included for every message." }
      if hasFunctions { line += "\nCalls to these tools must go to the commentary channel: 'functions'." }
      sections.append(line)
    }
    return sections.joined(separator: "\n\n")
  }

  private static func text(_ developer: HarmonyDeveloperContent) -> String {
    var sections: [String] = []
    if let instructions = developer.instructions { sections += ["# Instructions", instructions] }
    if !developer.tools.isEmpty { sections.append(toolSection(developer.tools)) }
    return sections.joined(separator: "\n\n")
  }

  private static func toolSection(_ namespaces: [HarmonyToolNamespace]) -> String {
    var sections = ["# Tools"]
    // Sorted by the bytes of the names.
    for space in namespaces.sorted(by: { $0.name.utf8.lexicographicallyPrecedes($1.name.utf8) }) {
      var lines = ["## \(space.name)\n"]
      for line in harmonyLines(space.description ?? "") { lines.append(space.tools.isEmpty ? line : "// " + line) }
      if !space.tools.isEmpty {
        lines.append("namespace \(space.name) {\n")
        for tool in space.tools {
          for line in harmonyLines(tool.description) { lines.append("// " + line) }
          if let parameters = tool.parameters {
            lines.append("type \(tool.name) = (_: \(TypeScriptType.text(of: parameters))) => any;\n")
          } else {
            lines.append("type \(tool.name) = () => any;\n")
          }
        }
        lines.append("} // namespace \(space.name)")
      }
      sections.append(lines.joined(separator: "\n"))
    }
    return sections.joined(separator: "\n\n")
  }
}

/// The lines of a text: what stands before each line feed, without a carriage return, and what follows the last one.
private func harmonyLines(_ text: String) -> [String] {
  var lines = text.utf8.split(separator: 0x0A, omittingEmptySubsequences: false)
  guard let last = lines.popLast() else { return [] }
  var result = lines.map { line in String(decoding: line.last == 0x0D ? line.dropLast() : line, as: UTF8.self) }
  if !last.isEmpty { result.append(String(decoding: last, as: UTF8.self)) }
  return result
}

/// JSON schemas as the TypeScript-like types that the harmony format describes arguments with.
enum TypeScriptType {
  /// The type that a schema describes. What has no counterpart is `any`.
  static func text(of schema: JSONValue, indent: String = "") -> String {
    if let variants = schema["oneOf"]?.arrayValue {
      var output = ""
      for variant in variants {
        output += "\n\(indent) | " + nullable(variant, text(of: variant, indent: indent + "   "))
        var comments: [String] = []
        if let description = variant["description"]?.stringValue { comments.append(description) }
        if let value = variant["default"] {
          // Unlike below, a text that is one of an enumeration is quoted here too.
          comments.append("default: " + (quotedDefault(value, variant) ?? json(value)))
        }
        if !comments.isEmpty { output += " // " + comments.joined(separator: " ") }
      }
      return output
    }
    if let types = schema["type"]?.arrayValue {
      let names = types.compactMap { $0.stringValue.map { $0 == "integer" ? "number" : $0 } }
      if !names.isEmpty { return names.joined(separator: " | ") }
    }
    switch schema["type"]?.stringValue {
    case "object"?: return object(schema, indent)
    case "string"?:
      let members = (schema["enum"]?.arrayValue ?? []).compactMap { $0.stringValue.map { "\"\($0)\"" } }
      return members.isEmpty ? "string" : members.joined(separator: " | ")
    case "number"?, "integer"?: return "number"
    case "boolean"?: return "boolean"
    case "array"?:
      guard let items = schema["items"] else { return "Array<any>" }
      return text(of: items, indent: indent) + "[]"
    default: return "any"
    }
  }

  private static func object(_ schema: JSONValue, _ indent: String) -> String {
    var output = ""
    if let description = schema["description"]?.stringValue { output += "\(indent)// \(description)\n" }
    output += "{\n"
    let required = Set((schema["required"]?.arrayValue ?? []).compactMap(\.stringValue))
    if let properties = schema["properties"]?.objectValue {
      for (name, property) in properties {
        let head = indent + name + (required.contains(name) ? "" : "?")
        if let title = property["title"]?.stringValue { output += "\(indent)// \(title)\n\(indent)//\n" }
        let description = property["description"]?.stringValue
        if property["oneOf"] == nil, let description { output += "\(indent)// \(description)\n" }
        if let examples = property["examples"]?.arrayValue, !examples.isEmpty {
          output += "\(indent)// Examples:\n"
          for example in examples.compactMap(\.stringValue) { output += "\(indent)// - \"\(example)\"\n" }
        }
        if let variants = property["oneOf"]?.arrayValue {
          output += alternatives(property, variants, description, head, indent)
          continue
        }
        output += head + ": " + nullable(property, text(of: property, indent: indent + "    ")) + ","
        if property["oneOf"] == nil, let value = property["default"] {
          output += " // default: " + plainDefault(value, property)
        }
        output += "\n"
      }
    }
    return output + indent + "}"
  }

  /// A property that is one of several types.
  private static func alternatives(
    _ property: JSONValue, _ variants: [JSONValue], _ description: String?, _ head: String, _ indent: String
  ) -> String {
    var output = ""
    // A description that the first type repeats is written there only.
    let isAbove = description != nil && variants.first?["description"]?.stringValue != description
    if isAbove, let description { output += "\(indent)// \(description)\n" }
    if let value = property["default"] { output += "\(indent)// default: \(plainDefault(value, property))\n" }
    output += head + ":\n"
    for (index, variant) in variants.enumerated() {
      output += "\(indent) | " + nullable(variant, text(of: variant, indent: indent + "   "))
      var comments: [String] = []
      if !(index == 0 && isAbove), let own = variant["description"]?.stringValue, own != description {
        comments.append(own)
      }
      if let value = variant["default"] { comments.append("default: " + plainDefault(value, variant)) }
      if !comments.isEmpty { output += " // " + comments.joined(separator: " ") }
      output += "\n"
    }
    return output + "\(indent),\n"
  }

  private static func nullable(_ schema: JSONValue, _ type: String) -> String {
    guard schema["nullable"]?.boolValue == true, !type.utf8.contains(sequence: "null".utf8) else { return type }
    return type + " | null"
  }

  /// A default that is a text, in quotes without escapes, unless the schema is an enumeration.
  private static func quotedDefault(_ value: JSONValue, _ schema: JSONValue) -> String? {
    guard let text = value.stringValue, schema["enum"]?.arrayValue?.isEmpty ?? true else { return nil }
    return "\"\(text)\""
  }

  private static func plainDefault(_ value: JSONValue, _ schema: JSONValue) -> String {
    quotedDefault(value, schema) ?? value.stringValue ?? json(value)
  }

  /// A value as the library's JSON writer writes it.
  static func json(_ value: JSONValue) -> String {
    switch value {
    case .double(let double): return number(double)
    case .array(let items): return "[" + items.map(json).joined(separator: ",") + "]"
    case .object(let object):
      return "{" + object.map { json(.string($0.key)) + ":" + json($0.value) }.joined(separator: ",") + "}"
    default: return value.compactText
    }
  }

  /// The shortest decimal that reads back as the number: plain between 1e-5 and 1e16, with an exponent beyond.
  private static func number(_ double: Double) -> String {
    let text = double.description
    guard let mark = text.firstIndex(of: "e") else { return text }
    guard let exponent = Int(text[text.index(after: mark)...]) else { return text }
    var digits = text[..<mark].filter(\.isNumber)
    while digits.count > 1, digits.hasSuffix("0") { digits.removeLast() }
    let sign = double < 0 ? "-" : ""
    if exponent < 0, exponent >= -5 {
      return sign + "0." + String(repeating: "0", count: -exponent - 1) + digits
    }
    let fraction = digits.dropFirst()
    return sign + digits.prefix(1) + (fraction.isEmpty ? "" : "." + fraction) + "e\(exponent)"
  }
}
