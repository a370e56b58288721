public import ApusCore
import Glibc
package import Hummingbird
import HummingbirdCore
import HummingbirdTLS
public import Logging
import NIOCore
import NIOSSL
import ServiceLifecycle
import Synchronization
import UnixSignals

/// An HTTP server for one model: OpenAI's API, the native API and the operators' endpoints, over any
/// `GenerationService`.
///
/// `run()` serves until the server is shut down by `shutdown()`, by SIGTERM or SIGINT (if the configuration lets it trap
/// them) or by cancelling the task. A shutdown drains: `/health` and new requests answer 503, running requests finish,
/// then `run()` returns. A second signal ends the process at once.
public final class Server: Sendable {
  private enum Phase {
    case idle
    case running(ServiceGroup)
    case stopped
  }

  /// The registry behind `/metrics`. A program may pass it to `MetricsSystem.bootstrap` to show its own metrics there.
  public let metrics: PrometheusRegistry
  private let state: ServerState
  private let logger: Logger
  private let onRunning: @Sendable (Int) async -> Void
  private let phase = Mutex(Phase.idle)
  private let boundPort = Atomic<Int>(0)

  /// Makes a server; nothing is bound yet.
  ///
  /// - Parameters:
  ///   - service: what answers the requests.
  ///   - configuration: how to listen.
  ///   - logger: takes the access log (level info) and failures.
  ///   - metrics: the registry behind `/metrics`.
  ///   - store: keeps responses, files and batches; without one their endpoints refuse.
  ///   - onRunning: called with the bound port once connections are accepted.
  /// - Throws: `invalidRequest` for an impossible configuration.
  public init(
    service: any GenerationService, configuration: ServerConfiguration = .init(),
    logger: Logger = Logger(label: "apus.server"), metrics: PrometheusRegistry = PrometheusRegistry(),
    store: (any ResponseStore)? = nil,
    onRunning: @escaping @Sendable (_ port: Int) async -> Void = { _ in }
  ) throws(EngineError) {
    try configuration.validate()
    self.metrics = metrics
    self.logger = logger
    self.onRunning = onRunning
    state = ServerState(
      service: service, configuration: configuration, logger: logger, registry: metrics, store: store)
  }

  /// The method and the path of each endpoint.
  package var endpoints: [(method: String, path: String)] {
    state.routes.flatMap { route in route.methods.map { ($0.rawValue, route.path) } }
  }

  /// The port the server listens on; `nil` before it listens.
  public var port: Int? {
    let port = boundPort.load(ordering: .acquiring)
    return port == 0 ? nil : port
  }

  /// Serves until the server is shut down.
  ///
  /// - Throws: `invalidRequest` if a certificate cannot be read, the address cannot be bound, or the server ran before.
  public func run() async throws {
    let application = try makeApplication()
    try await resume()
    let group = ServiceGroup(
      configuration: ServiceGroupConfiguration(
        services: [.init(service: application)], gracefulShutdownSignals: [], cancellationSignals: [],
        logger: quiet(logger)))
    let isFirst = phase.withLock { phase in
      guard case .idle = phase else { return false }
      phase = .running(group)
      return true
    }
    if !isFirst { throw EngineError(.invalidRequest, "The server has run already; make a new one.") }
    defer { phase.withLock { $0 = .stopped } }
    let signals = state.configuration.handlesSignals ? await UnixSignalsSequence(trapping: .sigterm, .sigint) : nil
    let listener = signals.map { signals in Task { await self.obey(signals) } }
    defer { listener?.cancel() }
    do {
      try await withGracefulShutdownHandler {
        try await group.run()
      } onGracefulShutdown: {
        Task { await self.shutdown() }
      }
    } catch let error as IOError {
      throw EngineError(
        .invalidRequest,
        "Cannot listen on \(state.configuration.host), port \(state.configuration.port): \(error.description).",
        parameter: "port")
    }
  }

  /// Drains and stops the server: new requests are refused, running ones finish (or are aborted when the configuration's
  /// `drainTimeout` has passed), then `run()` returns. Returns when everything has ended; a second call returns at once.
  public func shutdown() async {
    // First, so that no line begins once requests are refused.
    state.stateful?.batches.beginStopping()
    guard state.beginDraining() else { return }
    logger.info("Draining: waiting for \(state.active.count) requests.")
    let limit = state.configuration.drainTimeout
    let service = state.service
    await withTaskGroup(of: Void.self) { tasks in
      tasks.addTask {
        if (try? await Task.sleep(for: .seconds(limit))) != nil { service.abortAll() }
      }
      await state.stateful?.batches.stop()
      await service.drain()
      await state.stateful?.background.wait()
      tasks.cancelAll()
    }
    if case .running(let group) = phase.withLock({ $0 }) { await group.triggerGracefulShutdown() }
  }

