import ApusCore
import ApusEngine
import ArgumentParser

/// `apus bench constrained`
struct BenchConstrained: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "constrained",
    abstract: "Measures what a grammar costs a decoding batch, and what jump-forward gains.",
    discussion: """
      Two questions, each answered by runs that take turns in one process:

      Cost: --batch requests decode --tokens tokens each from one prompt, free in one run and, in the next, held to JSON that \
      is longer than that, with every token drawn. Reported is the time per token of both and the median ratio of the pairs.

      Gain: the same number of requests write one record of a fixed format to its end, with and without jump-forward, for \
      each policy of white space. Reported are characters per second, tokens, and forward passes per answer.

      Examples:
        apus bench constrained Models/apus-demo
        apus bench constrained Models/apus-demo --batch 16 --tokens 200 --rounds 9 --output-file result.json
      """)

  @OptionGroup(title: "Model and engine") var engine: EngineOptions
  @Option(help: ArgumentHelp("Requests at once.", valueName: "count"))
  var batch = 16
  @Option(help: ArgumentHelp("Tokens that each request generates where the cost is measured.", valueName: "count"))
  var tokens = 128
  @Option(help: ArgumentHelp("Pairs of runs.", valueName: "count"))
  var rounds = 7
  @Option(help: ArgumentHelp("Writes the result as JSON; - is standard output.", valueName: "path"))
  var outputFile: String?
  @Flag(name: [.long, .short], help: "Prints no progress and no table.")
  var quiet = false

  func validate() throws {
    if !(1...4096).contains(batch) { throw ValidationError("--batch must be in 1...4096, got \(batch).") }
    if tokens < 2 { throw ValidationError("--tokens must be at least 2, got \(tokens).") }
    if rounds < 1 { throw ValidationError("--rounds must be at least 1, got \(rounds).") }
  }

  /// More members than any run has tokens for.
  private static let endless = """
    {"type": "object", "properties": {"records": {"type": "array", "minItems": 100000, "items": {"type": "object",
    "properties": {"id": {"type": "integer"}, "name": {"type": "string"}, "score": {"type": "number"},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}}, "kind": {"enum": ["plant", "animal", "stone"]}},
    "required": ["id", "name", "score", "tags", "kind"], "additionalProperties": false}}},
    "required": ["records"], "additionalProperties": false}
    """

  /// Little is left open: what tool calls and extraction look like.
  private static let record = """
    {"type": "object", "properties": {"temperature_in_celsius": {"type": "integer", "minimum": -50, "maximum": 50},
    "weather_condition": {"enum": ["sunny", "cloudy", "rainy", "snowy"]},
    "wind": {"type": "object", "properties": {"direction": {"enum": ["north", "east", "south", "west"]},
    "speed_in_kilometers_per_hour": {"type": "integer", "minimum": 0, "maximum": 200}},
    "required": ["direction", "speed_in_kilometers_per_hour"], "additionalProperties": false},
    "is_a_warning_in_effect": {"type": "boolean"}, "date_of_observation": {"type": "string", "format": "date"}},
    "required": ["temperature_in_celsius", "weather_condition", "wind", "is_a_warning_in_effect", "date_of_observation"],
    "additionalProperties": false}
    """

  private struct Run {
    var seconds = 0.0
    var tokens = 0
    var characters = 0
    var steps = 0
    var forced = 0
    var ended = 0
  }

  func run() async throws {
    var configuration = try await engine.configuration(isQuiet: quiet)
    configuration.maxRunningRequests = max(configuration.maxRunningRequests, batch)
    configuration.enablesJumpForward = true
    let jumping = try await Engine.start(configuration)
    configuration.enablesJumpForward = false
    let drawing: Engine
    do {
      drawing = try await Engine.start(configuration)
    } catch {
      await jumping.shutdown()
      throw error
    }
    do {
      try await measure(jumping: jumping, drawing: drawing)
    } catch {
      await jumping.shutdown()
      await drawing.shutdown()
      throw error
    }
    await jumping.shutdown()
    await drawing.shutdown()
  }

  private func measure(jumping: Engine, drawing: Engine) async throws {
    let model = jumping.model
    let prompt = try jumping.encode(
      "The weather today, and then a list of all we found, as JSON: ", addSpecialTokens: true)
    guard prompt.count + tokens <= model.contextLength else {
      throw CommandFailure(
        "--tokens \(tokens) and a prompt of \(prompt.count) exceed the context of \(model.contextLength) tokens.",
        status: ExitStatus.invalidInput)
    }
    var free: [Double] = []
    var held: [Double] = []
    var forcedInDraws = 0
    for round in 0...rounds {
      // The first pair compiles the grammar and fills its masks; later ones are counted.
      let plain = try await run(drawing, prompt, seed: round, tokens: tokens, nil, .flexible)
      let json = try await run(drawing, prompt, seed: round, tokens: tokens, Self.endless, .fixed)
      forcedInDraws += json.forced
      if round == 0 { continue }
      free.append(plain.seconds / Double(plain.tokens))
      held.append(json.seconds / Double(json.tokens))
    }
    let cost = Summary(zip(held, free).map { $0 / $1 })
    let (freeSummary, heldSummary) = (Summary(free), Summary(held))
    if !quiet {
      Terminal.output.line(
        "\(model.name), \(batch) requests at once, \(tokens) tokens each, \(rounds) pairs of runs.\n"
          + "us per token: free \(fixed(freeSummary.median * 1e6, 1)), JSON \(fixed(heldSummary.median * 1e6, 1)); "
          + "median ratio \(fixed(cost.median, 3)) (\(fixed(cost.minimum, 3)) to \(fixed(cost.maximum, 3)))\n")
      Terminal.output.line(
        "white space".padded(12)
          + ["chars/s drawn", "jumping", "gain", "passes drawn", "jumping", "forced"].map { $0.aligned(14) }.joined())
    }
    var gains = JSONObject()
    for whitespace in GrammarSpecification.Whitespace.allCases {
      var pairs: [(drawn: Run, jumped: Run)] = []
      for round in 0...rounds {
        let drawn = try await run(drawing, prompt, seed: round, tokens: nil, Self.record, whitespace)
        let jumped = try await run(jumping, prompt, seed: round, tokens: nil, Self.record, whitespace)
        if round > 0 { pairs.append((drawn, jumped)) }
      }
      func rate(_ run: Run) -> Double { Double(run.characters) / run.seconds }
      func passes(_ runs: [Run]) -> Double { Double(runs.reduce(0) { $0 + $1.steps }) / Double(runs.count) }
      let gain = Summary(pairs.map { rate($0.jumped) / rate($0.drawn) })
      let (drawn, jumped) = (pairs.map(\.drawn), pairs.map(\.jumped))
      let forced = Double(jumped.reduce(0) { $0 + $1.forced }) / Double(max(1, jumped.reduce(0) { $0 + $1.tokens }))
      let answers = batch * rounds
      if !quiet {
        let columns = [
          fixed(Summary(drawn.map(rate)).median, 0), fixed(Summary(jumped.map(rate)).median, 0), fixed(gain.median, 2),
          fixed(passes(drawn), 1), fixed(passes(jumped), 1), fixed(forced * 100, 0) + "%",
        ]
        Terminal.output.line(whitespace.rawValue.padded(12) + columns.map { $0.aligned(14) }.joined())
      }
      gains[whitespace.rawValue] = [
        "characters_per_second_drawn": Summary(drawn.map(rate)).json(),
        "characters_per_second_jumping": Summary(jumped.map(rate)).json(), "gain": gain.json(),
        "passes_drawn": .double(passes(drawn)), "passes_jumping": .double(passes(jumped)),
        "forced_share": .double(forced),
        "answers_ended": .double(Double(jumped.reduce(0) { $0 + $1.ended }) / Double(answers)),
        "characters_per_answer": .double(Double(jumped.reduce(0) { $0 + $1.characters }) / Double(answers)),
        "tokens_per_answer": .double(Double(jumped.reduce(0) { $0 + $1.tokens }) / Double(answers)),
      ]
    }
    if let outputFile {
      try emit(
        [
          "model": .string(model.name), "batch": .int(Int64(batch)), "tokens": .int(Int64(tokens)),
          "rounds": .int(Int64(rounds)), "free_us_per_token": freeSummary.json(scale: 1e6),
          "json_us_per_token": heldSummary.json(scale: 1e6), "cost_ratio": cost.json(), "jump_forward": .object(gains),
        ], to: outputFile)
    }
    if forcedInDraws > 0 { throw CommandFailure("Tokens were forced where every one was to be drawn.") }
  }

  /// Generates for the whole batch. Time begins when the first request is submitted and ends with the last answer.
  private func run(
    _ engine: Engine, _ prompt: [TokenID], seed: Int, tokens: Int?, _ schema: String?,
    _ whitespace: GrammarSpecification.Whitespace
  ) async throws -> Run {
    let before = engine.statistics()
    let start = monotonicSeconds()
    var streams: [GenerationStream] = []
    for index in 0..<batch {
      var sampling = SamplingParameters()
      sampling.temperature = 0.8
      sampling.seed = UInt64(seed * batch + index)
      sampling.maxNewTokens = tokens ?? min(400, engine.model.contextLength - prompt.count)
      sampling.ignoreEOS = schema == nil
      sampling.grammar = schema.map { .jsonSchema($0) }
      sampling.jsonWhitespace = whitespace
      streams.append(try engine.generate(Request(prompt: .tokens(prompt), sampling: sampling)))
    }
    var run = Run()
    for stream in streams {
      let result = try await stream.result()
      run.tokens += result.tokens.count
      run.characters += result.text.count
      if case .stop = result.finishReason { run.ended += 1 }
      if case .abort(let reason) = result.finishReason { throw CommandFailure("A request failed: \(reason)") }
    }
    run.seconds = monotonicSeconds() - start
    let after = engine.statistics()
    run.steps = after.steps - before.steps
    run.forced = after.forcedTokens - before.forcedTokens
    return run
  }
}
