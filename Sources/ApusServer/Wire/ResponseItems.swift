import ApusCore

/// An id in the style of the API: a prefix and 32 hexadecimal digits.
func freshID(_ prefix: String) -> String { prefix + RequestID.unique().rawValue }

/// The items of a response's `input`, in their whole form and each with an id. References are left as they are.
///
/// - Throws: `invalidRequest` for what is malformed, `unsupported` for items that this server cannot take.
func inputItems(_ input: JSONValue?) throws(EngineError) -> [JSONValue] {
  switch input {
  case nil, .null:
    throw EngineError(.invalidRequest, "input is required: a string or an array of items.", parameter: "input")
  case .string(let text):
    return [
      [
        "id": .string(freshID("msg_")), "type": "message", "status": "completed", "role": "user",
        "content": [["type": "input_text", "text": .string(text)]],
      ]
    ]
  case .array(let items):
    if items.isEmpty { throw EngineError(.invalidRequest, "input must not be empty.", parameter: "input") }
    return try inputItems(items, "input")
  case let other?:
    throw EngineError(
      .invalidRequest, "input: expected a string or an array of items, got \(other.kindName).", parameter: "input")
  }
}

/// Items in their whole form and each with an id.
///
/// - Parameter name: the member that holds them, for error messages.
func inputItems(_ items: [JSONValue], _ name: String) throws(EngineError) -> [JSONValue] {
  var checked: [JSONValue] = []
  checked.reserveCapacity(items.count)
  for (index, item) in items.enumerated() { checked.append(try inputItem(item, "\(name)[\(index)]")) }
  return checked
}

private func inputItem(_ item: JSONValue, _ path: String) throws(EngineError) -> JSONValue {
  func refuse(_ name: String, _ sentence: String, _ code: EngineError.Code = .invalidRequest) -> EngineError {
    EngineError(code, "\(path)\(name): \(sentence).", parameter: path + name)
  }
  guard case .object(var object) = item else { throw refuse("", "expected an object, got \(item.kindName)") }
  let type: String
  switch object["type"] {
  case .string(let given): type = given
  case nil, .null:
    // A reference needs no type.
    let isReference = object["role"] == nil && object["content"] == nil && object["id"]?.stringValue != nil
    type = isReference ? "item_reference" : "message"
  case let other?: throw refuse(".type", "expected a string, got \(other.kindName)")
  }
  func text(_ name: String) throws(EngineError) -> String {
    switch object[name] {
    case .string(let text): return text
    case nil, .null: throw refuse(".\(name)", "is required")
    case let other?: throw refuse(".\(name)", "expected a string, got \(other.kindName)")
    }
  }
  let prefix: String
  switch type {
  case "message":
    prefix = "msg_"
    let role = try text("role")
    guard ["user", "assistant", "system", "developer"].contains(role) else {
      throw refuse(".role", "\(role.debugDescription) is none of user, assistant, system and developer")
    }
    let kind = role == "assistant" ? "output_text" : "input_text"
    switch object["content"] {
    case .string(let text): object["content"] = [["type": .string(kind), "text": .string(text)]]
    case .array(let parts):
      for (number, part) in parts.enumerated() { try check(part, "\(path).content[\(number)]") }
    case nil, .null: throw refuse(".content", "is required")
    case let other?: throw refuse(".content", "expected a string or an array of parts, got \(other.kindName)")
    }
    object["type"] = "message"
  case "function_call":
    prefix = "fc_"
    for name in ["call_id", "name", "arguments"] { _ = try text(name) }
  case "function_call_output":
    prefix = "fc_"
    _ = try text("call_id")
    switch object["output"] {
    case .string: break
    case .array(let parts):
      for (number, part) in parts.enumerated() { try check(part, "\(path).output[\(number)]") }
    case nil, .null: throw refuse(".output", "is required")
    case let other?: throw refuse(".output", "expected a string or an array of parts, got \(other.kindName)")
    }
  case "reasoning": prefix = "rs_"
  case "item_reference":
    prefix = ""
    _ = try text("id")
    object["type"] = "item_reference"
  default:
    throw refuse(
      ".type",
      "items of type \(type.debugDescription) cannot be taken; there are message, function_call, function_call_output, "
        + "reasoning and item_reference", .unsupported)
  }
  if object["id"]?.stringValue == nil { object["id"] = .string(freshID(prefix)) }
  if type != "reasoning", type != "item_reference", object["status"]?.nonNull == nil { object["status"] = "completed" }
  return .object(object)
}

/// Refuses parts that hold no text.
private func check(_ part: JSONValue, _ path: String) throws(EngineError) {
  guard let type = part["type"]?.stringValue else {
    throw EngineError(.invalidRequest, "\(path): expected an object with a type.", parameter: path)
  }
  switch type {
  case "input_text", "output_text", "text", "refusal":
    let name = type == "refusal" ? "refusal" : "text"
    if part[name]?.stringValue == nil {
      throw EngineError(.invalidRequest, "\(path).\(name): expected a string.", parameter: "\(path).\(name)")
    }
  default:
    throw EngineError(
      .unsupported,
      "\(path): the model served here reads text only, so parts of type \(type.debugDescription) cannot be taken.",
      parameter: path)
  }
}

