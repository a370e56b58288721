"""Writes the configuration that a training follows: that of the model, with fewer steps where there is a budget.

    python budget.py --config configs/apus-demo.json --steps 30 --out build/apus-demo.json

The stages of a shorter training keep their shares of it. `--teacher` is the model folder that a mixture begins from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

# Numbers of steps that belong to one another.
STAGES = ["warmup_steps", "decay_steps", "fit_steps", "teacher_until_step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=0, help="at most so many steps; 0 for as many as the model's")
    parser.add_argument("--teacher", help="the model folder that a mixture begins from")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    config = json.loads(Path(arguments.config).read_text())
    training = config["training"]
    if 0 < arguments.steps < training["steps"]:
        for name in STAGES:
            if name in training:
                training[name] = max(1, training[name] * arguments.steps // training["steps"])
        training["steps"] = arguments.steps
    if "teacher" in training and arguments.teacher:
        training["teacher"] = str(Path(arguments.teacher).resolve())
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
