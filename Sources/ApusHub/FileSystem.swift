import Glibc

/// Seconds of a clock that never jumps.
func monotonicSeconds() -> Double {
  var time = timespec()
  clock_gettime(CLOCK_MONOTONIC, &time)
  return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
}

/// Seconds since 1970.
func wallSeconds() -> Double {
  var time = timespec()
  clock_gettime(CLOCK_REALTIME, &time)
  return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
}

/// The error of the last system call on a path.
func systemFailure(_ action: String, _ path: String) -> HubError {
  let code = errno
  let reason = String(cString: strerror(code))
  if code == ENOSPC || code == EDQUOT {
    return HubError(
      .noSpace, "Cannot \(action) \(path): \(reason). What was downloaded is kept; run the command again to go on.")
  }
  return HubError(.fileSystem, "Cannot \(action) \(path): \(reason).")
}

/// A path that begins at the root, without a slash at its end.
func absolutePath(_ path: String) -> String {
  var path = path
  if !path.hasPrefix("/") {
    if let pointer = getcwd(nil, 0) {
      path = String(cString: pointer) + "/" + path
      free(pointer)
    }
  }
  while path.count > 1 && path.hasSuffix("/") { path.removeLast() }
  return path
}

/// What lies at a path, after following links.
enum FileKind: Equatable {
  case file(size: Int)
  case directory
  case other
  case nothing
}

/// What lies at a path.
func fileKind(_ path: String) -> FileKind {
  var status = stat()
  guard stat(path, &status) == 0 else { return .nothing }
  switch status.st_mode & S_IFMT {
  case S_IFREG: return .file(size: Int(status.st_size))
  case S_IFDIR: return .directory
  default: return .other
  }
}

/// The target of a symbolic link, or `nil` for anything else.
func linkTarget(_ path: String) -> String? {
  var buffer = [UInt8](repeating: 0, count: 4096)
  let count = buffer.withUnsafeMutableBytes { readlink(path, $0.bindMemory(to: CChar.self).baseAddress!, $0.count) }
  return count > 0 && count < buffer.count ? String(decoding: buffer[..<count], as: UTF8.self) : nil
}

/// Makes a directory and those above it.
func makeDirectories(_ path: String) throws(HubError) {
  if case .directory = fileKind(path) { return }
  if let slash = path.lastIndex(of: "/"), slash > path.startIndex { try makeDirectories(String(path[..<slash])) }
  guard mkdir(path, 0o777) == 0 || errno == EEXIST else { throw systemFailure("make the folder", path) }
  guard case .directory = fileKind(path) else {
    throw HubError(.fileSystem, "Cannot make the folder \(path): something else lies there.")
  }
}

/// Makes the folders of a relative path below a base and refuses to walk through a symbolic link on the way, so that
/// nothing is written outside the base.
func makeFolders(of relative: String, below base: String) throws(HubError) {
  try makeDirectories(base)
  var path = base
  for component in relative.split(separator: "/").dropLast() {
    path += "/" + component
    if mkdir(path, 0o777) != 0 && errno != EEXIST { throw systemFailure("make the folder", path) }
    var status = stat()
    guard lstat(path, &status) == 0 else { throw systemFailure("look at", path) }
    guard status.st_mode & S_IFMT == S_IFDIR else {
      throw HubError(
        .fileSystem, "\(path) is no folder (a link or a file lies there), so '\(printable(relative))' is not written.")
    }
  }
}

/// A text file of at most 64 KiB; `nil` if it cannot be read or is longer.
func smallTextFile(_ path: String) -> String? {
  guard let bytes = smallFile(path, limit: 65536) else { return nil }
  return String(decoding: bytes, as: UTF8.self)
}

/// The bytes of a regular file of at most `limit` bytes; `nil` if it cannot be read or is longer.
func smallFile(_ path: String, limit: Int) -> [UInt8]? {
  let descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
  guard descriptor >= 0 else { return nil }
  defer { close(descriptor) }
  var status = stat()
  guard fstat(descriptor, &status) == 0, status.st_mode & S_IFMT == S_IFREG, Int(status.st_size) <= limit else {
    return nil
  }
  var bytes = [UInt8](repeating: 0, count: Int(status.st_size))
  var offset = 0
  while offset < bytes.count {
    let count = bytes.withUnsafeMutableBytes { read(descriptor, $0.baseAddress! + offset, $0.count - offset) }
    if count < 0 && errno == EINTR { continue }
    if count <= 0 { break }
    offset += count
  }
  bytes.removeLast(bytes.count - offset)
  return bytes
}

