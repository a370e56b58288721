public import ApusCore

/// Turns tokens into text as they arrive.
///
/// Each `append` gives the text that is certain now: whole characters only, and only text that no later token can change.
/// However the ids are split over calls, the texts joined equal the whole decoding. What is held back: the bytes of an
/// unfinished character, a run of byte-fallback tokens until it ends (one ill-formed byte changes the meaning of the whole
/// run), and a possible start of something a decoder replaces.
public struct IncrementalDetokenizer: Sendable {
  private let tokenizer: Tokenizer
  private let skipsSpecialTokens: Bool
  private var state: DecoderState

  /// Makes a detokenizer for one text.
  public init(_ tokenizer: Tokenizer, skipSpecialTokens: Bool = true) {
    self.tokenizer = tokenizer
    skipsSpecialTokens = skipSpecialTokens
    state = DecoderState(tokenizer.decoder)
  }

  /// Appends one token; gives the text that became certain, often empty.
  public mutating func append(_ id: TokenID) -> String {
    appendBytes(id)
    return state.takeText()
  }

  /// Appends tokens; gives the text that became certain.
  public mutating func append(contentsOf ids: some Sequence<TokenID>) -> String {
    for id in ids { appendBytes(id) }
    return state.takeText()
  }

  /// Appends one token and writes the UTF-8 of the text that became certain after `output`.
  public mutating func append(_ id: TokenID, to output: inout [UInt8]) {
    appendBytes(id)
    state.takeBytes(to: &output)
  }

  /// Ends the text; gives what was held back. The detokenizer then starts afresh.
  public mutating func finish() -> String {
    state.finish()
    let text = state.takeText()
    state = DecoderState(tokenizer.decoder)
    return text
  }

  @inline(__always)
  private mutating func appendBytes(_ id: TokenID) {
    guard let entry = tokenizer.decodingEntry(id) else { return }
    if skipsSpecialTokens, entry.isSpecial { return }
    tokenizer.withDecodingBytes(entry) { state.append($0, entry) }
  }
}

/// The state of a decoder between tokens.
struct DecoderState: Sendable {
  /// State of a step on the joined text.
  private enum TextState {
    /// What could be the start of `pattern`.
    case replace(pattern: [UInt8], content: [UInt8], held: [UInt8])
    /// How many more leading characters may go, and the trailing ones held back.
    case strip(content: [UInt8], start: Int, stop: Int, held: [UInt8])
    /// A step that must see the whole text.
    case whole(DecoderStep, held: [UInt8])
  }

  private let decoder: TextDecoder
  private var textStates: [TextState] = []
  /// How the steps that are left for each token can be taken.
  private enum Route { case raw, text, bytes, general }
  private let route: Route
  /// Whether joined text goes to the output as it is, because no step on it has anything left to do.
  private var passesText = false
  private var count = 0
  /// Values of the byte-fallback tokens of the present run, by step.
  private var run: [UInt8] = []
  private var counts: [Int]
  private var previous: [UInt8]?
  private var heldToken: [UInt8]?
  /// Bytes at the end of a joined byte stream that are not a whole character yet.
  private var partial: [UInt8] = []
  private var output: [UInt8] = []

  init(_ decoder: TextDecoder) {
    self.decoder = decoder
    counts = [Int](repeating: 0, count: decoder.tokenSteps.count)
    for step in decoder.textSteps {
      switch step {
      case .replace(let pattern, let content) where !pattern.isEmpty:
        textStates.append(.replace(pattern: pattern, content: content, held: []))
      case .strip(let content, let start, let stop):
        textStates.append(.strip(content: content, start: start, stop: stop, held: []))
      default: textStates.append(.whole(step, held: []))
      }
    }
    let left = decoder.tokenSteps[decoder.preparedSteps...]
    if left.isEmpty {
      route = decoder.endsInBytes ? .raw : .text
    } else if left.count == 1, case .byteFallback? = left.first {
      route = .bytes
    } else {
      route = .general
    }
    updatePassing()
  }

  private mutating func updatePassing() {
    passesText = textStates.allSatisfy {
      if case .strip(_, start: 0, stop: 0, let held) = $0 { held.isEmpty } else { false }
    }
  }

  /// Feeds one token: its text after the prepared steps.
  @inline(__always)
  mutating func append(_ token: Bytes, _ entry: DecodingTable.Entry) {
    if !decoder.separator.isEmpty, count > 0 { receive(decoder.separator, at: 0) }
    count += 1
    switch route {
    case .raw: appendRaw(token)
    case .text: receive(token)
    case .bytes:
      if entry.isByte {
        run.append(entry.byte)
      } else {
        if !run.isEmpty { flushRun(at: decoder.tokenSteps.count - 1) }
        receive(token)
      }
    case .general: feed(Array(token), at: decoder.preparedSteps)
    }
  }

  @inline(__always)
  private mutating func receive(_ text: Bytes) {
    if passesText {
      output.append(contentsOf: text)
    } else {
      receive(Array(text), at: 0)
    }
  }

