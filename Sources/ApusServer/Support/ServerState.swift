import ApusCore
import HTTPTypes
import Hummingbird
import Logging
import NIOCore
import Synchronization

/// What handlers know of the request's surroundings.
struct ServerContext: RequestContext {
  var coreContext: CoreRequestContextStorage
  /// The connection's channel; `nil` for requests that the server makes to itself.
  let channel: (any Channel)?
  /// The request's name in logs and in the `x-request-id` header.
  var requestID = ""

  init(source: ApplicationRequestContextSource) {
    coreContext = .init(source: source)
    channel = source.channel
  }

  /// The surroundings of a request that the server makes to itself.
  init(internal id: String, logger: Logger) {
    coreContext = .init(source: InternalSource(logger: logger))
    channel = nil
    requestID = id
  }

  private struct InternalSource: RequestContextSource {
    let logger: Logger
  }
}

/// What all handlers share.
final class ServerState: Sendable {
  let service: any GenerationService
  let configuration: ServerConfiguration
  let logger: Logger
  let metrics: ServerMetrics
  let active = ActiveGenerations()
  let monitors = ConnectionMonitors()
  let started = ContinuousClock.now
  /// How the model's answers are read.
  let formats: ChatFormats
  /// Constant for everything that can change what a seed gives.
  let systemFingerprint: String
  /// What keeps responses, files and batches; `nil` if nothing does.
  let stateful: StatefulServices?
  private let draining = Atomic<Bool>(false)

  init(
    service: any GenerationService, configuration: ServerConfiguration, logger: Logger, registry: PrometheusRegistry,
    store: (any ResponseStore)?
  ) {
    stateful = store.map { StatefulServices($0, batchConcurrency: configuration.batchConcurrency) }
    self.service = service
    self.logger = logger
    self.configuration = configuration
    let model = service.model
    formats = ChatFormats(configuration, model)
    metrics = ServerMetrics(modelName: model.name, registry: registry)
    // FNV-1a over what decides the outputs: a client that sees the same fingerprint can expect the same tokens.
    var hash: UInt64 = 0xCBF2_9CE4_8422_2325
    for part in [configuration.version, model.name, model.path, model.dtype, model.kvDtype] {
      for byte in part.utf8 { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01B3 }
      hash = (hash ^ 0xFF) &* 0x100_0000_01B3
    }
    systemFingerprint = "fp_" + hexadecimal(hash)
  }

  /// Whether this server refuses new requests because it is stopping. A service may be draining by itself; then it is the
  /// service that refuses them.
  var isDraining: Bool { draining.load(ordering: .acquiring) }

  /// Refuses new requests from now on. Returns whether it was this call that began it.
  func beginDraining() -> Bool { !draining.exchange(true, ordering: .acquiringAndReleasing) }

  /// Submits the generations of one HTTP request.
  ///
  /// - Parameter followsConnection: whether they end when the client goes.
  func submit(
    _ requests: [ApusCore.Request], _ context: ServerContext, followsConnection: Bool = true
  ) throws(EngineError) -> GenerationGroup {
    if requests.count > configuration.maxGenerationsPerRequest {
      throw EngineError(
        .invalidRequest,
        """
        The request asks for \(requests.count) generations; at most \(configuration.maxGenerationsPerRequest) may be asked \
        for at once.
        """)
    }
    return try GenerationGroup(
      requests, service: service, active: active, metrics: metrics,
      connection: followsConnection ? context.channel.flatMap { monitors.monitor(of: $0) } : nil)
  }

  /// Reads a request's whole body.
  ///
  /// - Throws: `RouteError` with 413 if it is larger than the configuration allows, 400 if it breaks off.
  func body(of request: Hummingbird.Request) async throws -> ByteBuffer {
    let limit = configuration.maxBodyBytes
    func tooLarge() -> RouteError {
      RouteError(
        status: .contentTooLarge, message: "The request body is larger than the \(limit) bytes that are allowed.",
        code: "body_too_large")
    }
    if let length = request.headers[.contentLength].flatMap({ Int($0) }), length > limit { throw tooLarge() }
    do {
      return try await request.body.collect(upTo: limit)
    } catch is NIOTooManyBytesError {
      throw tooLarge()
    }
  }

  /// Refuses a model name that is not served here.
  ///
  /// A request without a name gets the one model there is, and so does the name `default`, which clients of SGLang send.
  func check(model name: String?) throws(EngineError) {
    guard let name, !name.isEmpty, name != "default", name != service.model.name else { return }
    throw EngineError(
      .modelNotFound,
      "The model \(name.debugDescription) does not exist here; this server has \(service.model.name.debugDescription).",
      parameter: "model")
  }

  /// Refuses token ids outside the vocabulary, which no kernel should ever see.
  func check(tokens: [TokenID], _ name: String) throws(EngineError) {
    let size = service.model.vocabularySize
    if let position = tokens.firstIndex(where: { $0 < 0 || Int($0) >= size }) {
      throw EngineError(
        .invalidRequest,
        "\(name): token \(tokens[position]) at position \(position) is not in the vocabulary of \(size) tokens.",
        parameter: name)
    }
  }

  /// A token's text for reports of log-probabilities, as exact bytes and as text. Bytes that are no whole characters
  /// become U+FFFD in the text.
  func text(of token: TokenID) -> (bytes: [UInt8], text: String) {
    let bytes = service.tokenBytes(token)
    return (bytes, String(decoding: bytes, as: UTF8.self))
  }
}
