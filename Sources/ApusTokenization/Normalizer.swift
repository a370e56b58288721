import ApusCore

/// A rewriting of the text before it is cut into words.
indirect enum Normalizer: Sendable {
  case sequence([Normalizer])
  /// Puts a text before one that is not empty.
  case prepend([UInt8])
  /// Replaces every occurrence of a string.
  case replace(pattern: [UInt8], content: [UInt8])
  /// Writes every byte as its character of the byte-level alphabet.
  case byteLevel

  /// Rewrites a text.
  ///
  /// `startMoved` becomes true when the first character of the result no longer stems from the first of the text, which
  /// decides whether a later step takes the piece for the beginning.
  func apply(to text: inout [UInt8], startMoved: inout Bool) throws(EngineError) {
    switch self {
    case .sequence(let steps):
      for step in steps { try step.apply(to: &text, startMoved: &startMoved) }
    case .prepend(let prefix):
      if !text.isEmpty { text.insert(contentsOf: prefix, at: 0) }
    case .replace(let pattern, let content):
      text = replacing(text, pattern, with: content)
    case .byteLevel:
      var result: [UInt8] = []
      result.reserveCapacity(text.count * 2)
      text.withUnsafeBufferPointer { ByteAlphabet.encode($0, to: &result) }
      text = result
    }
  }
}
