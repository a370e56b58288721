public import ApusCore

/// Follows one text through a grammar: says which tokens may come next and takes those that came.
///
/// Not thread-safe; matchers of one grammar may be used on different threads.
public final class GrammarMatcher: TokenMatcher {
  /// The grammar.
  public let grammar: CompiledGrammar
  // Not checked for overlap at run time: a matcher belongs to one thread.
  @exclusivity(unchecked) private var stacks = GrammarStacks()
  private var threads: [GrammarThread] = []
  /// Whether the text may end where it is.
  private var canEnd: Bool
  /// Whether an end token was accepted.
  public private(set) var isTerminated = false
  /// Why the matcher cannot go on, if a limit was reached.
  public private(set) var failure: EngineError?
  private var history: [Place] = []
  /// Whether the last mask left tokens out because of a limit.
  private var metLimit = false
  /// Tokens that `rollback` can take back at most.
  public static let maximumRollback = 256

  private struct Place {
    var threads: [GrammarThread]
    var canEnd: Bool
    var isTerminated: Bool
  }

  /// Starts at the beginning of a text.
  public init(_ grammar: CompiledGrammar) {
    self.grammar = grammar
    var stacks = stacks
    let closure = grammar.lock.withLock {
      grammar.trim()
      return stacks.initialClosure(grammar.program)
    }
    let first = stacks.closures[Int(closure)]
    threads = Array(stacks.threads[Int(first.first)..<Int(first.first + first.count)])
    canEnd = first.canEnd
    self.stacks = stacks
  }

  private init(_ other: GrammarMatcher) {
    grammar = other.grammar
    stacks = other.stacks
    threads = other.threads
    canEnd = other.canEnd
    isTerminated = other.isTerminated
    failure = other.failure
    history = other.history
  }

  /// A matcher in the same place, which goes its own way from here.
  public func copy() -> GrammarMatcher { GrammarMatcher(self) }

  public func fork() -> (any TokenMatcher)? { copy() }

  /// Whether the text so far is complete: an end token would be accepted.
  public var isAccepting: Bool { !isTerminated && canEnd }

  /// Ways to read the text so far that are followed at once.
  package var threadCount: Int { threads.count }

  public var maskWordCount: Int { grammar.vocabulary.maskWordCount }

  private var program: GrammarProgram { grammar.program }

  // MARK: Acceptance

  /// Takes a byte. Gives false, and changes nothing, if the grammar does not allow it.
  public func accept(byte: UInt8) -> Bool {
    guard !isTerminated, failure == nil else { return false }
    return grammar.lock.withLock {
      grammar.trim()
      return advance(CollectionOfOne(byte))
    }
  }

  /// Takes a text's bytes. Gives how many were accepted.
  public func accept(bytes: some Sequence<UInt8>) -> Int {
    var count = 0
    for byte in bytes {
      guard accept(byte: byte) else { break }
      count += 1
    }
    return count
  }

  /// Takes a token. Gives false, and changes nothing, if the grammar does not allow it.
  public func accept(_ token: TokenID) -> Bool {
    guard !isTerminated, failure == nil, token >= 0, Int(token) < grammar.vocabulary.count else { return false }
    let before = Place(threads: threads, canEnd: canEnd, isTerminated: false)
    if grammar.vocabulary.endTokens.contains(token) {
      guard canEnd else { return false }
      isTerminated = true
    } else {
      let accepted = grammar.lock.withLock {
        grammar.trim()
        return grammar.vocabulary.withBytes(of: token) { $0.isEmpty ? false : advance($0) }
      }
      guard accepted else { return false }
    }
    if history.count >= 2 * Self.maximumRollback { history.removeFirst(Self.maximumRollback) }
    history.append(before)
    return true
  }

  /// Takes back the last tokens.
  ///
  /// - Returns: false if fewer tokens are remembered; nothing is taken back then.
  public func rollback(_ count: Int) -> Bool {
    guard count <= history.count else { return false }
    if count == 0 { return true }
    let place = history[history.count - count]
    history.removeLast(count)
    threads = place.threads
    canEnd = place.canEnd
    isTerminated = place.isTerminated
    failure = nil
    return true
  }

  /// The lock is held.
  private func advance(_ bytes: some Sequence<UInt8>) -> Bool {
    var current = threads
    var next: [GrammarThread] = []
    for byte in bytes {
      next.removeAll(keepingCapacity: true)
      for thread in current { stacks.step(thread, byte, program, into: &next, from: 0) }
      if let overflow = program.store.overflow { return fail("its automaton grew too large: \(overflow)") }
      if stacks.exceededThreads {
        // Such a text is not offered either.
        stacks.exceededThreads = false
        return false
      }
      if next.isEmpty { return false }
      swap(&current, &next)
    }
    threads = current
    canEnd = false
    for thread in threads where stacks.canEnd(thread, program) {
      canEnd = true
      break
    }
    if stacks.count > Self.maximumStacks { compact() }
    return true
  }

