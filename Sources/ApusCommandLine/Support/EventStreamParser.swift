/// Cuts a server-sent event stream into the payloads of its events.
///
/// Follows the WHATWG rules that matter here: events end with an empty line, several `data:` lines are joined by a line
/// feed, comments and other fields are skipped, lines end with LF, CRLF or CR. Bytes may be cut anywhere.
package struct EventStreamParser: Sendable {
  private var line: [UInt8] = []
  private var data: [UInt8] = []
  private var hasData = false
  private var sawCarriageReturn = false

  /// A parser at the start of a stream.
  package init() {}

  /// Takes the next bytes and calls `onEvent` with each payload that is complete.
  package mutating func feed(_ bytes: some Sequence<UInt8>, onEvent: ([UInt8]) throws -> Void) rethrows {
    for byte in bytes {
      if byte == 0x0A {
        if sawCarriageReturn {
          sawCarriageReturn = false
          continue
        }
        try endLine(onEvent)
      } else {
        sawCarriageReturn = byte == 0x0D
        if sawCarriageReturn { try endLine(onEvent) } else { line.append(byte) }
      }
    }
  }

  private mutating func endLine(_ onEvent: ([UInt8]) throws -> Void) rethrows {
    defer { line.removeAll(keepingCapacity: true) }
    if line.isEmpty {
      guard hasData else { return }
      let payload = data
      data.removeAll(keepingCapacity: true)
      hasData = false
      try onEvent(payload)
      return
    }
    let prefix = Array("data:".utf8)
    guard line.starts(with: prefix) else { return }
    if hasData { data.append(0x0A) }
    hasData = true
    let start = line.count > prefix.count && line[prefix.count] == 0x20 ? prefix.count + 1 : prefix.count
    data.append(contentsOf: line[start...])
  }
}
