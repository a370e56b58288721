import ApusCore
import Glibc

/// A file mapped into memory for reading.
struct FileBytes: ~Copyable {
  let bytes: UnsafeBufferPointer<UInt8>
  private let mapping: UnsafeMutableRawPointer?

  /// Maps a file. `limit` bounds its size; `populates` reads it at once, which suits files that are read as a whole.
  init(_ path: String, limit: Int = 1 << 30, populates: Bool = true) throws(EngineError) {
    let descriptor = Glibc.open(path, O_RDONLY | O_CLOEXEC)
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
    let flags = MAP_PRIVATE | (populates ? MAP_POPULATE : 0)
    guard let address = mmap(nil, size, PROT_READ, flags, descriptor, 0), address != MAP_FAILED else {
      throw EngineError(.invalidCheckpoint, "\(path) cannot be read: \(String(cString: strerror(errno)))")
    }
    mapping = address
    bytes = UnsafeBufferPointer(start: address.assumingMemoryBound(to: UInt8.self), count: size)
  }

  deinit {
    if let mapping { munmap(mapping, bytes.count) }
  }

  /// Whether a path names a regular file.
  static func exists(_ path: String) -> Bool {
    var status = stat()
    return stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
  }
}
