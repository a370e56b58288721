public import ApusCore
import Glibc

/// A chat template: Jinja as Hugging Face transformers runs it, compiled once and rendered many times.
///
/// The language is that of jinja2 3.1 in its immutable sandbox, with `trim_blocks`, `lstrip_blocks`, loop controls and
/// the additions of transformers (`tojson` without HTML escapes, `strftime_now`, `raise_exception`, `generation`).
/// Integers have 64 bits; templates that would read other files, escape automatically or depend on chance are refused.
///
/// `ChatTemplate.harmony` is no Jinja but the native renderer of the harmony format.
public struct ChatTemplate: Sendable {
  /// What a rendering may cost at most. A template that needs more ends with an error.
  public struct Limits: Sendable, Equatable {
    /// Statements, iterations and the like.
    public var steps = 5_000_000
    /// Bytes of the output and of any text made on the way.
    public var outputBytes = 64 << 20
    /// How deep macros and recursive loops may be nested.
    public var callDepth = 200

    /// Limits far above what real templates need.
    public init() {}
  }

  /// A time of day without a zone, for `strftime_now`.
  public struct LocalTime: Sendable, Equatable {
    public var year: Int
    public var month: Int
    public var day: Int
    public var hour: Int
    public var minute: Int
    public var second: Int
    public var microsecond: Int

    /// Makes a time; months and days count from one.
    public init(
      year: Int = 1970, month: Int = 1, day: Int = 1, hour: Int = 0, minute: Int = 0, second: Int = 0,
      microsecond: Int = 0
    ) {
      self.year = year
      self.month = month
      self.day = day
      self.hour = hour
      self.minute = minute
      self.second = second
      self.microsecond = microsecond
    }

    /// Reads `2026-01-15` or `2026-01-15T12:30:05`, as `datetime.isoformat` writes it; `nil` for other texts.
    public init?(isoFormat text: String) {
      let halves = text.split(separator: "T", maxSplits: 1, omittingEmptySubsequences: false)
      let date = halves[0].split(separator: "-", omittingEmptySubsequences: false).map { Int($0) }
      guard date.count == 3, let year = date[0], let month = date[1], let day = date[2] else { return nil }
      var time = [0, 0, 0]
      if halves.count == 2 {
        let parts = halves[1].split(separator: ":", omittingEmptySubsequences: false).map { Int($0) }
        guard (2...3).contains(parts.count) else { return nil }
        for (index, part) in parts.enumerated() {
          guard let part else { return nil }
          time[index] = part
        }
      }
      let length =
        month == 2 ? (year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) ? 29 : 28) : 30 + (month + month / 8) % 2
      guard (1...9999).contains(year), (1...12).contains(month), (1...length).contains(day) else { return nil }
      guard (0...23).contains(time[0]), (0...59).contains(time[1]), (0...59).contains(time[2]) else { return nil }
      self.init(year: year, month: month, day: day, hour: time[0], minute: time[1], second: time[2])
    }