  /// Goes on with what an earlier process left: batches are continued, responses in the background have failed.
  package func resume() async throws(EngineError) {
    guard let stateful = state.stateful else { return }
    try await state.failLostResponses()
    stateful.batches.wake(state)
  }

  /// Answers signals: the first drains, the second ends the process at once, for people who do not want to wait.
  private func obey(_ signals: UnixSignalsSequence) async {
    var isStopping = false
    for await signal in signals {
      if isStopping {
        logger.warning("Second signal: ending at once.")
        _exit(128 + signal.rawValue)
      }
      isStopping = true
      Task { await self.shutdown() }
    }
  }

  /// The application without its life cycle, for tests that call its routes directly.
  package func makeApplication() throws -> some ApplicationProtocol {
    let configuration = state.configuration
    let state = state
    // Reading stops at this many connections, so that the process keeps descriptors for its files.
    let connectionLimit = min(configuration.maxConnections, max(16, descriptorLimit() - 64))
    let http1 = HTTPServerBuilder.http1(
      configuration: .init(
        additionalChannelHandlers: [
          ConnectionHandler(
            monitors: state.monitors, stalledWriteTimeout: timeAmount(configuration.stalledWriteTimeout))
        ], idleTimeout: timeAmount(configuration.idleTimeout)))
    return Application(
      router: state.makeRouter(), server: try withTLS(http1),
      configuration: ApplicationConfiguration(
        address: .hostname(configuration.host, port: configuration.port), serverName: "apus", backlog: 1024,
        availableConnectionsDelegate: .maximum(connectionLimit, logger: logger)),
      onServerRunning: { channel in
        let port = channel.localAddress?.port ?? configuration.port
        self.boundPort.store(port, ordering: .releasing)
        await self.onRunning(port)
      }, logger: quiet(logger))
  }

  /// Hummingbird's own lines (started, shutting down) would repeat ours.
  private func quiet(_ logger: Logger) -> Logger {
    var logger = logger
    logger.logLevel = max(logger.logLevel, .warning)
    return logger
  }

  private func withTLS(_ base: HTTPServerBuilder) throws(EngineError) -> HTTPServerBuilder {
    guard let certificateFile = state.configuration.certificateFile,
      let keyFile = state.configuration.privateKeyFile
    else { return base }
    do {
      let certificates = try NIOSSLCertificate.fromPEMFile(certificateFile)
      if certificates.isEmpty {
        throw EngineError(.invalidRequest, "\(certificateFile) holds no certificate.", parameter: "certificateFile")
      }
      let key = try NIOSSLPrivateKey(file: keyFile, format: .pem)
      var tls = TLSConfiguration.makeServerConfiguration(
        certificateChain: certificates.map { .certificate($0) }, privateKey: .privateKey(key))
      tls.minimumTLSVersion = .tlsv12
      return try .tls(base, tlsConfiguration: tls)
    } catch let error as EngineError {
      throw error
    } catch {
      throw EngineError(
        .invalidRequest, "Cannot use the certificate \(certificateFile) with the key \(keyFile): \(error).",
        parameter: "certificateFile")
    }
  }
}

/// Serves a model until SIGTERM, SIGINT or the task's cancellation; see `Server`.
///
/// - Parameters:
///   - store: keeps responses, files and batches; without one their endpoints refuse.
///   - onRunning: called with the bound port once connections are accepted.
public func serve(
  service: any GenerationService, configuration: ServerConfiguration, logger: Logger,
  store: (any ResponseStore)? = nil,
  onRunning: @escaping @Sendable (_ port: Int) async -> Void = { _ in }
) async throws {
  try await Server(
    service: service, configuration: configuration, logger: logger, store: store, onRunning: onRunning
  ).run()
}

/// Raises the limit on open descriptors as far as it may be raised, and returns it.
private func descriptorLimit() -> Int {
  var limit = rlimit()
  guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else { return 1024 }
  if limit.rlim_cur < limit.rlim_max {
    limit.rlim_cur = limit.rlim_max
    if setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) != 0 {
      getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
    }
  }
  return Int(min(limit.rlim_cur, 1 << 20))
}

/// Seconds as NIO counts them.
private func timeAmount(_ seconds: Double) -> TimeAmount { .nanoseconds(Int64(seconds * 1e9)) }
