public import Metrics
import Synchronization

/// A backend of swift-metrics that renders what it holds in Prometheus' text format.
///
/// Hand-written because no exporter package is to be had. Counters, gauges and histograms; labels are the dimensions of
/// swift-metrics. A program that wants the metrics of its other libraries here too can pass the registry to
/// `MetricsSystem.bootstrap`.
public final class PrometheusRegistry: MetricsFactory, Sendable {
  /// What Prometheus calls the type of a metric.
  enum Kind: String { case counter, gauge, histogram }

  private struct Family {
    var kind: Kind
    var help = ""
    var series: [String: any PrometheusSeries] = [:]
  }

  private struct State {
    var families: [String: Family] = [:]
    var help: [String: String] = [:]
    var buckets: [String: [Double]] = [:]
  }

  private let state = Mutex(State())
  private let defaultBuckets: [Double]

  /// Bounds for latencies from a millisecond to ten minutes, in seconds.
  public static let latencyBuckets = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600,
  ]

  /// An empty registry.
  ///
  /// - Parameter defaultBuckets: the upper bounds of a histogram's buckets where `describe` gave none, ascending.
  public init(defaultBuckets: [Double] = PrometheusRegistry.latencyBuckets) { self.defaultBuckets = defaultBuckets }

  /// Gives a metric its help text and, if it is a histogram, its bounds; takes effect for series made afterwards.
  public func describe(_ label: String, help: String, buckets: [Double]? = nil) {
    state.withLock { state in
      let name = prometheusName(label)
      state.help[name] = help
      state.buckets[name] = buckets
    }
  }

  private func series<Series: PrometheusSeries>(
    _ label: String, _ dimensions: [(String, String)], _ kind: Kind, _ make: (State) -> Series
  ) -> Series {
    let name = prometheusName(label)
    let labels = prometheusLabels(dimensions)
    return state.withLock { state in
      var family = state.families[name] ?? Family(kind: kind)
      if let existing = family.series[labels] as? Series { return existing }
      let series = make(state)
      // A name already used for another kind of metric is a mistake of the caller: the series works, unseen.
      if family.kind == kind { family.series[labels] = series }
      state.families[name] = family
      return series
    }
  }

  public func makeCounter(label: String, dimensions: [(String, String)]) -> any CounterHandler {
    series(label, dimensions, .counter) { _ in PrometheusCounter() }
  }

  public func makeFloatingPointCounter(
    label: String, dimensions: [(String, String)]
  ) -> any FloatingPointCounterHandler {
    series(label, dimensions, .counter) { _ in PrometheusFloatingPointCounter() }
  }

  public func makeMeter(label: String, dimensions: [(String, String)]) -> any MeterHandler {
    series(label, dimensions, .gauge) { _ in PrometheusGauge() }
  }

  public func makeRecorder(
    label: String, dimensions: [(String, String)], aggregate: Bool
  ) -> any RecorderHandler {
    if !aggregate { return series(label, dimensions, .gauge) { _ in PrometheusGauge() } }
    let name = prometheusName(label)
    return series(label, dimensions, .histogram) { state in
      PrometheusHistogram(bounds: state.buckets[name] ?? self.defaultBuckets)
    }
  }

  public func makeTimer(label: String, dimensions: [(String, String)]) -> any TimerHandler {
    let name = prometheusName(label)
    return series(label, dimensions, .histogram) { state in
      PrometheusHistogram(bounds: state.buckets[name] ?? self.defaultBuckets)
    }
  }

  public func destroyCounter(_ handler: any CounterHandler) { remove(handler) }
  public func destroyFloatingPointCounter(_ handler: any FloatingPointCounterHandler) { remove(handler) }
  public func destroyMeter(_ handler: any MeterHandler) { remove(handler) }
  public func destroyRecorder(_ handler: any RecorderHandler) { remove(handler) }
  public func destroyTimer(_ handler: any TimerHandler) { remove(handler) }

  private func remove(_ handler: AnyObject) {
    state.withLock { state in
      for (name, family) in state.families {
        for (labels, series) in family.series where series === handler {
          state.families[name]?.series[labels] = nil
        }
      }
    }
  }

  /// All metrics in Prometheus' text format, families and series in the order of their names.
  public func render() -> String {
    var text = PrometheusText()
    render(into: &text)
    return text.text
  }

  func render(into text: inout PrometheusText) {
    let (families, help) = state.withLock { ($0.families, $0.help) }
    for (name, family) in families.sorted(by: { $0.key < $1.key }) where !family.series.isEmpty {
      text.family(name, family.kind.rawValue, help[name] ?? "")
      for (labels, series) in family.series.sorted(by: { $0.key < $1.key }) { series.render(name, labels, into: &text) }
    }
  }
}

/// Builds a document in Prometheus' text format.
struct PrometheusText {
  private(set) var text = ""

  /// Begins a family of samples.
  mutating func family(_ name: String, _ kind: String, _ help: String) {
    if !help.isEmpty {
      text += "# HELP \(name) \(help.replacing("\\", with: "\\\\").replacing("\n", with: "\\n"))\n"
    }
    text += "# TYPE \(name) \(kind)\n"
  }

