#!/usr/bin/env bash
# Runs the C kernels under AddressSanitizer and UndefinedBehaviorSanitizer (Tests/CKernels/harness.c).
#
# On a machine without AVX-512 its two levels run in emulation: they are compiled for AVX2 with the intrinsics in plain C
# (Tests/CKernels/emulated_avx512.h). APUS_EMULATE=1 asks for that anywhere. A first argument is the seed.
# SANITIZERS= (empty) compiles without sanitizers, which is faster.
set -euo pipefail
cd "$(dirname "$0")/.."
compiler=${CC:-clang}
sanitizers=${SANITIZERS--fsanitize=address,undefined -fno-sanitize=alignment}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r Sources/CKernels "$folder/"
if [ "${APUS_EMULATE:-}" = 1 ] || { [ "$(uname -m)" = x86_64 ] && ! grep -qw avx512_bf16 /proc/cpuinfo; }; then
  echo "AVX-512 in emulation"
  cp Tests/CKernels/emulated_avx512.h "$folder/CKernels/"
  sed -i 's/,avx512[a-z0-9]*//g' "$folder/CKernels/each_level.h"
  sed -i 's/#include <immintrin.h>/#include "emulated_avx512.h"/' "$folder/CKernels/internal.h"
  sed -i '/case APUS_ISA_AVX512:/,/return 0;/{s/return apus_isa_supported(APUS_ISA_AVX2).*/return 1;/;s/return apus_isa_supported(APUS_ISA_AVX512).*/return 1;/;/&& __builtin/d}' \
    "$folder/CKernels/context.c"
fi
# Addresses of numbers are unaligned on purpose, and wide vectors are never passed by a real call.
for file in "$folder"/CKernels/*.c; do
  "$compiler" -O1 -g $sanitizers -std=gnu11 -w -I"$folder/CKernels/include" -c "$file" -o "${file%.c}.o"
done
"$compiler" -O1 -g $sanitizers -std=gnu11 -Wall -Wextra -I"$folder/CKernels/include" Tests/CKernels/harness.c \
  "$folder"/CKernels/*.o -lm -lpthread -o "$folder/harness"
"$folder/harness" "$@"
