/// A token of a template.
struct TemplateToken {
  enum Kind: Equatable {
    case data, blockBegin, blockEnd, variableBegin, variableEnd, name, string, integer, float, symbol, end
  }
  var kind: Kind
  /// The text of a name, symbol, string (unescaped), number or of data.
  var text: Text
  var line: Int
}

/// Splits a template into tokens, with white space handled as jinja2 does under `trim_blocks` and `lstrip_blocks`:
/// one newline after a block or comment is dropped, and so is the indentation before one that stands alone.
struct TemplateLexer {
  private let source: [UInt8]
  private var position = 0
  private var line = 1
  private var tokens: [TemplateToken] = []

  init(_ text: String) {
    // Line ends become "\n", and one at the very end is dropped.
    var bytes: [UInt8] = []
    let utf8 = Array(text.utf8)
    bytes.reserveCapacity(utf8.count)
    var index = 0
    while index < utf8.count {
      if utf8[index] == 0x0D {
        bytes.append(0x0A)
        if index + 1 < utf8.count && utf8[index + 1] == 0x0A { index += 1 }
      } else {
        bytes.append(utf8[index])
      }
      index += 1
    }
    if bytes.last == 0x0A { bytes.removeLast() }
    source = bytes
  }

  static func tokenize(_ text: String) throws -> [TemplateToken] {
    var lexer = TemplateLexer(text)
    try lexer.run()
    return lexer.tokens
  }

  private enum Opening { case raw(end: Int), comment, block, variable }

  private mutating func run() throws {
    var lineStarting = true
    while position < source.count {
      // The next tag, and the text before it.
      var tag = position
      var opening: Opening?
      while tag + 1 < source.count {
        if source[tag] == UInt8(ascii: "{") {
          switch source[tag + 1] {
          case UInt8(ascii: "%"): opening = rawEnd(at: tag).map { .raw(end: $0) } ?? .block
          case UInt8(ascii: "{"): opening = .variable
          case UInt8(ascii: "#"): opening = .comment
          default: break
          }
          if opening != nil { break }
        }
        tag += 1
      }
      guard let opening else {
        add(.data, Array(source[position...]))
        position = source.count
        break
      }
      var afterTag = tag + 2
      let sign = sign(at: tag + 2)
      if sign != nil { afterTag += 1 }
      var isVariable = false
      if case .variable = opening { isVariable = true }
      addText(position..<tag, sign: sign, isVariable: isVariable, lineStarting: lineStarting)
      position = afterTag
      switch opening {
      case .variable:
        tokens.append(TemplateToken(kind: .variableBegin, text: .empty, line: line))
        lineStarting = try readTag(isBlock: false)
      case .block:
        tokens.append(TemplateToken(kind: .blockBegin, text: .empty, line: line))
        lineStarting = try readTag(isBlock: true)
      case .comment:
        lineStarting = try skipComment()
      case .raw(let end):
        countLines(position..<end)
        let begin = end
        lineStarting = source[end - 1] == 0x0A
        position = end
        lineStarting = try readRaw(from: begin, lineStarting: lineStarting)
      }
    }
    tokens.append(TemplateToken(kind: .end, text: .empty, line: line))
  }

  private func sign(at index: Int) -> UInt8? {
    guard index < source.count, source[index] == UInt8(ascii: "-") || source[index] == UInt8(ascii: "+") else {
      return nil
    }
    return source[index]
  }

  private func isSpace(at index: Int) -> Int? {
    guard index < source.count else { return nil }
    let (scalar, length) = decodeScalar(source, at: index)
    return isPythonSpace(scalar) ? length : nil
  }

  private func skippingSpace(_ index: Int) -> Int {
    var index = index
    while let length = isSpace(at: index) { index += length }
    return index
  }

  private func matches(_ text: StaticString, at index: Int) -> Bool {
    let count = text.utf8CodeUnitCount
    guard index + count <= source.count else { return false }
    for offset in 0..<count where source[index + offset] != text.utf8Start[offset] { return false }
    return true
  }

  /// The end of a `{% raw %}` that begins at `tag`, or `nil` if it is another block.
  private func rawEnd(at tag: Int) -> Int? {
    var index = tag + 2
    if sign(at: index) != nil { index += 1 }
    index = skippingSpace(index)
    guard matches("raw", at: index) else { return nil }
    index = skippingSpace(index + 3)
    if matches("-%}", at: index) { return skippingSpace(index + 3) }
    if matches("%}", at: index) { return index + 2 }
    return nil
  }

  private mutating func add(_ kind: TemplateToken.Kind, _ bytes: [UInt8]) {
    if !bytes.isEmpty { tokens.append(TemplateToken(kind: kind, text: Text(bytes: bytes), line: line)) }
    for byte in bytes where byte == 0x0A { line += 1 }
  }

