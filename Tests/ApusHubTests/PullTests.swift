import ApusCore
import ApusHub
import Foundation
import Glibc
import Synchronization
import Testing

/// A hub, an empty cache and a hurried configuration.
final class Stage {
  let server = TestHub()
  let folder: String
  var configuration: HubConfiguration

  init() {
    folder = NSTemporaryDirectory() + "apus-hub-\(UUID().uuidString)"
    configuration = HubConfiguration(cacheDirectory: folder + "/hub")
    configuration.endpoint = server.address
    configuration.backoff = 0.01
    configuration.maxBackoff = 0.05
    configuration.idleTimeout = 0.5
    configuration.answerTimeout = 2
    configuration.stallWindow = 0.3
    configuration.maxAttempts = 4
    configuration.maxPages = 20
    configuration.chunkSize = 64 << 10
    configuration.journalThreshold = 1 << 10
    configuration.progressBytes = 1 << 10
  }

  deinit {
    server.stop()
    try? FileManager.default.removeItem(atPath: folder)
  }

  /// Pulls a repository with a hub object of its own, as a process would.
  func pull(
    _ name: String = "owner/name", selection: FileSelection? = nil, localDirectory: String? = nil,
    verifies: Bool = false, onEvent: @escaping @Sendable (PullEvent) -> Void = { _ in }
  ) async throws -> PullResult {
    try await Self.pull(
      configuration, name, selection: selection, localDirectory: localDirectory, verifies: verifies, onEvent: onEvent)
  }

  static func pull(
    _ configuration: HubConfiguration, _ name: String = "owner/name", selection: FileSelection? = nil,
    localDirectory: String? = nil, verifies: Bool = false, onEvent: @escaping @Sendable (PullEvent) -> Void = { _ in }
  ) async throws -> PullResult {
    let hub = try Hub(configuration)
    do {
      var request = PullRequest(
        try RepositoryReference(name), selection: selection, localDirectory: localDirectory)
      request.verifies = verifies
      let plan = try await hub.plan(request)
      let result = try await hub.fetch(plan, onEvent: onEvent)
      await hub.shutdown()
      return result
    } catch {
      await hub.shutdown()
      throw error
    }
  }

  /// Pulls and expects a hub's error.
  func refusal(
    _ name: String = "owner/name", selection: FileSelection? = nil, localDirectory: String? = nil
  ) async -> HubError? {
    do {
      _ = try await pull(name, selection: selection, localDirectory: localDirectory)
      return nil
    } catch {
      return error as? HubError
    }
  }

  func bytes(_ path: String) -> [UInt8]? { FileManager.default.contents(atPath: path).map(Array.init) }
  func names(_ path: String) -> [String] {
    ((try? FileManager.default.contentsOfDirectory(atPath: path)) ?? []).sorted()
  }
  func linkTarget(_ path: String) -> String? { try? FileManager.default.destinationOfSymbolicLink(atPath: path) }
  var repositoryFolder: String { configuration.cacheDirectory + "/models--owner--name" }
}

/// Bytes that look random and are the same each time.
func content(_ count: Int, seed: UInt64 = 1) -> [UInt8] {
  var state = seed &* 0x9E37_79B9_7F4A_7C15
  return (0..<count).map { _ in
    state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
    return UInt8(truncatingIfNeeded: state >> 33)
  }
}

/// A small model: descriptions, a tokenizer and weights of several chunks.
func smallModel(weights: [UInt8] = content(300_001), commit: Character = "c") -> TestHub.Repository {
  var repository = TestHub.Repository()
  repository.commit = String(repeating: commit, count: 40)
  repository.files = [
    (".gitattributes", Array("*.safetensors filter=lfs".utf8), false), ("README.md", Array("# Hello".utf8), false),
    ("config.json", Array("{\"model_type\": \"test\"}".utf8), false),
    ("model.safetensors", weights, true), ("original/consolidated.00.pth", content(50_000, seed: 9), true),
    ("pytorch_model.bin", content(50_000, seed: 8), true), ("tokenizer.json", content(5_000, seed: 7), true),
    ("empty.json", [], false),
  ]
  return repository
}

