import ApusConversion
import ApusCore
import ApusModels
import ApusTokenization
import Foundation
import Testing

/// Files that are broken on purpose: an error that names the file, never a crash, never unbounded memory.
struct RobustnessTests {
  /// What loading a directory says; `nil` if it loads.
  private func refusal(_ path: String) -> EngineError? {
    do {
      _ = try load(path)
      _ = try Tokenizer.load(directory: path)
      return nil
    } catch { return error as? EngineError }
  }

  /// Every JSON file of a checkpoint, nested deeper than any stack, and cut off.
  @Test func deepNesting() throws {
    let folder = try Folder()
    let model = try SmallModel().write(folder)
    #expect(refusal(model) == nil)
    let files = [
      "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
      "model.safetensors.index.json",
    ]
    let depth = 10_000_000
    for (name, opening) in files.flatMap({ name in [(name, "["), (name, "{\"a\":")] }) {
      let path = "\(model)/\(name)"
      let before = FileManager.default.contents(atPath: path)
      try folder.write("model/\(name)", String(repeating: opening, count: depth / opening.utf8.count))
      let error = refusal(model)
      #expect(
        error?.code == .invalidCheckpoint && error?.message.contains(name) == true, "\(name): \(error?.message ?? "")")
      try folder.write("model/\(name)", "{\"weight_map\":{\"a\":" + String(repeating: opening, count: 100_000))
      #expect(refusal(model)?.message.contains(name) == true)
      if let before { try folder.write("model/\(name)", [UInt8](before)) } else { unlink(path) }
    }
    // The header of a safetensors file.
    let header = Array(String(repeating: "[", count: 1_000_000).utf8)
    let bytes = withUnsafeBytes(of: UInt64(header.count).littleEndian) { Array($0) } + header
    try folder.write("model/model.safetensors", bytes)
    #expect(refusal(model)?.message.contains("model.safetensors") == true)
  }

  /// Indices that name shards in strange ways.
  @Test func strangeIndices() throws {
    let folder = try Folder()
    let model = try SmallModel().write(folder)
    let weights = try SmallModel().weights()
    try folder.write("model/a.safetensors", safetensors(weights))
    unlink(model + "/model.safetensors")
    func index(_ map: (String) -> String) -> String {
      let entries = weights.map { "\"\($0.name)\":\(map($0.name))" }
      return "{\"weight_map\":{\(entries.joined(separator: ","))}}"
    }
    try folder.write("model/model.safetensors.index.json", index { _ in "\"a.safetensors\"" })
    #expect(refusal(model) == nil)
    mkfifo(model + "/pipe.safetensors", 0o644)
    try FileManager.default.createDirectory(atPath: model + "/folder.safetensors", withIntermediateDirectories: true)
    try FileManager.default.createSymbolicLink(
      atPath: model + "/circle.safetensors", withDestinationPath: model + "/circle.safetensors")
    for (target, says) in [
      ("\"model.safetensors.index.json\"", "model.safetensors.index.json"), ("\".\"", "not a regular file"),
      ("\"..\"", "not a regular file"), ("\"pipe.safetensors\"", "pipe.safetensors"),
      ("\"folder.safetensors\"", "not a regular file"), ("\"circle.safetensors\"", "circle.safetensors"),
      ("\"absent.safetensors\"", "absent.safetensors"), ("\"\"", "plain file name"),
      ("\"a\\u0000b\"", "plain file name"),
      ("\"/etc/passwd\"", "plain file name"), ("[\"a.safetensors\"]", "plain file name"), ("null", "plain file name"),
    ] {
      try folder.write("model/model.safetensors.index.json", index { _ in target })
      let error = refusal(model)
      #expect(
        error?.code == .invalidCheckpoint && error?.message.contains(says) == true, "\(target): \(error?.message ?? "")"
      )
      // The same for one tensor among good ones.
      let last = weights.last!.name
      try folder.write("model/model.safetensors.index.json", index { $0 == last ? target : "\"a.safetensors\"" })
      #expect(refusal(model)?.message.contains(says) == true, "\(target)")
    }
    // A tensor in two files: the index decides, and the other copy is not looked at.
    try folder.write("model/b.safetensors", safetensors([FileTensor(weights[0].name, [1], [5])]))
    try folder.write(
      "model/model.safetensors.index.json",
      index { _ in "\"a.safetensors\"" }.replacingOccurrences(
        of: "\"weight_map\":{", with: "\"weight_map\":{\"unused\":\"b.safetensors\","))
    #expect(refusal(model)?.message.contains("unused") == true)
  }

  /// Bytes of every small file changed, dropped and doubled at random.
  @Test func mutatedFiles() throws {
    let folder = try Folder()
    let model = try SmallModel().write(folder)
    let converted = folder.path + "/sharded"
    try convert(model, converted, "int4") { ($0.groupSize, $0.maxShardBytes) = (32, 30_000) }
    let seed: UInt64 = 31
    var generator = SeededGenerator(seed: seed)
    let names = folder.names("sharded").filter { !$0.hasPrefix("chat") }
    #expect(names.count > 6)
    var refused = 0
    for name in names {
      let good = [UInt8](try #require(FileManager.default.contents(atPath: "\(converted)/\(name)")))
      // Of files with weights the header is what can be broken.
      let limit = name.hasSuffix(".safetensors") ? min(good.count, 1500) : good.count
      for _ in 0..<(name == "tokenizer.json" ? 10 : 25) {
        var bytes = good
        for _ in 0..<Int.random(in: 1...3, using: &generator) {
          let place = Int.random(in: 0..<limit, using: &generator)
          guard place < bytes.count else { continue }
          switch Int.random(in: 0..<5, using: &generator) {
          case 0: bytes.remove(at: place)
          case 1: bytes.insert(.random(in: 0...255, using: &generator), at: place)
          case 2: bytes.removeLast(bytes.count - place)
          case 3: bytes[place] = [0, 0x22, 0x2C, 0x2D, 0x39, 0x5B, 0x7B, 0xFF].randomElement(using: &generator)!
          default: bytes[place] ^= 1 << UInt8.random(in: 0..<8, using: &generator)
          }
        }
        try folder.write("sharded/\(name)", bytes)
        if let error = refusal(converted) {
          refused += 1
          #expect(error.message.count > 10, "seed \(seed), \(name)")
        }
        _ = CheckpointInspection(path: converted)
      }
      try folder.write("sharded/\(name)", good)
    }
    #expect(refused > 60, "seed \(seed)")
    #expect(refusal(converted) == nil)
  }

  /// What inspection says without loading: each weight that is missing or has another shape, and what quantised weights
  /// lack.
  @Test func inspectionListsEveryReason() throws {
    let folder = try Folder()
    let model = try SmallModel().write(folder)
    #expect(CheckpointInspection(path: model).refusals == [])
    var weights = try SmallModel().weights()
    weights.removeAll { $0.name.contains("k_proj") }
    let place = weights.firstIndex { $0.name.contains("layers.1.mlp.up_proj") }!
    weights[place] = FileTensor(weights[place].name, [64, 96], floats(weights[place]))
    try folder.write("model/model.safetensors", safetensors(weights))
    let plain = CheckpointInspection(path: model).refusals
    #expect(plain.count == 3 && plain.contains { $0.contains("layers.0.self_attn.k_proj.weight is missing") })
    #expect(plain.contains { $0.contains("has shape [64, 96], but the model needs [96, 64]") })

    for (format, layout, lost) in [
      ("int8", IntegerLayout.compressedTensors, "weight_scale"), ("int4", .compressedTensors, "weight_scale"),
      ("int4", .gptq, "qzeros"), ("int4", .awq, "scales"),
    ] {
      try folder.write("model/model.safetensors", safetensors(SmallModel().weights()))
      let output = folder.path + "/q"
      try convert(model, output, format) { ($0.groupSize, $0.layout, $0.overwrites) = (32, layout, true) }
      let good = CheckpointInspection(path: output)
      #expect(
        good.refusals == []
          && good.lines.contains {
            $0.label == "quantization" && $0.text.contains(format == "int8" ? "int8" : "4 bits")
          })
      let kept = try tensors(output).values.filter {
        !($0.name.contains("layers.1.mlp") && $0.name.hasSuffix(".\(lost)"))
      }
      try folder.write("q/model.safetensors", safetensors(kept.sorted { $0.name < $1.name }))
      let refusals = CheckpointInspection(path: output).refusals
      #expect(refusals.count == 3 && refusals.allSatisfy { $0.contains(".\(lost) is missing") }, "\(refusals)")
      #expect(throws: EngineError.self) { try logits(output) }
    }
    // A GGUF file whose norm has another length.
    let gguf = folder.path + "/x.gguf"
    try folder.write("model/model.safetensors", safetensors(SmallModel().weights()))
    try convert(model, gguf, "gguf-q8_0")
    #expect(CheckpointInspection(path: gguf).refusals == [])
    var bytes = [UInt8](try #require(FileManager.default.contents(atPath: gguf)))
    let name = Array("output_norm.weight".utf8)
    let start = try #require((0..<bytes.count).first { bytes[$0...].starts(with: name) }) + name.count
    #expect(bytes[start + 4] == 64)
    bytes[start + 4] = 32
    try folder.write("y.gguf", bytes)
    let broken = CheckpointInspection(path: folder.path + "/y.gguf").refusals
    #expect(broken.count == 1 && broken[0].contains("model.norm.weight has shape [32]"), "\(broken)")
  }
}
