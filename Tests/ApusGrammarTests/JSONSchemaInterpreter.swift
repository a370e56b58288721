import ApusCore
import ApusGrammar

/// Decides whether a text belongs to a grammar by trying everything, rule by rule: the slow twin of the matcher.
///
/// An expression that starts at a byte may end at several bytes; the interpreter computes the set of all of them.
struct GrammarInterpreter {
  let grammar: Grammar
  let text: [UInt8]
  private var steps = 0
  private var memo: [Key: Set<Int>] = [:]

  private struct Key: Hashable {
    var rule: Int
    var start: Int
  }

  init(_ grammar: Grammar, _ text: [UInt8]) {
    self.grammar = grammar
    self.text = text
  }

  static func accepts(_ grammar: Grammar, _ text: String) -> Bool {
    var interpreter = GrammarInterpreter(grammar, Array(text.utf8))
    return interpreter.ends(grammar.root, 0).contains(interpreter.text.count)
  }

  private mutating func ends(_ expression: GrammarExpression, _ start: Int) -> Set<Int> {
    switch expression {
    case .never: return []
    case .empty: return [start]
    case .literal(let bytes): return text[start...].starts(with: bytes) ? [start + bytes.count] : []
    case .characters(let set): return RegularInterpreter.bytes(text).ends(.scalars(set), start)
    case .sequence(let parts):
      var states: Set<Int> = [start]
      for part in parts {
        var next: Set<Int> = []
        for state in states { next.formUnion(ends(part, state)) }
        states = next
      }
      return states
    case .choice(let parts):
      var result: Set<Int> = []
      for part in parts { result.formUnion(ends(part, start)) }
      return result
    case .repetition(let inner, let minimum, let maximum):
      var result: Set<Int> = minimum == 0 ? [start] : []
      var states: Set<Int> = [start]
      var seen: Set<Int> = [start]
      var count = 0
      while !states.isEmpty, maximum.map({ count < $0 }) ?? true {
        count += 1
        var next: Set<Int> = []
        for state in states { next.formUnion(ends(inner, state)) }
        if count >= minimum {
          result.formUnion(next)
          next.subtract(seen)
          seen.formUnion(next)
        }
        states = next
      }
      return result
    case .rule(let reference):
      let key = Key(rule: reference.index, start: start)
      if let known = memo[key] { return known }
      memo[key] = []
      let result = ends(grammar.rules[reference.index].body, start)
      memo[key] = result
      return result
    case .regular(let expression): return RegularInterpreter.bytes(text).ends(expression, start)
    case .object(let object): return ends(object, start)
    case .array(let array): return ends(array, start)
    case .special, .tags: return []
    }
  }

  // MARK: White space and structure

  private func skip(_ start: Int, _ policy: WhitespacePolicy, afterSeparator: Bool = false) -> Int {
    var index = start
    switch policy {
    case .compact: return start
    case .spaced: return afterSeparator && index < text.count && text[index] == 0x20 ? start + 1 : start
    case .fixed:
      if !afterSeparator { return start }
      // Nothing of JSON begins at the end.
      return index < text.count && text[index] == 0x20 ? start + 1 : text.count
    case .flexible(let maximum):
      while index < text.count, index - start < maximum, [0x20, 0x09, 0x0A, 0x0D].contains(text[index]) { index += 1 }
      return index
    }
  }

  private func next(_ byte: Character, _ index: Int) -> Bool {
    index < text.count && text[index] == byte.asciiValue!
  }

  private mutating func ends(_ array: ArrayExpression, _ start: Int) -> Set<Int> {
    struct State: Hashable {
      var index: Int
      var count = 0
      var matches = 0
    }
    guard next("[", start) else { return [] }
    let policy = array.whitespace
    var result: Set<Int> = []
    var states: Set<State> = []
    let first = skip(start + 1, policy)
    if next("]", first), array.minimumCount == 0, array.minimumMatches == 0 { result.insert(first + 1) }
    states.insert(State(index: first))
    while !states.isEmpty {
      var following: Set<State> = []
      for state in states {
        if let maximum = array.maximumCount, state.count >= maximum { continue }
        let element: ArrayExpression.Element
        if state.count < array.prefix.count {
          element = array.prefix[state.count]
        } else if let items = array.items {
          element = items
        } else {
          continue
        }
        var reached: [(Int, Int)] = ends(element.plain, state.index).map { ($0, state.matches) }
        reached += ends(element.matching, state.index).map { ($0, state.matches + 1) }
        for (end, matches) in reached {
          if let maximum = array.maximumMatches, matches > maximum { continue }
          let after = skip(end, policy)
          let count = state.count + 1
          if next("]", after), count >= array.minimumCount, matches >= array.minimumMatches { result.insert(after + 1) }
          if next(",", after) {
            following.insert(
              State(
                index: skip(after + 1, policy, afterSeparator: true), count: count,
                matches: array.maximumMatches == nil ? min(matches, array.minimumMatches) : matches))
          }
        }
      }
      states = following
    }
    return result
  }

