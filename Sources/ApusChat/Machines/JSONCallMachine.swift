import ApusCore

/// How a format wraps calls that are JSON objects.
struct JSONCallSyntax: Sendable {
  /// What follows the calls, if anything does.
  var close: [UInt8]?
  /// Whether the calls may stand in an array.
  var allowsArray = false
  /// Whether calls must name a tool that was offered: formats without a marker need that to tell calls from text.
  var needsKnownTool = false

  init(close: String? = nil, allowsArray: Bool = false, needsKnownTool: Bool = false) {
    self.close = close.map { Array($0.utf8) }
    self.allowsArray = allowsArray
    self.needsKnownTool = needsKnownTool
  }
}

/// Reads `{"name": …, "arguments": {…}}`, one or several, in an array or one after another.
struct JSONCallMachine: Sendable {
  private enum State { case lead, element, object, after, closing }

  let syntax: JSONCallSyntax
  private var state = State.lead
  private var isInArray = false
  private var object: CallObject
  private var closing: [UInt8] = []
  /// Bytes of a call that went astray which are to be text.
  var leftover: [UInt8] { object.leftover }

  init(_ syntax: JSONCallSyntax, _ tools: ToolDefinitions) {
    self.syntax = syntax
    object = CallObject(tools: syntax.needsKnownTool ? tools : nil)
  }

  mutating func consume(_ byte: UInt8, _ sink: inout EventSink) -> MachineOutcome {
    switch state {
    case .lead:
      if isWhitespace(byte) { return .more }
      if byte == UInt8(ascii: "["), syntax.allowsArray {
        isInArray = true
        state = .element
        return .more
      }
      return beginObject(byte, &sink) ?? .reject
    case .element:
      if isWhitespace(byte) || byte == UInt8(ascii: ",") { return .more }
      if byte == UInt8(ascii: "]") {
        isInArray = false
        state = .closing
        return syntax.close == nil ? .done : .more
      }
      return beginObject(byte, &sink) ?? .reject
    case .object:
      switch object.consume(byte, &sink) {
      case .more: return .more
      case .failed: return .reject
      case .done:
        state = isInArray ? .element : .after
        return .more
      }
    case .after, .closing:
      if closing.isEmpty {
        if isWhitespace(byte) { return .more }
        if state == .after {
          if byte == UInt8(ascii: ",") || byte == UInt8(ascii: ";") { return .more }
          if let outcome = beginObject(byte, &sink) { return outcome }
        }
      }
      closing.append(byte)
      guard let close = syntax.close, close.starts(with: closing) else { return .release }
      return closing.count == close.count ? .done : .more
    }
  }

  /// Begins a call; `nil` if the byte begins none.
  private mutating func beginObject(_ byte: UInt8, _ sink: inout EventSink) -> MachineOutcome? {
    if byte != UInt8(ascii: "{") { return nil }
    object.reset()
    state = .object
    _ = object.consume(byte, &sink)
    return .more
  }
}

/// Reads one call: a JSON object with the tool's name and its arguments, in any order and among other members.
struct CallObject: Sendable {
  enum Step { case more, done, failed }
  private enum State { case start, keyOrEnd, key, colon, valueStart, value, commaOrEnd }
  private enum Member { case name, id, arguments, other }

  static let nameKeys = ["name", "tool_name"]
  static let argumentKeys = ["arguments", "parameters"]
  static let idKeys = ["id", "tool_call_id"]

  /// The tools of which the call must name one; `nil` takes every name.
  let tools: ToolDefinitions?
  private var state = State.start
  private var member = Member.other
  private var scanner = JSONScanner()
  /// Whether the value being read is passed on, rather than kept.
  private var isStreaming = false
  private var kept: [UInt8] = []
  private var scratch: [UInt8] = []
  private var name: String?
  private var id: String?
  private var arguments: [UInt8]?
  private(set) var leftover: [UInt8] = []

  init(tools: ToolDefinitions?) { self.tools = tools }

  mutating func reset() { self = CallObject(tools: tools) }

  mutating func consume(_ byte: UInt8, _ sink: inout EventSink) -> Step {
    let step = advance(byte, &sink)
    if step == .failed { leftover = [byte] }
    return step
  }

