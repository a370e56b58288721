public import ApusCore

/// A compiled regular expression over UTF-8 bytes, matched by backtracking.
///
/// The syntax is Oniguruma's (as in `tokenizer.json`) or Python's `re` (as in a request's `stop_regex`): classes with
/// Unicode properties, nesting and intersection, look-around, lazy and possessive repetition, atomic groups, inline flags,
/// back-references. `\s`, `\d`, `\w` and `\p{..}` know Unicode. Leftmost match, alternatives in order. Every search has a
/// step limit, so that a hostile pattern costs bounded time: beyond it the search throws.
public struct Pattern: Sendable {
  /// Whose rules a pattern follows where they differ.
  public enum Syntax: Sendable {
    /// Oniguruma with Ruby syntax: `^` and `$` match at every line, `(?m)` makes the dot match newlines.
    case oniguruma
    /// Python's `re`: `^` and `$` match at the ends of the text unless `(?m)`, `(?s)` makes the dot match newlines.
    case python
  }

  /// The text of the pattern.
  public let source: String
  private let program: PatternProgram

  /// Compiles a pattern; throws `invalidRequest` with the reason when it is not one.
  public init(_ source: String, syntax: Syntax = .python) throws(EngineError) {
    guard source.utf8.count <= 100_000 else {
      throw EngineError(.invalidRequest, "The regular expression is longer than 100000 bytes")
    }
    self.source = source
    var parser = PatternParser(source, syntax: syntax)
    let node = try parser.parse()
    program = try PatternProgram(node, captureCount: parser.captureCount)
  }

  /// The first match that starts at or after `start`, as byte offsets; `nil` if there is none.
  ///
  /// The bytes must be well-formed UTF-8 and `start` the start of a character. Look-behind sees the bytes before `start`.
  public func firstMatch(in text: UnsafeBufferPointer<UInt8>, from start: Int = 0) throws(EngineError) -> Range<Int>? {
    var matcher = PatternMatcher(program, text)
    return try matcher.firstMatch(from: start)
  }

  /// The first match that starts at or after `start`, as byte offsets; `nil` if there is none.
  public func firstMatch(in text: [UInt8], from start: Int = 0) throws(EngineError) -> Range<Int>? {
    try text.withUnsafeBufferPointer { (buffer) throws(EngineError) in try firstMatch(in: buffer, from: start) }
  }

  /// The first match in a string, as byte offsets of its UTF-8.
  public func firstMatch(in text: String) throws(EngineError) -> Range<Int>? {
    try firstMatch(in: Array(text.utf8))
  }

  /// What a search in a text that still grows found.
  public struct GrowingSearch: Sendable, Equatable {
    /// The first match in the text as it is.
    public var match: Range<Int>?
    /// The first start before the match from which more text could still make a match: the attempt there failed only
    /// after it had looked for text beyond the end.
    public var firstOpenStart: Int?
  }

  /// Searches a text to which more may be appended later.
  ///
  /// - Parameter stepLimit: steps after which the search throws.
  public func search(in text: [UInt8], from start: Int, stepLimit: Int) throws(EngineError) -> GrowingSearch {
    try text.withUnsafeBufferPointer { (buffer) throws(EngineError) in
      var matcher = PatternMatcher(program, buffer, stepLimit: stepLimit)
      let match = try matcher.firstMatch(from: start)
      return GrowingSearch(match: match, firstOpenStart: matcher.firstOpenStart)
    }
  }

  /// All matches, left to right, not overlapping. An empty match right after another match is left out.
  func matches(in text: Bytes, _ body: (Int, Int) -> Void) throws(EngineError) {
    var matcher = PatternMatcher(program, text)
    var position = 0
    var lastEnd = -1
    while position <= text.count, let match = try matcher.firstMatch(from: position) {
      if match.isEmpty, match.lowerBound == lastEnd {
        if position >= text.count { break }
        position += sequenceLength(text[position])
        continue
      }
      body(match.lowerBound, match.upperBound)
      position = match.upperBound
      lastEnd = position
    }
  }
}

