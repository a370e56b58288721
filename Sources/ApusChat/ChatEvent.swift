/// A piece of a model's answer, told apart from the others.
///
/// Texts of neighbouring events of one kind belong together: how an answer is cut into events depends on how it was fed,
/// what the events add up to does not.
public enum ChatEvent: Sendable, Equatable {
  /// Text of the chain of thought.
  case reasoning(String)
  /// Text for the user.
  case content(String)
  /// A tool call begins. `id` is the name that the model itself gave to the call, where its format has one.
  case toolCallBegin(index: Int, name: String, id: String?)
  /// More of the JSON text of the call's arguments.
  case toolCallArguments(index: Int, String)
  /// A tool call ends. `isComplete` tells whether its arguments are a whole JSON text; they are not if the answer broke off
  /// or went astray within them.
  case toolCallEnd(index: Int, isComplete: Bool)

  /// The same events with texts that belong together in one piece each.
  public static func merged(_ events: some Sequence<ChatEvent>) -> [ChatEvent] {
    var merged: [ChatEvent] = []
    for event in events {
      switch (merged.last, event) {
      case (.reasoning(let left)?, .reasoning(let right)): merged[merged.count - 1] = .reasoning(left + right)
      case (.content(let left)?, .content(let right)): merged[merged.count - 1] = .content(left + right)
      case (.toolCallArguments(let index, let left)?, .toolCallArguments(let other, let right)) where index == other:
        merged[merged.count - 1] = .toolCallArguments(index: index, left + right)
      default: merged.append(event)
      }
    }
    return merged
  }
}

/// Collects what the machines find, byte by byte, and gives it out as events with whole characters.
struct EventSink: Sendable {
  private enum Kind: Equatable { case none, reasoning, content, arguments }

  /// Whether reasoning is given out as it comes, or in one piece when it ends.
  var streamsReasoning = true
  /// Whether reasoning counts as content.
  var reasoningIsContent = false
  /// Whether a tool call has begun and not ended.
  private(set) var isCallOpen = false
  /// Tool calls begun so far.
  private(set) var callsBegun = 0

  private var events: [ChatEvent] = []
  private var kind = Kind.none
  private var run: [UInt8] = []

  private var openIndex: Int { callsBegun - 1 }

  @inline(__always)
  private mutating func append(_ byte: UInt8, _ newKind: Kind) {
    if kind != newKind {
      endRun()
      kind = newKind
    }
    run.append(byte)
  }

  mutating func content(_ byte: UInt8) { append(byte, .content) }

  mutating func content(_ bytes: some Sequence<UInt8>) { for byte in bytes { content(byte) } }

  mutating func reasoning(_ byte: UInt8) {
    if reasoningIsContent { content(byte) } else { append(byte, .reasoning) }
  }

  mutating func reasoning(_ bytes: some Sequence<UInt8>) { for byte in bytes { reasoning(byte) } }

  mutating func beginCall(_ name: String, id: String? = nil) {
    endRun()
    events.append(.toolCallBegin(index: callsBegun, name: name, id: id))
    callsBegun += 1
    isCallOpen = true
  }

  mutating func arguments(_ byte: UInt8) { append(byte, .arguments) }

  mutating func arguments(_ bytes: some Sequence<UInt8>) { for byte in bytes { append(byte, .arguments) } }

  mutating func endCall(isComplete: Bool) {
    endRun()
    events.append(.toolCallEnd(index: openIndex, isComplete: isComplete))
    isCallOpen = false
  }

  /// Gives out the run that has ended.
  private mutating func endRun() {
    give(run.count)
    kind = .none
  }

  private mutating func give(_ count: Int) {
    if count == 0 { return }
    let text = String(decoding: run[..<count], as: UTF8.self)
    run.removeFirst(count)
    switch kind {
    case .none: break
    case .reasoning: events.append(.reasoning(text))
    case .content: events.append(.content(text))
    case .arguments: events.append(.toolCallArguments(index: openIndex, text))
    }
  }

  /// The events since the last call. A character whose bytes are not all there yet waits for the others, unless nothing
  /// follows.
  mutating func take(isFinal: Bool) -> [ChatEvent] {
    if isFinal {
      endRun()
    } else if kind != .reasoning || streamsReasoning {
      give(run.count - incompleteTail(run))
    }
    defer { events.removeAll(keepingCapacity: true) }
    return events
  }
}

/// How many bytes at the end are the beginning of a character that is not complete; 0...3.
private func incompleteTail(_ bytes: [UInt8]) -> Int {
  for back in 1...4 where back <= bytes.count {
    let byte = bytes[bytes.count - back]
    if byte < 0x80 { return 0 }
    if byte >= 0xC0 {
      let length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : 2
      return back < length ? back : 0
    }
  }
  return 0
}

@inline(__always)
func isWhitespace(_ byte: UInt8) -> Bool { byte == 0x20 || (byte >= 0x09 && byte <= 0x0D && byte != 0x0B) }
