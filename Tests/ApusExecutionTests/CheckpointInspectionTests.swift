import ApusModels
import Testing

/// What is said of checkpoints without loading them.
struct CheckpointInspectionTests {
  private func text(_ inspection: CheckpointInspection, _ label: String) -> String? {
    inspection.lines.first { $0.label == label }?.text
  }

  @Test(.enabled(if: Paths.dataHas("models/stories260K/hf")))
  func realCheckpoints() {
    for (path, format, types) in [
      ("hf", "safetensors", ["F32"]), ("stories260K-Q8_0.gguf", "GGUF version 3", ["Q8_0", "F16", "F32"]),
    ] {
      let found = CheckpointInspection(path: "\(Paths.data)/models/stories260K/\(path)")
      #expect(found.refusals.isEmpty, "\(found.refusals)")
      #expect(text(found, "format") == format && text(found, "architecture") == "LlamaForCausalLM")
      #expect(text(found, "vocabulary") == "512" && text(found, "context") == "512 tokens")
      let tensors = found.lines.filter { $0.label == "tensors" }
      #expect(tensors.count == types.count)
      for type in types { #expect(tensors.contains { $0.text.contains("of \(type),") }) }
    }
  }

  @Test func refusals() throws {
    let folder = try GGUFTests.Folder()
    #expect(CheckpointInspection(path: folder.path).refusals.count == 3)
    var builder = try GGUFTests.small()
    builder.set("general.architecture", text: "gemma9")
    let found = CheckpointInspection(path: try folder.write("x.gguf", builder.build().bytes))
    #expect(text(found, "architecture") == "gemma9" && text(found, "tokenizer") == "none")
    #expect(found.refusals.contains { $0.contains("gemma9 is not implemented") })
    let broken = CheckpointInspection(path: try folder.write("y.gguf", [0x47, 0x47, 0x55, 0x46]))
    #expect(broken.lines.isEmpty && broken.refusals.count == 1)
  }
}
