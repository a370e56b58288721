public import ApusCore
public import ApusEngine
public import ApusScheduling
public import ArgumentParser

extension EngineConfiguration.ElementType: ExpressibleByArgument {}
extension EngineConfiguration.CacheType: ExpressibleByArgument {}
extension EngineConfiguration.Quantization: ExpressibleByArgument {}
extension EngineConfiguration.OutputLayerQuantization: ExpressibleByArgument {}
extension EngineConfiguration.LoadFormat: ExpressibleByArgument {}
extension EngineConfiguration.ExpertRecorderMode: ExpressibleByArgument {}
extension EngineConfiguration.ExpertDispatch: ExpressibleByArgument {}
extension SchedulingPolicy: ExpressibleByArgument {}
extension GrammarSpecification.Whitespace: ExpressibleByArgument {}

/// The engine's own defaults, which are the flags' defaults.
private let standard = EngineConfiguration(modelPath: "")

/// The model and how the engine runs it: the flags that every command with an engine of its own shares.
struct EngineOptions: ParsableArguments {
  @Argument(
    help: ArgumentHelp(
      "The checkpoint directory (config.json, *.safetensors, tokenizer files), a GGUF file, or OWNER/NAME of a hub.",
      valueName: "model"),
    completion: .directory)
  var model: String?

  @Option(help: ArgumentHelp("The model, as a flag.", valueName: "path"), completion: .directory)
  var modelPath: String?

  @Option(
    help: ArgumentHelp("The name clients use. Default: the directory's name, or OWNER/NAME.", valueName: "name"))
  var servedModelName: String?

  @Option(
    help: ArgumentHelp("The tokenizer's directory or file. Default: the checkpoint directory.", valueName: "path"))
  var tokenizerPath: String?

  @Option(
    help: ArgumentHelp(
      "A Jinja file, or the name of a built-in chat template. Default: the checkpoint's own.", valueName: "path"))
  var chatTemplate: String?

  @Option(help: "The format of weights; auto keeps the checkpoint's.")
  var dtype = standard.dtype

  @Option(
    help: ArgumentHelp(
      "Quantises weights while loading: int8 has a scale per output, int8-group and int4 one per 32 inputs, fp8 one per "
        + "128. dense dequantises. Default: what the checkpoint stores quantised stays so."))
  var quantization: EngineConfiguration.Quantization?

  @Option(
    help: ArgumentHelp(
      "The output layer's format: auto is int8 where --quantization rounds the other layers, and as stored otherwise; "
        + "dense keeps it in plain numbers.",
      valueName: "format"))
  var outputLayerQuantization = standard.outputLayerQuantization

  @Option(
    help: ArgumentHelp(
      "The format of cached keys and values; auto is float32 for float32 weights, else bfloat16. int8 and fp8 take half "
        + "the memory of bfloat16."))
  var kvCacheDtype = standard.kvCacheDtype

  @Option(
    help: ArgumentHelp(
      "Keeps packed weights in a file that the next start maps instead of packing: 'beside' for the checkpoint's own "
        + "directory, or a directory. Takes as much disk space as the weights take memory.", valueName: "place"),
    completion: .directory)
  var packedCache: String?

  @Option(help: "dummy makes random weights from config.json alone, for benchmarks.")
  var loadFormat = standard.loadFormat

  @Option(help: ArgumentHelp("The longest sequence in tokens. Default: the model's own.", valueName: "tokens"))
  var contextLength: Int?

  @Option(
    help: ArgumentHelp("The most requests that compute at once.", valueName: "count"))
  var maxRunningRequests = standard.maxRunningRequests

  @Option(
    help: ArgumentHelp("The most requests that wait; one more is answered 429.", valueName: "count"))
  var maxQueuedRequests = standard.maxQueuedRequests

  @Option(
    help: ArgumentHelp(
      "The most tokens that a step computes; longer prompts are computed in chunks.",
      valueName: "tokens"))
  var chunkedPrefillSize = standard.tokenBudget

