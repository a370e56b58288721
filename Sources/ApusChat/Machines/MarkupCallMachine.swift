/// How a format writes calls as elements with one element per argument.
struct MarkupCallSyntax: Sendable {
  enum Head: Sendable {
    /// The text up to `>`, as in `<function=name>`.
    case bare
    /// Attributes up to `>`, as in `<invoke name="name">`.
    case attributes
    /// GLM: the name is the text between the section's marker and the first argument or line break; each argument is a key
    /// element and a value element.
    case elements
  }

  var head: Head
  /// What begins a call; empty if the section's marker does.
  var callOpen = ""
  var parameterOpen: String
  /// What ends the key, with `elements`.
  var keyClose = ""
  /// What begins the value, with `elements`.
  var valueOpen = ""
  var parameterClose: String
  var callClose: String
  /// What ends the section; empty if a call's end does.
  var sectionClose = ""
  /// What may stand between calls without meaning.
  var noise: [String] = []
  /// Whether a line break after a value's beginning and one before its end do not belong to it.
  var trimsNewlines = false

  static let qwenCoder = MarkupCallSyntax(
    head: .bare, callOpen: "<function=", parameterOpen: "<parameter=", parameterClose: "</parameter>",
    callClose: "</function>", sectionClose: "</tool_call>", trimsNewlines: true)
  static let glm = MarkupCallSyntax(
    head: .elements, parameterOpen: "<arg_key>", keyClose: "</arg_key>", valueOpen: "<arg_value>",
    parameterClose: "</arg_value>", callClose: "</tool_call>")
  static let miniMax = MarkupCallSyntax(
    head: .attributes, callOpen: "<invoke ", parameterOpen: "<parameter ", parameterClose: "</parameter>",
    callClose: "</invoke>", sectionClose: "</minimax:tool_call>")
  static let step = MarkupCallSyntax(
    head: .attributes, callOpen: "<steptml:invoke ", parameterOpen: "<steptml:parameter ",
    parameterClose: "</steptml:parameter>", callClose: "</steptml:invoke>", sectionClose: "<｜tool_calls_end｜>",
    noise: ["<｜tool_call_begin｜>", "function<｜tool_sep｜>", "<｜tool_call_end｜>"], trimsNewlines: true)
  /// - Parameter section: the name of the element around the calls.
  static func deepSeek(_ section: String) -> MarkupCallSyntax {
    MarkupCallSyntax(
      head: .attributes, callOpen: "<｜DSML｜invoke ", parameterOpen: "<｜DSML｜parameter ",
      parameterClose: "</｜DSML｜parameter>", callClose: "</｜DSML｜invoke>", sectionClose: "</｜DSML｜\(section)>")
  }
}

/// Reads calls whose arguments are elements, and writes the arguments as JSON.
struct MarkupCallMachine: Sendable {
  private enum State { case between, name, inCall, key, valueOpen, value }
  private enum Value {
    /// A string, passed on as it comes.
    case string
    /// Kept until its end, since only then its kind is known.
    case kept(ValueKinds)
  }

  let syntax: MarkupCallSyntax
  private let tools: ToolDefinitions
  private let betweenMarkers: MarkerSet
  private let callMarkers: MarkerSet
  private let nameMarkers: MarkerSet
  private let keyClose: MarkerSet
  private let valueOpen: MarkerSet
  private let valueClose: [UInt8]
  private var state: State
  private var pending: [UInt8] = []
  private var head: [UInt8] = []
  private var name = ""
  private var hasArguments = false
  private var value = Value.string
  private var kept: [UInt8] = []
  private var isAtValueStart = false
  private(set) var leftover: [UInt8] = []

  private static let headLimit = 512
  private static let keptLimit = 1 << 18

  /// - Parameter isInCall: whether a call's own marker was read, rather than a section's.
  init(_ syntax: MarkupCallSyntax, _ tools: ToolDefinitions, isInCall: Bool) {
    self.syntax = syntax
    self.tools = tools
    betweenMarkers = MarkerSet([syntax.callOpen, syntax.sectionClose] + syntax.noise)
    callMarkers = MarkerSet([syntax.parameterOpen, syntax.callClose])
    nameMarkers = MarkerSet([syntax.parameterOpen, syntax.callClose])
    keyClose = MarkerSet([syntax.keyClose])
    valueOpen = MarkerSet([syntax.valueOpen])
    valueClose = Array(syntax.parameterClose.utf8)
    state = isInCall || syntax.callOpen.isEmpty ? .name : .between
  }

