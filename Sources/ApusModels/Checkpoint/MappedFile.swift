public import ApusCore
import Glibc

/// A whole file mapped into memory, read-only. Pages come in as they are touched; the mapping ends with the object.
///
/// Who maps a file trusts that nobody shortens it: reading past a new end is a fault of the process (SIGBUS), as with
/// every mapped checkpoint.
public final class MappedFile: @unchecked Sendable {
  // Unchecked: the mapping is read-only and never moves.

  /// Where the file was opened.
  public let path: String
  /// The file's bytes. They lie at an address that is a multiple of the page size.
  public let bytes: UnsafeRawBufferPointer
  /// When the file was last changed, in nanoseconds since 1970.
  public let modified: Int

  /// Maps a file.
  /// - Throws: `invalidCheckpoint` if it cannot be opened, is not a regular file, or is empty.
  public init(path: String) throws(EngineError) {
    // Without waiting for a writer, should it be a pipe.
    let descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
    guard descriptor >= 0 else {
      throw EngineError(.invalidCheckpoint, "\(path) cannot be opened: \(systemErrorText()).")
    }
    defer { close(descriptor) }
    var status = stat()
    guard fstat(descriptor, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
      throw EngineError(.invalidCheckpoint, "\(path) is not a regular file.")
    }
    guard status.st_size > 0 else { throw EngineError(.invalidCheckpoint, "\(path) is empty.") }
    let size = Int(status.st_size)
    guard let address = mmap(nil, size, PROT_READ, MAP_PRIVATE, descriptor, 0), address != MAP_FAILED else {
      throw EngineError(.invalidCheckpoint, "\(path) cannot be mapped into memory: \(systemErrorText()).")
    }
    self.path = path
    self.bytes = UnsafeRawBufferPointer(start: address, count: size)
    self.modified = Int(status.st_mtim.tv_sec) &* 1_000_000_000 &+ Int(status.st_mtim.tv_nsec)
  }

  deinit { munmap(UnsafeMutableRawPointer(mutating: bytes.baseAddress!), bytes.count) }

  /// Asks the kernel to read the file ahead, so that packing does not wait for one page at a time.
  public func readAhead() {
    posix_madvise(UnsafeMutableRawPointer(mutating: bytes.baseAddress!), bytes.count, POSIX_MADV_WILLNEED)
  }
}

/// The text of `errno`.
func systemErrorText() -> String { String(cString: strerror(errno)) }

/// Reads a small file, such as a configuration.
/// - Returns: `nil` if there is no such file.
/// - Throws: `invalidCheckpoint` if the file is there but cannot be read or has more than `limit` bytes.
public func readSmallFile(_ path: String, limit: Int = 64 << 20) throws(EngineError) -> [UInt8]? {
  let descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
  guard descriptor >= 0 else {
    if errno == ENOENT || errno == ENOTDIR { return nil }
    throw EngineError(.invalidCheckpoint, "\(path) cannot be opened: \(systemErrorText()).")
  }
  defer { close(descriptor) }
  var content: [UInt8] = []
  var chunk = [UInt8](repeating: 0, count: 64 << 10)
  while true {
    let count = chunk.withUnsafeMutableBytes { read(descriptor, $0.baseAddress!, $0.count) }
    if count == 0 { return content }
    if count < 0 {
      if errno == EINTR { continue }
      throw EngineError(.invalidCheckpoint, "\(path) cannot be read: \(systemErrorText()).")
    }
    content.append(contentsOf: chunk[..<count])
    guard content.count <= limit else {
      throw EngineError(.invalidCheckpoint, "\(path) has more than \(limit) bytes, which no such file should have.")
    }
  }
}