  @Option(
    help: ArgumentHelp("The K/V cache's size in tokens. Default: from the free memory.", valueName: "tokens"))
  var maxTotalTokens: Int?

  @Option(
    help: ArgumentHelp(
      "The share of the memory at hand that weights and the K/V cache may fill together. Default: \(standard.memoryFraction).",
      valueName: "share"))
  var memFractionStatic: Double?

  @Option(
    help: """
      Which waiting request goes first: lpm (longest cached prefix), fcfs (first come), lof (longest output), \
      dfs-weight (depth first by subtree), priority.
      """)
  var schedulePolicy = standard.schedulePolicy

  @Option(
    help: ArgumentHelp(
      "Above 1 admits fewer requests and retracts less often, below 1 admits more.", valueName: "factor"))
  var scheduleConservativeness = standard.scheduleConservativeness

  @Flag(help: "Computes every prompt whole: no prefix is reused.")
  var disableRadixCache = false

  @Flag(help: "Schedules between steps instead of during them: slower, the plain form for comparisons.")
  var disableOverlapSchedule = false

  @Option(
    help: ArgumentHelp(
      "Drafts tokens ahead and verifies several in one pass: ngram looks up where the last tokens stood before, nextn (mtp) "
        + "uses the checkpoint's layer for multi-token prediction, eagle3 (or eagle) a head made for the model "
        + "(--draft-model), standalone a small model (--draft-model). Output stays the same, sampled output too; it comes "
        + "faster while few requests run.",
      valueName: "algorithm"))
  var speculativeAlgorithm: SpeculativeAlgorithm?

  @Option(
    name: [.customLong("speculative-draft-model-path"), .customLong("draft-model")],
    help: ArgumentHelp(
      "What drafts tokens: a small model with the same tokenizer (a checkpoint directory, a GGUF file or a repository), or "
        + "with eagle and eagle3 a head (a directory or a repository). Alone it means --speculative-algorithm standalone.",
      valueName: "path"))
  var speculativeDraftModelPath: String?

  @Option(
    help: ArgumentHelp(
      "With a model that drafts: tokens drafted at most per step, one after the other, 1 to 64. Fewer are drafted where "
        + "they are often wrong or many requests run. Default: 5.", valueName: "count"))
  var speculativeNumSteps: Int?

  @Option(
    help: ArgumentHelp(
      "With a speculative algorithm: draft tokens verified at most per step, 1 to 64. Default: 8 for ngram and for "
        + "trees, else what --speculative-num-steps says.", valueName: "count"))
  var speculativeNumDraftTokens: Int?

  @Option(
    help: ArgumentHelp(
      "With a model that drafts: tokens drafted for one place, at most, 1 to 8. Above 1 drafts are a tree, of which "
        + "--speculative-num-draft-tokens are verified, those that seem most likely. Default: 1.", valueName: "count"))
  var speculativeEagleTopk: Int?

  @Option(
    help: ArgumentHelp(
      "With ngram: tokens of past outputs that are looked into beside the request's own, at most; 0 for none. Default: "
        + "\(standard.speculativeNgramCapacity).", valueName: "tokens"))
  var speculativeNgramCapacity: Int?

  @Flag(
    help: "Draws every token of constrained output, those too that the grammar leaves no choice about: for comparisons."
  )
  var disableJumpForward = false

  @Option(
    help: ArgumentHelp(
      "White space in JSON that a grammar describes: fixed (one space after each colon and comma, so that it needs no "
        + "draws), compact (none), or flexible (wherever JSON permits it). A request may ask for another.",
      valueName: "policy"))
  var constrainedJsonWhitespace = standard.jsonWhitespace

  @Option(
    help: ArgumentHelp(
      "Lets the loads of experts be recorded (POST /start_expert_distribution_record): stat sums over all passes, per_pass "
        + "keeps the counts of each pass, per_token each token's experts.", valueName: "mode"))
  var expertDistributionRecorderMode: EngineConfiguration.ExpertRecorderMode?

