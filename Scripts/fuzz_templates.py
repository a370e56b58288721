#!/usr/bin/env python3
"""Differential fuzzing of chat templates against jinja2 3.1.6, set up as transformers does, and of the harmony renderer
against OpenAI's library.

  fuzz_templates.py APUS --count 20000 [--seed 1]
      random templates over the whole language, each with random variables.
  fuzz_templates.py APUS --templates FOLDER --count 20000 [--seed 1]
      random conversations (None, empty lists, nested arguments, Unicode, HTML) through the real templates in a folder.
  fuzz_templates.py APUS --harmony COUNT [--seed 1] [--tokenizer gpt-oss/tokenizer.json]
      random conversations and tools through `apus render --harmony` and openai-harmony 0.0.8 (which needs
      o200k_base.tiktoken in the folder that TIKTOKEN_ENCODINGS_BASE names); with --tokenizer the ids are compared too.

Exit status 1 on any difference that is not a refusal.
"""
import argparse
import collections
import json
import os
import pathlib
import random
import re
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import golden_templates as golden  # noqa: E402

NOW = golden.NOW.isoformat()
CHUNK = 2000
REFUSED = re.compile(r"(not supported|needs more than 64 bits|takes too many steps|too much output|larger than the limit|nested too deep"
                     r"|is limited|limit of)")
# The line that Apus adds to an error, and the kind of the error.
FAILED = re.compile(r"The chat template failed(?: in line (\d+))?: (.*)", re.S)
MISTAKE = re.compile(r"The chat template cannot be used, because of a mistake(?: in line (\d+))?: (.*)", re.S)


def run(command, requests):
    given = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in requests).encode()
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE)
    answers = [json.loads(line) for line in done.stdout.decode().split("\n") if line]
    if done.returncode or len(answers) != len(requests):
        print(f"{command} ended with status {done.returncode} after {len(answers)} of {len(requests)} answers")
        if len(answers) < len(requests):
            print("at", json.dumps(requests[len(answers)])[:2000])
        sys.exit(1)
    return answers


def kind(error):
    """An error of Apus in the terms of `golden_templates.render`."""
    if match := FAILED.fullmatch(error):
        return match[2]
    if match := MISTAKE.fullmatch(error):
        return f"Compile: {match[2]}"
    return f"TemplateError: {error}"


def same(expected, actual):
    if "rendered" in expected or "rendered" in actual:
        return expected == actual
    a, b = expected["error"], kind(actual["error"])
    return a == b or a.split(":")[0] == b.split(":")[0]


def jinja(arguments):
    random.seed(arguments.seed)
    real = golden.sources(arguments.templates) if arguments.templates else []
    counts = collections.Counter()
    while sum(counts.values()) < arguments.count:
        cases = []
        while len(cases) < min(CHUNK, arguments.count - sum(counts.values())):
            case = {"template": random.choice(real), "vars": golden.conversation()} if real else golden.case(0)
            result = golden.render(case["template"], case["vars"])
            if golden.encodable(case) and golden.encodable(result) and not golden.nondeterministic(result):
                cases.append((case, result))
        requests = [{"template": c["template"], "variables": c["vars"]} for c, _ in cases]
        answers = run([arguments.apus, "render", "--jsonl", "--now", NOW], requests)
        for (case, expected), actual in zip(cases, answers):
            if same(expected, actual):
                counts["rendered" if "rendered" in expected else "error"] += 1
            elif "error" in actual and REFUSED.search(actual["error"]):
                counts["refused"] += 1
                if arguments.refused:
                    print("REFUSED", actual["error"], repr(case["template"])[:300])
            else:
                counts["different"] += 1
                if counts["different"] <= arguments.show:
                    print("TEMPLATE", repr(case["template"])[:1500], "\n  expected", repr(expected)[:600], "\n  actual  ", repr(actual)[:600],
                          "\n  vars", json.dumps(case["vars"], ensure_ascii=False)[:1500], flush=True)
    print(f"{'real' if real else 'random'} templates, seed {arguments.seed}: {dict(counts)}")
    return counts["different"]


