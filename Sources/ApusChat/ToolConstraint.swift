public import ApusCore

/// What a client asks of tool calls.
public enum ToolChoice: Sendable, Equatable {
  /// The model decides.
  case auto
  /// No calls: tools are not offered.
  case none
  /// At least one call.
  case required
  /// A call of this tool.
  case named(String)
}

/// Which texts an answer may hold so that its tool calls are valid: free text and, opened by triggers, regions whose inside
/// follows a JSON Schema. A plain value: a grammar engine makes a matcher of it.
public struct ToolConstraint: Sendable, Equatable {
  /// A region.
  public struct Tag: Sendable, Equatable {
    /// The text that opens it; begins with one of the triggers.
    public var begin: String
    /// The JSON Schema of what is within.
    public var schema: JSONValue
    /// The text that closes it.
    public var end: String

    /// Makes a region.
    public init(begin: String, schema: JSONValue, end: String) {
      self.begin = begin
      self.schema = schema
      self.end = end
    }
  }

  /// The regions that there may be.
  public var tags: [Tag]
  /// Texts that free text may not hold: where one appears, a region must follow.
  public var triggers: [String]
  /// Whether at least one region must occur.
  public var isRequired: Bool
  /// Whether the answer ends with the first region.
  public var stopsAfterFirst: Bool
  /// Whether free text may stand around regions.
  public var allowsText: Bool
  /// What stands between two regions where free text may not.
  public var separator: String

  /// The constraint that makes the calls of an answer valid, or `nil` if there is nothing to enforce or the format's
  /// arguments are not JSON.
  ///
  /// With `auto`, only tools that are `strict` call for one; the others then get any object. Formats that write several
  /// calls in one array, or whose calls are the whole answer, are held to one call.
  public static func make(
    tools: ToolDefinitions, choice: ToolChoice, format: ToolCallFormat, allowsParallelCalls: Bool = true
  ) -> ToolConstraint? {
    guard let frame = format.frame else { return nil }
    var offered = tools.tools
    var isForced = true
    switch choice {
    case .none: return nil
    case .auto:
      if !offered.contains(where: \.isStrict) { return nil }
      isForced = false
    case .required: break
    case .named(let name): offered = offered.filter { $0.name == name }
    }
    if offered.isEmpty { return nil }
    let tags = offered.map { tool in
      let isEnforced = isForced || tool.isStrict
      return Tag(
        begin: frame.begin + tool.name + frame.afterName,
        schema: isEnforced ? tool.parameters ?? ["type": "object"] : ["type": "object"], end: frame.end)
    }
    var isSingle = !allowsParallelCalls || !frame.allowsSeveral
    if case .named = choice { isSingle = true }
    return ToolConstraint(
      tags: tags, triggers: [frame.trigger], isRequired: isForced, stopsAfterFirst: isSingle, allowsText: !isForced,
      separator: frame.separator)
  }

  /// The constraint as a structural tag's format, in XGrammar's form, which `response_format` takes too.
  public var format: JSONValue {
    let tags = JSONValue.array(
      tags.map { tag in
        [
          "begin": .string(tag.begin), "content": ["type": "json_schema", "json_schema": tag.schema],
          "end": .string(tag.end),
        ]
      })
    if allowsText {
      return [
        "type": "triggered_tags", "triggers": .array(triggers.map { .string($0) }), "tags": tags,
        "at_least_one": .bool(isRequired), "stop_after_first": .bool(stopsAfterFirst),
      ]
    }
    return [
      "type": "tags_with_separator", "separator": .string(separator), "tags": tags, "at_least_one": .bool(isRequired),
      "stop_after_first": .bool(stopsAfterFirst),
    ]
  }
}

extension ReasoningFormat {
  /// A structural tag's format for answers whose text keeps to another one, once the chain of thought has ended.
  ///
  /// In the harmony format that text is the final message. Before it the model may think and comment in any number of
  /// messages, whose text is free; there is one final message, and its header and its content are all that the format binds.
  /// Commentary that is addressed to a tool is a call and no text, so it is not among them.
  public func format(beforeAnswer format: JSONValue, isOpen: Bool?) -> JSONValue {
    guard isHarmony else { return self.format(before: format, isOpen: isOpen) }
    let final: JSONValue = [
      "type": "tag", "begin": "<|channel|>final<|message|>", "content": format, "end": "",
    ]
    let others = ["analysis", "commentary"].map { channel -> JSONValue in
      [
        "type": "tag", "begin": .string("<|channel|>\(channel)<|message|>"), "content": ["type": "any_text"],
        "end": "<|end|><|start|>assistant",
      ]
    }
    let messages: JSONValue = ["type": "tags_with_separator", "separator": "", "tags": .array(others)]
    var elements = [messages, final]
    if isOpen == true {
      // The prompt is within a message of the chain of thought.
      let rest: JSONValue = [
        "type": "tag", "begin": "", "content": ["type": "any_text"], "end": "<|end|><|start|>assistant",
      ]
      elements.insert(rest, at: 0)
    }
    return ["type": "sequence", "elements": .array(elements)]
  }

  /// A structural tag's format for answers in which another one applies once the chain of thought has ended.
  ///
  /// - Parameters:
  ///   - format: what follows the chain of thought.
  ///   - isOpen: whether the prompt leaves the chain of thought open or has closed it; `nil` lets the model begin one or not.
  public func format(before format: JSONValue, isOpen: Bool?) -> JSONValue {
    let begin: String
    let end: String
    if isHarmony {
      (begin, end) = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")
    } else {
      guard let open = opens.first, let close = closes.first else { return format }
      (begin, end) = (open, close)
    }
    func thought(_ begin: String) -> JSONValue {
      let tag: JSONValue = [
        "type": "tag", "begin": .string(begin), "content": ["type": "any_text"], "end": .string(end),
      ]
      let space: JSONValue = ["type": "regex", "pattern": "[ \\n]{0,4}"]
      return ["type": "sequence", "elements": .array(isHarmony ? [tag, format] : [tag, space, format])]
    }
    switch isOpen {
    case true?: return thought("")
    case false?: return format
    case nil: return ["type": "or", "elements": [thought(begin), format]]
    }
  }
}
