"""How a conversation becomes text: ChatML turns with tools and reasoning, in the format that Qwen3 made common.

`CHAT_TEMPLATE` is what servers use; `render` gives the same text in pieces, with a mark on what the model must write.
`evaluate.py` and `tokenizer.py --check` compare both.
"""

from __future__ import annotations

import json

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
           "<tool_response>", "</tool_response>"]

TOOLS_BEFORE = "# Tools\n\nYou may call these functions:\n<tools>"
TOOLS_AFTER = ('\n</tools>\nTo call one, answer with its name and arguments as JSON:\n<tool_call>\n'
               '{"name": <name>, "arguments": <arguments>}\n</tool_call>')

CHAT_TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call these functions:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\nTo call one, answer with its name and arguments as JSON:\\n<tool_call>\\n{"name": <name>, "arguments": <arguments>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set state = namespace(last_query=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set state.last_query = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- endif %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if reasoning and loop.index0 > state.last_query %}
            {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {%- if content or not loop.first %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if call.function %}
                    {%- set call = call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
                {%- if call.arguments is string %}
                    {{- call.arguments }}
                {%- else %}
                    {{- call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def dump(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def call_text(call: dict) -> str:
    function = call["function"]
    return f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {dump(function["arguments"])}}}\n</tool_call>'


def render(conversation: dict) -> list[tuple[str, bool]]:
    """The conversation as pieces of text, each with whether the model learns to write it.

    conversation: messages, and optionally tools, enable_thinking and, on a message, `silent` (an answer that is shown
    but not learnt) and `think`.
    """
    pieces: list[tuple[str, bool]] = []
    messages = conversation["messages"]
    tools = conversation.get("tools")
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    if tools:
        text = "<|im_start|>system\n" + (system + "\n\n" if system else "") + TOOLS_BEFORE
        text += "".join("\n" + dump(tool) for tool in tools) + TOOLS_AFTER + "<|im_end|>\n"
        pieces.append((text, False))
    elif system is not None:
        pieces.append((f"<|im_start|>system\n{system}<|im_end|>\n", False))
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "user":
            pieces.append((f"<|im_start|>user\n{content}<|im_end|>\n", False))
        elif role == "tool":
            pieces.append((f"<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n", False))
        elif role == "assistant":
            pieces.append(("<|im_start|>assistant\n", False))
            learnt = not message.get("silent", False)
            if index == len(messages) - 1 and conversation.get("enable_thinking") is False:
                pieces.append(("<think>\n\n</think>\n\n", False))
            text = f"<think>\n{message['think']}\n</think>\n\n" if message.get("think") else ""
            text += content + "\n".join(call_text(call) for call in message.get("tool_calls", []))
            pieces.append((text + "<|im_end|>", learnt))
            pieces.append(("\n", False))
    return pieces
