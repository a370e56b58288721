import ApusCore
import CLinux
import Glibc

/// Fills the masks of constrained requests on threads of its own while the model computes.
///
/// What may follow a token is known as soon as the token is drawn, a whole forward pass before the next draw. A mask is
/// therefore asked for at the end of a step and wanted after the next pass. Whoever wants a mask that no thread has begun
/// fills it himself, so that with no threads at all every mask is filled just before its draw, with the same bits.
///
/// **Slow masks.** A grammar may be one whose masks take milliseconds or more. The model's thread fills only masks of
/// requests whose last masks were quick, gives one up that turns out to take more work than those (`helpWork`), and waits for
/// the others a short time (`gather`); a request whose mask is not there then sits the draw out, and the step goes on without
/// it. Matchers of one grammar take turns, so that the same holds for all requests of a grammar whose mask is being filled.
/// While draws are taken down no thread begins a mask: what the model's thread asks matchers of requests that draw is then
/// never kept waiting. Where slow masks hold up all threads, further ones start, a few.
///
/// The threads start with the first mask: without grammars there are none.
final class MaskFiller: @unchecked Sendable {
  // Unchecked: the fields below and the states of matchers are read and written under the lock.
  private let lock = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
  private let changed = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
  private let threadCount: Int
  /// Read and written by the model's thread alone.
  private var startedThreads = 0
  /// Matchers whose masks no thread has begun. At most one entry for each request that has a slot, and for each that left
  /// its slot since a thread last looked.
  private var queue: [MaskedMatcher] = []
  private var newEntries = 0
  private var isStopping = false
  /// Draws are being taken down: no thread begins a mask. Written by the model's thread alone.
  private(set) var isPaused = false
  /// What the masks that are being filled exclude (`TokenConstraint.exclusion`), and how many of those masks are of matchers
  /// whose masks were slow before.
  private var excluded: [ObjectIdentifier] = []
  private var suspectCount = 0
  private var idleThreads = 0
  /// Masks filled by the threads.
  private var filledAhead = 0
  /// Masks filled by those who wanted them.
  private var filledOnDemand = 0

  /// Threads by default: few, since masks are small beside a pass, and more than one where there are processors for it, so
  /// that a slow mask leaves the others a thread.
  static var defaultThreadCount: Int { max(1, min(4, Int(sysconf(CInt(_SC_NPROCESSORS_ONLN))) / 4)) }

  /// Threads beside those, while slow masks hold them up.
  static let spareThreads = 8
  /// Seconds of processor time within which a mask counts as quick: more than 99 of 100 take.
  static let quickFill = 0.0005
  /// Work on a mask that the model's thread fills itself before it leaves it to the others, in units of
  /// `TokenMatcher.fillMask(into:work:)`: meant to be less than `quickFill`. A count and no time, so that a busy machine
  /// gives up no more masks than an idle one.
  static let helpWork = 1 << 15
  /// Quick masks after a slow one until a matcher's masks count as quick again.
  static let probation = 64
  /// Seconds that a step waits for masks that were not wanted before, while other requests could go on.
  static let patience = 0.001
  /// Seconds that a step waits if nobody else goes on: so long may a new request be kept waiting.
  static let idlePatience = 0.05

  /// - Parameters:
  ///   - threadCount: threads at most; none fills every mask when it is wanted.
  ///   - capacity: requests that have a slot at most.
  init(threadCount: Int, capacity: Int) {
    self.threadCount = threadCount
    queue.reserveCapacity(2 * capacity)
    pthread_mutex_init(lock, nil)
    var attributes = pthread_condattr_t()
    pthread_condattr_init(&attributes)
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
    pthread_cond_init(changed, &attributes)
    pthread_condattr_destroy(&attributes)
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
    let wanted = min(max(newEntries, isPaused ? queue.count : 0), threadCount)
    isPaused = false
    newEntries = 0
    let missing = wanted - startedThreads
    if wanted == 1 { pthread_cond_signal(changed) } else if wanted > 1 { pthread_cond_broadcast(changed) }
    pthread_mutex_unlock(lock)
    var attempts = missing
    while attempts > 0 {
      attempts -= 1
      if startThread() { startedThreads += 1 }
    }
  }

