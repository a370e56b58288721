import ApusChat
import ApusCore
import ApusGrammar
import ApusTokenization
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
    // A response format binds the final message alone, whatever messages come before it.
    let answer: JSONValue = ["type": "json_schema", "json_schema": ["type": "object"]]
    let thought = "<|channel|>analysis<|message|>It is {not JSON.<|end|><|start|>assistant"
    let remark = "<|channel|>commentary<|message|>Let me see: [<|end|><|start|>assistant"
    let final = "<|channel|>final<|message|>"
    for isOpen in [nil, false] {
      #expect(
        try admits(
          harmony.format(beforeAnswer: answer, isOpen: isOpen),
          [
            final + "{}", thought + final + "{\"a\": 1}", thought + remark + thought + final + "{}",
            final + "{", thought + final + "no", thought, final + "{}" + final + "{}", "{}",
            "<|channel|>commentary to=functions.f<|message|>{}<|end|><|start|>assistant" + final + "{}",
          ]) == [true, true, true, false, false, false, false, false, false])
    }
    #expect(
      try admits(
        harmony.format(beforeAnswer: answer, isOpen: true),
        ["so: {<|end|><|start|>assistant" + final + "{}", "<|end|><|start|>assistant" + thought + final + "{}", "{}"])
        == [true, true, false])
    // JSON after the chain of thought.
    let json: JSONValue = ["type": "json_schema", "json_schema": ["type": "object"]]
    #expect(
      try admits(think.format(before: json, isOpen: true), ["a</think>\n\n{\"a\": 1}", "{}", "a</think>x"])
        == [true, false, false])
  }

  @Test(
    "With gpt-oss's tokens, messages before the final one are free and the final one is not",
    .enabled(if: SharedData.isPresent))
  func harmonyTokens() throws {
    let tokenizer = try Tokenizer.load(file: SharedData.root + "tokenizers/gpt-oss/derived_tokenizer.json")
    func token(_ text: String) throws -> TokenID {
      let tokens = try tokenizer.encode(text, addSpecialTokens: false)
      #expect(tokens.count == 1, "\(text)")
      return tokens[0]
    }
    let endOfAnswer = try token("<|return|>")
    let size = Int(try token("<|call|>")) + 1
    let vocabulary = TokenVocabulary(
      tokens: (0..<size).map { tokenizer.tokenBytes(TokenID($0)) }, isSpecial: { tokenizer.isSpecial($0) },
      endTokens: [endOfAnswer, try token("<|call|>")])
    let harmony = try #require(ReasoningFormat.named("gpt-oss"))
    let schema: JSONValue = [
      "type": "object", "properties": ["result": ["type": "integer"]], "required": ["result"],
      "additionalProperties": false,
    ]
    let format = harmony.format(beforeAnswer: ["type": "json_schema", "json_schema": schema], isOpen: nil)
    let grammar = try GrammarCompiler(vocabulary: vocabulary).compile(
      .structuralTag((["type": "structural_tag", "format": format] as JSONValue).compactText), whitespace: .fixed)
    let matcher = GrammarMatcher(grammar)
    func allows(_ text: String) throws -> Bool {
      let token = try token(text)
      return matcher.mask()[Int(token >> 5)] >> UInt32(token & 31) & 1 == 1
    }
    /// Takes a text's tokens, each of which the mask must allow.
    func take(_ text: String) throws {
      for token in try tokenizer.encode(text, addSpecialTokens: false) {
        let isAllowed = matcher.mask()[Int(token >> 5)] >> UInt32(token & 31) & 1 == 1
        #expect(isAllowed, "\(text): token \(token)")
        #expect(matcher.accept(token))
      }
    }
    #expect(try allows("<|channel|>") && !allows("Hello") && !allows("{"))
    try take("<|channel|>analysis<|message|>")
    // Within a thought any text, and no special token but its end.
    #expect(try allows("Hello") && allows("{") && allows("<|end|>"))
    #expect(try !allows("<|channel|>") && !allows("<|return|>") && !allows("<|call|>") && !allows("<|message|>"))
    try take("User asks: \u{201C}What is 2 + 2?\u{201D} So {\"result\": \"four\"}. \u{1F600}<|end|>")
    #expect(try allows("<|start|>") && !allows("<|return|>") && !allows("Hello"))
    try take("<|start|>assistant<|channel|>commentary<|message|>Easy.<|end|><|start|>assistant<|channel|>")
    #expect(try allows("analysis") && allows("comment") && allows("final") && !allows("Hello"))
    try take("final<|message|>")
    #expect(try !allows("Hello") && allows("{") && !allows("<|end|>") && !allows("<|return|>"))
    try take("{\"result\": 4")
    #expect(try !allows("<|return|>") && !allows(","))
    try take("}")
    #expect(try allows("<|return|>") && !allows("<|channel|>") && !allows(" "))
    #expect(matcher.accept(endOfAnswer) && matcher.isTerminated)
  }
}
