import ApusCore
import ApusTokenization
import ArgumentParser
import Glibc

/// `apus bench tokenizer`
struct BenchTokenizer: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "tokenizer",
    abstract: "Measures tokenizers and chat templates: encoding, streamed decoding, loading, rendering.",
    discussion: """
      Encoding is measured on one thread, on one long document and on short ones of about 1 kB, over generated text: \
      English, code, Chinese, and words that never come back. Cold is a tokenizer just loaded, which has seen nothing; warm \
      is one that has seen other text of the same kind, as in a server: every round has a text of its own. Files given are \
      cut into as many parts as there are rounds. Times are of the thread's processor, so that a busy machine does not count.

      With --hf, Hugging Face tokenizers runs on the same texts in the same rounds, one thread each, in turns, by its \
      fastest call (encode_batch_fast, no special tokens), and the ids are compared.

      Examples:
        apus bench tokenizer --tokenizer models/Qwen2.5-0.5B-Instruct
        apus bench tokenizer --tokenizer llama3/tokenizer.json --tokenizer qwen/tokenizer.json --hf .venv/bin/python --json
        apus bench tokenizer --tokenizer tokenizer.json book.txt --kind english
      """)

  @Option(
    help: ArgumentHelp(
      "A checkpoint directory, or a tokenizer.json, tokenizer.model or tiktoken file. May be repeated.",
      valueName: "path"), completion: .file())
  var tokenizer: [String]
  @Argument(help: ArgumentHelp("Text files to encode besides the generated text.", valueName: "file"))
  var files: [String] = []
  @Option(
    help: ArgumentHelp(
      "Generated text: english, code, chinese, unique or none. May be repeated. Default: all.", valueName: "kind"))
  var kind: [String] = []
  @Option(help: ArgumentHelp("A Python with Hugging Face tokenizers, to compare with.", valueName: "python"))
  var hf: String?
  @Option(help: ArgumentHelp("Rounds of each measurement, whose median counts.", valueName: "count"))
  var rounds = 5
  @Option(help: ArgumentHelp("Size of a generated text.", valueName: "bytes"))
  var size = 1 << 20
  @Option(help: ArgumentHelp("Seed of the generated text.", valueName: "number"))
  var seed: UInt64 = 1
  @Option(
    help: ArgumentHelp(
      "A chat template to render: a file, a checkpoint or a built-in name. May be repeated. Default: chatml and the "
        + "checkpoints' own.", valueName: "path"))
  var template: [String] = []
  @Flag(help: "Prints JSON instead of the table.")
  var json = false
  @Option(help: ArgumentHelp("Writes the result as JSON; - is standard output.", valueName: "path"))
  var outputFile: String?

  func validate() throws {
    if tokenizer.isEmpty { throw ValidationError("--tokenizer is missing: name at least one.") }
    if rounds < 1 { throw ValidationError("--rounds must be at least 1, got \(rounds).") }
    if !(1024...(256 << 20)).contains(size) {
      throw ValidationError("--size must be from 1024 to \(256 << 20), got \(size).")
    }
    for name in kind where name != "none" && TokenizerTextKind(rawValue: name) == nil {
      throw ValidationError("--kind must be english, code, chinese, unique or none, got '\(name)'.")
    }
  }

  func run() throws {
    let texts = try texts()
    let reference = try hf.map { try HuggingFaceProcess(python: $0) }
    if let reference, !json {
      Terminal.output.line("Compared with Hugging Face tokenizers \(reference.version), one thread each.")
    }
    var results: [JSONValue] = []
    for path in tokenizer { results.append(try measure(path, texts, reference)) }
    var renders: [JSONValue] = []
    let paths = template.isEmpty ? ["chatml"] + tokenizer.filter(isDirectory) : template
    for path in paths {
      if let result = try measureTemplate(path) { renders.append(result) }
    }
    let result: JSONValue = [
      "rounds": .int(Int64(rounds)), "text_bytes": .int(Int64(size)), "seed": .int(Int64(bitPattern: seed)),
      "reference": reference.map { .string("tokenizers \($0.version)") } ?? .null, "tokenizers": .array(results),
      "templates": .array(renders), "peak_rss_bytes": .int(Int64(peakResidentBytes())),
    ]
    if json { try emit(result, to: "-") }
    if let outputFile { try emit(result, to: outputFile) }
  }

  // MARK: Texts

  /// A kind of text, with as many texts as there are rounds.
  private struct TextSet {
    var name: String
    var texts: [String]
  }

  private func texts() throws -> [TextSet] {
    var sets: [TextSet] = []
    let kinds = kind.isEmpty ? TokenizerTextKind.allCases : kind.compactMap { TokenizerTextKind(rawValue: $0) }
    for kind in kinds {
      sets.append(
        TextSet(
          name: kind.rawValue,
          texts: (0..<rounds).map { kind.text(size: size, seed: seed &* 1000 &+ UInt64($0)) }))
    }
    for file in files {
      let text = String(decoding: try readFile(file), as: UTF8.self)
      let length = text.utf8.count / rounds
      guard length >= 1024 else {
        throw CommandFailure(
          "\(file) is too short to be cut into \(rounds) texts of 1 kB.", status: ExitStatus.invalidInput)
      }
      sets.append(TextSet(name: file, texts: Array(pieces(of: text, length: length).prefix(rounds))))
    }
    return sets
  }

  /// Cuts a text into pieces of about so many bytes, at the ends of lines or sentences where there are any near.
  private func pieces(of text: String, length: Int) -> [String] {
    let bytes = Array(text.utf8)
    var result: [String] = []
    var start = 0
    while start < bytes.count {
      var end = min(start + length, bytes.count)
      if end < bytes.count {
        var cut = end
        while cut > start + length / 2, bytes[cut - 1] != 0x0A, bytes[cut - 1] != 0x20 { cut -= 1 }
        if cut > start + length / 2 { end = cut }
        while end < bytes.count, bytes[end] & 0xC0 == 0x80 { end += 1 }
      }
      result.append(String(decoding: bytes[start..<end], as: UTF8.self))
      start = end
    }
    return result
  }

  // MARK: Measuring

  private func load(_ path: String) throws -> Tokenizer {
    guard fileExists(path) else {
      throw CommandFailure("There is no file or directory '\(path)'.", status: ExitStatus.missingInput)
    }
    return isDirectory(path) ? try Tokenizer.load(directory: path) : try Tokenizer.load(file: path)
  }

  /// Seconds of this thread's processor time that a piece of work takes.
  private func seconds(_ body: () throws -> Void) rethrows -> Double {
    func now() -> Double {
      var time = timespec()
      clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)
      return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
    }
    let start = now()
    try body()
    return now() - start
  }

  private func measure(_ path: String, _ sets: [TextSet], _ reference: HuggingFaceProcess?) throws -> JSONValue {
    let file = isDirectory(path) ? path + "/tokenizer.json" : path
    let reference = file.hasSuffix(".json") && fileExists(file) ? reference : nil
    var loads: [Double] = []
    var referenceLoads: [Double] = []
    var tokenizer = try load(path)
    for _ in 0..<rounds {
      loads.append(try seconds { tokenizer = try load(path) })
      if let reference { referenceLoads.append(try reference.load(file)) }
    }
    let bytes = fileExists(file) ? try readFile(file).count : 0
    if !json {
      Terminal.output.line("\n\(path): \(grouped(tokenizer.vocabularySize)) tokens, \(byteSize(bytes))")
      var line = "Load: \(fixed(Summary(loads).median * 1000, 1)) ms"
      if reference != nil { line += ", Hugging Face \(fixed(Summary(referenceLoads).median * 1000, 1)) ms" }
      Terminal.output.line(line)
      let columns = ["MB/s", "ktokens/s"] + (reference == nil ? [] : ["HF MB/s", "ratio", "ids"])
      Terminal.output.line("Encoding".padded(34) + columns.map { $0.aligned(11) }.joined())
    }
    var encodings: [JSONValue] = []
    for set in sets {
      for isShort in [false, true] {
        let documents = set.texts.map { isShort ? pieces(of: $0, length: 1024) : [$0] }
        for isCold in [true, false] {
          encodings.append(
            try measureEncoding(path, file, set.name, documents, isShort: isShort, isCold: isCold, reference))
        }
      }
    }
    let decoding = try measureDecoding(tokenizer)
    if !json { Terminal.output.line("Decoding a streamed token: \(fixed(decoding * 1e9, 1)) ns") }
    return [
      "path": .string(path), "file_bytes": .int(Int64(bytes)), "vocabulary": .int(Int64(tokenizer.vocabularySize)),
      "load_ms": Summary(loads).json(scale: 1000),
      "reference_load_ms": reference == nil ? .null : Summary(referenceLoads).json(scale: 1000),
      "encoding": .array(encodings), "streamed_token_ns": .double(decoding * 1e9),
    ]
  }

  private func measureEncoding(
    _ path: String, _ file: String, _ name: String, _ documents: [[String]], isShort: Bool, isCold: Bool,
    _ reference: HuggingFaceProcess?
  ) throws -> JSONValue {
    var tokenizer = try load(path)
    if !isCold {
      // What is seen before the first round is the last round's text, which comes back when nothing of it is left.
      for document in documents[documents.count - 1] { _ = try tokenizer.encode(document, addSpecialTokens: false) }
      if let reference {
        _ = try reference.load(file)
        _ = try reference.encode(documents[documents.count - 1])
      }
    }
    var rates: [Double] = []
    var tokenRates: [Double] = []
    var referenceRates: [Double] = []
    var ratios: [Double] = []
    var isEqual = true
    // The warm-up's text is left out where there are others.
    let measured = isCold || documents.count == 1 ? documents[...] : documents.dropLast()
    for texts in measured {
      if isCold { tokenizer = try load(path) }
      let bytes = Double(texts.reduce(0) { $0 + $1.utf8.count })
      var ids: [[TokenID]] = []
      ids.reserveCapacity(texts.count)
      let own = try seconds {
        for text in texts { ids.append(try tokenizer.encode(text, addSpecialTokens: false)) }
      }
      rates.append(bytes / own / 1e6)
      let flat = Array(ids.joined())
      tokenRates.append(Double(flat.count) / own / 1e3)
      if let reference {
        if isCold { _ = try reference.load(file) }
        let other = try reference.encode(texts)
        referenceRates.append(bytes / other.seconds / 1e6)
        ratios.append(other.seconds / own)
        isEqual = isEqual && other.tokens == flat.count && other.checksum == adler32(flat)
      }
    }
    let rate = Summary(rates)
    let ratio = Summary(ratios)
    if !json {
      let title = "\(name), \(isShort ? "short" : "long"), \(isCold ? "cold" : "warm")"
      var columns = [fixed(rate.median, 1), fixed(Summary(tokenRates).median, 0)]
      if reference != nil {
        columns += [
          fixed(Summary(referenceRates).median, 1), fixed(ratio.median, 1), isEqual ? "equal" : "DIFFER",
        ]
      }
      Terminal.output.line("  " + title.padded(32) + columns.map { $0.aligned(11) }.joined())
    }
    return [
      "text": .string(name), "documents": .string(isShort ? "short" : "long"), "cold": .bool(isCold),
      "megabytes_per_second": rate.json(), "kilotokens_per_second": Summary(tokenRates).json(),
      "reference_megabytes_per_second": reference == nil ? .null : Summary(referenceRates).json(),
      "ratio": reference == nil ? .null : ratio.json(), "ids_equal": reference == nil ? .null : .bool(isEqual),
    ]
  }

  /// Seconds for a token of a stream: appended to a detokenizer, its text taken as a string.
  private func measureDecoding(_ tokenizer: Tokenizer) throws -> Double {
    let text = TokenizerTextKind.english.text(size: 1 << 16, seed: seed)
    let more = TokenizerTextKind.chinese.text(size: 1 << 16, seed: seed)
    let ids = try tokenizer.encode(text + more, addSpecialTokens: false)
    var times: [Double] = []
    for _ in 0..<max(rounds, 3) {
      var detokenizer = IncrementalDetokenizer(tokenizer)
      var length = 0
      let time = seconds {
        for id in ids { length += detokenizer.append(id).utf8.count }
        length += detokenizer.finish().utf8.count
      }
      if length > 0 { times.append(time / Double(ids.count)) }
    }
    return Summary(times).median
  }

  /// Renders a conversation of a system message and 20 turns of a user and an assistant, and one of 20 messages.
  private func measureTemplate(_ path: String) throws -> JSONValue? {
    let set = try RenderCommand(template: path).templates ?? ChatTemplateSet(.harmony)
    func conversation(_ count: Int) -> JSONValue {
      let texts = TokenizerTextKind.english.text(size: count * 300, seed: seed)
      let contents = pieces(of: texts, length: 250)
      var messages: [JSONValue] = [["role": "system", "content": "You are a helpful assistant."]]
      for index in 0..<count {
        messages.append([
          "role": index % 2 == 0 ? "user" : "assistant", "content": .string(contents[index % contents.count]),
        ])
      }
      if count % 2 == 0 { messages.append(["role": "user", "content": "Go on."]) }
      return .array(messages)
    }
    var rows: [JSONValue] = []
    for count in [20, 40] {
      let prompt = ChatPrompt(messages: conversation(count))
      var length = 0
      do throws(EngineError) {
        length = try set.render(prompt).utf8.count
      } catch {
        if !json { Terminal.output.line("Template \(path): not rendered, because: \(error.message)") }
        return nil
      }
      var times: [Double] = []
      for _ in 0..<max(200, rounds) {
        times.append(try seconds { length = max(length, try set.render(prompt).utf8.count) })
      }
      let summary = Summary(times)
      let messages = prompt.messages.arrayValue?.count ?? 0
      if !json {
        Terminal.output.line(
          "Template \(path): \(messages) messages, \(length) bytes in \(fixed(summary.median * 1e6, 1)) us")
      }
      rows.append([
        "messages": .int(Int64(messages)), "bytes": .int(Int64(length)), "microseconds": summary.json(scale: 1e6),
      ])
    }
    return ["template": .string(path), "conversations": .array(rows)]
  }
}
