import ApusChat
public import ApusCore

/// How a server listens, whom it lets in and what it refuses.
public struct ServerConfiguration: Sendable {
  /// The address or host name to listen on.
  public var host = "127.0.0.1"
  /// The port to listen on; 0 takes a free one.
  public var port = 8000
  /// A PEM file with the certificate and its chain; together with `privateKeyFile` it turns TLS on.
  public var certificateFile: String?
  /// A PEM file with the certificate's private key.
  public var privateKeyFile: String?
  /// The key that clients must send as `Authorization: Bearer <key>`; `nil` lets everybody in.
  public var apiKey: String?
  /// The key for administrative endpoints. Without it the API key opens them, and without either key only callers on
  /// this host may use them.
  public var adminKey: String?
  /// Origins whose pages may call the server from a browser; `["*"]` allows every page, an empty list none.
  public var allowedOrigins: [String] = []
  /// The largest request body, in bytes.
  public var maxBodyBytes = 32 << 20
  /// The most connections open at once; more wait in the kernel's backlog.
  public var maxConnections = 4096
  /// The most prompts and samples that one HTTP request may ask for together.
  public var maxGenerationsPerRequest = 4096
  /// How long an unused connection is kept, in seconds.
  public var idleTimeout = 75.0
  /// How long a client may leave its socket full before it is taken for gone, in seconds.
  public var stalledWriteTimeout = 300.0
  /// How long a stopping server lets running requests finish before it aborts them, in seconds.
  public var drainTimeout = 300.0
  /// How long `/health_generate` waits for its token, in seconds.
  public var probeTimeout = 20.0
  /// Whether `/generate` streams only what is new instead of the whole text so far.
  public var incrementalStreaming = false
  /// How the model writes tool calls: the name of a `ToolCallFormat`, `auto` (what its chat template shows) or `none`.
  public var toolCallParser = "auto"
  /// How the model marks its chain of thought: the name of a `ReasoningFormat`, `auto` or `none`.
  public var reasoningParser = "auto"
  /// How many lines of batches are in work at once. The engine's other places stay free for callers who wait.
  public var batchConcurrency = 8
  /// Whether each request is logged when its response has ended.
  public var accessLog = true
  /// Whether `run()` traps SIGTERM and SIGINT: the first drains the server, the second ends the process at once.
  public var handlesSignals = true
  /// The program's version, as `/server_info` reports it.
  public var version = "0.1.0"
  /// Further members for `/server_info`, such as the engine's resolved settings. Must hold no secrets.
  public var details = JSONObject()

  /// A server on the loopback interface, port 8000, open to every local caller.
  public init() {}

  /// Refuses impossible or contradictory settings.
  ///
  /// - Throws: `invalidRequest` with the setting's name in `parameter`.
  public func validate() throws(EngineError) {
    func refuse(_ name: String, _ sentence: String) -> EngineError {
      EngineError(.invalidRequest, "\(name) \(sentence).", parameter: name)
    }
    if host.isEmpty { throw refuse("host", "must not be empty") }
    if !(0...65535).contains(port) { throw refuse("port", "must be in 0...65535, got \(port)") }
    if (certificateFile == nil) != (privateKeyFile == nil) {
      throw refuse("certificateFile", "and privateKeyFile must be given together")
    }
    if let apiKey, apiKey.isEmpty { throw refuse("apiKey", "must not be empty") }
    if let adminKey, adminKey.isEmpty { throw refuse("adminKey", "must not be empty") }
    if !["auto", "none"].contains(toolCallParser), ToolCallFormat.named(toolCallParser) == nil {
      throw refuse(
        "toolCallParser",
        "must be auto, none or one of \(ToolCallFormat.all.map(\.name).joined(separator: ", ")), got "
          + toolCallParser.debugDescription)
    }
    if !["auto", "none"].contains(reasoningParser), ReasoningFormat.named(reasoningParser) == nil {
      throw refuse(
        "reasoningParser",
        "must be auto, none or one of \(ReasoningFormat.all.map(\.name).joined(separator: ", ")), got "
          + reasoningParser.debugDescription)
    }
    if maxBodyBytes < 1 { throw refuse("maxBodyBytes", "must be at least 1, got \(maxBodyBytes)") }
    if maxConnections < 1 { throw refuse("maxConnections", "must be at least 1, got \(maxConnections)") }
    if batchConcurrency < 1 { throw refuse("batchConcurrency", "must be at least 1, got \(batchConcurrency)") }
    if maxGenerationsPerRequest < 1 {
      throw refuse("maxGenerationsPerRequest", "must be at least 1, got \(maxGenerationsPerRequest)")
    }
    for (name, value) in [
      ("idleTimeout", idleTimeout), ("stalledWriteTimeout", stalledWriteTimeout), ("drainTimeout", drainTimeout),
      ("probeTimeout", probeTimeout),
    ] where !(value > 0 && value <= 1e6) {
      throw refuse(name, "must be a number of seconds above 0, got \(value)")
    }
  }
}
