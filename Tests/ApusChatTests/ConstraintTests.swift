import ApusChat
import ApusCore
import ApusGrammar
import Testing

/// Whether a structural tag's format admits a text as a whole.
private func admits(_ format: JSONValue, _ texts: [String]) throws -> [Bool] {
  let specification = GrammarSpecification.structuralTag(
    (["type": "structural_tag", "format": format] as JSONValue).compactText)
  let vocabulary = TokenVocabulary(tokens: [], isSpecial: { _ in false }, endTokens: [])
  let grammar = try GrammarCompiler(vocabulary: vocabulary).compile(specification)
  return texts.map { text in
    let matcher = GrammarMatcher(grammar)
    for byte in text.utf8 where !matcher.accept(byte: byte) { return false }
    return matcher.isAccepting
  }
}

@Suite("Constraints as grammars")
struct ConstraintTests {
  @Test("The grammar engine takes the constraint of every format, and holds calls to their schemas")
  func everyFormat() throws {
    for format in ToolCallFormat.all {
      guard let constraint = ToolConstraint.make(tools: testTools, choice: .required, format: format) else { continue }
      let search = constraint.tags[2]
      let good = search.begin + #"{"query": "x"}"# + search.end
      let bad = search.begin + #"{"query": 1}"# + search.end
      let twice = good + constraint.separator + good
      #expect(
        try admits(constraint.format, [good, bad, "", "text", twice])
          == [true, false, false, false, !constraint.stopsAfterFirst], "\(format.name)")
    }
  }

  @Test("With auto, free text stays free up to the beginning of a call")
  func strictTools() throws {
    var tools = testTools
    tools.tools[2].isStrict = true
    let constraint = try #require(
      ToolConstraint.make(tools: tools, choice: .auto, format: .named("hermes")!))
    let call = constraint.tags[2].begin + #"{"query": "x"}"# + constraint.tags[2].end
    let other = constraint.tags[0].begin + #"{"days": "any"}"# + constraint.tags[0].end
    #expect(
      try admits(
        constraint.format,
        ["", "text", "text" + call, other, "<tool_call>text", call.replacing("\"x\"", with: "1"), "<tool_"])
        == [true, true, true, true, false, false, true])
  }

  @Test("After the chain of thought the constraint holds, and within it nothing does")
  func afterReasoning() throws {
    let constraint = try #require(
      ToolConstraint.make(tools: testTools, choice: .named("ping"), format: .named("hermes")!))
    let call = constraint.tags[0].begin + "{}" + constraint.tags[0].end
    let think = try #require(ReasoningFormat.named("qwen3"))
    #expect(
      try admits(
        think.format(before: constraint.format, isOpen: true),
        ["a <tool_call> b</think>\n\n" + call, "</think>" + call, call, "a</think>text", "a"])
        == [true, true, false, false, false])
    #expect(
      try admits(
        think.format(before: constraint.format, isOpen: nil),
        ["<think>\na</think>\n\n" + call, call, "a</think>" + call, "<think>a"]) == [true, true, false, false])
    let harmony = try #require(ReasoningFormat.named("gpt-oss"))
    let message = try #require(
      ToolConstraint.make(tools: testTools, choice: .named("ping"), format: .named("gpt-oss")!))
    let sent = message.tags[0].begin + "{}"
    #expect(
      try admits(
        harmony.format(before: message.format, isOpen: nil),
        [sent, "<|channel|>analysis<|message|>a<|end|><|start|>assistant" + sent, "<|channel|>final<|message|>a"])
        == [true, true, false])
    // JSON after the chain of thought.
    let json: JSONValue = ["type": "json_schema", "json_schema": ["type": "object"]]
    #expect(
      try admits(think.format(before: json, isOpen: true), ["a</think>\n\n{\"a\": 1}", "{}", "a</think>x"])
        == [true, false, false])
  }
}