# Harmony -------------------------------------------------------------------------------------------------------------

TEXTS = golden.TEXTS + ["A default\nof two lines", "ends with newline\n", "\r\nodd\r\n", "a null value", "x\ry", ""]


def a_schema(depth):
    r = random.random()
    schema = {}
    if r < 0.08:
        return random.choice([True, {}, {"enum": ["a"]}, {"$ref": "#/x"}, {"anyOf": [{"type": "string"}]}, {"type": []}, {"type": [1]}, {"oneOf": 3}])
    if depth > 0 and r < 0.25:
        schema["oneOf"] = [a_schema(depth - 1) for _ in range(random.randint(0, 3))]
    elif r < 0.35:
        schema["type"] = random.sample(["string", "integer", "number", "null", "object", "boolean"], random.randint(1, 3))
    elif depth > 0 and r < 0.6:
        schema["type"] = "object"
        if random.random() < 0.9:
            names = random.sample(["a", "b_c", "with space", "é", "default", "x"], random.randint(0, 4))
            schema["properties"] = {name: a_schema(depth - 1) for name in names}
            if random.random() < 0.6:
                schema["required"] = random.sample(names, random.randint(0, len(names)))
    elif depth > 0 and r < 0.75:
        schema["type"] = "array"
        if random.random() < 0.9:
            schema["items"] = a_schema(depth - 1)
    else:
        schema["type"] = random.choice(["string", "string", "integer", "number", "boolean", "null", "odd"])
    if random.random() < 0.25:
        schema["enum"] = random.sample(["a", "b", "nullify", "é\"", 3, None], random.randint(0, 4))
    if random.random() < 0.4:
        schema["description"] = random.choice(TEXTS)
    if random.random() < 0.2:
        schema["title"] = random.choice(TEXTS)
    if random.random() < 0.3:
        schema["default"] = random.choice(["a", "text \"q\"", 1, -2.5, 1e16, 1e-5, 1e-7, 123456789012, 1.0, True, None, [1, "é"], {"k": [None, 0.1]}])
    if random.random() < 0.15:
        schema["nullable"] = random.choice([True, True, False, "yes"])
    if random.random() < 0.15:
        schema["examples"] = random.sample(["one", "two\n", 3, "\"q\""], random.randint(0, 3))
    return schema


def an_object_schema(depth):
    """A schema that is a JSON object: the library takes no other as a tool's parameters."""
    while not isinstance(schema := a_schema(depth), dict):
        pass
    return schema


def a_namespace(name):
    tools = [{"name": f"tool_{i}", "description": random.choice(TEXTS),
              "parameters": None if random.random() < 0.2 else random.choice([an_object_schema(3), {"type": "object", "properties": {"p": a_schema(3), "q": a_schema(2)}}])}
             for i in range(random.randint(0, 3))]
    tools = [{k: v for k, v in tool.items() if v is not None} for tool in tools]
    namespace = {"name": name, "tools": tools}
    if random.random() < 0.6:
        namespace["description"] = random.choice(TEXTS)
    return namespace


