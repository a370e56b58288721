#!/usr/bin/env python3
"""Writes the golden heads of EAGLE: Tests/ApusExecutionTests/Goldens/Eagle/NAME/ with config.json and model.safetensors, as
published heads have them, and golden.json.

The heads are written out here after their papers (EAGLE, arXiv 2401.15077; EAGLE-3, arXiv 2503.01840) and the names and
configurations of published checkpoints; target models are transformers', with weights as in Scripts/golden_models.py. The
head is run over the whole sequence for every draft, without a cache, and is fed with its own output and its most likely
token behind the prompt. For each head the first seed is taken whose choices all have a clear margin.

    python3 Scripts/golden_eagle.py
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from golden_models import MARGIN, OUTPUT, build, llama, qwen3, weight

DRAFTS = 4


def head(name: str, **changes) -> dict:
    return {
        "architectures": [name], "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1,
        "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 97, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "torch_dtype": "float32",
        "tie_word_embeddings": False, **changes,
    }


# name: (target, head, prefix of the layer's weights, prompt length)
HEADS = {
    # The layers that a head gets where it names none.
    "eagle3": (
        llama(num_hidden_layers=7, hidden_size=32),
        head("LlamaForCausalLMEagle3", hidden_size=32, num_attention_heads=4, num_key_value_heads=2, draft_vocab_size=32),
        "midlayer.", 40),
    # A head of another width than its target, with a table of its own, that names its layers, the last one among them.
    "eagle3-narrow": (
        qwen3(num_hidden_layers=4, hidden_size=40),
        head("LlamaForCausalLMEagle3", hidden_size=32, target_hidden_size=40, num_attention_heads=2, head_dim=12,
             num_key_value_heads=2, draft_vocab_size=40, norm_before_residual=True,
             eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 3], "use_aux_hidden_state": True}),
        "layers.0.", 53),
    "eagle3-whole-vocabulary": (
        llama(num_hidden_layers=8, rope_theta=5e5, hidden_size=24),
        head("LlamaForCausalLMEagle3", hidden_size=24, num_attention_heads=2, draft_vocab_size=97, rope_theta=5e5),
        "midlayer.", 20),
    "eagle1": (
        llama(num_hidden_layers=2, hidden_size=32),
        head("LlamaForCausalLMEagle", hidden_size=32, num_attention_heads=2, num_key_value_heads=2, bias=True),
        "layers.0.", 40),
}


def rms(x: torch.Tensor, scale: torch.Tensor, epsilon: float) -> torch.Tensor:
    return scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotates [tokens, heads, dimension]: the first half of a head goes with the second."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / (theta ** (torch.arange(0, half, dtype=torch.float32) / half))
    angles = torch.arange(x.shape[0], dtype=torch.float32)[:, None] * frequencies
    cosines, sines = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)


def make_weights(config: dict, prefix: str, is_third: bool, layers: int, seed: int) -> dict:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dimension = config.get("head_dim") or hidden // heads
    wide = config.get("target_hidden_size", hidden)
    inputs = 2 * hidden if is_third else hidden
    shapes = {
        "fc.weight": (hidden, layers * wide if is_third else 2 * hidden),
        prefix + "self_attn.q_proj.weight": (heads * dimension, inputs),
        prefix + "self_attn.k_proj.weight": (kv_heads * dimension, inputs),
        prefix + "self_attn.v_proj.weight": (kv_heads * dimension, inputs),
        prefix + "self_attn.o_proj.weight": (hidden, heads * dimension),
        prefix + "post_attention_layernorm.weight": (hidden,),
        prefix + "mlp.gate_proj.weight": (width, hidden),
        prefix + "mlp.up_proj.weight": (width, hidden),
        prefix + "mlp.down_proj.weight": (hidden, width),
    }
    if config.get("bias"):
        shapes["fc.bias"] = (hidden,)
    if is_third:
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "hidden_norm.weight"] = (hidden,)
        shapes["norm.weight"] = (hidden,)
        shapes["lm_head.weight"] = (config["draft_vocab_size"], hidden)
        if wide != hidden:
            shapes["embed_tokens.weight"] = (config["vocab_size"], hidden)
    return {name: torch.from_numpy(weight(name, shape, seed, 0.2)) for name, shape in shapes.items()}


@torch.no_grad()
def layer(config: dict, weights: dict, prefix: str, is_third: bool, embedded: torch.Tensor, states: torch.Tensor):
    """The output of the head's layer for all tokens, before any final norm."""
    epsilon = config["rms_norm_eps"]

    def part(name: str) -> torch.Tensor:
        return weights[prefix + name + ".weight"]

    if is_third:
        normed = rms(states, part("hidden_norm"), epsilon)
        joined = torch.cat([rms(embedded, part("input_layernorm"), epsilon), normed], -1)
        residual = normed if config.get("norm_before_residual") else states
    else:
        joined = F.linear(torch.cat([embedded, states], -1), weights["fc.weight"], weights.get("fc.bias"))
        residual = joined
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dimension = config.get("head_dim") or config["hidden_size"] // heads
    count = len(joined)
    q = rotate(F.linear(joined, part("self_attn.q_proj")).view(count, heads, dimension), config["rope_theta"])
    k = rotate(F.linear(joined, part("self_attn.k_proj")).view(count, kv_heads, dimension), config["rope_theta"])
    v = F.linear(joined, part("self_attn.v_proj")).view(count, kv_heads, dimension)
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / dimension**0.5
    scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), float("-inf")).softmax(-1)
    attended = torch.einsum("hqk,khd->qhd", scores, v).reshape(count, heads * dimension)
    x = residual + F.linear(attended, part("self_attn.o_proj"))
    normed = rms(x, part("post_attention_layernorm"), epsilon)
    gate = F.silu(F.linear(normed, part("mlp.gate_proj"))) * F.linear(normed, part("mlp.up_proj"))
    return x + F.linear(gate, part("mlp.down_proj"))


