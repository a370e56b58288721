import ApusCore

/// One step from token texts to text. Steps before a `fuse` or `byteLevel` work on tokens, later ones on the whole text.
enum DecoderStep: Sendable {
  /// Undoes the byte alphabet, joins all tokens and replaces ill-formed UTF-8.
  case byteLevel
  /// Turns runs of `<0xHH>` into the text of their bytes.
  case byteFallback
  /// Joins all tokens.
  case fuse
  /// Turns the replacement character into a space; in the first token it is dropped where a prefix is prepended.
  case metaspace(replacement: [UInt8], dropsFirst: Bool)
  /// Joins continuations and puts spaces before other tokens.
  case wordPiece(prefix: [UInt8], cleansUp: Bool)
  /// Turns the end-of-word suffix into a space, and into nothing in the last token.
  case endOfWord(suffix: [UInt8])
  /// Collapses repeated tokens, drops padding and turns the delimiter into a space.
  case connectionist(padding: [UInt8], delimiter: [UInt8], cleansUp: Bool)
  /// Drops up to `start` leading and `stop` trailing characters that equal `content`.
  case strip(content: [UInt8], start: Int, stop: Int)
  /// Replaces every occurrence of a string.
  case replace(pattern: [UInt8], content: [UInt8])
  /// Replaces every match of a pattern.
  case replaceMatches(Pattern, content: [UInt8])
}

/// Replaces every occurrence of `pattern`, left to right.
func replacing(_ text: [UInt8], _ pattern: [UInt8], with content: [UInt8]) -> [UInt8] {
  guard !pattern.isEmpty, text.count >= pattern.count else { return text }
  var result: [UInt8] = []
  result.reserveCapacity(text.count)
  var index = 0
  while index < text.count {
    if text[index] == pattern[0], index + pattern.count <= text.count,
      text[index..<(index + pattern.count)].elementsEqual(pattern)
    {
      result.append(contentsOf: content)
      index += pattern.count
    } else {
      result.append(text[index])
      index += 1
    }
  }
  return result
}

/// Replacements that undo the spaces a word-splitting tokenizer leaves around English punctuation.
enum CleanUp {
  /// What the WordPiece and CTC decoders of `tokenizers` replace, in order.
  static let decoder: [([UInt8], [UInt8])] = pairs(
    [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " do not", " 's", " 've", " 're"],
    [".", "?", "!", ",", "'", "n't", "'m", " don't", "'s", "'ve", "'re"])

  /// What `clean_up_tokenization_spaces` of transformers replaces, in order.
  static let configuration: [([UInt8], [UInt8])] = pairs(
    [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"],
    [".", "?", "!", ",", "'", "n't", "'m", "'s", "'ve", "'re"])

  private static func pairs(_ patterns: [String], _ contents: [String]) -> [([UInt8], [UInt8])] {
    zip(patterns, contents).map { (Array($0.utf8), Array($1.utf8)) }
  }

  static func apply(_ pairs: [([UInt8], [UInt8])], to text: [UInt8]) -> [UInt8] {
    guard text.contains(0x20) else { return text }
    return pairs.reduce(text) { replacing($0, $1.0, with: $1.1) }
  }
}

/// The steps from tokens to text, in a form that can be fed one token at a time.
struct TextDecoder: Sendable {
  /// Steps on tokens, up to the one that joins them.
  private(set) var tokenSteps: [DecoderStep] = []
  /// Whether the last of `tokenSteps` is `byteLevel`, so that what follows is bytes in need of repair.
  private(set) var endsInBytes = false
  /// Steps on the joined text.
  private(set) var textSteps: [DecoderStep] = []
  /// How many of `tokenSteps`, from the first, work on each token by itself: they are applied once, when the tokenizer is
  /// loaded.
  private(set) var preparedSteps = 0
  /// Put between tokens when a tokenizer has no decoder at all.
  private(set) var separator: [UInt8] = []

  /// Makes a decoder of steps in order; `nil` joins tokens with spaces.
  init(_ steps: [DecoderStep]?) {
    guard let steps else {
      separator = [0x20]
      return
    }
    var isJoined = false
    for step in steps {
      if isJoined {
        switch step {
        case .fuse: continue
        default: textSteps.append(step)
        }
        continue
      }
      switch step {
      case .byteLevel:
        tokenSteps.append(step)
        endsInBytes = true
        isJoined = true
      case .fuse: isJoined = true
      default: tokenSteps.append(step)
      }
    }
    preparedSteps =
      tokenSteps.prefix { step in
        switch step {
        case .byteLevel, .replace, .replaceMatches, .strip: true
        default: false
        }
      }.count
  }

