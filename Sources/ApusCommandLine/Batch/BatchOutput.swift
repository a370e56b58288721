import ApusCore
import Glibc

/// What an output file of an earlier run already holds.
package struct BatchOutput: Sendable {
  /// Names that have an answer or, unless failures are to be tried again, an error.
  package private(set) var finished: Set<String> = []
  /// How many of the lines kept are errors.
  package private(set) var failures = 0

  /// Nothing done yet.
  package init() {}

  /// Reads what an earlier run wrote and makes the file ready to be continued: a last line that was cut off is removed,
  /// and so are errors if they are to be tried again. Other content is left as it is.
  /// - Parameters:
  ///   - path: the output file; it need not exist.
  ///   - retriesFailures: whether lines with an error are removed and count as not done.
  /// - Throws: where the file holds a whole line that no run of this command wrote, so that nothing of the user's is
  ///   mixed up or lost.
  package static func resume(path: String, retriesFailures: Bool) throws(CommandFailure) -> BatchOutput {
    var output = BatchOutput()
    guard fileExists(path) else { return output }
    var kept = 0
    var removed = false
    var lines: [[UInt8]] = []
    let bytes = try readFile(path)
    var start = 0
    var number = 0
    while start < bytes.count {
      number += 1
      guard let end = bytes[start...].firstIndex(of: 0x0A) else {
        // The last run died while it wrote this line.
        removed = true
        break
      }
      let line = Array(bytes[start..<end])
      start = end + 1
      if line.isEmpty { continue }
      guard let value = try? JSONValue.parse(line), let id = value["id"], value["text"] != nil || value["error"] != nil
      else {
        throw CommandFailure(
          "Line \(number) of \(path) is not an answer of 'apus generate'; name another output file.",
          status: ExitStatus.invalidInput)
      }
      if value["error"] != nil {
        if retriesFailures {
          removed = true
          continue
        }
        output.failures += 1
      }
      output.finished.insert(id.compactText)
      kept += 1
      lines.append(line)
    }
    if removed {
      var content: [UInt8] = []
      for line in lines { content += line + [0x0A] }
      try writeFile(path, content)
    }
    return output
  }
}
