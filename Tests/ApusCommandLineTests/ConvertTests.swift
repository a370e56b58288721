import ApusCommandLine
import ApusCore
import Foundation
import Testing

/// `apus convert` and `apus inspect` as a shell sees them.
struct ConvertTests {
  static let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent().path
  static let data = ProcessInfo.processInfo.environment["APUS_SHARED_DATA"] ?? root + "/../shared/data"
  static let model = data + "/models/stories260K/hf"

  static func hasModel() -> Bool {
    if FileManager.default.fileExists(atPath: model) { return true }
    print("Skipped: \(model) does not exist.")
    return false
  }

  @Test(.enabled(if: hasModel())) func statusesAndFiles() async throws {
    let folder = NSTemporaryDirectory() + "apus-\(UUID().uuidString)"
    try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(atPath: folder) }
    func run(_ arguments: String...) async -> Int32 { await ApusProgram.run(["convert"] + arguments + ["--quiet"]) }

    #expect(await run(Self.model, folder + "/x.gguf", "--format", "gguf-q9") == ExitStatus.usage)
    #expect(await run(folder + "/absent", folder + "/x", "--format", "bf16") == ExitStatus.missingInput)
    for size in ["0", "x", "5XB", "99999999999GB", "-1"] {
      #expect(await run(Self.model, folder + "/x", "--format", "bf16", "--max-shard-size", size) == ExitStatus.usage)
    }
    #expect(await run(Self.model, folder + "/x", "--format", "int4", "--layout", "x") == ExitStatus.usage)
    #expect(await run(Self.model, folder + "/x", "--format", "int8", "--dense-type", "int8") == ExitStatus.usage)
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder) == [])

    let report = folder + "/report.json"
    let arguments = [
      Self.model, folder + "/x", "--format", "bf16", "--max-shard-size", "200KiB", "--report", report,
    ]
    #expect(await ApusProgram.run(["convert"] + arguments + ["--quiet", "--threads", "1"]) == ExitStatus.success)
    let json = try JSONValue.parse([UInt8](Data(contentsOf: URL(fileURLWithPath: report))))
    #expect(json["format"]?.stringValue == "bf16" && (json["relative_rms_error"]?.doubleValue ?? 0) > 0)
    let shards = try FileManager.default.contentsOfDirectory(atPath: folder + "/x").filter {
      $0.hasSuffix(".safetensors")
    }
    #expect(shards.count > 2)
    // Neither is replaced unasked.
    #expect(await ApusProgram.run(["convert"] + arguments + ["--quiet"]) == ExitStatus.usage)
    #expect(await ApusProgram.run(["convert"] + arguments + ["--quiet", "--force"]) == ExitStatus.success)
    #expect(await ApusProgram.run(["inspect", folder + "/x", "--json"]) == ExitStatus.success)
    try FileManager.default.removeItem(atPath: folder + "/x/" + shards[0])
    #expect(await ApusProgram.run(["inspect", folder + "/x"]) == ExitStatus.failure)
  }
}
