import ApusCore
import ApusHub
import ApusTokenization
import ArgumentParser
import Glibc

/// `apus tokenize`
struct Tokenize: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Turns text into token ids, or ids into text, with a model's tokenizer.",
    discussion: """
      Prints the ids of TEXT, or of standard input where TEXT is left out. With --jsonl each line of standard input is \
      {"text": "..."} or {"ids": [...]}, and is answered by one line {"ids": [...], "text": "..."}, where the text is what \
      the ids decode to; a line that cannot be answered gives {"error": "..."}. Special tokens in a text are recognised, \
      and the tokenizer's own (such as a beginning-of-sequence token) are added unless --no-special is given.

      Examples:
        apus tokenize --tokenizer models/Qwen2.5-0.5B-Instruct 'Hello, world!'
        apus tokenize --tokenizer tokenizer.json --no-special < book.txt
        apus tokenize --tokenizer models/Llama-3.2-1B --decode '128000 9906'
        echo '{"text": "Hello"}' | apus tokenize --tokenizer models/Llama-3.2-1B --jsonl
      """)

  @Option(
    help: ArgumentHelp(
      "A checkpoint directory, a tokenizer.json, tokenizer.model or tiktoken file, or OWNER/NAME of a hub.",
      valueName: "path"),
    completion: .file())
  var tokenizer: String
  @Argument(help: ArgumentHelp("The text; standard input if it is left out.", valueName: "text"))
  var text: String?
  @Flag(help: "Answers JSON lines from standard input, one each.")
  var jsonl = false
  @Flag(help: "Adds no special tokens of the tokenizer's own.")
  var noSpecial = false
  @Flag(help: "Leaves special tokens out of decoded text.")
  var skipSpecial = false
  @Flag(help: "The text is ids, separated by white space or commas: prints what they decode to.")
  var decode = false
  @Flag(help: "Prints each token on a line of its own, with its id and its text.")
  var pieces = false

  func validate() throws {
    if jsonl && (text != nil || decode || pieces) {
      throw ValidationError("--jsonl reads standard input; it goes with neither a text nor --decode nor --pieces.")
    }
    if decode && pieces { throw ValidationError("--decode prints text and --pieces prints tokens; keep one of them.") }
  }

  func run() async throws {
    let tokenizer = try await locateModel(tokenizer, for: .tokenizer).path
    let loaded =
      isDirectory(tokenizer) ? try Tokenizer.load(directory: tokenizer) : try Tokenizer.load(file: tokenizer)
    if jsonl { return try answerLines(loaded) }
    let bytes = if let text { Array(text.utf8) } else { try readFile("-") }
    if decode {
      let ids = try ids(inText: String(decoding: bytes, as: UTF8.self))
      Terminal.output.line(loaded.decode(ids, skipSpecialTokens: skipSpecial))
      return
    }
    let ids = try loaded.encode(bytes: bytes, addSpecialTokens: !noSpecial)
    if pieces {
      for id in ids {
        let text = String(decoding: loaded.tokenBytes(id), as: UTF8.self)
        Terminal.output.line("\("\(id)".aligned(8))  \(JSONValue.string(text).compactText)")
      }
    } else {
      Terminal.output.line(ids.map { "\($0)" }.joined(separator: " "))
    }
  }

  private func ids(inText text: String) throws(CommandFailure) -> [TokenID] {
    var ids: [TokenID] = []
    for word in text.split(whereSeparator: { $0.isWhitespace || ",[]".contains($0) }) {
      guard let id = TokenID(word) else {
        throw CommandFailure("'\(word)' is no token id.", status: ExitStatus.invalidInput)
      }
      ids.append(id)
    }
    return ids
  }

  private func answerLines(_ tokenizer: Tokenizer) throws {
    let reader = try LineReader(path: "-")
    let output = try LineAppender(path: "-")
    while let line = try reader.next() {
      if line.isEmpty { continue }
      var writer = JSONWriter(capacity: line.count * 2 + 64)
      do throws(EngineError) {
        let ids = try answer(line, tokenizer)
        let text = tokenizer.decode(ids, skipSpecialTokens: skipSpecial)
        writer.object { writer in
          writer.key("ids")
          writer.array { writer in for id in ids { writer.value(Int(id)) } }
          writer.member("text", text)
        }
      } catch {
        writer.object { $0.member("error", error.message) }
      }
      try output.append(writer.text)
    }
  }

  private func answer(_ line: [UInt8], _ tokenizer: Tokenizer) throws(EngineError) -> [TokenID] {
    let value: JSONValue
    do throws(JSONError) { value = try JSONValue.parse(line) } catch {
      throw EngineError(.invalidRequest, "The line is not JSON: \(error).")
    }
    if let text = value["text"]?.stringValue { return try tokenizer.encode(text, addSpecialTokens: !noSpecial) }
    guard let list = value["ids"]?.arrayValue else {
      throw EngineError(.invalidRequest, "A line needs 'text', a string, or 'ids', an array of token ids.")
    }
    var ids: [TokenID] = []
    ids.reserveCapacity(list.count)
    for element in list {
      guard let id = element.intValue.flatMap({ TokenID(exactly: $0) }) else {
        throw EngineError(.invalidRequest, "ids must hold token ids, got \(element.compactText).", parameter: "ids")
      }
      ids.append(id)
    }
    return ids
  }
}

/// Whether a path leads to a directory.
func isDirectory(_ path: String) -> Bool {
  var status = stat()
  return stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFDIR
}
