#!/usr/bin/env bash
set -euo pipefail
usage() {
  cat <<'END'
Compiles the C kernels for aarch64 as they are shipped (-O2) and runs Tests/CKernels/harness.c, on this machine or where that
is another one under qemu: every level against sums in double precision, and codes and int8 bit for bit against the portable
form, as on x86.

usage: Scripts/arm_kernels.sh [FAMILY...]

Families are those of Scripts/asan_kernels.sh; all by default. Processors that are emulated: one without dot products (level
0 alone must be found, and checksums are run), one with them (levels 0 and 4), and one with products of matrices (0, 4, 5).

Cross-compiling takes clang, ld.lld, qemu-user and libc6-dev-arm64-cross. The last two are installed with apt-get where this is
run as root; where that fails the script says so and ends with status 0.

  PROCESSORS   replaces "neoverse-n1 max"
  CC           the compiler, clang by default
END
}
case ${1:-} in --help | -h) usage; exit 0 ;; esac
cd "$(dirname "$0")/.."
compiler=${CC:-clang}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
flags=(-O2 -std=gnu11 -Wall -Wextra -ISources/CKernels/include)
if [ "$(uname -m)" = aarch64 ]; then
  "$compiler" "${flags[@]}" Sources/CKernels/*.c Tests/CKernels/harness.c -lm -lpthread -o "$folder/harness"
  "$folder/harness" 1 "$@"
  exit
fi
root=/usr/aarch64-linux-gnu
if ! command -v qemu-aarch64 > /dev/null || [ ! -e "$root/include/stdio.h" ]; then
  if ! { [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update -qq > /dev/null 2>&1 \
    && apt-get install -y -qq --no-install-recommends qemu-user libc6-dev-arm64-cross > /dev/null 2>&1; }; then
    echo "Skipped: qemu-user and libc6-dev-arm64-cross are not installed and could not be."
    exit 0
  fi
fi
if ! command -v ld.lld > /dev/null; then
  echo "Skipped: ld.lld, which links for aarch64, is not installed."
  exit 0
fi
for file in Sources/CKernels/*.c Tests/CKernels/harness.c; do
  "$compiler" --target=aarch64-linux-gnu -isystem "$root/include" -mno-outline-atomics "${flags[@]}" -c "$file" \
    -o "$folder/$(basename "$file" .c).o"
done
# By hand, because there is no compiler's library for aarch64, nor a need for it.
ld.lld -o "$folder/harness" -dynamic-linker /lib/ld-linux-aarch64.so.1 "$root"/lib/crt{1,i}.o "$folder"/*.o -L"$root/lib" \
  -lm -lc "$root/lib/crtn.o"
run() {
  echo "$1"
  qemu-aarch64 -cpu "$1" -L "$root" "$folder/harness" 1 "${@:2}"
}
found=$(run cortex-a72 files)
echo "$found"
grep -q "levels 0$" <<< "$found" || { echo "Levels that the processor does not have were found."; exit 1; }
for processor in ${PROCESSORS:-neoverse-n1 max}; do run "$processor" "$@"; done