@Suite(.serialized) struct PullTests {
  @Test func pullsIntoTheLayoutOfHuggingFaceHub() async throws {
    let stage = Stage()
    stage.configuration.token = "good-token"
    // Requests are counted below, and on a busy machine a server of tests may be as slow as a stalled one, of which the
    // same is asked again. Here nothing stalls.
    stage.configuration.idleTimeout = 60
    stage.configuration.answerTimeout = 60
    stage.configuration.stallWindow = 60
    let model = smallModel()
    stage.server.publish("owner/name", model)
    let lastDone = Mutex((0, 0))
    let result = try await stage.pull { event in
      if case .progress(let done, let total) = event { lastDone.withLock { $0 = (done, total) } }
    }
    let root = stage.repositoryFolder
    let snapshot = root + "/snapshots/" + model.commit
    #expect(result.path == snapshot)
    #expect(HubCache.repository(ofSnapshot: snapshot) == "owner/name")
    #expect(HubCache.repository(ofSnapshot: root) == nil)
    #expect(result.commit == model.commit)
    #expect(stage.names(snapshot) == ["config.json", "empty.json", "model.safetensors", "tokenizer.json"])
    for file in model.files where stage.names(snapshot).contains(file.path) {
      let etag = TestHub.Repository.etag(file.content, isLarge: file.isLarge)
      #expect(stage.linkTarget(snapshot + "/" + file.path) == "../../blobs/" + etag)
      #expect(stage.bytes(snapshot + "/" + file.path) == file.content)
    }
    #expect(stage.names(root + "/blobs").count == 4, "nothing but contents stays: \(stage.names(root + "/blobs"))")
    #expect(stage.bytes(root + "/refs/main") == Array(model.commit.utf8))
    #expect(stage.names(root + "/.no_exist/" + model.commit).contains("generation_config.json"))
    #expect(!stage.names(root + "/.no_exist/" + model.commit).contains("config.json"))
    #expect(stage.names(stage.configuration.cacheDirectory + "/.locks/models--owner--name").count == 4)
    #expect(stage.names(stage.configuration.cacheDirectory).contains("CACHEDIR.TAG"))
    let total = model.files.filter { stage.names(snapshot).contains($0.path) }.reduce(0) { $0 + $1.content.count }
    #expect(result.downloadedBytes == total)
    #expect(lastDone.withLock { $0.0 == total && $0.1 == total })

    // The token goes to the hub and not to the server that it names.
    #expect(stage.server.log.allSatisfy { $0.headers["authorization"] == "Bearer good-token" })
    let contentLog = stage.server.content!.log
    #expect(!contentLog.isEmpty && contentLog.allSatisfy { $0.headers["authorization"] == nil })
    // The hub is asked where a file is once, not for each range.
    #expect(contentLog.filter { $0.range != nil }.count >= 5)
    #expect(stage.server.log.filter { $0.path.hasSuffix("/model.safetensors") }.count <= stage.configuration.workers)

    // A second time nothing is fetched.
    stage.server.clearLog()
    let second = try await stage.pull()
    #expect(second.downloadedBytes == 0)
    #expect(stage.server.log.allSatisfy { $0.path.hasPrefix("/api/") })
  }

  @Test func aNewCommitFetchesOnlyWhatChanged() async throws {
    let stage = Stage()
    stage.server.publish("owner/name", smallModel())
    _ = try await stage.pull()
    var changed = smallModel(commit: "d")
    changed.files[2].content = Array("{\"model_type\": \"other\"}".utf8)
    stage.server.publish("owner/name", changed)
    let result = try await stage.pull()
    #expect(result.downloadedBytes == changed.files[2].content.count)
    #expect(stage.bytes(stage.repositoryFolder + "/refs/main") == Array(changed.commit.utf8))
    #expect(stage.bytes(result.path + "/config.json") == changed.files[2].content)
    #expect(stage.bytes(result.path + "/model.safetensors") == changed.files[3].content)
    // The old commit stays usable.
    #expect(stage.names(stage.repositoryFolder + "/snapshots").count == 2)
  }