/// Instructions of a compiled pattern.
struct PatternProgram: Sendable {
  enum Operation: UInt8 {
    /// Matches byte `a`.
    case byte
    /// Matches literal `a`.
    case literal
    /// Matches a member of set `a`.
    case set
    /// Matches at least `b` and at most `c` members of set `a`.
    case runGreedy, runLazy, runPossessive
    /// Tries the next instruction; on failure goes on at `a`.
    case split
    /// Goes on at `a`; on failure tries the next instruction.
    case splitLazy
    /// Like `split`, but skips to `a` at once when the next byte is not in byte set `b`.
    case branch
    case jump
    /// Notes the position in slot `a`.
    case save
    /// Goes on at `b` if nothing was matched since slot `a` was set.
    case breakIfEmpty
    /// Matches the body up to `a` without moving; `b` is one if it must not match.
    case lookAhead
    /// Matches the body up to `a` so that it ends here, starting `b` to `c` characters before; `d` is one if it must not.
    case lookBehind
    /// Matches the body up to `a` and forgets its alternatives.
    case atomic
    /// Ends the body of a look-around or an atomic group.
    case accept
    case assertion
    /// Matches what slots `a` and `a + 1` span; `b` is one if case does not matter.
    case backreference
    case keep
    case match
  }

  struct Instruction: Sendable {
    var operation: Operation
    var a: Int32 = 0
    var b: Int32 = 0
    var c: Int32 = 0
    var d: Int32 = 0
  }

  private(set) var instructions: [Instruction] = []
  private(set) var sets: [ScalarSet] = []
  private var setRanges: [ScalarRanges] = []
  private(set) var byteSets: [ByteSet] = []
  private(set) var literals: [[UInt8]] = []
  private(set) var slotCount: Int
  /// Bytes that a match can start with; `nil` if it can be empty.
  private(set) var firstBytes: ByteSet?

  init(_ node: PatternNode, captureCount: Int) throws(EngineError) {
    // Two slots per group, and two for the whole, of which the first can be moved by `\K`.
    slotCount = (captureCount + 1) * 2
    try emit(node)
    instructions.append(Instruction(operation: .match))
    firstBytes = Self.first(node)
  }

  private static func unusable(_ message: String) -> EngineError {
    EngineError(.invalidRequest, "The regular expression is not usable: \(message)")
  }

  private mutating func add(_ operation: Operation, _ a: Int = 0, _ b: Int = 0, _ c: Int = 0, _ d: Int = 0)
    throws(EngineError) -> Int
  {
    if instructions.count >= 100_000 { throw Self.unusable("it is too large") }
    instructions.append(
      Instruction(
        operation: operation, a: Int32(clamping: a), b: Int32(clamping: b), c: Int32(clamping: c), d: Int32(clamping: d)
      ))
    return instructions.count - 1
  }

  private mutating func index(of set: ScalarRanges) -> Int {
    if let known = setRanges.firstIndex(of: set) { return known }
    setRanges.append(set)
    sets.append(ScalarSet(set))
    return sets.count - 1
  }

  private mutating func emit(_ node: PatternNode) throws(EngineError) {
    switch node {
    case .empty: break
    case .bytes(let bytes):
      if bytes.count == 1 {
        _ = try add(.byte, Int(bytes[0]))
      } else {
        literals.append(bytes)
        _ = try add(.literal, literals.count - 1)
      }
    case .set(let set): _ = try add(.set, index(of: set))
    case .sequence(let nodes): for node in nodes { try emit(node) }
    case .alternation(let branches):
      var jumps: [Int] = []
      for (number, branch) in branches.enumerated() {
        guard number < branches.count - 1 else {
          try emit(branch)
          break
        }
        let split: Int
        if let first = Self.first(branch) {
          byteSets.append(first)
          split = try add(.branch, 0, byteSets.count - 1)
        } else {
          split = try add(.split)
        }
        try emit(branch)
        jumps.append(try add(.jump))
        instructions[split].a = Int32(instructions.count)
      }
      for jump in jumps { instructions[jump].a = Int32(instructions.count) }
    case .repetition(let body, let minimum, let maximum, let kind):
      try emitRepetition(body, minimum, maximum, kind)
    case .capture(let body, let number):
      _ = try add(.save, number * 2)
      try emit(body)
      _ = try add(.save, number * 2 + 1)
    case .look(let body, let ahead, let negative):
      let start: Int
      if ahead {
        start = try add(.lookAhead, 0, negative ? 1 : 0)
      } else {
        guard let (minimum, maximum) = Self.length(body), maximum <= 255 else {
          throw Self.unusable("a look-behind has no bounded length")
        }
        start = try add(.lookBehind, 0, minimum, maximum, negative ? 1 : 0)
      }
      try emit(body)
      _ = try add(.accept)
      instructions[start].a = Int32(instructions.count)
    case .atomic(let body):
      let start = try add(.atomic)
      try emit(body)
      _ = try add(.accept)
      instructions[start].a = Int32(instructions.count)
    case .assertion(let assertion):
      let codes: [PatternNode.Assertion] = Self.assertions
      _ = try add(.assertion, codes.firstIndex(of: assertion)!)
    case .backreference(let number, let foldsCase):
      _ = try add(.backreference, number * 2, foldsCase ? 1 : 0)
    case .keep: _ = try add(.keep)
    }
  }

