/// How a format writes calls as a name between markers and arguments in JSON.
struct NamedCallSyntax: Sendable {
  enum Style: Sendable {
    /// `<｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`, or, as the older models write it,
    /// `<｜tool▁call▁begin｜>function<｜tool▁sep｜>name`, a line break, and the arguments in a fenced block.
    case deepSeek
    /// `<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{…}<|tool_call_end|>`.
    case kimi
    /// `name[ARGS]{…}`, `name[CALL_ID]id[ARGS]{…}`, or an array of JSON objects.
    case mistral
  }

  var style: Style
  /// What begins a call within a section.
  var callOpen: String
  /// What ends the header.
  var separator: String
  /// What ends a call.
  var callClose: String
  /// What ends the section.
  var sectionClose: String

  static let deepSeek = NamedCallSyntax(
    style: .deepSeek, callOpen: "<｜tool▁call▁begin｜>", separator: "<｜tool▁sep｜>", callClose: "<｜tool▁call▁end｜>",
    sectionClose: "<｜tool▁calls▁end｜>")
  static let kimi = NamedCallSyntax(
    style: .kimi, callOpen: "<|tool_call_begin|>", separator: "<|tool_call_argument_begin|>",
    callClose: "<|tool_call_end|>", sectionClose: "<|tool_calls_section_end|>")
  static let mistral = NamedCallSyntax(
    style: .mistral, callOpen: "[TOOL_CALLS]", separator: "[ARGS]", callClose: "", sectionClose: "")
}

/// Reads calls whose name stands outside of the JSON.
struct NamedCallMachine: Sendable {
  private enum State {
    case between, header, afterSeparator, nameLine, fence, callID, argumentsLead, arguments, delegated, lead
  }

  let syntax: NamedCallSyntax
  private let betweenMarkers: MarkerSet
  private let headerMarkers: MarkerSet
  private let fenceMarkers = MarkerSet(["```json", "```"])
  private var state: State
  private var pending: [UInt8] = []
  private var header: [UInt8] = []
  private var callID: [UInt8] = []
  private var scanner = JSONScanner()
  private var scratch: [UInt8] = []
  private var array: JSONCallMachine
  private(set) var leftover: [UInt8] = []

  /// - Parameter isInCall: whether a call's own marker was read, rather than a section's.
  init(_ syntax: NamedCallSyntax, isInCall: Bool) {
    self.syntax = syntax
    betweenMarkers = MarkerSet(
      [syntax.callOpen, syntax.sectionClose, syntax.callClose] + (syntax.style == .deepSeek ? ["```"] : []))
    headerMarkers = MarkerSet([syntax.separator] + (syntax.style == .mistral ? ["[CALL_ID]"] : []))
    array = JSONCallMachine(JSONCallSyntax(allowsArray: true), ToolDefinitions())
    state = syntax.style == .mistral ? .lead : isInCall ? .header : .between
  }

  /// The markers that may stand between calls.
  var structure: MarkerSet { betweenMarkers }

  private static let headerLimit = 512