  /// Passes a token through the steps on tokens from `step` on.
  private mutating func feed(_ token: [UInt8], at step: Int) {
    guard step < decoder.tokenSteps.count else {
      receive(token, at: 0)
      return
    }
    let kind = decoder.tokenSteps[step]
    switch kind {
    case .byteFallback:
      if let byte = DecoderStep.byteValue(token) {
        run.append(byte)
        return
      }
      flushRun(at: step)
      feed(token, at: step + 1)
    case .endOfWord(let suffix):
      if let held = heldToken { feed(replacing(held, suffix, with: [0x20]), at: step + 1) }
      heldToken = token
    case .connectionist:
      if previous == token { return }
      previous = token
      let result = kind.applied(to: token, isFirst: false)
      if !result.isEmpty { feed(result, at: step + 1) }
    case .byteLevel:
      kind.applied(to: token, isFirst: false).withUnsafeBufferPointer { appendRaw($0) }
    default:
      let isFirst = counts[step] == 0
      counts[step] += 1
      feed(kind.applied(to: token, isFirst: isFirst), at: step + 1)
    }
  }

  private mutating func flushRun(at step: Int) {
    guard !run.isEmpty else { return }
    let bytes = run
    run.removeAll(keepingCapacity: true)
    if bytes.withUnsafeBufferPointer({ isValidUTF8($0) }) {
      feed(bytes, at: step + 1)
    } else {
      for _ in bytes { feed([0xEF, 0xBF, 0xBD], at: step + 1) }
    }
  }

  /// Appends bytes of a joined byte stream and passes on the whole characters.
  private mutating func appendRaw(_ bytes: Bytes) {
    if partial.isEmpty {
      let rest = passWhole(bytes)
      if rest < bytes.count { partial.append(contentsOf: bytes[rest...]) }
      return
    }
    partial.append(contentsOf: bytes)
    let joined = partial
    let rest = joined.withUnsafeBufferPointer { passWhole($0) }
    partial.removeFirst(rest)
  }

  /// Passes on the whole characters that bytes start with, and U+FFFD for what can become none; gives the index of the rest.
  private mutating func passWhole(_ bytes: Bytes) -> Int {
    var index = 0
    var start = 0
    scan: while index < bytes.count {
      if bytes[index] < 0x80 {
        index += 1
        continue
      }
      switch utf8Step(bytes, index) {
      case .valid(let length): index += length
      case .invalid(let length):
        receive(Bytes(rebasing: bytes[start..<index]))
        receive([0xEF, 0xBF, 0xBD], at: 0)
        index += length
        start = index
      case .incomplete: break scan
      }
    }
    if start < index { receive(Bytes(rebasing: bytes[start..<index])) }
    return index
  }

  /// Passes joined text through the steps on text from `step` on.
  private mutating func receive(_ text: [UInt8], at step: Int) {
    if text.isEmpty { return }
    guard step < textStates.count else {
      output.append(contentsOf: text)
      return
    }
    switch textStates[step] {
    case .replace(let pattern, let content, let held):
      let all = held + text
      var result: [UInt8] = []
      var index = 0
      while index < all.count {
        let available = Swift.min(pattern.count, all.count - index)
        if all[index..<(index + available)].elementsEqual(pattern[..<available]) {
          if available < pattern.count { break }
          result.append(contentsOf: content)
          index += pattern.count
        } else {
          result.append(all[index])
          index += 1
        }
      }
      textStates[step] = .replace(pattern: pattern, content: content, held: Array(all[index...]))
      receive(result, at: step + 1)
    case .strip(let content, var start, let stop, let held):
      var all = (held + text)[...]
      while start > 0, all.starts(with: content) {
        all.removeFirst(content.count)
        start -= 1
      }
      if start > 0, !all.isEmpty, !(all.count < content.count && content.starts(with: all)) { start = 0 }
      var end = all.endIndex
      if stop > 0 {
        var trailing = 0
        while trailing < stop, end - content.count >= all.startIndex,
          all[(end - content.count)..<end].elementsEqual(content)
        {
          end -= content.count
          trailing += 1
        }
      }
      textStates[step] = .strip(content: content, start: start, stop: stop, held: Array(all[end...]))
      receive(Array(all[..<end]), at: step + 1)
      if start == 0, stop == 0 { updatePassing() }
    case .whole(let kind, let held):
      textStates[step] = .whole(kind, held: held + text)
    }
  }

  /// Lets go of everything held back, as if no token followed.
  mutating func finish() {
    for (step, kind) in decoder.tokenSteps.enumerated() {
      switch kind {
      case .byteFallback: flushRun(at: step)
      case .endOfWord(let suffix):
        if let held = heldToken {
          heldToken = nil
          feed(replacing(held, suffix, with: []), at: step + 1)
        }
      default: break
      }
    }
    if !partial.isEmpty {
      partial.removeAll()
      receive([0xEF, 0xBF, 0xBD], at: 0)
    }
    for step in 0..<textStates.count {
      switch textStates[step] {
      case .replace(let pattern, let content, let held):
        textStates[step] = .replace(pattern: pattern, content: content, held: [])
        receive(held, at: step + 1)
      case .strip:
        break  // What it holds at the end is what it drops.
      case .whole(let kind, let held):
        textStates[step] = .whole(kind, held: [])
        if !held.isEmpty { receive(kind.applied(to: held, isFirst: true), at: step + 1) }
      }
    }
  }

  /// Takes the text that is certain.
  mutating func takeText() -> String {
    if output.isEmpty { return "" }
    let text = String(decoding: output, as: UTF8.self)
    output.removeAll(keepingCapacity: true)
    return text
  }

  /// Takes the text that is certain, as bytes.
  mutating func takeBytes(to result: inout [UInt8]) {
    result.append(contentsOf: output)
    output.removeAll(keepingCapacity: true)
  }
}