  /// A token's text after the prepared steps.
  func prepared(_ token: [UInt8]) -> [UInt8] {
    tokenSteps[..<preparedSteps].reduce(token) { $1.applied(to: $0, isFirst: false) }
  }

  /// Adds what `clean_up_tokenization_spaces` asks for.
  mutating func cleansUp() {
    for (pattern, content) in CleanUp.configuration { textSteps.append(.replace(pattern: pattern, content: content)) }
  }
}

extension DecoderStep {
  /// The value of a token `<0xHH>`.
  static func byteValue(_ token: some RandomAccessCollection<UInt8>) -> UInt8? {
    guard token.count == 6 else { return nil }
    let bytes = Array(token)
    guard bytes[0] == UInt8(ascii: "<"), bytes[1] == UInt8(ascii: "0"), bytes[2] == UInt8(ascii: "x"),
      bytes[5] == UInt8(ascii: ">")
    else { return nil }
    func digit(_ byte: UInt8) -> UInt8? {
      switch byte {
      case 0x30...0x39: byte - 0x30
      case 0x41...0x46: byte - 0x41 + 10
      case 0x61...0x66: byte - 0x61 + 10
      default: nil
      }
    }
    guard let low = digit(bytes[4]) else { return nil }
    // The reference parser of the two digits takes a plus sign for the first.
    if bytes[3] == UInt8(ascii: "+") { return low }
    guard let high = digit(bytes[3]) else { return nil }
    return high << 4 | low
  }

  /// What a step makes of one token by itself, for steps whose work does not depend on other tokens.
  func applied(to token: [UInt8], isFirst: Bool) -> [UInt8] {
    switch self {
    case .metaspace(let replacement, let dropsFirst):
      return replacing(token, replacement, with: isFirst && dropsFirst ? [] : [0x20])
    case .wordPiece(let prefix, let cleansUp):
      var result = token
      if !isFirst {
        if token.starts(with: prefix) {
          result.removeFirst(prefix.count)
        } else {
          result.insert(0x20, at: 0)
        }
      }
      return cleansUp ? CleanUp.apply(CleanUp.decoder, to: result) : result
    case .connectionist(let padding, let delimiter, let cleansUp):
      var result = replacing(token, padding, with: [])
      if cleansUp { result = replacing(CleanUp.apply(CleanUp.decoder, to: result), delimiter, with: [0x20]) }
      return result
    case .strip(let content, let start, let stop):
      return Self.stripped(token, content, start, stop)
    case .replace(let pattern, let content):
      return replacing(token, pattern, with: content)
    case .replaceMatches(let pattern, let content):
      return token.withUnsafeBufferPointer { bytes in
        var result: [UInt8] = []
        var copied = 0
        do throws(EngineError) {
          try pattern.matches(in: bytes) { start, end in
            result.append(bytes: Bytes(rebasing: bytes[copied..<start]))
            result.append(contentsOf: content)
            copied = end
          }
        } catch {
          // A search that was given up leaves the rest of the token as it is.
        }
        result.append(bytes: Bytes(rebasing: bytes[copied...]))
        return result
      }
    case .endOfWord(let suffix):
      return replacing(token, suffix, with: [])
    case .byteFallback:
      return Self.byteValue(token).map { $0 < 0x80 ? [$0] : [0xEF, 0xBF, 0xBD] } ?? token
    case .byteLevel:
      return token.withUnsafeBufferPointer { ByteAlphabet.decode($0) } ?? token
    case .fuse: return token
    }
  }

  private static func stripped(_ token: [UInt8], _ content: [UInt8], _ start: Int, _ stop: Int) -> [UInt8] {
    var slice = token[...]
    var remaining = start
    while remaining > 0, slice.starts(with: content) {
      slice.removeFirst(content.count)
      remaining -= 1
    }
    remaining = stop
    while remaining > 0, slice.count >= content.count, slice.suffix(content.count).elementsEqual(content) {
      slice.removeLast(content.count)
      remaining -= 1
    }
    return Array(slice)
  }
}
