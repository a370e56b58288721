import ApusCore
import AsyncHTTPClient
import Glibc
import NIOCore
import NIOHTTP1
import Synchronization

/// Why one attempt at an exchange failed, in a way that another attempt may mend.
enum TransferFailure: Error {
  /// The server answered with a status; `wait` is what it asked for in seconds.
  case status(Int, wait: Double?)
  /// A place that the hub sent us to refused; the hub may name another.
  case location(Int)
  /// The connection failed, or too little came for too long.
  case connection(String)
  /// The body ended early or would not end.
  case length(String)

  /// What happened, for people.
  var reason: String {
    switch self {
    case .status(let status, _): "the answer was \(status)"
    case .location(let status): "the server that the hub names answered \(status)"
    case .connection(let text), .length(let text): text
    }
  }
}

/// Speaks HTTP with the hub and with the servers that it redirects to.
///
/// The token goes to the endpoint's own origin and nowhere else. Bodies stream; nothing is held in memory but what a
/// caller collects under a limit.
final class HubTransport: Sendable {
  let configuration: HubConfiguration
  let endpoint: HubURL
  private let http: HTTPClient
  /// When the endpoint may be spoken to again, as it said.
  private let pausedUntil = Mutex(0.0)

  /// The answer to a request, after redirects.
  struct Answer: Sendable {
    var status: Int
    var headers: HTTPHeaders
    var body: HTTPClientResponse.Body
    /// Where it came from.
    var url: HubURL
    /// What the hub said of the file on the way: commit, checksum, size.
    var commit: String?
    var etag: String?
    var size: Int?
  }

  init(_ configuration: HubConfiguration) throws(HubError) {
    guard let endpoint = HubURL(configuration.endpoint) else {
      throw HubError(.invalidName, "'\(printable(configuration.endpoint))' is no address of a hub.")
    }
    self.configuration = configuration
    self.endpoint = endpoint
    var options = HTTPClient.Configuration()
    // Ranges are fetched over connections of their own, which share a slow path better than streams of one.
    options.httpVersion = .http1Only
    options.redirectConfiguration = .disallow
    options.timeout.connect = .nanoseconds(Int64(configuration.connectTimeout * 1e9))
    options.timeout.read = .nanoseconds(Int64(configuration.idleTimeout * 1e9))
    options.connectionPool.concurrentHTTP1ConnectionsPerHostSoftLimit = max(8, configuration.workers)
    // The pool would go on trying behind a request's back; attempts are counted here.
    options.connectionPool.retryConnectionEstablishment = false
    if let proxy = configuration.proxy {
      guard let url = HubURL(proxy.contains("://") ? proxy : "http://" + proxy), url.scheme == "http" else {
        throw HubError(.invalidName, "The proxy '\(printable(proxy))' is no address like 'http://proxy:3128'.")
      }
      options.proxy = .server(host: url.host, port: url.port)
    }
    http = HTTPClient(eventLoopGroupProvider: .singleton, configuration: options)
  }

  func shutdown() async { try? await http.shutdown() }

  /// One exchange up to the answer's head, following redirects.
  func exchange(_ method: HTTPMethod, _ url: HubURL, headers: [(String, String)] = []) async throws -> Answer {
    var url = url
    var commit: String?, etag: String?, size: Int?
    for _ in 0...Self.maxRedirects {
      let isHub = url.origin == endpoint.origin
      if isHub { try await waitForPause() }
      var request = HTTPClientRequest(url: url.text)
      request.method = method
      request.headers.add(name: "User-Agent", value: "apus")
      // The sizes and ranges are those of the file itself.
      request.headers.add(name: "Accept-Encoding", value: "identity")
      for (name, value) in headers { request.headers.add(name: name, value: value) }
      if isHub, let token = configuration.token {
        request.headers.add(name: "Authorization", value: "Bearer \(token)")
      }
      let response = try await head(request)
      if isHub {
        commit = response.headers.first(name: "X-Repo-Commit") ?? commit
        let linked = response.headers.first(name: "X-Linked-Etag")
        etag = linked.map(normalizedETag) ?? etag ?? response.headers.first(name: "ETag").map(normalizedETag)
        size = response.headers.first(name: "X-Linked-Size").flatMap { Int($0) } ?? size
      }
      let status = Int(response.status.code)
      guard [301, 302, 303, 307, 308].contains(status) else {
        return Answer(
          status: status, headers: response.headers, body: response.body, url: url, commit: commit, etag: etag,
          size: size)
      }
      guard let location = response.headers.first(name: "Location"), let next = url.resolving(location) else {
        throw HubError(.invalidAnswer, "\(url.host) redirects to nowhere that can be reached by http or https.")
      }
      if url.scheme == "https" && next.scheme == "http" {
        throw HubError(.invalidAnswer, "\(url.host) redirects from https to http at \(next.host), which is refused.")
      }
      // What a HEAD asks about a large file is said with the redirect itself.
      if method == .HEAD && next.origin != endpoint.origin && etag != nil {
        return Answer(
          status: 200, headers: response.headers, body: response.body, url: url, commit: commit, etag: etag, size: size)
      }
      url = next
    }
    throw HubError(.invalidAnswer, "\(url.host) redirects more than \(Self.maxRedirects) times; that has no end.")
  }

