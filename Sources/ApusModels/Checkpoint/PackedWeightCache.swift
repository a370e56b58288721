public import ApusCore
public import ApusTensors
import Glibc

/// A file of packed weights that is kept between starts, so that the next one maps them instead of packing.
///
/// Weights are asked for in the order in which a model loads them. A weight that the file has comes from there; from the
/// first one on that it has not (or that is damaged) all are packed, and at the end a new file takes the old one's place.
///
/// Layout: a head of 64 bytes (magic, version, place, length and checksum of the list, length of the file, checksum of the
/// head), the pieces of memory of the weights at multiples of 4,096, then a list in JSON: the key, and for each weight its
/// shape, its format and its pieces with their checksums. All numbers are little-endian.
///
/// The key says what the weights were made of: layout and instructions of the kernels, settings, and for each file of the
/// checkpoint its name, size, time of change and a checksum of its first 64 KiB and of 4 KiB at 32 other places. So a
/// checkpoint is recognised without being read. Every byte of the packed file itself is checked before it is used.
///
/// Files are written under another name and renamed: whoever maps the old one keeps it, and of two processes that write at
/// once the last one's file stays, which is equal. It is not waited for until the disk has it; a file that a power failure
/// cut short is found damaged.
public final class PackedWeightCache {
  /// Where files are kept.
  public enum Location: Sendable, Equatable {
    /// In the directory of the checkpoint.
    case besideCheckpoint
    /// In a directory, which is made if need be.
    case directory(String)
  }

  /// The file's path.
  public let path: String
  private let key: [String]
  private let backend: CPUBackend?
  private var stored: Stored?
  /// Why the file is not used, or not from some weight on.
  private var fault: String?
  private var position = 0
  private var weights: [any LinearWeight] = []

  /// A file that was found to belong to the key.
  private struct Stored {
    var file: MappedFile
    var entries: [Entry]
  }

  /// A weight's place in a file.
  private struct Entry {
    var outputs: Int
    var inputs: Int
    var format: WeightFormat
    var pieces: [(range: Range<Int>, checksum: UInt64)]
  }

  /// Version of the file's layout.
  private static let version: UInt64 = 1
  private static let headBytes = 64
  private static let alignment = 4096
  private static let magic = UInt64(littleEndian: 0x4B43_4150_5355_5041)  // "APUSPACK"

  /// Opens the file of a checkpoint and settings, if there is one.
  /// - Parameters:
  ///   - modelPath: the checkpoint's directory or GGUF file.
  ///   - files: the checkpoint's weights.
  ///   - settings: what else decides how weights are packed, as text.
  ///   - backend: packs weights; `nil` for a backend whose weights cannot be kept.
  public init(
    _ location: Location, modelPath: String, files: [MappedFile], settings: String, backend: CPUBackend?
  ) throws(EngineError) {
    self.backend = backend
    var base = modelPath
    while base.count > 1, base.hasSuffix("/") { base.removeLast() }
    let absolute = realpath(base, nil).map { pointer in
      defer { free(pointer) }
      return String(cString: pointer)
    }
    let isFile = files.contains { $0.path == base }
    let folder = isFile ? base.lastIndex(of: "/").map { String(base[..<$0]) } ?? "." : base
    let stem = base.lastIndex(of: "/").map { String(base[base.index(after: $0)...]) } ?? base
    let layout = backend?.packedLayoutName ?? ""
    guard let backend else {
      (path, key, fault) = ("", [], "these weights cannot be kept")
      return
    }
    func checksum(_ text: String) -> UInt64 { Array(text.utf8).withUnsafeBytes { backend.checksum($0) } }
    // Files are named by what they are for, so that a changed checkpoint's file takes the place of the old one.
    switch location {
    case .besideCheckpoint:
      path =
        "\(folder)/\(isFile ? stem : "model").\(hexadecimal(checksum("\(layout)\n\(settings)"))).apus-packed"
    case .directory(let directory):
      let name = hexadecimal(checksum("\(layout)\n\(settings)\n\(absolute ?? base)"))
      path = "\(directory)/\(stem == "." || stem == ".." ? "model" : stem).\(name).apus-packed"
    }
    var key = ["apus packed weights \(Self.version)", layout, settings]
    if let configuration = isFile ? nil : try readSmallFile(base + "/config.json") {
      key.append("config.json \(hexadecimal(configuration.withUnsafeBytes { backend.checksum($0) }))")
    }
    for file in files {
      let name = file.path.lastIndex(of: "/").map { String(file.path[file.path.index(after: $0)...]) } ?? file.path
      key.append("\(name) \(file.bytes.count) \(file.modified) \(hexadecimal(Self.sample(file, backend)))")
    }
    self.key = key
    if files.isEmpty {
      fault = "the weights are not read from files"
    } else if access(path, F_OK) == 0 {
      do {
        stored = try Self.read(path, key: key, backend: backend)
      } catch {
        fault = error.message
      }
    }
  }

