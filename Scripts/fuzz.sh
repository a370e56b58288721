#!/usr/bin/env bash
# Fuzzes every parser for ten minutes each (FUZZ_SECONDS), one after another, with bounded memory, and compares tokenizers and
# templates with Hugging Face's where a Python with them is named (FUZZ_PYTHON). Meant for the night; the same tests run for
# a moment in `make test`. A test that fails prints the seed that repeats it; where the process ended, the input at work is
# in fuzz-case.txt: APUS_FUZZ_SEED=... APUS_FUZZ_COUNT=1 swift test --filter ... repeats it.
set -euo pipefail
cd "$(dirname "$0")/.."
export APUS_FUZZ_SECONDS=${FUZZ_SECONDS:-600} APUS_FUZZ_CASE_FILE=$PWD/fuzz-case.txt
swift build -c release --build-tests
apus=$(swift build -c release --show-bin-path)/apus
failed=()
for name in ParserFuzzTests/tokenizerJSON ParserFuzzTests/sentencePiece ParserFuzzTests/tiktoken ParserFuzzTests/gguf \
  ParserFuzzTests/jinja ParserFuzzTests/harmony ParserFuzzTests/json ParserFuzzTests/patterns \
  CheckpointFuzzTests/safetensorsHeaders CheckpointFuzzTests/configurations AdversarialTextTests; do
  echo "== $name"
  # Address space, in KiB: a parser that asks for more than it read ends here instead of taking the machine.
  if ! (ulimit -v $((8 << 20)); swift test -c release --skip-build --filter "$name" 2>&1 | tail -n 6); then
    failed+=("$name"); cat "$APUS_FUZZ_CASE_FILE"
  fi
done
if [ -n "${FUZZ_PYTHON:-}" ]; then
  seed=$(date +%s)
  (ulimit -v $((8 << 20))
    "$FUZZ_PYTHON" Scripts/fuzz_tokenizers.py "$apus" --grammar "${FUZZ_TOKENIZERS:-2000}" --seed "$seed"
    "$FUZZ_PYTHON" Scripts/fuzz_tokenizers.py "$apus" --sentencepiece "${FUZZ_MODELS:-100}" --seed "$seed"
    "$FUZZ_PYTHON" Scripts/fuzz_templates.py "$apus" --count "${FUZZ_TEMPLATES:-100000}" --seed "$seed") || failed+=(python)
fi
if [ ${#failed[@]} -gt 0 ]; then echo "Failed: ${failed[*]}"; exit 1; fi
rm -f "$APUS_FUZZ_CASE_FILE"
