#!/usr/bin/env python3
"""Writes Tests/ApusExecutionTests/Goldens/Quantized/quantized.json: small quantised matrices and what they stand for.

Made with torch 2.13.0 (CPU) and numpy 2.4.6. Make it again with

    python3 Scripts/golden_quantized.py

Each case goes the opposite way of the reader: numbers, zero points and scales are drawn first, the matrix is computed
from them by the method's formula in float32, and then they are packed one by one as the method's own writer packs them:

    GPTQ                AutoGPTQ, QuantLinear.pack; v1 stores zeros minus one, gptq_v2 stores zeros
    AWQ                 AutoAWQ, WQLinear_GEMM.from_linear
    compressed-tensors  compressors/pack_quantized, naive_quantized
    fp8                 DeepSeek-V3, inference/fp8_cast_bf16.py and kernel.py (the reader's formula)

torch converts fp8, float16 and bfloat16. "expected" holds the matrix as little-endian float32; the reader has to give
these bits.
"""

import json
import pathlib

import numpy as np
import torch

OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "Tests/ApusExecutionTests/Goldens/Quantized/quantized.json"
NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32",
    torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
}
random = np.random.default_rng(20)


def scales(*shape, dtype=torch.float16):
    return torch.from_numpy(random.uniform(0.003, 0.02, shape).astype(np.float32)).to(dtype)


def wide(tensor):
    return tensor.to(torch.float32).numpy()