  /// Whether there is a file to take weights from.
  public var hasWeights: Bool { stored != nil }

  // MARK: Loading

  /// The next weight; `nil` if it must be packed, and then given to `add`.
  func next(outputs: Int, inputs: Int) -> (any LinearWeight)? {
    guard let backend, fault == nil, let stored else { return nil }
    guard position < stored.entries.count else {
      fault = "it has too few weights"
      return nil
    }
    let entry = stored.entries[position]
    guard entry.outputs == outputs, entry.inputs == inputs else {
      fault = "its weight \(position) has another shape"
      return nil
    }
    var regions: [UnsafeRawBufferPointer] = []
    for piece in entry.pieces {
      let bytes = UnsafeRawBufferPointer(rebasing: stored.file.bytes[piece.range])
      guard backend.checksum(bytes) == piece.checksum else {
        fault = "it is damaged: the bytes from \(piece.range.lowerBound) on have another checksum"
        return nil
      }
      regions.append(bytes)
    }
    let weight = backend.linear(
      outputs: outputs, inputs: inputs, format: entry.format, regions: regions, owner: stored.file)
    guard let weight else {
      fault = "its weight \(position) has another size"
      return nil
    }
    position += 1
    weights.append(weight)
    return weight
  }

  /// Takes a weight that was packed.
  func add(_ weight: any LinearWeight) { weights.append(weight) }

  /// Writes a new file unless all weights came from the one there is.
  /// - Returns: what was done, as a sentence.
  public func finish() -> String {
    defer { (weights, stored) = ([], nil) }
    guard let backend else { return "Packed weights are not kept: \(fault ?? "")." }
    if fault == nil, let stored {
      if position == stored.entries.count { return "Packed weights were mapped from \(path)." }
      fault = "it has too many weights"
    }
    if key.count <= 3 { return "Packed weights are not kept: \(fault ?? "")." }
    let reason = fault.map { " The file that was there could not be used: \($0)." } ?? ""
    do {
      try write(backend)
      return "Packed weights were written to \(path) for the next start.\(reason)"
    } catch {
      return "Packed weights cannot be kept in \(path): \(error.message).\(reason)"
    }
  }

  // MARK: Reading

  /// A checksum of the beginning of a file and of some other places, which tells files of equal sizes and times apart
  /// without reading them.
  private static func sample(_ file: MappedFile, _ backend: CPUBackend) -> UInt64 {
    var bytes = [UInt8](file.bytes.prefix(64 << 10))
    let (count, width) = (32, 4096)
    if file.bytes.count > (64 << 10) + width {
      for place in 1...count {
        let start = (file.bytes.count - width) / count * place
        bytes += file.bytes[start..<start + width]
      }
    }
    return bytes.withUnsafeBytes { backend.checksum($0) }
  }

