import Glibc
import Synchronization

/// A file that arrives in pieces, with a record of what has arrived, so that a process that was killed loses nothing.
///
/// The file has its final size from the start. It is divided into chunks, each of which fills from its beginning; the
/// record (the file's path with `.ranges`) holds for each chunk how many bytes are there. The record is written after the
/// bytes it speaks of. After a power failure it may speak of bytes that did not reach the disk: the checksum of the
/// whole notices.
///
/// Record: `APUSPART`, version (u32), chunk size (u32), file size (u64), then a u32 per chunk; little endian.
final class PartialFile: Sendable {
  let path: String
  let size: Int
  let chunkSize: Int
  let chunkCount: Int
  let descriptor: Int32
  private let journal: Int32
  private let state: Mutex<State>

  private struct State {
    /// Bytes there in each chunk.
    var done: [Int]
    /// What the record says.
    var recorded: [Int]
    var total: Int
  }

  /// A record is brought up to date after so many new bytes of a chunk.
  private static let recordInterval = 256 << 10
  private static let headerSize = 24

  /// Opens a file to fill, continuing what lies there if the record fits.
  /// - Parameters:
  ///   - chunkSize: bytes of a chunk, below 4 GiB. What was begun with another is continued with that.
  ///   - prefixPath: a file that holds the beginning of the content, which is taken over if nothing better is there.
  ///   - keepsRecord: whether a record is kept; without one every opening starts anew.
  init(path: String, size: Int, chunkSize: Int, prefixPath: String? = nil, keepsRecord: Bool) throws(HubError) {
    self.path = path
    self.size = size
    let record = keepsRecord ? Self.readRecord(path, size: size) : nil
    var prefix = 0
    if record == nil, keepsRecord, let prefixPath, linkTarget(prefixPath) == nil,
      case .file(let length) = fileKind(prefixPath), length > 0, length <= size, rename(prefixPath, path) == 0
    {
      prefix = length
    }
    let chunk = record?.chunkSize ?? max(1, min(chunkSize, Int(UInt32.max)))
    self.chunkSize = chunk
    let count = size == 0 ? 0 : (size - 1) / chunk + 1
    chunkCount = count
    let flags = O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | (record == nil && prefix == 0 ? O_TRUNC : 0)
    let descriptor = open(path, flags, 0o666)
    guard descriptor >= 0 else { throw systemFailure("write", path) }
    self.descriptor = descriptor
    guard ftruncate(descriptor, off_t(size)) == 0 else {
      let failure = systemFailure("write", path)
      close(descriptor)
      throw failure
    }
    var done = record?.done ?? [Int](repeating: 0, count: count)
    for index in 0..<count where prefix > index * chunk { done[index] = min(chunk, prefix - index * chunk) }
    state = Mutex(State(done: done, recorded: done, total: done.reduce(0, +)))
    guard keepsRecord else {
      journal = -1
      return
    }
    let journalPath = Self.recordPath(path)
    journal = open(journalPath, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | (record == nil ? O_TRUNC : 0), 0o666)
    // From here on the object is whole and `deinit` closes what is open.
    guard journal >= 0 else { throw systemFailure("write", journalPath) }
    if record == nil {
      var bytes = Array("APUSPART".utf8)
      Self.append(UInt32(1), to: &bytes)
      Self.append(UInt32(chunk), to: &bytes)
      Self.append(UInt64(size), to: &bytes)
      for value in done { Self.append(UInt32(value), to: &bytes) }
      guard bytes.withUnsafeBytes({ pwrite(journal, $0.baseAddress, $0.count, 0) }) == bytes.count else {
        throw systemFailure("write", journalPath)
      }
    }
  }

  deinit {
    close(descriptor)
    if journal >= 0 { close(journal) }
  }

  /// Bytes that an earlier run left for a file of this size.
  static func resumableBytes(_ path: String, size: Int) -> Int {
    readRecord(path, size: size)?.done.reduce(0, +) ?? 0
  }

  private static func recordPath(_ path: String) -> String { path + ".ranges" }

  /// Removes a file and its record.
  static func remove(_ path: String) {
    unlink(path)
    unlink(recordPath(path))
  }

  /// The bytes of a chunk in the file.
  func range(_ chunk: Int) -> Range<Int> { chunk * chunkSize..<min(size, (chunk + 1) * chunkSize) }