/// The text of a list of parts. Unlike the chat API's reader this joins without a separator: parts of an answer that the
/// model gave are its text, nothing between them.
private func joinedText(_ content: JSONValue?) -> String {
  switch content {
  case .string(let text): text
  case .array(let parts): parts.map { ($0["text"] ?? $0["refusal"])?.stringValue ?? "" }.joined()
  default: ""
  }
}

/// The conversation that items make, as the chat API has it.
///
/// Neighbouring items of the assistant (chain of thought, text, calls) are one message there. The instructions go before
/// everything else, joined with a system message that the items begin with, since many templates take one only.
func chatMessages(_ items: [JSONValue], instructions: String?) -> [JSONValue] {
  var messages: [JSONObject] = []
  /// Changes the assistant's message that the last items belong to, or a new one.
  func assistant(_ change: (inout JSONObject) -> Void) {
    if messages.last?["role"] != .string("assistant") {
      messages.append(JSONObject([("role", "assistant"), ("content", "")]))
    }
    change(&messages[messages.count - 1])
  }
  for item in items {
    switch item["type"]?.stringValue {
    case "function_call":
      assistant { message in
        let call: JSONValue = [
          "id": item["call_id"] ?? "", "type": "function",
          "function": ["name": item["name"] ?? "", "arguments": item["arguments"] ?? "{}"],
        ]
        message["tool_calls"] = .array((message["tool_calls"]?.arrayValue ?? []) + [call])
      }
    case "function_call_output":
      messages.append(
        JSONObject([
          ("role", "tool"), ("tool_call_id", item["call_id"] ?? ""), ("content", .string(joinedText(item["output"]))),
        ]))
    case "reasoning":
      let content = joinedText(item["content"])
      let text = content.isEmpty ? joinedText(item["summary"]) : content
      if text.isEmpty { continue }
      // A chain of thought begins a new turn of the assistant.
      if messages.last?["content"] != .string("") || messages.last?["tool_calls"] != nil {
        messages.append(JSONObject([("role", "assistant"), ("content", "")]))
      }
      assistant { message in
        message["reasoning_content"] = .string((message["reasoning_content"]?.stringValue ?? "") + text)
      }
    default:
      let text = joinedText(item["content"])
      if item["role"] == "assistant" {
        if messages.last?["content"] != .string("") || messages.last?["tool_calls"] != nil {
          messages.append(JSONObject([("role", "assistant"), ("content", "")]))
        }
        assistant { $0["content"] = .string(text) }
      } else {
        messages.append(JSONObject([("role", item["role"] ?? "user"), ("content", .string(text))]))
      }
    }
  }
  if let instructions, !instructions.isEmpty {
    if let role = messages.first?["role"]?.stringValue, role == "system" || role == "developer" {
      let text = messages[0]["content"]?.stringValue ?? ""
      messages[0]["content"] = .string(instructions + "\n\n" + text)
    } else {
      messages.insert(JSONObject([("role", "system"), ("content", .string(instructions))]), at: 0)
    }
  }
  return messages.map { .object($0) }
}

/// An item of a response's output.
struct OutputItem: Sendable {
  enum Kind: Sendable, Equatable {
    case reasoning, message
    case call(id: String, name: String)
  }

  var id: String
  var kind: Kind
  /// The text, or the JSON text of a call's arguments.
  var text = ""
  /// The log-probabilities of a message's tokens, each a JSON object.
  var logprobs: [[UInt8]] = []
  var status = "in_progress"

  init(_ kind: Kind) {
    self.kind = kind
    switch kind {
    case .reasoning: id = freshID("rs_")
    case .message: id = freshID("msg_")
    case .call: id = freshID("fc_")
    }
  }

  /// Writes the item.
  ///
  /// - Parameter isBegin: whether the item is shown as it begins, when its content has not been added.
  func write(to writer: inout JSONWriter, isBegin: Bool = false) {
    writer.object { writer in
      writer.member("id", id)
      switch kind {
      case .reasoning:
        writer.member("type", "reasoning")
        writer.key("summary")
        writer.array { _ in }
        writeContent(isBegin, to: &writer)
        writer.member("status", status)
      case .message:
        writer.member("type", "message")
        writer.member("status", status)
        writer.member("role", "assistant")
        writeContent(isBegin, to: &writer)
      case .call(let callID, let name):
        writer.member("type", "function_call")
        writer.member("status", status)
        writer.member("call_id", callID)
        writer.member("name", name)
        writer.member("arguments", isBegin ? "" : text)
      }
    }
  }

  private func writeContent(_ isBegin: Bool, to writer: inout JSONWriter) {
    writer.key("content")
    writer.array { if !isBegin { writePart(text, logprobs, to: &$0) } }
  }

  /// Writes the one part of the item's content, with the given text and log-probabilities.
  func writePart(_ text: String, _ logprobs: [[UInt8]], to writer: inout JSONWriter) {
    writer.object { writer in
      if kind == .reasoning {
        writer.member("type", "reasoning_text")
        writer.member("text", text)
      } else {
        writer.member("type", "output_text")
        writer.member("text", text)
        writer.key("annotations")
        writer.array { _ in }
        writer.verbatim("logprobs", logprobs)
      }
    }
  }
}
