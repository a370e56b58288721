#!/bin/sh
# Remakes a demo model from its seeds: tokenizer, weights, model folder, evaluation.
#   sh make.sh [apus-demo | apus-demo-moe]
# Run it again after an interruption: training goes on from its last checkpoint.
set -eu
cd "$(dirname "$0")"
name="${1:-apus-demo}"
python="${PYTHON:-.venv/bin/python}"
if [ ! -x "$(command -v "$python")" ]; then
  python3 -m venv .venv
  .venv/bin/pip install -r requirements.txt
fi
[ -f build/tokenizer/tokenizer.json ] || "$python" tokenizer.py --out build/tokenizer
"$python" train.py --config "configs/$name.json" --tokenizer build/tokenizer --out "build/$name" --resume
"$python" export.py --config "configs/$name.json" --checkpoint "build/$name" --out "../Models/$name"
"$python" evaluate.py --count 40 --count-others 6 --write "../Models/$name/evaluation.jsonl"
"$python" evaluate.py --model "../Models/$name" --questions "../Models/$name/evaluation.jsonl" \
  --out "../Models/$name/evaluation.json"
