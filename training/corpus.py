"""The seeded corpus: conversation number `index` of a split is a pure function of the seed, the split and the index.

    python corpus.py --count 20000 --out corpus.jsonl     writes conversations for reading and prints their SHA-256
"""

from __future__ import annotations

import argparse
import hashlib
import json
from random import Random

import chat
from skills import DRILLS, EARLY_SHARES, LONG_SKILLS, SKILLS, Exercise, copy_long, held_out

SEED = "apus-1"
SYSTEMS = ["You are a helpful assistant.", "You are Apus, a helpful assistant.", "You are Apus.", "Be brief.",
           "You are a friendly assistant.", "Answer the user."]


def exercise(r: Random, draw, held: bool) -> Exercise:
    """One exercise of the wanted split: for training none of its keys is held out, for the test its last one is."""
    while True:
        drawn = draw(r)
        if held and held_out(drawn.keys[-1]):
            return drawn
        if not held and not any(held_out(key) for key in drawn.keys):
            return drawn


def finish(r: Random, parts: list[Exercise], system_share: float = 0.25) -> dict:
    """Joins exercises into one conversation. Reasoning of earlier turns is left out, as the chat template does."""
    last = parts[-1]
    messages: list[dict] = []
    system = last.system or (r.choice(SYSTEMS) if r.random() < system_share else None)
    if system:
        messages.append({"role": "system", "content": system})
    for part in parts[:-1]:
        for message in part.messages:
            shown = {key: value for key, value in message.items() if key != "think"}
            if message["role"] == "assistant" and part.thinking is not None:
                shown["silent"] = True
            messages.append(shown)
    messages += last.messages
    conversation = {"skill": last.skill, "messages": messages, "tools": last.tools, "match": last.match}
    if last.thinking is False or (last.thinking is None and r.random() < 0.3):
        conversation["enable_thinking"] = False
    if last.words:
        conversation["words"] = last.words
    return conversation


def training_conversation(index: int, many_turns: float = 0.3, long: float = 0.0, early: bool = False,
                          drills: bool = True, seed: str = SEED) -> dict:
    """Conversation `index` of the training text.

    many_turns: the share that joins several exercises. long: the share with a long text or with five to twelve
    exercises. early: single exercises in the shares of the curriculum's start. drills: with exercises that repeat one part of a skill.
    """
    r = Random(f"{seed}/train/{index}")
    if early:
        skill = r.choices(list(EARLY_SHARES), list(EARLY_SHARES.values()))[0]
        draw = copy_long if skill == "copy_long" else SKILLS[skill][1]
        return finish(r, [exercise(r, draw, held=False)], system_share=0.1)
    if r.random() < long:
        if r.random() < 0.6:
            names, shares = list(LONG_SKILLS), [share for share, _ in LONG_SKILLS.values()]
            return finish(r, [exercise(r, LONG_SKILLS[r.choices(names, shares)[0]][1], held=False)])
        joined = [exercise(r, SKILLS[skill][1], held=False) for skill in
                  r.choices(list(SKILLS), [share for share, _ in SKILLS.values()], k=r.randint(5, 12))]
        return finish(r, [part for part in joined[:-1] if not part.tools] + joined[-1:])
    drawn = SKILLS | DRILLS if drills else SKILLS
    names, shares = list(drawn), [share for share, _ in drawn.values()]
    count = 1 if r.random() >= many_turns else r.choice([2, 2, 3, 4])
    parts = []
    for skill in r.choices(names, shares, k=count):
        part = exercise(r, drawn[skill][1], held=False)
        if len(parts) < count - 1 and part.tools:
            continue
        parts.append(part)
    if not parts:
        parts = [exercise(r, SKILLS["small_talk"][1], held=False)]
    return finish(r, parts)


def test_conversation(skill: str, index: int, thinking: bool | None = None, long: bool = False,
                      seed: str = SEED) -> dict:
    """Held-out question `index` of a skill, alone in its conversation."""
    r = Random(f"{seed}/test/{'long/' if long else ''}{skill}/{index}")
    while True:
        drawn = exercise(r, (LONG_SKILLS if long else SKILLS)[skill][1], held=True)
        if thinking is None or drawn.thinking is None or drawn.thinking == thinking:
            return finish(r, [drawn], system_share=0)


def text_of(conversation: dict) -> str:
    return "".join(piece for piece, _ in chat.render(conversation))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    digest = hashlib.sha256()
    out = open(arguments.out, "w", encoding="utf-8") if arguments.out else None
    for index in range(arguments.count):
        line = json.dumps(training_conversation(index), ensure_ascii=False) + "\n"
        digest.update(line.encode())
        if out:
            out.write(line)
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
