import ApusCore
import ArgumentParser

/// What was measured of one thing: samples of it and of the machine's ceiling, taken in turns.
struct Measurement: Sendable {
  /// What was measured, the same from run to run, such as `linear int4 9728x896 rows 1`.
  var name: String
  /// `GB/s`, `GFLOP/s` or `tokens/s`.
  var unit: String
  /// Sizes by name.
  var shape: [(String, Int)]
  var samples: [Double]
  /// What the ceiling is, such as `memory read`; empty where there is none.
  var ceilingName = ""
  var ceilingSamples: [Double] = []

  /// The median.
  var value: Double { Summary(samples).median }
  var ceiling: Double? { ceilingSamples.isEmpty ? nil : Summary(ceilingSamples).median }
  /// The median of the samples' shares of the ceilings that were measured beside them.
  var share: Double? {
    ceilingSamples.isEmpty ? nil : Summary(zip(samples, ceilingSamples).map { $0 / $1 }).median
  }

  var json: JSONValue {
    var object = JSONObject([
      ("name", .string(name)), ("unit", .string(unit)),
      ("shape", .object(JSONObject(shape.map { ($0.0, .int(Int64($0.1))) }))), ("value", .double(value)),
      ("samples", .array(samples.map { .double($0) })),
    ])
    if let ceiling, let share {
      object["ceiling_name"] = .string(ceilingName)
      object["ceiling"] = .double(ceiling)
      object["ceiling_samples"] = .array(ceilingSamples.map { .double($0) })
      object["share"] = .double(share)
    }
    return .object(object)
  }

  /// A line of the table that `header` begins.
  var line: String {
    let summary = Summary(samples)
    let spread = "\(fixed(summary.minimum, 1))-\(fixed(summary.maximum, 1))"
    let columns = [
      fixed(value, 1), unit, spread, ceiling.map { fixed($0, 1) } ?? "-",
      share.map { "\(fixed($0 * 100, 0))%" } ?? "-",
    ]
    return name.padded(52) + zip(columns, [10, 10, 16, 10, 7]).map { $0.aligned($1) }.joined()
  }

  static let header =
    "Measured".padded(52)
    + zip(["median", "unit", "range", "ceiling", "share"], [10, 10, 16, 10, 7]).map { $0.aligned($1) }.joined()
}

/// What benchmarks of kernels and of static batches have in common.
struct MeasurementOptions: ParsableArguments {
  @Option(help: ArgumentHelp("Samples of each figure, taken in turns with its ceiling.", valueName: "count"))
  var samples = 5
  @Option(help: ArgumentHelp("The least time that a sample takes.", valueName: "milliseconds"))
  var sampleMs = 50.0
  @Option(
    name: [.customLong("json"), .long],
    help: ArgumentHelp("Writes every figure as JSON; - is standard output.", valueName: "path"))
  var outputFile: String?
  @Option(
    parsing: .upToNextOption,
    help: ArgumentHelp(
      "Measures nothing: prints the ratios of two files of results, the second by the first.", valueName: "path"))
  var compare: [String] = []
  @Flag(name: [.long, .short], help: "Prints no table.")
  var quiet = false

  func validate() throws {
    if samples < 1 || samples > 1000 { throw ValidationError("--samples must be in 1...1000, got \(samples).") }
    if !(sampleMs > 0 && sampleMs <= 60_000) {
      throw ValidationError("--sample-ms must be above 0 and at most 60000, got \(sampleMs).")
    }
    if !compare.isEmpty && compare.count != 2 {
      throw ValidationError("--compare takes two files, got \(compare.count).")
    }
  }

  /// Prints the comparison if one was asked for.
  func printsComparison() throws -> Bool {
    guard compare.count == 2 else { return false }
    let (first, second) = (try read(compare[0]), try read(compare[1]))
    var found = 0
    Terminal.output.line("Measured".padded(52) + ["first", "second", "ratio"].map { $0.aligned(12) }.joined())
    for (name, value) in first {
      guard let other = second.first(where: { $0.0 == name })?.1 else { continue }
      found += 1
      let columns = [fixed(value, 1), fixed(other, 1), value > 0 ? fixed(other / value, 3) : "-"]
      Terminal.output.line(name.padded(52) + columns.map { $0.aligned(12) }.joined())
    }
    if found == 0 {
      throw CommandFailure("The two files have no figure in common.", status: ExitStatus.missingInput)
    }
    return true
  }

  private func read(_ path: String) throws -> [(String, Double)] {
    let json: JSONValue
    do { json = try JSONValue.parse(readFile(path)) } catch let error as JSONError {
      throw CommandFailure("\(path) is not JSON: \(error).", status: ExitStatus.missingInput)
    }
    let values = json["results"]?.arrayValue ?? []
    return values.compactMap { result in
      guard let name = result["name"]?.stringValue, let value = result["value"]?.doubleValue else { return nil }
      return (name, value)
    }
  }

  /// Writes the figures where they are wanted.
  func write(_ results: [Measurement], _ facts: [(String, JSONValue)]) throws {
    guard let outputFile else { return }
    var object = JSONObject(facts)
    object["results"] = .array(results.map(\.json))
    try emit(.object(object), to: outputFile)
  }

  /// Runs `body` often enough to last a sample's time.
  /// - Returns: seconds of one call.
  func seconds(_ body: () -> Void) -> Double {
    let start = monotonicSeconds()
    var count = 0
    var elapsed = 0.0
    repeat {
      body()
      count += 1
      elapsed = monotonicSeconds() - start
    } while elapsed * 1000 < sampleMs
    return elapsed / Double(count)
  }
}