  /// Sees to the masks of the draws to come, and has the threads begin no other until `start`.
  ///
  /// - Parameters:
  ///   - wanted: the matchers of the requests that draw.
  ///   - othersGoOn: whether the step does something for other requests too.
  /// - Returns: for each of `wanted`, whether its mask is there and nothing that it needs is in use. With no threads, always.
  func gather(_ wanted: [MaskedMatcher], othersGoOn: Bool) -> [Bool] {
    for matcher in wanted { help(matcher, onlyIfQuick: startedThreads > 0) }
    pthread_mutex_lock(lock)
    let begin = monotonicSeconds()
    func isAvailable(_ matcher: MaskedMatcher) -> Bool {
      matcher.state == .ready && !excluded.contains(matcher.exclusion)
    }
    while true {
      var available = 0
      var waiting = 0
      var isWorthWaiting = false
      for matcher in wanted {
        if isAvailable(matcher) {
          available += 1
        } else {
          if matcher.state == .queued { waiting += 1 }
          if !matcher.isLate { isWorthWaiting = true }
        }
      }
      if available == wanted.count { break }
      startSpareThreads(waiting)
      if waiting > 0 && idleThreads > 0 { pthread_cond_broadcast(changed) }
      let canGoOn = othersGoOn || available > 0
      let end = begin + (canGoOn ? Self.patience : Self.idlePatience)
      if canGoOn && !isWorthWaiting || monotonicSeconds() >= end { break }
      var time = timespec(tv_sec: Int(end), tv_nsec: Int((end - end.rounded(.down)) * 1e9))
      pthread_cond_timedwait(changed, lock, &time)
    }
    isPaused = true
    let result = wanted.map { matcher in
      let isThere = isAvailable(matcher)
      matcher.isLate = !isThere
      return isThere
    }
    pthread_mutex_unlock(lock)
    return result
  }

  /// Starts threads for masks that wait, where all that there are have a mask to fill. The lock is held.
  private func startSpareThreads(_ waiting: Int) {
    var missing = min(waiting - idleThreads, threadCount + Self.spareThreads - startedThreads)
    while missing > 0 {
      missing -= 1
      if startThread() { startedThreads += 1 }
    }
  }

  /// Fills a mask that is wanted now if no thread has begun it. Does not wait for a thread.
  /// - Parameter onlyIfQuick: leaves it if it may take long, or turns out to, or if its grammar is in use.
  fileprivate func help(_ matcher: MaskedMatcher, onlyIfQuick: Bool = false) {
    pthread_mutex_lock(lock)
    var isMine = matcher.state == .queued || matcher.state == .stale
    if onlyIfQuick && (!matcher.pace.isQuick || excluded.contains(matcher.exclusion)) {
      if matcher.state == .stale {
        // It was not asked for ahead, or the mask was taken and not used.
        matcher.state = .queued
        queue.append(matcher)
      }
      isMine = false
    }
    if isMine {
      if matcher.state == .queued, let index = queue.firstIndex(where: { $0 === matcher }) { queue.remove(at: index) }
      matcher.state = .filling
      excluded.append(matcher.exclusion)
    }
    pthread_mutex_unlock(lock)
    if !isMine { return }
    let (seconds, isFilled) = matcher.timedFill(work: onlyIfQuick ? Self.helpWork : .max)
    pthread_mutex_lock(lock)
    if isFilled {
      finished(matcher, seconds)
      filledOnDemand += 1
    } else {
      matcher.pace.noteSlow()
      matcher.state = .queued
      queue.append(matcher)
      release(matcher)
    }
    pthread_mutex_unlock(lock)
  }

  /// Takes down that a mask is there. The lock is held.
  private func finished(_ matcher: MaskedMatcher, _ seconds: Double) {
    matcher.pace.note(seconds)
    matcher.state = .ready
    release(matcher)
  }

