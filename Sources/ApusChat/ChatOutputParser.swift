/// Tells reasoning, content and tool calls in a model's answer apart as it arrives.
///
/// A state machine over bytes: it takes one at a time, whatever pieces the answer comes in, so the pieces cannot change what
/// it finds. It holds back the bytes that may be the beginning of a marker, line breaks before one, and a tool call until
/// its name and the beginning of its arguments show that it is one; everything else passes through at once. What turns out
/// to be no tool call becomes content, and a call that goes astray ends there, with what follows as content.
public struct ChatOutputParser: Sendable {
  /// What is done with reasoning.
  public struct Options: Sendable, Equatable {
    /// Whether reasoning is told apart from content. Without, it stays content, marks included; tool calls are not looked
    /// for within it either way.
    public var separatesReasoning = true
    /// Whether reasoning is given out as it comes, or in one piece when it ends.
    public var streamsReasoning = true
    /// Whether the answer begins within the reasoning; `nil` leaves that to the format.
    public var beginsInReasoning: Bool?

    /// Separate and streamed.
    public init() {}
  }

  private enum Mode { case text, reasoning, calls, harmony }
  /// What came before the text at hand, which decides what becomes of whitespace.
  private enum Place {
    /// Nothing, or whitespace.
    case start
    case afterReasoning
    case afterCalls
    case middle
  }

  private let openers: [Opener]
  /// Whether a byte may begin an opener within text.
  private let mayOpen: [Bool]
  /// Whether line breaks before a marker are held back, as calls may follow them.
  private let holdsLineBreaks: Bool
  private let closes: [[UInt8]]
  private let reasoningOpens: [[UInt8]]
  private let endsReasoningAtCalls: Bool
  private let separatesReasoning: Bool

  private var sink = EventSink()
  private var mode = Mode.text
  private var place = Place.start
  /// Text and reasoning: bytes that may be whitespace before a marker and the beginning of one.
  private var pending: [UInt8] = []
  /// Reasoning: whether none of it has come yet.
  private var isAtReasoningStart = false
  private var machine: CallMachine?
  /// Calls: the bytes since the section's start or the last call's end, as long as no call is open.
  private var held: [UInt8] = []
  /// Calls: how many of `held` are the section's marker and whitespace before it.
  private var markerCount = 0
  private var harmony: HarmonyMachine?
  /// Bytes to be taken again, the next one last.
  private var again: [UInt8] = []

  /// A call must show itself as one within so many bytes.
  private static let heldLimit = 1 << 16
  /// Text that was taken for a call is searched for markers again if it is no longer than this.
  private static let searchedLimit = 4096
  private static let whitespaceLimit = 256

  /// Makes a parser for one answer.
  ///
  /// - Parameters:
  ///   - reasoning: how the chain of thought is marked; `nil` looks for none.
  ///   - calls: how tool calls are written; `nil` looks for none.
  ///   - tools: the tools offered.
  public init(
    reasoning: ReasoningFormat? = nil, calls: ToolCallFormat? = nil, tools: ToolDefinitions = ToolDefinitions(),
    options: Options = Options()
  ) {
    var openers = calls?.openers(tools) ?? []
    if let reasoning {
      openers += reasoning.opens.map { Opener($0, .reasoning, isAnchored: !reasoning.opensAnywhere) }
    }
    self.openers = openers
    var mayOpen = [Bool](repeating: false, count: 256)
    for opener in openers where !opener.isAnchored { mayOpen[Int(opener.marker[0])] = true }
    holdsLineBreaks = openers.contains { opener in
      if case .calls = opener.action { return !opener.isAnchored }
      return false
    }
    if holdsLineBreaks { mayOpen[0x0A] = true }
    self.mayOpen = mayOpen
    closes = reasoning?.closes.map { Array($0.utf8) } ?? []
    reasoningOpens = reasoning?.opens.map { Array($0.utf8) } ?? []
    endsReasoningAtCalls = reasoning?.endsAtToolCalls ?? false
    separatesReasoning = options.separatesReasoning
    sink.streamsReasoning = options.streamsReasoning
    sink.reasoningIsContent = !options.separatesReasoning
    if reasoning?.isHarmony == true || calls?.isHarmony == true {
      if reasoning == nil { sink.reasoningIsContent = true }
      harmony = HarmonyMachine(calls?.isHarmony == true ? tools : nil)
      mode = .harmony
    } else if let reasoning, options.beginsInReasoning ?? reasoning.beginsOpen {
      mode = .reasoning
      isAtReasoningStart = true
    } else if openers.isEmpty {
      place = .middle
    }
  }

