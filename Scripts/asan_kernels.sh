#!/usr/bin/env bash
set -euo pipefail
usage() {
  cat <<'END'
Runs the C kernels under AddressSanitizer (Tests/CKernels/harness.c), at every level of instructions, over odd sizes,
strides and addresses, in memory of exactly the size that may be touched.

usage: Scripts/asan_kernels.sh [--seed N] [FAMILY...]

What is checked in each family, at each level, on 1 to 7 threads:
  dense      products with float32, float16, bfloat16 and int8 (W8A8) weights against sums in double precision; a row's
             bits in any batch and on any threads; views of packed weights, and their refusal of wrong sizes
  codes      the same for 4, 5, 6 and 8 bits in groups, MXFP4, IQ4_NL, float8 and an order of inputs; the same bits at
             every level
  rounding   weights rounded to codes: their error, the same codes at every level
  experts    products of several weights at once, over views of packed weights too, and over columns (apus_columns_run);
             the choice of experts, the joined halves, and the weighted sums of results
  files      the checksum of packed files: any address, any threads, any changed bit
  attention  paged attention in float32, float16 and bfloat16 against a softmax in double precision: window, sinks, soft
             cap, prefixes that sequences share; a row's bits alone, in company, and without sharing
  narrow     the same over K/V of 8 bits (int8 and float8)
  drafts     many rows of a sequence at once: what was drafted after a token, and chunks of a prompt
  latent     attention over latent pages
  pages      K/V pages: written, read, copied; the same bytes at every level
  rows       norms, activations, additions, gathering, embedding, rotation, conversion, attention of encoders
  sampling   draws, largest entries, log-sum-exp, masks and penalties against a sort in double precision

Without families all are run; only the files of those that are asked for are compiled. Levels are portable, AVX2, AVX-512
and AVX-512 with BF16 and VNNI. On a machine without AVX-512 its two levels run in emulation: they are compiled for AVX2
with the intrinsics in plain C (Tests/CKernels/emulated_avx512.h). Loops of tiles are not unrolled (APUS_COMPACT), which
keeps compilation short and lets the sanitizer see the tiles' arrays.

  APUS_EMULATE=1   asks for the emulation anywhere
  CC               the compiler, clang by default
  SANITIZERS       replaces -fsanitize=address, such as "-fsanitize=address,undefined -fno-sanitize=alignment"
END
}
seed=1
families=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --seed) seed=${2:?--seed needs a number}; shift ;;
    dense | codes | rounding | experts | files | attention | narrow | drafts | latent | pages | rows | sampling)
      families+=("$1") ;;
    *) echo "Unknown argument $1; --help says what there is." >&2; exit 2 ;;
  esac
  shift
done
cd "$(dirname "$0")/.."
compiler=${CC:-clang}
sanitizers=${SANITIZERS--fsanitize=address}
# Which files and which part of the harness the families need.
files=(context pool random)
parts=()
wants() {
  [ ${#families[@]} -eq 0 ] && return 0
  local family
  for family in "$@"; do [[ " ${families[*]} " == *" $family "* ]] && return 0; done
  return 1
}
if wants dense codes rounding experts files; then
  files+=(linear codes experts checksum)
  parts+=(-DCHECK_PRODUCTS)
fi
if wants attention narrow drafts latent pages; then
  files+=(attention kv)
  parts+=(-DCHECK_ATTENTION)
fi
if wants rows sampling; then
  files+=(norm elementwise rope encoder sampling)
  parts+=(-DCHECK_ROWS)
fi
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
# lld links in silence; gold warns of each of the sanitizer's own symbols.
linker=()
if command -v ld.lld > /dev/null; then linker=(-fuse-ld=lld); fi
objects=()
for file in "${files[@]}"; do
  "$compiler" -O1 -DAPUS_COMPACT -gline-tables-only $sanitizers -std=gnu11 -w -I"$folder/CKernels/include" \
    -c "$folder/CKernels/$file.c" -o "$folder/$file.o"
  objects+=("$folder/$file.o")
done
"$compiler" -O1 -gline-tables-only $sanitizers -std=gnu11 -Wall -Wextra "${parts[@]}" "${linker[@]}" -I"$folder/CKernels/include" \
  Tests/CKernels/harness.c "${objects[@]}" -lm -lpthread -o "$folder/harness"
"$folder/harness" "$seed" "${families[@]}"
