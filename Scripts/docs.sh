#!/usr/bin/env bash
# Remakes the generated reference pages from the program itself.
set -euo pipefail
cd "$(dirname "$0")/.."
apus=$(swift build -c release --show-bin-path)/apus
"$apus" reference > docs/reference/flags.md