  private mutating func ends(_ object: ObjectExpression, _ start: Int) -> Set<Int> {
    struct State: Hashable {
      var index: Int
      var seen: Set<Int> = []
      var count = 0
      var last = -1
    }
    guard next("{", start) else { return [] }
    let policy = object.whitespace
    var result: Set<Int> = []
    let names = object.properties.map { Array($0.name.utf8) }
    func isComplete(_ state: State) -> Bool {
      for (index, property) in object.properties.enumerated() where property.isRequired && !state.seen.contains(index) {
        return false
      }
      for (name, required) in object.dependentRequired {
        let index = names.firstIndex(of: Array(name.utf8))!
        guard state.seen.contains(index) else { continue }
        for other in required where !state.seen.contains(names.firstIndex(of: Array(other.utf8))!) { return false }
      }
      if state.count < object.minimumCount { return false }
      return object.maximumCount.map { state.count <= $0 } ?? true
    }
    var states: Set<State> = [State(index: skip(start + 1, policy))]
    if let state = states.first, next("}", state.index), isComplete(state) { result.insert(state.index + 1) }
    while !states.isEmpty {
      var following: Set<State> = []
      for state in states {
        guard let key = JSONStringDecoder.string(text, state.index) else { continue }
        let colon = skip(key.end, policy)
        guard next(":", colon) else { continue }
        if let language = object.propertyNames, !RegularInterpreter.scalars(key.content).matches(language) { continue }
        let utf8 = Array(String(String.UnicodeScalarView(key.content.compactMap(Unicode.Scalar.init))).utf8)
        let value: GrammarExpression
        var state = state
        if let index = names.firstIndex(of: utf8) {
          if state.seen.contains(index) { continue }
          if object.order == .declared, index < state.last { continue }
          state.last = index
          state.seen.insert(index)
          value = object.properties[index].value
        } else {
          state.last = Int.max
          value =
            object.patternProperties.first { RegularInterpreter.scalars(key.content).matches($0.keys) }?.value
            ?? object.additional ?? .never
        }
        state.count += 1
        if let maximum = object.maximumCount, state.count > maximum { continue }
        for end in ends(value, skip(colon + 1, policy, afterSeparator: true)) {
          let after = skip(end, policy)
          if next("}", after), isComplete(state) { result.insert(after + 1) }
          if next(",", after) {
            var next = state
            next.index = skip(after + 1, policy, afterSeparator: true)
            following.insert(next)
          }
        }
      }
      states = following
    }
    return result
  }
}

/// Reads JSON strings as scalars, with the place where each scalar ends.
enum JSONStringDecoder {
  /// Scalars from an offset inside the quotes up to the closing one (or the end), each with the offset behind it.
  static func content(_ text: [UInt8], _ start: Int) -> [(scalar: UInt32, end: Int)] {
    var result: [(UInt32, Int)] = []
    var index = start
    func hex(_ at: Int) -> UInt32? {
      guard at + 4 <= text.count else { return nil }
      return UInt32(String(decoding: text[at..<at + 4], as: UTF8.self), radix: 16)
    }
    while index < text.count {
      let byte = text[index]
      if byte == 0x22 || byte < 0x20 { break }
      if byte == 0x5C {
        guard index + 1 < text.count else { break }
        switch text[index + 1] {
        case 0x22, 0x5C, 0x2F: result.append((UInt32(text[index + 1]), index + 2))
        case 0x62: result.append((8, index + 2))
        case 0x66: result.append((12, index + 2))
        case 0x6E: result.append((10, index + 2))
        case 0x72: result.append((13, index + 2))
        case 0x74: result.append((9, index + 2))
        case 0x75:
          guard let unit = hex(index + 2) else { return result }
          if unit >= 0xD800, unit < 0xDC00 {
            guard index + 8 <= text.count, text[index + 6] == 0x5C, text[index + 7] == 0x75, let low = hex(index + 8),
              low >= 0xDC00, low < 0xE000
            else { return result }
            result.append((0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00), index + 12))
          } else if unit >= 0xDC00, unit < 0xE000 {
            return result
          } else {
            result.append((unit, index + 6))
          }
        default: return result
        }
        index = result.last!.1
        continue
      }
      let length = byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4
      guard index + length <= text.count, let part = String(validating: text[index..<index + length], as: UTF8.self),
        let scalar = part.unicodeScalars.first
      else { return result }
      index += length
      result.append((scalar.value, index))
    }
    return result
  }

  /// A whole string from its opening quote on.
  static func string(_ text: [UInt8], _ start: Int) -> (content: [UInt32], end: Int)? {
    guard start < text.count, text[start] == 0x22 else { return nil }
    let content = content(text, start + 1)
    let end = content.last?.end ?? start + 1
    guard end < text.count, text[end] == 0x22 else { return nil }
    return (content.map(\.scalar), end + 1)
  }
}

