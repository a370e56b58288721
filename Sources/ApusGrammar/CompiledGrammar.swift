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

  /// The mask of a terminal's state. The lock is held.
  func terminalMask(_ state: RegularState) -> TerminalMask {
    if let known = terminalMasks[state] { return known }
    let node = program.store.nodes[Int(state)]
    let result: TerminalMask
    if node.kind == .tagged {
      // A tag changes what follows, not which tokens fit.
      let inner = terminalMask(node.a)
      result = TerminalMask(
        words: inner.words, tokens: inner.tokens,
        exits: inner.exits.isEmpty ? [] : [.init(tags: [node.b], nodes: inner.exits.flatMap(\.nodes))])
    } else {
      var hash = node.hash
      hash.combine(vocabulary.identity)
      if let known = shared.terminal(hash) {
        result = known
      } else {
        result = TerminalMaskBuilder(
          tree: vocabulary.tree, wordCount: vocabulary.maskWordCount, store: program.store,
          base: { self.terminalMask($0) }
        ).build(state)
        if program.store.overflow == nil { shared.insert(result, for: hash) }
      }
    }
    terminalMasks[state] = result
    return result
  }
}