  @Option(
    help: ArgumentHelp("Passes that the recorder keeps in the modes per_pass and per_token.", valueName: "count"))
  var expertDistributionRecorderBufferSize = standard.expertRecorderBufferSize

  @Option(
    name: [.customLong("moe-dispatch"), .customLong("deepep-mode")],
    help: ArgumentHelp(
      "How rows reach experts: normal gives each exactly the rows that chose it, low_latency has room for a whole step in each, "
        + "auto takes low_latency for steps of at most 128 rows. Output is the same; on one machine normal takes the least "
        + "memory.", valueName: "mode"))
  var moeDispatch = standard.expertDispatch

  @Option(
    help: ArgumentHelp(
      "Places for experts beyond one for each, which hold replicas. Output is the same.", valueName: "count"))
  var epNumRedundantExperts = standard.redundantExperts

  @Option(
    help: ArgumentHelp(
      "Where experts lie: trivial (each at its own number, then the first ones again), or a JSON file with "
        + "physical_to_logical_map, or with logical_count, as a dump of the recorder has it: then the busiest ones have the "
        + "replicas.", valueName: "path"))
  var initExpertLocation = "trivial"

  @Option(help: ArgumentHelp("Compute threads. Default: the physical cores at hand.", valueName: "count"))
  var threads: Int?

  @Option(
    help: ArgumentHelp("Seeds the draws of requests without a seed, and dummy weights.", valueName: "seed"))
  var randomSeed: UInt64?

  /// The model's path, wherever it was given.
  var path: String? { modelPath ?? model }

  func validate() throws {
    if let model, let modelPath, model != modelPath {
      throw ValidationError("The model is given twice: '\(model)' and '--model-path \(modelPath)'; keep one of them.")
    }
    func atLeastOne(_ value: Int?, _ flag: String) throws {
      if let value, value < 1 { throw ValidationError("\(flag) must be at least 1, got \(value).") }
    }
    try atLeastOne(contextLength, "--context-length")
    try atLeastOne(maxRunningRequests, "--max-running-requests")
    try atLeastOne(chunkedPrefillSize, "--chunked-prefill-size")
    try atLeastOne(maxTotalTokens, "--max-total-tokens")
    try atLeastOne(threads, "--threads")
    try validateSpeculation()
    try atLeastOne(expertDistributionRecorderBufferSize, "--expert-distribution-recorder-buffer-size")
    if !(0...4096).contains(epNumRedundantExperts) {
      throw ValidationError("--ep-num-redundant-experts must be in 0...4096, got \(epNumRedundantExperts).")
    }
    if initExpertLocation.isEmpty { throw ValidationError("--init-expert-location is empty; give trivial or a file.") }
    if maxQueuedRequests < 0 {
      throw ValidationError("--max-queued-requests must be at least 0, got \(maxQueuedRequests).")
    }
    if let memFractionStatic, !(memFractionStatic > 0 && memFractionStatic <= 1) {
      throw ValidationError("--mem-fraction-static must be above 0 and at most 1, got \(memFractionStatic).")
    }
    if maxTotalTokens != nil && memFractionStatic != nil {
      throw ValidationError("--max-total-tokens and --mem-fraction-static both size the K/V cache; keep one of them.")
    }
    if !(scheduleConservativeness > 0 && scheduleConservativeness.isFinite) {
      throw ValidationError("--schedule-conservativeness must be above 0, got \(scheduleConservativeness).")
    }
    if let contextLength, let maxTotalTokens, maxTotalTokens < contextLength {
      throw ValidationError(
        "--max-total-tokens \(maxTotalTokens) cannot hold one sequence of --context-length \(contextLength).")
    }
    if disableRadixCache && [.depthFirstWeight, .longestPrefixMatch].contains(schedulePolicy) {
      throw ValidationError(
        "--schedule-policy \(schedulePolicy.rawValue) orders by cached prefixes; it needs the radix cache.")
    }
    if packedCache?.isEmpty == true { throw ValidationError("--packed-cache is empty; give 'beside' or a directory.") }
    if packedCache != nil && loadFormat == .dummy {
      throw ValidationError("--packed-cache keeps weights of files; leave it out with --load-format dummy.")
    }
    if tokenizerPath?.isEmpty == true { throw ValidationError("--tokenizer-path is empty.") }
  }

