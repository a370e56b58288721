import ApusCore
import Glibc

/// A Python process that encodes with Hugging Face `tokenizers`, one request a line, so that both libraries can be measured
/// in turns on the same text.
final class HuggingFaceProcess {
  private let process: pid_t
  private let input: Int32
  private let output: Int32
  private var buffer: [UInt8] = []
  /// The library's version.
  private(set) var version = ""

  private static let program = """
    import json, sys, time, zlib, array
    import tokenizers
    print(json.dumps({"version": tokenizers.__version__}), flush=True)
    tokenizer = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "load" in request:
                start = time.thread_time()
                tokenizer = tokenizers.Tokenizer.from_file(request["load"])
                seconds = time.thread_time() - start
                tokenizer.no_truncation()
                tokenizer.no_padding()
                answer = {"seconds": seconds}
            else:
                documents = request["documents"]
                start = time.thread_time()
                encoded = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
                seconds = time.thread_time() - start
                ids = array.array("I")
                for one in encoded:
                    ids.extend(one.ids)
                del encoded
                answer = {"seconds": seconds, "tokens": len(ids), "checksum": zlib.adler32(ids.tobytes())}
        except Exception as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
    """

  /// Starts the interpreter at a path.
  init(python: String) throws(CommandFailure) {
    var down: [Int32] = [0, 0]
    var up: [Int32] = [0, 0]
    guard pipe(&down) == 0, pipe(&up) == 0 else { throw CommandFailure("Cannot make a pipe: \(systemError()).") }
    for end in down + up { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_adddup2(&actions, down[0], STDIN_FILENO)
    posix_spawn_file_actions_adddup2(&actions, up[1], STDOUT_FILENO)
    let words = [python, "-c", Self.program]
    var argv: [UnsafeMutablePointer<CChar>?] = words.map { strdup($0) } + [nil]
    // One thread each: the comparison is of the work, not of how it is spread.
    var variables: [UnsafeMutablePointer<CChar>?] = [
      strdup("TOKENIZERS_PARALLELISM=false"), strdup("RAYON_NUM_THREADS=1"),
    ]
    var variable = environ
    while let text = variable.pointee {
      if strncmp(text, "TOKENIZERS_", 11) != 0, strncmp(text, "RAYON_", 6) != 0 { variables.append(strdup(text)) }
      variable += 1
    }
    variables.append(nil)
    defer { for pointer in argv + variables { free(pointer) } }
    var process = pid_t()
    let status = posix_spawnp(&process, python, &actions, nil, &argv, &variables)
    close(down[0])
    close(up[1])
    guard status == 0 else {
      close(down[1])
      close(up[0])
      throw CommandFailure("Cannot start \(python): \(String(cString: strerror(status))).")
    }
    self.process = process
    input = down[1]
    output = up[0]
    version = try answer()["version"]?.stringValue ?? ""
  }

  deinit {
    close(input)
    close(output)
    var status: Int32 = 0
    while waitpid(process, &status, 0) < 0 && errno == EINTR {}
  }

  /// Loads a tokenizer.json; gives the seconds it took.
  func load(_ path: String) throws(CommandFailure) -> Double {
    try ask(["load": .string(path)])["seconds"]?.doubleValue ?? 0
  }

  /// Encodes documents without special tokens; gives the seconds, the number of tokens and a checksum of the ids.
  func encode(_ documents: [String]) throws(CommandFailure) -> (seconds: Double, tokens: Int, checksum: UInt32) {
    let result = try ask(["documents": .array(documents.map { .string($0) })])
    return (
      result["seconds"]?.doubleValue ?? 0, result["tokens"]?.intValue ?? 0,
      UInt32(truncatingIfNeeded: result["checksum"]?.intValue ?? 0)
    )
  }

  private func ask(_ request: JSONValue) throws(CommandFailure) -> JSONValue {
    let bytes = Array((request.compactText + "\n").utf8)
    guard bytes.withUnsafeBytes({ writeAll(input, $0) }) else {
      throw CommandFailure("The process with Hugging Face tokenizers ended; its message is above.")
    }
    let result = try answer()
    if let reason = result["error"]?.stringValue { throw CommandFailure("Hugging Face tokenizers failed: \(reason)") }
    return result
  }

  private func answer() throws(CommandFailure) -> JSONValue {
    var chunk = [UInt8](repeating: 0, count: 1 << 16)
    while true {
      if let end = buffer.firstIndex(of: 0x0A) {
        let line = Array(buffer[..<end])
        buffer.removeFirst(end + 1)
        if let value = try? JSONValue.parse(line) { return value }
        throw CommandFailure("The process with Hugging Face tokenizers answered with something else than JSON.")
      }
      let count = read(output, &chunk, chunk.count)
      if count < 0 && errno == EINTR { continue }
      guard count > 0 else {
        throw CommandFailure("The process with Hugging Face tokenizers ended; its message is above.")
      }
      buffer += chunk[0..<count]
    }
  }
}

/// Adler-32 of ids as 32-bit little-endian words (RFC 1950).
func adler32(_ ids: [TokenID]) -> UInt32 {
  var low: UInt32 = 1
  var high: UInt32 = 0
  for id in ids {
    var word = UInt32(bitPattern: id)
    for _ in 0..<4 {
      low = (low + word & 0xFF) % 65521
      high = (high + low) % 65521
      word >>= 8
    }
  }
  return high << 16 | low
}
