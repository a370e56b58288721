import Glibc

/// Takes a `multipart/form-data` body (RFC 7578) apart as it arrives, holding no more of it than a boundary's length.
package struct MultipartParser {
  package enum Event: Equatable {
    /// A part begins.
    case begin(name: String, fileName: String?)
    /// Bytes of the part.
    case data([UInt8])
    case end
  }

  package struct Failure: Error {
    package var message: String
  }

  private enum State {
    /// Before the first boundary, or after one within a line.
    case preamble, afterBoundary, headers, data, epilogue
  }

  /// A part's headers may have so many bytes together.
  private static let headerLimit = 8192
  /// CR LF, two hyphens and the boundary. The first boundary has no line break before it, so one is put there.
  private let delimiter: [UInt8]
  private var buffer: [UInt8] = [0x0D, 0x0A]
  private var state = State.preamble

  /// Whether the last boundary has been seen.
  package var isComplete: Bool { state == .epilogue }

  /// Makes a parser.
  ///
  /// - Parameter contentType: the body's content type, which tells the boundary; `nil` is returned if it does not.
  package init?(contentType: String) {
    let parameters = headerParameters(contentType)
    guard parameters.value.lowercased() == "multipart/form-data", let boundary = parameters["boundary"],
      (1...70).contains(boundary.utf8.count)
    else { return nil }
    delimiter = Array("\r\n--\(boundary)".utf8)
  }

  /// Takes bytes.
  package mutating func feed(_ bytes: some Sequence<UInt8>) throws(Failure) -> [Event] {
    buffer += bytes
    var events: [Event] = []
    var position = 0
    loop: while true {
      switch state {
      case .epilogue:
        position = buffer.count
        break loop
      case .preamble, .data:
        let (end, isWhole) = findDelimiter(from: position)
        if state == .data, end > position { events.append(.data(Array(buffer[position..<end]))) }
        position = end
        if !isWhole { break loop }
        if state == .data { events.append(.end) }
        position += delimiter.count
        state = .afterBoundary
      case .afterBoundary:
        // Two hyphens end the body, a line break begins a part; white space may stand before either.
        while position < buffer.count, buffer[position] == 0x20 || buffer[position] == 0x09 { position += 1 }
        guard position + 2 <= buffer.count else { break loop }
        switch (buffer[position], buffer[position + 1]) {
        case (UInt8(ascii: "-"), UInt8(ascii: "-")): state = .epilogue
        case (0x0D, 0x0A): state = .headers
        default: throw Failure(message: "a boundary is followed by what is no line break")
        }
        // The line break stays for the headers, which end at an empty line, and there may be none.
        if state == .epilogue { position += 2 }
      case .headers:
        guard let end = range(of: [0x0D, 0x0A, 0x0D, 0x0A], from: position) else {
          if buffer.count - position > Self.headerLimit { throw Failure(message: "a part's headers are too long") }
          break loop
        }
        if end - position > Self.headerLimit { throw Failure(message: "a part's headers are too long") }
        events.append(try begin(String(decoding: buffer[position..<end], as: UTF8.self)))
        position = end + 4
        state = .data
        // A part without any bytes: its boundary's line break is the one that ended the headers.
        if position >= 2, buffer[position...].starts(with: delimiter.dropFirst(2)) { position -= 2 }
      }
    }
    buffer.removeFirst(position)
    return events
  }

  private func begin(_ headers: String) throws(Failure) -> Event {
    for line in headers.split(separator: "\r\n") {
      guard let colon = line.firstIndex(of: ":"), line[..<colon].lowercased() == "content-disposition" else { continue }
      let parameters = headerParameters(String(line[line.index(after: colon)...]))
      guard parameters.value.lowercased() == "form-data", let name = parameters["name"] else { break }
      return .begin(name: name, fileName: parameters["filename"])
    }
    throw Failure(message: "a part has no name")
  }

  /// Where the next delimiter begins and whether all of it is there; else where one may begin.
  private func findDelimiter(from start: Int) -> (Int, Bool) {
    buffer.withUnsafeBufferPointer { bytes in
      var position = start
      while position < bytes.count {
        guard let found = memchr(bytes.baseAddress! + position, 0x0D, bytes.count - position) else {
          return (bytes.count, false)
        }
        position = bytes.baseAddress!.distance(to: found.assumingMemoryBound(to: UInt8.self))
        let length = min(delimiter.count, bytes.count - position)
        if delimiter.withUnsafeBytes({ memcmp($0.baseAddress!, found, length) }) == 0 {
          return (position, length == delimiter.count)
        }
        position += 1
      }
      return (bytes.count, false)
    }
  }

  private func range(of pattern: [UInt8], from start: Int) -> Int? {
    guard buffer.count - start >= pattern.count else { return nil }
    return (start...(buffer.count - pattern.count)).first { buffer[$0...].starts(with: pattern) }
  }
}

/// A header's value with its parameters, such as `form-data; name="file"; filename="a b.txt"`.
struct HeaderParameters {
  var value: String
  var parameters: [(name: String, value: String)] = []

  /// A parameter by its name in lower case.
  subscript(name: String) -> String? { parameters.first { $0.name == name }?.value }
}

/// Reads a header's value. Quoted parameters may hold anything; a backslash escapes a quote or a backslash alone, since
/// browsers send paths with backslashes as they are.
func headerParameters(_ text: String) -> HeaderParameters {
  var pieces: [String] = [""]
  var isQuoted = false
  var isEscaped = false
  for character in text.unicodeScalars {
    if isEscaped {
      if character != "\"" && character != "\\" { pieces[pieces.count - 1].unicodeScalars.append("\\") }
      pieces[pieces.count - 1].unicodeScalars.append(character)
      isEscaped = false
    } else if isQuoted, character == "\\" {
      isEscaped = true
    } else if character == "\"" {
      isQuoted.toggle()
    } else if character == ";", !isQuoted {
      pieces.append("")
    } else {
      pieces[pieces.count - 1].unicodeScalars.append(character)
    }
  }
  func trimmed(_ text: some StringProtocol) -> String {
    let isBlank: (Character) -> Bool = { $0 == " " || $0 == "\t" }
    return String(text.drop(while: isBlank).reversed().drop(while: isBlank).reversed())
  }
  var result = HeaderParameters(value: trimmed(pieces[0]))
  for piece in pieces.dropFirst() {
    guard let equals = piece.firstIndex(of: "=") else { continue }
    result.parameters.append(
      (trimmed(piece[..<equals]).lowercased(), trimmed(piece[piece.index(after: equals)...])))
  }
  return result
}
