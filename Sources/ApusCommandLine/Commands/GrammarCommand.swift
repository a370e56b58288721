import ApusCore
import ApusGrammar
import ApusTokenization
import ArgumentParser

/// How schemas are read, as flags.
struct GrammarOptions: ParsableArguments {
  @Option(help: ArgumentHelp("Order of an object's members: any, or declared (as when serving).", valueName: "order"))
  var order = Order.any
  @Option(
    help: ArgumentHelp("White space in JSON: flexible, fixed (a space after : and ,) or compact.", valueName: "policy"))
  var whitespace = GrammarSpecification.Whitespace.flexible
  @Flag(help: "Reads schemas as OpenAI's strict mode does.")
  var strict = false
  @Flag(help: "Ignores what cannot be enforced in a schema instead of refusing it.")
  var lenient = false

  enum Order: String, ExpressibleByArgument, CaseIterable { case any, declared }

  var schema: GrammarSpecification.SchemaOptions {
    var options = GrammarSpecification.SchemaOptions()
    options.propertyOrder = order == .any ? .any : .declared
    options.whitespace = whitespace
    // Where members may come in any order, what is asked is whether a text is valid and not what a model should write.
    options.plainNumbers = order == .declared
    options.isStrict = strict
    options.isLenient = lenient
    return options
  }

  /// The grammar that a JSON line names.
  func specification(_ value: JSONValue) throws(EngineError) -> GrammarSpecification {
    var found: [GrammarSpecification] = []
    if let schema = value["schema"] { found.append(.jsonSchema(schema.stringValue ?? schema.compactText, self.schema)) }
    for (key, make) in [
      ("regex", GrammarSpecification.regex), ("ebnf", GrammarSpecification.ebnf),
    ] as [(String, (String) -> GrammarSpecification)] {
      guard let member = value[key] else { continue }
      guard let text = member.stringValue else { throw EngineError(.invalidRequest, "'\(key)' must be a string") }
      found.append(make(text))
    }
    if let choices = value["choices"] {
      guard let list = choices.arrayValue else {
        throw EngineError(.invalidRequest, "'choices' must be a list of strings")
      }
      var texts: [String] = []
      for choice in list {
        guard let text = choice.stringValue else {
          throw EngineError(.invalidRequest, "'choices' must be a list of strings")
        }
        texts.append(text)
      }
      found.append(.choices(texts))
    }
    if let tag = value["structural_tag"] { found.append(.structuralTag(tag.stringValue ?? tag.compactText)) }
    if value["json_object"]?.boolValue == true { found.append(.jsonObject) }
    guard found.count == 1 else {
      throw EngineError(
        .invalidRequest,
        "A line needs one of 'schema', 'regex', 'ebnf', 'choices', 'structural_tag' and 'json_object'")
    }
    return found[0]
  }
}

/// `apus grammar`
struct GrammarCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "grammar",
    abstract: "Compiles grammars of constrained decoding and says which texts they accept.",
    discussion: """
      With --jsonl each line of standard input holds a grammar and texts: {"schema" | "regex" | "ebnf" | "choices" | \
      "structural_tag": ..., "instances": ["text", ...]} ("json_object": true stands for any JSON object). It is answered by \
      {"compiled": true, "compile_us": ..., "accepts": [true, ...]}, or by {"compiled": false, "reason": ...} if the grammar \
      is wrong or cannot be enforced.

      A text is accepted if the matcher takes all of its bytes and the text may end there. With --tokenizer the text is \
      tokenized as well, and the tokens must be allowed one after the other by the masks that would constrain a model, and the \
      end of the sequence after the last; "mask_us_max" then is the time of the slowest mask.

      A regex must match the whole text. An EBNF grammar is in the dialect of llama.cpp (GBNF) or of the W3C; its root is \
      the rule named root. Without --jsonl one grammar is read from the flags, and the texts from standard input, a line each.

      Examples:
        apus grammar --regex '[a-z]+@[a-z]+[.]com' <<< 'swift@example.com'
        apus grammar --schema schema.json --order declared < answers.txt
        echo '{"ebnf": "root ::= \\"a\\" root | \\"b\\"", "instances": ["aab", "aa"]}' | apus grammar --jsonl
        apus grammar --jsonl --tokenizer models/Qwen2.5-0.5B-Instruct < cases.jsonl
      """)

  @Flag(help: "Reads grammars and texts as JSON lines from standard input.")
  var jsonl = false
  @Option(
    help: ArgumentHelp(
      "A checkpoint directory or a tokenizer's file: texts are checked with token masks, too.", valueName: "path"),
    completion: .file())
  var tokenizer: String?
  @Option(help: ArgumentHelp("A file with a JSON Schema.", valueName: "path"), completion: .file())
  var schema: String?
  @Option(help: ArgumentHelp("A regular expression.", valueName: "pattern"))
  var regex: String?
  @Option(help: ArgumentHelp("A file with an EBNF grammar.", valueName: "path"), completion: .file())
  var ebnf: String?
  @OptionGroup var options: GrammarOptions

  func validate() throws {
    let count = [schema, regex, ebnf].compactMap(\.self).count
    if jsonl, count > 0 { throw ValidationError("--jsonl reads grammars from standard input; leave the others out.") }
    if !jsonl, count != 1 { throw ValidationError("Give --jsonl, or one of --schema, --regex and --ebnf.") }
  }

  func run() throws {
    let checker = GrammarChecker(tokenizer: try tokenizer.map { try loadTokenizer($0) })
    let reader = try LineReader(path: "-")
    let output = try LineAppender(path: "-")
    if jsonl {
      while let line = try reader.next() {
        if line.isEmpty { continue }
        try output.append(checker.answer(line, options))
      }
      return
    }
    let specification: GrammarSpecification =
      if let schema {
        .jsonSchema(String(decoding: try readFile(schema), as: UTF8.self), options.schema)
      } else if let ebnf {
        .ebnf(String(decoding: try readFile(ebnf), as: UTF8.self))
      } else {
        .regex(regex ?? "")
      }
    let grammar = try checker.compiler.compile(specification)
    while let line = try reader.next() {
      let text = String(decoding: line, as: UTF8.self)
      try output.append(try checker.check(text, grammar).accepted ? "accepted" : "rejected")
    }
  }
}

