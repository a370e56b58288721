import ApusCore
import Hummingbird
import NIOCore

/// Limits on one request, which are those of OpenAI's API.
enum EmbeddingLimits {
  /// Texts in one request.
  static let inputs = 2048
  /// Tokens in one request.
  static let tokens = 300_000
}

/// The body of `POST /v1/embeddings`.
struct EmbeddingRequest {
  enum Format: String { case float, base64 }

  var model: String?
  var inputs: [ApusCore.Request.Prompt] = []
  var format = Format.float
  var dimensions: Int?
  var truncation: Int?

  /// The member that says how many tokens of each text are kept, to all endpoints that embed.
  static func truncation<Target>(to path: Field<Target>.Path<Int?>) -> Field<Target> {
    .integer(
      "truncate_prompt_tokens", to: path,
      "Cuts longer texts to so many tokens; -1 to what the model takes. Without it they are refused.")
  }

  /// The members of the body.
  static let fields = FieldTable<EmbeddingRequest>([
    .string("model", to: \.model, "The model served; may be left out."),
    Field(
      "input", schema: PromptList.schema, "The texts: a string, token ids, or an array of either.",
      requirement: "a string, token ids, or an array of either"
    ) { (request, fields, reader, name) throws(JSONError) in
      request.inputs = try fields.prompts(&reader, name)?.prompts ?? []
    },
    Field(
      "encoding_format", schema: ["enum": ["float", "base64"], "default": "float"],
      "Whether vectors are arrays of numbers or the base 64 of little-endian float32."
    ) { (request, fields, reader, name) throws(JSONError) in
      guard let text = try fields.string(&reader, name) else { return }
      if let format = Format(rawValue: text) {
        request.format = format
      } else {
        fields.note(name, "must be \"float\" or \"base64\", got \(text.debugDescription)")
      }
    },
    .integer(
      "dimensions", to: \.dimensions, "Keeps so many of a vector's first numbers and makes its length one again."),
    truncation(to: \.truncation),
    Field("user", schema: ["type": "string"], "Checked to be a string, and ignored.") {
      (_, fields, reader, name) throws(JSONError) in
      _ = try fields.string(&reader, name)
    },
  ])

  /// Reads and checks a body.
  init(_ body: ByteBuffer) throws(EngineError) {
    var request = EmbeddingRequest()
    try Self.fields.read(body, into: &request)
    self = request
  }

  private init() {}
}

extension ServerState {
  /// `POST /v1/embeddings`, OpenAI's API.
  func embeddings(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let body = try EmbeddingRequest(try await body(of: request))
    try check(model: body.model)
    let service = try embeddingService()
    let information = service.information
    if let labels = information.labelCount {
      throw EngineError(
        .unsupported,
        "\(self.service.model.name) is a classifier with \(labels) \(labels == 1 ? "output" : "outputs") and gives no "
          + "vectors; use /v1/score or /v1/rerank.", parameter: "model")
    }
    if let dimensions = body.dimensions, !(1...information.dimensions).contains(dimensions) {
      throw EngineError(
        .invalidRequest, "dimensions must be in 1...\(information.dimensions), got \(dimensions).",
        parameter: "dimensions")
    }
    try checkCount(body.inputs.count, "input")
    var inputs: [EmbeddingInput] = []
    for prompt in body.inputs {
      switch prompt {
      case .text(let text):
        inputs.append(EmbeddingInput(tokens: try tokens(of: text, truncation: body.truncation, "input")))
      case .tokens(var tokens):
        try check(tokens: tokens, "input")
        if let limit = try truncationLimit(body.truncation) { tokens = Array(tokens.prefix(limit)) }
        inputs.append(EmbeddingInput(tokens: tokens))
      }
    }
    var vectors = try await embed(inputs, with: service, "input", context)
    if let dimensions = body.dimensions { vectors = vectors.map { truncatedEmbedding($0, to: dimensions) } }
    var writer = JSONWriter(capacity: 256 + vectors.count * (vectors.first?.count ?? 0) * 12)
    writer.object { writer in
      writer.member("object", "list")
      writer.key("data")
      writer.array { writer in
        for (index, vector) in vectors.enumerated() {
          writer.object { writer in
            writer.member("object", "embedding")
            writer.member("index", index)
            writer.key("embedding")
            switch body.format {
            case .float: writer.array { writer in for number in vector { writer.value(number) } }
            case .base64: writer.value(base64(vector))
            }
          }
        }
      }
      writer.member("model", self.service.model.name)
      writeUsage(of: inputs, to: &writer)
    }
    return Response(json: writer)
  }

  /// `GET /health_generate` of a model that gives vectors: whether it embeds a token in time.
  func healthEmbed(_ service: any EmbeddingService, _ context: ServerContext) async throws -> Response {
    let limit = configuration.probeTimeout
    let isAnswered = await withTaskGroup(of: Bool.self) { tasks in
      tasks.addTask {
        // A full queue moves too; that it is full is no illness.
        do { return try await service.embed([EmbeddingInput(tokens: [0])]).count == 1 } catch {
          return (error as? EngineError)?.code == .queueFull
        }
      }
      tasks.addTask {
        try? await Task.sleep(for: .seconds(limit))
        return false
      }
      let first = await tasks.next() ?? false
      tasks.cancelAll()
      return first
    }
    return isAnswered
      ? Response(text: "OK\n")
      : Response(status: .serviceUnavailable, text: "The model gave no vector within \(limit) seconds.\n")
  }