  /// The model on this machine, pulled from a hub if that is where it is.
  func requiredModel(isQuiet: Bool = false) async throws -> LocatedModel {
    guard let path = path ?? demoModelPath() else {
      throw CommandFailure.usage(
        "No model given, and the demo model (Models/apus-demo) lies neither here nor beside this program or above it; "
          + "name a checkpoint directory or a repository, as in 'apus serve Qwen/Qwen2.5-0.5B-Instruct'.")
    }
    return try await locateModel(path, isQuiet: isQuiet)
  }
}

/// The demo model that comes with Apus: `Models/apus-demo` in the working directory; beside the executable, in a folder above
/// it (a build's executable lies a few levels below the package), or in `share/apus` there, as an installation has it.
/// - Parameters:
///   - executable: the path of this program's file, links resolved.
///   - exists: whether something lies at a path.
/// - Returns: the first of these folders that holds a `config.json`.
package func demoModelPath(
  executable: String? = executablePath(), exists: (String) -> Bool = { fileExists($0) }
) -> String? {
  var folders = ["."]
  if let executable, var end = executable.lastIndex(of: "/") {
    // Enough for `.build/<triple>/release/apus`, and few enough not to wander off.
    for _ in 0..<6 {
      let folder = String(executable[..<end])
      folders += [folder, "\(folder)/share/apus"]
      guard let next = executable[..<end].lastIndex(of: "/") else { break }
      end = next
    }
  }
  return folders.lazy.map { "\($0)/Models/apus-demo" }.first { exists("\($0)/config.json") }
}

/// Sampling values on the command line. What is not given comes from the checkpoint's generation_config.json.
struct SamplingOptions: ParsableArguments {
  @Option(
    name: [.customLong("max-new-tokens"), .customLong("max-tokens")],
    help: ArgumentHelp("The most tokens to generate.", valueName: "tokens"))
  var maxNewTokens: Int?

  @Option(help: ArgumentHelp("Divides the logits; 0 always takes the most likely token.", valueName: "number"))
  var temperature: Float?

  @Option(help: ArgumentHelp("Keeps the most likely tokens that add up to this probability.", valueName: "share"))
  var topP: Float?

  @Option(help: ArgumentHelp("Keeps this many of the most likely tokens; 0 keeps all.", valueName: "count"))
  var topK: Int?

  @Option(help: ArgumentHelp("Drops tokens below this share of the most likely one.", valueName: "share"))
  var minP: Float?

  @Option(help: ArgumentHelp("Above 1 makes tokens that occurred less likely.", valueName: "factor"))
  var repetitionPenalty: Float?

  @Option(help: ArgumentHelp("Lowers tokens by this for each occurrence in the output.", valueName: "number"))
  var frequencyPenalty: Float?

  @Option(help: ArgumentHelp("Lowers tokens that occur in the output by this.", valueName: "number"))
  var presencePenalty: Float?

  @Option(help: ArgumentHelp("Seeds the draws; equal seeds give equal answers.", valueName: "seed"))
  var seed: UInt64?

  @Option(help: ArgumentHelp("Ends the answer when this text appears. May be repeated.", valueName: "text"))
  var stop: [String] = []

  func validate() throws {
    do throws(EngineError) {
      try values.applied(to: SamplingParameters()).validate(vocabularySize: Int(Int32.max))
    } catch {
      throw ValidationError(error.message)
    }
  }

  /// The values given.
  var values: SamplingValues {
    SamplingValues(
      maxNewTokens: maxNewTokens, temperature: temperature, topP: topP, topK: topK, minP: minP,
      repetitionPenalty: repetitionPenalty, frequencyPenalty: frequencyPenalty, presencePenalty: presencePenalty,
      seed: seed, stop: stop.isEmpty ? nil : stop)
  }
}

