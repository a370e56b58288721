#!/usr/bin/env python3
"""Converts a checkpoint with `apus convert` and reads the results with other people's libraries.

    python3 Scripts/check_conversion.py .build/release/apus CHECKPOINT [--transformers]

CHECKPOINT is a Hugging Face directory of plain numbers. For every GGUF type, the gguf package must read the file and
dequantise each tensor to what Apus says it wrote (a second conversion, back to float32), bit for bit. compressed-tensors,
GPTQ and AWQ outputs are dequantised by their formulas and compared with `apus convert --format fp32` of the same output.
With --transformers, transformers must load the dense outputs and give the same logits as for the original, and load the
tokenizer that was rebuilt from a GGUF file and give the same ids. Needs gguf, numpy, safetensors, and torch with
transformers for the last part.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy as np
from gguf.quants import dequantize
from safetensors.numpy import load_file

GGUF_TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"]
INTEGERS = [
    ("int8", []), ("int4", []), ("int4", ["--asymmetric"]), ("int4", ["--layout", "gptq"]),
    ("int4", ["--layout", "gptq", "--asymmetric"]), ("int4", ["--layout", "awq"]),
]


def run(*arguments: str) -> None:
    result = subprocess.run(arguments, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(arguments)} failed: {result.stderr}")


def nibbles(words: np.ndarray) -> np.ndarray:
    """[..., n] int32 to [..., n, 8] codes, lowest bits first."""
    return (words.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array, dtype=np.float32).tobytes()


def dequantized(tensors: dict[str, np.ndarray], module: str, group: int, layout: str) -> np.ndarray:
    """The matrix [outputs, inputs] of a module, by the formula of its layout, in float32."""
    get = lambda name: tensors[f"{module}.{name}"]
    if layout == "int8":
        return get("weight").astype(np.float32) * get("weight_scale").astype(np.float32)
    if layout == "compressed-tensors":
        outputs, inputs = get("weight_shape")
        codes = nibbles(get("weight_packed")).reshape(outputs, -1)[:, :inputs].astype(np.float32)
        scales = np.repeat(get("weight_scale").astype(np.float32), group, axis=1)
        zeros = np.float32(8)
        if f"{module}.weight_zero_point" in tensors:
            packed = nibbles(get("weight_zero_point"))  # [outputs / 8, groups, 8]
            zeros = packed.transpose(0, 2, 1).reshape(-1, packed.shape[1])[:outputs].astype(np.float32)
            zeros = np.repeat(zeros, group, axis=1)
        return (codes - zeros) * scales
    scales = get("scales").astype(np.float32)
    if layout == "gptq":
        codes = nibbles(get("qweight")).transpose(0, 2, 1).reshape(-1, scales.shape[1])
        zeros = (nibbles(get("qzeros")).reshape(scales.shape) + 1) & 15
        groups = get("g_idx")
    else:
        order = [0, 4, 1, 5, 2, 6, 3, 7]
        codes = nibbles(get("qweight"))[..., order].reshape(-1, scales.shape[1])
        zeros = nibbles(get("qzeros"))[..., order].reshape(scales.shape)
        groups = np.arange(codes.shape[0]) // group
    return ((codes.astype(np.float32) - zeros[groups].astype(np.float32)) * scales[groups]).T


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("apus")
    parser.add_argument("checkpoint")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--transformers", action="store_true")
    options = parser.parse_args()
    config = json.loads((pathlib.Path(options.checkpoint) / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config.get("num_key_value_heads")}
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder)
        for kind in GGUF_TYPES:
            path, back = base / f"{kind}.gguf", base / f"{kind}-back"
            run(options.apus, "convert", options.checkpoint, str(path), "--format", f"gguf-{kind}", "--quiet")
            run(options.apus, "convert", str(path), str(back), "--format", "fp32", "--quiet")
            stored = load_file(back / "model.safetensors")
            reader = gguf.GGUFReader(path)
            names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
            ours = {names.get_name(name.removesuffix(".weight").removesuffix(".bias")): name for name in stored}
            types = set()
            for tensor in reader.tensors:
                types.add(tensor.tensor_type.name)
                part = tensor.name.split(".")[-2]
                numbers = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
                if config["model_type"] in ("llama", "mistral") and part in heads:
                    shape = numbers.shape
                    numbers = numbers.reshape(heads[part], -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
                own = stored[ours[tensor.name.rsplit(".", 1)[0]]]
                assert bits(own) == bits(numbers), (kind, tensor.name)
            print(f"gguf-{kind}: {len(reader.tensors)} tensors of {', '.join(sorted(types))} agree")
        for kind, flags in INTEGERS:
            label = " ".join([kind, *flags])
            path, back = base / label.replace(" ", "_"), base / (label.replace(" ", "_") + "-back")
            keep = ["--keep", "*.down_proj"] if config["intermediate_size"] % options.group_size else []
            if "--layout" in flags and config["intermediate_size"] % 8:
                keep = ["--keep", "*.mlp.*"]
            group = ["--group-size", str(options.group_size)] if kind == "int4" else []
            run(options.apus, "convert", options.checkpoint, str(path), "--format", kind, "--quiet", *flags, *group, *keep)
            run(options.apus, "convert", str(path), str(back), "--format", "fp32", "--quiet")
            plain, packed = load_file(back / "model.safetensors"), load_file(path / "model.safetensors")
            layout = flags[1] if "--layout" in flags else "int8" if kind == "int8" else "compressed-tensors"
            last = {"int8": "weight_scale", "compressed-tensors": "weight_packed"}.get(layout, "qweight")
            modules = [name.removesuffix(f".{last}") for name in packed if name.endswith(f".{last}")]
            assert modules
            for module in modules:
                numbers = dequantized(packed, module, options.group_size, layout)
                assert bits(numbers) == bits(plain[f"{module}.weight"]), (label, module)
            print(f"{label}: {len(modules)} matrices agree")
        if options.transformers:
            import torch
            from tokenizers import Tokenizer
            from transformers import AutoModelForCausalLM, AutoTokenizer

            def logits(path) -> torch.Tensor:
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
                return model(torch.tensor([[1, 5, 9, 20, 33]])).logits.detach()

            wanted = logits(options.checkpoint)
            assert torch.equal(logits(base / "f32-back"), wanted)
            for kind in ("bf16", "fp16", "fp32"):
                run(options.apus, "convert", options.checkpoint, str(base / kind), "--format", kind, "--quiet",
                    "--max-shard-size", "300KB")
                error = (logits(base / kind) - wanted).abs().max().item()
                assert error < {"bf16": 0.5, "fp16": 0.05, "fp32": 1e-30}[kind], (kind, error)
                print(f"{kind}: transformers loads it; logits differ by at most {error:.3g}")
            # The original's file itself: some classes of transformers change what they read from it.
            original = Tokenizer.from_file(str(pathlib.Path(options.checkpoint) / "tokenizer.json"))
            rebuilt = AutoTokenizer.from_pretrained(base / "f32-back")
            for text in ["Once upon a time", "Hello  world, 12 cats!\n\n é", "", "日本語 🙂", "  x", "a\tb  c"]:
                ids = original.encode(text).ids
                assert rebuilt(text).input_ids == ids, text
                plain = original.encode(text, add_special_tokens=False).ids
                if original.token_to_id("<unk>") in plain:
                    continue  # how it is spelled depends on a flag that GGUF files have no place for
                assert rebuilt.decode(plain) == original.decode(plain, skip_special_tokens=False), text
            print("transformers gives the ids of the original with the rebuilt tokenizer")


if __name__ == "__main__":
    main()