  // MARK: What embeddings, scores and rankings share

  /// The service behind the endpoints.
  /// - Throws: `unsupported` if the model generates text.
  func embeddingService() throws(EngineError) -> any EmbeddingService {
    if let service = service.embeddings { return service }
    throw EngineError(
      .unsupported,
      "\(service.model.name) is served to generate text; a server started with --is-embedding answers this request.",
      parameter: "model")
  }

  /// Refuses requests with no or too many texts.
  func checkCount(_ count: Int, _ name: String) throws(EngineError) {
    if count < 1 || count > EmbeddingLimits.inputs {
      throw EngineError(
        .invalidRequest, "\(name) must hold 1 to \(EmbeddingLimits.inputs) texts, got \(count).", parameter: name)
    }
  }

  /// How many tokens of a text are kept; `nil` for all, where longer texts are refused.
  func truncationLimit(_ truncation: Int?) throws(EngineError) -> Int? {
    guard let truncation else { return nil }
    let limit = service.model.contextLength
    if truncation == -1 { return limit }
    guard (1...limit).contains(truncation) else {
      throw EngineError(
        .invalidRequest, "truncate_prompt_tokens must be -1 or in 1...\(limit), got \(truncation).",
        parameter: "truncate_prompt_tokens")
    }
    return truncation
  }

  /// The tokens of a text, special ones included. A text that is cut keeps the special tokens at its ends.
  /// - Throws: `invalidRequest` for an empty text.
  func tokens(of text: String, truncation: Int?, _ name: String) throws(EngineError) -> [TokenID] {
    if text.isEmpty { throw EngineError(.invalidRequest, "\(name) must not be an empty string.", parameter: name) }
    let whole = try service.encode(text, addSpecialTokens: true)
    guard let limit = try truncationLimit(truncation), whole.count > limit else { return whole }
    let bare = try service.encode(text, addSpecialTokens: false)
    let added = whole.count - bare.count
    let before = (0...max(added, 0)).first { whole.dropFirst($0).starts(with: bare) } ?? 0
    let after = min(max(added - before, 0), limit)
    return Array(whole.prefix(limit - after)) + whole.suffix(after)
  }

  /// Computes vectors. A closed connection aborts them.
  func embed(
    _ inputs: [EmbeddingInput], with service: any EmbeddingService, _ name: String, _ context: ServerContext
  ) async throws(EngineError) -> [[Float]] {
    let total = inputs.reduce(0) { $0 + $1.tokens.count }
    if total > EmbeddingLimits.tokens {
      throw EngineError(
        .invalidRequest,
        "The request has \(total) tokens; at most \(EmbeddingLimits.tokens) may be sent at once. Send several requests.",
        parameter: name)
    }
    metrics.requestsStarted(inputs.count)
    let task = Task { () -> Result<[[Float]], EngineError> in
      do throws(EngineError) {
        return .success(try await service.embed(inputs))
      } catch {
        return .failure(error)
      }
    }
    let connection = context.channel.flatMap { monitors.monitor(of: $0) }
    let key = connection?.onClose { task.cancel() } ?? 0
    defer { connection?.remove(key) }
    return try await task.value.get()
  }

  /// Writes the `usage` member.
  func writeUsage(of inputs: [EmbeddingInput], to writer: inout JSONWriter) {
    writeUsage(tokens: inputs.reduce(0) { $0 + $1.tokens.count }, to: &writer)
  }

  /// Writes the `usage` member.
  func writeUsage(tokens: Int, to writer: inout JSONWriter) {
    writer.key("usage")
    writer.object { writer in
      writer.member("prompt_tokens", tokens)
      writer.member("total_tokens", tokens)
    }
  }
}

/// Base 64 with padding (RFC 4648) of a vector's numbers as little-endian float32, which is how OpenAI's client asks for
/// vectors.
func base64(_ vector: [Float]) -> String {
  let alphabet = Array("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".utf8)
  var bytes: [UInt8] = []
  bytes.reserveCapacity(vector.count * 4)
  for number in vector {
    let bits = number.bitPattern
    for shift in [UInt32(0), 8, 16, 24] { bytes.append(UInt8(truncatingIfNeeded: bits >> shift)) }
  }
  var text: [UInt8] = []
  text.reserveCapacity((bytes.count + 2) / 3 * 4)
  for start in stride(from: 0, to: bytes.count, by: 3) {
    let count = min(3, bytes.count - start)
    var group: UInt32 = 0
    for offset in 0..<3 { group = group << 8 | (offset < count ? UInt32(bytes[start + offset]) : 0) }
    for digit in 0..<4 {
      text.append(
        digit <= count ? alphabet[Int(group >> UInt32(18 - 6 * digit) & 63)] : UInt8(ascii: "="))
    }
  }
  return String(decoding: text, as: UTF8.self)
}
