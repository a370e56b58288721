#!/usr/bin/env python3
"""Writes the golden files of families whose experts stand behind a softmax router:
Tests/ApusExecutionTests/Goldens/{mixtral,qwen2-moe,qwen3-moe,olmoe,gpt-oss,granite}*.json, and of dense Granite models,
which have the same multipliers.

As Scripts/golden_models.py and golden_deepseek.py, whose weights and search for clear margins it shares. transformers keeps
Mixtral's block under another name than checkpoints do. Made with transformers 5.24.0, torch 2.15.0 (on the CPU). Make them
again with

    python3 Scripts/golden_moe.py            (all of them)
    python3 Scripts/golden_moe.py NAME...    (some)
"""

import json
import sys

import golden_deepseek
import golden_models
import torch
import transformers
from golden_models import OUTPUT, weight

PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def numbers(name: str, shape, seed: int, spread: float) -> torch.Tensor:
    """A weight as checkpoints name it; Mixtral's block is known by the names of its model."""
    if IS_MIXTRAL[0]:
        name = name.replace(".mlp.", ".block_sparse_moe.")
        parts = name.split(".")
        if "experts" in parts:
            parts[-2] = PARTS[parts[-2]]
        name = ".".join(parts)
    return torch.from_numpy(weight(name, tuple(shape), seed, spread))


IS_MIXTRAL = [False]
golden_deepseek.numbers = numbers


# What published Granite checkpoints call weights that transformers has under other names.
GRANITE = {
    "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
}


