import ApusCore
import ArgumentParser

/// Where a benchmark's requests come from.
enum DatasetName: String, ExpressibleByArgument, CaseIterable {
  case random, sharegpt, mooncake, custom
  case sharedPrefix = "generated-shared-prefix"
}

/// The flags that describe a benchmark's requests.
struct DatasetOptions: ParsableArguments {
  @Option(
    help: """
      Where requests come from: random (lengths below), generated-shared-prefix (gsp flags), sharegpt (a file of \
      conversations), mooncake (a trace file), custom (JSONL of your prompts).
      """)
  var datasetName: DatasetName = .random
  @Option(
    help: ArgumentHelp("The file of sharegpt, mooncake or custom.", valueName: "path"), completion: .file())
  var datasetPath: String?
  @Option(
    help: ArgumentHelp(
      "Requests to send. Default: 100, or all of a custom file, or all of --gsp-num-groups x --gsp-prompts-per-group.",
      valueName: "count"))
  var numPrompts: Int?
  @Option(help: ArgumentHelp("Seeds lengths, contents and arrivals.", valueName: "seed"))
  var seed: UInt64 = 1
  @Option(help: ArgumentHelp("random: tokens of a prompt.", valueName: "tokens"))
  var randomInputLen = 512
  @Option(help: ArgumentHelp("random: tokens of an answer.", valueName: "tokens"))
  var randomOutputLen = 128
  @Option(
    help: ArgumentHelp(
      "Lengths are uniform between this share of a length and the length; 1 makes all equal.", valueName: "share"))
  var randomRangeRatio = 1.0
  @Option(help: ArgumentHelp("generated-shared-prefix: groups.", valueName: "count"))
  var gspNumGroups = 16
  @Option(help: ArgumentHelp("generated-shared-prefix: prompts of a group.", valueName: "count"))
  var gspPromptsPerGroup = 8
  @Option(help: ArgumentHelp("generated-shared-prefix: tokens that a group shares.", valueName: "tokens"))
  var gspSystemPromptLen = 512
  @Option(help: ArgumentHelp("generated-shared-prefix: tokens of a prompt's own.", valueName: "tokens"))
  var gspQuestionLen = 64
  @Option(help: ArgumentHelp("generated-shared-prefix: tokens of an answer.", valueName: "tokens"))
  var gspOutputLen = 64
  @Option(
    help: ArgumentHelp(
      "sharegpt, custom: tokens of an answer. Default: the length of the file's answer; 128 for custom.",
      valueName: "tokens"))
  var outputLen: Int?
  @Option(
    help: ArgumentHelp("mooncake: lengths are multiplied by this, to fit a short context.", valueName: "factor"))
  var traceScale = 1.0
  @Option(help: ArgumentHelp("mooncake: the trace is played this many times as fast.", valueName: "factor"))
  var traceSpeed = 1.0
  @Option(help: ArgumentHelp("mooncake: longer prompts are cut to this many tokens.", valueName: "tokens"))
  var traceMaxInputLen: Int?

  func validate() throws {
    for (name, value) in [
      ("--random-input-len", randomInputLen), ("--random-output-len", randomOutputLen),
      ("--gsp-num-groups", gspNumGroups), ("--gsp-prompts-per-group", gspPromptsPerGroup),
      ("--gsp-system-prompt-len", gspSystemPromptLen), ("--gsp-question-len", gspQuestionLen),
      ("--gsp-output-len", gspOutputLen), ("--num-prompts", numPrompts ?? 1), ("--output-len", outputLen ?? 1),
      ("--trace-max-input-len", traceMaxInputLen ?? 1),
    ] where value < 1 {
      throw ValidationError("\(name) must be at least 1, got \(value).")
    }
    guard randomRangeRatio >= 0 && randomRangeRatio <= 1 else {
      throw ValidationError("--random-range-ratio must be in 0...1, got \(randomRangeRatio).")
    }
    guard traceScale > 0 && traceSpeed > 0 else {
      throw ValidationError("--trace-scale and --trace-speed must be above 0.")
    }
    switch datasetName {
    case .sharegpt, .mooncake, .custom:
      if datasetPath == nil { throw ValidationError("--dataset-name \(datasetName.rawValue) needs --dataset-path.") }
    case .random, .sharedPrefix:
      if datasetPath != nil {
        throw ValidationError("--dataset-name \(datasetName.rawValue) is generated; it takes no --dataset-path.")
      }
    }
  }

