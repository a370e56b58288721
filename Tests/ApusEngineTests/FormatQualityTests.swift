import ApusCore
import ApusExecution
import ApusModels
import ApusTensors
import ApusTesting
import ApusTokenization
import Foundation
import Testing

private let directory = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
  .appendingPathComponent("../../Models/apus-demo").standardizedFileURL.path

/// What formats of weights and of the K/V cache cost on text that the model was made for: how far they move its predictions,
/// and how many tokens of right answers it still knows. Prints a column of the table in docs/internals/kernels.md.
@Suite struct FormatQualityTests {
  static let formats:
    [(name: String, divergence: Double, agreement: Double, configure: @Sendable (inout ModelOptions) -> Void)] =
      [
        ("bfloat16", 0.01, 0.95, { $0.dtype = .bfloat16 }),
        ("int8", 0.05, 0.9, { $0.quantization = .int8 }),
        ("int8-group", 0.05, 0.9, { $0.quantization = .codes(.int8) }),
        ("fp8", 0.1, 0.85, { $0.quantization = .codes(.float8) }),
        ("int4", 1, 0.5, { $0.quantization = .codes(.int4) }),
        ("output layer int8", 0.01, 0.95, { $0.outputLayer = .int8 }),
        ("int8, output layer dense", 0.05, 0.9, { ($0.quantization, $0.outputLayer) = (.int8, .dense) }),
        ("int4, output layer dense", 1, 0.5, { ($0.quantization, $0.outputLayer) = (.codes(.int4), .dense) }),
        ("K/V int8", 0.05, 0.9, { $0.kvDType = .int8 }),
        ("K/V fp8", 0.1, 0.85, { $0.kvDType = .float8 }),
      ]

  /// Held-out questions with their right answers, and where in each the answer's tokens are predicted.
  private static func texts() throws -> [(tokens: [TokenID], answer: Range<Int>)] {
    let tokenizer = try Tokenizer.load(directory: directory)
    let lines = try String(contentsOfFile: directory + "/evaluation.jsonl", encoding: .utf8).split(separator: "\n")
    let questions = try lines.map { try JSONValue.parse(Array($0.utf8)) }
    return try ["extraction", "list_copy"].flatMap { skill in
      try questions.filter { $0["skill"]?.stringValue == skill && $0["messages"]?.arrayValue?.count == 1 }.prefix(6).map
      {
        let question = $0["messages"]![0]!["content"]!.stringValue!
        let prompt = try tokenizer.encode(
          "<|im_start|>user\n\(question)<|im_end|>\n<|im_start|>assistant\n", addSpecialTokens: false)
        let answer = try tokenizer.encode($0["answer"]!.stringValue! + "<|im_end|>", addSpecialTokens: false)
        return (prompt + answer, prompt.count - 1..<prompt.count + answer.count - 1)
      }
    }
  }

  @Test("The demo model's answers survive every format")
  func demoModel() throws {
    let texts = try Self.texts()
    #expect(texts.count == 12)
    let wanted = texts.flatMap { text in text.answer.map { text.tokens[$0 + 1] } }
    func logits(_ configure: (inout ModelOptions) -> Void) throws -> (all: [[Float]], right: Double) {
      var options = ModelOptions(path: directory)
      options.kvCacheBytes = 16 << 20
      options.dtype = .float32
      configure(&options)
      let loaded = try ModelLoader.load(options, backend: CPUBackend(threads: 2))
      var (all, said): ([[Float]], [TokenID]) = ([], [])
      for text in texts {
        let logits = try loaded.steps.promptLogits(text.tokens, positions: Array(text.tokens.indices))
        said += text.answer.map { place in TokenID(logits[place].firstIndex(of: logits[place].max()!)!) }
        all += text.answer.map { logits[$0] }
      }
      let right = zip(said, wanted).filter { $0 == $1 }.count
      return (all, Double(right) / Double(wanted.count))
    }
    let original = try logits { _ in }
    print("quality: apus-demo, \(wanted.count) tokens of right answers, of which float32 knows \(original.right)")
    #expect(original.right > 0.95)
    for format in Self.formats {
      let other = try logits(format.configure)
      let found = Divergence(reference: original.all, other: other.all)
      print(
        "quality: apus-demo, \(format.name): KL \(Float(found.mean)) nats, agreement \(Float(found.agreement)), "
          + "\(original.all.count) tokens, right \(other.right)")
      #expect(found.mean > 0 && found.mean < format.divergence, "\(format.name)")
      #expect(found.agreement > format.agreement, "\(format.name)")
      #expect(other.right > original.right - format.divergence, "\(format.name): \(other.right)")
    }
  }
}
