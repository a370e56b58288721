import ApusCore
import ApusHub
import Dispatch
import Foundation
import Glibc
import Synchronization

/// A hub on this machine that speaks the API and misbehaves as told. Plain sockets, so that it can do what no HTTP
/// library would.
final class TestHub: Sendable {
  /// What a client asked for.
  struct Request: Sendable {
    var method: String
    /// The path with its query, as sent.
    var target: String
    /// Names in lower case.
    var headers: [String: String]
    var path: String { String(target.prefix { $0 != "?" }) }
    /// First and last byte of a `Range`.
    var range: (Int, Int)? {
      guard let text = headers["range"], text.hasPrefix("bytes=") else { return nil }
      let ends = text.dropFirst(6).split(separator: "-").compactMap { Int($0) }
      return ends.count == 2 ? (ends[0], ends[1]) : nil
    }
  }

  /// How a body goes out.
  enum Delivery: Sendable {
    case whole
    /// The connection closes after so many bytes of the body.
    case cut(after: Int)
    /// Nothing more comes after so many bytes, and the connection stays.
    case hang(after: Int)
    /// A byte every so many seconds.
    case trickle(interval: Double)
    /// The body, and then zeros for ever.
    case endless
    /// Not even a head.
    case silence
  }

  /// What a client gets.
  struct Reply: Sendable {
    var status = 200
    var headers: [(String, String)] = []
    var body: [UInt8] = []
    /// The `Content-Length` to announce; `nil` announces none and ends with the connection.
    var length: Int?
    var delivery = Delivery.whole

    init(_ status: Int = 200, _ body: [UInt8] = [], _ headers: [(String, String)] = []) {
      (self.status, self.body, self.headers) = (status, body, headers)
      length = body.count
    }
    init(_ status: Int, json: JSONValue, _ headers: [(String, String)] = []) {
      self.init(status, Array(json.compactText.utf8), headers)
    }
  }

  /// A repository's content.
  struct Repository: Sendable {
    var commit = String(repeating: "c", count: 40)
    var files: [(path: String, content: [UInt8], isLarge: Bool)] = []
    /// Entries of a page of the listing.
    var pageSize = 1000
    var hasTree = true
    var isGated = false

    /// The checksum that names a content.
    static func etag(_ content: [UInt8], isLarge: Bool) -> String {
      Hash.etag(content, isSHA256: isLarge)
    }
  }

  private struct State {
    var repositories: [String: Repository] = [:]
    var blobs: [String: [UInt8]] = [:]
    var log: [Request] = []
    var counts: [String: Int] = [:]
    var change: (@Sendable (Request, Int, inout Reply) -> Void)?
    var connections: Set<Int32> = []
    var isStopped = false
  }

  let port: Int
  private let listener: Int32
  private let state = Mutex(State())
  /// Where contents of large files lie: another origin. `nil` on the content server itself.
  let content: TestHub?

  var address: String { "http://127.0.0.1:\(port)" }

