import ApusCore
import ApusTokenization
import Foundation
import Testing

private func user(_ content: JSONValue) -> JSONValue { ["role": "user", "content": content] }
private func assistant(_ content: JSONValue) -> JSONValue { ["role": "assistant", "content": content] }

private let chatML = BuiltInChatTemplates.source(named: "chatml")!
private let partsTemplate = """
  {%- for message in messages -%}
  {{- message.role }}:{% for part in message.content %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %};
  {%- endfor -%}
  """

@Suite("Conversations")
struct TemplateConversationTests {
  @Test("The content format is read from the template's loops")
  func contentFormat() throws {
    let string = [
      chatML, "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}", "{{ messages[0].content }}",
      "{% for tool in tools %}{{ tool.content }}{% endfor %}",
    ]
    let parts = [
      partsTemplate,
      "{% for m in messages %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{% endfor %}{% endfor %}",
      "{% set loop_messages = messages[1:] %}{% for m in loop_messages %}{% set c = m['content'] %}{% for p in c %}{% endfor %}{% endfor %}",
      "{% macro render(content) %}{% for item in content %}{% endfor %}{% endmacro %}{% for m in messages %}{{ render(m.content) }}{% endfor %}",
    ]
    for source in string { #expect(try ChatTemplate(source: source).contentFormat == .string, "\(source)") }
    for source in parts { #expect(try ChatTemplate(source: source).contentFormat == .parts, "\(source)") }
  }

  @Test("Content is put into the format that the template reads")
  func contentConversion() throws {
    let text: JSONValue = ["type": "text", "text": "a"]
    let prompt = ChatPrompt(messages: [user([text, ["type": "text", "text": "b"]])], addGenerationPrompt: false)
    #expect(try ChatTemplate(source: chatML).render(prompt) == "<|im_start|>user\na\nb<|im_end|>\n")
    let plain = ChatPrompt(messages: [user("hi"), user([text, ["type": "image"]])])
    #expect(try ChatTemplate(source: partsTemplate).render(plain) == "user:hi;user:a<image>;")
  }

  @Test("A template that asks what content it has gets strings as they are")
  func eitherFormat() throws {
    let source =
      "{% for m in messages %}{% if m.content is string %}S{{ m.content }}{% else %}{% for p in m.content %}P{{ p.text }}"
      + "{% endfor %}{% endif %}{% endfor %}"
    let messages: JSONValue = [user("a"), user([["type": "text", "text": "b"]])]
    #expect(try ChatTemplate(source: source).render(ChatPrompt(messages: messages)) == "SaPb")
  }

  @Test("Templates that join arguments to a text, and those that ask for a null content, get them")
  func textArguments() throws {
    func calls(_ arguments: JSONValue, content: JSONValue = nil) -> ChatPrompt {
      ChatPrompt(messages: [
        ["role": "assistant", "content": content, "tool_calls": [["function": ["name": "f", "arguments": arguments]]]]
      ])
    }
    let joined = try ChatTemplate(
      source: "{% for m in messages %}{% if m['content'] is none %}{% for c in m['tool_calls'] %}"
        + "{{ c['function']['name'] + c['function']['arguments'] }}{% endfor %}{% else %}{{ m['content'] }}{% endif %}"
        + "{% endfor %}")
    #expect(try joined.render(calls("{\"a\":  1}")) == "f{\"a\":  1}")
    #expect(try joined.render(calls("{}", content: "x")) == "x")
    // Many clients write no content as the empty text.
    #expect(try joined.render(calls("{\"a\":  1}", content: "")) == "f{\"a\":  1}")
    #expect(throws: EngineError.self) { try joined.render(calls(["a": 1])) }
    let objects = try ChatTemplate(
      source:
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}")
    #expect(try objects.render(calls("{\"a\":  1}")) == "{\"a\": 1}")
    // No text is no arguments.
    for blank in ["", " \n"] as [JSONValue] { #expect(try objects.render(calls(blank)) == "{}") }
    // What neither form mends is told as it came first.
    let broken = try ChatTemplate(
      source: "{{ raise_exception(messages[0].tool_calls[0].function.arguments | string) }}")
    let error = #expect(throws: EngineError.self) { try broken.render(calls("{\"a\":1}")) }
    #expect(error?.message == "{'a': 1}")
  }

  @Test("Null members count as absent, and reasoning is found under its names")
  func normalization() throws {
    let source = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    let messages: JSONValue = [["role": "assistant", "content": nil, "tool_calls": nil, "reasoning": "r"]]
    #expect(
      try ChatTemplate(source: source).render(ChatPrompt(messages: messages))
        == #"{"thinking": "r", "role": "assistant", "reasoning": "r", "reasoning_content": "r"}"#)
  }

  @Test("Arguments of tool calls are parsed, unless that is turned off")
  func toolArguments() throws {
    let call: JSONValue = ["function": ["name": "f", "arguments": "{\"b\": 1, \"a\": [null]}"]]
    let prompt = ChatPrompt(messages: [["role": "assistant", "content": nil, "tool_calls": [call]]])
    var template = try ChatTemplate(source: "{{ messages[0].tool_calls[0].function.arguments | tojson }}")
    #expect(try template.render(prompt) == "{\"b\": 1, \"a\": [null]}")
    template.parsesToolArguments = false
    #expect(try template.render(prompt) == #""{\"b\": 1, \"a\": [null]}""#)
  }

  @Test("Variables: tools are none when not given, special tokens can be overridden")
  func variables() throws {
    let template = try ChatTemplate(
      source: "{{ tools }}{{ bos_token }}{{ pad_token }}{{ enable }}{{ add_generation_prompt }}")
    let prompt = ChatPrompt(messages: [user("x")], variables: ["enable": true, "pad_token": "P"])
    #expect(try template.render(prompt, bosToken: "<s>", specialTokens: ["pad_token": "p"]) == "None<s>PTrueTrue")
    #expect(throws: EngineError.self) { try template.render(ChatPrompt(messages: "x")) }
    #expect(throws: EngineError.self) { try template.render(ChatPrompt(messages: ["x"])) }
  }

  @Test("A final message is continued where it ends")
  func continuation() throws {
    let template = try ChatTemplate(source: chatML)
    func prompt(_ content: JSONValue) -> ChatPrompt {
      ChatPrompt(
        messages: [user("q"), assistant(content)], addGenerationPrompt: false, continueFinalMessage: true)
    }
    let start = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    #expect(try template.render(prompt("The answer is ")) == start + "The answer is ")
    #expect(try template.render(prompt([["type": "text", "text": "So"]])) == start + "So")
    let trimming = try ChatTemplate(source: "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
    #expect(try trimming.render(prompt("a b  ")) == "[q][a b")
    #expect(throws: EngineError.self) { try ChatTemplate(source: "{{ messages[0].content }}").render(prompt("lost")) }
    #expect(throws: EngineError.self) { try template.render(prompt(nil)) }
    var both = prompt("x")
    both.addGenerationPrompt = true
    #expect(throws: EngineError.self) { try template.render(both) }
  }

  @Test("Built-in templates")
  func builtIn() throws {
    let conversation = ChatPrompt(
      messages: [["role": "system", "content": "Be brief."], user("Hi"), assistant("Hello"), user("2+2?")])
    func render(_ name: String) throws -> String {
      let template = try #require(try BuiltInChatTemplates.template(named: name))
      return try template.render(conversation, bosToken: "<s>", eosToken: "</s>")
    }
    #expect(
      try render("llama-2")
        == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] 2+2? [/INST]")
    #expect(try render("mistral") == "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] 2+2? [/INST]")
    #expect(
      try render("llama-3")
        == "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
        + "\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user"
        + "<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    #expect(
      try render("gemma")
        == "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        + "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n")
    #expect(
      try render("zephyr")
        == "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\n2+2?</s>\n<|assistant|>\n")
    #expect(try render("vicuna") == "Be brief. USER: Hi ASSISTANT: Hello</s> USER: 2+2? ASSISTANT:")
    #expect(try render("deepseek") == "<s>Be brief.\n\nUser: Hi\n\nAssistant: Hello</s>User: 2+2?\n\nAssistant:")
    for name in BuiltInChatTemplates.names {
      let text = try render(name)
      #expect(text.contains("2+2?") && text.contains("Be brief."), "\(name)")
    }
  }

  @Test("Template sets: named templates, files that go before others, special tokens")
  func sets() throws {
    let directory = FileManager.default.temporaryDirectory.appendingPathComponent("templates-\(UUID().uuidString)")
    defer { try? FileManager.default.removeItem(at: directory) }
    let additional = directory.appendingPathComponent("additional_chat_templates")
    try FileManager.default.createDirectory(at: additional, withIntermediateDirectories: true)
    func write(_ text: String, _ name: String) throws {
      try Data(text.utf8).write(to: directory.appendingPathComponent(name))
    }
    #expect(try ChatTemplateSet.load(directory: directory.path).isEmpty)
    try write(
      #"{"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>", "unk_token": null, "#
        + #""chat_template": [{"name": "default", "template": "D{{ bos_token }}"}, {"name": "tool_use", "template": "T{{ tools | length }}"}, "#
        + #"{"name": "rag", "template": "{% broken"}]}"#, "tokenizer_config.json")
    try write(#"{"eos_token": "ignored", "unk_token": "<unk>"}"#, "special_tokens_map.json")
    var set = try ChatTemplateSet.load(directory: directory.path)
    #expect(set.names == ["default", "rag", "tool_use"])
    #expect(set.specialTokens == ["bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"])
    let prompt = ChatPrompt(messages: [user("x")])
    #expect(try set.render(prompt) == "D<s>")
    #expect(try set.render(ChatPrompt(messages: [user("x")], tools: [["name": "f"]])) == "T1")
    #expect(throws: EngineError.self) { try set.render(prompt, template: "rag") }
    #expect(throws: EngineError.self) { try set.render(prompt, template: "absent") }

    try write("J{{ eos_token }}", "chat_template.jinja")
    try write("A", "additional_chat_templates/tool_use.jinja")
    set = try ChatTemplateSet.load(directory: directory.path)
    #expect(set.names == ["default", "tool_use"])
    #expect(try set.render(prompt) == "J</s>")
    try set.choose("chatml")
    #expect(try set.render(prompt) == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n")
    try set.choose(directory.appendingPathComponent("chat_template.jinja").path)
    #expect(try set.render(prompt) == "J</s>")
    #expect(throws: EngineError.self) { try set.choose("no-such-template") }
    try write("{", "tokenizer_config.json")
    #expect(throws: EngineError.self) { try ChatTemplateSet.load(directory: directory.path) }
  }

  @Test("apus render: what is given is what the template sees")
  func renderCommand() throws {
    var command = RenderCommand(
      ChatTemplateSet(
        try ChatTemplate(
          source: "{{ bos_token }}{{ messages[0].content }}{{ tools is defined }}{{ strftime_now('%Y') }}"
            + "{% if x %}{{ raise_exception('no ' ~ x) }}{% endif %}"), specialTokens: ["bos_token": "<s>"]))
    command.clock = { .init(year: 2026) }
    #expect(try command.render(#"{"messages": [{"role": "user", "content": "hé\n"}]}"#) == "<s>hé\nFalse2026")
    #expect(command.answer(#"{"messages": [{"content": [1]}], "tools": null}"#) == #"{"rendered":"<s>[1]True2026"}"#)
    #expect(command.answer(#"{"messages": [{}], "x": 1}"#) == #"{"error":"no 1"}"#)
    // Keys that look the same but are written otherwise are two keys.
    let keys = try RenderCommand(ChatTemplateSet(try ChatTemplate(source: "{{ x | tojson }}")))
      .render(#"{"x": {"\u00e9": 1, "e\u0301": 2}}"#)
    #expect(Array(keys.utf8) == Array("{\"\u{E9}\": 1, \"e\u{301}\": 2}".utf8))
    #expect(command.answer("{").hasPrefix(#"{"error":"The conversation is not valid JSON"#))
    #expect(try RenderCommand(template: "chatml").render(#"{"messages": []}"#) == "")
    #expect(throws: EngineError.self) { try RenderCommand(template: "/no/such/file.jinja") }
  }
}
