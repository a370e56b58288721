import ApusCore
import NIOCore

/// The prompts of a request, and whether the client gave a list of prompts rather than one.
struct PromptList {
  var prompts: [ApusCore.Request.Prompt] = []
  var isList = false
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

  /// Reads and checks a body.
  init(_ body: ByteBuffer) throws(EngineError) {
    var request = CompletionRequest()
    var prompts: PromptList?
    try readBody(body) { (fields, reader, key) throws(JSONError) in
      switch key {
      case "prompt": prompts = try fields.prompts(&reader, key)
      case "echo": request.echo = try fields.bool(&reader, key) ?? false
      case "logprobs": request.logprobs = try fields.integer(&reader, key)
      case "best_of": request.bestOf = try fields.integer(&reader, key)
      case "suffix":
        if let suffix = try fields.string(&reader, key), !suffix.isEmpty {
          fields.note(key, "filling in the middle is not available; leave the field out", code: .unsupported)
        }
      case "response_format": try request.common.sampling.grammar.readResponseFormat(key, &fields, &reader)
      default:
        if try !request.common.read(key, &fields, &reader) { try reader.skipValue() }
      }
    }
    guard let prompts else {
      throw EngineError(
        .invalidRequest, "prompt is required: a string, token ids, or an array of either.", parameter: "prompt")
    }
    request.prompts = prompts.prompts
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
