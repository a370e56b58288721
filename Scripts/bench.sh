#!/usr/bin/env bash
# The numbers of the README. Writes JSON under bench-results/. Wants a quiet machine; takes about two minutes on two cores.
#
#   MODEL=path     a small real checkpoint for the streaming benchmark (default: the demo model)
#   RESULTS=path   where results go
set -euo pipefail
cd "$(dirname "$0")/.."
apus=$(swift build -c release --show-bin-path)/apus
results=${RESULTS:-bench-results}
mkdir -p "$results"
half_billion=Benchmarks/qwen2.5-0.5b          # a configuration alone: the weights are random
port=18000

echo "== start-up to first token, 0.5 B parameters, random weights in bfloat16"
"$apus" bench startup "$half_billion" --load-format dummy --repeats 5 --output-file "$results/startup.json"

echo "== scheduler overhead"
"$apus" bench scheduler --output-file "$results/scheduler.json"

echo "== decoding at batch 1"
"$apus" bench offline "$half_billion" --load-format dummy --num-prompts 1 --dataset-name random \
  --random-input-len 512 --random-output-len 48 --output-file "$results/decode.json"

echo "== prefix cache on shared prefixes, on and off"
shared=(--load-format dummy --dataset-name generated-shared-prefix --gsp-num-groups 4 --gsp-prompts-per-group 8
  --gsp-system-prompt-len 512 --gsp-question-len 32 --gsp-output-len 16)
"$apus" bench offline "$half_billion" "${shared[@]}" --output-file "$results/prefix-on.json"
"$apus" bench offline "$half_billion" "${shared[@]}" --disable-radix-cache --output-file "$results/prefix-off.json"

echo "== streaming through HTTP, and CPU time while idle"
"$apus" serve ${MODEL:+"$MODEL"} --port $port --log-level warning &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
for _ in $(seq 100); do curl -sf "http://127.0.0.1:$port/ready" >/dev/null && break; sleep 0.1; done
"$apus" bench serving --base-url "http://127.0.0.1:$port" --num-prompts 512 --max-concurrency 64 \
  --random-input-len 32 --random-output-len 128 --output-file "$results/streaming.json"
ticks() { awk '{print $14 + $15}' "/proc/$server/stat"; }
sleep 3 # the last connections are still being closed
before=$(ticks); sleep 10; after=$(ticks)
echo "CPU time while idle: $((after - before)) ticks of 10 ms in 10 s"
