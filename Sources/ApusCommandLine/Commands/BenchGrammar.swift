import ApusCore
import ApusGrammar
import ApusTokenization
import ArgumentParser

/// `apus bench grammar`
struct BenchGrammar: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "grammar",
    abstract: "Measures how long grammars take to compile and token masks to fill.",
    discussion: """
      Reads JSON lines, each with a schema (or "regex", "ebnf", "choices", as apus grammar reads them) and texts in \
      "instances", or in "tests" as {"data": any JSON, "valid": true}. Each grammar is compiled once. Then each valid text is \
      tokenized and its tokens are followed as a generation would: fill the mask, accept the token. A mask's time is that of \
      the fill alone, and includes all that is computed at its first use.

      Examples:
        apus bench grammar --tokenizer models/Llama-3.2-1B --schemas schemas.jsonl
        apus bench grammar --tokenizer tokenizer.json --schemas schemas.jsonl --limit 200 --json
      """)

  @Option(
    help: ArgumentHelp("A checkpoint directory or a tokenizer's file.", valueName: "path"), completion: .file())
  var tokenizer: String
  @Option(help: ArgumentHelp("A file of JSON lines with grammars and texts.", valueName: "path"), completion: .file())
  var schemas: String
  @Option(help: ArgumentHelp("Reads at most this many lines; 0 reads all.", valueName: "count"))
  var limit = 0
  @Flag(help: "Prints the result as JSON.")
  var json = false
  @Flag(help: "Prints each line's slowest mask as a JSON line before the result.")
  var details = false
  @OptionGroup var options: GrammarOptions

  func run() throws {
    let loaded = try loadTokenizer(tokenizer)
    let start = monotonicSeconds()
    let checker = GrammarChecker(tokenizer: loaded)
    let vocabularySeconds = monotonicSeconds() - start
    let reader = try LineReader(path: schemas)
    var compiles: [Double] = []
    var fills: [Double] = []
    var accepts: [Double] = []
    var refused = 0
    var failed = 0
    var lines = 0
    while let line = try reader.next() {
      if line.isEmpty { continue }
      if limit > 0, lines >= limit { break }
      lines += 1
      guard let value = try? JSONValue.parse(line) else {
        throw CommandFailure("Line \(lines) of \(schemas) is not JSON.", status: ExitStatus.invalidInput)
      }
      let specification = try options.specification(value)
      let begin = monotonicSeconds()
      let grammar: CompiledGrammar
      do throws(EngineError) {
        grammar = try checker.compiler.compile(specification)
      } catch {
        refused += 1
        continue
      }
      compiles.append(monotonicSeconds() - begin)
      var slowest = 0.0
      for text in Self.texts(value) {
        let tokens = try loaded.encode(text, addSpecialTokens: false)
        let walk = monotonicSeconds()
        var filling = 0.0
        let passed = try checker.walk(tokens, GrammarMatcher(grammar)) { seconds in
          fills.append(seconds)
          filling += seconds
          slowest = max(slowest, seconds)
        }
        if !passed { failed += 1 }
        if !tokens.isEmpty { accepts.append((monotonicSeconds() - walk - filling) / Double(tokens.count)) }
      }
      if details {
        Terminal.output.line(
          JSONValue.object(
            JSONObject([
              ("line", .int(Int64(lines))), ("name", value["name"] ?? .null),
              ("compile_us", .double((compiles.last ?? 0) * 1e6)), ("mask_us_max", .double(slowest * 1e6)),
            ])
          ).compactText)
      }
    }
    let compile = Summary(compiles)
    let fill = Summary(fills)
    let accept = Summary(accepts)
    if json {
      let result: JSONValue = [
        "lines": .int(Int64(lines)), "refused": .int(Int64(refused)), "texts_rejected": .int(Int64(failed)),
        "vocabulary": .int(Int64(loaded.vocabularySize)), "vocabulary_ms": .double(vocabularySeconds * 1e3),
        "compile_us": compile.json(scale: 1e6), "mask_us": fill.json(scale: 1e6),
        "accept_us": accept.json(scale: 1e6), "peak_rss_bytes": .int(Int64(peakResidentBytes())),
      ]
      Terminal.output.line(result.compactText)
      return
    }
    Terminal.output.line(
      "\(lines) lines, \(refused) refused, \(failed) texts rejected; vocabulary of \(loaded.vocabularySize) tokens read "
        + "in \(fixed(vocabularySeconds * 1e3, 0)) ms.")
    Terminal.output.line(
      "us".padded(10) + ["count", "mean", "median", "p90", "p99", "max"].map { $0.aligned(12) }.joined())
    for (name, summary) in [("compile", compile), ("mask", fill), ("accept", accept)] {
      let columns = [
        "\(summary.count)", fixed(summary.mean * 1e6, 1), fixed(summary.median * 1e6, 1), fixed(summary.p90 * 1e6, 1),
        fixed(summary.p99 * 1e6, 1), fixed(summary.maximum * 1e6, 1),
      ]
      Terminal.output.line(name.padded(10) + columns.map { $0.aligned(12) }.joined())
    }
    Terminal.output.line("Peak memory: \(byteSize(peakResidentBytes())).")
  }

  /// The valid texts of a line.
  private static func texts(_ value: JSONValue) -> [String] {
    var texts = (value["instances"]?.arrayValue ?? []).compactMap(\.stringValue)
    for test in value["tests"]?.arrayValue ?? [] where test["valid"]?.boolValue == true {
      if let data = test["data"] { texts.append(data.compactText) }
    }
    return texts
  }
}
