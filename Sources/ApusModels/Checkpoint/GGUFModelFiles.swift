public import ApusCore

/// The GGUF files of one model, mapped: one file, or all parts of a split one.
public final class GGUFModelFiles: Sendable {
  /// The files in the order of the parts; the first holds the metadata.
  public let files: [MappedFile]
  /// The header of each file.
  public let headers: [GGUFHeader]
  /// Part and place in its list of each tensor.
  private let locations: [String: (file: Int, index: Int)]

  /// Maps files and checks their headers.
  /// - Throws: `invalidCheckpoint` or `unsupported` naming the file, the tensor and what was expected.
  public init(paths: [String]) throws(EngineError) {
    var files: [MappedFile] = []
    var headers: [GGUFHeader] = []
    var locations: [String: (file: Int, index: Int)] = [:]
    for path in paths {
      let file = try MappedFile(path: path)
      let header = try GGUFHeader(file.bytes, path: path)
      for (index, tensor) in header.tensors.enumerated() {
        if let other = locations.updateValue((files.count, index), forKey: tensor.name) {
          throw EngineError(
            .invalidCheckpoint, "\(path): tensor \(tensor.name) is in \(paths[other.file]) already.")
        }
      }
      try Self.checkPart(header, number: files.count, count: paths.count)
      files.append(file)
      headers.append(header)
    }
    guard let first = headers.first else {
      throw EngineError(.invalidCheckpoint, "A GGUF model has at least one file.")
    }
    if let expected = first.metadata["split.tensors.count"]?.intValue, expected != locations.count {
      throw EngineError(
        .invalidCheckpoint,
        "\(first.path): split.tensors.count says \(expected) tensors, but the \(paths.count) parts hold "
          + "\(locations.count).")
    }
    self.files = files
    self.headers = headers
    self.locations = locations
  }

  private static func checkPart(_ header: GGUFHeader, number: Int, count: Int) throws(EngineError) {
    if let stated = header.metadata["split.count"]?.intValue, stated > 1 || count > 1, stated != count {
      throw EngineError(
        .invalidCheckpoint,
        "\(header.path): split.count says that the model has \(stated) parts, but \(count) were found; parts are named "
          + "like model-00001-of-00002.gguf.")
    }
    if count > 1, let stated = header.metadata["split.no"]?.intValue, stated != number {
      throw EngineError(
        .invalidCheckpoint, "\(header.path): split.no is \(stated), but by its name the file is part \(number).")
    }
  }

  /// The file that messages name.
  public var path: String { headers[0].path }
  /// The metadata of the model.
  public var metadata: [String: GGUFHeader.Value] { headers[0].metadata }
  /// All tensors, part by part.
  public var tensors: [GGUFHeader.Tensor] { headers.flatMap(\.tensors) }

  /// A tensor by its name, with the file it is in.
  public func tensor(_ name: String) -> (tensor: GGUFHeader.Tensor, file: MappedFile)? {
    locations[name].map { (headers[$0.file].tensors[$0.index], files[$0.file]) }
  }

  /// The bytes of a tensor.
  public func bytes(_ name: String) -> UnsafeRawBufferPointer? {
    guard let location = locations[name] else { return nil }
    let header = headers[location.file]
    let start = header.dataOffset + header.tensors[location.index].offset
    return UnsafeRawBufferPointer(
      rebasing: files[location.file].bytes[start..<start + header.tensors[location.index].byteCount])
  }
}
