/// What a line typed into the chat asks for.
package enum ChatInput: Sendable, Equatable {
  /// Nothing.
  case empty
  /// A message to the model.
  case message(String)
  /// Lists the commands.
  case help
  /// Forgets the conversation.
  case reset
  /// Sets the system message, or shows it (`nil`); an empty text removes it.
  case system(String?)
  /// Sets a sampling value.
  case set(name: String, value: String)
  /// Shows the sampling values.
  case showSettings
  /// Writes the conversation to a file.
  case save(String)
  /// Reads a conversation from a file.
  case load(String)
  /// Takes back the last exchange.
  case undo
  /// Asks for the last answer again.
  case retry
  /// Shows the conversation.
  case history
  /// Leaves the chat.
  case exit
  /// Not a command; the text says why.
  case mistake(String)

  /// The commands with what they do, as `/help` shows them.
  package static let commands: [(usage: String, meaning: String)] = [
    ("/help", "lists the commands"),
    ("/reset", "forgets the conversation, keeps the system message"),
    ("/system [TEXT]", "shows or sets the system message; '/system none' removes it"),
    ("/set [NAME VALUE]", "shows or sets sampling: /set temperature 0.7, /set top_p default"),
    ("/history", "shows the conversation"),
    ("/undo", "takes back your last message and its answer"),
    ("/retry", "asks for the last answer again"),
    ("/save FILE", "writes the conversation as JSON"),
    ("/load FILE", "continues a conversation that was saved"),
    ("/exit", "leaves (so does Ctrl-D)"),
  ]

  /// Reads a line. A line that begins with `//` is a message that begins with `/`.
  package init(_ line: String) {
    let text = trim(line)
    guard text.hasPrefix("/") else {
      self = text.isEmpty ? .empty : .message(text)
      return
    }
    if text.hasPrefix("//") {
      self = .message(String(text.dropFirst()))
      return
    }
    let name = String(text.dropFirst().prefix { !$0.isWhitespace })
    let rest = trim(String(text.dropFirst(name.count + 1)))
    func alone(_ input: ChatInput) -> ChatInput {
      rest.isEmpty ? input : .mistake("/\(name) takes nothing after it.")
    }
    func file(_ make: (String) -> ChatInput) -> ChatInput {
      rest.isEmpty ? .mistake("/\(name) needs a file name, as in '/\(name) chat.json'.") : make(rest)
    }
    switch name.lowercased() {
    case "help", "h", "?": self = alone(.help)
    case "reset", "clear", "new": self = alone(.reset)
    case "system": self = .system(rest.isEmpty ? nil : rest == "none" ? "" : rest)
    case "set":
      if rest.isEmpty {
        self = .showSettings
        return
      }
      let setting = String(rest.prefix { !$0.isWhitespace && $0 != "=" })
      let value = trim(String(rest.dropFirst(setting.count).drop { $0 == "=" || $0.isWhitespace }))
      self =
        value.isEmpty
        ? .mistake("/set needs a name and a value, as in '/set temperature 0.7'.")
        : .set(name: setting, value: value)
    case "history": self = alone(.history)
    case "undo": self = alone(.undo)
    case "retry", "regenerate": self = alone(.retry)
    case "save": self = file(ChatInput.save)
    case "load": self = file(ChatInput.load)
    case "exit", "quit", "q", "bye": self = alone(.exit)
    default:
      let names = Self.commands.map { String($0.usage.dropFirst().prefix { $0 != " " }) }
      let best = names.min { editDistance($0, name) < editDistance($1, name) }
      let isNear = best.map { editDistance($0, name) <= 2 } ?? false
      self = .mistake(
        "Unknown command '/\(name)'" + (isNear ? "; did you mean '/\(best!)'?" : "; /help lists the commands."))
    }
  }
}

/// The text without white space at its ends.
func trim(_ text: String) -> String {
  let start = text.drop { $0.isWhitespace }
  guard let last = start.lastIndex(where: { !$0.isWhitespace }) else { return "" }
  return String(start[...last])
}