def words(codes, bits, order=None):
    """Packs the last axis: 32 / bits unsigned codes in a word, the first in the lowest bits."""
    count = 32 // bits
    order = order or list(range(count))
    padded = np.zeros(codes.shape[:-1] + (-(-codes.shape[-1] // count) * count,), dtype=np.uint64)
    padded[..., : codes.shape[-1]] = codes
    result = np.zeros(padded.shape[:-1] + (padded.shape[-1] // count,), dtype=np.uint64)
    for word in range(result.shape[-1]):
        for place in range(count):
            result[..., word] |= padded[..., word * count + order[place]] << np.uint64(place * bits)
    return torch.from_numpy(result.astype(np.uint32).view(np.int32).copy())


def gptq(bits, outputs, inputs, group_size, act_order=False, symmetric=False, v2=False, with_index=True, dtype=None):
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    q = random.integers(0, 1 << bits, (outputs, inputs))
    # v1 cannot tell a zero of 0 from one of 2^bits, so it is drawn too: it has to come back as 0.
    z = np.full((groups, outputs), 1 << (bits - 1)) if symmetric else random.integers(0, 1 << bits, (groups, outputs))
    s = scales(groups, outputs, dtype=dtype or torch.float16)
    index = np.arange(inputs) // size
    if act_order:
        random.shuffle(index)
    expected = np.zeros((outputs, inputs), dtype=np.float32)
    for n in range(outputs):
        for k in range(inputs):
            expected[n, k] = wide(s)[index[k], n] * np.float32(int(q[n, k]) - int(z[index[k], n]))
    stored = z if v2 else (z - 1) % (1 << bits)
    tensors = {"qweight": words(q, bits).T.contiguous(), "qzeros": words(stored, bits), "scales": s}
    if with_index:
        tensors["g_idx"] = torch.from_numpy(index.astype(np.int32))
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": act_order, "sym": symmetric}
    if v2:
        config["checkpoint_format"] = "gptq_v2"
    return config, tensors, expected


def awq(outputs, inputs, group_size):
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    q = random.integers(0, 16, (inputs, outputs))
    z = random.integers(0, 16, (groups, outputs))
    s = scales(groups, outputs)
    expected = np.zeros((outputs, inputs), dtype=np.float32)
    for n in range(outputs):
        for k in range(inputs):
            expected[n, k] = np.float32(int(q[k, n]) - int(z[k // size, n])) * wide(s)[k // size, n]
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {"qweight": words(q, 4, order), "qzeros": words(z, 4, order), "scales": s}
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return config, tensors, expected


def compressed(format, type, bits, strategy, symmetric, outputs, inputs, group_size=None, actorder=None,
               dtype=torch.bfloat16, block=None):
    rows, columns = {
        "tensor": (1, 1), "channel": (outputs, 1), "group": (outputs, -(-inputs // (group_size or 1))),
        "block": (-(-outputs // (block or [1])[0]), -(-inputs // (block or [1])[-1])),
    }[strategy]
    height, width = {
        "tensor": (outputs, inputs), "channel": (1, inputs), "group": (1, group_size), "block": block,
    }[strategy]
    s = scales(rows, columns, dtype=dtype)
    index = np.arange(inputs) // width
    if actorder:
        random.shuffle(index)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    z = np.zeros((rows, columns), dtype=np.int64) if symmetric else random.integers(low, high, (rows, columns))
    if type == "float":
        q8 = torch.from_numpy(random.normal(0, 60, (outputs, inputs)).astype(np.float32)).to(torch.float8_e4m3fn)
        q = wide(q8)
    else:
        q = random.integers(low, high, (outputs, inputs))
    expected = np.zeros((outputs, inputs), dtype=np.float32)
    for n in range(outputs):
        for k in range(inputs):
            place = (n // height, index[k])
            expected[n, k] = np.float32(q[n, k] - z[place]) * wide(s)[place]
    tensors = {"weight_scale": s.reshape(1) if strategy == "tensor" else s}
    if format == "pack-quantized":
        tensors["weight_packed"] = words(q - low, bits)
        tensors["weight_shape"] = torch.tensor([outputs, inputs], dtype=torch.int64)
        if not symmetric:
            tensors["weight_zero_point"] = words((z - low).T, bits).T.contiguous()
    else:
        tensors["weight"] = q8 if type == "float" else torch.from_numpy(q.astype(np.int8))
        if not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy(z.astype(np.int8))
    if actorder:
        tensors["weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
    weights = {"num_bits": bits, "type": type, "strategy": strategy, "symmetric": symmetric, "group_size": group_size,
               "actorder": actorder, "block_structure": block}
    config = {"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"],
              "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    return config, tensors, expected


def fp8(outputs, inputs, block=None, scale_shape=None, dtype=torch.float32, every_code=False):
    q8 = torch.from_numpy(random.normal(0, 60, (outputs, inputs)).astype(np.float32)).to(torch.float8_e4m3fn)
    if every_code:
        codes = np.arange(outputs * inputs, dtype=np.uint8)
        codes[codes & 127 == 127] = 0  # NaN has no one pattern in float32
        q8 = torch.from_numpy(codes).view(torch.float8_e4m3fn).reshape(outputs, inputs)
    height, width = block or ((1, inputs) if scale_shape == (outputs, 1) else (outputs, inputs))
    shape = (-(-outputs // height), -(-inputs // width))
    s = scales(*shape)
    s = torch.exp2(torch.round(torch.log2(s.float()))).to(dtype) if dtype == torch.float8_e8m0fnu else s.to(dtype)
    expected = wide(q8) * np.repeat(np.repeat(wide(s), height, 0), width, 1)[:outputs, :inputs]
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if block:
        config["weight_block_size"] = list(block)
    name = "weight_scale_inv" if block else "weight_scale"
    return config, {"weight": q8, name: s.reshape(scale_shape or s.shape)}, expected.astype(np.float32)


CASES = {
    "gptq 4 bits, zero points": lambda: gptq(4, 16, 32, 8),
    "gptq 4 bits, symmetric, no g_idx": lambda: gptq(4, 8, 32, 16, symmetric=True, with_index=False),
    "gptq 4 bits, act-order, bfloat16 scales": lambda: gptq(4, 16, 32, 8, act_order=True, dtype=torch.bfloat16),
    "gptq 4 bits, one group, last group short": lambda: gptq(4, 8, 24, 16),
    "gptq 4 bits, all inputs one group": lambda: gptq(4, 8, 16, -1),
    "gptq v2 4 bits": lambda: gptq(4, 8, 16, 8, v2=True),
    "gptq 8 bits, act-order": lambda: gptq(8, 12, 24, 8, act_order=True),
    "gptq v2 8 bits": lambda: gptq(8, 8, 16, 8, v2=True),
    "awq": lambda: awq(16, 32, 8),
    "awq, all inputs one group": lambda: awq(24, 20, -1),
    "packed int4, groups": lambda: compressed("pack-quantized", "int", 4, "group", True, 9, 32, 8),
    "packed int4, groups, zero points": lambda: compressed("pack-quantized", "int", 4, "group", False, 11, 32, 16),
    "packed int4, groups, act-order": lambda: compressed(
        "pack-quantized", "int", 4, "group", False, 8, 32, 8, actorder="group"),
    "packed int4, channels, last word short": lambda: compressed("pack-quantized", "int", 4, "channel", False, 9, 21),
    "packed int8, channels": lambda: compressed("pack-quantized", "int", 8, "channel", False, 6, 18),
    "packed int8, groups": lambda: compressed("pack-quantized", "int", 8, "group", True, 6, 16, 8, dtype=torch.float16),
    "int8, tensor": lambda: compressed("int-quantized", "int", 8, "tensor", True, 7, 9, dtype=torch.float32),
    "int8, channels": lambda: compressed("int-quantized", "int", 8, "channel", True, 7, 9),
    "int8, channels, zero points, float32": lambda: compressed(
        "int-quantized", "int", 8, "channel", False, 7, 9, dtype=torch.float32),
    "int8, groups": lambda: compressed("int-quantized", "int", 8, "group", True, 5, 16, 8),
    "float8, tensor": lambda: compressed("float-quantized", "float", 8, "tensor", True, 7, 9, dtype=torch.float32),
    "float8, channels": lambda: compressed("float-quantized", "float", 8, "channel", True, 7, 9),
    "float8, blocks": lambda: compressed(
        "float-quantized", "float", 8, "block", True, 10, 20, dtype=torch.float32, block=[4, 8]),
    "fp8 blocks": lambda: fp8(20, 24, (8, 16)),
    "fp8 blocks, powers of two": lambda: fp8(12, 12, (8, 8), dtype=torch.float8_e8m0fnu),
    "fp8 tensor, every code": lambda: fp8(16, 16, scale_shape=(), every_code=True),
    "fp8 channels": lambda: fp8(6, 10, scale_shape=(6, 1)),
}


def encode(tensor):
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "hex": raw.hex()}


def main():
    cases = []
    for name, make in CASES.items():
        config, tensors, expected = make()
        cases.append({
            "name": name, "quantization_config": config, "shape": list(expected.shape),
            "tensors": {key: encode(value) for key, value in tensors.items()},
            "expected": expected.astype("<f4").tobytes().hex(),
        })
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    print(f"{len(cases)} cases, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