  /// The markers that may stand between calls.
  var structure: MarkerSet { betweenMarkers }

  mutating func consume(_ byte: UInt8, _ sink: inout EventSink) -> MachineOutcome {
    switch state {
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
          head = []
          state = .name
        }
        return .more
      }
    case .name: return syntax.head == .elements ? nameLine(byte, &sink) : nameTag(byte, &sink)
    case .inCall:
      if pending.isEmpty, isWhitespace(byte) { return .more }
      pending.append(byte)
      switch callMarkers.match(pending[...]) {
      case .none: return stray()
      case .partial: return .more
      case .full(0):
        pending = []
        head = []
        state = .key
        return .more
      case .full: return endCall(&sink)
      }
    case .key:
      if syntax.head == .elements { return key(byte, &sink) }
      if byte == UInt8(ascii: ">") {
        guard let key = Self.identifier(head, syntax.head) else { return stray(byte) }
        beginArgument(key, Self.attribute("string", head), &sink)
        return .more
      }
      head.append(byte)
      return head.count > Self.headLimit || byte == UInt8(ascii: "\n") ? stray() : .more
    case .valueOpen:
      if pending.isEmpty, isWhitespace(byte) { return .more }
      pending.append(byte)
      switch valueOpen.match(pending[...]) {
      case .none: return stray()
      case .partial: return .more
      case .full:
        pending = []
        beginArgument(String(decoding: head, as: UTF8.self), nil, &sink)
        return .more
      }
    case .value:
      pending.append(byte)
      takeValue(&sink)
      return .more
    }
  }

  /// Gives out what was kept of a value when the answer breaks off.
  mutating func flush(_ sink: inout EventSink) {
    guard state == .value else { return }
    for byte in pending { append(byte, &sink) }
    pending = []
    if case .kept(let kinds) = value { sink.arguments(typedJSON(kept, kinds)) }
  }

  /// Gives up on the call: the bytes that did not fit are text.
  private mutating func stray(_ byte: UInt8? = nil) -> MachineOutcome {
    leftover = pending.isEmpty ? byte.map { [$0] } ?? [] : pending
    return .reject
  }

  // MARK: Names

  private mutating func nameTag(_ byte: UInt8, _ sink: inout EventSink) -> MachineOutcome {
    if byte == UInt8(ascii: ">") {
      guard let name = Self.identifier(head, syntax.head) else { return .reject }
      beginCall(name, &sink)
      return .more
    }
    head.append(byte)
    return head.count > Self.headLimit || byte == UInt8(ascii: "\n") ? .reject : .more
  }

  private mutating func nameLine(_ byte: UInt8, _ sink: inout EventSink) -> MachineOutcome {
    if pending.isEmpty {
      if isWhitespace(byte) {
        if head.isEmpty { return .more }
        if byte != UInt8(ascii: "\n") { return .reject }
        beginCall(String(decoding: head, as: UTF8.self), &sink)
        return .more
      }
      // What looks like JSON belongs to another format.
      if byte == UInt8(ascii: "{") || byte == UInt8(ascii: "\"") { return .reject }
    }
    pending.append(byte)
    while !pending.isEmpty {
      switch nameMarkers.match(pending[...]) {
      case .partial: return .more
      case .full(let index):
        if head.isEmpty { return .reject }
        pending = []
        beginCall(String(decoding: head, as: UTF8.self), &sink)
        if index == 1 { return endCall(&sink) }
        head = []
        state = .key
      case .none:
        let first = pending.removeFirst()
        if first == UInt8(ascii: "<") { return .reject }
        head.append(first)
        if head.count > Self.headLimit { return .reject }
      }
    }
    return .more
  }

  private mutating func beginCall(_ name: String, _ sink: inout EventSink) {
    self.name = name
    hasArguments = false
    sink.beginCall(name)
    state = .inCall
  }

  private mutating func endCall(_ sink: inout EventSink) -> MachineOutcome {
    pending = []
    sink.arguments((hasArguments ? "}" : "{}").utf8)
    sink.endCall(isComplete: true)
    if syntax.sectionClose.isEmpty { return .done }
    state = .between
    return .more
  }

  // MARK: Arguments

  private mutating func key(_ byte: UInt8, _ sink: inout EventSink) -> MachineOutcome {
    pending.append(byte)
    while !pending.isEmpty {
      switch keyClose.match(pending[...]) {
      case .partial: return .more
      case .full:
        pending = []
        state = .valueOpen
      case .none:
        head.append(pending.removeFirst())
        if head.count > Self.headLimit { return stray() }
      }
    }
    return .more
  }

  /// - Parameter string: what the format itself says of the value being a string.
  private mutating func beginArgument(_ key: String, _ string: String?, _ sink: inout EventSink) {
    sink.arguments((hasArguments ? ", " : "{").utf8)
    sink.arguments(quoted(key.utf8))
    sink.arguments(": ".utf8)
    hasArguments = true
    var kinds = tools.kinds(of: key, in: name)
    if string == "true" { kinds = .string }
    if string == "false", kinds == .string { kinds = .any }
    if kinds == .string {
      value = .string
      sink.arguments(UInt8(ascii: "\""))
    } else {
      value = .kept(kinds)
      kept.removeAll(keepingCapacity: true)
    }
    isAtValueStart = true
    state = .value
  }

  /// Takes what is certain of a value, and holds what may be its end.
  private mutating func takeValue(_ sink: inout EventSink) {
    while !pending.isEmpty {
      if isAtValueStart {
        isAtValueStart = false
        if syntax.trimsNewlines, pending[0] == UInt8(ascii: "\n") {
          pending.removeFirst()
          continue
        }
      }
      var rest = pending[...]
      if syntax.trimsNewlines, rest.first == UInt8(ascii: "\n") { rest = rest.dropFirst() }
      if valueClose.starts(with: rest) {
        if rest.count == valueClose.count {
          pending = []
          endArgument(&sink)
        }
        return
      }
      append(pending.removeFirst(), &sink)
    }
  }

  private mutating func append(_ byte: UInt8, _ sink: inout EventSink) {
    switch value {
    case .string:
      var escaped: [UInt8] = []
      appendEscaped(byte, to: &escaped)
      sink.arguments(escaped)
    case .kept:
      kept.append(byte)
      if kept.count > Self.keptLimit {
        // Too long to be kept: a string, which needs no keeping.
        var text = quoted(kept)
        text.removeLast()
        sink.arguments(text)
        kept = []
        value = .string
      }
    }
  }

  private mutating func endArgument(_ sink: inout EventSink) {
    switch value {
    case .string: sink.arguments(UInt8(ascii: "\""))
    case .kept(let kinds): sink.arguments(typedJSON(kept, kinds))
    }
    kept.removeAll(keepingCapacity: true)
    state = .inCall
  }

  // MARK: Tags

  private static func identifier(_ head: [UInt8], _ style: MarkupCallSyntax.Head) -> String? {
    if style == .attributes { return attribute("name", head) }
    var name = String(decoding: head, as: UTF8.self)
    // Some quantised models write the name in quotes.
    if name.count > 2, name.hasPrefix("\""), name.hasSuffix("\"") { name = String(name.dropFirst().dropLast()) }
    return name.isEmpty ? nil : name
  }

  /// The value of an attribute in `name="value" other='value'`.
  static func attribute(_ attribute: String, _ head: [UInt8]) -> String? {
    var rest = head[...]
    while true {
      rest = rest.drop(while: isWhitespace)
      let key = rest.prefix { $0 != UInt8(ascii: "=") && !isWhitespace($0) }
      rest = rest.dropFirst(key.count).drop(while: isWhitespace)
      guard !key.isEmpty, rest.first == UInt8(ascii: "=") else { return nil }
      rest = rest.dropFirst().drop(while: isWhitespace)
      let value: ArraySlice<UInt8>
      if let quote = rest.first, quote == UInt8(ascii: "\"") || quote == UInt8(ascii: "'") {
        value = rest.dropFirst().prefix { $0 != quote }
        rest = rest.dropFirst(value.count + 2)
      } else {
        value = rest.prefix { !isWhitespace($0) }
        rest = rest.dropFirst(value.count)
      }
      if key.elementsEqual(attribute.utf8) { return value.isEmpty ? nil : String(decoding: value, as: UTF8.self) }
    }
  }
}
