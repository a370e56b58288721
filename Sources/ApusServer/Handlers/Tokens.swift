import ApusCore
import Hummingbird
import NIOCore

extension ServerState {
  /// `POST /tokenize`: the token ids of a text, of several texts, or of a conversation.
  func tokenize(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var model: String?
    var prompts: PromptList?
    var messages: JSONValue?
    var addSpecialTokens = true
    var addGenerationPrompt = true
    try readBody(try await body(of: request)) { (fields, reader, key) throws(JSONError) in
      switch key {
      case "model": model = try fields.string(&reader, key)
      case "prompt", "text":
        prompts = try fields.prompts(&reader, key)
        if let prompts, prompts.prompts.contains(where: { !$0.isText }) {
          fields.note(key, "expected a string or an array of strings")
        }
      case "messages": messages = try fields.value(&reader, key)
      case "add_special_tokens": addSpecialTokens = try fields.bool(&reader, key) ?? true
      case "add_generation_prompt": addGenerationPrompt = try fields.bool(&reader, key) ?? true
      default: try reader.skipValue()
      }
    }
    try check(model: model)
    var lists: [[TokenID]] = []
    if let prompts {
      for case .text(let text) in prompts.prompts {
        lists.append(try service.encode(text, addSpecialTokens: addSpecialTokens))
      }
    } else if let messages {
      var chat = ChatCompletionRequest(messages: messages)
      chat.addGenerationPrompt = addGenerationPrompt
      lists = [
        try service.encode(
          try service.renderChat(try chat.prompt(keepsDeveloperRole: formats.knowsDeveloperRole)),
          addSpecialTokens: false)
      ]
    } else {
      throw EngineError(.invalidRequest, "prompt is required: a string or an array of strings.", parameter: "prompt")
    }
    let isList = prompts?.isList ?? false
    return Response { writer in
      writer.key("tokens")
      if isList {
        writer.array { writer in for list in lists { writer.tokens(list) } }
      } else {
        writer.tokens(lists[0])
      }
      writer.key("count")
      if isList {
        writer.array { writer in for list in lists { writer.value(list.count) } }
      } else {
        writer.value(lists[0].count)
      }
      writer.member("max_model_len", service.model.contextLength)
    }
  }

  /// `POST /detokenize`: the text of token ids, or of several lists of them.
  func detokenize(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var model: String?
    var prompts: PromptList?
    var isEmpty = false
    var skipSpecialTokens = true
    try readBody(try await body(of: request)) { (fields, reader, key) throws(JSONError) in
      switch key {
      case "model": model = try fields.string(&reader, key)
      case "tokens", "input_ids":
        // An empty list of tokens has a text, the empty one.
        var ahead = reader
        if try ahead.peek() == .array, try ahead.readValue() == .array([]) {
          isEmpty = true
          reader = ahead
        } else {
          prompts = try fields.prompts(&reader, key)
          if let prompts, prompts.prompts.contains(where: \.isText) { fields.note(key, "expected token ids") }
        }
      case "skip_special_tokens": skipSpecialTokens = try fields.bool(&reader, key) ?? true
      default: try reader.skipValue()
      }
    }
    try check(model: model)
    var texts: [String] = []
    if let prompts {
      for case .tokens(let tokens) in prompts.prompts {
        try check(tokens: tokens, "tokens")
        texts.append(try service.decode(tokens, skipSpecialTokens: skipSpecialTokens))
      }
    } else if isEmpty {
      texts = [""]
    } else {
      throw EngineError(
        .invalidRequest, "tokens is required: an array of token ids or of such arrays.", parameter: "tokens")
    }
    let isList = prompts?.isList ?? false
    return Response { writer in
      writer.key("text")
      if isList {
        writer.array { writer in for text in texts { writer.value(text) } }
      } else {
        writer.value(texts[0])
      }
    }
  }
}

extension JSONWriter {
  /// Writes token ids.
  mutating func tokens(_ tokens: [TokenID]) {
    array { writer in for token in tokens { writer.value(Int(token)) } }
  }
}
