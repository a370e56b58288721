import ApusCore
import Glibc

/// A file that is written at given places.
final class OutputFile {
  let path: String
  private let descriptor: Int32

  /// Makes a file of a size.
  /// - Throws: `internalFailure` with the system's reason.
  init(path: String, byteCount: Int) throws(EngineError) {
    self.path = path
    descriptor = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0o644)
    guard descriptor >= 0 else { throw Self.failure("made", path) }
    guard ftruncate(descriptor, byteCount) == 0 else { throw Self.failure("written", path) }
  }

  deinit { close(descriptor) }

  static func failure(_ verb: String, _ path: String) -> EngineError {
    EngineError(.internalFailure, "\(path) cannot be \(verb): \(String(cString: strerror(errno))).")
  }

  func write(_ bytes: UnsafeRawBufferPointer, at offset: Int) throws(EngineError) {
    var done = 0
    while done < bytes.count {
      let count = pwrite(descriptor, bytes.baseAddress! + done, min(bytes.count - done, 1 << 30), offset + done)
      if count < 0 {
        if errno == EINTR { continue }
        throw Self.failure("written", path)
      }
      done += count
    }
  }

  func write(_ bytes: [UInt8], at offset: Int) throws(EngineError) {
    try bytes.withUnsafeBufferPointer { (buffer) throws(EngineError) in
      try write(UnsafeRawBufferPointer(buffer), at: offset)
    }
  }

  /// Waits until the file is on the disk.
  func flush() throws(EngineError) {
    guard fsync(descriptor) == 0 else { throw Self.failure("written", path) }
  }
}

/// Something at a path.
enum FileKind { case file, directory, other }

func fileKind(_ path: String) -> FileKind? {
  var status = stat()
  guard stat(path, &status) == 0 else { return nil }
  return switch status.st_mode & S_IFMT {
  case S_IFREG: .file
  case S_IFDIR: .directory
  default: .other
  }
}

/// The names in a directory, sorted, without the two that every one has.
func fileNames(in directory: String) -> [String] {
  guard let handle = opendir(directory) else { return [] }
  defer { closedir(handle) }
  var names: [String] = []
  while let entry = readdir(handle) {
    let name = withUnsafePointer(to: &entry.pointee.d_name) { pointer in
      pointer.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
    }
    if name != ".", name != ".." { names.append(name) }
  }
  return names.sorted()
}

/// The folder of a checkpoint that may hold further files.
let templateFolder = "additional_chat_templates"

/// Where a conversion's result grows until it is whole: a name beside the output's, which takes its place in one step.
final class StagedOutput {
  let path: String
  let temporary: String
  private let isDirectory: Bool
  private var isCommitted = false

  /// Makes the temporary directory, or just names the temporary file.
  /// - Throws: `invalidRequest` if something is in the way.
  init(path given: String, isDirectory: Bool, overwrites: Bool) throws(EngineError) {
    var path = given
    while path.count > 1, path.hasSuffix("/") { path.removeLast() }
    self.path = path
    self.isDirectory = isDirectory
    temporary = "\(path).\(getpid()).partial"
    try Self.check(path, isDirectory: isDirectory, overwrites: overwrites)
    if isDirectory {
      Self.remove(temporary)
      guard mkdir(temporary, 0o755) == 0 else { throw OutputFile.failure("made", temporary) }
    } else {
      unlink(temporary)
    }
  }

  deinit { if !isCommitted { Self.remove(temporary) } }

  /// Refuses an output that exists, or that a replacement might destroy more of than a checkpoint.
  private static func check(_ path: String, isDirectory: Bool, overwrites: Bool) throws(EngineError) {
    func refused(_ sentence: String) -> EngineError { EngineError(.invalidRequest, sentence, parameter: "output") }
    guard let kind = fileKind(path) else { return }
    if isDirectory, kind == .directory, fileNames(in: path).isEmpty { return }
    guard overwrites else { throw refused("\(path) exists; add --force to replace it, or choose another name.") }
    guard kind == (isDirectory ? .directory : .file) else {
      throw refused("\(path) exists and is not a \(isDirectory ? "directory" : "file"); choose another name.")
    }
    guard isDirectory else { return }
    let names = fileNames(in: path)
    guard names.contains("config.json"),
      names.allSatisfy({ fileKind("\(path)/\($0)") == .file || $0 == templateFolder })
    else {
      throw refused(
        "\(path) holds more than a checkpoint's files, so it is not replaced even with --force; remove it, or choose "
          + "another name.")
    }
  }

