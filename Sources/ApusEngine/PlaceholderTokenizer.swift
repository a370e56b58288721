package import ApusCore
package import ApusTokenization

/// A tokenizer for models that have none: random weights made from a bare `config.json`.
///
/// Bytes are tokens 0..<256; every other id of the vocabulary is a made-up word, so that whatever a model with random
/// weights says can be printed, streamed and counted.
package enum PlaceholderTokenizer {
  /// Makes the tokenizer for a vocabulary of `vocabularySize` entries.
  package static func make(vocabularySize: Int) throws(EngineError) -> Tokenizer {
    var writer = JSONWriter(capacity: vocabularySize * 16 + 4096)
    writer.object { writer in
      writer.key("added_tokens")
      writer.array { _ in }
      writer.key("pre_tokenizer")
      writer.object { byteLevel(&$0) }
      writer.key("decoder")
      writer.object { byteLevel(&$0) }
      writer.key("model")
      writer.object { writer in
        writer.member("type", "BPE")
        writer.key("vocab")
        writer.object { writer in
          for byte in 0..<min(256, vocabularySize) { writer.member(name(ofByte: UInt8(byte)), byte) }
          // U+0120 is how byte-level vocabularies spell a space.
          for id in min(256, vocabularySize)..<vocabularySize { writer.member("\u{120}w\(id)", id) }
        }
        writer.key("merges")
        writer.array { _ in }
      }
    }
    return try Tokenizer(json: writer.bytes, name: "the placeholder tokenizer")
  }

  private static func byteLevel(_ writer: inout JSONWriter) {
    writer.member("type", "ByteLevel")
    writer.member("add_prefix_space", false)
    writer.member("trim_offsets", true)
    writer.member("use_regex", false)
  }

  /// The character that stands for a byte in byte-level vocabularies: itself where it prints, else one from U+0100 on in
  /// the order of the bytes that do not print (GPT-2's table).
  private static func name(ofByte byte: UInt8) -> String {
    func prints(_ byte: UInt8) -> Bool {
      (0x21...0x7E).contains(byte) || (0xA1...0xAC).contains(byte) || (0xAE...0xFF).contains(byte)
    }
    if prints(byte) { return String(Unicode.Scalar(byte)) }
    let rank = (0..<byte).count { !prints($0) }
    return String(Unicode.Scalar(UInt32(0x100 + rank))!)
  }
}
