import Glibc

/// Where the hub and its cache are, and how patiently it is spoken to.
package struct HubConfiguration: Sendable {
  /// The hub's address without a slash at its end.
  package var endpoint = HubConfiguration.defaultEndpoint
  /// The bearer token, if there is one. It is sent to the endpoint's own host only.
  package var token: String?
  /// The cache directory, in the layout of huggingface_hub.
  package var cacheDirectory: String
  /// Whether the network may not be used.
  package var isOffline = false
  /// The proxy for the endpoint's scheme, as `host:port`, if there is one.
  package var proxy: String?

  /// Seconds until a connection must stand.
  package var connectTimeout = 15.0
  /// Seconds without a byte after which a connection is given up.
  package var idleTimeout = 30.0
  /// Seconds until an answer's head must be complete, and an answer of the API as a whole.
  package var answerTimeout = 60.0
  /// Bytes per second below which a transfer counts as stalled ...
  package var minimumRate = 1024.0
  /// ... if it stays below for so many seconds.
  package var stallWindow = 30.0
  /// Attempts in a row without progress before a transfer is given up.
  package var maxAttempts = 6
  /// Bytes that count as progress, so that the attempts are counted from the start again.
  package var progressBytes = 1 << 20
  /// Seconds of the first wait between attempts; it doubles each time.
  package var backoff = 0.5
  /// The longest wait between attempts in seconds, unless the server asks for more.
  package var maxBackoff = 30.0
  /// The longest wait in seconds that a server may ask for with `Retry-After`.
  package var maxRetryAfter = 600.0
  /// Bytes of the ranges in which large files are fetched.
  package var chunkSize = 32 << 20
  /// Files up to this size keep no record for resuming.
  package var journalThreshold = 1 << 20
  /// Transfers at once.
  package var workers = 8
  /// The most files that a repository may list.
  package var maxFiles = 100_000
  /// The most pages that a listing may have.
  package var maxPages = 1000

  /// The hub that is meant where the environment names none.
  package static let defaultEndpoint = "https://huggingface.co"

  /// A configuration with a cache directory and defaults for everything else.
  package init(cacheDirectory: String) { self.cacheDirectory = cacheDirectory }

  /// Reads the variables that huggingface_hub reads: `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HOME`,
  /// `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_HUB_DISABLE_IMPLICIT_TOKEN`, `XDG_CACHE_HOME` and their older spellings, and
  /// the usual proxy variables. An empty value counts as none.
  /// - Parameter variable: looks a variable up.
  package init(environment variable: (String) -> String?) throws(HubError) {
    func value(_ names: String...) -> String? {
      for name in names { if let value = variable(name), !value.isEmpty { return value } }
      return nil
    }
    func isTrue(_ names: String...) -> Bool {
      for name in names {
        if let value = value(name) { return ["1", "ON", "YES", "TRUE"].contains(value.uppercased()) }
      }
      return false
    }
    func expanded(_ path: String) -> String { expand(path, variable) }
    let userHome = value("HOME") ?? "/"
    let cacheHome = value("XDG_CACHE_HOME") ?? userHome + "/.cache"
    let home = expanded(value("HF_HOME") ?? cacheHome + "/huggingface")
    let cache = expanded(value("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") ?? home + "/hub")
    self.init(cacheDirectory: absolutePath(cache))
    var endpoint = value("HF_ENDPOINT") ?? Self.defaultEndpoint
    while endpoint.hasSuffix("/") { endpoint.removeLast() }
    guard let url = HubURL(endpoint) else {
      throw HubError(
        .invalidName,
        "HF_ENDPOINT '\(printable(endpoint))' is no address of a hub; write it as 'https://huggingface.co'.")
    }
    self.endpoint = endpoint
    isOffline = isTrue("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    if !isTrue("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
      token =
        cleanToken(value("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
        ?? cleanToken(smallTextFile(expanded(value("HF_TOKEN_PATH") ?? home + "/token")))
    }
    let isSecure = url.scheme == "https"
    let proxy = isSecure ? value("HTTPS_PROXY", "https_proxy") : value("http_proxy")
    if let proxy = proxy ?? value("ALL_PROXY", "all_proxy"),
      !isExempt(host: url.host, from: value("NO_PROXY", "no_proxy") ?? "")
    {
      self.proxy = proxy
    }
  }

  /// The configuration of this process's environment.
  package static func current() throws(HubError) -> HubConfiguration {
    try HubConfiguration(environment: { getenv($0).map { String(cString: $0) } })
  }
}

/// A token without white space around it; an empty one is none.
private func cleanToken(_ token: String?) -> String? {
  guard let token else { return nil }
  let kept = token.unicodeScalars.filter { $0 != "\r" && $0 != "\n" }
  var text = Substring(String(String.UnicodeScalarView(kept)))
  while text.first?.isWhitespace == true { text.removeFirst() }
  while text.last?.isWhitespace == true { text.removeLast() }
  // Anything else would end the header or not be one.
  return text.isEmpty || text.utf8.contains(where: { $0 < 0x21 || $0 > 0x7E }) ? nil : String(text)
}

/// A path with `~`, `$NAME` and `${NAME}` replaced, as Python's `expanduser` and `expandvars` do it.
private func expand(_ path: String, _ variable: (String) -> String?) -> String {
  var text = path
  if text == "~" || text.hasPrefix("~/") { text = (variable("HOME") ?? "") + text.dropFirst() }
  var result = ""
  var rest = Substring(text)
  while let dollar = rest.firstIndex(of: "$") {
    result += rest[..<dollar]
    rest = rest[dollar...]
    var name = rest.dropFirst()
    if name.first == "{", let end = name.firstIndex(of: "}") {
      let inner = String(name[name.index(after: name.startIndex)..<end])
      result += variable(inner) ?? String(rest[...end])
      rest = rest[rest.index(after: end)...]
      continue
    }
    name = name.prefix { $0 == "_" || ($0.isASCII && ($0.isLetter || $0.isNumber)) }
    result += name.isEmpty ? "$" : variable(String(name)) ?? "$\(name)"
    rest = rest[name.endIndex...]
  }
  return result + rest
}

/// Whether a `NO_PROXY` list names a host: exactly, as a domain above it, or with `*`.
private func isExempt(host: String, from list: String) -> Bool {
  list.split(separator: ",").contains { entry in
    var entry = entry.drop { $0 == " " }.lowercased()
    while entry.hasSuffix(" ") { entry.removeLast() }
    if entry.hasPrefix(".") { entry.removeFirst() }
    return entry == "*" || entry == host || (!entry.isEmpty && host.hasSuffix("." + entry))
  }
}