  /// Puts the result in the output's place. What was there goes away afterwards.
  func commit() throws(EngineError) {
    if isDirectory, fileKind(path) == .directory {
      let old = "\(path).\(getpid()).old"
      guard rename(path, old) == 0 else { throw OutputFile.failure("replaced", path) }
      guard rename(temporary, path) == 0 else {
        let error = OutputFile.failure("written", path)
        rename(old, path)
        throw error
      }
      Self.remove(old)
    } else {
      guard rename(temporary, path) == 0 else { throw OutputFile.failure("written", path) }
    }
    isCommitted = true
  }

  /// Removes a file, or a directory of the shape that is made here: files, and a folder of files.
  private static func remove(_ path: String) {
    guard fileKind(path) == .directory else {
      unlink(path)
      return
    }
    for name in fileNames(in: path) {
      let inner = "\(path)/\(name)"
      if fileKind(inner) == .directory {
        for file in fileNames(in: inner) { unlink("\(inner)/\(file)") }
        rmdir(inner)
      } else {
        unlink(inner)
      }
    }
    rmdir(path)
  }

  /// Bytes that can still be written where the output goes; `nil` if that cannot be found out.
  var freeBytes: Int? {
    var status = statvfs()
    let folder = path.lastIndex(of: "/").map { $0 == path.startIndex ? "/" : String(path[..<$0]) } ?? "."
    guard statvfs(folder, &status) == 0 else { return nil }
    let (bytes, overflow) = Int(status.f_bavail).multipliedReportingOverflow(by: Int(status.f_frsize))
    return overflow ? nil : bytes
  }
}

/// Writes a small file.
func writeWhole(_ bytes: [UInt8], _ path: String) throws(EngineError) {
  let file = try OutputFile(path: path, byteCount: bytes.count)
  try file.write(bytes, at: 0)
  try file.flush()
}

/// A tensor of the output.
struct OutputTensor: Sendable {
  var name: String
  /// The safetensors type's name, or GGUF's.
  var typeName: String
  var shape: [Int]
  var byteCount: Int
  /// GGUF's number for the type.
  var typeID: UInt32 = 0
}

/// The tensors of an output and where each lies.
struct OutputLayout {
  /// One file: its name, what stands before the data, and its whole size.
  struct File {
    var name: String
    var header: [UInt8]
    var byteCount: Int
  }
  var files: [File] = []
  /// File and offset by the tensor's name.
  var places: [String: (file: Int, offset: Int)] = [:]
  /// `model.safetensors.index.json`, if there are several files.
  var index: [UInt8]?

  var byteCount: Int { files.reduce(index?.count ?? 0) { $0 + $1.byteCount } }

  /// Safetensors files of at most `limit` bytes each, but for tensors that are larger by themselves.
  ///
  /// Within a file, tensors of wide types come first, so that every tensor is aligned to its type, as the format's
  /// reference writer does it.
  init(safetensors tensors: [OutputTensor], limit: Int) {
    var shards: [[OutputTensor]] = []
    var filled = 0
    for tensor in tensors {
      if shards.isEmpty || (filled + tensor.byteCount > limit && filled > 0) {
        shards.append([])
        filled = 0
      }
      shards[shards.count - 1].append(tensor)
      filled += tensor.byteCount
    }
    if shards.isEmpty { shards = [[]] }
    var map: [(String, String)] = []
    for (number, shard) in shards.enumerated() {
      let name =
        shards.count == 1
        ? "model.safetensors" : "model-\(Self.padded(number + 1))-of-\(Self.padded(shards.count)).safetensors"
      var writer = JSONWriter(capacity: 128 * shard.count)
      var offset = 0
      let ordered = shard.sorted { (Self.width($1.typeName), $0.name) < (Self.width($0.typeName), $1.name) }
      writer.object { writer in
        writer.key("__metadata__")
        writer.object { $0.member("format", "pt") }
        for tensor in ordered {
          writer.key(tensor.name)
          writer.object { writer in
            writer.member("dtype", tensor.typeName)
            writer.key("shape")
            writer.array { writer in for length in tensor.shape { writer.value(length) } }
            writer.key("data_offsets")
            writer.array { writer in
              writer.value(offset)
              writer.value(offset + tensor.byteCount)
            }
          }
          places[tensor.name] = (number, offset)
          offset += tensor.byteCount
          map.append((tensor.name, name))
        }
      }
      // Spaces up to a multiple of 8, so that the data is aligned.
      var json = writer.bytes
      while json.count % 8 != 0 { json.append(UInt8(ascii: " ")) }
      let header = withUnsafeBytes(of: UInt64(json.count).littleEndian) { Array($0) } + json
      for tensor in ordered { places[tensor.name]!.offset += header.count }
      files.append(File(name: name, header: header, byteCount: header.count + offset))
    }
    guard shards.count > 1 else { return }
    var writer = JSONWriter(capacity: 128 * map.count)
    writer.object { writer in
      writer.key("metadata")
      writer.object { $0.member("total_size", tensors.reduce(0) { $0 + $1.byteCount }) }
      writer.key("weight_map")
      writer.object { writer in
        for (name, file) in map.sorted(by: { $0.0 < $1.0 }) { writer.member(name, file) }
      }
    }
    index = writer.bytes
  }

