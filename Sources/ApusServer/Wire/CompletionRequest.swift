import ApusCore
import NIOCore

/// The prompts of a request, and whether the client gave a list of prompts rather than one.
struct PromptList {
  var prompts: [ApusCore.Request.Prompt] = []
  var isList = false

  /// The JSON Schema of what `FieldReader.prompts` reads.
  static let schema: JSONValue = [
    "anyOf": [["type": "string"], tokens, ["type": "array", "items": ["anyOf": [["type": "string"], tokens]]]]
  ]
  /// The same where only strings, or only token ids, are taken.
  static let textSchema: JSONValue = [
    "anyOf": [["type": "string"], ["type": "array", "items": ["type": "string"]]]
  ]
  static let tokenSchema: JSONValue = ["anyOf": [tokens, ["type": "array", "items": tokens]]]
  /// One prompt.
  static let singleSchema: JSONValue = ["anyOf": [["type": "string"], tokens]]
  private static let tokens: JSONValue = ["type": "array", "items": ["type": "integer", "minimum": 0]]
}

extension FieldReader {
  /// Reads a prompt or a list of prompts: a string, token ids, or an array of either.
  mutating func prompts(_ reader: inout JSONReader, _ name: String) throws(JSONError) -> PromptList? {
    let expected = "a string, an array of token ids, or an array of either"
    guard try expect([.string, .array], expected, &reader, name) else { return nil }
    if try reader.peek() == .string { return PromptList(prompts: [.text(try reader.readString())]) }
    var tokens: [TokenID] = []
    var prompts: [ApusCore.Request.Prompt] = []
    var fields = self
    var index = 0
    try reader.readArray { (reader) throws(JSONError) in
      let path = "\(name)[\(index)]"
      switch try reader.peek() {
      case .string: prompts.append(.text(try reader.readString()))
      case .array:
        if let ids = try fields.tokens(&reader, path) { prompts.append(.tokens(ids)) }
      case .number:
        if let token = try fields.token(&reader, name) { tokens.append(token) }
      case let kind:
        fields.note(path, "expected \(expected), got \(kind.words)")
        try reader.skipValue()
      }
      index += 1
    }
    self = fields
    if !tokens.isEmpty, !prompts.isEmpty {
      note(name, "token ids and prompts cannot be mixed in one array")
      return nil
    }
    if index == 0 {
      note(name, "must not be empty")
      return nil
    }
    return tokens.isEmpty ? PromptList(prompts: prompts, isList: true) : PromptList(prompts: [.tokens(tokens)])
  }
}

/// The body of `POST /v1/completions`.
struct CompletionRequest {
  var common = CommonFields()
  var prompts: [ApusCore.Request.Prompt] = []
  var echo = false
  var logprobs: Int?
  var bestOf: Int?
  var addsSpecialTokens = true

  /// The prompts as the client gave them.
  private var given: PromptList?

  /// The members of the body.
  static let fields =
    FieldTable<CompletionRequest>([
      Field(
        "prompt", schema: PromptList.schema, "The prompts: a string, token ids, or an array of either.",
        requirement: "a string, token ids, or an array of either"
      ) { (request, fields, reader, name) throws(JSONError) in request.given = try fields.prompts(&reader, name) },
      .flag("echo", to: \.echo, default: false, "Whether the prompt goes before the answer."),
      .integer("logprobs", to: \.logprobs, "How many log-probabilities are given with each token; in 0...20."),
      .integer("best_of", to: \.bestOf, "How many answers are made, of which the best `n` are given."),
      .flag(
        "add_special_tokens", to: \.addsSpecialTokens, default: true,
        "Whether the tokenizer adds its special tokens to prompts that are texts."),
      .refused("prompt_embeds", because: "vectors cannot be prompts; give texts or token ids"),
      Field("suffix", schema: ["const": ""], "Not available: filling in the middle is refused.") {
        (_, fields, reader, name) throws(JSONError) in
        if let suffix = try fields.string(&reader, name), !suffix.isEmpty {
          fields.note(name, "filling in the middle is not available; leave the field out", code: .unsupported)
        }
      },
      Field(
        "response_format", schema: GrammarFields.responseFormatSchema, "What the text must look like."
      ) { (request, fields, reader, name) throws(JSONError) in
        try request.common.sampling.grammar.readResponseFormat(name, &fields, &reader)
      },
    ]) + CommonFields.fields.within(\.common)

  /// Reads and checks a body.
  init(_ body: ByteBuffer) throws(EngineError) {
    var request = CompletionRequest()
    try Self.fields.read(body, into: &request)
    request.prompts = request.given?.prompts ?? []
    request.given = nil
    self = request
    try validate()
  }

  private init() {}

  private func validate() throws(EngineError) {
    try common.validate()
    if let logprobs, !(0...20).contains(logprobs) {
      throw EngineError(.invalidRequest, "logprobs must be in 0...20, got \(logprobs).", parameter: "logprobs")
    }
    if let bestOf {
      let count = common.sampling.count ?? 1
      if bestOf < count {
        throw EngineError(
          .invalidRequest, "best_of must be at least n (\(count)), got \(bestOf).", parameter: "best_of")
      }
      if common.stream, bestOf > count {
        throw EngineError(
          .invalidRequest, "best_of cannot be streamed: the best answer is known only at the end.",
          parameter: "best_of")
      }
    }
  }
}