def a_harmony_message():
    role = random.choice(["system", "developer", "user", "assistant", "assistant", "assistant", "tool"])
    message = {"role": role, "content": [{"type": "text", "text": random.choice(TEXTS)} for _ in range(random.choice((1, 1, 1, 2, 0)))]}
    if role == "system" and random.random() < 0.9:
        system = {"type": "system_content"}
        for key, values in (("model_identity", TEXTS), ("reasoning_effort", ["Low", "Medium", "High"]), ("conversation_start_date", ["2025-06-28", ""]),
                            ("knowledge_cutoff", ["2024-06"])):
            if random.random() < 0.7:
                system[key] = random.choice(values)
        if random.random() < 0.8:
            system["channel_config"] = {"valid_channels": random.sample(["analysis", "commentary", "final"], random.randint(0, 3)),
                                        "channel_required": random.random() < 0.7}
        if random.random() < 0.4:
            system["tools"] = {n: a_namespace(n) for n in random.sample(["browser", "python", "Zeta", "é"], random.randint(0, 2))}
        message["content"] = [system]
    elif role == "developer" and random.random() < 0.9:
        developer = {"type": "developer_content"}
        if random.random() < 0.7:
            developer["instructions"] = random.choice(TEXTS)
        if random.random() < 0.7:
            developer["tools"] = {n: a_namespace(n) for n in random.sample(["functions", "other"], random.randint(0, 2))}
        message["content"] = [developer]
    if role == "tool":
        message["name"] = random.choice(["functions.f", "browser.search", "python"])
    elif random.random() < 0.1:
        message["name"] = random.choice(["bob", "b c"])
    if role == "assistant":
        if random.random() < 0.85:
            message["channel"] = random.choice(["analysis", "commentary", "final"])
        if random.random() < 0.25:
            message["recipient"] = random.choice(["functions.f", "all", "browser.open"])
            if random.random() < 0.8:
                message["content_type"] = random.choice(["<|constrain|>json", "code", "json", "<|constrain|>"])
    elif role == "tool" and random.random() < 0.6:
        message["recipient"], message["channel"] = "assistant", "commentary"
    return message


def harmony(arguments):
    from openai_harmony import Conversation, HarmonyEncodingName, RenderConversationConfig, Role, load_harmony_encoding

    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    random.seed(arguments.seed)
    cases = []
    while len(cases) < arguments.harmony:
        messages = [a_harmony_message() for _ in range(random.randint(1, 7))]
        conversation = Conversation.from_json(json.dumps({"messages": messages}))
        drops, opens = random.random() < 0.8, random.random() < 0.7
        config = RenderConversationConfig(auto_drop_analysis=drops)
        if opens:
            ids = encoding.render_conversation_for_completion(conversation, Role.ASSISTANT, config)
        else:
            ids = encoding.render_conversation(conversation, config)
        # What the Python classes make of the messages is what the library gets, so that is what Apus gets.
        given = json.loads(conversation.to_json())["messages"]
        cases.append(({"harmony_messages": given, "auto_drop_analysis": drops, "add_generation_prompt": opens}, ids))
    different = 0
    texts = []
    for (case, ids), answer in zip(cases, run([arguments.apus, "render", "--harmony", "--jsonl"], [c for c, _ in cases])):
        wanted = encoding.decode(ids)
        texts.append(wanted)
        if answer.get("rendered") != wanted:
            different += 1
            if different <= arguments.show:
                print("CASE", json.dumps(case, ensure_ascii=False)[:3000], "\n  expected", repr(wanted)[:3000], "\n  actual  ", repr(answer)[:3000], flush=True)
    print(f"harmony, seed {arguments.seed}: {len(cases)} conversations, {different} differences")
    if arguments.tokenizer:
        command = [arguments.apus, "tokenize", "--jsonl", "--no-special", "--tokenizer", arguments.tokenizer]
        apart = 0
        for (case, ids), answer in zip(cases, run(command, [{"text": t} for t in texts])):
            if answer["ids"] != ids:
                apart += 1
                if apart <= arguments.show:
                    print("IDS", repr(encoding.decode(ids))[:600], ids, answer["ids"])
        # The library encodes each part by itself: a text of two parts can have other ids than the parts.
        print(f"ids of {len(cases)} conversations: {apart} differ")
    return different


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("apus")
    parser.add_argument("--templates", help="a folder of real templates to render random conversations with")
    parser.add_argument("--harmony", type=int, help="so many harmony conversations")
    parser.add_argument("--tokenizer", help="the tokenizer.json of gpt-oss")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, default=10)
    parser.add_argument("--refused", action="store_true", help="show what is refused")
    arguments = parser.parse_args()
    sys.exit(1 if (harmony(arguments) if arguments.harmony else jinja(arguments)) else 0)


if __name__ == "__main__":
    main()
