import ApusChat
import ApusCore
import ApusServer
import ApusStore
import ArgumentParser
import Logging

/// How much the server says.
enum LogLevel: String, ExpressibleByArgument, CaseIterable {
  case trace, debug, info, notice, warning, error, critical
}

/// `apus serve`
struct Serve: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Serves a model over HTTP: OpenAI's API and SGLang's native one.",
    discussion: """
      Start-up prints what was decided: device, threads, K/V size, limits and the URL. SIGTERM or Ctrl-C lets running \
      requests end and then exits; a second one exits at once.

      Examples:
        apus serve models/Qwen2.5-0.5B-Instruct --port 8000
        apus serve Qwen/Qwen2.5-0.5B-Instruct
        apus serve models/Llama-3.2-1B --quantization int8 --host 0.0.0.0 --api-key secret
        apus serve models/Qwen3-Embedding-0.6B --is-embedding
        apus serve models/Qwen2.5-0.5B-Instruct --ssl-certfile cert.pem --ssl-keyfile key.pem
        curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"messages": [{"role": "user", "content": "Hello"}]}'
      """)

  @OptionGroup(title: "Model and engine") var engine: EngineOptions
  @OptionGroup(title: "Server") var server: ServerOptions

  @Flag(help: "Serves the model's embeddings (/v1/embeddings, /v1/score, /v1/rerank), no text. Encoders need no flag.")
  var isEmbedding = false

  func run() async throws {
    // First, since a store that cannot be opened should not cost the time of loading a model.
    let store = try Store(path: server.storePath)
    defer { store.close() }
    let running = try await startEngine(engine, isEmbedding: isEmbedding)
    for line in running.report { Terminal.error.line(line) }
    do {
      try await runServer(running.service, options: server, store: store)
    } catch {
      await running.shutdown()
      throw error
    }
    await running.shutdown()
  }
}

/// The flags of the HTTP server.
struct ServerOptions: ParsableArguments {
  @Option(help: ArgumentHelp("The address to listen on; 0.0.0.0 is every network.", valueName: "address"))
  var host = "127.0.0.1"

  @Option(help: ArgumentHelp("The port to listen on; 0 picks a free one.", valueName: "port"))
  var port = 8000

  @Option(help: ArgumentHelp("Clients must send this key as a bearer token.", valueName: "key"))
  var apiKey: String?

  @Option(
    help: ArgumentHelp(
      "Callers of administrative endpoints must send this key. Without it they are open to this machine only.",
      valueName: "key"))
  var adminApiKey: String?

  @Option(
    help: ArgumentHelp("The TLS certificate chain (PEM); turns HTTPS on.", valueName: "path"), completion: .file())
  var sslCertfile: String?

  @Option(help: ArgumentHelp("The private key of the certificate (PEM).", valueName: "path"), completion: .file())
  var sslKeyfile: String?

  @Option(
    parsing: .singleValue,
    help: ArgumentHelp(
      "A web page's origin that may call from a browser; '*' allows all. May be repeated.", valueName: "origin"))
  var corsAllowOrigin: [String] = []

  @Option(help: "How much is logged.")
  var logLevel: LogLevel = .info

  @Flag(help: "Logs a line for each request: lengths, timings, how it ended. Never the text.")
  var logRequests = false

  @Flag(help: "Streams of /generate send what is new instead of the whole text so far.")
  var incrementalStreamingOutput = false

  @Option(
    help: ArgumentHelp(
      "How the model writes tool calls: auto (what the chat template shows), none, or one of "
        + ToolCallFormat.all.map(\.name).joined(separator: ", ") + ".", valueName: "name"),
    completion: .list(["auto", "none"] + ToolCallFormat.all.map(\.name)))
  var toolCallParser = "auto"

  @Option(
    help: ArgumentHelp(
      "How the model marks its chain of thought: auto (what the chat template shows), none, or one of "
        + ReasoningFormat.all.map(\.name).joined(separator: ", ") + ".", valueName: "name"),
    completion: .list(["auto", "none"] + ReasoningFormat.all.map(\.name)))
  var reasoningParser = "auto"

