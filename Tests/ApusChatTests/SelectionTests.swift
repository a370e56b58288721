import ApusChat
import ApusCore
import Testing

@Suite("Selection and constraints")
struct SelectionTests {
  @Test("Names and aliases are unique and found in any spelling")
  func names() throws {
    var seen: Set<String> = []
    for format in ToolCallFormat.all {
      for name in [format.name] + format.aliases {
        #expect(seen.insert(name.lowercased().replacing("-", with: "_")).inserted, "\(name)")
        #expect(ToolCallFormat.named(name.uppercased())?.name == format.name)
      }
    }
    seen = []
    for format in ReasoningFormat.all {
      for name in [format.name] + format.aliases {
        seen.insert(name.lowercased().replacing("-", with: "_"))
        #expect(ReasoningFormat.named(name) != nil)
      }
    }
    #expect(ToolCallFormat.named("nonsense") == nil)
    #expect(ToolCallFormat.named("qwen25")?.name == "hermes")
    #expect(ReasoningFormat.named("deepseek_r1")?.name == "deepseek-r1")
  }

  @Test(
    "The markers of a template or of the vocabulary pick the formats",
    arguments: [
      ("{{ '<tool_call>' }}{% if x %}<think>{% endif %}", "hermes", "qwen3"),
      ("<minimax:tool_call><think>", "minimax-m2", "minimax"),
      ("<|tool_calls_section_begin|><think></think>", "kimi_k2", "kimi_k2"),
      ("<|tool_calls_section_begin|>", "kimi_k2", nil),
      ("<｜DSML｜invoke", "deepseekv32", nil),
      ("respond with <|tool_call|> followed by a JSON list. Here is my thought process:", "granite", "granite"),
      ("<|tool|>{{ tools }}<|/tool|>", "phi4", nil),
      ("<tool_call><function=a><parameter=b>", "qwen3_coder", nil),
      ("<steptml:invoke", "step3", "step3"),
      ("<｜Assistant｜>{{ x.split('</think>') }}", nil, "deepseek-r1"),
      ("{% if thinking %}<｜Assistant｜><think>{% else %}</think>", nil, "deepseek-v3"),
      ("[AVAILABLE_TOOLS][TOOL_CALLS][THINK]", "mistral", "mistral"),
      ("{{ messages }}", nil, nil),
    ] as [(String, String?, String?)])
  func detection(template: String, calls: String?, reasoning: String?) {
    #expect(ToolCallFormat.detect(template: template)?.name == calls)
    #expect(ReasoningFormat.detect(template: template)?.name == reasoning)
  }

  @Test("Where the template is silent, special tokens decide")
  func specialTokens() {
    #expect(ToolCallFormat.detect(template: "", specialTokens: ["[TOOL_CALLS]"])?.name == "mistral")
    #expect(ToolCallFormat.detect(template: "", specialTokens: ["<tool_call>"])?.name == "hermes")
    #expect(ReasoningFormat.detect(template: "", specialTokens: ["[THINK]"])?.name == "mistral")
  }

  @Test("A prompt tells whether it leaves the chain of thought open")
  func openPrompts() throws {
    let think = try #require(ReasoningFormat.named("qwen3"))
    #expect(think.isOpen(atEndOf: "<|im_start|>assistant\n<think>\n") == true)
    #expect(think.isOpen(atEndOf: "<|im_start|>assistant\n<think>\n\n</think>\n\n") == false)
    #expect(think.isOpen(atEndOf: "<think>x</think> before<|im_start|>assistant\n") == nil)
    #expect(think.isOpen(atEndOf: "assistant\n<think>\nI was", isContinued: true) == true)
    #expect(think.isOpen(atEndOf: "assistant\n<think>\nI was</think> so", isContinued: true) == false)
    #expect(think.isOpen(atEndOf: "assistant\nso", isContinued: true) == nil)
    #expect(ReasoningFormat.named("gpt-oss")?.isOpen(atEndOf: "<think>") == nil)
  }

  @Test("Required and named calls become constraints whose regions the parser reads back")
  func constraints() throws {
    for format in ToolCallFormat.all {
      guard let constraint = ToolConstraint.make(tools: testTools, choice: .required, format: format) else {
        // Arguments that are no JSON have no schema to hold them to.
        #expect(
          ["deepseekv32", "minimax-m2", "step3", "glm45", "qwen3_coder", "pythonic"].contains(format.name))
        continue
      }
      #expect(constraint.tags.count == 3 && constraint.isRequired && !constraint.allowsText)
      for (tag, tool) in zip(constraint.tags, testTools.tools) {
        #expect(constraint.triggers.contains { tag.begin.hasPrefix($0) })
        #expect(tag.schema == tool.parameters)
        let text = tag.begin + "{\"query\": \"x\"}" + tag.end
        let parser = ChatOutputParser(calls: format, tools: testTools)
        #expect(
          try pieces(events(parser, Array(text.utf8), cuts: [])) == [.call(tool.name, ["query": "x"])], "\(format.name)"
        )
        if !constraint.stopsAfterFirst {
          let twice = text + constraint.separator + text
          #expect(try pieces(events(parser, Array(twice.utf8), cuts: [])).count == 2, "\(format.name)")
        }
      }
    }
  }

  @Test("Choices decide which tools are enforced, and how often")
  func choices() throws {
    let hermes = try #require(ToolCallFormat.named("hermes"))
    #expect(ToolConstraint.make(tools: testTools, choice: .auto, format: hermes) == nil)
    #expect(ToolConstraint.make(tools: testTools, choice: .none, format: hermes) == nil)
    #expect(ToolConstraint.make(tools: testTools, choice: .named("nobody"), format: hermes) == nil)
    let named = try #require(ToolConstraint.make(tools: testTools, choice: .named("ping"), format: hermes))
    #expect(named.tags.map(\.begin) == ["<tool_call>\n{\"name\": \"ping\", \"arguments\": "])
    #expect(named.tags.map(\.end) == ["}\n</tool_call>"])
    #expect(named.stopsAfterFirst)
    let single = ToolConstraint.make(
      tools: testTools, choice: .required, format: hermes, allowsParallelCalls: false)
    #expect(single?.stopsAfterFirst == true)
    var strict = testTools
    strict.tools[2].isStrict = true
    let auto = try #require(ToolConstraint.make(tools: strict, choice: .auto, format: hermes))
    #expect(!auto.isRequired && auto.allowsText && auto.triggers == ["<tool_call>"])
    #expect(auto.tags.map(\.schema) == [["type": "object"], ["type": "object"], testTools.tools[2].parameters!])
    #expect(auto.format["type"] == "triggered_tags")
    #expect(named.format["type"] == "tags_with_separator")
    // After the chain of thought, if the prompt leaves it open; either way, if it does not tell.
    let think = try #require(ReasoningFormat.named("qwen3"))
    #expect(think.format(before: named.format, isOpen: false) == named.format)
    let open = think.format(before: named.format, isOpen: true)
    #expect(open["elements"]?[0]?["begin"] == "" && open["elements"]?[0]?["end"] == "</think>")
    #expect(open["elements"]?[2] == named.format)
    let either = think.format(before: named.format, isOpen: nil)
    #expect(either["elements"]?[0]?["elements"]?[0]?["begin"] == "<think>" && either["elements"]?[1] == named.format)
  }
}
