#!/usr/bin/env python3
"""Writes the golden files of Tests/ApusExecutionTests/Goldens: logits and greedy continuations of tiny random models,
computed by Hugging Face transformers in float32 on the CPU.

Made with transformers 5.23.0, torch 2.13.0 (CPU), numpy 2.4.6. Make them again with

    python3 Scripts/golden_models.py            (all of them)
    python3 Scripts/golden_models.py NAME...    (some)

The weights need no file: every number is a function of seed, name and index (Sources/ApusModels/Checkpoint/
DummyWeights.swift has the same function), so a golden file holds a config, a prompt and results. Matrices get a larger
range than a real model's, so that attention and rotation matter and the greedy choice is clear. For each model the first
seed is taken whose greedy continuation is decided by a margin of more than 1e-3 at every step.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "Tests/ApusExecutionTests/Goldens"
GREEDY_TOKENS = 24
MARGIN = 1e-3
GOLDEN_RATIO = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def key(name: str, seed: int) -> int:
    """FNV-1a-64 of the name, xor a multiple of the seed."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value ^ ((seed * GOLDEN_RATIO) & MASK)


def weight(name: str, shape, seed: int, initializer_range: float) -> np.ndarray:
    """The numbers of one weight, float32."""
    is_norm = name.endswith("norm.weight")
    scale = np.float32(0.1) if is_norm else np.float32(initializer_range) * np.sqrt(np.float32(3))
    offset = np.float32(1 if is_norm else 0)
    with np.errstate(over="ignore"):
        z = np.uint64(key(name, seed)) + np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(GOLDEN_RATIO)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    u = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return (offset + scale * (np.float32(2) * u - np.float32(1))).astype(np.float32).reshape(shape)


def build(config: dict, seed: int):
    architecture = config["architectures"][0]
    loaded = transformers.AutoConfig.for_model(
        config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    loaded._attn_implementation = "eager"
    model = getattr(transformers, architecture)(loaded).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape), seed, config["initializer_range"])))
    return model


@torch.no_grad()
def golden(name: str, config: dict, prompt_length: int, context_length: int | None):
    generator = np.random.Generator(np.random.PCG64(len(name) * 1000 + sum(name.encode())))
    prompt = generator.integers(0, config["vocab_size"], prompt_length).tolist()
    for seed in range(1, 100):
        model = build(config, seed)
        tokens, margins = list(prompt), []
        logits = model(torch.tensor([tokens])).logits[0]
        positions = sorted({0, prompt_length // 2, prompt_length - 1})
        rows = [[float(f"{v:.7g}") for v in logits[p].tolist()] for p in positions]
        # A prompt that fills the context has no continuation.
        for _ in range(GREEDY_TOKENS if prompt_length != context_length else 0):
            # The whole sequence each time: a length-dependent rotation then sees the true length.
            last = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            best = torch.topk(last, 2).values
            margins.append(float(best[0] - best[1]))
            tokens.append(int(torch.argmax(last)))
        if not margins or (min(margins) > MARGIN and len(set(tokens[prompt_length:])) > 4):
            return {
                "name": name, "transformers": transformers.__version__, "torch": torch.__version__, "seed": seed,
                "config": config, "context_length": context_length, "prompt": prompt, "positions": positions,
                "logits": rows, "greedy": tokens[prompt_length:], "margin": float(f"{min(margins, default=1):.4g}"),
            }
    raise SystemExit(f"{name}: no seed gives clear margins")


def base(architecture: str, model_type: str, **changes) -> dict:
    config = {
        "architectures": [architecture], "model_type": model_type, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "initializer_range": 0.2,
    }
    config.update(changes)
    return config


def llama(**changes):
    return base("LlamaForCausalLM", "llama", **changes)


def mistral(**changes):
    return base("MistralForCausalLM", "mistral", **{"sliding_window": None, **changes})


def qwen2(**changes):
    return base("Qwen2ForCausalLM", "qwen2", **changes)


def qwen3(**changes):
    return base("Qwen3ForCausalLM", "qwen3", **{"head_dim": 12, **changes})


LONG = [1.0, 1.3, 1.9, 2.6, 3.5, 4.4]
SHORT = [1.0, 1.05, 1.1, 1.15, 1.2, 1.3]

# name: (config, prompt length, served context length or None for the model's own)
MODELS = {
    "llama": (llama(), 40, None),
    "llama-tied-multi-query": (
        llama(num_key_value_heads=1, tie_word_embeddings=True, hidden_size=72, intermediate_size=100, vocab_size=131),
        37, None),
    "llama-multi-head-bias": (
        llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True, hidden_size=40, head_dim=14,
              intermediate_size=51), 33, None),
    "llama-odd-sizes": (
        llama(hidden_size=60, num_attention_heads=6, num_key_value_heads=3, head_dim=22, intermediate_size=67,
              vocab_size=101), 50, None),
    "llama-large-head": (
        llama(hidden_size=50, num_attention_heads=5, num_key_value_heads=1, head_dim=80, intermediate_size=33), 35, None),
    "mistral-window": (mistral(sliding_window=13), 45, None),
    "mistral-full": (mistral(head_dim=20, rope_theta=1e6), 30, None),
    "qwen2": (qwen2(rope_theta=1e6), 40, None),
    "qwen2-window-tied": (
        qwen2(use_sliding_window=True, sliding_window=9, max_window_layers=1, tie_word_embeddings=True), 40, None),
    "qwen3": (qwen3(), 40, None),
    "qwen3-bias-tied": (
        qwen3(attention_bias=True, tie_word_embeddings=True, head_dim=26, num_attention_heads=6), 40, None),
    "qwen3-layer-types": (
        qwen3(use_sliding_window=True, sliding_window=11,
              layer_types=["sliding_attention", "full_attention", "sliding_attention"]), 40, None),
    "rope-linear": (llama(rope_scaling={"type": "linear", "factor": 4.0}), 60, None),
    "rope-dynamic-within": (llama(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), 60, None),
    "rope-dynamic-beyond": (
        llama(max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 2.0}), 100, 100),
    "rope-llama3": (
        llama(max_position_embeddings=512,
              rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 64}), 90, None),
    "rope-yarn": (
        qwen2(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}), 90, None),
    "rope-yarn-mscale": (
        llama(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                            "mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 8.0, "beta_slow": 0.5}), 90, None),
    "rope-yarn-not-truncated": (
        llama(rope_parameters={"rope_type": "yarn", "rope_theta": 5000.0, "factor": 3.0, "truncate": False,
                               "original_max_position_embeddings": 80, "attention_factor": 1.2}), 90, None),
    "rope-longrope-short": (
        llama(rope_scaling={"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
                            "original_max_position_embeddings": 128}), 60, 128),
    "rope-longrope-long": (
        llama(rope_scaling={"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
                            "original_max_position_embeddings": 32}), 60, None),
    "rope-parameters-spelling": (
        qwen3(rope_parameters={"rope_type": "linear", "rope_theta": 30000.0, "factor": 2.5}), 40, None),
}


def main():
    OUTPUT.mkdir(parents=True, exist_ok=True)
    total = 0
    for name, (config, prompt_length, context_length) in MODELS.items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        result = golden(name, config, prompt_length, context_length)
        text = json.dumps(result, separators=(",", ":")) + "\n"
        (OUTPUT / f"{name}.json").write_text(text)
        total += len(text)
        print(f"{name}: seed {result['seed']}, margin {result['margin']}, {len(text)} bytes")
    print(f"{total} bytes in all")


if __name__ == "__main__":
    main()
