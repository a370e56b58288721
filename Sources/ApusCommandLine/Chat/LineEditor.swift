import Glibc

/// The state of a line that is being edited: keys in, what to show out. It does no input or output, so tests type into
/// it directly.
package struct LineBuffer: Sendable, Equatable {
  /// What a key brought about.
  package enum Outcome: Sendable, Equatable {
    /// Keep typing; the line may have changed.
    case editing
    /// Enter: the line is complete.
    case line(String)
    /// Ctrl-C with something typed: the line was thrown away.
    case cleared
    /// Ctrl-C on an empty line.
    case interrupt
    /// Ctrl-D on an empty line.
    case end
    /// Ctrl-L: clear the screen.
    case redraw
  }

  /// The characters typed.
  package private(set) var characters: [Character] = []
  /// Where the next character goes, in 0...characters.count.
  package private(set) var cursor = 0
  private var history: [String]
  private var historyIndex: Int
  private var draft: [Character] = []
  private var pendingBytes: [UInt8] = []
  private var escape: [UInt8] = []

  /// An empty line.
  /// - Parameter history: earlier lines, oldest first.
  package init(history: [String] = []) {
    self.history = history
    historyIndex = history.count
  }

  /// The text typed.
  package var text: String { String(characters) }

  /// Takes one byte as the terminal sent it.
  package mutating func feed(_ byte: UInt8) -> Outcome {
    if !escape.isEmpty { return feedEscape(byte) }
    switch byte {
    case 0x1B: escape = [byte]
    case 0x0D, 0x0A: return .line(text)
    case 0x03:
      if characters.isEmpty { return .interrupt }
      self = LineBuffer(history: history)
      return .cleared
    case 0x04:
      if characters.isEmpty { return .end }
      deleteForward()
    case 0x7F, 0x08: deleteBackward()
    case 0x01: cursor = 0
    case 0x05: cursor = characters.count
    case 0x02: cursor = max(0, cursor - 1)
    case 0x06: cursor = min(characters.count, cursor + 1)
    case 0x0B: characters.removeSubrange(cursor...)
    case 0x15:
      characters.removeSubrange(..<cursor)
      cursor = 0
    case 0x17: deleteWord()
    case 0x10: recall(historyIndex - 1)
    case 0x0E: recall(historyIndex + 1)
    case 0x0C: return .redraw
    case 0x09: insert("  ")
    case 0..<0x20: break
    default: feedText(byte)
    }
    return .editing
  }

  /// Collects the bytes of a character; what is not UTF-8 becomes a replacement character.
  private mutating func feedText(_ byte: UInt8) {
    pendingBytes.append(byte)
    let first = pendingBytes[0]
    let length = first < 0x80 ? 1 : first >> 5 == 0b110 ? 2 : first >> 4 == 0b1110 ? 3 : first >> 3 == 0b11110 ? 4 : 1
    guard pendingBytes.count >= length else { return }
    insert(String(decoding: pendingBytes, as: UTF8.self))
    pendingBytes = []
  }

  private mutating func feedEscape(_ byte: UInt8) -> Outcome {
    escape.append(byte)
    // ESC [ ... final byte, or ESC O letter. Anything else after ESC is dropped.
    guard escape.count > 2 else {
      if byte != UInt8(ascii: "[") && byte != UInt8(ascii: "O") {
        escape = []
        if byte == UInt8(ascii: "b") { moveWordBack() }
        if byte == UInt8(ascii: "f") { moveWordForward() }
      }
      return .editing
    }
    guard (0x40...0x7E).contains(byte) else {
      if escape.count > 16 { escape = [] }
      return .editing
    }
    let sequence = String(decoding: escape.dropFirst(2), as: UTF8.self)
    escape = []
    switch sequence {
    case "A": recall(historyIndex - 1)
    case "B": recall(historyIndex + 1)
    case "C": cursor = min(characters.count, cursor + 1)
    case "D": cursor = max(0, cursor - 1)
    case "1;5D", "1;3D": moveWordBack()
    case "1;5C", "1;3C": moveWordForward()
    case "H", "1~", "7~": cursor = 0
    case "F", "4~", "8~": cursor = characters.count
    case "3~": deleteForward()
    default: break
    }
    return .editing
  }

  private mutating func insert(_ text: String) {
    // A combining mark joins the character before it, so the insertion is made on the text and not on characters.
    let before = String(characters[..<cursor]) + text
    let after = characters[cursor...]
    characters = Array(before) + after
    cursor = characters.count - after.count
  }

  private mutating func deleteBackward() {
    guard cursor > 0 else { return }
    cursor -= 1
    characters.remove(at: cursor)
  }

  private mutating func deleteForward() {
    if cursor < characters.count { characters.remove(at: cursor) }
  }

  private mutating func moveWordBack() {
    while cursor > 0 && characters[cursor - 1].isWhitespace { cursor -= 1 }
    while cursor > 0 && !characters[cursor - 1].isWhitespace { cursor -= 1 }
  }

  private mutating func moveWordForward() {
    while cursor < characters.count && characters[cursor].isWhitespace { cursor += 1 }
    while cursor < characters.count && !characters[cursor].isWhitespace { cursor += 1 }
  }

  private mutating func deleteWord() {
    let end = cursor
    moveWordBack()
    characters.removeSubrange(cursor..<end)
  }

  private mutating func recall(_ index: Int) {
    guard (0...history.count).contains(index), index != historyIndex else { return }
    if historyIndex == history.count { draft = characters }
    historyIndex = index
    characters = index == history.count ? draft : Array(history[index])
    cursor = characters.count
  }
}

