public import ApusCore

/// A grammar compiled for a vocabulary. Shared by all requests that use it; what it learns about masks while it is used is
/// kept inside, bounded.
public final class CompiledGrammar: TokenConstraint, @unchecked Sendable {
  /// The vocabulary of its masks.
  public let vocabulary: TokenVocabulary
  let program: GrammarProgram
  let lock = GrammarLock()
  private let shared: MaskCache
  private var terminalMasks: [RegularState: TerminalMask] = [:]
  private var configurationMasks: [RegularStore.Hash128: ConfigurationMask] = [:]
  /// Whole masks kept per grammar.
  private let maximumConfigurations: Int

  /// The mask of a set of threads.
  final class ConfigurationMask: Sendable {
    let words: [UInt32]
    init(words: [UInt32]) { self.words = words }
  }

  init(_ grammar: Grammar, vocabulary: TokenVocabulary, shared: MaskCache) throws(EngineError) {
    self.vocabulary = vocabulary
    self.shared = shared
    program = try GrammarProgram(grammar, specialTexts: vocabulary.specialTexts)
    maximumConfigurations = max(32, (4 << 20) / (vocabulary.maskWordCount * 4 + 64))
  }

  public func makeTokenMatcher() -> any TokenMatcher { GrammarMatcher(self) }

  /// Drops what can be computed again if it takes too much room. Called between steps, with the lock held.
  func trim() {
    program.store.beginOperation()
    if program.store.isFull { program.store.dropRows() }
    if terminalMasks.count > 1024 { terminalMasks = [:] }
  }

  func configurationMask(_ hash: RegularStore.Hash128) -> ConfigurationMask? { configurationMasks[hash] }

  func keep(_ mask: ConfigurationMask, for hash: RegularStore.Hash128) {
    if configurationMasks.count >= maximumConfigurations { configurationMasks = [:] }
    configurationMasks[hash] = mask
  }

  /// The mask of a terminal's state; `nil` if it takes more work than it may. The lock is held.
  func terminalMask(_ state: RegularState) -> TerminalMask? {
    if let known = terminalMasks[state] { return known }
    let node = program.store.nodes[Int(state)]
    let result: TerminalMask
    if node.kind == .tagged {
      // A tag changes what follows, not which tokens fit.
      guard let inner = terminalMask(node.a) else { return nil }
      result = TerminalMask(
        words: inner.words, tokens: inner.tokens,
        exits: inner.exits.isEmpty ? [] : [.init(tags: [node.b], nodes: inner.exits.flatMap(\.nodes))])
    } else {
      var hash = node.hash
      hash.combine(vocabulary.identity)
      if let known = shared.terminal(hash) {
        result = known
      } else {
        let builder = TerminalMaskBuilder(
          tree: vocabulary.tree, wordCount: vocabulary.maskWordCount, store: program.store,
          base: { self.terminalMask($0) })
        guard let built = builder.build(state) else { return nil }
        result = built
        if program.store.overflow == nil { shared.insert(result, for: hash) }
      }
    }
    terminalMasks[state] = result
    return result
  }

  // MARK: Warming up

  /// Derivatives taken in warming up at most, and by any one of its steps.
  private static let warmUpWork = 1 << 20

  /// Computes masks that texts are likely to ask for, so that they are there when a request needs one: where the grammar
  /// begins, and behind what can follow from there by the bytes that JSON is made of, breadth first. Called before the
  /// grammar is shared. The work is bounded by counts.
  ///
  /// - Returns: false if a limit of the automaton was met, which no text may ever meet: the grammar must be made anew then.
  func warmUp() -> Bool {
    let store = program.store
    store.visitedNodes = 0
    let maximumThreads = min(2048, 128 + 8 * program.nodes.count)
    let maximumNodes = min(4 << 20, 1 << 19 + program.nodes.count << 13)
    var stacks = GrammarStacks()
    store.beginOperation()
    let first = stacks.closures[Int(stacks.initialClosure(program))]
    var threads = Array(stacks.threads[Int(first.first)..<Int(first.first + first.count)].prefix(maximumThreads))
    var known = Set(threads.map(Self.key))
    var masked: Set<RegularState> = []
    var index = 0
    var next: [GrammarThread] = []
    var work = 0
    while index < threads.count {
      let thread = threads[index]
      index += 1
      work += store.workDone
      if work > Self.warmUpWork || store.isFull { return true }
      store.beginOperation(limit: Self.warmUpWork)
      let row = store.row(thread.state)
      if store.overflow != nil { return false }
      if Self.isWide(row), masked.insert(thread.state).inserted {
        _ = terminalMask(thread.state)
        if store.overflow != nil { return false }
        if store.visitedNodes > maximumNodes { return true }
      }
      for byte in Self.likelyBytes(row, acceptsEnd: store.acceptance[Int(thread.state)] != 0) {
        next.removeAll(keepingCapacity: true)
        stacks.step(thread, byte, program, into: &next, from: 0)
        stacks.exceededThreads = false
        if store.overflow != nil { return false }
        for thread in next where threads.count < maximumThreads && known.insert(Self.key(thread)).inserted {
          threads.append(thread)
        }
      }
    }
    return true
  }

  private static func key(_ thread: GrammarThread) -> UInt64 {
    UInt64(UInt32(bitPattern: thread.state)) << 32 | UInt64(UInt32(bitPattern: thread.stack))
  }

  /// Whether so many bytes may follow that the mask takes a while.
  private static func isWide(_ row: UnsafeMutablePointer<RegularState>) -> Bool {
    var live = 0
    for byte in 0x20..<0x7F where row[byte] != RegularStore.never { live += 1 }
    return live >= 16
  }

  /// Bytes that stand for all that may follow: one for each successor where there are few; otherwise what ends a string or
  /// number and what leads on in it. White space only where nothing else may come.
  private static func likelyBytes(_ row: UnsafeMutablePointer<RegularState>, acceptsEnd: Bool) -> [UInt8] {
    var found: [UInt8] = []
    var targets: [RegularState] = []
    var isSpace = false
    for byte in 0x20..<0x7F where row[byte] != RegularStore.never {
      if byte == 0x20 {
        isSpace = true
        continue
      }
      if byte == 0x5C || targets.contains(row[byte]) { continue }
      targets.append(row[byte])
      found.append(UInt8(byte))
      if found.count > 24 { break }
    }
    if found.count > 24 {
      found = found.filter { [0x22, 0x2C, 0x3A, 0x5D, 0x61, 0x7D].contains($0) }
      if row[0x61] != RegularStore.never, !found.contains(0x61) { found.append(0x61) }
    }
    if found.isEmpty, isSpace { found.append(0x20) }
    if acceptsEnd {
      // What comes behind the terminal: the row shows none of it.
      for byte: UInt8 in [0x22, 0x2C, 0x3A, 0x5B, 0x5D, 0x7B, 0x7D, 0x31, 0x74] where !found.contains(byte) {
        found.append(byte)
      }
      found.append(0x20)
    }
    return found
  }
}
