import ApusCommandLine
import ApusCore
import Testing

@Suite struct ChatTests {
  @Test(arguments: [
    ("", ChatInput.empty), ("   ", .empty), ("Hello there ", .message("Hello there")), ("//etc", .message("/etc")),
    ("/help", .help), ("/?", .help), ("/RESET", .reset), ("/system", .system(nil)),
    ("/system Be brief.", .system("Be brief.")), ("/system none", .system("")), ("/set", .showSettings),
    ("/set temperature 0.7", .set(name: "temperature", value: "0.7")),
    ("/set top_p=0.9", .set(name: "top_p", value: "0.9")), ("/save a b.json", .save("a b.json")),
    ("/load x", .load("x")), ("/undo", .undo), ("/retry", .retry), ("/history", .history), ("/exit", .exit),
    ("/quit", .exit),
  ])
  func lines(_ line: String, _ expected: ChatInput) {
    #expect(ChatInput(line) == expected)
  }

  @Test(arguments: ["/undo now", "/save", "/load", "/set temperature", "/histor", "/nothinglikethis"])
  func mistakes(_ line: String) {
    guard case .mistake(let sentence) = ChatInput(line) else {
      Issue.record("\(line) was taken for \(ChatInput(line))")
      return
    }
    #expect(!sentence.isEmpty)
    if line == "/histor" { #expect(sentence.contains("'/history'")) }
  }

  @Test func turnsAreTakenBackAndAskedAgain() {
    var session = ChatSession(system: "S")
    session.ask("one")
    session.answer("1")
    session.ask("two")
    session.answer("2")
    #expect(session.messages.map(\.role) == ["system", "user", "assistant", "user", "assistant"])
    #expect(session.retry() && session.turns.last == ChatMessage(role: "user", content: "two"))
    #expect(session.undo() == "two")
    #expect(session.turns.map(\.content) == ["one", "1"])
    #expect(session.undo() == "one" && session.undo() == nil && !session.retry())
    // A question that was never answered gives way to the next.
    session.ask("a")
    session.ask("b")
    #expect(session.turns.map(\.content) == ["b"])
    session.reset()
    #expect(session.turns.isEmpty && session.system == "S")
  }

  @Test func conversationsSurviveAFile() throws {
    var session = ChatSession(system: "Sé breve.")
    session.ask("¿Qué?\n\"así\"")
    session.answer("Nada 🐦")
    var loaded = ChatSession()
    try loaded.load(try JSONValue.parse(session.document.compactText))
    #expect(loaded.messages == session.messages)
    for text in [
      "{}", #"[{"role": "assistant", "content": "x"}]"#, #"[{"role": "user"}]"#,
      #"[{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]"#,
    ] {
      let document = try JSONValue.parse(text)
      #expect(throws: EngineError.self) { try loaded.load(document) }
      #expect(loaded.messages == session.messages)
    }
  }

  @Test func settings() throws {
    var values = SamplingValues()
    try values.set("temperature", to: "0.7")
    try values.set("top-k", to: "0")
    try values.set("stop", to: "END")
    #expect(values.applied(to: SamplingParameters()).topK == -1)
    #expect(values.description == #"temperature 0.7, top_k -1, stop ["END"]"#)
    try values.set("temperature", to: "default")
    #expect(values.temperature == nil)
    let before = values
    for (name, value) in [("temperature", "hot"), ("top_p", "2"), ("colour", "1"), ("max_tokens", "1.5")] {
      #expect(throws: EngineError.self) { try values.set(name, to: value) }
    }
    #expect(values == before)
  }

  private func type(_ keys: String, into buffer: inout LineBuffer) -> [LineBuffer.Outcome] {
    keys.utf8.map { buffer.feed($0) }.filter { $0 != .editing }
  }

  @Test(arguments: [
    ("abc\r", "abc"), ("abc\u{7F}d\r", "abd"), ("ab\u{1B}[DX\r", "aXb"), ("ab\u{1}X\u{5}Y\r", "XabY"),
    ("one two\u{17}three\r", "one three"), ("abc\u{15}x\r", "x"), ("abc\u{2}\u{2}\u{B}\r", "a"),
    ("äö🐦\u{7F}!\r", "äö!"), ("e\u{301}\u{7F}x\r", "x"), ("ab\u{1B}[D\u{1B}[3~\r", "a"), ("a\u{1B}[H!\r", "!a"),
    ("one two\u{1B}[1;5DX\r", "one Xtwo"), ("x\u{1B}[15~y\r", "xy"),
  ])
  func lineEditing(_ keys: String, _ expected: String) {
    var buffer = LineBuffer()
    #expect(type(keys, into: &buffer) == [.line(expected)])
  }

  @Test func historyAndDraft() {
    var buffer = LineBuffer(history: ["first", "second"])
    #expect(type("dra\u{1B}[A", into: &buffer).isEmpty && buffer.text == "second")
    #expect(type("\u{1B}[A\u{1B}[A", into: &buffer).isEmpty && buffer.text == "first")
    #expect(type("\u{1B}[B\u{1B}[B\u{1B}[B", into: &buffer).isEmpty && buffer.text == "dra")
  }

  @Test func controlKeys() {
    var buffer = LineBuffer()
    #expect(type("\u{3}", into: &buffer) == [.interrupt])
    #expect(type("abc\u{3}", into: &buffer) == [.cleared] && buffer.text.isEmpty)
    #expect(type("\u{4}", into: &buffer) == [.end])
    #expect(type("ab\u{1}\u{4}", into: &buffer).isEmpty && buffer.text == "b")
    #expect(type("\u{C}", into: &buffer) == [.redraw])
  }

  @Test func anyBytesAreSurvived() {
    var generator = SeededGenerator(seed: 23)
    var buffer = LineBuffer(history: ["a", "b"])
    for _ in 0..<20_000 {
      _ = buffer.feed(UInt8(truncatingIfNeeded: generator.next()))
      #expect((0...buffer.characters.count).contains(buffer.cursor), "seed 23")
    }
  }

  @Test func wideCharactersTakeTwoColumns() {
    #expect(columns(of: "a") == 1 && columns(of: "界") == 2 && columns(of: "🐦") == 2 && columns(of: "é") == 1)
  }
}
