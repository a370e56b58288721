package import ApusCore

/// What writing a tokenizer in another format needs to know of it.
extension Tokenizer {
  /// Ids of the tokens that are found in the text before the model runs.
  package var addedIDs: Set<TokenID> { Set(addedTokens.map(\.id)) }

  /// Reads a tokenizer from the bytes of a GGUF file's header.
  /// - Parameter name: stands for the file in messages.
  package convenience init(gguf bytes: [UInt8], name: String) throws(EngineError) {
    var parts = try bytes.withUnsafeBufferPointer { (bytes) throws(EngineError) in
      try GGUFTokenizer(bytes, file: name).parts()
    }
    // As loading the file does.
    try Configuration(.null).apply(to: &parts, file: name, isJSON: false)
    try self.init(parts)
  }

  /// What a `tokenizer.json` says of the steps around a byte-level model, by GGUF's name for them.
  /// - Throws: `unsupported` for a name that is not known.
  package static func byteLevelSections(
    pre name: String, file: String
  ) throws(EngineError) -> (sections: [String: JSONValue], takesWords: Bool) {
    try GGUFTokenizer.byteLevelSections(name, file: file)
  }

  /// GGUF's names for the steps around byte-level models, one for each kind that is known.
  package static let byteLevelNames = [
    "gpt-2", "llama-bpe", "qwen2", "stablelm2", "gpt-4o", "tekken", "deepseek-llm", "deepseek-coder", "deepseek-v3",
    "starcoder", "falcon", "kimi-k2",
  ]

  /// A piece of a SentencePiece model, with the format's number of its kind.
  package struct Piece: Sendable {
    package var text: [UInt8]
    package var score: Float
    package var kind: Int
  }

  /// The pieces of a SentencePiece model that merges pairs; `nil` if the file is none or is a Unigram model.
  package static func pieces(file: String) throws(EngineError) -> [Piece]? {
    try FileBytes(file, limit: 1 << 30).withBytes { (bytes) throws(EngineError) in
      if GGUFTokenizer.matches(bytes) || TiktokenFile.matches(bytes) { return nil }
      let model = try SentencePieceModel(bytes, file: file)
      if model.isUnigram { return nil }
      return model.pieces.map { Piece(text: $0.text, score: $0.score, kind: $0.kind.rawValue) }
    }
  }
}
