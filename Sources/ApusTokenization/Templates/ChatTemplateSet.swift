public import ApusCore
import Glibc

/// The chat templates of a checkpoint, by name, with the special tokens that they see.
///
/// Found as transformers finds them: `chat_template.jinja` and `additional_chat_templates/*.jinja`, else `chat_template`
/// of `tokenizer_config.json` (one text, or a list of named ones), else `chat_template.json`.
public struct ChatTemplateSet: Sendable {
  /// The name of the template that is used unless another is asked for.
  public static let defaultName = "default"
  /// The name of the template that is used when tools are offered, where there is one.
  public static let toolUseName = "tool_use"

  /// The texts of special tokens by their names: `bos_token`, `eos_token`, `unk_token` and so on.
  public var specialTokens: [String: String]
  /// A template that cannot be used fails when it is asked for, so that it does not stand in the way of the others.
  private var templates: [String: Result<ChatTemplate, EngineError>]

  /// Makes a set of template texts by name.
  public init(sources: [String: String], specialTokens: [String: String] = [:]) {
    self.specialTokens = specialTokens
    templates = sources.mapValues { source in
      do throws(EngineError) {
        return .success(try ChatTemplate(source: source))
      } catch {
        return .failure(error)
      }
    }
  }

  /// Makes a set of one template.
  public init(_ template: ChatTemplate, specialTokens: [String: String] = [:]) {
    self.specialTokens = specialTokens
    templates = [Self.defaultName: .success(template)]
  }

  /// The names of the templates, sorted.
  public var names: [String] { templates.keys.sorted() }
  /// Whether there is no template at all.
  public var isEmpty: Bool { templates.isEmpty }

  // MARK: Loading

  /// Reads the templates and special tokens of a checkpoint directory. A directory without templates gives an empty set.
  /// - Throws: `invalidCheckpoint` if a file that is there cannot be read.
  /// The path may also name a GGUF model, which holds both itself.
  public static func load(directory: String) throws(EngineError) -> ChatTemplateSet {
    if let files = try GGUFFiles.find(directory) { return try ChatTemplateSet(gguf: files[0]) }
    let configuration = try readJSON(directory + "/tokenizer_config.json")
    var specialTokens = specialTokens(in: configuration ?? .null)
    if let map = try readJSON(directory + "/special_tokens_map.json") {
      specialTokens.merge(Self.specialTokens(in: map)) { own, _ in own }
    }
    let sources = try sources(directory: directory, configuration: configuration)
    return ChatTemplateSet(sources: sources, specialTokens: specialTokens)
  }

  /// The texts of the templates of a checkpoint directory, by name.
  /// - Throws: `invalidCheckpoint` if a file that is there cannot be read.
  package static func sources(directory: String) throws(EngineError) -> [String: String] {
    try sources(directory: directory, configuration: try readJSON(directory + "/tokenizer_config.json"))
  }

  private static func sources(
    directory: String, configuration: JSONValue?
  ) throws(EngineError) -> [String: String] {
    var sources: [String: String] = [:]
    if let text = try readText(directory + "/chat_template.jinja") {
      sources[defaultName] = text
    }
    let folder = directory + "/additional_chat_templates"
    for file in fileNames(in: folder) where file.hasSuffix(".jinja") {
      if let text = try readText(folder + "/" + file) { sources[String(file.dropLast(".jinja".count))] = text }
    }
    if sources.isEmpty, let configuration { sources = Self.sources(in: configuration) }
    if sources.isEmpty, let legacy = try readJSON(directory + "/chat_template.json") {
      sources = Self.sources(in: legacy)
    }
    return sources
  }

