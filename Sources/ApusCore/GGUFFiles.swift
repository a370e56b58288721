import Glibc

/// Finds the GGUF files that a path stands for.
public enum GGUFFiles {
  /// The files of the GGUF model at a path, in order: a `.gguf` file, all parts of a split one
  /// (`NAME-00001-of-0000N.gguf`, named by any of them), or those of a directory that holds exactly one GGUF model and no
  /// `config.json`.
  /// - Returns: `nil` if the path stands for no GGUF model.
  /// - Throws: `invalidCheckpoint` if the directory holds several models, or a part of a split one is missing.
  public static func find(_ path: String) throws(EngineError) -> [String]? {
    var status = stat()
    guard stat(path, &status) == 0 else { return nil }
    if status.st_mode & S_IFMT == S_IFDIR {
      if access(path + "/config.json", F_OK) == 0 { return nil }
      let names = fileNames(in: path).filter { $0.hasSuffix(".gguf") }
      var heads = names.filter { (split($0)?.number ?? 1) == 1 }
      // A directory with parts but without the first of them is a split model with a hole.
      if heads.isEmpty, let name = names.first { heads = [name] }
      guard let head = heads.first else { return nil }
      guard heads.count == 1 else {
        throw EngineError(
          .invalidCheckpoint,
          "\(path) holds \(heads.count) GGUF models (\(heads.joined(separator: ", "))); name one of the files.")
      }
      return try parts(path + "/" + head)
    }
    guard path.hasSuffix(".gguf") || startsWithMagic(path) else { return nil }
    return try parts(path)
  }

  private static func parts(_ path: String) throws(EngineError) -> [String] {
    guard let (stem, _, count) = split(path) else { return [path] }
    func padded(_ number: Int) -> String {
      let digits = String(number)
      return String(repeating: "0", count: max(0, 5 - digits.count)) + digits
    }
    var paths: [String] = []
    for number in 1...count {
      let part = "\(stem)-\(padded(number))-of-\(padded(count)).gguf"
      guard access(part, F_OK) == 0 else {
        throw EngineError(
          .invalidCheckpoint, "\(path) is one of \(count) parts of a model, but \(part) does not exist.")
      }
      paths.append(part)
    }
    return paths
  }

  /// The parts of a name like `x-00001-of-00003.gguf`.
  private static func split(_ name: String) -> (stem: String, number: Int, count: Int)? {
    let bytes = Array(name.utf8)
    let tail = Array("-00000-of-00000.gguf".utf8)
    guard bytes.count > tail.count else { return nil }
    let start = bytes.count - tail.count
    for (index, pattern) in tail.enumerated() {
      let byte = bytes[start + index]
      guard pattern == 0x30 ? (0x30...0x39).contains(byte) : byte == pattern else { return nil }
    }
    guard let number = Int(String(decoding: bytes[start + 1..<start + 6], as: UTF8.self)),
      let count = Int(String(decoding: bytes[start + 10..<start + 15], as: UTF8.self)), number >= 1, number <= count
    else { return nil }
    return (String(decoding: bytes[..<start], as: UTF8.self), number, count)
  }

  private static func startsWithMagic(_ path: String) -> Bool {
    let descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
    guard descriptor >= 0 else { return false }
    defer { close(descriptor) }
    var magic: UInt32 = 0
    return read(descriptor, &magic, 4) == 4 && UInt32(littleEndian: magic) == 0x4655_4747
  }

  private static func fileNames(in directory: String) -> [String] {
    guard let handle = opendir(directory) else { return [] }
    defer { closedir(handle) }
    var names: [String] = []
    while let entry = readdir(handle) {
      names.append(
        withUnsafePointer(to: &entry.pointee.d_name) { pointer in
          pointer.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
        })
    }
    return names.sorted()
  }
}