  static let assertions: [PatternNode.Assertion] = [
    .textStart, .textEnd, .textEndOrNewline, .lineStart, .lineEnd, .wordBoundary, .notWordBoundary, .searchStart,
  ]

  private mutating func emitRepetition(
    _ body: PatternNode, _ minimum: Int, _ maximum: Int, _ kind: PatternNode.Repetition
  ) throws(EngineError) {
    if maximum == 0 { return }
    if minimum == 1, maximum == 1 { return try emit(body) }
    // One character is matched by a run, which needs one way back for all its lengths.
    var single: ScalarRanges?
    if case .set(let set) = body { single = set }
    if case .bytes(let bytes) = body {
      let (scalar, length) = bytes.withUnsafeBufferPointer { decodeScalar($0.baseAddress!, 0) }
      if length == bytes.count { single = ScalarRanges(scalar) }
    }
    if let single {
      let operation: Operation =
        switch kind {
        case .greedy: .runGreedy
        case .lazy: .runLazy
        case .possessive: .runPossessive
        }
      _ = try add(operation, index(of: single), minimum, maximum)
      return
    }
    if kind == .possessive {
      let start = try add(.atomic)
      try emitRepetition(body, minimum, maximum, .greedy)
      _ = try add(.accept)
      instructions[start].a = Int32(instructions.count)
      return
    }
    for _ in 0..<minimum { try emit(body) }
    let split: Operation = kind == .lazy ? .splitLazy : .split
    if maximum == .max {
      let loop = try add(split)
      let slot = slotCount
      let isNullable = Self.first(body) == nil
      if isNullable {
        slotCount += 1
        _ = try add(.save, slot)
      }
      try emit(body)
      if isNullable {
        let check = try add(.breakIfEmpty, slot)
        instructions[check].b = Int32(instructions.count + 1)
      }
      _ = try add(.jump, loop)
      instructions[loop].a = Int32(instructions.count)
    } else {
      var splits: [Int] = []
      for _ in minimum..<maximum {
        splits.append(try add(split))
        try emit(body)
      }
      for index in splits { instructions[index].a = Int32(instructions.count) }
    }
  }

  /// The bytes that a match of a node can start with; `nil` if it can be empty or depends on more than the next byte.
  private static func first(_ node: PatternNode) -> ByteSet? {
    switch node {
    case .bytes(let bytes):
      var set = ByteSet()
      set.insert(bytes[0])
      return set
    case .set(let set): return ScalarSet(set).firstBytes
    case .sequence(let nodes):
      var union = ByteSet()
      for node in nodes {
        switch node {
        case .look, .assertion, .keep: continue
        default: break
        }
        if let set = first(node) {
          union.formUnion(set)
          return union
        }
        guard let set = firstIfNullable(node) else { return nil }
        union.formUnion(set)
      }
      return nil
    case .alternation(let branches):
      var union = ByteSet()
      for branch in branches {
        guard let set = first(branch) else { return nil }
        union.formUnion(set)
      }
      return union
    case .repetition(let body, let minimum, let maximum, _):
      return minimum > 0 && maximum > 0 ? first(body) : nil
    case .capture(let body, _), .atomic(let body): return first(body)
    case .empty, .look, .assertion, .backreference, .keep: return nil
    }
  }

  /// The bytes that a match can start with unless it is empty, for nodes where that is simple to say.
  private static func firstIfNullable(_ node: PatternNode) -> ByteSet? {
    switch node {
    case .repetition(let body, _, _, _): first(body)
    case .capture(let body, _), .atomic(let body): firstIfNullable(body)
    case .alternation(let branches):
      branches.reduce(ByteSet()) { (union: ByteSet?, branch) in
        guard var union, let set = first(branch) ?? firstIfNullable(branch) else { return nil }
        union.formUnion(set)
        return union
      }
    case .empty: ByteSet()
    default: nil
    }
  }