/// Who drafts tokens.
enum SpeculativeAlgorithm: String, ExpressibleByArgument, CaseIterable {
  case ngram, nextn, mtp, standalone, eagle, eagle3

  /// SGLang's spelling, in capitals, is understood too.
  init?(argument: String) { self.init(rawValue: argument.lowercased()) }

  /// The engine's name for it.
  var engineAlgorithm: EngineConfiguration.SpeculativeAlgorithm {
    switch self {
    case .ngram: .ngram
    case .nextn, .mtp: .nextn
    case .standalone: .standalone
    case .eagle: .eagle
    case .eagle3: .eagle3
    }
  }
}

extension EngineOptions {
  /// Who drafts tokens; a draft model says so by itself.
  var drafting: SpeculativeAlgorithm? {
    // SGLang's eagle without a head is the checkpoint's own layer.
    if speculativeAlgorithm == .eagle && speculativeDraftModelPath == nil { return .nextn }
    return speculativeAlgorithm ?? (speculativeDraftModelPath == nil ? nil : .standalone)
  }

  /// The most draft tokens of a step; 0 where nobody drafts.
  var draftTokens: Int {
    switch drafting {
    case nil: 0
    case .ngram: speculativeNumDraftTokens ?? 8
    case .nextn, .mtp, .standalone, .eagle, .eagle3: min(speculativeNumSteps ?? 5, speculativeNumDraftTokens ?? 64)
    }
  }

  /// Refuses options of speculative decoding that do not go together.
  func validateSpeculation() throws {
    for (flag, value) in [
      ("--speculative-num-draft-tokens", speculativeNumDraftTokens), ("--speculative-num-steps", speculativeNumSteps),
    ] {
      if let value, !(1...64).contains(value) { throw ValidationError("\(flag) must be from 1 to 64, got \(value).") }
    }
    if let speculativeEagleTopk {
      if !(1...8).contains(speculativeEagleTopk) {
        throw ValidationError("--speculative-eagle-topk must be from 1 to 8, got \(speculativeEagleTopk).")
      }
      if drafting == .ngram && speculativeEagleTopk > 1 {
        throw ValidationError("--speculative-eagle-topk is for models that draft; ngram drafts chains.")
      }
    }
    guard let drafting else {
      for (flag, isGiven) in [
        ("--speculative-eagle-topk", speculativeEagleTopk != nil),
        ("--speculative-num-draft-tokens", speculativeNumDraftTokens != nil),
        ("--speculative-num-steps", speculativeNumSteps != nil),
        ("--speculative-ngram-capacity", speculativeNgramCapacity != nil),
      ] where isGiven {
        throw ValidationError(
          "\(flag) has no effect without --speculative-algorithm; add '--speculative-algorithm ngram'.")
      }
      return
    }
    if drafting == .ngram && speculativeNumSteps != nil {
      throw ValidationError(
        "--speculative-num-steps is for models that draft; with ngram give --speculative-num-draft-tokens.")
    }
    if drafting != .ngram && speculativeNgramCapacity != nil {
      throw ValidationError("--speculative-ngram-capacity has no effect without '--speculative-algorithm ngram'.")
    }
    if let speculativeNgramCapacity, !(0...1 << 28).contains(speculativeNgramCapacity) {
      throw ValidationError(
        "--speculative-ngram-capacity must be from 0 to \(1 << 28), got \(speculativeNgramCapacity).")
    }
    let needsModel = [.standalone, .eagle, .eagle3].contains(drafting)
    if needsModel && speculativeDraftModelPath == nil {
      throw ValidationError("--speculative-algorithm \(drafting.rawValue) needs --draft-model.")
    }
    if !needsModel && speculativeDraftModelPath != nil {
      throw ValidationError(
        "--draft-model has no effect with --speculative-algorithm \(drafting.rawValue); leave one of them out.")
    }
  }
}

/// The engine's configuration that command-line arguments describe, for tests.
package func engineConfiguration(of arguments: [String]) async throws -> EngineConfiguration {
  try await EngineOptions.parse(arguments).configuration(isQuiet: true)
}
