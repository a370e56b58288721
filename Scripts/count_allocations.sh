#!/usr/bin/env bash
# How often the threads of a serving process allocate memory in a step of steady decoding: the calls of the allocator in a run of
# 16 requests with long outputs less those in a run with short ones, divided by the steps between.
#
#   Scripts/count_allocations.sh [MODEL]     default: the demo model
#
# APUS names another program. COUNT_TRACE=apus-engine prints stacks of some of a thread's allocations.
# Everything that a step allocates on the way is counted, by whom it is called: Swift, C and libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
apus=${APUS:-.build/release/apus}
model=${1:-Models/apus-demo}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${CC:-clang}" -O2 -shared -fPIC Scripts/count_allocations.c -o "$folder/count.so" -ldl -lpthread
short=32 long=160
for length in $short $long; do
  COUNT_FILE="$folder/$length" LD_PRELOAD="$folder/count.so" "$apus" bench offline "$model" --num-prompts 16 \
    --dataset-name random --random-input-len 32 --random-output-len "$length" --random-range-ratio 1 --quiet \
    >"$folder/output" 2>&1 || { cat "$folder/output"; exit 1; }
  [ -z "${COUNT_TRACE:-}" ] || cat "$folder/output"
done
awk -v steps=$((long - short)) '
  FNR == NR { count[$3] -= $1; bytes[$3] -= $2; next }
  { count[$3] += $1; bytes[$3] += $2 }
  END {
    printf "%-18s %12s %12s\n", "thread", "calls/step", "bytes/step"
    for (name in count) if (name ~ /^apus-(engine|model|cpu|mask)/) {
      printf "%-18s %12.2f %12.0f\n", name, count[name] / steps, bytes[name] / steps | "sort"
    }
  }' "$folder/$short" "$folder/$long"
