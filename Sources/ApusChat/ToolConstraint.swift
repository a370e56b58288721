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

  /// The constraint as a structural tag, in the form that `response_format` takes.
  public var json: JSONValue {
    let tags = JSONValue.array(
      tags.map { tag in
        [
          "begin": .string(tag.begin), "content": ["type": "json_schema", "json_schema": tag.schema],
          "end": .string(tag.end),
        ]
      })
    if allowsText {
      return [
        "type": "structural_tag",
        "format": [
          "type": "triggered_tags", "triggers": .array(triggers.map { .string($0) }), "tags": tags,
          "at_least_one": .bool(isRequired), "stop_after_first": .bool(stopsAfterFirst),
        ],
      ]
    }
    return [
      "type": "structural_tag",
      "format": [
        "type": "tags_with_separator", "separator": .string(separator), "tags": tags,
        "at_least_one": .bool(isRequired), "stop_after_first": .bool(stopsAfterFirst),
      ],
    ]
  }
}