  /// Whether prompts are made of units.
  var isSynthetic: Bool { datasetName != .sharegpt && datasetName != .custom }

  /// Makes the requests.
  /// - Parameter unitCount: how many units synthetic prompts may use.
  func requests(unitCount: Int) throws -> [BenchRequest] {
    switch datasetName {
    case .random:
      return BenchDataset.random(
        count: numPrompts ?? 100, inputLength: randomInputLen, outputLength: randomOutputLen,
        rangeRatio: randomRangeRatio, unitCount: unitCount, seed: seed)
    case .sharedPrefix:
      let all = BenchDataset.sharedPrefix(
        groups: gspNumGroups, promptsPerGroup: gspPromptsPerGroup, prefixLength: gspSystemPromptLen,
        questionLength: gspQuestionLen, outputLength: gspOutputLen, rangeRatio: randomRangeRatio, unitCount: unitCount,
        seed: seed)
      return Array(all.prefix(numPrompts ?? all.count))
    case .sharegpt:
      return try BenchDataset.shareGPT(
        try readFile(datasetPath!), count: numPrompts ?? 100, outputLength: outputLen, seed: seed)
    case .custom:
      return try BenchDataset.custom(
        try readFile(datasetPath!), count: numPrompts, outputLength: outputLen ?? 128, seed: seed)
    case .mooncake:
      let reader = try LineReader(path: datasetPath!)
      var lines: [BenchDataset.TraceLine] = []
      while lines.count < numPrompts ?? 100, let bytes = try reader.next() {
        if bytes.isEmpty { continue }
        guard let line = (try? JSONValue.parse(bytes)).flatMap(BenchDataset.TraceLine.init) else {
          throw CommandFailure(
            "Line \(lines.count + 1) of \(datasetPath!) is no request of a Mooncake trace.",
            status: ExitStatus.invalidInput)
        }
        lines.append(line)
      }
      return BenchDataset.trace(
        lines, blockSize: 512, scale: traceScale, speed: traceSpeed, maxInputLength: traceMaxInputLen,
        unitCount: unitCount, seed: seed)
    }
  }

  /// The description that goes into a result.
  var json: JSONObject {
    var object = JSONObject([
      ("dataset_name", .string(datasetName.rawValue)), ("seed", .int(Int64(bitPattern: seed))),
    ])
    switch datasetName {
    case .random:
      object["random_input_len"] = .int(Int64(randomInputLen))
      object["random_output_len"] = .int(Int64(randomOutputLen))
      object["random_range_ratio"] = .double(randomRangeRatio)
    case .sharedPrefix:
      object["gsp_num_groups"] = .int(Int64(gspNumGroups))
      object["gsp_prompts_per_group"] = .int(Int64(gspPromptsPerGroup))
      object["gsp_system_prompt_len"] = .int(Int64(gspSystemPromptLen))
      object["gsp_question_len"] = .int(Int64(gspQuestionLen))
      object["gsp_output_len"] = .int(Int64(gspOutputLen))
    case .mooncake:
      object["dataset_path"] = .string(datasetPath ?? "")
      object["trace_scale"] = .double(traceScale)
      object["trace_speed"] = .double(traceSpeed)
    case .sharegpt, .custom: object["dataset_path"] = .string(datasetPath ?? "")
    }
    return object
  }
}
