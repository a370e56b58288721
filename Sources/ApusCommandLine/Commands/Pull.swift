import ApusCore
import ApusHub
import ArgumentParser

/// `apus pull`
struct Pull: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Downloads a model from a hub into the cache.",
    discussion: """
      MODEL is OWNER/NAME, with @REVISION (a branch, tag or commit) and, for a repository of GGUF files, :QUANT. What \
      running the model needs is taken: configurations, tokenizer, chat templates and safetensors, or one GGUF model. \
      Prints the path on standard output. 'serve', 'chat' and the other commands take the same name in place of a path \
      and pull by themselves what is not there.

      The cache is the one of huggingface_hub ($HF_HUB_CACHE, else $HF_HOME/hub, else ~/.cache/huggingface/hub): what \
      other programs downloaded is found, and they find this. A download that was stopped in any way goes on where it \
      stopped; every file is checked against its checksum. $HF_TOKEN opens private and gated models, $HF_ENDPOINT names \
      another hub, $HF_HUB_OFFLINE=1 forbids the network.

      Examples:
        apus pull Qwen/Qwen2.5-0.5B-Instruct
        apus pull Qwen/Qwen2.5-0.5B-Instruct@7ae557604adf67be50417f59c2c2f167def9a775
        apus pull Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q8_0
        apus pull meta-llama/Llama-3.2-1B --dry-run
        apus pull openai/gpt-oss-20b --exclude 'original/*' --local-dir models/gpt-oss-20b
        apus pull Qwen/Qwen2.5-0.5B --include '*.json' --include tokenizer.model
        apus serve "$(apus pull Qwen/Qwen2.5-0.5B-Instruct)"
      """)

  @Argument(help: ArgumentHelp("OWNER/NAME, OWNER/NAME@REVISION or OWNER/NAME:QUANT.", valueName: "model"))
  var model: String
  @Option(help: ArgumentHelp("The branch, tag or commit, as after '@'. Default: main.", valueName: "revision"))
  var revision: String?
  @Option(
    parsing: .singleValue,
    help: ArgumentHelp(
      "Takes the files that match, instead of what the model needs: '*' stands for any text, slashes too. May be repeated.",
      valueName: "pattern"))
  var include: [String] = []
  @Option(
    parsing: .singleValue,
    help: ArgumentHelp("Leaves out the files that match. May be repeated.", valueName: "pattern"))
  var exclude: [String] = []
  @Flag(help: "Takes every file of the repository.")
  var all = false
  @Option(
    help: ArgumentHelp("Puts real files into this folder instead of the cache.", valueName: "folder"),
    completion: .directory)
  var localDir: String?
  @Option(help: ArgumentHelp("Transfers at once.", valueName: "count"))
  var maxWorkers = 8
  @Flag(help: "Says what would be downloaded, and downloads nothing.")
  var dryRun = false
  @Flag(help: "Reads files that are there as well and fetches again what does not have its checksum.")
  var verify = false
  @Flag(help: "Prints the result as JSON: path, commit, files, bytes.")
  var json = false
  @Flag(name: [.long, .short], help: "Prints nothing but the path and errors.")
  var quiet = false

  func validate() throws {
    if !(1...64).contains(maxWorkers) {
      throw ValidationError("--max-workers must be in 1...64, got \(maxWorkers).")
    }
    if all && !include.isEmpty { throw ValidationError("--all takes every file; leave --include out.") }
    if localDir?.isEmpty == true { throw ValidationError("--local-dir is empty.") }
  }

  func run() async throws {
    do {
      let request = try request()
      var configuration = try HubConfiguration.current()
      configuration.workers = maxWorkers
      if configuration.isOffline { return try reportCached(request, configuration) }
      try await withHub(configuration) { hub in
        let plan = try await interruptible { try await hub.plan(request) }
        if let note = plan.note, !quiet { Terminal.error.line(note) }
        if dryRun { return describe(plan) }
        let start = monotonicSeconds()
        let display = PullDisplay(isQuiet: quiet)
        defer { display.finish() }
        let result = try await interruptible { try await hub.fetch(plan, onEvent: display.show) }
        display.finish()
        report(plan, result, seconds: monotonicSeconds() - start)
      }
    } catch let error as HubError {
      throw CommandFailure(error)
    }
  }

  /// What the flags ask for.
  private func request() throws -> PullRequest {
    var reference = try RepositoryReference(model)
    if let revision {
      if reference.revision != RepositoryReference.defaultRevision && reference.revision != revision {
        throw CommandFailure.usage("'\(model)' names a revision and '--revision' another; keep one of them.")
      }
      reference = try RepositoryReference(
        "\(reference.repository)@\(revision)" + (reference.quantization.map { ":\($0)" } ?? ""))
    }
    var selection = FileSelection(quantization: reference.quantization)
    selection.include = include
    selection.exclude = exclude
    selection.takesAll = all
    var request = PullRequest(reference, selection: selection, localDirectory: localDir)
    request.verifies = verify
    return request
  }

  /// Without a network there is only what the cache holds.
  private func reportCached(_ request: PullRequest, _ configuration: HubConfiguration) throws {
    let cache = HubCache(directory: configuration.cacheDirectory)
    guard case .complete(let path) = cache.lookUp(request.reference, for: .model) else {
      throw CommandFailure(
        "HF_HUB_OFFLINE is set and \(cache.directory) does not hold all of \(request.reference). Unset it to pull the rest.",
        status: ExitStatus.missingInput)
    }
    if localDir != nil {
      throw CommandFailure("HF_HUB_OFFLINE is set, so nothing is pulled to --local-dir; the cache holds \(path).")
    }
    if !quiet { Terminal.error.line("HF_HUB_OFFLINE is set; the cache holds \(request.reference).") }
    if json {
      let commit = cache.commit(request.reference) ?? ""
      Terminal.output.line(
        JSONValue.object(
          JSONObject([
            ("repository", .string(request.reference.repository)), ("revision", .string(request.reference.revision)),
            ("commit", .string(commit)), ("path", .string(path)), ("offline", .bool(true)),
          ])
        ).compactText)
    } else {
      Terminal.output.line(path)
    }
  }

  /// What a dry run says.
  private func describe(_ plan: PullPlan) {
    guard !json else { return Terminal.output.line(document(plan, path: nil, downloaded: nil).compactText) }
    for entry in plan.files {
      let state =
        entry.isPresent
        ? "present" : entry.resumableBytes > 0 ? "resumes, \(byteSize(entry.resumableBytes)) are there" : "to download"
      Terminal.output.line("\(byteSize(entry.file.size).aligned(10))  \(entry.file.path)  (\(state))")
    }
    let count = plan.files.count
    Terminal.output.line(
      "\(plan.request.reference) at \(plan.commit): \(count) file\(count == 1 ? "" : "s"), \(byteSize(plan.totalBytes)), "
        + "of which \(byteSize(plan.missingBytes)) would be downloaded.")
    if let line = leftOutLine(plan) { Terminal.output.line(line) }
  }

  /// What a pull says in the end.
  private func report(_ plan: PullPlan, _ result: PullResult, seconds: Double) {
    if !quiet {
      let count = plan.files.count
      var text = "\(plan.request.reference) at \(plan.commit.prefix(12)): \(count) file\(count == 1 ? "" : "s"), "
      text += byteSize(plan.totalBytes)
      if result.downloadedBytes > 0 {
        let rate = byteSize(Int(Double(result.downloadedBytes) / max(1e-3, seconds)))
        text += "; \(byteSize(result.downloadedBytes)) downloaded in \(duration(seconds)), \(rate)/s."
      } else {
        text += "; all were there."
      }
      Terminal.error.line(text)
      if let line = leftOutLine(plan) { Terminal.error.line(line) }
    }
    if json {
      Terminal.output.line(document(plan, path: result.path, downloaded: result.downloadedBytes).compactText)
    } else {
      Terminal.output.line(result.path)
    }
  }

  /// The files left out, by reason.
  private func leftOutLine(_ plan: PullPlan) -> String? {
    guard !plan.leftOut.isEmpty else { return nil }
    var groups: [(reason: String, count: Int, bytes: Int)] = []
    for (file, reason) in plan.leftOut {
      if let index = groups.firstIndex(where: { $0.reason == reason }) {
        groups[index].count += 1
        groups[index].bytes &+= file.size
      } else {
        groups.append((reason, 1, file.size))
      }
    }
    let parts = groups.map { "\($0.reason) (\($0.count), \(byteSize($0.bytes)))" }
    let advice = include.isEmpty && !all ? " '--all' takes them too." : ""
    return "Left out: \(parts.joined(separator: ", ")).\(advice)"
  }

  private func document(_ plan: PullPlan, path: String?, downloaded: Int?) -> JSONValue {
    var object = JSONObject([
      ("repository", .string(plan.request.reference.repository)),
      ("revision", .string(plan.request.reference.revision)), ("commit", .string(plan.commit)),
    ])
    if let path { object["path"] = .string(path) }
    object["files"] = .array(
      plan.files.map { entry in
        .object(
          JSONObject([
            ("path", .string(entry.file.path)), ("bytes", .int(Int64(entry.file.size))),
            ("checksum", .string(entry.file.etag)), ("was_present", .bool(entry.isPresent)),
          ]))
      })
    object["bytes"] = .int(Int64(plan.totalBytes))
    if let downloaded {
      object["downloaded_bytes"] = .int(Int64(downloaded))
    } else {
      object["missing_bytes"] = .int(Int64(plan.missingBytes))
    }
    object["left_out"] = .array(plan.leftOut.map { .string($0.file.path) })
    return .object(object)
  }
}
