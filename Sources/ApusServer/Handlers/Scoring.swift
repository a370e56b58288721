import ApusCore
import Glibc
import Hummingbird
import NIOCore

/// The body of `POST /v1/score`, in either of its two forms.
struct ScoreRequest {
  var model: String?
  var truncation: Int?

  // The form of vLLM: two texts, or two lists of texts.
  var first: [String]?
  var second: [String]?

  // The form of SGLang: how likely tokens are after a query and an item.
  var query: ApusCore.Request.Prompt?
  var items: [ApusCore.Request.Prompt]?
  var labels: [TokenID]?
  var appliesSoftmax = false
  var itemFirst = false

  /// The members of the body.
  static let fields = FieldTable<ScoreRequest>([
    .string("model", to: \.model, "The model served; may be left out."),
    Field(
      "text_1", schema: PromptList.textSchema,
      "A text, or several; goes with `text_2`, to a model that embeds or judges pairs."
    ) { (request, fields, reader, name) throws(JSONError) in request.first = try fields.strings(&reader, name) },
    Field(
      "text_2", schema: PromptList.textSchema, "As many texts as `text_1` has, or any number if that is one text."
    ) { (request, fields, reader, name) throws(JSONError) in request.second = try fields.strings(&reader, name) },
    Field(
      "query", schema: PromptList.singleSchema,
      "A text or token ids; goes with `items` and `label_token_ids`, to a model that generates."
    ) { (request, fields, reader, name) throws(JSONError) in
      let prompts = try fields.prompts(&reader, name)?.prompts ?? []
      if prompts.count > 1 { fields.note(name, "expected a string or token ids, got an array of them") }
      request.query = prompts.first
    },
    Field("items", schema: PromptList.schema, "Texts or token ids, each of which is joined with the query.") {
      (request, fields, reader, name) throws(JSONError) in
      request.items = try fields.prompts(&reader, name)?.prompts
    },
    .tokens("label_token_ids", to: \.labels, "The tokens whose probabilities after each prompt are wanted."),
    .flag(
      "apply_softmax", to: \.appliesSoftmax, default: false,
      "Whether the labels' probabilities are made to add up to one."),
    .flag("item_first", to: \.itemFirst, default: false, "Whether an item goes before the query."),
    EmbeddingRequest.truncation(to: \.truncation),
  ])

  init(_ body: ByteBuffer) throws(EngineError) {
    var request = ScoreRequest()
    try Self.fields.read(body, into: &request)
    self = request
  }

  private init() {}
}

/// The body of `POST /v1/rerank`.
struct RerankRequest {
  var model: String?
  var query = ""
  var documents: [String] = []
  var count: Int?
  var returnsDocuments = true
  var truncation: Int?

  /// The members of the body.
  static let fields = FieldTable<RerankRequest>([
    .string("model", to: \.model, "The model served; may be left out."),
    Field(
      "query", schema: ["type": "string", "minLength": 1], "What the documents are to answer.",
      requirement: "a string that is not empty"
    ) { (request, fields, reader, name) throws(JSONError) in
      guard let query = try fields.string(&reader, name) else { return }
      if query.isEmpty { fields.note(name, "must not be empty") }
      request.query = query
    },
    Field(
      "documents",
      schema: [
        "type": "array",
        "items": [
          "anyOf": [
            ["type": "string"],
            ["type": "object", "properties": ["text": ["type": "string"]], "required": ["text"]],
          ]
        ],
      ], "The documents: strings, or objects with a `text`.", requirement: "an array of strings"
    ) { (request, fields, reader, name) throws(JSONError) in
      request.documents =
        try fields.array(&reader, name, of: "strings") { (fields, reader, name) throws(JSONError) in
          guard try reader.peek() == .object else { return try fields.string(&reader, name) }
          var text: String?
          try fields.object(&reader, name) { (fields, reader, key) throws(JSONError) in
            if key == "text" { text = try fields.string(&reader, key) } else { try reader.skipValue() }
          }
          if text == nil { fields.note(name, "a document that is an object needs a text") }
          return text
        } ?? []
    },
    .integer("top_n", to: \.count, "How many of the best documents are given; all without it."),
    .flag(
      "return_documents", to: \.returnsDocuments, default: true, "Whether the answer repeats the documents' texts."),
    EmbeddingRequest.truncation(to: \.truncation),
  ])