  /// Adds a sample; `labels` is what `prometheusLabels` made.
  mutating func sample(_ name: String, _ labels: String, _ value: Double) {
    text += labels.isEmpty ? name : "\(name){\(labels)}"
    text += value == value.rounded() && value.magnitude < 1e15 ? " \(Int(value))\n" : " \(spelled(value))\n"
  }

  private func spelled(_ value: Double) -> String {
    value.isNaN ? "NaN" : value.isInfinite ? (value < 0 ? "-Inf" : "+Inf") : "\(value)"
  }

  /// Begins a family of one sample.
  mutating func single(
    _ name: String, _ kind: PrometheusRegistry.Kind, _ help: String, _ labels: String, _ value: Double
  ) {
    family(name, kind.rawValue, help)
    sample(name, labels, value)
  }
}

/// A metric name with what Prometheus does not allow replaced by underscores.
func prometheusName(_ label: String) -> String {
  var name = ""
  for scalar in label.unicodeScalars {
    let isAllowed =
      scalar.isASCII
      && (scalar.properties.isAlphabetic || scalar == "_" || scalar == ":"
        || (scalar.properties.numericType != nil && !name.isEmpty))
    name.unicodeScalars.append(isAllowed ? scalar : "_")
  }
  return name
}

/// The labels of a series as they stand between braces.
func prometheusLabels(_ dimensions: [(String, String)]) -> String {
  dimensions.map { name, value in
    let escaped = value.replacing("\\", with: "\\\\").replacing("\"", with: "\\\"").replacing("\n", with: "\\n")
    return "\(prometheusName(name).replacing(":", with: "_"))=\"\(escaped)\""
  }.joined(separator: ",")
}

/// One line or one histogram of a family.
protocol PrometheusSeries: AnyObject, Sendable {
  func render(_ name: String, _ labels: String, into text: inout PrometheusText)
}

final class PrometheusCounter: CounterHandler, PrometheusSeries {
  private let value = Atomic<Int64>(0)
  func increment(by amount: Int64) { value.wrappingAdd(amount, ordering: .relaxed) }
  func reset() { value.store(0, ordering: .relaxed) }
  func render(_ name: String, _ labels: String, into text: inout PrometheusText) {
    text.sample(name, labels, Double(value.load(ordering: .relaxed)))
  }
}

final class PrometheusFloatingPointCounter: FloatingPointCounterHandler, PrometheusSeries {
  private let value = Mutex(0.0)
  func increment(by amount: Double) { value.withLock { $0 += max(0, amount) } }
  func reset() { value.withLock { $0 = 0 } }
  func render(_ name: String, _ labels: String, into text: inout PrometheusText) {
    text.sample(name, labels, value.withLock { $0 })
  }
}

final class PrometheusGauge: MeterHandler, RecorderHandler, PrometheusSeries {
  private let value = Mutex(0.0)
  func set(_ value: Int64) { set(Double(value)) }
  func set(_ value: Double) { self.value.withLock { $0 = value } }
  func increment(by amount: Double) { value.withLock { $0 += amount } }
  func decrement(by amount: Double) { value.withLock { $0 -= amount } }
  func record(_ value: Int64) { set(Double(value)) }
  func record(_ value: Double) { set(value) }
  func render(_ name: String, _ labels: String, into text: inout PrometheusText) {
    text.sample(name, labels, value.withLock { $0 })
  }
}

/// Counts of values by bucket. As a timer it counts seconds.
final class PrometheusHistogram: RecorderHandler, TimerHandler, PrometheusSeries {
  private struct State {
    var counts: [Int]
    var sum = 0.0
  }

  private let bounds: [Double]
  private let state: Mutex<State>

  init(bounds: [Double]) {
    self.bounds = bounds
    state = Mutex(State(counts: Array(repeating: 0, count: bounds.count + 1)))
  }

  func record(_ value: Int64) { record(Double(value)) }
  func record(_ value: Double) { record(value, times: 1) }
  func recordNanoseconds(_ duration: Int64) { record(Double(duration) * 1e-9) }

  func record(_ value: Double, times: Int) {
    let bucket = bounds.firstIndex { value <= $0 } ?? bounds.count
    state.withLock { state in
      state.counts[bucket] += times
      state.sum += value * Double(times)
    }
  }

  func render(_ name: String, _ labels: String, into text: inout PrometheusText) {
    let (counts, sum) = state.withLock { ($0.counts, $0.sum) }
    let separator = labels.isEmpty ? "" : ","
    var total = 0
    for (bound, count) in zip(bounds, counts) {
      total += count
      text.sample("\(name)_bucket", "\(labels)\(separator)le=\"\(bound)\"", Double(total))
    }
    total += counts[bounds.count]
    text.sample("\(name)_bucket", "\(labels)\(separator)le=\"+Inf\"", Double(total))
    text.sample("\(name)_sum", labels, sum)
    text.sample("\(name)_count", labels, Double(total))
  }
}
