package import ApusCore

/// What the commands' declarations say about themselves: the source of the reference page and of suggestions.
///
/// Each flag is declared once, as a property of its command. ArgumentParser makes the help text from the declaration and
/// can dump it as JSON; this is that dump, read back.
package struct CommandModel: Sendable, Equatable {
  /// A flag, option or positional argument.
  package struct Parameter: Sendable, Equatable {
    /// How it is given: a word of its own, a name with a value, or a name alone.
    package enum Kind: String, Sendable { case positional, option, flag }
    /// How it is given.
    package var kind: Kind
    /// All spellings with their dashes, long ones first; empty for a positional argument.
    package var names: [String]
    /// The word that stands for the value.
    package var valueName: String
    /// One paragraph for people.
    package var abstract: String
    /// The default as help shows it.
    package var defaultValue: String?
    /// The values allowed, where they are a list.
    package var values: [String]
    /// Whether it may be given more than once.
    package var isRepeating: Bool
    /// Whether it may be left out.
    package var isOptional: Bool
    /// The heading of its group, if it has one.
    package var section: String?
    /// Whether help shows it.
    package var isVisible: Bool
  }

  /// The word that calls the command.
  package var name: String
  /// One line for people.
  package var abstract: String
  /// The longer explanation with examples.
  package var discussion: String
  /// Parameters in the order of their declaration.
  package var parameters: [Parameter]
  /// Commands below this one.
  package var subcommands: [CommandModel]
  /// The subcommand that runs if none is named.
  package var defaultSubcommand: String?

  /// Reads a command from ArgumentParser's dump (version 0).
  package init?(dump: JSONValue) {
    guard let command = dump["command"] else { return nil }
    self.init(command: command)
  }

  private init?(command: JSONValue) {
    guard let name = command["commandName"]?.stringValue else { return nil }
    self.name = name
    abstract = command["abstract"]?.stringValue ?? ""
    discussion = command["discussion"]?.stringValue ?? ""
    defaultSubcommand = command["defaultSubcommand"]?.stringValue
    subcommands = (command["subcommands"]?.arrayValue ?? []).compactMap { CommandModel(command: $0) }
      .filter { $0.name != "help" }
    parameters = (command["arguments"]?.arrayValue ?? []).compactMap(Parameter.init)
  }
}

extension CommandModel.Parameter {
  fileprivate init?(_ value: JSONValue) {
    guard let kind = value["kind"]?.stringValue.flatMap(Kind.init(rawValue:)) else { return nil }
    self.kind = kind
    let spellings = (value["names"]?.arrayValue ?? []).compactMap { name -> String? in
      guard let text = name["name"]?.stringValue else { return nil }
      return (name["kind"]?.stringValue == "long" ? "--" : "-") + text
    }
    names = spellings.filter { $0.hasPrefix("--") } + spellings.filter { !$0.hasPrefix("--") }
    valueName = value["valueName"]?.stringValue ?? ""
    abstract = value["abstract"]?.stringValue ?? ""
    defaultValue = value["defaultValue"]?.stringValue
    values = (value["allValues"]?.arrayValue ?? []).compactMap(\.stringValue)
    isRepeating = value["isRepeating"]?.boolValue ?? false
    isOptional = value["isOptional"]?.boolValue ?? false
    section = value["sectionTitle"]?.stringValue
    isVisible = value["shouldDisplay"]?.boolValue ?? true
  }
}

extension CommandModel {
  /// The reference page: every command, every flag, in Markdown.
  package func referencePage() -> String {
    var page = """
      # Commands and flags

      Made by `apus reference` from the declarations in the source. Do not edit: run `apus reference > docs/reference/flags.md`.

      """
    for subcommand in subcommands { subcommand.appendReference(path: [name], to: &page) }
    page += """

      ## Exit statuses

      | status | meaning |
      |---|---|
      | 0 | everything asked for was done |
      | 1 | something asked for failed |
      | 64 | the command line was wrong |
      | 65 | an input file holds something that cannot be understood |
      | 66 | an input file or a model is missing or cannot be read |
      | 69 | a server could not be reached |
      | 73 | an output file could not be written |
      | 77 | a token is missing or does not open what was asked for |
      | 130 | stopped by Ctrl-C |

      """
    return page
  }

  private func appendReference(path: [String], to page: inout String) {
    let path = path + [name]
    page += "\n## \(path.joined(separator: " "))\n\n\(abstract)\n"
    let paragraphs = discussion.split(separator: "\n", omittingEmptySubsequences: false)
    if !discussion.isEmpty {
      page += "\n"
      // Indented lines are examples already; they stay as code.
      for line in paragraphs { page += line.hasPrefix("  ") ? "    \(line.drop { $0 == " " })\n" : "\(line)\n" }
    }
    var section: String??
    for parameter in parameters where parameter.isVisible {
      if section == nil || section! != parameter.section {
        section = .some(parameter.section)
        if let title = parameter.section { page += "\n### \(title)\n" }
        page += "\n| flag | default | meaning |\n|---|---|---|\n"
      }
      page += parameter.referenceRow
    }
    for subcommand in subcommands { subcommand.appendReference(path: path, to: &page) }
  }
}

extension CommandModel.Parameter {
  fileprivate var referenceRow: String {
    var flag = names.isEmpty ? "`<\(valueName)>`" : names.map { "`\($0)`" }.joined(separator: ", ")
    if kind == .option { flag += " `<\(valueName)>`" }
    if isRepeating { flag += " ..." }
    var meaning = abstract
    if !values.isEmpty { meaning += " One of: \(values.map { "`\($0)`" }.joined(separator: ", "))." }
    let standard = defaultValue.map { "`\($0)`" } ?? (isOptional ? "" : "required")
    return "| \(cell(flag)) | \(cell(standard)) | \(cell(meaning)) |\n"
  }

  private func cell(_ text: String) -> String {
    var escaped = ""
    for character in text {
      switch character {
      case "|": escaped += "\\|"
      case "\n": escaped += " "
      default: escaped.append(character)
      }
    }
    return escaped
  }
}