  private func fail(_ reason: String) -> Bool {
    failure = EngineError(.unsupported, "The grammar cannot be followed further: \(reason)")
    return false
  }

  /// Stacks kept before those out of use are dropped.
  private static let maximumStacks = 1 << 17

  /// Drops stacks that nothing needs; what was accepted before cannot be taken back.
  private func compact() {
    history = []
    var fresh = GrammarStacks()
    threads = fresh.adopt(threads, from: stacks)
    stacks = fresh
  }

  // MARK: Masks

  /// Writes which tokens may come next, a bit for each token id: bit `id % 32` of word `id / 32`.
  ///
  /// - Parameter mask: room for `vocabulary.maskWordCount` words.
  public func fillMask(into mask: UnsafeMutablePointer<UInt32>) { _ = fillMask(into: mask, work: .max) }

  /// Writes which tokens may come next, if that takes no more than some work.
  ///
  /// - Parameters:
  ///   - mask: room for `vocabulary.maskWordCount` words.
  ///   - work: nodes of the token tree that may be visited; a derivative counts as eight. Whether a condition of a schema can
  ///     be met at all is found out in one piece.
  /// - Returns: false if more is needed. The mask says nothing then, and the next try begins anew.
  public func fillMask(into mask: UnsafeMutablePointer<UInt32>, work: Int) -> Bool {
    mask.update(repeating: 0, count: grammar.vocabulary.maskWordCount)
    guard !isTerminated, failure == nil else { return true }
    let isDone = grammar.lock.withLock {
      grammar.trim()
      program.store.limitMask(work)
      defer { program.store.limitMask(.max) }
      return fill(mask)
    }
    if !isDone { return false }
    if canEnd {
      for token in grammar.vocabulary.endTokens { mask[Int(token >> 5)] |= 1 << UInt32(token & 31) }
    } else {
      for token in grammar.vocabulary.endTokens { mask[Int(token >> 5)] &= ~(1 << UInt32(token & 31)) }
    }
    return true
  }

  /// The mask as an array of words.
  public func mask() -> [UInt32] {
    Array(unsafeUninitializedCapacity: grammar.vocabulary.maskWordCount) { buffer, count in
      count = grammar.vocabulary.maskWordCount
      if let base = buffer.baseAddress {
        base.initialize(repeating: 0, count: count)
        fillMask(into: base)
      }
    }
  }

  /// - Returns: whether the work sufficed.
  private func fill(_ mask: UnsafeMutablePointer<UInt32>) -> Bool {
    metLimit = false
    var sum = RegularStore.Hash128(0, 0)
    for thread in threads {
      var hash = program.store.hash(thread.state)
      hash.combine(stacks.items[Int(thread.stack)].hash)
      sum.add(hash)
    }
    if let known = grammar.configurationMask(sum) {
      known.words.withUnsafeBufferPointer { mask.update(from: $0.baseAddress!, count: $0.count) }
      return true
    }
    // Threads, and what follows those that may end here.
    var pending = threads
    var index = 0
    while index < pending.count {
      let thread = pending[index]
      index += 1
      let acceptance = program.store.acceptance[Int(thread.state)]
      if acceptance != 0 {
        for tag in program.store.acceptanceSets[Int(acceptance)] {
          let closure = stacks.closures[Int(stacks.closure(thread.stack, tag: tag, program))]
          for next in Int(closure.first)..<Int(closure.first + closure.count)
          where !pending.contains(stacks.threads[next]) {
            pending.append(stacks.threads[next])
          }
        }
      }
      guard let terminal = grammar.terminalMask(thread.state) else { return false }
      terminal.add(to: mask)
      for group in terminal.exits {
        for tag in group.tags {
          let closure = stacks.closure(thread.stack, tag: tag, program)
          if stacks.closures[Int(closure)].count == 0 { continue }
          if !walk(below: group.nodes, closure, mask) { return false }
        }
      }
    }
    let words = Array(UnsafeBufferPointer(start: mask, count: grammar.vocabulary.maskWordCount))
    if let overflow = program.store.overflow {
      mask.update(repeating: 0, count: words.count)
      _ = fail("its automaton grew too large: \(overflow)")
      return true
    }
    if metLimit, !canEnd, words.allSatisfy({ $0 == 0 }) {
      _ = fail("it is too ambiguous: more than \(GrammarStacks.maximumThreads) ways to read the text at once")
      return true
    }
    grammar.keep(CompiledGrammar.ConfigurationMask(words: words), for: sum)
    return true
  }

