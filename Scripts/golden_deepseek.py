#!/usr/bin/env python3
"""Writes the golden files of DeepSeek's families and of GLM-4.5, which has DeepSeek-V3's experts:
Tests/ApusExecutionTests/Goldens/deepseek-*.json and glm-*.json.

As Scripts/golden_models.py, whose weights and search for clear margins it shares; this script knows in addition that
transformers keeps all experts of a layer in one tensor and the router's correction as a buffer, and names both as
checkpoints do. Made with transformers 5.24.0, torch 2.15.0 (on the CPU). Make them again with

    python3 Scripts/golden_deepseek.py            (all of them)
    python3 Scripts/golden_deepseek.py NAME...    (some)
"""

import json
import sys

import numpy as np
import torch
import transformers

import golden_models
from golden_models import OUTPUT, weight


def numbers(name: str, shape, seed: int, spread: float) -> torch.Tensor:
    """A weight as checkpoints name it."""
    return torch.from_numpy(weight(name, tuple(shape), seed, spread))


def build(config: dict, seed: int):
    loaded = transformers.AutoConfig.for_model(
        config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    loaded._attn_implementation = "eager"
    # One plain loop over experts.
    loaded._experts_implementation = "eager"
    model = getattr(transformers, config["architectures"][0])(loaded).eval()
    spread = config["initializer_range"]
    with torch.no_grad():
        tensors = dict(model.named_parameters())
        tensors |= {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
        for name, parameter in tensors.items():
            if name.endswith("experts.gate_up_proj"):
                prefix, (experts, width, inputs) = name.removesuffix("gate_up_proj"), parameter.shape
                for e in range(experts):
                    for part, begin in (("gate_proj", 0), ("up_proj", width // 2)):
                        parameter[e, begin:begin + width // 2] = numbers(
                            f"{prefix}{e}.{part}.weight", (width // 2, inputs), seed, spread)
            elif name.endswith("experts.down_proj"):
                prefix, (experts, outputs, inputs) = name.removesuffix("down_proj"), parameter.shape
                for e in range(experts):
                    parameter[e] = numbers(f"{prefix}{e}.down_proj.weight", (outputs, inputs), seed, spread)
            else:
                parameter.copy_(numbers(name, parameter.shape, seed, spread))
    return model


golden_models.build = build


def base(architecture: str, model_type: str, **changes) -> dict:
    config = {
        "architectures": [architecture], "model_type": model_type, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 97,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "initializer_range": 0.2, "attention_bias": False, "q_lora_rank": 24,
        "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "first_k_dense_replace": 99,
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 22,
        "routed_scaling_factor": 1.0, "n_group": 4, "topk_group": 2, "norm_topk_prob": False,
    }
    config.update(changes)
    return config


def v2(**changes):
    return base("DeepseekV2ForCausalLM", "deepseek_v2", **{"topk_method": "greedy", "scoring_func": "softmax", **changes})


def v3(**changes):
    return base(
        "DeepseekV3ForCausalLM", "deepseek_v3",
        **{"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
           "num_nextn_predict_layers": 0, **changes})


def glm(**changes):
    """GLM-4.5: ordinary attention, half of each head rotated, and V3's router."""
    config = base(
        "Glm4MoeForCausalLM", "glm4_moe",
        **{"norm_topk_prob": True, "rms_norm_eps": 1e-5, "head_dim": 12, "num_key_value_heads": 2, "n_group": 1,
           "topk_group": 1, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 0,
           **changes})
    for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        del config[key]
    return config


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}

# name: (config, prompt length, served context length or None for the model's own)
DENSE = {
    "deepseek-v2-dense": (v2(), 40, None),
    "deepseek-v2-lite-dense": (
        v2(q_lora_rank=None, num_attention_heads=3, num_key_value_heads=3, kv_lora_rank=34, qk_nope_head_dim=14,
           qk_rope_head_dim=6, v_head_dim=17, vocab_size=101,
           rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}), 90, None),
    "deepseek-v3-dense": (
        v3(num_attention_heads=6, num_key_value_heads=6, rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
        70, None),
    "deepseek-v3-dense-halves": (v3(rope_interleave=False, attention_bias=True, kv_lora_rank=16), 50, None),
    "deepseek-v3-dense-long": (
        v3(num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=5, hidden_size=40, intermediate_size=50,
           kv_lora_rank=64, qk_rope_head_dim=16, max_position_embeddings=700, vocab_size=61), 600, None),
}
EXPERTS = {
    "deepseek-v2": (
        v2(first_k_dense_replace=1, topk_method="group_limited_greedy", n_routed_experts=12, n_group=3, topk_group=2,
           num_experts_per_tok=3, n_shared_experts=2, routed_scaling_factor=16.0, num_attention_heads=6,
           num_key_value_heads=6, rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}), 60, None),
    "deepseek-v2-lite": (
        v2(q_lora_rank=None, first_k_dense_replace=1, n_routed_experts=9, n_group=1, topk_group=1, num_experts_per_tok=4,
           n_shared_experts=2, num_attention_heads=3, num_key_value_heads=3, vocab_size=103), 45, None),
    "deepseek-v3": (
        v3(first_k_dense_replace=1, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4,
           rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}), 70, None),
    "deepseek-v3-odd": (
        v3(first_k_dense_replace=0, n_routed_experts=15, n_group=5, topk_group=3, num_experts_per_tok=5,
           num_attention_heads=7, num_key_value_heads=7, hidden_size=56, moe_intermediate_size=19, n_shared_experts=2,
           q_lora_rank=31, kv_lora_rank=27, v_head_dim=9, num_hidden_layers=4), 45, None),
    "deepseek-v3-tied": (
        v3(first_k_dense_replace=2, tie_word_embeddings=True, norm_topk_prob=False, n_group=1, topk_group=1,
           routed_scaling_factor=1.5, vocab_size=131, hidden_size=64), 40, None),
}
GLM = {
    "glm-4.5": (
        glm(use_qk_norm=True, attention_bias=True, routed_scaling_factor=2.5, num_attention_heads=6, num_key_value_heads=3),
        40, None),
    "glm-4.5-air": (
        glm(n_routed_experts=11, num_experts_per_tok=3, head_dim=20, num_attention_heads=5, num_key_value_heads=1,
            vocab_size=109), 33, None),
}
MODELS = DENSE | EXPERTS | GLM


def main():
    for name, (config, prompt_length, context_length) in MODELS.items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        result = golden_models.golden(name, config, prompt_length, context_length)
        text = json.dumps(result, separators=(",", ":")) + "\n"
        (OUTPUT / f"{name}.json").write_text(text)
        print(f"{name}: seed {result['seed']}, margin {result['margin']}, {len(text)} bytes", flush=True)


if __name__ == "__main__":
    main()
