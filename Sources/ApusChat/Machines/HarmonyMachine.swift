/// Reads gpt-oss answers: messages with a header that names a channel and, for tool calls, a recipient.
///
/// `<|channel|>analysis<|message|>…<|end|>` is reasoning, `final` is content, `commentary` is content unless it is addressed
/// to `functions.name`, which makes it a tool call. Messages to tools of the model's own, such as `browser.search`, are
/// counted as reasoning. The beginning of the answer continues the header that the prompt opened.
struct HarmonyMachine: Sendable {
  private enum State {
    case header
    /// A message's text, passed on as it is.
    case content, reasoning
    /// Before the arguments of a call, in them, and after them.
    case argumentsLead, arguments, afterArguments
    /// Between two messages.
    case between
  }

  private static let headerMarkers = MarkerSet(["<|message|>"])
  private static let headerStarts = MarkerSet([
    "<|channel|>", "<|start|>", "<|message|>", "<|constrain|>", " to=", "to=",
  ])
  private static let bodyMarkers = MarkerSet(["<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>"])
  private static let headerLimit = 1024

  private let tools: ToolDefinitions?
  private var state = State.header
  /// Whether the header has shown itself to be one.
  private var isCertain = false
  private var header: [UInt8] = []
  private var pending: [UInt8] = []
  private var name = ""
  private var scanner = JSONScanner()
  private var scratch: [UInt8] = []

  /// - Parameter tools: the tools offered; `nil` if calls are to stay text.
  init(_ tools: ToolDefinitions?) { self.tools = tools }

  mutating func consume(_ byte: UInt8, _ sink: inout EventSink) {
    switch state {
    case .header, .between:
      if state == .between {
        if isWhitespace(byte) { return }
        header = []
        isCertain = false
        state = .header
      }
      header.append(byte)
      if !isCertain {
        switch Self.headerStarts.match(header[...]) {
        case .none: plain(&sink)
        case .full: isCertain = true
        case .partial: break
        }
      }
      if isCertain {
        if header.count > Self.headerLimit {
          plain(&sink)
        } else if header.ends(with: Self.headerMarkers.markers[0]) {
          begin(&sink)
        }
      }
    case .content, .reasoning, .argumentsLead, .arguments, .afterArguments:
      pending.append(byte)
      body(&sink)
    }
  }

  /// Ends the answer. The stop tokens that end messages are not part of its text.
  mutating func finish(_ sink: inout EventSink) {
    switch state {
    case .header where !isCertain: sink.content(header)
    case .header, .between: break
    default:
      let held = pending
      pending = []
      for byte in held { take(byte, &sink) }
      if sink.isCallOpen { sink.endCall(isComplete: false) }
      if state == .argumentsLead { empty(&sink) }
    }
    state = .between
  }

  /// What was taken for a header is text.
  private mutating func plain(_ sink: inout EventSink) {
    state = .content
    pending = header
    header = []
    body(&sink)
  }

  private mutating func begin(_ sink: inout EventSink) {
    let fields = HarmonyHeader(header.dropLast("<|message|>".utf8.count))
    header = []
    pending = []
    if let recipient = fields.recipient, recipient != "assistant", recipient != "user" {
      let bare = recipient.hasPrefix("functions.") ? String(recipient.dropFirst("functions.".count)) : recipient
      if let tools, recipient.hasPrefix("functions.") || tools[recipient] != nil, !bare.isEmpty {
        name = bare
        state = .argumentsLead
        return
      }
      state = recipient.hasPrefix("functions.") ? .content : .reasoning
      return
    }
    state = fields.channel == "analysis" ? .reasoning : .content
  }

  private mutating func body(_ sink: inout EventSink) {
    while !pending.isEmpty {
      switch Self.bodyMarkers.match(pending[...]) {
      case .partial: return
      case .full(let index):
        let marker = pending
        pending = []
        end(&sink)
        state = .between
        if index >= 3 {
          // The next message begins without the end of this one.
          header = marker
          isCertain = true
          state = .header
        }
      case .none: take(pending.removeFirst(), &sink)
      }
    }
  }

  /// Takes a byte of a message's text.
  private mutating func take(_ byte: UInt8, _ sink: inout EventSink) {
    switch state {
    case .reasoning: sink.reasoning(byte)
    case .argumentsLead:
      if isWhitespace(byte) { return }
      if byte != UInt8(ascii: "{") {
        state = .content
        sink.content(byte)
        return
      }
      sink.beginCall(name)
      scanner = JSONScanner()
      state = .arguments
      take(byte, &sink)
    case .arguments:
      scratch.removeAll(keepingCapacity: true)
      let step = scanner.consume(byte, &scratch)
      switch step {
      case .more: sink.arguments(scratch)
      case .done:
        sink.arguments(scratch)
        sink.endCall(isComplete: true)
        state = .afterArguments
      case .doneBefore, .failed:
        sink.endCall(isComplete: false)
        state = .content
        sink.content(byte)
      }
    case .afterArguments:
      if isWhitespace(byte) { return }
      state = .content
      sink.content(byte)
    case .content, .header, .between: sink.content(byte)
    }
  }

  /// Ends a message.
  private mutating func end(_ sink: inout EventSink) {
    if sink.isCallOpen { sink.endCall(isComplete: false) }
    if state == .argumentsLead { empty(&sink) }
  }

  private func empty(_ sink: inout EventSink) {
    sink.beginCall(name)
    sink.arguments("{}".utf8)
    sink.endCall(isComplete: true)
  }
}

/// The header of a harmony message: `<|start|>assistant to=functions.f<|channel|>commentary json`, in any order.
private struct HarmonyHeader {
  var channel: String?
  var recipient: String?

  init(_ bytes: ArraySlice<UInt8>) {
    let text = Array(bytes)
    func word(after marker: String) -> String? {
      guard let range = text.firstRange(of: Array(marker.utf8)) else { return nil }
      let word = text[range.upperBound...].drop(while: isWhitespace).prefix {
        !isWhitespace($0) && $0 != UInt8(ascii: "<")
      }
      return word.isEmpty ? nil : String(decoding: word, as: UTF8.self)
    }
    channel = word(after: "<|channel|>")
    recipient = word(after: "to=")
  }
}

extension [UInt8] {
  fileprivate func ends(with suffix: [UInt8]) -> Bool {
    count >= suffix.count && self[(count - suffix.count)...] == suffix[...]
  }
}