  /// The least and greatest number of characters of a match, if bounded.
  private static func length(_ node: PatternNode) -> (Int, Int)? {
    switch node {
    case .empty, .look, .assertion, .keep: return (0, 0)
    case .bytes(let bytes):
      let count = bytes.count { $0 & 0xC0 != 0x80 }
      return (count, count)
    case .set: return (1, 1)
    case .sequence(let nodes):
      var sum = (0, 0)
      for node in nodes {
        guard let part = length(node) else { return nil }
        sum = (sum.0 + part.0, sum.1 + part.1)
      }
      return sum
    case .alternation(let branches):
      var result: (Int, Int)?
      for branch in branches {
        guard let part = length(branch) else { return nil }
        result = result.map { (Swift.min($0.0, part.0), Swift.max($0.1, part.1)) } ?? part
      }
      return result
    case .repetition(let body, let minimum, let maximum, _):
      guard maximum != .max, let part = length(body) else { return nil }
      return (part.0 * minimum, part.1 * maximum)
    case .capture(let body, _), .atomic(let body): return length(body)
    case .backreference: return nil
    }
  }
}

/// The state of one search.
struct PatternMatcher {
  private enum FrameKind: Int32 { case resume, run, lazyRun, restore }

  private struct Frame {
    var kind: FrameKind
    var instruction: Int32
    var a: Int
    var b: Int
  }

  private let program: PatternProgram
  private let text: Bytes
  private var stack: [Frame] = []
  private var slots: [Int]
  private var steps = 0
  private let stepLimit: Int
  private var searchStart = 0
  private var keptStart = -1
  /// Whether the attempt at the present start looked for text beyond the end.
  private var reachedEnd = false
  /// The first start of which the attempt failed for want of text.
  private(set) var firstOpenStart: Int?

  init(_ program: PatternProgram, _ text: Bytes, stepLimit: Int? = nil) {
    self.program = program
    self.text = text
    slots = [Int](repeating: -1, count: program.slotCount)
    self.stepLimit = stepLimit ?? 10_000_000 + text.count * 64
  }

  mutating func firstMatch(from start: Int) throws(EngineError) -> Range<Int>? {
    steps = 0
    searchStart = start
    firstOpenStart = nil
    var position = start
    while position <= text.count {
      if let first = program.firstBytes {
        while position < text.count, !first.contains(text[position]) { position += 1 }
        if position >= text.count { return nil }
      }
      stack.removeAll(keepingCapacity: true)
      for slot in slots.indices { slots[slot] = -1 }
      keptStart = -1
      reachedEnd = false
      if let end = try run(0, position) {
        let start = keptStart >= 0 ? Swift.min(keptStart, end) : position
        return start..<end
      }
      if reachedEnd, firstOpenStart == nil { firstOpenStart = position }
      if position >= text.count { break }
      position += sequenceLength(text[position])
    }
    return nil
  }

  private static let stackLimit = 1 << 22

  private mutating func push(_ kind: FrameKind, _ instruction: Int, _ a: Int, _ b: Int) throws(EngineError) {
    if stack.count >= Self.stackLimit {
      throw EngineError(.invalidRequest, "A regular expression needs too much memory on this text; simplify it")
    }
    stack.append(Frame(kind: kind, instruction: Int32(truncatingIfNeeded: instruction), a: a, b: b))
  }