  private static func read(_ path: String, key: [String], backend: CPUBackend) throws(EngineError) -> Stored {
    func broken(_ what: String) -> EngineError { EngineError(.invalidCheckpoint, what) }
    let file = try MappedFile(path: path)
    let size = file.bytes.count
    guard size >= headBytes else { throw broken("it is cut short") }
    func word(_ index: Int) -> UInt64 {
      UInt64(littleEndian: file.bytes.loadUnaligned(fromByteOffset: 8 * index, as: UInt64.self))
    }
    guard word(0) == magic else { throw broken("it is no file of packed weights") }
    guard word(1) == version else { throw broken("another version of this program wrote it") }
    guard word(6) == backend.checksum(UnsafeRawBufferPointer(rebasing: file.bytes[..<48])) else {
      throw broken("its head is damaged")
    }
    guard word(5) == UInt64(size), word(2) <= UInt64(size), word(3) == UInt64(size) - word(2) else {
      throw broken("it is cut short")
    }
    let list = UnsafeRawBufferPointer(rebasing: file.bytes[Int(word(2))...])
    guard word(4) == backend.checksum(list) else { throw broken("its list is damaged") }
    guard let value = try? JSONValue.parse([UInt8](list)) else { throw broken("its list is damaged") }
    guard value["key"]?.arrayValue?.map({ $0.stringValue ?? "" }) == key else {
      throw broken("it was made of another checkpoint or with other settings")
    }
    var entries: [Entry] = []
    for item in value["weights"]?.arrayValue ?? [] {
      guard let outputs = item["outputs"]?.intValue, let inputs = item["inputs"]?.intValue, outputs >= 0, inputs >= 0,
        let format = item["format"]?.stringValue.flatMap(WeightFormat.init(cacheName:)),
        let pieces = item["pieces"]?.arrayValue
      else { throw broken("its list is not understood") }
      var entry = Entry(outputs: outputs, inputs: inputs, format: format, pieces: [])
      for piece in pieces {
        guard let numbers = piece.arrayValue, numbers.count == 3, let start = numbers[0].intValue,
          let count = numbers[1].intValue, start >= headBytes, count >= 0, start <= size, count <= size - start,
          let checksum = numbers[2].stringValue.flatMap({ UInt64($0, radix: 16) })
        else { throw broken("its list is not understood") }
        entry.pieces.append((start..<start + count, checksum))
      }
      entries.append(entry)
    }
    file.readAhead()
    return Stored(file: file, entries: entries)
  }

  // MARK: Writing

  private func write(_ backend: CPUBackend) throws(EngineError) {
    func failed() -> EngineError { EngineError(.internalFailure, systemErrorText()) }
    let slash = path.lastIndex(of: "/")!
    let (folder, name) = (String(path[..<slash]), String(path[path.index(after: slash)...]))
    try makeDirectory(folder)
    removeRemains(folder, name)
    let temporary = "\(folder)/.\(name).\(getpid()).\(hexadecimal(UInt64.random(in: 0...UInt64.max))).tmp"
    let descriptor = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o644)
    guard descriptor >= 0 else { throw failed() }
    var isDone = false
    defer {
      close(descriptor)
      if !isDone { unlink(temporary) }
    }

    func put(_ bytes: UnsafeRawBufferPointer, at offset: Int) -> Bool {
      var done = 0
      while done < bytes.count {
        let count = pwrite(descriptor, bytes.baseAddress! + done, bytes.count - done, off_t(offset + done))
        if count < 0 && errno == EINTR { continue }
        guard count > 0 else { return false }
        done += count
      }
      return true
    }

