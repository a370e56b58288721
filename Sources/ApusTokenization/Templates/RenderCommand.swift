public import ApusCore

/// What `apus render` does, without its standard streams: conversations as JSON in, prompts out.
///
/// A conversation is an object with `messages`, optional `tools` and `add_generation_prompt`, and any further variables
/// for the template. Everything is handed to the template as it is, under the names given, and what is not given is not
/// defined: no content is converted and no text of arguments is parsed, so that what a template does can be seen exactly.
public struct RenderCommand: Sendable {
  /// The templates to choose from.
  public var templates: ChatTemplateSet
  /// The clock of `strftime_now`; `nil` is the machine's.
  public var clock: ChatTemplate.Clock?

  /// Reads the template named on the command line.
  /// - Parameter path: a .jinja file, a `tokenizer_config.json`, a checkpoint directory, or the name of a built-in
  ///   template.
  public init(template path: String) throws(EngineError) {
    if let source = BuiltInChatTemplates.source(named: path) {
      templates = ChatTemplateSet(try ChatTemplate(source: source))
    } else {
      templates = try ChatTemplateSet.load(path: path)
    }
  }

  /// Takes templates that are loaded already.
  public init(_ templates: ChatTemplateSet) { self.templates = templates }

  /// Renders one conversation.
  /// - Parameter json: the text of the conversation.
  /// - Returns: the prompt, with nothing added.
  /// - Throws: `invalidRequest` if the text is no such object, and the template's own error.
  public func render(_ json: String) throws(EngineError) -> String {
    let conversation: JSONValue
    do {
      conversation = try JSONValue.parse(json)
    } catch {
      throw EngineError(.invalidRequest, "The conversation is not valid JSON: \(error).")
    }
    guard case .object(let object) = conversation else {
      throw EngineError(
        .invalidRequest, "A conversation must be an object with messages, not \(conversation.kindName).")
    }
    return try render(object)
  }

  /// Renders one conversation.
  public func render(_ conversation: JSONObject) throws(EngineError) -> String {
    var variables = JSONObject()
    for (name, token) in templates.specialTokens.sorted(by: { $0.key < $1.key }) { variables[name] = .string(token) }
    for (name, value) in conversation { variables[name] = value }
    var hasTools = false
    if case .array(let tools)? = conversation["tools"] { hasTools = !tools.isEmpty }
    var template = try templates.template(hasTools: hasTools)
    if let clock { template.clock = clock }
    return try template.render(variables)
  }

  /// Answers one line of `--jsonl`: `{"rendered": ...}` or `{"error": ...}`, without a newline.
  public func answer(_ line: String) -> String {
    var writer = JSONWriter()
    do throws(EngineError) {
      let rendered = try render(line)
      writer.object { $0.member("rendered", rendered) }
    } catch {
      writer.object { $0.member("error", error.message) }
    }
    return writer.text
  }
}
