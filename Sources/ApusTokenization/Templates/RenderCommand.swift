public import ApusCore

/// What `apus render` does, without its standard streams: conversations as JSON in, prompts out.
///
/// A conversation is an object with `messages`, optional `tools` and `add_generation_prompt`, and any further variables
/// for the template. Everything is handed to the template as it is, under the names given, and what is not given is not
/// defined: no content is converted and no text of arguments is parsed, so that what a template does can be seen exactly.
/// With `continue_final_message` the conversation is rendered as a request to the server is.
public struct RenderCommand: Sendable {
  /// The templates to choose from; `nil` where each conversation brings its own.
  public var templates: ChatTemplateSet?
  /// The template to take; `nil` takes `tool_use` if tools are offered and there is one, else the default.
  public var name: String?
  /// The clock of `strftime_now`; `nil` is the machine's.
  public var clock: ChatTemplate.Clock?

  /// Reads the template named on the command line.
  /// - Parameter path: a .jinja file, a `tokenizer_config.json`, a checkpoint directory, or the name of a built-in
  ///   template.
  public init(template path: String) throws(EngineError) {
    if let template = try BuiltInChatTemplates.template(named: path) {
      templates = ChatTemplateSet(template)
    } else {
      templates = try ChatTemplateSet.load(path: path)
    }
  }

  /// Takes templates that are loaded already, or lets each conversation bring its own.
  public init(_ templates: ChatTemplateSet?) { self.templates = templates }

  /// Renders one conversation.
  /// - Parameter json: the text of the conversation.
  /// - Returns: the prompt, with nothing added.
  /// - Throws: `invalidRequest` if the text is no such object, and the template's own error.
  public func render(_ json: String) throws(EngineError) -> String { try render(Array(json.utf8)) }

  /// Renders one conversation given as UTF-8.
  public func render(_ json: [UInt8]) throws(EngineError) -> String {
    let conversation: JSONValue
    do throws(JSONError) {
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
    guard let templates else {
      guard let source = conversation["template"]?.stringValue, let variables = conversation["variables"]?.objectValue
      else {
        throw EngineError(
          .invalidRequest,
          "Without a template of its own, a line needs \"template\", a text, and \"variables\", an object."
        )
      }
      return try RenderCommand(ChatTemplateSet(try ChatTemplate(source: source)), clock: clock).render(variables)
    }
    var hasTools = false
    if case .array(let tools)? = conversation["tools"] { hasTools = !tools.isEmpty }
    var template = try templates.template(named: name, hasTools: hasTools)
    if let clock { template.clock = clock }
    if conversation["continue_final_message"]?.boolValue == true {
      var prompt = ChatPrompt(messages: conversation["messages"] ?? .null, tools: conversation["tools"])
      prompt.addGenerationPrompt = conversation["add_generation_prompt"]?.boolValue ?? false
      prompt.continueFinalMessage = true
      let own = ["messages", "tools", "add_generation_prompt", "continue_final_message"]
      for (name, value) in conversation where !own.contains(name) { prompt.variables[name] = value }
      return try template.render(prompt, specialTokens: templates.specialTokens)
    }
    var variables = JSONObject()
    for (name, token) in templates.specialTokens.sorted(by: { $0.key < $1.key }) { variables[name] = .string(token) }
    for (name, value) in conversation { variables[name] = value }
    return try template.render(variables)
  }

  private init(_ templates: ChatTemplateSet, clock: ChatTemplate.Clock?) {
    self.templates = templates
    self.clock = clock
  }

  /// Answers one line of `--jsonl`: `{"rendered": ...}` or `{"error": ...}`, without a newline.
  public func answer(_ line: String) -> String { answer(Array(line.utf8)) }

  /// Answers one line of `--jsonl` given as UTF-8.
  public func answer(_ line: [UInt8]) -> String {
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
