#!/usr/bin/env python3
"""Writes the golden files of multi-token prediction: Tests/ApusExecutionTests/Goldens/Prediction/*.json.

The layer is written out here after DeepSeek-V3's technical report (arXiv 2412.19437, section 2.2): for position p it joins
the norm of the embedding of token p + 1 with the norm of the model's last hidden state at p, runs a decoder layer over all
positions, and gives logits for token p + 2. The decoder layer and the model are transformers', which knows no prediction
layers: the model is built with one layer more, which is taken off its end. Behind the prompt the layer is fed with its own
hidden states and its most likely tokens.

Weights, versions and format are those of Scripts/golden_deepseek.py. Make the files again with

    python3 Scripts/golden_prediction.py
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers.masking_utils import create_causal_mask

from golden_deepseek import YARN, build, numbers, v3
from golden_models import MARGIN, OUTPUT

DRAFTS = 4
# name: (config, prompt length)
MODELS = {
    "deepseek-v3": (v3(first_k_dense_replace=1, n_routed_experts=16, num_experts_per_tok=4), 40),
    "deepseek-v3-yarn": (
        v3(first_k_dense_replace=1, num_attention_heads=3, num_key_value_heads=3, hidden_size=40, kv_lora_rank=27,
           vocab_size=101, rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}), 75),
    "deepseek-v3-tied": (v3(first_k_dense_replace=2, tie_word_embeddings=True, vocab_size=131, hidden_size=64), 33),
}


def rms(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


@torch.no_grad()
def golden(name: str, config: dict, prompt_length: int):
    generator = np.random.Generator(np.random.PCG64(sum(name.encode())))
    prompt = generator.integers(0, config["vocab_size"], prompt_length).tolist()
    depth, hidden, epsilon = config["num_hidden_layers"], config["hidden_size"], config["rms_norm_eps"]
    for seed in range(1, 200):
        model = build({**config, "num_hidden_layers": depth + 1}, seed)
        layer = model.model.layers[depth]
        del model.model.layers[depth]
        prefix = f"model.layers.{depth}."

        def load(part: str, *shape: int) -> torch.Tensor:
            return numbers(prefix + part + ".weight", shape, seed, config["initializer_range"])

        token_norm, hidden_norm, last_norm = load("enorm", hidden), load("hnorm", hidden), load("shared_head.norm", hidden)
        join = load("eh_proj", hidden, 2 * hidden)
        tokens = torch.tensor([prompt])
        states = model.model(tokens, use_cache=False).last_hidden_state[0]
        first = torch.topk(model.lm_head(states[-1]), 2)
        margins = [float(first.values[0] - first.values[1])]
        following = prompt[1:] + [int(first.indices[0])]
        rows = []
        for _ in range(DRAFTS):
            embedded = model.model.embed_tokens(torch.tensor(following))
            x = F.linear(
                torch.cat([rms(embedded, token_norm, epsilon), rms(states, hidden_norm, epsilon)], -1), join)[None]
            positions = torch.arange(len(following))[None]
            mask = create_causal_mask(model.config, x, None, past_key_values=None, position_ids=positions)
            x = layer(
                x, attention_mask=mask, position_ids=positions,
                position_embeddings=model.model.rotary_emb(x, positions))
            x = (x if isinstance(x, torch.Tensor) else x[0])[0]
            y = rms(x[-1], last_norm, epsilon)
            logits = model.lm_head(y)
            best = torch.topk(logits, 2)
            margins.append(float(best.values[0] - best.values[1]))
            rows.append([float(f"{v:.7g}") for v in logits.tolist()])
            following.append(int(best.indices[0]))
            states = torch.cat([states, y[None]])
        if min(margins) > MARGIN:
            return {
                "name": name, "transformers": transformers.__version__, "torch": torch.__version__, "seed": seed,
                "config": config, "prompt": prompt, "next": following[prompt_length - 1],
                "drafts": following[prompt_length:], "logits": rows, "margin": float(f"{min(margins):.4g}"),
            }
    raise SystemExit(f"{name}: no seed gives clear margins")


def main():
    folder = OUTPUT / "Prediction"
    folder.mkdir(exist_ok=True)
    for name, (config, prompt_length) in MODELS.items():
        result = golden(name, config, prompt_length)
        text = json.dumps(result, separators=(",", ":")) + "\n"
        (folder / f"{name}.json").write_text(text)
        print(f"{name}: seed {result['seed']}, margin {result['margin']}, {len(text)} bytes", flush=True)


if __name__ == "__main__":
    main()