  /// Reads a template file, a `tokenizer_config.json`, or a checkpoint directory.
  /// - Throws: `notFound` if there is nothing at the path, `invalidCheckpoint` if it holds no template.
  public static func load(path: String) throws(EngineError) -> ChatTemplateSet {
    var information = stat()
    guard stat(path, &information) == 0 else {
      throw EngineError(
        .notFound, "There is no file or directory \(path). Name a .jinja file, a tokenizer_config.json or a checkpoint."
      )
    }
    let set: ChatTemplateSet
    let holdsModel = try GGUFFiles.find(path) != nil
    if information.st_mode & S_IFMT == S_IFDIR || holdsModel {
      set = try load(directory: path)
    } else if path.hasSuffix(".json"), let json = try readJSON(path) {
      set = ChatTemplateSet(sources: sources(in: json), specialTokens: specialTokens(in: json))
    } else {
      set = ChatTemplateSet(sources: [defaultName: try readText(path) ?? ""])
    }
    if set.isEmpty {
      throw EngineError(
        .invalidCheckpoint,
        "\(path) holds no chat template. Name a .jinja file or one of the built-in templates: "
          + "\(BuiltInChatTemplates.names.joined(separator: ", ")).")
    }
    return set
  }

  /// Replaces the templates by the one that a user names: a file, a built-in template, a named template of this set, or
  /// the text of a template itself. Special tokens stay, and those of a `tokenizer_config.json` named are added.
  public mutating func choose(_ nameOrPath: String) throws(EngineError) {
    if nameOrPath.contains("{%") || nameOrPath.contains("{{") {
      templates = [Self.defaultName: .success(try ChatTemplate(source: nameOrPath))]
    } else if access(nameOrPath, F_OK) == 0 {
      let chosen = try Self.load(path: nameOrPath)
      templates = chosen.templates
      specialTokens.merge(chosen.specialTokens) { own, _ in own }
    } else if let template = templates[nameOrPath] {
      templates = [Self.defaultName: template]
    } else if let template = try BuiltInChatTemplates.template(named: nameOrPath) {
      templates = [Self.defaultName: .success(template)]
    } else {
      throw EngineError(
        .notFound,
        "There is no chat template \(nameOrPath): it is no file, not among the model's templates "
          + "(\(names.isEmpty ? "none" : names.joined(separator: ", "))) and not built in "
          + "(\(BuiltInChatTemplates.names.joined(separator: ", "))).", parameter: "chat_template")
    }
  }

  /// The template texts in a `tokenizer_config.json` or `chat_template.json`.
  static func sources(in configuration: JSONValue) -> [String: String] {
    switch configuration["chat_template"] {
    case .string(let text)?: return [defaultName: text]
    case .array(let list)?:
      var sources: [String: String] = [:]
      for item in list {
        if let name = item["name"]?.stringValue, let text = item["template"]?.stringValue { sources[name] = text }
      }
      return sources
    case .object(let object)?:
      var sources: [String: String] = [:]
      for (name, value) in object { if case .string(let text) = value { sources[name] = text } }
      return sources
    default: return [:]
    }
  }