  init(_ body: ByteBuffer) throws(EngineError) {
    var request = RerankRequest()
    try Self.fields.read(body, into: &request)
    if let count = request.count, count < 1 {
      throw EngineError(.invalidRequest, "top_n must be at least 1, got \(count).", parameter: "top_n")
    }
    self = request
  }

  private init() {}
}

extension ServerState {
  /// `POST /v1/score`: how well texts go together, or how likely tokens are after a prompt.
  func score(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let body = try ScoreRequest(try await body(of: request))
    try check(model: body.model)
    if body.first != nil || body.second != nil { return try await scorePairs(body, context) }
    return try await scoreLabels(body, context)
  }

  /// `POST /v1/rerank`: documents in the order in which they answer a query, as Cohere's and Jina's APIs have it.
  func rerank(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let body = try RerankRequest(try await body(of: request))
    try check(model: body.model)
    try checkCount(body.documents.count, "documents")
    let (scores, tokens) = try await relevance(
      body.documents.map { (body.query, $0) }, truncation: body.truncation, names: ("query", "documents"), context)
    let order = scores.indices.sorted { scores[$0] != scores[$1] ? scores[$0] > scores[$1] : $0 < $1 }
    return Response { writer in
      writer.member("id", "rerank-" + RequestID.unique().rawValue)
      writer.member("model", service.model.name)
      writeUsage(tokens: tokens, to: &writer)
      writer.key("results")
      writer.array { writer in
        for index in order.prefix(body.count ?? .max) {
          writer.object { writer in
            writer.member("index", index)
            if body.returnsDocuments {
              writer.key("document")
              writer.object { $0.member("text", body.documents[index]) }
            }
            writer.member("relevance_score", scores[index])
          }
        }
      }
    }
  }

  private func scorePairs(_ body: ScoreRequest, _ context: ServerContext) async throws -> Response {
    guard let first = body.first, let second = body.second else {
      throw EngineError(
        .invalidRequest, "text_1 and text_2 belong together; give both.",
        parameter: body.first == nil ? "text_1" : "text_2")
    }
    try checkCount(first.count, "text_1")
    try checkCount(second.count, "text_2")
    let pairs: [(String, String)]
    if first.count == 1 {
      pairs = second.map { (first[0], $0) }
    } else if first.count == second.count {
      pairs = Array(zip(first, second))
    } else {
      throw EngineError(
        .invalidRequest,
        "text_1 has \(first.count) texts and text_2 has \(second.count); either text_1 has one, or both have equally many.",
        parameter: "text_1")
    }
    let (scores, tokens) = try await relevance(
      pairs, truncation: body.truncation, names: ("text_1", "text_2"), context)
    return Response { writer in
      writer.member("id", "score-" + RequestID.unique().rawValue)
      writer.member("object", "list")
      writer.member("created", unixTime())
      writer.member("model", service.model.name)
      writer.key("data")
      writer.array { writer in
        for (index, score) in scores.enumerated() {
          writer.object { writer in
            writer.member("index", index)
            writer.member("object", "score")
            writer.member("score", score)
          }
        }
      }
      writeUsage(tokens: tokens, to: &writer)
    }
  }

  /// How well the second text of each pair goes with the first: the sigmoid of a cross-encoder's output, or the cosine of
  /// two embeddings. Each text is embedded once.
  ///
  /// - Returns: a score for each pair, and the tokens computed.
  private func relevance(
    _ pairs: [(String, String)], truncation: Int?, names: (String, String), _ context: ServerContext
  ) async throws -> (scores: [Double], tokens: Int) {
    let service = try embeddingService()
    guard let labelCount = service.information.labelCount else {
      var places: [String: Int] = [:]
      var inputs: [EmbeddingInput] = []
      func place(_ text: String, _ name: String) throws(EngineError) -> Int {
        if let known = places[text] { return known }
        places[text] = inputs.count
        inputs.append(EmbeddingInput(tokens: try tokens(of: text, truncation: truncation, name)))
        return inputs.count - 1
      }
      var indices: [(Int, Int)] = []
      for (first, second) in pairs { indices.append((try place(first, names.0), try place(second, names.1))) }
      let vectors = try await embed(inputs, with: service, names.1, context)
      return (
        indices.map { cosineSimilarity(vectors[$0.0], vectors[$0.1]) },
        inputs.reduce(0) { $0 + $1.tokens.count }
      )
    }
    guard labelCount == 1 else {
      throw EngineError(
        .unsupported, "\(self.service.model.name) has \(labelCount) labels; a model that scores pairs has one.",
        parameter: "model")
    }
    let limit = try truncationLimit(truncation)
    var inputs: [EmbeddingInput] = []
    for (first, second) in pairs {
      if first.isEmpty { throw EngineError(.invalidRequest, "\(names.0) must not be empty.", parameter: names.0) }
      if second.isEmpty { throw EngineError(.invalidRequest, "\(names.1) must not be empty.", parameter: names.1) }
      var input = try service.encodePair(first, second)
      // The second text loses its end; the separator behind it stays.
      if let limit, input.tokens.count > limit {
        input.tokens = Array(input.tokens.prefix(limit - 1)) + input.tokens.suffix(1)
      }
      inputs.append(input)
    }
    let outputs = try await embed(inputs, with: service, names.1, context)
    return (
      outputs.map { 1 / (1 + exp(-Double($0[0]))) }, inputs.reduce(0) { $0 + $1.tokens.count }
    )
  }

