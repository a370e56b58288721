import HTTPTypes
import Hummingbird

/// One endpoint.
struct Route {
  typealias Handler = @Sendable (Request, ServerContext) async throws -> Response

  var methods: [HTTPRequest.Method]
  var path: String
  var access: Access
  /// Whether the endpoint makes new work, which a draining server refuses.
  var isWork: Bool
  var handler: Handler

  init(
    _ methods: [HTTPRequest.Method], _ path: String, access: Access = .client, isWork: Bool = false,
    _ handler: @escaping Handler
  ) {
    self.methods = methods
    self.path = path
    self.access = access
    self.isWork = isWork
    self.handler = handler
  }
}

extension ServerState {
  var routes: [Route] {
    [
      Route([.post], "/v1/chat/completions", isWork: true, chatCompletions),
      Route([.post], "/v1/completions", isWork: true, completions),
      Route([.post], "/v1/messages", isWork: true, messages),
      Route([.post], "/v1/messages/count_tokens", countMessageTokens),
      Route([.post], "/api/chat", isWork: true, ollamaChat),
      Route([.post], "/api/generate", isWork: true, ollamaGenerate),
      Route([.get], "/api/tags", ollamaTags),
      Route([.get], "/api/ps", ollamaProcesses),
      Route([.get], "/api/version", ollamaVersion),
      Route([.post], "/api/show", ollamaShow),
      Route([.get], "/v1/models", models),
      Route([.get], "/v1/models/**", model),
      Route([.post, .put], "/generate", isWork: true, generate),
      Route([.post], "/v1/embeddings", isWork: true, embeddings),
      Route([.post], "/v1/score", isWork: true, score),
      Route([.post], "/score", isWork: true, score),
      Route([.post, .put], "/v1/rerank", isWork: true, rerank),
      Route([.post], "/v2/rerank", isWork: true, rerank),
      Route([.post], "/rerank", isWork: true, rerank),
      Route([.post], "/tokenize", tokenize),
      Route([.post], "/v1/tokenize", tokenize),
      Route([.post], "/detokenize", detokenize),
      Route([.post], "/v1/detokenize", detokenize),
      Route([.post], "/parse_function_call", parseFunctionCall),
      Route([.post], "/separate_reasoning", separateReasoning),
      Route([.get], "/health", access: .open, health),
      Route([.get], "/health_generate", access: .open, healthGenerate),
      Route([.get], "/ready", access: .open, ready),
      Route([.get], "/metrics", access: .open, metricsPage),
      Route([.get], "/model_info", modelInfo),
      Route([.get], "/get_model_info", modelInfo),
      Route([.get], "/server_info", serverInfo),
      Route([.get], "/get_server_info", serverInfo),
      Route([.get], "/v1/loads", loads),
      Route([.get], "/openapi.json", openAPI),
      Route([.get, .post], "/flush_cache", access: .admin, flushCache),
      Route([.post], "/abort_request", access: .admin, abortRequest),
      Route([.get, .post], "/start_expert_distribution_record", access: .admin, startExpertRecord),
      Route([.get, .post], "/stop_expert_distribution_record", access: .admin, stopExpertRecord),
      Route([.get, .post], "/dump_expert_distribution_record", access: .admin, dumpExpertRecord),
    ] + statefulRoutes
  }

  /// The responder for all endpoints.
  func makeRouter() -> Router<ServerContext> {
    let router = Router(context: ServerContext.self, options: .autoGenerateHeadEndpoints)
    let routes = routes
    var methods: [String: [HTTPRequest.Method]] = [:]
    for route in routes { methods[route.path, default: []] += route.methods }
    router.add(middleware: RequestMiddleware(state: self))
    if !configuration.allowedOrigins.isEmpty {
      router.add(middleware: CrossOriginMiddleware(origins: configuration.allowedOrigins))
    }
    // Inside the cross-origin layer, so that a page can read why its request failed.
    router.add(middleware: ErrorMiddleware(logger: logger, methods: methods))
    for route in routes {
      let group = router.group()
      group.add(middleware: AuthorizationMiddleware(access: route.access, configuration: configuration))
      if route.isWork { group.add(middleware: DrainMiddleware(state: self)) }
      for method in route.methods {
        let handler = route.handler
        group.on(RouterPath(route.path), method: method) { request, context in try await handler(request, context) }
      }
    }
    return router
  }
}
