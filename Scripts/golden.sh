#!/usr/bin/env bash
# Remakes the golden files from Hugging Face libraries. Needs Python 3.11 and PyPI; makes a virtual environment in .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install -q "torch==2.13.0" "transformers==5.23.0" "tokenizers==0.23.3" "jinja2==3.1.6" "gguf==0.19.0" safetensors "numpy==2.4.6"
.venv/bin/python Scripts/golden_models.py
.venv/bin/python Scripts/golden_templates.py generate --seed 7 --count 1500 \
  --output Tests/ApusTokenizationTests/Fixtures/template_cases.jsonl
.venv/bin/python Scripts/golden_tokenizers.py write
.venv/bin/python Scripts/golden_gguf.py
.venv/bin/python Scripts/golden_quantized.py
.venv/bin/python Scripts/golden_gguf_quantize.py
