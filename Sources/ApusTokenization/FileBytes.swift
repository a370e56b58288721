import ApusCore
import Glibc

/// A file mapped into memory for reading.
struct FileBytes: ~Copyable {
  private let bytes: UnsafeBufferPointer<UInt8>
  private let mapping: UnsafeMutableRawPointer?

  /// Maps a file. `limit` bounds its size in bytes; memory is only used for what is looked at.
  init(_ path: String, limit: Int = 1 << 30) throws(EngineError) {
    let descriptor = Glibc.open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
    guard descriptor >= 0 else {
      throw EngineError(.invalidCheckpoint, "\(path) cannot be opened: \(String(cString: strerror(errno)))")
    }
    defer { close(descriptor) }
    var status = stat()
    guard fstat(descriptor, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
      throw EngineError(.invalidCheckpoint, "\(path) is not a file")
    }
    let size = Int(status.st_size)
    guard size <= limit else {
      throw EngineError(.invalidCheckpoint, "\(path) is \(size) bytes long, more than a tokenizer file can be")
    }
    if size == 0 {
      mapping = nil
      bytes = UnsafeBufferPointer(start: nil, count: 0)
      return
    }
    guard let address = mmap(nil, size, PROT_READ, MAP_PRIVATE, descriptor, 0), address != MAP_FAILED
    else {
      throw EngineError(.invalidCheckpoint, "\(path) cannot be read: \(String(cString: strerror(errno)))")
    }
    mapping = address
    bytes = UnsafeBufferPointer(start: address.assumingMemoryBound(to: UInt8.self), count: size)
  }

  deinit {
    if let mapping { munmap(mapping, bytes.count) }
  }

  /// Calls `body` with the contents, which are mapped for as long as the call lasts.
  borrowing func withBytes<Result, Failure: Error>(
    _ body: (UnsafeBufferPointer<UInt8>) throws(Failure) -> Result
  ) throws(Failure) -> Result {
    try body(bytes)
  }

  /// Whether a path names a regular file.
  static func exists(_ path: String) -> Bool {
    var status = stat()
    return stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
  }
}
