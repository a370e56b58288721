/// The machine that reads a section of tool calls; one of the kinds.
struct CallMachine: Sendable {
  private var json: JSONCallMachine?
  private var named: NamedCallMachine?
  private var markup: MarkupCallMachine?
  private var pythonic: PythonicCallMachine?

  init(_ machine: JSONCallMachine) { json = machine }
  init(_ machine: NamedCallMachine) { named = machine }
  init(_ machine: MarkupCallMachine) { markup = machine }
  init(_ machine: PythonicCallMachine) { pythonic = machine }

  mutating func consume(_ byte: UInt8, _ sink: inout EventSink) -> MachineOutcome {
    if json != nil { return json!.consume(byte, &sink) }
    if named != nil { return named!.consume(byte, &sink) }
    if markup != nil { return markup!.consume(byte, &sink) }
    return pythonic!.consume(byte, &sink)
  }

  /// Gives out what was held of an argument when the answer breaks off.
  mutating func flush(_ sink: inout EventSink) { markup?.flush(&sink) }

  /// The bytes of a call gone astray that are text again.
  var leftover: [UInt8] {
    json?.leftover ?? named?.leftover ?? markup?.leftover ?? pythonic!.leftover
  }

  /// Markers that may follow a call, so that they are no text where an answer breaks off within them.
  var structure: MarkerSet? {
    json.map { MarkerSet([$0.syntax.close.map { String(decoding: $0, as: UTF8.self) } ?? "", "]", ",", ";"]) }
      ?? named?.structure ?? markup?.structure ?? MarkerSet(["]", ","])
  }
}

/// A text that ends plain content and begins something else.
struct Opener: Sendable {
  enum Action: Sendable {
    case reasoning
    /// The marker means nothing to readers.
    case ignored
    case calls(CallMachine)
  }

  var marker: [UInt8]
  var action: Action
  /// Whether the marker counts only where nothing but whitespace, reasoning or calls came before.
  var isAnchored = false
  /// How many bytes at the marker's end the machine is to read itself.
  var replayed = 0

  init(_ marker: String, _ action: Action, isAnchored: Bool = false, replayed: Int = 0) {
    self.marker = Array(marker.utf8)
    self.action = action
    self.isAnchored = isAnchored
    self.replayed = replayed
  }
}