  @Option(
    help: ArgumentHelp("A stopping server lets running requests finish for this long.", valueName: "seconds"))
  var drainTimeout = 300.0

  @Option(
    help: ArgumentHelp(
      "The database for responses, files and batches, made if it is not there. Without it they are kept in memory and end "
        + "with the server.", valueName: "path"), completion: .file())
  var storePath: String?

  @Option(
    help: ArgumentHelp(
      "How many lines of batches are in work at once; the engine's other places stay free for callers who wait.",
      valueName: "count"))
  var batchConcurrency = 8

  @Option(help: ArgumentHelp("The largest request body in MiB.", valueName: "MiB"))
  var maxBodySize = 32

  func validate() throws {
    guard (0...65535).contains(port) else { throw ValidationError("--port must be in 0...65535, got \(port).") }
    if (sslCertfile == nil) != (sslKeyfile == nil) {
      throw ValidationError("--ssl-certfile and --ssl-keyfile belong together; give both or neither.")
    }
    if !(drainTimeout > 0 && drainTimeout <= 1e6) {
      throw ValidationError("--drain-timeout must be a number of seconds above 0, got \(drainTimeout).")
    }
    if !["auto", "none"].contains(toolCallParser), ToolCallFormat.named(toolCallParser) == nil {
      throw ValidationError(
        "--tool-call-parser has no format '\(toolCallParser)'; there are auto, none, "
          + ToolCallFormat.all.map(\.name).joined(separator: ", ") + ".")
    }
    if !["auto", "none"].contains(reasoningParser), ReasoningFormat.named(reasoningParser) == nil {
      throw ValidationError(
        "--reasoning-parser has no format '\(reasoningParser)'; there are auto, none, "
          + ReasoningFormat.all.map(\.name).joined(separator: ", ") + ".")
    }
    if storePath?.isEmpty == true { throw ValidationError("--store-path is empty; leave it out instead.") }
    if batchConcurrency < 1 {
      throw ValidationError("--batch-concurrency must be at least 1, got \(batchConcurrency).")
    }
    if maxBodySize < 1 { throw ValidationError("--max-body-size must be at least 1, got \(maxBodySize).") }
    if apiKey?.isEmpty == true { throw ValidationError("--api-key is empty; leave it out to serve without a key.") }
    if adminApiKey?.isEmpty == true { throw ValidationError("--admin-api-key is empty; leave it out instead.") }
  }
}

/// The one place where commands construct the server.
private func runServer(
  _ service: any GenerationService, options: ServerOptions, store: any ResponseStore
) async throws {
  var configuration = ServerConfiguration()
  configuration.host = options.host
  configuration.port = options.port
  configuration.certificateFile = options.sslCertfile
  configuration.privateKeyFile = options.sslKeyfile
  configuration.apiKey = options.apiKey
  configuration.adminKey = options.adminApiKey
  configuration.allowedOrigins = options.corsAllowOrigin
  configuration.maxBodyBytes = options.maxBodySize << 20
  configuration.drainTimeout = options.drainTimeout
  configuration.batchConcurrency = options.batchConcurrency
  configuration.incrementalStreaming = options.incrementalStreamingOutput
  configuration.toolCallParser = options.toolCallParser
  configuration.reasoningParser = options.reasoningParser
  configuration.accessLog = options.logRequests
  configuration.version = ApusProgram.version
  var logger = Logger(label: "apus") { StreamLogHandler.standardError(label: $0) }
  logger.logLevel = options.logLevel.level
  let scheme = options.sslCertfile == nil ? "http" : "https"
  // A URL names a host that a client can reach: the wildcard addresses are this machine.
  let host = ["0.0.0.0", "::", "[::]"].contains(options.host) ? "127.0.0.1" : options.host
  let shown = host.contains(":") && !host.hasPrefix("[") ? "[\(host)]" : host
  try await ApusServer.serve(service: service, configuration: configuration, logger: logger, store: store) { port in
    Terminal.error.line("Serving \(service.model.name) at \(scheme)://\(shown):\(port)/v1")
  }
}

extension LogLevel {
  fileprivate var level: Logger.Level { Logger.Level(rawValue: rawValue)! }
}
