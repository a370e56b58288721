import Glibc

/// The whole content of a file, or of standard input for `-`.
package func readFile(_ path: String) throws(CommandFailure) -> [UInt8] {
  let descriptor = path == "-" ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC)
  guard descriptor >= 0 else {
    throw CommandFailure("Cannot read \(path): \(systemError()).", status: ExitStatus.missingInput)
  }
  defer { if path != "-" { close(descriptor) } }
  var bytes: [UInt8] = []
  var status = stat()
  if fstat(descriptor, &status) == 0, status.st_size > 0 { bytes.reserveCapacity(Int(status.st_size)) }
  var chunk = [UInt8](repeating: 0, count: 1 << 16)
  while true {
    let count = read(descriptor, &chunk, chunk.count)
    if count == 0 { return bytes }
    if count < 0 {
      if errno == EINTR { continue }
      throw CommandFailure("Cannot read \(path): \(systemError()).", status: ExitStatus.missingInput)
    }
    bytes.append(contentsOf: chunk[0..<count])
  }
}

/// Replaces a file's content in one step: a reader sees the old content or the new one, never a part.
package func writeFile(_ path: String, _ bytes: [UInt8]) throws(CommandFailure) {
  let temporary = "\(path).\(getpid()).partial"
  let descriptor = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o644)
  guard descriptor >= 0 else {
    throw CommandFailure("Cannot write \(path): \(systemError()).", status: ExitStatus.cannotWrite)
  }
  let isWritten = bytes.withUnsafeBytes { writeAll(descriptor, $0) } && fsync(descriptor) == 0
  close(descriptor)
  guard isWritten, rename(temporary, path) == 0 else {
    let reason = systemError()
    unlink(temporary)
    throw CommandFailure("Cannot write \(path): \(reason).", status: ExitStatus.cannotWrite)
  }
}

/// Whether something lies at a path.
package func fileExists(_ path: String) -> Bool { access(path, F_OK) == 0 }

/// Reads the lines of a file or, for `-`, of standard input. Lines end with a line feed; a carriage return before it is
/// dropped. Blocks its thread.
package final class LineReader {
  private let descriptor: Int32
  private let path: String
  private var buffer: [UInt8] = []
  private var start = 0
  private var isAtEnd = false
  /// The longest line accepted: a file without line feeds must not fill the memory.
  private let lengthLimit: Int

  /// Opens a file.
  package init(path: String, lengthLimit: Int = 64 << 20) throws(CommandFailure) {
    self.path = path
    self.lengthLimit = lengthLimit
    descriptor = path == "-" ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC)
    guard descriptor >= 0 else {
      throw CommandFailure("Cannot read \(path): \(systemError()).", status: ExitStatus.missingInput)
    }
  }

  deinit { if descriptor != STDIN_FILENO { close(descriptor) } }

  /// The next line without its end, or `nil` after the last.
  package func next() throws(CommandFailure) -> [UInt8]? {
    var searched = start
    while true {
      if let end = buffer[searched...].firstIndex(of: 0x0A) {
        let line = trimmed(start..<end)
        start = end + 1
        return line
      }
      if isAtEnd {
        guard start < buffer.count else { return nil }
        let line = trimmed(start..<buffer.count)
        start = buffer.count
        return line
      }
      buffer.removeFirst(start)
      start = 0
      searched = buffer.count
      if buffer.count > lengthLimit {
        throw CommandFailure(
          "A line of \(path) is longer than \(byteSize(lengthLimit)).", status: ExitStatus.invalidInput)
      }
      var chunk = [UInt8](repeating: 0, count: 1 << 16)
      let count = read(descriptor, &chunk, chunk.count)
      if count < 0 {
        if errno == EINTR { continue }
        throw CommandFailure("Cannot read \(path): \(systemError()).", status: ExitStatus.missingInput)
      }
      if count == 0 { isAtEnd = true } else { buffer.append(contentsOf: chunk[0..<count]) }
    }
  }

  private func trimmed(_ range: Range<Int>) -> [UInt8] {
    let end = range.count > 0 && buffer[range.upperBound - 1] == 0x0D ? range.upperBound - 1 : range.upperBound
    return Array(buffer[range.lowerBound..<end])
  }
}

/// A file to which whole lines are added, each with a single write, so that a crash leaves at most one part of a line.
package final class LineAppender: Sendable {
  private let descriptor: Int32
  private let path: String

  /// Opens a file for appending and makes it if there is none; `-` is standard output.
  package init(path: String) throws(CommandFailure) {
    self.path = path
    descriptor = path == "-" ? STDOUT_FILENO : open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o644)
    guard descriptor >= 0 else {
      throw CommandFailure("Cannot write \(path): \(systemError()).", status: ExitStatus.cannotWrite)
    }
  }

  deinit { if descriptor != STDOUT_FILENO { close(descriptor) } }

  /// Adds a line.
  package func append(_ line: String) throws(CommandFailure) {
    var text = line + "\n"
    let isWritten = text.withUTF8 { writeAll(descriptor, UnsafeRawBufferPointer($0)) }
    guard isWritten else {
      throw CommandFailure("Cannot write \(path): \(systemError()).", status: ExitStatus.cannotWrite)
    }
  }
}