  @Test func listingsInPagesAndEqualContents() async throws {
    let stage = Stage()
    var model = smallModel()
    model.pageSize = 2
    model.files.append(("special_tokens_map.json", Array("{}".utf8), false))
    model.files.append(("added_tokens.json", Array("{}".utf8), false))
    stage.server.publish("owner/name", model)
    let result = try await stage.pull()
    #expect(stage.bytes(result.path + "/added_tokens.json") == Array("{}".utf8))
    #expect(
      stage.linkTarget(result.path + "/added_tokens.json") == stage.linkTarget(result.path + "/special_tokens_map.json")
    )
    #expect(stage.server.log.filter { $0.path.contains("/tree/") }.count == 5)
  }

  @Test func aMirrorWithoutListingsIsAskedForEachFile() async throws {
    let stage = Stage()
    var model = smallModel()
    model.hasTree = false
    stage.server.publish("owner/name", model)
    let result = try await stage.pull()
    #expect(stage.bytes(result.path + "/model.safetensors") == model.files[3].content)
    #expect(stage.bytes(result.path + "/config.json") == model.files[2].content)
  }

  @Test func patternsFoldersAndRevisionsWithSlashes() async throws {
    let stage = Stage()
    stage.server.publish("owner/name", smallModel())
    var selection = FileSelection()
    selection.include = ["original/"]
    let result = try await stage.pull("owner/name@refs/pr/1", selection: selection)
    let path = result.path + "/original/consolidated.00.pth"
    #expect(stage.linkTarget(path)?.hasPrefix("../../../blobs/") == true)
    #expect(stage.bytes(path) == smallModel().files[4].content)
    #expect(stage.bytes(stage.repositoryFolder + "/refs/refs/pr/1") == Array(smallModel().commit.utf8))
  }

  // MARK: Misbehaviour

  @Test func droppedConnectionsGoOnWhereTheyBroke() async throws {
    let stage = Stage()
    let model = smallModel()
    stage.server.publish("owner/name", model)
    stage.server.content!.misbehave { request, number, reply in
      if number % 2 == 1 { reply.delivery = .cut(after: reply.body.count / 2) }
    }
    let result = try await stage.pull()
    #expect(stage.bytes(result.path + "/model.safetensors") == model.files[3].content)
    // What had arrived was not asked for again.
    let starts = stage.server.content!.log.compactMap { $0.range?.0 }
    #expect(starts.contains { $0 % (64 << 10) != 0 })
    #expect(result.downloadedBytes == (try await total(of: stage)))
  }

  private func total(of stage: Stage) async throws -> Int {
    let hub = try Hub(stage.configuration)
    let plan = try await hub.plan(PullRequest(try RepositoryReference("owner/name")))
    await hub.shutdown()
    return plan.totalBytes
  }

  @Test func aBodyThatIsTooShortIsNotTaken() async throws {
    let stage = Stage()
    stage.server.publish("owner/name", smallModel())
    stage.server.misbehave { request, _, reply in
      if request.path.hasSuffix("/config.json") {
        reply.body.removeLast()
        reply.length = reply.body.count
      }
    }
    let error = await stage.refusal()
    #expect(error?.kind == .unreachable)
    #expect(error?.message.contains("config.json") == true)
    #expect(stage.bytes(stage.repositoryFolder + "/refs/main") == nil)
    stage.server.misbehave(nil)
    _ = try await stage.pull()
  }

  @Test func aBodyWithoutEndFillsNeitherMemoryNorDisk() async throws {
    let stage = Stage()
    let model = smallModel()
    stage.server.publish("owner/name", model)
    stage.server.content!.misbehave { _, number, reply in
      if number < 3 {
        reply.length = nil
        reply.delivery = .endless
      }
    }
    let result = try await stage.pull()
    #expect(stage.bytes(result.path + "/model.safetensors") == model.files[3].content)

    // The same for the API.
    let other = Stage()
    other.server.publish("owner/name", model)
    other.server.misbehave { _, _, reply in
      reply.length = nil
      reply.delivery = .endless
    }
    let error = await other.refusal()
    #expect(error?.kind == .invalidAnswer, "\(String(describing: error))")
  }

  @Test func wrongContentIsFetchedAgainOnceAndThenRefused() async throws {
    let stage = Stage()
    let model = smallModel()
    stage.server.publish("owner/name", model)
    let flipped: @Sendable (TestHub.Request, Int, inout TestHub.Reply) -> Void = { request, _, reply in
      if !reply.body.isEmpty && (request.range?.0 ?? 0) == 0 { reply.body[0] ^= 1 }
    }
    stage.server.content!.misbehave { request, number, reply in
      if number <= (request.range == nil ? 1 : 5) { flipped(request, number, &reply) }
    }
    let remarks = Mutex(0)
    let result = try await stage.pull { event in
      if case .remark = event { remarks.withLock { $0 += 1 } }
    }
    #expect(remarks.withLock { $0 } >= 1)
    #expect(stage.bytes(result.path + "/model.safetensors") == model.files[3].content)

    let other = Stage()
    other.server.publish("owner/name", model)
    other.server.content!.misbehave(flipped)
    let error = await other.refusal()
    #expect(error?.kind == .checksumMismatch)
    let tokenizer = TestHub.Repository.etag(model.files[6].content, isLarge: true)
    #expect(!other.names(other.repositoryFolder + "/blobs").contains { $0.hasPrefix(tokenizer) })

    // git's checksum of small files is checked as well.
    let third = Stage()
    third.server.publish("owner/name", model)
    third.server.misbehave { request, _, reply in
      if request.path.hasSuffix("/config.json") { reply.body[0] ^= 1 }
    }
    #expect(await third.refusal()?.kind == .checksumMismatch)
  }

  @Test func redirectsWithoutEndOrToOtherSchemesAreRefused() async throws {
    let stage = Stage()
    stage.server.publish("owner/name", smallModel())
    stage.server.misbehave { request, _, reply in
      if request.path.contains("/resolve/") { reply = TestHub.Reply(302, [], [("Location", request.target)]) }
    }
    let endless = await stage.refusal()
    #expect(endless?.kind == .invalidAnswer)
    #expect(endless?.message.contains("redirects more than") == true)
    for location in ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://user@127.0.0.1/x", "http://", "gopher:x"] {
      stage.server.misbehave { request, _, reply in
        if request.path.contains("/resolve/") { reply = TestHub.Reply(302, [], [("Location", location)]) }
      }
      let error = await stage.refusal()
      #expect(error != nil, "\(location)")
    }
  }

  @Test func aRenamedRepositoryKeepsItsToken() async throws {
    let stage = Stage()
    stage.configuration.token = "good-token"
    stage.server.publish("owner/new", smallModel())
    let name = "/owner/name"
    stage.server.misbehave { request, _, reply in
      if let range = request.target.range(of: name) {
        var target = request.target
        target.replaceSubrange(range, with: "/owner/new")
        reply = TestHub.Reply(307, [], [("Location", target)])
      }
    }
    let result = try await stage.pull()
    #expect(stage.bytes(result.path + "/config.json") != nil)
    #expect(stage.server.log.allSatisfy { $0.headers["authorization"] == "Bearer good-token" })
  }

  @Test func accessErrorsSayWhatToDo() async throws {
    let stage = Stage()
    var model = smallModel()
    model.isGated = true
    stage.server.publish("owner/name", model)
    let anonymous = await stage.refusal()
    #expect(anonymous?.kind == .unauthorized)
    #expect(anonymous?.message.contains("HF_TOKEN") == true)
    #expect(anonymous?.message.contains("\(stage.server.address)/owner/name") == true)
    stage.configuration.token = "bad-token"
    let refused = await stage.refusal()
    #expect(refused?.kind == .unauthorized)
    #expect(refused?.message.contains("accept the licence") == true)
    stage.configuration.token = "good-token"
    _ = try await stage.pull()

    let absent = await stage.refusal("owner/other")
    #expect(absent?.kind == .notFound)
    #expect(absent?.message.contains("owner/other") == true)
    let revision = await stage.refusal("owner/name@v9")
    #expect(revision?.kind == .notFound)
    #expect(revision?.message.contains("'v9'") == true)
    stage.server.misbehave { _, _, reply in
      reply = TestHub.Reply(401, [], [("X-Error-Message", "Bad \u{9B}31mcredentials")])
    }
    let credentials = await stage.refusal()
    #expect(credentials?.kind == .unauthorized)
    #expect(credentials?.message.contains("\u{9B}") == false)
    #expect(credentials?.message.contains("credentials") == true)
  }

  @Test func tooManyRequestsAreWaitedFor() async throws {
    let stage = Stage()
    stage.server.publish("owner/name", smallModel())
    stage.server.misbehave { request, number, reply in
      if request.path.contains("/revision/") && number == 1 { reply = TestHub.Reply(429, [], [("Retry-After", "1")]) }
    }
    let start = ContinuousClock.now
    _ = try await stage.pull()
    #expect(ContinuousClock.now - start >= .seconds(1))

    let other = Stage()
    other.server.publish("owner/name", smallModel())
    other.server.misbehave { _, _, reply in reply = TestHub.Reply(429, [], [("Retry-After", "86400")]) }
    let error = await other.refusal()
    #expect(error?.kind == .unreachable)
    #expect(error?.message.contains("86400") == true)
    #expect(other.server.log.count == 1)
  }

  @Test func serverErrorsAreTriedAgainAFewTimes() async throws {
    let stage = Stage()
    stage.server.publish("owner/name", smallModel())
    stage.server.misbehave { _, number, reply in if number <= 2 { reply = TestHub.Reply(500 + number) } }
    stage.server.content!.misbehave { _, number, reply in if number == 1 { reply = TestHub.Reply(403) } }
    _ = try await stage.pull()

    let other = Stage()
    other.server.publish("owner/name", smallModel())
    other.server.misbehave { _, _, reply in reply = TestHub.Reply(503) }
    let error = await other.refusal()
    #expect(error?.kind == .unreachable)
    #expect(other.server.log.count == other.configuration.maxAttempts)
  }

  @Test func aServerThatKnowsNoRangesSendsTheFileOnce() async throws {
    let stage = Stage()
    let model = smallModel()
    stage.server.publish("owner/name", model)
    stage.server.content!.misbehave { request, number, reply in
      guard request.range != nil else {
        if number == 3 { reply.delivery = .cut(after: 100_000) }
        return
      }
      reply = TestHub.Reply(
        200, model.files.first { request.path.hasSuffix(TestHub.Repository.etag($0.content, isLarge: true)) }!.content)
    }
    let result = try await stage.pull()
    #expect(stage.bytes(result.path + "/model.safetensors") == model.files[3].content)
  }

  @Test func aServerThatHangsOrTricklesIsLeft() async throws {
    let stage = Stage()
    let model = smallModel()
    stage.server.publish("owner/name", model)
    stage.server.misbehave { request, number, reply in if number == 1 { reply.delivery = .silence } }
    stage.server.content!.misbehave { _, number, reply in
      if number == 1 { reply.delivery = .hang(after: 10_000) }
      if number == 2 { reply.delivery = .trickle(interval: 0.02) }
    }
    let start = ContinuousClock.now
    let result = try await stage.pull()
    #expect(stage.bytes(result.path + "/model.safetensors") == model.files[3].content)
    #expect(ContinuousClock.now - start < .seconds(20))

    // One that always trickles is given up in bounded time, though a byte arrives with each attempt.
    let other = Stage()
    other.server.publish("owner/name", model)
    other.server.content!.misbehave { _, _, reply in reply.delivery = .trickle(interval: 0.02) }
    #expect(await other.refusal()?.kind == .unreachable)
    #expect(ContinuousClock.now - start < .seconds(40))
  }

  @Test func anotherFileUnderTheSameNameIsNoticed() async throws {
    // Between two runs: what was begun belongs to another checksum and is left alone.
    let stage = Stage()
    stage.configuration.maxAttempts = 1
    stage.server.publish("owner/name", smallModel())
    stage.server.content!.misbehave { _, _, reply in reply.delivery = .cut(after: 20_000) }
    #expect(await stage.refusal()?.kind == .unreachable)
    stage.server.content!.misbehave(nil)
    let changed = smallModel(weights: content(280_000, seed: 4), commit: "d")
    stage.server.publish("owner/name", changed)
    let result = try await stage.pull()
    #expect(stage.bytes(result.path + "/model.safetensors") == changed.files[3].content)

    // Between listing and fetching: the hub itself says that it is another file.
    let other = Stage()
    other.server.publish("owner/name", smallModel())
    other.server.misbehave { request, _, reply in
      guard request.path.contains("/resolve/") else { return }
      reply.headers = reply.headers.map { name, value in
        ["ETag", "X-Linked-Etag"].contains(name)
          ? (name, "\"\(String(repeating: "1", count: value.count - 2))\"") : (name, value)
      }
    }
    let error = await other.refusal()
    #expect(error?.kind == .invalidAnswer)
    #expect(error?.message.contains("changed at the hub") == true)
  }

  // MARK: Hostile listings

  @Test(arguments: [
    "../evil.json", "/etc/evil.json", "a/../../evil.json", "a//b.json", "./x.json", "a/./b.json", "..", "",
    "a\\..\\b.json", "C:evil.json", ".git/hooks/post-checkout", "a/.GIT/config", "x\u{1B}[2J.json", "new\nline.json",
    String(repeating: "n", count: 300) + ".json", "nul\0.json",
  ]) func namesThatLeadElsewhereAreRefused(name: String) async throws {
    let stage = Stage()
    var model = smallModel()
    model.files.append((name, Array("evil".utf8), false))
    stage.server.publish("owner/name", model)
    for hasTree in [true, false] {
      model.hasTree = hasTree
      stage.server.publish("owner/name", model)
      var selection = FileSelection()
      selection.takesAll = true
      let error = await stage.refusal(selection: selection)
      #expect(error?.kind == .invalidAnswer, "\(name): \(String(describing: error))")
      #expect(error?.message.contains("\u{1B}") != true)
    }
    #expect(stage.names(stage.folder).isEmpty, "nothing is written")
  }

  @Test func listingsThatCannotBeTrueAreRefused() async throws {
    let stage = Stage()
    stage.server.publish("owner/name", smallModel())
    func expectRefusal(_ entries: String, _ kind: HubError.Kind = .invalidAnswer) async {
      stage.server.misbehave { request, _, reply in
        if request.path.contains("/tree/") { reply = TestHub.Reply(200, Array(entries.utf8)) }
      }
      let error = await stage.refusal()
      #expect(error?.kind == kind, "\(entries.prefix(100)): \(String(describing: error))")
    }
    let oid = String(repeating: "a", count: 40)
    @Sendable func entry(_ path: String, size: String = "5", oid: String) -> String {
      "{\"type\":\"file\",\"path\":\"\(path)\",\"size\":\(size),\"oid\":\"\(oid)\"}"
    }
    await expectRefusal("[\(entry("config.json", size: "-1", oid: oid))]")
    await expectRefusal("[\(entry("config.json", size: "1e300", oid: oid))]")
    await expectRefusal("[\(entry("config.json", size: "9223372036854775807", oid: oid))]")
    await expectRefusal("[\(entry("config.json", oid: "../../../../tmp/evil"))]")
    await expectRefusal("[\(entry("config.json", oid: oid)),\(entry("config.json", oid: oid))]")
    await expectRefusal("[\(entry("a", oid: oid)),\(entry("a/b", oid: oid))]")
    await expectRefusal("{}")
    await expectRefusal("[{}]")
    await expectRefusal("not JSON")
    await expectRefusal(String(repeating: "[", count: 1_000_000))
    // Room for it is checked before anything is fetched.
    await expectRefusal(
      "[\(entry("config.json", oid: oid)),\(entry("model.safetensors", size: "\(1 << 45)", oid: oid))]", .noSpace)
    #expect(stage.names(stage.folder).isEmpty)

    // A listing without end.
    stage.server.misbehave { request, number, reply in
      if request.path.contains("/tree/") {
        reply = TestHub.Reply(
          200, Array("[\(entry("file-\(number).json", oid: oid))]".utf8),
          [("Link", "<\(request.path)?page=\(number)>; rel=\"next\"")])
      }
    }
    #expect(await stage.refusal()?.kind == .invalidAnswer)
    // One that goes on elsewhere.
    stage.server.misbehave { request, _, reply in
      if request.path.contains("/tree/") { reply.headers.append(("Link", "<http://127.0.0.1:1/x>; rel=\"next\"")) }
    }
    #expect(await stage.refusal()?.kind == .invalidAnswer)
    // A commit that is a path.
    stage.server.misbehave { request, _, reply in
      if request.path.contains("/revision/") { reply = TestHub.Reply(200, json: ["sha": "../../../evil"]) }
    }
    #expect(await stage.refusal()?.kind == .invalidAnswer)
  }

  @Test func linksInTheWayAreNotFollowed() async throws {
    let stage = Stage()
    let elsewhere = stage.folder + "/elsewhere"
    try FileManager.default.createDirectory(atPath: elsewhere, withIntermediateDirectories: true)
    var selection = FileSelection()
    selection.include = ["original/*"]
    stage.server.publish("owner/name", smallModel())
    let snapshot = stage.repositoryFolder + "/snapshots/" + smallModel().commit
    try FileManager.default.createDirectory(atPath: snapshot, withIntermediateDirectories: true)
    try FileManager.default.createSymbolicLink(atPath: snapshot + "/original", withDestinationPath: elsewhere)
    #expect(await stage.refusal(selection: selection)?.kind == .fileSystem)
    let local = stage.folder + "/local"
    try FileManager.default.createDirectory(atPath: local, withIntermediateDirectories: true)
    try FileManager.default.createSymbolicLink(atPath: local + "/original", withDestinationPath: elsewhere)
    #expect(await stage.refusal(selection: selection, localDirectory: local)?.kind == .fileSystem)
    #expect(stage.names(elsewhere).isEmpty)
  }

  // MARK: Resuming and sharing

  @Test func aStoppedPullGoesOnWhereItStopped() async throws {
    let stage = Stage()
    let model = smallModel(weights: content(1_000_000, seed: 3))
    stage.server.publish("owner/name", model)
    stage.server.content!.misbehave { _, _, reply in reply.delivery = .hang(after: 20_000) }
    let configuration = stage.configuration
    let arrived = Mutex(0)
    let task = Task {
      try await Stage.pull(configuration) { event in
        if case .progress(let done, _) = event { arrived.withLock { $0 = done } }
      }
    }
    while arrived.withLock({ $0 }) < 100_000 { try await Task.sleep(for: .milliseconds(5)) }
    task.cancel()
    await #expect(throws: CancellationError.self) { try await task.value }
    #expect(stage.bytes(stage.repositoryFolder + "/refs/main") == nil, "an unfinished commit is not the revision's")
    #expect(
      HubCache(directory: stage.configuration.cacheDirectory).lookUp(try RepositoryReference("owner/name"), for: .model)
        == .missing)
    stage.server.content!.misbehave(nil)
    let result = try await stage.pull()
    #expect(stage.bytes(result.path + "/model.safetensors") == model.files[3].content)
    #expect(result.downloadedBytes <= 1_000_000 - 100_000 + 6_000)
    #expect(stage.names(stage.repositoryFolder + "/blobs").count == 4)
  }

  @Test(arguments: [true, false]) func stoppingDoesNotWaitForTheServer(hangs: Bool) async throws {
    let stage = Stage()
    stage.configuration.idleTimeout = 60
    stage.configuration.stallWindow = 60
    stage.server.publish("owner/name", smallModel())
    stage.server.content!.misbehave { _, _, reply in
      reply.delivery = hangs ? .hang(after: 1000) : .trickle(interval: 0.001)
    }
    let configuration = stage.configuration
    let arrived = Mutex(0)
    let task = Task {
      try await Stage.pull(configuration) { event in
        if case .progress(let done, _) = event { arrived.withLock { $0 = done } }
      }
    }
    while arrived.withLock({ $0 }) < 200 { try await Task.sleep(for: .milliseconds(5)) }
    let start = ContinuousClock.now
    task.cancel()
    await #expect(throws: CancellationError.self) { try await task.value }
    #expect(ContinuousClock.now - start < .seconds(10))
  }

  @Test func theBeginningThatAnotherProgramLeftIsUsed() async throws {
    let stage = Stage()
    let model = smallModel()
    stage.server.publish("owner/name", model)
    let etag = TestHub.Repository.etag(model.files[3].content, isLarge: true)
    let blobs = stage.repositoryFolder + "/blobs"
    try FileManager.default.createDirectory(atPath: blobs, withIntermediateDirectories: true)
    try Data(model.files[3].content.prefix(200_000)).write(to: URL(filePath: "\(blobs)/\(etag).incomplete"))
    let result = try await stage.pull()
    #expect(result.downloadedBytes == 100_001 + 5_000 + model.files[2].content.count)
    #expect(stage.bytes(result.path + "/model.safetensors") == model.files[3].content)
    #expect(stage.names(blobs).count == 4)
  }

  @Test func twoPullsOfTheSameModelFetchItOnce() async throws {
    let stage = Stage()
    let model = smallModel(weights: content(2_000_000, seed: 5))
    stage.server.publish("owner/name", model)
    let configuration = stage.configuration
    async let first = Stage.pull(configuration)
    async let second = Stage.pull(configuration)
    let results = try await [first, second]
    #expect(results[0].path == results[1].path)
    #expect(results[0].downloadedBytes + results[1].downloadedBytes == (try await total(of: stage)))
    #expect(stage.bytes(results[0].path + "/model.safetensors") == model.files[3].content)
  }

  @Test func aDamagedFileIsFoundAndFetchedAgain() async throws {
    let stage = Stage()
    let model = smallModel()
    stage.server.publish("owner/name", model)
    let result = try await stage.pull()
    let handle = try FileHandle(forWritingTo: URL(filePath: result.path + "/model.safetensors"))
    try handle.seek(toOffset: 1000)
    try handle.write(contentsOf: Data([1, 2, 3]))
    try handle.close()
    #expect(try await stage.pull().downloadedBytes == 0)
    #expect(try await stage.pull(verifies: true).downloadedBytes == model.files[3].content.count)
    #expect(stage.bytes(result.path + "/model.safetensors") == model.files[3].content)
    // One that lost its end is found without being read.
    try #require(truncate(result.path + "/model.safetensors", 1000) == 0)
    #expect(try await stage.pull().downloadedBytes == model.files[3].content.count)
  }

  @Test func aLocalFolderHoldsRealFiles() async throws {
    let stage = Stage()
    let model = smallModel()
    stage.server.publish("owner/name", model)
    let local = stage.folder + "/local"
    let result = try await stage.pull(localDirectory: local)
    #expect(result.path == local)
    #expect(stage.names(local) == [".cache", "config.json", "empty.json", "model.safetensors", "tokenizer.json"])
    #expect(stage.linkTarget(local + "/model.safetensors") == nil)
    #expect(stage.bytes(local + "/model.safetensors") == model.files[3].content)
    let note = String(
      decoding: stage.bytes(local + "/.cache/huggingface/download/config.json.metadata") ?? [], as: UTF8.self
    ).split(separator: "\n")
    #expect(note.count == 3)
    #expect(note.first.map(String.init) == model.commit)
    #expect(note.dropFirst().first.map(String.init) == TestHub.Repository.etag(model.files[2].content, isLarge: false))
    #expect(!stage.names(local + "/.cache/huggingface/download").contains { $0.hasSuffix(".incomplete") })
    #expect(try await stage.pull(localDirectory: local).downloadedBytes == 0)

    // A file of the same size with other content, and notes that are gone.
    try FileManager.default.removeItem(atPath: local + "/.cache")
    var damaged = model.files[3].content
    damaged[5] ^= 1
    try Data(damaged).write(to: URL(filePath: local + "/model.safetensors"))
    let again = try await stage.pull(localDirectory: local)
    #expect(again.downloadedBytes == model.files[3].content.count)
    #expect(stage.bytes(local + "/model.safetensors") == model.files[3].content)

    // What the cache holds is copied.
    _ = try await stage.pull()
    let other = try await stage.pull(localDirectory: stage.folder + "/other")
    #expect(other.downloadedBytes == 0)
    #expect(stage.bytes(other.path + "/model.safetensors") == model.files[3].content)
  }

  // MARK: Finding models

  private func locate(
    _ name: String, _ configuration: HubConfiguration, for purpose: FileSelection.Purpose = .model
  ) async throws -> String {
    let hub = try Hub(configuration)
    do {
      let path = try await hub.locate(
        try RepositoryReference(name), for: purpose, onPull: { _ in }, onEvent: { _ in })
      await hub.shutdown()
      return path
    } catch {
      await hub.shutdown()
      throw error
    }
  }

  @Test func whatTheCacheHoldsNeedsNoNetwork() async throws {
    let stage = Stage()
    stage.server.publish("owner/name", smallModel())
    stage.configuration.isOffline = true
    do {
      _ = try await locate("owner/name", stage.configuration)
      Issue.record("an empty cache cannot answer")
    } catch let error as HubError {
      #expect(error.kind == .offline)
      #expect(error.message.contains("HF_HUB_OFFLINE"))
    }
    stage.configuration.isOffline = false
    let path = try await locate("owner/name", stage.configuration)
    stage.server.clearLog()
    #expect(try await locate("owner/name", stage.configuration) == path)
    stage.configuration.isOffline = true
    #expect(try await locate("owner/name", stage.configuration) == path)
    #expect(try await locate("owner/name@" + smallModel().commit, stage.configuration) == path)
    #expect(stage.server.log.isEmpty)

    // A hole is noticed, and filled where there is a network.
    try FileManager.default.removeItem(atPath: path + "/model.safetensors")
    do {
      _ = try await locate("owner/name", stage.configuration)
      Issue.record("a part of a model is none")
    } catch let error as HubError {
      #expect(error.message.contains("model.safetensors"))
    }
    stage.configuration.isOffline = false
    #expect(try await locate("owner/name", stage.configuration) == path)
    #expect(stage.bytes(path + "/model.safetensors") == smallModel().files[3].content)
  }

  @Test func shardsThatTheIndexNamesMustBeThere() async throws {
    let stage = Stage()
    var model = smallModel()
    model.files.removeAll { $0.path == "model.safetensors" }
    let index =
      "{\"weight_map\": {\"a\": \"model-00001-of-00002.safetensors\", \"b\": \"model-00002-of-00002.safetensors\"}}"
    model.files.append(("model.safetensors.index.json", Array(index.utf8), false))
    model.files.append(("model-00001-of-00002.safetensors", content(1000, seed: 21), true))
    model.files.append(("consolidated.safetensors", content(1000, seed: 23), true))
    stage.server.publish("owner/name", model)
    do {
      _ = try await locate("owner/name", stage.configuration)
      Issue.record("a shard is missing")
    } catch let error as HubError {
      #expect(error.message.contains("model-00002-of-00002.safetensors"))
    }
    model.files.append(("model-00002-of-00002.safetensors", content(1000, seed: 22), true))
    model.commit = String(repeating: "d", count: 40)
    stage.server.publish("owner/name", model)
    let path = try await locate("owner/name", stage.configuration)
    #expect(!stage.names(path).contains("consolidated.safetensors"))
    #expect(stage.names(path).contains("model-00002-of-00002.safetensors"))
  }

  @Test func aTokenizerComesWithoutWeights() async throws {
    let stage = Stage()
    stage.server.publish("owner/name", smallModel())
    let path = try await locate("owner/name", stage.configuration, for: .tokenizer)
    #expect(stage.names(path) == ["config.json", "empty.json", "tokenizer.json"])
  }

  @Test func ggufModelsAreFilesOfARepository() async throws {
    let stage = Stage()
    var model = TestHub.Repository()
    model.files = [
      ("README.md", [1], false), ("config.json", Array("{}".utf8), false),
      ("name-Q4_K_M.gguf", content(1000, seed: 31), true), ("name-Q8_0.gguf", content(1500, seed: 32), true),
      ("big/name-F16-00001-of-00002.gguf", content(700, seed: 33), true),
      ("big/name-F16-00002-of-00002.gguf", content(600, seed: 34), true), ("mmproj-F16.gguf", [7], true),
    ]
    stage.server.publish("owner/name", model)
    let standard = try await locate("owner/name", stage.configuration)
    #expect(standard.hasSuffix("/snapshots/\(model.commit)/name-Q4_K_M.gguf"))
    #expect(try await locate("owner/name:q8_0", stage.configuration).hasSuffix("/name-Q8_0.gguf"))
    let split = try await locate("owner/name:F16", stage.configuration)
    #expect(split.hasSuffix("/big/name-F16-00001-of-00002.gguf"))
    #expect(stage.bytes(split.replacingOccurrences(of: "00001-of", with: "00002-of")) == model.files[5].content)
    let error = await stage.refusal("owner/name:Q2_K")
    #expect(error?.kind == .nothingToPull)
    #expect(error?.message.contains("name-Q8_0") == true)
    stage.configuration.isOffline = true
    #expect(try await locate("owner/name:Q8_0", stage.configuration).hasSuffix("/name-Q8_0.gguf"))
  }
}