  private static let maxRedirects = 10

  /// The answer's head, which must be there in time.
  private func head(_ request: HTTPClientRequest) async throws -> HTTPClientResponse {
    let seconds = configuration.answerTimeout
    return try await withThrowingTaskGroup(of: HTTPClientResponse.self) { group in
      group.addTask { [http] in
        do {
          return try await http.execute(request, deadline: .distantFuture)
        } catch {
          throw Self.failure(error)
        }
      }
      group.addTask {
        try await Task.sleep(for: .seconds(seconds))
        throw TransferFailure.connection("no answer within \(Int(seconds.rounded(.up))) s")
      }
      defer { group.cancelAll() }
      return try await group.next()!
    }
  }

  /// What an error of the HTTP client means: a cancelled task, or a connection that failed.
  static func failure(_ error: any Error) -> any Error {
    if error is CancellationError || error is HubError || error is TransferFailure { return error }
    if Task.isCancelled { return CancellationError() }
    if let error = error as? HTTPClientError {
      if error == .cancelled { return CancellationError() }
      return TransferFailure.connection(error.shortDescription)
    }
    return TransferFailure.connection(printable("\(error)", limit: 200))
  }

  /// Goes through attempts until one succeeds, waiting between them.
  func retrying<Result: Sendable>(_ what: String, _ body: () async throws -> Result) async throws -> Result {
    var failures = 0
    while true {
      do {
        return try await body()
      } catch {
        failures += 1
        try await recover(from: Self.failure(error), failures: failures, what: what)
      }
    }
  }

  /// Waits before the next attempt, or throws what ends the attempts.
  /// - Parameters:
  ///   - failures: attempts that failed in a row, this one included.
  ///   - what: what is being fetched, for messages.
  func recover(from error: any Error, failures: Int, what: String) async throws {
    guard let failure = error as? TransferFailure else { throw error }
    try Task.checkCancellation()
    var wait = min(configuration.maxBackoff, configuration.backoff * Double(1 << min(20, failures - 1)))
    wait *= Double.random(in: 0.5...1.5)
    let asked: Double? = if case .status(_, let seconds) = failure { seconds } else { nil }
    if let asked, asked > configuration.maxRetryAfter {
      throw HubError(
        .unreachable,
        "\(endpoint.host) asks to wait \(Int(asked)) s before \(what) may be fetched. Try again then; what was downloaded is kept."
      )
    }
    guard failures < configuration.maxAttempts else {
      throw HubError(
        .unreachable,
        "\(what) could not be fetched from \(endpoint.host) in \(failures) attempts: \(failure.reason). What was downloaded is kept; run the command again to go on."
      )
    }
    if let asked {
      // Whoever comes next waits as well; a little more for each, so that they do not come at once.
      wait = asked + Double.random(in: 0...min(1, configuration.backoff))
      let until = monotonicSeconds() + asked
      pausedUntil.withLock { $0 = max($0, until) }
    }
    try await Task.sleep(for: .seconds(wait))
  }

  private func waitForPause() async throws {
    let wait = pausedUntil.withLock { $0 } - monotonicSeconds()
    if wait > 0 { try await Task.sleep(for: .seconds(wait)) }
  }

  /// Throws what a status means, unless it is one of success.
  /// - Parameters:
  ///   - subject: what was asked for, as a phrase that begins a sentence.
  ///   - repository: whose page tells about licence and access.
  func check(_ answer: Answer, subject: String, repository: String) throws {
    guard !(200..<300).contains(answer.status) else { return }
    if answer.url.origin != endpoint.origin && (400..<500).contains(answer.status) && answer.status != 429 {
      throw TransferFailure.location(answer.status)
    }
    let code = answer.headers.first(name: "X-Error-Code") ?? ""
    let said = answer.headers.first(name: "X-Error-Message").map { " The hub says: \(printable($0))" } ?? ""
    let page = "\(configuration.endpoint)/\(repository)"
    let hasToken = configuration.token != nil
    switch (answer.status, code) {
    case (401, "GatedRepo"), (403, "GatedRepo"), (403, _):
      throw HubError(
        .unauthorized,
        hasToken
          ? "\(repository) may not be read with this token: accept the licence at \(page) with the account that the token belongs to, or set HF_TOKEN to another.\(said)"
          : "\(repository) may be read only by those who accepted its licence: accept it at \(page) and set HF_TOKEN to a token from \(configuration.endpoint)/settings/tokens.\(said)"
      )
    case (401, _):
      throw HubError(
        .unauthorized,
        hasToken
          ? "\(repository) does not exist or may not be read with this token. Check the name, the token in HF_TOKEN, and whether the licence at \(page) must be accepted.\(said)"
          : "\(repository) does not exist, or is private or gated. Check the name; for a private or gated model accept the licence at \(page) and set HF_TOKEN.\(said)"
      )
    case (404, _), (410, _):
      throw HubError(.notFound, "\(subject) does not exist at \(configuration.endpoint), or is private.\(said)")
    case (408, _), (425, _), (429, _), (500..., _):
      throw TransferFailure.status(answer.status, wait: retryAfter(answer.headers))
    default:
      throw HubError(
        .invalidAnswer, "\(subject) could not be fetched: \(answer.url.host) answered \(answer.status).\(said)")
    }
  }

