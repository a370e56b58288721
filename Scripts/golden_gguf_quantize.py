#!/usr/bin/env python3
"""Writes Tests/ApusConversionTests/Goldens/blocks.json: numbers, and the blocks that the reference makes of them, for
every tensor type of GGUF files that `apus convert` writes and the reference can quantise.

Made with gguf 0.19.0 and numpy 2.4.6. Make it again with

    python3 Scripts/golden_gguf_quantize.py

Numbers (the bits of float32, little-endian) and blocks are written in hexadecimal.
"""

import json
import pathlib

import gguf
import numpy as np
from gguf.quants import quantize

OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "Tests/ApusConversionTests/Goldens/blocks.json"
TYPES = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def numbers() -> np.ndarray:
    """Blocks of 32 numbers: random ones of several sizes, ties, zeros, equal numbers, one outlier, tiny ones."""
    random = np.random.default_rng(11)
    rows = [random.standard_normal(32) * size for size in (1.0, 0.02, 0.02, 3e-5, 40.0)]
    rows.append(random.uniform(0.5, 1.5, 32))
    rows.append(random.uniform(-1.5, -0.5, 32))
    # The largest is 127, so that halves are ties.
    ties = np.arange(32) - 15.5
    ties[0] = 127
    rows.append(ties)
    rows.append(np.arange(-16, 16) * 0.5)
    rows.append(np.zeros(32))
    rows.append(-np.zeros(32))
    rows.append(np.full(32, -0.75))
    outlier = random.standard_normal(32) * 0.01
    outlier[17] = -9.0
    rows.append(outlier)
    pair = random.standard_normal(32) * 0.1
    pair[3], pair[29] = 0.5, -0.5
    rows.append(pair)
    rows.append(random.standard_normal(32) * 1e-7)
    return np.stack(rows).astype(np.float32)


def main() -> None:
    data = numbers()
    goldens = {"numbers": data.tobytes().hex(), "blocks": {}}
    for name in TYPES:
        blocks = np.ascontiguousarray(quantize(data, gguf.GGMLQuantizationType[name]))
        goldens["blocks"][name] = blocks.view(np.uint8).tobytes().hex()
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(goldens, indent=1) + "\n")


if __name__ == "__main__":
    main()