  /// One GGUF file.
  init(gguf tensors: [OutputTensor], metadata: GGUFMetadataWriter, alignment: Int) {
    var header = metadata.header(tensorCount: tensors.count)
    func aligned(_ offset: Int) -> Int { (offset + alignment - 1) / alignment * alignment }
    var offset = 0
    for tensor in tensors {
      GGUFMetadataWriter.append(tensor.name, to: &header)
      GGUFMetadataWriter.append(UInt32(tensor.shape.count), to: &header)
      for length in tensor.shape.reversed() { GGUFMetadataWriter.append(UInt64(length), to: &header) }
      GGUFMetadataWriter.append(tensor.typeID, to: &header)
      GGUFMetadataWriter.append(UInt64(offset), to: &header)
      places[tensor.name] = (0, offset)
      offset = aligned(offset + tensor.byteCount)
    }
    header += [UInt8](repeating: 0, count: aligned(header.count) - header.count)
    for tensor in tensors { places[tensor.name]!.offset += header.count }
    files = [File(name: "", header: header, byteCount: header.count + offset)]
  }

  private static func padded(_ number: Int) -> String {
    let digits = String(number)
    return String(repeating: "0", count: max(0, 5 - digits.count)) + digits
  }

  private static func width(_ typeName: String) -> Int {
    switch typeName {
    case "F64", "I64", "U64", "C64": 8
    case "F32", "I32", "U32": 4
    case "F16", "BF16", "I16", "U16": 2
    default: 1
    }
  }
}

/// The metadata of a GGUF file as it is written.
struct GGUFMetadataWriter {
  private var count = 0
  private var body: [UInt8] = []
  private var keys: Set<String> = []

  static func append<Number: FixedWidthInteger>(_ number: Number, to bytes: inout [UInt8]) {
    withUnsafeBytes(of: number.littleEndian) { bytes.append(contentsOf: $0) }
  }

  static func append(_ text: String, to bytes: inout [UInt8]) { append(Array(text.utf8), to: &bytes) }

  static func append(_ text: [UInt8], to bytes: inout [UInt8]) {
    append(UInt64(text.count), to: &bytes)
    bytes.append(contentsOf: text)
  }

  private mutating func begin(_ key: String, _ type: UInt32) {
    precondition(keys.insert(key).inserted, "A metadata key is set twice.")
    count += 1
    Self.append(key, to: &body)
    Self.append(type, to: &body)
  }

  mutating func set(_ key: String, size: Int) {
    begin(key, 4)
    Self.append(UInt32(size), to: &body)
  }
  mutating func set(_ key: String, number: Float) {
    begin(key, 6)
    Self.append(number.bitPattern, to: &body)
  }
  mutating func set(_ key: String, flag: Bool) {
    begin(key, 7)
    body.append(flag ? 1 : 0)
  }
  mutating func set(_ key: String, text: String) {
    begin(key, 8)
    Self.append(text, to: &body)
  }
  mutating func set(_ key: String, texts: [[UInt8]]) {
    begin(key, 9)
    Self.append(UInt32(8), to: &body)
    Self.append(UInt64(texts.count), to: &body)
    for text in texts { Self.append(text, to: &body) }
  }
  mutating func set(_ key: String, numbers: [Float]) {
    begin(key, 9)
    Self.append(UInt32(6), to: &body)
    Self.append(UInt64(numbers.count), to: &body)
    for number in numbers { Self.append(number.bitPattern, to: &body) }
  }
  mutating func set(_ key: String, integers: [Int32]) {
    begin(key, 9)
    Self.append(UInt32(5), to: &body)
    Self.append(UInt64(integers.count), to: &body)
    for number in integers { Self.append(number, to: &body) }
  }
  mutating func set(_ key: String, bytes: [UInt8]) {
    begin(key, 9)
    Self.append(UInt32(0), to: &body)
    Self.append(UInt64(bytes.count), to: &body)
    body += bytes
  }
  /// An entry of another file: its type and value as they are there.
  mutating func set(_ key: String, verbatim bytes: UnsafeRawBufferPointer) {
    precondition(keys.insert(key).inserted, "A metadata key is set twice.")
    count += 1
    Self.append(key, to: &body)
    body.append(contentsOf: bytes)
  }

  /// The start of a file, up to the list of tensors.
  func header(tensorCount: Int) -> [UInt8] {
    var bytes = Array("GGUF".utf8)
    Self.append(UInt32(3), to: &bytes)
    Self.append(UInt64(tensorCount), to: &bytes)
    Self.append(UInt64(count), to: &bytes)
    return bytes + body
  }
}
