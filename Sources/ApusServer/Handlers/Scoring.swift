import ApusCore
import Glibc
import Hummingbird
import NIOCore

/// Texts or token ids, one or several.
private typealias Prompt = ApusCore.Request.Prompt

/// The body of `POST /v1/score`, in either of its two forms.
private struct ScoreRequest {
  var model: String?
  var truncation: Int?

  // The form of vLLM: two texts, or two lists of texts.
  var first: [String]?
  var firstIsList = false
  var second: [String]?
  var secondIsList = false

  // The form of SGLang: how likely tokens are after a query and an item.
  var query: Prompt?
  var items: [Prompt]?
  var labels: [TokenID]?
  var appliesSoftmax = false
  var itemFirst = false

  init(_ body: ByteBuffer) throws(EngineError) {
    var request = ScoreRequest()
    try readBody(body) { (fields, reader, key) throws(JSONError) in
      switch key {
      case "model": request.model = try fields.string(&reader, key)
      case "truncate_prompt_tokens": request.truncation = try fields.integer(&reader, key)
      case "text_1":
        request.firstIsList = try reader.peek() == .array
        request.first = try fields.strings(&reader, key)
      case "text_2":
        request.secondIsList = try reader.peek() == .array
        request.second = try fields.strings(&reader, key)
      case "query":
        let prompts = try fields.prompts(&reader, key)?.prompts ?? []
        if prompts.count > 1 { fields.note(key, "expected a string or token ids, got an array of them") }
        request.query = prompts.first
      case "items": request.items = try fields.prompts(&reader, key)?.prompts
      case "label_token_ids": request.labels = try fields.tokens(&reader, key)
      case "apply_softmax": request.appliesSoftmax = try fields.bool(&reader, key) ?? false
      case "item_first": request.itemFirst = try fields.bool(&reader, key) ?? false
      default: try reader.skipValue()
      }
    }
    self = request
  }

  private init() {}
}

/// The body of `POST /v1/rerank`.
private struct RerankRequest {
  var model: String?
  var query = ""
  var documents: [String] = []
  var count: Int?
  var returnsDocuments = true
  var truncation: Int?

  init(_ body: ByteBuffer) throws(EngineError) {
    var request = RerankRequest()
    var query: String?
    var documents: [String]?
    try readBody(body) { (fields, reader, key) throws(JSONError) in
      switch key {
      case "model": request.model = try fields.string(&reader, key)
      case "query": query = try fields.string(&reader, key)
      case "documents":
        documents = try fields.array(&reader, key, of: "strings") { (fields, reader, name) throws(JSONError) in
          guard try reader.peek() == .object else { return try fields.string(&reader, name) }
          var text: String?
          try fields.object(&reader, name) { (fields, reader, key) throws(JSONError) in
            if key == "text" { text = try fields.string(&reader, key) } else { try reader.skipValue() }
          }
          if text == nil { fields.note(name, "a document that is an object needs a text") }
          return text
        }
      case "top_n": request.count = try fields.integer(&reader, key)
      case "return_documents": request.returnsDocuments = try fields.bool(&reader, key) ?? true
      case "truncate_prompt_tokens": request.truncation = try fields.integer(&reader, key)
      default: try reader.skipValue()
      }
    }
    guard let query, !query.isEmpty else {
      throw EngineError(.invalidRequest, "query is required: a string that is not empty.", parameter: "query")
    }
    guard let documents else {
      throw EngineError(.invalidRequest, "documents is required: an array of strings.", parameter: "documents")
    }
    if let count = request.count, count < 1 {
      throw EngineError(.invalidRequest, "top_n must be at least 1, got \(count).", parameter: "top_n")
    }
    request.query = query
    request.documents = documents
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
      let prompt: Prompt
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
