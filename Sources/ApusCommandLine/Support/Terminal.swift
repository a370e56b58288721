import Glibc

/// Writes to a file descriptor without a buffer of its own, so that streamed text appears when it is written and output
/// of several tasks interleaves only between writes.
package struct Terminal: Sendable {
  /// The descriptor written to.
  package let descriptor: Int32

  /// Standard output.
  package static let output = Terminal(descriptor: STDOUT_FILENO)
  /// Standard error.
  package static let error = Terminal(descriptor: STDERR_FILENO)

  /// Writes to a descriptor that somebody else owns.
  package init(descriptor: Int32) { self.descriptor = descriptor }

  /// Whether a person is looking: a terminal that understands control sequences.
  package var isInteractive: Bool {
    guard isatty(descriptor) == 1 else { return false }
    return environmentValue("TERM").map { $0 != "dumb" && !$0.isEmpty } ?? false
  }

  /// Whether colours are welcome (https://no-color.org).
  package var hasColor: Bool { isInteractive && environmentValue("NO_COLOR") == nil }

  /// Columns; 80 where the terminal does not say.
  package var width: Int {
    var size = winsize()
    guard ioctl(descriptor, UInt(TIOCGWINSZ), &size) == 0, size.ws_col > 0 else { return 80 }
    return Int(size.ws_col)
  }

  /// Writes a text. A reader that is gone (a closed pipe) is not an error: there is nobody left to tell.
  package func write(_ text: String) {
    var text = text
    text.withUTF8 { _ = writeAll(descriptor, UnsafeRawBufferPointer($0)) }
  }

  /// Writes a line.
  package func line(_ text: String = "") { write(text + "\n") }

  /// The text in a dimmer colour, where colours are welcome.
  func dim(_ text: String) -> String { hasColor ? "\u{1B}[2m\(text)\u{1B}[0m" : text }
  /// The text in bold, where colours are welcome.
  func bold(_ text: String) -> String { hasColor ? "\u{1B}[1m\(text)\u{1B}[0m" : text }
}

/// Writes all bytes, continuing after interruptions and partial writes.
/// - Returns: whether everything was written.
@discardableResult
func writeAll(_ descriptor: Int32, _ bytes: UnsafeRawBufferPointer) -> Bool {
  var offset = 0
  while offset < bytes.count {
    let count = Glibc.write(descriptor, bytes.baseAddress! + offset, bytes.count - offset)
    if count > 0 {
      offset += count
    } else if count < 0 && errno == EINTR {
      continue
    } else if count < 0 && errno == EAGAIN {
      var state = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
      _ = poll(&state, 1, -1)
    } else {
      return false
    }
  }
  return true
}

/// The value of an environment variable.
func environmentValue(_ name: String) -> String? { getenv(name).map { String(cString: $0) } }

/// Seconds of a clock that never jumps.
package func monotonicSeconds() -> Double {
  var time = timespec()
  clock_gettime(CLOCK_MONOTONIC, &time)
  return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
}

/// The sentence of the last system error.
func systemError() -> String { String(cString: strerror(errno)) }
