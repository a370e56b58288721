import ApusCore
import Hummingbird
import NIOCore

/// The body of `POST /tokenize`.
struct TokenizeRequest {
  var model: String?
  var prompts: PromptList?
  var messages: JSONValue?
  var addSpecialTokens = true
  var addGenerationPrompt = true

  /// The members.
  static let fields = FieldTable<TokenizeRequest>([
    .string("model", to: \.model, "The model served; may be left out."),
    Field("prompt", "text", schema: PromptList.textSchema, "A text or several.") {
      (request, fields, reader, name) throws(JSONError) in
      request.prompts = try fields.prompts(&reader, name)
      if let prompts = request.prompts, prompts.prompts.contains(where: { !$0.isText }) {
        fields.note(name, "expected a string or an array of strings")
      }
    },
    .value(
      "messages", to: \.messages, schema: ["type": "array"], "A conversation, which the chat template makes a text of."),
    .flag(
      "add_special_tokens", to: \.addSpecialTokens, default: true,
      "Whether the tokenizer adds its special tokens to a text."),
    .flag(
      "add_generation_prompt", to: \.addGenerationPrompt, default: true,
      "Whether a conversation ends with the opening of the assistant's turn."),
  ])
}

/// The body of `POST /detokenize`.
struct DetokenizeRequest {
  var model: String?
  var prompts: PromptList?
  var isEmpty = false
  var skipSpecialTokens = true

  /// The members.
  static let fields = FieldTable<DetokenizeRequest>([
    .string("model", to: \.model, "The model served; may be left out."),
    Field("tokens", "input_ids", schema: PromptList.tokenSchema, "Token ids, or several lists of them.") {
      (request, fields, reader, name) throws(JSONError) in
      // An empty list of tokens has a text, the empty one.
      var ahead = reader
      if try ahead.peek() == .array, try ahead.readValue() == .array([]) {
        request.isEmpty = true
        reader = ahead
      } else {
        request.prompts = try fields.prompts(&reader, name)
        if let prompts = request.prompts, prompts.prompts.contains(where: \.isText) {
          fields.note(name, "expected token ids")
        }
      }
    },
    .flag(
      "skip_special_tokens", to: \.skipSpecialTokens, default: true, "Whether special tokens are left out of the text."),
  ])
}

extension ServerState {
  /// `POST /tokenize`: the token ids of a text, of several texts, or of a conversation.
  func tokenize(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    var given = TokenizeRequest()
    try TokenizeRequest.fields.read(try await body(of: request), into: &given)
    let (model, prompts, messages) = (given.model, given.prompts, given.messages)
    let (addSpecialTokens, addGenerationPrompt) = (given.addSpecialTokens, given.addGenerationPrompt)
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
          try service.renderChat(try chat.prompt(formats)),
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
    var given = DetokenizeRequest()
    try DetokenizeRequest.fields.read(try await body(of: request), into: &given)
    let (model, prompts, isEmpty, skipSpecialTokens) = (
      given.model, given.prompts, given.isEmpty, given.skipSpecialTokens
    )
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
