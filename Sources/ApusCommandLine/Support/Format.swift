/// A number with a fixed count of decimals, rounded half away from zero.
package func fixed(_ value: Double, _ decimals: Int) -> String {
  guard value.isFinite else { return value.isNaN ? "-" : (value < 0 ? "-inf" : "inf") }
  var scale = 1.0
  for _ in 0..<decimals { scale *= 10 }
  let scaled = (value.magnitude * scale).rounded()
  guard scaled < 9e15 else { return "\(value)" }
  let digits = String(UInt64(scaled))
  let sign = value < 0 && scaled > 0 ? "-" : ""
  if decimals == 0 { return sign + digits }
  let padded = String(repeating: "0", count: max(0, decimals + 1 - digits.count)) + digits
  return sign + padded.dropLast(decimals) + "." + padded.suffix(decimals)
}

/// A count with thin groups: 1234567 is `1,234,567`.
package func grouped(_ value: Int) -> String {
  let digits = String(value.magnitude)
  var text = ""
  for (index, digit) in digits.enumerated() {
    if index > 0 && (digits.count - index) % 3 == 0 { text.append(",") }
    text.append(digit)
  }
  return (value < 0 ? "-" : "") + text
}

/// A number of bytes in the unit that keeps it short.
package func byteSize(_ bytes: Int) -> String {
  let units = ["B", "KiB", "MiB", "GiB", "TiB"]
  var value = Double(bytes)
  var unit = 0
  while value >= 1024 && unit < units.count - 1 {
    value /= 1024
    unit += 1
  }
  return unit == 0 ? "\(bytes) B" : "\(fixed(value, value < 10 ? 2 : value < 100 ? 1 : 0)) \(units[unit])"
}

/// Seconds as a person would say them.
package func duration(_ seconds: Double) -> String {
  if seconds < 1e-3 { return "\(fixed(seconds * 1e6, 0)) us" }
  if seconds < 1 { return "\(fixed(seconds * 1e3, seconds < 0.01 ? 2 : 0)) ms" }
  if seconds < 60 { return "\(fixed(seconds, 1)) s" }
  let whole = Int(seconds.rounded())
  if whole < 3600 { return "\(whole / 60)m\(twoDigits(whole % 60))s" }
  return "\(whole / 3600)h\(twoDigits(whole / 60 % 60))m"
}

private func twoDigits(_ value: Int) -> String { value < 10 ? "0\(value)" : "\(value)" }

extension String {
  /// The text filled with spaces on the right up to a width.
  func padded(_ width: Int) -> String {
    count >= width ? self : self + String(repeating: " ", count: width - count)
  }

  /// The text filled with spaces on the left up to a width.
  func aligned(_ width: Int) -> String {
    count >= width ? self : String(repeating: " ", count: width - count) + self
  }
}
