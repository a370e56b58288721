import Glibc

/// An advisory lock of a file (`flock`), as the `filelock` package that huggingface_hub uses takes it. It ends with the
/// object, or with the process, however that ends.
final class FileLock: Sendable {
  private let descriptor: Int32

  private init(descriptor: Int32) { self.descriptor = descriptor }

  deinit { close(descriptor) }

  /// Takes a lock, waiting as long as another process holds it.
  /// - Parameters:
  ///   - path: the lock's file, made if there is none. It stays: removing it would open a gap in which two hold it.
  ///   - onWait: called once if there is somebody to wait for.
  static func acquire(_ path: String, onWait: () -> Void) async throws -> FileLock {
    var hasWaited = false
    while true {
      if let lock = try attempt(path) { return lock }
      if !hasWaited { onWait() }
      hasWaited = true
      try await Task.sleep(for: .milliseconds(100))
    }
  }

  private static func attempt(_ path: String) throws(HubError) -> FileLock? {
    let descriptor = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0o664)
    guard descriptor >= 0 else { throw systemFailure("open the lock", path) }
    guard flock(descriptor, LOCK_EX | LOCK_NB) == 0 else {
      let code = errno
      defer { close(descriptor) }
      if code == EWOULDBLOCK || code == EINTR { return nil }
      throw HubError(
        .fileSystem,
        "Cannot lock \(path): \(String(cString: strerror(code))). Set HF_HUB_CACHE to a folder on a file system with locks."
      )
    }
    // Some holders remove the file when they are done; then this is a lock of a file that nobody else will open.
    var own = stat(), there = stat()
    guard fstat(descriptor, &own) == 0, stat(path, &there) == 0, own.st_ino == there.st_ino, own.st_dev == there.st_dev
    else {
      close(descriptor)
      return nil
    }
    return FileLock(descriptor: descriptor)
  }
}