  /// The probabilities of tokens as the next one after query and item, for a model that generates. One step of each prompt
  /// is computed; the query is computed once, since the items' prompts share it as a cached prefix.
  private func scoreLabels(_ body: ScoreRequest, _ context: ServerContext) async throws -> Response {
    guard let query = body.query, let items = body.items else {
      throw EngineError(
        .invalidRequest, "The request needs text_1 and text_2, or query, items and label_token_ids.",
        parameter: body.query == nil ? "query" : "items")
    }
    guard let labels = body.labels, !labels.isEmpty else {
      throw EngineError(
        .invalidRequest, "label_token_ids is required: the tokens whose probabilities are wanted.",
        parameter: "label_token_ids")
    }
    if labels.count > EmbeddingLimits.inputs {
      throw EngineError(
        .invalidRequest, "label_token_ids may hold at most \(EmbeddingLimits.inputs) tokens, got \(labels.count).",
        parameter: "label_token_ids")
    }
    if service.embeddings != nil {
      throw EngineError(
        .unsupported,
        "\(service.model.name) is served for embeddings and predicts no tokens; send text_1 and text_2 instead.",
        parameter: "query")
    }
    try check(tokens: labels, "label_token_ids")
    try checkCount(items.count, "items")
    var sampling = SamplingParameters.greedy
    sampling.maxNewTokens = 1
    sampling.ignoreEOS = true
    var requests: [ApusCore.Request] = []
    for item in items {
      let prompt: ApusCore.Request.Prompt
      switch (query, item) {
      case (.text(let query), .text(let item)): prompt = .text(body.itemFirst ? item + query : query + item)
      case (.tokens(let query), .tokens(let item)): prompt = .tokens(body.itemFirst ? item + query : query + item)
      default:
        throw EngineError(
          .invalidRequest, "query and items must both be texts or both be token ids.", parameter: "items")
      }
      if case .tokens(let tokens) = prompt { try check(tokens: tokens, "items") }
      requests.append(
        ApusCore.Request(prompt: prompt, sampling: sampling, logprobs: LogprobOptions(tokenIDs: labels)))
    }
    let results = try await submit(requests, context).results()
    var rows: [[Double]] = []
    for result in results {
      if case .abort = result.finishReason { throw EngineError(.aborted, "The request was aborted.") }
      guard let position = result.logprobs.first, position.requested.count == labels.count else {
        throw EngineError(.internalFailure, "The engine reported no log-probabilities.")
      }
      let logprobs = position.requested.map { $0.logprob.map(Double.init) ?? -.infinity }
      let greatest = logprobs.max() ?? 0
      guard body.appliesSoftmax, greatest.isFinite else {
        rows.append(logprobs.map(exp))
        continue
      }
      let weights = logprobs.map { exp($0 - greatest) }
      let total = weights.reduce(0, +)
      rows.append(weights.map { $0 / total })
    }
    let tokens = results.reduce(0) { $0 + $1.usage.promptTokens }
    return Response { [rows] writer in
      writer.member("object", "scoring")
      writer.member("model", service.model.name)
      writer.key("scores")
      writer.array { writer in
        for row in rows { writer.array { writer in for score in row { writer.value(score) } } }
      }
      writeUsage(tokens: tokens, to: &writer)
    }
  }
}
