package import ApusCore

/// A message of a conversation.
package struct ChatMessage: Sendable, Equatable {
  /// `system`, `user` or `assistant`.
  package var role: String
  /// The text.
  package var content: String

  /// Makes a message.
  package init(role: String, content: String) {
    self.role = role
    self.content = content
  }

  /// The message as the API spells it.
  package var json: JSONValue { .object(JSONObject([("role", .string(role)), ("content", .string(content))])) }
}

/// The state of a chat: system message, turns and sampling. Changes are plain functions; the terminal is elsewhere.
package struct ChatSession: Sendable, Equatable {
  /// The system message; empty for none.
  package var system: String
  /// Turns of user and assistant, alternating, beginning with the user.
  package private(set) var turns: [ChatMessage] = []
  /// What was set of the sampling.
  package var sampling: SamplingValues

  /// An empty conversation.
  package init(system: String = "", sampling: SamplingValues = SamplingValues()) {
    self.system = system
    self.sampling = sampling
  }

  /// Everything that the model sees.
  package var messages: [ChatMessage] {
    (system.isEmpty ? [] : [ChatMessage(role: "system", content: system)]) + turns
  }

  /// Adds what the user said. A message that was never answered (its answer was stopped before it began) is replaced.
  package mutating func ask(_ text: String) {
    if turns.last?.role == "user" { turns.removeLast() }
    turns.append(ChatMessage(role: "user", content: text))
  }

  /// Adds the model's answer, whole or as far as it came.
  package mutating func answer(_ text: String) { turns.append(ChatMessage(role: "assistant", content: text)) }

  /// Forgets the turns.
  package mutating func reset() { turns = [] }

  /// Takes back the last question and its answer.
  /// - Returns: the question, or `nil` if there is none.
  package mutating func undo() -> String? {
    if turns.last?.role == "assistant" { turns.removeLast() }
    return turns.last?.role == "user" ? turns.removeLast().content : nil
  }

  /// Takes back the last answer, so that the question can be asked again.
  /// - Returns: whether there is a question.
  package mutating func retry() -> Bool {
    if turns.last?.role == "assistant" { turns.removeLast() }
    return turns.last?.role == "user"
  }

  /// The conversation as a JSON document with the messages of the API.
  package var document: JSONValue { ["messages": .array(messages.map(\.json))] }

  /// Replaces the conversation by a document that `document` or any client of the API wrote.
  package mutating func load(_ document: JSONValue) throws(EngineError) {
    guard let list = (document["messages"] ?? document).arrayValue else {
      throw EngineError(.invalidRequest, "The file holds no conversation: an array 'messages' is missing.")
    }
    var system = "", turns: [ChatMessage] = []
    for (index, message) in list.enumerated() {
      guard let role = message["role"]?.stringValue, let content = message["content"]?.stringValue else {
        throw EngineError(.invalidRequest, "Message \(index) of the file lacks a 'role' or a 'content' that is a text.")
      }
      switch role {
      case "system" where index == 0, "developer" where index == 0: system = content
      case "user", "assistant":
        guard role == (turns.count % 2 == 0 ? "user" : "assistant") else {
          throw EngineError(.invalidRequest, "Message \(index) of the file breaks the turns of user and assistant.")
        }
        turns.append(ChatMessage(role: role, content: content))
      default:
        throw EngineError(.invalidRequest, "Message \(index) of the file has the role '\(role)', which a chat has not.")
      }
    }
    self.system = system
    self.turns = turns
  }
}
