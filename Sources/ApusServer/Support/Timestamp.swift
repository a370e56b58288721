/// A moment as RFC 3339 writes it in UTC, such as `2025-11-25T23:37:00Z`.
///
/// The date comes of counting in eras of 400 years that begin with March, so that the leap day is a year's last; see Howard
/// Hinnant, "chrono-compatible low-level date algorithms".
///
/// - Parameter seconds: seconds since 1970, at least 0.
package func timestamp(_ seconds: Int) -> String {
  func padded(_ value: Int, _ width: Int) -> String {
    let digits = String(value)
    return String(repeating: "0", count: max(0, width - digits.utf8.count)) + digits
  }
  let (day, second) = seconds.quotientAndRemainder(dividingBy: 86_400)
  let shifted = day + 719_468
  let (era, dayOfEra) = shifted.quotientAndRemainder(dividingBy: 146_097)
  let yearOfEra = (dayOfEra - dayOfEra / 1460 + dayOfEra / 36_524 - dayOfEra / 146_096) / 365
  let dayOfYear = dayOfEra - (365 * yearOfEra + yearOfEra / 4 - yearOfEra / 100)
  // Counted from March.
  let month = (5 * dayOfYear + 2) / 153
  let dayOfMonth = dayOfYear - (153 * month + 2) / 5 + 1
  let calendarMonth = month < 10 ? month + 3 : month - 9
  let year = yearOfEra + era * 400 + (calendarMonth <= 2 ? 1 : 0)
  let date = "\(padded(year, 4))-\(padded(calendarMonth, 2))-\(padded(dayOfMonth, 2))"
  return date + "T\(padded(second / 3600, 2)):\(padded(second / 60 % 60, 2)):\(padded(second % 60, 2))Z"
}
