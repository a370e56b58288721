import ApusCore

/// What happens to the stretches that a pattern matches when a text is split.
enum SplitBehavior: String, Sendable {
  case removed = "Removed"
  case isolated = "Isolated"
  case mergedWithPrevious = "MergedWithPrevious"
  case mergedWithNext = "MergedWithNext"
  case contiguous = "Contiguous"
}

/// What a text is split at.
enum SplitPattern: Sendable {
  /// A string that is not empty.
  case literal([UInt8])
  /// One of the patterns with a hand-made matcher.
  case scanner(WordScanner)
  /// Any other pattern.
  case pattern(Pattern)
  /// Single characters of a class.
  case characters(CharacterClass)

  /// The classes that pre-tokenizers name.
  enum CharacterClass: Sendable {
    case whiteSpace, numeric, punctuation
    case scalar(UInt32)

    @inline(__always)
    func contains(_ scalar: UInt32) -> Bool {
      switch self {
      case .whiteSpace: UnicodeTables.shared.isWhiteSpace(scalar)
      case .numeric: ScalarSets.numeric.contains(scalar)
      case .punctuation: ScalarSets.punctuation.contains(scalar)
      case .scalar(let wanted): scalar == wanted
      }
    }
  }
}

/// One step from text to the pieces that the model encodes separately.
enum PreTokenizer: Sendable {
  /// Cuts at matches of a pattern; `inverts` swaps matches and what lies between.
  case split(SplitPattern, SplitBehavior, inverts: Bool)
  /// Puts a space before every piece that has none.
  case prefixSpace
  /// Writes every byte as its character of the byte-level alphabet.
  case byteAlphabet
  /// Turns spaces into a replacement character and cuts before each.
  case metaspace(replacement: [UInt8], scheme: PrependScheme, splits: Bool)
  /// Keeps runs of word characters and runs of what is neither word nor white space (`\w+|[^\w\s]+`).
  case words
  /// Cuts where the script changes.
  case scripts
  /// Cuts after every so many characters.
  case fixedLength(Int)

  /// Which pieces Metaspace puts its character before.
  enum PrependScheme: String, Sendable { case first, never, always }
}

/// A text and where it is cut.
struct PieceList: Sendable {
  /// A stretch of the text.
  struct Piece: Sendable {
    var start: Int32
    var end: Int32
    /// Whether the piece begins where the original text does.
    var isFirst: Bool
  }

  var text: [UInt8] = []
  var pieces: [Piece] = []

  mutating func removeAll() {
    text.removeAll(keepingCapacity: true)
    pieces.removeAll(keepingCapacity: true)
  }
}

extension PreTokenizer {
  /// Memory that splitting reuses.
  struct Scratch: Sendable {
    var ends: [Int32] = []
    var pieces: [PieceList.Piece] = []
    var text: [UInt8] = []
    var matches: [(start: Int32, end: Int32, isMatch: Bool)] = []
  }