  private mutating func countLines(_ range: Range<Int>) {
    for index in range where source[index] == 0x0A { line += 1 }
  }

  /// Adds the text before a tag, its end stripped as the tag's sign or `lstrip_blocks` demands.
  private mutating func addText(_ range: Range<Int>, sign: UInt8?, isVariable: Bool, lineStarting: Bool) {
    var end = range.upperBound
    if sign == UInt8(ascii: "-") {
      end = range.lowerBound + Text(slice: source[range]).stripped(left: false).bytes.count
    } else if sign != UInt8(ascii: "+") && !isVariable {
      var lineStart = end
      while lineStart > range.lowerBound && source[lineStart - 1] != 0x0A { lineStart -= 1 }
      if lineStart > range.lowerBound || lineStarting {
        if skippingSpace(lineStart) >= end { end = lineStart }
      }
    }
    add(.data, Array(source[range.lowerBound..<end]))
    countLines(end..<range.upperBound)
  }

  /// Skips a comment's text and end. Returns whether what was matched ended with a newline.
  private mutating func skipComment() throws -> Bool {
    var index = position
    while index < source.count {
      var end: Int?
      if matches("+#}", at: index) {
        end = index + 3
      } else if matches("-#}", at: index) {
        end = skippingSpace(index + 3)
      } else if matches("#}", at: index) {
        end = index + 2
        if index + 2 < source.count && source[index + 2] == 0x0A { end = index + 3 }
      }
      if let end {
        countLines(position..<end)
        position = end
        return source[end - 1] == 0x0A
      }
      index += 1
    }
    throw TemplateFault.syntax("Missing end of comment tag", line: line)
  }

  /// Reads the text of a raw block and its end.
  private mutating func readRaw(from begin: Int, lineStarting: Bool) throws -> Bool {
    var index = begin
    while index + 1 < source.count {
      if matches("{%", at: index) {
        var end = index + 2
        let sign = sign(at: end)
        if sign != nil { end += 1 }
        end = skippingSpace(end)
        if matches("endraw", at: end) {
          end = skippingSpace(end + 6)
          var after: Int?
          if matches("+%}", at: end) {
            after = end + 3
          } else if matches("-%}", at: end) {
            after = skippingSpace(end + 3)
          } else if matches("%}", at: end) {
            after = end + 2
            if end + 2 < source.count && source[end + 2] == 0x0A { after = end + 3 }
          }
          if let after {
            addText(begin..<index, sign: sign, isVariable: false, lineStarting: lineStarting)
            countLines(index..<after)
            position = after
            return source[after - 1] == 0x0A
          }
        }
      }
      index += 1
    }
    throw TemplateFault.syntax("Missing end of raw directive", line: line)
  }

  /// Reads the tokens within a block or a variable. Returns whether its end took a newline with it.
  private mutating func readTag(isBlock: Bool) throws -> Bool {
    var brackets: [UInt8] = []
    while position < source.count {
      if brackets.isEmpty, let end = tagEnd(isBlock: isBlock) {
        tokens.append(TemplateToken(kind: isBlock ? .blockEnd : .variableEnd, text: .empty, line: line))
        countLines(position..<end)
        let endsLine = source[end - 1] == 0x0A
        position = end
        return endsLine
      }
      if let length = isSpace(at: position) {
        if source[position] == 0x0A { line += 1 }
        position += length
        continue
      }
      let byte = source[position]
      if isDigit(byte) {
        readNumber()
      } else if byte == UInt8(ascii: "'") || byte == UInt8(ascii: "\"") {
        try readString(byte)
      } else if isNameByte(byte) {
        try readName()
      } else {
        try readSymbol(&brackets)
      }
    }
    return false
  }

  private func tagEnd(isBlock: Bool) -> Int? {
    if isBlock {
      if matches("+%}", at: position) { return position + 3 }
      if matches("-%}", at: position) { return skippingSpace(position + 3) }
      if matches("%}", at: position) {
        let end = position + 2
        return end < source.count && source[end] == 0x0A ? end + 1 : end
      }
    } else {
      if matches("-}}", at: position) { return skippingSpace(position + 3) }
      if matches("}}", at: position) { return position + 2 }
    }
    return nil
  }

  private func isDigit(_ byte: UInt8) -> Bool { byte >= 0x30 && byte <= 0x39 }

  private func isNameByte(_ byte: UInt8) -> Bool {
    byte >= 0x80 || byte == UInt8(ascii: "_") || isDigit(byte) || (byte | 0x20 >= 0x61 && byte | 0x20 <= 0x7A)
  }

