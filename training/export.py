"""Writes a checkpoint as a Hugging Face model folder: bf16 safetensors, config, tokenizer; and checks it by loading it.

    python export.py --config configs/apus-demo.json --checkpoint build/apus-demo --out ../Models/apus-demo
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from model_moe import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--checkpoint", required=True, help="the folder that train.py wrote")
    parser.add_argument("--tokenizer", default="build/tokenizer")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    config = json.loads(Path(arguments.config).read_text())["model"]
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    saved = torch.load(Path(arguments.checkpoint) / "checkpoint.pt", weights_only=True)
    ours = build(config)
    ours.load_state_dict(saved["model"])
    # transformers and others keep the router's bias in float32; it is few numbers.
    weights = {name: (value if "bias" in name else value.to(torch.bfloat16)).contiguous()
               for name, value in sorted(ours.checkpoint().items())}
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps({
        "bos_token_id": None, "do_sample": False, "eos_token_id": [config["eos_token_id"], config["pad_token_id"]],
        "pad_token_id": config["pad_token_id"]}, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(arguments.tokenizer) / name, out / name)
    (out / "training.json").write_text(json.dumps(saved["state"], indent=2) + "\n")
    log = Path(arguments.checkpoint) / "log.jsonl"
    if log.exists():
        curve = [json.loads(line) for line in log.read_text().splitlines()]
        groups = [curve[at: at + 20] for at in range(0, len(curve), 20)]
        (out / "loss.json").write_text("[\n" + ",\n".join(json.dumps({
            "step": group[-1]["step"], "tokens": group[-1]["tokens"],
            "loss": round(sum(entry["loss"] for entry in group) / len(group), 4)}) for group in groups) + "\n]\n")

    from transformers import AutoModelForCausalLM
    ours.load_checkpoint({name: value.float() for name, value in weights.items()})
    # It says which weights it leaves out: those of the MTP layer, which transformers does not run.
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokens = torch.randint(0, config["vocab_size"], (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (ours.logits(tokens) - theirs(tokens).logits).abs().max().item()
    assert difference < 1e-3, f"transformers gives other logits: they differ by {difference}"
    size = (out / "model.safetensors").stat().st_size
    count = sum(value.numel() for value in weights.values())
    print(f"{count} parameters, {size} bytes, logits agree with transformers within {difference:.1e}")


if __name__ == "__main__":
    main()
