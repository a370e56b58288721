#!/bin/sh
# Remakes a demo model from its seeds: tokenizer, weights, model folder, evaluation.
#
#   [NAME=value ...] sh make.sh [apus-demo | apus-demo-moe]
#
# apus-demo-moe begins from apus-demo and keeps its tokenizer. Run it again after an interruption: training goes on from
# its last checkpoint.
#
# PYTHON  the Python to use; otherwise one in .venv, which is made from requirements.txt
# BUDGET  so many steps of training at most, 100 times as many conversations for the tokenizer (at least 5,000) and a tenth
#         as many questions of each skill (at least 2), with answers of at most 40 tokens: shows in minutes that everything
#         runs, and makes no good model
# BUILD   where checkpoints and the tokenizer lie: build, or with a budget build/budget-$BUDGET
# MODELS  where the model's folder is written, and where apus-demo-moe looks for apus-demo: ../Models, or with a budget
#         $BUILD/Models, so that no shipped weights are lost
# THREADS processes that train, and threads that evaluate (2)
set -eu
cd "$(dirname "$0")"
name="${1:-apus-demo}"
budget="${BUDGET:-0}"
threads="${THREADS:-2}"
case "$name" in
  apus-demo | apus-demo-moe) ;;
  *) sed -n '2,17s/^# \{0,1\}//p' make.sh >&2; exit 2 ;;
esac
case "$budget" in
  '' | *[!0-9]*) echo "make.sh: BUDGET must be a number of steps, got '$budget'." >&2; exit 2 ;;
esac
python="${PYTHON:-.venv/bin/python}"
if [ ! -x "$(command -v "$python")" ]; then
  if [ -n "${PYTHON:-}" ]; then echo "make.sh: there is no $python." >&2; exit 2; fi
  python3 -m venv .venv
  .venv/bin/pip install -r requirements.txt
fi
conversations=20000 targets=40 others=6 longest=320
if [ "$budget" -gt 0 ]; then
  least() { if [ "$1" -lt "$2" ]; then echo "$1"; else echo "$2"; fi; }
  most() { if [ "$1" -gt "$2" ]; then echo "$1"; else echo "$2"; fi; }
  build="${BUILD:-build/budget-$budget}"
  models="${MODELS:-$build/Models}"
  conversations=$(least $conversations "$(most 5000 $((100 * budget)))")
  targets=$(least $targets "$(most 2 $((budget / 10)))")
  others=$(least $others "$targets")
  longest=40
else
  build="${BUILD:-build}"
  models="${MODELS:-../Models}"
fi
model="$models/$name"
mkdir -p "$build" "$models"

# Prints the SHA-256 of files, joined.
hash_of() {
  what="$1"
  shift
  "$python" - "$@" <<'END' | sed "s/^/sha256 $what: /"
import hashlib, sys
print(hashlib.sha256(b"".join(open(path, "rb").read() for path in sys.argv[1:])).hexdigest())
END
}

echo "sha256 corpus, $conversations conversations: $("$python" corpus.py --count "$conversations")"
teacher="$models/apus-demo"
if [ "$name" = apus-demo-moe ]; then
  [ -f "$teacher/model.safetensors" ] || { echo "make.sh: there is no $teacher; make apus-demo first." >&2; exit 1; }
  tokenizer="$teacher"
else
  tokenizer="$build/tokenizer"
  [ -f "$tokenizer/tokenizer.json" ] || "$python" tokenizer.py --count "$conversations" --out "$tokenizer"
fi
hash_of tokenizer "$tokenizer/tokenizer.json" "$tokenizer/tokenizer_config.json"
config="$build/$name.json"
"$python" budget.py --config "configs/$name.json" --steps "$budget" --teacher "$teacher" --out "$config"
"$python" train.py --config "$config" --tokenizer "$tokenizer" --out "$build/$name" --workers "$threads" --resume
"$python" export.py --config "$config" --checkpoint "$build/$name" --tokenizer "$tokenizer" --out "$model"
"$python" evaluate.py --count "$targets" --count-others "$others" --write "$model/evaluation.jsonl"
hash_of questions "$model/evaluation.jsonl"
"$python" evaluate.py --model "$model" --questions "$model/evaluation.jsonl" --out "$model/evaluation.json" \
  --answers "$build/$name/answers.jsonl" --longest-answer "$longest" --threads "$threads"
if [ "$name" = apus-demo-moe ]; then
  "$python" measure.py --model "$model" --questions "$model/evaluation.jsonl" --answers "$build/$name/answers.jsonl" \
    --out "$model/experts.json" --threads "$threads"
fi
echo "$name is in $model"