    /// The machine's clock in its time zone.
    public static func now() -> LocalTime {
      var now = timespec()
      clock_gettime(CLOCK_REALTIME, &now)
      var local = tm()
      localtime_r(&now.tv_sec, &local)
      return LocalTime(
        year: Int(local.tm_year) + 1900, month: Int(local.tm_mon) + 1, day: Int(local.tm_mday),
        hour: Int(local.tm_hour), minute: Int(local.tm_min), second: Int(local.tm_sec),
        microsecond: now.tv_nsec / 1000)
    }
  }

  /// Where `strftime_now` takes the time from.
  public typealias Clock = @Sendable () -> LocalTime

  /// How a template reads the content of messages.
  public enum ContentFormat: String, Sendable {
    /// As one string.
    case string
    /// As a list of parts, each an object with `type`.
    case parts
  }

  /// The template's text; empty for the native renderer.
  public let source: String
  /// How the template reads the content of messages, found by looking at its loops.
  public let contentFormat: ContentFormat
  /// Limits of a rendering.
  public var limits = Limits()
  /// The clock of `strftime_now`.
  public var clock: Clock = { .now() }
  /// Whether `arguments` of tool calls that are JSON texts are parsed before rendering, since templates expect objects. Some
  /// join them to a text instead, which fails with objects; these get the texts.
  public var parsesToolArguments = true

  /// What makes text of variables.
  private enum Program: Sendable {
    case jinja(CompiledTemplate)
    case harmony
  }

  private let program: Program
  /// Whether the template can do with nothing but parts.
  private let needsParts: Bool
  /// Whether the template asks if a message's content is null, as DeepSeek's do, which leave calls out where it is not.
  private let readsAbsentContent: Bool

  /// Compiles a template.
  /// - Throws: `invalidCheckpoint` with the line and the reason if the text is no template, `unsupported` if it needs
  ///   what is refused.
  public init(source: String) throws(EngineError) {
    self.source = source
    readsAbsentContent = ["['content'] is none", ".content is none"].contains { source.contains($0) }
    do {
      let statements = try TemplateParser.parse(source)
      program = .jinja(try TemplateCompiler.compile(statements))
      let detector = ContentFormatDetector(statements)
      contentFormat = detector.iteratesContent ? .parts : .string
      needsParts = detector.iteratesContent && !detector.testsContent
    } catch {
      throw Self.compileError(error)
    }
  }

  private init(harmony: Void) {
    source = ""
    program = .harmony
    contentFormat = .string
    needsParts = false
    readsAbsentContent = false
  }

  /// The native renderer of the harmony format (`HarmonyRenderer`), with the variables `messages`, `tools`,
  /// `add_generation_prompt`, `builtin_tools`, `reasoning_effort`, `model_identity`, `knowledge_cutoff`, `current_date` and
  /// `auto_drop_analysis`; or with `harmony_messages`, messages in the JSON form of OpenAI's library.
  public static let harmony = ChatTemplate(harmony: ())

  private static func compileError(_ error: any Error) -> EngineError {
    guard let fault = error as? TemplateFault else {
      return EngineError(.internalFailure, "The chat template could not be compiled: \(error).")
    }
    let place = fault.line.map { " in line \($0)" } ?? ""
    return EngineError(
      fault.kind == TemplateFault.unsupportedKind ? .unsupported : .invalidCheckpoint,
      "The chat template cannot be used, because of a mistake\(place): \(fault.message)")
  }

  /// The names that the template reads and does not set itself.
  public var variableNames: [String] { contextNames.sorted() }

  private var contextNames: [String] {
    switch program {
    case .jinja(let compiled): compiled.contextNames
    case .harmony:
      [
        "messages", "tools", "add_generation_prompt", "builtin_tools", "reasoning_effort", "model_identity",
        "knowledge_cutoff", "current_date", "auto_drop_analysis", "harmony_messages",
      ]
    }
  }

  /// Whether the template reads a variable, such as `tools`.
  public func reads(_ name: String) -> Bool { contextNames.contains(name) }

  // MARK: Rendering

  /// Renders with the variables given, and nothing done to them.
  /// - Throws: `invalidRequest` with the template's own message where it raises one, and with the reason where an
  ///   expression of it fails or a limit is reached.
  public func render(_ variables: JSONObject) throws(EngineError) -> String {
    if case .harmony = program { return try HarmonyRenderer.render(variables, clock: clock) }
    do {
      return try renderFaulting(variables)
    } catch {
      throw Self.renderError(error)
    }
  }

  /// Renders, with failures in the reference's terms.
  package func renderFaulting(_ variables: JSONObject) throws(TemplateFault) -> String {
    guard case .jinja(let compiled) = program else {
      throw TemplateFault.unsupported("The native renderer is no Jinja template")
    }
    let context = compiled.contextNames.map { name in
      variables[name].map { Value($0) } ?? templateGlobals[name]?() ?? .missing
    }
    do {
      return String(decoding: try compiled.run(context, limits: limits, clock: clock), as: UTF8.self)
    } catch {
      throw error as? TemplateFault ?? TemplateFault("RuntimeError", "\(error)")
    }
  }

  private static func renderError(_ fault: TemplateFault) -> EngineError {
    switch fault.kind {
    case TemplateFault.raised: return EngineError(.invalidRequest, fault.message, parameter: "messages")
    case TemplateFault.unsupportedKind: return EngineError(.unsupported, fault.message + ".")
    default:
      let place = fault.line.map { " in line \($0)" } ?? ""
      return EngineError(
        .invalidRequest, "The chat template failed\(place): \(fault.kind): \(fault.message)", parameter: "messages")
    }
  }

  /// Renders a conversation as transformers' `apply_chat_template` does.
  ///
  /// - Parameters:
  ///   - prompt: the conversation. Its `variables` go before the special tokens.
  ///   - bosToken: the text of the beginning-of-sequence token; `nil` leaves `bos_token` undefined.
  ///   - eosToken: the text of the end-of-sequence token; `nil` leaves `eos_token` undefined.
  ///   - specialTokens: further special tokens by their names, such as `unk_token`.
  /// - Throws: as `render` of variables, and `invalidRequest` if the messages are no list of objects or the final
  ///   message cannot be continued.
  public func render(
    _ prompt: ChatPrompt, bosToken: String? = nil, eosToken: String? = nil, specialTokens: [String: String] = [:]
  ) throws(EngineError) -> String {
    guard case .array(let messages) = prompt.messages else {
      throw EngineError(
        .invalidRequest, "messages must be an array, not \(prompt.messages.kindName).", parameter: "messages")
    }
    if case .harmony = program { return try renderHarmony(prompt) }
    func attempt(parsesArguments: Bool) -> Result<String, EngineError> {
      Result { () throws(EngineError) in
        var prepared: [JSONValue] = []
        for (position, message) in messages.enumerated() {
          prepared.append(try self.prepared(message, position, parsesArguments: parsesArguments))
        }
        return try render(
          prompt, messages: prepared, bosToken: bosToken, eosToken: eosToken, specialTokens: specialTokens)
      }
    }
    let first = attempt(parsesArguments: parsesToolArguments)
    if case .failure = first, parsesToolArguments, messages.contains(where: Self.hasTextArguments),
      case .success(let text) = attempt(parsesArguments: false)
    {
      return text
    }
    return try first.get()
  }

  /// Whether a message has calls whose arguments are texts.
  private static func hasTextArguments(_ message: JSONValue) -> Bool {
    message["tool_calls"]?.arrayValue?.contains { call in
      (call["function"]?["arguments"] ?? call["arguments"])?.stringValue != nil
    } ?? false
  }

  private func render(
    _ prompt: ChatPrompt, messages: [JSONValue], bosToken: String?, eosToken: String?, specialTokens: [String: String]
  ) throws(EngineError) -> String {
    var messages = messages
    var continued: String?
    if prompt.continueFinalMessage {
      if prompt.addGenerationPrompt { throw Self.continuesAndOpens }
      continued = try Self.markFinalMessage(&messages, contentFormat)
    }
    var variables = JSONObject()
    for (name, token) in specialTokens.sorted(by: { $0.key < $1.key }) { variables[name] = .string(token) }
    if let bosToken { variables["bos_token"] = .string(bosToken) }
    if let eosToken { variables["eos_token"] = .string(eosToken) }
    variables["messages"] = .array(messages)
    variables["tools"] = prompt.tools ?? .null
    variables["documents"] = .null
    variables["add_generation_prompt"] = .bool(prompt.addGenerationPrompt)
    for (name, value) in prompt.variables { variables[name] = value }
    let rendered = try render(variables)
    guard let continued else { return rendered }
    return try Self.cut(rendered, after: continued)
  }

  private static let continuesAndOpens = EngineError(
    .invalidRequest,
    "continue_final_message and add_generation_prompt exclude each other: the first continues the last message, the "
      + "second opens a new one.", parameter: "continue_final_message")

  private func renderHarmony(_ prompt: ChatPrompt) throws(EngineError) -> String {
    if prompt.continueFinalMessage, prompt.addGenerationPrompt { throw Self.continuesAndOpens }
    var variables = JSONObject()
    for (name, value) in prompt.variables { variables[name] = value }
    variables["messages"] = prompt.messages
    variables["tools"] = prompt.tools ?? .null
    variables["add_generation_prompt"] = .bool(prompt.addGenerationPrompt)
    return try HarmonyRenderer.render(variables, clock: clock, continuesLast: prompt.continueFinalMessage)
  }

  /// A message as templates expect it: nothing null, reasoning under the names that templates read, content in the
  /// template's format, arguments of tool calls as objects.
  private func prepared(
    _ message: JSONValue, _ position: Int, parsesArguments: Bool
  ) throws(EngineError) -> JSONValue {
    guard case .object(let given) = message else {
      throw EngineError(
        .invalidRequest, "messages[\(position)] must be an object, not \(message.kindName).", parameter: "messages")
    }
    // Reasoning comes under three names, of which templates read the first two. A member that is null counts as absent,
    // since templates would write "None", but for a content that the template asks about.
    let reasoning = ["reasoning_content", "thinking", "reasoning"].lazy.compactMap { name in
      given[name]?.nonNull
    }.first
    var object = JSONObject()
    if let reasoning { object["thinking"] = reasoning }
    for (key, value) in given where !value.isNull || (key == "content" && readsAbsentContent) { object[key] = value }
    // Many clients write no content as the empty text, with which such a template would leave the calls out.
    if readsAbsentContent, object["content"] == "", object["tool_calls"]?.arrayValue?.isEmpty == false {
      object["content"] = .null
    }
    if let reasoning { object["reasoning_content"] = reasoning }
    if let content = object["content"], let converted = converted(content) { object["content"] = converted }
    if parsesArguments, case .array(var calls)? = object["tool_calls"] {
      for index in calls.indices {
        guard case .object(var call) = calls[index] else { continue }
        if case .object(var function)? = call["function"] {
          if let parsed = Self.parsedArguments(function["arguments"]) {
            function["arguments"] = parsed
            call["function"] = .object(function)
            calls[index] = .object(call)
          }
        } else if let parsed = Self.parsedArguments(call["arguments"]) {
          call["arguments"] = parsed
          calls[index] = .object(call)
        }
      }
      object["tool_calls"] = .array(calls)
    }
    return .object(object)
  }

  /// Content in the template's format, or `nil` if it is in it already or cannot be put into it.
  private func converted(_ content: JSONValue) -> JSONValue? {
    switch (contentFormat, content) {
    case (.string, .array(let parts)) where !parts.isEmpty:
      // Only text can become a string; other parts are left for the template to refuse.
      var texts: [String] = []
      for part in parts {
        switch part {
        case .string(let text): texts.append(text)
        case .object(let object):
          guard object["type"]?.stringValue.map({ $0 == "text" || $0 == "input_text" }) ?? true,
            let text = object["text"]?.stringValue
          else { return nil }
          texts.append(text)
        default: return nil
        }
      }
      return .string(texts.joined(separator: "\n"))
    case (.parts, .string(let text)) where needsParts:
      return .array([.object(JSONObject([("type", "text"), ("text", .string(text))]))])
    default: return nil
    }
  }

  /// The object that a text of arguments holds, or `nil` if it holds none. No text is no arguments.
  private static func parsedArguments(_ arguments: JSONValue?) -> JSONValue? {
    guard case .string(let text)? = arguments else { return nil }
    let isBlank = text.allSatisfy(\.isWhitespace)
    guard let parsed = try? JSONValue.parse(isBlank ? "{}" : text, depthLimit: 64), case .object = parsed else {
      return nil
    }
    return parsed
  }

  // MARK: Continuing the final message

  /// A mark that no conversation holds by accident, put where the final message ends.
  private static let mark = "CONTINUE_FINAL_MESSAGE_TAG "

  /// Marks the end of the final message and returns its text.
  private static func markFinalMessage(
    _ messages: inout [JSONValue], _ format: ContentFormat
  ) throws(EngineError) -> String {
    func refuse(_ reason: String) -> EngineError {
      EngineError(.invalidRequest, "The final message cannot be continued: \(reason).", parameter: "messages")
    }
    guard case .object(var last)? = messages.last else { throw refuse("there is no message") }
    let text: String
    switch last["content"] {
    case .string(let content)?:
      text = content
      last["content"] = .string(content + mark)
    case .array(var parts)?:
      guard
        let position = parts.lastIndex(where: { $0["text"] != nil }), case .object(var part) = parts[position],
        case .string(let content)? = part["text"]
      else { throw refuse("it has no text") }
      text = content
      part["text"] = .string(content + mark)
      parts[position] = .object(part)
      last["content"] = .array(parts)
    default: throw refuse("it has no content")
    }
    messages[messages.count - 1] = .object(last)
    return text
  }

  /// Cuts the rendered prompt where the final message ends.
  private static func cut(_ rendered: String, after text: String) throws(EngineError) -> String {
    let output = Text(rendered)
    let stripped = Text(mark).stripped()
    guard output.contains(Text(text).stripped()), let position = lastRange(of: stripped.bytes, in: output.bytes)
    else {
      throw EngineError(
        .invalidRequest,
        "The final message cannot be continued: the chat template leaves out a part of it. Send it without "
          + "continue_final_message.", parameter: "continue_final_message")
    }
    let before = Text(slice: output.bytes[..<position])
    // A template that strips messages stripped the end of the mark too.
    let isExact = output.bytes[position...].starts(with: Array(mark.utf8))
    return (isExact ? before : before.stripped(left: false)).string
  }
}

extension Value {
  /// A value of a request.
  init(_ json: JSONValue) {
    switch json {
    case .null: self = .none
    case .bool(let bool): self = .bool(bool)
    case .int(let int): self = .int(Int(int))
    case .double(let double): self = .double(double)
    case .string(let string): self = .string(Text(string))
    case .array(let items): self = .list(items.map { Value($0) })
    case .object(let object):
      var values: [Value] = []
      values.reserveCapacity(object.count)
      for key in object.keys { values.append(Value(object[key]!)) }
      self = .dict(DictBox(uniqueKeys: object.keys.map { .string(Text($0)) }, values: values))
    }
  }
}
