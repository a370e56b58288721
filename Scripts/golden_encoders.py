#!/usr/bin/env python3
"""Writes the golden files of Tests/ApusExecutionTests/Goldens/Encoders: vectors and labels of tiny random encoders, and
vectors of a tiny random decoder, computed by Hugging Face transformers in float32 on the CPU.

Made with transformers 5.24.0, torch 2.15.0 (CPU). Make them again with

    python3 Scripts/golden_encoders.py

As in Scripts/golden_models.py the weights need no file: every number is a function of seed, name and index. Sequences
are computed one at a time, so that there is no padding.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

from golden_models import weight

OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "Tests/ApusExecutionTests/Goldens/Encoders"
SEED = 7

SIZES = {
    "vocab_size": 89, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 80, "initializer_range": 0.15, "layer_norm_eps": 1e-12, "type_vocab_size": 2,
}
ONE_LABEL = {"id2label": {"0": "LABEL_0"}}
MODELS = {
    "bert": {**SIZES, "architectures": ["BertModel"], "model_type": "bert", "pad_token_id": 0, "hidden_act": "gelu"},
    "bert-tanh-wide-head": {
        **SIZES, "architectures": ["BertModel"], "model_type": "bert", "pad_token_id": 0, "hidden_act": "gelu_new",
        "hidden_size": 64, "num_attention_heads": 1, "layer_norm_eps": 1e-5,
    },
    "bert-relu": {
        **SIZES, "architectures": ["BertModel"], "model_type": "bert", "pad_token_id": 0, "hidden_act": "relu",
        "hidden_size": 33, "num_attention_heads": 3,
    },
    "roberta": {
        **SIZES, "architectures": ["RobertaModel"], "model_type": "roberta", "pad_token_id": 1, "hidden_act": "gelu",
        "type_vocab_size": 1,
    },
    "xlm-roberta": {
        **SIZES, "architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta", "pad_token_id": 3,
        "hidden_act": "gelu", "type_vocab_size": 1,
    },
    "bert-cross-encoder": {
        **SIZES, **ONE_LABEL, "architectures": ["BertForSequenceClassification"], "model_type": "bert",
        "pad_token_id": 0, "hidden_act": "gelu",
    },
    "xlm-roberta-three-labels": {
        **SIZES, "id2label": {"0": "a", "1": "b", "2": "c"},
        "architectures": ["XLMRobertaForSequenceClassification"], "model_type": "xlm-roberta", "pad_token_id": 1,
        "hidden_act": "gelu", "type_vocab_size": 1,
    },
}
DECODER = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 67, "hidden_size": 48,
    "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "initializer_range": 0.15, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "attention_bias": False,
}


def build(config: dict):
    settings = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    if "id2label" in settings:
        settings["id2label"] = {int(key): value for key, value in settings["id2label"].items()}
    loaded = transformers.AutoConfig.for_model(config["model_type"], **settings)
    loaded._attn_implementation = "eager"
    model = getattr(transformers, config["architectures"][0])(loaded).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The names under which a bare encoder's weights are stored.
            stored = name.removeprefix(model.base_model_prefix + ".") if hasattr(model, "classifier") else name
            shape = tuple(parameter.shape)
            if stored.endswith("LayerNorm.weight"):
                # Drawn as norm weights are: around one.
                numbers = 1 + (weight(stored, shape, SEED, 1.0) / np.float32(np.sqrt(3))) * np.float32(0.1)
            else:
                numbers = weight(stored, shape, SEED, config["initializer_range"])
            parameter.copy_(torch.from_numpy(np.asarray(numbers, dtype=np.float32)))
    return model


def rounded(numbers) -> list:
    return [float(f"{number:.8g}") for number in numbers]


@torch.no_grad()
def encoder(name: str, config: dict) -> dict:
    model = build(config)
    generator = np.random.Generator(np.random.PCG64(len(name)))
    cases = []
    for length, first in [(1, None), (7, 3), (16, None), (17, 9), (70, 31)]:
        tokens = generator.integers(5, config["vocab_size"], length).tolist()
        types = [0 if first is None or place < first else 1 for place in range(length)]
        if config["type_vocab_size"] == 1:
            types, first = [0] * length, None
        output = model(torch.tensor([tokens]), token_type_ids=torch.tensor([types]))
        case = {"tokens": tokens, "first_segment": first}
        if "classifier" in dict(model.named_children()):
            case["labels"] = rounded(output.logits[0].tolist())
        else:
            hidden = output.last_hidden_state[0]
            case["cls"] = rounded(hidden[0].tolist())
            case["last"] = rounded(hidden[-1].tolist())
            case["mean"] = rounded(hidden.mean(0).tolist())
        cases.append(case)
    # What save_pretrained would write.
    return {"config": config, "seed": SEED, "names": list(model.state_dict()), "cases": cases}


@torch.no_grad()
def decoder(config: dict) -> dict:
    model = build(config)
    generator = np.random.Generator(np.random.PCG64(5))
    cases = []
    for length in [1, 5, 33, 100]:
        tokens = generator.integers(0, config["vocab_size"], length).tolist()
        hidden = model.model(torch.tensor([tokens])).last_hidden_state[0]
        cases.append(
            {"tokens": tokens, "last": rounded(hidden[-1].tolist()), "mean": rounded(hidden.mean(0).tolist())})
    # What save_pretrained of the model without its output layer would write, as embedding models are stored.
    return {"config": config, "seed": SEED, "names": list(model.model.state_dict()), "cases": cases}


def main():
    OUTPUT.mkdir(parents=True, exist_ok=True)
    goldens = {name: encoder(name, config) for name, config in MODELS.items()}
    goldens["decoder-qwen3"] = decoder(DECODER)
    for name, golden in goldens.items():
        (OUTPUT / f"{name}.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
        print(name)


if __name__ == "__main__":
    main()