  /// Allows tokens below some nodes of the token tree that a closure's terminals take.
  /// - Returns: whether the work sufficed.
  private func walk(below nodes: [Int32], _ closure: Int32, _ mask: UnsafeMutablePointer<UInt32>) -> Bool {
    let tree = grammar.vocabulary.tree
    var visited = 0
    defer { program.store.visitedNodes += visited }
    let first = stacks.firstBytes(closure, program)
    var firstClasses: UInt64 = 0
    for byte in 0..<256 where first[byte >> 6] >> UInt64(byte & 63) & 1 != 0 { firstClasses |= ByteClass.bits[byte] }
    var levels: [Int] = []
    var buffer: [GrammarThread] = []
    for root in nodes where tree.classes[Int(root)] & firstClasses != 0 {
      var node = Int(root) + 1
      let end = Int(tree.ends[Int(root)])
      let base = Int(tree.depths[Int(root)])
      while node < end {
        let byte = tree.bytes[node]
        let depth = Int(tree.depths[node]) - base
        if depth == 1 {
          if first[Int(byte >> 6)] >> UInt64(byte & 63) & 1 == 0 {
            node = Int(tree.ends[node])
            continue
          }
          if buffer.isEmpty {
            let range = stacks.closures[Int(closure)]
            buffer += stacks.threads[Int(range.first)..<Int(range.first + range.count)]
            levels.append(buffer.count)
          }
          levels.removeLast(levels.count - 1)
        } else {
          levels.removeLast(levels.count - depth)
        }
        // Threads of the level above lie between the last two ends.
        let stop = levels[depth - 1]
        let start = depth >= 2 ? levels[depth - 2] : 0
        buffer.removeLast(buffer.count - stop)
        if program.store.exceedsMaskWork(visited) { return false }
        visited += stop - start
        for index in start..<stop { stacks.step(buffer[index], byte, program, into: &buffer, from: stop) }
        if stacks.exceededThreads {
          stacks.exceededThreads = false
          metLimit = true
          buffer.removeLast(buffer.count - stop)
        }
        if buffer.count == stop {
          node = Int(tree.ends[node])
          continue
        }
        levels.append(buffer.count)
        let token = tree.tokens[node]
        if token >= 0 { mask[Int(token >> 5)] |= 1 << UInt32(token & 31) }
        node += 1
      }
    }
    return true
  }

  // MARK: Forced text

  /// The bytes that must come next, as far as there is only one way: empty where the text may end, or where more than one
  /// byte may follow. Escapes of JSON that are mere spelling do not count as another way.
  ///
  /// - Parameter limit: how many bytes to look ahead.
  public func forcedBytes(limit: Int = 512) -> [UInt8] {
    guard !isTerminated, failure == nil, !canEnd else { return [] }
    return grammar.lock.withLock {
      grammar.trim()
      var result: [UInt8] = []
      var current = threads
      var next: [GrammarThread] = []
      while result.count < limit {
        guard let byte = onlyByte(current) else { break }
        next.removeAll(keepingCapacity: true)
        for thread in current { stacks.step(thread, byte, program, into: &next, from: 0) }
        if next.isEmpty || program.store.overflow != nil { break }
        result.append(byte)
        swap(&current, &next)
        if current.contains(where: { stacks.canEnd($0, program) }) { break }
      }
      return result
    }
  }

  private func onlyByte(_ threads: [GrammarThread]) -> UInt8? {
    var found: UInt8?
    func look(_ state: RegularState) -> Bool {
      let row = program.store.row(state)
      var isSpelling: Bool?
      for byte in 0..<256 where row[byte] != RegularStore.never {
        if byte == 0x5C {
          if isSpelling == nil { isSpelling = program.store.isEscapeRedundant(state) }
          if isSpelling == true { continue }
        }
        if let found, Int(found) != byte { return false }
        found = UInt8(byte)
      }
      return true
    }
    for thread in threads {
      guard look(thread.state) else { return nil }
      let acceptance = program.store.acceptance[Int(thread.state)]
      guard acceptance != 0 else { continue }
      for tag in program.store.acceptanceSets[Int(acceptance)] {
        let closure = stacks.closures[Int(stacks.closure(thread.stack, tag: tag, program))]
        for index in Int(closure.first)..<Int(closure.first + closure.count) {
          guard look(stacks.threads[index].state) else { return nil }
        }
      }
    }
    return found
  }
}