  /// Takes more of the answer and returns what is certain.
  public mutating func feed(_ text: String) -> [ChatEvent] {
    var text = text
    return text.withUTF8 { feed($0) }
  }

  /// Takes more of the answer as UTF-8, whose characters may be cut anywhere.
  public mutating func feed(_ bytes: some Sequence<UInt8>) -> [ChatEvent] {
    for byte in bytes { take(byte) }
    return sink.take(isFinal: false)
  }

  /// Ends the answer and returns what was held back.
  ///
  /// Beginnings of markers and calls that have not shown themselves become content, an open call ends incomplete.
  public mutating func finish() -> [ChatEvent] {
    switch mode {
    case .text: finishText()
    case .reasoning:
      sink.reasoning(pending)
      pending = []
    case .calls: finishCalls()
    case .harmony: harmony!.finish(&sink)
    }
    return sink.take(isFinal: true)
  }

  /// Tool calls begun so far.
  public var callCount: Int { sink.callsBegun }

  private mutating func take(_ byte: UInt8) {
    var byte = byte
    while true {
      switch mode {
      case .text: takeText(byte)
      case .reasoning: takeReasoning(byte)
      case .calls: takeCall(byte)
      case .harmony: harmony!.consume(byte, &sink)
      }
      guard let next = again.popLast() else { return }
      byte = next
    }
  }

  private mutating func retake(_ bytes: some BidirectionalCollection<UInt8>) { again += bytes.reversed() }

  // MARK: Text

  private mutating func takeText(_ byte: UInt8) {
    if place == .middle, pending.isEmpty, !mayOpen[Int(byte)] {
      sink.content(byte)
      return
    }
    pending.append(byte)
    while !pending.isEmpty {
      // Whitespace that a marker after it would swallow: any at the start, line breaks within text.
      var lead = 0
      if place == .middle {
        if holdsLineBreaks { while lead < min(2, pending.count), pending[lead] == 0x0A { lead += 1 } }
      } else {
        while lead < pending.count, isWhitespace(pending[lead]) { lead += 1 }
      }
      if lead == pending.count {
        if lead <= Self.whitespaceLimit { return }
        leavePlace()
        continue
      }
      switch match(pending[lead...]) {
      case .partial: return
      case .full(let index):
        open(openers[index], lead)
        return
      case .none:
        if place == .middle { sink.content(pending.removeFirst()) } else { leavePlace() }
      }
    }
  }

  /// Text begins: gives out the whitespace before it.
  private mutating func leavePlace() {
    var space = pending.prefix(while: isWhitespace)
    pending.removeFirst(space.count)
    // The line breaks between reasoning and answer belong to the marks.
    if place == .afterReasoning, separatesReasoning { space = space.drop { $0 == 0x0A || $0 == 0x0D } }
    place = .middle
    sink.content(space)
  }

  private func match(_ bytes: ArraySlice<UInt8>) -> MarkerMatch {
    var isPartial = false
    for (index, opener) in openers.enumerated() {
      if opener.isAnchored, place == .middle { continue }
      if bytes.count > opener.marker.count || !opener.marker.starts(with: bytes) { continue }
      if bytes.count == opener.marker.count { return .full(index) }
      isPartial = true
    }
    return isPartial ? .partial : .none
  }

