# Each target sets up what it needs (system packages by apt, .venv by pip); running one again is quick and changes nothing.
PYTHON ?= python3
BIN := .venv/bin
PYTEST_ARGS ?=
# Sizes of the demo: `make demo STEPS=600 SIZE=32`. Left empty, it takes its own, which fit six minutes on two cores.
STEPS ?=
SIZE ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup:  ## Install the system packages and the Python environment (the other targets do this by themselves)
	@$(PYTHON) .ci/setup.py

demo: setup  ## The main job from end to end on this machine: train, be preempted, come back, finish
	@$(BIN)/muster demo $(if $(STEPS),--steps $(STEPS)) $(if $(SIZE),--size $(SIZE))

test: setup  ## All tests, on the real daemons too
	@$(BIN)/python -m pytest -n 3 $(PYTEST_ARGS)

lint: setup  ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: setup  ## Measure what docs/performance.md reports
	@$(BIN)/python -m tests.benchmarks

clean:  ## Stop the clusters that the demo and the tests left, and remove what was built here
	@if [ -x $(BIN)/muster ]; then $(BIN)/muster local down --all; fi
	@rm -rf .venv .muster build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