@torch.no_grad()
def golden(name: str, target_config: dict, config: dict, prefix: str, prompt_length: int):
    generator = np.random.Generator(np.random.PCG64(sum(name.encode())))
    vocabulary = config["vocab_size"]
    prompt = generator.integers(0, vocabulary, prompt_length).tolist()
    is_third = "draft_vocab_size" in config
    draft_size = config.get("draft_vocab_size", vocabulary)
    # The token of each column, ascending.
    chosen = np.sort(generator.choice(vocabulary, draft_size, replace=False))
    count = target_config["num_hidden_layers"]
    listed = config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
    layers = [i + 1 for i in listed] if listed else [2, count // 2, count - 3]
    for seed in range(1, 500):
        target = build(target_config, seed)
        weights = make_weights(config, prefix, is_third, len(layers), seed)
        table = weights.get("embed_tokens.weight", target.model.embed_tokens.weight)
        # What transformers lists for the last layer has been through the final norm.
        last = []
        hook = target.model.layers[-1].register_forward_hook(
            lambda module, inputs, output: last.append(output if isinstance(output, torch.Tensor) else output[0]))
        result = target.model(torch.tensor([prompt]), use_cache=False, output_hidden_states=True)
        hook.remove()
        outputs = [*result.hidden_states[:count], last[0].view(1, prompt_length, -1)]
        if is_third:
            states = F.linear(torch.cat([outputs[i][0] for i in layers], -1), weights["fc.weight"])
        else:
            states = result.last_hidden_state[0]
        first = torch.topk(target.lm_head(result.last_hidden_state[0, -1]), 2)
        margins = [float(first.values[0] - first.values[1])]
        following = prompt[1:] + [int(first.indices[0])]
        rows = []
        for _ in range(DRAFTS):
            output = layer(config, weights, prefix, is_third, table[torch.tensor(following)], states)
            if is_third:
                logits = F.linear(
                    rms(output[-1], weights["norm.weight"], config["rms_norm_eps"]), weights["lm_head.weight"])
            else:
                logits = target.lm_head(output[-1])
            best = torch.topk(logits, 2)
            margins.append(float(best.values[0] - best.values[1]))
            rows.append([float(f"{v:.7g}") for v in logits.tolist()])
            following.append(int(chosen[int(best.indices[0])]))
            states = torch.cat([states, output[-1:]])
        if min(margins) > MARGIN:
            break
    else:
        raise SystemExit(f"{name}: no seed gives clear margins")
    if is_third:
        weights["d2t"] = torch.from_numpy(chosen - np.arange(draft_size)).to(torch.int64)
        known = torch.zeros(vocabulary, dtype=torch.bool)
        known[torch.from_numpy(chosen)] = True
        weights["t2d"] = known
    folder = OUTPUT / "Eagle" / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, separators=(",", ":")) + "\n")
    (folder / "golden.json").write_text(
        json.dumps(
            {
                "name": name, "transformers": transformers.__version__, "torch": torch.__version__, "seed": seed,
                "target": target_config, "prompt": prompt, "next": following[prompt_length - 1],
                "drafts": following[prompt_length:], "tokens": chosen.tolist(), "logits": rows,
                "margin": float(f"{min(margins):.4g}"),
            }, separators=(",", ":")) + "\n")
    size = (folder / "model.safetensors").stat().st_size
    print(f"{name}: seed {seed}, margin {min(margins):.4g}, {size} bytes of weights", flush=True)


def main():
    for name, (target, config, prefix, prompt_length) in HEADS.items():
        golden(name, target, config, prefix, prompt_length)


if __name__ == "__main__":
    main()
