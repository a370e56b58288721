/// Reads a list of Python calls with keyword arguments, `[name(key=value, …), …]`, and writes the arguments as JSON.
///
/// It is entered after `[name(`, where `name` is a tool that was offered, and begins the call when an argument, or the end
/// of the call and what follows it, show that it is one.
struct PythonicCallMachine: Sendable {
  private enum State { case argument, identifier, afterIdentifier, value, afterValue, afterCall, name }

  private let tools: ToolDefinitions
  private var state = State.argument
  private var name: String
  private var identifier: [UInt8] = []
  /// Whitespace after the identifier.
  private var gap: [UInt8] = []
  private var literal = PythonLiteral()
  private var scratch: [UInt8] = []
  private var position = 0
  /// Whether the call has ended and only what follows tells whether it was one.
  private var isDoubtful = false
  private(set) var leftover: [UInt8] = []

  init(_ tools: ToolDefinitions, name: String) {
    self.tools = tools
    self.name = name
  }

  private static let identifierLimit = 256

  mutating func consume(_ byte: UInt8, _ sink: inout EventSink) -> MachineOutcome {
    let outcome = advance(byte, &sink)
    // A word that was read and not passed on belongs to what did not fit, too.
    if outcome == .reject {
      switch state {
      case .identifier, .afterIdentifier: leftover = identifier + gap + [byte]
      case .value: leftover = literal.unwritten + [byte]
      default: leftover = [byte]
      }
    }
    return outcome
  }

  private mutating func advance(_ byte: UInt8, _ sink: inout EventSink) -> MachineOutcome {
    switch state {
    case .argument:
      if isWhitespace(byte) { return .more }
      if byte == UInt8(ascii: ")") {
        // Without an argument this may still be prose about a function.
        if sink.isCallOpen { end(&sink) } else { isDoubtful = true }
        state = .afterCall
        return .more
      }
      if isIdentifier(byte), !(UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte) {
        identifier = [byte]
        gap = []
        state = .identifier
        return .more
      }
      return beginPositional(&sink) ? value(byte, &sink) : .reject
    case .identifier:
      if isIdentifier(byte) {
        identifier.append(byte)
        return identifier.count > Self.identifierLimit ? .reject : .more
      }
      if byte == UInt8(ascii: "=") {
        begin(String(decoding: identifier, as: UTF8.self), &sink)
        return .more
      }
      if isWhitespace(byte) {
        gap = [byte]
        state = .afterIdentifier
        return .more
      }
      // A word that is a value: True, None, or the prefix of a string.
      guard beginPositional(&sink) else { return .reject }
      for previous in identifier { _ = literal.consume(previous, &scratch) }
      return value(byte, &sink)
    case .afterIdentifier:
      if isWhitespace(byte) {
        gap.append(byte)
        return gap.count > Self.identifierLimit ? .reject : .more
      }
      guard byte == UInt8(ascii: "=") else { return .reject }
      begin(String(decoding: identifier, as: UTF8.self), &sink)
      return .more
    case .value: return value(byte, &sink)
    case .afterValue:
      if isWhitespace(byte) { return .more }
      if byte == UInt8(ascii: ",") {
        state = .argument
        return .more
      }
      guard byte == UInt8(ascii: ")") else { return .reject }
      end(&sink)
      state = .afterCall
      return .more
    case .afterCall:
      if isWhitespace(byte) { return .more }
      guard byte == UInt8(ascii: ",") || byte == UInt8(ascii: "]") else { return .reject }
      if isDoubtful {
        isDoubtful = false
        sink.beginCall(name)
        end(&sink)
      }
      if byte == UInt8(ascii: "]") { return .done }
      identifier = []
      state = .name
      return .more
    case .name:
      if identifier.isEmpty {
        if isWhitespace(byte) { return .more }
        if byte == UInt8(ascii: "]") { return .done }
      }
      if byte == UInt8(ascii: "(") {
        name = String(decoding: identifier, as: UTF8.self)
        guard tools[name] != nil else { return .reject }
        position = 0
        state = .argument
        return .more
      }
      guard isIdentifier(byte) || byte == UInt8(ascii: ".") || byte == UInt8(ascii: "-") else { return .reject }
      identifier.append(byte)
      return identifier.count > Self.identifierLimit ? .reject : .more
    }
  }

  private mutating func begin(_ key: String, _ sink: inout EventSink) {
    if !sink.isCallOpen { sink.beginCall(name) }
    sink.arguments((position == 0 ? "{" : ", ").utf8)
    sink.arguments(quoted(key.utf8))
    sink.arguments(": ".utf8)
    position += 1
    literal = PythonLiteral()
    scratch.removeAll(keepingCapacity: true)
    state = .value
  }

  /// An argument without a name takes the name that the schema declares at its place.
  private mutating func beginPositional(_ sink: inout EventSink) -> Bool {
    guard let key = tools.parameter(at: position, in: name) else { return false }
    begin(key, &sink)
    return true
  }

  private mutating func value(_ byte: UInt8, _ sink: inout EventSink) -> MachineOutcome {
    let step = literal.consume(byte, &scratch)
    sink.arguments(scratch)
    scratch.removeAll(keepingCapacity: true)
    switch step {
    case .more: return .more
    case .done:
      state = .afterValue
      return .more
    case .doneBefore:
      state = .afterValue
      return advance(byte, &sink)
    case .failed: return .reject
    }
  }

  private mutating func end(_ sink: inout EventSink) {
    sink.arguments((position == 0 ? "{}" : "}").utf8)
    sink.endCall(isComplete: true)
  }
}