  /// Starts a hub, by default with a content server beside it.
  init(hasContentServer: Bool = true) {
    content = hasContentServer ? TestHub(hasContentServer: false) : nil
    listener = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_addr.s_addr = UInt32(0x7F00_0001).bigEndian
    var length = socklen_t(MemoryLayout<sockaddr_in>.size)
    let listener = listener
    port = withUnsafeMutablePointer(to: &address) { pointer in
      pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        precondition(bind(listener, $0, length) == 0 && listen(listener, 64) == 0)
        getsockname(listener, $0, &length)
      }
      return Int(UInt16(bigEndian: pointer.pointee.sin_port))
    }
    Thread.detachNewThread { [self] in
      while true {
        let connection = accept(listener, nil, nil)
        if connection < 0 { return }
        let isWanted = state.withLock { state in
          if !state.isStopped { state.connections.insert(connection) }
          return !state.isStopped
        }
        guard isWanted else {
          close(connection)
          return
        }
        Thread.detachNewThread { self.serve(connection) }
      }
    }
  }

  /// Ends all connections and stops listening.
  func stop() {
    content?.stop()
    state.withLock { state in
      state.isStopped = true
      for connection in state.connections { shutdown(connection, Int32(SHUT_RDWR)) }
    }
    shutdown(listener, Int32(SHUT_RDWR))
    close(listener)
  }

  /// Puts a repository up.
  func publish(_ name: String, _ repository: Repository) {
    state.withLock { $0.repositories[name] = repository }
    content?.state.withLock { state in
      for file in repository.files where file.isLarge {
        state.blobs[Repository.etag(file.content, isLarge: true)] = file.content
      }
    }
  }

  /// Changes every reply from now on; the number counts requests with the same method and path, from 1.
  func misbehave(_ change: (@Sendable (Request, Int, inout Reply) -> Void)?) {
    state.withLock { state in
      state.change = change
      state.counts = [:]
    }
  }

  /// The requests so far.
  var log: [Request] { state.withLock(\.log) }
  /// Forgets the requests so far.
  func clearLog() {
    state.withLock { $0.log = [] }
    content?.clearLog()
  }

  // MARK: The API

  private func reply(to request: Request) -> Reply {
    let parts = request.path.split(separator: "/").map(String.init)
    if parts.first == "blob", parts.count == 2, let bytes = state.withLock({ $0.blobs[parts[1]] }) {
      return Self.ranged(request, bytes, [("ETag", "\"not-the-checksum\"")])
    }
    if parts.count >= 6, parts[0] == "api", parts[1] == "models" {
      let name = parts[2] + "/" + parts[3]
      guard let repository = state.withLock({ $0.repositories[name] }) else { return Self.notFound("RepoNotFound") }
      let revision = parts[5].removingPercentEncoding ?? ""
      guard [repository.commit, "main", "refs/pr/1"].contains(revision) else {
        return Self.notFound("RevisionNotFound")
      }
      if parts[4] == "revision" {
        return Reply(
          200,
          json: [
            "id": .string(name), "sha": .string(repository.commit),
            "siblings": .array(repository.files.map { ["rfilename": .string($0.path)] }),
          ])
      }
      guard parts[4] == "tree", repository.hasTree else { return Self.notFound("EntryNotFound") }
      let cursor = request.target.split(separator: "cursor=").dropFirst().first.flatMap { Int($0) } ?? 0
      let page = repository.files.dropFirst(cursor).prefix(repository.pageSize)
      var headers: [(String, String)] = []
      if cursor + page.count < repository.files.count {
        headers.append(
          ("Link", "<\(address)\(request.path)?recursive=true&cursor=\(cursor + page.count)>; rel=\"next\""))
      }
      let entries: [JSONValue] = page.map { file in
        let etag = Repository.etag(file.content, isLarge: file.isLarge)
        var entry = JSONObject([
          ("type", "file"), ("path", .string(file.path)), ("size", .int(Int64(file.content.count))),
        ])
        entry["oid"] = .string(file.isLarge ? String(repeating: "0", count: 40) : etag)
        if file.isLarge {
          entry["lfs"] = ["oid": .string(etag), "size": .int(Int64(file.content.count)), "pointerSize": 134]
        }
        return .object(entry)
      }
      return Reply(
        200, json: .array([["type": "directory", "path": "folder", "oid": "x", "size": 0]] + entries), headers)
    }
    if parts.count >= 5, parts[2] == "resolve" {
      let name = parts[0] + "/" + parts[1]
      let path = parts[4...].joined(separator: "/").removingPercentEncoding ?? ""
      guard let repository = state.withLock({ $0.repositories[name] }) else { return Self.notFound("RepoNotFound") }
      if repository.isGated && request.headers["authorization"] != "Bearer good-token" {
        let hasToken = request.headers["authorization"] != nil
        return Reply(
          hasToken ? 403 : 401, [], [("X-Error-Code", "GatedRepo"), ("X-Error-Message", "Access is restricted.")])
      }
      guard let file = repository.files.first(where: { $0.path == path }) else { return Self.notFound("EntryNotFound") }
      let etag = Repository.etag(file.content, isLarge: file.isLarge)
      let commit = ("X-Repo-Commit", repository.commit)
      if file.isLarge {
        return Reply(
          302, Array("Found".utf8),
          [
            commit, ("X-Linked-Etag", "\"\(etag)\""), ("X-Linked-Size", "\(file.content.count)"),
            ("Location", "\(content!.address)/blob/\(etag)?signature=abc"),
          ])
      }
      return Self.ranged(request, file.content, [commit, ("ETag", "\"\(etag)\"")])
    }
    return Reply(404)
  }

  private static func notFound(_ code: String) -> Reply { Reply(404, [], [("X-Error-Code", code)]) }

  private static func ranged(_ request: Request, _ bytes: [UInt8], _ headers: [(String, String)]) -> Reply {
    guard let (first, last) = request.range else { return Reply(200, bytes, headers) }
    guard first < bytes.count, first <= last else { return Reply(416) }
    let end = min(last, bytes.count - 1)
    return Reply(
      206, Array(bytes[first...end]), headers + [("Content-Range", "bytes \(first)-\(end)/\(bytes.count)")])
  }

  // MARK: Sockets

  private func serve(_ connection: Int32) {
    defer {
      _ = state.withLock { $0.connections.remove(connection) }
      close(connection)
    }
    var pending: [UInt8] = []
    while let request = Self.read(connection, &pending) {
      let (change, number) = state.withLock { state in
        state.log.append(request)
        state.counts[request.method + request.path, default: 0] += 1
        return (state.change, state.counts[request.method + request.path]!)
      }
      var reply = reply(to: request)
      change?(request, number, &reply)
      guard send(reply, to: connection, hasBody: request.method != "HEAD") else { return }
    }
  }

  private static func read(_ connection: Int32, _ pending: inout [UInt8]) -> Request? {
    let end = Array("\r\n\r\n".utf8)
    while true {
      if let range = pending.firstRange(of: end) {
        let lines = String(decoding: pending[..<range.lowerBound], as: UTF8.self).components(separatedBy: "\r\n")
        pending.removeSubrange(..<range.upperBound)
        let words = lines[0].split(separator: " ")
        guard words.count == 3 else { return nil }
        var headers: [String: String] = [:]
        for line in lines.dropFirst() {
          guard let colon = line.firstIndex(of: ":") else { continue }
          headers[line[..<colon].lowercased()] = line[line.index(after: colon)...].trimmingCharacters(in: .whitespaces)
        }
        return Request(method: String(words[0]), target: String(words[1]), headers: headers)
      }
      var chunk = [UInt8](repeating: 0, count: 4096)
      let count = recv(connection, &chunk, chunk.count, 0)
      if count <= 0 { return nil }
      pending += chunk[..<count]
    }
  }

  /// - Returns: whether the connection may be used again.
  private func send(_ reply: Reply, to connection: Int32, hasBody: Bool) -> Bool {
    func write(_ bytes: some Collection<UInt8>) -> Bool {
      let bytes = Array(bytes)
      var offset = 0
      while offset < bytes.count {
        let count = bytes.withUnsafeBytes {
          Glibc.send(connection, $0.baseAddress! + offset, $0.count - offset, Int32(MSG_NOSIGNAL))
        }
        if count <= 0 { return false }
        offset += count
      }
      return true
    }
    /// Waits until the client goes away or the hub stops.
    func waitForEnd() {
      var byte: UInt8 = 0
      while recv(connection, &byte, 1, 0) > 0 {}
    }
    if case .silence = reply.delivery {
      waitForEnd()
      return false
    }
    var head = "HTTP/1.1 \(reply.status) Reason\r\n"
    for (name, value) in reply.headers { head += "\(name): \(value)\r\n" }
    if let length = reply.length { head += "Content-Length: \(length)\r\n" } else { head += "Connection: close\r\n" }
    guard write((head + "\r\n").utf8) else { return false }
    guard hasBody else { return true }
    switch reply.delivery {
    case .whole: return write(reply.body) && reply.length == reply.body.count
    case .cut(let count):
      _ = write(reply.body.prefix(count))
      return false
    case .hang(let count):
      if write(reply.body.prefix(count)) { waitForEnd() }
      return false
    case .trickle(let interval):
      for byte in reply.body {
        guard write([byte]) else { return false }
        usleep(UInt32(interval * 1e6))
      }
      return true
    case .endless:
      var isOpen = write(reply.body)
      let zeros = [UInt8](repeating: 0x20, count: 1 << 16)
      while isOpen { isOpen = write(zeros) }
      return false
    case .silence: return false
    }
  }
}
