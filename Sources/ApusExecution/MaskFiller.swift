import ApusCore
import CLinux
import Glibc

/// Fills the masks of constrained requests on threads of its own while the model computes.
///
/// What may follow a token is known as soon as the token is drawn, a whole forward pass before the next draw. A mask is
/// therefore asked for at the end of a step and wanted after the next pass. Whoever wants a mask that no thread has begun
/// fills it himself, so that with no threads at all every mask is filled just before its draw, with the same bits. A slow
/// mask costs a step the time by which it outlasts the pass, and never waits for another slow one.
///
/// The threads start with the first mask: without grammars there are none.
final class MaskFiller: @unchecked Sendable {
  // Unchecked: the fields below and the states of matchers are read and written under the lock.
  private let lock = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
  private let changed = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
  private let threadCount: Int
  private var startedThreads = 0
  /// Matchers whose masks no thread has begun. At most one entry for each request that has a slot, and for each that left
  /// its slot since a thread last looked.
  private var queue: [MaskedMatcher] = []
  private var newEntries = 0
  private var isStopping = false
  /// Masks filled by the threads.
  private var filledAhead = 0
  /// Masks filled by those who wanted them.
  private var filledOnDemand = 0

  /// Threads by default: few, since masks are small beside a pass, and more than one where there are processors for it, so
  /// that a slow mask leaves the others a thread.
  static var defaultThreadCount: Int { max(1, min(4, Int(sysconf(CInt(_SC_NPROCESSORS_ONLN))) / 4)) }

  /// - Parameters:
  ///   - threadCount: threads at most; none fills every mask when it is wanted.
  ///   - capacity: requests that have a slot at most.
  init(threadCount: Int, capacity: Int) {
    self.threadCount = threadCount
    queue.reserveCapacity(2 * capacity)
    pthread_mutex_init(lock, nil)
    pthread_cond_init(changed, nil)
  }

  deinit {
    pthread_cond_destroy(changed)
    pthread_mutex_destroy(lock)
    changed.deallocate()
    lock.deallocate()
  }

  /// Ends the threads, each after the mask that it is filling.
  func stop() {
    pthread_mutex_lock(lock)
    isStopping = true
    queue.removeAll()
    pthread_cond_broadcast(changed)
    pthread_mutex_unlock(lock)
  }

  /// How many masks were filled by the threads, and how many by those who wanted them.
  var counts: (ahead: Int, onDemand: Int) {
    pthread_mutex_lock(lock)
    defer { pthread_mutex_unlock(lock) }
    return (filledAhead, filledOnDemand)
  }

  /// Queues a matcher whose mask is stale. Nothing starts before `start`.
  fileprivate func enqueue(_ matcher: MaskedMatcher) {
    if threadCount == 0 { return }
    pthread_mutex_lock(lock)
    if matcher.state == .stale {
      matcher.state = .queued
      queue.append(matcher)
      newEntries += 1
    }
    pthread_mutex_unlock(lock)
  }

  /// Sets the threads to work on what was queued.
  func start() {
    pthread_mutex_lock(lock)
    let wanted = min(newEntries, threadCount)
    newEntries = 0
    var missing = 0
    if wanted > startedThreads {
      missing = wanted - startedThreads
      startedThreads = wanted
    }
    if wanted == 1 { pthread_cond_signal(changed) } else if wanted > 1 { pthread_cond_broadcast(changed) }
    pthread_mutex_unlock(lock)
    for _ in 0..<missing { startThread() }
  }

  /// Fills a mask that is wanted now if no thread has begun it. Does not wait.
  fileprivate func help(_ matcher: MaskedMatcher) {
    pthread_mutex_lock(lock)
    if matcher.state == .queued, let index = queue.firstIndex(where: { $0 === matcher }) { queue.remove(at: index) }
    let isMine = matcher.state == .queued || matcher.state == .stale
    if isMine { matcher.state = .filling }
    pthread_mutex_unlock(lock)
    if !isMine { return }
    matcher.fill()
    pthread_mutex_lock(lock)
    matcher.state = .ready
    filledOnDemand += 1
    pthread_mutex_unlock(lock)
  }

  /// Waits until a mask is there, and hands the matcher back to the caller's thread.
  fileprivate func finish(_ matcher: MaskedMatcher) {
    help(matcher)
    pthread_mutex_lock(lock)
    while matcher.state != .ready { pthread_cond_wait(changed, lock) }
    matcher.state = .stale
    pthread_mutex_unlock(lock)
  }

  /// Hands the matcher back to the caller's thread without a mask.
  fileprivate func cancel(_ matcher: MaskedMatcher) {
    pthread_mutex_lock(lock)
    if matcher.state == .queued, let index = queue.firstIndex(where: { $0 === matcher }) { queue.remove(at: index) }
    while matcher.state == .filling { pthread_cond_wait(changed, lock) }
    matcher.state = .stale
    pthread_mutex_unlock(lock)
  }

  /// Forgets a matcher whose request left. Does not wait: a thread that is filling its mask lets go of it afterwards.
  fileprivate func forget(_ matcher: MaskedMatcher) {
    pthread_mutex_lock(lock)
    if matcher.state == .queued, let index = queue.firstIndex(where: { $0 === matcher }) { queue.remove(at: index) }
    pthread_mutex_unlock(lock)
  }