/// Regular expressions over bytes of UTF-8, or over scalars.
struct RegularInterpreter {
  let units: [UInt32]
  let isBytes: Bool

  static func bytes(_ text: [UInt8]) -> RegularInterpreter { .init(units: text.map(UInt32.init), isBytes: true) }
  static func scalars(_ text: [UInt32]) -> RegularInterpreter { .init(units: text, isBytes: false) }

  func matches(_ expression: RegularExpression) -> Bool { ends(expression, 0).contains(units.count) }

  private func scalar(_ start: Int) -> (value: UInt32, length: Int)? {
    guard start < units.count else { return nil }
    if !isBytes { return (units[start], 1) }
    let byte = units[start]
    let length = byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4
    guard start + length <= units.count,
      let text = String(validating: units[start..<start + length].map { UInt8($0) }, as: UTF8.self)
    else { return nil }
    return (text.unicodeScalars.first!.value, length)
  }

  func ends(_ expression: RegularExpression, _ start: Int) -> Set<Int> {
    switch expression {
    case .never: return []
    case .empty: return [start]
    case .anything:
      var result: Set<Int> = [start]
      var index = start
      while let (_, length) = scalar(index) {
        index += length
        result.insert(index)
      }
      return result
    case .literal(let bytes):
      if isBytes { return units[start...].starts(with: bytes.map(UInt32.init)) ? [start + bytes.count] : [] }
      let scalars = String(decoding: bytes, as: UTF8.self).unicodeScalars.map(\.value)
      return units[start...].starts(with: scalars) ? [start + scalars.count] : []
    case .scalars(let set):
      guard let (value, length) = scalar(start), set.ranges.contains(where: { $0.contains(value) }) else { return [] }
      return [start + length]
    case .concatenation(let parts):
      var states: Set<Int> = [start]
      for part in parts {
        var next: Set<Int> = []
        for state in states { next.formUnion(ends(part, state)) }
        states = next
      }
      return states
    case .union(let parts): return parts.reduce(into: []) { $0.formUnion(ends($1, start)) }
    case .intersection(let parts):
      guard let first = parts.first else { return ends(.anything, start) }
      return parts.dropFirst().reduce(ends(first, start)) { $0.isEmpty ? $0 : $0.intersection(ends($1, start)) }
    case .complement(let inner): return ends(.anything, start).subtracting(ends(inner, start))
    case .repetition(let inner, let minimum, let maximum):
      var result: Set<Int> = minimum == 0 ? [start] : []
      var states: Set<Int> = [start]
      var seen: Set<Int> = [start]
      var count = 0
      while !states.isEmpty, maximum.map({ count < $0 }) ?? true {
        count += 1
        var next: Set<Int> = []
        for state in states { next.formUnion(ends(inner, state)) }
        if count >= minimum {
          result.formUnion(next)
          next.subtract(seen)
          seen.formUnion(next)
        }
        states = next
      }
      return result
    case .digits(let divisor):
      var result: Set<Int> = [start]
      var remainder = 0
      var index = start
      while index < units.count {
        if units[index] >= 0x30, units[index] <= 0x39 {
          remainder = (remainder * 10 + Int(units[index] - 0x30)) % divisor
        } else if units[index] != 0x2E {
          break
        }
        index += 1
        if remainder == 0 { result.insert(index) }
      }
      return result
    case .jsonEscaped(let inner):
      let content = JSONStringDecoder.content(units.map { UInt8($0) }, start)
      let places = [start] + content.map(\.end)
      return Set(RegularInterpreter.scalars(content.map(\.scalar)).ends(inner, 0).map { places[$0] })
    }
  }
}
