"""Measures what a mixture of experts with an MTP layer does on held-out text: expert loads, and accepted drafts.

    python measure.py --model ../Models/apus-demo-moe --questions ../Models/apus-demo-moe/evaluation.jsonl

The model answers the questions greedily; then, over the answers it wrote, the MTP layer is asked at every place for the
token after the next, with the token the model itself chose in between, and accepted where the model agrees. An expert's
load is the share of tokens (prompt and answer) that are sent to it; max-to-mean is that of the busiest expert over that of
all, per layer, for the questions of one domain and for all domains in the shares of the corpus.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from corpus import SKILLS
from model_moe import build
from upcycle import DOMAINS, domain

NAMES = ["stories and talk", "JSON and tools", "arithmetic", "lists and choices"]


def base(label: str) -> str:
    """The skill of a label of the evaluation, which may say how it is asked."""
    return label.removesuffix("_thinking").removesuffix("_direct")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--answers", required=True, help="what evaluate.py --answers wrote for the same questions")
    parser.add_argument("--out")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = build(json.loads((folder / "config.json").read_text()))
    model.load_checkpoint({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    questions, answers = ([json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
                          for path in (arguments.questions, arguments.answers))
    assert len(questions) == len(answers), "the answers are not those to the questions"
    loads: dict[str, torch.Tensor] = {}
    tokens_of: dict[str, int] = {}
    agreed = [0] * len(NAMES)
    asked = [0] * len(NAMES)
    for line, answer in zip(questions, answers):
        skill = base(line["skill"])
        prompt = tokenizer.apply_chat_template(
            line["messages"], tools=line["tools"], tokenize=False, add_generation_prompt=True,
            **({"enable_thinking": line["enable_thinking"]} if "enable_thinking" in line else {}))
        start = len(tokenizer.encode(prompt, add_special_tokens=False))
        text = prompt + answer["text"] + ("<|im_end|>" if answer["ended"] else "")
        tokens = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        model.take_loads()
        hidden = model.model(tokens, torch.float32)
        chosen = model.head(hidden).argmax(-1)[0]
        guessed = model.head(model.model.ahead(tokens, hidden)).argmax(-1)[0]
        # The guess at p is for token p + 2, made once token p + 1 is drawn; the model's own choice for it is at p + 1.
        places = range(start - 1, tokens.shape[1] - 2)
        agreed[domain(skill)] += sum(int(guessed[p] == chosen[p + 1]) for p in places)
        asked[domain(skill)] += len(places)
        counted = model.take_loads()
        loads[skill] = loads.get(skill, 0) + counted
        tokens_of[skill] = tokens_of.get(skill, 0) + tokens.shape[1]

    def uneven(share: dict[str, float]) -> list[float]:
        """Max-to-mean by layer, with each skill's tokens weighed so that it has its share."""
        total = sum(loads[skill] / tokens_of[skill] * weight for skill, weight in share.items())
        return [round(float(value), 2) for value in total.max(1).values / total.mean(1)]

    weight = {skill: tokens_of[skill] / sum(base(line["skill"]) == skill for line in questions) * share
              for skill, (share, _) in SKILLS.items() if skill in loads}  # as many questions as the corpus would draw
    report = {
        "first_draft_token_accepted": round(100 * sum(agreed) / sum(asked), 1), "draft_tokens": sum(asked),
        "accepted_by_domain": {name: round(100 * a / max(1, b), 1) for name, a, b in zip(NAMES, agreed, asked)},
        "max_to_mean_by_layer": {
            **{name: uneven({skill: value for skill, value in weight.items() if domain(skill) == index})
               for index, name in enumerate(NAMES)}, "mixed": uneven(weight)},
        "layers": [index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")],
    }
    assert len(NAMES) == len(DOMAINS) + 1
    print(json.dumps(report, indent=2))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
