/// Finds the flag that a user may have meant.
package struct FlagSuggestions: Sendable {
  private let root: CommandModel

  /// Searches the commands of a program.
  package init(root: CommandModel) { self.root = root }

  /// The sentence for the first flag or command on a command line that the program does not know; `nil` if it knows all
  /// of them.
  /// - Parameter arguments: the words after the program's name.
  package func complaint(about arguments: [String]) -> String? {
    var command = root
    var path = [root.name]
    var skipsValue = false
    var sawPositional = false
    for argument in arguments {
      if skipsValue {
        skipsValue = false
        continue
      }
      if argument == "--" { return nil }
      guard argument.hasPrefix("-"), argument.count > 1, !isNumber(argument) else {
        if sawPositional || command.subcommands.isEmpty { continue }
        if let next = command.subcommands.first(where: { $0.name == argument }) {
          command = next
          path.append(next.name)
        } else if argument == "help" && path.count == 1 {
          return nil
        } else if command.parameters.contains(where: { $0.kind == .positional }) {
          sawPositional = true
        } else {
          return unknownCommand(argument, in: command, path: path)
        }
        continue
      }
      let name = String(argument.prefix { $0 != "=" })
      if ["--help", "-h", "--help-hidden", "--version"].contains(name) { continue }
      if let known = command.parameters.first(where: { $0.names.contains(name) }) {
        skipsValue = known.kind == .option && !argument.contains("=")
      } else if let short = shortCluster(name, in: command) {
        skipsValue = short
      } else {
        return unknownFlag(name, in: command, path: path)
      }
    }
    return nil
  }

  /// Whether `-abc` is a cluster of known one-letter flags; the value says whether the next word is the value of the
  /// last of them.
  private func shortCluster(_ name: String, in command: CommandModel) -> Bool? {
    guard name.hasPrefix("-"), !name.hasPrefix("--") else { return nil }
    let letters = Array(name.dropFirst())
    for (index, letter) in letters.enumerated() {
      guard let known = command.parameters.first(where: { $0.names.contains("-\(letter)") }) else { return nil }
      if known.kind == .option { return index == letters.count - 1 ? true : nil }
    }
    return false
  }

  private func isNumber(_ text: some StringProtocol) -> Bool { Double(text) != nil }

  private func unknownCommand(_ name: String, in command: CommandModel, path: [String]) -> String {
    let place = path.joined(separator: " ")
    let names = command.subcommands.map(\.name)
    if let nearest = nearest(to: name, among: names) {
      return "Unknown command '\(name)'; did you mean '\(place) \(nearest)'?"
    }
    return "Unknown command '\(name)'; the commands of '\(place)' are \(names.joined(separator: ", "))."
  }

  private func unknownFlag(_ name: String, in command: CommandModel, path: [String]) -> String {
    let place = path.joined(separator: " ")
    let known = command.parameters.flatMap(\.names)
    if let foreign = foreignFlags[name] {
      switch foreign {
      case .renamed(let origin, let to):
        if known.contains(to) { return "Unknown flag '\(name)'; \(origin)'s \(name) is '\(to)' in '\(place)'." }
      case .explained(let sentence):
        return "Unknown flag '\(name)'; \(sentence)."
      }
    }
    if let nearest = nearest(to: name, among: known.filter { $0.hasPrefix("--") }) {
      return "Unknown flag '\(name)' for '\(place)'; did you mean '\(nearest)'?"
    }
    if let owner = owner(of: name, in: root, path: [root.name], except: path) {
      return "Unknown flag '\(name)' for '\(place)'; it belongs to '\(owner)'."
    }
    return "Unknown flag '\(name)' for '\(place)'; '\(place) --help' lists the flags."
  }

  private func owner(of name: String, in command: CommandModel, path: [String], except: [String]) -> String? {
    if path != except, command.parameters.contains(where: { $0.names.contains(name) }) {
      return path.joined(separator: " ")
    }
    for subcommand in command.subcommands {
      if let found = owner(of: name, in: subcommand, path: path + [subcommand.name], except: except) { return found }
    }
    return nil
  }

  private func nearest(to name: String, among candidates: [String]) -> String? {
    let ranked = candidates.map { (name: $0, distance: editDistance(name, $0)) }
    guard let best = ranked.min(by: { ($0.distance, $0.name) < ($1.distance, $1.name) }) else { return nil }
    // A third of the letters may differ; beyond that the guess is more likely to mislead than to help.
    return best.distance <= max(1, name.count / 3) ? best.name : nil
  }
}

/// The least number of insertions, deletions, replacements and swaps of neighbours that turn one text into the other
/// (optimal string alignment).
package func editDistance(_ left: String, _ right: String) -> Int {
  let a = Array(left.unicodeScalars), b = Array(right.unicodeScalars)
  if a.isEmpty || b.isEmpty { return max(a.count, b.count) }
  var beforePrevious = [Int](repeating: 0, count: b.count + 1)
  var previous = Array(0...b.count)
  var current = previous
  for i in 1...a.count {
    current[0] = i
    for j in 1...b.count {
      let substitution = previous[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)
      current[j] = min(previous[j] + 1, current[j - 1] + 1, substitution)
      if i > 1, j > 1, a[i - 1] == b[j - 2], a[i - 2] == b[j - 1] {
        current[j] = min(current[j], beforePrevious[j - 2] + 1)
      }
    }
    (beforePrevious, previous, current) = (previous, current, beforePrevious)
  }
  return previous[b.count]
}

