#!/usr/bin/env bash
# Runs the C kernels under AddressSanitizer (Tests/CKernels/harness.c). It compiles for minutes.
#
# On a machine without AVX-512 its two levels run in emulation: they are compiled for AVX2 with the intrinsics in plain C
# (Tests/CKernels/emulated_avx512.h). APUS_EMULATE=1 asks for that anywhere. A first argument is the seed.
# SANITIZERS replaces the flags of the sanitizer, such as "-fsanitize=address,undefined -fno-sanitize=alignment".
set -euo pipefail
cd "$(dirname "$0")/.."
compiler=${CC:-clang}
sanitizers=${SANITIZERS--fsanitize=address}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r Sources/CKernels "$folder/"
# Benchmarks of registers cannot be emulated.
rm "$folder/CKernels/ceilings.c"
if [ "${APUS_EMULATE:-}" = 1 ] || { [ "$(uname -m)" = x86_64 ] && ! grep -qw avx512_bf16 /proc/cpuinfo; }; then
  echo "AVX-512 in emulation"
  cp Tests/CKernels/emulated_avx512.h "$folder/CKernels/"
  sed -i 's/,avx512[a-z0-9]*//g' "$folder/CKernels/each_level.h"
  sed -i 's/#include <immintrin.h>/#include "emulated_avx512.h"/' "$folder/CKernels/internal.h"
  sed -i '/case APUS_ISA_AVX512:/,/return 0;/{s/return apus_isa_supported(APUS_ISA_AVX2).*/return 1;/;s/return apus_isa_supported(APUS_ISA_AVX512).*/return 1;/;/&& __builtin/d}' \
    "$folder/CKernels/context.c"
fi
for file in "$folder"/CKernels/*.c; do
  "$compiler" -O1 -gline-tables-only $sanitizers -std=gnu11 -w -I"$folder/CKernels/include" -c "$file" -o "${file%.c}.o"
done
"$compiler" -O1 -g $sanitizers -std=gnu11 -Wall -Wextra -I"$folder/CKernels/include" Tests/CKernels/harness.c \
  "$folder"/CKernels/*.o -lm -lpthread -o "$folder/harness"
"$folder/harness" "$@"