  /// The special tokens that templates see by name: texts, or objects with the text in `content`.
  public static func specialTokens(in configuration: JSONValue) -> [String: String] {
    func text(_ value: JSONValue?) -> String? { value?.stringValue ?? value?["content"]?.stringValue }
    var tokens: [String: String] = [:]
    for name in ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"] {
      tokens[name] = text(configuration[name])
    }
    if case .object(let extra)? = configuration["extra_special_tokens"] {
      for (name, value) in extra { if let token = text(value) { tokens[name] = token } }
    }
    return tokens
  }

  /// Whether the model speaks the harmony format: its own template writes it.
  public var speaksHarmony: Bool {
    guard case .success(let template)? = templates[Self.defaultName] else { return false }
    return ["<|start|>system<|message|>", "<|start|>assistant", "<|channel|>analysis<|message|>"].allSatisfy {
      template.source.utf8.contains(sequence: $0.utf8)
    }
  }

  // MARK: Use

  /// The template for a request.
  /// - Parameters:
  ///   - name: the template's name; `nil` takes `tool_use` if tools are offered and there is one, else the default.
  ///   - hasTools: whether tools are offered.
  /// - Throws: `unsupported` if there is no template, `invalidRequest` if there is none of that name, and the template's
  ///   own error if it cannot be used.
  public func template(named name: String? = nil, hasTools: Bool = false) throws(EngineError) -> ChatTemplate {
    let chosen: Result<ChatTemplate, EngineError>?
    if let name {
      chosen = templates[name]
    } else if hasTools, let template = templates[Self.toolUseName] {
      chosen = template
    } else {
      chosen = templates[Self.defaultName] ?? (templates.count == 1 ? templates.first?.value : nil)
    }
    guard let chosen else {
      if isEmpty {
        throw EngineError(
          .unsupported,
          "The model has no chat template. Name one with --chat-template, or send a prompt instead of "
            + "messages.")
      }
      throw EngineError(
        .invalidRequest,
        "The model has no chat template named \(name ?? Self.defaultName). It has: \(names.joined(separator: ", ")).",
        parameter: "chat_template")
    }
    return try chosen.get()
  }

  /// Renders a conversation with the template that suits it and the special tokens of the set.
  public func render(_ prompt: ChatPrompt, template name: String? = nil) throws(EngineError) -> String {
    var hasTools = false
    if case .array(let tools)? = prompt.tools { hasTools = !tools.isEmpty }
    let template = try template(named: name, hasTools: hasTools)
    return try template.render(prompt, specialTokens: specialTokens)
  }

  // MARK: Files

  private static func readText(_ path: String) throws(EngineError) -> String? {
    guard let bytes = try readBytes(path) else { return nil }
    guard let text = String(validating: bytes, as: UTF8.self) else {
      throw EngineError(.invalidCheckpoint, "\(path) is not valid UTF-8.")
    }
    return text.hasPrefix("\u{FEFF}") ? String(text.unicodeScalars.dropFirst()) : text
  }

  private static func readJSON(_ path: String) throws(EngineError) -> JSONValue? {
    guard let bytes = try readBytes(path) else { return nil }
    do {
      return try JSONValue.parse(bytes)
    } catch {
      throw EngineError(.invalidCheckpoint, "\(path) is not valid JSON: \(error).")
    }
  }

  /// The bytes of a file, or `nil` if there is none.
  private static func readBytes(_ path: String) throws(EngineError) -> [UInt8]? {
    let descriptor = open(path, O_RDONLY | O_CLOEXEC)
    if descriptor < 0 {
      if errno == ENOENT || errno == ENOTDIR { return nil }
      throw EngineError(.invalidCheckpoint, "\(path) cannot be opened: \(String(cString: strerror(errno))).")
    }
    defer { close(descriptor) }
    var bytes: [UInt8] = []
    var chunk = [UInt8](repeating: 0, count: 1 << 16)
    while true {
      let count = read(descriptor, &chunk, chunk.count)
      if count < 0 && errno == EINTR { continue }
      if count < 0 {
        throw EngineError(.invalidCheckpoint, "\(path) cannot be read: \(String(cString: strerror(errno))).")
      }
      if count == 0 { return bytes }
      bytes.append(contentsOf: chunk[..<count])
      if bytes.count > 64 << 20 { throw EngineError(.invalidCheckpoint, "\(path) is larger than 64 MiB.") }
    }
  }

  private static func fileNames(in directory: String) -> [String] {
    guard let handle = opendir(directory) else { return [] }
    defer { closedir(handle) }
    var names: [String] = []
    while let entry = readdir(handle) {
      let name = withUnsafePointer(to: &entry.pointee.d_name) { pointer in
        pointer.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
      }
      names.append(name)
    }
    return names.sorted()
  }
}

extension String.UTF8View {
  /// Whether a text occurs in this one.
  func contains(sequence: String.UTF8View) -> Bool {
    let wanted = Array(sequence)
    let bytes = Array(self)
    guard let first = wanted.first else { return true }
    guard bytes.count >= wanted.count else { return false }
    for start in 0...(bytes.count - wanted.count) where bytes[start] == first {
      if bytes[start..<(start + wanted.count)].elementsEqual(wanted) { return true }
    }
    return false
  }
}