  private mutating func advance(_ byte: UInt8, _ sink: inout EventSink) -> Step {
    switch state {
    case .value: return value(byte, &sink)
    case .key:
      switch scanner.consume(byte, &kept) {
      case .more: return .more
      case .done:
        guard let key = decoded(kept) else { return .failed }
        member =
          Self.nameKeys.contains(key)
          ? .name : Self.argumentKeys.contains(key) ? .arguments : Self.idKeys.contains(key) ? .id : .other
        state = .colon
        return .more
      case .doneBefore, .failed: return .failed
      }
    case .start, .keyOrEnd, .colon, .valueStart, .commaOrEnd: break
    }
    if isWhitespace(byte) { return .more }
    switch (state, byte) {
    case (.start, UInt8(ascii: "{")): state = .keyOrEnd
    case (.keyOrEnd, UInt8(ascii: "\"")):
      beginScan()
      _ = scanner.consume(byte, &kept)
      state = .key
    case (.keyOrEnd, UInt8(ascii: "}")), (.commaOrEnd, UInt8(ascii: "}")): return end(&sink)
    case (.colon, UInt8(ascii: ":")): state = .valueStart
    case (.commaOrEnd, UInt8(ascii: ",")): state = .keyOrEnd
    case (.valueStart, _):
      beginScan()
      state = .value
      // Arguments that are an object are passed on as they come, once the name is known; others are short.
      isStreaming = member == .arguments && byte == UInt8(ascii: "{") && name != nil && !sink.isCallOpen
      if isStreaming, !begin(&sink) { return .failed }
      return value(byte, &sink)
    default: return .failed
    }
    return .more
  }

  private mutating func beginScan() {
    scanner = JSONScanner()
    kept.removeAll(keepingCapacity: true)
    isStreaming = false
  }

  private mutating func value(_ byte: UInt8, _ sink: inout EventSink) -> Step {
    scratch.removeAll(keepingCapacity: true)
    let step = scanner.consume(byte, &scratch)
    if step == .failed { return .failed }
    if isStreaming {
      sink.arguments(scratch)
    } else if member != .other {
      kept += scratch
      // What comes after the call has begun is kept for nothing; before, the section's limit holds.
      if sink.isCallOpen { kept.removeAll(keepingCapacity: true) }
    }
    switch step {
    case .more, .failed: return .more
    case .done, .doneBefore:
      state = .commaOrEnd
      if !isStreaming, !sink.isCallOpen, !keep(&sink) { return .failed }
      return step == .doneBefore ? advance(byte, &sink) : .more
    }
  }

  /// Takes a member's whole value.
  private mutating func keep(_ sink: inout EventSink) -> Bool {
    switch member {
    case .name:
      guard let text = decoded(kept), !text.isEmpty else { return false }
      name = text
      // Arguments that came before the name.
      return arguments == nil || begin(&sink)
    case .id: if let text = decoded(kept), !text.isEmpty { id = text }
    case .arguments:
      if kept.elementsEqual("null".utf8) {
        arguments = Array("{}".utf8)
      } else if let text = decoded(kept), let value = try? JSONValue.parse(text), value.objectValue != nil {
        // JSON within a string, as the API itself carries arguments.
        arguments = Array(text.utf8)
      } else {
        arguments = kept
      }
      return name == nil || begin(&sink)
    case .other: break
    }
    return true
  }

  private func decoded(_ json: [UInt8]) -> String? {
    guard json.first == UInt8(ascii: "\"") else { return nil }
    return (try? JSONValue.parse(json))?.stringValue
  }

  /// Begins the call, if it is one.
  private mutating func begin(_ sink: inout EventSink) -> Bool {
    guard let name, tools == nil || tools?[name] != nil else { return false }
    sink.beginCall(name, id: id)
    if let arguments { sink.arguments(arguments) }
    return true
  }

  private mutating func end(_ sink: inout EventSink) -> Step {
    if !sink.isCallOpen {
      // A call without arguments; where calls look like any other object, that is none.
      if name == nil || tools != nil { return .failed }
      arguments = Array("{}".utf8)
      _ = begin(&sink)
    }
    sink.endCall(isComplete: true)
    return .done
  }
}