  /// Applies the step to every piece.
  func apply(to list: inout PieceList, scratch: inout Scratch) throws(EngineError) {
    scratch.pieces.removeAll(keepingCapacity: true)
    switch self {
    case .split(.scanner(let scanner), .isolated, _):
      // A scanner's matches cover the text, so inverting changes nothing here.
      list.text.withUnsafeBufferPointer { text in
        for piece in list.pieces {
          scratch.ends.removeAll(keepingCapacity: true)
          scanner.scan(Bytes(rebasing: text[Int(piece.start)..<Int(piece.end)]), ends: &scratch.ends)
          var start = piece.start
          for end in scratch.ends {
            scratch.pieces.append(
              PieceList.Piece(
                start: start, end: piece.start + end, isFirst: piece.isFirst && start == piece.start))
            start = piece.start + end
          }
        }
      }
      swap(&list.pieces, &scratch.pieces)
    case .split(let pattern, let behavior, let inverts):
      try list.text.withUnsafeBufferPointer { (text) throws(EngineError) in
        for piece in list.pieces {
          scratch.matches.removeAll(keepingCapacity: true)
          try pattern.matches(
            in: Bytes(rebasing: text[Int(piece.start)..<Int(piece.end)]), inverts: inverts, into: &scratch)
          Self.cut(piece, behavior, &scratch)
        }
      }
      swap(&list.pieces, &scratch.pieces)
    case .prefixSpace:
      rewrite(&list, &scratch) { piece, result in
        if piece[0] != 0x20 { result.append(0x20) }
        result.append(bytes: piece)
      }
    case .byteAlphabet:
      rewrite(&list, &scratch) { ByteAlphabet.encode($0, to: &$1) }
    case .metaspace(let replacement, let scheme, let splits):
      scratch.text.removeAll(keepingCapacity: true)
      for piece in list.pieces {
        let start = scratch.text.count
        let prepends = scheme == .always || (scheme == .first && piece.isFirst)
        let slice = list.text[Int(piece.start)..<Int(piece.end)]
        if prepends, slice.first != 0x20, !slice.starts(with: replacement) {
          scratch.text.append(contentsOf: replacement)
        }
        for byte in slice {
          if byte == 0x20 {
            scratch.text.append(contentsOf: replacement)
          } else {
            scratch.text.append(byte)
          }
        }
        let end = scratch.text.count
        guard splits else {
          scratch.pieces.append(
            PieceList.Piece(
              start: Int32(truncatingIfNeeded: start), end: Int32(truncatingIfNeeded: end), isFirst: piece.isFirst))
          continue
        }
        // Cut before every replacement character.
        var pieceStart = start
        var index = start
        while index < end {
          let isCut =
            index > pieceStart && scratch.text[index] == replacement[0] && index + replacement.count <= end
            && scratch.text[index..<(index + replacement.count)].elementsEqual(replacement)
          if isCut {
            scratch.pieces.append(
              PieceList.Piece(
                start: Int32(truncatingIfNeeded: pieceStart), end: Int32(truncatingIfNeeded: index),
                isFirst: piece.isFirst && pieceStart == start))
            pieceStart = index
          }
          index += sequenceLength(scratch.text[index])
        }
        scratch.pieces.append(
          PieceList.Piece(
            start: Int32(truncatingIfNeeded: pieceStart), end: Int32(truncatingIfNeeded: end),
            isFirst: piece.isFirst && pieceStart == start))
      }
      swap(&list.text, &scratch.text)
      swap(&list.pieces, &scratch.pieces)
    case .words:
      let tables = UnicodeTables.shared
      Self.cutByKind(&list, &scratch) { tables.isWord($0) ? 1 : tables.isWhiteSpace($0) ? 0 : 2 }
    case .scripts:
      let table = ScalarSets.splitScripts
      let any = Int(ScalarSets.anyScript)
      Self.cutByKind(&list, &scratch) { scalar in
        let script = Int(table[Int(scalar)])
        return script == any ? -1 : script + 1
      }
    case .fixedLength(let length):
      for piece in list.pieces {
        var start = piece.start
        var index = Int(piece.start)
        var characters = 0
        while index < Int(piece.end) {
          index += sequenceLength(list.text[index])
          characters += 1
          if characters == length || index >= Int(piece.end) {
            scratch.pieces.append(
              PieceList.Piece(
                start: start, end: Int32(truncatingIfNeeded: index), isFirst: piece.isFirst && start == piece.start))
            start = Int32(truncatingIfNeeded: index)
            characters = 0
          }
        }
      }
      swap(&list.pieces, &scratch.pieces)
    }
  }

  /// Cuts every piece into parts where `kind` changes. Parts of kind zero are dropped. Kind -1 joins what is before it, and
  /// is lost where nothing is: the reference splitter by script drops leading characters without a script.
  private static func cutByKind(_ list: inout PieceList, _ scratch: inout Scratch, _ kind: (UInt32) -> Int) {
    list.text.withUnsafeBufferPointer { text in
      let base = text.baseAddress!
      for piece in list.pieces {
        var index = Int(piece.start)
        var start = index
        var current = -1
        func close(_ end: Int) {
          if start < end, current > 0 {
            scratch.pieces.append(
              PieceList.Piece(
                start: Int32(truncatingIfNeeded: start), end: Int32(truncatingIfNeeded: end),
                isFirst: piece.isFirst && start == Int(piece.start)))
          }
          start = end
        }
        while index < Int(piece.end) {
          let (scalar, length) = decodeScalar(base, index)
          let next = kind(scalar)
          if next != -1, next != current {
            close(index)
            current = next
          }
          index += length
        }
        close(index)
      }
    }
    swap(&list.pieces, &scratch.pieces)
  }

