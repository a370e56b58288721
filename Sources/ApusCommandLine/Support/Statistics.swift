package import ApusCore

/// What a set of measurements looks like. Empty sets are all zeroes with `count` 0.
package struct Summary: Sendable, Equatable {
  package var count = 0
  package var mean = 0.0
  package var median = 0.0
  package var p90 = 0.0
  package var p95 = 0.0
  package var p99 = 0.0
  package var minimum = 0.0
  package var maximum = 0.0
  package var standardDeviation = 0.0

  /// Summarises values in any order.
  package init(_ values: [Double]) {
    guard !values.isEmpty else { return }
    let sorted = values.sorted()
    count = sorted.count
    mean = sorted.reduce(0, +) / Double(count)
    median = percentile(ofSorted: sorted, 50)
    p90 = percentile(ofSorted: sorted, 90)
    p95 = percentile(ofSorted: sorted, 95)
    p99 = percentile(ofSorted: sorted, 99)
    minimum = sorted[0]
    maximum = sorted[count - 1]
    let squares = sorted.reduce(0) { $0 + ($1 - mean) * ($1 - mean) }
    standardDeviation = (squares / Double(count)).squareRoot()
  }

  /// The summary as JSON, every value times `scale`.
  package func json(scale: Double = 1) -> JSONValue {
    .object(
      JSONObject([
        ("count", .int(Int64(count))), ("mean", .double(mean * scale)), ("median", .double(median * scale)),
        ("p90", .double(p90 * scale)), ("p95", .double(p95 * scale)), ("p99", .double(p99 * scale)),
        ("min", .double(minimum * scale)), ("max", .double(maximum * scale)),
        ("std", .double(standardDeviation * scale)),
      ]))
  }
}

/// The percentile of sorted values with linear interpolation between neighbours, as NumPy computes it by default.
/// - Parameter percent: in 0...100.
package func percentile(ofSorted values: [Double], _ percent: Double) -> Double {
  guard let last = values.last else { return 0 }
  let position = percent / 100 * Double(values.count - 1)
  let index = Int(position)
  guard index + 1 < values.count else { return last }
  let fraction = position - Double(index)
  return values[index] + (values[index + 1] - values[index]) * fraction
}