  private func startThread() {
    var attributes = pthread_attr_t()
    pthread_attr_init(&attributes)
    pthread_attr_setstacksize(&attributes, 8 << 20)
    pthread_attr_setdetachstate(&attributes, CInt(PTHREAD_CREATE_DETACHED))
    defer { pthread_attr_destroy(&attributes) }
    var thread = pthread_t()
    let box = Unmanaged.passRetained(self)
    let status = pthread_create(
      &thread, &attributes,
      { argument in
        apus_thread_set_name("apus-mask")
        Unmanaged<MaskFiller>.fromOpaque(argument!).takeRetainedValue().serve()
        return nil
      }, box.toOpaque())
    // Without the thread masks are filled when they are wanted.
    if status != 0 { box.release() }
  }

  private func serve() {
    pthread_mutex_lock(lock)
    while !isStopping {
      if queue.isEmpty {
        pthread_cond_wait(changed, lock)
        continue
      }
      let matcher = queue.removeFirst()
      matcher.state = .filling
      pthread_mutex_unlock(lock)
      matcher.fill()
      pthread_mutex_lock(lock)
      matcher.state = .ready
      filledAhead += 1
      pthread_cond_broadcast(changed)
    }
    pthread_mutex_unlock(lock)
  }
}

/// One request's matcher together with the mask of its next draw.
///
/// It belongs to the model's thread. Between `fillAhead` and the next use of anything else a thread of the filler has it.
/// The matcher is made and told of earlier outputs by whoever fills the first mask.
final class MaskedMatcher: @unchecked Sendable {
  // Unchecked: `state`, under the filler's lock, says which thread has the rest.

  fileprivate enum State {
    /// The mask belongs to an earlier place, and the matcher to the model's thread.
    case stale
    /// A mask was asked for.
    case queued
    /// A thread has the matcher.
    case filling
    /// The mask is that of the next draw.
    case ready
  }

  private let filler: MaskFiller
  private let constraint: any TokenConstraint
  private let earlierOutputs: ArraySlice<TokenID>
  private var matcher: (any TokenMatcher)?
  private var memory: UnsafeMutablePointer<UInt32>?
  fileprivate var state = State.stale

  /// - Parameter earlierOutputs: the outputs so far, which are followed once more after a retraction.
  init(_ constraint: any TokenConstraint, earlierOutputs: ArraySlice<TokenID>, filler: MaskFiller) {
    self.constraint = constraint
    self.earlierOutputs = earlierOutputs
    self.filler = filler
  }

  deinit { memory?.deallocate() }

  /// Has the next draw's mask filled on another thread, once `MaskFiller.start` is called.
  func fillAhead() { filler.enqueue(self) }

  /// Fills the mask here if no thread has begun it.
  func help() { filler.help(self) }

  /// The next draw's mask, which the caller may change; `nil` where everything is allowed. It is given once: the next call
  /// fills it anew.
  func takeMask() -> UnsafeMutableBufferPointer<UInt32>? {
    filler.finish(self)
    guard let matcher, !matcher.allowsEverything else { return nil }
    return UnsafeMutableBufferPointer(start: memory, count: matcher.maskWordCount)
  }

  /// Takes the token drawn.
  func accept(_ token: TokenID) {
    filler.cancel(self)
    _ = made().accept(token)
  }

  /// Takes a token if it may come; after the end of its text the constraint says nothing more.
  func tryAccept(_ token: TokenID) -> Bool {
    filler.cancel(self)
    let matcher = made()
    return matcher.isTerminated || matcher.accept(token)
  }

  /// Whether nothing can follow: the constraint's text has ended, or it failed.
  var isEnded: Bool {
    filler.cancel(self)
    let matcher = made()
    return matcher.isTerminated || matcher.failure != nil
  }

  /// A matcher in the same place, which goes its own way from here; `nil` if there is none to be had. Its masks are filled
  /// when they are wanted.
  func fork() -> MaskedMatcher? {
    filler.cancel(self)
    guard let copy = made().fork() else { return nil }
    let twin = MaskedMatcher(constraint, earlierOutputs: [], filler: filler)
    twin.matcher = copy
    return twin
  }

  /// The tokens that have to follow, which the matcher takes.
  func takeForcedTokens() -> [TokenID] {
    filler.cancel(self)
    return made().takeForcedTokens()
  }

  /// Why nothing can follow, if a limit was reached.
  var failure: EngineError? {
    filler.cancel(self)
    return matcher?.failure
  }

  /// The request leaves its slot.
  func forget() { filler.forget(self) }

  private func made() -> any TokenMatcher {
    if let matcher { return matcher }
    let fresh = constraint.makeTokenMatcher()
    for token in earlierOutputs { _ = fresh.accept(token) }
    matcher = fresh
    return fresh
  }

  /// Computes the mask. Called by the thread that has the matcher.
  fileprivate func fill() {
    let matcher = made()
    if matcher.allowsEverything { return }
    let words: UnsafeMutablePointer<UInt32>
    if let memory {
      words = memory
    } else {
      words = .allocate(capacity: max(matcher.maskWordCount, 1))
      memory = words
    }
    matcher.fillMask(into: words)
  }
}