  /// The end of digits with single underscores between them, from `index`; `index` itself if there is none.
  private func digitsEnd(_ index: Int, _ isDigit: (UInt8) -> Bool) -> Int {
    var end = index
    while end < source.count {
      if isDigit(source[end]) {
        end += 1
      } else if source[end] == UInt8(ascii: "_"), end > index, end + 1 < source.count, isDigit(source[end + 1]) {
        end += 2
      } else {
        break
      }
    }
    return end
  }

  private mutating func readNumber() {
    let start = position
    func finish(_ end: Int, _ kind: TemplateToken.Kind) {
      let digits = source[start..<end].filter { $0 != UInt8(ascii: "_") }
      tokens.append(TemplateToken(kind: kind, text: Text(bytes: digits), line: line))
      position = end
    }
    // A float does not follow a dot, so that `a.1.2` is two subscripts.
    let followsDot = start > 0 && source[start - 1] == UInt8(ascii: ".")
    let whole = digitsEnd(start, isDigit)
    if !followsDot {
      var end = whole
      var isFloat = false
      if end < source.count && source[end] == UInt8(ascii: ".") {
        let fraction = digitsEnd(end + 1, isDigit)
        if fraction > end + 1 {
          end = fraction
          isFloat = true
        }
      }
      if end < source.count && source[end] | 0x20 == UInt8(ascii: "e") {
        var exponent = end + 1
        if exponent < source.count, sign(at: exponent) != nil { exponent += 1 }
        let last = digitsEnd(exponent, isDigit)
        if last > exponent {
          end = last
          isFloat = true
        }
      }
      if isFloat { return finish(end, .float) }
    }
    if source[start] == UInt8(ascii: "0") && start + 1 < source.count {
      let base = source[start + 1] | 0x20
      let isBaseDigit: ((UInt8) -> Bool)? =
        switch base {
        case UInt8(ascii: "b"): { $0 == 0x30 || $0 == 0x31 }
        case UInt8(ascii: "o"): { $0 >= 0x30 && $0 <= 0x37 }
        case UInt8(ascii: "x"): { $0 >= 0x30 && $0 <= 0x39 || $0 | 0x20 >= 0x61 && $0 | 0x20 <= 0x66 }
        default: nil
        }
      if let isBaseDigit {
        var digits = start + 2
        if digits < source.count && source[digits] == UInt8(ascii: "_") { digits += 1 }
        let end = digitsEnd(digits, isBaseDigit)
        if end > digits { return finish(end, .integer) }
      }
      // Decimal zero: further digits would be another number.
      return finish(digitsEnd(start, { $0 == 0x30 }), .integer)
    }
    finish(whole, .integer)
  }

  private mutating func readName() throws {
    let start = position
    while position < source.count, isNameByte(source[position]) {
      if source[position] < 0x80 {
        position += 1
      } else {
        let (scalar, length) = decodeScalar(source, at: position)
        guard scalar.properties.isXIDContinue else { break }
        position += length
      }
    }
    guard position > start else {
      throw TemplateFault.syntax(
        "unexpected char \(repr(Text(scalar: decodeScalar(source, at: start).0))) at \(start)", line: line)
    }
    let text = Text(slice: source[start..<position])
    if let first = text.scalars.first, first.value >= 0x80, !first.properties.isXIDStart {
      throw TemplateFault.syntax("Invalid character in identifier", line: line)
    }
    tokens.append(TemplateToken(kind: .name, text: text, line: line))
  }

  private mutating func readSymbol(_ brackets: inout [UInt8]) throws {
    let pairs: [StaticString] = ["//", "**", "==", "!=", ">=", "<="]
    for pair in pairs where matches(pair, at: position) {
      tokens.append(
        TemplateToken(kind: .symbol, text: Text(slice: source[position..<position + 2]), line: line))
      position += 2
      return
    }
    let byte = source[position]
    switch byte {
    case UInt8(ascii: "{"): brackets.append(UInt8(ascii: "}"))
    case UInt8(ascii: "("): brackets.append(UInt8(ascii: ")"))
    case UInt8(ascii: "["): brackets.append(UInt8(ascii: "]"))
    case UInt8(ascii: "}"), UInt8(ascii: ")"), UInt8(ascii: "]"):
      let character = String(UnicodeScalar(byte))
      guard let expected = brackets.popLast() else {
        throw TemplateFault.syntax("unexpected '\(character)'", line: line)
      }
      guard expected == byte else {
        throw TemplateFault.syntax(
          "unexpected '\(character)', expected '\(String(UnicodeScalar(expected)))'", line: line)
      }
    case UInt8(ascii: "+"), UInt8(ascii: "-"), UInt8(ascii: "/"), UInt8(ascii: "*"), UInt8(ascii: "%"),
      UInt8(ascii: "~"), UInt8(ascii: ">"), UInt8(ascii: "<"), UInt8(ascii: "="), UInt8(ascii: "."),
      UInt8(ascii: ":"), UInt8(ascii: "|"), UInt8(ascii: ","), UInt8(ascii: ";"):
      break
    default:
      throw TemplateFault.syntax(
        "unexpected char \(repr(Text(bytes: [byte]))) at \(codePointCount(source[..<position]))", line: line)
    }
    tokens.append(TemplateToken(kind: .symbol, text: Text(bytes: [byte]), line: line))
    position += 1
  }

