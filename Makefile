# Apus. `make serve` and `make test` set up everything they need; the rest assumes they ran once.
SHELL := /bin/bash
SWIFT ?= swift
# One configuration for everything: tests of an engine are unbearably slow in debug, and one set of flags is built once.
FLAGS := -c release
MODEL ?=
PORT ?= 8000
HOST ?= 127.0.0.1
ARGS ?=

.PHONY: serve test client-checks client-setup build setup fmt lint bench golden docs clean

## serve: build and serve a model on port 8000 (MODEL=path of a checkpoint; the demo model by default)
serve: build
	$(shell $(SWIFT) build $(FLAGS) --show-bin-path 2>/dev/null)/apus serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

## test: build and pass every test, those with the official Python clients included (CLIENT_CHECKS=skip leaves these out)
test: setup client-setup lint
	$(SWIFT) build $(FLAGS) --build-tests
	$(SWIFT) test $(FLAGS) --skip-build
	Scripts/client_checks.sh run "$$($(SWIFT) build $(FLAGS) --show-bin-path)/apus"

## client-checks: the checks with the official Python clients alone
client-checks: build client-setup
	Scripts/client_checks.sh run "$$($(SWIFT) build $(FLAGS) --show-bin-path)/apus"

## build: the `apus` executable, in release
build: setup
	$(SWIFT) build $(FLAGS) --product apus

setup:
	@Scripts/setup.sh

# Before the build, so that a machine without the package registry says so at once.
client-setup: setup
	@Scripts/client_checks.sh setup

## fmt: format every Swift file
fmt:
	$(SWIFT) format -i -r --parallel Package.swift Sources Tests

## lint: refuse files that are not formatted
lint:
	$(SWIFT) format lint --strict -r --parallel Package.swift Sources Tests

## bench: the numbers of the README (JSON under bench-results/)
bench: build
	Scripts/bench.sh

## golden: remake the golden files from Hugging Face libraries (needs PyPI)
golden:
	Scripts/golden.sh

## docs: remake the generated reference pages
docs: build
	Scripts/docs.sh

clean:
	rm -rf .build

help:
	@grep -E '^## ' Makefile | sed 's/^## //'