  /// Lets go of what a mask needed. The lock is held.
  private func release(_ matcher: MaskedMatcher) {
    if let index = excluded.firstIndex(of: matcher.exclusion) { excluded.remove(at: index) }
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

  fileprivate func isSuspect(_ matcher: MaskedMatcher) -> Bool {
    pthread_mutex_lock(lock)
    defer { pthread_mutex_unlock(lock) }
    return matcher.pace.isSuspect
  }

  /// Forgets a matcher whose request left. Does not wait: a thread that is filling its mask lets go of it afterwards.
  fileprivate func forget(_ matcher: MaskedMatcher) {
    pthread_mutex_lock(lock)
    if matcher.state == .queued, let index = queue.firstIndex(where: { $0 === matcher }) { queue.remove(at: index) }
    pthread_mutex_unlock(lock)
  }

  /// - Returns: whether there is one more thread. Without any the masks are filled when they are wanted.
  private func startThread() -> Bool {
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
    if status != 0 { box.release() }
    return status == 0
  }

  /// The next mask to begin: those likely to be quick first, and slow ones not on all threads. The lock is held.
  private func next() -> MaskedMatcher? {
    if isPaused { return nil }
    var found: Int?
    for (index, matcher) in queue.enumerated() where !excluded.contains(matcher.exclusion) {
      if !matcher.pace.isSuspect { return queue.remove(at: index) }
      if found == nil { found = index }
    }
    guard let found, suspectCount == 0 || suspectCount < threadCount + Self.spareThreads - 1 else { return nil }
    return queue.remove(at: found)
  }

  private func serve() {
    pthread_mutex_lock(lock)
    while !isStopping {
      guard let matcher = next() else {
        idleThreads += 1
        pthread_cond_wait(changed, lock)
        idleThreads -= 1
        continue
      }
      let isSuspect = matcher.pace.isSuspect
      if isSuspect { suspectCount += 1 }
      matcher.state = .filling
      excluded.append(matcher.exclusion)
      pthread_mutex_unlock(lock)
      let seconds = matcher.timedFill().seconds
      pthread_mutex_lock(lock)
      finished(matcher, seconds)
      if isSuspect { suspectCount -= 1 }
      filledAhead += 1
      pthread_cond_broadcast(changed)
    }
    pthread_mutex_unlock(lock)
  }
}

/// How quickly a request's masks were filled. Under the filler's lock.
final class MaskPace {
  private var count = 0
  private var trials = 0

  /// Whether masks were filled before, the last ones quickly.
  fileprivate var isQuick: Bool { count > 0 && trials == 0 }
  /// Whether a mask was slow not long ago.
  fileprivate var isSuspect: Bool { trials > 0 }

  fileprivate func note(_ seconds: Double) {
    count += 1
    if seconds > MaskFiller.quickFill { noteSlow() } else if trials > 0 { trials -= 1 }
  }

  fileprivate func noteSlow() { trials = MaskFiller.probation }
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
  fileprivate let exclusion: ObjectIdentifier
  /// Shared by a matcher and its forks.
  fileprivate let pace: MaskPace
  /// The step before waited in vain for the mask.
  fileprivate var isLate = false

  /// - Parameter earlierOutputs: the outputs so far, which are followed once more after a retraction.
  init(
    _ constraint: any TokenConstraint, earlierOutputs: ArraySlice<TokenID>, filler: MaskFiller,
    pace: MaskPace = MaskPace()
  ) {
    self.constraint = constraint
    exclusion = ObjectIdentifier(constraint.exclusion)
    self.pace = pace
    self.earlierOutputs = earlierOutputs
    self.filler = filler
  }

  deinit { memory?.deallocate() }

  /// Has the next draw's mask filled on another thread, once `MaskFiller.start` is called.
  func fillAhead() { filler.enqueue(self) }

  /// Whether a mask was slow not long ago, so that none should be filled where others wait for it.
  var isSuspect: Bool { filler.isSuspect(self) }

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
    let twin = MaskedMatcher(constraint, earlierOutputs: [], filler: filler, pace: pace)
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
  /// - Parameter work: what it may take; `Int.max` is whatever it takes.
  /// - Returns: seconds of processor time that it took, and whether the mask is there.
  fileprivate func timedFill(work: Int = .max) -> (seconds: Double, isFilled: Bool) {
    var begin = timespec()
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin)
    let isFilled = fill(work)
    var end = timespec()
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end)
    return (Double(end.tv_sec - begin.tv_sec) + Double(end.tv_nsec - begin.tv_nsec) * 1e-9, isFilled)
  }

  private func fill(_ work: Int) -> Bool {
    let matcher = made()
    if matcher.allowsEverything { return true }
    let words: UnsafeMutablePointer<UInt32>
    if let memory {
      words = memory
    } else {
      words = .allocate(capacity: max(matcher.maskWordCount, 1))
      memory = words
    }
    if work != .max { return matcher.fillMask(into: words, work: work) }
    matcher.fillMask(into: words)
    return true
  }
}
