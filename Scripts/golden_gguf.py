#!/usr/bin/env python3
"""Writes Tests/ApusExecutionTests/Goldens/gguf/blocks.json: random blocks of every tensor type of GGUF files that can be
read, and what the reference makes of them.

Made with gguf 0.19.0 and numpy 2.4.6. Make it again with

    python3 Scripts/golden_gguf.py

Blocks are random bytes, except that scales are small finite numbers. Blocks and results (the bits of float32 numbers,
little-endian) are written in hexadecimal.
"""

import json
import pathlib

import gguf
import numpy as np
from gguf.quants import dequantize

OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "Tests/ApusExecutionTests/Goldens/gguf/blocks.json"
# Offsets of float16 scales in a block of each type.
SCALES = {
    "F16": [0], "BF16": [], "F32": [], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "MXFP4": [],
}


def main() -> None:
    random = np.random.default_rng(7)
    goldens = {}
    for name, offsets in SCALES.items():
        kind = gguf.GGMLQuantizationType[name]
        length, width = gguf.GGML_QUANT_SIZES[kind]
        blocks = {1: 32, 32: 4, 256: 2}[length]
        if name == "F32":
            data = random.standard_normal(blocks).astype(np.float32).view(np.uint8)
        elif name == "BF16":
            data = (random.standard_normal(blocks).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            data = data.view(np.uint8)
        else:
            data = random.integers(0, 256, (blocks, width), dtype=np.uint8)
            for offset in offsets:
                scale = (random.standard_normal(blocks) * 0.05).astype(np.float16)
                data[:, offset : offset + 2] = scale.view(np.uint8).reshape(blocks, 2)
            if name == "MXFP4":
                data[:, 0] = [0, 1, 120, 130]
            data = data.reshape(-1)
        numbers = np.ascontiguousarray(dequantize(data.reshape(1, -1), kind), dtype=np.float32).reshape(-1)
        assert np.isfinite(numbers).all() and len(numbers) == blocks * length
        goldens[name] = {"type": int(kind), "blocks": data.tobytes().hex(), "numbers": numbers.tobytes().hex()}
    OUTPUT.write_text(json.dumps(goldens, indent=1) + "\n")


if __name__ == "__main__":
    main()
