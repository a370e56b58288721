import ApusCore
import Hummingbird

extension ServerState {
  /// `GET /openapi.json`.
  func openAPI(_ request: Hummingbird.Request, _ context: ServerContext) async throws -> Response {
    let hasKey = configuration.apiKey != nil
    var document = OpenAPIDocument(
      version: configuration.version, needsKey: hasKey, needsAdminKey: hasKey || configuration.adminKey != nil)
    for route in routes { document.add(route, Self.endpointDescriptions) }
    var writer = JSONWriter(capacity: 1 << 16)
    writer.value(document.json)
    return Response(json: writer)
  }

  /// The parameters of lists.
  private static let page: [EndpointDescription.Parameter] = [
    .init(name: "limit", schema: ["type": "integer", "minimum": 1], summary: "The most entries to give."),
    .init(name: "after", schema: ["type": "string"], summary: "The id of the entry after which the list begins."),
    .init(
      name: "order", schema: ["enum": ["asc", "desc"], "default": "desc"], summary: "Whether the oldest goes first."),
  ]

  /// What the document says of the endpoints, one entry each. An endpoint is described by adding an entry here; one that
  /// this server's routes lack is not in the document.
  static let endpointDescriptions: [EndpointDescription] = [
    EndpointDescription(
      "/v1/chat/completions", tag: "OpenAI", "Answers a conversation.",
      body: .init("ChatCompletionRequest", ChatCompletionRequest.fields),
      answers: ["application/json", "text/event-stream"]),
    EndpointDescription(
      "/v1/completions", tag: "OpenAI", "Continues texts.",
      body: .init("CompletionRequest", CompletionRequest.fields), answers: ["application/json", "text/event-stream"]),
    EndpointDescription("/v1/models", tag: "OpenAI", "Lists the model served."),
    EndpointDescription("/v1/models/**", tag: "OpenAI", "Describes a model."),
    EndpointDescription(
      "/v1/messages", tag: "Anthropic", "Answers a conversation.",
      body: .init("MessagesRequest", MessagesRequest.fields), answers: ["application/json", "text/event-stream"]),
    EndpointDescription(
      "/v1/messages/count_tokens", tag: "Anthropic", "Counts the tokens of a conversation.",
      body: .init("CountTokensRequest", MessagesRequest.countFields)),
    EndpointDescription(
      "/api/chat", tag: "Ollama", "Answers a conversation.",
      body: .init("OllamaChatRequest", OllamaRequest.chatFields), answers: ["application/x-ndjson", "application/json"]),
    EndpointDescription(
      "/api/generate", tag: "Ollama", "Answers a prompt.",
      body: .init("OllamaGenerateRequest", OllamaRequest.generateFields),
      answers: ["application/x-ndjson", "application/json"]),
    EndpointDescription("/api/tags", tag: "Ollama", "Lists the model served."),
    EndpointDescription("/api/ps", tag: "Ollama", "Lists the model in memory."),
    EndpointDescription("/api/version", tag: "Ollama", "Tells the server's version."),
    EndpointDescription(
      "/api/show", tag: "Ollama", "Describes a model.", body: .init("OllamaShowRequest", ollamaShowFields)),
    EndpointDescription(
      "/v1/responses", tag: "OpenAI", "Answers input items and keeps the response.",
      body: .init("ResponseRequest", ResponseRequest.fields),
      answers: ["application/json", "text/event-stream"]),
    EndpointDescription(
      "/v1/responses/input_tokens", tag: "OpenAI", "Counts the tokens of a response's input.",
      body: .init("ResponseRequest", ResponseRequest.fields)),
    EndpointDescription("/v1/responses/compact", tag: "OpenAI", "Not available: refused with a sentence."),
    EndpointDescription(
      "/v1/responses/{id}", methods: [.get], tag: "OpenAI", "Gives a response that was kept.",
      parameters: [
        .init(
          name: "stream", schema: ["type": "boolean", "default": false],
          summary: "Whether its events are given, if it is in the background and was created with `stream`."),
        .init(
          name: "starting_after", schema: ["type": "integer", "minimum": -1],
          summary: "The `sequence_number` after which the events begin."),
      ], answers: ["application/json", "text/event-stream"]),
    EndpointDescription("/v1/responses/{id}", methods: [.delete], tag: "OpenAI", "Deletes a response."),
    EndpointDescription("/v1/responses/{id}/cancel", tag: "OpenAI", "Ends a response that is made in the background."),
    EndpointDescription(
      "/v1/responses/{id}/input_items", tag: "OpenAI", "Lists the items that a response answers.", parameters: page),
    EndpointDescription(
      "/v1/conversations", tag: "OpenAI", "Begins a conversation.",
      body: .init("ConversationRequest", ConversationRequest.fields)),
    EndpointDescription("/v1/conversations/{id}", methods: [.get], tag: "OpenAI", "Describes a conversation."),
    EndpointDescription(
      "/v1/conversations/{id}", methods: [.post], tag: "OpenAI", "Changes a conversation's metadata.",
      body: .init("ConversationUpdate", ConversationRequest.updateFields)),
    EndpointDescription(
      "/v1/conversations/{id}", methods: [.delete], tag: "OpenAI", "Deletes a conversation with its items."),
    EndpointDescription(
      "/v1/conversations/{id}/items", methods: [.post], tag: "OpenAI", "Adds items to a conversation.",
      body: .init("ConversationItems", ConversationRequest.itemFields)),
    EndpointDescription(
      "/v1/conversations/{id}/items", methods: [.get], tag: "OpenAI", "Lists a conversation's items.", parameters: page),
    EndpointDescription(
      "/v1/conversations/{id}/items/{item}", methods: [.get], tag: "OpenAI", "Gives an item of a conversation."),
    EndpointDescription(
      "/v1/conversations/{id}/items/{item}", methods: [.delete], tag: "OpenAI",
      "Takes an item out of a conversation."),
    EndpointDescription(
      "/v1/files", methods: [.post], tag: "OpenAI", "Keeps a file.",
      body: .init(
        "FileUpload", contentType: "multipart/form-data",
        schema: [
          "type": "object",
          "properties": [
            "file": ["type": "string", "contentMediaType": "application/octet-stream"],
            "purpose": ["enum": .array(UploadForm.purposes.map { .string($0) })],
            "expires_after[anchor]": ["const": "created_at"],
            "expires_after[seconds]": [
              "type": "integer", "minimum": .int(Int64(fileLifetimes.lowerBound)),
              "maximum": .int(Int64(fileLifetimes.upperBound)),
            ],
          ], "required": ["file", "purpose"],
        ])),
    EndpointDescription(
      "/v1/files", methods: [.get], tag: "OpenAI", "Lists the files.",
      parameters: page + [.init(name: "purpose", schema: ["type": "string"], summary: "Only files of this purpose.")]),
    EndpointDescription("/v1/files/{id}", methods: [.get], tag: "OpenAI", "Describes a file."),
    EndpointDescription("/v1/files/{id}", methods: [.delete], tag: "OpenAI", "Deletes a file."),
    EndpointDescription(
      "/v1/files/{id}/content", tag: "OpenAI", "Gives a file's content.", answers: ["application/octet-stream"]),
    EndpointDescription(
      "/v1/batches", methods: [.post], tag: "OpenAI", "Answers the requests in a file.",
      body: .init("BatchRequest", BatchRequest.fields)),
    EndpointDescription("/v1/batches", methods: [.get], tag: "OpenAI", "Lists the batches.", parameters: page),
    EndpointDescription("/v1/batches/{id}", tag: "OpenAI", "Describes a batch."),
    EndpointDescription("/v1/batches/{id}/cancel", tag: "OpenAI", "Ends a batch."),
    EndpointDescription(
      "/v1/embeddings", tag: "OpenAI", "Gives the vectors of texts.",
      body: .init("EmbeddingRequest", EmbeddingRequest.fields)),
    EndpointDescription(
      "/v1/score", "/score", tag: "Native", "Tells how well texts go together.",
      body: .init("ScoreRequest", ScoreRequest.fields)),
    EndpointDescription(
      "/v1/rerank", "/v2/rerank", "/rerank", tag: "Native", "Orders documents by how well they answer a query.",
      body: .init("RerankRequest", RerankRequest.fields)),
    EndpointDescription(
      "/generate", tag: "Native", "Continues texts.", body: .init("GenerateRequest", GenerateRequest.fields),
      answers: ["application/json", "text/event-stream"]),
    EndpointDescription(
      "/tokenize", "/v1/tokenize", tag: "Native", "Gives the token ids of texts or of a conversation.",
      body: .init("TokenizeRequest", TokenizeRequest.fields)),
    EndpointDescription(
      "/detokenize", "/v1/detokenize", tag: "Native", "Gives the texts of token ids.",
      body: .init("DetokenizeRequest", DetokenizeRequest.fields)),
    EndpointDescription(
      "/parse_function_call", tag: "Native", "Finds the tool calls in a text.",
      body: .init("ParseFunctionCallRequest", FunctionCallText.fields)),
    EndpointDescription(
      "/separate_reasoning", tag: "Native", "Finds the chain of thought in a text.",
      body: .init("SeparateReasoningRequest", ReasoningText.fields)),
    EndpointDescription("/health", tag: "Operation", "Whether the server is alive.", answers: ["text/plain"]),
    EndpointDescription(
      "/health_generate", tag: "Operation", "Whether the model gives a token.", answers: ["text/plain"]),
    EndpointDescription("/ready", tag: "Operation", "Whether new requests are admitted.", answers: ["text/plain"]),
    EndpointDescription("/metrics", tag: "Operation", "Metrics for Prometheus.", answers: ["text/plain"]),
    EndpointDescription("/model_info", "/get_model_info", tag: "Operation", "What is served."),
    EndpointDescription("/server_info", "/get_server_info", tag: "Operation", "Settings and state."),
    EndpointDescription(
      "/v1/loads", tag: "Operation", "The load.",
      parameters: [
        .init(name: "format", schema: ["enum": ["json", "prometheus"], "default": "json"], summary: "How it is told.")
      ], answers: ["application/json", "text/plain"]),
    EndpointDescription("/openapi.json", tag: "Operation", "This document."),
    EndpointDescription(
      "/flush_cache", tag: "Administration", "Empties the prefix cache once nothing runs.",
      parameters: [
        .init(
          name: "timeout", schema: ["type": "number", "minimum": 0, "maximum": 3600, "default": 0],
          summary: "How many seconds to wait for running requests.")
      ]),
    EndpointDescription(
      "/abort_request", tag: "Administration", "Ends requests.", body: .init("AbortRequest", AbortRequest.fields)),
  ]
}
