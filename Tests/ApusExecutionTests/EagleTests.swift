import ApusCore
import ApusExecution
import ApusModels
import ApusScheduling
import ApusTensors
import Foundation
import Testing

/// EAGLE heads, stored as published ones are, against Scripts/golden_eagle.py.
@Suite struct EagleTests {
  static let directory = Paths.goldens + "/Eagle"
  static let names = ["eagle1", "eagle3", "eagle3-narrow", "eagle3-whole-vocabulary"]

  /// A target with the head at a path.
  private func load(
    _ name: String, head: String, isThird: Bool? = nil, backend: any Backend = testBackends.last!,
    changes: [String: JSONValue] = [:]
  ) throws -> LoadedModel {
    let golden = try Paths.json("\(Self.directory)/\(name)/golden.json")
    var target = golden["target"]!.objectDictionary
    for (key, value) in changes { target[key] = value }
    let configuration = try ModelConfiguration(json: .object(JSONObject(target.map { ($0.key, $0.value) })))
    return try makeTinyModel(
      target, backend: backend,
      store: DummyWeights(
        seed: UInt64(golden["seed"]!.intValue!), initializerRange: configuration.initializerRange)
    ) {
      $0.maxTokensPerStep = 128
      $0.drafting = .eagle(path: head, isThird: isThird ?? name.hasPrefix("eagle3"))
    }
  }

  @Test(arguments: names)
  func draftLogitsEqualTheReference(name: String) throws {
    let golden = try Paths.json("\(Self.directory)/\(name)/golden.json")
    let expected = golden["logits"]!.arrayValue!.map(\.floats)
    let tokens = golden["tokens"]!.tokenIDs
    let drafts = golden["drafts"]!.tokenIDs
    let prompt = golden["prompt"]!.tokenIDs
    for (number, backend) in testBackends.enumerated() {
      let model = try load(name, head: "\(Self.directory)/\(name)", backend: backend)
      let rows = expectDrafts(
        of: model, drafts, behind: prompt, next: golden["next"]!.intValue!,
        chunks: number % 2 == 1 ? [7, 3, prompt.count - 11] : [], "\(name) on \(backend.name)")
      #expect(rows.count == expected.count)
      for (row, wanted) in zip(rows, expected) {
        let largest = wanted.reduce(0) { max($0, abs($1)) }
        let difference = zip(tokens, wanted).reduce(0) { max($0, abs(row[Int($1.0)] - $1.1)) }
        #expect(difference <= 1e-4 * largest, "\(name) on \(backend.name): off by \(difference) of \(largest)")
        // What the head does not know is never drafted.
        #expect(row.count { $0.isFinite } == tokens.count)
      }
    }
  }

  /// A head's K/V and hidden states are the same to the bit whether they came with each step or all at once.
  @Test func draftsDoNotDependOnWhenTheyWereAskedFor() throws {
    let prompt = try Paths.json("\(Self.directory)/eagle3/golden.json")["prompt"]!.tokenIDs
    func logits(eager: Bool) throws -> [[Float]] {
      let model = try load("eagle3", head: "\(Self.directory)/eagle3")
      var rows: [[Float]] = []
      let sequence = StepSequence(model.steps, prompt: prompt, sampling: .greedy)
      sequence.run(prompt, start: 0, wanted: eager ? 3 : 0)
      var known = prompt + sequence.result.tokens
      for step in 0..<8 {
        let next = step % 3 == 0 ? sequence.result.drafts.first?.tokens ?? [1, 2] : [3, 4]
        sequence.run(
          [known.last!] + next, start: known.count - 1, drafts: next.count, wanted: eager || step == 7 ? 3 : 0)
        known += sequence.result.tokens
        if step == 6 { model.steps.observeDraftLogits { rows.append($0) } }
      }
      return Array(rows.suffix(3))
    }
    let late = try logits(eager: false)
    #expect(late.count == 3)
    let eager = try logits(eager: true)
    #expect(eager == late)
  }

  /// Copies a head, with changes to its configuration and to its file.
  private func copy(
    _ name: String, config: [String: JSONValue?] = [:], file: (inout Data) -> Void = { _ in },
    _ body: (String) throws -> Void
  ) throws {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent("apus-eagle-\(UUID())")
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: folder) }
    var members = try Paths.json("\(Self.directory)/\(name)/config.json").objectDictionary
    for (key, value) in config { members[key] = value }
    var writer = JSONWriter()
    writer.value(.object(JSONObject(members.map { ($0.key, $0.value) })))
    try Data(writer.bytes).write(to: folder.appendingPathComponent("config.json"))
    var bytes = try Data(contentsOf: URL(fileURLWithPath: "\(Self.directory)/\(name)/model.safetensors"))
    file(&bytes)
    try bytes.write(to: folder.appendingPathComponent("model.safetensors"))
    try body(folder.path)
  }

  private func expectRefusal(_ sentence: String, _ body: () throws -> LoadedModel) {
    do {
      _ = try body()
      Issue.record("It was accepted; expected: \(sentence)")
    } catch { #expect("\(error)".contains(sentence), "\(error)") }
  }

  @Test func headsThatDoNotFitAreRefusedWithASentence() throws {
    func rename(_ name: String, _ other: String) -> (inout Data) -> Void {
      return { data in
        let range = data.range(of: Data("\"\(name)\"".utf8))!
        data.replaceSubrange(range, with: Data("\"\(other)\"".utf8))
      }
    }
    func refuse(
      _ sentence: String, _ name: String = "eagle3", config: [String: JSONValue?] = [:],
      target: [String: JSONValue] = [:], isThird: Bool? = nil, file: (inout Data) -> Void = { _ in }
    ) throws {
      try copy(name, config: config, file: file) { path in
        expectRefusal(sentence) { try load(name, head: path, isThird: isThird, changes: target) }
      }
    }
    try refuse("made for a model of hidden size 32, but the model's is 48", target: ["hidden_size": 48])
    try refuse("made for a model of hidden size 80", config: ["target_hidden_size": 80])
    try refuse("made for a vocabulary of 97 tokens, but the model's has 101", target: ["vocab_size": 101])
    try refuse("no table d2t", file: rename("d2t", "d3t"))
    try refuse("has no fc.weight", file: rename("fc.weight", "fx.weight"))
    try refuse("layers [1, 0, -1]", target: ["num_hidden_layers": 3])
    try refuse(
      "layers [1, 9]", config: ["eagle_config": ["eagle_aux_hidden_state_layer_ids": [1, 9]] as JSONValue])
    try refuse("num_hidden_layers is not 1", config: ["num_hidden_layers": 2])
    try refuse("lm_head.weight has shape [32, 32]", config: ["draft_vocab_size": 31])
    try refuse("one of EAGLE-1", "eagle1", isThird: true)
    try refuse("like Llama's or Qwen2's", config: ["architectures": ["Phi3ForCausalLMEagle3"]])
    try refuse("d2t maps draft token 0 outside the vocabulary") { data in
      let length = data.prefix(8).reversed().reduce(0) { $0 << 8 | Int($1) }
      let header = try! JSONValue.parse([UInt8](data[8..<8 + length]))
      let begin = 8 + length + header["d2t"]!["data_offsets"]![0]!.intValue!
      data.replaceSubrange(begin..<begin + 8, with: [0, 1, 0, 0, 0, 0, 0, 0])
    }
    expectRefusal("does not exist") { try load("eagle3", head: "/nowhere") }
    try copy("eagle3") { path in _ = try load("eagle3", head: path) }
  }
}
