public import ApusCore

/// Templates of well-known prompt formats, for checkpoints that bring none.
public enum BuiltInChatTemplates {
  /// The name of the native renderer of the harmony format.
  public static let harmonyName = "harmony"
  /// The names, sorted.
  public static let names = (sources.keys + [harmonyName]).sorted()

  /// The text of a template, or `nil` if there is none of that name or it has no text, as the renderer of the harmony
  /// format.
  public static func source(named name: String) -> String? { sources[name] }

  /// A template, or `nil` if there is none of that name.
  public static func template(named name: String) throws(EngineError) -> ChatTemplate? {
    if name == harmonyName { return .harmony }
    guard let source = sources[name] else { return nil }
    return try ChatTemplate(source: source)
  }

  /// Refuses conversations in which user and assistant do not take turns, the system message aside.
  private static let alternation = """
    {%- if messages and messages[0].role == 'system' -%}
    {%- set system = messages[0].content -%}{%- set turns = messages[1:] -%}
    {%- else -%}
    {%- set system = none -%}{%- set turns = messages -%}
    {%- endif -%}
    {%- for message in turns -%}
    {%- if message.role != ('user' if loop.index0 is even else 'assistant') -%}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- endfor -%}

    """

  private static let sources: [String: String] = [
    "chatml": """
    {%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
    {%- endfor -%}
    {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
    """,
    "llama-2": alternation + """
      {%- for message in turns -%}
      {%- if message.role == 'user' -%}
      {%- set head = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system is not none else '' -%}
      {{- (bos_token or '') + '[INST] ' + (head + message.content) | trim + ' [/INST]' -}}
      {%- else -%}
      {{- ' ' + message.content | trim + ' ' + (eos_token or '') -}}
      {%- endif -%}
      {%- endfor -%}
      """,
    "llama-3": """
    {{- bos_token or '' -}}
    {%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
    {%- endfor -%}
    {%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
    """,
    "mistral": alternation + """
      {{- bos_token or '' -}}
      {%- for message in turns -%}
      {%- if message.role == 'user' -%}
      {{- '[INST] ' + (system + '\\n\\n' if loop.first and system is not none else '') + message.content + ' [/INST]' -}}
      {%- else -%}
      {{- ' ' + message.content | trim + (eos_token or '') -}}
      {%- endif -%}
      {%- endfor -%}
      """,
    "zephyr": """
    {%- for message in messages -%}
    {{- '<|' + message.role + '|>\\n' + message.content + (eos_token or '') + '\\n' -}}
    {%- endfor -%}
    {%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
    """,
    "vicuna": alternation + """
      {{- system if system is not none else "A chat between a curious user and an artificial intelligence assistant. " +
        "The assistant gives helpful, detailed, and polite answers to the user's questions." -}}
      {%- for message in turns -%}
      {{- ' USER: ' + message.content | trim if message.role == 'user' else
        ' ASSISTANT: ' + message.content | trim + (eos_token or '') -}}
      {%- endfor -%}
      {%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
      """,
    "alpaca": alternation + """
      {{- (system if system is not none else 'Below is an instruction that describes a task. Write a response that ' +
        'appropriately completes the request.') + '\\n\\n' -}}
      {%- for message in turns -%}
      {{- '### Instruction:\\n' + message.content | trim + '\\n\\n' if message.role == 'user' else
        '### Response:\\n' + message.content | trim + (eos_token or '') + '\\n\\n' -}}
      {%- endfor -%}
      {%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
      """,
    "gemma": alternation + """
      {{- bos_token or '' -}}
      {%- for message in turns -%}
      {{- '<start_of_turn>' + ('user' if message.role == 'user' else 'model') + '\\n' +
        (system + '\\n\\n' if loop.first and system is not none else '') + message.content | trim + '<end_of_turn>\\n' -}}
      {%- endfor -%}
      {%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
      """,
    "phi-3": """
    {%- for message in messages -%}
    {{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' -}}
    {%- endfor -%}
    {%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
    """,
    "deepseek": """
    {{- bos_token or '' -}}
    {%- for message in messages -%}
    {%- if message.role == 'system' -%}{{- message.content + '\\n\\n' -}}
    {%- elif message.role == 'user' -%}{{- 'User: ' + message.content + '\\n\\n' -}}
    {%- elif message.role == 'assistant' -%}{{- 'Assistant: ' + message.content + (eos_token or '') -}}
    {%- else -%}{{- raise_exception('Only system, user and assistant messages are supported.') -}}
    {%- endif -%}
    {%- endfor -%}
    {%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
    """,
  ]
}
