import ApusCore
import ArgumentParser
import Glibc

/// `apus bench startup`
struct BenchStartup: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "startup",
    abstract: "Measures the time from starting a process to its first token.",
    discussion: """
      Starts this program anew for each repeat, lets it load the model and generate one token, and measures from before \
      the start to that token. With --cold the model's files are dropped from the page cache first.

      Examples:
        apus bench startup models/Qwen2.5-0.5B-Instruct --repeats 5
        apus bench startup models/Qwen2.5-0.5B-Instruct --load-format dummy --output-file startup.json
      """)

  @OptionGroup(title: "Model and engine") var engine: EngineOptions
  @Option(help: ArgumentHelp("Processes started.", valueName: "count"))
  var repeats = 3
  @Flag(help: "Drops the model's files from the page cache before each start.")
  var cold = false
  @Option(help: ArgumentHelp("The prompt's length.", valueName: "tokens"))
  var inputLen = 16
  @Option(help: ArgumentHelp("Writes the result as JSON; - is standard output.", valueName: "path"))
  var outputFile: String?
  @Flag(name: [.long, .short], help: "Prints no table.")
  var quiet = false
  @Flag(help: .hidden)
  var child = false

  func validate() throws {
    if repeats < 1 { throw ValidationError("--repeats must be at least 1, got \(repeats).") }
    if inputLen < 1 { throw ValidationError("--input-len must be at least 1, got \(inputLen).") }
  }

  func run() async throws {
    if child { return try await runChild() }
    let path = try await engine.requiredModel(isQuiet: quiet).path
    var samples: [Sample] = []
    for _ in 0..<repeats {
      if cold { dropFromPageCache(path) }
      samples.append(try startChild())
    }
    let total = Summary(samples.map(\.total))
    if !quiet {
      Terminal.output.line(
        "\("Milliseconds".padded(26))\("median".aligned(10))\("min".aligned(10))\("max".aligned(10))")
      func row(_ name: String, _ value: (Sample) -> Double) {
        let summary = Summary(samples.map(value))
        Terminal.output.line(
          name.padded(26)
            + [summary.median, summary.minimum, summary.maximum].map { fixed($0 * 1000, 1).aligned(10) }.joined())
      }
      row("process to main") { $0.main }
      row("loading") { $0.loading }
      row("prompt and first token") { $0.firstToken }
      row("process to first token") { $0.total }
      Terminal.output.line("Peak memory of a process: \(byteSize(samples.map(\.peakBytes).max() ?? 0)).")
    }
    if let outputFile {
      try emit(
        .object(
          JSONObject([
            ("model", .string(path)), ("cold", .bool(cold)), ("repeats", .int(Int64(repeats))),
            ("process_to_main_ms", Summary(samples.map(\.main)).json(scale: 1000)),
            ("loading_ms", Summary(samples.map(\.loading)).json(scale: 1000)),
            ("first_token_ms", Summary(samples.map(\.firstToken)).json(scale: 1000)),
            ("total_ms", total.json(scale: 1000)),
            ("peak_rss_bytes", .int(Int64(samples.map(\.peakBytes).max() ?? 0))),
          ])), to: outputFile)
    }
  }

  /// One start: seconds of each phase.
  private struct Sample {
    var main: Double
    var loading: Double
    var firstToken: Double
    var peakBytes: Int
    var total: Double { main + loading + firstToken }
  }

  /// The child's part: load, generate one token, say when each was done.
  private func runChild() async throws {
    let main = monotonicSeconds()
    let running = try await startEngine(engine, isQuiet: true)
    let loaded = monotonicSeconds()
    var sampling = SamplingParameters.greedy
    sampling.maxNewTokens = 1
    sampling.ignoreEOS = true
    let vocabulary = running.service.model.vocabularySize
    let prompt = (0..<inputLen).map { TokenID(($0 * 7 + 3) % vocabulary) }
    _ = try await running.service.generate(Request(prompt: .tokens(prompt), sampling: sampling)).result()
    let first = monotonicSeconds()
    let line: JSONValue = [
      "main": .double(main), "loaded": .double(loaded), "first": .double(first),
      "peak": .int(Int64(peakResidentBytes())),
    ]
    Terminal.output.line(line.compactText)
    await running.shutdown()
  }

  /// Starts this program as a child with the same engine flags and reads its line.
  private func startChild() throws -> Sample {
    guard let executable = executablePath() else { throw CommandFailure("Cannot find this program's own file.") }
    let given = CommandLine.arguments
    let after = given.firstIndex(of: "startup").map { Array(given[($0 + 1)...]) } ?? []
    let arguments = [executable, "bench", "startup", "--child"] + after
    var pipeEnds: [Int32] = [0, 0]
    guard pipe(&pipeEnds) == 0 else { throw CommandFailure("Cannot make a pipe: \(systemError()).") }
    for end in pipeEnds { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
    defer { close(pipeEnds[0]) }
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_adddup2(&actions, pipeEnds[1], STDOUT_FILENO)
    var argv: [UnsafeMutablePointer<CChar>?] = arguments.map { strdup($0) } + [nil]
    defer { for pointer in argv { free(pointer) } }
    var process = pid_t()
    let start = monotonicSeconds()
    let status = posix_spawn(&process, executable, &actions, nil, &argv, environ)
    close(pipeEnds[1])
    guard status == 0 else {
      throw CommandFailure("Cannot start a process: \(String(cString: strerror(status))).")
    }
    var output: [UInt8] = []
    var chunk = [UInt8](repeating: 0, count: 4096)
    while true {
      let count = read(pipeEnds[0], &chunk, chunk.count)
      if count < 0 && errno == EINTR { continue }
      if count <= 0 { break }
      output += chunk[0..<count]
    }
    var exit: Int32 = 0
    while waitpid(process, &exit, 0) < 0 && errno == EINTR {}
    guard exit == 0, let line = try? JSONValue.parse(output), let main = line["main"]?.doubleValue,
      let loaded = line["loaded"]?.doubleValue, let first = line["first"]?.doubleValue
    else { throw CommandFailure("The process that was started failed; its message is above.") }
    return Sample(
      main: main - start, loading: loaded - main, firstToken: first - loaded, peakBytes: line["peak"]?.intValue ?? 0)
  }

  /// Asks the system to forget its copies of the files in a directory. Clean pages go; this needs no rights.
  private func dropFromPageCache(_ path: String) {
    guard let directory = opendir(path) else { return }
    defer { closedir(directory) }
    while let entry = readdir(directory) {
      let name = withUnsafePointer(to: &entry.pointee.d_name) {
        $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
      }
      let descriptor = open("\(path)/\(name)", O_RDONLY | O_CLOEXEC)
      guard descriptor >= 0 else { continue }
      posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED)
      close(descriptor)
    }
  }
}
