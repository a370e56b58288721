import ApusCommandLine
import ApusEngine
import Testing

/// What is said on the command line about weights and experts is what the engine is told.
@Suite struct MixtureFlagTests {
  /// Any directory is a model's path here: nothing is loaded.
  private func configuration(_ line: String) async throws -> EngineConfiguration {
    try await engineConfiguration(of: ["--model-path", "/"] + line.split(separator: " ").map(String.init))
  }

  @Test func flagsReachTheEngine() async throws {
    let plain = try await configuration("")
    #expect(plain.expertDispatch == .normal && plain.redundantExperts == 0 && plain.expertLocationPath == nil)
    for name in ["--moe-dispatch", "--deepep-mode"] {
      #expect(try await configuration("\(name) low_latency").expertDispatch == .lowLatency)
      #expect(try await configuration("\(name) auto").expertDispatch == .auto)
    }
    let placed = try await configuration("--ep-num-redundant-experts 4 --init-expert-location /x/y.json")
    #expect(placed.redundantExperts == 4 && placed.expertLocationPath == "/x/y.json")
    #expect(try await configuration("--init-expert-location trivial").expertLocationPath == nil)
    #expect(plain.outputLayerQuantization == .auto)
    #expect(try await configuration("--output-layer-quantization dense").outputLayerQuantization == .dense)
    #expect(try await configuration("--output-layer-quantization int8").outputLayerQuantization == .int8)
    #expect(plain.packedCache == nil)
    #expect(try await configuration("--packed-cache beside").packedCache == .besideCheckpoint)
    #expect(try await configuration("--packed-cache /x").packedCache == .directory("/x"))
  }

  @Test(arguments: [
    "--moe-dispatch fast", "--ep-num-redundant-experts -1", "--ep-num-redundant-experts 5000",
    "--ep-num-redundant-experts x", "--output-layer-quantization int4", "--packed-cache beside --load-format dummy",
  ])
  func whatCannotBeIsRefused(line: String) async {
    await #expect(throws: (any Error).self) { _ = try await configuration(line) }
  }
}