  mutating func consume(_ byte: UInt8, _ sink: inout EventSink) -> MachineOutcome {
    switch state {
    case .delegated:
      let outcome = array.consume(byte, &sink)
      leftover = array.leftover
      return outcome
    case .lead:
      if isWhitespace(byte) { return .more }
      if byte == UInt8(ascii: "[") || byte == UInt8(ascii: "{") {
        state = .delegated
        return array.consume(byte, &sink)
      }
      state = .header
      return consume(byte, &sink)
    case .between:
      if pending.isEmpty, isWhitespace(byte) { return .more }
      pending.append(byte)
      switch betweenMarkers.match(pending[...]) {
      case .none: return .release
      case .partial: return .more
      case .full(let index):
        pending = []
        if index == 1 { return .done }
        if index == 0 {
          header = []
          callID = []
          state = .header
        }
        return .more
      }
    case .header:
      pending.append(byte)
      while !pending.isEmpty {
        switch headerMarkers.match(pending[...]) {
        case .partial: return .more
        case .full(let index):
          pending = []
          state =
            index == 1 ? .callID : syntax.style == .deepSeek ? .afterSeparator : .argumentsLead
          return trimmedHeader.isEmpty ? .reject : .more
        case .none:
          let first = pending.removeFirst()
          if syntax.style == .mistral, first == UInt8(ascii: "{") {
            // The oldest of the newer models leave the separator out.
            state = .argumentsLead
            return trimmedHeader.isEmpty ? .reject : consume(first, &sink)
          }
          // Names hold no such bytes; with them this is text.
          if first == UInt8(ascii: "<") || first == UInt8(ascii: "{") || first == UInt8(ascii: "\n") { return .reject }
          header.append(first)
          if header.count > Self.headerLimit { return .reject }
        }
      }
      return .more
    case .afterSeparator:
      if isWhitespace(byte) { return .more }
      if byte == UInt8(ascii: "{") {
        state = .argumentsLead
      } else {
        header = []
        state = .nameLine
      }
      return consume(byte, &sink)
    case .nameLine:
      if byte == UInt8(ascii: "\n") || byte == UInt8(ascii: "{") || byte == UInt8(ascii: "`") {
        if trimmedHeader.isEmpty { return .reject }
        state = .fence
        return consume(byte, &sink)
      }
      header.append(byte)
      return header.count > Self.headerLimit ? .reject : .more
    case .fence:
      if pending.isEmpty {
        if isWhitespace(byte) { return .more }
        if byte == UInt8(ascii: "{") {
          state = .argumentsLead
          return consume(byte, &sink)
        }
      }
      pending.append(byte)
      // "```" is whole before "json" is there; what follows decides.
      let isFence = "```json".utf8.starts(with: pending)
      if !isFence {
        guard pending.count == 4, isWhitespace(byte) || byte == UInt8(ascii: "{") else { return .reject }
        pending = []
        state = .argumentsLead
        return consume(byte, &sink)
      }
      if pending.count == 7 {
        pending = []
        state = .argumentsLead
      }
      return .more
    case .callID:
      pending.append(byte)
      while !pending.isEmpty {
        switch headerMarkers.match(pending[...]) {
        case .partial: return .more
        case .full(let index):
          pending = []
          if index == 1 { return .reject }
          state = .argumentsLead
          return .more
        case .none:
          callID.append(pending.removeFirst())
          if callID.count > Self.headerLimit { return .reject }
        }
      }
      return .more
    case .argumentsLead:
      if pending.isEmpty {
        if isWhitespace(byte) { return .more }
        if byte == UInt8(ascii: "{") {
          begin(&sink)
          scanner = JSONScanner()
          state = .arguments
          return consume(byte, &sink)
        }
      }
      // A call without arguments.
      pending.append(byte)
      let close = syntax.callClose.utf8
      guard close.starts(with: pending) else { return .reject }
      if pending.count == close.count {
        pending = []
        begin(&sink)
        sink.arguments("{}".utf8)
        sink.endCall(isComplete: true)
        state = .between
      }
      return .more
    case .arguments:
      scratch.removeAll(keepingCapacity: true)
      let step = scanner.consume(byte, &scratch)
      switch step {
      case .failed, .doneBefore:
        leftover = [byte]
        return .reject
      case .more, .done:
        sink.arguments(scratch)
        if step == .more { return .more }
        sink.endCall(isComplete: true)
        state = .between
        return syntax.style == .mistral ? .done : .more
      }
    }
  }

  private var trimmedHeader: ArraySlice<UInt8> {
    let start = header.drop(while: isWhitespace)
    return start[..<(start.lastIndex { !isWhitespace($0) }.map { $0 + 1 } ?? start.startIndex)]
  }

  private func begin(_ sink: inout EventSink) {
    var name = String(decoding: trimmedHeader, as: UTF8.self)
    var id = callID.isEmpty ? nil : String(decoding: callID, as: UTF8.self)
    if syntax.style == .kimi {
      id = name
      if let colon = name.lastIndex(of: ":"), name[colon...].dropFirst().allSatisfy(\.isNumber) {
        name = String(name[..<colon])
      }
      if name.hasPrefix("functions.") { name = String(name.dropFirst("functions.".count)) }
    }
    sink.beginCall(name, id: id)
  }
}
