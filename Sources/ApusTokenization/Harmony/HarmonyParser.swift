public import ApusCore

/// Reads text in the harmony format back into messages, as the strict parser of OpenAI's `openai-harmony` 0.0.8 does.
///
/// It works on text, where a marker that a model spelled out letter by letter cannot be told from the real one.
public enum HarmonyParser {
  private static let ends = ["<|end|>", "<|return|>", "<|call|>"]

  /// The messages of a text.
  /// - Parameters:
  ///   - text: one message after another. The last one may lack its end.
  ///   - role: whose message the text begins in the middle of, for a completion; `nil` for a text that begins with
  ///     `<|start|>`.
  /// - Throws: `invalidRequest` if the text is not in the format.
  public static func messages(of text: String, role: HarmonyMessage.Role?) throws(EngineError) -> [HarmonyMessage] {
    var messages: [HarmonyMessage] = []
    var rest = Array(text.utf8)[...]
    var opened = role
    while opened != nil || !rest.isEmpty {
      if opened == nil {
        guard rest.starts(with: "<|start|>".utf8) else {
          throw failure("a message must begin with <|start|>")
        }
        rest = rest.dropFirst("<|start|>".utf8.count)
      }
      guard let message = range(of: "<|message|>", in: rest) else {
        throw failure("the text ends within the header of message \(messages.count + 1)")
      }
      var parsed = try header(String(decoding: rest[..<message.lowerBound], as: UTF8.self), opened)
      rest = rest[message.upperBound...]
      let end = ends.compactMap { range(of: $0, in: rest) }.min { $0.lowerBound < $1.lowerBound }
      parsed.content = [.text(String(decoding: rest[..<(end?.lowerBound ?? rest.endIndex)], as: UTF8.self))]
      messages.append(parsed)
      rest = rest[(end?.upperBound ?? rest.endIndex)...]
      opened = nil
    }
    return messages
  }

  private static func failure(_ reason: String) -> EngineError {
    EngineError(.invalidRequest, "The text is not in the harmony format: \(reason).")
  }

  private static func range(of marker: String, in text: ArraySlice<UInt8>) -> Range<Int>? {
    let marker = Array(marker.utf8)
    var index = text.startIndex
    while index + marker.count <= text.endIndex {
      if text[index] == marker[0], text[index..<(index + marker.count)].elementsEqual(marker) {
        return index..<(index + marker.count)
      }
      index += 1
    }
    return nil
  }

  /// Reads what stands between `<|start|>` and `<|message|>`.
  private static func header(_ text: String, _ given: HarmonyMessage.Role?) throws(EngineError) -> HarmonyMessage {
    var header = Array(text.utf8)[...]
    var channel: String?
    if let marker = range(of: "<|channel|>", in: header) {
      let after = header[marker.upperBound...]
      // A channel's name ends at white space or at another marker.
      let name = String(decoding: after, as: UTF8.self).unicodeScalars.prefix {
        !$0.properties.isWhitespace && $0 != "<"
      }
      if name.isEmpty { throw failure("a channel has no name") }
      channel = String(name)
      header = header[..<marker.lowerBound] + after.dropFirst(channel!.utf8.count)
    }
    // The type of the content need not have a space before it.
    let mark = "<|constrain|>"
    var spaced: [UInt8] = []
    while let marker = range(of: mark, in: header) {
      spaced += header[..<marker.lowerBound] + " ".utf8 + mark.utf8
      header = header[marker.upperBound...]
    }
    spaced += header
    var parts = spaced.split(whereSeparator: { [0x20, 0x09, 0x0A, 0x0C, 0x0D].contains($0) })
      .map { String(decoding: $0, as: UTF8.self) }
    var message = HarmonyMessage(given ?? .tool, [])
    message.channel = channel
    if given == nil {
      guard let first = parts.first else { throw failure("a message names no role") }
      if let role = HarmonyMessage.Role(rawValue: first) {
        message.role = role
      } else {
        // A tool's message is headed by the tool's name, and says whom it is for.
        guard parts.count > 1 || first.hasPrefix("to=") else { throw failure("there is no role '\(first)'") }
        parts.removeFirst()
      }
      if message.role == .tool { message.name = first }
    }
    if parts.first == message.role.rawValue { parts.removeFirst() }
    func recipient(_ part: String) -> String { part.hasPrefix("to=") ? String(part.dropFirst(3)) : part }
    if let last = parts.popLast() {
      if last.hasPrefix("to=") || (parts.isEmpty && !last.hasPrefix(mark)) {
        message.recipient = recipient(last)
      } else {
        message.contentType = last
        if let part = parts.popLast() { message.recipient = recipient(part) }
      }
    }
    if !parts.isEmpty { throw failure("the header holds more than it may: '\(parts.joined(separator: " "))'") }
    return message
  }
}