  /// A JSON document of the API, with the address of the next page if there is one.
  func json(_ url: HubURL, subject: String, repository: String) async throws -> (JSONValue, next: HubURL?) {
    try await retrying(subject) {
      let answer = try await exchange(.GET, url)
      try check(answer, subject: subject, repository: repository)
      let bytes = try await collect(answer.body)
      let value: JSONValue
      do {
        value = try JSONValue.parse(bytes, depthLimit: 64)
      } catch {
        throw HubError(.invalidAnswer, "\(answer.url.host) answered with something that is not JSON (\(error)).")
      }
      return (value, try nextPage(answer))
    }
  }

  /// A body of limited size that must be there in time.
  private func collect(_ body: HTTPClientResponse.Body) async throws -> [UInt8] {
    let seconds = configuration.answerTimeout
    return try await withThrowingTaskGroup(of: [UInt8].self) { group in
      group.addTask {
        do {
          let buffer = try await body.collect(upTo: Self.maxDocumentSize)
          return Array(buffer.readableBytesView)
        } catch is NIOTooManyBytesError {
          throw HubError(.invalidAnswer, "The hub answered with more than \(Self.maxDocumentSize >> 20) MiB of JSON.")
        } catch {
          throw Self.failure(error)
        }
      }
      group.addTask {
        try await Task.sleep(for: .seconds(seconds))
        throw TransferFailure.connection("no whole answer within \(Int(seconds.rounded(.up))) s")
      }
      defer { group.cancelAll() }
      return try await group.next()!
    }
  }

  private static let maxDocumentSize = 32 << 20

  /// The page that `Link: <...>; rel="next"` names.
  private func nextPage(_ answer: Answer) throws -> HubURL? {
    for line in answer.headers["Link"] {
      for entry in line.split(separator: ",") where entry.contains("rel=\"next\"") || entry.contains("rel=next") {
        guard let start = entry.firstIndex(of: "<"), let end = entry.firstIndex(of: ">"), start < end else { continue }
        var target = String(entry[entry.index(after: start)..<end])
        // A proxy passes the hub's own addresses on.
        if target.hasPrefix(HubConfiguration.defaultEndpoint + "/") {
          target = configuration.endpoint + target.dropFirst(HubConfiguration.defaultEndpoint.count)
        }
        guard let url = answer.url.resolving(target), url.origin == endpoint.origin else {
          throw HubError(.invalidAnswer, "The hub's listing goes on at another server, which is refused.")
        }
        return url
      }
    }
    return nil
  }
}

/// An entity tag without quotes and without the mark of a weak one.
func normalizedETag(_ tag: String) -> String {
  var text = Substring(tag)
  if text.hasPrefix("W/") { text = text.dropFirst(2) }
  while text.hasPrefix("\"") { text.removeFirst() }
  while text.hasSuffix("\"") { text.removeLast() }
  return String(text)
}

/// Seconds that a server asks to wait: `Retry-After` in seconds or as a date, or the `t` of `RateLimit`.
func retryAfter(_ headers: HTTPHeaders) -> Double? {
  if let text = headers.first(name: "Retry-After") {
    if let seconds = Double(text), seconds.isFinite { return max(0, seconds) }
    if let time = secondsSince1970(httpDate: text) { return max(0, time - wallSeconds()) }
  }
  for part in (headers.first(name: "RateLimit") ?? "").split(separator: ";") {
    let part = part.drop { $0 == " " }
    if part.hasPrefix("t="), let seconds = Double(part.dropFirst(2)), seconds.isFinite { return max(0, seconds) }
  }
  return nil
}

/// The time of an HTTP date such as `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, 5.6.7) in seconds since 1970.
package func secondsSince1970(httpDate text: String) -> Double? {
  let words = text.split(separator: " ")
  let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
  guard words.count == 6, words[5] == "GMT", let day = Int(words[1]), let year = Int(words[3]),
    let month = months.firstIndex(of: String(words[2])), (1...31).contains(day), (1970...9999).contains(year)
  else { return nil }
  let time = words[4].split(separator: ":").compactMap { Int($0) }
  guard time.count == 3, (0...23).contains(time[0]), (0...59).contains(time[1]), (0...60).contains(time[2]) else {
    return nil
  }
  // Days before a month, with years that begin in March, so that the leap day comes last.
  let shifted = month < 2 ? year - 1 : year
  let days = 365 * shifted + shifted / 4 - shifted / 100 + shifted / 400 + (153 * ((month + 10) % 12) + 2) / 5 + day - 1
  let epoch = 719_468
  return Double(((days - epoch) * 24 + time[0]) * 3600 + time[1] * 60 + time[2])
}