/// What another engine's flag is called here, or why it is not needed.
package enum ForeignFlag: Sendable, Equatable {
  case renamed(origin: String, to: String)
  case explained(String)
}

/// Spellings that users of other engines bring along.
package let foreignFlags: [String: ForeignFlag] = {
  var flags: [String: ForeignFlag] = [:]
  func rename(_ origin: String, _ pairs: [(String, String)]) {
    for (from, to) in pairs { flags[from] = .renamed(origin: origin, to: to) }
  }
  rename(
    "vLLM",
    [
      ("--max-num-seqs", "--max-running-requests"), ("--max-model-len", "--context-length"),
      ("--gpu-memory-utilization", "--mem-fraction-static"), ("--max-num-batched-tokens", "--chunked-prefill-size"),
      ("--no-enable-prefix-caching", "--disable-radix-cache"), ("--seed", "--random-seed"),
      ("--tokenizer", "--tokenizer-path"), ("--model", "--model-path"), ("--allowed-origins", "--cors-allow-origin"),
      ("--uvicorn-log-level", "--log-level"), ("--scheduling-policy", "--schedule-policy"),
      ("--enable-log-requests", "--log-requests"), ("--no-async-scheduling", "--disable-overlap-schedule"),
      ("--dataset-path", "--dataset-path"), ("--num-gpu-blocks-override", "--max-total-tokens"),
    ])
  rename(
    "llama.cpp",
    [
      ("-m", "--model-path"), ("-c", "--context-length"), ("--ctx-size", "--context-length"), ("-t", "--threads"),
      ("-tb", "--threads"), ("--threads-batch", "--threads"), ("-np", "--max-running-requests"),
      ("--parallel", "--max-running-requests"), ("-b", "--chunked-prefill-size"),
      ("--batch-size", "--chunked-prefill-size"), ("-ub", "--chunked-prefill-size"),
      ("--ubatch-size", "--chunked-prefill-size"), ("-n", "--max-new-tokens"), ("--predict", "--max-new-tokens"),
      ("--n-predict", "--max-new-tokens"), ("--temp", "--temperature"), ("-s", "--random-seed"),
      ("-ctk", "--kv-cache-dtype"), ("-ctv", "--kv-cache-dtype"), ("--cache-type-k", "--kv-cache-dtype"),
      ("--cache-type-v", "--kv-cache-dtype"), ("-a", "--served-model-name"), ("--alias", "--served-model-name"),
      ("--ssl-key-file", "--ssl-keyfile"), ("--ssl-cert-file", "--ssl-certfile"),
      ("--chat-template-file", "--chat-template"), ("-sys", "--system"), ("--system-prompt", "--system"),
      ("--repeat-penalty", "--repetition-penalty"),
    ])
  rename(
    "SGLang",
    [
      ("--max-prefill-tokens", "--chunked-prefill-size"), ("--allowed-origin", "--cors-allow-origin"),
      ("--cpu-threads", "--threads"), ("--max-tokens", "--max-new-tokens"),
    ])
  let singleProcess = "this version runs a model in one process, without parallelism over devices"
  for name in [
    "--tensor-parallel-size", "-tp", "--tp", "--tp-size", "--data-parallel-size", "--dp", "--dp-size", "-dp",
    "--pipeline-parallel-size", "--pp", "--pp-size", "--ep", "--ep-size", "--enable-expert-parallel", "--nnodes",
    "--node-rank", "--dist-init-addr", "--tensor-split", "-ts",
  ] {
    flags[name] = .explained(singleProcess)
  }
  let onCPU = "this version computes on the CPU"
  for name in [
    "-ngl", "--n-gpu-layers", "--gpu-layers", "--device", "--attention-backend", "-fa", "--flash-attn",
    "--enforce-eager", "--disable-cuda-graph", "--cuda-graph-max-bs", "--cpu-offload-gb", "--swap-space",
  ] {
    flags[name] = .explained(onCPU)
  }
  for (name, sentence) in [
    ("--enable-prefix-caching", "the prefix cache is always on unless '--disable-radix-cache' is given"),
    ("--enable-chunked-prefill", "prompts are always computed in chunks; '--chunked-prefill-size' sets their size"),
    ("--enable-mixed-chunk", "prompt chunks and output tokens always share steps"),
    ("--enable-metrics", "/metrics is always served"), ("--metrics", "/metrics is always served"),
    ("--enable-cache-report", "usage always reports cached tokens"),
    ("--trust-remote-code", "Apus never runs code from a checkpoint, so the flag is not needed"),
    ("--page-size", "pages always hold 16 tokens"), ("--block-size", "pages always hold 16 tokens"),
    ("-cb", "continuous batching is always on"), ("--cont-batching", "continuous batching is always on"),
    ("--mlock", "weights are mapped and shared by the system's page cache"),
    ("--no-mmap", "weights are always mapped, never read into memory of their own"),
    ("--enable-deterministic-inference", "results never depend on the batch, so the flag is not needed"),
    ("--skip-server-warmup", "there is no warm-up to skip"),
    ("--disable-log-requests", "requests are logged only with '--log-requests'"),
    ("--jinja", "chat templates are always interpreted in full"),
  ] {
    flags[name] = .explained(sentence)
  }
  return flags
}()