/// Replaces a small text file in one step.
func replaceTextFile(_ path: String, _ text: String) throws(HubError) {
  let temporary = temporaryName(beside: path)
  let descriptor = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0o666)
  guard descriptor >= 0 else { throw systemFailure("write", temporary) }
  var text = text
  let isWritten = text.withUTF8 { bytes in
    var offset = 0
    while offset < bytes.count {
      let count = write(descriptor, bytes.baseAddress! + offset, bytes.count - offset)
      if count < 0 && errno == EINTR { continue }
      if count <= 0 { return false }
      offset += count
    }
    return true
  }
  close(descriptor)
  guard isWritten, rename(temporary, path) == 0 else {
    let failure = systemFailure("write", path)
    unlink(temporary)
    throw failure
  }
}

/// A name in the same folder that nobody else uses.
func temporaryName(beside path: String) -> String {
  "\(path).\(getpid())-\(UInt32.random(in: .min ... .max)).tmp"
}

/// Makes or replaces a symbolic link in one step. A link with the right target stays.
func replaceLink(_ path: String, target: String) throws(HubError) {
  if linkTarget(path) == target { return }
  let temporary = temporaryName(beside: path)
  guard symlink(target, temporary) == 0 else { throw systemFailure("make the link", path) }
  guard rename(temporary, path) == 0 else {
    let failure = systemFailure("make the link", path)
    unlink(temporary)
    throw failure
  }
}

/// Bytes that an ordinary user may still write below the nearest folder above a path that exists.
func freeBytes(at path: String) -> Int? {
  var path = path
  while true {
    var status = statvfs()
    if statvfs(path, &status) == 0 {
      let (bytes, overflow) = Int(status.f_bavail).multipliedReportingOverflow(by: Int(status.f_frsize))
      return overflow ? nil : bytes
    }
    guard errno == ENOENT || errno == ENOTDIR, let slash = path.lastIndex(of: "/") else { return nil }
    path = slash == path.startIndex ? "/" : String(path[..<slash])
  }
}

/// Names of the entries of a folder, sorted, without `.` and `..`; at most `limit` of them.
func entryNames(_ path: String, limit: Int = 100_000) -> [String] {
  guard let handle = opendir(path) else { return [] }
  defer { closedir(handle) }
  var names: [String] = []
  while names.count < limit, let entry = readdir(handle) {
    let name = withUnsafePointer(to: &entry.pointee.d_name) {
      $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
    }
    if name != "." && name != ".." { names.append(name) }
  }
  return names.sorted()
}

/// Copies a regular file, sharing its blocks where the file system can.
func copyFile(from source: String, to destination: String) throws(HubError) {
  let input = open(source, O_RDONLY | O_CLOEXEC)
  guard input >= 0 else { throw systemFailure("read", source) }
  defer { close(input) }
  let temporary = temporaryName(beside: destination)
  let output = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0o666)
  guard output >= 0 else { throw systemFailure("write", temporary) }
  var failure: HubError?
  // FICLONE: one call on file systems that can share blocks, and an error on all others.
  if ioctl(output, 0x4004_9409, input) != 0 {
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
    defer { buffer.deallocate() }
    while failure == nil {
      let count = read(input, buffer.baseAddress, buffer.count)
      if count == 0 { break }
      if count < 0 && errno == EINTR { continue }
      var written = 0
      while written < count {
        let more = write(output, buffer.baseAddress! + written, count - written)
        if more < 0 && errno == EINTR { continue }
        if more <= 0 { break }
        written += more
      }
      if count < 0 || written < count { failure = systemFailure("copy", destination) }
    }
  }
  close(output)
  if failure == nil && rename(temporary, destination) != 0 { failure = systemFailure("write", destination) }
  if let failure {
    unlink(temporary)
    throw failure
  }
}
