"""Asks a trained model held-out questions, skill by skill, and counts right answers (greedy decoding, float32).

    python evaluate.py --write ../Models/apus-demo/evaluation.jsonl --count 40 --count-others 6
    python evaluate.py --model ../Models/apus-demo --questions ../Models/apus-demo/evaluation.jsonl

`apus bench eval` asks the same file of an engine or a server, with the same rules.

Every line of the questions is one object: skill, messages, tools (or null), enable_thinking (or absent), match and
answer (words for match "contains"). `right` below says what each way of matching means.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import corpus
from corpus import SKILLS, test_conversation

# Skills that are asked twice: with worked steps and without.
BOTH_WAYS = ["addition", "subtraction", "word_problem", "multiple_choice"]


# What the models are made for; the other skills are asked fewer questions.
TARGETS = ["story", "extraction", "multiple_choice_thinking", "list_copy", "addition_thinking"]


def questions(count: int, others: int | None = None):
    """The held-out questions: (name of the skill as reported, conversation), `others` for a skill that is no target."""
    for skill in SKILLS:
        ways = [(skill + "_thinking", True), (skill + "_direct", False)] if skill in BOTH_WAYS else [(skill, None)]
        for label, thinking in ways:
            for index in range(count if others is None or label in TARGETS else others):
                conversation = test_conversation(skill, index, thinking)
                if thinking is None and conversation["messages"][-1].get("think") is None and index % 3:
                    conversation.pop("enable_thinking", None)
                yield label, conversation


def question_line(label: str, conversation: dict) -> dict:
    *before, last = conversation["messages"]
    line = {"skill": label, "messages": before, "tools": conversation["tools"], "match": conversation["match"]}
    if conversation["match"] == "tool":
        call = last["tool_calls"][0]["function"]
        line["answer"] = {"name": call["name"], "arguments": call["arguments"]}
    else:
        line["answer"] = last["content"]
    if "words" in conversation:
        line["words"] = conversation["words"]
    if "enable_thinking" in conversation:
        line["enable_thinking"] = conversation["enable_thinking"]
    return line


def right(line: dict, text: str) -> bool:
    """Whether the model's text, without its reasoning, is the answer.

    exact: the same text. json: the same JSON value, whatever the spaces and the order of keys. tool: one call of the
    named function with equal arguments. contains: every word of `words` occurs in it.
    """
    text = text.split("</think>")[-1].strip()
    if line["match"] == "exact":
        return text == line["answer"].strip()
    if line["match"] == "contains":
        return all(word in text for word in line["words"])
    if line["match"] == "tool":
        found = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", text, re.S)
        text, wanted = found.group(1) if found else "", line["answer"]
    else:
        wanted = json.loads(line["answer"])
    try:
        return json.loads(text) == wanted
    except ValueError:
        return False


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--count", type=int, default=100, help="questions of a skill")
    parser.add_argument("--count-others", type=int, help="questions of a skill that is no target, where fewer will do")
    parser.add_argument("--questions", help="asks the questions of this file instead")
    parser.add_argument("--answers", help="writes every answer as a line, as apus bench eval does")
    parser.add_argument("--out")
    parser.add_argument("--write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--longest-answer", type=int, default=320, help="tokens after which an answer is broken off")
    parser.add_argument("--skills", nargs="*")
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers of each skill")
    arguments = parser.parse_args()
    if arguments.questions:
        lines = [json.loads(line) for line in Path(arguments.questions).read_text(encoding="utf-8").splitlines()]
    else:
        lines = [question_line(label, conversation)
                 for label, conversation in questions(arguments.count, arguments.count_others)]
    if arguments.write:
        with open(arguments.write, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if not arguments.model:
        return
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    by_skill: dict[str, list[dict]] = {}
    for line in lines:
        if not arguments.skills or any(line["skill"].startswith(skill) for skill in arguments.skills):
            by_skill.setdefault(line["skill"], []).append(line)
    scores: dict[str, float] = {}
    given: dict[int, dict] = {}
    ended = asked = 0
    started = time.time()
    for skill, group in by_skill.items():
        correct, shown = 0, 0
        group = sorted(group, key=lambda line: len(str(line)))
        for at in range(0, len(group), 50):
            part = group[at: at + 50]
            prompts = [tokenizer.apply_chat_template(
                line["messages"], tools=line["tools"], tokenize=False, add_generation_prompt=True,
                **({"enable_thinking": line["enable_thinking"]} if "enable_thinking" in line else {})) for line in part]
            batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
            with torch.no_grad():
                output = model.generate(**batch, max_new_tokens=arguments.longest_answer, do_sample=False, eos_token_id=end,
                                        pad_token_id=tokenizer.pad_token_id)
            for line, ids in zip(part, output[:, batch["input_ids"].shape[1]:].tolist()):
                asked += 1
                ended += end in ids
                text = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
                good = end in ids and right(line, text)
                correct += good
                given[id(line)] = {"skill": skill, "text": text, "right": good, "ended": end in ids}
                if not good and shown < arguments.show:
                    shown += 1
                    print(f"  [{skill}] {line['messages'][-1]['content']!r}\n    wanted {line['answer']!r}\n    got {text!r}")
        scores[skill] = round(100 * correct / len(group), 1)
        print(f"{skill:22s} {scores[skill]:5.1f}  ({len(group)})", flush=True)
    if arguments.answers:
        Path(arguments.answers).write_text("".join(
            json.dumps(given[id(line)], ensure_ascii=False) + "\n" for line in lines if id(line) in given), encoding="utf-8")
    report = {"questions": asked, "scores": scores, "asked": {skill: len(group) for skill, group in by_skill.items()},
              "mean": round(sum(scores.values()) / len(scores), 1), "ended_by_itself": round(100 * ended / asked, 2)}
    print(f"mean {report['mean']}, ended by itself {report['ended_by_itself']}%, {time.time() - started:.0f} s")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
