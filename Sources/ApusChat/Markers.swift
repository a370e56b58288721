/// How bytes compare with a set of markers.
enum MarkerMatch: Equatable {
  /// No marker begins with these bytes.
  case none
  /// The bytes are the beginning of a marker.
  case partial
  /// The bytes are the marker with this index.
  case full(Int)
}

/// Literal texts that a machine looks for. None is the beginning of another.
struct MarkerSet: Sendable {
  let markers: [[UInt8]]

  init(_ markers: [String]) { self.markers = markers.map { Array($0.utf8) } }

  /// Compares bytes, which must not be empty, with every marker from its start.
  func match(_ bytes: ArraySlice<UInt8>) -> MarkerMatch {
    var isPartial = false
    for (index, marker) in markers.enumerated() where bytes.count <= marker.count && marker.starts(with: bytes) {
      if bytes.count == marker.count { return .full(index) }
      isPartial = true
    }
    return isPartial ? .partial : .none
  }

  /// Whether bytes at the end of an answer are whitespace and markers, the last one of them possibly cut short.
  func explains(_ bytes: [UInt8]) -> Bool {
    var rest = bytes[...]
    while true {
      rest = rest.drop(while: isWhitespace)
      if rest.isEmpty { return true }
      if let marker = markers.first(where: { !$0.isEmpty && rest.starts(with: $0) }) {
        rest = rest.dropFirst(marker.count)
      } else {
        return markers.contains { $0.starts(with: rest) }
      }
    }
  }
}

/// What a machine says of a byte.
enum MachineOutcome {
  /// The byte was taken.
  case more
  /// The byte was the last one of the section.
  case done
  /// The section ended before bytes that it had put aside; they are text again.
  case release
  /// This is no tool call, or not one any longer.
  case reject
}