    var end = Self.alignment
    var items: [JSONValue] = []
    for weight in weights {
      guard let regions = backend.regions(of: weight) else {
        throw EngineError(.internalFailure, "a weight is not in one piece")
      }
      var pieces: [JSONValue] = []
      for region in regions {
        guard put(region, at: end) else { throw failed() }
        pieces.append([
          .int(Int64(end)), .int(Int64(region.count)), .string(String(backend.checksum(region), radix: 16)),
        ])
        end += (region.count + Self.alignment - 1) / Self.alignment * Self.alignment
      }
      items.append([
        "outputs": .int(Int64(weight.outputs)), "inputs": .int(Int64(weight.inputs)),
        "format": .string(weight.format.cacheName), "pieces": .array(pieces),
      ])
    }
    let list: JSONValue = ["key": .array(key.map { .string($0) }), "weights": .array(items)]
    let text = Array(list.compactText.utf8)
    let sum = text.withUnsafeBytes { backend.checksum($0) }
    guard text.withUnsafeBytes({ put($0, at: end) }) else { throw failed() }
    var head = [
      Self.magic, Self.version, UInt64(end), UInt64(text.count), sum, UInt64(end + text.count), 0, 0,
    ].map(\.littleEndian)
    head[6] = head.withUnsafeBytes { backend.checksum(UnsafeRawBufferPointer(rebasing: $0[..<48])) }.littleEndian
    guard head.withUnsafeBytes({ put($0, at: 0) }), rename(temporary, path) == 0 else { throw failed() }
    isDone = true
  }

  /// Makes a directory and those above it.
  private func makeDirectory(_ folder: String) throws(EngineError) {
    if folder.isEmpty || access(folder, F_OK) == 0 { return }
    if let slash = folder.lastIndex(of: "/") { try makeDirectory(String(folder[..<slash])) }
    if mkdir(folder, 0o755) != 0 && errno != EEXIST { throw EngineError(.internalFailure, systemErrorText()) }
  }

  /// Removes what processes left that were ended while they wrote: files of an hour ago and older.
  private func removeRemains(_ folder: String, _ name: String) {
    guard let directory = opendir(folder) else { return }
    defer { closedir(directory) }
    while let entry = readdir(directory) {
      let other = withUnsafePointer(to: &entry.pointee.d_name) {
        $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
      }
      guard other.hasPrefix("." + name + "."), other.hasSuffix(".tmp") else { continue }
      var status = stat()
      let file = "\(folder)/\(other)"
      if stat(file, &status) == 0, time(nil) - status.st_mtim.tv_sec > 3600 { unlink(file) }
    }
  }
}

/// A number with 16 digits.
private func hexadecimal(_ number: UInt64) -> String {
  let digits = String(number, radix: 16)
  return String(repeating: "0", count: 16 - digits.count) + digits
}

extension WeightFormat {
  private static let dtypes: [DType] = [.float32, .float16, .bfloat16]

  /// The format as text that `init(cacheName:)` reads.
  fileprivate var cacheName: String {
    switch self {
    case .dense(let dtype): return dtype.name
    case .int8PerChannel: return "int8"
    case .codes(let layout):
      let levels =
        switch layout.levels {
        case .linear: "linear"
        case .e2m1: "e2m1"
        case .iq4NL: "iq4_nl"
        case .e4m3: "e4m3"
        }
      let minimum =
        switch layout.minimum {
        case .none: "none"
        case .own: "own"
        case .zeroPoint: "zero_point"
        }
      return [
        "codes", "\(layout.bits)", levels, "\(layout.offset)", "\(layout.groupSize)", "\(layout.blockSize)",
        layout.scaleType.name, layout.hasFactors ? "1" : "0", minimum,
      ].joined(separator: " ")
    }
  }

  fileprivate init?(cacheName: String) {
    if cacheName == "int8" {
      self = .int8PerChannel
      return
    }
    if let dtype = Self.dtypes.first(where: { $0.name == cacheName }) {
      self = .dense(dtype)
      return
    }
    let parts = cacheName.split(separator: " ").map(String.init)
    let levels: [String: CodeLayout.Levels] = ["linear": .linear, "e2m1": .e2m1, "iq4_nl": .iq4NL, "e4m3": .e4m3]
    let minimums: [String: CodeLayout.Minimum] = ["none": .none, "own": .own, "zero_point": .zeroPoint]
    guard parts.count == 9, parts[0] == "codes", let bits = Int(parts[1]), let level = levels[parts[2]],
      let offset = Int(parts[3]), let group = Int(parts[4]), let block = Int(parts[5]),
      let scaleType = Self.dtypes.first(where: { $0.name == parts[6] }), let minimum = minimums[parts[8]]
    else { return nil }
    self = .codes(
      CodeLayout(
        bits: bits, levels: level, offset: offset, groupSize: group, blockSize: block, scaleType: scaleType,
        hasFactors: parts[7] == "1", minimum: minimum))
  }
}
