#!/usr/bin/env bash
# Compiles the C kernels and measures them on one thread (Tests/CKernels/bench.c). Arguments: outputs and inputs of the
# matrix, 4864 896 by default.
set -euo pipefail
cd "$(dirname "$0")/.."
compiler=${CC:-clang}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for file in Sources/CKernels/*.c; do
  "$compiler" -O2 -std=gnu11 -ISources/CKernels/include -c "$file" -o "$folder/$(basename "$file" .c).o"
done
"$compiler" -O2 -std=gnu11 -Wall -Wextra -ISources/CKernels/include Tests/CKernels/bench.c "$folder"/*.o -lm -lpthread \
  -o "$folder/bench"
"$folder/bench" "$@"