  /// How many bytes of a chunk are there.
  func done(_ chunk: Int) -> Int { state.withLock { $0.done[chunk] } }
  /// Whether a chunk is whole.
  func isComplete(_ chunk: Int) -> Bool { done(chunk) == range(chunk).count }
  /// How many bytes are there.
  var doneBytes: Int { state.withLock { $0.total } }
  /// Whether the file is whole.
  var isComplete: Bool { doneBytes == size }
  /// The chunks that are not whole, in order.
  var missingChunks: [Int] { (0..<chunkCount).filter { !isComplete($0) } }

  /// Writes bytes to their place. What is there already is not written again.
  /// - Returns: how many bytes were new.
  func write(_ bytes: UnsafeRawBufferPointer, at offset: Int) throws(HubError) -> Int {
    var gained = 0
    var position = offset
    let end = offset + bytes.count
    while position < end {
      let chunk = position / chunkSize
      let range = range(chunk)
      let pieceEnd = min(end, range.upperBound)
      let frontier = range.lowerBound + done(chunk)
      if position <= frontier && frontier < pieceEnd {
        try writeAll(UnsafeRawBufferPointer(rebasing: bytes[(frontier - offset)..<(pieceEnd - offset)]), at: frontier)
        let count = pieceEnd - frontier
        let toRecord = state.withLock { state -> Int? in
          let new = max(state.done[chunk], pieceEnd - range.lowerBound)
          let added = new - state.done[chunk]
          state.done[chunk] = new
          state.total += added
          gained += min(added, count)
          let isDue = new - state.recorded[chunk] >= Self.recordInterval || new == range.count
          guard isDue else { return nil }
          state.recorded[chunk] = new
          return new
        }
        if let toRecord { try record(chunk, toRecord) }
      }
      position = pieceEnd
    }
    return gained
  }

  /// Brings the record of a chunk up to date, as at the end of a transfer.
  func flush(_ chunk: Int) throws(HubError) {
    let value = state.withLock { state -> Int? in
      guard state.recorded[chunk] != state.done[chunk] else { return nil }
      state.recorded[chunk] = state.done[chunk]
      return state.done[chunk]
    }
    if let value { try record(chunk, value) }
  }

  private func writeAll(_ bytes: UnsafeRawBufferPointer, at offset: Int) throws(HubError) {
    var written = 0
    while written < bytes.count {
      let count = pwrite(descriptor, bytes.baseAddress! + written, bytes.count - written, off_t(offset + written))
      if count < 0 && errno == EINTR { continue }
      guard count > 0 else { throw systemFailure("write", path) }
      written += count
    }
  }

  private func record(_ chunk: Int, _ value: Int) throws(HubError) {
    guard journal >= 0 else { return }
    var word = UInt32(value).littleEndian
    guard pwrite(journal, &word, 4, off_t(Self.headerSize + 4 * chunk)) == 4 else {
      throw systemFailure("write", Self.recordPath(path))
    }
  }

  private static func readRecord(_ path: String, size: Int) -> (chunkSize: Int, done: [Int])? {
    guard linkTarget(path) == nil, fileKind(path) == .file(size: size),
      let bytes = smallFile(recordPath(path), limit: 64 << 20), bytes.count >= headerSize,
      bytes.prefix(8).elementsEqual("APUSPART".utf8)
    else { return nil }
    return bytes.withUnsafeBytes { raw in
      func word(_ offset: Int) -> Int {
        Int(UInt32(littleEndian: raw.loadUnaligned(fromByteOffset: offset, as: UInt32.self)))
      }
      let recordedSize = UInt64(littleEndian: raw.loadUnaligned(fromByteOffset: 16, as: UInt64.self))
      let chunkSize = word(12)
      guard word(8) == 1, chunkSize > 0, recordedSize == UInt64(size), size > 0 else { return nil }
      let count = (size - 1) / chunkSize + 1
      guard bytes.count == headerSize + 4 * count else { return nil }
      let done = (0..<count).map { word(headerSize + 4 * $0) }
      for (index, value) in done.enumerated() where value > min(chunkSize, size - index * chunkSize) { return nil }
      return (chunkSize, done)
    }
  }

  private static func append(_ value: some FixedWidthInteger, to bytes: inout [UInt8]) {
    withUnsafeBytes(of: value.littleEndian) { bytes.append(contentsOf: $0) }
  }
}
