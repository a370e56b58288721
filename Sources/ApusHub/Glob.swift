/// A pattern of file names with the rules of Python's `fnmatchcase`, which huggingface_hub uses: `*` any text including
/// slashes, `?` any character, `[abc]`, `[a-z]`, `[!abc]`. A pattern that ends with a slash means all below the folder.
package struct Glob: Sendable, Equatable {
  private enum Element: Sendable, Equatable {
    case literal(Unicode.Scalar)
    case any
    case anyText
    case oneOf([ClosedRange<UInt32>], isNegated: Bool)
  }

  private var elements: [Element] = []

  /// Reads a pattern. Every text is one: an unclosed bracket stands for itself.
  package init(_ pattern: String) {
    let scalars = Array((pattern.hasSuffix("/") ? pattern + "*" : pattern).unicodeScalars)
    var index = 0
    while index < scalars.count {
      let scalar = scalars[index]
      index += 1
      switch scalar {
      case "*": if elements.last != .anyText { elements.append(.anyText) }
      case "?": elements.append(.any)
      case "[":
        var start = index
        let isNegated = start < scalars.count && scalars[start] == "!"
        if isNegated { start += 1 }
        // A bracket right at the start belongs to the set.
        let searchFrom = start < scalars.count && scalars[start] == "]" ? start + 1 : start
        guard let end = scalars[min(searchFrom, scalars.count)...].firstIndex(of: "]") else {
          elements.append(.literal("["))
          continue
        }
        var ranges: [ClosedRange<UInt32>] = []
        var position = start
        while position < end {
          let low = scalars[position].value
          if position + 2 < end && scalars[position + 1] == "-" {
            let high = scalars[position + 2].value
            if low <= high { ranges.append(low...high) }
            position += 3
          } else {
            ranges.append(low...low)
            position += 1
          }
        }
        elements.append(.oneOf(ranges, isNegated: isNegated))
        index = end + 1
      default: elements.append(.literal(scalar))
      }
    }
  }

  /// Whether the whole text matches. Takes time in proportion to text times pattern at most.
  package func matches(_ text: String) -> Bool {
    let scalars = Array(text.unicodeScalars)
    var position = 0, index = 0
    var lastStar: (index: Int, position: Int)?
    while position < scalars.count {
      if index < elements.count {
        if elements[index] == .anyText {
          lastStar = (index, position)
          index += 1
          continue
        }
        if matches(elements[index], scalars[position]) {
          index += 1
          position += 1
          continue
        }
      }
      // The last star takes one more character; earlier stars need not be tried again.
      guard let star = lastStar else { return false }
      lastStar = (star.index, star.position + 1)
      index = star.index + 1
      position = star.position + 1
    }
    return elements[index...].allSatisfy { $0 == .anyText }
  }

  private func matches(_ element: Element, _ scalar: Unicode.Scalar) -> Bool {
    switch element {
    case .literal(let literal): literal == scalar
    case .any, .anyText: true
    case .oneOf(let ranges, let isNegated): ranges.contains { $0.contains(scalar.value) } != isNegated
    }
  }
}
