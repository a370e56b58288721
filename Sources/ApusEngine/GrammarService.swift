import ApusCore
import ApusGrammar
import ApusTokenization
import Synchronization

/// Compiles grammars on threads of its own, so that neither the engine's loop nor the cooperative pool waits for it. The
/// vocabulary is built when the first grammar comes: an engine that never sees one pays nothing.
final class GrammarService: Sendable {
  typealias Answer = @Sendable (Result<CompiledGrammar, EngineError>) -> Void

  private struct Job: Sendable {
    var specification: GrammarSpecification
    var whitespace: GrammarSpecification.Whitespace
    var answer: Answer
  }

  private struct Queue: ~Copyable {
    var jobs: [Job] = []
    var threads = 0
  }

  /// Threads that compile at once: a hostile grammar takes its time on one of them.
  private static let maximumThreads = 2
  /// Grammars that wait at most.
  private static let maximumJobs = 1024

  private let tokenizer: Tokenizer
  private let size: Int
  private let endTokens: [TokenID]
  private let compiler = Mutex<GrammarCompiler?>(nil)
  private let queue = Mutex(Queue())

  /// - Parameters:
  ///   - size: token ids of the model, of which the tokenizer may know fewer.
  ///   - endTokens: tokens that end a generation.
  init(tokenizer: Tokenizer, size: Int, endTokens: [TokenID]) {
    self.tokenizer = tokenizer
    self.size = size
    self.endTokens = endTokens
  }

  /// What is known of a grammar without work.
  func known(
    _ specification: GrammarSpecification, whitespace: GrammarSpecification.Whitespace
  ) -> Result<CompiledGrammar, EngineError>? {
    // While the vocabulary is being built nothing is known, and nobody waits.
    compiler.withLockIfAvailable { $0 }?.flatMap { $0.known(specification, whitespace: whitespace) }
  }

  /// Compiles a grammar and answers on another thread.
  func compile(
    _ specification: GrammarSpecification, whitespace: GrammarSpecification.Whitespace, answer: @escaping Answer
  ) {
    enum Decision { case start, wait, refuse }
    let decision = queue.withLock { queue -> Decision in
      if queue.jobs.count >= Self.maximumJobs { return .refuse }
      queue.jobs.append(Job(specification: specification, whitespace: whitespace, answer: answer))
      if queue.threads >= Self.maximumThreads { return .wait }
      queue.threads += 1
      return .start
    }
    switch decision {
    case .wait: break
    case .refuse: answer(.failure(EngineError(.queueFull, "Too many grammars wait to be compiled. Try again later.")))
    case .start: EngineThread.start(name: "apus-grammar") { self.serve() }
    }
  }

  /// Compiles until nothing waits.
  private func serve() {
    while let job = queue.withLock({ queue -> Job? in
      if queue.jobs.isEmpty {
        queue.threads -= 1
        return nil
      }
      return queue.jobs.removeFirst()
    }) {
      let compiler = prepared()
      do throws(EngineError) {
        job.answer(.success(try compiler.compile(job.specification, whitespace: job.whitespace)))
      } catch {
        job.answer(.failure(error))
      }
    }
  }

  private func prepared() -> GrammarCompiler {
    compiler.withLock { compiler in
      if let compiler { return compiler }
      let vocabulary = TokenVocabulary(
        tokens: (0..<size).map { tokenizer.tokenBytes(TokenID($0)) }, isSpecial: { tokenizer.isSpecial($0) },
        endTokens: endTokens)
      let made = GrammarCompiler(vocabulary: vocabulary)
      compiler = made
      return made
    }
  }
}
