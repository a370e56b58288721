import ApusCore
import ApusEngine
import Foundation
import Testing

/// The real all-MiniLM-L6-v2, where it is at hand: the folder that APUS_MINILM names.
struct MiniLMTests {
  /// The first numbers of each text's vector and its cosine with the first text's, as transformers 5.24 computes them in
  /// float32 (Scripts/embedding_client_check.py has the rule).
  static let golden: [(text: String, vector: [Float], cosine: Double)] = [
    (
      "That is a happy person", [-0.0338769, 0.0919416, 0.0487013, -0.0348835, -0.0648292, -0.0266858],
      0.9999999
    ),
    (
      "Today is a sunny day", [-0.0162912, 0.1040661, 0.0974078, 0.0741695, 0.0374627, -0.0607122],
      0.2568761
    ),
    (
      "Ça alors, l'été à Zürich!", [-0.0189296, 0.0261838, 0.0588823, -0.0014509, 0.0520461, -0.0226221],
      -0.0155387
    ),
    (
      "東京は日本の首都です。", [0.1192815, 0.0873427, 0.0849010, -0.0243437, -0.0423524, 0.0351105],
      -0.0229180
    ),
  ]

  @Test func vectorsEqualTransformers() async throws {
    guard let path = ProcessInfo.processInfo.environment["APUS_MINILM"] else {
      return print("Skipped: APUS_MINILM names no folder with all-MiniLM-L6-v2.")
    }
    let engine = try await EmbeddingEngine.start(EngineConfiguration(modelPath: path))
    #expect(engine.information == EmbeddingInformation(dimensions: 384, pooling: .mean, isNormalized: true))
    #expect(engine.model.contextLength == 256)
    var inputs: [EmbeddingInput] = []
    for (text, _, _) in Self.golden {
      inputs.append(EmbeddingInput(tokens: try engine.encode(text, addSpecialTokens: true)))
    }
    let vectors = try await engine.embed(inputs)
    for (vector, wanted) in zip(vectors, Self.golden) {
      for (number, other) in zip(vector, wanted.vector) { #expect(abs(number - other) < 1e-5, "\(wanted.text)") }
      #expect(abs(cosineSimilarity(vector, vectors[0]) - wanted.cosine) < 1e-5, "\(wanted.text)")
    }
    await engine.shutdown()
  }
}