  private mutating func open(_ opener: Opener, _ lead: Int) {
    let taken = pending
    pending = []
    switch opener.action {
    case .ignored:
      // Whitespace before it waits for what comes next.
      retake(taken[..<lead])
    case .reasoning:
      mode = .reasoning
      isAtReasoningStart = true
      if !separatesReasoning { sink.content(taken) } else if place == .middle { sink.content(taken[..<lead]) }
    case .calls(let machine):
      mode = .calls
      self.machine = machine
      // The line breaks between reasoning and answer belong to the marks, should this turn out to be text.
      let dropped =
        place == .afterReasoning && separatesReasoning
        ? taken[..<lead].prefix { $0 == 0x0A || $0 == 0x0D }.count : 0
      markerCount = taken.count - dropped
      held = Array(taken[dropped...].dropLast(opener.replayed))
      retake(taken.suffix(opener.replayed))
    }
  }

  private mutating func finishText() {
    if place != .middle, pending.allSatisfy(isWhitespace) {
      // After reasoning and calls, whitespace at the end means nothing.
      if place == .start { sink.content(pending) }
    } else {
      if place != .middle { leavePlace() }
      sink.content(pending)
    }
    pending = []
  }

  // MARK: Reasoning

  private mutating func takeReasoning(_ byte: UInt8) {
    pending.append(byte)
    while !pending.isEmpty {
      if isAtReasoningStart {
        if separatesReasoning, isWhitespace(pending[0]) {
          pending.removeFirst()
          continue
        }
        // Models that begin within it may open it once more.
        if let open = reasoningOpens.first(where: { $0.starts(with: pending) }) {
          if open.count > pending.count { return }
          if !separatesReasoning { sink.content(pending) }
          pending = []
          return
        }
      }
      var lead = 0
      while lead < min(2, pending.count), pending[lead] == 0x0A { lead += 1 }
      if lead == pending.count { return }
      let rest = pending[lead...]
      if let close = closes.first(where: { $0.starts(with: rest) }) {
        if close.count > rest.count { return }
        endReasoning()
        return
      }
      if endsReasoningAtCalls {
        switch match(rest) {
        case .partial: return
        case .full(let index):
          if case .calls = openers[index].action {
            let taken = pending
            endReasoning(isClosed: false)
            retake(taken)
            return
          }
        case .none: break
        }
      }
      isAtReasoningStart = false
      sink.reasoning(pending.removeFirst())
    }
  }

  private mutating func endReasoning(isClosed: Bool = true) {
    if !separatesReasoning, isClosed { sink.content(pending) }
    pending = []
    mode = .text
    place = .afterReasoning
  }

  // MARK: Calls

  private mutating func takeCall(_ byte: UInt8) {
    let wasOpen = sink.isCallOpen
    let begun = sink.callsBegun
    if !wasOpen { held.append(byte) }
    let outcome = machine!.consume(byte, &sink)
    if wasOpen || sink.callsBegun > begun {
      // The bytes so far are a call's.
      held.removeAll(keepingCapacity: true)
      markerCount = 0
    }
    switch outcome {
    case .more:
      if held.count > Self.heldLimit { becomeText(isSearched: false) }
    case .done:
      held = []
      mode = .text
      place = .afterCalls
      machine = nil
    case .release, .reject:
      if wasOpen || sink.isCallOpen {
        let leftover = machine!.leftover
        if sink.isCallOpen { sink.endCall(isComplete: false) }
        mode = .text
        place = .middle
        machine = nil
        retake(leftover)
      } else {
        becomeText(isSearched: held.count <= Self.searchedLimit)
      }
    }
  }

  /// What is held is no call.
  private mutating func becomeText(isSearched: Bool) {
    let bytes = held
    held = []
    mode = .text
    machine = nil
    if !isSearched {
      place = .middle
      sink.content(bytes)
    } else if markerCount > 0 {
      // The marker itself is text, or it would be found again.
      let count = min(markerCount, bytes.count)
      place = .middle
      sink.content(bytes[..<count])
      retake(bytes[count...])
    } else {
      place = .afterCalls
      retake(bytes)
    }
    markerCount = 0
  }

  private mutating func finishCalls() {
    if sink.isCallOpen {
      machine!.flush(&sink)
      sink.endCall(isComplete: false)
    } else if markerCount > 0 || machine!.structure?.explains(held) != true {
      sink.content(held)
    }
    held = []
    machine = nil
    mode = .text
  }
}