def build(config: dict, seed: int):
    if config["model_type"] != "gpt_oss" and not config["model_type"].startswith("granite"):
        return golden_deepseek.build(config, seed)
    # gpt-oss and Granite store their experts as transformers has them.
    loaded = transformers.AutoConfig.for_model(
        config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    loaded._attn_implementation = loaded._experts_implementation = "eager"
    model = getattr(transformers, config["architectures"][0])(loaded).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for there, stored in GRANITE.items():
                name = name.replace(there, stored)
            parameter.copy_(numbers(name, parameter.shape, seed, config["initializer_range"]))
    return model


golden_models.build = build


def base(architecture: str, model_type: str, **changes) -> dict:
    return golden_models.base(architecture, model_type, **{"num_experts_per_tok": 2, **changes})


def mixtral(**changes):
    return base("MixtralForCausalLM", "mixtral", **{"sliding_window": None, "num_local_experts": 8, **changes})


def qwen2(**changes):
    return base(
        "Qwen2MoeForCausalLM", "qwen2_moe",
        **{"num_experts": 8, "moe_intermediate_size": 22, "shared_expert_intermediate_size": 44, "norm_topk_prob": False,
           "decoder_sparse_step": 1, "mlp_only_layers": [], **changes})


def qwen3(**changes):
    return base(
        "Qwen3MoeForCausalLM", "qwen3_moe",
        **{"head_dim": 12, "num_experts": 8, "moe_intermediate_size": 22, "norm_topk_prob": True,
           "decoder_sparse_step": 1, "mlp_only_layers": [], **changes})


def olmoe(**changes):
    return base("OlmoeForCausalLM", "olmoe", **{"num_experts": 8, "norm_topk_prob": False, "intermediate_size": 26, **changes})


def gpt_oss(**changes):
    return base(
        "GptOssForCausalLM", "gpt_oss",
        **{"head_dim": 12, "num_local_experts": 8, "intermediate_size": 26, "attention_bias": True, "sliding_window": 11,
           "swiglu_limit": 0.6, "eos_token_id": None, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
           **changes})


MULTIPLIERS = {
    "embedding_multiplier": 3.5, "attention_multiplier": 0.4, "residual_multiplier": 0.37, "logits_scaling": 1.7}


def granite(**changes):
    return base("GraniteForCausalLM", "granite", **{**MULTIPLIERS, **changes})


def granite_moe(**changes):
    return base(
        "GraniteMoeForCausalLM", "granitemoe",
        **{**MULTIPLIERS, "num_local_experts": 8, "intermediate_size": 26, **changes})


def granite_shared(**changes):
    return granite_moe() | {
        "architectures": ["GraniteMoeSharedForCausalLM"], "model_type": "granitemoeshared",
        "shared_intermediate_size": 34, **changes}


# name: (config, prompt length, served context length or None for the model's own)
MODELS = {
    "mixtral": (mixtral(), 40, None),
    "mixtral-odd-sizes": (
        mixtral(num_local_experts=5, num_experts_per_tok=3, hidden_size=60, num_attention_heads=6,
                num_key_value_heads=3, intermediate_size=37, vocab_size=101, sliding_window=13,
                tie_word_embeddings=True), 45, None),
    "mixtral-wide": (
        mixtral(hidden_size=70, num_attention_heads=7, num_key_value_heads=1, intermediate_size=130, vocab_size=67,
                num_hidden_layers=2, num_experts_per_tok=1), 33, None),
    "qwen2-moe": (qwen2(rope_theta=1e6), 40, None),
    "qwen2-moe-dense-layers": (
        qwen2(num_hidden_layers=5, decoder_sparse_step=2, mlp_only_layers=[3], num_experts=6, num_experts_per_tok=4,
              norm_topk_prob=True, num_attention_heads=3, num_key_value_heads=3, vocab_size=89), 37, None),
    "qwen2-moe-tied": (
        qwen2(tie_word_embeddings=True, num_experts=11, num_experts_per_tok=3, hidden_size=50, num_attention_heads=5,
              num_key_value_heads=1, moe_intermediate_size=17, shared_expert_intermediate_size=90), 50, None),
    "qwen3-moe": (qwen3(), 40, None),
    "qwen3-moe-odd-sizes": (
        qwen3(num_experts=13, num_experts_per_tok=5, head_dim=26, num_attention_heads=7, num_key_value_heads=1,
              moe_intermediate_size=19, norm_topk_prob=False, hidden_size=56, vocab_size=103), 45, None),
    "qwen3-moe-dense-layers": (
        qwen3(num_hidden_layers=4, mlp_only_layers=[0, 2], attention_bias=True, tie_word_embeddings=True,
              num_experts=16, num_experts_per_tok=8, use_sliding_window=True, sliding_window=11), 38, None),
    "olmoe": (olmoe(), 40, None),
    "olmoe-grouped": (
        olmoe(num_attention_heads=9, num_key_value_heads=3, hidden_size=90, num_experts=7, num_experts_per_tok=4,
              intermediate_size=31, vocab_size=79), 42, None),
    "olmoe-normalised": (
        olmoe(norm_topk_prob=True, hidden_size=56, num_attention_heads=7, num_key_value_heads=7, num_hidden_layers=2,
              num_experts=12, num_experts_per_tok=8), 35, None),
    "gpt-oss": (gpt_oss(), 40, None),
    "gpt-oss-odd-sizes": (
        gpt_oss(num_local_experts=7, num_experts_per_tok=3, hidden_size=50, num_attention_heads=5,
                num_key_value_heads=1, head_dim=22, intermediate_size=19, vocab_size=101, num_hidden_layers=4,
                layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"]), 45, None),
    "gpt-oss-yarn": (
        gpt_oss(num_attention_heads=6, num_key_value_heads=3, num_local_experts=5, num_experts_per_tok=4,
                swiglu_limit=7.0,
                rope_parameters={"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0,
                                 "beta_slow": 1.0, "original_max_position_embeddings": 64, "truncate": False}),
        90, None),
    "granite": (granite(), 40, None),
    "granite-tied-bias": (
        granite(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, num_attention_heads=5, num_key_value_heads=1,
                hidden_size=70, intermediate_size=51, vocab_size=103, logits_scaling=0.6, residual_multiplier=0.8), 37,
        None),
    "granite-moe": (granite_moe(), 40, None),
    "granite-moe-tied": (
        granite_moe(tie_word_embeddings=True, num_local_experts=11, num_experts_per_tok=5, num_attention_heads=6,
                    num_key_value_heads=3, hidden_size=72, intermediate_size=19, vocab_size=101, num_hidden_layers=4,
                    embedding_multiplier=0.7, attention_multiplier=0.3, residual_multiplier=0.9, logits_scaling=1.0), 45, None),
    "granite-moe-bias": (
        granite_moe(num_local_experts=5, num_experts_per_tok=1, attention_bias=True, num_attention_heads=7,
                    num_key_value_heads=7, hidden_size=56, vocab_size=89, num_hidden_layers=2,
                    residual_multiplier=1.0), 33, None),
    "granite-moe-shared": (granite_shared(), 40, None),
    "granite-moe-shared-odd-sizes": (
        granite_shared(num_local_experts=7, num_experts_per_tok=3, shared_intermediate_size=17, intermediate_size=23,
                       num_attention_heads=5, num_key_value_heads=1, hidden_size=50, vocab_size=107), 42, None),
    "granite-moe-shared-none": (granite_shared(shared_intermediate_size=0, num_experts_per_tok=4), 38, None),
}


def main():
    for name, (config, prompt_length, context_length) in MODELS.items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        IS_MIXTRAL[0] = config["model_type"] == "mixtral"
        result = golden_models.golden(name, config, prompt_length, context_length)
        text = json.dumps(result, separators=(",", ":")) + "\n"
        (OUTPUT / f"{name}.json").write_text(text)
        print(f"{name}: seed {result['seed']}, margin {result['margin']}, {len(text)} bytes", flush=True)


if __name__ == "__main__":
    main()
