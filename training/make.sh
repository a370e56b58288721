#!/bin/sh
# Remakes a demo model from its seeds: tokenizer, weights, model folder, evaluation.
#   sh make.sh [apus-demo | apus-demo-moe]
# apus-demo-moe begins from Models/apus-demo and keeps its tokenizer. Run it again after an interruption: training goes on
# from its last checkpoint.
set -eu
cd "$(dirname "$0")"
name="${1:-apus-demo}"
python="${PYTHON:-.venv/bin/python}"
if [ ! -x "$(command -v "$python")" ]; then
  python3 -m venv .venv
  .venv/bin/pip install -r requirements.txt
fi
model="../Models/$name"
if [ "$name" = apus-demo-moe ]; then
  tokenizer=../Models/apus-demo
else
  tokenizer=build/tokenizer
  [ -f build/tokenizer/tokenizer.json ] || "$python" tokenizer.py --out build/tokenizer
fi
"$python" train.py --config "configs/$name.json" --tokenizer "$tokenizer" --out "build/$name" --resume
"$python" export.py --config "configs/$name.json" --checkpoint "build/$name" --tokenizer "$tokenizer" --out "$model"
"$python" evaluate.py --count 40 --count-others 6 --write "$model/evaluation.jsonl"
"$python" evaluate.py --model "$model" --questions "$model/evaluation.jsonl" --out "$model/evaluation.json" \
  --answers "build/$name/answers.jsonl"
if [ "$name" = apus-demo-moe ]; then
  "$python" measure.py --model "$model" --questions "$model/evaluation.jsonl" --answers "build/$name/answers.jsonl" \
    --out "$model/experts.json"
fi
