package import ApusCore

extension RegularStore {
  /// The state that stands for an expression.
  func state(of expression: RegularExpression) -> RegularState {
    switch expression {
    case .never: return Self.never
    case .empty: return Self.empty
    case .anything: return anything
    case .literal(let bytes): return literal(bytes)
    case .scalars(let set): return scalars(set)
    case .concatenation(let parts): return concatenation(parts.map { state(of: $0) })
    case .union(let parts):
      // Many literals become one tree, so that a step costs no more than one of them.
      var literals: [[UInt8]] = []
      var members: [RegularState] = []
      for part in parts {
        if case .literal(let bytes) = part { literals.append(bytes) } else { members.append(state(of: part)) }
      }
      if !literals.isEmpty { members.append(tree(of: literals)) }
      return union(members)
    case .intersection(let parts): return intersection(parts.map { state(of: $0) })
    case .complement(let part): return intersection([complement(state(of: part)), anything])
    case .repetition(let part, let minimum, let maximum):
      return repetition(
        state(of: part), Int32(clamping: minimum), maximum.map { Int32(clamping: $0) } ?? -1)
    case .digits(let modulus): return digits(multipleOf: modulus)
    case .jsonEscaped(let part): return escaped(state(of: part))
    }
  }

  /// Any one of some texts.
  func tree(of texts: [[UInt8]]) -> RegularState {
    let sorted = texts.sorted { $0.lexicographicallyPrecedes($1) }
    // From the last text to the first, with an explicit stack: texts may be long.
    struct Open {
      var entries: [(low: UInt8, high: UInt8, target: RegularState)] = []
      var isEnd = false
      var byte: UInt8 = 0
    }
    var stack = [Open()]
    func close(_ open: Open) -> RegularState {
      let state = branch(open.entries)
      return open.isEnd ? union(Self.empty, state) : state
    }
    var previous: [UInt8] = []
    for text in sorted {
      var common = 0
      while common < min(previous.count, text.count), previous[common] == text[common] { common += 1 }
      while stack.count > common + 1 {
        let open = stack.removeLast()
        let state = close(open)
        stack[stack.count - 1].entries.append((open.byte, open.byte, state))
      }
      for byte in text[common...] {
        var open = Open()
        open.byte = byte
        stack.append(open)
      }
      stack[stack.count - 1].isEnd = true
      previous = text
    }
    while stack.count > 1 {
      let open = stack.removeLast()
      let state = close(open)
      stack[stack.count - 1].entries.append((open.byte, open.byte, state))
    }
    return texts.isEmpty ? Self.never : close(stack[0])
  }
}

/// Questions about a regular language, for front ends that merge and compare schemas.
package struct RegularLanguage {
  private let store = RegularStore()
  private let start: RegularState

  /// - Throws: `EngineError` with code `unsupported` if the expression is beyond the limits.
  package init(_ expression: RegularExpression) throws(EngineError) {
    start = store.state(of: expression)
    try check()
  }

  private func check() throws(EngineError) {
    if let overflow = store.overflow { throw EngineError(.unsupported, "The expression is too large: \(overflow)") }
  }

  /// Whether no text is in the language.
  package func isEmpty() throws(EngineError) -> Bool {
    let result = !store.isAlive(start)
    try check()
    return result
  }

  /// Whether a text is in the language.
  package func contains(_ text: String) throws(EngineError) -> Bool {
    var state = start
    for byte in text.utf8 {
      if state == RegularStore.never { return false }
      if store.isFull { store.dropRows() }
      state = store.row(state)[Int(byte)]
    }
    try check()
    return store.accepts(state)
  }

  /// Some shortest text of the language, for messages; `nil` if it is empty or longer than the limit.
  package func example(maximumLength: Int = 64) throws(EngineError) -> [UInt8]? {
    guard store.isAlive(start) else { return nil }
    var parents: [RegularState: (RegularState, UInt8)] = [:]
    var level = [start]
    for _ in 0...maximumLength {
      var next: [RegularState] = []
      for state in level {
        if store.accepts(state) {
          var bytes: [UInt8] = []
          var current = state
          while current != start, let (parent, byte) = parents[current] {
            bytes.append(byte)
            current = parent
          }
          return bytes.reversed()
        }
        let row = store.row(state)
        for byte in 0..<256 where row[byte] != RegularStore.never && row[byte] != start && parents[row[byte]] == nil {
          parents[row[byte]] = (state, UInt8(byte))
          next.append(row[byte])
        }
      }
      if next.count > 10_000 { return nil }
      level = next
      try check()
    }
    return nil
  }
}