  /// Runs from an instruction until `match` or `accept`; gives the position reached, or `nil`.
  ///
  /// With `requiredEnd` an `accept` anywhere else is a failure, which other ways of matching may mend.
  private mutating func run(
    _ startInstruction: Int, _ startPosition: Int, requiredEnd: Int = -1
  ) throws(EngineError) -> Int? {
    let base = stack.count
    var counter = startInstruction
    var position = startPosition
    let count = text.count
    // An empty text has no address, but nothing reads through the pointer then.
    let bytes = text.baseAddress ?? UnsafePointer(bitPattern: 1)!
    while true {
      steps += 1
      if steps > stepLimit {
        throw EngineError(.invalidRequest, "A regular expression takes too many steps on this text; simplify it")
      }
      let instruction = program.instructions[counter]
      var failed = false
      switch instruction.operation {
      case .byte:
        if position < count, bytes[position] == UInt8(truncatingIfNeeded: instruction.a) {
          position += 1
          counter += 1
        } else {
          if position >= count { reachedEnd = true }
          failed = true
        }
      case .literal:
        let literal = program.literals[Int(instruction.a)]
        if count - position >= literal.count,
          literal.withUnsafeBufferPointer({ bytesEqual($0.baseAddress!, bytes + position, literal.count) })
        {
          position += literal.count
          counter += 1
        } else {
          // Conservative: the bytes that are there may differ already.
          if count - position < literal.count { reachedEnd = true }
          failed = true
        }
      case .set:
        if position < count {
          let (scalar, length) = decodeScalar(bytes, position)
          if program.sets[Int(instruction.a)].contains(scalar) {
            position += length
            counter += 1
          } else {
            failed = true
          }
        } else {
          reachedEnd = true
          failed = true
        }
      case .runGreedy, .runPossessive:
        let set = program.sets[Int(instruction.a)]
        let maximum = instruction.c == .max ? Int.max : Int(instruction.c)
        var matched = 0
        var floor = position
        while matched < maximum, position < count {
          let (scalar, length) = decodeScalar(bytes, position)
          if !set.contains(scalar) { break }
          position += length
          matched += 1
          if matched == instruction.b { floor = position }
        }
        if position >= count, matched < maximum { reachedEnd = true }
        if matched < instruction.b {
          failed = true
        } else {
          counter += 1
          if instruction.operation == .runGreedy, position > floor {
            try push(.run, counter, floor, position)
          }
        }
      case .runLazy:
        let set = program.sets[Int(instruction.a)]
        var matched = 0
        while matched < instruction.b, position < count {
          let (scalar, length) = decodeScalar(bytes, position)
          if !set.contains(scalar) { break }
          position += length
          matched += 1
        }
        if position >= count { reachedEnd = true }
        if matched < instruction.b {
          failed = true
        } else {
          if matched < instruction.c {
            try push(.lazyRun, counter, position, instruction.c == .max ? .max : Int(instruction.c) - matched)
          }
          counter += 1
        }
      case .split:
        try push(.resume, Int(instruction.a), position, 0)
        counter += 1
      case .splitLazy:
        try push(.resume, counter + 1, position, 0)
        counter = Int(instruction.a)
      case .branch:
        if position < count, program.byteSets[Int(instruction.b)].contains(bytes[position]) {
          try push(.resume, Int(instruction.a), position, 0)
          counter += 1
        } else {
          if position >= count { reachedEnd = true }
          counter = Int(instruction.a)
        }
      case .jump: counter = Int(instruction.a)
      case .save:
        let slot = Int(instruction.a)
        try push(.restore, slot, slots[slot], 0)
        slots[slot] = position
        counter += 1
      case .breakIfEmpty:
        counter = slots[Int(instruction.a)] == position ? Int(instruction.b) : counter + 1
      case .lookAhead:
        let mark = stack.count
        let saved = slots
        let found = try run(counter + 1, position) != nil
        stack.removeLast(stack.count - mark)
        if found == (instruction.b == 0) {
          if found { try pushRestores(saved) }
          counter = Int(instruction.a)
        } else {
          slots = saved
          failed = true
        }
      case .lookBehind:
        let mark = stack.count
        let saved = slots
        let found = try matchesBehind(counter + 1, position, Int(instruction.b), Int(instruction.c), bytes)
        stack.removeLast(stack.count - mark)
        if found == (instruction.d == 0) {
          if found { try pushRestores(saved) }
          counter = Int(instruction.a)
        } else {
          slots = saved
          failed = true
        }
      case .atomic:
        let mark = stack.count
        let saved = slots
        if let end = try run(counter + 1, position) {
          stack.removeLast(stack.count - mark)
          try pushRestores(saved)
          position = end
          counter = Int(instruction.a)
        } else {
          stack.removeLast(stack.count - mark)
          slots = saved
          failed = true
        }
      case .accept, .match:
        if requiredEnd < 0 || position == requiredEnd { return position }
        failed = true
      case .assertion:
        if position >= count { reachedEnd = true }
        if holds(Int(instruction.a), position, bytes) { counter += 1 } else { failed = true }
      case .backreference:
        let start = slots[Int(instruction.a)]
        let end = slots[Int(instruction.a) + 1]
        if start < 0 || end < start {
          failed = true
        } else if let after = matchAgain(start, end, position, foldsCase: instruction.b == 1, bytes) {
          position = after
          counter += 1
        } else {
          if count - position < end - start { reachedEnd = true }
          failed = true
        }
      case .keep:
        keptStart = position
        counter += 1
      }
      guard failed else { continue }
      backtrack: while true {
        guard stack.count > base, let frame = stack.popLast() else { return nil }
        switch frame.kind {
        case .resume:
          counter = Int(frame.instruction)
          position = frame.a
          break backtrack
        case .run:
          let back = previousScalarStart(bytes, frame.b)
          if back > frame.a { stack.append(Frame(kind: .run, instruction: frame.instruction, a: frame.a, b: back)) }
          counter = Int(frame.instruction)
          position = back
          break backtrack
        case .lazyRun:
          let set = program.sets[Int(program.instructions[Int(frame.instruction)].a)]
          guard frame.a < count else {
            reachedEnd = true
            continue
          }
          let (scalar, length) = decodeScalar(bytes, frame.a)
          guard set.contains(scalar) else { continue }
          position = frame.a + length
          let remaining = frame.b == .max ? .max : frame.b - 1
          if remaining > 0 {
            stack.append(Frame(kind: .lazyRun, instruction: frame.instruction, a: position, b: remaining))
          }
          counter = Int(frame.instruction) + 1
          break backtrack
        case .restore: slots[Int(frame.instruction)] = frame.a
        }
      }
    }
  }