/// Loads a tokenizer from a directory or a file.
func loadTokenizer(_ path: String) throws -> Tokenizer {
  guard fileExists(path) else {
    throw CommandFailure("There is no file or directory '\(path)'.", status: ExitStatus.missingInput)
  }
  return isDirectory(path) ? try Tokenizer.load(directory: path) : try Tokenizer.load(file: path)
}

extension TokenVocabulary {
  /// The vocabulary of a tokenizer. Its end-of-sequence token ends texts.
  convenience init(_ tokenizer: Tokenizer) {
    self.init(
      tokens: (0..<tokenizer.vocabularySize).map { tokenizer.tokenBytes(TokenID($0)) },
      isSpecial: { tokenizer.isSpecial($0) }, endTokens: [tokenizer.eosID].compactMap(\.self))
  }
}

/// Compiles grammars and checks texts.
struct GrammarChecker {
  let tokenizer: Tokenizer?
  let compiler: GrammarCompiler

  init(tokenizer: Tokenizer?) {
    self.tokenizer = tokenizer
    let vocabulary =
      tokenizer.map { TokenVocabulary($0) } ?? TokenVocabulary(tokens: [], isSpecial: { _ in false }, endTokens: [])
    compiler = GrammarCompiler(vocabulary: vocabulary, capacity: 1)
  }

  func answer(_ line: [UInt8], _ options: GrammarOptions) -> String {
    var writer = JSONWriter(capacity: 256)
    var seconds = 0.0
    do throws(EngineError) {
      let value: JSONValue
      do throws(JSONError) { value = try JSONValue.parse(line) } catch {
        throw EngineError(.invalidRequest, "The line is not JSON: \(error)")
      }
      let specification = try options.specification(value)
      var texts: [String] = []
      for instance in value["instances"]?.arrayValue ?? [] {
        guard let text = instance.stringValue else {
          throw EngineError(.invalidRequest, "'instances' must be a list of strings")
        }
        texts.append(text)
      }
      let start = monotonicSeconds()
      let grammar = try compiler.compile(specification)
      seconds = monotonicSeconds() - start
      var accepts: [Bool] = []
      var slowest = 0.0
      for text in texts {
        let result = try check(text, grammar)
        accepts.append(result.accepted)
        slowest = max(slowest, result.slowestMask)
      }
      writer.object { writer in
        writer.member("compiled", true)
        writer.member("compile_us", Int((seconds * 1e6).rounded()))
        writer.key("accepts")
        writer.array { writer in for accepted in accepts { writer.value(accepted) } }
        if tokenizer != nil { writer.member("mask_us_max", Int((slowest * 1e6).rounded())) }
      }
    } catch {
      writer = JSONWriter(capacity: 256)
      writer.object { writer in
        writer.member("compiled", false)
        writer.member("reason", error.message)
      }
    }
    return writer.text
  }

  /// Whether a grammar accepts a text, byte by byte and, with a tokenizer, token by token.
  func check(_ text: String, _ grammar: CompiledGrammar) throws(EngineError) -> (accepted: Bool, slowestMask: Double) {
    let bytes = GrammarMatcher(grammar)
    let accepted = bytes.accept(bytes: text.utf8) == text.utf8.count && bytes.isAccepting
    if let failure = bytes.failure { throw failure }
    guard let tokenizer else { return (accepted, 0) }
    var slowest = 0.0
    let byTokens = try walk(
      try tokenizer.encode(text, addSpecialTokens: false), GrammarMatcher(grammar)
    ) { slowest = max(slowest, $0) }
    return (accepted && byTokens, slowest)
  }

  /// Whether masks let a sequence of tokens pass, and its end.
  /// - Parameter measured: takes the seconds of each mask.
  func walk(_ tokens: [TokenID], _ matcher: GrammarMatcher, _ measured: (Double) -> Void) throws(EngineError) -> Bool {
    var mask = [UInt32](repeating: 0, count: matcher.grammar.vocabulary.maskWordCount)
    func fill() {
      let start = monotonicSeconds()
      mask.withUnsafeMutableBufferPointer { if let base = $0.baseAddress { matcher.fillMask(into: base) } }
      measured(monotonicSeconds() - start)
    }
    func allows(_ token: TokenID) -> Bool { mask[Int(token >> 5)] >> UInt32(token & 31) & 1 != 0 }
    for token in tokens {
      fill()
      if let failure = matcher.failure { throw failure }
      guard allows(token), matcher.accept(token) else { return false }
    }
    fill()
    if let failure = matcher.failure { throw failure }
    let ends = matcher.grammar.vocabulary.endTokens
    return ends.isEmpty ? matcher.isAccepting : ends.allSatisfy(allows)
  }
}