  /// Gives every piece a new text.
  private func rewrite(_ list: inout PieceList, _ scratch: inout Scratch, _ body: (Bytes, inout [UInt8]) -> Void) {
    scratch.text.removeAll(keepingCapacity: true)
    list.text.withUnsafeBufferPointer { text in
      for index in list.pieces.indices {
        let piece = list.pieces[index]
        let start = Int32(truncatingIfNeeded: scratch.text.count)
        body(Bytes(rebasing: text[Int(piece.start)..<Int(piece.end)]), &scratch.text)
        list.pieces[index].start = start
        list.pieces[index].end = Int32(truncatingIfNeeded: scratch.text.count)
      }
    }
    swap(&list.text, &scratch.text)
  }

  /// Makes pieces of the matches of one piece.
  private static func cut(_ piece: PieceList.Piece, _ behavior: SplitBehavior, _ scratch: inout Scratch) {
    let first = scratch.pieces.count
    func add(_ start: Int32, _ end: Int32, _ pieces: inout [PieceList.Piece]) {
      pieces.append(
        PieceList.Piece(start: piece.start + start, end: piece.start + end, isFirst: piece.isFirst && start == 0))
    }
    switch behavior {
    case .isolated:
      for match in scratch.matches { add(match.start, match.end, &scratch.pieces) }
    case .removed:
      for match in scratch.matches where !match.isMatch { add(match.start, match.end, &scratch.pieces) }
    case .contiguous:
      var previous = false
      for match in scratch.matches {
        if match.isMatch == previous, scratch.pieces.count > first {
          scratch.pieces[scratch.pieces.count - 1].end = piece.start + match.end
        } else {
          add(match.start, match.end, &scratch.pieces)
        }
        previous = match.isMatch
      }
    case .mergedWithPrevious:
      var previous = false
      for match in scratch.matches {
        if match.isMatch, !previous, scratch.pieces.count > first {
          scratch.pieces[scratch.pieces.count - 1].end = piece.start + match.end
        } else {
          add(match.start, match.end, &scratch.pieces)
        }
        previous = match.isMatch
      }
    case .mergedWithNext:
      var previous = false
      for match in scratch.matches.reversed() {
        if match.isMatch, !previous, scratch.pieces.count > first {
          let last = scratch.pieces.count - 1
          scratch.pieces[last].start = piece.start + match.start
          scratch.pieces[last].isFirst = piece.isFirst && match.start == 0
        } else {
          add(match.start, match.end, &scratch.pieces)
        }
        previous = match.isMatch
      }
      scratch.pieces[first...].reverse()
    }
    // Empty matches cut, but leave no empty pieces.
    if scratch.pieces[first...].contains(where: { $0.start == $0.end }) {
      let kept = scratch.pieces[first...].filter { $0.start != $0.end }
      scratch.pieces.replaceSubrange(first..., with: kept)
    }
  }
}

extension SplitPattern {
  /// Appends alternating stretches that do and do not match, which cover the text.
  func matches(in text: Bytes, inverts: Bool, into scratch: inout PreTokenizer.Scratch) throws(EngineError) {
    var previous = 0
    func add(_ start: Int, _ end: Int, _ isMatch: Bool, _ matches: inout [(start: Int32, end: Int32, isMatch: Bool)]) {
      matches.append((Int32(truncatingIfNeeded: start), Int32(truncatingIfNeeded: end), isMatch != inverts))
    }
    switch self {
    case .literal(let literal):
      if !literal.isEmpty {
        var index = 0
        while index + literal.count <= text.count {
          if text[index] == literal[0], text[index..<(index + literal.count)].elementsEqual(literal) {
            if previous < index { add(previous, index, false, &scratch.matches) }
            add(index, index + literal.count, true, &scratch.matches)
            index += literal.count
            previous = index
          } else {
            index += 1
          }
        }
      }
    case .pattern(let pattern):
      var matches = scratch.matches
      scratch.matches = []
      try pattern.matches(in: text) { start, end in
        if previous < start { add(previous, start, false, &matches) }
        add(start, end, true, &matches)
        previous = end
      }
      scratch.matches = matches
    case .characters(let members):
      let base = text.baseAddress!
      var index = 0
      while index < text.count {
        let (scalar, length) = decodeScalar(base, index)
        if members.contains(scalar) {
          if previous < index { add(previous, index, false, &scratch.matches) }
          add(index, index + length, true, &scratch.matches)
          previous = index + length
        }
        index += length
      }
    case .scanner(let scanner):
      scratch.ends.removeAll(keepingCapacity: true)
      scanner.scan(text, ends: &scratch.ends)
      for end in scratch.ends {
        add(previous, Int(end), true, &scratch.matches)
        previous = Int(end)
      }
    }
    if previous < text.count { add(previous, text.count, false, &scratch.matches) }
  }
}