  /// Reads a string literal and undoes its escapes.
  private mutating func readString(_ quote: UInt8) throws {
    var end = position + 1
    while end < source.count && source[end] != quote {
      end += source[end] == UInt8(ascii: "\\") ? 2 : 1
    }
    guard end < source.count else {
      throw TemplateFault.syntax(
        "unexpected char \(repr(Text(bytes: [quote]))) at \(codePointCount(source[..<position]))", line: line)
    }
    let text = try unescape(Array(source[(position + 1)..<end]))
    tokens.append(TemplateToken(kind: .string, text: text, line: line))
    countLines(position..<end)
    position = end + 1
  }

  private func unescape(_ bytes: [UInt8]) throws -> Text {
    guard bytes.contains(UInt8(ascii: "\\")) else { return Text(bytes: bytes) }
    var result: [UInt8] = []
    var index = 0
    while index < bytes.count {
      guard bytes[index] == UInt8(ascii: "\\") else {
        result.append(bytes[index])
        index += 1
        continue
      }
      index += 1
      let escape = bytes[index]
      index += 1
      switch escape {
      case 0x0A: break
      case UInt8(ascii: "\\"), UInt8(ascii: "'"), UInt8(ascii: "\""): result.append(escape)
      case UInt8(ascii: "a"): result.append(0x07)
      case UInt8(ascii: "b"): result.append(0x08)
      case UInt8(ascii: "f"): result.append(0x0C)
      case UInt8(ascii: "n"): result.append(0x0A)
      case UInt8(ascii: "r"): result.append(0x0D)
      case UInt8(ascii: "t"): result.append(0x09)
      case UInt8(ascii: "v"): result.append(0x0B)
      case UInt8(ascii: "0")...UInt8(ascii: "7"):
        var value = UInt32(escape - 0x30)
        var digits = 1
        while digits < 3, index < bytes.count, bytes[index] >= 0x30, bytes[index] <= 0x37 {
          value = value * 8 + UInt32(bytes[index] - 0x30)
          index += 1
          digits += 1
        }
        appendUTF8(Unicode.Scalar(value)!, to: &result)
      case UInt8(ascii: "x"), UInt8(ascii: "u"), UInt8(ascii: "U"):
        let count = escape == UInt8(ascii: "x") ? 2 : escape == UInt8(ascii: "u") ? 4 : 8
        var value: UInt32 = 0
        for offset in 0..<count {
          guard index + offset < bytes.count, let digit = hexDigit(bytes[index + offset]) else {
            let shape = String(repeating: "X", count: count)
            throw TemplateFault.syntax("truncated \\\(String(UnicodeScalar(escape)))\(shape) escape", line: line)
          }
          value = value << 4 | UInt32(digit)
        }
        index += count
        guard let scalar = Unicode.Scalar(value) else {
          throw TemplateFault.syntax(
            "the escape names a code point that is no character (U+\(String(value, radix: 16, uppercase: true)))",
            line: line)
        }
        appendUTF8(scalar, to: &result)
      case UInt8(ascii: "N"):
        throw TemplateFault.syntax("\\N{...} escapes are not supported", line: line)
      case 0x80...:
        // The reference escapes everything outside ASCII before it undoes escapes, which this backslash undoes.
        let (scalar, length) = decodeScalar(bytes, at: index - 1)
        index += length - 1
        let digits = String(scalar.value, radix: 16)
        let (letter, width) = scalar.value < 0x100 ? ("x", 2) : scalar.value < 0x10000 ? ("u", 4) : ("U", 8)
        result.append(contentsOf: "\\\(letter)\(String(repeating: "0", count: width - digits.count))\(digits)".utf8)
      default:
        result.append(UInt8(ascii: "\\"))
        result.append(escape)
      }
    }
    return Text(bytes: result)
  }
}

func hexDigit(_ byte: UInt8) -> UInt8? {
  switch byte {
  case 0x30...0x39: byte - 0x30
  case 0x41...0x46: byte - 0x37
  case 0x61...0x66: byte - 0x57
  default: nil
  }
}
