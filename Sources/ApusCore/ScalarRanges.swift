/// A set of Unicode scalars as sorted, disjoint, inclusive ranges: the form in which
/// patterns and grammars are parsed.
package struct ScalarRanges: Sendable, Hashable {
  package private(set) var ranges: [ClosedRange<UInt32>] = []

  package init() {}

  /// A set of the ranges given, in any order.
  package init(_ unsorted: [ClosedRange<UInt32>]) {
    ranges.reserveCapacity(unsorted.count)
    for range in unsorted.sorted(by: { $0.lowerBound < $1.lowerBound }) {
      if let last = ranges.last, range.lowerBound <= last.upperBound &+ 1 {
        ranges[ranges.count - 1] = last.lowerBound...Swift.max(last.upperBound, range.upperBound)
      } else {
        ranges.append(range)
      }
    }
  }

  package init(_ scalar: UInt32) { ranges = [scalar...scalar] }

  package static let all = ScalarRanges([0...0x10FFFF])

  package var isEmpty: Bool { ranges.isEmpty }

  package func union(_ other: ScalarRanges) -> ScalarRanges {
    if isEmpty { return other }
    if other.isEmpty { return self }
    return ScalarRanges(ranges + other.ranges)
  }

  package var inverted: ScalarRanges {
    var result = ScalarRanges()
    var next: UInt32 = 0
    for range in ranges {
      if range.lowerBound > next { result.ranges.append(next...(range.lowerBound - 1)) }
      next = range.upperBound + 1
    }
    if next <= 0x10FFFF { result.ranges.append(next...0x10FFFF) }
    return result
  }

  package func intersection(_ other: ScalarRanges) -> ScalarRanges {
    var result = ScalarRanges()
    var left = 0
    var right = 0
    while left < ranges.count, right < other.ranges.count {
      let low = Swift.max(ranges[left].lowerBound, other.ranges[right].lowerBound)
      let high = Swift.min(ranges[left].upperBound, other.ranges[right].upperBound)
      if low <= high { result.ranges.append(low...high) }
      if ranges[left].upperBound < other.ranges[right].upperBound { left += 1 } else { right += 1 }
    }
    return result
  }

  /// The set with every case variant of its members.
  package var foldingCase: ScalarRanges {
    var extra: [ClosedRange<UInt32>] = []
    let variants = UnicodeTables.shared.caseVariants
    for range in ranges {
      if range.count > variants.count {
        for (scalar, others) in variants where range.contains(scalar) { extra += others.map { $0...$0 } }
      } else {
        for scalar in range { if let others = variants[scalar] { extra += others.map { $0...$0 } } }
      }
    }
    return extra.isEmpty ? self : ScalarRanges(ranges + extra)
  }
}