  /// After a body was matched for good, lets a later failure undo the slots it set.
  private mutating func pushRestores(_ saved: [Int]) throws(EngineError) {
    for slot in slots.indices where slots[slot] != saved[slot] { try push(.restore, slot, saved[slot], 0) }
  }

  private mutating func matchesBehind(
    _ instruction: Int, _ position: Int, _ minimum: Int, _ maximum: Int, _ bytes: UnsafePointer<UInt8>
  ) throws(EngineError) -> Bool {
    var start = position
    for length in 0...maximum {
      if length >= minimum {
        if try run(instruction, start, requiredEnd: position) != nil { return true }
      }
      if start == 0 { return false }
      start = previousScalarStart(bytes, start)
    }
    return false
  }

  private func matchAgain(
    _ start: Int, _ end: Int, _ position: Int, foldsCase: Bool, _ bytes: UnsafePointer<UInt8>
  ) -> Int? {
    if !foldsCase {
      guard text.count - position >= end - start, bytesEqual(bytes + start, bytes + position, end - start) else {
        return nil
      }
      return position + end - start
    }
    var left = start
    var right = position
    while left < end {
      guard right < text.count else { return nil }
      let (first, firstLength) = decodeScalar(bytes, left)
      let (second, secondLength) = decodeScalar(bytes, right)
      if first != second, !(UnicodeTables.shared.caseVariants[first]?.contains(second) ?? false) { return nil }
      left += firstLength
      right += secondLength
    }
    return right
  }

  private func isWord(before position: Int, _ bytes: UnsafePointer<UInt8>) -> Bool {
    position > 0
      && UnicodeTables.shared.isPatternWord(decodeScalar(bytes, previousScalarStart(bytes, position)).scalar)
  }

  private func isWord(after position: Int, _ bytes: UnsafePointer<UInt8>) -> Bool {
    position < text.count && UnicodeTables.shared.isPatternWord(decodeScalar(bytes, position).scalar)
  }

  private func holds(_ assertion: Int, _ position: Int, _ bytes: UnsafePointer<UInt8>) -> Bool {
    switch PatternProgram.assertions[assertion] {
    case .textStart: position == 0
    case .textEnd: position == text.count
    case .textEndOrNewline: position == text.count || (position == text.count - 1 && bytes[position] == 0x0A)
    case .lineStart: position == 0 || (bytes[position - 1] == 0x0A && position <= text.count)
    case .lineEnd: position == text.count || bytes[position] == 0x0A
    case .wordBoundary: isWord(before: position, bytes) != isWord(after: position, bytes)
    case .notWordBoundary: isWord(before: position, bytes) == isWord(after: position, bytes)
    case .searchStart: position == searchStart
    }
  }
}