/// Columns that a character takes in a terminal: two for East Asian wide characters and emoji, otherwise one.
package func columns(of character: Character) -> Int {
  guard let scalar = character.unicodeScalars.first else { return 0 }
  switch scalar.value {
  case 0x1100...0x115F, 0x2E80...0xA4CF, 0xAC00...0xD7A3, 0xF900...0xFAFF, 0xFE30...0xFE6F, 0xFF00...0xFF60,
    0xFFE0...0xFFE6, 0x1F300...0x1F64F, 0x1F680...0x1F6FF, 0x1F900...0x1F9FF, 0x20000...0x3FFFD:
    return 2
  default: return 1
  }
}

/// Reads lines from a terminal with editing and history, or plain lines from anything else. Blocks its thread.
final class LineInput {
  /// How reading a line ended.
  enum Result: Sendable, Equatable {
    case line(String)
    case interrupt
    case end
  }

  private let isTerminal: Bool
  private let terminal: Terminal
  private var history: [String] = []
  private var buffered: [UInt8] = []

  /// Reads from standard input.
  init(terminal: Terminal = .output) {
    self.terminal = terminal
    isTerminal = isatty(STDIN_FILENO) == 1 && terminal.isInteractive
  }

  /// Reads one line. Ctrl-C on a line that holds something only clears it.
  func read(prompt: String) -> Result {
    guard isTerminal else { return readPlain() }
    var original = termios()
    guard tcgetattr(STDIN_FILENO, &original) == 0 else { return readPlain() }
    var raw = original
    cfmakeraw(&raw)
    // Output processing stays on: everything else that is printed relies on it.
    raw.c_oflag = original.c_oflag
    tcsetattr(STDIN_FILENO, TCSADRAIN, &raw)
    defer { tcsetattr(STDIN_FILENO, TCSADRAIN, &original) }
    var buffer = LineBuffer(history: history)
    draw(prompt, buffer)
    while let byte = readByte() {
      switch buffer.feed(byte) {
      case .editing: if !hasBufferedInput { draw(prompt, buffer) }
      case .redraw:
        terminal.write("\u{1B}[2J\u{1B}[H")
        draw(prompt, buffer)
      case .cleared:
        terminal.write("^C\n")
        draw(prompt, buffer)
      case .line(let text):
        draw(prompt, buffer)
        terminal.write("\n")
        if !trim(text).isEmpty && history.last != text { history.append(text) }
        return .line(text)
      case .interrupt:
        terminal.write("\n")
        return .interrupt
      case .end:
        terminal.write("\n")
        return .end
      }
    }
    return .end
  }

  /// Draws the line, scrolled sideways so that the cursor is in view.
  private func draw(_ prompt: String, _ buffer: LineBuffer) {
    let room = max(8, terminal.width - prompt.count - 1)
    var first = buffer.cursor
    var used = 0
    while first > 0, used + columns(of: buffer.characters[first - 1]) < room {
      first -= 1
      used += columns(of: buffer.characters[first])
    }
    var shown = used
    var end = buffer.cursor
    while end < buffer.characters.count, shown + columns(of: buffer.characters[end]) <= room {
      shown += columns(of: buffer.characters[end])
      end += 1
    }
    var text = "\r\u{1B}[K" + terminal.bold(prompt) + String(buffer.characters[first..<end])
    if shown > used { text += "\u{1B}[\(shown - used)D" }
    terminal.write(text)
  }

  private var hasBufferedInput: Bool { !buffered.isEmpty }

  private func readByte() -> UInt8? {
    if buffered.isEmpty {
      var chunk = [UInt8](repeating: 0, count: 4096)
      while true {
        let count = Glibc.read(STDIN_FILENO, &chunk, chunk.count)
        if count < 0 && errno == EINTR { continue }
        guard count > 0 else { return nil }
        buffered = chunk[0..<count].reversed()
        break
      }
    }
    return buffered.popLast()
  }

  private func readPlain() -> Result {
    var line: [UInt8] = []
    while let byte = readByte() {
      if byte == 0x0A { return .line(String(decoding: line, as: UTF8.self)) }
      line.append(byte)
    }
    return line.isEmpty ? .end : .line(String(decoding: line, as: UTF8.self))
  }
}
