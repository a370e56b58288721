import ApusChat
import ApusCore
import Foundation
import Testing

/// A generator with a seed, so that a failure can be repeated (SplitMix64).
struct SeededGenerator: RandomNumberGenerator {
  private var state: UInt64
  init(seed: UInt64) { state = seed }
  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var value = state
    value = (value ^ value >> 30) &* 0xBF58_476D_1CE4_E5B9
    value = (value ^ value >> 27) &* 0x94D0_49BB_1331_11EB
    return value ^ value >> 31
  }
}

/// Real templates, beside the package.
enum SharedData {
  static let root: String = {
    let package = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
      .deletingLastPathComponent()
    for path in ["../shared/data", "../../shared/data"] {
      let candidate = package.appendingPathComponent(path).standardizedFileURL.path
      if FileManager.default.fileExists(atPath: candidate) { return candidate + "/" }
    }
    print("The directory shared/data is absent: tests that read real templates are skipped.")
    return ""
  }()

  static var isPresent: Bool { !root.isEmpty }

  static func text(_ path: String) throws -> String {
    String(decoding: try Data(contentsOf: URL(fileURLWithPath: root + path)), as: UTF8.self)
  }

  /// A folder with more templates, named by `APUS_CHAT_TEMPLATES`: those of llama.cpp's `models/templates`.
  static let moreTemplates = ProcessInfo.processInfo.environment["APUS_CHAT_TEMPLATES"]

  /// A template in a file of its own, or in a tokenizer's configuration.
  static func template(_ path: String) throws -> String {
    let text = try text(path)
    if !path.hasSuffix(".json") { return text }
    let configuration = try JSONValue.parse(text)
    return try #require(configuration["chat_template"]?.stringValue)
  }
}

/// The tools of all tests.
let testTools = ToolDefinitions(
  json: [
    [
      "type": "function",
      "function": [
        "name": "get_weather",
        "parameters": [
          "type": "object",
          "properties": [
            "city": ["type": "string"], "days": ["type": "integer"], "scale": ["type": "number"],
            "fine": ["type": "boolean"], "extra": ["type": "object"], "list": ["type": "array"],
            "maybe": ["anyOf": [["type": "string"], ["type": "null"]]], "unit": ["enum": ["c", "f"]],
          ],
        ],
      ],
    ],
    ["type": "function", "function": ["name": "ping", "parameters": ["type": "object", "properties": [:]]]],
    [
      "type": "function",
      "function": [
        "name": "search", "parameters": ["type": "object", "properties": ["query": ["type": "string"]]],
      ],
    ],
  ])

/// What an answer means, without regard to how it arrived.
enum Piece: Equatable, CustomStringConvertible {
  case reasoning(String)
  case content(String)
  case call(String, JSONValue)
  /// A call whose arguments did not become a whole JSON text.
  case brokenCall(String, String)

  var description: String {
    switch self {
    case .reasoning(let text): "reasoning(\(text.debugDescription))"
    case .content(let text): "content(\(text.debugDescription))"
    case .call(let name, let arguments): "call(\(name), \(arguments.compactText))"
    case .brokenCall(let name, let text): "brokenCall(\(name), \(text.debugDescription))"
    }
  }
}

/// Adds events up, and checks that they are well formed.
func pieces(_ events: [ChatEvent]) throws -> [Piece] {
  var pieces: [Piece] = []
  var open: (index: Int, name: String, text: String)?
  var count = 0
  for event in ChatEvent.merged(events) {
    switch event {
    case .reasoning(let text): pieces.append(.reasoning(text))
    case .content(let text): pieces.append(.content(text))
    case .toolCallBegin(let index, let name, _):
      #expect(open == nil && index == count)
      open = (index, name, "")
      count += 1
    case .toolCallArguments(let index, let text):
      #expect(open?.index == index)
      open?.text += text
    case .toolCallEnd(let index, let isComplete):
      let call = try #require(open)
      #expect(call.index == index)
      if isComplete {
        pieces.append(.call(call.name, try JSONValue.parse(call.text)))
      } else {
        pieces.append(.brokenCall(call.name, call.text))
      }
      open = nil
    }
  }
  #expect(open == nil)
  return pieces
}

/// Feeds bytes in the pieces given by their ends, and finishes.
func events(_ parser: ChatOutputParser, _ bytes: [UInt8], cuts: [Int], finishes: Bool = true) -> [ChatEvent] {
  var parser = parser
  var events: [ChatEvent] = []
  var start = 0
  for end in cuts + [bytes.count] {
    events += parser.feed(bytes[start..<end])
    start = end
  }
  if finishes { events += parser.finish() }
  return ChatEvent.merged(events)
}

/// Checks that every way of cutting an answer, and every answer cut short, gives events that do not depend on the pieces.
///
/// Two pieces and single bytes are tried in all places, and so is the answer's end. Three pieces are tried in all places for
/// answers of up to 64 bytes and in 300 drawn ones for longer ones; `APUS_ALL_SPLITS=1` tries them all, which takes minutes.
func checkSplits(_ parser: ChatOutputParser, _ text: String, _ generator: inout SeededGenerator) {
  let bytes = Array(text.utf8)
  let whole = events(parser, bytes, cuts: [])
  func check(_ cuts: [Int]) {
    let found = events(parser, bytes, cuts: cuts)
    if found != whole { Issue.record("\(text.debugDescription) cut at \(cuts): \(found), whole: \(whole)") }
  }
  check(Array(0..<bytes.count))
  for cut in 0...bytes.count { check([cut]) }
  if bytes.count <= 64 || triesAllSplits {
    for first in 0...bytes.count { for second in first...bytes.count { check([first, second]) } }
  } else {
    for _ in 0..<300 {
      let first = Int.random(in: 0...bytes.count, using: &generator)
      check([first, Int.random(in: first...bytes.count, using: &generator)])
    }
  }
  // What was given out is never taken back: the events of a beginning are a beginning of the events.
  var growing = parser
  var given: [ChatEvent] = []
  for length in 0..<bytes.count {
    // The parser that has had the beginning byte by byte, and one that gets it in two pieces.
    var byByte = growing
    let broken = ChatEvent.merged(given + byByte.finish())
    let beginning = Array(bytes[..<length])
    let cut = Int.random(in: 0...length, using: &generator)
    let inPieces = events(parser, beginning, cuts: [cut])
    let short = cut == length ? inPieces : events(parser, beginning, cuts: [])
    if inPieces != short || broken != short {
      Issue.record("\(text.debugDescription) broken off at \(length) and cut at \(cut): \(inPieces), whole: \(short)")
    }
    if !isBeginning(given, of: whole) {
      Issue.record("\(text.debugDescription) at \(length) gave out \(given), but in the end \(whole)")
    }
    given = ChatEvent.merged(given + growing.feed(CollectionOfOne(bytes[length])))
  }
}

/// Whether answers are cut into three pieces in all places.
private let triesAllSplits = ProcessInfo.processInfo.environment["APUS_ALL_SPLITS"] == "1"

private func isBeginning(_ events: [ChatEvent], of whole: [ChatEvent]) -> Bool {
  guard events.count <= whole.count else { return false }
  for (index, (event, full)) in zip(events, whole).enumerated() {
    if event == full { continue }
    guard index == events.count - 1 else { return false }
    switch (event, full) {
    case (.content(let left), .content(let right)), (.reasoning(let left), .reasoning(let right)),
      (.toolCallArguments(_, let left), .toolCallArguments(_, let right)):
      if !right.utf8.starts(with: left.utf8) { return false }
    default: return false
    }
  }
  return true
}
