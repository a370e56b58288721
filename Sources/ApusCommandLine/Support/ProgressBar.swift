import Synchronization

/// Progress on standard error: a bar that redraws itself on a terminal, a plain line now and then anywhere else.
///
/// Safe to update from any task. Redraws at most ten times a second, so an update costs a lock and a comparison.
package final class ProgressBar: Sendable {
  private struct State {
    var done: Double
    var total: Double
    /// What was done when the work began, by an earlier run for instance: it says nothing about the time left.
    var initial: Double
    var note = ""
    var lastDrawn = -1.0
    var lastTenth = -1
    var isFinished = false
  }

  private let title: String
  private let terminal: Terminal
  private let isInteractive: Bool
  private let isQuiet: Bool
  private let start = monotonicSeconds()
  private let state: Mutex<State>

  /// Starts a bar.
  /// - Parameters:
  ///   - title: what is being done, in a word or two.
  ///   - total: the amount of work in any unit; 0 if it is not known yet.
  ///   - done: the amount done before the start, such as by an earlier run.
  ///   - isQuiet: draws nothing at all.
  package init(
    _ title: String, total: Double, done: Double = 0, isQuiet: Bool = false, terminal: Terminal = .error
  ) {
    self.title = title
    self.terminal = terminal
    self.isQuiet = isQuiet
    self.isInteractive = terminal.isInteractive
    self.state = Mutex(State(done: done, total: total, initial: done))
  }

  /// Adds finished work.
  package func advance(by amount: Double = 1, note: String? = nil) {
    draw { state in
      state.done += amount
      if let note { state.note = note }
    }
  }

  /// Sets what was done so far. What is done when the total is first known counts as done before the start.
  package func update(done: Double, total: Double? = nil, note: String? = nil) {
    draw { state in
      state.done = done
      if let total {
        if state.total == 0 { state.initial = done }
        state.total = total
      }
      if let note { state.note = note }
    }
  }

  /// Prints a line that stays, above the bar.
  package func say(_ text: String) {
    state.withLock { state in
      let isDrawn = isInteractive && !isQuiet && state.lastDrawn >= 0 && !state.isFinished
      terminal.write((isDrawn ? "\r\u{1B}[K" : "") + text + "\n")
    }
  }

  /// Ends the bar; on a terminal the line is removed, so that what follows stands alone.
  package func finish() {
    state.withLock { state in
      guard !state.isFinished else { return }
      state.isFinished = true
      if isInteractive && !isQuiet && state.lastDrawn >= 0 { terminal.write("\r\u{1B}[K") }
    }
  }

  private func draw(_ change: (inout State) -> Void) {
    state.withLock { state in
      change(&state)
      guard !isQuiet, !state.isFinished else { return }
      let now = monotonicSeconds()
      if isInteractive {
        guard now - state.lastDrawn >= 0.1 || state.done >= state.total else { return }
        state.lastDrawn = now
        terminal.write("\r\u{1B}[K" + line(state, elapsed: now - start, width: terminal.width))
      } else if state.total > 0 {
        let tenth = Int(state.done / state.total * 10)
        // A line for each tenth, two seconds apart; work that is done sooner needs no lines at all.
        let previous = state.lastDrawn < 0 ? start : state.lastDrawn
        let isDue = now - previous >= 2 || (tenth >= 10 && state.lastDrawn >= 0)
        guard tenth > state.lastTenth, isDue else { return }
        state.lastTenth = tenth
        state.lastDrawn = now
        terminal.line(
          "\(title): \(Int(state.done / state.total * 100))%" + timeLeft(state, elapsed: now - start)
            + (state.note.isEmpty ? "" : " (\(state.note))"))
      }
    }
  }

  /// The time left at the pace so far, once there is a pace to speak of.
  private func timeLeft(_ state: State, elapsed: Double) -> String {
    let share = (state.done - state.initial) / max(1e-9, state.total - state.initial)
    guard share > 0.02, share < 1, elapsed > 1 else { return "" }
    return ", \(duration(elapsed / share - elapsed)) left"
  }

  private func line(_ state: State, elapsed: Double, width: Int) -> String {
    guard state.total > 0 else { return "\(title) \(state.note)" }
    let share = min(1, max(0, state.done / state.total))
    var tail = " \(Int(share * 100))%"
    tail += timeLeft(state, elapsed: elapsed)
    if !state.note.isEmpty { tail += ", \(state.note)" }
    let columns = max(0, min(30, width - title.count - tail.count - 4))
    let filled = Int((Double(columns) * share).rounded(.down))
    let bar = String(repeating: "#", count: filled) + String(repeating: ".", count: columns - filled)
    return String("\(title) [\(bar)]\(tail)".prefix(max(10, width - 1)))
  }
}
