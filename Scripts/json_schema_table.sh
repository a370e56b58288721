#!/bin/sh
# Writes the table of docs/json-schema.md anew from the official test suite in ../shared/data/conformance.
# Needs a release build of the tests (swift build -c release --build-tests).
set -e
cd "$(dirname "$0")/.."
APUS_WRITE_DOCS=1 swift test -c release --skip-build --filter JSONSchemaConformanceTests/table
