import CHash
import Dispatch
import Glibc
import Synchronization

/// Checks the content of files against the checksums that name them.
package enum Checksum {
  /// Whether a file's content has a checksum, computed on a thread that may block.
  /// - Parameters:
  ///   - descriptor: the file, open for reading.
  ///   - size: its size; git's checksum begins with it.
  ///   - etag: 64 hexadecimal digits for SHA-256, 40 for git's SHA-1 of a blob.
  static func matches(descriptor: Int32, path: String, size: Int, etag: String) async throws -> Bool {
    let box = Cancellation()
    return try await withTaskCancellationHandler {
      try await withCheckedThrowingContinuation { (continuation: CheckedContinuation<Bool, any Error>) in
        DispatchQueue.global(qos: .userInitiated).async {
          continuation.resume(
            with: Result { try compute(descriptor: descriptor, path: path, size: size, etag: etag, box) == etag })
        }
      }
    } onCancel: {
      box.flag.store(true, ordering: .relaxed)
    }
  }

  private final class Cancellation: Sendable {
    let flag = Atomic(false)
  }

  private static func compute(
    descriptor: Int32, path: String, size: Int, etag: String, _ cancellation: Cancellation
  ) throws -> String {
    var hash = Hash(isSHA256: etag.utf8.count == 64)
    // Git names a blob by the checksum of a header and the content.
    if etag.utf8.count != 64 { Array("blob \(size)\0".utf8).withUnsafeBytes { hash.update($0) } }
    try read(descriptor, path, size, cancellation) { hash.update($0) }
    return hash.finish()
  }

  private static func read(
    _ descriptor: Int32, _ path: String, _ size: Int, _ cancellation: Cancellation,
    _ body: (UnsafeRawBufferPointer) -> Void
  ) throws {
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 64)
    defer { buffer.deallocate() }
    var offset = 0
    while offset < size {
      if cancellation.flag.load(ordering: .relaxed) { throw CancellationError() }
      let count = pread(descriptor, buffer.baseAddress, min(buffer.count, size - offset), off_t(offset))
      if count < 0 && errno == EINTR { continue }
      guard count >= 0 else { throw systemFailure("read", path) }
      if count == 0 { return }
      body(UnsafeRawBufferPointer(rebasing: buffer[..<count]))
      offset += count
    }
  }

  /// URL-safe base 64 of the SHA-1 of a text, as huggingface_hub shortens names.
  package static func shortName(_ text: String) -> String {
    let alphabet = Array("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_".utf8)
    var hash = Hash(isSHA256: false)
    Array(text.utf8).withUnsafeBytes { hash.update($0) }
    let digest = hash.digest()
    var result: [UInt8] = []
    for start in stride(from: 0, to: digest.count, by: 3) {
      let group = digest[start..<min(start + 3, digest.count)]
      var bits: UInt32 = 0
      for index in 0..<3 { bits = bits << 8 | (index < group.count ? UInt32(group[start + index]) : 0) }
      for index in 0..<4 {
        result.append(index <= group.count ? alphabet[Int(bits >> UInt32(18 - 6 * index) & 63)] : 0x3D)
      }
    }
    return String(decoding: result, as: UTF8.self)
  }
}

/// SHA-256 or SHA-1 of bytes that come in pieces.
package struct Hash {
  private enum State {
    case sha256(apus_sha256)
    case sha1(apus_sha1)
  }

  private var state: State

  /// Begins.
  package init(isSHA256: Bool) {
    if isSHA256 {
      var hash = apus_sha256()
      apus_sha256_begin(&hash)
      state = .sha256(hash)
    } else {
      var hash = apus_sha1()
      apus_sha1_begin(&hash)
      state = .sha1(hash)
    }
  }

  /// Adds bytes.
  package mutating func update(_ bytes: UnsafeRawBufferPointer) {
    switch state {
    case .sha256(var hash):
      apus_sha256_update(&hash, bytes.baseAddress, bytes.count)
      state = .sha256(hash)
    case .sha1(var hash):
      apus_sha1_update(&hash, bytes.baseAddress, bytes.count)
      state = .sha1(hash)
    }
  }

  /// Ends; 32 or 20 bytes.
  package mutating func digest() -> [UInt8] {
    switch state {
    case .sha256(var hash):
      var digest = [UInt8](repeating: 0, count: 32)
      apus_sha256_end(&hash, &digest)
      return digest
    case .sha1(var hash):
      var digest = [UInt8](repeating: 0, count: 20)
      apus_sha1_end(&hash, &digest)
      return digest
    }
  }

  /// Ends; the digest in lower-case hexadecimal digits.
  package mutating func finish() -> String {
    let digits = Array("0123456789abcdef".utf8)
    return String(decoding: digest().flatMap { [digits[Int($0 >> 4)], digits[Int($0 & 15)]] }, as: UTF8.self)
  }

  /// The checksum by which a cache names a content: SHA-256, or git's SHA-1 of a blob.
  package static func etag(_ content: [UInt8], isSHA256: Bool) -> String {
    var hash = Hash(isSHA256: isSHA256)
    if !isSHA256 { Array("blob \(content.count)\0".utf8).withUnsafeBytes { hash.update($0) } }
    content.withUnsafeBytes { hash.update($0) }
    return hash.finish()
  }
}
